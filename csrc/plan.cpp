#include "plan.h"

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <iterator>
#include <stdexcept>
#include <string>

#include "claims.h"
#include "facts.h"
#include "kernels/small_kernels.h"

namespace dwconv {
namespace {

// Every plan, in order of preference: the first one that claims a problem serves it, but for what kPreferences says.
// What each claims is in claims.h.
constexpr Plan kPlans[] = {
    // What was asked for.
    {PlanId::kFft, "fft", "a large kernel in float32, and Fourier transforms are allowed: one for each plane",
     claims_fft},
    {PlanId::kFftGradWeight, "fft_grad_weight",
     "a large kernel in float32, and Fourier transforms are allowed: one for each plane of input and gradient",
     claims_fft_grad_weight},
    // Little to do, and single taps.
    {PlanId::kScale, "scale",
     "a kernel of one tap on arrays without gaps: every pixel times a weight, at a stride with zeros between",
     claims_scale},
    {PlanId::kGather, "gather", "any kernel with little to do: a thread gathers an output straight from memory",
     claims_gather},
    {PlanId::kDirect, "direct",
     "a small kernel with little to do, in float64, or on views that do not stream: straight from memory",
     claims_direct},
    {PlanId::kGatherGradWeight, "gather_grad_weight",
     "any kernel with little to do: a block sums some taps straight from memory", claims_gather_grad_weight},
    {PlanId::kDirectGradWeight, "direct_grad_weight", "a small kernel with few gradients: straight from memory",
     claims_direct_grad_weight},
    // Small kernels on contiguous planes.
    {PlanId::kToeplitzSmallPlanes, "toeplitz_small_planes",
     "a small kernel in 16 bits on contiguous planes of few columns: tensor cores multiply rows of many images",
     claims_toeplitz_small_planes},
    {PlanId::kBatchGradWeightNchw, "batch_grad_weight_nchw",
     "a small kernel in 16 bits on contiguous planes of many images: tensor cores sum over the images",
     claims_batch_grad_weight_nchw},
    {PlanId::kToeplitzNchw, "toeplitz_nchw",
     "a small kernel in 16 bits on contiguous planes: rows stream through shared memory to tensor cores",
     claims_toeplitz_nchw},
    {PlanId::kToeplitzGradWeightNchw, "toeplitz_grad_weight_nchw",
     "a small kernel in 16 bits on contiguous planes: input and gradient stream through shared memory to tensor "
     "cores",
     claims_toeplitz_grad_weight_nchw},
    {PlanId::kMarchNchw, "march_nchw",
     "7x7, also forward at stride 2, 9x9 or dilated 3x3 in float32 on contiguous planes: warps march down the rows, "
     "sums stay in registers",
     claims_march_nchw},
    {PlanId::kStreamNchw, "stream_nchw", "a small kernel on contiguous planes: rows stream through shared memory",
     claims_stream_nchw},
    {PlanId::kMarchGradWeightNchw, "march_grad_weight_nchw",
     "7x7, also at stride 2, or 9x9 in float32 on large contiguous planes: warps march down the rows of input and "
     "gradient, sums stay in registers",
     claims_march_grad_weight_nchw},
    {PlanId::kStreamGradWeightNchw, "stream_grad_weight_nchw",
     "a small kernel on contiguous planes: input and gradient stream through shared memory",
     claims_stream_grad_weight_nchw},
    // Small kernels in channels_last.
    {PlanId::kToeplitzChannelsLast, "toeplitz_channels_last",
     "a kernel in 16 bits in channels_last that is small, or has few rows or columns, or is on small images: rows "
     "stream through shared memory to tensor cores",
     claims_toeplitz_channels_last},
    {PlanId::kMarchChannelsLast, "march_channels_last",
     "a small kernel in channels_last: rows stream through shared memory, sums stay in registers",
     claims_march_channels_last},
    {PlanId::kToeplitzGradWeightChannelsLast, "toeplitz_grad_weight_channels_last",
     "a small kernel in 16 bits in channels_last: input and gradient stream through shared memory to tensor cores",
     claims_toeplitz_grad_weight_channels_last},
    {PlanId::kFlatGradWeightChannelsLast, "flat_grad_weight_channels_last",
     "a kernel of one tap in channels_last whose pixels are no whole units of 16 bytes: threads go along the arrays, "
     "always with the same channels",
     claims_flat_grad_weight_channels_last},
    {PlanId::kMarchGradWeightChannelsLast, "march_grad_weight_channels_last",
     "a small kernel in channels_last: input and gradient stream through shared memory, sums stay in registers",
     claims_march_grad_weight_channels_last},
    // Kernels of any size.
    {PlanId::kPhases, "phases",
     "a large kernel with a stride or a dilation: its phases are copied, and make a problem without, which another "
     "plan serves",
     claims_phases},
    {PlanId::kColumnsGradWeight, "columns_grad_weight",
     "a kernel, stride or dilation that has no plan of its own, or little to do: lanes walk down columns of the "
     "gradient, sums of a tile of taps stay in registers",
     claims_columns_grad_weight},
    {PlanId::kToeplitzLarge, "toeplitz_large",
     "a kernel in 16 bits of a size that has no plan of its own: band matrices on tensor cores, in channels_last on "
     "copies of the images",
     claims_toeplitz_large},
    {PlanId::kOuterGradWeight, "outer_grad_weight",
     "a large kernel in 16 bits, with few columns of the images or few rows of its own: tensor cores sum over the "
     "images",
     claims_outer_grad_weight},
    {PlanId::kHankelGradWeight, "hankel_grad_weight",
     "a kernel in 16 bits of a size that has no plan of its own: input and gradient go to tensor cores, in "
     "channels_last as copies",
     claims_hankel_grad_weight},
    {PlanId::kLargeFloat32, "large_float32",
     "a kernel in float32 of a size that has no plan of its own: planes in shared memory, sums in registers",
     claims_large_float32},
    {PlanId::kLargeFloat32GradWeight, "large_float32_grad_weight",
     "a kernel in float32 of a size that has no plan of its own: input and gradient in shared memory, sums in "
     "registers",
     claims_large_float32_grad_weight},
    // What is left: arrays, strides and dilations of any sort.
    {PlanId::kWindowsNchw, "windows_nchw",
     "a kernel, stride and dilation that nothing is compiled for: windows in shared memory, sums in registers",
     claims_windows_nchw},
    {PlanId::kWalkGradWeightChannelsLast, "walk_grad_weight_channels_last",
     "channels_last, and no plan of its own or little to do: threads walk along rows of the gradient, straight from "
     "memory",
     claims_walk_grad_weight_channels_last},
    {PlanId::kWindowsChannelsLast, "windows_channels_last",
     "channels_last, and no plan of its own or little to do: windows of rows in registers, weights in shared memory",
     claims_windows_channels_last},
    // For tests: plans above, as GPUs before sm_90 run them.
    {PlanId::kToeplitzSmallPlanesPortable, "toeplitz_small_planes_portable",
     "toeplitz_small_planes as GPUs before sm_90 run it", claims_toeplitz_small_planes},
    {PlanId::kToeplitzNchwPortable, "toeplitz_nchw_portable", "toeplitz_nchw as GPUs before sm_90 run it",
     claims_toeplitz_nchw},
    {PlanId::kBatchGradWeightNchwPortable, "batch_grad_weight_nchw_portable",
     "batch_grad_weight_nchw as GPUs before sm_90 run it", claims_batch_grad_weight_nchw},
    {PlanId::kToeplitzGradWeightNchwPortable, "toeplitz_grad_weight_nchw_portable",
     "toeplitz_grad_weight_nchw as GPUs before sm_90 run it", claims_toeplitz_grad_weight_nchw},
    {PlanId::kMarchNchwPortable, "march_nchw_portable", "march_nchw as GPUs before sm_90 run it", claims_march_nchw},
    {PlanId::kMarchGradWeightNchwPortable, "march_grad_weight_nchw_portable",
     "march_grad_weight_nchw as GPUs before sm_90 run it", claims_march_grad_weight_nchw},
    {PlanId::kStreamNchwPortable, "stream_nchw_portable", "stream_nchw as GPUs before sm_90 run it",
     claims_stream_nchw},
    {PlanId::kStreamGradWeightNchwPortable, "stream_grad_weight_nchw_portable",
     "stream_grad_weight_nchw as GPUs before sm_90 run it", claims_stream_grad_weight_nchw},
    // Always right.
    {PlanId::kGeneric, "generic", "no specialised plan claims this problem", claims_generic},
};

// A plan that goes ahead of its place in the table, to before another one, for those of the problems that it claims of
// which `holds` is true.
struct Preference {
  PlanId plan, before;
  bool (*holds)(const Problem&);
};
constexpr Preference kPreferences[] = {
    {PlanId::kWindowsNchw, PlanId::kGather, prefers_few_taps_nchw},
    {PlanId::kWindowsChannelsLast, PlanId::kGather, prefers_few_taps_channels_last},
    {PlanId::kColumnsGradWeight, PlanId::kBatchGradWeightNchw, prefers_columns_grad_weight},
    {PlanId::kWalkGradWeightChannelsLast, PlanId::kBatchGradWeightNchw, prefers_walk_grad_weight_channels_last},
    {PlanId::kMarchChannelsLast, PlanId::kToeplitzChannelsLast, prefers_march_channels_last},
    {PlanId::kWindowsChannelsLast, PlanId::kToeplitzChannelsLast, prefers_windows_channels_last},
    {PlanId::kWindowsNchw, PlanId::kLargeFloat32, prefers_windows_nchw},
};

// A plan's turn. Those that may go ahead have two.
struct Turn {
  const Plan* plan;
  bool (*takes)(const Problem&);
};

const std::vector<Turn>& turns() {
  static const std::vector<Turn> all = [] {
    const auto plan_of = [](PlanId id) {
      return std::find_if(std::begin(kPlans), std::end(kPlans), [&](const Plan& plan) { return plan.id == id; });
    };
    std::vector<Turn> all;
    for (const Plan& plan : kPlans) {
      for (const Preference& ahead : kPreferences)
        if (ahead.before == plan.id) all.push_back({plan_of(ahead.plan), ahead.holds});
      all.push_back({&plan, plan.claims});
    }
    return all;
  }();
  return all;
}

// How many taps on either side of a kernel lie too far from any output's pixel to meet the image, at stride 1.
int64_t far_taps(int64_t size, int64_t kernel, int64_t padding, int64_t dilation) {
  const int64_t reach = (kernel - 1) * dilation - padding - (size - 1);
  return reach <= 0 ? 0 : std::min((reach + dilation - 1) / dilation, padding / dilation);
}

}  // namespace

Problem without_far_taps(const Problem& problem) {
  if (problem.stride_h != 1 || problem.stride_w != 1 || is_small_kernel(problem)) return problem;
  Problem p = problem;
  const auto leave_out = [&](int64_t size, int64_t& kernel, int64_t& padding, int64_t& dilation, int64_t stride) {
    const int64_t far = far_taps(size, kernel, padding, dilation);
    if (p.pass != Pass::kGradWeight)
      p.weight.data = static_cast<char*>(p.weight.data) + size_of(p.dtype) * far * stride;
    kernel -= 2 * far, padding -= far * dilation;
    if (kernel == 1) dilation = 1;
  };
  leave_out(p.height, p.kernel_h, p.padding_h, p.dilation_h, p.weight.stride[2]);
  leave_out(p.width, p.kernel_w, p.padding_w, p.dilation_w, p.weight.stride[3]);
  // Plans are for large kernels of any size; others have to be worth it.
  const int64_t all = problem.taps(), left = p.taps();
  if (left == all || !(is_large_kernel(p) || 2 * left <= all)) return problem;
  // The gradient of other taps needs a launch for zeros, which large kernels in 16 bits take as long for as for many
  // taps.
  if (p.pass == Pass::kGradWeight) {
    constexpr int64_t kMost = (int64_t{1} << 31) - 1;  // counted in 32 bits
    const bool pays = size_of(p.dtype) == 2 ? 2 * left <= all : 8 * left <= 7 * all;
    if (!is_large_kernel(p) || !pays || all > kMost / p.filters()) return problem;
  }
  return p;
}

std::vector<const Plan*> claimants(const Problem& problem) {
  std::vector<const Plan*> found;
  for (const Turn& turn : turns())
    if (turn.takes(problem) && std::find(found.begin(), found.end(), turn.plan) == found.end())
      found.push_back(turn.plan);
  return found;
}

const Plan& choose(const Problem& problem) {
  for (const Turn& turn : turns())
    if (turn.takes(problem)) return *turn.plan;
  std::abort();  // unreachable: the last plan claims everything
}

const Plan& choose(const Problem& problem, std::string_view name) {
  for (const Plan& plan : kPlans) {
    if (plan.name != name) continue;
    if (plan.claims(problem)) return plan;
    throw std::runtime_error("plan '" + std::string(name) + "' does not serve this problem");
  }
  throw std::runtime_error("there is no plan '" + std::string(name) + "'");
}

}  // namespace dwconv
