"""Suites as the spec lists them, tables of labels as they are published, intervals that cover, probes that learn."""

import csv
import importlib

import numpy as np
import pydicom
import pytest
from sklearn import metrics as sk

from jaxmed.core import sharding
from jaxmed.core.errors import UserError
from jaxmed.data import shards
from jaxmed.evals import calibration, classification, intervals, label_tables, probe, prompts, scores, suites, zeroshot
from jaxmed.prep import recipes
from jaxmed.prep.manifest import read_manifest


@pytest.fixture
def rng():
    return np.random.default_rng(0)


# Suites.


@pytest.mark.parametrize("name", suites.SUITES)
def test_every_suite_can_be_asked(name):
    suite = suites.get(name)
    asked = prompts.make({"suite": name}, "test")
    assert asked.score == suite.score and asked.token == suite.token and suite.recipe in recipes.RECIPES
    assert f"--recipe={suite.recipe}" in suite.prep
    texts = [t for texts in asked.texts for t in texts]
    assert len(set(texts)) == len(texts) and all(t.endswith(".") and "{" not in t for t in texts)
    assert len(asked.texts) == len(asked.names) * (2 if suite.score == "pair" else 1)


def texts_of(suite, name, negative=False):
    asked = prompts.make({"suite": suite}, "test")
    return asked.texts[asked.names.index(name) + (len(asked.names) if negative else 0)]


def test_prompts_of_the_spec():
    assert len(suites.get("ct_rate").classes) == 16
    assert texts_of("ct_rate", "Emphysema", True) == ("The volume shows: Not emphysema.",)
    assert texts_of("ct_rate", "Atelectasis", True) == ("The volume shows: Not atelectatic.",)
    assert texts_of("ct_rate", "Lung nodule") == ("The volume shows: Lung nodule.",)
    assert texts_of("ct_rate_organ", "Lung nodule") == ("The lung shows: Nodule.",)
    assert texts_of("ct_rate_organ", "Lung opacity", True) == ("The lung shows: Not opacity.",)
    assert texts_of("ct_rate_organ", "Hiatal hernia") == ("The esophagus shows: Hiatal hernia.",)
    assert texts_of("pub_brain_5", "stroke") == ("This MRI study shows: Acute stroke.",)
    assert texts_of("pub_brain_5_templates", "normal") == ("This study shows: no significant abnormalities.",)
    newer = texts_of("pub_brain_5_templates", "stroke")
    assert len(newer) == 18 and newer[1] == "This study shows: acute stroke identified."
    assert newer[-1] == "This study shows: compatible with acute stroke."
    assert tuple(suites.get("pub_brain_5").classes) == scores.PUB_BRAIN_5
    assert (len(suites.NEURO_MRI), len(suites.NEURO_CT)) == (74, 82)
    assert list(suites.NEURO_MRI) == sorted(suites.NEURO_MRI) and "cavernous malformation cavernoma" in suites.NEURO_CT
    # The published follow-up code compares these two with each other's labels.
    assert texts_of("cq500", "MidlineShift")[0] == "This study shows: midline shift."
    with pytest.raises(UserError, match="did you mean 'ct_rate'"):
        suites.get("ct_rat")


def test_two_calcifications_are_one_label(rng):
    asked = prompts.make({"suite": "rad_chest_ct"}, "test")
    assert len(asked.names) == 15 and len(asked.labels) == 14 and asked.labels[-1] == "Calcification"
    assert "Mosaic attenuation pattern" not in asked.names
    values = rng.uniform(size=(9, 15))
    a, b = (values[:, asked.names.index(f"{x} wall calcification")] for x in ("Coronary artery", "Arterial"))
    merged = asked.merged(values)
    np.testing.assert_array_equal(merged[:, -1], np.where(np.maximum(a, b) > 0.5, np.maximum(a, b), np.minimum(a, b)))
    np.testing.assert_array_equal(merged[:, 0], values[:, 0])

    some = prompts.only(asked, ["Calcification", "Emphysema"], "test")
    assert some.labels == ("Emphysema", "Calcification") and len(some.texts) == 6
    assert some.texts[3] == ("The volume shows: Not emphysema.",)
    with pytest.raises(UserError, match="no class 'Edema'"):
        prompts.only(asked, ["Edema"], "test")
    with pytest.raises(UserError, match="classes does not go with a suite"):
        prompts.make({"suite": "rsna", "classes": {"a": "b"}}, "test")


