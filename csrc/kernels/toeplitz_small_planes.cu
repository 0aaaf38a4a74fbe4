// Forward and grad_input on contiguous planes of at most 16 columns in 16 bits, on tensor cores.
//
// A row of the kernel is a matrix B, B[u][v] = weight[u + padding - v * stride], with a row for every column of the
// source and a column for every column of the target (B[u][v] = weight[v + padding - u * stride] for the gradient of
// the input at a stride): multiplied from the left by the same row of pixels of 16 images, it gives a row of outputs of
// as many, without any column of zeros beside the image. A block loads the planes of some channels of 16 images
// (image_runs.cuh), a warp takes a channel at a time, whose matrices stay in registers, and outputs leave by way of
// shared memory. Many blocks are under way on a multiprocessor, and hide each other's copies.
//
// The zeros of B spoil an output if they meet Inf or NaN, which then is NaN. So outputs that are finite are right, and
// the others are computed again, tap by tap.
#include <algorithm>

#include "image_runs.cuh"
#include "launch.h"
#include "mapping.h"
#include "stream_nchw.cuh"
#include "tensor_cores.cuh"

namespace dwconv {
namespace {

constexpr int kImages = 16;  // that are multiplied together
constexpr int kMaxWarps = 4;
constexpr int kEntries = 32;  // of a row of the kernel between zeros
constexpr int kMiddle = 15;   // of them, where column 0 of the input meets column 0 of the output

struct Small {
  ImageRuns source, target;
  int height, width, out_height, out_width;
  const void *weight, *bias;
  int64_t weight_filter, weight_row, weight_column, bias_stride;
  int kernel_h, kernel_w, padding_h, padding_w, dilation_h, dilation_w, stride;
  bool spread;  // the stride is that of the target
  int images, channels;
  int block_channels, groups;
  int weights_at;
};

// Outputs of one image, by the taps that meet it.
template <typename T>
__device__ __noinline__ void outputs_by_taps(const Small& a, int from, int to, int channel, int first_row, int rows,
                                             int column) {
  const T* weight = static_cast<const T*>(a.weight) + channel * a.weight_filter;
  for (int r = first_row; r < first_row + rows; ++r) {
    float sum = a.bias ? widen(static_cast<const T*>(a.bias)[channel * a.bias_stride]) : 0.f;
    for (int i = 0; i < a.kernel_h; ++i) {
      const int y = source_index(r, i, a.stride, a.padding_h, a.dilation_h, a.spread);
      if (y < 0 || y >= a.height) continue;
      for (int j = 0; j < a.kernel_w; ++j) {
        const int x = source_index(column, j, a.stride, a.padding_w, a.dilation_w, a.spread);
        if (x >= 0 && x < a.width)
          sum = fmaf(widen(shared<T>(from + 2 * (y * a.width + x))),
                     widen(weight[i * a.weight_row + j * a.weight_column]), sum);
      }
    }
    shared<T>(to + 2 * (r * a.out_width + column)) = narrow<T>(sum);
  }
}

// How target rows of a tile are computed from source rows, both counted from the tile's beginning.
template <int kKernelH, int kStride>
struct Rows {
  static constexpr int kTarget = 7, kSource = (kTarget - 1) * kStride + kKernelH;
  static __device__ int first_target(const Small&, int tile) { return tile * kTarget; }
  static __device__ int first_source(const Small& a, int tile) { return tile * kTarget * kStride - a.padding_h; }
  // The target row that a source row reaches by a row of the kernel; negative for none.
  static constexpr int target(int source, int i) {
    return source >= i && (source - i) % kStride == 0 && (source - i) / kStride < kTarget ? (source - i) / kStride : -1;
  }
  // The last source row of a target row.
  static constexpr int last(int target) { return target * kStride + kKernelH - 1; }
};

// The gradient of the input at stride 2. Tiles begin so that even rows of the kernel reach their even rows.
template <int kKernelH>
struct Rows<kKernelH, -2> {
  static constexpr int kTarget = 8, kBack = kKernelH / 2, kSource = kTarget / 2 + kBack;
  static __device__ int first_target(const Small& a, int tile) { return tile * kTarget - (a.padding_h & 1); }
  static __device__ int first_source(const Small& a, int tile) { return tile * kTarget / 2 + a.padding_h / 2 - kBack; }
  static constexpr int target(int source, int i) {
    const int r = 2 * (source - kBack) + i;
    return r >= 0 && r < kTarget ? r : -1;
  }
  static constexpr int last(int target) { return target / 2 + kBack; }
};

// kKernelH: with what dilation puts between the rows. kStride: -2 where it is that of the target. kIn, kOut: columns of
// the source and the target, in units of 8. kPairs: whether every row of both begins at a multiple of 4 bytes.
template <typename T, int kKernelH, int kStride, int kIn, int kOut, bool kPairs>
__global__ void __launch_bounds__(32 * kMaxWarps, kIn + kOut > 2 ? 4 : 6)
    toeplitz_small_planes(const __grid_constant__ Small a) {
  using Tile = Rows<kKernelH, kStride>;
  constexpr bool kSpread = kStride < 0;
  static_assert(kIn <= 2 && kOut <= 2 && (kStride == 1 ? kIn == kOut : kSpread ? kIn == 1 : kOut == 1));
  constexpr int kDiagonals = kIn + kOut - 1;  // matrices of 8 x 8 of which B consists
  const int first_channel = blockIdx.x % a.groups * a.block_channels, first_image = blockIdx.x / a.groups * kImages;
  const int channels = min(a.block_channels, a.channels - first_channel);
  const int images = min(kImages, a.images - first_image);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, row_of_a = lane / 4, pair = lane % 4 * 2;
  const int source_plane = 2 * a.height * a.width, target_plane = 2 * a.out_height * a.out_width;
  const int64_t source_offset = int64_t{first_channel} * source_plane,
                target_offset = int64_t{first_channel} * target_plane;
  copy_runs<true>(a.source, 0, first_image, images, source_offset, channels * source_plane);
  commit_copies();

  uint32_t mask[kIn];  // of the columns inside the image
#pragma unroll
  for (int k = 0; k < kIn; ++k) {
    const int left = a.width - pair - 8 * k;
    mask[k] = left > 1 ? ~0u : left > 0 ? 0xffffu : 0;
  }
  // The thread's pair in a row of weights.
  const int entry = kMiddle + (kSpread ? row_of_a - 2 * pair : pair - row_of_a * kStride);
  const int weights = a.weights_at + warp * (kKernelH * kEntries * 4);
  const int weights_from = weights + (!kSpread && entry % 2 ? 2 * kEntries + 2 * (entry - 1) : 2 * entry);
  bool arrived = false;
  for (int channel = warp; channel < channels || !arrived; channel += blockDim.x / 32) {
    // The weights between zeros, and once more one entry earlier, so that any two neighbours are a word.
    uint32_t band[kKernelH][kDiagonals];  // by columns of the input less columns of the output
    float start = 0;
    if (channel < channels) {
      const T* taps = static_cast<const T*>(a.weight) + (first_channel + channel) * a.weight_filter;
      const int at = lane - kMiddle + a.padding_w, j = at / a.dilation_w;
      const bool has_column = at >= 0 && j * a.dilation_w == at && j < a.kernel_w;
      const int last = has_column ? (a.kernel_h - 1) * a.dilation_h : -1;
      const T* from = taps + j * a.weight_column;
      int next = 0;  // row with weights
      __syncwarp();
#pragma unroll
      for (int i = 0; i < kKernelH; ++i) {
        T w = narrow<T>(0.f);
        if (i == next && i <= last) w = __ldg(from);
        if (i == next) next += a.dilation_h, from += a.weight_row;
        shared<T>(weights + i * (4 * kEntries) + 2 * lane) = w;
        if (lane > 0) shared<T>(weights + i * (4 * kEntries) + 2 * kEntries + 2 * (lane - 1)) = w;
      }
      if (a.bias) start = widen(__ldg(static_cast<const T*>(a.bias) + (first_channel + channel) * a.bias_stride));
      __syncwarp();
#pragma unroll
      for (int i = 0; i < kKernelH; ++i)
#pragma unroll
        for (int d = 0; d < kDiagonals; ++d) {
          const int at = weights_from + i * (4 * kEntries) + 16 * (kSpread ? kOut - 1 - d : d - (kOut - 1));
          band[i][d] =
              kSpread ? __byte_perm(shared<uint16_t>(at), shared<uint16_t>(at - 4), 0x5410) : shared<uint32_t>(at);
        }
    }
    if (!arrived) {
      wait_copies<0>();
      __syncthreads();
      arrived = true;
      if (channel >= channels) break;
    }

    int from[2], to[2];  // of the thread's two images; what there is not is computed from the last one, in vain
    bool there[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int index = min(row_of_a + 8 * h, images - 1);
      there[h] = row_of_a + 8 * h < images;
      from[h] = a.source.slot(0, index, first_image + index, source_offset) + channel * source_plane;
      to[h] = a.target.slot(0, index, first_image + index, target_offset) + channel * target_plane;
    }
    for (int tile = 0; Tile::first_target(a, tile) < a.out_height; ++tile) {
      const int first_row = Tile::first_target(a, tile), y0 = Tile::first_source(a, tile);
      float sum[Tile::kTarget][kOut][4];
#pragma unroll
      for (int r = 0; r < Tile::kTarget; ++r)
#pragma unroll
        for (int v = 0; v < kOut; ++v)
#pragma unroll
          for (int e = 0; e < 4; ++e) sum[r][v][e] = start;
      auto zero = narrow_pair(0.f, 0.f, T{});
      const auto none = zero;
#pragma unroll
      for (int s = 0; s < Tile::kSource; ++s) {
        const int y = y0 + s;
        if (y >= 0 && y < a.height) {
          uint32_t x[2][2];  // by image, by columns
#pragma unroll
          for (int h = 0; h < 2; ++h)
#pragma unroll
            for (int k = 0; k < kIn; ++k) {
              const int at = from[h] + 2 * (y * a.width + pair + 8 * k);
              if (kPairs)
                x[h][k] = shared<uint32_t>(at);
              else
                x[h][k] = __funnelshift_r(shared<uint32_t>(at & ~3), shared<uint32_t>((at & ~3) + 4), (at & 2) * 8);
              x[h][k] &= mask[k];
            }
#pragma unroll
          for (int i = kKernelH - 1; i >= 0; --i) {
            const int r = Tile::target(s, i);
            if (r < 0) continue;
#pragma unroll
            for (int v = 0; v < kOut; ++v) {
              const auto& b = band[i];
              const int d = kOut - 1 - v;
              if constexpr (kIn == 2)
                multiply(sum[r][v], sum[r][v], {x[0][0], x[1][0], x[0][1], x[1][1]}, {b[d], b[d + 1]}, T{});
              else
                multiply(sum[r][v], {x[0][0], x[1][0]}, b[d], T{});
            }
          }
        }
#pragma unroll
        for (int r = 0; r < Tile::kTarget; ++r) {
          if (Tile::last(r) != s || first_row + r < 0 || first_row + r >= a.out_height) continue;
#pragma unroll
          for (int v = 0; v < kOut; ++v)
#pragma unroll
            for (int h = 0; h < 2; ++h) {
              const auto values = narrow_pair(sum[r][v][2 * h], sum[r][v][2 * h + 1], T{});
#if __CUDA_ARCH__ >= 800
              zero = __hfma2(values, none, zero);
#endif
              const int column = pair + 8 * v, at = to[h] + 2 * ((first_row + r) * a.out_width + column);
              if (kPairs) {
                if (there[h] && column < a.out_width) shared<Pair<T>>(at) = values;
              } else {
                if (there[h] && column < a.out_width) shared<T>(at) = values.x;
                if (there[h] && column + 1 < a.out_width) shared<T>(at + 2) = values.y;
              }
            }
        }
      }
      if (!(__low2float(zero) == 0 && __high2float(zero) == 0)) {  // NaN: an output is not finite
        const int begin = max(first_row, 0), end = min(first_row + Tile::kTarget, a.out_height);
        for (int e = 0; e < 4 * kOut; ++e) {
          const int h = e / 2 % 2, column = pair + e % 2 + e / 4 * 8;
          if (there[h] && column < a.out_width)
            outputs_by_taps<T>(a, from[h], to[h], first_channel + channel, begin, end - begin, column);
        }
      }
    }
  }
  __syncthreads();
  copy_runs<false>(a.target, 0, first_image, images, target_offset, channels * target_plane);
}

template <typename T, int kKernelH, int kStride, int kIn, int kOut, bool kPairs>
void launch_kernel(Small a, cudaStream_t stream) {
  const auto kernel = toeplitz_small_planes<T, kKernelH, kStride, kIn, kOut, kPairs>;
  const Device& device = current_device();
  constexpr int kWeightBytes = kKernelH * kEntries * 4;
  // As many channels as let several blocks share a multiprocessor, in multiples of a block's warps if there are many.
  const auto lay_out = [&](int channels) {
    a.block_channels = channels;
    a.source.pitch = slot_pitch(int64_t{channels} * 2 * a.height * a.width);
    a.target.pitch = slot_pitch(int64_t{channels} * 2 * a.out_height * a.out_width);
    a.source.memory = 0;
    a.target.memory = kImages * a.source.pitch;
    a.weights_at = a.target.memory + kImages * a.target.pitch;
    return a.weights_at + std::min(channels, kMaxWarps) * kWeightBytes;
  };
  constexpr int kMostBytes = 54 << 10, kMostChannels = 2 * kMaxWarps;
  int channels = 1;
  while (channels < std::min(a.channels, kMostChannels) && lay_out(channels + 1) <= kMostBytes) ++channels;
  if (channels > kMaxWarps) channels = channels / kMaxWarps * kMaxWarps;
  const int bytes = lay_out(channels);
  a.groups = static_cast<int>(ceil_div(a.channels, channels));
  if (bytes > 48 << 10)  // what a kernel may have unless it is allowed more
    cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, device.shared_per_block);
  const int64_t blocks = a.groups * ceil_div(a.images, kImages);
  kernel<<<static_cast<unsigned>(blocks), 32 * std::min(channels, kMaxWarps), bytes, stream>>>(a);
  check_launch("toeplitz_small_planes");
}

}  // namespace

