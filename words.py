"""When each word was said and how sure the model is of it, and the formats that carry this: JSON, ctm, SubRip, WebVTT.

Times come from CTC: the tokens are aligned to the encoder's frames (decode.align), and a frame is a place in the recording
through what it sees of it. Axes: T encoder frames, V vocabulary. All times are in seconds.
"""

import json
import re
from collections.abc import Sequence
from typing import NamedTuple

import torch

import decode
from conformer import receptive_field
from tokenizer import UNKNOWN_MARK, Tokenizer
from transforms import Frontend

ALONE = re.compile("[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]")  # kana and Chinese characters
LINE, LINES = 42, 2  # a cue of subtitles: so many columns in so many lines,
LONGEST_CUE, SHORTEST_CUE = 7.0, 1.0  # so many seconds, and no less where the next leaves room;
PAUSE = 0.7  # a longer one ends it


class Word(NamedTuple):
    """A word of what was heard.

    confidence: the probability that CTC gives to the word's least likely token, at the frame where the alignment has it; in
    0 .. 1. Of 533 words heard in AN4's dev it tells right from wrong better than the tokens' mean does.
    """

    text: str
    start: float
    end: float
    confidence: float


class Transcript(NamedTuple):
    file: str
    text: str
    duration: float
    words: list[Word]


class FrameTimes(NamedTuple):
    """Encoder frame k sees the recording from k * shift to k * shift + field."""

    shift: float
    field: float


def frame_times(input_layer: str, frontend: Frontend) -> FrameTimes:
    field, rate = receptive_field(input_layer)
    return FrameTimes(rate * frontend.frame_shift / 1000, ((field - 1) * frontend.frame_shift + frontend.frame_length) / 1000)


def spell(tokens: list[int], tokenizer: Tokenizer) -> list[tuple[str, list[int]]]:
    """The words of a token sequence, each with the place in it of the token of each of its characters.

    Spaces part words, whichever way the tokenizer has them; in scripts that have none, a Chinese or Japanese character is a
    word of its own. Other scripts without spaces (Thai) come as long words.
    """
    words, inside = [], False
    for place, token in enumerate(tokens):
        if token in (tokenizer.blank_id, tokenizer.sos_id, tokenizer.eos_id):
            continue
        text = UNKNOWN_MARK if token == tokenizer.unk_id else tokenizer.tokens[token].replace(tokenizer.space, " ")
        for character in text:
            if character == " ":
                inside = False
                continue
            alone = bool(ALONE.match(character))
            if alone or not inside:
                words.append(("", []))
            so_far, places = words[-1]
            words[-1] = so_far + character, [*places, place]
            inside = not alone
    return words


def join(texts: Sequence[str]) -> str:
    """Words or longer texts in a row, with spaces between them save between two Chinese or Japanese characters."""
    joined = ""
    for text in filter(None, texts):
        close = joined and ALONE.match(joined[-1]) and ALONE.match(text[0])
        joined += text if close or not joined else f" {text}"
    return joined


def align_words(tokens: list[int], log_probs: torch.Tensor, tokenizer: Tokenizer, times: FrameTimes, offset: float = 0.0,
                delay: float = 0.0) -> list[Word]:
    """The words of `tokens`, which were heard in log_probs (T,V), of a piece that begins at `offset`.

    A word starts where the frame of its first token begins to see, and ends half a shift behind the middle of its last
    token's, but not after the next word's start: what align.py measures to be least wrong. `delay` is taken off both: a CTC
    that trains for long, above all a causal one, may wait for more of the word before it says so. Where the tokens have no
    CTC path (more of them than frames), every word has the whole piece and confidence 0.
    """
    spelled = spell(tokens, tokenizer)
    alone = decode.Hypothesis(tokens, 0.0, [], [tokens], [0.0], [[]])
    frames = decode.align(alone, log_probs, len(log_probs), tokenizer.blank_id).times
    if not frames:
        return [Word(text, offset, offset + len(log_probs) * times.shift, 0.0) for text, _ in spelled]
    probabilities = log_probs[frames, tokens].exp().tolist()
    behind = (times.field + times.shift) / 2 - delay
    words = [Word(text, offset + max(frames[places[0]] * times.shift - delay, 0.0),
                  offset + frames[places[-1]] * times.shift + behind, min(probabilities[place] for place in places))
             for text, places in spelled]
    limits = [word.start for word in words[1:]] + [float("inf")]
    return [word._replace(end=max(min(word.end, limit), word.start)) for word, limit in zip(words, limits)]


# ------------------------------------------------------------------------------------------------------------ formats


def as_json(transcript: Transcript) -> str:
    """One line: file, text, duration and words, each with word, start, end and confidence."""
    words = [{"word": word.text, "start": round(word.start, 3), "end": round(word.end, 3),
              "confidence": round(word.confidence, 4)} for word in transcript.words]
    fields = {**transcript._asdict(), "duration": round(transcript.duration, 3), "words": words}
    return json.dumps(fields, ensure_ascii=False) + "\n"


def as_ctm(transcript: Transcript) -> str:
    """A line per word: file, channel, start, duration, word, confidence (NIST's ctm). White space in `file` becomes _."""
    name = "_".join(transcript.file.split())
    return "".join(f"{name} 1 {word.start:.3f} {word.end - word.start:.3f} {word.text} {word.confidence:.4f}\n"
                   for word in transcript.words)


def as_srt(transcript: Transcript) -> str:
    """SubRip."""
    return "".join(f"{number}\n{clock(start, ',')} --> {clock(end, ',')}\n{text}\n\n"
                   for number, (start, end, text) in enumerate(cues(transcript.words), 1))


def as_vtt(transcript: Transcript) -> str:
    """WebVTT."""
    parts = ["WEBVTT\n\n"]
    for start, end, text in cues(transcript.words):
        text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
        parts.append(f"{clock(start, '.')} --> {clock(end, '.')}\n{text}\n\n")
    return "".join(parts)


def clock(seconds: float, point: str) -> str:
    """hh:mm:ss, the decimal point that the format wants, milliseconds."""
    rest, ms = divmod(round(seconds * 1000), 1000)
    return f"{rest // 3600:02}:{rest // 60 % 60:02}:{rest % 60:02}{point}{ms:03}"


def cues(words: list[Word]) -> list[tuple[float, float, str]]:
    """(start, end, text of at most LINES lines) of subtitles: as many words as there is room and time for, up to a pause."""
    groups = []
    for word in words:
        group = groups[-1] if groups else []
        if (group and word.start - group[-1].end < PAUSE and word.end - group[0].start <= LONGEST_CUE
                and len(lines_of([*group, word])) <= LINES):
            group.append(word)
        else:
            groups.append([word])
    limits = [group[0].start for group in groups[1:]] + [float("inf")]
    return [(group[0].start, max(group[-1].end, min(group[0].start + SHORTEST_CUE, limit)), "\n".join(lines_of(group)))
            for group, limit in zip(groups, limits)]


def lines_of(words: list[Word]) -> list[str]:
    """Lines of at most LINE columns, where no single word is longer; a Chinese or Japanese character takes two."""
    lines = [""]
    for word in words:
        longer = join([lines[-1], word.text])
        if lines[-1] and len(longer) + len(ALONE.findall(longer)) > LINE:
            lines.append(word.text)
        else:
            lines[-1] = longer
    return lines
