// What the CPU and the CUDA kernels share: the look at their arguments.
//
// Letters: T routed items, E experts, K experts per item, M = T * K routes, R <= M of them that are
// kept, W values per row (N along the last dimension, for entmax15). The Python functions in mmdet_moe/ops/functional.py refuse bad arguments
// with sentences for users; the checks here keep a direct call of torch.ops.mmdet_moe.* from
// touching memory that is not its own.
//
// Only PyTorch's stable ABI is used, so one binary serves every PyTorch from 2.10 on.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <vector>

namespace mmdet_moe {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Values per row: the product of all sizes but the first.
inline int64_t row_width(const Tensor& rows) {
  int64_t width = 1;
  for (int64_t d = 1; d < rows.dim(); ++d) width *= rows.size(d);
  return width;
}

// Itself, if it is: PyTorch's own function takes a microsecond to find that out.
inline Tensor as_contiguous(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

// The sizes of `rows` with another number of rows.
inline std::vector<int64_t> with_rows(const Tensor& rows, int64_t count) {
  std::vector<int64_t> sizes(rows.sizes().begin(), rows.sizes().end());
  sizes[0] = count;
  return sizes;
}

inline void check_same_device(const Tensor& a, const Tensor& b) {
  STD_TORCH_CHECK(
      a.is_cuda() == b.is_cuda() && a.get_device_index() == b.get_device_index(),
      "mmdet_moe: all tensors of one call must lie on one device");
}

inline void check_ids(const Tensor& ids, const char* name, int64_t dim) {
  STD_TORCH_CHECK(
      ids.scalar_type() == ScalarType::Long && ids.dim() == dim,
      "mmdet_moe: ", name, " must be an int64 tensor of ", dim, " dimension(s)");
}

inline void check_rows(const Tensor& rows, const char* name) {
  STD_TORCH_CHECK(rows.dim() >= 1, "mmdet_moe: ", name, " must have at least one dimension");
}

// double rows are weighted and summed in double, all others in float.
inline ScalarType accumulation_type(ScalarType rows) {
  return rows == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline void check_dispatch(const Tensor& x, const Tensor& inverse, int64_t num_rows) {
  check_rows(x, "x");
  check_ids(inverse, "inverse", 2);
  check_same_device(x, inverse);
  STD_TORCH_CHECK(
      inverse.size(0) == x.size(0), "mmdet_moe: inverse has routes of ", inverse.size(0),
      " items, but x has ", x.size(0));
  // A row that no route refers to would be left uninitialised.
  STD_TORCH_CHECK(
      num_rows >= 0 && num_rows <= inverse.size(0) * inverse.size(1),
      "mmdet_moe: num_rows must be between 0 and the number of routes, got ", num_rows);
}

inline void check_dispatch_backward(const Tensor& grad, const Tensor& inverse) {
  check_rows(grad, "grad");
  check_ids(inverse, "inverse", 2);
  check_same_device(grad, inverse);
}

inline void check_combine(const Tensor& y, const Tensor& weights, const Tensor& inverse) {
  check_rows(y, "y");
  check_ids(inverse, "inverse", 2);
  check_same_device(y, weights);
  check_same_device(y, inverse);
  STD_TORCH_CHECK(
      weights.scalar_type() == accumulation_type(y.scalar_type()),
      "mmdet_moe: weights must be float64 for float64 rows and float32 for all others");
  STD_TORCH_CHECK(
      weights.dim() == 2 && weights.size(0) == inverse.size(0) && weights.size(1) == inverse.size(1),
      "mmdet_moe: weights and inverse must have the same shape (T, K)");
}

inline void check_combine_backward(
    const Tensor& grad, const Tensor& y, const Tensor& weights, const Tensor& inverse) {
  check_combine(y, weights, inverse);
  // A row that no route refers to would be left uninitialised.
  STD_TORCH_CHECK(
      y.size(0) <= inverse.size(0) * inverse.size(1),
      "mmdet_moe: y has ", y.size(0), " rows, more than there are routes");
  check_rows(grad, "grad");
  check_same_device(y, grad);
  STD_TORCH_CHECK(
      grad.scalar_type() == y.scalar_type() && grad.size(0) == inverse.size(0) &&
          row_width(grad) == row_width(y),
      "mmdet_moe: grad must have y's dtype and one row of y's width per item");
}

// entmax15 works along the last dimension, of N values.
inline void check_entmax15(const Tensor& x, const char* name) {
  check_rows(x, name);
  STD_TORCH_CHECK(
      x.scalar_type() == ScalarType::Double || x.scalar_type() == ScalarType::Float,
      "mmdet_moe: ", name, " must be float64 or float32");
  STD_TORCH_CHECK(
      x.size(x.dim() - 1) >= 1, "mmdet_moe: the last dimension of ", name, " must not be empty");
}

inline void check_entmax15_backward(const Tensor& grad, const Tensor& p) {
  check_entmax15(p, "p");
  check_same_device(grad, p);
  bool fits = grad.scalar_type() == p.scalar_type() && grad.dim() == p.dim();
  for (int64_t d = 0; fits && d < p.dim(); ++d) fits = grad.size(d) == p.size(d);
  STD_TORCH_CHECK(fits, "mmdet_moe: grad must have p's dtype and shape");
}

}  // namespace mmdet_moe
