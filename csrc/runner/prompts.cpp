#include "runner/prompts.h"

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <set>
#include <system_error>
#include <utility>

#include "runner/json.h"
#include "runner/list_text.h"
#include "runner/text.h"

namespace flowfast {
namespace {

using Texts = std::vector<std::string>;

const Texts kColumns = {"prompt", "prompts", "caption", "captions", "text", "texts"};
// Members of an object whose list is what a document is for, where it has no other.
const std::set<std::string> kHolders = {"data", "rows", "examples", "items", "entries"};
constexpr size_t kFirstLines = 4;  // so many of them may be the first line of a list that is no table
const std::set<std::string> kFields = {"classes", "counts", "text", "seed", "tag", "include", "exclude"};
const std::set<std::string> kLines = {".txt", ".text", ".lst", ".list"}, kJson = {".jsonl", ".ndjson", ".json"};
const std::set<std::string> kTables = {".csv", ".tsv"};
constexpr std::ptrdiff_t kListLines = 50;  // more than one prompt has: such a file of a folder is a list itself

std::string joined(const Texts& texts) {
  std::string all;
  for (const std::string& text : texts) all += (all.empty() ? "" : ", ") + text;
  return all;
}

size_t words_in(std::string_view text) {
  size_t words = 0;
  text = trimmed(text);
  for (size_t i = 0; i < text.size(); ++i) {
    const std::string_view before = text.substr(0, i), rest = text.substr(i);
    const bool after_space = trimmed(before).size() < before.size();
    words += i == 0 || (after_space && trimmed(rest).data() == rest.data());
  }
  return words;
}

std::vector<std::pair<size_t, std::string_view>> lines_of(std::string_view text) {  // that are not blank
  std::vector<std::pair<size_t, std::string_view>> lines;
  for (size_t number = 1, start = 0; start <= text.size(); ++number) {
    const size_t end = std::min(text.find('\n', start), text.size());
    const std::string_view line = text.substr(start, end - start);
    if (!trimmed(line).empty()) lines.emplace_back(number, line);
    start = end + 1;
  }
  return lines;
}

// ---- prompts and their fields ----

std::string checked(std::string_view prompt, const std::string& where) {
  if (const auto fault = fault_of(prompt))
    throw PromptError(where + ": " + *fault + "; write a prompt there, or take it out");
  return std::string(prompt);
}

std::string summary(const Json& value) {  // for an error
  switch (value.kind) {
    case Json::kText:
      return shown(value.text);
    case Json::kList:
      return "a list";
    case Json::kObject:
      return "an object";
    case Json::kNull:
      return "None";
    case Json::kBool:
      return "bool";
    default:
      return value.text.size() <= 60 ? value.text
                                     : "a number of about " + std::to_string(value.text.size()) + " digits";
  }
}

// 3, 3.0, "3" and "3.0"; null and "" are none.
std::optional<Seed> seed_of(const Json& value, const std::string& where) {
  const std::string_view text = trimmed(value.text);
  if (value.kind == Json::kNull || (value.kind == Json::kText && text.empty())) return std::nullopt;
  if (value.kind == Json::kText || value.kind == Json::kNumber) {
    const size_t dot = value.kind == Json::kText ? text.find('.') : text.npos;
    const bool digits = text.substr(0, dot).find_first_not_of("+-0123456789") == text.npos;
    if (digits && (dot == text.npos || text.find_first_not_of('0', dot + 1) == text.npos)) try {
        return Seed(text.substr(0, dot));
      } catch (const OptionError&) {  // "+-3", or too many digits
      }
    const auto number = value.kind == Json::kNumber ? number_in<double>(text) : std::nullopt;
    if (number && std::abs(*number) <= 0x1p53 && std::trunc(*number) == *number)  // above: digits were lost
      return Seed(static_cast<int64_t>(*number));
  }
  throw PromptError(where + ": field 'seed' must be a whole number, got " + summary(value));
}

// ---- tables ----

struct Row {
  size_t line = 1;
  Texts cells;
};

// The rows of a table that are not blank, one after the other.
class Rows {
 public:
  Rows(std::string_view text, char separator) : text_(text), separator_(separator) {}

  std::optional<Row> next() {
    for (Row row{line_, {}}; place_ <= text_.size();) {
      row.cells.push_back(cell());
      const bool more = place_ < text_.size() && text_[place_] == separator_;
      ++place_;
      if (more) continue;
      ++line_;
      if (row.cells.size() > 1 || !trimmed(row.cells[0]).empty()) return row;
      row = {line_, {}};
    }
    return std::nullopt;
  }

