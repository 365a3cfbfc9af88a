"""Transforms of volumes: what the goldens do not pin (they run in tests/parity: kinds prep_* and scan_sampling)."""

import itertools

import numpy as np
import pytest

from jaxmed.data import ops

RNG = np.random.default_rng(0)


def oblique(spacing=(5.0, 0.9, 0.7), angles=(0.2, -0.3, 0.1), shear=0.0) -> np.ndarray:
    """An affine of (d, h, w) with rotation, anisotropy, an offset, and slices shifted by `shear` mm each along h."""
    a, b, c = angles
    turn = np.array([[1, 0, 0], [0, np.cos(a), -np.sin(a)], [0, np.sin(a), np.cos(a)]])
    turn = turn @ [[np.cos(b), 0, np.sin(b)], [0, 1, 0], [-np.sin(b), 0, np.cos(b)]]
    turn = turn @ [[np.cos(c), -np.sin(c), 0], [np.sin(c), np.cos(c), 0], [0, 0, 1]]
    axes = turn @ np.array([[0, 0, -1], [0, -1, 0], [1, 0, 0]], float)  # d -> S, h -> P, w -> L
    affine = np.eye(4)
    affine[:3, :3] = axes * np.array(spacing)
    affine[:3, 0] += shear * axes[:, 1]
    affine[:3, 3] = (12.0, -34.0, 56.0)
    return affine


def positions(shape, affine) -> np.ndarray:
    """(d, h, w, 3) world position of every voxel."""
    grid = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1).astype(float)
    return grid @ affine[:3, :3].T + affine[:3, 3]


DIRECTIONS = [
    "".join(letters) for order in itertools.permutations(("RL", "AP", "SI")) for letters in itertools.product(*order)
]


@pytest.mark.parametrize("axes", DIRECTIONS[::5])
@pytest.mark.parametrize("slice_first", [False, True])
def test_reorient_moves_voxels_with_their_place_in_the_patient(axes, slice_first):
    affine = oblique()
    x = RNG.normal(size=(4, 5, 6)).astype(np.float32)
    out, to_old = ops.reorient(x, affine, axes, slice_first)
    new = affine @ to_old
    if not slice_first:
        assert ops.axis_codes(new) == axes
    else:
        assert sorted(ops.axis_codes(new)) == sorted(axes) and np.argmax(ops.spacing_of(new)) == 0
    np.testing.assert_allclose(np.linalg.norm(new[:3, :3]), np.linalg.norm(affine[:3, :3]))
    where = {tuple(np.round(p, 6)): v for p, v in zip(positions(x.shape, affine).reshape(-1, 3), x.ravel())}
    for p, v in zip(positions(out.shape, new).reshape(-1, 3), out.ravel()):
        assert where[tuple(np.round(p, 6))] == v
    np.testing.assert_array_equal(ops.back_to_source(out, new, affine, x.shape), x)


def test_axis_codes_serve_the_largest_cosine_first():
    assert ops.axis_codes(np.eye(4)) == "RAS"
    assert ops.axis_codes(oblique()) == "SPL" and len(DIRECTIONS) == 48
    double = np.eye(4)  # d and h both point mostly along x: the better one gets it
    double[:3, :3] = np.array([[0.8, 0.6, 0], [0.9, 0.3, np.sqrt(0.1)], [0, 0, 1]]).T
    assert ops.axis_codes(double) == "ARS"


def test_equal_spacings_keep_the_order_and_noise_does_not_count():
    affine = np.diag([1.0, 1.0 + 1e-6, 1.0, 1.0])
    out, to_old = ops.reorient(np.zeros((2, 3, 4)), affine, "RAS", slice_first=True)
    assert out.shape == (2, 3, 4) and np.array_equal(to_old, np.eye(4))


@pytest.mark.parametrize("size", [(7, 9, 30), (3, 40, 5), (5, 11, 13)])
def test_resize_reads_where_its_matrix_says(size):
    shape = (5, 11, 13)
    for axis in range(3):
        ramp = np.broadcast_to(np.arange(shape[axis]).reshape([-1 if a == axis else 1 for a in range(3)]), shape)
        out, to_old = ops.resize(ramp.astype(np.int16), size)
        at = positions(size, to_old)[..., axis]
        np.testing.assert_allclose(out, np.clip(at, 0, shape[axis] - 1), atol=1e-5)


