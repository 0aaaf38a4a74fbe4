// grad_weight (and the bias gradient) on contiguous planes, streamed (stream_grad_weight_nchw.cuh), on CUDA cores: a
// thread keeps the sums of all taps in registers. Of small planes a block takes those of a few filters, of all images,
// where that gives every multiprocessor some: then there is nothing to add up behind the kernel.
#include <stdexcept>

#include "boxes.cuh"
#include "launch.h"
#include "small_kernels.h"
#include "shifted_runs.cuh"
#include "stream_grad_weight_nchw.cuh"

namespace dwconv {
namespace {

// A tile of kRows x kColumns gradients: walks down the source rows, reads each once, and multiplies it with the
// gradients whose window it lies in. Needs a padding below the kernel's extent and kColumns output columns. Tiles of 2
// columns are read by pairs, as far as rows and what tiles read of them lie evenly (8 bytes), or oddly as the kernel
// is.
template <class Kernel, int kRows_ = 7, int kColumns_ = 7, bool kStaged = false>
struct Window : AnyPart<Kernel::kKernelW> {
  static constexpr int kKernelH = Kernel::kKernelH, kKernelW = Kernel::kKernelW;
  static constexpr int kStride = Kernel::kStride, kDilation = Kernel::kDilation;
  static constexpr int kRows = kRows_, kColumns = kColumns_, kTiles = 1, kLanes = 1;
  static constexpr bool kOddStrips = false, kPairs = kColumns == 2, kStages = kStaged;
  static constexpr int kMaxThreads = kPairs ? 256 : kKernelH * kKernelW < kManyTaps ? 224 : 128, kBlocks = 2;
  static constexpr bool kInParts = kKernelH * kKernelW < 25;  // long sums lose digits; of more taps there is no room

  float sum[kKernelH][kKernelW] = {};
  double bias = 0;

  __device__ explicit Window(const GradStream&) {}
  __device__ float total(int i, int j) const { return sum[i][j]; }
  __device__ float total_bias() const { return static_cast<float>(bias); }

  template <typename T>
  __device__ void add(const GradStream& a, const GradChunk& c, int filter, int tile) {
    uint32_t segment = tile, channel = filter;
    const int strip = a.by_strips.split(segment);
    a.by_multiplier.split(channel);
    if (static_cast<int>(segment) * kRows >= c.rows) return;
    constexpr int kSize = sizeof(T);
    constexpr int kExtentH = (kKernelH - 1) * kDilation + 1, kExtentW = (kKernelW - 1) * kDilation + 1;
    constexpr int kSourceRows = (kRows - 1) * kStride + kExtentH, kSourceColumns = (kColumns - 1) * kStride + kExtentW;
    const int row = segment * kRows, rows = c.rows - row;
    const int column = min(strip * kColumns, a.out_width - kColumns);  // the last strip overlaps the one before
    const int overlap = strip * kColumns - column;
    const int x0 = column * kStride - a.padding_w;
    const int plane = c.source_plane + static_cast<int>(channel) * a.height;
    const int y0 = plane + (c.row + row) * kStride - a.padding_h;
    const int begin = max(c.source.begin, plane), end = min(c.source.end, plane + a.height);
    RowWalk source(ring_of<kStages>(a.source, c.source), c.source.slot + y0 - c.source.begin);
    RowWalk grad(ring_of<kStages>(a.grad, c.grad), c.grad.slot + (a.single ? 0 : filter * a.out_height) + row);

    float part[kKernelH][kKernelW] = {};
    const auto add = [&](int i, int j, float x, float g) {
      float& total = kInParts ? part[i][j] : sum[i][j];
      total = fmaf(x, g, total);
    };
    float g[kRows][kColumns], bias_part = 0;
#pragma unroll
    for (int r = 0; r < kSourceRows; ++r) {
      if (r % kStride == 0 && r / kStride < kRows) {
        float (&row_g)[kColumns] = g[r / kStride];
        const int from = grad.next();
        const int first = r / kStride < rows ? from + column * kSize : kZeros;
        if constexpr (kPairs)
          read_row_by_pairs<false>(first, row_g);
        else
          read_row<T>(first, row_g);
        if (overlap > 0)
#pragma unroll
          for (int v = 0; v < kColumns - 1; ++v)
            if (v < overlap) row_g[v] = 0;
        if (a.with_bias)
#pragma unroll
          for (int v = 0; v < kColumns; ++v) bias_part += row_g[v];
      }
      float x[kSourceColumns];
      const bool inside = y0 + r >= begin && y0 + r < end;
      constexpr ReadBy kEvenOrOdd = kExtentW / 2 % 2 == 0 ? ReadBy::kEvenPairs : ReadBy::kOddPairs;
      read_next<T, kExtentW - 1, (kColumns - 1) * kStride + 1, kPairs ? kEvenOrOdd : ReadBy::kOne>(source, inside, x0,
                                                                                                   a.width, x);
#pragma unroll
      for (int i = 0; i < kKernelH; ++i) {
        const int reach = r - i * kDilation, o = reach / kStride;
        if (reach < 0 || reach % kStride != 0 || o >= kRows) continue;
#pragma unroll
        for (int v = 0; v < kColumns; ++v)
#pragma unroll
          for (int j = 0; j < kKernelW; ++j) add(i, j, x[v * kStride + j * kDilation], g[o][v]);
      }
    }
    if constexpr (kInParts)
#pragma unroll
      for (int i = 0; i < kKernelH; ++i)
#pragma unroll
        for (int j = 0; j < kKernelW; ++j) sum[i][j] += part[i][j];
    bias += bias_part;
  }
};

// A tile of 8 x 8 gradients in 16 bits, where rows begin with 16 bytes and a kernel is laid over the middle of them: a
// row of the tile is one load, of either array, and the pixels beside it one each.
template <int kKernel>
struct Units : AnyPart<kKernel> {
  static constexpr int kKernelH = kKernel, kKernelW = kKernel, kReach = kKernel / 2;
  static constexpr int kRows = 8, kColumns = kUnit / 2, kTiles = 1, kLanes = 1;
  static constexpr bool kOddStrips = false, kUnits = true;
  static constexpr int kMaxThreads = 224, kBlocks = 2;

