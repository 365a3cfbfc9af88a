"""Embeddings of a split, computed once: later calls with the same weights, data and options read them from a file.

CACHE/<hash>.npz     images: `id`, `image` (n, z) or (n, p, z), `scale`, `scale_report`; reports: `id`, `text`, `report`
CACHE/<hash>.json    what they were computed from; the hash is that of this file's content
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Int

from jaxmed import predict_model, predict_prompts, predict_studies
from jaxmed.core import sharding
from jaxmed.core.errors import UserError
from jaxmed.core.files import write_arrays, write_file
from jaxmed.core.load import load
from jaxmed.core.tree import params_sha256
from jaxmed.data import shards
from jaxmed.evals import features
from jaxmed.evals.prompts import Prompts

VERSION = 1  # of what the embeddings are; a change makes old files unused
Arrays = dict[str, np.ndarray]


class Embedder:
    """A model and a dataset, and the embeddings of one by the other.

    Attributes:
      loaded: the model; dataset: the shards.
      params_sha256: of the weights.
      computed, reused: splits whose images or reports were embedded, or read from the cache.

    Raises:
      UserError: model or dataset cannot be read.
    """

    def __init__(self, ckpt: str, data: str, cache: str | Path, *, batch: int = 8, vocab: str | None = None):
        self.dataset = shards.open_dataset(data)
        values = self.dataset.manifest["recipe"].get("value_range")
        self.loaded = predict_model.load_model(ckpt, value_range=tuple(values) if values else None)
        self.params_sha256 = params_sha256(jax.device_get(self.loaded.params))
        self.computed: list[str] = []
        self.reused: list[str] = []
        self._data, self._cache, self._batch, self._vocab = data, Path(cache), batch, vocab
        self._mesh = sharding.make_mesh()
        self._state = {"params": jax.device_put(self.loaded.params, sharding.replicated(self._mesh)), "step": 0}
        self._predict = {
            name: jax.jit(lambda state, batch, fn=fn: fn(state["params"], {}, batch))
            for name, fn in self.loaded.predict_fns.items()
        }
        text = load("models", self.loaded.model["name"]).make_text_tower(self.loaded.model)
        self._positions, self._vocab_size = text.max_positions, text.vocab_size
        self._tokenizer = None

    @property
    def tokenizer(self):
        """Of the text tower; read when first needed."""
        if self._tokenizer is None:
            self._tokenizer = predict_prompts.tokenizer(self.loaded.text, self._vocab, self._vocab_size)
        return self._tokenizer

    def images(self, split: str) -> Arrays:
        """`id`, `image` (n, z) or (n, p, z) and the scales (see `features.of_token`), records in ascending order.

        Raises:
          UserError: the split does not exist, a study does not fit the model, or its features are no numbers.
        """
        ids = shards.split_ids(self.dataset, split)
        buckets = self._buckets(ids)
        about = {"what": "images", "split": split, "buckets": buckets}
        return self._cached(about, f"images of {split}", lambda: self._embed_images(split, buckets))

    def reports(self, split: str) -> Arrays:
        """`id` of the records that have a report, `text` (m, z) of the m distinct reports, and `report` (n,): which one
        each record has. Longer reports than the text tower takes are cut.

        Raises:
          UserError: there are none.
        """
        prefix = self.loaded.text.get("prefix", "")
        about = {"what": "reports", "split": split, "prefix": prefix, "vocab": self.tokenizer.digest}
        return self._cached(about, f"reports of {split}", lambda: self._embed_reports(split, prefix))

    def classifier(self, prompts: Prompts) -> np.ndarray:
        """(z, classes): never cached, it takes seconds."""
        return prompts.classifier(self._embed_ids, self.tokenizer, self._positions)

    def _embed_ids(self, ids: Int[np.ndarray, "n t"]) -> np.ndarray:
        with jax.set_mesh(self._mesh):
            return features.embed_ids(self._predict, self._mesh, self._state, ids)

    def _embed_images(self, split: str, buckets: Mapping[str, Sequence[int]]) -> Arrays:
        multiple = sharding.batch_size_multiple(self._mesh)
        rows = -(-self._batch // multiple) * multiple
        input = dict(dir=self._data, split=split, buckets=buckets, batch_size=rows)
        with jax.set_mesh(self._mesh):
            stream = features.open_stream(input, self._mesh, ("image",))
            got = features.embed_tokens(self._predict, stream, self._mesh, self._state, progress=f"images of {split}")
        order = np.argsort(got["_id"])
        image = got["image"][order].astype(np.float32)
        bad = ~np.isfinite(image).reshape(len(image), -1).all(1)
        if bad.any():
            key = self.dataset.index["key"][got["_id"][order][bad][0]]
            raise UserError(f"{self._data}: the features of {bad.sum()} studies are no numbers; the first is {key}")
        scales = {k: got[k] for k in ("scale", "scale_report") if k in got}
        return {"id": got["_id"][order], "image": image} | scales

    def _embed_reports(self, split: str, prefix: str) -> Arrays:
        ids = shards.split_ids(self.dataset, split)
        ids = ids[self.dataset.index["text_chars"][ids] > 0]
        if not len(ids):
            raise UserError(f"{self._data}, split {split!r}: there are no reports; give prep a manifest with them")
        texts = [prefix + " ".join(self.dataset.record(int(i)).sentences) for i in ids]
        distinct, report = np.unique(np.array(texts), return_inverse=True)
        longest = max(len(self.tokenizer.ids(t)) for t in distinct)
        context = min(self._positions, -(-longest // 8) * 8)
        tokens = self.tokenizer.encode(distinct.tolist(), context, overflow="truncate")
        return {"id": ids, "text": self._embed_ids(tokens), "report": report.reshape(-1)}

    def _buckets(self, ids: np.ndarray) -> dict[str, list[int]]:
        index, patch = self.dataset.index, self.loaded.tower.patch
        plane = (int(index["height"][ids].min()), int(index["width"][ids].min()))
        shallow = index["depth"][ids] < patch[0]
        if shallow.any() or plane[0] < patch[1] or plane[1] < patch[2]:
            key = index["key"][ids[int(shallow.argmax())]]
            need = "x".join(map(str, patch))
            raise UserError(
                f"{self._data}: no scan of study {key} fills a patch of {need} voxels: prepare with the recipe of the "
                "training data"
            )
        return {
            "scans": sorted({predict_studies.scans_of(int(n)) for n in index["scans"][ids]}),
            "depth": sorted({predict_studies.depth_of(int(n), patch[0]) for n in index["depth"][ids]}),
        }

    def _cached(self, about: dict[str, Any], title: str, compute: Callable[[], Arrays]) -> Arrays:
        about = {
            "version": VERSION,
            "params_sha256": self.params_sha256,
            "model": self.loaded.model,
            "data": self.dataset.fingerprint,
            **about,
        }
        content = (json.dumps(about, indent=1, sort_keys=True) + "\n").encode()
        path = self._cache / hashlib.sha256(content).hexdigest()[:32]
        arrays, description = path.with_suffix(".npz"), path.with_suffix(".json")
        if description.exists() and arrays.exists():
            try:
                with np.load(arrays) as saved:
                    found = {k: saved[k] for k in saved.files}
            except (OSError, ValueError) as e:
                raise UserError(f"{arrays}: cannot be read ({e}); delete it to compute it again") from None
            self.reused.append(title)
            return found
        found = compute()
        try:
            self._cache.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            raise UserError(f"--cache={self._cache}: cannot be written ({e.strerror})") from None
        if jax.process_index() == 0:
            write_arrays(arrays, found)
            write_file(description, content)  # last: without it the arrays do not count
        self.computed.append(title)
        return found
