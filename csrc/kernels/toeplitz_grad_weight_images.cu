// grad_weight (and the bias gradient) of images of at most 8 x 8: multiplications as those of
// toeplitz_grad_weight_channels_last.cu, of whole images.
//
// They are loaded 8 at once, and then multiplied without a wait. The places of a multiplication are the images in two
// rows y and y + 1 of the gradient; the 16 rows of A are the 8 columns of a row of the input and those of the next one,
// which makes the sums of two rows of the kernel.
//
// They come as boxes, from sm_90 on, if they have at most 7 rows and columns and the padding that keeps their rows;
// else all threads copy them. Only what is read where, and when copies are begun, differs.
#include "boxes.cuh"
#include "toeplitz_grad_weight_sums.cuh"

namespace dwconv {
namespace {

constexpr int kImages = 8, kImageRows = 8, kRowBytes = kRun * kPixelBytes;
constexpr int kMaxGroups = 256;  // of a block: longer sums lose digits

// In shared memory, from one image to the next: for 4 columns of 4 of them half of a bank's accesses are of one.
__host__ __device__ constexpr int image_bytes_of(int rows) {
  return rows * kRowBytes + 64;
}

// How many rows of the input are multiplied two by two, for so many pairs of rows of the kernel.
constexpr int turns_of(int pairs) {
  return pairs + kImageRows / 2 - 1;
}

// A thread's two pixels of a row, of images `place` and `place` + 4.
struct TwoPixels {
  uint2 low, high;
};

// Multiplies images in shared memory. `grad_row`, `source_row`: a row of the gradient, or of the input from `padding`
// rows before the first one on, which are read kAhead turns before their own. `begin_turn`: before rows 2 t of the
// input and on are multiplied, returns whether one of them is in the images.
template <typename T, int kAhead, int kPairs, typename GradRow, typename SourceRow, typename BeginTurn>
__device__ void multiply_images(float (&sum)[kPairs][kQuad][4], float (&bias)[4], bool with_bias, GradRow&& grad_row,
                                SourceRow&& source_row, BeginTurn&& begin_turn) {
  uint32_t g[kImageRows / 2][kQuad][2];
#pragma unroll
  for (int y = 0; y < kImageRows; ++y) {
    const TwoPixels two = grad_row(y);
    uint32_t pair[kQuad];
    pair_up(two.low, two.high, pair);
#pragma unroll
    for (int c = 0; c < kQuad; ++c) g[y / 2][c][y % 2] = pair[c];
  }
  // Rows 2 p of the kernel and 2 q of the gradient meet row 2 t of the input, where p + q = t, and two more.
  constexpr int kTurns = turns_of(kPairs);
  constexpr int kSourceRows = 2 * kTurns + 1;
  TwoPixels rows[kSourceRows];
  rows[0] = source_row(0);
#pragma unroll
  for (int t = -kAhead; t < kTurns; ++t) {
#pragma unroll
    for (int r = 2 * (t + kAhead) + 1; r <= 2 * (t + kAhead) + 2; ++r)
      if (r < kSourceRows) rows[r] = source_row(r);
    if (t < 0 || !begin_turn(t)) continue;
    const TwoPixels &first = rows[2 * t], &second = rows[2 * t + 1], &third = rows[2 * t + 2];
    uint32_t x[4][kQuad];
    pair_up(first.low, first.high, x[0]), pair_up(second.low, second.high, x[1]);
    pair_up_again(second.low, second.high, x[2]), pair_up(third.low, third.high, x[3]);
#pragma unroll
    for (int p = 0; p < kPairs; ++p) {
      const int q = t - p;
      if (q < 0 || q >= kImageRows / 2) continue;
#pragma unroll
      for (int c = 0; c < kQuad; ++c) {
        float (&to)[4] = sum[p][c];
        multiply(to, to, {x[0][c], x[1][c], x[2][c], x[3][c]}, g[q][c], T{});
      }
    }
  }
  if (with_bias)  // channel c in row c
#pragma unroll
    for (int q = 0; q < kImageRows / 2; ++q)
#pragma unroll
      for (int c = 0; c < kQuad; ++c) {
        const uint32_t one = threadIdx.x % 32 / 4 == c ? ones(T{}) : 0;
        multiply(bias, bias, {one, 0, one, 0}, g[q][c], T{});
      }
}

// Takes the sums of images that were worked on together to shared memory: those of so many columns of both.
template <class B, int kRows, int kColumns, int kPairs>
__device__ void store_image_sums(const Toeplitz& a, const float (&sum)[kPairs][kQuad][4], int quad = 0) {
  const int lane = threadIdx.x % 32, row = lane / 4, place = lane % 4, channel = first_channel<B>(quad) + place;
  // The sums for column j of the kernel are on the diagonal row - column = j - padding.
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    float upper[kQuad] = {}, lower[kQuad] = {};  // of diagonals `row` and `row` - 8: the thread's part, of two columns
#pragma unroll
    for (int c = 0; c < kQuad; ++c)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int n = 2 * place + e;
        const float mine = row < kColumns && n < kColumns ? sum[i / 2][c][i % 2 * 2 + e] : 0;
        const float value = __shfl_sync(~0u, mine, (row + n) % kRun * 4 + place);
        (row + n < kRun ? upper[c] : lower[c]) += value;
      }
    const float totals[2] = {add_up(upper, place), add_up(lower, place)};
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int j = row - h * kRun + a.padding_w;
      if (i < a.kernel_h && j >= 0 && j < a.kernel_w)
        shared<float>(kRing + 4 * ((i * a.kernel_w + j) * B::kSlab + channel)) = totals[h];
    }
  }
}

