// Any depthwise convolution: every dtype, stride, padding, dilation, multiplier, kernel size and memory layout, and
// arrays beyond 2^31 elements. Always right; specialised kernels are faster where they apply.
//
// Neighbouring threads own neighbouring elements of what is written (columns in NCHW, channels in channels_last), so
// reads and writes coalesce as far as the layout allows. Only taps that meet the image are multiplied: a weight that is
// Inf or NaN does not meet the padding.
#include <algorithm>
#include <limits>

#include "columns_grad_weight.h"
#include "common.cuh"
#include "launch.h"
#include "partial_sums.h"

namespace dwconv {
namespace {

constexpr int kThreads = 256;
constexpr int kRows = 4;      // rows that a thread owns, so that a weight is read once for four products
constexpr int kTaps = 9;      // taps that a thread of grad_weight accumulates in registers
constexpr int kWideTaps = 3;  // in float64 along rows, of few: registers for four blocks a multiprocessor, not two
constexpr int kPart = 32;     // columns that it adds up before it adds them to its sum

// Problem with the integer type of the index arithmetic: 64 bits cost two to three times the instructions.
template <typename Index>
struct Sizes {
  Index batch, channels, multiplier, filters, height, width, out_height, out_width, kernel_h, kernel_w;
  Index stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w;
  Index input[4], weight[4], output[4], bias;  // strides, in elements

  explicit Sizes(const Problem& p)
      : batch(p.batch),
        channels(p.channels),
        multiplier(p.multiplier),
        filters(p.filters()),
        height(p.height),
        width(p.width),
        out_height(p.out_height),
        out_width(p.out_width),
        kernel_h(p.kernel_h),
        kernel_w(p.kernel_w),
        stride_h(p.stride_h),
        stride_w(p.stride_w),
        padding_h(p.padding_h),
        padding_w(p.padding_w),
        dilation_h(p.dilation_h),
        dilation_w(p.dilation_w),
        bias(p.bias_stride) {
    for (int i = 0; i < 4; ++i)
      input[i] = p.input.stride[i], weight[i] = p.weight.stride[i], output[i] = p.output.stride[i];
  }
};

bool is_channels_last(const View& view, int64_t channels) {
  return channels > 1 && view.stride[1] == 1;
}

// Returns value % size and leaves value / size in `value`.
template <typename Index>
__device__ Index split(Index& value, Index size) {
  const Index quotient = value / size;
  const Index remainder = value - quotient * size;
  value = quotient;
  return remainder;
}

// The position of a thread in an array whose rows go in strips of kRows; fastest index first as memory has it.
template <typename Index>
struct Position {
  Index image, channel, strip, column;

  __device__ Position(Index thread, Index channels, Index strips, Index columns, bool channels_last) {
    if (channels_last) {
      channel = split(thread, channels);
      column = split(thread, columns);
      strip = split(thread, strips);
    } else {
      column = split(thread, columns);
      strip = split(thread, strips);
      channel = split(thread, channels);
    }
    image = thread;
  }
};

// How the taps along one side meet an array: tap number t reads index origin + t * move, for t in [begin, end).
template <typename Index>
struct Walk {
  Index origin, move, begin, end;

