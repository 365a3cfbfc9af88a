"""Prompts of zero-shot classification, from a JSON file or from the evaluator of the run, and what they score."""

import dataclasses
import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from jaxmed.core.errors import UserError
from jaxmed.data.tokenize import Tokenizer
from jaxmed.evals import scores
from jaxmed.evals.zeroshot import SCORES

EXAMPLE = '{"edema": "pulmonary edema", "normal": "no finding"}'
FORM = """\
{"edema": "pulmonary edema", "normal": ["no finding", "normal study"]} (each after the prefix of the training reports,
if that is known), or with more fields:
{"classes": {...}, "templates": ["This study shows: {}."], "negatives": {"edema": "no edema"},
 "score": "softmax" (classes exclude each other) | "pair" (each against its negative) | "cosine"}"""


@dataclasses.dataclass(frozen=True)
class Prompts:
    """What is asked of every study; `texts` are class-major, the negatives (score "pair") after the classes."""

    names: tuple[str, ...]
    texts: tuple[tuple[str, ...], ...]
    score: str
    token: int | None  # of the image features; None: the loss decides

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


def find(given: str | None, own: Mapping[str, Any] | None, prefix: str = "") -> Prompts:
    """The prompts that `--prompts` names, or those that the run was evaluated with.

    Args:
      prefix: of the reports in training; begins the texts where the file has no templates.

    Raises:
      UserError: there are none, or they cannot be used.
    """
    if given is None:
        if own is None:
            raise UserError("--prompts is missing: zero-shot needs a JSON file of classes and prompts, e.g. " + EXAMPLE)
        return _parse(own, "the run's config.evals")
    path = Path(given)
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"--prompts={given}: there is no such file") from None
    except (OSError, ValueError) as e:
        raise UserError(f"--prompts={given}: is no JSON file ({' '.join(str(e).split())})") from None
    if not isinstance(content, dict) or not content:
        raise UserError(f"--prompts={given}: expected a table of classes, e.g. {EXAMPLE}")
    fields = content if isinstance(content.get("classes"), dict) else {"classes": content}
    return _parse({"templates": prefix + "{}", **fields}, f"--prompts={given}")


def _parse(fields: Mapping[str, Any], where: str) -> Prompts:
    classes, negatives = fields["classes"], fields.get("negatives")
    score = fields.get("score", "pair" if negatives else "softmax")
    templates = _texts(fields.get("templates") or "{}", where)
    if score not in SCORES:
        raise UserError(f"{where}: score {score!r} is not one of {', '.join(SCORES)}")
    if (score == "pair") != bool(negatives) or (negatives and set(negatives) != set(classes)):
        raise UserError(f"{where}: score 'pair' needs a negative for every class, other scores take none")
    if bad := [t for t in templates if "{}" not in t]:
        raise UserError(f"{where}: template {bad[0]!r} has no {{}} where the prompt goes")
    if score == "softmax" and len(classes) < 2:
        raise UserError(f"{where}: one class alone has probability 1; add its negative or another class")
    listed = [classes[n] for n in classes] + ([negatives[n] for n in classes] if negatives else [])
    texts = tuple(tuple(t.replace("{}", p) for p in _texts(x, where) for t in templates) for x in listed)
    return Prompts(tuple(classes), texts, score, fields.get("token"))


def _texts(given: str | Sequence[str], where: str) -> list[str]:
    texts = [given] if isinstance(given, str) else given
    if not isinstance(texts, list | tuple) or not texts or not all(isinstance(t, str) for t in texts):
        raise UserError(f"{where}: {given!r} is neither a text nor a list of texts")
    return list(texts)


def tokenizer(text: Mapping[str, Any], vocab: str | None, vocab_size: int) -> Tokenizer:
    """The tokenizer of the text tower.

    Args:
      text: `vocab` and `lowercase` of the training data, those that are known.
      vocab: the user's file instead.
      vocab_size: rows of the text tower's table of words.

    Raises:
      UserError: the file cannot be read, or does not fit the table.
    """
    keywords = inspect.signature(Tokenizer).parameters
    chosen = {k: v for k, v in text.items() if k in keywords} | ({"vocab": vocab} if vocab else {})
    made = Tokenizer(**chosen)
    if made.size > vocab_size or (vocab and made.size != vocab_size):
        raise UserError(
            f"vocabulary {made.path} has {made.size} entries, the text tower was trained with {vocab_size}: give the "
            "one that it was trained with by --vocab=FILE"
        )
    return made
