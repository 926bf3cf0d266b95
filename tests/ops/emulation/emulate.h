// CUDA on the CPU, for tests/ops/test_emulation.py: included before everything else in each source.
//
// Threads of a block are fibers of one thread of the CPU; blocks run one after the other. A thread
// runs until it waits for others, in a shuffle or a vote or at a barrier. The order is random within
// those limits, and warps run as far ahead of each other as they may.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>
#include <torch/headeronly/macros/Macros.h>

#include <ucontext.h>

#include <algorithm>
#include <bit>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <numeric>
#include <random>
#include <stdexcept>
#include <utility>
#include <vector>

namespace emulation {

constexpr uint32_t kWarp = 32;
constexpr size_t kStackBytes = 64 << 10;

struct Fiber {
  ucontext_t context;
  std::vector<char> stack = std::vector<char>(kStackBytes);
};

struct Thread {
  enum State { kReady, kShuffles, kVotes, kAtWarpBarrier, kAtBarrier, kDone };
  State state = kReady;
  Fiber* fiber = nullptr;  // once it runs
  uint64_t value = 0;      // to be shuffled or the vote, then what came
  int distance = 0;
};

inline std::mt19937 random_order;
inline const char* failed_assertion = nullptr;

// ---- The block that runs ----

inline uint32_t block_index, thread_index;
inline const std::function<void()>* body;
inline std::vector<Thread> threads;
inline std::vector<uint32_t> ready;  // the last one runs next
inline std::deque<Fiber> fibers;
inline std::vector<Fiber*> idle;
inline ucontext_t scheduler;

[[noreturn]] inline void give_up(const char* why) {
  std::fprintf(stderr, "emulation: %s\n", why);
  std::abort();
}

// 0 to count - 1 in random order.
inline std::vector<uint32_t> shuffled(uint32_t count) {
  std::vector<uint32_t> numbers(count);
  std::iota(numbers.begin(), numbers.end(), 0u);
  std::shuffle(numbers.begin(), numbers.end(), random_order);
  return numbers;
}

// Threads first to last - 1: whole warps in random order, and the threads of each.
inline void make_ready(uint32_t first, uint32_t last) {
  for (const uint32_t warp : shuffled((last - first) / kWarp)) {
    for (const uint32_t lane : shuffled(kWarp)) {
      const uint32_t i = first + warp * kWarp + lane;
      threads[i].state = Thread::kReady;
      ready.push_back(i);
    }
  }
}

// A fiber's life. A thread that did not wait leaves it to the next one, which saves the switch.
inline void live(Fiber* self) {
  for (;;) {
    while (!ready.empty() && !threads[ready.back()].fiber) {
      const uint32_t mine = thread_index = ready.back();
      ready.pop_back();
      threads[mine].fiber = self;
      (*body)();
      threads[mine].state = Thread::kDone;
    }
    idle.push_back(self);
    swapcontext(&self->context, &scheduler);
  }
}

inline Fiber* idle_fiber() {
  if (idle.empty()) {
    static Fiber* fresh;  // makecontext passes integers only
    fresh = &fibers.emplace_back();
    ucontext_t& context = fresh->context;
    getcontext(&context);
    context.uc_stack.ss_sp = fresh->stack.data();
    context.uc_stack.ss_size = kStackBytes;
    makecontext(&context, +[] { live(fresh); }, 0);
    context.uc_stack.ss_size = 0;  // else ASan forgets at each switch what lies on the stack
    return fresh;
  }
  Fiber* fiber = idle.back();
  idle.pop_back();
  return fiber;
}

// Waits until all of the threads first to last - 1 do so. The last one calls `arrived`.
template <typename F>
void wait(Thread::State what, uint32_t first, uint32_t last, const F& arrived) {
  Thread& me = threads[thread_index];
  me.state = what;
  const auto waits = [&](const Thread& other) { return other.state == what; };
  if (std::all_of(threads.begin() + first, threads.begin() + last, waits)) {
    arrived();
    make_ready(first, last);
  }
  swapcontext(&me.fiber->context, &scheduler);
}

inline void barrier() { wait(Thread::kAtBarrier, 0, threads.size(), [] {}); }

inline void warp_barrier() {
  const uint32_t first = thread_index / kWarp * kWarp;
  wait(Thread::kAtWarpBarrier, first, first + kWarp, [] {});
}

inline uint32_t ballot(uint32_t mask, bool vote) {
  if (mask != 0xffffffffu) give_up("a vote of a part of the warp");
  const uint32_t mine = thread_index, first = mine / kWarp * kWarp;
  threads[mine].value = vote;
  wait(Thread::kVotes, first, first + kWarp, [&] {
    uint32_t votes = 0;
    for (uint32_t i = 0; i < kWarp; ++i) votes |= uint32_t(threads[first + i].value) << i;
    for (uint32_t i = 0; i < kWarp; ++i) threads[first + i].value = votes;
  });
  return threads[mine].value;
}

template <typename T>
T shuffle_xor(uint32_t mask, T value, int distance) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  if (mask != 0xffffffffu) give_up("a shuffle of a part of the warp");
  const uint32_t mine = thread_index, first = mine / kWarp * kWarp;
  std::memcpy(&threads[mine].value, &value, sizeof(T));
  threads[mine].distance = distance;
  wait(Thread::kShuffles, first, first + kWarp, [&] {
    uint64_t values[kWarp];
    for (uint32_t i = 0; i < kWarp; ++i) {
      if (threads[first + i].distance != distance) give_up("a shuffle with several distances");
      values[i] = threads[first + (i ^ distance) % kWarp].value;
    }
    for (uint32_t i = 0; i < kWarp; ++i) threads[first + i].value = values[i];
  });
  std::memcpy(&value, &threads[mine].value, sizeof(T));
  return value;
}

