// The same as outer_grad_weight from whole planes in shared memory, on sm_90 and later.
//
// Rows are what is summed over: with A[w][r] = gradient[r][w] and B[r][u] = input[r + shift][u], the product has, for
// row shift + padding of the kernel, the sums for its columns u + padding - w on the diagonals. So planes stay as they
// are in memory, and rows of several images go side by side. A warp has all products for a shift in registers, which
// takes rows of 56 columns: 2 or 4 narrower ones are taken as one, whose products are those of all pairs of them. Of a
// kernel with many rows that reaches over 16 columns at most, a warp has two shifts, but only products that are near,
// and a block has half of the rows. For a tall kernel with few columns, columns are summed over and rows multiplied:
// A[r][w] = gradient[r][w], B[w][y] = input[y][w + shift]. An odd shift puts its pairs of pixels together from two
// words.
//
// Planes are loaded far ahead by a thread that begins bulk copies, or by some warps where they are not of whole units
// of 16 bytes; if they are, but begin elsewhere, some warps move them to where units begin. Shared memory gives
// fragments hardly faster than they are multiplied: what is next is loaded in between.
//
// Products that are not of the convolution have zeros on both sides: Inf and NaN come out where they should. But where
// rows that are taken as one do not divide a plane, or a warp has two shifts, zeros meet others: sums that are not
// finite are taken again, product by product.
#include <algorithm>
#include <cmath>

#include "launch.h"
#include "moved_planes.cuh"
#include "outer_grad_weight.h"
#include "outer_grad_weight_planes.h"
#include "outer_products.cuh"
#include "overlap.cuh"
#include "planes.cuh"
#include "turn.cuh"
#include "weight_sums.cuh"

namespace dwconv {
namespace {

constexpr int kFewestLoaders = 64, kMostLoaders = 128;  // threads that load, where there are no bulk copies
constexpr int kMaxStages = 8;
constexpr int kSumBytes = 4 * kLong * kLong;  // of a warp
// The same where a warp adds up its diagonals before, of 8 rows by 8 columns each.
constexpr int kDiagonals = 2 * kNear / 8 + 1, kNearPitch = 8 * kDiagonals, kNearSumBytes = 4 * 8 * kNearPitch;

// What planes are taken for: a wide kernel, one with many rows that reaches over kNear columns at most, or a tall one.
enum class Way { kWide, kNear, kTall };

// How planes come: by bulk copies, as they are or to be moved, or by threads.
enum class Load { kBulk, kMoved, kThreads };

// Whether a warp that multiplies loads as well: one more would leave too few registers for each.
constexpr bool loads_beside(Way way) {
  return way == Way::kNear;
}
// The warps that there are registers for, and what each multiplies for 16 rows.
constexpr int warps_of(Way way) {
  return way == Way::kNear ? 8 : 12;
}
constexpr int multiplications_of(Way way) {
  return way == Way::kNear ? 34 : 25;
}
// The shifts of a warp, one after the other.
constexpr int shifts_of_warp(Way way) {
  return way == Way::kNear ? 2 : 1;
}

struct Plane {
  const char* base;
  int64_t image_bytes, channel_bytes;
  int bytes, pitch, slot;  // of a plane, of its rows, and of its place in shared memory, with zeros behind
  int summed, width;       // rows and columns, or the other way round
  int lanes;               // of the threads that load a plane
  int before;              // bytes of its first unit that are not the plane's
};

struct Planes {
  Plane source, grad;
  WeightSums result;
  int kernel_short, kernel_long, padding_short, padding_long;
  int tap_short, tap_long;  // taps from one to the next
  int first_row, last_row;  // of the short side, that meet the images: from and up to, less one
  int groups, group_rows;   // parts of those rows for different blocks
  int folded, fold_bits;    // rows of a plane that are taken as one: 1, 2 or 4
  int unit, loaders;        // bytes that threads copy at once, and how many threads do
  bool moves;               // whether planes are moved, by them
  int gap;                  // bytes behind planes in shared memory for units that they end in before
  int images, filters, multiplier, splits;
  int shifts, shares;                  // warps with other shifts, and with other images of a stage
  int together, stages;                // images that a warp has of a stage
  bool uneven;                         // not all warps have as many
  bool reversed;                       // whether every second four warps have their shifts in the other order
  bool once;                           // a block has one item: stages and sums share their place
  int sums, first_stage, image_bytes;  // places in shared memory
  int sum_bytes;                       // of a warp
  static constexpr int kZeros = 3 * 8 * kMaxStages, kZeroBytes = 32 * kGrads;

  __device__ int full(int stage) const { return 8 * stage; }
  __device__ int empty(int stage) const { return 8 * (kMaxStages + stage); }
  __device__ int loaded(int stage) const { return 8 * (2 * kMaxStages + stage); }  // what is to be moved
  __device__ int grad_at() const { return source.slot + gap; }                     // in a stage's image
  __device__ int stage_images() const { return shares * together; }
  __host__ __device__ int items() const { return filters * groups * splits; }
  // Of rows of the input against those of the gradient that they meet, for rows of the kernel from `row` on, and for
  // those before it.
  __host__ __device__ int first_shift(int row) const {
    const int shift = (row - padding_short) >> fold_bits;
    return shift > -grad.summed ? shift : 1 - grad.summed;
  }
  __host__ __device__ int last_shift(int row) const {
    const int shift = (row - 1 - padding_short + folded - 1) >> fold_bits;
    return shift < source.summed ? shift : source.summed - 1;
  }
};

// What a block adds up: the images of a split, for a filter and a group of rows.
struct Item {
  int filter, split, group, first, last;

