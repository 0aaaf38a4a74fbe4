// Large kernels in float32 by Fourier transforms, where the caller asked for them: the time hardly depends on the size
// of the kernel.
//
// A thread computes a whole transform in its registers. The rows of a plane are real: two of them go through a
// transform as real and imaginary parts, and are told apart behind it. They go to shared memory, where the threads of
// another mapping have a column each: they transform it, multiply it by that of the filter's spectrum, and transform it
// back, and rows are transformed back, two at a time. Every plane of every image is on its own, so that no image can be
// seen in another's results. All transforms of a kernel are one piece of code in a loop, what they read and write
// apart.
//
// The gradient of the weight is the sum, over images, of the products of two spectra, transformed back. Blocks keep
// sums of their images in shared memory; where they are transformed back, those of all blocks are added up, always in
// the same order.
//
// Planes too large for a transform are cut into tiles. Spectra are those of wrapped-around planes: a tile's first
// output is row and column 0, what precedes it comes around from the end.
#include "fft.cuh"
#include "fft.h"
#include "large_float32.cuh"
#include "launch.h"
#include "mapping.h"
#include "overlap.cuh"

namespace dwconv {
namespace {

// What a block does, from one step up to another.
enum Step : int { kRowsIn, kColumnsIn, kColumnsOut, kRowsOut, kDone };

// One side of planes. Of tile t, outputs begin at `origin + t * tile`.
struct Side {
  int size, targets, kernel, padding, tile, origin;
  int shift;  // how far outputs lie behind their place in the transform
};

struct Planes {
  const float* data;
  int64_t stride[4];
};

struct Arguments {
  Planes source, grad;  // grad: of the output, for the gradient of the weight
  float* target;
  int64_t target_stride[4];
  float* bias;  // read by the forward pass, written by the gradient of the weight
  int64_t bias_stride;
  float2 *spectra, *sums;  // [filter][row][column], and of the gradient of the weight [part] before
  float* bias_sums;        // [part][filter], or null
  float scale;
  int batch, filters, fan_out, images, parts;  // images: those of a block
  int begin, end;                              // steps
  Side h, w;
  int plane_bytes;  // in shared memory
  Divider by_filters, by_tiles_h, by_tiles_w;
};

// The part of a side that a tile has.
struct Span {
  int target, targets;         // outputs
  int source, sources, shift;  // the pixels they need, and how many of these come around from the end

  __device__ Span(const Side& s, int tile) {
    target = s.origin + tile * s.tile;
    targets = min(s.tile, s.targets - target);
    source = max(target - s.padding, 0);
    sources = min(target + s.tile - 1 - s.padding + s.kernel, s.size) - source;
    shift = target - source;
  }
};

// Where real and imaginary parts are exchanged before and behind it, a transform is its own inverse.
template <int kLength>
struct Transforms {
  static constexpr int kColumns = fft_columns(kLength), kRowBytes = fft_row_bytes(kLength);

  float re[kLength], im[kLength];

  __device__ __forceinline__ void run() { transform<kLength>(re, im); }

  // Two rows of numbers.
  __device__ __forceinline__ void load_rows(int first, int second) {
#pragma unroll
    for (int k = 0; k < kLength; k += 4) {
      const float4 a = shared<float4>(first + 4 * k), b = shared<float4>(second + 4 * k);
      re[k] = a.x, re[k + 1] = a.y, re[k + 2] = a.z, re[k + 3] = a.w;
      im[k] = b.x, im[k + 1] = b.y, im[k + 2] = b.z, im[k + 3] = b.w;
    }
  }

  // The transforms of both, twice as large, in place of the numbers.
  __device__ __forceinline__ void store_transformed_rows(int first, int second) const {
#pragma unroll
    for (int k = 0; k < kColumns; k += 2) {
      const int i = (kLength - k) % kLength, m = k + 1, j = kLength - m;
      const bool last = m == kColumns;
      shared<float4>(first + 8 * k) = {re[k] + re[i], im[k] - im[i], last ? 0 : re[m] + re[j],
                                       last ? 0 : im[m] - im[j]};
      shared<float4>(second + 8 * k) = {im[k] + im[i], re[i] - re[k], last ? 0 : im[m] + im[j],
                                        last ? 0 : re[j] - re[m]};
    }
  }

