// grad_weight (and the bias gradient) of small kernels in 16 bits on small planes, on tensor cores, as sums over
// images.
//
// With all pixels of a plane in a row, A[m][n] = input[n][m] and B[n][k] = gradient[n][k], the product has the sums of
// every pixel of the input with every one of the gradient, of which a tap's sum is those that are as far from each
// other as it says: whatever pairs no tap has is never added. So there is nothing to lay anew, and planes lie in shared
// memory as they do in memory: a block has some of them, of 16 images at a time, and matrices begin where 16 bytes do,
// before or where a plane begins, wherever the arrays do. Two warps do nothing but load: by bulk copies on sm_90 and
// later, by cp.async before.
//
// Products are of 16 pixels of the input by 8 of the gradient, of those that are near enough. Of planes of at most 49
// pixels all of them stay in registers, 22 for 7x7 and 13 for 3x3, as they do at stride 2 for 49 gradients, by two
// warps. Planes of 14 x 14 have 72 for 3x3 and 154 for 7x7: 7 times 8 gradients are 4 rows, so products of gradients so
// far apart are of the same columns, and are added up. So are those of planes of 28 columns, of which 7 times 8
// gradients are 2 rows, by as many warps as it takes.
#include "flat_grad_weight_nchw.h"

#include <algorithm>

#include "image_sums.cuh"
#include "shifted_runs.cuh"

namespace dwconv {
namespace {

constexpr int kPixels = 8;                        // of 16 bytes
constexpr int kMaxStages = 8;                     // of 16 images
constexpr int kLoaders = 2;                       // warps: of the input, of the gradient
constexpr int kFull = 0, kDone = 8 * kMaxStages;  // where barriers are
constexpr int kNothing = 16 * kMaxStages;         // 16 bytes of zeros
constexpr int kSide = 14, kWideColumns = 28;      // of larger planes
// Pixels from one of the input to one of the gradient that it is multiplied with, of kernels of 3 x 3 and of 7 x 7 on
// planes of 7 x 7, and of the latter where the arrays begin at different places within 16 bytes.
constexpr int kNearPixels = 8, kFarPixels = 24, kFarthestPixels = kFarPixels + kPixels - 1;

// An array. A block loads the planes of 16 images to a stage.
struct FlatPlanes {
  const char* base;          // of the 16 bytes that the array begins in
  int64_t image_bytes;       // from one image to the next
  int before;                // pixels of these 16 bytes that are before an image
  int pixels;                // of a plane
  int end;                   // where an image's bytes end, from these 16 bytes on
  bool joined;               // what is beside an image are its neighbours
  int run_bytes, row_bytes;  // of planes that are copied together, and from one image to the next in shared memory
  int memory;                // where the first image is in a stage
};

struct Flat : ImageSums {
  FlatPlanes source, grad;
  int groups, splits;
  int planes, run_planes;  // of a block, and of those that are copied together
  int stages, stage_bytes;
  Divider by_columns;  // of the kernel
  int roles;           // warps of a plane of 28 columns
  int units_before;    // from the first 8 pixels that gradients of such a plane are multiplied with on
  bool whole;          // such planes are of whole units of 16 bytes in both arrays
  uint64_t rows;       // a bit for the first pixel of each row of a plane of at most 49 pixels
  bool bulk;           // copies
};

// A plane of a block.
struct FlatPlane {
  int source, grad;                // where the 16 bytes are in a stage that its first pixel is in
  int source_before, grad_before;  // pixels of the plane before, in these
};

// Where a lane's rows of matrices begin: of 16 pixels of 16 images of the input, of twice 8 of the gradient that are
// `step` bytes apart.
__device__ inline uint32_t source_rows(const Flat& a, const FlatPlane& plane) {
  const int lane = threadIdx.x % 32;
  return shared_address(plane.source) + (lane % 8 + lane / 16 * 8) * a.source.row_bytes + lane / 8 % 2 * kUnit;
}
__device__ inline uint32_t grad_rows(const Flat& a, const FlatPlane& plane, int step) {
  const int lane = threadIdx.x % 32;
  return shared_address(plane.grad) + lane % 16 * a.grad.row_bytes + lane / 16 * step;
}

// Adds a lane's part of a plane's gradients of 16 images.
template <typename T>
__device__ void add_bias(const Flat& a, const FlatPlane& plane, int stage, float& bias) {
  const int lane = threadIdx.x % 32;
  const int from = stage + plane.grad + lane % kImages * a.grad.row_bytes + 2 * plane.grad_before;
  for (int at = lane / kImages; at < a.grad.pixels; at += 2) bias += widen(shared<T>(from + 2 * at));
}

// Planes of at most 49 pixels. kReach: pixels from one of the input to one of the gradient that it is multiplied with,
// at most.
template <typename T, int kReach>
struct AllPairs {
  static constexpr int kRoles = 1, kMaxPlanes = 6;              // warps of a plane, planes of a block
  static constexpr int kBlocks = kReach <= kFarPixels ? 2 : 1;  // together on a multiprocessor
  static constexpr int kUnits = 7, kTiles = (kUnits + 1) / 2;
  static constexpr int kPitch = kPixels * kUnits;  // of a plane's product, in floats
  static constexpr int kProductBytes = 4 * kPixels * kUnits * kPitch;
  static constexpr bool kExact = true;  // nothing is multiplied by zero

