"""Virtual environments of the contenders: their pins contradict each other and ours."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / ".cache" / "peers"


class Unavailable(Exception):
    """A contender cannot run here; the text says why. Not fatal to the others."""


@dataclasses.dataclass(frozen=True)
class Environment:
    name: str
    requirements: tuple[str, ...]
    alone: tuple[str, ...] = ()  # packages installed without what they ask for
    compiled: tuple[str, ...] = ()  # packages built here, for this processor
    removed: tuple[str, ...] = ()  # packages that others pull in and that break the set
    variables: tuple[tuple[str, str], ...] = ()
    note: str = ""
    present: bool = False  # the driver's own

    @property
    def folder(self) -> Path:
        return FOLDER / self.name

    def python(self) -> Path:
        """The interpreter, set up first if it is not; raises Unavailable if that fails."""
        if self.present:
            return Path(sys.executable)
        python = self.folder / "bin" / "python"
        ready = self.folder / ".ready"
        settings = [value for _, value in self.variables] if self.compiled else []
        wanted = "\n".join([*self.requirements, *self.alone, *self.removed, *settings])
        if ready.exists() and ready.read_text() == wanted:
            return python
        print(f"\nsetting up {self.folder.relative_to(ROOT)} {self.note}".rstrip(), flush=True)
        if not python.exists():
            self._step([sys.executable, "-m", "venv", str(self.folder)])
        pip = [str(python), "-m", "pip"]
        # What was compiled with other settings is neither kept nor taken from pip's cache.
        anew = ["--no-cache-dir", "--force-reinstall"]
        binary = ["--no-binary", ",".join(self.compiled), *anew] if self.compiled else []
        self._step([*pip, "install", *binary, *self.requirements])
        if self.alone:
            self._step([*pip, "install", "--no-deps", *self.alone])
        if self.removed:
            self._step([*pip, "uninstall", "-y", *self.removed])
        ready.write_text(wanted)
        return python

    def _step(self, command: list[str]) -> None:
        """Runs a command, its lines shown as they come."""
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "PYTHONPATH": "", **dict(self.variables)},
        )
        assert process.stdout is not None
        lines = []
        for line in process.stdout:
            lines.append(line.strip())
            print(f"  {line.rstrip()[:160]}", flush=True)
        if process.wait():
            reasons = [line for line in lines if line.startswith("ERROR")] or lines or ["no output"]
            raise Unavailable(f"does not install: {reasons[-1]}")


OURS = Environment("ours", ("torch", "transformers"), present=True)
