// What the kernels for large kernels in float32 share: the inner loop on CUDA cores, and copies to shared memory.
#pragma once

#include <cmath>
#include <initializer_list>
#include <utility>

#include "device.h"
#include "mapping.h"
#include "stream.cuh"

namespace dwconv {

constexpr int kLargeThreads = 256;  // at most
constexpr int kMostImages = 32;     // that are in shared memory at once

// Four numbers from shared memory. Volatile, so that they are read ahead of their use where the code says so.
__device__ __forceinline__ void load_four(float* to, uint32_t from) {
  asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(to[0]), "=f"(to[1]), "=f"(to[2]), "=f"(to[3])
               : "r"(from));
}

// A number that is not worked out again, as addresses of shared memory are wherever they are needed, slowly.
__device__ __forceinline__ uint32_t once(uint32_t value) {
  asm("" : "+r"(value));
  return value;
}

template <int kCount>
__device__ __forceinline__ void load_row(float (&to)[kCount], uint32_t from) {
#pragma unroll
  for (int at = 0; at < kCount; at += 4) load_four(to + at, from + 4 * at);
}

// The inner loop: kColumns sums of a thread, along a row.
//
//   sum[o] += window[o + t] * stream[t]   for all t from `first` below 4 up to 4 * steps
//
// Both are read four numbers at a time, a step ahead, from places that are a multiple of 16 bytes. What is read and not
// multiplied may be anything. The window stays in registers, where it turns instead of moving.
//
// Of its three operands, an FMA should find one in the slot where the FMA before had it, and the other two in different
// banks of the register file, or it takes two cycles. So all FMAs of a `t` follow each other, with the sums for even
// and for odd t apart: which of two banks a number of the window has to be in then is the same for every sum.
template <int kColumns>
__device__ __forceinline__ void correlate(float (&sum)[2][kColumns], uint32_t window, uint32_t stream, int first,
                                          int steps) {
  constexpr int kSize = (kColumns + 15) / 8 * 8, kPeriod = kSize / 4;
  float a[kSize], b[2][4];
  const auto load_next = [&](int step) {
    load_four(&a[(4 * step + kColumns) % kSize], window + 4 * (4 * step + kColumns));
    load_four(b[step % 2], stream + 16 * step);
  };
  const auto multiply = [&](int step, int t) {
#pragma unroll
    for (int n = 0; n < kColumns; ++n) {
      const int o = t % 2 == 0 ? n : kColumns - 1 - n;
      sum[t % 2][o] = fmaf(a[(4 * step + t + o) % kSize], b[step % 2][t], sum[t % 2][o]);
    }
  };
  const auto multiply_all = [&](int step) {
#pragma unroll
    for (int t = 0; t < 4; ++t) multiply(step, t);
  };

#pragma unroll
  for (int at = 0; at < kColumns; at += 4) load_four(&a[at], window + 4 * at);
  load_next(0);
  load_next(1);
  if (first < 1) multiply(0, 0);
  if (first < 2) multiply(0, 1);
  if (first < 3) multiply(0, 2);
  multiply(0, 3);
  for (int left = steps - 1;; left -= kPeriod) {
#pragma unroll
    for (int step = 1; step <= kPeriod; ++step) {
      if (left < step) return;
      load_next(step + 1);
      multiply_all(step);
    }
    window += 16 * kPeriod, stream += 16 * kPeriod;
  }
}

// The same for the first, or the last, kColumns numbers of a stream where the image begins, or ends: of what they meet
// all is zero that lies more than one column further left, or right, with every number. So half of the products are
// left out.
template <bool kFirst, int kColumns>
__device__ __forceinline__ void correlate_edge(float (&sum)[2][kColumns], uint32_t window, uint32_t stream) {
  constexpr int kSkipped = kFirst ? kColumns - 4 : 0;  // numbers of the window that nothing meets
  float a[kColumns + (kFirst ? 4 : 0)], b[kColumns];
  load_row(a, window + 4 * kSkipped);
  load_row(b, stream);
#pragma unroll
  for (int t = 0; t < kColumns; ++t)
#pragma unroll
    for (int n = 0; n < kColumns; ++n) {
      const int o = t % 2 == 0 ? n : kColumns - 1 - n;
      if (kFirst ? o + t >= kColumns - 1 : o + t < kColumns)
        sum[t % 2][o] = fmaf(a[o + t - kSkipped], b[t], sum[t % 2][o]);
    }
}

