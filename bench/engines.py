"""Other CPU inference engines on the same network: optional rows of compare.py, never a dependency."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

# What each needs to be installed, and the dtypes in which it runs.
ENGINES = {
    "OpenVINO": (("openvino",), ("fp32", "bf16")),
    "ONNX Runtime": (("onnxruntime", "onnx"), ("fp32",)),
}


def available(dtype: str) -> list[str]:
    """Name the engines that are installed and run ``dtype``."""
    return [
        name
        for name, (packages, dtypes) in ENGINES.items()
        if dtype in dtypes and all(importlib.util.find_spec(package) for package in packages)
    ]


def versions() -> dict[str, str]:
    """Return the version of each engine that is installed."""
    packages = importlib.metadata.packages_distributions()  # the package onnxruntime may be of onnxruntime-gpu
    modules = {name: ENGINES[name][0][0] for name in available("fp32")}
    return {name: importlib.metadata.version(packages[m][0]) for name, m in modules.items() if m in packages}


class Engine:
    """Repeat one inference pass of ``net`` in an engine, on PyTorch's number of threads.

    Args:
        name: a key of ``ENGINES``.
        net: the network, fp32 on the CPU; converted once.
        images: fp32 ``[N, C, H, W]`` on the CPU.
        dtype: ``"fp32"``, or ``"bf16"`` for the precision in which OpenVINO is asked to run.
    """

    def __init__(self, name: str, net: nn.Module, images: Tensor, *, dtype: str) -> None:
        self.net = net.eval()
        self.run = {"OpenVINO": _openvino, "ONNX Runtime": _onnxruntime}[name](self.net, images, dtype)

    def __call__(self) -> None:
        """Do the work of one timed call."""
        self.run()

    def evaluate(self) -> Tensor:
        """Return the logits ``[N, classes]``."""
        return torch.from_numpy(self.run())


def _openvino(net: nn.Module, images: Tensor, dtype: str) -> Any:
    import openvino

    model = openvino.convert_model(net, example_input=images)
    model.reshape({0: list(images.shape)})
    hints = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": {"fp32": "f32", "bf16": "bf16"}[dtype],
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
    }
    request = openvino.Core().compile_model(model, "CPU", hints).create_infer_request()
    request.set_input_tensor(openvino.Tensor(images.numpy(), shared_memory=True))

    def run() -> Any:
        request.infer()
        return request.get_output_tensor(0).data

    return run


def _onnxruntime(net: nn.Module, images: Tensor, dtype: str) -> Any:
    import onnxruntime

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "net.onnx")
        torch.onnx.export(net, (images,), path, input_names=["x"], dynamo=False)
        model = path.read_bytes()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    return lambda: session.run(None, {"x": images.numpy()})[0]
