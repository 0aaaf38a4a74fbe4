// Forward and grad_input of small kernels on contiguous planes in 16 bits, streamed (stream_nchw.cuh), on tensor cores.
//
// A row of the kernel is a band matrix B of 16 columns in and 8 columns out, B[k][n] = weight[k - n * stride]: one
// multiplication of it from the left by 16 rows of pixels gives 16 x 8 sums. The upper 8 rows are pixels of 8 tiles,
// the lower 8 the same tiles 8 output columns on, so that a warp computes 8 tiles of 16 columns. It walks down all of
// them at once: pixels are read once and used for every row of the kernel. The tiles of a plane are numbered along its
// rows or down its columns, whichever lets the 8 of a warp meet in fewer banks of shared memory.
//
// Pixels are read in pairs. Where rows have an even width, all begin at an even place or all at an odd one: then a
// window that would begin between two pairs begins a column earlier, and so does the band. Rows of an odd width begin
// at even and odd places in turn: tiles of an even number of rows agree on that, and so every other row has a band of
// its own that begins earlier. In other tiles a pair is put together from two words.
//
// A dilated kernel is one with zeros between its weights. A kernel of one row may be wider than a band matrix of 16 x 8
// allows: then 8 x 8 more follow, as they do at stride 2. A kernel of one column needs 8 x 8 alone.
//
// The zeros of B spoil an output if they meet Inf or NaN, which then is NaN. So outputs that are finite are right, and
// the others are computed again, tap by tap.
#include <type_traits>
#include <utility>

#include "launch.h"
#include "stream_nchw.cuh"
#include "tensor_cores.cuh"

namespace dwconv {
namespace {

// The 8 tiles of a plane that a warp computes together, as far as they are the thread's, which has 2 columns of a tile
// and the 2 that are 8 further on; and the filters of a chunk.
template <int kTileRows, int kBytesOfFilter>
struct EightTiles {
  static constexpr int kRows = kTileRows, kColumns = 16, kTiles = 8, kLanes = 32, kLoaders = 32;
  static constexpr bool kWhole = false, kSoon = true;
  static constexpr int kFilterBytes = kBytesOfFilter;

  int first_filter = -1;  // of those that are prepared
  int unit = -1;          // the tiles' number
  int row, column;        // of the tile and of the thread's first column: their place in the plane
  int corner;             // the same in bytes from the plane's beginning on
  uint32_t heights;       // for each of the thread's 4 columns a byte: how many rows are to be written

  // Whether a chunk has the filters that are prepared; from now on it has.
  __device__ bool has_filters(const Stream& a, const Chunk& c) {
    uint32_t first = c.target * a.fan_in;
    first = a.by_weights.split(first);
    return std::exchange(first_filter, static_cast<int>(first)) == static_cast<int>(first);
  }

  // Loads the filters of a chunk, two at once: read(a filter's number, which of the two) asks for the thread's weights,
  // and write(its place, which) puts them there.
  template <typename Read, typename Write>
  __device__ void load_filters(const Stream& a, const Chunk& c, Read&& read, Write&& write) const {
    const int filters = c.targets * a.fan_in;
    const auto place = [&](int f) { return a.filters_at + f * kFilterBytes; };
    const auto number = [&](int f) {
      uint32_t filter = c.target * a.fan_in + f;
      return a.by_weights.split(filter);
    };
    for (int f = threadIdx.x / 32; f < filters; f += 2 * a.warps) {
      const int other = f + a.warps;
      read(number(f), 0);
      if (other < filters) read(number(other), 1);
      write(place(f), 0);
      if (other < filters) write(place(other), 1);
    }
  }

