// Forward, and grad_input at stride 1, of large kernels in float32, on CUDA cores: as many FMA as there are products
// of a tap and a pixel, and little besides.
//
// A block has one filter (some in channels_last), some images and a tile of their planes in shared memory. A thread
// computes some columns of a row; all lanes of a warp share the columns, and lie on neighbouring filters first, images
// then and rows then. They walk together over the kernel rows that meet the image for any of them, and along each over
// the taps that do: taps above, below and beside the image cost nothing where they are outside of it for the whole
// warp. Which filters, images, rows and columns make a block is decided at run time, by an estimate of the time.
// Kernels much higher than wide go along their columns: rows and columns change places.
//
// Along a row, a thread multiplies blocks of 28 columns where those fit: 28 pixels of the source and as many outputs
// stay in registers, and each weight of the kernel, read once, is one diagonal of the square between them, from the
// middle outwards, or from a corner on, as far as the kernel goes. Elsewhere, strips of up to 16 outputs keep a window
// of the source in registers and read the weights one after the other. In images of at most 14 columns every pixel of a
// row meets every output of a row: both, and the weights, stay in registers as a whole.
//
// Zeros that surround the image, or the kernel, give NaN where they meet Inf or NaN. So outputs that are not finite are
// computed again, tap by tap, where that may have happened.
#include <algorithm>
#include <limits>

#include "lanes.h"
#include "lanes_channels_last.h"
#include "large_float32.cuh"
#include "launch.h"
#include "mapping.h"
#include "overlap.cuh"

namespace dwconv {
namespace {

constexpr int64_t kNone = std::numeric_limits<int64_t>::min();  // no offset

constexpr int kWide = 16;   // columns of a strip
constexpr int kBlock = 28;  // columns of a block
// What of the costs of strips is a cycle of those of blocks: where an image is one block wide, or more. In
// channels_last strips take longer than estimated.
constexpr double kBlockCycles = 1.27, kBlocksCycles = 1.46;
constexpr double kBlockCyclesChannelsLast = 1.1, kBlocksCyclesChannelsLast = 1.25;

// Lanes whose sums are in shared memory at once, on their way out.
constexpr int kStagedLanes = 8;

// Bytes between the lanes' sums on their way out: no bank conflicts.
constexpr int stage_pitch(int side) {
  return side == kBlock ? 4 * kBlock : 4 * (kWide + 4);
}

struct Arguments {
  const float* source;
  const float* weight;
  const float* bias;
  float* target;
  int64_t source_stride[4], target_stride[4], weight_stride[4], bias_stride;  // in elements
  int batch, height, width, out_height, out_width, kernel_h, kernel_w, padding_h, padding_w, fan_out;
  int filters;

  // The tile of a block.
  int planes, images, rows, columns, bands, slices;  // planes: the most filters, a power of two
  int plane_bits;                                    // their binary logarithm
  int unit;                                          // outputs that are written at once
  int shift;                                         // where a tile's first column lies in its row, in elements
  int weight_shift;                                  // the same of a kernel row's first weight
  int row_bytes, image_bytes, weight_bytes;  // from row to row, from image to image, from kernel row to kernel row
  int plane_bytes, kernel_bytes;             // from filter to filter
  int planes_at, zeros_at, bytes;            // in shared memory, behind weights and sums on their way out
  bool filled;                               // whether no zeros are needed between the rows of the source
  Divider by_groups, by_bands, by_slices, by_images, by_kernel_w;
};

// A tile's part of the images, clipped.
struct Tile {
  int filter, filters, first_image, images, row, rows, column, columns;
  int source_row, source_rows, source_column, source_columns;

