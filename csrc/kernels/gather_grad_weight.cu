// grad_weight (and the bias gradient) of any kernel, stride and dilation, straight from memory: for problems so small
// that latency is most of what they take. A block sums a patch of the kernel of one filter, or in channels_last of some
// that lie side by side, over all gradients, or the blocks of a cluster share these: there is nothing to add up behind
// the kernel.
//
// Only taps that meet the image are multiplied: a gradient that is Inf or NaN does not meet the padding.
#include <cmath>
#include <limits>

#include "clusters.cuh"
#include "common.cuh"
#include "device.h"
#include "gather.cuh"
#include "gather.h"
#include "launch.h"
#include "overlap.cuh"

namespace dwconv {
namespace {

using Patches = std::tuple<Patch<3, 3>, Patch<1, 8>, Patch<8, 1>, Patch<2, 2>, Patch<1, 1>>;

constexpr int kMaxThreads = 512, kBlocks = 2;  // of a block, and of a multiprocessor

// Gradients of a thread whose loads are in flight together.
template <class Patch>
constexpr int kTogether = Patch::kTaps == 1   ? 4
                          : Patch::kTaps <= 4 ? 2
                                              : 1;

struct Arguments {
  const void* input;
  const void* grad;
  void* grad_weight;
  void* grad_bias;
  int input_stride[4], grad_stride[4];  // in elements
  uint32_t height, width;
  int stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w;
  int kernel_h, kernel_w, filters;
  uint32_t units;  // gradients of a filter
  int lane_bits;   // two to the power of that are the filters side by side of a block
  int split_bits;  // and that the blocks of a cluster, which share the gradients
  Divider by_columns, by_rows, by_multiplier, by_patch_rows, by_patch_columns;
};

// What another block of the cluster has there in shared memory.
template <typename Number>
__device__ Number* in_block(Number* shared, int block) {
#if __CUDA_ARCH__ >= 900
  asm("mapa.u64 %0, %0, %1;" : "+l"(shared) : "r"(block));
#endif
  return shared;
}

template <typename T, class Patch, int kTogether>
__global__ void __launch_bounds__(kMaxThreads, kBlocks) gather_grad_weight(const __grid_constant__ Arguments a) {
  using Number = Accumulator<T>;
  constexpr int kRows = Patch::kRows, kColumns = Patch::kColumns, kTaps = Patch::kTaps;
  constexpr int kSums = kTaps + 1;  // the last one is the bias's
  __shared__ Number sums[kMaxThreads / 32][kSums * 32], totals[kSums * 32];
  const int lanes = 1 << a.lane_bits, splits = 1 << a.split_bits, split = blockIdx.x & (splits - 1);
  uint32_t group = blockIdx.x >> a.split_bits;
  const int first_column = static_cast<int>(a.by_patch_columns.split(group)) * kColumns;
  const int first_row = static_cast<int>(a.by_patch_rows.split(group)) * kRows;
  const int lane = threadIdx.x & (lanes - 1), filter = static_cast<int>(group << a.lane_bits) + lane;
  const bool exists = filter < a.filters;
  uint32_t channel = filter;
  a.by_multiplier.split(channel);
  const T* const input = static_cast<const T*>(a.input) + static_cast<int>(channel) * a.input_stride[1];
  const T* const grad = static_cast<const T*>(a.grad) + filter * a.grad_stride[1];
  const int above = first_row * a.dilation_h - a.padding_h, before = first_column * a.dilation_w - a.padding_w;
  wait_for_kernel_before();
  let_next_kernel_start();

  Number sum[kSums] = {};
  const uint32_t slots = blockDim.x << a.split_bits >> a.lane_bits;
#pragma unroll 1
  for (uint32_t at = (threadIdx.x + split * blockDim.x) >> a.lane_bits; at < a.units; at += kTogether * slots) {
    Loaded<T> g[kTogether], x[kTogether][kRows][kColumns];
    uint32_t down[kTogether][kRows], across[kTogether][kColumns];  // where no pixel is, beyond all others
#pragma unroll
    for (int u = 0; u < kTogether; ++u) {
      uint32_t image = at + u * slots;
      const bool is_there = exists && image < a.units;
      const int column = a.by_columns.split(image), row = a.by_rows.split(image);
      g[u] = load_element(element_at(grad, static_cast<int>(image) * a.grad_stride[0] + row * a.grad_stride[2] +
                                               column * a.grad_stride[3]),
                          is_there);
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const int y = row * a.stride_h + above + r * a.dilation_h;
        const bool meets = is_there && first_row + r < a.kernel_h && static_cast<uint32_t>(y) < a.height;
        down[u][r] = meets ? y * a.input_stride[2] : kBeside;
      }
#pragma unroll
      for (int c = 0; c < kColumns; ++c) {
        const int x = column * a.stride_w + before + c * a.dilation_w;
        const bool meets = first_column + c < a.kernel_w && static_cast<uint32_t>(x) < a.width;
        across[u][c] = meets ? x * a.input_stride[3] : kBeside;
      }
      const T* const from = element_at(input, static_cast<int>(image) * a.input_stride[0]);
#pragma unroll
      for (int r = 0; r < kRows; ++r)
#pragma unroll
        for (int c = 0; c < kColumns; ++c)
          x[u][r][c] = load_element(element_at(from, down[u][r] + across[u][c]), down[u][r] + across[u][c] < kBeside);
    }
#pragma unroll
    for (int u = 0; u < kTogether; ++u) {
      const Number gradient = widen_element<T>(g[u]);
#pragma unroll
      for (int r = 0; r < kRows; ++r)
#pragma unroll
        for (int c = 0; c < kColumns; ++c)
          if (down[u][r] + across[u][c] < kBeside) {
            Number& to = sum[r * kColumns + c];
            to = fma(widen_element<T>(x[u][r][c]), gradient, to);
          }
      sum[kTaps] += gradient;
    }
  }

#pragma unroll
  for (int t = 0; t < kSums; ++t) {
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2)
      if (offset >= lanes) sum[t] += __shfl_down_sync(~0u, sum[t], offset);
    if (threadIdx.x % 32 < lanes) sums[threadIdx.x / 32][(t << a.lane_bits) + lane] = sum[t];
  }
  __syncthreads();
  const auto write = [&](int n, Number total) {
    const int t = n >> a.lane_bits, to = static_cast<int>(group << a.lane_bits) + (n & (lanes - 1));
    const int tap_row = first_row + t / kColumns, tap_column = first_column + t % kColumns;
    if (to >= a.filters) return;
    if (t == kTaps) {
      if (a.grad_bias && first_row + first_column == 0) static_cast<T*>(a.grad_bias)[to] = narrow<T>(total);
    } else if (tap_row < a.kernel_h && tap_column < a.kernel_w) {
      static_cast<T*>(a.grad_weight)[(to * a.kernel_h + tap_row) * a.kernel_w + tap_column] = narrow<T>(total);
    }
  };
  for (int n = threadIdx.x; n < kSums << a.lane_bits; n += blockDim.x) {
    Number total = 0;
#pragma unroll 4
    for (int warp = 0; warp < blockDim.x / 32; ++warp) total += sums[warp][n];
    if (splits == 1)
      write(n, total);
    else
      totals[n] = total;
  }
  if (splits == 1) return;
  meet_in_cluster();
  if (split == 0)
    for (int n = threadIdx.x; n < kSums << a.lane_bits; n += blockDim.x) {
      Number total = 0;
#pragma unroll 1
      for (int block = 0; block < splits; ++block) total += *in_block(&totals[n], block);
      write(n, total);
    }
  meet_in_cluster();  // nobody ends while the first block reads
}

