"""`python -m jaxmed.port`: published PyTorch weights to our parameters and back, exactly and without PyTorch.

A system is a module `jaxmed/ports/<system>.py` with `convert`, `to_published` and `MODEL` (see `ports.hlip`), perhaps
`BACK`, {option of to_published: help}, and in MODEL `ADAPT`, {option: help} of `adapt`, which changes weights to fit.
"""

import argparse
import hashlib
import importlib.util
import json
import re
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxmed.core import checkpoint, metrics, tree, weights
from jaxmed.core.command import exit_code
from jaxmed.core.errors import UserError
from jaxmed.core.load import load
from jaxmed.data.tokenize import Tokenizer
from jaxmed.ports import torch_files

EPILOG = """\
examples:
  python -m jaxmed.port --system=hlip --src=weights.pt --out=ported             published -> ours
  python -m jaxmed.port --system=hlip --src=ported --out=again.pt --back        ours (or a workdir) -> published
  python -m jaxmed.port --system=hlip --init-image=mae.pth --init-text=bert.safetensors --variant=NAME --out=start

OUT/ gets params.safetensors (our names), model.json (what rebuilds the model) and port_report.json (every tensor:
matched, fresh or ignored, with shapes). Train from it with --config.init_from=OUT.
--model.FIELD=VALUE names any field of the config's model, e.g. --model.text.vocab_size=28996, --model.image.rope=true.
--recipe=NAME and --recipe.OPTION=VALUE, as for python -m jaxmed.prep, say how scans were prepared for these weights,
--vocab and --prefix how texts were; predict and evaluate then do the same.
Files are read as data: nothing in them is run. Every tensor and every parameter must find its counterpart of the same
shape, or be named by --ignore or --fresh.
"""
_PYTORCH = (".pt", ".pth", ".bin", ".ckpt")
_HUB = ("model.safetensors", "open_clip_model.safetensors", "pytorch_model.bin", "open_clip_pytorch_model.bin")


class Source(NamedTuple):
    """A file of published weights."""

    path: Path
    tensors: Mapping[str, np.ndarray]
    key: str
    others: list[str]

    def describe(self) -> dict[str, Any]:
        with open(self.path, "rb") as f:
            digest = hashlib.file_digest(f, "sha256").hexdigest()
        about = {"file": self.path.name, "bytes": self.path.stat().st_size, "sha256": digest}
        return about | ({"key": self.key, "beside_it": self.others} if self.key else {})


class Fit(NamedTuple):
    """Where parameters come from; rows of the report."""

    values: dict[str, np.ndarray]
    matched: list[dict[str, Any]]
    ignored: list[dict[str, Any]]


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise UserError(f"{message} (see {self.prog} --help)")


def main(argv: list[str]) -> int:
    """Runs the command in this process; returns the exit code."""
    return exit_code(_run, argv)


def _run(argv: list[str]) -> int:
    known, _ = _parser(None).parse_known_args([a for a in argv if a not in ("-h", "--help")])
    system = load("ports", known.system) if known.system else None
    args, rest = _parser(system).parse_known_args(argv)
    if system is None:
        raise UserError("give a system, e.g. --system=hlip (see python -m jaxmed.port --help)")
    if not args.out:
        raise UserError("--out is missing: the folder to write (with --back: the file)")
    starts = {side: path for side in system.MODEL.STARTS if (path := getattr(args, f"init_{side}"))}
    if bool(args.src) == bool(starts):
        ways = ["--src=WEIGHTS", " and ".join(f"--init-{s}=" for s in system.MODEL.STARTS)]
        raise UserError(f"give {'either ' if ways[1] else ''}{' or '.join(filter(None, ways))}")
    if args.back:
        more = rest or [f"--{k}" for k in ("recipe", "vocab", "prefix") if getattr(args, k)]
        if more or starts:
            raise UserError(f"--back takes --src and --out only, not {(more or ['--init-...'])[0]}")
        return _back(system, args, Path(args.out))
    if extra := [f"--{k}" for k in _more(system, "BACK") if getattr(args, k)]:
        raise UserError(f"{extra[0]} goes with --back")
    recipe = _recipe(args.recipe, [a for a in rest if a.startswith("--recipe.")])
    given = _given(system, args, [a for a in rest if not a.startswith("--recipe.")])
    if starts:
        return _start(system, starts, given, recipe, args)
    return _forth(system, given, recipe, args)


