// grad_weight (and the bias gradient) of large kernels in float32, on CUDA cores.
//
// The gradient of the weight is the correlation of the input with the gradient of the output, summed over images: the
// loops of large_float32.cu with the gradient in the place of the kernel. A block has one filter (some in
// channels_last), and of some images a tile of the gradient, and what of the input meets it, in shared memory. A thread
// sums 16 taps of a row for one image; the lanes of a warp lie on neighbouring images first and rows then, and walk
// together over the rows, and along each over the columns, in which any of their taps meets the image. The sums of the
// images are added up in shared memory, those of the blocks by a second kernel, always in the same order.
//
// Where blocks of 28 columns fit the image, a thread sums all taps of a row: 28 pixels of the input and as many of the
// gradient are in registers, and a tap is a diagonal of the square between them. In channels_last the lanes of a warp
// then lie on neighbouring filters first. Kernels much higher than wide go along their columns. Planes about as wide as
// lanes_grad_weight.cu is compiled for go there.
//
// The zeros around the image give NaN where they meet Inf or NaN. So sums that are not finite are computed again.
#include <algorithm>

#include "lanes_grad_weight.h"
#include "large_float32.cuh"
#include "launch.h"
#include "long_sums.h"
#include "partial_sums.h"

namespace dwconv {
namespace {

constexpr int kWide = 16;   // columns of a strip
constexpr int kBlock = 28;  // columns of a block
// What of the costs of strips is a cycle of those of blocks. In channels_last strips take longer than estimated.
constexpr double kBlockCycles = 1.45, kBlockCyclesChannelsLast = 1.25;
constexpr int kLeastRun = 32, kRun = 128;  // products that are summed before they are added to a sum
constexpr int kFewImages = 8;              // whose sums are added up one after the other
constexpr int kSlotPitch = 33 * 4;         // bytes between the sums of a lane: neighbouring taps are in different banks

struct Arguments {
  const float* input;
  const float* grad;
  float* partial;
  int64_t input_stride[4], grad_stride[4];  // in elements
  int batch, height, width, out_height, out_width, kernel_h, kernel_w, padding_h, padding_w, multiplier;
  int filters;
  bool with_bias, turned;  // turned: rows are columns

  // A block goes through units: some images' tiles of the gradient.
  int planes, images, rows, columns, bands, slices, units, splits;  // planes: the most filters
  int side;                                                         // of Diagonals, or kBlock, or 0
  int lane_planes, plane_bits, image_bits;  // of Blocks: planes that lanes lie on, and binary logarithms
  int parts;                                // that the rows are cut into
  int strips, chunks;                       // of taps: strips of columns, and what warps take of the rows of all images
  int slots;                                // sums of a lane, but for Blocks
  int run;                                  // products that are summed before they are added to these
  int input_row_bytes, input_image_bytes, grad_row_bytes, grad_image_bytes;
  int input_plane_bytes, grad_plane_bytes;            // from filter to filter
  int bias_at, grads_at, inputs_at, zeros_at, bytes;  // in shared memory, behind the sums
  Divider by_groups, by_bands, by_slices, by_images;
};

struct Unit {
  int first_image, images, row, rows, column, columns;
  int source_row, source_rows, source_column, source_columns;
  int padding_h, padding_w;             // of the unit's gradient, to which its first row and column are the first
  int input_shift = 0, grad_shift = 0;  // where the first column lies in its row, in elements

