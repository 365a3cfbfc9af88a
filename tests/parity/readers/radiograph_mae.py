"""Radiograph MAE: the autoencoder and the classifier, position tables, optimiser steps, learning rates and counts."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxmed.core import optim
from jaxmed.core.config import Config
from jaxmed.evals import scores
from jaxmed.models.layers import grid_posemb, token_rows
from jaxmed.models.layers.patch_embed import cut_patches, join_patches
from jaxmed.objectives import classify, mae
from jaxmed.ports import radiograph_mae as port

SYSTEM = "radiograph_mae"
LOSSES = {"masked": "token_mean", "full": "full"}


def fields(config: dict, **more) -> dict:
    """`config.model` of the encoder that a golden's config describes."""
    grid = config["image_size"] // config["patch_size"]
    width = config["hidden_size"]
    return {
        "width": width,
        "heads": config["num_attention_heads"],
        "depth": config["num_hidden_layers"],
        "mlp_width": config.get("intermediate_size", 4 * width),
        "patch": config["patch_size"],
        "channels": config.get("num_channels", 3),
        "table": (grid, grid),
        "norm_eps": config.get("layer_norm_eps", 1e-12),
        **more,
    }


def autoencoder(config: dict, **more) -> dict:
    """`config.model` of the whole autoencoder; the reference resamples its decoder's table in 1-D."""
    width = config["decoder_hidden_size"]
    return fields(
        config,
        name="mae",
        decoder_width=width,
        decoder_heads=config["decoder_num_attention_heads"],
        decoder_depth=config["decoder_num_hidden_layers"],
        decoder_mlp_width=config.get("decoder_intermediate_size", 4 * width),
        decoder_pos=config.get("decoder_pos", "flat1d"),
        mask_ratio=config["mask_ratio"],
        **more,
    )


def params(case) -> dict:
    return jax.tree.map(jnp.asarray, port.to_jaxmed(case.param))


