// A few lines instead of a test framework: CHECK counts and reports, main returns 1 if any failed.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstring>
#include <memory>
#include <vector>

namespace flowfast {

inline int failures = 0;

#define CHECK(condition, ...)                                               \
  do {                                                                      \
    if (!(condition)) {                                                     \
      if (++::flowfast::failures <= 20) {                                   \
        std::printf("%s:%d: %s is false;", __FILE__, __LINE__, #condition); \
        std::printf(" " __VA_ARGS__);                                       \
        std::printf("\n");                                                  \
      }                                                                     \
    }                                                                       \
  } while (0)

// Numbers for operands; any spread will do.
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}
  uint64_t bits() {  // splitmix64 (Steele, Lea, Flood 2014)
    uint64_t z = state_ += 0x9E3779B97F4A7C15u;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    return z ^ (z >> 31);
  }
  double unit() { return static_cast<double>(bits() >> 11) * 0x1p-53; }
  float normalish() { return static_cast<float>(unit() + unit() + unit() + unit() - 2.0) * 1.7f; }

 private:
  uint64_t state_;
};

// An array with nothing behind its last element, so that AddressSanitizer sees the first byte too many.
template <class T>
class Exact {
 public:
  explicit Exact(int64_t n) : size_(n), data_(new T[n]()) {}
  T* get() { return data_.get(); }
  const T* get() const { return data_.get(); }
  T& operator[](int64_t i) { return data_[i]; }
  const T& operator[](int64_t i) const { return data_[i]; }
  int64_t size() const { return size_; }
  bool same_bits(const Exact& other) const {
    return size_ == other.size_ && std::memcmp(get(), other.get(), size_ * sizeof(T)) == 0;
  }

 private:
  int64_t size_;
  std::unique_ptr<T[]> data_;
};

void test_core();
void test_round();
void test_simd();
void test_cuda_threads();
void test_cuda_rounds();

}  // namespace flowfast
