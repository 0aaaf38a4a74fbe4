// Forward and grad_input on contiguous planes of at most 16 columns in 16 bits, on tensor cores.
//
// A row of the kernel is a matrix B, B[u][v] = weight[u + padding - v * stride], with a row for every column of the
// source and a column for every column of the target (B[u][v] = weight[v + padding - u * stride] for the gradient of
// the input at a stride): multiplied from the left by the same row of pixels of 16 images, it gives a row of outputs of
// as many, without any column of zeros beside the image. A block works through parts of the problem, the planes of some
// channels of 16 images (image_runs.cuh): one is computed while the next one arrives. One warp has a channel, or two
// that take its tiles of rows in turn; the matrices stay in registers, and outputs leave by way of shared memory. For
// planes of 7 x 7 and 14 x 14 one more warp begins all copies.
//
// Planes of 7 x 7 and 14 x 14 that stay as large have code without a branch: what lies outside of them is known, and
// what is beside a row, another one, meets zeros of B. Rows of 7 begin at even and odd places in turn: a pair of pixels
// or outputs that would begin at an odd one begins a column earlier, and so B has a version for each case.
//
// The zeros of B spoil an output if they meet Inf or NaN, which then is NaN. So outputs that are finite are right, and
// the others are computed again, tap by tap.
#include <algorithm>
#include <utility>

#include "image_runs.cuh"
#include "launch.h"
#include "mapping.h"
#include "overlap.cuh"
#include "stream_nchw.cuh"
#include "tensor_cores.cuh"

namespace dwconv {
namespace {

constexpr int kImages = 16;  // that are multiplied together
constexpr int kMaxWarps = 8;
constexpr int kEntries = 32;  // of a row of the kernel between zeros
constexpr int kMiddle = 15;   // of them, where column 0 of the input meets column 0 of the output

struct Small {
  ImageRuns source, target;
  int height, width, out_height, out_width;
  const void *weight, *bias;
  int64_t weight_filter, weight_row, weight_column, bias_stride;
  int kernel_h, kernel_w, padding_h, padding_w, dilation_h, dilation_w, stride;
  bool spread;  // the stride is that of the target
  int images, channels;
  int block_channels, groups, batches;  // channels of a part; how many parts these make, and the images 16 by 16
  int share;                            // warps that share a channel: 1 or 2
  int stages, stage_bytes, weights_at;
  int copiers;  // warps that begin bulk copies
  bool bulk, bulk_stores;
  bool apart;      // a warp of its own copies, and outputs have two buffers: the warps that compute never wait for it
  uint32_t rows;   // a bit for each row of B that the kernel has
  int clear_from;  // bytes of a slot that are sure to be loaded
  Divider by_groups, by_dilation_w, by_clear;
};

struct Part {
  int image, images, channel, channels;
};

// Shared memory by addresses: with references it is looked up at every branch where shared memory begins.
__device__ inline uint32_t read_word(uint32_t address) {
  uint32_t value;
  asm volatile("ld.shared.b32 %0, [%1];" : "=r"(value) : "r"(address) : "memory");
  return value;
}
__device__ inline uint32_t read_element(uint32_t address) {
  uint32_t value;
  asm volatile("ld.shared.u16 %0, [%1];" : "=r"(value) : "r"(address) : "memory");
  return value;
}
// Reads it even if it was read before: into another register.
__device__ inline uint32_t read_word_again(uint32_t address) {
  uint32_t value;
  asm volatile("ld.volatile.shared.b32 %0, [%1];" : "=r"(value) : "r"(address) : "memory");
  return value;
}
__device__ inline void write_word(uint32_t address, uint32_t value) {
  asm volatile("st.shared.b32 [%0], %1;" ::"r"(address), "r"(value) : "memory");
}
__device__ inline void write_element(uint32_t address, uint32_t value) {
  asm volatile("st.shared.b16 [%0], %1;" ::"r"(address), "r"(value) : "memory");
}

// Outputs of one image, by the taps that meet it.
template <typename T>
__device__ __noinline__ void outputs_by_taps(const Small& a, int from, int to, int channel, int first_row, int rows,
                                             int column) {
  const T* weight = static_cast<const T*>(a.weight) + channel * a.weight_filter;
  for (int r = first_row; r < first_row + rows; ++r) {
    float sum = a.bias ? widen(static_cast<const T*>(a.bias)[channel * a.bias_stride]) : 0.f;
    for (int i = 0; i < a.kernel_h; ++i) {
      const int y = source_index(r, i, a.stride, a.padding_h, a.dilation_h, a.spread);
      if (y < 0 || y >= a.height) continue;
      for (int j = 0; j < a.kernel_w; ++j) {
        const int x = source_index(column, j, a.stride, a.padding_w, a.dilation_w, a.spread);
        if (x >= 0 && x < a.width)
          sum = fmaf(widen(shared<T>(from + 2 * (y * a.width + x))),
                     widen(weight[i * a.weight_row + j * a.weight_column]), sum);
      }
    }
    shared<T>(to + 2 * (r * a.out_width + column)) = narrow<T>(sum);
  }
}

// Where copies are not bulk copies: out of line, where it takes no registers from those that are.
template <bool kLoad>
__device__ __noinline__ void copy_part(const ImageRuns& runs, int stage, const Part& part, int64_t offset, int bytes) {
  copy_runs<kLoad>(runs, stage, part.image, part.images, offset, bytes);
}

// How target rows of a tile are computed from source rows, both counted from the tile's beginning.
template <int kKernelH, int kStride>
struct Rows {
  static constexpr int kTarget = 7, kSource = (kTarget - 1) * kStride + kKernelH;
  static __device__ int first_target(const Small&, int tile) { return tile * kTarget; }
  static __device__ int first_source(const Small& a, int tile) { return tile * kTarget * kStride - a.padding_h; }
  // The target row that a source row reaches by a row of the kernel; negative for none.
  static constexpr int target(int source, int i) {
    return source >= i && (source - i) % kStride == 0 && (source - i) / kStride < kTarget ? (source - i) / kStride : -1;
  }
  // The last source row of a target row.
  static constexpr int last(int target) { return target * kStride + kKernelH - 1; }
};

// The gradient of the input at stride 2. Tiles begin so that even rows of the kernel reach their even rows.
template <int kKernelH>
struct Rows<kKernelH, -2> {
  static constexpr int kTarget = 8, kBack = kKernelH / 2, kSource = kTarget / 2 + kBack;
  static __device__ int first_target(const Small& a, int tile) { return tile * kTarget - (a.padding_h & 1); }
  static __device__ int first_source(const Small& a, int tile) { return tile * kTarget / 2 + a.padding_h / 2 - kBack; }
  static constexpr int target(int source, int i) {
    const int r = 2 * (source - kBack) + i;
    return r >= 0 && r < kTarget ? r : -1;
  }
  static constexpr int last(int target) { return target / 2 + kBack; }
};

// Planes of 7 x 7 of which those of 16 images are multiplied with the rows of a kernel in B. Two source rows are one
// multiplication. A row of 8 columns begins with one that is not the plane's, or ends with it, so that pairs are words:
// for that B comes in versions for even and odd rows of the plane. Columns of B are in such an order that the word
// which two target rows share has both its halves in the same thread.
template <typename T, int kKernelH>
struct Seven {
  static constexpr int kSide = 7, kReach = kKernelH / 2;
  // By source row - target row + kReach + 1, for an even source row; and for the row that follows.
  uint32_t band[kKernelH + 1][2];