  float sum[kKernel][kKernel] = {};
  double bias = 0;

  __device__ explicit Units(const GradStream&) {}
  __device__ float total(int i, int j) const { return sum[i][j]; }
  __device__ float total_bias() const { return static_cast<float>(bias); }

  template <typename T>
  static __device__ void read(int from, float* x) {
    const uint4 unit = shared<uint4>(from);
    widen_pair(unit.x, x[0], x[1], T{}), widen_pair(unit.y, x[2], x[3], T{});
    widen_pair(unit.z, x[4], x[5], T{}), widen_pair(unit.w, x[6], x[7], T{});
  }

  template <typename T>
  __device__ void add(const GradStream& a, const GradChunk& c, int filter, int tile) {
    uint32_t segment = tile, channel = filter;
    const int column = static_cast<int>(a.by_strips.split(segment)) * kColumns;
    a.by_multiplier.split(channel);
    const int row = segment * kRows, rows = c.rows - row;
    if (rows <= 0) return;
    const int plane = c.source_plane + static_cast<int>(channel) * a.height, y0 = plane + c.row + row - kReach;
    const int begin = max(c.source.begin, plane), end = min(c.source.end, plane + a.height);
    RowWalk source(a.source.ring, c.source.slot + y0 - c.source.begin);
    RowWalk grad(a.grad.ring, c.grad.slot + (a.single ? 0 : filter * a.out_height) + row);
    const bool has_left = column > 0, has_right = column + kColumns < a.width;

    float part[kKernel][kKernel] = {}, g[kRows][kColumns], bias_part = 0;
#pragma unroll
    for (int r = 0; r < kRows + kKernel - 1; ++r) {
      if (r < kRows) {
        const int from = grad.next();
        read<T>(r < rows ? from + 2 * column : kZeros, g[r]);
        if (a.with_bias)
#pragma unroll
          for (int v = 0; v < kColumns; ++v) bias_part += g[r][v];
      }
      const int at = source.next(), from = y0 + r >= begin && y0 + r < end ? at + 2 * column : kZeros + kUnit;
      float x[kColumns + 2 * kReach];
      read<T>(from, x + kReach);
#pragma unroll
      for (int j = 0; j < kReach; ++j) {
        x[j] = has_left ? widen(shared<T>(from + 2 * (j - kReach))) : 0;
        x[kReach + kColumns + j] = has_right ? widen(shared<T>(from + kUnit + 2 * j)) : 0;
      }
#pragma unroll
      for (int i = 0; i < kKernel; ++i) {
        if (r < i || r - i >= kRows) continue;
#pragma unroll
        for (int v = 0; v < kColumns; ++v)
#pragma unroll
          for (int j = 0; j < kKernel; ++j) part[i][j] = fmaf(x[v + j], g[r - i][v], part[i][j]);
      }
    }
#pragma unroll
    for (int i = 0; i < kKernel; ++i)
#pragma unroll
      for (int j = 0; j < kKernel; ++j) sum[i][j] += part[i][j];
    bias += bias_part;
  }
};

// A tile of 7 x 14 gradients of 3x3 in 16 bits, wherever rows begin, read by words: 7 of them from one tile to the
// next, so that lanes are in different banks. kEven: all rows of both arrays lie alike within a word, and with them the
// tiles' columns, of which the first one of a row may lie before it; or else words are put together from two.
template <bool kEven>
struct Words : AnyPart<3> {
  static constexpr int kKernel = 3, kKernelH = kKernel, kKernelW = kKernel, kReach = 1;
  static constexpr int kRows = 7, kColumns = 14, kTiles = 1, kLanes = 1;
  static constexpr bool kOddStrips = false, kUnits = true;
  static constexpr int kMaxThreads = 224, kBlocks = 2;
  static constexpr int kWords = kColumns / 2, kSourceWords = kWords + 2;  // of a row; one on each side of the tile

