// toeplitz_large (toeplitz_large.cuh) on planes of at most 16 columns and 14 rows, on sm_90: whole planes of 64 images
// at once, by multiplications that the four warps of a warpgroup begin together.
//
// A multiplication has one row of the source of 64 images, in registers, and leads to all rows of their targets: for
// row y of the source, row r of the target needs the band matrix of row y - r + padding of the kernel. Matrices lie in
// shared memory one behind the other, from the kernel's last row on, so what row y needs begins one matrix before what
// row y - 1 needs. That is all: as many multiplications as the source has rows, whatever the kernel's size, and sums of
// whole targets in registers.
//
// A task is two neighbouring planes of 64 images, since one may begin between multiples of 16 bytes: a box of a tensor
// map comes, and one leaves. Two warpgroups have a plane each; the third one makes matrices of the next task's filters.
// Where the source begins between multiples of 16 bytes, a box has the units that the planes have a part of.
#include <algorithm>
#include <limits>

#include "boxes.cuh"
#include "device.h"
#include "overlap.cuh"
#include "raw_planes.cuh"
#include "stream.h"
#include "toeplitz_large.cuh"
#include "toeplitz_large.h"
#include "toeplitz_large_planes.h"
#include "warpgroups.cuh"

namespace dwconv {
namespace {

constexpr int kImages = kImagesTogether;  // of a multiplication
constexpr int kColumns = kImagesColumns, kMostRows = kImagesRows;
constexpr int kTiles = kMostRows * kColumns / 8;  // of sums: two for a row of the target
constexpr int kMatrixBytes = 2 * kColumns * kColumns;
constexpr int kMostMatrices = (kColumns + kMostRows - 1 + 3) / 4 * 4;  // of a filter
constexpr int kEntries = 32;  // of a row of the kernel between zeros, as far as planes meet it
constexpr int kMiddle = 15;   // of them: where column 0 of the source meets column 0 of the target
constexpr int kConsumers = 2, kThreads = (kConsumers + 1) * kGroupThreads;
constexpr int kSlots = 2;  // for sources, and for matrices
constexpr int kWordBytes = 4;

struct Images : Large {
  CUtensorMap source_map, target_map;  // of pairs of planes, of images
  int pairs, groups;                   // of planes; of images
  int each, more;                      // tasks of a block: `each`, and one more for the first `more`
  RawPlanes raw;                       // of whose sizes `plane` is from an image to the next in a slot
  int matrices;                        // of a filter, a multiple of kGroupWarps
  int taps_at, taps_copy, taps_bytes;  // rows of a filter: two copies, a column apart
  int filter_bytes;                    // of a filter's matrices
  int matrices_at, slot_bytes;
  Divider by_groups;
};

// Barriers, at the beginning of shared memory, and the biases of the filters in the slots.
__device__ inline int source_full(int slot) {
  return 8 * slot;
}
__device__ inline int source_empty(int slot) {
  return 8 * (kSlots + slot);
}
__device__ inline int matrices_full(int slot) {
  return 8 * (2 * kSlots + slot);
}
__device__ inline int matrices_empty(int slot) {
  return 8 * (3 * kSlots + slot);
}
constexpr int kBiasesAt = 8 * 4 * kSlots, kTapsAt = kBiasesAt + 4 * kConsumers * kSlots;
static_assert(kTapsAt % 16 == 0);

// A task: a pair of planes of a group of images.
struct ImagesTask {
  int pair, group;
  int filters = -1;  // how many pairs of filters the block had before
};

// Tasks in turn, groups of images faster than pairs of planes.
class ImagesTasks {
 public:
  __device__ ImagesTasks(const Images& a, int first) : groups_(a.groups) {
    uint32_t pair = first;
    now_.group = a.by_groups.split(pair) - 1, now_.pair = static_cast<int>(pair);
  }
  __device__ const ImagesTask& next() {
    if (++now_.group == groups_) now_.group = 0, ++now_.pair;
    if (now_.filters < 0 || now_.group == 0) ++now_.filters;
    return now_;
  }
  // Whether the task behind this one has other filters.
  __device__ bool changes() const { return now_.group + 1 == groups_; }

