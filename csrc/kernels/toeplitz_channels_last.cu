// Forward and grad_input of small kernels in channels_last in 16 bits, on tensor cores.
//
// A row of the kernel is, for one channel, a band matrix B of 16 columns in and 8 columns out, B[k][n] = weight[k - n]:
// one multiplication of it from the left by 16 rows of pixels gives 16 x 8 sums. The upper 8 rows are pixels of 8 tiles,
// the lower 8 the same tiles 8 output columns on. A thread reads 4 channels of a pixel at once, and of neighbouring
// pixels at that, so that a byte permutation for each register of A is all that it takes to part the channels.
//
// A warp owns 4 channels, a block the slab that its warps make up, and `tiles` neighbouring tiles of 16 columns in each
// of `streams` images. It marches down the rows of its images: a source row, read once from a ring in shared memory, is
// added to all the output rows that it reaches, whose sums are in registers; the oldest of them is then complete.
// Outputs go through shared memory, from where they are stored as they lie side by side.
//
// Banks: what a warp reads at once are 8 bytes of pixels 2 apart, of 8 tiles. Pixels at an odd multiple of 16 bytes,
// and 16 bytes more after every tile, also from one image to the next, spread them as evenly as copies of 16 bytes
// allow.
//
// The zeros of B spoil an output if they meet Inf or NaN, which then is NaN. So outputs that are finite are right, and
// the others are computed again, tap by tap.
#include <algorithm>
#include <type_traits>
#include <utility>

#include "launch.h"
#include "mapping.h"
#include "march_channels_last.cuh"
#include "tensor_cores.cuh"

namespace dwconv {
namespace {

constexpr int kTile = 16;    // columns of a tile
constexpr int kTiles = 8;    // of a warp
constexpr int kReach = 8;    // columns of the source that a tile reads beyond its own number
constexpr int kChannels = 4; // of a warp
constexpr int kDepth = 8;    // rows of the ring: one to work on, the others on their way
constexpr int kMiddle = 8;   // zeros before the weights of a band matrix
constexpr int kCopy = 46;    // bytes to the same weight in a copy that is a column further on: with both, any two
                             // neighbours are one word

// What fits a multiprocessor with the registers that the sums take.
template <int kRows>
constexpr int kMaxQuads = kRows > 5 ? 8 : 12;

// An array (N, height, width, channels), and how the threads of a block copy a row of it.
struct Rows {
  char* base;
  int64_t image_bytes, row_bytes;
  int pixel_bytes, bytes;  // from one pixel to the next; of a pixel, all channels
  int height, width;
  int unit;           // bytes that are copied at once: 16, 8, 4 or 2
  int columns;        // of a block in an image
  int stream_bytes;   // in shared memory, from one image to the next
  int together;       // columns of an image that are copied at once
  int step;           // bytes to the next ones
  Divider by_units, by_together;
};

struct Toeplitz {
  Rows source, target;
  int batch, channels, padding_h, padding_w;
  const void* weight;
  int64_t weight_filter, weight_row, weight_column;
  const void* bias;
  int64_t bias_stride;
  int kernel_h, kernel_w;

  int tiles, streams;
  int slab;                              // channels of a block
  int pitch;                             // bytes from one pixel to the next in shared memory
  int slot_bytes, stage_bytes, stage_at; // rows of the ring, and of outputs behind it
  int rows, parts;                       // rows of all groups of images; slabs times spans of columns
  bool clear;                            // whether there is something outside the images, which is never loaded
  Divider by_slabs, by_height, by_kernel_w, by_taps;
};

// Where a column lies in a row in shared memory.
__host__ __device__ constexpr int place_of(int column, int pitch) {
  return column * pitch + column / kTile * kUnit;
}

// Calls visit(word) with a word of so many bytes.
template <typename Visit>
__device__ void visit_unit(int unit, Visit&& visit) {
  switch (unit) {
    case 16: return visit(uint4{});
    case 8: return visit(uint2{});
    case 4: return visit(uint32_t{});
    default: return visit(uint16_t{});
  }
}

// A thread's part of every row that its block copies: some columns of one of the images, some channels.
class Share {
 public:
  // `slab`: the block's first channel; `first_column`: of the image, may lie outside.
  __device__ Share(const Toeplitz& a, const Rows& r, int slab, int first_column) {
    uint32_t rest = threadIdx.x;
    const int part = r.by_units.split(rest) * r.unit, column = r.by_together.split(rest);
    stream_ = rest;
    begin_ = max(-first_column, 0) + column;
    end_ = stream_ < a.streams && slab * 2 + part < r.bytes ? min(r.columns, r.width - first_column) : 0;
    place_ = stream_ * r.stream_bytes + part;
    offset_ = static_cast<int64_t>(first_column + begin_) * r.pixel_bytes + slab * 2 + part;
  }

