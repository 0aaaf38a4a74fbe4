// grad_weight (and the bias gradient) of large kernels at stride 1 in 16 bits on planes of at most 16 x 16, on tensor
// cores.
//
// Images are what is summed over: with A[w][n] = gradient[n][r][w] and B[n][u] = input[n][y][u], the product has, for
// row y + padding - r of the kernel, the sums for its columns u + padding - w on the diagonals. So a multiplication
// takes a row of the gradient and a row of the input from 16 images, and no zeros but those that fill up rows. A warp
// keeps the products of up to 4 rows of the kernel in registers; a row of the input that it loads serves two of them.
// Diagonals are summed up at the end, splits of the images by a second kernel, in a fixed order.
//
// Every product that is part of a sum is one of the convolution: Inf and NaN come out where they should.
#include <algorithm>
#include <cmath>

#include "launch.h"
#include "partial_sums.cuh"
#include "stream.cuh"
#include "tensor_cores.cuh"
#include "relayout.cuh"

namespace dwconv {
namespace {

constexpr int kWarps = 8, kThreads = 32 * kWarps;
constexpr int kSide = 16, kImages = 16;  // of a plane, at most; of a stage
constexpr int kRowBytes = 2 * kSide;
constexpr int kPairs = 2;  // pairs of rows of the kernel that a warp has, 8 pairs apart
constexpr int kSumPitch = kSide + 1, kSumBytes = 4 * kSide * kSumPitch;  // of the products that a warp sums up

// The input or the gradient.
struct Images {
  const char* base;
  int64_t image_bytes, channel_bytes, row_bytes;
  int height, width;
  int unit;            // bytes that are copied at once: 16, 8, 4 or 2
  int pitch;           // from an image to the next in shared memory
  int images_at_once;  // that threads load
  Divider by_units, by_rows;
};

struct Outer {
  Images source, grad;
  float* partial;  // [split][tap, or bias behind the last tap][filter]
  void *grad_weight, *grad_bias;
  int kernel_h, kernel_w, padding_h, padding_w;
  int images, filters, multiplier;
  int stages, splits;
  int first_row, last_row;  // of the kernel, that meet the images: from and up to, less one
};

// Loads the planes of 16 images. Those that there are not become zeros.
class Loader {
 public:
  __device__ Loader(const Images& v, int channel) {
    uint32_t rest = threadIdx.x;
    const int unit = v.by_units.split(rest), row = v.by_rows.split(rest);
    image_ = static_cast<int>(rest) < v.images_at_once ? static_cast<int>(rest) : kImages;
    from_ = v.base + channel * v.channel_bytes + image_ * v.image_bytes + row * v.row_bytes + unit * v.unit;
    to_ = image_ * v.pitch + row * kRowBytes + unit * v.unit;
  }

  __device__ void load(const Images& v, int first, int images, uint32_t to) const {
    if (v.unit == 16) return load<16>(v, first, images, to);
    if (v.unit == 8) return load<8>(v, first, images, to);
    if (v.unit == 4) return load<4>(v, first, images, to);
    load<2>(v, first, images, to);
  }

 private:
  const char* from_;  // in the first image
  int image_, to_;