  static constexpr bool needed(int m, int k) {
    return 8 * k + 7 >= 16 * m - kReach && 8 * k <= (16 * m + 16 < 8 * kUnits ? 16 * m + 15 : 8 * kUnits - 1) + kReach;
  }

  template <int kRole>
  struct Part {
    float sum[kTiles][kUnits][4] = {}, bias = 0;
    const FlatPlane plane;
    const uint32_t source, grad;

    __device__ Part(const Flat& a, const FlatPlane& plane)
        : plane(plane), source(source_rows(a, plane)), grad(grad_rows(a, plane, kUnit)) {}

    __device__ void add(const Flat& a, int stage) {
      uint32_t g[kUnits + 1][2];
#pragma unroll
      for (int k = 0; k < kUnits - 1; k += 2) {
        uint32_t both[4];
        load_matrices_transposed(both, grad + stage + k * kUnit);
#pragma unroll
        for (int e = 0; e < 4; ++e) g[k + e / 2][e % 2] = both[e];
      }
      load_two_transposed(g[kUnits - 1][0], g[kUnits - 1][1], grad + stage + (kUnits - 1) * kUnit);
#pragma unroll
      for (int m = 0; m < kTiles; ++m) {
        uint32_t x[4];
        load_matrices_transposed(x, source + stage + 2 * m * kUnit);
#pragma unroll
        for (int k = 0; k < kUnits; ++k)
          if (needed(m, k)) multiply(sum[m][k], sum[m][k], x, g[k], T{});
      }
      if (a.result.with_bias()) add_bias<T>(a, plane, stage, bias);
    }

    __device__ void put(const Flat&, int place) {
      const int lane = threadIdx.x % 32, put = place + 4 * (lane / 4 * kPitch + lane % 4 * 2);
#pragma unroll
      for (int m = 0; m < kTiles; ++m)
#pragma unroll
        for (int k = 0; k < kUnits; ++k)
#pragma unroll
          for (int e = 0; e < 2; ++e)
            if (needed(m, k) && 2 * m + e < kUnits)
              shared<float2>(put + 4 * (8 * (2 * m + e) * kPitch + 8 * k)) = {sum[m][k][2 * e], sum[m][k][2 * e + 1]};
    }
    __device__ float total_bias() const { return sum_of_lanes(bias); }
  };

  // Which pixels of the input have one of the gradient so many rows above and columns to the left, a bit each.
  static __device__ uint64_t pixels_of(const Flat& a, int y, int x) {
    const int top = max(y, 0), bottom = min(a.height + y, a.height);
    const int left = max(x, 0), right = min(a.width + x, a.width);
    if (top >= bottom || left >= right) return 0;
    const uint64_t rows = a.rows & (uint64_t{1} << bottom * a.width) - (uint64_t{1} << top * a.width);
    return rows * ((1u << right) - (1u << left));
  }

  // The sum of a tap that has pixels of the input so many rows below and columns to the right.
  static __device__ float tap(const Flat& a, const FlatPlane& plane, int place, int y, int x) {
    constexpr int kAtOnce = 14;  // products that are added before it is seen whether there are more
    uint64_t pixels = pixels_of(a, y, x) << plane.source_before;
    int at = place - (pixels == 0 ? 0 : 4 * (y * a.width + x + plane.source_before - plane.grad_before));
    float total = 0;
#pragma unroll 1
    for (; pixels != 0; pixels >>= kAtOnce, at += 4 * kAtOnce * (kPitch + 1))
#pragma unroll
      for (int k = 0; k < kAtOnce; ++k) {
        const float value = shared<float>(at + 4 * k * (kPitch + 1));
        if (pixels >> k & 1) total += value;
      }
    return total;
  }
};

// Planes of 14 x 14. 8 gradients are multiplied with kTiles times 16 pixels, from so many times 8 before them on; tiles
// begin at even or at odd multiples of 8 pixels, as the gradients do. What is outside the plane becomes zero.
// kAnywhere: whether planes begin elsewhere than at the first and the fifth of 8 pixels.
template <typename T, int kBefore, bool kAnywhere>
struct Folded {
  static constexpr int kTiles = kBefore + 1, kRoleTiles = kTiles <= 3 ? kTiles : (kTiles + 1) / 2;
  static constexpr int kRoles = (kTiles + kRoleTiles - 1) / kRoleTiles;
  static constexpr int kMaxPlanes = kRoles == 1 ? 8 : kTiles <= 5 ? 5 : 4, kBlocks = 1;
  static constexpr int kWhole = kSide * kSide / kPixels;  // units of a plane, and half of one
  static constexpr int kUnits = kWhole + 1 + kAnywhere;   // that a plane is part of wherever it begins
  static constexpr int kPhases = kSide / 2;               // so many times 8 gradients on, they are in the same columns
  static constexpr int kPitch = kPixels + 1, kPhaseBytes = 4 * 2 * kPixels * kTiles * kPitch;
  static constexpr int kProductBytes = kPhases * kPhaseBytes;
  static constexpr bool kExact = false;
  static_assert(kBefore % 2 == 0 && kSide * kSide % kPixels == 4);