  // Drops the taps that read outside [0, size).
  __device__ void clip(Index size) {
    const auto outside = [&](Index tap) { return origin + tap * move < 0 || origin + tap * move >= size; };
    while (begin < end && outside(begin)) ++begin;
    while (begin < end && outside(end - 1)) --end;
  }
};

// Adds to the sums of kRows rows, `row_step` source rows apart, what the taps find in the source. `columns` is clipped;
// `rows` speaks of the first of the rows.
template <typename T, typename Index>
__device__ void add_taps(Accumulator<T> (&sum)[kRows], const T* source, Index height, Index row_stride,
                         Index column_stride, const Walk<Index>& rows, Index row_step, const Walk<Index>& columns,
                         const T* taps, Index tap_row_stride, Index tap_column_stride) {
  for (Index i = rows.begin; i < rows.end; ++i) {
    bool inside[kRows], any = false;
    Index offset[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const Index y = rows.origin + i * rows.move + r * row_step;
      inside[r] = y >= 0 && y < height;
      offset[r] = inside[r] ? y * row_stride : 0;
      any |= inside[r];
    }
    if (!any) continue;
    const T* tap = taps + i * tap_row_stride + columns.begin * tap_column_stride;
    const T* column = source + (columns.origin + columns.begin * columns.move) * column_stride;
    for (Index j = columns.begin; j < columns.end; ++j) {
      const Accumulator<T> weight = widen(*tap);
#pragma unroll
      for (int r = 0; r < kRows; ++r)
        if (inside[r]) sum[r] += weight * widen(column[offset[r]]);
      tap += tap_column_stride;
      column += columns.move * column_stride;
    }
  }
}

template <typename T, typename Index>
__global__ void __launch_bounds__(kThreads)
    generic_forward(const T* __restrict__ input, const T* __restrict__ weight, const T* __restrict__ bias,
                    T* __restrict__ output, const Sizes<Index> s, bool channels_last, Index strips, Index threads) {
  using Acc = Accumulator<T>;
  const Index thread = static_cast<Index>(blockIdx.x) * kThreads + threadIdx.x;
  if (thread >= threads) return;
  const Position<Index> at(thread, s.filters, strips, s.out_width, channels_last);
  const Index row = at.strip * kRows;

  Acc sum[kRows];
#pragma unroll
  for (int r = 0; r < kRows; ++r) sum[r] = bias ? widen(bias[at.channel * s.bias]) : Acc(0);

  const Walk<Index> rows{row * s.stride_h - s.padding_h, s.dilation_h, 0, s.kernel_h};
  Walk<Index> columns{at.column * s.stride_w - s.padding_w, s.dilation_w, 0, s.kernel_w};
  columns.clip(s.width);
  add_taps(sum, input + at.image * s.input[0] + at.channel / s.multiplier * s.input[1], s.height, s.input[2],
           s.input[3], rows, s.stride_h, columns, weight + at.channel * s.weight[0], s.weight[2], s.weight[3]);

  output += at.image * s.output[0] + at.channel * s.output[1] + at.column * s.output[3];
#pragma unroll
  for (int r = 0; r < kRows; ++r)
    if (row + r < s.out_height) output[(row + r) * s.output[2]] = narrow<T>(sum[r]);
}

// Input index i is read by tap k for output (i + padding - k * dilation) / stride where that division leaves no rest.
// Such taps lie `tap_step` apart, and from one to the next the output index falls by `fall`.
struct Reach {
  int64_t tap_step, fall;

