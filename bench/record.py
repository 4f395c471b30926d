"""Writes measurements of bench/run.py into docs/: a table per part, and a roofline plot.

    .venv/bin/python bench/record.py .cache/bench-<time>.json

A table replaces what stands between its two markers in docs/performance.md (appended if there are
none); the plot becomes docs/roofline.svg. Percentages are medians of ratios taken round by round.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parent.parent
COLOURS = {"int8": "#0b6e4f", "bf16": "#a63d40", "fp32": "#30638e"}


def machine(record: dict, part: str) -> str:
    """One line above a table: how it was measured, on what and with what."""
    return (
        f"`.venv/bin/python bench/run.py --part {part}`: {record['processor']}, "
        f"{record['threads']} threads, level `{record['isa']}`, torch {record['torch']}, "
        f"{record['time'][:10]}, commit {record['commit']}."
    )


def core(record: dict) -> str:
    """One row per format and precision; a column per number of tokens, shapes as their median."""
    records = [r for r in record["core"] if not r.get("wrong")]
    tokens = sorted({r["m"] for r in records})
    shapes = sorted({(r["n"], r["k"]) for r in records})
    peaks = {
        kind: median([r["peak"] for r in records if r["peak_of"] == kind]) / 1e9
        for kind in sorted({r["peak_of"] for r in records})
    }
    lines = [
        machine(record, "core"),
        f"Read bandwidth {median([r['read_bandwidth'] for r in records]) / 1e9:.1f} GB/s; peaks "
        + ", ".join(f"{kind} {value:.0f} G/s" for kind, value in peaks.items())
        + " (multiply and add count two).",
        "",
        "Outputs x inputs: "
        + ", ".join(f"{n}x{k}" for n, k in shapes)
        + ". Each cell is the median over the shapes: percent of the read bandwidth (b) or of the "
        "instruction peak (p), whichever is closer to its limit, and weights in GB/s or G op/s.",
        "",
        "| format | precision | " + " | ".join(f"M = {m}" for m in tokens) + " |",
        "|---|---|" + "---|" * len(tokens),
    ]
    for name, precision in dict.fromkeys((r["format"], r["precision"]) for r in records):
        cells = []
        for m in tokens:
            rows = [
                r for r in records if (r["format"], r["precision"], r["m"]) == (name, precision, m)
            ]
            if not rows:
                cells.append("")
                continue
            bandwidth = 100 * median([r["bandwidth_ratio"] for r in rows])
            peak = 100 * median([r["peak_ratio"] for r in rows])
            if bandwidth >= peak:
                speed = median([r["weight_bytes"] / r["seconds"] for r in rows]) / 1e9
                cells.append(f"{bandwidth:.0f} % b, {speed:.1f}")
            else:
                speed = median([r["operations"] / r["seconds"] for r in rows]) / 1e9
                cells.append(f"{peak:.0f} % p, {speed:.0f}")
        lines.append(f"| `{name}` | {precision} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def ops(record: dict) -> str:
    """One row per format; a column per number of tokens, shapes as their median."""
    records = [r for r in record["ops"] if "speedup" in r]
    tokens = sorted({r["m"] for r in records})
    shapes = sorted({(r["n"], r["k"]) for r in records})
    lines = [
        machine(record, "ops"),
        "",
        "`torch.ops.lowbit.linear` at precision `auto` against torch's bf16 `F.linear`, "
        + ", ".join(f"{n}x{k}" for n, k in shapes)
        + ", call by call in turn: how many times as fast.",
        "",
        "| type | " + " | ".join(f"M = {m}" for m in tokens) + " |",
        "|---|" + "---|" * len(tokens),
    ]
    for name in dict.fromkeys(r["format"] for r in records):
        cells = []
        for m in tokens:
            values = [r["speedup"] for r in records if (r["format"], r["m"]) == (name, m)]
            cells.append(f"{median(values):.2f}" if values else "")
        lines.append(f"| `{name}` | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def model(record: dict) -> str:
    lines = [
        machine(record, "model"),
        "",
        "SmolLM2-135M, tokens per second after the first, contenders in turn.",
        "",
        "| | tokens/s | of torch bf16 |",
        "|---|---|---|",
    ]
    for row in record["model"]:
        lines.append(f"| {row['format']} | {row['tokens_per_second']:.0f} | {row['speedup']:.2f} |")
    return "\n".join(lines)


def peers(record: dict) -> str:
    lines = [
        machine(record, "peers"),
        "",
        "| | prompt, tok/s | ours / it | decode, tok/s | ours / it | unfused / it | peak RSS, MiB "
        "| quantize, s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    missing = []
    for row in record["peers"]:
        if row["unavailable"]:
            missing.append(f"{row['title']}: {row['unavailable']}.")
            continue
        ratios = [
            row["prompt_ratios"].get("fused"),
            row["decode_ratios"].get("fused"),
            row["decode_ratios"].get("unfused"),
        ]
        prompt, decode, unfused = (f"{median(r):.2f}" if r else "" for r in ratios)
        quantize = row["quantize_seconds"]
        quantize = "" if quantize is None else f"{quantize:.1f}"
        low, high = min(row["prompts"]), max(row["prompts"])
        prompts = f"{median(row['prompts']):.0f} ({low:.0f}-{high:.0f})"
        low, high = min(row["decodes"]), max(row["decodes"])
        decodes = f"{median(row['decodes']):.1f} ({low:.1f}-{high:.1f})"
        lines.append(
            f"| {row['title']} | {prompts} | {prompt} | {decodes} | {decode} | {unfused} "
            f"| {row['peak_resident_mib']:.0f} | {quantize} |"
        )
    versions = {name: v for row in record["peers"] for name, v in row["versions"].items()}
    lines += ["", ", ".join(f"{name} {v}" for name, v in sorted(versions.items())) + "."]
    return "\n".join([*lines, *missing])


def roofline(record: dict) -> str:
    """Operations per second over operations per byte of weights, both logarithmic."""
    records = [r for r in record["core"] if not r.get("wrong")]
    width, height, left, bottom = 760, 460, 70, 50
    points = [
        (r["operations"] / r["weight_bytes"], r["operations"] / r["seconds"] / 1e9, r)
        for r in records
    ]
    bandwidth = median([r["read_bandwidth"] for r in records]) / 1e9
    peaks = {
        kind: median([r["peak"] for r in records if r["peak_of"] == kind]) / 1e9
        for kind in sorted({r["peak_of"] for r in records})
    }
    x0, x1 = (
        math.log10(min(p[0] for p in points) / 1.5),
        math.log10(max(p[0] for p in points) * 1.5),
    )
    y0 = math.log10(min(p[1] for p in points) / 2)
    y1 = math.log10(max([*peaks.values(), *(p[1] for p in points)]) * 1.6)

    def at(x: float, y: float) -> tuple[float, float]:
        across = left + (math.log10(x) - x0) / (x1 - x0) * (width - left - 20)
        up = height - bottom - (math.log10(y) - y0) / (y1 - y0) * (height - bottom - 30)
        return round(across, 1), round(up, 1)

    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        f'<text x="{left}" y="18">{record["processor"]}, {record["threads"]} threads: '
        "operations per second against operations per byte of weights</text>",
    ]
    for decade in range(math.ceil(x0), math.floor(x1) + 1):
        x, y = at(10**decade, 10**y0)
        out.append(f'<line x1="{x}" y1="{y}" x2="{x}" y2="30" stroke="#ddd"/>')
        out.append(f'<text x="{x}" y="{y + 18}" text-anchor="middle">{10**decade:g}</text>')
    for decade in range(math.ceil(y0), math.floor(y1) + 1):
        x, y = at(10**x0, 10**decade)
        out.append(f'<line x1="{x}" y1="{y}" x2="{width - 20}" y2="{y}" stroke="#ddd"/>')
        out.append(f'<text x="{x - 6}" y="{y + 4}" text-anchor="end">{10**decade:g}</text>')
    out.append(
        f'<text x="{width / 2}" y="{height - 8}" text-anchor="middle">operations / byte</text>'
    )
    out.append(f'<text x="8" y="{30}">G op/s</text>')
    for kind, peak in peaks.items():
        knee = peak / bandwidth
        start = max(10**x0, 10**y0 / bandwidth)
        path = [at(start, start * bandwidth), at(knee, peak), at(10**x1, peak)]
        line = " ".join(f"{x},{y}" for x, y in path)
        out.append(f'<polyline points="{line}" fill="none" stroke="{COLOURS[kind]}"/>')
        x, y = path[-1]
        out.append(
            f'<text x="{x}" y="{y - 5}" text-anchor="end" fill="{COLOURS[kind]}">'
            f"{kind} {peak:.0f} G op/s</text>"
        )
    for intensity, speed, r in points:
        x, y = at(intensity, speed)
        title = f"{r['format']} {r['n']}x{r['k']} M={r['m']} {r['precision']}: {speed:.0f} G op/s"
        out.append(
            f'<circle cx="{x}" cy="{y}" r="3" fill="{COLOURS[r["peak_of"]]}" fill-opacity="0.6">'
            f"<title>{title}</title></circle>"
        )
    return "\n".join([*out, "</svg>", ""])


HEADINGS = {
    "core": "Kernels against the machine",
    "ops": "Operators against torch",
    "model": "A small model",
    "peers": "A model of Llama's 1.1 B shape against other engines",
}


def write(part: str, record: dict) -> None:
    """The table of one part of a record, and the plot that goes with `core`."""
    page = ROOT / "docs" / "performance.md"
    text = page.read_text()
    begin, end = f"<!-- {part} measurements -->", f"<!-- end of {part} measurements -->"
    tables = {"core": core, "ops": ops, "model": model, "peers": peers}
    plot = "![Roofline](roofline.svg)\n\n" if part == "core" else ""
    section = f"{begin}\n\n{tables[part](record)}\n\n{plot}{end}"
    if begin in text and end in text:
        head, rest = text.split(begin, 1)
        text = head + section + rest.split(end, 1)[1]
    else:
        text = f"{text.rstrip()}\n\n## {HEADINGS[part]}\n\n{section}\n"
    page.write_text(text)
    if part == "core":
        (ROOT / "docs" / "roofline.svg").write_text(roofline(record))


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    measured = json.loads(Path(sys.argv[1]).read_text())
    for name in HEADINGS:
        if name in measured:
            write(name, measured)
