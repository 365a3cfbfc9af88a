"""Strings select modules: `load("models", "bert")` is `jaxmed.models.bert`.

A name with a dot names a module outside this tree (`"mypkg.mymodel"`), so that adding a model, objective,
evaluator, source or port never means editing a shared file.
"""

import importlib
import importlib.util
import pkgutil
from types import ModuleType

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
