// What combine, its gradient and the gradient of dispatch share: the routes of an item, and the sum
// of their rows.
#pragma once

#include "common.cuh"

namespace mmdet_moe::cuda {

// How many routes of an item are read before the first is used, and how many vectors of each per
// lane: enough loads in flight, and not so many registers that fewer threads fit.
constexpr uint32_t kTogether = 2;
constexpr int kDepth = 2;

// The rows of up to kTogether routes of an item.
template <typename T>
struct Sources {
  bool present[kTogether];  // a row that is not contributes nothing and must not be touched
  int64_t row[kTogether];   // 0 if not present
  wide_t<T> weight[kTogether];
};

// Looks up the routes `first` to `first + count`, of which there may be none or more than fit.
// Positions of `num_rows` and more mean "not present".
template <typename T, bool kWeighted>
__device__ Sources<T> find_sources(
    const int64_t* inverse, const wide_t<T>* weights, int64_t first, uint32_t count,
    int64_t num_rows) {
  Sources<T> sources;
  // All loads before the first use of one: the assertion is a barrier to the compiler.
#pragma unroll
  for (uint32_t i = 0; i < kTogether; ++i) {
    sources.row[i] = i < count ? inverse[first + i] : num_rows;
    sources.weight[i] = kWeighted && i < count ? weights[first + i] : wide_t<T>(0);
  }
  bool valid = true;
#pragma unroll
  for (uint32_t i = 0; i < kTogether; ++i) {
    valid = valid && sources.row[i] >= 0;
    sources.present[i] = sources.row[i] >= 0 && sources.row[i] < num_rows;
    if (!sources.present[i]) {
      sources.row[i] = 0;
      sources.weight[i] = 0;
    }
  }
  CUDA_KERNEL_ASSERT_MSG(valid, "mmdet_moe: inverse must not hold negative positions");
  return sources;
}

// out[t] = sum over j of weights[t, j] * rows[inverse[t, j]], in the order of j. Without kWeighted
// all weights are 1.
template <typename T, typename Vector, bool kWeighted>
__global__ void __launch_bounds__(kThreads) gather_sum_kernel(
    Vector* __restrict__ out, const Vector* __restrict__ rows,
    const wide_t<T>* __restrict__ weights, const int64_t* __restrict__ inverse, int64_t num_rows,
    uint32_t k, int64_t width, Layout layout) {
  constexpr int kCount = sizeof(Vector) / sizeof(T);
  const Place place = my_place<kDepth>(layout);
  if (!place.active) return;
  const int64_t first = place.row * k;
  wide_t<T> sums[kDepth][kCount] = {};
  for (uint32_t j = 0; j < k; j += kTogether) {
    const Sources<T> sources =
        find_sources<T, kWeighted>(inverse, weights, first + j, k - j, num_rows);
    Vector vectors[kTogether][kDepth];
#pragma unroll
    for (uint32_t i = 0; i < kTogether; ++i) {
      load_once(
          vectors[i], rows + sources.row[i] * width, sources.present[i], place.column, width,
          layout.lane_bits);
    }
#pragma unroll
    for (uint32_t i = 0; i < kTogether; ++i) {
#pragma unroll
      for (int d = 0; d < kDepth; ++d) {
        wide_t<T> values[kCount];  // zeros, if the row is not present
        unpack<T>(vectors[i][d], values);
#pragma unroll
        for (int v = 0; v < kCount; ++v) {
          sums[d][v] += kWeighted ? sources.weight[i] * values[v] : values[v];
        }
      }
    }
  }
#pragma unroll
  for (int d = 0; d < kDepth; ++d) {
    const int64_t c = place.column + (d << layout.lane_bits);
    if (c < width) out[place.row * width + c] = pack<T, Vector>(sums[d]);
  }
}

// Launches it; weights are null for dispatch_backward.
template <typename T, bool kWeighted>
void gather_sum(
    const Tensor& out, const Tensor& rows, const wide_t<T>* weights, const Tensor& inverse,
    cudaStream_t stream) {
  void* to = out.mutable_data_ptr();
  const void* from = rows.const_data_ptr();
  const int64_t values = row_width(rows);
  with_vectors<T>(values, {to, from}, [&](auto* type) {
    using Vector = std::remove_pointer_t<decltype(type)>;
    const int64_t width = values * sizeof(T) / sizeof(Vector);
    const Layout layout = lay_out(out.size(0), width, kDepth);
    gather_sum_kernel<T, Vector, kWeighted><<<layout.blocks, kThreads, 0, stream>>>(
        static_cast<Vector*>(to), static_cast<const Vector*>(from), weights,
        inverse.const_data_ptr<int64_t>(), rows.size(0), static_cast<uint32_t>(inverse.size(1)),
        width, layout);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  });
}

}  // namespace mmdet_moe::cuda
