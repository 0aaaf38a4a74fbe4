#include "conv2d.h"

#include <algorithm>
#include <limits>
#include <sstream>
#include <stdexcept>
#include <string>

namespace dwconv {
namespace {

using torch::headeronly::ScalarType;

// Arguments of messages: text is made of them only where a check fails, since every call passes all checks.
template <typename Values>
struct Listed {
  const Values& values;
  friend std::ostream& operator<<(std::ostream& text, const Listed& list) {
    text << '[';
    for (size_t i = 0; i < list.values.size(); ++i) text << (i ? ", " : "") << list.values[i];
    return text << ']';
  }
};
template <typename Values>
Listed<Values> listed(const Values& values) {
  return {values};
}

struct DeviceOf {
  const Tensor& tensor;
  friend std::ostream& operator<<(std::ostream& text, const DeviceOf& of) {
    const auto device = of.tensor.device();
    if (device.is_cpu()) return text << "cpu";
    if (device.is_cuda()) return text << "cuda:" << device.index();
    return text << "device type " << static_cast<int>(device.type());
  }
};

// STD_TORCH_CHECK would put this file's path and line before the message.
template <typename... Parts>
void check(bool condition, const Parts&... parts) {
  if (condition) return;
  std::ostringstream text;
  (text << ... << parts);
  throw std::runtime_error(text.str());
}

void check_same_device(const Tensor& a, const char* a_name, const Tensor& b, const char* b_name) {
  check(a.device() == b.device(), a_name, " and ", b_name, " should be on the same device, but got ", DeviceOf{a},
        " and ", DeviceOf{b});
}

void check_same(const Tensor& a, const char* a_name, const Tensor& b, const char* b_name) {
  check(a.scalar_type() == b.scalar_type(), a_name, " (", torch::headeronly::toString(a.scalar_type()), ") and ",
        b_name, " (", torch::headeronly::toString(b.scalar_type()), ") should be of the same dtype");
  check_same_device(a, a_name, b, b_name);
}

void check_rank(const Tensor& tensor, const char* name) {
  check(tensor.dim() == 4, "expected ", name, " to have 4 dimensions, but got ", name,
        " of size: ", listed(tensor.sizes()));
}

// Sizes beyond this would overflow the arithmetic on padded sizes; none has a use.
constexpr int64_t kLargest = std::numeric_limits<int32_t>::max();

void check_pair(IntsRef pair, const char* name, int64_t smallest, const char* complaint) {
  check(pair.size() == 2, "expected ", name, " to be a single integer value or a list of 2 values, but got ", name, "=",
        listed(pair));
  check(pair[0] >= smallest && pair[1] >= smallest, complaint, " is not supported, but got ", name, "=", listed(pair));
  check(pair[0] <= kLargest && pair[1] <= kLargest, name, " is too large: expected at most ", kLargest, ", but got ",
        name, "=", listed(pair));
}

// Fills in what the sizes and the geometry say; `input` (N, C, H, W) and `weight` (C * m, 1, kH, kW) are sizes.
template <typename Sizes, typename WeightSizes>
Problem problem_of(const Sizes& input, const WeightSizes& weight, const Geometry& geometry) {
  check(weight[1] == 1,
        "expected weight of a depthwise convolution to be of size [C * multiplier, 1, kH, kW], but got ",
        "weight of size ", listed(weight));
  check(weight[2] > 0 && weight[3] > 0, "expected weight to have a kernel of at least 1 x 1, but got weight of size ",
        listed(weight));
  check(weight[2] <= kLargest && weight[3] <= kLargest, "weight is too large: got weight of size ", listed(weight));
  check_pair(geometry.stride, "stride", 1, "non-positive stride");
  check_pair(geometry.dilation, "dilation", 1, "non-positive dilation");
  check_pair(geometry.padding, "padding", 0, "negative padding");  // last: 'same' makes it of the others
  check(input[1] > 0, "expected input to have at least one channel, but got input of size ", listed(input));
  check(weight[0] > 0 && weight[0] % input[1] == 0, "Given weight of size ", listed(weight), ", expected the ",
        weight[0], " filters to be a positive multiple of the channels of input, but got input of size ", listed(input),
        " with ", input[1], " channels");
  check(input[2] > 0 && input[3] > 0, "expected input to have a non-empty height and width, but got input of size ",
        listed(input));

  Problem p;
  p.batch = input[0], p.channels = input[1], p.height = input[2], p.width = input[3];
  p.multiplier = weight[0] / input[1];
  p.kernel_h = weight[2], p.kernel_w = weight[3];
  p.stride_h = geometry.stride[0], p.stride_w = geometry.stride[1];
  p.padding_h = geometry.padding[0], p.padding_w = geometry.padding[1];
  p.dilation_h = geometry.dilation[0], p.dilation_w = geometry.dilation[1];
  p.out_height = output_size(p.height, p.kernel_h, p.stride_h, p.padding_h, p.dilation_h);
  p.out_width = output_size(p.width, p.kernel_w, p.stride_w, p.padding_w, p.dilation_w);
  check(p.out_height > 0 && p.out_width > 0, "Calculated padded input size per channel: (", p.height + 2 * p.padding_h,
        " x ", p.width + 2 * p.padding_w, "). Kernel size: (", p.dilation_h * (p.kernel_h - 1) + 1, " x ",
        p.dilation_w * (p.kernel_w - 1) + 1, "). Kernel size can't be greater than actual input size");
  return p;
}

void check_is_output(const Tensor& grad_output, const Problem& p) {
  const std::array<int64_t, 4> expected = {p.batch, p.filters(), p.out_height, p.out_width};
  const auto sizes = grad_output.sizes();
  for (int i = 0; i < 4; ++i)
    check(sizes[i] == expected[i], "expected grad_output to be of size ", listed(expected),
          ", but got grad_output of size ", listed(sizes));
}

// ATen's suggest_memory_format() == channels_last, which settles the ties of sizes 1 by the strides.
bool is_channels_last(const Tensor& tensor) {
  const auto size = tensor.sizes();
  const auto stride = tensor.strides();
  if (size.size() != 4 || stride[1] == 0) return false;
  int64_t least = 0;
  for (const int d : {1, 3, 2, 0}) {
    if (size[d] == 0 || stride[d] < least) return false;
    if (d == 0 && least == stride[1]) return false;  // N111 and the like count as contiguous
    least = stride[d] * (size[d] > 1 ? size[d] : 1);
  }
  return true;
}

// Below the dispatcher's boxed calls, which cost the host as much as a launch.
Tensor empty_of(int32_t dtype, IntsRef size, bool channels_last, const Tensor& like) {
  std::array<int64_t, 4> stride;
  int64_t step = 1;
  const auto lay = [&](size_t d) { stride[d] = step, step *= std::max<int64_t>(size[d], 1); };
  if (channels_last) {
    for (const size_t d : {1, 3, 2, 0}) lay(d);
  } else {
    for (size_t d = size.size(); d-- > 0;) lay(d);
  }
  int32_t device = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device));
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(size.size()), size.data(), stride.data(), dtype,
                                                  device, like.get_device_index(), &handle));
  return Tensor(handle);
}

}  // namespace

