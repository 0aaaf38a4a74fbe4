// Clusters of blocks (from sm_90 on) whose first block adds up what the others send it.
#pragma once

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

}  // namespace dwconv
