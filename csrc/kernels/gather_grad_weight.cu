// grad_weight (and the bias gradient) of any kernel, stride and dilation, straight from memory: for problems so small
// that latency is most of what they take. A block sums a patch of the kernel of one filter, or in channels_last of some
// that lie side by side, over all gradients, or the blocks of a cluster share these: there is nothing to add up behind
// the kernel. A block takes some 2000 cycles without its products, and 700 for each turn of loads.
//
// Only taps that meet the image are multiplied: a gradient that is Inf or NaN does not meet the padding.
#include "gather_grad_weight.h"

#include <utility>

#include "clusters.cuh"
#include "device.h"
#include "direct.cuh"
#include "grad_weight.cuh"
#include "launch.h"
#include "overlap.cuh"

namespace dwconv {
namespace {

// Beyond all offsets within a plane; twice as much is as well.
constexpr uint32_t kBeside = 1u << 30;

struct Arguments : GradWeightArguments {
  uint32_t units;  // gradients of a filter
  int lane_bits;   // two to the power of that are the filters side by side of a block
  int split_bits;  // and that the blocks of a cluster, which share the gradients
  Divider by_columns, by_rows, by_patch_rows, by_patch_columns;
};

// The address of an element, in one instruction: a compiler adds up offsets of 32 bits in 64.
template <typename T>
__device__ const T* element_at(const T* from, uint32_t offset) {
  const T* to;
  asm("mad.wide.u32 %0, %1, %2, %3;" : "=l"(to) : "r"(offset), "n"(sizeof(T)), "l"(from));
  return to;
}

// What another block of the cluster has there in shared memory.
template <typename Number>
__device__ Number* in_block(Number* shared, int block) {
#if __CUDA_ARCH__ >= 900
  asm("mapa.u64 %0, %0, %1;" : "+l"(shared) : "r"(block));
#endif
  return shared;
}

template <typename T, int kPatch>
__global__ void __launch_bounds__(kGatherThreads, kGatherBlocks)
    gather_grad_weight(const __grid_constant__ Arguments a) {
  using Number = Accumulator<T>;
  constexpr GatherPatch kShape = kGatherPatches[kPatch];
  constexpr int kRows = kShape.rows, kColumns = kShape.columns, kTaps = kRows * kColumns, kTogether = kShape.together;
  constexpr int kSums = kTaps + 1;                        // the last one is the bias's
  extern __shared__ __align__(8) unsigned char shared[];  // the sums of each warp, and behind them those of the block
  Number* const sums = reinterpret_cast<Number*>(shared);
  const int pitch = kSums << a.lane_bits, warps = blockDim.x / 32;
  Number* const totals = sums + warps * pitch;
  const int lanes = 1 << a.lane_bits, splits = 1 << a.split_bits, split = blockIdx.x & (splits - 1);
  uint32_t group = blockIdx.x >> a.split_bits;
  const int first_column = static_cast<int>(a.by_patch_columns.split(group)) * kColumns;
  const int first_row = static_cast<int>(a.by_patch_rows.split(group)) * kRows;
  const int lane = threadIdx.x & (lanes - 1), filter = static_cast<int>(group << a.lane_bits) + lane;
  const bool exists = filter < a.filters;
  const T* const input = static_cast<const T*>(a.input) + a.channel_of(filter) * a.input_stride[1];
  const T* const grad = static_cast<const T*>(a.grad) + filter * a.grad_stride[1];
  const int above = first_row * a.dilation_h - a.padding_h, before = first_column * a.dilation_w - a.padding_w;
  wait_for_kernel_before();
  let_next_kernel_start();

  Number sum[kSums] = {};
  const uint32_t slots = blockDim.x << a.split_bits >> a.lane_bits;
#pragma unroll 1
  for (uint32_t at = (threadIdx.x + split * blockDim.x) >> a.lane_bits; at < a.units; at += kTogether * slots) {
    Vector<T, 1> g[kTogether], x[kTogether][kRows][kColumns];
    uint32_t down[kTogether][kRows], across[kTogether][kColumns];  // where no pixel is, beyond all others
#pragma unroll
    for (int u = 0; u < kTogether; ++u) {
      uint32_t image = at + u * slots;
      const bool is_there = exists && image < a.units;
      const int column = a.by_columns.split(image), row = a.by_rows.split(image);
      g[u] = load<T, 1>(element_at(grad, static_cast<int>(image) * a.grad_stride[0] + row * a.grad_stride[2] +
                                             column * a.grad_stride[3]),
                        is_there);
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const int y = row * a.stride_h + above + r * a.dilation_h;
        const bool meets =
            is_there && first_row + r < a.kernel_h && static_cast<uint32_t>(y) < static_cast<uint32_t>(a.height);
        down[u][r] = meets ? y * a.input_stride[2] : kBeside;
      }
#pragma unroll
      for (int c = 0; c < kColumns; ++c) {
        const int x = column * a.stride_w + before + c * a.dilation_w;
        const bool meets = first_column + c < a.kernel_w && static_cast<uint32_t>(x) < static_cast<uint32_t>(a.width);
        across[u][c] = meets ? x * a.input_stride[3] : kBeside;
      }
      const T* const from = element_at(input, static_cast<int>(image) * a.input_stride[0]);
#pragma unroll
      for (int r = 0; r < kRows; ++r)
#pragma unroll
        for (int c = 0; c < kColumns; ++c)
          x[u][r][c] = load<T, 1>(element_at(from, down[u][r] + across[u][c]), down[u][r] + across[u][c] < kBeside);
    }
#pragma unroll
    for (int u = 0; u < kTogether; ++u) {
      const Number gradient = g[u][0];
#pragma unroll
      for (int r = 0; r < kRows; ++r)
#pragma unroll
        for (int c = 0; c < kColumns; ++c)
          if (down[u][r] + across[u][c] < kBeside) {
            Number& to = sum[r * kColumns + c];
            to = fma(x[u][r][c][0], gradient, to);
          }
      sum[kTaps] += gradient;
    }
  }

#pragma unroll
  for (int t = 0; t < kSums; ++t) {
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2)
      if (offset >= lanes) sum[t] += __shfl_down_sync(~0u, sum[t], offset);
    if (threadIdx.x % 32 < lanes) sums[threadIdx.x / 32 * pitch + (t << a.lane_bits) + lane] = sum[t];
  }
  __syncthreads();
  const auto write = [&](int n, Number total) {
    const int t = n >> a.lane_bits, to = static_cast<int>(group << a.lane_bits) + (n & (lanes - 1));
    const int tap_row = first_row + t / kColumns, tap_column = first_column + t % kColumns;
    const bool is_bias = t == kTaps, exists = is_bias ? a.grad_bias != nullptr && first_row + first_column == 0
                                                      : tap_row < a.kernel_h && tap_column < a.kernel_w;
    if (exists && to < a.filters) a.template put<T>(0, is_bias ? a.taps : tap_row * a.kernel_w + tap_column, to, total);
  };
  for (int n = threadIdx.x; n < pitch; n += blockDim.x) {
    Number total = 0;
#pragma unroll 4
    for (int warp = 0; warp < warps; ++warp) total += sums[warp * pitch + n];
    if (splits == 1)
      write(n, total);
    else
      totals[n] = total;
  }
  if (splits == 1) return;
  meet_in_cluster();
  if (split == 0)
    for (int n = threadIdx.x; n < pitch; n += blockDim.x) {
      Number total = 0;
#pragma unroll 1
      for (int block = 0; block < splits; ++block) total += *in_block(&totals[n], block);
      write(n, total);
    }
  meet_in_cluster();  // nobody ends while the first block reads
}

}  // namespace

