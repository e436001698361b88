#include "runner/blake2b.h"

#include <algorithm>
#include <bit>

#include "runner/searcher.h"

namespace flowfast {
namespace {

static_assert(std::endian::native == std::endian::little, "words and digests are read as they lie in memory");

constexpr std::array<uint64_t, 8> kStart = {
    0x6a09e667f3bcc908, 0xbb67ae8584caa73b, 0x3c6ef372fe94f82b, 0xa54ff53a5f1d36f1,
    0x510e527fade682d1, 0x9b05688c2b3e6c1f, 0x1f83d9abfb41bd6b, 0x5be0cd19137e2179,
};

constexpr uint8_t kOrder[10][16] = {
    {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}, {14, 10, 4, 8, 9, 15, 13, 6, 1, 12, 0, 2, 11, 7, 5, 3},
    {11, 8, 12, 0, 5, 2, 15, 13, 10, 14, 3, 6, 7, 1, 9, 4}, {7, 9, 3, 1, 13, 12, 11, 14, 2, 6, 5, 10, 4, 0, 15, 8},
    {9, 0, 5, 7, 2, 4, 10, 15, 14, 1, 11, 12, 6, 8, 3, 13}, {2, 12, 6, 10, 0, 11, 8, 3, 4, 13, 7, 5, 15, 14, 1, 9},
    {12, 5, 1, 15, 14, 13, 4, 10, 0, 7, 6, 3, 9, 2, 8, 11}, {13, 11, 7, 14, 12, 1, 3, 9, 5, 0, 15, 4, 8, 6, 2, 10},
    {6, 15, 14, 9, 11, 3, 0, 8, 12, 2, 13, 7, 1, 4, 10, 5}, {10, 2, 8, 4, 7, 6, 1, 5, 15, 11, 9, 14, 3, 12, 13, 0},
};

void mix(uint64_t& a, uint64_t& b, uint64_t& c, uint64_t& d, uint64_t x, uint64_t y) {
  a += b + x;
  d = std::rotr(d ^ a, 32);
  c += d;
  b = std::rotr(b ^ c, 24);
  a += b + y;
  d = std::rotr(d ^ a, 16);
  c += d;
  b = std::rotr(b ^ c, 63);
}

}  // namespace

Blake2b::Blake2b(size_t digest_bytes) : h_(kStart), digest_bytes_(digest_bytes) { h_[0] ^= 0x01010000 ^ digest_bytes; }

void Blake2b::update(std::string_view data) {
  while (!data.empty()) {
    if (filled_ == block_.size()) compress(false);  // the last block, full or not, waits for digest()
    const size_t count = std::min(data.size(), block_.size() - filled_);
    std::memcpy(block_.data() + filled_, data.data(), count);
    filled_ += count;
    data.remove_prefix(count);
  }
}

std::string Blake2b::digest() {
  std::fill(block_.begin() + static_cast<std::ptrdiff_t>(filled_), block_.end(), uint8_t{0});
  compress(true);
  return std::string(reinterpret_cast<const char*>(h_.data()), digest_bytes_);
}

void Blake2b::compress(bool last) {
  length_ += filled_;
  filled_ = 0;
  std::array<uint64_t, 16> m, v;
  std::memcpy(m.data(), block_.data(), block_.size());
  std::copy(h_.begin(), h_.end(), v.begin());
  std::copy(kStart.begin(), kStart.end(), v.begin() + 8);
  v[12] ^= length_;
  if (last) v[14] = ~v[14];
  for (int round = 0; round < 12; ++round) {
    const uint8_t* s = kOrder[round % 10];
    for (int i = 0; i < 4; ++i) mix(v[i], v[4 + i], v[8 + i], v[12 + i], m[s[2 * i]], m[s[2 * i + 1]]);
    for (int i = 0; i < 4; ++i)
      mix(v[i], v[4 + (i + 1) % 4], v[8 + (i + 2) % 4], v[12 + (i + 3) % 4], m[s[8 + 2 * i]], m[s[9 + 2 * i]]);
  }
  for (int i = 0; i < 8; ++i) h_[i] ^= v[i] ^ v[8 + i];
}

std::string hexadecimal(std::string_view bytes) {
  std::string digits;
  for (const char byte : bytes)
    for (const int shift : {4, 0}) digits += "0123456789abcdef"[static_cast<uint8_t>(byte) >> shift & 15];
  return digits;
}

int64_t noise_key(const Seed& seed, std::string_view prompt, int64_t repeat) {
  constexpr std::string_view kNull("\0", 1);
  Blake2b hash(8);
  hash.update(seed.digits());
  hash.update(kNull);
  hash.update(prompt);
  hash.update(kNull);
  hash.update(std::to_string(repeat));
  int64_t key;
  std::memcpy(&key, hash.digest().data(), sizeof(key));
  return key;
}

}  // namespace flowfast
