// Forward and grad_input on contiguous planes, as far as it does not depend on how a tile of outputs is computed: rows
// stream through shared memory, tiles are computed from there into a second buffer, and that is stored as the
// contiguous piece of memory it is. Every input row is read from memory once, every output row written once, both in
// large pieces, however short and unaligned the rows. (Rows that two bands of a plane share are read by each of them:
// from L2.) A chunk has a place of its own in shared memory, all rows of it, as they lie in memory: where rows follow
// each other through a ring, these would need the more room the more often they begin with 16 bytes.
//
// A tile is a class with
//   kRows, kColumns          its size
//   kTiles, kLanes           how many of them are computed together, and by how many threads: 1 by 1, or 8 by a warp
//   kMaxThreads, kBlocks     of a block, and blocks of that size on a multiprocessor, as its registers allow
//   kLoaders                 threads besides them that load: 0, or 32 where tiles are computed by warps
//   kWhole                   whether it computes whole planes only
//   kSoon                    whether a block of threads asks for one chunk at first, which then is there sooner
//   kFilterBytes             of shared memory, zeros at first, for each filter of a chunk, where filters go there
//   prepare<T>(stream, chunk)             fills that, while the chunk is under way
//   compute<T>(stream, chunk, out)        computes the chunk, by all threads; may remember what it knows of its tiles
// The tiles of a plane are numbered along its rows, unless Stream::down says otherwise.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <numeric>
#include <tuple>
#include <utility>

#include "launch.h"
#include "mapping.h"
#include "overlap.cuh"
#include "stream.cuh"

namespace dwconv {

// One pass as a map from source planes to target planes. A group is one source plane and the `fan_out` target planes
// that are computed from it, or one target plane and the `fan_in` source planes it is summed over; the other is 1.
struct Stream {
  Planes source, target;
  const void* weight;
  const void* bias;
  int64_t weight_filter, bias_stride;        // in elements
  int weight_row, weight_column;             // negative where grad_input flips
  int height, width, out_height, out_width;  // of a source plane and of a target plane
  int kernel_h, kernel_w, stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w;
  int groups, fan_out, fan_in;  // groups of an image
  int channels;                 // of an image
  int chunk_groups, chunk_rows, bands;
  int chunks, buffer_at, filters_at, filters_bytes;
  int strips, tiles;  // of a plane's part in a chunk: tiles side by side, and all of them
  int units;          // all of them, as they are computed together
  bool spread;        // grad_input at stride 2: the stride is that of the target
  bool bulk;
  int loaders;    // threads that load, and do nothing else
  bool by_pairs;  // rows, and columns that tiles begin to read from, lie evenly (8 bytes), or oddly as the kernel is
  int phase;      // of the source, within 16 bytes
  int most_rows;  // of the source, in a chunk
  int run, runs;  // chunks that follow each other in memory and stay in one block, and the number of such runs
  int* counters;  // of the runs that were taken, one for every `classes` of them, or null: then blocks take every so
  int classes;    // many of them
  Divider by_beside;  // of so many planes, chunks are the first bands, then the second ones: they have the same filters
  Divider by_sub, by_bands, by_chunks_per_image, by_strips, by_units, by_fan_out, by_filters;
  // Of tiles that a warp computes together:
  bool down;        // they are numbered down the columns
  int last_column;  // where the last strip begins at most
  int warps;        // of a block that compute
  int warps_side;   // of them, those that share a plane
  int plane_step;   // planes that a block works on at a time
  int chunks_at;    // what is known of the chunks under way, in shared memory
  int stage_bytes;  // of the source rows of a chunk
  Divider by_tile_rows, by_warps_side, by_kernel_w, by_weights;
};

// Where the numbers of the chunks under way lie in shared memory: in place of barriers of stages that there are not.
constexpr int kNumbers = 48;
static_assert(kDepth == 2 && Barriers::kStages == 4);

// What a chunk reads and writes. Whole planes, or (bands > 1) rows of one target plane.
struct __align__(16) Chunk {
  int image, group;              // the first group
  int target, targets;           // the same as target planes of the image
  int row, rows;                 // of each target plane
  int source_begin, source_end;  // rows of the image's source
  int source_at;                 // where the first of them lies in shared memory
  uint64_t target_row;           // address of the first row to be written

