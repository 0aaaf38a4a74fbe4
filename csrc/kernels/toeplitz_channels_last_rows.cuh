// What kernels of toeplitz_channels_last.cuh are compiled for, and how rows of channels_last arrays come to shared
// memory and go from there.
#pragma once

#include <algorithm>
#include <type_traits>

#include "channels_last.cuh"
#include "toeplitz_channels_last.h"

namespace dwconv {
namespace {

constexpr int kTiles = 8;                   // of a warp
constexpr int kMaxWarps = 8;                // of a block, as the registers of the sums allow
constexpr int kMiddle = 8;                  // zeros before the weights of a band matrix
constexpr int kBarrier = 0, kRing = kUnit;  // where they are in shared memory
constexpr int kPairMiddle = 9;              // entries before the weights, see Shape::kBandBytes

// Where pixels of the source lie: at units of 16 bytes (kUnits), or between them. Then a warp reads its channels from
// the middle of a word on, the first or the second one of 8 bytes (kTwo, kSix: so many bytes behind 8), or from a word
// on (kWords). Where channels are parted, kWords is for all that lie between units.
enum class Lie { kUnits, kTwo, kSix, kWords };

// What a kernel is compiled for. kRows: rows of the kernel, which is as many rows of sums; or else, if kWhole, rows of
// an image, all of whose sums there are at once, whatever the kernel. kBlocks: of 8 columns of the source that 8
// columns of the target read. kSplit: the lower 8 rows of a multiplication are not the next 8 columns, but those of 8
// more images, for images of at most 8 columns, which are one block.
template <int kRows_, int kBlocks_, bool kSplit_, Lie kLie, bool kWhole_ = false>
struct Shape {
  static constexpr int kRows = kRows_, kBlocks = kBlocks_;
  static constexpr bool kSplit = kSplit_, kWhole = kWhole_;
  static constexpr bool kShifted = kLie != Lie::kUnits;
  static constexpr int kChannels = kBlocks <= 2 ? 4 : 2;  // of a warp
  // Whether the channels of a row are parted once, before warps read it, or by each thread that reads pixels.
  static constexpr bool kParted = !kWhole && kBlocks > 3;
  static constexpr int kSourceRows = kWhole ? 2 : 1;  // of a step
  static constexpr int kDepth = 8 / kSourceRows;      // steps in the ring: one to work on, the others on their way
  // Whether a word of each pixel is read late, beside multiplications, when others may have gone on to the next step.
  static constexpr bool kLate = !kWhole && kChannels == 4 && (kLie == Lie::kTwo || kLie == Lie::kSix);
  // Of those, loaded before the first one: if channels are parted, or rows read ahead, one more.
  static constexpr int kAhead = kWhole || kParted ? kDepth : kDepth - (kLate ? 2 : 1);
  // Steps that may still be on their way before the first one; in one, when the next one has to be there, one fewer.
  static constexpr int kPending = kDepth - (kLate ? 3 : 2);
  // Rows of outputs: one that is written, one that is waited for, one that is stored; or those written at once.
  static constexpr int kStages = kWhole ? 7 : 3;
  // Whether band matrices stay in registers, beside the sums, or are read from shared memory each time.
  static constexpr bool kKept = !kWhole && kRows * kChannels * (4 + kBlocks) < 200;
  static constexpr int kColumns = kSplit ? 8 : 16;             // of a tile
  static constexpr int kPairs = kSplit ? 2 : kBlocks + 1;      // of pixels, 8 columns apart, that a thread multiplies
  static constexpr int kReach = kWhole ? 0 : 8 * kBlocks - 8;  // columns of the source beyond those of the last tile
  static constexpr int kPitch = 2 * kChannels * kMaxWarps + kUnit;  // bytes from pixel to pixel in shared memory
  // Words of a pixel that a warp's channels lie in, and whether they begin in the middle of the first one.
  static constexpr int kOdd = kLie == Lie::kTwo || kLie == Lie::kSix ? 1 : 0, kWords = kChannels / 2 + kOdd;
  struct Pixel {
    uint32_t words[kWords];
  };
  static constexpr int kFirst = kLie == Lie::kSix ? 1 : 0;  // of two words that are read at once
  // Whether one read brings two words of which a warp has two channels: those of a half of a unit. The pixels that a
  // warp reads at once lie in as many units as four reads take, be it of 4 bytes or of 8.
  static __device__ bool reads_both(uint32_t at) { return kWords == 2 && kOdd == 1 && (at - 2) % 8 == 0; }
  static __device__ void read_both(Pixel& pixel, uint32_t at) {
    const uint2 half = shared_at<uint2>(at - 2);
    pixel.words[0] = half.x, pixel.words[kWords - 1] = half.y;
  }
  // Reads them but for the word that is read late.
  static __device__ void read_pixel(Pixel& pixel, uint32_t at) {
    if constexpr (kChannels == 4 && kLie != Lie::kWords) {
      const uint2 pair = shared_at<uint2>(at - 2 * kOdd + 4 * kFirst);
      pixel.words[kFirst] = pair.x, pixel.words[kFirst + 1] = pair.y;
    } else {
#pragma unroll
      for (int i = 0; i < kWords; ++i) pixel.words[i] = shared_at<uint32_t>(at - 2 * kOdd + 4 * i);
    }
  }
  static __device__ void read_late(Pixel& pixel, uint32_t at) {
    constexpr int kLast = kLie == Lie::kSix ? 0 : 2;
    if constexpr (kLate) pixel.words[kLast] = shared_at<uint32_t>(at - 2 + 4 * kLast);
  }

