#include "wider_rows.h"

#include <algorithm>

#include "copies.cuh"
#include "overlap.cuh"

namespace dwconv {
namespace {

constexpr int kThreads = 256, kUnitElements = kUnit / 2;

struct WiderRows {
  const uint16_t* from;
  uint16_t* to;
  int from_row, columns, elements;  // columns: of both rows; elements: of all target rows
  int before;                       // elements between a multiple of 16 bytes and the first one of the target
  Divider by_to_row;
};

// A thread has a unit of 16 bytes of the target, whose elements it loads one by one: neighbours find them in L1.
__global__ void __launch_bounds__(kThreads) wider_rows(const __grid_constant__ WiderRows a) {
  let_next_kernel_start();
  wait_for_kernel_before();
  const int first = static_cast<int>(blockIdx.x * kThreads + threadIdx.x) * kUnitElements - a.before;
  if (first >= a.elements) return;
  uint32_t row = max(first, 0);
  int column = static_cast<int>(a.by_to_row.split(row));
  const uint16_t* from = a.from + static_cast<int64_t>(row) * a.from_row;
  uint32_t values[kUnitElements];
#pragma unroll
  for (int k = 0; k < kUnitElements; ++k) {
    const bool inside = static_cast<uint32_t>(first + k) < static_cast<uint32_t>(a.elements);
    values[k] = inside && column < a.columns ? __ldg(from + column) : 0;
    if (first + k >= 0 && ++column == static_cast<int>(a.by_to_row.divisor)) column = 0, from += a.from_row;
  }
  uint16_t* to = a.to + first;
  if (first >= 0 && first + kUnitElements <= a.elements) {
    *reinterpret_cast<uint4*>(to) = {values[0] | values[1] << 16, values[2] | values[3] << 16,
                                     values[4] | values[5] << 16, values[6] | values[7] << 16};
    return;
  }
#pragma unroll
  for (int k = 0; k < kUnitElements; ++k)
    if (static_cast<uint32_t>(first + k) < static_cast<uint32_t>(a.elements)) to[k] = static_cast<uint16_t>(values[k]);
}

}  // namespace

bool can_have_wider_rows(const View& planes, int64_t batch, int64_t channels, int64_t height, int64_t width) {
  constexpr int64_t kMost = 1 << 30;
  return planes.stride[3] == 1 && (height == 1 || planes.stride[2] == width) &&
         (channels == 1 || planes.stride[1] == height * width) &&
         (batch == 1 || planes.stride[0] == channels * height * width) &&
         batch * channels * height * (width + kUnitElements) < kMost;
}

void launch_wider_rows(const void* from, int64_t from_row, void* to, int64_t to_row, int64_t rows,
                       cudaStream_t stream) {
  WiderRows a{};
  a.from = static_cast<const uint16_t*>(from), a.to = static_cast<uint16_t*>(to);
  a.from_row = static_cast<int>(from_row), a.columns = static_cast<int>(std::min(from_row, to_row));
  a.elements = static_cast<int>(rows * to_row), a.by_to_row = Divider(to_row);
  a.before = static_cast<int>(reinterpret_cast<uintptr_t>(to) % kUnit / 2);
  launch_early(wider_rows, a, ceil_div(a.before + int64_t{a.elements}, int64_t{kThreads} * kUnitElements), kThreads,
               stream);
  check_launch("wider_rows");
}

}  // namespace dwconv
