// grad_weight (and the bias gradient) on contiguous planes, as far as it does not depend on how a tile of gradients is
// added: input and gradient stream through shared memory side by side, and the sums of all taps stay in registers.
//
// Bytes bound by design: both arrays are read once. A block works for a fixed group of filters on a part of the images;
// the parts, if there are several, are added up by a second, small kernel. Every sum has a fixed order, the same on
// every run.
//
// What is not part of a sum is multiplied by zero, which is exact unless the other factor is Inf or NaN. So sums that
// are finite are right, and the others are taken again, product by product.
//
// A tile is a class with
//   kRows, kColumns       its size
//   kTiles, kLanes        how many of them are added together, and by how many threads: 1 by 1, or 4 by a warp
//   kKernelH, kKernelW    the size of the kernel
//   kMaxThreads, kBlocks  of a block, besides a warp that copies, and blocks of that size on a multiprocessor
//   kWhole                whether it takes whole planes only
//   kPlane                whether it is a whole plane, so that a thread has all sums of its filter
//   kScratch              bytes of shared memory of a warp, from scratch_at on
//   kTurns                whether a filter's warps take turns, as some tiles take longer
//   kUnits                whether a row of a tile is 16 bytes that are read at once
//   kPieces               whether a chunk that is a block's only one comes in two pieces
//   kMoves                whether rows are moved to where 16 bytes begin, so that tiles find them there: those of a
//                         chunk by half of the warps while the others add the chunk before, and then the other way
//   kCuts                 whether planes are cut in other rows than the image's (cut_planes)
//   kStages               whether chunks are bands that have places of their own in shared memory, as ring_of says
//   add<T>(stream, chunk, filter, tile)  adds a tile, or the first of several, to the thread's sums
//   total(i, j), total_bias()            the sums
//   tap(i, j)                            whose sum total(i, j) is
//   add_edges<T>(stream, chunk)          where planes are cut, takes back what is no tap's
//   kProducts                            0; or, of tiles that a warp adds, how many products a thread has for a row of
//                                        the kernel, instead of taps' sums, which are on diagonals of them:
//   product(i, e)                        the products
//   kDiagonal, begin(j)                  of so many gradients side by side, from so many pixels of the input on,
//   product_of(m, n)                     that of pixel m and gradient n: 32 times e, and the lane
#pragma once

#include <algorithm>
#include <cmath>

#include "launch.h"
#include "moved_rows.h"
#include "overlap.cuh"
#include "partial_sums.h"
#include "shifted_units.cuh"
#include "stream.cuh"

namespace dwconv {

// Where no bulk copies are, one or two warps load for all others: what they execute for a unit decides how fast. So
// addresses go on from burst to burst, and whole bursts ask nothing.
struct GradCopier : Copier {
  using Copier::Copier;

