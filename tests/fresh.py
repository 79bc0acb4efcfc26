"""Run code in a process that has imported PyTorch and nothing of this project.

That takes seconds: the standard library's fork server does it once, and each process is forked from there.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import tempfile
import warnings
from collections.abc import Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TIMEOUT = 300.0  # seconds
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["torch"])


def _execute(code: str, arguments: list[str], outputs: tuple[str, str], cwd: Path, environment: dict[str, str]) -> None:
    for stream, path in zip((1, 2), outputs, strict=True):
        os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND), stream)
    # A group of its own, as subprocess makes one with start_new_session.
    os.setsid()
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    given = filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))
    own = "", str(ROOT)  # of the test run, whose path this process was given
    sys.path[:] = ["", *given, *(entry for entry in sys.path if entry not in own)]
    sys.argv = ["-c", *arguments]
    warnings.simplefilter("ignore")
    exec(compile(code, "<code of a test>", "exec", dont_inherit=True), {"__name__": "__main__"})


def start(
    code: str, output: Path, errors: Path, arguments: Sequence[str] = (), cwd: Path = ROOT, **variables: str | None
) -> BaseProcess:
    """Start ``code`` as ``python -W ignore -c`` would, but for atexit. What it prints is appended to existing files.

    ``variables`` change the environment; None takes one away. OMP_NUM_THREADS stays as PyTorch has read it.
    """
    environment = {name: value for name, value in (os.environ | variables).items() if value is not None}
    arguments = code, list(arguments), (str(output), str(errors)), cwd, environment
    process = _CONTEXT.Process(target=_execute, args=arguments)
    process.start()
    return process


def run(code: str, cwd: Path = ROOT, **variables: str | None) -> str:
    """Run ``code``, without Triton's interpreter unless ``variables`` say otherwise, and return what it printed."""
    variables = {"TRITON_INTERPRET": None, "PYTHONPATH": str(ROOT)} | variables
    with tempfile.NamedTemporaryFile("r") as output, tempfile.NamedTemporaryFile("r") as errors:
        process = start(code, Path(output.name), Path(errors.name), cwd=cwd, **variables)
        try:
            process.join(TIMEOUT)
        finally:  # with all that it started
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        process.join()
        assert process.exitcode == 0, f"status {process.exitcode} (-9: not within {TIMEOUT:g} s): {errors.read()}"
        return output.read()
