// grad_weight (and the bias gradient) of small kernels in 16 bits at stride 1, on tensor cores, as sums over images:
// the products of batch_grad_weight_nchw.cu where rows are of whole units of 16 bytes.
//
// Rows come in chunks of 7, of 16 images each, and flow through a ring that one warp fills. A tile of the gradient is 8
// columns of a chunk; it meets the chunk of the input that lies there and those below, which the tile below finds
// there, too: so every row is loaded once. What is above and below an image becomes zeros when it is loaded, and lanes
// whose columns are beside it read zeros all the way down: there is nothing to mask or to decide. A tile of 3x3 takes
// 18 loads of matrices and 35 multiplications, some 130 instructions in all.
//
// Where both arrays begin at the same other place in 16 bytes, columns are counted from the multiple before: the first
// 8 of a row then begin with the end of the row above, which has a row's last columns for them on its left, as memory
// has it. A warp has these 8 of all rows and no others, and so sums of products of two different rows are sums of their
// own, which are left out at the end. Nothing is moved or masked, but for what is beside a plane in its first and last
// 16 bytes.
//
// Where the arrays begin at different places, rows are loaded with what is around them within 16 bytes, and the warps
// that multiply move them to where they would lie otherwise. Rows of 49 to 63 columns are laid apart in the same way.
//
// Other rows need not be known, where both arrays are of the same size: a plane is cut in rows of the next multiple of
// 8 columns instead. A tap is as many of these rows away, and the nearer to the first row of the kernel, the more
// columns to one side: diagonals lie elsewhere in each row's products. Beside an image the next row's end or beginning
// is met then. One more warp has products of these alone, so few that CUDA cores do, and they are subtracted.
//
// A warp takes every so many columns of tiles. All bands of tiles of all filters are one run, of which blocks have
// equal parts, all of them at once: where a filter or a part ends, diagonals are summed up and written as a partial
// sum.
#include "aligned_grad_weight_nchw.h"

#include <algorithm>
#include <cstdlib>

#include "batch_grad_weight_nchw.h"
#include "copies.cuh"
#include "image_sums.cuh"
#include "overlap.cuh"
#include "shifted_runs.cuh"
#include "stream.cuh"
#include "turn.cuh"

namespace dwconv {
namespace {

constexpr int kRows = 7, kColumns = 8;  // of a tile
constexpr int kMaxRows = 9;             // of kernels of more than one column
constexpr int kPitch = kColumns + 1;    // of a product that is summed up, in floats

// How rows come to lie where they are multiplied: as they are copied, by bulk copies; or with what is around them,
// where they begin elsewhere within 16 bytes, in the same place of both arrays; or moved there; or laid apart, too; or
// planes are cut in other rows.
enum class Way { kPlain, kKept, kMoved, kLaid, kCut };

// Units of what is around rows, in shared memory: before them, and in all.
template <Way kWay>
constexpr int kUnitsBefore = kWay == Way::kKept || kWay == Way::kCut ? 1 : 0;
template <Way kWay>
constexpr int kUnitsAround = kUnitsBefore<kWay> + (kWay == Way::kPlain ? 0 : 1);

// Planes of one array, and how a stage of the ring has some of their rows: of 16 images, one behind the other.
struct Rows {
  const char* base;
  int64_t image_bytes;
  int height, row_bytes;  // the latter in shared memory
  int memory;             // where the first stage has them
  int pitch;              // between images: an odd number of units, so that rows of matrices are in different banks
  int stored_bytes;       // of a row
  int plane_bytes, planes;
  int shift;    // bytes before the array in the 16 that it begins in
  bool joined;  // what is beside an image are its neighbours

  __host__ __device__ int bytes() const { return kImages * pitch; }

  template <Way kWay>
  __device__ const char* at(int image, int plane, int row) const {
    return base + image * image_bytes +
           (int64_t{plane} * height + row) * (kWay == Way::kLaid ? stored_bytes : row_bytes);
  }

  // Whether rows have to be laid apart.
  __host__ __device__ bool spreads() const { return stored_bytes != row_bytes; }
  // Bytes before a row in the 16 that it begins in.
  __device__ int lead(int plane, int row) const {
    return (shift + (plane * height + row) * stored_bytes) & (kUnit - 1);
  }

  // Of `count` rows from `row` on: the first one inside the plane, how many are, and where in a stage their bytes are.
  struct Inside {
    int first, rows, head, bytes;
  };
  __device__ Inside inside(int row, int count) const {
    const int first = min(max(row, 0), height), rows = max(min(row + count, height) - first, 0);
    return {first, rows, (first - row) * row_bytes, rows * row_bytes};
  }

  // Of these rows, where planes are cut, with the 16 bytes before and behind: which bytes are the plane's.
  struct Part {
    int begin, end;
  };
  __device__ Part part(int row, int count) const {
    if (row > height) return {};
    const int begin = max(row * row_bytes - kUnit, 0), end = min((row + count) * row_bytes + kUnit, plane_bytes);
    return {begin, max(begin, end)};
  }

