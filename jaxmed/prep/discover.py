"""Finds studies in folders, zips and BIDS trees by reading headers only."""

import dataclasses
import functools
import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from jaxmed.core.errors import UserError
from jaxmed.prep import headers
from jaxmed.prep.files import Shower, open_ref, walk
from jaxmed.prep.headers import Header
from jaxmed.prep.manifest import Manifest, Row, read_manifests
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
    words: dict[str, str] = dataclasses.field(default_factory=dict)  # "study", "patient": by the user's expressions

    def study(self) -> tuple[str, ...]:
        """What makes its study: the manifest's word, the user's expression, the header, the BIDS session, the row of
        its path, or the folder.
        """
        word = next((r.study for r in self.rows if r.study), "")
        if word:
            return "manifest", word
        if self.words.get("study"):
            return "name", self.words["study"]
        if self.header.study:
            return "dicom", self.header.study
        if self.bids:
            return "bids", self.root, self.bids
        path = next((r.path for r in self.rows if r.path), "")
        if path:
            return "row", path
        return "folder", self.ref.shown.rpartition("/")[0]

    def itself(self) -> tuple[str, ...]:
        """What makes it, where every image is a study of its own."""
        return ("instance", self.header.instance) if self.header.instance else ("file", self.ref.shown)


def find_studies(
    sources: Sequence[str | Path],
    *,
    salt: str,
    manifest: str | Path | Sequence[str | Path] | None = None,
    report: str = "sentences",
    labels: Sequence[str] = (),
    study: str = "",
    patient: str = "",
    skip_names: str = "seg|mask|label",
    paths: str = "redact",
    projections: bool = False,
    map_fn: Callable[[Callable, Iterable], Iterable] = map,
) -> tuple[list[RawStudy], list[Reject]]:
    """Groups every image under `sources` into studies; every other file gets a reason.

    DICOM files are grouped by study and series UID wherever they lie. A BIDS session is a study. Other NIfTI and NRRD
    files of one folder are a study, unless manifest rows name files by `path`, or give several files the same `study`.

    Args:
      sources: files, folders (walked) and zips (members are read on demand, never extracted by name).
      salt: secret of the data set; the same salt gives the same keys.
      manifest: CSV, TSV, JSON or JSON lines files with reports, labels, splits (see `manifest.read_manifest`). An
        image may have rows in each.
      report, labels: how the manifests' columns become text and labels (see `manifest.read_manifests`).
      study, patient: regular expressions, searched in the place of a file; what they (or their first group) match
        names its study or patient, whatever the header says. "" = none.
      skip_names: regular expression; NIfTI and NRRD files whose name matches are masks ("" keeps all).
      paths: how places appear in rejects: "redact" replaces path components that hold an identifier known from the
        headers, a UID or a date by a hash; "hash" replaces all; "keep" none.
      projections: radiographs: every image is a study of its own, PNG and JPEG are images, and a second file of the
        same SOPInstanceUID is refused. A row about a folder, study or session is about each of its images; images
        without PatientID are of one patient if they are of one DICOM study.
      map_fn: `map` or a pool's `map`, used for the header reading (its function and items can be pickled).

    Returns:
      Studies sorted by key (their series by series number, then by place) and rejects sorted by place.

    Raises:
      UserError: a source does not exist, a manifest cannot be read, two of its rows contradict each other, an
        expression matches no image, or `study` is given with `projections`.
    """
    if projections and study:
        raise UserError(f"--study={study}: every radiograph is a record of its own; --patient groups them for splits")
    Shower(salt, paths, set())  # an unknown mode fails before hours of reading
    manifests = read_manifests([manifest] if isinstance(manifest, (str, Path)) else manifest or (), report, labels)
    masks = _compiled("--read.skip_names", skip_names)
    named = {"study": _compiled("--study", study), "patient": _compiled("--patient", patient)}
    refs: list[FileRef] = []
    refused: list[tuple[FileRef, str, str]] = []
    tables = {os.path.abspath(m.path) for m in manifests}
    for found in walk(sources):
        if isinstance(found, FileRef) and not found.member and os.path.abspath(found.path) in tables:
            continue
        if isinstance(found, tuple):
            refused.append((found[0], found[1].reason, found[1].detail))
            continue
        reason = _by_name(found, masks, projections)
        if reason is None:
            refs.append(found)
        else:
            refused.append((found, *reason))
    identifiers: set[str] = set()
    images: list[_Image] = []
    for ref, header in zip(refs, map_fn(functools.partial(headers.inspect, projections=projections), refs)):
        identifiers.update(header.identifiers)
        if header.kind:
            images.append(_image(ref, header))
        else:
            refused.append((ref, header.reason, header.detail))
    pairs = {i.place[:-4].lower() for i in images if i.place.lower().endswith(".hdr")}
    refused = [r for r in refused if not (r[0].path.lower().endswith(".img") and r[0].path[:-4].lower() in pairs)]
    for word, pattern in named.items():
        matches = [(i, pattern.search(i.ref.shown)) for i in images] if pattern else []
        if matches and not any(m for _, m in matches):
            example = Shower(salt, paths, identifiers)(matches[0][0].ref.shown)
            raise UserError(f"--{word}={pattern.pattern}: matches no image, e.g. not {example!r}")
        for image, match in matches:
            image.words[word] = (match[1] if pattern.groups else match[0]) or "" if match else ""
    rows = [row for m in manifests for row in m.rows]
    identifiers |= {r.patient for r in rows} | {i.words.get("patient", "") for i in images}
    show = Shower(salt, paths, identifiers)
    rejects = [Reject(show(ref.shown), reason, detail) for ref, reason, detail in refused]
    rejects += _participants(images, refs, show)
    for source in sources:
        at = os.path.abspath(source)
        if not any(i.place == at or i.place.startswith(at + os.sep) for i in images):
            rejects.append(Reject(show(os.path.basename(at)), "no-images", "no image under this source", "source"))
    _match(images, manifests, sources)
    used = {id(row) for i in images for row in i.rows}
    if images and rows and not used:
        keys = [k for k in ("path", "volume", "uid", "accession", "bids") if any(getattr(r, k) for r in rows)]
        raise UserError(
            f"--manifest={', '.join(m.path for m in manifests)}: none of its {len(rows)} rows fits any of the "
            f"{len(images)} images (looked for by {', '.join(keys)}; a path is relative to the manifest or to a source)"
        )
    studies, joined = _group(images, salt, show, bool(manifests), projections)
    rejects += joined
    for row in rows:
        if id(row) not in used:
            rejects.append(Reject(_line(row, show), "row-without-study", "no study matches this row", "manifest"))
    for m in manifests:
        if m.unread:
            rejects.append(Reject(show(Path(m.path).name), "unread-columns", ", ".join(m.unread), "manifest"))
    return studies, sorted(rejects, key=lambda r: (r.path, r.kind, r.reason, r.detail))


