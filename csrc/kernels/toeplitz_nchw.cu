// Forward and grad_input of small kernels on contiguous planes in 16 bits, streamed (stream_nchw.cuh), on tensor cores.
//
// A row of the kernel is a band matrix B of 16 columns in and 8 columns out, B[k][n] = weight[k - n * stride]: one
// multiplication of it from the left by 16 rows of pixels gives 16 x 8 sums. The upper 8 rows are pixels of 8 tiles,
// the lower 8 the same tiles 8 output columns on, so that a warp computes 8 tiles of 16 columns. It walks down all of
// them at once: pixels are read once and used for every row of the kernel. The tiles of a warp lie side by side and,
// where rows are short, one row of tiles below the other, which keeps shared memory free of all but two-way bank
// conflicts.
//
// The zeros of B spoil an output if they meet Inf or NaN, which then is NaN. So outputs that are finite are right, and
// the others are computed again, tap by tap.
#include "stream_nchw.cuh"

#include "launch.h"

namespace dwconv {
namespace {

__device__ inline void multiply(float (&sum)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                                uint32_t b1, __half) {
#if __CUDA_ARCH__ >= 800
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
#endif
}

__device__ inline void multiply(float (&sum)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                                uint32_t b1, __nv_bfloat16) {
#if __CUDA_ARCH__ >= 800
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
#endif
}

__device__ inline uint32_t bits(__half value) {
  return __half_as_ushort(value);
}
__device__ inline uint32_t bits(__nv_bfloat16 value) {
  return __bfloat16_as_ushort(value);
}

template <int kKernelH, int kStride, int kTileRows>
struct Toeplitz {
  static constexpr int kRows = kTileRows, kColumns = 16, kTiles = 8, kLanes = 32;
  static constexpr int kMaxThreads = 256, kBlocks = 2;