// By threads that copy. What takes time are the ways to shared memory, so they begin copies between multiplications.
template <typename T, int kPairs>  // of rows of the kernel
__global__ void __launch_bounds__(kThreads, 1) toeplitz_grad_weight_of_images(const __grid_constant__ Toeplitz a) {
  let_next_kernel_start();
  uint32_t rest = blockIdx.x;
  const int slab = a.by_slabs.split(rest), split = static_cast<int>(rest);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, row = lane / 4, place = lane % 4;
  uint32_t image = a.shares.begin(split), last = a.shares.begin(split + 1);
  a.by_period.split(image), a.by_period.split(last);

  // A warp loads an image, a thread 16 bytes of a pixel of each row.
  const int byte = slab * kSlab * 2 + place * kUnit, ahead = a.depth - 1;
  int next = static_cast<int>(image) + warp;
  const uint32_t nothing = shared_address(kRing), ring = nothing + kRowBytes;
  const uint32_t copies_to = ring + row * kPixelBytes + place * kUnit;
  struct Copies {
    const char* from;
    uint32_t to;
    int rows;
    bool inside;
  };
  // What there is to copy of the next images.
  const auto next_images = [&](const Rows& v, int height, uint32_t to) {
    return Copies{v.units + (next * v.image_bytes + int64_t{row} * v.pixel_bytes + byte),
                  to + warp * image_bytes_of(height), next - warp < static_cast<int>(last) ? height : 0,
                  next < static_cast<int>(last) && row < v.width && byte < a.channels * 2};
  };
  const auto copy_row = [&](Copies& copies, const Rows& v, int y) {
    copy_or_clear_if(y < copies.rows, copies.to + y * kRowBytes, copies.from, copies.inside);
    copies.from += v.row_bytes;
  };
  for (int i = threadIdx.x * kUnit; i < kRowBytes; i += kThreads * kUnit) shared<uint4>(kRing + i) = {};
  settle_and_wait_for_kernel_before(a.depth);
#pragma unroll 1
  for (int stage = 0; stage < ahead; ++stage, next += kImages) {
    Copies source = next_images(a.source, a.height, copies_to + stage * a.stage_bytes);
    Copies grad = next_images(a.grad, a.out_height, copies_to + stage * a.stage_bytes + a.grad_at);
#pragma unroll 1
    for (int y = 0; y < kImageRows; ++y) copy_row(source, a.source, y), copy_row(grad, a.grad, y);
    commit_copies();
  }

  // Sums of rows 2 p and 2 p + 1 of the kernel, of column `row` of the input by columns 2 place and 2 place + 1.
  float sum[kPairs][kQuad][4] = {}, bias[4] = {};
  int stage = 0, free_stage = ahead;
#pragma unroll 1
  for (; image < last; image += kImages, next += kImages) {
    if (ahead > 1)
      wait_copies<1>();
    else
      wait_copies<0>();
    __syncthreads();
    // A thread's pixels are of the images, or of a row of zeros.
    const uint32_t offset = row * kPixelBytes + warp * kQuad * 2, at = ring + stage * a.stage_bytes + offset;
    const auto load_row = [&](uint32_t images, int height, int y) {
      const bool there = static_cast<uint32_t>(y) < static_cast<uint32_t>(height);
      const uint32_t from = images + place * image_bytes_of(height) + y * kRowBytes;
      return TwoPixels{load_at(there ? from : nothing + offset),
                       load_at(there ? from + 4 * image_bytes_of(height) : nothing + offset)};
    };
    Copies source = next_images(a.source, a.height, copies_to + free_stage * a.stage_bytes);
    Copies grad = next_images(a.grad, a.out_height, copies_to + free_stage * a.stage_bytes + a.grad_at);
    constexpr int kTurns = turns_of(kPairs);
    multiply_images<T, kTurns>(
        sum, bias, a.with_bias, [&](int y) { return load_row(at + a.grad_at, a.out_height, y); },
        [&](int r) { return load_row(at, a.height, r - a.padding_h); },
        [&](int t) {
#pragma unroll
          for (int y = t * kImageRows / kTurns; y < (t + 1) * kImageRows / kTurns; ++y)
            copy_row(source, a.source, y), copy_row(grad, a.grad, y);
          return 2 * t + 2 >= a.padding_h && 2 * t < a.padding_h + a.height;
        });
    commit_copies();
    if (++stage == a.depth) stage = 0;
    if (++free_stage == a.depth) free_stage = 0;
  }
  __syncthreads();

  store_image_sums<Usual, 2 * kPairs, kRun>(a, sum);
  store_bias(a, bias);
  store_sums<T>(a, slab, split);
}

