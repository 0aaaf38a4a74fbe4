// grad_weight (and the bias gradient) on contiguous planes: input and gradient stream through shared memory side by
// side, and a thread keeps the sums of all taps in registers.
//
// Bytes bound by design: both arrays are read once. A block works for a fixed group of filters on a part of the images;
// the parts are added up by a second, small kernel. Every sum has a fixed order, the same on every run.
//
// What is not part of a sum is multiplied by zero, which is exact unless the other factor is Inf or NaN. So sums that
// are finite are right, and the others are taken again, product by product.
#include <algorithm>
#include <cmath>

#include "launch.h"
#include "partial_sums.cuh"
#include "small_kernels.h"
#include "stream.cuh"

namespace dwconv {
namespace {

struct Stream {
  Planes source, grad;
  float* partial;  // [split][tap, or bias behind the last tap][filter]
  int height, width, out_height, out_width;
  int kernel_h, kernel_w, stride, padding_h, padding_w, dilation;
  int images, channels, multiplier, filters;
  bool source_joined, grad_joined;  // whether the images follow each other without a gap
  bool single;                      // a block works for one filter, on bands of rows; else for whole planes
  int block_channels, block_filters, chunk_rows, bands;
  int splits;
  int strips, segments;
  bool with_bias, bulk;
  RowRing source_ring, grad_ring;
  int chunks_at;  // what the block knows of the chunks under way, in shared memory
};

// A step of a block: some rows of an image, of the block's planes.
struct Chunk {
  int row, rows;                               // of each gradient plane
  int source_image, source_begin, source_end;  // rows of the image
  int source_plane;                            // the row of the image in which the block's first plane begins
  int grad_image, grad_begin, grad_end;
  int source_slot, grad_slot;  // of the first of the rows in the rings
};

__device__ Chunk chunk_of(const Stream& a, int group, int step) {
  const int image = step / a.bands, band = step % a.bands;
  const int filter = group * a.block_filters, channel = filter / a.multiplier;
  const int filters = min(a.block_filters, a.filters - filter);
  Chunk c;
  c.row = band * a.chunk_rows;
  c.rows = min(a.chunk_rows, a.out_height - c.row);
  c.source_image = a.source_joined ? 0 : image;
  c.grad_image = a.grad_joined ? 0 : image;
  c.source_plane = ((a.source_joined ? image * a.channels : 0) + channel) * a.height;
  const int grad_plane = ((a.grad_joined ? image * a.filters : 0) + filter) * a.out_height;
  if (a.single) {
    const int first = c.row * a.stride - a.padding_h;
    const int last = first + (c.rows - 1) * a.stride + (a.kernel_h - 1) * a.dilation;
    c.source_begin = c.source_plane + min(max(first, 0), a.height);
    c.source_end = c.source_plane + min(max(last + 1, 0), a.height);
    c.grad_begin = grad_plane + c.row;
    c.grad_end = c.grad_begin + c.rows;
  } else {
    c.source_begin = c.source_plane;
    c.source_end = c.source_plane + filters / a.multiplier * a.height;
    c.grad_begin = grad_plane;
    c.grad_end = grad_plane + filters * a.out_height;
  }
  return c;
}

// A tile of 7 x 7 gradients: walks down the source rows, reads each once, and multiplies it with the gradients whose
// window it lies in. Needs a padding below the kernel's extent and 7 output columns.
template <class Kernel>
struct Window {
  static constexpr int kKernelH = Kernel::kKernelH, kKernelW = Kernel::kKernelW;
  static constexpr int kStride = Kernel::kStride, kDilation = Kernel::kDilation;
  static constexpr int kRows = 7, kColumns = 7;
  static constexpr int kMaxThreads = kKernelH * kKernelW < 25 ? 224 : 128, kBlocks = 2;