  template <int kRole>
  struct Part {
    static constexpr int kFirst = kRole * kRoleTiles;
    static constexpr int kMine = kTiles - kFirst < kRoleTiles ? kTiles - kFirst : kRoleTiles;
    float sum[kPhases][kMine][4] = {}, bias = 0;
    const FlatPlane plane;
    const uint32_t source, grad;
    // Which of the lane's pixels of the first 16 bytes, and of those behind the whole ones, are the plane's.
    struct Ends {
      uint32_t first, last[kUnits - kWhole];

      __device__ explicit Ends(int before) {
        const int pixel = threadIdx.x % 32 / 4;
        first = pixel >= before ? ~0u : 0;
#pragma unroll
        for (int i = 0; i < kUnits - kWhole; ++i) last[i] = pixel + i * kPixels < before + kPixels / 2 ? ~0u : 0;
      }
      __device__ void keep(uint32_t& pixels, int unit) const {
        if (unit < 0 || unit >= kUnits) pixels = 0;
        if (unit == 0) pixels &= first;
        if (unit >= kWhole && unit < kUnits) pixels &= last[unit - kWhole];
      }
    } in_source, in_grad;

    __device__ Part(const Flat& a, const FlatPlane& plane)
        : plane(plane),
          source(source_rows(a, plane)),
          grad(grad_rows(a, plane, 2 * kUnit)),
          in_source(plane.source_before),
          in_grad(kAnywhere ? plane.grad_before : plane.source_before) {}

    __device__ void add(const Flat& a, int stage) {
#pragma unroll
      for (int odd = 0; odd < 2; ++odd) {
        uint32_t g[kUnits / 2 + 2][2];  // 8 gradients 16 apart
#pragma unroll
        for (int begin = -odd; begin < kUnits; begin += 2) {
          // As far as this tile needs them.
          const int newest = begin + kBefore - 2 * kFirst;
#pragma unroll
          for (int k = odd; k < kUnits; k += 4) {
            const bool now = begin == -odd ? k <= newest : k == newest;
            if (!now) continue;
            uint32_t both[4];
            load_matrices_transposed(both, grad + stage + k * kUnit);
#pragma unroll
            for (int e = 0; e < 4; ++e) {
              const int unit = k + e / 2 * 2;
              in_grad.keep(both[e], unit);
              g[unit / 2][e % 2] = both[e];
            }
          }
          uint32_t x[4];
          load_matrices_transposed(x, source + stage + begin * kUnit);
#pragma unroll
          for (int e = 0; e < 4; ++e) in_source.keep(x[e], begin + e % 2);
#pragma unroll
          for (int tile = 0; tile < kMine; ++tile) {
            const int k = begin + kBefore - 2 * (kFirst + tile);
            if (k < 0 || k >= kUnits) continue;
            multiply(sum[k % kPhases][tile], sum[k % kPhases][tile], x, g[k / 2], T{});
          }
        }
      }
      if (kRole == 0 && a.result.with_bias()) add_bias<T>(a, plane, stage, bias);
    }

    __device__ void put(const Flat&, int place) {
      const int lane = threadIdx.x % 32;
      const int put = place + 4 * ((2 * kPixels * kFirst + lane / 4) * kPitch + lane % 4 * 2);
#pragma unroll
      for (int phase = 0; phase < kPhases; ++phase)
#pragma unroll
        for (int tile = 0; tile < kMine; ++tile)
#pragma unroll
          for (int e = 0; e < 4; ++e)
            shared<float>(put + phase * kPhaseBytes + 4 * ((2 * tile + e / 2) * kPixels * kPitch + e % 2)) =
                sum[phase][tile][e];
    }
    __device__ float total_bias() const { return sum_of_lanes(bias); }
  };

  static __device__ float tap(const Flat&, const FlatPlane& plane, int place, int y, int x) {
    constexpr uint32_t kAll = (1u << kSide) - 1;
    // A bit for each column of the gradient, from that of the first product on.
    const uint32_t columns = x > 0 ? kAll >> min(x, kSide) : kAll & kAll << min(-x, kSide);
    const uint32_t valid = columns << plane.grad_before | columns >> (kSide - plane.grad_before);
    const int from = place + 4 * (y * kSide + x + plane.source_before - plane.grad_before + kPixels * kBefore) * kPitch;
    float total = 0;
#pragma unroll
    for (int phase = 0; phase < kPhases; ++phase)
#pragma unroll
      for (int k = 0; k < kPixels; ++k) {
        const float value = shared<float>(from + phase * kPhaseBytes + 4 * k * (kPitch + 1));
        if (valid >> (phase * kPixels + k) % kSide & 1) total += value;
      }
    return total;
  }
};

// 7 x 7 gradients at stride 2 of planes of 14 x 14. 8 gradients, of two rows, are multiplied with so many tiles of 16
// pixels from where the first of them has its first tap's on.
template <typename T>
struct Strided {
  static constexpr int kRoles = 2, kMaxPlanes = 6, kBlocks = 1;
  static constexpr int kOutSide = kSide / 2, kUnits = 7, kRoleUnits = 4, kTiles = 7;
  // Of a gradient's products tap sums need these, from kLeft pixels before the fourfold of its number on.
  static constexpr int kLeft = 42, kPitch = 73;
  static constexpr int kProductBytes = 4 * kPixels * kUnits * kPitch;
  static constexpr bool kExact = true;

