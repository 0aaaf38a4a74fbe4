// Claims where there is little to do, and of single taps: straight from memory, in one launch.
//
// Right: offsets of 32 bits, also to taps beside the image.
// Pays: where there is so little to do that most of the time passes until the first bytes arrive. Plans that stage what
// they read in shared memory wait longer for it, and have less to do afterwards: so a claim compares what there is to
// do with what its rival waits, which depends on the rival. These bounds are where measured times cross.
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

// ---------------------------------------------------------------------------- what kernels ask for

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

// ---------------------------------------------------------------------------- what there is to do

// So little that any other plan would wait longer than it takes: a few outputs and tens of products for each thread
// that a GPU has room for.
bool has_little_to_do(const Problem& p) {
  constexpr int64_t kFewSums = 512 << 10, kFewProducts = 4 << 20;
  return sums_over_taps(p) <= kFewSums && sums_over_taps(p) * p.taps() <= kFewProducts;
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

// ---------------------------------------------------------------------------- what else would serve

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

// Whether outputs next to each other meet the same pixels, so that windows in channels_last load these once for all of
// a thread's outputs.
bool shares_pixels(const Problem& p) {
  constexpr int64_t kFewOutputs = 3;
  const int64_t step_h = p.stride_h / std::gcd(p.stride_h, p.dilation_h);
  const int64_t step_w = p.stride_w / std::gcd(p.stride_w, p.dilation_w);
  return p.pass == Pass::kGradInput || p.kernel_h > kFewOutputs * step_h || p.kernel_w > kFewOutputs * step_w;
}

// What the plan that would serve a kernel that is not small takes at least, as gather_time() has it.
double time_of_rival(const Problem& p) {
  constexpr double kSmallPlanes = 1.3, kSharedPixels = 1, kWindows = 3, kPixelsOf16Bits = 1.5, kPlan = 2.5;
  const bool channels_last = writes_channels_last(p);
  if (claims_toeplitz_small_planes(p)) return kSmallPlanes;
  if (channels_last && has_windows(p) && shares_pixels(p)) return kSharedPixels;
  if (!has_plan_of_its_own(p)) return kWindows;
  return channels_last && is_16_bit(p) ? kPixelsOf16Bits : kPlan;
}

// Of small kernels direct.cu is the rival with little to do: it has vectors, sums over filters, and several outputs a
// thread in float64. With more to do those are that stream, which wait for their rows.
bool pays_gather_of_small_kernel(const Problem& p) {
  constexpr int64_t kFewFloat64 = 192 << 10, kManyTaps = 25;
  constexpr double kStreams = 2.1;  // as gather_time() has it
  const bool channels_last = writes_channels_last(p), is_float64 = p.dtype == DType::kFloat64;
  if (p.taps() == 1 || has_direct_vectors(p) || (is_float64 && sums_over_taps(p) > kFewFloat64)) return false;
  if (p.multiplier > 1 && (p.pass == Pass::kGradInput || channels_last)) return false;
  if (has_little_to_do(p)) return true;
  return !is_float64 && !channels_last && p.taps() >= kManyTaps && gather_time(p) <= kStreams &&
         !claims_toeplitz_nchw(p);
}

}  // namespace

// ---------------------------------------------------------------------------- forward and grad_input

// Of a single tap without padding and sums, on arrays without gaps, both in NCHW or both in channels_last: nothing
// takes less than to go along them.
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

bool claims_gather(const Problem& p) {
  if (!can_gather(p)) return false;

  return is_small_kernel(p) ? pays_gather_of_small_kernel(p) : gather_time(p) <= time_of_rival(p);
}

// Of few taps windows have kernels/few_taps.cu, which starts sooner, and at a stride kernels/spread.cu, which has more
// outputs a thread.
bool prefers_few_taps_nchw(const Problem& p) {
  return (has_few_taps(p) || fits_spread(p)) && claims_gather(p) && claims_windows_nchw(p);
}
bool prefers_few_taps_channels_last(const Problem& p) {
  return p.pass == Pass::kForward && has_few_taps(p) && claims_gather(p) && claims_windows_channels_last(p);
}

