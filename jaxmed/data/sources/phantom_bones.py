"""Bones and soft tissue as X-rays see them: how much of every material lies behind each pixel, in closed form.

A body part is a list of solids with known chords: rods (a long bone with its flares, a rib, a finger) and ellipsoids,
in millimetres, x to the patient's left, y down the limb, z to the front; the joint is at the origin. A view turns the
part about y and looks along z. Heads are the exception: those are `phantom_anatomy` heads, summed voxel by voxel.
Everything is synthetic.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from scipy import ndimage

from jaxmed.data.sources import phantom_anatomy as anatomy

Array = np.ndarray

MATERIALS = ("soft", "bone", "metal")
_STEPS = 256  # of a rod's profile


@dataclass(frozen=True)
class Solid:
    """A rod from `a` to `b` with a profile, or (profile None) an ellipsoid around `a` with the radii `b`.

    Attributes:
      a, b: (3,) mm.
      profile: ((s, radius across, radius in depth), ...) mm for s from 0 to 1 along the rod.
      shell: mm of dense bone around a spongy inside; 0 = the same all through.
      bend: mm that the middle of the rod lies aside.
      amount: per mm; below 0 takes away (air in a lung).
      material: one of `MATERIALS`.
      spongy: `amount` of the inside of a shell.
    """

    a: Array
    b: Array
    profile: tuple[tuple[float, float, float], ...] | None = None
    shell: float = 0.0
    bend: float = 0.0
    amount: float = 1.0
    material: str = "bone"
    spongy: float = 0.35


def rod(a, b, *profile, **more) -> Solid:
    """`profile` may hold single radii (round, evenly spaced), or (s, across, depth)."""
    points = [p if isinstance(p, tuple) else (i / max(len(profile) - 1, 1), p, p) for i, p in enumerate(profile)]
    return Solid(np.asarray(a, float), np.asarray(b, float), tuple(points), **{"shell": 2.5, **more})


def ball(centre, radii, **more) -> Solid:
    return Solid(np.asarray(centre, float), np.broadcast_to(np.asarray(radii, float), 3), **{"shell": 2.0, **more})


def flesh(solid: Solid, amount: float = 1.0) -> Solid:
    return Solid(solid.a, solid.b, solid.profile, 0.0, solid.bend, amount, "soft")


# ---- What a solid puts behind each pixel.


def thickness(solid: Solid, x: Float[Array, "h w"], y: Float[Array, "h w"], turn: float) -> Float[Array, "h w"]:
    """Millimetres of a solid behind each point of the picture plane, in units of its `amount`.

    Args:
      x, y: mm in the picture plane.
      turn: radians about y: 0 from the front, pi/2 from the side.
    """
    chord = _ellipsoid if solid.profile is None else _rod
    whole = chord(solid, x, y, turn, 0.0)
    if solid.shell:
        whole -= np.float32(1 - solid.spongy) * chord(solid, x, y, turn, solid.shell)
    return np.float32(solid.amount) * whole


def _turned(point: Array, turn: float) -> tuple[float, float]:
    return float(point[0] * np.cos(turn) + point[2] * np.sin(turn)), float(point[1])


def _ellipsoid(solid: Solid, x: Array, y: Array, turn: float, inward: float) -> Array:
    rx, ry, rz = np.maximum(solid.b - inward, 0.3)
    u, v = _turned(solid.a, turn)
    across = np.sqrt((rx * np.cos(turn)) ** 2 + (rz * np.sin(turn)) ** 2)
    rest = 1 - ((x - np.float32(u)) * np.float32(1 / across)) ** 2 - ((y - np.float32(v)) * np.float32(1 / ry)) ** 2
    return np.float32(2 * rx * rz / across) * np.sqrt(np.maximum(rest, 0))


@functools.lru_cache(maxsize=4096)
def _profile(points: tuple, turn: float, inward: float) -> tuple[Array, Array]:
    """Half widths (mm) along a rod, and the largest chord over the half width."""
    at = np.linspace(0, 1, _STEPS)
    known = np.array(points)
    rx, rz = (np.maximum(np.interp(at, known[:, 0], known[:, k]) - inward, 0.2) for k in (1, 2))
    across = np.sqrt((rx * np.cos(turn)) ** 2 + (rz * np.sin(turn)) ** 2)
    return across.astype(np.float32), (2 * rx * rz / across**2).astype(np.float32)


def _rod(solid: Solid, x: Array, y: Array, turn: float, inward: float) -> Array:
    (u0, v0), (u1, v1) = _turned(solid.a, turn), _turned(solid.b, turn)
    long = float(np.linalg.norm(solid.b - solid.a))
    length = max(float(np.hypot(u1 - u0, v1 - v0)), 1e-3)
    du, dv = ((u1 - u0) / length, (v1 - v0) / length) if length > 1e-3 else (0.0, 1.0)
    px, py = x - np.float32(u0), y - np.float32(v0)
    s = px * np.float32(du / length) + py * np.float32(dv / length)
    d = px * np.float32(-dv) + py * np.float32(du)
    if solid.bend:
        d -= np.float32(4 * solid.bend) * s * (1 - s)
    half, chord = _profile(solid.profile, round(turn, 3), inward)
    at = np.clip(s * np.float32(_STEPS - 1), 0, _STEPS - 1).astype(np.int32)
    width = half[at]
    # Round ends: beyond 0 and 1 the rod goes on as half a ball.
    over = np.maximum(np.maximum(-s, s - 1), 0) * np.float32(length)
    rest = width * width - d * d - over * over
    return chord[at] * np.sqrt(np.maximum(rest, 0)) * np.float32(min(long / length, 1.8))


def box_of(solid: Solid, turn: float) -> tuple[float, float, float, float]:
    """(x0, y0, x1, y1) mm of the picture plane that hold it."""
    if solid.profile is None:
        u, v = _turned(solid.a, turn)
        across = np.hypot(solid.b[0] * np.cos(turn), solid.b[2] * np.sin(turn))
        return u - across, v - solid.b[1], u + across, v + solid.b[1]
    (u0, v0), (u1, v1) = _turned(solid.a, turn), _turned(solid.b, turn)
    margin = float(_profile(solid.profile, round(turn, 3), 0.0)[0].max()) + abs(solid.bend)
    return min(u0, u1) - margin, min(v0, v1) - margin, max(u0, u1) + margin, max(v0, v1) + margin


# ---- Body parts. Each is a function of random numbers in [-1, 1] that makes one person's.


@dataclass(frozen=True)
class Part:
    """`solids` in the order of their drawing; `long`: indices of rods that can break or carry metal; `mm`: what fits
    the longer side of a picture; `turns`: degrees of the usual views."""

    solids: Sequence[Solid]
    long: tuple[int, ...]
    mm: float
    turns: tuple[tuple[float, float], ...]


def _knee(n: Callable[[float], float]) -> Part:
    k = 1 + n(0.1)
    femur = rod((n(4), -190, 0), (0, -16, 0), (0, 14, 14), (0.6, 15, 16), (0.85, 30, 26), (1, 33 * k, 30), shell=4)
    tibia = rod((0, 16, 0), (n(5), 190, -4), (0, 34 * k, 24), (0.1, 30, 22), (0.3, 15, 15), (1, 12, 13), shell=4)
    fibula = rod((31, 30, -18), (29 + n(3), 190, -16), 8, 6, 5.5, 6, bend=n(3), shell=2)
    bones = [femur, tibia, fibula, ball((18, -6, -4), (15, 13, 26)), ball((-18, -5, -4), (15, 14, 27))]
    bones.append(ball((0, -22 + n(5), 34), (20, 22, 9)))
    limb = rod((0, -200, 0), (0, 200, -4), 66 + n(10), 56, 52 + n(6), 50, 52 + n(8), material="soft", shell=0)
    return Part([flesh(limb), *bones], (0, 1), 250, ((-10, 15), (75, 95)))


def _ankle(n: Callable[[float], float]) -> Part:
    tibia = rod((0, -170, 0), (-2, -8, 0), (0, 13, 13), (0.7, 13, 14), (0.92, 23, 20), (1, 25, 20), shell=4)
    fibula = rod((24, -170, -8), (27 + n(2), 10, -6), 6, 5.5, 7, 9, shell=2)
    bones = [tibia, fibula, rod((-22, -10, 2), (-24, 6, 2), 8, 6), ball((0, 14, 6), (21, 13, 27))]
    bones += [ball((2, 36, -26), (15, 17, 38)), ball((0, 28, 42), (24, 11, 14))]
    for i in range(5):
        x = 20 - 10 * i
        bones.append(
            rod((x, 38 - abs(2 - i), 54), (1.4 * x + n(2), 56 + n(3), 118 + 4 * (i == 3)), 6, 4.5, 6, shell=1.5)
        )
    shank = rod((0, -190, 0), (0, 0, -4), 52 + n(8), 46, 36, 36 + n(4), shell=0)
    foot = ball((0, 38, 34), (40 + n(4), 27, 96), shell=0)
    return Part([flesh(shank), flesh(foot), *bones], (0, 1), 220, ((-12, 20), (80, 95)))


def _elbow(n: Callable[[float], float]) -> Part:
    bend = np.radians(12 + 35 * (n(1) + 1))

    def fore(x, y, z):  # the forearm swings forward in the elbow
        return x, y * np.cos(bend) - z * np.sin(bend), y * np.sin(bend) + z * np.cos(bend)

    humerus = rod((0, -165, 0), (0, -8, 0), (0, 11, 11), (0.7, 11, 10), (0.9, 22, 8), (1, 29 + n(2), 9), shell=3.5)
    ulna = rod(fore(-8, -16, -9), fore(-12 + n(3), 165, 0), (0, 10, 11), (0.15, 10, 11), (0.4, 7, 7), (1, 5, 5))
    radius = rod(fore(15, 12, 0), fore(14, 165, 4), (0, 11, 11), (0.05, 11, 11), (0.12, 7, 7), (0.5, 8, 7), (1, 8, 8))
    bones = [humerus, ulna, radius, ball((14, -2, 4), (11, 11, 11)), ball((-8, -1, 2), (13, 12, 11))]
    arm = rod((0, -180, 0), (0, 4, 0), 46 + n(7), 42, 38 + n(4), shell=0)
    forearm = rod((0, 0, 0), fore(0, 180, 2), 38, 40 + n(5), 30, 26, shell=0)
    return Part([flesh(arm), flesh(forearm), *bones], (0, 1, 2), 210, ((-12, 15), (75, 95)))


def _hand(n: Callable[[float], float]) -> Part:
    bones = [
        rod((13, 52, 0), (15, 140, 0), (0, 15, 10), (0.2, 10, 7), (1, 6, 6)),
        rod((-14, 56, 0), (-14, 140, 0), (0, 9, 8), (0.2, 6, 6), (1, 6, 6)),
    ]
    solids = [rod((0, 56, 0), (0, 160, 0), (0, 29, 18), (1, 34 + n(5), 24), shell=0)]
    solids.append(ball((0, 2, 0), (41 + n(3), 46, 15), shell=0))
    for i in range(8):  # the carpus
        bones.append(ball((15 - 10 * (i % 4) + n(1), 42 - 13 * (i // 4) + n(1), n(3)), 7 + n(1), shell=1))
    spread = 1 + 0.35 * n(1)
    for i, (length, angle) in enumerate(((1.0, -0.62), (1.15, -0.17), (1.2, 0.0), (1.1, 0.14), (0.9, 0.33))):
        angle, at = angle * spread + n(0.02), np.array([22 - 11.0 * i, 24.0 if i else 34.0, 0.0])
        for k, (mm, r) in enumerate(((58, 4.6), (38, 4.2), (23, 3.6), (16, 3.2))):
            if i == 0 and k == 3:
                continue
            mm = mm * length * (0.78 if i == 0 else 1)
            end = at + mm * np.array([-np.sin(angle), -np.cos(angle), 0.0])
            bones.append(rod(at, end, 1.35 * r, 0.85 * r, 0.85 * r, 1.3 * r, shell=1.3))
            if k:
                solids.append(rod(at, end, 9, 8.5, shell=0))
            at = end + 2.0 * (end - at) / mm
    return Part([*(flesh(s, 0.8) for s in solids), *bones], (0, 1, 13, 17, 21), 250, ((-15, 15), (25, 50)))


def _shoulder(n: Callable[[float], float]) -> Part:
    lift = np.radians(10 + 14 * n(1))
    down = np.array([np.sin(lift), np.cos(lift), 0.0])
    start = np.array([34.0, 8.0, 0.0])
    humerus = rod(start, start + 175 * down, (0, 21, 21), (0.08, 23, 22), (0.2, 14, 14), (1, 11, 11), shell=3.5)
    bones = [humerus, ball((26, 2, 0), (24 + n(1), 24, 23)), ball((2, 10, -6), (6, 20, 15))]
    bones.append(rod((-8, 12, -14), (-44, 118 + n(6), -22), (0, 16, 6), (0.3, 38, 3), (0.9, 13, 3), (1, 8, 3), shell=1))
    bones.append(rod((-52, -6, -28), (18, -22, 4), 5, 6, 9, shell=1.5))
    bones.append(rod((-128, 6, 24), (14, -28, 8), 9, 6.5, 6, 8, bend=8 + n(4), shell=2))
    for i in range(5):
        bones.append(
            rod((-150, 20 + 27 * i, -20), (-46 - 3 * i, 50 + 30 * i, 10), 5, 6, 5, bend=-16 - 3 * i, shell=1.2)
        )
    trunk = flesh(ball((-130, 130, 0), (118 + n(10), 175, 88), shell=0))
    lung = Solid(np.array([-112.0, 120, 0]), np.array([62.0, 125, 70]), None, 0.0, 0.0, -0.75, "soft")
    arm = flesh(rod(start - 6, start + 190 * down, 50 + n(6), 46, 40 + n(6), shell=0))
    return Part([trunk, lung, arm, *bones], (0, 5), 290, ((-15, 20), (-35, -15)))


def _spine(n: Callable[[float], float]) -> Part:
    bones, y, curve = [], -170.0, 18 * n(1)
    for i in range(8):
        tall, wide = 22 + 1.4 * i, 19 + 1.2 * i
        x, z = curve * (y / 170) ** 2, 18 * np.cos(y / 90)
        bones.append(
            rod(
                (x, y, z),
                (x, y + tall, z),
                (0, wide, 0.75 * wide),
                (0.5, 0.9 * wide, 0.68 * wide),
                (1, wide, 0.75 * wide),
            )
        )
        for side in (-1, 1):
            bones.append(ball((x + side * 0.7 * wide, y + 9, z - 20), (5, 7, 6), shell=1.5))
            bones.append(
                rod((x + side * 18, y + 9, z - 22), (x + side * (40 + n(4)), y + 6 + n(3), z - 26), 4, 5, 3, shell=1)
            )
        bones.append(rod((x, y + 10, z - 30), (x, y + 24, z - 62), (0, 4, 6), (1, 4, 9), shell=1))
        y += tall + 8 + n(1)
    bones.append(rod((0, y + 2, 0), (0, y + 80, -26), (0, 44, 18), (1, 12, 9)))
    for side in (-1, 1):
        bones.append(
            rod((side * 48, y + 70, -14), (side * 120, y - 30, 6), (0, 26, 9), (0.6, 50, 8), (1, 30, 8), shell=2)
        )
        for k in (0, 1):
            bones.append(
                rod(
                    (side * 22, -160 + 32 * k, -24),
                    (side * 112, -120 + 34 * k, 10),
                    5,
                    6,
                    5,
                    bend=-side * 14,
                    shell=1.2,
                )
            )
    trunk = flesh(ball((0, -10, 10), (160 + n(14), 330, 108 + n(10)), shell=0), 0.75)
    return Part([trunk, *bones], (6, 12, 18, 24), 330, ((-8, 10), (80, 95)))


PARTS: dict[str, Callable[[Callable[[float], float]], Part]] = {
    "knee": _knee,
    "ankle": _ankle,
    "elbow": _elbow,
    "hand": _hand,
    "shoulder": _shoulder,
    "spine": _spine,
}
HEAD = "skull"
REGIONS = (*PARTS, HEAD)


# ---- Heads: voxels of `phantom_anatomy`.

HEAD_MM, HEAD_TURNS = 270.0, ((-10, 10), (80, 95))


def neck() -> list[Solid]:
    """What a head stands on."""
    solids = [flesh(rod((0, 40, 10), (0, 260, 0), 50, 54, 62, shell=0))]
    for i in range(6):
        solids.append(rod((0, 66 + 22 * i, 14), (0, 81 + 22 * i, 14), 13, 12, 14, shell=2))
    return solids


_DENSE = {"bone": 1.0, "calcium": 0.5}


def head_volumes(rng: np.random.Generator, step: float = 4.0) -> tuple[Float[Array, "2 x y z"], float]:
    """Soft tissue and bone (fractions) of a new head on a grid of `step` mm."""
    head = anatomy.head(rng, step=step, warp_mm=5.0)
    dense = sum(share * head.tissue[anatomy.TISSUES.index(k)] for k, share in _DENSE.items())
    return np.stack([head.tissue.sum(0) - dense, dense]), step


def head_thickness(
    volumes: Float[Array, "2 x y z"], step: float, x: Float[Array, "h w"], y: Float[Array, "h w"], turn: float
) -> Float[Array, "2 h w"]:
    """Millimetres of soft tissue and bone behind each point, the head turned about its long axis.

    The sum runs along the axis of the grid that is nearest to the view; slices are shifted for the rest of the turn.
    """
    quarter = round(turn / (np.pi / 2))
    slope = np.tan(turn - quarter * np.pi / 2)
    found = []
    for volume in volumes:
        slices = volume.transpose(1, 2, 0) if quarter % 2 == 0 else volume.transpose(0, 2, 1)  # (depth, z, across)
        depth, width = slices.shape[0], slices.shape[2]
        reach = int(np.ceil(abs(slope) * depth / 2)) + 1
        flat = np.zeros((slices.shape[1], width + 2 * reach + 1), np.float32)
        for j, plane in enumerate(slices):
            shift = slope * (j - (depth - 1) / 2) + reach
            first = int(np.floor(shift))
            part = np.float32(shift - first)
            flat[:, first : first + width] += (1 - part) * plane
            flat[:, first + 1 : first + 1 + width] += part * plane
        fine = ndimage.zoom(flat, 2, order=3, mode="grid-constant", grid_mode=True)
        rows = 2 * ((flat.shape[0] - 1) / 2 - y / step) + 0.5
        columns = 2 * (reach + (width - 1) / 2 + x / step) + 0.5
        found.append(ndimage.map_coordinates(fine, [rows, columns], order=1, mode="constant") * np.float32(step))
    return np.maximum(np.stack(found), 0)
