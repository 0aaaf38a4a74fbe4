// grad_weight (and the bias gradient) of large kernels in float32 on planes about as wide as code is compiled for, on
// CUDA cores.
//
// The lanes of a warp lie on images (in channels_last on channels) and on rows. A warp has some rows of taps, whose
// sums stay in its lanes' registers: a lane has a row of the input in registers, and multiplies it with the rows of the
// gradient that meet it for these taps. Which pixels meet which gradients along a row is known when the code is
// compiled, and rows outside of the image are left out: nothing is multiplied but what meets, but for columns that
// narrower planes lack.
//
// Other warps copy the planes of the next images, or channels, to shared memory meanwhile: a ring of stages. The sums
// of lanes, and of warps that share rows of taps, are added up in shared memory, those of several blocks by a second
// kernel, always in the same order.
//
// Columns that planes lack are zero, and give NaN where they meet Inf or NaN. So sums that are not finite are computed
// again.
#include "lanes_grad_weight.h"

#include <algorithm>

#include "device.h"
#include "lanes.cuh"
#include "lanes_forms.h"
#include "large_float32.cuh"
#include "launch.h"
#include "overlap.cuh"
#include "weight_sums.cuh"

namespace dwconv {
namespace {

constexpr int kMostStages = 4;
constexpr int kRun = 512;  // products that are summed before they are added to a sum

// How the lanes of a form lie on planes, and these in shared memory.
template <int kNumber, bool kChannelsLast_>
struct Form {
  static constexpr LanesForm kForm = kLanesForms[kNumber];
  static constexpr int kSide = kForm.side, kReach = kForm.reach, kTapRows = kForm.tap_rows;
  static constexpr bool kChannelsLast = kChannelsLast_;
  static constexpr int kBlock = kSide == 56 ? 28 : kSide, kBlocks = kSide / kBlock;
  static constexpr int kUnits = kForm.units(kChannelsLast);  // images, or channels, of a warp
  static constexpr int kLanesOfUnit = 32 / kUnits;
  static constexpr bool kAlone = kSide == 14;  // all lanes have the same row, and a warp neighbouring rows of taps
  static constexpr int kImages = kAlone && kChannelsLast ? kLanesOfUnit : 1;  // of an item in channels_last
  static constexpr int kRows = kAlone ? 1 : kLanesOfUnit;                     // rows of a warp
  static constexpr int kTaps = 2 * kReach + 1, kSums = kTapRows * kTaps;
  static constexpr bool kLoads = kReach == 4 || kReach == 15;         // gradients on the way
  static constexpr int kMostWarps = kReach == 15 ? 16 : 15;           // that compute
  static constexpr int kFilters = kChannelsLast ? kUnits : 1;         // of an item
  static constexpr int kSharers = kChannelsLast ? kLanesOfUnit : 32;  // lanes whose sums belong together
  // Their sums are halved by so many lanes' bits, and then exchanged.
  static constexpr int kHalvings = kSharers >= 8 ? 3 : kSharers == 4 ? 2 : 1;
  static constexpr int kPadded = (kSums + (1 << kHalvings) - 1) >> kHalvings << kHalvings;
  static constexpr int kSumBytes = 4 * kPadded * (kChannelsLast ? kUnits : 1);  // of a warp
  // Rows lie so that what lanes read at once is in different banks.
  static constexpr int kColumnBytes = kChannelsLast ? 4 * kUnits : 4;
  static constexpr int kRowBytes = kChannelsLast ? (kSide | 1) * kColumnBytes : 4 * kSide;