  __device__ const Chunk& get() const { return *this; }
};

// kBeside: whether there may be bands that follow each other across planes.
template <bool kBeside>
__device__ Chunk chunk_of(const Stream& a, uint32_t number) {
  Chunk c;
  const int sub = a.by_sub.split(number);
  const int beside = kBeside ? a.by_beside.split(number) : 0;
  const int band = a.by_bands.split(number);
  c.group = a.by_chunks_per_image.split(number) * a.chunk_groups;
  if (kBeside) c.group = c.group * a.by_beside.divisor + beside;
  c.image = number;
  const int groups = min(a.chunk_groups, a.groups - c.group);
  c.target = c.group * a.fan_out + sub;
  c.targets = a.bands > 1 ? 1 : groups * a.fan_out;
  c.row = band * a.chunk_rows;
  c.rows = min(a.chunk_rows, a.out_height - c.row);
  const int plane = c.group * a.fan_in * a.height;
  if (a.bands > 1) {
    int first = c.row, last = c.row + c.rows - 1;
    if (a.spread) {
      first = (max(first + a.padding_h - a.kernel_h + 1, 0) + 1) / 2;
      last = (last + a.padding_h) / 2;
    } else {
      first = first * a.stride_h - a.padding_h;
      last = last * a.stride_h - a.padding_h + (a.kernel_h - 1) * a.dilation_h;
    }
    c.source_begin = plane + min(max(first, 0), a.height);
    c.source_end = plane + min(max(last + 1, 0), a.height);
  } else {
    c.source_begin = plane;
    c.source_end = plane + groups * a.fan_in * a.height;
  }
  c.target_row =
      reinterpret_cast<uint64_t>(a.target.base + c.image * a.target.image_bytes +
                                 (static_cast<int64_t>(c.target) * a.out_height + c.row) * a.target.row_bytes);
  return c;
}

// The group in its chunk that a target plane of the chunk belongs to.
__device__ inline int group_of(const Stream& a, uint32_t plane) {
  if (a.bands > 1) return 0;
  a.by_fan_out.split(plane);
  return plane;
}

// Where the chunk of a stage lies: at the same place within 16 bytes as in memory.
__device__ inline int source_at(const Stream& a, const Chunk& c, int stage) {
  const int phase = (a.phase + static_cast<uint32_t>(c.source_begin) * a.source.row_bytes) % kUnit;
  return kHead + stage * a.stage_bytes + phase;
}

// Loads a chunk to a stage. `ready`: called when memory is about to be read.
template <typename T, typename Ready>
__device__ void load_chunk(const Copier& copier, const Stream& a, const Chunk& c, int stage, Ready&& ready) {
  const RowRing place{c.source_at - a.phase, a.phase, a.source.row_bytes};
  if (const int rows = c.source_end - c.source_begin; rows > 0)
    load_rows<T>(copier, place, a.source, c.image, c.source_begin, rows, 0, false, Barriers::full(stage), ready);
}

// A walk down a chunk's rows, from one that may lie outside of it by a few.
__device__ inline RowWalk walk_of(const Stream& a, const Chunk& c, int row) {
  return {RowRing{c.source_at - a.phase, a.phase, a.source.row_bytes, a.most_rows}, row};
}

// What a tap reads for a target index along one side; outside the source where it reads nothing.
__device__ inline int source_index(int target, int tap, int stride, int padding, int dilation, bool spread) {
  if (!spread) return target * stride - padding + tap * dilation;
  const int padded = target + padding - tap * dilation;
  return padded % stride == 0 ? padded / stride : -1;
}

// The outputs of a tile one by one, by the taps that meet the image: for Inf and NaN, which must not meet the padding.
// `to`: where the first one belongs in shared memory.
template <typename T>
__device__ __noinline__ void tile_by_taps(const Stream& a, const Chunk& c, int to, int plane, int row, int rows,
                                          int column, int columns) {
  const T* weight = static_cast<const T*>(a.weight);
  uint32_t filter = c.target + plane;
  filter = a.by_filters.split(filter) * a.fan_in;
  const int group = group_of(a, plane);
  for (int r = row; r < row + rows; ++r)
    for (int v = column; v < column + columns; ++v) {
      float sum = a.bias ? widen(static_cast<const T*>(a.bias)[filter * a.bias_stride]) : 0.f;
      for (int q = 0; q < a.fan_in; ++q) {
        const T* taps = weight + (filter + q) * a.weight_filter;
        const int top = (c.group + group) * a.fan_in * a.height + q * a.height - c.source_begin;
        for (int i = 0; i < a.kernel_h; ++i) {
          const int y = source_index(c.row + r, i, a.stride_h, a.padding_h, a.dilation_h, a.spread);
          if (y < 0 || y >= a.height) continue;
          const int source = c.source_at + (top + y) * a.source.row_bytes;
          for (int j = 0; j < a.kernel_w; ++j) {
            const int x = source_index(v, j, a.stride_w, a.padding_w, a.dilation_w, a.spread);
            if (x >= 0 && x < a.width)
              sum = fmaf(widen(shared<T>(source + x * static_cast<int>(sizeof(T)))),
                         widen(taps[i * a.weight_row + j * a.weight_column]), sum);
          }
        }
      }
      shared<T>(to + (r - row) * a.target.row_bytes + (v - column) * static_cast<int>(sizeof(T))) = narrow<T>(sum);
    }
}

// The chunks of a block in their order. Some multiprocessors get less of the memory's bandwidth than others, by a
// quarter on an H100: with equal shares all would wait for those. So a block takes its third run and all that follow
// from a counter. The results do not depend on who computes them. Memory likes to be read and written in one place at a
// time: blocks side by side take runs side by side. Where every so many runs have the same filters, they have a counter
// of their own, and a block keeps its filters.
template <bool kClasses>
class Schedule {
 public:
  __device__ explicit Schedule(const Stream& a) : a_(a), run_(blockIdx.x) {}

  // Asks for the run after this one, if it is not known: some time before it is needed.
  __device__ void ask() {
    if (a_.counters == nullptr || !asks_) return;
    if (kClasses) {
      const int own = static_cast<int>(blockIdx.x) % a_.classes;
      run_ = atomicAdd(a_.counters + own, 1) * a_.classes + own;
    } else {  // not by atomicAdd, for which a compiler asks the lanes of a warp together, and waits for the answer here
      asm volatile("atom.global.inc.u32 %0, [%1], 0x7fffffff;" : "=r"(run_) : "l"(a_.counters));
    }
    asks_ = false;
  }

  // The next chunk's number; a_.chunks or more: there is none.
  __device__ int next() {
    if (left_ == 0) {
      number_ = run_ < a_.runs ? run_ * a_.run : a_.chunks;
      left_ = a_.run;
      asks_ = run_ >= static_cast<int>(gridDim.x);
      run_ += gridDim.x;
    } else {
      ++number_;
    }
    --left_;
    return number_;
  }

