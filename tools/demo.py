"""The demo corpus: an hour of synthetic speech. Sentences of a small grammar, spoken by espeak-ng.

The speech is made anew on every machine with the library in the wheel espeakng-loader (GPL, loaded at run time, for
the demo only). It shows that everything works; its error rates say nothing about real speech.
"""

import ctypes
import os
import random
from itertools import takewhile
from typing import NamedTuple

from cli import UserError

import numpy as np

RATE = 22050  # Hz, what espeak-ng synthesises
WORD_GAP = (
    4  # pause between words, about 10 ms each; without it spelled letters run into each other
)

# Voice variants of espeak-ng. Left out: robots, whispers, croaks and heavy echoes; those whose breath is noise seeded
# by the clock (f2, f3, f5, Alicia, sandro, victor, ...); and, of near twins, the second. tests/test_demo.py compares
# two processes. A voice belongs to one split only.
VOICES = {
    "train": (
        "Alex Andrea Andy Denis Diogo Gene Gene2 Henrique Hugo Jacky Lee Marco Mario Michael Mike adam anika aunty "
        "benjamin boris david edward f1 grandma grandpa ian iven iven2 john kaukovalta linda m1 m2 m4 m5 m6 m8 "
        "marcelo max michel mike2 norbert pablo robert shelby steph travis"
    ).split(),
    "dev": "Nguyen ed gustave m3 rob".split(),
    "eval_clean": "Annie antonio f4 m7 paul quincy".split(),
}
UTTERANCES = {"train": 1150, "dev": 100, "eval_clean": 120}

DIGITS = "zero one two three four five six seven eight nine".split()
TEENS = "ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen".split()
TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
ORDINALS = "first second third fourth fifth sixth seventh eighth ninth tenth eleventh twelfth thirteenth".split()
DAYS = "monday tuesday wednesday thursday friday saturday sunday".split()
MONTHS = (
    "january february march april may june july august september october november december".split()
)
NAMES = (
    "anna ben carol david emma frank grace henry jack kate lucy max nora oscar paul quinn rose sam tom vera will "
    "alex zoe felix jenny bob peggy harry"
).split()
ROOMS = "kitchen bedroom garage garden hall office".split()
THINGS = "light heating radio fan television".split()
OPENINGS = "door window gate curtain".split()
MUSIC = "jazz rock folk music songs".split()


class Utterance(NamedTuple):
    """What is said and how: `spoken` goes to espeak-ng (letters to spell are capitals), `text` is its transcript."""

    spoken: str
    voice: str
    rate: int  # words per minute
    pitch: int  # espeak-ng's scale, 0 to 99

    @property
    def text(self) -> str:
        return self.spoken.lower()


