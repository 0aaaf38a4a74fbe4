// The second step of every grad_weight: adds up the sums that were taken over parts of the images.
#pragma once

#include <cuda_runtime_api.h>

#include "../problem.h"

namespace dwconv {

// `partial` lies as [split][tap, or bias behind the last tap][filter], in the type that sums are kept in. The order of
// a sum is always the same. Starts early, where the device can do that, and waits for the kernel before.
void launch_add_partial_sums(const Problem& problem, const void* partial, int64_t splits, cudaStream_t stream);

}  // namespace dwconv
