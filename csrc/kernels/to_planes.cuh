// Copies 16-bit arrays whose channels lie side by side to planes, for kernels that want the rows of a channel.
#pragma once

#include "launch.h"
#include "stream.cuh"

namespace dwconv {

struct ToPlanes {
  static constexpr int kSide = 64, kThreads = 256, kWarps = kThreads / 32;  // channels and pixels of a block

  const char* from = nullptr;  // null: there is nothing to copy
  char* to = nullptr;          // (images, channels, pixels), without a gap
  int64_t image_bytes = 0, row_bytes = 0, pixel_bytes = 0;
  int images = 0, channels = 0, pixels = 0;
  bool pairs = false;  // whether two channels can be read at once, and two pixels be written
  Divider by_width, by_pixel_tiles, by_channel_tiles;

  ToPlanes() = default;
  ToPlanes(const View& view, int64_t batch, int64_t channels, int64_t height, int64_t width)
      : from(static_cast<const char*>(view.data)),
        image_bytes(2 * view.stride[0]),
        row_bytes(2 * view.stride[2]),
        pixel_bytes(2 * view.stride[3]),
        images(static_cast<int>(batch)),
        channels(static_cast<int>(channels)),
        pixels(static_cast<int>(height * width)),
        pairs((static_cast<int64_t>(reinterpret_cast<uintptr_t>(from)) | image_bytes | row_bytes | pixel_bytes) % 4 ==
                  0 &&
              channels % 2 == 0 && pixels % 2 == 0),
        by_width(width),
        by_pixel_tiles(ceil_div(pixels, kSide)),
        by_channel_tiles(ceil_div(channels, kSide)) {}

  int64_t bytes() const { return 2 * int64_t{images} * channels * pixels; }
  int64_t blocks() const { return int64_t{images} * by_pixel_tiles.divisor * by_channel_tiles.divisor; }
};

static __global__ void __launch_bounds__(ToPlanes::kThreads) to_planes(const __grid_constant__ ToPlanes a) {
  constexpr int kSide = ToPlanes::kSide, kWarps = ToPlanes::kWarps;
  __shared__ uint16_t tile[kSide][kSide + 2];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  uint32_t image = blockIdx.x;
  const int channel = a.by_channel_tiles.split(image) * kSide, pixel = a.by_pixel_tiles.split(image) * kSide;
  const auto is_inside = [&](int c, int p) { return channel + c < a.channels && pixel + p < a.pixels; };
  uint32_t pairs[kSide / kWarps];  // of channels
#pragma unroll
  for (int i = 0; i < kSide / kWarps; ++i) {
    const int p = warp + i * kWarps;
    uint32_t row = pixel + p;
    const uint32_t column = a.by_width.split(row);
    const char* from = a.from + image * a.image_bytes + row * a.row_bytes + column * a.pixel_bytes;
    const uint16_t* elements = reinterpret_cast<const uint16_t*>(from) + channel + 2 * lane;
    pairs[i] = 0;
    if (a.pairs) {
      if (is_inside(2 * lane, p)) pairs[i] = __ldg(reinterpret_cast<const uint32_t*>(elements));
    } else {
      if (is_inside(2 * lane, p)) pairs[i] = __ldg(elements);
      if (is_inside(2 * lane + 1, p)) pairs[i] |= uint32_t{__ldg(elements + 1)} << 16;
    }
  }
#pragma unroll
  for (int i = 0; i < kSide / kWarps; ++i) {
    const int p = warp + i * kWarps;
    tile[2 * lane][p] = pairs[i] & 0xffff, tile[2 * lane + 1][p] = pairs[i] >> 16;
  }
  __syncthreads();
  uint16_t* to = reinterpret_cast<uint16_t*>(a.to) + (image * int64_t{a.channels} + channel) * a.pixels + pixel;
  for (int c = warp; c < kSide; c += kWarps) {
    uint16_t* plane = to + int64_t{c} * a.pixels;
    if (a.pairs) {
      if (is_inside(c, 2 * lane))
        *reinterpret_cast<uint32_t*>(plane + 2 * lane) = *reinterpret_cast<const uint32_t*>(&tile[c][2 * lane]);
    } else {
      for (int p = lane; p < kSide; p += 32)
        if (is_inside(c, p)) plane[p] = tile[c][p];
    }
  }
}

// An array as planes: as it lies where columns lie side by side, or else, without an address yet, as `copy` makes it.
inline View planes_of(const View& view, int64_t batch, int64_t channels, int64_t height, int64_t width,
                      ToPlanes& copy) {
  if (view.stride[3] == 1 || width == 1) return view;
  copy = ToPlanes(view, batch, channels, height, width);
  return {nullptr, {channels * height * width, height * width, width, 1}};
}

// The bytes of a plane's rows that can be copied at once: 16, 8, 4 or 2.
inline int unit_of(const View& planes) {
  const int64_t all = static_cast<int64_t>(reinterpret_cast<uintptr_t>(planes.data)) | 2 * planes.stride[0] |
                      2 * planes.stride[1] | 2 * planes.stride[2] | kUnit;
  return static_cast<int>(all & -all);
}

// Allocates scratch memory for partial sums and for the copies that there are to make, makes them, and sets addresses.
inline void make_planes(ToPlanes (&copies)[2], const char** const (&planes)[2], int64_t partial_bytes, float*& partial,
                        const Allocate& allocate, cudaStream_t stream) {
  constexpr int64_t kAlignment = 256;
  int64_t bytes = round_up(partial_bytes, kAlignment);
  for (const ToPlanes& copy : copies)
    if (copy.from != nullptr) bytes += round_up(copy.bytes(), kAlignment);
  if (bytes == 0) return;
  char* scratch = static_cast<char*>(allocate(bytes));
  partial = reinterpret_cast<float*>(scratch);
  scratch += round_up(partial_bytes, kAlignment);
  for (int i = 0; i < 2; ++i) {
    if (copies[i].from == nullptr) continue;
    *planes[i] = copies[i].to = scratch;
    scratch += round_up(copies[i].bytes(), kAlignment);
    to_planes<<<static_cast<unsigned>(copies[i].blocks()), ToPlanes::kThreads, 0, stream>>>(copies[i]);
    check_launch("to_planes");
  }
}

}  // namespace dwconv
