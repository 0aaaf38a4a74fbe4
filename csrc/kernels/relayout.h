// Copies of 16-bit images between channels_last and planes, for kernels that need rows and compute so much that the
// copies cost little beside.
#pragma once

#include "exchange.h"
#include "launch.h"

namespace dwconv {

// Copies between images in channels_last, whose pixels and rows may lie apart, and planes without gaps between rows.
// Rows of planes may be wider than images: to zeros in planes, from there nothing is copied.
void launch_relayout(const View& pixels, const View& planes, bool to_planes, int64_t batch, int64_t channels,
                     int64_t height, int64_t width, cudaStream_t stream);

// Copies both images of a problem to planes by one kernel, if both have to be, and by 8 channels at once.
void both_to_planes(Problem& p, const Allocate& allocate, cudaStream_t stream);

// The bytes of a plane's rows that can be copied at once: 16, 8, 4 or 2.
inline int unit_of(const View& planes) {
  const int64_t all = static_cast<int64_t>(reinterpret_cast<uintptr_t>(planes.data)) | 2 * planes.stride[0] |
                      2 * planes.stride[1] | 2 * planes.stride[2] | 16;
  return static_cast<int>(all & -all);
}

// Whether both images of a problem are copied to planes, which can have rows and columns exchanged as well.
inline bool can_exchange(const Problem& p) {
  return !has_rows(p.input, p.width) && !has_rows(p.output, p.out_width) && p.input.stride[2] != 1 &&
         p.output.stride[2] != 1 && p.height > 1 && p.out_height > 1;
}

// Planes without gaps in scratch memory.
inline View new_planes(int64_t batch, int64_t channels, int64_t height, int64_t width, const Allocate& allocate) {
  return {allocate(2 * batch * channels * height * width), {channels * height * width, height * width, width, 1}};
}

// The same without gaps between rows alone: planes of some size begin with a line of memory each, so that copies from
// and to channels_last have whole lines.
inline View new_planes_of_lines(int64_t batch, int64_t channels, int64_t height, int64_t width,
                                const Allocate& allocate) {
  constexpr int64_t kLine = 64, kLeast = 8 * kLine;  // elements
  const int64_t size = height * width, plane = size < kLeast ? size : (size + kLine - 1) / kLine * kLine;
  return {allocate(2 * batch * channels * plane), {channels * plane, plane, width, 1}};
}

// The same images with columns side by side: as they are, or copied to planes.
inline View to_planes(const View& images, int64_t batch, int64_t channels, int64_t height, int64_t width,
                      const Allocate& allocate, cudaStream_t stream) {
  if (has_rows(images, width)) return images;
  const View planes = new_planes(batch, channels, height, width, allocate);
  launch_relayout(images, planes, true, batch, channels, height, width, stream);
  return planes;
}

}  // namespace dwconv