def test_a_training_config_may_name_a_suite(tmp_path):
    """The evaluator of the training loop asks the same prompts, and merges the same labels."""
    names = prompts.make({"suite": "rad_chest_ct"}, "test").labels
    with shards.ShardWriter(tmp_path, 0) as writer:
        for i in range(4):
            scan = {"voxels": np.full((2, 8, 8), i, np.uint8), "affine": np.eye(4), "name": "ct", "meta": {}}
            labels = {n: float(i % 2) for n in names}
            writer.add({"key": str(i), "patient": f"p{i}", "scans": [scan], "labels": labels, "split": "val"})
    shards.finish(tmp_path, "toy", {"value_range": [0, 255]})
    seen = []

    def embed_text(state, batch):
        seen.append(len(batch["text"]))
        rng = np.random.default_rng(0)
        return {"text": rng.normal(size=(len(batch["text"]), 4)).astype(np.float32)}

    def embed_image(state, batch):
        z = np.asarray(batch["image"][:, 0, 0, 0, :4], np.float32) % 2
        return {"image": z + np.array([1, 0, 0, 0], np.float32), "scale": np.float32(5)}

    input = dict(dir=str(tmp_path), split="val", batch_size=8, buckets=dict(scans=(1,), depth=(2,)))
    fns = {"embed_text": embed_text, "embed_image": embed_image}
    evaluator = zeroshot.Evaluator(
        fns, mesh=sharding.make_mesh(), outdir=tmp_path / "out", input=input, suite="rad_chest_ct", bootstrap=0
    )
    values = dict(evaluator.run({"step": 0}))
    assert {f"auc/{n}" for n in names} < set(values) and set(values["auc/" + n] for n in names) <= {0.0, 1.0}
    with np.load(tmp_path / "out" / "step-00000000.npz") as saved:
        assert saved["scores"].shape == (4, 14)


@pytest.mark.parametrize(
    "name, arg, suite",
    [
        ("hlip_ct_rate_published", "", "ct_rate"),
        ("hlip_brain_published", "", "pub_brain_5_templates"),
        ("hlip_brain_published", "run=original,", "pub_brain_5"),
        ("hlip_brain_published", "run=ct,", "rsna_templates"),
    ],
)
def test_published_configs_are_evaluated_on_suites(name, arg, suite, tmp_path):
    """With eval=FOLDER; and the evaluator takes what they say."""
    make = importlib.import_module(f"configs.{name}").get_config
    assert not make(arg.rstrip(",")).evals
    with shards.ShardWriter(tmp_path, 0) as writer:
        scan = {"voxels": np.ones((48, 8, 8), np.uint8), "affine": np.eye(4), "name": "ct", "meta": {}}
        writer.add(
            {"key": "k", "scans": [scan], "labels": dict.fromkeys(suites.get(suite).classes, 1.0), "split": "test"}
        )
    shards.finish(tmp_path, "toy", {"value_range": [0, 255]})
    section = make(f"{arg}eval={tmp_path}").evals.zeroshot.to_dict()
    assert section.pop("type") == "zeroshot" and section.pop("every_steps") and section["suite"] == suite
    section["input"]["batch_size"] = 8
    zeroshot.Evaluator({}, mesh=sharding.make_mesh(), **section)


# Tables of labels.


def write(path, rows):
    with open(path, "w", newline="") as f:
        csv.writer(f).writerows(rows)
    return path


def labels_of(suite, tables, tmp_path, **more):
    """The rows as prep reads them."""
    out = tmp_path / "labels.csv"
    label_tables.convert(suite, [str(t) for t in tables], out, split="test", **more)
    return read_manifest(out)


