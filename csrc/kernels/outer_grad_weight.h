// What claims_large.cpp and the launcher of kernels/outer_grad_weight.cu have to know of it.
#pragma once

#include <algorithm>

#include "../problem.h"

namespace dwconv {

// What the kernel is compiled for, by the columns of a plane: a warp has so many rows of the kernel, a block so many
// warps.
struct OuterTile {
  int64_t columns, rows, warps;
};
constexpr OuterTile kNarrowOuter{16, 4, 8}, kMiddleOuter{32, 2, 16}, kWideOuter{56, 1, 10};

// The sizes of a problem, with rows and columns exchanged or not: copies to planes can have either side by side.
struct OuterSizes {
  int64_t height, width, out_height, out_width, kernel_h, kernel_w, padding_h;

  static OuterSizes of(const Problem& p, bool exchanged) {
    if (exchanged) return {p.width, p.height, p.out_width, p.out_height, p.kernel_w, p.kernel_h, p.padding_w};
    return {p.height, p.width, p.out_height, p.out_width, p.kernel_h, p.kernel_w, p.padding_h};
  }

  int64_t columns() const { return std::max(width, out_width); }
  const OuterTile& tile() const {
    return columns() <= kNarrowOuter.columns   ? kNarrowOuter
           : columns() <= kMiddleOuter.columns ? kMiddleOuter
                                               : kWideOuter;
  }
  // The rows of the kernel that meet the images: from the first one to the last one, less one.
  int64_t first_row() const { return std::max<int64_t>(padding_h - (out_height - 1), 0); }
  int64_t last_row() const { return std::min(height + padding_h, kernel_h); }
  int64_t rows() const { return last_row() - first_row(); }

  // Multiplications for a row of the gradients of 16 images.
  int64_t multiplications() const {
    const int64_t columns = tile().columns;
    return rows() * ((columns + 15) / 16) * (columns / 8);
  }
  // Whether a block has warps for all rows of the kernel.
  bool fits() const { return columns() <= tile().columns && rows() <= tile().rows * tile().warps; }
};

// Whether rows and columns are exchanged by the kernel, which takes rows as they are: where it would not fit otherwise.
// Only the widest tile is compiled for that.
inline bool is_outer_exchanged_in_kernel(const Problem& p) {
  const OuterSizes other = OuterSizes::of(p, true);
  return has_rows(p.input, p.width) && has_rows(p.output, p.out_width) && !OuterSizes::of(p, false).fits() &&
         other.fits() && other.columns() > kMiddleOuter.columns;
}

// Whether rows and columns are exchanged: by the kernel, or where both images are copied anyway and it takes less.
inline bool is_outer_exchanged(const Problem& p) {
  if (is_outer_exchanged_in_kernel(p)) return true;
  if (has_rows(p.input, p.width) || has_rows(p.output, p.out_width)) return false;
  if (p.input.stride[2] == 1 || p.output.stride[2] == 1 || p.height == 1 || p.out_height == 1) return false;
  const OuterSizes as_is = OuterSizes::of(p, false), other = OuterSizes::of(p, true);
  if (!other.fits()) return false;
  return !as_is.fits() || other.out_height * other.multiplications() < as_is.out_height * as_is.multiplications();
}

}  // namespace dwconv
