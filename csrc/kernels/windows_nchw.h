// What kernels/windows_nchw.cu asks for, and kernels/spread.cu, to which it hands over.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../problem.h"
#include "window_sides.h"

namespace dwconv {

constexpr int kLeastWindowColumns = 32;  // of a tile, unless the target has fewer

// Whether the least tile of a block fits in shared memory, and 32 bits count everything.
inline bool fits_windows_nchw(const Problem& p) {
  constexpr int64_t kLimit = 1 << 30, kMany = 1 << 20, kFar = 1 << 14;
  if (p.batch == 0 || p.taps() > kMany || p.multiplier > kMany) return false;
  if (std::max(p.padding_h, p.padding_w) > kMany || std::max(p.stride_h, p.stride_w) > kFar) return false;
  if (p.kernel_h * p.dilation_h > kMany || p.kernel_w * p.dilation_w > kMany) return false;
  const auto extent = [](const View& view, int64_t n, int64_t c, int64_t h, int64_t w) {
    return (n - 1) * view.stride[0] + (c - 1) * view.stride[1] + (h - 1) * view.stride[2] + (w - 1) * view.stride[3];
  };
  if (std::max({extent(p.input, p.batch, p.channels, p.height, p.width),
                extent(p.output, p.batch, p.filters(), p.out_height, p.out_width),
                extent(p.weight, p.filters(), 1, p.kernel_h, p.kernel_w), p.filters() * p.bias_stride,
                p.batch * p.filters() * p.out_height * p.out_width, p.batch * p.channels * p.height * p.width,
                p.out_height * p.stride_h, p.out_width * p.stride_w}) >= kLimit)
    return false;
  const bool forward = p.pass == Pass::kForward, spread = !forward && (p.stride_h > 1 || p.stride_w > 1);
  const int64_t height = forward ? p.height : p.out_height, width = forward ? p.width : p.out_width;
  const int64_t columns = std::min<int64_t>(forward ? p.out_width : p.width, kLeastWindowColumns);
  const WindowSide rows(height, 1, p.kernel_h, p.stride_h, 0, p.dilation_h, spread);
  const WindowSide cols(width, 1, p.kernel_w, p.stride_w, 0, p.dilation_w, spread);
  const int64_t fan_in = forward ? 1 : p.multiplier, number = std::max<int64_t>(size_of(p.dtype), 4);
  return fan_in * (rows.reach(1) * cols.reach(columns) * size_of(p.dtype) + 64) +
             number * (fan_in * (p.kernel_w * rows.sets() * rows.set_pitch() + 1) + 8) + 256 <=
         p.shared_memory;
}

// What spread.cu, a way of it, is compiled for: strides of rows, and taps of a side that reach an output.
inline constexpr int kMostSpreadStride = 4;
constexpr int most_spread_taps(int stride) {
  return stride == 2 ? 4 : stride == 3 ? 3 : 2;
}

// Whether spread.cu serves a problem that fits_windows_nchw(). Blocks lay out filters, for planes that are worth it: so
// there is always room for those.
inline bool fits_spread(const Problem& p) {
  if (p.pass != Pass::kGradInput || p.multiplier > 1 || p.stride_h == 1 || p.stride_h % p.dilation_h != 0) return false;
  if (std::max(p.stride_h, p.stride_w) > kMostSpreadStride) return false;
  const WindowSide rows(p.out_height, p.height, p.kernel_h, p.stride_h, p.padding_h, p.dilation_h, true);
  const WindowSide columns(p.out_width, p.width, p.kernel_w, p.stride_w, p.padding_w, p.dilation_w, true);
  if (std::max(rows.set_pitch(), columns.set_pitch()) > most_spread_taps(rows.stride)) return false;
  constexpr int64_t kWorth = 4;  // outputs for a weight
  return kWorth * rows.stride * rows.set_pitch() * columns.tap_step * columns.set_pitch() <= p.height * p.width;
}

}  // namespace dwconv
