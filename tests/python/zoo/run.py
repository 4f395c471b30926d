"""The whole zoo: `python tests/python/zoo/run.py [--tasks causal_lm,...] [--write docs/models.md]`.

Each class runs in a pool of fresh processes, so that one that crashes or hangs costs itself only.
Exit status 1 if a class fails or the shares promised in docs/models.md are missed.
"""

from __future__ import annotations

import argparse
import collections
import concurrent.futures
import datetime
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import threading
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
sys.path[:0] = [str(ROOT / "python"), str(ROOT / "tests" / "python"), str(ROOT / "scripts")]
LONGEST = 900  # seconds for one class
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", help="comma-separated; all by default")
    parser.add_argument("--only", help="a part of the class's name")
    parser.add_argument("--low-bits", default="sym_int4,nf4")
    parser.add_argument(
        "--jobs", type=int, default=os.cpu_count(), help="0 runs nothing: what --json holds"
    )
    parser.add_argument(
        "--json",
        type=Path,
        help="append the results here as they come, one per line; a class that already has an "
        "'ok' for each type there is not run again",
    )
    parser.add_argument("--write", type=Path, help="write the table here (docs/models.md)")
    parser.add_argument("--no-save", action="store_true", help="leave out save and load")
    arguments = parser.parse_args()

    from zoo import builders, others

    tasks = tuple(arguments.tasks.split(",")) if arguments.tasks else (*builders.TASKS, "other")
    cases = builders.cases(tasks) + ([*others.cases()] if "other" in tasks else [])
    cases = [c for c in cases if not arguments.only or arguments.only in c.class_name]
    low_bits = tuple(arguments.low_bits.split(","))
    done = _done(arguments.json, low_bits, only_passed=arguments.jobs > 0)
    left = [c for c in cases if c.id not in done] if arguments.jobs else []
    results = [r for c in cases for r in done.get(c.id, ())]
    results += run_all(left, low_bits, arguments.jobs, not arguments.no_save, arguments.json)
    results.sort(key=lambda r: (r.task, r.model_type, r.class_name, r.low_bit))
    text = table(results)
    if arguments.write:
        arguments.write.write_text(text, encoding="utf-8")
    print(summary(results))
    failed = [r for r in results if r.status == "failed"]
    for r in failed:
        print(f"failed: {r.task}/{r.model_type}/{r.class_name} {r.low_bit}: {r.detail}")
    return 1 if failed else 0


def _done(path: Path | None, low_bits, only_passed: bool) -> dict[str, list]:
    """Case id -> its last results in the file, for the cases that have one for every type."""
    from zoo import builders, checks

    found: dict[str, dict] = collections.defaultdict(dict)
    if path is not None and path.exists():
        for line in path.read_text().splitlines():
            r = checks.Result(**json.loads(line))
            found[builders.Case(r.task, r.model_type, r.class_name).id][r.low_bit] = r
    return {
        name: [by_type[low_bit] for low_bit in low_bits]
        for name, by_type in found.items()
        if set(low_bits) <= set(by_type)
        and (not only_passed or all(by_type[b].status == "ok" for b in low_bits))
    }