// By boxes: of images of at most 7 x 7 whose padding is kPairs - 1. A box has 7 columns of 7 rows of 8 images, with
// zeros for what is outside of an image, of 64 channels: what boxes take goes by the pixel. Units of a pixel's 128
// bytes are exchanged by the pixel, so it depends on the image, row and column where a warp finds its own, and 8
// addresses serve all rows.
using Wide = Block<8, 2>;
constexpr int kBoxSide = 7, kBoxImage = kBoxSide * kBoxSide;   // pixels
constexpr int kBoxBytes = kImages * kBoxImage * Wide::kPixel;  // a multiple of what units are exchanged in
constexpr int kBoxesAt = 8 * Wide::kPixel;                     // where the first one begins in shared memory
constexpr int kCarriedAt = kBoxBytes + kBoxUnit;               // where behind it the unit of its own is
template <bool kCarries>
constexpr int kGradAt = kBoxBytes + (kCarries ? kBoxesAt : 0);  // where in a stage the gradient is
static_assert(kBoxBytes % kBoxesAt == 0 && Wide::kUnits == 8 && Wide::kWarps == Wide::kUnits);
static_assert(kCarriedAt + kUnit <= kGradAt<true>);

template <bool kCarries>
struct Boxes {
  CUtensorMap source, grad;
  std::array<CUtensorMap, kCarries ? 2 : 0> carried;  // of the units behind images, likewise
  Toeplitz images;
};

