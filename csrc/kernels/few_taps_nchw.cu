// Forward and grad_input of kernels of a few taps, of any stride and dilation, straight from memory: what neighbouring
// threads share is found in L1.
//
// A thread owns some rows of a column of the target which the same taps reach. Only taps that meet the source are
// multiplied. The loads of some taps are under way together.
#include "device.h"
#include "mapping.h"
#include "overlap.cuh"
#include "windows_nchw.cuh"

namespace dwconv {
namespace {

constexpr int kThreads = 128;
constexpr int kTogether = 3;  // taps

struct Arguments {
  const void *source, *weight, *bias;
  void* target;
  int source_stride[4], target_stride[4];  // in elements
  int weight_filter, weight_row, weight_column, bias_stride;
  int fan_in;  // source planes that a target plane is summed over
  WindowSide rows, columns;
  Reach reach_rows, reach_columns;
  int row_step, row_move;  // from one of a thread's rows to the next, in the target and in the source
  uint32_t units;
  Divider by_columns, by_strips, by_phases, by_targets, by_fan_out;
};

template <typename T, int kRows, bool kOne>
__global__ void __launch_bounds__(kThreads) few_taps(const __grid_constant__ Arguments a) {
  using Acc = Accumulator<T>;
  constexpr int kTaps = kOne ? 1 : kTogether;
  uint32_t unit = blockIdx.x * kThreads + threadIdx.x;
  if (unit >= a.units) return;
  const int column = a.by_columns.split(unit);
  uint32_t strip = a.by_strips.split(unit);
  const int phase = a.by_phases.split(strip), row = strip * (kRows * a.row_step) + phase;
  const int plane = a.by_targets.split(unit), image = unit;
  uint32_t source_plane = plane * a.fan_in;
  a.by_fan_out.split(source_plane);

  Walk down{0, 1, a.rows.kernel, row * a.rows.stride - a.rows.padding, a.rows.dilation};
  Walk across{0, 1, a.columns.kernel, column * a.columns.stride - a.columns.padding, a.columns.dilation};
  if (a.rows.spread) down = taps_reaching(a.rows, a.reach_rows, row);
  if (a.rows.spread) across = taps_reaching(a.columns, a.reach_columns, column);
  const T* source = static_cast<const T*>(a.source) +
                    (image * a.source_stride[0] + static_cast<int>(source_plane) * a.source_stride[1]);
  const T* weight = static_cast<const T*>(a.weight) +
                    (plane * a.fan_in * a.weight_filter + down.first * a.weight_row + across.first * a.weight_column);
  const int weight_row = down.step * a.weight_row, weight_column = across.step * a.weight_column;
  const int taps = down.count * across.count;
  wait_for_kernel_before();
  let_next_kernel_start();

  const Acc bias = a.bias ? widen(static_cast<const T*>(a.bias)[plane * a.bias_stride]) : Acc(0);
  Acc sum[kRows] = {};
  for (int q = 0; q < a.fan_in; ++q, source += a.source_stride[1], weight += a.weight_filter) {
    if constexpr (kRows > 1 && !kOne) {  // threads are many: fewer instructions
      for (int i = 0; i < down.count; ++i) {
        const int y = down.origin + i * down.move;
        bool is_row[kRows];
#pragma unroll
        for (int r = 0; r < kRows; ++r)
          is_row[r] = static_cast<uint32_t>(y + r * a.row_move) < static_cast<uint32_t>(a.rows.size);
        const T* const from = source + y * a.source_stride[2];
        for (int j = 0; j < across.count; j += kTaps) {
          T w[kTaps], pixel[kTaps][kRows];
          bool is_column[kTaps];
#pragma unroll
          for (int t = 0; t < kTaps; ++t) {
            const int x = across.origin + (j + t) * across.move;
            is_column[t] = j + t < across.count && static_cast<uint32_t>(x) < static_cast<uint32_t>(a.columns.size);
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
        const bool met = t < left && static_cast<uint32_t>(x) < static_cast<uint32_t>(a.columns.size);
        const T* const from = source + (y * a.source_stride[2] + x * a.source_stride[3]);
        if (met) w[t] = weight[i * weight_row + j * weight_column];
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          inside[t][r] = met && static_cast<uint32_t>(y + r * a.row_move) < static_cast<uint32_t>(a.rows.size);
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

  T* const target = static_cast<T*>(a.target) +
                    (image * a.target_stride[0] + plane * a.target_stride[1] + column * a.target_stride[3]);
#pragma unroll
  for (int r = 0; r < kRows; ++r)
    if (row + r * a.row_step < a.rows.out_size)
      target[(row + r * a.row_step) * a.target_stride[2]] = narrow<T>(sum[r] + bias);
}

}  // namespace

void launch_few_taps(const Problem& p, cudaStream_t stream) {
  const Mapping map(p);
  Arguments a{};
  a.source = map.source.data, a.target = map.target.data;
  a.weight = map.weight.data, a.bias = map.bias, a.bias_stride = static_cast<int>(map.bias_stride);
  for (int d = 0; d < 4; ++d) {
    a.source_stride[d] = static_cast<int>(map.source.stride[d]);
    a.target_stride[d] = static_cast<int>(map.target.stride[d]);
  }
  a.weight_filter = static_cast<int>(map.weight.stride[0]);
  a.weight_row = static_cast<int>(map.weight.stride[2]), a.weight_column = static_cast<int>(map.weight.stride[3]);
  a.fan_in = map.fan_in;
  a.rows = window_side(map.height, map.out_height, p.kernel_h, p.stride_h, map.padding_h, p.dilation_h, map.spread);
  a.columns = window_side(map.width, map.out_width, p.kernel_w, p.stride_w, map.padding_w, p.dilation_w, map.spread);
  a.reach_rows = Reach(a.rows), a.reach_columns = Reach(a.columns);
  a.by_columns = Divider(map.out_width), a.by_targets = Divider(map.targets), a.by_fan_out = Divider(map.fan_out);
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