  // The image, or channel, and the row of a lane. The lanes that read shared memory at once, 8 of 16 bytes, read
  // different banks.
  static __device__ int unit_of(int lane) { return lane % kUnits; }
  static __device__ int row_of(int lane) {
    if (kAlone) return 0;
    if (kChannelsLast || kSide == 28) return lane / kUnits;
    return lane / 4 % 2 * 2 + lane / 8 % 2 + lane / 16 * 4;
  }
  // Rows of 14 columns 16 lanes read at once, in pieces of 8 bytes: half of them take neighbouring rows in other order.
  static __device__ int turn_of(int lane) { return kChannelsLast ? 0 : lane / 8 % 2; }
};

struct Arguments {
  CUtensorMap input_map, grad_map;  // of boxes
  const float* input;
  const float* grad;
  WeightSums sums;
  int64_t input_stride[4], grad_stride[4];  // in elements
  int batch, height, width, out_height, out_width, kernel_h, kernel_w, padding_h, padding_w, multiplier;
  int filters;
  bool turned;        // rows are columns
  int groups, items;  // items: groups of images of each filter, or images of each group of filters, one after the other
  int share, slots, blocks;        // items of a block; blocks that may share a filter; of a band
  int splits;                      // blocks of each filter, if blocks have items of one alone
  int band, tap_groups, parts;     // rows of taps of a block; warps that they take, and how many share their rows
  int copiers;                     // warps that copy
  signed char first_tap_rows[16];  // of warps that have neighbouring rows of taps
  Divider by_kernel_w, by_tap_groups;
  int stages, stage_bytes, grads_at, input_unit_bytes, grad_unit_bytes;
  Copy input_copy, grad_copy;
  int zeros_from, sums_at, sums_bytes, sums_buffers, barriers_at, bytes;  // in shared memory, behind the stages
};

// A sum of a block, tap by tap: only taps that meet the image.
__device__ __noinline__ float sum_by_taps(const Arguments& a, int filter, int first_image, int end_image, int i,
                                          int j) {
  float total = 0;
  for (int n = first_image; n < end_image; ++n)
    for (int row = 0; row < a.out_height; ++row) {
      const int y = row - a.padding_h + i;
      if (y < 0 || y >= a.height) continue;
      float sum = 0;
      for (int column = 0; column < a.out_width; ++column) {
        const int x = column - a.padding_w + j;
        if (x >= 0 && x < a.width)
          sum = fmaf(a.grad[n * a.grad_stride[0] + filter * a.grad_stride[1] + row * a.grad_stride[2] +
                            column * a.grad_stride[3]],
                     a.input[n * a.input_stride[0] + filter / a.multiplier * a.input_stride[1] + y * a.input_stride[2] +
                             x * a.input_stride[3]],
                     sum);
      }
      total += sum;
    }
  return total;
}

template <class F>
__device__ __forceinline__ void load_block(float (&to)[F::kBlock], uint32_t from) {
  if constexpr (F::kChannelsLast) {
#pragma unroll
    for (int c = 0; c < F::kBlock; ++c)
      asm volatile("ld.shared.f32 %0, [%1];" : "=f"(to[c]) : "r"(from + c * F::kColumnBytes));
  } else if constexpr (F::kBlock % 4 == 0) {
    load_row(to, from);
  } else {
#pragma unroll
    for (int c = 0; c < F::kBlock; c += 2)
      asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(to[c]), "=f"(to[c + 1]) : "r"(from + 4 * c));
  }
}

// All products of a block of pixels, and one of gradients that begins kShift columns before it. The order is one, of
// those tried, in which ptxas finds registers in different banks for the most of the FMA.
template <class F, int kShift>
__device__ __forceinline__ void multiply(float (&sum)[F::kTaps], const float (&x)[F::kBlock],
                                         const float (&g)[F::kBlock], bool never) {
  const auto add = [&](int u, int o) {
    const int tap = u - o + kShift + F::kReach;
    if (o >= 0 && o < F::kBlock && tap >= 0 && tap < F::kTaps) sum[tap] = fmaf(x[u], g[o], sum[tap]);
  };
  constexpr int kTurn = F::kReach == 6;
#pragma unroll
  for (int u = 0; u < F::kBlock; u += 2) {
    if constexpr (F::kBlocks == 1) {
#pragma unroll
      for (int o = 0; o < F::kBlock; ++o) add(u + (o + kTurn) % 2, o), add(u + (o + kTurn + 1) % 2, o);
    } else {
#pragma unroll
      for (int o = -1; o < F::kBlock; ++o) add(u, o), add(u + 1, o + 1);
      if (never) asm volatile("trap;");  // or ptxas unrolls the loop around, and mixes all its FMA
    }
  }
}

// The same with gradients that are loaded on the way, where there are few registers.
template <class F, int kShift>
__device__ __forceinline__ void multiply_loading(float (&sum)[F::kTaps], const float (&x)[F::kBlock], uint32_t grad,
                                                 bool never) {
  constexpr int kBegin = kShift > F::kReach ? (kShift - F::kReach) / 4 * 4 : 0;
  constexpr int kEnd = -kShift > F::kReach ? F::kBlock + kShift + F::kReach : F::kBlock;
  float g[2][4];
  const auto load = [&](int first) {
    float (&to)[4] = g[first / 4 % 2];
    const uint32_t from = grad + first * F::kColumnBytes;
    if constexpr (F::kChannelsLast) {
#pragma unroll
      for (int c = 0; c < 4; ++c)
        asm volatile("ld.shared.f32 %0, [%1];" : "=f"(to[c]) : "r"(from + c * F::kColumnBytes));
    } else {
      load_four(to, from);
    }
  };
  load(kBegin);
#pragma unroll
  for (int first = kBegin; first < kEnd; first += 4) {
    if (first + 4 < kEnd) load(first + 4);
    const auto add = [&](int u, int o) {
      const int tap = u - o + kShift + F::kReach;
      if (tap >= 0 && tap < F::kTaps) sum[tap] = fmaf(x[u], g[first / 4 % 2][o - first], sum[tap]);
    };
#pragma unroll
    for (int o = first; o < first + 4; ++o)
#pragma unroll
      for (int u = 0; u < F::kBlock; ++u) add(u, o);
    if (F::kBlocks > 1 && never) asm volatile("trap;");
  }
}

template <class F, int kShift>
__device__ __forceinline__ void add_block(float (&sum)[F::kTaps], const float (&x)[F::kBlock], uint32_t grad,
                                          bool never) {
  if constexpr (F::kLoads) {
    multiply_loading<F, kShift>(sum, x, grad, never);
  } else {
    float g[F::kBlock];
    load_block<F>(g, grad);
    multiply<F, kShift>(sum, x, g, never);
  }
}

// The sums of lanes that belong together: each lane halves its share of them with the lane that differs in one bit.
template <int kCount, int kBit, int kHalvings>
__device__ __forceinline__ int share_sums(float* v, int lane) {
  if constexpr (kHalvings > 0) {
    constexpr int kHalf = kCount / 2;
    const bool upper = lane & kBit;
#pragma unroll
    for (int k = 0; k < kHalf; ++k) {
      const float sent = upper ? v[k] : v[k + kHalf], kept = upper ? v[k + kHalf] : v[k];
      v[k] = kept + __shfl_xor_sync(~0u, sent, kBit);
    }
    return (upper ? kHalf : 0) + share_sums<kHalf, kBit / 2, kHalvings - 1>(v, lane);
  }
  return 0;
}

// Adds a warp's sums to those in shared memory.
template <class F>
__device__ __forceinline__ void flush(float (&sum)[F::kTapRows][F::kTaps], int to) {
  const int lane = threadIdx.x % 32;
  float v[F::kPadded];
#pragma unroll
  for (int k = 0; k < F::kPadded; ++k) v[k] = k < F::kSums ? sum[k / F::kTaps][k % F::kTaps] : 0;
#pragma unroll
  for (int k = 0; k < F::kSums; ++k) sum[k / F::kTaps][k % F::kTaps] = 0;
  const int first = share_sums<F::kPadded, 16, F::kHalvings>(v, lane);
  constexpr int kLeft = F::kPadded >> F::kHalvings;
  constexpr int kLowest = F::kChannelsLast ? F::kUnits : 1;  // bit
#pragma unroll
  for (int bit = 16 >> F::kHalvings; bit >= kLowest; bit /= 2)
#pragma unroll
    for (int k = 0; k < kLeft; ++k) v[k] += __shfl_xor_sync(~0u, v[k], bit);
  if constexpr (F::kChannelsLast) {
    const int at = to + 4 * (lane % F::kUnits + F::kUnits * first);
#pragma unroll
    for (int k = 0; k < kLeft; ++k) shared<float>(at + 4 * F::kUnits * k) += v[k];
  } else if (lane % (32 >> F::kHalvings) == 0) {
#pragma unroll
    for (int k = 0; k < kLeft; ++k) shared<float>(to + 4 * (first + k)) += v[k];
  }
}

// A block's items: as many as others have, or in channels_last as many of the same filters.
template <class F>
struct Share {
  int block, first, end;

