// The CPU implementations of the ops, which library.cpp registers, and what they share.
#pragma once

#include "../arguments.h"

#include <tuple>

namespace mmdet_moe::cpu {

constexpr int64_t kBytesPerThread = 1 << 15;  // less than this is not worth another thread

// Uninitialised memory.
Tensor new_tensor(const Tensor& like, const std::vector<int64_t>& sizes, ScalarType dtype);

std::tuple<Tensor, Tensor> sort_routes(Tensor expert_ids, int64_t num_experts);
Tensor dispatch(Tensor x, Tensor inverse, int64_t num_rows);
Tensor dispatch_backward(Tensor grad, Tensor inverse);
Tensor combine(Tensor y, Tensor weights, Tensor inverse);
std::tuple<Tensor, Tensor> combine_backward(
    Tensor grad, Tensor y, Tensor weights, Tensor inverse);
Tensor entmax15(Tensor x);
Tensor entmax15_backward(Tensor grad, Tensor p);

}  // namespace mmdet_moe::cpu
