"""Converting, verifying and loading next to `cp`: python bench/files.py CHECKPOINT [SCRATCH].

CHECKPOINT is a directory with one model.safetensors; SCRATCH (default: the system's temporary
directory) must lie on the file system to measure. Times with a warm page cache, peak memory of the
program's process, and whether conversions by each instruction set and number of threads are equal.
"""

from __future__ import annotations

import argparse
import filecmp
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "python"))

from ipex_llm.program import PROGRAM  # noqa: E402


def timed(*command, **environment) -> tuple[float, float]:
    """Seconds, and the peak of resident memory in MiB."""
    start = time.perf_counter()
    process = subprocess.Popen(
        list(map(str, command)), env={**os.environ, **environment}, stdout=subprocess.DEVNULL
    )
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"failed: {' '.join(map(str, command))}")
    return time.perf_counter() - start, usage.ru_maxrss / 1024


def convert(source, destination, threads=0, **environment) -> tuple[float, float]:
    shutil.rmtree(destination, ignore_errors=True)
    arguments = ("--threads", threads, "convert", source, destination, "--low-bit", "sym_int4")
    return timed(PROGRAM, *arguments, "--quiet", **environment)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("scratch", type=Path, nargs="?", default=Path(tempfile.gettempdir()))
    parser.add_argument("--isas", default="", help="also compare these, e.g. avx2,avx512vnni")
    arguments = parser.parse_args()
    weights = arguments.checkpoint / "model.safetensors"
    timed("cat", weights)  # into the page cache
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as scratch:
        out, copy = Path(scratch, "save"), Path(scratch, "copy")
        for _ in range(3):
            copying, _ = timed("cp", weights, copy)
            copy.unlink()
            converting, memory = convert(arguments.checkpoint, out)
            print(
                f"cp {copying:.2f} s, convert {converting:.2f} s (at most "
                f"{1.5 * copying + 2:.2f}), peak RSS {memory:.0f} MiB"
            )
        size = sum(path.stat().st_size for path in out.glob("*.safetensors"))
        verifying = min(timed(PROGRAM, "verify", out)[0] for _ in range(3))
        print(f"verify {size / 1e6:.0f} MB: {verifying:.3f} s, {size / verifying / 1e9:.1f} GB/s")
        for isa in filter(None, arguments.isas.split(",")):
            for threads in (1, 2, 5) if isa != "scalar" else (5,):
                other = Path(scratch, "other")
                convert(arguments.checkpoint, other, threads, LOWBIT_FORCE_ISA=isa)
                names = sorted(path.name for path in out.iterdir())
                different = filecmp.cmpfiles(out, other, names, shallow=False)[1:]
                print(f"{isa}, {threads} threads: {'DIFFERENT' if any(different) else 'equal'}")


if __name__ == "__main__":
    main()
