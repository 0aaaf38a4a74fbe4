// Rows of arrays in channels_last, flowing through a ring in shared memory.
//
// A block takes some columns of some channels (a slab) of an image and marches down its rows. Rows come in groups:
// while one is worked on, the next ones are on their way, by cp.async on sm_80 and later, with zeros for columns
// outside the image. All threads copy, in units as large as the array's alignment allows.
#pragma once

#include "stream.cuh"

namespace dwconv {

constexpr int kGroups = 4;  // of rows in the ring: one to work on and the others on their way

// An array (image, row, column, channel) with neighbouring channels side by side, and how blocks copy it.
struct Rows {
  const char* base;
  int64_t image_bytes, row_bytes;  // from one to the next
  int pixel_bytes;                 // likewise
  int width, channel_bytes;        // of a row, of a pixel
  int slab_bytes;                  // what a block takes of a pixel
  int unit;                        // bytes copied at once
  // Pixels without gaps: a row is copied as one run of units of 16 bytes, and lies in the ring at the same place within
  // 16 bytes. The first unit may hold the end of the row before: columns left of the image must be masked.
  bool joined;
  int pitch;                                            // from a column to the next in the ring
  int units, units_per_column, step_column, step_part;  // of a row; from a thread's unit to its next
  int slot_bytes;                                       // of a row in the ring
  Divider by_units_per_column;

  // How far behind a slot's beginning the first of the columns lies.
  __device__ int phase(const char* row, int column) const {
    return joined ? (static_cast<int>(reinterpret_cast<uintptr_t>(row)) + column * pixel_bytes) & (kUnit - 1) : 0;
  }
};

// Copies a unit, of which `bytes` are there; the others become zeros.
template <int kBytes>
__device__ void copy_unit(int to, const char* from, int bytes) {
#if __CUDA_ARCH__ >= 800
  constexpr bool kAsync = kBytes >= 4;
#else
  constexpr bool kAsync = false;
#endif
  if constexpr (kAsync && kBytes == 16)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(bytes)
                 : "memory");
  else if constexpr (kAsync)
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(shared_address(to)), "l"(from), "n"(kBytes),
                 "r"(bytes)
                 : "memory");
  else
#pragma unroll
    for (int i = 0; i < kBytes; i += 2)
      shared<uint16_t>(to + i) = i < bytes ? *reinterpret_cast<const uint16_t*>(from + i) : uint16_t{0};
}

// The thread's part in copying rows. `slab`: offset of the block's channels in a pixel.
class RowLoader {
 public:
  __device__ RowLoader(const Rows& rows, int slab)
      : slab_(slab), bytes_(min(rows.slab_bytes, rows.channel_bytes - slab)) {
    uint32_t column = threadIdx.x;
    part_ = rows.by_units_per_column.split(column);
    column_ = column;
  }

  // Begins to copy the columns from `column` on of the row at `row`, its first pixel, to the slot at `slot`.
  __device__ void load(const Rows& rows, int slot, const char* row, int column) const {
    if (rows.joined) return load_run(rows, slot, row, column);
    switch (rows.unit) {
      case 16: return load_units<16>(rows, slot, row, column);
      case 8: return load_units<8>(rows, slot, row, column);
      case 4: return load_units<4>(rows, slot, row, column);
      default: return load_units<2>(rows, slot, row, column);
    }
  }

 private:
  template <int kBytes>
  __device__ void load_units(const Rows& rows, int slot, const char* row, int column) const {
    int part = part_, x = column + column_;
    for (int unit = threadIdx.x; unit < rows.units; unit += blockDim.x) {
      const int at = part * kBytes;
      const bool inside = static_cast<uint32_t>(x) < static_cast<uint32_t>(rows.width) && at < bytes_;
      copy_unit<kBytes>(slot + unit * kBytes, row + (static_cast<int64_t>(x) * rows.pixel_bytes + slab_ + at),
                        inside ? kBytes : 0);
      part += rows.step_part, x += rows.step_column;
      if (part >= rows.units_per_column) part -= rows.units_per_column, ++x;
    }
  }

