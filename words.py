"""Finds when each word was said and how sure the model is, and writes text, JSON, ctm, srt or vtt.

Times come from CTC: decode.align aligns the tokens to the encoder's frames, and each frame sees a
known part of the recording (FrameTimes). Axes: T encoder frames, V vocabulary. All times are in
seconds.
"""

import math
import re
import unicodedata
from collections.abc import Iterable
from typing import NamedTuple
from urllib.parse import quote

from cli import UNSHOWN, shown

import torch

import decode
from files import json_text
from frames import receptive_field
from tokenizer import Tokenizer
from transforms import Frontend

# Chinese and Japanese characters, between which no space stands: radicals, signs such as 々 〆 〇,
# kana, bopomofo, ideographs.
ALONE = re.compile(
    "[\u2e80-\u2fdf\u3005-\u3007\u3021-\u3029\u3031-\u303c\u3041-\u30ff\u3105-\u312f\u31a0-\u31ff"
    "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff66-\uff9f\U0001aff0-\U0001b16f"
    "\U00020000-\U0003ffff]"
)
# Signs that belong to the character before, as marks do: for long vowels and voicing, and joiners.
GOES_ON = "\u30fc\uff70\u309b\u309c\uff9e\uff9f\u200c\u200d"
# Unicode's categories of punctuation that opens, and of punctuation that closes or ends.
OPENING = ("Ps", "Pi")
CLOSING = ("Pe", "Pf", "Po", "Pd", "Pc")
# A cue of subtitles has at most LINES lines of LINE columns, and lasts at most LONGEST_CUE seconds.
# It lasts at least SHORTEST_CUE where the next cue leaves room. A pause of PAUSE or more ends it.
LINE = 42
LINES = 2
LONGEST_CUE = 7.0
SHORTEST_CUE = 1.0
PAUSE = 0.7
# A name in ctm must not hold white space, the escape sign %, or a semicolon that begins a comment.
NO_COLUMN = re.compile(rf"[%\s]|^;|{UNSHOWN.pattern}")


class Word(NamedTuple):
    """Holds a word that was heard.

    confidence: the probability, 0 .. 1, that CTC gives to the word's least likely token, at the
    frame where the alignment has this token. On 533 words heard in AN4's dev, the least likely
    token tells right words from wrong ones better than the mean of the tokens does.
    """

    text: str
    start: float
    end: float
    confidence: float
    spaced: bool = True  # True where a space stands between the word before and this one


class Transcript(NamedTuple):
    """Holds the text and the words that were heard in a recording."""

    file: str
    text: str
    duration: float
    words: list[Word]


class FrameTimes(NamedTuple):
    """Says what encoder frame k sees of the recording: k * shift to k * shift + field seconds."""

    shift: float
    field: float


def frame_times(input_layer: str, frontend: Frontend) -> FrameTimes:
    """Computes the times of a model's encoder frames."""
    field, rate = receptive_field(input_layer)
    shift = rate * frontend.shift_ms
    seen = (field - 1) * frontend.shift_ms + frontend.frame_length
    return FrameTimes(shift / 1000, seen / 1000)


class Spelled(NamedTuple):
    """Holds a word of a token sequence."""

    text: str
    places: list[int]  # where its tokens stand in the sequence
    spaced: bool  # as in Word


def spell(tokens: list[int], tokenizer: Tokenizer) -> list[Spelled]:
    """Splits a token sequence into words, which `text_of` joins as `tokenizer.decode` does.

    Words end at spaces, in whatever way the tokenizer writes a space. A Chinese or Japanese
    character is a word of its own, with the punctuation and the combining marks that belong to it.
    Other scripts without spaces (Thai) come as long words.
    """
    words = split_words(tokenizer.texts(tokens))
    return [word._replace(text=tokenizer.written(word.text)) for word in words]


def split_words(texts: Iterable[str]) -> list[Spelled]:
    """Splits the text that pieces join to into words, as `spell` does; `places` are of pieces."""
    words = []  # characters, places, spaced
    spaced = True  # a space stands before the next character
    inside = False  # the last word may go on with letters
    opened = False  # the last character opened a bracket or a quotation
    for place, text in enumerate(texts):
        for character in text:
            if character.isspace():
                spaced = True
                inside = False
                opened = False
                continue
            category = unicodedata.category(character)
            goes_on = belongs(character)
            alone = not goes_on and bool(ALONE.match(character))
            opens = category in OPENING and (not inside or ord(character) > 0x2E7F)
            if spaced or not (goes_on or opened or inside and not alone and not opens):
                words.append(([], [], spaced))
                inside = True
            characters, places, _ = words[-1]
            characters.append(character)
            places.append(place)
            spaced = False
            opened = category in OPENING
            inside = not alone and (inside or not goes_on)
    return [Spelled("".join(characters), *more) for characters, *more in words]


