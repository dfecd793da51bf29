// The only allocation of a call, divided into arrays.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>

namespace rq {

// Usage: reserve every array, allocate once, then get the address of each. Arrays start at multiples of 64 bytes and are
// not initialized.
class Arena {
 public:
  template <typename T>
  class Array {
   public:
    Array(const Arena& arena, size_t begin) : arena_(arena), begin_(begin) {}
    T* data() const { return reinterpret_cast<T*>(arena_.memory_.get() + begin_); }

   private:
    const Arena& arena_;
    size_t begin_;
  };

  template <typename T>
  Array<T> reserve(int64_t count) {
    const size_t begin = size_;
    size_ += (static_cast<size_t>(count) * sizeof(T) + kAlignment - 1) / kAlignment * kAlignment;
    return {*this, begin};
  }
  void allocate() { memory_.reset(static_cast<std::byte*>(::operator new(size_, std::align_val_t{kAlignment}))); }

 private:
  static constexpr size_t kAlignment = 64;
  struct Free {
    void operator()(std::byte* memory) const { ::operator delete(memory, std::align_val_t{kAlignment}); }
  };
  size_t size_ = 0;
  std::unique_ptr<std::byte, Free> memory_;
};

}  // namespace rq
