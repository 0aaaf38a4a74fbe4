// The same as hankel_grad_weight from whole planes of up to 56 columns in shared memory, multiplied by warpgroups: on
// sm_90, in code for sm_90a.
//
// A warpgroup takes four rows y of the input, one a warp: A[y][j][c] = input[y][c + j - padding] is a Hankel matrix for
// each, of 16 columns j of the kernel, in registers. The rows r of the gradient that any of them meets follow one
// another: B[c][n] = gradient[y + n][c], from shared memory, gives row padding + y - r of the kernel. So sums of a warp
// are the kernel itself, a row further for each row y. Two images go side by side, since rows of 56 columns are seven
// times 8.
//
// The rows j of a matrix are 2 g and 2 g + 1 of a thread: its pairs of pixels begin at even columns for the former, and
// for the latter they are put together from two words. Gradients lie in columns of 16 bytes, so that a matrix may begin
// at any row, with zeros above and below.
//
// Planes that do not begin with 16 bytes, or whose rows do not, come as the units that they lie in, whose rows two
// warps move, of an image each, to where those of others lie.
//
// What lies beside the images is multiplied as zeros, which is exact unless the other factor is Inf or NaN. So sums
// that are finite are right, and the others are taken again, product by product.
#include "hankel_grad_weight_groups.h"

#include <algorithm>
#include <cmath>

#include "boxes.cuh"
#include "launch.h"
#include "moved_planes.cuh"
#include "outer_products.cuh"
#include "overlap.cuh"
#include "tensor_cores.cuh"
#include "turn.cuh"
#include "warpgroups.cuh"
#include "weight_sums.cuh"

namespace dwconv {
namespace {

constexpr int kUnits = 7, kColumns = 8 * kUnits;  // of a row, of 8 columns each: those that a plane lacks are zeros
constexpr int kPair = 2;                          // images side by side
constexpr int kRowsAtOnce = kGroupWarps;          // of the input
constexpr int kMaxStages = 8;
constexpr int kRawStages = 2;  // of planes that are to be moved

// What a kernel is compiled for: a block's warpgroups, and the piece of a filter that a warp has sums of.
template <int blocks, int tiles, int groups>
struct Tile {
  static constexpr int kWarps = groups * kGroupWarps, kThreads = 32 * (kWarps + kGroupWarps);
  static constexpr int kBlocks = blocks, kColumns = 16 * blocks;  // of 16 columns of the filter
  static constexpr int kTiles = tiles;  // of 8 rows of the gradient, that four rows of the input meet
  static constexpr int kRows = 8 * tiles - (kRowsAtOnce - 1);  // of the filter, at most
  static constexpr int kGroups = groups;
  static constexpr int kWords = kUnits + 2 * (blocks - 1);              // 8 columns apart, that a thread has of a row
  static constexpr int kSumRows = 8 * tiles, kSumPitch = kColumns + 4;  // of a warp's sums in shared memory
  static constexpr int kSumBytes = 4 * kSumRows * kSumPitch;
};

struct Planes {
  CUtensorMap source_boxes;
  PlanePair planes;
  WeightSums result;
  int kernel_h, kernel_w, padding_h, padding_w;
  int tap_row, tap_column;
  int images, filters, splits;
  int pieces_h, pieces_w;  // of a filter, for different blocks
  int piece_h, piece_w;    // their rows and columns, but for the last ones
  int rows, quads, units;  // of a plane: rows, four of them, and 8 columns of a row
  int above;               // rows of the gradient, or of zeros, that a row of the input meets above itself, at most
  int zeros, unit_bytes;   // rows of zeros below each column of 16 bytes, and all of it
  int stages, stage_bytes, source_at;
  int pitch;  // bytes of a row of the input, with zeros behind
  bool moves;
  int raw_at, raw_bytes;  // where planes that are to be moved come, and what each of them takes
  static constexpr int kRawBarriers = 8 * 2 * kMaxStages, kBias = kRawBarriers + 8 * 2 * kRawStages;
  static constexpr int kZeros = kBias + 16, kFirstStage = 256;
  static_assert(kZeros + kUnit <= kFirstStage);

