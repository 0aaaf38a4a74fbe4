// grad_weight of square kernels at stride 1 in 16 bits on contiguous planes, streamed (stream_grad_weight_nchw.cuh), on
// tensor cores.
//
// Rows are what is summed over: with A[k][m] = input[y + i + k][x + m] and B[k][n] = gradient[y + k][x + n], the
// product of A transposed and B has, for row i of the kernel, the sums for its columns m - n on the diagonals. A
// multiplication takes 2 rows from each of 4 tiles, and 8 of their columns twice. A warp walks down 4 tiles of 16
// columns at once; a pair of input rows serves every row of the kernel.
#include <cstdlib>

#include "launch.h"
#include "stream_grad_weight_nchw.cuh"
#include "tensor_cores.cuh"

namespace dwconv {
namespace {

__device__ inline uint32_t ones(__half) {
  return 0x3c003c00u;
}
__device__ inline uint32_t ones(__nv_bfloat16) {
  return 0x3f803f80u;
}

// Where rows of the input begin: all of them at an even place, so that pixels are read in pairs, or at any; or at an
// even one and at an odd one in turns, in a tile around which no ring wraps.
enum class Begin { kEven, kAny, kEvenOdd, kOddEven };

template <int kKernel, int kTileRows>
struct Toeplitz : AnyPart<kKernel> {
  static constexpr int kRows = kTileRows, kColumns = 16, kTiles = 4, kLanes = 32;
  static constexpr bool kOddStrips = false, kPieces = true;
  static constexpr int kKernelH = kKernel, kKernelW = kKernel;
  static constexpr int kMaxThreads = 224, kBlocks = 2;

  float sum[kKernel][4] = {}, bias[4] = {};
  bool fit;   // all rows of the input begin at an even place, or all at an odd one;
  int shift;  // then windows begin `shift` columns earlier, so that pixels are read in pairs

  __device__ explicit Toeplitz(const GradStream& a)
      : fit(a.width % 2 == 0), shift(fit ? (a.source.ring.phase / 2 + a.padding_w) & 1 : 0) {}

  // A thread has columns m = 2 g and 2 g + 1 of the window, and columns n = 2 t and 2 t + 1 of the gradient.
  static constexpr int kProducts = 4, kDiagonal = 8;
  __device__ float product(int i, int e) const { return sum[i][e]; }
  __device__ int begin(int j) const { return j + shift; }
  static __device__ int product_of(int m, int n) { return (m % 2 * 2 + n % 2) * 32 + m / 2 * 4 + n / 2; }
  __device__ float total_bias() const { return threadIdx.x % 32 < 4 ? bias[0] + bias[1] : 0.f; }

  // The warp's 4 tiles, as far as they are the thread's.
  int tile = -1;
  int row, rows, column, source_column;
  uint32_t source_mask[2], grad_mask[2];  // of the pixels inside the image, of the gradients that are added
  uint32_t inside;                        // a bit for each row that is inside the image, or the chunk's part of it

  __device__ void place(const GradStream& a, const GradChunk& c, int channel, int tile) {
    this->tile = tile;
    const int lane = threadIdx.x % 32;
    uint32_t segment = tile + lane % 4;
    const int strip = a.by_strips.split(segment);
    row = segment * kRows, rows = min(kRows, c.rows - row);
    // The last strip overlaps the others. It begins at an even column, too.
    column = max(min(strip * kColumns, (a.out_width - kColumns + 1) & ~1), 0);
    source_column = column - a.padding_w - shift + lane / 4 * 2;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const auto is_inside = [&](int x) { return static_cast<uint32_t>(x) < static_cast<uint32_t>(a.width); };
      const int x = source_column + 8 * h, v = column + lane / 4 + 8 * h;
      source_mask[h] = (is_inside(x) ? 0xffffu : 0) | (is_inside(x + 1) ? 0xffff0000u : 0);
      grad_mask[h] = v >= strip * kColumns && v < a.out_width ? ~0u : 0;
    }
    column += lane / 4;
    const int plane = c.source_plane + channel * a.height, y = c.row + row - a.padding_h;
    const int begin = max(-y, 0), end = min(min(a.height, c.source.end - plane) - y, 32);
    inside = rows > 0 && end > begin ? ~0u >> (32 - end) & ~0u << begin : 0;
  }