  static constexpr int kBandRows = kWhole ? 2 * kRows - 1 : kRows;  // rows of the kernel that are prepared
  // Bytes to the same weight in a copy that is a column further on: with both, any two neighbours are one word.
  static constexpr int kCopy = 2 * (8 * kBlocks + 7);
  // Of a row of weights: both copies; or 8 bytes for an entry, its two neighbours and those 8 further on, between as
  // many entries as leave room for all that are written.
  static constexpr int kBandBytes = kKept ? 32 * (kBlocks + 1) : 8 * (kWhole ? 8 * kBlocks + kPairMiddle : 18);
  static constexpr int kTogether = 32 / kChannels;  // threads that load a channel's weights
  static constexpr int kMaxColumns = kBlocks == 1 ? kMaxBandColumns : 8 * kBlocks - 7;  // of the kernel
  static constexpr int kTurns =
      kWhole ? 16 : (kRows * kMaxColumns - 1) / kTogether + 1;  // weights a thread has at once

  // Where a column lies in a row in shared memory.
  static __host__ __device__ constexpr int place_of(int column) { return column * kPitch + column / 16 * kUnit; }

  // Whether outputs of a warp's channels lie side by side, apart from those of the others, so that they are written to
  // all banks: where several rows are at once.
  static constexpr bool kApart = kWhole;
  static constexpr int kWord = 2 * kChannels;     // bytes of a pixel, for a warp
  static constexpr int kImagePitch = 20 * kWord;  // from one image to the next
  static __host__ __device__ constexpr int output_place_of(int column) {
    return kApart ? column * kWord : place_of(column);
  }
};

// An array (N, height, width, channels), and how the threads of a block copy a row of it, in units of 16 bytes.
struct Rows {
  char* base;
  int shift;  // bytes behind `base`, a multiple of 16, that all units of a pixel begin
  int64_t image_bytes, row_bytes;
  int pixel_bytes, bytes;  // from one pixel to the next; of a pixel, all channels
  int height, width;
  int columns;       // of a block in an image
  int stream_bytes;  // in shared memory, from one image to the next
  int warp_bytes;    // from one warp's channels of a pixel to those of the next
  // Columns and images that are copied at once, and what leads to the next ones: there are either more columns or more
  // images.
  int columns_at_once, streams_at_once;
  int64_t step;
  int place_step;
  int copies;  // of a thread, at most
  Divider by_units, by_columns;
  Divider by_all_units, by_all_columns;  // all that a pixel has in shared memory; columns that are loaded
};

struct Toeplitz {
  Rows source, target;
  int batch, channels, padding_h, padding_w;
  const void* weight;
  int64_t weight_filter, weight_row, weight_column;
  const void* bias;
  int64_t bias_stride;
  int kernel_h, kernel_w;

