// Forward, and grad_input at stride 1, of large kernels in float32 on planes about as wide as code is compiled for, on
// CUDA cores.
//
// The lanes of a warp lie on images and on rows. A lane has the sums of a row of outputs, or of half of it, in
// registers, and walks down the kernel: of each of its rows, and the row of the source that it meets, all products are
// straight code. Which pixels meet which outputs along a row is known when the code is compiled: nothing is multiplied
// but what meets, but for columns that narrower planes lack.
//
// Another warp copies the planes of the next images to shared memory meanwhile: a ring of stages. Warps take their rows
// from a counter, and go on to the next stage while others are still at the last one.
//
// All FMA of a tap follow each other, with the sums of even and of odd taps apart: then each finds the weight where the
// FMA before had it, and pixel and sum in different banks of the register file, or it would take two cycles.
//
// Columns that planes, and kernels, lack are zero, and give NaN where they meet Inf or NaN. So outputs that are not
// finite are computed again.
#include "lanes.h"

#include <algorithm>
#include <iterator>

#include "device.h"
#include "lanes.cuh"
#include "lanes_forms.h"
#include "large_float32.cuh"
#include "launch.h"
#include "mapping.h"
#include "overlap.cuh"

namespace dwconv {
namespace {

constexpr int kMostStages = 4;
constexpr int kMostWarps = 15;  // that compute

// How the lanes of a form lie on planes, and these in shared memory.
template <int kNumber>
struct Form {
  static constexpr RowForm kForm = kRowForms[kNumber];
  static constexpr int kSide = kForm.side, kReach = kForm.reach;
  static constexpr bool kChannelsLast = false;
  static constexpr int kBlock = kSide == 56 ? 28 : kSide, kBlocks = kSide / kBlock;  // outputs of a lane
  static constexpr int kUnits = kForm.units();
  static constexpr int kRows = 32 / kUnits;  // of a warp
  static constexpr int kTaps = 2 * kReach + 1;
  static constexpr int kRowBytes = 4 * kSide;
  // After so many taps ptxas finds a test, and does not mix their FMA with others; after none, where that is better.
  static constexpr int kTogether = kSide != 56 ? 4 : kReach == 2 ? 2 : kTaps;
  static constexpr int kWeightBytes = (kTaps + 3) / 4 * 16;  // from row to row
};

struct Arguments {
  const float* source;
  const float* weight;
  const float* bias;
  float* target;
  int64_t source_stride[4], target_stride[4], weight_stride[4], bias_stride;  // in elements
  int batch, height, width, out_height, out_width, kernel_h, kernel_w, padding_h, padding_w, fan_out;
  int filters;
  int unit;           // outputs that are written at once
  int groups, items;  // groups of images of each filter, and all of them
  int share;          // items of a block
  int chunks, tasks;  // rows of warps, and what warps take from the counter, of an item
  Divider by_tasks, by_stages;
  Copy copy;
  int stages, stage_bytes, unit_bytes;
  int weights_at, kernel_bytes;                  // behind a stage's planes, or, in channels_last, behind the stages
  int zeros_at, barriers_at, bytes, zeros_from;  // in shared memory
};

// Some images of a filter.
template <class F>
struct Item {
  int filter, image, units;