  template <typename T>
  __device__ void add(const GradStream& a, const GradChunk& c, int filter, int first_tile) {
    uint32_t quotient = filter;
    a.by_multiplier.split(quotient);
    const int channel = quotient;
    if (tile != first_tile || a.bands > 1) place(a, c, channel, first_tile);
    if (fit) return add_placed<T, Begin::kEven>(a, c, channel, filter);
    const auto is_straight = [](const RowRing& ring, const ImageRows& rows) {
      return rows.slot + rows.end - rows.begin <= ring.capacity;
    };
    if (!is_straight(a.source.ring, c.source) || !is_straight(a.grad.ring, c.grad))
      return add_placed<T, Begin::kAny>(a, c, channel, filter);
    // The same for all tiles, as they have an even number of rows.
    if ((source_row(a, c, channel) * a.source.ring.row_bytes + a.source.ring.at(0) + 2 * source_column) & 2)
      add_placed<T, Begin::kOddEven>(a, c, channel, filter);
    else
      add_placed<T, Begin::kEvenOdd>(a, c, channel, filter);
  }

  // The slot of the first row of the input, where no wrap is.
  __device__ int source_row(const GradStream& a, const GradChunk& c, int channel) const {
    const int first = c.source_plane + channel * a.height + c.row + row - a.padding_h;
    return c.source.slot + first - c.source.begin;
  }

  template <typename T, Begin kBegin>
  __device__ void add_placed(const GradStream& a, const GradChunk& c, int channel, int filter) {
    constexpr int kSourceRows = kRows + kKernel - 1;
    constexpr bool kInTurns = kBegin == Begin::kEvenOdd || kBegin == Begin::kOddEven;
    const RowRing &xs = a.source.ring, &gs = a.grad.ring;
    const int first = source_row(a, c, channel),
              first_grad = c.grad.slot + (a.single ? 0 : filter * a.out_height) + row;
    const uint32_t source_bytes = xs.capacity * xs.row_bytes, grad_bytes = gs.capacity * gs.row_bytes;
    const int source_origin = xs.at(0) + 2 * source_column, grad_origin = gs.at(0) + 2 * column;
    uint32_t source = (inside ? xs.wrap(first) : 0) * xs.row_bytes,
             grad = (rows > 0 ? gs.wrap(first_grad) : 0) * gs.row_bytes;
    if (kInTurns) source = first * xs.row_bytes + source_origin, grad = first_grad * gs.row_bytes + grad_origin;

    const auto load_source = [&](int r, uint32_t (&x)[2]) {
      if constexpr (kInTurns) {
        const int odd = (r + (kBegin == Begin::kOddEven)) % 2, from = inside >> r & 1 ? source : kZeros + 2 * odd;
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const int at = from + 16 * h;
          x[h] =
              (odd ? __byte_perm(shared<uint32_t>(at - 2), shared<uint32_t>(at + 2), 0x5432) : shared<uint32_t>(at)) &
              source_mask[h];
        }
        source += xs.row_bytes;
        return;
      }
      const int from = (inside >> r & 1 ? static_cast<int>(source) : kZeros - source_origin) + source_origin;
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        if (kBegin == Begin::kEven) {
          x[h] = shared<uint32_t>(from + 16 * h) & source_mask[h];
        } else {
          const int at = (from & ~3) + 16 * h;
          x[h] = __funnelshift_r(shared<uint32_t>(at), shared<uint32_t>(at + 4), (from & 2) * 8) & source_mask[h];
        }
      }
      source += xs.row_bytes;
      source = min(source, source - source_bytes);
    };
    const auto load_grad = [&](int r, uint32_t (&g)[2]) {
      const int origin = kInTurns ? 0 : grad_origin;
      const int from = (r < rows ? static_cast<int>(grad) : kZeros - origin) + origin;
#pragma unroll
      for (int h = 0; h < 2; ++h) g[h] = shared<uint16_t>(from + 16 * h);
      grad += gs.row_bytes;
      if (kInTurns) return;
      grad = min(grad, grad - grad_bytes);
    };

    // Of the next two rows.
    const auto load_grads = [&](int r, uint32_t (&g)[2]) {
      uint32_t upper[2], lower[2];
      load_grad(r, upper);
      load_grad(r + 1, lower);
#pragma unroll
      for (int h = 0; h < 2; ++h) g[h] = __byte_perm(upper[h], lower[h], 0x5410) & grad_mask[h];
    };

