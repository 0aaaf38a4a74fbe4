// What kernels of toeplitz_channels_last.cu and toeplitz_whole_channels_last.cu have in common: how rows of
// channels_last arrays come to shared memory and go from there, how weights are prepared, and how the work is cut.
#pragma once

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

// Of images whose sums are all in registers: kernels/toeplitz_whole_channels_last.cu.
void launch_toeplitz_whole_channels_last(const Problem& problem, cudaStream_t stream);

// At stride 2: kernels/toeplitz_strided_channels_last.cu.
void launch_toeplitz_strided_channels_last(const Problem& problem, cudaStream_t stream);

namespace {

constexpr int kTiles = 8;                   // of a warp
constexpr int kMaxWarps = 8;                // of a block, as the registers of the sums allow
constexpr int kMiddle = 8;                  // zeros before the weights of a band matrix
constexpr int kBarrier = 0, kRing = kUnit;  // where they are in shared memory
constexpr int kPairMiddle = 9;              // entries before the weights, see Shape::kBandBytes

// What a kernel is compiled for. kRows: rows of the kernel, which is as many rows of sums; or else, if kWhole, rows of
// an image, all of whose sums there are at once, whatever the kernel. kBlocks: of 8 columns of the source that 8
// columns of the target read. kSplit: the lower 8 rows of a multiplication are not the next 8 columns, but those of 8
// more images, for images of at most 8 columns, which are one block. kAligned: whether all copies are of 16 bytes.
template <int kRows_, int kBlocks_, bool kSplit_, bool kAligned_, bool kWhole_ = false>
struct Shape {
  static constexpr int kRows = kRows_, kBlocks = kBlocks_;
  static constexpr bool kSplit = kSplit_, kAligned = kAligned_, kWhole = kWhole_;
  static constexpr int kChannels = kBlocks <= 2 ? 4 : 2;  // of a warp
  // Whether the channels of a row are parted once, before warps read it, or by each thread that reads pixels.
  static constexpr bool kParted = !kWhole && kBlocks > 3;
  // Whether a step has no branches, so that copies, reads, multiplications and stores go on at the same time. (Others
  // lose by that: what is to be early comes late.)
  static constexpr bool kFlat = kSplit || kParted;
  static constexpr int kSourceRows = kWhole ? 2 : 1;  // of a step
  static constexpr int kDepth = 8 / kSourceRows;      // steps in the ring: one to work on, the others on their way
  // Of those, loaded before the first one: if channels are parted, or rows read ahead, one more.
  static constexpr int kAhead = kWhole || kParted ? kDepth : kDepth - 1;
  // Rows of outputs: one that is written, one that is waited for, one that is stored; or those written at once.
  static constexpr int kStages = kWhole ? 7 : 3;
  // Whether band matrices stay in registers, beside the sums, or are read from shared memory each time.
  static constexpr bool kKept = !kWhole && kRows * kChannels * (4 + kBlocks) < 200;
  static constexpr int kColumns = kSplit ? 8 : 16;             // of a tile
  static constexpr int kPairs = kSplit ? 2 : kBlocks + 1;      // of pixels, 8 columns apart, that a thread multiplies
  static constexpr int kReach = kWhole ? 0 : 8 * kBlocks - 8;  // columns of the source beyond those of the last tile
  static constexpr int kPitch = 2 * kChannels * kMaxWarps + kUnit;  // bytes from pixel to pixel in shared memory
  using Pixel = std::conditional_t<kChannels == 4, uint2, uint32_t>;

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

// A thread's part of every row that its block copies: some columns of some images, a few channels.
template <class Shape>
class Share {
 public:
  // Aligned ones of a row: always enough for outputs, and for most sources.
  static constexpr int kCopies = Shape::kChannels == 2 && !Shape::kParted && !Shape::kWhole ? 1 : 2;
  using Units = uint4[kCopies];