  int lead;       // columns of the source before a tile's first column from which on it is read
  int first_tap;  // the column of the kernel that the first of them meets in a tile's first column
  int tiles, streams;
  int slab;                               // channels of a block
  int slot_bytes, stage_bytes, stage_at;  // rows of the ring, and of outputs behind it
  int ring_bytes, stages_bytes;           // all of them
  int bands_at;                           // weights between zeros; outputs take their place if they are in registers
  // Of a source row whose channels are parted: in units of 8 columns, the even ones of all images before the odd ones.
  int planes_at, planes_bytes;  // there are two such rows
  int plane_bytes;              // from one channel to the next
  int odd_bytes, stream_units;  // to the odd units; from one image to the next
  int matrices, turns;          // of 8 columns and 8 channels; of 4 of them for each 8 channels
  int rows, spans;              // rows of all groups of images; spans of columns
  int whole_rows;               // those of groups that lack no image
  int workers;                  // blocks that share the rows of a slab
  Shares shares;                // of the rows of all spans
  bool clear;                   // whether there is something outside the images, which is never loaded
  Divider by_slabs, by_rows, by_height, by_kernel_w, by_groups, by_ring_rows;
};

// Copies a unit, or does not: without a branch, and with a line of 128 bytes as the least to fetch: another slab's
// block has use for the rest.
__device__ inline void copy_unit_if(bool copy, uint32_t to, const char* from) {
#if __CUDA_ARCH__ >= 800
  asm volatile(
      "{\n.reg .pred copy;\nsetp.ne.s32 copy, %2, 0;\n"
      "@copy cp.async.cg.shared.global.L2::128B [%0], [%1], 16;\n}" ::"r"(to),
      "l"(from), "r"(static_cast<int>(copy))
      : "memory");
#endif
}

// A thread's part of every row that its block copies: some columns of some images, 8 channels. kOutputs: of rows of the
// target.
template <class Shape, bool kOutputs>
class Share {
 public:
  // Of a row: always enough for outputs, and for most sources.
  static constexpr int kCopies = Shape::kChannels == 2 ? 1 : 2;
  using Units = uint4[kCopies];

  // `memory`: where rows lie in shared memory.
  __device__ explicit Share(uint32_t memory) : memory_(memory), place_(memory) {}

  // Goes to a row of a group of images. `slab`: the block's first channel; `first_column`: of the image, may lie
  // outside. All that it takes is worked out again each time: there are no registers to keep it in.
  __device__ void seek(const Toeplitz& a, const Rows& r, int slab, int first_column, int group, int row) {
    uint32_t rest;
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(rest));  // or else the compiler keeps what follows from it
    const int part = r.by_units.split(rest) * kUnit, before = max(-first_column, 0);
    const int begin = before + r.by_columns.split(rest);
    const int stream = rest, image = group * a.streams + stream;
    const bool any = stream < r.streams_at_once && slab * 2 + part < r.bytes;
    const int end = any ? min(r.columns, r.width - first_column) : 0;
    const int images = begin < end ? min(a.streams - stream, a.batch - image) : 0;
    left_ = 0;
#pragma unroll 1
    for (int i = 0; i < images; i += r.streams_at_once) ++left_;
    if (left_ == 1)  // there are either more images or more columns
#pragma unroll 1
      for (int i = begin + r.columns_at_once; i < end; i += r.columns_at_once) ++left_;
    const int place =
        kApart ? part / Shape::kWord * r.warp_bytes + Shape::output_place_of(begin) : part + Shape::place_of(begin);
    place_ = memory_ + stream * r.stream_bytes + place;
    at_ = r.base + (image * r.image_bytes + row * r.row_bytes +
                    static_cast<int64_t>(first_column + begin) * r.pixel_bytes + slab * 2 + part);
  }