    const uint32_t first_row = grad;
    uint32_t pairs[kSourceRows - 1][4];  // of rows r and r + 1, at the thread's columns; 7 or less are alive
    uint32_t above[2];
    load_source(0, above);
#pragma unroll
    for (int r = 0; r + 1 < kSourceRows; ++r) {
      uint32_t below[2];
      load_source(r + 1, below);
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        pairs[r][2 * h] = __byte_perm(above[h], below[h], 0x5410);
        pairs[r][2 * h + 1] = __byte_perm(above[h], below[h], 0x7632);
        above[h] = below[h];
      }
      const int o = r - (kKernel - 1);  // the gradient row that the window's rows up to r + 1 suffice for, and the next
      if (o < 0 || o % 2 != 0) continue;
      uint32_t g[2];
      load_grads(o, g);
#pragma unroll
      for (int i = 0; i < kKernel; ++i) multiply(sum[i], sum[i], pairs[o + i], g, T{});
    }
    if (!a.with_bias) return;
    grad = first_row;
#pragma unroll 1
    for (int r = 0; r < kRows; r += 2) {
      uint32_t g[2];
      load_grads(r, g);
      multiply(bias, bias, {ones(T{}), ones(T{}), ones(T{}), ones(T{})}, g, T{});
    }
  }
};

// Long rows that begin with 16 bytes fall into 16 segments, which are what is summed over: with A[k][m] = input[y + i]
// [column m - 8 of segment k] and B[k][n] = gradient[y][column n of segment k], the product of A transposed and B has
// the sums for row i of the kernel on its diagonals, here of 8 columns n of the gradient and 24 columns m of the input.
// Matrices of 8 segments and 8 columns are loaded at once. A segment is an odd number of 16 bytes, so that their rows
// are in different banks. The 8 columns on the right are multiplied for two rows at once.
//
// kShifted: rows begin elsewhere in 16 bytes, at the same place in both arrays, and columns are counted from these 16
// bytes on. So a row has 16 bytes more, and shares its first and its last ones with the rows above and below: where a
// matrix has these they are read from copies, in which what is not the row's is zero. Of the last ones, where segments
// do not reach them, rows are what is summed over.
//
// kMoved: rows that begin anywhere are moved first.
//
// kCut: planes are cut in other rows (cut_planes), so that 16 bytes beside a row are those of its neighbours. Products
// of a row of the kernel are `more_columns` further aside than those of the row before; for the first and the last row
// of large ones 8 columns beside the 24 are met, which are multiplied together.
enum class Rows { kPlain, kShifted, kMoved, kCut };

constexpr int kEndReach = 4;  // pixels before and behind the end of an image's row

template <int kKernel, Rows kRowsLie>
struct Segments : AnyPart<kKernel> {
  static constexpr bool kShifted = kRowsLie == Rows::kShifted;
  static constexpr bool kMoves = kRowsLie == Rows::kMoved, kCuts = kRowsLie == Rows::kCut, kFar = kCuts && kKernel > 3;
  static constexpr int kRows = 7, kColumns = 128, kTiles = 1, kLanes = 32;
  static constexpr bool kOddStrips = true, kTurns = kShifted;
  static constexpr int kKernelH = kKernel, kKernelW = kKernel, kReach = kKernel / 2;
  static constexpr int kMaxThreads = 480, kBlocks = 1;
  static constexpr int kSourceRows = kRows - 1 + kKernel;
  static constexpr int kEnds = kSourceRows + kRows;  // of the input's rows and the gradient's that a tile meets
  static constexpr int kScratch = kShifted ? 2 * kEnds * kUnit : 0;

  float sum[kKernel][4] = {}, bias[4] = {};
  float right[kKernel + 1][4] = {};  // of rows i - 1 and i of the kernel
  float far[4] = {};   // of the columns on the left of all these and the row of the kernel far_row(0), and on the right
  float edge[4] = {};  // of pixels and gradients around the ends of rows, of a row of the kernel
  const int padding, more_columns;

  __device__ explicit Segments(const GradStream& a) : padding(a.padding_w), more_columns(a.more_columns) {}

