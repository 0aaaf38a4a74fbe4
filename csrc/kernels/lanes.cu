// Forward, and grad_input at stride 1, of large kernels in float32 on planes about as wide as code is compiled for, on
// CUDA cores.
//
// The lanes of a warp lie on images and on rows. A lane has the sums of rows of outputs in registers, of some images or
// neighbouring rows, and walks down the kernel: of each of its rows, and the rows of the source that it meets, all
// products are straight code. Which pixels meet which outputs along a row is known when the code is compiled: nothing
// is multiplied but what meets, but for columns that narrower planes lack.
//
// Another warp copies the planes of the next images to shared memory meanwhile: a ring of stages. The warps of each
// scheduler take their rows from a counter of their own, and go on to the next stage while others are still at the last
// one.
//
// A weight is the same for all lanes of a warp, and ptxas keeps it in a uniform register. Then an FMA finds the pixel
// where the one before had it, and reads one number from the register file, the sum. But it does so only where it is
// sure that the lanes are together: a warp's place follows from a __shfl_sync(), bounds of loops come from shared
// memory and not from min() and max(), stores are predicated, and there are no calls.
//
// Columns that planes, and kernels, lack are zero, and give NaN where they meet Inf or NaN. So outputs that are not
// finite are computed again, when a block has done all others.
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
constexpr int kSchedulers = 4;  // of a multiprocessor: warps take turns at them
constexpr int kMostWarps = 4;   // of a scheduler, that compute

// How the lanes of a form lie on planes, and these in shared memory.
template <int kNumber>
struct Form {
  static constexpr RowsForm kForm = kRowsForms[kNumber];
  static constexpr int kSide = kForm.side, kReach = kForm.reach;
  static constexpr bool kChannelsLast = false;
  static constexpr int kHeldImages = kForm.images, kHeldRows = kForm.rows,
                       kHeld = kHeldImages * kHeldRows;  // of a lane
  static constexpr int kTaps = 2 * kReach + 1;
  static constexpr int kRowBytes = 4 * kSide;
  static constexpr int kPiece = !kForm.staged ? 0 : kSide == 56 ? 8 : 28;  // outputs of a lane that go out at once
  static constexpr int kWeightBytes = (kTaps + 3) / 4 * 16;                // from row to row
  // ptxas keeps weights in uniform registers where there are not too many others: 96, but for the widest kernels.
  static constexpr int kBoundThreads = kTaps > 32 ? 544 : 640;
};

struct Arguments {
  const float* source;
  const float* weight;
  const float* bias;
  float* target;
  int64_t source_stride[4], target_stride[4], weight_stride[4], bias_stride;  // in elements
  int batch, height, width, out_height, out_width, kernel_h, kernel_w, padding_h, padding_w, fan_out;
  int filters;
  bool quads;         // whether 4 outputs are written at once
  int lanes, units;   // lanes side by side, on images, and images of a warp
  int groups, items;  // groups of images of each filter, and all of them
  int share;          // items of a block
  int rows, tasks;    // rows of a warp, and what warps take from counters, of an item
  Divider by_tasks, by_stages;
  Copy copy;
  int stages, stage_bytes, unit_bytes;
  int weights_at, kernel_bytes;                                        // behind a stage's planes
  int zeros_at, barriers_at, steps_at, outputs_at, bytes, zeros_from;  // in shared memory
};

// Some images of a filter.
template <class F>
struct Item {
  int filter, image, units;

  __device__ Item(const Arguments& a, int item) {
    filter = item / a.groups, image = (item - filter * a.groups) * a.units;
    units = min(a.units, a.batch - image);
  }
};

// Begins to copy the weights of a filter, by one warp.
template <class F>
__device__ __forceinline__ void copy_weights(const Arguments& a, int filter, int to) {
  const float* weights = a.weight + filter * a.weight_stride[0];
  to += 4 * (F::kReach - a.padding_w);
  copy_rows<1>(weights, a.weight_stride[2], a.weight_stride[3], a.kernel_h, a.kernel_w, to, F::kWeightBytes, 4);
}

