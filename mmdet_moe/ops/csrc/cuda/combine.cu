// combine on CUDA and its gradient.
#include "routes.cuh"

#include <algorithm>

namespace mmdet_moe::cuda {
namespace {

// The sum over a group of lanes, in all of them; all threads of the warp must call it. Its order is
// fixed.
template <typename Wide>
__device__ Wide group_sum(Wide value, uint32_t lane_bits) {
  for (uint32_t distance = (1u << lane_bits) >> 1; distance > 0; distance >>= 1) {
    value += __shfl_xor_sync(0xffffffffu, value, distance);
  }
  return value;
}

// grad_y[inverse[t, j]] = weights[t, j] * grad[t], and dots[t, j, s] = <grad[t], y[inverse[t, j]]>
// over the segment s of the row. One pass: each segment of grad is read once for all routes of the
// item, each of y once for both results.
template <typename T, typename Vector>
__global__ void __launch_bounds__(kThreads) combine_backward_kernel(
    Vector* __restrict__ grad_y, wide_t<T>* __restrict__ dots, const Vector* __restrict__ grad,
    const Vector* __restrict__ y, const wide_t<T>* __restrict__ weights,
    const int64_t* __restrict__ inverse, int64_t num_rows, uint32_t k, int64_t width,
    Layout layout) {
  constexpr int kCount = sizeof(Vector) / sizeof(T);
  const Place place = my_place<kDepth>(layout);
  const int64_t first = place.row * k;
  // No thread may leave early: all of a warp take part in group_sum.
  Vector grads[kDepth];
  load_once(
      grads, grad + place.row * width, place.active, place.column, width, layout.lane_bits);
  for (uint32_t j = 0; j < k; j += kTogether) {
    const Sources<T> sources = find_sources<T, true>(
        inverse, weights, first + j, place.active ? k - j : 0, num_rows);
    Vector vectors[kTogether][kDepth];
#pragma unroll
    for (uint32_t i = 0; i < kTogether; ++i) {
      load_once(
          vectors[i], y + sources.row[i] * width, sources.present[i], place.column, width,
          layout.lane_bits);
    }
#pragma unroll
    for (uint32_t i = 0; i < kTogether; ++i) {
      wide_t<T> dot = 0;
#pragma unroll
      for (int d = 0; d < kDepth; ++d) {
        wide_t<T> g[kCount], values[kCount];
        unpack<T>(grads[d], g);
        unpack<T>(vectors[i][d], values);
#pragma unroll
        for (int v = 0; v < kCount; ++v) {
          dot += g[v] * values[v];
          g[v] *= sources.weight[i];
        }
        const int64_t c = place.column + (d << layout.lane_bits);
        if (sources.present[i] && c < width) {
          grad_y[sources.row[i] * width + c] = pack<T, Vector>(g);
        }
      }
      dot = group_sum(dot, layout.lane_bits);
      if (place.active && place.lane == 0 && j + i < k) {
        // Not the dot itself without a row: it is NaN if grad has infinite values.
        dots[(first + j + i) * layout.segments + place.segment] =
            sources.present[i] ? dot : wide_t<T>(0);
      }
    }
  }
}

// sums[r] = sum over s of parts[r, s], in a fixed order. One group of lanes for each r.
template <typename Wide>
__global__ void __launch_bounds__(kThreads) sum_parts_kernel(
    Wide* __restrict__ sums, const Wide* __restrict__ parts, uint32_t num_parts, Layout layout) {
  const Place place = my_place<1>(layout);
  Wide sum = 0;
  if (place.active) {
    for (uint32_t s = place.lane; s < num_parts; s += 1u << layout.lane_bits) {
      sum += parts[place.row * num_parts + s];
    }
  }
  sum = group_sum(sum, layout.lane_bits);
  if (place.active && place.lane == 0) sums[place.row] = sum;
}

Tensor combine(Tensor y, Tensor weights, Tensor inverse) {
  check_combine(y, weights, inverse);
  const int64_t items = inverse.size(0);
  checked_routes(items, inverse.size(1));
  const DeviceGuard guard(y.get_device_index());
  const cudaStream_t stream = current_stream(y);
  y = as_contiguous(y);
  weights = as_contiguous(weights);
  inverse = as_contiguous(inverse);
  Tensor out = new_tensor(y, with_rows(y, items), y.scalar_type());
  if (out.numel() == 0) return out;

  with_type(y, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    gather_sum<T, true>(out, y, weights.const_data_ptr<wide_t<T>>(), inverse, stream);
  });
  return out;
}

std::tuple<Tensor, Tensor> combine_backward(
    Tensor grad, Tensor y, Tensor weights, Tensor inverse) {
  check_combine_backward(grad, y, weights, inverse);
  const int64_t items = inverse.size(0), k = inverse.size(1), values = row_width(y);
  const uint32_t num_routes = checked_routes(items, k);
  const DeviceGuard guard(y.get_device_index());
  const cudaStream_t stream = current_stream(y);
  grad = as_contiguous(grad);
  y = as_contiguous(y);
  weights = as_contiguous(weights);
  inverse = as_contiguous(inverse);
  Tensor grad_y = new_tensor(y, with_rows(y, y.size(0)), y.scalar_type());
  if (num_routes == 0 || values == 0) {  // then grad_y is empty
    return {grad_y, torch::stable::new_zeros(weights, {items, k})};
  }
  Tensor grad_weights = new_tensor(weights, {items, k}, weights.scalar_type());

  with_type(y, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    using Wide = wide_t<T>;
    void* grad_y_out = grad_y.mutable_data_ptr();
    const void* grad_in = grad.const_data_ptr();
    const void* y_in = y.const_data_ptr();
    with_vectors<T>(values, {grad_y_out, grad_in, y_in}, [&](auto* vector) {
      using Vector = std::remove_pointer_t<decltype(vector)>;
      const int64_t width = values * sizeof(T) / sizeof(Vector);
      const Layout layout = lay_out(items, width, kDepth);
      const int64_t segments = layout.segments;
      // Rows of several segments need a second step, which sums the parts.
      Tensor dots = segments == 1
          ? grad_weights
          : new_tensor(weights, {items, k, segments}, weights.scalar_type());
      combine_backward_kernel<T, Vector><<<layout.blocks, kThreads, 0, stream>>>(
          static_cast<Vector*>(grad_y_out), dots.mutable_data_ptr<Wide>(),
          static_cast<const Vector*>(grad_in), static_cast<const Vector*>(y_in),
          weights.const_data_ptr<Wide>(), inverse.const_data_ptr<int64_t>(), y.size(0),
          static_cast<uint32_t>(k), width, layout);
      STD_CUDA_KERNEL_LAUNCH_CHECK();
      if (segments > 1) {
        // As many lanes as there are parts, but at most a warp, and one segment.
        const Layout sums = lay_out(num_routes, std::min<int64_t>(segments, 32), 1);
        sum_parts_kernel<<<sums.blocks, kThreads, 0, stream>>>(
            grad_weights.mutable_data_ptr<Wide>(), dots.const_data_ptr<Wide>(), layout.segments,
            sums);
        STD_CUDA_KERNEL_LAUNCH_CHECK();
      }
    });
  });
  return {grad_y, grad_weights};
}

}  // namespace
}  // namespace mmdet_moe::cuda

STABLE_TORCH_LIBRARY_IMPL(mmdet_moe, CUDA, m) {
  m.impl("combine", TORCH_BOX(&mmdet_moe::cuda::combine));
  m.impl("combine_backward", TORCH_BOX(&mmdet_moe::cuda::combine_backward));
}
