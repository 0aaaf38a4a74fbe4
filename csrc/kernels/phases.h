// A problem with a stride or a dilation as one without: what claims_large.cpp and kernels/phases.cu have to know of it.
//
// Along a side, output number o and tap number t meet input number stride * o + dilation * t - padding. Let L be the
// least common multiple of stride and dilation. Outputs that lie L / stride apart and taps that lie L / dilation apart
// meet inputs that lie L apart: output L / stride * o' + q and tap L / dilation * t' + r meet input
// L * (o' + t') + stride * q + dilation * r - padding. So each phase (q, r) is a problem at stride 1 without dilation.
// All of them make one problem: phases of outputs are images of it, phases of taps are channels.
#pragma once

#include <algorithm>
#include <numeric>

#include "../problem.h"

namespace dwconv {

// One side of the images.
struct PhasesOfSide {
  int64_t step = 1;               // L
  int64_t apart = 1, every = 1;   // outputs, and taps, of a phase: L / stride, L / dilation
  int64_t outputs = 1, taps = 1;  // phases of them that there are
  int64_t stride = 1, dilation = 1;
  int64_t size = 0, out_size = 0, kernel = 0, padding = 0;  // of the problem that they make
  int64_t first = 0;      // input number that the first pixel of the first phase is; others lie behind it
  bool is_exact = false;  // whether no phase is smaller than others: else zeros follow it

  PhasesOfSide(int64_t size_, int64_t out_size_, int64_t kernel_, int64_t stride_, int64_t padding_, int64_t dilation_)
      : stride(stride_), dilation(dilation_) {
    step = std::lcm(stride, dilation), apart = step / stride, every = step / dilation;
    outputs = std::min(apart, out_size_), taps = std::min(every, kernel_);
    out_size = (out_size_ + apart - 1) / apart, kernel = (kernel_ + every - 1) / every;
    const int64_t last = stride * (outputs - 1) + dilation * (taps - 1);  // that a phase lies behind the first one
    padding = std::max<int64_t>((padding_ + step - 1 - last) / step, 0);
    first = step * padding - padding_;
    // As many pixels as the phase with the most of them has, and outputs meet.
    const int64_t met = out_size + kernel - 1 - padding;
    size = std::min((size_ - 1 - first) / step + 1, met);
    const int64_t made = size + 2 * padding - kernel + 1;
    if (made < out_size)
      size += out_size - made;
    else
      out_size = made;
    is_exact = first >= 0 && first + last + step * (size - 1) < size_ && out_size * outputs == out_size_;
  }
};

struct Phases {
  PhasesOfSide h, w;
  bool in_planes;     // whether columns lie side by side in the copies, or channels
  bool keeps_output;  // whether the problem takes the output as it is: it has one phase
  bool keeps_weight;  // the same of the weight
  Problem problem;    // all pointers to copies are null

  explicit Phases(const Problem& p)
      : h(p.height, p.out_height, p.kernel_h, p.stride_h, p.padding_h, p.dilation_h),
        w(p.width, p.out_width, p.kernel_w, p.stride_w, p.padding_w, p.dilation_w),
        problem(p) {
    const bool narrow = size_of(p.dtype) == 2;
    const bool channels_last = p.input.stride[1] == 1 || p.output.stride[1] == 1;
    // Where pixels are no whole vectors, or plans need rows all the same, the copies may as well be of planes.
    in_planes = !channels_last || p.channels % (narrow ? 8 : 4) != 0 ||
                (narrow && p.pass == Pass::kGradWeight && p.multiplier > 1);
    keeps_weight = taps() == 1 && p.pass != Pass::kGradWeight;
    keeps_output = taps() == 1 && outputs() == 1 && h.is_exact && w.is_exact;
    problem.batch = p.batch * outputs(), problem.channels = p.channels * taps();
    problem.height = h.size, problem.width = w.size, problem.out_height = h.out_size, problem.out_width = w.out_size;
    problem.kernel_h = h.kernel, problem.kernel_w = w.kernel;
    problem.padding_h = h.padding, problem.padding_w = w.padding;
    problem.stride_h = problem.stride_w = problem.dilation_h = problem.dilation_w = 1;
    problem.allow_fft = false;
    problem.input = dense(problem.channels, h.size, w.size);
    if (!keeps_output) problem.output = dense(problem.filters(), h.out_size, w.out_size);
    if (!keeps_weight) problem.weight = {nullptr, {h.kernel * w.kernel, h.kernel * w.kernel, w.kernel, 1}};
  }

  int64_t outputs() const { return h.outputs * w.outputs; }
  int64_t taps() const { return h.taps * w.taps; }

 private:
  View dense(int64_t channels, int64_t height, int64_t width) const {
    if (in_planes) return {nullptr, {channels * height * width, height * width, width, 1}};
    return {nullptr, {channels * height * width, 1, width * channels, channels}};
  }
};

}  // namespace dwconv
