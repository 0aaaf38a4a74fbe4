// grad_weight (and the bias gradient) of small kernels in 16 bits where rows are of whole words, on tensor cores, as
// sums over images: the products of batch_grad_weight_nchw.cu.
//
// Rows are copied to shared memory one by one, in pieces of 4 to 16 bytes, so that each begins with 16 bytes there and
// has zeros behind it. So matrices of 8 images and 8 columns are loaded at once, wherever they are, and nothing has to
// be asked about columns: what is beside a row is zero. With A[m][n] = input[n][y][first column + m] and
// B[n][k] = gradient[n][r][column + k], the product has the sums for row y + padding - r of the kernel on its
// diagonals.
// Kernels of 4 and 5 rows are multiplied as if they had 7.
//
// Rows that begin elsewhere than a piece does are copied with what is around them within their pieces: as many columns
// of the rows before and behind. A warp has the same columns of all rows then, so products with those are sums of their
// own, which are left out at the end.
//
// A block has some channels of whole planes, or bands of rows of one, of 16 images at a time, and works through a part
// of the images; a warp works on tiles of 7 rows and 8 columns, whose gradients stay in registers while the rows of the
// input go by, and another one loads, or all of them do. Diagonals are summed up at the end, in a fixed order.
#include "padded_grad_weight_nchw.h"

#include <algorithm>
#include <cmath>

#include "batch_grad_weight_nchw.h"
#include "image_sums.cuh"
#include "stream.cuh"

namespace dwconv {
namespace {

// Warps of a block: of most; where it has a multiprocessor to itself; and of kernels of one column.
constexpr int kFewWarps = 4, kManyWarps = 14, kColumnWarps = 7;
constexpr int kRows = 7, kColumns = 8;  // of a tile
constexpr int kPitch = kColumns + 1;    // of the products that are summed up at the end, in floats
constexpr int kMaxStages = 2;
constexpr int kAllTiles = 1 << 30;
constexpr int kAroundPiece = 8;  // bytes of pieces that rows are copied in with what is around them

#if __CUDA_ARCH__ >= 900
constexpr bool kBulkCopies = true;
#else
constexpr bool kBulkCopies = false;
#endif

// Rows of 16 images in shared memory.
struct PaddedRows {
  const char* base;
  int64_t image_bytes;         // from one image to the next
  int height, row_bytes;       // of a plane
  int rows;                    // of all planes
  int piece;                   // bytes that are copied at once
  int before;                  // bytes before a row in its first piece, of which there is one more then
  bool joined, bulk;           // rows lie in shared memory as in memory; a copy has all of them
  int row_pitch, image_pitch;  // in shared memory
  int shift;                   // bytes of zeros before a row, or its first piece, there
  int memory;
  Divider by_pieces;  // of a row

