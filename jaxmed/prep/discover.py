"""Finds studies in folders, zips and BIDS trees by reading headers only."""

import dataclasses
import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from jaxmed.core.errors import UserError
from jaxmed.prep import headers
from jaxmed.prep.files import Shower, open_ref, walk
from jaxmed.prep.headers import Header
from jaxmed.prep.manifest import Row, read_manifest
from jaxmed.prep.scan import FileRef, RawSeries, RawStudy, Reject, Rejected, salted_hash

_BIDS = re.compile(
    r"^(?P<root>.*?)(?:^|/)(?P<sub>sub-[A-Za-z0-9]+)/(?:(?P<ses>ses-[A-Za-z0-9]+)/)?[a-z0-9]+/(?P=sub)_[^/]+$"
)


@dataclasses.dataclass
class _Image:
    """A file with its header and the study it belongs to."""

    ref: FileRef
    header: Header
    place: str  # absolute path, with the member's name behind that of its zip
    bids: str = ""  # "sub-01" or "sub-01/ses-02"
    root: str = ""  # of the BIDS tree
    rows: list[Row] = dataclasses.field(default_factory=list)

    def study(self) -> tuple[str, ...]:
        """What makes its study: the manifest's word, the header, the BIDS session, the row, or the folder."""
        word = next((r.study for r in self.rows if r.study), "")
        if word:
            return "manifest", word
        if self.header.study:
            return "dicom", self.header.study
        if self.bids:
            return "bids", self.root, self.bids
        path = next((r.path for r in self.rows if r.path), "")
        if path:
            return "row", path
        return "folder", self.ref.shown.rpartition("/")[0]


def find_studies(
    sources: Sequence[str | Path],
    *,
    salt: str,
    manifest: str | Path | None = None,
    report: str = "sentences",
    skip_names: str = "seg|mask|label",
    paths: str = "redact",
    map_fn: Callable[[Callable, Iterable], Iterable] = map,
) -> tuple[list[RawStudy], list[Reject]]:
    """Groups every image under `sources` into studies; every other file gets a reason.

    DICOM files are grouped by study and series UID wherever they lie. A BIDS session is a study. Other NIfTI and NRRD
    files of one folder are a study, unless manifest rows name files, or give several files the same `study`.

    Args:
      sources: files, folders (walked) and zips (members are read on demand, never extracted by name).
      salt: secret of the data set; the same salt gives the same keys.
      manifest: CSV, TSV, JSON or JSON lines file with reports, labels, splits (see `manifest.read_manifest`).
      report: how the manifest's columns become text, one of `text.FORMS`.
      skip_names: regular expression; NIfTI and NRRD files whose name matches are masks ("" keeps all).
      paths: how places appear in rejects: "redact" replaces path components that hold an identifier known from the
        headers, a UID or a date by a hash; "hash" replaces all; "keep" none.
      map_fn: `map` or a pool's `map`, used for the header reading (its function and items can be pickled).

    Returns:
      Studies sorted by key (their series by series number, then by place) and rejects sorted by place.

    Raises:
      UserError: a source does not exist, the manifest cannot be read, or two of its rows contradict each other.
    """
    Shower(salt, paths, set())  # an unknown mode fails before hours of reading
    rows = read_manifest(manifest, report) if manifest is not None else []
    try:
        masks = re.compile(skip_names, re.I) if skip_names else None
    except re.error as e:
        raise UserError(f"prep: skip_names={skip_names!r} is no regular expression ({e})") from None
    refs: list[FileRef] = []
    refused: list[tuple[FileRef, str, str]] = []
    for found in walk(sources):
        if isinstance(found, tuple):
            refused.append((found[0], found[1].reason, found[1].detail))
            continue
        reason = _by_name(found, masks)
        if reason is None:
            refs.append(found)
        else:
            refused.append((found, *reason))
    identifiers: set[str] = set()
    images: list[_Image] = []
    for ref, header in zip(refs, map_fn(headers.inspect, refs)):
        identifiers.update(header.identifiers)
        if header.kind:
            images.append(_image(ref, header))
        else:
            refused.append((ref, header.reason, header.detail))
    pairs = {i.place[:-4].lower() for i in images if i.place.lower().endswith(".hdr")}
    refused = [r for r in refused if not (r[0].path.lower().endswith(".img") and r[0].path[:-4].lower() in pairs)]
    show = Shower(salt, paths, identifiers | {r.patient for r in rows if r.patient})
    rejects = [Reject(show(ref.shown), reason, detail) for ref, reason, detail in refused]
    rejects += _participants(images, refs, show)
    for source in sources:
        at = os.path.abspath(source)
        if not any(i.place == at or i.place.startswith(at + os.sep) for i in images):
            rejects.append(Reject(show(os.path.basename(at)), "no-images", "no image under this source", "source"))
    _match(images, rows, manifest, sources)
    studies, joined = _group(images, salt, show, manifest)
    rejects += joined
    used = {id(row) for i in images for row in i.rows}
    for row in rows:
        if id(row) not in used:
            where = f"{show(Path(manifest).name)}:{row.line}"
            rejects.append(Reject(where, "row-without-study", "no study matches this row", "manifest"))
    return studies, sorted(rejects, key=lambda r: (r.path, r.kind, r.reason, r.detail))


