#include "fused/check.h"

#include <algorithm>

#include "fused/attention.h"

namespace lowbit::fused {

void check(const BlockSpec& block, const BlockCall& call) {
  const AttentionSpec& a = block.attention;
  const auto inputs = [](const std::vector<PackedMatrix>& matrices, std::int64_t k) {
    return std::all_of(matrices.begin(), matrices.end(),
                       [k](const PackedMatrix& m) { return m.layout.k == k; });
  };
  if (a.heads > 0) {
    require(a.kv_heads > 0 && a.heads % a.kv_heads == 0,
            "the number of heads must be a multiple of that of key/value heads");
    require(a.heads / a.kv_heads <= kTaskRows * 8, "at most 192 query heads per key/value head");
    require(!a.in.empty() && inputs(a.in, call.hidden), "x must have the projections' inputs");
    require(a.out.layout.k == std::int64_t{a.heads} * a.values() && a.out.layout.n == call.hidden,
            "the output projection must be [hidden, heads * value size]");
    require(a.gate_width == 0 || a.gate_width == 1 || a.gate_width == a.values(),
            "a head has one gate, or one for each channel");
    require(a.low_rank.width == 0 || a.low_rank.expand.layout.k == a.low_rank.width,
            "low-rank queries must have the inputs of their product");
    const LatentSpec& latent = a.latent;
    require(latent.width == 0 ||
                (latent.expand.layout.k == latent.width && !a.cross && a.kv_heads == a.heads &&
                 latent.expand.layout.n == a.heads * latent.head_rows && latent.tail > 0 &&
                 latent.tail <= a.head_dim && a.gate_width <= 1),
            "a latent attention has keys and values for every head, and one gate at most");
    require(a.rope.kind != RopeKind::kPairsToHalves || a.rope.width <= 256,
            "at most 256 values that turn change places");
    require(a.rope.kind == RopeKind::kNone ||
                (a.rope.width % 2 == 0 && a.rope.begin + a.rope.width <= a.head_dim &&
                 call.cos != nullptr && call.sin != nullptr),
            "a rotation needs its tables and an even part of a head");
  }
  if (block.mlp.width > 0) {
    require(!block.mlp.in.empty() && inputs(block.mlp.in, call.hidden),
            "x must have the inputs of the MLP's first products");
    require(block.mlp.down.layout.k == block.mlp.width && block.mlp.down.layout.n == call.hidden,
            "the MLP's last product must be [hidden, width]");
  }
}

}  // namespace lowbit::fused
