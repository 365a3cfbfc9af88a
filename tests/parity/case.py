"""Golden files: what they hold, which reader they need, how their tensors are compared."""

import importlib
import json
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

GROUPS = ("param", "input", "output", "grad")
MODES = ("abs+rel", "scaled", "abs")
# What may lie beside goldens and is not one.
DOCUMENTS = {".md"}
DATA = {"sizes_public.npz"}


class NotGolden(Exception):
    """A file without what a golden needs: tensors named by group, a kind and a tolerance."""


@dataclass(frozen=True)
class Case:
    """A golden file as its reader sees it: everything but the values that are expected.

    Attributes:
      name: "folder/stem", for messages.
      kind: which reader it needs.
      config: every hyper-parameter.
      param, input: tensors by the rest of their name.
      wanted: full names of the tensors to produce, "output/..." and "grad/...".
    """

    name: str
    path: Path
    kind: str
    config: dict
    param: dict[str, np.ndarray]
    input: dict[str, np.ndarray]
    wanted: frozenset[str]

    def pick(self, produced: dict) -> dict:
        """Those of many intermediates that this file pins."""
        return {k: v for k, v in produced.items() if k in self.wanted}


def load(path: Path) -> tuple[Case, dict[str, np.ndarray]]:
    """The case and the tensors expected of it, by full name.

    Raises:
      NotGolden: the file is no safetensors file, or lacks a kind, a tolerance or something to produce.
    """
    tensors: dict[str, dict[str, np.ndarray]] = {g: {} for g in GROUPS}
    try:
        with safe_open(path, framework="np") as f:
            metadata = f.metadata() or {}
            for key in f.keys():  # noqa: SIM118 (not a dict)
                group, _, rest = key.partition("/")
                if group not in GROUPS or not rest:
                    raise NotGolden(f"tensor {key!r} is in none of the groups {', '.join(GROUPS)}")
                tensors[group][rest] = f.get_tensor(key)
    except (SafetensorError, OSError) as e:
        raise NotGolden(f"not a safetensors file ({e})") from None
    try:
        config = json.loads(metadata["config"])
        kind, tolerance = config["kind"], config["tolerance"]
        known = tolerance["mode"] in MODES and all(float(tolerance[g]) >= 0 for g in ("output", "grad"))
    except (KeyError, TypeError, ValueError) as e:
        raise NotGolden(f"its `config` metadata lacks a kind or a tolerance ({e!r})") from None
    if not known:
        raise NotGolden(f"unknown tolerance {tolerance}")
    expected = {f"{g}/{k}": x for g in ("output", "grad") for k, x in tensors[g].items()}
    if not expected:
        raise NotGolden("nothing to produce: no output/* and no grad/* tensors")
    name = f"{path.parent.name}/{path.stem}"
    return Case(name, path, kind, config, tensors["param"], tensors["input"], frozenset(expected)), expected


def files(root: Path) -> list[Path]:
    """Every file below `root` that has to be a golden (or `root` itself)."""
    if root.is_file():
        return [root]
    found = (p for p in root.rglob("*") if p.is_file())
    return sorted(p for p in found if p.suffix not in DOCUMENTS and p.name not in DATA)


def modules() -> list:
    """All reader modules, whatever they are called."""
    package = importlib.import_module("tests.parity.readers")
    return [importlib.import_module(f"{package.__name__}.{m.name}") for m in pkgutil.iter_modules(package.__path__)]


def find_reader(case: Case, available: list | None = None) -> tuple[Callable, dict[str, str]]:
    """The reader of a case and {prefix: reason} of what may wait.

    The kind alone decides; where two systems share a kind, `config.system` or else a folder of the path does.

    Raises:
      LookupError: no reader, or several.
    """
    available = modules() if available is None else available
    having = [m for m in available if case.kind in m.READERS]
    if not having:
        known = sorted({k for m in available for k in m.READERS})
        raise LookupError(f"no reader for kind {case.kind!r}; known: {', '.join(known)}")
    if len({m.SYSTEM for m in having}) > 1:
        named = {case.config["system"]} if "system" in case.config else set(case.path.parts)
        having = [m for m in having if m.SYSTEM in named]
    if len(having) != 1:
        raise LookupError(
            f"kind {case.kind!r} needs one reader, found {[m.__name__ for m in having]}; "
            "say which system it is in config.system or by the folder's name"
        )
    module = having[0]
    waiting = {p: why for (kind, p), why in getattr(module, "WAITING", {}).items() if kind == case.kind}
    return module.READERS[case.kind], waiting


def error(got, ref: np.ndarray, mode: str, tolerance: float) -> tuple[float, float]:
    """How far `got` is from `ref`, in the unit of the tolerance, and the tolerance; integers and booleans are exact.

    Not-a-number equals not-a-number, infinity equals itself.
    """
    got = np.asarray(got)
    if got.shape != ref.shape:
        raise AssertionError(f"shape {got.shape}, expected {ref.shape}")
    if ref.dtype.kind in "biu":
        if got.dtype.kind not in "biu":
            raise AssertionError(f"dtype {got.dtype}, expected {ref.dtype}")
        return float(np.max(np.abs(got.astype(np.int64) - ref.astype(np.int64)), initial=0)), 0.0
    got, ref = got.astype(np.float64), ref.astype(np.float64)
    same = (got == ref) | (np.isnan(got) & np.isnan(ref))
    with np.errstate(invalid="ignore"):
        difference = np.where(same, 0.0, np.abs(got - ref))
    difference = np.where(np.isfinite(difference), difference, np.inf)
    size = np.abs(np.where(np.isfinite(ref), ref, 0.0))
    if mode == "abs+rel":
        difference = difference / (1.0 + size)
    elif mode == "scaled" and difference.any():
        top = size.max()
        difference = difference / top if top > 0 else np.where(difference > 0, np.inf, 0.0)
    return float(difference.max(initial=0.0)), tolerance