  // `memory`: where rows lie in shared memory.
  __device__ explicit Share(uint32_t memory) : memory_(memory), place_(memory) {}

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
    place_ = memory_ + stream * r.stream_bytes + part + (Shape::kAligned ? Shape::place_of(begin_) : 0);
    at_ = r.base + (image * r.image_bytes + row * r.row_bytes +
                    static_cast<int64_t>(first_column + begin_) * r.pixel_bytes + slab * 2 + part);
  }

  // Goes from a group of images to the next one, `rows` further down. Neither lacks an image.
  __device__ void advance(const Toeplitz& a, const Rows& r, int rows) {
    at_ += a.streams * r.image_bytes + rows * r.row_bytes;
  }

  // Begins to load the row, if there is `any`, `to` bytes further on in shared memory: by kCopies copies, without a
  // branch...
  __device__ void load(const Rows& r, int to, bool any) const {
    if constexpr (Shape::kAligned)
#pragma unroll
      for (int t = 0; t < kCopies; ++t)
        copy_unit_if(any && t < left_, place_ + to + t * r.place_step, at_ + t * r.step);
  }
  // ... and by more, where there are more.
  __device__ void load_more(const Rows& r, int to, bool any) const {
    if constexpr (Shape::kAligned) {
#pragma unroll 1
      for (int t = kCopies; any && t < left_; ++t)
        copy_unit<kUnit>(place_ + to + t * r.place_step, at_ + t * r.step);
    } else if (any) {
      visit(r, to, [](char* at, uint32_t place, auto word) { copy_unit<sizeof(word)>(place, at); });
    }
  }

  // Takes the row, if there is `any`, `from` bytes further on in shared memory, to store it. What is not aligned is
  // stored at once.
  __device__ void take(const Rows& r, int from, Units& units, bool any = true) const {
    if constexpr (Shape::kAligned) {
#pragma unroll
      for (int t = 0; t < kCopies; ++t)
        if (any && t < left_) units[t] = shared_at<uint4>(place_ + from + t * r.place_step);
    } else if (any) {
      visit(r, from, [](char* at, uint32_t place, auto word) {
        *reinterpret_cast<decltype(word)*>(at) = shared_at<decltype(word)>(place);
      });
    }
  }

  // Stores what was taken.
  __device__ void store(const Rows& r, const Units& units, bool any = true) const {
    if constexpr (Shape::kAligned)
#pragma unroll
      for (int t = 0; t < kCopies; ++t)
        if (any && t < left_) *reinterpret_cast<uint4*>(at_ + t * r.step) = units[t];
  }

  // Goes to the next row, if there was any.
  __device__ void next(const Rows& r, bool any = true) { at_ += any ? r.row_bytes : 0; }

 private:
  uint32_t memory_, place_;
  int begin_, end_;
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
  __device__ void visit(const Rows& r, int offset, Visit&& visit) const {
    char* at = at_;
    uint32_t place = place_ + offset;
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
  // `memory`: the block's, by its address.
  __device__ Feed(uint32_t memory, int slab, int first_column, int begin, int end)
      : share_(memory + kRing), slab_(slab), first_column_(first_column), begin_(begin), end_(end) {}

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

  // Begins to load it: first what takes no branch.
  __device__ void load(const Toeplitz& a) const { share_.load(a.source, slot_, left_ > 0); }
  __device__ void load_more(const Toeplitz& a) {
    const bool any = left_ > 0;
    share_.load_more(a.source, slot_, any);
    share_.next(a.source, any);
    commit_copies();
    left_ -= any;
    slot_ += any ? a.slot_bytes : 0;
    if (slot_ == Shape::kDepth * a.slot_bytes) slot_ = 0;
  }

  // Begins to load all that a step takes.
  __device__ void load_step(const Toeplitz& a) {
    find(a);
    if constexpr (Shape::kSourceRows == 1) {
      if (left_ > 0) {
        load(a);
        load_more(a);
      } else {
        commit_copies();
      }
    } else {
#pragma unroll 1
      for (int k = 0; k < Shape::kSourceRows; ++k) {
        const int to = slot_ + k * (a.slot_bytes / Shape::kSourceRows);
        const bool any = left_ > 0;
        share_.load(a.source, to, any);
        share_.load_more(a.source, to, any);
        share_.next(a.source, any);
        left_ -= any;
      }
      commit_copies();
      slot_ += a.slot_bytes;
      if (slot_ == Shape::kDepth * a.slot_bytes) slot_ = 0;
    }
  }

 private:
  Share<Shape> share_;
  int slab_, first_column_;
  int begin_, end_;          // output rows that no source row was loaded for
  int row_ = -1;             // behind the run
  int left_ = 0, slot_ = 0;  // source rows of the run, and the next one's place in the ring
};

// What load_matrices loads, the other way.
__device__ inline void store_matrices(uint32_t address, const uint32_t (&a)[4]) {
#if __CUDA_ARCH__ >= 900
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1,%2,%3,%4};" ::"r"(address), "r"(a[0]), "r"(a[1]),
               "r"(a[2]), "r"(a[3])
               : "memory");
#else
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint32_t row = __shfl_sync(~0u, address, i * 8 + lane / 4);
    asm volatile("st.shared.b32 [%0], %1;" ::"r"(row + lane % 4 * 4), "r"(a[i]) : "memory");
  }
