"""Makes the demo corpus, an hour of synthetic speech: python -m tools.demo --out data/demo_source

The command writes OUT/{train,dev,eval_clean}/metadata.csv (file_name, transcription, speaker)
beside wavs of 22.05 kHz and 16 bits. A corpus of your own has the same layout, and prepare.py
--source OUT reads both. A small grammar makes the sentences, and espeak-ng speaks them in the same
way on every machine. Its library comes with the wheel espeakng-loader (GPL, loaded at run time, for
the demo only). The demo shows that everything works; its error rates say nothing about real speech.
OUT appears when all of it is written, or not at all.

--texts FILE speaks the words of a corpus of your own instead, into OUT/{train,dev}: first the
sentences of FILE, then, until --hours or --rows are reached, new ones in which each word follows
another as in FILE.
"""

import ctypes
import io
import itertools
import math
import os
import random
from typing import NamedTuple

from cli import UserError, build, make_parser, option, options_class, run, shown

import numpy as np
import soundfile
from tqdm import tqdm

from files import csv_text, published, read_text, why, write_whole
from sources import read_csv

RATE = 22050  # Hz, what espeak-ng synthesises
# The pause between words, in units of about 10 ms. Without it spelled letters run into each other.
WORD_GAP = 4
# What espeak-ng says otherwise than people do, as phonemes. Alone, A would be the article.
SAID = {"A": "[['eI]]", "rubout": "[[r'VbaUt]]"}

# Voice variants of espeak-ng. A voice belongs to one split only. Robots, whispers, croaks, heavy
# echoes and the second of near twins are left out. So are voices whose breath is noise that the
# clock seeds (f2, f3, f5, Alicia, sandro, victor, ...); tests/test_demo.py compares two processes.
VOICES = {
    "train": (
        "Alex Andrea Andy Denis Diogo Gene Gene2 Henrique Hugo Jacky Lee Marco Mario Michael Mike "
        "adam anika aunty benjamin boris david edward f1 grandma grandpa ian iven iven2 john "
        "kaukovalta linda m1 m2 m4 m5 m6 m8 marcelo max michel mike2 norbert pablo robert shelby "
        "steph travis"
    ).split(),
    "dev": "Nguyen ed gustave m3 rob".split(),
    "eval_clean": "Annie antonio f4 m7 paul quincy".split(),
}
LARGEST_TEXT = 2**30  # bytes of --texts, some millions of sentences
UTTERANCES = {"train": 1150, "dev": 100, "eval_clean": 120}
# Of --texts. In the other accents of espeak-ng letters or digits sound like others (E like A), or
# as few people say them.
ACCENTS = "en-us en-us en-us en-us en en-gb-x-rp en-gb-scotland en-gb-x-gbclan".split()

DIGITS = "zero one two three four five six seven eight nine".split()
TEENS = "ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen".split()
TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
ORDINALS = (
    "first second third fourth fifth sixth seventh eighth ninth tenth eleventh twelfth thirteenth"
).split()
DAYS = "monday tuesday wednesday thursday friday saturday sunday".split()
MONTHS = (
    "january february march april may june july august september october november december".split()
)
NAMES = (
    "anna ben carol david emma frank grace henry jack kate lucy max nora oscar paul quinn rose sam "
    "tom vera will alex zoe felix jenny bob peggy harry"
).split()
ROOMS = "kitchen bedroom garage garden hall office".split()
THINGS = "light heating radio fan television".split()
OPENINGS = "door window gate curtain".split()
MUSIC = "jazz rock folk music songs".split()


@options_class
class DemoOptions:
    out: str = option("data/demo_source", "folder to make")
    rows: int | None = option(
        None,
        "utterances of a split, at most; a few are enough for a try; with --texts, of train",
        at_least=1,
        at_most=1_000_000,
    )
    texts: str | None = option(None, "metadata.csv, or a text of one sentence a line, to speak")
    hours: float | None = option(
        None, "of speech in train, for --texts; unless given, each text once", above=0, at_most=1000
    )
    seed: int | None = option(None, "other sentences for --texts", at_least=0, at_most=2**32)
    overwrite: bool = option(False, "replace what an earlier run left in --out")

    def __post_init__(self):
        if self.texts is None and (self.hours or self.seed) is not None:
            raise UserError("--hours and --seed have no effect without --texts")
        if None not in (self.hours, self.rows):
            raise UserError("give --hours or --rows, not both")


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


