// Forward, and grad_input at stride 1, of large kernels in float32 on planes about as wide as code is compiled for, on
// CUDA cores.
//
// The lanes of a warp lie on images and on rows. A lane has the sums of rows of outputs in registers, of some images or
// neighbouring rows, and walks down the kernel: of each of its rows, and the rows of the source that it meets, all
// products are straight code. Which pixels meet which outputs along a row is known when the code is compiled: nothing
// is multiplied but what meets, but for columns that narrower planes lack.
//
// The code of 51 taps and 56 columns, 2206 FMA, does not fit the instruction caches. There a lane has half of a row:
// the same code for the pixels above its outputs, for either half, and code of its own for those beside, 1428 FMA in
// all.
//
// Another warp, or some, copy the planes of the next images to shared memory meanwhile: a ring of stages. They get few
// turns beside warps that always have something to multiply, so planes come by one instruction where they can, as a
// box. The warps of each scheduler take their rows from a counter of their own, and go on to the next stage while
// others are still at the last one.
//
// A weight is the same for all lanes of a warp, and ptxas keeps it in a uniform register. Then an FMA finds the pixel
// where the one before had it, and reads one number from the register file, the sum. But it does so only where it is
// sure that the lanes are together: a warp's place follows from a __shfl_sync(), bounds of loops come from shared
// memory and not from min() and max(), stores are predicated, and there are no calls. Sums and pixels are then to be in
// different banks of the register file, and pixels to be read ahead: so see what SASS says after each change.
//
// Planes that begin between multiples of 16 bytes come by boxes from the multiple before, and what lies before a row in
// the units of 16 bytes that are read is dropped.
//
// Columns that planes, and kernels, lack are zero, and give NaN where they meet Inf or NaN. So outputs that are not
// finite are computed again, when a block has done all others.
#include "lanes.h"

#include <algorithm>
#include <bit>
#include <climits>
#include <iterator>

#include "boxes.cuh"
#include "device.h"
#include "lanes.cuh"
#include "lanes_forms.h"
#include "large_float32.cuh"
#include "launch.h"
#include "mapping.h"
#include "overlap.cuh"

namespace dwconv {
namespace {

constexpr int kMostStages = 4;
constexpr int kSchedulers = 4;  // of a multiprocessor: warps take turns at them

// How the lanes of a form lie on planes, and these in shared memory.
// kMisfit_: elements from the multiple of 16 bytes before to the first one of planes.
template <int kNumber, int kMisfit_ = 0>
struct Form {
  static constexpr RowsForm kForm = kRowsForms[kNumber];
  static constexpr int kSide = kForm.side, kReach = kForm.reach;
  static constexpr bool kChannelsLast = false;
  static constexpr int kHeldImages = kForm.images, kHeldRows = kForm.rows,
                       kHeld = kHeldImages * kHeldRows;  // of a lane
  static constexpr int kParts = kForm.parts, kColumns = kSide / kParts;
  static constexpr int kTaps = 2 * kReach + 1;
  static constexpr int kRowBytes = 4 * kSide;
  static constexpr int kPiece = !kForm.staged ? 0 : kSide == 56 ? 8 : 28;  // outputs of a lane that go out at once
  static constexpr int kWeightBytes = (kTaps + 3) / 4 * 16;                // from row to row
  // Where planes come by boxes, of as many as an item has, and outputs go out by boxes as well. Rows of 14 columns are
  // no multiple of 16 bytes: whole planes are, and their boxes have no rows.
  static constexpr bool kBoxes = kSide < 56, kFlat = kSide == 14;
  // Warps of a scheduler that compute, and the threads of a block by which ptxas has registers: with 96 it keeps
  // weights in uniform registers, and yet reads pixels ahead of their use, if it knows that a multiprocessor has one
  // block. With half of a row a lane needs 72, but for the most taps.
  static constexpr bool kFewRegisters = kParts > 1 && kTaps < 63;
  static constexpr int kMostWarps = kFewRegisters ? 6 : kTaps == 31 || kTaps == 13 ? 3 : 4;
  static constexpr int kBoundThreads = kFewRegisters ? 800 : 640;
  // Where planes do not come by bulk copies, others copy: one beside those of each scheduler at least, or two, as where
  // taps are few.
  static constexpr int kMostWarpsBesideCopiers =
      std::min(kMostWarps, kTaps == 9 ? 3 : kBoundThreads / 32 / kSchedulers - 1);
  static constexpr int copiers(int warps) {
    return std::min(kBoundThreads / 32 - kSchedulers * warps, 2 * kSchedulers);
  }
  // Lanes side by side, on images, are two to the power of `lane_bits`: mostly known when the code is compiled.
  static constexpr int kLaneBits =
      kForm.least_lanes < kForm.lanes ? -1 : std::countr_zero(static_cast<unsigned>(kForm.lanes));
  template <class A>
  static __device__ int lane_bits(const A& a) {
    return kLaneBits < 0 ? a.lane_bits : kLaneBits;
  }
  template <class A>
  static __device__ int lanes(const A& a) {
    return 1 << lane_bits(a);
  }
  // Whether the last tasks are halves, of one image of each lane. With more taps the test for it costs more, in banks
  // of the register file, than schedulers gain that have the same to do.
  static constexpr bool kHalves = kHeldImages == 2 && kTaps == 9;
  // Whether neighbouring lanes lie on neighbouring rows: 8 lanes, which read at once, on four rows of two images. Then
  // images are to be an odd number of 64 bytes apart, as those of 28 x 28 pixels are that follow each other; where
  // lanes lie on images first, an odd number of 16 bytes.
  static constexpr bool kRowsFirst = kSide == 28 && kLaneBits == 3;
  static constexpr int kMisfit = kMisfit_;
  static constexpr int kLineBytes = kRowBytes + (kMisfit > 0 ? 16 : 0);  // that are read of a row
};

struct Arguments {
  CUtensorMap map, target_map;  // of boxes: the planes of an item, and what a warp has of an image of each lane
  const float* source;
  const float* weight;
  const float* bias;
  float* target;
  int64_t source_stride[4], target_stride[4], weight_stride[4], bias_stride;  // in elements
  int batch, height, width, out_height, out_width, kernel_h, kernel_w, padding_h, padding_w, fan_out;
  int filters;
  bool quads;        // whether 4 outputs are written at once
  int lanes, units;  // lanes side by side, on images, and images of a warp
  int lane_bits;
  int items;                   // groups of images of each filter, all together
  int share;                   // items of a block
  int rows, tasks;             // rows of a warp, and what warps take from counters, of an item
  int box_bytes;               // 0 where there are none
  bool stores_boxes;           // whether outputs go out by boxes
  int image_bytes, row_bytes;  // from image to image of the target, and from row to row
  int copiers;                 // warps that copy
  Divider by_groups, by_tasks, by_stages;
  Copy copy;
  Divider by_kernels;
  int stages, stage_bytes, unit_bytes;
  int kernels, weights_at, kernel_bytes;  // kernels: behind the stages, one more than these
  int output_bytes;                       // of a warp, on their way out
  int zeros_at, barriers_at, steps_at, outputs_at, bytes, zeros_from;  // in shared memory
  int box_first;  // where boxes begin in what is described of them, but those of the last channel: at 0
};

// Some images of a filter.
template <class F>
struct Item {
  int filter, image, units;

