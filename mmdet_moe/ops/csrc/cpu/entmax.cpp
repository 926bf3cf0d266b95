// entmax15 (Peters, Niculae and Martins, "Sparse sequence-to-sequence models", ACL 2019) on the CPU.
//
// p_i = max(z_i - tau, 0)^2 with z = (x - max(x)) / 2 and the tau for which the p_i sum to 1. It lies
// in [-1, 0): one value alone would have -1. The algorithm needs no sort:
//
// 1. h(tau) = sqrt(sum_i max(z_i - tau, 0)^2) is convex and falls, so that Newton's method for
//    h(tau) = 1, started at -1, comes up to the root from below. All it takes are sums over z.
// 2. Close to the root the values above tau are those that stay above it, and for a known support
//    tau is the root of a quadratic equation. Whether the support is the same at that root is known
//    once p is written, and a guess that was too early only goes on with step 1.
//
// A row is read from the first-level cache each time. Its sums have a fixed order.
#include "kernels.h"
#include "ops.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <type_traits>

namespace mmdet_moe::cpu {
namespace {

constexpr int64_t kLanes = 32;
constexpr int64_t kBlock = 1024;  // values that are summed in T; the blocks are summed in double
constexpr double kClose = 1.3;    // a sum of squares below it is worth a try of step 2
constexpr int kMostSteps = 100;   // never reached: a handful are taken

int64_t padded(int64_t n) { return (n + kLanes - 1) / kLanes * kLanes; }

// As wide as T, so that both fill the same vectors.
template <typename T>
using count_t = std::conditional_t<sizeof(T) == 8, int64_t, int32_t>;

// Of the values above tau: how many, and the sums of their distances and of the squares of these.
struct Sums {
  int64_t count;
  double distances, squares;
};

// NaN counts as infinity.
template <typename T>
MMDET_MOE_INLINE T largest_of(const T* __restrict x, int64_t n) {
  constexpr T kInfinity = std::numeric_limits<T>::infinity();
  T lanes[kLanes];
  for (int64_t l = 0; l < kLanes; ++l) lanes[l] = -kInfinity;
  const auto take = [&](int64_t l, T value) {
    value = value == value ? value : kInfinity;
    lanes[l] = value > lanes[l] ? value : lanes[l];
  };
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (int64_t l = 0; l < kLanes; ++l) take(l, x[i + l]);
  }
  for (int64_t l = 0; i < n; ++i, ++l) take(l, x[i]);
  for (int64_t width = kLanes / 2; width > 0; width /= 2) {
    for (int64_t l = 0; l < width; ++l) take(l, lanes[l + width]);
  }
  return lanes[0];
}

// n is a multiple of kLanes.
template <typename T>
MMDET_MOE_INLINE Sums sums_above(const T* __restrict z, int64_t n, T tau) {
  Sums sums{};
  for (int64_t start = 0; start < n; start += kBlock) {
    const int64_t end = std::min(n, start + kBlock);
    count_t<T> count[kLanes] = {};
    T distances[kLanes] = {}, squares[kLanes] = {};
    for (int64_t i = start; i < end; i += kLanes) {
      for (int64_t l = 0; l < kLanes; ++l) {
        const T distance = z[i + l] - tau;
        const T above = distance > 0 ? distance : T(0);
        count[l] += distance > 0;
        distances[l] += above;
        squares[l] += above * above;
      }
    }
    sums.count += sum_lanes(count);
    sums.distances += sum_lanes(distances);
    sums.squares += sum_lanes(squares);
  }
  return sums;
}

// Writes p, and returns how many z lie above tau.
template <typename T>
MMDET_MOE_INLINE int64_t write_row(T* __restrict p, const T* __restrict z, int64_t n, T tau) {
  int64_t total = 0;
  for (int64_t start = 0; start < n; start += kBlock) {
    const int64_t end = std::min(n, start + kBlock);
    count_t<T> count[kLanes] = {};
    const auto write = [&](int64_t i, int64_t l) {
      const T distance = z[i] - tau;
      const T above = distance > 0 ? distance : T(0);
      count[l] += distance > 0;
      p[i] = above * above;
    };
    int64_t i = start;
    for (; i + kLanes <= end; i += kLanes) {
      for (int64_t l = 0; l < kLanes; ++l) write(i + l, l);
    }
    for (int64_t l = 0; i < end; ++i, ++l) write(i, l);
    total += sum_lanes(count);
  }
  return total;
}

// `z` is room for padded(n) values.
template <typename T>
MMDET_MOE_INLINE void entmax15_loop(
    T* __restrict p, T* __restrict z, const T* __restrict x, int64_t n) {
  const T largest = largest_of(x, n);
  if (!(std::abs(largest) <= std::numeric_limits<T>::max())) {  // as softmax does
    std::fill(p, p + n, std::numeric_limits<T>::quiet_NaN());
    return;
  }
  const T half = T(0.5) * largest;  // halves, because the difference may be too large
  for (int64_t i = 0; i < n; ++i) z[i] = T(0.5) * x[i] - half;
  const int64_t length = padded(n);
  std::fill(z + n, z + length, -std::numeric_limits<T>::infinity());
  T tau = -1;
  for (int step = 1;; ++step) {
    const Sums sums = sums_above(z, length, tau);
    const double excess = sums.squares - 1;
    const T next = static_cast<T>(tau + (sums.squares - std::sqrt(sums.squares)) / sums.distances);
    const bool last = !(next > tau) || step == kMostSteps;
    if (sums.squares < kClose || last) {
      // The smaller root of count·t² - 2·distances·t + excess = 0, without cancellation.
      const double root = sums.distances * sums.distances - static_cast<double>(sums.count) * excess;
      const double rest = excess / (sums.distances + std::sqrt(std::max(root, 0.0)));
      const int64_t count = write_row(p, z, n, static_cast<T>(tau + rest));
      if (count == sums.count || last) return;
    }
    tau = next;
  }
}

// With s = sqrt(p): grad_x = s·(grad - sum(s·grad) / sum(s)).
template <typename T>
MMDET_MOE_INLINE void entmax15_backward_loop(
    T* __restrict out, const T* __restrict grad, const T* __restrict p, int64_t n) {
  double weighted_total = 0, total = 0;
  for (int64_t start = 0; start < n; start += kBlock) {
    const int64_t end = std::min(n, start + kBlock);
    T weighted[kLanes] = {}, sum[kLanes] = {};
    const auto take = [&](int64_t i, int64_t l) {
      const T s = std::sqrt(p[i]);
      out[i] = s;
      weighted[l] += s * grad[i];
      sum[l] += s;
    };
    int64_t i = start;
    for (; i + kLanes <= end; i += kLanes) {
      for (int64_t l = 0; l < kLanes; ++l) take(i + l, l);
    }
    for (int64_t l = 0; i < end; ++i, ++l) take(i, l);
    weighted_total += sum_lanes(weighted);
    total += sum_lanes(sum);
  }
  const T mean = static_cast<T>(weighted_total / total);
  for (int64_t i = 0; i < n; ++i) out[i] *= grad[i] - mean;
}

// Attributes of this kind belong on plain functions, hence one overload per type.
#define MMDET_MOE_DEFINE_ENTMAX15(T)                                                          \
  MMDET_MOE_CLONES void entmax15_row(T* p, T* z, const T* x, int64_t n) {                     \
    entmax15_loop<T>(p, z, x, n);                                                             \
  }                                                                                           \
  MMDET_MOE_CLONES void entmax15_backward_row(T* out, const T* grad, const T* p, int64_t n) { \
    entmax15_backward_loop<T>(out, grad, p, n);                                               \
  }
MMDET_MOE_DEFINE_ENTMAX15(double)
MMDET_MOE_DEFINE_ENTMAX15(float)

// Calls work(null pointer to the type, first row, last row, width) on stretches of the rows.
template <typename F>
void for_each_stretch(const Tensor& rows, const F& work) {
  if (rows.numel() == 0) return;
  const int64_t width = rows.size(rows.dim() - 1), count = rows.numel() / width;
  const int64_t grain = std::max<int64_t>(1, kBytesPerThread / (width * rows.element_size()));
  torch::stable::parallel_for(0, count, grain, [&](int64_t first, int64_t last) {
    if (rows.scalar_type() == ScalarType::Double) {
      work(static_cast<double*>(nullptr), first, last, width);
    } else {
      work(static_cast<float*>(nullptr), first, last, width);
    }
  });
}

Tensor new_like(const Tensor& x) {
  return new_tensor(x, {x.sizes().begin(), x.sizes().end()}, x.scalar_type());
}

}  // namespace

