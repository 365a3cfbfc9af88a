"""Readers of the radiograph goldens that pin planning."""

import re

import numpy as np

from jaxmed.data import plan as planning
from jaxmed.data.plan import PAD
from jaxmed.data.plan_bins import assign

SYSTEM = "radiograph_mae"


def sampler(case):
    """Bins and ordered batches; with the published memory probe, the two first epochs and what they lose."""
    height, width = case.input["shapes"].T.astype(np.int64)
    edges, size = case.config["bins"], case.config["batch_size"]

    def batches(edges, epoch=0, **options):
        made = planning.plan(
            {"height": height, "width": width}, np.arange(len(height)), seed=0, epoch=epoch, shuffle=False, mode="dbb",
            buckets={"height": edges, "width": edges}, batch_size=size, options=options,
        )  # fmt: skip
        table = np.full((len(made.steps), size), PAD, np.int32)
        for row, step in zip(table, made.steps):
            row[: len(step.ids)] = step.ids
        return table

    produced = {
        "output/bin_shape": np.stack([assign(height, edges), assign(width, edges)], axis=1),
        "output/strict_batches": batches(()),
        "output/val_batches": batches(edges),
    }
    for name in case.wanted:
        if found := re.fullmatch(r"output/val_batches_prepend_epoch(\d+)", name):
            produced[name] = batches(edges, int(found[1]) - 1, memory_probe="reference")
    return case.pick(produced)


READERS = {"sampler": sampler}
