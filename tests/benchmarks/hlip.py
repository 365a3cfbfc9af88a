"""HLIP against a PyTorch peer on this machine: `python -m tests.benchmarks.hlip [--part=train|input|all] [--json=OUT]`.

Needs `pip install -e '.[bench]'` (torch, timm, transformers); `--part=input` also the real files of `tests.fetch_data`.
Both sides run on the same cores in processes of their own and take turns; medians over epochs are printed, with the
lowest and the highest ratio.
"""

import argparse
import contextlib
import json
import os
import statistics
import tempfile
from pathlib import Path

from tests.benchmarks import work
from tests.benchmarks.worker import Worker

OURS, PEER = "tests.benchmarks.jaxmed_hlip", "tests.benchmarks.torch_hlip"
CODECS = ("zstd", "lz4")
# Name -> fields of both towers. The first one is the default of the library on a CPU.
FORMS = {
    "chunked": {},
    "chunked, remat dots": {"remat": "dots"},
    "chunked, remat full": {"remat": "full"},
    "chunked, remat full, scanned": {"remat": "full", "scan_blocks": True},
    "xla": {"attn_impl": "xla"},
    "xla, remat dots": {"attn_impl": "xla", "remat": "dots"},
    "xla, remat full": {"attn_impl": "xla", "remat": "full"},
}


def train(args, folder: str) -> list[dict]:
    from tests.benchmarks import jaxmed_hlip

    jaxmed_hlip.write(folder)
    rows = []
    forms = {name.strip(): FORMS[name.strip()] for name in args.forms.split(";")} if args.forms else FORMS
    for dtype in args.dtypes.split(","):
        for form, tower in forms.items():
            if dtype != "float32" and form != next(iter(forms)):
                continue
            job = {"kind": "train", "folder": folder, "dtype": dtype, "tower": tower, "kinds": args.kinds.split(",")}
            with Worker(OURS, **job) as ours, Worker(PEER, **job) as peer:
                ours.ask("check", file=f"{folder}/check.npz")
                error = peer.ask("check", file=f"{folder}/check.npz")
            print(f"\n{dtype}, {form}: largest difference to the peer: " + _numbers(error), flush=True)
            with Worker(OURS, **job) as ours, Worker(PEER, **job) as peer:
                rows += _measure(
                    ours, peer, job["kinds"], args.repeats, {"dtype": dtype, "form": form, "difference": error}
                )
            _print_pair(rows[-len(job["kinds"]) :])
    return rows


def _measure(ours: Worker, peer: Worker, kinds: list[str], repeats: int, about: dict) -> list[dict]:
    sides = {"jaxmed": ours, "peer": peer}
    for side in sides.values():
        side.ask("build")
    rows = []
    for kind in kinds:
        epochs = [_epoch(sides, kind, epoch) for epoch in range(repeats + 1)][1:]  # the first one warms up
        row = {**about, "kind": kind, "load": os.getloadavg()[0]}
        for name in sides:
            found = [epoch[name] for epoch in epochs]
            row[name] = {
                "studies_per_second": statistics.median(work.STUDIES[kind] / a["seconds"] for a in found),
                "studies_per_cpu_second": statistics.median(work.STUDIES[kind] / a["cpu_seconds"] for a in found),
                "peak_gb": max(a["peak_bytes"] for a in found) / 1e9,
                "build_gb": found[0]["built_peak_bytes"] / 1e9,
            }
        for field, key in (("speed", "seconds"), ("cpu_speed", "cpu_seconds")):
            row[field] = [epoch["peer"][key] / epoch["jaxmed"][key] for epoch in epochs]
        rows.append(row)
    return rows


