"""The formats of low-bit weights and the shape of what they pack.

The rows are those of the C++ core's table (include/lowbit/format.h), read from it: not a copy.
"""

from collections.abc import Sequence
from typing import NamedTuple

from .library import _ops

_TILE_ROWS = 16
_INPUT_BLOCK = 32
_SCALE_BLOCK = 64  # bytes
_INTEGER, _TABLE, _FLOAT = range(3)  # lowbit::CodeKind
_GROUP, _GROUP_MINIMUM, _ROW, _NONE = range(4)  # lowbit::ScaleKind


class Format(NamedTuple):
    """One row of the table of formats (include/lowbit/format.h)."""

    number: int
    name: str
    bits: int
    code_kind: int
    scale_kind: int
    zero_point: int
    padding_code: int
    codebook: tuple[float, ...]

    @property
    def grouped(self) -> bool:
        return self.scale_kind in (_GROUP, _GROUP_MINIMUM)

    def code_bytes(self, inputs: int) -> int:
        """Bytes of the codes of 16 rows of `inputs` (a multiple of 32) elements."""
        return 2 * self.bits * inputs


def _read_formats() -> dict[str, Format]:
    rows = {}
    for number, line in enumerate(_ops.format_table().splitlines()):
        name, *numbers = line.split()
        rows[name] = Format(number, name, *map(int, numbers[:5]), tuple(map(float, numbers[5:])))
    return rows


FORMATS = _read_formats()
_BY_NUMBER = tuple(FORMATS.values())
FORMAT_ALIASES = {"fp8": "fp8_e5m2"}
FORMAT_NAMES = (*FORMATS, *FORMAT_ALIASES)
_GROUP_SIZES = (32, 64, 128, 256)
_DEFAULT_GROUP_SIZE = 64


def canonical_name(low_bit: str) -> str:
    """The name under which the format of `low_bit` is listed ("fp8" is "fp8_e5m2")."""
    name = FORMAT_ALIASES.get(low_bit, low_bit) if isinstance(low_bit, str) else low_bit
    if name not in FORMATS:
        raise ValueError(f"unknown low_bit {low_bit!r}; it is one of {', '.join(FORMAT_NAMES)}")
    return name


def default_group_size(low_bit: str, group_size: int = 0) -> int:
    """The group size that `group_size` means for `low_bit`: 0 is the default (64, or no groups)."""
    info = FORMATS[canonical_name(low_bit)]
    if not info.grouped:
        if group_size:
            kind = "one scale per row" if info.scale_kind == _ROW else "no scales"
            raise ValueError(
                f"{info.name} has {kind}, so group_size cannot be {group_size}; leave it out"
            )
        return 0
    size = group_size or _DEFAULT_GROUP_SIZE
    if size not in _GROUP_SIZES:
        raise ValueError(
            f"group_size must be one of {', '.join(map(str, _GROUP_SIZES))}, got {group_size}"
        )
    return size


class _Geometry(NamedTuple):
    """lowbit::Layout in Python, for fake kernels and the plain-torch path."""

    tiles: int
    inputs: int  # k, padded
    groups: int
    group_bytes: int
    tile_bytes: int


def _geometry(info: Format, n: int, k: int, group_size: int) -> _Geometry:
    tiles = (n + _TILE_ROWS - 1) // _TILE_ROWS
    inputs = (k + _INPUT_BLOCK - 1) // _INPUT_BLOCK * _INPUT_BLOCK
    codes = info.code_bytes(inputs)
    if not info.grouped:
        scales = _SCALE_BLOCK if info.scale_kind == _ROW else 0
        return _Geometry(tiles, inputs, 1, codes, codes + scales)
    groups = (k + group_size - 1) // group_size
    blocks = groups if info.scale_kind == _GROUP_MINIMUM else (groups + 1) // 2
    return _Geometry(
        tiles, inputs, groups, info.code_bytes(group_size), codes + _SCALE_BLOCK * blocks
    )


def packed_shape(shape: Sequence[int], low_bit: str, group_size: int = 0) -> tuple[int, int]:
    """Shape of the packed bytes of a tensor [..., n, k]."""
    info = FORMATS[canonical_name(low_bit)]
    return _packed_shape(shape, info, default_group_size(low_bit, group_size))


def _packed_shape(shape: Sequence[int], info: Format, group_size: int) -> tuple[int, int]:
    *stack, n, k = shape
    geometry = _geometry(info, n, k, group_size)
    matrices = 1
    for size in stack:
        matrices *= size
    return matrices * geometry.tiles, geometry.tile_bytes
