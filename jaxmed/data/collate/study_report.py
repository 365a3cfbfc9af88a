"""Batches of whole studies with their reports, as HLIP trains on them (spec: HLIP, section 2, "Scan sampling").

    image        (b, s, d, h, w) in the stored dtype; the model normalises on the device
    scan_depths  (b, s) int32, real slices of every scan; 0 = padding scan. The rest of a scan is zero, at its end
    text         (b, t) int32, the report; 0 = padding
    sentence     (b, t) int32, one sentence of it
    label        (b, k) float32, NaN = missing
    _mask        (b,) float32
    _id          (b,) int32, record id; -1 for padding rows

Per-example randomness is a function of (seed, step, record id).
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxmed.core import memory
from jaxmed.core.errors import UserError
from jaxmed.core.rng import np_rng
from jaxmed.data.labels import columns as label_columns
from jaxmed.data.ops import scan_indices
from jaxmed.data.plan import PAD, Bucket, row_elements
from jaxmed.data.record import StudyReader
from jaxmed.data.shards import Dataset
from jaxmed.data.tokenize import OVERFLOW, Tokenizer

KEYS = ("image", "text", "sentence", "label")


@dataclass(frozen=True)
class StudyReport:
    """See the module and `jaxmed.data.collate` for the contract, `make` for the options."""

    dataset: Dataset
    ids: np.ndarray
    sizes: dict[str, np.ndarray]
    elements: np.ndarray
    digest: str
    train: bool
    seed: int
    keys: tuple[str, ...]
    image: tuple[tuple[int, int], np.dtype]  # (h, w), dtype
    scan_sampling: str
    num_scans: int | None
    labels: np.ndarray  # (number of records, k) float32
    tokenizer: Tokenizer | None
    context: int
    overflow: str
    prefix: str
    shuffle_sentences: bool

    def spec(self, bucket: Bucket, b: int) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
        s, d = dict(bucket)["scans"], dict(bucket)["depth"]
        (h, w), dtype = self.image
        every = {
            "image": ((b, s, d, h, w), dtype),
            "scan_depths": ((b, s), np.dtype(np.int32)),
            "text": ((b, self.context), np.dtype(np.int32)),
            "sentence": ((b, self.context), np.dtype(np.int32)),
            "label": ((b, self.labels.shape[1]), np.dtype(np.float32)),
        }
        wanted = {*self.keys, "scan_depths"} if "image" in self.keys else set(self.keys)
        fixed = {"_mask": ((b,), np.dtype(np.float32)), "_id": ((b,), np.dtype(np.int32))}
        return {k: v for k, v in every.items() if k in wanted} | fixed

    def slots(self, bucket: Bucket) -> int:
        return row_elements(bucket)

    def assemble(self, bucket: Bucket, ids: np.ndarray, step: int, pool: Executor | None) -> dict[str, np.ndarray]:
        spec = self.spec(bucket, len(ids))
        batch = {k: (memory.empty if k == "image" else memory.zeros)(*about) for k, about in spec.items()}
        batch["_mask"][:] = ids != PAD
        batch["_id"][:] = ids
        if "label" in batch:
            batch["label"][:] = np.where((ids == PAD)[:, None], np.float32(np.nan), self.labels[ids])
        if set(self.keys) == {"label"}:
            return batch

        def fill(row: int) -> None:
            self._fill(batch, row, int(ids[row]), step)

        if "image" in batch:
            batch["image"][ids == PAD] = 0
        rows = np.flatnonzero(ids != PAD)
        for _ in map(fill, rows) if pool is None else pool.map(fill, rows):
            pass
        return batch

    def _fill(self, batch: dict[str, np.ndarray], row: int, id: int, step: int) -> None:
        rng = np_rng(self.seed, step, id) if self.train else None
        study = self.dataset.record(id)
        if "image" in batch:
            self._fill_image(batch["image"][row], batch["scan_depths"][row], study, rng)
        if self.tokenizer is None:
            return
        n = len(study.sentences)
        order = np.arange(n) if rng is None or not self.shuffle_sentences else rng.permutation(n)
        if "text" in batch:
            report = " ".join(study.sentences[i] for i in order)
            batch["text"][row] = self._encode(self.prefix + report, study.key)
        if "sentence" in batch:
            one = "" if n == 0 else study.sentences[0 if rng is None else rng.integers(n)]
            batch["sentence"][row] = self._encode(self.prefix + one, study.key)

    def _fill_image(
        self, image: np.ndarray, depths: np.ndarray, study: StudyReader, rng: np.random.Generator | None
    ) -> None:
        """Writes every voxel of `image`, those of padding too."""
        slots, room = image.shape[:2]
        done: dict[int, int] = {}
        chosen = self._choose(len(study.shapes), slots, rng).tolist()
        image[len(chosen) :] = 0
        for k, scan in enumerate(chosen):
            shape, dtype = study.shapes[scan], study.dtypes[scan]
            if shape[1:] != image.shape[2:] or dtype != image.dtype:
                raise UserError(
                    f"study {study.key}, scan {scan}: {shape} {dtype} in a dataset of (depth, "
                    f"{image.shape[2]}, {image.shape[3]}) {image.dtype}; {_ONE_GRID}"
                )
            depths[k] = min(shape[0], room)
            image[k, depths[k] :] = 0
            if scan in done:
                image[k] = image[done[scan]]
            else:
                study.copy_into(scan, image[k, : depths[k]], (shape[0] - depths[k]) // 2)
                done[scan] = k

    def _choose(self, n: int, slots: int, rng: np.random.Generator | None) -> np.ndarray:
        """Indices of the scans to show, in order."""
        if self.scan_sampling == "repeat":
            order = np.arange(n) if rng is None else rng.permutation(n)
            return order[scan_indices(n, self.num_scans, "eval_main" if rng is None else "train")][:slots]
        if n > slots and rng is not None:
            return np.sort(rng.choice(n, slots, replace=False))
        return np.arange(min(n, slots))

    def _encode(self, text: str, key: str) -> np.ndarray:
        return self.tokenizer.encode([text], self.context, overflow=self.overflow, keys=[key])[0]


_ONE_GRID = (
    "scans of one batch need one in-plane size and dtype: make the shards with a prep recipe that resamples or crops "
    "to a fixed grid (python -m jaxmed.prep --recipe=...)"
)


def make(
    dataset: Dataset,
    ids: np.ndarray,
    *,
    train: bool,
    seed: int,
    buckets: Mapping[str, Sequence[int]] | None,
    keys: Sequence[str] = ("image", "text"),
    scan_sampling: str = "all",
    num_scans: int | None = None,
    too_deep: str = "error",
    vocab: str | None = None,
    lowercase: bool = True,
    context: int = 256,
    overflow: str = "error",
    prefix: str = "",
    shuffle_sentences: bool = True,
    empty_report: str = "error",
    classes: Sequence[str] | None = None,
) -> StudyReport:
    """Checks everything that can be checked before the first step.

    Args:
      dataset, ids: the records to use.
      train: draw scans, sentence order and sentence at random; else the first scans, the ordered report, its first
        sentence.
      buckets: `{"scans": sizes, "depth": sizes}`.
      keys: which of `KEYS` a batch has (`image` brings `scan_depths`; all have `_mask` and `_id`).
      scan_sampling: "all": every scan once, at most as many as the largest bucket has (a random subset in training,
        the first ones otherwise). "repeat": the reference: permute, repeat to `num_scans`, truncate (in evaluation:
        repeat in order, without truncation unless the largest bucket is full).
      too_deep: a scan with more slices than the largest bucket is an "error", or cut to its "center".
      vocab, lowercase: see `tokenize.Tokenizer`; None is the packaged bert-base-uncased vocabulary.
      context, overflow: tokens per text, and what longer ones do: "error" or "truncate".
      prefix: before every report and sentence, e.g. "This study shows: ".
      shuffle_sentences: join the sentences in random order in training.
      empty_report: studies without a sentence are an "error", "drop"ped from the plan, or get the "prefix" alone.
      classes: label names, in order; default: those of the dataset.

    Raises:
      UserError: an option is unknown, or the records do not fit it; names the field or the study.
    """
    for field, value, known in (
        ("scan_sampling", scan_sampling, ("all", "repeat")),
        ("too_deep", too_deep, ("error", "center")),
        ("overflow", overflow, OVERFLOW),
        ("empty_report", empty_report, ("error", "drop", "prefix")),
        *(("keys", key, KEYS) for key in keys),
    ):
        if value not in known:
            raise UserError(f"input.{field}={value!r} is not known; use one of {', '.join(known)}")
    if set(buckets or ()) != {"scans", "depth"}:
        raise UserError(f"input.buckets has {sorted(buckets or ())}; studies are planned by 'scans' and 'depth'")
    most = max(buckets["scans"])
    if scan_sampling == "repeat" and (num_scans is None or not 1 <= num_scans <= most):
        raise UserError(
            f"input.num_scans={num_scans}: scan_sampling='repeat' needs the number of scans to repeat to, at most the "
            f"largest bucket (input.buckets.scans={tuple(buckets['scans'])})"
        )
    index = dataset.index
    with_text = bool({"text", "sentence"} & set(keys))
    if with_text:
        ids = _with_reports(dataset, ids, empty_report)
    image = _one_grid(dataset, ids) if "image" in keys else ((1, 1), np.dtype(np.uint8))

    scans, depth = index["scans"][ids].astype(np.int64), index["depth"][ids].astype(np.int64)
    shown = scans
    if scan_sampling == "repeat":
        shown = np.full_like(scans, num_scans) if train else scans * -(-num_scans // scans)
    shown = np.minimum(shown, most)
    if "image" not in keys:
        shown, depth = np.ones_like(shown), np.ones_like(depth)  # nothing of the voxels is read: any bucket will do
    elif too_deep == "center":
        depth = np.minimum(depth, max(buckets["depth"]))
    elements = np.zeros(len(index["key"]))
    elements[ids] = np.minimum(index["slices"][ids] / scans, depth) * shown

    chosen, labels = label_columns(dataset, classes, "label" in keys)

    tokenizer = Tokenizer(vocab, lowercase=lowercase) if with_text else None
    options: dict[str, Any] = {
        "train": train, "seed": seed, "keys": sorted(keys), "scan_sampling": scan_sampling, "num_scans": num_scans,
        "too_deep": too_deep, "vocab": tokenizer and tokenizer.digest, "context": context, "overflow": overflow,
        "prefix": prefix, "shuffle_sentences": shuffle_sentences, "empty_report": empty_report, "classes": chosen,
    }  # fmt: skip
    collate = StudyReport(
        dataset=dataset,
        ids=ids,
        sizes={"scans": shown, "depth": depth},
        elements=elements,
        digest=hashlib.sha256(json.dumps(options, sort_keys=True).encode()).hexdigest(),
        train=train,
        seed=seed,
        keys=tuple(keys),
        image=image,
        scan_sampling=scan_sampling,
        num_scans=num_scans,
        labels=labels,
        tokenizer=tokenizer,
        context=context,
        overflow=overflow,
        prefix=prefix,
        shuffle_sentences=shuffle_sentences,
    )
    if with_text and overflow == "error":
        _check_longest(collate)
    return collate


def _with_reports(dataset: Dataset, ids: np.ndarray, policy: str) -> np.ndarray:
    empty = dataset.index["text_chars"][ids] == 0
    if policy == "error" and empty.any():
        first = dataset.index["key"][ids[empty][0]]
        raise UserError(
            f"{int(empty.sum())} of {len(ids)} studies have no report (the first is {first}): set "
            "input.empty_report='drop' to leave them out, or 'prefix' to give them the prefix alone"
        )
    return ids[~empty] if policy == "drop" else ids


def _one_grid(dataset: Dataset, ids: np.ndarray) -> tuple[tuple[int, int], np.dtype]:
    """The in-plane size and dtype that all records share."""
    index = dataset.index
    if not len(ids):
        raise UserError(f"no study of {dataset.name} is left to read: check input.split and input.empty_report")
    kinds = list(zip(index["height"][ids].tolist(), index["width"][ids].tolist(), index["dtype"][ids].tolist()))
    common = max(sorted(set(kinds)), key=kinds.count)
    for i, kind in zip(ids, kinds):
        if kind != common:
            raise UserError(
                f"study {index['key'][i]} has scans of {kind[0]} x {kind[1]} {kind[2]}, most of {dataset.name} has "
                f"{common[0]} x {common[1]} {common[2]}; {_ONE_GRID}"
            )
    return common[:2], np.dtype(common[2])


def _check_longest(collate: StudyReport, candidates: int = 8) -> None:
    """Encodes the longest reports now, so that one that does not fit stops the run at its start.

    The longest in characters need not be the longest in tokens, so the check in `assemble` stays.
    """
    chars = collate.dataset.index["text_chars"][collate.ids]
    # A token is at least one character: what is short enough in characters cannot overflow.
    risky = np.flatnonzero(chars + len(collate.prefix) + 2 > collate.context)
    for i in risky[np.argsort(-chars[risky], kind="stable")][:candidates]:
        study = collate.dataset.record(int(collate.ids[i]))
        texts = [" ".join(study.sentences)] if "text" in collate.keys else study.sentences
        for text in texts:
            collate._encode(collate.prefix + text, study.key)