  __device__ Item(const Arguments& a, uint32_t item) {
    image = a.by_groups.split(item) * a.units, filter = item;  // what is left of it
    units = min(a.units, a.batch - image);
  }
  // Leaves the first images of the lanes, or the second ones, if there are any.
  __device__ void halve(int lanes, bool second) {
    if (second) image += lanes;
    units = second ? units - lanes : min(units, lanes);
  }
};

// Where an item's planes begin in a row of what is described of them.
template <class F>
__device__ __forceinline__ int first_of_box(const Arguments& a, const Item<F>& item) {
  return F::kMisfit == 0 ? 0 : item.filter + a.fan_out < a.filters ? a.box_first : 0;
}

// Asks in L2 for the planes and the weights of a block's first item, which is no harm while the kernel before still
// writes. Each warp for planes, one at a time, and each thread for a row of weights.
template <class F>
__device__ __forceinline__ void ask_for(const Arguments& a, const Item<F>& item) {
#if __CUDA_ARCH__ >= 900
  const int own = threadIdx.x, planes = a.copy.bulk ? item.units : 0;
  const float* from =
      a.source - F::kMisfit + item.image * a.source_stride[0] + item.filter / a.fan_out * a.source_stride[1];
#pragma unroll 1
  for (int n = own / 32; n < planes; n += blockDim.x / 32)
    asm volatile(
        "{\n.reg .pred p;\nsetp.eq.s32 p, %0, 0;\n@p cp.async.bulk.prefetch.L2.global [%1], %2;\n}" ::"r"(own % 32),
        "l"(from + n * a.source_stride[0]), "r"(4 * a.height * a.width)
        : "memory");
  const float* weights = a.weight + item.filter * a.weight_stride[0] + own * a.weight_stride[2];
  asm volatile("{\n.reg .pred p;\nsetp.lt.s32 p, %0, %1;\n@p prefetch.global.L2 [%2];\n}" ::"r"(own), "r"(a.kernel_h),
               "l"(weights)
               : "memory");
#endif
}

__device__ __forceinline__ void store_four(uint32_t to, const float (&from)[4]) {
  asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(to), "f"(from[0]), "f"(from[1]), "f"(from[2]),
               "f"(from[3])
               : "memory");
}

// Loads pixels that follow each other, by plain loads: volatile ones ptxas puts right before their use.
template <class F, int kCount>
__device__ __forceinline__ void load_pixels(float (&x)[kCount], int source) {
  // Several at once, some of which are no pixels where the first one lies kMisfit elements behind `source`.
  using Few = std::conditional_t<F::kFlat, float2, float4>;
  constexpr int kStep = sizeof(Few) / 4, kBefore = F::kMisfit % kStep, kAll = kCount + (kBefore > 0 ? kStep : 0);
  alignas(16) float all[kAll];
#pragma unroll
  for (int u = 0; u < kAll; u += kStep)
    reinterpret_cast<Few&>(all[u]) = shared<Few>(source + 4 * (F::kMisfit - kBefore + u));
#pragma unroll
  for (int u = 0; u < kCount; ++u) x[u] = all[kBefore + u];
}

// All products of a row of weights and of as many pixels as there are outputs, of which they begin `first` columns to
// the right.
template <class F>
__device__ __forceinline__ void add_pixels(float (&sum)[F::kColumns], const float (&x)[F::kColumns],
                                           const float (&w)[F::kWeightBytes / 4], int first) {
#pragma unroll
  for (int u = 0; u < F::kColumns; ++u)
#pragma unroll
    for (int n = 0; n < F::kColumns; ++n) {
      const int o = u % 2 == 0 ? n : F::kColumns - 1 - n, tap = first + u - o + F::kReach;
      if (tap >= 0 && tap < F::kTaps) sum[o] = fmaf(x[u], w[tap], sum[o]);
    }
}

// The same of a row of pixels.
template <class F>
__device__ __forceinline__ void add_row(float (&sum)[F::kColumns], int source, const float (&w)[F::kWeightBytes / 4],
                                        int part) {
  constexpr int kColumns = F::kColumns;
  alignas(16) float x[kColumns];
  load_pixels<F>(x, source);
  if constexpr (F::kParts == 1) {
    add_pixels<F>(sum, x, w, 0);
  } else {
    alignas(16) float beside[kColumns];
    load_pixels<F>(beside, source + (part > 0 ? -4 : 4) * kColumns);
    add_pixels<F>(sum, x, w, 0);
    if (part > 0)
      add_pixels<F>(sum, beside, w, -kColumns);
    else
      add_pixels<F>(sum, beside, w, kColumns);
  }
}

// Stores numbers if `most` is more than `least`, without a branch: behind one by which a warp's lanes part, and code
// between, ptxas does not find that they are together again. kOffset: bytes behind `to`.
template <int kCount, int kOffset = 0>
__device__ __forceinline__ void store_if_above(int most, int least, float* to, const float* from) {
  if constexpr (kCount == 4)
    asm volatile(
        "{\n.reg .pred p;\nsetp.gt.s32 p, %0, %1;\n@p st.global.v4.f32 [%2+%7], {%3, %4, %5, %6};\n}" ::"r"(most),
        "r"(least), "l"(to), "f"(from[0]), "f"(from[1]), "f"(from[2]), "f"(from[3]), "n"(kOffset)
        : "memory");
  else
    asm volatile("{\n.reg .pred p;\nsetp.gt.s32 p, %0, %1;\n@p st.global.f32 [%2+%4], %3;\n}" ::"r"(most), "r"(least),
                 "l"(to), "f"(from[0]), "n"(kOffset)
                 : "memory");
}

// By one thread of a warp, without a branch as well: stores a box, waits until all are read that it has stored, and
// until all are there.
__device__ __forceinline__ void store_box_by_one(const CUtensorMap& map, uint32_t from, int first, int second,
                                                 int third, int fourth) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "{\n.reg .pred one;\nelect.sync _|one, 0xffffffff;\n"
      "@one cp.async.bulk.tensor.4d.global.shared::cta.tile.bulk_group [%0, {%2, %3, %4, %5}], [%1];\n"
      "@one cp.async.bulk.commit_group;\n}" ::"l"(&map),
      "r"(from), "r"(first), "r"(second), "r"(third), "r"(fourth)
      : "memory");