def _compiled(flag: str, pattern: str) -> re.Pattern | None:
    try:
        return re.compile(pattern, re.I) if pattern else None
    except re.error as e:
        raise UserError(f"{flag}={pattern}: no regular expression ({e})") from None


def _line(row: Row, show: Shower) -> str:
    return f"{show(Path(row.manifest).name)}:{row.line}"


def _by_name(ref: FileRef, masks: re.Pattern | None, projections: bool) -> tuple[str, str] | None:
    """Files that are refused without opening them."""
    name = (ref.member or ref.path).replace("\\", "/").rpartition("/")[2]
    picture = projections and name.lower().endswith((".png", ".jpg", ".jpeg"))
    if not headers.volumes.kind_of(name) and not picture:
        return None
    if re.search(r"(^|/)derivatives/(.*/)?sub-[A-Za-z0-9]+/", ref.shown):
        return "bids-derivative", "inside derivatives"
    skipped = masks.search(headers.volumes.stem(name)) if masks is not None else None
    if skipped is not None:
        if skipped[0].lower() in ("seg", "mask", "label"):
            return "segmentation", "the file's name says that it is a mask"
        return "skipped-by-name", "--read.skip_names"
    return None


def _image(ref: FileRef, header: Header) -> _Image:
    place = os.path.abspath(ref.path) + (os.sep + ref.member.replace("\\", "/") if ref.member else "")
    bids = _BIDS.match(ref.shown) if header.kind != "dicom" else None
    if bids is None:
        return _Image(ref, header, place)
    return _Image(ref, header, place, "/".join(w for w in (bids["sub"], bids["ses"]) if w), bids["root"])


def _match(images: list[_Image], manifests: list[Manifest], sources: Sequence[str | Path]) -> None:
    """Gives every image its rows of each table: of the deepest path, else the file's name, study UID, accession number,
    BIDS session, participant.
    """
    for manifest in manifests:
        by_path: dict[str, list[Row]] = defaultdict(list)
        by_word: dict[tuple[str, str], list[Row]] = defaultdict(list)
        bases = [os.path.dirname(os.path.abspath(manifest.path))]
        bases += [os.path.abspath(s) for s in sources] + [os.path.dirname(os.path.abspath(s)) for s in sources]
        for row in manifest.rows:
            if row.path:
                for place in {os.path.normpath(os.path.join(base, row.path)) for base in bases}:
                    by_path[place].append(row)
            for word in (("volume", row.volume), ("uid", row.uid), ("accession", row.accession), ("bids", row.bids)):
                if word[1]:
                    by_word[word].append(row)
        for image in images:
            place, parent = image.place, os.path.dirname(image.place)
            while place not in by_path and place != parent:
                place, parent = parent, os.path.dirname(parent)
            rows = by_path.get(place, [])
            for word in (
                ("volume", headers.volumes.stem(image.place)),
                ("uid", image.header.study),
                ("accession", image.header.accession),
                ("bids", image.bids),
                ("bids", image.bids.partition("/")[0]),
            ):
                rows = rows or by_word.get(word, [])
            image.rows = image.rows + rows


