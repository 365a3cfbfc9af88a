"""Plans of images of every size: published bins, fitted lengths, packed rows."""

import pickle
from itertools import combinations

import numpy as np
import pytest

from jaxmed import preflight_plans
from jaxmed.core.errors import UserError
from jaxmed.data import plan as planning
from jaxmed.data import plan_length, plan_pack
from jaxmed.data.plan import PAD
from jaxmed.data.plan_bins import assign
from jaxmed.data.plan_cost import Cost

PATCH = 48
# What every mode is asked here.
WAYS = {
    "dbb": dict(mode="dbb"),
    "dbb, 8 devices": dict(mode="dbb", multiple_of=8, options={"memory_probe": "first"}),
    "length": dict(mode="length", budget=65536),
    "length, 8 devices": dict(mode="length", budget=65536, multiple_of=8, options={"lengths": 5, "multiple": 16}),
    "length, constant": dict(mode="length", batch_size=8, multiple_of=4),
    "length, given": dict(mode="length", budget=40000, buckets={"tokens": (900, 2000, 4096)}),
    "blocks": dict(mode="pack", budget=65536),
    "blocks, 8 devices": dict(mode="pack", budget=65536, multiple_of=8, buckets={"tokens": (4224,), "images": (9,)}),
    "rebucket": dict(mode="pack", budget=65536, options={"attention": "rebucket"}),
    "rebucket, 4 devices": dict(
        mode="pack", budget=65536, multiple_of=4, options={"attention": "rebucket", "lengths": 3, "multiple": 8}
    ),
}


