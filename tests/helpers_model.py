"""Models with random weights that several test files share, and a small world to score them in."""

import dataclasses
import json
import shutil
import sys

import cli

import datasets
import numpy as np
import pytest
import pytorch_lightning as L
import torch

import score
from files import MARK
from helpers import TINY, TWO_BLOCKS, same
from model import U2, OptimOptions
from tokenizer import save_tokenizer, train_char
from transforms import Frontend

TEXTS = ["one two three", "four", "five six", "seven eight nine ten", "zero", ""]
SECONDS = [1.1, 0.5, 0.02, 1.7, 0.8, 0.6]  # the third is too short for a single encoder frame


def tiny_model(
    tokenizer, options=TINY, frontend=Frontend(), optim=OptimOptions(), sharpness=1, seed=0, **more
) -> U2:
    """A model with random weights, times `sharpness`: with 2 the searches find something.

    `more` are further arguments of U2.
    """
    torch.manual_seed(seed)
    model = U2(options=options, optim=optim, frontend=frontend, tokenizer=tokenizer, **more)
    for parameter in model.parameters():
        parameter.data *= sharpness
    return model


def exportable_model(frontend="fbank", seed=0, **changes) -> U2:
    """A model that is sure of its nonsense and hears positions, so that an error in a graph shows.

    `changes` replace options of the model; those under "features" replace options of the frontend.
    """
    frontend = Frontend(**{"frontend": frontend, **changes.pop("features", {})})
    options = dataclasses.replace(TWO_BLOCKS, **changes)
    model = tiny_model(train_char(["the quick brown fox"]), options, frontend, seed=seed).eval()
    if frontend.frontend == "fbank":
        bins = frontend.num_mel_bins
        model.set_cmvn(torch.full((bins,), 8.0), torch.full((bins,), 0.3))
    with torch.no_grad():
        model.net.ctc.weight.mul_(8)
        for block in model.net.encoder.blocks:
            block.self_attn.linear_pos.weight.mul_(4)
    return model


def save_model(model: U2, path) -> None:
    """Writes a checkpoint without a state of training."""
    checkpoint = {"state_dict": model.state_dict()}
    model.on_save_checkpoint(checkpoint)
    torch.save(checkpoint, path)


def copied_onnx(written, chunks, folder):
    """A function that stands for export.write_onnx, which takes seconds, where `folder` has the
    files of the model `written`: it copies them, for this model alone."""

    def write_onnx(model, asked, out):
        assert (model.options, model.frontend) == (written.options, written.frontend)
        assert model.tokenizer.to_dict() == written.tokenizer.to_dict() and asked == chunks
        assert same([*model.state_dict().values()], [*written.state_dict().values()])
        shutil.copytree(folder, out, ignore=shutil.ignore_patterns(MARK), dirs_exist_ok=True)

    return write_onnx


def quiet_trainer(*callbacks, **options) -> L.Trainer:
    """A trainer of one epoch on one CPU that writes nothing."""
    return L.Trainer(
        max_epochs=1,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        gradient_clip_val=5.0,
        callbacks=list(callbacks),
        **options,
    )


# The world: rows of noise with TEXTS for transcripts


def waveform(row: int) -> np.ndarray:
    """The samples of a row of the world, at 16 kHz."""
    return np.random.default_rng(row).normal(0, 0.1, int(SECONDS[row] * 16000)).astype(np.float32)


def write_split(folder, tokenizer, text=True, label=None, texts=TEXTS, sound=waveform) -> None:
    """Writes a split of one shard of the sounds `sound(row)`.

    `label` replaces every label by this one token.
    """
    labels = [tokenizer.encode(said) if label is None else [label] for said in texts]
    rows = [
        {
            "input_values": sound(row),
            "labels": {"input_ids": labels[row]},
            **({"text": said} if text else {}),
        }
        for row, said in enumerate(texts)
    ]
    features = {
        "input_values": datasets.List(datasets.Value("float32")),
        "labels": {"input_ids": datasets.List(datasets.Value("int32"))},
        **({"text": datasets.Value("string")} if text else {}),
    }
    datasets.Dataset.from_list(rows, datasets.Features(features)).save_to_disk(str(folder / "0"))


def write_world(folder) -> None:
    """Data with and without text, and a checkpoint that hears nonsense, but not nothing."""
    tokenizer = train_char(TEXTS)
    for name in ("data", "other"):
        write_split(folder / name / "eval_clean", tokenizer)
        write_split(folder / name / "no_text", tokenizer, text=False)
        write_split(folder / name / "beyond", tokenizer, text=False, label=tokenizer.vocab_size)
    save_tokenizer(tokenizer, str(folder / "data" / "tokenizer.json"))
    save_tokenizer(train_char(["entirely different"]), str(folder / "other" / "tokenizer.json"))
    options = dataclasses.replace(TINY, cnn_module_kernel=8)
    model = tiny_model(tokenizer, options, sharpness=2)
    model.net.decoder.output_layer.bias.data[model.net.eos_id] -= 2
    save_model(model, folder / "best.ckpt")


def call(capsys, command, *argv):
    """Runs a command as the shell would: (exit status, lines of stdout, lines of stderr)."""
    capsys.readouterr()
    status = 0
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", [f"{command.__name__}.py", *map(str, argv)])
            cli.run(command.main)
    except SystemExit as stop:
        status = stop.code
    out, err = capsys.readouterr()
    return (
        status,
        out.splitlines(),
        [line for line in err.splitlines() if "batches" not in line and "stream:" not in line],
    )


def score_json(capsys, world, *argv, root="data") -> list:
    """What score.py prints of the world's checkpoint, a JSON value a line."""
    status, out, _ = call(
        capsys, score, "--checkpoint", world / "best.ckpt", "--data_root", world / root, *argv
    )
    assert status == 0
    return [json.loads(line) for line in out]
