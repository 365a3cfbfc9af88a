"""Prompts of zero-shot classification: what is asked of every study, and what scores the answers become."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from jaxmed.core.errors import UserError
from jaxmed.data.tokenize import Tokenizer
from jaxmed.evals import scores, suites

SCORES = ("softmax", "cosine", "pair")
FIELDS = ("suite", "classes", "templates", "negatives", "score", "token")


@dataclasses.dataclass(frozen=True)
class Prompts:
    """What is asked of every study; `texts` are class-major, the negatives (score "pair") after the classes."""

    names: tuple[str, ...]
    texts: tuple[tuple[str, ...], ...]
    score: str
    token: int | None  # of the image features; None: the loss decides
    # Findings that a test set does not tell apart: (label, the two classes whose scores become one).
    merge: tuple[tuple[str, tuple[str, str]], ...] = ()

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of the columns of `merged`: those of the classes, with merged ones last."""
        gone = {name for _, pair in self.merge for name in pair}
        return (*(n for n in self.names if n not in gone), *(label for label, _ in self.merge))

    def classifier(self, embed: Callable[[Int[np.ndarray, "n t"]], np.ndarray], tokenizer: Tokenizer, context: int):
        """(z, classes) float32, negatives after the classes.

        Args:
          embed: ids (n, t) -> features (n, z).
          context: largest number of tokens that the text tower takes.

        Raises:
          UserError: a prompt is longer than that.
        """
        flat = [text for texts in self.texts for text in texts]
        longest = max(len(tokenizer.ids(text)) for text in flat)
        # Padding is masked, so the shortest context gives the same features.
        features = embed(tokenizer.encode(flat, min(context, -(-longest // 8) * 8)))
        parts = np.split(features, np.cumsum([len(texts) for texts in self.texts])[:-1])
        return np.concatenate([scores.classifier_from_prompts(x, 1) for x in parts], axis=1)

    def values(self, logits: Float[np.ndarray, "n k"], scale: float) -> Float[np.ndarray, "n classes"]:
        """Probabilities (or cosines, for score "cosine") from scaled cosines."""
        k = len(self.names)
        if self.score == "cosine":
            return logits / scale
        if self.score == "softmax":
            return scores.softmax(logits)
        return np.stack([scores.pair_probability(logits, k + j, j) for j in range(k)], axis=1)

    def merged(self, values: Float[np.ndarray, "n classes"]) -> Float[np.ndarray, "n labels"]:
        """`values` by label (see `labels` and `scores.merge_max_if_any`)."""
        column = dict(zip(self.names, values.T))
        column |= {label: scores.merge_max_if_any(column[a], column[b]) for label, (a, b) in self.merge}
        return np.stack([column[label] for label in self.labels], axis=1)


def make(fields: Mapping[str, Any], where: str) -> Prompts:
    """Prompts from a table of `FIELDS`: a `suite` (see `suites.SUITES`), or `classes` and what goes with them.

    Args:
      fields: others are ignored.
      where: names the table in errors.

    Raises:
      UserError: the fields do not go together.
    """
    merge = ()
    if (suite := fields.get("suite")) is not None:
        if also := [k for k in FIELDS if k not in ("suite", "token") and fields.get(k) is not None]:
            raise UserError(f"{where}: {also[0]} does not go with a suite, which has its own")
        known = suites.get(suite)
        merge = known.merge
        fields = {**known.prompts(), **{k: v for k, v in fields.items() if k == "token" and v is not None}}
    classes, negatives = fields.get("classes"), fields.get("negatives")
    if not classes:
        raise UserError(f"{where}: neither classes with prompts nor a suite ({', '.join(suites.SUITES)})")
    score = fields.get("score") or ("pair" if negatives else "softmax")
    templates = _texts(fields.get("templates") or "{}", where)
    if score not in SCORES:
        raise UserError(f"{where}: score {score!r} is not one of {', '.join(SCORES)}")
    if (score == "pair") != bool(negatives) or (negatives and set(negatives) != set(classes)):
        raise UserError(f"{where}: score 'pair' needs a negative for every class, other scores take no negatives")
    if bad := [t for t in templates if "{}" not in t]:
        raise UserError(f"{where}: template {bad[0]!r} has no {{}} where the prompt goes")
    if score == "softmax" and len(classes) < 2:
        raise UserError(f"{where}: one class alone has probability 1; add its negative or another class")
    listed = [classes[n] for n in classes] + ([negatives[n] for n in classes] if negatives else [])
    texts = tuple(tuple(t.replace("{}", p) for p in _texts(x, where) for t in templates) for x in listed)
    return Prompts(tuple(classes), texts, score, fields.get("token"), merge)


def only(prompts: Prompts, names: Sequence[str], where: str) -> Prompts:
    """The prompts of some labels, in this order.

    Raises:
      UserError: one of them is not asked about.
    """
    if unknown := [n for n in names if n not in prompts.labels]:
        raise UserError(f"{where}: there is no class {unknown[0]!r}; choose of {', '.join(prompts.labels)}")
    merge = tuple((label, pair) for label, pair in prompts.merge if label in names)
    kept = [n for n in names if n in prompts.names] + [n for _, pair in merge for n in pair]
    k = len(prompts.names)
    rows = [prompts.names.index(n) for n in kept]
    if prompts.score == "pair":
        rows += [k + i for i in rows]
    elif prompts.score == "softmax" and len(kept) < 2:
        raise UserError(f"{where}: one class alone has probability 1; choose at least two")
    return dataclasses.replace(prompts, names=tuple(kept), texts=tuple(prompts.texts[i] for i in rows), merge=merge)


def _texts(given: str | Sequence[str], where: str) -> list[str]:
    texts = [given] if isinstance(given, str) else given
    if not isinstance(texts, list | tuple) or not texts or not all(isinstance(t, str) for t in texts):
        raise UserError(f"{where}: {given!r} is neither a text nor a list of texts")
    return list(texts)