  // Warps load rows of 16 images from `row` on, and make zero what is outside. A barrier expects their bytes. `bulk`:
  // by bulk copies, where there are other ways.
  template <Way kWay>
  __device__ void load(int stage, int image, int images, int plane, int row, int count, int barrier, bool bulk,
                       int loader, int loaders) const {
    constexpr int kBefore = kUnitsBefore<kWay> * kUnit;
    const int to = memory + stage * bytes() + kBefore, there = min(images - image, kImages);
    const auto [first, rows, head, size] = inside(row, count);
    const int all = count * row_bytes, lane = threadIdx.x % 32, mine = lane % kImages;
    // Bytes to be loaded behind the rows' own, for those before. Where rows are kept the end of the last one is the
    // beginning of one more.
    int behind = kWay == Way::kKept ? kUnit : 0;
    const bool any = rows > 0 || (kWay == Way::kKept && row == height);
    if (kWay == Way::kPlain) {
      if (rows > 0 && is_elected()) {
        expect_bytes(barrier, there * size);
        const char* from = at<kWay>(image, plane, first);
        uint32_t place = shared_address(to + head);
        const auto copy = [&] {
          copy_bulk(place, from, size, barrier);
          place += pitch, from += image_bytes;
        };
        if (there == kImages) {
#pragma unroll  // addresses in uniform registers, as copies take them
          for (int i = 0; i < kImages; ++i) copy();
        } else {
#pragma unroll 1
          for (int i = 0; i < there; ++i) copy();
        }
      }
      __syncwarp();
    } else if constexpr (kWay == Way::kCut) {
      const auto [begin, end] = part(row, count);
      const int from = begin - row * row_bytes, behind = from + end - begin;  // in the stage
      if (begin < end)
        load_images(base + image * image_bytes + int64_t{plane} * plane_bytes + begin, image_bytes, there, to + from,
                    pitch, 0, end - begin, barrier, bulk, loader, loaders);
      __syncwarp();
      if (loader > 0 || (there == kImages && end - begin == all + 2 * kUnit)) return;
      const bool is_there = begin < end && mine < there;
      for (int i = lane / kImages * kUnit - kUnit; i < all + kUnit; i += 2 * kUnit)
        if (!is_there || i < from || i >= behind) shared<uint4>(to + mine * pitch + i) = uint4{};
      before_bulk_copies();
      return;
    } else if (any) {
      behind = shift > 0 || spreads() ? kUnit : 0;
      // Nothing outside the array is touched.
      const bool is_first = plane == 0 && first == 0 && (image == 0 || !joined);
      const bool is_last = plane == planes - 1 && first + rows == height && (image + there == images || !joined);
      const int above = kWay == Way::kKept && first > 0 ? kUnit : 0;
      const int before = (kWay == Way::kLaid ? lead(plane, first) : shift) + above;
      const int stored = before + (kWay == Way::kLaid ? rows * stored_bytes : size);
      load_images(at<kWay>(image, plane, first) - before, image_bytes, there, to + head - above, pitch,
                  is_first ? shift : 0, is_last ? stored : (stored + kUnit - 1) / kUnit * kUnit, barrier, bulk, loader,
                  loaders);
      __syncwarp();
    }
    const bool top = kWay == Way::kKept && first == 0;
    if (loader > 0 || (rows == count && there == kImages && !top)) return;
    const auto clear = [&](int begin, int end) {
      for (int i = begin + lane / kImages * kUnit; i < end; i += 2 * kUnit)
        shared<uint4>(to + mine * pitch + i) = uint4{};
    };
    const bool is_there = any && mine < there;
    if (!is_there || top || kWay != Way::kKept) clear(-kBefore, is_there ? head : all + behind);
    if (is_there) clear(head + size + behind, kWay == Way::kKept ? all + kUnit : all);
    before_bulk_copies();
  }

  // Whether the plane's first or last 16 bytes are among those of rows that are kept.
  __device__ bool has_ends(int row, int count) const {
    return count > 0 && row <= height && row + count >= 0 && (row <= 0 || row + count >= height);
  }
  // A warp makes zero what is beside the plane there.
  __device__ void clear_ends(int stage, int row, int count) const {
    const auto [first, rows, head, size] = inside(row, count);
    const int lane = threadIdx.x % 32;
    const bool last = lane >= kImages;
    if (last ? first + rows == height : first == 0)
      keep_part(memory + stage * bytes() + lane % kImages * pitch + kUnit + head + (last ? size : 0), shift, last);
    before_bulk_copies();  // to the same place
  }

  // What has to be moved of rows that were loaded with what is around them.
  __device__ ShiftedRuns shifted(int stage, int row, int count) const {
    const auto [first, rows, head, size] = inside(row, count);
    return {memory + stage * bytes() + head, pitch, shift > 0 && !spreads() ? size : 0, shift,
            head + size < count * row_bytes};
  }
  __device__ TightRows tight(int stage, int plane, int row, int count) const {
    const auto [first, rows, head, size] = inside(row, count);
    return {memory + stage * bytes() + head, pitch, spreads() ? rows : 0, row_bytes, stored_bytes, lead(plane, first),
            head + size < count * row_bytes};
  }
};

// What stages are waited for with. Zeros lie before.
struct StageBarriers {
  static constexpr int kStages = 8;  // at most
  static __device__ int full(int stage) { return 128 + 8 * stage; }
  static __device__ int done(int stage) { return 128 + 8 * (kStages + stage); }
};
static_assert(kZeros + kUnit <= 128 && 128 + 16 * StageBarriers::kStages <= kHead);

struct Aligned : ImageSums {
  Rows source, grad;
  int columns, workers;          // of tiles, and warps that share them
  int stages, grad_stages;       // that there is room for, of the input and of the gradient
  int scratch_at, sums_at;       // of each warp: a product, and the taps' sums
  int least, more, all;          // bands of a block: the first ones have one more; of all blocks
  int filter_bands, parts;       // bands of a filter, and parts that they are summed up in, at most
  Divider by_bands, by_batches;  // of an image, of 16 images each
  int loaders;                   // warps
  bool bulk, moves;              // copies; whether rows are moved
  bool ends_with_band;           // whether rows of the gradient are whole bands
  int more_columns;              // where planes are cut, of a row than the image has

  __device__ int last_band() const { return static_cast<int>(by_bands.divisor) - 1; }
  // From a warp's column of tiles to its next one. Where rows are kept the first one is a warp's own; where planes are
  // cut, the last warp has none.
  template <Way kWay>
  __device__ int columns_apart(int warp) const {
    if (kWay == Way::kCut) return workers - 1;
    return kWay != Way::kKept ? workers : warp == 0 ? columns : workers - 1;
  }
  // Where rows are kept, with a column of tiles: whether number k of its 8 gradients and number m of 24 pixels of the
  // input, from 8 before them on, are of the same row of an image.
  __device__ bool same_row(int column, int m, int k) const {
    const int tail = source.shift / 2, x = (column - 1) * kColumns + m - tail;
    return column == 0 && k < tail ? x < 0 : x >= 0 && x < width;
  }
};

// Bands of a filter and of 16 images, one below the other: 7 rows of the gradient each.
struct Stretch {
  int filter, image;
  int begin, end;