  __device__ Item(const Arguments& a, int item) {
    filter = item / a.groups, image = (item - filter * a.groups) * F::kUnits;
    units = min(F::kUnits, a.batch - image);
  }
};

// Begins to copy the weights of a filter, by one warp.
template <class F>
__device__ __forceinline__ void copy_weights(const Arguments& a, int filter, int to) {
  const float* weights = a.weight + filter * a.weight_stride[0];
  to += 4 * (F::kReach - a.padding_w);
  copy_rows<1>(weights, a.weight_stride[2], a.weight_stride[3], a.kernel_h, a.kernel_w, to, F::kWeightBytes, 4);
}

// All products of a row of weights, and a block of pixels that begins kShift columns behind the outputs.
template <class F, int kShift>
__device__ __forceinline__ void add_block(float (&sum)[2][F::kBlock], uint32_t source, uint32_t weight, int positive) {
  constexpr int kBlock = F::kBlock, kReach = F::kReach;
  constexpr int kFirst = std::max(kShift - kBlock + 1, -kReach) + kReach;
  constexpr int kLast = std::min(kShift + kBlock - 1, kReach) + kReach;
  constexpr int kBegin = std::max(0, -kReach - kShift), kEnd = std::min(kBlock, kBlock + kReach - kShift);
  float x[kBlock], w[F::kWeightBytes / 4];
#pragma unroll
  for (int u = kBegin / 4 * 4; u < kEnd; u += 4) load_four(&x[u], source + 4 * u);
#pragma unroll
  for (int tap = kFirst / 4 * 4; tap < kFirst + 4; tap += 4) load_four(&w[tap], weight + 4 * tap);
#pragma unroll
  for (int tap = kFirst; tap <= kLast; ++tap) {
    if (tap > kFirst && tap % F::kTogether == 0 && positive == -tap) asm volatile("trap;");
    if (tap % 4 == 0 && tap + 4 <= kLast) load_four(&w[tap + 4], weight + 4 * (tap + 4));
#pragma unroll
    for (int n = 0; n < kBlock; ++n) {
      const int o = tap % 2 == 0 ? n : kBlock - 1 - n, u = o + tap - kReach - kShift;
      if (u >= 0 && u < kBlock) sum[tap % 2][o] = fmaf(x[u], w[tap], sum[tap % 2][o]);
    }
  }
}

// What a warp takes at once: a block of columns of some rows of an item.
template <class F, int kPlace>
__device__ __forceinline__ void compute(const Arguments& a, const Item<F>& item, uint32_t planes, uint32_t weights,
                                        uint32_t zeros, int chunk) {
  const int lane = threadIdx.x % 32, own = lane % F::kUnits, unit = min(own, item.units - 1);
  const int first_row = chunk * F::kRows, own_row = first_row + lane / F::kUnits;
  // Rows of the kernel in which any lane meets the image.
  const int begin = max(a.padding_h - (first_row + F::kRows - 1), 0);
  const int end = min(a.height + a.padding_h - first_row, a.kernel_h);
  uint32_t y = own_row - a.padding_h + begin;
  uint32_t source = planes + unit * a.unit_bytes + y * F::kRowBytes;
  uint32_t weight = weights + begin * F::kWeightBytes;
  float sum[2][F::kBlock] = {};
  const int positive = a.batch;  // which ptxas does not know
  constexpr int kNext = 4 * F::kBlock;
#pragma unroll 1
  for (int left = end - begin; left > 0; --left) {
    const uint32_t from = y < static_cast<uint32_t>(a.height) ? source : zeros;
    if constexpr (kPlace == 0) {
      add_block<F, 0>(sum, from, weight, positive);
      if constexpr (F::kBlocks > 1) add_block<F, F::kBlock>(sum, from + kNext, weight, positive);
    } else {
      add_block<F, -F::kBlock>(sum, from, weight, positive);
      add_block<F, 0>(sum, from + kNext, weight, positive);
    }
    ++y, source += F::kRowBytes, weight += F::kWeightBytes;
  }

  constexpr int kColumn = kPlace * F::kBlock;
  const int filter = item.filter, image = item.image + own;
  const bool valid = own < item.units && own_row < a.out_height;
  const float bias = a.bias && valid ? a.bias[filter * a.bias_stride] : 0;
  float total[F::kBlock], zero = 0;
#pragma unroll
  for (int o = 0; o < F::kBlock; ++o) {
    total[o] = sum[0][o] + sum[1][o] + bias;
    zero = fmaf(total[o], 0.f, zero);
  }
  const bool again = __shfl_sync(~0u, __any_sync(~0u, zero != 0.f), 0);
  float* const to = a.target + image * a.target_stride[0] + filter * a.target_stride[1] + own_row * a.target_stride[2] +
                    kColumn * a.target_stride[3];
  const auto store = [&](auto word) {
    using Word = decltype(word);
    constexpr int kCount = sizeof(Word) / sizeof(float);
    if (valid)
#pragma unroll
      for (int o = 0; o < F::kBlock; o += kCount)
        if (kColumn + o < a.out_width) {
          if constexpr (kCount == 4)
            *reinterpret_cast<float4*>(to + o) = {total[o], total[o + 1], total[o + 2], total[o + 3]};
          else if constexpr (kCount == 2)
            *reinterpret_cast<float2*>(to + o) = {total[o], total[o + 1]};
          else
            to[o * a.target_stride[3]] = total[o];
        }
  };
  if (a.unit == 4)
    store(float4{});
  else if (a.unit == 2)
    store(float2{});
  else
    store(float{});
  if (again && valid)
#pragma unroll 1
    for (int o = 0; o < F::kBlock && kColumn + o < a.out_width; ++o) {
      float& output = to[o * a.target_stride[3]];
      if (!is_finite(output)) output = sum_by_taps(a, filter, image, own_row, kColumn + o) + bias;
    }
}

template <class F>
__global__ void __launch_bounds__(32 * (kMostWarps + 1), 1) lanes(const __grid_constant__ Arguments a) {
  __shared__ int next_task;
  const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0), lane = threadIdx.x % 32;
  const int warps = blockDim.x / 32 - 1;  // that compute
  const int first = blockIdx.x * a.share, end = min(first + a.share, a.items);
  for (int at = a.zeros_from + 16 * threadIdx.x; at < a.bytes; at += 16 * blockDim.x) shared<float4>(at) = {};
  if (a.zeros_from > 0)  // beside the weights
    for (int stage = 0; stage < a.stages; ++stage)
      for (int at = 16 * threadIdx.x; at < a.kernel_bytes; at += 16 * blockDim.x)
        shared<float4>(stage * a.stage_bytes + a.weights_at + at) = {};
  __syncthreads();
  Ring stages(a.barriers_at, a.stages);
  if (threadIdx.x == 0) {
    next_task = 0;
    for (int stage = 0; stage < a.stages; ++stage) {
      init_barrier(stages.barriers + 16 * stage, 32);
      init_barrier(stages.barriers + 16 * stage + 8, a.tasks * kWarpArrivals);
    }
  }
  before_bulk_copies();
  __syncthreads();
  let_next_kernel_start();
  wait_for_kernel_before();

