// Forward and grad_input on contiguous planes: rows stream through shared memory, a thread computes a tile of outputs
// from there into a second buffer, and that is stored as the contiguous piece of memory it is.
//
// Bytes bound by design: every input row is read from memory once, every output row written once, both in large pieces,
// however short and unaligned the rows. Threads side by side own tiles 7 columns apart, an odd number, so that shared
// memory is free of bank conflicts for rows of 7, 14, 28, 56 and most others.
#include <algorithm>
#include <cmath>

#include "launch.h"
#include "stream.cuh"

namespace dwconv {
namespace {

// One pass as a map from source planes to target planes. A group is one source plane and the `fan_out` target planes
// that are computed from it, or one target plane and the `fan_in` source planes it is summed over; the other is 1.
struct Stream {
  Planes source, target;
  const void* weight;
  const void* bias;
  int64_t weight_filter, bias_stride;        // in elements
  int weight_row, weight_column;             // negative where grad_input flips
  int height, width, out_height, out_width;  // of a source plane and of a target plane
  int kernel_h, kernel_w, stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w;
  int groups, fan_out, fan_in;  // groups of an image
  int chunk_groups, chunk_rows, bands;
  int chunks, depth, buffers, buffers_at, buffer_bytes;
  int strips, segments;  // tiles of a plane's part in a chunk
  bool spread;           // grad_input at stride 2: the stride is that of the target
  bool bulk;
  int phase, capacity, period;
  Divider by_sub, by_bands, by_chunks_per_image, by_strips, by_segments, by_fan_out, by_filters;
};

// What a chunk reads and writes. Whole planes, or (bands > 1) rows of one target plane.
struct Chunk {
  int image, group, groups;      // the first group, and their number
  int target, targets;           // the same as target planes of the image
  int row, rows;                 // of each target plane
  int source_begin, source_end;  // rows of the image's source
};

__device__ Chunk chunk_of(const Stream& a, uint32_t number) {
  Chunk c;
  const int sub = a.by_sub.split(number);
  const int band = a.by_bands.split(number);
  c.group = a.by_chunks_per_image.split(number) * a.chunk_groups;
  c.image = number;
  c.groups = min(a.chunk_groups, a.groups - c.group);
  c.target = c.group * a.fan_out + sub;
  c.targets = a.bands > 1 ? 1 : c.groups * a.fan_out;
  c.row = band * a.chunk_rows;
  c.rows = min(a.chunk_rows, a.out_height - c.row);
  const int plane = c.group * a.fan_in * a.height;
  if (a.bands > 1) {
    int first = c.row, last = c.row + c.rows - 1;
    if (a.spread) {
      first = (max(first + a.padding_h - a.kernel_h + 1, 0) + 1) / 2;
      last = (last + a.padding_h) / 2;
    } else {
      first = first * a.stride_h - a.padding_h;
      last = last * a.stride_h - a.padding_h + (a.kernel_h - 1) * a.dilation_h;
    }
    c.source_begin = plane + min(max(first, 0), a.height);
    c.source_end = plane + min(max(last + 1, 0), a.height);
  } else {
    c.source_begin = plane;
    c.source_end = plane + c.groups * a.fan_in * a.height;
  }
  return c;
}

// The group in its chunk that a target plane of the chunk belongs to.
__device__ inline int group_of(const Stream& a, uint32_t plane) {
  if (a.bands > 1) return 0;
  a.by_fan_out.split(plane);
  return plane;
}

// What a tap reads for a target index along one side; outside the source where it reads nothing.
__device__ inline int source_index(int target, int tap, int stride, int padding, int dilation, bool spread) {
  if (!spread) return target * stride - padding + tap * dilation;
  const int padded = target + padding - tap * dilation;
  return padded % stride == 0 ? padded / stride : -1;
}

// The outputs of a tile one by one, by the taps that meet the image. For kernels with a tap that is Inf or NaN, which
// must not meet the padding, and for kernels that no tile is compiled for.
template <typename T>
__device__ __noinline__ void tile_by_taps(const Stream& a, const RowRing& ring, const Chunk& c, int source_slot,
                                          int out, int plane, int row, int rows, int column, int columns) {
  const T* weight = static_cast<const T*>(a.weight);
  uint32_t filter = c.target + plane;
  filter = a.by_filters.split(filter) * a.fan_in;
  const int group = group_of(a, plane);
  for (int r = row; r < row + rows; ++r)
    for (int v = column; v < column + columns; ++v) {
      float sum = a.bias ? widen(static_cast<const T*>(a.bias)[filter * a.bias_stride]) : 0.f;
      for (int q = 0; q < a.fan_in; ++q) {
        const T* taps = weight + (filter + q) * a.weight_filter;
        const int top = (c.group + group) * a.fan_in * a.height + q * a.height - c.source_begin;
        for (int i = 0; i < a.kernel_h; ++i) {
          const int y = source_index(c.row + r, i, a.stride_h, a.padding_h, a.dilation_h, a.spread);
          if (y < 0 || y >= a.height) continue;
          const int source = ring.at(ring.wrap(source_slot + top + y));
          for (int j = 0; j < a.kernel_w; ++j) {
            const int x = source_index(v, j, a.stride_w, a.padding_w, a.dilation_w, a.spread);
            if (x >= 0 && x < a.width)
              sum = fmaf(widen(shared<T>(source + x * static_cast<int>(sizeof(T)))),
                         widen(taps[i * a.weight_row + j * a.weight_column]), sum);
          }
        }
      }
      shared<T>(out + ((plane * c.rows + r) * a.out_width + v) * static_cast<int>(sizeof(T))) = narrow<T>(sum);
    }
}

// The weights of one filter in registers. Returns whether all are finite: then a product with a zero is a zero.
template <int kKernelH, int kKernelW, typename T>
__device__ bool read_weight(const Stream& a, int filter, float (&weight)[kKernelH][kKernelW]) {
  const T* taps = static_cast<const T*>(a.weight) + filter * a.weight_filter;
  float zero = 0;
#pragma unroll
  for (int i = 0; i < kKernelH; ++i)
#pragma unroll
    for (int j = 0; j < kKernelW; ++j) {
      weight[i][j] = widen(taps[i * a.weight_row + j * a.weight_column]);
      zero = fmaf(weight[i][j], 0.f, zero);
    }
  return zero == 0.f;
}

// A tile of kTileRows x 7 outputs. It walks down the source rows, reads each once and adds it to the outputs whose
// window it lies in. Needs a padding below the kernel's extent, 7 output columns, and kSum where fan_in is not 1.
template <int kKernelH, int kKernelW, int kStride, int kDilation, int kTileRows, bool kSum>
struct Window {
  static constexpr int kRows = kTileRows, kColumns = 7;
  static constexpr int kMaxThreads = kKernelH * kKernelW < 25 ? 256 : 128, kBlocks = kKernelH * kKernelW == 25 ? 4 : 3;

