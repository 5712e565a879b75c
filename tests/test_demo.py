"""tools/demo.py speaks the same in every process, whatever it spoke before.

Each voice and each sentence belongs to one split. prepare.py reads the corpus as any other. With
--texts the words and their neighbours are those of a corpus of one's own.
"""

import csv
import hashlib
import subprocess
import sys
from itertools import islice, pairwise
from types import SimpleNamespace

from cli import UserError

import datasets
import numpy as np
import pytest
import soundfile

import prepare
from audio import resample
from helpers import ROOT
from tools import demo
from tools.speak import RATE, Utterance, speak, speak_with_words

pytest.importorskip("espeakng_loader", reason="the wheel espeakng-loader is not installed")

HASH = """
import itertools, sys, hashlib
from tools import demo
from tools.speak import speak
order = [u for split in demo.UTTERANCES for u in demo.plan(split, len(demo.VOICES[split]))]
texts = demo.spoken_texts([["half", "A", "third", "rubout"]], "train", 0)
order += itertools.islice(texts, len(demo.VOICES["train"]))
for i, u in list(enumerate(order))[::int(sys.argv[1])]:
    digest = hashlib.sha256(speak(u).tobytes()).hexdigest()
    print(f"{i}/{u.voice}/{u.accent}", digest)
"""


def hashes(order):
    result = subprocess.run(
        [sys.executable, "-c", HASH, order], capture_output=True, text=True, check=True, cwd=ROOT
    )
    return dict(line.split() for line in result.stdout.splitlines())


def test_every_voice_is_the_same_in_two_processes_and_after_other_sentences():
    forward, backward = hashes("1"), hashes("-1")
    spoken = sum(map(len, demo.VOICES.values())) + len(demo.VOICES["train"])
    assert len(forward) == spoken == len(set(forward.values()))
    assert {speaker.split("/")[2] for speaker in forward} == set(demo.ACCENTS)
    assert forward == backward


def test_the_demo_corpus_stays_what_the_documented_figures_were_measured_on():
    plans = [u for split in demo.UTTERANCES for u in demo.plan(split)]
    said = repr([(u.spoken, u.text, u.voice, u.rate, u.pitch) for u in plans]).encode()
    assert hashlib.sha256(said).hexdigest().startswith("e2432c2bd71a07d8")
    assert {u[4:] for u in plans} == {("en-us", 4, (0.0, 0.0), None)}


def test_no_voice_and_no_sentence_is_in_two_splits():
    voices = [voice for names in demo.VOICES.values() for voice in names]
    assert len(voices) == len(set(voices))
    plans = {split: demo.plan(split) for split in demo.UTTERANCES}
    sentences = [u.spoken for plan in plans.values() for u in plan]
    assert len(sentences) == len(set(sentences))
    for split, plan in plans.items():
        assert len(plan) == demo.UTTERANCES[split] and {u.voice for u in plan} == set(
            demo.VOICES[split]
        )


def test_the_test_splits_hold_no_word_that_training_lacks():
    words = {
        split: {w for u in demo.plan(split) for w in u.text.split()} for split in demo.UTTERANCES
    }
    assert words["dev"] | words["eval_clean"] <= words["train"]
    assert all(text == text.lower() for text in words["train"])


def test_speech_is_neither_silent_nor_clipped_and_of_the_promised_length():
    utterances = [u for split in demo.UTTERANCES for u in demo.plan(split)][::23]
    waves = [speak(u) for u in utterances]
    for utterance, wave in zip(utterances, waves):
        assert wave.dtype == np.float32 and 0.05 < np.abs(wave).max() <= 1.0, utterance
        assert 0.8 < len(wave) / RATE < 6.0, utterance
    total = np.mean([len(w) for w in waves]) / RATE * sum(demo.UTTERANCES.values())
    assert 50 * 60 < total < 70 * 60


def test_the_letter_a_is_spoken_and_rate_and_pitch_matter():
    base = Utterance("my name is anna A N N A", "m1", 150, 50)
    assert len(speak(base)) > len(speak(base._replace(spoken="my name is anna N N"))) + 0.25 * RATE
    assert len(speak(base)) > len(speak(base._replace(rate=175)))
    assert not np.array_equal(speak(base), speak(base._replace(pitch=60)))


@pytest.fixture
def few(monkeypatch):
    monkeypatch.setattr(demo, "UTTERANCES", {"train": 12, "dev": 2, "eval_clean": 2})


