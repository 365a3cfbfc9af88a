"""Intensities of radiographs: every transform against its formula in DICOM, and against pydicom."""

import numpy as np
import pytest
from pydicom.dataset import Dataset
from pydicom.pixels.processing import apply_modality_lut, apply_voi_lut
from pydicom.sequence import Sequence

from jaxmed.data import canvas, intensity
from jaxmed.evals import examples

IMAGE = np.random.default_rng(0).integers(20, 4000, (40, 30)).astype(np.uint16)
RANGE = (int(IMAGE.min()), int(IMAGE.max()))


def shown(**meta):
    return intensity.unit({"range": RANGE, **meta})[IMAGE]


def test_windows_follow_their_formulas():
    x = IMAGE.astype(np.float64)
    c, w = 1800.0, 1500.0
    linear = np.clip((x - (c - 0.5)) / (w - 1) + 0.5, 0, 1)
    np.testing.assert_allclose(shown(windows=[(c, w)]), linear, atol=1e-12)
    np.testing.assert_allclose(shown(windows=[(c, w), (5, 7)], window_function="LINEAR"), linear, atol=1e-12)
    exact = np.clip((x - c) / w + 0.5, 0, 1)
    np.testing.assert_allclose(shown(windows=[(c, w)], window_function="LINEAR_EXACT"), exact, atol=1e-12)
    sigmoid = 1 / (1 + np.exp(-4 * (x - c) / w))
    np.testing.assert_allclose(shown(windows=[(c, w)], window_function="SIGMOID"), sigmoid, atol=1e-12)
    np.testing.assert_allclose(shown(windows=[(c, w)], photometric="MONOCHROME1"), 1 - linear, atol=1e-12)
    rescaled = np.clip((2 * x - 100 - (c - 0.5)) / (w - 1) + 0.5, 0, 1)
    np.testing.assert_allclose(shown(windows=[(c, w)], rescale=(2, -100)), rescaled, atol=1e-12)
    # A width of 1 is a threshold; a sigmoid may be steep beyond what exp holds.
    assert set(np.unique(shown(windows=[(c, 1)]))) == {0.0, 1.0}
    np.testing.assert_array_equal(shown(windows=[(c, 1)]), x > c - 0.5)
    assert np.isfinite(shown(windows=[(c, 1e-3)], window_function="SIGMOID")).all()


def test_windows_that_are_none_fall_through():
    plain = shown(percentiles=(100, 3000))
    np.testing.assert_allclose(plain, np.clip((IMAGE - 100.0) / 2900, 0, 1), atol=1e-12)
    for bad in ([(1000, 0)], [(1000, 0.5)], [(np.nan, 100)], [(1000, -5)]):
        np.testing.assert_array_equal(shown(windows=bad, percentiles=(100, 3000)), plain)
    second = shown(windows=[(1000, 0), (1800, 1500)])
    np.testing.assert_array_equal(second, shown(windows=[(1800, 1500)]))
    assert not intensity.valid_window(1, 2, "LOGARITHM")
    with pytest.raises(ValueError, match="no window"):
        intensity.window(IMAGE.astype(float), 1, 0)
    meta = {"range": RANGE, "windows": [(1000, 0)]}
    assert intensity.how(meta) == "percentiles" and intensity.how({**meta, "voi_lut": {"values": [1]}}) == "lut"
    assert intensity.how({"range": RANGE, "windows": [(1000, 0), (3, 2)]}) == "window"
    np.testing.assert_array_equal(  # without percentiles: the image's own range
        intensity.unit(meta)[IMAGE], (IMAGE - RANGE[0]) / (RANGE[1] - RANGE[0])
    )


@pytest.mark.parametrize(("bits", "entries"), [(8, 200), (16, 700)])
def test_lookup_tables_as_pydicom_applies_them(bits, entries):
    rng = np.random.default_rng(bits)
    values = np.sort(rng.integers(0, 1 << bits, entries)).tolist()
    item = Dataset()
    item.LUTDescriptor, item.LUTData = [entries, 1200, bits], values
    item["LUTData"].VR = "US"
    for name, key in (("VOILUTSequence", "voi_lut"), ("ModalityLUTSequence", "modality_lut")):
        ds = Dataset()
        setattr(ds, name, Sequence([item]))
        meta = {key: {"first": 1200, "bits": bits, "values": values}}
        expected = np.asarray(values)[np.clip(IMAGE.astype(int) - 1200, 0, entries - 1)]
        if bits == 16:  # pydicom overflows tables of 8 bits
            apply = apply_voi_lut if key == "voi_lut" else apply_modality_lut
            np.testing.assert_array_equal(apply(IMAGE, ds), expected)
        if key == "voi_lut":
            np.testing.assert_allclose(shown(**meta), expected / ((1 << bits) - 1), atol=1e-12)
        else:
            got = intensity.modality({"range": RANGE, **meta}, np.arange(65536))[IMAGE]
            np.testing.assert_array_equal(got, expected)
    # Values above what the bits allow end at the table's own maximum.
    over = shown(voi_lut={"first": 0, "bits": 8, "values": [0, 4095]})
    assert over.max() == 1.0