// Strips of 16 columns, and a narrower one for what is left: two of them, where one would have few columns.
__host__ __device__ inline int width_of_strip(int columns, int column) {
  const int rest = columns - column;
  if (column == 0 && rest > 16 && (rest - 1) % 16 < 8) return 12;
  return rest > 12 ? 16 : (rest + 3) / 4 * 4;
}
__host__ __device__ inline int begin_of_strip(int columns, int strip) {
  return strip > 0 ? width_of_strip(columns, 0) + 16 * (strip - 1) : 0;
}

// Calls visit() with the width of a strip as a type.
template <typename Visitor>
__device__ __forceinline__ void visit_strip(int width, Visitor&& visit) {
  switch (width) {
    case 4: return visit(std::integral_constant<int, 4>{});
    case 8: return visit(std::integral_constant<int, 8>{});
    case 12: return visit(std::integral_constant<int, 12>{});
    default: return visit(std::integral_constant<int, 16>{});
  }
}

constexpr int kEdge = 12;  // columns of a strip from which on correlate_edge() pays

// What of the kernel's columns the sums of a strip need: `first` and `steps` for correlate(), and where it begins.
struct Walk {
  int first, steps, source, weight;  // source and weight: bytes from the place of column 0 and of weight 0
  bool left, right;                  // whether correlate_edge() serves for the first numbers, and for the last

  __host__ __device__ Walk(int kernel_w, int padding_w, int width, int column, int columns) {
    const int aligned = -kernel_w & 3;  // steps end with the kernel
    int begin = padding_w - column - (columns - 1), end = width + padding_w - column;
    left = begin >= 0, right = end <= kernel_w;
    begin = begin > 0 ? begin : 0, end = end < kernel_w ? end : kernel_w;
    const int step = (begin + aligned) / 4, at = 4 * step - aligned;
    first = begin - at;
    steps = end > begin ? (end + aligned + 3) / 4 - step : 0;
    source = 4 * (column - padding_w + at), weight = 4 * at;
    left = left && columns >= kEdge && 4 * steps >= columns;
    right = right && columns >= kEdge && 4 * steps - (left ? columns : first) >= columns;
  }
};

// What a thread walks over: in step k, row `y + k` of the source is multiplied by row k of the kernel. Steps, and
// columns, are those of the warp.
struct Rows {
  int y, height;                   // rows outside of the source are zero
  int begin, end;                  // steps
  int source, zeros, weight;       // in shared memory: row `y`, a row of zeros, row 0 of the kernel
  int source_bytes, weight_bytes;  // from row to row
};

// Calls add(source, weight) with the places of every row, and flush() after every `run` rows and behind the last.
template <typename Add, typename Flush>
__device__ __forceinline__ void walk_rows(const Rows& r, int run, Add&& add, Flush&& flush) {
  const uint32_t base = shared_address(0), zeros = once(base + r.zeros);
  uint32_t source = once(base + r.source + r.begin * r.source_bytes);
  uint32_t weight = once(base + r.weight + r.begin * r.weight_bytes);
  uint32_t y = once(r.y + r.begin);
  for (int left = r.end - r.begin; left > 0; left -= run) {
    for (int row = min(run, left); row > 0; --row) {
      add(y < static_cast<uint32_t>(r.height) ? source : zeros, weight);
      ++y, source += r.source_bytes, weight += r.weight_bytes;
    }
    flush();
  }
}

template <int kColumns, typename Flush>
__device__ __forceinline__ void correlate_rows(float (&sum)[2][kColumns], const Rows& r, const Walk& walk, int run,
                                               Flush&& flush) {
  if (walk.steps == 0) return;
  const int steps = walk.steps - (walk.left + walk.right) * kColumns / 4, first = walk.left ? 0 : walk.first;
  walk_rows(
      r, run,
      [&](uint32_t source, uint32_t weight) {
        if (kColumns >= kEdge && walk.left) {
          correlate_edge<true>(sum, source, weight);
          source += 4 * kColumns, weight += 4 * kColumns;
        }
        if (steps > 0) correlate(sum, source, weight, first, steps);
        if (kColumns >= kEdge && walk.right) correlate_edge<false>(sum, source + 16 * steps, weight + 16 * steps);
      },
      flush);
}