  __device__ Item(const Planes& a, int number) : filter(number), split(0), group(0), first(0), last(a.images) {
    if (a.groups > 1) group = filter % a.groups, filter /= a.groups;  // they share planes
    if (a.splits == 1) return;                                        // long divisions
    split = filter / a.filters, filter %= a.filters;
    first = static_cast<int>(int64_t{a.images} * split / a.splits);
    last = static_cast<int>(int64_t{a.images} * (split + 1) / a.splits);
  }

  __device__ int first_row(const Planes& a) const { return a.first_row + group * a.group_rows; }
  __device__ int last_row(const Planes& a) const { return min(first_row(a) + a.group_rows, a.last_row); }
};

// Which shift a warp has: every second four of them may have theirs in the other order.
__host__ __device__ inline int tap_of(int warp, int shifts, bool reversed) {
  if (!reversed || warp / 4 % 2 == 0) return warp;
  const int first = warp / 4 * 4, end = first + 4 < shifts ? first + 4 : shifts;
  return end - 1 - (warp - first);
}

// Where a lane is in the rows that meet any, of the images of a stage: a lane names a row of either matrix.
class Rows {
 public:
  int count;  // of an image

  // `more`: shifts behind this one that the warp has as well.
  __device__ Rows(const Planes& a, int shift, int more, int lane) {
    const int first = max(-(shift + more), 0);
    first_source_ = first + shift;
    count = max(min(a.grad.summed, a.source.summed - shift) - first, 0);
    if (count == 0) return;
    const int step_images = 16 / count;
    step_ = 16 - step_images * count;
    const auto side = [&](const Plane& v, int first_row, int at, int column) {
      const int images = at / count, row = at - images * count;
      return Side{at, row, images * a.image_bytes + (first_row + row) * v.pitch + column,
                  step_images * a.image_bytes + step_ * v.pitch, a.image_bytes - count * v.pitch};
    };
    grad_ = side(a.grad, first, lane % 8 + lane / 16 * 8, lane / 8 % 2 * 16);
    source_ = side(a.source, first_source_, lane % 16, lane / 16 * 16);
  }

  // From 16 rows to the next, beginning at the first images: what is behind the last row is zeros.
  class Walk {
   public:
    __device__ Walk(const Rows& rows, uint32_t grad, uint32_t source, int images)
        : grad_row_(rows.grad_.row),
          source_row_(rows.source_.row),
          grad_left_(images * rows.count - rows.grad_.at),
          source_left_(images * rows.count - rows.source_.at),
          grad_(grad + rows.grad_.place),
          source_(source + rows.source_.place) {}

    __device__ uint32_t next_grad(const Rows& rows, uint32_t zeros) {
      return next(rows, rows.grad_, grad_, grad_row_, grad_left_, zeros);
    }
    __device__ uint32_t next_source(const Rows& rows, uint32_t zeros) {
      return next(rows, rows.source_, source_, source_row_, source_left_, zeros);
    }
    // Of two shifts. Rows that one of them does not meet are zeros.
    __device__ void next_sources(const Planes& a, const Rows& rows, uint32_t zeros, uint32_t (&both)[2]) {
      const int row = rows.first_source_ + source_row_;
      const uint32_t from = next_source(rows, zeros);
      both[0] = row >= 0 ? from : zeros;
      both[1] = row + 1 >= a.source.summed ? zeros : from == zeros ? zeros : from + a.source.pitch;
    }

   private:
    int grad_row_, source_row_, grad_left_, source_left_;
    uint32_t grad_, source_;

    static __device__ uint32_t next(const Rows& rows, const auto& side, uint32_t& place, int& row, int& left,
                                    uint32_t zeros) {
      const uint32_t here = left > 0 ? place : zeros;
      left -= 16, row += rows.step_, place += side.step;
      if (row >= rows.count) row -= rows.count, place += side.wrap;
      return here;
    }
  };

 private:
  struct Side {
    int at, row;     // the lane's first row, of all and of its image
    int place;       // where that is
    int step, wrap;  // 16 rows on, and from behind an image's last row to the next image's first one
  };
  int first_source_;  // row of the input: -1 where the first shift does not meet the first row of the gradient
  int step_;          // 16 rows on, in rows of an image
  Side grad_, source_;
};

// A warp's products for a shift.
template <typename T>
struct Products : OuterProducts<T, false> {
  using OuterProducts<T, false>::kWhole;
  using OuterProducts<T, false>::kPairs;
  using OuterProducts<T, false>::sum;
  using OuterProducts<T, false>::last;

  // The rows of all images that meet any go side by side. What is next is loaded as soon as there is room for it: it
  // takes the registers of what was multiplied.
  __device__ void add_wide(const Rows& rows, uint32_t grad, uint32_t source, int images, uint32_t zeros) {
    Rows::Walk walk(rows, grad, source, images);
    uint32_t g[kGrads][4], x[kPairs][4];
    load(g, x, walk.next_grad(rows, zeros), walk.next_source(rows, zeros));
    int left = images * rows.count;
#pragma unroll 1
    for (; left > 8; left -= 16) {
      const uint32_t next_grad = walk.next_grad(rows, zeros), next_source = walk.next_source(rows, zeros);
      add_and_load(g, x, next_grad, next_source);
    }
    if (left > 0)
#pragma unroll
      for (int n = 0; n < kSources; n += 2) this->template add<true>(g, n, x[n / 2]);
  }

