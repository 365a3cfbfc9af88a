"""HLIP's two towers: whole training steps, accumulation, locked text, zero-shot scores, metrics, learning rates."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxmed import predict, predict_model
from jaxmed.core import accumulate, optim, tree
from jaxmed.core.config import Config
from jaxmed.data import ops
from jaxmed.evals import prompts, relevance, scores
from jaxmed.models import bert
from jaxmed.objectives import clip
from jaxmed.ports import hlip as port
from tests.parity.readers import hlip_text, hlip_visual

SYSTEM = "hlip"
LOSSES = {"clip": "clip", "siglip": "siglip", "sentence_clip": "sentence", "dual_clip": "dual"}
# As in configs/hlip.py: no decay of biases, norms and scales; position tables are frozen.
NO_DECAY = (r"(^|/)(bias|scale)$", "^logit_")
FROZEN = (r"(spatial|sequential)_posemb$", 0.0)


def objective(case, batch: dict, loss: str = "clip", **options):
    """The objective that a config with these towers makes."""
    vision = hlip_visual.model(case.config["vision"])
    image = {k: getattr(vision, k) for k in vision.__dataclass_fields__ if k not in ("parent", "name")}
    model = {
        "name": "two_towers",
        "image": {"name": "hlip", **image},
        "text": {"name": "bert", **hlip_text.fields(case.config["text"])},
        "logit_bias_init": 0.0 if "logit_bias" in case.param else None,
    }
    spec = {"only": {k: jax.ShapeDtypeStruct(x.shape, x.dtype) for k, x in batch.items() if k != "draws"}}
    return with_draws_by_row(
        clip.make(Config({"objective": {"name": "clip", "loss": loss, **options}, "model": model}), spec)
    )


def draws_by_row(case, rows: int) -> dict:
    """The draws of all microbatches ("<name>_<number>", rows in order) together, rows first, to be dealt with them."""

    def parts(name):
        found = {int(m[1] or 0): x for k, x in case.input.items() if (m := re.fullmatch(rf"{name}(?:_(\d+))?", k))}
        return [jnp.asarray(found[k]) for k in sorted(found)]

    draws = {}
    if orders := parts("patch_order"):
        x = jnp.concatenate(orders)
        draws["patch_order"] = x.reshape(rows, -1, x.shape[-1])
    if perms := parts("seq_perm"):
        draws["seq_perm"] = jnp.repeat(jnp.stack(perms), rows // len(perms), axis=0)
    masks = {k: x for k, x in case.input.items() if k.startswith("drop_path_mask/")}
    return draws | {k: jnp.asarray(x).reshape(rows, -1) for k, x in masks.items()}


def with_draws_by_row(goal):
    """The same objective with draws (rows, groups of a row, ...) instead of (groups, ...)."""

    def flat(batch):
        join = {k: x if k == "seq_perm" else x.reshape(-1, *x.shape[2:]) for k, x in batch["draws"].items()}
        return {**batch, "draws": join}

    return goal._replace(
        loss_fn=lambda params, aux, batch, *rest: goal.loss_fn(params, aux, flat(batch), *rest),
        features_fn=lambda params, aux, batch, *rest: goal.features_fn(params, aux, flat(batch), *rest),
    )


def batch_of(case) -> dict:
    """The batch of a case; draws are by row (see `with_draws_by_row`)."""
    names = {"text": "input_ids"} if "input_ids" in case.input else {"sentence": "sentence_ids", "text": "report_ids"}
    image = hlip_visual.image(case.input["image"])
    texts = {k: hlip_text.ids(case.input[name]) for k, name in names.items()}
    return {"image": image, **texts, "_mask": jnp.ones(len(image)), "draws": draws_by_row(case, len(image))}


def value_and_grad(goal, params, batch, microbatches: int = 1):
    """Loss, measurements, gradients and features of a batch."""
    rng, step = jax.random.key(0), jnp.int32(0)
    (loss, (_, measurements)), grads = accumulate.value_and_grad(
        goal, params, {}, batch, rng, step, microbatches=microbatches
    )
    return loss, measurements, grads, goal.features_fn(params, {}, batch, rng, step)


def update(goal, params, grads, opt: dict):
    """Parameters after one step of `config.opt`."""
    names = list(tree.flatten(params))
    tx = optim.make(
        params,
        name=opt["name"].lower(),
        schedule=optim.schedule("constant", lr=opt["lr"], total_steps=1),
        b1=opt["beta1"],
        b2=opt["beta2"],
        eps=opt["eps"],
        weight_decay=opt["wd"],
        no_decay=NO_DECAY,
        groups=(FROZEN,) if any(re.search(FROZEN[0], n) for n in names) else (),
    )
    updates, _ = tx.update(grads, tx.init(params), params)
    return goal.after_update(optax.apply_updates(params, updates), {}, jnp.int32(0))[0]


def published(prefix: str, params) -> dict:
    return {f"{prefix}/{k}": x for k, x in port.to_published(params).items()}


def step(case) -> dict:
    """A whole training step, perhaps of several microbatches."""
    config, batch, params = case.config, batch_of(case), hlip_text.params(case)
    k, loss = config.get("accum_freq", 1), LOSSES[config["loss"]]
    goal = objective(case, batch, loss, clamp_bias=config.get("clamp_bias", False), legacy_scale_grad=k)

    @jax.jit
    def run(params, batch):
        loss, measurements, grads, features = value_and_grad(goal, params, batch, k)
        return loss, measurements, grads, features, update(goal, params, grads, config["opt"])

    value, measurements, grads, features, after = run(params, batch)
    values = {"loss": value, **{n: measurements.get(n, value) for n in ("loss_sentence", "loss_report")}}
    if case.kind == "sentence_step":  # the loss of the whole batch once for every microbatch
        values = {n: jnp.full((k,), x) for n, x in values.items()}
    produced = {f"output/{n}": x for n, x in values.items()}
    produced["output/logit_scale_exp"] = jnp.exp(params["logit_scale"])
    by_token = hlip_visual.model(config["vision"]).keep_token_axis
    produced["output/image_features"] = features["image"] if by_token else features["image"][:, 0]
    for name, key in {"text": "text", "report": "text", "sentence": "sentence"}.items():
        produced[f"output/{name}_features"] = features.get(key)
    return case.pick(produced | published("grad", grads) | published("output/param_after_step", after))


def accum_cached_features(case) -> dict:
    """The gradient of the full batch, and the reference's accumulated one, behind the option for its scale."""
    k, batch, params = case.config["accum_freq"], batch_of(case), hlip_text.params(case)
    loss = LOSSES[case.config.get("loss", "clip")]
    right, legacy = objective(case, batch, loss), objective(case, batch, loss, legacy_scale_grad=k)
    whole, _, grads, _ = jax.jit(lambda p, b: value_and_grad(right, p, b))(params, batch)
    parts, _, accumulated, _ = jax.jit(lambda p, b: value_and_grad(legacy, p, b, k))(params, batch)
    produced = {"output/loss_full_batch": whole, "output/loss_per_microbatch": jnp.full((k,), parts)}
    return case.pick(produced | published("grad/full_batch", grads) | published("grad/accumulated", accumulated))