 private:
  const Stream& a_;
  int run_;  // the one to be taken next
  int number_ = 0, left_ = 0;
  bool asks_ = false;
};

// Where threads compute tiles by themselves: how many of a block do, and what they meet at.
__device__ inline int workers_of(const Stream& a) {
#if __CUDA_ARCH__ >= 800
  return blockDim.x - a.loaders;
#else
  return blockDim.x;
#endif
}
__device__ inline void meet_workers(const Stream& a) {
  meet<1>(workers_of(a));
}

// The number of the chunk in a stage.
__device__ inline int& number_in(int stage) {
  return shared<int>(kNumbers + 4 * stage);
}

// What threads that compute have to know of the chunk in a stage. There is room for it behind the zeros.
struct __align__(16) KnownChunk {
  uint64_t target_row;
  int group, target, row, source_begin, source_at;
  uint16_t targets, rows;  // 0: there is none

  static __device__ KnownChunk& in(int stage) {
    return shared<KnownChunk>(kZeros + 128 + stage * static_cast<int>(sizeof(KnownChunk)));
  }
  __device__ void operator=(const Chunk& c) {
    target_row = c.target_row, group = c.group, target = c.target, row = c.row;
    source_begin = c.source_begin, source_at = c.source_at;
    targets = static_cast<uint16_t>(c.targets), rows = static_cast<uint16_t>(c.rows);
  }
  __device__ Chunk get() const {
    return {0, group, target, targets, row, rows, source_begin, 0, source_at, target_row};
  }
};
static_assert(kZeros + 128 + kDepth * sizeof(KnownChunk) <= kHead);

// Where threads compute tiles by themselves, and one of them begins bulk copies.
template <typename T, class Tile>
__global__ void __launch_bounds__(Tile::kMaxThreads, Tile::kBlocks) stream_nchw(const __grid_constant__ Stream a) {
#if __CUDA_ARCH__ >= 900
  if (threadIdx.x < 32) shared<uint32_t>(kZeros + 4 * threadIdx.x) = 0;
  for (int i = 4 * threadIdx.x; i < a.filters_bytes; i += 4 * blockDim.x) shared<uint32_t>(a.filters_at + i) = 0;
  const Copier copier(true, false);
  copier.init();

  // What the stages hold is decided by the thread that begins copies, and known to the others after a barrier.
  Schedule<false> schedule(a);
  if (copier.rank() == 0)
    for (int d = 0; d < kDepth; ++d) number_in(d) = schedule.next();
  let_next_kernel_start();
  __syncthreads();
  Tile tiles;
  const auto chunk_in = [&](int number, int stage) {
    Chunk c = chunk_of<false>(a, number);
    c.source_at = source_at(a, c, stage);
    return c;
  };
  const auto load = [&](int number, int stage, auto&& ready) {
    if (number < a.chunks && copier.loads()) load_chunk<T>(copier, a, chunk_in(number, stage), stage, ready);
    copier.commit(stage);
  };
  // Where the first chunk lies is found out while the kernel before still runs.
  const auto ready = [&] { settle_and_wait_for_kernel_before(a.chunks); };
  // Memory has enough to do with a chunk for every block, and if each asked for two, some would wait long for the
  // first.
  const int at_first = Tile::kSoon ? 1 : kDepth;
  load(number_in(0), 0, ready);
  if (at_first > 1) load(number_in(1), 1, ready);
  wait_for_kernel_before();
  int stage = 0;
  uint32_t parity = 0;
  bool first = true;
  for (int number; (number = number_in(stage)) < a.chunks; first = false) {
    const Chunk c = chunk_in(number, stage);
    const int out = a.buffer_at + static_cast<int>(c.target_row % kUnit);

    tiles.template prepare<T>(a, c);
    copier.wait_full(stage, parity);
    copier.stored(0);
    __syncthreads();
    if (Tile::kSoon && first && at_first < kDepth) load(number_in(1), 1, Nothing{});
    if (copier.rank() == 0) schedule.ask();
    tiles.template compute<T>(a, c, out);
    if (copier.rank() == 0) number_in(stage) = schedule.next();
    copier.before_store();
    __syncthreads();
    copier.store(reinterpret_cast<T*>(c.target_row), &shared<T>(out), c.targets * c.rows * a.out_width, blockDim.x, 0);
    load(number_in(stage), stage, Nothing{});
    if (++stage == kDepth) stage = 0, parity ^= 1;
  }
  copier.stored(0);
#endif
}

// What all threads have to know of the chunk in a stage: where warps compute there is room for all of it.
template <bool kByWarps>
__device__ decltype(auto) known_chunk(const Stream& a, int stage) {
  if constexpr (kByWarps)
    return shared<Chunk>(a.chunks_at + stage * static_cast<int>(sizeof(Chunk)));
  else
    return KnownChunk::in(stage);
}

// The same without bulk copies. One warp more looks chunks up and loads them, as soon as there is room: threads that
// compute would do so one after the other. Before sm_80, where loads are not asynchronous, all do.
template <typename T, class Tile>
__global__ void __launch_bounds__(Tile::kMaxThreads + Tile::kLoaders, Tile::kBlocks)
    stream_nchw_portable(const __grid_constant__ Stream a) {
  constexpr bool kByWarps = Tile::kLanes > 1;
#if __CUDA_ARCH__ < 800
  if constexpr (kByWarps) return;  // tensor cores of later GPUs
#endif
  if (threadIdx.x < 32) shared<uint32_t>(kZeros + 4 * threadIdx.x) = 0;
  for (int i = 4 * threadIdx.x; i < a.filters_bytes; i += 4 * blockDim.x) shared<uint32_t>(a.filters_at + i) = 0;
  const Copier copier(false, true, true);
  copier.init(true);
  if (copier.dedicated && threadIdx.x == 0)
    for (int stage = 0; stage < kDepth; ++stage) init_barrier(Barriers::known(stage), 1);

  Schedule<kByWarps> schedule(a);
  const bool decides = !copier.dedicated && threadIdx.x == 0;
  if (decides)
    for (int stage = 0; stage < kDepth; ++stage) number_in(stage) = schedule.next();
  let_next_kernel_start();
  __syncthreads();
  bool may_read = false;  // the kernel before is done
  // Where a chunk lies is found out before the wait for the place that it takes.
  const auto load = [&](int number, int stage, auto&& wait_for_place) {
    Chunk c{};
    if (number < a.chunks) {
      c = chunk_of<kByWarps>(a, number);
      c.source_at = source_at(a, c, stage);
    }
    const auto ready = [&] {
      wait_for_place();
      if (copier.rank() == 0) {
        known_chunk<kByWarps>(a, stage) = c;
        if (copier.dedicated) arrive(Barriers::known(stage));
      }
      if (!may_read) settle_and_wait_for_kernel_before(a.chunks);
      may_read = true;
    };
    if (c.source_begin < c.source_end)
      load_chunk<T>(copier, a, c, stage, ready);
    else
      ready();
    copier.commit(stage);
  };
  int stage = 0;
  uint32_t parity = 0;
  const auto advance = [&] {
    if (++stage == kDepth) stage = 0, parity ^= 1;
  };
  if (!copier.is_worker()) {
    for (int turn = 0, number = 0; number < a.chunks; ++turn) {
      if (copier.rank() == 0) number = schedule.next();
      number = __shfl_sync(~0u, number, 0);
      load(number, stage, [&] {
        if (turn >= kDepth) wait(Barriers::done(stage), parity ^ 1);
        // Memory has enough to do with a chunk for every block, and if each asked for two, some would wait long for
        // the first.
        if (Tile::kSoon && turn == 1) wait(Barriers::full(0), 0);
      });
      if (copier.rank() == 0) schedule.ask();
      advance();
    }
    commit_copies();
    wait_copies<0>();
    return;
  }

  if (!copier.dedicated) {
    for (int d = 0; d < kDepth; ++d) load(number_in(d), d, Nothing{});
    __syncthreads();
  }
  Tile tiles;
  wait_for_kernel_before();
  // Behind a wait ptxas does not know that a warp is whole until all meet, and has addresses in no uniform registers.
  const auto wait_until_known = [&] {
    if (copier.dedicated) wait(Barriers::known(stage), parity);
    meet_workers(a);
  };
  wait_until_known();
  while (true) {
    decltype(auto) c = known_chunk<kByWarps>(a, stage).get();
    if (c.targets == 0) break;
    const uint64_t target_row = c.target_row;  // another chunk may take c's place before it is stored
    const int out = a.buffer_at + static_cast<int>(target_row % kUnit);

    tiles.template prepare<T>(a, c);
    copier.wait_full(stage, parity);
    meet_workers(a);
    if (decides) schedule.ask();
    tiles.template compute<T>(a, c, out);
    const int count = c.targets * c.rows * a.out_width;
    if (decides) number_in(stage) = schedule.next();
    const int done = stage;
    advance();
    wait_until_known();
    if (copier.dedicated) copier.finish_for_all(done);
    copier.store(reinterpret_cast<T*>(target_row), &shared<T>(out), count, workers_of(a), 0);
    if (!copier.dedicated) load(number_in(done), done, Nothing{});
  }
}

// Where warps compute tiles: one more looks chunks up, and begins bulk copies of them and of what was computed.
template <typename T, class Tile>
__global__ void __launch_bounds__(Tile::kMaxThreads + Tile::kLoaders, Tile::kBlocks)
    stream_nchw_by_warps(const __grid_constant__ Stream a) {
#if __CUDA_ARCH__ >= 900
  if (threadIdx.x < 32) shared<uint32_t>(kZeros + 4 * threadIdx.x) = 0;
  for (int i = 4 * threadIdx.x; i < a.filters_bytes; i += 4 * blockDim.x) shared<uint32_t>(a.filters_at + i) = 0;
  static_assert(2 * sizeof(Chunk) + 16 <= kChunkBytes);
  const Copier copier(true, true, true, Tile::kLoaders);
  copier.init();

  // What the stages hold is decided by the thread that begins copies, and known to the others after a barrier.
  Schedule<true> schedule(a);
  if (copier.rank() == 0)
    for (int d = 0; d < kDepth; ++d) number_in(d) = schedule.next();
  let_next_kernel_start();
  __syncthreads();
  const auto known = [&](int stage) -> Chunk& {
    return shared<Chunk>(a.chunks_at + stage * static_cast<int>(sizeof(Chunk)));
  };
  // The warp that copies and the others come to the same barriers at different places of the code.
  const auto meet_all = [] { meet<1>(blockDim.x); };
  int stage = 0;
  uint32_t parity = 0;
  const auto advance = [&] {
    if (++stage == kDepth) stage = 0, parity ^= 1;
  };
  if (!copier.is_worker()) {
    // Looks a chunk up, for all.
    const auto find = [&](int number, int stage) {
      Chunk c = chunk_of<true>(a, number);
      c.source_at = source_at(a, c, stage);
      if (copier.rank() == 0) known(stage) = c;
      return c;
    };
    // Where the first chunk lies is found out while the kernel before still runs.
    Chunk c;
    if (copier.loads()) c = find(number_in(0), 0);
    __syncwarp();
    meet_all();
    if (copier.loads()) load_chunk<T>(copier, a, c, 0, [&] { settle_and_wait_for_kernel_before(a.chunks); });
    wait_for_kernel_before();
    copier.commit(0);
    for (bool first = true; number_in(stage) < a.chunks; first = false) {
      copier.wait_full(stage, parity);
      copier.stored(copier.workers());
      meet_all();
      const int next = 1 - stage;
      if (!first && copier.rank() == 0) number_in(next) = schedule.next();
      __syncwarp();
      if (const int number = number_in(next); number < a.chunks && copier.loads())
        load_chunk<T>(copier, a, find(number, next), next, Nothing{});  // in place of the chunk before, if any
      copier.commit(next);
      if (copier.rank() == 0) schedule.ask();
      const Chunk& c = known(stage);
      const uint64_t target_row = c.target_row;
      const int count = c.targets * c.rows * a.out_width;
      copier.before_store();
      meet_all();
      copier.store(reinterpret_cast<T*>(target_row), &shared<T>(a.buffer_at + static_cast<int>(target_row % kUnit)),
                   count, blockDim.x, copier.workers());
      advance();
    }
    copier.stored(copier.workers());
    return;
  }

  Tile tiles;
  meet_all();
  wait_for_kernel_before();
  while (number_in(stage) < a.chunks) {
    const Chunk& c = known(stage);
    tiles.template prepare<T>(a, c);
    copier.wait_full(stage, parity);
    meet_all();
    tiles.template compute<T>(a, c, a.buffer_at + static_cast<int>(c.target_row % kUnit));
    copier.before_store();
    meet_all();
    advance();
  }
#endif
}

// How a pass is cut into chunks; the rest of the arguments follows from it.
struct Cut {
  int chunk_groups, chunk_rows, bands, threads;
};

// What there is to know of a class of tiles.
struct TileSize {
  int rows, columns, together, lanes, loaders, filter_bytes;
  bool whole;
  int threads_per_block, threads_per_multiprocessor;  // as the registers allow
  int element;                                        // bytes
};

// How many times the busiest banks of shared memory are read and written while the first units of a plane are computed,
// by threads of which four neighbours have the 16 bytes of a tile's row.
inline int64_t conflicts(const Stream& a, const TileSize& tile) {
  constexpr int kUnits = 8;
  const int extent = (a.kernel_h - 1) * a.dilation_h + 1, tile_rows = a.tiles / a.strips;
  int64_t sum = 0;
  const auto busiest = [&](int unit, const Planes& array, bool target) {
    std::array<int, 64> words{};
    std::array<int, 32> readers{};
    int count = 0, most = 0;
    for (int t = unit * tile.together; t < std::min((unit + 1) * tile.together, a.tiles); ++t) {
      const int strip = a.down ? t / tile_rows : t % a.strips, row = a.down ? t % tile_rows : t / a.strips;
      int y = row * tile.rows, x = std::max(std::min(strip * tile.columns, a.last_column), 0);
      if (!target && a.spread) y /= a.stride_h, x /= a.stride_w;
      if (!target && !a.spread) y *= a.stride_h, x *= a.stride_w;
      const int word = (y * array.row_bytes + x * 2) / 4;
      for (int w = word; w < word + 4; ++w) {
        if (std::find(words.begin(), words.begin() + count, w) != words.begin() + count) continue;
        words[count++] = w, most = std::max(most, ++readers[w % 32]);
      }
    }
    return most;
  };
  const int64_t reads = 3 * (a.spread ? tile.rows / 2 + extent / 2 : (tile.rows - 1) * a.stride_h + extent);
  const int64_t writes = 2 * tile.rows;
  for (int unit = 0; unit < std::min(a.units, kUnits); ++unit)
    sum += reads * busiest(unit, a.source, false) + writes * busiest(unit, a.target, true);
  return sum;
}

// How the tiles of a plane are numbered, and where the last strip begins, which may overlap the others or reach beyond
// the plane: so that they meet in few banks.
struct Arrangement {
  bool down = false;
  int last_column = 0;
};

inline Arrangement arrangement_of(Stream a, const TileSize& tile) {
  if (tile.together == 1) return {};
  const int step = a.spread ? 4 : 2, last = (a.strips - 1) * tile.columns;
  Arrangement best;
  int64_t least = -1;
  for (int column = static_cast<int>(std::max<int64_t>(round_up(a.out_width - tile.columns, step), 0)); column <= last;
       column += step)
    for (const bool down : {false, true}) {
      a.down = down, a.last_column = column;
      const int64_t cost = conflicts(a, tile);
      if (least < 0 || cost < least) least = cost, best = {down, column};
    }
  return best;
}

// Fills in what follows from a cut.
inline void apply(Stream& a, const Cut& cut, const TileSize& tile, int64_t images) {
  a.chunk_groups = cut.chunk_groups, a.chunk_rows = cut.chunk_rows, a.bands = cut.bands;
  const int sub = cut.bands > 1 ? a.fan_out : 1;
  const int64_t chunks_per_image = ceil_div(a.groups, cut.chunk_groups);
  a.chunks = static_cast<int>(cut.bands * sub * images * chunks_per_image);
  a.strips = static_cast<int>(ceil_div(a.out_width, tile.columns));
  a.tiles = static_cast<int>(ceil_div(cut.chunk_rows, tile.rows)) * a.strips;
  a.units = static_cast<int>(ceil_div(a.tiles, tile.together));
  constexpr int kFewPlanes = 8;  // else memory would be read in too many places at a time
  const int64_t beside = tile.together > 1 && cut.bands > 1 && a.channels <= kFewPlanes ? a.channels : 1;
  a.by_sub = Divider(sub), a.by_bands = Divider(cut.bands), a.by_beside = Divider(beside);
  a.by_chunks_per_image = Divider(chunks_per_image / beside);
  a.by_strips = Divider(a.strips), a.by_units = Divider(a.units), a.by_fan_out = Divider(a.fan_out);

  a.warps = cut.threads / 32;
  a.warps_side = std::max(std::min(a.units, a.warps), 1);
  a.plane_step = a.warps / a.warps_side;
  a.by_tile_rows = Divider(a.tiles / a.strips), a.by_warps_side = Divider(a.warps_side);

  const int extent = (a.kernel_h - 1) * a.dilation_h + 1;
  const int step = a.spread ? ceil_div(cut.chunk_rows, 2) : cut.chunk_rows * a.stride_h;
  const int shared_rows = tile.together > 1 || a.spread ? extent : extent - a.stride_h;  // at most
  a.most_rows = cut.bands == 1 ? cut.chunk_groups * a.fan_in * a.height : step + shared_rows;
  a.stage_bytes = static_cast<int>(stage_bytes(a.most_rows, a.source.row_bytes));
  const int64_t targets = cut.bands > 1 ? 1 : cut.chunk_groups * a.fan_out;
  a.buffer_at = kHead + kDepth * a.stage_bytes + kTail;
  a.filters_at = static_cast<int>(a.buffer_at + round_up(targets * cut.chunk_rows * a.target.row_bytes + kUnit, 128));
  a.filters_bytes = static_cast<int>(targets * a.fan_in * tile.filter_bytes);
  a.chunks_at = static_cast<int>(round_up(a.filters_at + a.filters_bytes, 16));
}

inline int64_t shared_bytes(const Stream& a) {
  return a.filters_at + a.filters_bytes + (a.filters_bytes > 0 ? kChunkBytes : 0);
}

// Cuts the planes so that as many threads as it takes to hide the latency of shared memory and of the barriers have
// work on a multiprocessor at a time, and so that every block has about as much to do. The numbers were found by
// measuring.
inline Cut cut_for(Stream a, const TileSize& tile, int64_t images, const Device& d) {
  Cut best{};
  double best_score = -1;
  // A thread is busy for long with a tile that is summed over with filters from shared memory, whose many sums do not
  // wait for each other: so many threads have enough to do, each with two tiles in turn.
  const bool loads_apart = a.bulk || a.loaders > 0;  // threads that compute need not
  const bool long_tiles = loads_apart && tile.lanes == 1 && tile.filter_bytes > 0;
  constexpr double kLongTiles = 224;
  const auto consider = [&](int64_t chunk_groups, int64_t chunk_rows, int most_threads) {
    Cut cut{};
    cut.chunk_groups = static_cast<int>(chunk_groups), cut.chunk_rows = static_cast<int>(chunk_rows);
    cut.bands = static_cast<int>(ceil_div(a.out_height, chunk_rows));
    apply(a, cut, tile, images);
    const int64_t bytes = shared_bytes(a);
    const int64_t planes = cut.bands > 1 ? 1 : chunk_groups * a.fan_out, work = planes * a.units * tile.lanes;
    int64_t rounds = 0;
    if (tile.lanes == 1) {
      cut.threads = threads_for(work, most_threads), rounds = ceil_div(work, cut.threads);
    } else {  // warps stay with their part of the planes
      const int64_t most = most_threads / tile.lanes, each = ceil_div(a.units, most);
      const int64_t side = ceil_div(a.units, each), together = std::max<int64_t>(std::min(most / side, planes), 1);
      cut.threads = static_cast<int>(side * together * tile.lanes), rounds = each * ceil_div(planes, together);
    }
    const int64_t blocks = std::min<int64_t>({d.shared_per_multiprocessor / (bytes + 1024),
                                              tile.threads_per_multiprocessor / (cut.threads + tile.loaders), 16});
    if (bytes > d.shared_per_block || blocks == 0) return false;
    const double busy = static_cast<double>(blocks * work) / rounds;
    const double turns = static_cast<double>(a.chunks) / (blocks * d.multiprocessors);
    // The last band of a plane may be short: of rows, not of bands, a block should have as many as the others.
    const int64_t run = static_cast<int64_t>(std::ceil(turns));
    const int64_t most_rows = run / cut.bands * a.out_height + run % cut.bands * chunk_rows;
    const double even = turns / cut.bands * a.out_height / most_rows;
    const double chunk_bytes = static_cast<double>(bytes - kHead) / (kDepth + 1);  // a chunk costs some barriers
    double score;
    if (tile.lanes > 1) {
      const double apart = blocks / (blocks + 2.);  // while one waits at a barrier, others compute
      score = apart * even * std::min(busy, 768.) * chunk_bytes / (chunk_bytes + 5500);
      if (cut.bands > 1)
        score *= chunk_rows / (chunk_rows + (a.kernel_h - 1.) * a.dilation_h);  // rows that bands share
      // The warps of a block that is alone share four schedulers, which have as much to do as the busiest of them.
      if (blocks == 1) score *= static_cast<double>(cut.threads) / round_up(cut.threads, 128);
    } else {
      // As many threads as keep up with memory are enough. Work should come in several parts: blocks, or rounds of a
      // thread, though in a block that is alone these wait for each other. Whole lines of memory are better than parts
      // of them, and planes than bands, which share rows. Of a spread kernel few taps meet. In 16 bits there are as
      // many instructions for half of the bytes.
      const double products = a.kernel_h * a.kernel_w / (a.spread && tile.element == 4 ? 2. : 1.);
      const double enough =
          std::min(busy, long_tiles ? kLongTiles : 14 * products) * even * chunk_bytes / (chunk_bytes + 3000);
      const auto in_lines = [&](const Planes& array, int height, int fan) {
        return chunk_groups * fan * height * array.row_bytes % 128 == 0;
      };
      const bool lines = in_lines(a.source, a.height, a.fan_in) && in_lines(a.target, a.out_height, a.fan_out);
      const double parts = blocks == 1 ? 1 + 0.1 * (rounds - 1) : static_cast<double>(std::max(blocks, rounds));
      score =
          cut.bands > 1 ? enough * 0.65 * blocks / (blocks + 0.25) : enough * (lines ? 1 : 0.9) * parts / (parts + 0.5);
      // In few blocks of two chunks each little goes on at the same time.
      if (cut.bands == 1 && turns > 1 && turns <= kDepth && (blocks < 3 || !loads_apart)) score *= 0.6;
      // Threads that store do not compute: others should, and each that loads as well for longer than it looks chunks
      // up.
      if (!a.bulk) score *= blocks / (blocks + 1.) * (blocks == 1 ? 0.6 : 1);
      if (!loads_apart) score *= rounds / (rounds + 0.45);
    }
    if (score > best_score * (tile.lanes > 1 ? 1.02 : 1)) best_score = score, best = cut;
    return true;
  };
  const int64_t tiles = ceil_div(a.out_height, tile.rows) * ceil_div(a.out_width, tile.columns);
  const int64_t work = ceil_div(tiles, tile.together) * tile.lanes * a.fan_out;
  const int64_t full = ceil_div(tile.threads_per_block * (tile.lanes > 1 ? 8 : long_tiles ? 2 : 1), work);
  const int64_t many =
      std::min<int64_t>(tile.lanes > 1 || tile.element < 4 ? full : std::max<int64_t>(full, 2), a.groups);
  const auto search = [&](int threads) {
    for (int64_t groups = 1; groups <= many; ++groups)
      if (!consider(groups, a.out_height, threads)) break;
    if (a.fan_in > 1 || tile.whole) return;
    for (int64_t rows = tile.rows; rows < a.out_height; rows += tile.rows)
      if (!consider(1, rows, threads)) break;
    if (best_score < 0) consider(1, kLeastRows, threads);
  };
  const int own = tile.lanes == 1 ? tile.loaders : 0;  // of a block's threads
  if (tile.threads_per_block > 128 && tile.lanes == 1) search(tile.threads_per_block - own);
  search(128 - own);
  if (tile.lanes > 1) search(tile.threads_per_block);
  if (best_score < 0) throw std::runtime_error("dwconv: rows of this size do not fit the GPU's shared memory");
  // Bands of a plane as long as each other, if tiles may begin anywhere in it.
  if (tile.lanes == 1 && !a.spread) best.chunk_rows = static_cast<int>(ceil_div(a.out_height, best.bands));
  return best;
}

// The number of chunks in a row that have different filters.
inline int64_t chunks_of_filters(const Stream& a) {
  const int64_t sub = a.bands > 1 ? a.fan_out : 1;
  if (a.by_beside.divisor > 1) return sub * a.channels;
  return sub * a.bands *
         (a.groups == a.channels ? ceil_div(a.channels, a.chunk_groups)
                                 : a.channels / std::gcd(a.channels, a.chunk_groups));
}

// As many blocks as there is room for, or a few less if each then keeps its filters from chunk to chunk.
inline int blocks_for(const Stream& a, int room) {
  const int64_t filters = chunks_of_filters(a), less = room / filters * filters;
  return static_cast<int>(std::min<int64_t>(a.chunks, less >= 0.9 * room ? less : room));
}

// Whether a counter saves more than it costs, a launch: blocks that take few chunks each cannot share them better.
// Threads that compute alone also lose their filters, which they keep else: large ones are not worth it that soon.
inline bool pays_to_count(const Stream& a, int64_t images, int blocks, bool alone) {
  constexpr int64_t kLeastBytes = int64_t{48} << 20;
  constexpr int kLargeFilter = 49;
  const auto bytes_of = [](const Planes& array) { return int64_t{array.rows} * array.row_bytes; };
  const bool keeps = alone && a.kernel_h * a.kernel_w >= kLargeFilter && blocks % chunks_of_filters(a) == 0;
  return images * (bytes_of(a.source) + bytes_of(a.target)) >= kLeastBytes &&
         a.chunks >= int64_t{keeps ? 6 : 3} * blocks;
}

// Sets counters to the first run of their class that is not a block's first or second one (stream_nchw.cu).
void set_counters(int* counters, int count, int value, cudaStream_t stream);
constexpr int kMaxClasses = 256;

template <typename T, class Tile>
void launch(Stream a, int64_t images, const Allocate& allocate, cudaStream_t stream) {
  const bool has_filters = Tile::kLanes > 1 || a.fan_in > 1;
  const Device& device = current_device();
  constexpr bool kByWarps = Tile::kLanes > 1;
  const auto kernel_for = [](bool bulk) {
    if (!bulk) return stream_nchw_portable<T, Tile>;
    if constexpr (kByWarps)
      return stream_nchw_by_warps<T, Tile>;
    else
      return stream_nchw<T, Tile>;
  };
  a.bulk = a.bulk && can_overlap(kernel_for(false));
  const auto kernel = kernel_for(a.bulk);
  a.loaders = kByWarps ? Tile::kLoaders : !a.bulk && device.capability >= 80 ? 32 : 0;
  const TileSize kTile{Tile::kRows,  Tile::kColumns,    Tile::kTiles,
                       Tile::kLanes, a.loaders,         has_filters ? Tile::kFilterBytes : 0,
                       Tile::kWhole, Tile::kMaxThreads, (Tile::kMaxThreads + Tile::kLoaders) * Tile::kBlocks,
                       sizeof(T)};
  struct Decision {
    Cut cut;
    Arrangement arrangement;
    int resident;  // blocks on a multiprocessor
  };
  static thread_local Decisions<10, Decision> decisions;
  const Decision& decision = decisions(
      {device.id, a.bulk, images, a.groups, a.fan_in, a.fan_out, a.height, a.width, a.out_height, a.out_width}, [&] {
        Decision made{cut_for(a, kTile, images, device), {}, 0};
        apply(a, made.cut, kTile, images);
        made.arrangement = arrangement_of(a, kTile);
        const int bytes = static_cast<int>(shared_bytes(a));
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, device.shared_per_block);
        cudaOccupancyMaxActiveBlocksPerMultiprocessor(&made.resident, kernel, made.cut.threads + a.loaders, bytes);
        return made;
      });
  apply(a, decision.cut, kTile, images);
  a.down = decision.arrangement.down, a.last_column = decision.arrangement.last_column;
  int blocks = blocks_for(a, std::max(decision.resident, 1) * device.multiprocessors);
  int64_t bytes = shared_bytes(a);
  if (const int64_t turns = ceil_div(a.chunks, blocks); Tile::kLanes == 1 && turns == kDepth) {
    // Of two chunks a block each multiprocessor should have as many as the others: there are no more blocks than that
    // takes, and room for no more on any.
    blocks = static_cast<int>(ceil_div(a.chunks, turns));
    const int64_t each = ceil_div(blocks, device.multiprocessors);
    bytes = std::max(bytes, device.shared_per_multiprocessor / (each + 1) - 1024 + kUnit);
  }
  // Without a counter bands come in runs, since those that follow each other share rows. With one, neighbours are in
  // work at the same time, and find these rows in L2.
  const bool counts = pays_to_count(a, images, blocks, Tile::kLanes == 1);
  a.run = counts || a.bands == 1 || a.by_beside.divisor > 1 ? 1 : static_cast<int>(ceil_div(a.chunks, blocks));
  a.runs = static_cast<int>(ceil_div(a.chunks, a.run));
  blocks = std::min(blocks, a.runs);  // each has a first chunk
  if (counts) {
    const int64_t classes = chunks_of_filters(a);
    // Of few blocks those that get less of the bandwidth would make the others wait.
    constexpr int kLeastBlocks = 10;
    const bool keeps =
        Tile::kLanes > 1 && classes <= kMaxClasses && blocks % classes == 0 && blocks >= kLeastBlocks * classes;
    a.classes = keeps ? static_cast<int>(classes) : 1;
    a.counters = static_cast<int*>(allocate(a.classes * sizeof(int)));
    set_counters(a.counters, a.classes, 2 * blocks / a.classes, stream);
  }
  launch_early(kernel, a, blocks, decision.cut.threads + a.loaders, stream, {.shared_bytes = bytes});
  check_launch("stream_nchw");
}