  // Where the pixels begin that 8 gradients are multiplied with, in units of 8.
  static __device__ int first_unit(const Flat& a, const FlatPlane& plane, int k) {
    const int row = max(kPixels * k - plane.grad_before, 0) / kOutSide;
    return max((2 * row - a.padding_h) * kSide + plane.source_before, 0) / kPixels;
  }

  template <int kRole>
  struct Part {
    static constexpr int kFirst = kRole * kRoleUnits;
    static constexpr int kMine = kUnits - kFirst < kRoleUnits ? kUnits - kFirst : kRoleUnits;
    float sum[kMine][kTiles][4] = {}, bias = 0;
    const FlatPlane plane;
    uint32_t source[kMine];
    const uint32_t grad;

    __device__ Part(const Flat& a, const FlatPlane& plane) : plane(plane), grad(grad_rows(a, plane, kUnit)) {
#pragma unroll
      for (int k = 0; k < kMine; ++k) source[k] = source_rows(a, plane) + first_unit(a, plane, kFirst + k) * kUnit;
    }

    __device__ void add(const Flat& a, int stage) {
      uint32_t g[kRoleUnits][2];
#pragma unroll
      for (int k = 0; k < kMine; k += 2) {
        uint32_t both[4];
        load_matrices_transposed(both, grad + stage + (kFirst + k) * kUnit);
#pragma unroll
        for (int e = 0; e < 4; ++e) g[k + e / 2][e % 2] = both[e];
      }
#pragma unroll
      for (int k = 0; k < kMine; ++k)
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile) {
          uint32_t x[4];
          load_matrices_transposed(x, source[k] + stage + 2 * tile * kUnit);
          multiply(sum[k][tile], sum[k][tile], x, g[k], T{});
        }
      if (kRole == 0 && a.result.with_bias()) add_bias<T>(a, plane, stage, bias);
    }

    __device__ void put(const Flat& a, int place) {
      const int lane = threadIdx.x % 32;
#pragma unroll
      for (int k = 0; k < kMine; ++k) {
        const int unit = kFirst + k;
        const int from = first_unit(a, plane, unit) * kPixels + lane / 4 - plane.source_before;
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int gradient = unit * kPixels + lane % 4 * 2 + e,
                    left = from - 4 * (gradient - plane.grad_before) + kLeft;
          const int row = place + 4 * (gradient * kPitch + left);
#pragma unroll
          for (int at = 0; at < 2 * kTiles; ++at)
            if (static_cast<uint32_t>(left + at * kPixels) < static_cast<uint32_t>(kPitch))
              shared<float>(row + 4 * at * kPixels) = sum[k][at / 2][at % 2 * 2 + e];
        }
      }
    }
    __device__ float total_bias() const { return sum_of_lanes(bias); }
  };

  static __device__ float tap(const Flat&, const FlatPlane& plane, int place, int y, int x) {
    int from = place + 4 * (plane.grad_before * kPitch + kLeft + y * kSide + x);
    float total = 0;
#pragma unroll 1
    for (int r = 0; r < kOutSide; ++r, from += 4 * (kOutSide * (kPitch - 4) + 2 * kSide)) {
      const bool inside = static_cast<uint32_t>(2 * r + y) < static_cast<uint32_t>(kSide);
#pragma unroll
      for (int v = 0; v < kOutSide; ++v)
        if (inside && static_cast<uint32_t>(2 * v + x) < static_cast<uint32_t>(kSide))
          total += shared<float>(from + 4 * v * (kPitch - 2));
    }
    return total;
  }
};

// Planes of 28 columns. A warp has kTiles times 16 pixels of those that 8 gradients are multiplied with, and a plane as
// many warps as that takes. They go through it twice, from even and from odd multiples of 8 pixels on, 7 times 8
// gradients in each turn of a loop. What is outside the plane is read from zeros, and becomes zero in the 16 bytes that
// it shares with it.
template <typename T>
struct Sliding {
  static constexpr int kRoles = 0, kMaxRoles = 4, kMaxPlanes = 2, kBlocks = 1;  // kRoles: as many as it takes
  static constexpr int kPhases = 7, kTiles = 3;
  static constexpr int kPitch = kPixels + 1;
  static constexpr bool kExact = false;

  static __host__ __device__ int phase_bytes(const Flat& a) { return 4 * 2 * kPixels * kTiles * a.roles * kPitch; }

  struct Part {
    float sum[kPhases][kTiles][4] = {}, bias = 0;
    const FlatPlane plane;
    const uint32_t source, grad;
    const int role, source_units, grad_units;
    const int ahead;  // the first gradients that the warp multiplies 16 pixels with, in units from there on

    __device__ Part(const Flat& a, const FlatPlane& plane, int role)
        : plane(plane),
          source(source_rows(a, plane)),
          grad(grad_rows(a, plane, 0)),
          role(role),
          source_units((plane.source_before + a.source.pixels + kPixels - 1) / kPixels),
          grad_units((plane.grad_before + a.grad.pixels + kPixels - 1) / kPixels),
          ahead(a.units_before - 2 * kTiles * role) {}

