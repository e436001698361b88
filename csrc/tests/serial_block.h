// The CPU's stand-in for cuda/block.h.
#pragma once

#include <cstdint>

namespace flowfast {

// One thread in the part of a block of threads (cuda/block.h); elements come in a scrambled order.
class SerialBlock {
 public:
  template <class F>
  void each(int64_t n, const F& f) {
    for (int64_t k = 0; k < n; ++k) f(scrambled(k, n));
  }
  void barrier() {}
  template <class F>
  void once(const F& f) {
    f();
  }
  template <class T, class F, class Combine>
  T reduce(int64_t n, T identity, const F& f, const Combine& combine) {
    T result = identity;
    each(n, [&](int64_t i) { result = combine(result, f(i)); });
    return result;
  }
  template <class Combine>
  void scan(int64_t* data, int64_t n, const Combine& combine) {
    for (int64_t i = 1; i < n; ++i) data[i] = combine(data[i - 1], data[i]);
  }
  int64_t take_ticket(int64_t* ticket) { return (*ticket)++; }
  static void add(int64_t& sum, int64_t value) { sum += value; }

  static int64_t scrambled(int64_t k, int64_t n) { return n % 7919 == 0 ? n - 1 - k : (k * 7919 + 5) % n; }
};

}  // namespace flowfast
