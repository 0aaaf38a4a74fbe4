// Matrix multiplications that the four warps of a warpgroup begin together, and that are under way on return. They
// exist on sm_90 alone, in code that is compiled for sm_90a.
#pragma once

#include <array>

#include "copies.cuh"
#include "device.h"

namespace dwconv {

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
constexpr bool kHasWarpgroups = true;
#else
constexpr bool kHasWarpgroups = false;
#endif
constexpr int kGroupWarps = 4, kGroupThreads = 32 * kGroupWarps;

// Of a kernel whose code is empty without warpgroups: it then takes fewer threads than it is launched with.
constexpr int launch_threads(int threads) {
  return kHasWarpgroups ? threads : 32;
}

// Whether the code at hand of such a kernel has warpgroups. It is asked once for each sort of device: all kernels are
// compiled for the same architectures.
template <typename Function>
bool has_warpgroups(Function* kernel) {
  static thread_local std::array<signed char, 256> answers{};
  const int capability = current_device().capability;
  signed char& answer = answers[capability % answers.size()];
  if (answer == 0) {
    cudaFuncAttributes attributes{};
    const bool asked = capability == 90 && cudaFuncGetAttributes(&attributes, kernel) == cudaSuccess;
    answer = asked && attributes.maxThreadsPerBlock > launch_threads(0) ? 1 : -1;
  }
  return answer > 0;
}

// A barrier of a warpgroup's threads.
__device__ inline void meet_group(int barrier) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "n"(kGroupThreads) : "memory");
}

// A number that all lanes of a warp have, as one of which the compiler knows that: what follows from it, such as where
// matrices lie, is then worked out in registers that a warp has one of, and need not be moved there.
__device__ inline uint32_t same_of_warp(uint32_t number) {
#if __CUDA_ARCH__ >= 800
  return __reduce_or_sync(~0u, number);
#else
  return number;
#endif
}