  // `weights`: the rows between zeros, the first entry of each being one; odd: whether planes begin at odd places.
  __device__ void prepare(uint32_t weights, int odd) {
    const int lane = threadIdx.x % 32, pair = lane % 4 * 2, n = lane / 4;
    const auto entry = [&](int x, int v) {  // bytes
      return x >= 0 && x < kSide && v >= 0 && v < kSide ? 2 * (kMiddle + x - v) : 0;
    };
    const int even = n, other = n < 6 ? n + 1 : n == 7 ? 0 : -1;  // columns, of rows at even and odd places
    const bool begins_other = (kReach + 1 + odd) & 1;
    const int target[2] = {begins_other ? other : even, begins_other ? even : other};
#pragma unroll
    for (int i = 0; i <= kKernelH; ++i) {
      const int to = target[i % 2];
#pragma unroll
      for (int next = 0; next < 2; ++next) {
        const int row = i + next - 1, x = pair - (odd ^ next);
        band[i][next] = 0;
        if (row < 0 || row >= kKernelH) continue;
        const uint32_t at = weights + row * (4 * kEntries);
        band[i][next] = __byte_perm(read_element(at + entry(x, to)), read_element(at + entry(x + 1, to)), 0x5410);
      }
    }
  }

  // `from`, `to`: where the two images' planes begin, plus the thread's pair. Returns whether all outputs are finite.
  template <bool kOdd>
  __device__ bool compute(const uint32_t (&from)[2], const uint32_t (&to)[2], float start) const {
    const float before[4] = {start, start, start, start};
    float sum[kSide][4];
    uint32_t zero = 0;
    const bool last = threadIdx.x % 4 == 3;
    const auto narrowed = [&](int r, int h) {
      const auto values = narrow_pair(sum[r][2 * h], sum[r][2 * h + 1], T{});
      add_zeros(zero, values);
      return *reinterpret_cast<const uint32_t*>(&values);
    };
    uint32_t next[4];  // of the two source rows to come
    const auto read = [&](int y) {
#pragma unroll
      for (int k = 0; k < 4; ++k)
        if (y + k / 2 < kSide) next[k] = read_word(from[k % 2] + 2 * (kSide * (y + k / 2) - (y + k / 2 + kOdd) % 2));
    };
    read(0);
#pragma unroll
    for (int y = 0; y < kSide; y += 2) {
      const uint32_t x[4] = {next[0], next[1], next[2], next[3]};
      read(y + 2);
#pragma unroll
      for (int r = 0; r < kSide; ++r) {
        const int i = y - r + kReach + 1;
        if (i < 0 || i > kKernelH) continue;
        const bool starts = y == 0 || i < 2;
        if (y + 1 < kSide)
          multiply(sum[r], starts ? before : std::as_const(sum[r]), x, band[i], T{});
        else if (i > 0)
          multiply(sum[r], {x[0], x[1]}, band[i][0], T{});
      }
      // Rows that are complete by now, two by two: of those that share a word the upper one begins evenly.
      const auto completes = [&](int r) { return (r + kReach < kSide ? r + kReach : kSide - 1) / 2 * 2 == y; };
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        constexpr int kAlone = kOdd ? 0 : kSide - 1;  // the row that shares its word with another plane
        if (completes(kAlone)) {
          const uint32_t alone = narrowed(kAlone, h), at = to[h] + 2 * (kSide * kAlone + kOdd);
          if (!last) write_word(at, alone);
          if (last) write_element(kOdd ? to[h] - 4 * 3 : at, kOdd ? alone >> 16 : alone);
        }
#pragma unroll
        for (int r = kOdd; r + 1 < kSide; r += 2) {
          if (!completes(r + 1)) continue;
          const uint32_t upper = narrowed(r, h), lower = narrowed(r + 1, h);
          write_word(to[h] + 2 * (kSide * r), __byte_perm(upper, lower, last ? 0x7610 : 0x3210));
          if (!last) write_word(to[h] + 2 * (kSide * (r + 1) + 1), lower);
        }
      }
    }
    return zero == 0;
  }
};

// Half a plane of 14 x 14: its upper 7 rows, or the lower ones, for which it is a mirror image.
template <typename T, int kKernelH>
struct Fourteen {
  static constexpr int kSide = 14, kRows = 7, kReach = kKernelH / 2;
  uint32_t band[kKernelH][2][2];  // by source row - target row + kReach, in the order of the half; by 8 columns

