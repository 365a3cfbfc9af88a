"""`python -m jaxmed.main --config=configs/x.py[:arg,...] [--workdir=W] [--config.key=value]`: train and evaluate.

The same command again goes on where the last one stopped. On a TPU pod, SLURM or GKE start it once per host with
`--multihost`; elsewhere once per process with JAX_COORDINATOR_ADDRESS=host:port JAX_NUM_PROCESSES=n JAX_PROCESS_ID=i.
"""

import os
import re
import sys
from pathlib import Path

import jax
from absl import app, flags, logging
from ml_collections import config_flags

from jaxmed import train
from jaxmed.core import metrics
from jaxmed.core.command import exit_code
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
        raise UserError("give a config, e.g. --config=configs/x.py:demo")
    config_file = Path(config_flags.get_config_filename(flags.FLAGS["config"]).partition(":")[0])
    if not config_file.is_file():
        raise UserError(f"--config={config_file}: there is no such file")
    join_cluster(_MULTIHOST.value)
    workdir = Path(_WORKDIR.value or Path("runs") / config_file.stem)
    cache = str(workdir / "xla_cache") if _CACHE.value is None else _CACHE.value
    if cache:
        jax.config.update("jax_compilation_cache_dir", cache)
    logging.set_verbosity(logging.FATAL)  # orbax logs tracebacks of what checkpoint.py says in one line

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


def join_cluster(multihost: bool) -> None:
    """Before any other use of jax: SLURM, TPU pods and GKE tell jax who is who; elsewhere three variables do."""
    names = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
    given = [os.environ.get(name) for name in names]
    if all(given):
        jax.distributed.initialize(given[0], int(given[1]), int(given[2]))
    elif any(given):
        missing = [name for name, value in zip(names, given) if not value]
        raise UserError(f"the environment variables {', '.join(names)} go together; {missing[0]} is not set")
    elif multihost:
        jax.distributed.initialize()


def parse_flags(argv, values: flags.FlagValues = flags.FLAGS) -> list[str]:
    for arg in argv:
        if arg.startswith("--config="):  # a config imports its neighbours, wherever the command is started
            sys.path.append(str(Path(arg.partition("=")[2]).resolve().parents[1]))
    try:
        return values(argv)
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError) as e:
        raise UserError(_one_line(e, argv)) from None


def _one_line(error: Exception, argv) -> str:
    kind = type(error)
    while error.args and isinstance(error.args[0], Exception):
        error = error.args[0]
    text = str(error.args[0] if error.args else error)  # str() of a KeyError would be a repr
    text = " ".join(text.replace("\\n", " ").split())
    text = re.sub(r"Error whilst parsing config file: Traceback .*\bValueError: ", "", text)
    if issubclass(kind, AttributeError | KeyError) and (key := re.match(r"'?(\w+)'?", text)):
        # ml_collections names the field that is missing, not where.
        paths = (arg.partition("=")[0] for arg in argv)
        where = next((p for p in paths if key[1] in p.split(".")[1:]), "--config")
        return f"{where}: the config has no field {key[1]!r}.{text[key.end() :]}"
    return text


def run() -> None:
    """Runs `main`; bad input is one line on stderr and exit code 2."""
    code = exit_code(lambda: app.run(main, flags_parser=parse_flags))
    sys.stdout.flush()
    os._exit(code)  # at once: tasks that orbax left behind would print pages about a damaged checkpoint


if __name__ == "__main__":
    run()