  static __device__ void load(uint32_t (&g)[kGrads][4], uint32_t (&x)[kPairs][4], uint32_t grad, uint32_t source) {
#pragma unroll
    for (int n = 0; n < kSources; n += 2) load_pair(x[n / 2], n, source);
#pragma unroll
    for (int m = 0; m < kGrads; ++m) load_matrices_transposed(g[m], grad + 32 * m);
  }
  __device__ void add_and_load(uint32_t (&g)[kGrads][4], uint32_t (&x)[kPairs][4], uint32_t grad, uint32_t source) {
    constexpr int kLast = 2 * kPairs - 4;  // the pair that is multiplied last: the one behind it has least to do
#pragma unroll
    for (int k = 0; k < kPairs; ++k) {
      const int n = (kLast + 2 + 2 * k) % (2 * kPairs);
      this->template add<false>(g, n, x[n / 2], [&](int m) {
        if (n == kLast) load_matrices_transposed(g[m], grad + 32 * m);
      });
      load_pair(x[n / 2], n, source);
    }
  }

  // 16 columns, or 8, of a tall kernel's planes: `column` is the input's that the thread's first one meets. Columns
  // that do not meet any become zeros where kMasked.
  template <bool kOdd, bool kHalf, bool kMasked>
  __device__ void add_columns(const Planes& a, uint32_t grad, uint32_t source, int column) {
    uint32_t g[kGrads][4];
    const uint32_t masks[2] = {kMasked ? pair_mask(column, a.source.summed) : ~0u,
                               kMasked ? pair_mask(column + 8, a.source.summed) : ~0u};
#pragma unroll
    for (int m = 0; m < kGrads; ++m) {
      load_matrices(g[m], grad + m * 16 * a.grad.pitch);
      if constexpr (kMasked)
#pragma unroll
        for (int e = 0; e < 4; ++e) g[m][e] &= masks[e / 2];
    }
#pragma unroll
    for (int n = 0; n < kSources; n += 2) {
      uint32_t x[4] = {};
#pragma unroll
      for (int k = 0; k < 2; ++k)
        if (n + k < kSources)
#pragma unroll
          for (int h = 0; h < (kHalf ? 1 : 2); ++h) {
            const uint32_t from = source + (n + k) * 8 * a.source.pitch + 16 * h;
            uint32_t& pair = x[2 * k + h];
            pair = load_word(from);
            if constexpr (kOdd) pair = __byte_perm(pair, load_word(from + 4), 0x5432);
            if constexpr (kMasked) pair &= masks[h];
          }
      this->template add<kHalf>(g, n, x);
    }
  }

  template <bool kOdd>
  __device__ void add_tall(const Planes& a, int shift, uint32_t grad, uint32_t source) {
    const int lane = threadIdx.x % 32;
    grad += lane % 16 * a.grad.pitch + 16 * (lane / 16);
    source += lane / 4 * a.source.pitch + 4 * (lane % 4) + 2 * (kOdd ? shift - 1 : shift);
    for (int w = 0; w < a.grad.summed; w += 16) {
      const int column = w + shift + 2 * (lane % 4);
      if (a.grad.summed - w <= 8)
        add_columns<kOdd, true, true>(a, grad, source, column);
      else if (w + shift >= 0 && w + shift + 16 <= a.source.summed)
        add_columns<kOdd, false, false>(a, grad, source, column);
      else
        add_columns<kOdd, false, true>(a, grad, source, column);
      grad += 32, source += 32;
    }
  }

  // To shared memory, as a matrix of the gradient's columns by the input's.
  __device__ void store(int to) const {
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
    for (int n = 0; n < kSources; ++n)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
#pragma unroll
        for (int m = 0; m < kWhole; ++m)
          shared<float2>(to + 4 * ((16 * m + 8 * h + g) * kLong + 8 * n + 2 * t)) = {sum[m][n][2 * h],
                                                                                     sum[m][n][2 * h + 1]};
        shared<float>(to + 4 * ((16 * kWhole + 2 * t + h) * kLong + 8 * n + g)) = last[n / 2][n % 2 * 2 + h];
      }
  }
};

// A warp's products for two shifts, one after the other, of columns that are near.
template <typename T>
struct NearProducts {
  using Part = OuterProducts<T, true>;
  static constexpr int kPairs = Part::kPairs;
  Part parts[2];

  __device__ void clear() { parts[0].clear(), parts[1].clear(); }

  // As Products::add_wide.
  __device__ void add(const Planes& a, const Rows& rows, uint32_t grad, uint32_t source, int images, uint32_t zeros) {
    Rows::Walk walk(rows, grad, source, images);
    uint32_t g[2][kGrads][4], x[2][kPairs][4];
    // Where the next rows are is known a step before they are loaded, so that nothing waits for it.
    uint32_t grad_from = walk.next_grad(rows, zeros), from[2];
    walk.next_sources(a, rows, zeros, from);
    const auto load_grad = [&](uint32_t (&to)[kGrads][4]) {
#pragma unroll
      for (int m = 0; m < kGrads; ++m) load_matrices_transposed(to[m], grad_from + 32 * m);
      grad_from = walk.next_grad(rows, zeros);
    };
    load_grad(g[0]);
#pragma unroll
    for (int s = 0; s < 2; ++s)
#pragma unroll
      for (int n = 0; n < kSources; n += 2) load_pair(x[s][n / 2], n, from[s]);
    walk.next_sources(a, rows, zeros, from);
    int left = images * rows.count;
    // Returns whether there is more.
    const auto step = [&](const uint32_t (&g)[kGrads][4], uint32_t (&next)[kGrads][4]) {
      if (left <= 8) {
        if (left > 0)
#pragma unroll
          for (int s = 0; s < 2; ++s)
#pragma unroll
            for (int n = 0; n < kSources; n += 2) parts[s].template add<true>(g, n, x[s][n / 2]);
        return false;
      }
      load_grad(next);
#pragma unroll
      for (int s = 0; s < 2; ++s)
#pragma unroll
        for (int n = 0; n < kSources; n += 2) {
          parts[s].template add<false>(g, n, x[s][n / 2]);
          load_pair(x[s][n / 2], n, from[s]);
        }
      walk.next_sources(a, rows, zeros, from);
      left -= 16;
      return true;
    };
    while (step(g[0], g[1]) && step(g[1], g[0])) {
    }
  }
};

// To shared memory, the sums over blocks of 8 x 8 on the same diagonal.
template <typename T>
__device__ void store_diagonals(const OuterProducts<T, true>& products, int to) {
  const auto& [sum, last] = products;
  constexpr int kWhole = OuterProducts<T, true>::kWhole;
  const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  const auto place = [&](int grad, int diagonal, int source) {
    return to + 4 * (grad * kNearPitch + 8 * diagonal + source);
  };
#pragma unroll
  for (int q = 0; q < kDiagonals; ++q) {
    float2 total{};
#pragma unroll
    for (int m = 0; m < kWhole; ++m)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int n = 2 * m + h + q - kDiagonals / 2;
        if (n >= 0 && n < kSources && OuterProducts<T, true>::has(m, n))
          total.x += sum[m][n][2 * h], total.y += sum[m][n][2 * h + 1];
      }
    shared<float2>(place(g, q, 2 * t)) = total;
  }
  __syncwarp();
#pragma unroll
  for (int n = 0; n < kSources; ++n)
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int q = n - 2 * kWhole + kDiagonals / 2;
      if (q >= 0 && q < kDiagonals) shared<float>(place(2 * t + e, q, g)) += last[n / 2][n % 2 * 2 + e];
    }
  __syncwarp();
}