// Calls visit() with `first` and the numbers behind it, as types, until it returns true. Straight code that is entered
// and left by a jump: what is visited may have all its numbers in registers.
template <int kCount, typename Visitor>
__device__ __forceinline__ void visit_from(int first, Visitor&& visit) {
  static_assert(kCount <= 28);
#define DWCONV_CASE(n)                                     \
  case n:                                                  \
    if constexpr (n < kCount)                              \
      if (visit(std::integral_constant<int, n>{})) return; \
    [[fallthrough]];
#define DWCONV_CASES(n) DWCONV_CASE(n) DWCONV_CASE(n + 1) DWCONV_CASE(n + 2) DWCONV_CASE(n + 3)
  switch (first) {
    // clang-format off
    DWCONV_CASES(0) DWCONV_CASES(4) DWCONV_CASES(8) DWCONV_CASES(12) DWCONV_CASES(16) DWCONV_CASES(20) DWCONV_CASES(24)
    default: return;
    // clang-format on
  }
#undef DWCONV_CASES
#undef DWCONV_CASE
}

// An output, tap by tap: only taps that meet the image.
template <typename A>
__device__ __forceinline__ float sum_taps(const A& a, int filter, int image, int row, int column) {
  float sum = 0;
#pragma unroll 1
  for (int i = 0; i < a.kernel_h; ++i) {
    const int y = row - a.padding_h + i;
    if (y < 0 || y >= a.height) continue;
#pragma unroll 1
    for (int j = 0; j < a.kernel_w; ++j) {
      const int x = column - a.padding_w + j;
      if (x >= 0 && x < a.width)
        sum = fmaf(a.weight[filter * a.weight_stride[0] + i * a.weight_stride[2] + j * a.weight_stride[3]],
                   a.source[image * a.source_stride[0] + filter / a.fan_out * a.source_stride[1] +
                            y * a.source_stride[2] + x * a.source_stride[3]],
                   sum);
    }
  }
  return sum;
}

// The same, called.
template <typename A>
__device__ __noinline__ float sum_by_taps(const A& a, int filter, int image, int row, int column) {
  return sum_taps(a, filter, image, row, column);
}

// The order in which chunks are computed: those in the middle, which meet the most rows, first.
__device__ inline int middle_first(int rank, int chunks) {
  return chunks / 2 + (rank % 2 == 1 ? -(rank + 1) / 2 : rank / 2);
}

// Copies that are under way until they are waited for, where the GPU has such.
template <int kBytes>
__device__ inline void begin_copy(uint32_t to, const void* from) {
#if __CUDA_ARCH__ >= 800
  if constexpr (kBytes == 16)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(to), "l"(from), "n"(kBytes) : "memory");
#else
  using Word = std::conditional_t<kBytes == 16, uint4, std::conditional_t<kBytes == 8, uint2, uint32_t> >;
  *static_cast<Word*>(__cvta_shared_to_generic(to)) = *static_cast<const Word*>(from);
#endif
}

// Rows of some channels of some images, and where they go in shared memory.
struct Box {
  int images, channels, rows, columns;
  int planes;  // a power of two, not below `channels`: neighbouring threads read neighbouring channels
  int to, image_bytes, plane_bytes, row_bytes, column_bytes = 4;
};