  // Returns how many rows of the tile there are.
  __device__ int place(const Stream& a, const Chunk& c, int unit) {
    this->unit = unit;
    const int lane = threadIdx.x % 32, pair = lane % 4 * 2;
    uint32_t tile = unit * kTiles + lane / 4;
    int strip = (a.down ? a.by_tile_rows : a.by_strips).split(tile);
    row = tile;
    if (a.down) row = strip, strip = tile;
    row *= kRows;
    const int rows = strip < a.strips ? max(min(kRows, c.rows - row), 0) : 0;  // there may be less than 8 tiles left
    column = min(strip * kColumns, a.last_column) + pair;
    const int first = strip * kColumns - column, last = a.out_width - column;
    heights = 0;
#pragma unroll
    for (int v = 0; v < 4; ++v) {
      const int at = v / 2 * 8 + v % 2;
      heights |= (at >= first && at < last ? rows : 0) << 8 * v;
    }
    corner = row * a.target.row_bytes + 2 * column;
    return rows;
  }

  __device__ int height(int v) const { return static_cast<int>(heights >> 8 * v & 255); }

  // Calls visit(plane, place of its first filter, place of the thread's first output) for the planes of a chunk that
  // are the warp's, or its part of them: it stays with a part, 8 tiles or several times 8. `look`: called when the part
  // is another one. `visit` writes the outputs.
  template <typename Look, typename Visit>
  __device__ void for_planes(const Stream& a, const Chunk& c, int out, Look&& look, Visit&& visit) {
    uint32_t first_plane = threadIdx.x / 32;
    const int first_unit = a.by_warps_side.split(first_plane), targets = c.targets;
    const int plane_bytes = c.rows * a.target.row_bytes, filter_bytes = a.fan_in * kFilterBytes;
    for (int u = first_unit; u < a.units; u += a.warps_side) {
      if (unit != u || a.bands > 1) look(u);
      for (int plane = first_plane; plane < targets; plane += a.plane_step)
        visit(plane, plane * filter_bytes, out + plane * plane_bytes + corner);
    }
  }

  // Where the sources of a target plane begin in a chunk. Of bands plane 0 is the only one.
  static __device__ int source_of(const Stream& a, uint32_t plane) {
    a.by_fan_out.split(plane);
    return plane * (a.fan_in * a.height * a.source.row_bytes);
  }

  // Computes what is not finite again, tap by tap.
  template <typename T>
  __device__ void by_taps(const Stream& a, const Chunk& c, int to, int plane) const {
    for (int v = 0; v < 4; ++v) {
      const int beside = v / 2 * 8 + v % 2;
      if (height(v) > 0) tile_by_taps<T>(a, c, to + 2 * beside, plane, row, height(v), column + beside, 1);
    }
  }
};

// The pixels of a pair that are inside the image, once more: in a register of its own. A multiplication takes its
// registers side by side; where one would have to be at two places, ptxas copies all four for many of them.
__device__ inline uint32_t masked_again(uint32_t pair, uint32_t mask) {
  uint32_t value;
  asm("and.b32 %0, %1, %2;" : "=r"(value) : "r"(pair), "r"(mask));
  return value;
}

enum class Columns { kOne, kFew, kMany };  // of a kernel: one, or up to kMaxBandColumns, or up to kMaxWideColumns

constexpr int bytes_of_filter(int rows, Columns columns) {
  return kBandHeadBytes + rows * (columns == Columns::kMany ? kWideRowBytes : kBandRowBytes);
}

// kKernelH: with what dilation puts between the rows. kSum: where fan_in is not 1. kInTurn: rows have an odd width, and
// the tiles of a warp their even rows in common.
template <int kKernelH, int kStride, int kTileRows, bool kSum, Columns kColumnsOfKernel = Columns::kFew,
          bool kInTurn = false>
struct Toeplitz : EightTiles<kTileRows, bytes_of_filter(kKernelH, kColumnsOfKernel)> {
  using Tiles = EightTiles<kTileRows, bytes_of_filter(kKernelH, kColumnsOfKernel)>;
  using Tiles::column, Tiles::height, Tiles::kFilterBytes, Tiles::kRows, Tiles::row;
  static constexpr bool kWide = kColumnsOfKernel == Columns::kMany, kNarrow = kColumnsOfKernel == Columns::kOne;
  static_assert((!kWide && !kNarrow) || kStride == 1);
  static_assert(!kInTurn || (kStride == 1 && kRows % 2 == 0 && !kSum && !kWide && !kNarrow));
  // Of long rows only one block of tall tiles fits, which then has a warp for every part of them.
  static constexpr bool kTall = kRows == 14;
  static constexpr int kMaxThreads = kTall                                ? 480
                                     : kSum || (kInTurn && kKernelH == 7) ? 224
                                                                          : 288,
                       kBlocks = kTall ? 1 : 2;
  static constexpr int kRowBytes = kWide ? kWideRowBytes : kBandRowBytes;
  static constexpr int kMaxColumns = kWide ? kMaxWideColumns : kNarrow ? 1 : kMaxBandColumns;
  static constexpr int kBand = kStride == 2 || kWide ? 3
                               : kNarrow             ? 1
                                                     : 2;  // pairs of weights of a band matrix that a thread has
  static constexpr int kWords = kBand + kStride;           // pairs of pixels, 8 columns apart, that it reads of a row
  static constexpr int kLast = kNarrow ? 1 : 1 + kStride;  // of those that 16 columns of a band meet
  // Whether kernels may leave no room for a column more, so that windows begin between pairs.
  static constexpr bool kOddPairs = kNarrow || (kKernelH == kMaxBandColumns && kStride == 1 && !kSum && !kWide);