  __device__ void prepare(uint32_t weights, bool lower) {
    const int lane = threadIdx.x % 32, pair = lane % 4 * 2, n = lane / 4, entry = kMiddle + pair - n;
    const uint32_t from = weights + (entry % 2 ? 2 * kEntries + 2 * (entry - 1) : 2 * entry);
#pragma unroll
    for (int i = 0; i < kKernelH; ++i)
#pragma unroll
      for (int v = 0; v < 2; ++v)
#pragma unroll
        for (int k = 0; k < 2; ++k) {
          band[i][v][k] = read_word_again(from + (lower ? kKernelH - 1 - i : i) * (4 * kEntries) + 16 * (k - v));
          if (k == 1 && pair == 6) band[i][v][k] = 0;  // columns 14 and 15
        }
  }

  template <bool kLower>
  __device__ bool compute(const uint32_t (&from)[2], const uint32_t (&to)[2], float start) const {
    constexpr auto row = [](int r) { return 2 * kSide * (kLower ? kSide - 1 - r : r); };  // bytes
    const float before[4] = {start, start, start, start};
    float sum[kRows][2][4];
    uint32_t zero = 0;
    const bool inside = threadIdx.x % 4 < 3;  // of the second 8 columns
    uint32_t next[2][2];
    const auto read = [&](int s) {
#pragma unroll
      for (int h = 0; h < 2; ++h)
#pragma unroll
        for (int k = 0; k < 2; ++k) next[h][k] = read_word(from[h] + row(s) + 16 * k);
    };
    read(0);
#pragma unroll
    for (int s = 0; s < kRows + kReach; ++s) {
      const uint32_t x[4] = {next[0][0], next[1][0], next[0][1], next[1][1]};
      if (s + 1 < kRows + kReach) read(s + 1);
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const int i = s - r + kReach;
        if (i < 0 || i >= kKernelH) continue;
#pragma unroll
        for (int v = 0; v < 2; ++v)
          multiply(sum[r][v], s == 0 || i == 0 ? before : std::as_const(sum[r][v]), x, band[i][v], T{});
      }
      const int r = s - kReach;  // the row before had its last source row
      if (r < 0) continue;
#pragma unroll
      for (int v = 0; v < 2; ++v)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const auto values = narrow_pair(sum[r][v][2 * h], sum[r][v][2 * h + 1], T{});
          add_zeros(zero, values);
          if (v == 0 || inside) write_word(to[h] + row(r) + 16 * v, *reinterpret_cast<const uint32_t*>(&values));
        }
    }
    return zero == 0;
  }
};

// Blocks on a multiprocessor, as registers allow.
constexpr int blocks_of(int units) {
  return units > 2 ? 2 : 3;
}