def lock_text(case) -> dict:
    batch, params = batch_of(case), hlip_text.params(case)
    groups = bert.lock_groups(case.config["text"]["depth"], lock="all_but_norms")
    names = {n.removeprefix("text.") for n in hlip_text.trainable(params, groups)}
    assert names == set(case.config["trainable_text_names"]), names ^ set(case.config["trainable_text_names"])
    goal = objective(case, batch, LOSSES[case.config.get("loss", "clip")])
    loss, _, grads, _ = jax.jit(lambda p, b: value_and_grad(goal, p, b))(params, batch)
    trained = {k: g for k, g in tree.flatten(grads).items() if tree.first_match(groups, k, 1.0)}
    return case.pick({"output/loss": loss, **published("grad", tree.unflatten(trained))})


def zero_shot(case, image) -> dict:
    """Features of one study, the classifier of the ids, and what they give."""
    ids = hlip_text.ids(case.input["input_ids"])
    batch = {"image": image, "text": ids[:1], "_mask": jnp.ones(1)}
    embed, params = objective(case, batch).predict_fns, hlip_text.params(case)
    of_image = jax.jit(embed["embed_image"])(params, {}, {"image": image})
    of_text = jax.jit(embed["embed_text"])(params, {}, {"text": ids})
    features = np.asarray(of_image["image"])
    features = features if features.ndim == 2 else features[:, 0]  # the sentence token
    classifier = scores.classifier_from_prompts(np.asarray(of_text["text"]), case.config["classes"])
    logits = scores.zero_shot_logits(features, classifier, np.asarray(of_image["scale"]))
    produced = {
        "output/image_features": of_image["image"],
        "output/classifier": classifier,
        "output/logits": logits,
        "output/probs": scores.softmax(logits),
        "output/cosine_scores": scores.zero_shot_logits(features, classifier),
    }
    for key in case.wanted:
        pair = re.fullmatch(r"output/probs_pair_(\d+)_(\d+)", key)
        if pair:
            positive = scores.pair_probability(logits, int(pair[1]), int(pair[2]))
            produced[key] = np.stack([1 - positive, positive], axis=1)
    return produced


def zeroshot(case) -> dict:
    return case.pick(zero_shot(case, hlip_visual.image(case.input["image"])))


