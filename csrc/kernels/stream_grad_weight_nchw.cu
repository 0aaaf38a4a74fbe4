// grad_weight (and the bias gradient) on contiguous planes, streamed (stream_grad_weight_nchw.cuh), on CUDA cores: a
// thread keeps the sums of all taps in registers.
#include "launch.h"
#include "small_kernels.h"
#include "stream_grad_weight_nchw.cuh"

namespace dwconv {
namespace {

// A tile of 7 x 7 gradients: walks down the source rows, reads each once, and multiplies it with the gradients whose
// window it lies in. Needs a padding below the kernel's extent and 7 output columns.
template <class Kernel>
struct Window : AnyPart<Kernel::kKernelW> {
  static constexpr int kKernelH = Kernel::kKernelH, kKernelW = Kernel::kKernelW;
  static constexpr int kStride = Kernel::kStride, kDilation = Kernel::kDilation;
  static constexpr int kRows = 7, kColumns = 7, kTiles = 1, kLanes = 1;
  static constexpr bool kOddStrips = false;
  static constexpr int kMaxThreads = kKernelH * kKernelW < 25 ? 224 : 128, kBlocks = 2;
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
    RowWalk source(a.source.ring, c.source.slot + y0 - c.source.begin);
    RowWalk grad(a.grad.ring, c.grad.slot + (a.single ? 0 : filter * a.out_height) + row);

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
        read_row<T>(r / kStride < rows ? from + column * kSize : kZeros, row_g);
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
      read_next<T, kExtentW - 1, (kColumns - 1) * kStride + 1>(source, inside, x0, a.width, x);
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

// A tile of 7 x 7 gradients in a corner of a plane of 7 x 7 or 14 x 14 that a kernel is laid over the middle of: what
// lies outside is known at compile time, and is not multiplied. Other corners are mirror images of the upper left one,
// and so are their sums.
template <int kKernel, int kSide>
struct Corner {
  static constexpr int kKernelH = kKernel, kKernelW = kKernel;
  static constexpr int kRows = 7, kColumns = 7, kTiles = 1, kLanes = 1;
  static constexpr bool kOddStrips = false, kWhole = true, kPlane = kSide == 7;
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

  __device__ explicit Corner(const GradStream&)
      : up(kMirrors && threadIdx.x / 2 % 2 != 0), left(kMirrors && threadIdx.x % 2 != 0) {}
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
    float bias_part = 0;
    const auto take = [&](float (&row)[kColumns]) {
      grad.template read_next<T>(row);
      if (a.with_bias)
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

  template <typename T, typename Take>
  __device__ void add_rows(Walk& source, Take&& take) {
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
  template <typename T, typename Take>
  __device__ void add_in_loop(Walk& source, Take&& take) {
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
            if (a.height == 7) return launch<T, Corner<kSide, 7>>(p, a, allocate, stream);
            if (a.height == 14) return launch<T, Corner<kSide, 14>>(p, a, allocate, stream);
          }
        launch<T, Window<Kernel>>(p, a, allocate, stream);
      });
  });
}

}  // namespace dwconv
