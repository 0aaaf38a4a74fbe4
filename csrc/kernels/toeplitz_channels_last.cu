// Forward and grad_input in channels_last in 16 bits, on tensor cores: of small kernels, and of those that have few
// rows or few columns. (On small images toeplitz_whole_channels_last.cu serves all kernels, and at stride 2
// toeplitz_strided_channels_last.cu.)
//
// A row of the kernel is, for one channel, a band matrix B of 16 columns in and 8 columns out, B[k][n] = weight[k - n]:
// one multiplication of it from the left by 16 rows of pixels gives 16 x 8 sums. The upper 8 rows are pixels of 8
// tiles, the lower 8 the same tiles 8 output columns on. A wider kernel has more such matrices in a row, each 16
// columns further on, the last one perhaps of 8. Of images of at most 8 columns, B is of their 8 columns in, and the
// lower 8 rows are pixels of 8 more images.
//
// A warp owns 4 channels, or 2, a block the slab that its warps make up, and `tiles` neighbouring tiles of 16 columns
// in each of `streams` images. It marches down the rows of its images: a source row, read once from a ring in shared
// memory, is added to all the output rows that it reaches, whose sums are in registers; the oldest of them is then
// complete. Rows may be columns, and columns rows, which takes nothing but other strides: of a kernel those are marched
// down that are few. Outputs go through shared memory, from where they are stored as they lie side by side.
//
// A row is a step. A warp arrives at the step's barrier when it has read its pixels, and the outputs of two steps
// before, from shared memory; what it writes later it writes for the next step. It waits for the others when it begins
// that one, so that some load and store while others multiply. Two warps of a scheduler hide little: a step has one
// branch, at its end, so that reads, copies and stores have their places between multiplications. What is not for every
// step, such as to go from one image to the next, is done between steps.
//
// Small kernels: a thread reads 4 channels of a pixel at once, and of neighbouring pixels at that, so that a byte
// permutation for each register of A is all it takes to part the channels. What a warp reads at once are 8 bytes of
// pixels 2 apart, of 8 tiles. Pixels at an odd multiple of 16 bytes, and 16 bytes more after every tile, also from one
// image to the next, spread them over the banks as evenly as copies of 16 bytes allow.
//
// Others, which read a pixel many times over, have the channels of a row parted first: 8 columns by 8 channels are
// loaded as a matrix, transposed, and stored, a step ahead. Then 8 columns of a channel lie side by side, where a
// matrix instruction finds all of A, from all banks.
//
// Pixels that begin between multiples of 16 bytes come from the unit on that they begin in, with a unit more of each
// (ShiftedFeed), and are read where they are: a word more of each, where channels lie in the halves of two; or parted,
// those that the first and the last unit have of other pixels, too. Where threads cannot copy so many units, or pixels
// share them, the array is copied first (realign.cu).
//
// The zeros of B spoil an output if they meet Inf or NaN, which then is NaN. So outputs that are finite are right, and
// the others are computed again, tap by tap.
#include "realign.h"
#include "toeplitz_channels_last.cuh"

namespace dwconv {
namespace {

// Outputs of a block on their way from shared memory.
template <class Shape>
class Drain : public RunRows<Shape, true> {
  using Base = RunRows<Shape, true>;
  using Base::left_, Base::share_;

 public:
  using Units = typename Share<Shape, true>::Units;

  __device__ Drain(const Toeplitz& a, uint32_t memory, int slab, int first_column, int begin, int end)
      : Base(memory + a.stage_at, slab, first_column, begin, end) {}

  // Takes it, if it is to be stored now, from its place among the rows of outputs.
  __device__ void take(const Toeplitz& a, int stage, Units& units, bool now) {
    share_.take(a.target, stage, units, now);
    left_ -= now;
  }

  // Stores it.
  __device__ void store(const Toeplitz& a, const Units& units, bool now) {
    share_.store(a.target, units, now);
    share_.next(a.target, now);
  }
};

// A warp's part in parting the channels of source rows: of 8 columns by 8 channels, four times at once.
template <class Shape>
class Parting {
 public:
  __device__ explicit Parting(const Toeplitz& a) {
#pragma unroll
    for (int t = 0; t < kTurns; ++t) {
      places_[t] = places_of(a, min(static_cast<int>(threadIdx.x + t * blockDim.x) / 32, a.turns - 1));
    }
  }

  // Takes a row from the ring.
  __device__ void take(uint32_t memory, int slot) {
#pragma unroll
    for (int t = 0; t < kTurns; ++t) load(matrices_[t], places_[t], memory + slot);
  }