  // From band `at` of all on, up to `last`.
  __device__ Stretch(const Aligned& a, int at, int last) {
    uint32_t left = at;
    begin = a.by_bands.split(left), end = min(static_cast<int>(a.by_bands.divisor), begin + last - at);
    image = a.by_batches.split(left) * kImages;
    filter = left;
  }
  __device__ int bands() const { return end - begin; }
};

// Where a block's bands begin, and which block has a band.
__device__ inline int first_band(const Aligned& a, int block) {
  return min(block * a.least + min(block, a.more), a.all);
}
__device__ inline int block_of_band(const Aligned& a, int at) {
  const int longer = a.more * (a.least + 1);
  return at < longer ? at / (a.least + 1) : a.more + (at - longer) / a.least;
}

// The sum of one tap over a warp's tiles of some bands, of products inside the image only.
template <typename T, Way kWay>
__device__ __noinline__ float sum_by_products(const Aligned& a, int filter, int warp, int first, int last, int tap) {
  const int i = a.row_of(tap), j = a.column_of(tap);
  constexpr bool kCut = kWay == Way::kCut;
  float sum = 0;
  for (int at = first; at < last; ++at) {
    const Stretch band(a, at, at + 1);
    // Where rows are kept, the first columns of the last band may have a row more.
    const int rows = kWay == Way::kKept && band.begin == a.last_band() ? kRows + 1 : kRows;
    for (int c = warp; c < a.columns; c += a.columns_apart<kWay>(warp))
      for (int e = threadIdx.x % 32; e < kImages * rows * kColumns; e += 32) {
        const int n = band.image + e / (rows * kColumns);
        int r = band.begin * kRows + e / kColumns % rows, v = c * kColumns + e % kColumns;
        if (kWay == Way::kKept) {
          v -= a.source.shift / 2;
          if (v < 0) v += a.width, --r;
        }
        if (kCut) {
          const int pixel = r * (a.grad.row_bytes / 2) + v;
          r = pixel / a.width, v = pixel % a.width;
        }
        const int y = r + i, x = v + j;
        if (n >= a.images || r < 0 || r >= a.out_height || v >= a.out_width || y < 0 || y >= a.height || x < 0 ||
            x >= a.width)
          continue;
        const auto* from = reinterpret_cast<const T*>(a.source.base + n * a.source.image_bytes);
        const auto* grad = reinterpret_cast<const T*>(a.grad.base + n * a.grad.image_bytes);
        sum = fmaf(widen(from[(filter / a.multiplier * a.height + y) * a.width + x]),
                   widen(grad[(filter * a.out_height + r) * a.out_width + v]), sum);
      }
  }
  return sum_of_lanes(sum);
}

// Of the threads that multiply.
__device__ inline void meet_workers(const Aligned& a) {
  meet<1>(32 * a.workers);
}

// A tile of the gradient: a matrix of 16 images and 8 columns for each row.
struct Tile {
  uint32_t row[kRows + 1][2];

  // `from`: where the lane's first row of matrices begins.
  __device__ Tile(const Aligned& a, uint32_t from) {
#pragma unroll
    for (int r = 0; r < kRows - 1; r += 2) {
      uint32_t both[4];
      load_matrices_transposed(both, from + r * a.grad.row_bytes);
#pragma unroll
      for (int e = 0; e < 4; ++e) row[r + e / 2][e % 2] = both[e];
    }
    load_two_transposed(row[kRows - 1][0], row[kRows - 1][1], from + (kRows - 1) * a.grad.row_bytes);
  }
};

// Where a lane reads columns of the input: those beside the image from zeros, which have but one row; or, where rows
// are kept, as they lie.
struct Lane {
  uint32_t from, mask;

  // `image`: where the image begins in the first slot. Columns: 8 each.
  __device__ Lane(const Aligned& a, uint32_t image, int column, Way way) {
    const bool inside = way == Way::kKept || way == Way::kCut || (column >= 0 && column * kColumns < a.width);
    from = inside ? image + column * kUnit : shared_address(kZeros), mask = inside ? ~0u : 0;
  }
};

// What a warp sums up, for kernels of up to kKernelH rows that are kDilation rows from each other. A product is of 8
// columns of the gradient and 24 of the input: the same ones, and 8 on either side of them. Those on the right are
// multiplied for two rows at once, the upper one in front.
template <typename T, int kKernelH, int kDilation>
struct Sums {
  static constexpr int kMost = kRows - 1 + (kKernelH - 1) * kDilation;  // the last row that a tile meets
  static constexpr int kBelow = kMost / kRows;                          // chunks below that it meets
  static constexpr bool kLays =
      kKernelH == 5 || kKernelH == 7 || kDilation == 2;  // faster than others from rows of other sizes
  static constexpr bool kCuts = kKernelH == 3;
  static constexpr int kWarps = kKernelH < 5 ? 8 : 7;  // of a block that multiply, at most
  static constexpr int kWindow = 3 * kColumns;
  static constexpr int kScratch = 4 * kWindow * kPitch;  // bytes for the products of a row of the kernel
  static constexpr int kStep = kDilation;

  float sum[kKernelH][4] = {}, right[kKernelH + 1][4] = {};  // the latter of rows i - 1 and i of the kernel

