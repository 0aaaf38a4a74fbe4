// Tensors in, Problem out: every check, every message and every output allocation, for all devices.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>
#include <vector>

#include "packed_geometry.h"
#include "problem.h"

namespace dwconv {

using torch::stable::Tensor;
using Ints = std::vector<int64_t>;  // an int[] argument of an operator
using IntsRef = torch::headeronly::HeaderOnlyArrayRef<int64_t>;

struct Geometry {
  IntsRef stride, padding, dilation;
  bool casts = false;  // as PackedGeometry has it
};

// The numbers that its Geometry refers to.
class UnpackedGeometry {
 public:
  explicit UnpackedGeometry(int64_t packed)
      : numbers_(PackedGeometry(packed).numbers()), casts_(PackedGeometry(packed).casts()) {}
  operator Geometry() const { return {{&numbers_[0], 2}, {&numbers_[2], 2}, {&numbers_[4], 2}, casts_}; }

 private:
  PackedGeometry::Numbers numbers_;
  bool casts_;
};

// Each throws std::runtime_error, naming the argument and what was got, unless the pass is well defined.
// The result holds all but the pointer and the strides of what the pass writes.
Problem check_forward(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias, const Geometry&);
Problem check_grad_input(const Tensor& grad_output, const Tensor& weight, IntsRef input_size, const Geometry&);
Problem check_grad_weight(const Tensor& grad_output, const Tensor& input, IntsRef kernel_size, const Geometry&);

// F.conv2d's rule for the memory format of its output: channels_last where the input or the weight is, unless the
// batch is empty.
bool output_is_channels_last(const Tensor& input, const Tensor& weight);

// Where a cast of `tensor` to the dtype of `like` is to be written, in its memory format; none where it has that dtype,
// or one that autocast leaves alone, or a rank that no argument has. Throws std::runtime_error unless both are on the
// same device.
std::optional<Tensor> room_for_cast(const Tensor& tensor, const char* name, const Tensor& like);

// Uninitialised, of the dtype and device of `like`.
Tensor empty(IntsRef size, bool channels_last, const Tensor& like);
// The same of float32.
Tensor empty_float32(IntsRef size, bool channels_last, const Tensor& like);

View view_of(const Tensor& tensor);
DType dtype_of(const Tensor& tensor, const char* name);  // throws std::runtime_error unless it is served

// The `packed` operators' outputs, by a device's cast(tensor, name, like) and run_forward(input, weight, bias,
// geometry).
template <auto cast, auto run_forward>
std::tuple<Tensor, Tensor> forward_packed_cast(const Tensor& input, const Tensor& given_weight,
                                               const std::optional<Tensor>& given_bias, int64_t packed) {
  const Tensor weight = cast(given_weight, "weight", input);
  std::optional<Tensor> bias;
  if (given_bias) bias = cast(*given_bias, "bias", input);
  return {run_forward(input, weight, bias, UnpackedGeometry(packed)), weight};
}

template <auto cast, auto run_forward>
Tensor forward_packed(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias, int64_t packed) {
  if (PackedGeometry(packed).casts())
    return std::get<0>(forward_packed_cast<cast, run_forward>(input, weight, bias, packed));
  return run_forward(input, weight, bias, UnpackedGeometry(packed));
}

// The gradients that the `packed` operators return, by a device's run_backward(grad_output, input, weight, geometry,
// bias), where `bias` is whether the third one is wanted.
template <auto run_backward>
std::tuple<Tensor, Tensor> backward_packed(const Tensor& grad_output, const Tensor& input, const Tensor& weight,
                                           int64_t packed) {
  const auto [grad_input, grad_weight, _] = run_backward(grad_output, input, weight, UnpackedGeometry(packed), false);
  return {grad_input, grad_weight};
}

template <auto run_backward>
std::tuple<Tensor, Tensor, Tensor> backward_packed_bias(const Tensor& grad_output, const Tensor& input,
                                                        const Tensor& weight, int64_t packed) {
  const auto [grad_input, grad_weight, grad_bias] =
      run_backward(grad_output, input, weight, UnpackedGeometry(packed), true);
  return {grad_input, grad_weight, *grad_bias};
}

}  // namespace dwconv