  __host__ __device__ int columns_before() const { return before / 2; }
};

struct Padded : BandSums {
  PaddedRows source, grad;
  int block_filters, share;  // warps that share a filter
  int groups, splits, stages, stage_bytes;
  int totals;   // where the first block of a cluster of all splits gets their sums in shared memory, or 0
  int strips;   // tiles side by side
  int window;   // the first column of a window for the kernel's first one
  bool loader;  // a warp does nothing but load
  bool around;  // rows are copied with what is around them
  // Or, where a block has one stage, of a plane, this is loaded in parts while tiles are added: tiles of the first rows
  // of the gradient, so many, need rows of the input up to `shared_end`, and those below from `shared_begin` on.
  int first_rows, shared_begin, shared_end;
  Divider by_strips;
};

// The barrier of a stage for what all warps load together: of a stage that there is not.
__device__ inline int full_at_first(int stage) {
  return Barriers::done(kMaxStages + stage);
}

// Begins to load rows [row, row + rows) of an image's planes, counted through all of them, of 16 images, to `place`;
// those that are not there become zeros. A lane loads all rows of an image, which a barrier waits for, or else a piece
// of all images; pieces are counted through all rows.
// kAround: with what is around rows within their pieces.
template <bool kAround>
__device__ void load_rows(const PaddedRows& v, int place, const Step& s, int row, int rows, int warp, int warps,
                          int barrier) {
  constexpr int kAtOnce = 8;  // images
  const int lane = threadIdx.x % 32;
  const char* const from = v.base + s.image * v.image_bytes + static_cast<int64_t>(row) * v.row_bytes;
  const uint32_t to = shared_address(place + v.shift);
  if (v.bulk) {
    if (lane < s.images) {
      expect_bytes(barrier, rows * v.row_bytes);
      copy_bulk(to + lane * v.image_pitch, from + lane * v.image_bytes, rows * v.row_bytes, barrier);
    }
  } else {
    const auto copy = [&](auto piece) {
      constexpr int kPiece = decltype(piece)::value;
      const int pieces = rows * (v.row_bytes / kPiece + (kAround && v.before > 0));
#pragma unroll 1
      for (int at = 32 * warp + lane; at < pieces; at += 32 * warps) {
        uint32_t r = at;
        const uint32_t column = v.by_pieces.split(r);
        const char* unit = from + at * kPiece;
        uint32_t slot = to + r * v.row_pitch + column * kPiece;
        if constexpr (kAround) {
          if (v.before > 0)
            unit -= r * kPiece + v.before;  // pieces have the end of a row and the beginning of the next
          const int number = row + static_cast<int>(r);
          if ((number == 0 && column == 0 && v.before > 0) ||
              (number + 1 == v.rows && column + 1 == v.by_pieces.divisor))
            continue;
        }
        const auto copy_images = [&](auto count) {
          constexpr int kCount = decltype(count)::value;
#pragma unroll
          for (int n = 0; n < kCount; ++n) copy_unit<kPiece>(slot + n * v.image_pitch, unit + n * v.image_bytes);
          slot += kCount * v.image_pitch, unit += kCount * v.image_bytes;
        };
        int images = s.images;
#pragma unroll 1
        for (; images >= kAtOnce; images -= kAtOnce) copy_images(std::integral_constant<int, kAtOnce>{});
#pragma unroll 1
        for (; images > 0; --images) copy_images(std::integral_constant<int, 1>{});
      }
    };
    if constexpr (kAround) {
      copy(std::integral_constant<int, kAroundPiece>{});
      // What the array has of its first and its last piece; nothing outside it is touched.
      const int pieces = static_cast<int>(v.by_pieces.divisor), last = kAroundPiece * (pieces - 1) - v.before;
      const auto copy_part = [&](int r, int begin, int end) {
        for (int i = lane; i < s.images * kAroundPiece / 2; i += 32) {
          const int n = i / (kAroundPiece / 2), byte = begin + i % (kAroundPiece / 2) * 2;
          if (byte < end)
            copy_unit<2>(to + n * v.image_pitch + r * v.row_pitch + v.before + byte,
                         from + n * v.image_bytes + r * v.row_bytes + byte);
        }
      };
      if (warp == 0 && row == 0 && v.before > 0) copy_part(0, 0, kAroundPiece - v.before);
      if (warp == warps - 1 && row + rows == v.rows) copy_part(rows - 1, last, v.row_bytes);
    } else if (v.piece == 16) {
      copy(std::integral_constant<int, 16>{});
    } else if (v.piece == 8) {
      copy(std::integral_constant<int, 8>{});
    } else {
      copy(std::integral_constant<int, 4>{});
    }
  }
#pragma unroll 1
  for (int n = s.images + warp; n < kImages; n += warps)
#pragma unroll 1
    for (int at = lane * kUnit; at < rows * v.row_pitch; at += 32 * kUnit)
      shared<uint4>(place + n * v.image_pitch + at) = uint4{};
}

// The sum of one tap over the block's steps, again.
template <typename T>
__device__ __noinline__ float sum_by_products(const Padded& a, int filter, Steps steps, int tap) {
  float sum = 0;
  for (int number = steps.first; number < steps.last; ++number) {
    const Step s = step_of(a, number);
    const auto all = [](int, int) { return true; };
    sum += sum_inside<T>(a, a.source, a.grad, filter, tap, s.image, s.images, s.row, s.rows, all);
  }
  return sum_of_lanes(sum);
}

// What a warp sums up. kKernelH: with what dilation puts between the rows. At stride 1 rows of the input are laid so
// that the 16 columns that a tile's windows meet begin with 16 bytes; at stride 2 windows begin 8 columns before a tile
// and have 32. kColumn: of a kernel of one column only what is in a tile's own columns, of two rows at once: the lower
// one and the upper one.
template <typename T, int kKernelH, int kStride, bool kColumn = false>
struct Sums {
  static constexpr bool kNear = !kColumn && kStride == 1;
  static constexpr int kWarps = kColumn ? kColumnWarps : kManyWarps;  // at most
  static constexpr int kBlocks = kColumn ? 2 : 1;  // of so many warps that are to share a multiprocessor
  static constexpr int kWindow = (kColumn ? 1 : kNear ? 2 : 4) * kColumns;
  static constexpr int kSourceRows = (kRows - 1) * kStride + kKernelH;
  static constexpr int kBiasAt = 4 * kKernelH * kWindow * kPitch, kBytes = kBiasAt + kUnit;

  float sum[kKernelH][kNear ? 1 : 2][4] = {}, bias[4] = {};
  float pairs[kColumn ? kKernelH + 1 : 1][4] = {};  // of rows i - 1 and i of the kernel

