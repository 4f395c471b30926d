"""The packed formats, read and written by numpy from docs/formats.md alone.

Nothing here shares code or tables with the library: what the page says has to suffice to reproduce
the golden files byte by byte.
"""

import json
import re
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = ROOT / "tests" / "data" / "golden"
PAGE = (ROOT / "docs" / "formats.md").read_text(encoding="utf-8")
CASES = json.loads((GOLDEN / "index.json").read_text())

BITS = {
    "sym_int4": 4,
    "asym_int4": 4,
    "sym_int5": 5,
    "asym_int5": 5,
    "sym_int8": 8,
    "nf3": 3,
    "nf4": 4,
    "fp4": 4,
    "fp8_e4m3": 8,
    "fp8_e5m2": 8,
    "fp16": 16,
    "bf16": 16,
}
NUMBER = {name: number for number, name in enumerate(BITS)}
PADDING = dict(zip(BITS, [8, 0, 16, 0, 128, 3, 7, 0, 0, 0, 0, 0], strict=True))
ZERO = {"sym_int4": 8, "sym_int5": 16, "sym_int8": 128}
DIVISOR = {
    "sym_int4": 8,
    "asym_int4": 15,
    "sym_int5": 16,
    "asym_int5": 31,
    "sym_int8": 127,
    "nf3": 1,
    "nf4": 1,
    "fp4": 6,
    "fp8_e4m3": 448,
    "fp8_e5m2": 57344,
}
SIXTEEN = ("fp16", "bf16")
GROUPED = tuple(name for name in BITS if name not in SIXTEEN and not name.startswith("fp8"))


def codebook(title):
    """The list after `- TITLE:` on the page."""
    text = re.search(rf"- {title}: (.*?)(?:\n- |\n\n)", PAGE, re.S).group(1)
    return np.array([float(x) for x in re.findall(r"-?\d+(?:\.\d+)?", text)], dtype=np.float32)


NF4, NF3 = codebook("NF4"), codebook("NF3")
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=np.float32)
TABLES = {"nf3": NF3, "nf4": NF4, "fp4": np.concatenate([E2M1, -E2M1])}


def small_float(exponent_bits, mantissa_bits):
    """Values of all 256 codes of an 8-bit float."""
    code = np.arange(256)
    sign = np.where(code & 0x80, -1.0, 1.0)
    exponent = (code & 0x7F) >> mantissa_bits
    mantissa = code & ((1 << mantissa_bits) - 1)
    bias = (1 << (exponent_bits - 1)) - 1
    fraction = mantissa / (1 << mantissa_bits) + (exponent > 0)
    value = sign * fraction * 2.0 ** (np.maximum(exponent, 1) - bias)
    if exponent_bits == 4:
        value[[0x7F, 0xFF]] = np.nan
    else:
        top = exponent == 31
        value[top & (mantissa == 0)] = np.inf
        value[top & (mantissa != 0)] = np.nan
        value[0xFC] = -np.inf
    return value


FP8 = {"fp8_e4m3": small_float(4, 3), "fp8_e5m2": small_float(5, 2)}


