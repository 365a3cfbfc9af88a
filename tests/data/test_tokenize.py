import json

import numpy as np
import pytest
import tokenizers

from jaxmed.core.errors import UserError
from jaxmed.data import tokenize
from jaxmed.data.tokenize import Tokenizer


@pytest.fixture(scope="module")
def bert():
    return Tokenizer()


def test_packaged_vocabulary_is_bert_base_uncased(bert):
    # Ids of google's bert-base-uncased, known from its vocabulary.
    assert bert.size == 30522
    assert bert.ids("Hello, world!") == [101, 7592, 1010, 2088, 999, 102]
    assert bert.ids("HELLO, wörld!") == bert.ids("hello, world!"), "lower case, accents stripped"
    assert bert.ids("") == [101, 102]
    assert bert.ids("hydrocephalus") == [101, *[i for i in bert.ids("hydrocephalus")[1:-1]], 102]
    assert len(bert.ids("hydrocephalus")) > 3, "a rare word is several pieces"


@pytest.mark.parametrize(
    "text, cleaned",
    [
        ("  two \n\t words ", "two words"),
        ("a &amp; b", "a & b"),
        ("a &amp;lt; b", "a < b"),
        ("a\u00a0b", "a b"),
        ("", ""),
    ],
)
def test_clean(text, cleaned):
    assert tokenize.clean(text) == cleaned


def test_encode_pads_with_zero(bert):
    out = bert.encode(["hello world", ""], 6)
    assert out.dtype == np.int32
    np.testing.assert_array_equal(out, [[101, 7592, 2088, 102, 0, 0], [101, 102, 0, 0, 0, 0]])


def test_overflow(bert):
    text = "hello " * 10
    np.testing.assert_array_equal(bert.encode([text], 12)[0], [101] + [7592] * 10 + [102])
    np.testing.assert_array_equal(bert.encode([text], 5, overflow="truncate"), [[101, 7592, 7592, 7592, 102]])
    message = r"report of study k7 has 12 tokens, input.context is 11: set input.context=12 or more .*'truncate'"
    with pytest.raises(UserError, match=message):
        bert.encode(["fine", text], 11, keys=["k6", "k7"])
    with pytest.raises(UserError, match=r"text 'hello hello .* has 12 tokens"):
        bert.encode([text], 11)
    with pytest.raises(UserError, match=r"input.overflow='drop' is not known; use one of error, truncate"):
        bert.encode([text], 11, overflow="drop")


def test_own_vocabulary_and_tokenizer_json_agree(tmp_path):
    reports = [f"There is a lesion of {i} mm in the left frontal lobe." for i in range(50)] + ["Kein Ödem."]
    vocab = tokenize.train_wordpiece(reports, 120, tmp_path / "vocab.txt")
    pieces = vocab.read_text().split("\n")
    assert pieces[:5] == list(tokenize.SPECIAL) and pieces[-1] == "" and len(pieces) <= 121
    own = Tokenizer(vocab)
    assert own.size == len(pieces) - 1
    assert 1 not in own.ids("there is a lesion of 17 mm"), "letters of the corpus are never unknown"
    assert 1 in own.ids("µ"), "others are"
    assert own.digest != Tokenizer(vocab, lowercase=False).digest
    own._tokenizer.save(str(tmp_path / "tokenizer.json"))
    again = Tokenizer(tmp_path)  # a folder: tokenizer.json comes first
    assert again.path.name == "tokenizer.json"
    assert all(again.ids(r) == own.ids(r) for r in reports)
    assert tokenize.train_wordpiece(iter(reports), 120, tmp_path / "b.txt").read_bytes() == vocab.read_bytes()


def test_training_merges_frequent_words(tmp_path):
    vocab = tokenize.train_wordpiece(["edema edema edema lesion"] * 9, 60, tmp_path / "v.txt")
    assert len(Tokenizer(vocab).ids("edema")) == 3


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("missing.txt", None, "missing.txt cannot be read .*prep vocab"),
        ("bytes.txt", b"\xff\xfe\x00", "bytes.txt cannot be read"),
        ("words.txt", b"a\nb\n", r"words.txt lacks the special tokens \[PAD\], \[UNK\], \[CLS\], \[SEP\]"),
        ("late.txt", b"[UNK]\n[PAD]\n[CLS]\n[SEP]\n", r"late.txt: \[PAD\] has id 1; it must be 0"),
        ("broken.json", b"{}", "broken.json is not a tokenizer.json"),
        ("gpt.json", None, r"gpt.json: \[PAD\] has id None"),
    ],
)
def test_bad_vocabularies(tmp_path, name, content, message):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    elif name == "gpt.json":
        tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0}, [])).save(str(path))
        assert json.loads(path.read_text())["model"]["type"] == "BPE"
    with pytest.raises(UserError, match=message):
        Tokenizer(path)


def test_training_refuses_what_cannot_work(tmp_path):
    with pytest.raises(UserError, match="no text to train a vocabulary on"):
        tokenize.train_wordpiece([" ", ""], 100, tmp_path / "v.txt")
    with pytest.raises(
        UserError, match=r"a vocabulary of 10 pieces cannot hold the 3 different characters.*at least 11"
    ):
        tokenize.train_wordpiece(["abc"], 10, tmp_path / "v.txt")
    assert not (tmp_path / "v.txt").exists()