def hash_of(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_prepare_writes_the_same_bytes_twice(few, tmp_path):
    digests = []
    for name in "ab":
        demo.main(["--out", str(tmp_path / f"{name} source")])
        sources = sorted(p for p in (tmp_path / f"{name} source").rglob("*") if p.is_file())
        prepare.main(
            ["--source", str(tmp_path / f"{name} source"), "--data_root", str(tmp_path / name)]
        )
        files = sorted(p for p in (tmp_path / name).rglob("*.arrow"))
        digests.append([hash_of(path) for path in [*sources, *files]])
    assert digests[0] == digests[1] and len(digests[0]) == 16 + 3 + 1 + 3


def test_prepare_reads_every_utterance_as_it_was_spoken(few, tmp_path):
    """The samples equal, to the bit, the waveform resampled as a whole."""
    demo.main(["--out", str(tmp_path / "source"), "--rows", "3"])
    prepare.main(["--source", str(tmp_path / "source"), "--data_root", str(tmp_path / "root")])
    for split, total in demo.UTTERANCES.items():
        rows = datasets.load_from_disk(str(tmp_path / "root" / split / "0")).with_format("numpy")
        assert len(rows) == min(total, 3)
        for row, utterance in zip(rows, demo.plan(split)):
            assert (row["text"], row["speaker"]) == (utterance.text, utterance.voice)
            expected = resample(speak(utterance), RATE)
            np.testing.assert_array_equal(row["input_values"], expected)


def test_the_corpus_is_replaced_only_when_asked(few, tmp_path):
    words = ["--out", str(tmp_path / "source"), "--rows"]
    demo.main([*words, "1"])
    before = {path: hash_of(path) for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match="source exists; name another folder, or add --overwrite"):
        demo.main([*words, "2"])
    assert {path: hash_of(path) for path in tmp_path.rglob("*") if path.is_file()} == before
    demo.main([*words, "2", "--overwrite"])
    assert sorted(path.name for path in (tmp_path / "source/dev").iterdir()) == [
        "0000.wav",
        "0001.wav",
        "metadata.csv",
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize(
    "wheel, message",
    [
        (None, "cannot load espeak-ng .*; pip install espeakng-loader"),
        (SimpleNamespace(get_library_path=lambda: "gone.so"), "cannot load espeak-ng .gone.so"),
    ],
)
def test_without_the_wheel_there_is_one_line_and_no_folder(wheel, message, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "espeakng_loader", wheel)
    with pytest.raises(UserError, match=message):
        demo.main(["--out", str(tmp_path / "source")])
    assert not list(tmp_path.iterdir())


def test_what_goes_wrong_half_way_leaves_nothing(few, monkeypatch, tmp_path):
    voices = {**demo.VOICES, "eval_clean": ["nobody"]}
    monkeypatch.setattr(demo, "VOICES", voices)
    with pytest.raises(UserError, match="espeak-ng has no voice nobody"):
        demo.main(["--out", str(tmp_path / "source")])
    assert not list(tmp_path.iterdir())


# --texts

SENTENCES = ["ENTER FIVE", "PITTSBURGH P I T T", "I SEE A HOUSE", "RUBOUT A B OH SIX", "A", "5 o'c"]
WORDS = [text.split() for text in SENTENCES]


@pytest.mark.parametrize(
    "written, spoken",
    [
        ("PITTSBURGH P I T T", "pittsburgh P I T T"),
        ("I SEE A HOUSE", "i see a house"),
        ("A B AND A CODE", "A B and a code"),
        ("ERASE W FIVE o i", "erase W five O I"),
        ("A", "A"),
        ("it's u", "it's U"),
    ],
)
def test_letters_are_spelled_where_they_are_no_words(written, spoken):
    assert demo.spelled(written.split()) == spoken


def test_new_sentences_have_the_words_and_neighbours_of_the_texts():
    utterances = list(islice(demo.spoken_texts(WORDS, "train", 0), 200))
    texts = [u.text for u in utterances]
    assert sorted(texts[: len(WORDS)]) == sorted(SENTENCES)
    pairs = {pair for words in WORDS for pair in pairwise([None, *words, None])}
    new = [text.split() for text in texts]
    assert {pair for words in new for pair in pairwise([None, *words, None])} == pairs
    assert set(texts) > set(SENTENCES) and max(map(len, new)) == max(map(len, WORDS))
    assert {u.voice for u in utterances} == set(demo.VOICES["train"])
    dev = list(islice(demo.spoken_texts(WORDS, "dev", 0), 20))
    assert {u.voice for u in dev} == set(demo.VOICES["dev"])
    assert list(islice(demo.spoken_texts(WORDS, "train", 0), 200)) == utterances
    other = list(islice(demo.spoken_texts(WORDS, "train", 1), 200))
    assert [u.text for u in other] != texts


def read_wavs(folder):
    """The waveforms of a split, in the order of its metadata.csv, which names no others."""
    with open(folder / "metadata.csv", newline="") as file:
        names = [row["file_name"] for row in csv.DictReader(file)]
    assert sorted([*names, "metadata.csv"]) == sorted(path.name for path in folder.iterdir())
    return [soundfile.read(folder / name)[0] for name in names]


@pytest.mark.parametrize("name", ["metadata.csv", "metadata.jsonl", "texts.txt"])
def test_texts_are_read_from_a_table_or_from_lines(name, tmp_path, capsys):
    (tmp_path / name).write_text(
        {
            "metadata.csv": "file_name,text\na.wav,HELP ME -\nb.wav,\nc.wav,?! A B\n",
            "metadata.jsonl": '{"text": "HELP ME -"}\n{"text": null}\n{"text": "?! A B"}\n',
            "texts.txt": "HELP ME -\n\n?! A B\n",
        }[name]
    )
    demo.main(["--texts", str(tmp_path / name), "--out", str(tmp_path / "out")])
    assert capsys.readouterr().out.startswith("words without a letter or digit, left out: 2\n")
    table = (tmp_path / "out/train/metadata.csv").read_text()
    assert "HELP ME," in table and "A B," in table and len(table.splitlines()) == 3
    assert len(read_wavs(tmp_path / "out/dev")) == 1


def test_nan_is_no_text_and_a_list_is_refused(tmp_path):
    path = tmp_path / "texts.jsonl"
    path.write_text('{"text": NaN}\n{"text": "one"}\n')
    assert demo.read_texts(str(path)) == ["", "one"]
    path.write_text('{"text": ["one", "two"]}\n')
    with pytest.raises(UserError, match="a list is neither text nor speaker"):
        demo.read_texts(str(path))


def test_a_transcript_is_what_was_said_also_where_a_spreadsheet_would_compute(tmp_path):
    said = ["-5 degrees", "=hello", "@home, we rest", '"quoted"']
    (tmp_path / "texts.txt").write_text("\n".join(said))
    demo.main(["--texts", str(tmp_path / "texts.txt"), "--out", str(tmp_path / "out")])
    with open(tmp_path / "out/train/metadata.csv", newline="") as file:
        assert sorted(row["transcription"] for row in csv.DictReader(file)) == sorted(said)


def test_train_has_as_many_rows_or_hours_as_asked_and_pauses_at_its_ends(tmp_path):
    (tmp_path / "texts.txt").write_text("\n".join(SENTENCES))
    words = ["--texts", str(tmp_path / "texts.txt"), "--out"]
    demo.main([*words, str(tmp_path / "rows"), "--rows", "21", "--seed", "3"])
    assert [len(read_wavs(tmp_path / "rows" / split)) for split in ("train", "dev")] == [21, 1]
    demo.main([*words, str(tmp_path / "hours"), "--hours", "0.01", "--seed", "3"])
    waves = read_wavs(tmp_path / "hours/train")
    seconds = [len(wave) / RATE for wave in waves]
    assert sum(seconds[:-1]) < 36 <= sum(seconds)
    pauses = [(np.flatnonzero(wave)[0] / RATE, wave[-int(0.1 * RATE) :].any()) for wave in waves]
    assert all(0.099 < before < 0.6 and not behind for before, behind in pauses)
    assert len({round(before, 1) for before, _ in pauses}) > 2
    for one, other in zip(waves, read_wavs(tmp_path / "rows/train")):
        np.testing.assert_array_equal(one, other)


def test_a_sign_that_espeak_does_not_speak_has_no_words():
    assert speak_with_words(Utterance("\u2474", "m1", 150, 50))[1] == []


@pytest.mark.parametrize(
    "content, flags, message",
    [
        ("", [], "texts.csv has no words; give sentences"),
        ("file_name,text\na.wav,?!\n", [], "texts.csv has no words; give sentences"),
        ("file_name,words\na.wav,yes\n", [], "no column transcription or text, only file_name, w"),
        (None, [], "texts.csv: cannot be read .No such file"),
        ("text\nyes\n", ["--rows", "1", "--hours", "1"], "give --hours or --rows, not both"),
    ],
)
def test_texts_of_no_use_are_one_line_and_make_no_folder(content, flags, message, tmp_path):
    if content is not None:
        (tmp_path / "texts.csv").write_text(content)
    words = ["--texts", str(tmp_path / "texts.csv"), "--out", str(tmp_path / "out"), *flags]
    with pytest.raises(UserError, match=message):
        demo.main(words)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("flag", ["--hours", "--seed"])
def test_flags_of_texts_have_no_effect_on_the_demo_corpus(flag, tmp_path):
    with pytest.raises(UserError, match="have no effect without --texts"):
        demo.main(["--out", str(tmp_path / "out"), flag, "1"])