// How a kernel's patches, filters and gradients are shared.
struct Shape {
  int lane_bits = 0, split_bits = 0;
  double turns = 0;  // of a thread
  double cycles = std::numeric_limits<double>::infinity();

  int64_t blocks(const Problem& p, int64_t patches) const {
    return (ceil_div(p.filters(), int64_t{1} << lane_bits) * patches) << split_bits;
  }

  // Blocks that are beside each other on a multiprocessor take turns: one is as long as loads take, or as it takes to
  // issue it.
  void estimate(const Problem& p, int64_t patches, int taps, int together) {
    constexpr double kOfBlock = 2000, kOfCluster = 1000, kLatency = 700, kOfPlace = 10, kOfTap = 2.25, kOfSum = 40;
    const double gradients = static_cast<double>(p.batch * p.out_height * p.out_width);
    const double slots = static_cast<double>(kMaxThreads >> lane_bits << split_bits) * together;
    turns = std::ceil(gradients / slots);
    const double warps = std::min(std::ceil(gradients / slots * kMaxThreads / 32), kMaxThreads / 32.);
    const double share = static_cast<double>(blocks(p, patches)) / current_device().multiprocessors;
    const double room = std::min(std::floor(kBlocks * kMaxThreads / 32 / warps), 32.);
    // Lanes beside each other read one line, others each their own.
    const double lines = lane_bits == 0 ? 1.5 : 32 >> lane_bits;
    const double issue = warps * together * std::max(kOfPlace + kOfTap * taps, lines * (taps + 1));
    const double turn = std::max(kLatency, std::min(std::ceil(share), room) * issue);
    cycles = std::ceil(share / room) * (kOfBlock + turns * turn + kOfSum * taps + (split_bits > 0 ? kOfCluster : 0));
    constexpr double kLongSum = 64;  // loses digits in float32
    if (turns * together > kLongSum) cycles *= 2;
  }

