#include "io/json.h"

#include <algorithm>
#include <charconv>
#include <string>

#include "lowbit/error.h"

namespace lowbit::json {
namespace {

// Length of the UTF-8 sequence at `at`, 0 if it is not a shortest-form scalar value.
std::size_t utf8_length(std::string_view s, std::size_t at) {
  auto byte = [&](std::size_t i) -> unsigned {
    return at + i < s.size() ? static_cast<unsigned char>(s[at + i]) : 0u;
  };
  auto tail = [&](std::size_t i) { return (byte(i) & 0xC0) == 0x80; };
  unsigned b = byte(0);
  if (b < 0x80) return 1;
  if (b >= 0xC2 && b <= 0xDF) return tail(1) ? 2 : 0;
  if (b >= 0xE0 && b <= 0xEF) {
    if (!tail(1) || !tail(2)) return 0;
    if (b == 0xE0 && byte(1) < 0xA0) return 0;  // overlong
    if (b == 0xED && byte(1) > 0x9F) return 0;  // surrogate
    return 3;
  }
  if (b >= 0xF0 && b <= 0xF4) {
    if (!tail(1) || !tail(2) || !tail(3)) return 0;
    if (b == 0xF0 && byte(1) < 0x90) return 0;  // overlong
    if (b == 0xF4 && byte(1) > 0x8F) return 0;  // past U+10FFFF
    return 4;
  }
  return 0;
}

void append_utf8(std::string& out, std::uint32_t c) {
  auto put = [&](std::uint32_t v) { out.push_back(static_cast<char>(v)); };
  if (c < 0x80) {
    put(c);
  } else if (c < 0x800) {
    put(0xC0 | c >> 6), put(0x80 | (c & 0x3F));
  } else if (c < 0x10000) {
    put(0xE0 | c >> 12), put(0x80 | (c >> 6 & 0x3F)), put(0x80 | (c & 0x3F));
  } else {
    put(0xF0 | c >> 18), put(0x80 | (c >> 12 & 0x3F)), put(0x80 | (c >> 6 & 0x3F)),
        put(0x80 | (c & 0x3F));
  }
}

class Parser {
 public:
  Parser(std::string_view text, std::string_view who) : text_(text), who_(who) {}

  Value document() {
    Value value = parse_value(0);
    space();
    if (at_ != text_.size()) fail("bytes after the end of the JSON text");
    return value;
  }

 private:
  [[noreturn]] void fail(const std::string& what) const {
    throw Error(ErrorCode::kCorrupt, std::string(who_) + ": not valid JSON: " + what + " at byte " +
                                         std::to_string(at_) +
                                         "; is the file complete and undamaged?");
  }

  bool end() const { return at_ == text_.size(); }
  char peek() const { return end() ? '\0' : text_[at_]; }
  void space() {
    while (!end() && (peek() == ' ' || peek() == '\n' || peek() == '\r' || peek() == '\t')) ++at_;
  }
  bool take(char c) {
    if (end() || text_[at_] != c) return false;
    ++at_;
    return true;
  }

  Value parse_value(int depth) {
    if (depth > kMaxDepth) fail("more than " + std::to_string(kMaxDepth) + " nested values");
    if (++values_ > kMaxValues) fail("more than " + std::to_string(kMaxValues) + " values");
    space();
    if (end()) fail("the text ends where a value is expected");
    switch (peek()) {
      case '{':
        return parse_object(depth);
      case '[':
        return parse_array(depth);
      case '"':
        return parse_string();
      case 't':
        return word("true", true);
      case 'f':
        return word("false", false);
      case 'n':
        return word("null", nullptr);
      default:
        return parse_number();
    }
  }

  template <class T>
  Value word(std::string_view expected, T value) {
    if (text_.substr(at_, expected.size()) != expected) fail("unknown word");
    at_ += expected.size();
    return value;
  }