  __device__ Unit(const Arguments& a, uint32_t unit) {
    row = a.by_bands.split(unit) * a.rows;
    column = a.by_slices.split(unit) * a.columns;
    first_image = unit * a.images;
    images = min(a.images, a.batch - first_image);
    rows = min(a.rows, a.out_height - row);
    columns = min(a.columns, a.out_width - column);
    padding_h = a.padding_h - row, padding_w = a.padding_w - column;
    source_row = max(-padding_h, 0);
    source_rows = max(min(rows + a.kernel_h - 1 - padding_h, a.height) - source_row, 0);
    source_column = max(-padding_w, 0) & ~3;
    source_columns = max(min(columns - 1 + a.kernel_w - padding_w, a.width) - source_column, 0);
    if (a.side == 0) input_shift = kWide + 4 + ((padding_w - columns) & 3), grad_shift = -columns & 3;
  }
};

// A sum of the block, tap by tap: only taps that meet the image.
__device__ __noinline__ float sum_by_taps(const Arguments& a, int filter, int split, int i, int j) {
  float total = 0;
  for (int index = split; index < a.units; index += a.splits) {
    const Unit unit(a, index);
    for (int n = unit.first_image; n < unit.first_image + unit.images; ++n)
      for (int row = unit.row; row < unit.row + unit.rows; ++row) {
        const int y = row - a.padding_h + i;
        if (y < 0 || y >= a.height) continue;
        float sum = 0;
        for (int column = unit.column; column < unit.column + unit.columns; ++column) {
          const int x = column - a.padding_w + j;
          if (x >= 0 && x < a.width)
            sum = fmaf(a.grad[n * a.grad_stride[0] + filter * a.grad_stride[1] + row * a.grad_stride[2] +
                              column * a.grad_stride[3]],
                       a.input[n * a.input_stride[0] + filter / a.multiplier * a.input_stride[1] +
                               y * a.input_stride[2] + x * a.input_stride[3]],
                       sum);
        }
        total += sum;
      }
  }
  return total;
}

// The rows that a lane, and with it the warp, walks over.
__device__ inline Rows rows_of(const Arguments& a, const Unit& unit, int plane, int chunk, int input_at, int grad_at) {
  const int items = a.kernel_h * a.images * a.lane_planes;
  const auto place_of = [&](int item) {  // the row of taps, and the image
    uint32_t row = static_cast<uint32_t>(min(item, items - 1)) >> a.plane_bits;
    const int image = a.by_images.split(row);
    return int2{static_cast<int>(row), image};
  };
  const int item = 32 * chunk + static_cast<int>(threadIdx.x) % 32;
  const int2 own = place_of(item);
  plane += min(item, items - 1) & (a.lane_planes - 1);
  Rows r;
  r.y = own.x - unit.padding_h, r.height = a.height;
  r.source = a.inputs_at + input_at + plane * a.input_plane_bytes + own.y * a.input_image_bytes +
             (r.y - unit.source_row) * a.input_row_bytes;
  r.zeros = a.zeros_at + input_at, r.source_bytes = a.input_row_bytes;
  r.weight = a.grads_at + grad_at + plane * a.grad_plane_bytes + own.y * a.grad_image_bytes,
  r.weight_bytes = a.grad_row_bytes;
  // Rows of the gradient that meet the image for any lane.
  r.begin = max(unit.padding_h - place_of(32 * chunk + 31).x, 0);
  r.end = min(a.height + unit.padding_h - place_of(32 * chunk).x, unit.rows);
  return r;
}

__device__ __forceinline__ void add_to_slot(int slots, int index, float sum) {
  shared<float>(slots + index * kSlotPitch + threadIdx.x % 32 * 4) += sum;
}

// The rows of a part.
__device__ inline void take_part(Rows& r, int part, int parts) {
  const int count = max(r.end - r.begin, 0), begin = r.begin;
  r.begin = begin + count * part / parts, r.end = begin + count * (part + 1) / parts;
}

// Taps in strips of columns.
struct Strips {
  static __device__ void compute(const Arguments& a, const Unit& unit, int plane, int part, int strip, int chunk,
                                 int slots) {
    visit_strip(width_of_strip(a.kernel_w, begin_of_strip(a.kernel_w, strip)), [&](auto width) {
      const Walk walk(unit.columns, unit.padding_w, a.width, begin_of_strip(a.kernel_w, strip), width);
      Rows rows = rows_of(a, unit, plane, chunk, 4 * (unit.input_shift - unit.source_column) + walk.source,
                          4 * unit.grad_shift + walk.weight);
      take_part(rows, part, a.parts);
      float sum[2][width] = {};
      correlate_rows(sum, rows, walk, max(2 * a.run / unit.columns, 1), [&] {  // each sum has half of them
#pragma unroll
        for (int o = 0; o < width; ++o) {
          add_to_slot(slots, o, sum[0][o] + sum[1][o]);
          sum[0][o] = sum[1][o] = 0;
        }
      });
    });
  }