  __device__ int full(int stage) const { return 8 * stage; }
  __device__ int empty(int stage) const { return 8 * (kMaxStages + stage); }
  __device__ int raw_full(int stage) const { return kRawBarriers + 8 * stage; }
  __device__ int raw_empty(int stage) const { return kRawBarriers + 8 * (kRawStages + stage); }
  // An image's plane of the input; that of the gradient is behind it.
  __device__ int raw_plane(int stage, int image) const { return raw_at + 2 * (stage * kPair + image) * raw_bytes; }
  __host__ __device__ int row_bytes() const { return 2 * planes.width; }
  __host__ __device__ int plane_bytes() const { return rows * row_bytes(); }
  __device__ const char* source_of(int filter, int image) const {
    return planes.source + filter / planes.multiplier * planes.source_channel + image * planes.source_image;
  }
  __device__ const char* grad_of(int filter, int image) const {
    return planes.grad + filter * planes.grad_channel + image * planes.grad_image;
  }
  __host__ __device__ int front() const { return kUnit * (above > 0 ? above : 0); }
  __host__ __device__ int grad_bytes() const { return kPair * kUnits * unit_bytes; }
  __host__ __device__ int box_rows() const { return quads * kRowsAtOnce; }
  __host__ __device__ int source_bytes() const { return kPair * box_rows() * pitch; }
  // Columns are counted from an even one of the padded input on.
  __host__ __device__ int odd() const { return padding_w % 2; }
};

// What a block adds up.
struct Item {
  int filter, split, first, last;  // images
  int row, end_row, column;        // of the filter's piece; columns are counted as by Planes::odd()
  bool has_bias;

