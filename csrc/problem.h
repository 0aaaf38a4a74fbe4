// A depthwise 2-D convolution as plain integers and pointers: all that plans and kernels ever see.
#pragma once

#include <cstdint>

namespace dwconv {

enum class Pass : int { kForward, kGradInput, kGradWeight };
enum class DType : int { kFloat32, kFloat64, kFloat16, kBFloat16 };

inline int64_t size_of(DType dtype) {
  return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2;
}

// A 4-D array in memory: its first element and, per dimension, the elements from one index to the next.
struct View {
  void* data = nullptr;
  int64_t stride[4] = {};
};

// Whether columns lie side by side.
inline bool has_rows(const View& view, int64_t width) {
  return view.stride[3] == 1 || width == 1;
}

// The number of output positions along one side; not positive where the kernel exceeds the padded input.
inline int64_t output_size(int64_t size, int64_t kernel, int64_t stride, int64_t padding, int64_t dilation) {
  const int64_t room = size + 2 * padding - dilation * (kernel - 1) - 1;
  return room < 0 ? 0 : room / stride + 1;
}

// All three passes speak of the same three arrays; the pass says which one is written:
//   forward writes output, grad_input writes input, grad_weight writes weight (and bias).
// Filter f = c * multiplier + q reads input channel c and writes output channel f.
struct Problem {
  Pass pass = Pass::kForward;
  DType dtype = DType::kFloat32;

  int64_t batch = 0, channels = 0, multiplier = 1;
  int64_t height = 0, width = 0;          // of the input
  int64_t out_height = 0, out_width = 0;  // of the output
  int64_t kernel_h = 0, kernel_w = 0;
  int64_t stride_h = 1, stride_w = 1;
  int64_t padding_h = 0, padding_w = 0;
  int64_t dilation_h = 1, dilation_w = 1;

  View input;            // (N, C, H, W), or its gradient
  View weight;           // (C * multiplier, 1, kH, kW), or its gradient
  View output;           // (N, C * multiplier, H_out, W_out), or its gradient
  void* bias = nullptr;  // (C * multiplier,), or its gradient; null for none
  int64_t bias_stride = 1;

  int64_t capability = 90;            // of the device: 10 * major + minor
  int64_t shared_memory = 227 << 10;  // bytes that a block may have on the device

  bool allow_fft = false;  // whether the caller lets Fourier transforms serve

  int64_t filters() const { return channels * multiplier; }
  int64_t taps() const { return kernel_h * kernel_w; }
};

}  // namespace dwconv