  // Writes it where channels are apart.
  __device__ void write(uint32_t memory, int planes) const {
#pragma unroll
    for (int t = 0; t < kTurns; ++t) store(matrices_[t], places_[t], memory + planes);
  }

  // Whether there is more, of many images of few columns or for few warps; that is taken and written at once.
  static __device__ bool is_more(const Toeplitz& a) { return a.turns > kTurns * static_cast<int>(blockDim.x / 32); }
  static __device__ void write_more(const Toeplitz& a, uint32_t memory, int slot, int planes) {
#pragma unroll 1
    for (int turn = (threadIdx.x + kTurns * blockDim.x) / 32; turn < a.turns; turn += blockDim.x / 32) {
      const uint32_t places = places_of(a, turn);
      uint32_t matrices[4];
      load(matrices, places, memory + slot);
      store(matrices, places, memory + planes);
    }
  }

 private:
  // That a warp takes at once: of 8 channels more where pixels lie between units.
  static constexpr int kTurns = Shape::kShifted ? 3 : 2;

  uint32_t places_[kTurns];
  uint32_t matrices_[kTurns][4];

  // Where a row of a matrix comes from, in units of 16 bytes, and where it goes to, in the upper 16 bits.
  static __device__ uint32_t places_of(const Toeplitz& a, int turn) {
    constexpr int kMost = Shape::kShifted ? 3 : 2, kLeast = kMost - 1;  // of 8 channels of a slab, or of a unit more
    const int lane = threadIdx.x % 32, octet = a.slab <= 8 ? turn % kLeast : turn % kMost;
    uint32_t rest = min((a.slab <= 8 ? turn / kLeast : turn / kMost) * 4 + lane / 8, a.matrices - 1);
    const int group = a.by_groups.split(rest), stream = static_cast<int>(rest);
    const int from = kRing + stream * a.source.stream_bytes + Shape::place_of(group * 8 + lane % 8) + octet * kUnit;
    const int to = a.planes_at + (octet * 8 + lane % 8) * a.plane_bytes + group % 2 * a.odd_bytes +
                   (stream * a.stream_units + group / 2) * kUnit;
    return from / kUnit | to / kUnit << 16;
  }

