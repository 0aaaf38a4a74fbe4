// grad_weight (and the bias gradient) of images of 9 to 32 columns, whose rows come as boxes, from sm_90 on: the same
// multiplications as in toeplitz_grad_weight_channels_last.cu.
//
// A block goes down the rows of a few images side by side, as many as fill 8 tiles, one group of images after the
// other. A step brings a row of the input and the row of the gradient that meets it with the first row of its window. A
// box has the columns of the images and none beside them: what a thread would read there are zeros that lie behind the
// boxes of a stage. All tiles are at the same row, so a row that no image has is not loaded, nor multiplied. Warps take
// turns to begin to copy boxes. These take time by the pixel, not by the byte: for few rows of the kernel, which leave
// registers, a block has 64 channels, 128 bytes of a pixel, instead of 32; for some more, all threads copy the rows of
// the gradient instead.
//
// Boxes are swizzled: within the bytes of a pixel, units are exchanged by the pixel.
#include "boxes.cuh"
#include "toeplitz_grad_weight_sums.cuh"

namespace dwconv {
namespace {

// Where the ring begins in shared memory, and what boxes begin at a multiple of: units are exchanged in as many bytes.
template <class B>
constexpr int kFirst = 8 * B::kPixel;
constexpr int kBehind = 2;  // steps that warps may be apart

template <bool kCarries>
struct RowBoxes {
  CUtensorMap source, grad;
  std::array<CUtensorMap, kCarries ? 2 : 0> carried;  // of the units behind rows, likewise
  int source_bytes, grad_bytes;                       // of a box
  int zeros_at, carried_at;  // where in a stage the zeros are, and the units behind rows, if there are any
  Toeplitz images;
};

// Where a unit of a pixel lies in a box.
template <class B>
__host__ __device__ constexpr int place_of(int pixel, int unit) {
  return pixel * B::kPixel + (unit ^ pixel * B::kPixel / 128 % B::kUnits) * kUnit;
}

#if __CUDA_ARCH__ >= 900
// A thread's part in loading rows of the gradient: 16 bytes of at most two pixels.
class GradLoader {
 public:
  __device__ GradLoader(const Toeplitz& a, int slab, uint32_t group, int row) : row_(row) {
    const int unit = threadIdx.x % kUnits, byte = slab * Usual::kPixel + unit * kUnit;
    int64_t places[2];
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      const int pixel = threadIdx.x / kUnits + k * (kThreads / kUnits);
      image_[k] = pixel / a.grad.width;
      any_[k] = image_[k] < a.together;
      to_[k] = kept(shared_address(kFirst<Usual>) + a.grad_at + place_of<Usual>(pixel, unit));
      places[k] = image_[k] * a.grad.image_bytes + int64_t{pixel % a.grad.width} * a.grad.pixel_bytes;
      image_[k] = byte < a.channels * 2 ? image_[k] + static_cast<int>(group) * a.together : a.images;
    }
    second_ = places[1] - places[0];
    const int64_t images = int64_t{group} * a.together;
    from_ = a.grad.units + (images * a.grad.image_bytes + row * a.grad.row_bytes + places[0] + byte);
  }

  // Begins to load the next row to a stage, if it is one of the split, and arrives when it is there.
  __device__ void load(const Toeplitz& a, uint32_t stage, bool in_split, uint32_t barrier) {
    const bool any = in_split && row_ < a.out_height;
    copy_or_clear_if(any && any_[0], to_[0] + stage, from_, image_[0] < a.images);
    copy_or_clear_if(any && any_[1], to_[1] + stage, from_ + second_, image_[1] < a.images);
    arrive_after_copies_at(barrier);
    from_ += a.grad.row_bytes;
    if (++row_ < a.period) return;
    row_ = 0, from_ += a.grad.turn_bytes;
    image_[0] += a.together, image_[1] += a.together;
  }