  template <typename T>
  static __device__ void add(const Stream& a, const Chunk& c, int filter, int segment, int strip,
                             float (&sum)[kKernelH][kKernelW], double& bias) {
    constexpr int kSize = sizeof(T);
    constexpr int kExtentH = (kKernelH - 1) * kDilation + 1, kExtentW = (kKernelW - 1) * kDilation + 1;
    constexpr int kSourceRows = (kRows - 1) * kStride + kExtentH, kSourceColumns = (kColumns - 1) * kStride + kExtentW;
    const int row = segment * kRows, rows = c.rows - row;
    const int column = min(strip * kColumns, a.out_width - kColumns);  // the last strip overlaps the one before
    const int overlap = strip * kColumns - column;
    const int x0 = column * kStride - a.padding_w;
    const int y0 = c.source_plane + filter / a.multiplier * a.height + (c.row + row) * kStride - a.padding_h;
    const int begin = max(c.source_begin, c.source_plane + filter / a.multiplier * a.height);
    const int end = min(c.source_end, c.source_plane + (filter / a.multiplier + 1) * a.height);
    RowWalk source(a.source_ring, c.source_slot + y0 - c.source_begin);
    RowWalk grad(a.grad_ring, c.grad_slot + (a.single ? 0 : filter * a.out_height) + row);

    float g[kRows][kColumns], bias_part = 0;
#pragma unroll
    for (int r = 0; r < kSourceRows; ++r) {
      if (r % kStride == 0 && r / kStride < kRows) {
        float (&row_g)[kColumns] = g[r / kStride];
        const int from = grad.next();
        read_row<T>(r / kStride < rows ? from + column * kSize : kZeros, row_g);
        if (overlap > 0)
#pragma unroll
          for (int v = 0; v < kColumns - 1; ++v)
            if (v < overlap) row_g[v] = 0;
#pragma unroll
        for (int v = 0; v < kColumns; ++v) bias_part += row_g[v];
      }
      float x[kSourceColumns];
      const bool inside = y0 + r >= begin && y0 + r < end;
      read_next<T, kExtentW - 1, (kColumns - 1) * kStride + 1>(source, inside, x0, a.width, x);
#pragma unroll
      for (int i = 0; i < kKernelH; ++i) {
        const int reach = r - i * kDilation, o = reach / kStride;
        if (reach < 0 || reach % kStride != 0 || o >= kRows) continue;
#pragma unroll
        for (int v = 0; v < kColumns; ++v)
#pragma unroll
          for (int j = 0; j < kKernelW; ++j) sum[i][j] = fmaf(x[v * kStride + j * kDilation], g[o][v], sum[i][j]);
      }
    }
    bias += bias_part;
  }
};

// The sum of one tap over the block's part of the images, by all threads, of products inside the image only.
template <typename T>
__device__ __noinline__ float sum_by_products(const Stream& a, int group, int first, int last, int filter, int tap) {
  const int channel = (group * a.block_filters + filter) / a.multiplier;
  const int i = tap / a.kernel_w * a.dilation - a.padding_h, j = tap % a.kernel_w * a.dilation - a.padding_w;
  float sum = 0;
  for (int step = first; step < last; ++step) {
    const Chunk c = chunk_of(a, group, step);
    const int image = step / a.bands;
    const auto* x = reinterpret_cast<const T*>(a.source.base + image * a.source.image_bytes) +
                    static_cast<int64_t>(channel) * a.height * a.width;
    const auto* g = reinterpret_cast<const T*>(a.grad.base + image * a.grad.image_bytes) +
                    static_cast<int64_t>(group * a.block_filters + filter) * a.out_height * a.out_width;
    for (int at = threadIdx.x; at < c.rows * a.out_width; at += blockDim.x) {
      const int row = c.row + at / a.out_width, column = at % a.out_width;
      const int y = row * a.stride + i, k = column * a.stride + j;
      if (y >= 0 && y < a.height && k >= 0 && k < a.width)
        sum = fmaf(widen(x[y * a.width + k]), widen(g[row * a.out_width + column]), sum);
    }
  }
  return sum;
}

// Adds up `count` values in shared memory; `lanes` threads side by side, a power of two, do so together.
__device__ float sum_of(int values, int count, int lanes) {
  float sum = 0;
  for (int i = threadIdx.x % lanes; i < count; i += lanes) sum += shared<float>(values + 4 * i);
  for (int offset = lanes / 2; offset > 0; offset /= 2) sum += __shfl_xor_sync(~0u, sum, offset);
  return sum;
}

template <typename T, class Tile>
__global__ void __launch_bounds__(Tile::kMaxThreads + 32, Tile::kBlocks)
    stream_grad_weight_nchw(const __grid_constant__ Stream a) {
  constexpr int kTaps = Tile::kKernelH * Tile::kKernelW;
  if (threadIdx.x < 32) shared<uint32_t>(kZeros + 4 * threadIdx.x) = 0;
  const Copier copier(a.bulk, true);
  copier.init();
  __syncthreads();

  const int group = blockIdx.x / a.splits, split = blockIdx.x % a.splits;
  const int filters = min(a.block_filters, a.filters - group * a.block_filters);
  const int64_t steps = static_cast<int64_t>(a.images) * a.bands;
  const int first = static_cast<int>(steps * split / a.splits), last = static_cast<int>(steps * (split + 1) / a.splits);
  Cursor source_cursor, grad_cursor;
  const auto load = [&](int step, int stage) {
    if (step < last && copier.loads()) {
      Chunk c = chunk_of(a, group, step);
      const int barrier = Barriers::full(stage);
      load_rows<T>(copier, a.source_ring, a.source, source_cursor, c.source_image, c.source_begin, c.source_end,
                   barrier);
      load_rows<T>(copier, a.grad_ring, a.grad, grad_cursor, c.grad_image, c.grad_begin, c.grad_end, barrier);
      c.source_slot = source_cursor.slot_of(a.source_ring, c.source_image * a.source.rows + c.source_begin);
      c.grad_slot = grad_cursor.slot_of(a.grad_ring, c.grad_image * a.grad.rows + c.grad_begin);
      if (copier.rank() == 0) shared<Chunk>(a.chunks_at + stage * static_cast<int>(sizeof(Chunk))) = c;
    }
    copier.commit(stage);
  };
  if (!copier.dedicated || !copier.is_worker())
    for (int d = 0; d < kDepth; ++d) load(first + d, d);

  float sum[Tile::kKernelH][Tile::kKernelW] = {};
  double bias = 0;
  const int tiles = a.strips * a.segments, units = a.single ? tiles : filters * tiles;
  int stage = 0;
  uint32_t parity = 0;
  for (int step = first; step < last; ++step) {
    if (copier.is_worker()) {
      copier.wait_full(stage, parity);
      if (!copier.dedicated) __syncthreads();
      const Chunk c = shared<Chunk>(a.chunks_at + stage * static_cast<int>(sizeof(Chunk)));
      for (int unit = threadIdx.x; unit < units; unit += copier.workers()) {
        const int filter = a.single ? 0 : unit / tiles, tile = a.single ? unit : unit % tiles;
        const int segment = tile / a.strips;
        if (segment * Tile::kRows < c.rows) Tile::template add<T>(a, c, filter, segment, tile % a.strips, sum, bias);
      }
      if (copier.dedicated) {
        copier.finish(stage);
      } else {
        __syncthreads();
        load(step + kDepth, stage);
      }
    } else {
      wait(Barriers::done(stage), parity);
      load(step + kDepth, stage);
    }
    if (++stage == kDepth) stage = 0, parity ^= 1;
  }
  __syncthreads();

  // The rings have served: their memory takes the sums, tap by tap, of all threads.
  const int threads = blockDim.x;
#pragma unroll
  for (int i = 0; i < kTaps; ++i)
    shared<float>(kHead + 4 * (i * threads + threadIdx.x)) = sum[i / Tile::kKernelW][i % Tile::kKernelW];
  shared<float>(kHead + 4 * (kTaps * threads + threadIdx.x)) = static_cast<float>(bias);
  __syncthreads();
  const int slots = kTaps + a.with_bias, per_filter = a.single ? copier.workers() : tiles,
            lanes = per_filter < 32 ? 1 : 32;
  float* partial = a.partial + static_cast<int64_t>(split) * slots * a.filters + group * a.block_filters;
  bool again = false;
  for (int begin = 0; begin < slots * filters; begin += threads / lanes) {
    const int at = begin + threadIdx.x / lanes, slot = at / filters, filter = at % filters;
    const bool mine = at < slots * filters;
    const float total = sum_of(kHead + 4 * (slot * threads + filter * per_filter), mine ? per_filter : 0, lanes);
    if (mine && threadIdx.x % lanes == 0) {
      partial[static_cast<int64_t>(slot) * a.filters + filter] = total;
      again |= slot < kTaps && !is_finite(total);
    }
  }
  if (!__syncthreads_or(again)) return;
  for (int at = 0; at < kTaps * filters; ++at) {
    const int slot = at / filters, filter = at % filters;
    float* result = partial + static_cast<int64_t>(slot) * a.filters + filter;
    const bool finite = is_finite(*const_cast<volatile float*>(result));  // the same for all threads
    __syncthreads();
    if (finite) continue;
    shared<float>(kHead + 4 * threadIdx.x) = sum_by_products<T>(a, group, first, last, filter, slot);
    __syncthreads();
    const float exact = sum_of(kHead, threads, 32);
    if (threadIdx.x == 0) *result = exact;
    __syncthreads();
  }
}

// How the work is cut; the rest follows from it.
struct Cut {
  bool single;
  int block_channels, chunk_rows, threads, splits;
  int64_t shared_bytes;
};

// What there is to know of a class of tiles.
struct TileSize {
  int rows, columns, taps;
  int threads_per_block, blocks_per_multiprocessor;  // as the registers allow, besides a warp that copies
};

// Fills in what follows from a cut.
void apply(Stream& a, Cut& cut, const TileSize& tile) {
  a.single = cut.single, a.block_channels = cut.block_channels, a.chunk_rows = cut.chunk_rows, a.splits = cut.splits;
  a.block_filters = cut.single ? 1 : cut.block_channels * a.multiplier;
  a.bands = static_cast<int>(ceil_div(a.out_height, cut.chunk_rows));
  a.strips = static_cast<int>(ceil_div(a.out_width, tile.columns));
  a.segments = static_cast<int>(ceil_div(cut.chunk_rows, tile.rows));
  const int extent = (a.kernel_h - 1) * a.dilation + 1;
  RowRing &source = a.source_ring, &grad = a.grad_ring;
  const int64_t source_rows = cut.single ? rows_for_bands(a.bands, cut.chunk_rows * a.stride, extent, source.row_bytes)
                                         : rows_for_planes(int64_t{cut.block_channels} * a.height, source.row_bytes);
  const int64_t grad_rows =
      rows_for_planes(cut.single ? cut.chunk_rows : int64_t{a.block_filters} * a.out_height, grad.row_bytes);
  source.period = static_cast<int>(period_of(source.row_bytes));
  grad.period = static_cast<int>(period_of(grad.row_bytes));
  source.capacity = static_cast<int>(source_rows), grad.capacity = static_cast<int>(grad_rows);
  source.memory = kHead;
  grad.memory = static_cast<int>(kHead + ring_bytes(source_rows, source.row_bytes));
  a.chunks_at = static_cast<int>(grad.memory + ring_bytes(grad_rows, grad.row_bytes));
  cut.shared_bytes = std::max<int64_t>(a.chunks_at + kDepth * sizeof(Chunk),
                                       kHead + int64_t{tile.taps + 1} * (cut.threads + 32) * sizeof(float));
}

// Cuts the work so that as many threads as possible have some on a multiprocessor at a time, and every block about as
// much as the others.
Cut cut_for(Stream a, const TileSize& tile, const Device& device) {
  Cut best{};
  double best_score = -1;
  const auto consider = [&](bool single, int channels, int rows) {
    const int64_t tiles = ceil_div(a.out_width, tile.columns) * ceil_div(rows, tile.rows);
    const int64_t units = tiles * (single ? 1 : channels * a.multiplier);
    Cut cut{single, channels, rows, threads_for(units, tile.threads_per_block), 1, 0};
    if (!single && units > cut.threads) return false;  // a thread works for one filter only
    apply(a, cut, tile);
    const int64_t resident =
        std::min<int64_t>({device.shared_per_multiprocessor / (cut.shared_bytes + 1024),
                           (tile.threads_per_block + 32) * tile.blocks_per_multiprocessor / (cut.threads + 32), 16});
    if (cut.shared_bytes > device.shared_per_block || resident == 0) return false;
    const int64_t slots = resident * device.multiprocessors, groups = ceil_div(a.filters, a.block_filters);
    const int64_t steps = int64_t{a.images} * a.bands;
    const int64_t splits = std::min(steps, std::max<int64_t>(1, slots / groups));
    const double turns = static_cast<double>(groups * splits) / slots;
    const double even = turns / std::ceil(turns) * (static_cast<double>(steps) / splits) / ceil_div(steps, splits);
    const double busy = static_cast<double>(resident * units) / ceil_div(units, cut.threads);
    const double chunk_bytes = static_cast<double>(cut.shared_bytes - kHead) / kDepth;  // a chunk costs some barriers
    const double score = busy * even * chunk_bytes / (chunk_bytes + 3000);
    if (score > best_score * 1.02) best_score = score, cut.splits = static_cast<int>(splits), best = cut;
    return true;
  };
  for (int channels = 1; channels <= a.channels; ++channels)
    if (!consider(false, channels, a.out_height)) break;
  consider(true, 1, a.out_height);
  for (int rows = tile.rows; rows < a.out_height; rows += tile.rows)
    if (!consider(true, 1, rows)) break;
  if (best_score < 0) consider(true, 1, kLeastRows);
  if (best_score < 0) throw std::runtime_error("dwconv: rows of this size do not fit the GPU's shared memory");
  return best;
}

template <typename T, class Tile>
void launch(const Problem& p, Stream a, const Allocate& allocate, cudaStream_t stream) {
  constexpr int kTaps = Tile::kKernelH * Tile::kKernelW;
  constexpr TileSize kTile{Tile::kRows, Tile::kColumns, kTaps, Tile::kMaxThreads, Tile::kBlocks};
  const Device& device = current_device();
  const auto kernel = stream_grad_weight_nchw<T, Tile>;
  a.bulk = a.bulk && device.capability >= 90;
  static thread_local Decisions<8, Cut> decisions;
  Cut cut =
      decisions({device.id, a.images, a.channels, a.multiplier, a.height, a.width, a.out_height, a.out_width}, [&] {
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, device.shared_per_block);
        return cut_for(a, kTile, device);
      });
  apply(a, cut, kTile);
  const int64_t blocks = ceil_div(a.filters, a.block_filters) * a.splits;
  const int64_t sums = int64_t{kTaps + a.with_bias} * a.filters;
  a.partial = static_cast<float*>(allocate(a.splits * sums * static_cast<int64_t>(sizeof(float))));
  kernel<<<static_cast<unsigned>(blocks), cut.threads + (a.bulk ? 32 : 0), cut.shared_bytes, stream>>>(a);
  check_launch("stream_grad_weight_nchw");
  launch_add_partial_sums<T>(p, a.partial, a.splits, false, stream);
}

}  // namespace

