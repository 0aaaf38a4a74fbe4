// Planes that begin anywhere, or rows of an odd length, copied to where they begin with 16 bytes: for kernels that
// would load these element by element.
#pragma once

#include "overlap.cuh"
#include "planes.cuh"

namespace dwconv {

// Pieces that are contiguous each: planes, or rows of them.
struct PlaneCopy {
  const char* from;
  char* to;
  int64_t image_bytes, channel_bytes, row_bytes;
  uint32_t units;    // of 16 bytes, of all pieces
  int bytes, pitch;  // of a piece, and from one to the next in the copy, with zeros between
  Divider by_units, by_rows, by_channels;
};

constexpr int kCopyThreads = 256;

// A thread copies a unit: words as they lie in memory, which are put together anew.
static __global__ void __launch_bounds__(kCopyThreads) copy_planes(const __grid_constant__ PlaneCopy a) {
  let_next_kernel_start();
  wait_for_kernel_before();
  const uint32_t number = blockIdx.x * kCopyThreads + threadIdx.x;
  if (number >= a.units) return;
  uint32_t piece = number;
  const int first = static_cast<int>(a.by_units.split(piece)) * kUnit;
  uint32_t image = piece;
  const uint32_t row = a.by_rows.split(image), channel = a.by_channels.split(image);
  const char* from = a.from + image * a.image_bytes + channel * a.channel_bytes + row * a.row_bytes;
  const int before = static_cast<int>(reinterpret_cast<uintptr_t>(from) % 4);
  uint32_t words[5];
#pragma unroll
  for (int k = 0; k < 5; ++k) {
    const int at = first + 4 * k - before;
    const auto half = [&](int at) -> uint32_t {  // nothing beside the piece is read
      return at >= 0 && at < a.bytes ? __ldg(reinterpret_cast<const uint16_t*>(from + at)) : uint16_t{0};
    };
    const bool is_whole = at >= 0 && at + 4 <= a.bytes;
    words[k] = is_whole ? __ldg(reinterpret_cast<const uint32_t*>(from + at)) : half(at) | half(at + 2) << 16;
  }
#pragma unroll
  for (int k = 0; k < 4; ++k) words[k] = __byte_perm(words[k], words[k + 1], before > 0 ? 0x5432 : 0x3210);
  char* to = a.to + int64_t{piece} * a.pitch + first;
  if (a.pitch % kUnit == 0) {
    *reinterpret_cast<uint4*>(to) = {words[0], words[1], words[2], words[3]};
    return;
  }
#pragma unroll
  for (int k = 0; k < 4; ++k)  // these are whole words
    if (first + 4 * k < a.bytes) *reinterpret_cast<uint32_t*>(to + 4 * k) = words[k];
}

inline void launch_copy_planes(const PlaneCopy& copy, cudaStream_t stream) {
  launch_early(copy_planes, copy, ceil_div(copy.units, kCopyThreads), kCopyThreads, stream);
  check_launch("copy_planes");
}

// As planes_of, but planes without gaps that can only be loaded element by element become copies that need not be.
inline ImagePlanes aligned_planes_of(View images, int64_t batch, int64_t channels, int64_t height, int64_t width,
                                     const Allocate& allocate, cudaStream_t stream) {
  const int64_t bytes = 2 * height * width, units = ceil_div(bytes, kUnit) * batch * channels;
  const bool can_copy = images.stride[3] == 1 && images.stride[2] == width && width % 2 == 0;
  if (can_copy && unit_of(images) == 2 && units < (int64_t{1} << 31)) {
    const View planes = new_planes(batch, channels, height, width, allocate);
    PlaneCopy a{};
    a.from = static_cast<const char*>(images.data), a.to = static_cast<char*>(planes.data);
    a.image_bytes = 2 * images.stride[0], a.channel_bytes = 2 * images.stride[1];
    a.units = static_cast<uint32_t>(units), a.bytes = a.pitch = static_cast<int>(bytes);
    a.by_units = Divider(ceil_div(bytes, kUnit)), a.by_channels = Divider(channels);
    launch_copy_planes(a, stream);
    images = planes;
  }
  return planes_of(images, batch, channels, height, width, allocate, stream);
}

// The same planes; where rows can only be loaded element by element, and there is enough of them, as a copy whose rows
// begin with 16 bytes, with zeros between.
inline ImagePlanes with_aligned_rows(ImagePlanes planes, int64_t batch, int64_t channels, const Allocate& allocate,
                                     cudaStream_t stream) {
  constexpr int64_t kMany = 512 << 10;  // elements, or a launch takes longer
  const int64_t rows = batch * channels * planes.height, pitch = round_up(2 * planes.width, kUnit);
  const int64_t units = rows * (pitch / kUnit);
  if (planes.unit > 2 || rows * planes.width < kMany || units >= int64_t{1} << 31) return planes;
  PlaneCopy a{};
  a.from = planes.base, a.to = static_cast<char*>(allocate(rows * pitch));
  a.image_bytes = planes.image_bytes, a.channel_bytes = planes.channel_bytes, a.row_bytes = planes.row_bytes;
  a.units = static_cast<uint32_t>(units), a.bytes = 2 * planes.width, a.pitch = static_cast<int>(pitch);
  a.by_units = Divider(pitch / kUnit), a.by_rows = Divider(planes.height), a.by_channels = Divider(channels);
  launch_copy_planes(a, stream);
  planes.base = a.to, planes.row_bytes = pitch, planes.unit = kUnit;
  planes.channel_bytes = planes.height * pitch, planes.image_bytes = channels * planes.channel_bytes;
  return planes;
}

}  // namespace dwconv
