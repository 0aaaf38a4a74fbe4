// What kernels of grad_weight in 16 bits share that sum over images on tensor cores: matrices have 16 images as their
// columns and as their rows, so a product is of some pixels of the input and some of the gradient, and where these lie
// within a plane is the same for all images.
//
// A group of filters is one of several splits' work, each of which takes some steps of 16 images. What splits have
// summed up is added by the first one of a cluster of two blocks, or by a second kernel.
//
// Zeros that are multiplied in place of what lies outside of the image are exact unless the other factor is Inf or NaN.
// So sums that are finite are right, and the others are taken again, product by product (sum_inside).
#pragma once

#include "cluster_sums.cuh"
#include "tensor_cores.cuh"
#include "weight_sums.cuh"

namespace dwconv {

constexpr int kImages = 16;  // that are multiplied together

// The problem in 32 bits, and where its sums go.
struct ImageSums {
  int height, width, out_height, out_width;
  int kernel_h, kernel_w, padding_h, padding_w, dilation_h, dilation_w, stride;
  int images, filters, multiplier;
  WeightSums result;

  void take(const Problem& p) {
    const auto narrow = [](int64_t size) { return static_cast<int>(size); };
    height = narrow(p.height), width = narrow(p.width);
    out_height = narrow(p.out_height), out_width = narrow(p.out_width);
    kernel_h = narrow(p.kernel_h), kernel_w = narrow(p.kernel_w);
    padding_h = narrow(p.padding_h), padding_w = narrow(p.padding_w);
    dilation_h = narrow(p.dilation_h), dilation_w = narrow(p.dilation_w), stride = narrow(p.stride_h);
    images = narrow(p.batch), filters = narrow(p.filters()), multiplier = narrow(p.multiplier);
  }

  __device__ int taps() const { return kernel_h * kernel_w; }
  // Sums of a filter: behind those of the taps that of the bias.
  __device__ int slots() const { return taps() + result.with_bias(); }
  // From a gradient's place in the input, which is its own times the stride, to that of a tap's pixel.
  __device__ int row_of(int tap) const { return tap / kernel_w * dilation_h - padding_h; }
  __device__ int column_of(int tap) const { return tap % kernel_w * dilation_w - padding_w; }
};

// The same by bands of rows of planes that are too large to be loaded at once.
struct BandSums : ImageSums {
  int chunk_rows, bands;  // of the gradient; bands of whole planes: 1
  Divider by_bands;
};

// The rows that a step of a block works on, of 16 images.
struct Step {
  int image, images;
  int row, rows;                 // of the gradient
  int source_begin, source_end;  // of the input
};

__device__ inline Step step_of(const BandSums& a, int number) {
  uint32_t images = number;
  Step s;
  s.row = static_cast<int>(a.by_bands.split(images)) * a.chunk_rows;
  s.rows = min(a.chunk_rows, a.out_height - s.row);
  s.image = static_cast<int>(images) * kImages;
  s.images = min(kImages, a.images - s.image);
  s.source_begin = 0, s.source_end = a.height;
  if (a.bands > 1) {
    const int begin = s.row * a.stride - a.padding_h;
    s.source_begin = min(max(begin, 0), a.height);
    s.source_end =
        max(min(begin + (s.rows - 1) * a.stride + (a.kernel_h - 1) * a.dilation_h + 1, a.height), s.source_begin);
  }
  return s;
}

// The steps of one of several splits.
struct Steps {
  int first, last;

  __device__ Steps(int all, int splits, int split) {
    const int whole = all / splits, more = all % splits;
    first = split * whole + min(split, more), last = first + whole + (split < more);
  }
};

__device__ inline float sum_of_lanes(float value) {
  for (int offset = 16; offset > 0; offset /= 2) value += __shfl_xor_sync(~0u, value, offset);
  return value;
}

// Adds 8 gradients of 16 images each to a warp's part of the bias gradient.
template <typename T>
__device__ void add_to_bias(float (&bias)[4], const uint32_t (&gradients)[2], T) {
  constexpr uint32_t kOnes = std::is_same_v<T, __half> ? 0x3c003c00u : 0x3f803f80u;
  multiply(bias, bias, {kOnes, kOnes, kOnes, kOnes}, gradients, T{});
}
// Every row of that product is the same: of a lane's two sums in it, and all lanes', the total.
__device__ inline float total_of_bias(float first, float second) {
  float total = first + second;
  total += __shfl_xor_sync(~0u, total, 1);
  return total + __shfl_xor_sync(~0u, total, 2);
}

// A lane's part of a tap's sum of some images and rows of the gradient, by products inside the image only. takes(row,
// column): whether a gradient is to be taken. Arrays have a `base` and `image_bytes` from one image to the next.
template <typename T, class Array, typename Takes>
__device__ float sum_inside(const ImageSums& a, const Array& source, const Array& grad, int filter, int tap, int image,
                            int images, int row, int rows, Takes takes) {
  const int i = a.row_of(tap), j = a.column_of(tap);
  float sum = 0;
  for (int n = image; n < image + images; ++n) {
    const auto* from = reinterpret_cast<const T*>(source.base + n * source.image_bytes);
    const auto* by = reinterpret_cast<const T*>(grad.base + n * grad.image_bytes);
    for (int at = threadIdx.x % 32; at < rows * a.out_width; at += 32) {
      const int r = row + at / a.out_width, v = at % a.out_width, y = r * a.stride + i, x = v * a.stride + j;
      if (y >= 0 && y < a.height && x >= 0 && x < a.width && takes(r, v))
        sum = fmaf(widen(from[(filter / a.multiplier * a.height + y) * a.width + x]),
                   widen(by[(filter * a.out_height + r) * a.out_width + v]), sum);
    }
  }
  return sum;
}

// Sums of all blocks of a cluster, in the shared memory of the first one.
struct Totals {
  int place, filters, slots;  // of a block

  __device__ int of(int split, int filter, int slot) const {
    return place + 4 * ((split * filters + filter) * slots + slot);
  }
  __device__ void send(int split, int filter, int slot, float total) const {
    send_to_first(of(split, filter, slot), total, kTotalsBarrier);
  }
  // By all threads of the first block, when all have sent theirs.
  template <typename T>
  __device__ void put(const WeightSums& result, int splits, int first_filter) const {
    wait(kTotalsBarrier, 0);
    for (int at = threadIdx.x; at < filters * slots; at += blockDim.x) {
      const int filter = at / slots, slot = at % slots;
      float total = 0;
      for (int split = 0; split < splits; ++split) total += shared<float>(of(split, filter, slot));
      result.put<T>(first_filter + filter, 0, slot, total);
    }
  }
};

}  // namespace dwconv
