// Claims for any kernel, stride and dilation, of arrays that lie as they like: through windows in registers, or
// straight from memory.
//
// Right: sizes and offsets that 32 bits count, also to taps beside the image; generic alone counts in 64 and claims
// everything.
// Pays: where no other plan is right; and, by kPreferences, where these have less to do before the first products than
// plans for larger problems. The bounds are where measured times cross.
#include <algorithm>
#include <cstdint>

#include "claims.h"
#include "facts.h"
#include "kernels/small_kernels.h"
#include "kernels/windows_nchw.h"

namespace dwconv {
namespace {

// One row or column of taps, of which a tile, or a band matrix, would mostly be zeros.
bool is_flat(const Problem& p) {
  constexpr int64_t kMostTaps = 32;  // more of them have not been measured
  return std::min(p.kernel_h, p.kernel_w) == 1 && p.taps() <= kMostTaps;
}

// What kernels/columns_grad_weight.cu asks for: columns that lie side by side, rather than channels, and what 32 bits
// count: rows and columns with those beside the image, steps from one to the next, sums, and gradients of a filter.
bool can_columns_grad_weight(const Problem& p) {
  if (p.pass != Pass::kGradWeight || p.batch == 0) return false;
  constexpr int64_t kMany = 1 << 26, kSteps = 1 << 22, kMost = 1 << 28;
  const auto lies = [](const View& view, int64_t channels, int64_t pixels) {
    return (channels == 1 || pixels == 1 || view.stride[1] != 1) && std::max(view.stride[2], view.stride[3]) < kMost;
  };
  const auto fits = [](int64_t size, int64_t stride, int64_t padding, int64_t dilation) {
    return std::max({size, padding, stride, dilation}) < kMany && stride * dilation < kSteps;
  };
  return lies(p.input, p.channels, p.height * p.width) && lies(p.output, p.filters(), p.out_height * p.out_width) &&
         fits(p.height, p.stride_h, p.padding_h, p.dilation_h) &&
         fits(p.width, p.stride_w, p.padding_w, p.dilation_w) && p.batch < kMost / p.out_height / p.out_width &&
         p.filters() < kMost / (p.taps() + 1);
}

}  // namespace

// ---------------------------------------------------------------------------- forward and grad_input

bool claims_windows_nchw(const Problem& p) {
  const bool channels_last = target_of(p).stride[1] == 1 && target_channels(p) > 1;  // has windows_channels_last
  return p.pass != Pass::kGradWeight && !channels_last && fits_windows_nchw(p);
}

// large_float32 would serve as well, but more slowly: of few taps, of many pixels also one column of them, and of
// planes so few and small that most of a GPU's threads would have none.
bool prefers_windows_nchw(const Problem& p) {
  constexpr int64_t kFewTaps = 16, kFewSums = 64 << 10, kManySums = 1 << 20;
  const int64_t sums = sums_over_taps(p);
  return (p.taps() <= kFewTaps || sums <= kFewSums || (p.kernel_w == 1 && sums >= kManySums)) &&
         claims_windows_nchw(p) && claims_large_float32(p);
}

// What the kernel asks for: channels side by side, and sizes that 32 bits count. Images may lie
// anywhere.
bool claims_windows_channels_last(const Problem& p) {
  constexpr int64_t kMany = 1 << 20, kMost = 1 << 30, kMostTaps = 255, kFar = 1 << 10;
  if (p.pass == Pass::kGradWeight || p.batch == 0) return false;
  if (std::max(p.kernel_h, p.kernel_w) > kMostTaps || std::max(p.padding_h, p.padding_w) > kMany) return false;
  if (std::max({p.stride_h, p.stride_w, p.dilation_h, p.dilation_w}) > kFar) return false;
  // Rows and columns that a thread may count beside the planes.
  constexpr int64_t kRows = 16;
  const int64_t beside_h = 2 * p.padding_h + kRows * p.stride_h * p.dilation_h + p.kernel_h * p.dilation_h;
  const int64_t beside_w = 2 * p.padding_w + kRows * p.stride_w * p.dilation_w + p.kernel_w * p.dilation_w;
  const auto fits = [&](const View& view, int64_t planes, int64_t height, int64_t width) {
    if ((view.stride[1] != 1 && planes > 1) || planes > kMany || height > kMost || width > kMost) return false;
    const int64_t row = height == 1 ? planes : view.stride[2], column = width == 1 ? planes : view.stride[3];
    if (row > kMost || column > kMost) return false;
    return (height + beside_h) * row + (width + beside_w) * column + planes < kMost &&
           height + beside_h < kMost / (width + beside_w) / p.batch / (planes / 8 + 1);
  };
  const auto& weight = p.weight.stride;
  return fits(p.input, p.channels, p.height, p.width) && fits(p.output, p.filters(), p.out_height, p.out_width) &&
         p.filters() * std::max({weight[0], p.bias_stride, p.taps()}) + p.kernel_h * weight[2] +
                 p.kernel_w * weight[3] <
             kMost / 16;
}

// Kernels for larger problems would serve as well, but more slowly: of a flat kernel, and where few products are done
// before matrices, or copies of the images as planes, are there.
bool prefers_windows_channels_last(const Problem& p) {
  if (is_small_kernel(p) || !claims_windows_channels_last(p)) return false;
  constexpr int64_t kMillion = 1 << 20, kFew = 4 * kMillion, kFewForCopies = 24 * kMillion;
  if (claims_toeplitz_channels_last(p)) {
    // Matrices are as long as a band, which a short one fills little of. Taps beside the image are multiplied as well.
    constexpr int64_t kShortBand = 16, kFewOfBand = 64 * kMillion;
    if (is_flat(p) && (p.taps() <= kShortBand || products(p) <= kFewOfBand)) return true;
    return sums_over_taps(p) <= kFew / p.taps();
  }
  if (!writes_channels_last(p)) return false;
  if (claims_toeplitz_large(p)) return products(p) <= kFewForCopies;
  return claims_large_float32(p) && (is_flat(p) || products(p) <= kFew);
}

// ---------------------------------------------------------------------------- grad_weight

// Of what kernels for any size claim, that where they have more to do than products: where there are few of these; in
// 16 bits, where taps fill few places of a tile of 8 x 16 on tensor cores; and lower kernels of one column in float32.
bool claims_columns_grad_weight(const Problem& p) {
  if (!can_columns_grad_weight(p)) return false;

  const double products = static_cast<double>(gradients_per_filter(p) * p.filters() * p.taps());
  constexpr double kFew = 8e6, kMoreForHankel = 16e6;
  if (products <= kFew) return true;
  if (claims_outer_grad_weight(p)) return false;
  if (claims_hankel_grad_weight(p)) {
    const int64_t tiles = (p.kernel_h + 7) / 8 * ((p.kernel_w + 15) / 16);
    return products <= kMoreForHankel || 12 * p.taps() < 8 * 16 * tiles;
  }
  constexpr int64_t kMostRows = 16;  // taller columns fill the tiles of large_float32_grad_weight
  return (p.kernel_w == 1 && p.kernel_h <= kMostRows) || !claims_large_float32_grad_weight(p);
}

// So few products that 16 images are not worth waiting for.
bool prefers_columns_grad_weight(const Problem& p) {
  constexpr int64_t kFewProducts = 6 << 20;
  return p.pass == Pass::kGradWeight && gradients_per_filter(p) * p.filters() * p.taps() <= kFewProducts &&
         claims_columns_grad_weight(p) && claims_batch_grad_weight_nchw(p);
}

// What the kernel asks for: channels side by side, offsets of 32 bits, also beside the image, and gradients, sums and
// blocks that 32 bits count.
bool claims_walk_grad_weight_channels_last(const Problem& p) {
  if (p.pass != Pass::kGradWeight || p.batch == 0 || p.filters() == 1) return false;
  if ((p.input.stride[1] != 1 && p.channels > 1) || p.output.stride[1] != 1) return false;
  constexpr int64_t kLimit = 1 << 30, kFar = 1 << 20, kMostSums = 1 << 26, kMostTaps = 1 << 16;
  constexpr int64_t kAhead = 8;  // pixels beside the image that a thread counts
  if (std::max({p.padding_h, p.padding_w, p.stride_h, p.stride_w, p.dilation_h, p.dilation_w}) >= kFar) return false;
  const int64_t ahead_h = kAhead * p.stride_h * p.dilation_h, ahead_w = kAhead * p.stride_w * p.dilation_w;
  const auto fits = [&](const View& view, int64_t height, int64_t width) {
    const int64_t rows = height + 2 * p.padding_h + ahead_h, columns = width + 2 * p.padding_w + ahead_w;
    return (p.batch - 1) * view.stride[0] < kLimit && rows * view.stride[2] + columns * view.stride[3] < kLimit;
  };
  return p.taps() < kMostTaps && p.filters() * (p.taps() + 1) < kMostSums &&
         gradients_per_filter(p) * p.filters() < kLimit && fits(p.input, p.height, p.width) &&
         fits(p.output, p.out_height, p.out_width);
}

// There is so little to do that it is done before a kernel for larger problems, which would serve as well, has its
// first pixels where it wants them: few products, and, but where that one copies the images first, few sums.
bool prefers_walk_grad_weight_channels_last(const Problem& p) {
  if (!claims_walk_grad_weight_channels_last(p)) return false;
  constexpr int64_t kMillion = 1 << 20, kFewSums = 4096, kMoreSums = 8192, kFewTaps = 9;
  const int64_t sums = p.filters() * p.taps();
  const auto few = [&](int64_t millions, int64_t most_sums) {
    return sums <= most_sums && products(p) <= static_cast<double>(millions * kMillion);
  };
  if (claims_toeplitz_grad_weight_channels_last(p)) return few(3, kFewSums);
  if (claims_march_grad_weight_channels_last(p)) {
    if (p.taps() > kFewTaps) return few(5, kFewSums);
    constexpr int64_t kSmallPixel = 64;  // bytes, which leave lanes idle there
    return p.multiplier == 1 &&
           (p.taps() == 1 ? few(2, kFewSums) : few(8, kFewSums) && p.channels * size_of(p.dtype) <= kSmallPixel);
  }
  if (claims_outer_grad_weight(p)) return few(8, kFewSums) || is_flat(p);
  if (claims_hankel_grad_weight(p)) return few(24, kMoreSums) || p.taps() <= kFewTaps || is_flat(p);
  // Small planes are few tiles there, which more taps than few fill even if they are flat.
  constexpr int64_t kSmallPlane = 2048;
  const bool fills = p.taps() > kFewTaps && p.out_height * p.out_width < kSmallPlane;
  return claims_large_float32_grad_weight(p) && (few(16, kMoreSums) || (is_flat(p) && !fills));
}

// ---------------------------------------------------------------------------- every pass

bool claims_generic(const Problem&) {
  return true;
}

}  // namespace dwconv