  float sum[kKernel][kKernel] = {};
  double bias = 0;

  __device__ explicit Words(const GradStream&) {}
  __device__ float total(int i, int j) const { return sum[i][j]; }
  __device__ float total_bias() const { return static_cast<float>(bias); }

  // Of a word of which these columns are valid.
  static __device__ uint32_t mask_of(bool low, bool high) { return (low ? 0xffffu : 0) | (high ? 0xffff0000u : 0); }

  template <int kCount>
  static __device__ void read(int from, uint32_t (&words)[kCount]) {
    if constexpr (kEven) {
#pragma unroll
      for (int k = 0; k < kCount; ++k) words[k] = shared<uint32_t>(from + 4 * k);
    } else {
      const int first = from & ~3;
      uint32_t word = shared<uint32_t>(first);
#pragma unroll
      for (int k = 0; k < kCount; ++k) {
        const uint32_t next = shared<uint32_t>(first + 4 * k + 4);
        words[k] = __funnelshift_r(word, next, (from & 2) * 8);
        word = next;
      }
    }
  }

  template <typename T>
  __device__ void add(const GradStream& a, const GradChunk& c, int filter, int tile) {
    uint32_t segment = tile, channel = filter;
    const int strip = static_cast<int>(a.by_strips.split(segment));
    a.by_multiplier.split(channel);
    const int row = segment * kRows, rows = c.rows - row;
    if (rows <= 0) return;
    // The last strip overlaps the one before.
    const int before = kEven ? a.source.ring.phase / 2 % 2 : 0, begin_column = strip * kColumns - before;
    const int column = min(begin_column, a.width - kColumns + before);
    uint32_t grad_mask[kWords];
#pragma unroll
    for (int k = 0; k < kWords; ++k) {
      const auto is_its = [&](int x) { return x >= max(begin_column, 0) && x < a.width; };
      grad_mask[k] = mask_of(is_its(column + 2 * k), is_its(column + 2 * k + 1));
    }
    const auto source_mask = [&](int k) {
      const auto is_inside = [&](int x) { return static_cast<uint32_t>(x) < static_cast<uint32_t>(a.width); };
      return mask_of(is_inside(column - 2 + 2 * k), is_inside(column - 1 + 2 * k));
    };
    const uint32_t left[] = {source_mask(0), source_mask(1)},
                   right[] = {source_mask(kSourceWords - 2), source_mask(kSourceWords - 1)};
    const int plane = c.source_plane + static_cast<int>(channel) * a.height, y0 = plane + c.row + row - kReach;
    const int begin = max(c.source.begin, plane), end = min(c.source.end, plane + a.height);
    RowWalk source(a.source.ring, c.source.slot + y0 - c.source.begin);
    RowWalk grad(a.grad.ring, c.grad.slot + (a.single ? 0 : filter * a.out_height) + row);

    float part[kKernel][kKernel] = {}, g[kRows][kColumns], bias_part = 0;
#pragma unroll
    for (int r = 0; r < kRows + kKernel - 1; ++r) {
      if (r < kRows) {
        uint32_t words[kWords];
        const int from = grad.next();
        read(r < rows ? from + 2 * column : kZeros, words);
#pragma unroll
        for (int k = 0; k < kWords; ++k) widen_pair(words[k] & grad_mask[k], g[r][2 * k], g[r][2 * k + 1], T{});
        if (a.with_bias)
#pragma unroll
          for (int v = 0; v < kColumns; ++v) bias_part += g[r][v];
      }
      uint32_t words[kSourceWords];
      const int at = source.next();
      read(y0 + r >= begin && y0 + r < end ? at + 2 * (column - 2) : kZeros, words);
#pragma unroll
      for (int k = 0; k < 2; ++k) words[k] &= left[k], words[kSourceWords - 2 + k] &= right[k];
      float x[2 * kSourceWords];  // from a column before the first one that is met
#pragma unroll
      for (int k = 0; k < kSourceWords; ++k) widen_pair(words[k], x[2 * k], x[2 * k + 1], T{});
#pragma unroll
      for (int i = 0; i < kKernel; ++i) {
        if (r < i || r - i >= kRows) continue;
#pragma unroll
        for (int v = 0; v < kColumns; ++v)
#pragma unroll
          for (int j = 0; j < kKernel; ++j) part[i][j] = fmaf(x[v + j + 1], g[r - i][v], part[i][j]);
      }
    }
#pragma unroll
    for (int i = 0; i < kKernel; ++i)
#pragma unroll
      for (int j = 0; j < kKernel; ++j) sum[i][j] += part[i][j];
    bias += bias_part;
  }
};

// A tile of 7 x 7 gradients in a corner of a plane of 7 x 7 or 14 x 14 that a kernel is laid over the middle of: what
// lies outside is known at compile time, and is not multiplied. Other corners are mirror images of the upper left one,
// and so are their sums.
template <int kKernel, int kSide>
struct Corner {
  static constexpr int kKernelH = kKernel, kKernelW = kKernel;
  static constexpr int kRows = 7, kColumns = 7, kTiles = 1, kLanes = 1;
  static constexpr bool kOddStrips = false, kWhole = true, kPlane = kSide == 7, kTurns = false;
  static constexpr bool kPieces = false, kUnits = false, kMoves = false, kCuts = false, kStages = false;
  static constexpr int kProducts = 0, kScratch = 0;
  static constexpr int kMaxThreads = kKernel == 7 ? 160 : 224, kBlocks = 2;
  static constexpr int kMostMultiplier = 8;      // shared memory holds the planes of a channel
  static constexpr bool kInParts = kKernel < 5;  // as Window
  static constexpr int kReach = kKernel / 2;
  static constexpr int kSource = kSide == 7 ? 7 : 7 + kReach;  // rows and columns that it reads
  static constexpr bool kMirrors = kSide > 7;
  static constexpr bool kLoop =
      kKernel == 7 && kSide == 14;  // all rows one by one would not fit the instruction caches

