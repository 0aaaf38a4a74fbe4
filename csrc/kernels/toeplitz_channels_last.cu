// Forward and grad_input in channels_last in 16 bits, on tensor cores: of small kernels, of those that have few rows or
// few columns, and of any on small images.
//
// A row of the kernel is, for one channel, a band matrix B of 16 columns in and 8 columns out, B[k][n] = weight[k - n]:
// one multiplication of it from the left by 16 rows of pixels gives 16 x 8 sums. The upper 8 rows are pixels of 8
// tiles, the lower 8 the same tiles 8 output columns on. A wider kernel has more such matrices in a row, each 16
// columns further on, the last one perhaps of 8. A thread reads 4 channels of a pixel at once, or 2, and of
// neighbouring pixels at that, so that a byte permutation for each register of A is all it takes to part the channels.
//
// A warp owns 4 channels, or 2, a block the slab that its warps make up, and `tiles` neighbouring tiles of 16 columns
// in each of `streams` images. It marches down the rows of its images: a source row, read once from a ring in shared
// memory, is added to all the output rows that it reaches, whose sums are in registers; the oldest of them is then
// complete. Sums of all rows of an image fit as well if these are few: then the kernel may be of any size, and what it
// meets of a row of pixels, other weights for each row, is read from shared memory. Rows may be columns, and columns
// rows, which takes nothing but other strides: of a kernel those are marched down that are few. Outputs go through
// shared memory, from where they are stored as they lie side by side.
//
// A row is a step. A warp arrives at the step's barrier as soon as it has read its pixels, and the outputs of two steps
// before, from shared memory; what it writes later it writes for the next step. It waits for the others when it begins
// that one, so that some load and store while others multiply.
//
// Banks: what a warp reads at once are 8 bytes of pixels 2 apart, of 8 tiles. Pixels at an odd multiple of 16 bytes,
// and 16 bytes more after every tile, also from one image to the next, spread them as evenly as copies of 16 bytes
// allow.
//
// The zeros of B spoil an output if they meet Inf or NaN, which then is NaN. So outputs that are finite are right, and
// the others are computed again, tap by tap.
#include <algorithm>
#include <type_traits>
#include <utility>

#include "launch.h"
#include "mapping.h"
#include "march_channels_last.cuh"
#include "overlap.cuh"
#include "tensor_cores.cuh"
#include "toeplitz_channels_last.h"

namespace dwconv {
namespace {

constexpr int kTiles = 8;     // of a warp
constexpr int kDepth = 8;     // rows of the ring: one to work on, the others on their way
constexpr int kStages = 3;    // rows of outputs: one that is written, one that is waited for, one that is stored
constexpr int kMaxWarps = 8;  // of a block, as the registers of the sums allow
constexpr int kMiddle = 8;    // zeros before the weights of a band matrix
constexpr int kBarrier = 0, kRing = kUnit;  // where they are in shared memory
constexpr int kPairMiddle = 9;              // entries before the weights, see Shape::kBandBytes

// What a kernel is compiled for. kRows: rows of the kernel, which is as many rows of sums; or else, if kWhole, rows of
// an image, all of whose sums there are at once, whatever the kernel. kBlocks: of 8 columns of the source that 8
// columns of the target read. kSplit: the lower 8 rows of a multiplication are not the next 8 columns, but those of 8
// more images, for images of at most 8 columns. kAligned: whether all copies are of 16 bytes.
template <int kRows_, int kBlocks_, bool kSplit_, bool kAligned_, bool kWhole_ = false>
struct Shape {
  static constexpr int kRows = kRows_, kBlocks = kBlocks_;
  static constexpr bool kSplit = kSplit_, kAligned = kAligned_, kWhole = kWhole_;
  static constexpr int kChannels = kBlocks == 2 ? 4 : 2;  // of a warp
  // Whether band matrices stay in registers, beside the sums, or are read from shared memory each time.
  static constexpr bool kKept = !kWhole && kRows * kChannels * (4 + kBlocks) < 200;
  static constexpr int kColumns = kSplit ? 8 : 16;             // of a tile
  static constexpr int kPairs = kSplit ? 4 : kBlocks + 1;      // of pixels, 8 columns apart, that a thread multiplies
  static constexpr int kReach = kWhole ? 0 : 8 * kBlocks - 8;  // columns of the source beyond those of the last tile
  static constexpr int kPitch = 2 * kChannels * kMaxWarps + kUnit;  // bytes from pixel to pixel in shared memory
  using Pixel = std::conditional_t<kChannels == 4, uint2, uint32_t>;

  static constexpr int kBandRows = kWhole ? 2 * kRows - 1 : kRows;  // rows of the kernel that are prepared
  // Bytes to the same weight in a copy that is a column further on: with both, any two neighbours are one word.
  static constexpr int kCopy = 2 * (8 * kBlocks + 7);
  // Of a row of weights: both copies; or 8 bytes for an entry, its two neighbours and those 8 further on, between as
  // many entries as leave room for all that are written.
  static constexpr int kBandBytes = kKept ? 32 * (kBlocks + 1) : 8 * (kWhole ? 8 * kBlocks + kPairMiddle : 18);
  static constexpr int kTogether = 32 / kChannels;     // threads that load a channel's weights
  static constexpr int kMaxColumns = 8 * kBlocks - 7;  // of the kernel
  static constexpr int kTurns =
      kWhole ? 16 : (kRows * kMaxColumns - 1) / kTogether + 1;  // weights a thread has at once

