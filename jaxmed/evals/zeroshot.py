"""Zero-shot classification: studies against prompts, as HLIP is evaluated (spec: HLIP, section 6)."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxmed.core.errors import UserError
from jaxmed.core.files import write_arrays
from jaxmed.data.tokenize import Tokenizer
from jaxmed.evals import examples, features, intervals, prompts, scores


class Evaluator:
    """Scores every study of a split against every class's prompts; AUC per class and macro, with an interval.

    Args:
      predict_fns: needs "embed_image" and "embed_text".
      mesh: of the trainer.
      outdir: gets `step-XXXXXXXX.npz` (ids, labels, scores) and `examples.npz`; None writes nothing.
      input: of the split (see `data.pipeline.make`).
      suite: a name of `suites.SUITES`, instead of the next four.
      classes: {label name in the dataset: prompt or prompts}.
      templates: each prompt is put in each ("{}" is its place); features of one class are averaged, normalised.
      negatives: for score "pair": {label: prompt or prompts} of the absence of each class.
      score: "softmax" over the classes (they exclude each other), "cosine", or "pair": softmax over the class and its
        negative (findings that may occur together).
      token: which image token is compared, where there are several (0: sentences, -1: reports) [that of the suite,
        else -1].
      vocab, lowercase, context: tokens of the prompts; as in training.
      average: the classes that the macro AUC is the mean over [all].
      bootstrap: resamplings of the patients for the 95 % interval of the macro AUC.
      examples: studies to keep for the report, equally many of every class.

    Raises:
      UserError: a class that the dataset does not have, or options that do not go together.
    """

    def __init__(
        self,
        predict_fns,
        *,
        mesh,
        outdir: str | os.PathLike | None = None,
        input: Mapping[str, Any],
        suite: str | None = None,
        classes: Mapping[str, str | Sequence[str]] | None = None,
        templates: Sequence[str] | None = None,
        negatives: Mapping[str, str | Sequence[str]] | None = None,
        score: str | None = None,
        token: int | None = None,
        vocab: str | None = None,
        lowercase: bool = True,
        context: int = 64,
        average: Sequence[str] | None = None,
        bootstrap: int = 1000,
        examples: int = 10,
    ):
        fields = dict(suite=suite, classes=classes, templates=templates, negatives=negatives, score=score, token=token)
        self._prompts = prompts.make(fields, "evals")
        self._token = -1 if self._prompts.token is None else self._prompts.token
        self._predict, self._mesh = predict_fns, mesh
        self._outdir = Path(outdir) if features.writes(outdir) else None
        self._names = list(self._prompts.labels)
        average = self._names if average is None else list(average)
        if bad := [c for c in average if c not in self._names]:
            raise UserError(f"evals.average: {bad[0]!r} is not one of the classes {', '.join(self._names)}")
        self._average = [self._names.index(c) for c in average]
        self._input = {**input, "classes": self._names}
        self._stream = features.open_stream(self._input, mesh, ("image", "label"))
        self._dataset = features.open_dataset(self._input)
        self._tokenizer, self._context = Tokenizer(vocab, lowercase=lowercase), context
        self._bootstrap, self._examples = bootstrap, examples

    def run(self, train_state):
        """Yields auc_macro, its interval auc_macro_low and auc_macro_high, auc/<class>, and the number of studies."""
        classifier = self._prompts.classifier(
            lambda ids: features.embed_ids(self._predict, self._mesh, train_state, ids), self._tokenizer, self._context
        )
        got = features.embed_studies(self._predict, self._stream, self._mesh, train_state, self._token, ("label",))
        logits = scores.zero_shot_logits(got["image"], classifier, got["scale"])
        labels, values = got["label"], self._prompts.merged(self._prompts.values(logits, got["scale"]))

        averaged = labels[:, self._average], values[:, self._average]
        patients = self._dataset.index["patient"][got["_id"]]
        found = intervals.bootstrap(lambda w: {"auc": scores.macro_auc(*averaged, w)}, patients, self._bootstrap)
        for key, value in zip(("auc_macro", "auc_macro_low", "auc_macro_high"), found["auc"]):
            yield key, float(value)
        for j, name in enumerate(self._names):
            yield f"auc/{name}", scores.auc(labels[:, j], values[:, j])
        yield "studies", float(len(labels))
        if self._outdir is not None:
            self._write(int(train_state["step"]), got["_id"], labels, values)

    def _write(self, step: int, ids, labels, values) -> None:
        self._outdir.mkdir(parents=True, exist_ok=True)
        columns = {"ids": ids, "labels": labels, "scores": values, "classes": np.array(self._names)}
        write_arrays(self._outdir / f"step-{step:08d}.npz", columns)
        if self._examples and not (self._outdir / examples.NAME).exists():
            chosen = []
            for j in range(len(self._names)):
                chosen += ids[labels[:, j] > 0.5][: max(self._examples // len(self._names), 1)].tolist()
            examples.save(self._outdir, self._dataset, list(dict.fromkeys(chosen)))