# ---- Sentences


def number_words(rng) -> str:
    """Draws a number from 1 to 999, in words."""
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


def order_sentence(rng) -> str:
    pick = rng.choice
    return pick(
        [
            f"turn {pick(['on', 'off'])} the {pick(THINGS)} in the {pick(ROOMS)}",
            f"please {pick(['open', 'close'])} the {pick(OPENINGS)} of the {pick(ROOMS)}",
            f"play some {pick(MUSIC)} for {pick(NAMES)} in the {pick(ROOMS)}",
            f"call {pick(NAMES)} {pick(['today', 'tomorrow'])} at {pick(DIGITS[1:] + TEENS[:3])} "
            f"{pick(TENS[:4])}",
            f"set the {pick(THINGS)} to {number_words(rng)}",
        ]
    )


def number_sentence(rng) -> str:
    digits = " ".join(rng.choices(DIGITS, k=rng.randint(4, 7)))
    return rng.choice(
        [
            f"dial {digits}",
            f"the number is {digits}",
            f"add {number_words(rng)} and {number_words(rng)}",
        ]
    )


def date_sentence(rng) -> str:
    day = f"the {rng.choice(ORDINALS)} of {rng.choice(MONTHS)}"
    year = f"{rng.choice(['nineteen', 'twenty'])} {rng.choice(TENS)} {rng.choice(DIGITS[1:])}"
    return rng.choice(
        [
            f"{day} {year}",
            f"the meeting is on {rng.choice(DAYS)} {day}",
            f"{rng.choice(NAMES)} was born on {day}",
        ]
    )


def spelling_sentence(rng) -> str:
    name = rng.choice(NAMES)
    letters = rng.sample("ABCDEFGHIJKLMNOPQRSTUVWXYZ", 3)
    code = " ".join([*letters, *rng.choices(DIGITS, k=rng.randint(1, 3))])
    spelled = " ".join(name.upper())
    return rng.choice(
        [f"my name is {name} {spelled}", f"{name} is spelled {spelled}", f"the code is {code}"]
    )


# Orders are twice as frequent as the others.
SENTENCES = [order_sentence, order_sentence, number_sentence, date_sentence, spelling_sentence]


def plan(split: str, count: int | None = None) -> list[Utterance]:
    """Returns the first `count` utterances of a split (None: all).

    No sentence is in two splits, nor twice in one. Raises UserError for a split that is none.
    """
    seen = set()
    for name, total in UTTERANCES.items():
        rng = random.Random(f"demo {name}")
        result = []
        while len(result) < total:
            spoken = rng.choice(SENTENCES)(rng)
            voice = VOICES[name][len(result) % len(VOICES[name])]
            rate = rng.randint(135, 180)
            pitch = rng.randint(35, 65)
            if spoken not in seen:
                seen.add(spoken)
                result.append(Utterance(spoken, voice, rate, pitch))
        if name == split:
            return result[:count]
    raise UserError(f"the demo corpus has no split {split}; it has {', '.join(UTTERANCES)}")


# ---- Sentences of a corpus of one's own


def read_sentences(path: str) -> tuple[list[list[str]], int]:
    """Returns the sentences as words, and how many words were left out for want of letters.

    Raises UserError where nothing can be read.
    """
    try:
        content = read_text(path, LARGEST_TEXT)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {shown(path)}: {why(error)}; give a text in UTF-8") from None
    texts = content.splitlines()
    if path.lower().endswith(".csv"):
        columns, records = read_csv(path, content)
        column = next((name for name in ("transcription", "text") if name in columns), None)
        if column is None:
            raise UserError(
                f"{shown(path)} has no column transcription or text; its columns are "
                f"{shown(', '.join(columns))}"
            )
        texts = [record[column] or "" for record in records]
    # espeak-ng would take what lies between [[ and ]] for phonemes.
    texts = [text.replace("[[", " ").replace("\0", " ").split() for text in texts]
    sentences = [[word for word in text if any(map(str.isalnum, word))] for text in texts]
    left_out = sum(map(len, texts)) - sum(map(len, sentences))
    if not any(sentences):
        raise UserError(f"{shown(path)} has no words; give a text with one sentence a line")
    return list(filter(None, sentences)), left_out