  __device__ explicit Item(const Planes& a) {
    const int pieces = a.pieces_h * a.pieces_w, piece = blockIdx.x % pieces, rest = blockIdx.x / pieces;
    filter = rest % a.filters, split = rest / a.filters;
    row = piece / a.pieces_w * a.piece_h, column = piece % a.pieces_w * a.piece_w;
    end_row = min(row + a.piece_h, a.kernel_h);
    has_bias = a.result.with_bias() && piece == 0;
    const int pairs = (a.images + 1) / kPair;
    first = static_cast<int>(int64_t{pairs} * split / a.splits) * kPair;
    last = min(static_cast<int>(int64_t{pairs} * (split + 1) / a.splits) * kPair, a.images);
  }
};

// Loads planes, as stages become free: by a warp.
__device__ inline void load_planes(const Planes& a, const Item& item) {
  const int lane = threadIdx.x % 32, units = kUnits * a.rows;
  const char* from = a.planes.grad + item.filter * a.planes.grad_channel;
  Turn turn;
  int filling = -1;  // the stage before
  const auto end_filling = [&] {
    if (filling < 0) return;
    before_bulk_copies();
    arrive_together(a.full(filling), lane == 0);
  };
  for (int image = item.first; image < item.last; image += kPair, turn.next(a.stages)) {
    const int stage = Planes::kFirstStage + turn.stage * a.stage_bytes;
    wait(a.empty(turn.stage), turn.parity ^ 1);
    if (lane == 0) {
      expect_bytes(a.full(turn.stage), a.source_bytes());
      copy_box(stage + a.source_at, a.source_boxes, 0, 0, item.filter / a.planes.multiplier, image, a.full(turn.stage));
      arrive(a.full(turn.stage));
    }
    __syncwarp();
    for (int k = 0; k < kPair; ++k) {
      const uint32_t to = shared_address(stage + a.front() + k * kUnits * a.unit_bytes);
      const char* plane = from + (image + k) * a.planes.grad_image;
#pragma unroll 4
      for (int i = lane; i < units; i += 32) {
        const int row = i / kUnits, unit = i - row * kUnits;
        const uint32_t at = to + unit * a.unit_bytes + kUnit * row;
        if (image + k < item.last && unit < a.units)
          copy_unit<kUnit>(at, plane + kUnit * (row * a.units + unit));
        else
          shared_at<uint4>(at) = uint4{};
      }
    }
    commit_copies();
    wait_copies<1>();
    end_filling();
    filling = turn.stage;
  }
  wait_copies<0>();
  end_filling();
}

// Loads planes that are to be moved: by a warp.
__device__ inline void load_planes_to_move(const Planes& a, const Item& item) {
  const int channel = item.filter / a.planes.multiplier, last_channel = (a.filters - 1) / a.planes.multiplier;
  Turn turn;
  for (int image = item.first; image < item.last; image += kPair, turn.next(kRawStages)) {
    const int barrier = a.raw_full(turn.stage);
    wait(a.raw_empty(turn.stage), turn.parity ^ 1);
    const bool begins = is_elected();
    for (int k = 0; k < min(kPair, item.last - image) && begins; ++k) {
      const int n = image + k;
      const bool is_first = n == 0, is_last = n == a.images - 1;
      const uint32_t to = shared_address(a.raw_plane(turn.stage, k));
      load_units(to, a.source_of(item.filter, n), a.plane_bytes(), is_first && channel == 0,
                 is_last && channel == last_channel, barrier);
      load_units(to + a.raw_bytes, a.grad_of(item.filter, n), a.plane_bytes(), is_first && item.filter == 0,
                 is_last && item.filter == a.filters - 1, barrier);
    }
    arrive_together(barrier, threadIdx.x % 32 == 0);
  }
}

// Moves those of the first image of each pair, or of the second one: by a warp, of which a lane moves a row.
__device__ inline void move_planes(const Planes& a, const Item& item, int k) {
  const int lane = threadIdx.x % 32, last_unit = a.units - 1;
  const bool same = a.row_bytes() % kUnit == 0;  // of all rows
  Turn turn, raw;
  for (int image = item.first; image < item.last; image += kPair, turn.next(a.stages), raw.next(kRawStages)) {
    const int n = image + k;
    const uint32_t stage = shared_address(Planes::kFirstStage + turn.stage * a.stage_bytes);
    wait(a.raw_full(raw.stage), raw.parity);
    wait(a.empty(turn.stage), turn.parity ^ 1);
#pragma unroll 1
    for (int side = 0; side < 2; ++side) {
      const bool is_source = side == 0;
      const uint32_t from = shared_address(a.raw_plane(raw.stage, k) + side * a.raw_bytes);
      const uint32_t to =
          stage + (is_source ? a.source_at + k * a.box_rows() * a.pitch : a.front() + k * kUnits * a.unit_bytes);
      const int row_step = is_source ? a.pitch : kUnit, unit_step = is_source ? kUnit : a.unit_bytes;
      const int before = bytes_before(is_source ? a.source_of(item.filter, n) : a.grad_of(item.filter, n));
#pragma unroll 1
      for (int row = lane; row < a.rows; row += 32) {
        const int at = before + row * a.row_bytes();
        const uint32_t place = to + row * row_step, last = place + last_unit * unit_step;
        const auto put = [&](int u, const uint4& unit) { shared_at<uint4>(place + u * unit_step) = unit; };
        if (n < item.last)
          MovedUnits(from + at / kUnit * kUnit).put(at % kUnit, same, a.units, put);
        else
          for (int u = 0; u < a.units; ++u) put(u, uint4{});
        if (same) continue;
        // Behind the row there are zeros.
#pragma unroll
        for (int w = 0; w < kUnit / 4; ++w)
          shared_at<uint32_t>(last + 4 * w) &= pair_mask(8 * last_unit + 2 * w, a.planes.width);
      }
    }
    before_bulk_copies();  // for multiplications, too
    arrive_together(a.raw_empty(raw.stage), lane == 0);
    arrive_together(a.full(turn.stage), lane == 0);
  }
}

// Adds up the gradient, for the bias.
template <typename T>
__device__ void add_bias(const Planes& a, const Item& item) {
  constexpr uint32_t kOne = std::is_same_v<T, __half> ? 0x3c003c00u : 0x3f803f80u;
  const int lane = threadIdx.x % 32;
  Turn turn;
  float sums[4] = {};
  for (int image = item.first; image < item.last; image += kPair, turn.next(a.stages)) {
    const int grad = Planes::kFirstStage + turn.stage * a.stage_bytes + a.front();
    wait(a.full(turn.stage), turn.parity);
    for (int at = kUnit * lane; at - kUnit * lane < a.grad_bytes(); at += 32 * kUnit) {
      uint32_t g[4];
      load_matrices(g, shared_address(at < a.grad_bytes() ? grad + at : Planes::kZeros));
      multiply(sums, sums, g, {kOne, kOne}, T{});
    }
    arrive_together(a.empty(turn.stage), lane == 0);
  }
  float total = lane % 4 == 0 ? sums[0] + sums[2] : 0;
  for (int offset = 16; offset > 0; offset /= 2) total += __shfl_xor_sync(~0u, total, offset);
  if (lane == 0) shared<float>(Planes::kBias) = total;
}

// The sums of a warp: of 16 columns of the kernel each, by 8 kTiles rows of the gradient.
template <typename T, class Tile>
struct Sums {
  static constexpr int kBlocks = Tile::kBlocks, kTiles = Tile::kTiles, kWords = Tile::kWords;