  float sum[kKernel][kKernel] = {};
  double bias = 0;
  const bool up, left;  // a thread stays with a filter and a corner

  __device__ explicit Corner(const GradStream&) : Corner() {}
  __device__ Corner() : up(kMirrors && threadIdx.x / 2 % 2 != 0), left(kMirrors && threadIdx.x % 2 != 0) {}
  __device__ int tap(int i, int j) const { return (up ? kKernel - 1 - i : i) * kKernel + (left ? kKernel - 1 - j : j); }
  __device__ float total(int i, int j) const { return sum[i][j]; }
  __device__ float total_bias() const { return static_cast<float>(bias); }

  // The rows of a plane, from the tile's first one on.
  struct Walk {
    int at, begin, ring_bytes, column, row;

    __device__ Walk(const RowRing& ring, int slot, bool up, bool left, int size)
        : begin(ring.at(0) + (left ? (kSide - 1) * size : 0)),
          ring_bytes(ring.capacity * (kSide * size)),
          column(left ? -size : size),
          row(up ? -kSide * size : kSide * size) {
      at = begin + ring.wrap(slot + (up ? kSide - 1 : 0)) * (kSide * size);
    }
    template <typename T, int kCount>
    __device__ void read_next(float (&x)[kCount]) {
#pragma unroll
      for (int j = 0; j < kCount; ++j)
        x[j] = widen(shared<T>(kMirrors ? at + j * column : at + j * static_cast<int>(sizeof(T))));
      at += row;
      if (at >= begin + ring_bytes) at -= ring_bytes;
      if (kMirrors && at < begin) at += ring_bytes;
    }
  };

  template <typename T>
  __device__ void add(const GradStream& a, const GradChunk& c, int filter, int) {
    uint32_t channel = filter;
    a.by_multiplier.split(channel);
    Walk source(a.source.ring, c.source.slot + static_cast<int>(channel) * kSide, up, left, sizeof(T));
    Walk grad(a.grad.ring, c.grad.slot + filter * kSide, up, left, sizeof(T));
    add_plane<T>(source, grad, a.with_bias);
  }

  template <typename T, class Rows>
  __device__ void add_plane(Rows& source, Rows& grad, bool with_bias) {
    float bias_part = 0;
    const auto take = [&](float (&row)[kColumns]) {
      grad.template read_next<T>(row);
      if (with_bias)
#pragma unroll
        for (int v = 0; v < kColumns; ++v) bias_part += row[v];
    };
    if constexpr (kLoop)
      add_in_loop<T>(source, take);
    else
      add_rows<T>(source, take);
    bias += bias_part;
  }

