// Claims for any kernel, stride and dilation: straight from memory, or through windows of shared memory, of arrays that
// lie as they like.
//
// Right: offsets of 32 bits, also to taps beside the image; generic alone counts in 64 and claims everything.
// Pays: where there is so little to do that the time until the first bytes arrive is most of it, and plans that stage
// what they read lose; and otherwise where those are not right. The bounds are where measured times cross.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <numeric>

#include "claims.h"
#include "facts.h"
#include "kernels/direct.h"
#include "kernels/gather.h"
#include "kernels/gather_grad_weight.h"
#include "kernels/small_kernels.h"
#include "kernels/windows_nchw.h"

namespace dwconv {
namespace {

// ---------------------------------------------------------------------------- straight from memory

// What kernels that go straight to memory ask for: offsets of 32 bits, also beside the image.
bool has_near_elements(const Problem& p) {
  constexpr int64_t kLimit = 1 << 30;
  if (p.padding_h >= (1 << 20) || p.padding_w >= (1 << 20)) return false;
  const auto fits = [&](const View& view, int64_t planes, int64_t height, int64_t width) {
    const int64_t images = (p.batch - 1) * view.stride[0], channels = (planes - 1) * view.stride[1];
    const int64_t plane = (height + 2 * p.padding_h) * view.stride[2] + (width + 2 * p.padding_w) * view.stride[3];
    return p.batch * planes * height * width < kLimit && images < kLimit && channels < kLimit && plane < kLimit &&
           images + channels + plane < 2 * kLimit;
  };
  const auto& weight = p.weight.stride;
  return fits(p.input, p.channels, p.height, p.width) && fits(p.output, p.filters(), p.out_height, p.out_width) &&
         (p.filters() - 1) * std::max(weight[0], p.bias_stride) < kLimit && weight[2] < kLimit && weight[3] < kLimit;
}

// What kernels/direct.cu and kernels/direct_grad_weight.cu ask for.
bool can_direct(const Problem& p) {
  return is_small_kernel(p) && has_near_elements(p);
}

// What kernels/gather.cu and kernels/gather_grad_weight.cu ask for: no taps far beside the image, whose offsets 32 bits
// do not count.
bool has_near_taps(const Problem& p) {
  constexpr int64_t kFar = 1 << 20;
  return p.batch > 0 && std::max({p.kernel_h, p.kernel_w, p.stride_h, p.stride_w}) < kFar && extent_h(p) <= kFar &&
         extent_w(p) <= kFar && has_near_elements(p);
}

bool can_gather(const Problem& p) {
  return p.pass != Pass::kGradWeight && has_near_taps(p) && GatherTile(p).fits() &&
         (p.pass == Pass::kForward || std::max(p.stride_h, p.stride_w) <= kGatherStride);
}

// So little that the time until the first bytes arrive is most of it.
bool has_little_to_do(const Problem& p) {
  constexpr int64_t kFewSums = 512 << 10, kFewProducts = 4 << 20;
  return sums_over_taps(p) <= kFewSums && sums_over_taps(p) * p.taps() <= kFewProducts;
}

// Whether direct.cu loads several elements at once, of arrays that begin anywhere.
bool has_direct_vectors(const Problem& p) {
  if (p.dtype == DType::kFloat64 || p.kernel_h != p.kernel_w || p.taps() == 1 || p.stride_h > 1 || p.dilation_h > 1)
    return false;
  constexpr int64_t kVector = 2;
  const auto are_whole = [&](const View& view, int64_t across) {
    return ((p.batch > 1 ? view.stride[0] : 0) | view.stride[2] | across) % kVector == 0;
  };
  if (writes_channels_last(p))
    return p.multiplier == 1 && p.channels % kVector == 0 && p.input.stride[1] == 1 && p.output.stride[1] == 1 &&
           are_whole(p.input, p.input.stride[3]) && are_whole(p.output, p.output.stride[3]);
  return (p.pass == Pass::kForward || p.multiplier == 1) && p.padding_w == p.kernel_w / 2 && p.width % kVector == 0 &&
         p.input.stride[3] == 1 && p.output.stride[3] == 1 && are_whole(p.input, p.input.stride[1]) &&
         are_whole(p.output, p.output.stride[1]);
}

// Kernels that are not small have plans of their own at stride 1, and with dilation in 16 bits in NCHW.
bool has_plan_of_its_own(const Problem& p) {
  return p.dtype != DType::kFloat64 && has_unit_stride(p) && (has_unit_dilation(p) || (is_16_bit(p) && have_rows(p)));
}

// Taps that reach an output, at most: in grad_input those that a stride leaves out reach others.
int64_t taps_of_output(const Problem& p) {
  const auto reaching = [&](int64_t kernel, int64_t stride, int64_t dilation) {
    const int64_t step = p.pass == Pass::kForward ? 1 : stride / std::gcd(stride, dilation);
    return (kernel + step - 1) / step;
  };
  return reaching(p.kernel_h, p.stride_h, p.dilation_h) * reaching(p.kernel_w, p.stride_w, p.dilation_w);
}

// Microseconds that a GPU of 132 multiprocessors takes to gather all taps, without what the smallest problem takes.
double gather_time(const Problem& p) {
  constexpr double kOfMicrosecond = 2.3e6, kOfOutput = 16;  // taps, and what an output takes besides, in taps
  constexpr double kTogether = 25;                          // taps that are loaded together
  const double latency = p.dtype == DType::kFloat64 ? 1 : 0.35;
  const auto outputs = static_cast<double>(sums_over_taps(p)), taps = static_cast<double>(taps_of_output(p));
  // A thread has two outputs where the rows that they read lie next to each other, or but one: they share weights and
  // most pixels.
  const bool two = p.dtype != DType::kFloat64 && p.stride_h % p.dilation_h == 0 &&
                   (p.pass == Pass::kGradInput || p.stride_h <= 2 * p.dilation_h);
  return outputs * (two ? 0.5 * kOfOutput + 0.65 * taps : kOfOutput + taps) / kOfMicrosecond +
         std::ceil(taps / kTogether - 1) * latency;
}

// ---------------------------------------------------------------------------- grad_weight

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

// Whether windows are what else serves, rather than a plan of a kernel's own.
bool has_windows(const Problem& p) {
  if (!has_plan_of_its_own(p)) return true;
  if (!writes_channels_last(p)) return p.dtype == DType::kFloat32;
  return p.dtype == DType::kFloat32 ? !claims_large_float32(p) : prefers_windows_channels_last(p);
}

// So few taps that reach an output that next to nothing is in flight together.
bool has_few_taps(const Problem& p) {
  constexpr int64_t kFewTaps = 4;
  const bool spreads = p.pass == Pass::kGradInput && !has_unit_stride(p);
  return p.pass != Pass::kGradWeight && !spreads && !is_small_kernel(p) && taps_of_output(p) <= kFewTaps &&
         has_windows(p);
}

// ---------------------------------------------------------------------------- flat kernels

// One row or column of taps, of which a tile, or a band matrix, would mostly be zeros.
bool is_flat(const Problem& p) {
  constexpr int64_t kMostTaps = 32;  // more of them have not been measured
  return std::min(p.kernel_h, p.kernel_w) == 1 && p.taps() <= kMostTaps;
}

}  // namespace

// ---------------------------------------------------------------------------- forward and grad_input

bool claims_scale(const Problem& p) {
  if (p.pass == Pass::kGradWeight || p.taps() > 1 || p.multiplier > 1 || p.batch == 0) return false;
  if (p.padding_h > 0 || p.padding_w > 0) return false;
  const bool spreads = !has_unit_stride(p);  // then gradients may lie anywhere
  if (spreads && (p.pass == Pass::kForward || !has_near_elements(p))) return false;
  // Elements are counted in 32 bits, and a block may count beyond the last.
  constexpr int64_t kMost = (int64_t{1} << 31) - (1 << 16);
  const int64_t image = p.channels * p.height * p.width;
  if (p.height > kMost / p.width || p.channels > kMost / (p.height * p.width) || p.batch > kMost / image) return false;
  const auto lies = [&](const View& view, int64_t channel, int64_t row, int64_t column) {
    return (p.batch == 1 || view.stride[0] == image) && (p.channels == 1 || view.stride[1] == channel) &&
           (p.height == 1 || view.stride[2] == row) && (p.width == 1 || view.stride[3] == column);
  };
  const auto both_lie = [&](int64_t channel, int64_t row, int64_t column) {
    return lies(p.input, channel, row, column) && (spreads || lies(p.output, channel, row, column));
  };
  return both_lie(p.height * p.width, p.width, 1) || both_lie(1, p.width * p.channels, p.channels);
}

bool claims_direct(const Problem& p) {
  if (p.pass == Pass::kGradWeight || !can_direct(p)) return false;
  // Threads of windows in channels_last have single channels, whose filters they take one by one, where there are many.
  constexpr int64_t kFewTaps = 9, kManyFilters = 3;
  const bool windows_lose =
      p.pass == Pass::kGradInput && has_unit_stride(p) && p.multiplier >= kManyFilters && p.taps() <= kFewTaps;
  if (p.dtype != DType::kFloat64)
    return has_little_to_do(p) ||
           !(claims_march_nchw(p) || claims_stream_nchw(p) || claims_toeplitz_nchw(p) ||
             claims_march_channels_last(p) || (claims_windows_channels_last(p) && !windows_lose));
  // Where outputs are many windows share pixels in channels_last, and lie side by side in shared memory at a stride.
  constexpr int64_t kManySums = 1 << 20, kShares = 10;
  const bool windows_win = writes_channels_last(p) ? p.taps() >= kShares : !has_unit_stride(p);
  if (windows_win && sums_over_taps(p) >= kManySums) return false;
  return p.taps() <= kDirectFloat64Taps && (p.pass == Pass::kForward || p.stride_h == 1);
}

bool claims_gather(const Problem& p) {
  if (!can_gather(p)) return false;

  const bool channels_last = writes_channels_last(p), is_float64 = p.dtype == DType::kFloat64;
  // How long it may take before others are faster, by what they are: microseconds, as gather_time() has them.
  constexpr double kOfSmallPlanes = 1.3, kOfPixels = 1.5, kOfStreams = 2.1, kOfPlan = 2.5;
  constexpr double kOfWindows = 3, kOfSharedPixels = 1;
  if (is_small_kernel(p)) {
    constexpr int64_t kFewFloat64 = 192 << 10;  // sums; with more, a thread has several in direct.cu
    if (p.taps() == 1 || has_direct_vectors(p) || (is_float64 && sums_over_taps(p) > kFewFloat64)) return false;
    if (p.multiplier > 1 && (p.pass == Pass::kGradInput || channels_last)) return false;
    return has_little_to_do(p) || (!is_float64 && p.taps() >= 25 && gather_time(p) <= kOfStreams && !channels_last &&
                                   !claims_toeplitz_nchw(p));
  }
  const bool has_plan = has_plan_of_its_own(p);
  // In channels_last windows load a pixel once for all outputs of a column that meet it.
  constexpr int64_t kFewOutputs = 3;
  const int64_t step_h = p.stride_h / std::gcd(p.stride_h, p.dilation_h);
  const int64_t step_w = p.stride_w / std::gcd(p.stride_w, p.dilation_w);
  const bool shares =
      p.pass == Pass::kGradInput || p.kernel_h > kFewOutputs * step_h || p.kernel_w > kFewOutputs * step_w;
  const double most = claims_toeplitz_small_planes(p)             ? kOfSmallPlanes
                      : channels_last && has_windows(p) && shares ? kOfSharedPixels
                      : !has_plan                                 ? kOfWindows
                      : channels_last && is_16_bit(p)             ? kOfPixels
                                                                  : kOfPlan;
  return gather_time(p) <= most;
}

// Of few taps windows have kernels/few_taps.cu, which starts sooner.
bool prefers_few_taps_nchw(const Problem& p) {
  return has_few_taps(p) && claims_gather(p) && claims_windows_nchw(p);
}
bool prefers_few_taps_channels_last(const Problem& p) {
  return p.pass == Pass::kForward && has_few_taps(p) && claims_gather(p) && claims_windows_channels_last(p);
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
  constexpr int64_t kShortBand = 16, kMillion = 1 << 20;
  constexpr double kFew = 4 * kMillion, kFewForCopies = 24 * kMillion, kFewOfBand = 64 * kMillion;
  if (claims_toeplitz_channels_last(p))
    return sums_over_taps(p) <= 4 * kMillion / p.taps() ||
           (is_flat(p) && (p.taps() <= kShortBand || products(p) <= kFewOfBand));
  if (!writes_channels_last(p)) return false;
  if (claims_toeplitz_large(p)) return products(p) <= kFewForCopies;
  return claims_large_float32(p) && (is_flat(p) || products(p) <= kFew);
}

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

// ---------------------------------------------------------------------------- grad_weight

bool claims_direct_grad_weight(const Problem& p) {
  const int64_t gradients = gradients_per_filter(p);
  if (p.pass != Pass::kGradWeight || p.dtype == DType::kFloat64 || !can_direct(p) || gradients == 0) return false;

  const int64_t products_of_filter = gradients * p.taps(), products = p.filters() * products_of_filter;
  // Blocks of a cluster share a filter, for 3x3 alone.
  constexpr int64_t kMostOfClusters = 4 << 20;
  if (p.capability >= 90 && SmallKernel<3, 3, 1, 1>::is_of(p) && products <= kMostOfClusters) return true;
  // One block sums a filter, and has one product for two loads where there is one tap.
  constexpr int64_t kFewOfOneTap = 512;
  if (p.taps() == 1 && gradients > kFewOfOneTap && can_columns_grad_weight(p)) return false;
  constexpr int64_t kMostOfFilter = 10 << 10, kMost = 8 << 20, kFewForMarch = 64;
  return products_of_filter <= kMostOfFilter && products <= kMost &&
         (gradients <= kFewForMarch || !claims_march_grad_weight_channels_last(p));
}

bool claims_gather_grad_weight(const Problem& p) {
  if (p.pass != Pass::kGradWeight || !has_near_taps(p)) return false;

  constexpr int kMultiprocessors = 132;
  constexpr double kFewCycles = 4300,
                   kMoreCycles = 6000;  // most of it until the first bytes arrive; before rows stream
  const bool channels_last = p.filters() > 1 && p.input.stride[1] == 1 && p.output.stride[1] == 1;
  const bool others_stream = is_small_kernel(p) && !channels_last && p.dtype != DType::kFloat64;
  const double most = others_stream ? kMoreCycles : kFewCycles;
  // So many products take longer in any shape, by what a tap takes to issue alone.
  constexpr double kProductsOfCycle = 1900;
  if (static_cast<double>(gradients_per_filter(p) * p.filters() * p.taps()) > most * kProductsOfCycle) return false;
  if (GatherShape::best(p, p.capability >= 90, kMultiprocessors).cycles > most) return false;
  // One tap in channels_last streams, in pixels that follow each other.
  if (is_small_kernel(p)) return !(p.taps() == 1 && channels_last) && !claims_direct_grad_weight(p);
  constexpr int64_t kFewTapsForTensorCores = 25;
  return p.taps() >= kFewTapsForTensorCores || !claims_toeplitz_grad_weight_channels_last(p);
}

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
  return claims_large_float32_grad_weight(p) && (few(16, kMoreSums) || is_flat(p));
}

// ---------------------------------------------------------------------------- every pass

bool claims_generic(const Problem&) {
  return true;
}

}  // namespace dwconv
