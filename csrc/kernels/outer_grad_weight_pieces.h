// Another way to take what outer_grad_weight.cu serves: whole planes by warpgroups, which sm_90 alone has.
#pragma once

#include "launch.h"
#include "planes.cuh"

namespace dwconv {

constexpr int kHalfColumns = 28, kQuarterColumns = 14;  // of a piece, of two or four rows
inline bool has_pieces(int64_t width) {
  return width == kHalfColumns || width == kQuarterColumns;
}

// Takes what outer_grad_weight.cu has of a problem `p` whose rows and columns may be `exchanged`, as those of its
// planes are. Returns whether it can, and is worth it.
bool launch_outer_grad_weight_pieces(const Problem& p, bool exchanged, const ImagePlanes& source,
                                     const ImagePlanes& grad, const Allocate& allocate, cudaStream_t stream);

}  // namespace dwconv