  __device__ int far_row(int half) const { return (more_columns > 0) == (half > 0) ? 0 : kKernel - 1; }

  // A thread has columns m = g, g + 8 and g + 16 of the input, and columns n = 2 t and 2 t + 1 of the gradient.
  __device__ float total(int i, int j) const {
    const int lane = threadIdx.x % 32, middle = lane / 4 - lane % 4 * 2 - 8 + padding;
    const int aside = kCuts ? j - more_columns * (i - kReach) : j;
    float total = 0;
#pragma unroll
    for (int e = 0; e < 6; ++e) {
      const float product = e < 4 ? sum[i][e] : right[i + 1][e % 2] + right[i][2 + e % 2];
      total = middle + e / 2 * 8 - e % 2 == aside ? total + product : total;
    }
    if constexpr (kFar)
#pragma unroll
      for (int e = 0; e < 4; ++e)
        total = far_row(e / 2) == i && middle + (e / 2 * 4 - 1) * 8 - e % 2 == aside ? total + far[e] : total;
    if constexpr (kCuts) {
      const int pixel = lane / 4 - kEndReach, first = lane % 4 * 2 - kEndReach;
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const bool is_its = threadIdx.x / 32 == i && pixel - first - e == j - kReach && (pixel < 0) != (first + e < 0);
        total = is_its ? total - edge[e] : total;
      }
    }
    return total;
  }

  // Products of a gradient and a pixel on either side of where a row of the image ends, for a row of the kernel by a
  // warp: these ends, 4 pixels before each and 4 behind, are what is summed over. Pixels follow each other in a ring as
  // they do in memory.
  template <typename T>
  __device__ void add_edges(const GradStream& a, const GradChunk& c) {
    const int i = static_cast<int>(threadIdx.x) / 32, lane = threadIdx.x % 32;
    if (i >= kKernel) return;
    const RowRing &xs = a.source.ring, &gs = a.grad.ring;
    const auto first_of = [&](int row) { return row * a.width - a.lead; };
    const int grad_first = first_of(c.row), grad_begin = max(grad_first, 0);
    const int grad_end = min(first_of(c.row + c.rows), a.plane_pixels);
    const int source_first = first_of(c.source.begin - c.source_plane), source_begin = max(source_first, 0);
    const int source_end = min(first_of(c.source.end - c.source_plane), a.plane_pixels);
    const auto pixel = [](const RowRing& ring, int slot, int place, int begin, int at, int end) {
      const uint32_t bytes = ring.capacity * ring.row_bytes;
      uint32_t from = slot * ring.row_bytes + 2 * (at - place);
      from = min(from, from - bytes);
      return shared<uint16_t>(at >= begin && at < end ? ring.memory + static_cast<int>(from) : kZeros);
    };
    uint32_t row = grad_begin + a.image_width - kEndReach;
    a.by_image_width.split(row);
    constexpr int kEndsAtOnce = 8;
    for (int first = row; first * a.image_width - kEndReach < grad_end; first += kEndsAtOnce) {
      uint32_t x[2], g[2];
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int at = (first + lane % 4 * 2 + h) * a.image_width + lane / 4 - kEndReach;
        g[h] = pixel(gs, c.grad.slot, grad_first, grad_begin, at, grad_end);
        x[h] = pixel(xs, c.source.slot, source_first, source_begin, at + (i - kReach) * a.image_width, source_end);
      }
      multiply(edge, edge, {__byte_perm(x[0], x[1], 0x5410), 0}, __byte_perm(g[0], g[1], 0x5410), T{});
    }
  }
  __device__ float total_bias() const { return threadIdx.x % 32 < 4 ? bias[0] + bias[1] : 0.f; }

  // A lane's walk down rows of 16 bytes: those of a ring, or their copies.
  struct Walk {
    uint32_t from, at, row_bytes;
    uint32_t ring_bytes;

    __device__ Walk(const RowRing& ring, int slot, int unit)
        : from(shared_address(ring.memory) + unit * kUnit),
          at(slot * ring.row_bytes),
          row_bytes(ring.row_bytes),
          ring_bytes(ring.capacity * ring.row_bytes) {}
    __device__ void take_copies(uint32_t first, int row) { from = first, at = row * kUnit, row_bytes = kUnit; }
    __device__ uint32_t here() const { return from + at; }
    __device__ void next(int rows) {
      at += rows * row_bytes;
      at = min(at, at - ring_bytes);
    }
  };

  // Copies of the first 16 bytes of all rows, those of the input in front, and of the last 16 bytes.
  __device__ void copy_ends(const RowRing& xs, const RowRing& gs, int source_slot, int grad_slot, int copies) const {
#pragma unroll
    for (int i = threadIdx.x % 32; i < 2 * kEnds; i += 32) {
      const bool is_last = i >= kEnds;
      const int row = is_last ? i - kEnds : i;
      const bool input = row < kSourceRows;
      const RowRing& ring = input ? xs : gs;
      const int slot = ring.wrap(input ? source_slot + row : grad_slot + row - kSourceRows);
      uint4 unit = shared<uint4>(ring.memory + slot * ring.row_bytes + (is_last ? ring.row_bytes : 0));
      const auto keep = [&](uint32_t& word, int first) {
        const auto is_its = [&](int element) { return (2 * element >= ring.phase) != is_last; };
        word &= (is_its(first) ? 0xffffu : 0) | (is_its(first + 1) ? 0xffff0000u : 0);
      };
      keep(unit.x, 0), keep(unit.y, 2), keep(unit.z, 4), keep(unit.w, 6);
      shared<uint4>(copies + i * kUnit) = unit;
    }
    __syncwarp();
  }

  template <typename T>
  __device__ void add_bias(const uint32_t (&g)[2]) {
    multiply(bias, bias, {ones(T{}), ones(T{}), ones(T{}), ones(T{})}, g, T{});
  }

  // Adds the last 16 bytes of rows: A and B have rows of the gradient, and those of the input that meet them.
  template <typename T>
  __device__ void add_ends(const GradStream& a, int source_slot, int rows, uint32_t inside, uint32_t copies) {
    const RowRing& xs = a.source.ring;
    const int lane = threadIdx.x % 32, row = lane % 8;
    const uint32_t zeros = shared_address(kZeros), before = shared_address(xs.memory) + xs.row_bytes - kUnit;
    copies += kEnds * kUnit;
    uint32_t g[2];
    load_two_transposed(g[0], g[1], lane < rows ? copies + (kSourceRows + lane) * kUnit : zeros);
    if (a.with_bias) add_bias<T>(g);
#pragma unroll
    for (int i = 0; i < kKernel; ++i) {
      uint32_t x[4];
      const uint32_t from =
          lane < 8 ? before + xs.wrap(source_slot + row + i) * xs.row_bytes : copies + (row + i) * kUnit;
      load_matrices_transposed(x, lane < 16 && row < rows && inside >> (row + i) & 1 ? from : zeros);
      multiply(sum[i], sum[i], x, g, T{});
    }
  }

  template <typename T>
  __device__ void add(const GradStream& a, const GradChunk& c, int filter, int tile) {
    const RowRing &xs = a.source.ring, &gs = a.grad.ring;
    const int lane = threadIdx.x % 32, half = lane / 8 % 2;
    uint32_t segment = tile;
    const int strip = static_cast<int>(a.by_strips.split(segment));
    const int row = static_cast<int>(segment) * kRows, rows = min(kRows, c.rows - row);
    if (rows <= 0) return;
    // The 16 bytes where the lane's rows of matrices begin: to the left or those of the tile, those of the tile (of the
    // gradient), and to the right, of two rows. What is beside the image is read from zeros.
    const int own = (lane % 8 + lane / 16 * 8) * a.strips + strip, near = own + half - 1, beside = own + 1;
    const int middle = lane % 16 * a.strips + strip;
    const int source_end = (a.width + 7) / 8 + kShifted, grad_end = (a.out_width + 7) / 8 + kShifted;
    uint32_t channel = filter;
    a.by_multiplier.split(channel);
    const int plane = c.source_plane + static_cast<int>(channel) * a.height, y = c.row + row - a.padding_h;
    // A bit for each row, from some row on, that is inside the plane, or the chunk's part of it.
    const auto inside_from = [&](int y) {
      const int begin = max(-y, 0), end = min(min(a.height, c.source.end - plane) - y, 32);
      return end > begin ? ~0u >> (32 - end) & ~0u << begin : 0;
    };
    const uint32_t zeros = shared_address(kZeros);
    const int grad_slot = gs.wrap(c.grad.slot + (a.single ? 0 : filter * a.out_height) + row);
    const auto slot_of = [&](int y) { return xs.wrap(c.source.slot + plane + y - c.source.begin); };
    const uint32_t inside = inside_from(y);
    uint32_t mine = near >= 0 && (kShifted ? own : near) < source_end ? inside : 0,
             beside_mine = beside < source_end ? inside >> half : 0;
    const int source_slot = inside ? slot_of(y) : 0;
    Walk grad(gs, gs.wrap(grad_slot + lane / 16), middle), source(xs, source_slot, near),
        source_beside(xs, xs.wrap(source_slot + half), beside);
    if constexpr (kCuts) {  // what is beside a row is the end of the row above, and the beginning of the row below
      if (near < 0) mine = inside_from(y - 1), source = Walk(xs, slot_of(y - 1), near + source_end);
      if (beside == source_end)
        beside_mine = inside_from(y + half + 1), source_beside = Walk(xs, slot_of(y + half + 1), 0);
    }
    if constexpr (kShifted) {
      const auto is_end = [&](int unit) { return unit == 0 || unit == source_end - 1; };
      // Where no segment reaches the last 16 bytes of rows, one of the tiles with none of their ends has them, too.
      const bool has_last = source_end > 16 * a.strips && strip == a.strips / 2;
      if (__any_sync(~0u, is_end(near) || is_end(middle) || is_end(beside)) || has_last) {
        const int at = a.scratch_at + static_cast<int>(threadIdx.x) / 32 * kScratch;
        copy_ends(xs, gs, source_slot, grad_slot, at);
        const auto take = [&](Walk& walk, int unit, int row) {
          if (is_end(unit)) walk.take_copies(shared_address(at) + (unit > 0 ? kEnds * kUnit : 0), row);
        };
        take(source, near, 0), take(source_beside, beside, half), take(grad, middle, kSourceRows + lane / 16);
        if (has_last) add_ends<T>(a, source_slot, rows, inside, shared_address(at));
      }
    }

    uint32_t g[kRows + 1][2];
#pragma unroll
    for (int r = 0; r < kRows; r += 2) {
      uint32_t both[4];
      load_matrices_transposed(both, r + lane / 16 < rows && middle < grad_end ? grad.here() : zeros);
      grad.next(2);
#pragma unroll
      for (int e = 0; e < 4; ++e) g[r + e / 2][e % 2] = both[e];
    }
    if (a.with_bias)
#pragma unroll
      for (int r = 0; r < kRows; ++r) add_bias<T>(g[r]);
#pragma unroll
    for (int r = 0; r < kSourceRows; ++r) {
      uint32_t x[4];
      load_matrices_transposed(x, mine >> r & 1 ? source.here() : zeros);
      source.next(1);
#pragma unroll
      for (int i = 0; i < kKernel; ++i)
        if (r >= i && r - i < kRows) multiply(sum[i], sum[i], x, g[r - i], T{});
      if (r % 2 != 0) continue;
      load_matrices_transposed(x, beside_mine >> r & 1 ? source_beside.here() : zeros);
      source_beside.next(2);
#pragma unroll
      for (int i = 0; i <= kKernel; ++i)
        if (r + 1 >= i && r + 1 - i < kRows) multiply(right[i], right[i], x, g[r + 1 - i], T{});
    }
    if (kFar && kReach * (1 + abs(more_columns)) > 8) {
      const int unit = own + half * 4 - 2, over = unit < 0 ? -1 : unit < source_end ? 0 : 1;
      const int first = y + far_row(half) + over, last = unit - over * source_end;
      const uint32_t far_mine = own < source_end ? inside_from(first) : 0;
      Walk walk(xs, far_mine ? slot_of(first) : 0, last);
      uint32_t x[kRows][4];  // all of them, so that multiplications do not wait for each
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        load_matrices_transposed(x[r], far_mine >> r & 1 ? walk.here() : zeros);
        walk.next(1);
      }
#pragma unroll
      for (int r = 0; r < kRows; ++r) multiply(far, far, x[r], g[r], T{});
    }
  }
};

