// Forward and grad_input of small kernels on contiguous planes, streamed (stream_nchw.cuh), on CUDA cores: a thread
// computes a tile in registers. Threads side by side own tiles 7 columns apart, an odd number, so that shared memory is
// free of bank conflicts for rows of 7, 14, 28, 56 and most others.
#include "stream_nchw.cuh"

#include "launch.h"
#include "small_kernels.h"

namespace dwconv {
namespace {

// What tiles that a thread computes alone have in common.
template <class Tile>
struct TileOfThread {
  static constexpr int kTiles = 1, kLanes = 1, kLoaders = 0, kFilterBytes = 0;

  // The weights that the thread needs first are on their way while the chunk is.
  template <typename T>
  __device__ void prepare(const Stream& a, const Chunk& c) {
    uint32_t plane = threadIdx.x;
    a.by_units.split(plane);
    if (plane < static_cast<uint32_t>(c.targets)) static_cast<Tile*>(this)->template know<T>(a, c.target + plane);
  }

  template <typename T>
  __device__ void compute(const Stream& a, const RowRing& ring, const Chunk& c, int out) {
    const uint32_t units = c.targets * a.units;
    for (uint32_t unit = threadIdx.x; unit < units; unit += blockDim.x) {
      uint32_t plane = unit;
      const uint32_t tile = a.by_units.split(plane);
      static_cast<Tile*>(this)->template compute_tile<T>(a, ring, c, out, plane, tile);
    }
  }
};

// The weights of one filter in registers. Returns whether all are finite: then a product with a zero is a zero.
template <int kKernelH, int kKernelW, typename T>
__device__ bool read_weight(const Stream& a, int filter, float (&weight)[kKernelH][kKernelW]) {
  const T* row = static_cast<const T*>(a.weight) + filter * a.weight_filter;
  float zero = 0;
#pragma unroll
  for (int i = 0; i < kKernelH; ++i, row += a.weight_row) {
    const T* tap = row;
#pragma unroll
    for (int j = 0; j < kKernelW; ++j, tap += a.weight_column) {
      weight[i][j] = widen(*tap);
      zero = fmaf(weight[i][j], 0.f, zero);
    }
  }
  return zero == 0.f;
}

// A tile of kRows x 7 outputs. It walks down the source rows, reads each once and adds it to the outputs whose
// window it lies in. Needs a padding below the kernel's extent, 7 output columns, and kSum where fan_in is not 1.
template <class Kernel, bool kSum, int kRows_ = 7>
struct Window : TileOfThread<Window<Kernel, kSum, kRows_>> {
  static constexpr int kKernelH = Kernel::kKernelH, kKernelW = Kernel::kKernelW;
  static constexpr int kStride = Kernel::kStride, kDilation = Kernel::kDilation;
  static constexpr int kRows = kRows_, kColumns = 7;
  static constexpr int kMaxThreads = kKernelH * kKernelW < 25 || kRows < 7 ? 256 : 128;
  static constexpr int kBlocks = kRows < 7 ? 2 : kKernelH * kKernelW == 25 ? 4 : 3;

  // The filter that the thread knows: the first of those a target plane is summed over.
  int known = -1;
  bool finite;
  float weight[kKernelH][kKernelW], bias;

  template <typename T>
  __device__ void know(const Stream& a, uint32_t target) {
    const int filter = a.by_filters.split(target) * a.fan_in;
    if (filter == known) return;
    known = filter;
    bias = a.bias ? widen(static_cast<const T*>(a.bias)[filter * a.bias_stride]) : 0.f;
    finite = read_weight<kKernelH, kKernelW, T>(a, filter, weight);
  }

