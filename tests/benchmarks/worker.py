"""Worker processes of a benchmark: one JSON request per line in, one JSON answer per line out.

A worker builds its side once and then measures whenever it is asked, so that two sides can take turns (A, B, A, B) on
a machine whose load changes. Memory is the process's own peak of resident pages, less what the imports take, and not
counting the peak of building the side (compiling), which is reported by itself.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]


def resident(field: str = "VmHWM") -> int:
    """Bytes resident at most ("VmHWM") or now ("VmRSS")."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) << 10
    raise RuntimeError(f"/proc/self/status has no {field}")


def cpu_seconds() -> float:
    """User and system seconds of this process and of its children that have ended."""
    t = os.times()
    return t.user + t.system + t.children_user + t.children_system


def serve(job: str, kinds) -> None:
    """Answers requests {"do": method, arguments} until the input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print does not belong to the answers
    imports = resident("VmRSS")
    settings = json.loads(job)
    side = kinds[settings["kind"]](settings)
    built = 0
    for line in sys.stdin:
        request = json.loads(line)
        do = request.pop("do")
        if do == "prepare":
            batches = side.prepare(**request)
            answer = len(batches)
        elif do == "step":
            answer = _step(side, batches[request["number"]])
        elif do == "timed":
            answer = _timed(side.run, **request)
        else:
            answer = getattr(side, do)(**request)
        if do == "build":
            built = resident() - imports
            Path("/proc/self/clear_refs").write_text("5")  # the peak starts again: now it is that of the work itself
        if do == "step":
            answer |= {"peak_bytes": resident() - imports, "built_peak_bytes": built}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def _timed(run, **arguments) -> dict:
    cpu, start = cpu_seconds(), time.perf_counter()
    value = run(**arguments)
    return {"value": value, "seconds": time.perf_counter() - start, "cpu_seconds": cpu_seconds() - cpu}


def _step(side, batch) -> dict:
    cpu, start = cpu_seconds(), time.perf_counter()
    loss = side.finish(side.step(batch))
    return {"seconds": time.perf_counter() - start, "cpu_seconds": cpu_seconds() - cpu, "loss": loss}


class Worker:
    """A running worker process; `ask` sends a request and waits for its answer."""

    def __init__(self, module: str, **job):
        self.name = module
        self._process = subprocess.Popen(
            [sys.executable, "-m", module, json.dumps(job)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=REPOSITORY,
            env={**os.environ, "PYTHONPATH": str(REPOSITORY), "JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""},
        )

    def ask(self, do: str, **arguments):
        self._process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.name} ended with exit code {self._process.wait()}; its message is above")
        return json.loads(line)

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_) -> None:
        self._process.stdin.close()
        self._process.wait()