// kKernelH: with what dilation puts between the rows. kStride: -2 where it is that of the target. kIn, kOut: columns of
// the source and the target, in units of 8. kPairs, kPairsOut: whether every row of the source, and of the target,
// begins at a multiple of 4 bytes. kKnown: planes are of 7 x 7, in one unit, or of 14 x 14.
template <typename T, int kKernelH, int kStride, int kIn, int kOut, bool kPairs, bool kPairsOut, bool kKnown>
__global__ void __launch_bounds__(32 * (kMaxWarps + kKnown), blocks_of(kIn + kOut))
    toeplitz_small_planes(const __grid_constant__ Small a) {
  using Tile = Rows<kKernelH, kStride>;
  constexpr bool kSpread = kStride < 0;
  static_assert(kIn <= 2 && kOut <= 2 && (kStride == 1 ? kIn == kOut : kSpread ? kIn == 1 : kOut == 1));
  const Copier copier(a.bulk, false);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, row_of_a = lane / 4, pair = lane % 4 * 2;
  const int workers = a.block_channels * a.share;  // warps that compute
  constexpr bool kApart = kKnown;
  const bool apart = kApart && a.apart, copies = apart ? warp == workers : warp < a.copiers;
  // On planes of 7 columns one thread of that warp begins all copies; with longer ones its lanes are as fast or faster.
  const bool by_one = kIn == 1 && apart;
  // The image that a lane copies in bulk, if its warp does; or the first one.
  const int copied = by_one ? 0 : apart ? lane : warp + lane * a.copiers;
  if (copier.bulk && threadIdx.x == 0)
#pragma unroll
    for (int stage = 0; stage < Barriers::kStages; ++stage) {
      init_barrier(Barriers::full(stage), a.copiers);
      if (kApart) init_barrier(Barriers::done(stage), stage < 2 ? workers : 1);
    }
  // What lies around the runs is multiplied with zeros: it should be finite.
  if (kKnown)
    for (int i = threadIdx.x; i < a.stages * kImages * static_cast<int>(a.by_clear.divisor); i += blockDim.x) {
      uint32_t slot = i;
      const int unit = a.by_clear.split(slot);
      shared<uint4>(a.source.memory + slot * a.source.pitch + a.clear_from + unit * kUnit) = uint4{};
    }
  if (kKnown || threadIdx.x == 0) before_bulk_copies();
  __syncthreads();
  const int own = warp >> a.share / 2, first_tile = warp & (a.share - 1);  // the warp's channel of the part, its tiles
  const int target_bytes = kImages * a.target.pitch;                       // of a buffer
  const int source_plane = 2 * a.height * a.width, target_plane = 2 * a.out_height * a.out_width;
  // Memory likes to be read and written in one place at a time: blocks side by side take channels side by side.
  const int first = blockIdx.x, step = gridDim.x, last = a.groups * a.batches;
  const auto part_of = [&](int number) {
    uint32_t batch = number;
    const int group = static_cast<int>(a.by_groups.split(batch));
    Part part;
    part.image = static_cast<int>(batch) * kImages;
    part.images = min(kImages, a.images - part.image);
    part.channel = group * a.block_channels;
    part.channels = min(a.block_channels, a.channels - part.channel);
    return part;
  };
  const auto source_offset = [&](const Part& part) { return int64_t{part.channel} * source_plane; };
  const auto target_offset = [&](const Part& part) { return int64_t{part.channel} * target_plane; };
  // Images that are copied in bulk begin with a unit: a part's bytes lie at the same place within one in all of them.
  const auto bulk_load = [&](const Part& part) {
    const int64_t offset = source_offset(part);
    const int before = static_cast<int>(offset) & (kUnit - 1);
    return UnitLoad{a.source.base + (part.image + copied) * a.source.image_bytes + (offset - before),
                    a.source.memory + copied * a.source.pitch,
                    (before + part.channels * source_plane + kUnit - 1) & -kUnit};
  };
  const auto begin_bulk_store = [&](const Part& part, int buffer) {
    const int64_t offset = target_offset(part);
    const int place = a.target.memory + copied * a.target.pitch + (static_cast<int>(offset) & (kUnit - 1));
    char* to = a.target.base + (part.image + copied) * a.target.image_bytes + offset;
    uint32_t from = shared_address(buffer * target_bytes + place);
    const int bytes = part.channels * target_plane;
    if (!by_one) {
      if (copied < part.images) store_bulk(to, from, bytes);
      return commit_stores();
    }
    if (is_elected()) {
#pragma unroll 4
      for (int n = 0; n < part.images; ++n, to += a.target.image_bytes, from += a.target.pitch)
        store_bulk(to, from, bytes);
      commit_stores();
    }
    __syncwarp();
  };
  const auto begin_bulk_load = [&](const UnitLoad& one, const Part& part, int stage) {
    const int barrier = Barriers::full(stage);
    if (!by_one) {
      if (copied < part.images) one.begin(stage * a.stage_bytes, barrier);
      __syncwarp();
      if (lane == 0) arrive(barrier);
      return;
    }
    if (is_elected()) {
      expect_bytes(barrier, part.images * one.bytes);
      uint32_t to = shared_address(stage * a.stage_bytes + one.to);
      const char* from = one.from;
#pragma unroll 4
      for (int n = 0; n < part.images; ++n, from += a.source.image_bytes, to += a.source.pitch)
        copy_bulk(to, from, one.bytes, barrier);
      arrive(barrier);
    }
    __syncwarp();
  };
  const auto load_in_bulk = [&](int number, int stage) {
    if (number >= last || !copies) return;
    const Part part = part_of(number);
    begin_bulk_load(bulk_load(part), part, stage);
  };
  // Barriers, where a warp of its own copies: a buffer may be written to.
  const auto free_buffer = [](int buffer) { return Barriers::done(2 + buffer); };
  const auto load = [&](int number, int stage) {
    if (copier.bulk) return load_in_bulk(number, stage);
    if (number < last) {
      const Part part = part_of(number);
      copy_part<true>(a.source, stage * a.stage_bytes, part, source_offset(part), part.channels * source_plane);
    }
    commit_copies();
  };
  // The weights that a lane puts between zeros, of the warp's channel.
  T weight[kKernelH], bias;
  int prepared = -1;  // the first channel of those that the weights in use are of
  const auto fetch = [&](const Part& part, bool wanted) {
    bias = narrow<T>(0.f);
#pragma unroll
    for (int i = 0; i < kKernelH; ++i) weight[i] = bias;  // in any case: what was there is not needed any more
    if (!wanted || part.channel == prepared || own >= part.channels) return;
    const int channel = part.channel + own;
    uint32_t tap = max(lane - kMiddle + a.padding_w, 0);
    const bool beside = lane - kMiddle + a.padding_w < 0 || a.by_dilation_w.split(tap) != 0;
    const bool has_tap = !(kKnown && lane == 0) && !beside && static_cast<int>(tap) < a.kernel_w;
    const T* from = static_cast<const T*>(a.weight) + channel * a.weight_filter + (has_tap ? tap : 0) * a.weight_column;
#pragma unroll
    for (int i = 0; i < kKernelH; ++i) {
      const bool has_row = a.rows >> i & 1;
      if (has_row && has_tap) weight[i] = __ldg(from);
      from += has_row ? a.weight_row : 0;
    }
    if (a.bias) bias = __ldg(static_cast<const T*>(a.bias) + channel * a.bias_stride);
  };
  // Those of the part that follows, while this one is computed if there are registers for them, or stored.
  constexpr bool kAhead = kKernelH < 7 && !(kKnown && kIn == 1);
  const auto fetch_next = [&](int number) { fetch(part_of(number + step), number + step < last); };
  const Part first_part = part_of(first);
  const UnitLoad first_load = bulk_load(first_part);
  settle_and_wait_for_kernel_before(a.images);
  let_next_kernel_start();
  // Weights would have to wait for the pixels that are asked for before them: of one part at most, or where few parts
  // are under way of none. Of short rows one part is asked for at first, which then is there sooner.
  constexpr bool kWeightsFirst = kStride != 1;
  const bool soon = kIn == 1 && copier.bulk && a.stages > 1;
  if (kWeightsFirst) fetch(first_part, true);
  if (!copier.bulk)
    load(first, 0);
  else if (copies)
    begin_bulk_load(first_load, first_part, 0);
  if (!kWeightsFirst) fetch(first_part, true);
  if (!soon)
#pragma unroll 1
    for (int stage = 1; stage < a.stages; ++stage) load(first + stage * step, stage);

  if (apart && copies) {
    int stage = 0;
    uint32_t parity = 0;
    if (soon) {
      wait(Barriers::full(0), 0);
      load(first + step, 1);
    }
    for (int number = first; number < last; number += step) {
      const Part part = part_of(number);
      wait(Barriers::done(stage), parity);
      begin_bulk_store(part, stage);
      load(number + a.stages * step, stage);
      wait_stores();
      __syncwarp();
      if (lane == 0) arrive(free_buffer(stage));
      if (++stage == a.stages) stage = 0, parity ^= 1;
    }
    return;
  }

  // What keeps the columns of a pair that are inside the image: a mask, or how two elements are put together.
  uint32_t inside[kIn];
#pragma unroll
  for (int k = 0; k < kIn; ++k) {
    const int left = a.width - pair - 8 * k;
    inside[k] = kPairs ? (left > 1 ? ~0u : left > 0 ? 0xffffu : 0) : left > 1 ? 0x5410 : left > 0 ? 0x3210 : 0x3232;
  }
  const uint32_t memory = shared_address(0);
  // The thread's pair in a row of weights.
  const int entry = kMiddle + (kSpread ? row_of_a - 2 * pair : pair - row_of_a * kStride);
  const int weights = a.weights_at + warp * (kKernelH * kEntries * 4);
  const int weights_from = weights + (!kSpread && entry % 2 ? 2 * kEntries + 2 * (entry - 1) : 2 * entry);
  const uint32_t lane_from = memory + a.source.memory + own * source_plane + 2 * pair;
  const uint32_t lane_to = memory + a.target.memory + own * target_plane + 2 * pair;
  // The parts of B, for each multiplication its own: it takes registers side by side.
  uint32_t band[kKernelH][kOut][kIn];
  std::conditional_t<kIn == 1, Seven<T, kKernelH>, Fourteen<T, kKernelH>> known_plane;
  int odd = 0;  // whether the channel's planes begin at odd places
  float start = 0;
  int stage = 0;
  uint32_t parity = 0;
#pragma unroll 1
  for (int number = first; number < last; number += step) {
    const Part part = part_of(number);
    if (part.channel != prepared && own < part.channels) {
      prepared = part.channel;
      // The weights between zeros, and once more one entry earlier, so that any two neighbours are a word.
      __syncwarp();
#pragma unroll
      for (int i = 0; i < kKernelH; ++i) {
        shared<T>(weights + i * (4 * kEntries) + 2 * lane) = weight[i];
        if (lane > 0) shared<T>(weights + i * (4 * kEntries) + 2 * kEntries + 2 * (lane - 1)) = weight[i];
      }
      start = widen(bias);
      __syncwarp();
      if constexpr (kKnown) {
        odd = (static_cast<uint32_t>(reinterpret_cast<uintptr_t>(a.source.base)) / 2 + part.channel + own) & 1;
        known_plane.prepare(memory + weights, kIn == 1 ? odd : first_tile);
      } else {
#pragma unroll
        for (int i = 0; i < kKernelH; ++i)
#pragma unroll
          for (int v = 0; v < kOut; ++v)
#pragma unroll
            for (int k = 0; k < kIn; ++k) {
              const uint32_t at = memory + weights_from + i * (4 * kEntries) + 16 * (kSpread ? v : k - v);
              band[i][v][k] =
                  kSpread ? __byte_perm(read_element(at), read_element(at - 4), 0x5410) : read_word_again(at);
            }
      }
    }
    const int place = stage * a.stage_bytes;
    if (copier.bulk) {
      if (!apart) wait_stores();
      wait(Barriers::full(stage), parity);
      if (apart) wait(free_buffer(stage), parity ^ 1);
    } else if (a.stages > 1) {
      wait_copies<1>();
    } else {
      wait_copies<0>();
    }
    if (!apart) __syncthreads();
    if (kAhead) fetch_next(number);
    if (soon && !apart && number == first)
#pragma unroll 1
      for (int more = 1; more < a.stages; ++more) load_in_bulk(first + more * step, more);

    if (own < part.channels) {
      // Where the thread's two images are; what there is not is computed from the last one, or from what lies there,
      // and not stored.
      uint32_t from[2], to[2];
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int index = row_of_a + 8 * h, known = kKnown ? index : min(index, part.images - 1);
        from[h] = lane_from + known * a.source.pitch + place + a.source.phase(part.image + known, source_offset(part));
        to[h] = lane_to + index * a.target.pitch + (apart ? stage * target_bytes : 0) +
                a.target.phase(part.image + index, target_offset(part));
      }
      const auto by_taps = [&](int begin, int end) {
        for (int e = 0; e < 4 * kOut; ++e) {
          const int h = e / 2 % 2, column = pair + e % 2 + e / 4 * 8;
          if (row_of_a + 8 * h < part.images && column < a.out_width)
            outputs_by_taps<T>(a, from[h] - 2 * pair - memory, to[h] - 2 * pair - memory, part.channel + own, begin,
                               end - begin, column);
        }
      };
      if constexpr (kKnown) {
        const bool second = kIn == 1 ? odd : first_tile;
        const bool finite = second ? known_plane.template compute<true>(from, to, start)
                                   : known_plane.template compute<false>(from, to, start);
        // The thread's columns here are not all that it has computed.
        if (__any_sync(~0u, !finite)) {
          __syncwarp();
          by_taps(kIn == 1 ? 0 : 7 * first_tile, kIn == 1 ? 7 : 7 * first_tile + 7);
        }
      } else
        for (int tile = first_tile; Tile::first_target(a, tile) < a.out_height; tile += a.share) {
          const int first_row = Tile::first_target(a, tile), y0 = Tile::first_source(a, tile);
          float sum[Tile::kTarget][kOut][4];
#pragma unroll
          for (int r = 0; r < Tile::kTarget; ++r)
#pragma unroll
            for (int v = 0; v < kOut; ++v)
#pragma unroll
              for (int e = 0; e < 4; ++e) sum[r][v][e] = start;
          uint32_t zero = 0;
          uint32_t next[2][2], beside[2][2];  // of the row to come, by image, by columns
          const auto read = [&](int y) {
            if (y < 0 || y >= a.height) return;
            const int row = y * 2 * a.width;
#pragma unroll
            for (int h = 0; h < 2; ++h)
#pragma unroll
              for (int k = 0; k < kIn; ++k) {
                const uint32_t at = from[h] + row + 16 * k;
                if (kPairs)
                  next[h][k] = read_word(at);
                else
                  next[h][k] = read_element(at), beside[h][k] = read_element(at + 2);
              }
          };
          read(y0);
#pragma unroll
          for (int s = 0; s < Tile::kSource; ++s) {
            uint32_t x[2][2];
#pragma unroll
            for (int h = 0; h < 2; ++h)
#pragma unroll
              for (int k = 0; k < kIn; ++k)
                x[h][k] = kPairs ? next[h][k] & inside[k] : __byte_perm(next[h][k], beside[h][k], inside[k]);
            const int y = y0 + s;
            if (s + 1 < Tile::kSource) read(y + 1);
            if (y >= 0 && y < a.height) {
#pragma unroll
              for (int i = kKernelH - 1; i >= 0; --i) {
                const int r = Tile::target(s, i);
                if (r < 0) continue;
#pragma unroll
                for (int v = 0; v < kOut; ++v) {
                  if constexpr (kIn == 2)
                    multiply(sum[r][v], sum[r][v], {x[0][0], x[1][0], x[0][1], x[1][1]}, band[i][v], T{});
                  else
                    multiply(sum[r][v], {x[0][0], x[1][0]}, band[i][v][0], T{});
                }
              }
            }
#pragma unroll
            for (int r = 0; r < Tile::kTarget; ++r) {
              if (Tile::last(r) != s || first_row + r < 0 || first_row + r >= a.out_height) continue;
#pragma unroll
              for (int v = 0; v < kOut; ++v)
#pragma unroll
                for (int h = 0; h < 2; ++h) {
                  const auto values = narrow_pair(sum[r][v][2 * h], sum[r][v][2 * h + 1], T{});
                  add_zeros(zero, values);
                  const uint32_t word = *reinterpret_cast<const uint32_t*>(&values);
                  const uint32_t at = to[h] + (first_row + r) * 2 * a.out_width + 16 * v;
                  const int columns = a.out_width - pair - 8 * v;
                  if (kPairsOut) {
                    if (columns > 0) write_word(at, word);
                  } else {
                    if (columns > 0) write_element(at, word);
                    if (columns > 1) write_element(at + 2, word >> 16);
                  }
                }
            }
          }
          if (zero != 0) {  // NaN: an output is not finite
            by_taps(max(first_row, 0), min(first_row + Tile::kTarget, a.out_height));
          }
        }
    }
    if (!kAhead) fetch_next(number);
    copier.before_store();
    if (apart) {
      __syncwarp();
      if (lane == 0) arrive(Barriers::done(stage));
      if (++stage == a.stages) stage = 0, parity ^= 1;
      continue;
    }
    __syncthreads();
    if (!copier.bulk || !a.bulk_stores) {
      copy_part<false>(a.target, 0, part, target_offset(part), part.channels * target_plane);
    } else if (warp < a.copiers) {
      begin_bulk_store(part, 0);
    }
    load(number + a.stages * step, stage);
    if (++stage == a.stages) stage = 0, parity ^= 1;
  }
  if (copier.bulk) wait_stores();
}

