"""Tokenizers turn text into token ids and back.

The tokens are characters, byte-pair or sentencepiece pieces, or those of a Wav2Vec2 vocab.json. A
tokenizer is a vocabulary and four special ids. In one that is trained here id 0 is the CTC blank
(and padding), 1 the unknown token, 2 the start and 3 the end of a sentence. A tokenizer travels as
plain data (`to_dict`), in tokenizer.json and in every checkpoint.
"""

import base64
import bisect
import collections
import itertools
import json
import os
import re
import unicodedata

from cli import UserError, shown

import tokenizers
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import Metaspace
from tokenizers.trainers import BpeTrainer

from checkpoint import TOKENIZER, locate, read_weights_only
from files import parse_json, read_json, read_text, write_whole

SPECIALS = ["<blank>", "<unk>", "<sos>", "<eos>"]
# How an unknown token reads in a transcript: as one character, so it costs one character error.
UNKNOWN_MARK = "\u2047"
BPE_SPACE = "\u2581"
# Characters that show nothing alone: fillers, and the joiners, variation selectors and tags that
# change the characters beside them.
NOTHING = re.compile(
    "[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200c\u200d\u2800\u3164\ufe00-\ufe0f\uffa0"
    "\U000e0000-\U000e0fff]"
)
# Characters that no transcript and no line of a file holds: controls, ends of lines, and halves of
# surrogate pairs.
CONTROLS = re.compile("[\0-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
LONGEST_TOKEN = 256  # characters
LARGEST_VOCABULARY = 2**21  # characters of all tokens
# The Chinese characters that WeNet never hands to sentencepiece.
HAN = re.compile("([\u4e00-\u9fff])")
# For each role: the option of transformers' Wav2Vec2CTCTokenizer that names its token, and usual
# names of the token in a vocab.json. transformers appends missing tokens in this order.
VOCAB_NAMES = {
    "sos": ("bos_token", "<s>", "[BOS]", "<sos>"),
    "eos": ("eos_token", "</s>", "[EOS]", "<eos>"),
    "unk": ("unk_token", "<unk>", "[UNK]"),
    "blank": ("pad_token", "<pad>", "[PAD]", "<blank>"),
}
WAV2VEC2_FILES = (
    "vocab.json",
    "added_tokens.json",
    "special_tokens_map.json",
    "tokenizer_config.json",
)
# {an option in tokenizer_config.json: the values of it that are supported}.
WAV2VEC2_OPTIONS = {
    "tokenizer_class": (None, "Wav2Vec2CTCTokenizer", "Wav2Vec2Tokenizer"),
    "replace_word_delimiter_char": (None, " "),
}


def normalize_text(text: str) -> str:
    """Returns Unicode NFC, with single spaces and none at the ends. Case and punctuation stay."""
    return " ".join(nfc(text).split())


def nfc(text: str) -> str:
    """Returns Unicode NFC.

    The combining marks of a long text are put in order here: unicodedata would take a time that
    grows with the square of the marks on one letter.
    """
    if len(text) > 1000 and not text.isascii():
        parts = "".join(unicodedata.normalize("NFD", character) for character in text)
        runs = itertools.groupby(parts, lambda character: unicodedata.combining(character) > 0)
        text = "".join(
            "".join(sorted(run, key=unicodedata.combining) if marks else run) for marks, run in runs
        )
    return unicodedata.normalize("NFC", text)


def quoted(piece: str) -> str:
    """Returns text for a message, in quotation marks, or as code points if a part is invisible."""
    unseen = any(unicodedata.category(c)[0] == "M" or NOTHING.match(c) for c in piece)
    if piece.isprintable() and not unseen:
        return f"'{piece}'"
    return " ".join(f"U+{ord(c):04X}" for c in piece)


def brief(value) -> str:
    """Returns the beginning of a file's value for a message, as Python writes it."""
    return shown(repr(value) if isinstance(value, str) else value, 100)


def most_frequent(unknown: collections.Counter, examples: dict[str, str] = {}) -> str:
    """Says which pieces a tokenizer did not know, how often each occurs, and in which example."""
    told = [
        f"{quoted(piece)} x {count}" + (f" (as in {examples[piece]})" if piece in examples else "")
        for piece, count in unknown.most_common(10)
    ]
    rest = len(unknown) - len(told)
    return ", ".join(told) + (f" and {rest} others" if rest else "")


def check_parts(tokens, ids, space, merges, sentencepiece, wav2vec2) -> None:
    """Raises UserError where a part of a Tokenizer is not as its docstring says."""
    added = wav2vec2["added"] if wav2vec2 else []
    texts = [*tokens, space, *added, *(part for pair in merges or () for part in pair)]
    no_lists = isinstance(tokens, str) or isinstance(added, str)
    if no_lists or not all(isinstance(text, str) for text in texts):
        raise UserError("a token is no text")
    lengths = list(map(len, texts))
    if max(lengths) > LONGEST_TOKEN or sum(lengths) > LARGEST_VOCABULARY:
        raise UserError(
            f"a token is longer than {LONGEST_TOKEN} characters, or all are longer than "
            f"{LARGEST_VOCABULARY}"
        )
    if strange := next(filter(None, map(CONTROLS.search, texts)), None):
        raise UserError(f"a token holds the control character {quoted(strange[0])}; take it out")
    if not all(type(i) is int and 0 <= i < len(tokens) for i in ids):
        raise UserError(
            f"its special ids {shown(ids, 100)} are not all of its {len(tokens)} tokens"
        )
    if any(len(pair) != 2 for pair in merges or ()):
        raise UserError("a merge is not of two tokens")
    if sentencepiece and not (
        isinstance(sentencepiece["model"], str) and type(sentencepiece["han"]) is bool
    ):
        raise UserError("its sentencepiece model is none")
    if wav2vec2 and type(wav2vec2["do_lower_case"]) is not bool:
        raise UserError("do_lower_case is neither true nor false")


class Tokenizer:
    """Encodes text of any script as token ids.

    tokens: the vocabulary, a list of V strings; `space` is the token that stands for a space.
    merges: the byte-pair merges, most frequent first; None for a tokenizer of characters.
    sentencepiece: None but for models from WeNet, {"model": a sentencepiece model in base64, "han":
    whether text goes to the model in upper case and without Chinese characters, each a token}.
    wav2vec2: None but for transformers' vocabularies, {"do_lower_case": whether texts are in lower
    case and tokens in upper case, "added": the tokens that were added to the vocabulary}.
    Raises UserError for other types, ids beyond the vocabulary, and tokens that are very long or
    hold control characters.
    """

    def __init__(
        self,
        *,
        tokens,
        blank_id,
        unk_id,
        sos_id,
        eos_id,
        space=" ",
        merges=None,
        sentencepiece=None,
        wav2vec2=None,
    ):
        check_parts(
            tokens, (blank_id, unk_id, sos_id, eos_id), space, merges, sentencepiece, wav2vec2
        )
        self.tokens = list(tokens)
        self.blank_id = blank_id
        self.unk_id = unk_id
        self.sos_id = sos_id
        self.eos_id = eos_id
        self.space = space
        self.merges = merges
        self.sentencepiece = sentencepiece
        self.wav2vec2 = wav2vec2
        # In a tokenizer of pieces a space is part of a piece.
        self._of_pieces = merges is not None or sentencepiece is not None
        self._silent = {blank_id, sos_id, eos_id}
        specials = self._silent | {unk_id}
        # Text never means a special token, even where it spells the token's name.
        self._ids = {t: i for i, t in enumerate(self.tokens) if i not in specials}
        if space in self._ids and not self._of_pieces:
            self._ids[" "] = self._ids.pop(space)
        self._note_forms()
        if wav2vec2:
            self._added = set(wav2vec2["added"])
            whole = {token for token in self.tokens if len(token) > 1} | self._added
            self._trie = Trie(whole | {self.tokens[i] for i in specials} | {space})
        self._bpe = None if merges is None else self._build_bpe()
        self._processor = None if sentencepiece is None else self._build_processor()

    def _note_forms(self) -> None:
        """Notes the characters of the tokens, and in which Unicode form they are."""
        text = "".join(self._ids)
        self._characters = set(text)
        if self.wav2vec2 and self.wav2vec2["do_lower_case"]:
            self._characters |= set(text.lower())
        marks = any(unicodedata.category(c)[0] == "M" for c in self._characters)
        self._decomposed = marks and unicodedata.is_normalized("NFD", "\n".join(self._characters))
        forms = {unicodedata.normalize("NFC", c): c for c in self._characters}
        self._not_nfc = {form: c for form, c in forms.items() if form not in self._characters}

    def _build_bpe(self):
        unknown = self.tokens[self.unk_id]
        merges = [tuple(pair) for pair in self.merges]
        model = BPE({**self._ids, unknown: self.unk_id}, merges, unk_token=unknown)
        bpe = tokenizers.Tokenizer(model)
        bpe.pre_tokenizer = Metaspace(BPE_SPACE)
        return bpe

    def _build_processor(self):
        import sentencepiece  # Only models from WeNet need this package.

        return sentencepiece.SentencePieceProcessor(
            model_proto=base64.b64decode(self.sentencepiece["model"])
        )

    @property
    def vocab_size(self) -> int:
        return len(self.tokens)

    def encode(self, text: str) -> list[int]:
        """Returns the token ids of `text` after `normalize_text`, without sos and eos.

        A piece that the vocabulary lacks becomes unk_id, or nothing where unk_id is blank_id, as in
        a vocabulary without an unknown token.
        """
        return [i for _, i in self.spell(text) if i != self.blank_id]

    def unknown(self, text: str) -> list[str]:
        """Returns the pieces of `text`, mostly characters, that the vocabulary lacks."""
        return [piece for piece, i in self.spell(text) if i == self.unk_id]

    def spell(self, text: str) -> list[tuple[str, int]]:
        """Returns the pieces of `text` after `normalize_text`, and their ids."""
        text = normalize_text(text)
        if self._bpe is not None:
            found = self._bpe.encode(text, add_special_tokens=False)
            return [(text[start:end], i) for (start, end), i in zip(found.offsets, found.ids)]
        if self._processor is not None:
            pieces = self._sentencepieces(text)
        else:
            for form, character in self._not_nfc.items():
                text = text.replace(form, character)
            text = "".join(map(self._as_written, text))
            pieces = text if self.wav2vec2 is None else self._wav2vec2_pieces(text)
        return [(piece, self._ids.get(piece, self.unk_id)) for piece in pieces]

    def _as_written(self, character: str) -> str:
        """Returns the character, or its parts.

        The parts are returned where the vocabulary is decomposed, or has only the parts.
        """
        if character in self._characters:
            return character
        parts = []
        for part in unicodedata.normalize("NFD", character):
            composed = unicodedata.normalize("NFC", "".join(parts[-1:]) + part)
            parts[-1:] = [composed] if composed in self._characters else [*parts[-1:], part]
        known = self._decomposed or self._characters.issuperset(parts)
        return "".join(parts) if known else character

    def _wav2vec2_pieces(self, text: str) -> list[str]:
        """Returns the pieces that transformers makes of a text.

        Tokens of several characters and added ones are cut out first; the characters between them
        follow. A token of several characters takes the spaces beside it, unless it was added. The
        name of a special token is one piece, but never that token: no label may hold a blank.
        """
        pieces = []
        parts = self._trie.split(text)
        for i, part in enumerate(parts):
            if part in self._trie.tokens and len(part) > 1 and part not in self._added:
                if i > 0:
                    parts[i - 1] = parts[i - 1].rstrip()
                if i + 1 < len(parts):
                    parts[i + 1] = parts[i + 1].lstrip()
        for part in parts:
            if part in self._trie.tokens:
                pieces.append(part)
            else:
                pieces += part.upper() if self.wav2vec2["do_lower_case"] else part
        return [" " if piece == self.space else piece for piece in pieces]

    def _sentencepieces(self, text: str) -> list[str]:
        if not self.sentencepiece["han"]:
            return self._processor.encode(text, out_type=str)
        pieces = []
        for part in filter(str.strip, HAN.split(text.upper())):
            if HAN.fullmatch(part):
                pieces.append(part)
            else:
                pieces += self._processor.encode(part, out_type=str)
        return pieces

    def texts(self, ids) -> list[str]:
        """Returns the text of each token id, to be joined. Blank, sos and eos have no text."""
        pieces = [
            "" if i in self._silent else UNKNOWN_MARK if i == self.unk_id else self.tokens[i]
            for i in ids
        ]
        if self._of_pieces:
            return [piece.replace(self.space, " ") for piece in pieces]
        return [" " if piece == self.space else piece for piece in pieces]

    def written(self, text: str) -> str:
        """Returns joined `texts` as a transcript: with single spaces and in the case of labels."""
        lower = self.wav2vec2 is not None and self.wav2vec2["do_lower_case"]
        return normalize_text(text.lower() if lower else text)

    def decode(self, ids) -> str:
        """Returns the text of token ids. Blank, sos and eos are left out.

        Repeated ids stay: decode.py undoes CTC.
        """
        return self.written("".join(self.texts(map(int, ids))))

    def shared_ids(self, other: "Tokenizer") -> list[tuple[int, int]]:
        """Returns (own id, other's id) of the special tokens, by role, and of each common token."""
        roles = [
            (getattr(self, role), getattr(other, role))
            for role in ("blank_id", "unk_id", "sos_id", "eos_id")
        ]
        return roles + [
            (own, other._ids[token]) for token, own in self._ids.items() if token in other._ids
        ]

    def to_dict(self) -> dict:
        """Returns plain data (str, int, list, dict), for JSON and checkpoints and `from_dict`."""
        names = (
            "tokens",
            "blank_id",
            "unk_id",
            "sos_id",
            "eos_id",
            "space",
            "merges",
            "sentencepiece",
            "wav2vec2",
        )
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    @classmethod
    def from_dict(cls, data: dict) -> "Tokenizer":
        """Makes a tokenizer of the data that `to_dict` gave. Raises UserError for other data."""
        try:
            return cls(**data)
        except Exception as error:  # tokenizers raises bare Exceptions for bad merges
            raise UserError(
                f"not a tokenizer of ours: {shown(str(error), 200)}; make one with prepare.py"
            ) from None


class Trie:
    """Cuts texts at the tokens in them: at the leftmost token and, of several there, the longest.

    This is transformers' Trie, with its flaw: where a token ends while a longer one to the left of
    it breaks off, the search for the rest of the longer one skips a character, and the piece that
    is cut out then is no token. The tokens are sorted once: sorting many for every text would take
    most of the time.
    """

    def __init__(self, tokens: set[str]):
        self.tokens = tokens - {""}
        self.ordered = sorted(self.tokens)

    def begins(self, seen: str) -> bool:
        """Returns whether a token begins with the characters `seen`."""
        place = bisect.bisect_left(self.ordered, seen)
        return seen != "" and place < len(self.ordered) and self.ordered[place].startswith(seen)

    def longest(self, text: str, seen: str, at: int) -> int | None:
        """Returns where the longest token ends that begins with `seen` and goes on at text[at]."""
        end = at if seen in self.tokens else None
        while at < len(text) and self.begins(seen + text[at]):
            seen += text[at]
            at += 1
            end = at if seen in self.tokens else end
        return end

    def first(self, text: str, here: int, begun: dict[int, str]) -> tuple[int, int] | None:
        """Returns (start, end) of the token to cut out, or None where no token ends before `here`.

        begun: {a place where a token may have begun: its characters before `here`}.
        """
        whole = next((start for start, seen in begun.items() if seen in self.tokens), None)
        if whole is None:
            return None
        for start, seen in begun.items():
            if start == whole:
                return start, self.longest(text, seen, here)
            grown = seen + text[here : here + 1]
            seen = grown if self.begins(grown) else seen
            if (end := self.longest(text, seen, here + 1)) is not None:
                return start, end
        return None

    def split(self, text: str) -> list[str]:
        """Returns the parts of the text, tokens and what lies between them."""
        cuts = [0]
        begun = {}
        behind = 0  # where the last token ends
        for here in range(len(text) + 1):
            if here < behind:
                continue
            if cut := self.first(text, here, begun):
                cuts += cut
                begun = {}
                behind = cut[1]
            else:
                grown = {start: seen + text[here : here + 1] for start, seen in begun.items()}
                begun = {start: seen for start, seen in grown.items() if self.begins(seen)}
            if behind <= here and self.begins(text[here : here + 1]):
                begun[here] = text[here]
        return [text[start:end] for start, end in zip(cuts, [*cuts[1:], len(text)]) if start < end]


def train_char(texts) -> Tokenizer:
    """Makes a tokenizer of the characters in `texts` but controls, in the order of code points.

    Raises UserError where there are no characters.
    """
    characters = set()
    for text in texts:
        characters.update(CONTROLS.sub("", normalize_text(text)))
    if not characters:
        raise UserError(
            "no text to train a tokenizer on: the transcripts of the train split are empty"
        )
    return Tokenizer(tokens=SPECIALS + sorted(characters), blank_id=0, unk_id=1, sos_id=2, eos_id=3)


def train_bpe(texts, vocab_size: int) -> Tokenizer:
    """Trains byte-pair encoding (Sennrich et al. 2016) of at most vocab_size tokens.

    The four special tokens and all characters of `texts` are among the tokens. Raises UserError
    where vocab_size has no room for them.
    """
    texts = list(texts)
    minimum = train_char(texts).vocab_size + 1  # BPE_SPACE is one more
    if vocab_size < minimum:
        raise UserError(
            f"--vocab_size {vocab_size} has no room for this text's characters; give {minimum} or "
            "more"
        )
    bpe = tokenizers.Tokenizer(BPE(unk_token=SPECIALS[1]))
    bpe.pre_tokenizer = Metaspace(BPE_SPACE)
    trainer = BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIALS,
        show_progress=False,
        max_token_length=LONGEST_TOKEN + 1,  # tokens stay below this length
    )
    bpe.train_from_iterator((CONTROLS.sub("", normalize_text(text)) for text in texts), trainer)
    model = json.loads(bpe.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    return Tokenizer(
        tokens=tokens,
        blank_id=0,
        unk_id=1,
        sos_id=2,
        eos_id=3,
        space=BPE_SPACE,
        merges=[list(pair) for pair in model["merges"]],
    )


def from_vocab(vocabulary: dict, added: dict = {}, config: dict = {}) -> Tokenizer:
    """Makes the tokenizer of a Wav2Vec2 vocab.json {token: id}.

    The ids stay; sos, eos and unk are appended where absent. added: {token: id} of tokens that were
    added to the vocabulary. config: the options in tokenizer_config.json. Raises UserError
    where the ids are not 0, 1, 2, ... or contradict each other, and where there is no pad token.
    """
    if vocabulary and all(isinstance(i, dict) for i in vocabulary.values()):
        languages = shown(", ".join(list(vocabulary)[:5]), 100)
        raise UserError(
            f"it holds the vocabularies of several languages ({languages}, ...); give its "
            "folder, with a target_lang in its tokenizer_config.json"
        )
    tokens = {}
    for token, i in [*vocabulary.items(), *added.items()]:
        if vocabulary.get(token, i) != i:
            raise UserError(
                f"the token {brief(token)} has two ids, {brief(vocabulary[token])} and {brief(i)}"
            )
        if tokens.setdefault(i, token) != token:
            raise UserError(
                f"the tokens {brief(tokens[i])} and {brief(token)} have the same id {brief(i)}"
            )
    if not all(isinstance(i, int) for i in tokens) or sorted(tokens) != list(range(len(tokens))):
        raise UserError("not a vocab.json: it must map tokens to the ids 0, 1, 2, ... without gaps")
    tokens = [tokens[i] for i in range(len(tokens))]
    special = {}
    later = [token for token in added if token not in vocabulary or len(token) == 1]
    for role, (option, *names) in VOCAB_NAMES.items():
        names = [config[option]] if config.get(option) else names
        found = [tokens.index(name) for name in names if name in tokens]
        if not found and role == "blank":
            raise UserError(
                f"the vocabulary has no pad token ({shown(', '.join(names), 100)}), which CTC "
                "needs as its blank"
            )
        special[f"{role}_id"] = found[0] if found else len(tokens)
        if not found:
            tokens.append(names[0])
            later.append(names[0])
    space = config.get("word_delimiter_token") or ("|" if "|" in tokens else " ")
    wav2vec2 = {"do_lower_case": bool(config.get("do_lower_case")), "added": later}
    return Tokenizer(tokens=tokens, space=space, wav2vec2=wav2vec2, **special)


def from_folder(vocabulary: dict, added: dict, names: dict, config: dict) -> Tokenizer:
    """Makes a tokenizer of the four WAV2VEC2_FILES of Wav2Vec2CTCTokenizer.save_pretrained.

    Raises UserError where the files contradict each other or have options that are not supported.
    """
    for option, supported in WAV2VEC2_OPTIONS.items():
        if config.get(option) not in supported:
            raise UserError(
                f"tokenizer_config.json: {option} {brief(config[option])} is not supported, only "
                f"{supported[1]!r}"
            )
    chosen = {"do_lower_case": config.get("do_lower_case")}
    for option in (*(option for option, *_ in VOCAB_NAMES.values()), "word_delimiter_token"):
        told = [source[option] for source in (names, config) if source.get(option)]
        told = {token["content"] if isinstance(token, dict) else token for token in told}
        if len(told) > 1:
            raise UserError(
                "special_tokens_map.json and tokenizer_config.json differ on "
                f"{option}: {shown(' or '.join(sorted(told)), 100)}"
            )
        chosen[option] = next(iter(told), None)
    if len(chosen["word_delimiter_token"] or " ") > 1:
        raise UserError(
            f"word_delimiter_token {brief(chosen['word_delimiter_token'])} is not supported, only "
            "a single character"
        )
    if language := config.get("target_lang"):
        if not isinstance(vocabulary.get(language), dict):
            raise UserError(f"target_lang {brief(language)} is none of vocab.json's languages")
        vocabulary = vocabulary[language]
    for i, token in config.get("added_tokens_decoder", {}).items():
        content = token["content"]
        if added.setdefault(content, int(i)) != int(i):
            raise UserError(
                "added_tokens.json and tokenizer_config.json differ on the id of "
                f"{brief(content)}: {brief(added[content])} or {shown(i, 20)}"
            )
        # A token of several characters that was not added takes the spaces beside it anyway.
        whole = content in vocabulary and len(content) > 1
        for flag in ("single_word", *(() if whole else ("lstrip", "rstrip"))):
            if token.get(flag):
                raise UserError(f"{flag} of the added token {brief(content)} is not supported")
    return from_vocab(vocabulary, added, chosen)


def load_tokenizer(path: str) -> Tokenizer:
    """Reads the tokenizer of a tokenizer.json, a vocab.json, a .ckpt or a folder.

    The folder is one for the hub, a hub repository org/name, or one that
    Wav2Vec2CTCTokenizer.save_pretrained wrote. Raises UserError where `path` is none of these.
    """
    path = locate(str(path))
    if os.path.exists(os.path.join(path, TOKENIZER)):
        path = os.path.join(path, TOKENIZER)
    folder = os.path.isdir(path)
    unreadable = "not a tokenizer.json, vocab.json or checkpoint"
    try:
        if folder:
            unreadable = f"one of {', '.join(WAV2VEC2_FILES)} is no JSON object"
            if not os.path.exists(os.path.join(path, WAV2VEC2_FILES[0])):
                raise UserError(f"neither {TOKENIZER} nor {WAV2VEC2_FILES[0]} is in it")
            names = [os.path.join(path, name) for name in WAV2VEC2_FILES]
            data = [read_json(name) if os.path.exists(name) else {} for name in names]
        elif path.endswith(".ckpt"):
            data = read_weights_only(path, mmap=True)["tokenizer"]
        else:
            data = parse_json(read_text(path))
    except (OSError, ValueError, KeyError, TypeError, UserError) as error:
        reason = str(error) if isinstance(error, UserError) else getattr(error, "strerror", None)
        raise UserError(
            f"cannot read a tokenizer from {path}: {reason or unreadable}; give "
            "the path of a tokenizer.json, vocab.json or .ckpt, or a folder with one"
        ) from None
    try:
        if folder:
            return from_folder(*data)
        if isinstance(data, dict) and data:
            return Tokenizer.from_dict(data) if "tokens" in data else from_vocab(data)
        raise UserError(unreadable)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError):
        # The JSON has another shape.
        raise UserError(
            f"{path}: not what Wav2Vec2CTCTokenizer.save_pretrained writes; save it anew"
        ) from None


def check_maker(tokenizer: Tokenizer, name: str, data_root: str) -> None:
    """Raises UserError where DATA_ROOT/tokenizer.json, which made the labels, differs."""
    path = os.path.join(data_root, "tokenizer.json")
    if os.path.exists(path) and load_tokenizer(path).to_dict() != tokenizer.to_dict():
        raise UserError(
            f"{name} differs from {path}, which made the labels; use that one, or prepare the data "
            "again with prepare.py --tokenizer"
        )


def unit_lines(tokens: list[str], file: str) -> str:
    """Returns the lines `token id` of WeNet's units.txt and sherpa-onnx's tokens.txt.

    Raises UserError where the lines could not be read back.
    """
    if len(set(tokens)) < len(tokens) or any(len(token.split()) != 1 for token in tokens):
        raise UserError(
            f"its tokens cannot be lines of a {file}: they hold spaces or are not distinct"
        )
    return "".join(f"{token} {i}\n" for i, token in enumerate(tokens))


def save_tokenizer(tokenizer: Tokenizer, path: str) -> None:
    """Writes tokenizer.json, whole or not at all."""
    write_whole(path, json.dumps(tokenizer.to_dict(), ensure_ascii=False, indent=1).encode())
