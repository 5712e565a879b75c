"""Text to token ids and back: characters, byte-pair or sentencepiece pieces, or a Wav2Vec2 tokenizer's vocab.json.

A tokenizer is a vocabulary and four special ids. In those trained here id 0 is the CTC blank (and padding), 1 the
unknown token, 2 the start and 3 the end of a sentence. It travels as plain data (`to_dict`), in tokenizer.json and in
every checkpoint.
"""

import base64
import json
import os
import re
import unicodedata

import tokenizers
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import Metaspace
from tokenizers.trainers import BpeTrainer

import hub
from cli import UserError, write_whole

SPECIALS = ["<blank>", "<unk>", "<sos>", "<eos>"]
UNKNOWN_MARK = "\u2047"  # how an unknown token reads in a transcript: one character, so it costs one character error
BPE_SPACE = "\u2581"
HAN = re.compile("([\u4e00-\u9fff])")  # the Chinese characters that WeNet never hands to sentencepiece
# What the special tokens are called in the vocab.json files that transformers' Wav2Vec2CTCTokenizer works with.
VOCAB_NAMES = {"blank": ("<pad>", "[PAD]", "<blank>"), "unk": ("<unk>", "[UNK]"), "sos": ("<s>", "[BOS]", "<sos>"),
               "eos": ("</s>", "[EOS]", "<eos>")}


def normalize_text(text: str) -> str:
    """Unicode NFC, every run of white space one space, none at the ends. Case and punctuation stay."""
    return " ".join(unicodedata.normalize("NFC", text).split())


class Tokenizer:
    """Encodes text of any script as token ids.

    tokens: the vocabulary, a list of V strings; `space` is the token that stands for a space.
    merges: the byte-pair merges, most frequent first; None for a tokenizer of characters.
    sentencepiece: of models from WeNet, {"model": a sentencepiece model in base64, "han": whether text goes to it in upper
    case and without its Chinese characters, each of which is a token}; None for all others.
    """

    def __init__(self, *, tokens, blank_id, unk_id, sos_id, eos_id, space=" ", merges=None, sentencepiece=None):
        self.tokens = list(tokens)
        self.blank_id, self.unk_id, self.sos_id, self.eos_id = blank_id, unk_id, sos_id, eos_id
        self.space, self.merges, self.sentencepiece = space, merges, sentencepiece
        self._of_pieces = merges is not None or sentencepiece is not None  # there a space is part of a piece
        self._silent = {blank_id, sos_id, eos_id}
        specials = self._silent | {unk_id}
        # A special token is never what a piece of text means, even when the text spells its name.
        self._ids = {" " if t == space and not self._of_pieces else t: i
                     for i, t in enumerate(self.tokens) if i not in specials}
        self._bpe = None if merges is None else self._build_bpe()
        self._processor = None if sentencepiece is None else self._build_processor()

    def _build_bpe(self):
        vocabulary = {**self._ids, self.tokens[self.unk_id]: self.unk_id}
        model = BPE(vocabulary, [tuple(pair) for pair in self.merges], unk_token=self.tokens[self.unk_id])
        bpe = tokenizers.Tokenizer(model)
        bpe.pre_tokenizer = Metaspace(BPE_SPACE)
        return bpe

    def _build_processor(self):
        import sentencepiece  # only models from WeNet need it

        return sentencepiece.SentencePieceProcessor(model_proto=base64.b64decode(self.sentencepiece["model"]))

    @property
    def vocab_size(self) -> int:
        return len(self.tokens)

    def encode(self, text: str) -> list[int]:
        """The token ids of `text` after `normalize_text`, without sos and eos; what the vocabulary lacks is unk_id."""
        text = normalize_text(text)
        if self._bpe is not None:
            return self._bpe.encode(text, add_special_tokens=False).ids
        pieces = text if self._processor is None else self._sentencepieces(text)
        ids = [self._ids.get(piece, self.unk_id) for piece in pieces]
        return [i for i in ids if i != self.blank_id]  # which is what is unknown to a vocabulary without unknown token

    def _sentencepieces(self, text: str) -> list[str]:
        if not self.sentencepiece["han"]:
            return self._processor.encode(text, out_type=str)
        parts = [part for part in HAN.split(text.upper()) if part.strip()]
        return [piece for part in parts
                for piece in ([part] if HAN.fullmatch(part) else self._processor.encode(part, out_type=str))]

    def decode(self, ids) -> str:
        """The text of token ids. Blank, sos and eos are left out; repeats stay (undoing CTC is decode.py's work)."""
        ids = [int(i) for i in ids]
        pieces = [UNKNOWN_MARK if i == self.unk_id else self.tokens[i] for i in ids if i not in self._silent]
        if self._of_pieces:
            return " ".join("".join(pieces).replace(self.space, " ").split())
        return " ".join("".join(" " if piece == self.space else piece for piece in pieces).split())

    def shared_ids(self, other: "Tokenizer") -> list[tuple[int, int]]:
        """(own id, other's id) of the special tokens, by role, and of every token that both know."""
        roles = [(getattr(self, role), getattr(other, role)) for role in ("blank_id", "unk_id", "sos_id", "eos_id")]
        return roles + [(own, other._ids[token]) for token, own in self._ids.items() if token in other._ids]

    def to_dict(self) -> dict:
        """Plain data (str, int, list, dict), for JSON and for checkpoints; `from_dict` takes it."""
        names = ("tokens", "blank_id", "unk_id", "sos_id", "eos_id", "space", "merges", "sentencepiece")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    @classmethod
    def from_dict(cls, data: dict) -> "Tokenizer":
        """Raises UserError when `data` is not what `to_dict` gave."""
        try:
            return cls(**data)
        except Exception as error:  # tokenizers raises bare Exceptions for bad merges
            raise UserError(f"not a tokenizer of ours: {error}; make one with prepare.py") from None


