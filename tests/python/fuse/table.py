"""What optimize_llm does to every decoder-only architecture of the installed transformers.

    python tests/python/fuse/table.py [--only NAME] [--write docs/fusion-models.md]

Each is built small with random weights; fused and unfused must give the same logits and greedy
tokens. Exit status 1 if one does not, or if fewer than 80 % have a fused part.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import multiprocessing
import os
import re
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
sys.path[:0] = [str(ROOT / "python"), str(ROOT / "tests" / "python")]
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"

TOLERANCE = 2e-3  # of the largest logit: 15-bit activations, see tests/python/zoo/checks.py
SHARE = 0.8
HEADER = """# Which architectures are fused

Every decoder-only architecture of transformers {version}, small and with random weights, written by
`python tests/python/fuse/table.py --write docs/fusion-models.md` on {date}. "Fused" names the
parts of its blocks that run as one operator; logits of the fused and the unfused model
differ by at most {tolerance:g} of the largest, and greedy tokens are equal. {summary}

| architecture | fused | modules | logits differ by | what is left, and why |
|---|---|---|---|---|
"""


def examine(case) -> dict:
    import torch

    import ipex_llm
    from zoo import builders, checks

    torch.set_num_threads(1)
    row = {"name": case.model_type, "class": case.class_name, "status": "ok", "fused": "", "n": 0}
    row.update({"error": 0.0, "left": ""})
    warnings.simplefilter("ignore")
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(3, 90, (2, 10), generator=generator)
    plain, why = None, ""
    try:
        for model in builders.build(case):
            try:
                checks.call(model, {"input_ids": ids})
            except Exception as error:
                why = why or f"{type(error).__name__}: {str(error)[:100]}"
                continue
            plain = model
            break
    except builders.NotSmall as error:
        return {**row, "status": "not built", "left": str(error)}
    if plain is None:
        return {**row, "status": "not run", "left": why}
    fused = copy.deepcopy(plain)
    ipex_llm.optimize_model(plain, optimize_llm=False)
    ipex_llm.optimize_model(fused)
    report = ipex_llm.optimization_report(fused)
    parts = {part for e in report.fused for part in re.split(", | and ", e["fused"])}
    row["fused"] = " and ".join(sorted(parts))
    row["n"] = len(report.fused)
    row["left"] = report.reason or _reasons(report)
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    try:
        for arguments in ({"input_ids": ids}, {"input_ids": ids, "attention_mask": mask}):
            want = checks.call(plain, arguments).logits
            have = checks.call(fused, arguments).logits
            if "attention_mask" in arguments:
                want, have = want[mask.bool()], have[mask.bool()]
            if want.isfinite().all():
                size = float(want.abs().max()) or 1.0
                row["error"] = max(row["error"], float((want - have).abs().max()) / size)
    except Exception as error:
        return {**row, "status": "not run", "left": f"{type(error).__name__}: {str(error)[:100]}"}
    if row["error"] > TOLERANCE:
        row["status"] = "differs"
        return row
    with ipex_llm.set_activation_precision("fp32"):
        try:
            want = plain.generate(ids, max_new_tokens=6, do_sample=False, use_cache=True)
        except Exception:
            return row  # it cannot generate from these inputs, fused or not
        have = fused.generate(ids, max_new_tokens=6, do_sample=False, use_cache=True)
    if not torch.equal(want, have):
        row["status"] = "other tokens"
    return row


def _reasons(report) -> str:
    """Blocks first: why a part inside a fused block was left is nobody's question."""
    reasons = [e["reason"] for e in report.left]
    return "; ".join(dict.fromkeys(reasons)) if not report.fused else (reasons or [""])[0]


def _child(case, queue) -> None:
    try:
        queue.put(examine(case))
    except BaseException as error:
        text = f"{type(error).__name__}: {str(error)[:160]}"
        queue.put({"name": case.model_type, "class": case.class_name, "status": "failed",
                   "fused": "", "n": 0, "error": 0.0, "left": text})  # fmt: skip


def _alone(case) -> dict:
    """In a process of its own: one that crashes or hangs costs itself only."""
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    process = context.Process(target=_child, args=(case, queue))
    process.start()
    try:
        return queue.get(timeout=1200)
    except Exception:
        row = {"name": case.model_type, "class": case.class_name, "status": "failed"}
        return {**row, "fused": "", "n": 0, "error": 0.0, "left": "crashed, or took 20 minutes"}
    finally:
        process.kill()
        process.join()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only")
    parser.add_argument("--write", type=Path)
    parser.add_argument("--jobs", type=int, default=1)
    arguments = parser.parse_args()
    import torch
    from transformers import LlamaForCausalLM  # noqa: F401

    from zoo import builders, checks  # noqa: F401

    # What every child would import is imported; no pool of threads is started that a fork would
    # lose.
    torch.set_num_threads(1)
    cases = [c for c in builders.cases(("causal_lm",))]
    cases = [c for c in cases if not arguments.only or arguments.only == c.model_type]
    rows = []
    with ThreadPoolExecutor(arguments.jobs) as pool:
        for row in pool.map(_alone, cases):
            rows.append(row)
            print(f"{row['name']}: {row['status']}: {row['fused'] or '-'} ({row['n']}) "
                  f"{row['error']:.1e} {row['left']}", flush=True)  # fmt: skip
    return report(rows, arguments.write)


def report(rows: list[dict], path: Path | None) -> int:
    """The exit status; writes the document where there is a path."""
    import transformers

    built = [r for r in rows if r["status"] not in ("not built", "not run")]
    bad = [r for r in built if r["status"] != "ok"]
    fused = [r for r in built if r["fused"]]
    both = [r for r in fused if "attention" in r["fused"] and r["fused"] != "attention"]
    summary = (
        f"Of {len(built)} that run, {len(fused)} have a fused part, {len(both)} attention and "
        f"MLP or experts; {len(bad)} differ."
    )
    print(summary)
    if path is not None:
        lines = [
            f"| {r['name']} ({r['class']}) | {r['fused'] or '-'} | {r['n']} | {r['error']:.0e} | "
            f"{(r['status'] + ': ' if r['status'] != 'ok' else '') + r['left']} |".replace(
                "\n", " "
            )
            for r in sorted(rows, key=lambda r: r["name"])
        ]
        text = HEADER.format(
            date=datetime.date.today(),
            version=transformers.__version__,
            tolerance=TOLERANCE,
            summary=summary,
        )
        path.write_text(text + "\n".join(lines) + "\n", encoding="utf-8")
    return 1 if bad or len(fused) < SHARE * len(built) else 0


if __name__ == "__main__":
    sys.exit(main())