__device__ __forceinline__ void store_four(uint32_t to, const float (&from)[4]) {
  asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(to), "f"(from[0]), "f"(from[1]), "f"(from[2]),
               "f"(from[3])
               : "memory");
}
__device__ __forceinline__ void load_two(float* to, uint32_t from) {
  asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(to[0]), "=f"(to[1]) : "r"(from));
}

// All products of a row of weights and a row of pixels.
template <class F>
__device__ __forceinline__ void add_row(float (&sum)[F::kSide], uint32_t source,
                                        const float (&w)[F::kWeightBytes / 4]) {
  constexpr int kSide = F::kSide, kStep = kSide % 4 == 0 ? 4 : 2, kAhead = !F::kForm.ahead ? kSide : 2 * kStep;
  float x[kSide];
  const auto load = [&](int u) {
    if (u >= kSide) return;
    if constexpr (kStep == 4)
      load_four(&x[u], source + 4 * u);
    else
      load_two(&x[u], source + 4 * u);
  };
#pragma unroll
  for (int u = 0; u < kAhead; u += kStep) load(u);
#pragma unroll
  for (int u = 0; u < kSide; ++u) {
    if (F::kForm.ahead && u % kStep == 0) {
      load(u + kAhead);
      __syncwarp();  // or else ptxas would load what is used next
    }
#pragma unroll
    for (int n = 0; n < kSide; ++n) {
      const int o = u % 2 == 0 ? n : kSide - 1 - n, tap = u - o + F::kReach;
      if (tap >= 0 && tap < F::kTaps) sum[o] = fmaf(x[u], w[tap], sum[o]);
    }
  }
}

// Stores numbers where `valid`, without a branch: behind one by which a warp's lanes part, and code between, ptxas does
// not find that they are together again.
template <int kCount>
__device__ __forceinline__ void store_if(bool valid, float* to, const float* from) {
  if constexpr (kCount == 4)
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %0, 0;\n@p st.global.v4.f32 [%1], {%2, %3, %4, %5};\n}" ::"r"(
                     static_cast<int>(valid)),
                 "l"(to), "f"(from[0]), "f"(from[1]), "f"(from[2]), "f"(from[3])
                 : "memory");
  else
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %0, 0;\n@p st.global.f32 [%1], %2;\n}" ::"r"(static_cast<int>(valid)),
        "l"(to), "f"(from[0])
        : "memory");
}