def test_modality_then_voi_then_one_inversion():
    lut = {"first": 0, "bits": 16, "values": [10 * v for v in range(5000)]}
    x = IMAGE.astype(float) * 10
    got = shown(modality_lut=lut, rescale=(7, 7), windows=[(20000, 10000)], photometric="MONOCHROME1")
    np.testing.assert_allclose(got, 1 - intensity.window(x, 20000, 10000), atol=1e-12)
    voi = {"first": -500, "bits": 12, "values": list(range(0, 4096, 2))}
    stored = IMAGE.astype(int) - 2048  # signed pixels, stored with an offset
    got = shown(offset=2048, voi_lut=voi)
    np.testing.assert_allclose(got, np.asarray(voi["values"])[np.clip(stored + 500, 0, 2047)] / 4095, atol=1e-12)


def test_percentiles_are_those_of_the_values_after_the_modality_transform():
    counts = np.bincount(IMAGE.ravel(), minlength=65536)
    for meta in ({}, {"rescale": (-2.0, 10.0)}, {"offset": 1000}):
        x = intensity.modality(meta, IMAGE.astype(np.int64).ravel() - meta.get("offset", 0))
        got = intensity.histogram_percentiles(counts, meta)
        np.testing.assert_array_equal(got, np.percentile(x, (0.5, 99.5), method="inverted_cdf"))
        unit = intensity.unit({"range": RANGE, "percentiles": got, **meta})[IMAGE]
        assert 0 < (unit == 0).mean() < 0.01 and 0 < (unit == 1).mean() < 0.01
    assert intensity.histogram_percentiles(np.zeros(65536, int), {}) == (0.0, 0.0)
    ignored = {"range": RANGE, "windows": [(5, 5)], "percentiles": (100, 3000)}
    np.testing.assert_array_equal(
        intensity.unit(ignored, intensity="percentiles")[IMAGE], shown(percentiles=(100, 3000))
    )


def test_reference_pipeline():
    x = IMAGE.astype(np.float64)
    ignored = {"windows": [(3, 5)], "rescale": (3, 4), "percentiles": (1, 2)}
    for photometric, image in (("MONOCHROME2", x), ("MONOCHROME1", x.max() - x)):
        meta = {"range": RANGE, "photometric": photometric, **ignored}
        got = intensity.unit(meta, intensity="reference")[IMAGE]
        np.testing.assert_allclose(got, image / image.max(), atol=1e-12)
        table = intensity.table(meta, intensity="reference")
        assert table.dtype == np.uint16 and np.abs(table[IMAGE] / 65535 - got).max() <= 0.5 / 65535 + 1e-12
    with pytest.raises(ValueError, match="reference"):
        intensity.table(meta, intensity="none")


def test_an_image_of_one_value_is_black():
    for how in intensity.INTENSITIES:
        for photometric in ("MONOCHROME1", "MONOCHROME2"):
            table = intensity.table({"range": (7, 7), "photometric": photometric, "percentiles": (7, 7)}, intensity=how)
            assert not table.any()
    assert not shown(percentiles=(50, 50)).any()


def test_thumbnails():
    meta = {"range": RANGE, "photometric": "MONOCHROME1", "windows": [(1800, 1500)]}
    small, step = intensity.thumbnail(IMAGE, meta, 11)
    assert small.shape == (10, 7) and step == 4 and small.dtype == np.uint8
    means = shown(**{k: v for k, v in meta.items() if k != "range"})[:40, :28].reshape(10, 4, 7, 4).mean((1, 3))
    assert np.abs(small - 255 * means).max() < 1.01
    same, step = intensity.thumbnail(IMAGE, meta, 40)
    assert step == 1 and same.shape == IMAGE.shape
    [picture], mask = examples.slices_of({"voxels": IMAGE[None], "meta": {**meta, "planar": True}}, 5)
    assert mask is None and np.array_equal(picture, same)


def test_canvas():
    image = np.arange(1, 36).reshape(5, 7)
    np.testing.assert_array_equal(canvas.half(image), [[1, 3, 5], [15, 17, 19]])
    assert canvas.padded_size(5, 7, bins=(6, 4)) == (6, 7)  # above the last edge a side stays
    assert canvas.padded_size(1152, 1153, bins=(1152, 1536)) == (1152, 1536)
    assert canvas.padded_size(5, 7, multiple=4) == (8, 8) and canvas.padded_size(5, 7) == (5, 7)
    assert canvas.padded_size(5, 7, square=9) == (9, 9)
    padded = canvas.pad(image, (6, 8))
    np.testing.assert_array_equal(padded[:5, :7], image)
    assert padded.sum() == image.sum() and padded.shape == (6, 8)
    with pytest.raises(ValueError, match="does not fit"):
        canvas.padded_size(5, 10, square=9)
    with pytest.raises(ValueError, match="does not fit"):
        canvas.pad(image, (4, 8))
