// grad_weight (and the bias gradient) of small kernels, straight from memory, for problems with few gradients a filter,
// where latency is all that counts: a block sums all taps of one filter, or of some that lie side by side, with one
// load of everything in flight, and writes them. Where there are more gradients than threads of a block, the blocks of
// a cluster share them: there is nothing to add up behind the kernel.
//
// Only taps that meet the image are part of a sum: a gradient that is Inf or NaN does not meet the padding. Where a
// thread multiplies zeros there, it takes its sums again if they are not finite.
#include "clusters.cuh"
#include "common.cuh"
#include "device.h"
#include "direct.cuh"
#include "launch.h"
#include "overlap.cuh"
#include "small_kernels.h"
#include "stream.cuh"
#include "widening.h"

namespace dwconv {
namespace {

constexpr int kMaxSplits = 16;     // blocks of a cluster
constexpr int kFewGradients = 64;  // a thread of a block for each

// Kernels that are compiled for strips of several gradients.
template <class Kernel>
constexpr bool has_strips =
    Kernel::kStride == 1 && Kernel::kDilation == 1 && Kernel::kKernelH == 3 && Kernel::kKernelW == 3;

// No more of them than it takes: each line of arguments is waited for.
struct Arguments {
  const void *input, *grad;
  void *grad_weight, *grad_bias;        // the latter null where it is not wanted
  int input_stride[4], grad_stride[4];  // in elements
  int height, width, padding_h, padding_w, out_height, filters;
  int units;    // strips of gradients, in all images
  int splits;   // blocks that share the filters
  bool widens;  // gradients of 16 bits, written as float32
  Divider by_multiplier, by_splits, by_strips, by_columns;
};

// Adds up kCount values over the lanes whose numbers differ in bits kDistance and above, leaving some of the sums in
// each lane: `first` is the first one's number, and `count` how many of those left in `values` are sums.
template <int kDistance, int kLowest, int kCount, int kSize>
__device__ void fold(float (&values)[kSize], int& first, int& count) {
  if constexpr (kDistance >= kLowest) {
    constexpr int kHalf = (kCount + 1) / 2;
    const bool upper = threadIdx.x & kDistance;
#pragma unroll
    for (int i = 0; i < kHalf; ++i) {
      const float low = values[i], high = i + kHalf < kCount ? values[i + kHalf] : 0.f;
      values[i] = (upper ? high : low) + __shfl_xor_sync(~0u, upper ? low : high, kDistance);
    }
    first += upper ? kHalf : 0;
    count = upper ? count - kHalf : min(count, kHalf);
    fold<kDistance / 2, kLowest, kHalf>(values, first, count);
  }
}
// How many values of kCount that leaves.
template <int kCount, int kDistance, int kLowest>
constexpr int kFolded = kDistance < kLowest ? kCount : kFolded<(kCount + 1) / 2, kDistance / 2, kLowest>;

// A block sums kLanes * kVector filters side by side; where there are splits, over a part of the gradients, and the
// first block of the cluster adds up what the others send it. A thread takes a strip of kRows gradients below each
// other at a time, of kVector channels.
template <typename T, class Kernel, int kVector, int kLanes, int kRows, int kThreads>
__global__ void __launch_bounds__(kThreads, kThreads > 256 ? 0 : 1)  // or ptxas spills to have more blocks
    direct_grad_weight(const __grid_constant__ Arguments a) {
  constexpr int kKernelH = Kernel::kKernelH, kKernelW = Kernel::kKernelW, kTaps = kKernelH * kKernelW;
  constexpr int kSourceRows = (kRows - 1) * Kernel::kStride + (kKernelH - 1) * Kernel::kDilation + 1;
  constexpr int kStep = kRows == 1 ? Kernel::kDilation : 1;  // from one of the rows that are needed to the next
  constexpr int kSums = kVector * (kTaps + 1), kSlots = kThreads / kLanes, kWarps = kThreads / 32;
  __shared__ float sums[kWarps][kSums * kLanes];
  __shared__ float totals[kMaxSplits][kSums * kLanes];
  uint32_t block = blockIdx.x;
  const int lane = threadIdx.x % kLanes, split = a.by_splits.split(block);
  const int first_filter = block * kLanes * kVector, filter = first_filter + lane * kVector;
  uint32_t channel = filter;
  a.by_multiplier.split(channel);
  const int input = static_cast<int>(channel) * a.input_stride[1], grad = filter * a.grad_stride[1];
#if __CUDA_ARCH__ >= 900
  __shared__ uint64_t barrier;  // of the totals in the first block
  const uint32_t arrived = static_cast<uint32_t>(__cvta_generic_to_shared(&barrier));
  if (a.splits > 1) {
    if (split == 0 && threadIdx.x == 0) {
      asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(arrived));
      asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
      asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(arrived),
                   "r"(a.splits * kSums * kLanes * 4)
                   : "memory");
    }
    __syncwarp();
    asm volatile("barrier.cluster.arrive.relaxed.aligned;");
  }
#endif
  wait_for_kernel_before();
  let_next_kernel_start();

