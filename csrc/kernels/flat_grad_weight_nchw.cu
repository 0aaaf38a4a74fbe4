// grad_weight (and the bias gradient) of small kernels in 16 bits at stride 1 on planes of at most 49 pixels, on tensor
// cores, as sums over images.
//
// With all pixels of a plane in a row, A[m][n] = input[n][m] and B[n][k] = gradient[n][k], the product has the sums of
// every pixel of the input with every one of the gradient, of which a tap's sum is those that are as far from each
// other as it says: whatever pairs no tap has is never added. So there is nothing to lay anew, to mask or to take
// again: 8 loads of matrices and 22 multiplications for 16 images of a plane of 7x7 and 7x7, 13 for 3x3.
//
// A block has some planes, a warp each, of 16 images at a time, which lie as they do in memory: matrices begin where 16
// bytes do, in both arrays alike, before or where a plane begins. On sm_90 and later.
#include "flat_grad_weight_nchw.h"

#include <algorithm>

#include "clusters.cuh"
#include "partial_sums.h"
#include "tensor_cores.cuh"

namespace dwconv {
namespace {

constexpr int kImages = 16;         // that are multiplied together
constexpr int kPlanes = 8;          // of a block: a warp each
constexpr int kStages = 4;          // of 16 images
constexpr int kMaxPixels = 49;      // of a plane
constexpr int kUnits = 7;           // of 8 pixels, that a plane is part of wherever it begins
constexpr int kPitch = 8 * kUnits;  // of a plane's product, in floats
constexpr int kProductBytes = 4 * 8 * kUnits * kPitch;
constexpr int kAtOnce = 14;                    // products that are added before it is seen whether there are more
constexpr int kFull = 0, kDone = 8 * kStages;  // where barriers are

struct Flat {
  const char *source, *grad;
  int64_t source_image_bytes, grad_image_bytes;
  int height, width, kernel_h, kernel_w, padding_h, padding_w, dilation_h, dilation_w;
  int images, filters, groups, splits;
  int planes;          // of a block: a warp each
  int image_bytes;     // of all planes
  Divider by_columns;  // of the kernel
  int row_bytes;       // of an image: the planes of a block
  int array_bytes;     // of 16 images of one array
  uint64_t rows;       // a bit for the first pixel of each row of a plane
  float* partial;      // [split][tap, or bias behind the last tap][filter], or null
  void *grad_weight, *grad_bias;
};

// Which pixels of the input have one of the gradient so many rows above and columns to the left, a bit each.
__device__ inline uint64_t pixels_of(const Flat& a, int y, int x) {
  const int top = max(y, 0), bottom = min(a.height + y, a.height);
  const int left = max(x, 0), right = min(a.width + x, a.width);
  if (top >= bottom || left >= right) return 0;
  const uint64_t rows = a.rows & (uint64_t{1} << bottom * a.width) - (uint64_t{1} << top * a.width);
  return rows * ((1u << right) - (1u << left));
}

// kReach: pixels from one of the input to one of the gradient that it is multiplied with, at most.
template <typename T, int kReach>
__global__ void __launch_bounds__(32 * kPlanes, 2) flat_grad_weight_nchw(const __grid_constant__ Flat a) {
#if __CUDA_ARCH__ < 900
  if constexpr (sizeof(T) == 2) return;  // it is not launched
#endif
  constexpr int kTiles = (kUnits + 1) / 2;
  const auto needed = [](int m, int k) {
    return 8 * k + 7 >= 16 * m - kReach && 8 * k <= (16 * m + 16 < 8 * kUnits ? 16 * m + 15 : 8 * kUnits - 1) + kReach;
  };
  const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0), lane = threadIdx.x % 32;
  const int group = blockIdx.x % a.groups, split = blockIdx.x / a.groups, filter = group * a.planes + warp;
  const int all = (a.images + kImages - 1) / kImages, whole = all / a.splits, more = all % a.splits;
  const int first = split * whole + min(split, more), steps = whole + (split < more);
  if (threadIdx.x == 0) {
    for (int i = 0; i < kStages; ++i) init_barrier(kFull + 8 * i, 1), init_barrier(kDone + 8 * i, a.planes);
    before_bulk_copies();
  }
  let_next_kernel_start();
  wait_for_kernel_before();
  __syncthreads();
  const int pixels = a.height * a.width, begin = filter * pixels, before = begin % 8;  // pixels of other planes
  const int from = 2 * group * a.planes * pixels / kUnit * kUnit;  // of an image's bytes: where the block's rows begin
  const auto load = [&](int step, int stage) {
    const int full = kFull + 8 * stage, to = kHead + stage * 2 * a.array_bytes;
    const int image = (first + step) * kImages + lane % kImages;
    const int mine = to + lane / kImages * a.array_bytes + lane % kImages * a.row_bytes;
    const int bytes = min(a.row_bytes, a.image_bytes - from);
    if (image < a.images) {
      expect_bytes(full, bytes);
      copy_bulk(shared_address(mine),
                (lane < kImages ? a.source + image * a.source_image_bytes : a.grad + image * a.grad_image_bytes) + from,
                bytes, full);
    } else {
      for (int at = 0; at < a.row_bytes; at += kUnit) shared<uint4>(mine + at) = uint4{};
    }
    __syncwarp();
    if (lane == 0) arrive(full);
  };
  if (warp == 0)
    for (int step = 0; step < min(kStages, steps); ++step) load(step, step);