 private:
  bool ends(size_t place) const { return place >= text_.size() || text_[place] == separator_ || text_[place] == '\n'; }

  std::string cell() {
    const size_t quote = text_.find_first_not_of(' ', place_);
    if (quote != text_.npos && text_[quote] == '"') {  // if the quotes enclose all of it
      std::string found;
      for (size_t at = quote + 1; at < text_.size(); ++at)
        if (text_[at] != '"') {
          found += text_[at];
        } else if (at + 1 < text_.size() && text_[at + 1] == '"') {
          found += text_[at++];
        } else {
          const size_t after = std::min(text_.find_first_not_of(' ', at + 1), text_.size());
          if (!ends(after)) break;
          line_ += static_cast<size_t>(std::count(found.begin(), found.end(), '\n'));
          place_ = after;
          return found;
        }
    }
    const size_t start = place_;
    while (!ends(place_)) ++place_;
    return std::string(text_.substr(start, place_ - start));
  }

  const std::string_view text_;
  const char separator_;
  size_t place_ = 0, line_ = 1;
};

// ---- one list ----

class Reader {
 public:
  Reader(std::string name, std::string suffix, std::string text, std::optional<std::string> column)
      : name_(std::move(name)), suffix_(std::move(suffix)), text_(std::move(text)), column_(std::move(column)) {}

  std::vector<Listed> prompts() {
    const bool lines = kLines.contains(suffix_), table = kTables.contains(suffix_);
    if (kJson.contains(suffix_) || (!table && like_json())) {
      of_json();
      return std::move(found_);
    }
    const char* choices = suffix_ == ".csv" ? ",\t;" : "\t,;";
    const char separator = separator_of(choices);
    if (table || separator) {
      of_table(separator ? separator : choices[0]);
    } else if (!lines && !suffix_.empty()) {
      throw PromptError(name_ + ": " + suffix_ +
                        " is no kind of list, and inside is neither JSON nor a table with a "
                        "column prompt, caption, text; name a file with a prompt a line .txt");
    } else if (!lines && column_) {
      throw OptionError("--prompt-column " + *column_ + ": " + name_ + " is no table with such a column");
    } else {
      of_lines();
    }
    return std::move(found_);
  }

 private:
  std::string at_line(size_t number) const { return name_ + ", line " + std::to_string(number); }

  bool like_json() const {
    const std::string_view text = trimmed(text_);
    const std::string_view inside = text.empty() ? text : trimmed(text.substr(1));
    const auto begins_with = [&](std::string_view any) { return any.find(inside.substr(0, 1)) != any.npos; };
    return !inside.empty() && ((text[0] == '{' && begins_with("\"'}")) || (text[0] == '[' && begins_with("{\"]")));
  }

  void of_lines() {
    const auto lines = lines_of(text_);
    for (const auto& [number, line] : lines) {
      const size_t brace = line.find_first_not_of(" \t");
      const size_t inside = line[brace] == '{' ? line.find_first_not_of(" \t", brace + 1) : line.npos;
      if (inside != line.npos && (line[inside] == '"' || line[inside] == '\''))
        throw PromptError(at_line(number) + ": an object of JSON in a list of lines; write all lines as JSON, or none");
    }
    const auto end = kColumns.begin() + kFirstLines;
    const bool named = !lines.empty() && std::find(kColumns.begin(), end, lowered(trimmed(lines[0].second))) != end;
    for (size_t i = named; i < lines.size(); ++i)
      found_.push_back({checked(trimmed(lines[i].second), at_line(lines[i].first))});
  }

  // ---- tables ----

  // The first that makes several columns of the first row, with one that we know; '\0': there is none.
  char separator_of(const char* choices) const {
    for (const char* separator = choices; *separator; ++separator) {
      const auto row = Rows(text_, *separator).next();
      if (row && row->cells.size() > 1 && pick(row->cells, "")) return *separator;
    }
    return '\0';
  }

