// A Mapping as kernels have it among their arguments, and one of its outputs tap by tap.
#pragma once

#include "common.cuh"
#include "mapping.h"

namespace dwconv {

struct MappingArguments {
  const void *source, *weight, *bias;
  void* target;
  int source_stride[4], target_stride[4];  // in elements, as all strides
  int weight_filter, weight_row, weight_column, bias_stride;
  int height, width, out_height, out_width;  // of a source plane and of a target plane
  int fan_in;                                // source planes that a target plane is summed over
  Divider by_fan_out;

  MappingArguments(const Mapping& map)
      : source(map.source.data),
        weight(map.weight.data),
        bias(map.bias),
        target(map.target.data),
        weight_filter(static_cast<int>(map.weight.stride[0])),
        weight_row(static_cast<int>(map.weight.stride[2])),
        weight_column(static_cast<int>(map.weight.stride[3])),
        bias_stride(static_cast<int>(map.bias_stride)),
        height(map.height),
        width(map.width),
        out_height(map.out_height),
        out_width(map.out_width),
        fan_in(map.fan_in),
        by_fan_out(map.fan_out) {
    for (int d = 0; d < 4; ++d) {
      source_stride[d] = static_cast<int>(map.source.stride[d]);
      target_stride[d] = static_cast<int>(map.target.stride[d]);
    }
  }

  // The first source plane of a target plane: forward reads plane / fan_out, where fan_in is 1; grad_input reads the
  // filters of the channel.
  __device__ int source_plane(int plane) const {
    uint32_t at = plane * fan_in;
    by_fan_out.split(at);
    return static_cast<int>(at);
  }

  template <typename T>
  __device__ const T* source_of(int image, int plane) const {
    return static_cast<const T*>(source) + (image * source_stride[0] + source_plane(plane) * source_stride[1]);
  }
  template <typename T>
  __device__ const T* weight_of(int plane) const {
    return static_cast<const T*>(weight) + plane * fan_in * weight_filter;
  }
  template <typename T>
  __device__ Accumulator<T> bias_of(int plane) const {
    return bias ? widen(static_cast<const T*>(bias)[plane * bias_stride]) : Accumulator<T>(0);
  }
  // The first row of a column of the target.
  template <typename T>
  __device__ T* target_of(int image, int plane, int column) const {
    return static_cast<T*>(target) + (image * target_stride[0] + plane * target_stride[1] + column * target_stride[3]);
  }
};

// Some taps of one side, and what they lead to from a target index: number n, for n below `count`, is tap
// first + n * step of the kernel and reads source index origin + n * move, which may lie beside the source.
struct Walk {
  int first, step, count, origin, move;
};

// One output, by the taps of it that meet the source. `source` and `weight`: its first plane and filter. For outputs
// that have become NaN where zeros stand for what lies beside the source or the kernel.
template <typename T>
__device__ Accumulator<T> tap_by_tap(const MappingArguments& a, const T* source, const T* weight, const Walk& rows,
                                     const Walk& columns) {
  Accumulator<T> sum = 0;
#pragma unroll 1
  for (int q = 0; q < a.fan_in; ++q, source += a.source_stride[1], weight += a.weight_filter)
#pragma unroll 1
    for (int i = 0; i < rows.count; ++i) {
      const int y = rows.origin + i * rows.move, tap_row = rows.first + i * rows.step;
      if (static_cast<uint32_t>(y) >= static_cast<uint32_t>(a.height)) continue;
#pragma unroll 1
      for (int j = 0; j < columns.count; ++j) {
        const int x = columns.origin + j * columns.move, tap_column = columns.first + j * columns.step;
        if (static_cast<uint32_t>(x) < static_cast<uint32_t>(a.width))
          sum = fma(widen(source[y * a.source_stride[2] + x * a.source_stride[3]]),
                    widen(weight[tap_row * a.weight_row + tap_column * a.weight_column]), sum);
      }
    }
  return sum;
}

}  // namespace dwconv
