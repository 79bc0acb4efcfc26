"""Find or fetch Fashion-MNIST, check it, and resize it once to the textbook's input; beside the chain."""

from __future__ import annotations

import gzip
import math
import os
import shutil
import socket
import subprocess
import tempfile
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

SYSTEM_FOLDER = Path("/usr/share/datasets/fashion-mnist")
_PACKAGE = "dataset-fashion-mnist"
_PREFIXES = {"train": "train", "test": "t10k"}
_TIMEOUT_SECONDS = 10
_APT_TIMEOUT_SECONDS = 300
_CLASSES = 10
_PART = 200  # images that a thread resizes at a time, a multiple of 4


class FashionMNIST(NamedTuple):
    """One split of Fashion-MNIST in memory.

    Attributes:
        images: uint8 ``[N, 1, S, S]``; ``images / 255`` is what ``ToTensor`` gives.
        labels: int64 ``[N]``, 0 to 9.
        source: where the files came from, in plain words.
    """

    images: Tensor
    labels: Tensor
    source: str


def fashion_mnist(
    split: str,
    *,
    image_size: int = 96,
    data_root: str | os.PathLike[str] | None = None,
    limit: int | None = None,
) -> FashionMNIST:
    """Load one split, resized as ``torchvision.transforms.Resize(image_size)`` resizes its PIL images.

    The ``*-ubyte.gz`` files are looked for in ``data_root`` and nowhere else if it is given; otherwise in
    ``/usr/share/datasets/fashion-mnist`` (Debian's package dataset-fashion-mnist), then in the cache folder
    (``fastinception/fashion-mnist`` under ``$XDG_CACHE_HOME`` or ``~/.cache``). At last they are fetched into
    the cache folder: by torchvision's download, else with apt-get from Debian, without root.

    Args:
        split: ``"train"`` or ``"test"``.
        image_size: S, the shorter side in pixels after the resize (Fashion-MNIST is square).
        data_root: folder with idx files of any number and size of images under Fashion-MNIST's names.
        limit: keep the first ``limit`` images only.

    Raises:
        TypeError: ``image_size`` or ``limit`` is not an int.
        ValueError: an argument is out of range, or a file is damaged (names it, and what it should hold).
        FileNotFoundError: no source has the files; names every source and why it failed.

    Example:
        >>> data = fashion_mnist("test", limit=100)
        >>> data.images.shape, data.images.dtype
        (torch.Size([100, 1, 96, 96]), torch.uint8)
    """
    if split not in _PREFIXES:
        raise ValueError(f"split must be 'train' or 'test', got {split!r}")
    for name, value in (("image_size", image_size), ("limit", limit)):
        if value is None and name == "limit":
            continue
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name} must be an int, got {value!r}")
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    folder, source = _locate(split, data_root)
    try:
        images, labels = _read_split(folder, split)
    except ValueError as error:
        if data_root is not None:
            raise
        again = f"reinstall Debian's package {_PACKAGE}" if folder == SYSTEM_FOLDER else "delete it to fetch it again"
        raise ValueError(f"{error}; {again}") from error
    return FashionMNIST(
        torch.from_numpy(_resize(images[:limit], image_size)).unsqueeze(1),
        torch.from_numpy(labels[:limit].astype(np.int64)),
        source,
    )


def _files(folder: Path, split: str) -> tuple[Path, Path]:
    prefix = _PREFIXES[split]
    return folder / f"{prefix}-images-idx3-ubyte.gz", folder / f"{prefix}-labels-idx1-ubyte.gz"


def _missing(folder: Path, split: str) -> list[str]:
    return [path.name for path in _files(folder, split) if not path.is_file()]


def cache_folder() -> Path:
    """Return the folder that fetched files are kept in; it need not exist."""
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    # The XDG specification says to ignore a relative path.
    return (base if base.is_absolute() else Path.home() / ".cache") / "fastinception" / "fashion-mnist"


def _locate(split: str, data_root: str | os.PathLike[str] | None) -> tuple[Path, str]:
    if data_root is not None:
        folder = Path(data_root).expanduser()
        if missing := _missing(folder, split):
            raise FileNotFoundError(
                f"data_root {folder} has no {' and no '.join(missing)}; Debian's package {_PACKAGE} has these files"
            )
        return folder, f"{folder} (given as data_root)"
    if not (missing := _missing(SYSTEM_FOLDER, split)):
        return SYSTEM_FOLDER, f"{SYSTEM_FOLDER} (Debian's package {_PACKAGE})"
    failures = [f"{SYSTEM_FOLDER}: no {' and no '.join(missing)}"]
    cache = cache_folder()
    if not (missing := _missing(cache, split)):
        return cache, f"{cache} (cache folder)"
    failures.append(f"{cache} (cache folder): no {' and no '.join(missing)}")
    sources: tuple[tuple[str, Callable[[Path], Path]], ...] = (
        ("torchvision's download", _fetch_with_torchvision),
        (f"apt-get download {_PACKAGE}", _fetch_with_apt),
    )
    for words, fetch in sources:
        try:
            _fetch_into(cache, fetch)
        # torchvision and the network raise whatever they like, and the next source is still to be tried.
        except Exception as error:
            failures.append(f"{words}: {type(error).__name__}: {' '.join(str(error).split())}")
        else:
            return cache, f"{words}, kept in {cache}"
    raise FileNotFoundError(
        "Fashion-MNIST was not found and could not be fetched. Tried:\n"
        + "\n".join(f"  - {failure}" for failure in failures)
        + f"\nInstall Debian's package {_PACKAGE}, or put the four *-ubyte.gz files into a folder and pass "
        "it as data_root (--data-root on the command line)."
    )