def _parser(system) -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python -m jaxmed.port",
        description="Published PyTorch weights to our parameters and back.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add(
        "--system",
        metavar="NAME",
        help="whose weights: a module of jaxmed/ports, e.g. hlip (with it, --help says more)",
    )
    add(
        "--src",
        metavar="PATH",
        help=".pt, .pth, .bin, .safetensors or a hub folder; --back: a ported folder or workdir",
    )
    add("--out", metavar="PATH", help="folder to write; with --back a .safetensors or .pt file")
    add("--back", action="store_true", help="from ours to the published names")
    add("--key", help="which dict of a PyTorch file holds the weights, e.g. state_dict")
    add("--config", metavar="FILE[:ARG]", help="take the model from a config file instead of from shapes")
    add(
        "--recipe", metavar="NAME", help="of python -m jaxmed.prep: what predict does with scans, unless told otherwise"
    )
    add("--vocab", metavar="PATH", help="of the text tower: vocab.txt or tokenizer.json; copied to OUT (default: that "
        "of the hub folder)")  # fmt: skip
    add("--prefix", metavar="TEXT", help="what every report in training began with, e.g. 'This study shows: '")
    add("--fresh", action="append", default=[], metavar="REGEX", help="parameters to initialise; may be repeated")
    add("--ignore", action="append", default=[], metavar="REGEX", help="published tensors to leave; may be repeated")
    add("--seed", type=int, default=0, help="of fresh parameters")
    if system is not None:
        for side, what in system.MODEL.STARTS.items():
            add(f"--init-{side}", metavar="FILE", help=what)
        for name, (field, what) in system.MODEL.OPTIONS.items():
            add(f"--{name}", metavar="VALUE", help=f"{what} (= --model.{field})")
        for name, what in (_more(system, "BACK") | _more(system.MODEL, "ADAPT")).items():
            add(f"--{name}", metavar="VALUE", help=what)
    return parser


def _more(module, options: str) -> dict[str, str]:
    """Options that not every system has."""
    return getattr(module, options, {})


def _given(system, args, rest: list[str]) -> dict[str, Any]:
    """Fields of config.model that the person named, or all of them with --config."""
    given = _config_model(args.config) if args.config else {}
    pairs = [(field, getattr(args, name.replace("-", "_"))) for name, (field, _) in system.MODEL.OPTIONS.items()]
    for extra in rest:
        field, equals, value = extra.removeprefix("--model.").partition("=")
        if not extra.startswith("--model.") or not field or not equals:
            raise UserError(f"unknown argument {extra} (see python -m jaxmed.port --system={args.system} --help)")
        pairs.append((field, value))
    for field, text in pairs:
        if text is None:
            continue
        *parents, last = field.split(".")
        node = given
        for parent in parents:
            node = node.setdefault(parent, {})
            if not isinstance(node, dict):
                raise UserError(f"--model.{field}: {parent} has no fields")
        node[last] = _value(text)
    return given


def _recipe(name: str | None, flags: list[str]) -> dict[str, Any] | None:
    """The preparation that the person named, as the manifest of shards describes it."""
    if name is None:
        if flags:
            raise UserError(f"{flags[0]}: an option of a recipe; name the recipe by --recipe=NAME")
        return None
    pairs = []
    for flag in flags:
        option, equals, value = flag.removeprefix("--recipe.").partition("=")
        if not option or not equals:
            raise UserError(f"{flag}: write --recipe.OPTION=VALUE (python -m jaxmed.prep --list-recipes)")
        pairs.append((option, value))
    return load("prep", "recipes").get(name, pairs).describe()


def _text(args, model: dict[str, Any], out: Path) -> dict[str, str]:
    """How texts become ids: `vocab` (a file that is copied to `out`) and `prefix`, those that are known."""
    beside = Path(args.src) if args.src and Path(args.src).is_dir() else None
    found = beside and any((beside / name).is_file() for name in ("tokenizer.json", "vocab.txt"))
    given = {"prefix": args.prefix} if args.prefix else {}
    if "text" not in model or not (args.vocab or found):
        if args.vocab:
            raise UserError(f"--vocab={args.vocab}: these weights have no text tower")
        return given
    tokenizer = Tokenizer(args.vocab or beside)
    size = load("models", model["name"]).make_text_tower(model).vocab_size
    if tokenizer.size != size:
        raise UserError(f"vocabulary {tokenizer.path} has {tokenizer.size} entries, the text tower has {size}")
    shutil.copyfile(tokenizer.path, out / tokenizer.path.name)
    return {"vocab": tokenizer.path.name, **given}


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return [_value(x) for x in text.split(",")] if "," in text else text