  // Where the lane's rows of matrices begin, for a tile at the first pixel of what is there.
  uint32_t source_slot, grad_slot;

  __device__ void place(const Padded& a, int stage, int channel, int filter) {
    const int lane = threadIdx.x % 32, half = lane / 8 % 2;
    const uint32_t source = shared_address(stage + a.source.memory) +
                            (lane % 8 + lane / 16 * 8) * a.source.image_pitch + channel * a.height * a.source.row_pitch;
    source_slot = source + (kColumn ? half * a.source.row_pitch : (half - (kStride == 1 ? 0 : 1)) * kUnit);
    grad_slot = shared_address(stage + a.grad.memory) + lane % 16 * a.grad.image_pitch +
                filter * a.chunk_rows * a.grad.row_pitch + lane / 16 * a.grad.row_pitch;
  }

  // Adds a tile of 16 images.
  __device__ void add(const Padded& a, const Step& s, int strip, int r0) {
    const int lane = threadIdx.x % 32;
    const int y0 = (s.row + r0) * kStride - a.padding_h, rows = s.rows - r0;
    const int begin = max(-y0, 0), end = min(s.source_end - y0, 32);
    // A bit for every row of the input that is inside the image. The others are read from zeros.
    const uint32_t inside = end > begin ? ~0u >> (32 - end) & ~0u << begin : 0;
    const uint32_t zeros = shared_address(kZeros), source_row = a.source.row_pitch, grad_row = a.grad.row_pitch;
    const uint32_t top = (y0 - s.source_begin) * source_row + strip * kStride * kUnit;
    const uint32_t from = source_slot + top, grad = grad_slot + r0 * grad_row + strip * kUnit;

    uint32_t g[kRows + 1][2];
#pragma unroll
    for (int r = 0; r < kRows; r += 2) {
      uint32_t both[4];
      load_matrices_transposed(both, r + lane / 16 < min(rows, kRows) ? grad + r * grad_row : zeros);
#pragma unroll
      for (int e = 0; e < 4; ++e) g[r + e / 2][e % 2] = both[e];
    }
    if (a.result.with_bias()) {
#pragma unroll
      for (int r = 0; r < kRows; ++r) add_to_bias(bias, g[r], T{});
    }
    if constexpr (kColumn) {
      const uint32_t both = inside >> (lane / 8 % 2);
#pragma unroll
      for (int y = 0; y < kSourceRows; y += 2) {
        uint32_t x[4];
        load_matrices_transposed(x, both >> y & 1 ? from + y * source_row : zeros);
#pragma unroll
        for (int i = 0; i <= kKernelH; ++i)
          if (y + 1 >= i && y + 1 - i < kRows) multiply(pairs[i], pairs[i], x, g[y + 1 - i], T{});
      }
    } else {
#pragma unroll
      for (int y = 0; y < kSourceRows; ++y) {
        const uint32_t row = inside >> y & 1 ? from + y * source_row : zeros;
        uint32_t x[kStride][4];
        load_matrices_transposed(x[0], row);
        if constexpr (kStride == 2) load_matrices_transposed(x[1], row + 2 * kUnit);
#pragma unroll
        for (int i = 0; i < kKernelH; ++i) {
          const int r = (y - i) / kStride;
          if (y < i || (y - i) % kStride != 0 || r >= kRows) continue;
#pragma unroll
          for (int h = 0; h < (kNear ? 1 : 2); ++h) multiply(sum[i][h], sum[i][h], x[h], g[r], T{});
        }
      }
    }
  }

  // Puts the products to shared memory from `place` on.
  // `strip`: the warp's, if it has but one, as where rows are copied with what is around them.
  template <bool kAround>
  __device__ void put(const Padded& a, int place, int strip) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < kKernelH; ++i) {
#pragma unroll
      for (int e = 0; e < kWindow / 4; ++e) {
        float value;
        if constexpr (kColumn)
          value = pairs[i + 1][e] + pairs[i][2 + e];
        else
          value = sum[i][e / 4][e % 4];
        shared<float>(place_of(place, i, lane / 4 + e / 2 * kColumns, lane % 4 * 2 + e % 2)) = value;
      }
    }
    const int v = strip * kColumns + lane % 4 * 2 - a.grad.columns_before();
    const auto of_row = [&](int v) { return !kAround || (v >= 0 && v < a.out_width); };
    const float total = total_of_bias(of_row(v) ? bias[0] : 0, of_row(v + 1) ? bias[1] : 0);
    if (lane == 0) shared<float>(place + kBiasAt) = total;
  }
  static __device__ int place_of(int place, int product, int m, int k) {
    return place + 4 * ((product * kWindow + m) * kPitch + k);
  }
  // The sum of a tap's products, which lie on a diagonal.
  template <bool kAround>
  static __device__ float tap(const Padded& a, int place, int strip, int i, int j) {
    const int from = place_of(place, i, a.window + j, 0);
    float total = 0;
#pragma unroll
    for (int k = 0; k < kColumns; ++k) {
      const int v = strip * kColumns + k - a.grad.columns_before(), x = v + j - a.padding_w;
      if (!kAround || (v >= 0 && v < a.out_width && x >= 0 && x < a.width))
        total += shared<float>(from + 4 * k * (kStride * kPitch + 1));
    }
    return total;
  }
};

