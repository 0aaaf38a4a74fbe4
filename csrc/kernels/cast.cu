#include "cast.h"

#include <limits>

#include "common.cuh"
#include "overlap.cuh"

namespace dwconv {
namespace {

constexpr int kThreads = 256;

struct Arguments {
  const void* source;
  void* target;
  int64_t source_stride[4], target_stride[4], elements;
  Divider by_size[3];  // of the inner dimensions
};

template <typename From, typename To>
__global__ void __launch_bounds__(kThreads) cast_elements(const __grid_constant__ Arguments a) {
  wait_for_kernel_before();
  let_next_kernel_start();
  const uint32_t first = blockIdx.x * kThreads + threadIdx.x;
  if (first >= a.elements) return;
  uint32_t index = first;
  int64_t from = 0, to = 0;
#pragma unroll
  for (int d = 3; d > 0; --d) {
    const uint32_t at = a.by_size[d - 1].split(index);
    from += at * a.source_stride[d], to += at * a.target_stride[d];
  }
  from += index * a.source_stride[0], to += index * a.target_stride[0];
  static_cast<To*>(a.target)[to] = narrow<To>(widen(static_cast<const From*>(a.source)[from]));
}

}  // namespace

void launch_cast(const Cast& cast, cudaStream_t stream) {
  if (cast.elements() > std::numeric_limits<int32_t>::max()) {  // more than an index of 32 bits counts: by halves
    for (const Cast& half : cast.halves()) launch_cast(half, stream);
    return;
  }
  Arguments a{};
  a.source = cast.source.data, a.target = cast.target.data, a.elements = cast.elements();
  for (int d = 0; d < 4; ++d) {
    a.source_stride[d] = cast.source.stride[d], a.target_stride[d] = cast.target.stride[d];
    if (d > 0) a.by_size[d - 1] = Divider(cast.size[d]);
  }
  if (a.elements == 0) return;
  visit_dtype(cast.from, [&](auto from) {
    visit_dtype(cast.to, [&](auto to) {
      using From = decltype(from);
      using To = decltype(to);
      if constexpr ((sizeof(From) <= 4 && sizeof(To) <= 4) || std::is_same_v<From, To>)
        launch_early(cast_elements<From, To>, a, ceil_div(a.elements, kThreads), kThreads, stream);
    });
  });
  check_launch("cast_elements");
}

}  // namespace dwconv
