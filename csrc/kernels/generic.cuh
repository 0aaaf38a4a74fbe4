// What generic.cu and generic_grad_weight.cu share: sizes, and the width of indices.
#pragma once

#include <algorithm>
#include <limits>

#include "common.cuh"
#include "launch.h"

namespace dwconv {

// Problem with the integer type of the index arithmetic: 64 bits cost two to three times the instructions.
template <typename Index>
struct Sizes {
  Index batch, channels, multiplier, filters, height, width, out_height, out_width, kernel_h, kernel_w;
  Index stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w;
  Index input[4], weight[4], output[4], bias;  // strides, in elements

  explicit Sizes(const Problem& p)
      : batch(p.batch),
        channels(p.channels),
        multiplier(p.multiplier),
        filters(p.filters()),
        height(p.height),
        width(p.width),
        out_height(p.out_height),
        out_width(p.out_width),
        kernel_h(p.kernel_h),
        kernel_w(p.kernel_w),
        stride_h(p.stride_h),
        stride_w(p.stride_w),
        padding_h(p.padding_h),
        padding_w(p.padding_w),
        dilation_h(p.dilation_h),
        dilation_w(p.dilation_w),
        bias(p.bias_stride) {
    for (int i = 0; i < 4; ++i)
      input[i] = p.input.stride[i], weight[i] = p.weight.stride[i], output[i] = p.output.stride[i];
  }
};

inline bool is_channels_last(const View& view, int64_t channels) {
  return channels > 1 && view.stride[1] == 1;
}

// Returns value % size and leaves value / size in `value`.
template <typename Index>
__device__ Index split(Index& value, Index size) {
  const Index quotient = value / size;
  const Index remainder = value - quotient * size;
  value = quotient;
  return remainder;
}

// Blocks of so many threads.
inline unsigned blocks_for(int64_t threads, int block) {
  const int64_t blocks = ceil_div(threads, block);
  if (blocks > std::numeric_limits<int32_t>::max())
    throw std::runtime_error("dwconv: the tensors are too large for one kernel launch");
  return static_cast<unsigned>(blocks);
}

// Whether every offset and every row or column number, also those before and behind the image, fits 31 bits, and so
// does `most`. `rows`: that a thread owns.
inline bool fits_32_bits(const Problem& p, int64_t rows, int64_t most) {
  const auto extent = [](const View& view, int64_t n, int64_t c, int64_t h, int64_t w) {
    return std::max<int64_t>(n - 1, 0) * view.stride[0] + (c - 1) * view.stride[1] + (h - 1) * view.stride[2] +
           (w - 1) * view.stride[3];
  };
  const int64_t reach_h = p.height + 2 * p.padding_h + (rows + 1) * (p.stride_h + p.dilation_h) * rows;
  const int64_t reach_w = p.width + 2 * p.padding_w + 2 * (p.stride_w + p.dilation_w);
  const int64_t positions = p.batch * std::max(p.filters() * (p.out_height + rows) * p.out_width,
                                               p.channels * (p.height + rows * p.stride_h) * p.width);
  constexpr int64_t kLimit = std::numeric_limits<int32_t>::max() / 2;
  return std::max({extent(p.input, p.batch, p.channels, p.height, p.width),
                   extent(p.output, p.batch, p.filters(), p.out_height, p.out_width),
                   extent(p.weight, p.filters(), 1, p.kernel_h, p.kernel_w), p.filters() * p.bias_stride, reach_h,
                   reach_w, positions, most}) < kLimit;
}

void launch_generic_grad_weight(const Problem& problem, const Allocate& allocate, cudaStream_t stream);

}  // namespace dwconv
