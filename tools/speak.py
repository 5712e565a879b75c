"""Speaks sentences with espeak-ng, in the same way on every machine and in every process.

espeak-ng's library comes with the wheel espeakng-loader (GPL, loaded at run time).
"""

import ctypes
import itertools
import os
from typing import NamedTuple

from cli import UserError

import numpy as np

RATE = 22050  # Hz, what espeak-ng synthesises
# The pause between words, in units of about 10 ms. Without it spelled letters run into each other.
WORD_GAP = 4
# What espeak-ng says otherwise than people do, as phonemes. Alone, A would be the article.
SAID = {"A": "[['eI]]", "rubout": "[[r'VbaUt]]"}


class Utterance(NamedTuple):
    """Holds a sentence and its speaker.

    `spoken` goes to espeak-ng, with letters to spell in capitals; `text` is the transcript.
    """

    spoken: str
    voice: str
    rate: int  # words per minute
    pitch: int  # espeak-ng's scale, 0 to 99
    accent: str = "en-us"
    word_gap: int = WORD_GAP
    silence: tuple[float, float] = (0.0, 0.0)  # seconds before and after the speech
    written: str | None = None  # the transcript, where its case is another

    @property
    def text(self) -> str:
        return self.written or self.spoken.lower()


class SpokenWord(NamedTuple):
    """Holds what espeak-ng speaks as one word: one word of the text, or two, such as "in the"."""

    text: str
    start: float  # seconds
    end: float  # where the pause behind the word begins


class _Event(ctypes.Structure):  # espeak_EVENT
    _fields_ = [
        ("type", ctypes.c_int),
        ("identifier", ctypes.c_uint),
        ("position", ctypes.c_int),
        ("length", ctypes.c_int),
        ("milliseconds", ctypes.c_int),
        ("sample", ctypes.c_int),
        ("user_data", ctypes.c_void_p),
        ("phoneme", ctypes.c_char * 8),
    ]


WORD_EVENT, PHONEME_EVENT = 1, 7  # values of _Event.type


def speak(utterance: Utterance) -> np.ndarray:
    """Returns the waveform (N,) float32 in [-1, 1) at RATE Hz, a function of the utterance alone.

    espeak-ng keeps state from sentence to sentence (phases, flutter), so every sentence gets a
    freshly loaded library. Raises UserError when the library or a voice is missing.
    """
    return speak_with_words(utterance)[0]


def speak_with_words(utterance: Utterance) -> tuple[np.ndarray, list[SpokenWord]]:
    """Returns the waveform of `speak`, and when each word is spoken, as espeak-ng reports it."""
    library, data_path = _load()
    text = _markup(utterance.spoken)
    blocks = []
    events = []

    @ctypes.CFUNCTYPE(
        ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.POINTER(_Event)
    )
    def collect(samples, count, reported):
        if samples and count > 0:
            blocks.append(ctypes.string_at(samples, 2 * count))
        # An event of type 0 ends the list.
        for event in itertools.takewhile(lambda event: event.type, reported):
            events.append((event.type, event.position, event.sample, event.phoneme))
        return 0

    try:
        # 2: espeak-ng synthesises within the call; 0x8001: it reports phonemes, and does not exit.
        if library.espeak_Initialize(2, 0, data_path, 0x8001) != RATE:
            raise UserError("espeak-ng did not start; reinstall the wheel espeakng-loader")
        # Where a variant is missing, espeak-ng would take the plain voice and say nothing.
        variant = os.path.join(data_path, b"voices", b"!v", utterance.voice.encode())
        named = library.espeak_SetVoiceByName(f"{utterance.accent}+{utterance.voice}".encode())
        if named != 0 or not os.path.exists(variant):
            raise UserError(
                f"espeak-ng has no voice {utterance.voice}; reinstall the wheel espeakng-loader"
            )
        library.espeak_SetSynthCallback(collect)
        for parameter, value in (
            (1, utterance.rate),
            (3, utterance.pitch),
            (7, utterance.word_gap),
        ):
            library.espeak_SetParameter(parameter, value, 0)
        # 0x101: the text is in UTF-8, and [[...]] in it are phonemes.
        library.espeak_Synth(text, ctypes.c_size_t(len(text)), 0, 1, 0, 0x101, None, None)
        library.espeak_Synchronize()
        library.espeak_Terminate()
    finally:
        _unload(library)
    waveform = np.frombuffer(b"".join(blocks), np.int16).astype(np.float32) / 32768
    return waveform, _spoken_words(utterance, events, len(waveform))


def _spoken_words(utterance: Utterance, events: list[tuple], num_samples: int) -> list[SpokenWord]:
    """Returns the words that espeak-ng's events tell of.

    events: (type, position in the markup from 1, sample, phoneme), in order. The phonemes of pauses
    begin with "_".
    """
    starts = [i for i, event in enumerate(events) if event[0] == WORD_EVENT]
    spans = []
    for first, behind in zip(starts, [*starts[1:], len(events)]):
        pauses = [
            sample
            for kind, _, sample, phoneme in events[first:behind]
            if kind == PHONEME_EVENT and phoneme[:1] == b"_"
        ]
        limit = events[behind][2] if behind < len(events) else num_samples
        spans.append((events[first][2] / RATE, min([*pauses, limit]) / RATE))
    if not starts:  # a sign that espeak-ng does not speak
        return []
    # A word belongs to the last event that does not lie behind it: of two words that espeak-ng runs
    # together, only the first has an event.
    texts = [[] for _ in starts]
    end = 0
    for word, marked in zip(utterance.text.split(), _markup(utterance.spoken)[:-1].split()):
        end += len(marked)
        texts[sum(events[i][1] <= end for i in starts) - 1].append(word)
        end += 1
    return [SpokenWord(" ".join(words), *span) for words, span in zip(texts, spans)]


def _markup(spoken: str) -> bytes:
    """Returns the text for espeak-ng, ended by NUL. In [[ ]] are phonemes."""
    return " ".join(SAID.get(word, word) for word in spoken.split()).encode() + b"\0"


def _load():
    """Returns a library that nobody has used yet, and the path of its data."""
    try:
        import espeakng_loader  # The wheel is missing where nobody needs the demo.

        library = ctypes.CDLL(espeakng_loader.get_library_path())
        return library, espeakng_loader.get_data_path().encode()
    except (ImportError, OSError) as error:
        raise UserError(f"cannot load espeak-ng ({error}); pip install espeakng-loader") from None


def _unload(library) -> None:
    """Lets go of the library and its state.

    Where the system keeps the library loaded, the fixed order of sentences keeps speech the same.
    """
    if os.name == "posix":
        ctypes.CDLL(None).dlclose(ctypes.c_void_p(library._handle))
