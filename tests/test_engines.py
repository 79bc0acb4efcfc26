"""The other engines of a comparison: whether they are here, how they run, what they compute."""

from __future__ import annotations

import importlib.metadata
from typing import Any

import pytest
import torch
from torch import nn

from bench import comparison, engines
from fastinception import GoogLeNet


def test_engines_are_recorded_with_their_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    packages = {"Pillow": ("PIL",), "None": ("no_such",), "In part": ("PIL", "no_such")}
    monkeypatch.setattr(engines, "ENGINES", {name: (needed, ("fp32",)) for name, needed in packages.items()})
    assert engines.versions() == {"Pillow": importlib.metadata.version("pillow")}
    assert (engines.available("fp32"), engines.available("bf16")) == (["Pillow"], [])


@pytest.mark.parametrize("name", list(comparison.engines.ENGINES))
def test_an_engine_computes_what_the_network_computes(name: str) -> None:
    if name not in comparison.engines.available("fp32"):
        pytest.skip(f"{name} is not installed")
    net, images = GoogLeNet(), torch.rand(2, 1, 32, 32)
    engine = comparison.Engine(name, net, images, dtype="fp32")
    engine()
    torch.testing.assert_close(engine.evaluate(), net(images).detach(), rtol=1e-3, atol=1e-4)


def test_engines_are_asked_for_the_rows_dtype_and_torchs_number_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    openvino, onnxruntime = pytest.importorskip("openvino"), pytest.importorskip("onnxruntime")
    pytest.importorskip("onnx")
    net, images, asked = nn.Conv2d(1, 2, 3), torch.rand(2, 1, 8, 8), []
    compiled, session = openvino.Core.compile_model, onnxruntime.InferenceSession

    def watch_compilation(self: Any, model: Any, device: str, hints: dict[str, Any]) -> Any:
        asked.append((hints["INFERENCE_PRECISION_HINT"], hints["INFERENCE_NUM_THREADS"]))
        return compiled(self, model, device, hints)

    def watch_session(file: bytes, options: Any, **settings: Any) -> Any:
        asked.append(("fp32", options.intra_op_num_threads))
        return session(file, options, **settings)

    monkeypatch.setattr(openvino.Core, "compile_model", watch_compilation)
    monkeypatch.setattr(onnxruntime, "InferenceSession", watch_session)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    for name, (_, dtypes) in engines.ENGINES.items():
        for dtype in dtypes:
            engines.Engine(name, net, images, dtype=dtype)
    assert asked == [("f32", 3), ("bf16", 3), ("fp32", 3)]
