"""Prompts of zero-shot classification, from a JSON file, a named suite or the evaluator of the run."""

import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxmed.core.errors import UserError
from jaxmed.data.tokenize import Tokenizer
from jaxmed.evals.prompts import Prompts, make

EXAMPLE = '{"edema": "pulmonary edema", "normal": "no finding"}'
FORM = """\
{"edema": "pulmonary edema", "normal": ["no finding", "normal study"]} (each after the prefix of the training reports,
if that is known), or with more fields:
{"classes": {...}, "templates": ["This study shows: {}."], "negatives": {"edema": "no edema"},
 "score": "softmax" (classes exclude each other) | "pair" (each against its negative) | "cosine"}"""


def find(given: str | None, suite: str | None, own: Mapping[str, Any] | None, prefix: str = "") -> Prompts:
    """The prompts that `--prompts` or `--suite` names, or those that the run was evaluated with.

    Args:
      prefix: of the reports in training; begins the texts where the file has no templates.

    Raises:
      UserError: there are none, or they cannot be used.
    """
    if suite is not None:
        if given is not None:
            raise UserError("give either --prompts or --suite, not both")
        return make({"suite": suite}, f"--suite={suite}")
    if given is None:
        if own is None:
            raise UserError(
                "--prompts is missing: zero-shot needs a JSON file of classes and prompts, e.g. "
                f"{EXAMPLE}, or --suite=NAME (python -m jaxmed.evaluate suites)"
            )
        return make(own, "the run's config.evals")
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
    return make({"templates": prefix + "{}", **fields}, f"--prompts={given}")


def doubts(path: str, text: Mapping[str, Any], vocab: str | None) -> list[str]:
    """A sentence if nobody said which words the text tower of ported weights knows. Another vocabulary of the same size
    gives no error, only nonsense."""
    if vocab or text.get("vocab") or not (Path(path) / "model.json").exists():
        return []
    return [
        "prompts were read with bert-base-uncased's vocabulary, for want of a better: published HLIP weights know "
        "BiomedBERT's words (chest CT: CXR-BERT's), as many but others; give --vocab=FILE, here or to jaxmed.port"
    ]


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
