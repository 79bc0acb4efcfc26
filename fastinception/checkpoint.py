"""Write and read the training command's checkpoints: a crash at any moment leaves a good one; beside the chain."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import shutil
import zipfile
from pathlib import Path
from typing import Any

import torch

CURRENT, PREVIOUS = "checkpoint.pt", "checkpoint.previous.pt"
FORMAT = "fastinception.train 1"
STATE = (
    "model", "optimizer", "scaler", "rng", "config", "epoch", "step", "order", "sums", "step_seconds", "seconds",
    "history", "sessions",
)  # fmt: skip


class CheckpointError(Exception):
    """A checkpoint that cannot be used; the message names the file, the reason and the other checkpoint, if any."""


def newest(folder: Path) -> Path | None:
    """Return the checkpoint that ``--resume`` continues from, or None where ``folder`` holds no run.

    Only the previous one is there where a crash fell between the two renames of ``save``.
    """
    return next((path for path in (folder / CURRENT, folder / PREVIOUS) if path.exists()), None)


def later(folder: Path, state: dict[str, Any]) -> Path | None:
    """Return a good checkpoint of ``folder`` that stands further than ``state``, or None."""
    for path in (folder / CURRENT, folder / PREVIOUS):
        with contextlib.suppress(ValueError):
            other = _read(path)
            if (other["epoch"], other["step"]) > (state["epoch"], state["step"]):
                return path
    return None


def save(state: dict[str, Any], folder: Path, *, rotate: bool) -> Path:
    """Write ``state`` as the current checkpoint of ``folder`` in one step, and return its path.

    Args:
        state: has the keys of ``STATE``, and what ``torch.load(weights_only=True)`` reads: tensors, numbers, strings,
            None, lists and dicts.
        folder: where to; it exists.
        rotate: keep the checkpoint that was current until now as the previous one.

    Raises:
        OSError: it cannot be written; :func:`newest` is what it was.
    """
    # In memory first: a full disk is then an OSError of one write, not an error of PyTorch's zip writer.
    content = io.BytesIO()
    torch.save({"format": FORMAT, **state}, content)
    write(folder / CURRENT, content.getbuffer(), keep=folder / PREVIOUS if rotate else None)
    return folder / CURRENT


def write(path: Path, content: bytes | memoryview, keep: Path | None = None) -> None:
    """Write a file so that a crash leaves the old content or the new, on the disk; ``keep`` gets the old one.

    Raises:
        OSError: it cannot be written; the old content is at ``path``, or at ``keep`` if only the last renaming failed.
    """
    # One name for all times: the next write takes the place of what a killed one left.
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if keep is not None and path.exists():
            os.replace(path, keep)
        os.replace(partial, path)
    except OSError as error:
        error.filename = str(path)  # a full disk's error names no file
        raise
    finally:
        partial.unlink(missing_ok=True)
    if os.name == "posix":  # elsewhere a folder cannot be opened
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def check_space(folder: Path) -> None:
    """Raise an OSError now if the disk has no room for the previous checkpoint beside the current and the next."""
    size = (folder / CURRENT).stat().st_size
    more = size if (folder / PREVIOUS).exists() else 2 * size
    if (free := shutil.disk_usage(folder).free) < more:
        words = f"{more / 1e6:.0f} MB are needed for checkpoints, {free / 1e6:.0f} MB are free"
        raise OSError(errno.ENOSPC, words, str(folder))


def load(path: Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU, after its checksums were compared.

    Raises:
        CheckpointError: it is missing, damaged, or not a checkpoint of the training command.
    """
    try:
        return _read(path)
    except ValueError as error:
        message = f"{path} cannot be used: {error}."
    for other in (path.with_name(CURRENT), path.with_name(PREVIOUS)):
        try:
            _read(other)
        except ValueError:
            continue
        raise CheckpointError(f"{message} {other.name} beside it is good; continue from it with --resume {other}")
    raise CheckpointError(f"{message} There is no other good checkpoint beside it.")


def _read(path: Path) -> dict[str, Any]:
    """Return what ``path`` holds; ValueError says what is wrong with it."""
    try:
        # PyTorch's own reader is built without the comparison of checksums.
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged is not None:
            raise ValueError(f"its checksum of {damaged} is wrong")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except zipfile.BadZipFile as error:
        raise ValueError(f"it is no complete PyTorch file ({error})") from error
    # Foreign content raises whatever unpickling it raises, and all mean the same here.
    except Exception as error:
        raise ValueError(" ".join(str(error).split())[:300]) from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise ValueError("it was not written by fastinception.train")
    if missing := [name for name in STATE if name not in state]:
        raise ValueError(f"it lacks {', '.join(missing)}")
    return state
