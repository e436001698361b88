#include "runner/seal.h"

#include <algorithm>
#include <cstdio>
#include <fstream>

#include "core/philox.h"
#include "runner/blake2b.h"
#include "runner/searcher.h"

namespace flowfast {
namespace {

constexpr int kFormatVersion = 5;
constexpr std::streamoff kDigits = 64;      // of the digest, at the end of the file
constexpr std::streamoff kLongest = 256;    // of the seal
constexpr size_t kPiece = size_t{1} << 20;  // bytes read at once

struct File {
  std::ifstream stream;
  std::streamoff size;
};

File open(const std::string& path) {
  std::ifstream stream(path, std::ios::binary | std::ios::ate);
  const std::streamoff size = stream ? std::streamoff(stream.tellg()) : -1;
  if (size < 0) throw ArchiveError("cannot read " + path + ": expected a file that `flowfast export` wrote");
  return {std::move(stream), size};
}

std::string read(std::ifstream& file, std::streamoff from, std::streamoff count) {
  std::string bytes(static_cast<size_t>(count), '\0');
  file.seekg(from);
  file.read(bytes.data(), count);
  return bytes;
}

std::string digest_of(std::ifstream& file, std::streamoff count) {
  Blake2b hash(32);
  std::string piece(kPiece, '\0');
  file.seekg(0);
  for (; count > 0 && file; count -= file.gcount()) {
    file.read(piece.data(), std::min<std::streamoff>(count, kPiece));
    hash.update({piece.data(), static_cast<size_t>(file.gcount())});
  }
  return hexadecimal(hash.digest());
}

}  // namespace

std::string digest_of(const std::string& path) {
  auto [file, size] = open(path);
  return digest_of(file, size);
}

std::string check_seal(const std::string& path) {
  auto [file, size] = open(path);
  const std::string tail = read(file, std::max<std::streamoff>(0, size - kLongest), std::min(size, kLongest));
  const size_t start = tail.rfind("flowfast-archive ");
  int format = 0, stream = 0, digits = 0;
  if (start == std::string::npos ||
      std::sscanf(tail.c_str() + start, "flowfast-archive format_version=%9d noise_stream=%9d blake2b=%n", &format,
                  &stream, &digits) != 2 ||
      tail.size() - start != static_cast<size_t>(digits + kDigits))
    throw ArchiveError(path + " is not a flowfast archive, or its end is missing: write it with `flowfast export`");
  if (format != kFormatVersion)
    throw ArchiveError(path + " has archive format " + std::to_string(format) + ", this library reads " +
                       std::to_string(kFormatVersion) + ": export it anew with the flowfast of this library");
  if (stream != kStreamVersion)
    throw ArchiveError(path + " was written for noise stream " + std::to_string(stream) +
                       ", this library has noise stream " + std::to_string(kStreamVersion) +
                       ", which gives other samples for the same seeds: export it anew with the flowfast of this "
                       "library");
  const std::string digest = tail.substr(tail.size() - kDigits);
  if (digest_of(file, size - kDigits) != digest)
    throw ArchiveError(path + " is damaged: its content does not have the digest that it was sealed with");
  return digest;
}

}  // namespace flowfast
