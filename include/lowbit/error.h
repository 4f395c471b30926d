// The one exception type of the library. Texts say who, what was expected, what came, what next.
#pragma once

#include <stdexcept>
#include <string>

namespace lowbit {

enum class ErrorCode {
  kValue,     // an argument has a value outside its documented range        -> ValueError
  kType,      // an argument has the wrong type or dtype                     -> TypeError
  kIo,        // the operating system refused an operation, a full disk too -> OSError
  kNotFound,  // a file or directory that must exist does not                -> FileNotFoundError
  kCorrupt,   // a file's bytes break a rule of its format                   -> ValueError
  kResource,  // memory or address space ran out                             -> MemoryError
};

// One lower-case word per code ("value", "type", ...), as the bindings pass it on.
const char* error_code_name(ErrorCode code) noexcept;

class Error : public std::runtime_error {
 public:
  Error(ErrorCode code, const std::string& text) : std::runtime_error(text), code_(code) {}
  ErrorCode code() const noexcept { return code_; }

 private:
  ErrorCode code_;
};

}  // namespace lowbit
