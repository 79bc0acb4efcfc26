"""Fashion-MNIST: the textbook's pixels bit by bit, damaged files refused, sources tried in order."""

from __future__ import annotations

import gzip
import os
import socket
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

from fastinception import data
from fastinception.data import fashion_mnist

IMAGES, LABELS = "t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"


def idx(array, magic=None, shape=None) -> bytes:
    shape = array.shape if shape is None else shape
    magic = 0x0800 + array.ndim if magic is None else magic
    return struct.pack(f">{1 + len(shape)}I", magic, *shape) + array.tobytes()


def make_images(count=7, height=28, width=28):
    return np.random.default_rng(count).integers(0, 256, (count, height, width), dtype=np.uint8)


def write(folder: Path, images=None, labels=None) -> Path:
    """Write all four files; the train split holds the same as the test split."""
    images = make_images() if images is None else images
    labels = np.arange(len(images), dtype=np.uint8) % 10 if labels is None else labels
    folder.mkdir(parents=True, exist_ok=True)
    for prefix in ("train", "t10k"):
        (folder / f"{prefix}-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(images)))
        (folder / f"{prefix}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(labels)))
    return folder


@pytest.fixture
def nowhere(tmp_path, monkeypatch):
    """A machine without the files and without a way to fetch them; returns the cache folder."""
    monkeypatch.setattr(data, "SYSTEM_FOLDER", tmp_path / "system")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def no_network(*args, **kwargs):
        raise RuntimeError("no network")

    monkeypatch.setattr(torchvision.datasets, "FashionMNIST", no_network)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    return tmp_path / "cache" / "fastinception" / "fashion-mnist"


# Pixels and labels


@pytest.mark.parametrize("size", [20, 28, 96, 224])
@pytest.mark.parametrize(("height", "width"), [(28, 28), (31, 20), (20, 31)])
def test_equals_resize_and_to_tensor(tmp_path, monkeypatch, size, height, width):
    monkeypatch.setattr(data, "_PART", 4)
    images = make_images(9, height, width)
    got = fashion_mnist("test", image_size=size, data_root=write(tmp_path, images))
    textbook = torchvision.transforms.Compose([torchvision.transforms.Resize(size), torchvision.transforms.ToTensor()])
    expected = torch.stack([textbook(Image.fromarray(image)) for image in images])
    assert got.images.dtype is torch.uint8
    assert torch.equal(got.images.float() / 255, expected)


def test_real_data_is_fashion_mnist():
    got = fashion_mnist("test", image_size=28)
    assert got.images.shape == (10_000, 1, 28, 28)
    assert got.labels.dtype is torch.int64
    assert torch.bincount(got.labels).tolist() == [1000] * 10
    assert got.labels[:5].tolist() == [9, 2, 1, 1, 6]  # ankle boot, pullover, trouser, trouser, shirt
    # The mean of Debian's file, summed in plain Python.
    assert got.images.double().mean().item() == pytest.approx(73.14656658163265, abs=1e-9)


@pytest.mark.parametrize("split", ["train", "test"])
def test_each_split_reads_its_own_files(tmp_path, split):
    write(tmp_path, labels=np.full(7, 1, dtype=np.uint8))
    (tmp_path / LABELS).write_bytes(gzip.compress(idx(np.full(7, 2, dtype=np.uint8))))
    assert fashion_mnist(split, data_root=tmp_path).labels.tolist() == [{"train": 1, "test": 2}[split]] * 7


def test_limit_keeps_the_first(tmp_path):
    write(tmp_path)
    full, cut = (fashion_mnist("test", data_root=tmp_path, limit=n) for n in (None, 3))
    assert torch.equal(cut.images, full.images[:3])
    assert cut.labels.tolist() == [0, 1, 2]
    assert len(fashion_mnist("test", data_root=tmp_path, limit=99).labels) == 7


def test_no_images_is_an_empty_split(tmp_path):
    write(tmp_path, images=np.empty((0, 28, 28), dtype=np.uint8))
    got = fashion_mnist("test", data_root=tmp_path, image_size=8)
    assert got.images.shape == (0, 1, 8, 8)
    assert got.labels.shape == (0,)


# Damaged files

IMAGE_BYTES, LABEL_BYTES = idx(make_images()), idx(np.arange(7, dtype=np.uint8))
GZIPPED = gzip.compress(IMAGE_BYTES)
DAMAGE = {
    "empty file": (IMAGES, b"", "holds 0 bytes"),
    "not gzip": (IMAGES, IMAGE_BYTES, "not a complete gzip file"),
    "truncated": (IMAGES, GZIPPED[:-100], "not a complete gzip file"),
    "checksum cut off": (IMAGES, GZIPPED[:-8], "not a complete gzip file"),
    # gzip ends with the checksum and the size, 4 bytes each.
    "checksum wrong": (IMAGES, GZIPPED[:-5] + bytes([GZIPPED[-5] ^ 1]) + GZIPPED[-4:], "CRC"),
    "bytes after the end": (IMAGES, GZIPPED + b"x", "not a complete gzip file"),
    "half a header": (IMAGES, gzip.compress(IMAGE_BYTES[:10]), "holds 10 bytes.* header of 16"),
    "labels for images": (IMAGES, gzip.compress(LABEL_BYTES * 9), "0x00000801, expected 0x00000803"),
    "images for labels": (LABELS, GZIPPED, "0x00000803, expected 0x00000801"),
    "float images": (IMAGES, gzip.compress(idx(make_images(), magic=0x0D03)), "0x00000d03"),
    "fewer images than declared": (
        IMAGES,
        gzip.compress(idx(make_images(), shape=(8, 28, 28))),
        "8 x 28 x 28 = 6272 bytes, but its payload is 5488",
    ),
    "more images than declared": (
        IMAGES,
        gzip.compress(idx(make_images(8), shape=(7, 28, 28))),
        "5488 bytes, but its payload is 6272",
    ),
    "images without pixels": (
        IMAGES,
        gzip.compress(idx(np.empty((7, 0, 28), dtype=np.uint8))),
        "0x28 pixels",
    ),
    "one label short": (
        LABELS,
        gzip.compress(idx(np.arange(6, dtype=np.uint8))),
        f"6 labels.*{IMAGES}.*7 images",
    ),
    "label 10": (
        LABELS,
        gzip.compress(idx(np.array([0, 1, 2, 10, 4, 5, 6], dtype=np.uint8))),
        "label 3 is 10, expected 0 to 9",
    ),
}


@pytest.mark.parametrize(("name", "content", "message"), DAMAGE.values(), ids=DAMAGE)
def test_damaged_file_is_refused(tmp_path, name, content, message):
    write(tmp_path)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        fashion_mnist("test", data_root=tmp_path)
    assert str(tmp_path / name) in str(caught.value)
    assert "to fetch it again" not in str(caught.value)  # nothing would


# Where the files come from


def test_a_home_folder_is_found(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(write(tmp_path)))
    assert len(fashion_mnist("test", data_root="~").labels) == 7


@pytest.mark.parametrize("present", [[], [LABELS], [IMAGES]])
def test_data_root_never_falls_back(tmp_path, nowhere, present):
    write(tmp_path / "system")
    write(nowhere)
    root = write(tmp_path / "root")
    for name in {IMAGES, LABELS} - set(present):
        (root / name).unlink()
    with pytest.raises(FileNotFoundError) as caught:
        fashion_mnist("test", data_root=root)
    for name in (IMAGES, LABELS):
        assert (name in str(caught.value)) == (name not in present)


def test_system_folder_comes_before_the_cache(tmp_path, nowhere):
    write(nowhere, labels=np.full(7, 2, dtype=np.uint8))
    got = fashion_mnist("test")
    assert got.labels[0] == 2
    assert str(nowhere) in got.source
    write(tmp_path / "system", labels=np.full(7, 1, dtype=np.uint8))
    got = fashion_mnist("test")
    assert got.labels[0] == 1
    assert str(tmp_path / "system") in got.source


def test_damaged_file_is_an_error_not_a_fetch_and_says_what_helps(tmp_path, nowhere):
    for folder, help in ((nowhere, "delete it to fetch it again"), (tmp_path / "system", "reinstall Debian's package")):
        (write(folder) / IMAGES).write_bytes(GZIPPED[:-100])
        with pytest.raises(ValueError, match=f"{folder / IMAGES} is not a complete gzip file.*; {help}"):
            fashion_mnist("test")


def test_when_nothing_works_every_source_is_named(tmp_path, nowhere):
    with pytest.raises(FileNotFoundError) as caught:
        fashion_mnist("test")
    message = str(caught.value)
    for words in (
        f"{tmp_path / 'system'}: no {IMAGES} and no {LABELS}",
        f"{nowhere} (cache folder): no {IMAGES}",
        "torchvision's download: RuntimeError: no network",
        "apt-get is not installed",
        "Install Debian's package dataset-fashion-mnist",
        "--data-root",
    ):
        assert words in message
    assert list(nowhere.iterdir()) == []


def fake_torchvision(monkeypatch, fill):
    """Stand in for torchvision's dataset; ``fill`` writes into its raw folder."""

    class Dataset:
        def __init__(self, root, download):
            assert download
            self.raw_folder = str(Path(root) / "FashionMNIST" / "raw")
            fill(Path(self.raw_folder))

    monkeypatch.setattr(torchvision.datasets, "FashionMNIST", Dataset)


def test_torchvision_download_is_kept_with_a_short_timeout(nowhere, monkeypatch):
    timeouts = []

    def fill(folder):
        timeouts.append(socket.getdefaulttimeout())
        write(folder)

    fake_torchvision(monkeypatch, fill)
    assert "torchvision" in fashion_mnist("test").source
    assert 0 < timeouts[0] <= 30
    assert socket.getdefaulttimeout() is None
    assert len(list(nowhere.iterdir())) == 4
    assert "cache folder" in fashion_mnist("train").source
    assert len(timeouts) == 1


def test_leftovers_of_a_killed_fetch_do_no_harm(nowhere, monkeypatch):
    write(nowhere)
    for name in (IMAGES, "train-labels-idx1-ubyte.gz"):
        (nowhere / name).unlink()
    (nowhere / f"{IMAGES}.part").write_bytes(GZIPPED[:50])
    write(nowhere / ".fetch-killed")
    (nowhere / ".fetch-killed" / IMAGES).write_bytes(GZIPPED[:50])
    fake_torchvision(monkeypatch, lambda folder: write(folder, labels=np.full(7, 3, dtype=np.uint8)))
    assert fashion_mnist("test").labels.tolist() == [3] * 7
    assert fashion_mnist("train").labels.tolist() == [3] * 7


def test_a_write_that_dies_leaves_no_file_that_looks_whole(nowhere, monkeypatch):
    def dies_halfway(folder):
        write(folder)
        (folder / IMAGES).write_bytes(GZIPPED[:50])
        raise KeyboardInterrupt

    fake_torchvision(monkeypatch, dies_halfway)
    with pytest.raises(KeyboardInterrupt):
        fashion_mnist("test")
    assert not list(nowhere.glob("*.gz"))


def fake_apt(tmp_path, content: Path, needs_own_lists=False):
    """Put an apt-get and a dpkg-deb on PATH that serve ``content`` without a network."""
    folder = tmp_path / "bin"
    folder.mkdir()
    target = "usr/share/datasets/fashion-mnist"
    guard = 'case "$*" in *Dir::State::Lists=*Dir::Cache=*) ;; *) echo "E: Unable to locate" >&2; exit 100;; esac'
    scripts = {
        "apt-get": f"""
            {guard if needs_own_lists else ""}
            case "$*" in
              *update) /usr/bin/touch {folder}/updated; exit 100;;  # one source of several is unreachable
              *download*dataset-fashion-mnist) echo > dataset-fashion-mnist_1_all.deb;;
              *) exit 1;;
            esac""",
        "dpkg-deb": f'[ "$1" = -x ] && /bin/mkdir -p "$3/{target}" && /bin/cp {content}/* "$3/{target}"',
    }
    for name, script in scripts.items():
        (folder / name).write_text(f"#!/bin/sh\n{script}\n")
        (folder / name).chmod(0o755)


@pytest.mark.parametrize("needs_own_lists", [False, True])
def test_apt_is_next_when_the_download_fails(tmp_path, nowhere, needs_own_lists):
    fake_apt(tmp_path, write(tmp_path / "package"), needs_own_lists)
    got = fashion_mnist("test")
    assert "apt-get" in got.source
    assert got.labels.tolist() == list(range(7))
    assert (tmp_path / "bin" / "updated").exists() == needs_own_lists
    assert len(list(nowhere.iterdir())) == 4


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ('echo "Reading lists"; echo "E: no $1" >&2; exit 100', "exited with 100: E: no download; with fresh package"),
        (
            'echo "Reading lists"; exit 100',
            "; with fresh package lists: apt-get exited with 100: Reading lists apt-get",
        ),
        ("exec /bin/sleep 60", "TimeoutExpired: Command "),
        ("echo > dataset-fashion-mnist_1_all.deb", "RuntimeError: dpkg-deb exited with 2: not a package"),
    ],
    ids=["errors", "no errors", "hangs", "no package"],
)
def test_what_apt_says_is_told(tmp_path, nowhere, monkeypatch, script, message):
    fake_apt(tmp_path, tmp_path)
    (tmp_path / "bin" / "apt-get").write_text(f"#!/bin/sh\n{script}\n")
    (tmp_path / "bin" / "dpkg-deb").write_text("#!/bin/sh\necho not a package >&2; exit 2\n")
    if "sleep" in script:
        monkeypatch.setattr(data, "_APT_TIMEOUT_SECONDS", 0.1)
    with pytest.raises(FileNotFoundError) as caught:
        fashion_mnist("test")
    assert message in str(caught.value)