  // Where the sum of a tap of column j is: the strip, and the slot.
  static __device__ int2 find(const Arguments& a, int j) {
    const int strip = (j + kWide - width_of_strip(a.kernel_w, 0)) / kWide;
    return a.strips > 1 ? int2{strip, j - begin_of_strip(a.kernel_w, strip)} : int2{0, j};
  }
};

// All taps of a row: for images so narrow that every pixel of a row meets every gradient of a row.
template <int kSide>
struct Diagonals {
  static constexpr int kSlots = 2 * kSide - 1;

  static __device__ void compute(const Arguments& a, const Unit& unit, int plane, int part, int, int chunk, int slots) {
    Rows rows = rows_of(a, unit, plane, chunk, 0, 0);
    take_part(rows, part, a.parts);
    float sum[2][kSlots] = {};
    walk_rows(
        rows, 2 * a.run / kSide,
        [&](uint32_t source, uint32_t grad) {
          float x[(kSide + 3) / 4 * 4], g[(kSide + 3) / 4 * 4];
          load_row(x, source);
          load_row(g, grad);
#pragma unroll
          for (int u = 0; u < kSide; ++u)
#pragma unroll
            for (int n = 0; n < kSide; ++n) {
              const int c = u % 2 == 0 ? n : kSide - 1 - n, slot = kSide - 1 + u - c;
              sum[u % 2][slot] = fmaf(x[u], g[c], sum[u % 2][slot]);
            }
        },
        [&] {
#pragma unroll
          for (int slot = 0; slot < kSlots; ++slot) {
            add_to_slot(slots, slot, sum[0][slot] + sum[1][slot]);
            sum[0][slot] = sum[1][slot] = 0;
          }
        });
  }

  static __device__ int2 find(const Arguments& a, int j) { return {0, kSide - 1 + j - a.padding_w}; }
};

// All taps of a row, block of columns by block of columns.
struct Blocks {
  static constexpr int kSums = 2 * kBlock;

  static __device__ int place_of_sum(const Arguments& a, int part, int plane, int i, int j) {
    return 4 * (((part * a.planes + plane) * a.kernel_h + i) * a.kernel_w + j);
  }

  // Adds up what the lanes of a filter have for the taps of a row, in different images, and then to the block's sums.
  // Lanes that differ in one bit of the image's number divide the taps between them, bit by bit.
  static __device__ __forceinline__ void flush(float (&sum)[2][kSums], const Arguments& a, int part, int chunk, int low,
                                               int high, int offset) {
    constexpr int kGroup = 16;
    __syncwarp();  // another lane may have added to these sums before
    const int lane = threadIdx.x % 32, item = 32 * chunk + lane;
    const int plane = item & (a.planes - 1), i = item >> (a.plane_bits + a.image_bits);
    const int to = place_of_sum(a, part, plane, i, offset - kBlock);
    const auto add_group = [&](auto number) {
      constexpr int kFirst = kGroup * decltype(number)::value;
      if (kFirst + kGroup <= low || kFirst > high) return;
      float v[kGroup];
#pragma unroll
      for (int k = 0; k < kGroup; ++k) {
        constexpr int kEnd = kSums - 1;
        v[k] = kFirst + k <= kEnd ? sum[0][min(kFirst + k, kEnd)] + sum[1][min(kFirst + k, kEnd)] : 0;
        if (kFirst + k <= kEnd) sum[0][kFirst + k] = sum[1][kFirst + k] = 0;
      }
      int first = kFirst;
      const auto write = [&](auto count) {
#pragma unroll
        for (int k = 0; k < decltype(count)::value; ++k)
          if (i < a.kernel_h && first + k >= low && first + k <= high) shared<float>(to + 4 * (first + k)) += v[k];
      };
      const auto divide = [&](auto count, int bit) {
        constexpr int kHalf = decltype(count)::value;
        const bool upper = lane >> (a.plane_bits + bit) & 1;
#pragma unroll
        for (int k = 0; k < kHalf; ++k) {
          const float sent = upper ? v[k] : v[k + kHalf], kept = upper ? v[k + kHalf] : v[k];
          v[k] = kept + __shfl_xor_sync(~0u, sent, 1 << (a.plane_bits + bit));
        }
        if (upper) first += kHalf;
      };
      if (a.image_bits == 0) return write(std::integral_constant<int, 16>{});
      divide(std::integral_constant<int, 8>{}, 0);
      if (a.image_bits == 1) return write(std::integral_constant<int, 8>{});
      divide(std::integral_constant<int, 4>{}, 1);
      if (a.image_bits == 2) return write(std::integral_constant<int, 4>{});
      divide(std::integral_constant<int, 2>{}, 2);
      if (a.image_bits == 3) return write(std::integral_constant<int, 2>{});
      divide(std::integral_constant<int, 1>{}, 3);
      if (a.image_bits == 5) v[0] += __shfl_xor_sync(~0u, v[0], 16);
      if (a.image_bits < 5 || lane < 16) write(std::integral_constant<int, 1>{});
    };
    [&]<int... group>(std::integer_sequence<int, group...>) {
      (add_group(std::integral_constant<int, group>{}), ...);
    }(std::make_integer_sequence<int, (kSums + kGroup - 1) / kGroup>{});
  }