def test_resample_truncates_the_size_and_keeps_one_voxel():
    out, to_old = ops.resample(np.ones((9, 8, 1), np.int16), (1.5, 0.7, 0.2), (3, 1, 1))
    assert out.shape == (4, 5, 1) and out.dtype == np.float32
    np.testing.assert_allclose(np.diag(to_old), [9 / 4, 8 / 5, 1, 1])


@pytest.mark.parametrize(("old", "new", "offset"), [(7, 10, -1), (10, 7, 1), (8, 11, -1), (11, 8, 1), (4, 4, 0)])
def test_odd_voxel_goes_to_the_end_when_padding_and_the_crop_floors(old, new, offset):
    out, to_old = ops.pad_crop(np.arange(1, old + 1, dtype=np.int16).reshape(old, 1, 1), (new, 1, 1), -5)
    assert to_old[0, 3] == offset and out.dtype == np.int16
    for i, v in enumerate(out.ravel()):
        j = i + offset
        assert v == (j + 1 if 0 <= j < old else -5)


def test_a_crop_that_misses_the_volume_is_empty():
    out, _ = ops.pad_crop(np.ones((2, 2, 2), np.uint8), (2, 2, 2), 7, (5, 0, 0))
    assert (out == 7).all()


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((30, 21, 40), {"resize_to": 32, "slices": 12, "crop": 28}),
        ((5, 40, 21), {"resize_to": 32, "slices": 12, "crop": 28}),
        ((9, 20, 20), {"resize_to": 0, "slices": 0, "crop": 0}),
        ((9, 20, 12), {"resize_to": 0, "slices": 4, "crop": 16}),
    ],
)
def test_slice_grid_reads_where_its_matrix_says(shape, options):
    for axis in range(3):
        ramp = np.broadcast_to(
            np.arange(1.0, shape[axis] + 1).reshape([-1 if a == axis else 1 for a in range(3)]), shape
        )
        out, to_old = ops.slice_grid(ramp, fill=np.nan, **options)
        n = (options["slices"] or shape[0], *(s if not options["crop"] else options["crop"] for s in shape[1:]))
        assert out.shape == n
        at = positions(out.shape, to_old)
        inside = np.isfinite(out)  # what touches the padding is NaN
        assert inside.mean() > 0.3
        error = np.abs(out - 1 - np.clip(at[..., axis], 0, shape[axis] - 1))[inside]
        assert error.max() < (0.5 + 1e-6 if axis == 0 else 1e-4)  # slices are picked, not mixed
        assert np.isnan(out[np.any((at[..., 1:] < -1) | (at[..., 1:] > np.array(shape[1:])), -1)]).all()


def test_percentiles_of_floats_reach_255_and_of_integers_254():
    x = RNG.normal(300, 100, size=(6, 7, 8))
    assert ops.truncate_uint8(ops.percentile_unit(x.astype(np.float32))).max() == 255
    assert ops.truncate_uint8(ops.percentile_unit(x.astype(np.int16))).max() == 254
    assert ops.percentile_unit(x.astype(np.int16)).dtype == np.float64


def test_window():
    hu = np.array([-1000, 0, 40, 80, 3000], np.int16)
    np.testing.assert_array_equal(ops.window_uint8(hu, 40, 80), [0, 0, 128, 255, 255])


@pytest.mark.parametrize("shear", [0.0, 1.8, -1.8])
def test_deskew_keeps_every_voxel_where_it_is_in_the_patient(shear):
    affine = oblique(shear=shear)
    shape = (9, 16, 14)
    weights = np.array([1.0, -2.0, 0.5])
    x = positions(shape, affine) @ weights  # linear in the world: interpolation is exact
    out, to_old = ops.deskew(x, affine, np.nan)
    new = affine @ to_old
    axes = new[:3, :3] / ops.spacing_of(new)
    np.testing.assert_allclose(axes.T @ axes, np.eye(3), atol=1e-9)
    np.testing.assert_allclose(ops.spacing_of(new), [5.0, 0.9, 0.7], atol=1e-9)
    kept = np.isfinite(out)
    old = positions(out.shape, to_old)
    kept &= np.all((old >= -1e-6) & (old <= np.array(shape) - 1 + 1e-6), -1)
    assert kept.sum() > 0.95 * x.size
    np.testing.assert_allclose(out[kept], (positions(out.shape, new) @ weights)[kept], atol=1e-3)
    corners = np.array([[0, 0, 0], np.array(shape) - 1])
    there = np.linalg.inv(new) @ affine @ np.c_[corners, [1, 1]].T
    assert (there[:3] > -1e-6).all() and (there[:3].T - np.array(out.shape) + 1 < 1e-6).all()
    assert out.shape == shape if not shear else out.shape[1] > shape[1]


