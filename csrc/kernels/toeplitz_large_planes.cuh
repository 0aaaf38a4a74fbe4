// toeplitz_large (toeplitz_large.cuh) on planes as wide as the tiles of a warp. What is said there of groups, band
// matrices and weights holds here as well.
//
// No barrier holds all warps of a block. A few of them, the producers, fill slots in shared memory with planes of some
// images, and places beside them with the weights of the next filter. The others take units, which are some rows of
// the planes in a slot, from a counter, and store what they have computed by themselves: warp by warp in
// toeplitz_large_planes.cu, four warps together in toeplitz_large_groups.cu.
#pragma once

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
  int matrices_at, matrix_bytes;     // where its band matrices lie, likewise, if a warpgroup multiplies
  int box_rows, box_rows_log;        // of a unit that leaves as several boxes
  int box_bytes;
  int barriers_at, counter_at;  // offsets in shared memory; behind the counter, a barrier for first raw planes
  bool bulk_load, box_store;    // whether planes are copied as one, and the units of all images
  EarlyPlanes early;
  RawPlanes raw;  // if planes come as they lie
  RawRows raw_rows;
  int raw_first;     // tasks whose planes consumers get
  int shift;         // columns from where they are counted to the image's first one
  int last_piece;    // bytes of the last piece of a row that threads copy
  bool meets_first;  // whether the first band matrix leads to the image
  Divider by_units, by_slots;
  Divider by_load_pieces;                // of a row of the source
  int load_step_pieces, load_step_rows;  // to a thread's next piece
  Divider by_store_pieces;               // of an image's unit, as far as a warp stores them at once
  int store_images;                      // at once
};

// How planes come. Threads copy rows, or all of a plane at once: from the image's first columns, kAligned; from the
// multiple of 4 or 8 bytes before, kEarlier, where a row's last group has room for as many columns more. Or planes come
// as they lie, by units of 16 bytes: what ldmatrix needs is made of that in place, kMoved; or columns are counted from
// the unit's first, kShifted, which takes rows of whole units.
enum class Begin { kAligned, kEarlier, kMoved, kShifted };

// Warps that move planes have more to do; as many multiply on each scheduler.
constexpr int kMovedThreads = 512, kMovedProducers = 4;

constexpr bool comes_raw(Begin begin) {
  return begin == Begin::kMoved || begin == Begin::kShifted;
}

// Of a lane's two columns of the first group, those of the image's row; not computed again where it is used, as it has
// gone through a shuffle.
__device__ inline uint32_t columns_inside(const Planes& a) {
  const int lane = threadIdx.x % 32, pair = lane % 4 * 2;
  return __shfl_sync(~0u, (pair >= a.shift ? 0xffff : 0) | (pair + 1 >= a.shift ? 0xffff0000 : 0), lane);
}

// Whether consumers make a block's first filter: where rows have gaps in shared memory, which bulk copies do not leave,
// producers have enough to do.
template <int kTiles, Begin kBegin>
constexpr bool kConsumersHelp = kBegin == Begin::kAligned && kTiles % 2 == 0;

// Behind which a warpgroup's first matrices are there.
constexpr int kMatricesBarrier = 6;

// What lies in a slot.
struct alignas(16) PlanesTask {
  int target, image, images, weights_at;
  float bias;
};

__device__ inline int full_barrier(const Planes& a, int slot) {
  return a.barriers_at + kBarrierBytes * slot;
}
__device__ inline int empty_barrier(const Planes& a, int slot) {
  return full_barrier(a, slot) + 8;
}
__device__ inline int raw_barrier(const Planes& a, int slot) {
  return full_barrier(a, slot) + 16;
}
__device__ inline PlanesTask& task_in(const Planes& a, int slot) {
  return shared<PlanesTask>(a.tasks_at + slot * static_cast<int>(sizeof(PlanesTask)));
}

// Begins to copy up to kBytes, with zeros behind.
template <int kBytes>
__device__ void copy_part_of_unit(uint32_t to, const void* from, int bytes) {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(to), "l"(from), "n"(kBytes), "r"(bytes)
               : "memory");
#endif
}

