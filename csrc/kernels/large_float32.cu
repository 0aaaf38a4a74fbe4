// Forward, and grad_input at stride 1, of large kernels in float32, on CUDA cores: as many FMA as there are products
// of a tap and a pixel, and little besides.
//
// A block has one filter (some in channels_last), some images and a tile of their planes in shared memory. A thread
// computes 16 columns of a row; all lanes of a warp share the columns, and so the weights, and lie on neighbouring
// images first and rows then. They walk together over the kernel rows that meet the image for any of them, and along
// each over the taps that do: taps above, below and beside the image cost nothing where they are outside of it for the
// whole warp. Which images, rows and columns make a block is decided at run time, by an estimate of the time.
//
// Along a row, a thread keeps a window of the source in registers and reads the weights one after the other. In images
// of at most 14 columns every pixel of a row meets every output of a row: both stay in registers as a whole.
//
// Zeros that surround the image, or the kernel, give NaN where they meet Inf or NaN. So outputs that are not finite are
// computed again, tap by tap, where that may have happened.
#include <algorithm>
#include <limits>

#include "large_float32.cuh"
#include "launch.h"
#include "mapping.h"

namespace dwconv {
namespace {

constexpr int64_t kNone = std::numeric_limits<int64_t>::min();  // no offset

constexpr int kWide = 16;                     // columns of a strip
constexpr int kStagePitch = 4 * (kWide + 4);  // bytes between the lanes' sums on their way out: no bank conflicts

struct Arguments {
  const float* source;
  const float* weight;
  const float* bias;
  float* target;
  int64_t source_stride[4], target_stride[4], weight_stride[4], bias_stride;  // in elements
  int batch, height, width, out_height, out_width, kernel_h, kernel_w, padding_h, padding_w, fan_out;
  int filters;