  // Adds a tile. `image`: where the lane's image begins in the first slot. `slots`: of the chunks, from there.
  template <Way kWay>
  __device__ void add(const Aligned& a, uint32_t image, int column, const uint32_t (&slots)[kBelow + 1],
                      const Tile& grad) {
    const int half = threadIdx.x / 8 % 2;
    const Lane near(a, image, column - 1 + half, kWay), beside(a, image, column + 1, kWay);
    const uint32_t near_row = a.source.row_bytes & near.mask, beside_row = a.source.row_bytes & beside.mask;
    uint32_t near_from[kBelow + 1], beside_from[kBelow + 1];
#pragma unroll
    for (int i = 0; i <= kBelow; ++i) {
      near_from[i] = near.from + (slots[i] & near.mask);
      beside_from[i] = beside.from + (slots[i] & beside.mask) + half * kDilation * beside_row;
    }
#pragma unroll
    for (int y = 0; y <= kMost; ++y) {
      uint32_t x[4];
      load_matrices_transposed(x, near_from[y / kRows] + y % kRows * near_row);
#pragma unroll
      for (int i = 0; i < kKernelH; ++i) {
        const int r = y - i * kDilation;
        if (r >= 0 && r < kRows) multiply(sum[i], sum[i], x, grad.row[r], T{});
      }
      if (y / kDilation % 2 != 0) continue;
      const int lower = y + kDilation;
      uint32_t row = beside_from[y / kRows] + y % kRows * beside_row;
      if (lower / kRows != y / kRows && half == 1)
        row = beside_from[lower / kRows < kBelow ? lower / kRows : kBelow] + (lower % kRows - kDilation) * beside_row;
      load_matrices_transposed(x, row);
#pragma unroll
      for (int i = 0; i <= kKernelH; ++i) {
        const int r = lower - i * kDilation;
        if (r >= 0 && r < kRows) multiply(right[i], right[i], x, grad.row[r], T{});
      }
    }
  }

  // Adds what the first column has of the row below a tile, where rows are kept: the end of a plane's last row.
  __device__ void add_end(const Aligned& a, uint32_t image, const uint32_t (&slots)[kBelow + 1],
                          const uint32_t (&grad)[2]) {
    const uint32_t from = image + (static_cast<int>(threadIdx.x / 8 % 2) - 1) * kUnit;
#pragma unroll
    for (int i = 0; i < kKernelH; ++i) {
      const int y = kRows + i * kDilation, chunk = y / kRows < kBelow ? y / kRows : kBelow;
      uint32_t x[4];
      load_matrices_transposed(x, from + slots[chunk] + (y - chunk * kRows) * a.source.row_bytes);
      multiply(sum[i], sum[i], x, grad, T{});
    }
  }

  // Puts the taps' sums, those of diagonals, to shared memory, and begins anew. `column`: the warp's first one.
  template <Way kWay>
  __device__ void put(const Aligned& a, int column, int scratch, int sums) {
    const int lane = threadIdx.x % 32, step = a.dilation_h / kDilation;  // from a row of the kernel to the next one
    const int to = scratch + 4 * (lane / 4 * kPitch + lane % 4 * 2);
    const int first = kColumns - a.padding_w + lane * a.dilation_w;
    uint32_t valid = 0;  // a bit for each product of a diagonal
    if (kWay == Way::kKept)
      for (int k = 0; k < kColumns; ++k) valid |= (a.same_row(column, first + k, k) ? 1 : 0) << k;
#pragma unroll
    for (int i = 0; i < kKernelH; ++i) {
#pragma unroll
      for (int e = 0; e < 6; ++e)
        shared<float>(to + 4 * (e / 2 * kColumns * kPitch + e % 2)) =
            e < 4 ? sum[i][e] : right[i + 1][e % 2] + right[i][2 + e % 2];
      __syncwarp();
      if (i % step == 0 && i / step < a.kernel_h && lane < a.kernel_w) {
        const int aside = kWay == Way::kCut ? a.more_columns * (i * kDilation - a.padding_h) : 0;
        const int from = scratch + 4 * (first - aside) * kPitch;
        float total = 0;
#pragma unroll
        for (int k = 0; k < kColumns; ++k)
          if (kWay != Way::kKept || valid >> k & 1) total += shared<float>(from + 4 * k * (kPitch + 1));
        shared<float>(sums + 4 * (i / step * a.kernel_w + lane)) = total;
      }
      __syncwarp();
    }
    *this = {};
  }
};

// The same for kernels of one column: a product is of two rows of the input, the upper one in front.
template <typename T, int kKernelH>
struct ColumnSums {
  static constexpr int kMost = kRows - 1 + kKernelH - 1, kBelow = kMost / kRows, kWarps = 7, kScratch = 0;
  static constexpr int kStep = 1;
  static constexpr bool kLays = false, kCuts = false;

  float sum[kKernelH + 1][4] = {};  // of upper rows that are one row above to kKernelH - 1 rows below the gradient's

  template <Way kWay>
  __device__ void add(const Aligned& a, uint32_t image, int column, const uint32_t (&slots)[kBelow + 1],
                      const Tile& grad) {
    const int half = threadIdx.x / 8 % 2;
    const Lane lane(a, image, column, kWay);
    const uint32_t row_bytes = a.source.row_bytes & lane.mask;
    uint32_t from[kBelow + 1];
#pragma unroll
    for (int i = 0; i <= kBelow; ++i) from[i] = lane.from + (slots[i] & lane.mask);
#pragma unroll
    for (int y = 0; y <= kMost; y += 2) {
      uint32_t x[4];
      load_matrices_transposed(
          x, half == 0 ? from[y / kRows] + y % kRows * row_bytes : from[(y + 1) / kRows] + (y + 1) % kRows * row_bytes);
#pragma unroll
      for (int i = 0; i <= kKernelH; ++i) {
        const int r = y + 1 - i;
        if (r >= 0 && r < kRows) multiply(sum[i], sum[i], x, grad.row[r], T{});
      }
    }
  }

  __device__ void add_end(const Aligned& a, uint32_t image, const uint32_t (&slots)[kBelow + 1],
                          const uint32_t (&grad)[2]) {
    const int half = threadIdx.x / 8 % 2;
    const auto row = [&](int y) {
      const int chunk = y / kRows < kBelow ? y / kRows : kBelow;
      return image + slots[chunk] + (y - chunk * kRows) * a.source.row_bytes;
    };
#pragma unroll
    for (int i = 0; i <= kKernelH; i += 2) {
      const int y = kRows - 1 + i;
      uint32_t x[4];
      load_matrices_transposed(x, half == 0 ? row(y) : row(y + 1));
      multiply(sum[i], sum[i], x, grad, T{});
    }
  }

