// grad_weight (and the bias gradient) on contiguous planes, streamed (stream_grad_weight_nchw.cuh), on CUDA cores: a
// thread keeps the sums of all taps in registers.
#include <type_traits>

#include "launch.h"
#include "stream_grad_weight_nchw.cuh"

namespace dwconv {
namespace {

// A tile of 7 x 7 gradients: walks down the source rows, reads each once, and multiplies it with the gradients whose
// window it lies in. Needs a padding below the kernel's extent and 7 output columns.
template <int kKernelH, int kKernelW, int kStride, int kDilation>
struct Window {
  static constexpr int kRows = 7, kColumns = 7, kTiles = 1, kLanes = 1;
  static constexpr int kTapsH = kKernelH, kTapsW = kKernelW;
  static constexpr int kMaxThreads = kKernelH * kKernelW < 25 ? 224 : 128, kBlocks = 2;

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
    const RowRing &xs = a.source_ring, &gs = a.grad_ring;
    int source = xs.at(xs.wrap(c.source_slot + y0 - c.source_begin));
    int grad = gs.at(gs.wrap(c.grad_slot + (a.single ? 0 : filter * a.out_height) + row)) + column * kSize;
    const int source_end = xs.at(xs.capacity), grad_end = gs.at(gs.capacity);
    const int source_bytes = xs.capacity * xs.row_bytes, grad_bytes = gs.capacity * gs.row_bytes;

    float g[kRows][kColumns], bias_part = 0;
#pragma unroll
    for (int r = 0; r < kSourceRows; ++r) {
      if (r % kStride == 0 && r / kStride < kRows) {
        constexpr int kNone = 0;
        float (&row_g)[kColumns] = g[r / kStride];
        read_row<T>(r / kStride < rows ? grad : kZeros + kNone, row_g);
        grad += gs.row_bytes;
        if (grad >= grad_end) grad -= grad_bytes;
        if (overlap > 0)
#pragma unroll
          for (int v = 0; v < kColumns - 1; ++v)
            if (v < overlap) row_g[v] = 0;
#pragma unroll
        for (int v = 0; v < kColumns; ++v) bias_part += row_g[v];
      }
      float x[kSourceColumns];
      read_row<T>(y0 + r >= begin && y0 + r < end ? source + x0 * kSize : kZeros, x);
      source += xs.row_bytes;
      if (source >= source_end) source -= source_bytes;
#pragma unroll
      for (int j = 0; j < kSourceColumns; ++j)
        if (j < kExtentW - 1 || j > (kColumns - 1) * kStride)  // the others are never padding
          x[j] = static_cast<uint32_t>(x0 + j) < static_cast<uint32_t>(a.width) ? x[j] : 0.f;
#pragma unroll
      for (int i = 0; i < kKernelH; ++i) {
        const int reach = r - i * kDilation, o = reach / kStride;
        if (reach < 0 || reach % kStride != 0 || o >= kRows) continue;
#pragma unroll
        for (int v = 0; v < kColumns; ++v)
#pragma unroll
          for (int j = 0; j < kKernelW; ++j) sum[i][j] = fmaf(x[v * kStride + j * kDilation], g[o][v], sum[i][j]);
      }
    }
    bias += bias_part;
  }
};

}  // namespace

void launch_stream_grad_weight_nchw(const Problem& p, bool bulk, const Allocate& allocate, cudaStream_t stream) {
  const GradStream a = grad_stream_of(p, bulk);
  visit_dtype(p.dtype, [&](auto zero) {
    using T = decltype(zero);
    if constexpr (sizeof(T) <= 4) {
      const auto go = [&](auto tile) { launch<T, typename decltype(tile)::type>(p, a, allocate, stream); };
      const auto is = [&](int h, int w, int s, int d) {
        return a.kernel_h == h && a.kernel_w == w && a.stride == s && a.dilation == d;
      };
      if (is(1, 1, 1, 1)) return go(std::type_identity<Window<1, 1, 1, 1>>{});
      if (is(3, 3, 1, 1)) return go(std::type_identity<Window<3, 3, 1, 1>>{});
      if (is(3, 3, 2, 1)) return go(std::type_identity<Window<3, 3, 2, 1>>{});
      if (is(3, 3, 1, 2)) return go(std::type_identity<Window<3, 3, 1, 2>>{});
      if (is(5, 5, 1, 1)) return go(std::type_identity<Window<5, 5, 1, 1>>{});
      if (is(5, 5, 2, 1)) return go(std::type_identity<Window<5, 5, 2, 1>>{});
      if (is(7, 7, 1, 1)) return go(std::type_identity<Window<7, 7, 1, 1>>{});
      if (is(7, 7, 2, 1)) return go(std::type_identity<Window<7, 7, 2, 1>>{});
      if (is(1, 11, 1, 1)) return go(std::type_identity<Window<1, 11, 1, 1>>{});
      if (is(11, 1, 1, 1)) return go(std::type_identity<Window<11, 1, 1, 1>>{});
    }
  });
}

}  // namespace dwconv
