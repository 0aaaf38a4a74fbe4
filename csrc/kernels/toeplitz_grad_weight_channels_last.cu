// grad_weight (and the bias gradient) of small kernels at stride 1 in 16 bits on channels_last arrays, on tensor cores.
//
// For a channel and row i of the kernel, with columns of the input down and columns of the gradient across, a product
// A[m][k] B[k][n] sums input[y + i][x + m] gradient[y][x + n] over 16 places k, each an image, a row y and 8 columns
// from x on; the sums for column j of the kernel are on the diagonal m - n = j. No transposition is needed: a thread
// reads 4 channels of a pixel at once, and a byte permutation of the pixels of two places makes a pair (k, k + 1) of
// each channel. Two tiles of 16 columns are such a pair, and a multiplication takes 8 tiles: of one row, or of rows of
// several images. Narrow images have 8 columns of a tile each.
//
// Rows march through a ring in shared memory: a stage takes one row of the input and one of the gradient for each of a
// block's streams, which are at different places of the images. The rows of the gradient whose windows are under way
// stay in registers. A stream goes down one image after the other, with rows of zeros between them that serve as the
// padding of both, so that nothing has to ask where it is when it multiplies; the rows of all images are cut into
// streams anywhere. All warps load and multiply. They wait for each other at the stages' barriers, a step or two late,
// so that one can multiply while another reads. The sums of all blocks are added up by a second kernel. Every sum has a
// fixed order, the same on every run.
//
// What is not part of a sum is multiplied by zero, which is exact unless the other factor is Inf or NaN. So sums that
// are finite are right, and the others are taken again, product by product: toeplitz_grad_weight_sums.cuh.
//
// Arrays that begin between multiples of 16 bytes, both as far behind one, are loaded by whole units all the same:
// those of a pixel begin with channels of the one before (Toeplitz::carried). In a row of the ring, their columns are
// counted from 1 on, so it ends with the unit behind the row. What its first pixel carries, and what that unit has but
// carried channels, is of other rows, and cleared when it is read.
//
// Small images, which are multiplied whole, and rows that come as boxes have kernels of their own:
// toeplitz_grad_weight_images.cu, toeplitz_grad_weight_rows.cu.
#include "realign.h"
#include "toeplitz_grad_weight_sums.cuh"