  __device__ Share(const Arguments& a, int block) : block(block), first(block * a.share) {
    end = min(first + a.share, a.items);
    if (!F::kChannelsLast || a.splits == 0) return;
    const int index = block / a.splits;
    first = index * a.groups + (block - index * a.splits) * a.share;
    end = min(first + a.share, (index + 1) * a.groups);
  }
  // Of the sums of a filter, which are the block's.
  __device__ int slot(const Arguments& a, int index) const {
    return block - (F::kChannelsLast && a.splits > 0 ? index * a.splits : index * a.groups / a.share);
  }
};

// Where a block is among its items.
template <class F>
struct Cursor {
  int index, group;  // of the filter, or of neighbouring filters, and of their images

  __device__ Cursor(const Arguments& a, int item) : index(item / a.groups), group(item - index * a.groups) {}
  __device__ void advance(const Arguments& a) {
    if (++group == a.groups) group = 0, ++index;
  }
  __device__ int filter() const { return index * F::kFilters; }
  __device__ int image() const { return group * (F::kChannelsLast ? F::kImages : F::kUnits); }
  __device__ int images(const Arguments& a) const { return min(F::kImages, a.batch - image()); }  // in channels_last
  __device__ int units(const Arguments& a) const {
    return min(F::kUnits, F::kChannelsLast ? a.filters - filter() : a.batch - image());
  }
};

// A lane's part of the sum of an item's gradients, of its filter in channels_last.
template <class F>
__device__ float sum_gradients(const Arguments& a, int units, int images, int at) {
  const int lane = threadIdx.x % 32;
  float sum = 0;
  if constexpr (F::kChannelsLast) {
    at += 4 * (lane % F::kUnits);
    for (int image = 0; image < images; ++image, at += a.grad_unit_bytes)
      for (int row = 0; row < a.out_height; ++row)
        for (int column = lane / F::kUnits; column < a.out_width; column += F::kLanesOfUnit)
          sum += shared<float>(at + row * F::kRowBytes + column * F::kColumnBytes);
  } else {
    for (int unit = 0; unit < units; ++unit)
      for (int row = 0; row < a.out_height; ++row)
        for (int column = lane; column < a.out_width; column += 32)
          sum += shared<float>(at + unit * a.grad_unit_bytes + row * F::kRowBytes + 4 * column);
  }
  return sum;
}

// Puts a sum of the block, and zeros for blocks that there are not.
template <class F>
__device__ void put(const Arguments& a, const Cursor<F>& cursor, const Share<F>& share, int filter, int tap,
                    float sum) {
  int slot = share.slot(a, cursor.index);
  a.sums.put<float>(filter, slot, tap, sum);
  if (cursor.group == a.groups - 1)
    while (++slot < a.slots) a.sums.put<float>(filter, slot, tap, 0);
}

// Puts a tap's sum, of a filter at the cursor, after it was computed again if it is not finite.
template <class F>
__device__ __forceinline__ void put_tap(const Arguments& a, const Cursor<F>& cursor, const Share<F>& share, int plane,
                                        int i, int j, float sum) {
  const int filter = cursor.filter() + plane;
  if (!is_finite(sum)) {
    Cursor<F> from = cursor;
    from.group = max((F::kChannelsLast ? share.first : share.block * a.share) - cursor.index * a.groups, 0);
    const int end_image = cursor.image() + (F::kChannelsLast ? cursor.images(a) : cursor.units(a));
    sum = sum_by_taps(a, filter, from.image(), end_image, i, j);
  }
  put<F>(a, cursor, share, filter, a.turned ? j * a.kernel_h + i : i * a.kernel_w + j, sum);
}

// Puts the sums of the filters at the cursor, by all threads that compute.
template <class F>
__device__ __forceinline__ void put_sums(const Arguments& a, const Cursor<F>& cursor, int band, const Share<F>& share,
                                         int sums_at) {
  const int plane = threadIdx.x % F::kFilters;
  if (F::kChannelsLast && plane >= cursor.units(a)) return;
  const int first_row = band * a.band, taps = min(a.band, a.kernel_h - first_row) * a.kernel_w;
  const int step = 32 * a.tap_groups * a.parts / F::kFilters;
  for (int tap = threadIdx.x / F::kFilters; tap < taps; tap += step) {
    uint32_t row = tap;
    const int j = a.by_kernel_w.split(row), i = first_row + row, tap_group = a.by_tap_groups.split(row);
    const int at = (row * F::kTaps + j - a.padding_w + F::kReach) * F::kFilters + plane;
    float sum = 0;
    for (int part = 0; part < a.parts; ++part)
      sum += shared<float>(sums_at + (part * a.tap_groups + tap_group) * F::kSumBytes + 4 * at);
    put_tap<F>(a, cursor, share, plane, i, j, sum);
  }
}

// The same, by each warp those of its own rows of taps, where no other warp has sums of them.
template <class F>
__device__ __forceinline__ void put_own_sums(const Arguments& a, const Cursor<F>& cursor, const Share<F>& share,
                                             int first_row, int last_row, int apart, int sums_at) {
  const int lane = threadIdx.x % 32, plane = lane % F::kFilters;
  if (F::kChannelsLast && plane >= cursor.units(a)) return;
  for (int i = first_row, row = 0; i <= last_row; i += apart, ++row)
    for (int j = lane / F::kFilters; j < a.kernel_w; j += 32 / F::kFilters) {
      const int at = (row * F::kTaps + j - a.padding_w + F::kReach) * F::kFilters + plane;
      put_tap<F>(a, cursor, share, plane, i, j, shared<float>(sums_at + 4 * at));
    }
}

template <class F>
__global__ void __launch_bounds__(32 * (F::kMostWarps + 1), 1) lanes_grad_weight(const __grid_constant__ Arguments a) {
  const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0), lane = threadIdx.x % 32;
  const int warps = a.tap_groups * a.parts;                                      // that compute
  const int band = blockIdx.x / a.blocks, block = blockIdx.x - band * a.blocks;  // of rows of taps
  const Share<F> share(a, block);
  const int first = share.first, end = share.end;
  const bool sums_bias = a.sums.with_bias() && band == 0;
  for (int at = a.zeros_from + 16 * threadIdx.x; at < a.bytes; at += 16 * blockDim.x) shared<float4>(at) = {};
  __syncthreads();
  Ring stages(a.barriers_at, a.stages);
  if (threadIdx.x == 0)
    for (int stage = 0; stage < a.stages; ++stage) {
      init_barrier(stages.barriers + 16 * stage, 32 * a.copiers);
      init_barrier(stages.barriers + 16 * stage + 8, (warps + sums_bias) * kWarpArrivals);
    }
  before_bulk_copies();
  __syncthreads();
  let_next_kernel_start();
  wait_for_kernel_before();