  // Whether all rows begin at an even place, or all at an odd one; then windows begin `shift` columns earlier.
  struct Pairs {
    bool fit;
    int shift;
  };
  static __device__ Pairs pairs_of(const Stream& a) {
    const int shift = (a.phase / 2 + a.padding_w) & 1;
    const bool fit = !kInTurn && a.width % 2 == 0 && (a.kernel_w - 1) * a.dilation_w + 1 + shift <= kMaxColumns;
    return {fit, fit ? shift : 0};
  }

  // Where a row's weights lie between zeros. At stride 1 there is a second copy, a column further on: with both, any
  // two neighbours are one word. At stride 2 the shift alone says which of them are asked for.
  static constexpr int kMiddle = kStride == 1 ? 8 : 16;  // zeros before the weights
  static constexpr int kCopy = kWide ? 62 : 46;          // bytes to the same weight in the copy

  template <typename T>
  __device__ void prepare(const Stream& a, const Chunk& c) {
    if (this->has_filters(a, c)) return;
    constexpr int kTurns = (kKernelH * kMaxColumns + 31) / 32;
    const int lane = threadIdx.x % 32, shift = kStride == 1 ? 0 : pairs_of(a).shift;
    int from[kTurns], to[kTurns];
#pragma unroll
    for (int t = 0; t < kTurns; ++t) {
      uint32_t i = lane + 32 * t;
      const int j = a.by_kernel_w.split(i);
      from[t] = i * a.weight_row + j * a.weight_column;
      to[t] = static_cast<int>(i) < a.kernel_h
                  ? kBandHeadBytes + i * a.dilation_h * kRowBytes + 2 * (kMiddle + shift + j * a.dilation_w)
                  : 0;
    }
    const bool has_bias = a.bias && lane < 4;
    T weight[2][kTurns] = {}, bias[2] = {};  // or else they would be kept from chunk to chunk
    this->load_filters(
        a, c,
        [&](uint32_t filter, int n) {
          const T* taps = static_cast<const T*>(a.weight) + filter * a.weight_filter;
#pragma unroll
          for (int t = 0; t < kTurns; ++t)
            if (to[t] > 0) weight[n][t] = __ldg(taps + from[t]);
          if (has_bias) bias[n] = __ldg(static_cast<const T*>(a.bias) + filter * a.bias_stride);
        },
        [&](int place, int n) {
#pragma unroll
          for (int t = 0; t < kTurns; ++t)
            if (to[t] > 0) {
              shared<T>(to[t] + place) = weight[n][t];
              if (kStride == 1) shared<T>(to[t] + place + kCopy) = weight[n][t];
            }
          if (has_bias) shared<float>(place + 4 * lane) = widen(bias[n]);
        });
  }

  // Of windows as they are, and of those that begin a column earlier, if rows do in turn:
  static constexpr int kTurns = kInTurn ? 2 : 1;
  int weights[kTurns];            // of the thread in the band matrices
  uint32_t mask[kTurns][kWords];  // of the pixels inside the image
  int first_pair;                 // where the thread's first pair lies, or would lie: from the chunk's first row on
  bool fit;                       // see Pairs
  uint32_t inside;                // a bit for each row that is inside the image, or the chunk's part of it

