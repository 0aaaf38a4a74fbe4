// Planes of the input or the gradient, as kernels see them that load rows piece by piece.
#pragma once

#include <type_traits>

#include "copies.cuh"
#include "relayout.h"

namespace dwconv {

struct ImagePlanes {
  const char* base;
  int64_t image_bytes, channel_bytes, row_bytes;
  int height, width;
  int unit;  // bytes that can be copied at once: 16, 8, 4 or 2
};

// The planes of images in 16 bits, as they are or as a copy.
inline ImagePlanes planes_of(const View& images, int64_t batch, int64_t channels, int64_t height, int64_t width,
                             const Allocate& allocate, cudaStream_t stream) {
  const View planes = to_planes(images, batch, channels, height, width, allocate, stream);
  return {static_cast<const char*>(planes.data),
          2 * planes.stride[0],
          2 * planes.stride[1],
          2 * planes.stride[2],
          static_cast<int>(height),
          static_cast<int>(width),
          unit_of(planes)};
}

// Begins to copy a unit. Loads of 2 bytes may go before stores of others.
template <int kBytes>
__device__ void begin_copy(uint32_t to, const char* from) {
  if constexpr (kBytes == 2)
    asm volatile("st.shared.b16 [%0], %1;" ::"r"(to), "h"(__ldg(reinterpret_cast<const uint16_t*>(from))));
  else
    copy_unit<kBytes>(to, from);
}

template <int kBytes>
__device__ void clear_unit(uint32_t to) {
  if constexpr (kBytes == 16)
    asm volatile("st.shared.v4.b32 [%0], {%1,%1,%1,%1};" ::"r"(to), "r"(0));
  else if constexpr (kBytes == 8)
    asm volatile("st.shared.v2.b32 [%0], {%1,%1};" ::"r"(to), "r"(0));
  else if constexpr (kBytes == 4)
    asm volatile("st.shared.b32 [%0], %1;" ::"r"(to), "r"(0));
  else
    asm volatile("st.shared.b16 [%0], %1;" ::"r"(to), "h"(uint16_t{0}));
}

}  // namespace dwconv
