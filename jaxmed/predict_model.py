"""Trained towers with what they need to be used: `load_model` reads a run, one of its checkpoints, or ported weights.

WORKDIR             of `python -m jaxmed.main`: config.json and the newest of checkpoints/
WORKDIR/checkpoints/STEP
PORTED_DIR          of `python -m jaxmed.port`: model.json and params.safetensors
"""

import dataclasses
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jaxmed.core import checkpoint, weights
from jaxmed.core.config import Config
from jaxmed.core.ema import with_ema
from jaxmed.core.errors import UserError
from jaxmed.core.load import load
from jaxmed.evals import relevance


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A model that can be asked.

    Attributes:
      model: fields of the towers, as used here (see `load_model`).
      tower: the image tower, for its patch, heads and levels.
      params: of the whole model; the moving average, if the run kept one.
      predict_fns: {name: fn(params, {}, batch)} of the objective: "embed_image", "embed_text".
      loss: of the objective ("clip", "dual", ...).
      recipe: how the training data were prepared, as `prep` describes it, or None if that is not known.
      text: `vocab`, `lowercase`, `prefix` of the training data, those that are known.
      zeroshot: arguments of the run's own zero-shot evaluator, or None.
    """

    path: str
    model: dict[str, Any]
    tower: Any
    params: Any
    predict_fns: Mapping[str, Any]
    loss: str
    recipe: dict[str, Any] | None
    text: dict[str, Any]
    zeroshot: dict[str, Any] | None


def load_model(path: str | Path, *, value_range: tuple[float, float] | None = None) -> Loaded:
    """Reads towers and parameters.

    Activations are float32 on CPUs, whatever the run used, and attention is what suits this machine.

    Args:
      path: see the module.
      value_range: stored integers that mean 0 and 1, for models that do not say (see `models.hlip.Model.pixel_range`);
        default: those of the model's own recipe.

    Raises:
      UserError: nothing there is a model, or its parameters do not fit its description.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"--ckpt={path}: there is no such folder")
    if (path / "model.json").exists():
        return _ported(path, value_range)
    root = next((p for p in (path, path.parent.parent) if (p / "config.json").exists()), None)
    if root is None:
        raise UserError(
            f"--ckpt={path}: neither a run (config.json, checkpoints/), nor one of its checkpoints, nor ported weights "
            f"(model.json, {weights.PARAMS}; see python -m jaxmed.port)"
        )
    config = _json(root / "config.json")
    objective, fields, abstract = _build(config, _recipe_of(config), value_range, f"{root}/config.json")
    if config.get("ema"):
        averaged = jax.eval_shape(with_ema(objective, config["ema"]).init, jax.random.key(0))[1]
        params = checkpoint.load_part(path, "aux", _here(averaged))["ema"]
    else:
        params = checkpoint.load_part(path, "params", _here(abstract))
    return _loaded(path, config, objective, fields, params)


def _ported(path: Path, value_range) -> Loaded:
    config = _json(path / "model.json")
    if "model" not in config:
        raise UserError(f"{path / 'model.json'}: it has no field 'model'; make it again with python -m jaxmed.port")
    if vocab := config.get("text", {}).get("vocab"):
        config["text"]["vocab"] = str(path / vocab)  # it lies beside the weights
    objective, fields, abstract = _build(config, _recipe_of(config), value_range, f"{path}/model.json")
    params, _ = checkpoint.start_from(path, _here(abstract))
    return _loaded(path, config, objective, fields, params)


def _loaded(path: Path, config, objective, fields, params) -> Loaded:
    given = config.get("input", {}) | config.get("text", {})
    evals = [e for e in config.get("evals", {}).values() if e.get("type") == "zeroshot"]
    return Loaded(
        path=str(path),
        model=fields,
        tower=_tower(fields),
        params=params,
        predict_fns=objective.predict_fns,
        loss=_section(config)["loss"],
        recipe=_recipe_of(config),
        text={k: given[k] for k in ("vocab", "lowercase", "prefix") if given.get(k) is not None},
        zeroshot=evals[0] if evals else None,
    )