def spelled(words: list[str]) -> str:
    """Returns the words for espeak-ng: letters to spell in capitals, all else in small letters.

    A, I and O between longer words are words; next to other letters, or alone, they are letters.
    """

    def is_letter(i: int) -> bool:
        return 0 <= i < len(words) and len(words[i]) == 1

    return " ".join(
        word.upper()
        if is_letter(i)
        and (word not in "AaIiOo" or is_letter(i - 1) or is_letter(i + 1) or len(words) == 1)
        else word.lower()
        for i, word in enumerate(words)
    )


def new_sentences(sentences: list[list[str]], rng):
    """Yields sentences without end, whose neighbouring words are neighbours in `sentences`.

    None stands for the begin and the end of a sentence. No new sentence is longer than all given.
    """
    followers = {}
    for words in sentences:
        for word, follower in itertools.pairwise([None, *words, None]):
            followers.setdefault(word, []).append(follower)
    longest = max(map(len, sentences))
    while True:
        words = []
        while len(words) <= longest and (word := rng.choice(followers[[None, *words][-1]])):
            words.append(word)
        if len(words) <= longest:
            yield words


def spoken_texts(sentences: list[list[str]], split: str, seed: int):
    """Yields utterances without end: those of train are all the sentences, then new ones.

    Those of dev are new ones, by voices that train has not.
    """
    rng = random.Random(f"texts {split} {seed}")
    given = rng.sample(sentences, len(sentences)) if split == "train" else []
    voices = rng.sample(VOICES[split], len(VOICES[split]))
    for i, words in enumerate(itertools.chain(given, new_sentences(sentences, rng))):
        yield Utterance(
            spelled(words),
            voices[i % len(voices)],
            rate=rng.randint(110, 200),
            pitch=rng.randint(20, 80),
            accent=rng.choice(ACCENTS),
            word_gap=rng.randint(1, 20),
            silence=(rng.uniform(0.1, 0.5), rng.uniform(0.1, 0.5)),
            written=" ".join(words),
        )


# ---- Speech


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


# ---- Files


def write_wavs(folder: str, utterances, hours: float = math.inf) -> int:
    """Writes the wavs 0000.wav, 0001.wav, ... and metadata.csv into a new folder.

    Returns how many utterances there are. They end with the one that completes the `hours`.
    """
    os.makedirs(folder)
    num_samples = 0
    table = [("file_name", "transcription", "speaker")]
    bar = tqdm(utterances, desc=os.path.basename(folder), unit=" utterances", disable=None)
    for i, utterance in enumerate(bar):
        samples = (32768 * speak(utterance)).astype(np.int16)  # which espeak-ng gave, to the bit
        samples = np.pad(samples, [round(seconds * RATE) for seconds in utterance.silence])
        content = io.BytesIO()
        soundfile.write(content, samples, RATE, "PCM_16", format="WAV")
        table.append((f"{i:04d}.wav", utterance.text, utterance.voice))
        with open(os.path.join(folder, table[-1][0]), "wb") as file:
            file.write(content.getvalue())
        num_samples += len(samples)
        if num_samples >= hours * 3600 * RATE:
            break
    write_whole(os.path.join(folder, "metadata.csv"), csv_text(table).encode())
    return len(table) - 1


def write_texts(folder: str, options: DemoOptions) -> str:
    """Writes the splits train and dev, and returns a note on what was left out."""
    sentences, left_out = read_sentences(options.texts)
    rows = options.rows or (None if options.hours else len(sentences))
    train, dev = (spoken_texts(sentences, split, options.seed or 0) for split in ("train", "dev"))
    train = itertools.islice(train, rows)
    count = write_wavs(os.path.join(folder, "train"), train, options.hours or math.inf)
    dev = itertools.islice(dev, min(max(count // 20, 1), UTTERANCES["dev"]))
    write_wavs(os.path.join(folder, "dev"), dev)
    return f" ({left_out} words without letters were left out)" if left_out else ""


def main(argv: list[str]) -> None:
    options = build(DemoOptions, vars(make_parser(__doc__, DemoOptions).parse_args(argv)))
    note, splits = "", UTTERANCES
    with published(options.out, "the demo corpus", options.overwrite) as folder:
        if options.texts is None:
            for split in UTTERANCES:
                write_wavs(os.path.join(folder, split), plan(split, options.rows))
        else:
            note, splits = write_texts(folder, options), ("train", "dev")
    print(f"{shown(options.out)}: {', '.join(splits)}{note}; next, prepare.py --source reads them")


if __name__ == "__main__":
    run(main)
