// Sums over the images that are split among blocks. Two blocks can be a cluster (from sm_90 on), the first of which
// adds up what the other sends it; else a second kernel adds up.
#pragma once

#include <algorithm>
#include <cmath>

#include "overlap.cuh"
#include "stream.cuh"

namespace dwconv {

constexpr int kTotalsBarrier = 8 * (Barriers::kStages - 1);  // the full one of a stage that there is not

// By all threads, at the beginning. The first block's barrier expects so many bytes, of the sums of all blocks.
__device__ inline void enter_cluster(bool is_first, int barrier, int bytes) {
#if __CUDA_ARCH__ >= 900
  if (is_first && threadIdx.x == 0) {
    init_barrier(barrier, 1);
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    expect_bytes(barrier, bytes);
    arrive(barrier);
  }
  __syncwarp();
  asm volatile("barrier.cluster.arrive.relaxed.aligned;");
#endif
}

// Waits until all blocks of the cluster have begun, by all threads, before any of them sends.
__device__ inline void meet_cluster() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait.aligned;" ::: "memory");
#endif
}

// Writes to the same place in the shared memory of the first block, which waits for its barrier.
__device__ inline void send_to_first(int place, float value, int barrier) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "{\n"
      ".reg .b32 there, barrier;\n"
      "mapa.shared::cluster.u32 there, %0, 0;\n"
      "mapa.shared::cluster.u32 barrier, %2, 0;\n"
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.b32 [there], %1, [barrier];\n"
      "}" ::"r"(shared_address(place)),
      "r"(__float_as_uint(value)), "r"(shared_address(barrier))
      : "memory");
#endif
}

struct Splits {
  int count;     // of the steps that a group of blocks works through
  bool cluster;  // whether the two blocks of a group are one
};

// So many splits that the last wave of blocks is full, and that no sum is so long that it loses digits.
inline int splits_for(int64_t groups, int64_t steps, int64_t slots) {
  constexpr int64_t kLongest = 64;  // steps
  int best = 1;
  double least = INFINITY;
  for (int64_t splits = ceil_div(steps, kLongest); splits <= std::min<int64_t>(steps, 1 << 16); ++splits) {
    const double cost =
        static_cast<double>(ceil_div(groups * splits, slots)) * (static_cast<double>(ceil_div(steps, splits)) + 1.);
    if (cost < least * 0.98) least = cost, best = static_cast<int>(splits);
    if (groups * splits > 8 * slots) break;
  }
  return best;
}

// `bytes`: shared memory of a block. `totals`: what a block of a cluster of two needs beside it, 0 if there are to be
// none. Clusters must not leave room for fewer blocks.
template <typename Parameter>
Splits split_steps(void (*kernel)(Parameter), const Device& device, int64_t steps, int64_t groups, int threads,
                   int64_t bytes, int64_t totals) {
  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, device.shared_per_block);
  const auto resident = [&](int64_t shared) {
    int blocks = 0;
    cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, threads, shared);
    return blocks;
  };
  const int blocks = std::max(resident(bytes), 1);
  const int count = splits_for(groups, steps, int64_t{blocks} * device.multiprocessors);
  const bool cluster = totals > 0 && count == 2 && can_overlap(kernel) && bytes + totals <= device.shared_per_block &&
                       resident(bytes + totals) >= blocks;
  return {count, cluster};
}

}  // namespace dwconv