// What rows do not cover in a stage becomes zero, before they are loaded.
__device__ inline void clear_stage(const Padded& a, int stage) {
#pragma unroll 1
  for (int row = threadIdx.x / 32; row < 2 * kImages; row += blockDim.x / 32) {
    const PaddedRows v = row < kImages ? a.source : a.grad;
    const int image = stage * a.stage_bytes + v.memory + row % kImages * v.image_pitch;
    const int begin = v.joined ? v.image_pitch - 2 * kUnit : 0;
#pragma unroll 1
    for (int at = begin + threadIdx.x % 32 * kUnit; at < v.image_pitch; at += 32 * kUnit)
      shared<uint4>(image + at) = uint4{};
  }
}

template <typename T, class Sums, bool kAround>
__global__ void __launch_bounds__(32 * (Sums::kWarps + 1), Sums::kBlocks)
    padded_grad_weight_nchw(const __grid_constant__ Padded a) {
  const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0), lane = threadIdx.x % 32;
  const bool cluster = a.totals > 0;
  const int group = cluster ? blockIdx.x / a.splits : blockIdx.x % a.groups;
  const int split = cluster ? blockIdx.x % a.splits : blockIdx.x / a.groups;
  const int first_filter = group * a.block_filters, filters = min(a.block_filters, a.filters - first_filter);
  const int taps = a.taps(), slots = a.slots(), turns = (slots + 31) / 32;
  const Totals totals{a.totals, filters, slots};
  if (cluster) enter_cluster(split == 0, kTotalsBarrier, 4 * a.splits * filters * slots);
  const Copier copier(false, true, a.loader);
  if (threadIdx.x == 0) {
    for (int i = 0; i < kMaxStages; ++i) {
      init_barrier(full_at_first(i), blockDim.x);
      init_barrier(Barriers::full(i), 32);
      init_barrier(Barriers::done(i), copier.workers() / 32 * kWarpArrivals);
    }
  }
#pragma unroll 1
  for (int at = kZeros + threadIdx.x * kUnit; at < kHead; at += blockDim.x * kUnit) shared<uint4>(at) = uint4{};
  if (threadIdx.x < kTail / kUnit) shared<uint4>(kHead + a.stages * a.stage_bytes + threadIdx.x * kUnit) = uint4{};
  const int warps = blockDim.x / 32;
