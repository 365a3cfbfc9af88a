"""The laws of the house, read off the source itself."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted((ROOT / "jaxmed").rglob("*.py")) + sorted((ROOT / "configs").glob("*.py"))

# Which floor may import which. A file reaches every other floor by name, through core.load.
STAIRS = {
    "core": {"core"},
    "data": {"core", "data"},
    "prep": {"core", "data", "prep"},
    "models": {"core", "models"},
    "objectives": {"core"},
    "evals": {"core", "data", "evals"},
    "ports": {"core", "ports"},
    "train": {"core"},
}


def floor(path: Path) -> str:
    parts = path.relative_to(ROOT).parts
    return parts[0] if parts[0] == "configs" else Path(parts[1]).stem


def imports(path: Path, *, top_level_only: bool = False) -> set[str]:
    module = ast.parse(path.read_text())
    nodes = module.body if top_level_only else list(ast.walk(module))
    names = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_stairs_are_one_way(path):
    own = floor(path)
    for name in imports(path):
        if name.startswith("jaxmed."):
            target = name.split(".")[1]
            if own == "configs":
                pytest.fail(f"{path.name} imports {name}; configs name things by strings")
            if own in STAIRS:
                assert target in STAIRS[own], f"{own} must not import {name}"
            above = own == "prep" or own.split("_")[0] == "predict"  # raw scans become input by the same code
            assert target != "prep" or above, f"only predict imports prep, but {own} imports {name}"
        if name.startswith("configs"):
            assert own == "configs" and name.startswith("configs.common"), f"{own} imports {name}"


def test_numpy_only_where_loader_threads_run():
    allowed = {"numpy", "scipy", "collections", "math", "typing", "dataclasses", "jaxmed"}
    for name in imports(ROOT / "jaxmed/data/ops.py"):
        assert name.split(".")[0] in allowed, f"data/ops.py runs in loader threads and imports {name}"


def test_no_file_is_a_maze():
    for path in SOURCES + sorted((ROOT / "tests").rglob("*.py")):
        assert len(path.read_text().splitlines()) <= 500, f"{path.relative_to(ROOT)} has more than 500 lines"
        assert path.stem not in ("utils", "misc", "helpers", "base"), path


def test_shared_files_name_no_system():
    systems = ("hlip", "voco", "brainmvp", "radiograph", "vlt")
    shared = [*(ROOT / "jaxmed/core").glob("*.py"), ROOT / "jaxmed/train.py", ROOT / "jaxmed/main.py"]
    shared += [ROOT / f"jaxmed/data/{name}.py" for name in ("record", "shards", "plan", "pipeline")]
    for path in shared:
        text = path.read_text().lower()
        assert not [s for s in systems if s in text], path


def test_importing_everything_loads_neither_torch_nor_tensorflow():
    modules = [".".join(p.relative_to(ROOT).with_suffix("").parts) for p in SOURCES if p.stem != "__main__"]
    modules = [m.removesuffix(".__init__") for m in modules]
    code = (
        f"import importlib, sys\nfor m in {modules!r}: importlib.import_module(m)\n"
        "print([m for m in ('torch', 'tensorflow') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error::DeprecationWarning:jaxmed", "-c", code], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip() == "[]"
