"""HLIP's vision tower: forward passes, given random draws, ragged studies, position tables."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxmed.core import tree
from jaxmed.models import hlip
from jaxmed.models.layers import inflate, posemb
from jaxmed.ports import hlip_visual as port

SYSTEM = "hlip"
# Draws of the reference that the model takes under the same names.
DRAWS = ("seq_perm", "patch_order", "drop_path_mask/")


def model(vision: dict) -> hlip.Model:
    """The tower that `config.vision` describes; `impl` is the branch of the original repository."""
    newer = vision["impl"] in ("abl", "rope")
    dinotxt, registers = vision.get("dinotxt", False), vision.get("reg_tokens", 0)
    proj = vision.get("proj", "linear")
    return hlip.Model(
        levels=tuple(vision["levels"]),
        depth=len(vision["levels"]),
        img_size=tuple(vision["img_size"]),
        patch=tuple(vision["patch_size"]),
        width=vision["width"],
        heads=vision["heads"],
        mlp_ratio=vision.get("mlp_ratio", 4.0),
        max_num_scans=vision["max_num_scans"],
        reg_tokens=registers,
        pool="dinotxt" if dinotxt else vision.get("pool", "token"),
        proj=proj,
        out_dim=vision["out_dim"],
        # Where the newer branch pools one class token beside registers, it returns (b, z) as the older one does.
        keep_token_axis=newer and (dinotxt or not registers),
        rope=vision["impl"] == "rope",
        patch_drop=vision.get("patch_drop", 0.0),
        drop_path=vision.get("drop_path", 0.0),
        posemb_init="1d2d" if newer else "3d",
    )


def params(case) -> dict:
    """The visual parameters of a case as our tree."""
    flat = dict(port.to_ours(k.removeprefix("visual."), x) for k, x in case.param.items() if k.startswith("visual."))
    return tree.unflatten({k: jnp.asarray(x) for k, x in flat.items()})


def image(x: np.ndarray) -> jax.Array:
    """(b, s, 1, d, h, w) as the files have it -> (b, s, d, h, w)."""
    return jnp.asarray(x)[:, :, 0]


def normalized(x):
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


def visual(case) -> dict:
    tower, weights, result = model(case.config["vision"]), params(case), {}
    for tag in case.config["inputs"]:
        z, out = jax.jit(tower.apply)({"params": weights}, image(case.input[f"image_{tag}"]))
        out = {**out, "features_normalized": normalized(z)}
        result |= {f"output/{tag}/{k}": v for k, v in out.items()}
    return case.pick(result)


def visual_train(case) -> dict:
    tower, weights = model(case.config["vision"]), params(case)
    draws = {k: jnp.asarray(x) for k, x in case.input.items() if k.startswith(DRAWS)}

    def loss(weights):
        z, out = tower.apply({"params": weights}, image(case.input["image"]), train=True, draws=draws)
        return (z * case.input["loss_weight"]).sum(), {**out, "features_normalized": normalized(z)}

    grads, out = jax.jit(jax.grad(loss, has_aux=True))(weights)
    published = dict(port.to_published(k, x) for k, x in tree.flatten(grads).items())
    result = {f"output/{k}": v for k, v in out.items()} | {f"grad/visual.{k}": v for k, v in published.items()}
    return case.pick(result)


def ragged(case) -> dict:
    x = image(case.input["image_padded"])
    counts = jnp.asarray(case.input["scan_counts"])
    depths = jnp.where(jnp.arange(x.shape[1])[None] < counts[:, None], x.shape[2], 0)
    z, _ = jax.jit(model(case.config["vision"]).apply)({"params": params(case)}, x, depths)
    return {"output/features": z, "output/features_normalized": normalized(z)}


def posemb_sincos(case) -> dict:
    c, width = case.config, case.config["dim"]
    return {
        "output/sincos_1d": posemb.sincos_1d(c["len1d"], width),
        "output/sincos_2d": posemb.sincos_2d(*c["grid2d"], width),
        "output/sincos_3d": posemb.sincos_3d(*c["grid3d"], width),
        "output/scratch_spatial_main": posemb.sincos_3d(*c["grid3d"], width)[None],
        "output/scratch_spatial_newer": posemb.sincos_1d2d(*c["grid3d"], width)[None],
        "output/scratch_sequential": posemb.sincos_1d(c["max_num_scans"], width)[None],
    }


def posemb_resample(case) -> dict:
    result = {}
    sequence, spatial = (jnp.asarray(case.input[k])[0] for k in ("sequential_posemb", "spatial_posemb"))
    for key in case.wanted:
        kind, _, size = key.removeprefix("output/").rpartition("_")
        if kind == "spatial":
            d, h, w = map(int, size.split("x"))
            result[key] = posemb.resample_depth(posemb.resample_plane(spatial, h, w), d)[None]
            continue
        real, rank = jnp.array([int(size[1:])]), jnp.arange(int(size[1:]))[None]
        if kind == "seq_train":
            rank = posemb.sample_sequence(jnp.asarray(case.input["perm"])[None], rank, real, sequence.shape[0])
        result[key] = posemb.resample_sequence(sequence, rank, real)
    return result


def init_from_2d_mae(case) -> dict:
    mae = {k.removeprefix("mae/"): x for k, x in case.input.items()}
    result = {}
    for one in case.config["cases"]:
        patch = tuple(one["patch"])
        grid = tuple(n // p for n, p in zip(one["img"], patch))
        for inflation, place in (("average", ""), ("central", "central/")):
            out = inflate.from_2d_mae(mae, patch=patch, grid=grid, inflation=inflation)
            result |= {f"output/{one['name']}/{place}{k}": x for k, x in out.items()}
    return case.pick(result)


READERS = {
    "visual": visual,
    "visual_train": visual_train,
    "ragged": ragged,
    "posemb_sincos": posemb_sincos,
    "posemb_resample": posemb_resample,
    "init_from_2d_mae": init_from_2d_mae,
}