def _build(config: dict, recipe: dict | None, value_range, where: str):
    """The objective, the fields of its model, and the shapes of its parameters."""
    fields = json.loads(json.dumps(config.get("model", {})))
    if not {"image", "text"} <= set(fields):
        raise UserError(f"{where}: model.image and model.text are missing; predict needs an image and a text tower")
    for side in ("image", "text"):
        if "attn_impl" in fields[side]:
            fields[side]["attn_impl"] = "auto"
        if jax.default_backend() == "cpu" and "dtype" in fields[side]:
            fields[side]["dtype"] = "float32"
    values = value_range or (recipe or {}).get("value_range")
    if values is not None and fields["image"].get("pixel_range") is None:
        fields["image"]["pixel_range"] = list(values)
    section = _section(config)
    tower = _tower(fields)
    image = (1, 1, *tower.img_size) + ((tower.channels,) if tower.channels > 1 else ())
    spec = {"image": jax.ShapeDtypeStruct(image, jnp.float32), "scan_depths": jax.ShapeDtypeStruct((1, 1), jnp.int32)}
    spec |= {k: jax.ShapeDtypeStruct((1, 8), jnp.int32) for k in ("text", "sentence")}
    spec["_mask"] = jax.ShapeDtypeStruct((1,), jnp.float32)
    module = load("objectives", section["name"])
    objective = module.make(Config({"objective": section, "model": fields}), {"any": spec})
    if not {"embed_image", "embed_text"} <= set(objective.predict_fns):
        raise UserError(f"{where}: objective {section['name']!r} gives no embeddings of images and texts")
    return objective, fields, jax.eval_shape(objective.init, jax.random.key(0))[0]


def _tower(fields: dict[str, Any]):
    return load("models", fields["name"]).make_tower("image", fields["image"])


def _section(config: dict[str, Any]) -> dict[str, Any]:
    """config.objective; where it is not described, what `logit_bias` says (a second log-scale, or SigLIP's bias)."""
    bias = config["model"].get("logit_bias_init")
    return {"name": "clip", "loss": "clip" if bias is None else "siglip" if bias < 0 else "dual"} | config.get(
        "objective", {}
    )


def _here(abstract):
    """On one device of this machine, wherever it was saved."""
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), abstract)


def _recipe_of(config: dict[str, Any]) -> dict[str, Any] | None:
    """As the weights' description names it, else from the manifest of the training data, if they are still there."""
    if recipe := config.get("recipe"):
        return {"name": recipe} if isinstance(recipe, str) else recipe
    manifest = Path(str(config.get("input", {}).get("dir", ""))) / "dataset.json"
    return _json(manifest).get("recipe") if manifest.is_file() else None


def _json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as e:
        raise UserError(f"{path}: cannot be read ({type(e).__name__})") from None


def token_of(loss: str, asked: int | None) -> int:
    """Which image token prompts are compared with: the one that learned sentences, where there are two."""
    return asked if asked is not None else 0 if loss in ("sentence", "dual") else -1


def explain(tower, params, batch: Mapping[str, Any], score_fn: Callable, *, token: int = -1, every_row: bool = False):
    """Features of studies, and how much each of their patches spoke for a score (see `evals.relevance`).

    Args:
      tower: an image tower that takes `probe`.
      params: its parameters.
      batch: "image" (b, s, d, h, w) and perhaps "scan_depths".
      score_fn: normalised features (b, z) or (b, p, z) -> (scores (b,), anything to pass on).
      token: the image token that the score reads.
      every_row: give the attention of all rows, not only of those that the relevance needs (a study of 10 scans has
        12,000 of them).

    Returns:
      features, what score_fn passed on, attention (g, a, r, n), its gradient, relevance (b, s, d, h, w) by patch.
    """
    b, s = batch["image"].shape[:2]
    grid = tuple(n // p for n, p in zip(batch["image"].shape[2:5], tower.patch))
    groups = b * {"slice": s * grid[0], "scan": s, "study": 1}[tower.block_levels[-1]]
    prefix = tower.prefix_tokens
    n = prefix + b * s * math.prod(grid) // groups
    row = None if tower.pool == "map" else token % prefix if tower.pool == "dinotxt" else 0
    rows = n if every_row or row is None else prefix

    def features_fn(probe):
        probe = jnp.pad(probe, ((0, 0), (0, 0), (0, n - rows), (0, 0)))
        depths = batch.get("scan_depths")
        z, out = tower.apply({"params": params}, batch["image"], depths, probe=probe)
        return l2_normalize(z), out["attention"][:, :, :rows]

    probe = jnp.zeros((groups, tower.heads, rows, n))
    features, passed, attention, gradient = relevance.attention_gradient(features_fn, probe, score_fn)
    by_patch = relevance.of_patches(attention, gradient, prefix=prefix, row=row)
    return features, passed, attention, gradient, relevance.on_grid(by_patch, s, grid)


def l2_normalize(x):
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)