  Cursor<F> cursor(a, first);
  if (warp >= warps) {
    // The first of these warps also sums the gradients.
    const int copier = warp - warps, behind = sums_bias && copier == 0 ? a.stages - 1 : 0;
    Cursor<F> summed = cursor;
    Ring summed_stages = stages;
    float bias = 0;
    for (int item = first; item < end + behind; ++item) {
      if (item < end) {
        stages.wait_empty();
        const int filter = cursor.filter(), image = cursor.image(), units = cursor.units(a);
        const int at = stages.at * a.stage_bytes;
        copy_planes<F>(&a.input_map, a.input + image * a.input_stride[0] + filter / a.multiplier * a.input_stride[1],
                       a.input_stride, a.input_copy, filter, image, cursor.images(a), units, a.height, a.width, at,
                       a.input_unit_bytes, stages.full(), copier, a.copiers);
        copy_planes<F>(&a.grad_map, a.grad + image * a.grad_stride[0] + filter * a.grad_stride[1], a.grad_stride,
                       a.grad_copy, filter, image, cursor.images(a), units, a.out_height, a.out_width, at + a.grads_at,
                       a.grad_unit_bytes, stages.full(), copier, a.copiers);
        arrive_after_copies(stages.full());
        stages.advance(), cursor.advance(a);
      }
      if (behind == 0 || item - behind < first) continue;
      summed_stages.wait_full();
      bias += sum_gradients<F>(a, summed.units(a), summed.images(a), summed_stages.at * a.stage_bytes + a.grads_at);
      arrive_together(summed_stages.empty(), lane == 0);
      summed_stages.advance();
      if (summed.group == a.groups - 1 || item - behind == end - 1) {
#pragma unroll
        for (int bit = 16; bit >= F::kFilters; bit /= 2) bias += __shfl_xor_sync(~0u, bias, bit);
        if (lane < (F::kChannelsLast ? summed.units(a) : 1))
          put<F>(a, summed, share, summed.filter() + lane, a.kernel_h * a.kernel_w, bias);
        bias = 0;
      }
      summed.advance(a);
    }
    return;
  }