  // Where a column lies in a row in shared memory.
  static __host__ __device__ constexpr int place_of(int column) { return column * kPitch + column / 16 * kUnit; }
};

// An array (N, height, width, channels), and how the threads of a block copy a row of it.
struct Rows {
  char* base;
  int64_t image_bytes, row_bytes;
  int pixel_bytes, bytes;  // from one pixel to the next; of a pixel, all channels
  int height, width;
  int unit;          // bytes that are copied at once: 16, 8, 4 or 2
  int columns;       // of a block in an image
  int stream_bytes;  // in shared memory, from one image to the next
  // Columns and images that are copied at once, and what leads to the next ones.
  int columns_at_once, streams_at_once, column_step;
  int64_t stream_step;
  // The same for aligned copies, for which there are either more columns or more images.
  int64_t step;
  int place_step;
  Divider by_units, by_columns;
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
  int bands_at;                           // weights between zeros; outputs take their place if they are in registers
  int rows, spans;                        // rows of all groups of images; spans of columns
  int whole_rows;                         // those of groups that lack no image
  int workers;                            // blocks that share the rows of a slab
  Shares shares;                          // of the rows of all spans
  bool clear;                             // whether there is something outside the images, which is never loaded
  Divider by_slabs, by_rows, by_height, by_kernel_w;
};

// A thread's part of every row that its block copies: some columns of some images, a few channels.
template <class Shape>
class Share {
 public:
  // Aligned ones of a row: always enough for outputs, and for most sources. (For kWhole, one was no faster.)
  static constexpr int kCopies = Shape::kChannels == 4 || Shape::kWhole ? 2 : 1;
  using Units = uint4[kCopies];

  // Goes to a row of a group of images. `slab`: the block's first channel; `first_column`: of the image, may lie
  // outside. All that it takes is worked out again each time: there are no registers to keep it in.
  __device__ void seek(const Toeplitz& a, const Rows& r, int slab, int first_column, int group, int row) {
    uint32_t rest;
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(rest));  // or else the compiler keeps what follows from it
    const int part = r.by_units.split(rest) * r.unit, before = max(-first_column, 0);
    begin_ = before + r.by_columns.split(rest);
    const int stream = rest, image = group * a.streams + stream;
    const bool any = stream < r.streams_at_once && slab * 2 + part < r.bytes;
    end_ = any ? min(r.columns, r.width - first_column) : 0;
    const int images = begin_ < end_ ? min(a.streams - stream, a.batch - image) : 0;
    left_ = 0;
#pragma unroll 1
    for (int i = 0; i < images; i += r.streams_at_once) ++left_;
    if (Shape::kAligned && left_ == 1)  // there are either more images or more columns
#pragma unroll 1
      for (int i = begin_ + r.columns_at_once; i < end_; i += r.columns_at_once) ++left_;
    place_ = stream * r.stream_bytes + part + (Shape::kAligned ? Shape::place_of(begin_) : 0);
    at_ = r.base + (image * r.image_bytes + row * r.row_bytes +
                    static_cast<int64_t>(first_column + begin_) * r.pixel_bytes + slab * 2 + part);
  }

  // Goes from a group of images to the next one, `rows` further down. Neither lacks an image.
  __device__ void advance(const Toeplitz& a, const Rows& r, int rows) {
    at_ += a.streams * r.image_bytes + rows * r.row_bytes;
  }

  // Begins to load the row to offset `to` in shared memory, and goes to the next one.
  __device__ void load(const Rows& r, int to) {
    if constexpr (Shape::kAligned) {
      to += place_;
#pragma unroll
      for (int t = 0; t < kCopies; ++t)
        copy_unit_if(t < left_, shared_address(to + t * r.place_step), at_ + t * r.step);
#pragma unroll 1
      for (int t = kCopies; t < left_; ++t) copy_unit<kUnit>(shared_address(to + t * r.place_step), at_ + t * r.step);
      at_ += r.row_bytes;
    } else {
      visit(r, to, [](char* at, int place, auto word) { copy_unit<sizeof(word)>(shared_address(place), at); });
    }
  }

  // Takes the row from offset `from` in shared memory, to store it. What is not aligned is stored at once.
  __device__ void take(const Rows& r, int from, Units& units) {
    if constexpr (Shape::kAligned) {
#pragma unroll
      for (int t = 0; t < kCopies; ++t)
        if (t < left_) units[t] = shared<uint4>(from + place_ + t * r.place_step);
    } else {
      visit(r, from, [](char* at, int place, auto word) {
        *reinterpret_cast<decltype(word)*>(at) = shared<decltype(word)>(place);
      });
    }
  }

  // Stores what was taken, and goes to the next row.
  __device__ void store(const Rows& r, const Units& units) {
    if constexpr (Shape::kAligned) {
#pragma unroll
      for (int t = 0; t < kCopies; ++t)
        if (t < left_) *reinterpret_cast<uint4*>(at_ + t * r.step) = units[t];
      at_ += r.row_bytes;
    }
  }

