"""Recipes: how a scan becomes what is stored, as data.

A recipe is a list of named steps and one flat table of options. It is printed by `--list-recipes`, changed by
`--recipe.option=value`, and stored whole in the manifest of the shards, so that nothing about the voxels is folklore.
"""

import ast
import dataclasses
import inspect
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from jaxmed.core.errors import UserError
from jaxmed.data import ops
from jaxmed.data.record import DTYPES
from jaxmed.prep.scan import RawScan, ReadOptions

AIR = -1024.0  # HU outside of a CT
# More than this many degrees between the slice axis and the slice normal is a tilt, not the noise of a header.
TILT = 0.5


@dataclasses.dataclass
class Grid:
    """A scan on its way through the steps of a recipe."""

    voxels: np.ndarray  # (d, h, w)
    affine: np.ndarray  # (4, 4) index -> RAS+ mm
    name: str
    meta: dict[str, Any]
    air: float  # what lies outside of the scan: AIR for CT, else 0

    def to(self, voxels: np.ndarray, to_old: np.ndarray) -> "Grid":
        return dataclasses.replace(self, voxels=voxels, affine=self.affine @ to_old)


# Steps: (grid, options by keyword) -> grids.


def orient(grid: Grid, *, axes: str, slice_first: bool) -> list[Grid]:
    """Flips and permutes to the directions `axes`, then the axis of the largest spacing to the front if asked."""
    if axes == "keep":
        return [grid]
    return [grid.to(*ops.reorient(grid.voxels, grid.affine, axes, slice_first))]


def upright(grid: Grid, *, deskew: bool) -> list[Grid]:
    """Resamples a tilted scan to an orthogonal grid if asked; else it keeps its sheared affine."""
    if deskew and tilt(grid.affine) > TILT:
        return [grid.to(*ops.deskew(grid.voxels, grid.affine, grid.air))]
    return [grid]


def respace(grid: Grid, *, spacing: tuple) -> list[Grid]:
    """Trilinear to `spacing` mm per voxel."""
    return [grid.to(*ops.resample(grid.voxels, ops.spacing_of(grid.affine), spacing))]


def percentile(grid: Grid, *, percentiles: tuple) -> list[Grid]:
    """Clips to percentiles of the whole volume and stores min .. max as 0 .. 255."""
    return [dataclasses.replace(grid, voxels=ops.truncate_uint8(ops.percentile_unit(grid.voxels, *percentiles)))]


def slice_grid(grid: Grid, *, resize: int, slices: int, crop: int) -> list[Grid]:
    """Square, in-plane side `resize`, `slices` slices, centre crop to `crop`; 0 leaves that as the scan has it."""
    voxels, to_old = ops.slice_grid(grid.voxels, resize_to=resize, slices=slices, crop=crop, fill=grid.air)
    if grid.voxels.dtype == np.uint8:
        voxels = np.rint(voxels).astype(np.uint8)
    return [grid.to(voxels, to_old)]


def windows(grid: Grid, *, windows: dict) -> list[Grid]:
    """One scan per CT window (level, width), each 0 .. 255, named `<name>_<window>`."""
    return [
        dataclasses.replace(
            grid,
            voxels=ops.window_uint8(grid.voxels, level, width),
            name=f"{grid.name}_{window}",
            meta={**grid.meta, "window": [level, width]},
        )
        for window, (level, width) in windows.items()
    ]


def box(grid: Grid, *, value_range: tuple, mode: str, size: tuple, crop: str, foreground: str) -> list[Grid]:
    """Clips HU to `value_range`, brings the volume to `size`, stores int16.

    `mode`: "crop" pads and crops, "resize" distorts, "whole" keeps the size. `crop`: "foreground" places the window on
    the `foreground` ("lungs" or "body"), "center" is blind.
    """
    _one_of("mode", mode, ("crop", "resize", "whole"))
    _one_of("crop", crop, ("foreground", "center"))
    _one_of("foreground", foreground, ("lungs", "body"))
    low, high = value_range
    voxels, to_old = np.clip(grid.voxels, low, high), np.eye(4)
    if mode == "resize":
        voxels, to_old = ops.resize(voxels, size)
    elif mode == "crop":
        at = ops.chest_offset(grid.voxels, size, foreground) if crop == "foreground" else None
        voxels, to_old = ops.pad_crop(voxels, size, low, at)
    return [grid.to(np.rint(voxels).astype(np.int16), to_old)]