  if (warp == warps) {
#pragma unroll 1
    for (int at = first; at < end; ++at) {
      stages.wait_empty();
      const Item<F> item(a, at);
      const int to = stages.at * a.stage_bytes;
      copy_planes<F>(nullptr, a.source + item.image * a.source_stride[0] + item.filter / a.fan_out * a.source_stride[1],
                     a.source_stride, a.copy, item.filter, item.image, 1, item.units, a.height, a.width, to,
                     a.unit_bytes, stages.full(), 0, 1);
      copy_weights<F>(a, item.filter, to + a.weights_at);
      arrive_after_copies(stages.full());
      stages.advance();
    }
    return;
  }

  const uint32_t base = once(shared_address(0));
  for (;;) {
    int task = 0;
    if (lane == 0) task = atomicAdd(&next_task, 1);
    uint32_t number = __shfl_sync(~0u, task, 0);
    const int rank = a.by_tasks.split(number);
    if (first + static_cast<int>(number) >= end) return;
    const Item<F> item(a, first + number);
    const int stage = a.by_stages.split(number), parity = number & 1, barrier = a.barriers_at + 16 * stage;
    wait(barrier, parity);
    const uint32_t planes = base + stage * a.stage_bytes;
    const uint32_t weights = planes + a.weights_at, zeros = base + a.zeros_at;
    // The code for a block of columns is large: warps are at the same one mostly.
    const bool is_right = F::kBlocks > 1 && rank >= a.chunks;
    const int chunk = middle_first(is_right ? rank - a.chunks : rank, a.chunks);
    if (is_right)
      compute<F, F::kBlocks - 1>(a, item, planes, weights, zeros, chunk);
    else
      compute<F, 0>(a, item, planes, weights, zeros, chunk);
    arrive_together(barrier + 8, lane == 0);
  }
}

// Bytes of shared memory; 0 where planes do not fit.
template <class F>
int place(Arguments& a, int shared_memory) {
  a.unit_bytes = a.height * F::kRowBytes | 16;  // an odd number of 16 bytes from image to image
  a.weights_at = F::kUnits * a.unit_bytes, a.kernel_bytes = a.kernel_h * F::kWeightBytes;
  a.stage_bytes = static_cast<int>(round_up(a.weights_at + a.kernel_bytes, kBoxUnit));
  const int rest = F::kRowBytes + 16 * kMostStages;
  a.stages = std::min(kMostStages, (shared_memory - 256 - rest) / a.stage_bytes);
  if (a.stages < 2) return 0;
  a.zeros_at = a.stages * a.stage_bytes;
  a.barriers_at = static_cast<int>(round_up(a.zeros_at + F::kRowBytes, 16));
  a.zeros_from = a.width == F::kSide ? a.zeros_at : 0;
  a.bytes = a.barriers_at + 16 * kMostStages;
  return a.bytes;
}

template <class F>
bool launch(const Problem& p, Arguments a, cudaStream_t stream) {
  const int multiprocessors = current_device().multiprocessors;
  a.copy = copy_of<F>(a.source, a.source_stride, a.filters, a.height, a.width, p.capability >= 90);
  a.groups = static_cast<int>(ceil_div(a.batch, F::kUnits)), a.items = a.groups * a.filters;
  // Smaller problems are spread over the device in smaller pieces.
  if (a.items < multiprocessors || place<F>(a, static_cast<int>(p.shared_memory)) == 0) return false;
  a.share = static_cast<int>(ceil_div(a.items, multiprocessors));
  constexpr double kBusy = 0.7;  // of the multiprocessors
  if (a.share < 2 || a.items < kBusy * multiprocessors * a.share) return false;
  a.chunks = static_cast<int>(ceil_div(a.out_height, F::kRows)), a.tasks = F::kBlocks * a.chunks;
  // A warp may wait for a stage's next images only when those before have come, or it would not see by the parity that
  // they have not: all tasks of theirs would be at other warps then, which are fewer.
  constexpr int kFewWarps = 12;
  const int warps = std::min(kMostWarps, a.tasks);
  if (warps < kFewWarps) return false;
  a.by_tasks = Divider(a.tasks), a.by_stages = Divider(a.stages);
  const uint32_t low = static_cast<uint32_t>(reinterpret_cast<uintptr_t>(a.target) / 4 | a.target_stride[0] |
                                             a.target_stride[1] | a.target_stride[2] | a.out_width);
  a.unit = a.target_stride[3] != 1 ? 1 : low % 4 == 0 ? 4 : low % 2 == 0 ? 2 : 1;
  const auto kernel = lanes<F>;
  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, a.bytes);
  launch_early(kernel, a, ceil_div(a.items, a.share), 32 * (warps + 1), stream, {1, a.bytes});
  check_launch("lanes");
  return true;
}

}  // namespace

