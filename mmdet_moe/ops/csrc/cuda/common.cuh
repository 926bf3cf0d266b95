// What the CUDA kernels share: how threads are laid over rows, and how rows are read and written.
#pragma once

#include "../arguments.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/headeronly/macros/Macros.h>
#include <torch/headeronly/util/shim_utils.h>

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstring>
#include <initializer_list>
#include <tuple>
#include <type_traits>
#include <vector>

namespace mmdet_moe::cuda {

using torch::stable::accelerator::DeviceGuard;

constexpr uint32_t kThreads = 256;  // per block, in every kernel but that which has one block
constexpr uint32_t kWarpBits = 5;
constexpr uint32_t kWarp = 1u << kWarpBits;

inline cudaStream_t current_stream(const Tensor& tensor) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

inline Tensor new_tensor(const Tensor& like, const std::vector<int64_t>& sizes, ScalarType dtype) {
  return torch::stable::new_empty(like, sizes, dtype);
}

// Blocks with one thread for each of `count` things; `count` is below 2^31, so the grid is legal.
inline uint32_t blocks_for(uint32_t count) { return (count + kThreads - 1) / kThreads; }

// T * K. Kernels number routes with 32 bits, since divisions of 64 bits are slow.
inline uint32_t checked_routes(int64_t items, int64_t k) {
  constexpr int64_t kMost = INT32_MAX;
  STD_TORCH_CHECK(
      items <= kMost && k <= kMost && items * k <= kMost, "mmdet_moe: ", items, " items times k=",
      k, " are too many routes for the CUDA kernels, which take at most ", kMost);
  return static_cast<uint32_t>(items * k);
}

// ---- How threads are laid over rows ----
//
// A row is cut into segments, and a group of `lanes` threads, at most a warp, takes one segment of
// one row. Each lane takes `depth` vectors that lie `lanes` apart: its loads do not depend on each
// other, and each of them reads contiguous memory together with those of its neighbours. Narrow
// rows have one segment and share warps; an image has hundreds of segments, which fill the GPU.
// All of it follows from shapes and alignment alone.
struct Layout {
  uint32_t groups;     // rows * segments
  uint32_t segments;   // per row
  uint32_t lane_bits;  // lanes = 2^lane_bits
  uint32_t blocks;
};

// For rows > 0 and width > 0; `width` is in vectors.
inline Layout lay_out(int64_t rows, int64_t width, int64_t depth) {
  uint32_t bits = 0;
  while (bits < kWarpBits && (depth << bits) < width) ++bits;
  // Of 16-byte vectors, 8 lanes read a whole cache line at once: prefer that to depth.
  while (bits < 3 && (int64_t{1} << bits) < width) ++bits;
  const int64_t per_segment = depth << bits;
  const int64_t segments = (width + per_segment - 1) / per_segment;
  STD_TORCH_CHECK(
      rows <= INT32_MAX && segments <= INT32_MAX && rows * segments <= INT32_MAX,
      "mmdet_moe: ", rows, " rows are too large for the CUDA kernels");
  const uint32_t groups = static_cast<uint32_t>(rows * segments);
  const uint32_t groups_per_block = kThreads >> bits;
  const uint32_t blocks = (groups + groups_per_block - 1) / groups_per_block;
  return {groups, static_cast<uint32_t>(segments), bits, blocks};
}

// The part of a thread. Threads behind the last group have `active` false and must touch nothing.
struct Place {
  bool active;
  uint32_t lane;
  uint32_t segment;
  int64_t row;
  int64_t column;  // of the first vector; the others follow at distances of `lanes`
};

template <int kDepth>
__device__ Place my_place(const Layout& layout) {
  const uint32_t bits = layout.lane_bits;
  const uint32_t lane = threadIdx.x & ((1u << bits) - 1);
  const uint32_t group = blockIdx.x * (kThreads >> bits) + (threadIdx.x >> bits);
  const uint32_t row = group / layout.segments;
  const uint32_t segment = group - row * layout.segments;
  const int64_t column = (int64_t{segment} * kDepth << bits) + lane;
  return {group < layout.groups, lane, segment, row, column};
}

// ---- How rows are read and written ----

// What one instruction moves: 16 bytes wherever row sizes and addresses allow it.
template <int kBytes>
struct VectorOf;
template <>
struct VectorOf<16> { using type = uint4; };
template <>
struct VectorOf<8> { using type = uint2; };
template <>
struct VectorOf<4> { using type = unsigned int; };
template <>
struct VectorOf<2> { using type = unsigned short; };
template <>
struct VectorOf<1> { using type = unsigned char; };
template <int kBytes>
using vector_t = typename VectorOf<kBytes>::type;

// The most bytes, up to 16, that divide the size of a row and the addresses of all first rows.
inline int access_bytes(int64_t row_bytes, std::initializer_list<const void*> addresses) {
  uint64_t bits = static_cast<uint64_t>(row_bytes) | 16;
  for (const void* address : addresses) bits |= reinterpret_cast<uintptr_t>(address);
  return static_cast<int>(bits & (~bits + 1));
}

inline __device__ double widen(double value) { return value; }
inline __device__ float widen(float value) { return value; }
inline __device__ float widen(__half value) { return __half2float(value); }
inline __device__ float widen(__nv_bfloat16 value) { return __bfloat162float(value); }

// The type that values of type T are weighted and summed in: see accumulation_type.
template <typename T>
using wide_t = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <typename T>
__device__ T narrow(wide_t<T> value) {
  if constexpr (std::is_same_v<T, __half>) {
    return __float2half_rn(value);
  } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return __float2bfloat16_rn(value);
  } else {
    return value;
  }
}

