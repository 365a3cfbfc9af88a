"""The label columns of a dataset that a run asks for."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float32

from jaxmed.core.errors import UserError
from jaxmed.data.shards import Dataset


def columns(
    dataset: Dataset, classes: Sequence[str] | None, wanted: bool
) -> tuple[list[str], Float32[np.ndarray, "records k"]]:
    """Names, and the values of all records (NaN = missing; k = 0 if they are not `wanted`).

    Args:
      classes: names, in order; None: those of the dataset.

    Raises:
      UserError: the dataset has no such label, or none at all although they are wanted.
    """
    known = list(dataset.manifest["classes"])
    chosen = known if classes is None else list(classes)
    if unknown := [name for name in chosen if name not in known]:
        raise UserError(
            f"input.classes: {dataset.name} has no label {unknown[0]!r}; it has {', '.join(known) or 'none'}"
        )
    if not wanted:
        return chosen, np.zeros((len(dataset.index["key"]), 0), np.float32)
    if not chosen:
        raise UserError(
            f"input.keys asks for 'label', but {dataset.name} has no labels: give prep a manifest with them"
        )
    return chosen, np.stack([dataset.index[f"label/{name}"] for name in chosen], axis=1).astype(np.float32)
