"""tools/demo.py speaks the same in every process, whatever it spoke before.

Each voice and each sentence belongs to one split. prepare.py reads the corpus as any other.
"""

import hashlib
import subprocess
import sys
from types import SimpleNamespace

from cli import UserError

import datasets
import numpy as np
import pytest

import prepare
from audio import resample
from helpers import ROOT
from tools import demo

pytest.importorskip("espeakng_loader", reason="the wheel espeakng-loader is not installed")

HASH = """
import sys, hashlib
from tools import demo
order = [u for split in demo.UTTERANCES for u in demo.plan(split, len(demo.VOICES[split]))]
for u in order[::int(sys.argv[1])]:
    print(u.voice, hashlib.sha256(demo.speak(u).tobytes()).hexdigest())
"""


def hashes(order):
    result = subprocess.run(
        [sys.executable, "-c", HASH, order], capture_output=True, text=True, check=True, cwd=ROOT
    )
    return dict(line.split() for line in result.stdout.splitlines())


def test_every_voice_is_the_same_in_two_processes_and_after_other_sentences():
    forward, backward = hashes("1"), hashes("-1")
    assert len(forward) == sum(map(len, demo.VOICES.values())) == len(set(forward.values()))
    assert forward == backward


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
    waves = [demo.speak(u) for u in utterances]
    for utterance, wave in zip(utterances, waves):
        assert wave.dtype == np.float32 and 0.05 < np.abs(wave).max() <= 1.0, utterance
        assert 0.8 < len(wave) / demo.RATE < 6.0, utterance
    total = np.mean([len(w) for w in waves]) / demo.RATE * sum(demo.UTTERANCES.values())
    assert 50 * 60 < total < 70 * 60


def test_the_letter_a_is_spoken_and_rate_and_pitch_matter():
    base = demo.Utterance("my name is anna A N N A", "m1", 150, 50)
    assert (
        len(demo.speak(base))
        > len(demo.speak(base._replace(spoken="my name is anna N N"))) + 0.25 * demo.RATE
    )
    assert len(demo.speak(base)) > len(demo.speak(base._replace(rate=175)))
    assert not np.array_equal(demo.speak(base), demo.speak(base._replace(pitch=60)))


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
            expected = resample(demo.speak(utterance), demo.RATE)
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