  // The way back, exchanged: what is transformed are the first row's numbers in `im`, and the second's in `re`.
  __device__ __forceinline__ void load_transformed_rows(int first, int second) {
#pragma unroll
    for (int k = 0; k < kColumns; k += 2) {
      const float4 a = shared<float4>(first + 8 * k), b = shared<float4>(second + 8 * k);
      put(k, a.x, a.y, b.x, b.y);
      if (k + 1 < kColumns) put(k + 1, a.z, a.w, b.z, b.w);
    }
  }

  __device__ __forceinline__ void store_rows(int first, int second) const {
#pragma unroll
    for (int k = 0; k < kLength; k += 4) {
      shared<float4>(first + 4 * k) = {im[k], im[k + 1], im[k + 2], im[k + 3]};
      shared<float4>(second + 4 * k) = {re[k], re[k + 1], re[k + 2], re[k + 3]};
    }
  }

  // A column of `rows` numbers, of which the first `shift` come around from the end; zeros between.
  __device__ __forceinline__ void load_column(int column, int rows, int shift) {
    const int behind = column + shift * kRowBytes;
#pragma unroll
    for (int k = 0; k < kLength; ++k) {
      float2 value = {0, 0};
      if (k < rows - shift) value = shared<float2>(behind + k * kRowBytes);
      re[k] = value.x, im[k] = value.y;
    }
    if (shift == 0) return;
    const int around = behind - kLength * kRowBytes;
#pragma unroll
    for (int k = 0; k < kLength; ++k)
      if (k >= kLength - shift && k < kLength - shift + rows) {
        const float2 value = shared<float2>(around + k * kRowBytes);
        re[k] = value.x, im[k] = value.y;
      }
  }

  // Exchanged: the first `rows` numbers, counted from `shift` before the end.
  __device__ __forceinline__ void store_column(int column, int rows, int shift) const {
    const int behind = column + shift * kRowBytes;
#pragma unroll
    for (int k = 0; k < kLength; ++k)
      if (k < rows - shift) shared<float2>(behind + k * kRowBytes) = {im[k], re[k]};
    if (shift == 0) return;
    const int around = behind - kLength * kRowBytes;
#pragma unroll
    for (int k = 0; k < kLength; ++k)
      if (k >= kLength - shift && k < kLength - shift + rows) shared<float2>(around + k * kRowBytes) = {im[k], re[k]};
  }