// The sum of a tap, from the products of all warps.
[[maybe_unused]] __device__ inline float sum_of_tap(const Planes& a, int first_shift, int i, int j) {
  constexpr int kAtOnce = kLong / 2;  // many: none waits
  const int shift = i - a.padding_short, diagonal = j - a.padding_long;
  const int begin = max(-diagonal, 0), end = min(a.grad.width, a.source.width - diagonal);
  float total = 0;
  if (end <= begin) return 0;
  for (int f = 0; f < a.folded; ++f) {  // which of the rows of the gradient that are taken as one
    const int warp = ((f + shift) >> a.fold_bits) - first_shift;
    if (warp < 0 || warp >= a.shifts) continue;
    const int source = ((f + shift) & (a.folded - 1)) * a.source.width;
    uint32_t from = shared_address(a.sums + warp * kSumBytes) + 4 * (f * a.grad.width * kLong + source + diagonal);
    for (int share = 0; share < a.shares; ++share, from += a.shifts * kSumBytes)
      for (int first = 0; first < end; first += kAtOnce) {
        const int skip = begin - first, past = end - first;
        uint32_t products[kAtOnce];
#pragma unroll
        for (int k = 0; k < kAtOnce; ++k) products[k] = load_word(from + (first * (kLong + 1) + k * (kLong + 1)) * 4);
#pragma unroll
        for (int k = 0; k < kAtOnce; ++k) total += k >= skip && k < past ? __uint_as_float(products[k]) : 0;
      }
  }
  return total;
}

// The same of a warp's sums over diagonals.
[[maybe_unused]] __device__ inline float sum_of_diagonal(int sums, int diagonal) {
  const int from = sums + 4 * (diagonal + 8 * (kDiagonals / 2));
  float total = 0;
#pragma unroll
  for (int row = 0; row < 8; ++row) total += shared<float>(from + 4 * row * (kNearPitch + 1));
  return total;
}

// The same, product by product: where zeros stand for rows that there are not, they meet others.
template <typename T>
__device__ __noinline__ float sum_by_products(const Planes& a, const Item& item, int i, int j) {
  const int rows = a.grad.bytes / 2 / a.grad.width, source_rows = a.source.bytes / 2 / a.source.width;
  const int shift = i - a.padding_short, diagonal = j - a.padding_long;
  const auto row_of = [](const Plane& v, int channel, int image, int row) {
    return reinterpret_cast<const T*>(v.base + channel * v.channel_bytes + image * v.image_bytes) + row * v.width;
  };
  double total = 0;
  for (int image = item.first; image < item.last; ++image)
    for (int r = max(-shift, 0); r < min(rows, source_rows - shift); ++r) {
      const T* x = row_of(a.source, item.filter / a.multiplier, image, r + shift) + diagonal;
      const T* g = row_of(a.grad, item.filter, image, r);
      float sum = 0;
      for (int w = max(-diagonal, 0); w < min(a.grad.width, a.source.width - diagonal); ++w)
        sum = fmaf(widen(x[w]), widen(g[w]), sum);
      total += sum;
    }
  return static_cast<float>(total);
}

// What a thread that begins bulk copies loads next.
template <bool moves>
struct Ahead {
  int number, image = 0;  // the latter of an item's
  Turn turn;

  __device__ Ahead() : number(blockIdx.x) {}
  __device__ bool more(const Planes& a) const { return number < a.items(); }

  // Loads a stage, as soon as it is free.
  __device__ void load_next(const Planes& a) {
    const Item item(a, number);
    const int first = item.first + image, images = min(a.stage_images(), item.last - first);
    const char* source =
        a.source.base + item.filter / a.multiplier * a.source.channel_bytes + first * a.source.image_bytes;
    const char* grad = a.grad.base + item.filter * a.grad.channel_bytes + first * a.grad.image_bytes;
    uint32_t to = shared_address(a.first_stage + turn.stage * a.stage_images() * a.image_bytes);
    const int barrier = moves ? a.loaded(turn.stage) : a.full(turn.stage);
    wait(a.empty(turn.stage), turn.parity ^ 1);
    if (!moves) expect_bytes(barrier, images * (a.source.bytes + a.grad.bytes));
    for (int k = 0; k < images; ++k, to += a.image_bytes) {
      if constexpr (moves) {
        const bool is_first = first + k == 0, is_last = first + k == a.images - 1;
        load_units(to, source, a.source.bytes, is_first && item.filter < a.multiplier,
                   is_last && item.filter >= a.filters - a.multiplier, barrier);
        load_units(to + a.grad_at(), grad, a.grad.bytes, is_first && item.filter == 0,
                   is_last && item.filter == a.filters - 1, barrier);
      } else {
        copy_bulk(to, source, a.source.bytes, barrier);
        copy_bulk(to + a.grad_at(), grad, a.grad.bytes, barrier);
      }
      source += a.source.image_bytes, grad += a.grad.image_bytes;
    }
    arrive(barrier);
    image += a.stage_images();
    if (first + a.stage_images() >= item.last) number += gridDim.x, image = 0;
    turn.next(a.stages);
  }
};

