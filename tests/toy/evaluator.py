"""Reports the spread of the embeddings; can die or ask to stop on the way, for the tests of resuming."""

import os
import signal

import numpy as np

from jaxmed.core import sharding
from jaxmed.data import pipeline


class Evaluator:
    def __init__(self, predict_fns, *, mesh, outdir, input, kill_at=-1, signal_name="SIGKILL"):
        del outdir
        self._predict, self._mesh = predict_fns["embed_image"], mesh
        self._stream = pipeline.make(
            **input,
            train=False,
            sharding=sharding.batch_sharding(mesh),
            multiple_of=sharding.batch_size_multiple(mesh),
        )
        self._kill_at, self._signal = kill_at, getattr(signal, signal_name)

    def run(self, train_state):
        if int(train_state["step"]) == self._kill_at:
            os.kill(os.getpid(), self._signal)
        rows = []
        for bucket, local in self._stream.batches(0, self._stream.steps_per_epoch):
            batch = sharding.put_batch(local, self._mesh, self._stream.spec[bucket]["_mask"].shape[0])
            out, mask = sharding.gather((self._predict(train_state, batch)["image"], batch["_mask"]))
            rows.append(out[mask > 0])
        rows = np.concatenate(rows)
        yield "studies", float(len(rows))
        yield "spread", float(rows.std())