  void of_table(char separator) {
    Rows rows(text_, separator);
    const Row first = rows.next().value_or(Row());
    if (first.cells.empty()) return;
    Texts names;
    for (const std::string& cell : first.cells) names.emplace_back(trimmed(cell));
    std::optional<std::string> column = pick(names, at_line(first.line));
    const bool only = names.size() == 1 && !column_ && names[0].find_first_of("\t,;|") == std::string::npos;
    if (!column && only && words_in(names[0]) < 3) column = names[0];  // else it is a prompt, without a row of names
    if (!column) throw no_column(names, at_line(first.line));
    for (const std::string& name : names)
      if ((name == *column || kFields.contains(name)) && std::count(names.begin(), names.end(), name) > 1)
        throw PromptError(at_line(first.line) + ", field " + shown(name) +
                          ": there are two columns of that name; rename one");
    std::optional<std::pair<std::string, std::string>> last;  // id and prompt
    while (std::optional<Row> row = rows.next()) {
      const std::string where = at_line(row->line);
      Texts& cells = row->cells;
      while (cells.size() > names.size() && cells.back().empty()) cells.pop_back();
      if (cells.size() != names.size())
        throw PromptError(where + ": " + std::to_string(cells.size()) + " fields, but the first row has " +
                          std::to_string(names.size()) + "; put a field with a separator in double quotes");
      const auto field = [&](const std::string& name) -> std::optional<std::string> {
        const auto found = std::find(names.rbegin(), names.rend(), name);
        return found == names.rend() ? std::nullopt : std::optional(cells[names.rend() - found - 1]);
      };
      const std::string prompt = checked(trimmed(*field(*column)), where + ", field " + shown(*column));
      if (const auto id = *column == "item_id" ? std::nullopt : field("item_id")) {
        const bool again = last == std::pair(*id, prompt);
        last = std::pair(*id, prompt);
        if (again) continue;
      }
      const auto seed = *column == "seed" ? std::nullopt : field("seed");
      found_.push_back({prompt, seed ? seed_of({Json::kText, *seed, {}, {}}, where) : std::nullopt});
    }
  }

  // ---- JSON ----

  void of_json() {
    const auto lines = lines_of(text_);
    if (lines.empty()) return;
    Json first;
    try {
      first = parse_json(lines[0].second);
    } catch (const JsonError& error) {
      return of_document(document(lines[0].first, error));
    }
    if (lines.size() == 1) return of_document(first);
    add(first, at_line(lines[0].first));
    for (size_t i = 1; i < lines.size(); ++i) try {
        add(parse_json(lines[i].second), at_line(lines[i].first));
      } catch (const JsonError& error) {
        throw no_json(lines[i].first, error);
      }
  }

  Json document(size_t first, const JsonError& of_line) const {
    try {
      return parse_json(text_);
    } catch (const JsonError& error) {
      if (suffix_ == ".jsonl" || suffix_ == ".ndjson") throw no_json(first, of_line);
      throw no_json(error.line ? error.line : first, error);
    }
  }

  PromptError no_json(size_t line, const JsonError& error) const {
    const bool by_line = suffix_ == ".jsonl" || suffix_ == ".ndjson";
    return PromptError(at_line(line) + ": not JSON (" + error.what() + "); write " +
                       (by_line ? "an object a line" : "a list of texts or objects"));
  }

  void of_document(const Json& document) {
    const Json& value = held(document);
    if (value.kind == Json::kList) {
      for (size_t i = 0; i < value.entries.size(); ++i)
        add(value.entries[i], name_ + ", entry " + std::to_string(i + 1));
      return;
    }
    if (value.kind != Json::kObject)
      throw PromptError(name_ + ": expected a list of texts or objects, got " + summary(value));
    const auto column = pick(names_of(value), "");
    if (column && value.find(*column)->kind != Json::kObject) return add(value, name_ + ", entry 1");
    for (const auto& member : value.members)
      if (member.second.kind != value.members[0].second.kind ||
          (member.second.kind != Json::kText && member.second.kind != Json::kObject))
        throw PromptError(name_ +
                          ": expected an object by id with a text each, or an object each; write a list of "
                          "objects with \"prompt\"");
    for (const auto& [key, entry] : value.members) add(entry, name_ + ", entry " + shown(key));
  }

  // The list that an object holds; the value itself where it is none that holds a list.
  const Json& held(const Json& value) const {
    if (value.kind != Json::kObject) return value;
    std::vector<std::string> lists;
    for (const auto& [name, entry] : value.members)
      if (entry.kind == Json::kList) lists.push_back(name);
    if (std::find(lists.begin(), lists.end(), "prompts") != lists.end()) return *value.find("prompts");
    const auto column = pick(names_of(value), "");
    if (lists.size() != 1 || (column && *column != lists[0])) return value;
    return column || kHolders.contains(lists[0]) || value.members.size() == 1 ? *value.find(lists[0]) : value;
  }

