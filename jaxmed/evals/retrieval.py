"""Retrieval between studies and reports, both ways (spec: HLIP, section 6, "Validation")."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import gammaln

from jaxmed.core.files import write_file
from jaxmed.evals import features, scores

AT = (1, 5, 10)


class Evaluator:
    """R@1, R@5, R@10, mean and median rank of the right report for a study, and of the right study for a report.

    Studies with the same report are one target: each distinct report is one candidate (and one query), and any of its
    studies is right.

    Args:
      predict_fns: needs "embed_image" and "embed_text".
      mesh: of the trainer.
      outdir: gets `step-XXXXXXXX.json` with a few queries and what they found; None writes nothing.
      input: of the split (see `data.pipeline.make`).
      token: which image token is compared, where there are several.
      examples: queries to keep for the report.
    """

    def __init__(
        self,
        predict_fns,
        *,
        mesh,
        outdir: str | os.PathLike | None = None,
        input: Mapping[str, Any],
        token: int = -1,
        examples: int = 5,
    ):
        self._predict, self._mesh, self._token, self._examples = predict_fns, mesh, token, examples
        self._outdir = Path(outdir) if features.writes(outdir) else None
        self._input = input
        self._stream = features.open_stream(input, mesh, ("image", "text"))

    def run(self, train_state):
        """Yields image_to_text_* and text_to_image_*: mean_rank, median_rank, R@k; the R@k of chance, and R@5 over
        chance; and how many studies and distinct reports there are."""
        got = features.embed_studies(self._predict, self._stream, self._mesh, train_state, self._token, ("text",))
        reports, first, of_study, counts = np.unique(
            got["text"], axis=0, return_index=True, return_inverse=True, return_counts=True
        )
        of_study = of_study.reshape(-1)
        text = features.embed_ids(self._predict, self._mesh, train_state, reports)
        yield from measure(scores.image_text_ranks(got["image"], text[of_study], texts=of_study), counts).items()
        if self._outdir is not None and self._examples:
            self._write(int(train_state["step"]), got, text, of_study, first)

    def _write(self, step: int, got, text, of_study, first) -> None:
        dataset = features.open_dataset(self._input)
        similarity = scores.l2_normalize(got["image"]) @ scores.l2_normalize(text).T
        report_of = [" ".join(dataset.record(int(got["_id"][i])).sentences) for i in first]
        queries = []
        for i in np.linspace(0, len(of_study) - 1, min(self._examples, len(of_study))).astype(int):
            order = np.argsort(-similarity[i], kind="stable")
            queries.append(
                {
                    "study": str(dataset.index["key"][got["_id"][i]]),
                    "report": report_of[of_study[i]],
                    "rank": int(np.flatnonzero(order == of_study[i])[0]) + 1,
                    "found": [{"report": report_of[j], "cosine": float(similarity[i, j])} for j in order[:5]],
                }
            )
        self._outdir.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"step": step, "reports": len(report_of), "queries": queries}, indent=1)
        write_file(self._outdir / f"step-{step:08d}.json", (text + "\n").encode())


def measure(ranks: Mapping[str, np.ndarray], counts: np.ndarray) -> dict[str, float]:
    """What `Evaluator.run` yields.

    Args:
      ranks: of `scores.image_text_ranks`.
      counts: (reports,) studies that have each report.
    """
    n, m = int(counts.sum()), len(counts)
    chances = {
        "image_to_text": {k: min(k / m, 1.0) for k in AT},
        "text_to_image": {k: chance_of_any(n, counts, k) for k in AT},
    }
    values = {}
    for way, chance in chances.items():
        values |= {f"{way}_{k}": v for k, v in scores.retrieval_metrics(ranks[way], AT).items()}
        values |= {f"{way}_R@{k}_chance": chance[k] for k in AT}
        values[f"{way}_R@5_over_chance"] = values[f"{way}_R@5"] / chance[5]
    return values | {"studies": float(n), "reports": float(m)}


def chance_of_any(n: int, right: np.ndarray, k: int) -> float:
    """The mean probability that k of n candidates drawn at random hold one of the `right` (queries,) ones."""
    right = np.asarray(right, np.float64)
    rest = n - right
    possible = rest >= k
    log = np.full(len(right), -np.inf)
    r = rest[possible]
    log[possible] = gammaln(r + 1) - gammaln(r - k + 1) - gammaln(n + 1) + gammaln(n - k + 1)
    return float((1 - np.exp(log)).mean())
