// Claims on arrays whose channels lie side by side: small kernels in channels_last, and on tensor cores some larger
// ones.
//
// Right: channels side by side in both arrays; pixels, rows and images may lie anywhere that 32 bits count. CUDA cores
// have each small kernel compiled; tensor cores take pixels that are whole units of 16 bytes, and kernels whose band
// matrices fit into registers (toeplitz_channels_last.h).
// Pays: tensor cores where there are more than 3x3 taps to multiply.
#include <algorithm>
#include <cstdint>

#include "claims.h"
#include "facts.h"
#include "kernels/exchange.h"
#include "kernels/flat_grad_weight_channels_last.h"
#include "kernels/lanes_forms.h"
#include "kernels/small_kernels.h"
#include "kernels/stream.h"
#include "kernels/toeplitz_channels_last.h"

namespace dwconv {
namespace {

// Whether channels lie side by side in both arrays, and what 32 bits count in kernels that march down them: the bytes
// of a row, and the rows of all images. Pixels, rows and images may lie anywhere.
bool have_channels(const Problem& p) {
  const auto fits = [&](const View& view, int64_t channels, int64_t height, int64_t width) {
    constexpr int64_t kMany = 1 << 20, kMost = 1 << 27;
    const int64_t pixel = (width == 1 ? channels : view.stride[3]) * size_of(p.dtype);
    return (view.stride[1] == 1 || channels == 1) && channels <= kMany / 8 && pixel <= kMany && width <= kMany &&
           pixel * width < kMost && height < kMost / p.batch;
  };
  return p.batch > 0 && fits(p.input, p.channels, p.height, p.width) &&
         fits(p.output, p.filters(), p.out_height, p.out_width);
}

// Whether all pixels of input and output are whole units of 16 bytes.
bool have_whole_pixels(const Problem& p) {
  const int64_t elements = kUnit / size_of(p.dtype);
  const auto whole = [&](const View& view, int64_t height, int64_t width) {
    return (view.stride[3] % elements == 0 || width == 1) && (view.stride[2] % elements == 0 || height == 1) &&
           (view.stride[0] % elements == 0 || p.batch == 1);
  };
  return p.channels % elements == 0 && whole(p.input, p.height, p.width) && whole(p.output, p.out_height, p.out_width);
}

// Whether no pixels lie apart in an array.
bool is_dense(const View& view, int64_t batch, int64_t channels, int64_t height, int64_t width) {
  const int64_t row = width * channels;
  return (view.stride[1] == 1 || channels == 1) && (view.stride[3] == channels || width == 1) &&
         (view.stride[2] == row || height == 1) && (view.stride[0] == height * row || batch == 1);
}

// ---------------------------------------------------------------------------- CUDA cores

bool can_march(const Problem& p) {
  const bool is_compiled =
      is_small_kernel(p) || (p.pass != Pass::kGradWeight && p.dtype == DType::kFloat32 && March9x9::is_of(p));
  return p.dtype != DType::kFloat64 && is_compiled && pads_within_kernel(p) && have_channels(p);
}

// ---------------------------------------------------------------------------- tensor cores

// What kernels/toeplitz_channels_last.cu is compiled for. Rows are what is marched down; columns do as well. Those of
// all images in spans of at least 8 columns are counted in 32 bits.
bool can_toeplitz_channels_last(const Problem& p) {
  constexpr int64_t kMany = 1 << 20;
  if (p.multiplier > 1 || !has_unit_steps(p) || !pads_within_kernel(p)) return false;
  if (std::max(p.kernel_h, p.kernel_w) > kMany || !have_whole_pixels(p)) return false;
  const auto marches_down = [](const Problem& p) {
    constexpr int64_t kMost = 1 << 30;
    return have_channels(p) && band_shape_of(p) != BandShape::kNone &&
           p.batch <= kMost / std::max(p.height, p.out_height) / (std::max(p.width, p.out_width) / 8 + 1);
  };
  return marches_down(p) || marches_down(exchange(p));
}

// What kernels/toeplitz_strided_channels_last.cu is compiled for. 4 rows of 32 outputs are a block's at least.
bool can_toeplitz_strided_channels_last(const Problem& p) {
  constexpr int64_t kMost = 1 << 30;
  return SmallKernel<7, 7, 2, 1>::is_of(p) && pads_within_kernel(p) && p.multiplier == 2 &&
         p.shared_memory >= kStridedBytes && have_channels(p) && have_whole_pixels(p) &&
         p.batch <= kMost / p.filters() / (p.height / 4 + 2) / (p.width / 32 + 2);
}

// Whether all pixels of input and gradient begin alike within 16 bytes: others are loaded 2 bytes at a time.
bool have_aligned_pixels(const Problem& p) {
  const auto are_aligned = [&](const View& view) {
    return (view.stride[0] | view.stride[2] | view.stride[3] | p.channels) * size_of(p.dtype) % kUnit == 0;
  };
  return are_aligned(p.input) && are_aligned(p.output);
}

bool can_toeplitz_grad_weight_channels_last(const Problem& p) {
  if (p.pass != Pass::kGradWeight || !has_tensor_cores(p) || p.batch == 0) return false;
  if (!has_unit_steps(p) || p.multiplier > 1 || !pads_within_kernel(p)) return false;
  constexpr int64_t kMostRows = 9, kMostColumns = 9;  // of a kernel
  constexpr int64_t kMostRowsOfAny = 7;               // more of them leave no registers for loads of 2 bytes
  if (p.kernel_h > (have_aligned_pixels(p) ? kMostRows : kMostRowsOfAny) || p.kernel_w > kMostColumns) return false;
  constexpr int64_t kLeastMemory = 96 << 10;  // of a ring of 3 stages
  if (p.shared_memory < kLeastMemory) return false;
  // The bytes of a pixel, columns, and rows of all images in spans of at least 8 columns are counted in 32 bits.
  constexpr int64_t kMany = 1 << 20, kMost = 1 << 30;
  const auto fits = [&](const View& view, int64_t height, int64_t width) {
    return view.stride[1] == 1 && (width == 1 || view.stride[3] < kMany) && width < kMany && height < kMany;
  };
  return fits(p.input, p.height, p.width) && fits(p.output, p.out_height, p.out_width) && p.channels < kMany &&
         p.batch <= kMost / (p.height + p.padding_h) / (p.out_width / 8 + 1);
}

}  // namespace

// ---------------------------------------------------------------------------- forward and grad_input

bool claims_march_channels_last(const Problem& p) {
  if (p.pass == Pass::kGradWeight || !can_march(p)) return false;
  // Sums over two filters are compiled for squares only.
  const bool is_square = p.kernel_h == p.kernel_w && p.kernel_h > 1 && p.dilation_h == 1 && is_small_kernel(p);
  if (p.multiplier > (p.pass == Pass::kForward ? 8 : is_square ? 2 : 1)) return false;

  constexpr int64_t kFewChannels = 8;  // of which a thread has one, if it sums over filters
  if (p.pass == Pass::kGradInput && p.multiplier > 1 && p.channels < kFewChannels) return false;
  const bool is_9x9 = p.dtype == DType::kFloat32 && March9x9::is_of(p);
  return !(is_9x9 && is_sure_of_lanes_channels_last(p));  // large_float32 is faster
}

bool claims_toeplitz_channels_last(const Problem& p) {
  if (!has_tensor_cores(p) || p.pass == Pass::kGradWeight) return false;
  if (p.stride_h > 1) return can_toeplitz_strided_channels_last(p);
  // CUDA cores are as fast for 3x3, and have single rows and columns.
  const bool is_for_march = is_small_kernel(p) && (p.taps() <= 9 || std::max(p.kernel_h, p.kernel_w) > kMaxBandColumns);
  return p.taps() > 1 && !is_for_march && can_toeplitz_channels_last(p);
}

// Tensor cores would serve as well, but wait longer, for matrices and for rows of whole tiles: about as long as CUDA
// cores take for ten thousand outputs of 5x5 or 7x7 on each multiprocessor of a large GPU.
bool prefers_march_channels_last(const Problem& p) {
  constexpr int64_t kFewSums = 1280 << 10;
  return sums_over_taps(p) <= kFewSums && claims_toeplitz_channels_last(p) && claims_march_channels_last(p);
}

// ---------------------------------------------------------------------------- grad_weight

bool claims_march_grad_weight_channels_last(const Problem& p) {
  return p.pass == Pass::kGradWeight && can_march(p) && p.multiplier <= 2 && p.filters() <= (1 << 26) / (p.taps() + 1);
}

bool claims_flat_grad_weight_channels_last(const Problem& p) {
  const bool can = p.taps() == 1 && p.padding_h == 0 && p.padding_w == 0 && p.multiplier == 1 &&
                   p.channels <= kMostFlatChannels && offset_within(kUnit, p.input) == offset_within(kUnit, p.output) &&
                   claims_march_grad_weight_channels_last(p) &&
                   is_dense(p.input, p.batch, p.channels, p.height, p.width) &&
                   is_dense(p.output, p.batch, p.channels, p.out_height, p.out_width);

  constexpr int64_t kLeastBytes = 1 << 20;  // of an array: fewer leave some multiprocessors without a turn
  const int64_t pixel = p.channels * size_of(p.dtype);
  return can && pixel % kUnit != 0 && p.batch * p.height * p.width * pixel >= kLeastBytes;
}

bool claims_toeplitz_grad_weight_channels_last(const Problem& p) {
  if (!can_toeplitz_grad_weight_channels_last(p)) return false;

  constexpr int64_t kFewChannels = 32;  // fewer leave a block's warps idle
  if (p.channels < kFewChannels || p.taps() == 1) return false;
  if (!is_small_kernel(p)) return true;
  // For 3 rows there is little to multiply: CUDA cores, where they have the kernel, lose on narrow images only; up to 5
  // where pixels are loaded 2 bytes at a time.
  constexpr int64_t kFewRows = 3, kMoreRows = 5, kNarrow = 16;
  if (!have_aligned_pixels(p)) return p.kernel_h > kMoreRows;
  return p.kernel_h > kFewRows || p.out_width <= kNarrow;
}

}  // namespace dwconv
