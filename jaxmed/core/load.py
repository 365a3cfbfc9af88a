"""Strings select modules: `load("models", "bert")` is `jaxmed.models.bert`.

A name with a dot names a module outside this tree (`"mypkg.mymodel"`), so that adding a model, objective,
evaluator, source or port never means editing a shared file.
"""

import dataclasses
import importlib
import importlib.util
import pkgutil
from collections.abc import Mapping
from types import ModuleType
from typing import Any

from jaxmed.core.config import did_you_mean
from jaxmed.core.errors import UserError


def load(floor: str, name: str) -> ModuleType:
    """Imports `jaxmed.<floor>.<name>` (the floor "" is the top), or `name` itself if it has a dot.

    Raises:
      UserError: there is no such module; names those that exist on that floor.
    """
    package_name = f"jaxmed.{floor}".rstrip(".")
    path = name if "." in name else f"{package_name}.{name}"
    try:
        return importlib.import_module(path)
    except ModuleNotFoundError as e:
        if e.name is not None and (path == e.name or path.startswith(e.name + ".")):
            package = importlib.import_module(package_name)
            known = sorted(m.name for m in pkgutil.iter_modules(package.__path__) if not m.name.startswith("_"))
            raise UserError(
                f"no module {path!r} ({package_name} has {', '.join(known)}); "
                f"a module of your own is named with its dots, e.g. 'mypkg.{name.split('.')[-1]}'"
            ) from None
        raise


def load_model(where: str, fields: Mapping[str, Any], name: str | None = None):
    """`jaxmed.models.<fields.name>.Model` with the fields of one of that module's VARIANTS and the others of `fields`.

    Args:
      where: the config field that `fields` are, such as "config.model".
      name: of the module in the tree of parameters.

    Raises:
      UserError: names the field that is missing or unknown, or does not go with the others.
    """
    fields = dict(fields)
    if "name" not in fields:
        raise UserError(f"{where}.name is missing; it names a module in jaxmed/models, such as 'bert' or 'vit'")
    module = load("models", fields.pop("name"))
    variant = fields.pop("variant", None)
    if variant is not None and variant not in module.VARIANTS:
        raise UserError(
            f"{where}.variant: {variant!r} is not one of {', '.join(module.VARIANTS)}"
            + did_you_mean(variant, module.VARIANTS)
        )
    values = {**(module.VARIANTS[variant] if variant else {}), **fields}
    known = {k: f for k, f in module.Model.__dataclass_fields__.items() if k not in ("parent", "name")}
    for key in values:
        if key not in known:
            raise UserError(f"{where}.{key} is not an option{did_you_mean(key, known)} ({', '.join(known)})")
    for key, field in known.items():
        if key not in values and field.default is dataclasses.MISSING:
            raise UserError(f"{where}.{key} is missing" + ("" if variant else "; or name a variant"))
    try:
        return module.Model(**values, name=name)
    except UserError as e:
        raise UserError(f"{where}: {e}") from None
