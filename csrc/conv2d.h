// Tensors in, Problem out: every check, every message and every output allocation, for all devices.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <array>
#include <optional>
#include <vector>

#include "problem.h"

namespace dwconv {

using torch::stable::Tensor;
using Ints = std::vector<int64_t>;  // an int[] argument of an operator
using IntsRef = torch::headeronly::HeaderOnlyArrayRef<int64_t>;

struct Geometry {
  IntsRef stride, padding, dilation;
};

// A geometry of small numbers in one, since each argument of an operator costs the host some 0.3 us: 9 bits for each of
// stride, padding and dilation, vertical and horizontal. short_way.cpp packs it.
class PackedGeometry {
 public:
  explicit PackedGeometry(int64_t packed) {
    for (int i = 0; i < 6; ++i) number_[i] = packed >> 9 * i & 511;
  }
  Geometry unpack() const { return {{&number_[0], 2}, {&number_[2], 2}, {&number_[4], 2}}; }

 private:
  std::array<int64_t, 6> number_;
};

// Each throws std::runtime_error, naming the argument and what was got, unless the pass is well defined.
// The result holds all but the pointer and the strides of what the pass writes.
Problem check_forward(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias, const Geometry&);
Problem check_grad_input(const Tensor& grad_output, const Tensor& weight, IntsRef input_size, const Geometry&);
Problem check_grad_weight(const Tensor& grad_output, const Tensor& input, IntsRef kernel_size, const Geometry&);

// F.conv2d's rule for the memory format of its output: channels_last where the input or the weight is, unless the
// batch is empty.
bool output_is_channels_last(const Tensor& input, const Tensor& weight);

// Uninitialised, of the dtype and device of `like`.
Tensor empty(IntsRef size, bool channels_last, const Tensor& like);

View view_of(const Tensor& tensor);

}  // namespace dwconv
