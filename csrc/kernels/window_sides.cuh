// How kernels find the taps that reach a target index, whatever stride and dilation are.
#pragma once

#include "mapping.cuh"
#include "window_sides.h"

namespace dwconv {

inline WindowSide window_rows(const Problem& p, const Mapping& map) {
  return {map.height, map.out_height, p.kernel_h, p.stride_h, map.padding_h, p.dilation_h, map.spread};
}
inline WindowSide window_columns(const Problem& p, const Mapping& map) {
  return {map.width, map.out_width, p.kernel_w, p.stride_w, map.padding_w, p.dilation_w, map.spread};
}

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

// The taps that reach a target index where the stride is the target's.
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

// The taps that reach a target index: in forward all of them.
__device__ inline Walk taps_of(const WindowSide& side, const Reach& reach, int target) {
  if (side.spread) return taps_reaching(side, reach, target);
  return {0, 1, side.kernel, target * side.stride - side.padding, side.dilation};
}

}  // namespace dwconv
