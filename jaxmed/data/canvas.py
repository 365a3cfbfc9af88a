"""The canvas of one image: how large it is after zero padding below and right, and the padding (numpy only)."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Shaped

Array = np.ndarray


def half(image: Shaped[Array, "h w *c"]) -> Shaped[Array, "h2 w2 *c"]:
    """Every second pixel of every second row: nearest-neighbour downsampling by 0.5 as torch does it (h2 = h // 2)."""
    h, w = image.shape[0] // 2, image.shape[1] // 2
    return image[::2, ::2][:h, :w]


def padded_size(
    height: int, width: int, *, bins: Sequence[int] = (), multiple: int = 1, square: int = 0
) -> tuple[int, int]:
    """Height and width after padding; the first of these that is given decides:

    Args:
      bins: each side grows to the smallest of these edges that holds it; above the last edge it stays.
      square: both sides grow to this one.
      multiple: each side grows to a multiple of this.

    Raises:
      ValueError: the image does not fit into `square`.
    """
    if bins:
        edges = sorted(bins)
        return tuple(next((e for e in edges if e >= n), n) for n in (height, width))
    if square:
        if max(height, width) > square:
            raise ValueError(f"an image of {height} x {width} pixels does not fit into {square} x {square}")
        return square, square
    return -(-height // multiple) * multiple, -(-width // multiple) * multiple


def pad(image: Shaped[Array, "h w *c"], size: tuple[int, int]) -> Shaped[Array, "H W *c"]:
    """Zeros below and right, nowhere else.

    Raises:
      ValueError: the image is larger than `size`.
    """
    if image.shape[0] > size[0] or image.shape[1] > size[1]:
        raise ValueError(f"an image of {image.shape[:2]} pixels does not fit into {size}")
    out = np.zeros((*size, *image.shape[2:]), image.dtype)
    out[: image.shape[0], : image.shape[1]] = image
    return out
