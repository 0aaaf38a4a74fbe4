// toeplitz_tall_planes (toeplitz_tall_planes.cu) where the four warps of a warpgroup multiply together, on sm_90.
//
// A multiplication has band matrices of a column of the kernel in registers: 64 rows of the target by 16 of the source,
// or by the last 8, of two columns of the kernel. They stay there until the filter changes. The source lies in shared
// memory as often as the kernel has columns, each time moved by a column: rows of 8 columns of two images.
//
// A block is two pipelines of two warpgroups each, which take turns at its tasks. One warpgroup, the producers, moves
// planes that came by bulk copies; the other multiplies, and stores by bulk copies.
#include <algorithm>

#include "device.h"
#include "launch.h"
#include "mapping.h"
#include "overlap.cuh"
#include "raw_planes.cuh"
#include "stream.cuh"
#include "toeplitz_large.cuh"
#include "toeplitz_large.h"
#include "toeplitz_tall_planes.h"
#include "warpgroups.cuh"

namespace dwconv {
namespace {

constexpr int kTaps = 5, kFar = kTaps / 2;  // columns of the kernel in memory
constexpr int kGroups = 7;                  // of 8 columns or rows in memory
constexpr int kSide = 8 * kGroups, kRowBytes = 2 * kSide;
constexpr int kImages = 2;  // of a task
constexpr int kUnitBytes = 16 * kSide, kTapBytes = kImages * kGroups * kUnitBytes, kMovedBytes = kTaps * kTapBytes;
constexpr int kRawSlots = 2;
constexpr int kBandsBefore = 8;  // so many of 8 x 8 before the diagonal, and behind
constexpr int kPipelines = 2, kThreads = 2 * kPipelines * kGroupThreads;

// Planes of up to two images of a target.
struct Pairing {
  int target, image, images;
};

struct TallGroups : Large {
  int source_bytes, out_bytes, plane_bytes;  // of a plane, and from one to the next in shared memory
  int weight_bytes;                          // of a filter, for two of which there is room
  int moved_at, raw_at, pipeline_bytes;      // in a pipeline's shared memory, of which there is so much
  EarlyPlanes early;
  RawPlanes raw;  // if the source begins between multiples of 16 bytes

  // What a pipeline has begins at `base`: barriers, weights, moved planes, raw ones, and targets.
  static constexpr int kWeightsAt = 128;
  static __device__ int raw_barrier(int base, int slot) { return base + 8 * slot; }
  static __device__ int full_barrier(int base) { return base + 32; }
  static __device__ int empty_barrier(int base) { return base + 40; }

