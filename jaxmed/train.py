"""The loop: one story for every system, from a config to trained weights. Read it top to bottom.

    mesh -> data -> objective -> optimiser -> state -> update -> evaluators -> loop -> summary

Everything that differs between systems (models, losses, batches, evaluation) is named by strings in the config and
keeps one of the five contracts; this file is the only place that updates parameters. `total_steps=0` evaluates and
stops. The same call again, after any kind of death, goes on from the newest checkpoint and ends with the same bits.
"""

import contextlib
import importlib.metadata
import json
import math
import signal
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import multihost_utils
from tqdm import tqdm

from jaxmed.core import accumulate, memory, metrics, optim, sharding, tree
from jaxmed.core.checkpoint import Checkpoints, start_from
from jaxmed.core.clock import Clock, peak_flops
from jaxmed.core.config import Config, call
from jaxmed.core.ema import with_ema
from jaxmed.core.errors import UserError
from jaxmed.core.load import load
from jaxmed.core.rng import step_rng


def run(config: Config, workdir: Path, *, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Trains what `config` describes and evaluates it.

    Args:
      config: the whole config; see `configs/` for the keys.
      workdir: gets metrics.jsonl, config.json, checkpoints/, evals/ and summary.json.
      say: where lines for the person go (called on process 0 only).

    Returns:
      The content of summary.json.

    Raises:
      UserError: a field of the config, a shard or a checkpoint is bad; the message says which and what to do.
    """
    memory.keep_freed()  # before jax starts its threads
    mesh = sharding.make_mesh(config.get("mesh"))
    peak = peak_flops(mesh)
    with jax.set_mesh(mesh):
        return _run(config, Path(workdir), mesh, peak, say if jax.process_index() == 0 else lambda line: None)


def _run(config: Config, workdir: Path, mesh, peak: float, say) -> dict[str, Any]:
    started = time.perf_counter()
    first = jax.process_index() == 0
    workdir.mkdir(parents=True, exist_ok=True)
    seed = config.at_least(0, "seed", 0)
    log, ckpt = config.get("log", Config({})), config.get("ckpt", Config({}))
    log_every, save_every = log.at_least(1, "every_steps", 50), ckpt.at_least(1, "every_steps", 1000)
    tensorboard = log.get("tensorboard", False)
    title = config.get("title", "jaxmed")
    config.get("preflight", Config({})).to_dict()  # read by `python -m jaxmed.preflight`
    say(f"{title}: {len(mesh.devices.ravel())} x {mesh.devices.ravel()[0].device_kind}, mesh {dict(mesh.shape)}")

    # ---- Data. Every batch is a pure function of (plan, step): no iterator has a state.
    if "source" in config:
        source = config.source.to_dict()
        if first:  # the others wait for it
            call(load("data.sources", source["name"]).make, config.source, skip=("name",))
        barrier("source")
    pipeline = load("data", "pipeline")
    microbatches = config.at_least(1, "accumulate", 1)
    stream = call(
        pipeline.make,
        config.input,
        seed=seed,
        train=True,
        sharding=sharding.batch_sharding(mesh),
        multiple_of=sharding.batch_size_multiple(mesh) * microbatches,
    )
    if (config.get("total_steps") is None) == (config.get("total_epochs") is None):
        raise UserError("give either config.total_steps or config.total_epochs")
    if config.get("total_steps") is not None:
        total_steps = config.at_least(0, "total_steps")
    else:
        total_steps = math.ceil(config.at_least(0, "total_epochs") * stream.steps_per_epoch)

    # ---- Objective: parameters, loss and predictions, as pure functions.
    objective = load("objectives", config.objective.name).make(config, stream.spec)
    if config.get("ema"):
        objective = with_ema(objective, config.ema)
    rng_init, rng_loop = jax.random.split(jax.random.key(seed))
    params_shape, _ = jax.eval_shape(objective.init, rng_init)

    # ---- Optimiser.
    rate = call(optim.schedule, config.schedule, total_steps=total_steps)
    tx = call(optim.make, config.optim, params_shape, schedule=rate, model_groups=objective.groups)
    factors = optim.learning_rate_groups(params_shape, (*config.optim.get("groups", ()), *objective.groups))

    # ---- State: shapes first, then shardings from the shapes, then arrays that are born where they belong.
    def init_state(rng):
        params, aux = objective.init(rng)
        return {"params": params, "opt": tx.init(params), "aux": aux, "step": jnp.zeros((), jnp.int32)}

    state_shape = jax.eval_shape(init_state, rng_init)
    param_shardings = sharding.infer(params_shape, config.get("sharding", ((".*", "replicate"),)), mesh)
    state_shardings = sharding.infer_like(state_shape, params_shape, param_shardings, mesh)
    abstract_state = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state_shape, state_shardings
    )
    checkpoints = Checkpoints(workdir / "checkpoints", keep=ckpt.at_least(1, "keep", 2))
    init_from, init_except = config.get("init_from"), config.get("init_except", ())
    decisive = {k: config[k] for k in ("objective", "optim", "schedule", "ema") if k in config}
    identity = {"plan_hash": stream.plan_hash, "total_steps": total_steps, "seed": seed, **plain(decisive)}
    start_step = 0 if checkpoints.latest is None else checkpoints.latest
    if checkpoints.latest is not None:
        check_same_run(checkpoints.meta(start_step), identity, workdir)
        train_state = checkpoints.load(start_step, abstract_state)
        say(f"resuming from step {start_step}")
    else:
        train_state = jax.jit(init_state, out_shardings=state_shardings)(rng_init)
        if init_from:
            train_state["params"], left = start_from(init_from, train_state["params"], leave=init_except)
            say(f"parameters from {init_from}" + (f", {len(left)} of them fresh: {', '.join(left)}" if left else ""))
    num_params = tree.num_params(params_shape)
    frozen = factors.get("0.0", 0)
    say(f"{num_params:,} parameters, of which {frozen:,} frozen; {total_steps} steps in {len(stream.spec)} bucket(s)")

    # ---- Update: what changes parameters, and nothing else does.
    update_fn = make_update_fn(objective, tx, rate, microbatches)

    # ---- Evaluators know predict functions, never a model.
    predict_fns = {
        name: jax.jit(lambda state, batch, fn=fn: fn(state["params"], state["aux"], batch))
        for name, fn in objective.predict_fns.items()
    }
    evaluators = make_evaluators(config, predict_fns, mesh, workdir)
    unread = config.unread()
    if unread:
        raise UserError(f"{unread[0]} is never read: it is misspelt or does not belong to this config")

    # ---- One executable per bucket, all compiled before the first step; another shape is then an error by itself.
    rng_loop = jax.device_put(rng_loop, sharding.replicated(mesh))
    update = {}
    if start_step < total_steps:
        compiling = time.perf_counter()
        update = compile_buckets(update_fn, abstract_state, state_shardings, stream.spec, rng_loop, mesh)
        say(f"compiled {len(update)} bucket(s) in {time.perf_counter() - compiling:.1f} s")

    def evaluate(step: int) -> dict[str, float]:
        values = {}
        for name, evaluator, every in evaluators:
            last = step == total_steps and not getattr(evaluator, "once", False)
            if step == 0 or last or (every and step % every == 0):
                values |= {f"{name}/{key}": float(v) for key, v in evaluator.run(train_state)}
        return values

    # ---- Loop.
    if first:
        metrics.write_json(workdir / "config.json", config.to_dict())
    step = start_step
    pending: list[Pending] = []  # measurements still on the devices, so that no step waits for them
    # Steps in flight beside the current one: a queue of batches is a queue of memory. On a CPU a queued step also takes
    # its temporaries at once, and gains nothing.
    ahead = 0 if mesh.devices.ravel()[0].platform == "cpu" else 2
    stopped = False
    with contextlib.ExitStack() as stack:
        writer = stack.enter_context(
            contextlib.closing(metrics.Writer(workdir, start_step=start_step, tensorboard=tensorboard, active=first))
        )
        progress = stack.enter_context(
            tqdm(total=total_steps, initial=start_step, desc="train", unit="step", disable=not first, mininterval=1)
        )
        stop_asked = stack.enter_context(stop_on_sigterm())
        stack.enter_context(checkpoints)
        batches = stack.enter_context(contextlib.closing(stream.batches(start_step, total_steps)))
        if start_step == 0:
            writer.write(0, evaluate(0))
        clock = Clock(start_step=start_step, peak=peak)
        for bucket, local_batch in batches:
            spec = stream.spec[bucket]
            batch = sharding.put_batch(local_batch, mesh, spec["_mask"].shape[0])
            train_state, measurements = update[bucket](train_state, batch, rng_loop)
            step += 1
            waste = {f"padding/{k}": v for k, v in stream.padding(step - 1).items()}
            pending.append(Pending(step, measurements, waste))
            if len(pending) > ahead:
                jax.block_until_ready(pending[-1 - ahead].measurements)
            clock.add(
                examples=waste["padding/records"],
                flops=3.0 * objective.flops_fn(spec) if objective.flops_fn else 0.0,
            )
            progress.update()

            stopped = stop_asked(step, every=log_every) and step < total_steps
            save = stopped or step == total_steps or step % save_every == 0
            if save or step % log_every == 0:
                measured = read_back(pending, stream, checkpoints.latest) | clock.tick(step)
                writer.write(step, measured)
                progress.set_postfix(loss=f"{measured['loss']:.4g}", refresh=False)
            with clock.pause():
                if save:
                    checkpoints.save(step, train_state, identity)
                if stopped:
                    break
                if step < total_steps and (values := evaluate(step)):
                    writer.write(step, values)
        checkpoints.close()

        # ---- Summary. A run that was killed between its last step and here evaluates now.
        lines = metrics.read(workdir)
        evaluated = [x for x in lines if any(k.startswith(f"{name}/") for name, *_ in evaluators for k in x)]
        if step == total_steps and evaluators and not said_by_first(bool(evaluated) and evaluated[-1]["step"] == step):
            evaluated.append(evaluate(step))
            writer.write(step, evaluated[-1])
    trained = [line for line in lines if "loss" in line]
    summary = {
        "before": without_step(evaluated[0]) if evaluated else {},
        "after": without_step(evaluated[-1]) if evaluated and step == total_steps else {},
        "train": without_step(trained[-1]) if trained else {},
        "steps": step,
        "total_steps": total_steps,
        "finished": step == total_steps,
        "seconds": time.perf_counter() - started,
        "num_params": num_params,
        "params_sha256": tree.params_sha256(sharding.gather(train_state["params"])),
        "plan_hash": stream.plan_hash,
        "versions": versions(),
    }
    if first:
        metrics.write_json(workdir / "summary.json", summary)
    if stopped:
        say(f"stopped by SIGTERM at step {step} of {total_steps}; the same command goes on from there")
    return summary


class Pending(NamedTuple):
    """A step whose measurements have not been read back."""

    step: int
    measurements: dict[str, jax.Array]
    waste: dict[str, float]


def check_same_run(meta: dict[str, Any], identity: dict[str, Any], workdir: Path) -> None:
    """A checkpoint continues only the run that wrote it: same data, plan, seed, length, loss and optimiser."""
    reasons = {
        "plan_hash": "the shards or config.input (buckets, batch size, split) differ",
        "total_steps": "config.total_steps differs, and with it the learning-rate schedule",
    }
    for key in sorted({*identity, *meta} - {"shapes"}):
        there, here = meta.get(key), identity.get(key)
        if there != here:
            raise UserError(
                f"{workdir}: its checkpoint belongs to another run: {reasons.get(key, f'config.{key} differs')} "
                f"({there} there, {here} here). Use another --workdir, and config.init_from to start from these weights"
            )


def plain(section: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"optim.b1": 0.9, ...} of nested sections, as JSON would give the values back."""
    values = {}
    for key, value in section.items():
        if isinstance(value, Mapping):
            values |= plain(value, f"{prefix}{key}.")
        else:
            values[prefix + key] = json.loads(json.dumps(value, default=str))
    return values


def make_update_fn(objective, tx, rate, microbatches: int = 1) -> Callable:
    """One training step, (train_state, batch, rng) -> (train_state, measurements): the only place where parameters
    change."""

    def update_fn(train_state, batch, rng):
        params, opt, aux, step = (train_state[k] for k in ("params", "opt", "aux", "step"))
        (loss, (aux, measurements)), grads = accumulate.value_and_grad(
            objective, params, aux, batch, step_rng(rng, step), step, microbatches=microbatches
        )
        updates, opt = tx.update(grads, opt, params)
        params = optax.apply_updates(params, updates)
        params, aux = objective.after_update(params, aux, step)
        measurements = {
            **measurements,
            "loss": loss,
            "grad_norm": optax.tree.norm(grads),
            "update_norm": optax.tree.norm(updates),
            "learning_rate": rate(step),
        }
        return {"params": params, "opt": opt, "aux": aux, "step": step + 1}, measurements

    return update_fn


def compile_buckets(update_fn, abstract_state, state_shardings, specs, rng, mesh) -> dict[Any, Callable]:
    """Traces one after the other, compiles side by side."""
    rows = sharding.batch_sharding(mesh)
    jitted = jax.jit(update_fn, donate_argnums=0, out_shardings=(state_shardings, sharding.replicated(mesh)))
    lowered = {}
    for bucket, spec in specs.items():
        batch = {k: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=rows) for k, x in spec.items()}
        lowered[bucket] = jitted.lower(abstract_state, batch, rng)
    with ThreadPoolExecutor() as pool:
        compiled = dict(zip(lowered, pool.map(lambda x: x.compile(), lowered.values())))
    memory.give_back()  # gigabytes, for large models
    return compiled