def _epoch(sides: dict[str, Worker], kind: str, epoch: int) -> dict[str, dict]:
    """Sums over the steps of an epoch. The sides take turns step by step: the machine's own speed drifts in minutes."""
    steps = {name: side.ask("prepare", kind=kind, epoch=epoch) for name, side in sides.items()}
    found = {name: [] for name in sides}
    for number in range(max(steps.values())):
        for name, side in sides.items():
            if number < steps[name]:
                found[name].append(side.ask("step", number=number))
    return {
        name: {
            **{key: sum(a[key] for a in answers) for key in ("seconds", "cpu_seconds")},
            **{key: max(a[key] for a in answers) for key in ("peak_bytes", "built_peak_bytes")},
        }
        for name, answers in found.items()
    }


def _numbers(values: dict) -> str:
    return ", ".join(f"{k} {v:.1e}" for k, v in values.items())


def _print_pair(rows: list[dict]) -> None:
    for row in rows:
        a, b = row["jaxmed"], row["peer"]
        print(
            f"  {row['kind']:7} jaxmed {a['studies_per_second']:.2f} studies/s, {a['peak_gb']:.1f} GB; "
            f"peer {b['studies_per_second']:.2f} studies/s, {b['peak_gb']:.1f} GB; speed x"
            f"{statistics.median(row['speed']):.2f} ({min(row['speed']):.2f}-{max(row['speed']):.2f}; by CPU time x"
            f"{statistics.median(row['cpu_speed']):.2f}), memory x"
            f"{a['peak_gb'] / b['peak_gb']:.2f} (while compiling {a['build_gb']:.1f} GB); load {row['load']:.1f}",
            flush=True,
        )


def inputs(args, folder: str) -> list[dict]:
    from tests.benchmarks import volumes

    rows = []
    for name in volumes.KINDS:
        made = volumes.write(name, f"{folder}/{name}", CODECS)
        job = {"scans": made["scans"], "depth": made["depth"]}
        with contextlib.ExitStack() as stack:
            sides = {c: Worker(OURS, kind="load", folder=f"{made['folder']}/{c}", **job) for c in CODECS}
            sides["peer"] = Worker(PEER, kind="load", files=made["files"])
            for side in sides.values():
                stack.enter_context(side)
                side.ask("timed", epochs=1)
            found = {side: [] for side in sides}
            for _ in range(args.repeats):
                for side, worker in sides.items():
                    found[side].append(worker.ask("timed", epochs=args.epochs))
        tens = args.epochs * len(made["files"]) * made["scans"] / 10
        row = {"volumes": name, "load": os.getloadavg()[0]}
        for side, answers in found.items():
            row[side] = {
                "cpu_seconds_per_10_scans": statistics.median(a["cpu_seconds"] for a in answers) / tens,
                "gb_per_second": statistics.median(a["value"] / a["seconds"] for a in answers) / 1e9,
                "times_smaller": made["pt"] / made["shards"].get(side, made["pt"]),
            }
        rows.append(row)
        print(f"\n{name}, from files to batches on the device (load {row['load']:.1f})")
        for side, x in ((k, v) for k, v in row.items() if isinstance(v, dict)):
            share = x["cpu_seconds_per_10_scans"] / row["peer"]["cpu_seconds_per_10_scans"]
            print(
                f"  {side:4} {x['cpu_seconds_per_10_scans']:.4f} CPU-s per 10 scans (x{share:.2f} of the peer), "
                f"{x['gb_per_second']:.2f} GB/s of voxels, files {x['times_smaller']:.2f} times smaller than uint8 .pt",
                flush=True,
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", default="all", choices=("train", "input", "all"))
    parser.add_argument("--json", metavar="OUT", help="write every number there")
    parser.add_argument("--repeats", type=int, default=3, metavar="N", help="turns of each side (default 3)")
    parser.add_argument("--kinds", default=",".join(work.KINDS), help="of studies (default %(default)s)")
    parser.add_argument("--forms", default="", help="only these, with semicolons between, of " + "; ".join(FORMS))
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--epochs", type=int, default=4, metavar="N", help="passes over the volumes in a turn")
    args = parser.parse_args()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: work.CORES])
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        if args.part in ("input", "all"):
            results["input"] = inputs(args, folder)
        if args.part in ("train", "all"):
            results["train"] = train(args, folder)
    if args.json:
        Path(args.json).write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
