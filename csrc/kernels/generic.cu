// Any depthwise convolution: every dtype, stride, padding, dilation, multiplier, kernel size and memory layout, and
// arrays beyond 2^31 elements. Always right; other kernels are faster wherever they claim a problem, at ten loads for
// the four products of a thread's rows.
//
// Neighbouring threads own neighbouring elements of what is written (columns in NCHW, channels in channels_last), so
// reads and writes coalesce as far as the layout allows. Only taps that meet the image are multiplied: a weight that is
// Inf or NaN does not meet the padding.
#include <algorithm>
#include <numeric>

#include "cast.h"
#include "generic.cuh"
#include "launch.h"

namespace dwconv {
namespace {

constexpr int kThreads = 256;
constexpr int kRows = 4;  // that a thread owns, so that a weight is read once for as many products

// The position of a thread in an array whose rows go in strips; fastest index first as memory has it.
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

  Reach(int64_t stride, int64_t dilation)
      : tap_step(stride / std::gcd(stride, dilation)), fall(dilation / std::gcd(stride, dilation)) {}
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

template <typename T, typename Index>
void launch_forward(const Problem& p, cudaStream_t stream) {
  const int64_t strips = ceil_div(p.out_height, kRows);
  const int64_t threads = p.batch * p.filters() * strips * p.out_width;
  generic_forward<T, Index><<<blocks_for(threads, kThreads), kThreads, 0, stream>>>(
      static_cast<const T*>(p.input.data), static_cast<const T*>(p.weight.data), static_cast<const T*>(p.bias),
      static_cast<T*>(p.output.data), Sizes<Index>(p), is_channels_last(p.output, p.filters()), strips, threads);
}

template <typename T, typename Index>
void launch_grad_input(const Problem& p, cudaStream_t stream) {
  const int64_t phases = std::min(p.stride_h, p.height);
  const int64_t strips = ceil_div(p.height, kRows * p.stride_h) * phases;
  const int64_t threads = p.batch * p.channels * strips * p.width;
  const Reach rows(p.stride_h, p.dilation_h), columns(p.stride_w, p.dilation_w);
  generic_grad_input<T, Index><<<blocks_for(threads, kThreads), kThreads, 0, stream>>>(
      static_cast<const T*>(p.output.data), static_cast<const T*>(p.weight.data), static_cast<T*>(p.input.data),
      Sizes<Index>(p), rows.tap_step, rows.fall, columns.tap_step, columns.fall, is_channels_last(p.input, p.channels),
      phases, strips, threads);
}

template <typename T, typename Index>
void launch(const Problem& p, cudaStream_t stream) {
  if (p.pass == Pass::kForward)
    launch_forward<T, Index>(p, stream);
  else
    launch_grad_input<T, Index>(p, stream);
}

// In channels_last neighbouring lanes read weights of neighbouring filters: where each is read often, they are laid out
// side by side first.
void lay_filters_side_by_side(Problem& p, const Allocate& allocate, cudaStream_t stream) {
  constexpr int64_t kManyPixels = 2048;
  const View& written = p.pass == Pass::kForward ? p.output : p.input;
  const int64_t pixels = p.batch * std::min(p.height * p.width, p.out_height * p.out_width);
  if (!is_channels_last(written, p.channels) || p.weight.stride[0] <= 1 || p.taps() == 1 || pixels < kManyPixels)
    return;
  View to{allocate(p.filters() * p.taps() * size_of(p.dtype)), {1, 1, p.kernel_w * p.filters(), p.filters()}};
  launch_cast({p.dtype, p.dtype, p.weight, to, {p.filters(), 1, p.kernel_h, p.kernel_w}}, stream);
  p.weight = to;
}

}  // namespace

void launch_generic(const Problem& problem, const Allocate& allocate, cudaStream_t stream) {
  if (problem.pass == Pass::kGradWeight) return launch_generic_grad_weight(problem, allocate, stream);
  Problem p = problem;
  lay_filters_side_by_side(p, allocate, stream);
  visit_dtype(p.dtype, [&](auto zero) {
    using T = decltype(zero);
    if (fits_32_bits(p, kRows, 0))
      launch<T, int32_t>(p, stream);
    else
      launch<T, int64_t>(p, stream);
  });
  check_launch("generic");
}

}  // namespace dwconv
