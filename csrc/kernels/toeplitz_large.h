// What plan.cpp and the launcher of kernels/toeplitz_large.cu have to know of it.
#pragma once

#include <algorithm>

#include "../problem.h"
#include "stream.h"

namespace dwconv {

constexpr int64_t floor_div(int64_t a, int64_t b) {
  return a / b - (a % b < 0);
}

// The band matrices of a row of the kernel: `count` of them, from d = `first` on. Those that lead from outside of the
// image, or to outside of the target, are not among them.
struct Bands {
  int64_t first, count;

  Bands(int64_t kernel_w, int64_t stride, int64_t padding_w, int64_t width, int64_t out_width) {
    const int64_t tiles = (out_width + 7) / 8, groups = (width + 7) / 8;
    first = std::max(floor_div(-padding_w, 8), -stride * (tiles - 1));
    count = std::max<int64_t>(std::min(floor_div(7 * stride + kernel_w - 1 - padding_w, 8), groups - 1) - first + 1, 1);
  }
};

// What the smallest block takes of shared memory, or a little more: 16 x 16 outputs of one image.
inline int64_t least_large_bytes(const Problem& p) {
  const int64_t bands = (7 * p.stride_w + p.kernel_w - 1) / 8 + 2;  // at most
  const int64_t groups = p.stride_w + bands, rows = 15 * p.stride_h + p.kernel_h;
  const int64_t weights = 2 * (p.kernel_h + 1) * 2 * (8 * round_up(bands, 3) + 8 * p.stride_w);
  return weights + (rows * (groups + 1) + groups) * 16 + 2 * 16 * 16 + 6 * 128;
}

}  // namespace dwconv
