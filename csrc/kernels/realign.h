// Channels_last arrays of 16-bit elements that begin between multiples of 16 bytes, copied to where they begin at one:
// kernels that copy 16 bytes at once would take them 2 by 2.
#pragma once

#include "launch.h"

namespace dwconv {

// The problem with the images that its pass reads copied so, where they lie without gaps and their pixels are whole
// units of 16 bytes; the same problem where they begin at one already, or do not lie so.
Problem realigned(const Problem& problem, const Allocate& allocate, cudaStream_t stream);

// The same where there are gaps, too, which takes longer.
Problem realigned_with_gaps(const Problem& problem, const Allocate& allocate, cudaStream_t stream);

}  // namespace dwconv
