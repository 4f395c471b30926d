// XXH3-128 from the xxHash library, used header-only so that a build needs no linking to it.
#define XXH_INLINE_ALL
#include <xxhash.h>

#include <bit>
#include <charconv>
#include <cstring>
#include <new>

#include "lowbit/error.h"
#include "lowbit/file.h"

namespace lowbit {
namespace {

// XXH128_hash_t has the same value on every machine; only its bytes in memory would differ.
Digest from_xxh(XXH128_hash_t hash) {
  return {hash.high64, hash.low64};
}

}  // namespace

struct Hasher::State {
  XXH3_state_t* xxh = XXH3_createState();
  ~State() { XXH3_freeState(xxh); }
};

Hasher::Hasher() : state_(std::make_unique<State>()) {
  if (!state_->xxh) throw std::bad_alloc();
  XXH3_128bits_reset(state_->xxh);
}
Hasher::~Hasher() = default;
Hasher::Hasher(Hasher&&) noexcept = default;
Hasher& Hasher::operator=(Hasher&&) noexcept = default;

void Hasher::update(std::span<const std::byte> bytes) {
  XXH3_128bits_update(state_->xxh, bytes.data(), bytes.size());
}

Digest Hasher::finish() const {
  return from_xxh(XXH3_128bits_digest(state_->xxh));
}

Digest digest(std::span<const std::byte> bytes) {
  return from_xxh(XXH3_128bits(bytes.data(), bytes.size()));
}

std::string digest_text(const Digest& digest) {
  constexpr char hex[] = "0123456789abcdef";
  std::string text;
  for (std::uint64_t half : {digest.high, digest.low})
    for (int shift = 60; shift >= 0; shift -= 4) text.push_back(hex[half >> shift & 15]);
  return text;
}

std::optional<Digest> parse_digest(std::string_view text) {
  if (text.size() != 32) return std::nullopt;
  Digest digest;
  for (std::size_t i = 0; i < 32; ++i) {
    char c = text[i];
    std::uint64_t value;
    if (c >= '0' && c <= '9') {
      value = static_cast<std::uint64_t>(c - '0');
    } else if (c >= 'a' && c <= 'f') {
      value = static_cast<std::uint64_t>(c - 'a' + 10);
    } else {
      return std::nullopt;
    }
    std::uint64_t& half = i < 16 ? digest.high : digest.low;
    half = half << 4 | value;
  }
  return digest;
}

}  // namespace lowbit