  template <Way>
  __device__ void put(const Aligned& a, int, int, int sums) {
    const int lane = threadIdx.x % 32, first = lane % 4 * 2;
    const auto diagonal = [&](const float* pair) {
      return lane / 4 == first ? pair[0] : lane / 4 == first + 1 ? pair[1] : 0;
    };
#pragma unroll
    for (int i = 0; i < kKernelH; ++i) {
      const float total = sum_of_lanes(diagonal(sum[i + 1]) + diagonal(sum[i] + 2));
      if (lane == 0 && i % a.dilation_h == 0 && i / a.dilation_h < a.kernel_h)
        shared<float>(sums + 4 * (i / a.dilation_h)) = total;
    }
    __syncwarp();
    *this = {};
  }
};

// Where planes are cut: products of pixels on either side of where a row of the image ends, which are no taps', for
// kernels of 3x3 over the middle of a tile. Lanes have an image each, and every other row.
template <typename T, int kDilation>
struct Edges {
  static constexpr int kKernel = 3;
  static constexpr int kMostRows = 4;  // that end in a band of rows of at most 4 columns more, of at least 48
  float sum[kKernel][2] = {};          // of pixels to the left of the gradient's, and to the right

  // Adds those of a band's gradients. `image`, `grad`: where the lane's image begins in the first slots.
  __device__ void add(const Aligned& a, int band, int image, const uint32_t (&slots)[2], int grad) {
    const int columns = a.grad.row_bytes / 2, all = kRows * columns, first = band * all;
#pragma unroll
    for (int e = -kDilation; e < kDilation; ++e) {  // gradients, from where a row begins
      const int side = e < 0, aside = side ? kDilation : -kDilation;
      const int rows = (first - e + a.width - 1) / a.width + static_cast<int>(threadIdx.x) % 32 / kImages;
#pragma unroll  // so that loads do not wait for each other
      for (int k = 0; k < kMostRows; ++k) {
        const int at = (rows + 2 * k) * a.width + e - first;
        const bool is_there = at < all;
        const float g = widen(shared<T>(is_there ? grad + 2 * at : kZeros));
#pragma unroll
        for (int i = 0; i < kKernel; ++i) {
          const int pixel = at + aside + kDilation * (columns + (i - 1) * a.width);
          const int from = pixel < all ? static_cast<int>(slots[0]) : static_cast<int>(slots[1]) - 2 * all;
          const float x = widen(shared<T>(is_there ? image + from + 2 * pixel : kZeros));
          sum[i][side] = fmaf(x, g, sum[i][side]);
        }
      }
    }
  }

  // Puts what is to be added to the taps' sums to shared memory, and begins anew.
  __device__ void put(int sums) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < kKernel; ++i)
#pragma unroll
      for (int side = 0; side < 2; ++side) {
        const float total = sum_of_lanes(sum[i][side]);
        if (lane == 0) shared<float>(sums + 4 * (i * kKernel + 2 * side)) = -total;
        if (lane == 0 && side == 0) shared<float>(sums + 4 * (i * kKernel + 1)) = 0;
      }
    __syncwarp();
    *this = {};
  }
};

// The bias gradient's part.
template <typename T>
struct Bias {
  float sum[4] = {};

  __device__ void add(const uint32_t (&row)[2]) { add_to_bias(sum, row, T{}); }
  __device__ void add(const Tile& grad) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) add(grad.row[r]);
  }

  __device__ void put(int place) {
    const float total = total_of_bias(sum[0], sum[1]);
    if (threadIdx.x % 32 == 0) shared<float>(place) = total;
    *this = {};
  }
};

// Takes sums that are not finite again; where planes are cut, those of all warps, as what is subtracted is of all.
template <typename T, Way kWay>
__device__ void correct(const Aligned& a, int sums, int filter, int warp, int first, int last) {
  const int lane = threadIdx.x % 32, taps = a.taps();
  const bool cut = kWay == Way::kCut;
  if (cut) meet_workers(a);
  for (int begin = 0; begin < taps; begin += 32) {
    bool finite = true;
    if (begin + lane < taps)
      for (int w = cut ? 0 : warp; w < (cut ? a.workers : warp + 1); ++w)
        finite &= is_finite(shared<float>(sums + 4 * ((w - warp) * a.slots() + begin + lane)));
    uint32_t again = __ballot_sync(~0u, !finite);
    if (cut) meet_workers(a);
    for (; again; again &= again - 1) {
      const int tap = begin + __ffs(again) - 1;
      const bool has_none = cut && warp + 1 == a.workers;
      const float exact = has_none ? 0 : sum_by_products<T, kWay>(a, filter, warp, first, last, tap);
      if (lane == 0) shared<float>(sums + 4 * tap) = exact;
    }
  }
}

// Writes a filter's sums over the block's bands up to `at`, and zeros for parts that there are not.
template <typename T>
__device__ void write(const Aligned& a, int filter, int at) {
  const int slots = a.slots();
  const int begin = filter * a.filter_bands, end = begin + a.filter_bands;
  const int part = blockIdx.x - block_of_band(a, begin), parts = at == end ? a.parts : part + 1;
  for (int slot = threadIdx.x; slot < slots; slot += 32 * a.workers) {
    float total = 0;
    for (int w = 0; w < a.workers; ++w) total += shared<float>(a.sums_at + 4 * (w * slots + slot));
    for (int p = part; p < parts; ++p) a.result.put<T>(filter, p, slot, p == part ? total : 0.f);
  }
}