// Loads planes and moves them, by warps of which this is number `mover`: a thread begins to load two stages late, so as
// not to wait for those that multiply.
__device__ inline void move_planes(const Planes& a, int mover) {
  const int lane = threadIdx.x % 32, movers = a.loaders / 32;
  Ahead<true> ahead;
  const auto load_ahead = [&] {
    if (mover == 0 && is_elected() && ahead.more(a)) ahead.load_next(a);
  };
  for (int s = 0; s + 2 < a.stages; ++s) load_ahead();
  const auto move = [&](const Plane& v, uint32_t to) {
    if (v.before == 0) return;
    constexpr int kStep = 32 * kMovedUnits;
    const int units = v.bytes / kUnit;
    for (int begin = 0; begin < units; begin += 2 * kStep) {
      const int first = begin + lane * kMovedUnits, second = first + kStep;
      const auto place = [&](int unit) { return to + unit * kUnit; };
      MovedUnits some(place(min(first, units))), more(place(min(second, units)));
      __syncwarp();
      const auto put = [&](MovedUnits& moved, int first) {
        moved.put(v.before, true, units - first,
                  [&](int u, const uint4& unit) { shared_at<uint4>(place(first + u)) = unit; });
      };
      put(some, first), put(more, second);
    }
  };
  Turn turn;
  for (int number = blockIdx.x; number < a.items(); number += gridDim.x) {
    const Item item(a, number);
    for (int image = item.first; image < item.last; image += a.stage_images(), turn.next(a.stages)) {
      load_ahead();
      wait(a.loaded(turn.stage), turn.parity);
      const int planes = 2 * min(a.stage_images(), item.last - image);
      const uint32_t stage = shared_address(a.first_stage + turn.stage * a.stage_images() * a.image_bytes);
      for (int k = mover; k < planes; k += movers) {
        const uint32_t to = stage + k / 2 * a.image_bytes;
        k % 2 == 0 ? move(a.source, to) : move(a.grad, to + a.grad_at());
      }
      before_bulk_copies();  // to the same place, later
      arrive_together(a.full(turn.stage), lane == 0);
    }
  }
}

// Loads planes by threads, of which this is number `rank`.
template <int kBytes>
__device__ void load_planes(const Planes& a, int rank) {
  Turn turn;
  for (int number = blockIdx.x; number < a.items(); number += gridDim.x) {
    const Item item(a, number);
    for (int image = item.first; image < item.last; image += a.stage_images(), turn.next(a.stages)) {
      const int images = min(a.stage_images(), item.last - image), barrier = a.full(turn.stage);
      const uint32_t stage = shared_address(a.first_stage + turn.stage * a.stage_images() * a.image_bytes);
      const auto load = [&](const Plane& v, int channel, uint32_t to) {
        const int at = rank % v.lanes * kBytes, begin = rank / v.lanes, step = a.loaders / v.lanes;
        const char* from = v.base + channel * v.channel_bytes + (image + begin) * v.image_bytes;
        to += begin * a.image_bytes;
        for (int k = begin; k < images; k += step, from += step * v.image_bytes, to += step * a.image_bytes)
#pragma unroll 4
          for (int i = at; i < v.bytes; i += v.lanes * kBytes) begin_copy<kBytes>(to + i, from + i);
      };
      wait(a.empty(turn.stage), turn.parity ^ 1);
      load(a.source, item.filter / a.multiplier, stage);
      load(a.grad, item.filter, stage + a.grad_at());
      arrive_after_copies(barrier);
    }
  }
}

template <typename T, Way way, Load load>
__global__ void __launch_bounds__(32 * warps_of(way), 1) outer_planes(const __grid_constant__ Planes a) {
#if __CUDA_ARCH__ >= 900
  constexpr uint32_t kOnes = std::is_same_v<T, __half> ? 0x3c003c00u : 0x3f803f80u;
  constexpr bool bulk = load != Load::kThreads, moves = load == Load::kMoved;
  let_next_kernel_start();
  const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0), warps = a.shifts * a.shares;
  if (threadIdx.x == 0)
    for (int s = 0; s < a.stages; ++s) {
      init_barrier(a.full(s), moves ? a.loaders / 32 * kWarpArrivals : bulk ? 1 : a.loaders);
      if (moves) init_barrier(a.loaded(s), 1);
      init_barrier(a.empty(s), warps * kWarpArrivals);
    }
  if (threadIdx.x < Planes::kZeroBytes / 4) shared<uint32_t>(Planes::kZeros + 4 * threadIdx.x) = 0;
  if constexpr (!bulk)
    for (int i = 16 * threadIdx.x; i < a.stages * a.stage_images() * a.image_bytes; i += 16 * blockDim.x)
      shared<uint4>(a.first_stage + i) = uint4{};
  before_bulk_copies();
  __syncthreads();
  wait_for_kernel_before();
  if (warp >= warps) {
    const int rank = threadIdx.x - 32 * warps;
    if constexpr (moves) {
      move_planes(a, warp - warps);
    } else if constexpr (bulk) {
      if (is_elected())
        for (Ahead<moves> ahead; ahead.more(a);) ahead.load_next(a);
    } else if (a.unit == 8) {
      load_planes<8>(a, rank);
    } else {
      load_planes<4>(a, rank);
    }
    return;
  }

  const uint32_t memory = kept_shared_address(), zeros = memory + Planes::kZeros;
  const int lane = __shfl_sync(~0u, threadIdx.x % 32, threadIdx.x % 32);  // kept as well
  const int share = warp / a.shifts, bias_sums = a.sums + warps * a.sum_bytes;
  // The farther shifts are the less rows they have: each scheduler has some of all.
  const int tap = tap_of(warp % a.shifts, a.shifts, a.reversed);
  const int sums = a.sums + (share * a.shifts + tap) * a.sum_bytes;
  constexpr int kShifts = shifts_of_warp(way);
  Rows rows(a, a.first_shift(a.first_row) + kShifts * tap, kShifts - 1, lane);
  // It loads two stages late, so as not to wait for warps that are slower.
  Ahead<moves> ahead;
  const auto load_ahead = [&] {
    if (warp == 0 && is_elected() && ahead.more(a)) ahead.load_next(a);
  };
  if constexpr (loads_beside(way))
    for (int s = 0; s + 2 < a.stages; ++s) load_ahead();
  int group = 0;
  Turn turn;