    // Makes zero what is not the plane's in its first and its last 16 bytes.
    __device__ void clear_ends(const Flat& a, int stage) const {
      const int lane = threadIdx.x % 32, last = lane / kImages;
      for (int array = role; array < 2; array += a.roles) {
        const bool input = array == 0;
        const int units = input ? source_units : grad_units, before = input ? plane.source_before : plane.grad_before;
        const int from = last == 0 ? before : 0;
        const int to = last == 0 ? kPixels : before + (input ? a.source.pixels : a.grad.pixels) - (units - 1) * kPixels;
        const int place = stage + (input ? plane.source : plane.grad) + last * (units - 1) * kUnit +
                          lane % kImages * (input ? a.source.row_bytes : a.grad.row_bytes);
        const auto keep = [&](int pixel) { return pixel >= from && pixel < to; };
#pragma unroll
        for (int w = 0; w < 4; ++w)
          shared<uint32_t>(place + 4 * w) &= (keep(2 * w) ? 0xffffu : 0) | (keep(2 * w + 1) ? 0xffff0000u : 0);
      }
      before_bulk_copies();  // to the same place
      asm volatile("bar.sync %0, %1;" ::"r"(1 + static_cast<int>(threadIdx.x) / (32 * a.roles)), "r"(32 * a.roles)
                   : "memory");
    }

    template <int kOdd>
    __device__ void add_half(int stage) {
      constexpr int kAhead = 2;  // tiles that are loaded ahead of multiplications
      static_assert(kTiles + kAhead <= kPhases);
      const uint32_t zeros = shared_address(kNothing);
      int unit = static_cast<int>(threadIdx.x) / 8 % 2 - kOdd, k = ahead - kOdd - 2 * (kTiles - 1);
      uint32_t source_at = source + stage - kOdd * kUnit, grad_at = grad + stage + k * kUnit;
      uint32_t x[kPhases][4], g[kPhases][2];  // in turns
      const auto load_grad = [&](uint32_t (&g)[2]) {
        load_two_transposed(g[0], g[1], static_cast<uint32_t>(k) < static_cast<uint32_t>(grad_units) ? grad_at : zeros);
        k += 2, grad_at += 2 * kUnit;
      };
      const auto load = [&](int i) {
        load_grad(g[i]);
        load_matrices_transposed(x[i],
                                 static_cast<uint32_t>(unit) < static_cast<uint32_t>(source_units) ? source_at : zeros);
        unit += 2, source_at += 2 * kUnit;
      };
      const auto add = [&](int i) {
        load((i + kAhead) % kPhases);
#pragma unroll
        for (int t = 0; t < kTiles; ++t) {
          float (&to)[4] = sum[(2 * (i - t) - kOdd + 2 * kPhases) % kPhases][t];
          multiply(to, to, x[i], g[(i - t + kPhases) % kPhases], T{});
        }
      };
#pragma unroll
      for (int i = 1 - kTiles; i < 0; ++i) load_grad(g[i + kPhases]);
#pragma unroll
      for (int i = 0; i < kAhead; ++i) load(i);
      int left = (source_units + kOdd + 1) / 2;
#pragma unroll 1
      for (; left >= kPhases; left -= kPhases)
#pragma unroll
        for (int i = 0; i < kPhases; ++i) add(i);
#pragma unroll
      for (int i = 0; i < kPhases - 1; ++i) {
        if (i >= left) break;
        add(i);
      }
    }

    __device__ void add(const Flat& a, int stage) {
      if (!a.whole) clear_ends(a, stage);
      add_half<0>(stage);
      add_half<1>(stage);
      if (role == 0 && a.result.with_bias()) add_bias<T>(a, plane, stage, bias);
    }

    __device__ void put(const Flat& a, int place) {
      const int lane = threadIdx.x % 32, first = ahead % kPhases + kPhases;
      const int put = place + 4 * ((2 * kPixels * kTiles * role + lane / 4) * kPitch + lane % 4 * 2);
#pragma unroll
      for (int phase = 0; phase < kPhases; ++phase) {
        const int to = put + (phase + first) % kPhases * phase_bytes(a);
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile)
#pragma unroll
          for (int e = 0; e < 4; ++e)
            shared<float>(to + 4 * ((2 * tile + e / 2) * kPixels * kPitch + e % 2)) = sum[phase][tile][e];
      }
    }
    __device__ float total_bias() const { return sum_of_lanes(bias); }
  };

  static __device__ float tap(const Flat& a, const FlatPlane& plane, int place, int y, int x) {
    constexpr uint32_t kAll = (1u << kWideColumns) - 1;
    const uint32_t columns = x > 0 ? kAll >> min(x, kWideColumns) : kAll & kAll << min(-x, kWideColumns);
    const uint32_t valid = columns << plane.grad_before | columns >> (kWideColumns - plane.grad_before);
    const int from =
        place +
        4 * (y * kWideColumns + x + plane.source_before - plane.grad_before + kPixels * a.units_before) * kPitch;
    float total = 0;
#pragma unroll
    for (int phase = 0; phase < kPhases; ++phase)
#pragma unroll
      for (int k = 0; k < kPixels; ++k) {
        const float value = shared<float>(from + phase * phase_bytes(a) + 4 * k * (kPitch + 1));
        if (valid >> (phase * kPixels + k) % kWideColumns & 1) total += value;
      }
    return total;
  }
};

