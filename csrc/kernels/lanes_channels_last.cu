// Forward, and grad_input at stride 1, of large kernels in float32 and channels_last on planes about as wide as code is
// compiled for, on CUDA cores: from sm_90 on.
//
// As in lanes.cu, a lane has the sums of a row of outputs, or of half of it, in registers, and walks down the kernel,
// and what meets along a row is straight code. Here the lanes of a warp lie on channels and on rows. A block has some
// channels of some images, one after the other.
//
// Rows stream through shared memory. Some warps let boxes arrive, some rows of all channels each, and turn them on
// their way to a ring, where each channel's rows are contiguous: four pixels of four channels at once. The other warps
// take chunks of rows, in the order of the images, from a counter of their scheduler's, wait for the last rows of the
// source that they meet, and say when they are done: so the first ones know which rows of the ring are free. When all
// rows are there, these take chunks as well.
//
// Where planes are two blocks of columns wide, products within a block have one loop over the rows, those with the
// other block another: the code of each fits the instruction caches, and both blocks have the first loop in common.
//
// Sources that begin between multiples of 16 bytes are boxes of the multiple before, whose channels are counted from
// there. So the first ones are those of the pixel before: their lanes have the last channels instead, of which there
// are as many, from boxes of their own.
//
// Columns that planes, and kernels, lack are zero, and give NaN where they meet Inf or NaN. So outputs that are not
// finite are computed again.
#include "lanes_channels_last.h"

#include <algorithm>
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

constexpr int kWarps = 16;       // of a block
constexpr int kSchedulers = 4;   // of a multiprocessor: warps take turns at them
constexpr int kBoxes = 4;        // that arrive at once
constexpr int kAsked = 2;        // bands that each warp which fills the ring asks for in L2 before
constexpr int kMostBands = 64;   // of the ring
constexpr int kMostTasks = 128;  // that are known not to be done

// How the lanes of a form lie on planes, and these in shared memory.
template <int kNumber, bool kShifted_>
struct Form {
  static constexpr bool kShifted = kShifted_;  // whether the source begins between multiples of 16 bytes
  static constexpr ChannelsForm kForm = kChannelForms[kNumber];
  static constexpr int kSide = kForm.side, kReach = kForm.reach;
  static constexpr int kBlock = kSide == 56 ? 28 : kSide, kBlocks = kSide / kBlock;  // outputs of a lane
  static constexpr int kUnits = kForm.units();                                       // channels of a warp
  static constexpr bool kDownImage = kSide == 14;         // or else lanes walk down the kernel
  static constexpr int kLaneRows = kDownImage ? 2 : 1;    // of outputs
  static constexpr int kRows = 32 / kUnits * kLaneRows;   // of a warp
  static constexpr int kRowsBefore = kDownImage ? 1 : 0;  // of zeros, before the weights of each channel
  static_assert(!kDownImage || kRows == kLaneRows);
  // Warps that fill the ring: few where tasks are short, as warps that go from one to the next leave others to
  // multiply, or where little is read for what is multiplied.
  static constexpr int kCopiers = kReach < 13 || kReach == 25 ? 2 : 4;
  static constexpr int kBandRows = kSide == 14 ? 2 : 4;  // of a box, and of what becomes free in the ring at once
  static constexpr int kTaps = 2 * kReach + 1;
  static constexpr int kPixels = (kSide + 3) / 4 * 4;  // of a row
  static constexpr int kRowBytes = 4 * kPixels;
  static constexpr int kBoxBytes = kBandRows * kUnits * kRowBytes;
  static constexpr int kLastBytes = kShifted ? kBandRows * 4 * kRowBytes : 0;  // of a box of the last channels
  static constexpr int kWeightBytes = (kTaps + 3) / 4 * 16;                    // from row to row
  static constexpr int kZeroBytes = std::max(kRowBytes, kWeightBytes);
  // Fours of channels, and of pixels of a band, that are turned.
  static constexpr int fours() { return kUnits / 4; }
  static constexpr int band_fours() { return kBandRows * kPixels / 4; }
  // In the ring, places from one channel of a four to the next: so that those of fours which a warp turns at once are
  // in different banks, as are neighbouring places.
  static constexpr int step() { return fours() > 2 ? fours() : 1; }
  static constexpr int channel_at(int place) { return step() > 1 ? place % fours() * 4 + place / fours() : place; }
};