#pragma unroll 1
  for (int number = blockIdx.x; number < a.items(); number += gridDim.x) {
    const Item item(a, number);
    const int first_row = item.first_row(a), last_row = item.last_row(a);
    const int first_shift = a.first_shift(first_row), shift = first_shift + kShifts * tap;
    const bool with_bias = a.result.with_bias() && item.group == 0;
    if (item.group != group) rows = Rows(a, shift, kShifts - 1, lane), group = item.group;
    const bool is_needed = shift <= a.last_shift(last_row);  // groups may have fewer shifts
    std::conditional_t<way == Way::kNear, NearProducts<T>, Products<T>> products;
    products.clear();
    float bias[4] = {};
    const auto add_bias = [&](uint32_t grad, int images) {
      for (int k = 0; k < images; ++k)
        for (int i = 512 * tap; i < a.grad.slot; i += 512 * a.shifts) {
          const int at = i + 16 * lane;
          uint32_t g[4];
          load_matrices(g, at < a.grad.slot ? grad + k * a.image_bytes + at : zeros);
          multiply(bias, bias, g, {kOnes, kOnes}, T{});
        }
    };
    int image = item.first;
    struct Part {
      uint32_t source, grad;
      int images;
    };
    // What the warp has of a stage, as soon as it is there.
    const auto begin_stage = [&] {
      int begin = share * a.together, end = begin + a.together;
      if (a.uneven && tap % 2 > 0) (share == 0 ? end : begin) += (tap - 2) * a.together / 2;
      const uint32_t source = memory + a.first_stage + (turn.stage * a.stage_images() + begin) * a.image_bytes;
      const Part part{source, source + a.grad_at(), min(end, item.last - image) - begin};
      if constexpr (loads_beside(way)) load_ahead();
      wait_at(memory + a.full(turn.stage), turn.parity);
      if (with_bias) add_bias(part.grad, part.images);
      return part;
    };
    const auto end_stage = [&] {
      arrive_together_at(memory + a.empty(turn.stage), lane == 0);
      image += a.stage_images(), turn.next(a.stages);
    };
#pragma unroll 1
    while (image < item.last) {
      const auto [source, grad, images] = begin_stage();
      if constexpr (way == Way::kTall) {
        for (int k = 0; k < images * a.image_bytes; k += a.image_bytes)
          if (shift % 2 == 0)
            products.template add_tall<false>(a, shift, grad + k, source + k);
          else
            products.template add_tall<true>(a, shift, grad + k, source + k);
      } else if constexpr (way == Way::kNear) {
        products.add(a, rows, grad, source, is_needed ? images : 0, zeros);
      } else {
        products.add_wide(rows, grad, source, is_needed ? images : 0, zeros);
      }
      end_stage();
    }

    if (moves && a.once) sync_multiplying(32 * warps);  // then nobody reads stages any more
    const auto put = [&](int i, int j, float sum) {
      a.result.put<T>(item.filter, item.split, i * a.tap_short + j * a.tap_long, sum);
    };
    if (with_bias) {
      float total = lane % 4 == 0 ? bias[0] + bias[2] : 0;
      for (int offset = 16; offset > 0; offset /= 2) total += __shfl_xor_sync(~0u, total, offset);
      if (lane == 0) shared<float>(bias_sums + 4 * warp) = total;
    }
    if constexpr (way == Way::kNear) {
#pragma unroll
      for (int s = 0; s < kShifts; ++s) store_diagonals<T>(products.parts[s], sums + s * kNearSumBytes);
#pragma unroll 1
      for (int s = 0; s < kShifts; ++s)
        if (const int i = shift + s + a.padding_short; i < last_row)
          for (int j = lane; j < a.kernel_long; j += 32) {
            float sum = sum_of_diagonal(sums + s * kNearSumBytes, j - a.padding_long);
            if (!is_finite(sum)) sum = sum_by_products<T>(a, item, i, j);
            put(i, j, sum);
          }
      __syncwarp();
      if (with_bias) sync_multiplying(32 * warps);
    } else {
      products.store(sums);
      sync_multiplying(32 * warps);
      for (int k = threadIdx.x; k < (last_row - first_row) * a.kernel_long; k += 32 * warps) {
        const int i = first_row + k / a.kernel_long, j = k % a.kernel_long;
        float sum = sum_of_tap(a, first_shift, i, j);
        if (!bulk && way != Way::kTall && !is_finite(sum)) sum = sum_by_products<T>(a, item, i, j);
        put(i, j, sum);
      }
    }
    // Taps that never meet the images.
    if (item.group == 0)
      for (int i = warp; i < a.kernel_short; i += warps)
        if (i < a.first_row || i >= a.last_row)
          for (int j = lane; j < a.kernel_long; j += 32) put(i, j, 0);
    if (with_bias && threadIdx.x == 0) {
      float sum = 0;
      for (int w = 0; w < warps; ++w) sum += shared<float>(bias_sums + 4 * w);
      a.result.put<T>(item.filter, item.split, a.kernel_short * a.kernel_long, sum);
    }
    if (way != Way::kNear || with_bias) sync_multiplying(32 * warps);
  }
