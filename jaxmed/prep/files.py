"""Places: files on disk and members of zips, opened on demand, and how a place may be written in a report."""

import contextlib
import functools
import gzip
import io
import os
import re
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from jaxmed.core.errors import UserError
from jaxmed.prep.scan import FileRef, Rejected, salted_hash

MAX_BYTES = 16 << 30  # of one decompressed file: far above any scan, far below what fills a disk
ARCHIVES = (".tar", ".tgz", ".tar.gz", ".tar.bz2", ".tar.xz", ".7z", ".rar", ".bz2", ".xz", ".zst")
# Endings of kinds that are zips inside but no archive of scans.
ZIP_LIKE = (".npz", ".docx", ".xlsx", ".pptx", ".odt", ".ods", ".jar", ".whl", ".egg", ".mrb", ".mxd")


def walk(sources: Sequence[str | Path]) -> Iterator[FileRef | tuple[FileRef, Rejected]]:
    """Every file under the sources, zips opened, in an order that depends on names only.

    `FileRef.shown` is `<source name>/<relative path>`, or `<...>.zip!/<member>`; not yet redacted.

    Raises:
      UserError: a source does not exist.
    """
    used: dict[str, int] = {}
    known_folders = [Path(source).resolve() for source in sources]
    for source in sources:
        root = Path(source)
        if not root.exists():
            raise UserError(f"prep: source {str(source)!r} does not exist; give a folder, a zip or an image file")
        base = root.resolve().name or "source"
        used[base] = used.get(base, 0) + 1
        base += f"#{used[base]}" if used[base] > 1 else ""
        if root.is_file():
            yield from _file(root, base)
            continue
        for folder, subfolders, names in os.walk(root, followlinks=True):
            subfolders.sort()
            here = Path(folder)
            for name in list(subfolders):
                if not (here / name).is_symlink():
                    continue
                target = (here / name).resolve()
                if any(target.is_relative_to(known) for known in known_folders):
                    subfolders.remove(name)
                    ref = FileRef(str(here / name), "", "/".join((base, *(here / name).relative_to(root).parts)))
                    yield ref, Rejected("unreadable", "a link to a folder that is read anyway")
                known_folders.append(target)
            for name in sorted(names):
                yield from _file(here / name, "/".join((base, *(here / name).relative_to(root).parts)))


def _file(path: Path, shown: str) -> Iterator[FileRef | tuple[FileRef, Rejected]]:
    ref = FileRef(str(path), "", shown)
    try:
        if not path.is_file():
            yield ref, Rejected("unreadable", "not a regular file, or a link to nowhere")
            return
        with open(path, "rb") as f:
            magic = f.read(4)
    except OSError as e:
        yield ref, Rejected("unreadable", type(e).__name__)
        return
    lower = path.name.lower()
    if magic != b"PK\x03\x04" or lower.endswith(ZIP_LIKE):
        if lower.endswith(".zip"):
            yield ref, Rejected("unreadable", "not a zip, or its beginning is lost")
        else:
            yield ref
        return
    try:
        members = _zip(str(path), os.getpid()).infolist()
    except (zipfile.BadZipFile, OSError, NotImplementedError, ValueError) as e:
        yield ref, Rejected("unreadable", f"broken zip ({type(e).__name__})")
        return
    for info in sorted(members, key=lambda m: m.filename):
        if info.is_dir():
            continue
        member = FileRef(str(path), info.filename, f"{shown}!/{info.filename}")
        parts = re.split(r"[\\/]", info.filename)
        if ".." in parts or parts[0] == "" or re.match(r"[A-Za-z]:", parts[0]):
            yield member, Rejected("unsafe-path", "the member's name leaves the archive")
        elif info.flag_bits & 1:
            yield member, Rejected("encrypted", "the member needs a password")
        elif info.file_size > MAX_BYTES:
            yield member, Rejected("too-large", f"more than {MAX_BYTES >> 30} GiB")
        elif info.filename.lower().endswith(".zip"):
            yield member, Rejected("nested-archive", "a zip inside a zip; unpack it once")
        else:
            yield member


@functools.lru_cache(maxsize=8)
def _zip(path: str, pid: int) -> zipfile.ZipFile:
    """An open zip; `pid` in the key because a handle shared by forked processes would share its file position."""
    del pid
    return zipfile.ZipFile(path)


