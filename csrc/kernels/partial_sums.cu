// Adds up partial sums: as many threads a sum as it takes to have all loads under way at once, since the kernel is
// nothing but latency. Little is done before the first load, as blocks may find room only when the kernel before ends.
#include "partial_sums.h"

#include "common.cuh"
#include "device.h"
#include "overlap.cuh"
#include "widening.h"

namespace dwconv {
namespace {

struct Sums {
  const void* partial;
  void *grad_weight, *grad_bias;
  int64_t filters, taps, count;  // count: of the sums, those of the bias gradient too
  int splits;
  Divider by_blocks;  // that a tap takes
};

// A block takes kColumns filters of a tap, each by kLanes threads, which have kLoads under way. Sums are rounded to T
// and written as Gradient, which is T or wider.
template <typename T, typename Gradient, int kColumns, int kLanes, int kLoads>
__global__ void __launch_bounds__(kColumns* kLanes) add_partial_sums(const __grid_constant__ Sums a) {
  using Number = Accumulator<T>;
  let_next_kernel_start();
  uint32_t tap = blockIdx.x;
  const int column = threadIdx.x % kColumns, lane = threadIdx.x / kColumns;
  const int64_t filter = int64_t{a.by_blocks.split(tap)} * kColumns + column;
  const Number* from = static_cast<const Number*>(a.partial) + lane * a.count + tap * a.filters + filter;
  const int64_t step = kLanes * a.count;
  const bool is_there = filter < a.filters;
  wait_for_kernel_before();

  double total = 0;  // a long sum, of which there are few
#pragma unroll 1
  for (int left = is_there ? a.splits - lane : 0; left > 0; left -= kLoads * kLanes) {
    Number values[kLoads];
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {  // the last one once more where there is none: no branch between the loads
      values[i] = *from;
      if ((i + 1) * kLanes < left) from += step;
    }
#pragma unroll
    for (int i = 0; i < kLoads; ++i) total += i * kLanes < left ? values[i] : Number{0};
  }
  if constexpr (kLanes > 1) {
    constexpr int kWarps = kColumns * kLanes / 32;
    __shared__ double shared[kWarps][kColumns];
#pragma unroll
    for (int offset = kColumns; offset < 32; offset *= 2) total += __shfl_down_sync(~0u, total, offset);
    if (threadIdx.x % 32 < kColumns) shared[threadIdx.x / 32][column] = total;
    __syncthreads();
    if (lane > 0) return;
#pragma unroll
    for (int i = 1; i < kWarps; ++i) total += shared[i][column];
  }
  if (!is_there) return;
  auto* to = tap < a.taps ? static_cast<Gradient*>(a.grad_weight) + filter * a.taps + tap
                          : static_cast<Gradient*>(a.grad_bias) + filter;
  const T value = narrow<T>(static_cast<Number>(total));
  if constexpr (std::is_same_v<T, Gradient>)
    *to = value;
  else
    *to = widen(value);
}

template <typename T, typename Gradient, int kColumns, int kLanes, int kLoads = 8>
void launch(Sums sums, cudaStream_t stream) {
  const int64_t blocks = ceil_div(sums.filters, kColumns);
  sums.by_blocks = Divider(blocks);
  launch_early(add_partial_sums<T, Gradient, kColumns, kLanes, kLoads>, sums, sums.count / sums.filters * blocks,
               kColumns * kLanes, stream);
}

}  // namespace

void launch_add_partial_sums(const Problem& p, const void* partial, int64_t splits, cudaStream_t stream) {
  const int64_t slots = p.taps() + (p.bias != nullptr);
  const Sums sums{partial, p.weight.data, p.bias, p.filters(), p.taps(), slots * p.filters(), static_cast<int>(splits),
                  {}};
  // Long sums are shared by many threads, where these all run at once, but in no larger blocks than it takes to have
  // all loads under way: small ones find room beside those of the kernel before.
  const bool few = slots * ceil_div(p.filters(), 8) <= 4 * current_device().multiprocessors;
  const auto add = [&](auto element, auto gradient) {
    using T = decltype(element);
    using Gradient = decltype(gradient);
    if (splits <= 8) return launch<T, Gradient, 64, 1>(sums, stream);
    if (splits <= 16) return launch<T, Gradient, 32, 8, 2>(sums, stream);
    if (splits <= 64 || !few) return launch<T, Gradient, 32, 8>(sums, stream);
    if (splits <= 128) return launch<T, Gradient, 8, 16>(sums, stream);
    if (splits <= 256) return launch<T, Gradient, 4, 32>(sums, stream);
    launch<T, Gradient, 8, 64>(sums, stream);
  };
  const bool widens = size_of(p.dtype) == 2 && Widening::is_wanted();
  visit_dtype(p.dtype, [&](auto element) {
    if (sizeof(element) == 2 && widens)
      add(element, float{});
    else
      add(element, element);
  });
  check_launch("add_partial_sums");
}

}  // namespace dwconv