void launch_toeplitz_small_planes(const Problem& p, cudaStream_t stream) {
  const Mapping map(p);
  Small a{};
  bool pairs = true;
  a.height = map.height, a.width = map.width, a.out_height = map.out_height, a.out_width = map.out_width;
  const auto arrange = [&](const View& view, int width, ImageRuns& v) {
    v.base = static_cast<char*>(view.data), v.image_bytes = 2 * view.stride[0];
    pairs = pairs && width % 2 == 0 && (view.stride[0] % 2 == 0 || p.batch == 1) &&
            reinterpret_cast<uintptr_t>(view.data) % 4 == 0;
  };
  arrange(map.source, a.width, a.source);
  arrange(map.target, a.out_width, a.target);
  a.weight = map.weight.data, a.bias = map.bias, a.bias_stride = map.bias_stride;
  a.weight_filter = map.weight.stride[0], a.weight_row = map.weight.stride[2], a.weight_column = map.weight.stride[3];
  a.kernel_h = static_cast<int>(p.kernel_h), a.kernel_w = static_cast<int>(p.kernel_w);
  a.dilation_h = static_cast<int>(p.dilation_h), a.dilation_w = static_cast<int>(p.dilation_w);
  a.padding_h = map.padding_h, a.padding_w = map.padding_w, a.stride = static_cast<int>(p.stride_h);
  a.spread = map.spread;
  a.images = static_cast<int>(p.batch), a.channels = static_cast<int>(p.channels);
  const bool narrow = std::max(a.width, a.out_width) <= 8;  // columns
  const int rows = (a.kernel_h - 1) * a.dilation_h + 1;
  visit_dtype(p.dtype, [&](auto zero) {
    using T = decltype(zero);
    if constexpr (sizeof(T) == 2) {
      const auto go = [&](auto kernel_h) {
        constexpr int kKernelH = decltype(kernel_h)::value;
        const auto launch = [&](auto stride, auto in, auto out) {
          constexpr int kStride = decltype(stride)::value, kIn = decltype(in)::value, kOut = decltype(out)::value;
          return pairs ? launch_kernel<T, kKernelH, kStride, kIn, kOut, true>(a, stream)
                       : launch_kernel<T, kKernelH, kStride, kIn, kOut, false>(a, stream);
        };
        constexpr std::integral_constant<int, 1> kOne;
        constexpr std::integral_constant<int, 2> kTwo;
        if (a.spread) return launch(std::integral_constant<int, -2>{}, kOne, kTwo);
        if (a.stride == 2) return launch(kTwo, kTwo, kOne);
        return narrow ? launch(kOne, kOne, kOne) : launch(kOne, kTwo, kTwo);
      };
      if (rows <= 3) return go(std::integral_constant<int, 3>{});
      if (rows <= 5) return go(std::integral_constant<int, 5>{});
      return go(std::integral_constant<int, 7>{});
    }
  });
}

}  // namespace dwconv