#endif
}

// The rows that the busiest of four schedulers has, each of which has every fourth warp.
int busiest(const Planes& a, Way way, bool reversed) {
  int rows[4] = {};
  for (int warp = 0; warp < a.shifts; ++warp)
    for (int k = 0; k < shifts_of_warp(way); ++k) {
      const int shift = a.first_shift(a.first_row) + shifts_of_warp(way) * tap_of(warp, a.shifts, reversed) + k;
      rows[warp % 4] += std::max(std::min(a.grad.summed, a.source.summed - shift) - std::max(-shift, 0), 0);
    }
  return *std::max_element(rows, rows + 4);
}

// Into how many parts the images are divided.
int splits_for(const Planes& a, Way way, int multiprocessors) {
  constexpr int kLongest = 12 << 10;  // products of a sum in float32: longer ones lose digits
  const int fewest = static_cast<int>(
      std::clamp<int64_t>(ceil_div(int64_t{a.images} * a.grad.summed / a.shares, kLongest), 1, a.images));
  const double multiplications = a.shifts * multiplications_of(way) * static_cast<double>(a.grad.summed) / 16;
  const double image = std::max(1.8 * multiplications, a.image_bytes / 13.);
  int best = fewest;
  double least = INFINITY;
  for (int splits = fewest; splits <= std::min(a.images, fewest + 64); ++splits) {
    const auto rounds = static_cast<double>(ceil_div(int64_t{a.filters} * a.groups * splits, multiprocessors));
    const double item = static_cast<double>(ceil_div(a.images, splits)) * image + 2000;
    const double cost = rounds * item + (splits > 1 ? 5000 + 10. * splits : 0);
    if (cost < least) least = cost, best = splits;
  }
  return best;
}

template <typename T, Way way, Load load>
void launch(const Problem& p, const Planes& a, int64_t shared_bytes, cudaStream_t stream) {
  const auto kernel = outer_planes<T, way, load>;
  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
  const int64_t blocks = std::min<int64_t>(a.items(), current_device().multiprocessors);
  const int threads = 32 * a.shifts * a.shares + a.loaders;
  launch_early(kernel, a, blocks, threads, stream, {.shared_bytes = shared_bytes});
  check_launch("outer_planes");
  launch_add_partial_sums(p, a.result, a.splits, stream);
}

}  // namespace