  // Rows of taps that lie so far apart that every group of them meets about as many rows of the image. Or neighbouring
  // ones: then some meet few rows, and leave their issue slots to others.
  const int part = warp / a.tap_groups, tap_group = warp - part * a.tap_groups, apart = F::kAlone ? 1 : a.tap_groups;
  const int tap_row = band * a.band + (F::kAlone ? a.first_tap_rows[warp] : tap_group);
  const int last_tap_row = min(min((band + 1) * a.band, a.kernel_h) - 1, tap_row + (F::kTapRows - 1) * apart);
  const int unit = F::unit_of(lane), lane_row = F::row_of(lane);
  const int lowest = max(tap_row - a.padding_h, 0);
  const int highest = min(a.out_height - 1 + last_tap_row - a.padding_h, a.height - 1);
  const int rows_at_once = F::kRows * a.parts;
  const int products = a.height / rows_at_once * F::kSide, run = max(kRun / max(products, 1), 1);
  float sum[F::kTapRows][F::kTaps] = {};
  int run_left = run;
  int sums_at = a.sums_at, other_sums_at = a.sums_at + (a.sums_buffers - 1) * a.sums_bytes;
  const bool never = a.batch < 0;  // which ptxas does not know
  const uint32_t base = once(shared_address(0));

  for (int item = first, own_part = part; item < end; ++item) {
    stages.wait_full();
    const auto place_of = [&](int unit_bytes) {
      if (F::kChannelsLast) return 4 * unit + (F::kImages > 1 ? lane / F::kUnits * unit_bytes : 0);
      return unit * unit_bytes;
    };
    const uint32_t inputs = once(base + stages.at * a.stage_bytes + place_of(a.input_unit_bytes));
    const uint32_t grads = once(base + stages.at * a.stage_bytes + a.grads_at + place_of(a.grad_unit_bytes));
    const bool is_own = unit < cursor.units(a) && (F::kImages == 1 || lane / F::kUnits < cursor.images(a));
    if constexpr (F::kAlone) {
      // Rows in which both rows of taps meet some, and before and behind them those in which one does.
      const int first_both = max(tap_row + 1 - a.padding_h, lowest);
      const int last_both = min(a.out_height - 1 + tap_row - a.padding_h, highest);
      const int turn = F::turn_of(lane);
      if (is_own)
#pragma unroll 1
        for (int row = lowest; row <= highest; ++row) {
          const auto is_both = [&](int row) { return row >= first_both && row <= last_both; };
          const int own_row = is_both(row) && is_both(row ^ turn) ? row ^ turn : row;
          const uint32_t grad = grads + (own_row - tap_row + a.padding_h) * F::kRowBytes;
          float x[F::kBlock];
          load_block<F>(x, inputs + own_row * F::kRowBytes);
          if (row <= last_both) add_block<F, 0>(sum[0], x, grad, never);
          if (row >= first_both && tap_row < last_tap_row) add_block<F, 0>(sum[1], x, grad - F::kRowBytes, never);
        }
    } else {
      const int own_highest = is_own ? highest : -1;
#pragma unroll 1
      for (int row = lowest + own_part * F::kRows + lane_row; row - lane_row <= highest; row += rows_at_once) {
        const bool is_there = row <= own_highest;
        const uint32_t source = inputs + min(row, highest) * F::kRowBytes;
        const auto grad_of = [&](int t) { return row - tap_row - t * apart + a.padding_h; };
        const auto meets = [&](int t) {
          return is_there && tap_row + t * apart <= last_tap_row &&
                 static_cast<uint32_t>(grad_of(t)) < static_cast<uint32_t>(a.out_height);
        };
        if constexpr (F::kBlocks == 1) {
          float x[F::kBlock];
          load_block<F>(x, source);
#pragma unroll
          for (int t = 0; t < F::kTapRows; ++t)
            if (meets(t)) add_block<F, 0>(sum[t], x, grads + grad_of(t) * F::kRowBytes, never);
        } else {
          static_assert(F::kTapRows == 1 && F::kBlocks == 2);
          if (meets(0)) {
            constexpr int kNext = F::kBlock * F::kColumnBytes;
            const uint32_t grad = grads + grad_of(0) * F::kRowBytes;
            float x[F::kBlock];
            load_block<F>(x, source);
            add_block<F, -F::kBlock>(sum[0], x, grad + kNext, never);
#pragma unroll 1
            for (int block = 0;; ++block) {
              add_block<F, 0>(sum[0], x, grad + block * kNext, never);
              if (block > 0) break;
              load_block<F>(x, source + kNext);
              add_block<F, F::kBlock>(sum[0], x, grad, never);
            }
          }
        }
      }
    }
    arrive_together(stages.empty(), lane == 0);
    stages.advance();
    if (++own_part == a.parts) own_part = 0;  // all warps have the most rows by turns

    const bool is_last = cursor.group == a.groups - 1 || item == end - 1;
    if (--run_left == 0 || is_last) flush<F>(sum, sums_at + warp * F::kSumBytes), run_left = run;
    if (is_last) {
      const auto all_meet = [&] { meet<1>(32 * warps); };
      const auto clear = [&](int from) {
        for (int at = 4 * lane; at < F::kSumBytes; at += 128) shared<float>(from + warp * F::kSumBytes + at) = 0;
        __syncwarp();
      };
      if (F::kReach < 25 && a.parts == 1) {  // those of wider kernels have few rows
        __syncwarp();
        put_own_sums<F>(a, cursor, share, tap_row, last_tap_row, apart, sums_at + warp * F::kSumBytes);
        __syncwarp();
        clear(sums_at);
        cursor.advance(a);
        continue;
      }
      all_meet();
      if (sums_at != other_sums_at) clear(other_sums_at);  // which all have read, as they are here
      put_sums<F>(a, cursor, band, share, sums_at);
      if (sums_at == other_sums_at) all_meet(), clear(sums_at);
      const int used = sums_at;
      sums_at = other_sums_at, other_sums_at = used;
    }
    cursor.advance(a);
  }
}

