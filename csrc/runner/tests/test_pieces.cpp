// BLAKE2b, the seal and PNG against known answers.
#include <unistd.h>

#include <cstdio>
#include <filesystem>
#include <fstream>

#include "runner/blake2b.h"
#include "runner/seal.h"
#include "runner/searcher.h"
#include "runner/tests/tests.h"
#include "tests/check.h"

namespace flowfast {
namespace {

std::string blake2b(size_t digest_bytes, const std::string& data, size_t piece) {
  Blake2b hash(digest_bytes);
  for (size_t i = 0; i < data.size(); i += piece) hash.update(std::string_view(data).substr(i, piece));
  return hexadecimal(hash.digest());
}

void blake2b_known_answers() {
  // RFC 7693, appendix A; the empty text and the long ones: Python's hashlib.
  CHECK(blake2b(64, "abc", 3) == "ba80a53f981c4d0d6a2797b69f12f6e94c212f14685ac4b74b12bb6fdbffa2d1"
                                 "7d87c5392aab792dc252d5de4533cc9518d38aa8dbf1925ab92386edd4009923");
  CHECK(blake2b(32, "", 1) == "0e5751c026e543b2e8ab2eb06099daa1d1e5df47778f7787faab45cdf12fe3a8");
  std::string text;
  for (int i = 0; i < 1000; ++i) text += static_cast<char>(i * 7 + i / 256);
  for (const size_t piece : {size_t{1}, size_t{127}, size_t{128}, size_t{129}, size_t{1000}}) {
    CHECK(blake2b(32, text.substr(0, 128), piece) ==
          "14696d2a98d9f8a280da8b132b1045b345e1033759c6b02fcc4ee885c8ae7c37");
    CHECK(blake2b(32, text.substr(0, 129), piece) ==
          "3934215260b1039be9d9d2b073b059bcd50120c327a22af93eb4d98cf821c14c");
    CHECK(blake2b(32, text, piece) == "38981cec8fd0971914a759c4fac0538dbb29495eec4aea07f277e1f5f8562d27");
  }
}

void keys_are_those_of_python() {
  CHECK(noise_key(0, "two red circles", 0) == 2942332984889217327);
  CHECK(noise_key(-5, "", 3) == 3281388455919696135);
  CHECK(noise_key(INT64_MAX, "d\xc3\xa9j\xc3\xa0", 1) == 8556979308592509538);
}

// As flowfast/seal.py writes them.
std::string sealed(const std::string& body, const std::string& format, const std::string& stream) {
  const std::string head = body + "flowfast-archive format_version=" + format + " noise_stream=" + stream + " blake2b=";
  Blake2b hash(32);
  hash.update(head);
  return head + hexadecimal(hash.digest());
}

// What check_seal says of a file with this content; "" where it has nothing to say.
std::string verdict(const std::string& content) {
  const std::string path = std::filesystem::temp_directory_path() / ("flowfast-seal-" + std::to_string(getpid()));
  std::ofstream(path, std::ios::binary) << content;
  std::string said;
  try {
    const std::string digest = check_seal(path);
    CHECK(content.ends_with(digest) && digest.size() == 64);
  } catch (const ArchiveError& error) {
    said = error.what();
  }
  Blake2b hash(32);
  hash.update(content);
  CHECK(digest_of(path) == hexadecimal(hash.digest()));
  std::remove(path.c_str());
  return said;
}

void seals() {
  const auto says = [](const std::string& content, const char* words) {
    const std::string said = verdict(content);
    CHECK(said.find(words) != std::string::npos, "it says '%s', expected '%s'", said.c_str(), words);
  };
  const std::string body(3000000, 'x'), whole = sealed(body, "1", "1");
  CHECK(verdict(whole).empty());
  CHECK(verdict(sealed("", "1", "1")).empty());
  for (const size_t at : {size_t{0}, body.size() / 2, body.size() - 1}) {
    std::string changed = whole;
    changed[at] ^= 1;
    says(changed, "is damaged");
  }
  for (const size_t size : {size_t{0}, size_t{1}, size_t{63}, size_t{64}, body.size(), whole.size() - 1})
    says(whole.substr(0, size), "not a flowfast archive, or its end is missing");
  says(whole + "\n", "not a flowfast archive");
  says(sealed(body, "1", "2"), "noise stream 2, this library has noise stream 1");
  says(sealed(body, "9", "1"), "archive format 9, this library reads 1");
  says(sealed(body, "99999999999999999999", "1"), "not a flowfast archive");
  try {
    check_seal("/nowhere/at/all.pt");
    CHECK(false, "a missing file was taken");
  } catch (const ArchiveError& error) {
    CHECK(std::string(error.what()).find("cannot read /nowhere/at/all.pt") == 0, "%s", error.what());
  }
}

void pictures() {
  const Image image{3, 1, 2, {0.0f, 0.25f, 0.5f, 1.0f, -1.0f, 2.0f}};
  const std::vector<uint8_t> expected = {0, 128, 0, 64, 255, 255};
  CHECK(image.bytes() == expected);
  // Of Python's zlib and struct; Pillow reads these bytes from it.
  CHECK(hexadecimal(image.png()) ==
        "89504e470d0a1a0a0000000d49484452000000020000000108020000007b40e8dd00000012494441547801010700f8ff"
        "0000800040ffff064402bfe035e3030000000049454e44ae426082");
  try {
    (void)Image{2, 1, 1, {0, 0}}.png();
    CHECK(false, "an image of two channels was written");
  } catch (const OptionError&) {
  }
}

}  // namespace

void test_pieces() {
  blake2b_known_answers();
  keys_are_those_of_python();
  seals();
  pictures();
}

}  // namespace flowfast
