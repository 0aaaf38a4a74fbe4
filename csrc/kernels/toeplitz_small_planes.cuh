// Forward and grad_input on contiguous planes of at most 16 columns in 16 bits (toeplitz_small_planes.cu), as far as
// the kernels for planes of any such size share it with those for planes of 7 x 7 and 14 x 14
// (toeplitz_known_planes.cu).
#pragma once

#include <algorithm>

#include "image_runs.cuh"
#include "launch.h"
#include "mapping.h"
#include "overlap.cuh"
#include "stream_nchw.cuh"
#include "tensor_cores.cuh"

namespace dwconv {

constexpr int kImages = 16;  // that are multiplied together
constexpr int kMaxWarps = 8;
constexpr int kEntries = 32;  // of a row of the kernel between zeros
constexpr int kMiddle = 15;   // of them, where column 0 of the input meets column 0 of the output

struct Small {
  ImageRuns source, target;
  int height, width, out_height, out_width;
  const void *weight, *bias;
  int64_t weight_filter, weight_row, weight_column, bias_stride;
  int kernel_h, kernel_w, padding_h, padding_w, dilation_h, dilation_w, stride;
  bool spread;  // the stride is that of the target
  int images, channels;
  int block_channels, groups, batches;  // channels of a part; how many parts these make, and the images 16 by 16
  int share;                            // warps that share a channel: 1 or 2
  int stages, stage_bytes, weights_at;
  int copiers;  // warps that begin bulk copies
  bool bulk, bulk_stores;
  bool solid;      // images of the source follow each other without a gap
  bool keeps;      // all parts of a block have the same channels
  uint32_t rows;   // a bit for each row of B that the kernel has
  int clear_from;  // bytes of a slot that are sure to be loaded
  Divider by_groups, by_dilation_w, by_clear;
};

struct Part {
  int image, images, channel, channels;
};

// Shared memory by addresses: with references it is looked up at every branch where shared memory begins.
__device__ inline uint32_t read_word(uint32_t address) {
  uint32_t value;
  asm volatile("ld.shared.b32 %0, [%1];" : "=r"(value) : "r"(address) : "memory");
  return value;
}
__device__ inline uint32_t read_element(uint32_t address) {
  uint32_t value;
  asm volatile("ld.shared.u16 %0, [%1];" : "=r"(value) : "r"(address) : "memory");
  return value;
}
// Reads it even if it was read before: into another register.
__device__ inline uint32_t read_word_again(uint32_t address) {
  uint32_t value;
  asm volatile("ld.volatile.shared.b32 %0, [%1];" : "=r"(value) : "r"(address) : "memory");
  return value;
}
__device__ inline void write_word(uint32_t address, uint32_t value) {
  asm volatile("st.shared.b32 [%0], %1;" ::"r"(address), "r"(value) : "memory");
}
__device__ inline void write_element(uint32_t address, uint32_t value) {
  asm volatile("st.shared.b16 [%0], %1;" ::"r"(address), "r"(value) : "memory");
}

// Outputs of one image, by the taps that meet it.
template <typename T>
__device__ __noinline__ void outputs_by_taps(const Small& a, int from, int to, int channel, int first_row, int rows,
                                             int column) {
  const T* weight = static_cast<const T*>(a.weight) + channel * a.weight_filter;
  for (int r = first_row; r < first_row + rows; ++r) {
    float sum = a.bias ? widen(static_cast<const T*>(a.bias)[channel * a.bias_stride]) : 0.f;
    for (int i = 0; i < a.kernel_h; ++i) {
      const int y = source_index(r, i, a.stride, a.padding_h, a.dilation_h, a.spread);
      if (y < 0 || y >= a.height) continue;
      for (int j = 0; j < a.kernel_w; ++j) {
        const int x = source_index(column, j, a.stride, a.padding_w, a.dilation_w, a.spread);
        if (x >= 0 && x < a.width)
          sum = fmaf(widen(shared<T>(from + 2 * (y * a.width + x))),
                     widen(weight[i * a.weight_row + j * a.weight_column]), sum);
      }
    }
    shared<T>(to + 2 * (r * a.out_width + column)) = narrow<T>(sum);
  }
}

// A lane's entries of the rows of a channel's kernel, and how they get between zeros in shared memory.
template <typename T, int kKernelH, bool kKnown>
struct Taps {
  T weight[kKernelH], bias;

