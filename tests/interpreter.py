"""Kernels under Triton's interpreter: a process of its own, since Triton reads TRITON_INTERPRET when it is imported.

A test file starts itself as a script that calls `serve`, and asks it by `interpreted`: questions and answers are lines of JSON.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

Ask = Callable[[str, Any], Any]


def serve(tasks: Mapping[str, Callable[[Any], Any]]) -> None:
    """Answers each question, the name of a task and what to do it with, until there are no more."""
    for line in sys.stdin:
        try:
            task, what = json.loads(line)
            answer: dict[str, Any] = {"result": tasks[task](what)}
        except Exception:
            answer = {"failure": traceback.format_exc()}
        print(json.dumps(answer), flush=True)


@contextmanager
def interpreted(script: str, folder: Path) -> Iterator[Ask]:
    """`ask(task, what)` of a script, which is given the folder for its kernel files."""
    root = Path(__file__).resolve().parent.parent
    variables = {"TRITON_INTERPRET": "1", "PYTHONPATH": str(root), "PYTHONWARNINGS": "ignore", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(Path(script).resolve()), str(folder)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, **variables})
    questions, answers = process.stdin, process.stdout
    assert questions is not None and answers is not None

    def ask(task: str, what: Any) -> Any:
        questions.write(json.dumps([task, what]) + "\n")
        questions.flush()
        answer = json.loads(answers.readline())
        assert "failure" not in answer, answer["failure"]
        return answer["result"]

    yield ask
    questions.close()
    process.wait(timeout=30)
