"""`python -m jaxmed.preflight --config=configs/x.py[:arg,...] --sizes=F.npz [--json=OUT]`: what a run will cost.

Plans the images whose sizes are in F.npz in every way that there is, and prints what each costs against padding every
image to the patch alone. Exit code 1: a bound is exceeded (see `preflight_plans.BOUNDS`; `config.preflight.bounds` sets
others, e.g. `--config.preflight.bounds.length16.tokens=106.0`).
"""

import argparse
import json
import sys
import zipfile
from pathlib import Path

import jax
import numpy as np
from absl import flags
from jaxtyping import Int64
from ml_collections import config_flags

from jaxmed import preflight_plans
from jaxmed.core import metrics
from jaxmed.core.command import exit_code
from jaxmed.core.config import Config
from jaxmed.core.errors import UserError
from jaxmed.core.files import write_file
from jaxmed.main import parse_flags


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit code: 1 if a bound is exceeded.

    Raises:
      UserError: a file, a field of the config or an argument is bad.
    """
    parser = argparse.ArgumentParser(prog="python -m jaxmed.preflight", description=__doc__, allow_abbrev=False)
    parser.add_argument("--config", required=True, help="configs/x.py[:arg,...]; --config.key=value changes a field")
    parser.add_argument("--sizes", required=True, type=Path, help="npz of H and W (or a dataset's index.npz), pixels")
    parser.add_argument("--json", type=Path, help="file that the table is written to")
    parser.add_argument("--devices", type=int, help="devices that share a batch [those of this machine]")
    options, overrides = parser.parse_known_args(arguments)
    if options.devices is not None and options.devices < 1:
        raise UserError(f"--devices={options.devices} must be at least 1")
    config = read_config(options.config, overrides)
    height, width = read_sizes(options.sizes)
    plan_options = config.get("input", Config({})).get("plan_options", Config({}))
    if "cost" not in plan_options or "patch" not in config.input or "budget" not in config.input:
        raise UserError(
            "--sizes compares plans by the cost of the model: the config needs input.patch, input.budget and "
            "input.plan_options.cost"
        )
    rows = list(
        preflight_plans.table(
            height,
            width,
            patch=config.input.at_least(1, "patch"),
            cost=plan_options.cost.to_dict(),
            budget=config.input.at_least(1, "budget"),
            devices=options.devices or jax.device_count(),
            multiple=plan_options.get("multiple", 64),
        )
    )
    columns = ("plan", *preflight_plans.COLUMNS)
    print(f"{len(height):,} images; percent of padding every image to the patch alone")
    print(metrics.table([columns, *[tuple(_text(row[c]) for c in columns) for row in rows]]))
    if options.json:
        write_file(options.json, json.dumps({"plans": rows}, indent=1).encode())

    own = config.get("preflight", Config({})).get("bounds", Config({})).to_dict()
    bounds = {k: preflight_plans.BOUNDS.get(k, {}) | own.get(k, {}) for k in {**preflight_plans.BOUNDS, **own}}
    published = preflight_plans.fingerprint(height, width) == preflight_plans.PUBLISHED
    broken = list(preflight_plans.exceeded(rows, bounds, 0.0 if published else preflight_plans.SLACK))
    for line in broken:
        print(f"error: {line}", file=sys.stderr, flush=True)
    return 1 if broken else 0


def read_config(name: str, overrides: list[str]) -> Config:
    """The config that `name` (configs/x.py[:arg,...]) makes, with `--config.key=value` applied.

    Raises:
      UserError: there is no such file or field.
    """
    path = Path(name.partition(":")[0])
    if not path.is_file():
        raise UserError(f"--config={path}: there is no such file")
    values = flags.FlagValues()  # of its own: that of `main` is for its own command line
    argv = ["", f"--config={name}", *overrides]
    holder = config_flags.DEFINE_config_file("config", None, "", flag_values=values, lock_config=True, sys_argv=argv)
    if left := parse_flags(argv, values)[1:]:
        raise UserError(f"unexpected argument {left[0]!r}; usage: {__doc__.splitlines()[0]}")
    return Config(holder.value.to_dict())


def read_sizes(path: Path) -> tuple[Int64[np.ndarray, "n"], Int64[np.ndarray, "n"]]:
    """Heights and widths in pixels.

    Raises:
      UserError: there is no such file, or it does not hold sizes.
    """
    try:
        with np.load(path) as file:
            names = next((n for n in (("H", "W"), ("height", "width")) if set(n) <= set(file.files)), None)
            if names is None:
                raise UserError(f"--sizes={path}: it needs the arrays H and W (or height and width)")
            height, width = (np.asarray(file[name]) for name in names)
    except FileNotFoundError:
        raise UserError(f"--sizes={path}: there is no such file") from None
    except (OSError, ValueError, AttributeError, zipfile.BadZipFile) as e:
        raise UserError(f"--sizes={path}: not an npz file ({e})") from None
    whole = all(side.ndim == 1 and side.size and side.dtype.kind in "iu" for side in (height, width))
    if not whole or height.shape != width.shape or min(height.min(), width.min()) < 1:
        raise UserError(f"--sizes={path}: it needs a positive whole number for height and width of each image")
    return height.astype(np.int64), width.astype(np.int64)


def _text(value) -> str:
    return f"{value:.2f}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    sys.exit(exit_code(main))