  // Goes from a group of images to the next one, `rows` further down. Neither lacks an image.
  __device__ void advance(const Toeplitz& a, const Rows& r, int rows) {
    at_ += a.streams * r.image_bytes + rows * r.row_bytes;
  }

  // Begins to load the row, or one of the next, if there is `any`, `to` bytes further on in shared memory: by kCopies
  // copies, without a branch...
  __device__ void load(const Rows& r, int to, bool any, int rows = 0) const {
#pragma unroll
    for (int t = 0; t < kCopies; ++t)
      copy_unit_if(any && t < left_, place_ + to + t * r.place_step, at_ + rows * r.row_bytes + t * r.step);
  }
  // The same of a row by `copy`, which is called with where a unit goes and where it comes from.
  template <typename Copy>
  __device__ void load_each(const Rows& r, int to, bool any, int rows, Copy&& copy) const {
#pragma unroll 1
    for (int t = 0; t < kCopies && any && t < left_; ++t)
      copy(place_ + to + t * r.place_step, at_ + rows * r.row_bytes + t * r.step);
  }
  // ... and by more, where there are more: never of small images.
  static __device__ bool has_more(const Rows& r) { return !Shape::kWhole && r.copies > kCopies; }
  __device__ void load_more(const Rows& r, int to, bool any, int rows = 0) const {
    if (!any || !has_more(r)) return;
    const char* from = at_ + rows * r.row_bytes;
#pragma unroll 1
    for (int t = kCopies; t < left_; ++t) copy_unit<kUnit>(place_ + to + t * r.place_step, from + t * r.step);
  }

  // Takes the row, if there is `any`, `from` bytes further on in shared memory, to store it.
  __device__ void take(const Rows& r, int from, Units& units, bool any = true) const {
#pragma unroll
    for (int t = 0; t < kCopies; ++t)
      if (any && t < left_) {
        const uint32_t place = place_ + from + t * r.place_step;
        if constexpr (!kApart) {
          units[t] = shared_at<uint4>(place);
        } else {
          const auto word = [&](int i) { return shared_at<uint32_t>(place + i * r.warp_bytes); };
          units[t] = {word(0), word(1), word(2), word(3)};
        }
      }
  }

  // Stores what was taken.
  __device__ void store(const Rows& r, const Units& units, bool any = true) const {
#pragma unroll
    for (int t = 0; t < kCopies; ++t)
      if (any && t < left_) *reinterpret_cast<uint4*>(at_ + t * r.step) = units[t];
  }

  // Goes to the next row, if there was any.
  __device__ void next(const Rows& r, bool any = true) { at_ += any ? r.row_bytes : 0; }

  // Where its first unit of the row is in memory, whether there is one or not.
  __device__ const char* at() const { return at_; }

 private:
  static constexpr bool kApart = kOutputs && Shape::kApart;

