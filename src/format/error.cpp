#include "lowbit/error.h"

namespace lowbit {

const char* error_code_name(ErrorCode code) noexcept {
  switch (code) {
    case ErrorCode::kValue:
      return "value";
    case ErrorCode::kType:
      return "type";
    case ErrorCode::kIo:
      return "io";
    case ErrorCode::kNotFound:
      return "not_found";
    case ErrorCode::kCorrupt:
      return "corrupt";
    case ErrorCode::kResource:
      return "resource";
  }
  return "value";  // a number cast from outside the enum: the caller's value is what is wrong
}

}  // namespace lowbit
