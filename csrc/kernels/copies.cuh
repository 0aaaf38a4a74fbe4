// Shared memory, and copies to it that are under way while threads compute: bulk copies on sm_90 and later, cp.async on
// sm_80 and later, plain loads before.
#pragma once

#include <type_traits>

#include "common.cuh"
#include "stream.h"

namespace dwconv {

// All of a block's shared memory. Places in it are offsets in bytes.
extern __shared__ __align__(128) char shared_memory[];

template <typename T>
__device__ T& shared(int offset) {
  return *reinterpret_cast<T*>(shared_memory + offset);
}

__device__ inline uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}
__device__ inline uint32_t shared_address(int offset) {
  return shared_address(shared_memory + offset);
}

// Where shared memory begins, as a number that a compiler does not know. What it knows it asks a special register for
// anew wherever registers are few, and each time waits some 40 cycles.
__device__ inline uint32_t kept_shared_address() {
  const uint32_t lane = threadIdx.x % 32;
  return __shfl_sync(~0u, shared_address(0) + lane, 0);
}

// What is at an address in shared memory.
template <typename T>
__device__ T& shared_at(uint32_t address) {
  return *static_cast<T*>(__cvta_shared_to_generic(address));
}

// A barrier like __syncthreads(), which is number 0, for so many threads, in whole warps, wherever they come to it.
template <int kNumber>
__device__ void meet(int threads) {
  static_assert(kNumber > 0 && kNumber < 16);
  asm volatile("bar.sync %0, %1;" ::"n"(kNumber), "r"(threads) : "memory");
}

// The same for threads that only let the others go on.
template <int kNumber>
__device__ void let_meet(int threads) {
  static_assert(kNumber > 0 && kNumber < 16);
  asm volatile("bar.arrive %0, %1;" ::"n"(kNumber), "r"(threads) : "memory");
}

// Barriers, of 8 bytes each: on sm_80 and later.
__device__ inline void init_barrier(int barrier, int arrivals) {
#if __CUDA_ARCH__ >= 800
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
#endif
}

// By its address.
__device__ inline void arrive_at(uint32_t barrier) {
#if __CUDA_ARCH__ >= 800
  asm volatile("{\n.reg .b64 state;\nmbarrier.arrive.shared.b64 state, [%0];\n}" ::"r"(barrier) : "memory");
#endif
}
__device__ inline void arrive(int barrier) {
  arrive_at(shared_address(barrier));
}

// How often a warp arrives whose lanes arrive together. Once is enough, but racecheck of compute-sanitizer knows of the
// threads that arrive alone: in what is built for it (DWCONV_RACECHECK) all lanes do.
#ifdef DWCONV_RACECHECK
constexpr int kWarpArrivals = 32;
#else
constexpr int kWarpArrivals = 1;
#endif

// By all lanes, one of which is the first; whether they arrive at all is up to the caller.
__device__ inline void arrive_together_at(uint32_t barrier, bool is_first, bool arrives = true) {
  __syncwarp();
  if (arrives && (kWarpArrivals > 1 || is_first)) arrive_at(barrier);
}
__device__ inline void arrive_together(int barrier, bool is_first, bool arrives = true) {
  arrive_together_at(shared_address(barrier), is_first, arrives);
}

// Arrives when all copies by cp.async that the thread has begun are there.
__device__ inline void arrive_after_copies_at(uint32_t barrier) {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(barrier) : "memory");
#endif
}
__device__ inline void arrive_after_copies(int barrier) {
  arrive_after_copies_at(shared_address(barrier));
}

__device__ inline void wait_at(uint32_t barrier, uint32_t parity) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "retry:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra retry;\n"
      "}" ::"r"(barrier),
      "r"(parity)
      : "memory");
#elif __CUDA_ARCH__ >= 800
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "retry:\n"
      "mbarrier.test_wait.parity.shared.b64 done, [%0], %1;\n"
      "@!done bra retry;\n"
      "}" ::"r"(barrier),
      "r"(parity)
      : "memory");
#endif
}
__device__ inline void wait(int barrier, uint32_t parity) {
  wait_at(shared_address(barrier), parity);
}