  // In strips of 16 bits, masks and what is widened under them would take longer than all products do.
  constexpr bool kMultipliesZeros = kRows > 1 && sizeof(T) == 2;
  float sum[kSums];  // of channel c and tap t at (c * (kTaps + 1) + t), the last one of a channel is the bias
  const auto take_all = [&](bool exact) {
#pragma unroll
    for (float& value : sum) value = 0;
#pragma unroll 1
    for (int at = filter < a.filters ? split * kSlots + threadIdx.x / kLanes : a.units; at < a.units;
         at += kSlots * a.splits) {
      uint32_t image = at;
      const int column = a.by_columns.split(image), row = a.by_strips.split(image) * kRows;
      const int y0 = row * Kernel::kStride - a.padding_h, x0 = column * Kernel::kStride - a.padding_w;
      const int from = input + static_cast<int>(image) * a.input_stride[0];
      const int grad_from =
          grad + static_cast<int>(image) * a.grad_stride[0] + row * a.grad_stride[2] + column * a.grad_stride[3];
      bool row_inside[kSourceRows], column_inside[kKernelW];
#pragma unroll
      for (int r = 0; r < kSourceRows; r += kStep)
        row_inside[r] = static_cast<uint32_t>(y0 + r) < static_cast<uint32_t>(a.height);
#pragma unroll
      for (int j = 0; j < kKernelW; ++j)
        column_inside[j] = static_cast<uint32_t>(x0 + j * Kernel::kDilation) < static_cast<uint32_t>(a.width);
      Vector<T, kVector> g[kRows], x[kSourceRows][kKernelW];
#pragma unroll
      for (int o = 0; o < kRows; ++o)
        g[o] = load<T, kVector>(static_cast<const T*>(a.grad) + (grad_from + o * a.grad_stride[2]),
                                row + o < a.out_height);
#pragma unroll
      for (int r = 0; r < kSourceRows; r += kStep)
#pragma unroll
        for (int j = 0; j < kKernelW; ++j)
          x[r][j] = load<T, kVector>(
              static_cast<const T*>(a.input) +
                  (from + (y0 + r) * a.input_stride[2] + (x0 + j * Kernel::kDilation) * a.input_stride[3]),
              row_inside[r] & column_inside[j]);
      // Never taken: behind a branch ptxas multiplies when all loads are under way, not before.
      if (kRows == 1 && static_cast<int>(image) < 0) break;
      const auto multiply = [&](auto in_image, auto whole) {
#pragma unroll
        for (int r = 0; r < kSourceRows; r += kStep)
#pragma unroll
          for (int j = 0; j < kKernelW; ++j)
#pragma unroll
            for (int o = 0; o < kRows; ++o) {
              const int reach = r - o * Kernel::kStride, i = reach / Kernel::kDilation;
              if (reach < 0 || reach % Kernel::kDilation != 0 || i >= kKernelH) continue;
              const bool meets = !in_image || ((row_inside[r] & column_inside[j]) && (whole || row + o < a.out_height));
#pragma unroll
              for (int c = 0; c < kVector; ++c) {
                float& to = sum[c * (kTaps + 1) + i * kKernelW + j];
                to = meets ? fmaf(x[r][j][c], g[o][c], to) : to;
              }
            }
      };
      using std::false_type, std::true_type;
      if (kMultipliesZeros && !exact)
        multiply(false_type{}, true_type{});
      else if (kRows == 1 || (!kMultipliesZeros && row + kRows <= a.out_height))
        multiply(true_type{}, true_type{});
      else  // gradients below the last one do not meet what is Inf or NaN
        multiply(true_type{}, false_type{});
#pragma unroll
      for (int o = 0; o < kRows; ++o)
#pragma unroll
        for (int c = 0; c < kVector; ++c) sum[c * (kTaps + 1) + kTaps] += g[o][c];
    }
  };
#pragma unroll 1
  for (bool exact = !kMultipliesZeros;; exact = true) {
    take_all(exact);
    float check[2] = {};
#pragma unroll
    for (int i = 0; i < kSums; ++i) check[i % 2] = fmaf(sum[i], 0.f, check[i % 2]);
    if (exact || check[0] + check[1] == 0) break;
  }