  template <typename T>
  __device__ void compute_tile(const Stream& a, const RowRing& ring, const Chunk& c, int out, int plane,
                               uint32_t tile) {
    constexpr int kExtentH = (kKernelH - 1) * kDilation + 1, kExtentW = (kKernelW - 1) * kDilation + 1;
    constexpr int kSourceRows = (kRows - 1) * kStride + kExtentH, kSourceColumns = (kColumns - 1) * kStride + kExtentW;
    uint32_t filter = c.target + plane;
    filter = a.by_filters.split(filter) * a.fan_in;
    const int strip = a.by_strips.split(tile), row = tile * kRows, rows = min(kRows, c.rows - row);
    if (rows <= 0) return;                                             // the last band is shorter
    const int column = min(strip * kColumns, a.out_width - kColumns);  // the last strip overlaps the one before
    const int overlap = strip * kColumns - column;
    const int y0 = (c.row + row) * kStride - a.padding_h, x0 = column * kStride - a.padding_w;
    constexpr int kSize = sizeof(T);
    const auto store = [&](int r, const float (&values)[kColumns]) {
      if (r >= rows) return;
      const int to = out + ((plane * c.rows + row + r) * a.out_width + column) * kSize;
      if (overlap == 0)
#pragma unroll
        for (int v = 0; v < kColumns; ++v) shared<T>(to + v * kSize) = narrow<T>(values[v]);
      else
#pragma unroll
        for (int v = 0; v < kColumns; ++v)
          if (v >= overlap) shared<T>(to + v * kSize) = narrow<T>(values[v]);
    };

    float sum[kRows][kColumns];
    if (kSum)
#pragma unroll
      for (int r = 0; r < kRows; ++r)
#pragma unroll
        for (int v = 0; v < kColumns; ++v) sum[r][v] = 0;
    for (int q = 0; q < (kSum ? a.fan_in : 1); ++q) {
      if (kSum && q > 0)
        known = -1, finite = read_weight<kKernelH, kKernelW, T>(a, filter + q, weight);
      else
        know<T>(a, c.target + plane);
      if (!finite) return tile_by_taps<T>(a, ring, c, out, plane, row, rows, column + overlap, kColumns - overlap);
      const int top = ((c.group + group_of(a, plane)) * a.fan_in + q) * a.height - c.source_begin;
      RowWalk walk(ring, c.source_slot + top + y0);
#pragma unroll
      for (int r = 0; r < kSourceRows; ++r) {
        const bool inside = static_cast<uint32_t>(y0 + r) < static_cast<uint32_t>(a.height);
        float x[kSourceColumns];
        read_next<T, kExtentW - 1, (kColumns - 1) * kStride + 1>(walk, inside, x0, a.width, x);
#pragma unroll
        for (int i = 0; i < kKernelH; ++i) {
          const int reach = r - i * kDilation, o = reach / kStride;
          if (reach < 0 || reach % kStride != 0 || o >= kRows) continue;
#pragma unroll
          for (int j = 0; j < kKernelW; ++j)
#pragma unroll
            for (int v = 0; v < kColumns; ++v) {
              const float before = !kSum && i == 0 && j == 0 ? bias : sum[o][v];
              sum[o][v] = fmaf(x[v * kStride + j * kDilation], weight[i][j], before);
            }
        }
        const int last = r - (kExtentH - 1);  // the last row that the output row, if any, reaches
        if (!kSum && last >= 0 && last % kStride == 0) store(last / kStride, sum[last / kStride]);
      }
    }
    if (kSum)
#pragma unroll
      for (int r = 0; r < kRows; ++r) store(r, sum[r]);
  }
};

// grad_input at stride 2: a tile of kPairs x 7 pairs of rows and columns. Which taps reach a row depends on whether the
// row plus the padding is even: known at compile time, given whether the padding is (kOdd).
template <int kKernel, int kOdd>
struct Spread : TileOfThread<Spread<kKernel, kOdd>> {
  static constexpr int kPairs = kKernel == 3 ? 3 : 2;
  static constexpr int kRows = 2 * kPairs, kColumns = 14;
  static constexpr int kMaxThreads = 128, kBlocks = 3;

  template <typename T>
  __device__ void know(const Stream&, uint32_t) {}