  float sum[kTiles][kUnits][4] = {}, bias = 0;
  const int plane = kHead + begin / 8 * kUnit - from;
  const uint32_t source = shared_address(plane) + (lane % 8 + lane / 16 * 8) * a.row_bytes + lane / 8 % 2 * kUnit;
  const uint32_t grad = shared_address(plane) + a.array_bytes + lane % 16 * a.row_bytes + lane / 16 * kUnit;
  int stage = 0;
  uint32_t parity = 0;
  for (int step = 0; step < steps; ++step) {
    const int place = stage * 2 * a.array_bytes;
    __syncwarp();
    wait(kFull + 8 * stage, parity);
    uint32_t g[kUnits + 1][2];
#pragma unroll
    for (int k = 0; k < kUnits - 1; k += 2) {
      uint32_t both[4];
      load_matrices_transposed(both, grad + place + k * kUnit);
#pragma unroll
      for (int e = 0; e < 4; ++e) g[k + e / 2][e % 2] = both[e];
    }
    load_two_transposed(g[kUnits - 1][0], g[kUnits - 1][1], grad + place + (kUnits - 1) * kUnit);
#pragma unroll
    for (int m = 0; m < kTiles; ++m) {
      uint32_t x[4];
      load_matrices_transposed(x, source + place + 2 * m * kUnit);
#pragma unroll
      for (int k = 0; k < kUnits; ++k)
        if (needed(m, k)) multiply(sum[m][k], sum[m][k], x, g[k], T{});
    }
    if (a.grad_bias != nullptr)
      for (int at = lane / kImages; at < pixels; at += 2)
        bias +=
            widen(shared<T>(kHead + place + a.array_bytes + lane % kImages * a.row_bytes + 2 * (begin + at) - from));
    __syncwarp();
    if (lane == 0) arrive(kDone + 8 * stage);
    if (warp == 0 && step + kStages < steps) {
      wait(kDone + 8 * stage, parity);
      load(step + kStages, stage);
    }
    if (++stage == kStages) stage = 0, parity ^= 1;
  }
  __syncthreads();

  const int taps = a.kernel_h * a.kernel_w, slots = taps + (a.grad_bias != nullptr);
  const auto store = [&](int slot, float total) {
    if (filter >= a.filters) return;
    if (a.partial != nullptr)
      a.partial[(int64_t{split} * slots + slot) * a.filters + filter] = total;
    else if (slot < taps)
      static_cast<T*>(a.grad_weight)[int64_t{filter} * taps + slot] = narrow<T>(total);
    else
      static_cast<T*>(a.grad_bias)[filter] = narrow<T>(total);
  };
  // The products go to shared memory, for lanes to take their taps' sums.
  const int mine = kHead + warp * kProductBytes, put = mine + 4 * (lane / 4 * kPitch + lane % 4 * 2);
#pragma unroll
  for (int m = 0; m < kTiles; ++m)
#pragma unroll
    for (int k = 0; k < kUnits; ++k)
#pragma unroll
      for (int e = 0; e < 2; ++e)
        if (needed(m, k) && 2 * m + e < kUnits)
          shared<float2>(put + 4 * (8 * (2 * m + e) * kPitch + 8 * k)) = {sum[m][k][2 * e], sum[m][k][2 * e + 1]};
  __syncwarp();
#pragma unroll 1
  for (int tap = lane; tap < taps; tap += 32) {
    uint32_t row = tap;
    const int x = static_cast<int>(a.by_columns.split(row)) * a.dilation_w - a.padding_w;
    const int y = static_cast<int>(row) * a.dilation_h - a.padding_h;
    uint64_t pixels = pixels_of(a, y, x) << before;
    int at = mine - (pixels == 0 ? 0 : 4 * (y * a.width + x));
    float total = 0;
#pragma unroll 1
    for (; pixels != 0; pixels >>= kAtOnce, at += 4 * kAtOnce * (kPitch + 1))
#pragma unroll
      for (int k = 0; k < kAtOnce; ++k) {
        const float value = shared<float>(at + 4 * k * (kPitch + 1));
        if (pixels >> k & 1) total += value;
      }
    store(tap, total);
  }
  if (a.grad_bias == nullptr) return;
  for (int offset = 16; offset > 0; offset /= 2) bias += __shfl_xor_sync(~0u, bias, offset);
  if (lane == 0) store(taps, bias);
}

template <typename T, int kReach>
bool launch(const Problem& p, Flat a, const Device& device, const Allocate& allocate, cudaStream_t stream) {
  const auto kernel = flat_grad_weight_nchw<T, kReach>;
  if (!can_overlap(kernel)) return false;  // it is not code for sm_90
  const int64_t slots = p.taps() + (p.bias != nullptr);
  const int64_t bytes = kHead + std::max(kStages * 2 * a.array_bytes, a.planes * kProductBytes) + kTail;
  const int threads = 32 * a.planes;
  const int64_t steps = ceil_div(a.images, kImages);
  static thread_local Decisions<5, Splits> decisions;
  a.splits = decisions({device.id, steps, a.groups, threads, bytes}, [&] {
               return split_steps(kernel, device, steps, a.groups, threads, bytes, 0);
             }).count;
  if (a.splits > 1) a.partial = static_cast<float*>(allocate(a.splits * slots * p.filters() * int64_t{sizeof(float)}));
  launch_early(kernel, a, int64_t{a.groups} * a.splits, threads, stream, {.shared_bytes = bytes});
  check_launch("flat_grad_weight_nchw");
  if (a.partial != nullptr) launch_add_partial_sums(p, a.partial, a.splits, stream);
  return true;
}

}  // namespace