  template <typename T>
  static __device__ void compute(const Stream& a, const RowRing& ring, const Chunk& c, int source_slot, int out,
                                 int plane, int segment, int strip) {
    constexpr int kExtentH = (kKernelH - 1) * kDilation + 1, kExtentW = (kKernelW - 1) * kDilation + 1;
    constexpr int kSourceRows = (kRows - 1) * kStride + kExtentH, kSourceColumns = (kColumns - 1) * kStride + kExtentW;
    uint32_t filter = c.target + plane;
    filter = a.by_filters.split(filter) * a.fan_in;
    const int row = segment * kRows, rows = min(kRows, c.rows - row);
    const int column = min(strip * kColumns, a.out_width - kColumns);  // the last strip overlaps the one before
    const int overlap = strip * kColumns - column;
    const int y0 = (c.row + row) * kStride - a.padding_h, x0 = column * kStride - a.padding_w;
    const float bias = a.bias ? widen(static_cast<const T*>(a.bias)[filter * a.bias_stride]) : 0.f;
    constexpr int kSize = sizeof(T);
    const int ring_end = ring.at(ring.capacity);
    const int ring_bytes = ring.capacity * ring.row_bytes;
    const auto store = [&](int r, const float (&values)[kColumns]) {
      if (r >= rows) return;
      const int to = out + ((plane * c.rows + row + r) * a.out_width + column) * kSize;
      if (overlap == 0)
#pragma unroll
        for (int v = 0; v < kColumns; ++v) shared<T>(to + v * kSize) = narrow<T>(values[v]);
      else
#pragma unroll
        for (int v = 0; v < kColumns; ++v)
          if (v >= overlap) shared<T>(to + v * kSize) = narrow<T>(values[v]);
    };

    float sum[kRows][kColumns];
    if (kSum)
#pragma unroll
      for (int r = 0; r < kRows; ++r)
#pragma unroll
        for (int v = 0; v < kColumns; ++v) sum[r][v] = 0;
    for (int q = 0; q < (kSum ? a.fan_in : 1); ++q) {
      float weight[kKernelH][kKernelW];
      if (!read_weight<kKernelH, kKernelW, T>(a, filter + q, weight))
        return tile_by_taps<T>(a, ring, c, source_slot, out, plane, row, rows, column + overlap, kColumns - overlap);
      const int top = ((c.group + group_of(a, plane)) * a.fan_in + q) * a.height - c.source_begin;
      int source = ring.at(ring.wrap(source_slot + top + y0));
#pragma unroll
      for (int r = 0; r < kSourceRows; ++r) {
        const bool inside = static_cast<uint32_t>(y0 + r) < static_cast<uint32_t>(a.height);
        float x[kSourceColumns];
        read_row<T>(inside ? source + x0 * kSize : kZeros, x);
        source += ring.row_bytes;
        if (source >= ring_end) source -= ring_bytes;
#pragma unroll
        for (int j = 0; j < kSourceColumns; ++j)
          if (j < kExtentW - 1 || j > (kColumns - 1) * kStride)  // the others are never padding
            x[j] = static_cast<uint32_t>(x0 + j) < static_cast<uint32_t>(a.width) ? x[j] : 0.f;
#pragma unroll
        for (int i = 0; i < kKernelH; ++i) {
          const int reach = r - i * kDilation, o = reach / kStride;
          if (reach < 0 || reach % kStride != 0 || o >= kRows) continue;
#pragma unroll
          for (int j = 0; j < kKernelW; ++j)
#pragma unroll
            for (int v = 0; v < kColumns; ++v) {
              const float before = !kSum && i == 0 && j == 0 ? bias : sum[o][v];
              sum[o][v] = fmaf(x[v * kStride + j * kDilation], weight[i][j], before);
            }
        }
        const int last = r - (kExtentH - 1);  // the last row that the output row, if any, reaches
        if (!kSum && last >= 0 && last % kStride == 0) store(last / kStride, sum[last / kStride]);
      }
    }
    if (kSum)
#pragma unroll
      for (int r = 0; r < kRows; ++r) store(r, sum[r]);
  }
};

// grad_input at stride 2: a tile of kPairs x 7 pairs of rows and columns. Which taps reach a row depends on whether the
// row plus the padding is even: known at compile time, given whether the padding is (kOdd).
template <int kKernel, int kOdd>
struct Spread {
  static constexpr int kPairs = kKernel == 3 ? 3 : 2;
  static constexpr int kRows = 2 * kPairs, kColumns = 14;
  static constexpr int kMaxThreads = 128, kBlocks = 3;