  Reach(int64_t stride, int64_t dilation) {
    int64_t divisor = stride, rest = dilation;
    while (rest) std::swap(divisor %= rest, rest);
    tap_step = stride / divisor, fall = dilation / divisor;
  }
};

// The taps of one side that reach a padded index, and the output indices they reach it for; none where `end` is 0.
template <typename Index>
__device__ Walk<Index> taps_reaching(Index padded_index, Index stride, Index dilation, Index kernel, Index tap_step,
                                     Index fall, Index& first_tap) {
  first_tap = 0;
  const Index limit = min(tap_step, kernel);
  while (first_tap < limit && (padded_index - first_tap * dilation) % stride != 0) ++first_tap;
  if (first_tap == limit) return {0, 0, 0, 0};
  return {(padded_index - first_tap * dilation) / stride, -fall, 0, (kernel - first_tap + tap_step - 1) / tap_step};
}

// A thread owns kRows input rows that lie a stride apart: the same taps reach all of them.
template <typename T, typename Index>
__global__ void __launch_bounds__(kThreads)
    generic_grad_input(const T* __restrict__ grad_output, const T* __restrict__ weight, T* __restrict__ grad_input,
                       const Sizes<Index> s, Index step_h, Index fall_h, Index step_w, Index fall_w, bool channels_last,
                       Index phases, Index strips, Index threads) {
  using Acc = Accumulator<T>;
  const Index thread = static_cast<Index>(blockIdx.x) * kThreads + threadIdx.x;
  if (thread >= threads) return;
  const Position<Index> at(thread, s.channels, strips, s.width, channels_last);
  const Index row = at.strip / phases * (kRows * s.stride_h) + at.strip % phases;

  Acc sum[kRows] = {};
  Index i0, j0;
  const auto rows = taps_reaching(row + s.padding_h, s.stride_h, s.dilation_h, s.kernel_h, step_h, fall_h, i0);
  auto columns = taps_reaching(at.column + s.padding_w, s.stride_w, s.dilation_w, s.kernel_w, step_w, fall_w, j0);
  columns.clip(s.out_width);
  for (Index q = 0; q < s.multiplier; ++q) {
    const Index filter = at.channel * s.multiplier + q;
    add_taps(sum, grad_output + at.image * s.output[0] + filter * s.output[1], s.out_height, s.output[2], s.output[3],
             rows, Index(1), columns, weight + filter * s.weight[0] + i0 * s.weight[2] + j0 * s.weight[3],
             step_h * s.weight[2], step_w * s.weight[3]);
  }

  grad_input += at.image * s.input[0] + at.channel * s.input[1] + at.column * s.input[3];
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const Index y = row + r * s.stride_h;
    if (y < s.height) grad_input[y * s.input[2]] = narrow<T>(sum[r]);
  }
}

// grad_weight in two stages. The first cuts the N * H_out output rows into `splits` runs; a block sums a few taps (and
// the bias) over one run, for one filter (NCHW: lanes are columns) or `lanes` filters (channels_last: lanes are
// filters). The second adds up the runs. Every sum has a fixed order: the result is the same bit for bit, always.
struct WeightGradientShape {
  bool channels_last;
  int lanes;  // threads side by side, a power of two; kThreads / lanes rows are in work at a time
  int taps;   // of a thread
  int64_t filter_groups, tap_groups, splits;