#endif
}

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
      if (Shape::kBlocks != 2) there = there && entry > -8 && entry < 8 * Shape::kBlocks;
      if (Shape::kWhole) there = there && band >= 0 && band < Shape::kBandRows;
      const int place = (channel * Shape::kBandRows + band) * Shape::kBandBytes +
                        (Shape::kKept ? 2 * (kMiddle + entry) : 8 * (kPairMiddle + entry));
      to_[t] = there ? a.bands_at + place : 0;
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
      if constexpr (Shape::kKept) {
        write(0), write(Shape::kCopy);
      } else {  // the entry before has it as its second neighbour, those 8 and 9 before in their other words
        constexpr int kNear = Shape::kWhole ? 4 : 0, kFar = 4 - kNear;
        write(kNear), write(kNear + 2 - 8 * 1);
        if (!Shape::kWhole || far_ >> t & 1) write(kFar - 8 * 8), write(kFar + 2 - 8 * 9);
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
#pragma unroll 1
  for (int i = threadIdx.x; i < units * static_cast<int>(a.by_ring_rows.divisor); i += blockDim.x) {
    uint32_t column = i;
    const int row = a.by_ring_rows.split(column), part = r.by_units.split(column) * kUnit;
    const int at = static_cast<int>(column) < before ? column : column - before + end;
    shared<uint4>(kRing + row * r.stream_bytes + Shape::place_of(at) + part) = {};
  }
}

// What goes before the first step of rows [begin, end): prepares the weights of a slab, and begins to load.
template <typename T, class Shape>
__device__ void begin_rows(const Toeplitz& a, Feed<Shape>& feed, int slab, int first_column, int end) {
  // What takes no memory goes before the kernel before has ended.
  Weights<T, Shape> weights(a, slab, 0);
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
  for (int i = 0; i < Shape::kAhead; ++i) feed.load_step(a);
  if (a.clear && edges) clear_edges<Shape>(a, first_column);
  for (int i = threadIdx.x * kUnit; i < a.slab * Shape::kBandRows * Shape::kBandBytes; i += blockDim.x * kUnit)
    shared<uint4>(a.bands_at + i) = {};
  __syncthreads();
  if constexpr (Shape::kBlocks <= 2) {
    weights.write();
  } else {
    constexpr int kTaps = Weights<T, Shape>::kTaps;
#pragma unroll 1
    for (int tap = kTaps; tap < a.kernel_h * a.kernel_w; tap += kTaps) {
      Weights<T, Shape> more(a, slab, tap);
      more.load();
      weights.write();  // while the next ones are on their way
      weights = more;
    }
    weights.write();
  }
  __syncthreads();
}

// A warp's outputs of its channels.
template <typename T, class Shape>
class Outputs {
 public:
  __device__ Outputs(const Toeplitz& a, int channel) {
#pragma unroll
    for (int c = 0; c < Shape::kChannels; ++c) {
      bias_[c] = 0;
      if (a.bias && channel + c < a.channels)
        bias_[c] = widen(__ldg(static_cast<const T*>(a.bias) + (channel + c) * a.bias_stride));
    }
  }

