// 16 bytes that begin anywhere in memory, from the two units of 16 bytes that they lie in.
#pragma once

#include "common.cuh"

namespace dwconv {

// 16 bytes of two units, from kWords words and `bits` bits on.
template <int kWords>
__device__ uint4 shifted(const uint4& low, const uint4& high, uint32_t bits) {
  const uint32_t words[9] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w, 0};
  constexpr int k = kWords;
  return {__funnelshift_r(words[k], words[k + 1], bits), __funnelshift_r(words[k + 1], words[k + 2], bits),
          __funnelshift_r(words[k + 2], words[k + 3], bits), __funnelshift_r(words[k + 3], words[k + 4], bits)};
}

// The unit that the next lane has; the last lane's is `beyond`. All lanes of the warp ask.
__device__ inline uint4 unit_of_next_lane(const uint4& unit, const uint4& beyond) {
  const uint4 next = {__shfl_down_sync(~0u, unit.x, 1), __shfl_down_sync(~0u, unit.y, 1),
                      __shfl_down_sync(~0u, unit.z, 1), __shfl_down_sync(~0u, unit.w, 1)};
  return threadIdx.x % 32 < 31 ? next : beyond;
}

}  // namespace dwconv
