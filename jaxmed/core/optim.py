"""Learning-rate schedules and optimisers, with parameter groups by regex."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxmed.core import tree
from jaxmed.core.errors import UserError

SCHEDULES = ("cosine", "constant", "const_cooldown", "cosine_floor", "cosine_floor_published")


def schedule(
    name: str = "cosine",
    *,
    lr: float,
    total_steps: int,
    warmup_steps: int = 0,
    cooldown_steps: int = 0,
    cooldown_power: float = 1.0,
    cooldown_end: float = 0.0,
    floor: float = 0.0,
) -> Callable:
    """The learning rate of update `step` (0-based), float32.

    All start with a linear warm-up lr * (step + 1) / warmup_steps. Then: "cosine", a half cosine to 0 over the steps
    that remain; "constant"; "const_cooldown", constant, and over the last `cooldown_steps` a polynomial of power
    `cooldown_power` down to `cooldown_end`. "cosine_floor" warms up from `floor` to `lr` and comes back to it by half a
    cosine; "cosine_floor_published" is what one published code makes of that: its warm-up ends at lr + floor, from
    which it drops to lr, and after `total_steps` it rises again, for as long as it fell.

    Raises:
      UserError: an unknown name, a warm-up or cool-down longer than the run, or a floor that `name` does not have.
    """
    if name not in SCHEDULES:
        raise UserError(f"schedule.name: {name!r} is not one of {', '.join(SCHEDULES)}")
    if floor and not name.startswith("cosine_floor"):
        raise UserError(f"schedule.floor={floor}: {name!r} has none; use 'cosine_floor'")
    for field, value in (
        ("lr", lr),
        ("floor", floor),
        ("warmup_steps", warmup_steps),
        ("cooldown_steps", cooldown_steps),
    ):
        if not value >= 0:
            raise UserError(f"schedule.{field}={value}: give a number of at least 0")
    if not floor <= lr:
        raise UserError(f"schedule.floor={floor} is above schedule.lr={lr}")
    if warmup_steps + cooldown_steps > total_steps > 0:
        raise UserError(
            f"schedule: warm-up ({warmup_steps}) and cool-down ({cooldown_steps}) steps are more than "
            f"total_steps={total_steps}"
        )

    if name.startswith("cosine_floor"):
        table = _floor_table(lr, floor, total_steps, warmup_steps, published=name == "cosine_floor_published")
        return lambda step: jnp.take(table, jnp.asarray(step, jnp.int32), mode="clip")

    def fn(step):
        step = jnp.asarray(step, jnp.float32)
        if name == "cosine":
            rest = max(total_steps - warmup_steps, 1)
            rate = 0.5 * lr * (1.0 + jnp.cos(jnp.pi * jnp.clip((step - warmup_steps) / rest, 0.0, 1.0)))
        elif name == "const_cooldown":
            start = total_steps - cooldown_steps
            left = 1.0 - jnp.clip((step - start) / max(cooldown_steps, 1), 0.0, 1.0)
            rate = jnp.where(step < start, lr, left**cooldown_power * (lr - cooldown_end) + cooldown_end)
        else:
            rate = jnp.full_like(step, lr)
        if warmup_steps:
            rate = jnp.where(step < warmup_steps, lr * (step + 1.0) / warmup_steps, rate)
        return rate.astype(jnp.float32)

    return fn


def _floor_table(lr: float, floor: float, total: int, warmup: int, *, published: bool) -> np.ndarray:
    """The rates of "cosine_floor" step by step, in double precision, then float32."""
    rest = max(total - warmup, 1)
    step = np.arange(total + (rest if published else 0) + 1)
    rate = floor + 0.5 * (lr - floor) * (1.0 + np.cos(np.pi * (step - warmup) / rest))
    if warmup:
        rise = lr if published else lr - floor
        rate = np.where(step < warmup, floor + rise * (step + 1) / warmup, rate)
    return rate.astype(np.float32)


def make(
    params,
    *,
    schedule: Callable,
    name: str = "adamw",
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    no_decay: tuple[str, ...] = (),
    groups: tuple[tuple[str, float], ...] = (),
    model_groups: tuple[tuple[str, float], ...] = (),
    clip_norm: float = 0.0,
) -> optax.GradientTransformation:
    """An optax chain: clip by global norm -> optimiser -> decoupled weight decay -> learning rate -> group factor.

    Args:
      params: the parameters or their shapes (only names matter).
      schedule: step -> learning rate.
      name: "adamw" or "sgd" (momentum b1), or the name of any `optax.scale_by_*` (without that prefix).
      no_decay: regexes of the paths without weight decay.
      groups: (regex, factor on the learning rate), first match wins; 0 freezes: no update, no decay, no moments,
        and no share in the gradient norm.
      model_groups: more of them, of the objective, after yours; they may match nothing.
      clip_norm: 0 is off.

    Raises:
      UserError: an unknown optimiser, or a regex that matches nothing.
    """
    names = list(tree.flatten(params))
    tree.check_rules([p for p, _ in groups], names, "optim.groups")
    tree.check_rules(no_decay, names, "optim.no_decay")
    groups = (*groups, *model_groups)
    if name == "adamw":
        scale = optax.scale_by_adam(b1=b1, b2=b2, eps=eps)
    elif name == "sgd":
        scale = optax.trace(decay=b1, nesterov=False)
    elif hasattr(optax, f"scale_by_{name}"):
        scale = getattr(optax, f"scale_by_{name}")()
    else:
        raise UserError(f"optim.name: {name!r} is neither adamw, sgd nor an optax.scale_by_* transformation")

    factor = tree.map_with_path(lambda n, _: float(tree.first_match(groups, n, 1.0)), params)
    decay = tree.map_with_path(lambda n, _: tree.first_match([(p, False) for p in no_decay], n, True), params)
    steps = [scale]
    if clip_norm:
        steps.insert(0, optax.clip_by_global_norm(clip_norm))
    if weight_decay:
        # Frozen leaves are MaskedNode here: partition below hands each chain only its own leaves.
        steps.append(optax.add_decayed_weights(weight_decay, mask=lambda p: _restrict(decay, p)))
    steps.append(optax.scale_by_learning_rate(schedule))
    if any(f not in (0.0, 1.0) for f in tree.flatten(factor).values()):
        steps.append(_scale_by(factor))
    labels = tree.map_with_path(lambda n, f: "train" if f else "frozen", factor)
    return optax.partition({"train": optax.chain(*steps), "frozen": optax.set_to_zero()}, labels)


def _hole(x) -> bool:
    return isinstance(x, optax.MaskedNode)


def _restrict(values, params):
    """`values` with the holes (`optax.MaskedNode`) of `params`."""
    return jax.tree.map(lambda v, p: p if _hole(p) else v, values, params, is_leaf=_hole)


def _scale_by(factor) -> optax.GradientTransformation:
    def update(updates, state, params=None):
        del params
        scaled = jax.tree.map(lambda f, u: u if _hole(u) else u * f, factor, updates, is_leaf=_hole)
        return scaled, state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def learning_rate_groups(params, groups) -> dict[str, int]:
    """How many parameters each factor of the learning rate covers, for the log."""
    counts: dict[str, int] = {}
    for name, x in tree.flatten(params).items():
        factor = str(float(tree.first_match(groups, name, 1.0)))
        counts[factor] = counts.get(factor, 0) + int(x.size)
    return counts
