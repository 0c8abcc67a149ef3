"""`python -m benchmarks`: every benchmark that this machine can run, one after the other, then the README's tables.

`python -m benchmarks recurrence attention`: these alone.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch

FOLDER = Path(__file__).resolve().parent
FOLDERS = (FOLDER, FOLDER.parent / "examples")
ON_GPU = (
    ("attention.py",), ("decode.py",), ("models.py",), ("recurrence.py", "--jobs", "10"), ("recurrence_length.py",),
    ("recurrent_decode.py",), ("recurrent_models.py",), ("training.py",), ("mask_memory.py",), ("flash_attention.py",),
    ("moe.py", "--jobs", "10"), ("moe_upcycling.py",), ("cost_model.py",),
)  # fmt: skip
ON_CPU = (("coverage.py",), ("compile_time.py",), ("compile_time.py", "--second-process"), ("cpu_attention.py",))


def main() -> int:
    """Run the scripts; the exit status is 1 if one of them failed."""
    failed, named = [], {f"{name.removesuffix('.py')}.py" for name in sys.argv[1:]}
    runs = (*(ON_GPU if torch.cuda.is_available() or named else ()), *ON_CPU)
    if unknown := named - {script for script, *_ in runs}:
        raise SystemExit(f"Expected names of {sorted({script for script, *_ in runs})} but got {sorted(unknown)}")
    for script, *options in (run for run in runs if not named or run[0] in named):
        print("#", script, *options, flush=True)
        path = next(folder / script for folder in FOLDERS if (folder / script).exists())
        if subprocess.run([sys.executable, str(path), *options]).returncode:
            failed.append(script)
    print("# tables.py", flush=True)
    if (FOLDER.parent / "README.md").exists() and subprocess.run([sys.executable, str(FOLDER / "tables.py")]).returncode:
        failed.append("tables.py")
    if failed:
        print("failed:", ", ".join(failed))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
