"""The planner's goals on the published list of sizes, where `--goldens DIR` holds it."""

import numpy as np
import pytest

from jaxmed import preflight_plans
from tests.parity.conftest import _roots


def pytest_generate_tests(metafunc):
    found = sorted({p for root in _roots(metafunc.config) for p in root.rglob("sizes_public.npz")})
    metafunc.parametrize("sizes", found, ids=[p.parent.name for p in found])


def test_the_published_table(sizes):
    with np.load(sizes) as file:
        height, width = (file[side].astype(np.int64) for side in ("H", "W"))
    assert preflight_plans.fingerprint(height, width) == preflight_plans.PUBLISHED
    table = preflight_plans.table(height, width, patch=48, cost={}, budget=65536, devices=1)
    rows = {row["plan"]: row for row in table}
    assert not list(preflight_plans.exceeded(list(rows.values()), preflight_plans.BOUNDS, 0.0))
    published = {"tokens": 119.8, "poster_compute": 143.4, "attention": 133.5, "flops": 123.4, "shapes": 69}
    assert {k: rows["dbb"][k] for k in published} == pytest.approx(published, abs=0.06)
    assert rows["dbb"]["slowest_device"] == pytest.approx(2.1, abs=0.05)
    assert rows["pack_blocks"]["shapes"] == 1 and rows["pack_blocks"]["flops"] < 106.5