  // Writes those of a pixel, number v of the thread's sums, to shared memory.
  __device__ void write(uint32_t at, const float (&sum)[Shape::kChannels][4], int v, bool live) {
    const auto low = pair_of(sum, v, 0);
    if constexpr (Shape::kChannels == 4) {
      const auto high = pair_of(sum, v, 1);
      if (live) shared_at<uint2>(at) = {reinterpret_cast<const uint32_t&>(low), reinterpret_cast<const uint32_t&>(high)};
    } else {
      if (live) shared_at<uint32_t>(at) = reinterpret_cast<const uint32_t&>(low);
    }
  }

  // Whether all that were written are finite.
  __device__ bool are_finite() const {
    bool finite = true;
    for (const auto& zero : zeros_) finite = finite && __low2float(zero) == 0 && __high2float(zero) == 0;  // not NaN
    return finite;
  }

 private:
  float bias_[Shape::kChannels];
  Pair<T> zeros_[Shape::kChannels / 2] = {};

  __device__ Pair<T> pair_of(const float (&sum)[Shape::kChannels][4], int v, int h) {
    const auto pair = narrow_pair(sum[2 * h][v] + bias_[2 * h], sum[2 * h + 1][v] + bias_[2 * h + 1], T{});
#if __CUDA_ARCH__ >= 800
    zeros_[h] = __hfma2(pair, narrow_pair(0.f, 0.f, T{}), zeros_[h]);
#endif
    return pair;
  }
};

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
    a.slot_bytes = Shape::kSourceRows * a.streams * a.source.stream_bytes;
    a.stage_bytes = a.streams * a.target.stream_bytes;
    a.stage_at = kRing + Shape::kDepth * a.slot_bytes;
    a.rows = static_cast<int>(ceil_div(a.batch, a.streams) * a.target.height);
    a.whole_rows = a.batch / a.streams * a.target.height;
    a.by_ring_rows = Divider(Shape::kDepth * Shape::kSourceRows * a.streams);
    const int groups = a.source.columns / 8;
    a.by_groups = Divider(groups), a.matrices = a.streams * groups;
    a.turns = static_cast<int>(ceil_div(a.matrices, 4) * ceil_div(a.slab, 8));
    // Rows of tiles that are side by side, also from one image to the next, are read from all banks.
    a.stream_units = (groups + 1) / 2;
    if (a.streams > 1)
      while (a.stream_units % (2 * a.tiles) != a.tiles) ++a.stream_units;
    a.odd_bytes = a.streams * a.stream_units * kUnit;
    a.plane_bytes = static_cast<int>(round_up(2 * a.odd_bytes, 128)) + kUnit;
    a.planes_bytes = static_cast<int>(round_up(a.slab, 8)) * a.plane_bytes;
    a.clear = a.batch % a.streams != 0 || a.channels % a.slab != 0 || a.padding_w > 0 ||
              a.source.width < tiles * Shape::kColumns + Shape::kReach;
    const int stages = Shape::kStages * a.stage_bytes, weights = a.slab * Shape::kBandRows * Shape::kBandBytes;
    a.bands_at = a.stage_at + (Shape::kKept ? 0 : stages);
    a.planes_at = std::max(a.stage_at + stages, a.bands_at + weights);
    const int bytes = a.planes_at + (Shape::kParted ? 2 * a.planes_bytes : 0);
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

// What does not depend on how a problem is cut. `lead`: see Toeplitz.
inline Toeplitz arguments_of(const Problem& p, int lead) {
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
  a.lead = lead, a.first_tap = a.padding_w - lead;
  a.by_height = Divider(map.out_height), a.by_kernel_w = Divider(p.kernel_w);
  return a;
}

inline bool is_aligned(const Toeplitz& a) {
  return std::min(a.source.unit, a.target.unit) == kUnit;
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
}  // namespace dwconv
