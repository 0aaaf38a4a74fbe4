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

// The unit that the next lane has; the last lane's is the first lane's `beyond`. All lanes of the warp ask.
__device__ inline uint4 unit_of_next_lane(const uint4& unit, const uint4& beyond) {
  const int lane = threadIdx.x % 32;
  const uint4 given = lane == 0 ? beyond : unit;
  return {__shfl_sync(~0u, given.x, lane + 1), __shfl_sync(~0u, given.y, lane + 1), __shfl_sync(~0u, given.z, lane + 1),
          __shfl_sync(~0u, given.w, lane + 1)};
}

}  // namespace dwconv