Tensor entmax15(Tensor x) {
  check_entmax15(x, "x");
  x = as_contiguous(x);
  Tensor p = new_like(x);
  for_each_stretch(x, [&](auto* type, int64_t first, int64_t last, int64_t n) {
    using T = std::remove_pointer_t<decltype(type)>;
    constexpr size_t kLine = 64;
    std::vector<T> memory(padded(n) + kLine / sizeof(T));
    T* const z = reinterpret_cast<T*>(
        (reinterpret_cast<uintptr_t>(memory.data()) + kLine - 1) / kLine * kLine);
    const T* from = x.const_data_ptr<T>();
    T* to = p.mutable_data_ptr<T>();
    for (int64_t row = first; row < last; ++row) entmax15_row(to + row * n, z, from + row * n, n);
  });
  return p;
}

Tensor entmax15_backward(Tensor grad, Tensor p) {
  check_entmax15_backward(grad, p);
  grad = as_contiguous(grad);
  p = as_contiguous(p);
  Tensor out = new_like(p);
  for_each_stretch(p, [&](auto* type, int64_t first, int64_t last, int64_t n) {
    using T = std::remove_pointer_t<decltype(type)>;
    const T* grads = grad.const_data_ptr<T>();
    const T* values = p.const_data_ptr<T>();
    T* to = out.mutable_data_ptr<T>();
    for (int64_t row = first; row < last; ++row) {
      entmax15_backward_row(to + row * n, grads + row * n, values + row * n, n);
    }
  });
  return out;
}

}  // namespace mmdet_moe::cpu
