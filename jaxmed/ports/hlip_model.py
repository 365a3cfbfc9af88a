"""Which HLIP model published weights are: sizes from shapes, the rest from a variant or from the person.

What shapes cannot show is the attention level of every block, the number of heads, rotary angles, dropout rates, and
whether one image vector keeps its token axis.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmed.core.errors import UserError
from jaxmed.core.load import load
from jaxmed.ports import bert, hlip_visual, vit2d
from jaxmed.ports.names import Names

# Options of the command that are fields of `config.model`.
OPTIONS = {
    "variant": ("image.variant", "image tower: a name of jaxmed.models.hlip.VARIANTS"),
    "levels": ("image.levels", "attention of the first blocks, e.g. scan,scan,study; repeated to all of them"),
    "heads": ("image.heads", "attention heads of the image tower"),
    "text": ("text.variant", "text tower: a name of jaxmed.models.bert.VARIANTS"),
}
STARTS = {
    "image": "a 2D vision transformer (MAE; original, timm or Hugging Face names) that the image tower starts from",
    "text": "a BERT (Hugging Face names) that the text tower starts from",
}
NOTES = {
    "src": "The published HLIP weights started from ImageNet MAE weights, whose licence is CC-BY-NC 4.0.",
    "image": "The MAE release's ImageNet weights have the licence CC-BY-NC 4.0; so has what starts from them.",
}
_LOG_SCALE = math.log(1 / 0.07)
_CHEST_GRID = (112, 336, 336)
# Fields of the towers that shapes do not show, in the words of the command.
_UNSEEN_IMAGE = ("levels", "heads", "rope", "keep_token_axis")
_UNSEEN_TEXT = ("heads", "hidden_dropout", "attention_dropout")


def make(
    flat: Mapping[str, np.ndarray], given: Mapping[str, Any], names: Names | None = None
) -> tuple[dict[str, Any], list[str]]:
    """The `config.model` of weights, and what was assumed for it in sentences.

    Args:
      flat: {our path: array or shape}.
      given: fields of `config.model` that the person named; they win.
      names: of the published tensors; they show nothing here.

    Raises:
      UserError: shapes and `given` leave several models (lists them), or none.
    """
    del names
    given = dict(given)
    image, text = (dict(given.pop(side, {})) for side in ("image", "text"))
    model: dict[str, Any] = {"name": given.pop("name", "two_towers")}
    notes: list[str] = []
    text_out = next((flat[k].shape[-1] for k in ("text/proj/kernel", "text/proj_1/kernel") if k in flat), None)
    if any(k.startswith("image/") for k in flat):
        model["image"], why = _image(flat, image, text_out)
        notes += why
    if any(k.startswith("text/") for k in flat):
        model["text"], why = _text(flat, text, text_out)
        notes += why
    if len(model) == 1:
        raise UserError("these weights have neither an image tower (visual.*) nor a text tower (text.*)")
    if len(model) == 3 or "logit_scale" in flat:
        model["logit_scale_init"] = _LOG_SCALE
    if "logit_bias" in flat:
        dual = "image/reg_token" in flat
        model |= (
            {"logit_bias_init": _LOG_SCALE} if dual else {"logit_bias_init": -10.0, "logit_scale_init": math.log(10)}
        )
    return {**model, **given}, notes


def make_new(given: Mapping[str, Any]) -> dict[str, Any]:
    """The `config.model` of a model that starts from weights of others: `given.image.variant` or its fields.

    Raises:
      UserError: the image tower is not named.
    """
    given = dict(given)
    image, text = (dict(given.pop(side, {})) for side in ("image", "text"))
    if "variant" not in image and "levels" not in image:
        known = ", ".join(load("models", "hlip").VARIANTS)
        raise UserError(f"name the image tower to be started: --variant=NAME, one of {known}")
    image = {"name": "hlip", **image}
    tower = load("models", "two_towers").make_tower("image", image)
    sized = {"variant", "width"} & set(text)
    text = {"name": "bert", **({} if sized else {"variant": "bert_base"}), "out_dim": tower.out_dim, **text}
    model = {"name": "two_towers", "image": image, "text": text, "logit_scale_init": _LOG_SCALE}
    if str(image.get("variant")).startswith("siglip"):
        model |= {"logit_bias_init": -10.0, "logit_scale_init": math.log(10)}
    elif tower.pool == "dinotxt" and tower.reg_tokens:
        model["logit_bias_init"] = _LOG_SCALE
    return {**model, **given}


def objective(model: Mapping[str, Any]) -> dict[str, str]:
    """The `config.objective` that such a model was trained with."""
    if model.get("logit_bias_init") is None:
        return {"name": "clip", "loss": "clip"}
    return {"name": "clip", "loss": "siglip" if model["logit_bias_init"] < 0 else "dual"}


def recipe(model: Mapping[str, Any]) -> tuple[str | None, str]:
    """Which recipe of `prep` published weights were trained with, as far as their grid tells, and a sentence on it."""
    if "image" not in model:
        return None, ""
    grid = tuple(load("models", "two_towers").make_tower("image", model["image"]).img_size)
    shown = "x".join(map(str, grid))
    if grid == _CHEST_GRID:
        return "hlip_chest_ct_published", f"scans: the grid {shown} is chest CT's, so recipe=hlip_chest_ct_published"
    return None, (
        f"scans: the grid {shown} does not show how they were prepared; --recipe=NAME stores it here for predict. Of "
        "48x224x224, brain MR was hlip_brain_mri and head CT hlip_head_ct"
    )


def init(model: Mapping[str, Any]) -> Callable[[jax.Array], dict[str, Any]]:
    """`fn(rng) -> parameters` of a `config.model`, or of the one tower that is in it."""
    two_towers = load("models", "two_towers")
    fields = {"image": {}, "text": {}, **{k: v for k, v in model.items() if k != "name"}}
    module = two_towers.Model(**fields)
    tower = two_towers.make_tower("image", model["image"]) if "image" in model else None

    def fn(rng):
        inputs = {}
        if tower is not None:
            inputs["image"] = jnp.zeros((1, 1, *tower.img_size, tower.channels)[: 6 if tower.channels > 1 else 5])
        if "text" in model:
            inputs["text"] = jnp.ones((1, 2), jnp.int32)
        params = dict(module.init(rng, **inputs)["params"])
        if not {"image", "text"} <= set(model) and "logit_scale_init" not in model:
            del params["logit_scale"]
        return params

    return fn


# Parts of the towers that weights of other models do not have.
_FRESH = {
    "image": (r"^image/(reg_token|sequential_posemb)$", r"^image/(head|attn_pool)/"),
    "text": (r"^text/(proj(_[01])?|pooler)/", r"/lora_[ab]$"),
}


def start(side: str, state: Mapping[str, np.ndarray], model: Mapping[str, Any], file: str):
    """Parameters of one tower from an ImageNet ViT (MAE; made 3D as `models.layers.inflate` says) or from a BERT.

    Returns:
      ({our path: array}, `Names`, regexes of what is fresh besides).

    Raises:
      UserError: `file` holds something else, or words or positions of another number than the tower's.
    """
    two_towers = load("models", "two_towers")
    tower = two_towers.make_tower(side, model[side]) if side == "image" else two_towers.make_text_tower(model)
    if side == "image":
        found, ignored, unknown = vit2d.encoder(state, file)
        made = load("models.layers", "inflate").from_2d_mae(found, patch=tower.patch, grid=tower.grid)
        pairs = {name: hlip_visual.to_ours(f"trunk.{name}", x) for name, x in made.items()}
        flat = {f"image/{path}": x for path, x in pairs.values()}
        source = {"spatial_posemb": "pos_embed"}
        return (
            flat,
            Names({source.get(k, k): f"image/{p}" for k, (p, _) in pairs.items()}, ignored, unknown),
            _FRESH[side],
        )
    inner, names = bert.encoder(state, file)
    for path, what, field in (
        ("word_embeddings", "words", "vocab_size"),
        ("position_embeddings", "positions", "max_positions"),
    ):
        n, wanted = len(inner.get(path, ())), getattr(tower, field)
        if path in inner and n != wanted:
            raise UserError(
                f"{file}: its BERT has {n} {what}, the text tower has {wanted}: add --model.text.{field}={n}"
                + (", and use the tokenizer of these weights" if what == "words" else "")
            )
    flat = {f"text/{path}": x for path, x in inner.items()}
    return flat, names._replace(matched={k: f"text/{p}" for k, p in names.matched.items()}), _FRESH[side]


def _image(flat, given: dict[str, Any], text_out: int | None) -> tuple[dict[str, Any], list[str]]:
    hlip = load("models", "hlip")
    if "variant" in given:
        return {"name": "hlip", **given}, []
    seen = _image_sizes(flat, text_out)
    if {"levels", "heads"} <= set(given):
        model = {"name": "hlip", "rope": False, **seen, **given}
        assumed = ", ".join(f"{k}={model[k]}" for k in ("rope", "keep_token_axis") if k not in given)
        return model, [f"image: shapes do not show {assumed}; else give --model.image.FIELD=true"] if assumed else []
    defaults = {f.name: f.default for f in dataclasses.fields(hlip.Model)}
    fitting: dict[tuple, list[str]] = {}
    for name, fields in hlip.VARIANTS.items():
        full = {**defaults, **fields}
        same = all(full[k] == v for k, v in seen.items() if k not in ("img_size", "posemb_init", "keep_token_axis"))
        grid = [n // p for n, p in zip(full["img_size"], full["patch"])]
        same = same and grid == [n // p for n, p in zip(seen["img_size"], seen["patch"])]
        if same and all(_plain(full.get(k)) == _plain(v) for k, v in given.items()):
            fitting.setdefault(tuple(full[k] for k in _UNSEEN_IMAGE), []).append(name)
    if len(fitting) == 1:
        (values, names), *_ = fitting.items()
        shown = ", ".join(f"{k}={_show(v)}" for k, v in zip(_UNSEEN_IMAGE, values))
        return {"name": "hlip", "variant": names[0], **given}, [
            f"image: the sizes are those of {' = '.join(names)}, so {shown}"
        ]
    sizes = ", ".join(f"{k}={_show(v)}" for k, v in seen.items() if k in ("width", "depth", "patch", "pool", "out_dim"))
    if fitting:
        listed = "; ".join(
            f"--variant={' = '.join(names)} ({', '.join(f'{k}={_show(v)}' for k, v in zip(_UNSEEN_IMAGE, values))})"
            for values, names in fitting.items()
        )
        raise UserError(
            f"the image tower ({sizes}) may be any of {len(fitting)} published models, which shapes do not tell apart: "
            f"{listed}. Name the one that the release or its configuration names, or give --levels=... and --heads=N"
        )
    heads = [n for n in range(1, seen["width"] + 1) if seen["width"] % n == 0 and seen["width"] // n >= 8]
    example = "scan,scan,study" if seen["depth"] % 3 == 0 else "scan"
    raise UserError(
        f"the image tower ({sizes}) is none of the published models{_as_given(given)}: give --levels=... (slice, scan, "
        f"study; repeated to the {seen['depth']} blocks, e.g. --levels={example}) and --heads=N (published models have "
        f"64 channels per head; width {seen['width']} divides into {', '.join(map(str, heads))})"
    )


def _image_sizes(flat, text_out: int | None) -> dict[str, Any]:
    """Fields of models.hlip.Model from shapes."""
    for path in ("image/patch_embed/kernel", "image/spatial_posemb", "image/blocks_0/mlp/fc1/kernel"):
        if path not in flat:
            raise UserError(f"the image tower has no parameter {path!r}: its sizes cannot be read off")
    *patch, channels, width = flat["image/patch_embed/kernel"].shape
    grid = flat["image/spatial_posemb"].shape[1:4]
    head = flat["image/head/kernel"].shape if "image/head/kernel" in flat else None
    pool = "map" if "image/attn_pool/latent" in flat else "token"
    if pool == "token" and (head[0] if head else text_out) == 2 * width:
        pool = "dinotxt"
    fields = {
        "img_size": tuple(n * p for n, p in zip(grid, patch)),
        "patch": tuple(patch),
        "channels": channels,
        "width": width,
        "depth": _depth(flat, "image"),
        "mlp_ratio": flat["image/blocks_0/mlp/fc1/kernel"].shape[1] / width,
        "max_num_scans": flat["image/sequential_posemb"].shape[1] if "image/sequential_posemb" in flat else 0,
        "reg_tokens": flat["image/reg_token"].shape[1] if "image/reg_token" in flat else 0,
        "pool": pool,
        "proj": "linear" if head else "none",
        "out_dim": head[1] if head else width * (2 if pool == "dinotxt" else 1),
        "keep_token_axis": pool == "dinotxt",
        "posemb_init": "1d2d" if pool == "dinotxt" or width % 6 else "3d",
    }
    return fields


def _text(flat, given: dict[str, Any], text_out: int | None) -> tuple[dict[str, Any], list[str]]:
    known = load("models", "bert")
    for path in ("text/word_embeddings", "text/position_embeddings", "text/blocks_0/fc1/kernel"):
        if path not in flat:
            raise UserError(f"the text tower has no parameter {path!r}: its sizes cannot be read off")
    vocab, width = flat["text/word_embeddings"].shape
    sizes = {
        "vocab_size": vocab,
        "width": width,
        "depth": _depth(flat, "text"),
        "mlp_width": flat["text/blocks_0/fc1/kernel"].shape[1],
        "max_positions": flat["text/position_embeddings"].shape[0],
    }
    rest: dict[str, Any] = {"out_dim": text_out or width}
    notes: list[str] = []
    if "text/proj/kernel" not in flat:
        rest["projection"] = "mlp" if "text/proj_1/kernel" in flat else "none"
    if "text/pooler/kernel" in flat:
        rest["pooler"] = "cls"
    adapted = [k for k in known.LORA_TARGETS if f"text/blocks_0/{k}/lora_a" in flat]
    if adapted:
        rest |= {"lora_rank": flat[f"text/blocks_0/{adapted[0]}/lora_a"].shape[1], "lora_targets": tuple(adapted)}
        notes = [f"text: lora_alpha is not in weights; the model takes {given.get('lora_alpha', 8.0)}"]
    if "variant" in given:
        return {"name": "bert", **rest, **given}, notes
    if "heads" in given:
        return {"name": "bert", **sizes, **rest, **given}, notes
    exact = [n for n, v in known.VARIANTS.items() if all(v[k] == x for k, x in sizes.items())]
    if exact:
        fields = known.VARIANTS[exact[0]]
        notes += [
            f"text: the sizes are those of {exact[0]}, so " + ", ".join(f"{k}={fields.get(k, 0)}" for k in _UNSEEN_TEXT)
        ]
        notes += [f"text: --text={n} has the same sizes with other dropout rates" for n in exact[1:]]
        return {"name": "bert", "variant": exact[0], **rest, **given}, notes
    inner = ("width", "depth", "mlp_width")
    alike = {v["heads"]: n for n, v in known.VARIANTS.items() if all(v[k] == sizes[k] for k in inner)}
    if len(alike) == 1:
        (heads, name), *_ = alike.items()
        note = f"text: the encoder is {name}'s ({vocab} words, {sizes['max_positions']} positions), so heads={heads}"
        return {"name": "bert", **sizes, "heads": heads, **rest, **given}, [*notes, note]
    shown = ", ".join(f"{k}={v}" for k, v in sizes.items())
    raise UserError(
        f"the text tower ({shown}) is none of {', '.join(known.VARIANTS)}: give its heads, --model.text.heads=N "
        f"(BERT has 64 channels per head, which would be {max(width // 64, 1)})"
    )


def _depth(flat, side: str) -> int:
    blocks = {k.split("/")[1] for k in flat if k.startswith(f"{side}/blocks_")}
    return len(blocks)


def _plain(x: Any) -> Any:
    return tuple(x) if isinstance(x, list) else x


def _show(x: Any) -> str:
    return ",".join(map(str, x)) if isinstance(x, (tuple, list)) else str(x)


def _as_given(given: Mapping[str, Any]) -> str:
    shown = ", ".join(f"{k}={_show(v)}" for k, v in given.items())
    return f" with {shown}" if shown else ""