// `kCarries`: whether there are carried channels, of images of 7 x 7. Of these, the last pixel of a row is the one
// behind it, in the next row or image, or in a unit of its own behind the last image, and so columns are counted from 1
// to 8, and the first one is not theirs.
template <typename T, int kPairs, bool kCarries>
__global__ void __launch_bounds__(Wide::kThreads, 1)
    toeplitz_grad_weight_of_boxes(const __grid_constant__ Boxes<kCarries> boxes) {
#if __CUDA_ARCH__ >= 900
  const Toeplitz& a = boxes.images;
  let_next_kernel_start();
  uint32_t rest = blockIdx.x;
  int slab = a.by_slabs.split(rest), split = static_cast<int>(rest);
  if (a.cluster) slab = cluster_number(), split = rank_in_cluster();
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, place = lane % 4;
  uint32_t image = a.shares.begin(split), last = a.shares.begin(split + 1);
  a.by_period.split(image), a.by_period.split(last);
  StageBarriers::init(1, Wide::kWarps, true);
  if (threadIdx.x == 0) prefetch(boxes.source), prefetch(boxes.grad);
  if (kCarries && static_cast<int>(threadIdx.x) < 2 * a.depth)  // behind an eighth image that there is not
    shared<uint4>(kBoxesAt + threadIdx.x / 2 * a.stage_bytes + threadIdx.x % 2 * a.grad_at + kBoxBytes) = {};
  before_bulk_copies();
  __syncthreads();
  const bool carries_some = kCarries && slab == 0, carries = carries_some && first_channel<Wide>() < a.carried;
  const auto last_image = [&](uint32_t image) { return min(static_cast<int>(image) + kImages, a.images) - 1; };
  const auto load = [&](uint32_t image, int stage) {
    const int to = kBoxesAt + stage * a.stage_bytes, barrier = StageBarriers::full(stage);
    expect_bytes(barrier, 2 * kBoxBytes);
    copy_box(to, boxes.source, slab * Wide::kSlab, 0, 0, image, barrier);
    copy_box(to + a.grad_at, boxes.grad, slab * Wide::kSlab, 0, 0, image, barrier);
    if constexpr (kCarries)
      if (carries_some) {
        expect_bytes(barrier, 2 * kUnit);
        copy_box(to + kCarriedAt, boxes.carried[0], 0, 0, 0, last_image(image), barrier);
        copy_box(to + a.grad_at + kCarriedAt, boxes.carried[1], 0, 0, 0, last_image(image), barrier);
      }
    arrive(barrier);
  };
  settle_and_wait_for_kernel_before(a.depth);
  uint32_t next = image + a.depth * kImages;
  if (warp == 0 && is_elected())
    for (int stage = 0; stage < a.depth && image + stage * kImages < last; ++stage)
      load(image + stage * kImages, stage);

  // Sums of rows 2 p and 2 p + 1 of the kernel, of column lane / 4 of the input by columns 2 place and 2 place + 1.
  // There is no eighth column: the seventh is read again, and these sums are left out.
  float sum[Wide::kQuads][kPairs][kQuad][4] = {}, bias[Wide::kQuads][4] = {};
  // A thread's pixels are of images 2 place and 2 place + 1, so that those that are read at once are in all banks.
  const int column = lane / 4, first = 2 * place * kBoxImage + (carries ? column : min(column, kBoxSide - 1));
  uint2 mask[Wide::kQuads];  // of the channels whose column it is
#pragma unroll
  for (int quad = 0; quad < Wide::kQuads; ++quad) {
    const uint2 carried = carried_at(a, slab * Wide::kSlab + first_channel<Wide>(quad));
    mask[quad] = column == 0 ? uint2{~carried.x, ~carried.y} : column == kBoxSide ? carried : uint2{~0u, ~0u};
  }
  int stage = 0;
  uint32_t parity = 0;
#pragma unroll 1
  for (; image < last; image += kImages, next += kImages) {
    wait(StageBarriers::full(stage), parity);
    uint32_t pixel_at[8];  // of pixels first - k, but for k
#pragma unroll
    for (int k = 0; k < 8; ++k)
      pixel_at[k] =
          shared_address(kBoxesAt) + stage * a.stage_bytes + first * Wide::kPixel + (warp ^ (first - k) % 8u) * kUnit;
#pragma unroll
    for (int quad = 0; quad < Wide::kQuads; ++quad) {
      const auto load_row = [&](int box, int y) {
        if (y < 0 || y >= kBoxSide) return TwoPixels{};
        const auto load_pixel = [&](int h) {
          const int behind = y * kBoxSide + h * kBoxImage;  // `first`
          uint32_t from = pixel_at[(8 - behind % 8) % 8] + box + behind * Wide::kPixel;
          if (kCarries && y == kBoxSide - 1 && carries && column == kBoxSide &&
              static_cast<int>(image) + 2 * place + h == last_image(image))
            from = shared_address(kBoxesAt) + stage * a.stage_bytes + box + kCarriedAt;
          const uint2 pixel = load_at(from + quad * kQuad * 2);
          return kCarries ? uint2{pixel.x & mask[quad].x, pixel.y & mask[quad].y} : pixel;
        };
        return TwoPixels{load_pixel(0), load_pixel(1)};
      };
      constexpr int kPadding = kPairs - 1;
      multiply_images<T, 1>(
          sum[quad], bias[quad], a.with_bias, [&](int y) { return load_row(kGradAt<kCarries>, y); },
          [&](int r) { return load_row(0, r - kPadding); },
          [](int t) { return 2 * t + 2 >= kPadding && 2 * t < kPadding + kBoxSide; });
    }
    if (next < last) {  // into the stage that all warps have read
      arrive_together(StageBarriers::done(stage), lane == 0);
      if (warp == 0 && is_elected()) wait(StageBarriers::done(stage), parity), load(next, stage);
    }
    if (++stage == a.depth) stage = 0, parity ^= 1;
  }
  __syncthreads();
#pragma unroll
  for (int quad = 0; quad < Wide::kQuads; ++quad) {
    store_image_sums<Wide, 2 * kPairs - 1, kCarries ? kRun : kBoxSide>(a, sum[quad], quad);
    if (!kCarries && place == 3) bias[quad][1] = 0;
    store_bias<Wide>(a, bias[quad], quad);
  }
  if (a.cluster)
    add_up_splits<T, Wide>(a, slab, split);
  else
    store_sums<T, Wide>(a, slab, split);
#endif
}