  void add(const Json& value, const std::string& where) {
    if (value.kind == Json::kText) {
      found_.push_back({checked(value.text, where)});
      return;
    }
    if (value.kind != Json::kObject)
      throw PromptError(where + ": expected an object with a text under \"prompt\", got " + summary(value));
    if (!chosen_) {
      const Texts names = names_of(value);
      chosen_ = pick(names, where);
      if (!chosen_ && names.size() == 1 && !column_) chosen_ = names[0];
      if (!chosen_) throw no_column(names, where);
    }
    const Json* prompt = value.find(*chosen_);
    if (!prompt)
      throw PromptError(where + ": no field " + shown(*chosen_) +
                        ", which the first entry has; write the prompt there");
    const std::string field = where + ", field " + shown(*chosen_);
    if (prompt->kind != Json::kText)
      throw PromptError(field + ": expected a text, got " + summary(*prompt) +
                        "; write a prompt there, or take it out");
    const Json* seed = *chosen_ == "seed" ? nullptr : value.find("seed");
    found_.push_back({checked(prompt->text, field), seed ? seed_of(*seed, where) : std::nullopt});
  }

  // ---- columns ----

  static Texts names_of(const Json& object) {
    Texts names;
    for (const auto& member : object.members) names.push_back(member.first);
    return names;
  }

  // The column that is asked for, or the first that we know. Throws OptionError where only the case tells two apart.
  std::optional<std::string> pick(const Texts& names, const std::string& where) const {
    for (const std::string& wanted : column_ ? Texts{*column_} : kColumns) {
      if (std::find(names.begin(), names.end(), wanted) != names.end()) return wanted;
      Texts alike;
      for (const std::string& name : names)
        if (lowered(name) == lowered(wanted)) alike.push_back(name);
      if (alike.size() > 1 && !where.empty())
        throw OptionError(where + ": columns " + shown(alike[0]) + " and " + shown(alike[1]) +
                          "; name one with --prompt-column");
      if (!alike.empty()) return alike[0];
    }
    return std::nullopt;
  }

  OptionError no_column(const Texts& names, const std::string& where) const {
    Texts there;
    for (size_t i = 0; i < names.size() && i < 12; ++i) there.push_back(shown(names[i]));
    const std::string wanted = column_ ? shown(*column_) : "one of " + joined(kColumns);
    return OptionError(where + ": no column " + wanted + "; name one with --prompt-column of " +
                       (there.empty() ? "none" : joined(there)) + (names.size() > 12 ? ", ..." : ""));
  }

  const std::string name_, suffix_, text_;
  const std::optional<std::string> column_;
  std::optional<std::string> chosen_;  // by the first object
  std::vector<Listed> found_;
};

std::string suffix_of(const std::filesystem::path& path) {
  const std::string suffix = lowered(path.extension().string());
  return suffix == "." ? "" : suffix;
}

std::vector<Listed> of_folder(const std::string& place) {
  std::set<std::string> files;
  std::error_code error;
  for (std::filesystem::directory_iterator entry(place, error), end; !error && entry != end; entry.increment(error))
    if (suffix_of(entry->path()) == ".txt" && !entry->path().filename().string().starts_with('.'))
      files.insert(entry->path().string());
  if (error) throw OptionError("cannot read --prompts " + place + ": " + error.message());
  std::vector<Listed> found;
  for (const std::string& file : files) {
    std::error_code no_matter;
    if (std::filesystem::is_symlink(file, no_matter) && !std::filesystem::exists(file, no_matter))
      throw PromptError(file + " is a link to what is not there: mend it, or remove it");
    if (!std::filesystem::is_regular_file(file, no_matter)) continue;
    const std::string whole = list_text(file, file);
    const std::string_view text = trimmed(whole);
    const std::ptrdiff_t lines = std::count(text.begin(), text.end(), '\n') + 1;
    if (lines > kListLines)
      throw PromptError(file + " has " + std::to_string(lines) +
                        " lines: in a folder each file is one prompt; give a list as --prompts " + file);
    found.push_back({checked(text, file)});
  }
  if (found.empty())
    throw PromptError("--prompts " + place + " is a folder without .txt files: expected one for each prompt");
  return found;
}

}  // namespace

std::vector<Listed> read_prompts(const std::string& place, const std::optional<std::string>& column) {
  const bool input = place == "-";
  std::error_code no_matter;  // opening it says what is wrong
  if (!input && std::filesystem::is_directory(place, no_matter)) return of_folder(place);
  const std::string name = input ? "standard input" : place;
  const std::string suffix = input ? "" : suffix_of(place);
  std::vector<Listed> found = Reader(name, suffix, list_text(place, name), column).prompts();
  if (found.empty()) throw PromptError("--prompts " + name + " has no prompt: write one a line");
  return found;
}

}  // namespace flowfast
