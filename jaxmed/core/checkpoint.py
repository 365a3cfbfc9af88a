"""Checkpoints: the only file that knows orbax.

A checkpoint is the folder `<workdir>/checkpoints/<step>` with one item per part of the train state (so that weights
can be read without the optimiser) and `meta`, a JSON dict. It is written asynchronously under a temporary name and
renamed when whole: a run killed at any moment leaves only whole checkpoints.
"""

import contextlib
import functools
import logging
import re
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from jaxmed.core import tree, weights
from jaxmed.core.errors import UserError

_policies = ocp.training.preservation_policies


class Checkpoints:
    """The checkpoints of one run.

    Args:
      directory: created if it does not exist.
      keep: how many of the latest to keep.
    """

    def __init__(self, directory: str | Path, *, keep: int = 2):
        self.directory = Path(directory).absolute()
        self.directory.mkdir(parents=True, exist_ok=True)
        self._closed = False
        self._orbax = ocp.training.Checkpointer(
            self.directory,
            save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(1),
            preservation_policy=_policies.LatestN(keep),
            cleanup_tmp_directories=True,
        )

    @property
    def latest(self) -> int | None:
        """The step of the newest whole checkpoint."""
        return None if self._orbax.latest is None else int(self._orbax.latest.step)

    def save(self, step: int, train_state: dict[str, Any], meta: dict[str, Any]) -> None:
        """Starts saving; returns as soon as the values are copied off the devices. Saving a step again does nothing.

        Raises:
          UserError: this or the previous save could not be written (a full disk, for one).
        """
        if self.latest == step:
            return
        meta = {**meta, "shapes": shapes(train_state["params"])}
        try:
            self._orbax.save_checkpointables_async(step, {**_stored(train_state), "meta": meta}, force=True)
        except Exception as e:
            raise self._failed("write", step, e) from e

    def meta(self, step: int) -> dict[str, Any]:
        """What `save` was given as `meta`, and the shape of every parameter as "shapes"."""
        try:
            with _quiet():
                return self._orbax.load_checkpointables(step, {"meta": None})["meta"]
        except Exception as e:
            raise self._failed("read", step, e) from e

    def load(self, step: int, abstract_state: dict[str, Any]) -> dict[str, Any]:
        """The train state of a step, laid out as `abstract_state` (`ShapeDtypeStruct`s with shardings) says.

        Raises:
          UserError: the checkpoint is damaged, or its parameters have other names or shapes.
        """
        compare(self.meta(step)["shapes"], abstract_state["params"], self.directory / str(step))
        try:
            with _quiet():
                loaded = self._orbax.load_checkpointables(step, _stored(abstract_state))
            return {k: loaded.get(k, v) for k, v in abstract_state.items()}
        except Exception as e:
            raise self._failed("read", step, e) from e

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind, error, traceback) -> None:
        """Waits for the save under way also when something else has failed (and lets that be the message)."""
        with contextlib.suppress(*([UserError] if error else [])):
            self.close()

    def close(self) -> None:
        """Waits for the save under way.

        Raises:
          UserError: it failed.
        """
        if self._closed:
            return
        self._closed = True
        try:
            self._orbax.wait()
            self._orbax.close()
        except Exception as e:
            raise self._failed("write", self.latest, e) from e

    def _failed(self, verb: str, step, error: Exception) -> UserError:
        text = " ".join(str(error).split())
        full = any(s in text for s in ("No space left", "RESOURCE_EXHAUSTED", "Disk quota", "File too large"))
        others = [c.step for c in self._orbax.checkpoints if c.step != step]
        if verb == "write":
            fix = "the disk is full: free space and start the same command again" if full else "check the disk"
        elif others:
            fix = f"delete {self.directory / str(step)} to go on from step {max(others)}, or use another --workdir"
        else:
            fix = f"delete {self.directory / str(step)} to start again, or use another --workdir"
        return UserError(
            f"checkpoint {self.directory / str(step)}: cannot {verb} it; {fix} ({type(error).__name__}: {text[:120]})"
        )


def _stored(train_state: dict[str, Any]) -> dict[str, Any]:
    """Parts that have arrays; orbax stores no empty trees (the aux of most objectives)."""
    return {k: v for k, v in train_state.items() if jax.tree.leaves(v)}


@contextlib.contextmanager
def _quiet():
    """A damaged file makes background tasks of orbax print pages; the caller raises one clear line instead."""
    logger = logging.getLogger("asyncio")
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    _hush()
    try:
        yield
    finally:
        logger.setLevel(level)


@functools.cache
def _hush() -> None:
    """What orbax still has under way when reading fails complains, from threads, that its event loop is gone."""
    others = sys.unraisablehook

    def hook(unraisable):
        if "Event loop is closed" not in str(unraisable.exc_value):
            others(unraisable)

    sys.unraisablehook = hook
    warnings.filterwarnings("ignore", "coroutine .*_background_load. was never awaited", RuntimeWarning)


def shapes(params) -> dict[str, list[int]]:
    return {name: list(x.shape) for name, x in tree.flatten(params).items()}


