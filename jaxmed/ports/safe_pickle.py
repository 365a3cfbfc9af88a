"""Pickle files as data: plain containers and the objects of a list, nothing imported, nothing called by name.

The standard library's `pickletools.genops` splits the stream into its instructions; this file gives a meaning only to
those that build containers. A global is looked up in a table of our own and stays a word if it is not a constructor
there, so that no stream can reach a function of Python.
"""

import pickletools
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO, NamedTuple


class Refused(Exception):
    """The stream asks for something that is not plain data; the message says what."""


class Unknown(Refused):
    """The stream names an object of Python that is not in the table."""


class Damaged(Exception):
    """The bytes are no whole pickle."""


class Inert:
    """Stands for an object that we know to hold no weights and do not build."""

    def __repr__(self) -> str:
        return "<left out>"


class Word(NamedTuple):
    """A global of the table: `make` builds what calling it would (None: it is data itself, or makes `Inert`)."""

    name: str
    make: Callable | None = None
    data: Any = None


# fmt: off
_LITERALS = frozenset([
    "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT",
    "STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8",
    "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8",
])
# fmt: on
_CONSTANTS = {"NONE": lambda: None, "NEWTRUE": lambda: True, "NEWFALSE": lambda: False, "EMPTY_TUPLE": tuple}
_CONSTANTS |= {"EMPTY_LIST": list, "EMPTY_DICT": dict, "EMPTY_SET": set}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_MARK = object()


class _Machine:
    def __init__(self, find: Callable[[str], Word | None], persistent: Callable[[Any], Any]):
        self._find, self._persistent = find, persistent
        self._stack: list = []
        self._memo: dict[int, Any] = {}

    def run(self, stream: BinaryIO | bytes) -> Any:
        for op, arg, _ in pickletools.genops(stream):
            name = op.name
            if name in _LITERALS:
                self._stack.append(arg)
            elif name in _CONSTANTS:
                self._stack.append(_CONSTANTS[name]())
            elif name in _TUPLES:
                n = _TUPLES[name]
                items = tuple(self._stack[-n:])
                del self._stack[-n:]
                self._stack.append(items)
            elif name == "STOP":
                return self._take()
            elif name not in ("PROTO", "FRAME"):
                step = getattr(self, f"_{name.lower()}", None)
                if step is None:
                    raise Refused(f"the pickle instruction {name}")
                step(arg)
        raise Damaged("it ends early")

    def _take(self) -> Any:
        x = self._stack.pop()
        if x is _MARK:
            raise Damaged("its instructions do not fit together")
        return x

    def _to_mark(self) -> list:
        items = []
        while (x := self._stack.pop()) is not _MARK:
            items.append(x)
        return items[::-1]

    def _mark(self, _) -> None:
        self._stack.append(_MARK)

    def _tuple(self, _) -> None:
        self._stack.append(tuple(self._to_mark()))

    def _list(self, _) -> None:
        self._stack.append(self._to_mark())

    def _dict(self, _) -> None:
        items = self._to_mark()
        self._stack.append(dict(zip(items[::2], items[1::2], strict=True)))

    def _frozenset(self, _) -> None:
        self._stack.append(frozenset(self._to_mark()))

    def _append(self, _) -> None:
        self._extend([self._take()])

    def _appends(self, _) -> None:
        self._extend(self._to_mark())

    def _extend(self, items: list) -> None:
        if isinstance(self._stack[-1], list):
            self._stack[-1].extend(items)
        elif not isinstance(self._stack[-1], Inert):
            raise Refused("items of something that is no list")

    def _setitem(self, _) -> None:
        value, key = self._take(), self._take()
        self._update([key, value])

    def _setitems(self, _) -> None:
        self._update(self._to_mark())

    def _update(self, items: list) -> None:
        if isinstance(self._stack[-1], dict):
            self._stack[-1].update(zip(items[::2], items[1::2], strict=True))
        elif not isinstance(self._stack[-1], Inert):
            raise Refused("keys of something that is no dict")

    def _additems(self, _) -> None:
        items = self._to_mark()
        if not isinstance(self._stack[-1], set):
            raise Refused("elements of something that is no set")
        self._stack[-1].update(items)

    def _put(self, number) -> None:
        self._memo[int(number)] = self._stack[-1]

    def _get(self, number) -> None:
        self._stack.append(self._memo[int(number)])

    _binput = _long_binput = _put
    _binget = _long_binget = _get

    def _memoize(self, _) -> None:
        self._memo[len(self._memo)] = self._stack[-1]

    def _pop(self, _) -> None:
        self._take()

    def _pop_mark(self, _) -> None:
        self._to_mark()

    def _dup(self, _) -> None:
        self._stack.append(self._stack[-1])

    def _global(self, name: str) -> None:
        word = self._find(name)
        if word is None:
            raise Unknown(f"the Python object {name.replace(' ', '.')}")
        self._stack.append(word)

    def _stack_global(self, _) -> None:
        name, module = self._take(), self._take()
        self._global(f"{module} {name}")

    def _reduce(self, _) -> None:
        args, word = self._take(), self._take()
        self._stack.append(call(word, args))

    _newobj = _reduce

    def _newobj_ex(self, _) -> None:
        self._take()
        self._reduce(None)

    def _build(self, _) -> None:
        # Attributes are never set: on a dict or a tensor they are notes of PyTorch, on the rest nobody needs them.
        self._take()
        if isinstance(self._stack[-1], Word):
            raise Refused(f"attributes of {self._stack[-1].name.replace(' ', '.')}")

    def _binpersid(self, _) -> None:
        self._stack.append(self._persistent(self._take()))


def call(word: Any, args: Any) -> Any:
    """What calling a word of the table builds."""
    if not isinstance(word, Word) or not isinstance(args, tuple):
        raise Refused("a call of something that is no constructor")
    return Inert() if word.make is None else word.make(*args)


def load(
    stream: BinaryIO | bytes, find: Callable[[str], Word | None], persistent: Callable[[Any], Any] | None = None
) -> Any:
    """The object of one pickle; a file is left right behind it.

    Args:
      find: "module name" -> its word, or None to refuse it.
      persistent: what a persistent id stands for.

    Raises:
      Refused: the stream asks for anything that is not plain data or in the table (`Unknown`: by name).
      Damaged: it is no whole pickle.
    """

    def no_persistent(_):
        raise Refused("persistent ids")

    try:
        return _Machine(find, persistent or no_persistent).run(stream)
    except (Refused, Damaged):
        raise
    except (ValueError, IndexError, KeyError, TypeError, AttributeError, OverflowError, MemoryError) as e:
        raise Damaged(f"{type(e).__name__}: {e}") from None


def words(table: Mapping[str, Callable | None]) -> dict[str, Word]:
    return {name: Word(name, make) for name, make in table.items()}
