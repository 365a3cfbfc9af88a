"""HLIP: contrastive pre-training on uncurated 3D studies and their reports.

System      hierarchical attention over slice, scan and study (jaxmed/models/hlip.py), BERT, CLIP losses.
Paper       Zhao et al., "Towards Scalable Language-Image Pre-training for 3D Medical Imaging", arXiv 2505.21862.

Demo        python -m jaxmed.main --config=configs/hlip.py:demo --workdir=runs/hlip_demo
  Data      2,600 + 200 synthetic phantom studies, made on the spot (runs/phantom): FLAIR, contrast T1 and CT.
  Hardware  2 CPU cores, 6 minutes.
  Expected  seed 0: zero-shot AUC over the lesion classes 0.935 (before 0.485), study-to-report R@5 10.9 times chance;
            logistic regression on histograms 0.656, on metadata 0.469.
Smoke       python -m jaxmed.main --config=configs/hlip.py:runlocal (tiny, two steps)

Try it      python -m jaxmed.main --config=configs/hlip.py:quick --config.input.dir=shards/brain --workdir=runs/quick
            (ten steps of a tiny model on your own shards: does everything run?)

Your data   python -m jaxmed.main --config=configs/hlip.py --config.input.dir=shards/brain --workdir=runs/brain
  Shards    python -m jaxmed.prep ... --recipe=hlip_brain_mri (or hlip_head_ct) --split=train=0.9,val=0.1
  Model     :variant=NAME, one of the published sizes in jaxmed/models/hlip.py. Default: the dual model, ViT-B, with one
            image token for sentences and one for reports. Models with one token learn from whole reports (CLIP or, by
            their name, SigLIP).
  Hardware  written for 8 accelerators of 80 GB or a TPU v5e-64; on less, raise config.accumulate (the loss stays that
            of the whole batch of 384) or lower config.input.batch_size.
  Settings  those of the newer published MRI run (see hlip_brain_published.py), except where they were mistakes or
            limits of the reference.
  Expected  not run: the published cohorts are private.
  Deviations from the published run: studies are padded to buckets of scans and masked, not repeated to 8 scans;
            equal texts do not repel each other; depth is bucketed too; bfloat16 without loss scaling; parameters are
            random unless config.init_from names a checkpoint (of `python -m jaxmed.port`, or of another run).
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from configs.common import parse_arg

PREFIX = "This study shows: "
TEMPLATES = (
    "{}",
    *(f"{{}} {word}" for word in ("identified", "noted", "seen")),
    *(f"{word} {{}}" for word in ("new", "known", "prominent", "likely", "possibly")),
    *(f"{word} {{}}" for word in ("indicating", "reflecting", "representing", "suggesting")),
    *(
        f"{word} {{}}"
        for word in ("indicative of", "suggestive of", "related to", "consistent with", "compatible with")
    ),
)


def get_config(arg=None):
    arg = parse_arg(arg, demo=False, runlocal=False, quick=False, variant="clip_vit_base_scan_study_dualdinotxt1568")
    if arg["demo"] or arg["runlocal"]:
        return small(arg["runlocal"])
    variant = "tiny" if arg["quick"] else arg["variant"]

    c = ConfigDict()
    c.title = "HLIP"
    c.seed = 0
    c.total_epochs = 25
    c.accumulate = 1
    c.init_from, c.init_except = "", ()

    c.input = dict(dir="shards/brain", split="train", batch_size=384)
    c.input.update(buckets=dict(scans=(1, 2, 4, 8), depth=(24, 48)), too_deep="center", empty_report="drop")
    c.input.update(keys=("image", "sentence", "text"), context=256, overflow="truncate", prefix=PREFIX)
    c.input.update(vocab=placeholder(str), workers=0, threads=8, prefetch=2)

    image = dict(name="hlip", variant=variant, patch_drop=0.5, drop_path=0.2, dtype="bfloat16")
    image.update(scan_blocks=True, remat="full", scan_positions="study")
    text = dict(name="bert", variant="bert_base", dtype="bfloat16", scan_blocks=True, remat="full")
    c.model = dict(name="two_towers", image=image, text=text)
    loss = "dual" if "dual" in variant else "siglip" if "siglip" in variant else "clip"
    c.objective = dict(name="clip", loss=loss, false_negatives="ignore")
    if loss == "dual":
        c.model.logit_bias_init = 2.659260036932778  # ln(1 / 0.07)
    else:
        c.input.keys = ("image", "text")
    if loss == "siglip":
        c.model.update(logit_scale_init=2.302585092994046, logit_bias_init=-10.0)  # ln 10

    c.schedule = dict(name="cosine", lr=3e-4, warmup_steps=1600)
    c.optim = dict(name="adamw", b1=0.9, b2=0.95, eps=1e-6, weight_decay=0.2, clip_norm=0.0)
    c.optim.update(no_decay=("(^|/)(bias|scale)$", "^logit_"), groups=(("(spatial|sequential)_posemb$", 0.0),))

    c.mesh = dict(data=-1, fsdp=1, tensor=1, seq=1)
    c.sharding = ((".*", "fsdp"),)
    c.ckpt = dict(every_steps=1000, keep=2)
    c.log = dict(every_steps=20, tensorboard=False)
    held_out = dict(dir=c.input.get_ref("dir"), split="val", batch_size=64, buckets=c.input.buckets)
    held_out.update(too_deep="center", empty_report="drop", context=256, overflow="truncate", prefix=PREFIX)
    held_out["vocab"] = c.input.get_ref("vocab")
    c.evals = dict(retrieval=dict(type="retrieval", every_steps=1000, input=held_out))
    c.report = "show"
    return quick(c) if arg["quick"] else c


def quick(c):
    """Does it run on my shards, on this machine? A few steps of a tiny model; it learns nothing."""
    del c["total_epochs"]
    c.total_steps = 10
    c.input.update(batch_size=4, threads=2)
    c.model.image.update(img_size=(48, 224, 224), patch=(8, 32, 32), dtype="float32", scan_blocks=False, remat="none")
    c.model.text.update(variant="tiny", max_positions=256, dtype="float32", scan_blocks=False, remat="none")
    c.schedule.warmup_steps = 2
    c.log.every_steps = 1
    c.evals.retrieval.input.update(split="train", batch_size=4)  # a small cohort may have no val split
    return c


def small(runlocal):
    """Embedded phantom studies and a model of 0.8 million parameters beside its vocabulary."""
    c = ConfigDict()
    c.title = "HLIP on phantoms (synthetic)"
    c.seed = 0
    c.init_from, c.init_except = "", ()
    c.total_steps = 2 if runlocal else 1000

    folder = "runs/phantom_runlocal" if runlocal else "runs/phantom"
    c.source = dict(name="phantom", dir=folder, train=32 if runlocal else 2600, test=16 if runlocal else 200)
    # Three thick-slice sequences, all axial, so that it learns in minutes; the phantom can do more (its Config).
    c.source.update(sequences=("flair", "t1c", "ct"), planes=(1.0, 0.0, 0.0), scans=(3, 3), size=32, depth=(8, 8))
    c.source.update(lesion_scale=1.4, noise=(0.01, 0.03), grey=0.15, distractors=0.4, step_mm=5.0)

    buckets = dict(scans=(3,), depth=(8,))
    c.input = dict(dir=folder, split="train", batch_size=8 if runlocal else 32, buckets=buckets)
    c.input.update(keys=("image", "text"), context=96, prefix=PREFIX)

    c.objective = dict(name="clip", loss="clip", false_negatives="ignore")
    image = dict(name="hlip", img_size=(8, 32, 32), patch=(4, 8, 8), width=96, heads=3, depth=3, out_dim=96)
    image.update(levels=("scan", "scan", "study"), pool="dinotxt", posemb_init="1d2d", init_std=0.08)
    text = dict(name="bert", width=96, depth=2, heads=3, mlp_width=384, max_positions=96, vocab_size=30522)
    text.update(pooler="mean")
    c.model = dict(name="two_towers", image=image, text=text)

    c.schedule = dict(name="cosine", lr=1e-3, warmup_steps=1 if runlocal else 50)
    c.optim = dict(name="adamw", b2=0.98, eps=1e-6, weight_decay=0.05, clip_norm=1.0)
    c.optim.no_decay = ("(^|/)(bias|scale)$", "^logit_")
    c.ckpt = dict(every_steps=500, keep=2)
    c.log = dict(every_steps=1 if runlocal else 50)

    held_out = dict(dir=folder, split="test", batch_size=8 if runlocal else 50, buckets=buckets)
    lesions = dict(
        hemorrhage="There is an acute intracranial hemorrhage.",
        infarct="There is an acute ischemic infarct.",
        mass="There is a single brain mass with surrounding edema.",
        metastases="There are multiple brain metastases.",
    )
    zeroshot = dict(
        type="zeroshot", every_steps=200, input=held_out, context=96, templates=(PREFIX + "{}",), average=tuple(lesions)
    )
    zeroshot["classes"] = dict(normal="No acute intracranial abnormality.", **lesions)
    retrieval = dict(type="retrieval", every_steps=200, input=dict(held_out, context=96, prefix=PREFIX))
    baselines = dict(type="baselines", input=dict(dir=folder), classes=tuple(lesions))
    c.evals = dict(zeroshot=zeroshot, retrieval=retrieval, baselines=baselines)
    c.report = "show"
    return c