namespace dwconv {
namespace {

__host__ __device__ constexpr int place_of(int pixel) {
  return pixel * kPixelBytes + pixel / kRun * (kRunBytes - kRun * kPixelBytes);
}

// What a kernel is compiled for: rows of the kernel, or more; whether both halves of a tile are of one row, or of
// different streams; bytes that are copied at once; blocks on a multiprocessor, as registers allow; whether pixels
// carry channels, which they do where halves are of one row, and how many masks then say what is of other rows: one, if
// a thread's two tiles are at the same columns, or two.
template <int rows, bool wide, int bytes, int blocks, int carries = 0>
struct Size {
  static constexpr int kRows = rows, kBytes = bytes, kBlocks = blocks, kTileMasks = carries;
  static constexpr bool kWide = wide, kCarries = carries > 0;
  static_assert(!kCarries || wide);
  static constexpr int kSourceRuns = wide ? 3 : 4;  // of 8 columns that a thread reads, of both halves of a tile
};

// Begins to copy bytes, or writes zeros, if there is nothing to `copy`.
template <int kBytes>
__device__ void copy_or_clear(uint32_t to, const char* from, uint32_t copy) {
  static_assert(kBytes == 2 || kBytes == kUnit);
  if constexpr (kBytes == 2) {
    const uint16_t value = copy ? __ldg(reinterpret_cast<const uint16_t*>(from)) : uint16_t{0};
    asm volatile("st.shared.b16 [%0], %1;" ::"r"(to), "h"(value));  // loads may go before
  } else {
#if __CUDA_ARCH__ >= 800
    asm volatile(
        "{\n.reg .pred clear;\nsetp.eq.s32 clear, %2, 0;\n"
        "cp.async.cg.shared.global.L2::128B [%0], [%1], 16, clear;\n}" ::"r"(to),
        "l"(from), "r"(copy)
        : "memory");
#endif
  }
}

// A thread's part in loading the streams of a block: 16 bytes of a few pixels of one of them, row by row. It writes
// zeros for what is outside of the image.
template <class Size>
class StreamLoader {
 public:
  __device__ StreamLoader(const Toeplitz& a, int slab, int split) {
    const int unit = threadIdx.x % kUnits, place = threadIdx.x % 32 / kUnits, warp = threadIdx.x / 32;
    const int stream = Size::kWide ? place >> a.tile_shift : place + warp % 2 * kTiles;
    pixel_ = Size::kWide ? warp * a.tiles() + (place & (a.tiles() - 1)) : warp / 2;
    byte_ = slab * kSlab * 2 + unit * kUnit;
    const int to = shared_address(kRing) + place_of(pixel_) + unit * kUnit;
    source_to_ = kept(to + stream * a.source.ring_bytes());
    grad_to_ = kept(to + a.grad_at + stream * a.grad.ring_bytes());
    third_ = kept(pixel_ < kRun);
    to_step_ = kRunBytes << a.tile_shift;
    source_step_ = step(a) * a.source.pixel_bytes, grad_step_ = step(a) * a.grad.pixel_bytes;
    if (Size::kRows < 9) {  // there are registers
      to_step_ = kept_by_all(to_step_);
      source_step_ = kept_by_all(source_step_), grad_step_ = kept_by_all(grad_step_);
    }

    const int number = split * a.streams + stream, first = a.shares.begin(number);
    left_ = byte_ < a.channels * 2 ? a.shares.begin(number + 1) - first : 0;
    ends_ = left_ == 0;
    uint32_t rest = first;
    row_ = a.by_period.split(rest);
    image_ = a.by_groups.split(rest);
    span_ = rest;
    seek(a);
  }

  // Begins to load the next row of each stream to a stage, and arrives at its barrier when that is there.
  __device__ void load(const Toeplitz& a, int stage, uint32_t barrier) {
    const uint32_t to = stage * a.stage_bytes;
    load_row<kSourcePixels>(a, source_, source_step_, row_ >= a.padding_h && !ends_ ? source_inside_ : 0,
                            to + source_to_);
    load_row<kGradPixels>(a, grad_, grad_step_, row_ < a.out_height && left_ > 0 ? grad_inside_ : 0, to + grad_to_);
    if (Size::kBytes == kUnit)
      arrive_after_copies_at(barrier);
    else
      arrive_at(barrier);
    source_ += a.source.row_bytes, grad_ += a.grad.row_bytes;
    --left_;
    if (++row_ < a.period) return;
    row_ = 0, ends_ |= left_ <= 0;
    source_ += a.source.turn_bytes, grad_ += a.grad.turn_bytes;
    if (++image_ < a.groups) return;
    image_ = 0, ++span_;
    seek(a);
  }

 private:
  static constexpr int kSourcePixels = Size::kWide ? 3 : 4, kGradPixels = 2;  // of a row

  int pixel_, byte_;              // the first one, and what of it
  uint32_t source_to_, grad_to_;  // where that goes in the first stage
  uint32_t to_step_;              // from one pixel to the next
  int source_step_, grad_step_;
  int third_;  // whether there is a third one: 8 pixels of the input are beyond the columns of the span
  int row_, image_, span_;
  int left_;                    // rows of the gradient
  bool ends_;                   // no row of the input has any of them to meet
  const char *source_, *grad_;  // the first pixel
  // A bit for each of the thread's pixels that is in the image, or behind a row, if its unit carries channels of that.
  uint32_t source_inside_, grad_inside_;

