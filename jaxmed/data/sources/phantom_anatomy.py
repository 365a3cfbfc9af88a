"""Synthetic heads from real anatomy: the MNI152 average brain, bent into a new head for every subject, with lesions.

The MNI152 (ICBM 152 nonlinear symmetric 2009a) T1, grey- and white-matter maps come with `nilearn`; everything outside
the brain (skull, scalp, face, sinuses, eyes) and every lesion is drawn here. Nothing in it is a patient.

Space: right, anterior, superior millimetres (RAS+); grids have the axes x, y, z. Lengths are in millimetres.
"""

import functools
import importlib.util
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import nibabel
import numpy as np
from jaxtyping import Bool, Float, Int
from scipy import ndimage

Array = np.ndarray

# Tissues of the head, in the order of `Head.tissue`; lesions add parts of their own (see `LESION_PARTS`).
TISSUES = ("grey", "white", "csf", "bone", "fat", "muscle", "fluid", "mucosa", "vessel", "calcium")
# Structures outside the brain, painted on the template once.
_FACE, _SINUS, _EYE, _VESSEL = 1, 2, 3, 4

BOX = ((-100.0, 100.0), (-134.0, 106.0), (-80.0, 106.0))  # what a head may fill
REGIONS = ("frontal", "parietal", "temporal", "occipital", "deep", "cerebellar")
LESIONS = ("hemorrhage", "infarct", "mass", "metastases")
LESION_PARTS = ("clot", "old_clot", "ischemia", "oedema", "solid", "necrosis")


@dataclass(frozen=True)
class Template:
    """The average head on a 2 mm grid.

    Attributes:
      channels: (x, y, z, 5) uint8: grey, white, brain (0-255), 4 x (20 + millimetres outside the brain), structure.
      origin: (3,) mm of voxel 0.
    """

    channels: Array
    origin: Array
    step: float = 2.0


