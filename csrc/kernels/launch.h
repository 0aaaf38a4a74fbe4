// The kernels' host side. A launcher trusts the plan that chose it; it checks its launch and throws
// std::runtime_error where CUDA refuses.
#pragma once

#include <cuda_runtime_api.h>

#include <functional>

#include "../problem.h"

namespace dwconv {

// Scratch memory on the device, at least until the work launched is done.
using Allocate = std::function<void*(int64_t bytes)>;

void launch_generic(const Problem& problem, const Allocate& allocate, cudaStream_t stream);

void launch_scale(const Problem& problem, cudaStream_t stream);

void launch_direct(const Problem& problem, cudaStream_t stream);
void launch_direct_grad_weight(const Problem& problem, cudaStream_t stream);
void launch_gather(const Problem& problem, cudaStream_t stream);
void launch_gather_grad_weight(const Problem& problem, cudaStream_t stream);

// Any kernel, stride and dilation. `launch`: what launches the problem that the phases make.
void launch_windows_nchw(const Problem& problem, cudaStream_t stream);
void launch_windows_channels_last(const Problem& problem, const Allocate& allocate, cudaStream_t stream);
void launch_columns_grad_weight(const Problem& problem, const Allocate& allocate, cudaStream_t stream);
void launch_walk_grad_weight_channels_last(const Problem& problem, const Allocate& allocate, cudaStream_t stream);
void launch_phases(const Problem& problem, const Allocate& allocate, const std::function<void(const Problem&)>& launch,
                   cudaStream_t stream);

// `bulk`: by bulk copies, where the GPU has them.
void launch_toeplitz_small_planes(const Problem& problem, bool bulk, cudaStream_t stream);
void launch_stream_nchw(const Problem& problem, bool bulk, const Allocate& allocate, cudaStream_t stream);
void launch_march_nchw(const Problem& problem, bool bulk, const Allocate& allocate, cudaStream_t stream);
void launch_march_grad_weight_nchw(const Problem& problem, bool bulk, const Allocate& allocate, cudaStream_t stream);
void launch_toeplitz_nchw(const Problem& problem, bool bulk, const Allocate& allocate, cudaStream_t stream);
void launch_stream_grad_weight_nchw(const Problem& problem, bool bulk, const Allocate& allocate, cudaStream_t stream);
void launch_batch_grad_weight_nchw(const Problem& problem, bool bulk, const Allocate& allocate, cudaStream_t stream);
void launch_toeplitz_grad_weight_nchw(const Problem& problem, bool bulk, const Allocate& allocate, cudaStream_t stream);

void launch_toeplitz_large(const Problem& problem, const Allocate& allocate, cudaStream_t stream);
void launch_outer_grad_weight(const Problem& problem, const Allocate& allocate, cudaStream_t stream);
void launch_hankel_grad_weight(const Problem& problem, const Allocate& allocate, cudaStream_t stream);

void launch_toeplitz_channels_last(const Problem& problem, const Allocate& allocate, cudaStream_t stream);
void launch_march_channels_last(const Problem& problem, cudaStream_t stream);
void launch_march_grad_weight_channels_last(const Problem& problem, const Allocate& allocate, cudaStream_t stream);
void launch_flat_grad_weight_channels_last(const Problem& problem, const Allocate& allocate, cudaStream_t stream);
void launch_toeplitz_grad_weight_channels_last(const Problem& problem, const Allocate& allocate, cudaStream_t stream);

void launch_fft(const Problem& problem, const Allocate& allocate, cudaStream_t stream);
void launch_fft_grad_weight(const Problem& problem, const Allocate& allocate, cudaStream_t stream);

void launch_large_float32(const Problem& problem, cudaStream_t stream);
void launch_large_float32_grad_weight(const Problem& problem, const Allocate& allocate, cudaStream_t stream);

}  // namespace dwconv