  __device__ void seek(const Toeplitz& a) {
    const auto seek = [&](const Rows& v, int row, const char*& from, uint32_t& inside) {
      const int column = span_ * a.columns - v.shift + pixel_;
      from = v.units + image_ * v.image_bytes + row * v.row_bytes + int64_t{column} * v.pixel_bytes + byte_;
      inside = 0;
      const int end = v.width + (Size::kCarries && byte_ == 0);
      for (int k = 0; k < kSourcePixels; ++k)
        inside |= (static_cast<uint32_t>(column + k * step(a)) < static_cast<uint32_t>(end)) << k;
    };
    seek(a.source, row_ - a.padding_h, source_, source_inside_), seek(a.grad, row_, grad_, grad_inside_);
  }

  // From one of a thread's pixels to the next.
  static __device__ int step(const Toeplitz& a) { return Size::kWide ? kRun << a.tile_shift : kRun / 2; }

  template <int kPixels>
  __device__ void load_row(const Toeplitz& a, const char* from, int step, uint32_t inside, uint32_t to) const {
#pragma unroll
    for (int k = 0; k < kPixels; ++k) {
      if (Size::kWide && k == 2 && !third_) break;
      const uint32_t target = to + (Size::kWide ? k * to_step_ : place_of(k * kRun / 2));
#pragma unroll
      for (int part = 0; part < kUnit; part += Size::kBytes) {
        const uint32_t copy = Size::kBytes == kUnit || byte_ + part < a.channels * 2 ? inside & 1 << k : 0;
        copy_or_clear<Size::kBytes>(target + part, from + part, copy);
      }
      from += step;
    }
  }
};

// Where units carry channels: what of a thread's pixels is of their own row, as masks. The first pixel of a row carries
// what is of another one, and in the unit behind a row nothing else is of it. `kMasks`: one for each of a thread's two
// tiles, or for both, if they are at the same columns.
template <int kMasks>
class OwnRow {
 public:
  static constexpr int kSourceRuns = 3, kGradRuns = 2;

  // Finds them for a step, and returns the step that they hold until.
  __device__ int seek(const Toeplitz& a, int slab, int split, int step) {
    const int lane = threadIdx.x % 32, span_steps = a.groups * a.period;
    const int at = a.shares.begin(split) + step;  // of the only stream, if there are several spans
    const int span = a.spans > 1 ? at / span_steps : 0;
    const bool carries = slab == 0 && first_channel<Usual>() < kUnit / 2;  // in the unit that does
    const uint2 carried = carried_at(a, first_channel<Usual>());
    const auto find = [&](const Rows& v, auto& of) {
#pragma unroll
      for (int h = 0; h < kMasks; ++h)
#pragma unroll
        for (int k = 0; k < static_cast<int>(std::extent_v<std::remove_reference_t<decltype(of)>>); ++k) {
          const int tile = (lane % 4 + 4 * h) & (a.tiles() - 1);
          const int column = span * a.columns + tile * kTileColumns + k * kRun + lane / 4 - v.shift;
          const bool first = carries && column == 0, last = carries && column == v.width;
          const auto own = [&](uint32_t carried) { return kept(first ? ~carried : last ? carried : ~0u); };
          of[k][h] = {own(carried.x), own(carried.y)};
        }
    };
    find(a.source, source_), find(a.grad, grad_);
    return a.spans > 1 ? min(a.steps, step + span_steps - at % span_steps) : a.steps;
  }

  // Makes zeros of what is of other rows.
  __device__ void clear_others(uint2 (&source)[kSourceRuns][2], uint2 (&grad)[kGradRuns][2]) const {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
#pragma unroll
      for (int k = 0; k < kSourceRuns; ++k) keep_own(source[k][h], source_[k][h % kMasks]);
#pragma unroll
      for (int k = 0; k < kGradRuns; ++k) keep_own(grad[k][h], grad_[k][h % kMasks]);
    }
  }

