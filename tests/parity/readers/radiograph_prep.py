"""Radiograph MAE: intensities as the thesis makes them, halving, padding."""

import numpy as np

from jaxmed.data import canvas, intensity

SYSTEM = "radiograph_mae"


def preproc(case):
    produced = {}
    for i, about in enumerate(case.config["cases"]):
        raw = case.input[f"raw_{i}"].astype(np.uint16)
        meta = {
            "range": (int(raw.min()), int(raw.max())),
            "photometric": "MONOCHROME1" if about["inverted"] else "MONOCHROME2",
        }
        image = intensity.unit(meta, intensity="reference")[raw].astype(np.float32)
        # The table that training takes is the same one in steps of 1 / 65535.
        steps = np.abs(image - intensity.table(meta, intensity="reference")[raw] / 65535)
        assert steps.max() <= 0.51 / 65535
        if about.get("downsampling", 1) == 0.5:
            image = canvas.half(image)
        size = canvas.padded_size(
            *image.shape,
            bins=about.get("bins", ()),
            multiple=about.get("multiple", 1),
            square=about.get("max_size", 0),
        )
        produced[f"output/image_{i}"] = canvas.pad(image, size)[None]
    return produced


READERS = {"preproc": preproc}
