"""Where numbers go: one JSON object per line in `metrics.jsonl`, and TensorBoard if asked."""

import json
import math
from pathlib import Path

from jaxmed.core.errors import UserError
from jaxmed.core.files import cannot_write, write_file


class Writer:
    """Appends measurements; only process 0 writes.

    Args:
      workdir: the folder of `metrics.jsonl`.
      start_step: lines of later steps, from a run that was killed after its last checkpoint, are dropped.
      tensorboard: also write event files to `workdir/tensorboard` (needs the extra `tb`).
      active: False on all processes but one.
    """

    def __init__(self, workdir: Path, *, start_step: int = 0, tensorboard: bool = False, active: bool = True):
        self._file = None
        self._board = None
        if not active:
            return
        path = workdir / "metrics.jsonl"
        kept = [line for line in read(workdir) if line["step"] <= start_step] if start_step else []
        write_file(path, "".join(json.dumps(line) + "\n" for line in kept).encode())
        self._file = path.open("a")
        if tensorboard:
            try:
                from tensorboardX import SummaryWriter
            except ImportError:
                raise UserError("config.log.tensorboard needs tensorboardX: pip install 'jaxmed[tb]'") from None
            self._board = SummaryWriter(str(workdir / "tensorboard"), purge_step=start_step + 1)

    def write(self, step: int, values: dict[str, float]) -> None:
        """One line. Values that are not finite become null (JSON has no NaN)."""
        if self._file is None:
            return
        values = {k: float(v) for k, v in values.items()}
        clean = {k: v if math.isfinite(v) else None for k, v in values.items()}
        try:
            self._file.write(json.dumps({"step": step, **clean}) + "\n")
            self._file.flush()
        except OSError as e:
            raise cannot_write(Path(self._file.name), e) from e
        if self._board is not None:
            for k, v in values.items():
                self._board.add_scalar(k, v, step)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        if self._board is not None:
            self._board.close()


def read(workdir: Path) -> list[dict]:
    """The lines of `metrics.jsonl`; a last line that was cut off by a kill is left out."""
    path = workdir / "metrics.jsonl"
    lines = []
    for text in path.read_text().splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            break
    return lines


def write_json(path: Path, values) -> None:
    """Atomically: readers see the old file or the whole new one."""
    write_file(path, (json.dumps(values, indent=1, sort_keys=True, default=str) + "\n").encode())


def table(rows: list[tuple[str, ...]]) -> str:
    """Rows as aligned columns, the first one left-aligned."""
    widths = [max(len(str(row[i])) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [str(c).ljust(w) if i == 0 else str(c).rjust(w) for i, (c, w) in enumerate(zip(row, widths))]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