def rows(images: list[np.ndarray], patch: int, noise: list[np.ndarray], n: int = 0, blank: int = 0) -> dict:
    """A batch of images (c, h, w), zero-padded to the patch and to n patches, and of blank rows."""
    grids = [tuple(-(-s // patch) for s in x.shape[1:]) for x in images] + [(0, 0)] * blank
    n = max(n, *(h * w for h, w in grids))
    patches = np.zeros((len(grids), n, patch * patch * images[0].shape[0]), np.float32)
    noises = np.full((len(grids), n), 0.5, np.float32)
    for row, own in zip(noises, noise):
        row[: len(own)] = own
    for row, x, (h, w) in zip(patches, images, grids):
        padded = np.zeros((1, h * patch, w * patch, x.shape[0]), np.float32)
        padded[0, : x.shape[1], : x.shape[2]] = x.transpose(1, 2, 0)
        row[: h * w] = cut_patches(padded, patch)[0]
    batch = {"patch": patches, "grid": np.array(grids), "noise": noises}
    batch["_mask"] = np.array([1.0] * len(images) + [0.0] * blank, np.float32)
    return jax.tree.map(jnp.asarray, batch)


def objective(module, model: dict, batch: dict, **options):
    spec = {"only": {k: jax.ShapeDtypeStruct(x.shape, x.dtype) for k, x in batch.items()}}
    return module.make(Config({"objective": {"name": "x", **options}, "model": model}), spec)


def gradients(goal, weights, batch) -> tuple[jax.Array, dict]:
    """Loss and gradients of what is trained; frozen tables have none."""
    rng, step = jax.random.key(0), jnp.int32(0)
    (loss, _), grads = jax.value_and_grad(goal.loss_fn, has_aux=True)(weights, {}, batch, rng, step)
    return loss, grads


def published(prefix: str, weights, layout: str = "hf4") -> dict:
    return {f"{prefix}/{k}": x for k, x in port.to_published(weights, layout=layout).items()}


def losses(prediction, out, *, norm_pix: bool) -> dict:
    """The losses that the files name, of one prediction."""
    given = (prediction, out, out["valid"])
    return {
        "loss_masked": mae.reconstruction_loss(*given, loss="token_mean", norm_pix=norm_pix),
        "loss_full": mae.reconstruction_loss(*given, loss="full"),
    }


def forward(case, model: dict, weights, batch) -> tuple[jax.Array, dict]:
    net = mae.load_model("config.model", model)

    def run(weights):
        return net.apply({"params": weights}, batch["patch"], batch["grid"], noise=batch["noise"])

    return jax.jit(run)(weights)


def one_grid(case) -> dict:
    """A batch of images of one size: every intermediate, both losses, gradients."""
    config, weights = case.config, params(case)
    model = autoencoder(config)
    batch = rows(list(case.input["pixels"]), config["patch_size"], list(case.input["noise"]))
    norm_pix = config.get("norm_pix_loss", False)
    prediction, out = forward(case, model, weights, batch)
    grid = tuple(int(x) for x in batch["grid"][0])
    embedded = embeddings(model, weights, batch)
    goal = objective(mae, model, batch, loss=LOSSES[config["loss"]], norm_pix=norm_pix)
    _, grads = jax.jit(lambda p, b: gradients(goal, p, b))(weights, batch)
    produced = {
        **losses(prediction, out, norm_pix=norm_pix),
        "logits": prediction,
        "reconstruction": join_patches(prediction, grid, config["patch_size"]).transpose(0, 3, 1, 2),
        "mask": out["mask"],
        "ids_restore": out["rank"],
        "latent": out["latent"],
        "encoder_input": out["blocks_input"],
        "encoder_layer0": out["blocks_0"],
        "decoder_input": out["decoder_blocks_input"],
        "decoder_layer0": out["decoder_blocks_0"],
        "patch_embeddings": embedded["patches"],
        "pos_encoder": positions(weights["pos_embed"], model["table"], "bicubic", grid),
        "pos_decoder": positions(
            weights["decoder_pos_embed"],
            model["table"],
            "bicubic" if model["decoder_pos"] == "grid2d" else "flat1d",
            grid,
        ),
    }
    return case.pick({f"output/{k}": x for k, x in produced.items()} | published("grad", grads))


def embeddings(model: dict, weights, batch) -> dict:
    """The embedding of every patch (nothing removed), class token left out."""
    net = mae.load_model("config.model", model)

    def run(weights):
        return net.apply({"params": weights}, batch["patch"], method=lambda m, x: m.patch_embed(x))

    return {"patches": jax.jit(run)(weights)}


def positions(table, stored: tuple[int, int], kind: str, grid: tuple[int, int]) -> jax.Array:
    """(1, 1 + n, e): the class token's row and those of a whole grid."""
    index = jnp.arange(-1, grid[0] * grid[1])
    height, width = (jnp.full_like(index, x) for x in grid)
    return grid_posemb.rows_of(jnp.asarray(table)[0], stored, kind, index, height, width)[None]


def posemb(case) -> dict:
    grid = case.config["model"]["image_size"] // case.config["model"]["patch_size"]
    stored, result = (grid, grid), {}
    for key in case.wanted:
        side, kind, *size = key.removeprefix("output/").split("_")
        table = case.param[f"{side}_pos_embed"]
        if kind == "sincos":
            result[key] = grid_posemb.initial_table(*stored, table.shape[-1])[None]
        else:
            result[key] = positions(table, stored, kind.removesuffix("2d"), tuple(map(int, size[0].split("x"))))
    return result


def many_sizes(case) -> dict:
    """Images of different sizes, each run alone by the reference, here as one padded batch."""
    config, weights = case.config, params(case)
    count, norm_pix = config["n_images"], config.get("norm_pix_loss", False)
    model = autoencoder(config)
    noise = [case.input[f"noise_{i}"] for i in range(count)]
    batch = rows([case.input[f"pixels_{i}"] for i in range(count)], config["patch_size"], noise, n=70)
    prediction, out = forward(case, model, weights, batch)
    sizes = [int(h * w) for h, w in np.asarray(batch["grid"])]
    kept = token_rows.keep_counts(config["mask_ratio"], max(sizes))
    produced = {}
    for i, n in enumerate(sizes):
        one = {k: out[k][i : i + 1] for k in ("pixels", "mask", "valid")}
        own = losses(prediction[i : i + 1], one, norm_pix=norm_pix)
        own |= {"mask": out["mask"][i, :n], "ids_restore": out["rank"][i, :n], "logits": prediction[i, :n]}
        own["latent"] = out["latent"][i, : 1 + kept[n]]
        produced |= {f"output/{k}_{i}": x for k, x in own.items()}
    for name, loss in (("image_mean", "image_mean"), ("full_pixel_mean", "full")):
        normed = norm_pix and loss != "full"
        value = mae.reconstruction_loss(prediction, out, out["valid"], loss=loss, norm_pix=normed)
        produced[f"output/loss_{name}"] = value
    goal = objective(mae, model, batch, norm_pix=norm_pix)
    produced["output/loss_token_mean"], grads = jax.jit(lambda p, b: gradients(goal, p, b))(weights, batch)
    produced |= published("grad", grads)
    return case.pick(produced)


def original(case) -> dict:
    """The original MAE's names, and its norms' epsilon."""
    config = {**case.config, "layer_norm_eps": 1e-6}
    weights, model = params(case), autoencoder(config)
    batch = rows(list(case.input["pixels"]), config["patch_size"], list(case.input["noise"]))
    prediction, out = forward(case, model, weights, batch)
    goal = objective(mae, model, batch, norm_pix=config["norm_pix_loss"])
    loss, grads = jax.jit(lambda p, b: gradients(goal, p, b))(weights, batch)
    produced = {"loss_masked": loss, "logits": prediction, "mask": out["mask"]}
    produced |= {"ids_restore": out["rank"], "latent": out["latent"]}
    return case.pick({f"output/{k}": x for k, x in produced.items()} | published("grad", grads, "original"))


def classifier(case) -> dict:
    config, weights = case.config, params(case)
    model = fields(config, name="vit", classes=config["num_labels"])
    batch = rows(list(case.input["pixels"]), config["patch_size"], [])
    batch["label"] = jnp.asarray(case.input["labels"], jnp.float32)[:, None]
    net = mae.load_model("config.model", model)
    logits, out = jax.jit(lambda p: net.apply({"params": p}, batch["patch"], batch["grid"]))(weights)
    goal = objective(classify, model, batch)
    loss, grads = jax.jit(lambda p, b: gradients(goal, p, b))(weights, batch)
    produced = {"logits": logits, "loss": loss, "embeddings": out["blocks_input"], "last_hidden": out["norm"]}
    return case.pick({f"output/{k}": x for k, x in produced.items()} | published("grad", grads))


def steps(case) -> dict:
    """Optimiser steps, each of several microbatches of different size that weigh the same."""
    config, weights = case.config, params(case)
    parts, k = [], config["accumulate"]
    most = (
        max(np.prod(x.shape[2:]) for n, x in case.input.items() if n.startswith("pixels")) // config["patch_size"] ** 2
    )
    widest = max(len(x) for n, x in case.input.items() if n.startswith("pixels"))
    for i in range(config["opt_steps"] * k):
        images, noise = (list(case.input[f"{n}_{i}"]) for n in ("pixels", "noise"))
        # One shape for all: padding changes nothing.
        parts.append(rows(images, config["patch_size"], noise, n=most, blank=widest - len(images)))
    goal = objective(mae, autoencoder(config), parts[0], loss="full")
    rates = optim.schedule(
        "cosine_floor_published",
        lr=config["base_lr"],
        floor=config["eta_min"],
        warmup_steps=config["warmup_steps"],
        total_steps=config["max_steps"],
    )
    tx = optim.make(
        weights, schedule=rates, b1=0.9, b2=0.95, weight_decay=config["weight_decay"], model_groups=goal.groups
    )
    state, seen = tx.init(weights), []

    @jax.jit
    def update(weights, state, own):
        found = [gradients(goal, weights, batch) for batch in own]
        grads = jax.tree.map(lambda *g: sum(g) / k, *(g for _, g in found))
        updates, state = tx.update(grads, state, weights)
        return optax.apply_updates(weights, updates), state, [loss for loss, _ in found]

    for i in range(config["opt_steps"]):
        weights, state, own = update(weights, state, parts[i * k : (i + 1) * k])
        seen += own
    produced = {"output/losses": jnp.stack(seen), "output/lr": jax.vmap(rates)(jnp.arange(config["opt_steps"]))}
    return case.pick(produced | published("output/param_after", weights))


def numbers(case) -> dict:
    config, result = case.config, {}
    for name, lr, floor, warmup, total in (("lr", 1e-4, 1e-5, 2520, 5040), ("lr_finetune", 3e-5, 1e-6, 10, 100)):
        fn = optim.schedule("cosine_floor_published", lr=lr, floor=floor, warmup_steps=warmup, total_steps=total)
        asked = config["lr_steps" if name == "lr" else "lr_ft_steps"]
        result[f"output/{name}"] = jax.vmap(fn)(jnp.asarray(asked))
    most = max(config["L"])
    result["output/len_keep"] = np.stack([token_rows.keep_counts(r, most)[config["L"]] for r in config["ratios"]])
    for i, (predicted, labels, classes) in enumerate(config["acc"]):
        matrix = scores.confusion(np.array(labels), np.array(predicted), classes)
        result[f"output/accuracy_{i}"] = scores.accuracy(matrix)
        result[f"output/balanced_accuracy_{i}"] = scores.macro_accuracy(matrix)
    return result


READERS = {
    "mae": one_grid,
    "multi": many_sizes,
    "fair": original,
    "posemb": posemb,
    "vit": classifier,
    "train": steps,
    "misc": numbers,
}
