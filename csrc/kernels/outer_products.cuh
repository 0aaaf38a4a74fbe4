// Products of a row of 56 gradients with one of 56 pixels, summed over what tensor cores sum over: what a warp has in
// registers.
#pragma once

#include "copies.cuh"
#include "planes.cuh"
#include "tensor_cores.cuh"

namespace dwconv {

constexpr int kGrads = 4, kSources = 7, kLong = 8 * kSources;  // pieces of 16 and 8, and columns
constexpr int kHalf = 32;                                      // columns of the first half of the gradients
constexpr int kNear = 16;                                      // columns that products reach over that are near

__device__ inline uint32_t load_word(uint32_t from) {
  uint32_t word;
  asm volatile("ld.shared.b32 %0, [%1];" : "=r"(word) : "r"(from));
  return word;
}

// Which of a pair of places, the first of them `at`, are in [0, size).
__device__ inline uint32_t pair_mask(int at, int size) {
  return (static_cast<unsigned>(at) < static_cast<unsigned>(size) ? 0xffffu : 0u) |
         (static_cast<unsigned>(at + 1) < static_cast<unsigned>(size) ? 0xffff0000u : 0u);
}

// What a block adds up: the images of a split, for a filter.
struct FilterImages {
  int filter, split, first, last;

  template <class Arguments>
  __device__ FilterImages(const Arguments& a, int number) : filter(number), split(0), first(0), last(a.images) {
    if (a.splits == 1) return;
    split = filter / a.filters, filter %= a.filters;
    first = static_cast<int>(int64_t{a.images} * split / a.splits);
    last = static_cast<int>(int64_t{a.images} * (split + 1) / a.splits);
  }
};

// The planes of both images, of the same size and without gaps between rows: bytes from one to the next.
struct PlanePair {
  const char *source, *grad;
  int64_t source_image, source_channel, grad_image, grad_channel;
  int height, width, multiplier;

  // A tap's sum over the images of an item, product by product, for rows and columns of the input that are so far from
  // the gradient's.
  template <typename T, class Item>
  __device__ __noinline__ float sum_by_products(const Item& item, int dy, int dx) const {
    double total = 0;
    for (int image = item.first; image < item.last; ++image) {
      const auto* x =
          reinterpret_cast<const T*>(source + item.filter / multiplier * source_channel + image * source_image);
      const auto* g = reinterpret_cast<const T*>(grad + item.filter * grad_channel + image * grad_image);
      for (int r = max(-dy, 0); r < min(height, height - dy); ++r) {
        float sum = 0;
        for (int w = max(-dx, 0); w < min(width, width - dx); ++w)
          sum = fmaf(widen(x[(r + dy) * width + w + dx]), widen(g[r * width + w]), sum);
        total += sum;
      }
    }
    return static_cast<float>(total);
  }
};

// Those of a problem, whose planes may have rows and columns exchanged.
inline PlanePair pair_of(const ImagePlanes& source, const ImagePlanes& grad, int64_t multiplier) {
  return {source.base,        grad.base,     source.image_bytes, source.channel_bytes,        grad.image_bytes,
          grad.channel_bytes, source.height, source.width,       static_cast<int>(multiplier)};
}

// Waits for the warps that multiply.
[[maybe_unused]] __device__ inline void sync_multiplying(int threads) {
#if __CUDA_ARCH__ >= 800
  asm volatile("barrier.sync.aligned 1, %0;" ::"r"(threads) : "memory");
#endif
}

// Pieces n and n + 1 of the input, as far as they are there.
__device__ inline void load_pair(uint32_t (&x)[4], int n, uint32_t from) {
  if (n + 1 < kSources)
    load_matrices_transposed(x, from + 16 * n);
  else
    load_two_transposed(x[0], x[1], from + 16 * n);
}

// A warp's products: pieces of 16 of the gradient by 8 of the input. The last piece of the gradient is one
// of 8, by 16 of the input: fragments of either matrix lie in registers in the same way.
template <typename T, bool near>
struct OuterProducts {
  static constexpr int kWhole = kGrads - 1, kPairs = (kSources + 1) / 2;
  float sum[kWhole][kSources][4], last[kPairs][4];

  // Whether pieces of so many columns, from the first one on, are near enough to have part in any sum.
  static constexpr bool is_near(int grad, int grads, int source, int sources) {
    return !near || (source - (grad + grads - 1) <= kNear && grad - (source + sources - 1) <= kNear);
  }
  static constexpr bool has(int m, int n) { return n < kSources && is_near(16 * m, 16, 8 * n, 8); }
  static constexpr bool has_last(int pair) { return is_near(16 * kWhole, 8, 16 * pair, 16); }

  __device__ void clear() {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
#pragma unroll
      for (int n = 0; n < kPairs; ++n) last[n][e] = 0;
#pragma unroll
      for (int m = 0; m < kWhole; ++m)
#pragma unroll
        for (int n = 0; n < kSources; ++n) sum[m][n][e] = 0;
    }
  }

  // Adds those of 16 rows, or of 8, with pieces n and n + 1 of the input, as far as they are there. Calls then(m) after
  // the last use of piece m of the gradient.
  template <bool kHalf, typename Then>
  __device__ void add(const uint32_t (&g)[kGrads][4], int n, const uint32_t (&x)[4], Then&& then) {
#pragma unroll
    for (int m = 0; m < kWhole; ++m) {
#pragma unroll
      for (int k = 0; k < 2; ++k)
        if (has(m, n + k)) {
          if constexpr (kHalf)
            multiply(sum[m][n + k], {g[m][0], g[m][1]}, x[2 * k], T{});
          else
            multiply(sum[m][n + k], sum[m][n + k], g[m], {x[2 * k], x[2 * k + 1]}, T{});
        }
      then(m);
    }
    if (has_last(n / 2)) {
      float (&to)[4] = last[n / 2];
      const int other = n + 1 < kSources ? 2 : 0;
      if constexpr (kHalf)
        multiply(to, {x[0], x[other]}, g[kWhole][0], T{});
      else
        multiply(to, to, {x[0], x[other], x[1], x[other + 1]}, {g[kWhole][0], g[kWhole][2]}, T{});
    }
    then(kWhole);
  }
  template <bool kHalf>
  __device__ void add(const uint32_t (&g)[kGrads][4], int n, const uint32_t (&x)[4]) {
    add<kHalf>(g, n, x, [](int) {});
  }
};

}  // namespace dwconv
