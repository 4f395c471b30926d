// A strict JSON reader for files that strangers wrote: RFC 8259 and nothing more, UTF-8 checked,
// duplicate keys refused, depth capped, integers exact or refused. (Why not nlohmann-json:
// docs/decisions.md.)
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>
#include <variant>
#include <vector>

namespace lowbit::json {

class Value;
using Array = std::vector<Value>;
using Object = std::vector<std::pair<std::string, Value>>;  // in file order, keys distinct

class Value {
 public:
  using Storage =
      std::variant<std::nullptr_t, bool, std::int64_t, double, std::string, Array, Object>;
  Value() : storage_(nullptr) {}
  template <class T>
  requires(!std::is_same_v<std::decay_t<T>, Value>) Value(T&& value)
      : storage_(std::forward<T>(value)) {}

  const bool* boolean() const { return std::get_if<bool>(&storage_); }
  const std::int64_t* integer() const { return std::get_if<std::int64_t>(&storage_); }
  const std::string* string() const { return std::get_if<std::string>(&storage_); }
  const Array* array() const { return std::get_if<Array>(&storage_); }
  const Object* object() const { return std::get_if<Object>(&storage_); }
  const double* number() const { return std::get_if<double>(&storage_); }
  bool null() const { return std::holds_alternative<std::nullptr_t>(storage_); }
  const char* kind() const;                       // "an integer", "a string", ... for error texts
  const Value* find(std::string_view key) const;  // of an object; nullptr otherwise

 private:
  Storage storage_;
};

// 64 nested arrays and objects are more than any file of ours or of the formats we read has; the
// parser recurses, so this also bounds its stack.
inline constexpr int kMaxDepth = 64;
// A value takes 40 bytes here and as few as two in the text: without this cap a 100 MB header could
// ask for 2 GB. A million tensors of rank 4 need 9 million values.
inline constexpr std::int64_t kMaxValues = 10'000'000;

// Throws Error(kCorrupt) whose text is "<who>: <what> at byte <offset>".
Value parse(std::string_view text, std::string_view who);

// The one canonical text of a value: keys sorted, ", " and ": " between, as Python's
// json.dumps(value, sort_keys=True, ensure_ascii=False) writes it. No fractions: their text is not
// canonical; Error(kValue).
std::string dump(const Value& value);

// The members of the object that `text` holds, each value as it is written there. Throws as
// parse().
std::vector<std::pair<std::string, std::string_view>> members(std::string_view text,
                                                              std::string_view who);

// `text` as a JSON string with its quotes; the text must be valid UTF-8.
std::string quote(std::string_view text);

bool valid_utf8(std::string_view text);

}  // namespace lowbit::json