  float sum[kBlocks][kTiles][4];

  // Adds those of a row of two images. `source`: the thread's first pair of pixels, of the first image.
  __device__ void add(uint32_t source, int source_slot, uint32_t grad, int unit_bytes) {
    uint32_t even[kPair][kWords], odd[kPair][kWords];
#pragma unroll
    for (int k = 0; k < kPair; ++k)
#pragma unroll
      for (int w = 0; w < kWords; ++w) {
        const uint32_t from = source + k * source_slot + 16 * w;
        even[k][w] = load_word(from);
        odd[k][w] = __byte_perm(even[k][w], load_word(from + 4), 0x5432);
      }
    const Matrices rows(grad, unit_bytes, 8 * kUnit);
    before_multiplications();
#pragma unroll
    for (int step = 0; step < kUnits; ++step) {
      const int unit = 2 * step, next = unit + 1;  // of both images
#pragma unroll
      for (int b = 0; b < kBlocks; ++b) {
        const int w = unit % kUnits + 2 * b, v = next % kUnits + 2 * b, k = unit / kUnits, l = next / kUnits;
        multiply_together(sum[b], {even[k][w], odd[k][w], even[l][v], odd[l][v]},
                          rows.from(unit * (unit_bytes / kUnit)), T{});
      }
    }
    commit_multiplications();
    wait_multiplications<0>();
  }

  // To shared memory: columns of the kernel for each row of the gradient.
  __device__ void store(uint32_t to) const {
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
    for (int n = 0; n < kTiles; ++n)
#pragma unroll
      for (int e = 0; e < 2; ++e)
#pragma unroll
        for (int b = 0; b < kBlocks; ++b)
          shared_at<float2>(to + 4 * ((8 * n + 2 * t + e) * Tile::kSumPitch + 16 * b + 2 * g)) = {sum[b][n][e],
                                                                                                  sum[b][n][e + 2]};
  }
};

// kMoves: planes that are moved.
template <typename T, class Tile, bool kMoves>
__global__ void __launch_bounds__(launch_threads(Tile::kThreads), 1) hankel_groups(const __grid_constant__ Planes a) {
  if (!kHasWarpgroups) return;
  constexpr int kWarps = Tile::kWarps, kThreads = Tile::kThreads;
  let_next_kernel_start();
  const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0), lane = threadIdx.x % 32;
  const Item item(a);
  const bool has_bias = item.has_bias;
  if (threadIdx.x == 0) {
    for (int s = 0; s < a.stages; ++s) {
      init_barrier(a.full(s), kMoves ? kPair * kWarpArrivals : 1 + kWarpArrivals);
      init_barrier(a.empty(s), (kWarps + has_bias) * kWarpArrivals);
    }
    for (int s = 0; s < (kMoves ? kRawStages : 0); ++s)
      init_barrier(a.raw_full(s), kWarpArrivals), init_barrier(a.raw_empty(s), kPair * kWarpArrivals);
  }
  if (threadIdx.x < kUnit / 4) shared<uint32_t>(Planes::kZeros + 4 * threadIdx.x) = 0;
  // Zeros above and below the gradient's columns, and before the input's first row; wherever rows are moved to.
  for (int k = warp; k < a.stages * kPair * kUnits; k += kThreads / 32) {
    const int s = k / (kPair * kUnits), column = k - s * kPair * kUnits;
    const int stage = Planes::kFirstStage + s * a.stage_bytes, grad = stage + a.front();
    for (int row = (kMoves ? 0 : a.rows) + lane; row < a.rows + a.zeros; row += 32)
      shared<uint4>(grad + column * a.unit_bytes + kUnit * row) = uint4{};
    if (column > 0) continue;
    for (int at = kUnit * lane; at < a.front(); at += 32 * kUnit) shared<uint4>(stage + at) = uint4{};
    for (int at = a.front() + a.grad_bytes() + kUnit * lane; at < a.source_at; at += 32 * kUnit)
      shared<uint4>(stage + at) = uint4{};
    const int first = a.source_at + (kMoves ? 0 : a.source_bytes());
    for (int at = first + kUnit * lane; at < a.stage_bytes; at += 32 * kUnit) shared<uint4>(stage + at) = uint4{};
  }
  before_bulk_copies();
  __syncthreads();
  wait_for_kernel_before();
  const int threads = 32 * (kWarps + has_bias);
  // Those beside need few registers: what they leave the others share.
  constexpr int kFew = 80, kAll = (64 << 10) / kThreads / 8 * 8 * (Tile::kGroups + 1);
  if (warp >= kWarps) {
    give_registers<kFew>();
    if (warp == kWarps) kMoves ? load_planes_to_move(a, item) : load_planes(a, item);
    if (kMoves && warp >= kWarps + 2) move_planes(a, item, warp - kWarps - 2);
    if (warp == kWarps + 1 && has_bias) {
      add_bias<T>(a, item);
      meet<1>(threads);
      meet<1>(threads);
    }
    return;
  }
  take_registers<(kAll - kFew) / Tile::kGroups / 8 * 8>();