// Fills in how many images of at most 8 x 8 are worked on together, and returns whether they are that small. Their sums
// are of no column of the kernel beyond the 16 diagonals.
bool has_small_images(Toeplitz& a) {
  a.grad_at = kImages * image_bytes_of(a.height);
  a.stage_bytes = a.grad_at + kImages * image_bytes_of(a.out_height);
  a.depth =
      static_cast<int>(std::min<int64_t>((current_device().shared_per_block - kRing - kRowBytes) / a.stage_bytes, 3));
  const int most = std::max({a.height, a.out_height, a.source.width, a.grad.width, a.kernel_h, a.padding_w});
  return most <= kImageRows && a.depth > 1;
}

// Cuts the images into splits, no more of them than make the longest one shorter.
template <class B>
void cut_images(Toeplitz& a) {
  a.slabs = static_cast<int>(ceil_div(a.channels, B::kSlab)), a.by_slabs = Divider(a.slabs);
  const int64_t groups = ceil_div(a.images, kImages);
  const int64_t most =
      std::clamp<int64_t>(current_device().multiprocessors / a.slabs, ceil_div(groups, kMaxGroups), groups);
  a.splits = static_cast<int>(ceil_div(groups, ceil_div(groups, most)));
  a.streams = 1, a.columns = kRun, a.period = a.out_height, a.by_period = Divider(a.period);
  a.rows = a.images * a.period;
}