  // Goes to a row of a group of images.
  __device__ void seek(const Toeplitz& a, const Rows& r, int group, int row) {
    const int image = group * a.streams + stream_;
    there_ = image < a.batch;
    at_ = r.base + (image * r.image_bytes + row * r.row_bytes + offset_);
  }

  // Begins to load the row to offset `to` in shared memory, and goes to the next one.
  __device__ void load(const Toeplitz& a, const Rows& r, int to) {
    visit_unit(r.unit, [&](auto word) {
      visit(a, r, [&](char* at, int place) { copy_unit<sizeof(word)>(shared_address(to + place), at); });
    });
  }

  // Stores the row from offset `from` in shared memory, and goes to the next one.
  __device__ void store(const Toeplitz& a, const Rows& r, int from) {
    visit_unit(r.unit, [&](auto word) {
      using Word = decltype(word);
      visit(a, r, [&](char* at, int place) { *reinterpret_cast<Word*>(at) = shared<Word>(from + place); });
    });
  }

 private:
  int stream_, begin_, end_, place_;
  bool there_ = false;
  int64_t offset_;
  char* at_ = nullptr;

  template <typename Visit>
  __device__ void visit(const Toeplitz& a, const Rows& r, Visit&& visit) {
    if (there_) {
      char* at = at_;
#pragma unroll 1
      for (int column = begin_; column < end_; column += r.together, at += r.step)
        visit(at, place_ + place_of(column, a.pitch));
    }
    at_ += r.row_bytes;
  }
};

// Output rows of one group of images.
struct Run {
  int group, begin, end;
  int row, row_end;  // what they read of the source, inside the image
};

// The first of the runs that make up rows [begin, end) of all groups.
template <int kRows>
__device__ Run run_of(const Toeplitz& a, int begin, int end) {
  Run r;
  uint32_t group = begin;
  r.begin = a.by_height.split(group);
  r.group = group;
  r.end = min(a.target.height, r.begin + end - begin);
  r.row = max(r.begin - a.padding_h, 0);
  r.row_end = min(r.end - 1 - a.padding_h + kRows, a.source.height);
  return r;
}

// Source rows of a block on their way to the ring.
template <int kRows>
class Feed {
 public:
  __device__ Feed(const Toeplitz& a, int slab, int first_column, int begin, int end)
      : share_(a, a.source, slab, first_column), begin_(begin), end_(end) {}

  // Begins to load the next row, if there is one.
  __device__ void load(const Toeplitz& a) {
    if (left_ == 0 && begin_ < end_) {
      const Run r = run_of<kRows>(a, begin_, end_);
      begin_ += r.end - r.begin;
      left_ = r.row_end - r.row;
      share_.seek(a, a.source, r.group, r.row);
    }
    if (left_ > 0) {
      share_.load(a, a.source, slot_);
      --left_;
      slot_ += a.slot_bytes;
      if (slot_ == kDepth * a.slot_bytes) slot_ = 0;
    }
    commit_copies();
  }

