// The same rows or planes of many images in shared memory, one slot for each image, as they lie in memory: so whatever
// multiplies matrices can have images as their rows, or sum over them.
//
// They are copied in units of 16 bytes between the first and the last multiple of 16 among their addresses, and element
// by element outside: every byte that is touched is theirs.
#pragma once

#include "copies.cuh"

namespace dwconv {

struct ImageRuns {
  char* base;
  int64_t image_bytes;  // from one image to the next
  int memory, pitch;    // in shared memory: the first slot, and from one to the next

  // Where bytes lie within 16 that begin `offset` bytes behind the beginning of an image.
  __device__ int phase(int image, int64_t offset) const {
    const auto low = [](auto value) { return static_cast<uint32_t>(value); };
    return (low(reinterpret_cast<uintptr_t>(base)) + low(image) * low(image_bytes) + low(offset)) % kUnit;
  }
  // Where a slot's bytes begin: they keep their place within 16 bytes. `stage`: added to the place in shared memory.
  __device__ int slot(int stage, int index, int image, int64_t offset) const {
    return stage + memory + index * pitch + phase(image, offset);
  }
};

// An odd number of 16 bytes, so that words of 8 slots side by side are in different banks, and those beside them.
inline int slot_pitch(int64_t bytes) {
  return static_cast<int>((bytes + 2 * kUnit - 2) / kUnit | 1) * kUnit;
}

// Where 16 bytes of memory and of shared memory begin together: bytes before, and the last place behind.
struct Units {
  int head, tail;
  __device__ Units(int slot, int bytes)
      : head(min(-slot & (kUnit - 1), bytes)), tail(head + (bytes - head) / kUnit * kUnit) {}
};

// A thread loads a slot by a bulk copy; one that has no image becomes zeros.
__device__ inline void load_run(const ImageRuns& v, int stage, int index, int first_image, int images, int64_t offset,
                                int bytes, int barrier) {
  if (index >= images) {
    for (int at = 0; at < v.pitch; at += kUnit) shared<uint4>(stage + v.memory + index * v.pitch + at) = uint4{};
    return;
  }
  const char* const from = v.base + (first_image + index) * v.image_bytes + offset;
  const int slot = v.slot(stage, index, first_image + index, offset);
  const Units units(slot, bytes);
  if (units.tail > units.head) {
    expect_bytes(barrier, units.tail - units.head);
    copy_bulk(shared_address(slot + units.head), from + units.head, units.tail - units.head, barrier);
  }
  const auto copy = [&](int at) { shared<uint16_t>(slot + at) = __ldg(reinterpret_cast<const uint16_t*>(from + at)); };
  for (int at = 0; at < units.head; at += 2) copy(at);
  for (int at = units.tail; at < bytes; at += 2) copy(at);
}

// How a lane loads a slot by a bulk copy of all the units that its bytes lie in: for images of whole units only.
struct UnitLoad {
  const char* from;
  int to, bytes;

  __device__ void begin(int stage, int barrier) const {
    expect_bytes(barrier, bytes);
    copy_bulk(shared_address(stage + to), from, bytes, barrier);
  }
};

// All threads copy between memory and the slots, 16 images at once.
template <bool kLoad>
__device__ void copy_runs(const ImageRuns& v, int stage, int first_image, int images, int64_t offset, int bytes) {
  const int lanes = blockDim.x / 16, lane = threadIdx.x % lanes;
  for (int n = threadIdx.x / lanes; n < images; n += 16) {
    char* const there = v.base + (first_image + n) * v.image_bytes + offset;
    const int slot = v.slot(stage, n, first_image + n, offset);
    const Units units(slot, bytes);
    const auto copy = [&](int at) {
      if (kLoad)
        shared<uint16_t>(slot + at) = __ldg(reinterpret_cast<const uint16_t*>(there + at));
      else
        *reinterpret_cast<uint16_t*>(there + at) = shared<uint16_t>(slot + at);
    };
    for (int at = 2 * lane; at < units.head; at += 2 * lanes) copy(at);
    for (int at = units.tail + 2 * lane; at < bytes; at += 2 * lanes) copy(at);
#pragma unroll 4
    for (int at = units.head + lane * kUnit; at < units.tail; at += lanes * kUnit) {
      if (kLoad)
        copy_unit<kUnit>(shared_address(slot + at), there + at);
      else
        *reinterpret_cast<uint4*>(there + at) = shared<uint4>(slot + at);
    }
  }
}

// All threads load 16 slots; those that have no image become zeros.
__device__ inline void load_runs(const ImageRuns& v, int stage, int first_image, int images, int64_t offset,
                                 int bytes) {
  copy_runs<true>(v, stage, first_image, images, offset, bytes);
  for (int at = images * v.pitch + threadIdx.x * kUnit; at < 16 * v.pitch; at += blockDim.x * kUnit)
    shared<uint4>(stage + v.memory + at) = uint4{};
}

}  // namespace dwconv
