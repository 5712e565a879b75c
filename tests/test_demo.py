"""demo.py: the same speech in every process, whatever was spoken before; voices and sentences of one split only."""

import hashlib
import subprocess
import sys

import numpy as np
import pytest

import prepare
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


def test_prepare_writes_the_same_bytes_twice(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "UTTERANCES", {"train": 12, "dev": 2, "eval_clean": 2})
    digests = []
    for name in "ab":
        prepare.main(["--demo", "--data_root", str(tmp_path / name)])
        files = sorted(p for p in (tmp_path / name).rglob("*.arrow"))
        digests.append([hashlib.sha256(p.read_bytes()).hexdigest() for p in files])
    assert digests[0] == digests[1] and len(digests[0]) == 3
