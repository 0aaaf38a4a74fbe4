// What claims ask about a problem, in words.
#pragma once

#include <algorithm>
#include <cstdint>

#include "problem.h"

namespace dwconv {

// ---- numbers

inline bool is_16_bit(const Problem& p) {
  return size_of(p.dtype) == 2;
}

// Whether products can go to tensor cores: sums of 16-bit numbers in float32.
inline bool has_tensor_cores(const Problem& p) {
  return is_16_bit(p) && p.capability >= 80;
}

// ---- the kernel

inline bool has_unit_stride(const Problem& p) {
  return p.stride_h == 1 && p.stride_w == 1;
}

inline bool has_unit_dilation(const Problem& p) {
  return p.dilation_h == 1 && p.dilation_w == 1;
}

// Neither stride nor dilation.
inline bool has_unit_steps(const Problem& p) {
  return has_unit_stride(p) && has_unit_dilation(p);
}

// Rows and columns that the kernel spans, with what dilation puts between its taps.
inline int64_t extent_h(const Problem& p) {
  return (p.kernel_h - 1) * p.dilation_h + 1;
}
inline int64_t extent_w(const Problem& p) {
  return (p.kernel_w - 1) * p.dilation_w + 1;
}

// Whether the kernel, wherever it lies, covers a row and a column of the image: no output is of padding alone.
inline bool pads_within_kernel(const Problem& p) {
  return p.padding_h < extent_h(p) && p.padding_w < extent_w(p);
}

// From a side of 8 on nothing is compiled for one size of kernel; SmallKernels has exceptions.
inline bool is_large_kernel(const Problem& p) {
  return std::max(p.kernel_h, p.kernel_w) >= 8;
}

// ---- the two images: the target is the one that is written, the source the one that is read; of grad_weight, which
// reads both, the target is the output's gradient

inline const View& target_of(const Problem& p) {
  return p.pass == Pass::kGradInput ? p.input : p.output;
}

inline int64_t source_height(const Problem& p) {
  return p.pass == Pass::kGradInput ? p.out_height : p.height;
}
inline int64_t source_width(const Problem& p) {
  return p.pass == Pass::kGradInput ? p.out_width : p.width;
}

inline int64_t target_height(const Problem& p) {
  return p.pass == Pass::kGradInput ? p.height : p.out_height;
}
inline int64_t target_width(const Problem& p) {
  return p.pass == Pass::kGradInput ? p.width : p.out_width;
}

inline int64_t target_channels(const Problem& p) {
  return p.pass == Pass::kGradInput ? p.channels : p.filters();
}

inline bool writes_channels_last(const Problem& p) {
  return p.channels > 1 && target_of(p).stride[1] == 1;
}

// Sums that forward or grad_input make over one filter's taps each.
inline int64_t sums_over_taps(const Problem& p) {
  return p.batch * p.filters() * target_height(p) * target_width(p);
}

// Gradients that grad_weight sums for each tap.
inline int64_t gradients_per_filter(const Problem& p) {
  return p.batch * p.out_height * p.out_width;
}

// Products of a tap and a pixel of the image, along one side of a plane.
inline double products_of_side(int64_t size, int64_t out_size, int64_t kernel, int64_t stride, int64_t padding,
                               int64_t dilation) {
  const auto over_stride = [&](int64_t n) { return stride == 1 ? n : (n + stride - 1) / stride; };
  int64_t sum = 0;
  for (int64_t tap = 0, room = padding; tap < kernel; ++tap, room -= dilation) {  // pixels before the first output's
    const int64_t begin = room > 0 ? over_stride(room) : 0;
    const int64_t end = size + room > 0 ? std::min(over_stride(size + room), out_size) : 0;
    sum += std::max<int64_t>(end - begin, 0);
  }
  return static_cast<double>(sum);
}

// Those of a plane, and of all planes.
inline double products_of_plane(const Problem& p) {
  return products_of_side(p.height, p.out_height, p.kernel_h, p.stride_h, p.padding_h, p.dilation_h) *
         products_of_side(p.width, p.out_width, p.kernel_w, p.stride_w, p.padding_w, p.dilation_w);
}
inline double products(const Problem& p) {
  return static_cast<double>(p.batch) * static_cast<double>(p.filters()) * products_of_plane(p);
}

// ---- how arrays lie in memory

// Whether both arrays have columns side by side.
inline bool have_rows(const Problem& p) {
  return has_rows(p.input, p.width) && has_rows(p.output, p.out_width);
}

// Whether kernels that want rows can have them: as they are, or from channels that lie side by side, by a copy.
inline bool can_have_rows(const Problem& p) {
  const auto can = [](const View& view, int64_t channels, int64_t width) {
    return has_rows(view, width) || view.stride[1] == 1 || channels == 1;
  };
  return can(p.input, p.channels, p.width) && can(p.output, p.filters(), p.out_width);
}

// Where an array's first element lies, from one multiple of `bytes` to the next.
inline uintptr_t offset_within(int64_t bytes, const View& view) {
  return reinterpret_cast<uintptr_t>(view.data) % static_cast<uintptr_t>(bytes);
}

}  // namespace dwconv