// What a warp takes at once: some rows of an item. Returns whether all outputs are finite.
template <class F>
__device__ __forceinline__ bool compute(const Arguments& a, const Item<F>& item, uint32_t planes, uint32_t weight,
                                        uint32_t zeros, uint32_t stage, int chunk) {
  constexpr int kSide = F::kSide, kHeld = F::kHeld;
  constexpr bool kOneRow = F::kForm.lanes == 32;  // all lanes have the same one
  const int lane = threadIdx.x % 32, own = lane & (a.lanes - 1);
  const int own_row = chunk * a.rows + (kOneRow ? 0 : lane / a.lanes * F::kHeldRows);
  const int2 steps = shared<int2>(a.steps_at + 8 * chunk);
  uint32_t y = own_row - a.padding_h + steps.x;
  uint32_t source[F::kHeldImages];
#pragma unroll
  for (int n = 0; n < F::kHeldImages; ++n)
    source[n] = planes + min(own + n * a.lanes, item.units - 1) * a.unit_bytes + y * F::kRowBytes;
  weight += steps.x * F::kWeightBytes;
  float sum[kHeld][kSide] = {};
#pragma unroll 1
  for (int left = steps.y; left > 0; --left) {
    float w[F::kWeightBytes / 4];
    load_row(w, weight);
#pragma unroll
    for (int row = 0; row < F::kHeldRows; ++row) {
      const bool inside = y + row < static_cast<uint32_t>(a.height);
      if (!kOneRow || inside)
#pragma unroll
        for (int n = 0; n < F::kHeldImages; ++n)
          add_row<F>(sum[row * F::kHeldImages + n], kOneRow || inside ? source[n] + row * F::kRowBytes : zeros, w);
    }
#pragma unroll
    for (int n = 0; n < F::kHeldImages; ++n) source[n] += F::kRowBytes;
    ++y, weight += F::kWeightBytes;
  }

  if (a.bias) {
    const float bias = a.bias[item.filter * a.bias_stride];
#pragma unroll
    for (int held = 0; held < kHeld; ++held)
#pragma unroll
      for (int o = 0; o < kSide; ++o) sum[held][o] += bias;
  }
  struct Place {
    int row;
    bool valid;
    float* to;
  };
  const auto place_of = [&](int lane, int n) {  // of a lane's outputs of an image
    const int unit = (lane & (a.lanes - 1)) + n * a.lanes;
    const int row = chunk * a.rows + (kOneRow ? 0 : lane / a.lanes * F::kHeldRows);
    return Place{row, unit < item.units && row < a.out_height,
                 a.target + (item.image + unit) * a.target_stride[0] + item.filter * a.target_stride[1] +
                     row * a.target_stride[2]};
  };
  if constexpr (F::kForm.staged) {
    // Through shared memory, piece by piece, so that lanes side by side write what lies side by side.
    constexpr int kPiece = F::kPiece, kQuads = kPiece / 4;
    bool finite = true;
#pragma unroll
    for (int n = 0; n < F::kHeldImages; ++n) {
      float zero = 0;
#pragma unroll
      for (int piece = 0; piece < F::kHeldRows * kSide; piece += kPiece) {
        __syncwarp();
#pragma unroll
        for (int q = 0; q < kQuads; ++q) {
          float four[4];
#pragma unroll
          for (int k = 0; k < 4; ++k) {
            const int o = piece + 4 * q + k;
            four[k] = sum[o / kSide * F::kHeldImages + n][o % kSide];
            zero = fmaf(four[k], 0.f, zero);
          }
          store_four(stage + 16 * (kQuads * lane + q), four);
        }
        __syncwarp();
        if (a.quads) {
#pragma unroll
          for (int q = 0; q < kQuads; ++q) {
            const int number = lane + 32 * q, part = piece + number % kQuads * 4;
            const Place place = place_of(number / kQuads, n);
            float four[4];
            load_four(four, stage + 16 * number);
            store_if<4>(place.valid && (F::kHeldRows > 1 || part < a.out_width), place.to + part, four);
          }
        } else {
#pragma unroll 1
          for (int number = lane; number < 32 * kPiece; number += 32) {
            const int part = piece + number % kPiece, row = part / kSide, column = part - row * kSide;
            const Place place = place_of(number / kPiece, n);
            float one;
            asm volatile("ld.shared.f32 %0, [%1];" : "=f"(one) : "r"(stage + 4 * number));
            store_if<1>(place.valid && place.row + row < a.out_height && column < a.out_width,
                        place.to + row * a.target_stride[2] + column * a.target_stride[3], &one);
          }
        }
      }
      finite = finite && (zero == 0.f || own + n * a.lanes >= item.units);
    }
    return finite;
  } else {
    bool finite = true;
#pragma unroll
    for (int held = 0; held < kHeld; ++held) {
      const Place place = place_of(lane, held % F::kHeldImages);
      const int row = held / F::kHeldImages;
      const bool valid = place.valid && place.row + row < a.out_height;
      float zero = 0;
#pragma unroll
      for (int o = 0; o < kSide; ++o) zero = fmaf(sum[held][o], 0.f, zero);
      finite = finite && (!valid || zero == 0.f);
      float* const to = place.to + row * a.target_stride[2];
      if (a.quads) {
#pragma unroll
        for (int o = 0; o + 4 <= kSide; o += 4) store_if<4>(valid && o < a.out_width, to + o, &sum[held][o]);
      } else {
#pragma unroll
        for (int o = 0; o < kSide; ++o)
          store_if<1>(valid && o < a.out_width, to + o * a.target_stride[3], &sum[held][o]);
      }
    }
    return finite;
  }
}

