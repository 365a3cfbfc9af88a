"""Checkpoints: the only file that knows orbax.

A checkpoint is the folder `<workdir>/checkpoints/<step>` with one item per part of the train state (so that weights
can be read without the optimiser) and `meta`, a JSON dict. It is written asynchronously under a temporary name and
renamed when whole: a run killed at any moment leaves only whole checkpoints.
"""

import contextlib
import logging
from pathlib import Path
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

from jaxmed.core import tree
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
        text = " ".join(str(error).split())[:300]
        full = any(s in text for s in ("No space left", "RESOURCE_EXHAUSTED", "Disk quota", "File too large"))
        others = [c.step for c in self._orbax.checkpoints if c.step != step]
        if verb == "write":
            fix = "the disk is full: free space and start the same command again" if full else "check the disk"
        elif others:
            fix = f"delete {self.directory / str(step)} to go on from step {max(others)}, or use another --workdir"
        else:
            fix = f"delete {self.directory / str(step)} to start again, or use another --workdir"
        return UserError(
            f"checkpoint {self.directory / str(step)}: cannot {verb} it; {fix} ({type(error).__name__}: {text})"
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
    try:
        yield
    finally:
        logger.setLevel(level)


def shapes(params) -> dict[str, list[int]]:
    return {name: list(x.shape) for name, x in tree.flatten(params).items()}


def compare(stored: dict[str, list[int]], params, path: Path) -> None:
    """Raises UserError naming the first parameter of `params` that a checkpoint lacks or has in another shape."""
    for name, shape in shapes(params).items():
        if name not in stored:
            raise UserError(f"checkpoint {path}: it has no parameter {name!r}; was it made with another config.model?")
        if list(stored[name]) != shape:
            raise UserError(
                f"checkpoint {path}: parameter {name!r} has shape {tuple(stored[name])}, the model wants {tuple(shape)}"
            )
    extra = sorted(set(stored) - set(shapes(params)))
    if extra:
        raise UserError(f"checkpoint {path}: the model has no parameter {extra[0]!r} ({len(extra)} such in all)")


def load_part(directory: str | Path, part: str, abstract) -> Any:
    """One part ("params", "aux", ...) of the newest checkpoint below a workdir, or of the checkpoint folder itself.

    Raises:
      UserError: there is no checkpoint, it is damaged, or its parameters differ from `abstract`.
    """
    path = find(directory)
    try:
        with _quiet():
            if part == "params":
                compare(ocp.load_checkpointables(path, {"meta": None})["meta"]["shapes"], abstract, path)
            return ocp.load_checkpointables(path, {part: abstract})[part]
    except UserError:
        raise
    except Exception as e:
        text = " ".join(str(e).split())[:300]
        raise UserError(f"checkpoint {path}: cannot read its {part} ({type(e).__name__}: {text})") from e


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