  __device__ void load(void* to, const void* from, int bytes, int barrier) const {
#if __CUDA_ARCH__ >= 800
    if (bulk) return Copier::load(to, from, bytes, barrier);
    constexpr int kBurst = 8, kStep = 32 * kUnit, kWhole = kBurst * kStep;
    const int warp = rank() / 32, warps = (dedicated ? loaders : blockDim.x) / 32, lane = threadIdx.x % 32;
    uint32_t slot = shared_address(to) + warp * kWhole + lane * kUnit;
    const char* its = static_cast<const char*>(from) + warp * kWhole + lane * kUnit;
    int left = bytes - warp * kWhole;
#pragma unroll 1
    for (; left >= kWhole; left -= warps * kWhole) {
#pragma unroll
      for (int k = 0; k < kBurst; ++k) copy_unit<kUnit>(slot + k * kStep, its + k * kStep);
      slot += warps * kWhole, its += warps * kWhole;
    }
    left -= lane * kUnit;
#pragma unroll 1
    for (; left > 0; left -= kStep, slot += kStep, its += kStep) copy_unit<kUnit>(slot, its);
#else
    Copier::load(to, from, bytes, barrier);
#endif
  }
};

// An array that streams, through a ring of its own.
struct Flow {
  Planes planes;
  RowRing ring;
  bool joined;      // whether the images follow each other without a gap
  int stage_bytes;  // of a chunk's rows, where each has a place of its own instead
};

struct GradStream {
  Flow source, grad;
  float* partial;  // [split][tap, or bias behind the last tap][filter], or null if there is one split:
  void *weight, *bias;
  int totals;  // then the block's sums lie here in shared memory
  int height, width, out_height, out_width;
  int kernel_h, kernel_w, stride, padding_h, padding_w, dilation;
  // Where planes are cut: the image's size, how many more columns rows have, and pixels of a plane, and before it in
  // the 16 bytes that it begins in.
  int image_height, image_width, more_columns, plane_pixels, lead;
  int images, channels, multiplier, filters;
  bool single;  // a block works for one filter, on bands of rows; else for whole planes
  int block_channels, block_filters, chunk_rows, bands;
  int splits, split_steps, more_steps;  // so many splits have a step more than the others
  // A chunk that is a block's only one arrives in two pieces, as if they were chunks. The first one has so many rows of
  // the gradient, of so many planes of the input or else the rows of one that these meet, and units before
  // `early_units` need nothing else. 0 where chunks arrive as a whole.
  int early_rows, early_channels, early_units;
  int strips, segments;
  int lanes_log2, slots_at_once;  // so many lanes add up the threads' sums of a tap, and so many taps at a time
  Divider by_block_filters;
  int filter_warps;  // where tiles are added by warps: how many work for a filter
  Divider by_image_width, by_strips, by_tiles, by_multiplier, by_bands, by_groups, by_filter_warps;
  bool with_bias, bulk, float32;
  int loaders;    // threads that load, and do nothing else
  int chunks_at;  // what the block knows of the chunks under way, in shared memory
  int scratch_at;
};

// Rows of an image, and the slot of the first of them in the ring.
struct ImageRows {
  int image, begin, end, slot;
  int place;  // where chunks have places of their own, what this one lies behind the ring's
  int fresh;  // where rows are moved, the first that was not yet in the ring
};

// The ring; or a chunk's place as one, which no row comes round in.
template <bool kStages>
__device__ decltype(auto) ring_of(const Flow& flow, const ImageRows& rows) {
  if constexpr (kStages) {
    RowRing ring = flow.ring;
    ring.memory += rows.place;
    return ring;
  } else {
    return (flow.ring);
  }
}

// A step of a block: some rows of an image, of the block's planes.
struct GradChunk {
  int row, rows;     // of each gradient plane
  int source_plane;  // the row of the image in which the block's first plane begins
  ImageRows source, grad;
};

// kCuts: whether planes are cut, so that it meets a row above and one below as well.
template <bool kCuts>
__device__ GradChunk chunk_of(const GradStream& a, int group, int step) {
  uint32_t number = step, first_channel = group * a.block_filters;
  const int filter = group * a.block_filters, filters = min(a.block_filters, a.filters - filter);
  const int band = a.by_bands.split(number), image = number;
  a.by_multiplier.split(first_channel);
  const int channel = first_channel;
  const bool source_joined = a.source.joined, grad_joined = a.grad.joined;
  GradChunk c;
  c.row = band * a.chunk_rows;
  c.rows = min(a.chunk_rows, a.out_height - c.row);
  c.source.image = source_joined ? 0 : image;
  c.grad.image = grad_joined ? 0 : image;
  c.source_plane = ((source_joined ? image * a.channels : 0) + channel) * a.height;
  const int grad_plane = ((grad_joined ? image * a.filters : 0) + filter) * a.out_height;
  if (a.single) {
    const int first = c.row * a.stride - a.padding_h - kCuts;
    const int last = first + (c.rows - 1) * a.stride + (a.kernel_h - 1) * a.dilation + 2 * kCuts;
    c.source.begin = c.source_plane + min(max(first, 0), a.height);
    c.source.end = c.source_plane + min(max(last + 1, 0), a.height);
    c.grad.begin = grad_plane + c.row;
    c.grad.end = c.grad.begin + c.rows;
  } else {
    uint32_t channels = filters;
    a.by_multiplier.split(channels);
    c.source.begin = c.source_plane;
    c.source.end = c.source_plane + static_cast<int>(channels) * a.height;
    c.grad.begin = grad_plane;
    c.grad.end = grad_plane + filters * a.out_height;
  }
  return c;
}

// Loads the rows that are not yet in the ring, where planes are cut. What is beside a plane in its first and its last
// row becomes zeros. `plane`: the row in which it begins.
template <typename T, typename Ready>
__device__ void load_cut(const GradCopier& copier, const GradStream& a, const Flow& flow, int plane, Cursor& cursor,
                         const ImageRows& rows, int barrier, Ready&& ready) {
  const RowRing& ring = flow.ring;
  const int before = rows.image * flow.planes.rows, first = max(rows.begin, cursor.end - before);
  cursor.place(ring, before + rows.begin, before + rows.end);
  if (first >= rows.end) return;
  ready();
  const int slot = cursor.slot_of(ring, before + first), straight = (ring.capacity - slot) * ring.row_bytes;
  // Bytes of the plane, from the 16 on that it begins in.
  const int begin = (first - plane) * ring.row_bytes, end = begin + (rows.end - first) * ring.row_bytes;
  const int plane_bytes = 2 * a.plane_pixels, whole = max(begin, a.lead > 0 ? kUnit : 0), last = min(end, plane_bytes);
  const char* const source =
      flow.planes.base + rows.image * flow.planes.image_bytes + int64_t{plane / a.height} * plane_bytes;
  const auto place = [&](int at) { return ring.at(at - begin < straight ? slot : slot - ring.capacity) + at - begin; };
  const int turn = min(last, begin + straight);
  copier.load(&shared<char>(place(whole)), source + whole, turn - whole, barrier);
  if (turn < last) copier.load(&shared<char>(place(turn)), source + turn, last - turn, barrier);
  if ((whole == begin && last == end) || copier.rank() >= 32) return;
  for (int at = last + copier.rank() * kUnit; at < end; at += 32 * kUnit) shared<uint4>(place(at)) = uint4{};
  __syncwarp();
  // Of 16 bytes that are not the plane's alone.
  const auto copy = [&](int unit, bool is_its) {
    const int at = unit + 2 * copier.rank();
    if (copier.rank() < kUnit / 2) shared<T>(place(at)) = is_its ? *reinterpret_cast<const T*>(source + at) : T{};
  };
  if (whole > begin) copy(0, copier.rank() >= a.lead);
  if (last < end && a.lead > 0) copy(plane_bytes, copier.rank() < a.lead);
  before_bulk_copies();  // to the same places
}

// The rows behind the first piece of a chunk.
struct Middle {
  int source, grad;
};

__device__ inline Middle middle_of(const GradStream& a, const GradChunk& c) {
  int source = c.source_plane + a.early_channels * a.height;
  if (a.early_channels == 0) {
    const int last = (c.row + a.early_rows - 1) * a.stride - a.padding_h + (a.kernel_h - 1) * a.dilation;
    source += min(max(last + 2, 0), a.height);  // with the row behind them, into which words of the last one reach
  }
  return {min(max(source, c.source.begin), c.source.end), min(c.grad.begin + a.early_rows, c.grad.end)};
}

// Loads the rows that are not yet in the ring, each from the 16 bytes on in which it begins, to where its slot does:
// from there move_rows moves it. `ready`: called when memory is about to be read.
template <typename T, typename Ready>
__device__ void load_to_move(const GradCopier& copier, const Flow& flow, Cursor& cursor, ImageRows& rows, int barrier,
                             Ready&& ready) {
  const Planes& planes = flow.planes;
  const int before = rows.image * planes.rows;
  rows.fresh = max(rows.begin, cursor.end - before);
  cursor.place(flow.ring, before + rows.begin, before + rows.end);
  if (rows.fresh >= rows.end) return;
  ready();
  int row = rows.fresh, slot = cursor.slot_of(flow.ring, before + row);
  const auto address_of = [&](int row) {
    return planes.base + rows.image * planes.image_bytes + static_cast<int64_t>(row) * planes.row_bytes;
  };
  const auto misfit_of = [](const char* from) { return static_cast<int>(reinterpret_cast<uintptr_t>(from) % kUnit); };
  const auto load_outermost = [&](int row, int slot) {  // nothing beside the image is touched
    const int phase = misfit_of(planes.base), to = flow.ring.at(slot) + misfit_of(address_of(row));
    load_rows<T>(copier, {to - phase, phase, planes.row_bytes}, planes, rows.image, row, 1, 0, false, barrier,
                 Nothing{});
  };
  if (row == 0) {
    load_outermost(row++, slot);
    slot = flow.ring.wrap(slot + 1);
  }
  // Slots are filled, with what is around the rows.
  const int end = min(rows.end, planes.rows - 1), bytes = flow.ring.row_bytes;
  const char* from = address_of(row);
  if (!copier.bulk) {
    for (; row < end; ++row, from += planes.row_bytes) {
      copier.load(&shared<char>(flow.ring.at(slot)), from - misfit_of(from), bytes, barrier);
      slot = flow.ring.wrap(slot + 1);
    }
  } else if (row < end) {
    if (is_elected()) {
      expect_bytes(barrier, (end - row) * bytes);
      const uint32_t ring = shared_address(flow.ring.at(0)), ring_end = ring + flow.ring.capacity * bytes;
      uint32_t to = ring + slot * bytes;
      const auto copy = [&] {
        copy_bulk(to, from - misfit_of(from), bytes, barrier);
        to += bytes, from += planes.row_bytes;
        if (to == ring_end) to = ring;
      };
      constexpr int kTogether = 7;  // addresses in uniform registers, as copies take them
      int left = end - row;
#pragma unroll 1
      for (; left >= kTogether; left -= kTogether)
#pragma unroll
        for (int i = 0; i < kTogether; ++i) copy();
#pragma unroll 1
      for (; left > 0; --left) copy();
    }
    slot = flow.ring.wrap(slot + end - row), row = end;
  }
  if (row < rows.end) load_outermost(row, slot);
}

// Moves a row of so many units to where its slot begins, by a warp; it begins kWords words and so many bits behind. A
// lane has 9 units side by side: an odd number, so that lanes are in different banks.
template <int kWords>
__device__ inline void move_row(int slot, int units, uint32_t bits) {
  constexpr int kUnits = 9, kAhead = 2;
#pragma unroll 1
  for (int begin = 0; begin < units; begin += 32 * kUnits) {
    const int first = begin + static_cast<int>(threadIdx.x % 32) * kUnits, at = slot + first * kUnit;
    const int left = units - first;
    const auto read = [&](int u) { return u <= left ? shared<uint4>(at + u * kUnit) : uint4{}; };
    const uint4 next = read(kUnits);  // which another lane is to write
    uint4 unit[kAhead + 1];
#pragma unroll
    for (int u = 0; u < kAhead; ++u) unit[u] = read(u);
    __syncwarp();
#pragma unroll
    for (int u = 0; u < kUnits; ++u) {
      const int ahead = u + kAhead;
      if (ahead < kUnits) unit[ahead % (kAhead + 1)] = read(ahead);
      const uint4& high = u + 1 < kUnits ? unit[(u + 1) % (kAhead + 1)] : next;
      if (u < left) shared<uint4>(at + u * kUnit) = shifted<kWords>(unit[u % (kAhead + 1)], high, bits);
    }
  }
  __syncwarp();
}

// Moves the rows of a chunk that have just come, by so many warps; there are zeros behind, up to 16 bytes.
__device__ inline void move_rows(const GradStream& a, const GradChunk& c, int warps) {
  const int sources = c.source.end - c.source.fresh, all = sources + c.grad.end - c.grad.fresh;
  const auto move = [](const Flow& flow, const ImageRows& rows, int number) {
    const int row = rows.fresh + number, slot = flow.ring.at(flow.ring.wrap(rows.slot + row - rows.begin));
    const int bytes = flow.planes.row_bytes, lane = threadIdx.x % 32;
    const uint32_t begin = static_cast<uint32_t>(reinterpret_cast<uintptr_t>(flow.planes.base)) + row * bytes;
    const uint32_t misfit = begin % kUnit, bits = misfit % 4 * 8;
    const int units = (bytes + kUnit - 1) / kUnit;
    if (misfit >= 12)
      move_row<3>(slot, units, bits);
    else if (misfit >= 8)
      move_row<2>(slot, units, bits);
    else if (misfit >= 4)
      move_row<1>(slot, units, bits);
    else if (misfit > 0)
      move_row<0>(slot, units, bits);
    if (const int at = bytes + 2 * lane; at < (bytes + kUnit - 1) / kUnit * kUnit) shared<uint16_t>(slot + at) = 0;
  };
  for (int i = threadIdx.x / 32; i < all; i += warps)
    if (i < sources)
      move(a.source, c.source, i);
    else
      move(a.grad, c.grad, i - sources);
  before_bulk_copies();  // to the same places
}

// The sum of one tap over the block's part of the images, by all threads, of products inside the image only.
template <typename T, bool kCuts>
__device__ __noinline__ float sum_by_products(const GradStream& a, int group, int first, int last, int filter,
                                              int tap) {
  const int height = kCuts ? a.image_height : a.height, width = kCuts ? a.image_width : a.width;
  const int out_height = kCuts ? a.image_height : a.out_height, out_width = kCuts ? a.image_width : a.out_width;
  const int channel = (group * a.block_filters + filter) / a.multiplier;
  const int i = tap / a.kernel_w * a.dilation - a.padding_h, j = tap % a.kernel_w * a.dilation - a.padding_w;
  float sum = 0;
  for (int step = first; step < last; ++step) {
    const GradChunk c = chunk_of<kCuts>(a, group, step);
    const int image = step / a.bands;
    const Planes &source = a.source.planes, &grad = a.grad.planes;
    const auto* x = reinterpret_cast<const T*>(source.base + image * source.image_bytes) + a.lead +
                    static_cast<int64_t>(channel) * height * width;
    const auto* g = reinterpret_cast<const T*>(grad.base + image * grad.image_bytes) + a.lead +
                    static_cast<int64_t>(group * a.block_filters + filter) * out_height * out_width;
    // Pixels are the same, counted down a plane, however it is cut.
    const int first = c.row * a.out_width - a.lead, begin = max(first, 0);
    const int end = min(first + c.rows * a.out_width, out_height * out_width);
    for (int at = begin + static_cast<int>(threadIdx.x); at < end; at += blockDim.x) {
      const int row = at / out_width, column = at % out_width;
      const int y = row * a.stride + i, k = column * a.stride + j;
      if (y >= 0 && y < height && k >= 0 && k < width) sum = fmaf(widen(x[y * width + k]), widen(g[at]), sum);
    }
  }
  return sum;
}

// Adds up what so many threads side by side have, a power of two.
__device__ inline float sum_of_lanes(float sum, int lanes) {
  const uint32_t team = (~0u >> (32 - lanes)) << (threadIdx.x % 32 & -lanes);
  for (int offset = lanes / 2; offset > 0; offset /= 2) sum += __shfl_xor_sync(team, sum, offset);
  return sum;
}

// Adds up `count` values in shared memory; so many threads do so together.
__device__ inline float sum_of(int values, int count, int lanes) {
  float sum = 0;
  for (int i = threadIdx.x % lanes; i < count; i += lanes) sum += shared<float>(values + 4 * i);
  return sum_of_lanes(sum, lanes);
}

// What tiles have in common that take any part of a plane, and have the taps in their order.
template <int kKernelW>
struct AnyPart {
  static constexpr bool kWhole = false, kPlane = false, kTurns = false, kPieces = false, kUnits = false;
  static constexpr bool kMoves = false, kCuts = false, kStages = false;
  static constexpr int kProducts = 0, kScratch = 0;