template <typename T, int kKernelH, int kStride, int kIn, int kOut, bool kPairs, bool kPairsOut, bool kKnown = false>
void launch_kernel(Small a, cudaStream_t stream) {
  const auto kernel = toeplitz_small_planes<T, kKernelH, kStride, kIn, kOut, kPairs, kPairsOut, kKnown>;
  const Device& device = current_device();
  constexpr bool kApart = kKnown;
  a.bulk = a.bulk && device.capability >= 90;
  a.batches = static_cast<int>(ceil_div(a.images, kImages));
  // Where sums take so many registers that few warps fit, two of them share a channel if it has work for both.
  constexpr int kRows = Rows<kKernelH, kStride>::kTarget;
  a.share = kIn + kOut > 3 && a.out_height >= 2 * kRows ? 2 : 1;
  // At stride 2 sources are large and targets small: blocks of one part each, of more channels, beat those that have
  // several. Where it is that of the target sources are small, and one more can be under way.
  const bool single = a.bulk && kStride == 2;
  // Where a warp begins all copies, one more does nothing else, and outputs have two buffers.
  const int buffers = kApart && a.bulk ? 2 : 1;
  const int stages = single ? 1 : a.bulk && kStride < 0 ? 3 : 2;
  const auto lay_out = [&](int channels, int stages) {
    a.block_channels = channels, a.stages = stages;
    a.source.pitch = slot_pitch(int64_t{channels} * 2 * a.height * a.width);
    a.target.pitch = slot_pitch(int64_t{channels} * 2 * a.out_height * a.out_width);
    a.stage_bytes = kImages * a.source.pitch;
    a.source.memory = kHead, a.target.memory = kHead + stages * a.stage_bytes;
    a.weights_at = a.target.memory + buffers * kImages * a.target.pitch;
    a.groups = static_cast<int>(ceil_div(a.channels, channels));
    return a.weights_at + channels * a.share * (kKernelH * kEntries * 4);
  };
  // As many channels as leave room for a second block, and every multiprocessor something to do.
  constexpr int kReserved = 1 << 10;  // bytes that CUDA takes for a block
  const int most = kIn + kOut > 2 && !single ? kMaxWarps / 2 : kMaxWarps;
  int channels = std::min(most, a.channels), bytes = lay_out(channels, stages);
  while (channels > 1 && (2 * (bytes + kReserved) > device.shared_per_multiprocessor ||
                          int64_t{a.groups} * a.batches < device.multiprocessors))
    channels /= 2, bytes = lay_out(channels, stages);
  if (bytes > device.shared_per_block) bytes = lay_out(channels, 1);
  a.by_groups = Divider(a.groups);
  const bool full = a.bulk && a.images % kImages == 0 && a.channels % channels == 0;  // all parts are alike
  a.clear_from = full ? channels * 2 * a.height * a.width / kUnit * kUnit : 0;
  a.by_clear = Divider((a.source.pitch - a.clear_from) / kUnit);
  a.bulk_stores = a.bulk_stores && channels * 2 * a.out_height * a.out_width % kUnit == 0;
  a.apart = buffers == 2 && a.bulk_stores && a.stages == 2;
  const int skipped = kKnown ? kKernelH / 2 - a.padding_h : 0;  // rows of B above the kernel
  a.rows = 0;
  for (int i = 0; i < a.kernel_h; ++i) a.rows |= 1u << (skipped + i * a.dilation_h);
  const int threads = 32 * (channels * a.share + a.apart);
  // To begin 16 copies takes a warp some time, but on wide planes it was slower to have all warps do it.
  a.copiers = a.apart || (kStride == 1 && kIn > 1) ? 1 : threads / 32;
  const int64_t parts = int64_t{a.groups} * a.batches;
  static thread_local Decisions<6, int64_t> decisions;
  // Else so many blocks that all of them run at once and, on the smallest planes, have as many parts, if possible.
  const int64_t blocks = decisions({device.id, threads, bytes, parts, a.groups, single}, [&] {
    cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, device.shared_per_block);
    int resident = 0;
    cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, kernel, threads, bytes);
    const int64_t slots = int64_t{std::max(resident, 1)} * device.multiprocessors;
    if (single) return parts;
    if (kStride != 1 || kIn > 1) return std::min(parts, slots);
    const int64_t turns = ceil_div(parts, slots), even = ceil_div(parts, turns);
    // Weights stay where a block has the same channels again and again.
    const int64_t same = round_up(even, a.groups);
    return turns > 1 && same <= slots ? same : even;
  });
  launch_early(kernel, a, blocks, threads, stream, {.shared_bytes = bytes});
  check_launch("toeplitz_small_planes");
}

}  // namespace