// Plain loads ptxas puts ahead of their use, as volatile ones, by address, it does not; with 31 taps it then finds
// worse banks.
template <class F>
constexpr bool kByAddress = F::kDownImage || F::kReach == 15;

struct Arguments {
  CUtensorMap map, last_map;  // of boxes of the source, and of those of its last channels
  const float* source;
  const float* weight;
  const float* bias;
  float* target;
  int64_t source_stride[4], target_stride[4], weight_stride[4], bias_stride;  // in elements
  int batch, height, width, out_height, out_width, kernel_h, kernel_w, padding_h, padding_w, fan_out;
  int filters;
  int shift;                 // elements from a multiple of 16 bytes to the source
  bool wraps;                // whether lanes of the first channels have the last ones
  int pixel_bytes;           // from column to column of the target
  int groups, share;         // groups of channels; images of a block
  int bands, chunks, tasks;  // of an image: what it is read in, rows of warps, and what warps take from the counter
  int warps, copiers;        // that compute, and that fill the ring
  int ring_bands;
  int channel_bytes, kernel_bytes;                                 // from channel to channel
  int last_at, ring_at, weights_at, zeros_at, barriers_at, bytes;  // in shared memory, behind the boxes
  Divider by_tasks, by_ring_bands, by_ring_rows;
};

constexpr int kBarriers = kBoxes + kMostBands + kMostTasks + 1;

// Barriers: a box is there, rows of the ring are there, a task is done, all weights are there. Templates, or compilers
// would miss their use where code is for GPUs before sm_90.
template <class A>
__device__ int box_barrier(const A& a, int box) {
  return a.barriers_at + 8 * box;
}
template <class A>
__device__ int band_barrier(const A& a, int slot) {
  return a.barriers_at + 8 * (kBoxes + slot);
}
template <class A>
__device__ int task_barrier(const A& a, int task) {
  return a.barriers_at + 8 * (kBoxes + kMostBands + task % kMostTasks);
}
template <class A>
__device__ int weights_barrier(const A& a) {
  return a.barriers_at + 8 * (kBarriers - 1);
}

// The filter at a place in the ring, of those that begin with `first`; at least a.filters if there is none.
template <class F>
__device__ int filter_of(const Arguments& a, int first, int place) {
  const int channel = first + F::channel_at(place);
  if (!F::kShifted) return channel;
  return channel - a.shift + (channel < a.shift ? a.groups * F::kUnits : 0);
}

// The place in the ring of a row, which may lie before the ring's first one, by no more rows than the ring has.
template <class F>
__device__ __forceinline__ int place_in_ring(const Arguments& a, int row) {
  uint32_t place = row + F::kBandRows * a.ring_bands;
  return a.by_ring_rows.split(place);
}

// The last band of an image that a chunk meets: at least one row, as kernels do not lie beside images.
template <class F>
__host__ __device__ int last_band_of(const Arguments& a, int chunk) {
  const int row = chunk * F::kRows + F::kRows - 1 - a.padding_h + a.kernel_h - 1;
  return (row < a.height ? row : a.height - 1) / F::kBandRows;
}

// The last chunk that meets a band of an image.
template <class F>
__host__ __device__ int last_chunk_of(const Arguments& a, int band) {
  const int chunk = (F::kBandRows * band + F::kBandRows - 1 + a.padding_h) / F::kRows;
  return chunk < a.chunks ? chunk : a.chunks - 1;
}

// A number that stays in a register: what ptxas thinks cheap it works out anew in every step, from arguments.
template <typename T>
__device__ __forceinline__ T kept(T value) {
  return __shfl_sync(~0u, value, threadIdx.x % 32);
}

