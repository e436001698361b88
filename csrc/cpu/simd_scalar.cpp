// Any processor. Where the hardware has no fma, std::fma is the C library's exact and slow one.
#include "cpu/kernels.h"

namespace flowfast {
namespace {

struct Lanes : ScalarLanes {
  static constexpr int kHalves = 1;
  static constexpr bool kPairs = false;

  template <int kStride>
  static Wide counters(uint32_t first) {
    return first;
  }
  static Word low_words(Wide a, Wide) { return static_cast<Word>(a); }
  static Word high_words(Wide a, Wide) { return static_cast<Word>(a >> 32); }
  static Word load(const uint32_t* data) { return *data; }
  static void store(uint32_t* data, Word value) { *data = value; }
  template <class T>
  static Float load(const T* data) {
    return widen(*data);
  }
  template <class T>
  static void store(T* data, Float value) {
    narrow(value, *data);
  }
};

}  // namespace

const Kernels kScalarKernels = make_kernels<Lanes>("scalar");

}  // namespace flowfast