// What a warp that loads does: with a stage of the input comes the gradient's that meets it last, since until then
// nobody has a use for it. kAlone: it is the only one, and asks for nothing that others do.
template <class Sum, Way kWay, bool kAlone>
__device__ void load_stages(const Aligned& a, int first, int last, int warp) {
  const int loader = kAlone ? 0 : warp - a.workers, loaders = kAlone ? 1 : a.loaders;
  Turn turn, grad_turn;
  bool again = false;  // whether all stages have been filled
  for (int at = first; at < last;) {
    const Stretch s(a, at, last);
    const int end = (s.end - 1) * kRows + Sum::kMost + 1;  // of the rows that tiles meet, with those above the image
    for (int chunk = s.begin; chunk < s.end + Sum::kBelow; ++chunk) {
      const int full = StageBarriers::full(turn.stage), row = chunk * kRows, band = chunk - Sum::kBelow;
      if (again) wait(StageBarriers::done(turn.stage), turn.parity ^ 1);
      a.source.load<kWay>(turn.stage, s.image, a.images, s.filter / a.multiplier, row - a.padding_h,
                          min(kRows, end - row), full, a.bulk, loader, loaders);
      if (band >= s.begin) {
        a.grad.load<kWay>(grad_turn.stage, s.image, a.images, s.filter, band * kRows, kRows, full, a.bulk, loader,
                          loaders);
        grad_turn.next(a.grad_stages);
      }
      if (kWay != Way::kPlain && !a.bulk) arrive_after_copies(full);
      arrive_together(full, threadIdx.x % 32 == 0);
      turn.next(a.stages);
      again |= turn.stage == 0;
    }
    at += s.bands();
  }
}

// Warps that may load besides the one: as many as cost no registers, of which each quarter of a multiprocessor has
// those of 4 or 5 warps.
template <class Sum>
constexpr int kMoreLoaders = Sum::kWarps == 8 ? 1 : 0;

template <typename T, class Sum, Way kWay>
__global__ void __launch_bounds__(32 * (Sum::kWarps + kMoreLoaders<Sum> + 1), 2)
    aligned_grad_weight_nchw(const __grid_constant__ Aligned a) {
#if __CUDA_ARCH__ < 800
  if constexpr (sizeof(T) == 2) return;  // it is not launched
#elif __CUDA_ARCH__ < 900
  if constexpr (kWay == Way::kPlain) return;
#endif
  const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0), lane = threadIdx.x % 32;
  if (threadIdx.x == 0) {
    for (int i = 0; i < a.stages; ++i)
      init_barrier(StageBarriers::full(i), a.loaders * ((kWay == Way::kPlain || a.bulk ? 0 : 32) + kWarpArrivals)),
          init_barrier(StageBarriers::done(i), a.workers * kWarpArrivals);
    before_bulk_copies();
  }
  if (threadIdx.x < kUnit / 4) shared<uint32_t>(kZeros + 4 * threadIdx.x) = 0;
  let_next_kernel_start();
  wait_for_kernel_before();
  __syncthreads();
  const int first = first_band(a, blockIdx.x), last = first_band(a, blockIdx.x + 1);
  if (warp >= a.workers) {
    if constexpr (kWay != Way::kLaid)  // which has no registers to spare
      if (kWay == Way::kPlain || a.loaders == 1) return load_stages<Sum, kWay, true>(a, first, last, warp);
    return load_stages<Sum, kWay, false>(a, first, last, warp);
  }

  Sum sums;
  Bias<T> bias;
  Edges<T, Sum::kStep> edges;
  const bool has_edges = kWay == Way::kCut && warp + 1 == a.workers;
  const int taps_and_bias = a.slots();
  const int place = a.sums_at + 4 * warp * taps_and_bias;
  // Where the lane's rows of matrices begin.
  constexpr int kBefore = kUnitsBefore<kWay> * kUnit;
  const uint32_t source = shared_address(a.source.memory + kBefore) + (lane % 8 + lane / 16 * 8) * a.source.pitch;
  const uint32_t grad =
      shared_address(a.grad.memory + kBefore) + lane % 16 * a.grad.pitch + lane / 16 * a.grad.row_bytes;
  const int columns_apart = a.columns_apart<kWay>(warp);
  Turn turn, grad_turn, oldest;
  int begin = first;  // of what is being summed up
  for (int at = first; at < last;) {
    const Stretch s(a, at, last);
    int held = 0;  // stages that are there
    const auto give_back = [&] {
      arrive_together(StageBarriers::done(oldest.stage), lane == 0);
      oldest.next(a.stages), --held;
    };
    uint32_t source_at[Sum::kBelow + 1];  // the chunks that a tile meets
    for (int chunk = s.begin; chunk < s.end + Sum::kBelow; ++chunk) {
      wait(StageBarriers::full(turn.stage), turn.parity);
      const int band = chunk - Sum::kBelow;  // of the tiles that may be added then
      if (kWay == Way::kKept || kWay == Way::kLaid || (kWay == Way::kMoved && a.moves)) {
        const int row = chunk * kRows - a.padding_h;
        const int rows = min(kRows, (s.end - 1) * kRows + Sum::kMost + 1 - chunk * kRows);
        const int grad_row = band * kRows, grad_rows = band < s.begin ? 0 : kRows;
        if constexpr (kWay == Way::kKept) {
          if (a.source.has_ends(row, rows) || a.grad.has_ends(grad_row, grad_rows)) {
            if (warp == 0 && a.source.has_ends(row, rows)) a.source.clear_ends(turn.stage, row, rows);
            if (warp == 1 && a.grad.has_ends(grad_row, grad_rows))
              a.grad.clear_ends(grad_turn.stage, grad_row, grad_rows);
            meet_workers(a);
          }
        } else {
          if constexpr (kWay == Way::kLaid)
            spread_rows(a.source.tight(turn.stage, s.filter / a.multiplier, row, rows),
                        a.grad.tight(grad_turn.stage, s.filter, grad_row, grad_rows), threadIdx.x, 32 * a.workers,
                        [&] { meet_workers(a); });
          move_runs(a.source.shifted(turn.stage, row, rows), warp, a.workers);
          move_runs(a.grad.shifted(grad_turn.stage, grad_row, grad_rows), a.workers - 1 - warp, a.workers);
          meet_workers(a);
        }
      }
      source_at[Sum::kBelow] = turn.stage * a.source.bytes();
      turn.next(a.stages), ++held;
      if (band >= s.begin) {
        const uint32_t grad_at = grad_turn.stage * a.grad.bytes();
        if constexpr (kWay == Way::kCut)
          if (has_edges) {
            const int image = lane % kImages;
            edges.add(a, band, a.source.memory + kBefore + image * a.source.pitch, source_at,
                      a.grad.memory + kBefore + image * a.grad.pitch + static_cast<int>(grad_at));
          }
        for (int c = has_edges ? a.columns : warp; c < a.columns; c += columns_apart) {
          const Tile tile(a, grad + grad_at + c * kUnit);
          if (a.result.with_bias()) bias.add(tile);
          sums.template add<kWay>(a, source, c, source_at, tile);
        }
        if constexpr (kWay == Way::kKept)
          if (warp == 0 && a.ends_with_band && band == a.last_band()) {
            uint32_t end[2];
            load_two_transposed(end[0], end[1], grad + grad_at + kRows * a.grad.row_bytes);
            if (a.result.with_bias()) bias.add(end);
            sums.add_end(a, source, source_at, end);
          }
        grad_turn.next(a.grad_stages);
        give_back();
      }
#pragma unroll
      for (int i = 0; i < Sum::kBelow; ++i) source_at[i] = source_at[i + 1];
    }
    while (held > 0) give_back();
    at += s.bands();
    if (at < last && at < (s.filter + 1) * a.filter_bands) continue;
    if (has_edges)
      edges.put(place);
    else
      sums.template put<kWay>(a, warp, a.scratch_at + warp * Sum::kScratch, place);
    correct<T, kWay>(a, place, s.filter, warp, begin, at);
    if (a.result.with_bias()) bias.put(place + 4 * (taps_and_bias - 1));
    meet_workers(a);
    write<T>(a, s.filter, at);
    meet_workers(a);
    begin = at;
  }
}