// Begins to copy planes to a slot. Behind their columns are zeros already.
template <typename T, int kImages, int kBytes, bool kEarlier>
__device__ void load_planes(const Planes& a, const PlanesTask& t, int source_at, int thread) {
  uint32_t channel = t.target;
  a.by_fan_out.split(channel);
  const T* source = static_cast<const T*>(a.source) + t.image * a.source_image + channel * a.source_channel;
  const int pieces = static_cast<int>(a.by_load_pieces.divisor);
  const int64_t step = 2 * a.source_image;
  uint32_t row = thread;
  int piece = a.by_load_pieces.split(row);
  // Of the piece that an image begins inside of, elements are loaded one by one.
  const bool begins_inside = kEarlier && channel == 0;
  if (begins_inside)
    for (int i = thread; i < t.images * (kBytes / 2); i += 32 * a.producers) {
      const int image = i / (kBytes / 2), column = i % (kBytes / 2) - a.shift;
      if (column >= 0)
        shared<T>(source_at + image * a.source_plane + 2 * (a.shift + column)) =
            source[image * a.source_image + column];
    }
#pragma unroll 1
  while (static_cast<int>(row) < a.height) {
    auto from = reinterpret_cast<const char*>(source + row * a.source_row) + piece * kBytes;
    if constexpr (kEarlier) from -= 2 * a.shift;
    uint32_t to = shared_address(source_at + static_cast<int>(row) * a.source_pitch + piece * kBytes);
    const int bytes = piece == pieces - 1 ? a.last_piece : kBytes;
    const auto copy = [&](auto count) {
      const char* places[count];
#pragma unroll
      for (int k = 0; k < count; ++k, from += step) places[k] = from;
#pragma unroll
      for (int k = 0; k < count; ++k, to += a.source_plane)
        if constexpr (kEarlier)
          copy_part_of_unit<kBytes>(to, places[k], bytes);
        else
          copy_unit<kBytes>(to, places[k]);
    };
    if (begins_inside && row == 0 && piece == 0) {
      // It is there.
    } else if (t.images == kImages) {
      copy(std::integral_constant<int, kImages>{});
    } else {
      visit_images(0, 1, t.images, copy);
    }
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
template <typename T, int kTiles, int kSides, bool kHere = false>
__device__ void settle_raw(const Planes& a, const RawImages& part, int slot_at) {
  load_ends<T>(a.raw, a, part, raw_at(a.raw, a, part.channel, slot_at));
  if constexpr (kSides == 1)
    move_raw(a.raw, a, part, slot_at);
  else
    part_raw<kTiles, kHere>(a.raw, a.raw_rows, a, part, slot_at);
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

// Lays band matrices out as a warpgroup's multiplication reads them: those of a row of the kernel side by side from the
// last one on, columns of the target one after the other, each with 8 columns of the source.
template <int kDepth>
__device__ void write_matrices(const Planes& a, int weights_at, int to, int thread, int threads) {
  constexpr int kLines = 8 * kDepth;  // of 16 bytes, of a row of the kernel: a thread stays with one of them
  const int together = threads / kLines, first = thread / kLines, line = thread % kLines;
  if (first >= together) return;
  const int entry = kLargeGroup * (kDepth - 1 - line / 8) + 7 - line % 8, step = together * a.weight_pitch;
  uint32_t from = shared_address(weights_at + (entry & 1) * a.copy + 2 * (entry & ~1) + first * a.weight_pitch);
  uint32_t at = shared_address(to + 16 * thread);
#pragma unroll 5
  for (int row = first; row < (a.kernel_h + 1) / 2 * 2; row += together, from += step, at += 16 * together * kLines) {
    uint32_t words[4];
#pragma unroll
    for (int k = 0; k < 4; ++k) words[k] = shared_at<uint32_t>(from + 4 * k);
    shared_at<uint4>(at) = {words[0], words[1], words[2], words[3]};
  }
}

// Producers fill slots with what tasks need, one after the other: planes and, where it changes, a filter. They wait for
// the kernel before when they are about to read. kMatrices: how many band matrices of a row of the kernel a warpgroup
// needs, if one multiplies: then the first filter is not theirs, and no more than a task's planes are in the way of its
// matrices. `helps`: for as many warps of consumers, which make the first filter before there are planes.
template <typename T, int kTiles, int kSides, Begin kBegin, int kMatrices = 0>
__device__ void produce(const Planes& a, int first, int count, int thread, bool helps = false) {
  constexpr int kImages = 8 * kSides;
  PlanesTask t{-1};
  RawTasks raw_tasks(a.raw_first, a.slots);
  int begin = 0, set = 0, slot = 0;
  uint32_t parity = 1;
  if constexpr (comes_raw(kBegin)) wait_for_kernel_before();
#pragma unroll 1
  for (int task = 0; task < count; ++task) {
    if constexpr (kBegin == Begin::kMoved) {
      raw_tasks.ask(
          task, count, a.slots, [&](int at) { return empty_barrier(a, at); },
          [&](int number, int at) {
            const RawImages part = raw_images(a, first + number, kImages, thread / 32, a.producers);
            copy_raw(a.raw, a, part, a.source_at + at * a.slot_bytes, raw_barrier(a, at));
            arrive(raw_barrier(a, at));
          });
      if (task >= a.raw_first) {
        wait(raw_barrier(a, slot), (parity ^ 1) ^ (slot < a.raw_first));
        settle_raw<T, kTiles, kSides, (kMatrices > 0)>(
            a, raw_images(a, first + task, kImages, thread / 32, a.producers), a.source_at + slot * a.slot_bytes);
      }
    } else if (task >= a.slots) {
      wait(empty_barrier(a, slot), parity);
    }
    uint32_t target = first + task;
    t.image = a.by_images.split(target) * a.images, t.images = min(a.images, a.batch - t.image);
    const bool changes = static_cast<int>(target) != t.target;
    t.target = static_cast<int>(target);
    LargeWeights<T, 8> weights;
    const bool helped = kConsumersHelp<kTiles, kBegin> && kMatrices == 0 && task == 0;
    const bool makes = changes && (kMatrices == 0 || task > 0) && helps == helped;
    if (!comes_raw(kBegin) && task == 0) settle_and_wait_for_kernel_before(count);
    if (makes) weights.begin(a, t.target, thread);
    if (kMatrices > 0 && !comes_raw(kBegin) && task == 1) meet<kMatricesBarrier>(blockDim.x);
    const int source_at = a.source_at + slot * a.slot_bytes;
    if constexpr (kBegin == Begin::kMoved) {
      // They are there.
    } else if constexpr (kBegin == Begin::kShifted) {
      if (thread < 32) {
        uint32_t channel = t.target;
        a.by_fan_out.split(channel);
        RawImages part{static_cast<int>(channel), t.image, thread, min(thread + 1, t.images)};
        before_bulk_copies();  // ends of planes may have been written here
        copy_raw(a.raw, a, part, source_at, full_barrier(a, slot));
        part.begin = 0, part.end = t.images;
        load_ends<T>(a.raw, a, part, raw_at(a.raw, a, part.channel, source_at));
      }
    } else if (helps) {
      // They are the producers'.
    } else if (a.bulk_load) {
      if (thread < t.images) load_plane<T>(a, t, full_barrier(a, slot), source_at, thread);
    } else {
      constexpr bool kEarlier = kBegin == Begin::kEarlier;
      switch (a.load_unit) {
        case 16:
          if constexpr (!kEarlier) load_planes<T, kImages, 16, false>(a, t, source_at, thread);
          break;
        case 8: load_planes<T, kImages, 8, kEarlier>(a, t, source_at, thread); break;
        default: load_planes<T, kImages, 4, kEarlier>(a, t, source_at, thread); break;
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
      [[maybe_unused]] const int matrices_at = a.matrices_at + set * a.matrix_bytes;
      t.bias = a.bias ? widen(static_cast<const T*>(a.bias)[t.target * a.bias_stride]) : 0.f;
      begin = task, set ^= 1;
      if (makes) weights.write(a, t.weights_at);
      if constexpr (kMatrices > 0) {
        if (makes) {
          meet<2>(32 * a.producers);
          write_matrices<kMatrices>(a, t.weights_at, matrices_at, thread, 32 * a.producers);
          before_bulk_copies();
        }
        t.weights_at = matrices_at;
      }
    }
    if (thread == 0 && helps == helped) task_in(a, slot) = t;
    if (!helps) arrive_after_copies(full_barrier(a, slot));
    if (helps == helped) arrive(full_barrier(a, slot));
    if (++slot == a.slots) slot = 0, parity ^= 1;
  }
  commit_copies();
  wait_copies<0>();
}

// The number of a block's next unit, for one thread: by itself, or else the compiler counts threads.
__device__ inline int take_unit(const Planes& a) {
  int number;
  asm volatile("atom.shared.add.u32 %0, [%1], 1;" : "=r"(number) : "r"(shared_address(a.counter_at)) : "memory");
  return number;
}

template <int value>
using Constant = std::integral_constant<int, value>;

// How many tiles, band matrices of a row, images (by 8) and rows a unit has, and how warps are parted.
struct PlanesShape {
  int tiles, depth, sides, unit_rows, threads, producers;
  bool shifts = false;  // whether columns of planes that begin between multiples of 16 bytes are counted from one
  bool groups = false;  // whether warpgroups multiply
  int box_rows = 0;     // of what leaves at once, if not all of a unit
};

// Lays a block's shared memory out, and returns how much of it is needed: 0 where a problem does not fit.
inline int64_t apply(Planes& a, const PlanesShape& shape, bool bulk, int64_t shared_bytes) {
  const auto [tiles, depth, sides, unit_rows, threads, producers, shifts, groups, box_rows] = shape;
  const auto unit_of = [](std::initializer_list<int64_t> places) {
    int64_t all = 16;
    for (const int64_t place : places) all |= place;
    return static_cast<int>(all & -all);
  };
  const int64_t load_places = unit_of({2 * a.source_image, 2 * a.source_channel, 2 * a.source_row, 2 * a.width});
  a.load_unit = unit_of({reinterpret_cast<intptr_t>(a.source), load_places});
  const int edge = depth / 2;
  const auto bands_of = [&](int shift) {
    return Bands(a.kernel_w, 1, a.padding_w - shift, a.width + shift, a.out_width);
  };
  const auto meets_bands = [&](int shift) {
    const Bands bands = bands_of(shift);
    return bands.first >= -edge && bands.first + bands.count <= edge + 1 && bands.count >= (groups ? tiles : depth - 1);
  };
  // Where only the tensor's beginning is in the way of larger pieces, columns are counted from a piece's first one, or
  // planes come as they lie.
  const bool parted = sides == 2, fits = parted ? a.height <= 32 : a.width == tiles * kLargeGroup && tiles % 2 == 1;
  const bool begins_inside = a.load_unit < load_places;
  const auto before = [&](int64_t unit) {
    return static_cast<int>(reinterpret_cast<uintptr_t>(a.source) % static_cast<uintptr_t>(unit) / 2);
  };
  const bool is_dense = a.source_row == a.width && a.source_channel == int64_t{a.height} * a.width;
  const auto has_room = [&](int64_t unit) {
    return begins_inside && parted && is_dense && unit >= 4 && before(unit) > 0 &&
           before(unit) + a.width <= tiles * kLargeGroup && meets_bands(before(unit));
  };
  const int64_t unit = has_room(load_places) ? load_places : load_places / 2;
  const bool earlier = has_room(unit);
  const bool raw = bulk && fits && begins_inside && !earlier && describe_raw(a.raw, a, a.width);
  const bool moves = raw && !shifts;
  a.shift = earlier ? before(unit) : raw && shifts ? a.raw.begin / 2 : 0;
  if (earlier) a.load_unit = static_cast<int>(unit);
  a.meets_first = bands_of(a.shift).first == -edge;
  if (ceil_div(a.width, kLargeGroup) != tiles || ceil_div(a.out_width, kLargeGroup) != tiles || !meets_bands(a.shift))
    return 0;
  const auto set = [](int& to, int64_t value) { to = static_cast<int>(value); };
  a.first = -edge, a.depth = depth, a.first_tap = kLargeGroup * a.first - 7 + a.padding_w - a.shift;
  a.images = 8 * sides, a.units = static_cast<int>(ceil_div(a.out_height, unit_rows));
  a.producers = moves ? kMovedProducers : producers;
  a.consumers = ((moves ? kMovedThreads : threads) / 32 - a.producers) / (groups ? 4 : 1);

  a.source_pitch = kLargeGroupBytes * (tiles | 1);
  int64_t source_plane = int64_t{a.height} * a.source_pitch;
  if (raw) source_plane = std::max(source_plane, raw_bytes(a.raw, a) + (parted || shifts ? 0 : kLargeGroupBytes));
  // Rows of several images meet no bank of shared memory twice.
  const int together = 2 / sides;
  while (source_plane / kLargeGroupBytes % (2 * together) != together) source_plane += kLargeGroupBytes;
  a.out_pitch = 2 * a.out_width;
  a.box_rows = box_rows > 0 ? box_rows : unit_rows, a.box_rows_log = a.box_rows == 4 ? 2 : 1;
  const int64_t out_plane = round_up(a.box_rows * a.out_pitch, 16);
  const int64_t box_bytes = round_up(a.images * out_plane, kBoxUnit), out_bytes = unit_rows / a.box_rows * box_bytes;
  a.weight_pitch = static_cast<int>(2 * round_up(kLargeGroup * depth + 7, 2));
  int64_t copy = (a.kernel_h + int64_t{1}) * a.weight_pitch;
  copy += (64 - copy % 128 + 128) % 128;  // so that the copies do not meet in a bank
  const int64_t slot_bytes = round_up(a.images * source_plane, 128), weight_bytes = round_up(2 * copy, 128);
  const int64_t barriers_at = round_up(tiles * kLargeGroupBytes, 128);
  const int64_t counter_at = barriers_at + round_up(kBarrierBytes * kMostSlots, 16);
  const int64_t tasks_at = counter_at + 32, weights_at = round_up(tasks_at + kMostSlots * sizeof(PlanesTask), 128);
  const int64_t source_at = weights_at + 2 * weight_bytes;
  const int64_t matrix_bytes = groups ? (a.kernel_h + 1) / 2 * 2 * depth * 128 : 0;
  const int64_t slots = std::min((shared_bytes - source_at - a.consumers * out_bytes - 2 * matrix_bytes) / slot_bytes,
                                 int64_t{kMostSlots});
  // No warp waits for a slot's next task before the one in it is there: a barrier tells two phases apart, not three.
  if (slots < 2 || slots * a.units < a.consumers) return 0;
  const int64_t out_at = source_at + slots * slot_bytes;
  a.raw_rows = {Divider(a.height), std::max(32 / a.height, 1), a.width / 2, a.source_pitch};
  set(a.raw_first, moves && !groups ? std::min(ceil_div(a.consumers, a.units), slots) : 0);
  if (raw)
    set(a.raw.plane, source_plane), set(a.raw.in_plane, shifts   ? 0
                                                        : parted ? source_plane - raw_bytes(a.raw, a)
                                                                 : kLargeGroupBytes);
  set(a.source_plane, source_plane), set(a.out_plane, out_plane), set(a.out_bytes, out_bytes), set(a.copy, copy);
  set(a.slot_bytes, slot_bytes), set(a.weight_bytes, weight_bytes), set(a.slots, slots);
  set(a.barriers_at, barriers_at), set(a.counter_at, counter_at), set(a.tasks_at, tasks_at);
  set(a.weights_at, weights_at), set(a.source_at, source_at), set(a.out_at, out_at);
  const int64_t matrices_at = out_at + a.consumers * out_bytes;
  set(a.matrices_at, matrices_at), set(a.matrix_bytes, matrix_bytes), set(a.box_bytes, box_bytes);

  const int64_t last_rows = (a.out_height - 1) % unit_rows + 1;
  a.store_unit = unit_of({reinterpret_cast<intptr_t>(a.target), 2 * a.target_image, 2 * a.target_channel,
                          a.units > 1 ? unit_rows * a.out_pitch : 0, last_rows * a.out_pitch});
  if ((!raw && a.load_unit < 4) || a.store_unit < 4) return 0;
  a.bulk_load = !raw && bulk && a.load_unit == 16 && a.source_row == a.width && a.source_pitch == 2 * a.width;
  const int loaders = 32 * a.producers, side = std::min(a.kernel_w, loaders);
  a.by_weight_side = Divider(side), a.weight_lanes = loaders / side;
  const int load_bytes = 2 * (a.width + (earlier ? a.shift : 0));
  const int load_pieces = static_cast<int>(ceil_div(load_bytes, a.load_unit));
  a.last_piece = load_bytes - (load_pieces - 1) * a.load_unit;
  a.load_step_pieces = loaders % load_pieces, a.load_step_rows = loaders / load_pieces;
  const int store_pieces = std::min(unit_rows * a.out_pitch / a.store_unit, 32);
  a.by_load_pieces = Divider(load_pieces);
  a.by_store_pieces = Divider(store_pieces), a.store_images = 32 / store_pieces;
  a.by_images = Divider(ceil_div(a.batch, a.images)), a.by_units = Divider(a.units), a.by_slots = Divider(a.slots);
  set(a.tasks, ceil_div(a.batch, a.images) * a.targets);
  a.early = early_planes_of(a, ceil_div(a.consumers, a.units));
  a.box_store = bulk && out_plane == a.box_rows * a.out_pitch && out_plane <= 2 * kMostBoxSide &&
                describe_boxes(a.target_map, a.target, sizeof(uint16_t),
                               {int64_t{a.out_height} * a.out_width, a.targets, a.batch, 1},
                               {2 * a.target_channel, 2 * a.target_image, 2 * a.target_image},
                               {a.box_rows * a.out_width, 1, a.images, 1});
  if (groups && !a.box_store) return 0;
  return matrices_at + 2 * matrix_bytes;
}

// Whether a launch has enough to do: units for all warps, and images for most rows of a multiplication.
inline bool pays(const Planes& a, int multiprocessors) {
  const int64_t units = int64_t{a.tasks} * a.units;
  return units > int64_t{multiprocessors} * a.consumers && a.batch * 4 >= round_up(a.batch, a.images) * 3;
}

}  // namespace
}  // namespace dwconv