def zeroshot_from_scans(case) -> dict:
    config, scans = case.config, []
    for i in range(len(config["shapes"])):
        scan = case.input[f"scan_{i}"]
        scan = scan[..., 0] if scan.ndim == 4 else scan
        out, _ = ops.slice_grid(scan, resize_to=config["resize"], slices=config["num_slices"], crop=config["crop"])
        scans.append(ops.standardise(ops.unit_range(out, 0, 255)))
    image = np.stack(scans)[None]
    produced = zero_shot(case, jnp.asarray(image))
    found, _, _ = explained(case, jnp.asarray(image), produced["output/classifier"])
    return case.pick({"output/image": image[:, :, None], "output/relevance_tokens": found, **produced})


def explained(case, image, classifier) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Relevance by patch, and the last block's attention and its gradient, for the target class of one study."""
    config, batch = case.config, {"image": image}
    goal = objective(case, {**batch, "text": jnp.zeros((1, 2), jnp.int32), "_mask": jnp.ones(1)})
    tower, params = hlip_visual.model(config["vision"]), hlip_text.params(case)
    names = tuple(str(i) for i in range(config["classes"]))
    loaded = predict_model.Loaded("", {}, tower, params, goal.predict_fns, "clip", None, {}, None)
    asked = prompts.Prompts(names, (), "softmax", None)
    asker = predict.Asker(loaded, asked, classifier, target=config["target"])
    found = asker(batch, heatmap=True)["relevance"][0]

    def logit(z):
        return jnp.exp(params["logit_scale"]) * z @ jnp.asarray(classifier)[:, config["target"]], ()

    attend = jax.jit(lambda params: predict_model.explain(tower, params, batch, logit, every_row=True)[2:4])
    return found, *attend(params["image"])


def interpret_relevance(case) -> dict:
    image = hlip_visual.image(case.input["image"])
    produced = zero_shot(case, image)
    found, attention, gradient = explained(case, image, produced["output/classifier"])
    patch = case.config["vision"]["patch_size"]
    return case.pick(
        {
            **produced,
            "output/relevance_tokens": found,
            "output/relevance_voxels": np.stack([relevance.on_voxels(x, patch, image.shape[2:]) for x in found]),
            "output/attention_last": attention,
            "output/attention_last_grad": gradient,
        }
    )


def metrics_binary(case) -> dict:
    labels, values = case.input["labels"].astype(float), case.input["scores"]
    at_half, at_threshold = [], []
    for j in range(labels.shape[1]):
        pair = labels[:, j], values[:, j]
        m = scores.binary_metrics(*pair)
        at_half.append([m[k] for k in ("balanced_accuracy", "weighted_f1", "recall", "precision")])
        threshold = scores.threshold_searched(*pair)
        m = scores.binary_metrics(*pair, threshold)
        at_threshold.append([threshold, *(m[k] for k in ("auc", "accuracy", "weighted_f1", "recall", "precision"))])
    return {
        "output/at_argmax_balacc_wf1_recall_precision": np.array(at_half),
        "output/at_threshold_thr_auc_acc_wf1_recall_precision": np.array(at_threshold),
        "output/merged_score_class0_class1": scores.merge_max_if_any(values[:, 0], values[:, 1]),
    }


def metrics_pub_brain_5(case) -> dict:
    values = scores.pub_brain_5_metrics(case.input["labels"].argmax(1), case.input["logits"])
    return {"output/values": np.array([values[k] for k in case.config["names"]])}


def metrics_retrieval(case) -> dict:
    values = scores.image_text_retrieval(case.input["image_features"], case.input["text_features"])
    return {"output/values": np.array([values[k] for k in case.config["names"]])}


def lr_schedule(case) -> dict:
    c = case.config
    shared = dict(lr=c["base_lr"], total_steps=c["steps"], warmup_steps=c["warmup"])
    cooldown = {f"cooldown_{k}": c[f"cooldown_{k}"] for k in ("steps", "power", "end")}
    rates = {
        "cosine": optim.schedule(**shared),
        "const_cooldown": optim.schedule("const_cooldown", **shared, **cooldown),
    }
    return {f"output/{k}": jax.vmap(fn)(jnp.arange(c["steps"])) for k, fn in rates.items()}


READERS = {
    "clip_step": step,
    "sentence_step": step,
    "accum_cached_features": accum_cached_features,
    "lock_text": lock_text,
    "zeroshot": zeroshot,
    "zeroshot_from_scans": zeroshot_from_scans,
    "interpret_relevance": interpret_relevance,
    "metrics_binary": metrics_binary,
    "metrics_pub_brain_5": metrics_pub_brain_5,
    "metrics_retrieval": metrics_retrieval,
    "lr_schedule": lr_schedule,
}
