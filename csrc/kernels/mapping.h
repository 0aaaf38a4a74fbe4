// Forward and grad_input as one thing: a map from source planes to target planes.
#pragma once

#include "../problem.h"

namespace dwconv {

struct Mapping {
  View source, target, weight;
  void* bias = nullptr;
  int64_t bias_stride = 1;
  int sources = 0, targets = 0;       // planes of an image
  int fan_out = 1, fan_in = 1;        // targets of a source, sources that a target is summed over; one of them is 1
  int height = 0, width = 0;          // of a source plane
  int out_height = 0, out_width = 0;  // of a target plane
  int padding_h = 0, padding_w = 0;   // negative where grad_input reads inside the gradient only
  bool spread = false;                // grad_input with a stride, which is that of the target

  explicit Mapping(const Problem& p) {
    const bool forward = p.pass == Pass::kForward;
    source = forward ? p.input : p.output, target = forward ? p.output : p.input, weight = p.weight;
    bias = forward ? p.bias : nullptr, bias_stride = p.bias_stride;
    sources = static_cast<int>(forward ? p.channels : p.filters());
    targets = static_cast<int>(forward ? p.filters() : p.channels);
    fan_out = static_cast<int>(forward ? p.multiplier : 1), fan_in = static_cast<int>(forward ? 1 : p.multiplier);
    height = static_cast<int>(forward ? p.height : p.out_height);
    width = static_cast<int>(forward ? p.width : p.out_width);
    out_height = static_cast<int>(forward ? p.out_height : p.height);
    out_width = static_cast<int>(forward ? p.out_width : p.width);
    padding_h = static_cast<int>(p.padding_h), padding_w = static_cast<int>(p.padding_w);
    spread = !forward && (p.stride_h > 1 || p.stride_w > 1);
    if (!forward && !spread) {  // a forward pass with the kernel flipped, from the last tap backwards
      weight.data = static_cast<char*>(weight.data) +
                    size_of(p.dtype) * ((p.kernel_h - 1) * weight.stride[2] + (p.kernel_w - 1) * weight.stride[3]);
      weight.stride[2] = -weight.stride[2], weight.stride[3] = -weight.stride[3];
      padding_h = static_cast<int>((p.kernel_h - 1) * p.dilation_h) - padding_h;
      padding_w = static_cast<int>((p.kernel_w - 1) * p.dilation_w) - padding_w;
    }
  }
};

}  // namespace dwconv