// Bytes of shared memory; 0 where planes do not fit.
template <class F>
int place(Arguments& a, int shared_memory) {
  a.input_unit_bytes = box_rows<F>(a.height) * F::kRowBytes;
  a.grad_unit_bytes = box_rows<F>(a.out_height) * F::kRowBytes;
  int inputs = F::kImages * a.input_unit_bytes, grads = F::kImages * a.grad_unit_bytes;
  if (!F::kChannelsLast) {
    for (int* bytes : {&a.input_unit_bytes, &a.grad_unit_bytes})
      *bytes = static_cast<int>(round_up(*bytes, 16)) | 16;  // an odd number of 16 bytes from image to image
    inputs = F::kUnits * a.input_unit_bytes, grads = F::kUnits * a.grad_unit_bytes;
  }
  a.grads_at = static_cast<int>(round_up(inputs, kBoxUnit));
  a.stage_bytes = static_cast<int>(round_up(a.grads_at + grads, kBoxUnit));
  const int warps = a.tap_groups * a.parts;
  a.sums_bytes = warps * F::kSumBytes;
  for (a.sums_buffers = 2;; --a.sums_buffers) {
    const int rest = a.sums_buffers * a.sums_bytes + 16 * kMostStages;
    a.stages = std::min(kMostStages, (shared_memory - 128 - rest) / a.stage_bytes);
    a.sums_at = a.stages * a.stage_bytes, a.barriers_at = a.sums_at + a.sums_buffers * a.sums_bytes;
    a.zeros_from = a.width == F::kSide && a.out_width == F::kSide ? a.sums_at : 0;
    a.bytes = a.barriers_at + 16 * kMostStages;
    if (a.stages >= 2) return a.bytes;
    if (a.sums_buffers == 1) return 0;
  }
}