  template <typename T>
  __device__ void compute_tile(const Stream& a, const RowRing& ring, const Chunk& c, int out, int plane,
                               uint32_t tile) {
    constexpr int kLow = (kOdd - kKernel + 1) / 2, kSpan = kOdd - kLow;  // source rows from kLow to kOdd off
    constexpr int kSourceRows = kPairs + kSpan, kSourceColumns = kColumns / 2 + kSpan;
    uint32_t filter = c.target + plane;
    filter = a.by_filters.split(filter) * a.fan_in;
    const int column = a.by_strips.split(tile) * kColumns, row = tile * kRows;
    if (row >= c.rows) return;  // the last band is shorter
    const int rows = min(kRows, c.rows - row), columns = min(kColumns, a.out_width - column);
    const int y0 = (c.row + row) / 2 + a.padding_h / 2 + kLow, x0 = column / 2 + a.padding_w / 2 + kLow;
    constexpr int kSize = sizeof(T);
    float sum[kRows][kColumns] = {};

    for (int q = 0; q < a.fan_in; ++q) {
      float weight[kKernel][kKernel];
      if (!read_weight<kKernel, kKernel, T>(a, filter + q, weight))
        return tile_by_taps<T>(a, ring, c, out, plane, row, rows, column, columns);
      const int top = ((c.group + group_of(a, plane)) * a.fan_in + q) * a.height - c.source_begin;
      RowWalk walk(ring, c.source_slot + top + y0);
#pragma unroll
      for (int r = 0; r < kSourceRows; ++r) {
        const bool inside = static_cast<uint32_t>(y0 + r) < static_cast<uint32_t>(a.height);
        float x[kSourceColumns];
        read_next<T, 0, 0>(walk, inside, x0, a.width, x);
#pragma unroll
        for (int o = 0; o < kRows; ++o) {
          const int i = o % 2 + kOdd - 2 * (r + kLow - o / 2);
          if (i < 0 || i >= kKernel) continue;
#pragma unroll
          for (int v = 0; v < kColumns; ++v)
#pragma unroll
            for (int s = 0; s <= kSpan; ++s) {
              const int j = v % 2 + kOdd - 2 * (s + kLow);
              if (j >= 0 && j < kKernel) sum[o][v] = fmaf(x[v / 2 + s], weight[i][j], sum[o][v]);
            }
        }
      }
    }

#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (r >= rows) break;
      const int to = out + ((plane * c.rows + row + r) * a.out_width + column) * kSize;
      if (columns == kColumns)
#pragma unroll
        for (int v = 0; v < kColumns; ++v) shared<T>(to + v * kSize) = narrow<T>(sum[r][v]);
      else
#pragma unroll
        for (int v = 0; v < kColumns; ++v)
          if (v < columns) shared<T>(to + v * kSize) = narrow<T>(sum[r][v]);
    }
  }
};

}  // namespace

void launch_stream_nchw(const Problem& p, bool bulk, const Allocate& allocate, cudaStream_t stream) {
  Stream a;
  int64_t images;
  std::tie(a, images) = stream_of(p, bulk);
  visit_dtype(p.dtype, [&](auto zero) {
    using T = decltype(zero);
    if constexpr (sizeof(T) <= 4) {
      const bool compiled = visit_small_kernel(p, [&](auto kernel) {
        using Kernel = decltype(kernel);
        // Of long rows shared memory holds a block or two, which then have to be large ones.
        constexpr int kLongRow = 2800;  // bytes
        if constexpr (sizeof(T) == 4 && Kernel::kKernelH == 7 && Kernel::kStride == 1)
          if (a.fan_in == 1 && a.source.row_bytes > kLongRow)
            return launch<T, Window<Kernel, false, 4>>(a, images, allocate, stream);
        if (!a.spread && a.fan_in == 1) return launch<T, Window<Kernel, false>>(a, images, allocate, stream);
        if constexpr (Kernel::kSquare && Kernel::kKernelH > 1 && Kernel::kDilation == 1) {
          if constexpr (Kernel::kStride == 1)
            launch<T, Window<Kernel, true>>(a, images, allocate, stream);
          else if (a.padding_h % 2 == 0)
            launch<T, Spread<Kernel::kKernelH, 0>>(a, images, allocate, stream);
          else
            launch<T, Spread<Kernel::kKernelH, 1>>(a, images, allocate, stream);
        }
      });
      if (!compiled) throw std::runtime_error("dwconv: no tile of stream_nchw is compiled for this kernel");
    }
  });
}

}  // namespace dwconv