  // What a source row has with a gradient row.
  __device__ static void add_products(const float (&x)[kSource], const float (&g)[kColumns], float (&total)[kKernel]) {
#pragma unroll
    for (int v = 0; v < kColumns; ++v)
#pragma unroll
      for (int j = 0; j < kKernel; ++j) {
        const int s = v + j - kReach;
        if (s >= 0 && s < kSource) total[j] = fmaf(x[s], g[v], total[j]);
      }
  }

  template <typename T, class Rows, typename Take>
  __device__ void add_rows(Rows& source, Take&& take) {
    float part[kKernel][kKernel] = {};
    float g[kRows][kColumns];
#pragma unroll
    for (int r = 0; r < kSource; ++r) {
#pragma unroll
      for (int o = 0; o < kRows; ++o)
        if (o == r + kReach || (r == 0 && o < kReach)) take(g[o]);
      float x[kSource];
      source.template read_next<T>(x);
#pragma unroll
      for (int i = 0; i < kKernel; ++i) {
        const int o = r - i + kReach;
        if (o >= 0 && o < kRows) add_products(x, g[o], kInParts ? part[i] : sum[i]);
      }
    }
    if constexpr (kInParts)
#pragma unroll
      for (int i = 0; i < kKernel; ++i)
#pragma unroll
        for (int j = 0; j < kKernel; ++j) sum[i][j] += part[i][j];
  }

  // Two source rows at a time, r and r + 1, and gradient row r + kReach + 1 - k in g[k].
  template <typename T, class Rows, typename Take>
  __device__ void add_in_loop(Rows& source, Take&& take) {
    static_assert(kSource % 2 == 0 || !kLoop);
    float g[kKernel + 1][kColumns] = {};
#pragma unroll
    for (int o = 0; o < kReach; ++o) take(g[kReach - 1 - o]);
#pragma unroll 1
    for (int r = 0; r < kSource; r += 2) {
#pragma unroll
      for (int k = kKernel; k > 1; --k)
#pragma unroll
        for (int v = 0; v < kColumns; ++v) g[k][v] = g[k - 2][v];
#pragma unroll
      for (int k = 1; k >= 0; --k)
        if (r + kReach + 1 - k < kRows) take(g[k]);
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        float x[kSource];
        source.template read_next<T>(x);
#pragma unroll
        for (int i = 0; i < kKernel; ++i) {
          const int o = r + e - i + kReach;
          if (o >= 0 && o < kRows) add_products(x, g[i + 1 - e], sum[i]);
        }
      }
    }
  }
};

// Planes of an array as runs of bytes, a run for some filters and an image.
struct PlaneRuns {
  const char* base;  // a multiple of 16
  int64_t image_bytes;
  int phase;    // bytes from there to the array
  bool joined;  // what is beside an image are its neighbours
};

struct PlaneGrad {
  CUtensorMap source_map, grad_map;  // the planes of an image as one row, image below image
  PlaneRuns source, grad;            // or runs of them
  float *weight, *bias;
  int images;
  bool bulk;
};

// How a block of `plane_grad_weight` is cut: filters whose planes begin and end with 16 bytes, and images at a time, as
// many as keep the multiprocessor's threads busy. kBoxes: they come as boxes, one behind the other; or else as runs
// with what is around them within 16 bytes, so far apart that all threads of a warp read in different banks.
template <int kSide, bool kBoxes>
struct PlaneCut {
  static constexpr int kCorners = kSide > 7 ? 4 : 1, kPlane = kSide * kSide;
  static constexpr int kFilters = kSide > 7 ? 1 : 4, kImages = kSide > 7 ? 24 : 32, kBlocks = kSide > 7 ? 3 : 2;
  static constexpr int kThreads = kCorners * kFilters * kImages;  // besides the warp that copies
  static constexpr int kRun = kFilters * kPlane * 4, kPitch = kRun + (kBoxes ? 0 : 2 * kUnit);
  static constexpr int kArray = kImages * kPitch, kBytes = kHead + 2 * kDepth * kArray;
  static_assert(kArray % kBoxUnit == 0 && kHead % kBoxUnit == 0 && kPitch / 4 <= kMostBoxSide);
  static_assert(kRun % kUnit == 0);
};

// The rows of a plane in shared memory, one after the other, from any corner.
struct PlaneRows {
  int at, column, row;

