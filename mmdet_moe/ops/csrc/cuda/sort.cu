// sort_routes on CUDA: a stable sort of the routes by expert. One block counts a few routes in one
// launch; CUB's radix sort takes more.

// CUB in a namespace of its own: PyTorch brings another version of it into the same process.
#define CUB_WRAPPED_NAMESPACE mmdet_moe_cub

#include "common.cuh"

#include <cub/device/device_radix_sort.cuh>

#include <bit>

namespace mmdet_moe::cuda {
namespace {

constexpr uint32_t kBlock = 1024, kWarps = kBlock / kWarp;  // the one block
constexpr uint32_t kSteps = 4, kMostRoutes = kSteps * kBlock;
constexpr uint32_t kMostExperts = 512;  // 34 KiB of the 48 that a block may have

// The expert of a route; "no choice" is the expert behind the last.
__device__ uint32_t key_of(int64_t id, int64_t num_experts) {
  const bool chosen = id >= 0 && id < num_experts;
  CUDA_KERNEL_ASSERT_MSG(
      chosen || id == -1,
      "mmdet_moe: expert_ids must lie in [0, num_experts), or be -1 for no choice");
  return static_cast<uint32_t>(chosen ? id : num_experts);
}

// All of sort_routes, by counting. Each warp has a stretch of the routes, which it takes a warp's
// width at a time: lanes with the same key find each other by the votes on each of its bits. So a
// route learns how many of its key come before it in the stretch; then the stretches are counted.
__global__ void __launch_bounds__(kBlock) sort_kernel(
    int64_t* offsets, int64_t* inverse, const int64_t* expert_ids, uint32_t num_experts,
    int key_bits, uint32_t count) {
  __shared__ uint16_t before[kWarps][kMostExperts + 1];  // of a key; at first in the stretch so far
  __shared__ uint16_t starts[kMostExperts + 1];          // of each key
  const uint32_t t = threadIdx.x, warp = t / kWarp, lane = t % kWarp;
  const uint32_t steps = (count + kBlock - 1) / kBlock;
  const uint32_t first = warp * steps * kWarp + lane;
  for (uint32_t key = lane; key <= num_experts; key += kWarp) before[warp][key] = 0;
  __syncwarp();

  uint32_t keys[kSteps], ranks[kSteps];
#pragma unroll
  for (uint32_t s = 0; s < kSteps; ++s) {
    if (s == steps) break;  // all threads
    const uint32_t r = first + s * kWarp;
    const uint32_t key = r < count ? key_of(expert_ids[r], num_experts) : 0;
    uint32_t peers = __ballot_sync(0xffffffffu, r < count);  // the lanes with this key
    for (int bit = 0; bit < key_bits; ++bit) {
      const bool one = key >> bit & 1;
      const uint32_t ones = __ballot_sync(0xffffffffu, one);
      peers &= one ? ones : ~ones;
    }
    keys[s] = key;
    ranks[s] = before[warp][key] + __popc(peers & ((1u << lane) - 1));
    __syncwarp();  // all have read
    const bool last = peers >> lane == 1;  // of its peers
    if (last) before[warp][key] = ranks[s] + 1;
    __syncwarp();
  }
  __syncthreads();  // all stretches have been counted

  // The thread of a key: how many of it there are before each stretch, and in all.
  if (t <= num_experts) {
    uint32_t total = 0;
    for (uint32_t w = 0; w < kWarps; ++w) {
      const uint32_t here = before[w][t];
      before[w][t] = total;
      total += here;
    }
    if (t < num_experts) starts[t + 1] = total;
    if (t == 0) starts[0] = 0;
  }
  __syncthreads();
  // Sums of up to 2^i keys before become sums of up to 2^(i + 1).
  for (uint32_t distance = 1; distance <= num_experts; distance *= 2) {
    const bool more = t >= distance && t <= num_experts;
    const uint32_t left = more ? starts[t - distance] : 0;
    __syncthreads();  // all have read
    if (more) starts[t] += left;
    __syncthreads();
  }
  if (t <= num_experts) offsets[t] = starts[t];
#pragma unroll
  for (uint32_t s = 0; s < kSteps; ++s) {
    const uint32_t r = first + s * kWarp;
    if (s < steps && r < count) inverse[r] = starts[keys[s]] + before[warp][keys[s]] + ranks[s];
  }
}

// Numbers the routes and takes their experts as keys.
__global__ void __launch_bounds__(kThreads) prepare_kernel(
    uint32_t* keys, int32_t* routes, const int64_t* expert_ids, int64_t num_experts,
    uint32_t count) {
  const uint32_t r = blockIdx.x * kThreads + threadIdx.x;
  if (r >= count) return;
  keys[r] = key_of(expert_ids[r], num_experts);
  routes[r] = static_cast<int32_t>(r);
}

// offsets[e] is the number of keys below e: thread m writes it for all e above the key before its
// own and up to its own, and the last thread also for those above its own.
__global__ void __launch_bounds__(kThreads) finish_kernel(
    int64_t* offsets, int64_t* inverse, const uint32_t* keys, const int32_t* routes,
    int64_t num_experts, uint32_t count) {
  const uint32_t m = blockIdx.x * kThreads + threadIdx.x;
  if (m >= count) return;
  inverse[routes[m]] = m;
  const int64_t key = keys[m];
  const int64_t previous = m == 0 ? -1 : int64_t{keys[m - 1]};
  for (int64_t e = previous + 1; e <= key; ++e) offsets[e] = m;
  if (m == count - 1) {
    for (int64_t e = key + 1; e <= num_experts; ++e) offsets[e] = count;
  }
}

std::tuple<Tensor, Tensor> sort_routes(Tensor expert_ids, int64_t num_experts) {
  check_ids(expert_ids, "expert_ids", 2);
  STD_TORCH_CHECK(
      num_experts >= 1 && num_experts < INT32_MAX,
      "mmdet_moe: num_experts must be at least 1 and below ", INT32_MAX, ", got ", num_experts);
  const DeviceGuard guard(expert_ids.get_device_index());
  const cudaStream_t stream = current_stream(expert_ids);
  const Tensor ids = as_contiguous(expert_ids);
  const int64_t items = ids.size(0), k = ids.size(1);
  const uint32_t count = checked_routes(items, k);
  Tensor offsets = new_tensor(ids, {num_experts + 1}, ScalarType::Long);
  Tensor inverse = new_tensor(ids, {items, k}, ScalarType::Long);
  int64_t* offsets_out = offsets.mutable_data_ptr<int64_t>();
  if (count == 0) {
    STD_CUDA_CHECK(cudaMemsetAsync(offsets_out, 0, (num_experts + 1) * sizeof(int64_t), stream));
    return {offsets, inverse};
  }
  const int key_bits = std::bit_width(static_cast<uint32_t>(num_experts));  // the largest key
  if (count <= kMostRoutes && num_experts <= kMostExperts) {
    sort_kernel<<<1, kBlock, 0, stream>>>(
        offsets_out, inverse.mutable_data_ptr<int64_t>(), ids.const_data_ptr<int64_t>(),
        static_cast<uint32_t>(num_experts), key_bits, count);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
    return {offsets, inverse};
  }

  using Keys = mmdet_moe_cub::cub::DoubleBuffer<uint32_t>;
  using Routes = mmdet_moe_cub::cub::DoubleBuffer<int32_t>;
  const auto sort = [&](void* scratch, size_t& scratch_bytes, Keys& keys, Routes& routes) {
    STD_CUDA_CHECK(mmdet_moe_cub::cub::DeviceRadixSort::SortPairs(
        scratch, scratch_bytes, keys, routes, static_cast<int>(count), 0, key_bits, stream));
  };
  Keys keys;
  Routes routes;
  size_t scratch_bytes = 0;
  sort(nullptr, scratch_bytes, keys, routes);  // only asks for the size

  // One piece of memory for both buffers of keys, both of routes, and CUB's own needs.
  const int64_t buffer_bytes = (int64_t{count} * 4 + 255) / 256 * 256;
  const Tensor memory = new_tensor(
      ids, {4 * buffer_bytes + static_cast<int64_t>(scratch_bytes)}, ScalarType::Byte);
  char* base = static_cast<char*>(memory.mutable_data_ptr());
  const auto buffer = [&](int i) { return static_cast<void*>(base + i * buffer_bytes); };
  keys = Keys(static_cast<uint32_t*>(buffer(0)), static_cast<uint32_t*>(buffer(1)));
  routes = Routes(static_cast<int32_t*>(buffer(2)), static_cast<int32_t*>(buffer(3)));

  prepare_kernel<<<blocks_for(count), kThreads, 0, stream>>>(
      keys.Current(), routes.Current(), ids.const_data_ptr<int64_t>(), num_experts, count);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  sort(buffer(4), scratch_bytes, keys, routes);
  finish_kernel<<<blocks_for(count), kThreads, 0, stream>>>(
      offsets_out, inverse.mutable_data_ptr<int64_t>(), keys.Current(), routes.Current(),
      num_experts, count);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return {offsets, inverse};
}

}  // namespace
}  // namespace mmdet_moe::cuda

STABLE_TORCH_LIBRARY_IMPL(mmdet_moe, CUDA, m) {
  m.impl("sort_routes", TORCH_BOX(&mmdet_moe::cuda::sort_routes));
}