// Begins to copy them, kVector elements at once, by all threads of the block together. A thread keeps its columns, and
// goes on by as many rows as the threads have at once: then little has to be worked out for each copy.
template <int kVector>
__device__ void begin_copies(const float* from, const int64_t (&stride)[4], const Box& box) {
  const int shift = 31 - __clz(box.planes), units = box.columns / kVector << shift;
  if (units == 0 || box.rows == 0) return;
  const int rows = max(static_cast<int>(blockDim.x) / units, 1), first = threadIdx.x / units;
  if (first >= rows) return;
  const int step_image = rows / box.rows, step_row = rows - step_image * box.rows;
  const int64_t step = step_image * stride[0] + step_row * stride[2], back = stride[0] - box.rows * stride[2];
  const int to_step = step_image * box.image_bytes + step_row * box.row_bytes;
  const int to_back = box.image_bytes - box.rows * box.row_bytes;
#pragma unroll 1
  for (int unit = threadIdx.x - first * units; unit < units; unit += blockDim.x) {
    const int plane = unit & (box.planes - 1), column = (unit >> shift) * kVector;
    if (plane >= box.channels) continue;
    int image = first / box.rows, row = first - image * box.rows;
    const float* at = from + image * stride[0] + plane * stride[1] + row * stride[2] + column * stride[3];
    uint32_t to = shared_address(box.to) + image * box.image_bytes + plane * box.plane_bytes + row * box.row_bytes +
                  column * box.column_bytes;
#pragma unroll 1
    while (image < box.images) {
      begin_copy<4 * kVector>(to, at);
      image += step_image, row += step_row, at += step, to += to_step;
      if (row >= box.rows) row -= box.rows, ++image, at += back, to += to_back;
    }
  }
}

// The same with as many elements at once as lie side by side and meet the same alignment in both places. Where rows lie
// side by side, and columns do not, neighbouring threads read neighbouring rows.
__device__ inline void begin_copies(const float* from, const int64_t (&stride)[4], const Box& box) {
  const uint32_t low =
      static_cast<uint32_t>(reinterpret_cast<uintptr_t>(from) / 4 | stride[0] | stride[2] | box.columns | box.to / 4);
  const bool side_by_side = stride[3] == 1 && box.planes == 1;
  if (side_by_side && low % 4 == 0)
    begin_copies<4>(from, stride, box);
  else if (side_by_side && low % 2 == 0)
    begin_copies<2>(from, stride, box);
  else if (stride[2] == 1 && stride[3] != 1)
    begin_copies<1>(from, {stride[0], stride[1], stride[3], 1},
                    {box.images, box.channels, box.columns, box.rows, box.planes, box.to, box.image_bytes,
                     box.plane_bytes, box.column_bytes, box.row_bytes});
  else
    begin_copies<1>(from, stride, box);
}

// What a block of a cut does, and how many there are.
struct Work {
  double cycles, tasks;  // of all its warps together; what they divide among themselves
  double scattered;      // elements of one channel, if it reads channels_last
  int64_t bytes;         // of shared memory
  int warps, registers;  // registers: of a thread
  double blocks;
};

// Fitted, with what takes how many cycles, to timings of some hundred cuts on an H200: they choose cuts that lose 1 %
// to the best, though they say what a cut takes with an error of 12 %.
struct Costs {
  double load, byte, scattered, few_warps, idle_warps, other_blocks, last_wave;
};

// An estimate of the time that a cut takes, in cycles.
inline double estimate(const Work& work, const Costs& cost, const Device& device) {
  constexpr int kRegisters = 64 << 10;  // of a multiprocessor
  const int64_t fit = std::min<int64_t>(device.shared_per_multiprocessor / (work.bytes + 1152),
                                        kRegisters / (32 * work.warps * work.registers));
  const double resident = static_cast<double>(std::max<int64_t>(fit, 1)), warps = resident * work.warps / 4;
  const double idle = std::ceil(work.tasks / work.warps) * work.warps / work.tasks - 1;
  const double wave = work.cycles / 4 * resident * (1 + cost.few_warps / warps) *
                          (1 + idle * cost.idle_warps / resident) * (1 + cost.other_blocks * (resident - 1)) +
                      cost.load + resident * (work.bytes * cost.byte + work.scattered * cost.scattered);
  const double waves = work.blocks / (device.multiprocessors * resident);
  return (waves < 2 ? std::ceil(waves) : waves + cost.last_wave) * wave;
}