#pragma unroll 1
  for (int stage = 0; stage < a.stages; ++stage) clear_stage(a, stage);
  before_bulk_copies();
  let_next_kernel_start();
  wait_for_kernel_before();
  __syncthreads();
  const int first_channel = first_filter / a.multiplier;
  const int channels = (first_filter + filters - 1) / a.multiplier - first_channel + 1;
  const int filter = warp / a.share, first_tile = warp % a.share;
  const int channel = (first_filter + filter) / a.multiplier - first_channel;
  const Steps steps((a.images + kImages - 1) / kImages * a.bands, a.splits, split);
  const auto [first, last] = steps;
  // Whole planes follow each other, and bands of the gradient are loaded one by one, by a warp of so many.
  const auto load = [&](int number, int stage, int rank, int warps, int barrier) {
    const Step s = step_of(a, number);
    const int runs = a.bands > 1 ? filters : 1, more = (filters - runs) * a.out_height + s.rows;
#pragma unroll 1
    for (int run = -1; run < runs; ++run) {
      const bool input = run < 0;
      PaddedRows v = input ? a.source : a.grad;
      v.bulk = v.bulk && kBulkCopies;
      if (v.bulk && rank < warps - 1) continue;  // the last warp has it, alone
      const int place = stage + v.memory + (input ? 0 : run * a.chunk_rows * v.row_pitch);
      load_rows<kAround>(
          v, place, s, input ? first_channel * a.height + s.source_begin : (first_filter + run) * a.out_height + s.row,
          input ? (channels - 1) * a.height + s.source_end - s.source_begin : more, v.bulk ? 0 : rank,
          v.bulk ? 1 : warps, barrier);
    }
  };

  Sums sums;
  const bool worker = copier.is_worker();
  const auto add = [&](int number, int stage, int begin = 0, int end = kAllTiles) {
    const Step s = step_of(a, number);
    const int tiles = filter < filters ? (s.rows + kRows - 1) / kRows * a.strips : 0;
    sums.place(a, stage, channel, filter);
    for (int tile = begin + first_tile; tile < min(end, tiles); tile += a.share) {
      uint32_t segment = tile;
      const int strip = static_cast<int>(a.by_strips.split(segment));
      sums.add(a, s, strip, static_cast<int>(segment) * kRows);
    }
  };
  if (a.first_rows > 0) {
    // Parts of a step: what upper tiles alone need, what lower ones need as well, and what they alone need. The first
    // part of the next step is loaded while lower tiles are added, and the last part while upper ones are.
    constexpr int kParts = 3;
    const int first_tiles = a.first_rows / kRows * a.strips;
    int loading = 0;  // the next part
#pragma unroll 1
    for (int turn = 0; turn < 2 * (last - first); ++turn) {
      const int now = turn / 2;
      const bool lower = turn % 2 != 0;
      if (lower) wait_copies<0>();
      __syncthreads();
#pragma unroll 1
      for (; loading < kParts * now + kParts + lower && loading < kParts * (last - first); ++loading) {
        const Step s = step_of(a, first + loading / kParts);
        const int part = loading % kParts;
#pragma unroll 1
        for (int input = 0; input < 2; ++input) {
          const PaddedRows& v = input ? a.source : a.grad;
          const int begin = part == 0 ? 0 : !input ? a.first_rows : part == 1 ? a.shared_begin : a.shared_end;
          const int end = part == 2 ? v.height : !input ? a.first_rows : part == 0 ? a.shared_begin : a.shared_end;
          if (begin < end)
            load_rows<kAround>(v, v.memory + begin * v.row_pitch, s,
                               (input ? first_channel : first_filter) * v.height + begin, end - begin, warp, warps, 0);
        }
        commit_copies();
      }
      if (!lower) {
        wait_copies<1>();
        __syncthreads();
      }
      add(first + now, 0, lower ? first_tiles : 0, lower ? kAllTiles : first_tiles);
    }
  } else {
    // Each turn begins to load a step, and adds one that was loaded before. All warps load, or, if one does nothing
    // else, that one, but for the first step of each stage.
    const int ahead = copier.dedicated ? kMaxStages : a.stages - 1;
    const auto stage_of = [&](int turn) { return turn % kMaxStages & (a.stages - 1); };
    const auto full = [](int turn) {
      return turn < kMaxStages ? full_at_first(turn) : Barriers::full(turn % kMaxStages);
    };
    const auto parity = [](int turn) { return turn < kMaxStages ? 0 : (turn / kMaxStages - 1) & 1; };
#pragma unroll 1
    for (int turn = 0; turn < last - first + ahead; ++turn) {
      const bool alone = copier.dedicated && turn >= kMaxStages;
      if (!copier.dedicated) {
        wait_copies<0>();
        __syncthreads();
      }
      if (first + turn < last && !(alone && worker)) {
        if (alone) wait(Barriers::done(stage_of(turn)), parity(turn));
        load(first + turn, stage_of(turn) * a.stage_bytes, alone ? 0 : warp, alone ? 1 : warps, full(turn));
        if (copier.dedicated)
          arrive_after_copies(full(turn));
        else
          commit_copies();
      }
      if (ahead == 0) {
        wait_copies<0>();
        __syncthreads();
      }
      const int before = turn - ahead;
      if (before < 0 || !worker) continue;
      if (copier.dedicated) wait(full(before), parity(before));
      add(first + before, stage_of(before) * a.stage_bytes);
      if (copier.dedicated) copier.finish(stage_of(before));
    }
  }
  __syncthreads();
  if (copier.is_worker() && filter < filters)
    sums.template put<kAround>(a, kHead + warp * Sums::kBytes, first_tile % a.strips);
  __syncthreads();
  if (cluster) meet_cluster();

  for (int turn = warp; turn < filters * turns; turn += blockDim.x / 32) {
    const int filter = turn / turns, slot = turn % turns * 32 + lane;
    float total = 0;
    for (int w = filter * a.share; w < (filter + 1) * a.share; ++w) {
      const int place = kHead + w * Sums::kBytes;
      if (slot < taps)
        total += Sums::template tap<kAround>(a, place, (w - filter * a.share) % a.strips,
                                             slot / a.kernel_w * a.dilation_h, slot % a.kernel_w * a.dilation_w);
      else if (slot < slots)
        total += shared<float>(place + Sums::kBiasAt);
    }
    uint32_t again = __ballot_sync(~0u, slot < taps && !is_finite(total));
    for (; again; again &= again - 1) {
      const int which = turn % turns * 32 + __ffs(again) - 1;
      const float exact = sum_by_products<T>(a, first_filter + filter, steps, which);
      if (slot == which) total = exact;
    }
    if (slot >= slots) continue;
    if (cluster)
      totals.send(split, filter, slot, total);
    else
      a.result.put<T>(first_filter + filter, split, slot, total);
  }
  if (cluster && split == 0) totals.put<T>(a.result, a.splits, first_filter);
}