bool launch_lanes(const Problem& p, cudaStream_t stream) {
  if (p.capability < 80) return false;
  const Mapping m(p);
  Arguments a{};
  a.source = static_cast<const float*>(m.source.data), a.target = static_cast<float*>(m.target.data);
  a.weight = static_cast<const float*>(m.weight.data), a.bias = static_cast<const float*>(m.bias);
  for (int d = 0; d < 4; ++d) {
    a.source_stride[d] = m.source.stride[d], a.target_stride[d] = m.target.stride[d];
    a.weight_stride[d] = m.weight.stride[d];
  }
  a.bias_stride = m.bias_stride, a.fan_out = m.fan_out;
  a.batch = static_cast<int>(p.batch), a.height = m.height, a.width = m.width;
  a.out_height = m.out_height, a.out_width = m.out_width;
  a.kernel_h = static_cast<int>(p.kernel_h), a.kernel_w = static_cast<int>(p.kernel_w);
  a.padding_h = m.padding_h, a.padding_w = m.padding_w;
  a.filters = m.targets;
  if (a.source_stride[3] != 1) return false;
  const int number = find_row_form(a.batch, a.width, a.out_width, a.kernel_w, a.padding_w);
  return [&]<int... kNumber>(std::integer_sequence<int, kNumber...>) {
    return ((number == kNumber && launch<Form<kNumber>>(p, a, stream)) || ...);
  }(std::make_integer_sequence<int, static_cast<int>(std::size(kRowForms))>{});
}

}  // namespace dwconv