  template <class Patch>
  static Shape best(const Problem& p, bool channels_last, bool clusters) {
    Shape best;
    const int64_t patches = Patch::count(p.kernel_h, p.kernel_w);
    int most = 0;
    while (channels_last && most < 5 && (2 << most) * 2 <= 3 * p.filters()) ++most;
    for (int lane_bits = std::min(most, 3);; lane_bits = most) {
      for (int split_bits = 0; split_bits <= (clusters ? 3 : 0); ++split_bits) {
        Shape shape{lane_bits, split_bits};
        shape.estimate(p, patches, Patch::kTaps, kTogether<Patch>);
        if (shape.cycles < best.cycles) best = shape;
        if (shape.turns == 1) break;
      }
      if (lane_bits == most) return best;
    }
  }
};

}  // namespace

void launch_gather_grad_weight(const Problem& p, cudaStream_t stream) {
  Arguments a{};
  a.input = p.input.data, a.grad = p.output.data, a.grad_weight = p.weight.data, a.grad_bias = p.bias;
  for (int d = 0; d < 4; ++d)
    a.input_stride[d] = static_cast<int>(p.input.stride[d]), a.grad_stride[d] = static_cast<int>(p.output.stride[d]);
  a.height = static_cast<uint32_t>(p.height), a.width = static_cast<uint32_t>(p.width);
  a.stride_h = static_cast<int>(p.stride_h), a.stride_w = static_cast<int>(p.stride_w);
  a.padding_h = static_cast<int>(p.padding_h), a.padding_w = static_cast<int>(p.padding_w);
  a.dilation_h = static_cast<int>(p.dilation_h), a.dilation_w = static_cast<int>(p.dilation_w);
  a.kernel_h = static_cast<int>(p.kernel_h), a.kernel_w = static_cast<int>(p.kernel_w);
  a.filters = static_cast<int>(p.filters());
  a.units = static_cast<uint32_t>(p.batch * p.out_height * p.out_width);
  a.by_columns = Divider(p.out_width), a.by_rows = Divider(p.out_height), a.by_multiplier = Divider(p.multiplier);
  const bool channels_last = p.filters() > 1 && p.input.stride[1] == 1 && p.output.stride[1] == 1;
  visit_dtype(p.dtype, [&](auto zero) {
    using T = decltype(zero);
    const bool clusters = can_overlap(gather_grad_weight<T, Patch<1, 1>, kTogether<Patch<1, 1>>>);
    const auto shape_for = [&](auto patch) { return Shape::best<decltype(patch)>(p, channels_last, clusters); };
    visit_best_patch<Patches>(
        [&](auto patch) { return shape_for(patch).cycles; },
        [&](auto patch) {
          using Patch = decltype(patch);
          constexpr int kAtOnce = kTogether<Patch>;
          const Shape shape = shape_for(patch);
          a.lane_bits = shape.lane_bits, a.split_bits = shape.split_bits;
          a.by_patch_rows = Divider(ceil_div(p.kernel_h, Patch::kRows));
          a.by_patch_columns = Divider(ceil_div(p.kernel_w, Patch::kColumns));
          const int64_t threads = ceil_div(int64_t{a.units} << a.lane_bits, int64_t{kAtOnce} << a.split_bits);
          launch_early(gather_grad_weight<T, Patch, kAtOnce>, a, shape.blocks(p, patch.count(p.kernel_h, p.kernel_w)),
                       static_cast<int>(std::min<int64_t>(32 * ceil_div(threads, 32), kMaxThreads)), stream,
                       {.cluster = 1 << a.split_bits});
        });
  });
  check_launch("gather_grad_weight");
}

}  // namespace dwconv
