"""Plan -> Grain: element k of a Grain `MapDataset` is the ready local batch of step k (numpy).

There is no iterator state: resuming is starting at a step. Batches are the same for any number of workers, threads and
processes, because nothing but the plan and the step decides them.
"""

import inspect
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grain
import numpy as np
from absl import flags
from jaxtyping import Int64

from jaxmed.core import memory
from jaxmed.core.errors import UserError
from jaxmed.core.load import load
from jaxmed.data import plan as planning
from jaxmed.data.plan import PAD, Bucket, Plan, Step
from jaxmed.data.shards import open_dataset, split_ids

# jax is imported in `make` only: worker processes import this module and need none of it.


class _Planned:
    """The plans of all epochs, computed when needed; every process and worker computes the same."""

    def __init__(self, planner: planning.Planner, seed: int, shuffle: bool):
        self._planner, self._seed, self._shuffle = planner, seed, shuffle
        self._cache: dict[int, Plan] = {}
        self._lock = threading.Lock()
        self.steps_per_epoch = len(self.epoch(0).steps)

    def __getstate__(self):
        return {**self.__dict__, "_lock": None, "_cache": {}}

    def __setstate__(self, state):
        self.__dict__.update(state, _lock=threading.Lock())

    def epoch(self, epoch: int) -> Plan:
        with self._lock:
            if epoch not in self._cache:
                while len(self._cache) > 1:  # read-ahead spans at most two epochs
                    self._cache.pop(next(iter(self._cache)))
                self._cache[epoch] = planning.epoch_of(
                    self._planner, seed=self._seed, epoch=epoch, shuffle=self._shuffle
                )
            return self._cache[epoch]

    def step(self, k: int) -> Step:
        epoch, i = divmod(k, self.steps_per_epoch)
        return self.epoch(epoch).steps[i]


class _Source:
    """Random access to the local batches of steps 0 .. length - 1, for Grain."""

    def __init__(self, planned: _Planned, collate, rows: dict[Bucket, np.ndarray], length: int, threads: int):
        self._planned, self._collate, self._rows = planned, collate, rows
        self._length, self._threads = length, threads
        self._start()

    def _start(self) -> None:
        memory.keep_freed()
        self._busy, self._closed = threading.Lock(), False
        self._pool = ThreadPoolExecutor(self._threads, "jaxmed-read") if self._threads > 1 else None

    def __getstate__(self):
        return {k: v for k, v in self.__dict__.items() if k not in ("_busy", "_closed", "_pool")}

    def __setstate__(self, state):
        self.__dict__.update(state)
        self._start()

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, k) -> dict[str, Any]:
        with self._busy:
            if self._closed:
                return {"_error": "the stream was closed"}
            step = self._planned.step(int(k))
            try:
                return self._collate.assemble(step.bucket, step.ids[self._rows[step.bucket]], int(k), self._pool)
            except UserError as e:  # worker processes would wrap it in a traceback of theirs
                return {"_error": str(e)}

    def close(self) -> None:
        """Waits for the batch that is being assembled; later ones are refused."""
        with self._busy:
            self._closed = True
            if self._pool is not None:
                self._pool.shutdown()