def run_all(cases, low_bits, jobs: int, save: bool, path: Path | None = None):
    """The results of all cases; a class that kills its process or hangs fails alone."""
    from zoo import checks

    context = multiprocessing.get_context("spawn")
    waiting, results = collections.deque(cases), []
    lock = threading.Lock()

    def work() -> None:
        pool = None
        while True:
            with lock:
                if not waiting:
                    break
                case = waiting.popleft()
            pool = pool or concurrent.futures.ProcessPoolExecutor(1, context, initializer=_start)
            try:
                new = pool.submit(_run, case, low_bits, save).result(timeout=LONGEST)
            except Exception as error:  # the process died, or does not come back
                detail = f"{type(error).__name__}: {error}"
                new = [checks._result(case, b, "failed", detail) for b in low_bits]
                for process in list(pool._processes.values()):
                    process.kill()
                pool = None
            with lock:
                results.extend(new)
                if path is not None:
                    with path.open("a") as file:
                        file.writelines(json.dumps(vars(r)) + "\n" for r in new)
                done = len(cases) - len(waiting)
                print(f"\r{done}/{len(cases)} {case.class_name:50.50}", end="", file=sys.stderr)
        if pool is not None:
            pool.shutdown()

    threads = [threading.Thread(target=work) for _ in range(jobs)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    print(file=sys.stderr)
    return results


def _start() -> None:
    import torch

    torch.set_num_threads(1)


def _run(case, low_bits, save):
    from zoo import checks, others

    run = others.run_case if case.task == "other" else checks.run_case
    return run(case, low_bits, save)


def summary(results) -> str:
    lines = []
    for task in dict.fromkeys(r.task for r in results):
        rows = [r for r in results if r.task == task]
        built = {r.class_name for r in rows if r.status != "not built"}
        failed = {r.class_name for r in rows if r.status == "failed"}
        shares = [r.share for r in rows if r.status == "ok"]
        median = f"{statistics.median(shares):.1%}" if shares else "-"
        names = {r.class_name for r in rows}
        lines.append(
            f"{task}: {len(names)} classes, {len(built)} built, {len(built) - len(failed)} pass, "
            f"median share of weight bytes converted {median}"
        )
    return "\n".join(lines)


def table(results) -> str:
    """docs/models.md."""
    import torch
    import transformers

    lines = [
        "# Models",
        "",
        "Written by `make zoo` (`tests/python/zoo/run.py --write docs/models.md`) on "
        f"{datetime.date.today()}, torch {torch.__version__.split('+')[0]}, transformers "
        f"{transformers.__version__}, CPU{_commit()}.",
        "",
        "Every class that the Auto mappings of transformers name, built small with random weights "
        "and without a network, and models from elsewhere. Models that look or listen get an "
        "image, a clip or sound beside the text where one is known here that they accept. Each is "
        "optimized, compared in fp32 "
        "with a float copy whose weights are the dequantized ones (so the arithmetic is all that "
        "differs), saved, loaded under `low_memory_init`, and must then give the identical output. "
        "*Share* is the part of the bytes of all parameters with two or more dimensions that is "
        "packed; embedding tables are left out unless tied to a head, since they stay float unless "
        "`embedding_qtype` is given. *Error* is the largest difference relative to the largest "
        "output, for the worse of the two types. It may be 2e-3; a class that jumps at any "
        "rounding, as detectors that select by score do, may differ by four times what its own "
        "float model moves when every product errs by 2^-15 of its largest value.",
        "",
        "| task | classes | built | pass | median share |",
        "|---|---|---|---|---|",
    ]
    groups = collections.defaultdict(list)
    for r in results:
        groups[r.task].append(r)
    for task, rows in groups.items():
        names = {r.class_name for r in rows}
        built = {r.class_name for r in rows if r.status != "not built"}
        failed = {r.class_name for r in rows if r.status == "failed"}
        shares = [r.share for r in rows if r.status == "ok"]
        median = f"{statistics.median(shares):.1%}" if shares else "-"
        lines.append(
            f"| {task} | {len(names)} | {len(built)} | {len(built) - len(failed)} | {median} |"
        )
    lines += [
        "",
        "A class is built as small as its configuration can be made by the names of its fields: "
        "everything, else only the numbers of layers, tokens and experts, else only the widths, "
        "else nothing. It is *not built*, with the reason of the smallest, where all of these "
        "exceed 100 million parameters or contradict each other, where it needs a package that "
        "cannot be installed beside the pinned torch (timm, natten, torchaudio, detectron2), and "
        "where no input for its forward is known here; that says nothing about the class.",
    ]
    for task, rows in groups.items():
        lines += [
            "",
            f"## {task}",
            "",
            "| class | result | share | error | stays float |",
            "|---|---|---|---|---|",
        ]
        by_class = collections.defaultdict(list)
        for r in rows:
            by_class[(r.model_type, r.class_name)].append(r)
        missing, partly = [], []
        for (_, name), both in sorted(by_class.items()):
            if both[0].status == "not built":
                missing.append(f"{name} ({_cell(both[0].detail)})")
                continue
            if both[0].called < 0.75:
                partly.append(f"{name} ({both[0].called:.0%})")
            bad = [r for r in both if r.status != "ok"]
            status = "pass" if not bad else f"{bad[0].low_bit}: {_cell(bad[0].detail)}"
            left = _cell(both[0].left, 400) if both[0].share < 0.95 else ""
            lines.append(
                f"| {name} | {status} | {both[0].share:.1%} | {max(r.error for r in both):.0e} "
                f"| {left} |"
            )
        if partly:
            lines += [
                "",
                "The input reaches a part of the model only (its share of the modules with "
                "weights is given): " + ", ".join(partly) + ".",
            ]
        if missing:
            lines += ["", "Not built: " + "; ".join(missing) + "."]
    return "\n".join(lines) + "\n"


def _commit() -> str:
    try:
        git = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
        return (
            ", commit "
            + subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
        )
    except (OSError, subprocess.CalledProcessError):
        return ""  # a source archive


def _cell(text: str, most: int = 150) -> str:
    return text.replace("|", "/").replace("\n", " ").replace(str(ROOT), "")[:most]


if __name__ == "__main__":
    sys.exit(main())