// The arguments that follow from a problem, and the number of images.
inline std::pair<Stream, int64_t> stream_of(const Problem& p, bool bulk) {
  const Mapping map(p);
  const int64_t size = size_of(p.dtype);
  Stream a{};
  a.height = map.height, a.width = map.width, a.out_height = map.out_height, a.out_width = map.out_width;
  a.fan_out = map.fan_out, a.fan_in = map.fan_in;
  a.kernel_h = static_cast<int>(p.kernel_h), a.kernel_w = static_cast<int>(p.kernel_w);
  a.stride_h = static_cast<int>(p.stride_h), a.stride_w = static_cast<int>(p.stride_w);
  a.dilation_h = static_cast<int>(p.dilation_h), a.dilation_w = static_cast<int>(p.dilation_w);
  a.padding_h = map.padding_h, a.padding_w = map.padding_w;
  a.weight = map.weight.data, a.weight_filter = map.weight.stride[0];
  a.weight_row = static_cast<int>(map.weight.stride[2]), a.weight_column = static_cast<int>(map.weight.stride[3]);
  a.bias = map.bias, a.bias_stride = map.bias_stride;
  a.bulk = bulk, a.spread = map.spread;
  // Images that follow each other without a gap are one image of many planes.
  const auto dense = [&](const View& view, int64_t planes, int64_t h, int64_t w) {
    return p.batch == 1 || view.stride[0] == planes * h * w;
  };
  int64_t images = p.batch;
  a.groups = a.channels = static_cast<int>(p.channels);
  if (dense(map.source, map.sources, a.height, a.width) && dense(map.target, map.targets, a.out_height, a.out_width))
    a.groups *= static_cast<int>(images), images = 1;
  const auto planes_of = [&](const View& view, int fan, int h, int w) {
    return Planes{static_cast<char*>(view.data), view.stride[0] * size, a.groups * fan * h, static_cast<int>(w * size)};
  };
  a.source = planes_of(map.source, a.fan_in, a.height, a.width);
  a.target = planes_of(map.target, a.fan_out, a.out_height, a.out_width);
  a.by_filters = Divider(map.targets);
  a.by_kernel_w = Divider(p.kernel_w), a.by_weights = Divider(p.filters());
  a.phase = static_cast<int>(reinterpret_cast<uintptr_t>(a.source.base) % kUnit);
  a.by_pairs = a.phase % 8 == 0 && a.source.row_bytes % 8 == 0 && a.padding_w % 2 == a.kernel_w / 2 % 2;
  return {a, images};
}

}  // namespace dwconv