class Stream:
    """Planned batches of one split; see `make`.

    Attributes:
      spec: {bucket: {key: jax.ShapeDtypeStruct of the global batch}} for every bucket that occurs.
      steps_per_epoch: the same in every epoch.
      total_steps: steps of all epochs; None if there is no end.
      plan_hash: sha256 over the content of the dataset and every option that decides a batch.
    """

    def __init__(self, collate, planned: _Planned, rows, spec, plan_hash, epochs, workers, threads, prefetch):
        self._collate, self._planned, self._rows = collate, planned, rows
        self._workers, self._threads, self._prefetch = workers, threads, prefetch
        self.spec = spec
        self.plan_hash = plan_hash
        self.steps_per_epoch = planned.steps_per_epoch
        self.total_steps = None if epochs is None else epochs * planned.steps_per_epoch

    def step(self, k: int) -> Step:
        """Bucket and global record ids of step `k`."""
        return self._planned.step(k)

    def records(self, step: int) -> list[str]:
        """Keys of the studies in the global batch of a step."""
        ids = self.step(step).ids
        return [str(key) for key in self._collate.dataset.index["key"][ids[ids != PAD]]]

    def padding(self, step: int) -> dict[str, float]:
        """What a global batch wastes, and its size; see `plan.padding`."""
        return planning.padding(self.step(step), self._collate.elements, self._collate.slots)

    def padding_report(self) -> dict[str, Any]:
        """The same over an epoch, in total and per bucket (see `plan.padding_report`)."""
        return planning.padding_report(self._planned.epoch(0), self._collate.elements, self._collate.slots)

    def batches(self, start: int = 0, stop: int | None = None) -> Iterator[tuple[Bucket, dict[str, np.ndarray]]]:
        """Local batches of steps start .. stop - 1 as (bucket, {key: array}), rows of this process only.

        Stop early with `.close()` on the iterator: it ends threads and workers.

        Raises:
          UserError: a record cannot be read, a report does not fit, or a collate breaks the batch contract.
        """
        end = sys.maxsize if self.total_steps is None else self.total_steps
        stop = end if stop is None else min(stop, end)
        if start >= stop:
            return
        source = _Source(self._planned, self._collate, self._rows, stop, self._threads)
        options = grain.ReadOptions(num_threads=min(1, self._prefetch), prefetch_buffer_size=self._prefetch)
        dataset = grain.MapDataset.source(source)[start:stop].to_iter_dataset(options)
        if self._workers:
            if not flags.FLAGS.is_parsed():  # in notebooks and tests nobody has; Grain's workers insist
                flags.FLAGS.mark_as_parsed()
            dataset = dataset.mp_prefetch(grain.MultiprocessingOptions(self._workers, per_worker_buffer_size=1))
        iterator = iter(dataset)
        try:
            for k in range(start, stop):
                batch = next(iterator)
                if "_error" in batch:
                    raise UserError(batch["_error"])
                bucket = self.step(k).bucket
                self._check(bucket, batch)
                yield bucket, batch
        finally:
            iterator.close()
            source.close()

    def _check(self, bucket: Bucket, batch: Mapping[str, np.ndarray]) -> None:
        """The batch contract: exactly the promised keys, shapes and dtypes."""
        expected = {k: ((len(self._rows[bucket]), *s.shape[1:]), s.dtype) for k, s in self.spec[bucket].items()}
        got = {k: (v.shape, v.dtype) for k, v in batch.items()}
        if got != expected:
            wrong = sorted(k for k in {*got, *expected} if got.get(k) != expected.get(k))
            raise UserError(
                f"collate {type(self._collate).__module__} breaks the batch contract in {', '.join(wrong)}: promised "
                f"{ {k: expected.get(k) for k in wrong} }, made { {k: got.get(k) for k in wrong} }"
            )


def rows_of(sharding, b: int) -> Int64[np.ndarray, "rows"]:
    """The rows (ascending) of a global batch of `b` that devices of this process address.

    Taken from the sharding, not from the process number: on a mesh with a model axis over processes, several processes
    need the same rows.
    """
    rows = set()
    for index in sharding.addressable_devices_indices_map((b,)).values():
        rows.update(range(*index[0].indices(b)))
    return np.array(sorted(rows), np.int64)


