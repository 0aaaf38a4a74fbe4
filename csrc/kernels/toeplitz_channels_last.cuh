// What kernels of toeplitz_channels_last.cu and toeplitz_whole_channels_last.cu have in common: how weights are
// prepared, what outputs go through, and how a kernel begins.
#pragma once

#include <algorithm>
#include <type_traits>
#include <utility>

#include "launch.h"
#include "overlap.cuh"
#include "tensor_cores.cuh"
#include "toeplitz_channels_last_cut.cuh"

namespace dwconv {

// Of images whose sums are all in registers: kernels/toeplitz_whole_channels_last.cu.
bool launch_toeplitz_whole_channels_last(const Problem& problem, cudaStream_t stream);

// At stride 2: kernels/toeplitz_strided_channels_last.cu.
void launch_toeplitz_strided_channels_last(const Problem& problem, cudaStream_t stream);

namespace {

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
        bias, reinterpret_cast<const T*>(a.source.base + a.source.shift + image * a.source.image_bytes) + channel,
        a.source.row_bytes, a.source.pixel_bytes, a.source.height, a.source.width,
        static_cast<const T*>(a.weight) + channel * a.weight_filter, a.weight_row, a.weight_column, a.kernel_h,
        a.kernel_w, [&](int i) { return y - a.padding_h + i; }, [&](int j) { return x - a.padding_w + j; }));
  }
}

// Fills those columns of the ring with zeros that lie outside the image.
template <class Shape>
__device__ void clear_edges(const Toeplitz& a, int first_column) {
  const Rows& r = a.source;
  const int before = max(-first_column, 0), end = max(min(r.columns, r.width - first_column), before);
  const int units = (before + r.columns - end) * static_cast<int>(r.by_all_units.divisor);
#pragma unroll 1
  for (int i = threadIdx.x; i < units * static_cast<int>(a.by_ring_rows.divisor); i += blockDim.x) {
    uint32_t column = i;
    const int row = a.by_ring_rows.split(column), part = r.by_all_units.split(column) * kUnit;
    const int at = static_cast<int>(column) < before ? column : column - before + end;
    shared<uint4>(kRing + row * r.stream_bytes + Shape::place_of(at) + part) = {};
  }
}

template <class Shape>
using FeedOf = std::conditional_t<Shape::kShifted, ShiftedFeed<Shape>, Feed<Shape>>;

// What goes before the first step of rows [begin, end): prepares the weights of a slab, and begins to load. Calls
// meanwhile() when weights and rows are on their way.
template <typename T, class Shape, typename Meanwhile>
__device__ void begin_rows(const Toeplitz& a, FeedOf<Shape>& feed, int slab, int first_column, int end,
                           Meanwhile&& meanwhile) {
  // What takes no memory but the block's own goes before the kernel before has ended.
  Weights<T, Shape> weights(a, slab, 0);
  feed.find(a);
  // Zeros for all that is never loaded: if that is but the columns beside the images, nothing is loaded there.
  const bool edges = slab + a.slab <= a.channels && end <= a.whole_rows;
  if (a.clear && edges) clear_edges<Shape>(a, first_column);
  if (a.clear && !edges) {
    for (int i = kRing + threadIdx.x * kUnit; i < a.stage_at; i += blockDim.x * kUnit) shared<uint4>(i) = {};
    __syncthreads();
  }
  for (int i = threadIdx.x * kUnit; i < a.slab * Shape::kBandRows * Shape::kBandBytes; i += blockDim.x * kUnit)
    shared<uint4>(a.bands_at + i) = {};
  settle_and_wait_for_kernel_before(a.workers);
  let_next_kernel_start();
  weights.load();
  int i = 0;
  // Rows that have been found come first: what else there may be to do, in the other loop, would keep them waiting.
  if constexpr (!Shape::kShifted) {
#pragma unroll 1
    for (; i < Shape::kAhead && feed.goes_on(a); ++i) {
      feed.load(a, i * a.slot_bytes);
      feed.next(a);
      commit_copies();
    }
  }
#pragma unroll 1
  for (; i < Shape::kAhead; ++i) {
    feed.find(a);
    if constexpr (Shape::kShifted)
      i == 0 ? feed.load_first(a) : feed.load(a, i * a.slot_bytes);
    else
      feed.load(a, i * a.slot_bytes);
    feed.load_more(a, i * a.slot_bytes);
    feed.next(a);
    commit_copies();
  }
  meanwhile();
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
      if (live)
        shared_at<uint2>(at) = {reinterpret_cast<const uint32_t&>(low), reinterpret_cast<const uint32_t&>(high)};
    } else {
      if (live) shared_at<uint32_t>(at) = reinterpret_cast<const uint32_t&>(low);
    }
  }

  // Whether all that were written are finite.
  __device__ bool are_finite() const {
    bool finite = true;
    for (const uint32_t zero : zeros_) finite = finite && zero == 0;
    return finite;
  }

 private:
  float bias_[Shape::kChannels];
  uint32_t zeros_[Shape::kChannels / 2] = {};  // not zero if any output was not finite

  __device__ Pair<T> pair_of(const float (&sum)[Shape::kChannels][4], int v, int h) {
    const auto pair = narrow_pair(sum[2 * h][v] + bias_[2 * h], sum[2 * h + 1][v] + bias_[2 * h + 1], T{});
    add_zeros(zeros_[h], pair);
    return pair;
  }
};