def _config_model(name: str) -> dict[str, Any]:
    path, _, arg = name.partition(":")
    if not Path(path).is_file():
        raise UserError(f"--config={name}: there is no file {path}")
    spec = importlib.util.spec_from_file_location("config", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    try:
        config = module.get_config(arg or None)
    except ValueError as e:
        raise UserError(f"--config={name}: {e}") from None
    return config.model.to_dict()


def _source(name: str, key: str | None = None) -> Source:
    path = Path(name)
    if path.is_dir():
        if (path / weights.PARAMS).is_file():
            raise UserError(f"{path}: these are ported weights already; --back writes them under published names")
        files = [f for f in _HUB if (path / f).is_file()]
        if not files:
            raise UserError(f"{path}: none of {', '.join(_HUB)} is in it; name the file")
        path = path / files[0]
    try:
        with open(path, "rb") as f:
            head = f.read(9)
    except OSError as e:
        raise UserError(f"{path}: cannot be read ({e.strerror or e})") from None
    if path.suffix == ".safetensors" or head[8:] == b"{":
        return Source(path, weights.read(path), "", [])
    state = torch_files.read(path, key)
    return Source(path, state.tensors, state.key, state.others)


def _matches(patterns, name: str) -> bool:
    return any(re.search(p, name) for p in patterns)


def _fit(source: Source, flat, names, wanted, fresh, ignore) -> Fit:
    """Checks that every tensor has a parameter of its shape, or is to be left out."""
    fit = Fit({}, [], [{"published": n, "shape": list(np.shape(source.tensors[n]))} for n in names.ignored])
    for name in names.unknown:
        if not _matches(ignore, name):
            raise UserError(
                f"{source.path}: tensor {name!r} of shape {np.shape(source.tensors[name])} has no place in the model "
                f"({len(names.unknown)} such in all); --ignore=REGEX leaves tensors out"
            )
        fit.ignored.append({"published": name, "shape": list(np.shape(source.tensors[name]))})
    for name, path in names.matched.items():
        x, like = flat[path], wanted.get(path)
        shape = np.shape(source.tensors[name]) if name in source.tensors else x.shape
        if _matches(ignore, name) or _matches(fresh, path):
            fit.ignored.append({"published": name, "shape": list(shape)})
            continue
        if like is None:
            raise UserError(
                f"{source.path}: tensor {name!r} of shape {shape} would be {path!r}, which the model does not have; "
                "--ignore=REGEX leaves tensors out"
            )
        if tuple(like.shape) != x.shape:
            raise UserError(
                f"{source.path}: tensor {name!r} has shape {shape}, which is {x.shape} here, but the model's {path!r} "
                f"has {tuple(like.shape)}; --fresh=REGEX initialises parameters instead"
            )
        fit.values[path] = x
        row = {"published": name, "shape": list(shape), "path": path, "our_shape": list(x.shape), "dtype": str(x.dtype)}
        fit.matched.append(row)
    return fit


def _check_patterns(args, names: list[str], paths: list[str]) -> None:
    tree.check_rules(args.ignore, names, "--ignore")
    tree.check_rules(args.fresh, paths, "--fresh")


def _forth(system, given: dict[str, Any], recipe: dict[str, Any] | None, args) -> int:
    source = _source(args.src, args.key)
    flat, names = system.convert(source.tensors)
    model, notes = (given, []) if args.config else system.MODEL.make(flat, given, names)
    if adapting := _more(system.MODEL, "ADAPT"):
        flat, done = system.MODEL.adapt(flat, model, {k: getattr(args, k) for k in adapting})
        notes += done
    init = system.MODEL.init(model)
    wanted = tree.flatten(jax.eval_shape(init, jax.random.key(0)))
    _check_patterns(args, list(source.tensors), list(wanted))
    fit = _fit(source, flat, names, wanted, args.fresh, args.ignore)
    missing = [p for p in wanted if p not in fit.values and not _matches(args.fresh, p)]
    if missing:
        raise UserError(
            f"{source.path}: it has no tensor for parameter {missing[0]!r} of shape {tuple(wanted[missing[0]].shape)} "
            f"({len(missing)} such in all); --fresh=REGEX initialises them instead"
        )
    if recipe is None:
        name, note = system.MODEL.recipe(model)
        recipe = _recipe(name, [])
        notes.append(note)
    sources = {"src": source.describe()}
    return _write(system, args, model, recipe, fit, wanted, init, sources, [*notes, system.MODEL.NOTES.get("src", "")])


def _start(system, starts: dict[str, str], given: dict[str, Any], recipe: dict[str, Any] | None, args) -> int:
    model = given if args.config else system.MODEL.make_new(given)
    init = system.MODEL.init(model)
    wanted = tree.flatten(jax.eval_shape(init, jax.random.key(0)))
    total = Fit({}, [], [])
    files, all_names, notes = {}, [], []
    for side, path in starts.items():
        source = _source(path, args.key)
        flat, names, fresh = system.MODEL.start(side, source.tensors, model, str(source.path))
        fit = _fit(source, flat, names, wanted, args.fresh, args.ignore)
        own = [p for p in wanted if p.startswith(f"{side}/") and p not in fit.values]
        if missing := [p for p in own if not _matches((*fresh, *args.fresh), p)]:
            raise UserError(
                f"{source.path}: it has nothing for parameter {missing[0]!r} of shape "
                f"{tuple(wanted[missing[0]].shape)} ({len(missing)} such in all); --fresh=REGEX initialises them"
            )
        total = Fit(total.values | fit.values, total.matched + fit.matched, total.ignored + fit.ignored)
        all_names += list(source.tensors)
        files[f"init_{side}"] = source.describe()
        notes.append(system.MODEL.NOTES.get(side, ""))
    _check_patterns(args, all_names, list(wanted))
    return _write(system, args, model, recipe, total, wanted, init, files, notes)


def _write(system, args, model, recipe, fit: Fit, wanted, init, sources, notes: list[str]) -> int:
    """The folder of ported weights, and the table for the person."""
    fresh = [p for p in wanted if p not in fit.values]
    values = dict(fit.values)
    if fresh:
        # Only what is fresh is ever computed.
        made = jax.jit(lambda rng: {p: x for p, x in tree.flatten(init(rng)).items() if p in fresh})
        values |= {p: np.asarray(x) for p, x in made(jax.random.key(args.seed)).items()}
    notes = [n for n in notes if n]
    report = {
        "system": args.system,
        "sources": sources,
        "notes": notes,
        "matched": fit.matched,
        "fresh": [{"path": p, "our_shape": list(wanted[p].shape)} for p in fresh],
        "ignored": fit.ignored,
    }
    out = Path(args.out)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(f"--out={out}: cannot be made ({e.strerror or e})") from None
    more = {"recipe": recipe, "text": _text(args, model, out)}
    weights.write(out / weights.PARAMS, {p: values[p] for p in wanted}, {"system": args.system})
    about = {"system": args.system, "model": model, "objective": system.MODEL.objective(model)}
    metrics.write_json(out / "model.json", about | {k: v for k, v in more.items() if v})
    metrics.write_json(out / "port_report.json", report)

    def numbers(rows, key="our_shape"):
        # Several published tensors may be one parameter.
        return f"{sum({r.get('path', i): int(np.prod(r[key])) for i, r in enumerate(rows)}.values()):,}"

    rows = [("", "tensors", "numbers"), ("matched", str(len(fit.matched)), numbers(fit.matched))]
    rows.append(("fresh", str(len(fresh)), numbers(report["fresh"])))
    rows.append(("ignored", str(len(fit.ignored)), numbers(fit.ignored, "shape")))
    print(metrics.table(rows))
    for what, names in (("fresh", fresh), ("ignored", [r["published"] for r in fit.ignored])):
        if names:
            print(f"{what}: {', '.join(names[:8])}{f', ... ({len(names)} in all)' if len(names) > 8 else ''}")
    print("\n".join(notes))
    print(f"{out} is ready: --config.init_from={out} starts training from it")
    return 0


def _back(system, args, out: Path) -> int:
    """Ours under the published names."""
    path = Path(args.src)
    if path.is_dir() and (path / weights.PARAMS).is_file():
        path = path / weights.PARAMS
    flat = weights.read(path) if path.is_file() else checkpoint.load_params(path)
    options = {k: value for k in _more(system, "BACK") if (value := getattr(args, k))}
    published = system.to_published(tree.unflatten(flat), **options)
    if out.suffix == ".safetensors":
        weights.write(out, published, {"format": "pt"})
    elif out.suffix in _PYTORCH:
        torch_files.write(out, published)
    else:
        raise UserError(f"--out={out}: with --back give a file that ends in .safetensors, {', '.join(_PYTORCH)}")
    print(f"{out}: {len(published)} tensors, {sum(x.size for x in published.values()):,} numbers, published names")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