 private:
  int begin_, end_, place_;
  int left_ = 0;  // aligned copies, or images to copy from
  char* at_ = nullptr;

  // Without a branch, and with a line of 128 bytes as the least to fetch: another slab's block has use for the rest.
  static __device__ void copy_unit_if(bool copy, uint32_t to, const char* from) {
#if __CUDA_ARCH__ >= 800
    asm volatile(
        "{\n.reg .pred copy;\nsetp.ne.s32 copy, %2, 0;\n"
        "@copy cp.async.cg.shared.global.L2::128B [%0], [%1], 16;\n}" ::"r"(to),
        "l"(from), "r"(static_cast<int>(copy))
        : "memory");
#endif
  }

  template <typename Visit>
  __device__ void visit(const Rows& r, int place, Visit&& visit) {
    char* at = at_;
    place += place_;
    const auto visit_words = [&](auto word) {
#pragma unroll 1
      for (int left = left_; left > 0; --left, at += r.stream_step, place += r.streams_at_once * r.stream_bytes) {
        char* pixel = at;
#pragma unroll 1
        for (int column = begin_; column < end_; column += r.columns_at_once, pixel += r.column_step)
          visit(pixel, place + Shape::place_of(column), word);
      }
    };
    switch (r.unit) {
      case 16: visit_words(uint4{}); break;
      case 8: visit_words(uint2{}); break;
      case 4: visit_words(uint32_t{}); break;
      default: visit_words(uint16_t{});
    }
    at_ += r.row_bytes;
  }
};

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

// Source rows of a block on their way to the ring.
template <class Shape>
class Feed {
 public:
  __device__ Feed(const Toeplitz& a, int slab, int first_column, int begin, int end)
      : slab_(slab), first_column_(first_column), begin_(begin), end_(end) {}

  // Finds the next row, if there is one.
  __device__ void find(const Toeplitz& a) {
    if (left_ > 0 || begin_ == end_) return;
    const Run r = run_of<Shape>(a, begin_, end_);
    if (row_ >= 0 && begin_ < a.whole_rows)
      share_.advance(a, a.source, r.row - row_);
    else
      share_.seek(a, a.source, slab_, first_column_, r.image, r.row);
    begin_ += r.end - r.begin;
    left_ = r.row_end - r.row, row_ = r.row_end;
  }

  // Begins to load it.
  __device__ void load(const Toeplitz& a) {
    find(a);
    if (left_ > 0) {
      share_.load(a.source, kRing + slot_);
      --left_;
      slot_ += a.slot_bytes;
      if (slot_ == kDepth * a.slot_bytes) slot_ = 0;
    }
    commit_copies();
  }

 private:
  Share<Shape> share_;
  int slab_, first_column_;
  int begin_, end_;          // output rows that no source row was loaded for
  int row_ = -1;             // behind the run
  int left_ = 0, slot_ = 0;  // source rows of the run, and the next one's place in the ring
};

// Outputs of a block on their way from shared memory.
template <class Shape>
class Drain {
 public:
  using Units = typename Share<Shape>::Units;

  __device__ Drain(const Toeplitz& a, int slab, int first_column, int begin, int end)
      : slab_(slab), first_column_(first_column), begin_(begin), end_(end) {}

  // Takes the next row from shared memory.
  __device__ void take(const Toeplitz& a, Units& units) {
    if (left_ == 0) {
      const Run r = run_of<Shape>(a, begin_, end_);
      if (row_ >= 0 && begin_ < a.whole_rows)
        share_.advance(a, a.target, r.begin - row_);
      else
        share_.seek(a, a.target, slab_, first_column_, r.image, r.begin);
      left_ = r.end - r.begin, row_ = r.end;
      begin_ += left_;
    }
    --left_;
    share_.take(a.target, a.stage_at + stage_, units);
    stage_ += a.stage_bytes;
    if (stage_ == kStages * a.stage_bytes) stage_ = 0;
  }

  // Stores it.
  __device__ void store(const Toeplitz& a, const Units& units) { share_.store(a.target, units); }

 private:
  Share<Shape> share_;
  int slab_, first_column_;
  int begin_, end_;           // rows that are not yet begun with
  int row_ = -1;              // behind the run
  int left_ = 0, stage_ = 0;  // rows of the run, and where the next one is
};

// The weights of a slab on their way to shared memory, or as many of them as threads have at once.
template <typename T, class Shape>
class Weights {
 public:
  static constexpr int kTaps = Shape::kTurns * Shape::kTogether;