// All products of a row of weights, and a block of pixels that begins kShift columns behind the outputs.
template <class F, int kShift>
__device__ __forceinline__ void add_block(float (&sum)[2][F::kBlock], int source, int weight, int positive) {
  constexpr int kBlock = F::kBlock, kReach = F::kReach;
  constexpr int kFirst = std::max(kShift - kBlock + 1, -kReach) + kReach;
  constexpr int kLast = std::min(kShift + kBlock - 1, kReach) + kReach;
  constexpr int kBegin = std::max(0, -kReach - kShift), kEnd = std::min(kBlock, kBlock + kReach - kShift);
  // After so many taps ptxas finds a test, and does not mix their FMA with others.
  constexpr int kTogether = F::kSide == 28 ? 4 : kReach == 15 ? 8 : F::kTaps;
  alignas(16) float x[F::kPixels], w[F::kWeightBytes / 4];
  const auto load = [](float* to, int from) {
    if constexpr (kByAddress<F>)
      load_four(to, from);
    else
      reinterpret_cast<float4&>(*to) = shared<float4>(from);
  };
#pragma unroll
  for (int u = kBegin / 4 * 4; u < kEnd; u += 4) load(&x[u], source + 4 * u);
#pragma unroll
  for (int tap = kFirst / 4 * 4; tap < kFirst + 4; tap += 4) load(&w[tap], weight + 4 * tap);
#pragma unroll
  for (int tap = kFirst; tap <= kLast; ++tap) {
    if (tap > kFirst && tap % kTogether == 0 && positive == -tap) asm volatile("trap;");
    if (tap % 4 == 0 && tap + 4 <= kLast) load(&w[tap + 4], weight + 4 * (tap + 4));
#pragma unroll
    for (int n = 0; n < kBlock; ++n) {
      const int o = tap % 2 == 0 ? n : kBlock - 1 - n, u = o + tap - kReach - kShift;
      if (u >= 0 && u < kBlock) sum[tap % 2][o] = fmaf(x[u], w[tap], sum[tap % 2][o]);
    }
  }
}

// All products of a row of pixels and two rows of weights, for as many rows of outputs, with a test between them.
template <class F>
__device__ __forceinline__ void add_to_two_rows(float (&sum)[2][2][F::kBlock], uint32_t source,
                                                const float (&upper)[F::kWeightBytes / 4],
                                                const float (&lower)[F::kWeightBytes / 4], int positive) {
  constexpr int kBlock = F::kBlock;
  float x[F::kPixels];
  load_row(x, source);
#pragma unroll
  for (int row = 0; row < 2; ++row) {
    if (row == 1 && positive == -row) asm volatile("trap;");
#pragma unroll
    for (int tap = 0; tap < F::kTaps; ++tap)
#pragma unroll
      for (int n = 0; n < kBlock; ++n) {
        const int o = tap % 2 == 0 ? n : kBlock - 1 - n, u = o + tap - F::kReach;
        float& to = sum[row][(tap + row) % 2][o];
        if (u >= 0 && u < kBlock) to = fmaf(x[u], (row == 0 ? upper : lower)[tap], to);
      }
  }
}

// Walks down the kernel, of which a row meets another row of the image for each of the warp's rows. `image_row`: the
// place in the ring of the image's first row; `first_row`: of the outputs.
template <class F, int kShift>
__device__ __forceinline__ void walk_down_kernel(float (&sum)[2][F::kBlock], const Arguments& a, int ring, int weight,
                                                 int zeros, int image_row, int first_row, int row) {
  // Rows of the kernel in which any lane meets the image: at least one.
  const int begin = max(a.padding_h - (first_row + F::kRows - 1), 0);
  const int end = min(a.height + a.padding_h - first_row, a.kernel_h), ring_rows = F::kBandRows * a.ring_bands;
  const int positive = a.batch;  // which ptxas does not know
  uint32_t y = row - a.padding_h + begin;
  int source = ring + place_in_ring<F>(a, image_row + static_cast<int>(y)) * F::kRowBytes;
  const int past = ring + ring_rows * F::kRowBytes;
  weight += begin * F::kWeightBytes;
  int left = end - begin;
#pragma unroll 1
  do {
    // A warp with one row meets no others.
    const bool inside = F::kRows == 1 || y < static_cast<uint32_t>(a.height);
    add_block<F, kShift>(sum, inside ? source : zeros, weight, positive);
    ++y, source += F::kRowBytes, weight += F::kWeightBytes;
    if (source == past) source = ring;
  } while (--left > 0);
}