// Whole planes of some channels, or bands of rows of one channel's filters, so that several blocks share a
// multiprocessor; a warp for each tile, or as many as keep all of them busy. Returns whether there is room.
bool lay_out(Padded& a, int warps, const Device& device) {
  const int extent_h = (a.kernel_h - 1) * a.dilation_h + 1, extent_w = (a.kernel_w - 1) * a.dilation_w + 1;
  a.strips = static_cast<int>(ceil_div(a.out_width + a.grad.columns_before(), kColumns));
  // Between rows there are as many zeros as windows reach beside them, or there is room for their pieces.
  const int64_t reach = std::max<int64_t>(
      {a.width + std::max(a.padding_w, a.source.shift / 2), (a.out_width - 1) * a.stride + extent_w - a.padding_w,
       a.strips * kColumns * a.stride, a.width + (a.source.before > 0 ? a.source.piece / 2 : 0)});
  a.source.row_pitch = static_cast<int>(2 * round_up(reach, kColumns));
  a.grad.row_pitch = 2 * a.strips * kColumns;
  const auto stage = [&](int filters, int64_t source_rows, int64_t rows) {
    const int64_t channels = filters % a.multiplier == 0   ? filters / a.multiplier
                             : a.multiplier % filters == 0 ? 1
                                                           : (filters - 1) / a.multiplier + 2;
    // An odd number of 16 bytes, so that 8 images' are in different banks, and zeros behind the last row.
    const auto pitch = [](int64_t bytes) { return static_cast<int>((bytes / kUnit + 1) | 1) * kUnit; };
    a.source.image_pitch = pitch(channels * source_rows * a.source.row_pitch);
    a.grad.image_pitch = pitch(filters * rows * a.grad.row_pitch);
    a.source.memory = kHead, a.grad.memory = kHead + kImages * a.source.image_pitch;
    return int64_t{kImages} * (a.source.image_pitch + a.grad.image_pitch);
  };
  const auto source_rows = [&](int64_t rows) {
    return rows >= a.out_height ? a.height : std::min<int64_t>((rows - 1) * a.stride + extent_h, a.height);
  };
  const auto most_rows = [&](int64_t room) {  // of a chunk
    int64_t rows = round_up(a.out_height, kRows);
    while (rows > 0 && stage(1, source_rows(rows), std::min<int64_t>(rows, a.out_height)) > room) rows -= kRows;
    return rows;
  };
  const auto room_of = [&](int blocks) {
    return (std::min(device.shared_per_block, device.shared_per_multiprocessor / blocks - 1024) - kHead - kTail) /
           a.stages;
  };
  int64_t room = 0, rows = 0;
  for (int blocks = 3; blocks > 0; --blocks) {
    room = room_of(blocks), rows = most_rows(room);
    if (rows >= a.out_height) break;
    if (rows > 0 && 2 * source_rows(rows) <= 3 * rows * a.stride) break;  // bands share rows
  }
  if (rows == 0) return false;
  a.bands = static_cast<int>(ceil_div(a.out_height, rows));
  a.chunk_rows = static_cast<int>(a.bands == 1 ? a.out_height : round_up(ceil_div(a.out_height, a.bands), kRows));
  const auto stage_of = [&](int filters) { return stage(filters, source_rows(a.chunk_rows), a.chunk_rows); };
  a.block_filters = 1;
  while (2 * a.block_filters <= warps && a.block_filters < a.filters &&
         (a.bands == 1 || a.multiplier % (2 * a.block_filters) == 0) && stage_of(2 * a.block_filters) <= room)
    a.block_filters *= 2;
  a.stage_bytes = static_cast<int>(stage_of(a.block_filters));
  const int64_t tiles = ceil_div(a.chunk_rows, kRows) * a.strips;
  a.share = 1;
  double busy = 0;
  for (int share = 1; share <= warps / a.block_filters; ++share) {
    const double now = static_cast<double>(tiles) / ceil_div(tiles, share);
    if (now > busy * 1.1) busy = now, a.share = share;
  }
  a.groups = static_cast<int>(ceil_div(a.filters, a.block_filters));
  a.by_bands = Divider(a.bands), a.by_strips = Divider(a.strips);
  return true;
}

