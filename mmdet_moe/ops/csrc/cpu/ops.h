// The CPU implementations of the five ops; library.cpp registers them.
#pragma once

#include "../arguments.h"

#include <tuple>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace mmdet_moe::cpu {

// Uninitialised memory, in huge pages where it is large: the C library gives large blocks back to
// the system as soon as they are freed, and to touch fresh 4 KiB pages costs more than to fill them.
inline Tensor new_tensor(const Tensor& like, const std::vector<int64_t>& sizes, ScalarType dtype) {
  Tensor tensor = torch::stable::new_empty(like, sizes, dtype);
#if defined(__linux__)
  constexpr uintptr_t kPage = 4096, kLarge = 4 << 20;
  const uintptr_t bytes = tensor.numel() * tensor.element_size();
  if (bytes >= kLarge) {
    const uintptr_t begin = reinterpret_cast<uintptr_t>(tensor.mutable_data_ptr());
    const uintptr_t first = (begin + kPage - 1) / kPage * kPage;
    const uintptr_t last = (begin + bytes) / kPage * kPage;
    // A hint: where huge pages are off, nothing changes.
    madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
  }
#endif
  return tensor;
}

std::tuple<Tensor, Tensor, Tensor> sort_routes(Tensor expert_ids, int64_t num_experts);
Tensor dispatch(Tensor x, Tensor order, int64_t k);
Tensor dispatch_backward(Tensor grad, Tensor order, int64_t k, int64_t num_items);
Tensor combine(Tensor y, Tensor weights, Tensor inverse);
std::tuple<Tensor, Tensor> combine_backward(
    Tensor grad, Tensor y, Tensor weights, Tensor inverse);

}  // namespace mmdet_moe::cpu