  template <int kBytes>
  __device__ void load(const Images& v, int first, int images, uint32_t to) const {
    const char* from = from_ + first * v.image_bytes;
    to += to_;
#pragma unroll 4
    for (int n = image_; n < kImages; n += v.images_at_once) {
      if (first + n >= images)
        clear_unit<kBytes>(to);
      else if constexpr (kBytes == 2)
        asm volatile("st.shared.b16 [%0], %1;" ::"r"(to), "h"(__ldg(reinterpret_cast<const uint16_t*>(from))));
      else
        copy_unit<kBytes>(to, from);
      from += v.images_at_once * v.image_bytes, to += v.images_at_once * v.pitch;
    }
  }
  template <int kBytes>
  static __device__ void clear_unit(uint32_t to) {
#pragma unroll
    for (int i = 0; i < kBytes; i += 2) asm volatile("st.shared.b16 [%0], %1;" ::"r"(to + i), "h"(uint16_t{0}));
  }
};

template <typename T>
__device__ void store(const Outer& a, int filter, int split, int tap, float total) {
  const int taps = a.kernel_h * a.kernel_w;
  if (a.splits > 1)
    a.partial[(int64_t{split} * (taps + (a.grad_bias != nullptr)) + tap) * a.filters + filter] = total;
  else if (tap < taps)
    static_cast<T*>(a.grad_weight)[int64_t{filter} * taps + tap] = narrow<T>(total);
  else
    static_cast<T*>(a.grad_bias)[filter] = narrow<T>(total);
}

template <typename T>
__global__ void __launch_bounds__(kThreads, 3) outer_grad_weight(const __grid_constant__ Outer a) {
  constexpr uint32_t kOnes = std::is_same_v<T, __half> ? 0x3c003c00u : 0x3f803f80u;
  let_next_kernel_start();
  const int stage_bytes = kImages * (a.source.pitch + a.grad.pitch), grad_offset = kImages * a.source.pitch;
  for (int i = threadIdx.x * kUnit; i < 2 * stage_bytes; i += kThreads * kUnit) shared<uint4>(i) = uint4{};
  __syncthreads();

  const int filter = blockIdx.x % a.filters, split = blockIdx.x / a.filters;
  const int lane = threadIdx.x % 32, warp = __shfl_sync(~0u, threadIdx.x / 32, 0);
  const int first = static_cast<int>(int64_t{a.stages} * split / a.splits);
  const int last = static_cast<int>(int64_t{a.stages} * (split + 1) / a.splits);
  const Loader source_loader(a.source, filter / a.multiplier), grad_loader(a.grad, filter);
  // Matrices of 8 images by 8 columns, transposed: the first two of A have the same images, those of B the same
  // columns.
  const int half = lane / 8 % 2, other = lane / 16;
  const int source_at = (lane % 8 + 8 * half) * a.source.pitch + 16 * other;
  const int grad_at = grad_offset + (lane % 8 + 8 * other) * a.grad.pitch + 16 * half;
  const bool wide = a.source.width > 8;

  float sum[kPairs][2][2][4] =
      {};  // [pair][row][columns of the input, 8 each]: gradient's columns g, g + 8 by 2 t, 2 t + 1
  float bias[4] = {};
  int stage = 0;
  for (int s = first - 1; s < last; ++s) {  // the first round only loads
    wait_copies<0>();
    __syncthreads();
    const int next_stage = stage_bytes - stage;
    if (s + 1 < last) {
      source_loader.load(a.source, (s + 1) * kImages, a.images, shared_address(next_stage));
      grad_loader.load(a.grad, (s + 1) * kImages, a.images, shared_address(next_stage + grad_offset));
    }
    commit_copies();
    if (s >= first) {
      const uint32_t source = shared_address(stage + source_at), grad = shared_address(stage + grad_at);
#pragma unroll
      for (int p = 0; p < kPairs; ++p) {
        const int i = a.first_row + 2 * (warp + p * kWarps);
        if (i >= a.last_row) continue;
        const int begin = max(0, a.padding_h - i - 1), end = min(a.grad.height, a.source.height + a.padding_h - i);
        uint32_t x[4] = {};
        if (begin + i - a.padding_h >= 0) load_matrices_transposed(x, source + (begin + i - a.padding_h) * kRowBytes);
        for (int r = begin; r < end; ++r) {
          const int y = r + i - a.padding_h;
          uint32_t g[4], below[4] = {};
          load_matrices_transposed(g, grad + r * kRowBytes);
          if (y + 1 < a.source.height) load_matrices_transposed(below, source + (y + 1) * kRowBytes);
          if (y >= 0) {
            multiply(sum[p][0][0], sum[p][0][0], g, {x[0], x[1]}, T{});
            if (wide) multiply(sum[p][0][1], sum[p][0][1], g, {x[2], x[3]}, T{});
          }
          if (y + 1 < a.source.height) {
            multiply(sum[p][1][0], sum[p][1][0], g, {below[0], below[1]}, T{});
            if (wide) multiply(sum[p][1][1], sum[p][1][1], g, {below[2], below[3]}, T{});
          }
#pragma unroll
          for (int k = 0; k < 4; ++k) x[k] = below[k];
        }
      }
      if (a.grad_bias != nullptr)
        for (int r = warp; r < a.grad.height; r += kWarps) {
          uint32_t g[4];
          load_matrices_transposed(g, grad + r * kRowBytes);
          multiply(bias, bias, g, {kOnes, kOnes}, T{});
        }
    }
    stage = next_stage;
  }
  __syncthreads();

  const int sums = warp * kSumBytes;
#pragma unroll
  for (int p = 0; p < kPairs; ++p)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int i = a.first_row + 2 * (warp + p * kWarps) + h;
      __syncwarp();
#pragma unroll
      for (int e = 0; e < 8; ++e)
        shared<float>(sums + 4 * ((lane / 4 + e / 2 % 2 * 8) * kSumPitch + e / 4 * 8 + lane % 4 * 2 + e % 2)) =
            sum[p][h][e / 4][e % 4];
      __syncwarp();
      if (i >= a.last_row) continue;
      for (int j = lane; j < a.kernel_w; j += 32) {
        const int u = j - a.padding_w;  // where the first column of the gradient meets the input
        float total = 0;
        for (int w = max(0, -u); w < min(a.grad.width, a.source.width - u); ++w)
          total += shared<float>(sums + 4 * (w * kSumPitch + w + u));
        store<T>(a, filter, split, i * a.kernel_w + j, total);
      }
    }
  // Rows of the kernel that never meet the images.
  for (int tap = threadIdx.x; tap < a.kernel_h * a.kernel_w; tap += kThreads)
    if (tap < a.first_row * a.kernel_w || tap >= a.last_row * a.kernel_w) store<T>(a, filter, split, tap, 0);
  if (a.grad_bias == nullptr) return;