  template <typename T, int kCount>
  __device__ void read_next(float (&x)[kCount]) {
#pragma unroll
    for (int j = 0; j < kCount; ++j) x[j] = shared<T>(at + j * column);
    at += row;
  }
};

// A warp begins to load the block's runs of some images to shared memory, and makes zero those of images that there are
// not.
template <class Cut>
__device__ void load_runs(const PlaneRuns& v, int to, int image, int images, bool bulk, int barrier) {
  const int begin = v.phase, end = v.phase + Cut::kRun, lane = threadIdx.x % 32;
  for (int n = 0; n < Cut::kImages; n += kRunImages) {
    const int first = image + n, there = min(max(images - first, 0), min(kRunImages, Cut::kImages - n));
    // Nothing outside the array is touched.
    const bool is_first = blockIdx.x == 0 && (first == 0 || !v.joined);
    const bool is_last = blockIdx.x == gridDim.x - 1 && (first + there == images || !v.joined);
    load_images(v.base + first * v.image_bytes + blockIdx.x * Cut::kRun, v.image_bytes, there, to + n * Cut::kPitch,
                Cut::kPitch, is_first ? begin : 0, is_last ? end : (end + kUnit - 1) / kUnit * kUnit, barrier, bulk);
    __syncwarp();
    for (int at = there * Cut::kPitch + lane * kUnit; at < min(kRunImages, Cut::kImages - n) * Cut::kPitch;
         at += 32 * kUnit)
      shared<uint4>(to + n * Cut::kPitch + at) = uint4{};
  }
  before_bulk_copies();  // of the next images to where zeros are
}

// A thread has a tile of a filter's planes, of some images. All products are of pixels inside the image: sums are Inf
// or NaN where they have to be.
template <int kKernel, int kSide, bool kBoxes>
__global__ void __launch_bounds__(PlaneCut<kSide, kBoxes>::kThreads + 32, PlaneCut<kSide, kBoxes>::kBlocks)
    plane_grad_weight(const __grid_constant__ PlaneGrad a) {
  using Cut = PlaneCut<kSide, kBoxes>;
  constexpr int kTaps = kKernel * kKernel, kThreads = Cut::kThreads;
  const int thread = threadIdx.x;
  if (thread == 0) {
    for (int i = 0; i < kDepth; ++i)
      init_barrier(Barriers::full(i), kBoxes ? 1 : kWarpArrivals + (a.bulk ? 0 : 32)),
          init_barrier(Barriers::done(i), kThreads / 32 * kWarpArrivals);
    before_bulk_copies();
  }
  let_next_kernel_start();
  __syncthreads();
  const int chunks = (a.images + Cut::kImages - 1) / Cut::kImages;
  Corner<kKernel, kSide> sums;
  if (kBoxes ? thread == kThreads : thread >= kThreads) {
    wait_for_kernel_before();
    for (int chunk = 0; chunk < chunks; ++chunk) {
      const int stage = chunk % kDepth, to = kHead + stage * 2 * Cut::kArray, full = Barriers::full(stage);
      const int image = chunk * Cut::kImages;
      if (chunk >= kDepth) wait(Barriers::done(stage), (chunk / kDepth - 1) % 2);
      if constexpr (kBoxes) {
        expect_bytes(full, 2 * Cut::kArray);
        const int column = blockIdx.x * Cut::kFilters * Cut::kPlane;
        copy_box(to, a.source_map, column, image, 0, 0, full);
        copy_box(to + Cut::kArray, a.grad_map, column, image, 0, 0, full);
        arrive(full);
      } else {
        load_runs<Cut>(a.source, to, image, a.images, a.bulk, full);
        load_runs<Cut>(a.grad, to + Cut::kArray, image, a.images, a.bulk, full);
        if (!a.bulk) arrive_after_copies(full);
        arrive_together(full, thread % 32 == 0);
      }
    }
  } else if (thread < kThreads) {
    const int row = kSide * 4, first = ((sums.up ? kSide - 1 : 0) * kSide + (sums.left ? kSide - 1 : 0)) * 4;
    const int column = Cut::kCorners > 1 && sums.left ? -4 : 4, down = sums.up ? -row : row;
    const int warp_image = thread / 32 * 32 / (Cut::kCorners * Cut::kFilters);
    for (int chunk = 0; chunk < chunks; ++chunk) {
      const int stage = chunk % kDepth;
      wait(Barriers::full(stage), chunk / kDepth % 2);
      const int plane = thread / Cut::kCorners;
      const int at = kHead + stage * 2 * Cut::kArray + plane / Cut::kFilters * Cut::kPitch +
                     plane % Cut::kFilters * (Cut::kPlane * 4) + first;
      PlaneRows source{at + (kBoxes ? 0 : a.source.phase), column, down},
          grad{at + Cut::kArray + (kBoxes ? 0 : a.grad.phase), column, down};
      if (chunk * Cut::kImages + warp_image < a.images)  // those behind the last image are zeros
        sums.template add_plane<float>(source, grad, a.bias != nullptr);
      arrive_together(Barriers::done(stage), thread % 32 == 0);
    }
  }
  __syncthreads();

  // The stages have served: their memory takes the sums of all threads, tap by tap, those of all filters side by side.
  constexpr int kPitch = kThreads + Cut::kFilters;
  static_assert((kTaps + 1) * kPitch * 4 <= Cut::kBytes - kHead);
  if (thread < kThreads) {
#pragma unroll
    for (int i = 0; i < kKernel; ++i)
#pragma unroll
      for (int j = 0; j < kKernel; ++j)
        shared<float>(kHead + 4 * (sums.tap(i, j) * kPitch + thread)) = sums.total(i, j);
    shared<float>(kHead + 4 * (kTaps * kPitch + thread)) = sums.total_bias();
  }
  __syncthreads();
  const int slots = kTaps + (a.bias != nullptr);
  for (int i = thread; i < slots * Cut::kFilters; i += blockDim.x) {
    // Where planes have corners a filter's threads are all of the block's.
    const int slot = i / Cut::kFilters, own = i % Cut::kFilters, filter = blockIdx.x * Cut::kFilters + own;
    float part[4] = {};
#pragma unroll 32
    for (int k = 0; k < kThreads / Cut::kFilters; ++k)
      part[k % 4] += shared<float>(kHead + 4 * (slot * kPitch + k * Cut::kFilters + own));
    (slot < kTaps ? a.weight[filter * kTaps + slot] : a.bias[filter]) = part[0] + part[1] + (part[2] + part[3]);
  }
}

template <int kKernel, int kSide, bool kBoxes>
void launch_planes(const Problem& p, bool bulk, cudaStream_t stream) {
  using Cut = PlaneCut<kSide, kBoxes>;
  const auto kernel = plane_grad_weight<kKernel, kSide, kBoxes>;
  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Cut::kBytes);
  PlaneGrad a{};
  a.weight = static_cast<float*>(p.weight.data), a.bias = static_cast<float*>(p.bias);
  a.images = static_cast<int>(p.batch), a.bulk = bulk;
  const auto describe = [&](CUtensorMap& map, PlaneRuns& runs, const View& view) {
    const int64_t bytes = view.stride[0] * 4;
    const auto phase = static_cast<int>(reinterpret_cast<uintptr_t>(view.data) % kUnit);
    runs = {static_cast<const char*>(view.data) - phase, bytes, phase, bytes == p.channels * Cut::kPlane * 4};
    if (kBoxes && !describe_boxes(map, view.data, sizeof(float), {p.channels * Cut::kPlane, p.batch, 1, 1},
                                  {bytes, bytes, bytes}, {Cut::kFilters * Cut::kPlane, Cut::kImages, 1, 1}))
      throw std::runtime_error("dwconv: CUDA cannot describe boxes of planes");
  };
  describe(a.source_map, a.source, p.input), describe(a.grad_map, a.grad, p.output);
  launch_early(kernel, a, p.channels / Cut::kFilters, Cut::kThreads + 32, stream, {.shared_bytes = Cut::kBytes});
  check_launch("plane_grad_weight");
}

