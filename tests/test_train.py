"""The trainer through its own command: resuming, meshes, processes, guards. The system trained is `tests/toy`."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxmed import train
from jaxmed.core import metrics, sharding
from jaxmed.core.checkpoint import load_part
from jaxmed.core.config import Config
from jaxmed.core.errors import UserError
from tests.toy import config as toy_config
from tests.toy import source

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toy") / "data"
    source.make(str(folder))
    return folder


def make_config(data, **changes) -> Config:
    """The toy config with `a__b=value` for `config.a.b`."""
    config = toy_config.get_config()
    config.source.dir = config.input.dir = config.evals.spread.input.dir = str(data)
    for name, value in changes.items():
        *sections, key = name.split("__")
        section = config
        for s in sections:
            section = section[s]
        section[key] = value
    return Config(config.to_dict())


def run(data, workdir, **changes) -> dict:
    return train.run(make_config(data, **changes), workdir, say=lambda line: None)


def command(data, workdir, *overrides, devices=8, env=None, cache=None, max_file_kb=None):
    flags = [f"--config.{field}={data}" for field in ("source.dir", "input.dir", "evals.spread.input.dir")]
    flags += [f"--config.{o}" for o in overrides] + ([] if cache is None else [f"--compile_cache={cache}"])
    flags_of_xla = os.environ["XLA_FLAGS"].replace("device_count=8", f"device_count={devices}")
    env = {**os.environ, "XLA_FLAGS": flags_of_xla, **(env or {})}
    limit = ["bash", "-c", f'ulimit -f {max_file_kb} && exec "$@"', "-"] if max_file_kb else []
    return subprocess.Popen(
        [*limit, sys.executable, "-m", "jaxmed.main", "--config=tests/toy/config.py", f"--workdir={workdir}", *flags],
        cwd=ROOT, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def finish(process) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=240)
    return process.returncode, out, err


@pytest.fixture(scope="module")
def straight(data, tmp_path_factory):
    return run(data, tmp_path_factory.mktemp("straight"))


class TestResume:
    @pytest.mark.parametrize(("kill_at", "workers"), [(1, 0), (5, 2)])
    def test_killed_and_started_again_ends_with_the_same_bits(self, data, straight, tmp_path, kill_at, workers):
        code, _, _ = finish(command(data, tmp_path, f"evals.spread.kill_at={kill_at}"))
        assert code == -9
        assert not (tmp_path / "summary.json").exists()
        code, out, err = finish(command(data, tmp_path, f"input.workers={workers}"))
        assert code == 0, err
        assert ("resuming from step" in out) == (kill_at == 5)  # the newest whole one: saving is asynchronous
        summary = json.loads((tmp_path / "summary.json").read_text())
        assert summary["params_sha256"] == straight["params_sha256"]
        assert summary["after"] == straight["after"]
        assert summary["before"] == straight["before"]
        steps = [line["step"] for line in metrics.read(tmp_path) if "spread/spread" in line]
        assert steps == list(range(10))

    def test_killed_before_the_last_evaluation_still_evaluates(self, data, straight, tmp_path):
        code, _, _ = finish(command(data, tmp_path, "evals.spread.kill_at=9"))
        assert code == -9
        assert run(data, tmp_path)["after"] == straight["after"]

    def test_sigterm_saves_and_exits_cleanly(self, data, straight, tmp_path):
        code, out, err = finish(
            command(
                data, tmp_path, "evals.spread.kill_at=5", "evals.spread.signal_name=SIGTERM", "ckpt.every_steps=100"
            )
        )
        assert code == 0, err
        assert "stopped by SIGTERM at step 6 of 9" in out
        assert not json.loads((tmp_path / "summary.json").read_text())["finished"]
        assert run(data, tmp_path)["params_sha256"] == straight["params_sha256"]

    def test_a_finished_run_started_again_changes_nothing(self, data, straight, tmp_path):
        first = run(data, tmp_path)
        again = run(data, tmp_path)
        assert again["params_sha256"] == first["params_sha256"]
        assert (again["before"], again["after"]) == (first["before"], first["after"])

    def test_another_plan_seed_or_length_is_refused(self, data, tmp_path):
        run(data, tmp_path, total_steps=2)
        for changes, reason in [
            ({"total_steps": 2, "input__batch_size": 16}, r"the shards or config\.input"),
            ({"total_steps": 4}, r"config\.total_steps differs"),
            ({"total_steps": 2, "seed": 4}, "differ"),
            ({"total_steps": 2, "schedule__lr": 0.5}, r"config\.schedule\.lr differs \(.* there, 0\.5 here\)"),
            ({"total_steps": 2, "optim__name": "sgd"}, r"config\.optim\."),
        ]:
            with pytest.raises(UserError, match=reason):
                run(data, tmp_path, **changes)


class TestMesh:
    def test_another_mesh_gives_the_same_training(self, data, straight, tmp_path):
        other = run(data, tmp_path, mesh={"data": 2, "fsdp": 4})
        assert other["train"]["loss"] == pytest.approx(straight["train"]["loss"], rel=1e-4)
        assert other["after"]["spread/spread"] == pytest.approx(straight["after"]["spread/spread"], rel=1e-4)

    def test_a_checkpoint_of_one_mesh_goes_on_on_another(self, data, straight, tmp_path):
        code, _, _ = finish(command(data, tmp_path, "evals.spread.kill_at=5"))
        assert code == -9
        other = run(data, tmp_path, mesh={"data": 4, "fsdp": 2})
        assert other["after"]["spread/spread"] == pytest.approx(straight["after"]["spread/spread"], rel=1e-4)

    def test_accumulation_equals_the_whole_batch(self, data, tmp_path):
        whole = run(data, tmp_path / "1", input__batch_size=16, objective__noise=0.0, evals={})
        parts = run(data, tmp_path / "2", input__batch_size=16, objective__noise=0.0, evals={}, accumulate=2)
        assert parts["train"]["loss"] == pytest.approx(whole["train"]["loss"], rel=1e-4)

    def test_two_processes_over_loopback_train_as_one(self, data, straight, tmp_path):
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        processes = [
            command(
                data, tmp_path, devices=4,
                env=dict(JAX_COORDINATOR_ADDRESS=f"127.0.0.1:{port}", JAX_NUM_PROCESSES="2", JAX_PROCESS_ID=str(i)),
            )
            for i in range(2)
        ]  # fmt: skip
        for code, _, err in [finish(p) for p in processes]:
            assert code == 0, err
        summary = json.loads((tmp_path / "summary.json").read_text())
        assert summary["plan_hash"] == straight["plan_hash"]
        assert summary["train"]["loss"] == pytest.approx(straight["train"]["loss"], rel=1e-4)
        assert summary["after"]["spread/spread"] == pytest.approx(straight["after"]["spread/spread"], rel=1e-4)


def test_nothing_compiles_after_step_one(data, tmp_path, monkeypatch):
    run(data, tmp_path / "before", total_steps=2)  # the first checkpoint of a process compiles copies of its arrays
    compiled, seen = [], []

    def listen(event, duration, **_):
        if event.endswith("backend_compile_duration"):
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    write = metrics.Writer.write

    def note(self, step, values):
        seen.append((step, len(compiled)))
        write(self, step, values)

    monkeypatch.setattr(metrics.Writer, "write", note)
    run(data, tmp_path / "run")
    assert compiled
    counts = {count for step, count in seen if step >= 1}
    assert len(counts) == 1, seen


class TestOptions:
    def test_nan_guard_names_step_and_records_and_saves_nothing_bad(self, data, tmp_path):
        with pytest.raises(
            UserError, match=r"step 6: loss is nan; the batch held the records study\d+.*checkpoint \(4\)"
        ):
            run(data, tmp_path, objective__nan_at=5)
        assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir() if p.name.isdigit()) == ["2", "4"]

    def test_zero_steps_only_evaluates(self, data, tmp_path):
        summary = run(data, tmp_path, total_steps=0, schedule__warmup_steps=0)
        assert summary["after"] == summary["before"]
        assert summary["after"]["spread/studies"] == 6

    def test_init_from_takes_the_parameters_of_another_run(self, data, straight, tmp_path):
        run(data, tmp_path / "a")
        summary = run(data, tmp_path / "b", total_steps=0, schedule__warmup_steps=0, init_from=str(tmp_path / "a"))
        assert summary["params_sha256"] == straight["params_sha256"]

    def test_ema_is_saved_and_predicts(self, data, straight, tmp_path):
        summary = run(data, tmp_path, ema=0.9)
        assert summary["params_sha256"] == straight["params_sha256"]
        assert summary["after"]["spread/spread"] != straight["after"]["spread/spread"]
        mesh = sharding.make_mesh()
        shapes = {"kernel": (64, 16), "bias": (16,)}
        abstract = {
            "image": {
                k: jax.ShapeDtypeStruct(v, np.float32, sharding=sharding.replicated(mesh)) for k, v in shapes.items()
            }
        }
        abstract["text"] = {"kernel": jax.ShapeDtypeStruct((16, 16), np.float32, sharding=sharding.replicated(mesh))}
        aux = load_part(tmp_path, "aux", {"inner": {}, "ema": abstract})
        assert np.isfinite(aux["ema"]["image"]["kernel"]).all()

    def test_epochs_count_in_steps_of_the_plan(self, data, tmp_path):
        assert run(data, tmp_path, total_steps=None, total_epochs=2, evals={})["steps"] == 2 * 3

    def test_tensorboard_gets_event_files(self, data, tmp_path):
        run(data, tmp_path, log__tensorboard=True, total_steps=2)
        assert list((tmp_path / "tensorboard").glob("events*"))


class TestBadInput:
    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"input__batch_size": 12}, r"input\.batch_size=12 is not a positive multiple of 8"),
            ({"optim__weigth_decay": 0.1}, r"optim\.weigth_decay is not an option here; did you mean 'weight_decay'"),
            ({"model__depth": 3}, r"config\.model\.depth is never read"),
            ({"objective__name": "clop"}, "no module 'jaxmed.objectives.clop'"),
            ({"mesh": {"data": 3}}, "does not fit 8 devices"),
            ({"optim__groups": (("imge", 0.0),)}, "'imge' matches no parameter"),
            ({"sharding": (("image", "fsdp"),)}, "no rule covers parameter 'text/kernel'"),
            ({"total_epochs": 2}, r"either config\.total_steps or config\.total_epochs"),
            ({"schedule__warmup_steps": 100}, "warm-up"),
            ({"schedule__lr": -1.0}, "schedule.lr=-1.0: give a number of at least 0"),
            ({"total_steps": -1}, "config.total_steps=-1: give a number of at least 0"),
            ({"log__every_steps": 0}, "config.log.every_steps=0: give a number of at least 1"),
            ({"ckpt__keep": 0}, "config.ckpt.keep=0: give a number of at least 1"),
            ({"init_from": "nowhere"}, "no checkpoint in"),
        ],
    )  # fmt: skip
    def test_config_fields_are_named(self, data, tmp_path, changes, message):
        with pytest.raises(UserError, match=message):
            run(data, tmp_path, **changes)

    def test_misspelt_flag_is_one_line(self, data, tmp_path):
        code, _, err = finish(command(data, tmp_path, "optim.weigth_decay=1"))
        assert code != 0
        assert "--config.optim.weigth_decay: the config has no field 'weigth_decay'. Did you mean" in err
        assert len(err.splitlines()) == 1

    def test_damaged_checkpoint_is_one_line(self, data, tmp_path):
        run(data, tmp_path, total_steps=4, evals={})
        for path in (tmp_path / "checkpoints" / "4").rglob("d/*"):
            path.write_bytes(b"x")
        code, _, err = finish(command(data, tmp_path, "total_steps=4"))
        assert code == 2
        assert err.strip().splitlines()[-1].startswith("error: checkpoint")
        assert "go on from step 2" in err and "Traceback" not in err

    def test_full_disk_is_one_line_and_leaves_no_checkpoint(self, data, tmp_path):
        # A limit on any one file: what a nearly full disk looks like to the writer.
        process = command(data, tmp_path, "model.width=512", cache="", max_file_kb=40)
        code, _, err = finish(process)
        assert code == 2, err
        assert "error: checkpoint" in err and "the disk is full" in err and "Traceback" not in err
        assert not [p for p in (tmp_path / "checkpoints").iterdir() if p.name.isdigit()]