  __device__ void place(const Stream& a, const Chunk& c, int unit) {
    const int rows = Tiles::place(a, c, unit), lane = threadIdx.x % 32, pair = lane % 4 * 2;
    const auto [fit, shift] = pairs_of(a);
    this->fit = fit;
    const int source_column = (column - pair) * kStride - a.padding_w - shift + pair;
#pragma unroll
    for (int n = 0; n < kTurns; ++n) {
#pragma unroll
      for (int w = 0; w < kWords; ++w) {
        const auto inside = [&](int x) { return static_cast<uint32_t>(x) < static_cast<uint32_t>(a.width); };
        const int x = source_column - n + 8 * w;
        mask[n][w] = (inside(x) ? 0xffffu : 0) | (inside(x + 1) ? 0xffff0000u : 0);
      }
      const int entry = pair - lane / 4 * kStride - shift - n;  // of the thread's first pair in a row of weights
      weights[n] =
          a.filters_at + (kStride == 1 ? 2 * (kMiddle + entry) + (entry & 1) * kCopy : 2 * (kMiddle + shift + entry));
    }
    const int y = (c.row + row) * kStride - a.padding_h, top = c.group * a.fan_in * a.height - c.source_begin;
    const int begin = max(-y, 0), end = min(min(a.height, c.source_end - c.source_begin - top) - y, 32);
    inside = rows > 0 && end > begin ? ~0u >> (32 - end) & ~0u << begin : 0;
    first_pair = (top + y) * a.source.row_bytes + 2 * source_column;
  }

  template <typename T>
  __device__ void compute(const Stream& a, const Chunk& c, int out) {
    const bool even = a.out_width % 2 == 0 && c.target_row % 4 == 0;
    const int source_at = c.source_at;
    this->for_planes(
        a, c, out, [&](int unit) { place(a, c, unit); },
        [&](int plane, int filter, int to) {
          const int source = source_at + first_pair + this->source_of(a, plane);
          uint32_t zero = 0;
          const int left = height(0), right = height(2), corner = to;
          const auto store = [&](auto pairs, int r, const float (&sum)[4]) {
#pragma unroll
            for (int h = 0; h < 2; ++h) {
              const auto values = narrow_pair(sum[2 * h], sum[2 * h + 1], T{});
              add_zeros(zero, values);
              const int at = to + 16 * h;
              if (pairs) {
                if (r < (h ? right : left)) shared<Pair<T>>(at) = values;
              } else {
                if (r < (h ? right : left)) shared<T>(at) = values.x;
                if (r < height(2 * h + 1)) shared<T>(at + 2) = values.y;
              }
            }
            to += a.target.row_bytes;
          };
          if (!kInTurn && fit && even)
            add<T, Reads::kPairs>(a, source, filter, store);
          else if (kOddPairs && even && a.width % 2 == 0)
            add<T, kOddPairs ? Reads::kOddPairs : Reads::kAny>(a, source, filter, store);
          else
            add<T, Reads::kAny>(a, source, filter, store);
          if (zero != 0) this->template by_taps<T>(a, c, corner, plane);  // NaN: an output is not finite
        });
  }

  // How pixels are read: pairs as they lie; pairs that all begin at odd places, put together from two words; any. But
  // for the last way, outputs are written in pairs.
  enum class Reads { kPairs, kOddPairs, kAny };