// The sum of one tap over some images, again.
template <typename T>
__device__ __noinline__ float sum_by_products(const Flat& a, int filter, int first, int last, int tap) {
  struct Array {
    const char* base;
    int64_t image_bytes;
  };
  const auto array = [](const FlatPlanes& v) { return Array{v.base + 2 * v.before, v.image_bytes}; };
  const auto all = [](int, int) { return true; };
  return sum_of_lanes(
      sum_inside<T>(a, array(a.source), array(a.grad), filter, tap, first, last - first, 0, a.out_height, all));
}

// Of the products of a plane.
template <class Products>
__host__ __device__ int product_bytes(const Flat& a) {
  if constexpr (Products::kRoles == 0)
    return Products::kPhases * Products::phase_bytes(a);
  else
    return Products::kProductBytes;
}

// The barrier of the warps that multiply. Those of a plane may have one of their own, from number 1 on.
constexpr int kWorkers = 3;

// Warps that multiply, of a block.
template <class Products>
constexpr int most_workers() {
  if constexpr (Products::kRoles == 0)
    return Products::kMaxPlanes * Products::kMaxRoles;
  else
    return Products::kMaxPlanes * Products::kRoles;
}

template <typename T, class Products>
__global__ void __launch_bounds__(32 * (most_workers<Products>() + kLoaders), Products::kBlocks)
    flat_grad_weight_nchw(const __grid_constant__ Flat a) {
#if __CUDA_ARCH__ < 800
  if constexpr (sizeof(T) == 2) return;  // it is not launched
#endif
  const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0), lane = threadIdx.x % 32;
  const int workers = blockDim.x / 32 - kLoaders;
  const int group = blockIdx.x % a.groups, split = blockIdx.x / a.groups;
  const Steps mine((a.images + kImages - 1) / kImages, a.splits, split);
  const int first = mine.first, steps = mine.last - first;
  if (threadIdx.x == 0) {
    for (int i = 0; i < a.stages; ++i)
      init_barrier(kFull + 8 * i, kLoaders * ((a.bulk ? 0 : 32) + kWarpArrivals)),
          init_barrier(kDone + 8 * i, workers * kWarpArrivals);
    before_bulk_copies();
  }
  if (threadIdx.x < kUnit / 4) shared<uint32_t>(kNothing + 4 * threadIdx.x) = 0;
  let_next_kernel_start();
  __syncthreads();
  const int first_filter = group * a.planes;
  const auto unit_of = [&](const FlatPlanes& v, int plane) { return (v.before + plane * v.pixels) / kPixels; };
  int stage = 0;
  uint32_t parity = 0;
  const auto next = [&] {
    if (++stage == a.stages) stage = 0, parity ^= 1;
  };

  const int roles = Products::kRoles == 0 ? a.roles : Products::kRoles;
  const int number = warp / roles, role = warp % roles, filter = first_filter + number;
  const auto place_of = [&](const FlatPlanes& v) {
    const int run = Products::kRoles == 0 ? number : 0;
    return kHead + v.memory + run * v.run_bytes + (unit_of(v, filter) - unit_of(v, first_filter + run)) * kUnit;
  };
  const auto before_of = [&](const FlatPlanes& v) { return (v.before + filter * v.pixels) % kPixels; };
  const FlatPlane plane{place_of(a.source), place_of(a.grad), before_of(a.source), before_of(a.grad)};
  // Of the products, when all are added.
  const int place = kHead + number * product_bytes<Products>(a);
  const int taps = a.taps();

  if (warp >= workers) {
    const FlatPlanes& v = warp == workers ? a.source : a.grad;
    wait_for_kernel_before();
#pragma unroll 1
    for (int step = 0; step < steps; ++step, next()) {
      const int image = (first + step) * kImages, images = min(kImages, a.images - image);
      const int full = kFull + 8 * stage, to = kHead + stage * a.stage_bytes + v.memory;
      if (step >= a.stages) wait(kDone + 8 * stage, parity ^ 1);
      for (int n = images; n < kImages; ++n)  // those that are not there are zeros
        for (int at = lane * kUnit; at < v.row_bytes; at += 32 * kUnit)
          shared<uint4>(to + n * v.row_bytes + at) = uint4{};
      __syncwarp();
#pragma unroll 1
      for (int plane = 0; plane < a.planes && first_filter + plane < a.filters; plane += a.run_planes) {
        const int from = unit_of(v, first_filter + plane) * kUnit;
        const int bytes = min(v.run_bytes, (v.end + kUnit - 1) / kUnit * kUnit - from);
        // Nothing outside the array is touched.
        const bool is_first = from == 0 && (image == 0 || !v.joined);
        const bool is_last = from + bytes > v.end && (image + images == a.images || !v.joined);
        load_images(v.base + image * v.image_bytes + from, v.image_bytes, images,
                    to + plane / a.run_planes * v.run_bytes, v.row_bytes, is_first ? 2 * v.before : 0,
                    is_last ? v.end - from : bytes, full, a.bulk);
      }
      if (!a.bulk) arrive_after_copies(full);
      arrive_together(full, is_elected());
      __syncwarp();
    }
    return;
  }

  wait_for_kernel_before();
  const auto work = [&](auto part) {
#pragma unroll 1
    for (int step = 0; step < steps; ++step, next()) {
      wait(kFull + 8 * stage, parity);
      part.add(a, stage * a.stage_bytes);
      arrive_together(kDone + 8 * stage, lane == 0);
    }
    meet<kWorkers>(32 * workers);  // what was loaded has served
    part.put(a, place);
    if (role == 0 && a.result.with_bias()) {
      const float total = part.total_bias();
      if (lane == 0 && filter < a.filters) a.result.put<T>(filter, split, taps, total);
    }
  };
  if constexpr (Products::kRoles == 0) {
    work(typename Products::Part(a, plane, role));
  } else if constexpr (Products::kRoles == 1) {
    work(typename Products::template Part<0>(a, plane));
  } else {
    if (role == 0)
      work(typename Products::template Part<0>(a, plane));
    else
      work(typename Products::template Part<1>(a, plane));
  }
  meet<kWorkers>(32 * workers);
  if (filter >= a.filters) return;