// Where an output is: in which image of a group, and in which of its columns.
struct OutputPlace {
  int stream, column;
};

// Computes those outputs of a warp's channels again that are not finite, after all threads have stored theirs.
// `place_of`: where a thread's sum number v is.
template <typename T, class Shape, typename PlaceOf>
__device__ void repair(const Toeplitz& a, const Outputs<T, Shape>& outputs, int channel, int begin, int end,
                       PlaceOf&& place_of) {
  if (outputs.are_finite()) return;
#pragma unroll 1
  for (int v = 0; v < 4; ++v) {
    const OutputPlace place = place_of(v);
    const bool live = place.stream < a.streams && place.column < a.target.width;
#pragma unroll 1
    for (int c = 0; live && c < Shape::kChannels && channel + c < a.channels; ++c)
      column_by_taps<T>(a, begin, end, place.stream, channel + c, place.column);
  }
}

// The blocks of a slab share the rows of all spans evenly: one may have the end of a span and the head of the next.
// Those of all slabs for the same rows are neighbours, and so use what they read of a pixel's sectors at the same time.
template <typename T, class Shape>
__global__ void __launch_bounds__(32 * kMaxWarps, 1) toeplitz_channels_last(const __grid_constant__ Toeplitz a) {
  uint32_t worker = blockIdx.x, parity = 0;
  if (threadIdx.x == 0) init_barrier(kBarrier, blockDim.x / 32 * kWarpArrivals);
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

template <auto value>
using Number = std::integral_constant<decltype(value), value>;

// Whether shifted pixels of the source are few enough for the threads, and begin each in another place.
template <class Shape>
bool can_be_shifted(const Toeplitz& a) {
  const Rows& r = a.source;
  const int64_t pixel = r.pixel_bytes, row = r.height > 1 ? r.row_bytes : pixel;
  const int64_t image = a.batch > 1 ? r.image_bytes : row;
  constexpr int64_t kMost = int64_t{1} << 30;  // bytes
  return std::min({pixel, row, image}) > 0 && a.streams * image + r.width * pixel < kMost &&
         ShiftedFeed<Shape>::is_enough(a);
}

// Returns whether it could be launched, as it can unless pixels are shifted.
template <typename T, class Shape>
bool launch(Toeplitz a, cudaStream_t stream) {
  const Device& device = current_device();
  const auto kernel = toeplitz_channels_last<T, Shape>;
  int bytes = cut<Shape>(a, device.shared_per_block, a.batch);
  if (Shape::kShifted && bytes > device.shared_per_block) return false;
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
  if (Shape::kShifted && !can_be_shifted<Shape>(a)) return false;
  a.by_rows = Divider(a.rows), a.shares = Shares(int64_t{a.rows} * a.spans, a.workers, 1, grain);
  launch_early(kernel, a, slabs * a.workers, threads, stream, {.shared_bytes = bytes});
  check_launch("toeplitz_channels_last");
  return true;
}

}  // namespace
}  // namespace dwconv