// Launches it, unless blocks of so few filters leave multiprocessors idle, or planes do not lie as they have to.
template <int kKernel, int kSide>
bool launch_plane_grad_weight(const Problem& p, bool bulk, cudaStream_t stream) {
  using Cut = PlaneCut<kSide, true>;
  const Device& device = current_device();
  bulk = bulk && device.capability >= 90;
  if (p.multiplier > 1 || p.channels % Cut::kFilters > 0) return false;
  constexpr int64_t kFar = int64_t{1} << 37;
  const auto begins = [](const View& view) { return reinterpret_cast<uintptr_t>(view.data) % kUnit == 0; };
  const auto lies = [&](const View& view) {
    return view.stride[0] > 0 && view.stride[0] * 4 % kUnit == 0 && view.stride[0] < kFar;
  };
  if (p.batch < Cut::kImages || !lies(p.input) || !lies(p.output)) return false;
  // Small planes are bound by bytes: some multiprocessors may be idle.
  constexpr double kBusy = kSide > 7 ? 0.9 : 0.7;
  const int64_t blocks = p.channels / Cut::kFilters, slots = int64_t{Cut::kBlocks} * device.multiprocessors;
  if (static_cast<double>(blocks) < kBusy * static_cast<double>(slots * ceil_div(blocks, slots))) return false;
  if (bulk && begins(p.input) && begins(p.output)) {
    launch_planes<kKernel, kSide, true>(p, bulk, stream);
    return true;
  }
  if constexpr (kSide == 7)  // of larger ones too few blocks find room
    if (device.capability >= 80 && 2 * (PlaneCut<kSide, false>::kBytes + 1024) <= device.shared_per_multiprocessor) {
      launch_planes<kKernel, kSide, false>(p, bulk, stream);
      return true;
    }
  return false;
}