 private:
  Share share_;
  int begin_, end_;          // output rows that no source row was loaded for
  int left_ = 0, slot_ = 0;  // source rows of the run, and the next one's place in the ring
};

// Writes the weights of a slab between zeros that are there already.
template <typename T, int kRows>
__device__ void load_weights(const Toeplitz& a, int slab) {
  const int channels = min(a.slab, a.channels - slab), count = channels * a.kernel_h * a.kernel_w;
#pragma unroll 4
  for (int i = threadIdx.x; i < count; i += blockDim.x) {
    uint32_t channel = i;
    uint32_t row = a.by_taps.split(channel);
    const int column = a.by_kernel_w.split(row);
    const T value = __ldg(static_cast<const T*>(a.weight) + (slab + static_cast<int>(channel)) * a.weight_filter +
                          static_cast<int>(row) * a.weight_row + column * a.weight_column);
    const int to = a.stage_at + (channel * kRows + row) * kBandRowBytes + 2 * (kMiddle + column);
    shared<T>(to) = value, shared<T>(to + kCopy) = value;
  }
}

// Computes those outputs of a channel in one column of rows [begin, end) that are not finite again.
template <typename T>
__device__ __noinline__ void column_by_taps(const Toeplitz& a, int begin, int end, int stream, int channel, int x) {
  for (; begin < end; ++begin) {
    uint32_t image = begin;
    const int y = a.by_height.split(image);
    image = image * a.streams + stream;
    if (image >= a.batch) return;
    char* to = a.target.base + image * a.target.image_bytes + y * a.target.row_bytes +
               static_cast<int64_t>(x) * a.target.pixel_bytes;
    T& output = reinterpret_cast<T*>(to)[channel];
    if (is_finite(widen(output))) continue;
    const float bias = a.bias ? widen(static_cast<const T*>(a.bias)[channel * a.bias_stride]) : 0.f;
    output = narrow<T>(sum_of_taps(
        bias, reinterpret_cast<const T*>(a.source.base + image * a.source.image_bytes) + channel, a.source.row_bytes,
        a.source.pixel_bytes, a.source.height, a.source.width,
        static_cast<const T*>(a.weight) + channel * a.weight_filter, a.weight_row, a.weight_column, a.kernel_h,
        a.kernel_w, [&](int i) { return y - a.padding_h + i; }, [&](int j) { return x - a.padding_w + j; }));
  }
}

// Rows [begin, end) of a part: a slab of channels and a span of columns.
template <typename T, int kRows>
__device__ void march(const Toeplitz& a, uint32_t part, int begin, int end) {
  const int slab = a.by_slabs.split(part) * a.slab, first_column = part * a.tiles * kTile;
  if (a.clear)
    for (int i = threadIdx.x * kUnit; i < a.stage_at; i += blockDim.x * kUnit) shared<uint4>(i) = {};
  for (int i = threadIdx.x * kUnit; i < a.slab * kRows * kBandRowBytes; i += blockDim.x * kUnit)
    shared<uint4>(a.stage_at + i) = {};
  __syncthreads();
  Feed<kRows> feed(a, slab, first_column - a.padding_w, begin, end);
  for (int i = 0; i < kDepth - 1; ++i) feed.load(a);
  load_weights<T, kRows>(a, slab);
  __syncthreads();

  const int lane = threadIdx.x % 32, quad = threadIdx.x / 32, number = lane / 4, pair = lane % 4 * 2;
  const int channel = slab + quad * kChannels;
  const bool live = number < a.tiles * a.streams;
  const int stream = live ? number / a.tiles : 0, tile = live ? number % a.tiles : 0;
  uint32_t band[kChannels][kRows][2];
  float bias[kChannels];
#pragma unroll
  for (int c = 0; c < kChannels; ++c) {
    const int entry = pair - number;  // of the thread's first pair in a row of weights
    const int weights = a.stage_at + (quad * kChannels + c) * kRows * kBandRowBytes + 2 * (kMiddle + entry) +
                        (entry & 1) * kCopy;
#pragma unroll
    for (int i = 0; i < kRows; ++i)
#pragma unroll
      for (int h = 0; h < 2; ++h) band[c][i][h] = shared<uint32_t>(weights + i * kBandRowBytes + 16 * h);
    bias[c] = 0;
    if (a.bias && channel + c < a.channels)
      bias[c] = widen(__ldg(static_cast<const T*>(a.bias) + (channel + c) * a.bias_stride));
  }

  // Where the thread's pixels lie, of which the last two belong to the next tile.
  const int pixels[6] = {0, 1, 8, 9, kTile, kTile + 1};
  const int column = place_of(tile * kTile + pair, a.pitch) + quad * kChannels * 2;
  const int from = stream * a.source.stream_bytes + column, to = a.stage_at + stream * a.target.stream_bytes + column;

  Share out(a, a.target, slab, first_column);
  const auto none = narrow_pair(0.f, 0.f, T{});
  auto zero = none;
  int slot = 0, stage = 0;  // of the next source row in the ring, and of the outputs to come
  for (int at = begin; at < end;) {
    const Run r = run_of<kRows>(a, at, end);
    at += r.end - r.begin;
    out.seek(a, a.target, r.group, r.begin);
    float sum[kRows][kChannels][4] = {};  // of the output rows under way, the oldest first
    // In the step for a source row, output row y is the oldest.
    for (int row = r.row, y = row + a.padding_h - (kRows - 1); y < r.end; ++row, ++y) {
      const bool inside = row < a.source.height;
      if (inside) wait_copies<kDepth - 2>();
      __syncthreads();
      if (inside) feed.load(a);
      if (y > r.begin) out.store(a, a.target, a.stage_at + (a.stage_bytes - stage));
      uint2 x[6] = {};
      if (inside) {
#pragma unroll
        for (int j = 0; j < 6; ++j) x[j] = shared<uint2>(from + slot + place_of(pixels[j], a.pitch));
        slot += a.slot_bytes;
        if (slot == kDepth * a.slot_bytes) slot = 0;
      }
#pragma unroll
      for (int c = 0; c < kChannels; ++c) {
        uint32_t pairs[3];  // of pixels, 8 columns apart
#pragma unroll
        for (int j = 0; j < 3; ++j)
          pairs[j] = __byte_perm(c < 2 ? x[2 * j].x : x[2 * j].y, c < 2 ? x[2 * j + 1].x : x[2 * j + 1].y,
                                 c % 2 == 0 ? 0x5410 : 0x7632);
        const float nothing[4] = {};
#pragma unroll
        for (int o = 0; o < kRows; ++o)
          multiply(sum[o][c], o + 1 < kRows ? std::as_const(sum[o + 1][c]) : nothing,
                   {pairs[0], pairs[1], pairs[1], pairs[2]},
                   {band[c][kRows - 1 - o][0], band[c][kRows - 1 - o][1]}, T{});
      }
      if (y < r.begin) continue;
#pragma unroll
      for (int v = 0; v < 4; ++v) {
        const auto low = narrow_pair(sum[0][0][v] + bias[0], sum[0][1][v] + bias[1], T{});
        const auto high = narrow_pair(sum[0][2][v] + bias[2], sum[0][3][v] + bias[3], T{});
#if __CUDA_ARCH__ >= 800
        zero = __hfma2(low, none, zero), zero = __hfma2(high, none, zero);
#endif
        if (live)
          shared<uint2>(to + stage + place_of(pixels[v], a.pitch)) = {reinterpret_cast<const uint32_t&>(low),
                                                                      reinterpret_cast<const uint32_t&>(high)};
      }
      stage = a.stage_bytes - stage;
    }
    __syncthreads();
    out.store(a, a.target, a.stage_at + (a.stage_bytes - stage));
  }
  __syncthreads();  // the next part's zeros, and the outputs that are read now, come behind
  if (live && !(__low2float(zero) == 0 && __high2float(zero) == 0))  // NaN: an output is not finite
    for (int v = 0; v < 4; ++v)
      for (int c = 0; c < kChannels; ++c)
        if (const int x = first_column + tile * kTile + pair + pixels[v];
            x < a.target.width && channel + c < a.channels)
          column_by_taps<T>(a, begin, end, stream, channel + c, x);
}

// Blocks share the rows of all parts evenly: one may have the end of a part and the beginning of the next.
template <typename T, int kRows>
__global__ void __launch_bounds__(32 * kMaxQuads<kRows>, 1)
    toeplitz_channels_last(const __grid_constant__ Toeplitz a) {
  const int64_t all = int64_t{a.rows} * a.parts, last = all * (blockIdx.x + 1) / gridDim.x;
  for (int64_t first = all * blockIdx.x / gridDim.x; first < last;) {
    const int part = static_cast<int>(first / a.rows), begin = static_cast<int>(first - int64_t{part} * a.rows);
    const int end = static_cast<int>(min(int64_t{a.rows}, begin + last - first));
    march<T, kRows>(a, part, begin, end);
    first += end - begin;
  }
}

Rows rows_of(const View& view, int64_t batch, int64_t channels, int64_t height, int64_t width) {
  Rows r{};
  r.base = static_cast<char*>(view.data);
  r.image_bytes = view.stride[0] * 2, r.row_bytes = view.stride[2] * 2;
  r.pixel_bytes = static_cast<int>((width == 1 ? channels : view.stride[3]) * 2), r.bytes = static_cast<int>(channels * 2);
  r.height = static_cast<int>(height), r.width = static_cast<int>(width);
  r.unit = alignment_of(view, 2, channels, height, width, batch);
  return r;
}

// Fills in what a block has of an array, whose threads are as many as 4 times the bytes of a slab.
void cut_rows(Rows& r, const Toeplitz& a, int columns) {
  r.columns = columns;
  // From one image to the next as from one tile to the next.
  const int64_t bytes = round_up(place_of(columns, a.pitch), kUnit), apart = a.tiles * kUnit % 128;
  r.stream_bytes = static_cast<int>(bytes + (apart - bytes % 128 + 128) % 128);
  r.together = std::max(4 * r.unit / a.streams, 1), r.step = r.together * r.pixel_bytes;
  r.by_units = Divider(2 * a.slab / r.unit), r.by_together = Divider(r.together);
}

// Cuts a problem into slabs of as many channels as shared memory allows. Returns the bytes of it that a block needs.
int cut(Toeplitz& a, int kernel_rows, int quads, int64_t room) {
  const int64_t all = ceil_div(a.channels, kChannels);
  const int64_t tiles = ceil_div(a.target.width, kTile), spans = ceil_div(tiles, kTiles);
  a.tiles = static_cast<int>(ceil_div(tiles, spans)), a.streams = std::min(kTiles / a.tiles, a.batch);
  const int64_t groups = ceil_div(a.batch, a.streams);
  a.rows = static_cast<int>(groups * a.target.height);
  for (;; quads -= 4) {
    // Slabs begin at a multiple of a sector of 32 bytes.
    const int64_t slabs = ceil_div(all, quads), even = slabs == 1 ? all : round_up(ceil_div(all, slabs), 4);
    a.slab = static_cast<int>(even * kChannels);
    a.pitch = static_cast<int>(round_up(2 * a.slab, kUnit)) | kUnit;
    cut_rows(a.source, a, a.tiles * kTile + kReach);
    cut_rows(a.target, a, a.tiles * kTile);
    a.slot_bytes = a.streams * a.source.stream_bytes, a.stage_bytes = a.streams * a.target.stream_bytes;
    a.stage_at = kDepth * a.slot_bytes;
    a.by_slabs = Divider(ceil_div(all, even));
    a.parts = static_cast<int>(a.by_slabs.divisor * spans);
    const int bytes = a.stage_at + std::max(2 * a.stage_bytes, a.slab * kernel_rows * kBandRowBytes);
    if (bytes <= room) return bytes;
    if (quads <= 4) throw std::runtime_error("dwconv: rows of this size do not fit the GPU's shared memory");
  }
}

template <typename T, int kRows>
void launch(Toeplitz a, cudaStream_t stream) {
  const Device& device = current_device();
  const auto kernel = toeplitz_channels_last<T, kRows>;
  const int bytes = cut(a, kRows, kMaxQuads<kRows>, device.shared_per_block), threads = a.slab / kChannels * 32;
  a.clear = a.batch % a.streams != 0 || a.channels % a.slab != 0 || a.padding_w > 0 ||
            int64_t{a.source.width} < ceil_div(a.target.width, a.tiles * kTile) * a.tiles * kTile + kReach;
  static thread_local Decisions<3, int> decisions;  // blocks on a multiprocessor
  const int resident = decisions({device.id, threads, bytes}, [&] {
    int blocks = 0;
    cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, device.shared_per_block);
    cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, threads, bytes);
    return std::max(blocks, 1);
  });
  // Either every part has blocks of its own, or the last rows of one and the first ones of the next share a block,
  // which begins anew then.
  constexpr int kAnew = 8;  // rows that could be computed meanwhile
  const int64_t slots = int64_t{resident} * device.multiprocessors, all = int64_t{a.rows} * a.parts;
  const int64_t workers = std::min<int64_t>(std::max<int64_t>(slots / a.parts, 1), a.rows);
  const int64_t apart = ceil_div(a.parts * workers, slots) * ceil_div(a.rows, workers);
  const bool joined = ceil_div(all, slots) + kAnew < apart;
  const int64_t blocks = joined ? slots : a.parts * workers;
  kernel<<<static_cast<unsigned>(blocks), threads, bytes, stream>>>(a);
  check_launch("toeplitz_channels_last");
}

}  // namespace