 private:
  ImagesTask now_;
  const int groups_;
};

// Rows of two filters on their way to matrices: row `matrix` is that of a source's row y and a target's row r where
// matrix = height - 1 - y + r.
template <typename T>
__device__ void write_taps(const Images& a, int first_filter, int warp, int lane) {
  const int tap = lane - kMiddle + a.padding_w;
  const bool inside = static_cast<uint32_t>(tap) < static_cast<uint32_t>(a.kernel_w) && lane < kEntries - 1;
  // All are under way before the first one is there.
  T values[kConsumers][kMostMatrices / kGroupWarps];
#pragma unroll
  for (int k = 0; k < kConsumers; ++k) {
    const int filter = first_filter + k;
    const T* weight = static_cast<const T*>(a.weight) + filter * a.weight_filter + tap * a.weight_column;
#pragma unroll
    for (int i = 0; i < kMostMatrices / kGroupWarps; ++i) {
      const int row = a.height - 1 - warp - i * kGroupWarps + a.padding_h;
      const bool there = inside && filter < a.targets && static_cast<uint32_t>(row) < static_cast<uint32_t>(a.kernel_h);
      values[k][i] = there ? weight[row * a.weight_row] : T{};
    }
  }
#pragma unroll
  for (int k = 0; k < kConsumers; ++k)
#pragma unroll
    for (int i = 0; i < kMostMatrices / kGroupWarps; ++i) {
      if (i * kGroupWarps >= a.matrices) break;
      const int at = kTapsAt + k * a.taps_bytes + (warp + i * kGroupWarps) * 2 * kEntries + 2 * lane;
      shared<T>(at) = values[k][i];
      if (lane > 0) shared<T>(at + a.taps_copy - 2) = values[k][i];
    }
}

// Matrices of a filter: columns of the target one after the other, each with 8 columns of the source.
__device__ inline void write_matrices(const Images& a, int from, int to, int thread) {
  const int column = thread / 16 % 2 * 8 + thread % 8, entry = thread / 8 % 2 * 8 - column + kMiddle;
  from += (entry & 1) * a.taps_copy + 2 * (entry & ~1) + thread / 32 * 2 * kEntries;
  to += 16 * thread;
#pragma unroll 2
  for (int matrix = 0; matrix < a.matrices; matrix += kGroupWarps) {
    uint32_t words[4];
#pragma unroll
    for (int k = 0; k < 4; ++k) words[k] = shared<uint32_t>(from + 4 * k);
    shared<uint4>(to) = {words[0], words[1], words[2], words[3]};
    from += kGroupWarps * 2 * kEntries, to += kGroupWarps * kMatrixBytes;
  }
}

// Asks for sources, and makes matrices.
template <typename T>
__device__ void produce(const Images& a, int first, int count, int thread) {
  const int warp = __shfl_sync(~0u, thread / 32, 0), lane = thread % 32;
  ImagesTasks tasks(a, first), loads(a, first);
  // By all of the first warp.
  const auto load = [&](int number) {
    const ImagesTask& t = loads.next();
    const int slot = number % kSlots;
    if (number >= kSlots) wait(source_empty(slot), (number / kSlots - 1) & 1);
    if (is_elected()) {
      expect_bytes(source_full(slot), a.slot_bytes);
      copy_box(a.source_at + slot * a.slot_bytes, a.source_map, raw_word(a.raw, t.pair * a.height * a.width),
               t.group * kImages, 0, 0, source_full(slot));
      arrive(source_full(slot));
    }
    __syncwarp();
  };
  if (warp == 0) load(0);
  int before = -1;
#pragma unroll 1
  for (int number = 0; number < count; ++number) {
    const ImagesTask& t = tasks.next();
    if (t.filters != before) {
      before = t.filters;
      const int slot = t.filters % kSlots;
      if (t.filters >= kSlots) wait(matrices_empty(slot), (t.filters / kSlots - 1) & 1);
      write_taps<T>(a, kConsumers * t.pair, warp, lane);
      if (thread < kConsumers) {
        const int filter = kConsumers * t.pair + thread;
        const bool there = a.bias != nullptr && filter < a.targets;
        shared<float>(kBiasesAt + 4 * (kConsumers * slot + thread)) =
            there ? widen(static_cast<const T*>(a.bias)[filter * a.bias_stride]) : 0.f;
      }
      meet<1>(kGroupThreads);
#pragma unroll
      for (int k = 0; k < kConsumers; ++k)
        write_matrices(a, kTapsAt + k * a.taps_bytes, a.matrices_at + (kConsumers * slot + k) * a.filter_bytes, thread);
      before_bulk_copies();
      arrive(matrices_full(slot));
      meet<1>(kGroupThreads);  // the next filters' rows take the place of these
    }
    if (warp == 0 && number + 1 < count) {
      // The first planes are there before others are asked for: memory would serve all alike.
      if (number == 0) wait(source_full(0), 0);
      load(number + 1);
    }
  }
}

// A warpgroup has one of the two planes.
template <typename T, bool kRaw>
__device__ void consume(const Images& a, int first, int count, int group, int warp) {
  constexpr int kFirstBarrier = 2;  // producers have the first one
  const int lane = threadIdx.x % 32, quad = lane / 4, pair = lane % 4 * 2, image = 16 * warp + quad;
  const int source_row = 2 * a.width, plane = a.height * source_row;
  const int pitch = kRaw ? a.raw.plane : kConsumers * plane;
  const int out_row = 2 * a.out_width, out_plane = a.out_height * out_row, out_pitch = kConsumers * out_plane;
  const int out_at = a.out_at + image * out_pitch + group * out_plane + 2 * pair;
  const bool low_inside = pair < a.width, high_inside = 8 + pair < a.width;
  const bool stores = group == 0 && warp == 0;
  ImagesTasks tasks(a, first);
#pragma unroll 1
  for (int number = 0; number < count; ++number) {
    const ImagesTask t = tasks.next();
    const int slot = number % kSlots, matrices = t.filters % kSlots;
    wait(matrices_full(matrices), t.filters / kSlots & 1);
    const float bias = shared<float>(kBiasesAt + 4 * (kConsumers * matrices + group));
    float sum[kTiles][4];
#pragma unroll
    for (int j = 0; j < kTiles; ++j)
#pragma unroll
      for (int v = 0; v < 4; ++v) sum[j][v] = bias;
    const Matrices first_matrix(
        __shfl_sync(~0u, shared_address(a.matrices_at + (kConsumers * matrices + group) * a.filter_bytes), 0), 128,
        256);
    wait(source_full(slot), number / kSlots & 1);

    const int source_at = a.source_at + slot * a.slot_bytes + group * plane + (kRaw ? a.raw.begin : 0);
    if constexpr (kRaw) {
      const int first_image = t.group * kImages, begin = 16 * warp;
      load_ends<T>(a.raw, a, {kConsumers * t.pair + group, first_image, begin, min(begin + 16, a.batch - first_image)},
                   source_at);
      before_bulk_copies();  // which come to this place later
    }
    uint32_t from = shared_address((kRaw ? source_at & ~3 : source_at) + image * pitch + 2 * pair);
    const auto load = [&](uint32_t (&x)[4]) {
      const auto word = [&](uint32_t at) {
        const uint32_t here = shared_at<uint32_t>(at);
        if constexpr (!kRaw) return here;
        return from_half(here, shared_at<uint32_t>(at + 4), a.raw.begin % 4 != 0);
      };
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const uint32_t low = word(from + 8 * h * pitch), high = word(from + 8 * h * pitch + 16);
        x[h] = low_inside ? low : 0, x[2 + h] = high_inside ? high : 0;
      }
      from += source_row;
    };
    const auto begin_row = [&](const uint32_t (&x)[4], int y) {
      before_multiplications();
      multiply_together(sum, x, first_matrix.from((a.height - 1 - y) * (kMatrixBytes / 16)), T{});
      commit_multiplications();
    };
    uint32_t x[4], next[4];
    load(x);
    int y = 0;
#pragma unroll 1
    for (; y + 1 < a.height; y += 2) {
      begin_row(x, y);
      load(next);
      begin_row(next, y + 1);
      wait_multiplications<1>();
      load(x);
      wait_multiplications<0>();
    }
    if (y < a.height) begin_row(x, y), wait_multiplications<0>();
    arrive_together(source_empty(slot), lane == 0);
    if (tasks.changes()) arrive_together(matrices_empty(matrices), lane == 0);

    if (stores) {
      wait_stores();
      __syncwarp();
    }
    meet<kFirstBarrier>(kConsumers * kGroupThreads);
    const auto none = narrow_pair(0.f, 0.f, T{});
    Pair<T> zero[] = {none, none};
#pragma unroll
    for (int h = 0; h < 2; ++h)
#pragma unroll
      for (int j = 0; j < kTiles; ++j) {
        if (j / 2 >= a.out_height || j % 2 * 8 + pair >= a.out_width) continue;
        const auto values = narrow_pair(sum[j][2 * h], sum[j][2 * h + 1], T{});
#if __CUDA_ARCH__ >= 800
        zero[h] = __hfma2(values, none, zero[h]);
#endif
        shared<Pair<T>>(out_at + 8 * h * out_pitch + j / 2 * out_row + j % 2 * 16) = values;
      }
    zero[0] = __hadd2(zero[0], zero[1]);
    const int target = kConsumers * t.pair + group;
    if (!(__low2float(zero[0]) == 0 && __high2float(zero[0]) == 0) && target < a.targets) {  // an output is not finite
#pragma unroll 1
      for (int v = 0; v < 2 * kTiles * 2; ++v) {
        const int h = v / (2 * kTiles), row = v / 4 % kMostRows, column = v / 2 % 2 * 8 + pair + v % 2;
        const int n = t.group * kImages + image + 8 * h;
        if (row >= a.out_height || column >= a.out_width || n >= a.batch) continue;
        T& to = shared<T>(out_at + 8 * h * out_pitch + row * out_row + 2 * (column - pair));
        if (!is_finite(widen(to))) to = narrow<T>(sum_of_taps<T>(a, target, n, row, column, 1, false));
      }
    }
    before_bulk_copies();
    meet<kFirstBarrier>(kConsumers * kGroupThreads);
    if (stores) {
      if (is_elected()) {
        store_box(a.target_map, a.out_at, t.pair * a.out_height * a.out_width, t.group * kImages, 0, 0);
        commit_stores();
      }
      __syncwarp();
    }
  }
  if (stores) wait_stores();
}

template <typename T, bool kRaw>
__global__ void __launch_bounds__(launch_threads(kThreads), 1) toeplitz_large_images(const __grid_constant__ Images a) {
  if (!kHasWarpgroups) return;
  let_next_kernel_start();
  const int block = blockIdx.x, first = block * a.each + min(block, a.more), count = a.each + (block < a.more);
  const int group = __shfl_sync(~0u, threadIdx.x / kGroupThreads, 0);
  if (threadIdx.x == 0) {
    prefetch(a.source_map), prefetch(a.target_map);
    for (int slot = 0; slot < kSlots; ++slot) {
      init_barrier(source_full(slot), 1);
      init_barrier(source_empty(slot), kConsumers * kGroupWarps * kWarpArrivals);
      init_barrier(matrices_full(slot), kGroupThreads);
      init_barrier(matrices_empty(slot), kConsumers * kGroupWarps * kWarpArrivals);
    }
    before_bulk_copies();
  }
  wait_for_kernel_before();
  __syncthreads();
  if (group == 0)
    produce<T>(a, first, count, threadIdx.x);
  else
    consume<T, kRaw>(a, first, count, group - 1, __shfl_sync(~0u, threadIdx.x / 32 % kGroupWarps, 0));
}

template <typename T>
bool launch(const LargeProblem& p, cudaStream_t stream) {
  if (!fits_toeplitz_large_images(p) || !has_warpgroups(toeplitz_large_images<T, false>)) return false;
  Images a{};
  static_cast<Large&>(a) = arguments_of(p);
  a.pairs = static_cast<int>(ceil_div(a.targets, kConsumers)), a.groups = static_cast<int>(ceil_div(a.batch, kImages));
  const bool can_be_raw = describe_raw(a.raw, a, a.width), is_raw = a.raw.begin > 0;
  if (is_raw && !can_be_raw) return false;
  // Words of a pair of planes. A raw box has what surrounds it, and an odd number of units, so that rows of 8 images
  // lie in different banks.
  const int64_t source_words = int64_t{a.height} * a.width, target_words = int64_t{a.out_height} * a.out_width;
  const int64_t units = source_words * kWordBytes / kUnit, box_units = is_raw ? (units + 1) | 1 : units;
  if (!describe_raw_words(a.source_map, a.raw, a, box_units * kUnit / kWordBytes, kImages) ||
      !describe_words(a.target_map, a.target, a.targets * target_words / 2, target_words, a.batch, a.target_image,
                      kImages))
    return false;

  const auto set = [](int& to, int64_t value) { to = static_cast<int>(value); };
  set(a.matrices, round_up(a.height + kMostRows - 1, kGroupWarps));
  set(a.taps_copy, a.matrices * 2 * kEntries + 64), set(a.taps_bytes, 2 * a.taps_copy);
  set(a.filter_bytes, a.matrices * kMatrixBytes);
  set(a.matrices_at, round_up(kTapsAt + kConsumers * a.taps_bytes, 128));
  set(a.source_at, a.matrices_at + kSlots * kConsumers * a.filter_bytes);
  set(a.raw.plane, box_units * kUnit), set(a.slot_bytes, kImages * box_units * kUnit);
  set(a.out_at, a.source_at + kSlots * a.slot_bytes);
  const int64_t bytes = a.out_at + kImages * target_words * kWordBytes;
  const int64_t tasks = images_tasks(p);
  if (bytes > p.shared_memory || tasks > std::numeric_limits<int>::max()) return false;
  a.by_groups = Divider(a.groups);
  const auto kernel = is_raw ? toeplitz_large_images<T, true> : toeplitz_large_images<T, false>;
  launch_shares(kernel, a, tasks, kThreads, bytes, stream, "toeplitz_large_images");
  return true;
}

}  // namespace

bool launch_toeplitz_large_images(const LargeProblem& problem, cudaStream_t stream) {
  return problem.dtype == DType::kFloat16 ? launch<__half>(problem, stream) : launch<__nv_bfloat16>(problem, stream);
}

}  // namespace dwconv