  int first = 0, count = kSums;
  fold<16, kLanes, kSums>(sum, first, count);
#pragma unroll
  for (int i = 0; i < kFolded<kSums, 16, kLanes>; ++i)
    if (i < count) sums[threadIdx.x / 32][(first + i) * kLanes + lane] = sum[i];
  __syncthreads();
#if __CUDA_ARCH__ >= 900
  if (a.splits > 1) asm volatile("barrier.cluster.wait.aligned;" ::: "memory");  // all of them are there
#endif
  for (int t = threadIdx.x; t < kSums * kLanes; t += kThreads) {
    float total = 0;
#pragma unroll
    for (int warp = 0; warp < kWarps; ++warp) total += sums[warp][t];
    float* to = &totals[split][t];
#if __CUDA_ARCH__ >= 900
    if (a.splits > 1) {
      uint32_t remote, remote_barrier;
      asm volatile("mapa.shared::cluster.u32 %0, %1, 0;"
                   : "=r"(remote)
                   : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(to))));
      asm volatile("mapa.shared::cluster.u32 %0, %1, 0;" : "=r"(remote_barrier) : "r"(arrived));
      asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.b32 [%0], %1, [%2];" ::"r"(remote),
                   "r"(__float_as_uint(total)), "r"(remote_barrier)
                   : "memory");
      continue;
    }
#endif
    *to = total;
  }
  if (split > 0) return;
  if (a.splits == 1) __syncthreads();
#if __CUDA_ARCH__ >= 900
  if (a.splits > 1) {
    uint32_t done = 0;
    while (!done)
      asm volatile("{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], 0; selp.b32 %0, 1, 0, p; }"
                   : "=r"(done)
                   : "r"(arrived)
                   : "memory");
  }
#endif
  for (int t = threadIdx.x; t < kSums * kLanes; t += kThreads) {
    const int c = t / kLanes / (kTaps + 1), tap = t / kLanes % (kTaps + 1);
    const int to = first_filter + t % kLanes * kVector + c;
    float total = 0;
    for (int part = 0; part < a.splits; ++part) total += totals[part][t];
    if (to >= a.filters || (tap == kTaps && a.grad_bias == nullptr)) continue;
    void* const gradients = tap < kTaps ? a.grad_weight : a.grad_bias;
    const int place = tap < kTaps ? to * kTaps + tap : to;
    const T value = narrow<T>(total);
    if (sizeof(T) == 2 && a.widens)
      static_cast<float*>(gradients)[place] = widen(value);
    else
      static_cast<T*>(gradients)[place] = value;
  }
}

