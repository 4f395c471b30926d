"""The formats of low-bit weights and the shape of what they pack.

The rows are those of the C++ core's table (include/lowbit/format.h), read from it: not a copy.
"""

from collections.abc import Sequence
from typing import NamedTuple

from .library import operators

TILE_ROWS = 16
_INPUT_BLOCK = 32  # inputs are padded to a multiple of it
SCALE_BLOCK = 64  # bytes
INTEGER_CODE, TABLE_CODE, FLOAT_CODE = range(3)  # lowbit::CodeKind
GROUP_SCALE, GROUP_SCALE_AND_MINIMUM, ROW_SCALE, NO_SCALE = range(4)  # lowbit::ScaleKind
_SCALES = {
    GROUP_SCALE: "one scale per group",
    GROUP_SCALE_AND_MINIMUM: "one scale and minimum per group",
    ROW_SCALE: "one scale per row",
    NO_SCALE: "no scales",
}


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
        return self.scale_kind in (GROUP_SCALE, GROUP_SCALE_AND_MINIMUM)

    @property
    def scales(self) -> str:
        """How it is scaled, in words."""
        return _SCALES[self.scale_kind]

    def code_bytes(self, inputs: int) -> int:
        """Bytes of the codes of 16 rows of `inputs` (a multiple of 32) elements."""
        return 2 * self.bits * inputs


def _read_formats() -> dict[str, Format]:
    rows = {}
    for number, line in enumerate(operators.format_table().splitlines()):
        name, *numbers = line.split()
        rows[name] = Format(number, name, *map(int, numbers[:5]), tuple(map(float, numbers[5:])))
    return rows


FORMATS = _read_formats()
BY_NUMBER = tuple(FORMATS.values())  # as operators number them
FORMAT_ALIASES = {"fp8": "fp8_e5m2"}
FORMAT_NAMES = (*FORMATS, *FORMAT_ALIASES)
GROUP_SIZES = (32, 64, 128, 256)
DEFAULT_GROUP_SIZE = 64


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
            raise ValueError(
                f"{info.name} has {info.scales}, so group_size cannot be {group_size}; leave it out"
            )
        return 0
    size = group_size or DEFAULT_GROUP_SIZE
    if size not in GROUP_SIZES:
        raise ValueError(
            f"group_size must be one of {', '.join(map(str, GROUP_SIZES))}, got {group_size}"
        )
    return size


class Geometry(NamedTuple):
    """lowbit::Layout in Python, for fake kernels and the plain-torch path."""

    tiles: int
    inputs: int  # k, padded
    groups: int
    group_bytes: int
    tile_bytes: int


def geometry_of(info: Format, n: int, k: int, group_size: int) -> Geometry:
    """How a matrix [n, k] is packed; `group_size` is one that default_group_size has returned."""
    tiles = (n + TILE_ROWS - 1) // TILE_ROWS
    inputs = (k + _INPUT_BLOCK - 1) // _INPUT_BLOCK * _INPUT_BLOCK
    codes = info.code_bytes(inputs)
    if not info.grouped:
        scales = SCALE_BLOCK if info.scale_kind == ROW_SCALE else 0
        return Geometry(tiles, inputs, 1, codes, codes + scales)
    groups = (k + group_size - 1) // group_size
    blocks = groups if info.scale_kind == GROUP_SCALE_AND_MINIMUM else (groups + 1) // 2
    return Geometry(
        tiles, inputs, groups, info.code_bytes(group_size), codes + SCALE_BLOCK * blocks
    )


def packed_shape(shape: Sequence[int], low_bit: str, group_size: int = 0) -> tuple[int, int]:
    """Shape of the packed bytes of a tensor [..., n, k]."""
    info = FORMATS[canonical_name(low_bit)]
    return tiles_shape(shape, info, default_group_size(low_bit, group_size))


def tiles_shape(shape: Sequence[int], info: Format, group_size: int) -> tuple[int, int]:
    """packed_shape(), [tiles, tile_bytes], of a group size that default_group_size has returned."""
    *stack, n, k = shape
    geometry = geometry_of(info, n, k, group_size)
    matrices = 1
    for size in stack:
        matrices *= size
    return matrices * geometry.tiles, geometry.tile_bytes
