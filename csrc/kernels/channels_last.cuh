// What kernels in channels_last share: rows that follow each other, outputs by definition, how arrays are aligned.
#pragma once

#include "shares.cuh"
#include "stream.cuh"

namespace dwconv {
namespace {

// Output rows of one image, or of one group of images that are worked on together.
struct Run {
  int image, begin, end;
  int row, row_end;  // what they read of the source, inside the image
};

// The first of the runs that make up output rows [begin, end) of all images. A row reads the source from
// row * kStep - lead on.
template <int kStep, int kExtent>
__device__ Run run_of(const Divider& by_rows, int lead, int height, int begin, int end) {
  Run r;
  uint32_t image = begin;
  r.begin = by_rows.split(image);
  r.image = image;
  r.end = min(static_cast<int>(by_rows.divisor), r.begin + end - begin);
  r.row = max(r.begin * kStep - lead, 0);
  r.row_end = min((r.end - 1) * kStep - lead + kExtent, height);
  return r;
}

// What an output is by definition: `sum`, and the products of a kernel's taps with those pixels of a channel that they
// meet, if these lie inside the image. `row_of` and `column_of` say where a row and a column of the kernel lie, outside
// the image if they meet nothing.
template <typename T, typename RowOf, typename ColumnOf>
__device__ float sum_of_taps(float sum, const T* pixels, int64_t row_bytes, int pixel_bytes, int height, int width,
                             const T* weight, int64_t weight_row, int64_t weight_column, int kernel_h, int kernel_w,
                             RowOf&& row_of, ColumnOf&& column_of) {
  for (int i = 0; i < kernel_h; ++i)
    for (int j = 0; j < kernel_w; ++j) {
      const int row = row_of(i), column = column_of(j);
      if (row < 0 || row >= height || column < 0 || column >= width) continue;
      const char* from =
          reinterpret_cast<const char*>(pixels) + row * row_bytes + static_cast<int64_t>(column) * pixel_bytes;
      sum = fmaf(widen(*reinterpret_cast<const T*>(from)), widen(weight[i * weight_row + j * weight_column]), sum);
    }
  return sum;
}

// Bytes, at most 16, that all channels, columns, rows and images are a multiple of, and so are they all from one to the
// next.
inline int alignment_between(const View& view, int64_t element, int64_t channels, int64_t height, int64_t width,
                             int64_t batch) {
  uint64_t all = (channels * element) | kUnit;
  if (width > 1) all |= view.stride[3] * element;
  if (height > 1) all |= view.stride[2] * element;
  if (batch > 1) all |= view.stride[0] * element;
  return static_cast<int>(all & -all);
}
// The same, if the first one begins there, too.
inline int alignment_of(const View& view, int64_t element, int64_t channels, int64_t height, int64_t width,
                        int64_t batch) {
  const uint64_t all =
      reinterpret_cast<uintptr_t>(view.data) | alignment_between(view, element, channels, height, width, batch);
  return static_cast<int>(all & -all);
}

}  // namespace
}  // namespace dwconv
