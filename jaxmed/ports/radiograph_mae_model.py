"""Which autoencoder or classifier published weights are, and what other patches, channels or tables make of them.

Shapes show all sizes but the number of heads, and how patches are to be resampled; names show the norms' epsilon.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmed.core.errors import UserError
from jaxmed.core.load import load, load_model
from jaxmed.ports import vit_names
from jaxmed.ports.names import Names

# Options of the command that are fields of `config.model`.
OPTIONS = {
    "variant": ("variant", "sizes by name: one of jaxmed.models.mae.VARIANTS (or vit, with --model.name=vit)"),
    "heads": ("heads", "attention heads of the encoder"),
    "decoder-heads": ("decoder_heads", "attention heads of the decoder"),
    "patch": ("patch", "pixels of a patch's side, if not those of the weights: kernels are resized"),
    "channels": ("channels", "1 for weights of colour images (with --gray)"),
    "table": ("table", "height,width in patches of the position table, if not that of the weights: it is resampled"),
    "classes": ("classes", "of a classifier whose head is fresh (with --fresh=^head/)"),
}
# Options of the command that say how weights are changed.
ADAPT = {"gray": "sum (one channel counts as three equal ones) or average: what one channel's kernel is made of"}
STARTS: dict[str, str] = {}
NOTES = {"src": "The MAE release's ImageNet weights have the licence CC-BY-NC 4.0; so has what starts from them."}
# Published numbers of heads by width.
_HEADS = {768: 12, 1024: 16, 1280: 16}
_DECODER_HEADS = {512: 16}
_MAE_PARTS = ("decoder_embed/kernel", "decoder_pred/kernel", "decoder_blocks_0/mlp/fc1/kernel")


def make(flat: Mapping[str, np.ndarray], given: Mapping[str, Any], names: Names) -> tuple[dict[str, Any], list[str]]:
    """The `config.model` of weights, and what was assumed for it in sentences.

    Args:
      flat: {our path: array or shape}.
      given: fields of `config.model` that the person named; they win.
      names: of the published tensors.

    Raises:
      UserError: sizes cannot be read off, or a number of heads has to be named.
    """
    given, notes = dict(given), []
    name = given.pop("name", "mae" if "decoder_embed/kernel" in flat else "vit")
    for path in ("patch_embed/kernel", "pos_embed", "blocks_0/mlp/fc1/kernel"):
        if path not in flat:
            raise UserError(f"these weights have no parameter {path!r}: they are no vision transformer's")
    if flat["patch_embed/kernel"].ndim != 4:
        raise UserError(f"the patch kernel has shape {flat['patch_embed/kernel'].shape}, which is not a 2D one")
    patch, _, channels, width = flat["patch_embed/kernel"].shape
    model = {
        "width": width,
        "depth": _depth(flat, "blocks_"),
        "mlp_width": flat["blocks_0/mlp/fc1/kernel"].shape[1],
        "patch": patch,
        "channels": channels,
        "table": stored_table(flat["pos_embed"]),
        "norm_eps": 1e-6 if any(vit_names.original_name(k) == _bare(k) for k in names.matched) else 1e-12,
    }
    notes.append(f"norms: the names are those of files that go with norm_eps={model['norm_eps']}")
    model["heads"] = given.get("heads") or _known(_HEADS, width, "width", "--heads")
    if name == "vit" and "head/kernel" in flat:
        model["classes"] = flat["head/kernel"].shape[1]
    if name == "mae" and _MAE_PARTS[0] in flat:
        for path in _MAE_PARTS:
            if path not in flat:
                raise UserError(f"these weights have no parameter {path!r}: their decoder is not whole")
        decoder_width = flat[_MAE_PARTS[0]].shape[1]
        model |= {
            "decoder_width": decoder_width,
            "decoder_depth": _depth(flat, "decoder_blocks_"),
            "decoder_mlp_width": flat[_MAE_PARTS[2]].shape[1],
            "decoder_heads": given.get("decoder_heads")
            or _known(_DECODER_HEADS, decoder_width, "decoder_width", "--decoder-heads"),
        }
    if name == "mae" and "decoder_pos" not in given:
        notes.append(
            "decoder positions: resampled in two dimensions (grid2d); weights trained with transformers at other sizes "
            "than their table's have learned --model.decoder_pos=flat1d"
        )
    if "variant" in given:
        return {"name": name, **given}, notes
    return {"name": name, **model, **given}, notes


def _bare(name: str) -> str:
    """Without wrappers of training, but with what Hugging Face's classes put before a name."""
    name = vit_names.unwrap(name)
    while name.startswith(vit_names.WRAPPERS):
        name = vit_names.unwrap(name.partition(".")[2])
    return name


def _depth(flat, prefix: str) -> int:
    return len({k.split("/")[0] for k in flat if k.startswith(prefix)})


def _known(heads: Mapping[int, int], width: int, field: str, option: str) -> int:
    if width not in heads:
        raise UserError(f"{field}={width} is of no published model: give {option}=N, which shapes do not show")
    return heads[width]


def stored_table(table) -> tuple[int, int]:
    """The square grid of a position table with a class token's row.

    Raises:
      UserError: it is not square.
    """
    side = math.isqrt(table.shape[1] - 1)
    if side * side != table.shape[1] - 1:
        raise UserError(f"the position table has {table.shape[1]} rows: not a class token's and a square grid's")
    return side, side


