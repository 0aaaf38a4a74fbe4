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
struct Window {
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
    const int segment = tile / a.strips, strip = tile % a.strips;
    if (segment * kRows >= c.rows) return;
    constexpr int kSize = sizeof(T);
    constexpr int kExtentH = (kKernelH - 1) * kDilation + 1, kExtentW = (kKernelW - 1) * kDilation + 1;
    constexpr int kSourceRows = (kRows - 1) * kStride + kExtentH, kSourceColumns = (kColumns - 1) * kStride + kExtentW;
    const int row = segment * kRows, rows = c.rows - row;
    const int column = min(strip * kColumns, a.out_width - kColumns);  // the last strip overlaps the one before
    const int overlap = strip * kColumns - column;
    const int x0 = column * kStride - a.padding_w;
    const int y0 = c.source_plane + filter / a.multiplier * a.height + (c.row + row) * kStride - a.padding_h;
    const int begin = max(c.source_begin, c.source_plane + filter / a.multiplier * a.height);
    const int end = min(c.source_end, c.source_plane + (filter / a.multiplier + 1) * a.height);
    RowWalk source(a.source_ring, c.source_slot + y0 - c.source_begin);
    RowWalk grad(a.grad_ring, c.grad_slot + (a.single ? 0 : filter * a.out_height) + row);

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

}  // namespace

void launch_stream_grad_weight_nchw(const Problem& p, bool bulk, const Allocate& allocate, cudaStream_t stream) {
  const GradStream a = grad_stream_of(p, bulk);
  visit_dtype(p.dtype, [&](auto zero) {
    using T = decltype(zero);
    if constexpr (sizeof(T) <= 4)
      visit_small_kernel(p, [&](auto kernel) { launch<T, Window<decltype(kernel)>>(p, a, allocate, stream); });
  });
}

}  // namespace dwconv
