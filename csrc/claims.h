// Which problems each plan claims. A claim says two things: that the plan is right for the problem, and that it pays.
//
// What is right comes first, before an empty line or in a function of its own, can_...(): what kernels are compiled
// for, how they read arrays, what 32 bits count and shared memory holds. Launchers rely on it. What pays are bounds
// that were measured, beyond which another plan that would be right as well is faster. For these a claim may ask what
// plans behind it in the table (plan.cpp) claim, never what those ahead of it do: they have had their turn.
#pragma once

#include "problem.h"

namespace dwconv {

// claims_nchw.cpp: planes whose rows follow each other without gaps, so that they can stream, and small kernels.
bool claims_stream_nchw(const Problem& p);
bool claims_stream_grad_weight_nchw(const Problem& p);
bool claims_march_nchw(const Problem& p);
bool claims_march_grad_weight_nchw(const Problem& p);
bool claims_toeplitz_nchw(const Problem& p);
bool claims_toeplitz_grad_weight_nchw(const Problem& p);
bool claims_toeplitz_small_planes(const Problem& p);
bool claims_batch_grad_weight_nchw(const Problem& p);

// claims_channels_last.cpp: channels side by side; small kernels, and on tensor cores some larger ones.
bool claims_march_channels_last(const Problem& p);
bool claims_march_grad_weight_channels_last(const Problem& p);
bool claims_flat_grad_weight_channels_last(const Problem& p);
bool claims_toeplitz_channels_last(const Problem& p);
bool claims_toeplitz_grad_weight_channels_last(const Problem& p);

// claims_large.cpp: kernels of any size, with enough to compute.
bool claims_toeplitz_large(const Problem& p);
bool claims_hankel_grad_weight(const Problem& p);
bool claims_outer_grad_weight(const Problem& p);
bool claims_large_float32(const Problem& p);
bool claims_large_float32_grad_weight(const Problem& p);
bool claims_fft(const Problem& p);
bool claims_fft_grad_weight(const Problem& p);
bool claims_phases(const Problem& p);

// claims_little.cpp: straight from memory, where there is little to do; and single taps.
bool claims_scale(const Problem& p);
bool claims_direct(const Problem& p);
bool claims_direct_grad_weight(const Problem& p);
bool claims_gather(const Problem& p);
bool claims_gather_grad_weight(const Problem& p);

// claims_any.cpp: any kernel, stride and dilation, where nothing else is right or has less to do.
bool claims_columns_grad_weight(const Problem& p);
bool claims_walk_grad_weight_channels_last(const Problem& p);
bool claims_windows_channels_last(const Problem& p);
bool claims_windows_nchw(const Problem& p);
bool claims_generic(const Problem& p);

// Whether a plan claims the problem, and is faster than plans ahead of it in the table: see kPreferences.
bool prefers_march_channels_last(const Problem& p);
bool prefers_walk_grad_weight_channels_last(const Problem& p);
bool prefers_windows_channels_last(const Problem& p);
bool prefers_windows_nchw(const Problem& p);
bool prefers_few_taps_nchw(const Problem& p);
bool prefers_few_taps_channels_last(const Problem& p);
bool prefers_columns_grad_weight(const Problem& p);

}  // namespace dwconv
