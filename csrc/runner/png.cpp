// 8-bit values of an image, and a minimal PNG writer (PNG specification, third edition) that does not compress.
#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <string_view>

#include "runner/searcher.h"

namespace flowfast {
namespace {

std::string big_endian(uint32_t value) {
  std::string bytes;
  for (const int shift : {24, 16, 8, 0}) bytes += static_cast<char>(value >> shift);
  return bytes;
}

uint32_t crc32(std::string_view data) {
  static const auto table = [] {
    std::array<uint32_t, 256> t{};
    for (uint32_t n = 0; n < 256; ++n) {
      t[n] = n;
      for (int bit = 0; bit < 8; ++bit) t[n] = t[n] & 1 ? 0xedb88320u ^ (t[n] >> 1) : t[n] >> 1;
    }
    return t;
  }();
  uint32_t crc = 0xffffffffu;
  for (const char byte : data) crc = table[(crc ^ static_cast<uint8_t>(byte)) & 0xff] ^ (crc >> 8);
  return ~crc;
}

uint32_t adler32(std::string_view data) {
  uint32_t a = 1, b = 0;
  for (const char byte : data) {
    a = (a + static_cast<uint8_t>(byte)) % 65521;
    b = (b + a) % 65521;
  }
  return b << 16 | a;
}

std::string chunk(const std::string& type, const std::string& data) {
  return big_endian(static_cast<uint32_t>(data.size())) + type + data + big_endian(crc32(type + data));
}

// zlib's format (RFC 1950) around stored blocks (RFC 1951, 3.2.4).
std::string stored(std::string_view data) {
  std::string out("\x78\x01", 2);
  const uint32_t checksum = adler32(data);
  do {
    const std::string_view block = data.substr(0, 65535);
    data.remove_prefix(block.size());
    const auto length = static_cast<uint16_t>(block.size()), inverse = static_cast<uint16_t>(~length);
    out += data.empty() ? '\1' : '\0';
    for (const uint16_t word : {length, inverse}) {
      out += static_cast<char>(word & 0xff);
      out += static_cast<char>(word >> 8);
    }
    out += block;
  } while (!data.empty());
  return out + big_endian(checksum);
}

std::string size_of(const Image& image) {
  return std::to_string(image.channels) + " x " + std::to_string(image.height) + " x " + std::to_string(image.width);
}

}  // namespace

std::vector<uint8_t> Image::bytes() const {
  const size_t plane = static_cast<size_t>(height) * width;
  if (channels < 0 || height < 0 || width < 0 || pixels.size() != plane * channels)
    throw OptionError("an image of " + size_of(*this) + " needs as many pixels, got " + std::to_string(pixels.size()));
  std::vector<uint8_t> out(pixels.size());
  for (size_t i = 0; i < plane; ++i)
    for (int c = 0; c < channels; ++c) {
      const float value = pixels[c * plane + i];
      const float inside = value > 0 ? std::min(value, 1.0f) : 0.0f;               // NaN: 0
      out[i * channels + c] = static_cast<uint8_t>(std::nearbyint(inside * 255));  // to even, as PyTorch rounds
    }
  return out;
}

std::string Image::png() const {
  if ((channels != 1 && channels != 3) || height < 1 || width < 1)
    throw OptionError("a PNG needs 1 or 3 channels and at least one pixel, got " + size_of(*this));
  const std::vector<uint8_t> values = bytes();
  const size_t stride = static_cast<size_t>(width) * channels;
  std::string rows;
  for (int y = 0; y < height; ++y) {
    rows += '\0';  // no filter
    rows.append(reinterpret_cast<const char*>(values.data()) + y * stride, stride);
  }
  std::string header = big_endian(width) + big_endian(height);
  header += {8, static_cast<char>(channels == 3 ? 2 : 0), 0, 0, 0};
  return "\x89PNG\r\n\x1a\n" + chunk("IHDR", header) + chunk("IDAT", stored(rows)) + chunk("IEND", "");
}

}  // namespace flowfast