  // Computes 8 tiles, row by row. `source`: where the thread's first pair lies, or would lie.
  template <typename T, Reads kReads, typename Store>
  __device__ void add(const Stream& a, int source, int filter, Store&& store) const {
    constexpr bool kPairs = kReads != Reads::kAny, kOdd = kReads == Reads::kOddPairs;
    constexpr int kSourceRows = (kRows - 1) * kStride + kKernelH;
    const int odd = kInTurn ? source >> 1 & 1 : 0;  // whether the first row begins a column earlier, or the next one
    const float4 start = shared<float4>(a.filters_at + filter);
    const float before[4] = {start.x, start.y, start.z, start.w};
    float sum[kRows][4];
    if (kSum)
#pragma unroll
      for (int r = 0; r < kRows; ++r)
#pragma unroll
        for (int v = 0; v < 4; ++v) sum[r][v] = before[v];

    for (int q = 0; q < (kSum ? a.fan_in : 1); ++q, filter += kFilterBytes) {
      uint32_t band[kTurns][kKernelH][kBand], inside_row[kTurns][kWords];
      int next_row[kTurns];
#pragma unroll
      for (int n = 0; n < kTurns; ++n) {  // of every other row
        const bool earlier = kInTurn && odd != n;
        const int from = (earlier ? weights[kTurns - 1] : weights[0]) + filter + kBandHeadBytes;
#pragma unroll
        for (int i = 0; i < kKernelH; ++i)
#pragma unroll
          for (int h = 0; h < kBand; ++h) band[n][i][h] = shared<uint32_t>(from + i * kRowBytes + 16 * h);
#pragma unroll
        for (int w = 0; w < kWords; ++w) inside_row[n][w] = earlier ? mask[kTurns - 1][w] : mask[0][w];
        next_row[n] = source + (q * a.height + n) * a.source.row_bytes - 2 * (earlier || kOdd);
      }
      uint32_t next[kWords];
      const auto load = [&](int r) {
        const int from = inside >> r & 1 ? next_row[r % kTurns] : kZeros;
#pragma unroll
        for (int w = 0; w < kWords; ++w) {
          if (kOdd) {
            next[w] = __byte_perm(shared<uint32_t>(from + 16 * w), shared<uint32_t>(from + 16 * w + 4), 0x5432);
          } else if (kPairs || kInTurn) {
            next[w] = shared<uint32_t>(from + 16 * w);
          } else {
            const int at = (from & ~3) + 16 * w;  // zeros are that many too
            next[w] = __funnelshift_r(shared<uint32_t>(at), shared<uint32_t>(at + 4), (from & 2) * 8);
          }
        }
        next_row[r % kTurns] += kTurns * a.source.row_bytes;
      };
      load(0);
#pragma unroll
      for (int r = 0; r < kSourceRows; ++r) {
        const auto word = [&](int w) { return next[w] & inside_row[r % kTurns][w]; };
        const auto word_again = [&](int w) { return masked_again(next[w], inside_row[r % kTurns][w]); };
        const uint32_t x[4] = {word(0), word(kStride), kStride == 1 ? word_again(1) : word(1), word(kLast)};
        const uint32_t beyond[2] = {kBand == 3 ? word_again(2) : 0, word(kWords - 1)};
        if (r + 1 < kSourceRows) load(r + 1);
#pragma unroll
        for (int i = kKernelH - 1; i >= 0; --i) {
          const int reach = r - i, o = reach / kStride;
          if (reach < 0 || reach % kStride != 0 || o >= kRows) continue;
          const float (&sum_before)[4] = kSum || i > 0 ? std::as_const(sum[o]) : before;
          if constexpr (kNarrow)
            multiply(sum[o], sum_before, {x[0], x[1]}, band[r % kTurns][i][0], T{});
          else
            multiply(sum[o], sum_before, x, {band[r % kTurns][i][0], band[r % kTurns][i][1]}, T{});
          if constexpr (kBand == 3) multiply(sum[o], beyond, band[r % kTurns][i][2], T{});
        }
        const int done = r - kKernelH;  // the output row that the row before was the last for
        if (!kSum && done >= 0 && done % kStride == 0)
          store(std::bool_constant<kPairs>{}, done / kStride, sum[done / kStride]);
      }
    }
#pragma unroll
    for (int r = kSum ? 0 : kRows - 1; r < kRows; ++r) store(std::bool_constant<kPairs>{}, r, sum[r]);
  }
};

// grad_input at stride 2. Every other tap reaches an output: B[k][n] = weight[n - 2 k + what follows from the padding],
// 8 columns in and 8 columns out, where the lower 8 rows of pixels are the same tiles 4 source columns on. kOdd:
// whether the padding above is odd, which says by which rows of the kernel a row is reached.
template <int kKernel, int kOdd>
struct ToeplitzSpread : EightTiles<8, kSpreadRowBytes * kKernel> {
  using Tiles = EightTiles<8, kSpreadRowBytes * kKernel>;
  using Tiles::column, Tiles::height, Tiles::kFilterBytes, Tiles::kRows, Tiles::row;
  static constexpr int kMaxThreads = 288, kBlocks = 2;
  // A row of weights is words of the weight at a place and the one two places before. Words before the first weight's:
  static constexpr int kMiddle = 8;
  static_assert(4 * (kMiddle + 2 * kKernel + 2) <= kSpreadRowBytes);
  // Source rows that a tile reads, from its first one's on.
  static constexpr int kLow = -((kKernel - 1 - kOdd) / 2), kSourceRows = (kOdd + kRows - 1) / 2 - kLow + 1;

