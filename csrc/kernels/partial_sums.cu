// Adds up partial sums: some threads a sum, each of which has several loads under way, since the kernel is nothing
// but latency. Addresses are known before the kernel before it is done.
#include "partial_sums.h"

#include "common.cuh"
#include "device.h"
#include "overlap.cuh"

namespace dwconv {
namespace {

struct Sums {
  const void* partial;
  void *grad_weight, *grad_bias;
  int64_t filters, taps, splits;

  __host__ __device__ int64_t count() const { return (taps + (grad_bias != nullptr)) * filters; }
};

// A block takes kColumns sums beside each other, each by kLanes threads.
template <typename T, int kColumns, int kLanes>
__global__ void __launch_bounds__(kColumns* kLanes) add_partial_sums(Sums a) {
  using Number = Accumulator<T>;
  constexpr int kLoads = 8;  // a thread's under way
  __shared__ double shared[kLanes][kColumns];
  let_next_kernel_start();
  const int64_t count = a.count();
  const int column = threadIdx.x % kColumns, lane = threadIdx.x / kColumns;
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kColumns + column, step = kLanes * count;
  const int64_t slot = index / a.filters, filter = index % a.filters;
  T* to =
      slot < a.taps ? static_cast<T*>(a.grad_weight) + filter * a.taps + slot : static_cast<T*>(a.grad_bias) + filter;
  const Number* from = static_cast<const Number*>(a.partial) + lane * count + index;
  settle_and_wait_for_kernel_before(column);

  double total = 0;  // a long sum, of which there are few
  for (int64_t left = index < count ? ceil_div(a.splits - lane, kLanes) : 0; left > 0; left -= kLoads) {
    Number values[kLoads];
#pragma unroll
    for (int i = 0; i < kLoads; ++i) values[i] = i < left ? from[i * step] : Number{0};
    from += kLoads * step;
#pragma unroll
    for (int i = 0; i < kLoads; ++i) total += values[i];
  }
  shared[lane][column] = total;
#pragma unroll
  for (int half = kLanes / 2; half > 0; half /= 2) {
    __syncthreads();
    if (lane < half) shared[lane][column] = total += shared[lane + half][column];
  }
  if (lane == 0 && index < count) *to = narrow<T>(static_cast<Number>(total));
}

template <typename T, int kColumns, int kLanes>
void launch(const Sums& sums, cudaStream_t stream) {
  launch_early(add_partial_sums<T, kColumns, kLanes>, sums, ceil_div(sums.count(), kColumns), kColumns * kLanes,
               stream);
}

}  // namespace

void launch_add_partial_sums(const Problem& p, const void* partial, int64_t splits, cudaStream_t stream) {
  const Sums sums{partial, p.weight.data, p.bias, p.filters(), p.taps(), splits};
  // Few long sums are shared by many threads, as long as all of these run at once.
  const bool few = splits > 32 && ceil_div(sums.count(), 8) <= 4 * current_device().multiprocessors;
  visit_dtype(p.dtype, [&](auto element) {
    using T = decltype(element);
    if (few)
      launch<T, 8, 64>(sums, stream);
    else
      launch<T, 32, 8>(sums, stream);
  });
  check_launch("add_partial_sums");
}

}  // namespace dwconv