#endif
  __syncwarp();
}
__device__ __forceinline__ void wait_until_boxes_are_read() {
#if __CUDA_ARCH__ >= 900
  asm volatile("{\n.reg .pred one;\nelect.sync _|one, 0xffffffff;\n@one cp.async.bulk.wait_group.read 0;\n}" ::
                   : "memory");
#endif
  __syncwarp();
}
__device__ __forceinline__ void wait_until_boxes_are_there() {
#if __CUDA_ARCH__ >= 900
  asm volatile("{\n.reg .pred one;\nelect.sync _|one, 0xffffffff;\n@one cp.async.bulk.wait_group 0;\n}" ::: "memory");
#endif
  __syncwarp();
}

// What a warp takes at once: some rows of an item. `stage`: where outputs lie on their way out. Returns whether all
// outputs are finite.
template <class F>
__device__ __forceinline__ bool compute(const Arguments& a, const Item<F>& item, int planes, uint32_t weight,
                                        uint32_t stage, int chunk, int part) {
  constexpr int kSide = F::kSide, kColumns = F::kColumns, kHeld = F::kHeld;
  constexpr bool kOneRow = F::kForm.lanes == 32;  // all lanes have the same one
  const int lanes = F::lanes(a), lane_bits = F::lane_bits(a);
  const int rows = (32 >> lane_bits) * F::kHeldRows;  // of the warp
  const int lane = threadIdx.x % 32, first_row = chunk * rows;
  // Of a lane: the first of its images, and of its rows, within what the warp has.
  const auto unit_of = [&](int lane) { return F::kRowsFirst ? lane >> (5 - lane_bits) : lane & (lanes - 1); };
  const auto row_of = [&](int lane) {
    return kOneRow ? 0 : F::kRowsFirst ? lane % (32 >> lane_bits) : (lane >> lane_bits) * F::kHeldRows;
  };
  const int own = unit_of(lane), own_row = first_row + row_of(lane);
  const int2 steps = shared<int2>(a.steps_at + 8 * chunk);
  const int first_column = part * kColumns, zeros = a.zeros_at + 4 * first_column;
  uint32_t y = own_row - a.padding_h + steps.x;
  int source[F::kHeldImages];
#pragma unroll
  for (int n = 0; n < F::kHeldImages; ++n)
    source[n] = planes + min(own + n * lanes, item.units - 1) * a.unit_bytes + static_cast<int>(y) * F::kRowBytes +
                4 * first_column;
  weight += steps.x * F::kWeightBytes;
  float sum[kHeld][kColumns] = {};
  // Where all lanes have the same rows: of each image a row of pixels. What is a lane's lower row in a step is its
  // upper one in the next: the last image's stays where it is, for others there are no registers.
  constexpr int kReloaded = F::kHeldImages - 1;
  alignas(8) float x[kOneRow ? F::kHeldImages : 1][kSide];
  const auto inside = [&](int row) { return y + row < static_cast<uint32_t>(a.height); };
  const auto load_image = [&](int n, int row) { load_pixels<F>(x[n], source[n] + row * F::kRowBytes); };
  if constexpr (kOneRow)
    if (inside(0)) load_image(kReloaded, 0);
#pragma unroll 1
  for (int left = steps.y; left > 0; --left) {
    float w[F::kWeightBytes / 4];
    load_row(w, weight);
#pragma unroll
    for (int row = 0; row < F::kHeldRows; ++row) {
      if constexpr (kOneRow) {
        // Pixels of all images first: registers are short then, and more weights in uniform registers.
        if (inside(row)) {
#pragma unroll
          for (int n = 0; n < (row == 0 ? kReloaded : F::kHeldImages); ++n) load_image(n, row);
#pragma unroll
          for (int n = 0; n < F::kHeldImages; ++n) add_pixels<F>(sum[row * F::kHeldImages + n], x[n], w, 0);
        }
      } else {
        const bool is_inside = inside(row);
#pragma unroll
        for (int n = 0; n < F::kHeldImages; ++n)
          if (!F::kHalves || n == 0 || item.units > lanes) add_row<F>(sum[n], is_inside ? source[n] : zeros, w, part);
      }
    }
#pragma unroll
    for (int n = 0; n < F::kHeldImages; ++n) source[n] += F::kRowBytes;
    ++y, weight += F::kWeightBytes;
  }

  // Added in any case, -0 where there is none: ptxas can then choose registers of other banks for sums than for what is
  // written four at a time.
  const float bias = a.bias ? a.bias[item.filter * a.bias_stride] : -0.f;
  const int rows_left = a.out_height - first_row;
  float* const target =
      a.target + item.image * a.target_stride[0] + item.filter * a.target_stride[1] + first_row * a.target_stride[2];
  const auto at = [&](int offset) {
    return reinterpret_cast<float*>(reinterpret_cast<char*>(target) + static_cast<uint32_t>(offset));
  };
  const auto sum_of = [&](int n, int o) { return sum[o / kSide * F::kHeldImages + n][o % kSide]; };
  // Any number times Inf or NaN is not finite; what is too large is just found to be so in vain.
  float products = 0;
  bool finite = true;
  if (F::kBoxes && F::kForm.staged && a.stores_boxes) {
    // Through shared memory, an image of each lane at a time. Boxes leave out what is outside.
    const uint32_t own_stage = stage + (own * rows + row_of(lane)) * F::kRowBytes;
#pragma unroll
    for (int n = 0; n < F::kHeldImages; ++n) {
      const int image = item.image + n * lanes;
      if (F::kHalves && n > 0 && item.units <= n * lanes) break;
      wait_until_boxes_are_read();
#pragma unroll
      for (int o = 0; o < F::kPiece; o += 4) {
        float four[4];
#pragma unroll
        for (int k = 0; k < 4; ++k) four[k] = sum_of(n, o + k) + bias;
        products = fmaf(four[0], four[1], fmaf(four[2], four[3], products));
        store_four(own_stage + 4 * o, four);
      }
      before_bulk_copies();
      __syncwarp();
      store_box_by_one(a.target_map, stage, first_row * kSide, item.filter, image, 0);
    }
    finite = products * 0 == 0.f;
  } else if constexpr (F::kForm.staged) {
    // Through shared memory, piece by piece, so that lanes side by side write what lies side by side: images one after
    // the other, and of each its rows.
    constexpr int kPiece = F::kPiece, kQuads = kPiece / 4, kRowsAtOnce = 32 / kQuads, kRounds = 32 / kRowsAtOnce;
    const int row_bits = 5 - lane_bits, at_once = kRowsAtOnce >> row_bits;  // images
    const int pitch = 16 * (kQuads << row_bits | (F::kRowsFirst ? 0 : 1));
    const auto place_of = [&](int lane) {
      return stage + unit_of(lane) * pitch + row_of(lane) / F::kHeldRows * (16 * kQuads);
    };
    // What a lane writes at first.
    const int its_row = lane / kQuads, quad = lane % kQuads, unit = its_row >> row_bits;
    const int row = (its_row - (unit << row_bits)) * F::kHeldRows;
    const int units = unit < at_once && row < rows_left ? item.units - unit : 0;
    const uint32_t from = stage + unit * (pitch - (16 * kQuads << row_bits)) + 16 * lane;
    int offset[kRounds];
#pragma unroll
    for (int q = 0; q < kRounds; ++q) offset[q] = (unit + q * at_once) * a.image_bytes + row * a.row_bytes + 16 * quad;
#pragma unroll
    for (int n = 0; n < F::kHeldImages; ++n) {
#pragma unroll
      for (int piece = 0; piece < F::kHeldRows * kSide; piece += kPiece) {
        __syncwarp();
#pragma unroll
        for (int q = 0; q < kQuads; ++q) {
          float four[4];
#pragma unroll
          for (int k = 0; k < 4; ++k) four[k] = sum_of(n, piece + 4 * q + k) + bias;
          products = fmaf(four[0], four[1], fmaf(four[2], four[3], products));
          store_four(place_of(lane) + 16 * q, four);
        }
        __syncwarp();
        if (a.quads) {
          const int most = F::kHeldRows > 1 || piece + 4 * quad < a.out_width ? units - n * lanes : 0;
#pragma unroll
          for (int q = 0; q < kRounds; ++q) {
            float four[4];
            load_four(four, from + q * at_once * pitch);
            store_if_above<4>(most, q * at_once, at(offset[q] + n * lanes * a.image_bytes) + piece, four);
          }
        } else {
#pragma unroll 1
          for (int q = 0; q < kPiece; ++q) {
            const int number = lane + 32 * q, other = number / kPiece;
            const int part = piece + number % kPiece, below = part / kSide, column = part - below * kSide;
            const int unit = unit_of(other) + n * lanes, row = row_of(other) + below;
            float one;
            asm volatile("ld.shared.f32 %0, [%1];" : "=f"(one) : "r"(place_of(other) + 4 * (number % kPiece)));
            store_if_above<1>(unit < item.units && row < rows_left ? a.out_width : 0, column,
                              at(unit * a.image_bytes + row * a.row_bytes) + column * a.target_stride[3], &one);
          }
        }
      }
      finite = finite && (products * 0 == 0.f || own + n * lanes >= item.units);
    }
  } else {
#pragma unroll
    for (int held = 0; held < kHeld; ++held) {
      const int n = held % F::kHeldImages, row = row_of(lane) + held / F::kHeldImages;
      const int columns = own + n * lanes < item.units && row < rows_left ? a.out_width - first_column : 0;
      if (F::kTaps <= 29 || a.bias)  // more taps have no registers to choose from
#pragma unroll
        for (int o = 0; o < kColumns; ++o) sum[held][o] += bias;
#pragma unroll
      for (int o = 0; o < kColumns; o += 2) products = fmaf(sum[held][o], sum[held][o + 1], products);
      finite = finite && (columns <= 0 || products * 0 == 0.f);
      float* const to = at((own + n * lanes) * a.image_bytes + row * a.row_bytes) + first_column * a.target_stride[3];
      const auto store = [&]<int... kO>(std::integer_sequence<int, kO...>) {
        if (a.quads)
          ((kO % 4 == 0 ? store_if_above<4, 4 * kO>(columns, kO, to, &sum[held][kO]) : void()), ...);
        else
          (store_if_above<1>(columns, kO, to + kO * a.target_stride[3], &sum[held][kO]), ...);
      };
      store(std::make_integer_sequence<int, kColumns>{});
    }
  }
  return finite;
}