def compare(stored: dict[str, list[int]], params, path: Path, hint: str = "") -> None:
    """Raises UserError naming the first parameter of `params` that a checkpoint lacks or has in another shape."""
    for name, shape in shapes(params).items():
        if name not in stored:
            raise UserError(
                f"checkpoint {path}: it has no parameter {name!r}; was it made with another config.model?{hint}"
            )
        if list(stored[name]) != shape:
            raise UserError(
                f"checkpoint {path}: parameter {name!r} has shape {tuple(stored[name])}, "
                f"the model wants {tuple(shape)}{hint}"
            )
    extra = sorted(set(stored) - set(shapes(params)))
    if extra:
        raise UserError(f"checkpoint {path}: the model has no parameter {extra[0]!r} ({len(extra)} such in all){hint}")


def load_part(directory: str | Path, part: str, abstract) -> Any:
    """One part ("params", "aux", ...) of the newest checkpoint below a workdir, or of the checkpoint folder itself.

    Raises:
      UserError: there is no checkpoint, it is damaged, or its parameters differ from `abstract`.
    """
    path = find(directory)
    if part == "params":
        compare(_meta(path)["shapes"], abstract, path)
    return _load(path, part, abstract)


def load_params(directory: str | Path) -> dict[str, np.ndarray]:
    """All parameters of the newest checkpoint below a workdir (or of the folder itself) as {"a/b/c": array}.

    Raises:
      UserError: there is no checkpoint, or it is damaged.
    """
    path = find(directory)
    one = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    try:
        with _quiet():
            stored = ocp.checkpointables_metadata(path).metadata["params"]
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=one), stored)
    except Exception as e:
        raise _unreadable(path, "params", e) from e
    return {name: np.asarray(x) for name, x in tree.flatten(_load(path, "params", abstract)).items()}


def start_from(source: str | Path, params, *, leave: Sequence[str] = ()) -> tuple[Any, list[str]]:
    """`params` with the values that another run, or a file of ported weights, has for them.

    Args:
      source: a workdir or checkpoint folder, a folder that `jaxmed.port` wrote, or its .safetensors file.
      params: initialised parameters; values are cast to their dtype and laid out like them. If nothing is left,
        `ShapeDtypeStruct`s with shardings are enough.
      leave: regexes of paths. What matches keeps its value in `params`, and is left in the source.

    Returns:
      The parameters, and the paths of those that kept their value.

    Raises:
      UserError: there are no weights, they are damaged, or a parameter that is not left is missing, has another shape
        or is too much (names it, with both shapes); a regex matches nothing.
    """
    path, stored = Path(source), None
    if path.is_dir() and (path / weights.PARAMS).is_file():
        path = path / weights.PARAMS
    if path.is_file():
        stored = weights.shapes(path)
        if not any(name in stored for name in tree.flatten(params)):
            raise UserError(
                f"{path}: its tensors have other names than this model ({min(stored, default='none')!r}); "
                "published weights go through python -m jaxmed.port first"
            )
    else:
        path = find(path)
        stored = _meta(path)["shapes"]
    flat = tree.flatten(params)
    tree.check_rules(leave, {**stored, **flat}, "config.init_except")

    def left(name: str) -> bool:
        return any(re.search(pattern, name) for pattern in leave)

    wanted = {name: x for name, x in flat.items() if not left(name)}
    hint = "" if leave else "; config.init_except=(regex, ...) leaves parameters out on both sides"
    compare({n: s for n, s in stored.items() if not left(n)}, wanted, path, hint)
    if path.is_file():
        read = weights.read(path)
        values = {name: _place(read[name], x) for name, x in wanted.items()}
    else:
        abstract = {n: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding) for n, x in wanted.items()}
        values = tree.flatten(_load(path, "params", tree.unflatten(abstract), some=True))
    return tree.map_with_path(lambda name, x: values.get(name, x), params), [n for n in flat if n not in wanted]


def _place(x: np.ndarray, like) -> jax.Array:
    x = x.astype(like.dtype)
    return jax.make_array_from_callback(x.shape, like.sharding, lambda index: x[index])


def _meta(path: Path) -> dict[str, Any]:
    try:
        with _quiet():
            return ocp.load_checkpointables(path, {"meta": None})["meta"]
    except Exception as e:
        raise _unreadable(path, "meta", e) from e


def _load(path: Path, part: str, abstract, *, some: bool = False) -> Any:
    """`some`: of the stored arrays only those that are in `abstract`."""
    partial = ocp.options.PyTreeOptions(loading=ocp.options.PyTreeOptions.Loading(partial_load=some))
    try:
        with _quiet(), ocp.Context(pytree_options=partial):
            return ocp.load_checkpointables(path, {part: abstract})[part]
    except Exception as e:
        raise _unreadable(path, part, e) from e


def _unreadable(path: Path, part: str, error: Exception) -> UserError:
    text = " ".join(str(error).split())[:120]
    return UserError(f"checkpoint {path}: cannot read its {part} ({type(error).__name__}: {text})")


def find(directory: str | Path) -> Path:
    """The newest checkpoint folder below a workdir (or the folder itself).

    Raises:
      UserError: there is none.
    """
    path = Path(directory).absolute()
    for root in (path / "checkpoints", path):
        steps = [p for p in root.glob("*") if p.name.isdigit()] if root.is_dir() else []
        if steps:
            return max(steps, key=lambda p: int(p.name))
    if path.name.isdigit() and path.is_dir():
        return path
    raise UserError(f"no checkpoint in {path}: expected {path / 'checkpoints'}/<step>, or a <step> folder")
