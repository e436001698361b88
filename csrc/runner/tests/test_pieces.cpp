// BLAKE2b, the seal and PNG against known answers.
#include <unistd.h>

#include <cmath>
#include <cstdio>
#include <filesystem>
#include <fstream>

#include "runner/blake2b.h"
#include "runner/json.h"
#include "runner/seal.h"
#include "runner/searcher.h"
#include "runner/tests/tests.h"
#include "runner/text.h"
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
  CHECK(blake2b(64, "abc", 3) ==
        "ba80a53f981c4d0d6a2797b69f12f6e94c212f14685ac4b74b12bb6fdbffa2d1"
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
  CHECK(noise_key(UINT64_MAX, "a", 0) == -7949410186468065499);
  CHECK(noise_key(Seed("-170141183460469231731687303715884105729"), "a", 2) == -6368143710465831841);
}

void seeds_are_whole_numbers_as_python_reads_them() {
  const std::pair<const char*, const char*> table[] = {{"0", "0"},
                                                       {"007", "7"},
                                                       {"+5", "5"},
                                                       {"-0", "0"},
                                                       {"-00", "0"},
                                                       {" 12\n", "12"},
                                                       {"-0_7", "-7"},
                                                       {"1_0", "10"},
                                                       {"\u00a0-12\u3000", "-12"},
                                                       {"18446744073709551616", "18446744073709551616"}};
  for (const auto& [text, digits] : table) CHECK(Seed(text).digits() == digits, "%s", text);
  CHECK(Seed(INT64_MIN) == Seed("-9223372036854775808") && Seed(UINT64_MAX) == Seed("18446744073709551615"));
  CHECK(Seed(std::string(4300, '9')).digits().size() == 4300);
  for (const std::string& text :
       {std::string(), std::string(" "), std::string("-"), std::string("1.0"), std::string("1e3"), std::string("0x1f"),
        std::string("--1"), std::string("1 2"), std::string("_1"), std::string("1_"), std::string("1__0"),
        std::string("- 1"), std::string("\xd9\xa3"), std::string("nan"), std::string(4301, '1')})
    try {
      const Seed seed(text);
      CHECK(false, "'%s' was taken as %s", text.c_str(), seed.digits().c_str());
    } catch (const OptionError& error) {
      const std::string said = error.what();
      CHECK(said.starts_with("a seed must be a whole number") && said.size() < 200, "%s", said.c_str());
    }
}

std::string verdict_on_json(const std::string& text) {
  try {
    (void)parse_json(text);
    return "";
  } catch (const JsonError& error) {
    return std::to_string(error.line) + ": " + error.what();
  }
}

void json_is_what_python_reads() {
  const Json value = parse_json(R"( {"a": [1, -2.5e+3, NaN, -Infinity, true, null], "\ud83d\ude00\n": "\/\u00e9"} )");
  CHECK(value.kind == Json::kObject && value.find("a")->entries.size() == 6);
  CHECK(value.find("a")->entries[1].text == "-2.5e+3" && value.find("a")->entries[2].kind == Json::kNumber);
  CHECK(value.find("\xf0\x9f\x98\x80\n")->text == "/\xc3\xa9" && !value.find("b"));
  CHECK(parse_json("\"\\ud83d!\"").text == "\xed\xa0\xbd!");  // half of a pair, which is no UTF-8
  for (const char* wrong :
       {"",   " ",  "{",   "[1,]", R"({"a" 1})", R"({"a":1,})", "{a: 1}", "01",    "1.",  "-",  ".5",
        "+1", "1e", "tru", "\"a",  R"("\x")",    R"("\u12")",   "\"\t\"", "[1] 2", "'a'", "nan"})
    CHECK(verdict_on_json(wrong).starts_with("1: "), "%s", wrong);
  CHECK(verdict_on_json("[1,\n 2\n 3]").starts_with("3: "));
  CHECK(verdict_on_json("{\"a\": 1, \"a\": 2}") == "0: 'a' stands there twice");
  CHECK(verdict_on_json(std::string(900, '[') + std::string(900, ']')).empty());
  for (const char* open : {"[", "{\"a\":"})
    for (std::string deep; deep.size() < 3'000'000;)
      if ((deep += deep.empty() ? open : deep).size() > 2'000'000) CHECK(verdict_on_json(deep) == "0: nested too deep");
  CHECK(verdict_on_json(std::string(4301, '9')) == "0: a number has too many digits");
}

void what_is_not_utf8() {
  const auto place = [](const std::string& text) { return not_utf8(text).value_or(99); };
  CHECK(place("") == 99 && place("d\xc3\xa9j\xc3\xa0 \xe2\x98\x83 \xf0\x9f\x8e\xa8 \xef\xbf\xbf") == 99);
  CHECK(place("a\xff") == 1 && place("\xc3") == 0 && place("ab\xe2\x98") == 2 && place("\x80") == 0);
  CHECK(place("\xc0\x80") == 0 && place("\xe0\x80\x80") == 0 && place("\xf0\x80\x80\x80") == 0);  // too long
  CHECK(place("\xed\xa0\x80") == 0 && place("\xf4\x90\x80\x80") == 0);  // half of a pair; beyond the last
}

// As flowfast/archive/seal.py writes them.
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
  const std::string body(3000000, 'x'), whole = sealed(body, "5", "1");
  CHECK(verdict(whole).empty());
  CHECK(verdict(sealed("", "5", "1")).empty());
  for (const size_t at : {size_t{0}, body.size() / 2, body.size() - 1}) {
    std::string changed = whole;
    changed[at] ^= 1;
    says(changed, "is damaged");
  }
  for (const size_t size : {size_t{0}, size_t{1}, size_t{63}, size_t{64}, body.size(), whole.size() - 1})
    says(whole.substr(0, size), "not a flowfast archive, or its end is missing");
  says(whole + "\n", "not a flowfast archive");
  says(sealed(body, "5", "2"), "noise stream 2, this library has noise stream 1");
  for (const char* other : {"2", "9"})
    says(sealed(body, other, "1"), (std::string("archive format ") + other + ", this library reads 5").c_str());
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
  const Image broken{1, 1, 3, {NAN, INFINITY, -INFINITY}};
  CHECK(broken.bytes() == std::vector<uint8_t>({0, 255, 0}));
  // Of Python's zlib and struct; Pillow reads these bytes from it.
  CHECK(hexadecimal(image.png()) ==
        "89504e470d0a1a0a0000000d49484452000000020000000108020000007b40e8dd00000012494441547801010700f8ff"
        "0000800040ffff064402bfe035e3030000000049454e44ae426082");
  for (const Image& impossible :
       {Image{2, 1, 1, {0, 0}}, Image{3, 1, 2, {0, 0}}, Image{1, 0, 0, {}}, Image{1, -1, -1, {0}}})
    try {
      (void)impossible.png();
      CHECK(false, "an image of %d channels was written", impossible.channels);
    } catch (const OptionError&) {
    }
}

}  // namespace

void test_pieces() {
  blake2b_known_answers();
  keys_are_those_of_python();
  seeds_are_whole_numbers_as_python_reads_them();
  json_is_what_python_reads();
  what_is_not_utf8();
  seals();
  pictures();
}

}  // namespace flowfast
