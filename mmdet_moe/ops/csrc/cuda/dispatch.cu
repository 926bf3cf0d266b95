// dispatch on CUDA, which copies rows, and its gradient, which sums them.
#include "routes.cuh"

namespace mmdet_moe::cuda {
namespace {

constexpr int kCopyDepth = 4;  // vectors per lane

// out[inverse[t, j]] = x[t] for positions below `num_rows`: each item is read once and written k
// times.
template <typename Vector>
__global__ void __launch_bounds__(kThreads) dispatch_kernel(
    Vector* __restrict__ out, const Vector* __restrict__ x, const int64_t* __restrict__ inverse,
    int64_t num_rows, uint32_t k, int64_t width, Layout layout) {
  const Place place = my_place<kCopyDepth>(layout);
  if (!place.active) return;
  const int64_t first = place.row * k;
  Vector vectors[kCopyDepth];
  load_once(vectors, x + place.row * width, true, place.column, width, layout.lane_bits);
  for (uint32_t j = 0; j < k; j += kTogether) {
    // All loads before the first use of one: the assertion is a barrier to the compiler.
    int64_t rows[kTogether];
#pragma unroll
    for (uint32_t i = 0; i < kTogether; ++i) {
      rows[i] = j + i < k ? inverse[first + j + i] : num_rows;
    }
    bool valid = true;
#pragma unroll
    for (uint32_t i = 0; i < kTogether; ++i) valid = valid && rows[i] >= 0;
    CUDA_KERNEL_ASSERT_MSG(valid, "mmdet_moe: inverse must not hold negative positions");
#pragma unroll
    for (uint32_t i = 0; i < kTogether; ++i) {
      // The compiler takes it that an assertion may return; nothing may be touched even then.
      if (rows[i] < 0 || rows[i] >= num_rows) continue;
      Vector* to = out + rows[i] * width;
#pragma unroll
      for (int d = 0; d < kCopyDepth; ++d) {
        const int64_t c = place.column + (d << layout.lane_bits);
        if (c < width) to[c] = vectors[d];
      }
    }
  }
}

template <int kBytes>
void copy_rows(
    void* out, const void* x, const Tensor& inverse, int64_t num_rows, int64_t row_bytes,
    cudaStream_t stream) {
  using Vector = vector_t<kBytes>;
  const int64_t width = row_bytes / kBytes;
  const Layout layout = lay_out(inverse.size(0), width, kCopyDepth);
  dispatch_kernel<Vector><<<layout.blocks, kThreads, 0, stream>>>(
      static_cast<Vector*>(out), static_cast<const Vector*>(x), inverse.const_data_ptr<int64_t>(),
      num_rows, static_cast<uint32_t>(inverse.size(1)), width, layout);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

Tensor dispatch(Tensor x, Tensor inverse, int64_t num_rows) {
  check_dispatch(x, inverse, num_rows);
  checked_routes(inverse.size(0), inverse.size(1));
  const DeviceGuard guard(x.get_device_index());
  const cudaStream_t stream = current_stream(x);
  x = as_contiguous(x);
  inverse = as_contiguous(inverse);
  Tensor out = new_tensor(x, with_rows(x, num_rows), x.scalar_type());
  if (out.numel() == 0) return out;

  const int64_t row_bytes = row_width(x) * x.element_size();
  void* to = out.mutable_data_ptr();
  const void* from = x.const_data_ptr();
  switch (access_bytes(row_bytes, {to, from})) {
    case 16: copy_rows<16>(to, from, inverse, num_rows, row_bytes, stream); break;
    case 8: copy_rows<8>(to, from, inverse, num_rows, row_bytes, stream); break;
    case 4: copy_rows<4>(to, from, inverse, num_rows, row_bytes, stream); break;
    case 2: copy_rows<2>(to, from, inverse, num_rows, row_bytes, stream); break;
    default: copy_rows<1>(to, from, inverse, num_rows, row_bytes, stream);
  }
  return out;
}

Tensor dispatch_backward(Tensor grad, Tensor inverse) {
  check_dispatch_backward(grad, inverse);
  checked_routes(inverse.size(0), inverse.size(1));
  const DeviceGuard guard(grad.get_device_index());
  const cudaStream_t stream = current_stream(grad);
  grad = as_contiguous(grad);
  inverse = as_contiguous(inverse);
  Tensor out = new_tensor(grad, with_rows(grad, inverse.size(0)), grad.scalar_type());
  if (out.numel() == 0) return out;

  with_type(grad, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    gather_sum<T, false>(out, grad, nullptr, inverse, stream);
  });
  return out;
}

}  // namespace
}  // namespace mmdet_moe::cuda

STABLE_TORCH_LIBRARY_IMPL(mmdet_moe, CUDA, m) {
  m.impl("dispatch", TORCH_BOX(&mmdet_moe::cuda::dispatch));
  m.impl("dispatch_backward", TORCH_BOX(&mmdet_moe::cuda::dispatch_backward));
}