def _by_name(ref: FileRef, masks: re.Pattern | None) -> tuple[str, str] | None:
    """Files that are refused without opening them."""
    name = (ref.member or ref.path).replace("\\", "/").rpartition("/")[2]
    if not headers.volumes.kind_of(name):
        return None
    if re.search(r"(^|/)derivatives/(.*/)?sub-[A-Za-z0-9]+/", ref.shown):
        return "bids-derivative", "inside derivatives"
    if masks is not None and masks.search(headers.volumes.stem(name)):
        return "segmentation", "the file's name says that it is a mask"
    return None


def _image(ref: FileRef, header: Header) -> _Image:
    place = os.path.abspath(ref.path) + (os.sep + ref.member.replace("\\", "/") if ref.member else "")
    bids = _BIDS.match(ref.shown) if header.kind != "dicom" else None
    if bids is None:
        return _Image(ref, header, place)
    return _Image(ref, header, place, "/".join(w for w in (bids["sub"], bids["ses"]) if w), bids["root"])


def _match(images: list[_Image], rows: list[Row], manifest: str | Path | None, sources: Sequence[str | Path]) -> None:
    """Gives every image its rows: of the deepest path, else study UID, accession number, BIDS session, participant."""
    if manifest is None:
        return
    by_path: dict[str, list[Row]] = defaultdict(list)
    by_word: dict[tuple[str, str], list[Row]] = defaultdict(list)
    bases = [os.path.dirname(os.path.abspath(manifest))]
    bases += [os.path.abspath(s) for s in sources] + [os.path.dirname(os.path.abspath(s)) for s in sources]
    for row in rows:
        if row.path:
            for place in {os.path.normpath(os.path.join(base, row.path)) for base in bases}:
                by_path[place].append(row)
        for word in (("uid", row.uid), ("accession", row.accession), ("bids", row.bids)):
            if word[1]:
                by_word[word].append(row)
    for image in images:
        place, parent = image.place, os.path.dirname(image.place)
        while place not in by_path and place != parent:
            place, parent = parent, os.path.dirname(parent)
        image.rows = by_path.get(place, [])
        for word in (
            ("uid", image.header.study),
            ("accession", image.header.accession),
            ("bids", image.bids),
            ("bids", image.bids.partition("/")[0]),
        ):
            image.rows = image.rows or by_word.get(word, [])


