// BLAKE2b without a key (RFC 7693): the hash of noise keys and of an archive's seal.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string>
#include <string_view>

namespace flowfast {

class Blake2b {
 public:
  explicit Blake2b(size_t digest_bytes);  // 1..64
  void update(std::string_view data);
  std::string digest();  // digest_bytes long; ends the hash

 private:
  void compress(bool last);

  std::array<uint64_t, 8> h_;
  std::array<uint8_t, 128> block_{};
  size_t digest_bytes_, filled_ = 0;
  uint64_t length_ = 0;
};

std::string hexadecimal(std::string_view bytes);

// The key of a request's noise, as flowfast/ops/noise.py has it.
class Seed;
int64_t noise_key(const Seed& seed, std::string_view prompt, int64_t repeat);

}  // namespace flowfast