def test_back_to_source_is_exact_for_permutations_crops_and_labels():
    affine = oblique()
    x = RNG.integers(0, 1 << 28, size=(5, 9, 8)).astype(np.int32)
    turned, a = ops.reorient(x, affine, "SPL", slice_first=True)
    cut, b = ops.pad_crop(turned, (6, 6, 12), -1)
    back = ops.back_to_source(cut, affine @ a @ b, affine, x.shape, fill=-3, nearest=True)
    assert back.dtype == np.int32
    kept = back != -3
    np.testing.assert_array_equal(back[kept], x[kept])
    assert kept.sum() == 5 * 6 * 8  # the crop took 3 of 9 rows, nothing else
    mask = np.zeros((4, 4, 4), bool)
    mask[1] = True
    assert ops.back_to_source(mask, np.eye(4), np.eye(4), (4, 4, 4), nearest=True).dtype == bool


def test_back_to_source_of_a_resized_map():
    shape, affine = (10, 30, 28), oblique()
    _, to_old = ops.resize(np.zeros(shape), (5, 15, 14))
    ramp = positions((5, 15, 14), affine @ to_old) @ np.array([1.0, 2.0, 3.0])
    back = ops.back_to_source(ramp, affine @ to_old, affine, shape)
    inner = (slice(1, -1),) * 3
    np.testing.assert_allclose(back[inner], (positions(shape, affine) @ np.array([1.0, 2.0, 3.0]))[inner], atol=1e-2)
    assert np.isfinite(back).all()  # the outer half voxels belong to the map too


def chest(shape=(60, 100, 120), center=(20, 42, 70)) -> np.ndarray:
    """HU: a body with two lungs around `center`, bowel gas below, a table."""
    d, h, w = np.ogrid[: shape[0], : shape[1], : shape[2]]
    hu = np.full(shape, -1000.0)
    hu[((h - 45) / 38) ** 2 + ((w - 62) / 52) ** 2 + 0 * d < 1] = 40
    for side in (-16, 16):
        lung = ((d - center[0]) / 14) ** 2 + ((h - center[1]) / 18) ** 2 + ((w - center[2] - side) / 12) ** 2
        hu[lung < 1] = -850
    hu[((d - 52) / 4) ** 2 + ((h - 40) / 5) ** 2 + ((w - 60) / 5) ** 2 < 1] = -900
    hu[:, 90:92, 10:110] = 200
    return hu


def test_chest_window_follows_the_lungs_where_the_blind_one_cuts_them():
    hu = chest()
    size = (32, 40, 64)
    mask = ops.lungs(hu)
    assert (hu[mask] == -850).all() and mask.sum() > 0.95 * (hu == -850).sum()

    def kept(offset):
        return ops.pad_crop(mask, size, False, offset)[0].sum() / mask.sum()

    assert kept(ops.chest_offset(hu, size)) > 0.99 > 0.8 > kept(None)
    offset = ops.chest_offset(hu, size)
    np.testing.assert_allclose(np.array(offset) + np.array(size) / 2, (20, 42, 70), atol=5)
    assert ops.chest_offset(hu, (80, 120, 140)) == ops.center_offset(hu.shape, (80, 120, 140))  # all fits: centred
    solid = np.where(hu < -500, -1000.0, 40.0)
    solid[hu == -850] = 40  # no lungs: the body decides
    np.testing.assert_allclose(ops.chest_offset(solid, (60, 80, 90))[1:], (45 - 40, 62 - 45), atol=6)
    assert ops.chest_offset(np.full((9, 9, 9), -1000.0), (5, 5, 5)) == [2, 2, 2]


def test_foreground_offset_prefers_the_middle_of_equals():
    mask = np.zeros((20, 10, 10), bool)
    mask[14:17] = True
    assert ops.foreground_offset(mask, (9, 10, 12)) == [9, 0, -1]  # 8..11 keep all three
    gaps = np.zeros((20, 1, 1), bool)
    gaps[[2, 17]] = True
    assert ops.foreground_offset(gaps, (5, 1, 1))[0] in (1, 14)


def test_scan_indices_refuses_what_it_does_not_know():
    with pytest.raises(ValueError, match="eval_newer"):
        ops.scan_indices(3, 8, "eval")