  __device__ void load_run(const Rows& rows, int slot, const char* row, int column) const {
    const int first = column * rows.pixel_bytes - rows.phase(row, column), end = rows.width * rows.pixel_bytes;
    for (int unit = threadIdx.x; unit < rows.units; unit += blockDim.x) {
      const int at = first + unit * kUnit;
      copy_unit<kUnit>(slot + unit * kUnit, row + at, at > -kUnit ? max(min(end - at, kUnit), 0) : 0);
    }
  }

  int slab_, bytes_;   // the block's channels: where in a pixel, and how many bytes
  int part_, column_;  // the thread's first unit
};

// Ends the loads of a group of rows, there or not: groups are counted.
__device__ inline void commit_rows() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits for the oldest of kGroups - 1 groups under way. What others loaded is there after the next __syncthreads().
__device__ inline void wait_rows() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(kGroups - 2) : "memory");
#endif
}

// An array in channels_last, its `channels` side by side.
inline Rows rows_of(const View& view, int64_t element, int64_t channels, int64_t width) {
  Rows rows{};
  rows.base = static_cast<const char*>(view.data);
  rows.image_bytes = view.stride[0] * element, rows.row_bytes = view.stride[2] * element;
  rows.pixel_bytes = static_cast<int>((width == 1 ? channels : view.stride[3]) * element);
  rows.width = static_cast<int>(width), rows.channel_bytes = static_cast<int>(channels * element);
  return rows;
}

// Bytes that all channels, columns, rows and images of an array of this kind are a multiple of, 16 at most.
inline int alignment_of(const View& view, int64_t element, int64_t channels, int64_t height, int64_t width,
                        int64_t batch) {
  uint64_t all = reinterpret_cast<uintptr_t>(view.data) | (channels * element) | kUnit;
  if (width > 1) all |= view.stride[3] * element;
  if (height > 1) all |= view.stride[2] * element;
  if (batch > 1) all |= view.stride[0] * element;
  return static_cast<int>(all & -all);
}

// Whether rows, and images, follow each other without a gap, and begin with 16 bytes of their own.
inline bool is_joined(const View& view, int64_t element, int64_t channels, int64_t height, int64_t width,
                      int64_t batch) {
  const int64_t image = height * width * channels;
  return reinterpret_cast<uintptr_t>(view.data) % kUnit == 0 && (width == 1 || view.stride[3] == channels) &&
         (height == 1 || view.stride[2] == width * channels) &&
         (batch == 1 || view.stride[0] == image || (view.stride[0] > image && view.stride[0] * element % kUnit == 0));
}

// Settles how `threads` threads copy `columns` columns of `slab_bytes` of each pixel.
inline void cut_rows(Rows& rows, int alignment, bool joined, int64_t columns, int64_t slab_bytes, int threads) {
  rows.slab_bytes = rows.pitch = static_cast<int>(slab_bytes);
  rows.joined = alignment < kUnit && joined && slab_bytes == rows.channel_bytes;
  rows.unit = alignment;
  if (slab_bytes < rows.channel_bytes)
    while (slab_bytes % rows.unit != 0) rows.unit /= 2;
  rows.units_per_column = static_cast<int>(ceil_div(slab_bytes, rows.unit));
  rows.pitch = rows.units_per_column * rows.unit;
  rows.units = static_cast<int>(columns) * rows.units_per_column;
  rows.slot_bytes = static_cast<int>(round_up(columns * rows.pitch, kUnit));
  if (rows.joined) {
    rows.units = static_cast<int>(ceil_div(columns * rows.pitch + kUnit - 1, kUnit));
    rows.slot_bytes = rows.units * kUnit;
  }
  rows.step_column = threads / rows.units_per_column, rows.step_part = threads % rows.units_per_column;
  rows.by_units_per_column = Divider(rows.units_per_column);
}

}  // namespace dwconv
