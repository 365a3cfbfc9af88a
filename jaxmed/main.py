"""`python -m jaxmed.main --config=configs/x.py[:arg,...] [--workdir=W] [--config.key=value]`: train and evaluate.

The same command again goes on where the last one stopped. With several processes (a TPU pod, or GPUs on several
hosts) start the same command on each, with `--multihost`.
"""

import os
import sys
from pathlib import Path

import jax
from absl import app, flags, logging
from ml_collections import config_flags

from jaxmed import train
from jaxmed.core import metrics
from jaxmed.core.config import Config
from jaxmed.core.errors import UserError
from jaxmed.core.load import load

_CONFIG = config_flags.DEFINE_config_file("config", None, "the experiment: configs/x.py[:arg,...]", lock_config=True)
_WORKDIR = flags.DEFINE_string("workdir", None, "folder of everything the run writes [runs/<config name>]")
_MULTIHOST = flags.DEFINE_bool("multihost", False, "join the other processes of the cluster before anything else")
_CACHE = flags.DEFINE_string("compile_cache", None, "folder of compiled programs [<workdir>/xla_cache]; '' is off")


def main(argv) -> int:
    if len(argv) > 1:
        raise UserError(f"unexpected argument {argv[1]!r}; usage: {__doc__.splitlines()[0]}")
    if _CONFIG.value is None:
        raise UserError("give a config: --config=configs/hlip.py:demo")
    if _MULTIHOST.value or "JAX_COORDINATOR_ADDRESS" in os.environ:
        jax.distributed.initialize()
    workdir = Path(_WORKDIR.value or Path("runs") / Path(config_flags.get_config_filename(flags.FLAGS["config"])).stem)
    cache = str(workdir / "xla_cache") if _CACHE.value is None else _CACHE.value
    if cache:
        jax.config.update("jax_compilation_cache_dir", cache)
    logging.set_verbosity(logging.ERROR)  # what orbax and jax log below that, a user can do nothing about

    config = Config(_CONFIG.value.to_dict())
    report = config.get("report")
    summary = train.run(config, workdir)
    if jax.process_index() == 0 and summary["finished"]:
        rows = [("", "before", "after")]
        for name, after in summary["after"].items():
            before = summary["before"].get(name)
            rows.append((name, "-" if before is None else f"{before:.4g}", f"{after:.4g}"))
        print(metrics.table(rows))
        if report:
            print(f"report: {load('', report).report(workdir)}")
    return 0


def run() -> None:
    """Runs `main`; bad input is one line on stderr and exit code 2."""
    try:
        app.run(main)
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    run()
