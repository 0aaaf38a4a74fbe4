// Tensors in, Problem out: every check, every message and every output allocation, for all devices.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <vector>

#include "problem.h"

namespace dwconv {

using torch::stable::Tensor;
using Ints = std::vector<int64_t>;  // an int[] argument of an operator

struct Geometry {
  const Ints& stride;
  const Ints& padding;
  const Ints& dilation;
};

// Each throws std::runtime_error, naming the argument and what was got, unless the pass is well defined.
// The result holds all but the pointer and the strides of what the pass writes.
Problem check_forward(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias, const Geometry&);
Problem check_grad_input(const Tensor& grad_output, const Tensor& weight, const Ints& input_size, const Geometry&);
Problem check_grad_weight(const Tensor& grad_output, const Tensor& input, const Ints& kernel_size, const Geometry&);

// F.conv2d's rule for the memory format of its output: channels_last where the input or the weight is, unless the
// batch is empty.
bool output_is_channels_last(const Tensor& input, const Tensor& weight);

// Uninitialised, of the dtype and device of `like`.
Tensor empty(const Ints& size, bool channels_last, const Tensor& like);

View view_of(const Tensor& tensor);

}  // namespace dwconv