// How a block's shared memory is laid out. Returns its bytes.
template <class Sum, Way kWay>
int64_t lay_out(Aligned& a, int64_t taps_and_bias, int64_t shared_per_multiprocessor) {
  const int64_t columns = a.grad.row_bytes / kUnit, turns = ceil_div(columns, Sum::kWarps);
  const int64_t workers = kWay == Way::kKept  ? ceil_div(columns - 1, turns) + 1
                          : kWay == Way::kCut ? ceil_div(columns, turns) + 1
                                              : ceil_div(columns, turns);
  a.columns = static_cast<int>(columns), a.workers = static_cast<int>(workers);
  // One begins bulk copies, while another one may wait for what is beside whole units at both ends of an array; where
  // there are none, several together do what one does not do fast enough.
  const int most = std::min(std::max(Sum::kWarps + kMoreLoaders<Sum> + 1 - a.workers, 1), kMostLoaders);
  a.loaders = !a.bulk ? most : kWay == Way::kKept ? std::min(most, 2) : 1;
  for (Rows* v : {&a.source, &a.grad}) v->pitch = (kRows * v->row_bytes / kUnit + kUnitsAround<kWay> | 1) * kUnit;
  const auto bytes = [&](int stages) {
    a.stages = stages, a.grad_stages = stages - Sum::kBelow;
    a.source.memory = kHead, a.grad.memory = kHead + a.stages * a.source.bytes();
    a.scratch_at = a.grad.memory + a.grad_stages * a.grad.bytes();
    a.sums_at = static_cast<int>(a.scratch_at + workers * Sum::kScratch);
    return a.sums_at + 4 * workers * taps_and_bias;
  };
  // As many stages as leave room for another block, if any do; at least one to load beside those that a tile meets.
  constexpr int kLeast = Sum::kBelow + 2;
  const auto fits = [&](int stages, int blocks) {
    return blocks * (bytes(stages) + 1024) <= shared_per_multiprocessor;
  };
  const int blocks = fits(kLeast, 2) ? 2 : 1;
  int stages = StageBarriers::kStages;
  while (stages > kLeast && !fits(stages, blocks)) --stages;
  return bytes(stages);
}

template <typename T, class Sum, Way kWay>
bool launch(const Problem& p, Aligned a, const Device& device, const Allocate& allocate, cudaStream_t stream) {
  const auto kernel = aligned_grad_weight_nchw<T, Sum, kWay>;
  const int64_t slots = p.taps() + (p.bias != nullptr);
  const int64_t bytes = lay_out<Sum, kWay>(a, slots, device.shared_per_multiprocessor);
  if (bytes > device.shared_per_block) return false;
  if (kWay == Way::kKept) {
    // Warps that have several columns are to multiply nothing of two rows that a tap's sum would have.
    const int own = a.source.shift / 2;  // of a row's columns that are with the next one's
    const bool apart = a.padding_w <= kColumns - own && (a.kernel_w - 1) * a.dilation_w - a.padding_w <= own;
    if (a.workers > Sum::kWarps || (a.columns > a.workers && !apart)) return false;
  }
  // Rows that are laid apart are read before any is written, by a thread each.
  if (kWay == Way::kLaid && 32 * a.workers < kImages * kRows) return false;
  const int64_t bands = ceil_div(a.grad.height, kRows), items = ceil_div(a.images, kImages);
  a.by_bands = Divider(bands), a.by_batches = Divider(items);
  a.filter_bands = static_cast<int>(items * bands);
  const int64_t all = p.filters() * a.filter_bands;
  if (all >= int64_t{1} << 30) return false;
  const int threads = 32 * (a.workers + a.loaders);
  static thread_local Decisions<3, int> decisions;
  const int resident = decisions({device.id, threads, bytes}, [&] {
    cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, device.shared_per_block);
    int blocks = 0;
    cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, threads, bytes);
    return std::max(blocks, 1) * device.multiprocessors;
  });
  // As many blocks as run at once, or so many times more that no sum is so long that it loses digits.
  constexpr int64_t kLongest = 64;  // bands
  int64_t blocks = std::min(all, resident * ceil_div(all, resident * kLongest));
  a.least = static_cast<int>(all / blocks), a.more = static_cast<int>(all % blocks), a.all = static_cast<int>(all);
  // Parts that end with an image cost a few bands, but save loads and sums.
  const int64_t whole = round_up(ceil_div(all, blocks), bands);
  if (16 * whole * blocks <= 17 * all) a.least = static_cast<int>(whole), a.more = 0, blocks = ceil_div(all, whole);
  a.parts = static_cast<int>(a.more == 0 && a.least % a.filter_bands == 0 ? 1
                             : a.more == 0 && a.filter_bands % a.least == 0
                                 ? a.filter_bands / a.least
                                 : std::min(ceil_div(a.filter_bands - 1, a.least) + 1, int64_t{a.filter_bands}));
  a.result = weight_sums(p, a.parts, allocate);
  launch_early(kernel, a, blocks, threads, stream, {.shared_bytes = bytes});
  check_launch("aligned_grad_weight_nchw");
  launch_add_partial_sums(p, a.result, a.parts, stream);
  return true;
}