DType dtype_of(const Tensor& tensor, const char* name) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return DType::kFloat32;
    case ScalarType::Double: return DType::kFloat64;
    case ScalarType::Half: return DType::kFloat16;
    case ScalarType::BFloat16: return DType::kBFloat16;
    default: break;
  }
  check(false, "expected ", name, " to be of dtype float32, float64, float16 or bfloat16, but got ",
        torch::headeronly::toString(tensor.scalar_type()));
  return DType::kFloat32;
}

Problem check_forward(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
                      const Geometry& geometry) {
  check(input.dim() == 4,
        "Expected 3D (unbatched) or 4D (batched) input to conv2d, but got input of size: ", listed(input.sizes()));
  check_rank(weight, "weight");
  check_same(input, "Input", weight, "weight");
  Problem p = problem_of(input.sizes(), weight.sizes(), geometry);
  p.pass = Pass::kForward;
  p.dtype = dtype_of(input, "input");
  p.input = view_of(input);
  p.weight = view_of(weight);
  if (bias) {
    check(bias->dim() == 1 && bias->size(0) == p.filters(), "Given weight of size ", listed(weight.sizes()),
          ", expected bias to be 1-dimensional with ", p.filters(), " elements, but got bias of size ",
          listed(bias->sizes()), " instead");
    check_same(input, "Input", *bias, "bias");
    p.bias = bias->data_ptr();
    p.bias_stride = bias->stride(0);
  }
  return p;
}

Problem check_grad_input(const Tensor& grad_output, const Tensor& weight, IntsRef input_size,
                         const Geometry& geometry) {
  check_rank(grad_output, "grad_output");
  check_rank(weight, "weight");
  check_same(grad_output, "grad_output", weight, "weight");
  check(input_size.size() == 4 && input_size[0] >= 0,
        "expected input_size to be [N, C, H, W], but got input_size=", listed(input_size));
  Problem p = problem_of(input_size, weight.sizes(), geometry);
  check_is_output(grad_output, p);
  p.pass = Pass::kGradInput;
  p.dtype = dtype_of(grad_output, "grad_output");
  p.weight = view_of(weight);
  p.output = view_of(grad_output);
  return p;
}

Problem check_grad_weight(const Tensor& grad_output, const Tensor& input, IntsRef kernel_size,
                          const Geometry& geometry) {
  check_rank(grad_output, "grad_output");
  check_rank(input, "input");
  check_same(grad_output, "grad_output", input, "input");
  check_pair(kernel_size, "kernel_size", 1, "an empty kernel");
  const std::array<int64_t, 4> weight_size = {grad_output.size(1), 1, kernel_size[0], kernel_size[1]};
  Problem p = problem_of(input.sizes(), weight_size, geometry);
  check_is_output(grad_output, p);
  p.pass = Pass::kGradWeight;
  p.dtype = dtype_of(input, "input");
  p.input = view_of(input);
  p.output = view_of(grad_output);
  return p;
}

bool output_is_channels_last(const Tensor& input, const Tensor& weight) {
  return input.size(0) > 0 && (is_channels_last(input) || is_channels_last(weight));
}

std::optional<Tensor> room_for_cast(const Tensor& tensor, const char* name, const Tensor& like) {
  check_same_device(like, "Input", tensor, name);
  const auto is_cast = [](ScalarType type) {
    return type == ScalarType::Float || type == ScalarType::Half || type == ScalarType::BFloat16;
  };
  const ScalarType from = tensor.scalar_type(), to = like.scalar_type();
  if (from == to || !is_cast(from) || !is_cast(to) || tensor.dim() > 4) return std::nullopt;
  return empty(tensor.sizes(), is_channels_last(tensor), like);
}

Tensor empty(IntsRef size, bool channels_last, const Tensor& like) {
  int32_t dtype = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(like.get(), &dtype));
  return empty_of(dtype, size, channels_last, like);
}

Tensor empty_float32(IntsRef size, bool channels_last, const Tensor& like) {
  return empty_of(aoti_torch_dtype_float32(), size, channels_last, like);
}

View view_of(const Tensor& tensor) {
  View view;
  view.data = tensor.data_ptr();
  const auto strides = tensor.strides();
  for (size_t i = 0; i < strides.size() && i < 4; ++i) view.stride[i] = strides[i];
  return view;
}

}  // namespace dwconv
