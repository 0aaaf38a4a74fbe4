// grad_weight (and the bias gradient) of small kernels, straight from memory, for problems with few gradients a filter,
// where latency is all that counts: a block sums all taps of one filter, with one load of everything in flight, and
// writes them; there is nothing to add up behind it.
//
// Only taps that meet the image are multiplied: a gradient that is Inf or NaN does not meet the padding.
#include "common.cuh"
#include "launch.h"
#include "small_kernels.h"

namespace dwconv {
namespace {

constexpr int kThreads = 128;

struct Arguments {
  const void* input;
  const void* grad;
  void* grad_weight;
  void* grad_bias;
  int input_stride[4], grad_stride[4];  // in elements
  int height, width, padding_h, padding_w, multiplier;
  int gradients;  // of a filter, in all images
  Divider by_rows, by_columns;
};

template <typename T, class Kernel>
__global__ void __launch_bounds__(kThreads) direct_grad_weight(const __grid_constant__ Arguments a) {
  constexpr int kKernelH = Kernel::kKernelH, kKernelW = Kernel::kKernelW, kTaps = kKernelH * kKernelW;
  const int filter = blockIdx.x;
  const T* input = static_cast<const T*>(a.input) + filter / a.multiplier * a.input_stride[1];
  const T* grad = static_cast<const T*>(a.grad) + filter * a.grad_stride[1];

  float sum[kTaps + 1] = {};  // the last one is the bias
  for (int at = threadIdx.x; at < a.gradients; at += kThreads) {
    uint32_t image = at;
    const int column = a.by_columns.split(image), row = a.by_rows.split(image);
    const float g =
        widen(grad[static_cast<int>(image) * a.grad_stride[0] + row * a.grad_stride[2] + column * a.grad_stride[3]]);
    const T* source = input + static_cast<int>(image) * a.input_stride[0];
    sum[kTaps] += g;
#pragma unroll
    for (int i = 0; i < kKernelH; ++i)
#pragma unroll
      for (int j = 0; j < kKernelW; ++j) {
        const int y = row * Kernel::kStride - a.padding_h + i * Kernel::kDilation;
        const int x = column * Kernel::kStride - a.padding_w + j * Kernel::kDilation;
        if (static_cast<uint32_t>(y) < static_cast<uint32_t>(a.height) &&
            static_cast<uint32_t>(x) < static_cast<uint32_t>(a.width))
          sum[i * kKernelW + j] =
              fmaf(g, widen(source[y * a.input_stride[2] + x * a.input_stride[3]]), sum[i * kKernelW + j]);
      }
  }

  __shared__ float sums[kTaps + 1][kThreads / 32];
#pragma unroll
  for (int t = 0; t <= kTaps; ++t) {
    for (int offset = 16; offset > 0; offset /= 2) sum[t] += __shfl_xor_sync(~0u, sum[t], offset);
    if (threadIdx.x % 32 == 0) sums[t][threadIdx.x / 32] = sum[t];
  }
  __syncthreads();
  if (threadIdx.x > kTaps) return;
  float total = 0;
  for (int warp = 0; warp < kThreads / 32; ++warp) total += sums[threadIdx.x][warp];
  if (threadIdx.x < kTaps)
    static_cast<T*>(a.grad_weight)[filter * kTaps + threadIdx.x] = narrow<T>(total);
  else if (a.grad_bias)
    static_cast<T*>(a.grad_bias)[filter] = narrow<T>(total);
}

}  // namespace

void launch_direct_grad_weight(const Problem& p, cudaStream_t stream) {
  Arguments a{};
  a.input = p.input.data, a.grad = p.output.data, a.grad_weight = p.weight.data, a.grad_bias = p.bias;
  for (int d = 0; d < 4; ++d)
    a.input_stride[d] = static_cast<int>(p.input.stride[d]), a.grad_stride[d] = static_cast<int>(p.output.stride[d]);
  a.height = static_cast<int>(p.height), a.width = static_cast<int>(p.width);
  a.padding_h = static_cast<int>(p.padding_h), a.padding_w = static_cast<int>(p.padding_w);
  a.multiplier = static_cast<int>(p.multiplier);
  a.gradients = static_cast<int>(p.batch * p.out_height * p.out_width);
  a.by_rows = Divider(p.out_height), a.by_columns = Divider(p.out_width);
  visit_dtype(p.dtype, [&](auto zero) {
    using T = decltype(zero);
    if constexpr (sizeof(T) <= 4)
      visit_small_kernel(p, [&](auto kernel) {
        direct_grad_weight<T, decltype(kernel)><<<static_cast<unsigned>(p.filters()), kThreads, 0, stream>>>(a);
      });
  });
  check_launch("direct_grad_weight");
}

}  // namespace dwconv