def _group(
    images: list[_Image], salt: str, show: Shower, manifest: str | Path | None
) -> tuple[list[RawStudy], list[Reject]]:
    """Images -> studies with keys, joined with their rows."""
    groups: dict[tuple[str, ...], list[_Image]] = defaultdict(list)
    for image in images:
        groups[image.study()].append(image)
    hits: dict[int, set[tuple[str, ...]]] = defaultdict(set)
    for identity, members in groups.items():
        for image in members:
            for row in image.rows:
                hits[id(row)].add(identity)
    rejects, studies, ambiguous = [], [], {}
    for identity, members in groups.items():
        key = salted_hash(salt, "study", *identity)
        study = RawStudy(key, key, _series(members, salt, show))
        patient = next((i.header.patient for i in members if i.header.patient), "")
        patient = patient or next((f"{i.root}/{i.bids.partition('/')[0]}" for i in members if i.bids), "")
        if patient:
            study.patient = salted_hash(salt, "patient", patient)
        rows = list({id(row): row for i in members for row in i.rows}.values())
        for row in rows:
            whole_participant = row.bids and "/" not in row.bids and not (row.path or row.uid or row.accession)
            if len(hits[id(row)]) > 1 and not whole_participant:
                ambiguous[row.line] = len(hits[id(row)])
                continue
            _join(study, row, manifest, salt)
        if not rows and manifest is not None:
            rejects.append(Reject(key, "study-without-row", "no manifest row; kept without report and labels", "study"))
        studies.append(study)
    for line, count in ambiguous.items():
        where = f"{show(Path(manifest).name)}:{line}"
        rejects.append(Reject(where, "ambiguous-row", f"matches {count} studies; joined to none", "manifest"))
    return sorted(studies, key=lambda s: s.key), rejects


def _join(study: RawStudy, row: Row, manifest: str | Path | None, salt: str) -> None:
    for name, found in row.labels.items():
        if study.labels.setdefault(name, found) != found:
            raise UserError(
                f"manifest {manifest}, line {row.line}, column 'label:{name}': {found:g} contradicts the "
                f"{study.labels[name]:g} of another row of the same study; keep one"
            )
    if row.split and study.split and row.split != study.split:
        raise UserError(
            f"manifest {manifest}, line {row.line}, column 'split': {row.split!r} contradicts the {study.split!r} of "
            "another row of the same study; keep one"
        )
    study.split = row.split or study.split
    study.sentences += [s for s in row.sentences if s not in study.sentences]
    if row.patient:
        study.patient = salted_hash(salt, "patient", row.patient)


def _series(members: list[_Image], salt: str, show: Shower) -> list[RawSeries]:
    groups: dict[tuple[str, ...], list[_Image]] = defaultdict(list)
    for image in members:
        if image.header.kind != "dicom":
            groups[("file", image.ref.shown)].append(image)
        elif image.header.series:
            groups[("dicom", image.header.series)].append(image)
        else:
            groups[("folder", image.ref.shown.rpartition("/")[0])].append(image)
    ordered = sorted(groups.items(), key=lambda g: (min(i.header.order for i in g[1]), g[1][0].ref.shown))
    return [
        RawSeries(
            found[0].header.kind,
            tuple(dataclasses.replace(i.ref, shown=show(i.ref.shown)) for i in found),
            salted_hash(salt, "series", *identity),
        )
        for identity, found in ordered
    ]


def _participants(images: list[_Image], refs: list[FileRef], show: Shower) -> list[Reject]:
    """Participants that the table of a BIDS tree lists and that have no image."""
    present: dict[str, set[str]] = defaultdict(set)
    for image in images:
        if image.bids:
            present[image.root].add(image.bids.partition("/")[0])
    rejects = []
    for ref in refs:
        root, _, name = ref.shown.rpartition("/")
        if name != "participants.tsv" or root not in present:
            continue
        try:
            with open_ref(ref) as f:
                lines = f.read().decode("utf-8-sig", "replace").splitlines()
        except Rejected:
            continue  # its own entry says that it is unreadable
        columns = lines[0].split("\t") if lines else []
        if "participant_id" not in columns:
            continue
        at = columns.index("participant_id")
        for line in lines[1:]:
            cells = line.split("\t")
            if len(cells) > at and cells[at].strip() and cells[at].strip() not in present[root]:
                rejects.append(Reject(show(ref.shown), "no-images", f"no image of {cells[at].strip()}", "participant"))
    return rejects