// Walks down the image, of which a row meets another row of the kernel for each row of outputs: where kernels reach
// beyond the image, no step is in vain. A lane has two rows, of which the lower one meets what the upper one has met:
// at first, or at last, one of them may meet the row of zeros before the weights of a channel, or those of the next.
template <class F>
__device__ __forceinline__ void walk_down_image(float (&sum)[2][2][F::kBlock], const Arguments& a, uint32_t ring,
                                                uint32_t weight, int image_row, int row) {
  const int begin = max(row - a.padding_h, 0);
  const int end = min(row + F::kRows - 1 - a.padding_h + a.kernel_h, a.height);
  const int positive = kept(a.batch);  // which ptxas does not know
  ring = kept(ring);
  uint32_t source = ring + place_in_ring<F>(a, image_row + begin) * F::kRowBytes;
  const uint32_t past = kept(ring + F::kBandRows * a.ring_bands * F::kRowBytes);
  weight += (begin - row + a.padding_h - 1) * F::kWeightBytes;
  const auto load_next = [&](float (&to)[F::kWeightBytes / 4]) {
    load_row(to, weight);
    weight += F::kWeightBytes;
  };
  const auto add = [&](const float (&upper)[F::kWeightBytes / 4], const float (&lower)[F::kWeightBytes / 4]) {
    add_to_two_rows<F>(sum, source, upper, lower, positive);
    source += F::kRowBytes;
    if (source == past) source = ring;
  };
  float one[F::kWeightBytes / 4], other[F::kWeightBytes / 4];
  load_next(other);
  int left = end - begin;
#pragma unroll 1
  do {
    load_next(one);
    add(one, other);
    if (left <= 1) break;
    load_next(other);
    add(other, one);
  } while ((left -= 2) > 0);
}

// Writes a lane's row of outputs, of a block of columns, if it has one.
template <class F>
__device__ __forceinline__ void store_row(float (&sum)[2][F::kBlock], const Arguments& a, int filter, int image,
                                          int row, int column, float bias, float* to) {
  constexpr int kBlock = F::kBlock;
  const int columns = min(a.out_width - column, kBlock);
#pragma unroll
  for (int o = 0; o < kBlock; ++o) sum[0][o] += sum[1][o];
  // Any number times Inf or NaN is not finite; what is too large is just found to be so in vain.
  float products = 0;
#pragma unroll
  for (int o = 0; o < kBlock; o += 2) products = fmaf(sum[0][o], sum[0][o + 1], products);
  const bool again = __shfl_sync(~0u, __any_sync(~0u, products * 0 != 0.f), 0);
  if (filter >= a.filters || row >= a.out_height) return;
  const auto at = [&](int o) {
    return reinterpret_cast<float*>(reinterpret_cast<char*>(to) + int64_t{o} * a.pixel_bytes);
  };
  if (columns == kBlock) {
#pragma unroll
    for (int o = 0; o < kBlock; ++o) *at(o) = sum[0][o];
  } else {
#pragma unroll
    for (int o = 0; o < kBlock - 1; ++o)
      if (o < columns) *at(o) = sum[0][o];
  }
  if (again)
#pragma unroll 1
    for (int o = 0; o < columns; ++o)
      if (!is_finite(*at(o))) *at(o) = sum_by_taps(a, filter, image, row, column + o) + bias;
}

// What a warp takes at once: a block of columns of some rows of an image's channels. `base`: where shared memory begins
// for loads by address, or 0.
template <class F>
__device__ __forceinline__ void compute(const Arguments& a, int filter, int image, uint32_t base, int image_row,
                                        int chunk, bool is_right) {
  constexpr int kBlock = F::kBlock, kLaneRows = F::kLaneRows;
  const int lane = threadIdx.x % 32, own = lane % F::kUnits;
  const int first_row = chunk * F::kRows, row = first_row + lane / F::kUnits * kLaneRows;
  const int column = is_right ? kBlock : 0;
  const uint32_t ring = base + a.ring_at + own * a.channel_bytes, zeros = base + a.zeros_at;
  const uint32_t weight = base + a.weights_at + own * a.kernel_bytes + F::kRowsBefore * F::kWeightBytes;
  filter = filter_of<F>(a, filter, own);
  const float bias = a.bias && filter < a.filters ? a.bias[filter * a.bias_stride] : 0;
  float sum[kLaneRows][2][kBlock];
#pragma unroll
  for (int n = 0; n < kLaneRows; ++n)
#pragma unroll
    for (int o = 0; o < kBlock; ++o) sum[n][0][o] = bias, sum[n][1][o] = 0;
  if constexpr (F::kDownImage) {
    walk_down_image<F>(sum, a, ring, weight, image_row, row);
  } else {
    walk_down_kernel<F, 0>(sum[0], a, ring + 4 * column, weight, zeros, image_row, first_row, row);
    if constexpr (F::kBlocks > 1) {
      if (is_right)
        walk_down_kernel<F, -kBlock>(sum[0], a, ring, weight, zeros, image_row, first_row, row);
      else
        walk_down_kernel<F, kBlock>(sum[0], a, ring + 4 * kBlock, weight, zeros, image_row, first_row, row);
    }
  }
  float* const to = a.target + image * a.target_stride[0] + filter * a.target_stride[1] + row * a.target_stride[2] +
                    column * a.target_stride[3];
#pragma unroll
  for (int n = 0; n < kLaneRows; ++n)
    store_row<F>(sum[n], a, filter, image, row + n, column, bias, to + n * a.target_stride[2]);
}

