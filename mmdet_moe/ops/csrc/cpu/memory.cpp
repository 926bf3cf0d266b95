// Memory for large results on the CPU.
//
// The GNU C library returns a block above 32 MiB to the system as soon as it is freed. To take a new
// one for the next result, page by page, then costs several times what is done with it, on virtual
// machines above all. Results of 16 MiB and more therefore come from a small store of blocks that
// are kept when their tensor dies.
#include "ops.h"

#include <algorithm>
#include <mutex>

#if defined(__linux__)
#include <dlfcn.h>
#include <sys/mman.h>
#endif

namespace mmdet_moe::cpu {

#if defined(__linux__)
namespace {

constexpr size_t kHugePage = 2 << 20;
constexpr size_t kLarge = 16 << 20;
constexpr size_t kMostIdle = 512 << 20;  // bytes that are kept at most

class Store {
 public:
  // A block of at least `bytes`, a multiple of kHugePage; null if there is no memory.
  void* take(size_t bytes) {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      auto best = idle_.end();
      for (auto block = idle_.begin(); block != idle_.end(); ++block) {
        // A block that is much too large would be missing for what it fits.
        const bool fits = block->bytes >= bytes && block->bytes - bytes <= bytes / 4;
        if (fits && (best == idle_.end() || block->bytes < best->bytes)) best = block;
      }
      if (best != idle_.end()) {
        void* const start = best->start;
        idle_bytes_ -= best->bytes;
        used_.push_back({start, best->bytes});
        idle_.erase(best);
        return start;
      }
    }
    void* const start =
        mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (start == MAP_FAILED) return nullptr;
    madvise(start, bytes, MADV_HUGEPAGE);  // a hint: where huge pages are off, nothing changes
    const std::lock_guard<std::mutex> lock(mutex_);
    used_.push_back({start, bytes});
    return start;
  }

  void give_back(void* start) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto used = std::find_if(
        used_.begin(), used_.end(), [&](const Block& block) { return block.start == start; });
    if (used->bytes > kMostIdle) {  // it would drive out all others, and then itself
      munmap(start, used->bytes);
      used_.erase(used);
      return;
    }
    idle_.push_back(*used);
    idle_bytes_ += used->bytes;
    used_.erase(used);
    while (idle_bytes_ > kMostIdle) {  // the oldest go first
      munmap(idle_.front().start, idle_.front().bytes);
      idle_bytes_ -= idle_.front().bytes;
      idle_.erase(idle_.begin());
    }
  }

 private:
  struct Block {
    void* start;
    size_t bytes;
  };
  std::mutex mutex_;
  std::vector<Block> idle_, used_;
  size_t idle_bytes_ = 0;
};

// Never destroyed: tensors may die after everything else.
Store& store() {
  static Store& instance = *new Store;
  return instance;
}

// Tensors with a deleter exist since PyTorch 2.11; the binary is for 2.10 as well.
using FromBlob = AOTITorchError (*)(
    void*, int64_t, const int64_t*, const int64_t*, int64_t, int32_t, int32_t, int32_t,
    AtenTensorHandle*, int32_t, const uint8_t*, int64_t, void (*)(void*, void*), void*);

// A tensor over a block, which returns to the store with it.
Tensor from_block(void* start, const std::vector<int64_t>& sizes, ScalarType dtype, FromBlob make) {
  std::vector<int64_t> strides(sizes.size());
  int64_t stride = 1;
  for (size_t d = sizes.size(); d-- > 0; stride *= sizes[d]) strides[d] = stride;
  constexpr int32_t kNoIndex = -1;
  AtenTensorHandle tensor;
  STABLE_TORCH_ERROR_CODE_CHECK(make(
      start, static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(), 0,
      torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)),
      aoti_torch_device_type_cpu(), kNoIndex, &tensor, aoti_torch_layout_strided(), nullptr, 0,
      [](void* block, void*) { store().give_back(block); }, nullptr));
  return Tensor(tensor);
}

}  // namespace
#endif

Tensor new_tensor(const Tensor& like, const std::vector<int64_t>& sizes, ScalarType dtype) {
#if defined(__linux__)
  static const auto make = reinterpret_cast<FromBlob>(dlsym(RTLD_DEFAULT, "torch_from_blob"));
  size_t bytes = like.element_size();  // every caller keeps the dtype of large results
  for (const int64_t size : sizes) bytes *= size;
  if (make != nullptr && dtype == like.scalar_type() && bytes >= kLarge) {
    void* const start = store().take((bytes + kHugePage - 1) / kHugePage * kHugePage);
    if (start != nullptr) return from_block(start, sizes, dtype, make);
  }
#endif
  return torch::stable::new_empty(like, sizes, dtype);
}

}  // namespace mmdet_moe::cpu