  uint32_t memory_, place_;
  int left_ = 0;  // copies
  char* at_ = nullptr;
};

// What comes after `place` in a ring, and what before.
__device__ inline int next_place(int place, int bytes, int ring_bytes) {
  return place + bytes == ring_bytes ? 0 : place + bytes;
}
__device__ inline int place_before(int place, int bytes, int ring_bytes) {
  return (place == 0 ? ring_bytes : place) - bytes;
}

// Output rows [begin, end) of all groups of images, as far as they are of one group.
template <class Shape>
__device__ Run run_of(const Toeplitz& a, int begin, int end) {
  if constexpr (Shape::kWhole) {
    Run r;
    uint32_t group = begin;
    r.begin = a.by_height.split(group);
    r.image = group;
    r.end = min(a.target.height, r.begin + end - begin);
    r.row = 0, r.row_end = a.source.height;
    return r;
  } else {
    return run_of<1, Shape::kRows>(a.by_height, a.padding_h, a.source.height, begin, end);
  }
}

// A thread's share of the rows of a block's runs, one after the other: of the source, or of the target.
template <class Shape, bool kOfTarget>
class RunRows {
 public:
  // Whether the next row has to be found.
  __device__ bool is_between() const { return left_ == 0; }

  // Finds it, if there is one.
  __device__ void find(const Toeplitz& a) {
    if (left_ != 0) return;
    left_ = -1;
    if (begin_ == end_) return;
    const Run r = run_of<Shape>(a, begin_, end_);
    const Rows& rows = kOfTarget ? a.target : a.source;
    const int first = kOfTarget ? r.begin : r.row;
    if (row_ >= 0 && begin_ < a.whole_rows)
      share_.advance(a, rows, first - row_);
    else
      share_.seek(a, rows, slab_, first_column_, r.image, first);
    begin_ += r.end - r.begin;
    row_ = kOfTarget ? r.end : r.row_end, left_ = row_ - first;
  }

 protected:
  // `memory`: where the rows lie in shared memory.
  __device__ RunRows(uint32_t memory, int slab, int first_column, int begin, int end)
      : share_(memory), slab_(slab), first_column_(first_column), begin_(begin), end_(end) {}

  Share<Shape, kOfTarget> share_;
  int left_ = 0;  // rows of the run; fewer than none behind the last one

 private:
  int slab_, first_column_;
  int begin_, end_;  // output rows of the runs that are not yet begun with
  int row_ = -1;     // behind the run
};

// Source rows of a block on their way to the ring.
template <class Shape>
class Feed : public RunRows<Shape, false> {
  using Base = RunRows<Shape, false>;
  using Base::left_, Base::share_;

 public:
  // `memory`: the block's, by its address.
  __device__ Feed(uint32_t memory, int slab, int first_column, int begin, int end)
      : Base(memory + kRing, slab, first_column, begin, end) {}

  // Begins to load all that a step takes, to a slot of the ring: first what takes no branch...
  __device__ void load(const Toeplitz& a, int slot) const {
#pragma unroll
    for (int k = 0; k < Shape::kSourceRows; ++k) share_.load(a.source, place_of(a, slot, k), left_ > k, k);
  }
  // ... and then the rest, if there is more, perhaps only `behind`, when it has gone on to the next row.
  static __device__ bool has_more(const Toeplitz& a) { return Share<Shape, false>::has_more(a.source); }
  __device__ void load_more(const Toeplitz& a, int slot, int behind = 0) const {
#pragma unroll
    for (int k = 0; k < Shape::kSourceRows; ++k)
      share_.load_more(a.source, place_of(a, slot, k), left_ + behind > k, k - behind);
  }

  // Whether there are rows to load that have been found, and are loaded without a branch.
  __device__ bool goes_on(const Toeplitz& a) const { return left_ > 0 && !has_more(a); }

  // Goes to the next rows.
  __device__ void next(const Toeplitz& a) {
    const int left = left_;
#pragma unroll
    for (int k = 0; k < Shape::kSourceRows; ++k) {
      share_.next(a.source, k == 0 || left > k);
      left_ -= k == 0 || left > k;
    }
  }

 private:
  // Where a row of a slot lies.
  static __device__ int place_of(const Toeplitz& a, int slot, int row) {
    return slot + row * (a.slot_bytes / Shape::kSourceRows);
  }
};

// The same of shifted pixels. Of each there is a unit more to copy: beside its share of the others, a thread has one of
// these, or two. Units that are too many for the shares' kCopies are copied beside, too.
template <class Shape>
class ShiftedFeed {
 public:
  static constexpr int kBeside = Shape::kParted ? 2 : 1;  // copies of a thread

