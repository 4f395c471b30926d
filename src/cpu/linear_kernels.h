// What an instruction-set folder exports for the linear operator: one selection function that
// answers with a Path. Plain structs only: these headers are included by code compiled with -m
// flags, and an inline function here could be kept by the linker for every machine.
#pragma once

#include <cstddef>
#include <cstdint>

#include "lowbit/format.h"
#include "lowbit/linear.h"
#include "lowbit/quantize.h"

namespace lowbit::cpu {

// The activations of a call as the user holds them.
struct Tokens {
  const void* x;  // [m, k], inner stride 1
  DType dtype;
  std::int64_t stride;  // elements between tokens
  std::int64_t m, k;
};

// One packed matrix and where its outputs go. Several may share one set of activations.
struct RowBlock {
  const std::byte* packed;  // layout.bytes(), 64-byte aligned
  Layout layout;
  int exponent;
  const void* bias;  // [n] or nullptr
  DType bias_dtype;
  void* out;  // [m, n], inner stride 1
  DType out_dtype;
  std::int64_t out_stride;
};

// How a Path sees activations after preparation: opaque bytes plus the sizes that formed them.
struct Activations {
  std::byte* data;  // activation_bytes(), 64-byte aligned
  std::int64_t m;   // tokens held
  std::int64_t k, k_padded, groups;
  int group;  // inputs per group; k_padded where the format has no groups
};

// One way to compute out = x W^T + bias. All members are plain functions, so that a Path is data.
struct Path {
  const char* name;  // e.g. "avx512vnni.int8x2.decode.sym_int4"
  // Prepared activations of two row blocks are interchangeable if `activations` and the group size
  // are equal.
  const char* activations;
  std::int64_t (*activation_bytes)(const Activations& a);
  // Prepares tokens [begin, end) of a; begin is a multiple of token_block.
  void (*prepare)(const Tokens& tokens, const Activations& a, std::int64_t begin, std::int64_t end);
  // Working memory of one thread. Its first 64 bytes are zero before a thread's first run of a call
  // of linear_multi.
  std::int64_t (*scratch_bytes)(const RowBlock& rows, const Activations& a);
  // Outputs of row tiles [tile_begin, tile_end) for tokens [token_begin, token_end); token_begin
  // is a multiple of token_block and tile_begin of tile_block. a holds the tokens from
  // `first_token` of the call on: token t of a is row first_token + t of out. The thread will go
  // on with next_tile of the same matrix (-1: nothing known), which is worth prefetching.
  void (*run)(const RowBlock& rows, const Activations& a, std::int64_t first_token,
              std::int64_t tile_begin, std::int64_t tile_end, std::int64_t token_begin,
              std::int64_t token_end, std::int64_t next_tile, std::byte* scratch);
  int tile_block;       // row tiles that are computed together
  int token_block;      // tokens that are computed together
  bool panel;           // expands weights into scratch first: worth splitting over tokens too
  int most_blocks = 4;  // panels only: blocks of tiles that gain from one thread computing them
};

using SelectFn = const Path* (*)(const Layout& layout, Precision precision, std::int64_t m);

// nullptr where the level has no kernel of its own; the scalar one always answers.
const Path* select_linear_scalar(const Layout& layout, Precision precision, std::int64_t m);
const Path* select_linear_avx2(const Layout& layout, Precision precision, std::int64_t m);
const Path* select_linear_avxvnni(const Layout& layout, Precision precision, std::int64_t m);
const Path* select_linear_avx512vnni(const Layout& layout, Precision precision, std::int64_t m);
const Path* select_linear_avx512bf16(const Layout& layout, Precision precision, std::int64_t m);
const Path* select_linear_amx(const Layout& layout, Precision precision, std::int64_t m);
const Path* select_linear_neon(const Layout& layout, Precision precision, std::int64_t m);
const Path* select_linear_neondot(const Layout& layout, Precision precision, std::int64_t m);

}  // namespace lowbit::cpu
