"""Zero-shot classification: studies against prompts, as HLIP is evaluated (spec: HLIP, section 6)."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxmed.core.errors import UserError
from jaxmed.core.rng import np_rng
from jaxmed.data.tokenize import Tokenizer
from jaxmed.evals import examples, features, scores

SCORES = ("softmax", "cosine", "pair")


class Evaluator:
    """Scores every study of a split against every class's prompts; AUC per class and macro, with an interval.

    Args:
      predict_fns: needs "embed_image" and "embed_text".
      mesh: of the trainer.
      outdir: gets `step-XXXXXXXX.npz` (ids, labels, scores) and `examples.npz`; None writes nothing.
      input: of the split (see `data.pipeline.make`).
      classes: {label name in the dataset: prompt or prompts}.
      templates: each prompt is put in each ("{}" is its place); features of one class are averaged, normalised.
      negatives: for score "pair": {label: prompt or prompts} of the absence of each class.
      score: "softmax" over the classes (they exclude each other), "cosine", or "pair": softmax over the class and its
        negative (findings that may occur together).
      token: which image token is compared, where there are several (0: sentences, -1: reports).
      vocab, lowercase, context: tokens of the prompts; as in training.
      average: the classes that the macro AUC is the mean over [all].
      bootstrap: resamplings of the studies for the 95 % interval of the macro AUC.
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
        classes: Mapping[str, str | Sequence[str]],
        templates: Sequence[str] = ("{}",),
        negatives: Mapping[str, str | Sequence[str]] | None = None,
        score: str = "softmax",
        token: int = -1,
        vocab: str | None = None,
        lowercase: bool = True,
        context: int = 64,
        average: Sequence[str] | None = None,
        bootstrap: int = 1000,
        examples: int = 10,
    ):
        if score not in SCORES:
            raise UserError(f"evals.score={score!r} is not one of {', '.join(SCORES)}")
        if (score == "pair") != (negatives is not None) or (negatives and set(negatives) != set(classes)):
            raise UserError("evals.negatives: score 'pair' needs a negative for every class, other scores take none")
        if bad := [t for t in templates if "{}" not in t]:
            raise UserError(f"evals.templates: {bad[0]!r} has no {{}} where the prompt goes")
        self._predict, self._mesh, self._score, self._token = predict_fns, mesh, score, token
        self._outdir = Path(outdir) if features.writes(outdir) else None
        self._names = list(classes)
        average = self._names if average is None else list(average)
        if bad := [c for c in average if c not in classes]:
            raise UserError(f"evals.average: {bad[0]!r} is not one of the classes {', '.join(classes)}")
        self._average = [self._names.index(c) for c in average]
        self._input = {**input, "classes": self._names}
        self._stream = features.open_stream(self._input, mesh, ("image", "label"))
        self._tokenizer, self._context = Tokenizer(vocab, lowercase=lowercase), context
        self._bootstrap, self._examples = bootstrap, examples
        self._prompts = [_fill(classes[k], templates) for k in self._names]
        self._prompts += [_fill(negatives[k], templates) for k in self._names] if negatives else []

    def run(self, train_state):
        """Yields auc_macro, its interval auc_macro_low and auc_macro_high, auc/<class>, and the number of studies."""
        flat = [text for prompts in self._prompts for text in prompts]
        text = features.embed_texts(self._predict, self._mesh, train_state, flat, self._tokenizer, self._context)
        ends = np.cumsum([len(prompts) for prompts in self._prompts])
        parts = np.split(text, ends[:-1])
        classifier = np.concatenate([scores.classifier_from_prompts(x, 1) for x in parts], axis=1)
        got = features.embed_studies(self._predict, self._stream, self._mesh, train_state, self._token, ("label",))
        logits = scores.zero_shot_logits(got["image"], classifier, got["scale"])
        labels, k = got["label"], len(self._names)
        if self._score == "softmax":
            values = scores.softmax(logits)
        elif self._score == "cosine":
            values = logits / got["scale"]
        else:
            values = np.stack([scores.pair_probability(logits, k + j, j) for j in range(k)], axis=1)

        averaged = labels[:, self._average], values[:, self._average]
        yield "auc_macro", scores.macro_auc(*averaged)
        low, high = interval(*averaged, self._bootstrap)
        yield "auc_macro_low", low
        yield "auc_macro_high", high
        for j, name in enumerate(self._names):
            yield f"auc/{name}", scores.auc(labels[:, j], values[:, j])
        yield "studies", float(len(labels))
        if self._outdir is not None:
            self._write(int(train_state["step"]), got["_id"], labels, values)

    def _write(self, step: int, ids, labels, values) -> None:
        self._outdir.mkdir(parents=True, exist_ok=True)
        columns = {"ids": ids, "labels": labels, "scores": values, "classes": np.array(self._names)}
        np.savez(self._outdir / f"step-{step:08d}.npz", **columns)
        if self._examples and not (self._outdir / examples.NAME).exists():
            chosen = []
            for j in range(len(self._names)):
                chosen += ids[labels[:, j] > 0.5][: max(self._examples // len(self._names), 1)].tolist()
            examples.save(self._outdir, features.open_dataset(self._input), list(dict.fromkeys(chosen)))


def _fill(prompts: str | Sequence[str], templates: Sequence[str]) -> list[str]:
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    return [template.replace("{}", prompt) for prompt in prompts for template in templates]


def interval(labels, values, times: int, seed: int = 0) -> tuple[float, float]:
    """The 2.5 and 97.5 percentiles of the macro AUC over resampled studies."""
    rng, n = np_rng(seed), len(labels)
    drawn = []
    for _ in range(times):
        rows = rng.integers(0, n, n)
        drawn.append(scores.macro_auc(labels[rows], values[rows]))
    drawn = [x for x in drawn if not np.isnan(x)]
    return tuple(float(x) for x in np.percentile(drawn, (2.5, 97.5))) if drawn else (float("nan"), float("nan"))
