// CUB's stable sort of pairs, as far as csrc/cuda/sort.cu uses it.
#pragma once

#include <algorithm>
#include <cstddef>
#include <utility>

namespace CUB_WRAPPED_NAMESPACE::cub {

template <typename T>
class DoubleBuffer {
 public:
  DoubleBuffer() = default;
  DoubleBuffer(T* current, T* alternate) : current_(current), alternate_(alternate) {}
  T* Current() const { return current_; }
  T* Alternate() const { return alternate_; }
  void swap() { std::swap(current_, alternate_); }

 private:
  T *current_ = nullptr, *alternate_ = nullptr;
};

struct DeviceRadixSort {
  // A digit after the other, which takes the pairs from one buffer to the other: as with CUB, how
  // often depends on the number of bits, and what remains in the other one is of no use.
  template <typename Key, typename Value>
  static cudaError_t SortPairs(
      void* scratch, size_t& scratch_bytes, DoubleBuffer<Key>& keys, DoubleBuffer<Value>& values,
      int count, int first_bit, int last_bit, cudaStream_t) {
    constexpr int kDigitBits = 5;
    if (scratch == nullptr) {
      scratch_bytes = sizeof(int) << kDigitBits;
      return cudaSuccess;
    }
    int* const ends = static_cast<int*>(scratch);
    for (int bit = first_bit; bit < last_bit; bit += kDigitBits) {
      const int bits = std::min(kDigitBits, last_bit - bit);
      const auto digit = [&](int i) { return keys.Current()[i] >> bit & ((Key{1} << bits) - 1); };
      std::fill_n(ends, 1 << bits, 0);
      for (int i = 0; i < count; ++i) ++ends[digit(i)];
      for (int d = 1; d < 1 << bits; ++d) ends[d] += ends[d - 1];
      for (int i = count - 1; i >= 0; --i) {
        const int to = --ends[digit(i)];
        keys.Alternate()[to] = keys.Current()[i];
        values.Alternate()[to] = values.Current()[i];
      }
      keys.swap();
      values.swap();
    }
    return cudaSuccess;
  }
};

}  // namespace CUB_WRAPPED_NAMESPACE::cub
