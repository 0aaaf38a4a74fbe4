// What kernels for grad_weight of channels_last arrays on tensor cores have in common: a thread reads some channels of
// a pixel at once, and makes pairs of two pixels for each channel.
#pragma once

#include "boxes.cuh"
#include "march_grad_weight_channels_last.cuh"
#include "tensor_cores.cuh"

namespace dwconv {
namespace {

constexpr int kQuad = 4;  // channels of a warp

// A block of so many warps, each with so many times 4 channels, and what it has of a pixel: channels, bytes, units.
template <int warps, int quads = 1>
struct Block {
  static constexpr int kWarps = warps, kThreads = 32 * warps, kQuads = quads;
  static constexpr int kSlab = kQuad * quads * warps, kPixel = 2 * kSlab, kUnits = kPixel / kUnit;
};
using Usual = Block<8>;
constexpr int kWarps = Usual::kWarps, kThreads = Usual::kThreads, kSlab = Usual::kSlab, kUnits = Usual::kUnits;

// What is the same in every step stays in a register: a compiler works out again what it can, step by step.
__device__ inline uint32_t kept(uint32_t value) {
  return __shfl_sync(~0u, value, threadIdx.x % 32);
}

// The same of what all threads have.
__device__ inline uint32_t kept_by_all(uint32_t value) {
  return __shfl_sync(~0u, threadIdx.x % 32 == 0 ? value : 0, 0);
}

// The stages' barriers by their addresses.
struct StageAddresses {
  uint32_t base;

  __device__ uint32_t full(int stage) const { return base + StageBarriers::full(stage); }
  __device__ uint32_t done(int stage) const { return base + StageBarriers::done(stage); }
};

__device__ inline uint2 load_at(uint32_t address) {
  uint2 value;
  asm volatile("ld.shared.v2.b32 {%0, %1}, [%2];" : "=r"(value.x), "=r"(value.y) : "r"(address));
  return value;
}

// The same without a branch, if there is `any`, or else the value as it is.
__device__ inline void load_if(bool any, uint2& value, uint32_t address) {
  asm volatile("{\n.reg .pred any;\nsetp.ne.s32 any, %3, 0;\n@any ld.shared.v2.b32 {%0, %1}, [%2];\n}"
               : "+r"(value.x), "+r"(value.y)
               : "r"(address), "r"(static_cast<int>(any)));
}

__device__ inline uint32_t ones(__half) {
  return 0x3c003c00u;
}
__device__ inline uint32_t ones(__nv_bfloat16) {
  return 0x3f803f80u;
}

// Four channels of a pixel in each of two tiles, as a pair for each channel.
__device__ inline void pair_up(uint2 low, uint2 high, uint32_t (&pair)[kQuad]) {
  pair[0] = __byte_perm(low.x, high.x, 0x5410), pair[1] = __byte_perm(low.x, high.x, 0x7632);
  pair[2] = __byte_perm(low.y, high.y, 0x5410), pair[3] = __byte_perm(low.y, high.y, 0x7632);
}

// The same by other instructions. A multiplication takes four words side by side: of two that are the same one, a
// compiler would copy all four before every multiplication.
__device__ inline void pair_up_again(uint2 low, uint2 high, uint32_t (&pair)[kQuad]) {
  pair[0] = __byte_perm(high.x, low.x, 0x1054), pair[1] = __byte_perm(high.x, low.x, 0x3276);
  pair[2] = __byte_perm(high.y, low.y, 0x1054), pair[3] = __byte_perm(high.y, low.y, 0x3276);
}

// The steps of a split, down the rows of some images side by side, group after group, span after span of columns. A
// step brings the next row of the gradient, unless that is beyond the split or the image; behind the last one, others
// follow for the windows that are under way.
template <class Arguments>
struct RowSteps {
  int row, group, span, left, count;

  __device__ RowSteps(const Arguments& a, int split) {
    uint32_t rest = a.shares.begin(split);
    left = a.shares.begin(split + 1) - static_cast<int>(rest);
    uint32_t last = rest + left - 1;
    count = left + min(a.behind, a.period - 1 - static_cast<int>(a.by_period.split(last)));
    row = a.by_period.split(rest), group = a.by_groups.split(rest), span = rest;
  }
  __device__ bool has_grad(const Arguments& a) const { return row < a.out_height && left > 0; }
  __device__ void next(const Arguments& a) {
    --left, --count;
    if (++row < a.period) return;
    row = 0;
    if (++group == a.groups) group = 0, ++span;
  }
};

}  // namespace
}  // namespace dwconv