 private:
  uint2 source_[kSourceRuns][kMasks], grad_[kGradRuns][kMasks];
};

template <typename T, class Size>
__global__ void __launch_bounds__(kThreads, Size::kBlocks)
    toeplitz_grad_weight_channels_last(const __grid_constant__ Toeplitz a) {
  constexpr int kRows = Size::kRows;
  let_next_kernel_start();
  uint32_t rest = blockIdx.x;
  const int slab = a.by_slabs.split(rest), split = static_cast<int>(rest);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  if (threadIdx.x < kMaxStages)
    init_barrier(StageBarriers::full(threadIdx.x), kThreads),
        init_barrier(StageBarriers::done(threadIdx.x), kWarps * kWarpArrivals);
  StreamLoader<Size> loader(a, slab, split);
  __syncthreads();
  settle_and_wait_for_kernel_before(a.depth);
  const StageAddresses barriers{kept(shared_address(0))};
#pragma unroll 1
  for (int step = 0; step < min(a.ahead, a.steps); ++step) loader.load(a, step, barriers.full(step));

  // Sums of rows m and m + 8 by columns n and n + 1, where m = lane / 4 and n = lane % 4 * 2.
  float sum[kQuad][kRows][4] = {}, bias[4] = {};
  uint32_t g[kRows][kQuad][2] = {};
  [[maybe_unused]] OwnRow<std::max(Size::kTileMasks, 1)> own;
  // The thread's pixels: of tiles lane % 4 and lane % 4 + 4.
  uint32_t source_at[2], grad_at[2];
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int tile = lane % 4 + 4 * h, stream = tile >> a.tile_shift, group = tile & (a.tiles() - 1);
    const uint32_t at = shared_address(kRing) + group * 2 * kRunBytes + lane / 4 * kPixelBytes + warp * kQuad * 2;
    source_at[h] = kept(stream * a.source.ring_bytes() + at);
    grad_at[h] = kept(a.grad_at + stream * a.grad.ring_bytes() + at);
  }
  int stage = 0, free_stage = a.ahead;
  uint32_t parity = 0, free_parity = 1;
  for (int step = 0, end = Size::kCarries ? 0 : a.steps; step < a.steps;) {
    if constexpr (Size::kCarries)
      if (step == end) {  // windows under way meet rows of zeros alone
        end = own.seek(a, slab, split, step);
#pragma unroll
        for (int r = 0; r < kRows; ++r)
#pragma unroll
          for (int c = 0; c < kQuad; ++c) g[r][c][0] = g[r][c][1] = 0;
      }
#pragma unroll
    for (int u = 0; u < kRows; ++u) {  // the row of the gradient that came `age` steps before is g[(u - age) mod kRows]
      if (step == end) break;
      wait_at(barriers.full(stage), parity);
      const uint32_t at = stage * a.stage_bytes;
      uint2 grad[2][2], source[Size::kSourceRuns][2];
#pragma unroll
      for (int h = 0; h < 2; ++h) {
#pragma unroll
        for (int k = 0; k < 2; ++k)
          grad[k][h] = load_at(grad_at[h] + at + k * (Size::kWide ? kRunBytes : kTiles * a.grad.ring_bytes()));
#pragma unroll
        for (int k = 0; k < Size::kSourceRuns; ++k)
          source[k][h] = load_at(source_at[h] + at + (Size::kWide ? k : k % 2) * kRunBytes +
                                 (Size::kWide ? 0 : k / 2 * kTiles * a.source.ring_bytes()));
      }
      if constexpr (Size::kCarries) own.clear_others(source, grad);
      uint32_t x[kQuad][4];  // of a half of the tiles, and of the 8 columns behind
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        uint32_t pair[kQuad];
        pair_up(grad[half][0], grad[half][1], pair);
#pragma unroll
        for (int c = 0; c < kQuad; ++c) g[u][c][half] = pair[c];
#pragma unroll
        for (int behind = 0; behind < 2; ++behind) {
          const uint2(&of)[2] = source[Size::kWide ? half + behind : 2 * half + behind];
          if (Size::kWide && half == 1 && behind == 0)
            pair_up_again(of[0], of[1], pair);
          else
            pair_up(of[0], of[1], pair);
#pragma unroll
          for (int c = 0; c < kQuad; ++c) x[c][2 * half + behind] = pair[c];
        }
      }
      arrive_together_at(barriers.done(stage), lane == 0);
      if (step + a.ahead < a.steps) {
        wait_at(barriers.done(free_stage), free_parity);
        loader.load(a, free_stage, barriers.full(free_stage));
        if (++free_stage == a.depth) free_stage = 0, free_parity ^= 1;
      }
      if (++stage == a.depth) stage = 0, parity ^= 1;
      ++step;
#pragma unroll
      for (int c = 0; c < kQuad; ++c)
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
          float (&to)[4] = sum[c][i];
          multiply(to, to, x[c], g[(u - i + kRows) % kRows][c], T{});
        }
      if (a.with_bias)  // channel c in row c
#pragma unroll
        for (int c = 0; c < kQuad; ++c) {
          const uint32_t one = lane / 4 == c ? ones(T{}) : 0;
          multiply(bias, bias, {one, 0, one, 0}, g[u][c], T{});
        }
    }
  }
  __syncthreads();
  store_diagonals(a, sum);
  store_bias(a, bias);
  store_sums<T>(a, slab, split);
}