def cast(grid: Grid, *, dtype: str) -> list[Grid]:
    """Stores one dtype for the whole data set: rounds and clips to it. "auto": as the scan has it, see `one_dtype`."""
    _one_of("dtype", dtype, ("auto", *DTYPES))
    if dtype == "auto" or grid.voxels.dtype == dtype:
        return [grid]
    voxels = grid.voxels
    if dtype != "float32":
        limits = np.iinfo(dtype)
        voxels = np.clip(np.rint(voxels), limits.min, limits.max)
    return [dataclasses.replace(grid, voxels=voxels.astype(dtype))]


STEPS: dict[str, Callable[..., list[Grid]]] = {
    f.__name__: f for f in (orient, upright, respace, percentile, slice_grid, windows, box, cast)
}


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Attributes:
    about: one line for `--list-recipes`.
    modalities: of the scans it takes; "" is a file that does not say (NIfTI, NRRD); empty = all.
    steps: names in `STEPS`, in order.
    options: flat; every step takes its own by name, `value_range` (stored values that mean 0 and 1 to the model,
      None = not fixed by the recipe) may be read by none.
    channels: takes (d, h, w, c) too.
    read: options of `scan.ReadOptions` and `skip_names` that differ from their defaults.
    """

    name: str
    about: str
    modalities: tuple[str, ...]
    steps: tuple[str, ...]
    options: dict[str, Any]
    read: dict[str, Any] = dataclasses.field(default_factory=dict)
    channels: bool = False

    def describe(self) -> dict[str, Any]:
        """What is stored in the manifest of the shards: plain JSON values."""
        plain = dataclasses.asdict(self)
        plain["value_range"] = plain["options"].get("value_range")
        plain["steps"] = [{"step": s, **{k: self.options[k] for k in _keywords(STEPS[s])}} for s in self.steps]
        del plain["options"]
        return plain

    def grid(self) -> tuple[int, int, int] | None:
        """(d, h, w) of what it stores, None where that differs from scan to scan."""
        o = self.options
        if "slice_grid" in self.steps and o["slices"] and (o["crop"] or o["resize"]):
            return (o["slices"], *(o["crop"] or o["resize"],) * 2)
        if "box" in self.steps and o["mode"] != "whole":
            return tuple(o["size"])
        return None

    def scan_bytes(self) -> int:
        """About how many bytes one series takes uncompressed, for the size of shards; 0 = as large as it comes."""
        if (grid := self.grid()) is None:
            return 0
        each = 2 if "box" in self.steps else max(1, len(self.options.get("windows", ())))
        return each * int(np.prod(grid))


_SLICES = {"deskew": False, "axes": "IPR", "slice_first": True, "resize": 256, "slices": 48, "crop": 224}
_CHEST = {
    "deskew": False,
    "axes": "SPL",
    "slice_first": False,
    "spacing": (3.0, 1.0, 1.0),
    "value_range": (-1150, 350),
    "mode": "crop",
    "size": (112, 336, 336),
    "crop": "foreground",
    "foreground": "lungs",
}

# Three reconstructions of CT-RATE are dropped by name, as the reference does. The others of a study become its scans;
# HLIP trains on one random reconstruction per study and epoch: a batch bucket with scans=(1,) draws it.
_CT_RATE = {"max_volumes": 1, "skip_names": "seg|mask|label|train_(1267_a_4|11755_a_[34])$"}

RECIPES = {
    r.name: r
    for r in (
        Recipe(
            "hlip_brain_mri",
            "brain MRI: head to foot, thick axis first, 0.5/99.5 percentiles to uint8, 48x224x224 "
            "(HLIP; slices=0 resize=0 crop=0 stores the native grid, as Pub-Brain-5 does)",
            ("MR", ""),
            ("upright", "orient", "percentile", "slice_grid"),
            {**_SLICES, "percentiles": (0.5, 99.5), "value_range": (0, 255)},
            # Of a diffusion or time series the first two volumes, as two scans: without and with diffusion weighting.
            {"max_volumes": 2},
        ),
        Recipe(
            "hlip_head_ct",
            "head CT: each series as three scans, the blood, bone and brain windows (level, width), uint8 48x224x224 "
            "(HLIP; its levels were never published, these are the usual ones)",
            ("CT", ""),
            ("upright", "orient", "slice_grid", "windows"),
            {
                **_SLICES,
                "windows": {"blood": (80, 200), "bone": (600, 2800), "brain": (40, 80)},
                "value_range": (0, 255),
            },
            {"max_volumes": 1},
        ),
        Recipe(
            "hlip_chest_ct",
            "chest CT: 3x1x1 mm, 112x336x336 around the lungs, int16 HU clipped to -1150..350 (HLIP without its blind "
            "centre crop, and in one orientation)",
            ("CT", ""),
            ("upright", "orient", "respace", "box"),
            _CHEST,
            _CT_RATE,
        ),
        Recipe(
            "hlip_chest_ct_published",
            "chest CT as HLIP was trained: the file's own orientation, blind centre crop (for its published weights)",
            ("CT", ""),
            ("upright", "orient", "respace", "box"),
            {**_CHEST, "axes": "keep", "crop": "center"},
            _CT_RATE,
        ),
        Recipe(
            "native",
            "any scan in its own grid, orientation and values; the scans of a study in one dtype that holds them "
            "(batches need one dtype over all studies: dtype=int16 or another rounds and clips to it)",
            (),
            ("orient", "cast"),
            {"axes": "keep", "slice_first": False, "dtype": "auto", "value_range": None},
            channels=True,
        ),
        Recipe(
            "radiograph",
            "projection radiographs (DICOM, PNG, JPEG): each image a record of native size, stored values in uint16; "
            "windows, tables and inversion are kept beside them for training to apply",
            ("CR", "DX", "RG", "MG", "XA", "RF", "IO", "PX", "OT", ""),
            (),
            {"value_range": (0, 65535)},
            {"projections": True},
        ),
    )
}


def apply(recipe: Recipe, raw: RawScan) -> list[dict[str, Any]]:
    """The scans that a recipe makes of one, as the record stores them (see `data.record.encode`).

    Float64 is halved on entry, everything else keeps the dtype that the reader found.
    """
    voxels = raw.voxels.astype(np.float32) if raw.voxels.dtype == np.float64 else raw.voxels
    affine = np.asarray(raw.affine, np.float64)
    meta = {k: v for k, v in {"modality": raw.modality, **raw.meta}.items() if v not in (None, "")}
    ct = raw.modality == "CT" or "CT" in recipe.modalities
    name = "ct" if ct and raw.name == "unknown" else raw.name
    grids = [Grid(voxels, affine, name, meta, AIR if ct else 0.0)]
    for step in recipe.steps:
        function = STEPS[step]
        keywords = {k: recipe.options[k] for k in _keywords(function)}
        grids = [new for old in grids for new in function(old, **keywords)]
    return [
        {
            "voxels": g.voxels,
            "affine": g.affine,
            "source_affine": affine,
            "source_shape": tuple(int(n) for n in voxels.shape[:3]),
            "name": g.name,
            "meta": g.meta,
        }
        for g in grids
    ]


def one_dtype(scans: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The scans of a study in one dtype that a record can hold: theirs, else the smallest that holds all exactly.

    Integers beyond 16 bits become float32, which holds them exactly up to 2^24; float64 is rounded to float32.
    """
    kinds = {s["voxels"].dtype.newbyteorder("=").name for s in scans}
    if len(kinds) == 1 and kinds <= set(DTYPES):
        return scans
    fitting: list[str] = []
    if all(s["voxels"].dtype.kind in "iub" for s in scans):
        low, high = min(int(s["voxels"].min()) for s in scans), max(int(s["voxels"].max()) for s in scans)
        integers = (d for d in DTYPES if d != "float32")
        fitting = [d for d in integers if np.iinfo(d).min <= low and high <= np.iinfo(d).max]
    dtype = fitting[0] if fitting else "float32"
    return [{**s, "voxels": np.asarray(s["voxels"], dtype)} for s in scans]