def train_char(texts) -> Tokenizer:
    """A tokenizer of the characters that occur in `texts`, in code point order. Raises UserError if there are none."""
    characters = set()
    for text in texts:
        characters.update(normalize_text(text))
    if not characters:
        raise UserError("no text to train a tokenizer on: the transcripts of the train split are empty")
    return Tokenizer(tokens=SPECIALS + sorted(characters), blank_id=0, unk_id=1, sos_id=2, eos_id=3)


def train_bpe(texts, vocab_size: int) -> Tokenizer:
    """Byte-pair encoding (Sennrich et al. 2016) of at most vocab_size tokens, the four special ones included.

    Every character of `texts` is a token. Raises UserError when vocab_size has no room for them.
    """
    minimum = train_char(texts := list(texts)).vocab_size + 1  # a space is spelled by its own symbol
    if vocab_size < minimum:
        raise UserError(f"--vocab_size {vocab_size} has no room for this text's characters; give {minimum} or more")
    bpe = tokenizers.Tokenizer(BPE(unk_token=SPECIALS[1]))
    bpe.pre_tokenizer = Metaspace(BPE_SPACE)
    trainer = BpeTrainer(vocab_size=vocab_size, special_tokens=SPECIALS, show_progress=False)
    bpe.train_from_iterator(map(normalize_text, texts), trainer)
    model = json.loads(bpe.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    return Tokenizer(tokens=tokens, blank_id=0, unk_id=1, sos_id=2, eos_id=3, space=BPE_SPACE,
                     merges=[list(pair) for pair in model["merges"]])


def from_vocab(vocabulary: dict) -> Tokenizer:
    """The tokenizer of a Wav2Vec2 vocab.json {token: id}: ids stay, unk, sos and eos are appended where absent."""
    ids_ok = all(isinstance(i, int) for i in vocabulary.values())
    if not ids_ok or sorted(vocabulary.values()) != list(range(len(vocabulary))):
        raise UserError("not a vocab.json: it must map tokens to the ids 0, 1, 2, ... without gaps")
    tokens, special = sorted(vocabulary, key=vocabulary.get), {}
    for role, names in VOCAB_NAMES.items():
        found = [vocabulary[name] for name in names if name in vocabulary]
        if not found and role == "blank":
            raise UserError(f"the vocabulary has no pad token ({', '.join(names)}), which CTC needs as its blank")
        special[f"{role}_id"] = found[0] if found else len(tokens)
        if not found:
            tokens.append(names[0])
    return Tokenizer(tokens=tokens, space="|" if "|" in vocabulary else " ", **special)


def load_tokenizer(path: str) -> Tokenizer:
    """Reads a tokenizer.json, a vocab.json, or the tokenizer inside a .ckpt, in a folder for the hub or in a hub repository
    org/name. Raises UserError if it is none of these."""
    path = hub.locate(str(path))
    path = os.path.join(path, hub.TOKENIZER) if os.path.isdir(path) else path
    try:
        if path.endswith(".ckpt"):
            data = hub.read_weights_only(path, mmap=True)["tokenizer"]
        else:
            with open(path, encoding="utf-8") as file:
                data = json.load(file)
    except (OSError, ValueError, KeyError, TypeError, UserError) as error:
        reason = str(error) if isinstance(error, UserError) else getattr(error, "strerror", None)
        reason = reason or "not a tokenizer.json, vocab.json or checkpoint"
        raise UserError(f"cannot read a tokenizer from {path}: {reason}; give the path of one of these") from None
    try:
        if isinstance(data, dict) and "tokens" in data:
            return Tokenizer.from_dict(data)
        if isinstance(data, dict) and data:
            return from_vocab(data)
        raise UserError("not a tokenizer.json, vocab.json or checkpoint")
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def check_maker(tokenizer: Tokenizer, name: str, data_root: str) -> None:
    """Raises UserError when DATA_ROOT/tokenizer.json, which made the labels there, is another tokenizer."""
    path = os.path.join(data_root, "tokenizer.json")
    if os.path.exists(path) and load_tokenizer(path).to_dict() != tokenizer.to_dict():
        raise UserError(f"{name} differs from {path}, which made the labels; use that one, or prepare the data again with "
                        "prepare.py --tokenizer")


def unit_lines(tokens: list[str], file: str) -> str:
    """Lines `token id` of WeNet's units.txt and sherpa-onnx's tokens.txt; UserError where they could not be read back."""
    if len(set(tokens)) < len(tokens) or any(len(token.split()) != 1 for token in tokens):
        raise UserError(f"its tokens cannot be lines of a {file}: they hold spaces or are not distinct")
    return "".join(f"{token} {i}\n" for i, token in enumerate(tokens))


def save_tokenizer(tokenizer: Tokenizer, path: str) -> None:
    """Writes tokenizer.json, whole or not at all."""
    write_whole(path, json.dumps(tokenizer.to_dict(), ensure_ascii=False, indent=1).encode())