// The cycles that a warp takes along a row, block of columns by block of columns: for each product, and each block.
inline double row_cycles_of_blocks(int side, int width, int out_width, int kernel_w, int padding_w, double product,
                                   double block) {
  double cycles = 0;
  for (int column = 0; column < out_width; column += side)
    for (int at = 0; at < width; at += side) {
      const int first = std::max(column - at - padding_w, 1 - side);
      const int last = std::min(column - at - padding_w + kernel_w, side) - 1;
      for (int d = first; d <= last; ++d) cycles += product * (side - std::abs(d));
      if (first <= last) cycles += block;
    }
  return cycles;
}

// The least bytes, not below `bytes`, that are `units` times 16 more than a multiple of 128; of 16 where `units` is 0.
inline int64_t spread(int64_t bytes, int64_t units) {
  const int64_t least = round_up(bytes, 16);
  return units == 0 ? least : least + ((units - least / 16) & 7) * 16;
}

// Whether channels lie side by side and columns do not: then a block takes several channels.
inline bool is_channels_last(const int64_t (&stride)[4], int channels, int width) {
  return channels > 1 && width > 1 && stride[1] == 1 && stride[3] != 1;
}

// Whether a kernel is to go along its columns, as if rows were columns: where it has few columns, each of its rows
// takes little but what every row takes besides.
template <typename A>
bool goes_along_columns(const A& a) {
  return a.kernel_h > 2 * a.kernel_w && 2 * a.out_height > a.out_width;
}

// Rows become columns.
template <typename A>
void turn(A& a, std::initializer_list<int64_t*> strides) {
  std::swap(a.height, a.width), std::swap(a.out_height, a.out_width);
  std::swap(a.kernel_h, a.kernel_w), std::swap(a.padding_h, a.padding_w);
  for (int64_t* stride : strides) std::swap(stride[2], stride[3]);
}

// What kernels have of a pass, the output's or, as one with the kernel flipped, that of the input's gradient.
template <typename A>
void take_pass(A& a, const Problem& p, const Mapping& m) {
  a.source = static_cast<const float*>(m.source.data), a.target = static_cast<float*>(m.target.data);
  a.weight = static_cast<const float*>(m.weight.data), a.bias = static_cast<const float*>(m.bias);
  for (int d = 0; d < 4; ++d) {
    a.source_stride[d] = m.source.stride[d], a.target_stride[d] = m.target.stride[d];
    a.weight_stride[d] = m.weight.stride[d];
  }
  a.bias_stride = m.bias_stride, a.fan_out = m.fan_out, a.filters = m.targets;
  a.batch = static_cast<int>(p.batch), a.height = m.height, a.width = m.width;
  a.out_height = m.out_height, a.out_width = m.out_width;
  a.kernel_h = static_cast<int>(p.kernel_h), a.kernel_w = static_cast<int>(p.kernel_w);
  a.padding_h = m.padding_h, a.padding_w = m.padding_w;
}

// What kernels have of the pass of the weight's gradient, turned where that is better; returns whether it is in
// channels_last.
template <typename A>
bool take_gradients(A& a, const Problem& p) {
  a.input = static_cast<const float*>(p.input.data), a.grad = static_cast<const float*>(p.output.data);
  for (int d = 0; d < 4; ++d) a.input_stride[d] = p.input.stride[d], a.grad_stride[d] = p.output.stride[d];
  a.filters = static_cast<int>(p.filters()), a.multiplier = static_cast<int>(p.multiplier);
  a.batch = static_cast<int>(p.batch), a.height = static_cast<int>(p.height), a.width = static_cast<int>(p.width);
  a.out_height = static_cast<int>(p.out_height), a.out_width = static_cast<int>(p.out_width);
  a.kernel_h = static_cast<int>(p.kernel_h), a.kernel_w = static_cast<int>(p.kernel_w);
  a.padding_h = static_cast<int>(p.padding_h), a.padding_w = static_cast<int>(p.padding_w);
  const bool channels_last = a.multiplier == 1 && is_channels_last(a.input_stride, a.filters, a.width) &&
                             is_channels_last(a.grad_stride, a.filters, a.out_width);
  a.turned = goes_along_columns(a);
  if (a.turned) turn(a, {a.input_stride, a.grad_stride});
  return channels_last;
}

__device__ inline void finish_copies() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_all;" ::: "memory");
#endif
}

}  // namespace dwconv