def test_rad_chest_ct_reduces_locations(tmp_path):
    findings = ["emphysema", "atelectasis", "nodule", "opacity", "fibrosis", "pleural_effusion", "consolidation"]
    findings += ["bronchial_wall_thickening", "bronchiectasis", "septal_thickening", "cardiomegaly"]
    findings += ["pericardial_effusion", "hernia", "calcification", "nodulegr1cm", "pericardial_thickening"]
    header = ["NoteAcc_DEID", *(f"{f}*{place}" for f in findings for place in ("left_lower", "right_upper", "heart"))]

    def row(name, **present):
        return [name, *(int(c.partition("*")[2] in present.get(c.partition("*")[0], ())) for c in header[1:])]

    test = write(
        tmp_path / "test.csv", [header, row("tst1", nodule=["right_upper"], calcification=["heart", "left_lower"])]
    )
    train = write(
        tmp_path / "train.csv",
        [header, row("trn1", nodulegr1cm=["left_lower"], pericardial_thickening=["heart"], hernia=["heart"])],
    )
    meta = write(tmp_path / "meta.csv", [["MRN_DEID", "NoteAcc_DEID"], ["m7", "tst1"], ["m7", "trn1"]])
    one, two = labels_of("rad_chest_ct", [test, train], tmp_path, joined=str(meta))
    assert len(one.labels) == 14 and one.volume == "tst1" and one.split == "test" and one.patient == two.patient == "m7"
    assert {k for k, v in one.labels.items() if v} == {"Lung nodule", "Calcification"}
    assert {k for k, v in two.labels.items() if v} == {"Hiatal hernia"}  # the larger nodules are another label
    assert labels_of("rad_chest_ct_organ", [test], tmp_path)[0].labels == one.labels
    bad = write(tmp_path / "bad.csv", [["NoteAcc_DEID", "emphysema*lung"], ["a", 1]])
    with pytest.raises(UserError, match="no column 'atelectasis' or"):
        labels_of("rad_chest_ct", [bad], tmp_path)


TARGETS = ["ICH", "IPH", "IVH", "SDH", "EDH", "SAH", "BleedLocation-Left", "BleedLocation-Right", "ChronicBleed"]
TARGETS += ["Fracture", "CalvarialFracture", "OtherFracture", "MassEffect", "MidlineShift"]


def test_cq500_is_the_majority_of_three(tmp_path):
    header = ["name", "Category", *(f"R{r}:{t}" for r in (1, 2, 3) for t in TARGETS)]

    def row(name, **reads):
        return [name, "B1", *(reads.get(t.replace("-", ""), (0, 0, 0))[r] for r in range(3) for t in TARGETS)]

    table = write(
        tmp_path / "reads.csv",
        [
            header,
            row("CQ500-CT-7", ICH=(1, 1, 0), IPH=(0, 1, 0), MidlineShift=(1, 1, 1), BleedLocationLeft=(1, 0, 1)),
            row("CQ500-CT-163", ICH=(1, 1, 1)),
            row("CQ500-CT-8", SAH=(1, "", 1), EDH=(1, "", 0), MassEffect=(0, 1, 1)),
        ],
    )
    one, two = labels_of("cq500", [table], tmp_path)
    assert one.path == "CQ500CT7 CQ500CT7" and set(one.labels) == set(suites.get("cq500").classes)
    assert {k for k, v in one.labels.items() if v} == {"ICH", "MidlineShift", "BleedLocation-Left"}
    assert {k for k, v in two.labels.items() if v} == {"SAH", "MassEffect"}
    assert "EDH" not in two.labels and "EDH" in one.labels  # no majority: unknown