// Tall tiles share more rows, but may not fill a plane, or shared memory.
template <typename T, int kKernel>
void launch_kernel(const Problem& p, const GradStream& a, const Allocate& allocate, cudaStream_t stream) {
  const auto cost = [&](int rows) {
    const int64_t tiles = ceil_div(a.out_height, rows) * ceil_div(a.out_width, 16);
    return ceil_div(tiles, 4) * (60 + 13 * (rows + kKernel - 1) + 13 * rows);
  };
  constexpr int kWide = 256;   // rows of which few fit
  constexpr int kLong = 1024;  // rows that are worth moving
  const RowRing &source = a.source.ring, &grad = a.grad.ring;
  const bool same_size = a.width == a.out_width && a.height == a.out_height;
  const bool begin_with_units = source.phase == 0 && grad.phase == 0;
  if (a.out_width >= kWide && source.row_bytes % kUnit == 0 && grad.row_bytes % kUnit == 0 && begin_with_units)
    return launch<T, Segments<kKernel, Rows::kPlain>>(p, a, allocate, stream);
  const auto images_lie_alike = [&](const Flow& flow) { return a.images == 1 || flow.planes.image_bytes % kUnit == 0; };
  constexpr int64_t kMost = 1 << 28;  // pixels of a plane, which are counted in 32 bits
  const int64_t pixels = p.height * p.width;
  if (a.out_width >= kWide && same_size && a.padding_w == kKernel / 2 && pixels <= kMost && 2 * pixels % kUnit == 0 &&
      source.phase == grad.phase && images_lie_alike(a.source) && images_lie_alike(a.grad)) {
    // How far from a gradient's column, in 8 that begin with 16 bytes, pixels are: in the 8 on either side, or in those
    // beside them for the outermost rows of a kernel.
    GradStream cut = a;
    cut_planes(cut);
    constexpr int kReach = kKernel / 2;
    const int aside = std::abs(cut.more_columns);
    // Each row of the kernel is a warp's. So many warps as there is room for share a band's tiles evenly.
    constexpr int kWarps = 2 * kKernel - 1, kMostLoaders = 64;
    const int threads =
        current_device().shared_per_block / (4 * (kKernel * kKernel + 1)) - kMostLoaders - kMostLanes - 1;
    const bool fill = (cut.width + 127) / 128 >= kKernel && threads >= 32 * kWarps;
    const bool reaches =
        fill && kReach + aside * (kKernel > 3 ? kReach - 1 : kReach) <= 8 && kReach * (1 + aside) <= 16;
    if (reaches && has_room<Segments<kKernel, Rows::kCut>>(cut))
      return launch<T, Segments<kKernel, Rows::kCut>>(p, cut, allocate, stream);
  }
  if (a.out_width >= kWide && source.row_bytes % kUnit == 0 && source.phase == grad.phase && a.width == a.out_width &&
      has_room<Segments<kKernel, Rows::kShifted>>(a))
    return launch<T, Segments<kKernel, Rows::kShifted>>(p, a, allocate, stream);
  if (GradStream moved = a; a.out_width >= (has_room<Toeplitz<kKernel, 4>>(a) ? kLong : kWide)) {
    move(moved.source), move(moved.grad);
    if (has_room<Segments<kKernel, Rows::kMoved>>(moved))
      return launch<T, Segments<kKernel, Rows::kMoved>>(p, moved, allocate, stream);
  }
  if constexpr (kKernel == 3)
    launch_stream_grad_weight_nchw(p, a.bulk, allocate, stream);
  else if (a.out_width > kWide || cost(4) < cost(14))
    launch<T, Toeplitz<kKernel, 4>>(p, a, allocate, stream);
  else
    launch<T, Toeplitz<kKernel, 14>>(p, a, allocate, stream);
}

}  // namespace

void launch_toeplitz_grad_weight_nchw(const Problem& p, bool bulk, const Allocate& allocate, cudaStream_t stream) {
  const GradStream a = grad_stream_of(p, bulk);
  visit_dtype(p.dtype, [&](auto zero) {
    using T = decltype(zero);
    if constexpr (sizeof(T) == 2) {
      if (p.kernel_h == 3) launch_kernel<T, 3>(p, a, allocate, stream);
      if (p.kernel_h == 5) launch_kernel<T, 5>(p, a, allocate, stream);
      if (p.kernel_h == 7) launch_kernel<T, 7>(p, a, allocate, stream);
    }
  });
}

}  // namespace dwconv