void launch_toeplitz_small_planes(const Problem& p, bool bulk, cudaStream_t stream) {
  const Mapping map(p);
  Small a{};
  a.height = map.height, a.width = map.width, a.out_height = map.out_height, a.out_width = map.out_width;
  // Returns whether all rows begin at an even place.
  const auto arrange = [&](const View& view, int width, ImageRuns& v) {
    v.base = static_cast<char*>(view.data), v.image_bytes = 2 * view.stride[0];
    return width % 2 == 0 && (view.stride[0] % 2 == 0 || p.batch == 1) &&
           reinterpret_cast<uintptr_t>(view.data) % 4 == 0;
  };
  const bool pairs_in = arrange(map.source, a.width, a.source), pairs_out = arrange(map.target, a.out_width, a.target);
  const bool pairs = pairs_in && pairs_out;
  // Bulk copies are of whole units, which must not reach out of an image; units that are shared are not stored.
  const auto whole = [&](const ImageRuns& v, int height, int width) {
    return reinterpret_cast<uintptr_t>(v.base) % kUnit == 0 && v.image_bytes % kUnit == 0 &&
           2 * p.channels * height * width % kUnit == 0;
  };
  a.bulk = bulk && whole(a.source, a.height, a.width);
  a.bulk_stores = whole(a.target, a.out_height, a.out_width);
  a.weight = map.weight.data, a.bias = map.bias, a.bias_stride = map.bias_stride;
  a.weight_filter = map.weight.stride[0], a.weight_row = map.weight.stride[2], a.weight_column = map.weight.stride[3];
  a.kernel_h = static_cast<int>(p.kernel_h), a.kernel_w = static_cast<int>(p.kernel_w);
  a.dilation_h = static_cast<int>(p.dilation_h), a.dilation_w = static_cast<int>(p.dilation_w);
  a.by_dilation_w = Divider(p.dilation_w);
  a.padding_h = map.padding_h, a.padding_w = map.padding_w, a.stride = static_cast<int>(p.stride_h);
  a.spread = map.spread;
  a.images = static_cast<int>(p.batch), a.channels = static_cast<int>(p.channels);
  const bool narrow = std::max(a.width, a.out_width) <= 8;  // columns
  const int rows = (a.kernel_h - 1) * a.dilation_h + 1;
  // Planes of 7 x 7 and 14 x 14 that stay so have kernels of an odd number of rows, laid over their middle. Of 7 x 7,
  // those of a channel have to begin at an even place in all images and in both arrays, or at an odd one.
  const auto place = [](const ImageRuns& v) { return reinterpret_cast<uintptr_t>(v.base) % 4; };
  const bool alike = (a.source.image_bytes | a.target.image_bytes) % 4 == 0 && place(a.source) == place(a.target);
  const bool square = a.width == a.height && a.out_width == a.width && a.out_height == a.height && a.stride == 1;
  const bool known = square && ((a.width == 7 && alike) || (a.width == 14 && pairs));
  visit_dtype(p.dtype, [&](auto zero) {
    using T = decltype(zero);
    if constexpr (sizeof(T) == 2) {
      const auto go = [&](auto kernel_h) {
        constexpr int kKernelH = decltype(kernel_h)::value;
        const auto launch = [&](auto stride, auto in, auto out) {
          constexpr int kStride = decltype(stride)::value, kIn = decltype(in)::value, kOut = decltype(out)::value;
          // At a stride the larger planes may have them alone.
          constexpr bool kLarge = kStride == 2, kSmall = kStride == -2;
          if (pairs) return launch_kernel<T, kKernelH, kStride, kIn, kOut, true, true>(a, stream);
          if (kStride != 1 && (kLarge ? pairs_in : pairs_out))
            return launch_kernel<T, kKernelH, kStride, kIn, kOut, kLarge, kSmall>(a, stream);
          return launch_kernel<T, kKernelH, kStride, kIn, kOut, false, false>(a, stream);
        };
        constexpr std::integral_constant<int, 1> kOne;
        constexpr std::integral_constant<int, 2> kTwo;
        if (a.spread) return launch(std::integral_constant<int, -2>{}, kOne, kTwo);
        if (a.stride == 2) return launch(kTwo, kTwo, kOne);
        if (known) {
          if (narrow) return launch_kernel<T, kKernelH, 1, 1, 1, false, false, true>(a, stream);
          return launch_kernel<T, kKernelH, 1, 2, 2, true, true, true>(a, stream);
        }
        return narrow ? launch(kOne, kOne, kOne) : launch(kOne, kTwo, kTwo);
      };
      if (rows <= 3) return go(std::integral_constant<int, 3>{});
      if (rows <= 5) return go(std::integral_constant<int, 5>{});
      return go(std::integral_constant<int, 7>{});
    }
  });
}

}  // namespace dwconv