  __device__ int tap(int i, int j) const { return i * kKernelW + j; }
};

constexpr int kManyTaps = 25;  // from so many on arithmetic bounds it, not bytes

// Chunks under way.
constexpr int depth_of(bool moves) {
  return moves ? kMovedDepth : kDepth;
}

template <typename T, class Tile>
__global__ void __launch_bounds__(Tile::kMaxThreads + 32, Tile::kBlocks)
    stream_grad_weight_nchw(const __grid_constant__ GradStream a) {
  constexpr int kTaps = Tile::kKernelH * Tile::kKernelW, kChunks = depth_of(Tile::kMoves);
  if (threadIdx.x < 32) shared<uint32_t>(kZeros + 4 * threadIdx.x) = 0;
  const GradCopier copier(a.bulk, true, true, a.loaders);
  copier.init(false, kChunks);
  let_next_kernel_start();
  __syncthreads();
  const bool loads = !copier.dedicated || !copier.is_worker();
  if (!loads) wait_for_kernel_before();

  uint32_t quotient = blockIdx.x;
  const int group = a.by_groups.split(quotient), split = quotient;
  const int filters = min(a.block_filters, a.filters - group * a.block_filters);
  const int first = split * a.split_steps + min(split, a.more_steps);
  const int last = first + a.split_steps + (split < a.more_steps ? 1 : 0);
  Cursor source_cursor, grad_cursor;
  bool may_read = false;  // the kernel before is done
  int stage = 0;
  uint32_t parity = loads ? 1 : 0;
  // By one piece of code for all chunks: instructions are slow to come the first time. What there is to find out is so
  // before the wait for the place that the chunk takes.
  const bool in_pieces = Tile::kPieces && copier.bulk && a.early_units > 0;
  const auto load = [&](int step) {
    if (step < last + in_pieces && (copier.loads() || Tile::kMoves || Tile::kCuts)) {
      GradChunk c = chunk_of<Tile::kCuts>(a, group, in_pieces ? first : step);
      const int source_end = c.source.end, grad_end = c.grad.end;
      if (in_pieces) {
        const Middle middle = middle_of(a, c);
        (stage == 0 ? c.source.end : c.source.begin) = middle.source;
        (stage == 0 ? c.grad.end : c.grad.begin) = middle.grad;
      }
      bool taken = copier.dedicated && step >= first + kChunks;
      // Where much is multiplied, the second chunk, or piece, waits for the first one: that of every block comes
      // before.
      bool second = kTaps >= kManyTaps && Tile::kBlocks > 1 && copier.dedicated && step == first + 1;
      const auto ready = [&] {
        if (taken) wait(Barriers::done(stage), parity);
        if (second) wait(Barriers::full(0), 0);
        taken = second = false;
        if (!may_read) settle_and_wait_for_kernel_before(a.splits);
        may_read = true;
      };
      const auto load_flow = [&](const Flow& flow, Cursor& cursor, ImageRows& rows) {
        if constexpr (Tile::kMoves) {
          load_to_move<T>(copier, flow, cursor, rows, Barriers::full(stage), ready);
          rows.slot = cursor.slot_of(flow.ring, rows.image * flow.planes.rows + rows.begin);
          return;
        }
        if constexpr (Tile::kCuts) {
          const int plane = &flow == &a.source ? c.source_plane : c.grad.begin - c.row;
          load_cut<T>(copier, a, flow, plane, cursor, rows, Barriers::full(stage), ready);
          rows.slot = cursor.slot_of(flow.ring, rows.image * flow.planes.rows + rows.begin);
          return;
        }
        if constexpr (Tile::kStages) {  // as if the row before were the last one placed
          const uint32_t row_begin = flow.ring.phase + static_cast<uint32_t>(rows.begin) * flow.ring.row_bytes;
          rows.place = stage * flow.stage_bytes + static_cast<int>(row_begin % kUnit) - flow.ring.phase;
          cursor = {rows.image * flow.planes.rows + rows.begin - 1, -1};
        }
        load_rows<T>(copier, ring_of<Tile::kStages>(flow, rows), flow.planes, cursor, rows.image, rows.begin, rows.end,
                     Barriers::full(stage), ready);
        rows.slot = cursor.slot_of(flow.ring, rows.image * flow.planes.rows + rows.begin);
      };
      load_flow(a.source, source_cursor, c.source);
      load_flow(a.grad, grad_cursor, c.grad);
      c.source.end = source_end, c.grad.end = grad_end;
      if (copier.rank() == 0) shared<GradChunk>(a.chunks_at + stage * static_cast<int>(sizeof(GradChunk))) = c;
    }
    if (Tile::kMoves || Tile::kCuts) __syncwarp();
    if (step < last + in_pieces || !copier.dedicated) copier.commit(stage);
  };

  Tile sums(a);
  const int tiles = a.strips * a.segments, units = a.single ? tiles : filters * tiles;
  const auto chunk_at = [&](int stage) {
    return shared<GradChunk>(a.chunks_at + stage * static_cast<int>(sizeof(GradChunk)));
  };
  const auto add = [&](const GradChunk& c, int step) {
    if (Tile::kLanes == 1) {
      for (int unit = threadIdx.x; unit < units; unit += copier.workers()) {
        uint32_t filter = unit;
        const int tile = a.by_tiles.split(filter);
        sums.template add<T>(a, c, filter, tile);
      }
    } else {
      uint32_t quotient = threadIdx.x / 32;
      int number = a.by_filter_warps.split(quotient);
      const int filter = quotient;
      if (Tile::kTurns) number = (number + step - first) % a.filter_warps;
      if (filter < filters)
        for (int tile = number * Tile::kTiles; tile < tiles; tile += a.filter_warps * Tile::kTiles) {
          if (in_pieces && filter * tiles + min(tile + Tile::kTiles, tiles) > a.early_units) wait(Barriers::full(1), 0);
          sums.template add<T>(a, c, filter, tile);
        }
    }
    if constexpr (Tile::kCuts) sums.template add_edges<T>(a, c);
  };
  if (Tile::kMoves && copier.is_worker()) {
    // Of a scheduler's warps two of four move rows while the others add.
    const int turn_to_move = threadIdx.x / 128 % 2;
    int next = 0;
    for (int step = first - 1; step < last; ++step) {
#pragma unroll 1
      for (int turn = 0; turn < 2; ++turn)
        if (turn == turn_to_move) {
          if (step + 1 == last) continue;
          wait(Barriers::full(next), parity);
          move_rows(a, chunk_at(next), copier.workers() / 32);
        } else if (step >= first) {
          add(chunk_at(stage), step);
          copier.finish(stage);
        }
      meet<1>(copier.workers());
      stage = next;
      if (++next == kChunks) next = 0, parity ^= 1;
    }
  } else {
    for (int step = loads ? first - kChunks : first; step < last; ++step) {
      if (!Tile::kMoves && step >= first && copier.is_worker()) {
        copier.wait_full(stage, parity);
        if (!copier.dedicated) __syncthreads();
        add(chunk_at(stage), step);
        if (copier.dedicated)
          copier.finish(stage);
        else
          __syncthreads();
      }
      if (loads) load(step + kChunks);
      if (++stage == kChunks) stage = 0, parity ^= 1;
    }
  }
  if (in_pieces) wait(Barriers::full(1), 0);  // before the rings take sums, whoever has read of it
  __syncthreads();

  const int slots = kTaps + a.with_bias;
  const bool complete = a.partial == nullptr;
  float* results = complete ? &shared<float>(a.totals)
                            : a.partial + static_cast<int64_t>(split) * slots * a.filters + group * a.block_filters;
  const int pitch_of_slots = complete ? filters : a.filters;
  bool again = false;
  if constexpr (Tile::kPlane) {  // a thread has all sums of its filter
    if (static_cast<int>(threadIdx.x) < filters) {
      float* to = results + threadIdx.x;
      float zero = 0;
#pragma unroll
      for (int i = 0; i < Tile::kKernelH; ++i)
#pragma unroll
        for (int j = 0; j < Tile::kKernelW; ++j) {
          *to = sums.total(i, j);
          to += pitch_of_slots;
          zero = fmaf(sums.total(i, j), 0.f, zero);
        }
      if (a.with_bias) *to = sums.total_bias();
      again = zero != 0.f;
    }
  } else if constexpr (Tile::kProducts > 0) {
    static_assert(Tile::kProducts <= Tile::kKernelW);  // so that there is room
    // The rings have served: their memory takes the products of all warps, of which a tap's are added up by as many
    // lanes as its diagonal has.
    constexpr int kCount = 32 * (Tile::kKernelH * Tile::kProducts + 1), kWarps = Tile::kMaxThreads / 32;
    const int lane = threadIdx.x % 32;
    if (copier.is_worker()) {
      const int put = kHead + 4 * (threadIdx.x / 32 * kCount + lane);
#pragma unroll
      for (int i = 0; i < Tile::kKernelH; ++i)
#pragma unroll
        for (int e = 0; e < Tile::kProducts; ++e)
          shared<float>(put + 128 * (i * Tile::kProducts + e)) = sums.product(i, e);
      shared<float>(put + 4 * (kCount - 32)) = sums.total_bias();
    }
    __syncthreads();
    constexpr int kLanes = Tile::kDiagonal;
    const int n = threadIdx.x % kLanes;
    for (int at = threadIdx.x / kLanes; at < a.block_filters * slots; at += blockDim.x / kLanes) {
      uint32_t number = at;
      const int own = a.by_block_filters.split(number), slot = number;
      if (own >= filters) continue;
      const bool is_tap = slot < kTaps, is_there = is_tap || n < 4;
      const int row = slot / Tile::kKernelW * Tile::kProducts, m = sums.begin(slot % Tile::kKernelW) + n;
      const int place =
          kHead + 4 * (own * a.filter_warps * kCount + (is_tap ? 32 * row + Tile::product_of(m, n) : kCount - 32 + n));
      float total = 0;
#pragma unroll  // no branch between the loads
      for (int w = 0; w < kWarps; ++w)
        total += is_there && w < a.filter_warps ? shared<float>(place + 4 * w * kCount) : 0;
      total = sum_of_lanes(total, kLanes);
      if (n > 0) continue;
      results[static_cast<int64_t>(slot) * pitch_of_slots + own] = total;
      again |= is_tap && !is_finite(total);
    }
  } else {
    // The rings have served: their memory takes the sums, tap by tap, of all threads, at a pitch that keeps those of
    // different taps in different banks.
    const int lanes = 1 << a.lanes_log2, pitch = blockDim.x + lanes;
#pragma unroll
    for (int i = 0; i < Tile::kKernelH; ++i)
#pragma unroll
      for (int j = 0; j < Tile::kKernelW; ++j)
        shared<float>(kHead + 4 * (sums.tap(i, j) * pitch + threadIdx.x)) = sums.total(i, j);
    shared<float>(kHead + 4 * (kTaps * pitch + threadIdx.x)) = sums.total_bias();
    __syncthreads();
    const int per_filter = a.single ? copier.workers() : Tile::kLanes == 1 ? tiles : 32 * a.filter_warps;
    // Lanes that add up together stay with a filter, of which there are not more than such lanes.
    uint32_t team = threadIdx.x >> a.lanes_log2;
    const int own = a.by_block_filters.split(team), first_slot = team, at_once = a.slots_at_once;
    if (first_slot < at_once && own < filters) {
      int from = kHead + 4 * (first_slot * pitch + own * per_filter);
      float* to = results + static_cast<int64_t>(first_slot) * pitch_of_slots + own;
      for (int slot = first_slot; slot < slots; slot += at_once) {
        const float total = sum_of(from, per_filter, lanes);
        if (threadIdx.x % lanes == 0) {
          *to = total;
          again |= slot < kTaps && !is_finite(total);
        }
        from += 4 * at_once * pitch, to += static_cast<int64_t>(at_once) * pitch_of_slots;
      }
    }
  }
  if (__syncthreads_or(again))
    for (int at = 0; at < kTaps * filters; ++at) {
      const int slot = at / filters, filter = at % filters;
      float* result = results + static_cast<int64_t>(slot) * pitch_of_slots + filter;
      const bool finite = is_finite(*const_cast<volatile float*>(result));  // the same for all threads
      __syncthreads();
      if (finite) continue;
      shared<float>(kHead + 4 * threadIdx.x) = sum_by_products<T, Tile::kCuts>(a, group, first, last, filter, slot);
      __syncthreads();
      const float exact = sum_of(kHead, blockDim.x, 32);
      if (threadIdx.x == 0) *result = exact;
      __syncthreads();
    }
  if (!complete) return;
  for (int i = threadIdx.x; i < slots * filters; i += blockDim.x) {
    const int slot = i / filters, filter = group * a.block_filters + i - slot * filters;
    T* to = slot < kTaps ? static_cast<T*>(a.weight) + filter * kTaps + slot : static_cast<T*>(a.bias) + filter;
    *to = narrow<T>(results[i]);
  }
}

// How the work is cut; the rest follows from it.
struct GradCut {
  bool single, staged;
  int block_channels, chunk_rows, threads, splits, filter_warps;
  int64_t shared_bytes;
  int loaders;
  double score;
};

// What there is to know of a class of tiles.
struct GradTileSize {
  int rows, columns, together, lanes, taps;
  int threads_per_block, blocks_per_multiprocessor;  // as the registers allow, besides a warp that copies
  bool odd_strips;                                   // an odd number of tiles side by side
  bool whole;
  int scratch;  // bytes of a warp
  bool pieces;
  bool units;  // whether a row of a tile is 16 bytes that are read at once
  bool stages, moves, cuts;

