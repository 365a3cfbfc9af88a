"""What evaluators of embeddings share: a test split through `embed_image`, texts through `embed_text`."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, Int
from tqdm import tqdm

from jaxmed.core import sharding
from jaxmed.core.load import load
from jaxmed.data import pipeline, shards

Array = np.ndarray
IMAGE_KEYS = ("image", "scan_depths", "_mask")


def open_stream(input: Mapping[str, Any], mesh, keys: Sequence[str]) -> pipeline.Stream:
    """One ordered pass over a split, batched for the mesh."""
    return pipeline.make(
        **{**input, "keys": tuple(keys)},
        train=False,
        sharding=sharding.batch_sharding(mesh),
        multiple_of=sharding.batch_size_multiple(mesh),
    )


def open_dataset(input: Mapping[str, Any]) -> shards.Dataset:
    """The dataset that `input` names, for reports and examples."""
    source = input.get("source", "shards")
    if source == "shards":
        return shards.open_dataset(input["dir"])
    return load("data.sources", source).open_dataset(input["dir"], **(input.get("source_options") or {}))


def embed_tokens(
    predict_fns, stream: pipeline.Stream, mesh, train_state, extra: Sequence[str] = (), *, progress: str = ""
):
    """All studies of a stream, padding rows left out.

    Args:
      extra: keys of the batch to return beside the features.
      progress: title of a progress bar, shown if it takes more than a few seconds; "" for none.

    Returns:
      {"image": (n, z) or (n, p, z) float32, "_id": (n,), `extra`, "scale" and perhaps "scale_report": (), exp of the
      log-scales}, the same on every process.
    """
    rows: dict[str, list[Array]] = {}
    scales: dict[str, Array] = {}
    quiet = not progress or jax.process_index() != 0
    batches = stream.batches(0, stream.steps_per_epoch)
    for bucket, local in tqdm(batches, progress, stream.steps_per_epoch, unit="batch", delay=5, disable=quiet):
        batch = sharding.put_batch(local, mesh, stream.spec[bucket]["_mask"].shape[0])
        out = predict_fns["embed_image"](train_state, {k: batch[k] for k in IMAGE_KEYS if k in batch})
        got = sharding.gather({"image": out["image"], **{k: batch[k] for k in ("_mask", "_id", *extra)}})
        scales = sharding.gather({k: out[k] for k in ("scale", "scale_report") if k in out})
        keep = got.pop("_mask") > 0
        for k, x in got.items():
            rows.setdefault(k, []).append(x[keep])
    return {k: np.concatenate(x) for k, x in rows.items()} | scales


def of_token(got: Mapping[str, Array], token: int) -> tuple[Float[Array, "n z"], float]:
    """The features of one image token, of those that `embed_tokens` gives, and the scale that belongs to it."""
    image = got["image"]
    last = image.ndim == 3 and token in (-1, image.shape[1] - 1)
    scale = float(got["scale_report"] if last and "scale_report" in got else got["scale"])
    return image[:, token] if image.ndim == 3 else image, scale


def embed_studies(predict_fns, stream: pipeline.Stream, mesh, train_state, token: int, extra: Sequence[str] = ()):
    """As `embed_tokens`, of one image token: {"image": (n, z), "_id": (n,), "scale": of that token, and `extra`}."""
    got = embed_tokens(predict_fns, stream, mesh, train_state, extra)
    image, scale = of_token(got, token)
    return {k: got[k] for k in ("_id", *extra)} | {"image": image, "scale": scale}


def embed_ids(predict_fns, mesh, train_state, ids: Int[Array, "n t"], batch_size: int = 64) -> Float[Array, "n z"]:
    """Features of token ids, in batches of one shape."""
    multiple = sharding.batch_size_multiple(mesh)
    b = -(-min(batch_size, len(ids)) // multiple) * multiple
    rows = []
    mine = pipeline.rows_of(sharding.batch_sharding(mesh), b)
    for i in range(0, len(ids), b):
        part = np.zeros((b, ids.shape[1]), np.int32)
        part[: len(ids[i : i + b])] = ids[i : i + b]
        batch = sharding.put_batch({"text": part[mine]}, mesh, b)
        rows.append(sharding.gather(predict_fns["embed_text"](train_state, batch)["text"]))
    return np.concatenate(rows)[: len(ids)]


def writes(outdir) -> bool:
    """Does this process write files? (The first one, if there is somewhere to write.)"""
    return outdir is not None and jax.process_index() == 0