  Value parse_object(int depth) {
    Object object;
    ++at_;
    space();
    if (take('}')) return object;
    while (true) {
      space();
      if (peek() != '"' || end()) fail("a key is expected");
      std::string key = parse_string();
      space();
      if (!take(':')) fail("':' is expected");
      Value value = parse_value(depth + 1);
      object.emplace_back(std::move(key), std::move(value));
      space();
      if (take('}')) break;
      if (!take(',')) fail("',' or '}' is expected");
    }
    // Sorting views keeps this n log n for a header of a million entries.
    std::vector<std::string_view> keys;
    keys.reserve(object.size());
    for (const auto& item : object) keys.push_back(item.first);
    std::sort(keys.begin(), keys.end());
    auto twice = std::adjacent_find(keys.begin(), keys.end());
    if (twice != keys.end())
      fail("key " + quote(*twice) + " appears twice in the object that ends");
    return object;
  }

  Value parse_array(int depth) {
    Array array;
    ++at_;
    space();
    if (take(']')) return array;
    while (true) {
      array.push_back(parse_value(depth + 1));
      space();
      if (take(']')) return array;
      if (!take(',')) fail("',' or ']' is expected");
    }
  }

  std::uint32_t hex4() {
    std::uint32_t code = 0;
    if (text_.size() - at_ < 4) fail("an incomplete \\u escape");
    auto [ptr, error] = std::from_chars(text_.data() + at_, text_.data() + at_ + 4, code, 16);
    if (error != std::errc() || ptr != text_.data() + at_ + 4) fail("a bad \\u escape");
    at_ += 4;
    return code;
  }

  std::string parse_string() {
    ++at_;
    std::string out;
    while (true) {
      if (end()) fail("the text ends inside a string");
      unsigned char c = static_cast<unsigned char>(text_[at_]);
      if (c == '"') {
        ++at_;
        return out;
      }
      if (c < 0x20) fail("a control character inside a string");
      if (c != '\\') {
        std::size_t length = utf8_length(text_, at_);
        if (length == 0) fail("a string that is not UTF-8");
        out.append(text_, at_, length);
        at_ += length;
        continue;
      }
      ++at_;
      if (end()) fail("the text ends inside a string");
      switch (text_[at_++]) {
        case '"':
          out.push_back('"');
          break;
        case '\\':
          out.push_back('\\');
          break;
        case '/':
          out.push_back('/');
          break;
        case 'b':
          out.push_back('\b');
          break;
        case 'f':
          out.push_back('\f');
          break;
        case 'n':
          out.push_back('\n');
          break;
        case 'r':
          out.push_back('\r');
          break;
        case 't':
          out.push_back('\t');
          break;
        case 'u': {
          std::uint32_t code = hex4();
          if (code >= 0xD800 && code <= 0xDBFF) {
            if (!take('\\') || !take('u')) fail("half of a surrogate pair");
            std::uint32_t low = hex4();
            if (low < 0xDC00 || low > 0xDFFF) fail("half of a surrogate pair");
            code = 0x10000 + ((code - 0xD800) << 10) + (low - 0xDC00);
          } else if (code >= 0xDC00 && code <= 0xDFFF) {
            fail("half of a surrogate pair");
          }
          append_utf8(out, code);
          break;
        }
        default:
          fail("an unknown escape");
      }
    }
  }

  std::size_t digits() {
    std::size_t count = 0;
    while (!end() && peek() >= '0' && peek() <= '9') ++at_, ++count;
    return count;
  }

  Value parse_number() {
    std::size_t start = at_;
    take('-');
    bool zero = peek() == '0';
    std::size_t count = digits();
    if (count == 0) fail("a value is expected");
    if (zero && count > 1) fail("a number with a leading zero");
    bool integer = true;
    if (take('.')) {
      integer = false;
      if (digits() == 0) fail("a number that ends with '.'");
    }
    if (peek() == 'e' || peek() == 'E') {
      integer = false;
      ++at_;
      if (!take('+')) take('-');
      if (digits() == 0) fail("a number without its exponent");
    }
    const char* first = text_.data() + start;
    const char* last = text_.data() + at_;
    if (integer) {
      std::int64_t value = 0;
      if (std::from_chars(first, last, value).ec != std::errc()) fail("an integer beyond 64 bits");
      return value;
    }
    double value = 0;
    if (std::from_chars(first, last, value).ec != std::errc()) fail("a number out of range");
    return value;
  }