  const uint32_t memory = kept_shared_address();
  const int group = kMoves ? same_of_warp(warp / kGroupWarps) : warp / kGroupWarps, row_of_four = warp % kGroupWarps;
  const int source_slot = a.box_rows() * a.pitch, above = item.end_row - 1 - a.padding_h;
  const uint32_t source_at =
      a.source_at + row_of_four * a.pitch + 4 * (lane % 4 + lane / 4) + 2 * (item.column - a.padding_w - a.odd());
  Sums<T, Tile> sums{};
  Turn turn;
  int quad = group;  // counted on from stage to stage
#pragma unroll 1
  for (int image = item.first; image < item.last; image += kPair, turn.next(a.stages), quad -= a.quads) {
    uint32_t stage = memory + Planes::kFirstStage + turn.stage * a.stage_bytes;
    if constexpr (kMoves) stage = same_of_warp(stage);
    wait_at(memory + a.full(turn.stage), turn.parity);
#pragma unroll 1
    for (; quad < a.quads; quad += Tile::kGroups) {
      const int row = quad * kRowsAtOnce;
      sums.add(stage + source_at + row * a.pitch, source_slot, stage + a.front() + kUnit * (row - above), a.unit_bytes);
    }
    arrive_together_at(memory + a.empty(turn.stage), lane == 0);
  }
  meet<1>(threads);  // then nobody reads stages any more
  sums.store(memory + Planes::kFirstStage + warp * Tile::kSumBytes);
  meet<1>(threads);
  const auto put = [&](int tap, float sum) { a.result.put<T>(item.filter, item.split, tap, sum); };
  for (int k = threadIdx.x; k < (item.end_row - item.row) * Tile::kColumns; k += 32 * kWarps) {
    const int i = item.row + k / Tile::kColumns, column = k % Tile::kColumns, j = item.column + column - a.odd();
    if (j < 0 || j >= a.kernel_w) continue;
    float sum = 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w)
      sum += shared<float>(Planes::kFirstStage + w * Tile::kSumBytes +
                           4 * ((w % kGroupWarps + item.end_row - 1 - i) * Tile::kSumPitch + column));
    if (!is_finite(sum)) sum = a.planes.sum_by_products<T>(item, i - a.padding_h, j - a.padding_w);
    put(i * a.tap_row + j * a.tap_column, sum);
  }
  if (has_bias && threadIdx.x == 0) put(a.kernel_h * a.kernel_w, shared<float>(Planes::kBias));
}

// Cycles of a block for four rows of two images.
template <class Tile>
constexpr double kQuadCycles = 70. * Tile::kBlocks * Tile::kTiles + 200;