// Makes what was written to shared memory, and barriers, precede bulk copies, with a barrier behind.
__device__ inline void before_bulk_copies() {
#if __CUDA_ARCH__ >= 900
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

// Makes a barrier wait for so many bytes more.
__device__ inline void expect_bytes(int barrier, int bytes) {
#if __CUDA_ARCH__ >= 900
  asm volatile("mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
#endif
}

// True for one thread of a warp, all of which ask. ptxas then knows that it is one, and makes no loop over the threads
// of each bulk copy.
__device__ inline bool is_elected() {
#if __CUDA_ARCH__ >= 900
  uint32_t elected = 0;
  asm volatile(
      "{\n"
      ".reg .pred one;\n"
      "elect.sync _|one, 0xffffffff;\n"
      "@one mov.b32 %0, 1;\n"
      "}"
      : "+r"(elected));
  return elected != 0;
#else
  return threadIdx.x % 32 == 0;
#endif
}

// Begins a bulk copy, which a barrier expects; both addresses and `bytes` are multiples of 16.
__device__ inline void copy_bulk(uint32_t to, const void* from, int bytes, int barrier) {
#if __CUDA_ARCH__ >= 900
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
               "l"(from), "r"(bytes), "r"(shared_address(barrier))
               : "memory");
#endif
}

// Begins a bulk copy from shared memory, likewise. Those that a thread has committed it can wait for, until they have
// read their bytes.
__device__ inline void store_bulk(void* to, uint32_t from, int bytes) {
#if __CUDA_ARCH__ >= 900
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(to), "r"(from), "r"(bytes)
               : "memory");
#endif
}

__device__ inline void commit_stores() {
#if __CUDA_ARCH__ >= 900
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
#endif
}

__device__ inline void wait_stores() {
#if __CUDA_ARCH__ >= 900
  asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
#endif
}

// The same for all but the last ones.
__device__ inline void wait_stores_but_one() {
#if __CUDA_ARCH__ >= 900
  asm volatile("cp.async.bulk.wait_group.read 1;" ::: "memory");
#endif
}

// Copies one unit: under way on return where there is cp.async, but for units of 2 bytes.
template <int kBytes>
__device__ void copy_unit(uint32_t to, const void* from) {
#if __CUDA_ARCH__ >= 800
  constexpr bool kAsync = kBytes >= 4;
#else
  constexpr bool kAsync = false;
#endif
  if constexpr (kAsync && kBytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
  } else if constexpr (kAsync) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(to), "l"(from), "n"(kBytes) : "memory");
  } else {
    using Word =
        std::conditional_t<kBytes == 16, uint4,
                           std::conditional_t<kBytes == 8, uint2, std::conditional_t<kBytes == 4, uint32_t, uint16_t>>>;
    *static_cast<Word*>(__cvta_shared_to_generic(to)) = *static_cast<const Word*>(from);
  }
}

// Copies `bytes`, a multiple of 16, by so many warps, of which this is number `warp`. Both addresses are multiples
// of 16. A lane copies several units at a time, as far from each other whatever the number of warps: then each is one
// instruction, and no address is worked out for it. Before sm_80 they pass through registers.
__device__ inline void copy_by_warps(uint32_t to, const char* from, int bytes, int warp, int warps) {
#if __CUDA_ARCH__ >= 800
  constexpr int kTogether = 8;
#else
  constexpr int kTogether = 4;
#endif
  constexpr int kStep = 32 * kUnit;
#pragma unroll 1
  for (int at = warp * kTogether * kStep + static_cast<int>(threadIdx.x % 32) * kUnit; at < bytes;
       at += warps * kTogether * kStep) {
    const uint32_t first = to + at;
    const char* const its = from + at;
    const int left = bytes - at;
#if __CUDA_ARCH__ >= 800
#pragma unroll
    for (int k = 0; k < kTogether; ++k)
      if (k * kStep < left) copy_unit<kUnit>(first + k * kStep, its + k * kStep);
#else
    uint4 units[kTogether];
#pragma unroll
    for (int k = 0; k < kTogether; ++k)
      if (k * kStep < left) units[k] = *reinterpret_cast<const uint4*>(its + k * kStep);
#pragma unroll
    for (int k = 0; k < kTogether; ++k)
      if (k * kStep < left) shared_at<uint4>(first + k * kStep) = units[k];
#endif
  }
}

// Copies `size` bytes of the array [begin, end) in units of 16, by `threads` threads of which this is number `rank`.
// Both addresses are multiples of 16. What lies outside the array is not touched, and becomes zeros.
__device__ inline void copy_run(int to, const char* from, int size, const char* begin, const char* end, int rank,
                                int threads) {
#pragma unroll 1
  for (int i = rank * kUnit; i < size; i += threads * kUnit) {
    const char* unit = from + i;
    if (unit >= begin && unit + kUnit <= end)
      copy_unit<kUnit>(shared_address(to + i), unit);
    else
      for (int j = 0; j < kUnit; j += 2) {
        const bool inside = unit + j >= begin && unit + j < end;
        shared<uint16_t>(to + i + j) = inside ? *reinterpret_cast<const uint16_t*>(unit + j) : uint16_t{0};
      }
  }
}

// Ends a group of copies by cp.async.
__device__ inline void commit_copies() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits for all groups but the newest `kPending`.
template <int kPending>
__device__ void wait_copies() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
#endif
}

}  // namespace dwconv
