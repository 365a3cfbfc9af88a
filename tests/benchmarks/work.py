"""What both sides of the benchmark do: sizes, settings and data. numpy only."""

import functools

import numpy as np

CORES = 2
# HLIP with the trunk of ViT-S. Scans of half the published size in every direction: some seconds per step on 2 cores.
IMAGE = {
    "width": 384, "heads": 6, "depth": 12, "levels": ("scan", "scan", "study"), "img_size": (24, 96, 96),
    "patch": (8, 16, 16), "out_dim": 384, "posemb_init": "1d2d",
}  # fmt: skip
TEXT = {
    "vocab_size": 30_522, "width": 384, "depth": 4, "heads": 6, "mlp_width": 1536, "max_positions": 64,
    "out_dim": 384,
}  # fmt: skip
PIXEL_MEAN, PIXEL_STD = 0.449, 0.226
LR = 1e-4
OPTIM = {"b1": 0.9, "b2": 0.98, "eps": 1e-6, "weight_decay": 0.2}
BATCH = 8
SCANS = (2, 8)  # of a ragged study: uniform
BUCKETS = (2, 3, 4, 5, 6, 7, 8)
STUDIES = {"ragged": 48, "equal": 16}  # of one measurement
KINDS = tuple(STUDIES)
LOAD_BATCH = 2


@functools.cache
def studies(kind: str) -> list[dict]:
    """{"scans": (s, d, h, w) uint8, "ids": (t,) int32}: noise, because only the shapes matter."""
    rng = np.random.default_rng(0)
    made = []
    for _ in range(STUDIES[kind]):
        scans = SCANS[1] if kind == "equal" else int(rng.integers(SCANS[0], SCANS[1] + 1))
        ids = np.zeros(TEXT["max_positions"], np.int32)
        length = int(rng.integers(20, TEXT["max_positions"] + 1))
        ids[:length] = rng.integers(1000, 30_000, length)
        made.append({"scans": rng.integers(0, 256, (scans, *IMAGE["img_size"]), np.uint8), "ids": ids})
    return made
