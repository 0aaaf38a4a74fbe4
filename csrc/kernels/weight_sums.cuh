// Where a kernel of grad_weight puts its sums: straight into the gradients where each is over all images, and into
// partial sums, which a second kernel adds up, where each is over a part of them.
#pragma once

#include "common.cuh"
#include "launch.h"
#include "partial_sums.h"

namespace dwconv {

struct WeightSums {
  void *grad_weight, *grad_bias;  // the latter null where it is not wanted
  float* partial;                 // as launch_add_partial_sums takes them, or null
  int filters, taps;

  __device__ bool with_bias() const { return grad_bias != nullptr; }

  // `slot`: a tap, or behind the last one the bias.
  template <typename T>
  __device__ void put(int filter, int split, int slot, float sum) const {
    if (partial != nullptr)
      partial[(int64_t{split} * (taps + with_bias()) + slot) * filters + filter] = sum;
    else if (slot < taps)
      static_cast<T*>(grad_weight)[int64_t{filter} * taps + slot] = narrow<T>(sum);
    else
      static_cast<T*>(grad_bias)[filter] = narrow<T>(sum);
  }
};

// With memory for partial sums where there are several splits.
inline WeightSums weight_sums(const Problem& p, int64_t splits, const Allocate& allocate) {
  const int64_t sums = (p.taps() + (p.bias != nullptr)) * p.filters();
  return {p.weight.data, p.bias,
          splits > 1 ? static_cast<float*>(allocate(splits * sums * int64_t{sizeof(float)})) : nullptr,
          static_cast<int>(p.filters()), static_cast<int>(p.taps())};
}

inline void launch_add_partial_sums(const Problem& p, const WeightSums& sums, int64_t splits, cudaStream_t stream) {
  if (sums.partial != nullptr) launch_add_partial_sums(p, sums.partial, splits, stream);
}

}  // namespace dwconv