def begins_word(character: str) -> bool:
    """Returns whether a character begins a word in the midst of a text, as a Chinese sign does."""
    wide_bracket = ord(character) > 0x2E7F and unicodedata.category(character) in OPENING
    return wide_bracket or not belongs(character) and bool(ALONE.match(character))


def belongs(character: str) -> bool:
    """Returns whether a character goes on with the word before: a mark, or closing punctuation."""
    category = unicodedata.category(character)
    return character in GOES_ON or category[0] == "M" or category in CLOSING


def text_of(words: Iterable[Spelled | Word]) -> str:
    """Joins the words of one sequence to a text."""
    return "".join(f" {word.text}" if word.spaced else word.text for word in words).strip()


def parted(before: Iterable[str], after: Iterable[str]) -> bool:
    """Returns False where no space belongs between two texts that were heard apart.

    This is so where Chinese or Japanese characters meet, punctuation aside. The texts are given by
    character from the meeting point on, so `before` runs backwards.
    """
    return not all(ALONE.match(next(filter(str.isalnum, side), "")) for side in (before, after))


def join(texts: Iterable[str]) -> str:
    """Joins texts that were heard apart, with a space where one belongs."""
    joined = ""
    for text in filter(None, texts):
        joined += f" {text}" if joined and parted(reversed(joined), text) else text
    return joined


def join_words(parts: Iterable[list[Word]]) -> list[Word]:
    """Joins the words of texts that were heard apart, as `join` joins the texts.

    No word ends behind the start of the next one.
    """
    words = []
    for part in filter(None, parts):
        before = (character for word in reversed(words) for character in reversed(word.text))
        words += [part[0]._replace(spaced=parted(before, text_of(part))), *part[1:]]
    limits = [word.start for word in words[1:]] + [math.inf]
    return [
        word._replace(end=max(min(word.end, limit), word.start))
        for word, limit in zip(words, limits)
    ]


def align_words(
    tokens: list[int],
    log_probs: torch.Tensor,
    tokenizer: Tokenizer,
    times: FrameTimes,
    offset: float = 0.0,
    delay: float = 0.0,
    columns: list[int] | None = None,
    until: float = math.inf,
) -> list[Word]:
    """Finds the words of `tokens` in log_probs (T,V) of a piece that begins at `offset`.

    The piece ends at `until`, and with it the words that a model hears in the silence behind it.

    log_probs may have only the `columns` of decode.columns_of, (T,C).
    A word starts where the frame of its first token begins to see. It ends half a shift behind the
    middle of the frame of its last token, but not after the next word's start. These two rules had
    the least error in `python -m tools.align`. `delay` is taken off both times: a CTC branch that
    trains for long, above all a causal one, may wait for more of a word before it writes the word.
    Where the tokens have no CTC path (too many for the frames), the words share the piece in equal
    parts and have confidence 0.
    """
    spelled = spell(tokens, tokenizer)
    alone = decode.Hypothesis(tokens, 0.0, [], [tokens], [0.0], [[]])
    frames = decode.align(alone, log_probs, len(log_probs), tokenizer.blank_id, columns).times
    if not frames:
        offset = min(offset, until)  # an utterance of a stream may begin in the silence
        share = min(len(log_probs) * times.shift, until - offset) / max(len(spelled), 1)
        return [
            Word(word.text, offset + i * share, offset + (i + 1) * share, 0.0, word.spaced)
            for i, word in enumerate(spelled)
        ]
    places = tokens if columns is None else [columns.index(token) for token in tokens]
    probabilities = log_probs[frames, places].exp().tolist()
    behind = (times.field + times.shift) / 2 - delay
    words = [
        Word(
            text,
            min(offset + max(frames[places[0]] * times.shift - delay, 0.0), until),
            min(offset + frames[places[-1]] * times.shift + behind, until),
            min(probabilities[place] for place in places),
            spaced,
        )
        for text, places, spaced in spelled
    ]
    return join_words([words])


# ---- Formats


def as_txt(transcript: Transcript) -> str:
    """Writes one line: the file, a tab and the text.

    In both, tabs, line breaks and characters that a terminal obeys are escaped as in Python.
    """
    return f"{shown(transcript.file, math.inf)}\t{shown(transcript.text, math.inf)}\n"


