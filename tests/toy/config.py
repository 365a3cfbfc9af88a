"""A config outside the tree, `--config=tests/toy/config.py`: names its objective, source and evaluator with dots."""

from ml_collections import ConfigDict


def get_config(arg=None):
    del arg
    data = "runs/toy_data"
    c = ConfigDict()
    c.seed, c.total_steps, c.accumulate, c.ema, c.init_from = 3, 9, 1, 0.0, ""
    c.source = dict(name="tests.toy.source", dir=data)
    c.input = dict(dir=data, split="train", batch_size=8, buckets=dict(scans=(1, 2, 3), depth=(4,)))
    c.input.update(keys=("image", "text"), context=16, workers=0, threads=2)
    c.objective = dict(name="tests.toy.objective", noise=0.1, nan_at=-1)
    c.model = dict(width=16)
    c.schedule = dict(name="cosine", lr=0.05, warmup_steps=2)
    c.optim = dict(name="adamw", weight_decay=0.1, no_decay=("bias",), clip_norm=1.0, groups=())
    c.mesh = dict(data=-1, fsdp=1, tensor=1)
    c.sharding = (("kernel", "fsdp"), (".*", "replicate"))
    evaluation = dict(dir=data, split="test", batch_size=8, buckets=dict(scans=(1, 2, 3), depth=(4,)), keys=("image",))
    c.evals = dict(
        spread=dict(type="tests.toy.evaluator", every_steps=1, input=evaluation, kill_at=-1, signal_name="SIGKILL")
    )
    c.ckpt = dict(every_steps=2, keep=2)
    c.log = dict(every_steps=3, tensorboard=False)
    return c