// Computes again, tap by tap, what is not finite of some items. No loop is unrolled, and nothing called: see above.
template <class F>
__device__ __forceinline__ void compute_again(const Arguments& a, int first, int end, int threads) {
  const int pixels = a.out_height * a.out_width;
#pragma unroll 1
  for (int at = first; at < end; ++at) {
    const Item<F> item(a, at);
    const float bias = a.bias ? a.bias[item.filter * a.bias_stride] : 0;
#pragma unroll 1
    for (int n = threadIdx.x; n < item.units * pixels; n += threads) {
      const int unit = n / pixels, row = (n - unit * pixels) / a.out_width, column = n % a.out_width;
      float& output = a.target[(item.image + unit) * a.target_stride[0] + item.filter * a.target_stride[1] +
                               row * a.target_stride[2] + column * a.target_stride[3]];
      if (!is_finite(output)) output = sum_taps(a, item.filter, item.image + unit, row, column) + bias;
    }
  }
}

template <class F>
__global__ void __launch_bounds__(F::kBoundThreads, 1) lanes(const __grid_constant__ Arguments a) {
  __shared__ int next_task[kSchedulers];
  __shared__ int all_finite;
  const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0), lane = threadIdx.x % 32;
  const int warps = blockDim.x / 32 - a.copiers;  // that compute
  const int first = blockIdx.x * a.share, end = min(first + a.share, a.items);
  ask_for<F>(a, Item<F>(a, first));
  if (threadIdx.x == 0 && a.box_bytes > 0) prefetch(a.map);
  for (int at = a.zeros_from + 16 * threadIdx.x; at < a.barriers_at; at += 16 * blockDim.x) shared<float4>(at) = {};
  Ring stages(a.barriers_at, a.stages);
  // The first row of the kernel in which any of a warp's lanes meets the image, and how many there are.
  for (int chunk = threadIdx.x; chunk < a.tasks / F::kParts; chunk += blockDim.x) {
    const int first_row = chunk * a.rows, begin = max(a.padding_h - (first_row + a.rows - 1), 0);
    const int last = min(a.height + a.padding_h - first_row, a.kernel_h);
    shared<int2>(a.steps_at + 8 * chunk) = {begin, last - begin};
  }
  if (threadIdx.x == 0) {
    for (int& next : next_task) next = 0;
    all_finite = 1;
    for (int stage = 0; stage < a.stages; ++stage) {
      init_barrier(stages.barriers + 16 * stage, 32 * a.copiers);
      init_barrier(stages.barriers + 16 * stage + 8, a.tasks * kWarpArrivals);
    }
  }
  before_bulk_copies();
  __syncthreads();
  let_next_kernel_start();

  if (warp >= warps) {
    // Beside warps that always have something to multiply each instruction takes long. So weights are copied ahead of
    // planes, to where those of as many items before were as there are stages, and one more: what has to be done when
    // a stage is empty is little.
    const WeightCopies<F> weights(a);
    int kernel = a.weights_at;
    settle_and_wait_for_kernel_before(a.items);
    Item<F> item(a, first);
#pragma unroll 1
    for (int at = first; at < end; ++at) {
      const Item<F> next(a, at + 1);
      const int to = stages.at * a.stage_bytes, channel = item.filter / a.fan_out;
      stages.wait_empty();
      if (a.box_bytes > 0) {
        if (is_elected()) {
          expect_bytes(stages.full(), a.box_bytes);
          if constexpr (F::kFlat)
            copy_box(to, a.map, 0, channel, item.image, 0, stages.full());
          else
            copy_box(to, a.map, first_of_box<F>(a, item), 0, channel, item.image, stages.full());
        }
        __syncwarp();
      } else {
        copy_planes<F>(nullptr, a.source + item.image * a.source_stride[0] + channel * a.source_stride[1],
                       a.source_stride, a.copy, item.filter, item.image, 1, item.units, a.height, a.width, to,
                       a.unit_bytes, stages.full(), warp - warps, a.copiers);
      }
#pragma unroll 1
      for (int turn = 0; turn < 2; ++turn) {
        if (warp == warps && (turn == 0 ? at == first : at + 1 < end)) {
          weights.begin(a, turn == 0 ? item.filter : next.filter, kernel);
          kernel = kernel + a.kernel_bytes == a.zeros_at ? a.weights_at : kernel + a.kernel_bytes;
        }
        if (turn > 0) break;
        // An arrival that waits for copies may come before the bytes that are expected. These weights were mostly begun
        // long ago.
        if (a.box_bytes > 0 || a.copy.bulk)
          finish_copies(), arrive(stages.full());
        else
          arrive_after_copies(stages.full());
      }
      stages.wait_full();  // what comes before comes first
      stages.advance();
      item = next;
    }
    return;
  }
  wait_for_kernel_before();

  // Each scheduler has its own tasks, the same of all items together: all are done at the same time.
  const int queue = warp % kSchedulers;
  const uint32_t outputs = once(shared_address(a.outputs_at + warp * a.output_bytes));  // on their way out
  bool finite = true;
  // Those that are left when all have had as many are cut in halves: they are of the last item.
  const int whole = F::kHalves ? (end - first) * a.tasks / kSchedulers * kSchedulers : INT_MAX;
  for (;;) {
    uint32_t number = take_number(shared_address(&next_task[queue]), lane == 0) * kSchedulers + queue;
    const int half = static_cast<int>(number) - whole;
    const bool is_half = F::kHalves && half >= 0, is_second = is_half && half % 2 == 1;
    if (is_half) number = whole + half / 2;
    const int rank = a.by_tasks.split(number);  // leaves the item
    if (first + static_cast<int>(number) >= end) break;
    Item<F> item(a, first + number);
    if (is_half) item.halve(F::lanes(a), is_second);
    if (item.units <= 0) continue;  // a second half of no images
    uint32_t round = number;
    const int weight = a.weights_at + a.by_kernels.split(round) * a.kernel_bytes;
    const int stage = a.by_stages.split(number), parity = number & 1, barrier = a.barriers_at + 16 * stage;
    wait(barrier, parity);
    int planes = stage * a.stage_bytes + (is_second ? F::lanes(a) * a.unit_bytes : 0);
    if (F::kMisfit > 0 && !F::kFlat) planes += 4 * (a.box_first - first_of_box<F>(a, item));
    finite &= compute<F>(a, item, planes, shared_address(weight), outputs,
                         middle_first(rank / F::kParts, a.tasks / F::kParts), rank % F::kParts);
    arrive_together(barrier + 8, lane == 0);
  }
  if constexpr (F::kBoxes && F::kForm.staged) wait_until_boxes_are_there();
  if (!finite) all_finite = 0;
  meet<1>(32 * warps);
  if (all_finite == 0) compute_again<F>(a, first, end, 32 * warps);
}