// Into how many parts the pairs of images are divided.
template <class Tile>
int splits_for(const Planes& a, int multiprocessors) {
  constexpr int kLongest = 12 << 10;  // products of a sum in float32: longer ones lose digits
  const int pairs = static_cast<int>(ceil_div(a.images, kPair));
  const int fewest = static_cast<int>(
      std::clamp<int64_t>(ceil_div(int64_t{a.images} * a.rows * kColumns / Tile::kWarps, kLongest), 1, pairs));
  int best = fewest;
  double least = INFINITY;
  for (int splits = fewest; splits <= std::min(pairs, fewest + 64); ++splits) {
    const auto rounds =
        static_cast<double>(ceil_div(int64_t{a.filters} * a.pieces_h * a.pieces_w * splits, multiprocessors));
    const double block = static_cast<double>(ceil_div(pairs, splits)) * kQuadCycles<Tile> / 3 * a.quads + 6000;
    const double cost = rounds * block + (splits > 1 ? 5000 + 10. * splits : 0);
    if (cost < least) least = cost, best = splits;
  }
  return best;
}

// The pieces of a filter.
template <class Tile>
int64_t rows_of_pieces(const Problem& p, Tile) {
  return ceil_div(p.kernel_h, Tile::kRows);
}
template <class Tile>
int64_t columns_of_pieces(const Problem& p, Tile) {
  return ceil_div(p.kernel_w + p.padding_w % 2, Tile::kColumns);
}
template <class Tile>
double cost_of(const Problem& p, Tile tile) {
  constexpr double kPieceCycles = 120;  // for loads of each piece
  return static_cast<double>(rows_of_pieces(p, tile) * columns_of_pieces(p, tile)) * (kQuadCycles<Tile> + kPieceCycles);
}

// Launches it, unless planes do not fit.
template <class Tile>
bool launch(const Problem& p, Planes a, const ImagePlanes& source, const Allocate& allocate, cudaStream_t stream) {
  a.pieces_h = static_cast<int>(rows_of_pieces(p, Tile{})), a.pieces_w = static_cast<int>(columns_of_pieces(p, Tile{}));
  a.piece_h = static_cast<int>(ceil_div(p.kernel_h, a.pieces_h)), a.piece_w = Tile::kColumns;
  const int columns = a.pieces_w * a.piece_w, left = a.padding_w + a.odd();  // left: of the plane
  const int border = static_cast<int>(round_up(std::max(left, a.kernel_w - 1 - a.padding_w), 8));
  a.pitch = 2 * (kColumns + border);
  // Of rows 16 bytes apart, seven columns in all banks.
  const int least_above = a.piece_h - 1 - a.padding_h;
  const int below = a.box_rows() - kRowsAtOnce + 8 * Tile::kTiles - least_above - a.rows;
  a.zeros = std::max({a.above, below, 0});
  while ((a.rows + a.zeros) % 8 != 7) ++a.zeros;
  a.unit_bytes = kUnit * (a.rows + a.zeros);
  a.source_at = static_cast<int>(round_up(a.front() + a.grad_bytes() + 2 * border, kBoxUnit));
  // Columns that the filter lacks are read, too.
  const int beyond = 2 * std::max(columns - left - border, 0) + kUnit;
  a.stage_bytes = static_cast<int>(round_up(a.source_at + a.source_bytes() + beyond, kBoxUnit));
  const Device& device = current_device();
  const int raw_bytes = a.moves ? kRawStages * kPair * 2 * a.raw_bytes : 0;
  a.stages = std::min<int>((device.shared_per_block - Planes::kFirstStage - raw_bytes) / a.stage_bytes, kMaxStages);
  if (a.stages < 2 || a.box_rows() > kMostBoxSide) return false;
  if (!a.moves &&
      !describe_boxes(a.source_boxes, const_cast<char*>(source.base), 2, {p.width, a.rows, p.channels, a.images},
                      {source.row_bytes, source.channel_bytes, source.image_bytes},
                      {a.pitch / 2, a.box_rows(), 1, kPair}))
    return false;
  a.raw_at = Planes::kFirstStage + a.stages * a.stage_bytes;
  a.splits = splits_for<Tile>(a, device.multiprocessors);
  a.result = weight_sums(p, a.splits, allocate);
  const int shared_bytes = std::max(a.raw_at + raw_bytes, Planes::kFirstStage + Tile::kWarps * Tile::kSumBytes);
  visit_dtype(p.dtype, [&](auto zero) {
    using T = decltype(zero);
    if constexpr (sizeof(T) == 2) {
      const auto kernel = a.moves ? hankel_groups<T, Tile, true> : hankel_groups<T, Tile, false>;
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
      launch_early(kernel, a, int64_t{a.pieces_h} * a.pieces_w * a.filters * a.splits, Tile::kThreads, stream,
                   {.shared_bytes = shared_bytes});
    }
  });
  check_launch("hankel_groups");
  launch_add_partial_sums(p, a.result, a.splits, stream);
  return true;
}