  // `memory`: the block's, by its address.
  __device__ ShiftedFeed(uint32_t memory, int slab, int first_column, int begin, int end)
      : share_(memory + kRing),
        ring_(memory + kRing),
        slab_(slab),
        first_column_(first_column),
        begin_(begin),
        end_(end) {}

  __device__ bool is_between() const { return left_ == 0; }
  __device__ void find(const Toeplitz& a) {
    if (left_ != 0) return;
    if (!last_) {
      left_ = -1;
      if (begin_ == end_) return;
      const Run r = run_of<Shape>(a, begin_, end_);
      begin_ += r.end - r.begin;
      const int first = r.image * a.streams, images = min(a.streams, a.batch - first);
      if (images == images_)
        share_.advance(a, a.source, r.row - row_);
      else
        share_.seek(a, a.source, slab_, first_column_, r.image, r.row), seek_beside(a, images);
      row_ = r.row_end, left_ = row_ - r.row;
      last_ = first + images == a.batch && row_ == a.source.height;
      if (!last_) return;
      if (left_ > last_rows(a)) {
        left_ -= last_rows(a);
        return;
      }
    }
    // The array's last rows are found by themselves: its last unit is not its own alone.
    last_ = false, left_ = last_rows(a);
#pragma unroll
    for (int t = 0; t < kBeside; ++t)
      if (behind_ == t + 1) rest_ = beside_[t], beside_[t].to = 0;
  }

  // Begins to load all that a step takes, to a slot of the ring.
  __device__ void load(const Toeplitz& a, int slot) const {
#pragma unroll
    for (int k = 0; k < Shape::kSourceRows; ++k) share_.load(a.source, place_of(a, slot, k), left_ > k, k);
    load_beside(a, slot);
  }
  // The same before the first step: the array's first unit is not its own alone, either.
  __device__ void load_first(const Toeplitz& a) const {
#pragma unroll 1
    for (int k = 0; k < Shape::kSourceRows; ++k)
      share_.load_each(a.source, place_of(a, 0, k), left_ > k, k, [&](uint32_t to, const char* from) {
        if (from != a.source.base)
          copy_unit<kUnit>(to, from);
        else
          copy_part(to, from, a.source.shift, kUnit);
      });
    load_beside(a, 0);
  }
  // The array's last unit, and those of the step before it in memory, when they were left out, perhaps only `behind`.
  __device__ void load_more(const Toeplitz& a, int slot, int behind = 0) {
    if (rest_.to == 0 || (behind > 0 && left_ != 0)) return;
    const int rows = last_rows(a);
#pragma unroll 1
    for (int k = 0; k < rows; ++k)
      copy_part(rest_.to + place_of(a, slot, k), from_of(a, rest_, k - behind * rows), 0,
                k + 1 < rows ? kUnit : a.source.shift);
    rest_ = {};
  }
  static __device__ bool has_more(const Toeplitz&) { return false; }

  // Goes to the next rows.
  __device__ void next(const Toeplitz& a) {
    if (left_ <= 0) return;
    const int rows = Shape::kSourceRows == 1 ? 1 : min(left_, Shape::kSourceRows);
#pragma unroll
    for (int k = 0; k < Shape::kSourceRows; ++k) share_.next(a.source, k < rows);
    left_ -= rows;
  }

  // Whether the threads of a block can copy all units beside.
  static bool is_enough(const Toeplitz& a) {
    const Rows& r = a.source;
    const int columns = std::min(r.columns, r.width), far = std::max(columns - kFar * r.columns_at_once, 0);
    if (r.copies > kFar && a.streams > 1) return false;
    return a.streams * columns + far * static_cast<int>(r.by_units.divisor) <=
           kBeside * (a.slab / Shape::kChannels * 32);
  }