def _fetch_into(cache: Path, fetch: Callable[[Path], Path]) -> None:
    """Fetch into a folder beside the files, check all four, and only then move them into place."""
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=cache, ignore_cleanup_errors=True) as scratch:
        folder = fetch(Path(scratch))
        for split in _PREFIXES:
            _read_split(folder, split)
        for split in _PREFIXES:
            for path in _files(folder, split):
                os.replace(path, cache / path.name)


def _fetch_with_torchvision(scratch: Path) -> Path:
    import torchvision  # slow to import, and needed here only

    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(_TIMEOUT_SECONDS)
    try:
        dataset = torchvision.datasets.FashionMNIST(str(scratch), download=True)
    finally:
        socket.setdefaulttimeout(before)
    return Path(dataset.raw_folder)


def _fetch_with_apt(scratch: Path) -> Path:
    for tool in ("apt-get", "dpkg-deb"):
        if shutil.which(tool) is None:
            raise FileNotFoundError(f"{tool} is not installed")

    def failure(*command: str) -> str:
        done = subprocess.run(
            command, cwd=scratch, capture_output=True, text=True, timeout=_APT_TIMEOUT_SECONDS, check=False
        )
        if done.returncode == 0:
            return ""
        last_lines = (done.stderr or done.stdout).strip().splitlines()[-3:]
        return f"{command[0]} exited with {done.returncode}: {' '.join(last_lines)}"

    if failed := failure("apt-get", "download", _PACKAGE):
        # No package lists, or stale ones. Lists in a folder of one's own need no root.
        for name in ("lists/partial", "cache/archives/partial"):
            (scratch / "apt" / name).mkdir(parents=True)
        own = ("-o", f"Dir::State::Lists={scratch}/apt/lists", "-o", f"Dir::Cache={scratch}/apt/cache")
        # One unreachable source among several fails the update, but not what Debian's own gave.
        update_failed = failure("apt-get", *own, "update")
        if again := failure("apt-get", *own, "download", _PACKAGE):
            raise RuntimeError(f"{failed}; with fresh package lists: {update_failed} {again}")
    (package,) = scratch.glob("*.deb")
    if failed := failure("dpkg-deb", "-x", str(package), str(scratch / "package")):
        raise RuntimeError(failed)
    return scratch / "package" / "usr/share/datasets/fashion-mnist"  # as the Debian package lays it out


def _read_split(folder: Path, split: str) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    images_path, labels_path = _files(folder, split)
    images, labels = _read_idx(images_path, dims=3), _read_idx(labels_path, dims=1)
    if len(images) != len(labels):
        raise ValueError(
            f"{labels_path} holds {len(labels)} labels, but {images_path.name} beside it {len(images)} images"
        )
    if len(labels) and labels.max() >= _CLASSES:
        at = int((labels >= _CLASSES).argmax())
        raise ValueError(f"{labels_path}: label {at} is {labels[at]}, expected 0 to {_CLASSES - 1}")
    return images, labels


def _read_idx(path: Path, dims: int) -> NDArray[np.uint8]:
    """Read one gzipped idx file of unsigned bytes: magic 0x800 + dims, the size of each, the payload."""
    try:
        # Read to the end: that is where gzip compares its checksum.
        raw = gzip.decompress(path.read_bytes())
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path} is not a complete gzip file: {error}") from error
    header = 4 + 4 * dims
    if len(raw) < header:
        raise ValueError(f"{path} holds {len(raw)} bytes, expected a header of {header} and a payload")
    magic, *shape = (int(word) for word in np.frombuffer(raw, dtype=">u4", count=1 + dims))
    if magic != 0x0800 + dims:
        raise ValueError(f"{path} starts with magic number {magic:#010x}, expected {0x0800 + dims:#010x}")
    if 0 in shape[1:]:
        raise ValueError(f"{path} declares images of {shape[1]}x{shape[2]} pixels, expected at least 1x1")
    if len(raw) - header != math.prod(shape):
        raise ValueError(
            f"{path} declares {' x '.join(map(str, shape))} = {math.prod(shape)} bytes, "
            f"but its payload is {len(raw) - header} bytes"
        )
    return np.frombuffer(raw, dtype=np.uint8, offset=header).reshape(shape)


def _resize(images: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    """Resize ``[N, H, W]`` so that the shorter side is ``size``, with PIL's bilinear filter."""
    count, *shape = images.shape
    short = min(shape)
    # torchvision's rounding: the longer side is cut to an int.
    height, width = (size if side == short else int(size * side / short) for side in shape)
    resized = np.empty((count, height, width), dtype=np.uint8)

    def resize(first: int) -> None:
        """Resize a part of the images, four at once as the bands of one: a call costs more than its pixels."""
        part = images[first : first + _PART]
        padded = np.zeros((-(-len(part) // 4), 4, *shape), dtype=np.uint8)
        padded.reshape(-1, *shape)[: len(part)] = part
        bands = np.ascontiguousarray(padded.transpose(0, 2, 3, 1))
        mixed = [Image.frombuffer("CMYK", (shape[1], shape[0]), four, "raw", "CMYK", 0, 1) for four in bands]
        done = np.stack([np.asarray(four.resize((width, height), Image.Resampling.BILINEAR)) for four in mixed])
        resized[first : first + _PART] = done.transpose(0, 3, 1, 2).reshape(-1, height, width)[: len(part)]

    with ThreadPoolExecutor(torch.get_num_threads()) as pool:  # PIL resizes without Python's lock
        list(pool.map(resize, range(0, count, _PART)))
    return resized
