"""Random numbers that depend only on what they are for, never on who draws them."""

import jax
import numpy as np


def np_rng(*key: int) -> np.random.Generator:
    """A numpy generator that is a pure function of non-negative integers, e.g. (seed, step, record)."""
    return np.random.default_rng(np.random.SeedSequence([int(k) for k in key]))


def step_rng(rng_loop: jax.Array, step) -> jax.Array:
    """The key of one training step: resuming at step k draws what a straight run drew at step k."""
    return jax.random.fold_in(rng_loop, step)