void launch_stream_grad_weight_nchw(const Problem& p, bool bulk, const Allocate& allocate, cudaStream_t stream) {
  const int64_t size = size_of(p.dtype);
  Stream a{};
  a.height = static_cast<int>(p.height), a.width = static_cast<int>(p.width);
  a.out_height = static_cast<int>(p.out_height), a.out_width = static_cast<int>(p.out_width);
  a.kernel_h = static_cast<int>(p.kernel_h), a.kernel_w = static_cast<int>(p.kernel_w);
  a.stride = static_cast<int>(p.stride_h), a.dilation = static_cast<int>(p.dilation_h);
  a.padding_h = static_cast<int>(p.padding_h), a.padding_w = static_cast<int>(p.padding_w);
  a.images = static_cast<int>(p.batch), a.channels = static_cast<int>(p.channels);
  a.multiplier = static_cast<int>(p.multiplier), a.filters = static_cast<int>(p.filters());
  a.with_bias = p.bias != nullptr, a.bulk = bulk;
  const auto arrange = [&](const View& view, int planes, int h, int w, Planes& array, RowRing& ring, bool& joined) {
    joined = p.batch == 1 || view.stride[0] == int64_t{planes} * h * w;
    array.base = static_cast<char*>(view.data), array.image_bytes = view.stride[0] * size;
    array.rows = planes * h * (joined ? a.images : 1), array.row_bytes = static_cast<int>(w * size);
    ring.row_bytes = array.row_bytes;
    ring.phase = static_cast<int>(reinterpret_cast<uintptr_t>(view.data) % kUnit);
  };
  arrange(p.input, a.channels, a.height, a.width, a.source, a.source_ring, a.source_joined);
  arrange(p.output, a.filters, a.out_height, a.out_width, a.grad, a.grad_ring, a.grad_joined);
  visit_dtype(p.dtype, [&](auto zero) {
    using T = decltype(zero);
    if constexpr (sizeof(T) <= 4) {
      visit_small_kernel(p, [&](auto kernel) { launch<T, Window<decltype(kernel)>>(p, a, allocate, stream); });
    }
  });
}

}  // namespace dwconv