// Turns four pixels of four channels, of which so many are wanted. `step`: from channel to channel.
template <int kPixelBytes, bool kAll>
__device__ __forceinline__ void turn_four(uint32_t from, uint32_t to, int step, int wanted = 4) {
  float x[4][4];  // pixels, channels
#pragma unroll
  for (int pixel = 0; pixel < 4; ++pixel) load_four(x[pixel], from + pixel * kPixelBytes);
#pragma unroll
  for (int channel = 0; channel < (kAll ? 4 : 3); ++channel)
    if (kAll || channel < wanted)
      asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(to + channel * step), "f"(x[0][channel]),
                   "f"(x[1][channel]), "f"(x[2][channel]), "f"(x[3][channel])
                   : "memory");
}

// Where a lane finds the pixels that it turns in a box, and where they go in a band of the ring.
template <class F>
struct BoxTurner {
  static constexpr int kCount = (F::fours() * F::band_fours() + 31) / 32;
  int from[kCount], to[kCount];
  bool last;  // whether there are pixels for the last one

  __device__ explicit BoxTurner(int channel_bytes) {
#pragma unroll
    for (int n = 0; n < kCount; ++n) {
      const int at = threadIdx.x % 32 + 32 * n, four = at % F::fours();
      int pixels = at / F::fours();
      // Of 8 lanes that store at once two have each four: their pixels are to be 64 bytes apart.
      if (F::fours() == 4) pixels = pixels / 8 * 8 + pixels % 2 * 4 + pixels / 2 % 4;
      from[n] = 16 * (F::kUnits * pixels + four);
      to[n] = (F::step() > 1 ? four : 4 * four) * channel_bytes + 16 * pixels;
      last = pixels < F::band_fours();
    }
  }

  __device__ __forceinline__ void turn(uint32_t box, uint32_t band, int channel_bytes) const {
#pragma unroll
    for (int n = 0; n < kCount; ++n) {
      if (n == kCount - 1 && !last) break;
      turn_four<4 * F::kUnits, true>(box + from[n], band + to[n], F::step() * channel_bytes);
    }
  }
};

// Turns the last channels, whose pixels are units of 16 bytes, to where the first ones were put before.
template <class F>
__device__ __forceinline__ void turn_last(uint32_t box, uint32_t band, int channel_bytes, int channels) {
  __syncwarp();
#pragma unroll
  for (int at = threadIdx.x % 32; at < F::band_fours(); at += 32)
    turn_four<16, false>(box + 64 * at, band + 16 * at, F::step() * channel_bytes, channels);
}

// Where a warp is that takes every a.copiers-th band of a block's images.
struct BandCursor {
  int image = 0, band = 0;  // band: of the image

  __device__ BandCursor(const Arguments& a, int bands) { advance(a, bands); }
  __device__ void advance(const Arguments& a, int bands) {
    for (band += bands; band >= a.bands; band -= a.bands) ++image;
  }
};

