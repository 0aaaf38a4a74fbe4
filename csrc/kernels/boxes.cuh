// Boxes of arrays of four dimensions, such as some channels of some neighbouring pixels of a row of a channels_last
// one, which one instruction copies to shared memory, with zeros for what is outside of the array, or from there. From
// sm_90 on.
#pragma once

#include <cuda.h>

#include <algorithm>
#include <array>

#include "copies.cuh"

namespace dwconv {

constexpr int kMostBoxSide = 256;  // channels, or pixels
constexpr int kBoxUnit = 128;      // where a box begins in shared memory is a multiple of

// Whether boxes can be described of an array (N, height, width, channels) whose channels lie side by side, of which
// all of `alignment` is a multiple: its address, the bytes of a pixel, and the steps to the next pixel, row and image.
inline bool has_boxes(const View& view, int64_t element, int64_t alignment) {
  constexpr int64_t kFar = int64_t{1} << 40;
  const auto [least, most] = std::minmax({view.stride[0], view.stride[2], view.stride[3]});
  return alignment % kUnit == 0 && least > 0 && most * element < kFar;
}

// Describes boxes of an array of four dimensions, of which elements of the first one lie side by side. `strides`: the
// bytes from one to the next in the others. `swizzle`: how units of 16 bytes are exchanged in shared memory. Returns
// whether there can be such boxes; CUDA is not asked what it would call an error.
inline bool describe_boxes(CUtensorMap& map, void* data, int64_t element, const std::array<int64_t, 4>& sizes,
                           const std::array<int64_t, 3>& strides, const std::array<int, 4>& box,
                           CUtensorMapSwizzle swizzle = CU_TENSOR_MAP_SWIZZLE_NONE) {
  static const auto encode = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found{};
    constexpr unsigned kSince = 12000;
    if (cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, kSince, cudaEnableDefault, &found) !=
            cudaSuccess ||
        found != cudaDriverEntryPointSuccess)
      function = nullptr;
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function);
  }();
  cuuint64_t all[4], steps_between[3];
  cuuint32_t sides[4];
  std::copy(sizes.begin(), sizes.end(), all);
  std::copy(strides.begin(), strides.end(), steps_between);
  std::copy(box.begin(), box.end(), sides);
  const cuuint32_t steps[] = {1, 1, 1, 1};
  constexpr int64_t kFar = int64_t{1} << 40;
  bool fits = reinterpret_cast<uintptr_t>(data) % kUnit == 0 && box[0] * element % kUnit == 0;
  for (const int64_t size : sizes) fits = fits && size > 0 && size <= int64_t{1} << 32;
  for (const int64_t step : strides) fits = fits && step >= 0 && step < kFar && step % kUnit == 0;
  for (const int side : box) fits = fits && side > 0 && side <= kMostBoxSide;
  return fits && encode != nullptr &&
         encode(&map, element == 4 ? CU_TENSOR_MAP_DATA_TYPE_UINT32 : CU_TENSOR_MAP_DATA_TYPE_UINT16, 4, data, all,
                steps_between, sides, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle, CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
                CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

// The same of a channels_last array: some channels, a multiple of 16 bytes, of some pixels.
inline bool describe_boxes(CUtensorMap& map, const View& view, int64_t batch, int64_t channels, int64_t height,
                           int64_t width, int64_t element, int box_channels, int box_pixels) {
  return describe_boxes(map, view.data, element, {channels, width, height, batch},
                        {view.stride[3] * element, view.stride[2] * element, view.stride[0] * element},
                        {box_channels, box_pixels, 1, 1});
}

// Fetches a description, which lies in memory, so that the first copy need not wait for it.
__device__ inline void prefetch(const CUtensorMap& map) {
#if __CUDA_ARCH__ >= 900
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
#endif
}

// Begins to copy a box, whose first element may be outside of the array, to a multiple of 128 bytes in shared memory. A
// barrier expects all of its bytes.
__device__ inline void copy_box(int to, const CUtensorMap& map, int channel, int column, int row, int image,
                                int barrier) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], "
      "[%2];" ::"r"(shared_address(to)),
      "l"(&map), "r"(shared_address(barrier)), "r"(channel), "r"(column), "r"(row), "r"(image)
      : "memory");
#endif
}

// Asks for a box in L2: no harm, whatever is still written.
__device__ inline void ask_for_box(const CUtensorMap& map, int channel, int column, int row, int image) {
#if __CUDA_ARCH__ >= 900
  asm volatile("cp.async.bulk.prefetch.tensor.4d.L2.global.tile [%0, {%1, %2, %3, %4}];" ::"l"(&map), "r"(channel),
               "r"(column), "r"(row), "r"(image)
               : "memory");
#endif
}

// Begins to copy a box from a multiple of 128 bytes in shared memory; what is outside of the array goes nowhere. It is
// one of the bulk copies that the thread commits and waits for.
__device__ inline void store_box(const CUtensorMap& map, int from, int channel, int column, int row, int image) {
#if __CUDA_ARCH__ >= 900
  asm volatile("cp.async.bulk.tensor.4d.global.shared::cta.tile.bulk_group [%0, {%2, %3, %4, %5}], [%1];" ::"l"(&map),
               "r"(shared_address(from)), "r"(channel), "r"(column), "r"(row), "r"(image)
               : "memory");
#endif
}

}  // namespace dwconv