void launch_toeplitz_channels_last(const Problem& p, cudaStream_t stream) {
  const Mapping map(p);
  Toeplitz a{};
  a.batch = static_cast<int>(p.batch), a.channels = map.sources;
  a.source = rows_of(map.source, p.batch, map.sources, map.height, map.width);
  a.target = rows_of(map.target, p.batch, map.targets, map.out_height, map.out_width);
  a.padding_h = map.padding_h, a.padding_w = map.padding_w;
  a.weight = map.weight.data, a.weight_filter = map.weight.stride[0];
  a.weight_row = map.weight.stride[2], a.weight_column = map.weight.stride[3];
  a.bias = map.bias, a.bias_stride = map.bias_stride;
  a.kernel_h = static_cast<int>(p.kernel_h), a.kernel_w = static_cast<int>(p.kernel_w);
  a.by_height = Divider(map.out_height), a.by_kernel_w = Divider(p.kernel_w), a.by_taps = Divider(p.taps());
  visit_dtype(p.dtype, [&](auto zero) {
    using T = decltype(zero);
    if constexpr (sizeof(T) == 2) {
      if (p.kernel_h <= 5)
        launch<T, 5>(a, stream);
      else
        launch<T, 7>(a, stream);
    }
  });
}

}  // namespace dwconv
