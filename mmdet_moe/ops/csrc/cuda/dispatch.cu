// dispatch on CUDA, which gathers rows, and its gradient, which sums them.
#include "routes.cuh"

namespace mmdet_moe::cuda {
namespace {

constexpr int kCopyDepth = 4;  // vectors per lane

// The compiler takes it that an assertion may return; nothing may be touched even then.
__device__ bool check_route(int64_t route, uint32_t num_routes) {
  const bool valid = route >= 0 && route < num_routes;
  CUDA_KERNEL_ASSERT_MSG(valid, "mmdet_moe: order must hold route numbers in [0, items * k)");
  return valid;
}

template <typename Vector>
__global__ void __launch_bounds__(kThreads) dispatch_kernel(
    Vector* __restrict__ out, const Vector* __restrict__ x, const int64_t* __restrict__ order,
    uint32_t k, uint32_t num_routes, int64_t width, Layout layout) {
  const Place place = my_place<kCopyDepth>(layout);
  if (!place.active) return;
  const int64_t route = order[place.row];
  if (!check_route(route, num_routes)) return;
  const Vector* from = x + int64_t{static_cast<uint32_t>(route) / k} * width;
  Vector* to = out + place.row * width;
  Vector vectors[kCopyDepth];
#pragma unroll
  for (int d = 0; d < kCopyDepth; ++d) {
    const int64_t c = place.column + (d << layout.lane_bits);
    if (c < width) vectors[d] = __ldg(from + c);
  }
#pragma unroll
  for (int d = 0; d < kCopyDepth; ++d) {
    const int64_t c = place.column + (d << layout.lane_bits);
    // With a hint not to cache it for long: the other rows of an item want to find it in the cache.
    if (c < width) __stcs(to + c, vectors[d]);
  }
}

// inverse[order[r]] = r
__global__ void __launch_bounds__(kThreads) invert_kernel(
    int32_t* inverse, const int64_t* order, uint32_t num_rows, uint32_t num_routes) {
  const uint32_t r = blockIdx.x * kThreads + threadIdx.x;
  if (r >= num_rows) return;
  const int64_t route = order[r];
  if (!check_route(route, num_routes)) return;
  inverse[route] = static_cast<int32_t>(r);
}

template <int kBytes>
void copy_rows(
    void* out, const void* x, const Tensor& order, int64_t k, uint32_t num_routes,
    int64_t row_bytes, cudaStream_t stream) {
  using Vector = vector_t<kBytes>;
  const int64_t width = row_bytes / kBytes;
  const Layout layout = lay_out(order.size(0), width, kCopyDepth);
  dispatch_kernel<Vector><<<layout.blocks, kThreads, 0, stream>>>(
      static_cast<Vector*>(out), static_cast<const Vector*>(x), order.const_data_ptr<int64_t>(),
      static_cast<uint32_t>(k), num_routes, width, layout);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

Tensor dispatch(Tensor x, Tensor order, int64_t k) {
  check_dispatch(x, order, k);
  const uint32_t num_routes = checked_routes(x.size(0), k);
  const DeviceGuard guard(x.get_device_index());
  const cudaStream_t stream = current_stream(x);
  x = torch::stable::contiguous(x);
  order = torch::stable::contiguous(order);
  Tensor out = new_tensor(x, with_rows(x, order.size(0)), x.scalar_type());
  if (out.numel() == 0) return out;

  const int64_t row_bytes = row_width(x) * x.element_size();
  void* to = out.mutable_data_ptr();
  const void* from = x.const_data_ptr();
  switch (access_bytes(row_bytes, {to, from})) {
    case 16: copy_rows<16>(to, from, order, k, num_routes, row_bytes, stream); break;
    case 8: copy_rows<8>(to, from, order, k, num_routes, row_bytes, stream); break;
    case 4: copy_rows<4>(to, from, order, k, num_routes, row_bytes, stream); break;
    case 2: copy_rows<2>(to, from, order, k, num_routes, row_bytes, stream); break;
    default: copy_rows<1>(to, from, order, k, num_routes, row_bytes, stream);
  }
  return out;
}

Tensor dispatch_backward(Tensor grad, Tensor order, int64_t k, int64_t num_items) {
  check_dispatch_backward(grad, order, k, num_items);
  const uint32_t num_routes = checked_routes(num_items, k);
  const DeviceGuard guard(grad.get_device_index());
  const cudaStream_t stream = current_stream(grad);
  grad = torch::stable::contiguous(grad);
  order = torch::stable::contiguous(order);
  Tensor out = new_tensor(grad, with_rows(grad, num_items), grad.scalar_type());
  if (out.numel() == 0) return out;

  const uint32_t num_rows = static_cast<uint32_t>(order.size(0));  // at most num_routes
  Tensor inverse = new_tensor(grad, {int64_t{num_routes}}, ScalarType::Int);
  int32_t* positions = inverse.mutable_data_ptr<int32_t>();
  // All bits set is -1: until a row says otherwise, the route has none.
  STD_CUDA_CHECK(cudaMemsetAsync(positions, 0xff, num_routes * sizeof(int32_t), stream));
  if (num_rows > 0) {
    invert_kernel<<<blocks_for(num_rows), kThreads, 0, stream>>>(
        positions, order.const_data_ptr<int64_t>(), num_rows, num_routes);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }
  with_type(grad, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    gather_sum<T, false>(out, grad, nullptr, positions, k, stream);
  });
  return out;
}

}  // namespace
}  // namespace mmdet_moe::cuda

STABLE_TORCH_LIBRARY_IMPL(mmdet_moe, CUDA, m) {
  m.impl("dispatch", TORCH_BOX(&mmdet_moe::cuda::dispatch));
  m.impl("dispatch_backward", TORCH_BOX(&mmdet_moe::cuda::dispatch_backward));
}