  static __device__ void load(uint32_t (&matrices)[4], uint32_t places, uint32_t memory) {
    load_matrices_transposed(matrices, memory + places % 0x10000 * kUnit);
  }
  static __device__ void store(const uint32_t (&matrices)[4], uint32_t places, uint32_t memory) {
    store_matrices(memory + (places >> 16) * kUnit, matrices);
  }
};

// Rows [begin, end) of all groups of images, from `slab` and `first_column` on.
template <typename T, class Shape>
__device__ void march(const Toeplitz& a, int slab, int first_column, int begin, int end, uint32_t& parity) {
  constexpr int kRows = Shape::kRows, kBlocks = Shape::kBlocks, kChannels = Shape::kChannels, kDepth = Shape::kDepth;
  constexpr bool kSplit = Shape::kSplit, kParted = Shape::kParted;
  const uint32_t memory = kept_shared_address();
  FeedOf<Shape> feed(memory, slab, first_column - a.lead, begin, end);
  Drain<Shape> drain(a, memory, slab, first_column, begin, end);
  begin_rows<T, Shape>(a, feed, slab, first_column - a.lead, end, [&] {
    if (!Shape::kShifted && !FeedOf<Shape>::has_more(a)) feed.find(a);  // or else some of the last row may be left
    drain.find(a);
  });

  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, number = lane / 4, pair = lane % 4 * 2;
  const int channel = slab + warp * kChannels;
  const int entry = pair - number;  // of the thread's first pair in a row of weights
  const uint32_t bands =
      memory + a.bands_at + warp * kChannels * kRows * Shape::kBandBytes +
      (Shape::kKept ? 2 * (kMiddle + entry) + (entry & 1) * Shape::kCopy : 8 * (kPairMiddle + entry));
  // The matrices of blocks `block` and `block` + 1, or of the last block alone, at a row of weights.
  const auto read_band = [&](uint32_t at, int block) {
    if (!Shape::kKept) return shared_at<uint2>(at + 64 * block);
    return uint2{shared_at<uint32_t>(at + 16 * block),
                 block + 1 < kBlocks ? shared_at<uint32_t>(at + 16 * block + 16) : 0};
  };
  uint2 kept[kChannels][kRows][(kBlocks + 1) / 2];
  if constexpr (Shape::kKept) {
#pragma unroll
    for (int c = 0; c < kChannels; ++c)
#pragma unroll
      for (int i = 0; i < kRows; ++i)
#pragma unroll
        for (int block = 0; block < kBlocks; block += 2)
          kept[c][i][block / 2] = read_band(bands + (c * kRows + i) * Shape::kBandBytes, block);
  }

  // The thread's tiles, one of the upper 8 rows and one of the lower, and its pixels of them.
  const bool live = number < a.tiles * a.streams, lower_live = kSplit ? number + kTiles < a.streams : live;
  const int tiles = kSplit ? 1 : a.tiles;
  const int stream = live ? number / tiles : 0, tile = live ? number % tiles : 0;
  const int column = Shape::place_of(tile * Shape::kColumns + pair) + warp * kChannels * 2;
  const uint32_t from =
      memory + kRing + stream * a.source.stream_bytes + column + (Shape::kShifted ? a.source.shift : 0);
  const uint32_t to = memory + a.stage_at + stream * a.target.stream_bytes + column;
  const uint32_t from_lower = kSplit && lower_live ? from + kTiles * a.source.stream_bytes : from;
  const uint32_t to_lower = kSplit ? to + kTiles * a.target.stream_bytes : to + Shape::place_of(8);
  const auto place_of_pixel = [&](int j) {
    return kSplit ? (j < 2 ? from : from_lower) + Shape::place_of(j % 2) : from + Shape::place_of(j / 2 * 8 + j % 2);
  };
  // If channels are parted: where the thread's row of the 4 matrices of a channel begins.
  uint32_t parted_from = 0;
  if constexpr (kParted) {
    const int part = lane / 8, row = lane % 8 < a.tiles * a.streams ? lane % 8 : 0;
    const int plane = warp * kChannels + (Shape::kShifted ? a.source.shift / 2 : 0);
    const uint32_t at =
        memory + a.planes_at + plane * a.plane_bytes + (row / a.tiles * a.stream_units + row % a.tiles) * kUnit;
    parted_from = at + (part == 1 || part == 2 ? a.odd_bytes : 0) + (part == 3 ? kUnit : 0);
  }

  Outputs<T, Shape> outputs(a, channel);
  Parting<Shape> parting(a);
  typename Share<Shape, true>::Units units;
  // Of the next source row in the ring, which is parted a step ahead, and of the next one to load.
  int slot = kParted ? a.slot_bytes : 0, loaded = Shape::kAhead % kDepth * a.slot_bytes;
  int stage = 0;    // of the step's outputs
  int planes = 0;   // of the source row whose channels are parted
  int written = 0;  // whether outputs were written in the last step (1), and in the one before (2)
  // Writes outputs, if they are `any`, to where all threads can take them two steps later.
  const auto write = [&](const float (&sum)[kChannels][4], bool any) {
#pragma unroll
    for (int v = 0; v < 4; ++v)
      outputs.write((v < 2 ? to : to_lower) + stage + Shape::place_of(v % 2), sum, v,
                    any && (v < 2 ? live : lower_live));
    stage = next_place(stage, a.stage_bytes, a.stages_bytes);
    written |= any;
  };
  // Returns whether there are outputs to store.
  const auto begin_step = [&] {
    wait_at(memory + kBarrier, parity);
    parity ^= 1;
    written <<= 1;
    return (written & 4) != 0;
  };
  // Takes these outputs: of three rows, two steps ago the one behind the next one was written.
  const auto take = [&](bool stores) {
    drain.take(a, next_place(stage, a.stage_bytes, a.stages_bytes), units, stores);
  };
  const auto arrive_step = [&](bool now = true) { arrive_together_at(memory + kBarrier, lane == 0, now); };
  wait_copies<Shape::kPending>();
  if constexpr (kParted) {
    __syncthreads();
    parting.take(memory, 0);
    parting.write(memory, 0);
    parting.write_more(a, memory, 0, 0);
  }
  arrive_step();
  for (int at = begin;;) {
    const Run r = run_of<Shape>(a, at, end);
    // The last outputs are still to be stored. A run of one source row waits for that, too, so that rows are found
    // where others are: between steps with source rows.
    if (at == end || r.row_end - r.row == 1)
      for (int last = 0; last < 2; ++last) {
        const bool stores = begin_step();
        take(stores);
        stage = next_place(stage, a.stage_bytes, a.stages_bytes);
        arrive_step(at < end || last == 0);
        drain.store(a, units, stores);
      }
    if (at == end) break;
    at += r.end - r.begin;
    // Of the output rows under way, the oldest first. The oldest, y, is complete with a source row.
    float sum[kRows][kChannels][4] = {};
    int y = r.row + a.padding_h - (kRows - 1);
    int left = r.row_end - r.row;
    // All that is not for every step, so that the others have but one branch.
    const auto prepare = [&] {
      feed.load_more(a, place_before(loaded, a.slot_bytes, a.ring_bytes), 1);
      feed.find(a);
      drain.find(a);
    };
    const auto step = [&] {
      commit_copies();
      const bool stores = begin_step();
      uint32_t x[(kBlocks + 1) / 2][kChannels][4];  // pairs of pixels, as multiplications take them
      if constexpr (kParted) {
        parting.take(memory, slot);
#pragma unroll
        for (int block = 0; block + 1 < kBlocks; block += 2)
#pragma unroll
          for (int c = 0; c < kChannels; ++c)
            load_matrices(x[block / 2][c], parted_from + planes + c * a.plane_bytes + block / 2 * kUnit);
        planes ^= a.planes_bytes;
      }
      using Pixel = typename Shape::Pixel;
      Pixel pixels[2 * Shape::kPairs];
#pragma unroll
      for (int j = 0; j < 2 * Shape::kPairs && !kParted; ++j) Shape::read_pixel(pixels[j], place_of_pixel(j) + slot);
      take(stores);
      // What multiplications with a block take, and with the next one.
      const auto pairs_of = [&](int block, int c, uint32_t (&pairs)[4]) {
        const auto word = [&](int j) { return pixels[j].words[(c + Shape::kOdd) / 2]; };
        const bool low = (c + Shape::kOdd) % 2 == 0;  // of the word
        const auto pair = [&](int j) { return __byte_perm(word(2 * j), word(2 * j + 1), low ? 0x5410 : 0x7632); };
        // The same by another instruction: of a copy, a move would be left before every multiplication.
        const auto same_pair = [&](int j) { return __byte_perm(word(2 * j + 1), word(2 * j), low ? 0x1054 : 0x3276); };
        const bool last = block + 1 == kBlocks;  // alone
        pairs[0] = last && !kSplit ? same_pair(block) : pair(block);
        pairs[1] = kSplit ? pair(1) : same_pair(block + 1);
        if (!last) pairs[2] = pair(block + 1), pairs[3] = pair(block + 2);
      };
      // Adds the source row to rows [first, last) of the sums.
      const auto multiply_rows = [&](int first, int last) {
#pragma unroll
        for (int block = 0; block < kBlocks; block += 2)
#pragma unroll
          for (int number = 0; number < kChannels; ++number) {
            const int c = Shape::kLate ? (number + Shape::kFirst) % kChannels : number;
            uint32_t (&pairs)[4] = x[block / 2][c];
            if constexpr (!kParted) pairs_of(block, c, pairs);
            const float nothing[4] = {};
#pragma unroll
            for (int o = first; o < last; ++o) {
              const int i = kRows - 1 - o;
              const uint2 band =
                  Shape::kKept ? kept[c][i][block / 2] : read_band(bands + (c * kRows + i) * Shape::kBandBytes, block);
              const float (&before)[4] = block > 0       ? std::as_const(sum[o][c])
                                         : o + 1 < kRows ? std::as_const(sum[o + 1][c])
                                                         : nothing;
              if (block + 1 == kBlocks)
                multiply(sum[o][c], before, {pairs[0], pairs[1]}, band.x, T{});
              else
                multiply(sum[o][c], before, pairs, {band.x, band.y}, T{});
            }
          }
      };
      constexpr int kEarly = kParted ? 1 : 0;  // rows of sums before the arrival
      multiply_rows(0, kEarly);
      if constexpr (kParted) parting.write(memory, planes);
      wait_copies<Shape::kPending - 1>();  // the next row, or the one behind it
      const bool more = kParted && parting.is_more(a);
      // Of parted channels, a compiler puts the arrival behind all multiplications: but not out of a loop, of one turn.
      do arrive_step(!more);
      while (kParted && a.workers < 0);
      if (!kParted) feed.load(a, loaded);
      drain.store(a, units, stores);
#pragma unroll
      for (int j = 0; j < 2 * Shape::kPairs && Shape::kLate; ++j) Shape::read_late(pixels[j], place_of_pixel(j) + slot);
      const auto after = [&](int place) { return next_place(place, a.slot_bytes, a.ring_bytes); };
      if (kParted) write(sum[0], y >= r.begin);
      multiply_rows(kEarly, kRows);
      if (!kParted) write(sum[0], y >= r.begin);
      if (kParted) feed.load(a, loaded);
      feed.next(a);
      if (more) {
        parting.write_more(a, memory, slot, planes);
        arrive_step();
      }
      loaded = Shape::kLate ? after(loaded) : slot, slot = after(slot);
      --left, ++y;
    };
    for (;;) {
      prepare();
      if (left == 0) break;
      do step();
      while (left > 0 && !feed.is_between() && !drain.is_between() && !FeedOf<Shape>::has_more(a));
    }
    // What no further row of the image reaches is complete as it is.
#pragma unroll
    for (int o = 1; o < kRows; ++o, ++y) {
      if (y >= r.end) break;
      const bool stores = begin_step();
      take(stores);
      arrive_step();
      drain.store(a, units, stores);
      write(sum[o], y >= r.begin);
    }
  }
  __syncthreads();  // the next part's zeros, and the outputs that are read now, come behind
  repair(a, outputs, channel, begin, end, [&](int v) {
    const int column = first_column + tile * Shape::kColumns + pair + v % 2 + (kSplit ? 0 : v / 2 * 8);
    return OutputPlace{(live ? stream : a.streams) + (kSplit ? v / 2 * kTiles : 0), column};
  });
}

// The problem, or the same with rows and columns exchanged.
Problem served(const Problem& p) {
  return band_shape_of(p) == BandShape::kNone ? exchange(p) : p;
}

// Returns whether it could be launched: see launch().
bool launch_bands(const Problem& problem, cudaStream_t stream) {
  const Problem p = served(problem);
  const BandShape shape = band_shape_of(p);
  if (shape == BandShape::kWhole) return launch_toeplitz_whole_channels_last(p, stream);
  const Mapping map(p);
  const bool small = shape == BandShape::kSmall;
  // Images of one block of columns, which begins with their first one.
  const bool split = std::max(map.width, map.out_width) <= kTiles && p.batch > kTiles;
  const Toeplitz a = arguments_of(p, !small  ? BandWindow(map, static_cast<int>(p.kernel_w)).lead
                                     : split ? 0
                                             : map.padding_w);
  bool launched = false;
  visit_dtype(p.dtype, [&](auto zero) {
    using T = decltype(zero);
    if constexpr (sizeof(T) == 2) {
      const auto launch_rows = [&](auto rows, auto blocks, auto split) {
        constexpr int kRows = decltype(rows)::value, kBlocks = decltype(blocks)::value;
        constexpr bool kSplit = decltype(split)::value, kFours = kBlocks <= 2;  // channels of a warp
        const auto launch_lie = [&](auto lie) {
          launched = launch<T, Shape<kRows, kBlocks, kSplit, decltype(lie)::value>>(a, stream);
        };
        if (a.source.shift == 0)
          launch_lie(Number<Lie::kUnits>{});
        else if (kBlocks > kTallBlocks || a.source.shift % 4 == 0)
          launch_lie(Number<Lie::kWords>{});
        else if constexpr (kBlocks <= kTallBlocks) {
          if (!kFours || a.source.shift % 8 == 2)
            launch_lie(Number<Lie::kTwo>{});
          else if constexpr (kFours)
            launch_lie(Number<Lie::kSix>{});
        }
      };
      constexpr std::true_type kYes{};
      constexpr std::false_type kNo{};
      const auto launch_small = [&](auto rows) {
        split ? launch_rows(rows, Number<1>{}, kYes) : launch_rows(rows, Number<2>{}, kNo);
      };
      switch (shape) {
        case BandShape::kSmall:
          if (p.kernel_h <= 5)
            launch_small(Number<5>{});
          else if (p.kernel_h <= 7)
            launch_small(Number<7>{});
          else
            launch_small(Number<kMaxSmallRows>{});
          break;
        case BandShape::kTall: launch_rows(Number<kMaxTallRows>{}, Number<kTallBlocks>{}, kNo); break;
        case BandShape::kWide: launch_rows(Number<kMaxWideRows>{}, Number<kWideBlocks>{}, kNo); break;
        default: throw std::runtime_error("dwconv: no kernel of toeplitz_channels_last is compiled for this");
      }
    }
  });
  return launched;
}

}  // namespace

void launch_toeplitz_channels_last(const Problem& p, const Allocate& allocate, cudaStream_t stream) {
  if (p.stride_h > 1)
    return launch_toeplitz_strided_channels_last(p.pass == Pass::kGradInput ? p : realigned(p, allocate, stream),
                                                 stream);
  if (launch_bands(p, stream)) return;
  launch_bands(realigned_with_gaps(realigned(p, allocate, stream), allocate, stream), stream);
}

}  // namespace dwconv
