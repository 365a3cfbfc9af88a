"""HLIP's brain MRI and head CT runs as they were published, quirks included. For comparisons; use hlip.py to train.

System      as hlip.py. Source: the public branches of the original repository and the authors' blog (HLIP spec, 5).
Command     python -m jaxmed.main --config=configs/hlip_brain_published.py:run=mri --config.input.dir=shards/brain
Runs        mri (384 studies a step), ct (256), mri_ct (768), finetune (768, unmasked, on cleaned reports: give
            --config.init_from), original (256; its warm-up and patch dropout are not known: 2,000 steps and 0 here).
            variant=NAME selects another model of jaxmed/models/hlip.py; its heads must fit the run's loss.
            eval=shards/test evaluates zero-shot every 1,000 steps, on shards of Pub-Brain-5 (run=ct: of RSNA) with
            labels (python -m jaxmed.evaluate suites pub_brain_5 says how to make them).
Data        shards of python -m jaxmed.prep --recipe=hlip_brain_mri or hlip_head_ct; the cohorts (220,000 MRI and
            240,000 CT studies) are private.
Hardware    as published, 8 GPUs; the accumulation is theirs.
Time        not run here.
Expected    Pub-Brain-5, RSNA and CQ500: the paper's tables (relative claims only could be obtained).
Quirks kept studies are permuted and repeated to 8 or 10 scans; one draw of scan positions per batch; with
            accumulation the scales get that many times their gradient; studies with the same text repel each other.
Deviations  the tower's gradient is the true one (theirs is divided by the number of GPUs, which AdamW hides); bfloat16
            instead of float16 with loss scaling; weights are random unless config.init_from is given (theirs: an
            ImageNet MAE and BiomedBERT).
"""

import math

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from configs.common import parse_arg

DUAL = "ablate_seqposemb_clip_vit_base_multiscan_h2_dualdinotxt1568"
RUNS = {
    "mri": dict(batch=384, accumulate=6, lr=3e-4, warmup=1600, epochs=25, patch_drop=0.5, scans=8),
    "ct": dict(batch=256, accumulate=4, lr=2e-4, warmup=2500, epochs=20, patch_drop=0.25, scans=10),
    "mri_ct": dict(batch=768, accumulate=12, lr=4e-4, warmup=2400, epochs=25, patch_drop=0.5, scans=8),
    "finetune": dict(batch=768, accumulate=24, lr=5e-5, warmup=400, epochs=5, patch_drop=0.0, scans=8),
    "original": dict(batch=256, accumulate=1, lr=2e-4, warmup=2000, epochs=20, patch_drop=0.0, scans=10),
}


def get_config(arg=None):
    arg = parse_arg(arg, runlocal=False, run="mri", variant="", eval="")
    if arg["run"] not in RUNS:
        raise ValueError(f"run={arg['run']!r} is not one of {', '.join(RUNS)}")
    run, original = RUNS[arg["run"]], arg["run"] == "original"
    variant = arg["variant"] or ("clip_vit_base_multiscan_h2_token1176" if original else DUAL)
    one_sentence = "dinotxt" in variant or variant == "hlip-2025-10-08"
    tokens = "dual" if "dual" in variant else "sentence" if one_sentence else "clip"
    if "siglip" in variant:
        raise ValueError(f"variant={variant!r} is a chest model: see hlip_ct_rate_published.py")
    prefix = "This MRI study shows: " if original else "This study shows: "

    c = ConfigDict()
    c.title = f"HLIP, published run {arg['run']}"
    c.seed = 0
    c.total_epochs = run["epochs"]
    c.accumulate = run["accumulate"]
    c.init_from, c.init_except = "", ()

    c.input = dict(dir="shards/brain", split="train", batch_size=run["batch"])
    c.input.update(buckets=dict(scans=(run["scans"],), depth=(48,)), scan_sampling="repeat", num_scans=run["scans"])
    c.input.update(
        keys={"dual": ("image", "sentence", "text"), "sentence": ("image", "sentence")}.get(tokens, ("image", "text"))
    )
    c.input.update(context=256, overflow="truncate", prefix=prefix, too_deep="center", empty_report="drop")
    c.input.update(vocab=placeholder(str), workers=0, threads=8, prefetch=2)

    c.objective = dict(name="clip", loss=tokens, false_negatives="keep", legacy_scale_grad=run["accumulate"])
    image = dict(name="hlip", variant=variant, patch_drop=run["patch_drop"], drop_path=0.2, dtype="bfloat16")
    image.update(scan_positions="batch", remat="full", scan_blocks=True)
    text = dict(name="bert", variant="bert_base", dtype="bfloat16")
    text.update(scan_blocks=True, remat="full")
    c.model = dict(name="two_towers", image=image, text=text)
    if tokens == "dual":
        c.model.logit_bias_init = math.log(1 / 0.07)

    c.schedule = dict(name="cosine", lr=run["lr"], warmup_steps=run["warmup"])
    c.optim = dict(name="adamw", b1=0.9, b2=0.98 if original else 0.95, eps=1e-6, weight_decay=0.2, clip_norm=0.0)
    c.optim.update(no_decay=("(^|/)(bias|scale)$", "^logit_"), groups=(("(spatial|sequential)_posemb$", 0.0),))
    c.mesh = dict(data=-1, fsdp=1, tensor=1, seq=1)
    c.sharding = ((".*", "replicate"),)
    c.ckpt = dict(every_steps=1000, keep=2)
    c.log = dict(every_steps=20, tensorboard=False)
    c.evals = dict()
    if arg["eval"]:
        suite = {"ct": "rsna_templates", "original": "pub_brain_5"}.get(arg["run"], "pub_brain_5_templates")
        held_out = dict(dir=arg["eval"], split="test", batch_size=32, too_deep="center")
        held_out["buckets"] = dict(scans=(1, 2, 4, 8, 16), depth=(48, 144))
        c.evals.zeroshot = dict(type="zeroshot", suite=suite, every_steps=1000, input=held_out)
        c.evals.zeroshot.vocab = c.input.get_ref("vocab")
    c.report = "show"
    if arg["runlocal"]:
        runlocal(c, grid=(6 if "1568" in variant else 8, 16, 16))
    return c


def runlocal(c, grid):
    """The same run on phantoms, tiny: two steps on any machine."""
    levels = ("scan", "scan", "study")
    c.source = dict(name="phantom", dir="runs/phantom_runlocal", train=16, test=8, size=32, depth=(12, 12))
    c.input.update(
        dir=c.source.dir, batch_size=8 * min(c.accumulate, 2), buckets=dict(scans=(2,), depth=(12,)), num_scans=2
    )
    c.accumulate = min(c.accumulate, 2)
    c.objective.legacy_scale_grad = c.accumulate
    del c["total_epochs"]
    c.total_steps = 2
    tiny = dict(img_size=(12, 32, 32), patch=grid, width=48, heads=3, depth=3, levels=levels, out_dim=32)
    c.model.image.update(dtype="float32", **tiny)
    c.model.text.update(variant="tiny", max_positions=256, out_dim=32, dtype="float32")
    c.schedule.warmup_steps = 1
    c.log.every_steps = 1