@functools.cache
def template() -> Template:
    """Reads the maps of `nilearn` (half a second, once per process)."""
    folder = Path(importlib.util.find_spec("nilearn").submodule_search_locations[0]) / "datasets" / "data"
    maps = {}
    for name in ("t1", "gm", "wm"):
        image = nibabel.load(folder / f"mni_icbm152_{name}_tal_nlin_sym_09a_converted.nii.gz")
        maps[name] = np.asarray(image.dataobj).astype(np.float32)
        corner = image.affine[:3, 3]

    def halve(x):  # to 2 mm by means, so that nothing aliases
        x = x[: x.shape[0] // 2 * 2, : x.shape[1] // 2 * 2, : x.shape[2] // 2 * 2]
        return x.reshape(x.shape[0] // 2, 2, x.shape[1] // 2, 2, x.shape[2] // 2, 2).mean((1, 3, 5))

    inside = ndimage.binary_fill_holes(halve((maps["t1"] > 0).astype(np.float32)) > 0.5)
    pad = [(10, 10), (10, 10), (10, 10)]
    grey, white = (np.pad(halve(maps[k]), pad) for k in ("gm", "wm"))
    inside = np.pad(inside, pad)
    origin = corner + 0.5 - 20.0
    outside = 2.0 * ndimage.distance_transform_edt(~inside) - 2.0 * ndimage.distance_transform_edt(inside)
    x, y, z = np.meshgrid(*[origin[i] + 2.0 * np.arange(n) for i, n in enumerate(inside.shape)], indexing="ij")

    def ball(centre, radii):
        return sum(((p - c) / r) ** 2 for p, c, r in zip((abs(x), y, z), centre, radii)) < 1

    structure = np.zeros(inside.shape, np.uint8)
    structure[ball((0, 44, -52), (62, 52, 46)) | ball((24, -20, -70), (42, 60, 22))] = _FACE
    structure[ball((0, 74, -34), (14, 14, 14)) | ball((28, 54, -56), (13, 15, 15))] = _SINUS
    structure[ball((32, 64, -28), (12, 12, 12))] = _EYE
    structure[(abs(x) < 5) & (outside > -1) & (outside < 6) & (z > -10)] = _VESSEL
    brain = ndimage.gaussian_filter(inside.astype(np.float32), 0.6) * 255
    distance = np.clip(4 * (20 + outside), 0, 255)
    channels = np.stack([grey, white, brain, distance, structure], -1).astype(np.uint8)
    return Template(channels, origin)


# ---- One subject.


@dataclass
class Head:
    """A subject on a working grid.

    Attributes:
      tissue: (10, x, y, z) float32, fractions of `TISSUES`; what is left to 1 is air.
      mni: (3, x, y, z) float32: where each voxel lies in the template.
      xyz: the three coordinate axes of the grid, mm.
      step: mm between grid points.
      parts: lesion material, painted over the tissue in this order.
    """

    tissue: Array
    mni: Array
    xyz: tuple[Array, Array, Array]
    step: float
    parts: list["Part"] = field(default_factory=list)

    @functools.cached_property
    def regions(self) -> dict[str, Bool[Array, "x y z"]]:
        return region_masks(self.mni)

    def lesion_mask(self, edge: float = 0.5) -> Float[Array, "x y z"]:
        """How much of each voxel is the lesion itself (oedema around it does not count)."""
        mask = np.zeros(self.tissue.shape[1:], np.float32)
        for part in self.parts:
            if part.core:
                mask[part.box] = np.maximum(mask[part.box], part.amount)
        return np.where(mask >= edge, mask, 0)


@dataclass(frozen=True)
class Part:
    """`amount` (0-1) of a material of `LESION_PARTS` inside the box of a grid; `core`: it is the lesion, not oedema."""

    material: str
    box: tuple[slice, slice, slice]
    amount: Array
    core: bool = True


def _spline(n: int, knots: int) -> Float[Array, "n knots"]:
    """Cubic B-spline basis of `knots` equally spaced control points over n grid points."""
    t = np.linspace(0, knots - 3, n, endpoint=False)[:, None] - (np.arange(knots)[None] - 1)
    a = np.abs(t)
    return np.where(a < 1, 2 / 3 - a**2 + a**3 / 2, np.where(a < 2, (2 - a) ** 3 / 6, 0)).astype(np.float32)


def smooth_field(rng: np.random.Generator, shape: Sequence[int], knots: int) -> Float[Array, "*shape"]:
    """A smooth random field of mean 0 and standard deviation near 1."""
    values = rng.standard_normal((knots,) * len(shape)).astype(np.float32)
    for n in shape:  # one axis at a time; each contraction moves the next axis to the front
        values = np.tensordot(values, _spline(n, knots), axes=(0, 1))
    return values * np.float32(1.6)


def head(
    rng: np.random.Generator,
    *,
    step: float = 3.0,
    warp_mm: float = 5.0,
    atrophy: float = 0.0,
    ventricles: float = 1.0,
    sinus: float = 0.0,
) -> Head:
    """A new head: an affine map and an elastic deformation of the template, with its own layers outside the brain.

    Args:
      step: mm of the working grid.
      warp_mm: standard deviation of the elastic displacement.
      atrophy: mm by which the cortex has drawn back from the skull.
      ventricles: linear size of the ventricles against the average.
      sinus: share of the paranasal sinuses that is filled with swollen mucosa.
    """
    xyz = tuple(np.arange(lo, hi, step, dtype=np.float32) for lo, hi in BOX)
    shape = tuple(len(a) for a in xyz)
    grid = [a.reshape([-1 if i == j else 1 for j in range(3)]) for i, a in enumerate(xyz)]

    angles = rng.normal(0, 0.07, 3)
    scale = np.exp(rng.normal(0, 0.05) + rng.normal(0, 0.035, 3))
    shear = np.triu(rng.normal(0, 0.03, (3, 3)), 1)
    matrix = (rotation(angles) @ (np.eye(3) + shear) @ np.diag(1 / scale)).astype(np.float32)
    centre = np.array([0, -18, 8], np.float32)
    shift = rng.normal(0, (2, 4, 4)).astype(np.float32)
    mni = np.empty((3, *shape), np.float32)
    offsets = [grid[j] - centre[j] - shift[j] for j in range(3)]
    for i in range(3):
        mni[i] = sum(matrix[i, j] * offsets[j] for j in range(3)) + centre[i]
        mni[i] += np.float32(warp_mm) * smooth_field(rng, shape, 7)
    # Sampling nearer to the middle of the ventricles makes them larger.
    middle, width = np.array([0, -14, 12], np.float32), np.array([22, 34, 18], np.float32)
    near = np.exp(-0.5 * sum(((mni[i] - middle[i]) / width[i]) ** 2 for i in range(3)))
    pull = np.float32(1 - 1 / ventricles) * near
    for i in range(3):
        mni[i] -= pull * (mni[i] - middle[i])

    source = template()
    size = source.channels.shape[:3]
    index = np.zeros(shape, np.int32)
    within = np.ones(shape, bool)
    for i in range(3):
        at = np.rint((mni[i] - np.float32(source.origin[i])) * np.float32(1 / source.step)).astype(np.int32)
        within &= (at >= 0) & (at < size[i])
        index = index * size[i] + np.clip(at, 0, size[i] - 1)
    found = source.channels.reshape(-1, 5)[index.ravel()].reshape(*shape, 5)
    grey, white, brain = (found[..., k].astype(np.float32) / np.float32(255) for k in range(3))
    distance = found[..., 3].astype(np.float32) / 4 - 20
    structure = np.where(within, found[..., 4], 0)
    outside = np.where(within, 1 - brain, 1)

    def below(limit):  # 1 up to `limit` mm outside the brain, with an edge of one voxel
        return np.clip((np.float32(limit) - distance) * np.float32(1 / step) + np.float32(0.5), 0, 1)

    gap, bone, scalp = rng.uniform(1.5, 4), rng.uniform(4, 8), rng.uniform(3, 9)
    inner, outer, skin = below(gap), below(gap + bone), below(gap + bone + scalp)
    shrunk = below(-atrophy) if atrophy else np.float32(1)
    tissue = np.zeros((len(TISSUES), *shape), np.float32)
    tissue[0], tissue[1] = grey * shrunk, white * shrunk
    tissue[2] = brain - tissue[0] - tissue[1] + outside * inner
    tissue[3] = outside * (outer - inner)
    tissue[4] = outside * (skin - outer)
    face = (structure == _FACE) | (structure == _SINUS) | (structure == _EYE)
    soft = np.where(face, outside * (1 - outer), 0)
    lumps = np.clip(0.5 + 0.5 * smooth_field(rng, shape, 14), 0, 1)
    tissue[4] = np.where(face, soft * lumps, tissue[4])
    tissue[5] = soft * (1 - lumps)
    filled = np.float32(sinus)
    for name, k, amount in (("fluid", _EYE, np.float32(1)), ("mucosa", _SINUS, filled)):
        hollow = (structure == k) & (outside > 0.5)
        tissue[:, hollow] = 0
        tissue[TISSUES.index(name), hollow] = amount
    vessel = (structure == _VESSEL) & (outside > 0.3)
    tissue[:, vessel] *= 0.3
    tissue[TISSUES.index("vessel"), vessel] = 0.7
    np.maximum(tissue, 0, out=tissue)
    tissue /= np.maximum(tissue.sum(0), 1)
    return Head(tissue, mni, xyz, step)


def rotation(angles: Sequence[float]) -> Float[Array, "3 3"]:
    """Rotation by Euler angles (radians) about x, then y, then z."""
    result = np.eye(3)
    for axis, a in enumerate(angles):
        turn = np.eye(3)
        i, j = [k for k in range(3) if k != axis]
        turn[i, i] = turn[j, j] = np.cos(a)
        turn[i, j], turn[j, i] = -np.sin(a), np.sin(a)
        result = turn @ result
    return result


# ---- Where things are.


def region_masks(mni: Float[Array, "3 *n"]) -> dict[str, Bool[Array, "*n"]]:
    """The parts of the brain by rules on template coordinates; both sides."""
    x, y, z = np.abs(mni[0]), mni[1], mni[2]
    cerebellar = (z < -18) & (y < -40) & (z < -0.45 * (y + 40) - 18) & (x < 50)
    deep = (x < 34) & (x > 8) & (y > -32) & (y < 20) & (z > -8) & (z < 24)
    temporal = ~deep & ~cerebellar & (x > 34) & (z < 4) & (y < 12) & (y > -60)
    occipital = ~cerebellar & ~temporal & (y < -68) & (z > -18) & (z < 34)
    frontal = ~deep & ~temporal & (y > 4) & (z > -18)
    parietal = ~deep & (y < -22) & (y > -76) & (z > 28)
    masks = (frontal, parietal & ~occipital, temporal, occipital, deep, cerebellar)
    return dict(zip(REGIONS, masks))


def place(rng: np.random.Generator, head: Head, region: str, side: str, depth_mm: float = 0.0) -> Float[Array, "3"]:
    """A random point (mm) inside the brain tissue of a region and side ("left" or "right").

    Args:
      depth_mm: at least so far from the surface of the brain, where the region has such a place.
    """
    tissue = (head.tissue[0] + head.tissue[1] > 0.7) & head.regions[region]
    x = head.mni[0]
    tissue &= (x < -8) if side == "left" else (x > 8)
    if depth_mm:
        rounds = max(round(depth_mm / head.step), 1)
        inner = ndimage.binary_erosion(head.tissue[:3].sum(0) > 0.5, iterations=rounds)
        if (tissue & inner).any():
            tissue &= inner
    found = np.flatnonzero(tissue)
    if not len(found):  # a strongly deformed head: the side's brain will do
        found = np.flatnonzero((head.tissue[0] + head.tissue[1] > 0.7) & ((x < -8) if side == "left" else (x > 8)))
    at = np.unravel_index(int(rng.choice(found)), x.shape)
    return np.array([axis[i] for axis, i in zip(head.xyz, at)])


# ---- Lesions.


def blob(
    rng: np.random.Generator, head: Head, centre: Array, radii: Array, *, ragged: float = 0.2, reach: float = 1.0
) -> tuple[tuple[slice, slice, slice], Float[Array, "x y z"]]:
    """The box around an irregular ellipsoid, and in it each voxel's distance from the centre in units of the surface.

    Args:
      centre, radii: (3,) mm.
      ragged: how far the surface strays, in radii.
      reach: the box holds everything up to this distance.
    """
    turn = rotation(rng.uniform(-np.pi, np.pi, 3))
    margin = float(radii.max()) * reach * (1 + ragged) + 2 * head.step
    box = tuple(
        slice(int(np.searchsorted(axis, c - margin)), int(np.searchsorted(axis, c + margin)))
        for axis, c in zip(head.xyz, centre)
    )
    local = np.stack(np.meshgrid(*[a[s] - c for a, s, c in zip(head.xyz, box, centre)], indexing="ij"), -1)
    local = local @ turn / radii
    waves = rng.normal(0, 2.2, (3, 4)).astype(np.float32)
    wobble = np.sin(local @ waves + rng.uniform(0, 2 * np.pi, 4)).sum(-1) / 2
    return box, np.sqrt((local**2).sum(-1)) * (1 + ragged * wobble)


def _inside(distance: Array, limit: float, edge: float) -> Float[Array, "x y z"]:
    return np.clip((limit - distance) / max(edge, 1e-3) + 0.5, 0, 1).astype(np.float32)


def _brain(head: Head, box) -> Float[Array, "x y z"]:
    return head.tissue[0][box] + head.tissue[1][box]


def add_hemorrhage(rng: np.random.Generator, head: Head, centre: Array, radius: float) -> None:
    """A compact clot with a thin rim of oedema; its age decides how MR shows it."""
    radii = radius * rng.uniform(0.8, 1.2, 3)
    box, d = blob(rng, head, centre, radii, ragged=0.12, reach=1.6)
    brain, edge = _brain(head, box), head.step / radius
    tissue = head.tissue[:3].sum(0)[box]  # blood pushes the CSF aside
    head.parts.append(Part("oedema", box, _inside(d, 1 + rng.uniform(3, 5) / radius, edge) * brain, core=False))
    material = "old_clot" if rng.random() < 0.25 else "clot"
    head.parts.append(Part(material, box, _inside(d, 1, edge) * tissue))


def add_infarct(rng: np.random.Generator, head: Head, centre: Array, radius: float) -> None:
    """A territory of brain tissue, on one side of the midline, that reaches the surface; the sulci in it stay."""
    radii = radius * rng.uniform(0.75, 1.3, 3)
    box, d = blob(rng, head, centre, radii, ragged=0.28)
    x = head.mni[0][box]
    side = (x > 3) if centre[0] > 0 else (x < -3)
    head.parts.append(Part("ischemia", box, _inside(d, 1, head.step / radius) * _brain(head, box) * side))


def add_mass(rng: np.random.Generator, head: Head, centre: Array, radius: float, *, small: bool = False) -> None:
    """A ring of solid tumour around necrosis, in oedema that follows the white matter."""
    radii = radius * rng.uniform(0.8, 1.2, 3)
    spread = rng.uniform(1.5, 1.9) if small else rng.uniform(1.8, 2.4)
    box, d = blob(rng, head, centre, radii, ragged=0.12, reach=spread + 0.3)
    edge = head.step / radius
    brain = head.tissue[1][box] + 0.35 * head.tissue[0][box]
    tissue = head.tissue[:3].sum(0)[box]
    fingers = 1 + (0 if small else 0.25) * smooth_field(rng, d.shape, 6)
    head.parts.append(Part("oedema", box, _inside(d * fingers, spread, 2 * edge) * brain, core=False))
    head.parts.append(Part("solid", box, _inside(d, 1, edge) * tissue))
    if not small or rng.random() < 0.5:
        hollow = 1 - max(rng.uniform(3, 5) / radius, 0.25)
        head.parts.append(Part("necrosis", box, _inside(d, hollow, edge) * tissue))


def add_spots(rng: np.random.Generator, head: Head, count: int, radius: tuple[float, float]) -> None:
    """Small foci of the white matter, as in small vessel disease; a distractor, not one of `LESIONS`."""
    white = np.flatnonzero(head.tissue[1] > 0.9)
    for at in rng.choice(white, count):
        centre = np.array([a[i] for a, i in zip(head.xyz, np.unravel_index(int(at), head.tissue.shape[1:]))])
        r = rng.uniform(*radius)
        box, d = blob(rng, head, centre, np.full(3, r), ragged=0.1)
        amount = 0.8 * _inside(d, 1, head.step / r) * _brain(head, box)
        head.parts.append(Part("oedema", box, amount, core=False))


def add_calcium(rng: np.random.Generator, head: Head, radius: float) -> None:
    """Harmless calcification of the pineal gland and the choroid plexus."""
    for centre in ((0, -26, 2), (22, -40, 10), (-22, -40, 10)):
        nearest = [int(np.argmin(np.abs(m - c))) for m, c in zip(_axes_of(head), centre)]
        at = np.array([axis[i] for axis, i in zip(head.xyz, nearest)])
        box, d = blob(rng, head, at, np.full(3, radius) * rng.uniform(0.7, 1.3), ragged=0.1)
        amount = _inside(d, 1, head.step / radius)
        tissue = head.tissue[:, *box]
        tissue *= 1 - amount
        tissue[TISSUES.index("calcium")] += amount


def _axes_of(head: Head) -> Iterator[Float[Array, "n"]]:
    """Template coordinates along the three grid lines through the middle of the head."""
    middle = [n // 2 for n in head.tissue.shape[1:]]
    for i in range(3):
        line = tuple(slice(None) if i == j else m for j, m in enumerate(middle))
        yield head.mni[i][line]


def add_cyst(rng: np.random.Generator, head: Head, side: str, radius: float) -> Int[Array, "3"]:
    """An arachnoid cyst in front of a temporal pole: fluid as in the ventricles; a distractor."""
    x = -46.0 if side == "left" else 46.0
    nearest = [int(np.argmin(np.abs(m - c))) for m, c in zip(_axes_of(head), (x, 14.0, -26.0))]
    centre = np.array([axis[i] for axis, i in zip(head.xyz, nearest)])
    box, d = blob(rng, head, centre, radius * rng.uniform(0.8, 1.2, 3), ragged=0.08)
    amount = _inside(d, 1, head.step / radius) * head.tissue[:3].sum(0)[box]
    tissue = head.tissue[:, *box]
    tissue *= 1 - amount
    tissue[2] += amount
    return np.array(nearest)