def number(rng) -> str:
    """A number from 1 to 999 in words."""
    value = rng.choice([rng.randint(1, 19), rng.randint(20, 99), rng.randint(100, 999)])
    hundreds, rest = divmod(value, 100)
    words = [DIGITS[hundreds], "hundred"] if hundreds else []
    if hundreds and rest:
        words.append("and")
    if rest >= 20:
        words.append(TENS[rest // 10 - 2])
        rest %= 10
    if rest:
        words.append(DIGITS[rest] if rest < 10 else TEENS[rest - 10])
    return " ".join(words)


def command(rng) -> str:
    pick = rng.choice
    return pick(
        [
            f"turn {pick(['on', 'off'])} the {pick(THINGS)} in the {pick(ROOMS)}",
            f"please {pick(['open', 'close'])} the {pick(OPENINGS)} of the {pick(ROOMS)}",
            f"play some {pick(MUSIC)} for {pick(NAMES)} in the {pick(ROOMS)}",
            f"call {pick(NAMES)} {pick(['today', 'tomorrow'])} at {pick(DIGITS[1:] + TEENS[:3])} {pick(TENS[:4])}",
            f"set the {pick(THINGS)} to {number(rng)}",
        ]
    )


def numbers(rng) -> str:
    digits = " ".join(rng.choices(DIGITS, k=rng.randint(4, 7)))
    return rng.choice(
        [f"dial {digits}", f"the number is {digits}", f"add {number(rng)} and {number(rng)}"]
    )


def date(rng) -> str:
    day = f"the {rng.choice(ORDINALS)} of {rng.choice(MONTHS)}"
    year = f"{rng.choice(['nineteen', 'twenty'])} {rng.choice(TENS)} {rng.choice(DIGITS[1:])}"
    return rng.choice(
        [
            f"{day} {year}",
            f"the meeting is on {rng.choice(DAYS)} {day}",
            f"{rng.choice(NAMES)} was born on {day}",
        ]
    )


def spelling(rng) -> str:
    name = rng.choice(NAMES)
    code = " ".join(
        [*rng.sample("ABCDEFGHIJKLMNOPQRSTUVWXYZ", 3), *rng.choices(DIGITS, k=rng.randint(1, 3))]
    )
    letters = " ".join(name.upper())
    return rng.choice(
        [f"my name is {name} {letters}", f"{name} is spelled {letters}", f"the code is {code}"]
    )


def plan(split: str, count: int | None = None) -> list[Utterance]:
    """The first `count` utterances of a split (None: all). No sentence is in two splits, nor twice in one."""
    seen, result = set(), []
    for name, total in UTTERANCES.items():
        rng = random.Random(f"demo {name}")
        result = []
        while len(result) < total:
            spoken = rng.choice([command, command, numbers, date, spelling])(rng)
            voice = VOICES[name][len(result) % len(VOICES[name])]
            rate, pitch = rng.randint(135, 180), rng.randint(35, 65)
            if spoken not in seen:
                seen.add(spoken)
                result.append(Utterance(spoken, voice, rate, pitch))
        if name == split:
            return result[:count]
    raise UserError(f"the demo corpus has no split {split}; it has {', '.join(UTTERANCES)}")


class SpokenWord(NamedTuple):
    """What espeak-ng spoke as one word: a word of the transcript, or two that it runs together ("in the")."""

    text: str
    start: float  # seconds
    end: float  # where the pause behind it begins


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


WORD_EVENT, PHONEME_EVENT = 1, 7


def speak(utterance: Utterance) -> np.ndarray:
    """Waveform (N,) float32 in [-1, 1) at RATE Hz, a function of the utterance alone.

    espeak-ng keeps state from sentence to sentence (phases, flutter), so every sentence gets a freshly loaded library.
    Raises UserError when the library or a voice is missing.
    """
    return speak_with_words(utterance)[0]


def speak_with_words(utterance: Utterance) -> tuple[np.ndarray, list[SpokenWord]]:
    """The waveform of `speak`, and when each word is spoken, by espeak-ng's own account."""
    library, data_path = _load()
    text, blocks, events = _markup(utterance.spoken), [], []

    @ctypes.CFUNCTYPE(
        ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.POINTER(_Event)
    )
    def collect(samples, count, reported):
        if samples and count > 0:
            blocks.append(ctypes.string_at(samples, 2 * count))
        for event in takewhile(
            lambda event: event.type, reported
        ):  # an event of type 0 ends the list
            events.append((event.type, event.position, event.sample, event.phoneme))
        return 0

    try:
        if (
            library.espeak_Initialize(2, 0, data_path, 0x8001) != RATE
        ):  # 2: synthesise synchronously, 1: phoneme events
            raise UserError("espeak-ng did not start; reinstall the wheel espeakng-loader")
        if library.espeak_SetVoiceByName(f"en-us+{utterance.voice}".encode()) != 0:
            raise UserError(
                f"espeak-ng has no voice {utterance.voice}; reinstall the wheel espeakng-loader"
            )
        library.espeak_SetSynthCallback(collect)
        for parameter, value in ((1, utterance.rate), (3, utterance.pitch), (7, WORD_GAP)):
            library.espeak_SetParameter(parameter, value, 0)
        library.espeak_Synth(
            text, ctypes.c_size_t(len(text)), 0, 1, 0, 0x101, None, None
        )  # UTF-8, [[phonemes]]
        library.espeak_Synchronize()
        library.espeak_Terminate()
    finally:
        _unload(library)
    waveform = np.frombuffer(b"".join(blocks), np.int16).astype(np.float32) / 32768
    return waveform, _spoken_words(utterance, events, len(waveform))


def _spoken_words(utterance: Utterance, events: list[tuple], num_samples: int) -> list[SpokenWord]:
    """events: (type, position in the markup from 1, sample, phoneme), in order. Phonemes of pauses begin with "_"."""
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
    # A word belongs to the last event that is not behind it; where espeak-ng ran two together, only the first has one.
    texts, end = [[] for _ in starts], 0
    for word, marked in zip(utterance.text.split(), _markup(utterance.spoken)[:-1].split()):
        end += len(marked)
        texts[sum(events[i][1] <= end for i in starts) - 1].append(word)
        end += 1
    return [SpokenWord(" ".join(words), *span) for words, span in zip(texts, spans)]


def _markup(spoken: str) -> bytes:
    """What espeak-ng gets. The letter A alone would be read as the article; [['eI]] is its name in phonemes."""
    return " ".join("[['eI]]" if word == "A" else word for word in spoken.split()).encode() + b"\0"


def _load():
    """A library nobody has used yet, and where its data lies."""
    try:
        import espeakng_loader  # here, so that prepare.py --source works without it

        return ctypes.CDLL(
            espeakng_loader.get_library_path()
        ), espeakng_loader.get_data_path().encode()
    except (ImportError, OSError) as error:
        raise UserError(f"cannot load espeak-ng ({error}); pip install espeakng-loader") from None


def _unload(library) -> None:
    """Lets go of the library and its state. Where the system keeps it loaded, the fixed order keeps speech the same."""
    if os.name == "posix":
        ctypes.CDLL(None).dlclose(ctypes.c_void_p(library._handle))