// Gives warps the rows of taps of band 0 so that schedulers, each of which has every fourth warp, have about as much to
// do: those that meet the most rows first.
template <class F>
void balance_warps(Arguments& a) {
  constexpr int kSchedulers = 4;
  const auto met = [&](int group) {
    int rows = 0;
    for (int t = F::kTapRows * group; t < std::min(F::kTapRows * (group + 1), a.band); ++t)
      rows +=
          std::max(std::min(a.out_height - 1 + t - a.padding_h, a.height - 1) - std::max(t - a.padding_h, 0) + 1, 0);
    return rows;
  };
  int order[16], load[kSchedulers] = {}, warps[kSchedulers] = {};
  for (int group = 0; group < a.tap_groups; ++group) order[group] = group;
  std::stable_sort(order, order + a.tap_groups, [&](int one, int other) { return met(one) > met(other); });
  for (int rank = 0; rank < a.tap_groups; ++rank) {
    int best = -1;
    for (int scheduler = 0; scheduler < kSchedulers; ++scheduler)
      if (kSchedulers * warps[scheduler] + scheduler < a.tap_groups && (best < 0 || load[scheduler] < load[best]))
        best = scheduler;
    a.first_tap_rows[kSchedulers * warps[best]++ + best] = static_cast<signed char>(F::kTapRows * order[rank]);
    load[best] += met(order[rank]);
  }
}

