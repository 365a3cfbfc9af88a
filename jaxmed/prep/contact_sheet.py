"""Some radiographs of a data set on one sheet, as training will see them; suspects first, framed in red."""

import io
import json
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from jaxmed.core.files import write_file
from jaxmed.data import intensity, shards
from jaxmed.data.record import Study
from jaxmed.prep import report, sanity

COLUMNS, ROWS = 8, 6
_SIDE, _TEXT, _GAP = 176, 26, 6  # pixels of a picture, of what is written below it, between them
_RED, _BOX, _GREY = (220, 40, 40), (70, 150, 255), (96, 100, 108)


def write(out: Path) -> Path:
    """Makes `out/contact_sheet.png` from the data set and the report in `out`.

    At most half of the sheet are suspects, each kind in turn; the others are taken evenly from all records. The box of
    a collimated field is drawn in blue. The pictures are those of the shards: text in their pixels is on the sheet too.
    """
    said = json.loads((out / report.NAME).read_text())
    suspects = {k: v["studies"] for k, v in said["sanity"]["suspects"].items()}
    dataset = shards.open_dataset(out)
    try:
        records = {str(key): i for i, key in enumerate(dataset.index["key"])}
        why: dict[int, list[str]] = {}
        for kind, studies in suspects.items():
            for key in studies:
                why.setdefault(records[key], []).append(kind)
        chosen: list[int] = []
        for turn in range(max((len(v) for v in suspects.values()), default=0)):
            found = [records[v[turn]] for v in suspects.values() if turn < len(v)]
            chosen += [i for i in dict.fromkeys(found) if i not in chosen]
        chosen = chosen[: COLUMNS * ROWS // 2]
        others = [i for i in range(len(dataset)) if i not in why]
        free = min(COLUMNS * ROWS - len(chosen), len(others))
        chosen += [others[i] for i in np.linspace(0, len(others) - 1, free).astype(int)]
        tiles = [_tile(dataset.record(i).study(), why.get(i, [])) for i in chosen]
    finally:
        dataset.close()
    columns = min(COLUMNS, len(tiles))
    rows = -(-len(tiles) // columns)
    h, w = _SIDE + _TEXT + _GAP, _SIDE + _GAP
    sheet = Image.new("RGB", (columns * w + _GAP, rows * h + _GAP), "white")
    for n, tile in enumerate(tiles):
        sheet.paste(tile, (_GAP + n % columns * w, _GAP + n // columns * h))
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG")
    write_file(out / sanity.SHEET, buffer.getvalue())
    return out / sanity.SHEET


def _tile(study: Study, why: list[str]) -> Image.Image:
    tile = Image.new("RGB", (_SIDE, _SIDE + _TEXT), "white")
    tile.paste(_GREY, (0, 0, _SIDE, _SIDE))
    scan = study["scans"][0]
    grey, step = intensity.thumbnail(scan["voxels"][0], scan["meta"], _SIDE - 4)
    at = (_SIDE - grey.shape[1]) // 2, (_SIDE - grey.shape[0]) // 2
    tile.paste(Image.fromarray(grey).convert("RGB"), at)
    draw = ImageDraw.Draw(tile)
    if box := scan["meta"].get("box"):
        top, left, bottom, right = (round(v / step) for v in box)
        draw.rectangle((at[0] + left, at[1] + top, at[0] + right - 1, at[1] + bottom - 1), outline=_BOX)
    if why:
        draw.rectangle((0, 0, _SIDE - 1, _SIDE - 1), outline=_RED, width=2)
    about = [str(scan["meta"].get(k, "")) for k in ("region", "view", "laterality")]
    size = "x".join(str(n) for n in scan["voxels"].shape[1:])
    draw.text((2, _SIDE), " ".join(w for w in (*about, size) if w), fill="black")
    draw.text((2, _SIDE + 12), ", ".join(why), fill=_RED)
    return tile
