// toeplitz_large (toeplitz_large.cuh) for tall kernels of few columns, on whole planes. What is said there of groups,
// band matrices and weights holds here as well, with rows and columns exchanged: rows of the problem are columns in
// memory.
//
// All band matrices of a filter stay in registers of each warp, until the filter changes: a multiplication by two rows
// of the kernel takes them as they are. Its 16 rows are two blocks of 8, of one image or of two. ldmatrix exchanges
// rows and columns of the source, and movmatrix those of the target. What a row of the kernel moves a block by is put
// together by shuffles from the groups beside it in memory, which are 16 bytes apart.
//
// One warp of a block, or a few, fill slots in shared memory with the planes of two images each, and another one stores
// what the others have computed, plane by plane.
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

namespace dwconv {
namespace {

constexpr int kTallThreads = 512;
constexpr int kTaps = 5;    // rows of the kernel
constexpr int kGroups = 7;  // of the source's columns, and of the target's
constexpr int kEdge = 4;    // band matrices are from -kEdge on
constexpr int kBands = 2 * kEdge + 1;
constexpr int kImages = 2;  // of a task
constexpr int kBlock = 8;   // rows
constexpr int kMostSlots = 8;

struct TallPlanes : Large {
  int blocks;                  // of a target plane, and units of a task
  int plane_bytes, out_bytes;  // without gaps
  int slots, slot_bytes, out_in_slot;
  int weight_bytes;  // of a filter, for two of which there is room
  int barriers_at;
  int loaders, consumers;  // warps; one more stores
  bool bulk_load, bulk_store;
  RawPlanes raw;  // if planes come as they lie
  Divider by_blocks, by_slots, by_pieces;
};

__device__ int full_barrier(const TallPlanes& a, int slot) {
  return a.barriers_at + 32 * slot;
}
__device__ int done_barrier(const TallPlanes& a, int slot) {
  return full_barrier(a, slot) + 8;
}
__device__ int empty_barrier(const TallPlanes& a, int slot) {
  return full_barrier(a, slot) + 16;
}

__device__ int raw_barrier(const TallPlanes& a, int slot) {
  return full_barrier(a, slot) + 24;
}

// Planes of up to two images of a target.
struct Pairing {
  int target, image, images;
};

__device__ Pairing pairing_of(const TallPlanes& a, uint32_t number) {
  Pairing t;
  t.image = a.by_images.split(number) * kImages;
  t.target = static_cast<int>(number);
  t.images = min(kImages, a.batch - t.image);
  return t;
}

template <typename T, int kBytes>
__device__ void load_lines(const TallPlanes& a, const char* from, int to, int thread) {
  uint32_t line = thread, lines = 32 * a.loaders;
  int piece = a.by_pieces.split(line);
  const int pieces = static_cast<int>(a.by_pieces.divisor), more = a.by_pieces.split(lines);
#pragma unroll 2
  while (static_cast<int>(line) < a.width) {
    copy_unit<kBytes>(shared_address(to + static_cast<int>(line) * a.source_pitch + piece * kBytes),
                      from + 2 * static_cast<int>(line) * a.source_row + piece * kBytes);
    piece += more, line += lines;
    if (piece >= pieces) piece -= pieces, ++line;
  }
}

template <typename T>
__device__ void load(const TallPlanes& a, int first, int count, int thread) {
  int target = -1, begin = 0, set = 1, slot = 0;
  uint32_t parity = 1;
  RawTasks raw_tasks(0, a.slots);
#pragma unroll 1
  for (int task = 0; task < count; ++task) {
    if (a.raw.plane > 0) {
      raw_tasks.ask(
          task, count, a.slots, [&](int at) { return empty_barrier(a, at); },
          [&](int number, int at) {
            const RawImages part = raw_images(a, first + number, kImages, thread / 32, a.loaders);
            copy_raw(a.raw, a, part, a.source_at + at * a.slot_bytes, raw_barrier(a, at));
            arrive(raw_barrier(a, at));
          });
      wait(raw_barrier(a, slot), parity ^ 1);
      const RawImages part = raw_images(a, first + task, kImages, thread / 32, a.loaders);
      load_ends<T>(a.raw, a, part, raw_at(a.raw, a, part.channel, a.source_at + slot * a.slot_bytes));
      move_raw(a.raw, a, part, a.source_at + slot * a.slot_bytes);
    } else if (task >= a.slots) {
      wait(empty_barrier(a, slot), parity);
    }
    const Pairing t = pairing_of(a, first + task);
    const bool changes = t.target != target;
    target = t.target;
    LargeWeights<T, 8> weights;
    if (changes) weights.begin(a, target, thread);
    uint32_t channel = t.target;
    a.by_fan_out.split(channel);
    const T* source = static_cast<const T*>(a.source) + t.image * a.source_image + channel * a.source_channel;
    const int to = a.source_at + slot * a.slot_bytes, barrier = full_barrier(a, slot);
    if (a.raw.plane > 0) {
      // They are there.
    } else if (a.bulk_load) {
      if (is_elected()) {
        expect_bytes(barrier, t.images * a.plane_bytes);
#pragma unroll 1
        for (int n = 0; n < t.images; ++n)
          copy_bulk(shared_address(to + n * a.source_plane), source + n * a.source_image, a.plane_bytes, barrier);
      }
    } else {
#pragma unroll 1
      for (int n = 0; n < t.images; ++n) {
        const auto from = reinterpret_cast<const char*>(source + n * a.source_image);
        switch (a.load_unit) {
          case 16: load_lines<T, 16>(a, from, to + n * a.source_plane, thread); break;
          case 8: load_lines<T, 8>(a, from, to + n * a.source_plane, thread); break;
          default: load_lines<T, 4>(a, from, to + n * a.source_plane, thread); break;
        }
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
      begin = task, set ^= 1;
      weights.write(a, a.weights_at + set * a.weight_bytes);
    }
    arrive_after_copies(barrier);
    arrive(barrier);
    if (++slot == a.slots) slot = 0, parity ^= 1;
  }
  commit_copies();
  wait_copies<0>();
}

template <int kBytes>
__device__ void store_plane(char* to, int from, int bytes, int lane) {
  using Word = LargeWord<kBytes>;
#pragma unroll 4
  for (int i = lane * kBytes; i < bytes; i += 32 * kBytes) *reinterpret_cast<Word*>(to + i) = shared<Word>(from + i);
}

template <typename T>
__device__ void store(const TallPlanes& a, int first, int count, int lane) {
  int slot = 0, before = 0;
  uint32_t parity = 0;
#pragma unroll 1
  for (int task = 0; task < count; ++task) {
    wait(done_barrier(a, slot), parity);
    const Pairing t = pairing_of(a, first + task);
    T* target = static_cast<T*>(a.target) + t.image * a.target_image + t.target * a.target_channel;
    const int from = a.source_at + slot * a.slot_bytes + a.out_in_slot;
    if (a.bulk_store) {
      if (is_elected()) {
#pragma unroll 1
        for (int n = 0; n < t.images; ++n)
          store_bulk(target + n * a.target_image, shared_address(from + n * a.out_plane), a.out_bytes);
      }
      commit_stores();
      wait_stores_but_one();
      arrive_together(empty_barrier(a, before), lane == 0, task > 0);
    } else {
#pragma unroll 1
      for (int n = 0; n < t.images; ++n) {
        const auto to = reinterpret_cast<char*>(target + n * a.target_image);
        switch (a.store_unit) {
          case 16: store_plane<16>(to, from + n * a.out_plane, a.out_bytes, lane); break;
          case 8: store_plane<8>(to, from + n * a.out_plane, a.out_bytes, lane); break;
          default: store_plane<4>(to, from + n * a.out_plane, a.out_bytes, lane); break;
        }
      }
      arrive_together(empty_barrier(a, slot), lane == 0);
    }
    before = slot;
    if (++slot == a.slots) slot = 0, parity ^= 1;
  }
  if (a.bulk_store) wait_stores();
}

// Band matrices of all rows of a filter: of two rows side by side, and of the last one.
struct TallFilter {
  uint32_t pairs[kTaps / 2][kBands][2], last[kBands];
};

// Multiplies what two rows of the kernel, or the last one, meet of source group c.
template <typename T, int kPair>
__device__ void multiply_group(float (&sum)[kGroups][4], const uint32_t (&x)[4], const TallFilter& filter, int c, T) {
#pragma unroll
  for (int j = 0; j < kGroups; ++j) {
    const int k = c - j + kEdge;
    if (k >= 0 && k < kBands) multiply(sum[j], std::as_const(sum[j]), x, filter.pairs[kPair][k], T{});
  }
}
template <typename T>
__device__ void multiply_last(float (&sum)[kGroups][4], const uint32_t (&x)[2], const TallFilter& filter, int c, T) {
#pragma unroll
  for (int j = 0; j < kGroups; ++j) {
    const int k = c - j + kEdge;
    if (k >= 0 && k < kBands) multiply(sum[j], x, filter.last[k], T{});
  }
}

// Of 8 x 8 of the source, with a group before and one behind, those `kShift` columns further on.
template <int kShift>
__device__ uint32_t shifted(uint32_t before, uint32_t here, uint32_t behind, int lane) {
  const int quad = lane / 4;
  const uint32_t sent = kShift > 0 ? (quad < kShift ? behind : here) : (quad >= kBlock + kShift ? before : here);
  return __shfl_sync(~0u, sent, lane + 4 * kShift & 31);
}

template <typename T>
__device__ void compute(const TallPlanes& a, float (&sum)[kGroups][4], const TallFilter& filter, int source_at,
                        const int (&image)[2], const int (&block)[2], int images, int lane) {
  const int groups = (a.height + kBlock - 1) / kBlock;
  // A lane names a row in memory of the groups before both blocks, or at them, then behind them.
  uint32_t from[2];
  int step[2];
#pragma unroll
  for (int k = 0; k < 2; ++k) {
    const int place = 4 * k + lane / 8, n = place % 2 == 0 ? image[0] : image[1];
    const int group = (place % 2 == 0 ? block[0] : block[1]) + place / 2 - 1;
    const bool there = n < images && static_cast<uint32_t>(group) < static_cast<uint32_t>(groups);
    from[k] = shared_address(
        there ? source_at + n * a.source_plane + lane % 8 * a.source_pitch + group * kLargeGroupBytes : 0);
    step[k] = there ? 8 * a.source_pitch : 0;
  }
  const bool last_there = (kGroups - 1) * kLargeGroup + lane % 8 < a.width;
#pragma unroll
  for (int c = 0; c < kGroups; ++c) {
    uint32_t x[4], y[2];
    const bool there = c < kGroups - 1 || last_there;
    load_matrices_transposed(x, there ? from[0] : shared_address(0));
    load_two_transposed(y[0], y[1], there ? from[1] : shared_address(0));
    from[0] += step[0], from[1] += step[1];
    const auto shift = [&](auto by, uint32_t& first, uint32_t& second) {
      first = shifted<by>(x[0], x[2], y[0], lane), second = shifted<by>(x[1], x[3], y[1], lane);
    };
    uint32_t two[4], here[] = {x[2], x[3]};
    multiply_last(sum, here, filter, c, T{});
    shift(std::integral_constant<int, -2>{}, two[0], two[1]);
    shift(std::integral_constant<int, -1>{}, two[2], two[3]);
    multiply_group<T, 0>(sum, two, filter, c, T{});
    shift(std::integral_constant<int, 1>{}, two[0], two[1]);
    shift(std::integral_constant<int, 2>{}, two[2], two[3]);
    multiply_group<T, 1>(sum, two, filter, c, T{});
  }
}

// Puts what two blocks are where planes lie for the target.
template <typename T>
__device__ void stage(const TallPlanes& a, const float (&sum)[kGroups][4], const Pairing& t, int out_at,
                      const int (&image)[2], const int (&block)[2], int lane) {
  const int quad = lane / 4, pair = lane % 4 * 2;
  const bool last = (kGroups - 1) * kLargeGroup + quad < a.out_width;
  const auto none = narrow_pair(0.f, 0.f, T{});
  Pair<T> zero[] = {none, none};
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int row = block[h] * kBlock + pair, to = out_at + image[h] * a.out_plane + quad * a.out_pitch + 2 * row;
    const bool there = image[h] < t.images && row < a.out_height;
#pragma unroll
    for (int j = 0; j < kGroups; ++j) {
      auto values = narrow_pair(sum[j][2 * h], sum[j][2 * h + 1], T{});
#if __CUDA_ARCH__ >= 800
      zero[h] = __hfma2(values, none, zero[h]);
#endif
      auto& word = reinterpret_cast<uint32_t&>(values);
      word = exchange_matrix(word);
      if (there && (j < kGroups - 1 || last)) shared<Pair<T>>(to + j * kLargeGroup * a.out_pitch) = values;
    }
  }
  __syncwarp();
  zero[0] = __hadd2(zero[0], zero[1]);
  if (!(__low2float(zero[0]) == 0 && __high2float(zero[0]) == 0)) {  // NaN: an output of the thread is not finite
#pragma unroll 1
    for (int v = 0; v < 2 * kGroups * 2; ++v) {
      const int h = v / (2 * kGroups), row = (h == 0 ? block[0] : block[1]) * kBlock + quad;
      const int n = h == 0 ? image[0] : image[1], column = v / 2 % kGroups * kLargeGroup + pair + v % 2;
      if (row >= a.out_height || n >= t.images || column >= a.out_width) continue;
      T& to = shared<T>(out_at + n * a.out_plane + column * a.out_pitch + 2 * row);
      if (!is_finite(widen(to))) to = narrow<T>(sum_of_taps<T>(a, t.target, t.image + n, row, column, 1, true));
    }
  }
}

template <typename T>
__device__ void consume(const TallPlanes& a, int first, int count, int warp, int lane) {
  const int quad = lane / 4, pair = lane % 4 * 2,
            entry = pair - quad + 7;  // of the lane's first pair in a row of weights
  const int all = count * a.blocks, first_target = pairing_of(a, first).target;
  TallFilter filter;
  float bias = 0;
  int target = -1;
#pragma unroll 1
  for (int number = warp; number < all; number += a.consumers) {
    uint32_t task = number;
    const int unit = a.by_blocks.split(task);
    uint32_t round = task;
    const int slot = a.by_slots.split(round);
    const Pairing t = pairing_of(a, first + task);
    wait(full_barrier(a, slot), round & 1);
    if (t.target != target) {
      target = t.target;
      bias = a.bias ? widen(static_cast<const T*>(a.bias)[target * a.bias_stride]) : 0.f;
      const int weights =
          a.weights_at + (target - first_target & 1) * a.weight_bytes + (entry & 1) * a.copy + 2 * (entry & ~1);
      // Rows of the kernel that move a block by -2, -1, 1, 2 and 0.
#pragma unroll
      for (int i = 0; i < kTaps; ++i) {
        const int row = a.padding_h + (i == kTaps - 1 ? 0 : i < kTaps / 2 ? i - kTaps / 2 : i - kTaps / 2 + 1);
        const bool there = static_cast<uint32_t>(row) < static_cast<uint32_t>(a.kernel_h);
        const int band = weights + (there ? row : kTaps) * a.weight_pitch;  // zeros behind the last row
#pragma unroll
        for (int k = 0; k < kBands; ++k)
          (i == kTaps - 1 ? filter.last[k] : filter.pairs[i / 2][k][i % 2]) =
              shared<uint32_t>(band + k * kLargeGroupBytes);
      }
    }
    float sum[kGroups][4];
#pragma unroll
    for (int j = 0; j < kGroups; ++j)
#pragma unroll
      for (int v = 0; v < 4; ++v) sum[j][v] = bias;
    int image[2], block[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int b = 2 * unit + h;
      image[h] = b >= a.blocks, block[h] = b - (b >= a.blocks ? a.blocks : 0);
    }
    const int at = a.source_at + slot * a.slot_bytes;
    if (image[0] < t.images) {
      compute<T>(a, sum, filter, at, image, block, t.images, lane);
      stage<T>(a, sum, t, at + a.out_in_slot, image, block, lane);
    }
    if (a.bulk_store) before_bulk_copies();
    arrive_together(done_barrier(a, slot), lane == 0);
  }
}

template <typename T>
__global__ void __launch_bounds__(kTallThreads, 1) toeplitz_tall_planes(const __grid_constant__ TallPlanes a) {
  const int block = blockIdx.x, blocks = gridDim.x;
  const int first = static_cast<int>(static_cast<int64_t>(a.tasks) * block / blocks);
  const int count = static_cast<int>(static_cast<int64_t>(a.tasks) * (block + 1) / blocks) - first;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  let_next_kernel_start();
  // Zeros where nothing is copied to: a row outside of all images, around the weights, and behind the columns.
  const int clear = a.bulk_load || a.raw.plane > 0 ? a.source_at : a.source_at + a.slots * a.slot_bytes;
  for (int i = 16 * threadIdx.x; i < clear; i += 16 * kTallThreads) shared<uint4>(i) = uint4{};
  __syncthreads();
  if (threadIdx.x < a.slots) {
    init_barrier(full_barrier(a, threadIdx.x), 2 * 32 * a.loaders);
    init_barrier(done_barrier(a, threadIdx.x), a.blocks * kWarpArrivals);
    init_barrier(empty_barrier(a, threadIdx.x), kWarpArrivals);
    init_barrier(raw_barrier(a, threadIdx.x), a.loaders);
  }
  if (a.bulk_load || a.raw.plane > 0) before_bulk_copies();
  wait_for_kernel_before();
  __syncthreads();
  if (warp < a.loaders)
    load<T>(a, first, count, threadIdx.x);
  else if (warp == a.loaders)
    store<T>(a, first, count, lane);
  else
    consume<T>(a, first, count, warp - a.loaders - 1, lane);
}

// Lays a block's shared memory out, and returns how much of it is needed: 0 where a problem does not fit.
int64_t apply(TallPlanes& a, bool bulk, int64_t shared_bytes) {
  const Bands bands(a.kernel_w, 1, a.padding_w, a.width, a.out_width);
  if (ceil_div(a.width, kLargeGroup) != kGroups || ceil_div(a.out_width, kLargeGroup) != kGroups ||
      bands.first < -kEdge || bands.first + bands.count > kEdge + 1 || bands.count < kBands - 1 ||
      a.kernel_h < kTaps - 1 || a.padding_h > kTaps / 2 || a.kernel_h - 1 - a.padding_h > kTaps / 2)
    return 0;
  const auto set = [](int& to, int64_t value) { to = static_cast<int>(value); };
  if (a.out_height % 2 != 0 || a.target_row != a.out_height) return 0;
  set(a.plane_bytes, 2 * int64_t{a.width} * a.height), set(a.out_bytes, 2 * int64_t{a.out_width} * a.out_height);
  set(a.blocks, ceil_div(a.out_height, kBlock));
  a.first = -kEdge, a.depth = kBands, a.first_tap = kLargeGroup * a.first - 7 + a.padding_w;

  const auto unit_of = [](std::initializer_list<int64_t> places) {
    int64_t all = 16;
    for (const int64_t place : places) all |= place;
    return static_cast<int>(all & -all);
  };
  const int64_t load_places = unit_of({2 * a.source_image, 2 * a.source_channel, 2 * a.source_row, 2 * a.height});
  a.load_unit = unit_of({reinterpret_cast<intptr_t>(a.source), load_places});
  // Where only the tensor's beginning is in the way of bulk copies, planes come as they lie.
  const bool raw = bulk && describe_raw(a.raw, a, a.height) && a.load_unit < load_places && a.height % kLargeGroup == 0;
  a.store_unit = unit_of({reinterpret_cast<intptr_t>(a.target), 2 * a.target_image, 2 * a.target_channel, a.out_bytes});
  if ((!raw && a.load_unit < 4) || a.store_unit < 4) return 0;
  a.bulk_load = bulk && a.load_unit == 16 && a.source_row == a.height;
  a.bulk_store = bulk && a.store_unit == 16;

  const int64_t groups = ceil_div(a.height, kLargeGroup);
  set(a.source_pitch, kLargeGroupBytes * (a.bulk_load || raw ? groups : groups | 1));
  set(a.source_plane, int64_t{a.width} * a.source_pitch);
  if (raw) {
    set(a.source_plane, raw_bytes(a.raw, a) + kLargeGroupBytes);
    a.raw.plane = a.source_plane, a.raw.in_plane = kLargeGroupBytes;
  }
  set(a.out_pitch, 2 * a.out_height), set(a.out_plane, round_up(a.out_bytes, 16));
  set(a.out_in_slot, kImages * int64_t{a.source_plane});
  set(a.slot_bytes, round_up(a.out_in_slot + kImages * int64_t{a.out_plane}, 128));
  set(a.weight_pitch, 2 * round_up(kLargeGroup * kBands + 7, 2));
  int64_t copy = (kTaps + int64_t{1}) * a.weight_pitch;
  copy += (64 - copy % 128 + 128) % 128;  // so that the copies do not meet in a bank
  set(a.copy, copy), set(a.weight_bytes, round_up(2 * copy, 128));
  set(a.barriers_at, round_up(std::max<int64_t>(kGroups, groups) * kLargeGroupBytes, 128));
  set(a.weights_at, a.barriers_at + 32 * kMostSlots), set(a.source_at, a.weights_at + 2 * int64_t{a.weight_bytes});
  set(a.slots, std::min<int64_t>((shared_bytes - a.source_at) / a.slot_bytes, kMostSlots));
  // No warp waits for a slot's next task before the one in it is there: a barrier tells two phases apart, not three.
  a.loaders = a.bulk_load ? 1 : raw ? 2 : 4, a.consumers = kTallThreads / 32 - 1 - a.loaders;
  if (a.slots < 2 || a.slots * a.blocks < a.consumers) return 0;
  const int threads = 32 * a.loaders, side = std::min(a.kernel_w, threads);
  a.by_weight_side = Divider(side), a.weight_lanes = threads / side;
  a.by_images = Divider(ceil_div(a.batch, kImages)), a.by_blocks = Divider(a.blocks), a.by_slots = Divider(a.slots);
  a.by_pieces = Divider(2 * a.height / a.load_unit);
  set(a.tasks, ceil_div(a.batch, kImages) * a.targets);
  return a.source_at + int64_t{a.slots} * a.slot_bytes;
}

template <typename T>
bool launch(const Problem& p, cudaStream_t stream) {
  TallPlanes a{};
  static_cast<Large&>(a) = arguments_of(p, true);
  if (p.stride_h != 1 || p.stride_w != 1) return false;
  const Device& device = current_device();
  const auto kernel = toeplitz_tall_planes<T>;
  const int64_t bytes = apply(a, can_overlap(kernel), p.shared_memory);
  // Two images for a block's two halves, and tasks for all multiprocessors.
  if (bytes == 0 || a.tasks < 2 * device.multiprocessors || a.batch * 4 < round_up(a.batch, kImages) * 3) return false;
  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
  launch_early(kernel, a, std::min(a.tasks, device.multiprocessors), kTallThreads, stream, {.shared_bytes = bytes});
  check_launch("toeplitz_tall_planes");
  return true;
}

}  // namespace

bool launch_toeplitz_tall_planes(const Problem& exchanged, cudaStream_t stream) {
  return exchanged.dtype == DType::kFloat16 ? launch<__half>(exchanged, stream)
                                            : launch<__nv_bfloat16>(exchanged, stream);
}

}  // namespace dwconv