bool launch_flat_grad_weight_nchw(const Problem& p, const Allocate& allocate, cudaStream_t stream) {
  const Device& device = current_device();
  const int64_t pixels = p.height * p.width;
  const auto reach = [](int64_t kernel, int64_t dilation, int64_t padding) {
    return std::max(padding, (kernel - 1) * dilation - padding);
  };
  const int64_t most =
      reach(p.kernel_h, p.dilation_h, p.padding_h) * p.width + reach(p.kernel_w, p.dilation_w, p.padding_w);
  constexpr int kNear = 8, kFar = 24;
  const auto begins_with_units = [](const View& view) {
    return reinterpret_cast<uintptr_t>(view.data) % kUnit == 0 && 2 * view.stride[0] % kUnit == 0;
  };
  if (device.capability < 90 || p.stride_h > 1 || p.multiplier > 1 || pixels > kMaxPixels || p.out_height != p.height ||
      p.out_width != p.width || most > kFar || p.channels * pixels % 8 != 0 || !begins_with_units(p.input) ||
      !begins_with_units(p.output))
    return false;
  Flat a{};
  a.height = static_cast<int>(p.height), a.width = static_cast<int>(p.width);
  a.grad_weight = p.weight.data, a.grad_bias = p.bias;
  a.kernel_h = static_cast<int>(p.kernel_h), a.kernel_w = static_cast<int>(p.kernel_w);
  a.padding_h = static_cast<int>(p.padding_h), a.padding_w = static_cast<int>(p.padding_w);
  a.dilation_h = static_cast<int>(p.dilation_h), a.dilation_w = static_cast<int>(p.dilation_w);
  a.images = static_cast<int>(p.batch), a.filters = static_cast<int>(p.filters());
  a.source = static_cast<const char*>(p.input.data), a.source_image_bytes = 2 * p.input.stride[0];
  a.grad = static_cast<const char*>(p.output.data), a.grad_image_bytes = 2 * p.output.stride[0];
  // As few planes as give all multiprocessors a block.
  constexpr int64_t kLeast = 4;
  a.planes = static_cast<int>(std::clamp<int64_t>(ceil_div(p.filters(), device.multiprocessors), kLeast, kPlanes));
  a.groups = static_cast<int>(ceil_div(p.filters(), a.planes));
  const int64_t elements = a.planes * pixels, units = elements % 8 == 0 ? elements / 8 : (elements + 14) / 8;
  a.row_bytes = static_cast<int>((units | 1) * kUnit), a.array_bytes = kImages * a.row_bytes;
  a.image_bytes = static_cast<int>(2 * p.filters() * pixels), a.by_columns = Divider(p.kernel_w);
  for (int64_t y = 0; y < p.height; ++y) a.rows |= uint64_t{1} << y * p.width;
  bool served = false;
  visit_dtype(p.dtype, [&](auto zero) {
    using T = decltype(zero);
    if constexpr (sizeof(T) == 2)
      served = most <= kNear ? launch<T, kNear>(p, a, device, allocate, stream)
                             : launch<T, kFar>(p, a, device, allocate, stream);
  });
  return served;
}

}  // namespace dwconv
