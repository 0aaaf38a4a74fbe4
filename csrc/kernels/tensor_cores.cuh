// Matrix multiplications by tensor cores, sums in float32. They exist from sm_80 on.
#pragma once

#include "common.cuh"

namespace dwconv {

// Four 8 x 8 matrices of 16-bit elements from shared memory: lane l names row l % 8 of matrix l / 8, 16 bytes each.
__device__ inline void load_matrices(uint32_t (&a)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(a[0]), "=r"(a[1]), "=r"(a[2]), "=r"(a[3])
               : "r"(address)
               : "memory");
}

__device__ inline void load_matrices_transposed(uint32_t (&a)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(a[0]), "=r"(a[1]), "=r"(a[2]), "=r"(a[3])
               : "r"(address)
               : "memory");
}

// Two of them, by what lanes 0 to 15 name.
__device__ inline void load_two_transposed(uint32_t& first, uint32_t& second, uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0,%1}, [%2];"
               : "=r"(first), "=r"(second)
               : "r"(address)
               : "memory");
}

// What load_matrices loads, the other way.
__device__ inline void store_matrices(uint32_t address, const uint32_t (&a)[4]) {
#if __CUDA_ARCH__ >= 900
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1,%2,%3,%4};" ::"r"(address), "r"(a[0]), "r"(a[1]),
               "r"(a[2]), "r"(a[3])
               : "memory");
#else
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint32_t row = __shfl_sync(~0u, address, i * 8 + lane / 4);
    asm volatile("st.shared.b32 [%0], %1;" ::"r"(row + lane % 4 * 4), "r"(a[i]) : "memory");
  }
#endif
}

// sum = before + a * b, of 16 x 16 by 16 x 8.
__device__ inline void multiply(float (&sum)[4], const float (&before)[4], const uint32_t (&a)[4],
                                const uint32_t (&b)[2], __half) {
#if __CUDA_ARCH__ >= 800
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%11,%12,%13};"
      : "=f"(sum[0]), "=f"(sum[1]), "=f"(sum[2]), "=f"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "f"(before[0]), "f"(before[1]),
        "f"(before[2]), "f"(before[3]));
#endif
}

__device__ inline void multiply(float (&sum)[4], const float (&before)[4], const uint32_t (&a)[4],
                                const uint32_t (&b)[2], __nv_bfloat16) {
#if __CUDA_ARCH__ >= 800
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%11,%12,%13};"
      : "=f"(sum[0]), "=f"(sum[1]), "=f"(sum[2]), "=f"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "f"(before[0]), "f"(before[1]),
        "f"(before[2]), "f"(before[3]));
#endif
}

// The same of 16 x 8 by 8 x 8.
__device__ inline void multiply(float (&sum)[4], const float (&before)[4], const uint32_t (&a)[2], uint32_t b, __half) {
#if __CUDA_ARCH__ >= 800
  asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%7,%8,%9,%10};"
      : "=f"(sum[0]), "=f"(sum[1]), "=f"(sum[2]), "=f"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(b), "f"(before[0]), "f"(before[1]), "f"(before[2]), "f"(before[3]));
#endif
}

__device__ inline void multiply(float (&sum)[4], const float (&before)[4], const uint32_t (&a)[2], uint32_t b,
                                __nv_bfloat16) {
#if __CUDA_ARCH__ >= 800
  asm("mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%7,%8,%9,%10};"
      : "=f"(sum[0]), "=f"(sum[1]), "=f"(sum[2]), "=f"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(b), "f"(before[0]), "f"(before[1]), "f"(before[2]), "f"(before[3]));
#endif
}

__device__ inline void multiply(float (&sum)[4], const uint32_t (&a)[2], uint32_t b, __half) {
#if __CUDA_ARCH__ >= 800
  asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(b));
#endif
}

__device__ inline void multiply(float (&sum)[4], const uint32_t (&a)[2], uint32_t b, __nv_bfloat16) {
#if __CUDA_ARCH__ >= 800
  asm("mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(b));
#endif
}

// Adds both values times zero to a word that is zero at first: it stays so if all of them are finite.
__device__ inline void add_zeros(uint32_t& zero, __half2 values) {
#if __CUDA_ARCH__ >= 800
  asm("fma.rn.f16x2 %0, %1, %2, %0;" : "+r"(zero) : "r"(*reinterpret_cast<const uint32_t*>(&values)), "r"(0));
#endif
}

__device__ inline void add_zeros(uint32_t& zero, __nv_bfloat162 values) {
#if __CUDA_ARCH__ >= 800
  asm("fma.rn.bf16x2 %0, %1, %2, %0;" : "+r"(zero) : "r"(*reinterpret_cast<const uint32_t*>(&values)), "r"(0));
#endif
}

}  // namespace dwconv
