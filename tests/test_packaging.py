"""What is shipped and what an import does: wheel contents, the name `kernels`, no Triton, no device."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

import fastinception
from tests import fresh

ROOT = Path(__file__).resolve().parent.parent
KERNELS = {path.name for path in (ROOT / "kernels").glob("*.py")}
MODULES = {path.name for path in (ROOT / "fastinception").glob("*.py")}
BLOCK = "fastinception.FastInception(6, 4, (3, 5), (2, 4), 3)(torch.ones(2, 6, 5, 5))"


def python(code: str, *path: Path, cwd: Path = ROOT) -> str:
    """Run code in a fresh interpreter that sees ``path`` before its own packages; return what it printed."""
    return fresh.run(code, cwd, PYTHONPATH=os.pathsep.join(map(str, path))).strip()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Build sdist and wheel from a copy, since setuptools leaves files in the source; plant a tuned table."""
    if int(importlib.metadata.version("setuptools").split(".")[0]) < 77:
        pytest.skip("building the wheel needs setuptools >= 77, which the extra 'test' installs")
    folder = tmp_path_factory.mktemp("build")
    source, out = folder / "source", folder / "out"
    no_caches = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in ("fastinception", "kernels"):
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=no_caches)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    (source / "kernels" / "tuned").mkdir(exist_ok=True)
    (source / "kernels" / "tuned" / "planted.json").write_text("{}")
    for other in ("tests", "bench"):
        (source / other).mkdir()
        (source / other / "planted.py").write_text("")
    build = "from setuptools import build_meta as b; b.build_{}({!r})"
    python(build.format("sdist", str(out)), cwd=source)
    (sdist,) = out.glob("*.tar.gz")
    # The wheel comes from the sdist, as with `python -m build`, so that both are known to be complete.
    shutil.unpack_archive(sdist, folder, filter="data")
    (unpacked,) = folder.glob("fastinception-*")
    python(build.format("wheel", str(out)), cwd=unpacked)
    (built,) = out.glob("*.whl")
    return built


def test_wheel_holds_the_kernels_and_nothing_else_at_the_top(wheel):
    with zipfile.ZipFile(wheel) as archive:
        files = [name for name in archive.namelist() if ".dist-info/" not in name]
    tables = {path.name for path in (ROOT / "kernels" / "tuned").glob("*.json")} | {"planted.json"}
    expected = {f"fastinception/{name}" for name in MODULES | {"py.typed"}}
    expected |= {f"fastinception/kernels/{name}" for name in KERNELS}
    expected |= {f"fastinception/kernels/tuned/{name}" for name in tables}
    assert len(KERNELS) > 1
    assert sorted(files) == sorted(expected)


def test_metadata(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = Parser().parsestr(archive.read(name).decode())
    assert metadata["Version"] == fastinception.__version__
    assert metadata["Requires-Python"] == ">=3.10"
    assert metadata["License-Expression"] == "MIT"
    needed = {line for line in metadata.get_all("Requires-Dist") if "extra ==" not in line}
    assert needed == {"torch>=2.11", "torchvision>=0.26", "numpy"}


def test_installed_wheel_imports(wheel, tmp_path):
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    code = f"import torch, fastinception, fastinception.kernels as k; {BLOCK}; print(k.__file__)"
    assert python(code, tmp_path, cwd=tmp_path) == str(tmp_path / "fastinception" / "kernels" / "__init__.py")


def test_kernels_is_not_importable_by_its_bare_name():
    code = "try: import kernels\nexcept ImportError as error: print(error)"
    assert "fastinception.kernels" in python(code)


def test_another_package_named_kernels_is_left_alone(tmp_path):
    """As with Hugging Face's `kernels` installed beside this one, whichever is imported first."""
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("whose = 'theirs'")
    check = "assert kernels.whose == 'theirs'; assert not hasattr(fastinception.kernels, 'whose')"
    for order in ("kernels, fastinception", "fastinception, kernels"):
        code = f"import torch, {order}, fastinception.kernels; {check}; {BLOCK}; print('fine')"
        assert python(code, tmp_path, ROOT, cwd=tmp_path) == "fine"


def test_import_and_forward_without_triton():
    """Nor with what only a compiler needs, and takes most of a second to import."""
    code = (
        "import sys; sys.modules['triton'] = None; import torch, fastinception; from fastinception import functional;"
    )
    code += f"functional.FEW = -1; print({BLOCK}.shape, 'sympy' in sys.modules)"
    assert python(code, ROOT) == "torch.Size([2, 16, 5, 5]) False"


def test_import_asks_no_device():
    code = """
import importlib, importlib.util, pkgutil
import torch

def asked(*args, **kwargs):
    raise AssertionError("a device was asked for at import")

for name in ("_lazy_init", "is_available", "device_count", "get_device_properties"):
    setattr(torch.cuda, name, asked)
import fastinception, fastinception.kernels
if importlib.util.find_spec("triton"):
    for module in pkgutil.iter_modules(fastinception.kernels.__path__):
        importlib.import_module(f"fastinception.kernels.{module.name}")
assert not torch.cuda.is_initialized()
print("fine")
"""
    assert python(code, ROOT) == "fine"