class Tile:
    """Where the bits of one row tile lie: flat arrays of byte and bit per code bit."""

    def __init__(self, low_bit, k, group_size):
        self.low_bit, self.bits = low_bit, BITS[low_bit]
        self.padded = -(-k // 32) * 32
        self.group = group_size if low_bit in GROUPED else self.padded
        self.groups = -(-self.padded // self.group)
        self.codes_at, self.scales_at = [], []
        at = 64 if low_bit.startswith("fp8") else 0
        for g in range(self.groups):
            self.codes_at.append(at)
            at += 2 * self.bits * self.inputs(g)
            if low_bit.startswith("asym"):
                self.scales_at.append(at)
                at += 64
            elif low_bit in GROUPED and (g % 2 == 1 or g == self.groups - 1):
                self.scales_at += [at, at + 32] if g % 2 == 1 else [at]
                at += 64
        if low_bit.startswith("fp8"):
            self.scales_at = [0]
        self.bytes = at

    def inputs(self, g):
        return min(self.group, self.padded - g * self.group)

    def bit_positions(self, g):
        """[16, inputs, bits] positions, in bits from the tile's start, of every code bit."""
        inputs, base = self.inputs(g), self.codes_at[g]
        r = np.arange(16)[:, None, None]
        k = np.arange(inputs)[None, :, None]
        bit = np.arange(self.bits)[None, None, :]
        if self.bits == 16:
            byte = base + k // 2 * 64 + 4 * r + k % 2 * 2
            return byte * 8 + bit
        if self.bits == 8:
            return (base + k // 4 * 64 + 4 * r + k % 4) * 8 + bit
        low = {4: 4, 5: 4, 3: 2}[self.bits]
        share = 8 // low  # codes that share a byte, 4 inputs apart
        byte = base + k // (4 * share) * 64 + 4 * r + k % 4
        position = byte * 8 + k % (4 * share) // 4 * low + bit
        plane = (base + inputs // (4 * share) * 64 + k // 4 * 8) * 8 + 4 * r + k % 4
        return np.where(bit < low, position, plane)


def decode(packed, low_bit, n, k, group_size, exponent):
    """Exact weights as float64."""
    tile = Tile(low_bit, k, group_size)
    tiles = -(-n // 16)
    assert packed.size == tiles * tile.bytes
    out = np.zeros((tiles * 16, tile.padded))
    for t in range(tiles):
        raw = packed[t * tile.bytes : (t + 1) * tile.bytes]
        bits = np.unpackbits(raw, bitorder="little")
        for g in range(tile.groups):
            inputs = tile.inputs(g)
            weights = 1 << np.arange(tile.bits)
            codes = (bits[tile.bit_positions(g)].astype(np.int64) * weights).sum(-1)
            out[t * 16 : t * 16 + 16, g * tile.group : g * tile.group + inputs] = values(
                low_bit, codes, raw, tile, g
            )
    return np.ldexp(out[:n, :k], exponent)


def values(low_bit, codes, raw, tile, g):
    if low_bit == "fp16":
        return codes.astype(np.uint16).view(np.float16).astype(np.float64)
    if low_bit == "bf16":
        return (codes.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    at = tile.scales_at[g]
    if low_bit in FP8:
        return raw[:64].view("<f4").astype(np.float64)[:, None] * FP8[low_bit][codes]
    scale = raw[at : at + 32].view("<f2").astype(np.float64)[:, None]
    if low_bit in TABLES:
        return scale * TABLES[low_bit].astype(np.float64)[codes]
    if low_bit in ZERO:
        return scale * (codes - ZERO[low_bit])
    return scale * codes + raw[at + 32 : at + 64].view("<f2").astype(np.float64)[:, None]


def half(x):
    with np.errstate(over="ignore"):
        h = np.asarray(x, dtype=np.float32).astype(np.float16)
    return np.where(h == 0, np.float16(0), h)


def nearest(table, x):
    """Index of the nearest entry by float32 midpoints, ties to the even index."""
    table = table.astype(np.float32)
    middle = (table[:-1] + table[1:]) / np.float32(2)
    upper = np.arange(1, table.size)
    above = (x[..., None] > middle) | ((x[..., None] == middle) & (upper % 2 == 0))
    return above.sum(-1)


def statistics(low_bit, w):
    """What the scale is a fraction of, and the minimum, along the last axis."""
    top, low = w.max(-1), w.min(-1)
    if low_bit.startswith("asym"):
        with np.errstate(over="ignore"):
            return top - low, low
    return np.abs(w).max(-1), None


def groups_of(low_bit, w, group_size):
    step = group_size if low_bit in GROUPED else w.shape[1]
    return [w[:, i : i + step] for i in range(0, w.shape[1], step)]


def exponent_of(low_bit, w, group_size):
    absmax = np.abs(w).max()
    if low_bit in SIXTEEN:
        limit, top = (65520.0, 14) if low_bit == "fp16" else (float.fromhex("0x1.ffp127"), 126)
        return 0 if absmax < limit else int(np.floor(np.log2(np.float64(absmax)))) - top
    low = np.float32(2.0**-126 if low_bit in FP8 else 2.0**-14)
    high = np.float32(np.inf if low_bit in FP8 else 65520)
    fits, largest = True, 0.0
    for group in groups_of(low_bit, w, group_size):
        spread, minimum = statistics(low_bit, group)
        scale = spread / np.float32(DIVISOR[low_bit])
        fits &= bool(np.all((spread == 0) | ((scale >= low) & (scale < high))))
        spread = np.minimum(spread, np.finfo(np.float32).max).astype(np.float64)
        largest = max(largest, (spread / DIVISOR[low_bit]).max())
        if minimum is not None:
            m = np.abs(minimum)
            fits &= bool(np.all((m == 0) | ((m >= low) & (m < high))))
            largest = max(largest, float(m.max()))
    return 0 if fits else int(np.frexp(largest)[1]) - 1 - 14


def encode_float8(values_of_codes, x):
    """Nearest finite code, ties to the even code, saturating; no minus zero."""
    finite = values_of_codes[:128][np.isfinite(values_of_codes[:128])]
    magnitude = np.abs(x).astype(np.float64)
    middle = (finite[:-1] + finite[1:]) / 2
    upper = np.arange(1, finite.size)
    above = (magnitude[..., None] > middle) | ((magnitude[..., None] == middle) & (upper % 2 == 0))
    code = above.sum(-1)
    return np.where((x < 0) & (code != 0), code + 128, code)


def to_bfloat16(w):
    bits = w.view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.int64)


def codes_of(low_bit, w):
    """Codes, scales and minima of one group: w is [rows, inputs], float32."""
    if low_bit == "fp16":
        return w.astype(np.float16).view(np.uint16).astype(np.int64), None, None
    if low_bit == "bf16":
        return to_bfloat16(w), None, None
    top, low = w.max(-1), w.min(-1)
    spread, minimum = statistics(low_bit, w)
    divisor = np.float32(DIVISOR[low_bit])
    m = None
    if low_bit in ("sym_int4", "sym_int5"):
        s = half(np.where(top > -low, top, low) / -divisor)
    elif low_bit in FP8:
        s = spread / divisor
    else:
        s = half(spread / divisor)
        m = half(minimum) if minimum is not None else None
    wide = s.astype(np.float32)[:, None]
    shifted = w - m.astype(np.float32)[:, None] if m is not None else w
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        t = shifted / wide
    t = np.where(wide == 0, np.float32(0), t)
    if low_bit in ("nf3", "nf4"):
        codes = nearest(TABLES[low_bit], t)
    elif low_bit == "fp4":
        codes = nearest(E2M1, np.abs(t))
        codes = np.where((t < 0) & (codes != 0), codes + 8, codes)
    elif low_bit in FP8:
        codes = encode_float8(FP8[low_bit], t)
    elif low_bit == "sym_int8":
        codes = np.clip(np.rint(t), -127, 127).astype(np.int64) + 128
    elif low_bit in ZERO:
        zero = ZERO[low_bit]
        codes = np.clip(np.rint(t), -zero, zero - 1).astype(np.int64) + zero
    else:
        codes = np.clip(np.rint(t), 0, DIVISOR[low_bit]).astype(np.int64)
    return np.where(wide == 0, PADDING[low_bit], codes), s, m


def encode(w, low_bit, group_size):
    """Packed bytes and exponent of a float32 matrix."""
    n, k = w.shape
    exponent = exponent_of(low_bit, w, group_size)
    w = np.ldexp(w.astype(np.float64), -exponent).astype(np.float32)
    tile = Tile(low_bit, k, group_size)
    tiles = -(-n // 16)
    out = []
    for t in range(tiles):
        rows = w[t * 16 : t * 16 + 16]
        bits = np.zeros(tile.bytes * 8, dtype=np.uint8)
        raw = np.zeros(tile.bytes, dtype=np.uint8)
        for g in range(tile.groups):
            full = np.full((16, tile.inputs(g)), PADDING[low_bit], dtype=np.int64)
            part = rows[:, g * tile.group : g * tile.group + tile.inputs(g)]
            codes, s, m = codes_of(low_bit, part)
            full[: codes.shape[0], : codes.shape[1]] = codes
            position = tile.bit_positions(g)
            bits[position] = full[..., None] >> np.arange(tile.bits) & 1
            if s is not None:
                stored = np.zeros(16, dtype="<f4" if low_bit in FP8 else "<f2")
                stored[: s.size] = s
                at = tile.scales_at[g]
                raw[at : at + stored.nbytes] = stored.view(np.uint8)
            if m is not None:
                stored = np.zeros(16, dtype="<f2")
                stored[: m.size] = m
                raw[at + 32 : at + 64] = stored.view(np.uint8)
        out.append(np.packbits(bits, bitorder="little") | raw)
    return np.concatenate(out), exponent


def golden_weights(case):
    state, rows = case["seed"], []
    for _ in range(case["n"] * case["k"]):
        state = (1664525 * state + 1013904223) % 2**32
        rows.append((state >> 16) - 32768)
    rows[0] = 32767
    exact = np.ldexp(np.array(rows, dtype=np.float64), case["power"])
    w = exact.astype(np.float32)
    assert np.array_equal(w.astype(np.float64), exact)
    return w.reshape(case["n"], case["k"])


def golden_bytes(case):
    return np.fromfile(GOLDEN / case["file"], dtype=np.uint8)


case_ids = [case["file"].removesuffix(".bin") for case in CASES]
every_case = pytest.mark.parametrize("case", CASES, ids=case_ids)


def test_the_page_and_the_files_name_all_types():
    table = re.findall(r"^\| `(\w+)`.*? \| (\d+) \| (\d+) \|", PAGE, re.M)
    assert {name: int(bits) for name, _, bits in table} == BITS
    assert {name: int(number) for name, number, _ in table} == NUMBER
    assert {case["low_bit"] for case in CASES} == set(BITS)
    assert NF4.size == 16 and NF3.size == 8


@every_case
def test_numpy_packs_the_golden_bytes(case):
    packed, exponent = encode(golden_weights(case), case["low_bit"], case["group_size"])
    assert exponent == case["exponent"]
    golden = golden_bytes(case)
    assert packed.size == golden.size
    assert np.flatnonzero(packed != golden).size == 0


# Half of the widest distance between neighbouring values, relative to the largest magnitude of the
# group (symmetric integers clamp the far end by up to one step), plus the rounding of the scale.
HALF_STEP = {
    "sym_int4": 1 / 8,
    "asym_int4": 1 / 15,
    "sym_int5": 1 / 16,
    "asym_int5": 1 / 31,
    "sym_int8": 0.5 / 127,
    "nf3": 0.2325,
    "nf4": 0.152,
    "fp4": 1 / 6,
    "fp8_e4m3": 1 / 28,
    "fp8_e5m2": 1 / 14,
    "fp16": 2**-11,
    "bf16": 2**-8,
}


@every_case
def test_numpy_reads_the_golden_files(case):
    w = golden_weights(case).astype(np.float64)
    got = decode(
        golden_bytes(case),
        case["low_bit"],
        case["n"],
        case["k"],
        case["group_size"],
        case["exponent"],
    )
    groups = groups_of(case["low_bit"], w, case["group_size"])
    for group, decoded in zip(
        groups, groups_of(case["low_bit"], got, case["group_size"]), strict=True
    ):
        bound = np.abs(group).max(-1, keepdims=True) * (HALF_STEP[case["low_bit"]] + 2**-10)
        if case["low_bit"].startswith("asym"):
            spread = group.max(-1) - group.min(-1)
            bound = spread[:, None] * HALF_STEP[case["low_bit"]] / 2 + bound * 2**-6
        assert np.all(np.abs(decoded - group) <= bound)


@pytest.mark.parametrize("low_bit", BITS)
def test_one_flipped_bit_is_another_matrix(low_bit):
    """Every code bit of the golden tile matters to exactly one weight."""
    case = next(c for c in CASES if c["low_bit"] == low_bit)
    shape = case["n"], case["k"], case["group_size"], case["exponent"]
    packed = golden_bytes(case)
    before = decode(packed, low_bit, *shape)
    tile = Tile(low_bit, case["k"], case["group_size"])
    rng = np.random.default_rng(0)
    for _ in range(40):
        r, k = rng.integers(16), int(rng.integers(case["k"]))
        g, i = divmod(k, tile.group)
        position = tile.bit_positions(g)[r, i, 0]
        flipped = packed.copy()
        flipped[position // 8] ^= 1 << (position % 8)
        after = decode(flipped, low_bit, *shape)
        with np.errstate(invalid="ignore"):
            changed = np.argwhere((before != after) & ~(np.isnan(before) & np.isnan(after)))
        assert changed.tolist() in ([[r, k]], [])  # +0 and -0 are equal