def population(n, seed=0, kind="mixture"):
    """Heights and widths of n made-up radiographs."""
    rng = np.random.default_rng(seed)
    if kind == "same":
        return {"height": np.full(n, 1500), "width": np.full(n, 1801), "tokens": np.full(n, 32 * 38)}
    if kind == "uniform":
        height, width = rng.integers(246, 3073, n), rng.integers(219, 3073, n)
    elif kind == "two":
        height, width = rng.choice([2048, 2500], n), rng.choice([2048, 2500], n)
    else:
        centre = np.array([[2400, 1900], [1500, 1200], [2000, 1500], [1000, 2400], [2800, 1400], [900, 800]])
        about = centre[rng.integers(0, len(centre), n)] * rng.normal(1, 0.12, (n, 2))
        height, width = np.clip(about, 200, 3072).astype(int).T
    return {"height": height, "width": width, "tokens": -(-height // PATCH) * -(-width // PATCH)}


def planner(sizes, ids=None, **how):
    return planning.planner(sizes, np.arange(len(sizes["tokens"])) if ids is None else ids, **how)


def epoch(made, epoch=0, seed=1, shuffle=True):
    return planning.epoch_of(made, seed=seed, epoch=epoch, shuffle=shuffle)


def as_lists(plan):
    return [(s.bucket, s.ids.tolist()) for s in plan.steps]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("n, kind", [(1, "mixture"), (7, "mixture"), (150, "same"), (700, "mixture"), (400, "two")])
def test_every_image_once_where_it_fits(way, n, kind):
    how = WAYS[way]
    sizes, ids = population(n, kind=kind), 100 + 3 * np.arange(n)
    by_id = {int(i): k for k, i in enumerate(ids)}
    made, shapes = planner(sizes, ids, **how), None
    for number in range(3):
        plan = epoch(made, number, shuffle=number < 2)
        real = np.concatenate([s.ids[s.ids != PAD] for s in plan.steps])
        np.testing.assert_array_equal(np.sort(real), ids)
        for step in plan.steps:
            bucket = dict(step.bucket)
            assert step.ids.dtype == np.int64 and len(step.ids) == plan.batch_sizes[step.bucket]
            assert len(step.ids) % how.get("multiple_of", 1) == 0
            if how["mode"] != "dbb" and how.get("budget"):
                assert len(step.ids) * bucket["tokens"] <= how["budget"]
            for row in step.ids.reshape(len(step.ids), -1):
                at = [by_id[int(i)] for i in row[row != PAD]]
                tokens = sizes["tokens"][at]
                if how["mode"] == "dbb":
                    assert all(sizes["height"][at] <= bucket["height"]) and all(sizes["width"][at] <= bucket["width"])
                else:
                    assert tokens.sum() <= bucket["tokens"]
                    assert all(tokens <= bucket.get("attention", np.inf))
                if "images" in bucket:
                    assert len(row) == bucket["images"]
        blank = [s for s in plan.steps if (s.ids.reshape(len(s.ids), -1) == PAD).all(1).any()]
        assert len(blank) <= 1 or how["mode"] == "dbb", "padding rows are in one batch at most"
        this = sorted((s.bucket, s.ids.shape) for s in plan.steps)
        assert shapes in (None, this), "buckets and steps are the same in every epoch"
        shapes = this


@pytest.mark.parametrize("way", WAYS)
def test_a_plan_is_a_function_of_its_arguments(way):
    """Other hosts, worker processes and restarts compute the same; epochs and seeds differ."""
    sizes = population(300)
    made = planner(sizes, **WAYS[way])
    first = as_lists(epoch(made))
    assert first == as_lists(epoch(pickle.loads(pickle.dumps(made)))) == as_lists(epoch(planner(sizes, **WAYS[way])))
    assert as_lists(epoch(made, epoch=1)) != first != as_lists(epoch(made, seed=2))
    assert as_lists(epoch(made, shuffle=False)) == as_lists(epoch(made, shuffle=False, epoch=3, seed=4))


# --- published bins ---------------------------------------------------------------------------------------------------


def test_edges_belong_to_the_bin_below():
    edges = (1152, 1536)
    np.testing.assert_array_equal(
        assign(np.array([1, 1152, 1153, 1536, 1537, 5000]), edges), [1152, 1152, 1536, 1536, 1537, 5000]
    )
    sizes = {
        "height": np.array([1152, 1153, 3073]),
        "width": np.array([1152, 1152, 100]),
        "tokens": np.array([576, 600, 195]),
    }
    plan = epoch(planner(sizes, mode="dbb", batch_size=1), shuffle=False)
    assert [dict(b.bucket) for b in plan.steps] == [
        {"height": 1152, "width": 1152},
        {"height": 1536, "width": 1152},
        {"height": 3073, "width": 1152},
    ]


def test_partial_batches_and_probes():
    sizes = {"height": np.array([2000] * 5 + [3000] * 2), "width": np.array([3000] * 5 + [900] * 2)}
    ids = np.arange(7)

    def steps(epoch=0, **how):
        how = {"mode": "dbb", "batch_size": 2} | how
        made = planning.planner(sizes, ids, **how)
        return [(s.bucket, s.ids.tolist()) for s in made.steps(None, epoch)]

    wide, tall = (("height", 2304), ("width", 3072)), (("height", 3072), ("width", 1152))
    one = (("height", 2304), ("rows", 1), ("width", 3072))
    assert steps() == [(wide, [0, 1]), (wide, [2, 3]), (one, [4]), (tall, [5, 6])]
    assert steps(drop_remainder=True) == [(wide, [0, 1]), (wide, [2, 3]), (tall, [5, 6])]
    assert steps(multiple_of=2)[2] == (wide, [4, PAD]), "devices share a batch: rounded up"
    assert steps(options={"memory_probe": "first"})[0][0] == wide, "most pixels, not most rows"
    # As published: one batch of the largest bin is lost before the first epoch, and one more in every epoch.
    defect = dict(options={"memory_probe": "reference"})
    assert steps(**defect) == [(wide, [0, 1]), (wide, [2, 3]), (one, [4])]
    left = [sum(len(row) for _, row in steps(epoch, **defect)) for epoch in range(4)]
    assert left == [5, 3, 1, 1]
    assert not planning.planner(sizes, ids, mode="dbb", batch_size=2, **defect).steady


# --- fitted lengths ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_lengths_are_the_best_there_are(seed):
    rng = np.random.default_rng(seed)
    counts = np.sort(rng.integers(1, 200, 60))
    cost = Cost().image
    found = plan_length.fit_lengths(counts, 5, 16, cost)

    def price(lengths):
        return cost(np.array(lengths))[np.searchsorted(lengths, counts)].sum()

    candidates = np.unique(-(-counts // 16) * 16)
    for k, lengths in enumerate(found, 1):
        assert len(lengths) == k and all(n % 16 == 0 for n in lengths)
        best = min(price([*c, candidates[-1]]) for c in combinations(candidates[:-1].tolist(), k - 1))
        assert price(lengths) == pytest.approx(best, rel=1e-12)


def test_lengths_come_from_the_index_and_are_hashed():
    def digest(sizes, **options):
        made = planner(sizes, mode="length", budget=65536, options=options)
        plan = epoch(made)
        ids = np.arange(len(sizes["tokens"]))
        return planning.plan_hash(sizes, ids, "f", plan.batch_sizes, plan_options=options), list(plan.batch_sizes)

    sizes = population(2000)
    (a, buckets), (b, others), (c, _) = digest(sizes), digest(population(2000, 1)), digest(sizes, lengths=4)
    assert len({a, b, c}) == 3 and buckets != others and len(buckets) == 16
    assert all(dict(x)["tokens"] % 64 == 0 for x in buckets)
    assert digest(sizes)[0] == a


def test_left_overs_move_up_and_blanks_are_short():
    counts = np.array([10] * 5 + [20] * 5 + [30] * 3)
    cuts = plan_length.cut(counts, [10, 20, 30], {10: 4, 20: 4, 30: 4}, 4)
    assert [tuple(c) for c in cuts] == [(30, 1, 4, 4), (20, 1, 4, 4), (10, 2, 4, 5)]
    # With one device batches of three waste nothing.
    assert [tuple(c) for c in plan_length.cut(counts, [10, 20, 30], {10: 4, 20: 4, 30: 4}, 1)] == [
        (30, 1, 3, 3),
        (20, 2, 3, 6),
        (10, 1, 4, 4),
    ]
    plan = planning.plan(
        {"tokens": counts}, np.arange(13), seed=0, epoch=0, mode="length", batch_size=4, multiple_of=4,
        buckets={"tokens": (10, 20, 30)}, drop_remainder=True,
    )  # fmt: skip
    assert all((s.ids != PAD).all() for s in plan.steps) and len(plan.steps) == 3


# --- packed rows ------------------------------------------------------------------------------------------------------


def test_best_fit_and_dealing():
    counts = np.array([1, 2, 3, 4, 6, 7, 9])
    rows = [sorted(counts[row].tolist()) for row in plan_pack.best_fit(counts, 10, 9)]
    assert sorted(rows) == [[1, 9], [2], [3, 7], [4, 6]]
    assert max(map(len, plan_pack.best_fit(np.ones(10, int), 10, 3))) == 3
    dealt = plan_pack.deal(np.arange(1, 13), 3)
    sums = np.append(np.arange(1, 13), 0)[dealt].sum(1)
    assert dealt.shape == (3, 4) and sums.max() - sums.min() <= 1 and len(np.unique(dealt)) == 12


def test_packing_is_tight_and_quick():
    sizes = population(100_000)
    made = planner(sizes, mode="pack", budget=65536, multiple_of=8)  # seconds
    plan = epoch(made)
    room = sum(len(s.ids) * dict(s.bucket)["tokens"] for s in plan.steps)
    assert len(plan.batch_sizes) == 1 and room < 1.015 * sizes["tokens"].sum()


def test_blocks_that_attention_touches():
    """Against a mask over the whole row."""
    rng = np.random.default_rng(0)
    segments = rng.integers(0, 300, (5, 6)) * (rng.random((5, 6)) > 0.3)
    for row, pairs in zip(segments, plan_pack.touched(segments)):
        owner = np.pad(np.repeat(np.arange(6), row), (0, -row.sum() % 128), constant_values=-1)
        mask = (owner[:, None] == owner[None]) & (owner >= 0)
        blocks = mask.reshape(len(owner) // 128, 128, -1, 128).any((1, 3)).sum()
        assert pairs == blocks * 128**2


# --- what it is all for -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "n, seed, devices", [(20_000, 1, 1), (20_000, 2, 8), (3_000, 3, 1), (500, 4, 1), (9, 5, 1), (1, 0, 1)]
)
def test_goals_on_sizes_nobody_has_seen(n, seed, devices):
    sizes = population(n, seed)
    rows = table(sizes, devices)
    assert not list(preflight_plans.exceeded(rows, preflight_plans.BOUNDS, preflight_plans.SLACK))
    assert all(row["slowest_device"] < 1.1 for row in rows if row["mode"] != "dbb" and n > 1000)


@pytest.mark.parametrize("kind", ["same", "two"])
def test_goals_where_most_images_are_alike(kind):
    rows = table(population(3000, kind=kind), 1)
    assert not list(preflight_plans.exceeded(rows, preflight_plans.BOUNDS, preflight_plans.SLACK))


def table(sizes, devices):
    return list(
        preflight_plans.table(sizes["height"], sizes["width"], patch=PATCH, cost={}, budget=65536, devices=devices)
    )


def test_the_measure_is_that_of_the_poster():
    """Three images in one bin; nothing else is there to pad."""
    sizes = {"height": np.array([1100, 1152, 1000]), "width": np.array([1152, 1152, 800])}
    sizes["tokens"] = -(-sizes["height"] // PATCH) * -(-sizes["width"] // PATCH)
    plan = epoch(planner(sizes, mode="dbb", batch_size=3))
    got = preflight_plans.measure(plan, sizes["tokens"], patch=PATCH, cost=Cost(), devices=1)
    n = sizes["tokens"].astype(float)
    assert got["tokens"] == pytest.approx(100 * 3 * 576 / n.sum())
    assert got["poster_compute"] == pytest.approx(got["tokens"] ** 2 / 100)
    assert got["attention"] == pytest.approx(100 * 3 * 576**2 / (n**2).sum())
    e, d = 145, 577  # the formula of the spec
    flops = 12 * (2 * e * (4 * 768**2 + 2 * 768 * 3072) + 4 * e**2 * 768)
    flops += 8 * (2 * d * (4 * 512**2 + 2 * 512 * 2048) + 4 * d**2 * 512)
    flops += 2 * 576 * 2304 * 768 + 2 * e * 768 * 512 + 2 * d * 512 * 2304
    assert float(Cost().image(576)) == flops
    assert got["flops"] == pytest.approx(100 * 3 * flops / sum(float(Cost().image(x)) for x in n))
    assert (got["shapes"], got["steps"], got["wasted"]) == (1, 1, 0)


def test_a_bound_is_a_bound():
    rows = [{"plan": "length16", "tokens": 107.5, "shapes": 17}]
    bounds = {"length16": {"tokens": 107, "shapes": 16}}
    assert list(preflight_plans.exceeded(rows, bounds, 0.0)) == [
        "length16: tokens is 107.50, its bound is 107",
        "length16: shapes is 17.00, its bound is 16",
    ]
    assert list(preflight_plans.exceeded(rows, bounds, 1.0)) == ["length16: shapes is 17.00, its bound is 16"]
    with pytest.raises(UserError, match=r"bounds\.length64: there is no such plan; there are length16"):
        list(preflight_plans.exceeded(rows, {"length64": {}}, 0.0))
    with pytest.raises(UserError, match=r"bounds\.length16\.words: use one of shapes, tokens"):
        list(preflight_plans.exceeded(rows, {"length16": {"words": 1}}, 0.0))


@pytest.mark.parametrize(
    "how, message",
    [
        (dict(mode="dbb", budget=9), "input.budget=9: mode 'dbb' has one batch size"),
        (dict(mode="dbb", buckets={"height": (9,)}), "mode 'dbb' needs positive edges for 'height' and 'width'"),
        (dict(mode="dbb", options={"memory_probe": "x"}), "memory_probe='x': use one of none, first, reference"),
        (dict(mode="dbb", options={"lengths": 3}), "plan_options.lengths is not an option of mode 'dbb'; it has"),
        (dict(mode="dbb", multiple_of=32), "input.batch_size=16 is not a positive multiple of 32"),
        (dict(mode="length"), "give either input.batch_size or input.budget, got None and None"),
        (dict(mode="length", budget=100), r"input.budget=100 does not hold 1 rows .*tokens\d+: use at least"),
        (dict(mode="length", budget=65536, options={"lengths": 0}), "plan_options.lengths=0 must be a whole number"),
        (dict(mode="length", budget=65536, options={"multiple": 1.5}), "plan_options.multiple=1.5 must be a whole"),
        (dict(mode="length", budget=65536, options={"cost": {"wide": 1}}), "plan_options.cost.wide is not a size"),
        (dict(mode="length", budget=65536, options={"cost": {"width": 0}}), "plan_options.cost.width=0: give the size"),
        (dict(mode="length", budget=65536, buckets={"tokens": (8,)}), r"has tokens \d+, more than the largest bucket"),
        (dict(mode="length", budget=65536, buckets={"height": (8,)}), "input.mode='length' plans by 'tokens'"),
        (dict(mode="pack"), "give either input.batch_size or input.budget"),
        (dict(mode="pack", batch_size=4), "mode 'pack' with input.batch_size .rows. needs tokens="),
        (dict(mode="pack", batch_size=3, multiple_of=2, buckets={"tokens": (9000,)}), "input.batch_size=3 does"),
        (dict(mode="pack", budget=65536, multiple_of=64), r"study with id \d+ has \d+ tokens, more than a row .*=1024"),
        (dict(mode="pack", budget=65536, options={"attention": "dense"}), "attention='dense': use one of blocks"),
        (dict(mode="pack", budget=65536, buckets={"tokens": (1, 2)}), "mode 'pack' has one kind of row"),
        (dict(mode="pack", budget=65536, buckets={"depth": (1,)}), "input.buckets.depth: records have no such size"),
        (dict(mode="buckets", batch_size=1), "input.buckets is missing: mode 'buckets' needs"),
    ],
)  # fmt: skip
def test_what_cannot_be_planned(how, message):
    with pytest.raises(UserError, match=message):
        planner(population(30), **how)
