"""Noise and rooms on their way from folders of recordings to examples: prepare.py, train.py."""

import json
import os
import pickle

from cli import UserError

import numpy as np
import pytest
import soundfile
import torch

import prepare
from datamodule import DataOptions, SpeechDataModule, load_sounds
from helpers import noise, one_line, tree
from helpers_train import run
from tokenizer import load_tokenizer
from transforms import Augment, Frontend

FRONTEND = Frontend()


@pytest.fixture(scope="module")
def recordings(tmp_path_factory):
    """Five usable sounds of several formats and rates, a silent one, and a file of another kind."""
    folder = tmp_path_factory.mktemp("recordings")
    (folder / "far").mkdir()
    for name, rate, samples in (
        ("a.wav", 16000, 16000),
        ("far/b.flac", 8000, 4000),
        ("far/c.ogg", 44100, 22050),
        ("d.WAV", 16000, 1),
        ("long.wav", 16000, 170000),
    ):
        soundfile.write(folder / name, 0.1 * noise(samples, 2).numpy(), rate)
    impulse = np.zeros(30000, np.float32)
    impulse[200] = 0.5
    soundfile.write(folder / "impulse.wav", impulse, 16000, subtype="FLOAT")
    soundfile.write(folder / "silent.wav", np.zeros(900), 16000)
    (folder / "list.txt").write_text("a.wav")
    return folder


@pytest.fixture(scope="module")
def sounds(recordings, tmp_path_factory):
    """What prepare.py makes of the recordings, as noise and as rooms."""
    root = tmp_path_factory.mktemp("sounds") / "root"
    words = ["--noise", recordings, "--rir", recordings, "--data_root", root, "--shard_rows", 2]
    prepare.main(list(map(str, words)))
    return root


def test_a_folder_of_recordings_becomes_shards_at_one_rate(sounds, recordings, capsys):
    noises, rirs = (load_sounds(kind, [str(sounds)], FRONTEND) for kind in ("noise", "rir"))
    assert list(map(len, noises)) == [16000, 1, 8000, 8000, 170000]
    assert list(map(len, rirs)) == [16000, 1, 8000, 8000, 30000]
    assert rirs[4].argmax() == 200
    rejected = (sounds / "rejected.csv").read_text()
    assert 'noise,impulse.wav,"silent: ' in rejected and 'rir,long.wav,"longer than 10' in rejected
    assert rejected.count("silent.wav,silent: all samples are 0") == 2
    before = tree(sounds)
    argv = ["--noise", str(recordings), "--data_root", str(sounds)]
    with pytest.raises(UserError, match="--overwrite"):
        prepare.main(argv)
    assert tree(sounds) == before
    prepare.main([*argv[:-1], str(sounds.parent / "slow"), "--sample_rate", "8000"])
    said = capsys.readouterr().out
    assert "not read: list.txt" in said and "kept 5 rows, rejected 2 rows" in said
    with pytest.raises(UserError, match="8000 samples per second, the model hears 16000"):
        load_sounds("noise", [str(sounds.parent / "slow")], FRONTEND)


def test_sounds_are_read_from_the_disk_and_no_process_gets_a_copy(sounds):
    noises = load_sounds("noise", [str(sounds)], FRONTEND)
    assert not noises[4].flags.owndata and not noises[4].flags.writeable
    sent = pickle.dumps(noises)
    assert len(sent) < 20_000 < noises[4].nbytes
    assert np.array_equal(pickle.loads(sent)[4], noises[4])


@pytest.mark.parametrize(
    "argv, reason",
    [
        (["--noise", "{}/none"], "--noise .*none: no such folder"),
        (["--noise", "{}/far", "--source", "s"], "--source has no effect with --noise"),
        (["--rir", "{}", "--lowercase"], "--lowercase has no effect"),
        (["--rir", "{}/empty"], "--rir .*empty: no recordings there, but x.txt"),
    ],
    ids=str,
)
def test_what_is_no_folder_of_sounds_is_one_line_and_writes_nothing(
    argv, reason, recordings, tmp_path
):
    (recordings / "empty").mkdir(exist_ok=True)
    (recordings / "empty/x.txt").touch()
    argv = [word.format(recordings) for word in argv]
    with pytest.raises(UserError, match=reason) as error:
        prepare.main([*argv, "--data_root", str(tmp_path / "root")])
    one_line(error)
    assert os.listdir(tmp_path) == []


def examples(data, sounds, **options):
    """Returns {row: features} of an epoch of `data` in noise and rooms."""
    module = SpeechDataModule(
        data_roots=[data],
        tokenizer=load_tokenizer(str(data / "tokenizer.json")),
        frontend=FRONTEND,
        augment=Augment(noise=sounds, rir=sounds),
        options=DataOptions(**{"num_workers": 0, "batch_size": 2} | options),
    )
    module.setup("fit")
    return {
        row: batch.features[i, : batch.feature_lengths[i]]
        for batch in module.train_dataloader()
        for i, row in enumerate(batch.rows.tolist())
    }


def test_examples_in_noise_depend_on_seed_epoch_and_row_alone(data, sounds):
    expected = examples(data, (str(sounds),))
    for options in ({"num_workers": 1}, {"batch_size": 3}):
        made = examples(data, (str(sounds),), **options)
        assert all(torch.equal(made[row], expected[row]) for row in range(8))
    plain = examples(data, ())
    # The frames are those without: noise and rooms change no length.
    assert all(plain[row].shape == expected[row].shape for row in range(8))
    assert not any(torch.equal(plain[row], expected[row]) for row in range(8))


def test_a_folder_that_prepare_did_not_make_is_one_line(data, recordings, sounds, tmp_path):
    for folder in (recordings, tmp_path / "absent", data):
        with pytest.raises(UserError, match="`prepare.py --noise RECORDINGS --data_root") as error:
            run(data, tmp_path / "run", "--noise", folder)
        assert str(folder) in one_line(error)
    for words, reason in (
        (("--snr", 5, 20), "--snr has no effect without --noise"),
        (("--noise_prob", 0.1), "--noise_prob has no effect without --noise"),
        (("--noise", sounds, "--rir_prob", 0.1), "--rir_prob has no effect without --rir"),
        (("--noise", sounds, sounds), "would come twice"),
    ):
        with pytest.raises(UserError, match=reason):
            run(data, tmp_path / "run", *words)
    assert not (tmp_path / "run").exists()


def test_a_run_goes_on_in_the_same_noise_unless_told_otherwise(data, sounds, tmp_path, caplog):
    run(data, tmp_path / "run", "--max_steps", 1, "--noise", sounds, "--rir", sounds)
    run(data, tmp_path / "run", "--max_steps", 2, "--resume", "--snr", 0, 9, "--rir")
    assert "--rir [] (before: " in caplog.text and "--snr [0.0, 9.0] (before: " in caplog.text
    options = json.loads((tmp_path / "run/run.json").read_text())["options"]
    assert (options["noise"], options["rir"]) == ([str(sounds)], [])