  // From `first` on: the kernel's taps are numbered row by row.
  __device__ Weights(const Toeplitz& a, int slab, int first) {
    const int channel = threadIdx.x / Shape::kTogether;
    const T* from = static_cast<const T*>(a.weight) + (slab + channel) * a.weight_filter;
    const int taps = slab + channel < a.channels ? a.kernel_h * a.kernel_w : 0;
#pragma unroll
    for (int t = 0; t < Shape::kTurns; ++t) {
      const int tap = first + threadIdx.x % Shape::kTogether + t * Shape::kTogether;
      uint32_t row = tap;
      const int column = a.by_kernel_w.split(row);
      const int entry = Shape::kBlocks == 2 ? column : column - a.first_tap;
      const int band = static_cast<int>(row) + (Shape::kWhole ? Shape::kRows - 1 - a.padding_h : 0);
      bool there = tap < taps;
      if (Shape::kBlocks > 2) there = there && entry > -8 && entry < 8 * Shape::kBlocks;
      if (Shape::kWhole) there = there && band >= 0 && band < Shape::kBandRows;
      const int place = Shape::kKept ? 2 * (kMiddle + entry) : 8 * (kPairMiddle + entry);
      to_[t] = there ? a.bands_at + (channel * Shape::kBandRows + band) * Shape::kBandBytes + place : 0;
      from_[t] = from + static_cast<int>(row) * a.weight_row + column * a.weight_column;
      if (Shape::kWhole && entry >= 0) far_ |= 1u << t;
    }
  }

  // Begins to load them.
  __device__ void load() {
#pragma unroll
    for (int t = 0; t < Shape::kTurns; ++t)
      if (to_[t] > 0) value_[t] = __ldg(from_[t]);
  }

  // Writes them between zeros that are there already.
  __device__ void write() const {
#pragma unroll
    for (int t = 0; t < Shape::kTurns; ++t) {
      if (to_[t] == 0) continue;
      const auto write = [&](int offset) { shared<T>(to_[t] + offset) = value_[t]; };
      write(0);
      if constexpr (Shape::kKept) {
        write(Shape::kCopy);
      } else {  // the entry before has it as its second neighbour, those 8 and 9 before in their second words
        write(2 - 8 * 1);
        if (!Shape::kWhole || far_ >> t & 1) write(4 - 8 * 8), write(6 - 8 * 9);
      }
    }
  }

