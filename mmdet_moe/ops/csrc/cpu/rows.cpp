// dispatch, combine and their gradients on the CPU.
//
// Every op is a loop over tasks, one stretch of one row each: rows can be 4 bytes or a whole
// feature map, and both have to keep all cores busy. How rows are cut depends on their width
// alone, and sums run in a fixed order, so results do not depend on the number of threads.
#include "kernels.h"
#include "ops.h"

#include <algorithm>
#include <cstring>

namespace mmdet_moe::cpu {

MMDET_MOE_DEFINE_KERNELS(double)
MMDET_MOE_DEFINE_KERNELS(float)
MMDET_MOE_DEFINE_KERNELS(BFloat16)
MMDET_MOE_DEFINE_KERNELS(Half)

namespace {

constexpr int64_t kStretch = 8192;         // values of a row in one task
constexpr int64_t kLargerThanCaches = 16 << 20;
constexpr int64_t kRowsAhead = 2;
constexpr int64_t kBlock = 512;  // values that are computed before they are stored past the caches

int64_t stretches(int64_t width) { return (width + kStretch - 1) / kStretch; }

// Calls work(row, start, length) for every stretch of `rows` rows of `width` values.
template <typename F>
void for_each_stretch(int64_t rows, int64_t width, int64_t bytes_per_value, const F& work) {
  const int64_t parts = stretches(width);
  const int64_t bytes = std::max<int64_t>(1, std::min(width, kStretch) * bytes_per_value);
  const int64_t grain = std::max<int64_t>(1, kBytesPerThread / bytes);
  torch::stable::parallel_for(0, rows * parts, grain, [&](int64_t first, int64_t last) {
    int64_t row = first / parts, part = first % parts;
    for (int64_t task = first; task < last; ++task) {
      const int64_t start = part * kStretch;
      work(row, start, std::min(kStretch, width - start));
      if (++part == parts) {
        part = 0;
        ++row;
      }
    }
    finish_copies();
  });
}

// Calls f with a null pointer to the type of the rows.
template <typename F>
void with_type(const Tensor& rows, const F& f) {
  switch (rows.scalar_type()) {
    case ScalarType::Double: return f(static_cast<double*>(nullptr));
    case ScalarType::Float: return f(static_cast<float*>(nullptr));
    case ScalarType::BFloat16: return f(static_cast<BFloat16*>(nullptr));
    case ScalarType::Half: return f(static_cast<Half*>(nullptr));
    default:
      STD_TORCH_CHECK(false, "mmdet_moe: rows must be float64, float32, bfloat16 or float16");
  }
}

// out[t] = sum_j weights[t, j] * rows[inverse[t, j]]; positions of `count` and more are left out.
// Without weights all are 1.
template <typename T>
void gather_sum(
    T* out, const T* rows, int64_t count, const wide_t<T>* weights, const int64_t* inverse,
    int64_t items, int64_t k, int64_t width) {
  const bool past_caches = items * width * static_cast<int64_t>(sizeof(T)) >= kLargerThanCaches;
  for_each_stretch(items, width, (k + 1) * sizeof(T), [&](int64_t t, int64_t start, int64_t n) {
    constexpr int64_t kOnStack = 16;
    const T* kept_on_stack[kOnStack];
    wide_t<T> weights_on_stack[kOnStack];
    std::vector<const T*> many_kept;
    std::vector<wide_t<T>> many_weights;
    const T** kept = kept_on_stack;
    wide_t<T>* kept_weights = weights_on_stack;
    if (k > kOnStack) {
      many_kept.resize(k);
      many_weights.resize(k);
      kept = many_kept.data();
      kept_weights = many_weights.data();
    }
    int64_t num_kept = 0;
    for (int64_t j = 0; j < k; ++j) {
      if (t + kRowsAhead < items && inverse[(t + kRowsAhead) * k + j] < count) {
        prefetch_row(rows + inverse[(t + kRowsAhead) * k + j] * width, width * sizeof(T));
      }
      const int64_t m = inverse[t * k + j];
      if (m >= count) continue;
      kept[num_kept] = rows + m * width + start;
      kept_weights[num_kept++] = weights == nullptr ? wide_t<T>(1) : weights[t * k + j];
    }
    T* target = out + t * width + start;
    if (num_kept == 0) {
      std::memset(static_cast<void*>(target), 0, n * sizeof(T));
    } else if (!past_caches) {
      weighted_sum(target, kept, kept_weights, num_kept, n);
    } else {
      alignas(64) T block[kBlock];
      for (int64_t i = 0; i < n; i += kBlock) {
        const int64_t length = std::min(kBlock, n - i);
        weighted_sum(block, kept, kept_weights, num_kept, length);
        for (int64_t j = 0; j < num_kept; ++j) kept[j] += length;
        copy_past_caches(
            reinterpret_cast<char*>(target + i), reinterpret_cast<const char*>(block),
            length * sizeof(T));
      }
    }
  });
}

// Refuses positions below 0; those of `count` and more mean "dropped".
void check_positions(const int64_t* inverse, int64_t routes) {
  int64_t smallest = 0;
  for (int64_t r = 0; r < routes; ++r) smallest = std::min(smallest, inverse[r]);
  STD_TORCH_CHECK(smallest >= 0, "mmdet_moe: inverse holds ", smallest, ", a negative position");
}

// Refuses also those that leave some of `num_rows` rows to nobody.
void check_rows_are_filled(const int64_t* inverse, int64_t routes, int64_t num_rows) {
  check_positions(inverse, routes);
  int64_t filled = 0;
  for (int64_t r = 0; r < routes; ++r) filled += inverse[r] < num_rows;
  STD_TORCH_CHECK(
      filled == num_rows, "mmdet_moe: inverse holds ", filled, " positions below num_rows=", num_rows,
      ", of which each must occur exactly once");
}

}  // namespace

Tensor dispatch(Tensor x, Tensor inverse, int64_t num_rows) {
  check_dispatch(x, inverse, num_rows);
  x = as_contiguous(x);
  inverse = as_contiguous(inverse);
  const int64_t items = inverse.size(0), k = inverse.size(1);
  const int64_t bytes = row_width(x) * x.element_size();
  const int64_t* position = inverse.const_data_ptr<int64_t>();
  check_rows_are_filled(position, items * k, num_rows);
  Tensor rows = new_tensor(x, with_rows(x, num_rows), x.scalar_type());
  const char* from = static_cast<const char*>(x.const_data_ptr());
  char* to = static_cast<char*>(rows.mutable_data_ptr());
  const bool past_caches = num_rows * bytes >= kLargerThanCaches;
  for_each_stretch(items, bytes, 1 + k, [&](int64_t t, int64_t start, int64_t n) {
    const char* source = from + t * bytes + start;
    for (int64_t j = 0; j < k; ++j) {
      const int64_t m = position[t * k + j];
      if (m >= num_rows) continue;
      char* target = to + m * bytes + start;
      if (past_caches) {
        copy_past_caches(target, source, n);
      } else {
        std::memcpy(target, source, n);
      }
    }
  });
  return rows;
}

Tensor dispatch_backward(Tensor grad, Tensor inverse) {
  check_dispatch_backward(grad, inverse);
  grad = as_contiguous(grad);
  inverse = as_contiguous(inverse);
  const int64_t items = inverse.size(0), k = inverse.size(1), width = row_width(grad);
  const int64_t* position = inverse.const_data_ptr<int64_t>();
  check_positions(position, items * k);
  Tensor out = new_tensor(grad, with_rows(grad, items), grad.scalar_type());
  with_type(grad, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    gather_sum<T>(
        static_cast<T*>(out.mutable_data_ptr()), static_cast<const T*>(grad.const_data_ptr()),
        grad.size(0), nullptr, position, items, k, width);
  });
  return out;
}

