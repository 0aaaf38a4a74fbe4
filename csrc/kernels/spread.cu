// grad_input at a stride, of kernels of which a few taps reach an output, on planes of any layout.
//
// Row m * stride + q of the padded target reads row m - t of the source by tap q + t * stride: so a group of `stride`
// rows meets the same few rows of the source. A thread walks down a column of the target, group by group, with these
// pixels in registers: a group takes one more row of pixels, which is asked for some groups ahead. The weights of an
// output lie side by side in shared memory, zeros where there is no tap; few of them stay in registers. A dilation that
// divides the stride leaves rows between others without a tap.
//
// Zeros stand for pixels and taps that are not there. Where a sum is not finite in the end, all of the thread's are
// computed again.
#include "spread.h"

#include <algorithm>

#include "device.h"
#include "direct.cuh"
#include "overlap.cuh"
#include "window_sides.cuh"

namespace dwconv {
namespace {

constexpr int kThreads = 128;
constexpr int64_t kMostGroups = 16;     // of a thread
constexpr int64_t kManyThreads = 2048;  // of a multiprocessor

struct Arguments : MappingArguments {
  WindowSide rows, columns;
  Reach reach_rows, reach_columns;
  int first_group, last_group;  // of rows
  int strip;                    // groups of a thread
  int outputs;                  // with weights of their own, which a filter has in shared memory
  uint32_t units;               // strips of columns
  Divider by_columns, by_strips, by_targets, by_column_steps, by_dilation;
};

// The weights of an output, in units that are loaded at once. Those of neighbouring columns begin in different banks of
// shared memory.
template <typename Acc, int kTaps>
struct alignas(kTaps == 1                 ? sizeof(Acc)
               : kTaps * sizeof(Acc) <= 8 ? 8
                                          : 16) Weights {
  Acc tap[kTaps + (kTaps * sizeof(Acc) % 64 == 0 ? 16 / sizeof(Acc) : 0)];
};

// One output, by the taps that meet the source.
template <typename T>
__device__ __noinline__ Accumulator<T> exact(const Arguments& a, int image, int channel, int row, int column) {
  return tap_by_tap(a, a.source_of<T>(image, channel), a.weight_of<T>(channel), taps_of(a.rows, a.reach_rows, row),
                    taps_of(a.columns, a.reach_columns, column));
}

// Blocks that are to find registers on a multiprocessor, for threads with so many bytes of weights.
constexpr int least_blocks(int bytes) {
  return bytes <= 32 ? 8 : bytes <= 64 ? 6 : bytes <= 112 ? 5 : 4;
}

template <typename T, int kStride, int kRows, int kColumns>
__global__ void __launch_bounds__(kThreads, least_blocks(kStride * kRows * kColumns * sizeof(Accumulator<T>)))
    spread(const __grid_constant__ Arguments a) {
  using Acc = Accumulator<T>;
  constexpr int kTaps = kRows * kColumns;
  using Filter = Weights<Acc, kTaps>;
  constexpr bool kKept = kStride * sizeof(Filter) <= 144;            // whether a thread keeps its weights in registers
  constexpr int kAhead = kColumns == 1 ? 4 : kColumns == 2 ? 3 : 2;  // rows of pixels that are under way
  extern __shared__ __align__(16) unsigned char shared[];
  Filter* const staged = reinterpret_cast<Filter*>(shared);

  const uint32_t first_unit = blockIdx.x * kThreads, last_unit = min(first_unit + kThreads, a.units) - 1;
  uint32_t first_plane = first_unit, last_plane = last_unit, plane = min(first_unit + threadIdx.x, last_unit);
  a.by_columns.split(first_plane), a.by_strips.split(first_plane);
  a.by_columns.split(last_plane), a.by_strips.split(last_plane);
  const int column = a.by_columns.split(plane), strip = a.by_strips.split(plane);
  const int filter = plane - first_plane;
  const int channel = a.by_targets.split(plane), image = plane;
  const Walk across = taps_of(a.columns, a.reach_columns, column);
  int group = a.first_group + strip * a.strip;
  const int end = first_unit + threadIdx.x > last_unit ? group : min(group + a.strip, a.last_group + 1);

  // The next row of pixels, from which a step down leads to the one after it.
  const T* source = a.source_of<T>(image, channel) + (group - (kRows - 1)) * a.source_stride[2];
  int at[kColumns];
  bool is_column[kColumns];
#pragma unroll
  for (int c = 0; c < kColumns; ++c) {
    const int x = across.origin + c * across.move;
    is_column[c] = c < across.count && static_cast<uint32_t>(x) < static_cast<uint32_t>(a.width);
    at[c] = x * a.source_stride[3];
  }
  const auto load_row = [&](Vector<T, 1>(&pixel)[kColumns], int y) {
    const bool is_row = y < end && static_cast<uint32_t>(y) < static_cast<uint32_t>(a.height);
#pragma unroll
    for (int c = 0; c < kColumns; ++c) pixel[c] = load<T, 1>(source + at[c], is_row && is_column[c]);
    source += a.source_stride[2];
  };
  wait_for_kernel_before();
  let_next_kernel_start();

  // The rows above that of the first group, and those from that one on.
  Vector<T, 1> above[kRows][kColumns], ahead[kAhead][kColumns];
#pragma unroll
  for (int t = kRows - 1; t > 0; --t) load_row(above[t], group - t);
#pragma unroll
  for (int n = 0; n < kAhead; ++n) load_row(ahead[n], group + n);
  const uint32_t count = (last_plane - first_plane + 1) * a.outputs * kTaps;
#pragma unroll 4
  for (uint32_t n = threadIdx.x; n < count; n += kThreads) {
    const int tap = n % kTaps;
    uint32_t its = n / kTaps;
    Acc& to = staged[its].tap[tap];
    const int j = a.by_column_steps.split(its) + tap % kColumns * a.columns.tap_step;
    uint32_t first = its % kStride;
    const bool has_taps = a.by_dilation.split(first) == 0;
    const int i = first + tap / kColumns * a.rows.tap_step;
    its = its / kStride + first_plane;
    const T* const weight = a.weight_of<T>(a.by_targets.split(its)) + (i * a.weight_row + j * a.weight_column);
    to = load<T, 1>(weight, has_taps && i < a.rows.kernel && j < a.columns.kernel)[0];
  }
  __syncthreads();

  const Filter* const filters = staged + (filter * a.outputs + across.first);
  Filter kept[kKept ? kStride : 1];
  if constexpr (kKept)
#pragma unroll
    for (int q = 0; q < kStride; ++q) kept[q] = filters[q * a.columns.tap_step];

  Acc window[kRows][kColumns];
#pragma unroll
  for (int t = 1; t < kRows; ++t)
#pragma unroll
    for (int c = 0; c < kColumns; ++c) window[t - 1][c] = above[t][c][0];
  const int first = group * kStride - a.rows.padding;
  T* const targets = a.target_of<T>(image, channel, column);
  T* target = targets + first * a.target_stride[2];
  int row = first;
  Acc zero = 0;  // or NaN
  const auto has_row = [&](int row) { return static_cast<uint32_t>(row) < static_cast<uint32_t>(a.out_height); };
  const auto add_group = [&](Vector<T, 1>(&next)[kColumns]) {
#pragma unroll
    for (int t = kRows - 1; t > 0; --t)
#pragma unroll
      for (int c = 0; c < kColumns; ++c) window[t][c] = window[t - 1][c];
#pragma unroll
    for (int c = 0; c < kColumns; ++c) window[0][c] = next[c][0];
    load_row(next, group + kAhead);
#pragma unroll
    for (int q = 0; q < kStride; ++q) {
      const Filter its = kKept ? kept[kKept ? q : 0] : filters[q * a.columns.tap_step];
      Acc sum = 0;
#pragma unroll
      for (int t = 0; t < kRows; ++t)
#pragma unroll
        for (int c = 0; c < kColumns; ++c) sum = fma(window[t][c], its.tap[t * kColumns + c], sum);
      zero = fma(sum, Acc(0), zero);
      if (has_row(row + q)) target[q * a.target_stride[2]] = narrow<T>(sum);
    }
    row += kStride, target += kStride * a.target_stride[2];
  };
  while (group < end)
#pragma unroll
    for (int n = 0; n < kAhead && group < end; ++n, ++group) add_group(ahead[n]);
  if (zero == 0) return;
#pragma unroll 1
  for (int again = first; again < row; ++again)
    if (has_row(again)) targets[again * a.target_stride[2]] = narrow<T>(exact<T>(a, image, channel, again, column));
}

// Calls visit() with the first of the compiled numbers that is not less.
template <int... kNumbers, typename Visitor>
void visit_least(int number, Visitor&& visit) {
  bool found = false;
  ((found || number > kNumbers || (found = true, visit(std::integral_constant<int, kNumbers>{}), true)), ...);
}

}  // namespace

void launch_spread(const Problem& p, cudaStream_t stream) {
  const Mapping map(p);
  Arguments a{map};
  a.rows = window_rows(p, map), a.columns = window_columns(p, map);
  a.reach_rows = Reach(a.rows), a.reach_columns = Reach(a.columns);
  a.first_group = a.rows.padding / a.rows.stride;
  a.last_group = (map.out_height - 1 + a.rows.padding) / a.rows.stride;
  const int64_t groups = a.last_group - a.first_group + 1, planes = p.batch * map.targets;
  const int64_t enough = ceil_div(kManyThreads * current_device().multiprocessors, planes * map.out_width);
  a.strip = static_cast<int>(ceil_div(groups, std::clamp(enough, ceil_div(groups, kMostGroups), groups)));
  const int64_t strips = ceil_div(groups, a.strip), units = planes * map.out_width * strips;
  a.units = static_cast<uint32_t>(units), a.outputs = a.rows.stride * a.columns.tap_step;
  a.by_columns = Divider(map.out_width), a.by_strips = Divider(strips), a.by_targets = Divider(map.targets);
  a.by_column_steps = Divider(a.columns.tap_step), a.by_dilation = Divider(p.dilation_h);

  const int64_t filters = std::min(planes, (kThreads - 2) / (map.out_width * strips) + 2);  // of a block
  visit_least<2, 3, kMostSpreadStride>(a.rows.stride, [&](auto stride) {
    constexpr int kStride = decltype(stride)::value;
    const auto visit_taps = [&](int taps, auto&& visit) {
      visit_least<1, 2, 3, 4>(taps, [&](auto number) {
        if constexpr (decltype(number)::value <= most_spread_taps(kStride)) visit(number);
      });
    };
    visit_taps(a.rows.set_pitch(), [&](auto rows) {
      visit_taps(a.columns.set_pitch(), [&](auto columns) {
        visit_dtype(p.dtype, [&](auto zero) {
          using T = decltype(zero);
          constexpr int kRows = decltype(rows)::value, kColumns = decltype(columns)::value;
          const int64_t bytes = filters * a.outputs * sizeof(Weights<Accumulator<T>, kRows * kColumns>);
          launch_early(spread<T, kStride, kRows, kColumns>, a, ceil_div(units, kThreads), kThreads, stream,
                       {.shared_bytes = bytes});
        });
      });
    });
  });
  check_launch("spread");
}

}  // namespace dwconv
