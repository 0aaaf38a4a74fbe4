// What gather.cu and gather_grad_weight.cu share: patches of a kernel, and elements of every type, loaded one by one.
#pragma once

#include <algorithm>
#include <iterator>
#include <tuple>

#include "direct.cuh"

namespace dwconv {

// Taps of a kernel that are taken at once.
template <int rows, int columns>
struct Patch {
  static constexpr int kRows = rows, kColumns = columns, kTaps = rows * columns;

  static int64_t count(int64_t kernel_h, int64_t kernel_w) {
    return ceil_div(kernel_h, kRows) * ceil_div(kernel_w, kColumns);
  }
};

// Calls visit(Patch) with the first one of those for which cost(Patch) is least.
template <typename Patches, typename Cost, typename Visitor>
void visit_best_patch(Cost&& cost, Visitor&& visit) {
  std::apply(
      [&](auto... patch) {
        const double costs[] = {cost(patch)...};
        const auto best = std::min_element(std::begin(costs), std::end(costs)) - std::begin(costs);
        int number = 0;
        ((number++ == best && (visit(patch), true)), ...);
      },
      Patches{});
}

// Beyond all offsets within a plane; twice as much is as well.
inline constexpr uint32_t kBeside = 1u << 30;

// The address of an element, in one instruction: a compiler adds up offsets of 32 bits in 64.
template <typename T>
__device__ const T* element_at(const T* from, uint32_t offset) {
  const T* to;
  asm("mad.wide.u32 %0, %1, %2, %3;" : "=l"(to) : "r"(offset), "n"(sizeof(T)), "l"(from));
  return to;
}

// An element as it is loaded: float64, or the bits of a smaller one.
template <typename T>
using Loaded = std::conditional_t<sizeof(T) == sizeof(double), double, uint32_t>;

// An element from memory, zero where not `inside`. In the order in which it is written, so that all of a thread's loads
// are in flight before the first one is waited for.
template <typename T>
__device__ Loaded<T> load_element(const T* from, bool inside) {
  if constexpr (sizeof(T) == sizeof(double)) {
    double value;
    asm volatile("{ .reg .pred p; setp.ne.b32 p, %2, 0; mov.b64 %0, 0; @p ld.global.b64 %0, [%1]; }"
                 : "=d"(value)
                 : "l"(from), "r"(static_cast<int>(inside)));
    return value;
  } else {
    return load_one(from, inside);
  }
}

template <typename T>
__device__ Accumulator<T> widen_element(Loaded<T> element) {
  if constexpr (sizeof(T) == sizeof(double))
    return element;
  else
    return widen_one<T>(element);
}

}  // namespace dwconv