def _group(
    images: list[_Image], salt: str, show: Shower, expect_rows: bool, projections: bool
) -> tuple[list[RawStudy], list[Reject]]:
    """Images -> studies with keys, joined with their rows."""
    groups: dict[tuple[str, ...], list[_Image]] = defaultdict(list)
    for image in images:
        groups[image.itself() if projections else image.study()].append(image)
    hits: dict[int, set[tuple[str, ...]]] = defaultdict(set)
    for identity, members in groups.items():
        for image in members:
            for row in image.rows:
                hits[id(row)].add(identity)
    rejects, studies, ambiguous = [], [], {}
    for identity, members in groups.items():
        if projections:
            members = sorted(members, key=lambda m: m.ref.shown)
            same = f"the same SOPInstanceUID as {show(members[0].ref.shown)}"
            rejects += [Reject(show(m.ref.shown), "duplicate-image", same) for m in members[1:]]
            members = members[:1]
        key = salted_hash(salt, "study", *identity)
        rows = list({id(row): row for i in members for row in i.rows}.values())
        for row in rows:
            whole_participant = row.bids and "/" not in row.bids and not (row.path or row.uid or row.accession)
            whole_study = projections and not row.volume
            if len(hits[id(row)]) > 1 and not (whole_participant or whole_study):
                ambiguous[id(row)] = row
        for image in members:
            image.rows = [row for row in image.rows if id(row) not in ambiguous]
        study = RawStudy(key, key, _series(members, salt, show))
        patient = next((i.words["patient"] for i in members if i.words.get("patient")), "")
        patient = patient or next((i.header.patient for i in members if i.header.patient), "")
        patient = patient or next((f"{i.root}/{i.bids.partition('/')[0]}" for i in members if i.bids), "")
        if projections:
            patient = patient or members[0].header.study
            study.region = members[0].header.region
        if patient:
            study.patient = salted_hash(salt, "patient", patient)
        for row in rows:
            if id(row) not in ambiguous:
                _join(study, row, salt)
        if not rows and expect_rows:
            rejects.append(Reject(key, "study-without-row", "no manifest row; kept without report and labels", "study"))
        studies.append(study)
    for row in ambiguous.values():
        said = f"matches {len(hits[id(row)])} studies; joined to none"
        rejects.append(Reject(_line(row, show), "ambiguous-row", said, "manifest"))
    return sorted(studies, key=lambda s: s.key), rejects


def _join(study: RawStudy, row: Row, salt: str) -> None:
    where = f"manifest {row.manifest}, line {row.line}, column"
    for name, found in row.labels.items():
        if study.labels.setdefault(name, found) != found:
            raise UserError(
                f"{where} 'label:{name}': {found:g} contradicts the {study.labels[name]:g} of another row of the same "
                "study; keep one"
            )
    if row.split and study.split and row.split != study.split:
        raise UserError(
            f"{where} 'split': {row.split!r} contradicts the {study.split!r} of another row of the same study; keep one"
        )
    study.split = row.split or study.split
    study.sentences += [s for s in row.sentences if s not in study.sentences]
    if row.patient:
        study.patient = salted_hash(salt, "patient", row.patient)


def _corrections(image: _Image) -> dict[str, tuple]:
    """What the rows of a volume say about its values and spacing."""
    found: dict[str, tuple] = {}
    for row in image.rows if image.header.kind != "dicom" else ():
        for name, numbers in row.volumes.items():
            if found.setdefault(name, numbers) != numbers:
                raise UserError(
                    f"manifest {row.manifest}, line {row.line}: {name} {numbers} contradicts the {found[name]} of "
                    "another row of the same volume; keep one"
                )
    return found


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
            **_corrections(found[0]),
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
            name = cells[at].strip() if len(cells) > at else ""
            if name and name not in present[root]:
                detail = f"no image of {show.patient(name)}"
                rejects.append(Reject(show(ref.shown), "no-images", detail, "participant"))
    return rejects