  template <typename T>
  static __device__ void compute(const Stream& a, const RowRing& ring, const Chunk& c, int source_slot, int out,
                                 int plane, int segment, int strip) {
    constexpr int kLow = (kOdd - kKernel + 1) / 2, kSpan = kOdd - kLow;  // source rows from kLow to kOdd off
    constexpr int kSourceRows = kPairs + kSpan, kSourceColumns = kColumns / 2 + kSpan;
    uint32_t filter = c.target + plane;
    filter = a.by_filters.split(filter) * a.fan_in;
    const int group = group_of(a, plane);
    const int row = segment * kRows, column = strip * kColumns;
    const int rows = min(kRows, c.rows - row), columns = min(kColumns, a.out_width - column);
    const int y0 = (c.row + row) / 2 + a.padding_h / 2 + kLow, x0 = column / 2 + a.padding_w / 2 + kLow;
    constexpr int kSize = sizeof(T);
    const int ring_end = ring.at(ring.capacity);
    const int ring_bytes = ring.capacity * ring.row_bytes;
    float sum[kRows][kColumns] = {};

    for (int q = 0; q < a.fan_in; ++q) {
      float weight[kKernel][kKernel];
      if (!read_weight<kKernel, kKernel, T>(a, filter + q, weight))
        return tile_by_taps<T>(a, ring, c, source_slot, out, plane, row, rows, column, columns);
      const int top = ((c.group + group_of(a, plane)) * a.fan_in + q) * a.height - c.source_begin;
      int source = ring.at(ring.wrap(source_slot + top + y0));
#pragma unroll
      for (int r = 0; r < kSourceRows; ++r) {
        const bool inside = static_cast<uint32_t>(y0 + r) < static_cast<uint32_t>(a.height);
        float x[kSourceColumns];
        read_row<T>(inside ? source + x0 * kSize : kZeros, x);
        source += ring.row_bytes;
        if (source >= ring_end) source -= ring_bytes;
#pragma unroll
        for (int j = 0; j < kSourceColumns; ++j)
          x[j] = static_cast<uint32_t>(x0 + j) < static_cast<uint32_t>(a.width) ? x[j] : 0.f;
#pragma unroll
        for (int o = 0; o < kRows; ++o) {
          const int i = o % 2 + kOdd - 2 * (r + kLow - o / 2);
          if (i < 0 || i >= kKernel) continue;
#pragma unroll
          for (int v = 0; v < kColumns; ++v)
#pragma unroll
            for (int s = 0; s <= kSpan; ++s) {
              const int j = v % 2 + kOdd - 2 * (s + kLow);
              if (j >= 0 && j < kKernel) sum[o][v] = fmaf(x[v / 2 + s], weight[i][j], sum[o][v]);
            }
        }
      }
    }

#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (r >= rows) break;
      const int to = out + ((plane * c.rows + row + r) * a.out_width + column) * kSize;
      if (columns == kColumns)
#pragma unroll
        for (int v = 0; v < kColumns; ++v) shared<T>(to + v * kSize) = narrow<T>(sum[r][v]);
      else
#pragma unroll
        for (int v = 0; v < kColumns; ++v)
          if (v < columns) shared<T>(to + v * kSize) = narrow<T>(sum[r][v]);
    }
  }
};

// Any kernel, a few outputs at a time.
struct AnyWindow {
  static constexpr int kRows = 4, kColumns = 1;
  static constexpr int kMaxThreads = 256, kBlocks = 3;