  float total = lane % 4 == 0 ? bias[0] + bias[2] : 0;
  for (int offset = 16; offset > 0; offset /= 2) total += __shfl_xor_sync(~0u, total, offset);
  __syncthreads();
  if (lane == 0) shared<float>(4 * warp) = total;
  __syncthreads();
  if (threadIdx.x > 0) return;
  for (int w = 1; w < kWarps; ++w) total += shared<float>(4 * w);
  store<T>(a, filter, split, a.kernel_h * a.kernel_w, total);
}

// So many splits that the last wave of blocks is full, and that no sum is so long that it loses digits.
int splits_for(int64_t filters, int64_t stages, int64_t slots) {
  constexpr int64_t kLongest = 48;  // stages
  int best = 1;
  double least = INFINITY;
  for (int64_t splits = ceil_div(stages, kLongest); splits <= std::min<int64_t>(stages, 1 << 16); ++splits) {
    const double cost = static_cast<double>(ceil_div(filters * splits, slots)) *
                        static_cast<double>(ceil_div(stages, splits) + 2) *
                        (splits > 1 ? 1.1 : 1.0);  // the second kernel
    if (cost < least) least = cost, best = static_cast<int>(splits);
    if (filters * splits > 8 * slots) break;
  }
  return best;
}

template <typename T>
void launch(const Problem& p, Outer a, const Allocate& allocate, cudaStream_t stream) {
  const auto kernel = outer_grad_weight<T>;
  const Device& device = current_device();
  const int64_t shared_bytes =
      std::max<int64_t>(2 * kImages * (a.source.pitch + a.grad.pitch), int64_t{kWarps} * kSumBytes);
  a.stages = static_cast<int>(ceil_div(a.images, kImages));
  struct Decision {
    int splits;
    bool sum_early;
  };
  static thread_local Decisions<4, Decision> decisions;
  const Decision decision = decisions({device.id, a.images, a.filters, shared_bytes}, [&] {
    cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, device.shared_per_block);
    int resident = 0;
    cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, kernel, kThreads, shared_bytes);
    return Decision{splits_for(a.filters, a.stages, int64_t{std::max(resident, 1)} * device.multiprocessors),
                    waits_for_kernel_before<T>()};
  });
  a.splits = decision.splits;
  const int64_t sums = (p.taps() + (p.bias != nullptr)) * p.filters();
  if (a.splits > 1) a.partial = static_cast<float*>(allocate(a.splits * sums * int64_t{sizeof(float)}));
  kernel<<<static_cast<unsigned>(int64_t{a.filters} * a.splits), kThreads, shared_bytes, stream>>>(a);
  check_launch("outer_grad_weight");
  if (a.splits > 1) launch_add_partial_sums<T>(p, a.partial, a.splits, decision.sum_early, stream);
}

}  // namespace

void launch_outer_grad_weight(const Problem& p, const Allocate& allocate, cudaStream_t stream) {
  Outer a{};
  const auto arrange = [&](const View& view, int64_t channels, int64_t height, int64_t width, Images& v) {
    const View planes = to_planes(view, p.batch, channels, height, width, allocate, stream);
    v.base = static_cast<const char*>(planes.data);
    v.image_bytes = 2 * planes.stride[0], v.channel_bytes = 2 * planes.stride[1], v.row_bytes = 2 * planes.stride[2];
    v.height = static_cast<int>(height), v.width = static_cast<int>(width);
    v.unit = static_cast<int>(std::min<int64_t>(unit_of(planes), (2 * width) & -(2 * width)));
    v.pitch = v.height * kRowBytes + 16;  // 8 images in all banks
    v.by_units = Divider(2 * width / v.unit), v.by_rows = Divider(height);
    v.images_at_once = std::min<int>(kThreads / (2 * v.width / v.unit * v.height), kImages);
  };
  arrange(p.input, p.channels, p.height, p.width, a.source);
  arrange(p.output, p.filters(), p.out_height, p.out_width, a.grad);
  a.grad_weight = p.weight.data, a.grad_bias = p.bias;
  a.kernel_h = static_cast<int>(p.kernel_h), a.kernel_w = static_cast<int>(p.kernel_w);
  a.padding_h = static_cast<int>(p.padding_h), a.padding_w = static_cast<int>(p.padding_w);
  a.images = static_cast<int>(p.batch), a.filters = static_cast<int>(p.filters());
  a.multiplier = static_cast<int>(p.multiplier);
  a.first_row = std::max(a.padding_h - (a.grad.height - 1), 0);
  a.last_row = std::min(a.source.height + a.padding_h, a.kernel_h);
  visit_dtype(p.dtype, [&](auto zero) {
    using T = decltype(zero);
    if constexpr (sizeof(T) == 2) launch<T>(p, a, allocate, stream);
  });
}

}  // namespace dwconv