// Whether sizes are what the kernel is for: columns of planes, and filters that are not so small that others have less
// to do.
bool has_sizes(const Problem& p, int64_t few_columns) {
  constexpr int64_t kMost = 128;
  const int64_t few_rows = p.kernel_w + p.padding_w % 2 <= kHankelPieceColumns ? 8 : 16;
  return p.width > few_columns && p.width <= kColumns && p.kernel_h > few_rows &&
         std::max(p.kernel_h, p.kernel_w) <= kMost && p.padding_h < p.kernel_h && p.padding_w < p.kernel_w;
}

}  // namespace

bool launch_hankel_grad_weight_groups(const Problem& p, bool exchanged, const ImagePlanes& source,
                                      const ImagePlanes& grad, int64_t few_columns, const Allocate& allocate,
                                      cudaStream_t stream) {
  using Usual = Tile<2, 5, 3>;
  if (!has_warpgroups(hankel_groups<__half, Usual, false>)) return false;
  if (source.height != grad.height || source.width != grad.width || !has_sizes(p, few_columns)) return false;
  Planes a{};
  a.rows = source.height, a.quads = static_cast<int>(ceil_div(a.rows, kRowsAtOnce));
  a.units = static_cast<int>(ceil_div(source.width, kColumns / kUnits));
  a.kernel_h = static_cast<int>(p.kernel_h), a.kernel_w = static_cast<int>(p.kernel_w);
  a.padding_h = static_cast<int>(p.padding_h), a.padding_w = static_cast<int>(p.padding_w);
  a.tap_row = exchanged ? 1 : a.kernel_w, a.tap_column = exchanged ? a.kernel_h : 1;
  a.images = static_cast<int>(p.batch), a.filters = static_cast<int>(p.filters());
  a.planes = pair_of(source, grad, p.multiplier);
  a.above = a.kernel_h - 1 - a.padding_h;
  if (source.row_bytes != a.row_bytes() || grad.row_bytes != a.row_bytes()) return false;
  const auto begins_with_unit = [&](const ImagePlanes& v) {
    return (reinterpret_cast<uintptr_t>(v.base) | v.channel_bytes | (a.images > 1 ? v.image_bytes : 0)) % kUnit == 0;
  };
  a.moves = a.row_bytes() % kUnit > 0 || !begins_with_unit(source) || !begins_with_unit(grad);
  if (a.moves && (!has_ends(p.batch, source.image_bytes, p.channels, source.channel_bytes) ||
                  !has_ends(p.batch, grad.image_bytes, p.filters(), grad.channel_bytes)))
    return false;
  a.raw_bytes = static_cast<int>(round_up(a.plane_bytes(), kUnit)) + kMovedUnits * kUnit;
  // The tile that costs least. With 7 tiles of rows, three blocks of columns leave registers for two warpgroups only.
  const auto launch_best = [&]<class... Tiles>(Tiles... tiles) {
    const double least = std::min({cost_of(p, tiles)...});
    bool launched = false;
    (void)((cost_of(p, tiles) == least && (launched = launch<Tiles>(p, a, source, allocate, stream), true)) || ...);
    return launched;
  };
  static_assert(Tile<1, 5, 3>::kRows == kHankelPieceRows && Tile<1, 5, 3>::kColumns == kHankelPieceColumns);
  return launch_best(Tile<1, 3, 3>{}, Tile<1, 5, 3>{}, Tile<2, 3, 3>{}, Usual{}, Tile<3, 5, 3>{}, Tile<2, 7, 3>{},
                     Tile<3, 7, 2>{}, Tile<2, 9, 3>{});
}

}  // namespace dwconv