// How the work is cut.
struct Cut {
  int tile_shift, depth, splits;
  int64_t shared_bytes;
};

// Fills in what follows from a cut.
template <class Size>
void apply(Toeplitz& a, Cut& cut) {
  a.tile_shift = cut.tile_shift, a.depth = cut.depth, a.splits = cut.splits;
  a.ahead = a.depth > 3 ? a.depth - 2 : 2;
  a.streams = Size::kWide ? kTiles >> a.tile_shift : 2 * kTiles;
  a.columns = Size::kWide ? kTileColumns << a.tile_shift : kRun;
  a.grad.runs = a.columns / kRun, a.source.runs = a.grad.runs + 1;
  a.spans = static_cast<int>(ceil_div(a.counted_columns(), a.columns));
  a.rows = a.spans * a.groups * a.period;
  const int64_t streams = int64_t{a.splits} * a.streams;  // of all blocks
  a.shares = Shares(a.rows, streams);
  a.steps = static_cast<int>(ceil_div(a.rows, streams)) + a.behind;
  a.grad_at = a.streams * a.source.ring_bytes();
  a.stage_bytes = a.grad_at + a.streams * a.grad.ring_bytes();
  cut.shared_bytes = kRing + std::max(int64_t{cut.depth} * a.stage_bytes,
                                      int64_t{block_sums(a.kernel_h * a.kernel_w) + kWarps} * int64_t{sizeof(float)});
}

// Whether one span has all columns, and so few tiles that a thread's two are of different streams, at the same columns.
bool are_tiles_alike(const Toeplitz& a) {
  return a.counted_columns() <= kTiles / 2 * kTileColumns;
}

template <class Size>
Cut cut_for(Toeplitz a, const Device& device) {
  Cut cut{0, 3, 1, 0};
  // Few columns beyond the last one, and few that two spans load.
  int64_t least = INT64_MAX;
  for (int shift = 0; Size::kWide && shift <= 3; ++shift) {
    const int columns = kTileColumns << shift;
    // Where pixels carry channels, and there are several spans, a block has one stream, and so one of them at a time.
    if (a.carried > 0 && (are_tiles_alike(a) ? a.counted_columns() > columns || shift == 3 : shift < 3)) continue;
    const int64_t loaded = ceil_div(a.counted_columns(), columns) * (columns + 24);
    if (loaded < least) least = loaded, cut.tile_shift = shift;
  }
  apply<Size>(a, cut);
  const int64_t room =
      std::min<int64_t>(device.shared_per_block, device.shared_per_multiprocessor / Size::kBlocks - 1024);
  for (const int depth : {3, 4, 6, 8})
    if (kRing + int64_t{depth} * a.stage_bytes <= room) cut.depth = depth;
  cut.splits = splits_of(a, ceil_div(a.rows, a.streams), int64_t{Size::kBlocks} * device.multiprocessors);
  apply<Size>(a, cut);
  return cut;
}