 private:
  const char* from_;
  int64_t second_;  // bytes from the first pixel to the second one
  uint32_t to_[2];
  int image_[2], row_;
  bool any_[2];
};
#endif

template <typename T, class B, int kRows, bool kBoth, bool kCarries>
__global__ void __launch_bounds__(B::kThreads, 1)
    toeplitz_grad_weight_rows(const __grid_constant__ RowBoxes<kCarries> boxes) {
#if __CUDA_ARCH__ >= 900
  static_assert(kBoth || std::is_same_v<B, Usual>);
  const Toeplitz& a = boxes.images;
  let_next_kernel_start();
  uint32_t rest = blockIdx.x;
  const int slab = a.by_slabs.split(rest), split = static_cast<int>(rest);
  const uint32_t warp = threadIdx.x / 32;
  const int lane = threadIdx.x % 32, column = lane / 4, place = lane % 4;
  StageBarriers::init(kBoth ? 1 : 1 + B::kThreads, B::kWarps, true);
  if (threadIdx.x == 0) prefetch(boxes.source), prefetch(boxes.grad);
  for (int i = threadIdx.x; i < a.depth * B::kUnits; i += B::kThreads)
    shared<uint4>(kFirst<B> + i / B::kUnits * a.stage_bytes + boxes.zeros_at + i % B::kUnits * kUnit) = {};
  before_bulk_copies();
  // Rows of the gradient, counted through all groups; steps go on for the windows that are under way behind the last.
  const uint32_t first = a.shares.begin(split);
  const int rows = a.shares.begin(split + 1) - static_cast<int>(first);
  uint32_t group = first, last = first + rows - 1;
  int row = a.by_period.split(group);
  const int steps = rows + min(a.behind, a.period - 1 - static_cast<int>(a.by_period.split(last)));
  __syncthreads();
  const auto has_grad = [&](int row, int step) { return row < a.out_height && step < rows; };
  const auto has_source = [&](int row) {
    return static_cast<uint32_t>(row - a.padding_h) < static_cast<uint32_t>(a.height);
  };
  // Of carried channels, the last pixel of a row is in the unit behind it, and what the first one carries is of others.
  const bool carries_some = kCarries && slab == 0, carries = carries_some && first_channel<B>() < a.carried;
  GradLoader grad_loader(a, slab, group, row);
  const StageAddresses barriers{kept(shared_address(0))};
  // By all threads: if it is `mine`, one of the warp begins to copy boxes.
  const auto load = [&](int step, int stage, bool mine) {
    if (mine && is_elected()) {
      const int to = kFirst<B> + stage * a.stage_bytes, barrier = StageBarriers::full(stage);
      uint32_t group = first + step;
      const int row = a.by_period.split(group), image = static_cast<int>(group) * a.together;
      if (has_source(row)) {
        expect_bytes(barrier, boxes.source_bytes);
        copy_box(to, boxes.source, slab * B::kSlab, 0, row - a.padding_h, image, barrier);
        if constexpr (kCarries)
          if (carries_some) {
            expect_bytes(barrier, a.together * kUnit);
            copy_box(to + boxes.carried_at, boxes.carried[0], 0, 0, row - a.padding_h, image, barrier);
          }
      }
      if (kBoth && has_grad(row, step)) {
        expect_bytes(barrier, boxes.grad_bytes);
        copy_box(to + a.grad_at, boxes.grad, slab * B::kSlab, 0, row, image, barrier);
      }
      if constexpr (kCarries)
        if (carries_some && has_grad(row, step)) {
          expect_bytes(barrier, a.together * kUnit);
          copy_box(to + boxes.carried_at + kBoxUnit, boxes.carried[1], 0, 0, row, image, barrier);
        }
      arrive(barrier);
    }
    if (!kBoth) grad_loader.load(a, stage * a.stage_bytes, step < rows, barriers.full(stage));
  };
  settle_and_wait_for_kernel_before(a.depth);
#pragma unroll 1
  for (int step = 0; step < min(a.ahead, steps); ++step) load(step, step, warp == 0);

  // Sums of rows m and m + 8 by columns n and n + 1, where m = lane / 4 and n = lane % 4 * 2.
  float sum[kQuad][kRows][4] = {}, bias[4] = {};
  uint32_t g[kRows][kQuad][2] = {};
  // The thread's pixels, of tiles lane % 4 and lane % 4 + 4: one of each 8 columns.
  const auto pixel_of = [&](const Rows& v, int begin, int carried_at, int h, int first) {
    const int tile = place + 4 * h, x = (tile & (a.tiles() - 1)) * kTileColumns + first + column;
    const int image = tile >> a.tile_shift, pixel = image * v.width + x;
    const bool inside = static_cast<uint32_t>(x) < static_cast<uint32_t>(v.width);
    const int from = inside                    ? begin + place_of<B>(pixel, warp / 2)
                     : carries && x == v.width ? carried_at + image * kUnit
                                               : boxes.zeros_at;
    return kept(shared_address(kFirst<B>) + from + warp % 2 * kQuad * 2);
  };
  uint32_t source_at[3][2], grad_at[2][2];
#pragma unroll
  for (int h = 0; h < 2; ++h) {
#pragma unroll
    for (int k = 0; k < 3; ++k) source_at[k][h] = pixel_of(a.source, 0, boxes.carried_at, h, k * kRun - a.padding_w);
#pragma unroll
    for (int k = 0; k < 2; ++k) grad_at[k][h] = pixel_of(a.grad, a.grad_at, boxes.carried_at + kBoxUnit, h, k * kRun);
  }
  // What of the thread's pixels is of their own row, in both halves of the tiles, which are of different images.
  const auto own = [&](int first) -> uint2 {
    if (!kCarries) return {};
    const bool carried = carries && (place & (a.tiles() - 1)) == 0 && column == first;
    const uint2 of_others = carried_at(a, first_channel<B>());
    return {kept(carried ? ~of_others.x : ~0u), kept(carried ? ~of_others.y : ~0u)};
  };
  [[maybe_unused]] const uint2 own_source = own(a.padding_w), own_grad = own(0);
  // Reads the pixels that a step multiplies; there are zeros for a row of the gradient that there is not.
  uint2 source[3][2] = {}, grad[2][2];
  const auto read = [&](bool any_grad, bool any_source, uint32_t begin) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
#pragma unroll
      for (int k = 0; k < 2; ++k) grad[k][h] = {}, load_if(any_grad, grad[k][h], grad_at[k][h] + begin);
#pragma unroll
      for (int k = 0; k < 3; ++k) load_if(any_source, source[k][h], source_at[k][h] + begin);
    }
  };
  int stage = 0;
  uint32_t parity = 0;
  for (int step = 0; step < steps;) {
#pragma unroll
    for (int u = 0; u < kRows; ++u) {  // the row of the gradient that came `age` steps before is g[(u - age) mod kRows]
      if (step == steps) break;
      const bool multiplies = has_source(row), mine = static_cast<uint32_t>(step) % B::kWarps == warp;
      wait_at(barriers.full(stage), parity);
      read(has_grad(row, step), multiplies, stage * a.stage_bytes);
      if constexpr (kCarries)
#pragma unroll
        for (int h = 0; h < 2; ++h) keep_own(source[0][h], own_source), keep_own(grad[0][h], own_grad);
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        uint32_t pair[kQuad];
        pair_up(grad[k][0], grad[k][1], pair);
#pragma unroll
        for (int c = 0; c < kQuad; ++c) g[u][c][k] = pair[c];
      }
      uint32_t x[4][kQuad];  // of a half of the tiles, and of the 8 columns behind
      pair_up(source[0][0], source[0][1], x[0]), pair_up(source[1][0], source[1][1], x[1]);
      pair_up_again(source[1][0], source[1][1], x[2]), pair_up(source[2][0], source[2][1], x[3]);
      arrive_together_at(barriers.done(stage), lane == 0);
      if ((mine || !kBoth) && step + a.ahead < steps) {
        const bool again = stage >= kBehind;  // the stage that was read kBehind steps ago
        const int free_stage = again ? stage - kBehind : stage + a.ahead;
        wait_at(barriers.done(free_stage), again ? parity : parity ^ 1);
        load(step + a.ahead, free_stage, mine);
      }
      if (++stage == a.depth) stage = 0, parity ^= 1;
      if (++row == a.period) row = 0;
      ++step;
      if (multiplies)
#pragma unroll
        for (int c = 0; c < kQuad; ++c)
#pragma unroll
          for (int i = 0; i < kRows; ++i) {
            float (&to)[4] = sum[c][i];
            multiply(to, to, {x[0][c], x[1][c], x[2][c], x[3][c]}, g[(u - i + kRows) % kRows][c], T{});
          }
      if (a.with_bias)  // channel c in row c
#pragma unroll
        for (int c = 0; c < kQuad; ++c) {
          const uint32_t one = column == c ? ones(T{}) : 0;
          multiply(bias, bias, {one, 0, one, 0}, g[u][c], T{});
        }
    }
  }
  __syncthreads();
  store_diagonals<B>(a, sum);
  store_bias<B>(a, bias);
  store_sums<T, B>(a, slab, split);
