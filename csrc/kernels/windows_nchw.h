// What kernels/windows_nchw.cu asks for.
#pragma once

#include <algorithm>
#include <cstdint>
#include <numeric>

#include "../problem.h"
#include "stream.h"

namespace dwconv {

// How the taps of one side meet the source. In forward, tap t of target index i reads source index
// i * stride - padding + t * dilation; where the stride is that of the target, tap t does that reads
// (i + padding - t * dilation) / stride without a rest.
//
// Taps `tap_step` apart read source indices source_step() apart, and so do targets target_step() apart: along such
// targets, taps and sources a convolution has neither stride nor dilation.
struct WindowSide {
  int size, out_size, kernel, stride, padding, dilation;
  bool spread;         // whether the stride is that of the target
  int tap_step, fall;  // stride and dilation without what divides both

  int target_step() const { return spread ? stride * fall : fall; }
  // Sets of taps that far apart, and the most taps of one.
  int sets() const { return std::min(tap_step, kernel); }
  int set_pitch() const { return (kernel + tap_step - 1) / tap_step; }
  int source_step() const { return spread ? fall : stride * fall; }

  // Source indices that `targets` neighbours reach, at most.
  int64_t reach(int64_t targets) const {
    const int64_t extent = int64_t{kernel - 1} * dilation;
    const int64_t most = spread ? (targets - 1 + extent) / stride + 1 : (targets - 1) * stride + extent + 1;
    return std::min<int64_t>(most, size);
  }
};

inline WindowSide window_side(int64_t size, int64_t out_size, int64_t kernel, int64_t stride, int64_t padding,
                              int64_t dilation, bool spread) {
  const int64_t divisor = std::gcd(stride, dilation);
  const auto number = [](int64_t value) { return static_cast<int>(value); };
  return {number(size),   number(out_size),         number(kernel),
          number(stride), number(padding),          number(dilation),
          spread,         number(stride / divisor), number(dilation / divisor)};
}

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
  const WindowSide rows = window_side(height, 1, p.kernel_h, p.stride_h, 0, p.dilation_h, spread);
  const WindowSide cols = window_side(width, 1, p.kernel_w, p.stride_w, 0, p.dilation_w, spread);
  const int64_t fan_in = forward ? 1 : p.multiplier, number = std::max<int64_t>(size_of(p.dtype), 4);
  return fan_in * (rows.reach(1) * cols.reach(columns) * size_of(p.dtype) + 64) +
             number * (fan_in * (p.kernel_w * rows.sets() * rows.set_pitch() + 1) + 8) + 256 <=
         p.shared_memory;
}

}  // namespace dwconv
