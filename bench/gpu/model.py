"""Hold what a model of an H100's resources expects of the launches, in microseconds, to stand beside what is measured.

The model, for bf16: 6.5 TB/s from the L2 cache, 0.92 x 3.0 TB/s from memory, the tensor cores and the shared memory of
the busiest SM, 1.5 us from kernel to kernel (0.6 with programmatic dependent launch), 1.2 us to ramp up, nothing in the
L2 cache at the start. Its plain block is 10 launches in one CUDA graph, the library at 180 to 600 TFLOP/s by shape: an
estimate, good to a quarter. Nothing here was measured.
"""

from __future__ import annotations

from typing import NamedTuple

from fastinception.googlenet import WIDTHS


class Modelled(NamedTuple):
    """One block, with the best tile for each launch; ``*_l2`` are bytes from L2 for a cycle of the tensor cores.

    ``apart``: the pool into a buffer and then one GEMM over both sources, where what is measured has the projection in
    the pool's launch. ``library``: two convolutions and one launch that finishes them. ``*_l2`` is None where something
    else than the L2 cache bounds the launch.
    """

    entry: float
    apart: float
    spatial: float
    library: float
    plain_compiled: float
    entry_l2: int | None = None
    spatial_l2: int | None = None


# By (batch, image size), and block. L2 bytes a cycle at tiles of 128x128: 64, 256x128: 48, 256x160: 42, 256x192: 37.
MODEL = {
    (128, 96): {
        "3a": Modelled(10.2, 16.0, 13.3, 29.0, 62.1),
        "3b": Modelled(14.1, 22.1, 24.6, 40.2, 83.9, entry_l2=48),
        "4a": Modelled(9.6, 13.9, 6.9, 15.1, 45.5),
        "4b": Modelled(9.6, 14.1, 7.7, 18.0, 47.9, spatial_l2=64),
        "4c": Modelled(9.6, 14.1, 8.6, 20.0, 50.5),
        "4d": Modelled(9.6, 14.1, 11.5, 19.8, 49.9),
        "4e": Modelled(12.4, 15.6, 12.7, 22.4, 55.5),
        "5a": Modelled(10.1, 10.2, 5.6, 13.6, 38.1),
        "5b": Modelled(10.1, 11.5, 6.3, 16.2, 41.8),
    },
    (256, 224): {
        "3a": Modelled(77.8, 149.9, 115.4, 169.3, 443.0, 48, 48),
        "3b": Modelled(131.2, 209.3, 209.3, 300.8, 690.9, 48, 37),
        "4a": Modelled(59.0, 92.7, 51.3, 63.2, 221.7, 48, 48),
        "4b": Modelled(59.9, 95.0, 60.6, 79.8, 243.5, 48, 48),
        "4c": Modelled(59.7, 94.8, 67.0, 93.8, 255.2, 48, 48),
        "4d": Modelled(59.8, 94.9, 81.8, 113.7, 275.1, 48, 42),
        "4e": Modelled(86.2, 120.8, 92.5, 138.1, 326.8, 48, 42),
        "5a": Modelled(32.0, 46.9, 22.6, 44.4, 107.4, 48),
        "5b": Modelled(42.3, 52.7, 29.5, 59.7, 139.5, 48),
    },
}
TILE_L2 = {"128x128": 64, "256x128": 48}
# Kernel to kernel, without and with programmatic dependent launch.
GAP, GAP_PDL = 1.5, 0.6
MEMORY, L2_BYTES = 0.92 * 3.0e6, 50e6  # bytes a microsecond; bytes


def modelled(block: str, batch: int, image_size: int, rows: int) -> dict[str, float]:
    """Return the model's microseconds by the name of a variant of ``bench.gpu.kernels``; empty for another shape.

    Args:
        block: a key of ``WIDTHS``, or any other name.
        batch, image_size: of the network's images.
        rows: pixels of the block's input, all images together.
    """
    model = MODEL.get((batch, image_size), {}).get(block)
    if model is None:
        return {}
    x = 2 * rows * WIDTHS[block].in_channels
    figures = {
        "entry": model.entry,
        "entry, pool and GEMM apart": model.apart,
        # x comes from memory a second time where the L2 cache has lost it when the first pool tile starts.
        "entry, separate tile order": model.entry + (x / MEMORY if x > L2_BYTES else 0.0),
        "spatial": model.spatial,
        "spatial, library and epilogue": model.library,
        "two launches": model.entry + model.spatial,
        "two launches, dependent launch": model.entry + model.spatial - 2 * (GAP - GAP_PDL),
        "plain compiled": model.plain_compiled,
        "FastInception": model.entry + model.spatial,
    }
    for level, best, l2 in (
        ("entry", model.entry, model.entry_l2),
        ("spatial", model.spatial, model.spatial_l2),
    ):
        if l2 is not None:
            figures |= {f"{level}, {tile} tiles": best * bytes_ / l2 for tile, bytes_ in TILE_L2.items()}
    return {name: round(figure, 1) for name, figure in figures.items()}
