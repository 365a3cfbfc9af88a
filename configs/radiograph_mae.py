"""Masked autoencoder on radiographs of every size, as in the thesis: ViT-B, patch 48, up to 3072 x 3072.

System      Radiograph MAE with Dynamic Batch Binning. Source: the thesis' code (radiograph MAE spec, sections 3 to 6).
Command     python -m jaxmed.main --config=configs/radiograph_mae.py --config.input.dir=shards/radiographs
            batching=length (default), pack, pack_rebucket or dbb (the published batches). Before that:
            python -m jaxmed.preflight --config=configs/radiograph_mae.py --sizes=shards/radiographs/index.npz
Smoke       python -m jaxmed.main --config=configs/radiograph_mae.py:runlocal (tiny, two steps, phantom radiographs)
Data        published: 516,188 radiographs of one hospital, not public; any shards of recipe `radiograph`.
Hardware    published: one GPU, 16 images per batch, 64 batches accumulated. The budget holds 16 of the largest images.
Time        not run here.
Expected    published: 0.0523 (mean squared error over all pixels, padding included).
Deviations  padding is neither attended nor scored; batches by token count instead of bins.
"""

from ml_collections import ConfigDict

from configs.common import parse_arg


def get_config(arg=None):
    arg = parse_arg(arg, runlocal=False, batching="length")
    if arg["runlocal"]:
        return small(arg["batching"])
    c = ConfigDict()
    c.title = "Radiograph MAE"
    c.seed = 12345
    c.total_epochs = 10
    c.accumulate = 1

    c.model = dict(name="mae", variant="radiograph_base", dtype="bfloat16", remat="full")
    c.objective = dict(name="mae", loss="token_mean")
    cost = dict(width=768, depth=12, mlp_width=3072, patch_dim=48 * 48, mask_ratio=0.75)
    cost.update(decoder_width=512, decoder_depth=8, decoder_mlp_width=2048)

    c.input = dict(dir="shards/radiographs", split="train", collate="radiograph", patch=48, workers=0, threads=8)
    batching(c, arg["batching"], cost)

    c.schedule = dict(name="cosine", lr=1e-4, warmup_steps=2520)
    c.optim = dict(name="adamw", b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.05)
    c.mesh = dict(data=-1, fsdp=1, tensor=1, seq=1)
    c.sharding = ((".*", "replicate"),)
    c.ckpt = dict(every_steps=1000, keep=2)
    c.log = dict(every_steps=20, tensorboard=False)
    # Percent of padding every image to the patch alone; `python -m jaxmed.preflight --sizes` fails above.
    c.preflight = dict(bounds=dict())
    c.preflight.bounds.length16 = dict(shapes=16, tokens=107.0, poster_compute=115.0, attention=111.0, flops=108.0)
    c.preflight.bounds.length32 = dict(shapes=32, tokens=104.0, poster_compute=108.0, attention=106.0, flops=104.5)
    packed = dict(shapes=17, tokens=100.5, poster_compute=101.0, attention=110.0, flops=103.0)
    c.preflight.bounds.pack_rebucket = packed
    return c


def small(mode):
    """Two steps of a tiny model on phantom radiographs, which are made on the spot."""
    c = ConfigDict()
    c.title = "Radiograph MAE (runlocal)"
    c.seed = 0
    c.total_steps = 2
    c.source = dict(
        name="phantom_radiographs", dir="runs/phantom_radiographs_runlocal", train=48, test=0, sides=(48, 96)
    )
    c.model = dict(name="mae", variant="tiny", patch=16, table=(6, 6))
    c.objective = dict(name="mae", loss="token_mean")
    cost = dict(width=48, depth=2, mlp_width=96, patch_dim=256, mask_ratio=0.75)
    cost.update(decoder_width=48, decoder_depth=1, decoder_mlp_width=96)
    c.input = dict(dir=c.source.dir, split="train", collate="radiograph", patch=16)
    batching(c, mode, cost, budget=16 * 36, lengths=2, multiple=4)
    c.schedule = dict(name="cosine", lr=1e-3, warmup_steps=1)
    c.optim = dict(name="adamw", weight_decay=0.05)
    c.log = dict(every_steps=1)
    c.ckpt = dict(every_steps=100, keep=1)
    return c


def batching(c, mode, cost, budget=16 * 4096, lengths=16, multiple=64):
    """How images make batches; the budget is in patches."""
    if mode == "dbb":
        c.input.update(mode="dbb", batch_size=16)
    elif mode == "length":
        c.input.update(mode="length", budget=budget, plan_options=dict(lengths=lengths, multiple=multiple, cost=cost))
    elif mode == "pack":
        c.input.update(mode="pack", budget=budget, plan_options=dict(attention="blocks", cost=cost))
    elif mode == "pack_rebucket":
        options = dict(attention="rebucket", lengths=lengths, multiple=multiple, cost=cost)
        c.input.update(mode="pack", budget=budget, plan_options=options)
    else:
        raise ValueError(f"batching={mode} is not one of length, pack, pack_rebucket, dbb")