  // Asks for those of a warp's channel of a part.
  __device__ void fetch(const Small& a, const Part& part, int own, bool wanted) {
    const int lane = threadIdx.x % 32;
    bias = narrow<T>(0.f);
#pragma unroll
    for (int i = 0; i < kKernelH; ++i) weight[i] = bias;  // in any case: what was there is not needed any more
    if (!wanted || own >= part.channels) return;
    const int channel = part.channel + own;
    uint32_t tap = max(lane - kMiddle + a.padding_w, 0);
    const bool beside = lane - kMiddle + a.padding_w < 0 || a.by_dilation_w.split(tap) != 0;
    const bool has_tap = !(kKnown && lane == 0) && !beside && static_cast<int>(tap) < a.kernel_w;
    const T* from = static_cast<const T*>(a.weight) + channel * a.weight_filter + (has_tap ? tap : 0) * a.weight_column;
#pragma unroll
    for (int i = 0; i < kKernelH; ++i) {
      const bool has_row = a.rows >> i & 1;
      if (has_row && has_tap) weight[i] = __ldg(from);
      from += has_row ? a.weight_row : 0;
    }
    if (a.bias) bias = __ldg(static_cast<const T*>(a.bias) + channel * a.bias_stride);
  }

  // Writes the weights between zeros, and once more one entry earlier, so that any two neighbours are a word.
  __device__ void lay(int to) {
    const int lane = threadIdx.x % 32;
    __syncwarp();
#pragma unroll
    for (int i = 0; i < kKernelH; ++i) {
      shared<T>(to + i * (4 * kEntries) + 2 * lane) = weight[i];
      if (lane > 0) shared<T>(to + i * (4 * kEntries) + 2 * kEntries + 2 * (lane - 1)) = weight[i];
    }
    __syncwarp();
  }
};

__device__ inline Part part_of(const Small& a, int number) {
  uint32_t batch = number;
  const int group = static_cast<int>(a.by_groups.split(batch));
  Part part;
  part.image = static_cast<int>(batch) * kImages;
  part.images = min(kImages, a.images - part.image);
  part.channel = group * a.block_channels;
  part.channels = min(a.block_channels, a.channels - part.channel);
  return part;
}

// Whether a part has the tensor's first bytes, or its last ones: what lies around these may be another's.
__device__ inline bool has_first(const Small& a, const Part& part) {
  return part.channel == 0 && (part.image == 0 || !a.solid);
}
__device__ inline bool has_last(const Small& a, const Part& part) {
  return part.channel + part.channels == a.channels && (part.image + part.images == a.images || !a.solid);
}

// Where a part's bytes lie in the units that hold them, and [first, last), the units that lie inside of the tensor: the
// same for all images that lie alike.
struct PartUnits {
  int begin, end, first, last;

  __device__ PartUnits(const Small& a, const Part& part, int begin, int plane)
      : begin(begin),
        end(begin + part.channels * plane),
        first(begin > 0 && has_first(a, part) ? kUnit : 0),
        last(max((has_last(a, part) ? end : end + kUnit - 1) & -kUnit, first)) {}
};

// A warp loads what a part has outside of these units, and zeros around.
__device__ inline void load_ends(const Small& a, int stage, const Part& part, int plane) {
  const ImageRuns& v = a.source;
  const int64_t offset = int64_t{part.channel} * plane;
  const PartUnits units(a, part, v.phase(part.image, offset), plane);
  if (units.first == 0 && units.last >= units.end) return;
  const int lane = threadIdx.x % 32, element = lane % 8 * 2;
#pragma unroll 1
  for (int n = lane / 8; n < part.images; n += 4) {
    const char* const there = v.base + (part.image + n) * v.image_bytes + (offset - units.begin);
    const int slot = stage * a.stage_bytes + v.memory + n * v.pitch;
    const auto load = [&](int at) {
      const bool inside = at >= units.begin && at < units.end;
      shared<uint16_t>(slot + at) = inside ? __ldg(reinterpret_cast<const uint16_t*>(there + at)) : uint16_t{0};
    };
    if (units.first > 0) load(element);
    if (units.last < units.end) load(units.last + element);
  }
}

// Planes of 7 x 7 and 14 x 14 that stay as large, in bfloat16 or float16. `rows`: of a kernel, with what dilation puts
// between them.
void launch_toeplitz_known_planes(Small a, DType dtype, int rows, bool bulk, cudaStream_t stream);

}  // namespace dwconv
