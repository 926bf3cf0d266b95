// The inner loops over one stretch of a row, compiled for several instruction sets of which the
// best is chosen when the library is loaded.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#if defined(__x86_64__) && defined(__linux__) && !defined(__clang__) && __GNUC__ >= 12
#define MMDET_MOE_CLONES \
  __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define MMDET_MOE_CLONES
#endif
#define MMDET_MOE_INLINE inline __attribute__((always_inline))

namespace mmdet_moe::cpu {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;

// What a row type is computed in.
template <typename T>
struct Wide {
  using type = float;
};
template <>
struct Wide<double> {
  using type = double;
};
template <typename T>
using wide_t = typename Wide<T>::type;

// Asks for a narrow row ahead of its use. Rows of one expert are apart from each other, which the
// hardware's prefetcher does not see; inside a wide row it does.
MMDET_MOE_INLINE void prefetch_row(const void* row, int64_t bytes) {
  constexpr int64_t kLine = 64, kNarrow = 4096;
  if (bytes > kNarrow) return;
  for (int64_t i = 0; i < bytes; i += kLine) __builtin_prefetch(static_cast<const char*>(row) + i);
}

// memcpy past the caches: what is larger than they are would only push out what is used next, and
// the old content of the target need not be read.
MMDET_MOE_INLINE void copy_past_caches(char* to, const char* from, int64_t bytes) {
#if defined(__SSE2__)
  constexpr int64_t kLine = 64;
  if (reinterpret_cast<uintptr_t>(to) % 16 == 0) {
    for (; bytes >= kLine; bytes -= kLine, to += kLine, from += kLine) {
      __m128i part[4];
      for (int i = 0; i < 4; ++i) part[i] = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from) + i);
      for (int i = 0; i < 4; ++i) _mm_stream_si128(reinterpret_cast<__m128i*>(to) + i, part[i]);
    }
  }
#endif
  std::memcpy(to, from, bytes);
}

// Makes such stores visible to other threads; to be called by the thread that made them.
MMDET_MOE_INLINE void finish_copies() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

// out[i] = sum_j weights[j] * rows[j][i], in the order of j.
template <typename T>
MMDET_MOE_INLINE void weighted_sum_loop(
    T* __restrict out, const T* const* rows, const wide_t<T>* weights, int64_t count, int64_t n) {
  using W = wide_t<T>;
  if (count == 1) {
    const T* __restrict a = rows[0];
    const W u = weights[0];
    for (int64_t i = 0; i < n; ++i) out[i] = static_cast<T>(u * static_cast<W>(a[i]));
  } else if (count == 2) {
    const T* __restrict a = rows[0];
    const T* __restrict b = rows[1];
    const W u = weights[0], v = weights[1];
    for (int64_t i = 0; i < n; ++i) {
      out[i] = static_cast<T>(u * static_cast<W>(a[i]) + v * static_cast<W>(b[i]));
    }
  } else {
    constexpr int64_t kBlock = 256;
    W sum[kBlock];
    for (int64_t start = 0; start < n; start += kBlock) {
      const int64_t length = n - start < kBlock ? n - start : kBlock;
      for (int64_t i = 0; i < length; ++i) sum[i] = 0;
      for (int64_t j = 0; j < count; ++j) {
        const T* __restrict a = rows[j] + start;
        const W u = weights[j];
        for (int64_t i = 0; i < length; ++i) sum[i] += u * static_cast<W>(a[i]);
      }
      for (int64_t i = 0; i < length; ++i) out[start + i] = static_cast<T>(sum[i]);
    }
  }
}

// The sum of partial sums, in a fixed order; overwrites them.
template <typename W, size_t kLanes>
MMDET_MOE_INLINE W sum_lanes(W (&lanes)[kLanes]) {
  for (size_t width = kLanes / 2; width > 0; width /= 2) {
    for (size_t l = 0; l < width; ++l) lanes[l] += lanes[l + width];
  }
  return lanes[0];
}

// out[i] = weight * grad[i]; returns sum_i grad[i] * y[i], in an order that depends on n alone.
template <typename T>
MMDET_MOE_INLINE wide_t<T> scale_and_dot_loop(
    T* __restrict out, const T* __restrict grad, const T* __restrict y, wide_t<T> weight,
    int64_t n) {
  using W = wide_t<T>;
  constexpr int64_t kLanes = 32;
  W sum[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (int64_t l = 0; l < kLanes; ++l) {
      const W g = static_cast<W>(grad[i + l]);
      out[i + l] = static_cast<T>(weight * g);
      sum[l] += g * static_cast<W>(y[i + l]);
    }
  }
  for (int64_t l = 0; i < n; ++i, ++l) {
    const W g = static_cast<W>(grad[i]);
    out[i] = static_cast<T>(weight * g);
    sum[l] += g * static_cast<W>(y[i]);
  }
  return sum_lanes(sum);
}

// Attributes of this kind belong on plain functions, hence one overload per type.
#define MMDET_MOE_DEFINE_KERNELS(T)                                                         \
  MMDET_MOE_CLONES void weighted_sum(                                                       \
      T* out, const T* const* rows, const wide_t<T>* weights, int64_t count, int64_t n) {   \
    weighted_sum_loop<T>(out, rows, weights, count, n);                                     \
  }                                                                                         \
  MMDET_MOE_CLONES wide_t<T> scale_and_dot(                                                 \
      T* out, const T* grad, const T* y, wide_t<T> weight, int64_t n) {                     \
    return scale_and_dot_loop<T>(out, grad, y, weight, n);                                  \
  }

}  // namespace mmdet_moe::cpu
