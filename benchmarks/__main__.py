"""`python -m benchmarks`: every benchmark that this machine can run, one after the other, then the README's tables."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch

FOLDER = Path(__file__).resolve().parent
ON_GPU = (("attention.py",), ("models.py",))
ON_CPU = (("coverage.py",), ("compile_time.py",), ("compile_time.py", "--second-process"), ("cpu_attention.py",))


def main() -> int:
    """Run the scripts; the exit status is 1 if one of them failed."""
    failed = []
    for script, *options in (*(ON_GPU if torch.cuda.is_available() else ()), *ON_CPU):
        print("#", script, *options, flush=True)
        if subprocess.run([sys.executable, str(FOLDER / script), *options]).returncode:
            failed.append(script)
    print("# tables.py", flush=True)
    if (FOLDER.parent / "README.md").exists() and subprocess.run([sys.executable, str(FOLDER / "tables.py")]).returncode:
        failed.append("tables.py")
    if failed:
        print("failed:", ", ".join(failed))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