 private:
  __device__ __forceinline__ void put(int k, float a, float b, float c, float d) {
    const int j = kLength - k;
    if (k == 0 || 2 * k == kLength) {
      im[k] = a, re[k] = c;
    } else {
      im[k] = a - d, re[k] = b + c;
      im[j] = a + d, re[j] = c - b;
    }
  }
};

// Writes zeros to columns of a row in shared memory.
__device__ inline void clear(int row, int begin, int end) {
  while (begin < end) {
    const bool four = begin % 4 == 0 && begin + 4 <= end;
    if (four)
      shared<float4>(row + 4 * begin) = {0, 0, 0, 0};
    else
      shared<float>(row + 4 * begin) = 0;
    begin += four ? 4 : 1;
  }
}

// Begins to copy a tile of some images to shared memory, in the columns of their places in the transform.
template <int kLength>
__device__ void begin_tile(const Planes& planes, int image, int images, int channel, const Span& h, const Span& w,
                           int to, int plane_bytes) {
  const float* from = planes.data + image * planes.stride[0] + channel * planes.stride[1] +
                      h.source * planes.stride[2] + w.source * planes.stride[3];
  const int around = min(w.shift, w.sources);
  constexpr int kRowBytes = fft_row_bytes(kLength);
  begin_copies(from, planes.stride,
               {images, 1, h.sources, around, 1, to + 4 * (kLength - w.shift), plane_bytes, 0, kRowBytes});
  begin_copies(from + around * planes.stride[3], planes.stride,
               {images, 1, h.sources, w.sources - around, 1, to, plane_bytes, 0, kRowBytes});
}

// Puts zeros between the columns of two rows, which the thread has to itself; the second may be one more than there
// are.
template <int kLength>
__device__ void clear_between(int first, int second, bool second_is_there, const Span& w) {
  const int around = min(w.shift, w.sources);
#pragma unroll 1
  for (int row = 0; row < 2; ++row) {
    const int at = row == 0 ? first : second;
    const bool whole = row == 1 && !second_is_there;
    clear(at, whole ? 0 : w.sources - around, whole ? kLength : kLength - w.shift);
    if (!whole) clear(at, kLength - w.shift + around, kLength);
  }
}

// Writes a tile's outputs, kVector at once.
template <int kLength, int kVector>
__device__ void store_tile(const Arguments& a, float* to, int images, int rows, int columns, float bias) {
  const int units = columns / kVector, step_row = blockDim.x / units, step_unit = blockDim.x - step_row * units;
  int row = threadIdx.x / units, unit = threadIdx.x - row * units, image = row / rows;
  row -= image * rows;
  while (image < images) {
    const int column = unit * kVector, place = column - a.w.shift + (column < a.w.shift ? kLength : 0);
    const int from = image * a.plane_bytes + row * fft_row_bytes(kLength) + 4 * place;
    float* const at = to + image * a.target_stride[0] + row * a.target_stride[2] + column * a.target_stride[3];
    if constexpr (kVector == 4) {
      float4 value = shared<float4>(from);
      value.x += bias, value.y += bias, value.z += bias, value.w += bias;
      *reinterpret_cast<float4*>(at) = value;
    } else {
      *at = shared<float>(from) + bias;
    }
    unit += step_unit, row += step_row;
    if (unit >= units) unit -= units, ++row;
    while (row >= rows) row -= rows, ++image;
  }
}

// Threads of a block, and blocks of a multiprocessor, as registers allow.
struct Launch {
  int threads, blocks;
};
constexpr Launch launch_of(int length, bool grad_weight) {
  switch (length) {
    case 32:
    case 40: return {128, 4};
    case 48: return grad_weight ? Launch{160, 3} : Launch{128, 4};
    case 64:
    case 72: return {grad_weight ? 160 : 192, 2};
    default: return {128, 2};
  }
}

// The spectra of filters, planes of images, or gradients of filters from sums of spectra: as steps say.
template <int kLength>
__global__ void __launch_bounds__(launch_of(kLength, false).threads, launch_of(kLength, false).blocks)
    fft(const __grid_constant__ Arguments a) {
  constexpr int kColumns = fft_columns(kLength), kSpectrum = fft_spectrum(kLength), kRowBytes = fft_row_bytes(kLength);
  uint32_t block = blockIdx.x;
  const int filter = a.by_filters.split(block);
  const Span h(a.h, a.by_tiles_h.split(block)), w(a.w, a.by_tiles_w.split(block));
  const int first_image = block * a.images, images = min(a.images, a.batch - first_image);
  const bool multiplies = a.begin == kRowsIn && a.end == kDone;
  const int spectrum = a.images * a.plane_bytes;  // in shared memory

  // The kernel before one that multiplies has waited, so that images are there; spectra are what it writes.
  if (!multiplies) wait_for_kernel_before();
  let_next_kernel_start();
  if (a.begin == kRowsIn)
    begin_tile<kLength>(a.source, first_image, images, filter / a.fan_out, h, w, 0, a.plane_bytes);
  if (multiplies) {
    wait_for_kernel_before();
    const float2* from = a.spectra + static_cast<int64_t>(filter) * kSpectrum;
    for (int i = 2 * threadIdx.x; i < kSpectrum; i += 2 * blockDim.x)
      begin_copy<16>(shared_address(spectrum + 8 * i), from + i);
  }
  finish_copies();
  __syncthreads();

  const auto in_pairs = [](int rows) { return (rows + 1) / 2; };
  Transforms<kLength> t;
#pragma unroll 1
  for (int step = a.begin; step < a.end; ++step) {
    const bool rows = step == kRowsIn || step == kRowsOut;
    const int lines = rows ? in_pairs(step == kRowsIn ? h.sources : h.targets) : kColumns;
    const int image = threadIdx.x / lines, line = threadIdx.x - image * lines;
    const int first = image * a.plane_bytes + line * (rows ? kRowBytes : 8), second = first + lines * kRowBytes;
    if (image < images) {
      if (step == kRowsIn) {
        clear_between<kLength>(first, second, line + lines < h.sources, w);
        t.load_rows(first, second);
      } else if (step == kColumnsIn) {
        t.load_column(first, h.sources, h.shift);
      } else if (step == kRowsOut) {
        t.load_transformed_rows(first, second);
      } else if (a.begin == kColumnsOut) {  // exchanged
#pragma unroll
        for (int k = 0; k < kLength; ++k) t.re[k] = t.im[k] = 0;
#pragma unroll 1
        for (int part = 0; part < a.parts; ++part) {
          const int64_t plane = static_cast<int64_t>(part) * a.batch + first_image + image;
          const float2* from = a.sums + plane * kSpectrum + line;
#pragma unroll
          for (int k = 0; k < kLength; ++k) {
            const float2 value = from[k * kColumns];
            t.im[k] += value.x, t.re[k] += value.y;
          }
        }
      }

      t.run();

      if (step == kRowsIn) {
        t.store_transformed_rows(first, second);
      } else if (step == kColumnsOut) {
        t.store_column(first, 2 * in_pairs(h.targets), a.h.shift);
      } else if (step == kRowsOut) {
        t.store_rows(first, second);
      } else if (multiplies) {  // and exchanges
        const int factors = spectrum + 8 * line;
#pragma unroll
        for (int k = 0; k < kLength; ++k) {
          const float2 factor = shared<float2>(factors + 8 * kColumns * k);
          const float re = t.re[k] * factor.x - t.im[k] * factor.y;
          t.re[k] = t.re[k] * factor.y + t.im[k] * factor.x, t.im[k] = re;
        }
      } else {  // conjugate, as correlation needs it
        float2* to = a.spectra + static_cast<int64_t>(first_image + image) * kSpectrum + line;
#pragma unroll
        for (int k = 0; k < kLength; ++k) to[k * kColumns] = {t.re[k] * a.scale, t.im[k] * -a.scale};
      }
    }
    if (step != kColumnsIn) __syncthreads();
  }
  if (a.end < kDone) return;

  const float bias = a.bias && multiplies ? a.bias[filter * a.bias_stride] : 0;
  float* const to = a.target + first_image * a.target_stride[0] + filter * a.target_stride[1] +
                    h.target * a.target_stride[2] + w.target * a.target_stride[3];
  const int64_t low = static_cast<int64_t>(reinterpret_cast<uintptr_t>(to) / 4) | a.target_stride[0] |
                      a.target_stride[2] | w.targets | a.w.shift;
  if (a.target_stride[3] == 1 && low % 4 == 0)
    store_tile<kLength, 4>(a, to, images, h.targets, w.targets, bias);
  else
    store_tile<kLength, 1>(a, to, images, h.targets, w.targets, bias);

  if (a.bias_sums && threadIdx.x < images) {
    float sum = 0;
    for (int part = 0; part < a.parts; ++part) sum += a.bias_sums[part * a.batch + first_image + threadIdx.x];
    a.bias[(first_image + threadIdx.x) * a.bias_stride] = sum;
  }
}

// Sums over images of the spectrum of the input times the conjugate of that of the gradient. Planes of the input come
// first in shared memory, those of the gradient then, and the sums of each thread: half of a column.
template <int kLength>
__global__ void __launch_bounds__(launch_of(kLength, true).threads, launch_of(kLength, true).blocks)
    fft_grad_weight(const __grid_constant__ Arguments a) {
  constexpr int kColumns = fft_columns(kLength), kSpectrum = fft_spectrum(kLength), kRowBytes = fft_row_bytes(kLength);
  constexpr int kHalf = kLength / 2;
  uint32_t part = blockIdx.x;
  const int filter = a.by_filters.split(part);
  const int grads = a.images * a.plane_bytes;  // where they begin
  const int slot = threadIdx.x / kColumns, column = threadIdx.x - slot * kColumns;
  const bool is_grad = slot >= a.images, has_slot = slot < 2 * a.images;
  const int slot_image = is_grad ? slot - a.images : slot;
  const int sum_bytes = 16 * a.images * kColumns;  // from one sum of a thread to its next
  const int sums = 2 * grads + 8 * threadIdx.x;
  if (has_slot)
    for (int k = 0; k < kHalf; ++k) shared<float2>(sums + k * sum_bytes) = {0, 0};
  float bias = 0;
  wait_for_kernel_before();
  let_next_kernel_start();

  const int groups = (a.batch + a.images - 1) / a.images;
  const int units = groups * static_cast<int>(a.by_tiles_h.divisor * a.by_tiles_w.divisor);
#pragma unroll 1
  for (int number = part; number < units; number += a.parts) {
    uint32_t unit = number;
    const Span h(a.h, a.by_tiles_h.split(unit)), w(a.w, a.by_tiles_w.split(unit));
    const int first_image = unit * a.images, images = min(a.images, a.batch - first_image);
    Span grad_h = h, grad_w = w;
    grad_h.source = h.target, grad_h.sources = h.targets, grad_h.shift = 0;
    grad_w.source = w.target, grad_w.sources = w.targets, grad_w.shift = 0;
    begin_tile<kLength>(a.source, first_image, images, filter / a.fan_out, h, w, 0, a.plane_bytes);
    begin_tile<kLength>(a.grad, first_image, images, filter, grad_h, grad_w, grads, a.plane_bytes);
    finish_copies();
    __syncthreads();

    Transforms<kLength> t;
    const int pairs = max(h.sources + 1, h.targets + 1) / 2;
    const bool takes_part = has_slot && slot_image < images;
#pragma unroll 1
    for (int step = kRowsIn; step <= kColumnsIn; ++step) {
      const bool rows = step == kRowsIn;
      const int row_slot = threadIdx.x / pairs, line = rows ? threadIdx.x - row_slot * pairs : column;
      const int plane = rows ? row_slot : slot, image = plane >= a.images ? plane - a.images : plane;
      const bool of_grad = plane >= a.images;
      const int count = of_grad ? h.targets : h.sources, lines = rows ? (count + 1) / 2 : kColumns;
      const int first = plane * a.plane_bytes + line * (rows ? kRowBytes : 8), second = first + lines * kRowBytes;
      if (plane < 2 * a.images && image < images && line < lines) {
        if (rows) {
          Span span = w;
          if (of_grad) span = grad_w;
          clear_between<kLength>(first, second, line + lines < count, span);
          t.load_rows(first, second);
        } else {
          t.load_column(first, count, of_grad ? 0 : h.shift);
        }
        t.run();
        if (rows) t.store_transformed_rows(first, second);
      }
      if (rows) __syncthreads();
    }

    // Every thread gives half of its column to the thread that has the other spectrum's, and keeps the other half.
    if (takes_part) {
      if (column == 0 && is_grad) bias += t.re[0];
      const int own = slot * a.plane_bytes + 8 * column;
#pragma unroll
      for (int k = 0; k < kHalf; ++k) {
        const int other = k + kHalf;
        shared<float2>(own + k * kRowBytes) = {is_grad ? t.re[k] : t.re[other], is_grad ? t.im[k] : t.im[other]};
        if (is_grad) t.re[k] = t.re[other], t.im[k] = t.im[other];
      }
    }
    __syncthreads();
    if (takes_part) {
      const int theirs = (is_grad ? slot - a.images : slot + a.images) * a.plane_bytes + 8 * column;
      const float sign = is_grad ? -1 : 1;
#pragma unroll
      for (int k = 0; k < kHalf; ++k) {
        const float2 other = shared<float2>(theirs + k * kRowBytes);
        float2& sum = shared<float2>(sums + k * sum_bytes);
        sum = {sum.x + (t.re[k] * other.x + t.im[k] * other.y), sum.y + sign * (t.im[k] * other.x - t.re[k] * other.y)};
      }
    }
    __syncthreads();
  }

  // The sums of all images of the block, and of the bias.
  if (is_grad && has_slot && column == 0) shared<float>(4 * slot_image) = bias;
  __syncthreads();
  if (!has_slot || slot_image > 0) return;
  const int64_t plane = static_cast<int64_t>(part) * a.filters + filter;
  float2* to = a.sums + plane * kSpectrum + (is_grad ? kHalf * kColumns : 0) + column;
#pragma unroll 4
  for (int k = 0; k < kHalf; ++k) {
    float2 sum = {0, 0};
    for (int image = 0; image < a.images; ++image) {
      const float2 more = shared<float2>(sums + k * sum_bytes + 8 * kColumns * image);
      sum.x += more.x, sum.y += more.y;
    }
    to[k * kColumns] = {sum.x * a.scale, sum.y * a.scale};
  }
  if (a.bias_sums == nullptr || !is_grad || column > 0) return;
  for (int image = 1; image < a.images; ++image) bias += shared<float>(4 * image);
  a.bias_sums[plane] = 0.5f * bias;
}

// Calls visit() with a length as a type.
template <typename Visitor>
void visit_length(int length, Visitor&& visit) {
  switch (length) {
    case 32: return visit(std::integral_constant<int, 32>{});
    case 40: return visit(std::integral_constant<int, 40>{});
    case 48: return visit(std::integral_constant<int, 48>{});
    case 64: return visit(std::integral_constant<int, 64>{});
    case 72: return visit(std::integral_constant<int, 72>{});
    case 80: return visit(std::integral_constant<int, 80>{});
    default: return visit(std::integral_constant<int, 96>{});
  }
}

Side side_of(const FftSide& side) {
  return {static_cast<int>(side.size),
          static_cast<int>(side.targets),
          static_cast<int>(side.kernel),
          static_cast<int>(side.padding),
          static_cast<int>(side.tile),
          0,
          0};
}

Planes planes_of(const View& view) {
  return {static_cast<const float*>(view.data), {view.stride[0], view.stride[1], view.stride[2], view.stride[3]}};
}

void set_target(Arguments& a, const View& view) {
  a.target = static_cast<float*>(view.data);
  std::copy_n(view.stride, 4, a.target_stride);
}

// The most images that a block has threads and shared memory for, the latter as `blocks` of a multiprocessor share it
// if one fits; shared out evenly.
int images_for(const Problem& p, const FftCut& cut, const Launch& launch) {
  const bool grad_weight = p.pass == Pass::kGradWeight;
  const int64_t share = current_device().shared_per_multiprocessor / launch.blocks - 1024;
  int64_t most = launch.threads / ((grad_weight ? 2 : 1) * fft_columns(cut.length));
  while (most > 1 && cut.bytes(p, most) > std::min(p.shared_memory, std::max(share, cut.bytes(p, 1)))) --most;
  return static_cast<int>(ceil_div(p.batch, ceil_div(p.batch, most)));
}

// How many blocks share the units of a filter: such that all units are done soonest, and there are few sums to add up.
int parts_for(int64_t filters, int64_t units, const Launch& launch) {
  constexpr double kPartCost = 0.25;  // in units
  const int64_t room = int64_t{current_device().multiprocessors} * launch.blocks;
  int64_t best = 1;
  double best_time = 0;
  for (int64_t parts = 1; parts <= std::min<int64_t>(units, room); ++parts) {
    const double time = ceil_div(parts * filters, room) * (ceil_div(units, parts) + 1.0) + kPartCost * parts;
    if (parts == 1 || time < best_time) best = parts, best_time = time;
  }
  return static_cast<int>(best);
}

template <int kLength>
void launch_fft(const Arguments& a, int64_t blocks, int64_t shared_bytes, cudaStream_t stream) {
  constexpr int kThreads = launch_of(kLength, false).threads;
  cudaFuncSetAttribute(fft<kLength>, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
  launch_early(fft<kLength>, a, blocks, kThreads, stream, {1, shared_bytes});
  check_launch("fft");
}

// Arguments for planes of filters, all but what is read and written. A block takes one, or several where blocks would
// not be there all at once.
Arguments of_filters(const Problem& p, int length) {
  const Launch launch = launch_of(length, false);
  Arguments a{};
  a.batch = static_cast<int>(p.filters()), a.filters = a.fan_out = 1;
  const int64_t room = int64_t{current_device().multiprocessors} * launch.blocks;
  a.images = static_cast<int>(std::min<int64_t>(ceil_div(a.batch, room), launch.threads / fft_columns(length)));
  a.by_filters = a.by_tiles_h = a.by_tiles_w = Divider(1);
  return a;
}

int even(int64_t rows) {
  return static_cast<int>((rows + 1) / 2 * 2);
}

}  // namespace

void launch_fft(const Problem& p, const Allocate& allocate, cudaStream_t stream) {
  const FftCut cut = choose_fft_cut(p);
  const Mapping map(p);
  float2* const spectra = static_cast<float2*>(allocate(p.filters() * fft_spectrum(cut.length) * sizeof(float2)));
  visit_length(cut.length, [&](auto length) {
    constexpr int kLength = decltype(length)::value;
    constexpr Launch kLaunch = launch_of(kLength, false);

    // Tap k of a filter is at k - padding.
    Arguments f = of_filters(p, kLength);
    f.begin = kRowsIn, f.end = kColumnsOut;
    f.source = planes_of(map.weight), f.spectra = spectra;
    f.scale = 1.0f / (4 * kLength * kLength);
    const auto taps = [](int64_t kernel, int padding) {
      return Side{static_cast<int>(kernel), padding + 1, static_cast<int>(kernel), padding, 1, padding, 0};
    };
    f.h = taps(p.kernel_h, map.padding_h), f.w = taps(p.kernel_w, map.padding_w);
    f.plane_bytes = even(p.kernel_h) * fft_row_bytes(kLength);
    launch_fft<kLength>(f, ceil_div(f.batch, f.images), int64_t{f.images} * f.plane_bytes, stream);

    Arguments a{};
    a.begin = kRowsIn, a.end = kDone;
    a.source = planes_of(map.source), a.spectra = spectra;
    set_target(a, map.target);
    a.bias = static_cast<float*>(map.bias), a.bias_stride = map.bias_stride;
    a.batch = static_cast<int>(p.batch), a.filters = map.targets, a.fan_out = map.fan_out;
    a.images = images_for(p, cut, kLaunch);
    a.h = side_of(cut.h), a.w = side_of(cut.w);
    a.plane_bytes = static_cast<int>(cut.h.rows()) * fft_row_bytes(kLength);
    a.by_filters = Divider(a.filters), a.by_tiles_h = Divider(cut.h.tiles), a.by_tiles_w = Divider(cut.w.tiles);
    launch_fft<kLength>(a, cut.tiles() * a.filters * ceil_div(a.batch, a.images), cut.bytes(p, a.images), stream);
  });
}

void launch_fft_grad_weight(const Problem& p, const Allocate& allocate, cudaStream_t stream) {
  const FftCut cut = choose_fft_cut(p);
  visit_length(cut.length, [&](auto length) {
    constexpr int kLength = decltype(length)::value;
    constexpr Launch kLaunch = launch_of(kLength, true);
    Arguments a{};
    a.source = planes_of(p.input), a.grad = planes_of(p.output);
    a.batch = static_cast<int>(p.batch), a.filters = static_cast<int>(p.filters());
    a.fan_out = static_cast<int>(p.multiplier), a.scale = 1.0f / (4 * kLength * kLength);
    a.images = images_for(p, cut, kLaunch);
    a.h = side_of(cut.h), a.w = side_of(cut.w);
    a.plane_bytes = static_cast<int>(std::max<int64_t>(cut.h.rows(), kLength / 2)) * fft_row_bytes(kLength);
    a.by_filters = Divider(a.filters), a.by_tiles_h = Divider(cut.h.tiles), a.by_tiles_w = Divider(cut.w.tiles);
    a.parts = parts_for(a.filters, cut.tiles() * ceil_div(a.batch, a.images), kLaunch);
    const int64_t sums = int64_t{a.parts} * a.filters;
    a.sums = static_cast<float2*>(allocate(sums * fft_spectrum(kLength) * sizeof(float2)));
    if (p.bias) a.bias_sums = static_cast<float*>(allocate(sums * sizeof(float)));
    const int64_t bytes = cut.bytes(p, a.images);
    cudaFuncSetAttribute(fft_grad_weight<kLength>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                         static_cast<int>(bytes));
    launch_early(fft_grad_weight<kLength>, a, int64_t{a.parts} * a.filters, kLaunch.threads, stream, {1, bytes});
    check_launch("fft_grad_weight");

    Arguments f = of_filters(p, kLength);
    f.begin = kColumnsOut, f.end = kDone;
    f.sums = a.sums, f.parts = a.parts, f.bias_sums = a.bias_sums;
    f.bias = static_cast<float*>(p.bias), f.bias_stride = p.bias_stride;
    set_target(f, p.weight);
    const auto taps = [](int64_t kernel, int64_t padding) {
      return Side{0, static_cast<int>(kernel), 0, 0, static_cast<int>(kernel), 0, static_cast<int>(padding)};
    };
    f.h = taps(p.kernel_h, p.padding_h), f.w = taps(p.kernel_w, p.padding_w);
    f.plane_bytes = even(p.kernel_h) * fft_row_bytes(kLength);
    launch_fft<kLength>(f, ceil_div(f.batch, f.images), int64_t{f.images} * f.plane_bytes, stream);
  });
}

}  // namespace dwconv