// Gives up registers of a warpgroup, all of whose threads call this.
template <int kRegisters>
__device__ void give_registers() {
  if constexpr (kHasWarpgroups) asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// Waits for others to do so, and takes them.
template <int kRegisters>
__device__ void take_registers() {
  if constexpr (kHasWarpgroups) asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// Before the first multiplication of some, and wherever a register that one reads was written since.
__device__ inline void before_multiplications() {
  if constexpr (kHasWarpgroups) asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

// Ends a group of multiplications.
__device__ inline void commit_multiplications() {
  if constexpr (kHasWarpgroups) asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// Waits for all groups but the newest `kPending`.
template <int kPending>
__device__ void wait_multiplications() {
  if constexpr (kHasWarpgroups) asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Matrices of 8 x 8 elements of 16 bits in shared memory, 128 bytes each: `below` and `beside` are the bytes from one
// to that of the next 8 rows, and to that of the next 8 columns. What multiplies may begin so many `units` of 16 bytes
// further. Either their columns follow one another, or their rows.
struct Matrices {
  uint32_t place, beside;

  __device__ Matrices(uint32_t address, int below, int beside)
      : place((address & 0x3ffff) >> 4 | static_cast<uint32_t>(below >> 4) << 16), beside(beside >> 4) {}

  __device__ uint64_t from(int units) const {
    uint64_t described;
    asm("mov.b64 %0, {%1, %2};" : "=l"(described) : "r"(place + units), "r"(beside));
    return described;
  }
};

// A matrix in rows of up to 64 elements of 16 bits, 128 bytes each, as boxes come with CU_TENSOR_MAP_SWIZZLE_128B: 16
// elements of all rows are multiplied with. Eight rows begin at a multiple of 1024 bytes.
constexpr int kBoxPitch = 128, kBoxAlignment = 8 * kBoxPitch;
__device__ inline uint64_t swizzled_rows(uint32_t address) {
  constexpr uint64_t kStep = kBoxAlignment / 16, kSwizzle = uint64_t{1} << 62;
  return address >> 4 | kStep << 16 | kStep << 32 | kSwizzle;
}

// Such a matrix the other way: its columns are multiplied with, 64 of them that lie in rows, summed over 16 rows. The
// next 64 columns are `beside` bytes further on.
__device__ inline uint64_t swizzled_columns(uint32_t address, int beside) {
  constexpr uint64_t kStep = kBoxAlignment / 16, kSwizzle = uint64_t{1} << 62;
  return address >> 4 | static_cast<uint64_t>(beside >> 4) << 16 | kStep << 32 | kSwizzle;
}

// clang-format off
#define DWCONV_TILE(j) "+f"(sum[j][0]), "+f"(sum[j][1]), "+f"(sum[j][2]), "+f"(sum[j][3])
#define DWCONV_TILES_2 DWCONV_TILE(0), DWCONV_TILE(1)
#define DWCONV_TILES_3 DWCONV_TILES_2, DWCONV_TILE(2)
#define DWCONV_TILES_4 DWCONV_TILES_3, DWCONV_TILE(3)
#define DWCONV_TILES_5 DWCONV_TILES_4, DWCONV_TILE(4)
#define DWCONV_TILES_7 DWCONV_TILES_5, DWCONV_TILE(5), DWCONV_TILE(6)
#define DWCONV_TILES_8 DWCONV_TILES_7, DWCONV_TILE(7)
#define DWCONV_TILES_9 DWCONV_TILES_8, DWCONV_TILE(8)
#define DWCONV_TILES_14 DWCONV_TILES_9, DWCONV_TILE(9), DWCONV_TILE(10), DWCONV_TILE(11), \
    DWCONV_TILE(12), DWCONV_TILE(13)
#define DWCONV_TILES_15 DWCONV_TILES_14, DWCONV_TILE(14)
#define DWCONV_TILES_16 DWCONV_TILES_15, DWCONV_TILE(15)
#define DWCONV_TILES_28 DWCONV_TILES_16, DWCONV_TILE(16), DWCONV_TILE(17), DWCONV_TILE(18), DWCONV_TILE(19), \
    DWCONV_TILE(20), DWCONV_TILE(21), DWCONV_TILE(22), DWCONV_TILE(23), DWCONV_TILE(24), DWCONV_TILE(25),       \
    DWCONV_TILE(26), DWCONV_TILE(27)
#define DWCONV_SUMS_2 "{%0, %1, %2, %3, %4, %5, %6, %7}"
#define DWCONV_SUMS_3 "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11}"
#define DWCONV_SUMS_4 "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15}"
#define DWCONV_SUMS_5 "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19}"
#define DWCONV_SUMS_7                                                                                           \
  "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, "  \
  "%23, %24, %25, %26, %27}"
#define DWCONV_SUMS_8                                                                                           \
  "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, "  \
  "%23, %24, %25, %26, %27, %28, %29, %30, %31}"
#define DWCONV_SUMS_9                                                                                           \
  "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, "  \
  "%23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35}"
#define DWCONV_SUMS_14                                                                                          \
  "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, "  \
  "%23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, "   \
  "%44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55}"
#define DWCONV_SUMS_15                                                                                          \
  "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, "  \
  "%23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, "   \
  "%44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59}"
#define DWCONV_SUMS_16                                                                                          \
  "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, "  \
  "%23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, "   \
  "%44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}"
#define DWCONV_SUMS_28                                                                                          \
  "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, "       \
  "%22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, "        \
  "%42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, "        \
  "%62, %63, %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, "        \
  "%82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, %96, %97, %98, %99, %100, %101, "      \
  "%102, %103, %104, %105, %106, %107, %108, %109, %110, %111}"
// clang-format on
#define DWCONV_MULTIPLY(tiles, columns, type, factors, by_rows)                                             \
  asm volatile("wgmma.mma_async.sync.aligned.m64n" columns "k16.f32." type "." type " " DWCONV_SUMS_##tiles \
               ", " factors ", 1, 1, 1, " by_rows ";"                                                       \
               : DWCONV_TILES_##tiles                                                                       \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b))
#define DWCONV_MULTIPLY_TILES(type)                                     \
  if constexpr (!kHasWarpgroups)                                        \
    return;                                                             \
  else if constexpr (kTiles == 2)                                       \
    DWCONV_MULTIPLY(2, "16", type, "{%8, %9, %10, %11}, %12", "0");     \
  else if constexpr (kTiles == 3)                                       \
    DWCONV_MULTIPLY(3, "24", type, "{%12, %13, %14, %15}, %16", "0");   \
  else if constexpr (kTiles == 4)                                       \
    DWCONV_MULTIPLY(4, "32", type, "{%16, %17, %18, %19}, %20", "0");   \
  else if constexpr (kTiles == 5)                                       \
    DWCONV_MULTIPLY(5, "40", type, "{%20, %21, %22, %23}, %24", "0");   \
  else if constexpr (kTiles == 7)                                       \
    DWCONV_MULTIPLY(7, "56", type, "{%28, %29, %30, %31}, %32", "0");   \
  else if constexpr (kTiles == 8)                                       \
    DWCONV_MULTIPLY(8, "64", type, "{%32, %33, %34, %35}, %36", "0");   \
  else if constexpr (kTiles == 9)                                       \
    DWCONV_MULTIPLY(9, "72", type, "{%36, %37, %38, %39}, %40", "0");   \
  else if constexpr (kTiles == 14)                                      \
    DWCONV_MULTIPLY(14, "112", type, "{%56, %57, %58, %59}, %60", "1"); \
  else if constexpr (kTiles == 28)                                      \
  DWCONV_MULTIPLY(28, "224", type, "{%112, %113, %114, %115}, %116", "0")

// sum += a * b, of 64 x 16 by 16 x 8 kTiles. A warp has 16 rows of a, in registers as `multiply` has them. Columns of b
// follow one another in memory; its rows do if there are 14 tiles.
template <int kTiles>
__device__ void multiply_together(float (&sum)[kTiles][4], const uint32_t (&a)[4], uint64_t b, __half) {
  DWCONV_MULTIPLY_TILES("f16");
}
template <int kTiles>
__device__ void multiply_together(float (&sum)[kTiles][4], const uint32_t (&a)[4], uint64_t b, __nv_bfloat16) {
  DWCONV_MULTIPLY_TILES("bf16");
}

#define DWCONV_MULTIPLY_COLUMNS(tiles, columns, type, factors)                                              \
  asm volatile("wgmma.mma_async.sync.aligned.m64n" columns "k16.f32." type "." type " " DWCONV_SUMS_##tiles \
               ", " factors ", 1, 1, 1, 1, 1;"                                                              \
               : DWCONV_TILES_##tiles                                                                       \
               : "l"(a), "l"(b))
#define DWCONV_MULTIPLY_COLUMN_TILES(type)                \
  if constexpr (!kHasWarpgroups)                          \
    return;                                               \
  else if constexpr (kTiles == 15)                        \
    DWCONV_MULTIPLY_COLUMNS(15, "120", type, "%60, %61"); \
  else if constexpr (kTiles == 16)                        \
  DWCONV_MULTIPLY_COLUMNS(16, "128", type, "%64, %65")

// The same of the columns of two matrices in shared memory: 64 of the first one, and 8 kTiles of the second.
template <int kTiles>
__device__ void multiply_columns(float (*sum)[4], uint64_t a, uint64_t b, __half) {
  DWCONV_MULTIPLY_COLUMN_TILES("f16");
}
template <int kTiles>
__device__ void multiply_columns(float (*sum)[4], uint64_t a, uint64_t b, __nv_bfloat16) {
  DWCONV_MULTIPLY_COLUMN_TILES("bf16");
}

}  // namespace dwconv