#pragma unroll 1
  for (int begin = role * 32; begin < taps; begin += roles * 32) {
    const int tap = begin + lane;
    float total = 0;
    if (tap < taps) {
      uint32_t row = tap;
      const int x = static_cast<int>(a.by_columns.split(row)) * a.dilation_w - a.padding_w;
      total = Products::tap(a, plane, place, static_cast<int>(row) * a.dilation_h - a.padding_h, x);
    }
    if constexpr (!Products::kExact) {
      // A sum that is finite is right. The others may be of Inf or NaN and a zero.
      uint32_t again = __ballot_sync(~0u, !is_finite(total));
      for (; again; again &= again - 1) {
        const int which = begin + __ffs(again) - 1, end = min((first + steps) * kImages, a.images);
        const float exact = sum_by_products<T>(a, filter, first * kImages, end, which);
        if (tap == which) total = exact;
      }
    }
    if (tap < taps) a.result.put<T>(filter, split, tap, total);
  }
}

template <typename T, class Products>
bool launch(const Problem& p, Flat a, const Device& device, const Allocate& allocate, cudaStream_t stream) {
  const auto kernel = flat_grad_weight_nchw<T, Products>;
  a.bulk = a.bulk && can_overlap(kernel);  // else it is not code for sm_90
  const int64_t steps = ceil_div(a.images, kImages);
  const auto arrange = [&](FlatPlanes& v, int64_t memory) {
    const int64_t pixels = int64_t{a.run_planes} * v.pixels;
    const int64_t units =
        pixels % kPixels == 0 ? pixels / kPixels + (v.before > 0) : (pixels + 2 * kPixels - 2) / kPixels;
    v.run_bytes = static_cast<int>(units * kUnit);
    v.row_bytes = static_cast<int>((a.planes / a.run_planes * units | 1) * kUnit);  // 8 images' in different banks
    v.memory = static_cast<int>(memory);
    return memory + kImages * v.row_bytes;
  };
  const auto stage_of = [&](int planes) {
    a.planes = planes, a.run_planes = Products::kRoles == 0 ? 1 : planes;
    return arrange(a.grad, arrange(a.source, 0));
  };
  const int64_t room = device.shared_per_block - kHead - kTail;
  // As few planes as give all multiprocessors a block, or several one after the other.
  const int least = Products::kExact && Products::kRoles == 1 ? 4 : 1;
  const int roles = Products::kRoles == 0 ? a.roles : Products::kRoles;
  const int64_t product = product_bytes<Products>(a);
  int planes = 0;
  int64_t longest = 0;
  for (int now = least; now <= Products::kMaxPlanes; ++now) {
    const int64_t turns = ceil_div(ceil_div(p.filters(), now), device.multiprocessors) * now;
    if (2 * stage_of(now) > room || now * product > room) break;
    if (planes == 0 || turns <= longest) planes = now, longest = turns;
  }
  if (planes == 0) return false;
  a.stage_bytes = static_cast<int>(stage_of(planes));
  a.groups = static_cast<int>(ceil_div(p.filters(), planes));
  // Memory is faster where less is on its way at once, if it is enough. Where there is a block for each multiprocessor,
  // no two are to share one.
  const int64_t enough = (140 << 10) / (a.groups > device.multiprocessors ? Products::kBlocks : 1);
  a.stages = static_cast<int>(std::min<int64_t>({kMaxStages, steps, std::max<int64_t>(enough / a.stage_bytes, 2)}));
  const int64_t bytes = kHead + std::max<int64_t>(a.stages * a.stage_bytes, planes * product) + kTail;
  const int threads = 32 * (planes * roles + kLoaders);
  static thread_local Decisions<5, Splits> decisions;
  a.splits = decisions({device.id, steps, a.groups, threads, bytes}, [&] {
               // Adding up parts takes longer than some idle multiprocessors, as long as no sum loses digits.
               const Splits several = split_steps(kernel, device, steps, a.groups, threads, bytes, 0);
               return 3 * a.groups >= 2 * device.multiprocessors && steps <= 64 ? Splits{1, false} : several;
             }).count;
  a.result = weight_sums(p, a.splits, allocate);
  launch_early(kernel, a, int64_t{a.groups} * a.splits, threads, stream, {.shared_bytes = bytes});
  check_launch("flat_grad_weight_nchw");
  launch_add_partial_sums(p, a.result, a.splits, stream);
  return true;
}

}  // namespace

