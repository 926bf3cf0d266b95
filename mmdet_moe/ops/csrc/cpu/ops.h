// The CPU implementations of the five ops, which library.cpp registers, and what they share.
#pragma once

#include "../arguments.h"

#include <tuple>

namespace mmdet_moe::cpu {

// Uninitialised memory.
Tensor new_tensor(const Tensor& like, const std::vector<int64_t>& sizes, ScalarType dtype);

std::tuple<Tensor, Tensor, Tensor> sort_routes(Tensor expert_ids, int64_t num_experts);
Tensor dispatch(Tensor x, Tensor order, int64_t k);
Tensor dispatch_backward(Tensor grad, Tensor order, int64_t k, int64_t num_items);
Tensor combine(Tensor y, Tensor weights, Tensor inverse);
std::tuple<Tensor, Tensor> combine_backward(
    Tensor grad, Tensor y, Tensor weights, Tensor inverse);

}  // namespace mmdet_moe::cpu