// Lets boxes arrive and turns them: every a.copiers-th band of a block's images, by one of as many warps.
template <class F>
__device__ __forceinline__ void fill_ring(const Arguments& a, int filter, int first_image, int images, uint32_t base,
                                          int copier) {
  const int boxes = kBoxes / a.copiers, first_box = copier * boxes;
  // What is asked for next, and what the next band takes the place of.
  BandCursor next(a, copier), freed(a, (copier + (a.copiers - 1) * a.ring_bands) % a.copiers);
  const bool wraps = F::kShifted && a.wraps && filter == 0;
  const auto ask = [&](int box) {
    if (next.image >= images) return;
    if (is_elected()) {
      const int barrier = box_barrier(a, box), row = next.band * F::kBandRows, image = first_image + next.image;
      expect_bytes(barrier, wraps ? F::kBoxBytes + F::kLastBytes : F::kBoxBytes);
      copy_box(box * F::kBoxBytes, a.map, filter, 0, row, image, barrier);
      if (wraps) copy_box(a.last_at + box * F::kLastBytes, a.last_map, a.groups * F::kUnits, 0, row, image, barrier);
      arrive(barrier);
    }
    __syncwarp();
    next.advance(a, a.copiers);
  };
  for (int box = 0; box < boxes; ++box) ask(first_box + box);
  const BoxTurner<F> turner(a.channel_bytes);
  int box = 0, box_parity = 0, slot = copier, parity = 0, done = 0;  // done: tasks that are known to be
#pragma unroll 1
  for (int at = copier; at < images * a.bands; at += a.copiers) {
    wait(box_barrier(a, first_box + box), box_parity);
    if (at >= a.ring_bands) {
      const int end = freed.image * a.tasks + (last_chunk_of<F>(a, freed.band) + 1) * F::kBlocks;
      for (; done < end; ++done) wait(task_barrier(a, done), done / kMostTasks & 1);
      freed.advance(a, a.copiers);
    }
    const uint32_t band = base + a.ring_at + slot * F::kBandRows * F::kRowBytes;
    turner.turn(base + (first_box + box) * F::kBoxBytes, band, a.channel_bytes);
    if (wraps) turn_last<F>(base + a.last_at + (first_box + box) * F::kLastBytes, band, a.channel_bytes, a.shift);
    // Bands are there in their order.
    if (a.copiers > 1 && at > 0)
      wait(band_barrier(a, slot > 0 ? slot - 1 : a.ring_bands - 1), slot > 0 ? parity : parity ^ 1);
    arrive_together(band_barrier(a, slot), threadIdx.x % 32 == 0);
    for (slot += a.copiers; slot >= a.ring_bands; parity ^= 1) slot -= a.ring_bands;
    ask(first_box + box);
    if (++box == boxes) box = 0, box_parity ^= 1;
  }
  // From here on the warp takes tasks as well. All bands are there, so none that it waits for has a place to which
  // others come.
  uint32_t last = images * a.bands - 1;
  const int last_slot = a.by_ring_bands.split(last);
  wait(band_barrier(a, last_slot), last & 1);
}

// By all warps: zeros where weights are to be, or beside them where these fill their rows, and asks for them in L2.
template <class F>
__device__ __forceinline__ void clear_and_ask_for_weights(const Arguments& a, int filter, int warp) {
  constexpr int kBefore = F::kRowsBefore * F::kWeightBytes;
  const int lane = threadIdx.x % 32;
  const auto clear = [](int at) { shared<float4>(at) = {}; };
#pragma unroll 1
  for (int place = warp; place < F::kUnits; place += kWarps) {
    const int own = filter_of<F>(a, filter, place), to = a.weights_at + place * a.kernel_bytes;
    if (own < a.filters)
#pragma unroll 1
      for (int row = lane; row < a.kernel_h; row += 32)
        ask_for_line(a.weight + own * a.weight_stride[0] + row * a.weight_stride[2]);
    if (own < a.filters && a.kernel_w == F::kTaps) {
      if (16 * lane < kBefore) clear(to + 16 * lane);
#pragma unroll 1
      for (int row = lane; row < a.kernel_h; row += 32) clear(to + kBefore + (row + 1) * F::kWeightBytes - 16);
      if (lane == 0) clear(to + a.kernel_bytes - 16);
    } else {
#pragma unroll 1
      for (int at = 16 * lane; at < a.kernel_bytes; at += 16 * 32) clear(to + at);
    }
  }
#pragma unroll 1
  for (int at = a.zeros_at + 16 * threadIdx.x; at < a.barriers_at; at += 16 * 32 * kWarps) clear(at);
}