def make_evaluators(config: Config, predict_fns, mesh, workdir: Path) -> list[tuple[str, Any, int]]:
    evaluators = []
    for name in config.get("evals", ()):
        section = config.evals[name]
        evaluator = call(
            load("evals", section.type).Evaluator,
            section,
            predict_fns,
            mesh=mesh,
            outdir=workdir / "evals" / name,
            skip=("type", "every_steps"),
        )
        evaluators.append((name, evaluator, section.at_least(0, "every_steps", 0)))
    return evaluators


def read_back(pending: list[Pending], stream, last_saved: int | None) -> dict[str, float]:
    """The mean of the measurements since the last time, on the host; empties `pending`.

    Raises:
      UserError: one of them was not finite; names the first such step and the records of its batch.
    """
    values = [(p.step, {**jax.device_get(p.measurements), **p.waste}) for p in pending]
    pending.clear()
    for step, measured in values:
        bad = [k for k in ("loss", "grad_norm") if not np.isfinite(measured[k])]
        if bad:
            records = ", ".join(stream.records(step - 1))
            raise UserError(
                f"step {step}: {bad[0]} is {measured[bad[0]]}; the batch held the records {records}. "
                f"The newest checkpoint ({last_saved or 'none yet'}) is from before. Lower config.schedule.lr, set "
                "config.optim.clip_norm, or look at these records (python -m jaxmed.show)"
            )
    return {k: float(np.mean([m[k] for _, m in values])) for k in values[0][1]}


@contextlib.contextmanager
def stop_on_sigterm():
    """Yields `asked(step, every)`: did a SIGTERM arrive (on any process)?

    Processes must stop at the same step, so with several they agree on it only every `every` steps.
    """
    received = []
    try:
        previous = signal.signal(signal.SIGTERM, lambda *_: received.append(True))
    except ValueError:  # not in the main thread (a notebook server): nobody signals it either
        previous = None

    def asked(step: int, every: int) -> bool:
        if jax.process_count() == 1:
            return bool(received)
        return step % every == 0 and bool(multihost_utils.process_allgather(np.array(bool(received))).any())

    try:
        yield asked
    finally:
        if previous is not None:
            signal.signal(signal.SIGTERM, previous)


def barrier(name: str) -> None:
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def said_by_first(value: bool) -> bool:
    """What process 0 says (only it surely sees the files of the workdir), so that all do the same."""
    return bool(multihost_utils.broadcast_one_to_all(np.array(value))) if jax.process_count() > 1 else value


def without_step(line: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in line.items() if k != "step"}


def versions() -> dict[str, str]:
    packages = ("jaxmed", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
    return {name: importlib.metadata.version(name) for name in packages}
