// dwconv._C: what Python asks of the binary itself. Loading it registers the operators (library.cpp).
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "packed_geometry.h"
#include "plan.h"
#include "short_way.h"

namespace py = pybind11;

namespace {

using dwconv::DType;
using dwconv::Pass;
using dwconv::Problem;
using Pair = std::array<int64_t, 2>;
using Quad = std::array<int64_t, 4>;

py::dict build_info() {
  py::dict info;
  info["version"] = DWCONV_VERSION;
#ifdef DWCONV_CUDA_VERSION
  info["cuda"] = DWCONV_CUDA_VERSION;
#else
  info["cuda"] = py::none();
#endif
  info["cuda_architectures"] = DWCONV_CUDA_ARCHITECTURES;
  info["torch"] = DWCONV_TORCH_VERSION;
  return info;
}

Pass pass_named(const std::string& name) {
  if (name == "forward") return Pass::kForward;
  if (name == "grad_input") return Pass::kGradInput;
  if (name == "grad_weight") return Pass::kGradWeight;
  throw std::invalid_argument("there is no pass '" + name + "'");
}

DType dtype_named(const std::string& name) {
  if (name == "float32") return DType::kFloat32;
  if (name == "float64") return DType::kFloat64;
  if (name == "float16") return DType::kFloat16;
  if (name == "bfloat16") return DType::kBFloat16;
  throw std::invalid_argument("there is no plan for dtype '" + name + "'");
}

Problem make_problem(const std::string& pass, const std::string& dtype, const Quad& input_size,
                     const Quad& input_stride, const Quad& weight_size, const Quad& output_stride, const Pair& stride,
                     const Pair& padding, const Pair& dilation, int64_t capability, int64_t shared_memory,
                     bool allow_fft) {
  Problem p;
  p.pass = pass_named(pass);
  p.dtype = dtype_named(dtype);
  p.batch = input_size[0], p.channels = input_size[1], p.height = input_size[2], p.width = input_size[3];
  if (p.channels < 1 || weight_size[0] < p.channels || weight_size[0] % p.channels != 0)
    throw std::invalid_argument("the filters must be a positive multiple of the channels");
  p.multiplier = weight_size[0] / p.channels;
  p.kernel_h = weight_size[2], p.kernel_w = weight_size[3];
  p.stride_h = stride[0], p.stride_w = stride[1];
  p.padding_h = padding[0], p.padding_w = padding[1];
  p.dilation_h = dilation[0], p.dilation_w = dilation[1];
  if (std::min({p.batch, p.padding_h, p.padding_w}) < 0)
    throw std::invalid_argument("the batch and the padding must not be negative");
  const auto sizes = {p.height, p.width, p.kernel_h, p.kernel_w, p.stride_h, p.stride_w, p.dilation_h, p.dilation_w};
  if (std::min(sizes) < 1) throw std::invalid_argument("sizes, stride and dilation must be positive");
  p.out_height = dwconv::output_size(p.height, p.kernel_h, p.stride_h, p.padding_h, p.dilation_h);
  p.out_width = dwconv::output_size(p.width, p.kernel_w, p.stride_w, p.padding_w, p.dilation_w);
  if (p.out_height < 1 || p.out_width < 1) throw std::invalid_argument("the output is empty");
  p.capability = capability, p.shared_memory = shared_memory, p.allow_fft = allow_fft;
  for (int i = 0; i < 4; ++i) p.input.stride[i] = input_stride[i], p.output.stride[i] = output_stride[i];
  return p;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  if (!dwconv::add_short_way(m.ptr())) throw py::error_already_set();
  m.def("build_info", &build_info, "What this binary was built with and for.");
  m.def(
      "unpack_geometry",
      [](int64_t packed) {
        const dwconv::PackedGeometry geometry(packed);
        return std::pair(geometry.numbers(), geometry.casts());
      },
      py::arg("packed"),
      "Of stride, padding and dilation the vertical and the horizontal number; and whether weights are cast.");
  m.def(
      "plans",
      [](const std::string& pass, const std::string& dtype, const Quad& input_size, const Quad& input_stride,
         const Quad& weight_size, const Quad& output_stride, const Pair& stride, const Pair& padding,
         const Pair& dilation, int64_t capability, int64_t shared_memory, bool allow_fft) {
        const Problem problem =
            dwconv::without_far_taps(make_problem(pass, dtype, input_size, input_stride, weight_size, output_stride,
                                                  stride, padding, dilation, capability, shared_memory, allow_fft));
        std::vector<std::pair<std::string, std::string>> found;
        for (const dwconv::Plan* plan : dwconv::claimants(problem)) found.emplace_back(plan->name, plan->reason);
        return found;
      },
      py::arg("pass_name"), py::arg("dtype"), py::arg("input_size"), py::arg("input_stride"), py::arg("weight_size"),
      py::arg("output_stride"), py::arg("stride"), py::arg("padding"), py::arg("dilation"),
      py::arg("capability") = Problem{}.capability, py::arg("shared_memory") = Problem{}.shared_memory,
      py::arg("allow_fft") = false,
      "Name and reason of every plan that can serve a problem on a GPU of that compute capability (90 is 9.0) with\n"
      "that much shared memory a block (bytes); the first one does.");
}