  int64_t strips(int64_t width) const { return ceil_div(width, columns) | (odd_strips ? 1 : 0); }
};

// Besides the threads that add and those that copy: what sets taps apart by the lanes that add up.
constexpr int kMostLanes = 8;

// Fills in what follows from a cut.
inline void apply(GradStream& a, GradCut& cut, const GradTileSize& tile) {
  a.single = cut.single, a.block_channels = cut.block_channels, a.chunk_rows = cut.chunk_rows, a.splits = cut.splits;
  a.loaders = cut.loaders;
  a.block_filters = cut.single ? 1 : cut.block_channels * a.multiplier;
  a.bands = static_cast<int>(ceil_div(a.out_height, cut.chunk_rows)), a.by_bands = Divider(a.bands);
  a.by_groups = Divider(ceil_div(a.filters, a.block_filters));
  const int64_t steps = int64_t{a.images} * a.bands;
  a.split_steps = static_cast<int>(steps / cut.splits), a.more_steps = static_cast<int>(steps % cut.splits);
  a.filter_warps = cut.filter_warps, a.by_filter_warps = Divider(std::max(cut.filter_warps, 1));
  a.strips = static_cast<int>(tile.strips(a.out_width));
  a.by_strips = Divider(a.strips);
  a.segments = static_cast<int>(ceil_div(cut.chunk_rows, tile.rows));
  const int per_filter = cut.single ? cut.threads : tile.lanes == 1 ? a.strips * a.segments : 32 * cut.filter_warps;
  constexpr int kFew = 32;  // sums that one lane adds up; more are added by 8
  a.lanes_log2 = per_filter < kFew ? 0 : 3;
  a.slots_at_once = (cut.threads + a.loaders) / (a.block_filters << a.lanes_log2);
  a.by_block_filters = Divider(a.block_filters);
  // The rest is to arrive while the first piece is added.
  const int early_segments = (2 * a.segments + 4) / 5, early_filters = (2 * a.block_filters + 4) / 5;
  const bool by_segments = a.block_filters == 1, in_pieces = tile.pieces && steps == cut.splits;
  a.early_channels = by_segments ? 0 : (early_filters + a.multiplier - 1) / a.multiplier;
  a.early_rows = by_segments ? early_segments * tile.rows : early_filters * a.out_height;
  a.early_units = in_pieces ? (by_segments ? early_segments : early_filters * a.segments) * a.strips : 0;
  a.by_tiles = Divider(cut.single ? int64_t{1} << 30 : int64_t{a.strips} * a.segments);
  const int extent = (a.kernel_h - 1) * a.dilation + 1 + 2 * tile.cuts;
  RowRing &source = a.source.ring, &grad = a.grad.ring;
  int64_t source_rows = cut.staged   ? (cut.chunk_rows - 1) * a.stride + extent
                        : cut.single ? rows_for_bands(a.bands, cut.chunk_rows * a.stride, extent, source.row_bytes)
                                     : rows_for_planes(int64_t{cut.block_channels} * a.height, source.row_bytes);
  int64_t grad_rows =
      cut.staged
          ? cut.chunk_rows
          : rows_for_planes(cut.single ? cut.chunk_rows : int64_t{a.block_filters} * a.out_height, grad.row_bytes);
  if (tile.moves && cut.single) {
    source_rows = rows_to_move(a.bands, cut.chunk_rows * a.stride, extent, a.padding_h);
    grad_rows = rows_to_move(a.bands, cut.chunk_rows, 1, 0);
  } else if (tile.moves) {
    source_rows = rows_to_move(1, int64_t{cut.block_channels} * a.height, 1, 0);
    grad_rows = rows_to_move(1, int64_t{a.block_filters} * a.out_height, 1, 0);
  }
  source.period = static_cast<int>(period_of(source.row_bytes));
  grad.period = static_cast<int>(period_of(grad.row_bytes));
  source.capacity = static_cast<int>(source_rows), grad.capacity = static_cast<int>(grad_rows);
  const auto arrange = [&](Flow& flow, int64_t rows) {  // returns the bytes that it takes
    flow.stage_bytes = cut.staged ? static_cast<int>(stage_bytes(rows, flow.ring.row_bytes)) : 0;
    return cut.staged ? int64_t{kDepth} * flow.stage_bytes + kTail : ring_bytes(rows, flow.ring.row_bytes);
  };
  source.memory = kHead;
  grad.memory = static_cast<int>(kHead + arrange(a.source, source_rows));
  a.chunks_at = static_cast<int>(grad.memory + arrange(a.grad, grad_rows));
  a.scratch_at = static_cast<int>(round_up(a.chunks_at + depth_of(tile.moves) * sizeof(GradChunk), kUnit));
  const int64_t slot_bytes = int64_t{tile.taps + 1} * static_cast<int64_t>(sizeof(float));
  a.totals = static_cast<int>(kHead + slot_bytes * (cut.threads + a.loaders + kMostLanes));
  cut.shared_bytes =
      std::max<int64_t>(a.scratch_at + cut.threads / 32 * tile.scratch, a.totals + slot_bytes * a.block_filters);
}

// Cuts the work so that as many threads as possible have some on a multiprocessor at a time, and every block about as
// much as the others. Besides them so many threads of a block load.
inline GradCut cut_for(GradStream a, const GradTileSize& tile, const Device& device, int loaders) {
  GradCut best{};
  best.score = -1;
  // Whether the first chunks of all blocks are a good part of both arrays.
  const int64_t image_bytes = int64_t{a.channels} * a.height * a.source.ring.row_bytes +
                              int64_t{a.filters} * a.out_height * a.grad.ring.row_bytes;
  const bool soon_done =
      a.images * image_bytes < int64_t{4} * device.shared_per_multiprocessor * device.multiprocessors;
  const int most_loaders = std::max(loaders, 32), most_threads = tile.threads_per_block + 32 - most_loaders;
  const auto consider = [&](bool single, int channels, int rows) {
    const int64_t tiles = tile.strips(a.out_width) * ceil_div(rows, tile.rows);
    const int64_t filters = single ? 1 : channels * a.multiplier;
    const int64_t each = ceil_div(tiles, tile.together), units = each * filters * tile.lanes;
    GradCut cut{single, tile.stages, channels, rows, 0, 1, 0, 0, loaders, 0};
    int64_t rounds = 1;
    if (tile.lanes == 1) {
      cut.threads = threads_for(units, most_threads), rounds = ceil_div(units, cut.threads);
      if (!single && units > cut.threads) return false;  // a thread works for one filter only
    } else {
      // The sums of so many threads there is room for, and those of a filter.
      const int64_t sums = (device.shared_per_block - kHead) / (4 * (tile.taps + 1)) - loaders - kMostLanes - 1;
      const int64_t most = std::min<int64_t>(most_threads, sums) / tile.lanes;
      if (filters > most) return false;  // so does a warp
      rounds = ceil_div(each, std::min(each, most / filters));
      cut.filter_warps = static_cast<int>(ceil_div(each, rounds));
      cut.threads = static_cast<int>(cut.filter_warps * filters * tile.lanes);
    }
    apply(a, cut, tile);
    const int64_t resident = std::min<int64_t>(
        {device.shared_per_multiprocessor / (cut.shared_bytes + 1024),
         (tile.threads_per_block + 32) * tile.blocks_per_multiprocessor / (cut.threads + most_loaders), 16});
    if (cut.shared_bytes > device.shared_per_block || resident == 0) return false;
    const int64_t slots = resident * device.multiprocessors, groups = ceil_div(a.filters, a.block_filters);
    const int64_t steps = int64_t{a.images} * a.bands;
    const int64_t splits = std::min(steps, std::max<int64_t>(1, slots / groups));
    const double turns = static_cast<double>(groups * splits) / slots;
    double even = turns / std::ceil(turns) * (static_cast<double>(steps) / splits) / ceil_div(steps, splits);
    if (tile.lanes == 1) even *= static_cast<double>(a.filters) / (groups * a.block_filters);
    double busy = static_cast<double>(resident * units) / rounds;
    if (tile.lanes == 1 && tile.taps < kManyTaps && loaders > 0 &&
        (a.float32 || (tile.units && tile.taps > 1 && soon_done))) {
      // Bytes bound: as many threads as keep up with memory are enough, and memory is faster where less is on its way
      // at once, in whole lines. Bands share rows, and the last one may be short. In 16 bits there are as many
      // instructions for half of the bytes.
      constexpr int64_t kEnoughBytes = 160 << 10;
      busy = std::min(busy, (a.float32 ? 14. : 28.) * tile.taps);
      if (resident * cut.shared_bytes > kEnoughBytes) busy *= 0.85;
      const auto in_lines = [&](const RowRing& ring, int64_t planes, int height) {
        return planes * height * ring.row_bytes % 128 == 0;
      };
      const bool lines = in_lines(a.source.ring, channels, a.height) && in_lines(a.grad.ring, filters, a.out_height);
      if (a.bands > 1 || !lines) busy *= 0.9;
      busy *= static_cast<double>(a.out_height) / (a.bands * rows);
    }
    if (tile.stages) {  // rows that bands share are loaded again
      const double source_rows = (rows - 1.) * a.stride + (a.kernel_h - 1.) * a.dilation + 1;
      busy *= (a.stride + 1.) * rows / (source_rows + rows);
    }
    const double chunk_bytes =
        static_cast<double>(cut.shared_bytes - kHead) / depth_of(tile.moves);  // a chunk costs some barriers
    cut.score = busy * even * chunk_bytes / (chunk_bytes + 3000), cut.splits = static_cast<int>(splits);
    if (cut.score > best.score * 1.02) best = cut;
    return true;
  };
  if (!tile.stages && !tile.cuts)
    for (int channels = 1; channels <= a.channels; ++channels)
      if (!consider(false, channels, a.out_height)) break;
  if (!tile.whole) {
    if (!tile.stages) consider(true, 1, a.out_height);
    for (int rows = tile.rows; rows < a.out_height; rows += tile.rows)
      if (!consider(true, 1, rows)) break;
    if (tile.stages)
      for (int rows = tile.rows - 1; rows > kLeastRows && best.score < 0; --rows) consider(true, 1, rows);
    if (best.score < 0) consider(true, 1, kLeastRows);
  }
  if (best.score < 0) throw std::runtime_error("dwconv: rows of this size do not fit the GPU's shared memory");
  return best;
}

// The same, and how many threads load.
inline GradCut cut_with_loaders(const GradStream& a, const GradTileSize& tile, const Device& device) {
  if (device.capability < 80) return cut_for(a, tile, device, 0);
  // Tensor cores leave most warps of few taps without work.
  if (!a.bulk && tile.taps < kManyTaps && tile.lanes > 1) return cut_for(a, tile, device, 128);
  const GradCut one = cut_for(a, tile, device, 32);
  if (a.bulk || (tile.taps >= kManyTaps && tile.lanes == 1)) return one;
  // A warp that copies 16 bytes a thread may be slower than memory. Two are not, but should not take the place of
  // threads that add.
  const GradCut two = cut_for(a, tile, device, 64);
  return two.score >= 0.9 * one.score ? two : one;
}

template <class Tile>
constexpr GradTileSize size_of_tile() {
  return {Tile::kRows,       Tile::kColumns, Tile::kTiles,     Tile::kLanes, Tile::kKernelH * Tile::kKernelW,
          Tile::kMaxThreads, Tile::kBlocks,  Tile::kOddStrips, Tile::kWhole, Tile::kScratch,
          Tile::kPieces,     Tile::kUnits,   Tile::kStages,    Tile::kMoves, Tile::kCuts};
}

// Whether there is room for bands of so many rows, and for what warps need besides.
template <class Tile>
bool has_room(GradStream a, int rows = kLeastRows) {
  constexpr GradTileSize kTile = size_of_tile<Tile>();
  GradCut least{true, Tile::kStages, 1, std::min(rows, a.out_height), 32, 1, 1, 0, 0, 0};
  apply(a, least, kTile);
  return a.scratch_at + Tile::kMaxThreads / 32 * Tile::kScratch <= current_device().shared_per_block;
}

template <typename T, class Tile>
void launch(const Problem& p, GradStream a, const Allocate& allocate, cudaStream_t stream) {
  constexpr int kTaps = Tile::kKernelH * Tile::kKernelW;
  constexpr GradTileSize kTile = size_of_tile<Tile>();
  const Device& device = current_device();
  const auto kernel = stream_grad_weight_nchw<T, Tile>;
  a.bulk = a.bulk && can_overlap(kernel);
  static thread_local Decisions<9, GradCut> decisions;
  GradCut cut = decisions(
      {device.id, a.bulk, a.images, a.channels, a.multiplier, a.height, a.width, a.out_height, a.out_width}, [&] {
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, device.shared_per_block);
        return cut_with_loaders(a, kTile, device);
      });
  apply(a, cut, kTile);
  const int64_t blocks = ceil_div(a.filters, a.block_filters) * a.splits;
  const int64_t sums = int64_t{kTaps + a.with_bias} * a.filters;
  if (a.splits > 1)
    a.partial = static_cast<float*>(allocate(a.splits * sums * static_cast<int64_t>(sizeof(float))));
  else
    a.weight = p.weight.data, a.bias = p.bias;
  launch_early(kernel, a, blocks, cut.threads + a.loaders, stream, {.shared_bytes = cut.shared_bytes});
  check_launch("stream_grad_weight_nchw");
  if (a.splits > 1) launch_add_partial_sums(p, a.partial, a.splits, stream);
}

