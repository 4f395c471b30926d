"""Writes the measurements of bench/gpu.py into docs/: its tables, and a plot of the speed-ups.

    python bench/gpu_record.py build-gpu.json

The tables replace what stands between two markers in docs/performance.md; the plot becomes
docs/gpu.svg.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
COLOURS = {
    "sym_int4": "#0b6e4f",
    "asym_int5": "#7a9e7e",
    "sym_int8": "#30638e",
    "nf4": "#a63d40",
    "nf3": "#e08d3c",
    "fp8_e4m3": "#6b4e9b",
}


def tables(results: dict) -> str:
    """Microseconds and, in brackets, the speed-up over bf16 cuBLAS: one table per shape."""
    lines = []
    rows = results["rows"]
    for n, k in dict.fromkeys((r["n"], r["k"]) for r in rows):
        here = [r for r in rows if (r["n"], r["k"]) == (n, k)]
        tokens = list(dict.fromkeys(r["m"] for r in here))
        lines += [
            f"\n### {n} x {k}\n",
            "| type | floor | " + " | ".join(f"M = {m}" for m in tokens) + " |",
        ]
        lines.append("|---" * (len(tokens) + 2) + "|")
        for name in dict.fromkeys(r["format"] for r in here):
            cells = {r["m"]: r for r in here if r["format"] == name}
            floor = next(iter(cells.values()))["floor"]
            text = " | ".join(
                f"{cells[m]['microseconds']:.1f} "
                f"({cells[m]['cublas'] / cells[m]['microseconds']:.2f})"
                if m in cells
                else ""
                for m in tokens
            )
            lines.append(f"| {name} | {floor:.1f} | {text} |")
    return "\n".join(lines).lstrip()


def plot(results: dict) -> str:
    """Speed-up over bf16 cuBLAS against the number of tokens, a panel per shape."""
    rows = results["rows"]
    shapes = list(dict.fromkeys((r["n"], r["k"]) for r in rows))
    tokens = sorted({r["m"] for r in rows})
    most = math.ceil(max(r["cublas"] / r["microseconds"] for r in rows))
    wide, high, left, top = 300, 210, 36, 40
    across = 3
    width = across * wide + 10
    height = top + math.ceil(len(shapes) / across) * high + 30
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        'font-family="sans-serif" font-size="11">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        f'<text x="{left}" y="18" font-size="13">{results["device"]}: times as fast as bf16 '
        "cuBLAS, over the number of tokens</text>",
    ]
    for i, name in enumerate(COLOURS):
        out.append(
            f'<text x="{left + 110 * i}" y="{height - 10}" fill="{COLOURS[name]}">{name}</text>'
        )
    for index, (n, k) in enumerate(shapes):
        x0, y0 = index % across * wide + left, top + index // across * high
        plane_w, plane_h = wide - left - 10, high - 50

        def at(m: int, speed: float, x0=x0, y0=y0, w=plane_w, h=plane_h) -> str:
            x = x0 + math.log2(m / tokens[0]) / math.log2(tokens[-1] / tokens[0]) * w
            return f"{x:.1f},{y0 + h + 10 - speed / most * h:.1f}"

        out.append(f'<text x="{x0}" y="{y0 + 4}">{n} x {k}</text>')
        for speed in range(most + 1):
            start, end = at(tokens[0], speed), at(tokens[-1], speed)
            x, y = start.split(",")
            shade = "#888" if speed == 1 else "#ddd"
            out.append(f'<polyline points="{start} {end}" fill="none" stroke="{shade}"/>')
            out.append(
                f'<text x="{float(x) - 6}" y="{float(y) + 4}" text-anchor="end">{speed}</text>'
            )
        for m in tokens[::2]:
            x, y = at(m, 0).split(",")
            out.append(f'<text x="{x}" y="{float(y) + 14}" text-anchor="middle">{m}</text>')
        for name, colour in COLOURS.items():
            points = [
                at(r["m"], r["cublas"] / r["microseconds"])
                for r in rows
                if (r["n"], r["k"], r["format"]) == (n, k, name)
            ]
            out.append(
                f'<polyline points="{" ".join(points)}" fill="none" stroke="{colour}" '
                f'stroke-width="1.5"><title>{name}</title></polyline>'
            )
    return "\n".join([*out, "</svg>", ""])


def write(results: dict) -> None:
    """Both into docs/."""
    page = ROOT / "docs" / "performance.md"
    begin, end = "<!-- gpu measurements -->", "<!-- end of gpu measurements -->"
    head, rest = page.read_text().split(begin, 1)
    facts = (
        f"{results['device']}, torch {results['torch']}, {results['date']}, copy "
        f"{results['copy_bandwidth'] / 1e9:.0f} GB/s (bytes read and written)."
    )
    middle = f"\n\n{facts}\n\n![Speed-ups over bf16 cuBLAS](gpu.svg)\n\n{tables(results)}\n\n"
    page.write_text(head + begin + middle + end + rest.split(end, 1)[1])
    (ROOT / "docs" / "gpu.svg").write_text(plot(results))


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    write(json.loads(Path(sys.argv[1]).read_text()))
