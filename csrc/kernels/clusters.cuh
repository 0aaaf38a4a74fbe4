// Clusters of blocks that read each other's shared memory (from sm_90 on).
#pragma once

#include "copies.cuh"

namespace dwconv {

constexpr int kPortableCluster = 8;  // blocks that any GPU has room for; some have it for 16

// Which cluster a block is of, and its number there. A block without one is a cluster.
__device__ inline int cluster_number() {
  int number = blockIdx.x;
#if __CUDA_ARCH__ >= 900
  asm volatile("mov.u32 %0, %%clusterid.x;" : "=r"(number));
#endif
  return number;
}
__device__ inline int rank_in_cluster() {
  int rank = 0;
#if __CUDA_ARCH__ >= 900
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
#endif
  return rank;
}

// Meets all threads of the cluster; what they wrote to shared memory is there.
__device__ inline void meet_in_cluster() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}

// What a block of the cluster has at an offset in shared memory.
__device__ inline float read_in_cluster(int block, int offset) {
  float value = 0;
#if __CUDA_ARCH__ >= 900
  asm volatile("{\n.reg .b32 there;\nmapa.shared::cluster.u32 there, %1, %2;\nld.shared::cluster.f32 %0, [there];\n}"
               : "=f"(value)
               : "r"(shared_address(offset)), "r"(block)
               : "memory");
#endif
  return value;
}

// Whether so many clusters of so many blocks run at once. More than are portable have to be allowed for the kernel.
template <typename Parameter>
bool fits_clusters(void (*kernel)(Parameter), int64_t clusters, int blocks, int threads, int64_t shared_bytes) {
  if (blocks > kPortableCluster &&
      cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1) != cudaSuccess)
    return false;
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {static_cast<unsigned>(blocks), 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = static_cast<unsigned>(clusters * blocks);
  config.blockDim = static_cast<unsigned>(threads);
  config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
  config.attrs = &attribute, config.numAttrs = 1;
  int most = 0;
  const bool known = cudaOccupancyMaxActiveClusters(&most, kernel, &config) == cudaSuccess;
  if (!known) cudaGetLastError();  // no error of the launch to come
  return known && most >= clusters;
}

}  // namespace dwconv
