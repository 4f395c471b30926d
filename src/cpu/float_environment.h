// Quantizing gives the same bytes whatever the host program did to the floating-point mode.
#pragma once

#include <cstdint>

#if defined(__SSE2__)
#include <xmmintrin.h>
#endif

namespace lowbit::cpu {

// While it lives, this thread rounds to nearest and keeps subnormals (hosts that link fast-math
// code, and torch.set_flush_denormal, switch them off).
class FloatEnvironment {
 public:
  FloatEnvironment() : saved_(get()) { set(kDefault); }
  ~FloatEnvironment() { set(saved_); }
  FloatEnvironment(const FloatEnvironment&) = delete;
  FloatEnvironment& operator=(const FloatEnvironment&) = delete;

 private:
#if defined(__SSE2__)
  using Word = unsigned;
  static constexpr Word kDefault = 0x1f80;  // all exceptions masked, nothing else
  static Word get() {
    return _mm_getcsr();
  }
  static void set(Word word) {
    _mm_setcsr(word);
  }
#elif defined(__aarch64__)
  using Word = std::uint64_t;
  static constexpr Word kDefault = 0;
  static Word get() {
    Word word;
    __asm__ volatile("mrs %0, fpcr" : "=r"(word));
    return word;
  }
  static void set(Word word) {
    __asm__ volatile("msr fpcr, %0" : : "r"(word));
  }
#else
  using Word = int;
  static constexpr Word kDefault = 0;
  static Word get() {
    return 0;
  }
  static void set(Word) {}
#endif

  Word saved_;
};

}  // namespace lowbit::cpu