// Cuts planes in rows of whole units, of about as many columns as the image's, where they begin with 16 bytes. Says
// whether windows reach 8 columns beside a tile then, at most.
bool cut_rows(Aligned& a) {
  constexpr int kKernel = 3;
  const auto lies_so = [&](const Rows& v) { return v.shift == 0 && v.plane_bytes % kUnit == 0; };
  const bool is_middle = a.kernel_h == kKernel && a.kernel_w == kKernel && a.padding_h == a.dilation_h &&
                         a.padding_w == a.dilation_w && a.dilation_h == a.dilation_w;
  if (!is_middle || a.grad.height != a.source.height || a.width != a.out_width || !lies_so(a.source) ||
      !lies_so(a.grad))
    return false;
  const int columns = (a.width + kColumns / 2) / kColumns * kColumns;
  a.more_columns = columns - a.width;
  for (Rows* v : {&a.source, &a.grad}) {
    v->stored_bytes = v->row_bytes = 2 * columns;
    v->height = static_cast<int>(ceil_div(v->plane_bytes, v->row_bytes));
  }
  return a.padding_w + std::abs(a.more_columns) * a.padding_h <= kColumns;
}

}  // namespace

bool launch_aligned_grad_weight_nchw(const Problem& p, bool bulk, const Allocate& allocate, cudaStream_t stream) {
  const Device& device = current_device();
  const int64_t rows = (p.kernel_h - 1) * p.dilation_h + 1, columns = (p.kernel_w - 1) * p.dilation_w + 1;
  // Windows reach 8 columns beside a tile, at most.
  const bool tall = rows > kMaxRows;
  if (device.capability < 80 || p.stride_h > 1 || p.padding_w > kColumns || columns - 1 - p.padding_w > kColumns ||
      (tall && (columns > 1 || rows > kMaxColumnRows)))
    return false;
  // Shorter rows: copies of so few bytes that one thread does not begin them fast enough. All images are to begin at
  // the same place within 16 bytes.
  if (std::min(p.width, p.out_width) < kLeastAlignedColumns || p.input.stride[0] % kColumns != 0 ||
      p.output.stride[0] % kColumns != 0)
    return false;
  constexpr int64_t kMostTightColumns = 64;  // of rows that are not of whole units
  const auto is_tight = [](int64_t width) { return width % kColumns == 0 || width <= kMostTightColumns; };
  const bool tight = is_tight(p.width) && is_tight(p.out_width);
  Aligned a{};
  a.take(p);
  const auto arrange = [](Rows& v, const View& view, int64_t planes, int64_t height, int64_t width) {
    v.base = static_cast<const char*>(view.data), v.image_bytes = 2 * view.stride[0];
    v.height = static_cast<int>(height), v.planes = static_cast<int>(planes);
    v.stored_bytes = static_cast<int>(2 * width), v.row_bytes = static_cast<int>(round_up(2 * width, kUnit));
    v.plane_bytes = static_cast<int>(height * width * 2);
    v.shift = static_cast<int>(reinterpret_cast<uintptr_t>(view.data) % kUnit);
    v.joined = view.stride[0] == planes * height * width;
  };
  arrange(a.source, p.input, p.channels, p.height, p.width);
  arrange(a.grad, p.output, p.filters(), p.out_height, p.out_width);
  a.ends_with_band = p.out_height % kRows == 0;
  bool served = false;
  visit_dtype(p.dtype, [&](auto zero) {
    using T = decltype(zero);
    if constexpr (sizeof(T) == 2) {
      const auto go = [&]<class Sum>(Sum) {
        a.bulk = bulk && can_overlap(aligned_grad_weight_nchw<T, Sum, Way::kPlain>);  // else it is not code for sm_90
        const auto go_by = [&]<Way kWay>() { served = launch<T, Sum, kWay>(p, a, device, allocate, stream); };
        if constexpr (Sum::kCuts)
          if (a.source.spreads() || a.grad.spreads()) {
            const Aligned whole = a;
            if (cut_rows(a)) go_by.template operator()<Way::kCut>();
            if (served) return;
            a = whole;
          }
        if (!tight) return;
        if constexpr (Sum::kLays)
          if (a.source.spreads() || a.grad.spreads()) return go_by.template operator()<Way::kLaid>();
        if (a.source.spreads() || a.grad.spreads()) return;
        a.moves = a.source.shift > 0 || a.grad.shift > 0;
        if (a.bulk && !a.moves) return go_by.template operator()<Way::kPlain>();
        if (a.moves && a.source.shift == a.grad.shift && a.width == a.out_width)
          go_by.template operator()<Way::kKept>();
        if (!served) go_by.template operator()<Way::kMoved>();
      };
      if (tall) return go(ColumnSums<T, kMaxColumnRows>{});
      if (p.dilation_h == 2 && p.kernel_h <= 3) return go(Sums<T, 3, 2>{});
      if (rows <= 3) return go(Sums<T, 3, 1>{});
      if (rows <= 5) return go(Sums<T, 5, 1>{});
      if (rows <= 7) return go(Sums<T, 7, 1>{});
      go(Sums<T, kMaxRows, 1>{});
    }
  });
  return served;
}

}  // namespace dwconv
