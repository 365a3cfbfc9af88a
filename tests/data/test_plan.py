import numpy as np
import pytest

from jaxmed.core.errors import UserError
from jaxmed.data import plan as planning
from jaxmed.data.plan import PAD

BUCKETS = {"scans": (1, 2, 4, 8), "depth": (16, 32, 48)}


def population(n, seed=0):
    rng = np.random.default_rng(seed)
    return {"scans": rng.integers(1, 9, n), "depth": rng.integers(1, 49, n)}, 100 + 3 * np.arange(n)


def make(sizes, ids, **options):
    return planning.plan(sizes, ids, **{"seed": 1, "epoch": 0, "buckets": BUCKETS, "batch_size": 4} | options)


def by_id(sizes, ids):
    return {int(i): {axis: int(v[k]) for axis, v in sizes.items()} for k, i in enumerate(ids)}


@pytest.mark.parametrize("n", [1, 3, 4, 5, 57, 300])
@pytest.mark.parametrize(
    "options",
    [{"batch_size": 4}, {"batch_size": 8, "multiple_of": 8}, {"batch_size": None, "budget": 1600, "multiple_of": 2}],
)
@pytest.mark.parametrize("shuffle", [True, False])
def test_every_record_once_in_a_bucket_that_holds_it(n, options, shuffle):
    sizes, ids = population(n)
    lookup = by_id(sizes, ids)
    previous = None
    for epoch in range(3):
        plan = make(sizes, ids, epoch=epoch, shuffle=shuffle, **options)
        real = np.concatenate([s.ids[s.ids != PAD] for s in plan.steps])
        np.testing.assert_array_equal(np.sort(real), ids)
        for step in plan.steps:
            assert len(step.ids) == plan.batch_sizes[step.bucket] and step.ids.dtype == np.int64
            assert len(step.ids) % options.get("multiple_of", 1) == 0
            if options.get("budget"):
                assert len(step.ids) * np.prod([size for _, size in step.bucket]) <= options["budget"]
            for i in step.ids[step.ids != PAD]:
                assert all(lookup[int(i)][axis] <= size for axis, size in step.bucket)
        assert sum((s.ids == PAD).any() for s in plan.steps) <= 1, "only the last batch of the largest bucket is padded"
        shape = sorted((s.bucket, len(s.ids)) for s in plan.steps)
        assert previous in (None, shape), "buckets and steps must be the same in every epoch"
        previous = shape


def test_it_is_a_function_of_its_arguments():
    sizes, ids = population(100)

    def order(**options):
        return [(s.bucket, s.ids.tolist()) for s in make(sizes, ids, **options).steps]

    assert order() == order()
    different = [order(), order(epoch=1), order(seed=2), order(shuffle=False)]
    assert all(a != b for i, a in enumerate(different) for b in different[:i])
    assert order(shuffle=False) == order(shuffle=False, epoch=5, seed=9)
    np.testing.assert_array_equal(
        [i for _, step in order(shuffle=False, buckets={"scans": (8,), "depth": (48,)}) for i in step], ids
    )


def test_records_do_not_keep_their_neighbours():
    sizes, ids = population(64)
    pairs = []
    for epoch in range(2):
        steps = make(sizes, ids, epoch=epoch).steps
        pairs.append({(a, b) for s in steps for a in s.ids for b in s.ids if a < b})
    assert len(pairs[0] & pairs[1]) < 0.5 * len(pairs[0])


def test_most_records_are_in_their_own_bucket_and_left_overs_move_one_up():
    sizes = {"scans": np.array([1] * 6 + [2] * 7 + [4] * 4), "depth": np.full(17, 10)}
    plan = make(sizes, np.arange(17), shuffle=False, buckets={"scans": (1, 2, 4), "depth": (16,)})
    got = [(dict(s.bucket)["scans"], s.ids.tolist()) for s in plan.steps]
    # 4 and 5 move up and go first there; then 10, 11, 12 are left over.
    assert got == [
        (1, [0, 1, 2, 3]),
        (2, [4, 5, 6, 7]),
        (2, [8, 9, 10, 11]),
        (4, [12, 13, 14, 15]),
        (4, [16, -1, -1, -1]),
    ]
    dropped = make(
        sizes, np.arange(17), shuffle=False, drop_remainder=True, buckets={"scans": (1, 2, 4), "depth": (16,)}
    )
    assert [s.ids.tolist() for s in dropped.steps] == [ids for _, ids in got[:-1]]


def test_grid_and_names():
    cells = planning.grid({"scans": (2, 1), "depth": (32, 16)})
    assert [planning.bucket_name(c) for c in cells] == [
        "depth16_scans1",
        "depth16_scans2",
        "depth32_scans1",
        "depth32_scans2",
    ]
    assert planning.grid({}) == [()]
    kind = dict(seed=0, epoch=0, buckets={}, batch_size=4)
    [step] = planning.plan({"any": np.ones(3)}, np.arange(3), multiple_of=4, **kind).steps
    assert step.bucket == () and sorted(step.ids) == [-1, 0, 1, 2]


