// Weights and biases in the dtype of the images, as autocast has them, or with other strides.
#pragma once

#include <cuda_runtime_api.h>

#include <algorithm>
#include <array>

#include "../problem.h"

namespace dwconv {

// An array to be written in the same dtype or in another one; two different ones are of float32, float16 and bfloat16.
struct Cast {
  DType from, to;
  View source, target;
  int64_t size[4] = {1, 1, 1, 1};

  int64_t elements() const { return size[0] * size[1] * size[2] * size[3]; }

  // The same in two, along the longest dimension.
  std::array<Cast, 2> halves() const {
    const auto longest = std::max_element(size, size + 4) - size;
    Cast first = *this, second = *this;
    first.size[longest] /= 2, second.size[longest] -= first.size[longest];
    second.source.data = at(from, source, longest, first.size[longest]);
    second.target.data = at(to, target, longest, first.size[longest]);
    return {first, second};
  }

 private:
  static void* at(DType dtype, const View& view, int64_t dimension, int64_t index) {
    return static_cast<char*>(view.data) + size_of(dtype) * index * view.stride[dimension];
  }
};

void launch_cast(const Cast& cast, cudaStream_t stream);

}  // namespace dwconv