bool launch_outer_grad_weight_planes(const Problem& p, bool exchanged, bool tall, const ImagePlanes& source,
                                     const ImagePlanes& grad, const Allocate& allocate, cudaStream_t stream) {
  const Device& device = current_device();
  if (device.capability < 90 || !can_overlap(outer_planes<__half, Way::kWide, Load::kBulk>))
    return false;  // bulk copies
  const OuterSizes sizes = OuterSizes::of(p, false);
  Planes a{};
  const auto can_fold = [&](int rows) {
    const auto fits = [&](const ImagePlanes& v) { return rows * v.width <= kLong && 2 * rows * v.width % 16 == 0; };
    return fits(source) && fits(grad);
  };
  a.folded = tall ? 1 : can_fold(4) ? 4 : can_fold(2) ? 2 : 1;
  a.fold_bits = a.folded / 2;
  a.unit = std::min({source.unit, grad.unit, 8});
  bool bulk = true;  // copies, of whole units
  const auto arrange = [&](Plane& v, const ImagePlanes& from) {
    v.base = from.base, v.image_bytes = from.image_bytes, v.channel_bytes = from.channel_bytes;
    v.pitch = 2 * a.folded * from.width, v.bytes = 2 * from.height * from.width;
    v.summed = tall ? from.width : static_cast<int>(ceil_div(from.height, a.folded));
    v.width = tall ? from.height : from.width;
    v.slot = static_cast<int>(round_up(v.bytes, v.pitch));
    v.before = static_cast<int>(reinterpret_cast<uintptr_t>(v.base) % kUnit);
    bulk &= v.bytes == v.slot && (v.image_bytes | v.channel_bytes) % kUnit == 0;
    const int columns = v.width * a.folded;
    return from.row_bytes == 2 * from.width && v.pitch % 16 == 0 && columns <= kLong && 2 * columns > kLong;
  };
  if (!arrange(a.source, source) || !arrange(a.grad, grad)) return false;
  if (a.source.before + a.grad.before > 0) {
    // Narrow planes, where they begin elsewhere, go another way.
    a.moves = bulk && a.folded == 1 && has_ends(p.batch, source.image_bytes, p.channels, source.channel_bytes) &&
              has_ends(p.batch, grad.image_bytes, p.filters(), grad.channel_bytes);
    bulk = a.moves;
  }
  if (!bulk && a.unit < 4) return false;
  a.kernel_short = static_cast<int>(p.kernel_h), a.kernel_long = static_cast<int>(p.kernel_w);
  a.padding_short = static_cast<int>(p.padding_h), a.padding_long = static_cast<int>(p.padding_w);
  a.tap_short = exchanged ? 1 : a.kernel_long, a.tap_long = exchanged ? a.kernel_short : 1;
  a.first_row = static_cast<int>(sizes.first_row()), a.last_row = static_cast<int>(sizes.last_row());
  a.images = static_cast<int>(p.batch), a.filters = static_cast<int>(p.filters());
  a.multiplier = static_cast<int>(p.multiplier);

  // Which rows of the kernel a block has: as many as it has warps for.
  Way way = tall ? Way::kTall : Way::kWide;
  int loading = bulk && !a.moves ? 1 : kFewestLoaders / 32;
  const auto shifts_of = [&](int groups) {
    a.groups = groups, a.group_rows = static_cast<int>(ceil_div(a.last_row - a.first_row, groups));
    int shifts = 0;
    for (int row = a.first_row; row < a.last_row; row += a.group_rows)
      shifts = std::max(shifts, a.last_shift(std::min(row + a.group_rows, a.last_row)) - a.first_shift(row) + 1);
    return static_cast<int>(ceil_div(shifts, shifts_of_warp(way)));
  };
  a.shifts = shifts_of(1);  // of warps
  if (bulk && !a.moves && !tall && a.source.width == kLong && a.grad.width == kLong &&
      a.shifts > warps_of(way) - loading && a.padding_long <= kNear && a.kernel_long - 1 - a.padding_long <= kNear)
    way = Way::kNear, loading = 0, a.shifts = shifts_of(1);
  const int most = warps_of(way) - loading;
  const bool near = way == Way::kNear;
  constexpr int kMostGroups = 2;
  if (near && a.shifts > most) a.shifts = shifts_of(kMostGroups);
  if (a.shifts > most) return false;
  // Against hankel_grad_weight, whose multiplications take longer: those for a row of 16 images.
  const double multiplications = a.shifts * a.groups * multiplications_of(way);
  const double others = 16. * ceil_div(a.grad.width, 16) * ceil_div(a.kernel_short, 8) * ceil_div(a.kernel_long, 16);
  if (near && multiplications > 1.25 * others) return false;
  a.together = tall ? 1 : std::clamp((near ? 4 : 2) * kLong / a.grad.summed, 1, 16);
  a.shares = near ? 1 : static_cast<int>(std::min<int64_t>(most / a.shifts, ceil_div(a.images, a.together)));
  // Ten warps: with as many images for all, two of four schedulers would have three warps' work, and two have two's.
  a.uneven = bulk && !tall && a.shifts == 5 && a.shares == 2;
  a.reversed = a.shares == 1 && busiest(a, way, true) < busiest(a, way, false);
  const bool few = warps_of(way) - a.shifts * a.shares < kMostLoaders / 32;
  a.loaders = loads_beside(way) ? 0 : bulk && !a.moves ? 32 : few ? kFewestLoaders : kMostLoaders;
  for (Plane* v : {&a.source, &a.grad})
    v->lanes = v->bytes > 64 * a.unit ? a.loaders : v->bytes > 32 * a.unit ? 64 : 32;
  // A filter's products have to be worth to be added up. Cycles, about: for each number that a thread adds, and
  // for each multiplication of a multiprocessor.
  const int64_t taps_of_thread = ceil_div(a.group_rows * a.kernel_long, 32 * a.shifts * a.shares);
  const double adding = near ? 0 : 36. * static_cast<double>(taps_of_thread) * a.folded * a.grad.width * a.shares;
  const double multiplying = 2.75 * multiplications_of(way) * a.shifts * a.grad.summed / 16 * a.images;
  if (3 * adding > multiplying) return false;
  a.sum_bytes = near ? 2 * kNearSumBytes : kSumBytes;
  a.sums = Planes::kZeros + Planes::kZeroBytes;
  const int64_t sums_end = a.sums + int64_t{a.shifts} * a.shares * (a.sum_bytes + 4);
  a.gap = a.moves ? kUnit : 0;
  a.image_bytes = a.source.slot + a.grad.slot + 2 * a.gap;
  a.splits = splits_for(a, way, device.multiprocessors), a.once = a.moves && a.items() <= device.multiprocessors;
  a.first_stage = static_cast<int>(round_up(a.once ? a.sums : sums_end, 128));
  // What is read beyond planes is still a block's.
  const int beyond =
      std::max(64 * std::max(a.source.pitch, a.grad.pitch) + 128 - std::min(a.source.slot, a.grad.slot), 256);
  const int64_t room = device.shared_per_block - a.first_stage - beyond, image = int64_t{a.shares} * a.image_bytes;
  const int few_stages = loads_beside(way) ? 4 : 3;
  const int fewest = a.uneven ? 2 : 1;
  while (a.together > fewest && room / (image * a.together) < few_stages) --a.together;
  const int64_t stage = image * a.together;
  a.stages = static_cast<int>(std::min<int64_t>(room / stage, kMaxStages));
  if (a.stages < (loads_beside(way) ? 4 : 2)) return false;
  a.result = weight_sums(p, a.splits, allocate);
  const int64_t shared_bytes = std::max(a.first_stage + a.stages * stage + beyond, sums_end);
  visit_dtype(p.dtype, [&](auto zero) {
    using T = decltype(zero);
    if constexpr (sizeof(T) == 2) {
      if (near) return launch<T, Way::kNear, Load::kBulk>(p, a, shared_bytes, stream);
      const auto go = [&]<Load load>() {
        if (tall) return launch<T, Way::kTall, load>(p, a, shared_bytes, stream);
        launch<T, Way::kWide, load>(p, a, shared_bytes, stream);
      };
      if (a.moves) return go.template operator()<Load::kMoved>();
      if (bulk) return go.template operator()<Load::kBulk>();
      go.template operator()<Load::kThreads>();
    }
  });
  return true;
}

}  // namespace dwconv
