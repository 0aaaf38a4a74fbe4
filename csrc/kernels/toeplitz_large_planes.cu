// toeplitz_large (toeplitz_large.cuh) on planes as wide as the tiles of a warp. What is said there of groups, band
// matrices and weights holds here as well.
//
// No barrier holds all warps of a block. A few of them, the producers, fill slots in shared memory with planes of some
// images, and places beside them with the weights of the next filter. The others take units, which are some rows of
// the planes in a slot, from a counter, and store what they have computed by themselves.
//
// A warp slides down the source. Two rows of it, in registers, meet 2 * kSteps rows of the target, every two of these
// with another two rows of the kernel, whose band matrices stay in registers until all have met them. The 16 rows of a
// multiplication are one row of 16 images, or two rows of 8.
#include <algorithm>

#include "boxes.cuh"
#include "device.h"
#include "launch.h"
#include "mapping.h"
#include "overlap.cuh"
#include "raw_planes.cuh"
#include "stream.cuh"
#include "toeplitz_large.cuh"
#include "toeplitz_large.h"
#include "toeplitz_large_planes.h"

namespace dwconv {
namespace {

constexpr int kMostSlots = 8, kBarrierBytes = 24;

// A problem, and how it is cut.
struct Planes : Large {
  CUtensorMap target_map;            // if units are boxes: of planes, targets and images
  int units;                         // of a task: of some planes in a slot
  int each, more;                    // tasks of a block: `each`, and one more for the first `more`
  int producers, consumers;          // warps
  int slots, slot_bytes, out_bytes;  // out_bytes: of a warp
  int weight_bytes;                  // of a filter, for two of which there is room
  int barriers_at, counter_at;       // offsets in shared memory; behind the counter, a barrier for first raw planes
  bool bulk_load, box_store;         // whether planes are copied as one, and the units of all images
  EarlyPlanes early;
  RawPlanes raw;  // if planes come as they lie
  RawRows raw_rows;
  int raw_first;  // tasks whose planes consumers get
  Divider by_units, by_slots;
  Divider by_load_pieces;                // of a row of the source
  int load_step_pieces, load_step_rows;  // to a thread's next piece
  Divider by_store_pieces;               // of an image's unit, as far as a warp stores them at once
  int store_images;                      // at once
};

// What lies in a slot.
struct alignas(16) PlanesTask {
  int target, image, images, weights_at;
  float bias;
};

__device__ int full_barrier(const Planes& a, int slot) {
  return a.barriers_at + kBarrierBytes * slot;
}
__device__ int empty_barrier(const Planes& a, int slot) {
  return full_barrier(a, slot) + 8;
}
__device__ int raw_barrier(const Planes& a, int slot) {
  return full_barrier(a, slot) + 16;
}
__device__ PlanesTask& task_in(const Planes& a, int slot) {
  return shared<PlanesTask>(a.tasks_at + slot * static_cast<int>(sizeof(PlanesTask)));
}

// Begins to copy planes to a slot. Behind their columns are zeros already.
template <typename T, int kImages, int kBytes>
__device__ void load_planes(const Planes& a, const PlanesTask& t, int source_at, int thread) {
  uint32_t channel = t.target;
  a.by_fan_out.split(channel);
  const T* source = static_cast<const T*>(a.source) + t.image * a.source_image + channel * a.source_channel;
  const int pieces = static_cast<int>(a.by_load_pieces.divisor);
  const int64_t step = 2 * a.source_image;
  uint32_t row = thread;
  int piece = a.by_load_pieces.split(row);
#pragma unroll 1
  while (static_cast<int>(row) < a.height) {
    auto from = reinterpret_cast<const char*>(source + row * a.source_row) + piece * kBytes;
    uint32_t to = shared_address(source_at + static_cast<int>(row) * a.source_pitch + piece * kBytes);
    const auto copy = [&](auto count) {
      const char* places[count];
#pragma unroll
      for (int k = 0; k < count; ++k, from += step) places[k] = from;
#pragma unroll
      for (int k = 0; k < count; ++k, to += a.source_plane) copy_unit<kBytes>(to, places[k]);
    };
    if (t.images == kImages)
      copy(std::integral_constant<int, kImages>{});
    else
      visit_images(0, 1, t.images, copy);
    piece += a.load_step_pieces, row += a.load_step_rows;
    if (piece >= pieces) piece -= pieces, ++row;
  }
}

// Likewise an image's, which a barrier expects.
template <typename T>
__device__ void load_plane(const Planes& a, const PlanesTask& t, int barrier, int source_at, int image) {
  uint32_t channel = t.target;
  a.by_fan_out.split(channel);
  const T* source = static_cast<const T*>(a.source) + (t.image + image) * a.source_image + channel * a.source_channel;
  const int bytes = 2 * a.height * a.width;
  expect_bytes(barrier, bytes);
  copy_bulk(shared_address(source_at + image * a.source_plane), source, bytes, barrier);
}

// Makes of planes that came as they lie what ldmatrix needs.
template <typename T, int kTiles, int kSides>
__device__ void settle_raw(const Planes& a, const RawImages& part, int slot_at) {
  load_ends<T>(a.raw, a, part, slot_at);
  if constexpr (kSides == 1)
    move_raw(a.raw, a, part, slot_at);
  else
    part_raw<kTiles>(a.raw, a.raw_rows, a, part, slot_at);
}

// Consumers have nothing to do before the first planes are there, and get them by themselves if these come as they lie.
template <typename T, int kTiles, int kSides>
__device__ void get_first_planes(const Planes& a, int first, int count, int warp) {
  const int tasks = min(a.raw_first, count), barrier = a.counter_at + 8;
  const auto part = [&](int task) {
    return raw_images(a, first + task, 8 * kSides, task % 2 == 0 ? warp : a.consumers - 1 - warp, a.consumers);
  };
  if (is_elected()) {
#pragma unroll 1
    for (int task = 0; task < tasks; ++task) copy_raw(a.raw, a, part(task), a.source_at + task * a.slot_bytes, barrier);
    arrive(barrier);
  }
  wait(barrier, 0);
#pragma unroll 1
  for (int task = 0; task < tasks; ++task)
    settle_raw<T, kTiles, kSides>(a, part(task), a.source_at + task * a.slot_bytes);
  asm volatile("barrier.sync.aligned 1, %0;" ::"r"(32 * a.consumers) : "memory");
}

// Producers fill slots with what tasks need, one after the other: planes and, where it changes, a filter.
template <typename T, int kTiles, int kSides, bool kRaw>
__device__ void produce(const Planes& a, int first, int count, int thread) {
  constexpr int kImages = 8 * kSides;
  PlanesTask t{-1};
  RawTasks raw_tasks(a.raw_first, a.slots);
  int begin = 0, set = 0, slot = 0;
  uint32_t parity = 1;
#pragma unroll 1
  for (int task = 0; task < count; ++task) {
    if constexpr (kRaw) {
      raw_tasks.ask(
          task, count, a.slots, [&](int at) { return empty_barrier(a, at); },
          [&](int number, int at) {
            const RawImages part = raw_images(a, first + number, kImages, thread / 32, a.producers);
            copy_raw(a.raw, a, part, a.source_at + at * a.slot_bytes, raw_barrier(a, at));
            arrive(raw_barrier(a, at));
          });
      if (task >= a.raw_first) {
        wait(raw_barrier(a, slot), (parity ^ 1) ^ (slot < a.raw_first));
        settle_raw<T, kTiles, kSides>(a, raw_images(a, first + task, kImages, thread / 32, a.producers),
                                      a.source_at + slot * a.slot_bytes);
      }
    } else if (task >= a.slots) {
      wait(empty_barrier(a, slot), parity);
    }
    uint32_t target = first + task;
    t.image = a.by_images.split(target) * a.images, t.images = min(a.images, a.batch - t.image);
    const bool changes = static_cast<int>(target) != t.target;
    t.target = static_cast<int>(target);
    LargeWeights<T, 8> weights;
    if (changes) weights.begin(a, t.target, thread);
    const int source_at = a.source_at + slot * a.slot_bytes;
    if (kRaw) {
      // They are there.
    } else if (a.bulk_load) {
      if (thread < t.images) load_plane<T>(a, t, full_barrier(a, slot), source_at, thread);
    } else {
      switch (a.load_unit) {
        case 16: load_planes<T, kImages, 16>(a, t, source_at, thread); break;
        case 8: load_planes<T, kImages, 8>(a, t, source_at, thread); break;
        default: load_planes<T, kImages, 4>(a, t, source_at, thread); break;
      }
    }
    if (changes) {
      // Tasks that needed the filter before the last one, whose place these weights take, are done.
      const int before = begin - 1;
      if (before >= 0 && before > task - a.slots) {
        uint32_t round = before;
        const int at = a.by_slots.split(round);
        wait(empty_barrier(a, at), round & 1);
      }
      t.weights_at = a.weights_at + set * a.weight_bytes;
      t.bias = a.bias ? widen(static_cast<const T*>(a.bias)[t.target * a.bias_stride]) : 0.f;
      begin = task, set ^= 1;
      weights.write(a, t.weights_at);
    }
    if (thread == 0) task_in(a, slot) = t;
    arrive_after_copies(full_barrier(a, slot));
    arrive(full_barrier(a, slot));
    if (++slot == a.slots) slot = 0, parity ^= 1;
  }
  commit_copies();
  wait_copies<0>();
}

// The number of a block's next unit, for one thread: by itself, or else the compiler counts threads.
__device__ int take_unit(const Planes& a) {
  int number;
  asm volatile("atom.shared.add.u32 %0, [%1], 1;" : "=r"(number) : "r"(shared_address(a.counter_at)) : "memory");
  return number;
}

// Computes 2 * kSteps rows of the target from `row` on, and puts them at out_at as they lie side by side there. Returns
// the number of the next unit to the first lane, which has asked for it meanwhile.
template <typename T, int kTiles, int kDepth, int kSides, int kSteps>
__device__ int slide(const Planes& a, const PlanesTask& t, int source_at, int out_at, int row) {
  constexpr int kEdge = kDepth / 2, kRows = 2 / kSides;  // of an image in a multiplication
  constexpr int kTogether = kTiles == 2 ? kSides : 1;    // sides whose source is loaded at once, as registers allow
  const int lane = threadIdx.x % 32, quad = lane / 4, pair = lane % 4 * 2, image = lane % 16 / kRows;
  const int entry = pair - quad + 7;  // of the lane's first pair in a row of weights

  float sum[kSides][kSteps][kTiles][4];
#pragma unroll
  for (int p = 0; p < kSides; ++p)
#pragma unroll
    for (int q = 0; q < kSteps; ++q)
#pragma unroll
      for (int j = 0; j < kTiles; ++j)
#pragma unroll
        for (int v = 0; v < 4; ++v) sum[p][q][j][v] = t.bias;

  // At step s rows of the source from top + p + 2 s on meet rows of the kernel from 2 (s - q) on.
  // A last row alone takes half of a multiplication, which pays where there are few rows.
  const int pairs = (a.kernel_h + 1) / 2, whole = kSteps == 1 ? a.kernel_h / 2 : pairs;
  const int top = row - a.padding_h, steps = (a.out_height - row + 1) / 2;
  const int begin = max(-top - 1, 0) / 2, end = min((a.height - top + 1) / 2, pairs + kSteps - 1);
  int y = top + 2 * begin + lane / 16 + lane % kRows;
  const uint32_t zeros = __shfl_sync(~0u, shared_address(0), 0);
  uint32_t source = zeros + source_at + image * a.source_plane + y * a.source_pitch;
  if (image >= t.images) y = -(1 << 30);
  const char* band =
      shared_memory + t.weights_at + (entry & 1) * a.copy + 2 * (entry & ~1) + 2 * begin * a.weight_pitch;
  // From this step on all rows have met some of the kernel; never where more rows are missing than is compiled for.
  // What has gone through a shuffle is not computed again at each step.
  const int all_from = __shfl_sync(~0u,
                                   steps >= kSteps                     ? kSteps - 1
                                   : kSteps > 2 && steps == kSteps - 1 ? kSteps - 2
                                                                       : pairs,
                                   0);
  uint32_t b[kSteps][kDepth][2];
  const auto load_band = [&](auto& to, const char* from) {
#pragma unroll
    for (int k = 0; k < kDepth; ++k)
      to[k][0] = *reinterpret_cast<const uint32_t*>(from + k * kLargeGroupBytes),
      to[k][1] = *reinterpret_cast<const uint32_t*>(from + a.weight_pitch + k * kLargeGroupBytes);
  };
#pragma unroll
  for (int q = 1; q < kSteps; ++q)
    if (begin - q >= 0) load_band(b[kSteps - q], band - 2 * q * a.weight_pitch);
  int first = begin;
  do {
#pragma unroll
    for (int u = 0; u < kSteps; ++u) {
      const int s = first + u;
      if (s >= end) break;
      if (s < pairs) load_band(b[u], band);
      band += 2 * a.weight_pitch;
      uint32_t x[kTogether][kTiles][4];
      const auto load_rows = [&](int p) {
        const bool there = static_cast<uint32_t>(y + p) < static_cast<uint32_t>(a.height);
        const uint32_t from = there ? source + p * a.source_pitch : zeros;
#pragma unroll
        for (int c = 0; c < kTiles; ++c) load_matrices(x[p % kTogether][c], from + c * kLargeGroupBytes);
      };
      // By two rows of the kernel, or by the last one alone.
      const auto multiply_rows = [&](int p, int first_q, int last_q, auto whole) {
#pragma unroll
        for (int c = 0; c < kTiles; ++c)
#pragma unroll
          for (int k = 0; k < kDepth; ++k) {
            const int j = c + kEdge - k;
            if (j < 0 || j >= kTiles) continue;
#pragma unroll
            for (int q = first_q; q <= last_q; ++q) {
              const auto& rows = x[p % kTogether][c];
              const auto& two = b[(u - q + kSteps) % kSteps][k];
              if constexpr (whole)
                multiply(sum[p][q][j], std::as_const(sum[p][q][j]), rows, two, T{});
              else
                multiply(sum[p][q][j], std::as_const(sum[p][q][j]), {rows[0], rows[1]}, two[0], T{});
            }
          }
      };
      // Mostly all rows have some of the kernel to meet, and more sums are there to be added to at once.
      const bool all_meet = s >= all_from && s < whole;
#pragma unroll
      for (int side = 0; side < kSides; side += kTogether) {
        const auto multiply_sides = [&](int first_q, int last_q, auto whole) {
#pragma unroll
          for (int p = side; p < side + kTogether; ++p) multiply_rows(p, first_q, last_q, whole);
        };
#pragma unroll
        for (int p = side; p < side + kTogether; ++p) load_rows(p);
        if (all_meet && (kSteps == 2 || steps >= kSteps)) {
          multiply_sides(0, kSteps - 1, std::true_type{});
        } else if (kSteps > 2 && all_meet) {
          multiply_sides(0, kSteps - 2, std::true_type{});
        } else {
#pragma unroll
          for (int q = 0; q < kSteps; ++q)
            if (kSteps == 1)
              multiply_sides(q, q, std::false_type{});
            else if (static_cast<uint32_t>(s - q) < static_cast<uint32_t>(pairs) && q < steps)
              multiply_sides(q, q, std::true_type{});
        }
      }
      source += 2 * a.source_pitch, y += 2;
    }
    first += kSteps;
  } while (first < end);
  const int next = lane == 0 ? take_unit(a) : 0;

  const int out = out_at + quad / kRows * a.out_plane + quad % kRows * a.out_pitch + 2 * pair;
  const bool last = (kTiles - 1) * kLargeGroup + pair < a.out_width;
  if (a.box_store) wait_stores(), __syncwarp();  // what lay there is on its way
  const auto none = narrow_pair(0.f, 0.f, T{});
  Pair<T> zero[] = {none, none};
#pragma unroll
  for (int p = 0; p < kSides; ++p)
#pragma unroll
    for (int q = 0; q < kSteps; ++q)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int to = out + 8 / kRows * h * a.out_plane + (2 * q + p) * a.out_pitch;
#pragma unroll
        for (int j = 0; j < kTiles; ++j) {
          const auto values = narrow_pair(sum[p][q][j][2 * h], sum[p][q][j][2 * h + 1], T{});
#if __CUDA_ARCH__ >= 800
          zero[h] = __hfma2(values, none, zero[h]);
#endif
          if (j < kTiles - 1 || last) shared<Pair<T>>(to + j * kLargeGroupBytes) = values;
        }
      }
  zero[0] = __hadd2(zero[0], zero[1]);
  if (!(__low2float(zero[0]) == 0 && __high2float(zero[0]) == 0)) {  // NaN: an output of the thread is not finite
#pragma unroll 1
    for (int v = 0; v < kSides * kSteps * 2 * kTiles * 2; ++v) {
      const int column = v / 2 % kTiles * kLargeGroup + pair + v % 2, n = (v / (2 * kTiles) % 2 * 8 + quad) / kRows;
      const int r = v / (4 * kTiles) * kRows + quad % kRows;
      if (row + r >= a.out_height || n >= t.images || column >= a.out_width) continue;
      T& to = shared<T>(out_at + n * a.out_plane + r * a.out_pitch + 2 * column);
      if (!is_finite(widen(to))) to = narrow<T>(sum_of_taps<T>(a, t.target, t.image + n, row + r, column, 1, false));
    }
  }
  return next;
}

// A warp stores what lies at out_at: `bytes` of each image.
template <int kBytes>
__device__ void store_planes(const Planes& a, char* target, int out_at, int bytes, int images) {
  using Word = LargeWord<kBytes>;
  uint32_t first = threadIdx.x % 32;
  const int piece = a.by_store_pieces.split(first) * kBytes, image = static_cast<int>(first);
  if (image >= a.store_images) return;
  const int64_t step = 2 * a.store_images * a.target_image;
  const int step_shared = a.store_images * a.out_plane;
#pragma unroll 1
  for (int at = piece; at < bytes; at += static_cast<int>(a.by_store_pieces.divisor) * kBytes) {
    char* to = target + 2 * image * a.target_image + at;
    int from = out_at + image * a.out_plane + at;
    visit_images(image, a.store_images, images, [&](auto count) {
      Word words[count];
#pragma unroll
      for (int k = 0; k < count; ++k, from += step_shared) words[k] = shared<Word>(from);
#pragma unroll
      for (int k = 0; k < count; ++k, to += step) *reinterpret_cast<Word*>(to) = words[k];
    });
  }
}

// Consumers take the units of a block's tasks, each from the slot of its task.
template <typename T, int kTiles, int kDepth, int kSides, int kSteps>
__device__ void consume(const Planes& a, int count, int warp) {
  const int all = count * a.units, out_at = a.out_at + warp * a.out_bytes;
  int number = warp;
#pragma unroll 1
  while (number < all) {
    uint32_t task = number;
    const int unit = a.by_units.split(task);
    uint32_t round = task;
    const int slot = a.by_slots.split(round);
    // Rows in the middle, which meet the most rows of the kernel, come first.
    const int step = (unit + 1) / 2, place = (a.units - 1) / 2 + (unit % 2 == 1 ? step : -step);
    const int row = place * 2 * kSteps, rows = min(a.out_height - row, 2 * kSteps);
    wait(full_barrier(a, slot), round & 1);
    const PlanesTask t = task_in(a, slot);
    const int next = slide<T, kTiles, kDepth, kSides, kSteps>(a, t, a.source_at + slot * a.slot_bytes, out_at, row);
    if (a.box_store) before_bulk_copies();
    const int lane = threadIdx.x % 32;
    arrive_together(empty_barrier(a, slot), lane == 0);
    number = __shfl_sync(~0u, next, 0);
    if (a.box_store) {
      if (is_elected()) store_box(a.target_map, out_at, row * a.out_width, t.target, t.image, 0);
      commit_stores();
      continue;
    }
    T* target = static_cast<T*>(a.target) + t.image * a.target_image + t.target * a.target_channel +
                static_cast<int64_t>(row) * a.out_width;
    const int bytes = 2 * rows * a.out_width;
    switch (a.store_unit) {
      case 16: store_planes<16>(a, reinterpret_cast<char*>(target), out_at, bytes, t.images); break;
      case 8: store_planes<8>(a, reinterpret_cast<char*>(target), out_at, bytes, t.images); break;
      default: store_planes<4>(a, reinterpret_cast<char*>(target), out_at, bytes, t.images); break;
    }
    __syncwarp();
  }
  if (a.box_store) wait_stores();
}

template <typename T, int kTiles, int kDepth, int kSides, int kSteps, int kThreads, bool kRaw>
__global__ void __launch_bounds__(kThreads, 1) toeplitz_large_planes(const __grid_constant__ Planes a) {
#if __CUDA_ARCH__ < 900
  if constexpr (kRaw) return;  // there are no bulk copies
#endif
  let_next_kernel_start();
  const int block = blockIdx.x, first = block * a.each + min(block, a.more), count = a.each + (block < a.more);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = kThreads / 32;
  ask_for_planes<T>(a, a.early, first, count, 8 * kSides);
  // Zeros where nothing is copied to: the row outside of all images, around the weights, and behind the columns.
  for (int i = 16 * threadIdx.x; i < a.source_at; i += 16 * kThreads) shared<uint4>(i) = uint4{};
  constexpr int kImages = 8 * kSides;
  if (!kRaw && a.width % kLargeGroup != 0)
    for (int image = warp; image < a.slots * kImages; image += warps)
      for (int row = lane; row < a.height; row += 32)
        shared<uint4>(a.source_at + image / kImages * a.slot_bytes + image % kImages * a.source_plane +
                      row * a.source_pitch + (kTiles - 1) * kLargeGroupBytes) = uint4{};
  __syncthreads();
  if (threadIdx.x < a.slots) {
    init_barrier(full_barrier(a, threadIdx.x), 2 * 32 * a.producers);
    init_barrier(empty_barrier(a, threadIdx.x), a.units * kWarpArrivals);
    init_barrier(raw_barrier(a, threadIdx.x), a.producers);
  }
  if (threadIdx.x == 0) shared<int>(a.counter_at) = a.consumers, init_barrier(a.counter_at + 8, a.consumers);
  if (kRaw || a.bulk_load) before_bulk_copies();
  wait_for_kernel_before();
  __syncthreads();
  if (warp < a.producers)
    produce<T, kTiles, kSides, kRaw>(a, first, count, threadIdx.x);
  else {
    if constexpr (kRaw) get_first_planes<T, kTiles, kSides>(a, first, count, warp - a.producers);
    consume<T, kTiles, kDepth, kSides, kSteps>(a, count, warp - a.producers);
  }
}

template <int value>
using Constant = std::integral_constant<int, value>;

// What is compiled, and for kernels of how many rows: calls visit(tiles, depth, sides, steps, threads, producers) with
// one after the other until it returns true. With more rows there is more to compute of what is loaded.
template <typename Visitor>
bool visit_shapes(int kernel_h, Visitor&& visit) {
  return (kernel_h >= 8 &&
          (visit(Constant<4>{}, Constant<3>{}, Constant<2>{}, Constant<2>{}, Constant<512>{}, Constant<2>{}) ||
           visit(Constant<4>{}, Constant<5>{}, Constant<2>{}, Constant<2>{}, Constant<512>{}, Constant<2>{}))) ||
         (kernel_h >= 15 &&
          (visit(Constant<2>{}, Constant<3>{}, Constant<2>{}, Constant<4>{}, Constant<512>{}, Constant<4>{}) ||
           visit(Constant<7>{}, Constant<5>{}, Constant<1>{}, Constant<2>{}, Constant<448>{}, Constant<2>{}))) ||
         (kernel_h <= 8 &&
          visit(Constant<7>{}, Constant<9>{}, Constant<1>{}, Constant<1>{}, Constant<640>{}, Constant<1>{}));
}

// Lays a block's shared memory out, and returns how much of it is needed: 0 where a problem does not fit.
int64_t apply(Planes& a, int tiles, int depth, int sides, int steps, int threads, int producers, bool bulk,
              int64_t shared_bytes) {
  const Bands bands(a.kernel_w, 1, a.padding_w, a.width, a.out_width);
  const int edge = depth / 2;
  if (ceil_div(a.width, kLargeGroup) != tiles || ceil_div(a.out_width, kLargeGroup) != tiles || bands.first < -edge ||
      bands.first + bands.count > edge + 1 || bands.count < depth - 1)
    return 0;
  const auto set = [](int& to, int64_t value) { to = static_cast<int>(value); };
  const int unit_rows = 2 * steps;
  a.first = -edge, a.depth = depth, a.first_tap = kLargeGroup * a.first - 7 + a.padding_w;
  a.images = 8 * sides, a.units = static_cast<int>(ceil_div(a.out_height, unit_rows));
  const auto unit_of = [](std::initializer_list<int64_t> places) {
    int64_t all = 16;
    for (const int64_t place : places) all |= place;
    return static_cast<int>(all & -all);
  };
  const int64_t load_places = unit_of({2 * a.source_image, 2 * a.source_channel, 2 * a.source_row, 2 * a.width});
  a.load_unit = unit_of({reinterpret_cast<intptr_t>(a.source), load_places});
  // Where only the tensor's beginning is in the way of larger pieces, planes come as they lie.
  const bool parts = sides == 2, fits = parts ? a.height <= 32 : a.width == tiles * kLargeGroup && tiles % 2 == 1;
  const bool raw = bulk && fits && a.load_unit < load_places && describe_raw(a.raw, a, a.width);
  if (raw) producers = 4;  // they have more to do then
  a.producers = producers, a.consumers = threads / 32 - producers;

  a.source_pitch = kLargeGroupBytes * (tiles | 1);
  int64_t source_plane = int64_t{a.height} * a.source_pitch;
  if (raw) source_plane = std::max(source_plane, raw_bytes(a.raw, a) + (parts ? 0 : kLargeGroupBytes));
  // Rows of several images meet no bank of shared memory twice.
  const int together = 2 / sides;
  while (source_plane / kLargeGroupBytes % (2 * together) != together) source_plane += kLargeGroupBytes;
  a.out_pitch = 2 * a.out_width;
  const int64_t out_plane = round_up(unit_rows * a.out_pitch, 16), out_bytes = round_up(a.images * out_plane, kBoxUnit);
  a.weight_pitch = static_cast<int>(2 * round_up(kLargeGroup * depth + 7, 2));
  int64_t copy = (a.kernel_h + int64_t{1}) * a.weight_pitch;
  copy += (64 - copy % 128 + 128) % 128;  // so that the copies do not meet in a bank
  const int64_t slot_bytes = round_up(a.images * source_plane, 128), weight_bytes = round_up(2 * copy, 128);
  const int64_t barriers_at = round_up(tiles * kLargeGroupBytes, 128);
  const int64_t counter_at = barriers_at + round_up(kBarrierBytes * kMostSlots, 16);
  const int64_t tasks_at = counter_at + 16, weights_at = round_up(tasks_at + kMostSlots * sizeof(PlanesTask), 128);
  const int64_t source_at = weights_at + 2 * weight_bytes;
  const int64_t slots =
      std::min((shared_bytes - source_at - a.consumers * out_bytes) / slot_bytes, int64_t{kMostSlots});
  // No warp waits for a slot's next task before the one in it is there: a barrier tells two phases apart, not three.
  if (slots < 2 || slots * a.units < a.consumers) return 0;
  const int64_t out_at = source_at + slots * slot_bytes;
  a.raw_rows = {Divider(a.height), std::max(32 / a.height, 1), a.width / 2, a.source_pitch};
  set(a.raw_first, raw ? std::min(ceil_div(a.consumers, a.units), slots) : 0);
  if (raw)
    set(a.raw.plane, source_plane), set(a.raw.in_plane, parts ? source_plane - raw_bytes(a.raw, a) : kLargeGroupBytes);
  set(a.source_plane, source_plane), set(a.out_plane, out_plane), set(a.out_bytes, out_bytes), set(a.copy, copy);
  set(a.slot_bytes, slot_bytes), set(a.weight_bytes, weight_bytes), set(a.slots, slots);
  set(a.barriers_at, barriers_at), set(a.counter_at, counter_at), set(a.tasks_at, tasks_at);
  set(a.weights_at, weights_at), set(a.source_at, source_at), set(a.out_at, out_at);

  const int64_t last_rows = (a.out_height - 1) % unit_rows + 1;
  a.store_unit = unit_of({reinterpret_cast<intptr_t>(a.target), 2 * a.target_image, 2 * a.target_channel,
                          a.units > 1 ? unit_rows * a.out_pitch : 0, last_rows * a.out_pitch});
  if ((!raw && a.load_unit < 4) || a.store_unit < 4) return 0;
  a.bulk_load = !raw && bulk && a.load_unit == 16 && a.source_row == a.width && a.source_pitch == 2 * a.width;
  const int loaders = 32 * a.producers, side = std::min(a.kernel_w, loaders);
  a.by_weight_side = Divider(side), a.weight_lanes = loaders / side;
  const int load_pieces = 2 * a.width / a.load_unit;
  a.load_step_pieces = loaders % load_pieces, a.load_step_rows = loaders / load_pieces;
  const int store_pieces = std::min(unit_rows * a.out_pitch / a.store_unit, 32);
  a.by_load_pieces = Divider(load_pieces);
  a.by_store_pieces = Divider(store_pieces), a.store_images = 32 / store_pieces;
  a.by_images = Divider(ceil_div(a.batch, a.images)), a.by_units = Divider(a.units), a.by_slots = Divider(a.slots);
  set(a.tasks, ceil_div(a.batch, a.images) * a.targets);
  a.early = early_planes_of(a, ceil_div(a.consumers, a.units));
  a.box_store = bulk && out_plane == unit_rows * a.out_pitch && out_plane <= 2 * kMostBoxSide &&
                describe_boxes(a.target_map, a.target, sizeof(uint16_t),
                               {int64_t{a.out_height} * a.out_width, a.targets, a.batch, 1},
                               {2 * a.target_channel, 2 * a.target_image, 2 * a.target_image},
                               {unit_rows * a.out_width, 1, a.images, 1});
  return out_at + a.consumers * out_bytes;
}

// Whether a launch has enough to do: units for all warps, and images for most rows of a multiplication.
bool pays(const Planes& a, int multiprocessors) {
  const int64_t units = int64_t{a.tasks} * a.units;
  return units > int64_t{multiprocessors} * a.consumers && a.batch * 4 >= round_up(a.batch, a.images) * 3;
}

template <typename T>
bool launch(const Problem& p, cudaStream_t stream) {
  Planes a{};
  static_cast<Large&>(a) = arguments_of(p);
  if (p.stride_h != 1 || a.out_width % 2 != 0 || (a.target_row != a.out_width && a.out_height > 1)) return false;
  const Device& device = current_device();
  const bool bulk = can_overlap(toeplitz_large_planes<T, 4, 3, 2, 2, 512, false>);
  return visit_shapes(a.kernel_h, [&](auto tiles, auto depth, auto sides, auto steps, auto threads, auto producers) {
    const int64_t bytes = apply(a, tiles, depth, sides, steps, threads, producers, bulk, p.shared_memory);
    if (bytes == 0 || !pays(a, device.multiprocessors)) return false;
    const int blocks = std::min(a.tasks, device.multiprocessors);
    a.each = a.tasks / blocks, a.more = a.tasks % blocks;
    const auto kernel = a.raw.plane > 0 ? toeplitz_large_planes<T, tiles, depth, sides, steps, threads, true>
                                        : toeplitz_large_planes<T, tiles, depth, sides, steps, threads, false>;
    cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
    launch_early(kernel, a, blocks, threads, stream, {.shared_bytes = bytes});
    check_launch("toeplitz_large_planes");
    return true;
  });
}

}  // namespace

bool launch_toeplitz_large_planes(const Problem& problem, cudaStream_t stream) {
  return problem.dtype == DType::kFloat16 ? launch<__half>(problem, stream) : launch<__nv_bfloat16>(problem, stream);
}

}  // namespace dwconv