def test_rsna_slices_become_studies(tmp_path):
    kinds = ("epidural", "intraparenchymal", "intraventricular", "subarachnoid", "subdural", "any")

    def rows(image, *present):
        return [[f"{image}_{k}", int(k in present)] for k in kinds]

    table = [["ID", "Label"], *rows("ID_a1"), *rows("ID_a2", "subdural", "any"), *rows("ID_b1", "epidural", "any")]
    table = write(tmp_path / "train.csv", [*table, *rows("ID_unknown", "any")])
    heads = [["SOPInstanceUID", "StudyInstanceUID", "PatientID"]]
    heads += [["ID_a1", "1.2", "p"], ["ID_a2", "1.2", "p"], ["ID_b1", "1.3", "q"]]
    one, two = labels_of("rsna", [table], tmp_path, joined=str(write(tmp_path / "heads.csv", heads)))
    assert (one.uid, one.patient) == ("1.2", "p") and list(one.labels) == list(suites.get("rsna").classes)
    assert {k for k, v in one.labels.items() if v} == {"any", "subdural"}
    assert {k for k, v in two.labels.items() if v} == {"any"}

    folder = tmp_path / "dicom"
    folder.mkdir()
    (folder / "notes.txt").write_text("x")
    for image, study, patient in heads[1:]:
        with pydicom.config.disable_value_validation():
            ds = pydicom.Dataset()
            ds.SOPInstanceUID, ds.StudyInstanceUID, ds.PatientID = image, study, patient
            ds.SOPClassUID = pydicom.uid.CTImageStorage
            ds.file_meta = pydicom.dataset.FileMetaDataset()
            ds.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
            ds.save_as(folder / f"{image}.dcm", enforce_file_format=True)
    assert [r.labels for r in labels_of("rsna", [table], tmp_path, joined=str(folder))] == [one.labels, two.labels]
    with pytest.raises(UserError, match="--join is missing"):
        labels_of("rsna", [table], tmp_path)


def test_other_tables(tmp_path):
    brain = write(tmp_path / "b.csv", [["path", "patient", "class"], ["x/1", "p1", "Glioma"], ["x/2", "p2", "normal"]])
    one, two = labels_of("pub_brain_5", [brain], tmp_path)
    assert (one.path, one.patient) == ("x/1", "p1") and one.labels == {c: c == "glioma" for c in scores.PUB_BRAIN_5}
    assert two.labels["normal"] == 1 and sum(two.labels.values()) == 1
    chest = list(suites.get("ct_rate").classes)
    table = [["VolumeName", "Medical material", *chest], ["valid_1_a_1.nii.gz", 1, 1, *[0] * 15]]
    (row,) = labels_of("ct_rate", [write(tmp_path / "c.csv", table)], tmp_path)
    assert row.volume == "valid_1_a_1" and row.labels == {c: c == "Emphysema" for c in chest}
    with pytest.raises(UserError, match="'edema' is not one of normal"):
        labels_of("pub_brain_5", [write(tmp_path / "d.csv", [["path", "class"], ["x", "edema"]])], tmp_path)
    with pytest.raises(UserError, match="has no published table"):
        labels_of("neuro_ct", [brain], tmp_path)
    with pytest.raises(UserError, match="no such file"):
        labels_of("cq500", [tmp_path / "absent.csv"], tmp_path)


# Numbers.


def test_weighted_metrics_are_those_of_repeated_rows(rng):
    labels = np.where(rng.uniform(size=60) < 0.1, np.nan, rng.integers(0, 2, 60))
    values = rng.integers(0, 9, 60) / 9  # ties
    weights = rng.integers(0, 4, (5, 60))
    for f, exact in ((scores.auc, sk.roc_auc_score), (scores.average_precision, sk.average_precision_score)):
        for w, found in zip(weights, f(labels, values, weights)):
            rows = np.repeat(np.arange(60), w)
            rows = rows[~np.isnan(labels[rows])]
            assert found == pytest.approx(exact(labels[rows], values[rows]))
            assert f(labels[rows], values[rows]) == pytest.approx(found)
    y, said = rng.integers(0, 3, 60), rng.integers(0, 3, 60)
    for w, matrix in zip(weights, scores.confusion(y, said, 3, weights)):
        np.testing.assert_array_equal(matrix, sk.confusion_matrix(y, said, sample_weight=w))
    matrices = scores.confusion(y, said, 3, weights)
    np.testing.assert_allclose(scores.weighted_f1(matrices), [scores.weighted_f1(m) for m in matrices])
    assert np.isnan(scores.average_precision(np.zeros(3), np.arange(3.0)))


