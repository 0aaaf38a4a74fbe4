// What the kernels of the plan windows_nchw share: how taps meet the source.
#pragma once

#include "common.cuh"
#include "windows_nchw.h"

namespace dwconv {

// How taps of one side are found where the stride is the target's, without divisions.
struct Reach {
  Divider by_divisor, by_tap_step, by_stride;
  int inverse;  // of the dilation by the stride, both without what divides both

  Reach() = default;
  explicit Reach(const WindowSide& side)
      : by_divisor(side.stride / side.tap_step), by_tap_step(side.tap_step), by_stride(side.stride), inverse(0) {
    while (inverse * int64_t{side.fall} % side.tap_step != 1 % side.tap_step) ++inverse;
  }
};

// Some taps of one side: number n, for n below `count`, is tap first + n * step and reads origin + n * move.
struct Walk {
  int first, step, count, origin, move;
};

// Those that reach a target where the stride is the target's.
__device__ inline Walk taps_reaching(const WindowSide& side, const Reach& reach, int target) {
  uint32_t first = target + side.padding;
  if (reach.by_divisor.split(first) != 0) return {0, 0, 0, 0, 0};
  first = reach.by_tap_step.split(first) * reach.inverse;
  first = reach.by_tap_step.split(first);
  const int tap = first, padded = target + side.padding - tap * side.dilation;
  if (tap >= side.kernel) return {0, 0, 0, 0, 0};
  uint32_t count = side.kernel - tap + side.tap_step - 1, origin = abs(padded);
  reach.by_tap_step.split(count), reach.by_stride.split(origin);
  return {tap, side.tap_step, static_cast<int>(count),
          padded < 0 ? -static_cast<int>(origin) : static_cast<int>(origin), -side.fall};
}

// The source index that a tap reads, or a negative one.
__device__ inline int source_index(const WindowSide& side, int target, int tap) {
  int at = target * side.stride - side.padding + tap * side.dilation;
  if (side.spread) {
    const int padded = target + side.padding - tap * side.dilation;
    at = padded >= 0 && padded % side.stride == 0 ? padded / side.stride : -1;
  }
  return at < side.size ? at : -1;
}

// Straight from memory.
void launch_few_taps(const Problem& problem, cudaStream_t stream);

}  // namespace dwconv