#endif
}

// Returns false, and launches nothing, where boxes cannot be described.
template <typename T, class B, int kRows, bool kBoth, bool kCarries>
bool launch(const Problem& p, Toeplitz a, const Allocate& allocate, cudaStream_t stream) {
  const auto kernel = toeplitz_grad_weight_rows<T, B, kRows, kBoth, kCarries>;
  if (!can_overlap(kernel)) return false;
  const Device& device = current_device();
  while (kTileColumns << a.tile_shift < a.counted_columns()) ++a.tile_shift;
  a.columns = kTileColumns << a.tile_shift, a.spans = 1, a.streams = 1;
  a.together = kTiles >> a.tile_shift, a.groups = static_cast<int>(ceil_div(a.images, a.together));
  a.slabs = static_cast<int>(ceil_div(a.channels, B::kSlab));
  a.by_groups = Divider(a.groups), a.by_slabs = Divider(a.slabs);
  a.rows = a.groups * a.period;
  a.grad.turn_bytes = a.together * a.grad.image_bytes - a.period * a.grad.row_bytes;

  RowBoxes<kCarries> boxes{};
  if (!describe_slabs<B>(boxes.source, a.source, p.input, p, p.height, {a.source.width, 1, a.together}) ||
      !describe_slabs<B>(boxes.grad, a.grad, p.output, p, p.out_height, {a.grad.width, 1, a.together}))
    return false;
  if constexpr (kCarries)
    if (!describe_carried(boxes.carried, a, p, true, a.together)) return false;
  boxes.source_bytes = a.together * a.source.width * B::kPixel;
  boxes.grad_bytes = a.together * a.grad.width * B::kPixel;
  a.grad_at = static_cast<int>(round_up(boxes.source_bytes, kFirst<B>));
  boxes.zeros_at = a.grad_at + boxes.grad_bytes;
  boxes.carried_at = static_cast<int>(round_up(boxes.zeros_at + B::kPixel, kBoxUnit));
  a.stage_bytes = static_cast<int>(round_up(boxes.carried_at + (kCarries ? 2 * kBoxUnit : 0), kFirst<B>));
  a.depth = static_cast<int>(std::min<int64_t>((device.shared_per_block - kFirst<B>) / a.stage_bytes, kMaxStages));
  if (a.depth <= kBehind) return false;
  a.ahead = a.depth - kBehind;
  a.splits = splits_of(a, a.rows, device.multiprocessors);
  a.shares = Shares(a.rows, a.splits);
  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, device.shared_per_block);
  a.partial = allocate_partial(a, allocate);
  boxes.images = a;
  const int64_t sums = kRing + (block_sums<B>(a.kernel_h * a.kernel_w) + B::kWarps) * int64_t{sizeof(float)};
  launch_early(kernel, boxes, int64_t{a.slabs} * a.splits, B::kThreads, stream,
               {.shared_bytes = std::max(sums, kFirst<B> + int64_t{a.depth} * a.stage_bytes)});
  check_launch("toeplitz_grad_weight_rows");
  launch_add_partial_sums(p, a.partial, a.splits, stream);
  return true;
}

}  // namespace