 private:
  const T* from_[Shape::kTurns];
  T value_[Shape::kTurns];
  int to_[Shape::kTurns];
  uint32_t far_ = 0;  // of those whose entries may have others 8 and 9 before
};

// Computes those outputs of a channel in one column of rows [begin, end) that are not finite again.
template <typename T>
__device__ __noinline__ void column_by_taps(const Toeplitz& a, int begin, int end, int stream, int channel, int x) {
  for (; begin < end; ++begin) {
    uint32_t image = begin;
    const int y = a.by_height.split(image);
    image = image * a.streams + stream;
    if (image >= a.batch) return;
    char* to = a.target.base + image * a.target.image_bytes + y * a.target.row_bytes +
               static_cast<int64_t>(x) * a.target.pixel_bytes;
    T& output = reinterpret_cast<T*>(to)[channel];
    if (is_finite(widen(output))) continue;
    const float bias = a.bias ? widen(static_cast<const T*>(a.bias)[channel * a.bias_stride]) : 0.f;
    output = narrow<T>(sum_of_taps(
        bias, reinterpret_cast<const T*>(a.source.base + image * a.source.image_bytes) + channel, a.source.row_bytes,
        a.source.pixel_bytes, a.source.height, a.source.width,
        static_cast<const T*>(a.weight) + channel * a.weight_filter, a.weight_row, a.weight_column, a.kernel_h,
        a.kernel_w, [&](int i) { return y - a.padding_h + i; }, [&](int j) { return x - a.padding_w + j; }));
  }
}

// Fills those columns of the ring with zeros that lie outside the image.
template <class Shape>
__device__ void clear_edges(const Toeplitz& a, int first_column) {
  const Rows& r = a.source;
  const int before = max(-first_column, 0), end = max(min(r.columns, r.width - first_column), before);
  const int units = (before + r.columns - end) * static_cast<int>(r.by_units.divisor);
  for (int row = threadIdx.x / 32; row < kDepth * a.streams; row += blockDim.x / 32)
    for (int i = threadIdx.x % 32; i < units; i += 32) {
      uint32_t column = i;
      const int part = r.by_units.split(column) * kUnit;
      const int at = static_cast<int>(column) < before ? column : column - before + end;
      shared<uint4>(kRing + row * r.stream_bytes + Shape::place_of(at) + part) = {};
    }
}

// Rows [begin, end) of all groups of images, from `slab` and `first_column` on.
template <typename T, class Shape>
__device__ void march(const Toeplitz& a, int slab, int first_column, int begin, int end, uint32_t& parity) {
  constexpr int kRows = Shape::kRows, kBlocks = Shape::kBlocks, kChannels = Shape::kChannels;
  constexpr bool kSplit = Shape::kSplit, kWhole = Shape::kWhole;
  const int first_source = kWhole ? 0 : first_column - a.lead;
  // What takes no memory goes before the kernel before has ended.
  Weights<T, Shape> weights(a, slab, 0);
  Feed<Shape> feed(a, slab, first_source, begin, end);
  feed.find(a);
  // Zeros for all that is never loaded: if that is but the columns beside the images, the first loads go before.
  const bool edges = Shape::kAligned && slab + a.slab <= a.channels && end <= a.whole_rows;
  if (a.clear && !edges) {
    for (int i = kRing + threadIdx.x * kUnit; i < a.stage_at; i += blockDim.x * kUnit) shared<uint4>(i) = {};
    __syncthreads();
  }
  settle_and_wait_for_kernel_before(a.workers);
  let_next_kernel_start();
  weights.load();
#pragma unroll 1
  for (int i = 0; i < kDepth - 1; ++i) feed.load(a);
  if (a.clear && edges) clear_edges<Shape>(a, first_source);
  for (int i = threadIdx.x * kUnit; i < a.slab * Shape::kBandRows * Shape::kBandBytes; i += blockDim.x * kUnit)
    shared<uint4>(a.bands_at + i) = {};
  __syncthreads();
  weights.write();
  if (kBlocks > 2)
#pragma unroll 1
    for (int tap = Weights<T, Shape>::kTaps; tap < a.kernel_h * a.kernel_w; tap += Weights<T, Shape>::kTaps) {
      Weights<T, Shape> more(a, slab, tap);
      more.load();
      more.write();
    }
  __syncthreads();

  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, number = lane / 4, pair = lane % 4 * 2;
  const int channel = slab + warp * kChannels;
  const int entry = pair - number;  // of the thread's first pair in a row of weights
  const int bands = a.bands_at + warp * kChannels * Shape::kBandRows * Shape::kBandBytes +
                    (Shape::kKept ? 2 * (kMiddle + entry) + (entry & 1) * Shape::kCopy : 8 * (kPairMiddle + entry));
  // The matrices of blocks `block` and `block` + 1, or of the last block alone, at a row of weights.
  const auto read_band = [&](int at, int block) {
    if (block + 1 == kBlocks) return uint2{shared<uint32_t>(at + (Shape::kKept ? 16 : 64) * block), 0};
    if (!Shape::kKept) return shared<uint2>(at + 64 * block);
    return uint2{shared<uint32_t>(at + 16 * block), shared<uint32_t>(at + 16 * block + 16)};
  };
  uint2 kept[kChannels][kRows][(kBlocks + 1) / 2];
  float bias[kChannels];
#pragma unroll
  for (int c = 0; c < kChannels; ++c) {
    if constexpr (Shape::kKept)
#pragma unroll
      for (int i = 0; i < kRows; ++i)
#pragma unroll
        for (int block = 0; block < kBlocks; block += 2)
          kept[c][i][block / 2] = read_band(bands + (c * kRows + i) * Shape::kBandBytes, block);
    bias[c] = 0;
    if (a.bias && channel + c < a.channels)
      bias[c] = widen(__ldg(static_cast<const T*>(a.bias) + (channel + c) * a.bias_stride));
  }

  // The thread's tiles, one of the upper 8 rows and one of the lower, and its pixels of them.
  const bool live = number < a.tiles * a.streams, lower_live = kSplit ? number + kTiles < a.streams : live;
  const int stream = live ? number / a.tiles : 0, tile = live ? number % a.tiles : 0;
  const int column = Shape::place_of(tile * Shape::kColumns + pair) + warp * kChannels * 2;
  const int from = kRing + stream * a.source.stream_bytes + column;
  const int to = a.stage_at + stream * a.target.stream_bytes + column;
  const int from_lower = kSplit && lower_live ? from + kTiles * a.source.stream_bytes : from;
  const int to_lower = kSplit ? to + kTiles * a.target.stream_bytes : to + Shape::place_of(8);

  Drain<Shape> drain(a, slab, first_column, begin, end);
  typename Share<Shape>::Units units;
  const auto none = narrow_pair(0.f, 0.f, T{});
  auto zero = none, also_zero = none;
  int slot = 0, stage = 0;  // of the next source row in the ring, and of the outputs to come
  int written = 0;          // whether outputs were written in the last step (1), and in the one before (2)
  // Writes outputs to where all threads can take them two steps later.
  const auto write = [&](const float (&sum)[kChannels][4]) {
#pragma unroll
    for (int v = 0; v < 4; ++v) {
      const auto low = narrow_pair(sum[0][v] + bias[0], sum[1][v] + bias[1], T{});
#if __CUDA_ARCH__ >= 800
      zero = __hfma2(low, none, zero);
#endif
      const int at = (v < 2 ? to : to_lower) + stage + Shape::place_of(v % 2);
      if constexpr (kChannels == 4) {
        const auto high = narrow_pair(sum[2][v] + bias[2], sum[3][v] + bias[3], T{});
#if __CUDA_ARCH__ >= 800
        also_zero = __hfma2(high, none, also_zero);
#endif
        if (v < 2 ? live : lower_live)
          shared<uint2>(at) = {reinterpret_cast<const uint32_t&>(low), reinterpret_cast<const uint32_t&>(high)};
      } else {
        if (v < 2 ? live : lower_live) shared<uint32_t>(at) = reinterpret_cast<const uint32_t&>(low);
      }
    }
    stage += a.stage_bytes;
    if (stage == kStages * a.stage_bytes) stage = 0;
    written |= 1;
  };
  const auto begin_step = [&] {
    wait(kBarrier, parity);
    parity ^= 1;
  };
  // Returns whether there are outputs to store.
  const auto take = [&] {
    const bool stores = written & 2;
    written = written << 1 & 2;
    if (stores) drain.take(a, units);
    return stores;
  };
  const auto arrive_step = [&] {
    __syncwarp();
    if (threadIdx.x % 32 == 0) arrive(kBarrier);
  };
  wait_copies<kDepth - 2>();
  arrive_step();
  for (int at = begin; at < end;) {
    const Run r = run_of<Shape>(a, at, end);
    at += r.end - r.begin;
    // Of the output rows under way, the oldest first. The oldest, y, is complete with a source row; all are with the
    // last one if kWhole, which is when y is the first.
    float sum[kRows][kChannels][4] = {};
    int y = kWhole ? r.begin - (r.row_end - 1) : r.row + a.padding_h - (kRows - 1);
    for (int row = r.row; row < r.row_end; ++row, ++y) {
      begin_step();
      // Pairs of pixels, but for those of blocks outside of the image.
      typename Shape::Pixel x[2 * Shape::kPairs] = {};
#pragma unroll
      for (int j = 0; j < 2 * Shape::kPairs; ++j) {
        using Pixel = typename Shape::Pixel;
        if (kSplit)
          x[j] = shared<Pixel>((j < 4 ? from : from_lower) + slot + Shape::place_of(j / 2 % 2 * 8 + j % 2));
        else if (!kWhole)
          x[j] = shared<Pixel>(from + slot + Shape::place_of(j / 2 * 8 + j % 2));
        else if (j / 2 == 1 || j / 2 == 2)
          x[j] = shared<Pixel>(from + slot + Shape::place_of((j / 2 - 1) * 8 + j % 2));
      }
      slot += a.slot_bytes;
      if (slot == kDepth * a.slot_bytes) slot = 0;
      const bool stores = take();
      wait_copies<kDepth - 3>();  // the next row
      arrive_step();
      feed.load(a);
      if (stores) drain.store(a, units);
      const int row_bands = bands + row * Shape::kBandBytes;  // if kWhole
#pragma unroll
      for (int block = 0; block < kBlocks; block += 2)
#pragma unroll
        for (int c = 0; c < kChannels; ++c) {
          const auto word = [&](int j) {
            if constexpr (kChannels == 4)
              return c < 2 ? x[j].x : x[j].y;
            else
              return x[j];
          };
          const auto pair = [&](int j) {
            return __byte_perm(word(2 * j), word(2 * j + 1), c % 2 == 0 ? 0x5410 : 0x7632);
          };
          // The same by another instruction: of a copy, a move would be left before every multiplication. (kWhole waits
          // for shared memory, and is no faster without.)
          const auto same_pair = [&](int j) {
            return __byte_perm(word(2 * j + 1), word(2 * j), c % 2 == 0 ? 0x1054 : 0x3276);
          };
          const bool last = block + 1 == kBlocks;  // alone
          const uint32_t pairs[4] = {last && !kWhole ? same_pair(block) : pair(block),
                                     kSplit ? pair(2) : same_pair(block + 1), last ? 0 : pair(block + 1),
                                     last ? 0 : pair(kSplit ? 3 : block + 2)};
          const float nothing[4] = {};
#pragma unroll
          for (int o = 0; o < kRows; ++o) {
            const int i = kRows - 1 - o;
            const uint2 band =
                Shape::kKept
                    ? kept[c][i][block / 2]
                    : read_band((kWhole ? row_bands : bands) + (c * Shape::kBandRows + i) * Shape::kBandBytes, block);
            if (last)
              multiply(sum[o][c], {pairs[0], pairs[1]}, band.x, T{});
            else if (kWhole || block > 0)
              multiply(sum[o][c], std::as_const(sum[o][c]), pairs, {band.x, band.y}, T{});
            else
              multiply(sum[o][c], o + 1 < kRows ? std::as_const(sum[o + 1][c]) : nothing, pairs, {band.x, band.y}, T{});
          }
        }
      if (y >= r.begin) write(sum[0]);
    }
    // What no further row of the image reaches is complete as it is.
#pragma unroll
    for (int o = 1; o < kRows; ++o, ++y) {
      if (y >= r.end) break;
      begin_step();
      const bool stores = take();
      arrive_step();
      if (stores) drain.store(a, units);
      if (y >= r.begin) write(sum[o]);
    }
  }
  begin_step();
  if (take()) drain.store(a, units);
  arrive_step();
  begin_step();
  if (take()) drain.store(a, units);
  __syncthreads();  // the next part's zeros, and the outputs that are read now, come behind
  if (!(__low2float(zero) == 0 && __high2float(zero) == 0 && __low2float(also_zero) == 0 &&
        __high2float(also_zero) == 0))  // NaN: an output is not finite
    for (int v = 0; v < 4; ++v)
      for (int c = 0; c < kChannels; ++c) {
        const int x = first_column + tile * Shape::kColumns + pair + v % 2 + (kSplit ? 0 : v / 2 * 8);
        if ((v < 2 ? live : lower_live) && x < a.target.width && channel + c < a.channels)
          column_by_taps<T>(a, begin, end, stream + (kSplit ? v / 2 * kTiles : 0), channel + c, x);
      }
}

// The blocks of a slab share the rows of all spans evenly: one may have the end of a span and the head of the next.
// Those of all slabs for the same rows are neighbours, and so use what they read of a pixel's sectors at the same time.
template <typename T, class Shape>
__global__ void __launch_bounds__(32 * kMaxWarps, 1) toeplitz_channels_last(const __grid_constant__ Toeplitz a) {
  uint32_t worker = blockIdx.x, parity = 0;
  if (threadIdx.x == 0) init_barrier(kBarrier, blockDim.x / 32);
  __syncthreads();
  const int slab = a.by_slabs.split(worker) * a.slab;
  const int last = a.shares.begin(worker + 1);
  for (int first = a.shares.begin(worker); first < last;) {
    uint32_t span = first;
    const int begin = a.by_rows.split(span), end = min(a.rows, begin + last - first);
    march<T, Shape>(a, slab, static_cast<int>(span) * a.tiles * Shape::kColumns, begin, end, parity);
    first += end - begin;
  }
}

Rows rows_of(const View& view, int64_t batch, int64_t channels, int64_t height, int64_t width) {
  Rows r{};
  r.base = static_cast<char*>(view.data);
  r.image_bytes = view.stride[0] * 2, r.row_bytes = view.stride[2] * 2;
  r.pixel_bytes = static_cast<int>((width == 1 ? channels : view.stride[3]) * 2);
  r.bytes = static_cast<int>(channels * 2);
  r.height = static_cast<int>(height), r.width = static_cast<int>(width);
  r.unit = alignment_of(view, 2, channels, height, width, batch);
  return r;
}

// Pixels of `unit` bytes at once that a block copies together: 32 threads for the channels of each warp.
template <class Shape>
int pixels_at_once(int unit) {
  return 16 / Shape::kChannels * unit;
}

// Fills in what a block has of an array.
template <class Shape>
void cut_rows(Rows& r, const Toeplitz& a, int columns) {
  r.columns = columns;
  // From one image to the next as from one tile to the next.
  const int bytes = Shape::place_of(columns) + kUnit - 1 & -kUnit, apart = a.tiles * kUnit % 128;
  r.stream_bytes = bytes + (apart - bytes % 128 + 128) % 128;
  const int at_once = pixels_at_once<Shape>(r.unit), there = std::min(columns, r.width);  // pixels
  r.columns_at_once = std::min(at_once, there), r.streams_at_once = at_once / r.columns_at_once;
  r.column_step = r.columns_at_once * r.pixel_bytes, r.stream_step = r.streams_at_once * r.image_bytes;
  r.step = there > at_once ? r.column_step : r.stream_step;
  r.place_step = there > at_once ? Shape::place_of(at_once) : r.streams_at_once * r.stream_bytes;
  r.by_units = Divider(2 * a.slab / r.unit), r.by_columns = Divider(r.columns_at_once);
}

// Cuts a problem into slabs and spans, for blocks of at most `most_streams` images. Returns the bytes of shared memory
// that a block needs.
template <class Shape>
int cut(Toeplitz& a, int64_t room, int most_streams) {
  // Slabs begin at a multiple of a sector of 32 bytes.
  constexpr int kChannels = Shape::kChannels;
  const int64_t warps = ceil_div(a.channels, kChannels), slabs = ceil_div(warps, kMaxWarps);
  a.slab = static_cast<int>(slabs == 1 ? warps : round_up(ceil_div(warps, slabs), 16 / kChannels)) * kChannels;
  a.by_slabs = Divider(ceil_div(a.channels, a.slab));
  const int64_t tiles = ceil_div(a.target.width, Shape::kColumns);
  for (int most = kTiles;; --most) {  // as many tiles as fit
    a.spans = static_cast<int>(ceil_div(tiles, most)), a.tiles = static_cast<int>(ceil_div(tiles, a.spans));
    a.streams = std::min({(Shape::kSplit ? 2 : 1) * most / a.tiles, a.batch, most_streams});
    if (Shape::kAligned && a.source.width > pixels_at_once<Shape>(kUnit)) a.streams = 1;  // see Rows
    cut_rows<Shape>(a.source, a, a.tiles * Shape::kColumns + Shape::kReach);
    cut_rows<Shape>(a.target, a, a.tiles * Shape::kColumns);
    a.slot_bytes = a.streams * a.source.stream_bytes, a.stage_bytes = a.streams * a.target.stream_bytes;
    a.stage_at = kRing + kDepth * a.slot_bytes;
    a.rows = static_cast<int>(ceil_div(a.batch, a.streams) * a.target.height);
    a.whole_rows = a.batch / a.streams * a.target.height;
    a.clear = a.batch % a.streams != 0 || a.channels % a.slab != 0 || a.padding_w > 0 ||
              a.source.width < tiles * Shape::kColumns + Shape::kReach;
    const int stages = kStages * a.stage_bytes, weights = a.slab * Shape::kBandRows * Shape::kBandBytes;
    a.bands_at = a.stage_at + (Shape::kKept ? 0 : stages);
    const int bytes = std::max(a.stage_at + stages, a.bands_at + weights);
    if (bytes <= room || most == 1) return bytes;
  }
}

// The number of images for which whole groups of them make even shares, if these cost less than shares cut anywhere,
// which load the rows around a cut twice; or else 0. The costs are estimates in steps of a block with all its images; a
// quarter of a step does not depend on how many there are.
template <class Shape>
int even_streams(const Toeplitz& a) {
  const double part = static_cast<double>(a.rows) * a.spans / a.workers;
  const int groups = a.rows / a.target.height * a.spans, share = static_cast<int>(ceil_div(groups, a.workers));
  const int streams = static_cast<int>(ceil_div(a.batch, std::max(a.workers * share / a.spans, 1)));
  if (streams > a.streams || ceil_div(a.batch, streams) * a.spans > int64_t{a.workers} * share) return 0;
  const double behind = (Shape::kRows - 1) / 2.;  // rows that complete an image
  const double whole = share * (a.target.height + behind) * (0.25 + 0.75 * streams / a.streams);
  const double any = part * (1 + behind / a.target.height) + Shape::kRows - 1;
  return Shape::kWhole || whole < any ? streams : 0;
}

template <int value>
using Number = std::integral_constant<int, value>;

template <typename T, class Shape>
void launch(Toeplitz a, cudaStream_t stream) {
  const Device& device = current_device();
  const auto kernel = toeplitz_channels_last<T, Shape>;
  int bytes = cut<Shape>(a, device.shared_per_block, a.batch);
  const int threads = a.slab / Shape::kChannels * 32;
  static thread_local Decisions<3, int> decisions;  // blocks on a multiprocessor
  const int resident = decisions({device.id, threads, bytes}, [&] {
    int blocks = 0;
    cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, device.shared_per_block);
    cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, threads, bytes);
    return std::max(blocks, 1);
  });
  const int64_t slabs = a.by_slabs.divisor, slots = int64_t{resident} * device.multiprocessors;
  a.workers = static_cast<int>(std::min(std::max<int64_t>(slots / slabs, 1), int64_t{a.rows} * a.spans));
  int grain = 1;
  const int even = even_streams<Shape>(a);
  if (even > 0) bytes = cut<Shape>(a, device.shared_per_block, even);
  if (even > 0 || Shape::kWhole) {
    grain = a.target.height;
    a.workers = static_cast<int>(std::min<int64_t>(a.workers, int64_t{a.rows / grain} * a.spans));
  }
  a.by_rows = Divider(a.rows), a.shares = Shares(int64_t{a.rows} * a.spans, a.workers, 1, grain);
  launch_early(kernel, a, slabs * a.workers, threads, stream, {.shared_bytes = bytes});
  check_launch("toeplitz_channels_last");
}

}  // namespace

