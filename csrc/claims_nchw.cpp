// Claims on planes whose rows follow each other in memory without gaps: small kernels in NCHW.
//
// Right: rows stream through rings in shared memory by copies of 16 bytes, which need no alignment of planes or rows,
// only that all images lie alike; a ring has to fit, and rows and bytes are counted in 32 bits. What computes from
// there is compiled for each kernel, or on tensor cores for band matrices of some sizes.
// Pays: warps have whole tiles of columns to do, and tensor cores more than a few taps. stream_nchw and
// stream_grad_weight_nchw, which ask for least, take what is left.
#include <algorithm>
#include <cstdint>
#include <limits>

#include "claims.h"
#include "facts.h"
#include "kernels/batch_grad_weight_nchw.h"
#include "kernels/lanes_forms.h"
#include "kernels/march_nchw.h"
#include "kernels/moved_rows.h"
#include "kernels/small_kernels.h"
#include "kernels/stream.h"
#include "kernels/toeplitz_large.h"

namespace dwconv {
namespace {

// ---------------------------------------------------------------------------- arrays that stream

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

// What all kernels that stream have in common.
bool can_stream(const Problem& p) {
  const int64_t element = size_of(p.dtype);
  return p.dtype != DType::kFloat64 && p.batch > 0 && pads_within_kernel(p) &&
         is_stream(p.input, p.batch, p.channels, p.height, p.width, element) &&
         is_stream(p.output, p.batch, p.filters(), p.out_height, p.out_width, element);
}

bool is_joined(const View& view, int64_t batch, int64_t image) {
  return batch == 1 || view.stride[0] == image;
}

constexpr int64_t kTileColumns = 7;  // of kernels/stream_nchw.cu and kernels/stream_grad_weight_nchw.cu

// What kernels/stream_nchw.cuh asks for, and `filter_bytes` more of shared memory for each filter.
bool fits_stream_nchw(const Problem& p, int64_t filter_bytes) {
  const bool forward = p.pass == Pass::kForward;
  const int64_t element = size_of(p.dtype);
  // If one of the arrays is not joined, both go image by image.
  const int64_t in_image = p.channels * p.height * p.width, out_image = p.filters() * p.out_height * p.out_width;
  if ((is_joined(p.input, p.batch, in_image) != is_joined(p.output, p.batch, out_image)) &&
      (in_image * element % kUnit != 0 || out_image * element % kUnit != 0))
    return false;
  const auto fits_int = [](int64_t stride) {
    return stride < std::numeric_limits<int32_t>::max() / 16 && stride > std::numeric_limits<int32_t>::min() / 16;
  };
  if (!fits_int(p.weight.stride[2]) || !fits_int(p.weight.stride[3])) return false;

  const auto fits = [&](int64_t source_rows, int64_t target_rows, int64_t filters) {
    return kHead + kDepth * stage_bytes(source_rows, source_width(p) * element) + kTail +
               round_up(target_rows * target_width(p) * element + kUnit, 128) + filters * filter_bytes <=
           p.shared_memory;
  };
  if (!forward && p.multiplier > 1)  // a sum over filters: whole planes only
    return fits(p.multiplier * source_height(p), target_height(p), p.multiplier);
  const int64_t rows = std::min<int64_t>(kLeastRows, target_height(p));
  const int64_t step = forward ? rows * p.stride_h : (rows + p.stride_h - 1) / p.stride_h;
  return fits(step + extent_h(p), rows, 1);
}

// How input and gradient stream through shared memory side by side: as rings, or each chunk of rows in a place of its
// own, or as rings of rows that are moved to where 16 bytes begin.
enum class Room { kRings, kStages, kMovedRings };

bool can_stream_grad_weight(const Problem& p, Room room) {
  if (p.pass != Pass::kGradWeight || !is_small_kernel(p) || p.out_width < kTileColumns || !can_stream(p)) return false;
  if (p.filters() > (1 << 30) / (p.taps() + 1)) return false;  // sums are counted in 32 bits
  int64_t source_bytes = p.width * size_of(p.dtype), grad_bytes = p.out_width * size_of(p.dtype);
  const int64_t extent = extent_h(p), rows = std::min<int64_t>(kLeastRows, p.out_height);
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

// ---------------------------------------------------------------------------- band matrices

bool can_toeplitz_nchw(const Problem& p) {
  if (!has_tensor_cores(p) || p.pass == Pass::kGradWeight) return false;
  if (p.stride_h != p.stride_w || p.stride_h > 2) return false;
  if (p.stride_h == 2 && p.pass == Pass::kGradInput && !SmallKernel<7, 7, 2, 1>::is_of(p)) return false;
  // The columns of a band matrix, and the rows that it is compiled for.
  const int64_t rows = extent_h(p), columns = extent_w(p);
  const bool wide = columns > kMaxBandColumns;
  if (wide              ? columns > kMaxWideColumns || rows > 1 || p.stride_h > 1
      : p.stride_h == 1 ? rows > 7 && rows != 9 && rows != 11
                        : rows != 3 && rows != 5 && rows != 7)
    return false;
  return can_stream(p) &&
         fits_stream_nchw(p, kChunkBytes + kBandHeadBytes + rows * (wide ? kWideRowBytes : kBandRowBytes));
}

// Whether toeplitz_large is faster, by its way for whole planes: of 28 columns, with 8 columns of a kernel or 9, and
// more rows than registers of a warp are for, or where planes begin between multiples of 16 bytes.
bool prefers_large_planes(const Problem& p) {
  constexpr int64_t kColumns = 28, kFewTaps = 8, kManyRows = 11, kTogether = 16;
  constexpr int64_t kMuch = 2048;  // units of 4 rows of 16 images, of which all warps have one
  const View& source = p.pass == Pass::kForward ? p.input : p.output;
  const int64_t groups = (p.batch + kTogether - 1) / kTogether;
  return p.width == kColumns && p.out_width == kColumns && std::min(p.kernel_h, p.kernel_w) >= kFewTaps &&
         (p.kernel_h >= kManyRows || offset_within(kUnit, source) > 0) && has_unit_steps(p) &&
         (p.pass == Pass::kForward || p.multiplier == 1) && 4 * p.batch >= 3 * kTogether * groups &&
         groups * p.filters() * ((target_height(p) + 3) / 4) > kMuch;
}

// ---------------------------------------------------------------------------- warps that march

using March7x7 = SmallKernel<kMarchKernel, kMarchKernel, 1, 1>;
using March7x7Stride2 = SmallKernel<kMarchKernel, kMarchKernel, 2, 1>;  // but for grad_input
using MarchDilated = SmallKernel<3, 3, 1, 2>;

// What kernels that march down contiguous planes ask for,
bool can_march(const Problem& p) {
  constexpr int64_t kShared = 96 << 10;  // what the least that a block loads takes up
  return p.dtype == DType::kFloat32 && p.shared_memory >= kShared && target_width(p) >= kStrip && can_stream(p);
}

// Rows that warps march down, all of them together.
int64_t rows_of_warps(const Problem& p, const MarchLanes& lanes) {
  return p.batch * ((target_channels(p) + lanes.planes - 1) / lanes.planes) * lanes.spans * target_height(p);
}

// and of their lanes: a warp has all filters of a channel.
bool fits_lanes(const Problem& p, const MarchLanes& lanes) {
  return lanes.planes % p.multiplier == 0 && rows_of_warps(p, lanes) <= std::numeric_limits<int32_t>::max();
}

// Whether lanes have columns, and so many rows that every warp of a GPU has some.
bool are_busy(const Problem& p, const MarchLanes& lanes, int64_t least_rows) {
  constexpr double kBusy = 0.6;
  return lanes.busy >= kBusy && rows_of_warps(p, lanes) >= least_rows;
}

// Whether stream_nchw has a tile that knows what lies outside of the plane, and does not multiply it.
bool has_known_bounds(const Problem& p) {
  return p.kernel_h <= kMarchKernel && p.height == p.width && p.out_height == p.height && p.out_width == p.height &&
         (p.height == kTileColumns || p.height == 2 * kTileColumns) && p.padding_h == p.kernel_h / 2 &&
         p.padding_w == p.padding_h && claims_stream_nchw(p);
}

// ---------------------------------------------------------------------------- rows of many images at once

// What kernels ask for that take rows of many images at once: planes that follow each other without gaps.
bool has_runs(const Problem& p) {
  if (!has_tensor_cores(p) || p.stride_h != p.stride_w || p.stride_h > 2) return false;
  const auto lies = [&](const View& view, int64_t planes, int64_t height, int64_t width) {
    constexpr int64_t kMany = 1 << 15, kMost = 1 << 29;  // rows, columns, and elements of an image
    return height <= kMany && width <= kMany && planes <= kMost / (height * width) &&
           (view.stride[3] == 1 || width == 1) && (view.stride[2] == width || height == 1) &&
           (view.stride[1] == height * width || planes == 1);
  };
  // Blocks are counted in 32 bits.
  return p.batch > 0 && p.batch <= (1 << 26) / p.filters() && p.padding_h <= (1 << 20) && p.padding_w <= (1 << 20) &&
         lies(p.input, p.channels, p.height, p.width) && lies(p.output, p.filters(), p.out_height, p.out_width);
}

// Whether all rows of both arrays begin with a multiple of so many bytes.
bool have_aligned_rows(const Problem& p, int64_t bytes) {
  const auto has = [&](const View& view, int64_t width) {
    return 2 * width % bytes == 0 && offset_within(bytes, view) == 0 &&
           (p.batch == 1 || 2 * view.stride[0] % bytes == 0);
  };
  return has(p.input, p.width) && has(p.output, p.out_width);
}

constexpr int64_t kMostAlignedColumns = 64;  // of planes that aligned_grad_weight_nchw.cu copies chunks of rows of

// Whether all rows of both arrays are of whole units, which begin anywhere: aligned_grad_weight_nchw.cu moves them.
bool have_rows_of_units(const Problem& p) {
  const auto has = [&](const View& view, int64_t width) {
    return 2 * width % kUnit == 0 && (p.batch == 1 || 2 * view.stride[0] % kUnit == 0) &&
           width >= kLeastAlignedColumns && width <= kMostAlignedColumns;
  };
  return has(p.input, p.width) && has(p.output, p.out_width);
}

// Rows of a kernel, with what dilation puts between them; without any, and at stride 1.
constexpr int64_t kMaxBatchRows = 7, kMoreBatchRows = 9;

bool can_batch_grad_weight_nchw(const Problem& p) {
  if (p.pass != Pass::kGradWeight || !has_runs(p) || p.padding_w >= extent_w(p)) return false;
  const int64_t rows = extent_h(p), columns = extent_w(p);
  const int64_t most_rows = p.stride_h == 1 && p.dilation_h == 1 ? kMoreBatchRows : kMaxBatchRows;
  int64_t width = p.width, out_width = p.out_width;  // in shared memory
  if (rows > most_rows) {
    // Taller ones of one column, as words, or of whole units.
    if (rows > kMaxColumnRows || columns > 1 || p.stride_h > 1) return false;
    if (!have_aligned_rows(p, 4) && !have_rows_of_units(p)) return false;
    width = out_width = round_up(p.width, 8);
  }
  if (columns > kMaxBandColumns) {
    // Wider ones of one row, where rows begin with 16 bytes, or are moved there: windows reach 8 columns beside a tile.
    constexpr int64_t kReach = 8, kRoomToMove = 128 << 10, kChunkRows = 7 * 16, kRoomForSums = 16 << 10;
    if (rows > 1 || p.stride_h > 1 || p.padding_w > kReach || columns - 1 - p.padding_w > kReach) return false;
    const bool has_chunks = have_aligned_rows(p, kUnit) && std::min(p.width, p.out_width) >= kLeastAlignedColumns &&
                            2 * kChunkRows * (3 * (width + 8) + 2 * (out_width + 8)) + kRoomForSums <= p.shared_memory;
    if (!has_chunks && !(have_rows_of_units(p) && p.shared_memory >= kRoomToMove)) return false;
  }
  // A tile's rows of 16 images twice, with room for what surrounds them.
  const int64_t tile = std::min<int64_t>(p.out_height, 7);
  const int64_t source = p.out_height <= 7 ? p.height : std::min((tile - 1) * p.stride_h + rows, p.height);
  return 2 * 16 * (2 * (source * width + tile * out_width) + 96) + 512 <= p.shared_memory;
}

// Whether rows have an even number of columns in both arrays.
bool have_rows_of_words(const Problem& p) {
  return p.width % 2 == 0 && p.out_width % 2 == 0;
}

// Whether planes whose rows are not of whole words are multiplied as they lie, or in rows of whole units that they are
// cut in, or that rows are laid apart in: where images begin at the same place within a unit.
bool lies_in_units(const Problem& p) {
  constexpr int64_t kPixels = 8, kSide = 14;  // of a unit, of a plane that is halved
  if (p.input.stride[0] % kPixels != 0 || p.output.stride[0] % kPixels != 0) return false;
  if (p.stride_h == 2) return p.height == kSide && p.width == kSide && p.out_height == kSide / 2;
  const bool keeps_size = p.out_height == p.height && p.out_width == p.width;
  const bool is_small = keeps_size && p.multiplier == 1 && std::max(p.height, p.width) <= kPixels;
  const bool is_3x3 = p.kernel_h == 3 && p.kernel_w == 3 && p.dilation_h == p.dilation_w && p.dilation_h <= 2;
  if (is_small || !is_3x3) return is_small;
  const bool is_cut = keeps_size && p.height * p.width % kPixels == 0;
  return std::min(p.width, p.out_width) >= kLeastAlignedColumns &&
         (is_cut || (p.dilation_h == 2 && std::max(p.width, p.out_width) <= kMostAlignedColumns));
}

// Whether it pays to multiply images that are read element by element: for many taps that CUDA cores have no tile for,
// or many rows of them.
bool pays_by_elements(const Problem& p) {
  constexpr int64_t kManyTaps = 16, kManyRows = 6;
  const int64_t rows = extent_h(p), taps = p.stride_h == 1 ? rows * extent_w(p) : p.taps();
  return taps >= kManyTaps && ((p.stride_h == 1 && rows >= kManyRows) || !claims_stream_grad_weight_nchw(p));
}

}  // namespace

// ---------------------------------------------------------------------------- forward and grad_input

bool claims_stream_nchw(const Problem& p) {
  if (p.pass == Pass::kGradWeight || !is_small_kernel(p) || target_width(p) < kTileColumns) return false;
  if (p.pass == Pass::kGradInput && p.stride_h > 1 && p.padding_h % 2 != p.padding_w % 2) return false;
  const bool sums = p.pass == Pass::kGradInput && p.multiplier > 1;  // over filters: compiled for squares only
  if (sums && (p.kernel_h != p.kernel_w || p.kernel_h == 1 || p.dilation_h > 1)) return false;
  // Then filters may lie in shared memory.
  return can_stream(p) && fits_stream_nchw(p, sums ? kChunkBytes + round_up(4 * p.taps(), kUnit) : 0);
}

bool claims_march_nchw(const Problem& p) {
  constexpr int64_t kFar = 1 << 27;  // offsets of weights are counted in 32 bits
  if (p.pass == Pass::kGradWeight || std::max(p.weight.stride[2], p.weight.stride[3]) >= kFar) return false;
  const bool is_strided = p.pass == Pass::kForward && March7x7Stride2::is_of(p), is_one = p.multiplier == 1;
  const bool is_dilated = is_one && MarchDilated::is_of(p), is_9x9 = is_one && March9x9::is_of(p);
  if (!is_strided && !is_dilated && !is_9x9 && !(is_one && March7x7::is_of(p))) return false;
  if (!can_march(p)) return false;
  const MarchLanes lanes(target_width(p), target_channels(p));
  if (!fits_lanes(p, lanes)) return false;

  constexpr int64_t kManyRows = 16 << 10;
  if (!are_busy(p, lanes, kManyRows) || has_known_bounds(p)) return false;
  // large_float32 is faster where it copies whole planes.
  if (is_9x9 && p.capability >= 90 && p.height * p.width % 4 == 0 && p.out_height * p.out_width % 4 == 0)
    return !is_sure_of_rows(p);
  // Rows of a multiple of 32 columns lie in the same banks of shared memory: stream_nchw, whose tiles lie below each
  // other, would read most of them several times.
  constexpr int64_t kBanks = 32;
  return !is_dilated || source_width(p) % kBanks == 0;
}

bool claims_toeplitz_nchw(const Problem& p) {
  if (!can_toeplitz_nchw(p)) return false;

  // A warp computes 8 tiles of 16 columns at once: small planes do not fill it, nor do planes that toeplitz_large takes
  // whole, with many images at once.
  const int64_t pixels = target_width(p) * target_height(p);
  if (pixels < (p.stride_h == 1 ? 196 : 512)) return false;
  if (is_large_kernel(p) && (fits_toeplitz_large_images(p) || prefers_large_planes(p))) return false;
  // Where CUDA cores have a tile, they are as fast for the smallest kernels, and for 3x3 on small planes.
  const int64_t few_pixels = p.kernel_h == p.kernel_w ? 784 : 2048;
  const int64_t least_area = p.stride_h > 1 ? 36 : pixels < few_pixels ? 25 : 9;
  return (extent_h(p) * extent_w(p) >= least_area && p.taps() >= 9) || !claims_stream_nchw(p);
}

bool claims_toeplitz_small_planes(const Problem& p) {
  constexpr int64_t kMaxWidth = 16, kMaxHeight = 64;
  const bool can = p.pass != Pass::kGradWeight && p.multiplier == 1 && has_runs(p) && extent_h(p) <= kMaxBatchRows &&
                   std::max(p.height, p.out_height) <= kMaxHeight &&
                   std::max(p.width, p.out_width * p.stride_h) <= kMaxWidth;

  constexpr int64_t kFewImages = 8;
  return can && p.batch >= kFewImages && p.taps() > 1;
}

// ---------------------------------------------------------------------------- grad_weight

bool claims_stream_grad_weight_nchw(const Problem& p) {
  const bool has_stages = p.dtype == DType::kFloat32 && p.kernel_h == p.kernel_w && p.taps() > 1;
  return can_stream_grad_weight(p, has_stages ? Room::kStages : Room::kRings);
}

bool claims_march_grad_weight_nchw(const Problem& p) {
  if (p.pass != Pass::kGradWeight || p.filters() > (1 << 30) / (p.taps() + 1)) return false;
  const bool is_strided = March7x7Stride2::is_of(p), is_9x9 = p.multiplier == 1 && March9x9::is_of(p);
  if (!is_strided && !is_9x9 && !(p.multiplier == 1 && March7x7::is_of(p))) return false;
  if (!can_march(p)) return false;
  const MarchLanes lanes(target_width(p), target_channels(p));
  if (!fits_lanes(p, lanes)) return false;

  // On small planes every warp adds up the sums of many filters in the end: of 7x7, they stream; at a stride, with one
  // filter a channel, larger ones do.
  constexpr int64_t kFewPixels = 784, kMorePixels = 2500;
  if (p.out_height * p.out_width < (is_strided && p.multiplier == 1 ? kMorePixels : kFewPixels)) return false;
  if (is_9x9 && is_sure_of_lanes(p)) return false;  // large_float32_grad_weight is faster
  return are_busy(p, lanes, is_strided ? 16 << 10 : 32 << 10);
}

bool claims_toeplitz_grad_weight_nchw(const Problem& p) {
  if (!has_tensor_cores(p) || p.stride_h != 1 || p.kernel_h != p.kernel_w) return false;
  if (p.kernel_h != 3 && p.kernel_h != 5 && p.kernel_h != 7) return false;

  // For 3x3 it pays on long rows, and to move rows on wide ones. A warp adds up 4 tiles of 16 columns at once: small
  // planes do not fill it.
  constexpr int64_t kLong = 1024, kWide = 256, kLeastPixels = 784;
  if (p.kernel_h == 3 && (p.dilation_h > 1 || p.out_width < kLong)) return false;
  return p.out_height * p.out_width >= kLeastPixels &&
         (can_stream_grad_weight(p, Room::kRings) ||
          (p.out_width >= kWide && can_stream_grad_weight(p, Room::kMovedRings)));
}

bool claims_batch_grad_weight_nchw(const Problem& p) {
  if (!can_batch_grad_weight_nchw(p)) return false;

  // 16 images are multiplied together: where few of them are there it does not pay, nor for a few taps at a stride.
  constexpr int64_t kTogether = 16, kFewTaps = 25;
  if (4 * p.batch < 3 * round_up(p.batch, kTogether)) return false;
  if (p.taps() == 1 || (p.stride_h > 1 && p.taps() < kFewTaps && claims_stream_grad_weight_nchw(p))) return false;
  // CUDA cores are as fast for 3x3, unless planes are small, or rows long enough to be copied in chunks.
  constexpr int64_t kFewPixels = 784;
  if (p.taps() <= 9 && has_unit_steps(p) && p.width < kLeastAlignedColumns && p.height * p.width >= kFewPixels &&
      claims_stream_grad_weight_nchw(p))
    return false;
  return have_rows_of_words(p) || lies_in_units(p) || pays_by_elements(p);
}

}  // namespace dwconv
