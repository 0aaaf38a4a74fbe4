// grad_input at a stride on planes, by kernels/spread.cu: what claims and windows_nchw.cu, which hands it over, ask.
#pragma once

#include <cuda_runtime_api.h>

#include <algorithm>

#include "../problem.h"
#include "window_sides.h"

namespace dwconv {

// What is compiled: strides of rows, and taps of a side that reach an output.
inline constexpr int kMostSpreadStride = 4;
constexpr int most_spread_taps(int stride) {
  return stride == 2 ? 4 : stride == 3 ? 3 : 2;
}

// Whether it serves a problem that fits_windows_nchw(). Blocks lay out filters, for planes that are worth it: so there
// is always room for those.
inline bool fits_spread(const Problem& p) {
  if (p.pass != Pass::kGradInput || p.multiplier > 1 || p.stride_h == 1 || p.stride_h % p.dilation_h != 0) return false;
  if (std::max(p.stride_h, p.stride_w) > kMostSpreadStride) return false;
  const WindowSide rows(p.out_height, p.height, p.kernel_h, p.stride_h, p.padding_h, p.dilation_h, true);
  const WindowSide columns(p.out_width, p.width, p.kernel_w, p.stride_w, p.padding_w, p.dilation_w, true);
  if (std::max(rows.set_pitch(), columns.set_pitch()) > most_spread_taps(rows.stride)) return false;
  constexpr int64_t kWorth = 4;  // outputs for a weight
  return kWorth * rows.stride * rows.set_pitch() * columns.tap_step * columns.set_pitch() <= p.height * p.width;
}

void launch_spread(const Problem& problem, cudaStream_t stream);

}  // namespace dwconv