// ---- What kernel<<<blocks, threads, 0, stream>>>(arguments...) becomes ----

template <typename Kernel, typename... Arguments>
void launch(uint32_t blocks, uint32_t count, Kernel kernel, Arguments... arguments) {
  if (blocks == 0 || blocks > INT32_MAX || count == 0 || count > 1024 || count % kWarp) {
    throw std::runtime_error("emulation: an invalid launch");
  }
  const std::function<void()> call = [&] { kernel(arguments...); };
  body = &call;
  for (const uint32_t block : shuffled(blocks)) {
    block_index = block;
    threads.assign(count, {});
    make_ready(0, count);
    while (!ready.empty()) {
      Fiber* fiber = threads[ready.back()].fiber;
      if (fiber) {
        thread_index = ready.back();
        ready.pop_back();
      } else {
        fiber = idle_fiber();
      }
      swapcontext(&scheduler, &fiber->context);
    }
    for (const Thread& thread : threads) {
      if (thread.state != Thread::kDone) give_up("threads wait for others, which have left");
    }
  }
}

inline void check_launch() {
  if (const char* message = std::exchange(failed_assertion, nullptr)) {
    throw std::runtime_error(message);
  }
}

}  // namespace emulation

namespace torch::stable::accelerator {
struct NoGuard {
  explicit NoGuard(int32_t) {}
};
}  // namespace torch::stable::accelerator
#define DeviceGuard NoGuard

inline int aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  *stream = nullptr;
  return 0;
}
inline void set_bytes(void* to, int value, size_t bytes) { std::memset(to, value, bytes); }
#define cudaMemsetAsync(to, value, bytes, stream) (set_bytes(to, value, bytes), cudaSuccess)

#define threadIdx (uint3{::emulation::thread_index, 0, 0})
#define blockIdx (uint3{::emulation::block_index, 0, 0})
#undef __launch_bounds__
#define __launch_bounds__(...)
#undef __shared__
#define __shared__ static  // as one block runs at a time
#define __syncthreads ::emulation::barrier
#define __syncwarp ::emulation::warp_barrier
#define __ballot_sync ::emulation::ballot
#define __popc std::popcount
#define __shfl_xor_sync ::emulation::shuffle_xor

template <typename T>
T __ldcs(const T* from) { return *from; }
template <typename T>
T __ldg(const T* from) { return *from; }

// An assertion may return, and nothing may be touched even then.
#undef CUDA_KERNEL_ASSERT_MSG
#define CUDA_KERNEL_ASSERT_MSG(condition, message) \
  (void)((condition) || (::emulation::failed_assertion = (message)))
#undef STD_CUDA_CHECK
#define STD_CUDA_CHECK(call) (void)((call) == cudaSuccess || (::emulation::give_up(#call), true))
#undef STD_CUDA_KERNEL_LAUNCH_CHECK
#define STD_CUDA_KERNEL_LAUNCH_CHECK ::emulation::check_launch