  __device__ Pairing pairing(uint32_t number) const {
    Pairing t;
    t.image = by_images.split(number) * kImages;
    t.target = static_cast<int>(number);
    t.images = min(kImages, batch - t.image);
    return t;
  }
};

template <typename T, bool kRaw>
__device__ void load_raw(const TallGroups& a, int base, int number, int slot) {
  const Pairing t = a.pairing(number);
  uint32_t channel = t.target;
  a.by_fan_out.split(channel);
  const int to = base + a.raw_at + slot * kImages * a.plane_bytes, barrier = a.raw_barrier(base, slot);
  if constexpr (kRaw) {
    before_bulk_copies();  // ends of planes may have been written here
    copy_raw(a.raw, a, {static_cast<int>(channel), t.image, 0, t.images}, to, barrier);
  } else {
    const T* source = static_cast<const T*>(a.source) + t.image * a.source_image + channel * a.source_channel;
    expect_bytes(barrier, t.images * a.source_bytes);
#pragma unroll 1
    for (int n = 0; n < t.images; ++n)
      copy_bulk(shared_address(to + n * a.plane_bytes), source + n * a.source_image, a.source_bytes, barrier);
  }
  arrive(barrier);
}

// Elements at the ends of a plane that raw copies leave out. The thread that has the first row, or the last one, loads
// them: nobody else reads them.
template <typename T>
__device__ void load_ends(const TallGroups& a, const Pairing& t, int image, int row, int at) {
  uint32_t channel = t.target;
  a.by_fan_out.split(channel);
  const bool has_head = row == 0 && channel == 0, has_tail = row == a.width - 1 && channel + 1 == a.raw.channels;
  if (image >= t.images || !(has_head || has_tail)) return;
  const T* source =
      static_cast<const T*>(a.source) + (t.image + image) * a.source_image + channel * a.source_channel + row * kSide;
  if (has_head)
    for (int k = 0; k < a.raw.head; ++k) shared<T>(at + 2 * k) = source[k];
  if (has_tail)
    for (int k = kSide - a.raw.tail; k < kSide; ++k) shared<T>(at + 2 * k) = source[k];
}

// Words of a row, with one of zeros before it and one behind.
using RowWords = uint32_t[4 * kGroups + 2];

// Those of one that begins kSkip words behind a multiple of 16 bytes, and half a word more.
template <int kSkip>
__device__ void read_raw(RowWords& words, int from, bool half) {
  uint32_t in[4 * (kGroups + 1)];
#pragma unroll
  for (int k = 0; k <= kGroups; ++k) {
    const uint4 four = shared<uint4>(from + 16 * k);
    in[4 * k] = four.x, in[4 * k + 1] = four.y, in[4 * k + 2] = four.z, in[4 * k + 3] = four.w;
  }
#pragma unroll
  for (int k = 0; k < 4 * kGroups; ++k) words[k + 1] = from_half(in[k + kSkip], in[k + kSkip + 1], half);
}

// Producers load planes of every other task from `first` on, and move them. A thread has a row.
template <typename T, bool kRaw>
__device__ void produce(const TallGroups& a, int base, int first, int end, int pipeline, int thread) {
  const bool loads = thread / 32 == 0 && is_elected();
  if (loads)
#pragma unroll 1
    for (int n = 0; n < kRawSlots && first + n * kPipelines < end; ++n)
      load_raw<T, kRaw>(a, base, first + n * kPipelines, n);
  const bool has_row = thread < kImages * a.width;
  const int image = thread >= a.width, row = thread - image * a.width;
  int target = -1, set = 1, round = 0;
#pragma unroll 1
  for (int number = first; number < end; number += kPipelines, ++round) {
    const Pairing t = a.pairing(number);
    const bool changes = t.target != target;
    target = t.target;
    LargeWeights<T, 8> weights;
    if (changes) weights.begin(a, target, thread);

    const int slot = round % kRawSlots;
    wait(a.raw_barrier(base, slot), round / kRawSlots & 1);
    RowWords words;
    words[0] = words[4 * kGroups + 1] = 0;
    const int from = base + a.raw_at + (slot * kImages + image) * a.plane_bytes + row * kRowBytes;
    const bool there = image < t.images && has_row;
    if (kRaw && there) {
      load_ends<T>(a, t, image, row, from + a.raw.begin);
      const bool half = a.raw.begin % 4 != 0;
      switch (a.raw.begin / 4) {
        case 0: read_raw<0>(words, from, half); break;
        case 1: read_raw<1>(words, from, half); break;
        case 2: read_raw<2>(words, from, half); break;
        default: read_raw<3>(words, from, half); break;
      }
    } else {
#pragma unroll
      for (int k = 0; k < kGroups; ++k) {
        const uint4 four = there ? shared<uint4>(from + 16 * k) : uint4{};
        words[4 * k + 1] = four.x, words[4 * k + 2] = four.y, words[4 * k + 3] = four.z, words[4 * k + 4] = four.w;
      }
    }
    meet_group(1 + pipeline);  // all have read them
    if (loads && number + kRawSlots * kPipelines < end)
      load_raw<T, kRaw>(a, base, number + kRawSlots * kPipelines, slot);

    const int to = base + a.moved_at + image * kGroups * kUnitBytes + 16 * row;
    if (round > 0) wait(a.empty_barrier(base), round & 1 ^ 1);
    if (changes) set ^= 1, weights.write(a, base + a.kWeightsAt + set * a.weight_bytes);
    if (has_row)
#pragma unroll
      for (int tap = 0; tap < kTaps; ++tap)
#pragma unroll
        for (int k = 0; k < kGroups; ++k) {
          // Column x has what is in x + tap - kFar of the plane.
          const auto word = [&](int i) {
            const int at = 4 * k + i + tap / 2;
            return tap % 2 == 0 ? words[at] : __byte_perm(words[at], words[at + 1], 0x5432);
          };
          shared<uint4>(to + tap * kTapBytes + k * kUnitBytes) = {word(0), word(1), word(2), word(3)};
        }
    before_bulk_copies();
    arrive(a.full_barrier(base));
  }
}

template <typename T>
__device__ void consume(const TallGroups& a, int base, int first, int end, int pipeline, int thread) {
  constexpr int kSteps = kGroups / 2, kLastSteps = (kTaps + 1) / 2;  // of 16 rows for a tap, and of the last 8 for two
  const int warp = thread / 32, lane = thread % 32, quad = lane / 4, pair = lane % 4 * 2;
  const int out_at = base + a.raw_at + kRawSlots * kImages * a.plane_bytes;
  const uint32_t moved_at = __shfl_sync(~0u, shared_address(base + a.moved_at), 0);
  const Matrices moved(moved_at, 128, kUnitBytes), last_moved(moved_at, kTapBytes, kUnitBytes);
  const Matrices last_moved_alone(moved_at, 0, kUnitBytes);  // twice, once by zeros
  uint32_t bands[kTaps][kSteps][4], last_bands[kLastSteps][4];
  float bias = 0;
  int target = -1, set = 1, round = 0;
#pragma unroll 1
  for (int number = first; number < end; number += kPipelines, ++round) {
    const Pairing t = a.pairing(number);
    wait(a.full_barrier(base), round & 1);
    if (t.target != target) {
      target = t.target, set ^= 1;
      bias = a.bias ? widen(static_cast<const T*>(a.bias)[target * a.bias_stride]) : 0.f;
      const int entry = pair - (16 * warp + quad) + 8 * kBandsBefore + 7;
      const int weights = base + a.kWeightsAt + set * a.weight_bytes + (entry & 1) * a.copy + 2 * (entry & ~1);
      const auto column_of = [&](int tap) {
        const int column = a.padding_h + tap - kFar;
        const bool there = tap < kTaps && static_cast<uint32_t>(column) < static_cast<uint32_t>(a.kernel_h);
        return weights + (there ? column : kTaps) * a.weight_pitch;  // zeros behind the last one
      };
#pragma unroll
      for (int tap = 0; tap < kTaps; ++tap)
#pragma unroll
        for (int k = 0; k < kSteps; ++k) {
          const int from = column_of(tap) + 32 * k;
          bands[tap][k][0] = bands[tap][k][3] = shared<uint32_t>(from);
          bands[tap][k][1] = shared<uint32_t>(from - 16), bands[tap][k][2] = shared<uint32_t>(from + 16);
        }
#pragma unroll
      for (int k = 0; k < kLastSteps; ++k)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const int from = column_of(2 * k + h) + 32 * kSteps;
          last_bands[k][2 * h] = shared<uint32_t>(from), last_bands[k][2 * h + 1] = shared<uint32_t>(from - 16);
        }
    }
    float sum[kImages * kGroups][4];
#pragma unroll
    for (int j = 0; j < kImages * kGroups; ++j)
#pragma unroll
      for (int v = 0; v < 4; ++v) sum[j][v] = bias;
    before_multiplications();
#pragma unroll
    for (int tap = 0; tap < kTaps; ++tap)
#pragma unroll
      for (int k = 0; k < kSteps; ++k)
        multiply_together(sum, bands[tap][k], moved.from((tap * kTapBytes + 256 * k) / 16), T{});
#pragma unroll
    for (int tap = 0; tap < kTaps; tap += 2)
      multiply_together(sum, last_bands[tap / 2],
                        (tap + 1 < kTaps ? last_moved : last_moved_alone).from((tap * kTapBytes + 256 * kSteps) / 16),
                        T{});
    commit_multiplications();
    wait_multiplications<0>();
    arrive_together(a.empty_barrier(base), lane == 0);

    if (warp == 0) wait_stores();  // what lay there is on its way
    meet_group(1 + kPipelines + pipeline);
    const auto none = narrow_pair(0.f, 0.f, T{});
    Pair<T> zero[] = {none, none};
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int row = 16 * warp + 8 * h + quad, to = out_at + row * kRowBytes + 2 * pair;
      if (row < a.out_width)
#pragma unroll
        for (int j = 0; j < kImages * kGroups; ++j) {
          const auto values = narrow_pair(sum[j][2 * h], sum[j][2 * h + 1], T{});
#if __CUDA_ARCH__ >= 800
          zero[h] = __hfma2(values, none, zero[h]);
#endif
          shared<Pair<T>>(to + j / kGroups * a.plane_bytes + j % kGroups * kLargeGroupBytes) = values;
        }
    }
    zero[0] = __hadd2(zero[0], zero[1]);
    if (!(__low2float(zero[0]) == 0 && __high2float(zero[0]) == 0)) {  // NaN: an output of the thread is not finite
#pragma unroll 1
      for (int v = 0; v < 2 * 2 * kImages * kGroups; ++v) {
        const int n = v / (4 * kGroups), row = 16 * warp + 8 * (v / 2 % 2) + quad;
        const int column = v / 4 % kGroups * kLargeGroup + pair + v % 2;
        if (n >= t.images || row >= a.out_width) continue;
        T& to = shared<T>(out_at + n * a.plane_bytes + row * kRowBytes + 2 * column);
        if (!is_finite(widen(to))) to = narrow<T>(sum_of_taps<T>(a, t.target, t.image + n, column, row, 1, true));
      }
    }
    before_bulk_copies();
    meet_group(1 + kPipelines + pipeline);
    if (warp == 0) {
      T* to = static_cast<T*>(a.target) + t.image * a.target_image + t.target * a.target_channel;
      if (is_elected())
#pragma unroll 1
        for (int n = 0; n < t.images; ++n)
          store_bulk(to + n * a.target_image, shared_address(out_at + n * a.plane_bytes), a.out_bytes);
      commit_stores();
    }
  }
  if (warp == 0) wait_stores();
}