// Has rows moved to where 16 bytes begin.
inline void move(Flow& flow) {
  flow.ring.row_bytes = static_cast<int>(moved_row_bytes(flow.planes.row_bytes)), flow.ring.phase = 0;
}

// Cuts planes, which begin at the same place in 16 bytes, in rows of whole units of 16 bytes, of about as many columns
// as the image's. A tap is as many of these rows away, and each row of a kernel some columns further to one side than
// the one before. Products that go around the end of the image's rows are to be taken back.
inline void cut_planes(GradStream& a) {
  constexpr int kColumns = kUnit / 2;
  const int columns = (a.width + kColumns / 2) / kColumns * kColumns;
  a.image_height = a.height, a.image_width = a.width, a.by_image_width = Divider(a.width);
  a.more_columns = columns - a.width, a.plane_pixels = a.height * a.width, a.lead = a.source.ring.phase / 2;
  a.width = a.out_width = columns;
  a.height = a.out_height = static_cast<int>(ceil_div(a.plane_pixels + a.lead, columns));
  const auto arrange = [&](Flow& flow, int planes) {
    flow.planes.base -= flow.ring.phase, flow.ring.phase = 0;
    flow.ring.row_bytes = flow.planes.row_bytes = 2 * columns;
    flow.planes.rows = planes * a.height * (flow.joined ? a.images : 1);
  };
  arrange(a.source, a.channels), arrange(a.grad, a.filters);
}