  template <typename T>
  static __device__ void compute(const Stream& a, const RowRing& ring, const Chunk& c, int source_slot, int out,
                                 int plane, int segment, int strip) {
    const int row = segment * kRows;
    tile_by_taps<T>(a, ring, c, source_slot, out, plane, row, min(kRows, c.rows - row), strip, 1);
  }
};

template <typename T, class Tile>
__global__ void __launch_bounds__(Tile::kMaxThreads, Tile::kBlocks) stream_nchw(const __grid_constant__ Stream a) {
  auto* barriers = &shared<uint64_t>(0);
  const RowRing ring{kHead, a.phase, a.source.row_bytes, a.capacity, a.period};
  if (threadIdx.x < 32) shared<uint32_t>(kZeros + 4 * threadIdx.x) = 0;
  const Copier copier(a.bulk);
  copier.init(barriers);
  __syncthreads();

  const int first = static_cast<int>(static_cast<int64_t>(a.chunks) * blockIdx.x / gridDim.x);
  const int last = static_cast<int>(static_cast<int64_t>(a.chunks) * (blockIdx.x + 1) / gridDim.x);
  Cursor loaded, read;
  const auto load = [&](int number, int stage) {
    if (number < last) {
      const Chunk c = chunk_of(a, number);
      load_rows<T>(copier, ring, a.source, loaded, c.image, c.source_begin, c.source_end, barriers + stage);
    }
    copier.commit(barriers + stage);
  };
  for (int d = 0; d < a.depth; ++d) load(first + d, d);

  int stage = 0, buffer = 0;
  uint32_t parity = 0;
  for (int number = first; number < last; ++number) {
    const Chunk c = chunk_of(a, number);
    const int before = c.image * a.source.rows;
    read.place(ring, before + c.source_begin, before + c.source_end);
    const int source_slot = read.slot_of(ring, before + c.source_begin);
    T* target = reinterpret_cast<T*>(a.target.base + c.image * a.target.image_bytes +
                                     (static_cast<int64_t>(c.target) * a.out_height + c.row) * a.target.row_bytes);
    const int out =
        a.buffers_at + buffer * a.buffer_bytes + static_cast<int>(reinterpret_cast<uintptr_t>(target) % kUnit);

    copier.wait(barriers + stage, parity, a.depth);
    copier.stored(a.buffers - 1);
    __syncthreads();
    const uint32_t units = c.targets * a.segments * a.strips;
    for (uint32_t unit = threadIdx.x; unit < units; unit += blockDim.x) {
      uint32_t plane = unit;
      const int strip = a.by_strips.split(plane);
      const int segment = a.by_segments.split(plane);
      if (segment * Tile::kRows < c.rows)
        Tile::template compute<T>(a, ring, c, source_slot, out, plane, segment, strip);
    }
    copier.before_store();
    __syncthreads();
    copier.store(target, &shared<T>(out), c.targets * c.rows * a.out_width);
    load(number + a.depth, stage);
    if (++stage == a.depth) stage = 0, parity ^= 1;
    if (++buffer == a.buffers) buffer = 0;
  }
  copier.stored(0);
}

// How a pass is cut into chunks; the rest of the arguments follows from it.
struct Cut {
  int chunk_groups, chunk_rows, bands, depth, buffers, threads;
};

// Fills in what follows from a cut.
void apply(Stream& a, const Cut& cut, int tile_rows, int tile_columns, int64_t images) {
  a.chunk_groups = cut.chunk_groups, a.chunk_rows = cut.chunk_rows, a.bands = cut.bands;
  a.depth = cut.depth, a.buffers = cut.buffers;
  const int sub = cut.bands > 1 ? a.fan_out : 1;
  const int64_t chunks_per_image = ceil_div(a.groups, cut.chunk_groups);
  a.chunks = static_cast<int>(images * chunks_per_image * cut.bands * sub);
  a.strips = static_cast<int>(ceil_div(a.out_width, tile_columns));
  a.segments = static_cast<int>(ceil_div(cut.chunk_rows, tile_rows));
  a.by_sub = Divider(sub), a.by_bands = Divider(cut.bands), a.by_chunks_per_image = Divider(chunks_per_image);
  a.by_strips = Divider(a.strips), a.by_segments = Divider(a.segments), a.by_fan_out = Divider(a.fan_out);

  a.period = static_cast<int>(period_of(a.source.row_bytes));
  const int extent = (a.kernel_h - 1) * a.dilation_h + 1;
  const int step = a.spread ? ceil_div(cut.chunk_rows, 2) : cut.chunk_rows * a.stride_h;
  a.capacity = static_cast<int>(
      cut.bands == 1 ? rows_for_planes(cut.depth, int64_t{cut.chunk_groups} * a.fan_in * a.height, a.source.row_bytes)
                     : rows_for_bands(cut.depth, cut.bands, step, extent, a.source.row_bytes));
  const int64_t targets = cut.bands > 1 ? 1 : cut.chunk_groups * a.fan_out;
  a.buffer_bytes = static_cast<int>(round_up(targets * cut.chunk_rows * a.target.row_bytes + kUnit, 128));
  a.buffers_at = static_cast<int>(kHead + ring_bytes(a.capacity, a.source.row_bytes));
}

int64_t shared_bytes(const Stream& a) {
  return a.buffers_at + int64_t{a.buffers} * a.buffer_bytes;
}

// What a cut has to reckon with.
struct Limits {
  int tile_rows, tile_columns;
  int threads_per_block, threads_per_multiprocessor;  // as the registers allow
};

// Cuts the planes so that as many threads as possible have work on a multiprocessor at a time, since it takes many to
// hide the latency of shared memory and of the barriers, and so that every block has about as much to do.
Cut cut_for(Stream a, const Limits& limits, int64_t images, const Device& d, int depth, int buffers) {
  Cut best{};
  double best_score = -1;
  const auto consider = [&](int64_t chunk_groups, int64_t chunk_rows) {
    Cut cut{};
    cut.chunk_groups = static_cast<int>(chunk_groups), cut.chunk_rows = static_cast<int>(chunk_rows);
    cut.bands = static_cast<int>(ceil_div(a.out_height, chunk_rows));
    cut.depth = depth, cut.buffers = buffers;
    apply(a, cut, limits.tile_rows, limits.tile_columns, images);
    const int64_t bytes = shared_bytes(a);
    const int64_t units = (cut.bands > 1 ? 1 : chunk_groups * a.fan_out) * a.segments * a.strips;
    cut.threads = threads_for(units, limits.threads_per_block);
    const int64_t blocks = std::min<int64_t>(
        {d.shared_per_multiprocessor / (bytes + 1024), limits.threads_per_multiprocessor / cut.threads, 16});
    if (bytes > d.shared_per_block || blocks == 0) return false;
    const int64_t rounds = ceil_div(units, cut.threads);
    const double busy = std::min<double>(static_cast<double>(blocks * units) / rounds, 768.);
    const double turns = static_cast<double>(a.chunks) / (blocks * d.multiprocessors);
    const double chunk_bytes = static_cast<double>(bytes - kHead) / (depth + buffers);  // a chunk costs some barriers
    const double score = busy * turns / std::ceil(turns) * chunk_bytes / (chunk_bytes + 3000);
    if (score > best_score * 1.02) best_score = score, best = cut;
    return true;
  };
  const int64_t units =
      ceil_div(a.out_height, limits.tile_rows) * ceil_div(a.out_width, limits.tile_columns) * a.fan_out;
  const int64_t many = std::min<int64_t>(ceil_div(limits.threads_per_block, units), a.groups);
  for (int64_t groups = 1; groups <= many; ++groups)
    if (!consider(groups, a.out_height)) break;
  if (a.fan_in == 1)
    for (int64_t rows = limits.tile_rows; rows < a.out_height; rows += limits.tile_rows)
      if (!consider(1, rows)) break;
  if (best_score < 0 && a.fan_in == 1) consider(1, kLeastRows);
  if (best_score < 0) throw std::runtime_error("dwconv: rows of this size do not fit the GPU's shared memory");
  return best;
}

struct Wish {
  int depth = 2, buffers = 1, threads = 0, groups = 0, rows = 0;
};

template <typename T, class Tile>
void launch(Stream a, int64_t images, const Wish& wish, cudaStream_t stream) {
  const Device device = current_device();
  const Limits limits{Tile::kRows, Tile::kColumns, Tile::kMaxThreads, Tile::kMaxThreads * Tile::kBlocks};
  Cut cut = cut_for(a, limits, images, device, wish.depth, wish.buffers);
#ifdef BENCH
  if (wish.groups) cut.chunk_groups = wish.groups, cut.chunk_rows = a.out_height, cut.bands = 1;
  if (wish.rows) cut.chunk_groups = 1, cut.chunk_rows = wish.rows, cut.bands = ceil_div(a.out_height, wish.rows);
  if (wish.groups || wish.rows) {
    apply(a, cut, Tile::kRows, Tile::kColumns, images);
    cut.threads =
        threads_for((cut.bands > 1 ? 1 : cut.chunk_groups * a.fan_out) * a.segments * a.strips, Tile::kMaxThreads);
  }
  if (wish.threads) cut.threads = wish.threads;
  static bool once = getenv("SHOW") != nullptr;
#endif
  a.bulk = a.bulk && device.capability >= 90;
  apply(a, cut, Tile::kRows, Tile::kColumns, images);
  const auto bytes = static_cast<int>(shared_bytes(a));
  const auto kernel = stream_nchw<T, Tile>;
  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  int resident = 0;
  cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, kernel, cut.threads, bytes);
  const int blocks = std::min(a.chunks, std::max(resident, 1) * device.multiprocessors);
#ifdef BENCH
  if (once)
    printf(" [P%d R%d nb%d T%d smem%d res%d chunks%d] ", cut.chunk_groups, cut.chunk_rows, cut.bands, cut.threads,
           bytes, resident, a.chunks);
#endif
  kernel<<<blocks, cut.threads, bytes, stream>>>(a);
  check_launch("stream_nchw");
}

