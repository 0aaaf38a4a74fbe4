// The second step of every grad_weight: adds up the sums that were taken over parts of the images.
#pragma once

#include "common.cuh"
#include "overlap.cuh"

namespace dwconv {

constexpr int kSumsPerBlock = 32, kSumLanes = 8;

// `partial` lies as [split][tap, or bias behind the last tap][filter]. The order of a sum is always the same.
template <typename T>
__global__ void __launch_bounds__(kSumsPerBlock* kSumLanes)
    add_partial_sums(const Accumulator<T>* __restrict__ partial, T* __restrict__ grad_weight, T* __restrict__ grad_bias,
                     int64_t filters, int64_t taps, int64_t splits) {
  __shared__ double shared[kSumLanes][kSumsPerBlock];
  let_next_kernel_start();
  const int64_t sums = (taps + (grad_bias != nullptr)) * filters;
  const int column = threadIdx.x % kSumsPerBlock, lane = threadIdx.x / kSumsPerBlock;
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kSumsPerBlock + column;
  wait_for_kernel_before();
  double total = 0;  // a long sum, of which there are few
  if (index < sums)
#pragma unroll 4
    for (int64_t split = lane; split < splits; split += kSumLanes) total += partial[split * sums + index];
  shared[lane][column] = total;
  __syncthreads();
  if (lane > 0 || index >= sums) return;
  for (int i = 1; i < kSumLanes; ++i) total += shared[i][column];
  const int64_t slot = index / filters, filter = index % filters;
  T* to = slot < taps ? grad_weight + filter * taps + slot : grad_bias + filter;
  *to = narrow<T>(static_cast<Accumulator<T>>(total));
}

template <typename T>
bool waits_for_kernel_before() {
  return waits_for_kernel_before(add_partial_sums<T>);
}

// Launches it behind the kernel that writes the partial sums; `early`: its blocks start beside that kernel's last ones.
template <typename T>
void launch_add_partial_sums(const Problem& p, const Accumulator<T>* partial, int64_t splits, bool early,
                             cudaStream_t stream) {
  const int64_t sums = (p.taps() + (p.bias != nullptr)) * p.filters();
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = static_cast<unsigned>(ceil_div(sums, kSumsPerBlock));
  config.blockDim = kSumsPerBlock * kSumLanes;
  config.stream = stream;
  config.attrs = &attribute, config.numAttrs = early ? 1 : 0;
  cudaLaunchKernelEx(&config, add_partial_sums<T>, partial, static_cast<T*>(p.weight.data), static_cast<T*>(p.bias),
                     p.filters(), p.taps(), splits);
  check_launch("add_partial_sums");
}

}  // namespace dwconv
