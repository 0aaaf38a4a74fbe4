// The operators' schemas. Their implementations: cpu.cpp, cuda.cpp, and dwconv/_ops.py (fake tensors, autograd).
#include <torch/csrc/stable/library.h>

// grad_weight returns the bias's gradient with the weight's, empty unless `bias`. `allow_fft`: whether Fourier
// transforms may serve. The `packed` overloads are those of eager calls with nothing unusual about them (autograd.py):
// one argument for the geometry, and one call for all gradients; `packed_cast` returns the weight as it was cast, too,
// which is the one that `backward` is given. The `plan` overloads take a plan by name instead of
// the one the table chooses; they exist for tests, on CUDA only.
STABLE_TORCH_LIBRARY(dwconv, m) {
  m.def(
      "forward(Tensor input, Tensor weight, Tensor? bias, int[2] stride, int[2] padding, int[2] dilation, "
      "bool allow_fft=False) -> Tensor");
  m.def(
      "grad_input(Tensor grad_output, Tensor weight, SymInt[4] input_size, int[2] stride, int[2] padding, "
      "int[2] dilation, bool channels_last, bool allow_fft=False) -> Tensor");
  m.def(
      "grad_weight(Tensor grad_output, Tensor input, int[2] kernel_size, int[2] stride, int[2] padding, "
      "int[2] dilation, bool bias, bool allow_fft=False) -> (Tensor, Tensor)");

  m.def("forward.packed(Tensor input, Tensor weight, Tensor? bias, int geometry) -> Tensor");
  m.def("forward.packed_cast(Tensor input, Tensor weight, Tensor? bias, int geometry) -> (Tensor, Tensor)");
  m.def("backward.packed(Tensor grad_output, Tensor input, Tensor weight, int geometry) -> (Tensor, Tensor)");
  m.def(
      "backward.packed_bias(Tensor grad_output, Tensor input, Tensor weight, int geometry) -> "
      "(Tensor, Tensor, Tensor)");

  m.def(
      "forward.plan(Tensor input, Tensor weight, Tensor? bias, int[2] stride, int[2] padding, int[2] dilation, "
      "str plan) -> Tensor");
  m.def(
      "grad_input.plan(Tensor grad_output, Tensor weight, SymInt[4] input_size, int[2] stride, int[2] padding, "
      "int[2] dilation, bool channels_last, str plan) -> Tensor");
  m.def(
      "grad_weight.plan(Tensor grad_output, Tensor input, int[2] kernel_size, int[2] stride, int[2] padding, "
      "int[2] dilation, bool bias, str plan) -> (Tensor, Tensor)");
}
