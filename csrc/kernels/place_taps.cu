// The gradient of a kernel of whose taps only some in the middle meet the images: those, computed as the gradient of a
// smaller kernel, and zeros around them.
#include "place_taps.h"

#include "common.cuh"
#include "overlap.cuh"

namespace dwconv {
namespace {

constexpr int kThreads = 256, kEach = 4;  // kEach: elements of a thread

struct Arguments {
  const void* middle;
  void* whole;
  uint32_t elements;
  int middle_h, middle_w, first_h, first_w;
  Divider by_w, by_h;
};

template <typename Element>
__global__ void __launch_bounds__(kThreads) place_taps(const __grid_constant__ Arguments a) {
  let_next_kernel_start();
  const uint32_t first = blockIdx.x * (kThreads * kEach) + threadIdx.x;
  wait_for_kernel_before();
#pragma unroll
  for (int k = 0; k < kEach; ++k) {
    const uint32_t index = first + k * kThreads;
    if (index >= a.elements) return;
    uint32_t filter = index;
    const int j = a.by_w.split(filter) - a.first_w, i = a.by_h.split(filter) - a.first_h;
    const bool inside = static_cast<uint32_t>(i) < static_cast<uint32_t>(a.middle_h) &&
                        static_cast<uint32_t>(j) < static_cast<uint32_t>(a.middle_w);
    static_cast<Element*>(a.whole)[index] =
        inside ? static_cast<const Element*>(a.middle)[(int64_t{filter} * a.middle_h + i) * a.middle_w + j] : Element{};
  }
}

}  // namespace

void launch_place_taps(const PlacedTaps& taps, cudaStream_t stream) {
  const int64_t elements = taps.filters * taps.whole_h * taps.whole_w;
  const Arguments a{taps.middle,
                    taps.whole,
                    static_cast<uint32_t>(elements),
                    static_cast<int>(taps.middle_h),
                    static_cast<int>(taps.middle_w),
                    static_cast<int>(taps.first_h()),
                    static_cast<int>(taps.first_w()),
                    Divider(taps.whole_w),
                    Divider(taps.whole_h)};
  const auto launch = [&](auto kernel) {
    launch_early(kernel, a, ceil_div(elements, kThreads * kEach), kThreads, stream);
  };
  if (taps.bytes == 2)
    launch(place_taps<uint16_t>);
  else if (taps.bytes == 4)
    launch(place_taps<uint32_t>);
  else
    launch(place_taps<uint64_t>);
  check_launch("place_taps");
}

}  // namespace dwconv
