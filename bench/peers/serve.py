"""One contender in its own process and environment, asked line by line by compare.py.

    python -I serve.py CONTENDER KIND MODEL THREADS               answers requests
    python -I serve.py CONTENDER KIND MODEL THREADS --convert TO  converts the model, once

-I keeps this folder off sys.path, where `llama_cpp` would hide the package of that name.
Requests on standard input, one JSON object per line of standard output in answer:

    prompt N      seconds for N tokens at once, from an empty context
    decode N S    seconds of each of S single tokens after a prompt of N
    quit          the peak of resident memory
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import json
import os
import random
import sys
import time
from pathlib import Path
from typing import Protocol


class Engine(Protocol):
    """What load() returns."""

    quantize_seconds: float | None  # of the load; None where the model came converted

    def fill(self, tokens: list[int]) -> int:
        """Forgets everything, reads the tokens at once, returns the likeliest next one."""

    def step(self, token: int) -> int:
        """Reads one token more, returns the likeliest next one."""


def tokens(count: int) -> list[int]:
    """The same for every contender, within the vocabulary of every model used here."""
    generator = random.Random(0)
    return [generator.randrange(3, 31000) for _ in range(count)]


def peak_resident_bytes() -> int:
    # Not ru_maxrss: it counts the parent that a process was forked from.
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status has no VmHWM")


def answer(engine: Engine, request: list[str]) -> dict:
    if request[0] == "prompt":
        prompt = tokens(int(request[1]))
        began = time.perf_counter()
        engine.fill(prompt)
        return {"seconds": time.perf_counter() - began}
    if request[0] == "decode":
        token = engine.fill(tokens(int(request[1])))
        seconds = []
        for _ in range(int(request[2])):
            began = time.perf_counter()
            token = engine.step(token)
            seconds.append(time.perf_counter() - began)
        return {"seconds": seconds}
    if request[0] == "quit":
        return {"peak_resident_bytes": peak_resident_bytes()}
    raise ValueError(f"unknown request {request[0]!r}")


def main() -> None:
    # Libraries print; the answers have standard output to themselves.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    contender, kind, model, threads = sys.argv[1:5]
    sys.path.append(str(Path(__file__).resolve().parents[1]))
    module = importlib.import_module(f"peers.{contender}")

    def say(result: dict) -> None:
        answers.write(json.dumps(result) + "\n")

    began = time.perf_counter()
    if sys.argv[5:6] == ["--convert"]:
        module.convert(kind, Path(model), Path(sys.argv[6]))
        say({"seconds": time.perf_counter() - began, "peak_resident_bytes": peak_resident_bytes()})
        return
    engine = module.load(kind, Path(model), int(threads))
    versions = {}
    for requirement in module.ENVIRONMENT.requirements + module.ENVIRONMENT.alone:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            package = requirement.split("=")[0].split("<")[0]
            versions[package] = importlib.metadata.version(package)
    say(
        {
            "load_seconds": time.perf_counter() - began,
            "quantize_seconds": engine.quantize_seconds,
            "versions": versions,
        }
    )
    for line in sys.stdin:
        say(answer(engine, line.split()))
        if line.startswith("quit"):
            return


if __name__ == "__main__":
    main()
