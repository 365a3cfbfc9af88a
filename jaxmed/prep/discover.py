"""Finds studies in folders, zips and BIDS trees by reading headers only."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from jaxmed.prep.scan import RawStudy, Reject


def find_studies(
    sources: Sequence[str | Path],
    *,
    salt: str,
    manifest: str | Path | None = None,
    skip_names: str = "seg|mask|label",
    paths: str = "redact",
    map_fn: Callable[[Callable, Iterable], Iterable] = map,
) -> tuple[list[RawStudy], list[Reject]]:
    """Groups every image under `sources` into studies; every other file gets a reason.

    Args:
      sources: files, folders (walked) and zips (members are read on demand, never extracted by name).
      salt: secret of the data set; the same salt gives the same keys.
      manifest: CSV, TSV, JSON or JSON lines file with reports, labels, splits (see `manifest.read_manifest`).
      skip_names: regular expression; NIfTI and NRRD files whose name matches are masks ("" keeps all).
      paths: how places appear in rejects: "redact" replaces path components that hold an identifier known from the
        headers, a UID or a date by a hash; "hash" replaces all; "keep" none.
      map_fn: `map` or a pool's `map`, used for the header reading (its function and items can be pickled).

    Returns:
      Studies sorted by key (their series by series number, then by place) and rejects sorted by place.

    Raises:
      UserError: a source does not exist, or the manifest cannot be read.
    """
    raise NotImplementedError
