"""Strings select modules: `load("models", "hlip")` is `jaxmed.models.hlip`.

A name with a dot names a module outside this tree (`"mypkg.mymodel"`), so that adding a model, objective,
evaluator, source or port never means editing a shared file.
"""

import importlib
import importlib.util
import pkgutil
from types import ModuleType

from jaxmed.core.errors import UserError


def load(floor: str, name: str) -> ModuleType:
    """Imports `jaxmed.<floor>.<name>`, or `name` itself if it has a dot.

    Raises:
      UserError: there is no such module; names those that exist on that floor.
    """
    path = name if "." in name else f"jaxmed.{floor}.{name}"
    try:
        return importlib.import_module(path)
    except ModuleNotFoundError as e:
        if e.name is not None and (path == e.name or path.startswith(e.name + ".")):
            package = importlib.import_module(f"jaxmed.{floor}")
            known = sorted(m.name for m in pkgutil.iter_modules(package.__path__) if not m.name.startswith("_"))
            raise UserError(
                f"no module {path!r} for {floor} {name!r}; jaxmed has {', '.join(known)}; "
                f"a module of your own is named with its dots, e.g. 'mypkg.{name.split('.')[-1]}'"
            ) from None
        raise