  // The tile of a block.
  int planes, images, rows, columns, bands, slices;  // planes: the most filters
  int shift;                                         // where a tile's first column lies in its row, in elements
  int weight_shift;                                  // the same of a kernel row's first weight
  int row_bytes, image_bytes, weight_bytes;  // from row to row, from image to image, from kernel row to kernel row
  int plane_bytes, kernel_bytes;             // from filter to filter
  int planes_at, zeros_at, bytes;            // in shared memory, behind weights and sums on their way out
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

// An output, tap by tap: only taps that meet the image.
__device__ __noinline__ float sum_by_taps(const Arguments& a, int filter, int image, int row, int column) {
  float sum = 0;
  for (int i = 0; i < a.kernel_h; ++i) {
    const int y = row - a.padding_h + i;
    if (y < 0 || y >= a.height) continue;
    for (int j = 0; j < a.kernel_w; ++j) {
      const int x = column - a.padding_w + j;
      if (x >= 0 && x < a.width)
        sum = fmaf(a.weight[filter * a.weight_stride[0] + i * a.weight_stride[2] + j * a.weight_stride[3]],
                   a.source[image * a.source_stride[0] + filter / a.fan_out * a.source_stride[1] +
                            y * a.source_stride[2] + x * a.source_stride[3]],
                   sum);
    }
  }
  return sum;
}

// One task of a warp: a strip of columns, of 32 rows. kSide: of narrow images, or 0.
template <int kSide, int kStrip>
__device__ void compute(const Arguments& a, const Tile& tile, int plane, int column, int chunk, bool check) {
  const int lane = threadIdx.x % 32, items = tile.rows * a.images, item = 32 * chunk + lane;
  const int filter = tile.filter + plane;
  struct Place {
    int row, image;
  };
  const auto place_of = [&](int item) {
    uint32_t row = min(item, items - 1);
    const int image = a.by_images.split(row);
    return Place{tile.row + static_cast<int>(row), image};
  };
  const Place own = place_of(item);
  const Walk walk(a.kernel_w, a.padding_w, a.width, column, kStrip);
  const int origin = kSide > 0 ? 0 : 4 * (a.shift - tile.source_column) + walk.source;
  Rows r;
  r.y = own.row - a.padding_h, r.height = a.height;
  r.source =
      a.planes_at + origin + plane * a.plane_bytes + own.image * a.image_bytes + (r.y - tile.source_row) * a.row_bytes;
  r.zeros = a.zeros_at + origin, r.source_bytes = a.row_bytes;
  r.weight = plane * a.kernel_bytes + 4 * a.weight_shift + (kSide > 0 ? 4 * (a.padding_w - (kSide - 1)) : walk.weight);
  r.weight_bytes = a.weight_bytes;
  // Steps in which any lane meets the image.
  r.begin = max(a.padding_h - place_of(32 * chunk + 31).row, 0);
  r.end = min(a.height + a.padding_h - place_of(32 * chunk).row, a.kernel_h);

  float sum[2][kStrip] = {};
  if constexpr (kSide > 0) {
    const auto add = [&](uint32_t source, uint32_t weight) {
      float x[(kSide + 3) / 4 * 4], w[(2 * kSide + 2) / 4 * 4];
      load_row(x, source);
      load_row(w, weight);
#pragma unroll
      for (int u = 0; u < kSide; ++u)
#pragma unroll
        for (int n = 0; n < kSide; ++n) {
          const int o = u % 2 == 0 ? n : kSide - 1 - n;
          sum[u % 2][o] = fmaf(x[u], w[kSide - 1 + u - o], sum[u % 2][o]);
        }
    };
    walk_rows(r, a.kernel_h, add, [] {});
  } else {
    correlate_rows(sum, r, walk, a.kernel_h, [] {});
  }

  // Out through shared memory, so that neighbouring lanes write neighbouring columns.
  const float bias = a.bias ? a.bias[filter * a.bias_stride] : 0;
  const int stage = a.planes_at - (blockDim.x - threadIdx.x / 32 * 32) * kStagePitch, o = lane % kStrip;
  float* target = a.target + tile.first_image * a.target_stride[0] + filter * a.target_stride[1] +
                  (column + o) * a.target_stride[3];
  const bool valid = item < items && own.image < tile.images;
  const int64_t offset = valid ? own.image * a.target_stride[0] + own.row * a.target_stride[2] : kNone;
  __syncwarp();
#pragma unroll
  for (int n = 0; n < kStrip; n += 4)
    shared<float4>(stage + lane * kStagePitch + 4 * n) = {
        sum[0][n] + sum[1][n] + bias, sum[0][n + 1] + sum[1][n + 1] + bias, sum[0][n + 2] + sum[1][n + 2] + bias,
        sum[0][n + 3] + sum[1][n + 3] + bias};
  __syncwarp();
  constexpr int kOwners = 32 / kStrip;  // whose sums are written at once
#pragma unroll
  for (int first = 0; first < 32; first += kOwners) {
    const int owner = first + lane / kStrip;
    const int64_t to = __shfl_sync(~0u, offset, owner);
    if (to == kNone || lane >= kOwners * kStrip || owner > 31 || column + o >= a.out_width) continue;
    float value = shared<float>(stage + owner * kStagePitch + 4 * o);
    if (check && !is_finite(value)) {
      const Place at = place_of(32 * chunk + owner);
      value = sum_by_taps(a, filter, tile.first_image + at.image, at.row, column + o) + bias;
    }
    target[to] = value;
  }
}

template <int kSide>
__global__ void __launch_bounds__(kLargeThreads, 2) large_float32(const __grid_constant__ Arguments a) {
  __shared__ int next_task;
  const Tile tile(a);
  if (threadIdx.x == 0) next_task = blockDim.x / 32;

  // Zeros around everything, then what they surround.
  for (int at = 16 * threadIdx.x; at < a.bytes; at += 16 * blockDim.x) shared<float4>(at) = {};
  __syncthreads();
  begin_copies(a.source + tile.first_image * a.source_stride[0] + tile.filter / a.fan_out * a.source_stride[1] +
                   tile.source_row * a.source_stride[2] + tile.source_column * a.source_stride[3],
               a.source_stride,
               {tile.images, tile.filters, tile.source_rows, tile.source_columns, a.planes, a.planes_at + 4 * a.shift,
                a.image_bytes, a.plane_bytes, a.row_bytes});
  // Weights of Inf meet zeros beside the image; where images are narrow, pixels of Inf meet zeros beside the kernel.
  bool finite = kSide == 0;
  for (int plane = 0; plane < tile.filters; ++plane) {
    const float* weights = a.weight + (tile.filter + plane) * a.weight_stride[0];
    for (int tap = threadIdx.x; tap < a.kernel_h * a.kernel_w; tap += blockDim.x) {
      uint32_t i = tap;
      const int j = a.by_kernel_w.split(i);
      const float weight = __ldg(weights + static_cast<int>(i) * a.weight_stride[2] + j * a.weight_stride[3]);
      finite &= is_finite(weight);
      shared<float>(plane * a.kernel_bytes + static_cast<int>(i) * a.weight_bytes + 4 * (a.weight_shift + j)) = weight;
    }
  }
  finish_copies();
  const bool check = __syncthreads_or(!finite);

  const int chunks = (tile.rows * a.images + 31) / 32, tasks = chunks * ((tile.columns + kWide - 1) / kWide);
  for (int task = threadIdx.x / 32; task < tasks * tile.filters;) {
    const int plane = task / tasks, strip = (task - plane * tasks) / chunks, column = strip * kWide;
    const int chunk = task - plane * tasks - strip * chunks;
    if constexpr (kSide > 0)
      compute<kSide, kSide <= 8 ? 8 : 16>(a, tile, plane, tile.column, chunk, check);
    else
      visit_strip(width_of_strip(tile.columns, column),
                  [&](auto width) { compute<0, width>(a, tile, plane, tile.column + column, chunk, check); });
    if (threadIdx.x % 32 == 0) task = atomicAdd(&next_task, 1);
    task = __shfl_sync(~0u, task, 0);
  }
}

// How a problem is cut into blocks: the tile, and the warps of a block.
struct Cut {
  int side;  // of narrow images, or 0
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
  if (cut.side > 0) {
    a.shift = 0, a.weight_shift = 16 + modulo(cut.side - 1 - a.padding_w);
    weight_columns = a.kernel_w + 16, source_columns = cut.side;
  } else {
    a.shift = kWide + 4 + modulo(a.padding_w - a.kernel_w), a.weight_shift = modulo(-a.kernel_w);
    weight_columns = a.kernel_w + a.weight_shift;
    source_columns += kWide - 1 + modulo(a.kernel_w - a.width - a.padding_w);
  }
  // Eight lanes, on neighbouring images first and rows then, meet in different banks.
  a.row_bytes = static_cast<int>(spread(4 * source_columns, a.images < 8 ? a.images : 0));
  const int64_t image_bytes = spread(int64_t{source_rows} * a.row_bytes, 1);
  a.weight_bytes = static_cast<int>(round_up(4 * weight_columns, 16));
  a.kernel_bytes = a.kernel_h * a.weight_bytes;
  a.planes_at = static_cast<int>(round_up(a.planes * a.kernel_bytes + 4 * (a.weight_shift + kWide + 16), 16)) +
                32 * cut.warps * kStagePitch;
  const int64_t plane_bytes = a.images * image_bytes, zeros_at = a.planes_at + a.planes * plane_bytes;
  const int64_t bytes = zeros_at + round_up(4 * (a.shift + kWide + 24), 16) + a.row_bytes;
  a.image_bytes = static_cast<int>(image_bytes), a.plane_bytes = static_cast<int>(plane_bytes);
  a.zeros_at = static_cast<int>(zeros_at);
  a.bytes = static_cast<int>(bytes);
  return bytes;
}

double cost_of(const Arguments& a, const Cut& cut, bool channels_last, int64_t bytes, const Device& device) {
  double row_cycles = 0.43 * cut.side * cut.side + 24;  // along a source row, of all strips
  if (cut.side == 0) {
    row_cycles = 0;
    for (int column = 0; column < a.out_width; column += kWide) {
      const int width = width_of_strip(a.out_width, column);
      row_cycles += Walk(a.kernel_w, a.padding_w, a.width, column, width).steps * (9 + 2 * width) + 43;
    }
  }
  const double strips = static_cast<double>(ceil_div(a.out_width, kWide));
  double rows = 0, chunks = 0;  // that warps walk along
  int bands = 0;
  for (int band = 0; band < a.out_height; band += a.rows * std::max(a.bands / 16, 1), ++bands) {  // some stand for all
    const int items = std::min(a.rows, a.out_height - band) * a.images;
    for (int item = 0; item < items; item += 32, ++chunks) {
      const int highest = band + item / a.images, lowest = band + std::min(item + 31, items - 1) / a.images;
      const int begin = std::max(a.padding_h - lowest, 0);
      rows += std::max(std::min(a.height + a.padding_h - highest, a.kernel_h) - begin, 0);
    }
  }
  Work work{};
  work.cycles = a.planes * (rows * row_cycles + chunks * strips * 1100) / (bands * a.slices);
  work.tasks = a.planes * chunks * strips / (bands * a.slices);
  work.scattered = channels_last ? a.plane_bytes / a.row_bytes * (a.width + 16.0) : 0;
  work.bytes = bytes, work.warps = cut.warps;
  work.blocks = static_cast<double>(a.bands) * a.slices * ceil_div(a.filters, a.planes) * ceil_div(a.batch, a.images);
  return estimate(work, {1100, 0.083, 0.83, 1.86, 0.6, 0.032}, device);
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
  for (int columns = whole; columns >= kWide && (least == 0 || columns >= 64);
       columns = columns > 64 ? 64 : columns / 2)
    for (int images = 1; images < 2 * a.batch && images <= kMostImages; images *= 2)
      for (int bands = 1; bands <= a.out_height; bands = bands < 6 ? bands + 1 : 2 * bands)
        for (const int warps : {8, 5, 4}) {
          const int rows = static_cast<int>(ceil_div(a.out_height, bands)), some = std::min(images, a.batch);
          const int side = std::max(a.width, a.out_width);
          for (int planes = 1; planes == 1 || (channels_last && planes <= 8); planes *= 2) {
            consider({0, planes, some, rows, columns, warps});
            if (side <= 14 && columns == whole) consider({side <= 7 ? 7 : 14, planes, some, rows, columns, warps});
          }
        }
  return best;
}

}  // namespace

void launch_large_float32(const Problem& p, cudaStream_t stream) {
  const Mapping m(p);
  Arguments a{};
  a.source = static_cast<const float*>(m.source.data), a.target = static_cast<float*>(m.target.data);
  a.weight = static_cast<const float*>(m.weight.data), a.bias = static_cast<const float*>(m.bias);
  for (int d = 0; d < 4; ++d) {
    a.source_stride[d] = m.source.stride[d], a.target_stride[d] = m.target.stride[d];
    a.weight_stride[d] = m.weight.stride[d];
  }
  a.bias_stride = m.bias_stride, a.fan_out = m.fan_out;
  a.batch = static_cast<int>(p.batch), a.height = m.height, a.width = m.width;
  a.out_height = m.out_height, a.out_width = m.out_width;
  a.kernel_h = static_cast<int>(p.kernel_h), a.kernel_w = static_cast<int>(p.kernel_w);
  a.padding_h = m.padding_h, a.padding_w = m.padding_w;
  a.filters = m.targets;
  const bool channels_last = m.fan_out == 1 && is_channels_last(a.source_stride, m.sources, a.width);
  static thread_local Decisions<13, Cut> decisions;
  const Cut cut = decisions({current_device().id, p.shared_memory, channels_last, a.batch, a.filters, a.height, a.width,
                             a.out_height, a.out_width, a.kernel_h, a.kernel_w, a.padding_h, a.padding_w},
                            [&] { return choose_cut(a, channels_last, p.shared_memory); });
  place(a, cut);
  const int64_t groups = ceil_div(a.filters, a.planes);
  a.by_groups = Divider(groups), a.by_bands = Divider(a.bands), a.by_slices = Divider(a.slices);
  a.by_images = Divider(a.images), a.by_kernel_w = Divider(a.kernel_w);
  const int64_t blocks = groups * a.bands * a.slices * ceil_div(a.batch, a.images);
  const auto kernel = cut.side == 7 ? large_float32<7> : cut.side == 14 ? large_float32<14> : large_float32<0>;
  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, a.bytes);
  kernel<<<static_cast<unsigned>(blocks), 32 * cut.warps, a.bytes, stream>>>(a);
  check_launch("large_float32");
}

}  // namespace dwconv