template <typename T, bool kRaw>
__global__ void __launch_bounds__(launch_threads(kThreads), 1)
    toeplitz_tall_groups(const __grid_constant__ TallGroups a) {
  if (!kHasWarpgroups) return;
  const int block = blockIdx.x, blocks = gridDim.x;
  const int first = static_cast<int>(static_cast<int64_t>(a.tasks) * block / blocks);
  const int end = static_cast<int>(static_cast<int64_t>(a.tasks) * (block + 1) / blocks);
  let_next_kernel_start();
  ask_for_planes<T>(a, a.early, first, end - first, kImages);
  // Zeros around the weights.
  for (int pipeline = 0; pipeline < kPipelines; ++pipeline)
    for (int i = 16 * threadIdx.x; i < a.moved_at; i += 16 * kThreads)
      shared<uint4>(pipeline * a.pipeline_bytes + i) = uint4{};
  // And below the last row of planes.
  constexpr int kUnits = kMovedBytes / kUnitBytes;
  const int below = kSide - a.width;
  for (int i = threadIdx.x; i < kPipelines * kUnits * below; i += kThreads) {
    const int unit = i / below, row = a.width + i % below;
    shared<uint4>(unit / kUnits * a.pipeline_bytes + a.moved_at + unit % kUnits * kUnitBytes + 16 * row) = uint4{};
  }
  __syncthreads();
  const int group = threadIdx.x / kGroupThreads, thread = threadIdx.x % kGroupThreads;
  const int pipeline = group % kPipelines, base = pipeline * a.pipeline_bytes;
  if (group < kPipelines && thread == 0) {
    for (int slot = 0; slot < kRawSlots; ++slot) init_barrier(a.raw_barrier(base, slot), 1);
    init_barrier(a.full_barrier(base), kGroupThreads);
    init_barrier(a.empty_barrier(base), kGroupWarps * kWarpArrivals);
  }
  before_bulk_copies();
  wait_for_kernel_before();
  __syncthreads();
  if (group < kPipelines) {
    give_registers<kRaw ? 96 : 88>();
    produce<T, kRaw>(a, base, first + pipeline, end, pipeline, thread);
  } else {
    take_registers<kRaw ? 160 : 168>();
    consume<T>(a, base, first + pipeline, end, pipeline, thread);
  }
}

