"""Runs the contenders side by side: each in its own process, in turn with ours, round by round.

Both of ours stay loaded; one peer at a time is loaded beside them, so that every ratio is taken
within seconds of a shared machine and memory holds three models, not a dozen. The order changes
from round to round. What a peer cannot do here is reported with its reason.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import statistics
import subprocess
from pathlib import Path

from . import models
from .environments import Unavailable

SERVE = Path(__file__).with_name("serve.py")
PROMPT, CONTEXT, STEPS = 512, 128, 24
OURS = [("ours", "fused"), ("ours", "unfused")]
PEERS = [
    ("llama_cpp", "Q4_0"),
    ("openvino_optimum", "int4"),
    ("openvino_optimum", "int8"),
    ("bitsandbytes_nf4", "nf4"),
    ("quanto_int4", "int4"),
    ("torch_dense", "bfloat16"),
    ("torch_dense", "float32"),
    ("ipex_llm_2", "sym_int4"),
    ("ipex_llm_2", "bf16"),
]


def command(python: Path, *arguments: object) -> list[str]:
    return [str(python), "-I", str(SERVE), *map(str, arguments)]


def environment(threads: int) -> dict[str, str]:
    """Threads by every name that some library reads; nothing may ask a hub."""
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    offline = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_HUB_DISABLE_TELEMETRY")
    return {
        **os.environ,
        **dict.fromkeys(names, str(threads)),
        **dict.fromkeys(offline, "1"),
        "TOKENIZERS_PARALLELISM": "false",
    }


@dataclasses.dataclass
class Contender:
    """A loaded contender; raises Unavailable with the last line of its errors."""

    module: str
    kind: str
    threads: int
    model: Path | None = None  # instead of the 1.1 B shape
    conversion: dict = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        self.about = importlib.import_module(f"peers.{self.module}")
        self.title = self.about.KINDS[self.kind]
        python = self.about.ENVIRONMENT.python()
        model = self.model or self._converted(models.llama_1b())
        self.log = models.MODELS / f"{self.module}-{self.kind}.log"
        self.process = subprocess.Popen(
            command(python, self.module, self.kind, model, self.threads),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log.open("w"),
            text=True,
            env=environment(self.threads),
        )
        self.loaded = self._read()
        if self.conversion and not hasattr(self.about, "CONVERTER"):  # by its own tools
            self.loaded["quantize_seconds"] = self.conversion["seconds"]

    def _converted(self, model: Path) -> Path:
        """What the contender reads: the model, or its own form of it, written once."""
        import real_models

        if not hasattr(self.about, "convert"):
            return model
        target = models.MODELS / f"{self.module}-{self.kind}"
        if not target.exists():
            print(f"converting the model for {self.title}", flush=True)
            python = getattr(self.about, "CONVERTER", self.about.ENVIRONMENT).python()
            with real_models.building(target) as work:
                to = ("--convert", work / "model")
                run = subprocess.run(
                    command(python, self.module, self.kind, model, self.threads, *to),
                    capture_output=True,
                    text=True,
                    env=environment(self.threads),
                )
                if run.returncode:
                    raise Unavailable(f"conversion fails: {last_line(run.stderr)}")
                (work / "conversion.json").write_text(run.stdout.splitlines()[-1])
        self.conversion = json.loads((target / "conversion.json").read_text())
        return target / "model"

    def _read(self) -> dict:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            self.process.wait()
            raise Unavailable(f"fails: {last_line(self.log.read_text())}")
        return json.loads(line)

    def ask(self, request: str) -> dict:
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(request + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # the reader finds the reason
        return self._read()

    def prompt(self) -> float:
        return PROMPT / self.ask(f"prompt {PROMPT}")["seconds"]

    def decode(self) -> float:
        return 1 / statistics.median(self.ask(f"decode {CONTEXT} {STEPS}")["seconds"])

    def quit(self) -> float:
        """Ends the process; the peak of its resident memory in MiB."""
        peak = self.ask("quit")["peak_resident_bytes"] / 2**20
        self.process.wait()
        return peak

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


def last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "no output"


@dataclasses.dataclass
class Row:
    title: str
    prompts: list[float] = dataclasses.field(default_factory=list)
    decodes: list[float] = dataclasses.field(default_factory=list)
    # Ours over this one, in the same round: {"fused": [...], "unfused": [...]}.
    prompt_ratios: dict[str, list[float]] = dataclasses.field(default_factory=dict)
    decode_ratios: dict[str, list[float]] = dataclasses.field(default_factory=dict)
    peak_resident_mib: float | None = None
    quantize_seconds: float | None = None
    versions: dict[str, str] = dataclasses.field(default_factory=dict)
    unavailable: str | None = None

    def record(self) -> dict:
        return dataclasses.asdict(self)

    def line(self) -> str:
        if self.unavailable:
            return f"{self.title:<40} {self.unavailable}"

        def number(value: float | None, form: str) -> str:
            return format("-" if value is None else format(value, form), ">9")

        cells = [
            number(statistics.median(self.prompts), ".0f"),
            ratio(self.prompt_ratios, "fused"),
            number(statistics.median(self.decodes), ".1f"),
            ratio(self.decode_ratios, "fused"),
            ratio(self.decode_ratios, "unfused"),
            number(self.peak_resident_mib, ".0f"),
            number(self.quantize_seconds, ".1f"),
        ]
        return f"{self.title:<40} " + " ".join(cells)


HEAD = f"{'':<40} " + " ".join(
    f"{text:>9}"
    for text in ("prompt", "fused x", "decode", "fused x", "unfused x", "MiB", "quant s")
)


def ratio(ratios: dict[str, list[float]], kind: str) -> str:
    values = ratios.get(kind)
    return format(f"{statistics.median(values):.2f}" if values else "-", ">9")


def measure(ours: list[Contender], rows: dict[str, Row], peer: Contender, rounds: int) -> Row:
    row = Row(peer.title, versions=peer.loaded["versions"])
    row.quantize_seconds = peer.loaded["quantize_seconds"]
    order = [*ours, peer]
    for contender in order:  # warms up: threads, memory, kernels chosen at run time
        contender.prompt()
    for _ in range(rounds):
        prompts = {contender.title: contender.prompt() for contender in order}
        decodes = {contender.title: contender.decode() for contender in order}
        order.append(order.pop(0))
        row.prompts.append(prompts[peer.title])
        row.decodes.append(decodes[peer.title])
        for own in ours:
            rows[own.title].prompts.append(prompts[own.title])
            rows[own.title].decodes.append(decodes[own.title])
            ratios = prompts[own.title] / prompts[peer.title]
            row.prompt_ratios.setdefault(own.kind, []).append(ratios)
            ratios = decodes[own.title] / decodes[peer.title]
            row.decode_ratios.setdefault(own.kind, []).append(ratios)
    row.peak_resident_mib = peer.quit()
    return row


def run(rounds: int = 3, only: str = "", threads: int = 0) -> list[dict]:
    """Rows of the table, ours first; `only`: contenders whose module or kind contains a word."""
    import torch

    threads = threads or torch.get_num_threads()
    models.MODELS.mkdir(parents=True, exist_ok=True)
    wanted = [
        (module, kind)
        for module, kind in PEERS
        if not only or any(word in f"{module} {kind}" for word in only.split(","))
    ]
    # Environments and conversions first: downloads and compilers beside a measurement spoil it.
    broken: dict[tuple[str, str], str] = {}
    for module, kind in wanted:
        about = importlib.import_module(f"peers.{module}")
        try:
            about.ENVIRONMENT.python()
        except Unavailable as error:
            broken[module, kind] = str(error)
            print(f"{about.KINDS[kind]}: {error}", flush=True)
    ours = [Contender(module, kind, threads) for module, kind in OURS]
    own = {contender.title: Row(contender.title) for contender in ours}
    for contender in ours:
        own[contender.title].quantize_seconds = contender.loaded["quantize_seconds"]
        own[contender.title].versions = contender.loaded["versions"]
    print(
        f"\nLlama 1.1 B shape: prompt of {PROMPT} tokens and single tokens after {CONTEXT}, per s"
    )
    print(HEAD, flush=True)
    rows = []
    try:
        for module, kind in wanted:
            title = importlib.import_module(f"peers.{module}").KINDS[kind]
            peer = None
            try:
                if (module, kind) in broken:
                    raise Unavailable(broken[module, kind])
                peer = Contender(module, kind, threads)
                row = measure(ours, own, peer, rounds)
            except Unavailable as error:
                row = Row(title, unavailable=str(error))
            finally:
                if peer is not None:
                    peer.kill()
            rows.append(row)
            print(row.line(), flush=True)
        for contender in ours:
            own[contender.title].peak_resident_mib = contender.quit()
            if own[contender.title].prompts:
                print(own[contender.title].line(), flush=True)
    finally:
        for contender in ours:
            contender.kill()
    return [row.record() for row in [*own.values(), *rows]]