def test_a_missing_unpacker_is_named_before_anything_is_fetched(tmp_path, nowhere):
    fake_apt(tmp_path, tmp_path)
    (tmp_path / "bin" / "dpkg-deb").unlink()
    with pytest.raises(FileNotFoundError, match="dpkg-deb is not installed"):
        fashion_mnist("test")


def test_damaged_download_is_not_kept(tmp_path, nowhere, monkeypatch):
    def fill(folder):
        write(folder)
        (folder / "train-images-idx3-ubyte.gz").write_bytes(GZIPPED[:-100])

    fake_torchvision(monkeypatch, fill)
    with pytest.raises(FileNotFoundError, match=r"torchvision's download: ValueError: .*not a complete gzip"):
        fashion_mnist("test")
    assert list(nowhere.iterdir()) == []
    fake_apt(tmp_path, write(tmp_path / "package"))
    assert "apt-get" in fashion_mnist("test").source


def test_relative_cache_home_is_ignored(monkeypatch):
    for value in ("", "relative"):
        monkeypatch.setenv("XDG_CACHE_HOME", value)
        assert data.cache_folder() == Path(os.path.expanduser("~/.cache/fastinception/fashion-mnist"))


# Arguments


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"split": "valid"}, ValueError, "'train' or 'test', got 'valid'"),
        ({"image_size": 0}, ValueError, "image_size must be at least 1, got 0"),
        ({"image_size": 96.0}, TypeError, "image_size must be an int, got 96.0"),
        ({"image_size": None}, TypeError, "image_size must be an int, got None"),
        ({"limit": 0}, ValueError, "limit must be at least 1, got 0"),
        ({"limit": -3}, ValueError, "limit must be at least 1, got -3"),
        ({"limit": True}, TypeError, "limit must be an int, got True"),
    ],
)
def test_bad_arguments(tmp_path, arguments, error, message):
    with pytest.raises(error, match=message):
        fashion_mnist(**{"split": "test", "data_root": write(tmp_path), **arguments})
