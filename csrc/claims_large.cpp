// Claims for kernels of any size, with enough to compute that it decides: band and Hankel matrices, or products with
// the images' columns side by side, on tensor cores; blocks of registers in float32; Fourier transforms.
//
// Right: neither stride nor dilation, as a rule, and padding within the kernel; sizes, tiles and sums that 32 bits
// count. Tensor cores ask for rows, or for channels side by side, of which they make copies with rows.
// Pays: taps that fill matrices, planes that fill tiles, and more to do than to copy.
#include <algorithm>
#include <cmath>
#include <cstdint>

#include "claims.h"
#include "facts.h"
#include "kernels/fft.h"
#include "kernels/outer_grad_weight.h"
#include "kernels/phases.h"
#include "kernels/toeplitz_large.h"
#include "plan.h"

namespace dwconv {
namespace {

// ---------------------------------------------------------------------------- tensor cores

bool can_toeplitz_large(const Problem& p) {
  if (!has_tensor_cores(p) || p.pass == Pass::kGradWeight || p.batch == 0) return false;
  if (p.stride_h != p.stride_w || p.stride_h > 2 || !has_unit_dilation(p) || !pads_within_kernel(p)) return false;
  if (p.pass == Pass::kGradInput && (p.stride_h > 1 || p.multiplier > 1)) return false;
  if (!can_have_rows(p)) return false;
  // Sizes, pixels of a plane, and tiles of 16 x 16 outputs are counted in 32 bits.
  constexpr int64_t kLimit = 1 << 24, kMost = 1 << 30;
  for (const int64_t size :
       {p.height, p.width, p.out_height, p.out_width, p.kernel_h, p.kernel_w, p.batch, p.filters()})
    if (size > kLimit) return false;
  const int64_t height = std::max(p.height, p.out_height), width = std::max(p.width, p.out_width);
  if (height > kMost / width) return false;
  if (p.batch * p.filters() > kMost / ((height + 15) / 16) / ((width + 15) / 16)) return false;
  return least_large_bytes(p) <= p.shared_memory;
}

bool can_hankel_grad_weight(const Problem& p) {
  if (p.pass != Pass::kGradWeight || !has_tensor_cores(p) || p.batch == 0) return false;
  if (!has_unit_steps(p) || !pads_within_kernel(p) || !can_have_rows(p)) return false;
  // Rows and columns, sums and pieces of images are counted in 32 bits.
  constexpr int64_t kMany = 1 << 20, kMost = 1 << 30;
  const auto many = [&](int64_t height, int64_t width) {
    return height > kMany || width > kMany || height * width > kMost;
  };
  if (many(p.height, p.width) || many(p.out_height, p.out_width) || many(p.kernel_h, p.kernel_w)) return false;
  return p.filters() <= kMost / (p.taps() + 1) && p.batch <= kMost / ((p.height / 8 + 1) * (p.out_width / 16 + 1));
}

// What tensor cores have to do in kernels/hankel_grad_weight.cu for a row of 16 images, at least.
int64_t hankel_multiplications(const OuterSizes& s) {
  return 16 * ((s.out_width + 15) / 16) * ((s.kernel_h + 7) / 8) * ((s.kernel_w + 15) / 16);
}

// ---------------------------------------------------------------------------- float32

// Any strides of the arrays, any sizes whose blocks can be counted in 32 bits.
bool can_large_float32(const Problem& p) {
  constexpr int64_t kMost = 63, kMostPixels = 1 << 13;  // of a side
  constexpr int64_t kShared = 64 << 10;                 // what the largest kernels need; no GPU has less
  if (p.dtype != DType::kFloat32 || p.batch == 0 || !has_unit_steps(p) || !pads_within_kernel(p)) return false;
  if (p.shared_memory < kShared || p.taps() == 1 || std::max(p.kernel_h, p.kernel_w) > kMost) return false;
  return std::max({p.height, p.width, p.out_height, p.out_width}) <= kMostPixels &&
         p.batch <= (1 << 30) / (p.filters() * p.out_height * (p.out_width / 16 + 1));
}

// Small kernels as well, where columns lie side by side.
bool pays_large_float32(const Problem& p) {
  return is_large_kernel(p) || have_rows(p);
}

// Where transforms were asked for, and are faster than products one by one.
bool claims_any_fft(const Problem& p) {
  if (!p.allow_fft || p.dtype != DType::kFloat32 || p.batch == 0) return false;
  if (!has_unit_steps(p) || !pads_within_kernel(p) || !have_rows(p)) return false;
  const FftCut cut = choose_fft_cut(p);
  if (!cut.serves() || cut.bytes(p, 1) > p.shared_memory) return false;
  // Sides, planes and tiles are counted in 32 bits.
  constexpr int64_t kMany = 1 << 20, kMost = 1 << 30;
  if (std::max({p.height, p.width, p.out_height, p.out_width}) > kMany) return false;
  if (p.batch > kMost / cut.tiles() / p.filters()) return false;

  return cut.cost() < products_of_plane(p);
}

// ---------------------------------------------------------------------------- phases

// Whether there are phases, whose sides and numbers are counted in 32 bits.
bool has_phases(const Problem& p) {
  if (p.dtype == DType::kFloat64 || p.batch == 0 || has_unit_steps(p)) return false;
  constexpr int64_t kFar = 1 << 8, kMany = 1 << 20;
  if (std::max({p.stride_h, p.stride_w, p.dilation_h, p.dilation_w}) > kFar) return false;
  return std::max({p.height, p.width, p.out_height, p.out_width, p.kernel_h, p.kernel_w, p.padding_h, p.padding_w,
                   p.batch, p.filters()}) <= kMany;
}

double elements(int64_t batch, int64_t planes, int64_t height, int64_t width) {
  return static_cast<double>(batch) * static_cast<double>(planes) * static_cast<double>(height * width);
}

// From an array's first element to its last one, at most.
double extent(const View& view, int64_t batch, int64_t planes, int64_t height, int64_t width) {
  double all = 0;
  const int64_t sizes[] = {batch, planes, height, width};
  for (int d = 0; d < 4; ++d) all += static_cast<double>(sizes[d]) * std::abs(static_cast<double>(view.stride[d]));
  return all;
}

// Whether 32 bits count the elements of all arrays and of their copies.
bool fits_phases(const Problem& p, const Problem& made) {
  constexpr double kMost = 1 << 30;
  return std::max({elements(made.batch, made.channels, made.height, made.width),
                   elements(made.batch, made.filters(), made.out_height, made.out_width),
                   elements(1, made.filters(), made.kernel_h, made.kernel_w),
                   extent(p.input, p.batch, p.channels, p.height, p.width),
                   extent(p.output, p.batch, p.filters(), p.out_height, p.out_width),
                   extent(p.weight, p.filters(), 1, p.kernel_h, p.kernel_w)}) <= kMost;
}

// Whether the problem that phases make is so much faster that their copies, and two more kernels, pay.
bool phases_pay(const Problem& p, const Phases& phases) {
  // Time, in picoseconds. Planes of channels that are no whole vectors take longer to copy. Rows of few columns are
  // multiplied as if they were longer.
  constexpr double kLaunches = 5e6, kCopy = 1, kSlowCopy = 5, kProduct = 0.09, kOtherProduct = 0.3;
  constexpr int64_t kColumns = 16;
  const Problem& made = phases.problem;
  const double copied = elements(made.batch, made.channels, made.height, made.width) +
                        elements(made.batch, made.filters(), made.out_height, made.out_width);
  const bool is_slow = phases.in_planes && writes_channels_last(p) && p.pass != Pass::kGradWeight;
  const double narrow = static_cast<double>(round_up(made.out_width, kColumns)) / static_cast<double>(made.out_width);
  const double time = kLaunches + (is_slow ? kSlowCopy : kCopy) * copied + kProduct * narrow * products(made);
  return time < kOtherProduct * products(p);
}

}  // namespace

bool claims_toeplitz_large(const Problem& p) {
  if (!can_toeplitz_large(p)) return false;

  // Of a band matrix for one column of taps all but the diagonal is zeros.
  if (p.kernel_w == 1) return false;
  // Of the small kernels those that pay: planes that fill a tile, and more than a copy of the images to do, if need be.
  constexpr int64_t kFewPixels = 128, kFewTaps = 9;
  if (!is_large_kernel(p) && (p.out_height * p.out_width < kFewPixels || (!have_rows(p) && p.taps() < kFewTaps)))
    return false;
  // Copies of images take longer than a few taps for each output by itself, as rows that come element by element do
  // where outputs are few, or more of them at a stride, where bands are mostly multiplied for others.
  constexpr int64_t kFewForCopies = 32, kFewAtStride = 64, kShortSum = 40, kFewProducts = 12 << 20;
  const bool loads_slowly = !have_rows(p) || p.width % 2 != 0 || p.out_width % 2 != 0;
  const int64_t few = p.stride_h > 1 && loads_slowly ? kFewAtStride : kFewForCopies;
  if ((p.stride_h > 1 || !have_rows(p)) && p.taps() <= few) return false;
  const int64_t outputs = target_channels(p) * target_height(p) * target_width(p);  // of an image
  return !(loads_slowly && p.taps() <= kShortSum && outputs <= kFewProducts / p.taps() / p.batch);
}

bool claims_hankel_grad_weight(const Problem& p) {
  if (!can_hankel_grad_weight(p)) return false;

  constexpr int64_t kFewPixels = 128;
  if (have_rows(p)) return p.taps() > 1;
  // Images would be copied, for a column of taps, which fills little of a tile, or for few products.
  return p.kernel_w > 1 && (is_large_kernel(p) || p.out_height * p.out_width >= kFewPixels);
}

bool claims_outer_grad_weight(const Problem& p) {
  if (!is_large_kernel(p) || !claims_hankel_grad_weight(p)) return false;
  const OuterSizes sizes = OuterSizes::of(p, is_outer_exchanged(p));
  const bool are_small_planes =
      sizes.columns() <= kNarrowOuter.columns && std::max(p.height, p.out_height) <= kNarrowOuter.columns;
  constexpr int64_t kShared = 96 << 10;  // what rows of 16 images take up
  if (!sizes.fits() || (!are_small_planes && p.shared_memory < kShared)) return false;

  // 16 images are multiplied together: some of them have to be there.
  constexpr int64_t kTogether = 16;
  if (are_small_planes) return 2 * p.batch >= kTogether;
  if (4 * p.batch < 3 * round_up(p.batch, kTogether)) return false;
  // With so little to load for each, multiplications take half of the time that they take in hankel_grad_weight.
  return sizes.multiplications() <= 2 * hankel_multiplications(sizes);
}

bool claims_large_float32(const Problem& p) {
  return p.pass != Pass::kGradWeight && (p.pass == Pass::kForward || p.multiplier == 1) && can_large_float32(p) &&
         pays_large_float32(p);
}

bool claims_large_float32_grad_weight(const Problem& p) {
  return p.pass == Pass::kGradWeight && can_large_float32(p) && pays_large_float32(p);
}

bool claims_fft(const Problem& p) {
  return p.pass != Pass::kGradWeight && (p.pass == Pass::kForward || p.multiplier == 1) && claims_any_fft(p);
}

bool claims_fft_grad_weight(const Problem& p) {
  return p.pass == Pass::kGradWeight && claims_any_fft(p);
}

bool claims_phases(const Problem& p) {
  if (!has_phases(p)) return false;
  const Phases phases(p);
  const Problem& made = phases.problem;
  if (made.height < 1 || made.width < 1 || !fits_phases(p, made)) return false;

  if (p.pass == Pass::kForward && phases.taps() > 1) return false;   // sums over phases take too long
  if (p.pass == Pass::kGradInput && p.multiplier > 1) return false;  // sums over filters have no fast plan
  constexpr int64_t kManyTaps = 49;                                  // for which large_float32 is so much faster
  if (p.dtype == DType::kFloat32 && made.taps() < kManyTaps) return false;
  return phases_pay(p, phases) && choose(made).id != PlanId::kGeneric;
}

}  // namespace dwconv