 private:
  static constexpr int kFar = Share<Shape, false>::kCopies;

  // Of a unit: how far behind the thread's first one it begins, and where it goes to in the first slot.
  struct Beside {
    int from;
    uint32_t to;
  };

  Share<Shape, false> share_;
  uint32_t ring_;
  int slab_, first_column_;
  int begin_, end_;  // output rows of the runs that are not yet begun with
  int row_ = 0;      // behind the run
  int left_ = 0;     // rows of the run; fewer than none behind the last one
  int images_ = 0, behind_ = 0;
  bool last_ = false;  // whether the array's last rows are still to be found
  Beside beside_[kBeside]{}, rest_{};

  __device__ const char* from_of(const Toeplitz& a, const Beside& b, int row) const {
    return share_.at() + (row * a.source.row_bytes + b.from);
  }
  static __device__ int place_of(const Toeplitz& a, int slot, int row) {
    return slot + row * (a.slot_bytes / Shape::kSourceRows);
  }
  // Of the last step of an image.
  static __device__ int last_rows(const Toeplitz& a) { return (a.source.height - 1) % Shape::kSourceRows + 1; }

  __device__ void load_beside(const Toeplitz& a, int slot) const {
#pragma unroll
    for (const Beside& b : beside_)
#pragma unroll
      for (int k = 0; k < Shape::kSourceRows; ++k)
        copy_unit_if(left_ > k && b.to != 0, b.to + place_of(a, slot, k), from_of(a, b, k));
  }

  // Finds the thread's units beside, of so many images: the last ones of all pixels, and then all others of those that
  // are too far. `behind_`: number of the one that ends behind the array in its last row, counted from 1 on, if the
  // thread has it and these are the last images.
  __device__ void seek_beside(const Toeplitz& a, int images) {
    const Rows& r = a.source;
    images_ = images, behind_ = 0;
    const int before = max(-first_column_, 0), end = min(r.columns, r.width - first_column_);
    const int last = min(static_cast<int>(r.by_units.divisor) * kUnit, r.bytes - slab_ * 2);
    uint32_t own = threadIdx.x;  // see Share::seek
    const int own_part = r.by_units.split(own) * kUnit, own_column = before + r.by_columns.split(own);
    const int all = a.streams * static_cast<int>(r.by_all_columns.divisor);
#pragma unroll
    for (int t = 0; t < kBeside; ++t) {
      const int number = threadIdx.x + t * blockDim.x;
      uint32_t rest = number < all ? number : number - all;
      const int part = number < all ? last : r.by_units.split(rest) * kUnit;
      const int far = static_cast<int>(rest) + kFar * r.columns_at_once;
      const int column = before + (number < all ? static_cast<int>(r.by_all_columns.split(rest)) : far);
      const int stream = number < all ? static_cast<int>(rest) : 0;
      const bool any = stream < images && column < end && (number < all || part < last);
      beside_[t].from = static_cast<int>((stream - static_cast<int>(own)) * r.image_bytes) +
                        (column - own_column) * r.pixel_bytes + part - own_part;
      beside_[t].to = any ? ring_ + stream * r.stream_bytes + Shape::place_of(column) + part : 0;
      const bool is_last = stream == images - 1 && first_column_ + column == r.width - 1;  // of the images' pixels
      if (any && is_last && number < all && slab_ * 2 + last == r.bytes) behind_ = t + 1;
    }
  }

  // Copies the bytes [begin, end) of a unit.
  static __device__ void copy_part(uint32_t to, const char* from, int begin, int end) {
#pragma unroll 1
    for (int i = begin; i < end; i += 2) shared_at<uint16_t>(to + i) = *reinterpret_cast<const uint16_t*>(from + i);
  }
};

}  // namespace
}  // namespace dwconv
