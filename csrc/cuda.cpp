// The operators on CUDA tensors: check, choose a plan, launch on the current stream.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "conv2d.h"
#include "kernels/cast.h"
#include "kernels/device.h"
#include "kernels/launch.h"
#include "kernels/place_taps.h"
#include "kernels/realign.h"
#include "kernels/widening.h"
#include "plan.h"

// Weak, so that a CPU build of torch, which lacks it, can load this library and serve CPU tensors.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device, void** stream);

namespace dwconv {
namespace {

cudaStream_t current_stream(int32_t device) {
  void* stream = nullptr;
  if (aoti_torch_get_current_cuda_stream == nullptr || aoti_torch_get_current_cuda_stream(device, &stream) != 0)
    throw std::runtime_error("dwconv: torch has no current CUDA stream");
  return static_cast<cudaStream_t>(stream);
}

// What is launched as long as it lives goes to the tensor's device.
class On {
 public:
  explicit On(const Tensor& tensor) {
    const int32_t device = tensor.get_device_index();
    int current = -1;
    if (cudaGetDevice(&current) != cudaSuccess || current != device) guard_.emplace(device);
    stream_ = current_stream(device);
  }
  cudaStream_t stream() const { return stream_; }

 private:
  std::optional<torch::stable::accelerator::DeviceGuard> guard_;
  cudaStream_t stream_;
};

void cast_elements(const View& source, DType from, const Tensor& target, DType to) {
  Cast c{from, to, source, view_of(target)};
  for (int64_t d = 0; d < target.dim(); ++d) c.size[d] = target.size(d);
  launch_cast(c, On(target).stream());
}

// `tensor` in the dtype of `like`.
Tensor cast(const Tensor& tensor, const char* name, const Tensor& like) {
  const std::optional<Tensor> room = room_for_cast(tensor, name, like);
  if (!room) return tensor;
  cast_elements(view_of(tensor), dtype_of(tensor, name), *room, dtype_of(like, "input"));
  return *room;
}

// How a call is to be served: by the plan of that name, unless it is empty; with Fourier transforms among the plans,
// which naming one allows; with the memory of `room`, which nobody needs until then, for scratch: each allocation costs
// the host as much as half a launch.
struct By {
  std::string plan;
  bool allow_fft = !plan.empty();
  const Tensor* room = nullptr;
};

// Launches what a plan that claims the problem takes.
void launch(const Plan& plan, const Problem& problem, const Allocate& allocate, cudaStream_t stream) {
  switch (plan.id) {
    case PlanId::kFft: return launch_fft(problem, allocate, stream);
    case PlanId::kFftGradWeight: return launch_fft_grad_weight(problem, allocate, stream);
    case PlanId::kScale: return launch_scale(problem, stream);
    case PlanId::kDirect: return launch_direct(problem, stream);
    case PlanId::kDirectGradWeight: return launch_direct_grad_weight(problem, stream);
    case PlanId::kGather: return launch_gather(problem, stream);
    case PlanId::kGatherGradWeight: return launch_gather_grad_weight(problem, stream);
    case PlanId::kToeplitzSmallPlanes: return launch_toeplitz_small_planes(problem, true, stream);
    case PlanId::kToeplitzSmallPlanesPortable: return launch_toeplitz_small_planes(problem, false, stream);
    case PlanId::kToeplitzNchw: return launch_toeplitz_nchw(problem, true, allocate, stream);
    case PlanId::kToeplitzNchwPortable: return launch_toeplitz_nchw(problem, false, allocate, stream);
    case PlanId::kMarchNchw: return launch_march_nchw(problem, true, allocate, stream);
    case PlanId::kMarchNchwPortable: return launch_march_nchw(problem, false, allocate, stream);
    case PlanId::kStreamNchw: return launch_stream_nchw(problem, true, allocate, stream);
    case PlanId::kStreamNchwPortable: return launch_stream_nchw(problem, false, allocate, stream);
    case PlanId::kBatchGradWeightNchw: return launch_batch_grad_weight_nchw(problem, true, allocate, stream);
    case PlanId::kBatchGradWeightNchwPortable: return launch_batch_grad_weight_nchw(problem, false, allocate, stream);
    case PlanId::kToeplitzGradWeightNchw: return launch_toeplitz_grad_weight_nchw(problem, true, allocate, stream);
    case PlanId::kToeplitzGradWeightNchwPortable:
      return launch_toeplitz_grad_weight_nchw(problem, false, allocate, stream);
    case PlanId::kMarchGradWeightNchw: return launch_march_grad_weight_nchw(problem, true, allocate, stream);
    case PlanId::kMarchGradWeightNchwPortable: return launch_march_grad_weight_nchw(problem, false, allocate, stream);
    case PlanId::kStreamGradWeightNchw: return launch_stream_grad_weight_nchw(problem, true, allocate, stream);
    case PlanId::kStreamGradWeightNchwPortable: return launch_stream_grad_weight_nchw(problem, false, allocate, stream);
    case PlanId::kToeplitzLarge: return launch_toeplitz_large(problem, allocate, stream);
    case PlanId::kToeplitzChannelsLast: return launch_toeplitz_channels_last(problem, allocate, stream);
    case PlanId::kMarchChannelsLast: return launch_march_channels_last(problem, stream);
    case PlanId::kFlatGradWeightChannelsLast: return launch_flat_grad_weight_channels_last(problem, allocate, stream);
    case PlanId::kMarchGradWeightChannelsLast: return launch_march_grad_weight_channels_last(problem, allocate, stream);
    case PlanId::kToeplitzGradWeightChannelsLast:
      return launch_toeplitz_grad_weight_channels_last(problem, allocate, stream);
    case PlanId::kLargeFloat32: return launch_large_float32(problem, stream);
    case PlanId::kLargeFloat32GradWeight: return launch_large_float32_grad_weight(problem, allocate, stream);
    case PlanId::kOuterGradWeight: return launch_outer_grad_weight(problem, allocate, stream);
    case PlanId::kHankelGradWeight: return launch_hankel_grad_weight(problem, allocate, stream);
    case PlanId::kPhases:
      return launch_phases(
          problem, allocate, [&](const Problem& made) { launch(choose(made), made, allocate, stream); }, stream);
    case PlanId::kWindowsNchw: return launch_windows_nchw(problem, stream);
    case PlanId::kColumnsGradWeight: return launch_columns_grad_weight(problem, allocate, stream);
    case PlanId::kWalkGradWeightChannelsLast: return launch_walk_grad_weight_channels_last(problem, allocate, stream);
    case PlanId::kWindowsChannelsLast: return launch_windows_channels_last(problem, allocate, stream);
    case PlanId::kGeneric: return launch_generic(problem, allocate, stream);
  }
}

// Launches what the problem asks for.
void run(Problem& problem, const Tensor& like, const By& by) {
  const int32_t device = like.get_device_index();
  problem.capability = device_of(device).capability;
  problem.shared_memory = device_of(device).shared_per_block;
  problem.allow_fft = by.allow_fft;
  const Plan& chosen = by.plan.empty() ? choose(problem) : choose(problem, by.plan);
  if (problem.pass != Pass::kGradWeight && problem.batch == 0) return;  // nothing to write
  const On on(like);
  const cudaStream_t stream = on.stream();
  std::vector<Tensor> scratch;
  constexpr int64_t kAlign = 512;
  int64_t left = by.room ? by.room->numel() * size_of(problem.dtype) / kAlign * kAlign : 0;
  const auto allocate = [&](int64_t bytes) -> void* {
    const int64_t taken = (bytes + kAlign - 1) / kAlign * kAlign;
    if (by.room && taken <= left) return static_cast<char*>(by.room->data_ptr()) + (left -= taken);
    return scratch.emplace_back(empty({bytes / size_of(problem.dtype) + 1}, false, like)).data_ptr();
  };
  launch(chosen, problem, allocate, stream);
}

Tensor forward_by(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
                  const Geometry& geometry, const By& by) {
  Problem problem = without_far_taps(check_forward(input, weight, bias, geometry));
  Tensor output = empty({problem.batch, problem.filters(), problem.out_height, problem.out_width},
                        output_is_channels_last(input, weight), input);
  problem.output = view_of(output);
  run(problem, input, by);
  return output;
}

Tensor run_forward(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
                   const Geometry& geometry) {
  return forward_by(input, weight, bias, geometry, {});
}

Tensor run_grad_input(const Tensor& grad_output, const Tensor& weight, IntsRef input_size, const Geometry& geometry,
                      bool channels_last, const By& by = {}) {
  Problem problem = without_far_taps(check_grad_input(grad_output, weight, input_size, geometry));
  Tensor grad_input = empty(input_size, channels_last, grad_output);
  problem.input = view_of(grad_input);
  run(problem, grad_output, by);
  return grad_input;
}

// The gradient of all taps, of that of those in the middle.
Tensor with_far_taps(const Tensor& middle, IntsRef kernel_size) {
  Tensor whole = empty({middle.size(0), 1, kernel_size[0], kernel_size[1]}, false, middle);
  launch_place_taps({middle.data_ptr(), whole.data_ptr(), size_of(dtype_of(middle, "weight")), middle.size(0),
                     middle.size(2), middle.size(3), kernel_size[0], kernel_size[1]},
                    On(middle).stream());
  return whole;
}

// The gradient of the bias is there only if it is wanted. Where the weights were cast, both are of float32.
std::tuple<Tensor, std::optional<Tensor>> run_grad_weight(const Tensor& grad_output, const Tensor& input,
                                                          IntsRef kernel_size, const Geometry& geometry, bool bias,
                                                          const By& by = {}) {
  Problem problem = without_far_taps(check_grad_weight(grad_output, input, kernel_size, geometry));
  const bool widens = geometry.casts && size_of(problem.dtype) == 2;
  const auto room = widens ? empty_float32 : empty;
  Tensor grad_weight = room({problem.filters(), 1, problem.kernel_h, problem.kernel_w}, false, input);
  std::optional<Tensor> grad_bias;
  if (bias) grad_bias = room({problem.filters()}, false, input);
  problem.weight = view_of(grad_weight);
  if (bias) problem.bias = grad_bias->data_ptr();
  std::optional<Widening> widening;
  if (widens) widening.emplace();
  run(problem, input, by);
  if (widens && !widening->is_done()) {  // then they lie at the beginning of their room, in the images' dtype
    const auto widen = [&](Tensor& narrow) {
      const Tensor wide = empty_float32(narrow.sizes(), false, narrow);
      cast_elements(view_of(narrow), problem.dtype, wide, DType::kFloat32);
      narrow = wide;
    };
    widen(grad_weight);
    if (bias) widen(*grad_bias);
  }
  if (problem.kernel_h < kernel_size[0] || problem.kernel_w < kernel_size[1])
    grad_weight = with_far_taps(grad_weight, kernel_size);
  return {grad_weight, grad_bias};
}

std::tuple<Tensor, Tensor, std::optional<Tensor>> run_backward(const Tensor& grad_output, const Tensor& input,
                                                               const Tensor& weight, const Geometry& geometry,
                                                               bool bias) {
  Problem problem = without_far_taps(check_grad_input(grad_output, weight, input.sizes(), geometry));
  const Tensor grad_input = empty(input.sizes(), output_is_channels_last(input, weight), grad_output);
  // First, while the other's memory is free for partial sums.
  const auto [grad_weight, grad_bias] =
      run_grad_weight(grad_output, input, {weight.sizes().data() + 2, 2}, geometry, bias, {.room = &grad_input});
  problem.input = view_of(grad_input);
  run(problem, grad_output, {});
  return {grad_input, grad_weight, grad_bias};
}

Tensor forward(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias, const Ints& stride,
               const Ints& padding, const Ints& dilation, bool allow_fft) {
  return forward_by(input, weight, bias, {stride, padding, dilation}, {{}, allow_fft});
}

Tensor forward_plan(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias, const Ints& stride,
                    const Ints& padding, const Ints& dilation, const std::string& plan) {
  return forward_by(input, weight, bias, {stride, padding, dilation}, {plan});
}

Tensor grad_input(const Tensor& grad_output, const Tensor& weight, const Ints& input_size, const Ints& stride,
                  const Ints& padding, const Ints& dilation, bool channels_last, bool allow_fft) {
  return run_grad_input(grad_output, weight, input_size, {stride, padding, dilation}, channels_last, {{}, allow_fft});
}

Tensor grad_input_plan(const Tensor& grad_output, const Tensor& weight, const Ints& input_size, const Ints& stride,
                       const Ints& padding, const Ints& dilation, bool channels_last, const std::string& plan) {
  return run_grad_input(grad_output, weight, input_size, {stride, padding, dilation}, channels_last, {plan});
}

std::tuple<Tensor, Tensor> grad_weight_by(const Tensor& grad_output, const Tensor& input, const Ints& kernel_size,
                                          const Geometry& geometry, bool bias, const By& by) {
  const auto [grad_weight, grad_bias] = run_grad_weight(grad_output, input, kernel_size, geometry, bias, by);
  return {grad_weight, grad_bias ? *grad_bias : empty({0}, false, input)};
}

std::tuple<Tensor, Tensor> grad_weight_plan(const Tensor& grad_output, const Tensor& input, const Ints& kernel_size,
                                            const Ints& stride, const Ints& padding, const Ints& dilation, bool bias,
                                            const std::string& plan) {
  return grad_weight_by(grad_output, input, kernel_size, {stride, padding, dilation}, bias, {plan});
}

std::tuple<Tensor, Tensor> grad_weight(const Tensor& grad_output, const Tensor& input, const Ints& kernel_size,
                                       const Ints& stride, const Ints& padding, const Ints& dilation, bool bias,
                                       bool allow_fft) {
  return grad_weight_by(grad_output, input, kernel_size, {stride, padding, dilation}, bias, {{}, allow_fft});
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dwconv, CUDA, m) {
  m.impl("forward", TORCH_BOX(&forward));
  m.impl("grad_input", TORCH_BOX(&grad_input));
  m.impl("grad_weight", TORCH_BOX(&grad_weight));
  m.impl("forward.packed", TORCH_BOX((&forward_packed<cast, run_forward>)));
  m.impl("forward.packed_cast", TORCH_BOX((&forward_packed_cast<cast, run_forward>)));
  m.impl("backward.packed", TORCH_BOX(&backward_packed<run_backward>));
  m.impl("backward.packed_bias", TORCH_BOX(&backward_packed_bias<run_backward>));
  m.impl("forward.plan", TORCH_BOX(&forward_plan));
  m.impl("grad_input.plan", TORCH_BOX(&grad_input_plan));
  m.impl("grad_weight.plan", TORCH_BOX(&grad_weight_plan));
}

}  // namespace dwconv