// Bytes of shared memory; 0 where planes do not fit.
template <class F>
int place(Arguments& a, int shared_memory) {
  // From image to image as F::kRowsFirst says; as boxes have them, whole rows, but for those with a misfit.
  const int plane_bytes = 4 * F::kMisfit + a.height * F::kRowBytes;
  if constexpr (F::kMisfit > 0)
    a.unit_bytes = static_cast<int>(F::kFlat ? round_up(plane_bytes, 16) | 16 : round_up(plane_bytes + 64, 128) - 64);
  else
    a.unit_bytes = F::kRowsFirst            ? (round_up(a.height + 4, 8) - 4) * F::kRowBytes
                   : F::kBoxes && !F::kFlat ? (a.height | 1) * F::kRowBytes
                                            : plane_bytes | 16;
  a.stage_bytes = static_cast<int>(round_up(a.units * a.unit_bytes, kBoxUnit));
  a.kernel_bytes = a.kernel_h * F::kWeightBytes;
  // From image to image the same.
  a.output_bytes = F::kPiece == 0 ? 0 : a.lanes * 16 * (F::kPiece / 4 * (32 / a.lanes) | (F::kRowsFirst ? 0 : 1));
  const int output_bytes = kSchedulers * F::kMostWarps * a.output_bytes;
  const int rest = a.kernel_bytes + F::kLineBytes + 16 * kMostStages + 8 * a.tasks + kBoxUnit + output_bytes;
  a.stages = std::min(kMostStages, (shared_memory - 256 - rest) / (a.stage_bytes + a.kernel_bytes));
  if (a.stages < 2) return 0;
  a.weights_at = a.stages * a.stage_bytes, a.kernels = a.stages + 1;
  a.zeros_at = a.weights_at + a.kernels * a.kernel_bytes;
  a.barriers_at = static_cast<int>(round_up(a.zeros_at + F::kLineBytes, 16));
  a.zeros_from = a.width == F::kSide ? a.weights_at : 0;  // beside weights as well
  a.steps_at = a.barriers_at + 16 * kMostStages,
  a.outputs_at = static_cast<int>(round_up(a.steps_at + 8 * a.tasks, kBoxUnit));
  a.bytes = a.outputs_at + output_bytes;
  return a.bytes;
}

