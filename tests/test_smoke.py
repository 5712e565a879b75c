"""The whole chain as a user types it, on a handful of spoken rows: demo, prepare, train, score,
transcribe, compare."""

import json
import subprocess
import sys

import cli

import pytest
import torch

import prepare
import score
import transcribe
from helpers import ROOT, TINY_FLAGS, as_program, module
from helpers_model import call
from tools import demo


def command(cwd, *words):
    """Runs a program in a Python of its own, as a user starts it from a folder."""
    result = subprocess.run(
        [sys.executable, *map(str, words)], cwd=cwd, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    return result


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A few spoken sentences in the demo's layout, which is a user's."""
    folder = tmp_path_factory.mktemp("demo") / "source"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "UTTERANCES", {"train": 6, "dev": 2, "eval_clean": 3})
        demo.main(["--out", str(folder)])
    return folder


def test_the_whole_chain_from_recordings_to_transcripts(source, tmp_path, capsys):
    # A program takes seconds to import torch, so here train.py alone is one, started elsewhere. The
    # tests of prepare.py, score.py and transcribe.py make a program of each by a fork.
    data = tmp_path / "data"
    run = tmp_path / "run"
    status, out, _ = call(capsys, prepare, "--source", source, "--data_root", data)
    assert status == 0 and "kept 11 rows, rejected 0" in out[-1]

    errors = command(
        tmp_path,
        ROOT / "train.py",
        "--data_root",
        data,
        "--output_dir",
        run,
        "--max_epochs",
        2,
        "--batch_size",
        3,
        "--num_workers",
        0,
        "--ema_decay",
        0.5,
        *TINY_FLAGS,
    ).stderr
    assert "Warning" not in errors
    for name in ("best.ckpt", "last.ckpt"):
        assert "tokenizer" in torch.load(run / name, weights_only=True)
    record = json.loads((run / "run.json").read_text())
    assert record["metrics"]["steps"] == 4 and record["metrics"]["skipped_updates"] == 0

    status, out, _ = call(
        capsys,
        score,
        "--checkpoint",
        run / "best.ckpt",
        "--data_root",
        data,
        "--mode",
        "all",
        "--details",
        run / "details.jsonl",
        "--keep",
    )
    scores = [json.loads(line) for line in out if line.startswith("{")]
    assert status == 0 and len(scores) == 5 and json.loads(out[-1]) == scores[-1]
    assert all(
        found["split"] == "eval_clean" and found["utterances"] == 3 and found["chunk_size"] == -1
        for found in scores
    )
    assert all(found["wer"] >= 0 and found["cer"] >= 0 and found["rtf"] > 0 for found in scores)
    assert len((run / "details.jsonl").read_text().splitlines()) == 5 * 3

    files = [source / "dev" / "0000.wav", source / "dev" / "0001.wav"]
    status, lines, _ = call(capsys, transcribe, "--checkpoint", run / "best.ckpt", *files)
    assert status == 0 and [line.split("\t")[0] for line in lines] == [str(file) for file in files]

    status, table, _ = as_program(tmp_path, ROOT / "tools" / "compare.py", run)
    assert status == 0 and "attention_rescoring" in table and "tiny" in table


@pytest.mark.parametrize(
    "program, words",
    [
        ("train", ["--data_root", "none", "--output_dir", "run"]),
        ("train", ["--data_rot", "."]),
        ("score", ["--checkpoint", "none.ckpt"]),
        ("transcribe", ["--checkpoint", "none.ckpt", "a.wav"]),
        ("prepare", ["--source", "./none", "--data_root", "data"]),
        ("demo", ["--rows", "0"]),
        ("compare", ["none"]),
    ],
)
def test_a_mistake_gives_one_line_and_status_2(program, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [f"{program}.py", *words])
    with pytest.raises(SystemExit) as stopped:
        cli.run(module(program).main)
    assert stopped.value.code == 2 and capsys.readouterr().err.startswith(f"{program}.py: error: ")
    assert not list(tmp_path.iterdir())
