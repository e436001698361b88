#include "runner/list_text.h"

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <iostream>
#include <utility>

#include "runner/searcher.h"
#include "runner/text.h"

namespace flowfast {
namespace {

constexpr size_t kMostBytes = size_t{1} << 30;

OptionError unreadable(const std::string& place) {
  return OptionError("cannot read --prompts " + place + ": " + std::strerror(errno));
}

std::string bytes_of(const std::string& place) {
  std::string data;
  std::ifstream file;
  if (place != "-") {
    errno = 0;
    file.open(place, std::ios::binary);
    if (!file) throw unreadable(place);
  }
  std::istream& stream = place == "-" ? std::cin : file;
  for (std::array<char, 65536> piece; stream && data.size() <= kMostBytes;) {
    stream.read(piece.data(), piece.size());
    data.append(piece.data(), static_cast<size_t>(stream.gcount()));
  }
  if (stream.bad()) throw unreadable(place);
  if (data.size() > kMostBytes) throw PromptError("--prompts " + place + " has more than 1 GiB: give it in parts");
  return data;
}

bool is_utf16(std::string_view data) { return data.starts_with("\xff\xfe") || data.starts_with("\xfe\xff"); }

std::string binary(std::string_view data) {  // what it is; "": it may be text
  using namespace std::string_view_literals;
  constexpr std::pair<std::string_view, const char*> kKnown[] = {
      {"PK\x03\x04"sv, "a zip file (.xlsx, .docx, ...)"},
      {"\x1f\x8b"sv, "a gzip file"},
      {"PAR1"sv, "a Parquet file"},
      {"%PDF"sv, "a PDF"},
      {"\x89PNG"sv, "a PNG"},
      {"\xff\xd8\xff"sv, "a JPEG"},
      {"\xff\xfe\0\0"sv, "UTF-32"},
      {"\0\0\xfe\xff"sv, "UTF-32"},
      {"\x28\xb5\x2f\xfd"sv, "a zstd file"},
      {"\xfd"
       "7zXZ"sv,
       "an xz file"},
      {"\xd0\xcf\x11\xe0"sv, "an old Office file (.xls, .doc, ...)"},
      {"version https://git-lfs"sv, "a pointer of Git LFS (`git lfs pull` gets the list)"},
      {"<!DOCTYPE html"sv, "a page of HTML"},
      {"<!doctype html"sv, "a page of HTML"},
      {"<html"sv, "a page of HTML"}};
  for (const auto& [start, what] : kKnown)
    if (data.starts_with(start)) return what;
  const bool nul = data.substr(0, 4096).find('\0') != data.npos;
  return nul && !is_utf16(data) ? "a binary file or UTF-16 without a byte-order mark" : "";
}

std::string of_utf16(std::string_view data, const std::string& name) {
  std::string text;
  const bool big = data.starts_with('\xfe');
  const auto word = [&](size_t at) {
    const auto byte = [&](size_t i) { return static_cast<uint32_t>(static_cast<uint8_t>(data[at + i])); };
    return byte(big ? 0 : 1) << 8 | byte(big ? 1 : 0);
  };
  for (size_t at = 2; at < data.size(); at += 2) {
    const bool whole = at + 2 <= data.size(), pair = at + 4 <= data.size();
    uint32_t code = whole ? word(at) : 0xdc00;
    if (code >= 0xd800 && code < 0xe000) {
      const uint32_t second = pair ? word(at + 2) : 0;
      if (code >= 0xdc00 || second < 0xdc00 || second >= 0xe000)
        throw PromptError(name + ": UTF-16 is broken at byte " + std::to_string(at) + ": save it as UTF-8");
      code = 0x10000 + ((code - 0xd800) << 10) + (second - 0xdc00);
      at += 2;
    }
    append_utf8(text, code);
  }
  return text;
}

}  // namespace

std::string list_text(const std::string& place, const std::string& name) {
  std::string data = bytes_of(place);
  if (const std::string what = binary(data); !what.empty())
    throw PromptError(name + " is " + what + ": expected prompts as UTF-8 text (.txt, .jsonl, .json, .csv, .tsv)");
  if (is_utf16(data)) data = of_utf16(data, name);
  if (const auto wrong = not_utf8(data)) {
    size_t line = 1;
    for (size_t i = 0; i < *wrong; ++i) line += data[i] == '\n' || (data[i] == '\r' && data[i + 1] != '\n');
    char byte[3];
    std::snprintf(byte, sizeof(byte), "%02x", static_cast<uint8_t>(data[*wrong]));
    throw PromptError(name + ", line " + std::to_string(line) + ": byte 0x" + byte + " at offset " +
                      std::to_string(*wrong) +
                      " is not UTF-8; save it so, from Windows by iconv -f WINDOWS-1252 -t UTF-8");
  }
  std::string text;
  text.reserve(data.size());
  for (size_t i = 0; i < data.size(); ++i)
    if (data.compare(i, 3, "\xef\xbb\xbf") == 0)
      i += 2;
    else if (data[i] == '\r')
      text += i + 1 < data.size() && data[i + 1] == '\n' ? "" : "\n";
    else
      text += data[i];
  return text;
}

}  // namespace flowfast