// Describes boxes of the source and of the target, where there can be such.
template <class F>
void describe_boxes_of(Arguments& a) {
  const int64_t *source = a.source_stride, *target = a.target_stride, channels = ceil_div(a.filters, a.fan_out);
  float* const from = const_cast<float*>(a.source - F::kMisfit);
  const int pixels = a.height * a.width;
  if constexpr (F::kFlat) {
    if (a.copy.as_one && (F::kMisfit > 0 || a.unit_bytes == 4 * pixels) &&
        describe_boxes(a.map, from, 4, {F::kMisfit + pixels, channels, a.batch, 1},
                       {4 * source[1], 4 * source[0], 4 * source[0]}, {a.unit_bytes / 4, 1, a.units, 1}))
      a.box_bytes = a.units * a.unit_bytes;
  } else if constexpr (F::kMisfit > 0) {
    // A plane in four parts, with what lies behind it: before it, where it is the last of an image.
    constexpr int kRows = 4;
    const int side = a.unit_bytes / (4 * kRows);
    a.box_first = kRows * side - static_cast<int>(round_up(F::kMisfit + pixels, 4));
    if (a.copy.as_one && channels > 1 && source[1] >= pixels &&
        describe_boxes(a.map, from - a.box_first, 4, {a.box_first + side, kRows, channels, a.batch},
                       {4 * side, 4 * source[1], 4 * source[0]}, {side, kRows, 1, a.units}))
      a.box_bytes = a.units * a.unit_bytes;
  } else {
    // Rows that follow each other as one: a box takes as long as it has rows.
    const int rows = F::kRowsFirst && a.copy.as_one && a.height % 4 == 0 ? 4 : 1;
    if (describe_boxes(a.map, from, 4, {rows * a.width, a.height / rows, channels, a.batch},
                       {4 * rows * source[2], 4 * source[1], 4 * source[0]},
                       {rows * F::kSide, a.unit_bytes / (rows * F::kRowBytes), 1, a.units}))
      a.box_bytes = a.units * a.unit_bytes;
  }
  a.stores_boxes = target[3] == 1 && target[2] == F::kSide && a.out_width == F::kSide &&
                   describe_boxes(a.target_map, a.target, 4, {a.out_height * a.out_width, a.filters, a.batch, 1},
                                  {4 * target[1], 4 * target[0], 4 * target[0]}, {a.rows * F::kSide, 1, a.lanes, 1});
}