// Computes again, tap by tap, what is not finite of some items. No loop is unrolled, and nothing called: see above.
template <class F>
__device__ __forceinline__ void compute_again(const Arguments& a, int first, int end, int threads) {
  const int pixels = a.out_height * a.out_width;
#pragma unroll 1
  for (int at = first; at < end; ++at) {
    const Item<F> item(a, at);
    const float bias = a.bias ? a.bias[item.filter * a.bias_stride] : 0;
#pragma unroll 1
    for (int n = threadIdx.x; n < item.units * pixels; n += threads) {
      const int unit = n / pixels, row = (n - unit * pixels) / a.out_width, column = n % a.out_width;
      float& output = a.target[(item.image + unit) * a.target_stride[0] + item.filter * a.target_stride[1] +
                               row * a.target_stride[2] + column * a.target_stride[3]];
      if (!is_finite(output)) output = sum_taps(a, item.filter, item.image + unit, row, column) + bias;
    }
  }
}

// A number from a counter, for a warp.
__device__ __forceinline__ uint32_t take_task(int& next, bool is_first) {
  uint32_t task = 0;
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %1, 0;\n@p atom.shared.add.u32 %0, [%2], 1;\n}"
               : "+r"(task)
               : "r"(static_cast<int>(is_first)), "r"(shared_address(&next))
               : "memory");
  return __shfl_sync(~0u, task, 0);
}

template <class F>
__global__ void __launch_bounds__(F::kBoundThreads) lanes(const __grid_constant__ Arguments a) {
  __shared__ int next_task[kSchedulers];
  __shared__ int all_finite;
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
  // The first row of the kernel in which any of a warp's lanes meets the image, and how many there are.
  for (int chunk = threadIdx.x; chunk < a.tasks; chunk += blockDim.x) {
    const int first_row = chunk * a.rows, begin = max(a.padding_h - (first_row + a.rows - 1), 0);
    const int last = min(a.height + a.padding_h - first_row, a.kernel_h);
    shared<int2>(a.steps_at + 8 * chunk) = {begin, last - begin};
  }
  if (threadIdx.x == 0) {
    for (int& next : next_task) next = 0;
    all_finite = 1;
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
      stages.wait_full();  // what comes before comes first
      stages.advance();
    }
    return;
  }

  const uint32_t base = once(shared_address(0));
  // Each scheduler has its own tasks, the same of all items together: all are done at the same time.
  const int queue = warp % kSchedulers;
  const uint32_t outputs = base + a.outputs_at + warp * 128 * F::kPiece;  // on their way out
  bool finite = true;
  for (;;) {
    uint32_t number = take_task(next_task[queue], lane == 0) * kSchedulers + queue;
    const int rank = a.by_tasks.split(number);  // leaves the item
    if (first + static_cast<int>(number) >= end) break;
    const Item<F> item(a, first + number);
    const int stage = a.by_stages.split(number), parity = number & 1, barrier = a.barriers_at + 16 * stage;
    wait(barrier, parity);
    const uint32_t planes = base + stage * a.stage_bytes;
    const uint32_t weights = shared_address(stage * a.stage_bytes + a.weights_at), zeros = base + a.zeros_at;
    finite &= compute<F>(a, item, planes, weights, zeros, outputs, middle_first(rank, a.tasks));
    arrive_together(barrier + 8, lane == 0);
  }
  if (!finite) all_finite = 0;
  meet<1>(32 * warps);
  if (all_finite == 0) compute_again<F>(a, first, end, 32 * warps);
}