  template <typename T>
  static __device__ void compute(const Stream& a, const RowRing& ring, const Chunk& c, int out, int plane,
                                 uint32_t first_tile) {
    constexpr int kSourceRows = (kRows - 1) * kStride + kKernelH;
    constexpr int kWords = 2 * kStride + kStride;  // pairs of pixels, 8 columns apart, that a thread reads of a row
    const int lane = threadIdx.x % 32, pair = lane % 4 * 2;
    uint32_t filter = c.target + plane;
    filter = a.by_filters.split(filter) * a.fan_in;
    uint32_t tile = first_tile + lane / 4;
    const int strip = a.by_strips.split(tile), row = tile * kRows;
    const int column = max(min(strip * kColumns, a.out_width - kColumns), 0);  // the last strip overlaps the others
    const int overlap = strip * kColumns - column;
    const bool exists = row < c.rows;  // there may be less than 8 tiles left
    const int y0 = exists ? (c.row + row) * kStride - a.padding_h : a.height,
              x0 = column * kStride - a.padding_w + pair;

    uint32_t mask[kWords];  // of the pixels inside the image
#pragma unroll
    for (int w = 0; w < kWords; ++w) {
      const auto inside = [&](int x) { return static_cast<uint32_t>(x) < static_cast<uint32_t>(a.width); };
      mask[w] = (inside(x0 + 8 * w) ? 0xffffu : 0) | (inside(x0 + 8 * w + 1) ? 0xffff0000u : 0);
    }
    const float bias = a.bias ? widen(static_cast<const T*>(a.bias)[filter * a.bias_stride]) : 0.f;
    float sum[kRows][4];
#pragma unroll
    for (int r = 0; r < kRows; ++r)
#pragma unroll
      for (int v = 0; v < 4; ++v) sum[r][v] = bias;

    for (int q = 0; q < a.fan_in; ++q) {
      // The thread's entries of B, as pairs: where column lane / 4 has a weight in rows `pair` and on.
      const T* taps = static_cast<const T*>(a.weight) + (filter + q) * a.weight_filter;
      int offset[4 * kStride];
      bool in_band[4 * kStride];
#pragma unroll
      for (int e = 0; e < 4 * kStride; ++e) {
        const int j = pair + e / 2 * 8 + e % 2 - lane / 4 * kStride;
        in_band[e] = j >= 0 && j < a.kernel_w;
        offset[e] = in_band[e] ? j * a.weight_column : 0;
      }
      uint32_t band[kKernelH][2 * kStride];
#pragma unroll
      for (int i = 0; i < kKernelH; ++i, taps += a.weight_row) {
        uint32_t entry[4 * kStride];
#pragma unroll
        for (int e = 0; e < 4 * kStride; ++e) entry[e] = bits(taps[offset[e]]);
#pragma unroll
        for (int e = 0; e < 4 * kStride; ++e) entry[e] = in_band[e] ? entry[e] : 0;
#pragma unroll
        for (int h = 0; h < 2 * kStride; ++h) band[i][h] = entry[2 * h] | entry[2 * h + 1] << 16;
      }

      const int top = ((c.group + group_of(a, plane)) * a.fan_in + q) * a.height - c.source_begin;
      int source = ring.at(ring.wrap(exists ? c.source_slot + top + y0 : 0));
      const int ring_end = ring.at(ring.capacity), ring_bytes = ring.capacity * ring.row_bytes;
#pragma unroll
      for (int r = 0; r < kSourceRows; ++r) {
        const bool inside = static_cast<uint32_t>(y0 + r) < static_cast<uint32_t>(a.height);
        const int from = inside ? source + 2 * x0 : kZeros;
        const uint32_t shift = (from & 2) * 8;
        uint32_t x[kWords];
#pragma unroll
        for (int w = 0; w < kWords; ++w) {
          const int at = (from & ~3) + 16 * w;  // zeros are that many too
          x[w] = __funnelshift_r(shared<uint32_t>(at), shared<uint32_t>(at + 4), shift) & mask[w];
        }
        source += ring.row_bytes;
        if (source >= ring_end) source -= ring_bytes;
#pragma unroll
        for (int i = kKernelH - 1; i >= 0; --i) {
          const int reach = r - i, o = reach / kStride;
          if (reach < 0 || reach % kStride != 0 || o >= kRows) continue;
#pragma unroll
          for (int s = 0; s < kStride; ++s)
            multiply(sum[o], x[2 * s], x[2 * s + kStride], x[2 * s + 1], x[2 * s + 1 + kStride], band[i][2 * s],
                     band[i][2 * s + 1], T{});
        }
      }
    }

    float zero = 0;
#pragma unroll
    for (int r = 0; r < kRows; ++r)
#pragma unroll
      for (int v = 0; v < 4; ++v) zero = fmaf(sum[r][v], 0.f, zero);
    const int rows = min(kRows, c.rows - row);
    const int to = out + 2 * ((plane * c.rows + row) * a.out_width + column + pair);
    const int first = overlap, last = a.out_width - column;  // columns of the tile that are to be written
    const auto store = [&](auto&& write) {
#pragma unroll
      for (int r = 0; r < kRows; ++r)
#pragma unroll
        for (int h = 0; h < 2; ++h)
          if (r < rows)
            write(to + 2 * (r * a.out_width + 8 * h), pair + 8 * h, narrow<T>(sum[r][2 * h]),
                  narrow<T>(sum[r][2 * h + 1]));
    };
    if (first == 0 && last >= kColumns && to % 4 == 0 && a.out_width % 2 == 0)
      store([&](int at, int, T low, T high) { shared<uint32_t>(at) = bits(low) | bits(high) << 16; });
    else
      store([&](int at, int v, T low, T high) {
        if (v >= first && v < last) shared<T>(at) = low;
        if (v + 1 >= first && v + 1 < last) shared<T>(at + 2) = high;
      });
    if (zero != 0 && rows > 0)  // NaN: an output is not finite
      for (int v : {0, 1, 8, 9})
        if (pair + v >= first && pair + v < last)
          tile_by_taps<T>(a, ring, c, out, plane, row, rows, column + pair + v, 1);
  }
};

// The rows of a tile that waste least: tiles that a plane does not fill, and rows that two tiles read.
template <int kKernelH, int kStride, typename Go>
void choose_rows(const Stream& a, Go&& go) {
  const auto cost = [&](int rows) {
    constexpr int kSetUp = 20 + 10 * kKernelH;  // instructions, about
    const int64_t tiles = ceil_div(a.out_height, rows) * ceil_div(a.out_width, 16);
    return ceil_div(tiles, 8) * (10 * ((rows - 1) * kStride + kKernelH) + 2 * rows * kKernelH * kStride + kSetUp);
  };
  if (cost(2) < cost(4) && cost(2) < cost(7))
    go(Toeplitz<kKernelH, kStride, 2>{});
  else if (cost(4) < cost(7))
    go(Toeplitz<kKernelH, kStride, 4>{});
  else
    go(Toeplitz<kKernelH, kStride, 7>{});
}

}  // namespace

void launch_toeplitz_nchw(const Problem& p, bool bulk, cudaStream_t stream) {
  Stream a;
  int64_t images;
  std::tie(a, images) = stream_of(p, bulk);
  visit_dtype(p.dtype, [&](auto zero) {
    using T = decltype(zero);
    if constexpr (sizeof(T) == 2) {
      const auto go = [&](auto tile) { launch<T, decltype(tile)>(a, images, stream); };
      if (a.stride_h == 1) {
        switch (a.kernel_h) {
          case 1: return choose_rows<1, 1>(a, go);
          case 2: return choose_rows<2, 1>(a, go);
          case 3: return choose_rows<3, 1>(a, go);
          case 4: return choose_rows<4, 1>(a, go);
          case 5: return choose_rows<5, 1>(a, go);
          case 6: return choose_rows<6, 1>(a, go);
          case 7: return choose_rows<7, 1>(a, go);
          case 11: return choose_rows<11, 1>(a, go);
          default: break;
        }
      } else {
        switch (a.kernel_h) {
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