void launch_gather_grad_weight(const Problem& p, cudaStream_t stream) {
  Arguments a{p};
  a.share_sums(p, 1, {});
  a.units = static_cast<uint32_t>(p.batch * p.out_height * p.out_width);
  a.by_columns = Divider(p.out_width), a.by_rows = Divider(p.out_height);
  visit_dtype(p.dtype, [&](auto zero) {
    using T = decltype(zero);
    const bool clusters = can_overlap(gather_grad_weight<T, 0>);
    const GatherShape shape = GatherShape::best(p, clusters, current_device().multiprocessors);
    const GatherPatch& patch = kGatherPatches[shape.patch];
    a.lane_bits = shape.lane_bits, a.split_bits = shape.split_bits;
    a.by_patch_rows = Divider(ceil_div(p.kernel_h, patch.rows));
    a.by_patch_columns = Divider(ceil_div(p.kernel_w, patch.columns));
    const int64_t threads = ceil_div(int64_t{a.units} << a.lane_bits, int64_t{patch.together} << a.split_bits);
    const auto launch_if = [&]<int kPatch>(std::integer_sequence<int, kPatch>) {
      if (shape.patch != kPatch) return;
      const int64_t warps = std::min<int64_t>(ceil_div(threads, 32), kGatherThreads / 32);
      const int64_t bytes = (warps + 1) * (patch.rows * patch.columns + 1) * sizeof(Accumulator<T>) << a.lane_bits;
      launch_early<Arguments>(gather_grad_weight<T, kPatch>, a, shape.blocks, static_cast<int>(32 * warps), stream,
                              {.cluster = 1 << a.split_bits, .shared_bytes = bytes});
    };
    [&]<int... kPatch>(std::integer_sequence<int, kPatch...>) {
      (launch_if(std::integer_sequence<int, kPatch>{}), ...);
    }(std::make_integer_sequence<int, std::size(kGatherPatches)>{});
  });
  check_launch("gather_grad_weight");
}

}  // namespace dwconv
