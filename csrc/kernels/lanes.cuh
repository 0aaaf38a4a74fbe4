// What kernels share whose lanes lie on images, or in channels_last on channels, and on rows: how other warps copy
// planes to a ring of stages in shared memory.
//
// A form F has kSide, the columns of a plane that code is compiled for, kChannelsLast, kUnits, the images or channels
// of a warp, kImages, those of an item in channels_last, and kRowBytes and kColumnBytes, from row to row and from
// column to column in shared memory. For weights it has kReach, the columns on each side of the middle tap, and
// kWeightBytes, from row to row.
#pragma once

#include <algorithm>

#include "boxes.cuh"
#include "copies.cuh"

namespace dwconv {

struct Copy {
  int vector;   // elements that are copied at once
  bool as_one;  // a plane, as if it were a row
  bool bulk;    // by bulk copies, in channels_last of boxes, where code is for GPUs that have them
  bool boxes;   // these are of several planes
};

// Rows of a box: an odd number, where images lie side by side, so that these meet in different banks.
template <class F>
__host__ __device__ constexpr int box_rows(int rows) {
  return F::kChannelsLast && F::kImages > 1 ? rows | 1 : rows;
}

// Copies rows of so many units, by one warp.
template <int kVector>
__device__ __forceinline__ void copy_rows(const float* from, int64_t row_stride, int64_t column_stride, int rows,
                                          int units, int to, int row_bytes, int column_bytes) {
  const int lane = threadIdx.x % 32, at_once = max(32 / units, 1);
  const uint32_t base = shared_address(to);
  for (int first = 0; first < units; first += 32) {
    const int first_row = units < 32 ? lane / units : 0, unit = first + lane - first_row * units;
    if (unit >= units || first_row >= at_once) break;
    const float* at = from + first_row * row_stride + unit * column_stride;
    uint32_t place = base + first_row * row_bytes + unit * column_bytes;
#pragma unroll 4
    for (int row = first_row; row < rows; row += at_once, at += at_once * row_stride, place += at_once * row_bytes)
      copy_unit<4 * kVector>(place, at);
  }
}

// Copies a plane whose rows follow each other, by one warp.
template <int kVector>
__device__ __forceinline__ void copy_flat(const float* from, int count, int to) {
  constexpr int kAtOnce = 8;
  const int lane = threadIdx.x % 32;
  const float* at = from + lane * kVector;
  uint32_t place = shared_address(to) + 4 * kVector * lane;
  int left = count - lane;
  const auto copy = [&](int n) { copy_unit<4 * kVector>(place + 128 * kVector * n, at + 32 * kVector * n); };
#pragma unroll 1
  for (; left > 32 * (kAtOnce - 1);
       left -= 32 * kAtOnce, at += 32 * kVector * kAtOnce, place += 128 * kVector * kAtOnce)
#pragma unroll
    for (int n = 0; n < kAtOnce; ++n) copy(n);
#pragma unroll
  for (int n = 0; n < kAtOnce - 1; ++n)
    if (left > 32 * n) copy(n);
}

// Copies a plane that lies column by column, by one warp: 8 rows of 4 columns at once, which meet few banks twice.
__device__ __forceinline__ void copy_turned(const float* from, int64_t column_stride, int rows, int columns, int to,
                                            int row_bytes) {
  const int lane = threadIdx.x % 32, first_column = lane / 8;
  const int64_t step = 4 * column_stride;
#pragma unroll 1
  for (int row = lane % 8; row < rows; row += 8) {
    const float* at = from + row + first_column * column_stride;
    uint32_t place = shared_address(to) + row * row_bytes + 4 * first_column;
#pragma unroll 7
    for (int column = first_column; column < columns; column += 4, at += step, place += 16) copy_unit<4>(place, at);
  }
}

// Copies an item's planes of a tensor, by a warp of some. `images`: in channels_last, those that there are.
template <class F>
__device__ __forceinline__ void copy_planes(const CUtensorMap* map, const float* from, const int64_t (&stride)[4],
                                            Copy how, int filter, int image, int images, int units, int rows,
                                            int columns, int to, int unit_bytes, int barrier, int copier, int copiers) {
  if constexpr (F::kChannelsLast) {
#if __CUDA_ARCH__ >= 900
    if (how.bulk) {
      if (is_elected()) {
        expect_bytes(barrier, F::kImages * box_rows<F>(rows) * F::kRowBytes);
        copy_box(to, *map, filter, 0, 0, image, barrier);
      }
      __syncwarp();
      return;
    }
#endif
    // Neighbouring lanes on neighbouring channels.
    const auto copy = [&](auto width) {
      constexpr int kVector = decltype(width)::value, kPixel = F::kUnits / kVector;  // copies of a pixel
      const int lane = threadIdx.x % 32, channel = lane % kPixel * kVector;
      if (channel >= units) return;
      const uint32_t base = shared_address(to) + 4 * channel;
      const int64_t step = copiers * stride[2];
      for (int n = 0; n < images; ++n)
        for (int column = lane / kPixel; column < columns; column += 32 / kPixel) {
          const float* at = from + channel + n * stride[0] + column * stride[3] + copier * stride[2];
          uint32_t place = base + n * unit_bytes + column * F::kColumnBytes + copier * F::kRowBytes;
#pragma unroll 4
          for (int row = copier; row < rows; row += copiers, at += step, place += copiers * F::kRowBytes)
            copy_unit<4 * kVector>(place, at);
        }
    };
    if (how.vector == 4)
      copy(std::integral_constant<int, 4>{});
    else
      copy(std::integral_constant<int, 1>{});
  } else {
    from += copier * stride[0], to += copier * unit_bytes;
    const int64_t step = copiers * stride[0];
#if __CUDA_ARCH__ >= 900
    if (how.bulk) {
      if (is_elected()) {
        const int bytes = 4 * rows * columns;
        uint32_t place = shared_address(to);
#pragma unroll 1
        for (int unit = copier; unit < units; unit += copiers, from += step, place += copiers * unit_bytes) {
          expect_bytes(barrier, bytes);
          copy_bulk(place, from, bytes, barrier);
        }
      }
      __syncwarp();
      return;
    }
#endif
#pragma unroll 1
    for (int unit = copier; unit < units; unit += copiers, from += step, to += copiers * unit_bytes) {
      if (how.as_one && how.vector == 4)
        copy_flat<4>(from, rows * columns / 4, to);
      else if (how.as_one)
        copy_flat<1>(from, rows * columns, to);
      else if (how.vector == 4)
        copy_rows<4>(from, stride[2], 4, rows, columns / 4, to, F::kRowBytes, 16);
      else if (how.vector == 2)
        copy_rows<2>(from, stride[2], 2, rows, columns / 2, to, F::kRowBytes, 8);
      else if (stride[3] == 1 || stride[2] != 1)
        copy_rows<1>(from, stride[2], stride[3], rows, columns, to, F::kRowBytes, 4);
      else
        copy_turned(from, stride[3], rows, columns, to, F::kRowBytes);
    }
  }
}

// Copies the weights of filters, by one warp, whose lanes lie on columns of neighbouring rows. What is the same for all
// filters is worked out once.
template <class F>
class WeightCopies {
 public:
  template <class A>
  __device__ explicit WeightCopies(const A& a) {
    const int lane = threadIdx.x % 32, at_once = max(32 / a.kernel_w, 1), row = lane / min(a.kernel_w, 32);
    column_ = lane - row * min(a.kernel_w, 32), count_ = row < at_once ? (a.kernel_h - row + at_once - 1) / at_once : 0;
    from_ = a.weight + row * a.weight_stride[2] + column_ * a.weight_stride[3];
    to_ = row * F::kWeightBytes + 4 * (F::kReach - a.padding_w + column_);
    step_ = at_once * a.weight_stride[2], bytes_ = at_once * F::kWeightBytes;
  }
  template <class A>
  __device__ void begin(const A& a, int filter, int to) const {
    constexpr int kAtOnce = 4;
    const float* from = from_ + filter * a.weight_stride[0];
    uint32_t place = shared_address(to) + to_;
#pragma unroll 1
    for (int column = column_; column < a.kernel_w; column += 32, from += 32 * a.weight_stride[3], place += 128) {
      const float* at = from;
      uint32_t to = place;
      const auto copy = [&] { copy_unit<4>(to, at), at += step_, to += bytes_; };
      int left = count_;
#pragma unroll 1
      for (; left >= kAtOnce; left -= kAtOnce)
#pragma unroll
        for (int n = 0; n < kAtOnce; ++n) copy();
#pragma unroll
      for (int n = 0; n < kAtOnce - 1; ++n)
        if (left > n) copy();
    }
  }

