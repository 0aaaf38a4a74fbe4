// grad_weight (and the bias gradient) of large kernels in float32 on planes about as wide as code is compiled for, on
// CUDA cores.
//
// The lanes of a warp lie on images, on filters where these lie side by side or planes are small, and on rows. A warp
// has some rows of taps, whose sums stay in its lanes' registers: a lane has a row of the input in registers, and
// multiplies it with the rows of the gradient that meet it for these taps. Which pixels meet which gradients along a
// row is known when the code is compiled, and rows outside of the image are left out: nothing is multiplied but what
// meets, but for columns that narrower planes lack, and taps that narrower kernels lack.
//
// Other warps copy the planes of the next images, or filters, to shared memory meanwhile: a ring of stages. Kernels
// that go along their columns read planes as they lie, column by column. The sums of lanes, and of warps that share
// rows of taps, are added up in shared memory, those of two blocks that share one filter by the first of them, as a
// cluster, those of others by a second kernel, always in the same order.
//
// Tensors that begin between multiples of 16 bytes are copied from the multiple before. Channels are counted from
// there: the first ones are those of the pixel before, and their sums are nobody's.
//
// Columns that planes lack are zero, and give NaN where they meet Inf or NaN. So sums that are not finite are computed
// again.
#include "lanes_grad_weight.h"

#include <algorithm>
#include <climits>
#include <numeric>

#include "cluster_sums.cuh"
#include "device.h"
#include "lanes.cuh"
#include "lanes_forms.h"
#include "large_float32.cuh"
#include "launch.h"
#include "long_sums.h"
#include "overlap.cuh"
#include "weight_sums.cuh"

namespace dwconv {
namespace {

constexpr int kMostStages = 4;

// How planes lie in memory, and so in shared memory: by rows, by columns, or channels side by side.
enum class Layout { kRows, kColumns, kChannelsLast };

// How the lanes of a form lie on planes, and these in shared memory.
template <int kNumber, Layout kLayout_, bool kBulk_ = true, int kMisfit_ = 0>
struct Form {
  static constexpr Layout kLayout = kLayout_;
  static constexpr LanesForm kForm = kLanesForms[kNumber];
  static constexpr int kSide = kForm.side, kReach = kForm.reach;
  static constexpr bool kChannelsLast = kLayout == Layout::kChannelsLast, kColumns = kLayout == Layout::kColumns;
  static constexpr int kBlock = kSide == 56 ? 28 : kSide, kBlocks = kSide / kBlock;
  static constexpr int kFilters = kForm.filters(kChannelsLast), kImages = kForm.images(kChannelsLast);  // of an item
  static constexpr int kPlanes = kFilters * kImages, kRows = 32 / kPlanes;                              // of a warp
  static constexpr bool kAlone = kRows == 1;  // all lanes have the same row
  // Where a warp has one row of taps, and there are many, one more that copies by itself is not enough.
  static constexpr bool kBulk = kBulk_ || !kAlone;
  // Where planes begin between multiples of 16 bytes, what lies from the multiple before on is copied. kOdd: they begin
  // any odd number of elements behind it, and images are as far apart as leaves them in the banks where others are.
  // kMisfit: so many elements, known where rows are loaded by 16 bytes, as those of others are.
  static constexpr bool kOdd = kAlone && kMisfit_ > 0;
  static constexpr int kMisfit = kAlone ? 0 : kMisfit_;
  static constexpr int kImageGap = kOdd ? 128 : 0;
  static constexpr int kTapRows = kBulk ? kForm.tap_rows : 2 * kForm.tap_rows;
  static constexpr int kUnits = kFilters;  // of a box
  static constexpr int kTaps = 2 * kReach + 1, kSums = kTapRows * kTaps;
  static constexpr int kMostWarps = kAlone ? (kBulk ? 27 : 14) : kSide == 56 && kReach <= 15 ? 16 : 15;  // that compute
  static constexpr int kAllWarps = kMostWarps + (kBulk ? 1 : 2);
  static constexpr int kRun = 512;  // products of a run: those that are summed one after the other, at most
  static constexpr int kSharers = 32 / kFilters;  // lanes whose sums belong together
  static constexpr bool kClusters = !kAlone;      // for which few registers are left there
  // Whether runs are added up in registers, where there are enough: else lanes add up their sums after each. Runs are
  // of whole items, but where an item's rows are many.
  static constexpr bool kFolds = !kAlone && kSums <= (kSide == 56 ? 13 : 27), kRunsOfRows = kFolds && kSide == 56;
  // Their sums are halved by so many lanes' bits, and then exchanged.
  static constexpr int kHalvings = kSharers >= 8 ? 3 : kSharers == 4 ? 2 : 1;
  static constexpr int kPadded = (kSums + (1 << kHalvings) - 1) >> kHalvings << kHalvings;
  static constexpr int kSumBytes = 4 * kPadded * kFilters;  // of a warp
  // Rows lie so that what lanes read at once is in different banks.
  static constexpr int kColumnBytes = kChannelsLast ? 4 * kFilters : kColumns ? 4 * kSide : 4;
  static constexpr int kRowBytes = kChannelsLast ? (kSide | 1) * kColumnBytes : kColumns ? 4 : 4 * kSide;
  static constexpr int kPlaneUnit = kColumns ? 4 * kRows : 16;  // planes are an odd number of so many bytes apart

