"""A grid of runs.

    python launch/sweep.py --config=configs/hlip.py:demo --out=runs/sweep config.schedule.lr=1e-4,3e-4 config.seed=0,1

Runs one after the other (each resumes or is skipped if it has finished) and ends with one table of the final metrics.
With `--print` it only prints the commands, for a cluster's array job.
"""

import argparse
import itertools
import json
import shlex
import subprocess
import sys
from pathlib import Path


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True)
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--metric", action="append", default=[], help="name in summary.json's 'after' [all]")
    parser.add_argument("--print", action="store_true", help="only print the commands")
    parser.add_argument("grid", nargs="+", metavar="config.key=value,value")
    args = parser.parse_args()

    axes = []
    for item in args.grid:
        key, sign, values = item.partition("=")
        if not sign or not key.startswith("config."):
            parser.error(f"{item!r}: write config.key=value,value")
        axes.append([(key, v) for v in values.split(",")])
    runs, failed = {}, 0
    for point in itertools.product(*axes):
        name = ",".join(f"{k.rsplit('.', 1)[-1]}={v}" for k, v in point)
        workdir = args.out / name
        command = [sys.executable, "-m", "jaxmed.main", f"--config={args.config}", f"--workdir={workdir}"]
        command += [f"--{k}={v}" for k, v in point]
        if args.print:
            print(shlex.join(command))
            continue
        summary = workdir / "summary.json"
        if not summary.exists() or not json.loads(summary.read_text())["finished"]:
            print(f"== {name}", flush=True)
            if subprocess.run(command, check=False).returncode:
                failed += 1
                continue
        runs[name] = json.loads(summary.read_text())["after"]
    names = args.metric or sorted({m for after in runs.values() for m in after})
    for metric in names:
        print(metric)
        for name, after in runs.items():
            print(f"  {name:40s} {after.get(metric, float('nan')):.4f}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