  __device__ Tile(const Arguments& a) {
    uint32_t block = blockIdx.x;
    filter = a.by_groups.split(block) * a.planes;
    filters = min(a.planes, a.filters - filter);
    row = a.by_bands.split(block) * a.rows;
    column = a.by_slices.split(block) * a.columns;
    first_image = block * a.images;
    images = min(a.images, a.batch - first_image);
    rows = min(a.rows, a.out_height - row);
    columns = min(a.columns, a.out_width - column);
    source_row = max(row - a.padding_h, 0);
    source_rows = max(min(row + rows - 1 + a.kernel_h - a.padding_h, a.height) - source_row, 0);
    source_column = max(column - a.padding_w, 0) & ~3;
    source_columns = max(min(column + columns - 1 + a.kernel_w - a.padding_w, a.width) - source_column, 0);
  }
};

// sum[o] += x[o + d] * tap for all o such that o and o + d are columns of a block: what a weight of the kernel adds to
// a row. All products of a weight follow each other, and the sums for even and for odd d are apart: see correlate().
template <int d>
__device__ __forceinline__ void multiply_diagonal(float (&sum)[2][kBlock], const float (&x)[kBlock], float tap) {
  constexpr int kCount = kBlock - (d < 0 ? -d : d), kFirst = d < 0 ? -d : 0, kOdd = d & 1;
#pragma unroll
  for (int n = 0; n < kCount; ++n) {
    const int o = kFirst + (kOdd ? kCount - 1 - n : n);
    sum[kOdd][o] = fmaf(x[o + d], tap, sum[kOdd][o]);
  }
}

// Four of them, from d = kFirst on or, backwards, down, as far as `last`. The weights are those of d & -4 and the
// three behind it.
template <int kFirst, bool kBackwards>
__device__ __forceinline__ void multiply_four(float (&sum)[2][kBlock], const float (&x)[kBlock], const float (&w)[4],
                                              int last) {
  const auto multiply = [&](auto number) {
    constexpr int d = kFirst + (kBackwards ? -1 : 1) * decltype(number)::value;
    if constexpr (d > -kBlock && d < kBlock) multiply_diagonal<d>(sum, x, w[d & 3]);
  };
  const auto reaches = [&](int number) { return kBackwards ? last <= kFirst - number : last >= kFirst + number; };
  if (reaches(3)) {
    multiply(std::integral_constant<int, 0>{});
    multiply(std::integral_constant<int, 1>{});
    multiply(std::integral_constant<int, 2>{});
    multiply(std::integral_constant<int, 3>{});
  } else {
    if (reaches(0)) multiply(std::integral_constant<int, 0>{});
    if (reaches(1)) multiply(std::integral_constant<int, 1>{});
    if (reaches(2)) multiply(std::integral_constant<int, 2>{});
  }
}

// The diagonals from `low` to `high` where outputs and pixels are the same columns: from the middle, which a kernel
// never leaves out, outwards. So every row begins at the same place in the code, and leaves it where the kernel ends.
// `weight`: the place of that of d = 0. What is read ahead may lie up to kBlock numbers before a row of weights, or
// some behind it.
template <int kGroup = 0>
__device__ __forceinline__ void multiply_outwards(float (&sum)[2][kBlock], const float (&x)[kBlock],
                                                  float (&w)[2][2][4], uint32_t weight, int low, int high) {
  constexpr int kFirst = 4 * kGroup;
  if constexpr (kFirst + 4 < kBlock) {
    load_four(w[(kGroup + 1) % 2][0], weight + 4 * (kFirst + 4));
    load_four(w[(kGroup + 1) % 2][1], weight - 4 * (kFirst + 8));
  }
  multiply_four<kFirst, false>(sum, x, w[kGroup % 2][0], high);
  multiply_four<-1 - kFirst, true>(sum, x, w[kGroup % 2][1], low);
  if constexpr (kFirst + 4 < kBlock)
    if (max(-1 - low, high) >= kFirst + 4) multiply_outwards<kGroup + 1>(sum, x, w, weight, low, high);
}

// Those where pixels lie further right than outputs, from the first one to `last`, or, backwards, further left, from
// the last one down to it: from the corner of the square. Pixels are read as they are needed.
template <bool kBackwards, int kGroup = 0>
__device__ __forceinline__ void multiply_inwards(float (&sum)[2][kBlock], float (&x)[kBlock], float (&w)[2][4],
                                                 uint32_t source, uint32_t weight, int last) {
  constexpr int kFirst = kBackwards ? kBlock - 1 - 4 * kGroup : 4 * kGroup - kBlock, kEnd = kBlock / 2;
  constexpr int kNext = kBackwards ? kFirst - 4 : kFirst + 4;
  const auto load = [&](auto group) {
    constexpr int g = decltype(group)::value, first = kBackwards ? kBlock - 4 - 4 * g : 4 * g - kBlock;
    load_four(w[g % 2], weight + 4 * first);
    if constexpr (g < kBlock / 4) {
      constexpr int column = kBackwards ? kBlock - 4 - 4 * g : 4 * g;
      load_four(&x[column], source + 4 * column);
    }
  };
  if constexpr (kGroup == 0) load(std::integral_constant<int, 0>{});
  if constexpr (kGroup + 1 < kEnd) load(std::integral_constant<int, kGroup + 1>{});
  multiply_four<kFirst, kBackwards>(sum, x, w[kGroup % 2], last);
  if constexpr (kGroup + 1 < kEnd)
    if (kBackwards ? last <= kNext : last >= kNext)
      multiply_inwards<kBackwards, kGroup + 1>(sum, x, w, source, weight, last);
}

// One task of a warp: a strip of columns, of 32 rows. kSide: of narrow images, or kBlock, or 0.
template <int kSide, int kStrip>
__device__ void compute(const Arguments& a, const Tile& tile, int column, int chunk, bool check) {
  constexpr int kPitch = stage_pitch(kSide);
  constexpr bool kBlocks = kSide == kBlock, kNarrow = kSide > 0 && !kBlocks;
  const int lane = threadIdx.x % 32, items = tile.rows * a.images * a.planes, item = 32 * chunk + lane;
  struct Place {
    int row, image, plane;
  };
  const auto place_of = [&](int item) {
    uint32_t row = min(item, items - 1);
    const int plane = row & (a.planes - 1);
    row >>= a.plane_bits;
    const int image = a.by_images.split(row);
    return Place{tile.row + static_cast<int>(row), image, plane};
  };
  const Place own = place_of(item);
  const Walk walk(a.kernel_w, a.padding_w, a.width, column, kStrip);
  const int origin = kSide > 0 ? 0 : 4 * (a.shift - tile.source_column) + walk.source;
  Rows r;
  r.y = own.row - a.padding_h, r.height = a.height;
  r.source = a.planes_at + origin + own.plane * a.plane_bytes + own.image * a.image_bytes +
             (r.y - tile.source_row) * a.row_bytes;
  r.zeros = a.zeros_at + origin, r.source_bytes = a.row_bytes;
  r.weight = own.plane * a.kernel_bytes + 4 * a.weight_shift +
             (kNarrow   ? 4 * (a.padding_w - (kSide - 1))
              : kBlocks ? 4 * (a.padding_w - kBlock - column)
                        : walk.weight);
  r.weight_bytes = a.weight_bytes;
  // Steps in which any lane meets the image.
  r.begin = max(a.padding_h - place_of(32 * chunk + 31).row, 0);
  r.end = min(a.height + a.padding_h - place_of(32 * chunk).row, a.kernel_h);

  float sum[2][kStrip] = {};
  if constexpr (kNarrow) {
    const auto add = [&](uint32_t source, uint32_t weight) {
      float x[(kSide + 3) / 4 * 4], w[(2 * kSide + 2) / 4 * 4];
      load_row(x, source);
      load_row(w, weight);
#pragma unroll
      for (int u = 0; u < kSide; ++u)
#pragma unroll
        for (int o = 0; o < kSide; ++o) sum[u % 2][o] = fmaf(x[u], w[kSide - 1 + u - o], sum[u % 2][o]);
    };
    walk_rows(r, a.kernel_h, add, [] {});
  } else if constexpr (kBlocks) {
    r.weight += 4 * kBlock;
    for (int block = 0; block < a.width; block += kBlock, r.source += 4 * kBlock, r.weight += 4 * kBlock) {
      // Column o + d of the block meets output o of the strip through weight d + offset.
      const int offset = block - column + a.padding_w;
      const int low = once(max(-offset, 1 - kBlock)), high = once(min(a.kernel_w - 1 - offset, kBlock - 1));
      if (low > high) continue;
      if (block == column)
        walk_rows(
            r, a.kernel_h,
            [&](uint32_t source, uint32_t weight) {
              float x[kBlock], w[2][2][4];
              load_four(w[0][0], weight);
              load_four(w[0][1], weight - 16);
              load_row(x, source);
              multiply_outwards(sum, x, w, weight, low, high);
            },
            [] {});
      else if (block > column)
        walk_rows(
            r, a.kernel_h,
            [&](uint32_t source, uint32_t weight) {
              float x[kBlock], w[2][4];
              multiply_inwards<false>(sum, x, w, source, weight, high);
            },
            [] {});
      else
        walk_rows(
            r, a.kernel_h,
            [&](uint32_t source, uint32_t weight) {
              float x[kBlock], w[2][4];
              multiply_inwards<true>(sum, x, w, source, weight, low);
            },
            [] {});
    }
  } else {
    correlate_rows(sum, r, walk, a.kernel_h, [] {});
  }

  const int filter = tile.filter + own.plane;
  const bool valid = item < items && own.image < tile.images && own.plane < tile.filters;
  const float bias = a.bias && valid ? a.bias[filter * a.bias_stride] : 0;
  float* target = a.target + tile.first_image * a.target_stride[0] + column * a.target_stride[3];
  const int64_t offset =
      valid ? own.image * a.target_stride[0] + filter * a.target_stride[1] + own.row * a.target_stride[2] : kNone;
  float total[kStrip];
#pragma unroll
  for (int o = 0; o < kStrip; ++o) total[o] = sum[0][o] + sum[1][o] + bias;
  // Whether there are sums to be computed again: asked first of all of them together.
  bool again = check;
  if constexpr (kNarrow) {
    float zero = 0;
#pragma unroll
    for (int o = 0; o < kSide; ++o) zero = fmaf(total[o], 0.f, zero);
    again = __shfl_sync(~0u, __any_sync(~0u, zero != 0.f), 0);
  }
  const auto checked = [&](float value, const Place& at, int o) {
    if (again && !is_finite(value) && column + o < a.out_width) {
      const int filter = tile.filter + at.plane;
      value = sum_by_taps(a, filter, tile.first_image + at.image, at.row, column + o);
      if (a.bias) value += a.bias[filter * a.bias_stride];
    }
    return value;
  };
  const auto store = [&](auto word) {
    using Word = decltype(word);
    constexpr int kCount = sizeof(Word) / sizeof(float);
    float* const to = target + offset;
    if (valid)
#pragma unroll
      for (int n = 0; n < kStrip; n += kCount)
        if (column + n < a.out_width) {
          if constexpr (kCount == 4)
            *reinterpret_cast<float4*>(to + n) = {total[n], total[n + 1], total[n + 2], total[n + 3]};
          else if constexpr (kCount == 2)
            *reinterpret_cast<float2*>(to + n) = {total[n], total[n + 1]};
          else
            to[n] = total[n];
        }
  };
  // What stores stand in branches that all lanes leave together: behind a return, ptxas would take warps for divided.
  if (a.planes > 1 || a.target_stride[3] != 1) {  // neighbouring lanes write neighbouring channels, or rows
    float* to = target + offset;
    if (valid && !again) {
#pragma unroll
      for (int o = 0; o < kStrip; ++o, to += a.target_stride[3])
        if (column + o < a.out_width) *to = total[o];
    } else if (valid) {
#pragma unroll
      for (int o = 0; o < kStrip; ++o, to += a.target_stride[3])
        if (column + o < a.out_width) *to = checked(total[o], own, o);
    }
  } else if (a.unit == 4 && !again) {
    store(float4{});
  } else if (kNarrow && a.unit == 2 && !again) {  // pieces of sectors, but no time
    store(float2{});
  } else if (kNarrow && !again) {
    store(float{});
  } else {  // through shared memory, some lanes' sums at once, so that neighbouring lanes write neighbouring columns
    const int stage = a.planes_at - (blockDim.x / 32 - threadIdx.x / 32) * kStagedLanes * kPitch;
    const int width = kStrip / a.unit, owners = 32 / width,
              o = lane % width * a.unit;  // owners: whose sums are written
#pragma unroll 1
    for (int first = 0; first < 32; first += kStagedLanes) {
      __syncwarp();
      if (lane / kStagedLanes == first / kStagedLanes)
#pragma unroll
        for (int n = 0; n < kStrip; n += 4)
          shared<float4>(stage + lane % kStagedLanes * kPitch + 4 * n) = {total[n], total[n + 1], total[n + 2],
                                                                          total[n + 3]};
      __syncwarp();
      for (int staged = 0; staged < kStagedLanes; staged += owners) {
        const int at = staged + lane / width, owner = first + at;
        const int64_t to = __shfl_sync(~0u, offset, owner);
        if (to == kNone || lane >= owners * width || at >= kStagedLanes || column + o >= a.out_width) continue;
        const int from = stage + at * kPitch + 4 * o;
        if (again) {
          const Place place = place_of(32 * chunk + owner);
          for (int n = 0; n < a.unit; ++n)
            target[to + (o + n) * a.target_stride[3]] = checked(shared<float>(from + 4 * n), place, o + n);
        } else if (a.unit == 4) {
          *reinterpret_cast<float4*>(target + to + o) = shared<float4>(from);
        } else if (a.unit == 2) {
          *reinterpret_cast<float2*>(target + to + o) = shared<float2>(from);
        } else {
          target[to + o * a.target_stride[3]] = shared<float>(from);
        }
      }
    }
  }
}

// Threads of a block, at most, and blocks of a multiprocessor, at least.
constexpr int threads_for(int side) {
  return side == 0 || side == kBlock ? kLargeThreads : 224;
}
constexpr int blocks_for(int side) {
  return side == 0 || side == kBlock ? 2 : 3;
}

template <int kSide>
__global__ void __launch_bounds__(threads_for(kSide), blocks_for(kSide))
    large_float32(const __grid_constant__ Arguments a) {
  __shared__ int next_task;
  const Tile tile(a);
  if (threadIdx.x == 0) next_task = blockDim.x / 32;

  // Zeros around everything, then what they surround.
  const bool filled = a.filled && tile.images == a.images && tile.filters == a.planes;
  for (int at = 16 * threadIdx.x; at < a.bytes; at += 16 * blockDim.x)
    if (!filled || at < a.planes_at || at >= a.zeros_at) shared<float4>(at) = {};
  __syncthreads();
  wait_for_kernel_before();
  let_next_kernel_start();
  begin_copies(a.source + tile.first_image * a.source_stride[0] + tile.filter / a.fan_out * a.source_stride[1] +
                   tile.source_row * a.source_stride[2] + tile.source_column * a.source_stride[3],
               a.source_stride,
               {tile.images, tile.filters, tile.source_rows, tile.source_columns, a.planes, a.planes_at + 4 * a.shift,
                a.image_bytes, a.plane_bytes, a.row_bytes});
  const auto for_each_weight = [&](auto&& visit) {
    for (int plane = 0; plane < tile.filters; ++plane) {
      const float* weights = a.weight + (tile.filter + plane) * a.weight_stride[0];
#pragma unroll 4
      for (int tap = threadIdx.x; tap < a.kernel_h * a.kernel_w; tap += blockDim.x) {
        uint32_t i = tap;
        const int j = a.by_kernel_w.split(i);
        visit(plane * a.kernel_bytes + static_cast<int>(i) * a.weight_bytes + 4 * (a.weight_shift + j),
              weights + static_cast<int>(i) * a.weight_stride[2] + j * a.weight_stride[3]);
      }
    }
  };
  for_each_weight([](int to, const float* from) { begin_copy<4>(shared_address(to), from); });
  finish_copies();
  // Weights of Inf meet zeros beside the image; where images are narrow, pixels of Inf meet zeros beside the kernel.
  bool finite = kSide == 0 || kSide == kBlock;
  if (finite) for_each_weight([&](int at, const float*) { finite &= is_finite(shared<float>(at)); });
  const bool check = __shfl_sync(~0u, __syncthreads_or(!finite), 0);  // or else ptxas would take warps for divided

  constexpr int kStrip = kSide == kBlock ? kBlock : kWide;
  const int chunks = (tile.rows * a.images * a.planes + 31) / 32;
  const int strips = (tile.columns + kStrip - 1) / kStrip, tasks = chunks * strips;
  for (int task = __shfl_sync(~0u, threadIdx.x / 32, 0); task < tasks;) {
    // Those that take longest first: at the edges of the image, strips and rows have fewer products.
    int rank = task / strips, strip = task - rank * strips;
    if constexpr (kSide != kBlock) {
      const int turn = task / chunks;
      rank = task - turn * chunks, strip = middle_first(turn, strips);
    }
    const int chunk = middle_first(rank, chunks), column = begin_of_strip(tile.columns, strip);
    if constexpr (kSide == kBlock)
      compute<kSide, kSide>(a, tile, strip * kBlock, chunk, check);
    else if constexpr (kSide > 0)
      compute<kSide, kSide <= 8 ? 8 : 16>(a, tile, tile.column, chunk, check);
    else
      visit_strip(width_of_strip(tile.columns, column),
                  [&](auto width) { compute<0, width>(a, tile, tile.column + column, chunk, check); });
    if (threadIdx.x % 32 == 0) task = atomicAdd(&next_task, 1);
    task = __shfl_sync(~0u, task, 0);
  }
}

// How a problem is cut into blocks: the tile, and the warps of a block.
struct Cut {
  int side;  // of narrow images, or kBlock, or 0
  int planes, images, rows, columns, warps;
};

// Everything of the arguments that depends on the cut; returns the bytes of shared memory.
int64_t place(Arguments& a, const Cut& cut) {
  const auto modulo = [](int value) { return value & 3; };
  a.planes = cut.planes, a.images = cut.images, a.rows = cut.rows, a.columns = cut.columns;
  a.bands = static_cast<int>(ceil_div(a.out_height, a.rows));
  a.slices = static_cast<int>(ceil_div(a.out_width, a.columns));
  int source_rows = 1;
  for (int row = 0; row < a.out_height; row += a.rows) {
    const int end = row + std::min(a.rows, a.out_height - row) - 1 + a.kernel_h;
    source_rows = std::max(source_rows, std::min(end - a.padding_h, a.height) - std::max(row - a.padding_h, 0));
  }
  int source_columns = std::min(a.slices > 1 ? a.columns + a.kernel_w + 2 : a.width, a.width), weight_columns;
  // Numbers may be read, unused, some places before the first that counts. Zeros lie between the rows of the source, as
  // far as a strip reaches beyond the image and as its steps end behind it; or between the rows of weights.
  if (cut.side == kBlock) {
    // Before the first row of weights there is room for what is read ahead.
    a.shift = 0, a.weight_shift = modulo(kBlock - a.padding_w);
    weight_columns = a.kernel_w + a.weight_shift, a.weight_shift += kBlock;
    source_columns = static_cast<int>(round_up(a.width, kBlock));
  } else if (cut.side > 0) {
    a.shift = 0, a.weight_shift = 16 + modulo(cut.side - 1 - a.padding_w);
    weight_columns = a.kernel_w + 16, source_columns = cut.side;
  } else {
    a.shift = kWide + 4 + modulo(a.padding_w - a.kernel_w), a.weight_shift = modulo(-a.kernel_w);
    weight_columns = a.kernel_w + a.weight_shift;
    source_columns += kWide - 1 + modulo(a.kernel_w - a.width - a.padding_w);
  }
  a.filled = cut.side > 0 && source_columns == a.width;
  // Eight lanes, on neighbouring filters first, images then and rows then, meet in different banks.
  a.plane_bits = 0;
  while (1 << a.plane_bits < a.planes) ++a.plane_bits;
  const int lanes = a.planes * a.images;
  a.row_bytes = static_cast<int>(spread(4 * source_columns, lanes < 8 ? lanes : 0));
  const int64_t image_bytes = spread(int64_t{source_rows} * a.row_bytes, a.planes < 8 ? a.planes : 0);
  a.weight_bytes = static_cast<int>(round_up(4 * weight_columns, 16));
  a.kernel_bytes = static_cast<int>(spread(a.kernel_h * a.weight_bytes, a.planes > 1 ? 1 : 0));
  a.planes_at = static_cast<int>(round_up(a.planes * a.kernel_bytes + 4 * (a.weight_shift + kBlock + 16), 16)) +
                (a.planes > 1 ? 0 : kStagedLanes * cut.warps * stage_pitch(cut.side));
  const int64_t plane_bytes = spread(a.images * image_bytes, a.planes > 1 ? 1 : 0);
  const int64_t zeros_at = a.planes_at + a.planes * plane_bytes;
  const int64_t bytes = zeros_at + round_up(4 * (a.shift + kWide + 24), 16) + a.row_bytes;
  a.image_bytes = static_cast<int>(image_bytes), a.plane_bytes = static_cast<int>(plane_bytes);
  a.zeros_at = static_cast<int>(zeros_at);
  a.bytes = static_cast<int>(bytes);
  return bytes;
}

double cost_of(const Arguments& a, const Cut& cut, bool channels_last, int64_t bytes, const Device& device) {
  const bool blocks = cut.side == kBlock;
  double row_cycles = 0.43 * cut.side * cut.side + 24;  // along a source row, of all strips
  if (blocks) {
    row_cycles = row_cycles_of_blocks(kBlock, a.width, a.out_width, a.kernel_w, a.padding_w, 0.78, 61);
  } else if (cut.side == 0) {
    row_cycles = 0;
    for (int column = 0, width; column < a.out_width; column += width) {
      width = width_of_strip(a.out_width, column);
      row_cycles += Walk(a.kernel_w, a.padding_w, a.width, column, width).steps * (9 + 2 * width) + 43;
    }
  }
  const double strips = static_cast<double>(ceil_div(a.out_width, blocks ? kBlock : kWide));
  double rows = 0, chunks = 0;  // that warps walk along
  int bands = 0;
  for (int band = 0; band < a.out_height; band += a.rows * std::max(a.bands / 16, 1), ++bands) {  // some stand for all
    const int lanes = a.images * a.planes, items = std::min(a.rows, a.out_height - band) * lanes;
    for (int item = 0; item < items; item += 32, ++chunks) {
      const int highest = band + item / lanes, lowest = band + std::min(item + 31, items - 1) / lanes;
      const int begin = std::max(a.padding_h - lowest, 0);
      rows += std::max(std::min(a.height + a.padding_h - highest, a.kernel_h) - begin, 0);
    }
  }
  Work work{};
  work.cycles = (rows * row_cycles + chunks * strips * (blocks ? 230 : 1100)) / (bands * a.slices);
  work.tasks = chunks * strips / (bands * a.slices);
  const double of_channel = a.plane_bytes / a.row_bytes * (a.width + (blocks ? 0 : 16.0));
  work.scattered = channels_last ? of_channel * (blocks ? a.planes : 1) : 0;
  work.bytes = bytes, work.warps = cut.warps, work.registers = blocks ? 128 : 102;
  work.blocks = static_cast<double>(a.bands) * a.slices * ceil_div(a.filters, a.planes) * ceil_div(a.batch, a.images);
  if (blocks) {
    const bool single = std::max(a.width, a.out_width) <= kBlock;
    const double cycle = channels_last ? (single ? kBlockCyclesChannelsLast : kBlocksCyclesChannelsLast)
                         : single      ? kBlockCycles
                                       : kBlocksCycles;
    return cycle * estimate(work, {6900, 0.074, 0.56, 2.69, 0.51, 0, 0.26}, device);
  }
  return estimate(work, {1100, 0.083, 0.83, 1.86, 0.6, 0.032, 0.5}, device);
}

// The cut that is thought to be the fastest of those that fit.
Cut choose_cut(Arguments& a, bool channels_last, int64_t shared_memory) {
  Cut best{};
  double least = 0;
  const Device& device = current_device();
  const auto consider = [&](const Cut& cut) {
    const int64_t bytes = place(a, cut);
    if (bytes + 128 > shared_memory) return;
    const double cost = cost_of(a, cut, channels_last, bytes, device);
    if (least == 0 || cost < least) best = cut, least = cost;
  };
  const int whole = static_cast<int>(round_up(a.out_width, kWide));
  const int side = std::max(a.width, a.out_width), all_blocks = static_cast<int>(round_up(a.out_width, kBlock));
  const int few = channels_last ? std::min(8, a.filters) : 1;  // fewer channels are less than what memory reads at once
  for (int columns = whole; columns >= kWide && (least == 0 || columns >= 64);
       columns = columns > 64 ? 64 : columns / 2)
    for (int images = 1; images < 2 * a.batch && images <= kMostImages; images *= 2)
      for (int bands = 1; bands <= a.out_height; bands = bands < 6 ? bands + 1 : 2 * bands)
        for (const int warps : {8, 7, 5, 4}) {
          const int rows = static_cast<int>(ceil_div(a.out_height, bands)), some = std::min(images, a.batch);
          for (int planes = 1; planes == 1 || (channels_last && planes <= 8); planes *= 2) {
            if (warps != 7) consider({0, planes, some, rows, columns, warps});
            if (columns < whole) continue;
            if (side > 14 && planes >= few) consider({kBlock, planes, some, rows, all_blocks, warps});
            if (side <= 14 && planes >= few && 32 * warps <= threads_for(7))
              consider({side <= 7 ? 7 : 14, planes, some, rows, columns, warps});
          }
        }
  return best;
}

}  // namespace

void launch_large_float32(const Problem& p, cudaStream_t stream) {
  if (launch_lanes(p, stream) || launch_lanes_channels_last(p, stream)) return;
  const Mapping m(p);
  Arguments a{};
  take_pass(a, p, m);
  const bool channels_last = m.fan_out == 1 && is_channels_last(a.source_stride, m.sources, a.width);
  if (goes_along_columns(a)) turn(a, {a.source_stride, a.target_stride, a.weight_stride});
  static thread_local Decisions<13, Cut> decisions;
  const Cut cut = decisions({current_device().id, p.shared_memory, channels_last, a.batch, a.filters, a.height, a.width,
                             a.out_height, a.out_width, a.kernel_h, a.kernel_w, a.padding_h, a.padding_w},
                            [&] { return choose_cut(a, channels_last, p.shared_memory); });
  const int bytes = static_cast<int>(place(a, cut));
  const uint32_t low = static_cast<uint32_t>(reinterpret_cast<uintptr_t>(a.target) / 4 | a.target_stride[0] |
                                             a.target_stride[1] | a.target_stride[2] | a.out_width);
  a.unit = a.target_stride[3] != 1 ? 1 : low % 4 == 0 ? 4 : low % 2 == 0 ? 2 : 1;
  const int64_t groups = ceil_div(a.filters, a.planes);
  a.by_groups = Divider(groups), a.by_bands = Divider(a.bands), a.by_slices = Divider(a.slices);
  a.by_images = Divider(a.images), a.by_kernel_w = Divider(a.kernel_w);
  const int64_t blocks = groups * a.bands * a.slices * ceil_div(a.batch, a.images);
  const auto kernel = cut.side == 7        ? large_float32<7>
                      : cut.side == 14     ? large_float32<14>
                      : cut.side == kBlock ? large_float32<kBlock>
                                           : large_float32<0>;
  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  launch_early<Arguments>(kernel, a, blocks, 32 * cut.warps, stream, {.shared_bytes = bytes});
  check_launch("large_float32");
}

}  // namespace dwconv