// Divides a plane where a block has one, in one stage: into upper tiles and lower ones.
void divide_plane(Padded& a) {
  const int segments = static_cast<int>(ceil_div(a.out_height, kRows));
  if (a.stages > 1 || a.bands > 1 || a.block_filters > 1 || segments == 1) return;
  const auto row = [&](int y) { return std::min(std::max(y - a.padding_h, 0), a.height); };
  a.first_rows = segments / 2 * kRows;
  a.shared_begin = row(a.first_rows * a.stride);
  a.shared_end = std::max(row((a.first_rows - 1) * a.stride + (a.kernel_h - 1) * a.dilation_h + 1), a.shared_begin);
}

template <typename T, class Sums, bool kAround = false>
void launch(const Problem& p, Padded a, bool clusters, const Device& device, const Allocate& allocate,
            cudaStream_t stream) {
  const auto kernel = padded_grad_weight_nchw<T, Sums, kAround>;
  const int warps = a.share * a.block_filters, threads = 32 * (warps + (a.loader ? 1 : 0));
  const int64_t bytes = std::max<int64_t>(kHead + a.stages * a.stage_bytes + kTail, kHead + warps * Sums::kBytes);
  const int64_t steps = ceil_div(a.images, kImages) * a.bands;
  const int64_t slots = p.taps() + (p.bias != nullptr), totals = 4 * 2 * a.block_filters * slots;
  static thread_local Decisions<7, Splits> decisions;
  const auto [splits, cluster] = decisions({device.id, steps, a.groups, threads, bytes, clusters, totals}, [&] {
    // A block alone on its multiprocessor overlaps nothing at its beginning and its end: one is better than several in
    // turn, if most multiprocessors have one, and no sum is so long that it loses digits.
    const bool alone = 2 * (bytes + 1024) > device.shared_per_multiprocessor;
    const bool most = a.groups <= device.multiprocessors && 3 * a.groups >= 2 * device.multiprocessors;
    const Splits several = split_steps(kernel, device, steps, a.groups, threads, bytes, clusters ? totals : 0);
    return alone && most && steps <= 64 ? Splits{1, false} : several;
  });
  a.splits = splits;
  if (cluster) a.totals = static_cast<int>(bytes);
  a.result = weight_sums(p, cluster ? 1 : a.splits, allocate);
  launch_early(kernel, a, int64_t{a.groups} * a.splits, threads, stream,
               {.cluster = cluster ? a.splits : 1, .shared_bytes = bytes + (cluster ? totals : 0)});
  check_launch("padded_grad_weight_nchw");
  launch_add_partial_sums(p, a.result, a.splits, stream);
}

// The most bytes that all runs of `bytes` are whole pieces of, or 0.
int piece_of(const View& view, int64_t images, int64_t bytes) {
  for (int piece = kUnit; piece >= 4; piece /= 2)
    if (bytes % piece == 0 && reinterpret_cast<uintptr_t>(view.data) % piece == 0 &&
        (images == 1 || 2 * view.stride[0] % piece == 0))
      return piece;
  return 0;
}

void set_piece(PaddedRows& v, int piece, int before = 0) {
  v.piece = piece, v.before = before, v.by_pieces = Divider(v.row_bytes / piece + (before > 0));
}

// Rows that lie as in memory are like one, of `planes` whole planes or of a band: larger pieces may fit it, and where
// these are of 16 bytes a bulk copy has them all.
void join_rows(PaddedRows& v, const View& view, const Padded& a, int64_t planes, bool bulk) {
  if (v.row_pitch != v.row_bytes || v.shift > 0 || a.around) return;
  const int64_t bytes = a.bands > 1 ? v.row_bytes : planes * v.height * v.row_bytes;
  v.piece = piece_of(view, a.images, bytes);
  v.by_pieces = Divider(1 << 30);
  v.joined = true;
  v.bulk = bulk && v.piece == kUnit;
}

// Divides rows into pieces, and decides where they lie. Returns whether they can be copied so. `around`: with what is
// around them, of pieces that they do not begin with.
bool divide_rows(Padded& a, const Problem& p, bool column, bool around) {
  constexpr int kMostBytes = kAroundPiece;  // of a piece, where rows lie some columns later
  const bool near = !column && a.stride == 1;
  const auto divide = [&](PaddedRows& v, const View& view) {
    const int before = static_cast<int>(reinterpret_cast<uintptr_t>(view.data) % kMostBytes);
    const bool whole = v.row_bytes % kMostBytes == 0 && (p.batch == 1 || 2 * view.stride[0] % kMostBytes == 0);
    const int piece = !around ? piece_of(view, p.batch, v.row_bytes) : whole ? kMostBytes : 0;
    if (piece > 0) set_piece(v, piece, around ? before : 0);
    return piece > 0;
  };
  a.around = around;
  if ((around && !near) || !divide(a.source, p.input) || !divide(a.grad, p.output)) return false;
  if (around && a.source.before == 0 && a.grad.before == 0) return false;
  a.window = column ? 0 : kColumns - a.padding_w;
  if (!near) return true;
  // As many zeros before a row as padding, or some more, so that rows can be copied in their pieces, or smaller ones.
  const int apart = a.source.columns_before() - a.grad.columns_before(), least = std::max(a.padding_w - apart, 0);
  const auto reach = [&](int shift) { return shift + apart - a.padding_w + (a.kernel_w - 1) * a.dilation_w; };
  int shift = static_cast<int>(round_up(least, std::min(a.source.piece, kMostBytes) / 2));
  if (reach(shift) <= kColumns) {
    set_piece(a.source, std::min(a.source.piece, kMostBytes), a.source.before);
  } else if (around) {
    return false;
  } else {
    shift = static_cast<int>(round_up(a.padding_w, 2)), set_piece(a.source, 4);
  }
  a.source.shift = 2 * shift, a.window = shift + apart - a.padding_w;
  return reach(shift) <= kColumns;
}

}  // namespace