 private:
  const float* from_;
  int64_t step_;  // from row to row of a lane
  int column_, count_, to_, bytes_;
};

// Asks in L2 for what is at an address.
__device__ __forceinline__ void ask_for_line(const void* at) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(at));
}

// A number from a counter, for a warp. Not by an addition: ptxas first sums those of all lanes, of which one has any.
__device__ __forceinline__ int take_number(uint32_t counter, bool is_first) {
  uint32_t number = 0;
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %1, 0;\n@p atom.shared.inc.u32 %0, [%2], 0x7fffffff;\n}"
               : "+r"(number)
               : "r"(static_cast<int>(is_first)), "r"(counter)
               : "memory");
  return static_cast<int>(__shfl_sync(~0u, number, 0));
}

// What is filled and emptied by turns, and two barriers of each: full, and empty.
struct Ring {
  int barriers, count, at = 0, parity = 0;

  __device__ Ring(int barriers, int count) : barriers(barriers), count(count) {}
  __device__ int full() const { return barriers + 16 * at; }
  __device__ int empty() const { return barriers + 16 * at + 8; }
  __device__ void wait_full() const { wait(full(), parity); }
  __device__ void wait_empty() const { wait(empty(), parity ^ 1); }
  __device__ void advance() {
    if (++at == count) at = 0, parity ^= 1;
  }
};

template <class F>
Copy copy_of(const float* from, const int64_t (&stride)[4], int filters, int rows, int columns, bool has_bulk_copies) {
  uint64_t low = reinterpret_cast<uintptr_t>(from) / 4 | stride[0];
  if (F::kChannelsLast) return {(low | stride[2] | stride[3] | filters) % 4 == 0 ? 4 : 1};
  if (stride[3] != 1) return {1};
  const bool as_one = columns == F::kSide && stride[2] == columns;
  low |= stride[1] | (as_one ? rows * columns : stride[2] | columns);
  return {low % 4 == 0 ? 4 : low % 2 == 0 ? 2 : 1, as_one, as_one && low % 4 == 0 && has_bulk_copies};
}

template <class F>
bool describe_planes(CUtensorMap& map, const float* from, const int64_t (&stride)[4], int filters, int batch, int rows,
                     int columns) {
  return describe_boxes(map, const_cast<float*>(from), 4, {filters, columns, rows, batch},
                        {4 * stride[3], 4 * stride[2], 4 * stride[0]},
                        {F::kUnits, F::kSide | 1, box_rows<F>(rows), F::kImages});
}

}  // namespace dwconv
