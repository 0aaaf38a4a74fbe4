// The small kernels that are compiled one by one, with their taps unrolled: plans claim these, and the launchers of
// all algorithms that need them at compile time instantiate these.
#pragma once

#include <tuple>

#include "../problem.h"

namespace dwconv {

template <int kernel_h, int kernel_w, int stride, int dilation>
struct SmallKernel {
  static constexpr int kKernelH = kernel_h, kKernelW = kernel_w, kStride = stride, kDilation = dilation;
  static constexpr bool kSquare = kernel_h == kernel_w;

  static bool is_of(const Problem& p) {
    return p.kernel_h == kernel_h && p.kernel_w == kernel_w && p.stride_h == stride && p.stride_w == stride &&
           p.dilation_h == dilation && p.dilation_w == dilation;
  }
};

using SmallKernels =
    std::tuple<SmallKernel<1, 1, 1, 1>, SmallKernel<3, 3, 1, 1>, SmallKernel<3, 3, 2, 1>, SmallKernel<3, 3, 1, 2>,
               SmallKernel<5, 5, 1, 1>, SmallKernel<5, 5, 2, 1>, SmallKernel<7, 7, 1, 1>, SmallKernel<7, 7, 2, 1>,
               SmallKernel<1, 11, 1, 1>, SmallKernel<11, 1, 1, 1>>;

// One more in float32, but for grad_weight in channels_last.
using March9x9 = SmallKernel<9, 9, 1, 1>;

// Calls visit(SmallKernel) with the one of `Kernels` that the problem has. Returns whether there is one.
template <typename Kernels = SmallKernels, typename Visitor>
bool visit_small_kernel(const Problem& p, Visitor&& visit) {
  const auto visit_if = [&](auto kernel) { return kernel.is_of(p) && (visit(kernel), true); };
  return std::apply([&](auto... kernel) { return (visit_if(kernel) || ...); }, Kernels{});
}

inline bool is_small_kernel(const Problem& p) {
  return visit_small_kernel(p, [](auto) {});
}

}  // namespace dwconv
