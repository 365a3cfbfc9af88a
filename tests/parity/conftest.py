"""`pytest tests/parity --goldens DIR` (may be repeated): one test for every file below DIR, and a table at the end."""

from pathlib import Path

import pytest

from tests.parity import case as golden

ROWS = pytest.StashKey[list]()
DEFAULT = Path(__file__).parents[1] / "goldens"


def pytest_addoption(parser):
    parser.addoption(
        "--goldens",
        action="append",
        metavar="DIR",
        help="folder (or file) of golden files; may be given several times; default: tests/goldens",
    )


def pytest_configure(config):
    config.stash[ROWS] = []


def _roots(config) -> list[Path]:
    given = config.getoption("goldens", None)
    return [config.invocation_params.dir / d for d in given] if given else sorted(DEFAULT.glob("*"))


def pytest_generate_tests(metafunc):
    if "golden_file" not in metafunc.fixturenames:
        return
    paths = {}
    for root in _roots(metafunc.config):
        if not root.exists():
            raise pytest.UsageError(f"--goldens {root}: no such file or folder")
        found = golden.files(root)
        if not found:
            raise pytest.UsageError(f"--goldens {root}: holds no golden files")
        paths.update((p.resolve(), None) for p in found)
    metafunc.parametrize("golden_file", list(paths), ids=[f"{p.parent.name}/{p.stem}" for p in paths])


@pytest.fixture
def rows(request) -> list:
    """What the summary table shows: one entry per case."""
    return request.config.stash[ROWS]


def pytest_terminal_summary(terminalreporter, config):
    table = config.stash.get(ROWS, [])
    if not table:
        return
    terminalreporter.section("goldens: largest error of each case, in the unit of its tolerance")
    width = max(len(r["case"]) for r in table)
    kinds = max(len(r["kind"]) for r in table)
    for r in table:
        terminalreporter.write_line(
            f"{'ok  ' if r['ok'] else 'FAIL'} {r['case']:{width}} {r['kind']:{kinds}} {r['compared']:4d} tensors  "
            f"{r['error']:.1e} of {r['tolerance']:.0e} ({r['mode']})  {r['worst']}"
        )
        for prefix, (count, why) in r["waiting"].items():
            terminalreporter.write_line(f"     {count} waiting: {prefix}*: {why}")