// Lays a pipeline's shared memory out, and returns whether a problem fits.
bool apply(TallGroups& a) {
  const auto set = [](int& to, int64_t value) { to = static_cast<int>(value); };
  const auto fits = [](int rows) { return rows <= kSide && rows * 4 >= kSide * 3; };
  if (a.height != kSide || a.out_height != kSide || !fits(a.width) || !fits(a.out_width) || a.kernel_h < kTaps - 1 ||
      a.padding_h > kFar || a.kernel_h - 1 - a.padding_h > kFar || a.source_row != kSide || a.target_row != kSide)
    return false;
  const bool can_be_raw = describe_raw(a.raw, a, kSide);
  if ((a.raw.begin > 0 && !can_be_raw) || reinterpret_cast<intptr_t>(a.target) % 16 != 0) return false;
  for (const int64_t step : {a.source_image, a.source_channel, a.target_image, a.target_channel})
    if (step % 8 != 0) return false;
  a.first = -kBandsBefore, a.depth = 2 * kBandsBefore + 1, a.first_tap = kLargeGroup * a.first - 7 + a.padding_w;
  set(a.weight_pitch, 2 * round_up(kLargeGroup * a.depth + 7, 2));
  int64_t copy = (kTaps + int64_t{1}) * a.weight_pitch;
  copy += (64 - copy % 128 + 128) % 128;  // so that the copies do not meet in a bank
  set(a.copy, copy), set(a.weight_bytes, round_up(2 * copy, 128));
  set(a.source_bytes, int64_t{kRowBytes} * a.width), set(a.out_bytes, int64_t{kRowBytes} * a.out_width);
  set(a.plane_bytes, std::max(a.source_bytes + (a.raw.begin > 0 ? kUnit : 0), a.out_bytes));
  a.raw.plane = a.plane_bytes;
  set(a.moved_at, a.kWeightsAt + 2 * int64_t{a.weight_bytes}), set(a.raw_at, a.moved_at + int64_t{kMovedBytes});
  set(a.pipeline_bytes, round_up(a.raw_at + (kRawSlots + int64_t{1}) * kImages * a.plane_bytes, 128));
  const int side = std::min(a.kernel_w, kGroupThreads);
  a.by_weight_side = Divider(side), a.weight_lanes = kGroupThreads / side;
  a.by_images = Divider(ceil_div(a.batch, kImages));
  set(a.tasks, ceil_div(a.batch, kImages) * a.targets);
  a.early = {kPipelines * kRawSlots, Divider(ceil_div(a.source_bytes, 128))};
  return true;
}