template <typename T, class Kernel, int kVector, int kLanes, int kRows, int kThreads>
void launch(const Problem& p, Arguments a, cudaStream_t stream) {
  const auto kernel = direct_grad_weight<T, Kernel, kVector, kLanes, kRows, kThreads>;
  const int64_t strips = ceil_div(p.out_height, kRows), blocks = ceil_div(p.filters(), kVector * kLanes);
  a.by_strips = Divider(strips), a.units = static_cast<int>(p.batch * strips * p.out_width), a.splits = 1;
  // So many blocks for the same filters that every thread has one strip, unless multiprocessors have to share them.
  if (kRows > 1 && can_overlap(kernel)) {
    const Device& device = current_device();
    const auto has_room =
        [&](int splits) {  // for all clusters at once, where they are larger than any GPU has room for
          static thread_local Decisions<3, bool> decisions;
          return splits <= kPortableCluster || decisions({device.id, blocks, splits}, [&] {
                   return fits_clusters(kernel, blocks, splits, kThreads, 0);
                 });
        };
    while (a.splits < kMaxSplits && a.units > a.splits * (kThreads / kLanes) &&
           4 * a.splits * blocks <= 3 * device.multiprocessors && has_room(2 * a.splits))
      a.splits *= 2;
  }
  a.by_splits = Divider(a.splits);
  launch_early(kernel, a, blocks * a.splits, kThreads, stream, {.cluster = a.splits});
}

// Whether channels lie side by side in vectors of kVector elements.
template <typename T, int kVector>
bool has_vectors(const Problem& p, const View& view) {
  return p.channels % kVector == 0 && reinterpret_cast<uintptr_t>(view.data) % (kVector * sizeof(T)) == 0 &&
         ((p.batch > 1 ? view.stride[0] : 0) | view.stride[2] | view.stride[3]) % kVector == 0;
}

template <typename T, class Kernel>
void launch_for(const Problem& p, const Arguments& a, cudaStream_t stream) {
  const bool few = p.batch * p.out_height * p.out_width <= kFewGradients;
  if (p.filters() > 1 && p.input.stride[1] == 1 && p.output.stride[1] == 1) {  // lanes go along the channels
    const bool pairs = p.multiplier == 1 && has_vectors<T, 2>(p, p.input) && has_vectors<T, 2>(p, p.output);
    if constexpr (Kernel::kSquare && Kernel::kKernelH > 1 && Kernel::kDilation == 1) {
      if (few && pairs) return launch<T, Kernel, 2, 4, 1, 256>(p, a, stream);
      // Else filters share blocks where there are too many for multiprocessors of their own.
      if (few && p.filters() >= 4 * current_device().multiprocessors)
        return launch<T, Kernel, 1, 4, 1, 256>(p, a, stream);
    }
    if constexpr (has_strips<Kernel>) {
      if (!few && pairs) return launch<T, Kernel, 2, 4, 4, 512>(p, a, stream);
      if (!few) return launch<T, Kernel, 1, 8, 4, 512>(p, a, stream);
    }
  }
  if constexpr (has_strips<Kernel>) {
    if (few) return launch<T, Kernel, 1, 1, 1, 64>(p, a, stream);
    const int64_t strips = p.batch * ceil_div(p.out_height, 4) * p.out_width;
    if (strips <= 64) return launch<T, Kernel, 1, 1, 4, 64>(p, a, stream);
    if (strips <= 256) return launch<T, Kernel, 1, 1, 4, 256>(p, a, stream);
    launch<T, Kernel, 1, 1, 4, 512>(p, a, stream);
  } else {
    launch<T, Kernel, 1, 1, 1, 128>(p, a, stream);
  }
}

}  // namespace

void launch_direct_grad_weight(const Problem& p, cudaStream_t stream) {
  Arguments a{p.input.data, p.output.data, p.weight.data, p.bias};
  for (int d = 0; d < 4; ++d)
    a.input_stride[d] = static_cast<int>(p.input.stride[d]), a.grad_stride[d] = static_cast<int>(p.output.stride[d]);
  a.height = static_cast<int>(p.height), a.width = static_cast<int>(p.width);
  a.padding_h = static_cast<int>(p.padding_h), a.padding_w = static_cast<int>(p.padding_w);
  a.out_height = static_cast<int>(p.out_height), a.filters = static_cast<int>(p.filters());
  a.widens = size_of(p.dtype) == 2 && Widening::is_wanted(), a.by_multiplier = Divider(p.multiplier);
  a.by_columns = Divider(p.out_width);
  visit_dtype(p.dtype, [&](auto zero) {
    using T = decltype(zero);
    if constexpr (sizeof(T) <= 4)
      visit_small_kernel(p, [&](auto kernel) { launch_for<T, decltype(kernel)>(p, a, stream); });
  });
  check_launch("direct_grad_weight");
}

}  // namespace dwconv
