// entmax15 on CUDA and its gradient; the algorithm is that of csrc/cpu/entmax.cpp.
//
// A warp takes a row of up to kMostOfWarp values and a block a longer one. Rows are read again for
// each sum: they come from the first-level cache. Nothing depends on how fast threads are: sums
// have a fixed order, and all threads of a row hold the same ones, so they leave loops together.
#include "common.cuh"

#include <cmath>

namespace mmdet_moe::cuda {
namespace {

constexpr int64_t kMostOfWarp = 2048;
constexpr int kMostSteps = 100;  // never reached: a handful are taken

struct Sum {
  template <typename T>
  __device__ T operator()(T a, T b) const { return a + b; }
};
struct Largest {
  template <typename T>
  __device__ T operator()(T a, T b) const { return a > b ? a : b; }
};

// The result over the threads of a row, in all of them; all must call it.
template <uint32_t kPerRow, typename T, typename F>
__device__ T reduce(T value, const F& f) {
  for (uint32_t distance = kWarp / 2; distance > 0; distance /= 2) {
    value = f(value, __shfl_xor_sync(0xffffffffu, value, distance));
  }
  if constexpr (kPerRow > kWarp) {
    __shared__ T parts[kPerRow / kWarp];
    __syncthreads();  // the parts before have been read
    if (threadIdx.x % kWarp == 0) parts[threadIdx.x / kWarp] = value;
    __syncthreads();
    value = parts[0];
    for (uint32_t i = 1; i < kPerRow / kWarp; ++i) value = f(value, parts[i]);
  }
  return value;
}

template <uint32_t kPerRow, typename T>
__global__ void __launch_bounds__(kThreads) entmax15_kernel(
    T* __restrict__ p, const T* __restrict__ x, int64_t rows, int64_t n) {
  constexpr uint32_t kRows = kThreads / kPerRow;
  const int64_t row = int64_t{blockIdx.x} * kRows + threadIdx.x / kPerRow;
  if (row >= rows) return;  // all threads of the row
  const uint32_t first = threadIdx.x % kPerRow;
  x += row * n;
  p += row * n;
  const T infinity = static_cast<T>(INFINITY);
  T largest = -infinity;
  for (int64_t i = first; i < n; i += kPerRow) {
    const T value = __ldg(x + i);
    largest = Largest()(value == value ? value : infinity, largest);  // NaN counts as infinity
  }
  largest = reduce<kPerRow>(largest, Largest());
  if (!(largest > -infinity && largest < infinity)) {  // as softmax does
    for (int64_t i = first; i < n; i += kPerRow) p[i] = static_cast<T>(NAN);
    return;
  }
  const T half = T(0.5) * largest;
  // How far the halves lie above tau; 0 for those below.
  const auto above = [&](int64_t i, T tau) {
    const T distance = T(0.5) * __ldg(x + i) - half - tau;
    return distance > 0 ? distance : T(0);
  };
  T tau = -1;
  for (int step = 1;; ++step) {
    T count = 0, distances = 0, squares = 0;
    for (int64_t i = first; i < n; i += kPerRow) {
      const T distance = above(i, tau);
      count += distance > 0 ? T(1) : T(0);
      distances += distance;
      squares += distance * distance;
    }
    count = reduce<kPerRow>(count, Sum());
    distances = reduce<kPerRow>(distances, Sum());
    squares = reduce<kPerRow>(squares, Sum());
    const T excess = squares - 1;
    const T next = tau + (squares - sqrt(squares)) / distances;
    const bool last = !(next > tau) || step == kMostSteps;
    if (squares < T(1.3) || last) {
      // The smaller root of count·t² - 2·distances·t + excess = 0, without cancellation.
      const T root = distances * distances - count * excess;
      const T rest = excess / (distances + sqrt(Largest()(root, T(0))));
      T left = 0;
      for (int64_t i = first; i < n; i += kPerRow) {
        const T distance = above(i, tau + rest);
        left += distance > 0 ? T(1) : T(0);
        p[i] = distance * distance;
      }
      if (last || reduce<kPerRow>(left, Sum()) == count) return;
    }
    tau = next;
  }
}

// With s = sqrt(p): grad_x = s·(grad - sum(s·grad) / sum(s)).
template <uint32_t kPerRow, typename T>
__global__ void __launch_bounds__(kThreads) entmax15_backward_kernel(
    T* __restrict__ out, const T* __restrict__ grad, const T* __restrict__ p, int64_t rows,
    int64_t n) {
  constexpr uint32_t kRows = kThreads / kPerRow;
  const int64_t row = int64_t{blockIdx.x} * kRows + threadIdx.x / kPerRow;
  if (row >= rows) return;
  const uint32_t first = threadIdx.x % kPerRow;
  out += row * n;
  grad += row * n;
  p += row * n;
  T weighted = 0, sum = 0;
  for (int64_t i = first; i < n; i += kPerRow) {
    const T s = sqrt(__ldg(p + i));
    weighted += s * __ldg(grad + i);
    sum += s;
  }
  const T mean = reduce<kPerRow>(weighted, Sum()) / reduce<kPerRow>(sum, Sum());
  for (int64_t i = first; i < n; i += kPerRow) {
    out[i] = sqrt(__ldg(p + i)) * (__ldg(grad + i) - mean);
  }
}

// Blocks for the rows, `per_row` threads each.
uint32_t blocks_of_rows(int64_t rows, uint32_t per_row) {
  STD_TORCH_CHECK(
      rows <= INT32_MAX, "mmdet_moe: ", rows, " rows are too many for the CUDA kernels, which take at "
      "most ", INT32_MAX);
  const uint32_t per_block = kThreads / per_row;
  return (static_cast<uint32_t>(rows) + per_block - 1) / per_block;
}

// Calls f(null pointer to the type, threads per row as a constant, blocks, rows, values per row).
template <typename F>
void with_rows_of(const Tensor& tensor, const F& f) {
  const int64_t n = tensor.size(tensor.dim() - 1), rows = tensor.numel() / n;
  if (rows == 0) return;
  const auto with_threads = [&](auto* type) {
    if (n <= kMostOfWarp) {
      constexpr std::integral_constant<uint32_t, kWarp> kPerRow;
      f(type, kPerRow, blocks_of_rows(rows, kPerRow), rows, n);
    } else {
      constexpr std::integral_constant<uint32_t, kThreads> kPerRow;
      f(type, kPerRow, blocks_of_rows(rows, kPerRow), rows, n);
    }
  };
  if (tensor.scalar_type() == ScalarType::Double) {
    with_threads(static_cast<double*>(nullptr));
  } else {
    with_threads(static_cast<float*>(nullptr));
  }
}

Tensor new_like(const Tensor& x) {
  return new_tensor(x, {x.sizes().begin(), x.sizes().end()}, x.scalar_type());
}

Tensor entmax15(Tensor x) {
  check_entmax15(x, "x");
  const DeviceGuard guard(x.get_device_index());
  const cudaStream_t stream = current_stream(x);
  x = as_contiguous(x);
  Tensor p = new_like(x);
  with_rows_of(x, [&](auto* type, auto per_row, uint32_t blocks, int64_t rows, int64_t n) {
    using T = std::remove_pointer_t<decltype(type)>;
    constexpr uint32_t kPerRow = decltype(per_row)::value;
    entmax15_kernel<kPerRow, T><<<blocks, kThreads, 0, stream>>>(
        p.mutable_data_ptr<T>(), x.const_data_ptr<T>(), rows, n);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return p;
}

Tensor entmax15_backward(Tensor grad, Tensor p) {
  check_entmax15_backward(grad, p);
  const DeviceGuard guard(p.get_device_index());
  const cudaStream_t stream = current_stream(p);
  grad = as_contiguous(grad);
  p = as_contiguous(p);
  Tensor out = new_like(p);
  with_rows_of(p, [&](auto* type, auto per_row, uint32_t blocks, int64_t rows, int64_t n) {
    using T = std::remove_pointer_t<decltype(type)>;
    constexpr uint32_t kPerRow = decltype(per_row)::value;
    entmax15_backward_kernel<kPerRow, T><<<blocks, kThreads, 0, stream>>>(
        out.mutable_data_ptr<T>(), grad.const_data_ptr<T>(), p.const_data_ptr<T>(), rows, n);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return out;
}

}  // namespace
}  // namespace mmdet_moe::cuda

STABLE_TORCH_LIBRARY_IMPL(mmdet_moe, CUDA, m) {
  m.impl("entmax15", TORCH_BOX(&mmdet_moe::cuda::entmax15));
  m.impl("entmax15_backward", TORCH_BOX(&mmdet_moe::cuda::entmax15_backward));
}