template <typename T>
bool launch(const Problem& p, cudaStream_t stream) {
  TallGroups a{};
  static_cast<Large&>(a) = arguments_of(p, true);
  if (p.stride_h != 1 || p.stride_w != 1) return false;
  const Device& device = current_device();
  if (!has_warpgroups(toeplitz_tall_groups<T, false>)) return false;
  if (!apply(a) || a.tasks < 2 * device.multiprocessors || a.batch * 4 < round_up(a.batch, kImages) * 3) return false;
  const int64_t bytes = int64_t{kPipelines} * a.pipeline_bytes;
  if (bytes > p.shared_memory) return false;
  const auto kernel = a.raw.begin > 0 ? toeplitz_tall_groups<T, true> : toeplitz_tall_groups<T, false>;
  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
  launch_early(kernel, a, std::min(a.tasks, device.multiprocessors), kThreads, stream, {.shared_bytes = bytes});
  check_launch("toeplitz_tall_groups");
  return true;
}

}  // namespace

bool launch_toeplitz_tall_groups(const Problem& exchanged, cudaStream_t stream) {
  return exchanged.dtype == DType::kFloat16 ? launch<__half>(exchanged, stream)
                                            : launch<__nv_bfloat16>(exchanged, stream);
}

}  // namespace dwconv