template <typename T, class Size>
void launch(const Problem& p, Toeplitz a, const Allocate& allocate, cudaStream_t stream) {
  const Device& device = current_device();
  const auto kernel = toeplitz_grad_weight_channels_last<T, Size>;
  static thread_local Decisions<10, Cut> decisions;
  const auto decide = [&] {
    cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, device.shared_per_block);
    return cut_for<Size>(a, device);
  };
  Cut cut = decisions({device.id, a.images, a.channels, a.height, a.source.width, a.padding_h, a.padding_w, a.kernel_h,
                       a.kernel_w, a.carried > 0},
                      decide);
  apply<Size>(a, cut);
  a.partial = allocate_partial(a, allocate);
  launch_early(kernel, a, int64_t{a.slabs} * a.splits, kThreads, stream, {.shared_bytes = cut.shared_bytes});
  check_launch("toeplitz_grad_weight_channels_last");
  launch_add_partial_sums(p, a.partial, a.splits, stream);
}

}  // namespace

void launch_toeplitz_grad_weight_channels_last(const Problem& problem, const Allocate& allocate, cudaStream_t stream) {
  // Where small images cannot be taken as they lie, they are copied first to where 16 bytes begin, as are arrays of
  // which pixels do not carry the same channels.
  if (launch_toeplitz_grad_weight_images(problem, allocate, stream)) return;
  const bool as_they_lie = carried_channels(problem) > 0 && problem.out_width >= kRun;
  const Problem p = as_they_lie ? problem : realigned(problem, allocate, stream);
  if (launch_toeplitz_grad_weight_images(p, allocate, stream) || launch_toeplitz_grad_weight_rows(p, allocate, stream))
    return;
  int64_t bytes = 0;
  const Toeplitz a = toeplitz_of(p, bytes);
  visit_dtype(p.dtype, [&](auto zero) {
    using T = decltype(zero);
    const auto launch_rows = [&](auto rows, auto blocks) {
      if (bytes % kUnit != 0) return launch<T, Size<rows, true, 2, blocks>>(p, a, allocate, stream);
      if (a.carried > 0) {
        constexpr int kMostRows = 7;  // that leave registers
        if constexpr (decltype(rows)::value > kMostRows)
          if (are_tiles_alike(a)) return launch<T, Size<rows, true, kUnit, blocks, 1>>(p, a, allocate, stream);
        return launch<T, Size<rows, true, kUnit, blocks, 2>>(p, a, allocate, stream);
      }
      if (p.out_width <= kRun) return launch<T, Size<rows, false, kUnit, blocks>>(p, a, allocate, stream);
      launch<T, Size<rows, true, kUnit, blocks>>(p, a, allocate, stream);
    };
    using std::integral_constant;
    if constexpr (sizeof(T) == 2) {
      if (a.kernel_h <= 3) return launch_rows(integral_constant<int, 3>{}, integral_constant<int, 2>{});
      if (a.kernel_h <= 5) return launch_rows(integral_constant<int, 5>{}, integral_constant<int, 1>{});
      if (a.kernel_h <= 7) return launch_rows(integral_constant<int, 7>{}, integral_constant<int, 1>{});
      launch_rows(integral_constant<int, 9>{}, integral_constant<int, 1>{});
    }
  });
}

}  // namespace dwconv
