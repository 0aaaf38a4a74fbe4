// A kernel that starts beside the last blocks of the one before (programmatic dependent launch, sm_90 and later).
#pragma once

#include <cuda_runtime.h>

namespace dwconv {

// Called by the kernel before: the next one's blocks may take their places as soon as no block of its own is waiting.
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

// Whether the code at hand waits for the kernel before: it may be of an architecture before the device's.
template <typename Kernel>
bool waits_for_kernel_before(Kernel kernel) {
  cudaFuncAttributes attributes{};
  return cudaFuncGetAttributes(&attributes, kernel) == cudaSuccess && attributes.ptxVersion >= 90;
}

}  // namespace dwconv