def test_report_is_scikit_learn_with_missing_labels(rng):
    labels = rng.integers(0, 2, (80, 3)).astype(np.float32)
    labels[:9, 0], labels[:, 2] = np.nan, 1
    values = rng.uniform(size=(80, 3)) * 0.6 + 0.3 * np.nan_to_num(labels)
    found = classification.report(
        labels, values, ("a", "b", "c"), patients=np.arange(80), kind="multi-label", at=np.full(3, 0.5), bootstrap=50
    )
    y, v = labels[9:, 0], values[9:, 0]
    a = {k: x["value"] for k, x in found["classes"]["a"].items() if isinstance(x, dict)}
    assert a == pytest.approx(
        scores.binary_metrics(y, v, 0.5) | {"average_precision": sk.average_precision_score(y, v)}
    )
    assert (found["classes"]["a"]["studies"], found["classes"]["c"]["positives"]) == (71, 80)
    assert np.isnan(found["classes"]["c"]["recall"]["value"])  # all have it: nothing to measure
    both = [found["classes"][c]["weighted_f1"]["value"] for c in "ab"]
    assert found["macro"]["weighted_f1"]["value"] == pytest.approx(np.mean(both))
    assert found["macro"]["auc"]["low"] < found["macro"]["auc"]["value"] < found["macro"]["auc"]["high"]

    truth = rng.integers(0, 3, 80)
    p = scores.softmax(rng.normal(size=(80, 3)) + np.eye(3)[truth])
    found = classification.report(
        np.eye(3)[truth], p, ("a", "b", "c"), patients=np.arange(80), kind="multi-class", bootstrap=0
    )
    said = p.argmax(1)
    assert found["macro"]["balanced_accuracy"]["value"] == pytest.approx(sk.balanced_accuracy_score(truth, said))
    assert found["macro"]["auc"]["value"] == pytest.approx(sk.roc_auc_score(truth, p, multi_class="ovr"))
    assert found["classes"]["b"]["precision"]["value"] == pytest.approx(
        sk.precision_score(truth, said, labels=[1], average="macro")
    )
    with pytest.raises(UserError, match="nothing can be measured"):
        classification.report(labels[:, 2:], values[:, 2:], ["c"], patients=np.arange(80), kind="multi-label")


def test_intervals_cover(rng):
    """Of 95 % intervals about 95 % hold the true AUC, if patients are drawn, whose studies are alike; else fewer do."""
    true, n, per_patient = 0.76024993890652, 40, 3  # of two normal distributions one apart
    patients = np.repeat(np.arange(2 * n), per_patient)
    by_patient = by_row = 0
    for _ in range(120):
        y = np.repeat(np.arange(2 * n) % 2, per_patient)
        v = y + np.repeat(rng.normal(size=2 * n), per_patient)
        for groups in (patients, np.arange(len(y))):
            found = intervals.bootstrap(lambda w, y=y, v=v: {"auc": scores.auc(y, v, w)}, groups, 200)
            value, low, high = found["auc"]
            assert low <= value <= high
            inside = low <= true <= high
            by_patient, by_row = (
                by_patient + (inside and groups is patients),
                by_row + (inside and groups is not patients),
            )
    assert 0.88 <= by_patient / 120 <= 0.99
    assert by_row / 120 < 0.85


def test_thresholds(rng):
    labels, values = np.array([0.0, 0, 1, 1, np.nan]), np.array([-3.0, -1, 2, 5, 0])
    assert scores.threshold_nearest(labels, values) == 0.5  # halfway between -1 and 2
    assert scores.threshold_nearest(labels, -values) < -5  # all are positive: above everything else
    assert scores.threshold_nearest(np.ones(3), np.arange(3.0)) == 0.5
    y, v = rng.integers(0, 2, 200), rng.normal(size=200)
    t = scores.threshold_nearest(y, v)
    distance = [np.hypot(1 - (v > c)[y == 1].mean(), (v > c)[y == 0].mean()) for c in (t, *rng.normal(size=50))]
    assert distance[0] <= min(distance) + 1e-12


