"""A sample rate other than 16 kHz is kept in the data root, and is the same for training, scoring
and transcribing, or is refused."""

import json
import os

from cli import UserError

import numpy as np
import pytest
import soundfile
import torch

import prepare
import score
import train
import transcribe
from datamodule import DataOptions, SpeechDataModule, rows_rate
from helpers_train import run
from model import load_checkpoint
from tools import parity
from transforms import Augment, extract


def make(folder, name, *more):
    prepare.main(["--source", str(folder / "src"), "--data_root", str(folder / name), *more])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Recordings of 44.1 kHz, prepared at 8 and at 16 kHz, and a checkpoint trained on each."""
    folder = tmp_path_factory.mktemp("rates")
    for split in ("train", "dev"):
        (folder / "src" / split).mkdir(parents=True)
        with open(folder / "src" / split / "metadata.csv", "w") as file:
            file.write("file_name,text\n")
            for i in range(3):
                sound = 0.1 * np.random.default_rng(i).standard_normal(44100 + 7000 * i)
                soundfile.write(folder / "src" / split / f"{i}.wav", sound, 44100)
                file.write(f"{i}.wav,hello\n")
    for rate in ("8000", "16000"):
        make(folder, rate, "--sample_rate", rate)
        run(folder / rate, folder / f"run{rate}", "--max_steps", 1)
    return folder


def test_a_root_says_its_rate_and_one_without_the_mark_has_16_khz(folder):
    rates = [rows_rate([folder / name]) for name in ("8000", "16000", "no root")]
    assert rates == [8000, 16000, 16000]
    assert json.loads((folder / "8000/prepare.json").read_text()) == {"sample_rate": 8000}
    assert not (folder / "16000/prepare.json").exists()
    make(folder, "again", "--sample_rate", "8000")
    make(folder, "again", "--overwrite")
    assert rows_rate([folder / "again"]) == 16000


@pytest.mark.parametrize("rate", [8000, 16000])
def test_training_scoring_and_transcribing_see_the_same_frames(rate, folder):
    model, tokenizer, frontend = load_checkpoint(str(folder / f"run{rate}/best.ckpt"))
    assert frontend.sample_rate == rate  # No flag has said so.
    root = str(folder / str(rate))
    data = SpeechDataModule(
        data_roots=[root],
        tokenizer=tokenizer,
        frontend=frontend,
        augment=Augment(),
        options=DataOptions(num_workers=0, batch_size=1),
    )
    data.setup("fit")
    seen = sorted(int(batch.feature_lengths) for batch in data.val_dataloader())
    options = score.ScoreOptions(data_root=root, split="dev")
    dataset, _ = score.load_data(tokenizer, frontend, options)
    scored = sorted(len(extract(frontend)(waveform)) for waveform in score.waveforms_of(dataset))
    heard = []
    for i in range(3):
        blocks = transcribe.read_blocks(str(folder / f"src/dev/{i}.wav"), rate)
        heard.append(len(extract(frontend)(torch.from_numpy(np.concatenate(list(blocks))))))
    assert seen == scored == sorted(heard)
    assert np.allclose(seen, [100 * (44100 + 7000 * i) / 44100 for i in range(3)], atol=3)


@pytest.mark.parametrize(
    "root, more, message",
    [
        (
            "8000",
            ["--sample_rate", "16000"],
            "8000 has 8000 samples per second, the model hears 16000",
        ),
        ("16000", ["--sample_rate", "8000"], "the model hears 8000; prepare .* --sample_rate 8000"),
        ("8000", ["--init_from", "run16000/best.ckpt"], "8000 has 8000 samples .* hears 16000"),
        ("16000", ["--init_from", "run8000/best.ckpt"], "16000 has 16000 samples .* hears 8000"),
        ("8000", ["--max_steps", "2", "--resume", "run16000/last.ckpt"], "the model hears 16000"),
        ("16000", ["--max_steps", "2", "--resume", "run8000/last.ckpt"], "the model hears 8000"),
    ],
)
def test_training_at_another_rate_than_the_datas_is_refused_before_anything_is_written(
    root, more, message, folder, monkeypatch
):
    monkeypatch.chdir(folder)
    with pytest.raises(UserError, match=message):
        run(folder / root, folder / "new", *more)
    assert not os.path.exists(folder / "new")


def test_roots_of_two_rates_are_refused(folder):
    with pytest.raises(UserError, match="has 16000 samples .* 8000; prepare both with"):
        train.main(
            [
                "--data_root",
                str(folder / "8000"),
                str(folder / "16000"),
                "--output_dir",
                str(folder / "new"),
            ]
        )


@pytest.mark.parametrize("command", [score, parity])
def test_no_command_compares_a_model_with_rows_of_another_rate(command, folder):
    with pytest.raises(UserError, match="8000 has 8000 samples per second, the model hears 16000"):
        command.main(
            [
                "--checkpoint",
                str(folder / "run16000/best.ckpt"),
                "--data_root",
                str(folder / "8000"),
                "--split",
                "dev",
            ]
        )


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "{}",
        '{"sample_rate": "x"}',
        "null",
        '{"sample_rate": 1e999}',
        '{"sample_rate": 8000.5}',
    ],
)
def test_a_mark_that_cannot_be_read_is_one_line(content, tmp_path):
    (tmp_path / "prepare.json").write_text(content)
    with pytest.raises(UserError, match="prepare.json says no sample_rate"):
        rows_rate([tmp_path])


@pytest.mark.parametrize("rate", ["0", "3975", "8001", "400000"])
def test_a_rate_that_cannot_be_made_well_is_refused(rate):
    with pytest.raises(UserError, match="--sample_rate .*: it must lie within 4000 .. 384000"):
        prepare.prepare_options(["--source", "s", "--data_root", "r", "--sample_rate", rate])
