"""Makes the demo corpus, an hour of synthetic speech: python -m tools.demo --out data/demo_source

The command writes OUT/{train,dev,eval_clean}/metadata.csv (file_name, transcription, speaker)
beside wavs of 22.05 kHz and 16 bits. A corpus of your own has the same layout, and prepare.py
--source OUT reads both. A small grammar makes the sentences, and espeak-ng speaks them in the same
way on every machine. Its library comes with the wheel espeakng-loader (GPL, loaded at run time, for
the demo only). The demo shows that everything works; its error rates say nothing about real speech.
OUT appears when all of it is written, or not at all.

--texts FILE speaks a corpus's own words instead, into OUT/{train,dev}: the sentences of FILE, in
another order, and then new ones in which each word follows another as in FILE, until --hours or
--rows are reached. There are more accents, speeds and pauses than in the demo corpus.
"""

import csv
import io
import itertools
import math
import os
import random

from cli import UserError, build, make_parser, option, options_class, run, shown

import numpy as np
import soundfile
from tqdm import tqdm

from files import cannot_read, published, read_text, write_whole
from tools.speak import RATE, Utterance, speak

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
UTTERANCES = {"train": 1150, "dev": 100, "eval_clean": 120}
# The accents of --texts, half of them American. In the others of espeak-ng a letter may sound as
# another does in America (E as A), or a digit as few people say it.
ACCENTS = "en-us en-us en-us en-us en en-gb-x-rp en-gb-scotland en-gb-x-gbclan".split()
LARGEST_TEXT = 2**30  # bytes of --texts, some millions of sentences

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
        "utterances of a split, at most; a few are enough for a try. With --texts: of train",
        at_least=1,
        at_most=1_000_000,
    )
    texts: str | None = option(
        None, "metadata.csv or .jsonl, or a text of one sentence a line, whose words to speak"
    )
    hours: float | None = option(
        None, "of speech in train, with --texts (else: each text once)", above=0.0, at_most=1000.0
    )
    seed: int | None = option(
        None, "of the draws of --texts, 0 unless given", at_least=0, at_most=2**32
    )
    overwrite: bool = option(False, "replace what an earlier run left in --out")

    def __post_init__(self):
        if self.texts is None and (self.hours, self.seed) != (None, None):
            raise UserError("--hours and --seed have no effect without --texts")
        if None not in (self.hours, self.rows):
            raise UserError("give --hours or --rows, not both")


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
    """Returns the words of each sentence, and how many have neither letter nor digit.

    Those are left out. Raises UserError where the file has no words.
    """
    # espeak-ng would end at NUL, and take what lies between [[ and ]] for phonemes.
    texts = [text.replace("[[", " ").replace("\0", " ").split() for text in read_texts(path)]
    sentences = [[word for word in words if any(map(str.isalnum, word))] for words in texts]
    left_out = sum(map(len, texts)) - sum(map(len, sentences))
    if not any(sentences):
        raise UserError(f"{shown(path)} has no words; give sentences, one a line or row")
    return list(filter(None, sentences)), left_out


def read_texts(path: str) -> list[str]:
    """Returns the transcripts of a metadata file, or the lines of a text."""
    # The module imports datasets, which takes seconds, and the demo corpus needs none of it.
    from sources import read_csv, read_jsonl, string

    try:
        content = read_text(path, LARGEST_TEXT)
    except (OSError, ValueError) as error:
        raise cannot_read(f"--texts {path}", error, "give a text in UTF-8") from error
    read = {".csv": read_csv, ".jsonl": read_jsonl}.get(os.path.splitext(path)[1].lower())
    if read is None:
        return content.splitlines()
    columns, records = read(path, content)
    column = next((name for name in ("transcription", "text") if name in columns), None)
    if columns and column is None:
        there = shown(", ".join(columns))
        raise UserError(f"{shown(path)} has no column transcription or text, only {there}")
    return [string(record.get(column), path) for record in records]


def spelled(words: list[str]) -> str:
    """Returns the words for espeak-ng: letters to spell in capitals, all else in small letters.

    A single letter is spelled; but A, I and O beside longer words only are words.
    """
    single = [False, *(len(word) == 1 for word in words), False]
    return " ".join(
        word.upper()
        if here and (before or behind or len(words) == 1 or word not in "AaIiOo")
        else word.lower()
        for word, before, here, behind in zip(words, single, single[1:], single[2:])
    )


def new_sentences(sentences: list[list[str]], rng):
    """Yields sentences without end, each word drawn from those that follow the word before.

    None stands before the first word and behind the last. No sentence is longer than all given.
    """
    followers = {}
    for words in sentences:
        for word, follower in itertools.pairwise([None, *words, None]):
            followers.setdefault(word, []).append(follower)
    longest = 1 + max(map(len, sentences))
    while True:
        words = [None]
        while len(words) <= longest and (word := rng.choice(followers[words[-1]])) is not None:
            words.append(word)
        if len(words) <= longest:
            yield words[1:]


def spoken_texts(sentences: list[list[str]], split: str, seed: int):
    """Yields utterances without end: in train the sentences and then drawn ones, in dev drawn ones.

    Both splits have voices of their own.
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


# ---- Files


def write_wavs(folder: str, utterances, hours: float = math.inf) -> int:
    """Writes the wavs 0000.wav, 0001.wav, ... and metadata.csv into a new folder.

    The last utterance is the one that completes the `hours`. Returns how many there are.
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
    text = io.StringIO(newline="")
    csv.writer(text).writerows(table)
    write_whole(os.path.join(folder, "metadata.csv"), text.getvalue().encode())
    return len(table) - 1


def write_texts(folder: str, sentences: list[list[str]], options: DemoOptions) -> None:
    """Writes the splits train and dev, which has a twentieth of the rows, at most 100."""
    rows = options.rows or (None if options.hours else len(sentences))
    train, dev = (spoken_texts(sentences, split, options.seed or 0) for split in ("train", "dev"))
    train = itertools.islice(train, rows)
    count = write_wavs(os.path.join(folder, "train"), train, options.hours or math.inf)
    dev = itertools.islice(dev, min(max(count // 20, 1), UTTERANCES["dev"]))
    write_wavs(os.path.join(folder, "dev"), dev)


def main(argv: list[str]) -> None:
    options = build(DemoOptions, vars(make_parser(__doc__, DemoOptions).parse_args(argv)))
    sentences, left_out = read_sentences(options.texts) if options.texts else ([], 0)
    with published(options.out, "the demo corpus", options.overwrite) as folder:
        if sentences:
            write_texts(folder, sentences, options)
        else:
            for split in UTTERANCES:
                write_wavs(os.path.join(folder, split), plan(split, options.rows))
        splits = ", ".join(split for split in UTTERANCES if split in os.listdir(folder))
    if left_out:
        print(f"words without a letter or digit, left out: {left_out}")
    print(f"{shown(options.out)}: {splits}; next, prepare.py --source reads them")


if __name__ == "__main__":
    run(main)