template <class F>
bool launch(const Problem& p, Arguments a, const Allocate& allocate, cudaStream_t stream) {
  const int64_t multiprocessors = current_device().multiprocessors;
  a.input_copy = copy_of<F>(a.input, a.input_stride, a.filters, a.height, a.width, p.capability >= 90);
  a.grad_copy = copy_of<F>(a.grad, a.grad_stride, a.filters, a.out_height, a.out_width, p.capability >= 90);
  if (F::kChannelsLast && p.capability >= 90)
    a.input_copy.bulk = a.grad_copy.bulk =
        describe_planes<F>(a.input_map, a.input, a.input_stride, a.filters, a.batch, a.height, a.width) &&
        describe_planes<F>(a.grad_map, a.grad, a.grad_stride, a.filters, a.batch, a.out_height, a.out_width);
  const int bands = static_cast<int>(ceil_div(a.kernel_h, F::kTapRows * F::kMostWarps));
  a.band = static_cast<int>(ceil_div(a.kernel_h, bands));
  a.tap_groups = static_cast<int>(ceil_div(a.band, F::kTapRows));
  if (F::kAlone) balance_warps<F>(a);
  // A warp takes as long for as many copies as all the others together for kCopies / its vector taps.
  constexpr int kCopies = 400;
  const bool bulk = a.input_copy.bulk && a.grad_copy.bulk;
  const int wanted =
      bulk ? 1 : 1 + kCopies / (std::min(a.input_copy.vector, a.grad_copy.vector) * a.kernel_h * a.kernel_w);
  a.parts = std::max(1, std::min(F::kMostWarps / a.tap_groups, static_cast<int>(ceil_div(a.height, F::kRows))));
  while (a.parts > 1 && a.tap_groups * a.parts + wanted > 16) --a.parts;
  a.copiers = bulk ? 1 : std::max(16 - a.tap_groups * a.parts, 1);
  a.groups = static_cast<int>(ceil_div(a.batch, F::kChannelsLast ? F::kImages : F::kUnits));
  a.items = a.groups * (F::kChannelsLast ? static_cast<int>(ceil_div(a.filters, F::kUnits)) : a.filters);
  // Smaller problems are spread over the device in smaller pieces.
  if (2 * int64_t{a.items} * bands < multiprocessors || place<F>(a, static_cast<int>(p.shared_memory)) == 0)
    return false;
  const int64_t most_blocks = std::max<int64_t>(multiprocessors / bands, 1);
  a.splits = F::kChannelsLast ? static_cast<int>(most_blocks * a.groups / a.items) : 0;
  if (a.splits > 0) {
    // Blocks that read neighbouring channels of a pixel do so at the same time.
    a.share = static_cast<int>(ceil_div(a.groups, std::min(a.splits, a.groups)));
    a.splits = a.slots = static_cast<int>(ceil_div(a.groups, a.share));
  } else {
    a.share = static_cast<int>(ceil_div(a.items, most_blocks));
    a.slots = a.share % a.groups == 0   ? 1
              : a.groups % a.share == 0 ? a.groups / a.share
                                        : static_cast<int>(ceil_div(a.groups - 1, a.share)) + 1;
  }
  a.sums = weight_sums(p, a.slots, allocate);
  const auto kernel = lanes_grad_weight<F>;
  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, a.bytes);
  a.blocks = static_cast<int>(a.splits > 0 ? a.items / a.groups * a.splits : ceil_div(a.items, a.share));
  a.by_kernel_w = Divider(a.kernel_w), a.by_tap_groups = Divider(a.tap_groups);
  launch_early(kernel, a, int64_t{a.blocks} * bands, 32 * (a.tap_groups * a.parts + a.copiers), stream, {1, a.bytes});
  check_launch("lanes_grad_weight");
  launch_add_partial_sums(p, a.sums, a.slots, stream);
  return true;
}

template <bool kChannelsLast>
bool launch_form(const Problem& p, const Arguments& a, const Allocate& allocate, cudaStream_t stream) {
  const int number = find_lanes_form(kChannelsLast, kChannelsLast ? a.filters : a.batch, a.width, a.out_width,
                                     a.kernel_w, a.padding_w);
  return [&]<int... kNumber>(std::integer_sequence<int, kNumber...>) {
    return ((number == kNumber && launch<Form<kNumber, kChannelsLast>>(p, a, allocate, stream)) || ...);
  }(std::make_integer_sequence<int, static_cast<int>(std::size(kLanesForms))>{});
}

}  // namespace

bool launch_lanes_grad_weight(const Problem& p, const Allocate& allocate, cudaStream_t stream) {
  if (p.capability < 80) return false;
  Arguments a{};
  a.input = static_cast<const float*>(p.input.data), a.grad = static_cast<const float*>(p.output.data);
  for (int d = 0; d < 4; ++d) a.input_stride[d] = p.input.stride[d], a.grad_stride[d] = p.output.stride[d];
  a.filters = static_cast<int>(p.filters()), a.multiplier = static_cast<int>(p.multiplier);
  a.batch = static_cast<int>(p.batch), a.height = static_cast<int>(p.height), a.width = static_cast<int>(p.width);
  a.out_height = static_cast<int>(p.out_height), a.out_width = static_cast<int>(p.out_width);
  a.kernel_h = static_cast<int>(p.kernel_h), a.kernel_w = static_cast<int>(p.kernel_w);
  a.padding_h = static_cast<int>(p.padding_h), a.padding_w = static_cast<int>(p.padding_w);
  const bool channels_last = a.multiplier == 1 && is_channels_last(a.input_stride, a.filters, a.width) &&
                             is_channels_last(a.grad_stride, a.filters, a.out_width);
  a.turned = goes_along_columns(a.kernel_h, a.kernel_w, a.out_height, a.out_width);
  if (a.turned) {
    turn(a);
    for (int64_t* stride : {a.input_stride, a.grad_stride}) std::swap(stride[2], stride[3]);
  }
  return channels_last ? launch_form<true>(p, a, allocate, stream) : launch_form<false>(p, a, allocate, stream);
}

}  // namespace dwconv
