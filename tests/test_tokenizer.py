"""tokenizer.py: text survives encoding, ids are where the contract says, files of three kinds
load."""

import json
import random
import unicodedata

from cli import UserError

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from tokenizers.trainers import BpeTrainer

import tokenizer as tk

TEXTS = [
    "hello all the bookkeepers",
    "three free trees",
    "Ünïcode: naïve café",
    "привет мир",
    "今日は 元気",
    "a|b <unk> c",
]


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
        # No special token comes out, whatever the text spells.
        assert all(4 <= i < tokenizer.vocab_size for i in ids)
        assert tokenizer.decode(ids) == text
        assert tokenizer.decode([2, 0, *ids, 0, 3]) == text


@pytest.mark.parametrize("kind", ["char", "bpe"])
def test_special_ids_and_the_unknown(kind):
    tokenizer = make(kind)
    assert [tokenizer.blank_id, tokenizer.unk_id, tokenizer.sos_id, tokenizer.eos_id] == [
        0,
        1,
        2,
        3,
    ]
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
    assert (tokenizer.blank_id, tokenizer.unk_id, tokenizer.sos_id, tokenizer.eos_id) == (
        6,
        5,
        7,
        8,
    )
    assert tokenizer.vocab_size == 9
    assert tokenizer.encode("HELLO HO|") == [3, 1, 2, 2, 4, 0, 3, 4, 0]
    assert tokenizer.decode([6, 3, 1, 2, 2, 4, 0, 3, 4, 6]) == "HELLO HO"
    assert tk.Tokenizer.from_dict(tokenizer.to_dict()).encode("HO HO") == tokenizer.encode("HO HO")