def test_calibration(rng):
    p = rng.uniform(0.01, 0.99, size=40_000)
    y = (rng.uniform(size=p.size) < p).astype(float)
    assert calibration.binary(y, p)["ece"] < 0.01
    assert calibration.binary(np.array([1.0, np.nan]), np.array([0.25, 0.1])) == {"ece": 0.75, "brier": 0.5625}
    sharp = calibration.cool(p[:, None], 0.25, exclusive=False)
    t = calibration.fit_temperature(y[:, None], sharp, exclusive=False)
    assert t == pytest.approx(4, rel=0.1)
    np.testing.assert_allclose(calibration.cool(sharp, 4.0, exclusive=False)[:, 0], p, atol=1e-4)
    assert calibration.binary(y, sharp[:, 0])["ece"] > 0.1
    k = scores.softmax(2 * rng.normal(size=(20_000, 3)))
    truth = (rng.uniform(size=(len(k), 1)) > np.cumsum(k, 1)).sum(1)
    assert calibration.multiclass(truth, k)["ece"] < 0.02
    cooled = calibration.cool(k, 0.5, exclusive=True)
    assert calibration.fit_temperature(np.eye(3)[truth], cooled, exclusive=True) == pytest.approx(2, rel=0.1)


# Probes.


def clusters(rng, n, noise=0.3, classes=3):
    truth = rng.integers(0, classes, n)
    return np.eye(8)[truth] + noise * rng.normal(size=(n, 8)), np.eye(classes)[truth]


@pytest.mark.parametrize("exclusive", [True, False])
def test_probe_and_neighbours_learn_and_do_not_invent(rng, exclusive):
    names, patients = ("a", "b", "c"), np.repeat(np.arange(60), 2)
    (x, y), (z, truth) = clusters(rng, 120), clusters(rng, 90)
    y[:20, 0] = y[:20, 0] if exclusive else np.nan
    about = dict(patients=patients, exclusive=exclusive)
    fitted = probe.fit(x, y, names, **about)
    assert fitted.converged and len(fitted.models) == (1 if exclusive else 3)
    assert scores.macro_auc(truth, fitted.probabilities(z)) > 0.97
    few = probe.few_shot(x, y, names, z, shots=8, seed=0, **about)
    assert scores.macro_auc(truth, few) > 0.9
    votes = probe.knn(x, y, names, z, k=7)
    assert scores.macro_auc(truth, votes) > 0.95 and votes.min() >= 0 and votes.max() <= 1
    if exclusive:
        np.testing.assert_allclose(votes.sum(1), 1)

    noise, other = rng.normal(size=x.shape), rng.normal(size=z.shape)
    for values in (probe.fit(noise, y, names, **about).probabilities(other), probe.knn(noise, y, names, other, k=7)):
        assert abs(scores.macro_auc(truth, values) - 0.5) < 0.12


def test_probe_does_not_learn_patients(rng):
    """Features that only name the patient: with studies of one patient in both parts of a fold, the least
    regularisation would look best."""
    patients = np.repeat(np.arange(40), 4)
    x = np.repeat(rng.normal(size=(40, 30)), 4, axis=0) + 0.01 * rng.normal(size=(160, 30))
    y = np.repeat(rng.integers(0, 2, 40), 4)[:, None].astype(float)
    by_patient = probe.fit(x, y, ["a"], patients=patients, exclusive=False).strengths[0]
    by_study = probe.fit(x, y, ["a"], patients=np.arange(160), exclusive=False).strengths[0]
    assert by_patient < by_study


def test_probes_refuse(rng):
    x, y = clusters(rng, 30)
    y[:, 2] = 0
    about = dict(patients=np.arange(30), exclusive=False)
    with pytest.raises(UserError, match="class 'c': 0 training studies have it and 30 do not"):
        probe.fit(x, y, ("a", "b", "c"), **about)
    with pytest.raises(UserError, match="only 21 training studies are 'not a'"):
        probe.few_shot(x, y[:, :1], ("a",), x, shots=29, seed=0, **about)
    with pytest.raises(UserError, match="--k=31: only 30"):
        probe.knn(x, y, ("a", "b", "c"), x, k=31)
    drawn = probe._of_patients(np.arange(12), np.repeat(np.arange(4), 3), 4, rng)
    assert sorted(drawn // 3) == [0, 1, 2, 3]  # one study of every patient