  // Where windows begin: source columns from half the first target column, an even place if all rows begin alike.
  struct Window {
    bool fit;
    int odd, low, shift;
  };
  static __device__ Window window_of(const Stream& a) {
    const int odd = a.padding_w & 1, low = (a.padding_w - odd) / 2 - (kKernel - 1 - odd) / 2;
    const bool fit = a.width % 2 == 0;
    return {fit, odd, low, fit ? (a.phase / 2 + low) & 1 : 0};
  }

  template <typename T>
  __device__ void prepare(const Stream& a, const Chunk& c) {
    if (this->has_filters(a, c)) return;
    constexpr int kTaps = kKernel * kKernel;
    const int lane = threadIdx.x % 32;
    T weight[2][(kTaps + 31) / 32];
    const auto for_taps = [&](auto&& visit) {
#pragma unroll
      for (int t = 0; t < kTaps; t += 32)
        if (t + lane < kTaps) visit(t / 32, (t + lane) / kKernel, (t + lane) % kKernel);
    };
    this->load_filters(
        a, c,
        [&](uint32_t filter, int n) {
          const T* taps = static_cast<const T*>(a.weight) + filter * a.weight_filter;
          for_taps([&](int t, int i, int j) { weight[n][t] = __ldg(taps + i * a.weight_row + j * a.weight_column); });
        },
        [&](int place, int n) {
          for_taps([&](int t, int i, int j) {
            const int at = place + i * kSpreadRowBytes + 4 * (kMiddle + j);
            shared<T>(at) = weight[n][t], shared<T>(at + 4 * 2 + 2) = weight[n][t];
          });
        });
  }

  int weights;       // of the thread in the rows of weights
  int first_pair;    // where the thread's first pair lies, or would lie: from the chunk's first row on
  uint32_t inside;   // a bit for each source row that is inside the image, or the chunk's part of it
  uint32_t mask[2];  // of the pixels inside the image

  __device__ void place(const Stream& a, const Chunk& c, int unit) {
    const int rows = Tiles::place(a, c, unit), lane = threadIdx.x % 32, pair = lane % 4 * 2;
    const auto [fit, odd, low, shift] = window_of(a);
    // The tile's column is a multiple of 4, half of it even.
    const int source_column = (column - pair) / 2 + low - shift + pair;
#pragma unroll
    for (int w = 0; w < 2; ++w) {
      const auto inside = [&](int x) { return static_cast<uint32_t>(x) < static_cast<uint32_t>(a.width); };
      const int x = source_column + 4 * w;
      mask[w] = (inside(x) ? 0xffffu : 0) | (inside(x + 1) ? 0xffff0000u : 0);
    }
    const int y = (c.row + row + a.padding_h - kOdd) / 2 + kLow, top = c.group * a.fan_in * a.height - c.source_begin;
    // Of each of the planes that are summed over.
    const int begin = max(-y, 0),
              end = min((a.bands > 1 ? min(a.height, c.source_end - c.source_begin - top) : a.height) - y, 32);
    inside = rows > 0 && end > begin ? ~0u >> (32 - end) & ~0u << begin : 0;
    first_pair = (top + y) * a.source.row_bytes + 2 * source_column;
    // The tap of the thread's first weight: that of the source column `low` less than half the target's is the last.
    const int tap = odd + 2 * ((kKernel - 1 - odd) / 2) + 2 * shift + lane / 4 - 2 * pair;
    weights = a.filters_at + 4 * (kMiddle + tap);
  }

