"""HLIP on CT-RATE as it was published: chest CT, one reconstruction per study, text tower locked.

System      as hlip.py. Source: the main branch of the original repository (HLIP spec, sections 2, 5 and 6).
Command     python -m jaxmed.prep dataset/train --manifest=train_reports.csv --manifest=train_metadata.csv \\
              --labels=train_predicted_labels.csv --report=ct_rate_raw --patient='train_\\d+' \\
              --split=train=1.0 --recipe=hlip_chest_ct_published --out=shards/ct_rate
            (the recipe leaves out the three reconstructions that the reference drops by name)
            python -m jaxmed.main --config=configs/hlip_ct_rate_published.py --config.input.dir=shards/ct_rate
            eval=shards/ct_rate_valid evaluates zero-shot after every epoch, on shards with labels (python -m
            jaxmed.evaluate suites ct_rate says how to make them).
            variant=siglip_vit_base_singlescan_h2_token2744 is the SigLIP form.
Data        24,128 training studies (47,149 reconstructions, one drawn per study and epoch); gated on its hub.
Hardware    published: 4 x A40, 16 studies each, about 6 hours for 20 epochs.
Time        not run here.
Expected    Rad-ChestCT, 3,630 volumes, with the published weights: macro AUC 0.7232 over 14 classes.
Quirks kept the blind centre crop; the text tower is locked except for its LayerNorms and projection, with its dropout
            on; studies with the same text repel each other.
Deviations  the gradient of the tower is the true one; bfloat16 instead of float16 with loss scaling; CXR-BERT and the
            MAE weights must come with config.init_from, and with them config.input.vocab (the tokenizer of CXR-BERT:
            a vocabulary and weights that do not belong together are the reference's silent error).
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from configs.common import parse_arg


def get_config(arg=None):
    arg = parse_arg(arg, runlocal=False, patch_drop=0.0, variant="clip_vit_base_singlescan_h2_token2744", eval="")
    siglip = arg["variant"].startswith("siglip")
    c = ConfigDict()
    c.title = "HLIP, published CT-RATE run"
    c.seed = 0
    c.total_epochs = 20
    c.accumulate = 1
    c.init_from, c.init_except = "", ()

    c.input = dict(dir="shards/ct_rate", split="train", batch_size=64, buckets=dict(scans=(1,), depth=(112,)))
    c.input.update(keys=("image", "text"), context=512, overflow="truncate", empty_report="drop", too_deep="center")
    c.input.update(vocab=placeholder(str), workers=0, threads=8, prefetch=2)

    c.objective = dict(name="clip", loss="siglip" if siglip else "clip", false_negatives="keep")
    image = dict(name="hlip", variant=arg["variant"], patch_drop=arg["patch_drop"], drop_path=0.2)
    image.update(pixel_range=(-1150.0, 350.0), dtype="bfloat16", remat="full", scan_blocks=True)
    text = dict(name="bert", variant="cxr_bert", dtype="bfloat16")
    c.model = dict(name="two_towers", image=image, text=text)
    if siglip:
        c.model.update(logit_scale_init=2.302585092994046, logit_bias_init=-10.0)  # ln 10

    c.schedule = dict(name="cosine", lr=1e-5, warmup_steps=377)
    c.optim = dict(name="adamw", b1=0.9, b2=0.95 if siglip or arg["patch_drop"] else 0.98, eps=1e-6, weight_decay=0.2)
    # Frozen: position tables, and whatever is in the text tower and is no LayerNorm and not the projection.
    c.optim.update(no_decay=("(^|/)(bias|scale)$", "^logit_"), clip_norm=0.0)
    c.optim.groups = (("(spatial|sequential)_posemb$", 0.0), ("^(?!.*(?:_norm/|^text/proj/))text/", 0.0))
    c.mesh = dict(data=-1, fsdp=1, tensor=1, seq=1)
    c.sharding = ((".*", "replicate"),)
    c.ckpt = dict(every_steps=377, keep=2)
    c.log = dict(every_steps=20, tensorboard=False)
    c.evals = dict()
    if arg["eval"]:
        held_out = dict(dir=arg["eval"], split="test", batch_size=32, buckets=c.input.buckets, too_deep="center")
        c.evals.zeroshot = dict(type="zeroshot", suite="ct_rate", every_steps=377, input=held_out)
        c.evals.zeroshot.vocab = c.input.get_ref("vocab")
    c.report = "show"
    if arg["runlocal"]:
        runlocal(c)
    return c


def runlocal(c):
    """The same run on phantoms, tiny: two steps on any machine."""
    c.source = dict(name="phantom", dir="runs/phantom_runlocal", train=16, test=8, size=32, depth=(12, 12))
    c.input.update(dir=c.source.dir, batch_size=8, buckets=dict(scans=(1,), depth=(12,)))
    del c["total_epochs"]
    c.total_steps = 2
    tiny = dict(img_size=(12, 32, 32), patch=(4, 8, 8), width=48, heads=3, depth=3, pixel_range=(0.0, 255.0))
    siglip = c.objective.loss == "siglip"
    c.model.image.update(dtype="float32", out_dim=48 if siglip else 32, **tiny)
    c.model.text.update(variant="tiny", max_positions=512, dtype="float32")
    c.schedule.warmup_steps = 1
    c.log.every_steps = 1