def open_ref(ref: FileRef) -> BinaryIO:
    """A seekable binary file. Members of zips are read whole; gzip is undone.

    Raises:
      Rejected: "unreadable", "too-large".
    """
    try:
        if not ref.member:
            raw: BinaryIO = open(ref.path, "rb")  # noqa: SIM115 (the caller closes it)
        else:
            raw = io.BytesIO(_zip(ref.path, os.getpid()).read(ref.member))
        magic = raw.read(2)
        raw.seek(0)
        if magic != b"\x1f\x8b":
            return raw
        with raw, gzip.GzipFile(fileobj=raw) as f:
            data = f.read(MAX_BYTES + 1)
    except (OSError, EOFError, zipfile.BadZipFile, NotImplementedError, RuntimeError, ValueError, KeyError) as e:
        raise Rejected("unreadable", type(e).__name__) from None
    except Exception as e:  # zlib.error, lzma errors: whatever a damaged stream raises
        raise Rejected("unreadable", type(e).__name__) from None
    if len(data) > MAX_BYTES:
        raise Rejected("too-large", f"more than {MAX_BYTES >> 30} GiB")
    return io.BytesIO(data)


def head(ref: FileRef, count: int) -> bytes:
    """The first bytes, gzip undone, without reading the rest of a file.

    Raises:
      Rejected: "unreadable".
    """
    try:
        with contextlib.ExitStack() as stack:
            if ref.member:
                f = stack.enter_context(_zip(ref.path, os.getpid()).open(ref.member))
            else:
                f = stack.enter_context(open(ref.path, "rb"))
            data = f.read(count)
            if data[:2] == b"\x1f\x8b":
                f.seek(0)
                data = stack.enter_context(gzip.GzipFile(fileobj=f)).read(count)
            return data
    except Exception as e:  # OSError, BadZipFile, zlib.error, EOFError: whatever a damaged stream raises
        raise Rejected("unreadable", type(e).__name__) from None


@contextlib.contextmanager
def on_disk(ref: FileRef, suffix: str) -> Iterator[str]:
    """The file as a path for libraries that need one; members of zips live in a temporary file of neutral name."""
    if not ref.member:
        yield ref.path
        return
    with tempfile.TemporaryDirectory(prefix="jaxmed_prep_") as folder:
        path = os.path.join(folder, "scan" + suffix)
        try:
            with _zip(ref.path, os.getpid()).open(ref.member) as source, open(path, "wb") as target:
                while block := source.read(1 << 20):
                    target.write(block)
        except Exception as e:  # a damaged member; the disk being full is told from it below
            if isinstance(e, OSError) and e.errno is not None:
                raise
            raise Rejected("unreadable", type(e).__name__) from None
        yield path


UID = re.compile(r"(?<!\d)[12](?:\.\d+){4,}")
DATE = re.compile(r"(?<!\d)(?:19|20)\d\d[-_.]?(?:0[1-9]|1[0-2])[-_.]?(?:0[1-9]|[12]\d|3[01])(?!\d)")


class Shower:
    """Turns a place into what a report may hold.

    A component of the path is replaced by `~` and a hash if it holds a UID, a date, or one of `identifiers` (patient
    names, numbers, UIDs found in the headers) as a word or run of words; the ending is kept.
    """

    def __init__(self, salt: str, mode: str, identifiers: set[str]):
        if mode not in ("redact", "hash", "keep"):
            raise UserError(f"prep: paths={mode!r} is unknown; choose 'redact', 'hash' or 'keep'")
        self.salt, self.mode = salt, mode
        self.words: set[str] = set()
        self.longest = 1
        for identifier in identifiers:
            words = re.findall(r"[^\W_]+", identifier.lower())
            joined = "".join(words)
            if len(joined) >= 3:
                self.words.add(joined)
                self.longest = max(self.longest, len(words))

    def __call__(self, shown: str) -> str:
        if self.mode == "keep":
            return shown
        return "/".join(self._component(c) for c in shown.split("/"))

    def patient(self, text: str) -> str:
        """A patient's own name or number: hidden unless everything is kept."""
        return text if self.mode == "keep" else self._hidden(text)

    def _component(self, text: str) -> str:
        if self.mode == "hash" or UID.search(text) or DATE.search(text) or self._known(text):
            ending = re.search(r"(?:\.[A-Za-z]\w{0,5}){0,2}!?$", text)
            return self._hidden(text) + (ending.group() if ending else "")
        return text

    def _hidden(self, text: str) -> str:
        return "~" + salted_hash(self.salt, "path", text)[:8]

    def _known(self, text: str) -> bool:
        words = re.findall(r"[^\W_]+", text.lower())
        for start in range(len(words)):
            joined = ""
            for word in words[start : start + self.longest]:
                joined += word
                if joined in self.words:
                    return True
        return False
