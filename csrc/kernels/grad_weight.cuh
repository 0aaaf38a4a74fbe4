// What kernels of grad_weight that go straight to memory have among their arguments, and where they put their sums.
#pragma once

#include <algorithm>

#include "common.cuh"
#include "launch.h"
#include "widening.h"

namespace dwconv {

struct GradWeightArguments {
  const void *input, *grad;
  void *grad_weight, *grad_bias;          // the latter null where it is not wanted
  void* partial = nullptr;                // [split][tap, or bias behind the last tap][filter], or null: sums are whole
  bool widens = false;                    // whole sums of 16 bits, written as float32
  int input_stride[4], grad_stride[4];    // in elements
  int height, width, kernel_h, kernel_w;  // of the input, and of the kernel
  int out_height, out_width;              // of the gradient
  int stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w;
  int batch, filters, taps;
  Divider by_multiplier;

  GradWeightArguments(const Problem& p)
      : input(p.input.data),
        grad(p.output.data),
        grad_weight(p.weight.data),
        grad_bias(p.bias),
        height(static_cast<int>(p.height)),
        width(static_cast<int>(p.width)),
        kernel_h(static_cast<int>(p.kernel_h)),
        kernel_w(static_cast<int>(p.kernel_w)),
        out_height(static_cast<int>(p.out_height)),
        out_width(static_cast<int>(p.out_width)),
        stride_h(static_cast<int>(p.stride_h)),
        stride_w(static_cast<int>(p.stride_w)),
        padding_h(static_cast<int>(p.padding_h)),
        padding_w(static_cast<int>(p.padding_w)),
        dilation_h(static_cast<int>(p.dilation_h)),
        dilation_w(static_cast<int>(p.dilation_w)),
        batch(static_cast<int>(p.batch)),
        filters(static_cast<int>(p.filters())),
        taps(static_cast<int>(p.taps())),
        by_multiplier(p.multiplier) {
    for (int d = 0; d < 4; ++d) {
      input_stride[d] = static_cast<int>(p.input.stride[d]);
      grad_stride[d] = static_cast<int>(p.output.stride[d]);
    }
  }

  // Where sums go: if several splits have a share of each, to memory of their own, for launch_add_partial_sums.
  void share_sums(const Problem& p, int64_t splits, const Allocate& allocate) {
    if (splits > 1)
      partial =
          allocate(splits * (p.taps() + (p.bias != nullptr)) * p.filters() * std::max<int64_t>(size_of(p.dtype), 4));
    else
      widens = size_of(p.dtype) == 2 && Widening::is_wanted();
  }

  __device__ int channel_of(int filter) const {
    uint32_t channel = filter;
    by_multiplier.split(channel);
    return static_cast<int>(channel);
  }

  // `slot`: a tap, or behind the last one the bias.
  template <typename T>
  __device__ void put(int split, int slot, int filter, Accumulator<T> sum) const {
    if (partial != nullptr) {
      const int slots = taps + (grad_bias != nullptr);
      static_cast<Accumulator<T>*>(partial)[(int64_t{split} * slots + slot) * filters + filter] = sum;
      return;
    }
    const T value = narrow<T>(sum);
    void* const gradients = slot < taps ? grad_weight : grad_bias;
    const int place = slot < taps ? filter * taps + slot : filter;
    if (sizeof(T) == 2 && widens)
      static_cast<float*>(gradients)[place] = static_cast<float>(widen(value));
    else
      static_cast<T*>(gradients)[place] = value;
  }
};

}  // namespace dwconv