def tilt(affine: np.ndarray) -> float:
    """Degrees between the slice axis and the normal of the slices."""
    d, h, w = np.asarray(affine, np.float64)[:3, :3].T
    normal = np.cross(h, w)
    cosine = abs(d @ normal) / (np.linalg.norm(d) * np.linalg.norm(normal))
    return float(np.degrees(np.arccos(min(1.0, cosine))))


def get(name: str, overrides: Iterable[tuple[str, str]] = ()) -> Recipe:
    """A recipe with some of its options changed.

    Args:
      overrides: (option, text), e.g. ("slices", "24"), ("size", "112,256,256"), ("windows.blood", "80,200"),
        ("modalities", "CT").

    Raises:
      UserError: no such recipe or option, or a value of another type.
    """
    if name not in RECIPES:
        raise UserError(f"--recipe={name}: there is no such recipe; choose one of {', '.join(RECIPES)}")
    recipe = RECIPES[name]
    options = {**recipe.options, "modalities": recipe.modalities}
    for key, text in overrides:
        head, _, entry = key.partition(".")
        flag = f"--recipe.{key}={text}"
        if head not in options or (entry and not isinstance(options[head], dict)):
            raise UserError(f"{flag}: recipe {name} has no such option; it has {', '.join(options)}")
        default = options[head]
        if entry:
            some = next(iter(default.values()))
            options[head] = {**default, entry: _parse(flag, text, default.get(entry, some))}
        else:
            options[head] = _parse(flag, text, default)
    modalities = options.pop("modalities")
    recipe = dataclasses.replace(recipe, options=options, modalities=modalities)
    _check(recipe)
    return recipe