def test_wav2vec2_vocabulary_with_sentence_tokens_does_not_grow():
    tokenizer = tk.from_vocab({"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3, "|": 4, "A": 5})
    assert (tokenizer.sos_id, tokenizer.eos_id, tokenizer.vocab_size) == (1, 2, 6)


@pytest.mark.parametrize(
    "content",
    ["", "{", "[1]", "{}", '{"tokens": 3}', '{"a": 0, "b": 2}', '{"a": 0}', '{"en": {"a": 0}}'],
)
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


@pytest.mark.parametrize("letter", ["a", "\u00e9", "\u4eca"])
@pytest.mark.parametrize("count", [255, 256, 511, 9999, 16384])
def test_bpe_makes_no_token_that_is_too_long(letter, count):
    """Byte pairs of one word of equal letters double in length; a token may have LONGEST_TOKEN."""
    text = letter * count
    tokenizer = tk.train_bpe([text, "hello"], 100)
    assert 128 < max(map(len, tokenizer.tokens)) <= tk.LONGEST_TOKEN
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(tokenizer.encode(text)) < count / 16


def test_the_limit_changes_nothing_for_words_of_usual_length(monkeypatch):
    rng = random.Random(0)
    words = ["".join(rng.choices("abc\u00e9", k=rng.randint(1, 40))) for _ in range(300)]
    texts = [*TEXTS * 3, *(" ".join(rng.choices(words, k=8)) for _ in range(300))]
    limited = tk.train_bpe(texts, 1000).to_dict()
    monkeypatch.setattr(tk, "BpeTrainer", lambda max_token_length, **rest: BpeTrainer(**rest))
    assert tk.train_bpe(texts, 1000).to_dict() == limited
    assert len(limited["tokens"]) == 1000


# Vocabularies of transformers


# Its n with a tilde is decomposed.
SPANISH = ["<pad>", "<unk>", "|", "a", "c", "ch", "h", "l", "ll", "o", "n", "\u0303", "u"]
LETTERS = "acehlo\u0303\u0301"
# Texts, and the ids that transformers 5.24 printed for them with the folder that `saved` writes.
PRINTED = [
    ("ocho llano", [9, 5, 9, 8, 3, 10, 9]),
    ("a ch o", [3, 5, 9]),
    ("hacha aza", [6, 3, 5, 3, 2, 3, 1, 3]),
    ("on\u0303o", [9, 10, 11, 9]),
    ("a|o", [3, 2, 9]),
    ("a <unk> o", [3, 1, 9]),
    ("lll lch", [8, 7, 2, 7, 5]),
    ("CH", [1, 1]),
    ("hun\u0303o", [6, 15, 11, 9]),
    ("a un a", [3, 2, 15, 2, 3]),
    ("aqo", [3, 16, 9]),
]


def saved(folder, config=None, **files):
    """Writes what Wav2Vec2CTCTokenizer.save_pretrained does, after add_tokens(["un", "q"])."""
    flags = {
        "lstrip": False,
        "rstrip": False,
        "single_word": False,
        "normalized": False,
        "special": False,
    }
    decoder = {
        str(i): {"content": token, **flags}
        for i, token in enumerate(["<s>", "</s>", "un", "q"], 13)
    }
    decoder["5"] = {"content": "ch", **flags, "lstrip": True, "rstrip": True}
    config = {
        "tokenizer_class": "Wav2Vec2CTCTokenizer",
        "pad_token": "<pad>",
        "unk_token": "<unk>",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "word_delimiter_token": "|",
        "replace_word_delimiter_char": " ",
        "do_lower_case": False,
        "target_lang": None,
        "added_tokens_decoder": decoder,
        **(config or {}),
    }
    files = {
        "vocab": {token: i for i, token in enumerate(SPANISH)},
        "tokenizer_config": config,
        "added_tokens": {token["content"]: int(i) for i, token in decoder.items() if int(i) > 12},
        **files,
    }
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def test_a_saved_folder_gives_the_ids_that_transformers_gave(tmp_path):
    tokenizer = tk.load_tokenizer(saved(tmp_path / "saved"))
    assert [(text, tokenizer.encode(text)) for text, _ in PRINTED] == PRINTED
    assert (
        tokenizer.blank_id,
        tokenizer.unk_id,
        tokenizer.sos_id,
        tokenizer.eos_id,
        tokenizer.vocab_size,
    ) == (0, 1, 13, 14, 17)
    tk.save_tokenizer(tokenizer, str(tmp_path / "tokenizer.json"))
    again = tk.load_tokenizer(tmp_path / "tokenizer.json")
    assert [again.encode(text) for text, _ in PRINTED] == [ids for _, ids in PRINTED]
    # vocab.json alone knows neither `un` nor `q`.
    bare = tk.load_tokenizer(tmp_path / "saved/vocab.json")
    assert [bare.encode(text) for text, _ in PRINTED[:-3]] == [ids for _, ids in PRINTED[:-3]]


# The parts are as transformers prints them. The last text shows the flaw of its Trie.
@pytest.mark.parametrize(
    "text, parts",
    [
        ("abcd", ["abcd"]),
        ("abcabc", ["a", "bc", "a", "bc"]),
        ("xabcdx", ["x", "abcd", "x"]),
        ("", []),
        ("aabcbc", ["aa", "bc", "bc"]),
        ("abcxd", ["abcxd"]),
    ],
)
def test_a_text_is_cut_where_transformers_cuts_it(text, parts):
    assert tk.Trie({"abcd", "bc"}).split(text) == parts


def test_no_text_becomes_a_blank_or_the_end_of_a_sentence(tmp_path):
    tokenizer = tk.load_tokenizer(saved(tmp_path / "saved"))
    for name in ("<pad>", "<s>", "</s>", "<unk>"):
        assert tokenizer.encode(f"o{name}o") == [9, 1, 9]
        assert tokenizer.unknown(f"o{name}o") == [name]


def of_letters(*letters):
    return tk.from_vocab({token: i for i, token in enumerate(["<pad>", "<unk>", *letters])})


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_a_vocabulary_in_any_form_spells_text_in_any_form(form):
    said = "ca\u00f1\u00f3n \u1ebfch \ud55c\uae00 \u0929\u0958 \u09df\u1e69\u0323"
    for letters in (
        unicodedata.normalize("NFC", said),
        unicodedata.normalize("NFD", said),
        "ca\u00f1no\u0301 \u00ea\u0301h",
    ):
        tokenizer = of_letters("|", *sorted(set(letters) - {" "}))
        text = said if len(letters) > 12 else said[:10]
        ids = tokenizer.encode(unicodedata.normalize(form, text))
        assert tokenizer.unk_id not in ids and tokenizer.decode(ids) == tk.normalize_text(text)
    not_nfc = of_letters("\u09df", "\u0958", "\u212b")
    assert not_nfc.encode(unicodedata.normalize(form, "\u09df\u0958\u212b")) == [2, 3, 4]
    ascii_only = of_letters("e")
    # A character that is unknown is one error, however it is composed.
    assert ascii_only.encode("\u00e9") == ascii_only.encode("e\u0301") == [1]


def test_lower_case_models_of_upper_case_vocabularies_read_and_write_lower_case(tmp_path):
    vocabulary = {
        token: i
        for i, token in enumerate(["<pad>", "<unk>", "|", "A", "\u03a3", "\u039f", "\u00c9"])
    }
    tokenizer = tk.load_tokenizer(
        saved(
            tmp_path / "saved",
            {"do_lower_case": True, "added_tokens_decoder": {}},
            vocab=vocabulary,
            added_tokens={"<s>": 7, "</s>": 8},
        )
    )
    assert tokenizer.encode("a \u03bf\u03c2 e\u0301") == [3, 2, 5, 4, 2, 6]
    # A sigma at a word's end has a form of its own.
    assert tokenizer.decode([3, 2, 5, 4, 2, 6]) == "a \u03bf\u03c2 \u00e9"


def test_the_language_of_a_nested_vocabulary_is_the_one_that_the_folder_names(tmp_path):
    nested = {"eng": {"<pad>": 0, "a": 1}, "spa": {token: i for i, token in enumerate(SPANISH)}}
    folder = saved(tmp_path / "saved", {"target_lang": "spa"}, vocab=nested)
    assert tk.load_tokenizer(folder).encode("ocho llano") == PRINTED[0][1]


@pytest.mark.parametrize(
    "config, files, complaint",
    [
        ({"tokenizer_class": "WhisperTokenizer"}, {}, "'WhisperTokenizer' is not supported"),
        (
            {"replace_word_delimiter_char": ""},
            {},
            "replace_word_delimiter_char '' is not supported",
        ),
        (
            {"word_delimiter_token": "<space>"},
            {},
            "word_delimiter_token '<space>' is not supported",
        ),
        ({"target_lang": "spa"}, {}, "target_lang 'spa' is none of vocab.json's"),
        ({"added_tokens_decoder": {}}, {"vocab": {"spa": {"a": 0}}}, "languages"),
        ({"pad_token": "<none>"}, {}, "no pad token (<none>)"),
        ({}, {"special_tokens_map": {"pad_token": "[PAD]"}}, "differ on pad_token: <pad> or [PAD]"),
        (
            {"added_tokens_decoder": {}},
            {"vocab": {"version": "1.0", "model": {"vocab": {"a": 0}}}},
            "save_pretrained",
        ),
        ({}, {"added_tokens": {"un": 16}}, "differ on the id of 'un': 16 or 15"),
        ({}, {"added_tokens": {"un": 4}}, "'un'"),
        (
            {"added_tokens_decoder": {"17": {"content": "x", "single_word": True}}},
            {},
            "single_word of the added token 'x'",
        ),
        (
            {"added_tokens_decoder": {"4": {"content": "x"}}},
            {},
            "the tokens 'c' and 'x' have the same id 4",
        ),
        ({"added_tokens_decoder": {"4": {}}}, {}, "save_pretrained"),
        ({}, {"added_tokens": [1]}, "is no JSON object"),
    ],
)
def test_a_folder_that_contradicts_itself_is_one_clear_error(config, files, complaint, tmp_path):
    folder = saved(tmp_path / "saved", config, **files)
    with pytest.raises(UserError) as raised:
        tk.load_tokenizer(folder)
    said = str(raised.value)
    assert str(folder) in said and complaint in said and "\n" not in said


def test_a_folder_without_a_tokenizer_is_one_clear_error(tmp_path):
    with pytest.raises(UserError, match="neither tokenizer.json nor vocab.json"):
        tk.load_tokenizer(tmp_path)


def transformers_or_skip():
    return pytest.importorskip(
        "transformers", reason="transformers is not installed: pip install transformers"
    )


def test_transformers_still_gives_these_ids(tmp_path):
    tokenizer = transformers_or_skip().Wav2Vec2CTCTokenizer.from_pretrained(
        str(saved(tmp_path / "saved"))
    )
    assert [(text, tokenizer(text).input_ids) for text, _ in PRINTED] == PRINTED


@hypothesis.settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)
@hypothesis.given(
    tokens=st.lists(st.text(LETTERS, min_size=1, max_size=4), min_size=4, max_size=16, unique=True),
    added=st.lists(st.text(LETTERS, min_size=1, max_size=4), max_size=2),
    lower=st.booleans(),
    bracket=st.booleans(),
    texts=st.lists(
        st.text(LETTERS + " |X", max_size=20) | st.just("a <unk> o"), min_size=5, max_size=10
    ),
)
def test_ids_and_texts_are_those_of_transformers(tokens, lower, added, bracket, texts, tmp_path):
    transformers = transformers_or_skip()
    pad, unknown = ("[PAD]", "[UNK]") if bracket else ("<pad>", "<unk>")
    vocabulary = {
        token: i for i, token in enumerate([*dict.fromkeys(tokens + ["\u0301"]), "|", pad, unknown])
    }
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary))
    theirs = transformers.Wav2Vec2CTCTokenizer(
        str(tmp_path / "vocab.json"), pad_token=pad, unk_token=unknown, do_lower_case=lower
    )
    theirs.add_tokens(added)
    theirs.save_pretrained(str(tmp_path / "saved"))
    theirs = transformers.Wav2Vec2CTCTokenizer.from_pretrained(str(tmp_path / "saved"))
    ours = tk.load_tokenizer(str(tmp_path / "saved"))
    assert ours.vocab_size == len(theirs)
    assert (ours.blank_id, ours.unk_id) == (theirs.pad_token_id, theirs.unk_token_id)
    assert (ours.sos_id, ours.eos_id) == (theirs.bos_token_id, theirs.eos_token_id)
    for text in texts:
        # The letters have no other form.
        text = unicodedata.normalize("NFD", tk.normalize_text(text))
        ids = theirs(text).input_ids
        assert ours.encode(text) == ids
        heard = theirs.decode(ids, group_tokens=False).replace(
            unknown.lower() if lower else unknown, tk.UNKNOWN_MARK
        )
        assert ours.decode(ids) == tk.normalize_text(heard)