def objective(model: Mapping[str, Any]) -> dict[str, str]:
    """The `config.objective` that goes with such a model."""
    return {"name": "mae" if model["name"] == "mae" else "classify"}


def recipe(model: Mapping[str, Any]) -> tuple[str | None, str]:
    """Weights do not show how images were prepared."""
    del model
    return None, ""


def init(model: Mapping[str, Any]) -> Callable[[jax.Array], dict[str, Any]]:
    """`fn(rng) -> parameters` of a `config.model`."""
    net = load_model("config.model", model)

    def fn(rng):
        patch = jnp.zeros((1, 4, net.patch * net.patch * net.channels))
        return net.init({"params": rng, "mask": rng}, patch, jnp.full((1, 2), 2, jnp.int32))["params"]

    return fn


# ---- Other patches, channels and tables.


def resize_matrix(n_in: int, n_out: int) -> np.ndarray:
    """(n_out, n_in) float64: bicubic resampling as for position tables."""
    positions = load("models.layers", "grid_posemb")
    matrix = np.zeros((n_out, n_in))
    index = np.arange(n_out, dtype=np.int32)
    for point, weight in positions.cubic_taps(index, n_in, np.full_like(index, n_out)):
        np.add.at(matrix, (index, np.asarray(point)), np.asarray(weight, np.float64))
    return matrix


def resize_kernel(kernel: np.ndarray, patch: int) -> np.ndarray:
    """(p, p, c, e) -> (patch, patch, c, e): a resized patch gets the vector that the patch got, as nearly as can be
    (exactly, if `patch` is larger). Beyer et al. 2023 (arXiv 2212.08013)."""
    inverse = np.linalg.pinv(resize_matrix(kernel.shape[0], patch).T)
    return np.einsum("yh,xw,hwce->yxce", inverse, inverse, kernel.astype(np.float64)).astype(kernel.dtype)


def _predictions(flat: dict[str, np.ndarray], patch: int, channels: int, old: tuple[int, int]) -> None:
    """The decoder's last layer for other patches: its prediction, resized, and the mean of its channels."""
    matrix = resize_matrix(old[0], patch) if old[0] != patch else np.eye(patch)
    for path in ("decoder_pred/kernel", "decoder_pred/bias"):
        x = flat[path]
        y = x.astype(np.float64).reshape(*x.shape[:-1], old[0], old[0], old[1])
        y = np.einsum("yh,xw,...hwc->...yxc", matrix, matrix, y)
        if old[1] != channels:
            y = y.mean(-1, keepdims=True)
        flat[path] = y.reshape(*x.shape[:-1], -1).astype(x.dtype)


def _resample(table: np.ndarray, grid: tuple[int, int], kind: str) -> np.ndarray:
    """A position table (1, 1 + n, e) for another grid."""
    positions = load("models.layers", "grid_posemb")
    index = jnp.arange(-1, grid[0] * grid[1])
    height, width = (jnp.full_like(index, n) for n in grid)
    made = positions.rows_of(jnp.asarray(table[0], jnp.float32), stored_table(table), kind, index, height, width)
    return np.asarray(made)[None].astype(table.dtype)


def adapt(
    flat: Mapping[str, np.ndarray], model: Mapping[str, Any], options: Mapping[str, str | None]
) -> tuple[dict[str, np.ndarray], list[str]]:
    """Weights for the patch, channels and table of `model`, and what was done in sentences.

    Args:
      options: {"gray": how several channels become one, or None}.

    Raises:
      UserError: channels that cannot be changed, or a missing `gray`.
    """
    flat, notes, gray = dict(flat), [], options["gray"]
    if gray not in (None, "sum", "average"):
        raise UserError(f"--gray={gray}: use sum or average")
    net, kernel = load_model("config.model", model), flat["patch_embed/kernel"]
    old = kernel.shape[0], kernel.shape[2]
    if gray and (old[1] == net.channels or net.channels != 1):
        raise UserError(
            f"--gray={gray}: the weights have {old[1]} channels, the model {net.channels}; add --channels=1"
        )
    if old[1] != net.channels:
        if net.channels != 1 or not gray:
            raise UserError(
                f"the patch kernel has {old[1]} channels, the model {net.channels}: for one channel give --channels=1 "
                "and --gray=sum or --gray=average"
            )
        kernel = kernel.sum(2, keepdims=True) if gray == "sum" else kernel.mean(2, keepdims=True)
        notes.append(f"patch kernel: {gray} of {old[1]} channels")
    if old[0] != net.patch:
        kernel = resize_kernel(kernel, net.patch)
        notes.append(f"patch kernel: pseudo-inverse resize from {old[0]} to {net.patch} pixels")
    flat["patch_embed/kernel"] = kernel
    if "decoder_pred/kernel" in flat and old != (net.patch, net.channels):
        _predictions(flat, net.patch, net.channels, old)
        notes.append("decoder_pred: its predictions resized, the mean of their channels")
    for path in ("pos_embed", "decoder_pos_embed"):
        if path in flat and stored_table(flat[path]) != tuple(net.table):
            notes.append(f"{path}: resampled from {stored_table(flat[path])} to {tuple(net.table)} patches")
            flat[path] = _resample(flat[path], tuple(net.table), net.pos)
    return flat, notes