bool launch_padded_grad_weight_nchw(const Problem& p, bool bulk, const Allocate& allocate, cudaStream_t stream) {
  Padded a{};
  a.take(p);
  const auto arrange = [](PaddedRows& v, const View& view, int64_t planes, int64_t height, int64_t width) {
    v.base = static_cast<const char*>(view.data), v.image_bytes = 2 * view.stride[0];
    v.height = static_cast<int>(height), v.row_bytes = static_cast<int>(2 * width);
    v.rows = static_cast<int>(planes * height);
  };
  arrange(a.source, p.input, p.channels, p.height, p.width);
  arrange(a.grad, p.output, p.filters(), p.out_height, p.out_width);
  const Device& device = current_device();
  const bool column = a.kernel_w == 1 && a.stride == 1;  // so nothing is beside a row
  const int rows = (a.kernel_h - 1) * a.dilation_h + 1;
  int warps = column ? kColumnWarps : kFewWarps;
  const auto arrange_blocks = [&](bool around) {
    if (!divide_rows(a, p, column, around)) return false;
    // A warp does all the loading, unless there are too many pieces for one, as where they are of 4 bytes.
    a.loader = !around && std::min(a.source.piece, a.grad.piece) > 4;
    a.stages = kMaxStages;
    if (!lay_out(a, warps, device)) return false;
    // Bands share rows. Where three blocks of whole planes fit, if they load and add in turns, these are faster.
    if (a.bands > 1 && !column) {
      Padded one = a;
      one.stages = 1, one.loader = false;
      if (lay_out(one, warps, device) && one.bands == 1 &&
          3 * (kHead + one.stage_bytes + kTail + 1024) <= device.shared_per_multiprocessor)
        a = one;
    }
    return !around || a.share % a.strips == 0;
  };
  if (!arrange_blocks(true) && !arrange_blocks(false)) return false;
  // A block of few warps would leave its multiprocessor idle, if it has one to itself.
  const bool many = !column && !a.around && a.stride == 1 &&
                    2 * (kHead + a.stages * a.stage_bytes + kTail + 1024) > device.shared_per_multiprocessor;
  if (many) {
    // Kernels of 4 and 5 rows are multiplied as of 7, which pays where rows are loaded once.
    if (rows == 4 || rows == 5) return false;
    warps = kManyWarps;
    if (!arrange_blocks(false)) return false;
  }
  // Groups of filters begin with whole pieces, and end with them.
  const int64_t planes = a.filters % a.block_filters == 0 ? a.block_filters : 1;
  const bool can_bulk = bulk && a.loader && device.capability >= 90;
  if (!column && !a.around && !a.loader) divide_plane(a);
  join_rows(a.source, p.input, a, a.multiplier == 1 ? planes : 1, can_bulk);
  join_rows(a.grad, p.output, a, planes, can_bulk);
  visit_dtype(p.dtype, [&](auto zero) {
    using T = decltype(zero);
    if constexpr (sizeof(T) == 2) {
      const auto go = [&]<class Sums, bool kAround = false>(Sums) {
        launch<T, Sums, kAround>(p, a, bulk, device, allocate, stream);
      };
      const auto go_near = [&]<class Sums>(Sums sums) {
        a.around ? go.template operator()<Sums, true>(sums) : go(sums);
      };
      if (column) return go(Sums<T, kMaxColumnRows, 1, true>{});
      if (a.stride == 2 && rows <= 3) return go(Sums<T, 3, 2>{});
      if (a.stride == 2) return rows <= 5 ? go(Sums<T, 5, 2>{}) : go(Sums<T, 7, 2>{});
      if (rows <= 3) return go_near(Sums<T, 3, 1>{});
      if (rows <= 7) return go_near(Sums<T, 7, 1>{});
      go_near(Sums<T, 9, 1>{});
    }
  });
  return true;
}

}  // namespace dwconv