  template <typename T>
  __device__ void compute(const Stream& a, const Chunk& c, int out) {
    const bool pairs = window_of(a).fit && a.out_width % 2 == 0 && c.target_row % 4 == 0;
    const int source_at = c.source_at;
    this->for_planes(
        a, c, out, [&](int unit) { place(a, c, unit); },
        [&](int plane, int filter, int to) {
          const int source = source_at + first_pair + this->source_of(a, plane);
          const bool finite = pairs ? add<T, true>(a, source, filter, to) : add<T, false>(a, source, filter, to);
          if (!finite) this->template by_taps<T>(a, c, to, plane);
        });
  }

  // Computes 8 tiles. `source`: where the thread's first pair lies, or would lie. Returns whether all outputs are
  // finite.
  template <typename T, bool kPairs>
  __device__ bool add(const Stream& a, int source, int filter, int to) const {
    float sum[kRows][4] = {};
    for (int q = 0; q < a.fan_in; ++q, filter += kFilterBytes) {
      uint32_t band[kKernel];
#pragma unroll
      for (int i = 0; i < kKernel; ++i) band[i] = shared<uint32_t>(weights + filter + i * kSpreadRowBytes);
      const int first_row = source + q * a.height * a.source.row_bytes;
#pragma unroll
      for (int r = 0; r < kSourceRows; ++r) {
        const int from = inside >> r & 1 ? first_row + r * a.source.row_bytes : kZeros;
        uint32_t x[2];
#pragma unroll
        for (int w = 0; w < 2; ++w) {
          if (kPairs) {
            x[w] = shared<uint32_t>(from + 8 * w);
          } else {
            const int at = (from & ~3) + 8 * w;  // zeros are that many too
            x[w] = __funnelshift_r(shared<uint32_t>(at), shared<uint32_t>(at + 4), (from & 2) * 8);
          }
          x[w] &= mask[w];
        }
#pragma unroll
        for (int i = 0; i < kKernel; ++i) {
          const int o = 2 * (r + kLow) + i - kOdd;
          if (o >= 0 && o < kRows) multiply(sum[o], x, band[i], T{});
        }
      }
    }
    uint32_t zero = 0;
#pragma unroll
    for (int r = 0; r < kRows; ++r, to += a.target.row_bytes)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const auto values = narrow_pair(sum[r][2 * h], sum[r][2 * h + 1], T{});
        add_zeros(zero, values);
        const int at = to + 16 * h;
        if (kPairs) {
          if (r < height(2 * h)) shared<Pair<T>>(at) = values;
        } else {
          if (r < height(2 * h)) shared<T>(at) = values.x;
          if (r < height(2 * h + 1)) shared<T>(at + 2) = values.y;
        }
      }
    return zero == 0;  // else NaN
  }
};

// The rows of a tile that waste least: tiles that a plane does not fill, and rows that two tiles read.
template <int kKernelH, int kStride, Columns kColumns = Columns::kFew, typename Go>
void choose_rows(const Stream& a, Go&& go) {
  if constexpr (kStride == 1)
    if (a.fan_in > 1) return go(Toeplitz<kKernelH, 1, 4, true>{});
  // What has fewer columns is served by CUDA cores where it has fewer rows, too.
  if constexpr (kStride == 1 && kKernelH >= 9 && kColumns == Columns::kFew)
    if (a.kernel_w == 1) return choose_rows<kKernelH, 1, Columns::kOne>(a, go);
  // Rows of an odd width are read with fewer instructions by tiles of an even number of rows.
  constexpr bool kSquare =
      kStride == 1 && (kKernelH == 3 || kKernelH == 5 || kKernelH == 7) && kColumns == Columns::kFew;
  const bool in_turn = kSquare && a.width % 2 == 1 && (a.kernel_w - 1) * a.dilation_w + 1 < kMaxBandColumns;
  if constexpr (kSquare && kKernelH > 3)
    if (a.out_height >= 112 && a.source.row_bytes <= 4096) {
      if (in_turn) return go(Toeplitz<kKernelH, 1, 14, false, kColumns, true>{});
      return go(Toeplitz<kKernelH, 1, 14, false>{});
    }
  if constexpr (kStride == 1 && kKernelH == 11) {  // tall tiles, unless they waste more of a plane
    const bool fit = ceil_div(a.out_height, 14) * 2 == ceil_div(a.out_height, 7);
    if (a.out_height >= 28 && fit && a.source.row_bytes <= 4096) return go(Toeplitz<11, 1, 14, false, kColumns>{});
  }
  const auto cost = [&](int rows) {
    constexpr int kSetUp = 80 + 2 * kKernelH;  // instructions, about
    const int row = a.width % 2 == 0 || (in_turn && rows == 8) ? 9 : 16;
    const int64_t tiles = ceil_div(a.out_height, rows) * ceil_div(a.out_width, 16);
    return ceil_div(tiles, 8) * (row * ((rows - 1) * kStride + kKernelH) + rows * (8 + kKernelH * kStride) + kSetUp);
  };
  // Not where two or three tiles beside each other would meet those below them in the same banks, nor for planes that
  // are cut.
  constexpr int kLeastWidth = 48, kLongRow = 512;  // columns, bytes
  if constexpr (kSquare)
    if ((in_turn || a.out_width > kLeastWidth) && a.source.row_bytes <= kLongRow &&
        cost(8) < std::min(cost(2), cost(7))) {
      if (in_turn) return go(Toeplitz<kKernelH, 1, 8, false, kColumns, true>{});
      return go(Toeplitz<kKernelH, 1, 8, false>{});
    }
  if (cost(2) < cost(7))
    go(Toeplitz<kKernelH, kStride, 2, false, kColumns>{});
  else
    go(Toeplitz<kKernelH, kStride, 7, false, kColumns>{});
}

}  // namespace

