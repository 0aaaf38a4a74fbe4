// Another way to take what hankel_grad_weight.cu serves, and some of outer_grad_weight.cu: whole planes by warpgroups,
// which sm_90 alone has.
#pragma once

#include "launch.h"
#include "planes.cuh"

namespace dwconv {

constexpr int64_t kFewHankelColumns = 36;  // of planes that others multiply fewer columns of

// A kernel of so many rows and columns, counted from an even column of the padded input on, is one piece.
constexpr int64_t kHankelPieceRows = 37, kHankelPieceColumns = 16;

inline bool is_hankel_piece(const Problem& p) {
  return p.kernel_h <= kHankelPieceRows && p.kernel_w + p.padding_w % 2 <= kHankelPieceColumns;
}

// Takes a problem `p` whose rows and columns are exchanged or not, unless planes have few columns: 56 are multiplied
// however many there are. Returns whether it can, and is worth it.
bool launch_hankel_grad_weight_groups(const Problem& p, bool exchanged, const ImagePlanes& source,
                                      const ImagePlanes& grad, int64_t few_columns, const Allocate& allocate,
                                      cudaStream_t stream);

}  // namespace dwconv