def read_options(recipe: Recipe, overrides: Iterable[tuple[str, str]] = ()) -> dict[str, Any]:
    """`skip_names` and the fields of `scan.ReadOptions`: defaults, what the recipe wants, what the user wants.

    Raises:
      UserError: `--read.x=...` with an unknown name or a value of another type.
    """
    options = {"skip_names": "seg|mask|label", **dataclasses.asdict(ReadOptions()), **recipe.read}
    for key, text in overrides:
        flag = f"--read.{key}={text}"
        if key not in options:
            raise UserError(f"{flag}: there is no such reading option; there are {', '.join(options)}")
        if key == "max_volumes" and text.lower() in ("none", "all"):
            options[key] = None
        else:
            options[key] = _parse(flag, text, 0 if key == "max_volumes" else options[key])
    return options


def _parse(flag: str, text: str, default: Any) -> Any:
    """Text as a value of the type of `default`."""
    if isinstance(default, str):
        return text
    if isinstance(default, bool):
        if text.lower() not in ("true", "false"):
            raise UserError(f"{flag}: expected true or false")
        return text.lower() == "true"
    if isinstance(default, tuple) and (not default or isinstance(default[0], str)):
        return tuple(part.strip() for part in text.split(","))
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        value = text
    if default is None and text.lower() == "none":
        return None
    if default is None:
        default = (0.0, 1.0)
    value = tuple(value) if isinstance(value, list) else value
    if isinstance(default, tuple):
        numbers = isinstance(value, tuple) and all(_is_number(v) for v in value)
        if not numbers or len(value) != len(default):
            raise UserError(f"{flag}: expected {len(default)} numbers like {','.join(map(str, default))}")
        return value
    if isinstance(default, dict):
        some = next(iter(default.values()))
        if not isinstance(value, dict) or not value or not all(isinstance(v, tuple) for v in value.values()):
            raise UserError(f"{flag}: expected a table like {default}")
        return {str(k): _parse(flag, repr(v), some) for k, v in value.items()}
    if not _is_number(value) or (isinstance(default, int) and not isinstance(value, int)):
        raise UserError(
            f"{flag}: expected {'a whole number' if isinstance(default, int) else 'a number'} like {default}"
        )
    return type(default)(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _check(recipe: Recipe) -> None:
    o = recipe.options
    where = f"recipe {recipe.name}"
    if "axes" in o and o["axes"] != "keep":
        pairs = {ops.CODES.find(c) // 2 for c in o["axes"]}
        if len(o["axes"]) != 3 or pairs != {0, 1, 2}:
            raise UserError(
                f"{where}: axes={o['axes']!r}; give three directions, one each of R/L, A/P and S/I (d, h, w grow "
                "towards them), e.g. IPR, or keep"
            )
    for name in ("slices", "resize", "crop"):
        if isinstance(o.get(name), int) and o[name] < 0:
            raise UserError(f"{where}: {name}={o[name]} must be 0 or more")
    for name in ("spacing", "size"):
        if name in o and (min(o[name]) <= 0 or (name == "size" and not all(isinstance(v, int) for v in o[name]))):
            raise UserError(f"{where}: {name}={o[name]} must be positive{' whole numbers' if name == 'size' else ''}")
    if "percentiles" in o and not 0 <= o["percentiles"][0] < o["percentiles"][1] <= 100:
        raise UserError(f"{where}: percentiles={o['percentiles']} must be two of 0..100, the lower first")
    if o.get("value_range") and o["value_range"][0] >= o["value_range"][1]:
        raise UserError(f"{where}: value_range={o['value_range']} must be two numbers, the lower first")
    if any(width <= 0 for _, width in o.get("windows", {}).values()):
        raise UserError(f"{where}: every window is (level, width) with a positive width")
    if "dtype" in o:
        _one_of("dtype", o["dtype"], ("auto", *DTYPES))
    if "box" in recipe.steps:
        _one_of("mode", o["mode"], ("crop", "resize", "whole"))
        _one_of("crop", o["crop"], ("foreground", "center"))
        _one_of("foreground", o["foreground"], ("lungs", "body"))


def _one_of(option: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise UserError(f"--recipe.{option}={value}: choose one of {', '.join(known)}")


def _keywords(function: Callable) -> list[str]:
    return [p.name for p in inspect.signature(function).parameters.values() if p.kind is p.KEYWORD_ONLY]
