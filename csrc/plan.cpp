#include "plan.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <limits>
#include <numeric>
#include <stdexcept>
#include <string>

#include "kernels/batch_grad_weight_nchw.h"
#include "kernels/direct.h"
#include "kernels/exchange.h"
#include "kernels/fft.h"
#include "kernels/gather.h"
#include "kernels/flat_grad_weight_channels_last.h"
#include "kernels/lanes_forms.h"
#include "kernels/march_nchw.h"
#include "kernels/moved_rows.h"
#include "kernels/outer_grad_weight.h"
#include "kernels/phases.h"
#include "kernels/small_kernels.h"
#include "kernels/stream.h"
#include "kernels/toeplitz_channels_last.h"
#include "kernels/toeplitz_large.h"
#include "kernels/windows_nchw.h"

namespace dwconv {
namespace {

bool claims_everything(const Problem&) {
  return true;
}

// Whether rows and planes of an array (N, planes, height, width) follow each other without a gap, so that they can
// stream: images may lie apart, if all of them lie alike within the 16 bytes that are copied at once.
bool is_stream(const View& view, int64_t batch, int64_t planes, int64_t height, int64_t width, int64_t element) {
  const int64_t image = planes * height * width;
  if (!(view.stride[3] == 1 || width == 1) || !(view.stride[2] == width || height == 1) ||
      !(view.stride[1] == height * width || planes == 1))
    return false;
  // Rows are counted, and a row's bytes added up, in 32 bits.
  if (width > (1 << 20) || height > (1 << 30) || planes > (1 << 30) / height || batch > (1 << 30) / (planes * height))
    return false;
  return batch == 1 || view.stride[0] == image ||
         (view.stride[0] * element % kUnit == 0 && image * element % kUnit == 0 && view.stride[0] > image);
}

bool is_joined(const View& view, int64_t batch, int64_t image) {
  return batch == 1 || view.stride[0] == image;
}

// What all kernels that stream have in common.
bool can_stream(const Problem& p) {
  const int64_t element = size_of(p.dtype);
  return p.dtype != DType::kFloat64 && p.batch > 0 && p.padding_h <= (p.kernel_h - 1) * p.dilation_h &&
         p.padding_w <= (p.kernel_w - 1) * p.dilation_w &&
         is_stream(p.input, p.batch, p.channels, p.height, p.width, element) &&
         is_stream(p.output, p.batch, p.filters(), p.out_height, p.out_width, element);
}

// What kernels/stream_nchw.cuh asks for, and `filter_bytes` more of shared memory for each filter.
bool fits_stream_nchw(const Problem& p, int64_t filter_bytes) {
  const bool forward = p.pass == Pass::kForward;
  const int64_t element = size_of(p.dtype), extent = (p.kernel_h - 1) * p.dilation_h + 1;
  // If one of the arrays is not joined, both go image by image.
  const int64_t in_image = p.channels * p.height * p.width, out_image = p.filters() * p.out_height * p.out_width;
  if ((is_joined(p.input, p.batch, in_image) != is_joined(p.output, p.batch, out_image)) &&
      (in_image * element % kUnit != 0 || out_image * element % kUnit != 0))
    return false;
  const auto fits_int = [](int64_t stride) {
    return stride < std::numeric_limits<int32_t>::max() / 16 && stride > std::numeric_limits<int32_t>::min() / 16;
  };
  if (!fits_int(p.weight.stride[2]) || !fits_int(p.weight.stride[3])) return false;

  const int64_t source_bytes = (forward ? p.width : p.out_width) * element;
  const int64_t target_bytes = (forward ? p.out_width : p.width) * element;
  const int64_t source_height = forward ? p.height : p.out_height, target_height = forward ? p.out_height : p.height;
  const auto fits = [&](int64_t source_rows, int64_t target_rows, int64_t filters) {
    return kHead + kDepth * stage_bytes(source_rows, source_bytes) + kTail +
               round_up(target_rows * target_bytes + kUnit, 128) + filters * filter_bytes <=
           p.shared_memory;
  };
  if (!forward && p.multiplier > 1)  // a sum over filters: whole planes only
    return fits(p.multiplier * source_height, target_height, p.multiplier);
  const int64_t rows = std::min<int64_t>(kLeastRows, target_height);
  const int64_t step = forward ? rows * p.stride_h : (rows + p.stride_h - 1) / p.stride_h;
  return fits(step + extent, rows, 1);
}

int64_t target_width(const Problem& p) {
  return p.pass == Pass::kGradInput ? p.width : p.out_width;
}

int64_t outputs_of(const Problem& p) {
  return p.pass == Pass::kForward ? p.batch * p.filters() * p.out_height * p.out_width
                                  : p.batch * p.channels * p.height * p.width * p.multiplier;
}

constexpr int64_t kTileColumns = 7;  // of kernels/stream_nchw.cu and kernels/stream_grad_weight_nchw.cu

bool claims_stream_nchw(const Problem& p) {
  if (p.pass == Pass::kGradWeight || !is_small_kernel(p) || target_width(p) < kTileColumns) return false;
  if (p.pass == Pass::kGradInput && p.stride_h > 1 && p.padding_h % 2 != p.padding_w % 2) return false;
  if (p.pass == Pass::kGradInput && p.multiplier > 1)  // sums over filters are compiled for squares only
    if (p.kernel_h != p.kernel_w || p.kernel_h == 1 || p.dilation_h > 1) return false;
  const bool sums = p.pass == Pass::kGradInput && p.multiplier > 1;  // then filters may lie in shared memory
  return can_stream(p) && fits_stream_nchw(p, sums ? kChunkBytes + round_up(4 * p.taps(), kUnit) : 0);
}

// What kernels that march down contiguous planes ask for. Lanes have to be busy, and there have to be so many rows that
// every warp of a GPU has some.
bool can_march_planes(const Problem& p, int64_t least_rows) {
  if (p.dtype != DType::kFloat32) return false;
  constexpr int64_t kShared = 96 << 10;  // what the least that a block loads takes up
  const int64_t width = target_width(p), height = p.pass == Pass::kGradInput ? p.height : p.out_height;
  if (p.shared_memory < kShared || width < kStrip || !can_stream(p)) return false;
  const int64_t planes = p.pass == Pass::kGradInput ? p.channels : p.filters();
  const MarchLanes lanes(width, planes);
  constexpr double kBusy = 0.6;
  if (lanes.busy < kBusy || lanes.planes % p.multiplier > 0) return false;  // a warp has all filters of a channel
  const int64_t rows = p.batch * ((planes + lanes.planes - 1) / lanes.planes) * lanes.spans * height;
  return rows >= least_rows && rows <= std::numeric_limits<int32_t>::max();
}

// Whether stream_nchw has a tile that knows what lies outside of the plane, and does not multiply it.
bool has_known_bounds(const Problem& p) {
  return p.kernel_h <= kMarchKernel && p.height == p.width && p.out_height == p.height && p.out_width == p.height &&
         (p.height == kTileColumns || p.height == 2 * kTileColumns) && p.padding_h == p.kernel_h / 2 &&
         p.padding_w == p.padding_h && claims_stream_nchw(p);
}

using March7x7 = SmallKernel<kMarchKernel, kMarchKernel, 1, 1>;
using March7x7Stride2 = SmallKernel<kMarchKernel, kMarchKernel, 2, 1>;  // but for grad_input
using MarchDilated = SmallKernel<3, 3, 1, 2>;

bool claims_march_nchw(const Problem& p) {
  constexpr int64_t kFar = 1 << 27;  // offsets of weights are counted in 32 bits
  if (p.pass == Pass::kGradWeight || std::max(p.weight.stride[2], p.weight.stride[3]) >= kFar) return false;
  if (p.pass == Pass::kForward && March7x7Stride2::is_of(p)) return can_march_planes(p, 16 << 10);
  // Rows of a multiple of 32 columns lie in the same banks of shared memory: stream_nchw, whose tiles lie below each
  // other, would read most of them several times.
  constexpr int64_t kBanks = 32;
  if (MarchDilated::is_of(p) && p.multiplier == 1 && (p.pass == Pass::kForward ? p.width : p.out_width) % kBanks == 0)
    return can_march_planes(p, 16 << 10);
  if (p.multiplier > 1 || (!March7x7::is_of(p) && !March9x9::is_of(p))) return false;
  // large_float32 is faster where it copies whole planes.
  if (March9x9::is_of(p) && p.capability >= 90 && p.height * p.width % 4 == 0 && p.out_height * p.out_width % 4 == 0 &&
      is_sure_of_rows(p))
    return false;
  return !has_known_bounds(p) && can_march_planes(p, 16 << 10);
}

bool claims_march_grad_weight_nchw(const Problem& p) {
  if (p.pass != Pass::kGradWeight || p.filters() > (1 << 30) / (p.taps() + 1)) return false;
  // On small planes every warp adds up the sums of many filters in the end: of 7x7, they stream.
  constexpr int64_t kLeastPixels = 784;
  if (p.out_height * p.out_width < kLeastPixels) return false;
  if (March7x7Stride2::is_of(p))  // of one filter a channel, smaller planes stream faster
    return (p.multiplier > 1 || p.out_height * p.out_width >= 2500) && can_march_planes(p, 16 << 10);
  if (March9x9::is_of(p) && is_sure_of_lanes(p)) return false;  // large_float32_grad_weight is faster
  return p.multiplier == 1 && (March7x7::is_of(p) || March9x9::is_of(p)) && can_march_planes(p, 32 << 10);
}

constexpr int64_t kLargeKernel = 8;  // from this side on, nothing is compiled for one size of kernel

bool is_large_kernel(const Problem& p) {
  return std::max(p.kernel_h, p.kernel_w) >= kLargeKernel;
}

bool claims_toeplitz_nchw(const Problem& p) {
  if (size_of(p.dtype) != 2 || p.capability < 80 || p.pass == Pass::kGradWeight) return false;
  if (p.stride_h != p.stride_w || p.stride_h > 2) return false;
  // The columns of a band matrix, and the rows that it is compiled for.
  const int64_t rows = (p.kernel_h - 1) * p.dilation_h + 1, columns = (p.kernel_w - 1) * p.dilation_w + 1;
  const bool wide = columns > kMaxBandColumns;
  if (wide              ? columns > kMaxWideColumns || rows > 1 || p.stride_h > 1
      : p.stride_h == 1 ? rows > 7 && rows != 9 && rows != 11
                        : rows != 3 && rows != 5 && rows != 7)
    return false;
  // A warp computes 8 tiles of 16 columns at once: small planes do not fill it. Where CUDA cores have a tile, they are
  // as fast for the smallest kernels, and for 3x3 on small planes.
  const int64_t pixels = target_width(p) * (p.pass == Pass::kForward ? p.out_height : p.height);
  if (pixels < (p.stride_h == 1 ? 196 : 512)) return false;
  // Nor do planes of few rows that are taken whole, with many images at once.
  if (is_large_kernel(p) && fits_toeplitz_large_images(p)) return false;
  const int64_t area = rows * columns;
  if (p.stride_h == 2 && p.pass == Pass::kGradInput && !SmallKernel<7, 7, 2, 1>::is_of(p)) return false;
  const int64_t few = p.kernel_h == p.kernel_w ? 784 : 2048;
  const bool pays = area >= (p.stride_h > 1 ? 36 : pixels < few ? 25 : 9) && p.taps() >= 9;
  if (!pays && claims_stream_nchw(p)) return false;
  return can_stream(p) &&
         fits_stream_nchw(p, kChunkBytes + kBandHeadBytes + rows * (wide ? kWideRowBytes : kBandRowBytes));
}

// What kernels ask for that take rows of many images at once: planes that follow each other without gaps.
bool has_runs(const Problem& p) {
  constexpr int64_t kFewImages = 8;
  if (size_of(p.dtype) != 2 || p.capability < 80 || p.batch < kFewImages) return false;
  if (p.stride_h != p.stride_w || p.stride_h > 2) return false;
  const auto lies = [&](const View& view, int64_t planes, int64_t height, int64_t width) {
    constexpr int64_t kMany = 1 << 15, kMost = 1 << 29;  // rows, columns, and elements of an image
    return height <= kMany && width <= kMany && planes <= kMost / (height * width) &&
           (view.stride[3] == 1 || width == 1) && (view.stride[2] == width || height == 1) &&
           (view.stride[1] == height * width || planes == 1);
  };
  // Blocks are counted in 32 bits.
  return p.batch <= (1 << 26) / p.filters() && p.padding_h <= (1 << 20) && p.padding_w <= (1 << 20) &&
         lies(p.input, p.channels, p.height, p.width) && lies(p.output, p.filters(), p.out_height, p.out_width);
}

// Rows of a kernel, with what dilation puts between them; without any, and at stride 1.
constexpr int64_t kMaxBatchRows = 7, kMoreBatchRows = 9;

bool claims_toeplitz_small_planes(const Problem& p) {
  constexpr int64_t kMaxWidth = 16, kMaxHeight = 64;
  return p.pass != Pass::kGradWeight && p.multiplier == 1 && p.taps() > 1 && has_runs(p) &&
         (p.kernel_h - 1) * p.dilation_h < kMaxBatchRows && std::max(p.height, p.out_height) <= kMaxHeight &&
         std::max(p.width, p.out_width * p.stride_h) <= kMaxWidth;
}

// Whether input and gradient can stream through shared memory side by side: as rings, or each chunk of rows in a place
// of its own, or as rings of rows that are moved to where 16 bytes begin.
enum class Room { kRings, kStages, kMovedRings };
bool can_stream_grad_weight(const Problem& p, Room room) {
  if (p.pass != Pass::kGradWeight || !is_small_kernel(p) || p.out_width < kTileColumns || !can_stream(p)) return false;
  if (p.filters() > (1 << 30) / (p.taps() + 1)) return false;  // sums are counted in 32 bits
  int64_t source_bytes = p.width * size_of(p.dtype), grad_bytes = p.out_width * size_of(p.dtype);
  const int64_t extent = (p.kernel_h - 1) * p.dilation_h + 1, rows = std::min<int64_t>(kLeastRows, p.out_height);
  const int64_t bands = (p.out_height + rows - 1) / rows;
  constexpr int64_t kThreads = 256 + 32 + 8 + 1;  // with the warp that loads, and room between banks
  int64_t source = rows_for_bands(bands, rows * p.stride_h, extent, source_bytes);
  int64_t grad = rows_for_planes(rows, grad_bytes);
  if (room == Room::kMovedRings) {
    source_bytes = moved_row_bytes(source_bytes), grad_bytes = moved_row_bytes(grad_bytes);
    source = rows_to_move(bands, rows * p.stride_h, extent, p.padding_h), grad = rows_to_move(bands, rows, 1, 0);
  }
  int64_t bytes = ring_bytes(source, source_bytes) + ring_bytes(grad, grad_bytes);
  if (room == Room::kStages && p.out_height > rows) {
    const int64_t source_stage = stage_bytes((rows - 1) * p.stride_h + extent, source_bytes);
    bytes = std::min(bytes, kDepth * (source_stage + stage_bytes(rows, grad_bytes)) + 2 * kTail);
  }
  return kHead + std::max(bytes + 256, 4 * (p.taps() + 1) * kThreads) <= p.shared_memory;
}

bool claims_stream_grad_weight_nchw(const Problem& p) {
  const bool has_stages = p.dtype == DType::kFloat32 && p.kernel_h == p.kernel_w && p.taps() > 1;
  return can_stream_grad_weight(p, has_stages ? Room::kStages : Room::kRings);
}

bool claims_batch_grad_weight_nchw(const Problem& p) {
  if (p.pass != Pass::kGradWeight || !has_runs(p)) return false;
  const int64_t rows = (p.kernel_h - 1) * p.dilation_h + 1, columns = (p.kernel_w - 1) * p.dilation_w + 1;
  const int64_t most_rows = p.stride_h == 1 && p.dilation_h == 1 ? kMoreBatchRows : kMaxBatchRows;
  const auto begins_with = [&](int64_t bytes) {  // whether all rows do
    const auto begins = [&](const View& view, int64_t width) {
      return 2 * width % bytes == 0 && reinterpret_cast<uintptr_t>(view.data) % bytes == 0 &&
             (p.batch == 1 || 2 * view.stride[0] % bytes == 0);
    };
    return begins(p.input, p.width) && begins(p.output, p.out_width);
  };
  if (p.padding_w >= columns) return false;
  // One tap, where the kernel for rows that begin with 16 bytes has two blocks a multiprocessor, and each input one
  // gradient.
  constexpr int64_t kMostColumns = 64, kWhole = 16;
  if (p.taps() == 1 &&
      (p.capability < 90 || p.stride_h > 1 || p.padding_h > 0 || p.multiplier > 1 || p.batch < kWhole ||
       p.width < kLeastAlignedColumns || p.width > kMostColumns || !begins_with(kUnit)))
    return false;
  // Rows of whole units that begin anywhere, where aligned_grad_weight_nchw.cu moves them.
  const auto of_units = [&] {
    const auto is_of_units = [&](const View& view, int64_t width) {
      return 2 * width % kUnit == 0 && (p.batch == 1 || 2 * view.stride[0] % kUnit == 0) &&
             width >= kLeastAlignedColumns && width <= kMostColumns;
    };
    return is_of_units(p.input, p.width) && is_of_units(p.output, p.out_width);
  };
  int64_t width = p.width, out_width = p.out_width;  // in shared memory
  if (rows > most_rows) {
    // Taller ones of one column, as words, or of whole units.
    if (rows > kMaxColumnRows || columns > 1 || p.stride_h > 1 || !(begins_with(4) || of_units())) return false;
    width = out_width = round_up(p.width, 8);
  }
  if (columns > kMaxBandColumns) {
    // Wider ones of one row, where rows begin with 16 bytes, or are moved there: windows reach 8 columns beside a tile.
    constexpr int64_t kReach = 8, kRoomToMove = 128 << 10;  // for two stages of two chunks of both arrays
    if (rows > 1 || p.stride_h > 1 || p.padding_w > kReach || columns - 1 - p.padding_w > kReach) return false;
    if (!begins_with(kUnit) && !(of_units() && p.shared_memory >= kRoomToMove)) return false;
  }
  // 16 images are multiplied together: where few of them are there it does not pay, nor for a few taps at a stride.
  if (4 * p.batch < 3 * round_up(p.batch, 16)) return false;
  if (p.stride_h > 1 && p.taps() < 25 && claims_stream_grad_weight_nchw(p)) return false;
  // A tile's rows of 16 images twice, with room for what surrounds them.
  const int64_t tile = std::min<int64_t>(p.out_height, 7);
  const int64_t source = p.out_height <= 7 ? p.height : std::min((tile - 1) * p.stride_h + rows, p.height);
  return 2 * 16 * (2 * (source * width + tile * out_width) + 96) + 512 <= p.shared_memory;
}

bool claims_toeplitz_grad_weight_nchw(const Problem& p) {
  if (size_of(p.dtype) != 2 || p.capability < 80 || p.kernel_h != p.kernel_w) return false;
  if (p.kernel_h != 3 && p.kernel_h != 5 && p.kernel_h != 7) return false;
  // For 3x3 it pays on long rows.
  constexpr int64_t kLong = 1024, kWide = 256;
  if (p.kernel_h == 3 && (p.dilation_h > 1 || p.out_width < kLong)) return false;
  // A warp adds up 4 tiles of 16 columns at once: small planes do not fill it.
  return p.stride_h == 1 && p.out_height * p.out_width >= 784 &&
         (can_stream_grad_weight(p, Room::kRings) ||
          (p.out_width >= kWide && can_stream_grad_weight(p, Room::kMovedRings)));
}

// Whether kernels that want rows can have them: as they are, or from channels that lie side by side, by a copy.
bool can_have_rows(const View& view, int64_t channels, int64_t width) {
  return has_rows(view, width) || view.stride[1] == 1 || channels == 1;
}

bool have_rows(const Problem& p) {
  return has_rows(p.input, p.width) && has_rows(p.output, p.out_width);
}

bool claims_toeplitz_large(const Problem& p) {
  if (size_of(p.dtype) != 2 || p.capability < 80 || p.pass == Pass::kGradWeight || p.batch == 0) return false;
  if (p.stride_h != p.stride_w || p.stride_h > 2 || p.dilation_h != 1 || p.dilation_w != 1) return false;
  if (p.pass == Pass::kGradInput && (p.stride_h > 1 || p.multiplier > 1)) return false;
  if (p.padding_h >= p.kernel_h || p.padding_w >= p.kernel_w) return false;
  // Of the small kernels those that pay: planes that fill a tile, and more than a copy of the images to do, if need be.
  constexpr int64_t kFewPixels = 128, kFewTaps = 9;
  if (!is_large_kernel(p) &&
      (p.taps() == 1 || p.out_height * p.out_width < kFewPixels || (!have_rows(p) && p.taps() < kFewTaps)))
    return false;
  if (!can_have_rows(p.input, p.channels, p.width) || !can_have_rows(p.output, p.filters(), p.out_width)) return false;
  // Of a band matrix for one column of taps all but the diagonal is zeros. Copies of images take longer than a few taps
  // for each output by itself, as rows that come element by element do where outputs are few.
  constexpr int64_t kFewForCopies = 32, kShortSum = 40, kFewProducts = 12 << 20;
  if (p.kernel_w == 1 || ((p.stride_h > 1 || !have_rows(p)) && p.taps() <= kFewForCopies)) return false;
  const int64_t targets =
      p.pass == Pass::kForward ? p.filters() * p.out_height * p.out_width : p.channels * p.height * p.width;
  const bool loads_slowly = !have_rows(p) || p.width % 2 != 0 || p.out_width % 2 != 0;
  if (loads_slowly && p.taps() <= kShortSum && targets <= kFewProducts / p.taps() / p.batch) return false;
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

bool can_march(const Problem& p) {
  const bool is_compiled =
      is_small_kernel(p) || (p.pass != Pass::kGradWeight && p.dtype == DType::kFloat32 && March9x9::is_of(p));
  return p.dtype != DType::kFloat64 && is_compiled && p.padding_h <= (p.kernel_h - 1) * p.dilation_h &&
         p.padding_w <= (p.kernel_w - 1) * p.dilation_w && have_channels(p);
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

// What kernels/toeplitz_strided_channels_last.cu is compiled for. 4 rows of 32 outputs are a block's at least.
bool can_go_toeplitz_strided(const Problem& p) {
  constexpr int64_t kMost = 1 << 30, kKernel = 7;
  return p.kernel_h == kKernel && p.kernel_w == kKernel && p.stride_h == 2 && p.stride_w == 2 && p.dilation_h == 1 &&
         p.dilation_w == 1 && p.padding_h < kKernel && p.padding_w < kKernel && p.multiplier == 2 &&
         p.shared_memory >= kStridedBytes && have_channels(p) && have_whole_pixels(p) &&
         p.batch <= kMost / p.filters() / (p.height / 4 + 2) / (p.width / 32 + 2);
}

bool claims_toeplitz_channels_last(const Problem& p) {
  if (size_of(p.dtype) != 2 || p.capability < 80 || p.pass == Pass::kGradWeight) return false;
  if (p.stride_h > 1) return can_go_toeplitz_strided(p);
  if (p.multiplier > 1) return false;
  if (p.stride_h != 1 || p.stride_w != 1 || p.dilation_h != 1 || p.dilation_w != 1) return false;
  // CUDA cores are as fast for 3x3, and have single rows and columns.
  constexpr int64_t kMany = 1 << 20;
  if (p.taps() == 1 || std::max(p.kernel_h, p.kernel_w) > kMany) return false;
  if (is_small_kernel(p) && (p.taps() <= 9 || std::max(p.kernel_h, p.kernel_w) > kMaxBandColumns)) return false;
  if (p.padding_h >= p.kernel_h || p.padding_w >= p.kernel_w) return false;
  if (!have_whole_pixels(p)) return false;  // of others CUDA cores make more
  // Rows are what is marched down; columns do as well. Those of all images in spans of at least 8 columns are counted
  // in 32 bits.
  const auto serves = [](const Problem& p) {
    constexpr int64_t kMost = 1 << 30;
    return have_channels(p) && band_shape_of(p) != BandShape::kNone &&
           p.batch <= kMost / std::max(p.height, p.out_height) / (std::max(p.width, p.out_width) / 8 + 1);
  };
  return serves(p) || serves(exchange(p));
}

bool claims_march_channels_last(const Problem& p) {
  if (p.pass == Pass::kGradWeight || !can_march(p)) return false;
  if (p.dtype == DType::kFloat32 && March9x9::is_of(p) && is_sure_of_lanes_channels_last(p))
    return false;  // large_float32 is faster
  if (p.pass == Pass::kForward) return p.multiplier <= 8;
  // Sums over two filters are compiled for squares only.
  const bool square = p.kernel_h == p.kernel_w && p.kernel_h > 1 && p.dilation_h == 1;
  return p.multiplier == 1 || (p.multiplier == 2 && square && is_small_kernel(p));
}

// Whether no pixels lie apart in an array in channels_last.
bool is_dense_channels_last(const View& view, int64_t batch, int64_t channels, int64_t height, int64_t width) {
  const int64_t row = width * channels;
  return (view.stride[1] == 1 || channels == 1) && (view.stride[3] == channels || width == 1) &&
         (view.stride[2] == row || height == 1) && (view.stride[0] == height * row || batch == 1);
}

bool claims_march_grad_weight_channels_last(const Problem& p) {
  return p.pass == Pass::kGradWeight && can_march(p) && p.multiplier <= 2 && p.filters() <= (1 << 26) / (p.taps() + 1);
}

bool claims_flat_grad_weight_channels_last(const Problem& p) {
  constexpr int64_t kLeastBytes = 1 << 20;  // of an array: fewer leave some multiprocessors without a turn
  const int64_t bytes = p.batch * p.channels * p.height * p.width * size_of(p.dtype);
  const auto begins = [](const View& view) { return reinterpret_cast<uintptr_t>(view.data) % kUnit; };
  return bytes >= kLeastBytes && begins(p.input) == begins(p.output) && claims_march_grad_weight_channels_last(p) &&
         p.taps() == 1 && p.padding_h == 0 && p.padding_w == 0 && p.multiplier == 1 &&
         p.channels <= kMostFlatChannels && p.channels * size_of(p.dtype) % kUnit != 0 &&
         is_dense_channels_last(p.input, p.batch, p.channels, p.height, p.width) &&
         is_dense_channels_last(p.output, p.batch, p.channels, p.out_height, p.out_width);
}

bool claims_toeplitz_grad_weight_channels_last(const Problem& p) {
  if (p.pass != Pass::kGradWeight || size_of(p.dtype) != 2 || p.capability < 80 || p.batch == 0) return false;
  if (p.stride_h != 1 || p.stride_w != 1 || p.dilation_h != 1 || p.dilation_w != 1 || p.multiplier > 1) return false;
  if (p.padding_h >= p.kernel_h || p.padding_w >= p.kernel_w) return false;
  constexpr int64_t kMostRows = 9, kMostColumns = 9;  // of a kernel
  if (p.kernel_h > kMostRows || p.kernel_w > kMostColumns || p.taps() == 1) return false;
  constexpr int64_t kFewChannels = 32;        // fewer leave a block's warps idle
  constexpr int64_t kLeastMemory = 96 << 10;  // of a ring of 3 stages
  if (p.channels < kFewChannels || p.shared_memory < kLeastMemory) return false;
  const auto is_aligned = [&](const View& view) {
    return (view.stride[0] | view.stride[2] | view.stride[3] | p.channels) * size_of(p.dtype) % kUnit == 0;
  };
  // For 3 rows there is little to multiply: CUDA cores, where they have the kernel, lose on narrow images only; up to 5
  // where pixels are no whole units of 16 bytes, which are loaded 2 bytes at a time here.
  constexpr int64_t kFewRows = 3, kMoreRows = 5, kNarrow = 16;
  const bool aligned = is_aligned(p.input) && is_aligned(p.output);
  constexpr int64_t kRowsOfAny = 7;  // more of them leave no registers for loads of 2 bytes
  if (p.kernel_h > kRowsOfAny && !aligned) return false;
  const bool pays = p.kernel_h > (aligned ? kFewRows : kMoreRows) || !is_small_kernel(p) ||
                    (p.out_width <= kNarrow && aligned && p.kernel_h <= kFewRows);
  // The bytes of a pixel, columns, and rows of all images in spans of at least 8 columns are counted in 32 bits.
  constexpr int64_t kMany = 1 << 20, kMost = 1 << 30;
  const auto fits = [&](const View& view, int64_t height, int64_t width) {
    return view.stride[1] == 1 && (width == 1 || view.stride[3] < kMany) && width < kMany && height < kMany;
  };
  return pays && fits(p.input, p.height, p.width) && fits(p.output, p.out_height, p.out_width) && p.channels < kMany &&
         p.batch <= kMost / (p.height + p.padding_h) / (p.out_width / 8 + 1);
}

bool claims_hankel_grad_weight(const Problem& p) {
  if (p.pass != Pass::kGradWeight || size_of(p.dtype) != 2 || p.capability < 80 || p.batch == 0) return false;
  if (p.stride_h != 1 || p.stride_w != 1 || p.dilation_h != 1 || p.dilation_w != 1) return false;
  if (p.taps() == 1 || p.padding_h >= p.kernel_h || p.padding_w >= p.kernel_w) return false;
  if (p.kernel_w == 1 && !have_rows(p)) return false;  // a column fills little of a tile, and images would be copied
  constexpr int64_t kFewPixels = 128;
  if (!is_large_kernel(p) && !have_rows(p) && p.out_height * p.out_width < kFewPixels) return false;
  if (!can_have_rows(p.input, p.channels, p.width) || !can_have_rows(p.output, p.filters(), p.out_width)) return false;
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

bool claims_outer_grad_weight(const Problem& p) {
  if (!is_large_kernel(p) || !claims_hankel_grad_weight(p)) return false;
  const OuterSizes sizes = OuterSizes::of(p, is_outer_exchanged(p));
  if (!sizes.fits()) return false;
  // 16 images are multiplied together: some of them have to be there.
  if (sizes.columns() <= kNarrowOuter.columns && std::max(p.height, p.out_height) <= kNarrowOuter.columns)
    return p.batch >= 8;
  if (4 * p.batch < 3 * ((p.batch + 15) / 16 * 16)) return false;
  // With so little to load for each, multiplications take half of the time that they take there.
  constexpr int64_t kShared = 96 << 10;  // what rows of 16 images take up
  return sizes.multiplications() <= 2 * hankel_multiplications(sizes) && p.shared_memory >= kShared;
}

// What kernels that go straight to memory ask for: offsets of 32 bits, also beside the image.
bool has_near_elements(const Problem& p) {
  constexpr int64_t kLimit = 1 << 30;
  if (p.padding_h >= (1 << 20) || p.padding_w >= (1 << 20)) return false;
  const auto fits = [&](const View& view, int64_t planes, int64_t height, int64_t width) {
    return p.batch * planes * height * width < kLimit && (p.batch - 1) * view.stride[0] < kLimit &&
           (planes - 1) * view.stride[1] < kLimit &&
           (height + 2 * p.padding_h) * view.stride[2] + (width + 2 * p.padding_w) * view.stride[3] < kLimit &&
           (p.batch - 1) * view.stride[0] + (planes - 1) * view.stride[1] +
                   (height + 2 * p.padding_h) * view.stride[2] + (width + 2 * p.padding_w) * view.stride[3] <
               2 * kLimit;
  };
  const auto& weight = p.weight.stride;
  return fits(p.input, p.channels, p.height, p.width) && fits(p.output, p.filters(), p.out_height, p.out_width) &&
         (p.filters() - 1) * std::max(weight[0], p.bias_stride) < kLimit && weight[2] < kLimit && weight[3] < kLimit;
}

bool claims_scale(const Problem& p) {
  if (p.pass == Pass::kGradWeight || p.taps() > 1 || p.multiplier > 1 || p.batch == 0) return false;
  if (p.padding_h > 0 || p.padding_w > 0) return false;
  const bool spreads = p.stride_h > 1 || p.stride_w > 1;  // then gradients may lie anywhere
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

// What kernels/direct.cu and kernels/direct_grad_weight.cu ask for.
bool can_go_direct(const Problem& p) {
  return is_small_kernel(p) && has_near_elements(p);
}

// So little that the time until the first bytes arrive is most of it.
bool has_little_to_do(const Problem& p) {
  constexpr int64_t kFewOutputs = 512 << 10, kFewProducts = 4 << 20;
  return outputs_of(p) <= kFewOutputs && outputs_of(p) * p.taps() <= kFewProducts;
}

// What kernels/windows_channels_last.cu asks for: channels side by side, and sizes that 32 bits count. Images may lie
// anywhere.
bool can_go_windows_channels_last(const Problem& p) {
  constexpr int64_t kMany = 1 << 20, kMost = 1 << 30, kMostTaps = 255, kFar = 1 << 10;
  if (p.pass == Pass::kGradWeight || p.batch == 0) return false;
  if (std::max(p.kernel_h, p.kernel_w) > kMostTaps || std::max(p.padding_h, p.padding_w) > kMany) return false;
  if (std::max({p.stride_h, p.stride_w, p.dilation_h, p.dilation_w}) > kFar) return false;
  // Of many single channels, and a tap or two, or of one channel alone, kernels/generic.cu makes less work.
  constexpr int64_t kManyOutputs = 1 << 18;
  if (p.pass == Pass::kForward && p.filters() % 2 == 1 && (p.taps() <= 2 || p.filters() == 1) &&
      p.out_height > kManyOutputs / p.out_width / p.filters() / p.batch)
    return false;
  // In float64 at stride 1 kernels/columns.cu has no more to do than the image has rows, and no more in registers.
  if (p.dtype == DType::kFloat64 && p.stride_h == 1 && p.stride_w == 1 && p.height < p.kernel_h && p.width < p.kernel_w)
    return false;
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

bool claims_direct(const Problem& p) {
  if (p.pass == Pass::kGradWeight || !can_go_direct(p)) return false;
  if (p.dtype == DType::kFloat64) {
    // In channels_last windows share pixels where outputs are many.
    constexpr int64_t kManyOutputs = 1 << 20, kShares = 10;
    const bool channels_last = p.channels > 1 && (p.pass == Pass::kForward ? p.output : p.input).stride[1] == 1;
    if (channels_last && p.taps() >= kShares && outputs_of(p) >= kManyOutputs) return false;
    return p.taps() <= kDirectFloat64Taps && (p.pass == Pass::kForward || p.stride_h == 1);
  }
  return has_little_to_do(p) || !(claims_march_nchw(p) || claims_stream_nchw(p) || claims_toeplitz_nchw(p) ||
                                  claims_march_channels_last(p) || can_go_windows_channels_last(p));
}

// What kernels/columns_grad_weight.cu asks for: columns that lie side by side, rather than channels, and what 32 bits
// count: rows and columns with those beside the image, steps from one to the next, sums, and gradients of a filter.
bool can_go_columns_grad_weight(const Problem& p) {
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

bool claims_direct_grad_weight(const Problem& p) {
  const int64_t gradients = p.batch * p.out_height * p.out_width;  // of a filter
  if (p.pass != Pass::kGradWeight || p.dtype == DType::kFloat64 || !can_go_direct(p) || gradients == 0) return false;
  const int64_t products = p.filters() * gradients * p.taps();
  // Blocks of a cluster share a filter, for 3x3 alone.
  constexpr int64_t kFewProducts = 4 << 20;
  if (p.capability >= 90 && p.taps() == 9 && p.kernel_h == 3 && p.stride_h == 1 && p.dilation_h == 1 &&
      products <= kFewProducts)
    return true;
  // One block sums a filter, and has one product for two loads where there is one tap.
  constexpr int64_t kFewOfOneTap = 512;
  if (p.taps() == 1 && gradients > kFewOfOneTap && can_go_columns_grad_weight(p)) return false;
  constexpr int64_t kFewProductsOfFilter = 10 << 10, kMoreProducts = 8 << 20;
  return gradients * p.taps() <= kFewProductsOfFilter && products <= kMoreProducts &&
         (gradients <= 64 || !claims_march_grad_weight_channels_last(p));
}

// What kernels/gather.cu and kernels/gather_grad_weight.cu ask for: no taps far beside the image, whose offsets 32 bits
// do not count.
bool can_gather(const Problem& p) {
  constexpr int64_t kFar = 1 << 20;
  return p.batch > 0 && std::max({p.kernel_h, p.kernel_w, p.stride_h, p.stride_w}) < kFar &&
         (p.kernel_h - 1) * p.dilation_h < kFar && (p.kernel_w - 1) * p.dilation_w < kFar && has_near_elements(p);
}

// Whether direct.cu loads several elements at once, of arrays that begin anywhere.
bool has_direct_vectors(const Problem& p) {
  if (p.dtype == DType::kFloat64 || p.kernel_h != p.kernel_w || p.taps() == 1 || p.stride_h > 1 || p.dilation_h > 1)
    return false;
  constexpr int64_t kVector = 2;
  const auto are_whole = [&](const View& view, int64_t across) {
    return ((p.batch > 1 ? view.stride[0] : 0) | view.stride[2] | across) % kVector == 0;
  };
  const View& target = p.pass == Pass::kForward ? p.output : p.input;
  if (p.channels > 1 && target.stride[1] == 1)
    return p.multiplier == 1 && p.channels % kVector == 0 && p.input.stride[1] == 1 && p.output.stride[1] == 1 &&
           are_whole(p.input, p.input.stride[3]) && are_whole(p.output, p.output.stride[3]);
  return (p.pass == Pass::kForward || p.multiplier == 1) && p.padding_w == p.kernel_w / 2 && p.width % kVector == 0 &&
         p.input.stride[3] == 1 && p.output.stride[3] == 1 && are_whole(p.input, p.input.stride[1]) &&
         are_whole(p.output, p.output.stride[1]);
}

// Microseconds that a GPU of 132 multiprocessors takes to gather all taps, without what the smallest problem takes.
double gather_time(const Problem& p) {
  constexpr double kOfMicrosecond = 2.3e6, kOfOutput = 16;  // taps, and what an output takes besides, in taps
  constexpr double kTogether = 25;                          // taps that are loaded together
  const double latency = p.dtype == DType::kFloat64 ? 1 : 0.35;
  const bool forward = p.pass == Pass::kForward;
  const auto reaching = [&](int64_t kernel, int64_t stride) {
    return static_cast<double>(forward ? kernel : (kernel + stride - 1) / stride);
  };
  const auto step = [](int64_t stride, int64_t dilation) { return stride / std::gcd(stride, dilation); };
  const auto outputs = static_cast<double>(outputs_of(p));
  const double taps =
      reaching(p.kernel_h, step(p.stride_h, p.dilation_h)) * reaching(p.kernel_w, step(p.stride_w, p.dilation_w));
  // Where a thread has two outputs, they share weights and most pixels.
  const bool two = p.dtype != DType::kFloat64 && (forward ? p.stride_h : 1) <= 2 * p.dilation_h;
  return outputs * (two ? 0.5 * kOfOutput + 0.65 * taps : kOfOutput + taps) / kOfMicrosecond +
         std::ceil(taps / kTogether - 1) * latency;
}

bool claims_gather(const Problem& p) {
  if (p.pass == Pass::kGradWeight || !can_gather(p)) return false;
  if (p.pass == Pass::kGradInput && std::max(p.stride_h, p.stride_w) > kGatherStride) return false;
  if (!GatherTile(p).fits()) return false;
  const bool channels_last = p.channels > 1 && (p.pass == Pass::kForward ? p.output : p.input).stride[1] == 1;
  const bool is_float64 = p.dtype == DType::kFloat64;
  // How long others may take before they are faster, by what they are: microseconds, as above.
  constexpr double kOfSmallPlanes = 1.3, kOfPixels = 1.5, kOfStreams = 2.1, kOfPlan = 2.5, kOfWindows = 2.2;
  if (is_small_kernel(p)) {
    constexpr int64_t kFewFloat64 = 192 << 10;  // outputs; with more, a thread has several in direct.cu
    if (p.taps() == 1 || has_direct_vectors(p) || (is_float64 && outputs_of(p) > kFewFloat64)) return false;
    if (p.multiplier > 1 && (p.pass == Pass::kGradInput || channels_last)) return false;
    return has_little_to_do(p) || (!is_float64 && p.taps() >= 25 && gather_time(p) <= kOfStreams && !channels_last &&
                                   !claims_toeplitz_nchw(p));
  }
  // Others have plans of their own at stride 1, and with dilation in 16 bits in NCHW.
  const bool at_stride = p.stride_h > 1 || p.stride_w > 1, dilated = p.dilation_h > 1 || p.dilation_w > 1;
  const bool has_plan = !is_float64 && !at_stride && (!dilated || (size_of(p.dtype) == 2 && have_rows(p)));
  const double most = claims_toeplitz_small_planes(p)                      ? kOfSmallPlanes
                      : has_plan && channels_last && size_of(p.dtype) == 2 ? kOfPixels
                      : has_plan                                           ? kOfPlan
                                                                           : kOfWindows;
  return gather_time(p) <= most;
}

bool claims_gather_grad_weight(const Problem& p) {
  const int64_t gradients = p.batch * p.out_height * p.out_width, sums = p.filters() * p.taps();
  constexpr int64_t kManyGradients = 16 << 10, kManySums = 16 << 10;  // of a filter; of few gradients in NCHW
  if (p.pass != Pass::kGradWeight || gradients == 0 || gradients > kManyGradients || !can_gather(p)) return false;
  const bool channels_last = p.filters() > 1 && p.input.stride[1] == 1 && p.output.stride[1] == 1;

  if (!channels_last && sums > kManySums) return false;
  constexpr int64_t kFewProducts = 512 << 10, kMoreProducts = 1 << 20;
  constexpr int64_t kOfTap = 64 << 10, kOfManyTaps = 80 << 10, kManyTaps = 49, kFewTaps = 25;
  if (is_small_kernel(p)) {  // the more taps, the less others have under way at once
    if (p.taps() == 1) return !channels_last && gradients * sums <= kFewProducts;
    return gradients * sums <= p.taps() * (p.taps() < kManyTaps ? kOfTap : kOfManyTaps) &&
           !claims_direct_grad_weight(p);
  }
  if (p.taps() < kFewTaps && claims_toeplitz_grad_weight_channels_last(p)) return false;
  return gradients * sums <= kMoreProducts;
}

// What kernels/large_float32.cu and kernels/large_float32_grad_weight.cu ask for: any strides, any sizes whose blocks
// can be counted in 32 bits.
bool can_go_large_float32(const Problem& p) {
  if (p.dtype != DType::kFloat32 || p.batch == 0 || p.stride_h != 1 || p.stride_w != 1 || p.dilation_h != 1 ||
      p.dilation_w != 1)
    return false;
  constexpr int64_t kMost = 63, kMostPixels = 1 << 13;  // of a side
  if (p.shared_memory < 64 << 10) return false;         // what the largest kernels need; no GPU has less
  if (p.taps() == 1 || std::max(p.kernel_h, p.kernel_w) > kMost) return false;
  if (p.padding_h >= p.kernel_h || p.padding_w >= p.kernel_w) return false;
  return std::max({p.height, p.width, p.out_height, p.out_width}) <= kMostPixels &&
         p.batch <= (1 << 30) / (p.filters() * p.out_height * (p.out_width / 16 + 1));
}

bool claims_large_float32(const Problem& p) {
  return p.pass != Pass::kGradWeight && (p.pass == Pass::kForward || p.multiplier == 1) &&
         (is_large_kernel(p) || have_rows(p)) && can_go_large_float32(p);
}

bool claims_large_float32_grad_weight(const Problem& p) {
  return p.pass == Pass::kGradWeight && (is_large_kernel(p) || have_rows(p)) && can_go_large_float32(p);
}

// Of what kernels for any size claim, that where they have more to do than products: where there are few of these; in
// 16 bits, where taps fill few places of a tile of 8 x 16 on tensor cores; and lower kernels of one column in float32.
bool claims_columns_grad_weight(const Problem& p) {
  if (!can_go_columns_grad_weight(p)) return false;
  const double products = static_cast<double>(p.batch * p.filters() * p.out_height * p.out_width * p.taps());
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

// What kernels/walk_grad_weight_channels_last.cu asks for: channels side by side, offsets of 32 bits, also beside the
// image, and gradients, sums and blocks that 32 bits count.
bool can_walk(const Problem& p) {
  if (p.pass != Pass::kGradWeight || p.batch == 0 || p.filters() == 1) return false;
  if ((p.input.stride[1] != 1 && p.channels > 1) || p.output.stride[1] != 1) return false;
  constexpr int64_t kLimit = 1 << 30, kFar = 1 << 20, kMostSums = 1 << 26, kMostTaps = 1 << 16;
  constexpr int64_t kAhead = 8;  // pixels beside the image that a thread counts
  for (const int64_t side : {p.padding_h, p.padding_w, p.stride_h, p.stride_w, p.dilation_h, p.dilation_w})
    if (side >= kFar) return false;
  const int64_t ahead_h = kAhead * p.stride_h * p.dilation_h, ahead_w = kAhead * p.stride_w * p.dilation_w;
  const auto fits = [&](const View& view, int64_t height, int64_t width) {
    return (p.batch - 1) * view.stride[0] < kLimit && (height + 2 * p.padding_h + ahead_h) * view.stride[2] +
                                                              (width + 2 * p.padding_w + ahead_w) * view.stride[3] <
                                                          kLimit;
  };
  return p.taps() < kMostTaps && p.filters() * (p.taps() + 1) < kMostSums &&
         p.batch * p.out_height * p.out_width * p.filters() < kLimit && fits(p.input, p.height, p.width) &&
         fits(p.output, p.out_height, p.out_width);
}

// Whether there is so little to do that it is done before a kernel for larger problems, which would serve as well, has
// its first pixels where it wants them: few products, and, but where that one copies the images first, few sums.
bool claims_little_walk(const Problem& p) {
  if (!can_walk(p)) return false;
  constexpr int64_t kMillion = 1 << 20, kFewSums = 4096, kFewTaps = 9;
  const int64_t sums = p.filters() * p.taps(), products = p.batch * p.out_height * p.out_width * sums;
  const auto few = [&](int64_t millions) { return products <= millions * kMillion && sums <= kFewSums; };
  if (claims_toeplitz_grad_weight_channels_last(p)) return few(3);
  if (claims_march_grad_weight_channels_last(p)) {
    if (p.taps() > kFewTaps) return few(5);
    constexpr int64_t kSmallPixel = 64;  // bytes, which leave lanes idle there
    return p.multiplier == 1 && (p.taps() == 1 ? few(2) : few(8) && p.channels * size_of(p.dtype) <= kSmallPixel);
  }
  if (claims_outer_grad_weight(p)) return few(8);
  if (claims_hankel_grad_weight(p)) return few(24) || p.taps() <= kFewTaps;
  return claims_large_float32_grad_weight(p) && few(16);
}

bool claims_walk_grad_weight_channels_last(const Problem& p) {
  return can_walk(p) && !claims_little_walk(p);
}

// What tensor cores would serve as well, but more slowly: one row or column of taps leaves most of a band matrix to
// zeros, and few products are done before matrices are there.
bool claims_little_windows(const Problem& p) {
  constexpr int64_t kShortBand = 16, kFewProducts = 4 << 20;
  const bool is_short = std::min(p.kernel_h, p.kernel_w) == 1 && p.taps() <= kShortBand;
  return !is_small_kernel(p) && (is_short || outputs_of(p) <= kFewProducts / p.taps()) &&
         claims_toeplitz_channels_last(p) && can_go_windows_channels_last(p);
}

bool claims_windows_channels_last(const Problem& p) {
  return can_go_windows_channels_last(p) && !claims_little_windows(p);
}

// Products of a tap and a pixel of the image, along one side of a plane.
double products(int64_t size, int64_t out_size, int64_t kernel, int64_t stride, int64_t padding, int64_t dilation) {
  int64_t sum = 0;
  for (int64_t tap = 0, room = padding; tap < kernel; ++tap, room -= dilation) {  // pixels before the first output's
    const int64_t begin = room > 0 ? (room + stride - 1) / stride : 0;
    const int64_t end = size + room > 0 ? std::min((size + room - 1) / stride + 1, out_size) : 0;
    sum += std::max<int64_t>(end - begin, 0);
  }
  return static_cast<double>(sum);
}

// Those of a plane.
double products(const Problem& p) {
  return products(p.height, p.out_height, p.kernel_h, p.stride_h, p.padding_h, p.dilation_h) *
         products(p.width, p.out_width, p.kernel_w, p.stride_w, p.padding_w, p.dilation_w);
}

// What kernels/fft.cu asks for, where it was asked for and is faster than products one by one.
bool can_go_fft(const Problem& p) {
  if (!p.allow_fft || p.dtype != DType::kFloat32 || p.batch == 0) return false;
  if (p.stride_h != 1 || p.stride_w != 1 || p.dilation_h != 1 || p.dilation_w != 1) return false;
  if (p.padding_h >= p.kernel_h || p.padding_w >= p.kernel_w || !have_rows(p)) return false;
  const FftCut cut = choose_fft_cut(p);
  if (!cut.serves() || cut.bytes(p, 1) > p.shared_memory) return false;
  // Sides, planes and tiles are counted in 32 bits.
  constexpr int64_t kMany = 1 << 20, kMost = 1 << 30;
  if (std::max({p.height, p.width, p.out_height, p.out_width}) > kMany) return false;
  if (p.batch > kMost / cut.tiles() / p.filters()) return false;
  return cut.cost() < products(p);
}

bool claims_fft(const Problem& p) {
  return p.pass != Pass::kGradWeight && (p.pass == Pass::kForward || p.multiplier == 1) && can_go_fft(p);
}

bool claims_fft_grad_weight(const Problem& p) {
  return p.pass == Pass::kGradWeight && can_go_fft(p);
}

// How many taps on either side of a kernel lie too far from any output's pixel to meet the image, at stride 1.
int64_t far_taps(int64_t size, int64_t kernel, int64_t padding, int64_t dilation) {
  const int64_t reach = (kernel - 1) * dilation - padding - (size - 1);
  return reach <= 0 ? 0 : std::min((reach + dilation - 1) / dilation, padding / dilation);
}

// Whether the phases of a problem with a stride or a dilation make one that is so much faster that their copies, and
// two more kernels, pay.
bool claims_phases(const Problem& p) {
  if (p.dtype == DType::kFloat64 || p.batch == 0) return false;
  if (p.stride_h == 1 && p.stride_w == 1 && p.dilation_h == 1 && p.dilation_w == 1) return false;
  // Numbers of pixels, phases and elements are counted in 32 bits.
  constexpr int64_t kFar = 1 << 8, kMany = 1 << 20, kMost = 1 << 30;
  if (std::max({p.stride_h, p.stride_w, p.dilation_h, p.dilation_w}) > kFar) return false;
  for (const int64_t size : {p.height, p.width, p.out_height, p.out_width, p.kernel_h, p.kernel_w, p.padding_h,
                             p.padding_w, p.batch, p.filters()})
    if (size > kMany) return false;
  const Phases phases(p);
  const Problem& made = phases.problem;
  if (made.height < 1 || made.width < 1) return false;
  if (p.pass == Pass::kForward && phases.taps() > 1) return false;  // sums over phases take too long
  if (p.pass == Pass::kGradInput && p.multiplier > 1)
    return false;                    // nor do sums over filters have a plan that is fast
  constexpr int64_t kManyTaps = 49;  // for which large_float32 is so much faster
  if (p.dtype == DType::kFloat32 && made.taps() < kManyTaps) return false;
  const auto elements = [](int64_t batch, int64_t planes, int64_t height, int64_t width) {
    return static_cast<double>(batch) * static_cast<double>(planes) * static_cast<double>(height * width);
  };
  const double input = elements(made.batch, made.channels, made.height, made.width);
  const double output = elements(made.batch, made.filters(), made.out_height, made.out_width);
  const auto extent = [](const View& view, int64_t batch, int64_t planes, int64_t height, int64_t width) {
    double all = 0;
    const int64_t sizes[] = {batch, planes, height, width};
    for (int d = 0; d < 4; ++d) all += static_cast<double>(sizes[d]) * std::abs(static_cast<double>(view.stride[d]));
    return all;
  };
  if (std::max({input, output, elements(1, made.filters(), made.kernel_h, made.kernel_w),
                extent(p.input, p.batch, p.channels, p.height, p.width),
                extent(p.output, p.batch, p.filters(), p.out_height, p.out_width),
                extent(p.weight, p.filters(), 1, p.kernel_h, p.kernel_w)}) > kMost)
    return false;
  // Time, in picoseconds. Rows of few columns are multiplied as if they were longer.
  constexpr double kLaunches = 5e6, kCopy = 1, kProduct = 0.09, kOtherProduct = 0.3;
  constexpr int64_t kColumns = 16;
  const double planes = static_cast<double>(p.batch) * static_cast<double>(p.filters());
  const double narrow =
      static_cast<double>((made.out_width + kColumns - 1) / kColumns * kColumns) / static_cast<double>(made.out_width);
  const double time = kLaunches + kCopy * (input + output) +
                      kProduct * narrow * products(made) * static_cast<double>(made.batch * made.filters());
  return time < kOtherProduct * products(p) * planes && choose(made).id != PlanId::kGeneric;
}

bool can_go_windows_nchw(const Problem& p) {
  const View& target = p.pass == Pass::kForward ? p.output : p.input;
  const bool channels_last = target.stride[1] == 1 && (p.pass == Pass::kForward ? p.filters() : p.channels) > 1;
  // Of planes with fewer rows than the kernel generic has a way of its own in float64 at stride 1.
  constexpr int64_t kFewRows = 5;
  if (p.dtype == DType::kFloat64 && p.stride_h == 1 && p.stride_w == 1 && p.kernel_h >= kFewRows &&
      p.kernel_h > std::min(p.height, p.out_height) && p.taps() > kDirectFloat64Taps)
    return false;
  return p.pass != Pass::kGradWeight && !channels_last && fits_windows_nchw(p);
}

// What large_float32 would serve as well, but more slowly: of few taps.
bool claims_short_windows(const Problem& p) {
  constexpr int64_t kFewTaps = 16;
  return p.taps() <= kFewTaps && can_go_windows_nchw(p) && claims_large_float32(p);
}

bool claims_windows_nchw(const Problem& p) {
  return can_go_windows_nchw(p) && !claims_short_windows(p);
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
  if (left == all || !(is_large_kernel(p) || (!is_large_kernel(problem) && 2 * left <= all))) return problem;
  // The gradient of other taps needs a launch for zeros, which large kernels in 16 bits take as long for as for many
  // taps.
  if (p.pass == Pass::kGradWeight) {
    constexpr int64_t kMost = (int64_t{1} << 31) - 1;  // counted in 32 bits
    const bool pays = size_of(p.dtype) == 2 ? 2 * left <= all : 8 * left <= 7 * all;
    if (!is_large_kernel(p) || !pays || all > kMost / p.filters()) return problem;
  }
  return p;
}

const std::vector<Plan>& plans() {
  static const std::vector<Plan> table = {
      {PlanId::kFft, "fft", "a large kernel in float32, and Fourier transforms are allowed: one for each plane",
       claims_fft},
      {PlanId::kFftGradWeight, "fft_grad_weight",
       "a large kernel in float32, and Fourier transforms are allowed: one for each plane of input and gradient",
       claims_fft_grad_weight},
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
      {PlanId::kWalkGradWeightChannelsLast, "walk_grad_weight_channels_last",
       "little to do in channels_last: threads walk along rows of the gradient, straight from memory",
       claims_little_walk},
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
      {PlanId::kWindowsChannelsLast, "windows_channels_last",
       "channels_last and no plan of its own: windows of rows in registers, weights in shared memory",
       claims_little_windows},
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
      {PlanId::kWindowsNchw, "windows_nchw",
       "a kernel, stride and dilation that nothing is compiled for: windows in shared memory, sums in registers",
       claims_short_windows},
      {PlanId::kLargeFloat32, "large_float32",
       "a kernel in float32 of a size that has no plan of its own: planes in shared memory, sums in registers",
       claims_large_float32},
      {PlanId::kLargeFloat32GradWeight, "large_float32_grad_weight",
       "a kernel in float32 of a size that has no plan of its own: input and gradient in shared memory, sums in "
       "registers",
       claims_large_float32_grad_weight},
      {PlanId::kWindowsNchw, "windows_nchw",
       "a kernel, stride and dilation that nothing is compiled for: windows in shared memory, sums in registers",
       claims_windows_nchw},
      {PlanId::kWalkGradWeightChannelsLast, "walk_grad_weight_channels_last",
       "any kernel in channels_last: threads walk along rows of the gradient, straight from memory",
       claims_walk_grad_weight_channels_last},
      {PlanId::kWindowsChannelsLast, "windows_channels_last",
       "channels_last and no plan of its own: windows of rows in registers, weights in shared memory",
       claims_windows_channels_last},
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
      {PlanId::kGeneric, "generic", "no specialised plan claims this problem", claims_everything},
  };
  return table;
}

const Plan& choose(const Problem& problem) {
  for (const Plan& plan : plans())
    if (plan.claims(problem)) return plan;
  std::abort();  // unreachable: the last plan claims everything
}

const Plan& choose(const Problem& problem, std::string_view name) {
  bool exists = false;  // a plan may stand in the table twice, once for each rank among the others
  for (const Plan& plan : plans()) {
    if (name != plan.name) continue;
    if (plan.claims(problem)) return plan;
    exists = true;
  }
  throw std::runtime_error(exists ? "plan '" + std::string(name) + "' does not serve this problem"
                                  : "there is no plan '" + std::string(name) + "'");
}

}  // namespace dwconv