// Returns false, and launches nothing, where images do not come as boxes.
template <typename T, int kPairs, bool kCarries>
bool launch_boxes(const Problem& p, const Toeplitz& images, const Allocate& allocate, cudaStream_t stream) {
  const auto kernel = toeplitz_grad_weight_of_boxes<T, kPairs, kCarries>;
  Boxes<kCarries> boxes{{}, {}, {}, images};
  Toeplitz& a = boxes.images;
  const auto [least, most] = std::minmax({a.height, a.out_height, a.source.width, a.grad.width});
  if (most > kBoxSide || (kCarries && least < kBoxSide) || a.padding_h != kPairs - 1 || a.kernel_h >= 2 * kPairs)
    return false;
  const std::array<int, 3> box{kBoxSide, kBoxSide, kImages};
  if (!can_overlap(kernel) || !describe_slabs<Wide>(boxes.source, a.source, p.input, p, p.height, box) ||
      !describe_slabs<Wide>(boxes.grad, a.grad, p.output, p, p.out_height, box))
    return false;
  if constexpr (kCarries)
    if (!describe_carried(boxes.carried, a, p, false, 1)) return false;
  cut_images<Wide>(a);
  const Device& device = current_device();
  const int64_t groups = ceil_div(a.images, kImages);
  a.grad_at = kGradAt<kCarries>, a.stage_bytes = 2 * a.grad_at;
  a.depth = static_cast<int>(
      std::min((device.shared_per_block - kBoxesAt) / int64_t{a.stage_bytes}, ceil_div(groups, a.splits)));
  if (a.depth < 1) return false;
  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, device.shared_per_block);
  a.shares = Shares(groups * kImages * a.period, a.splits, 1, kImages * a.period);
  const int64_t sums = kRing + (block_sums<Wide>(a.kernel_h * a.kernel_w) + Wide::kWarps) * int64_t{sizeof(float)};
  const int64_t shared_bytes = std::max(sums, kBoxesAt + int64_t{a.depth} * a.stage_bytes);
  static thread_local Decisions<4, bool> decisions;
  a.cluster = decisions({device.id, a.slabs, a.splits, shared_bytes}, [&] {
    return a.splits <= kPortableCluster && fits_clusters(kernel, a.slabs, a.splits, Wide::kThreads, shared_bytes);
  });
  if (!a.cluster) a.partial = allocate_partial(a, allocate);
  launch_early(kernel, boxes, int64_t{a.slabs} * a.splits, Wide::kThreads, stream,
               {.cluster = a.cluster ? a.splits : 1, .shared_bytes = shared_bytes});
  check_launch("toeplitz_grad_weight_of_boxes");
  if (!a.cluster) launch_add_partial_sums(p, a.partial, a.splits, stream);
  return true;
}

template <typename T, int kPairs>
bool launch_images(const Problem& p, Toeplitz a, const Allocate& allocate, cudaStream_t stream) {
  if (a.carried > 0) return launch_boxes<T, kPairs, true>(p, a, allocate, stream);
  if (launch_boxes<T, kPairs, false>(p, a, allocate, stream)) return true;
  const Device& device = current_device();
  const auto kernel = toeplitz_grad_weight_of_images<T, kPairs>;
  cut_images<Usual>(a);
  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, device.shared_per_block);
  a.shares = Shares(int64_t{a.images} * a.period, a.splits, 1, a.period);
  a.partial = allocate_partial(a, allocate);
  const int64_t sums = (block_sums(a.kernel_h * a.kernel_w) + kWarps) * int64_t{sizeof(float)};
  launch_early(kernel, a, int64_t{a.slabs} * a.splits, kThreads, stream,
               {.shared_bytes = kRing + std::max(sums, kRowBytes + int64_t{a.depth} * a.stage_bytes)});
  check_launch("toeplitz_grad_weight_of_images");
  launch_add_partial_sums(p, a.partial, a.splits, stream);
  return true;
}

}  // namespace

bool launch_toeplitz_grad_weight_images(const Problem& p, const Allocate& allocate, cudaStream_t stream) {
  int64_t bytes = 0;
  Toeplitz a = toeplitz_of(p, bytes);
  if (bytes % kUnit != 0 || !has_small_images(a)) return false;
  bool launched = false;
  visit_dtype(p.dtype, [&](auto zero) {
    using T = decltype(zero);
    if constexpr (sizeof(T) == 2)
      launched =
          a.kernel_h <= 4 ? launch_images<T, 2>(p, a, allocate, stream) : launch_images<T, 4>(p, a, allocate, stream);
  });
  return launched;
}

}  // namespace dwconv
