"""`lowbit`, the program of the C++ core, as a wheel's script. It needs no torch."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

PROGRAM = Path(__file__).parent / "lib" / ("lowbit.exe" if os.name == "nt" else "lowbit")


def main() -> None:
    """Runs the `lowbit` program of this installation with the same arguments and exit code."""
    if not PROGRAM.exists():
        sys.exit(
            f"lowbit: {PROGRAM} does not exist: this installation was built without it "
            f"(LOWBIT_PROGRAM=ON)"
        )
    arguments = [str(PROGRAM), *sys.argv[1:]]
    if os.name == "nt":
        sys.exit(subprocess.run(arguments, check=False).returncode)
    os.execv(PROGRAM, arguments)


if __name__ == "__main__":
    main()
