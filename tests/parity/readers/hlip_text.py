"""HLIP's text tower and the losses of given features."""

import jax
import jax.numpy as jnp

from jaxmed.core import tree
from jaxmed.models import bert, two_towers
from jaxmed.objectives import clip
from jaxmed.ports import hlip as port

SYSTEM = "hlip"


def fields(text: dict, lora: dict | None = None) -> dict:
    """`config.text` (and `config.lora`) as fields of our tower."""
    adapters = {} if lora is None else {"lora_rank": lora["r"], "lora_alpha": lora["alpha"]}
    if lora is not None:
        adapters["lora_targets"] = tuple(lora["targets"])
    return dict(
        vocab_size=text["vocab"],
        width=text["width"],
        depth=text["depth"],
        heads=text["heads"],
        mlp_width=text["mlp"],
        max_positions=text["max_pos"],
        out_dim=text["out_dim"],
        pooler=text["pooler"].removesuffix("_pooler"),
        projection=text["proj"],
        **adapters,
    )


def params(case) -> dict:
    return jax.tree.map(jnp.asarray, port.to_jaxmed(case.param))


def ids(x) -> jax.Array:
    return jnp.asarray(x, jnp.int32)


def trainable(weights: dict, groups) -> set[str]:
    """Published names of the text parameters whose learning rate is not 0."""
    flat = {k: x for k, x in tree.flatten(weights).items() if k.startswith("text/")}
    names = dict(zip(port.to_published(tree.unflatten(flat)), flat))
    return {name for name, path in names.items() if tree.first_match(groups, path, 1.0) > 0}


def text(case) -> dict:
    weights, config = params(case), case.config
    if "trainable_in_reference" in config:
        groups = bert.lock_groups(config["text"]["depth"], lock="lora_as_published")
        assert trainable(weights, groups) == set(config["trainable_in_reference"])
    produced = {}
    own = config["text"]["pooler"].removesuffix("_pooler")
    poolers = {own} | {k.removeprefix("output/").removesuffix("_pooler") for k in case.wanted if k.endswith("_pooler")}
    for pooler in poolers:
        tower = bert.Model(**{**fields(config["text"], config.get("lora")), "pooler": pooler})
        z, out = jax.jit(tower.apply)({"params": weights["text"]}, ids(case.input["input_ids"]))
        produced[f"output/{pooler}_pooler"] = z
        if pooler == own:
            normalized = two_towers.l2_normalize(z)
            # The files have zeros where there is no token.
            real = ids(case.input["input_ids"])[..., None] != 0
            produced |= {f"output/{k}": jnp.where(real, v, 0.0) for k, v in out.items() if k.startswith("hidden_")}
            produced |= {"output/features": z, "output/features_normalized": normalized}
    return case.pick(produced)


def _names(case) -> list[str]:
    return [k for k in ("image_features", "text_features", "logit_scale", "logit_bias") if k in case.input]


def _features(case) -> list[jax.Array]:
    return [jnp.asarray(case.input[k]) for k in _names(case)]


def _of_log_scale(loss):
    return lambda image, text, log_scale, *bias: loss(image, text, jnp.exp(log_scale), *bias)


def loss_clip(case) -> dict:
    arguments = _features(case)
    image, text, log_scale = arguments[:3]
    logits = jnp.exp(log_scale) * clip.similarity(image, text)
    value, grads = jax.value_and_grad(_of_log_scale(clip.clip_loss), argnums=(0, 1, 2))(*arguments)
    return {
        "output/loss": value,
        "output/logits_per_image": logits,
        "output/logits_per_text": logits.T,
        **{f"grad/{k}": g for k, g in zip(_names(case), grads)},
    }


def loss_siglip(case) -> dict:
    value, grads = jax.value_and_grad(_of_log_scale(clip.siglip_loss), argnums=(0, 1, 2, 3))(*_features(case))
    return {"output/loss": value, **{f"grad/{k}": g for k, g in zip(_names(case), grads)}}


