"""tokenizer.py: text survives encoding, ids are where the contract says, files of three kinds load."""

import json
import random

import pytest
import torch

import tokenizer as tk
from cli import UserError

TEXTS = ["hello all the bookkeepers", "three free trees", "Ünïcode: naïve café", "привет мир", "今日は 元気", "a|b <unk> c"]


def make(kind):
    return tk.train_char(TEXTS) if kind == "char" else tk.train_bpe(TEXTS * 3, 90)


@pytest.mark.parametrize("kind", ["char", "bpe"])
def test_decoding_a_label_gives_its_text_back(kind):
    tokenizer = make(kind)
    rng = random.Random(0)
    letters = sorted(set("".join(TEXTS)))
    random_texts = [tk.normalize_text("".join(rng.choices(letters, k=20))) for _ in range(200)]
    for text in TEXTS + random_texts:
        ids = tokenizer.encode(text)
        assert all(4 <= i < tokenizer.vocab_size for i in ids)  # no special token, whatever the text spells
        assert tokenizer.decode(ids) == text
        assert tokenizer.decode([2, 0, *ids, 0, 3]) == text


@pytest.mark.parametrize("kind", ["char", "bpe"])
def test_special_ids_and_the_unknown(kind):
    tokenizer = make(kind)
    assert (tokenizer.blank_id, tokenizer.unk_id, tokenizer.sos_id, tokenizer.eos_id) == (0, 1, 2, 3)
    assert tokenizer.vocab_size == len(tokenizer.tokens) == len(set(tokenizer.tokens))
    assert 1 in tokenizer.encode("9")
    assert tokenizer.decode(tokenizer.encode("h9l")) == f"h{tk.UNKNOWN_MARK}l"


def test_text_is_nfc_and_white_space_is_one_space():
    tokenizer = tk.train_char(["cafe\u0301  au\nlait "])
    assert tokenizer.encode("cafe\u0301") == tokenizer.encode("caf\u00e9")
    assert "\u0301" not in tokenizer.tokens and "\n" not in tokenizer.tokens
    assert tokenizer.decode(tokenizer.encode(" cafe\u0301\tau lait")) == "caf\u00e9 au lait"


@pytest.mark.parametrize("kind", ["char", "bpe"])
def test_plain_data_and_files_bring_the_same_tokenizer_back(kind, tmp_path):
    tokenizer = make(kind)
    tk.save_tokenizer(tokenizer, tmp_path / "tokenizer.json")
    torch.save({"tokenizer": tokenizer.to_dict(), "other": 1}, tmp_path / "best.ckpt")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["best.ckpt", "tokenizer.json"]
    for path in tmp_path.iterdir():
        loaded = tk.load_tokenizer(path)
        assert loaded.to_dict() == tokenizer.to_dict()
        assert [loaded.encode(t) for t in TEXTS] == [tokenizer.encode(t) for t in TEXTS]


def test_bpe_makes_fewer_tokens_than_characters_and_the_same_ones_again():
    bpe = make("bpe")
    assert len(bpe.encode("three free trees")) < len("three free trees")
    assert bpe.vocab_size <= 90 and bpe.to_dict() == make("bpe").to_dict()


def test_wav2vec2_vocabulary_keeps_its_ids_and_takes_its_pad_token_as_blank(tmp_path):
    vocabulary = {"|": 0, "E": 1, "L": 2, "H": 3, "O": 4, "[UNK]": 5, "[PAD]": 6}
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary))
    tokenizer = tk.load_tokenizer(tmp_path / "vocab.json")
    assert (tokenizer.blank_id, tokenizer.unk_id, tokenizer.sos_id, tokenizer.eos_id) == (6, 5, 7, 8)
    assert tokenizer.vocab_size == 9
    assert tokenizer.encode("HELLO HO|") == [3, 1, 2, 2, 4, 0, 3, 4, 5]
    assert tokenizer.decode([6, 3, 1, 2, 2, 4, 0, 3, 4, 6]) == "HELLO HO"
    assert tk.Tokenizer.from_dict(tokenizer.to_dict()).encode("HO HO") == tokenizer.encode("HO HO")


def test_wav2vec2_vocabulary_with_sentence_tokens_does_not_grow():
    tokenizer = tk.from_vocab({"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3, "|": 4, "A": 5})
    assert (tokenizer.sos_id, tokenizer.eos_id, tokenizer.vocab_size) == (1, 2, 6)


@pytest.mark.parametrize("content", ["", "{", "[1]", "{}", '{"tokens": 3}', '{"a": 0, "b": 2}', '{"a": 0}',
                                     '{"en": {"a": 0}}'])
def test_a_bad_tokenizer_file_is_one_clear_error(content, tmp_path):
    path = tmp_path / "vocab.json"
    path.write_text(content)
    with pytest.raises(UserError, match="vocab.json"):
        tk.load_tokenizer(path)
    with pytest.raises(UserError, match="No such file"):
        tk.load_tokenizer(tmp_path / "absent.json")
    (tmp_path / "bad.ckpt").write_text(content)
    with pytest.raises(UserError, match="bad.ckpt"):
        tk.load_tokenizer(tmp_path / "bad.ckpt")


def test_too_small_a_bpe_vocabulary_and_empty_text_are_refused():
    with pytest.raises(UserError, match="--vocab_size"):
        tk.train_bpe(TEXTS, 10)
    with pytest.raises(UserError, match="no text"):
        tk.train_char(["", "  "])