  explicit WeightGradientShape(const Problem& p) {
    channels_last = is_channels_last(p.output, p.filters()) || is_channels_last(p.input, p.channels);
    const int64_t side_by_side = channels_last ? p.filters() : p.out_width;
    for (lanes = 1; lanes < 32 && lanes < side_by_side;) lanes *= 2;
    filter_groups = channels_last ? ceil_div(p.filters(), lanes) : p.filters();
    taps = p.dtype == DType::kFloat64 && !channels_last && p.taps() <= kTaps ? kWideTaps : kTaps;
    tap_groups = ceil_div(p.taps(), taps);
    constexpr int64_t kBlocks = 2048;  // fills any GPU a few times over; the same on all, so that results are too
    const int64_t rows = p.batch * p.out_height;
    const int64_t useful = ceil_div(rows, kThreads / lanes);
    splits = std::max<int64_t>(1, std::min(useful, ceil_div(kBlocks, filter_groups * tap_groups)));
  }
};

// Partial sums lie as [split][tap, or bias behind the last tap][filter].
template <typename T, typename Index, int kTaps>
__global__ void __launch_bounds__(kThreads, kTaps == kWideTaps && sizeof(Index) == 4 ? 4 : 1)
    generic_grad_weight_runs(const T* __restrict__ grad_output, const T* __restrict__ input,
                             Accumulator<T>* __restrict__ partial, const Sizes<Index> s, bool with_bias,
                             bool channels_last, int lanes, Index filter_groups, Index tap_groups, Index splits) {
  using Acc = Accumulator<T>;
  __shared__ Acc shared[kThreads];
  const int lane = threadIdx.x % lanes;
  const int rows_at_once = kThreads / lanes;
  const Index taps = s.kernel_h * s.kernel_w;
  const Index rows = s.batch * s.out_height;

  Index group = blockIdx.x;
  const Index first_tap = split(group, tap_groups) * kTaps;
  const Index filter_group = split(group, filter_groups);
  const Index run = group;
  const Index begin = static_cast<Index>(static_cast<int64_t>(rows) * run / splits);
  const Index end = static_cast<Index>(static_cast<int64_t>(rows) * (run + 1) / splits);

  const Index filter = channels_last ? filter_group * lanes + lane : filter_group;
  const Index first_column = channels_last ? 0 : lane;
  const Index column_step = channels_last ? 1 : lanes;

  Acc sum[kTaps] = {}, bias_sum = 0;
  Index dy[kTaps], dx[kTaps];
#pragma unroll
  for (int t = 0; t < kTaps; ++t) {
    const Index tap = min(first_tap + t, taps - 1);
    dy[t] = tap / s.kernel_w * s.dilation_h - s.padding_h;
    dx[t] = tap % s.kernel_w * s.dilation_w - s.padding_w;
  }
  if (filter < s.filters) {
    const T* channel = input + filter / s.multiplier * s.input[1];
    const T* grad = grad_output + filter * s.output[1];
    for (Index r = begin + threadIdx.x / lanes; r < end; r += rows_at_once) {
      Index image = r;
      const Index out_row = split(image, s.out_height);
      const T* image_input = channel + image * s.input[0];
      const T* row_grad = grad + image * s.output[0] + out_row * s.output[2];
      Index offset[kTaps], width[kTaps];  // a width of 0 keeps a tap above or below the image out
#pragma unroll
      for (int t = 0; t < kTaps; ++t) {
        const Index y = out_row * s.stride_h + dy[t];
        width[t] = y >= 0 && y < s.height ? s.width : 0;
        offset[t] = width[t] ? y * s.input[2] : 0;
      }
      for (Index column = first_column; column < s.out_width;) {
        Acc part[kTaps] = {}, bias_part = 0;  // short sums of short sums: the rounding error grows slowly
        for (int n = 0; n < kPart && column < s.out_width; ++n, column += column_step) {
          const Acc g = widen(row_grad[column * s.output[3]]);
          bias_part += g;
#pragma unroll
          for (int t = 0; t < kTaps; ++t) {
            const Index x = column * s.stride_w + dx[t];
            if (x >= 0 && x < width[t]) part[t] += g * widen(image_input[offset[t] + x * s.input[3]]);
          }
        }
#pragma unroll
        for (int t = 0; t < kTaps; ++t) sum[t] += part[t];
        bias_sum += bias_part;
      }
    }
  }

  // A tree over the threads: down to one thread, or to one row of lanes where each lane has a filter of its own.
  const int width = channels_last ? lanes : 1;
  const auto reduce = [&](Acc value, Index slot) {
    shared[threadIdx.x] = value;
    __syncthreads();
    for (int offset = kThreads / 2; offset >= width; offset /= 2) {
      if (static_cast<int>(threadIdx.x) < offset) shared[threadIdx.x] += shared[threadIdx.x + offset];
      __syncthreads();
    }
    if (static_cast<int>(threadIdx.x) < width && filter < s.filters)
      partial[(run * (taps + with_bias) + slot) * s.filters + filter] = shared[threadIdx.x];
    __syncthreads();
  };
#pragma unroll
  for (int t = 0; t < kTaps; ++t)
    if (first_tap + t < taps) reduce(sum[t], first_tap + t);
  if (with_bias && first_tap == 0) reduce(bias_sum, taps);
}

unsigned blocks_for(int64_t threads) {
  const int64_t blocks = ceil_div(threads, kThreads);
  if (blocks > std::numeric_limits<int32_t>::max())
    throw std::runtime_error("dwconv: the tensors are too large for one kernel launch");
  return static_cast<unsigned>(blocks);
}

template <typename T, typename Index>
void launch_forward(const Problem& p, cudaStream_t stream) {
  const int64_t strips = ceil_div(p.out_height, kRows);
  const int64_t threads = p.batch * p.filters() * strips * p.out_width;
  generic_forward<T, Index><<<blocks_for(threads), kThreads, 0, stream>>>(
      static_cast<const T*>(p.input.data), static_cast<const T*>(p.weight.data), static_cast<const T*>(p.bias),
      static_cast<T*>(p.output.data), Sizes<Index>(p), is_channels_last(p.output, p.filters()), strips, threads);
}

template <typename T, typename Index>
void launch_grad_input(const Problem& p, cudaStream_t stream) {
  const int64_t phases = std::min(p.stride_h, p.height);
  const int64_t strips = ceil_div(p.height, kRows * p.stride_h) * phases;
  const int64_t threads = p.batch * p.channels * strips * p.width;
  const Reach rows(p.stride_h, p.dilation_h), columns(p.stride_w, p.dilation_w);
  generic_grad_input<T, Index><<<blocks_for(threads), kThreads, 0, stream>>>(
      static_cast<const T*>(p.output.data), static_cast<const T*>(p.weight.data), static_cast<T*>(p.input.data),
      Sizes<Index>(p), rows.tap_step, rows.fall, columns.tap_step, columns.fall, is_channels_last(p.input, p.channels),
      phases, strips, threads);
}

template <typename T, typename Index>
void launch_grad_weight(const Problem& p, const Allocate& allocate, cudaStream_t stream) {
  const WeightGradientShape shape(p);
  const int64_t sums = (p.taps() + (p.bias != nullptr)) * p.filters();
  auto* partial = static_cast<Accumulator<T>*>(allocate(shape.splits * sums * sizeof(Accumulator<T>)));
  const int64_t blocks = shape.filter_groups * shape.tap_groups * shape.splits;
  const auto launch = [&](auto kernel) {
    kernel<<<blocks_for(blocks * kThreads), kThreads, 0, stream>>>(
        static_cast<const T*>(p.output.data), static_cast<const T*>(p.input.data), partial, Sizes<Index>(p),
        p.bias != nullptr, shape.channels_last, shape.lanes, shape.filter_groups, shape.tap_groups, shape.splits);
  };
  if (sizeof(T) == sizeof(double) && shape.taps == kWideTaps)
    launch(generic_grad_weight_runs < T, Index, sizeof(T) == sizeof(double) ? kWideTaps : kTaps >);
  else
    launch(generic_grad_weight_runs<T, Index, kTaps>);
  check_launch("generic_grad_weight_runs");
  launch_add_partial_sums(p, partial, shape.splits, stream);
}

// Whether every offset and every row or column number, also those before and behind the image, fits 31 bits.
bool fits_32_bits(const Problem& p) {
  const auto extent = [](const View& view, int64_t n, int64_t c, int64_t h, int64_t w) {
    return std::max<int64_t>(n - 1, 0) * view.stride[0] + (c - 1) * view.stride[1] + (h - 1) * view.stride[2] +
           (w - 1) * view.stride[3];
  };
  const int64_t reach_h = p.height + 2 * p.padding_h + (kRows + 1) * (p.stride_h + p.dilation_h) * kRows;
  const int64_t reach_w = p.width + 2 * p.padding_w + 2 * (p.stride_w + p.dilation_w);
  const int64_t positions = p.batch * std::max(p.filters() * (p.out_height + kRows) * p.out_width,
                                               p.channels * (p.height + kRows * p.stride_h) * p.width);
  const int64_t sums = p.pass == Pass::kGradWeight ? (p.taps() + 1) * p.filters() * WeightGradientShape(p).splits : 0;
  constexpr int64_t kLimit = std::numeric_limits<int32_t>::max() / 2;
  return std::max({extent(p.input, p.batch, p.channels, p.height, p.width),
                   extent(p.output, p.batch, p.filters(), p.out_height, p.out_width),
                   extent(p.weight, p.filters(), 1, p.kernel_h, p.kernel_w), p.filters() * p.bias_stride, reach_h,
                   reach_w, positions, sums}) < kLimit;
}

}  // namespace

void launch_generic(const Problem& p, const Allocate& allocate, cudaStream_t stream) {
  if (p.pass == Pass::kGradWeight && launch_columns_grad_weight(p, allocate, stream)) return;
  const auto launch = [&](auto zero, auto index) {
    using T = decltype(zero);
    using Index = decltype(index);
    switch (p.pass) {
      case Pass::kForward: return launch_forward<T, Index>(p, stream);
      case Pass::kGradInput: return launch_grad_input<T, Index>(p, stream);
      case Pass::kGradWeight: return launch_grad_weight<T, Index>(p, allocate, stream);
    }
  };
  visit_dtype(p.dtype, [&](auto zero) {
    if (fits_32_bits(p))
      launch(zero, int32_t{});
    else
      launch(zero, int64_t{});
  });
  check_launch("generic");
}

}  // namespace dwconv