void launch_toeplitz_channels_last(const Problem& problem, cudaStream_t stream) {
  const bool exchanged = band_shape_of(problem) == BandShape::kNone;
  const Problem p = exchanged ? exchange(problem) : problem;
  const BandShape shape = band_shape_of(p);
  const Mapping map(p);
  Toeplitz a{};
  a.batch = static_cast<int>(p.batch), a.channels = map.sources;
  a.source = rows_of(map.source, p.batch, map.sources, map.height, map.width);
  a.target = rows_of(map.target, p.batch, map.targets, map.out_height, map.out_width);
  a.padding_h = map.padding_h, a.padding_w = map.padding_w;
  a.weight = map.weight.data, a.weight_filter = map.weight.stride[0];
  a.weight_row = map.weight.stride[2], a.weight_column = map.weight.stride[3];
  a.bias = map.bias, a.bias_stride = map.bias_stride;
  a.kernel_h = static_cast<int>(p.kernel_h), a.kernel_w = static_cast<int>(p.kernel_w);
  a.lead = shape == BandShape::kSmall   ? a.padding_w
           : shape == BandShape::kWhole ? kWholeLead
                                        : BandWindow(map, a.kernel_w).lead;
  a.first_tap = a.padding_w - a.lead;
  a.by_height = Divider(map.out_height), a.by_kernel_w = Divider(p.kernel_w);
  visit_dtype(p.dtype, [&](auto zero) {
    using T = decltype(zero);
    if constexpr (sizeof(T) == 2) {
      const bool aligned = std::min(a.source.unit, a.target.unit) == kUnit;
      const auto launch_rows = [&](auto rows, auto blocks, auto split, auto whole) {
        aligned ? launch<T, Shape<rows, blocks, split, true, whole>>(a, stream)
                : launch<T, Shape<rows, blocks, split, false, whole>>(a, stream);
      };
      constexpr std::true_type kYes{};
      constexpr std::false_type kNo{};
      const auto launch_small = [&](auto rows) {
        const bool split = map.out_width <= kTiles && p.batch > kTiles;
        split ? launch_rows(rows, Number<2>{}, kYes, kNo) : launch_rows(rows, Number<2>{}, kNo, kNo);
      };
      switch (shape) {
        case BandShape::kSmall:
          if (p.kernel_h <= 5)
            launch_small(Number<5>{});
          else if (p.kernel_h <= 7)
            launch_small(Number<7>{});
          else
            launch_small(Number<kMaxSmallRows>{});
          break;
        case BandShape::kTall: launch_rows(Number<kMaxTallRows>{}, Number<kTallBlocks>{}, kNo, kNo); break;
        case BandShape::kWide: launch_rows(Number<kMaxWideRows>{}, Number<kWideBlocks>{}, kNo, kNo); break;
        case BandShape::kWhole: launch_rows(Number<kMaxWholeRows>{}, Number<kWholeBlocks>{}, kNo, kYes); break;
        case BandShape::kNone:
          throw std::runtime_error("dwconv: no kernel of toeplitz_channels_last is compiled for this");
      }
    }
  });
}

}  // namespace dwconv