template <typename T, typename Vector, int kCount>
__device__ void unpack(const Vector& vector, wide_t<T> (&values)[kCount]) {
  static_assert(sizeof(Vector) == sizeof(T) * kCount);
  T packed[kCount];
  memcpy(packed, &vector, sizeof(Vector));
#pragma unroll
  for (int i = 0; i < kCount; ++i) values[i] = widen(packed[i]);
}

template <typename T, typename Vector, int kCount>
__device__ Vector pack(const wide_t<T> (&values)[kCount]) {
  static_assert(sizeof(Vector) == sizeof(T) * kCount);
  T packed[kCount];
#pragma unroll
  for (int i = 0; i < kCount; ++i) packed[i] = narrow<T>(values[i]);
  Vector vector;
  memcpy(&vector, packed, sizeof(Vector));
  return vector;
}

// Reads a lane's vectors of a row that is needed just once, hence with a hint not to cache it for
// long. What lies beyond the row is zero and not read, and so is a row that is not `present`.
template <typename Vector, int kDepth>
__device__ void load_once(
    Vector (&vectors)[kDepth], const Vector* row, bool present, int64_t column, int64_t width,
    uint32_t lane_bits) {
#pragma unroll
  for (int d = 0; d < kDepth; ++d) {
    const int64_t c = column + (d << lane_bits);
    vectors[d] = present && c < width ? __ldcs(row + c) : Vector{};
  }
}

// ---- From run-time to compile-time ----

// Calls f with a null pointer to the type of the rows.
template <typename F>
void with_type(const Tensor& rows, F&& f) {
  switch (rows.scalar_type()) {
    case ScalarType::Double: return f(static_cast<double*>(nullptr));
    case ScalarType::Float: return f(static_cast<float*>(nullptr));
    case ScalarType::BFloat16: return f(static_cast<__nv_bfloat16*>(nullptr));
    case ScalarType::Half: return f(static_cast<__half*>(nullptr));
    default:
      STD_TORCH_CHECK(false, "mmdet_moe: rows must be float64, float32, bfloat16 or float16");
  }
}

// Calls f with a null pointer to the type of vectors to use for rows of T: 16 bytes or one value.
template <typename T, typename F>
void with_vectors(int64_t width, std::initializer_list<const void*> addresses, F&& f) {
  if (access_bytes(width * sizeof(T), addresses) == 16) {
    f(static_cast<vector_t<16>*>(nullptr));
  } else {
    f(static_cast<vector_t<sizeof(T)>*>(nullptr));
  }
}

}  // namespace mmdet_moe::cuda
