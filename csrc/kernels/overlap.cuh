// Kernels that start while the kernel before them still runs (programmatic dependent launch, from sm_90 on).
#pragma once

#include <array>

#include "common.cuh"
#include "device.h"

namespace dwconv {

// Called by the kernel before: the blocks of the next one may take their places as soon as no block of its own is
// waiting.
__device__ inline void let_next_kernel_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}

// Waits until the kernel before is done, and what it wrote is there.
__device__ inline void wait_for_kernel_before() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Waits as well, and everything that comes before in the code is done before: a compiler puts what takes no memory
// behind the wait, but not behind a loop. `not_negative`: a number that it does not know.
__device__ inline void settle_and_wait_for_kernel_before(int not_negative) {
  do wait_for_kernel_before();
  while (not_negative < 0);
}

// Whether the code at hand waits for the kernel before: it may be of an architecture before the device's.
template <typename Function>
bool waits_for_kernel_before(Function* kernel) {
  cudaFuncAttributes attributes{};
  return cudaFuncGetAttributes(&attributes, kernel) == cudaSuccess && attributes.ptxVersion >= 90;
}

// The same, asked once for each sort of device: all kernels are compiled for the same architectures.
template <typename Function>
bool can_overlap(Function* kernel) {
  static thread_local std::array<signed char, 256> answers{};
  const int capability = current_device().capability;
  signed char& answer = answers[capability % answers.size()];
  if (answer == 0) answer = capability >= 90 && waits_for_kernel_before(kernel) ? 1 : -1;
  return answer > 0;
}

struct EarlyLaunch {
  int cluster = 1;  // blocks of a cluster, where there are clusters
  int64_t shared_bytes = 0;
};

// Launches a kernel that waits for the kernel before: early, where the device can do that.
template <typename Parameter>
void launch_early(void (*kernel)(Parameter), const Parameter& parameter, int64_t blocks, int threads,
                  cudaStream_t stream, const EarlyLaunch& more = {}) {
  cudaLaunchAttribute attributes[2]{};
  attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[0].val.programmaticStreamSerializationAllowed = 1;
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim = {static_cast<unsigned>(more.cluster), 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = static_cast<unsigned>(blocks);
  config.blockDim = static_cast<unsigned>(threads);
  config.dynamicSmemBytes = static_cast<size_t>(more.shared_bytes);
  config.stream = stream;
  config.attrs = attributes, config.numAttrs = !can_overlap(kernel) ? 0 : more.cluster == 1 ? 1 : 2;
  cudaLaunchKernelEx(&config, kernel, parameter);
}

}  // namespace dwconv
