// Forward and grad_input of kernels of a few taps, of any stride and dilation, straight from memory: what neighbouring
// threads share is found in L1.
//
// A thread owns some rows of a column of the target which the same taps reach. Only taps that meet the source are
// multiplied. The loads of some taps are under way together.
#include "few_taps.h"

#include "device.h"
#include "overlap.cuh"
#include "window_sides.cuh"

namespace dwconv {
namespace {

constexpr int kThreads = 128;
constexpr int kTogether = 3;  // taps

struct Arguments : MappingArguments {
  WindowSide rows, columns;
  Reach reach_rows, reach_columns;
  int row_step, row_move;  // from one of a thread's rows to the next, in the target and in the source
  bool channels_last;
  uint32_t units;
  Divider by_columns, by_strips, by_phases, by_targets;
};

template <typename T, int kRows, bool kOne>
__global__ void __launch_bounds__(kThreads) few_taps(const __grid_constant__ Arguments a) {
  using Acc = Accumulator<T>;
  constexpr int kTaps = kOne ? 1 : kTogether;
  uint32_t unit = blockIdx.x * kThreads + threadIdx.x;
  if (unit >= a.units) return;
  uint32_t plane = a.channels_last ? a.by_targets.split(unit) : 0;
  const int column = a.by_columns.split(unit);
  uint32_t strip = a.by_strips.split(unit);
  const int phase = a.by_phases.split(strip), row = strip * (kRows * a.row_step) + phase;
  if (!a.channels_last) plane = a.by_targets.split(unit);
  const int image = unit;
  const Walk down = taps_of(a.rows, a.reach_rows, row), across = taps_of(a.columns, a.reach_columns, column);
  const T* source = a.source_of<T>(image, plane);
  const T* weight = a.weight_of<T>(plane) + (down.first * a.weight_row + across.first * a.weight_column);
  const int weight_row = down.step * a.weight_row, weight_column = across.step * a.weight_column;
  const int taps = down.count * across.count;
  wait_for_kernel_before();
  let_next_kernel_start();

  const Acc bias = a.bias_of<T>(plane);
  Acc sum[kRows] = {};
  for (int q = 0; q < a.fan_in; ++q, source += a.source_stride[1], weight += a.weight_filter) {
    if constexpr (kRows > 1 && !kOne) {  // threads are many: fewer instructions
      for (int i = 0; i < down.count; ++i) {
        const int y = down.origin + i * down.move;
        bool is_row[kRows];
#pragma unroll
        for (int r = 0; r < kRows; ++r)
          is_row[r] = static_cast<uint32_t>(y + r * a.row_move) < static_cast<uint32_t>(a.height);
        const T* const from = source + y * a.source_stride[2];
        for (int j = 0; j < across.count; j += kTaps) {
          T w[kTaps], pixel[kTaps][kRows];
          bool is_column[kTaps];
#pragma unroll
          for (int t = 0; t < kTaps; ++t) {
            const int x = across.origin + (j + t) * across.move;
            is_column[t] = j + t < across.count && static_cast<uint32_t>(x) < static_cast<uint32_t>(a.width);
            if (!is_column[t]) continue;
            w[t] = weight[i * weight_row + (j + t) * weight_column];
#pragma unroll
            for (int r = 0; r < kRows; ++r)
              if (is_row[r]) pixel[t][r] = from[x * a.source_stride[3] + r * a.row_move * a.source_stride[2]];
          }
#pragma unroll
          for (int t = 0; t < kTaps; ++t)
#pragma unroll
            for (int r = 0; r < kRows; ++r)
              if (is_column[t] && is_row[r]) sum[r] = fma(widen(pixel[t][r]), widen(w[t]), sum[r]);
        }
      }
      continue;
    }
    int i = 0, j = 0;
    for (int left = taps; left > 0; left -= kTaps) {
      T w[kTaps], pixel[kTaps][kRows];
      bool inside[kTaps][kRows];
#pragma unroll
      for (int t = 0; t < kTaps; ++t) {
        const int y = down.origin + i * down.move, x = across.origin + j * across.move;
        const bool met = t < left && static_cast<uint32_t>(x) < static_cast<uint32_t>(a.width);
        const T* const from = source + (y * a.source_stride[2] + x * a.source_stride[3]);
        if (met) w[t] = weight[i * weight_row + j * weight_column];
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          inside[t][r] = met && static_cast<uint32_t>(y + r * a.row_move) < static_cast<uint32_t>(a.height);
          if (inside[t][r]) pixel[t][r] = from[r * a.row_move * a.source_stride[2]];
        }
        if (++j == across.count) j = 0, ++i;
      }
#pragma unroll
      for (int t = 0; t < kTaps; ++t)
#pragma unroll
        for (int r = 0; r < kRows; ++r)
          if (inside[t][r]) sum[r] = fma(widen(pixel[t][r]), widen(w[t]), sum[r]);
    }
  }

  T* const target = a.target_of<T>(image, plane, column);
#pragma unroll
  for (int r = 0; r < kRows; ++r)
    if (row + r * a.row_step < a.out_height)
      target[(row + r * a.row_step) * a.target_stride[2]] = narrow<T>(sum[r] + bias);
}

}  // namespace

void launch_few_taps(const Problem& p, cudaStream_t stream) {
  const Mapping map(p);
  Arguments a{map};
  a.rows = window_rows(p, map), a.columns = window_columns(p, map);
  a.channels_last = map.targets > 1 && map.target.stride[1] == 1;
  a.reach_rows = Reach(a.rows), a.reach_columns = Reach(a.columns);
  a.by_columns = Divider(map.out_width), a.by_targets = Divider(map.targets);
  a.row_step = map.spread ? a.rows.stride : 1, a.row_move = map.spread ? 1 : a.rows.stride;

  // Rows of a thread lie a stride apart in the target.
  const auto strips_of = [&](int64_t rows) {
    return ceil_div(map.out_height, rows * a.row_step) * std::min(a.row_step, map.out_height);
  };
  const auto launch = [&](auto number) {
    constexpr int kRows = decltype(number)::value;
    const int64_t strips = strips_of(kRows), units = p.batch * map.targets * strips * map.out_width;
    a.units = static_cast<uint32_t>(units), a.by_strips = Divider(strips);
    a.by_phases = Divider(std::min(a.row_step, map.out_height));
    visit_dtype(p.dtype, [&](auto zero) {
      using T = decltype(zero);
      const auto kernel = p.taps() == 1 ? few_taps<T, kRows, true> : few_taps<T, kRows, false>;
      launch_early<Arguments>(kernel, a, ceil_div(units, kThreads), kThreads, stream);
    });
  };
  // A row a thread, unless there are enough threads with more: what they share is about as much as one and a half rows.
  const auto cost = [&](int64_t rows) { return static_cast<double>(strips_of(rows)) * (rows + 1.5); };
  const int64_t outputs = p.batch * map.targets * map.out_height * map.out_width;
  if (outputs <= int64_t{2048} * current_device().multiprocessors || cost(1) <= std::min(cost(2), cost(4)))
    launch(std::integral_constant<int, 1>{});
  else if (cost(2) <= cost(4))
    launch(std::integral_constant<int, 2>{});
  else
    launch(std::integral_constant<int, 4>{});
  check_launch("few_taps");
}

}  // namespace dwconv