// Small kernels, with little to do or with arrays that no plan streams; and in float64, which has no other plan of its
// own, up to where windows share more.
bool claims_direct(const Problem& p) {
  if (p.pass == Pass::kGradWeight || !can_direct(p)) return false;

  if (p.dtype == DType::kFloat64) {
    // Where outputs are many windows share pixels in channels_last, and lie side by side in shared memory at a stride.
    constexpr int64_t kManySums = 1 << 20, kShares = 10;
    const bool windows_win = writes_channels_last(p) ? p.taps() >= kShares : !has_unit_stride(p);
    if (windows_win && sums_over_taps(p) >= kManySums) return false;
    return p.taps() <= kDirectFloat64Taps && (p.pass == Pass::kForward || p.stride_h == 1);
  }
  // Without vectors more than few outputs are as many loads.
  constexpr int64_t kFewWithoutVectors = 128 << 10;
  const bool loads_slowly = writes_channels_last(p) && p.multiplier > 1 && sums_over_taps(p) > kFewWithoutVectors;
  if (has_little_to_do(p) && !loads_slowly) return true;
  if (claims_toeplitz_small_planes(p) || claims_toeplitz_nchw(p) || claims_march_nchw(p) || claims_stream_nchw(p) ||
      claims_march_channels_last(p))
    return false;
  // Threads of windows in channels_last have single channels, whose filters they take one by one, where there are many.
  constexpr int64_t kFewTaps = 9, kManyFilters = 3;
  const bool windows_lose =
      p.pass == Pass::kGradInput && has_unit_stride(p) && p.multiplier >= kManyFilters && p.taps() <= kFewTaps;
  return windows_lose || !claims_windows_channels_last(p);
}

// ---------------------------------------------------------------------------- grad_weight

// Where the launcher's own estimate is short: most of it is then the time until the first bytes arrive.
bool claims_gather_grad_weight(const Problem& p) {
  if (p.pass != Pass::kGradWeight || !has_near_taps(p)) return false;

  constexpr int kMultiprocessors = 132;
  constexpr double kFewCycles = 4300, kFewBeforeStreams = 6000;  // rows that stream come later
  const bool channels_last = p.filters() > 1 && p.input.stride[1] == 1 && p.output.stride[1] == 1;
  const bool others_stream = is_small_kernel(p) && !channels_last && p.dtype != DType::kFloat64;
  const double most = others_stream ? kFewBeforeStreams : kFewCycles;
  // So many products take longer in any shape, by what a tap takes to issue alone: no need for the estimate.
  constexpr double kProductsOfCycle = 1900;
  if (static_cast<double>(gradients_per_filter(p) * p.filters() * p.taps()) > most * kProductsOfCycle) return false;
  if (GatherShape::best(p, p.capability >= 90, kMultiprocessors).cycles > most) return false;
  // One tap in channels_last streams, in pixels that follow each other.
  if (is_small_kernel(p)) return !(p.taps() == 1 && channels_last) && !claims_direct_grad_weight(p);
  constexpr int64_t kFewTapsForTensorCores = 25;
  return p.taps() >= kFewTapsForTensorCores || !claims_toeplitz_grad_weight_channels_last(p);
}

// Small kernels of which a block has a filter, so that there is no second kernel: as long as a filter has few products,
// and nothing that streams would have them sooner.
bool claims_direct_grad_weight(const Problem& p) {
  const int64_t gradients = gradients_per_filter(p);
  if (p.pass != Pass::kGradWeight || p.dtype == DType::kFloat64 || !can_direct(p) || gradients == 0) return false;

  const int64_t products_of_filter = gradients * p.taps(), products = p.filters() * products_of_filter;
  // Blocks of a cluster share a filter, for 3x3 alone.
  constexpr int64_t kMostOfClusters = 4 << 20;
  if (p.capability >= 90 && SmallKernel<3, 3, 1, 1>::is_of(p) && products <= kMostOfClusters) return true;
  // One block sums a filter, and has one product for two loads where there is one tap.
  constexpr int64_t kFewOfOneTap = 512;
  if (p.taps() == 1 && gradients > kFewOfOneTap && claims_columns_grad_weight(p)) return false;
  constexpr int64_t kMostOfFilter = 10 << 10, kMost = 8 << 20, kFewForMarch = 64;
  return products_of_filter <= kMostOfFilter && products <= kMost &&
         (gradients <= kFewForMarch || !claims_march_grad_weight_channels_last(p));
}

}  // namespace dwconv