// The arguments that follow from a problem.
inline GradStream grad_stream_of(const Problem& p, bool bulk) {
  const int64_t size = size_of(p.dtype);
  GradStream a{};
  a.height = static_cast<int>(p.height), a.width = static_cast<int>(p.width);
  a.out_height = static_cast<int>(p.out_height), a.out_width = static_cast<int>(p.out_width);
  a.kernel_h = static_cast<int>(p.kernel_h), a.kernel_w = static_cast<int>(p.kernel_w);
  a.stride = static_cast<int>(p.stride_h), a.dilation = static_cast<int>(p.dilation_h);
  a.padding_h = static_cast<int>(p.padding_h), a.padding_w = static_cast<int>(p.padding_w);
  a.images = static_cast<int>(p.batch), a.channels = static_cast<int>(p.channels);
  a.multiplier = static_cast<int>(p.multiplier), a.filters = static_cast<int>(p.filters());
  a.by_multiplier = Divider(p.multiplier);
  a.with_bias = p.bias != nullptr, a.bulk = bulk, a.float32 = p.dtype == DType::kFloat32;
  const auto arrange = [&](const View& view, int planes, int h, int w, Flow& flow) {
    flow.joined = p.batch == 1 || view.stride[0] == int64_t{planes} * h * w;
    flow.planes = {static_cast<char*>(view.data), view.stride[0] * size, planes * h * (flow.joined ? a.images : 1),
                   static_cast<int>(w * size)};
    flow.ring.row_bytes = flow.planes.row_bytes;
    flow.ring.phase = static_cast<int>(reinterpret_cast<uintptr_t>(view.data) % kUnit);
  };
  arrange(p.input, a.channels, a.height, a.width, a.source);
  arrange(p.output, a.filters, a.out_height, a.out_width, a.grad);
  return a;
}

}  // namespace dwconv