def make(
    *,
    dir: str,
    split: str,
    buckets: Mapping[str, Sequence[int]] | None = None,
    batch_size: int | None = None,
    budget: int | None = None,
    collate: str = "study_report",
    source: str = "shards",
    source_options: Mapping[str, Any] | None = None,
    mode: str = "buckets",
    plan_options: Mapping[str, Any] | None = None,
    train: bool = True,
    seed: int = 0,
    shuffle: bool | None = None,
    drop_remainder: bool = False,
    epochs: int | None = None,
    multiple_of: int = 1,
    sharding=None,
    workers: int = 0,
    threads: int = 2,
    prefetch: int = 2,
    verify: str = "fast",
    **options: Any,
) -> Stream:
    """Opens a dataset and plans it.

    Args:
      dir: dataset folder.
      split: which records, by the index column `split`.
      buckets: `{axis: sizes}`, for studies `{"scans": (1, 2, 4, 8), "depth": (16, 32, 48)}`; other modes than
        "buckets" have defaults or fit them to the index.
      batch_size, budget: rows of a global batch, or the padded elements that it may have (for studies: slices).
      collate: module in `data/collate` (or a dotted name); `options` are its options.
      source: "shards", or a module in `data/sources` with `open_dataset(dir, **source_options)`.
      mode, plan_options: how to plan, see `plan.MODES`, and the options of that mode.
      train: random choices in the collate; and the default of `shuffle`. Evaluation (False) is one ordered pass.
      seed: of the order and of the random choices.
      drop_remainder: drop the last incomplete batch of an epoch instead of padding it.
      epochs: how often; default: without end in training, once in evaluation.
      multiple_of: every batch size must be a multiple of this (data shards x accumulation steps).
      sharding: jax sharding of a batch's leading axis; decides which rows this process reads. None: all rows.
      workers: worker processes; 0 reads in this process (usually faster: decoding releases the interpreter lock).
      threads: records read at once, per process.
      prefetch: batches read ahead, per process; 0 reads when asked.
      verify: see `shards.open_dataset`.

    Raises:
      UserError: the dataset is not whole, or options do not fit it.
    """
    import jax

    for field, value, least in (("workers", workers, 0), ("threads", threads, 1), ("prefetch", prefetch, 0)):
        if value < least:
            raise UserError(f"input.{field}={value} must be at least {least}")
    if source == "shards":
        if source_options:
            raise UserError(f"input.source_options={dict(source_options)}: source 'shards' has no options")
        dataset = open_dataset(dir, verify)
    else:
        opener = load("data.sources", source).open_dataset
        _check_options(opener, source_options or {}, "source_options.", f"source {source!r}")
        dataset = opener(dir, **(source_options or {}))
    shuffle = train if shuffle is None else shuffle
    if epochs is None and not train:
        epochs = 1
    if buckets is not None:
        buckets = {axis: tuple(sizes) for axis, sizes in buckets.items()}
    collate_maker = load("data.collate", collate).make
    _check_options(collate_maker, options, "", f"collate {collate!r}")
    made = collate_maker(dataset, split_ids(dataset, split), train=train, seed=seed, buckets=buckets, **options)
    arrange = {"mode": mode, "buckets": buckets, "shuffle": shuffle, "drop_remainder": drop_remainder, "seed": seed}
    if plan_options:
        arrange["plan_options"] = dict(plan_options)
    planner = planning.planner(
        made.sizes,
        made.ids,
        mode=mode,
        buckets=buckets,
        batch_size=batch_size,
        budget=budget,
        multiple_of=multiple_of,
        drop_remainder=drop_remainder,
        keys=dataset.index["key"][made.ids],
        options=plan_options,
    )
    if not planner.steady and epochs != 1:
        raise UserError(
            f"mode {mode!r} with input.plan_options={dict(plan_options or {})} loses records in every epoch, so that "
            "steps cannot be counted in epochs: it plans one epoch (input.epochs=1)"
        )
    planned = _Planned(planner, seed, shuffle)
    sizes = planned.epoch(0).batch_sizes
    return Stream(
        collate=made,
        planned=planned,
        rows={b: np.arange(n) if sharding is None else rows_of(sharding, n) for b, n in sizes.items()},
        spec={
            b: {k: jax.ShapeDtypeStruct(shape, dtype) for k, (shape, dtype) in made.spec(b, n).items()}
            for b, n in sizes.items()
        },
        plan_hash=planning.plan_hash(
            made.sizes, made.ids, dataset.fingerprint, sizes, **arrange, collate=collate, digest=made.digest
        ),
        epochs=epochs,
        workers=workers,
        threads=threads,
        prefetch=prefetch,
    )


def _check_options(function, options: Mapping[str, Any], prefix: str, owner: str) -> None:
    parameters = [p for p in inspect.signature(function).parameters.values() if p.kind == p.KEYWORD_ONLY]
    known = sorted({p.name for p in parameters} - {"train", "seed", "buckets"})
    if unknown := sorted(set(options) - set(known)):
        raise UserError(f"input.{prefix}{unknown[0]} is not an option of {owner}; it has {', '.join(known)}")
    if missing := [p.name for p in parameters if p.name in known and p.default is p.empty and p.name not in options]:
        raise UserError(f"{owner} needs input.{prefix}{missing[0]}")