Tensor combine(Tensor y, Tensor weights, Tensor inverse) {
  check_combine(y, weights, inverse);
  y = as_contiguous(y);
  weights = as_contiguous(weights);
  inverse = as_contiguous(inverse);
  const int64_t items = inverse.size(0), k = inverse.size(1), width = row_width(y);
  const int64_t* position = inverse.const_data_ptr<int64_t>();
  check_positions(position, items * k);
  Tensor out = new_tensor(y, with_rows(y, items), y.scalar_type());
  with_type(y, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    gather_sum<T>(
        static_cast<T*>(out.mutable_data_ptr()), static_cast<const T*>(y.const_data_ptr()),
        y.size(0), weights.const_data_ptr<wide_t<T>>(), position, items, k, width);
  });
  return out;
}

std::tuple<Tensor, Tensor> combine_backward(
    Tensor grad, Tensor y, Tensor weights, Tensor inverse) {
  check_combine_backward(grad, y, weights, inverse);
  grad = as_contiguous(grad);
  y = as_contiguous(y);
  weights = as_contiguous(weights);
  inverse = as_contiguous(inverse);
  const int64_t items = inverse.size(0), k = inverse.size(1), width = row_width(y);
  const int64_t count = y.size(0), parts = stretches(width);
  const int64_t* position = inverse.const_data_ptr<int64_t>();
  check_positions(position, items * k);
  Tensor grad_y = new_tensor(y, with_rows(y, count), y.scalar_type());
  Tensor grad_weights = new_tensor(weights, {items, k}, weights.scalar_type());
  with_type(y, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    using W = wide_t<T>;
    const T* grad_in = static_cast<const T*>(grad.const_data_ptr());
    const T* y_in = static_cast<const T*>(y.const_data_ptr());
    const W* weight = weights.const_data_ptr<W>();
    T* grad_y_out = static_cast<T*>(grad_y.mutable_data_ptr());
    W* grad_weight = grad_weights.mutable_data_ptr<W>();
    std::vector<W> dots(items * k * parts, W(0));  // of every stretch
    const int64_t bytes = width * sizeof(T);
    const bool past_caches = count * bytes >= kLargerThanCaches;
    for_each_stretch(items, width, (2 * k + 1) * sizeof(T), [&](int64_t t, int64_t start, int64_t n) {
      const T* g = grad_in + t * width + start;
      for (int64_t j = 0; j < k; ++j) {
        const int64_t r = t * k + j, m = position[r];
        if (r + kRowsAhead * k < items * k && position[r + kRowsAhead * k] < count) {
          prefetch_row(y_in + position[r + kRowsAhead * k] * width, bytes);
        }
        if (m >= count) continue;
        const T* row = y_in + m * width + start;
        T* target = grad_y_out + m * width + start;
        W dot = 0;
        if (past_caches) {
          alignas(64) T block[kBlock];
          for (int64_t i = 0; i < n; i += kBlock) {
            const int64_t length = std::min(kBlock, n - i);
            dot += scale_and_dot(block, g + i, row + i, weight[r], length);
            copy_past_caches(
                reinterpret_cast<char*>(target + i), reinterpret_cast<const char*>(block),
                length * sizeof(T));
          }
        } else {
          dot = scale_and_dot(target, g, row, weight[r], n);
        }
        dots[r * parts + start / kStretch] = dot;
      }
    });
    for (int64_t r = 0; r < items * k; ++r) {
      double sum = 0;
      for (int64_t p = 0; p < parts; ++p) sum += dots[r * parts + p];
      grad_weight[r] = static_cast<W>(sum);
    }
  });
  return {grad_y, grad_weights};
}

}  // namespace mmdet_moe::cpu