bool launch_flat_grad_weight_nchw(const Problem& p, bool bulk, const Allocate& allocate, cudaStream_t stream) {
  const Device& device = current_device();
  const int64_t pixels = p.height * p.width, gradients = p.out_height * p.out_width;
  // All images are to begin at the same place within 16 bytes.
  if (device.capability < 80 || p.multiplier > 1 || p.input.stride[0] % kPixels != 0 ||
      p.output.stride[0] % kPixels != 0)
    return false;
  Flat a{};
  a.bulk = bulk;
  a.take(p);
  a.by_columns = Divider(p.kernel_w);
  const auto arrange = [&](FlatPlanes& v, const View& view, int64_t pixels) {
    const int before = static_cast<int>(reinterpret_cast<uintptr_t>(view.data) % kUnit);  // bytes
    v.base = static_cast<const char*>(view.data) - before, v.image_bytes = 2 * view.stride[0];
    v.before = before / 2, v.pixels = static_cast<int>(pixels);
    v.end = static_cast<int>(before + 2 * p.channels * pixels), v.joined = view.stride[0] == p.channels * pixels;
  };
  arrange(a.source, p.input, pixels), arrange(a.grad, p.output, gradients);

  const auto reach = [](int64_t kernel, int64_t dilation, int64_t padding) {
    return std::max(padding, (kernel - 1) * dilation - padding);
  };
  const int64_t reach_h = reach(p.kernel_h, p.dilation_h, p.padding_h);
  const int64_t reach_w = reach(p.kernel_w, p.dilation_w, p.padding_w);
  // Planes begin at different places within 16 bytes where the arrays do.
  const int64_t apart = a.source.before == a.grad.before ? 0 : kPixels - 1;
  const int64_t most = reach_h * p.width + reach_w + apart;
  const bool same = p.stride_h == 1 && p.out_height == p.height && p.out_width == p.width;
  const bool sides = p.height == kSide && p.width == kSide;
  const bool halves = a.source.before % (kPixels / 2) == 0 && apart == 0;
  bool served = false;
  visit_dtype(p.dtype, [&](auto zero) {
    using T = decltype(zero);
    if constexpr (sizeof(T) == 2) {
      const auto go = [&](auto products) { served = launch<T, decltype(products)>(p, a, device, allocate, stream); };
      constexpr int kMostPixels = 49, kMaxSide = 8;
      if (same && pixels <= kMostPixels && std::max(p.height, p.width) <= kMaxSide && most <= kFarthestPixels) {
        for (int64_t y = 0; y < p.height; ++y) a.rows |= uint64_t{1} << y * p.width;
        if (most <= kNearPixels) return go(AllPairs<T, kNearPixels>{});
        if (most <= kFarPixels) return go(AllPairs<T, kFarPixels>{});
        return go(AllPairs<T, kFarthestPixels>{});
      }
      if (same && sides && reach_w < kSide) {
        if (halves && most <= 2 * kPixels) return go(Folded<T, 2, false>{});
        if (halves && most <= 4 * kPixels) return go(Folded<T, 4, false>{});
        if (halves && most <= 6 * kPixels) return go(Folded<T, 6, false>{});
        if (most <= 4 * kPixels) return go(Folded<T, 4, true>{});
        if (most <= 6 * kPixels) return go(Folded<T, 6, true>{});
        if (most <= 8 * kPixels) return go(Folded<T, 8, true>{});
      }
      // Planes of 28 columns, where two planes a block give most multiprocessors as much as the others; or at least
      // some, where rows cannot be copied one by one in pieces of 8 bytes.
      constexpr int kLeastRows = 14, kPiece = 4;
      if (same && p.width == kWideColumns && p.height >= kLeastRows && reach_w < kWideColumns) {
        const int64_t blocks = ceil_div(p.channels, 2), places = round_up(blocks, device.multiprocessors);
        // So are kernels of many rows, with what is around rows, where they begin at the same place within a piece.
        constexpr int64_t kMany = 6;
        const bool around = (p.kernel_h - 1) * p.dilation_h + 1 >= kMany && reach_w <= kPiece;
        const bool pieces =
            a.source.before % kPiece == a.grad.before % kPiece && (around || a.source.before % kPiece == 0);
        if (pieces ? 10 * blocks < 9 * places : 3 * blocks < 2 * places) return;
        // An even number of units before, and as many tiles as reach the last pixel behind.
        using Wide = Sliding<T>;
        constexpr int64_t kTile = 2 * kPixels;
        a.units_before = static_cast<int>(2 * ceil_div(most, kTile));
        a.roles = static_cast<int>(ceil_div(kPixels * a.units_before + most + kPixels, Wide::kTiles * kTile));
        a.whole = pixels % kPixels == 0 && a.source.before == 0 && a.grad.before == 0;
        if (a.roles <= Wide::kMaxRoles) go(Wide{});
        return;
      }
      constexpr int kRows = 2;
      if (p.stride_h == 2 && sides && 2 * p.out_height == kSide && 2 * p.out_width == kSide && reach_h <= kRows &&
          reach_w <= kRows)
        go(Strided<T>{});
    }
  });
  return served;
}

}  // namespace dwconv
