// What claims and the launcher of kernels/toeplitz_large.cu have to know of it.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../problem.h"
#include "stream.h"

namespace dwconv {

// A problem whose rows may have zeros behind the source's own columns, which are counted among these.
struct LargeProblem : Problem {
  int64_t columns;  // the source's own

  LargeProblem(const Problem& p) : Problem(p), columns(p.pass == Pass::kForward ? p.width : p.out_width) {}
};

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

// What toeplitz_large_images.cu asks for: many images of planes so small that a multiplication leads to all rows of a
// target, two neighbouring ones of which are whole units, and enough to do.
constexpr int64_t kImagesTogether = 64, kImagesColumns = 16, kImagesRows = 14;
constexpr int64_t kImagesTasks = 64;  // half of the multiprocessors have one

inline int64_t images_tasks(const Problem& p) {
  return (p.filters() + 1) / 2 * ((p.batch + kImagesTogether - 1) / kImagesTogether);
}

inline bool fits_toeplitz_large_images(const Problem& p) {
  const View& target = p.pass == Pass::kForward ? p.output : p.input;  // the source may begin anywhere
  const auto fits = [&](const View& view, int64_t channels, int64_t height, int64_t width) {
    constexpr int64_t kUnitElements = 8;
    return width <= kImagesColumns && height <= kImagesColumns && width % 2 == 0 &&
           2 * height * width % kUnitElements == 0 && has_rows(view, width) &&
           (height == 1 || view.stride[2] == width) && (channels == 1 || view.stride[1] == height * width) &&
           (p.batch == 1 || view.stride[0] % kUnitElements == 0) &&
           (&view != &target || reinterpret_cast<uintptr_t>(view.data) % (2 * kUnitElements) == 0);
  };
  const int64_t rows = p.pass == Pass::kForward ? p.out_height : p.height;
  return p.pass != Pass::kGradWeight && size_of(p.dtype) == 2 && p.capability == 90 && p.stride_h == 1 &&
         p.stride_w == 1 && p.dilation_h == 1 && p.dilation_w == 1 && p.multiplier == 1 && rows <= kImagesRows &&
         fits(p.input, p.channels, p.height, p.width) && fits(p.output, p.filters(), p.out_height, p.out_width) &&
         2 * p.batch >= kImagesTogether && images_tasks(p) >= kImagesTasks &&
         (p.batch + kImagesTogether - 1) / kImagesTogether * kImagesTogether <= 2 * p.batch;
}

}  // namespace dwconv
