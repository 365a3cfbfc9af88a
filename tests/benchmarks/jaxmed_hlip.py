"""Our side of the benchmark: the real configuration, pipeline, objective and training step.

`python -m tests.benchmarks.jaxmed_hlip JOB` is the worker process of `tests.benchmarks.hlip`.
"""

import sys
import time
from pathlib import Path

import jax
import numpy as np

from jaxmed import train
from jaxmed.core import memory, optim, sharding
from jaxmed.core.config import Config, call
from jaxmed.data import pipeline, shards
from jaxmed.objectives import clip
from jaxmed.ports import hlip as port
from tests.benchmarks import work
from tests.benchmarks.worker import serve


def write(folder: str | Path) -> None:
    """The studies of `work` as shards, one folder per kind."""
    for kind in work.KINDS:
        with shards.ShardWriter(Path(folder) / kind, 0) as writer:
            for i, one in enumerate(work.studies(kind)):
                scans = [{"voxels": x, "affine": np.eye(4), "name": "t1w"} for x in one["scans"]]
                writer.add({"key": f"{i:04d}", "scans": scans, "sentences": ["none"], "split": "train"})
        shards.finish(Path(folder) / kind, kind)


class Trainer:
    def __init__(self, job: dict):
        memory.keep_freed()  # as train.run does
        self.mesh = sharding.make_mesh({})
        jax.set_mesh(self.mesh)
        self.streams = {
            kind: pipeline.make(
                dir=str(Path(job["folder"]) / kind),
                split="train",
                batch_size=work.BATCH,
                buckets={"scans": work.BUCKETS, "depth": work.IMAGE["img_size"][:1]},
                context=work.TEXT["max_positions"],
                sharding=sharding.batch_sharding(self.mesh),
            )
            for kind in job["kinds"]
        }
        spec = {bucket: shapes for stream in self.streams.values() for bucket, shapes in stream.spec.items()}
        tower = {"dtype": job["dtype"], **job["tower"]}
        model = {
            "name": "two_towers",
            "image": {"name": "hlip", **work.IMAGE, **tower},
            "text": {"name": "bert", **work.TEXT, **tower},
        }
        config = Config({"model": model, "objective": {"name": "clip", "loss": "clip"}})
        self.objective = clip.make(config, spec)
        rng_init, rng_loop = jax.random.split(jax.random.key(0))
        rate = optim.schedule("constant", lr=work.LR, total_steps=0)
        options = Config({**work.OPTIM, "no_decay": ("(^|/)(bias|scale)$", "^logit_")})
        shape, _ = jax.eval_shape(self.objective.init, rng_init)
        tx = call(optim.make, options, shape, schedule=rate, model_groups=self.objective.groups)

        def init(rng):
            params, aux = self.objective.init(rng)
            return {"params": params, "opt": tx.init(params), "aux": aux, "step": jax.numpy.zeros((), "int32")}

        everywhere = sharding.replicated(self.mesh)
        shardings = jax.tree.map(lambda _: everywhere, jax.eval_shape(init, rng_init))
        self.state = jax.jit(init, out_shardings=shardings)(rng_init)
        self.rng = jax.device_put(rng_loop, everywhere)
        abstract = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), self.state, shardings)
        update_fn = train.make_update_fn(self.objective, tx, rate)
        self._compile = lambda: train.compile_buckets(update_fn, abstract, shardings, spec, self.rng, self.mesh)

    def build(self) -> dict:
        """Compiles; what the step of every bucket needs beside its arguments, bytes, as the compiler says."""
        self.update = self._compile()
        return {dict(b)["scans"]: f.memory_analysis().temp_size_in_bytes for b, f in self.update.items()}

    def check(self, file: str) -> None:
        """Writes our weights, one batch, and what we make of it."""
        [(_, batch)] = self._batches(next(iter(self.streams)), 0)[:1]
        params = self.state["params"]

        def loss_fn(params, batch):
            features = self.objective.features_fn(params, {}, batch, None, 0)
            value, _ = self.objective.loss_from_features(params, {}, features, batch, 0)
            return value, features

        (loss, z), grads = jax.jit(jax.value_and_grad(loss_fn, has_aux=True))(params, batch)
        frozen = [k for k in grads["image"] if k.endswith("posemb")]
        grads = {**grads, "image": {k: v for k, v in grads["image"].items() if k not in frozen}}
        norm = np.sqrt(sum(float((g**2).sum()) for g in jax.tree.leaves(grads)))
        weights = {f"w:{k}": v for k, v in port.to_published(jax.tree.map(np.asarray, params)).items()}
        arrays = {"image": batch["image"], "text": batch["text"], "zimg": z["image"][:, 0], "ztxt": z["text"]}
        np.savez(file, loss=loss, grad_norm=norm, **arrays, **weights)

    def _batches(self, kind: str, epoch: int) -> list:
        """Batches of the pipeline, with the peer's token ids in place of its own."""
        stream, found = self.streams[kind], []
        first = epoch * stream.steps_per_epoch
        ids = np.stack([s["ids"] for s in work.studies(kind)] + [np.zeros_like(work.studies(kind)[0]["ids"])])
        for bucket, batch in stream.batches(first, first + stream.steps_per_epoch):
            found.append((bucket, {**batch, "text": ids[batch["_id"]]}))
        return found

    def prepare(self, kind: str, epoch: int) -> list:
        return self._batches(kind, epoch)

    def step(self, item):
        bucket, batch = item
        batch = sharding.put_batch(batch, self.mesh, work.BATCH)
        self.state, measurements = self.update[bucket](self.state, batch, self.rng)
        return measurements["loss"]

    def finish(self, loss) -> float:
        jax.block_until_ready(self.state)
        # A program's temporaries are freed some moments after its results are there; train's loop then fetches a batch.
        time.sleep(0.005)
        return float(loss)


class Loader:
    def __init__(self, job: dict):
        memory.keep_freed()  # as train.run does
        self.mesh = sharding.make_mesh({})
        jax.set_mesh(self.mesh)
        self.stream = pipeline.make(
            dir=job["folder"],
            split="train",
            batch_size=work.LOAD_BATCH,
            buckets={"scans": (job["scans"],), "depth": (job["depth"],)},
            keys=("image",),
            sharding=sharding.batch_sharding(self.mesh),
            threads=work.CORES,
        )

    def run(self, epochs: int) -> int:
        """Reads everything `epochs` times onto the device; bytes of voxels that passed."""
        voxels = 0
        for _, batch in self.stream.batches(0, epochs * self.stream.steps_per_epoch):
            on_device = sharding.put_batch(batch, self.mesh, work.LOAD_BATCH)
            jax.block_until_ready(on_device)
            voxels += on_device["image"].size
        return voxels


if __name__ == "__main__":
    serve(sys.argv[1], {"train": Trainer, "load": Loader})
