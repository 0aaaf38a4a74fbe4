// The sides of forward and grad_input, whatever stride and dilation are: which taps meet which source indices.
#pragma once

#include <algorithm>
#include <cstdint>
#include <numeric>

namespace dwconv {

// One side. In forward, tap t of target index i reads source index i * stride - padding + t * dilation; where the
// stride is that of the target, tap t does that reads (i + padding - t * dilation) / stride without a rest.
//
// Taps `tap_step` apart read source indices source_step() apart, and so do targets target_step() apart: along such
// targets, taps and sources a convolution has neither stride nor dilation.
struct WindowSide {
  int size = 0, out_size = 0, kernel = 0, stride = 1, padding = 0, dilation = 1;
  bool spread = false;         // whether the stride is that of the target
  int tap_step = 1, fall = 1;  // stride and dilation without what divides both

  WindowSide() = default;
  WindowSide(int64_t size, int64_t out_size, int64_t kernel, int64_t stride, int64_t padding, int64_t dilation,
             bool spread)
      : size(static_cast<int>(size)),
        out_size(static_cast<int>(out_size)),
        kernel(static_cast<int>(kernel)),
        stride(static_cast<int>(stride)),
        padding(static_cast<int>(padding)),
        dilation(static_cast<int>(dilation)),
        spread(spread),
        tap_step(static_cast<int>(stride / std::gcd(stride, dilation))),
        fall(static_cast<int>(dilation / std::gcd(stride, dilation))) {}

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

}  // namespace dwconv