template <class F>
bool launch(const Problem& p, Arguments a, cudaStream_t stream) {
  const int multiprocessors = current_device().multiprocessors;
  if (F::kMisfit > 0 && (reinterpret_cast<uintptr_t>(a.source) % 16 != 4 * F::kMisfit || p.capability < 90))
    return false;
  a.copy = copy_of<F>(a.source - F::kMisfit, a.source_stride, a.filters, a.height, a.width, p.capability >= 90);
  // Fewer lanes side by side where many would be idle, or planes too large.
  const auto fits = [&](int count) {
    a.lanes = count, a.lane_bits = std::countr_zero(static_cast<unsigned>(count));
    a.units = F::kHeldImages * count, a.rows = 32 / count * F::kHeldRows;
    a.tasks = static_cast<int>(ceil_div(a.out_height, a.rows)) * F::kParts;
    return F::kForm.fills(a.batch, a.units) && place<F>(a, static_cast<int>(p.shared_memory)) > 0;
  };
  for (int count = F::kForm.lanes; !fits(count); count /= 2)
    if (count == F::kForm.least_lanes) return false;
  const int groups = static_cast<int>(ceil_div(a.batch, a.units));
  a.items = groups * a.filters;
  // Smaller problems are spread over the device in smaller pieces.
  if (a.items < multiprocessors) return false;
  a.share = static_cast<int>(ceil_div(a.items, multiprocessors));
  constexpr double kBusy = 0.7;  // of the multiprocessors
  if (a.share < 2 || a.items < kBusy * multiprocessors * a.share) return false;
  if (F::kBoxes && p.capability >= 90) describe_boxes_of<F>(a);
  if (F::kMisfit > 0 && a.box_bytes == 0) return false;
  const bool bulk = a.box_bytes > 0 || a.copy.bulk;
  // A warp may wait for a stage's next images only when those before have come, or it would not see by the parity that
  // they have not. They come one after the other, so until then a scheduler's tasks of as many items as there are
  // stages are at other warps of its own: which are fewer.
  constexpr int kFewWarps = 3;
  const int warps = std::min(bulk ? F::kMostWarps : F::kMostWarpsBesideCopiers, a.stages * a.tasks / kSchedulers);
  if (warps < kFewWarps) return false;
  a.copiers = bulk ? 1 : F::copiers(warps);
  a.by_groups = Divider(groups), a.by_tasks = Divider(a.tasks), a.by_stages = Divider(a.stages),
  a.by_kernels = Divider(a.kernels);
  constexpr int64_t kFar = int64_t{1} << 31;  // within what a warp has places are numbers of 32 bits
  if (4 * (a.units * a.target_stride[0] + a.out_height * a.target_stride[2]) >= kFar) return false;
  a.image_bytes = static_cast<int>(4 * a.target_stride[0]), a.row_bytes = static_cast<int>(4 * a.target_stride[2]);
  // Pieces of rows, or rows that follow each other, of 16 bytes each.
  const uint64_t low = reinterpret_cast<uintptr_t>(a.target) / 4 | a.target_stride[0] | a.target_stride[1];
  const bool follow = a.out_width == F::kSide && a.target_stride[2] == F::kSide && a.out_height % F::kHeldRows == 0;
  a.quads = a.target_stride[3] == 1 && low % 4 == 0 &&
            (F::kHeldRows > 1 ? follow : (a.target_stride[2] | a.out_width) % 4 == 0);
  const auto kernel = lanes<F>;
  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, a.bytes);
  launch_early(kernel, a, ceil_div(a.items, a.share), 32 * (kSchedulers * warps + a.copiers), stream, {1, a.bytes});
  check_launch("lanes");
  return true;
}

}  // namespace

bool launch_lanes(const Problem& p, cudaStream_t stream) {
  if (p.capability < 80) return false;
  const Mapping m(p);
  Arguments a{};
  take_pass(a, p, m);
  if (a.source_stride[3] != 1) return false;
  const int number = find_rows_form(a.batch, a.width, a.out_width, a.kernel_w, a.padding_w);
  return [&]<int... kNumber>(std::integer_sequence<int, kNumber...>) {
    const auto launch_it = [&](auto form) {
      constexpr int kIt = decltype(form)::value;
      if constexpr (Form<kIt>::kFlat || Form<kIt>::kRowsFirst)
        if (launch<Form<kIt, 1>>(p, a, stream)) return true;
      return launch<Form<kIt>>(p, a, stream);
    };
    return ((number == kNumber && launch_it(std::integral_constant<int, kNumber>{})) || ...);
  }(std::make_integer_sequence<int, static_cast<int>(std::size(kRowsForms))>{});
}

}  // namespace dwconv