template <class F>
__global__ void __launch_bounds__(32 * kWarps, 1) lanes_channels_last(const __grid_constant__ Arguments a) {
#if __CUDA_ARCH__ >= 900
  __shared__ int next_task[kSchedulers];
  const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0), lane = threadIdx.x % 32;
  const int split = blockIdx.x / a.groups, filter = (blockIdx.x - split * a.groups) * F::kUnits;
  const int first_image = split * a.share, images = min(a.share, a.batch - first_image);
  if (threadIdx.x == 0) prefetch(a.map);
  if (F::kShifted && threadIdx.x == 0) prefetch(a.last_map);
  clear_and_ask_for_weights<F>(a, filter, warp);
  if (threadIdx.x < kSchedulers) next_task[threadIdx.x] = 0;
  if (lane == 0) {
#pragma unroll 1
    for (int n = warp; n < kBoxes; n += kWarps) init_barrier(box_barrier(a, n), 1);
#pragma unroll 1
    for (int n = warp; n < a.ring_bands; n += kWarps) init_barrier(band_barrier(a, n), kWarpArrivals);
#pragma unroll 1
    for (int n = warp; n < min(images * a.tasks, kMostTasks); n += kWarps)
      init_barrier(task_barrier(a, n), kWarpArrivals);
    if (warp == kWarps - 1) init_barrier(weights_barrier(a), a.warps * kWarpArrivals);
  }
  before_bulk_copies();
  // What is needed first is asked for in L2, which is no harm while the kernel before still writes.
  if (warp >= a.warps && is_elected()) {
    BandCursor next(a, warp - a.warps);
    for (int n = 0; n < kAsked && next.image < images; ++n, next.advance(a, a.copiers))
      ask_for_box(a.map, filter, 0, next.band * F::kBandRows, first_image + next.image);
  }
  __syncthreads();
  let_next_kernel_start();
  const WeightCopies<F> weights(a);
  settle_and_wait_for_kernel_before(a.batch);

  const uint32_t base = once(shared_address(0));
  if (warp >= a.warps) {
    fill_ring<F>(a, filter, first_image, images, base, warp - a.warps);
  } else {
    for (int place = warp; place < F::kUnits; place += a.warps) {
      const int own = filter_of<F>(a, filter, place);
      const int to = a.weights_at + place * a.kernel_bytes + F::kRowsBefore * F::kWeightBytes;
      if (own < a.filters) weights.begin(a, own, to);
    }
    finish_copies();
    arrive_together(weights_barrier(a), lane == 0);
  }
  wait(weights_barrier(a), 0);

  const int end = images * a.tasks;
  // Each scheduler has its own tasks: all are done at the same time.
  const int queue = warp % kSchedulers;
  const uint32_t counter = once(shared_address(&next_task[queue]));
  for (;;) {
    const int task = take_number(counter, lane == 0) * kSchedulers + queue;
    if (task >= end) return;
    uint32_t image = task;
    const int rank = a.by_tasks.split(image), chunk = rank / F::kBlocks;
    const int first_band = image * a.bands;
    uint32_t first_turn = first_band, turns = first_band + last_band_of<F>(a, chunk);
    const int first_slot = a.by_ring_bands.split(first_turn);
    const int slot = a.by_ring_bands.split(turns);
    wait(band_barrier(a, slot), turns & 1);
    compute<F>(a, filter, first_image + image, kByAddress<F> ? base : 0, F::kBandRows * first_slot, chunk,
               F::kBlocks > 1 && rank % F::kBlocks == 1);
    arrive_together(task_barrier(a, task), lane == 0);
  }
#endif
}

// Whether rows fit shared memory.
template <class F>
bool place(Arguments& a, int shared_memory) {
  a.bands = static_cast<int>(ceil_div(a.height, F::kBandRows));
  a.chunks = static_cast<int>(ceil_div(a.out_height, F::kRows)), a.tasks = F::kBlocks * a.chunks;
  a.kernel_bytes =
      (F::kRowsBefore + a.kernel_h) * F::kWeightBytes | 16;  // an odd number of 16 bytes from channel to channel
  const int rest =
      kBoxes * (F::kBoxBytes + F::kLastBytes) + F::kUnits * (a.kernel_bytes + 16) + F::kZeroBytes + 8 * kBarriers + 256;
  a.ring_bands = std::min(kMostBands, (shared_memory - rest) / F::kBoxBytes);
  // A task's barrier is another's only when it is known to be done.
  a.ring_bands = std::min(a.ring_bands, (kMostTasks / a.tasks - 1) * a.bands);
  if (a.ring_bands < a.copiers) return false;
  a.last_at = kBoxes * F::kBoxBytes, a.ring_at = a.last_at + kBoxes * F::kLastBytes;
  a.channel_bytes = a.ring_bands * F::kBandRows * F::kRowBytes | 16;
  a.weights_at = a.ring_at + F::kUnits * a.channel_bytes;
  a.zeros_at = a.weights_at + F::kUnits * a.kernel_bytes;
  a.barriers_at = a.zeros_at + F::kZeroBytes;
  a.bytes = a.barriers_at + 8 * kBarriers;
  // What a task waits for must not need the place of what it, or one before, meets.
  for (int band = 0; band < a.bands; ++band)
    if (last_band_of<F>(a, last_chunk_of<F>(a, band)) - band >= a.ring_bands) return false;
  // By the parity of a band's barrier warps see whether it is there only if the one is that had its place before: all
  // are that tasks met which are not under way any more.
  const auto last_band = [&](int task) {
    const int image = task / a.tasks;
    return image * a.bands + last_band_of<F>(a, (task - image * a.tasks) / F::kBlocks);
  };
  const int under_way = static_cast<int>(round_up(a.warps, kSchedulers));
  for (int task = 0; task < under_way + a.tasks; ++task)
    if (last_band(task) - (task < under_way ? -1 : last_band(task - under_way)) > a.ring_bands) return false;
  return true;
}