bool launch_toeplitz_grad_weight_rows(const Problem& p, const Allocate& allocate, cudaStream_t stream) {
  // More columns gain nothing.
  constexpr int64_t kMostColumns = 2 * kTileColumns, kFewRows = 3, kMoreRows = 5, kMostRows = 7;
  if (p.out_width <= kRun || std::max(p.width, p.out_width) > kMostColumns || p.kernel_h > kMostRows) return false;
  int64_t bytes = 0;
  const Toeplitz a = toeplitz_of(p, bytes);
  if (bytes % kUnit != 0) return false;
  bool launched = false;
  visit_dtype(p.dtype, [&](auto zero) {
    using T = decltype(zero);
    if constexpr (sizeof(T) == 2) {
      const auto launch_rows = [&](auto carries) {
        constexpr bool kCarries = decltype(carries)::value;
        if (p.kernel_h > kMoreRows) return launch<T, Usual, kMostRows, true, kCarries>(p, a, allocate, stream);
        if (p.kernel_h > kFewRows) return launch<T, Usual, kMoreRows, false, kCarries>(p, a, allocate, stream);
        using Wide = Block<16>;  // if at most a fifth of its channels are beyond the last
        return round_up(a.channels, Wide::kSlab) * 4 <= int64_t{a.channels} * 5 &&
               launch<T, Wide, kFewRows, true, kCarries>(p, a, allocate, stream);
      };
      launched = a.carried > 0 ? launch_rows(std::true_type{}) : launch_rows(std::false_type{});
    }
  });
  return launched;
}

}  // namespace dwconv