// Bytes of shared memory; 0 where planes do not fit.
template <class F>
int place(Arguments& a, int shared_memory) {
  a.unit_bytes = a.height * F::kRowBytes | 16;  // an odd number of 16 bytes from image to image
  a.weights_at = a.units * a.unit_bytes, a.kernel_bytes = a.kernel_h * F::kWeightBytes;
  a.stage_bytes = static_cast<int>(round_up(a.weights_at + a.kernel_bytes, kBoxUnit));
  const int rest = F::kRowBytes + 16 * kMostStages + 8 * a.tasks + 16 + kSchedulers * kMostWarps * 128 * F::kPiece;
  a.stages = std::min(kMostStages, (shared_memory - 256 - rest) / a.stage_bytes);
  if (a.stages < 2) return 0;
  a.zeros_at = a.stages * a.stage_bytes;
  a.barriers_at = static_cast<int>(round_up(a.zeros_at + F::kRowBytes, 16));
  a.zeros_from = a.width == F::kSide ? a.zeros_at : 0;
  a.steps_at = a.barriers_at + 16 * kMostStages,
  a.outputs_at = static_cast<int>(round_up(a.steps_at + 8 * a.tasks, 16));
  a.bytes = a.outputs_at + kSchedulers * kMostWarps * 128 * F::kPiece;
  return a.bytes;
}

template <class F>
bool launch(const Problem& p, Arguments a, cudaStream_t stream) {
  const int multiprocessors = current_device().multiprocessors;
  a.copy = copy_of<F>(a.source, a.source_stride, a.filters, a.height, a.width, p.capability >= 90);
  // Fewer lanes side by side where many would be idle, or planes too large.
  const auto fits = [&](int count) {
    a.lanes = count, a.units = F::kHeldImages * count, a.rows = 32 / count * F::kHeldRows;
    a.tasks = static_cast<int>(ceil_div(a.out_height, a.rows));
    return F::kForm.fills(a.batch, a.units) && place<F>(a, static_cast<int>(p.shared_memory)) > 0;
  };
  for (int count = F::kForm.lanes; !fits(count); count /= 2)
    if (count == F::kForm.least_lanes) return false;
  a.groups = static_cast<int>(ceil_div(a.batch, a.units)), a.items = a.groups * a.filters;
  // Smaller problems are spread over the device in smaller pieces.
  if (a.items < multiprocessors) return false;
  a.share = static_cast<int>(ceil_div(a.items, multiprocessors));
  constexpr double kBusy = 0.7;  // of the multiprocessors
  if (a.share < 2 || a.items < kBusy * multiprocessors * a.share) return false;
  // A warp may wait for a stage's next images only when those before have come, or it would not see by the parity that
  // they have not. They come one after the other, so until then a scheduler's tasks of as many items as there are
  // stages are at other warps of its own: which are fewer.
  constexpr int kFewWarps = 3;
  const int warps = std::min(kMostWarps, a.stages * a.tasks / kSchedulers);
  if (warps < kFewWarps) return false;
  a.by_tasks = Divider(a.tasks), a.by_stages = Divider(a.stages);
  // Pieces of rows, or rows that follow each other, of 16 bytes each.
  const uint64_t low = reinterpret_cast<uintptr_t>(a.target) / 4 | a.target_stride[0] | a.target_stride[1];
  const bool follow = a.out_width == F::kSide && a.target_stride[2] == F::kSide && a.out_height % F::kHeldRows == 0;
  a.quads = a.target_stride[3] == 1 && low % 4 == 0 &&
            (F::kHeldRows > 1 ? follow : (a.target_stride[2] | a.out_width) % 4 == 0);
  const auto kernel = lanes<F>;
  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, a.bytes);
  launch_early(kernel, a, ceil_div(a.items, a.share), 32 * (kSchedulers * warps + 1), stream, {1, a.bytes});
  check_launch("lanes");
  return true;
}

}  // namespace

bool launch_lanes(const Problem& p, cudaStream_t stream) {
  if (p.capability < 80) return false;
  const Mapping m(p);
  Arguments a{};
  take_pass(a, p, m);
  if (a.source_stride[3] != 1) return false;
  const int number = find_rows_form(a.batch, a.width, a.out_width, a.kernel_w, a.padding_w);
  return [&]<int... kNumber>(std::integer_sequence<int, kNumber...>) {
    return ((number == kNumber && launch<Form<kNumber>>(p, a, stream)) || ...);
  }(std::make_integer_sequence<int, static_cast<int>(std::size(kRowsForms))>{});
}

}  // namespace dwconv