void launch(const Problem& p, bool bulk, const Wish& wish, cudaStream_t stream) {
  const bool forward = p.pass == Pass::kForward;
  const View& source = forward ? p.input : p.output;
  const View& target = forward ? p.output : p.input;
  const int64_t size = size_of(p.dtype);
  Stream a{};
  a.height = static_cast<int>(forward ? p.height : p.out_height);
  a.width = static_cast<int>(forward ? p.width : p.out_width);
  a.out_height = static_cast<int>(forward ? p.out_height : p.height);
  a.out_width = static_cast<int>(forward ? p.out_width : p.width);
  a.fan_out = static_cast<int>(forward ? p.multiplier : 1), a.fan_in = static_cast<int>(forward ? 1 : p.multiplier);
  a.kernel_h = static_cast<int>(p.kernel_h), a.kernel_w = static_cast<int>(p.kernel_w);
  a.stride_h = static_cast<int>(p.stride_h), a.stride_w = static_cast<int>(p.stride_w);
  a.dilation_h = static_cast<int>(p.dilation_h), a.dilation_w = static_cast<int>(p.dilation_w);
  a.padding_h = static_cast<int>(p.padding_h), a.padding_w = static_cast<int>(p.padding_w);
  a.weight = p.weight.data;
  a.weight_filter = p.weight.stride[0], a.weight_row = static_cast<int>(p.weight.stride[2]),
  a.weight_column = static_cast<int>(p.weight.stride[3]);
  a.bias = forward ? p.bias : nullptr, a.bias_stride = p.bias_stride;
  a.bulk = bulk;
  a.spread = !forward && (p.stride_h > 1 || p.stride_w > 1);
  if (!forward && !a.spread) {  // a forward pass with the kernel flipped
    a.weight = static_cast<const char*>(a.weight) +
               size * ((p.kernel_h - 1) * a.weight_row + (p.kernel_w - 1) * a.weight_column);
    a.weight_row = -a.weight_row, a.weight_column = -a.weight_column;
    a.padding_h = (a.kernel_h - 1) * a.dilation_h - a.padding_h;
    a.padding_w = (a.kernel_w - 1) * a.dilation_w - a.padding_w;
  }
  // Images that follow each other without a gap are one image of many planes.
  const int64_t source_planes = forward ? p.channels : p.filters(), target_planes = forward ? p.filters() : p.channels;
  const auto dense = [&](const View& view, int64_t planes, int64_t h, int64_t w) {
    return p.batch == 1 || view.stride[0] == planes * h * w;
  };
  int64_t images = p.batch;
  a.groups = static_cast<int>(p.channels);
  if (dense(source, source_planes, a.height, a.width) && dense(target, target_planes, a.out_height, a.out_width))
    a.groups *= static_cast<int>(images), images = 1;
  const auto planes_of = [&](const View& view, int fan, int h, int w) {
    return Planes{static_cast<char*>(view.data), view.stride[0] * size, a.groups * fan * h, static_cast<int>(w * size)};
  };
  a.source = planes_of(source, a.fan_in, a.height, a.width);
  a.target = planes_of(target, a.fan_out, a.out_height, a.out_width);
  a.by_filters = Divider(target_planes);
  a.phase = static_cast<int>(reinterpret_cast<uintptr_t>(a.source.base) % kUnit);

  visit_dtype(p.dtype, [&](auto zero) {
    using T = decltype(zero);
    if constexpr (sizeof(T) <= 4) {
      const auto go = [&](auto tile) { launch<T, decltype(tile)>(a, images, wish, stream); };
      const bool padded =
          a.padding_h <= (a.kernel_h - 1) * a.dilation_h && a.padding_w <= (a.kernel_w - 1) * a.dilation_w;
      const auto is = [&](int h, int w, int s, int d) {
        return a.kernel_h == h && a.kernel_w == w && a.stride_h == s && a.stride_w == s && a.dilation_h == d &&
               a.dilation_w == d;
      };
      if (a.spread) {
        const int odd = a.padding_h % 2;
        if (a.padding_w % 2 == odd && a.dilation_h == 1 && a.dilation_w == 1) {
          if (is(3, 3, 2, 1)) return odd ? go(Spread<3, 1>{}) : go(Spread<3, 0>{});
          if (is(5, 5, 2, 1)) return odd ? go(Spread<5, 1>{}) : go(Spread<5, 0>{});
          if (is(7, 7, 2, 1)) return odd ? go(Spread<7, 1>{}) : go(Spread<7, 0>{});
        }
      } else if (padded && a.out_width >= 7 && a.fan_in == 1) {
        if (is(1, 1, 1, 1)) return go(Window<1, 1, 1, 1, 7, false>{});
        if (is(3, 3, 1, 1)) return go(Window<3, 3, 1, 1, 7, false>{});
        if (is(3, 3, 2, 1)) return go(Window<3, 3, 2, 1, 7, false>{});
        if (is(3, 3, 1, 2)) return go(Window<3, 3, 1, 2, 7, false>{});
        if (is(5, 5, 1, 1)) return go(Window<5, 5, 1, 1, 7, false>{});
        if (is(5, 5, 2, 1)) return go(Window<5, 5, 2, 1, 7, false>{});
        if (is(7, 7, 1, 1)) return go(Window<7, 7, 1, 1, 7, false>{});
        if (is(7, 7, 2, 1)) return go(Window<7, 7, 2, 1, 7, false>{});
        if (is(1, 11, 1, 1)) return go(Window<1, 11, 1, 1, 7, false>{});
        if (is(11, 1, 1, 1)) return go(Window<11, 1, 1, 1, 7, false>{});
      }
      if (padded && a.out_width >= 7 && a.fan_in > 1) {
        if (is(3, 3, 1, 1)) return go(Window<3, 3, 1, 1, 7, true>{});
        if (is(5, 5, 1, 1)) return go(Window<5, 5, 1, 1, 7, true>{});
        if (is(7, 7, 1, 1)) return go(Window<7, 7, 1, 1, 7, true>{});
      }
      go(AnyWindow{});
    }
  });
}

}  // namespace

void launch_stream_nchw(const Problem& p, bool bulk, cudaStream_t stream) {
  launch(p, bulk, Wish{}, stream);
}

}  // namespace dwconv