def test_few_records_make_small_batches_in_small_buckets():
    sizes = {"scans": np.array([1, 1, 2])}
    kind = dict(seed=0, epoch=0, buckets={"scans": (1, 2, 8)}, batch_size=64)
    plan = planning.plan(sizes, np.arange(3), multiple_of=2, shuffle=False, **kind)
    assert [(dict(s.bucket), s.ids.tolist()) for s in plan.steps] == [({"scans": 2}, [0, 1, 2, -1])]
    with pytest.raises(UserError, match="do not fill one batch of 64"):
        planning.plan(sizes, np.arange(3), drop_remainder=True, **kind)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"batch_size": 6, "multiple_of": 4}, r"input.batch_size=6 is not a positive multiple of 4 .*use 4 or 8"),
        ({"batch_size": 2, "multiple_of": 8}, r"input.batch_size=2 .*multiple of 8 .*use 8,"),
        ({"batch_size": 0}, "input.batch_size=0 is not a positive multiple"),
        ({"batch_size": None}, "either input.batch_size or input.budget, got None and None"),
        ({"budget": 5}, "either input.batch_size or input.budget, got 4 and 5"),
        (
            {"batch_size": None, "budget": 1000, "multiple_of": 4},
            "input.budget=1000 does not hold 4 rows .* of bucket depth48_scans8: use at least 1536",
        ),
        ({"mode": "magic"}, "input.mode='magic' is not a way to plan batches; use one of buckets"),
        (
            {"buckets": {**BUCKETS, "length": (1,)}},
            "input.buckets.length: records have no such size; they have depth, scans",
        ),
        ({"buckets": {**BUCKETS, "scans": ()}}, r"input.buckets.scans=\(\)"),
        ({"buckets": {**BUCKETS, "scans": (0, 4)}}, r"input.buckets.scans=\(0, 4\): give one or more positive sizes"),
        ({"buckets": {**BUCKETS, "depth": (16, 32)}}, r"study key\d+ has depth 4\d, more than .*depth=\(16, 32\)"),
        ({"batch_size": 400, "drop_remainder": True}, "50 records do not fill one batch of 400"),
    ],
)
def test_what_cannot_be_planned(options, message):
    sizes, ids = population(50)
    with pytest.raises(UserError, match=message):
        make(sizes, ids, keys=np.array([f"key{i}" for i in ids]), **options)


def test_nothing_to_plan():
    with pytest.raises(UserError, match="there is no record to plan"):
        make({"scans": np.zeros(0, int), "depth": np.zeros(0, int)}, np.zeros(0, int))


def test_hash_sees_everything():
    sizes, ids = population(30)
    rows = make(sizes, ids).batch_sizes

    def digest(sizes=sizes, ids=ids, fingerprint="f", rows=rows, **options):
        return planning.plan_hash(sizes, ids, fingerprint, rows, **{"seed": 1, "buckets": BUCKETS} | options)

    first = digest()
    assert digest() == first and len(first) == 64
    changed = {"scans": sizes["scans"] % 8 + 1, "depth": sizes["depth"]}
    others = [
        digest(sizes=changed),
        digest(ids=ids[::-1]),
        digest(fingerprint="g"),
        digest(rows={b: n * 2 for b, n in rows.items()}),
        digest(seed=2),
        digest(buckets={**BUCKETS, "scans": (8,)}),
        digest(extra=None),
    ]
    assert len({first, *others}) == len(others) + 1


def test_padding_is_counted():
    sizes = {"scans": np.array([2, 1, 2]), "depth": np.array([8, 16, 4])}
    plan = make(sizes, np.arange(3), shuffle=False, buckets={"scans": (2,), "depth": (16,)}, batch_size=2)
    slices = np.array([16.0, 16.0, 5.0])
    first, second = (planning.padding(s, slices) for s in plan.steps)
    assert first == {"rows_wasted": 0.0, "tokens_wasted": 0.5, "tokens": 64.0, "records": 2.0}
    assert second == {"rows_wasted": 0.5, "tokens_wasted": 1 - 5 / 64, "tokens": 64.0, "records": 1.0}
    report = planning.padding_report(plan, slices)
    assert report["tokens_wasted"] == pytest.approx(1 - 37 / 128) and report["steps"] == 2
    assert report["buckets"]["depth16_scans2"]["rows_wasted"] == 0.25


def test_ragged_buckets_waste_less_than_one_shape():
    """Why buckets exist; studies with few scans dominate, as in the spec's logs."""
    rng = np.random.default_rng(0)
    sizes = {"scans": np.minimum(1 + rng.geometric(0.35, 4000), 8), "depth": rng.integers(10, 49, 4000)}
    ids, slices = np.arange(4000), sizes["scans"] * sizes["depth"]
    one = planning.padding_report(make(sizes, ids, buckets={"scans": (8,), "depth": (48,)}), slices)
    many = planning.padding_report(
        make(sizes, ids, buckets={"scans": (1, 2, 3, 4, 6, 8), "depth": (16, 32, 48)}), slices
    )
    assert one["tokens_wasted"] > 0.7 and many["tokens_wasted"] < 0.3