// Whether there are tiles of words for all threads of a GPU, and few of them overlap.
bool fill_words(const GradStream& a) {
  using Tile = Words<false>;
  constexpr double kFew = 1.1;
  const int64_t strips = ceil_div(a.out_width, Tile::kColumns), segments = ceil_div(a.out_height, Tile::kRows);
  return static_cast<double>(strips * Tile::kColumns) <= kFew * a.out_width &&
         a.images * a.filters * strips * segments >=
             int64_t{current_device().multiprocessors} * Tile::kBlocks * Tile::kMaxThreads;
}

}  // namespace

void launch_stream_grad_weight_nchw(const Problem& p, bool bulk, const Allocate& allocate, cudaStream_t stream) {
  const GradStream a = grad_stream_of(p, bulk);
  visit_dtype(p.dtype, [&](auto zero) {
    using T = decltype(zero);
    if constexpr (sizeof(T) <= 4)
      visit_small_kernel(p, [&](auto kernel) {
        using Kernel = decltype(kernel);
        constexpr int kSide = Kernel::kKernelH;
        if constexpr (sizeof(T) == 4 && Kernel::kSquare && kSide > 1 && Kernel::kStride == 1 && Kernel::kDilation == 1)
          if (a.padding_h == kSide / 2 && a.padding_w == kSide / 2 && a.height == a.width &&
              a.multiplier <= Corner<kSide, 7>::kMostMultiplier) {
            if (a.height == 7 && launch_plane_grad_weight<kSide, 7>(p, bulk, stream)) return;
            if (a.height == 7) return launch<T, Corner<kSide, 7>>(p, a, allocate, stream);
            if (a.height == 14 && launch_plane_grad_weight<kSide, 14>(p, bulk, stream)) return;
            if (a.height == 14) return launch<T, Corner<kSide, 14>>(p, a, allocate, stream);
          }
        if constexpr (sizeof(T) == 2 && Kernel::kSquare && kSide <= 3 && Kernel::kStride == 1 &&
                      Kernel::kDilation == 1) {
          const auto begins_with_units = [](const RowRing& ring) {
            return ring.phase == 0 && ring.row_bytes % kUnit == 0;
          };
          const bool in_middle = a.padding_h == kSide / 2 && a.padding_w == kSide / 2;
          if (in_middle && begins_with_units(a.source.ring) && begins_with_units(a.grad.ring))
            return launch<T, Units<kSide>>(p, a, allocate, stream);
          if constexpr (kSide == 3)
            if (in_middle && fill_words(a)) {
              const int before = a.source.ring.phase / 2 % 2;
              if (a.width % 2 == 0 && before == a.grad.ring.phase / 2 % 2 &&
                  (before == 0 || a.width % Words<true>::kColumns > 0))
                return launch<T, Words<true>>(p, a, allocate, stream);
              return launch<T, Words<false>>(p, a, allocate, stream);
            }
        }
        if constexpr (sizeof(T) == 4 && Kernel::kSquare && kSide == 3 && Kernel::kStride == 1) {
          // Of rows of 64 columns, or some less, a warp has about one of tiles of 2 columns. Those of 7 columns below
          // each other lie in the same banks at 64.
          constexpr int kPairsWidth = 64, kLeastWidth = 60;
          if (a.width >= kLeastWidth && a.width <= kPairsWidth && a.width % 2 == 0 && a.out_width == a.width &&
              a.padding_w % 2 == Kernel::kDilation % 2 && a.source.ring.phase % 8 == 0 && a.grad.ring.phase % 8 == 0)
            return launch<T, Window<Kernel, 8, 2>>(p, a, allocate, stream);
        }
        // Of rows so long that a ring has no room for a tile of them, chunks have places of their own.
        constexpr int kLongRow = 3000;  // bytes: a ring has room for any tile of shorter ones
        if constexpr (sizeof(T) == 4 && Kernel::kSquare && kSide > 1)
          if (a.source.ring.row_bytes > kLongRow && !has_room<Window<Kernel>>(a, Window<Kernel>::kRows))
            return launch<T, Window<Kernel, 7, 7, true>>(p, a, allocate, stream);
        launch<T, Window<Kernel>>(p, a, allocate, stream);
      });
  });
}

}  // namespace dwconv
