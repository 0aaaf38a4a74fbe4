// Weights and biases in the dtype of the images, as autocast has them, or with other strides.
#pragma once

#include <cuda_runtime_api.h>

#include "../problem.h"

namespace dwconv {

// An array to be written in the same dtype or in another one; two different ones are of float32, float16 and bfloat16.
struct Cast {
  DType from, to;
  View source, target;
  int64_t size[4] = {1, 1, 1, 1};
};
void launch_cast(const Cast& cast, cudaStream_t stream);

}  // namespace dwconv