  std::string_view text_, who_;
  std::size_t at_ = 0;
  std::int64_t values_ = 0;
};

}  // namespace

const char* Value::kind() const {
  constexpr const char* kinds[] = {"null",     "a boolean", "an integer", "a number",
                                   "a string", "an array",  "an object"};
  return kinds[storage_.index()];
}

const Value* Value::find(std::string_view key) const {
  if (const Object* items = object())
    for (const auto& item : *items)
      if (item.first == key) return &item.second;
  return nullptr;
}

Value parse(std::string_view text, std::string_view who) {
  return Parser(text, who).document();
}

std::string dump(const Value& value) {
  if (value.null()) return "null";
  if (const bool* flag = value.boolean()) return *flag ? "true" : "false";
  if (const std::int64_t* integer = value.integer()) return std::to_string(*integer);
  if (const std::string* text = value.string()) return quote(*text);
  std::string out;
  if (const Array* array = value.array()) {
    for (const Value& item : *array) out += (out.empty() ? "[" : ", ") + dump(item);
    return out.empty() ? "[]" : out + "]";
  }
  if (const Object* object = value.object()) {
    std::vector<const Object::value_type*> items;
    for (const auto& item : *object) items.push_back(&item);
    // UTF-8 in byte order is code point order, which is how Python sorts.
    std::sort(items.begin(), items.end(), [](auto* a, auto* b) { return a->first < b->first; });
    for (const auto* item : items)
      out += (out.empty() ? "{" : ", ") + quote(item->first) + ": " + dump(item->second);
    return out.empty() ? "{}" : out + "}";
  }
  throw Error(ErrorCode::kValue, "a number with a fraction has no canonical text; use an integer");
}

std::vector<std::pair<std::string, std::string_view>> members(std::string_view text,
                                                              std::string_view who) {
  const Value value = parse(text, who);
  if (!value.object())
    throw Error(ErrorCode::kCorrupt,
                std::string(who) + ": expected an object, got " + value.kind());
  std::vector<std::pair<std::string, std::string_view>> found;
  // The text is valid: only strings and nesting matter for where a value ends.
  std::size_t at = text.find('{') + 1;
  auto skip_string = [&] {
    for (++at; text[at] != '"'; ++at)
      if (text[at] == '\\') ++at;
    ++at;
  };
  auto skip_space = [&] { at = text.find_first_not_of(" \t\r\n", at); };
  for (const auto& item : *value.object()) {
    at = text.find('"', at);
    skip_string();  // the key
    at = text.find(':', at) + 1;
    skip_space();
    const std::size_t start = at;
    for (int depth = 0; depth > 0 || (text[at] != ',' && text[at] != '}');) {
      if (text[at] == '"') {
        skip_string();
        continue;
      }
      if (text[at] == '{' || text[at] == '[') ++depth;
      if (text[at] == '}' || text[at] == ']') --depth;
      ++at;
    }
    std::size_t end = text.find_last_not_of(" \t\r\n", at - 1) + 1;
    found.emplace_back(item.first, text.substr(start, end - start));
    ++at;
  }
  return found;
}

std::string quote(std::string_view text) {
  std::string out = "\"";
  for (char c : text) {
    unsigned char b = static_cast<unsigned char>(c);
    constexpr std::string_view named = "\"\\\b\f\n\r\t", letters = "\"\\bfnrt";
    if (std::size_t i = named.find(c); i != named.npos) {
      out.push_back('\\');
      out.push_back(letters[i]);
    } else if (b < 0x20) {
      constexpr char hex[] = "0123456789abcdef";
      out += "\\u00";
      out.push_back(hex[b >> 4]);
      out.push_back(hex[b & 15]);
    } else {
      out.push_back(c);
    }
  }
  return out + "\"";
}

bool valid_utf8(std::string_view text) {
  for (std::size_t at = 0; at < text.size();) {
    std::size_t length = utf8_length(text, at);
    if (length == 0) return false;
    at += length;
  }
  return true;
}

}  // namespace lowbit::json
