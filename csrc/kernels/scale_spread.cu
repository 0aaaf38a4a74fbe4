// grad_input of kernels with a single tap at a stride: zeros, and between them every gradient times its channel's
// weight. What is written has no gaps, in NCHW or channels_last: threads write units of 16 bytes of it, and ask for
// each element whether there is a gradient for it.
#include "scale_spread.h"

#include "common.cuh"
#include "direct.cuh"
#include "overlap.cuh"

namespace dwconv {
namespace {

constexpr int kThreads = 128;
constexpr int kUnitBytes = 16;  // that are written at once

struct Arguments {
  const void* grad;
  const void* weight;
  void* target;
  int grad_stride[4], weight_stride;  // in elements
  uint32_t elements;
  int channels, height, width, stride_h, stride_w;
  bool channels_last;
  bool whole;  // whether units of the target, of gradients and of weights are in step, in channels_last
  Divider by_channels, by_height, by_width, by_stride_h, by_stride_w;
};

template <typename T>
struct alignas(kUnitBytes) Unit {
  static constexpr int kSize = kUnitBytes / sizeof(T);
  T element[kSize];
};

template <typename T>
__global__ void __launch_bounds__(kThreads) scale_spread(const __grid_constant__ Arguments a) {
  constexpr int kSize = Unit<T>::kSize;
  const uint32_t first = (blockIdx.x * kThreads + threadIdx.x) * kSize;
  uint32_t rest = first;
  int channel = a.channels_last ? a.by_channels.split(rest) : 0;
  int column = a.by_width.split(rest), row = a.by_height.split(rest);
  if (!a.channels_last) channel = a.by_channels.split(rest);
  int image = rest;
  const T* const grad = static_cast<const T*>(a.grad);
  const T* const weight = static_cast<const T*>(a.weight);

  // Where the gradient of a row or column lies, and whether there is one.
  struct Side {
    int at;
    bool meets;
  };
  const auto side_of = [](int index, const Divider& by_stride) -> Side {
    uint32_t quotient = index;
    const bool meets = by_stride.split(quotient) == 0;
    return {static_cast<int>(quotient), meets};
  };
  Side down = side_of(row, a.by_stride_h), across = side_of(column, a.by_stride_w);
  const auto place = [&] {
    return image * a.grad_stride[0] + channel * a.grad_stride[1] + down.at * a.grad_stride[2] +
           across.at * a.grad_stride[3];
  };
  wait_for_kernel_before();
  let_next_kernel_start();
  if (first >= a.elements) return;

  Unit<T> unit{};
  if (a.whole) {
    if (down.meets && across.meets) {
      unit = *reinterpret_cast<const Unit<T>*>(grad + place());
      const Unit<T> factors = *reinterpret_cast<const Unit<T>*>(weight + channel);
#pragma unroll
      for (int i = 0; i < kSize; ++i) unit.element[i] = narrow<T>(widen(unit.element[i]) * widen(factors.element[i]));
    }
  } else {
    Vector<T, 1> gradient[kSize], factor[kSize];
    uint32_t meets = 0;
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      const bool met = down.meets && across.meets && first + i < a.elements;
      gradient[i] = load<T, 1>(grad + place(), met);
      factor[i] = load<T, 1>(weight + channel * a.weight_stride, met);
      meets |= met ? 1u << i : 0;
      if (a.channels_last) {
        if (++channel < a.channels) continue;
        channel = 0;
      }
      if (++column == a.width) {
        column = 0;
        if (++row == a.height) {
          row = 0;
          if (a.channels_last || ++channel == a.channels) channel = 0, ++image;
        }
        down = side_of(row, a.by_stride_h);
      }
      across = side_of(column, a.by_stride_w);
    }
#pragma unroll
    for (int i = 0; i < kSize; ++i)
      if (meets & 1u << i) unit.element[i] = narrow<T>(gradient[i][0] * factor[i][0]);
  }
  T* const target = static_cast<T*>(a.target) + first;
  if (first + kSize <= a.elements)
    *reinterpret_cast<Unit<T>*>(target) = unit;
  else
#pragma unroll
    for (int i = 0; i < kSize; ++i)
      if (first + i < a.elements) target[i] = unit.element[i];
}

}  // namespace

void launch_scale_spread(const Problem& p, cudaStream_t stream) {
  const int64_t elements = p.batch * p.channels * p.height * p.width;
  Arguments a{};
  a.grad = p.output.data, a.weight = p.weight.data, a.target = p.input.data;
  for (int d = 0; d < 4; ++d) a.grad_stride[d] = static_cast<int>(p.output.stride[d]);
  a.weight_stride = static_cast<int>(p.weight.stride[0]);
  a.elements = static_cast<uint32_t>(elements), a.channels = static_cast<int>(p.channels);
  a.height = static_cast<int>(p.height), a.width = static_cast<int>(p.width);
  a.channels_last = p.channels > 1 && p.input.stride[1] == 1 && p.height * p.width > 1;
  a.by_channels = Divider(p.channels), a.by_height = Divider(p.height), a.by_width = Divider(p.width);
  a.by_stride_h = Divider(p.stride_h), a.by_stride_w = Divider(p.stride_w);
  visit_dtype(p.dtype, [&](auto zero) {
    using T = decltype(zero);
    constexpr int kSize = Unit<T>::kSize;
    const auto aligned = [](const void* data) { return reinterpret_cast<uintptr_t>(data) % kUnitBytes == 0; };
    const auto& grad = p.output.stride;
    a.whole = a.channels_last && p.channels % kSize == 0 && grad[1] == 1 && a.weight_stride == 1 &&
              ((p.batch > 1 ? grad[0] : 0) | grad[2] | grad[3]) % kSize == 0 && aligned(p.output.data) &&
              aligned(p.weight.data);
    launch_early(scale_spread<T>, a, ceil_div(elements, int64_t{kSize} * kThreads), kThreads, stream);
  });
  check_launch("scale_spread");
}

}  // namespace dwconv