void launch_toeplitz_nchw(const Problem& p, bool bulk, const Allocate& allocate, cudaStream_t stream) {
  Stream a;
  int64_t images;
  std::tie(a, images) = stream_of(p, bulk);
  visit_dtype(p.dtype, [&](auto zero) {
    using T = decltype(zero);
    if constexpr (sizeof(T) == 2) {
      const auto go = [&](auto tile) { launch<T, decltype(tile)>(a, images, allocate, stream); };
      const int rows = (a.kernel_h - 1) * a.dilation_h + 1, columns = (a.kernel_w - 1) * a.dilation_w + 1;
      if (a.spread) {
        if (a.padding_h % 2 == 0) return go(ToeplitzSpread<7, 0>{});
        return go(ToeplitzSpread<7, 1>{});
      }
      if (columns > kMaxBandColumns) {
        if (a.fan_in > 1) return go(Toeplitz<1, 1, 4, true, Columns::kMany>{});
        return go(Toeplitz<1, 1, 7, false, Columns::kMany>{});
      }
      if (a.stride_h == 1) {
        switch (rows) {
          case 1: return choose_rows<1, 1>(a, go);
          case 2: return choose_rows<2, 1>(a, go);
          case 3: return choose_rows<3, 1>(a, go);
          case 4: return choose_rows<4, 1>(a, go);
          case 5: return choose_rows<5, 1>(a, go);
          case 6: return choose_rows<6, 1>(a, go);
          case 7: return choose_rows<7, 1>(a, go);
          case 9: return choose_rows<9, 1>(a, go);
          case 11: return choose_rows<11, 1>(a, go);
          default: break;
        }
      } else {
        switch (rows) {
          case 3: return choose_rows<3, 2>(a, go);
          case 5: return choose_rows<5, 2>(a, go);
          case 7: return choose_rows<7, 2>(a, go);
          default: break;
        }
      }
      throw std::runtime_error("dwconv: no tile of toeplitz_nchw is compiled for this kernel");
    }
  });
}

}  // namespace dwconv