  template <class A>
  static __device__ bool has_clusters(const A& a) {
    return kClusters && a.cluster > 1;
  }
  // The filter, the image and the row of a lane. The lanes that read shared memory at once, 8 of 16 bytes, read
  // different banks.
  static __device__ int filter_of(uint32_t lane) { return lane % kFilters; }
  static __device__ int image_of(uint32_t lane) { return lane / kFilters % kImages; }
  static __device__ int row_of(uint32_t lane) {
    if (kLayout != Layout::kRows || kSide != 56) return lane / kPlanes;
    return lane / 4 % 2 * 2 + lane / 8 % 2 + lane / 16 * 4;
  }
  // Rows of 14 columns 16 lanes read at once, in pieces of 8 bytes: half of them begin with the second row.
  static __device__ int turn_of(uint32_t lane) { return kLayout == Layout::kRows ? lane / 8 % 2 : 0; }
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
  int share, slots, blocks;  // items of a block; blocks that may share a filter; of a band
  int splits;                // blocks of each filter, if blocks have items of one alone
  int rest, rests;           // the first group of images that these leave, and of how many filters blocks take them
  int cluster;               // blocks that share filters, the first of which adds up their sums; 1: none do
  int bands, band;           // of rows of taps, and rows of taps of a block
  int tap_groups, parts;     // warps that these take, and how many share their rows of the image
  int copiers;               // warps that copy
  signed char kinds[28];     // of warps: the part, and in it the group of rows of taps
  int run;                   // items of a run, or rows of the image
  Divider by_kernel_w, by_tap_groups, by_parts;
  int stages, stage_bytes, grads_at, input_unit_bytes, grad_unit_bytes;
  Copy input_copy, grad_copy;
  int input_misfit, grad_misfit;  // bytes from the multiple of 16 bytes before, where planes are copied from there
  int zeros_from, sums_at, sums_bytes, sums_buffers, barriers_at, bytes;  // in shared memory, behind the stages
  int rows_at;                                                            // of each warp, where registers are few
  int totals_at, totals_bytes;                                            // of the cluster's second block
  int shift;  // of the filters, those that are of the pixels before
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

// Loads columns that follow each other.
template <class F, int kCount>
__device__ __forceinline__ void load_columns(float (&to)[kCount], uint32_t from) {
  if constexpr (F::kColumnBytes > 4) {
#pragma unroll
    for (int c = 0; c < kCount; ++c)
      asm volatile("ld.shared.f32 %0, [%1];" : "=f"(to[c]) : "r"(from + c * F::kColumnBytes));
  } else if constexpr (kCount % 4 == 0) {
    load_row(to, from);
  } else if constexpr (F::kOdd) {
    asm volatile("ld.shared.f32 %0, [%1];" : "=f"(to[0]) : "r"(from));
#pragma unroll
    for (int c = 1; c < kCount - 1; c += 2)
      asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(to[c]), "=f"(to[c + 1]) : "r"(from + 4 * c));
    asm volatile("ld.shared.f32 %0, [%1];" : "=f"(to[kCount - 1]) : "r"(from + 4 * (kCount - 1)));
  } else {
#pragma unroll
    for (int c = 0; c < kCount; c += 2)
      asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(to[c]), "=f"(to[c + 1]) : "r"(from + 4 * c));
  }
}

// Loads a block's pixels.
template <class F>
__device__ __forceinline__ void load_block(float (&to)[F::kBlock], uint32_t from) {
  if constexpr (F::kMisfit == 0) {
    load_columns<F>(to, from);
  } else {
    float all[F::kBlock + 4];
    load_row(all, from);
#pragma unroll
    for (int c = 0; c < F::kBlock; ++c) to[c] = all[c + F::kMisfit];
  }
}

// All products of a block of pixels, and one of gradients that begins kShift columns before it, which are loaded on the
// way: registers are few. The order is one, of those tried, in which ptxas finds registers in different banks for the
// most of the FMA.
template <class F, int kShift>
__device__ __forceinline__ void add_block(float (&sum)[F::kTaps], const float (&x)[F::kBlock], uint32_t grad,
                                          bool never) {
  constexpr int kAtOnce = F::kBlock % 4 == 0 ? 4 : F::kBlock;
  // Of what is loaded: before the first gradient lie as many numbers as before the first pixel.
  constexpr int kBegin = ((kShift > F::kReach ? kShift - F::kReach : 0) + F::kMisfit) / kAtOnce * kAtOnce;
  constexpr int kEnd = F::kMisfit + (-kShift > F::kReach ? F::kBlock + kShift + F::kReach : F::kBlock);
  const auto pixel = [](int n, int o) {
    constexpr int kBlock = F::kBlock, kHalf = kBlock / 2;
    const auto turned = [&](int at) { return o % 2 == 1 ? kBlock - 1 - at : at; };
    if (F::kSide == 14) return turned(F::kAlone && F::kChannelsLast ? 9 * n % kBlock : kBlock - 1 - n);
    if (F::kLayout == Layout::kRows)
      return F::kReach > 13 && F::kReach < 16 ? 3 * n % kBlock : F::kSide == 28 ? turned(n) : n;
    if (F::kSide == 28) return F::kReach == 14 ? turned(n) : (F::kReach == 6 ? 3 : 5) * n % kBlock;
    if (F::kReach == 25) return F::kChannelsLast ? 5 * n % kBlock : turned(5 * n % kBlock);
    if (F::kReach == 15 && F::kChannelsLast) return n;
    return n < kHalf ? 2 * n + o % 2 : 2 * (n - kHalf) + 1 - o % 2;
  };
  float g[2][kAtOnce];
  const auto load = [&](int first) { load_columns<F>(g[first / kAtOnce % 2], grad + first * F::kColumnBytes); };
  load(kBegin);
#pragma unroll
  for (int first = kBegin; first < kEnd; first += kAtOnce) {
    if (first + kAtOnce < kEnd) load(first + kAtOnce);
    const auto add = [&](int u, int o) {
      const int tap = u - o + kShift + F::kReach, at = o + F::kMisfit - first;
      if (tap >= 0 && tap < F::kTaps) sum[tap] = fmaf(x[u], g[first / kAtOnce % 2][at], sum[tap]);
    };
#pragma unroll
    for (int o = first - F::kMisfit; o < first - F::kMisfit + kAtOnce; ++o)
#pragma unroll
      for (int n = 0; n < F::kBlock; ++n)
        if (o >= 0 && o < F::kBlock) add(pixel(n, o), o);
    if (F::kBlocks > 1 && never) asm volatile("trap;");
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
__device__ __forceinline__ void flush(const float (&sum)[F::kTapRows][F::kTaps], int to) {
  const int lane = threadIdx.x % 32;
  float v[F::kPadded];
#pragma unroll
  for (int k = 0; k < F::kPadded; ++k) v[k] = k < F::kSums ? sum[k / F::kTaps][k % F::kTaps] : 0;
  const int first = share_sums<F::kPadded, 16, F::kHalvings>(v, lane);
  constexpr int kLeft = F::kPadded >> F::kHalvings;
#pragma unroll
  for (int bit = 16 >> F::kHalvings; bit >= F::kFilters; bit /= 2)
#pragma unroll
    for (int k = 0; k < kLeft; ++k) v[k] += __shfl_xor_sync(~0u, v[k], bit);
  if (lane % (32 >> F::kHalvings) < F::kFilters) {
    const int at = to + 4 * (F::filter_of(lane) + F::kFilters * first);
#pragma unroll
    for (int k = 0; k < kLeft; ++k) shared<float>(at + 4 * F::kFilters * k) += v[k];
  }
}

// A block's items: as many as others have, or in channels_last as many of the same filters, with blocks that take what
// these leave, of several.
template <class F>
struct Share {
  int block, first, end;

  __device__ Share(const Arguments& a, int block) : block(block), first(block * a.share) {
    end = min(first + a.share, a.items);
    if (!F::kChannelsLast || a.splits == 0) return;
    const int filters = a.items / a.groups, index = min(block / a.splits, filters), rest = block - filters * a.splits;
    const int begin = rest >= 0 ? min(rest * a.rests, filters) : index;
    first = begin * a.groups + (rest >= 0 ? a.rest : (block - index * a.splits) * a.share);
    end = rest >= 0 ? first + min(a.rests, filters - begin) * (a.groups - a.rest)
                    : min(first + a.share, (index + 1) * a.groups);
  }
  // Of the sums of a filter, which are the block's.
  __device__ int slot(const Arguments& a, int index) const {
    if (!F::kChannelsLast || a.splits == 0) return block - index * a.groups / a.share;
    return min(block - index * a.splits, a.splits);
  }
  __device__ int rank(const Arguments& a) const { return block % a.cluster; }
  // Whether blocks before, or behind, have items of the same filters.
  __device__ bool begins_before(const Arguments& a, int index) const { return index * a.groups < first; }
  __device__ bool ends_behind(const Arguments& a, int index) const { return (index + 1) * a.groups > end; }
};

// Where a block is among its items.
template <class F>
struct Cursor {
  int index, group;  // of the filter, or of neighbouring filters, and of their images

  __device__ Cursor(const Arguments& a, int item) : index(item / a.groups), group(item - index * a.groups) {}
  __device__ void advance(const Arguments& a) {
    if (++group == a.groups) group = F::kChannelsLast ? a.rest : 0, ++index;
  }
  __device__ int filter() const { return index * F::kFilters; }
  __device__ int filters(const Arguments& a) const { return min(F::kFilters, a.filters - filter()); }
  __device__ int image() const { return group * F::kImages; }
  __device__ int images(const Arguments& a) const { return min(F::kImages, a.batch - image()); }
};

// Adds a lane's sums to others, and begins anew.
template <class F, int kCount>
__device__ __forceinline__ void fold(float (&to)[kCount][F::kTaps], float (&sum)[kCount][F::kTaps]) {
#pragma unroll
  for (int t = 0; t < kCount; ++t)
#pragma unroll
    for (int tap = 0; tap < F::kTaps; ++tap) to[t][tap] += sum[t][tap], sum[t][tap] = 0;
}

// A lane's part of the sum of an item's gradients, of its filter.
template <class F>
__device__ float sum_gradients(const Arguments& a, int images, int at) {
  const int lane = threadIdx.x % 32, first = lane / F::kFilters;
  float sum = 0;
  if constexpr (F::kChannelsLast) {
    at += 4 * F::filter_of(lane);
    for (int image = 0; image < images; ++image, at += a.grad_unit_bytes)
      for (int row = 0; row < a.out_height; ++row)
        for (int column = first; column < a.out_width; column += F::kSharers)
          sum += shared<float>(at + row * F::kRowBytes + column * F::kColumnBytes);
  } else {  // columns that planes lack are zero
    at += F::filter_of(lane) * a.grad_unit_bytes + a.grad_misfit;
    for (int image = 0; image < images; ++image, at += F::kFilters * a.grad_unit_bytes + F::kImageGap)
      for (int pixel = first; pixel < a.out_height * F::kSide; pixel += F::kSharers)
        sum += shared<float>(at + 4 * pixel);
  }
  return sum;
}

__device__ inline int totals_barrier(const Arguments& a) {
  return a.barriers_at + 16 * kMostStages;
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

// Where filters are a cluster's: sends a sum to the first block, or adds to it what others have sent there. Returns
// whether it is this block that puts it.
template <class F>
__device__ __forceinline__ bool gather(const Arguments& a, const Cursor<F>& cursor, const Share<F>& share, int place,
                                       float& sum) {
  if (!F::has_clusters(a)) return true;
  const int at = a.totals_at + 4 * place, barrier = totals_barrier(a);
  if (share.begins_before(a, cursor.index)) {
    send_to_first(at, sum, barrier);
    return false;
  }
  if (share.ends_behind(a, cursor.index)) {
    wait(barrier, 0);
    sum += shared<float>(at);
  }
  return true;
}

// Puts a tap's sum, of a filter at the cursor, after it was computed again if it is not finite. `tap`: of the band.
template <class F>
__device__ __forceinline__ void put_tap(const Arguments& a, const Cursor<F>& cursor, const Share<F>& share, int plane,
                                        int tap, int i, int j, float sum) {
  if (!gather(a, cursor, share, tap * F::kFilters + plane, sum)) return;
  const int filter = cursor.filter() + plane;
  if (F::kChannelsLast && filter < a.shift) return;
  if (!is_finite(sum)) {
    const int begin = share.first - cursor.index * a.groups, first = (begin < 0 ? a.rest : begin) * F::kImages;
    const int end = F::has_clusters(a) ? a.batch : cursor.image() + cursor.images(a);
    sum = sum_by_taps(a, filter, first, end, i, j);
  }
  put<F>(a, cursor, share, filter, a.turned ? j * a.kernel_h + i : i * a.kernel_w + j, sum);
}

// A warp's sum of tap j of one of its rows of taps: none where the tap meets no image.
template <class F>
__device__ __forceinline__ float sum_of(const Arguments& a, int sums_at, int row, int j, int plane) {
  const int tap = j - a.padding_w + F::kReach;
  if (F::kForm.has_all_taps() && static_cast<uint32_t>(tap) >= F::kTaps) return 0;
  return shared<float>(sums_at + 4 * ((row * F::kTaps + tap) * F::kFilters + plane));
}

// Puts the sums of the filters at the cursor, by all threads that compute.
template <class F>
__device__ __forceinline__ void put_sums(const Arguments& a, const Cursor<F>& cursor, int band, const Share<F>& share,
                                         int sums_at) {
  const int plane = threadIdx.x % F::kFilters;
  if (plane >= cursor.filters(a)) return;
  const int first_row = band * a.band, taps = min(a.band, a.kernel_h - first_row) * a.kernel_w;
  const int step = 32 * a.tap_groups * a.parts / F::kFilters;
  for (int tap = threadIdx.x / F::kFilters; tap < taps; tap += step) {
    uint32_t row = tap;
    const int j = a.by_kernel_w.split(row), i = first_row + row, tap_group = a.by_tap_groups.split(row);
    float sum = 0;
    for (int part = 0; part < a.parts; ++part)
      sum += sum_of<F>(a, sums_at + (part * a.tap_groups + tap_group) * F::kSumBytes, row, j, plane);
    put_tap<F>(a, cursor, share, plane, tap, i, j, sum);
  }
}

// The same, by each warp those of its own rows of taps, where no other warp has sums of them.
template <class F>
__device__ __forceinline__ void put_own_sums(const Arguments& a, const Cursor<F>& cursor, const Share<F>& share,
                                             int band, int first_row, int last_row, int apart, int sums_at) {
  const int lane = threadIdx.x % 32, plane = lane % F::kFilters;
  if (plane >= cursor.filters(a)) return;
  for (int i = first_row, row = 0; i <= last_row; i += apart, ++row)
    for (int j = lane / F::kFilters; j < a.kernel_w; j += 32 / F::kFilters) {
      const float sum = sum_of<F>(a, sums_at, row, j, plane);
      put_tap<F>(a, cursor, share, plane, (i - band * a.band) * a.kernel_w + j, i, j, sum);
    }
}

// Copies an item's planes of a tensor, of so many filters a channel, by a warp of some.
template <class F>
__device__ __forceinline__ void copy_item(const Arguments& a, const Cursor<F>& cursor, const CUtensorMap* map,
                                          const float* from, const int64_t (&stride)[4], Copy how, int fan_out,
                                          int rows, int columns, int to, int unit_bytes, int barrier, int copier) {
  const int filter = cursor.filter(), filters = cursor.filters(a), image = cursor.image(), images = cursor.images(a);
  from += image * stride[0];
  if constexpr (F::kChannelsLast) {
    copy_planes<F>(map, from + filter * stride[1], stride, how, filter, image, images, filters, rows, columns, to,
                   unit_bytes, barrier, copier, a.copiers);
  } else {
#if __CUDA_ARCH__ >= 900
    if (F::kAlone && how.boxes) {
      if (copier == 0 && is_elected()) {
        expect_bytes(barrier, F::kPlanes * unit_bytes);
        copy_box(to, *map, 0, filter, image, 0, barrier);
      }
      __syncwarp();
      return;
    }
    if ((F::kOdd || F::kMisfit > 0 || F::kColumns) && how.bulk) {  // an image's planes follow each other
      const char* plane = reinterpret_cast<const char*>(from + filter / fan_out * stride[1]);
      const int misfit = reinterpret_cast<uintptr_t>(plane) % 16;
      const int bytes = (misfit + 4 * filters * rows * columns + 15) & -16;
      if (is_elected())
#pragma unroll 1
        for (int n = 0; n < images; ++n, plane += 4 * stride[0], to += F::kFilters * unit_bytes + F::kImageGap) {
          expect_bytes(barrier, bytes);
          copy_bulk(shared_address(to), plane - misfit, bytes, barrier);
        }
      __syncwarp();
      return;
    }
#endif
#pragma unroll 1
    for (int n = 0; n < filters; ++n)
      copy_planes<F>(map, from + (filter + n) / fan_out * stride[1], stride, how, filter, image, images, images, rows,
                     columns, to + n * unit_bytes, F::kFilters * unit_bytes, barrier, copier, a.copiers);
  }
}

// The number of the thread, asked for anew: so that what follows from it takes no registers meanwhile.
__device__ __forceinline__ uint32_t thread_anew() {
  uint32_t thread;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
  return thread;
}

// A warp's rows of taps, and the rows of the image that any of them meets. They lie so far apart that every group of
// them meets about as many. A single one may meet few, and leaves its issue slots to others.
template <class F>
struct TapRows {
  int kind, part, first, last, lowest, highest;

  __device__ TapRows(const Arguments& a, int band, int warp) : kind(a.kinds[warp]), part(kind / a.tap_groups) {
    first = band * a.band + kind - part * a.tap_groups;
    last = min(min((band + 1) * a.band, a.kernel_h) - 1, first + (F::kTapRows - 1) * a.tap_groups);
    lowest = max(first - a.padding_h, 0);
    highest = min(a.out_height - 1 + last - a.padding_h, a.height - 1);
  }
};

template <class F>
__global__ void __launch_bounds__(32 * F::kAllWarps, 1) lanes_grad_weight(const __grid_constant__ Arguments a) {
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
      init_barrier(stages.barriers + 16 * stage, (32 + kWarpArrivals) * a.copiers);
      init_barrier(stages.barriers + 16 * stage + 8, (warps + sums_bias) * kWarpArrivals);
    }
  if (F::has_clusters(a)) {
    const int index = max(end - 1, 0) / a.groups, taps = min(a.band, a.kernel_h - band * a.band) * a.kernel_w;
    const bool receives = share.rank(a) == 0 && share.ends_behind(a, index);
    const int sums = Cursor<F>(a, index * a.groups).filters(a) * (taps + sums_bias);
    enter_cluster(receives, totals_barrier(a), 4 * sums);
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
        const int at = stages.at * a.stage_bytes;
        copy_item(a, cursor, &a.input_map, a.input, a.input_stride, a.input_copy, a.multiplier, a.height, a.width, at,
                  a.input_unit_bytes, stages.full(), copier);
        copy_item(a, cursor, &a.grad_map, a.grad, a.grad_stride, a.grad_copy, 1, a.out_height, a.out_width,
                  at + a.grads_at, a.grad_unit_bytes, stages.full(), copier);
        arrive_after_copies(stages.full());
        // That arrival may come before the bytes that are expected: one more that comes after them.
        arrive_together(stages.full(), lane == 0);
        stages.advance(), cursor.advance(a);
        if (F::has_clusters(a) && item == first) meet_cluster();
      }
      if (behind == 0 || item - behind < first) continue;
      summed_stages.wait_full();
      bias += sum_gradients<F>(a, summed.images(a), summed_stages.at * a.stage_bytes + a.grads_at);
      arrive_together(summed_stages.empty(), lane == 0);
      summed_stages.advance();
      if (summed.group == a.groups - 1 || item - behind == end - 1) {
#pragma unroll
        for (int bit = 16; bit >= F::kFilters; bit /= 2) bias += __shfl_xor_sync(~0u, bias, bit);
        const int taps = min(a.band, a.kernel_h) * a.kernel_w;
        if (lane < summed.filters(a) && gather(a, summed, share, taps * F::kFilters + lane, bias) &&
            (!F::kChannelsLast || summed.filter() + lane >= a.shift))
          put<F>(a, summed, share, summed.filter() + lane, a.kernel_h * a.kernel_w, bias);
        bias = 0;
      }
      summed.advance(a);
    }
    if (F::has_clusters(a) && first >= end) meet_cluster();
    return;
  }
  if (F::has_clusters(a)) meet_cluster();

  const TapRows<F> known_rows(a, band, warp);
  const auto own_rows = [&] {
    if constexpr (F::kAlone)
      return TapRows<F>(a, band, thread_anew() / 32);
    else
      return known_rows;
  };
  if constexpr (F::kAlone) {
    // Where a warp's part of the rows of the image begins, in input and gradient, and its bytes and rows: in shared
    // memory, as registers are few.
#pragma unroll
    for (int t = 0; t < F::kTapRows; ++t) {
      const int tap_row = known_rows.first + t * a.tap_groups, part = known_rows.part;
      const int lowest = max(tap_row - a.padding_h, 0);
      const int end = tap_row > known_rows.last ? 0 : min(a.out_height + tap_row - a.padding_h, a.height);
      const int rows = max(end - lowest, 0), from = lowest + rows * part / a.parts;
      const int count = lowest + rows * (part + 1) / a.parts - from;
      if (lane == 0)
        shared<int4>(a.rows_at + 16 * (F::kTapRows * warp + t)) = {
            from * F::kRowBytes, (from + a.padding_h - tap_row) * F::kRowBytes, count * F::kRowBytes, count};
    }
    __syncwarp();
  }
  const int lane_row = F::row_of(lane);
  const int rows_at_once = F::kRows * a.parts;
  int sums_at = a.sums_at, other_sums_at = a.sums_at + (a.sums_buffers - 1) * a.sums_bytes;
  const bool never = a.batch < 0;  // which ptxas does not know
  const uint32_t base = once(shared_address(0));

  // How many rows of the image each of a row of taps' rows meets, and how often the warp has as many as lanes have at
  // once: in each item as often, or, for the first parts, once more.
  int most[F::kTapRows];
#pragma unroll
  for (int t = 0; t < F::kTapRows; ++t) {
    const int tap_row = known_rows.first + t * a.tap_groups;
    most[t] = tap_row <= known_rows.last ? min(a.out_height, a.height + a.padding_h - tap_row) : 0;
  }
  uint32_t steps = max(known_rows.highest - known_rows.lowest + F::kRows, 0) / F::kRows;
  const int rest = a.by_parts.split(steps);
  float total[F::kTapRows][F::kTaps] = {};  // where runs are added up in registers
  for (int item = first, own_part = known_rows.part; item < end;) {
    float sum[F::kTapRows][F::kTaps] = {};
    bool is_last;  // of its filters
    for (int left = a.run;;) {
      stages.wait_full();
      const uint32_t lane = (F::kAlone ? thread_anew() : threadIdx.x) % 32;
      const int lane_filter = F::filter_of(lane), lane_image = F::image_of(lane);
      const auto place_of = [&](int unit_bytes) {
        if (F::kChannelsLast) return 4 * lane_filter + lane_image * unit_bytes;
        return (lane_image * F::kFilters + lane_filter) * unit_bytes + lane_image * F::kImageGap;
      };
      const uint32_t stage = base + stages.at * a.stage_bytes;
      const uint32_t inputs =
          once(stage + place_of(a.input_unit_bytes) + (F::kOdd || F::kColumns ? a.input_misfit : 0));
      const uint32_t grads =
          once(stage + a.grads_at + place_of(a.grad_unit_bytes) + (F::kOdd || F::kColumns ? a.grad_misfit : 0));
      const bool is_own = lane_filter < cursor.filters(a) && lane_image < cursor.images(a);
      if constexpr (F::kAlone) {
        // The part's rows of the image, each lane from its first one on and around.
#pragma unroll
        for (int t = 0; t < F::kTapRows; ++t) {
          const int4 rows = shared<int4>(a.rows_at + 16 * (F::kTapRows * (thread_anew() / 32) + t));
          const int turn = F::turn_of(lane) * F::kRowBytes, end_bytes = rows.z;
          uint32_t source = once(inputs + rows.x + turn), grad = once(grads + rows.y + turn);
          const uint32_t behind = inputs + rows.x + end_bytes;
          if (is_own)
#pragma unroll 1
            for (int left = rows.w; left > 0; --left, source += F::kRowBytes, grad += F::kRowBytes) {
              if (F::kLayout == Layout::kRows && source == behind) source -= end_bytes, grad -= end_bytes;
              float x[F::kBlock];
              load_columns<F>(x, source);
              add_block<F, 0>(sum[t], x, grad, never);
            }
        }
      } else {
        const int row = known_rows.lowest + own_part * F::kRows + lane_row;
        uint32_t source = inputs + row * F::kRowBytes;
        // Of the gradient, what the row meets for the first of the rows of taps: what is none for idle lanes.
        int grad_row = is_own ? row + a.padding_h - known_rows.first : INT_MIN / 2;
#pragma unroll 1
        for (int n = steps + (own_part < rest); n > 0;
             --n, grad_row += rows_at_once, source += rows_at_once * F::kRowBytes) {
          const auto grad_of = [&](int t) { return static_cast<uint32_t>(grad_row - t * a.tap_groups); };
          const auto meets = [&](int t) { return grad_of(t) < static_cast<uint32_t>(most[t]); };
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
          if (F::kRunsOfRows && --left == 0) fold<F>(total, sum), left = a.run;
        }
      }
      arrive_together(stages.empty(), lane == 0);
      stages.advance(), ++item;
      if (++own_part == a.parts) own_part = 0;  // all warps have the most rows by turns
      is_last = cursor.group == a.groups - 1 || item == end;
      if (is_last) break;
      cursor.advance(a);
      if (!F::kRunsOfRows && --left == 0) {
        if (!F::kFolds) break;
        fold<F>(total, sum), left = a.run;
      }
    }
    if constexpr (F::kFolds) fold<F>(sum, total);
    const int own_sums = a.kinds[F::kAlone ? thread_anew() / 32 : warp] * F::kSumBytes;
    flush<F>(sum, sums_at + own_sums);
    if (!is_last) continue;
    const auto clear = [&](int from) {
      for (int at = 4 * lane; at < F::kSumBytes; at += 128) shared<float>(from + own_sums + at) = 0;
      __syncwarp();
    };
    if (F::kReach < 25 && a.parts == 1) {  // those of wider kernels have few rows
      __syncwarp();
      const TapRows<F> tap_rows = own_rows();
      put_own_sums<F>(a, cursor, share, band, tap_rows.first, tap_rows.last, a.tap_groups, sums_at + own_sums);
      __syncwarp();
      clear(sums_at);
    } else {
      const auto all_meet = [&] { meet<1>(32 * warps); };
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
  if (F::kColumns) a.input_unit_bytes = a.grad_unit_bytes = 4 * F::kSide * F::kSide;
  if (!F::kChannelsLast)
    for (int* bytes : {&a.input_unit_bytes, &a.grad_unit_bytes})
      *bytes = static_cast<int>(round_up(*bytes + 4 * F::kMisfit, F::kPlaneUnit)) | F::kPlaneUnit;
  constexpr int kUnits = F::kChannelsLast ? F::kImages : F::kPlanes, kGaps = F::kImages * F::kImageGap;
  a.grads_at = static_cast<int>(round_up(kUnits * a.input_unit_bytes + kGaps, kBoxUnit));
  a.stage_bytes = static_cast<int>(round_up(a.grads_at + kUnits * a.grad_unit_bytes + kGaps, kBoxUnit));
  const int warps = a.tap_groups * a.parts;
  a.sums_bytes = warps * F::kSumBytes;
  for (a.sums_buffers = 2;; --a.sums_buffers) {
    constexpr int kRowsBytes = F::kAlone ? 16 * F::kTapRows * F::kMostWarps : 0;
    const int rest = a.sums_buffers * a.sums_bytes + 16 * (kMostStages + 1) + kRowsBytes;
    a.stages = std::min(kMostStages, (shared_memory - 128 - rest) / a.stage_bytes);
    a.sums_at = a.stages * a.stage_bytes, a.barriers_at = a.sums_at + a.sums_buffers * a.sums_bytes;
    a.zeros_from = a.width == F::kSide && a.out_width == F::kSide ? a.sums_at : 0;
    a.rows_at = a.barriers_at + 16 * (kMostStages + 1), a.bytes = a.rows_at + kRowsBytes;
    if (a.stages >= 2) return a.bytes;
    if (a.sums_buffers == 1) return 0;
  }
}

// Gives warps the rows of taps of band 0, or parts of their rows of the image, so that schedulers, each of which has
// every fourth warp, have about as much to do: those that meet the most rows first.
template <class F>
void balance_warps(Arguments& a) {
  constexpr int kSchedulers = 4;
  const int count = a.tap_groups * a.parts;
  const auto met = [&](int kind) {
    const int part = kind / a.tap_groups, group = kind - part * a.tap_groups;
    int sum = 0;
    for (int t = group; t < a.band; t += a.tap_groups) {
      const int first = std::max(t - a.padding_h, 0), end = std::min(a.out_height + t - a.padding_h, a.height);
      const int rows = std::max(end - first, 0);
      sum += rows * (part + 1) / a.parts - rows * part / a.parts;
    }
    return sum;
  };
  int order[F::kMostWarps], load[kSchedulers] = {}, warps[kSchedulers] = {};
  std::iota(order, order + count, 0);
  std::stable_sort(order, order + count, [&](int one, int other) { return met(one) > met(other); });
  for (int rank = 0; rank < count; ++rank) {
    int best = -1;
    for (int scheduler = 0; scheduler < kSchedulers; ++scheduler)
      if (kSchedulers * warps[scheduler] + scheduler < count && (best < 0 || load[scheduler] < load[best]))
        best = scheduler;
    a.kinds[kSchedulers * warps[best]++ + best] = static_cast<signed char>(order[rank]);
    load[best] += met(order[rank]);
  }
}

// Cuts the rows of taps into bands, and the rows of the image into parts, so that schedulers, each of which has every
// fourth warp, have the least to do: for a row of taps, and for the planes that each band loads.
template <class F>
void cut(Arguments& a, int copiers) {
  // Of what a warp takes for a row of taps. In channels_last parts cost more than they divide.
  constexpr double kLoad = 0.4, kWait = 0.3, kPart = F::kChannelsLast ? 0.08 : 0;
  double least = 0;
  for (int bands = static_cast<int>(ceil_div(a.kernel_h, F::kTapRows * F::kMostWarps)); bands <= a.kernel_h; ++bands) {
    const int band = static_cast<int>(ceil_div(a.kernel_h, bands));
    const int groups = static_cast<int>(ceil_div(band, F::kTapRows));
    for (int parts = 1; parts * groups <= F::kMostWarps && (parts - 1) * F::kRows < a.height; ++parts) {
      if ((parts > 1 || bands < a.kernel_h) && parts * groups + copiers > F::kAllWarps) break;
      const double warps = static_cast<double>(ceil_div(groups * parts, 4));  // of a scheduler
      const double cost = bands * ((warps + kWait) * F::kTapRows / parts + kLoad + kPart * (parts - 1));
      if (least == 0 || cost < least)
        least = cost, a.bands = bands, a.band = band, a.tap_groups = groups, a.parts = parts;
    }
  }
}

// Makes clusters of two blocks where these share one filter, and no others do: then no second kernel has to add up.
template <class F>
void join_clusters(Arguments& a, void (*kernel)(Arguments), int shared_memory) {
  a.cluster = 1;
  constexpr int kBlocks = 2;
  if (!F::kClusters || a.slots == 1 || a.rest > 0 || kBlocks * a.share % a.groups != 0 || !can_overlap(kernel)) return;
  a.totals_at = a.bytes, a.totals_bytes = static_cast<int>(round_up(4 * (a.band * a.kernel_w + 1) * F::kFilters, 16));
  const int bytes = a.bytes + a.totals_bytes, blocks = static_cast<int>(round_up(a.blocks, kBlocks));
  if (bytes + 128 > shared_memory) return;
  a.bytes = bytes, a.blocks = blocks, a.cluster = kBlocks, a.slots = 1;
}

// Describes boxes of as many planes as an item has, which lie close together in shared memory, where they are an odd
// number of 16 bytes apart so.
template <class F>
bool describe_dense_planes(CUtensorMap& map, const float* from, const int64_t (&stride)[4], int filters, int batch,
                           int rows) {
  const int pixels = rows * F::kSide;
  return pixels % 8 == 4 &&
         describe_boxes(map, const_cast<float*>(from), 4, {pixels, filters, batch, 1},
                        {4 * stride[1], 4 * stride[0], 4 * stride[0]}, {pixels, F::kFilters, F::kImages, 1});
}

// How many bytes behind a multiple of 16 planes begin that the form takes so: 0 if it does not.
template <class F>
int misfit_of(const float* from, const int64_t (&stride)[4], int rows, int columns) {
  const int misfit = static_cast<int>(reinterpret_cast<uintptr_t>(from) % 16), pixels = rows * columns;
  if (stride[3] != 1 || stride[2] != columns || columns != F::kSide || (stride[0] | stride[1]) % 4 != 0) return 0;
  // Behind a plane that is followed by zeros the next one would begin.
  if (F::kColumns) return rows == F::kSide ? misfit : 0;
  if (!F::kAlone) return misfit == 4 * F::kMisfit ? misfit : 0;
  return stride[1] == pixels && pixels % 8 == 4 && misfit % 8 == 4 ? misfit : 0;
}

template <class F>
bool launch(const Problem& p, Arguments a, const Allocate& allocate, cudaStream_t stream) {
  const int64_t multiprocessors = current_device().multiprocessors;
  const bool has_bulk_copies = p.capability >= 90;
  if constexpr (F::kColumns) {
    const auto is_served = [](const int64_t (&stride)[4], int rows) {
      return rows == F::kSide && stride[2] == 1 && stride[3] == rows;
    };
    if (!is_served(a.input_stride, a.height) || !is_served(a.grad_stride, a.out_height)) return false;
    a.input_copy = copy_of<F>(a.input, p.input.stride, a.filters, a.width, a.height, has_bulk_copies);
    a.grad_copy = copy_of<F>(a.grad, p.output.stride, a.filters, a.out_width, a.out_height, has_bulk_copies);
    if (has_bulk_copies) {
      a.input_misfit = misfit_of<F>(a.input, p.input.stride, a.width, a.height);
      a.grad_misfit = misfit_of<F>(a.grad, p.output.stride, a.out_width, a.out_height);
      a.input_copy.bulk |= a.input_misfit > 0, a.grad_copy.bulk |= a.grad_misfit > 0;
    }
  } else {
    a.input_copy = copy_of<F>(a.input, a.input_stride, a.filters, a.height, a.width, has_bulk_copies);
    a.grad_copy = copy_of<F>(a.grad, a.grad_stride, a.filters, a.out_height, a.out_width, has_bulk_copies);
  }
  if (F::kChannelsLast && has_bulk_copies) {
    // Tensors that begin between multiples of 16 bytes are boxes of the multiple before, whose filters are counted from
    // there.
    const auto shift_of = [](const float* from) { return static_cast<int>(reinterpret_cast<uintptr_t>(from) / 4 % 4); };
    const int shift = shift_of(a.input), filters = a.filters + shift;
    const float *const input = a.input - shift, *const grad = a.grad - shift;
    a.input_copy.bulk = a.grad_copy.bulk =
        shift == shift_of(a.grad) &&
        describe_planes<F>(a.input_map, input, a.input_stride, filters, a.batch, a.height, a.width) &&
        describe_planes<F>(a.grad_map, grad, a.grad_stride, filters, a.batch, a.out_height, a.out_width);
    if (a.input_copy.bulk) a.shift = shift, a.filters = filters, a.input = input, a.grad = grad;
  }
  if (F::kAlone && !F::kChannelsLast) {
    a.input_copy.boxes = a.input_copy.bulk && a.multiplier == 1 &&
                         describe_dense_planes<F>(a.input_map, a.input, a.input_stride, a.filters, a.batch, a.height);
    a.grad_copy.boxes = a.grad_copy.bulk &&
                        describe_dense_planes<F>(a.grad_map, a.grad, a.grad_stride, a.filters, a.batch, a.out_height);
  }
  if constexpr (F::kOdd || F::kMisfit > 0) {
    a.input_misfit = misfit_of<F>(a.input, a.input_stride, a.height, a.width);
    a.grad_misfit = misfit_of<F>(a.grad, a.grad_stride, a.out_height, a.out_width);
    if (!has_bulk_copies || a.multiplier > 1 || a.input_misfit == 0 || a.grad_misfit == 0) return false;
    a.input_copy.bulk = a.grad_copy.bulk = true;
  }
  // A warp takes as long for as many copies as all the others together for kCopies / its vector taps.
  constexpr int kCopies = 400;
  const bool bulk = a.input_copy.bulk && a.grad_copy.bulk;
  if (F::kAlone && F::kBulk && !bulk) return false;
  const int copies = std::min(a.input_copy.vector, a.grad_copy.vector) * a.kernel_h * a.kernel_w;
  cut<F>(a, bulk ? 1 : std::min(1 + kCopies / copies, F::kAllWarps / 2));
  a.copiers = bulk ? 1 : F::kAllWarps - a.tap_groups * a.parts;
  std::iota(a.kinds, a.kinds + a.tap_groups * a.parts, static_cast<signed char>(0));
  if (F::kAlone) balance_warps<F>(a);
  a.groups = static_cast<int>(ceil_div(a.batch, F::kImages));
  a.items = a.groups * static_cast<int>(ceil_div(a.filters, F::kFilters));
  // Smaller problems are spread over the device in smaller pieces.
  if (2 * int64_t{a.items} * a.bands < multiprocessors || place<F>(a, static_cast<int>(p.shared_memory)) == 0)
    return false;
  const int64_t most_blocks = std::max<int64_t>(multiprocessors / a.bands, 1);
  a.splits = F::kChannelsLast ? static_cast<int>(most_blocks * a.groups / a.items) : 0;
  if (a.splits > 0) {
    // Blocks that read neighbouring channels of a pixel do so at the same time.
    const int filters = a.items / a.groups, others = static_cast<int>(most_blocks) - filters * a.splits;
    a.share = static_cast<int>(ceil_div(a.groups, std::min(a.splits, a.groups)));
    if (others > 0) {
      a.rests = static_cast<int>(ceil_div(filters, others));
      const int less = static_cast<int>(ceil_div(a.groups * a.rests, 1 + a.splits * a.rests));
      if (less < a.share && less * a.splits < a.groups) a.share = less, a.rest = less * a.splits;
    }
    if (a.rest == 0) a.splits = static_cast<int>(ceil_div(a.groups, a.share));
    a.slots = a.splits + (a.rest > 0);
  } else {
    a.share = static_cast<int>(ceil_div(a.items, most_blocks));
    a.slots = a.share % a.groups == 0   ? 1
              : a.groups % a.share == 0 ? a.groups / a.share
                                        : static_cast<int>(ceil_div(a.groups - 1, a.share)) + 1;
  }
  a.blocks = static_cast<int>(a.splits > 0 ? a.items / a.groups * a.splits : ceil_div(a.items, a.share));
  if (a.rest > 0) a.blocks += static_cast<int>(ceil_div(a.items / a.groups, a.rests));
  const auto kernel = lanes_grad_weight<F>;
  const int threads = 32 * (a.tap_groups * a.parts + a.copiers);
  join_clusters<F>(a, kernel, static_cast<int>(p.shared_memory));
  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, a.bytes);
  const WeightSums sums = weight_sums(p, a.slots, allocate);
  a.sums = sums;
  if (a.shift > 0) {  // sums are counted as filters are
    a.sums.grad_weight = static_cast<float*>(a.sums.grad_weight) - a.shift * a.sums.taps;
    if (a.sums.grad_bias != nullptr) a.sums.grad_bias = static_cast<float*>(a.sums.grad_bias) - a.shift;
    if (a.sums.partial != nullptr) a.sums.partial -= a.shift;
  }
  a.by_kernel_w = Divider(a.kernel_w), a.by_tap_groups = Divider(a.tap_groups), a.by_parts = Divider(a.parts);
  const int64_t wanted = products_of_run(a.batch, int64_t{a.out_height} * a.out_width);
  const int products = F::kFolds ? static_cast<int>(std::min<int64_t>(wanted, F::kRun)) : F::kRun;
  a.run = products / (F::kRunsOfRows ? a.out_width : std::max(a.height / (F::kRows * a.parts) * F::kSide, 1));
  a.run = std::max(a.run, 1);
  launch_early(kernel, a, int64_t{a.blocks} * a.bands, threads, stream, {a.cluster, a.bytes});
  check_launch("lanes_grad_weight");
  launch_add_partial_sums(p, sums, a.slots, stream);
  return true;
}

template <Layout kLayout>
bool launch_form(const Problem& p, const Arguments& a, const Allocate& allocate, cudaStream_t stream) {
  const int number = find_lanes_form(kLayout == Layout::kChannelsLast, a.batch, a.filters, a.width, a.out_width,
                                     a.kernel_w, a.padding_w);
  const auto launch_it = [&](auto form) {
    constexpr int kNumber = decltype(form)::value;
    // Lanes on planes alone would meet in the same banks.
    using Usual = Form<kNumber, kLayout>;
    if constexpr (kLayout == Layout::kColumns && Form<kNumber, Layout::kRows>::kAlone)
      return false;
    else if constexpr (Usual::kAlone)
      return number == kNumber &&
             (launch<Usual>(p, a, allocate, stream) ||
              (kLayout == Layout::kRows && launch<Form<kNumber, Layout::kRows, true, 1>>(p, a, allocate, stream)) ||
              launch<Form<kNumber, kLayout, false>>(p, a, allocate, stream));
    else if constexpr (kLayout == Layout::kRows)
      return number == kNumber &&
             (launch<Form<kNumber, kLayout, true, 1>>(p, a, allocate, stream) || launch<Usual>(p, a, allocate, stream));
    else
      return number == kNumber && launch<Usual>(p, a, allocate, stream);
  };
  return [&]<int... kNumber>(std::integer_sequence<int, kNumber...>) {
    return (launch_it(std::integral_constant<int, kNumber>{}) || ...);
  }(std::make_integer_sequence<int, static_cast<int>(std::size(kLanesForms))>{});
}

}  // namespace

bool launch_lanes_grad_weight(const Problem& p, const Allocate& allocate, cudaStream_t stream) {
  if (p.capability < 80) return false;
  Arguments a{};
  if (take_gradients(a, p)) return launch_form<Layout::kChannelsLast>(p, a, allocate, stream);
  return (a.turned && launch_form<Layout::kColumns>(p, a, allocate, stream)) ||
         launch_form<Layout::kRows>(p, a, allocate, stream);
}

}  // namespace dwconv