# What W processes of the reference compute, from our terms of the global loss: process r has the rows `own(r)`.


def _per_rank(case, losses, summed: tuple[int, ...]) -> dict:
    """Loss and raw gradients of every process.

    Args:
      losses: (process, its live arguments, all arguments as constants) -> its loss.
      summed: which arguments' gradients come back from all processes (differentiable exchange).
    """
    arguments, world = _features(case), case.config["world"]
    rows = arguments[0].shape[0] // world
    numbers = tuple(range(len(arguments)))
    values, grads = [], []
    for r in range(world):
        value, g = jax.value_and_grad(lambda *live, r=r: losses(r, live, arguments), argnums=numbers)(*arguments)
        values.append(value)
        grads.append(g)
    result = {"loss_per_rank": jnp.stack(values)}
    for i, name in enumerate(_names(case)):
        per_rank = jnp.stack([g[i] for g in grads])
        if i < 2:
            total = per_rank.sum(0)
            per_rank = jnp.stack(
                [(total if i in summed else per_rank[r])[r * rows : (r + 1) * rows] for r in range(world)]
            )
        result[f"{name}_per_rank"] = per_rank
    return result


def _collect(by_mode: dict) -> dict:
    produced = {}
    for mode, values in by_mode.items():
        produced |= {f"{'output' if k == 'loss_per_rank' else 'grad'}/{mode}/{k}": v for k, v in values.items()}
    return produced


def _single(case, loss) -> dict:
    numbers = tuple(range(len(_names(case))))
    value, grads = jax.value_and_grad(_of_log_scale(loss), argnums=numbers)(*_features(case))
    return {
        "output/single_process/loss": value,
        **{f"grad/single_process/{k}": g for k, g in zip(_names(case), grads)},
    }


def loss_clip_distributed(case) -> dict:
    world, n = case.config["world"], case.input["image_features"].shape[0]
    rows = n // world

    def own(r):
        return (jnp.arange(n) // rows == r)[:, None]

    def everything(r, live, constant, gather):
        image, text = (x if gather else jnp.where(own(r), x, c) for x, c in zip(live[:2], constant[:2]))
        return clip.clip_loss(image, text, jnp.exp(live[2]))

    def local(r, live, constant, gather):
        others = live if gather else constant
        scale = jnp.exp(live[2])
        of_rows = clip.clip_terms(live[0], others[1], scale)[0]
        of_columns = clip.clip_terms(others[0], live[1], scale)[1]
        return 0.5 * jnp.where(own(r)[:, 0], of_rows + of_columns, 0.0).sum() / rows

    by_mode = {}
    for mode, is_local, gather in case.config["modes"]:

        def losses(r, live, constant, loss=local if is_local else everything, gather=gather):
            return loss(r, live, constant, gather)

        by_mode[mode] = _per_rank(case, losses, (0, 1) if gather else ())
    return case.pick(_collect(by_mode) | _single(case, clip.clip_loss))


def loss_siglip_distributed(case) -> dict:
    world, n = case.config["world"], case.input["image_features"].shape[0]
    rows = n // world

    def losses(r, live, constant):
        del constant
        image, text, log_scale, bias = live
        return clip.siglip_terms(image, text, jnp.exp(log_scale), bias)[r * rows : (r + 1) * rows].sum() / rows

    values = _per_rank(case, losses, (0, 1))
    return case.pick(_collect({m: values for m in case.config["impls"]}) | _single(case, clip.siglip_loss))


READERS = {
    "text_cls_linear": text,
    "text_poolers": text,
    "text_mlp_proj": text,
    "text_lora": text,
    "loss_clip": loss_clip,
    "loss_siglip": loss_siglip,
    "loss_clip_distributed": loss_clip_distributed,
    "loss_siglip_distributed": loss_siglip_distributed,
}