  static __device__ float total(const Arguments& a, int plane, int i, int j) {
    float sum = 0;
    for (int part = 0; part < a.parts; ++part) sum += shared<float>(place_of_sum(a, part, plane, i, j));
    return sum;
  }

  static __device__ void compute(const Arguments& a, const Unit& unit, int task) {
    const int part = task / a.chunks, chunk = middle_first(task - part * a.chunks, a.chunks);
    Rows rows = rows_of(a, unit, 0, chunk, 0, 0);
    take_part(rows, part, a.parts);
    const int begin = rows.begin, end = rows.end;
    const uint32_t base = shared_address(0), zeros = once(base + rows.zeros);
    const int reach = max(a.width, a.columns) - 1;
    for (int shift = -reach / kBlock * kBlock; shift <= reach; shift += kBlock) {
      // Column u of a block of the input meets gradient o of one that begins `shift` before it for tap u - o + offset.
      const int offset = shift + unit.padding_w, first = max(-shift, 0), last = min(a.columns, a.width - shift);
      const int low = max(kBlock - offset, 1), high = min(kBlock - 1 + a.kernel_w - offset, 2 * kBlock - 1);
      if (low > high || first >= last) continue;
      float sum[2][kSums] = {};
      const int run = max(2 * a.run / (last - first), 1);  // each sum has half of them
      uint32_t source = once(base + rows.source + begin * rows.source_bytes);
      uint32_t grad = once(base + rows.weight + begin * rows.weight_bytes);
      int y = once(rows.y + begin);
      for (int k = begin; k < end;) {
        for (const int stop = min(k + run, end); k < stop; ++k) {
          const uint32_t from = static_cast<uint32_t>(y) < static_cast<uint32_t>(a.height) ? source : zeros;
          for (int column = first; column < last; column += kBlock) {
            float x[kBlock], g[kBlock];
            load_row(x, from + 4 * (column + shift));
            load_row(g, grad + 4 * column);
            visit_from<kBlock>(low / 2, [&](auto number) {  // two taps, so that each FMA has a number of the one before
              constexpr int kIndex = 2 * decltype(number)::value;
              const auto add = [&](int u, int index) {
                const int o = u - (index - kBlock);
                if (o >= 0 && o < kBlock) sum[u % 2][index] = fmaf(x[u], g[o], sum[u % 2][index]);
              };
#pragma unroll
              for (int u = 0; u < kBlock; ++u) add(u, kIndex + 1), add(u, kIndex);
              return high < kIndex + 2;
            });
          }
          ++y, source += a.input_row_bytes, grad += a.grad_row_bytes;
        }
        flush(sum, a, part, chunk, low, high, offset);
      }
    }
  }
};

template <class Taps>
__global__ void __launch_bounds__(kLargeThreads, std::is_same_v<Taps, Blocks> ? 1 : 2)
    large_float32_grad_weight(const __grid_constant__ Arguments a) {
  constexpr bool blocks = std::is_same_v<Taps, Blocks>;
  __shared__ int next_task;
  uint32_t split = blockIdx.x;
  const int filter = a.by_groups.split(split) * a.planes, filters = min(a.planes, a.filters - filter);
  const int warp = threadIdx.x / 32, warps = blockDim.x / 32, kinds = a.parts * a.strips * (blocks ? 1 : filters);
  for (int at = 16 * threadIdx.x; at < a.grads_at; at += 16 * blockDim.x) shared<float4>(at) = {};
  for (int index = split; index < a.units; index += a.splits) {
    const Unit unit(a, index);
    __syncthreads();
    for (int at = a.grads_at + 16 * threadIdx.x; at < a.bytes; at += 16 * blockDim.x) shared<float4>(at) = {};
    __syncthreads();
    begin_copies(a.input + unit.first_image * a.input_stride[0] + filter / a.multiplier * a.input_stride[1] +
                     unit.source_row * a.input_stride[2] + unit.source_column * a.input_stride[3],
                 a.input_stride,
                 {unit.images, filters, unit.source_rows, unit.source_columns, a.planes,
                  a.inputs_at + 4 * unit.input_shift, a.input_image_bytes, a.input_plane_bytes, a.input_row_bytes});
    begin_copies(a.grad + unit.first_image * a.grad_stride[0] + filter * a.grad_stride[1] +
                     unit.row * a.grad_stride[2] + unit.column * a.grad_stride[3],
                 a.grad_stride,
                 {unit.images, filters, unit.rows, unit.columns, a.planes, a.grads_at + 4 * unit.grad_shift,
                  a.grad_image_bytes, a.grad_plane_bytes, a.grad_row_bytes});
    finish_copies();
    if (threadIdx.x == 0) next_task = warps;
    __syncthreads();

    // Tasks of the rows that meet the most of the image first.
    for (int task = __shfl_sync(~0u, warp, 0); task < a.chunks * kinds;) {
      if constexpr (blocks) {
        Blocks::compute(a, unit, task);
      } else {
        const int rank = task / kinds, kind = task - rank * kinds, chunk = middle_first(rank, a.chunks);
        const int plane = kind / (a.parts * a.strips), part = kind / a.strips % a.parts, strip = kind % a.strips;
        Taps::compute(a, unit, plane, part, strip, chunk, (kind * a.chunks + chunk) * a.slots * kSlotPitch);
      }
      if (threadIdx.x % 32 == 0) task = atomicAdd(&next_task, 1);
      task = __shfl_sync(~0u, task, 0);
    }
    for (int plane = 0; a.with_bias && plane < filters; ++plane) {
      float sum = 0;
      for (int row = warp; row < unit.images * unit.rows; row += warps) {
        const int image = row / unit.rows;
        for (int column = threadIdx.x % 32; column < unit.columns; column += 32)
          sum += shared<float>(a.grads_at + 4 * unit.grad_shift + plane * a.grad_plane_bytes +
                               image * a.grad_image_bytes + (row - image * unit.rows) * a.grad_row_bytes + 4 * column);
      }
      for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_xor_sync(~0u, sum, offset);
      if (threadIdx.x % 32 == 0) shared<float>(a.bias_at + 4 * (plane * warps + warp)) += sum;
    }
  }
  __syncthreads();

  // The sums of the images, and the block's.
  const int taps = a.kernel_h * a.kernel_w;
  float* partial = a.partial + static_cast<int64_t>(split) * (taps + a.with_bias) * a.filters + filter;
  for (int index = threadIdx.x; index < taps * filters; index += blockDim.x) {
    const int tap = index / filters, plane = index - tap * filters, i = tap / a.kernel_w, j = tap - i * a.kernel_w;
    float sum = 0;
    if constexpr (blocks) {
      sum = Blocks::total(a, plane, i, j);
    } else {
      const int2 found = Taps::find(a, j);
      if (found.y >= 0 && found.y < a.slots)  // or the tap meets no image
        for (int part = 0; part < a.parts; ++part)
          for (int first = 0; first < a.images; first += kFewImages) {
            float few = 0;
            for (int image = first; image < min(first + kFewImages, a.images); ++image) {
              const int item = i * a.images + image, kind = (plane * a.parts + part) * a.strips + found.x;
              few += shared<float>(((kind * a.chunks + item / 32) * a.slots + found.y) * kSlotPitch + item % 32 * 4);
            }
            sum += few;
          }
    }
    if (!is_finite(sum)) sum = sum_by_taps(a, filter + plane, split, i, j);
    partial[static_cast<int64_t>(a.turned ? j * a.kernel_h + i : tap) * a.filters + plane] = sum;
  }
  if (a.with_bias && static_cast<int>(threadIdx.x) < filters) {
    float sum = 0;
    for (int w = 0; w < warps; ++w) sum += shared<float>(a.bias_at + 4 * (threadIdx.x * warps + w));
    partial[static_cast<int64_t>(taps) * a.filters + threadIdx.x] = sum;
  }
}

// How a problem is cut into units, and how many warps a block has.
struct Cut {
  int side;  // of Diagonals, or kBlock, or 0
  int planes, images, rows, columns, warps, parts = 1;
};

// Everything of the arguments that depends on the cut; returns the bytes of shared memory.
int64_t place(Arguments& a, const Cut& cut) {
  a.planes = cut.planes, a.images = cut.images, a.rows = cut.rows, a.columns = cut.columns;
  a.bands = static_cast<int>(ceil_div(a.out_height, a.rows));
  a.slices = static_cast<int>(ceil_div(a.out_width, a.columns));
  a.units = static_cast<int>(ceil_div(a.batch, a.images)) * a.bands * a.slices;
  a.side = cut.side;
  // Runs of blocks, and of diagonals, take longer to add to a sum: they are twice as long as they should be.
  const int64_t factor = cut.side > 0 ? 2 : 1, run = products_of_run(a.batch, int64_t{a.out_height} * a.out_width);
  a.run = static_cast<int>(std::clamp<int64_t>(factor * run, factor * kLeastRun, kRun));
  a.strips = cut.side > 0 ? 1 : static_cast<int>(ceil_div(a.kernel_w, kWide));
  a.slots = cut.side > 0 ? 2 * cut.side - 1 : static_cast<int>(std::min<int64_t>(round_up(a.kernel_w, 4), kWide));
  const bool blocks = cut.side == kBlock;
  a.lane_planes = blocks ? a.planes : 1, a.parts = cut.parts, a.plane_bits = a.image_bits = 0;
  while (1 << a.plane_bits < a.lane_planes) ++a.plane_bits;
  while (1 << a.image_bits < a.images) ++a.image_bits;
  a.chunks = static_cast<int>(ceil_div(a.kernel_h * a.images * a.lane_planes, 32));
  int source_rows = 1;
  for (int row = 0; row < a.out_height; row += a.rows) {
    const int end = row + std::min(a.rows, a.out_height - row) + a.kernel_h - 1;
    source_rows = std::max(source_rows, std::min(end - a.padding_h, a.height) - std::max(row - a.padding_h, 0));
  }
  // Behind a row lie zeros, as far as a strip reaches beyond the image and as its steps end behind it.
  const int source_columns = std::min(a.slices > 1 ? a.columns + a.kernel_w + 2 : a.width, a.width);
  const int whole_input = static_cast<int>(round_up(4 * (blocks ? round_up(a.width, kBlock) : cut.side), 16));
  const int whole_grad = static_cast<int>(round_up(4 * (blocks ? round_up(a.columns, kBlock) : cut.side), 16));
  const int wanted = cut.side > 0 ? whole_input : 4 * (source_columns + kWide + 2);
  // Eight lanes, on neighbouring filters first, images then and rows then, meet in different banks.
  const int lanes = a.images * a.lane_planes, units = blocks ? (a.planes < 8 ? a.planes : 0) : 1;
  a.input_row_bytes = static_cast<int>(spread(wanted, lanes < 8 ? lanes : 0));
  a.grad_row_bytes = cut.side > 0 ? whole_grad : static_cast<int>(round_up(4 * (a.columns + 3), 16));
  const int64_t input_bytes = spread(int64_t{source_rows} * a.input_row_bytes, units);
  const int64_t grad_bytes = spread(int64_t{a.rows} * a.grad_row_bytes, units);
  const int64_t input_plane = spread(a.images * input_bytes, a.lane_planes > 1 ? 1 : 0);
  const int64_t grad_plane = spread(a.images * grad_bytes, a.lane_planes > 1 ? 1 : 0);
  a.bias_at = blocks ? 4 * a.parts * a.planes * a.kernel_h * a.kernel_w
                     : a.planes * a.parts * a.strips * a.chunks * a.slots * kSlotPitch;
  a.grads_at = static_cast<int>(round_up(a.bias_at + 4 * a.planes * cut.warps, 16));
  const int64_t inputs_at = a.grads_at + a.planes * grad_plane + 64;
  const int64_t zeros_at = inputs_at + a.planes * input_plane;
  const int64_t bytes = zeros_at + a.input_row_bytes + 4 * (24 + kWide + 16);
  a.grad_image_bytes = static_cast<int>(grad_bytes), a.input_image_bytes = static_cast<int>(input_bytes);
  a.grad_plane_bytes = static_cast<int>(grad_plane), a.input_plane_bytes = static_cast<int>(input_plane);
  a.inputs_at = static_cast<int>(inputs_at), a.zeros_at = static_cast<int>(zeros_at);
  a.bytes = static_cast<int>(bytes);
  return bytes;
}

double cost_of(const Arguments& a, const Cut& cut, bool channels_last, int64_t bytes, const Device& device) {
  double row_cycles = 1.1 * cut.side * cut.side + 40;  // along a row of the input, of all strips
  const bool blocks = cut.side == kBlock;
  if (blocks) {
    row_cycles = row_cycles_of_blocks(kBlock, a.width, a.out_width, a.kernel_w, a.padding_w, 0.58, 113);
  } else if (cut.side == 0) {
    row_cycles = 0;
    for (int column = 0, width; column < a.kernel_w; column += width) {
      width = width_of_strip(a.kernel_w, column);
      row_cycles += Walk(a.out_width, a.padding_w, a.width, column, width).steps * 2.07 * width + 230;
    }
  }
  double rows = 0, flushes = 0;  // rows that warps walk along
  int bands = 0;
  for (int band = 0; band < a.out_height; band += a.rows * std::max(a.bands / 16, 1), ++bands) {  // some stand for all
    const int lanes = a.images * a.lane_planes, items = a.kernel_h * lanes, padding = a.padding_h - band;
    for (int item = 0; item < items; item += 32) {
      const int highest = item / lanes;
      const int lowest = std::min(item + 31, items - 1) / lanes;
      const int end = std::min(a.height + padding - highest, std::min(a.rows, a.out_height - band));
      const int count = std::max(end - std::max(padding - lowest, 0), 0);
      rows += count;
      flushes += a.parts * ceil_div(ceil_div(count, a.parts), std::max(2 * a.run / a.out_width, 1));
    }
  }
  const double input = a.input_plane_bytes / a.input_row_bytes * (a.width + (blocks ? 0 : 16.0));
  Work work{};
  work.tasks = a.chunks * a.parts * (blocks ? 1 : a.planes * a.strips);
  work.cycles = (blocks ? 1 : a.planes) * rows * row_cycles / (bands * a.slices) + work.tasks * (blocks ? 300 : 21);
  if (blocks) work.cycles += flushes * 100 / bands;
  work.scattered = channels_last ? input + a.images * a.rows * a.columns : 0;
  if (blocks) work.scattered *= a.planes;
  work.bytes = bytes, work.warps = cut.warps, work.registers = blocks ? 248 : 102;
  work.blocks = static_cast<double>(ceil_div(a.filters, a.planes)) * a.units;
  if (blocks)
    return (channels_last ? kBlockCyclesChannelsLast : kBlockCycles) *
           estimate(work, {8300, 0.083, 0.63, 2.8, 0.5, 0, 0.13}, device);
  return estimate(work, {2500, 0.089, 0.59, 2.6, 0.6, 0.025, 0.5}, device);
}

// The cut that is thought to be the fastest of those that fit.
Cut choose_cut(Arguments& a, bool channels_last, int64_t shared_memory) {
  Cut best{};
  double least = 0;
  const Device& device = current_device();
  const int most = std::max(a.width, a.out_width), narrow = most <= 7 ? 7 : most <= 14 ? 14 : kBlock;
  const int few = channels_last ? std::min(8, a.filters) : 1;  // fewer channels are less than what memory reads at once
  for (int columns = a.out_width; columns >= 1 && (least == 0 || columns >= 64); columns = columns > 64 ? 64
                                                                                           : columns > 32
                                                                                               ? 32
                                                                                               : columns / 8 * 4)
    for (int images = 1; images < 2 * a.batch && images <= kMostImages; images *= 2)
      for (int bands = 1; bands <= a.out_height; bands = bands < 6 ? bands + 1 : 2 * bands)
        for (const int warps : {8, 5, 4})
          for (const int side : {0, narrow})
            for (int planes = 1; planes == 1 || (channels_last && planes <= 8); planes *= 2)
              for (int parts = 1; parts <= 4; parts *= 2) {
                if (side > 0 && columns < a.out_width) continue;
                // Blocks add up by powers of two.
                if (side == kBlock && (planes < few || images > a.batch || images * planes > 32)) continue;
                const int rows = static_cast<int>(ceil_div(a.out_height, bands));
                const Cut cut{side, planes, std::min(images, a.batch), rows, columns, warps, parts};
                const int64_t bytes = place(a, cut);
                if (bytes + 128 > shared_memory) continue;
                const double cost = cost_of(a, cut, channels_last, bytes, device);
                if (least == 0 || cost < least) best = cut, least = cost;
              }
  return best;
}

}  // namespace

void launch_large_float32_grad_weight(const Problem& p, const Allocate& allocate, cudaStream_t stream) {
  if (launch_lanes_grad_weight(p, allocate, stream)) return;
  Arguments a{};
  const bool channels_last = take_gradients(a, p);
  a.with_bias = p.bias != nullptr;
  static thread_local Decisions<13, Cut> decisions;
  const Cut cut = decisions({current_device().id, p.shared_memory, channels_last, a.batch, a.filters, a.height, a.width,
                             a.out_height, a.out_width, a.kernel_h, a.kernel_w, a.padding_h, a.padding_w},
                            [&] { return choose_cut(a, channels_last, p.shared_memory); });
  place(a, cut);
  // Units follow each other in a block where there are more blocks than fill the device a few times over. Where images
  // are narrow, blocks take little besides the sums of their taps.
  const int64_t groups = ceil_div(a.filters, a.planes);
  const int blocks = cut.side == 7 || cut.side == 14 ? 4 : 16;  // of a multiprocessor
  const int64_t useful = std::max<int64_t>(1, blocks * current_device().multiprocessors / groups);
  a.splits = static_cast<int>(ceil_div(a.units, ceil_div(a.units, useful)));
  a.by_groups = Divider(groups), a.by_bands = Divider(a.bands), a.by_slices = Divider(a.slices);
  a.by_images = Divider(a.images);
  a.partial = static_cast<float*>(allocate(a.splits * (p.taps() + a.with_bias) * a.filters * sizeof(float)));
  const auto kernel = cut.side == 7        ? large_float32_grad_weight<Diagonals<7>>
                      : cut.side == 14     ? large_float32_grad_weight<Diagonals<14>>
                      : cut.side == kBlock ? large_float32_grad_weight<Blocks>
                                           : large_float32_grad_weight<Strips>;
  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, a.bytes);
  kernel<<<static_cast<unsigned>(groups * a.splits), 32 * cut.warps, a.bytes, stream>>>(a);
  check_launch("large_float32_grad_weight");
  launch_add_partial_sums(p, a.partial, a.splits, stream);
}

}  // namespace dwconv
