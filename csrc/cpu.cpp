// The operators on CPU tensors: the same checks, then ATen's own convolution (oneDNN where it applies).
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <array>
#include <tuple>

#include "conv2d.h"

namespace dwconv {
namespace {

using torch::stable::detail::from;
using torch::stable::detail::to;
using Bools = torch::headeronly::HeaderOnlyArrayRef<bool>;

void call(const char* name, StableIValue* stack) {
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(name, "", stack, TORCH_ABI_VERSION));
}

Tensor contiguous(const Tensor& tensor, bool channels_last) {
  using torch::headeronly::MemoryFormat;
  return torch::stable::contiguous(tensor, channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
}

// Whether oneDNN (3.12, on CPUs with AVX-512) fails in channels_last: wide kernels in bfloat16 never return, and the
// gradient of dilated weights reads outside the image.
bool fails_in_channels_last(const Problem& p) {
  return p.dtype == DType::kBFloat16 && (p.kernel_w > 13 || p.dilation_h > 1 || p.dilation_w > 1);
}

// A copy whose strides say NCHW whatever the sizes; contiguous() leaves those of ambiguous sizes as they are.
Tensor in_nchw(const Tensor& tensor) {
  const auto sizes = tensor.sizes();
  Tensor copy = empty(Ints(sizes.begin(), sizes.end()), false, tensor);
  return torch::stable::copy_(copy, tensor);
}

Tensor cast(const Tensor& tensor, const char* name, const Tensor& like) {
  std::optional<Tensor> room = room_for_cast(tensor, name, like);
  return room ? torch::stable::copy_(*room, tensor) : tensor;
}

Tensor run_forward(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
                   const Geometry& geometry) {
  const Problem problem = check_forward(input, weight, bias, geometry);
  const bool in_place = !fails_in_channels_last(problem) || !output_is_channels_last(input, weight);
  std::array<StableIValue, 9> stack{from(in_place ? input : in_nchw(input)),
                                    from(in_place ? weight : in_nchw(weight)),
                                    from(bias),
                                    from(geometry.stride),
                                    from(geometry.padding),
                                    from(geometry.dilation),
                                    from(false),
                                    from(Ints{0, 0}),
                                    from(problem.channels)};
  call("aten::convolution", stack.data());
  return contiguous(to<Tensor>(stack[0]), output_is_channels_last(input, weight));
}

// input, weight and bias gradients, as far as `wanted`; the others are not to be touched.
std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad_output, const Tensor& input, const Tensor& weight,
                                            const Problem& problem, const Geometry& g,
                                            const std::array<bool, 3>& wanted) {
  std::array<StableIValue, 11> stack{from(grad_output),
                                     from(input),
                                     from(weight),
                                     from(std::optional<Ints>(Ints{problem.filters()})),
                                     from(g.stride),
                                     from(g.padding),
                                     from(g.dilation),
                                     from(false),
                                     from(Ints{0, 0}),
                                     from(problem.channels),
                                     from(Bools(wanted.data(), wanted.size()))};
  call("aten::convolution_backward", stack.data());
  return {to<Tensor>(stack[0]), to<Tensor>(stack[1]), to<Tensor>(stack[2])};
}

Tensor forward(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias, const Ints& stride,
               const Ints& padding, const Ints& dilation, bool /*allow_fft*/) {
  return run_forward(input, weight, bias, {stride, padding, dilation});
}

Tensor grad_input(const Tensor& grad_output, const Tensor& weight, const Ints& input_size, const Ints& stride,
                  const Ints& padding, const Ints& dilation, bool channels_last, bool /*allow_fft*/) {
  const Geometry geometry{stride, padding, dilation};
  const Problem problem = check_grad_input(grad_output, weight, input_size, geometry);
  // Of the input only sizes and memory format count: its memory is neither read nor written.
  const bool fails = fails_in_channels_last(problem);
  const Tensor input = empty(input_size, channels_last && !fails, grad_output);
  const auto gradients =
      backward(grad_output, input, fails ? in_nchw(weight) : weight, problem, geometry, {true, false, false});
  return contiguous(std::get<0>(gradients), channels_last);
}

std::tuple<Tensor, Tensor> grad_weight(const Tensor& grad_output, const Tensor& input, const Ints& kernel_size,
                                       const Ints& stride, const Ints& padding, const Ints& dilation, bool bias,
                                       bool /*allow_fft*/) {
  const Geometry geometry{stride, padding, dilation};
  const Problem problem = check_grad_weight(grad_output, input, kernel_size, geometry);
  const Tensor weight = empty({problem.filters(), 1, problem.kernel_h, problem.kernel_w}, false, input);
  const auto gradients = backward(grad_output, fails_in_channels_last(problem) ? in_nchw(input) : input, weight,
                                  problem, geometry, {false, true, bias});
  const Tensor grad_bias = bias ? std::get<2>(gradients) : empty({0}, false, input);
  return {contiguous(std::get<1>(gradients), false), grad_bias};
}

std::tuple<Tensor, Tensor, std::optional<Tensor>> run_backward(const Tensor& grad_output, const Tensor& input,
                                                               const Tensor& weight, const Geometry& geometry,
                                                               bool bias) {
  const Problem problem = check_grad_input(grad_output, weight, input.sizes(), geometry);
  check_grad_weight(grad_output, input, {weight.sizes().data() + 2, 2}, geometry);
  const bool channels_last = output_is_channels_last(input, weight), fails = fails_in_channels_last(problem);
  const auto gradients = backward(grad_output, fails ? in_nchw(input) : input, fails ? in_nchw(weight) : weight,
                                  problem, geometry, {true, true, bias});
  const auto cast_back = [&](const Tensor& gradient) {
    if (!geometry.casts) return gradient;
    Tensor wide = empty_float32(gradient.sizes(), false, gradient);
    return torch::stable::copy_(wide, gradient);
  };
  return {contiguous(std::get<0>(gradients), channels_last), cast_back(contiguous(std::get<1>(gradients), false)),
          bias ? cast_back(std::get<2>(gradients)) : std::get<2>(gradients)};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dwconv, CPU, m) {
  m.impl("forward", TORCH_BOX(&forward));
  m.impl("grad_input", TORCH_BOX(&grad_input));
  m.impl("grad_weight", TORCH_BOX(&grad_weight));
  m.impl("forward.packed", TORCH_BOX((&forward_packed<cast, run_forward>)));
  m.impl("forward.packed_cast", TORCH_BOX((&forward_packed_cast<cast, run_forward>)));
  m.impl("backward.packed", TORCH_BOX(&backward_packed<run_backward>));
  m.impl("backward.packed_bias", TORCH_BOX(&backward_packed_bias<run_backward>));
}

}  // namespace dwconv
