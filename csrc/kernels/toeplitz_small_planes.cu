// Forward and grad_input on contiguous planes of at most 16 columns in 16 bits, on tensor cores.
//
// A row of the kernel is a matrix B, B[u][v] = weight[u + padding - v * stride], with a row for every column of the
// source and a column for every column of the target (B[u][v] = weight[v + padding - u * stride] for the gradient of
// the input at a stride): multiplied from the left by the same row of pixels of 16 images, it gives a row of outputs of
// as many, without any column of zeros beside the image. A block works through parts of the problem, the planes of some
// channels of 16 images (image_runs.cuh): one is computed while the next one arrives. One warp has a channel, or two
// that take its tiles of rows in turn; the matrices stay in registers, and outputs leave by way of shared memory.
// Planes of 7 x 7 and 14 x 14 that stay as large have kernels of their own (toeplitz_known_planes.cu).
//
// The zeros of B spoil an output if they meet Inf or NaN, which then is NaN. So outputs that are finite are right, and
// the others are computed again, tap by tap.
#include <algorithm>
#include <utility>

#include "toeplitz_small_planes.cuh"

namespace dwconv {
namespace {

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

// Blocks on a multiprocessor, as registers allow.
constexpr int blocks_of(int units) {
  return units > 2 ? 2 : 3;
}

// kKernelH: with what dilation puts between the rows. kStride: -2 where it is that of the target. kIn, kOut: columns of
// the source and the target, in units of 8. kPairs: whether all rows of the source begin at even places, or all at odd
// ones: then they are read from a column earlier on. kPairsOut: whether all rows of the target begin at even places.
template <typename T, int kKernelH, int kStride, int kIn, int kOut, bool kPairs, bool kPairsOut>
__global__ void __launch_bounds__(32 * kMaxWarps, blocks_of(kIn + kOut))
    toeplitz_small_planes(const __grid_constant__ Small a) {
  using Tile = Rows<kKernelH, kStride>;
  constexpr bool kSpread = kStride < 0;
  static_assert(kIn <= 2 && kOut <= 2 && (kStride == 1 ? kIn == kOut : kSpread ? kIn == 1 : kOut == 1));
  const Copier copier(a.bulk, false);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, row_of_a = lane / 4, pair = lane % 4 * 2;
  const bool copies = warp < a.copiers;
  const int copied = warp + lane * a.copiers;  // the image that a lane copies in bulk, if its warp does
  if (copier.bulk && threadIdx.x == 0)
#pragma unroll
    for (int stage = 0; stage < Barriers::kStages; ++stage)
      init_barrier(Barriers::full(stage), a.copiers * kWarpArrivals);
  if (threadIdx.x == 0) before_bulk_copies();
  __syncthreads();
  const int own = warp >> a.share / 2, first_tile = warp & (a.share - 1);  // the warp's channel of the part, its tiles
  const int source_plane = 2 * a.height * a.width, target_plane = 2 * a.out_height * a.out_width;
  // Memory likes to be read and written in one place at a time: blocks side by side take channels side by side.
  const int first = blockIdx.x, step = gridDim.x, last = a.groups * a.batches;
  const auto source_offset = [&](const Part& part) { return int64_t{part.channel} * source_plane; };
  const auto target_offset = [&](const Part& part) { return int64_t{part.channel} * target_plane; };
  // What is copied in bulk lies at the same place within a unit in all images.
  const auto bulk_load = [&](const Part& part) {
    const int64_t offset = source_offset(part);
    const PartUnits units(a, part, a.source.phase(part.image, offset), source_plane);
    return UnitLoad{a.source.base + (part.image + copied) * a.source.image_bytes + (offset - units.begin + units.first),
                    a.source.memory + copied * a.source.pitch + units.first, units.last - units.first};
  };
  const auto begin_bulk_store = [&](const Part& part) {
    const int64_t offset = target_offset(part);
    const int place = a.target.memory + copied * a.target.pitch + (static_cast<int>(offset) & (kUnit - 1));
    char* const to = a.target.base + (part.image + copied) * a.target.image_bytes + offset;
    if (copied < part.images) store_bulk(to, shared_address(place), part.channels * target_plane);
    commit_stores();
  };
  const auto begin_bulk_load = [&](const UnitLoad& one, const Part& part, int stage) {
    const int barrier = Barriers::full(stage);
    if (copied < part.images && one.bytes > 0) one.begin(stage * a.stage_bytes, barrier);
    if (warp == 0) load_ends(a, stage, part, source_plane);
    arrive_together(barrier, lane == 0);
  };
  const auto load_in_bulk = [&](int number, int stage) {
    if (number >= last || !copies) return;
    const Part part = part_of(a, number);
    begin_bulk_load(bulk_load(part), part, stage);
  };
  const auto load = [&](int number, int stage) {
    if (copier.bulk) return load_in_bulk(number, stage);
    if (number < last) {
      const Part part = part_of(a, number);
      copy_part<true>(a.source, stage * a.stage_bytes, part, source_offset(part), part.channels * source_plane);
    }
    commit_copies();
  };
  Taps<T, kKernelH, false> taps;
  // Those of the part that follows, while this one is computed if there are registers for them, or stored.
  constexpr bool kAhead = kKernelH < 7;
  const auto fetch_next = [&](int number) {
    taps.fetch(a, part_of(a, number + step), own, !a.keeps && number + step < last);
  };
  const Part first_part = part_of(a, first);
  const UnitLoad first_load = bulk_load(first_part);
  settle_and_wait_for_kernel_before(a.images);
  let_next_kernel_start();
  // Weights would have to wait for the pixels that are asked for before them: of one part at most, or where few parts
  // are under way of none. Of short rows one part is asked for at first, which then is there sooner.
  constexpr bool kWeightsFirst = kStride != 1;
  const bool soon = kIn == 1 && copier.bulk && a.stages > 1;
  if (kWeightsFirst) taps.fetch(a, first_part, own, true);
  if (!copier.bulk)
    load(first, 0);
  else if (copies)
    begin_bulk_load(first_load, first_part, 0);
  if (!kWeightsFirst) taps.fetch(a, first_part, own, true);
  if (!soon)
#pragma unroll 1
    for (int stage = 1; stage < a.stages; ++stage) load(first + stage * step, stage);

  // What keeps the columns of a pair that are inside the image: a mask, or how two elements are put together.
  const int odd = kPairs ? static_cast<int>(reinterpret_cast<uintptr_t>(a.source.base) / 2 & 1) : 0;
  uint32_t inside[kIn];
#pragma unroll
  for (int k = 0; k < kIn; ++k) {
    const int x = pair + 8 * k - odd;
    const bool both[2] = {x >= 0 && x < a.width, x + 1 < a.width};
    inside[k] = kPairs    ? (both[0] ? 0xffffu : 0) | (both[1] ? 0xffff0000u : 0)
                : both[1] ? 0x5410
                : both[0] ? 0x3210
                          : 0x3232;
  }
  const uint32_t memory = shared_address(0);
  // The thread's pair in a row of weights.
  const int entry = kMiddle + (kSpread ? row_of_a - 2 * (pair - odd) : pair - odd - row_of_a * kStride);
  const int weights = a.weights_at + warp * (kKernelH * kEntries * 4);
  const int weights_from = weights + (!kSpread && entry % 2 ? 2 * kEntries + 2 * (entry - 1) : 2 * entry);
  const uint32_t lane_from = memory + a.source.memory + own * source_plane + 2 * (pair - odd);
  const uint32_t lane_to = memory + a.target.memory + own * target_plane + 2 * pair;
  // The parts of B, for each multiplication its own: it takes registers side by side.
  uint32_t band[kKernelH][kOut][kIn];
  float start = 0;
  int stage = 0;
  uint32_t parity = 0;
#pragma unroll 1
  for (int number = first; number < last; number += step) {
    const Part part = part_of(a, number);
    if ((number == first || !a.keeps) && own < part.channels) {
      taps.lay(weights);
      start = widen(taps.bias);
#pragma unroll
      for (int i = 0; i < kKernelH; ++i)
#pragma unroll
        for (int v = 0; v < kOut; ++v)
#pragma unroll
          for (int k = 0; k < kIn; ++k) {
            const uint32_t at = memory + weights_from + i * (4 * kEntries) + 16 * (kSpread ? v : k - v);
            band[i][v][k] = kSpread ? __byte_perm(read_element(at), read_element(at - 4), 0x5410) : read_word_again(at);
          }
    }
    const int place = stage * a.stage_bytes;
    if (copier.bulk) {
      wait_stores();
      wait(Barriers::full(stage), parity);
    } else if (a.stages > 2) {
      wait_copies<2>();
    } else if (a.stages > 1) {
      wait_copies<1>();
    } else {
      wait_copies<0>();
    }
    __syncthreads();
    if (kAhead) fetch_next(number);
    if (soon && number == first)
#pragma unroll 1
      for (int more = 1; more < a.stages; ++more) load_in_bulk(first + more * step, more);

    if (own < part.channels) {
      // Where the thread's two images are; what there is not is computed from the last one, or from what lies there,
      // and not stored.
      uint32_t from[2], to[2];
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int index = row_of_a + 8 * h, known = min(index, part.images - 1);
        from[h] = lane_from + known * a.source.pitch + place + a.source.phase(part.image + known, source_offset(part));
        to[h] = lane_to + index * a.target.pitch + a.target.phase(part.image + index, target_offset(part));
      }
      const auto by_taps = [&](int begin, int end) {
        for (int e = 0; e < 4 * kOut; ++e) {
          const int h = e / 2 % 2, column = pair + e % 2 + e / 4 * 8;
          if (row_of_a + 8 * h < part.images && column < a.out_width)
            outputs_by_taps<T>(a, from[h] - 2 * (pair - odd) - memory, to[h] - 2 * pair - memory, part.channel + own,
                               begin, end - begin, column);
        }
      };
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
    __syncthreads();
    if (!copier.bulk || !a.bulk_stores) {
      copy_part<false>(a.target, 0, part, target_offset(part), part.channels * target_plane);
    } else if (warp < a.copiers) {
      begin_bulk_store(part);
    }
    load(number + a.stages * step, stage);
    if (++stage == a.stages) stage = 0, parity ^= 1;
  }
  if (copier.bulk) wait_stores();
}

template <typename T, int kKernelH, int kStride, int kIn, int kOut, bool kPairs, bool kPairsOut>
void launch_kernel(Small a, cudaStream_t stream) {
  const auto kernel = toeplitz_small_planes<T, kKernelH, kStride, kIn, kOut, kPairs, kPairsOut>;
  const Device& device = current_device();
  a.bulk = a.bulk && device.capability >= 90;
  a.batches = static_cast<int>(ceil_div(a.images, kImages));
  // Where sums take so many registers that few warps fit, two of them share a channel if it has work for both.
  constexpr int kRows = Rows<kKernelH, kStride>::kTarget;
  a.share = kIn + kOut > 3 && a.out_height >= 2 * kRows ? 2 : 1;
  // At stride 2 sources are large and targets small: blocks of one part each, of more channels, beat those that have
  // several, if copies are bulk copies. Where it is that of the target sources are small, and one more can be under
  // way.
  const bool single = a.bulk && kStride == 2;
  const int stages = single ? 1 : kStride < 0 ? 3 : 2;
  const auto lay_out = [&](int channels, int stages) {
    a.block_channels = channels, a.stages = stages;
    a.source.pitch = slot_pitch(int64_t{channels} * 2 * a.height * a.width);
    a.target.pitch = slot_pitch(int64_t{channels} * 2 * a.out_height * a.out_width);
    a.stage_bytes = kImages * a.source.pitch;
    a.source.memory = kHead, a.target.memory = kHead + stages * a.stage_bytes;
    a.weights_at = a.target.memory + kImages * a.target.pitch;
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
  a.bulk_stores = a.bulk_stores && channels * 2 * a.out_height * a.out_width % kUnit == 0;
  a.rows = 0;
  for (int i = 0; i < a.kernel_h; ++i) a.rows |= 1u << i * a.dilation_h;
  const int threads = 32 * channels * a.share;
  // To begin 16 copies takes a warp some time, but on wide planes it was slower to have all warps do it.
  a.copiers = kStride == 1 && kIn > 1 ? 1 : threads / 32;
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
  a.keeps = blocks % a.groups == 0;
  launch_early(kernel, a, blocks, threads, stream, {.shared_bytes = bytes});
  check_launch("toeplitz_small_planes");
}

}  // namespace

void launch_toeplitz_small_planes(const Problem& p, bool bulk, cudaStream_t stream) {
  const Mapping map(p);
  Small a{};
  a.height = map.height, a.width = map.width, a.out_height = map.out_height, a.out_width = map.out_width;
  // Returns whether all rows begin at even places, or all at odd ones.
  const auto arrange = [&](const View& view, int width, ImageRuns& v) {
    v.base = static_cast<char*>(view.data), v.image_bytes = 2 * view.stride[0];
    return width % 2 == 0 && (view.stride[0] % 2 == 0 || p.batch == 1);
  };
  const bool alike_in = arrange(map.source, a.width, a.source), alike_out = arrange(map.target, a.out_width, a.target);
  const auto even = [](const ImageRuns& v) { return reinterpret_cast<uintptr_t>(v.base) % 4 == 0; };
  // Bulk loads lie alike in all images. Bulk stores are of whole units.
  const int64_t image = 2 * p.channels * a.height * a.width, target_image = 2 * p.channels * a.out_height * a.out_width;
  a.solid = a.source.image_bytes == image;
  a.bulk = bulk && a.source.image_bytes % kUnit == 0;
  a.bulk_stores = reinterpret_cast<uintptr_t>(a.target.base) % kUnit == 0 && a.target.image_bytes % kUnit == 0 &&
                  target_image % kUnit == 0;
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
  // Planes of 7 x 7 and 14 x 14 that stay so have kernels of an odd number of rows, laid over their middle. Those of a
  // channel have to begin at an even place in all images, or at an odd one.
  const bool alike = (a.source.image_bytes | a.target.image_bytes) % 4 == 0;
  const bool square = a.width == a.height && a.out_width == a.width && a.out_height == a.height && a.stride == 1;
  if (square && alike && (a.width == 7 || (a.width == 14 && even(a.target))))
    return launch_toeplitz_known_planes(a, p.dtype, rows, bulk, stream);
  // Rows at odd places are read from a column earlier on, if B has one left; then its first entry has to be zero.
  const bool pairs_in =
      alike_in &&
      (even(a.source) || (a.width % 8 != 0 && a.padding_w < kMiddle && (a.kernel_w - 1) * a.dilation_w < kMiddle));
  const bool pairs_out = alike_out && even(a.target), pairs = pairs_in && pairs_out;
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
        return narrow ? launch(kOne, kOne, kOne) : launch(kOne, kTwo, kTwo);
      };
      if (rows <= 3) return go(std::integral_constant<int, 3>{});
      if (rows <= 5) return go(std::integral_constant<int, 5>{});
      return go(std::integral_constant<int, 7>{});
    }
  });
}

}  // namespace dwconv