def as_json(transcript: Transcript) -> str:
    """Writes one line: file, text, duration and words with their start, end and confidence."""
    words = word_fields(transcript.words)
    fields = {**transcript._asdict(), "duration": round(transcript.duration, 3), "words": words}
    return json_text(fields, ensure_ascii=False) + "\n"


def word_fields(words: list[Word]) -> list[dict]:
    """Returns the words as JSON has them."""
    return [
        {
            "word": word.text,
            "start": round(word.start, 3),
            "end": round(word.end, 3),
            "confidence": round(word.confidence, 4),
        }
        for word in words
    ]


def as_ctm(transcript: Transcript) -> str:
    """Writes a line per word: file, channel, start, duration, word, confidence (NIST's ctm).

    White space in `file` is escaped as in a web address, %20 for a space. So are %, control
    characters, and a semicolon that would begin a comment. Two recordings never get the same name.
    """
    name = NO_COLUMN.sub(lambda found: percent(found[0]), transcript.file)
    lines = []
    for word in printable(transcript.words):
        # Start and duration as printed must not add up to more than the next word's start.
        duration = round(word.end, 3) - round(word.start, 3)
        text = "_".join(word.text.split())
        lines.append(f"{name} 1 {word.start:.3f} {duration:.3f} {text} {word.confidence:.4f}\n")
    return "".join(lines)


def percent(character: str) -> str:
    """Writes %XX for each byte of the character, as on disk where a name is not UTF-8."""
    errors = "surrogateescape" if "\udc80" <= character <= "\udcff" else "surrogatepass"
    return quote(character.encode(errors=errors), safe="")


def as_srt(transcript: Transcript) -> str:
    """Writes SubRip, which cannot escape the arrow between its times: in a text it is \u2192."""
    parts = []
    for number, (start, end, text) in enumerate(cues(transcript.words), 1):
        text = text.replace("-->", "\u2192")
        parts.append(f"{number}\n{clock(start, ',')} --> {clock(end, ',')}\n{text}\n\n")
    return "".join(parts)


def as_vtt(transcript: Transcript) -> str:
    """Writes WebVTT."""
    parts = ["WEBVTT\n\n"]
    for start, end, text in cues(transcript.words):
        text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
        parts.append(f"{clock(start, '.')} --> {clock(end, '.')}\n{text}\n\n")
    return "".join(parts)


def printable(words: list[Word]) -> list[Word]:
    """Escapes the words by cli.shown, so that no word ends a line or a cue; drops blank words."""
    return [word._replace(text=shown(word.text, math.inf)) for word in words if word.text.strip()]


def clock(seconds: float, point: str) -> str:
    """Writes hh:mm:ss, then the format's decimal point, then milliseconds."""
    rest, ms = divmod(round(seconds * 1000), 1000)
    return f"{rest // 3600:02}:{rest // 60 % 60:02}:{rest % 60:02}{point}{ms:03}"


def cues(words: list[Word]) -> list[tuple[float, float, str]]:
    """Makes subtitles (start, end, text); each takes all words that fit, up to a pause."""
    groups = []
    for word in printable(words):
        group = groups[-1] if groups else []
        if (
            group
            and word.start - group[-1].end < PAUSE
            and word.end - group[0].start <= LONGEST_CUE
            and len(lines_of([*group, word])) <= LINES
        ):
            group.append(word)
        else:
            groups.append([word])
    limits = [group[0].start for group in groups[1:]] + [math.inf]
    subtitles = []
    for group, limit in zip(groups, limits):
        start = group[0].start
        end = min(max(group[-1].end, start + SHORTEST_CUE), limit)
        subtitles.append((start, end, "\n".join(lines_of(group))))
    return subtitles


def lines_of(words: list[Word]) -> list[str]:
    """Breaks words into lines of at most LINE columns; a longer word has a line of its own."""
    lines = [[]]
    for word in words:
        if lines[-1] and columns(text_of([*lines[-1], word])) > LINE:
            lines.append([])
        lines[-1].append(word)
    return [text_of(line) for line in lines]


def columns(text: str) -> int:
    """Counts a text's columns: a wide character (Chinese, Korean, emoji) has 2, a mark 0."""
    seen = [c for c in text if unicodedata.category(c) not in ("Mn", "Me", "Cf")]
    return sum(1 + (unicodedata.east_asian_width(c) in "WF") for c in seen)