template <class F>
bool launch(const Problem& p, Arguments a, cudaStream_t stream) {
  const int multiprocessors = current_device().multiprocessors;
  a.groups = static_cast<int>(ceil_div(a.filters, F::kUnits));
  const auto fits = [&](int copiers) {
    a.copiers = copiers, a.warps = kWarps - copiers;
    return place<F>(a, static_cast<int>(p.shared_memory));
  };
  // With fewer warps that compute, the ring has to have room for what fewer tasks meet.
  if (!fits(F::kCopiers) && !fits(kBoxes)) return false;
  // Each group's images are cut into shares. A block also takes some time before it has all rows that it needs.
  constexpr double kBegin = 0.5, kBusy = 0.7;  // images; of the multiprocessors
  double least = 0;
  int64_t blocks = 0, images = 0;        // images: of the multiprocessor that has the most
  for (const int some : {1, 2, 3, 4}) {  // blocks of a multiprocessor
    const int share = static_cast<int>(ceil_div(a.batch, std::clamp(some * multiprocessors / a.groups, 1, a.batch)));
    const int64_t all = a.groups * ceil_div(a.batch, share), rounds = ceil_div(all, multiprocessors);
    const double time = rounds * (share + kBegin);
    if (blocks == 0 || time < least) least = time, blocks = all, images = rounds * share, a.share = share;
  }
  // Smaller problems are spread over the device in smaller pieces.
  const int64_t group_images = int64_t{a.groups} * a.batch;
  if (group_images < F::kForm.many_group_images() && (images < 2 || group_images < kBusy * multiprocessors * images))
    return false;
  if (a.target_stride[3] >= 1 << 29) return false;
  a.wraps = a.filters + a.shift > a.groups * F::kUnits;
  const auto describe = [&](CUtensorMap& map, int channels) {
    return describe_boxes(map, const_cast<float*>(a.source - a.shift), 4,
                          {a.filters + a.shift, a.width, a.height, a.batch},
                          {4 * a.source_stride[3], 4 * a.source_stride[2], 4 * a.source_stride[0]},
                          {channels, F::kPixels, F::kBandRows, 1});
  };
  if (!describe(a.map, F::kUnits) || (F::kShifted && !describe(a.last_map, 4))) return false;
  a.by_tasks = Divider(a.tasks), a.by_ring_bands = Divider(a.ring_bands);
  a.by_ring_rows = Divider(F::kBandRows * a.ring_bands), a.pixel_bytes = static_cast<int>(4 * a.target_stride[3]);
  const auto kernel = lanes_channels_last<F>;
  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, a.bytes);
  launch_early(kernel, a, blocks, 32 * kWarps, stream, {1, a.bytes});
  check_launch("lanes_channels_last");
  return true;
}

}  // namespace

bool launch_lanes_channels_last(const Problem& p, cudaStream_t stream) {
  if (p.capability < 90) return false;
  const Mapping m(p);
  Arguments a{};
  take_pass(a, p, m);
  if (m.fan_out != 1 || !is_channels_last(a.source_stride, a.filters, a.width) ||
      !is_channels_last(a.target_stride, a.filters, a.out_width))
    return false;
  if (goes_along_columns(a)) turn(a, {a.source_stride, a.target_stride, a.weight_stride});
  a.shift = static_cast<int>(reinterpret_cast<uintptr_t>(a.source) / 4 % 4);
  const auto launch_it = [&]<int kNumber>(std::integral_constant<int, kNumber>) {
    return a.shift == 0 ? launch<Form<kNumber, false>>(p, a, stream) : launch<Form<kNumber, true>>(p, a, stream);
  };
  return [&]<int... kNumber>(std::integer_sequence<int, kNumber...>) {
    return ((kChannelForms[kNumber].serves(a.filters, kChannelForms[kNumber].units(), a.width, a.out_width, a.kernel_w,
                                           a.padding_w) &&
             launch_it(std::integral_constant<int, kNumber>{})) ||
            ...);
  }(std::make_integer_sequence<int, static_cast<int>(std::size(kChannelForms))>{});
}

}  // namespace dwconv
