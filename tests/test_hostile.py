"""Attacks by kind: bad input or bad luck gets one line and status 2, and what was there before is still there.

What could swell or wait runs as a command of its own, with little memory and a deadline: a bomb fails, and freezes nothing.
"""

import argparse
import importlib
import json
import os
import random
import re
import resource
import shutil
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path

import datasets
import numpy as np
import pytest
import soundfile
import torch

import cli
from conformer import ModelOptions
from model import U2, OptimOptions
from tokenizer import save_tokenizer, train_char
from transforms import Frontend

ROOT = Path(__file__).resolve().parent.parent
MEMORY = 6 * 2**30  # bytes of address space; torch and datasets alone take 3 to 4
DEADLINE = 60  # seconds


def limited(*command, memory=MEMORY, deadline=DEADLINE, **kwargs) -> subprocess.CompletedProcess:
    """python COMMAND, with little memory and time."""
    def limit():
        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
        resource.setrlimit(resource.RLIMIT_CPU, (deadline, deadline))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"} | kwargs.pop("env", {})
    return subprocess.run([sys.executable, *map(str, command)], cwd=kwargs.pop("cwd", ROOT), preexec_fn=limit, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=4 * deadline, env=environment, **kwargs)


def refused(*command, **kwargs) -> str:
    """The one line that `limited` refuses with."""
    done = limited(*command, **kwargs)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr[-2000:]
    *notes, line = done.stderr.strip().splitlines()
    assert ": error: " in line and len(line) < 2000, done.stderr[-2000:]
    return line


def tree(folder) -> dict:
    """Every file below a folder, with its content."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


# ------------------------------------------------------------------------------------------ writing without destroying


# ------------------------------------------------------------------------------------- files that promise too much


# ----------------------------------------------------------------------- what reaches a terminal or another program


@pytest.mark.parametrize("text", ["\x1b[2J", "a\nb", "a\u202eb", "a\udce9", "a\x9b2J", "a\u2028b"])
def test_what_is_shown_moves_no_cursor_and_ends_no_line(text):
    assert cli.shown(text).isprintable() and cli.shown(text).isascii()


def test_what_is_shown_is_short_whatever_holds_it():
    bomb = "x" * 100
    for _ in range(40):
        bomb = [bomb] * 9
    assert len(cli.shown(bomb)) <= 1100 and len(cli.shown("x" * 10**7)) <= 1100


# ------------------------------------------------------------------------------------------------------- tracebacks

# None names anything outside of the test's own folder: some flags replace what they name.
VALUES = ("0", "-1", "1", "2", "0.5", "-0.0", "nan", "inf", "-inf", "1e308", "1e-308", "1" + 30 * "0", "9" * 5000, "", "x",
          "\0", "\u00e9", "caf\udce9", "\x1b[2J\n", "x" * 300, "x/" * 3000, "1 2", "\uff12", ".", "data")
SIZES = ("--output_size 16 --attention_heads 2 --linear_units 32 --num_blocks 1 --cnn_module_kernel 3 --decoder_num_blocks 1 "
         "--r_num_blocks 1 --decoder_linear_units 32 --accelerator cpu")
# Every command, with what it takes to work in the folder of `place`.
COMMANDS = {
    "train": f"--data_root data --output_dir new {SIZES}", "score": "--checkpoint best.ckpt --data_root data --split dev",
    "transcribe": "--checkpoint best.ckpt source/train/0.wav", "align": "--checkpoint best.ckpt",
    "export": "--checkpoint best.ckpt --out new", "parity": "--checkpoint best.ckpt --data_root data",
    "prepare": "--source source --data_root new", "bench": "growth", "torture": "--kills 1", "compare": ".",
    "wenet_import": "source --out new.ckpt"}


class Reached(Exception):
    """The work has begun, so the options hold."""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with data, a source of data, and a checkpoint on fbank with random weights."""
    folder = tmp_path_factory.mktemp("place")
    rng = np.random.default_rng(0)
    for split in ("train", "dev"):
        rows = [rng.standard_normal(8000).astype(np.float32) for _ in range(2)]
        columns = {"input_values": rows, "labels": [{"input_ids": [4, 5]}] * 2, "text": ["ab"] * 2}
        datasets.Dataset.from_dict(columns).save_to_disk(str(folder / "data" / split / "0"))
        (folder / "source" / split).mkdir(parents=True)
        soundfile.write(folder / "source" / split / "0.wav", rows[0] / 10, 16000)
        (folder / "source" / split / "metadata.csv").write_text("file_name,text\n0.wav,abc\n")
    tokenizer = train_char(["abcdefgh"])
    save_tokenizer(tokenizer, str(folder / "data" / "tokenizer.json"))
    sizes = dict(zip(SIZES.replace("--", "").split()[:-2:2], map(int, SIZES.split()[1:-2:2])))
    model = U2(options=ModelOptions(**sizes), optim=OptimOptions(), frontend=Frontend(frontend="fbank"), tokenizer=tokenizer)
    checkpoint = {"state_dict": model.state_dict()}
    model.on_save_checkpoint(checkpoint)
    torch.save(checkpoint, folder / "best.ckpt")
    return folder


def flags(name) -> list:
    """The actions of a command's parser."""
    found = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", lambda self, argv: found.extend(self._actions) or 1 / 0)
        with pytest.raises(ZeroDivisionError):
            importlib.import_module(name).main([])
    return [action for action in found if action.option_strings and action.dest != "help"]


def reached(*_, **__):
    raise Reached


def train_a_little(trainer, model, datamodule, **_):
    """What stands for Lightning's fit: a step over the largest batch, where the model has not been left unmade."""
    if not next(model.parameters()).is_meta:
        batch = datamodule.largest_batches()[0]
        model.net.loss(batch.features, batch.feature_lengths, batch.labels, batch.label_lengths)["loss"].backward()
    raise Reached


def small(**options):
    """A U2, made for real where it takes little memory and time."""
    if max(options["options"].num_blocks, options["options"].decoder_num_blocks, options["options"].r_num_blocks) > 20:
        raise Reached
    with torch.device("meta"):
        model = U2(**options)
    return model if sum(p.numel() for p in model.parameters()) > 10**7 else U2(**options)


def work_is_short(patch):
    """Lets commands end where their long work begins, or do little of it."""
    import align, bench, export, parity, sources, torture, train
    patch.setattr(train.L.Trainer, "fit", train_a_little)
    patch.setattr(train, "U2", small)
    patch.setattr(align.demo, "plan", lambda *_: [align.demo.Utterance("ab", "f1", 150, 50)])
    patch.setattr(align.demo, "speak_with_words", lambda _: (np.zeros(9000, np.float32), []))
    patch.setattr(align, "summary", lambda _: defaultdict(float, words=1))
    patch.setattr(export, "write_checked", lambda model, options, chunks, folder: export.texts(model, chunks) and [])
    patch.setattr(parity, "hear", reached)
    patch.setattr(torture, "unbroken", reached)
    patch.setattr(sources, "hub_source", reached)
    for what, (_, *takes) in bench.COMMANDS.items():
        patch.setitem(bench.COMMANDS, what, (lambda *_: {}, *takes))


def outcome(name, words, capsys) -> str | None:
    """None where the command `name` runs, else the line that it refuses with. Anything else is an error."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [f"{name}.py", *words])
        try:
            cli.run(importlib.import_module(name).main)
        except Reached:
            return None
        except SystemExit as ended:
            if ended.code != 2:
                raise
            *_, line = capsys.readouterr().err.splitlines()
            assert ": error: " in line and len(line) < 1200 and line.isprintable(), line
            return line


@pytest.mark.parametrize("name", COMMANDS)
def test_any_value_of_any_flag_is_one_line_or_a_run(name, place, tmp_path, monkeypatch, capsys):
    """A few of the values that are drawn for each, and the bounds that it has itself."""
    rng, counts = random.Random(name), Counter()
    for path in place.iterdir():
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    work_is_short(monkeypatch)
    for flag in flags(name):
        bounds = re.findall(r"(?:within |above )(\S+?)(?: \.\.|,) (?:at most )?([^\s)]+)", flag.help)
        for value in (*rng.sample(VALUES, 3), *(bounds[0] if bounds else ())):
            words = [flag.option_strings[-1]] + ([value] if flag.nargs != 0 else [])
            line = outcome(name, [*COMMANDS[name].split(), *words], capsys)
            counts[line is None] += 1
            for made in ("new", "new.ckpt"):
                shutil.rmtree(tmp_path / made, ignore_errors=True)
    assert counts[True] or name in ("compare", "wenet_import")
    assert counts[False] or name == "compare"  # which has no flags

OUTPUTS = ("best.ckpt", "last.ckpt", "run.json", "scores.jsonl", "skipped.jsonl", "steps.jsonl", "logs/events.out.tfevents.1")
IN_THE_WAY = [*((name, kind) for name in (*OUTPUTS[:-1], ".lock") for kind in ("folder", "link", "pipe")),
              *(("logs", kind) for kind in ("file", "link", "pipe"))]


def put(path: Path, kind: str) -> None:
    """Something else in the place of what is there."""
    shutil.rmtree(path, ignore_errors=True)
    path.unlink(missing_ok=True)
    aim = path.parent.parent / "theirs"
    {"file": path.touch, "folder": path.mkdir, "link": lambda: path.symlink_to(aim), "pipe": lambda: os.mkfifo(path)}[kind]()


@pytest.mark.parametrize("name, kind", IN_THE_WAY)
@pytest.mark.parametrize("words", [["--overwrite"], ["--resume"]], ids=" ".join)
def test_what_lies_in_the_way_of_a_run_is_seen_before_anything_is_deleted(name, kind, words, place, tmp_path):
    for output in OUTPUTS:
        (tmp_path / "run" / output).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "run" / output).write_text("mine")
    shutil.copytree(tmp_path / "run", tmp_path / "theirs")
    put(tmp_path / "run" / name, kind)
    before = tree(tmp_path)
    with pytest.raises(cli.UserError, match=f"--output_dir .*{name} is (no file|no folder|a link)"):
        importlib.import_module("train").main(["--data_root", str(place / "data"), "--output_dir", str(tmp_path / "run"), *words])
    assert tree(tmp_path) == before


@pytest.mark.parametrize("output", ["file", "file/a/b", "pipe", "link", "x" * 300, "x/" * 3000, "/proc/x", "/dev/null", "\0"])
def test_where_no_run_can_be_written_is_one_line(output, place, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for kind in ("file", "pipe", "link"):
        put(tmp_path / kind, kind)
    words = f"--data_root {place / 'data'} --max_epochs 1 {SIZES}".split()
    assert "--output_dir" in outcome("train", [*words, "--output_dir", output], capsys)


@pytest.mark.parametrize("kind", ["folder", "pipe", "link"])
def test_details_replace_files_alone(kind, tmp_path):
    """(a device as little as a pipe: root could replace /dev/null)"""
    import score
    (tmp_path / "run").mkdir()
    put(tmp_path / "run" / "details", kind)
    with pytest.raises(cli.UserError, match="details: it is no file"):
        score.ScoreOptions(details=str(tmp_path / "run" / "details"))


@pytest.mark.parametrize("name", ["", "logs", "logs/events.out.tfevents.1", "last.ckpt"])
def test_a_run_that_may_not_be_changed_is_seen_before_anything_is_deleted(name, place, tmp_path, monkeypatch, capsys):
    """(also where the tests run as root, who may change everything)"""
    for output in OUTPUTS:
        (tmp_path / output).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / output).write_text("mine")
    closed, access = tmp_path / name, os.access
    monkeypatch.setattr(os, "access", lambda path, mode: os.path.realpath(path) != str(closed.parent if "tf" in name else closed)
                        and access(path, mode))
    line = outcome("train", ["--data_root", str(place / "data"), "--output_dir", str(tmp_path), "--overwrite"], capsys)
    assert "cannot be written" in line and tree(tmp_path) == dict.fromkeys(OUTPUTS, b"mine")


@pytest.mark.parametrize("part, name, value", [
    ("run_options", "lr", float("nan")), ("run_options", "speeds", "fast"), ("run_options", "data_root", [1]),
    ("model_options", "dropout_rate", 7.0), ("frontend", "num_mel_bins", 10**30), ("optim_options", "warmup_steps", None)])
def test_options_within_a_checkpoint_are_checked_as_flags_are(part, name, value, place, tmp_path, capsys):
    checkpoint = torch.load(place / "best.ckpt", weights_only=True) | {"loops": {}}
    checkpoint[part] = checkpoint.get(part, {}) | {name: value}
    torch.save(checkpoint, tmp_path / "last.ckpt")
    words = ["--data_root", str(place / "data")]
    for more in (["--resume", str(tmp_path)], ["--init_from", str(tmp_path / "last.ckpt"), "--output_dir", str(tmp_path / "new")]):
        assert f"last.ckpt: --{name} " in outcome("train", words + more, capsys)
    assert os.listdir(tmp_path) == ["last.ckpt"]


@pytest.mark.parametrize("error", [PermissionError(13, "Permission denied", "a\nb"), OSError("odd"), MemoryError(),
                                   RecursionError("deep"), RuntimeError("CUDA out of memory. Tried to")])
def test_bad_luck_that_no_place_has_foreseen_is_one_line(error, monkeypatch, capsys):
    def main(_):
        raise error
    monkeypatch.setattr(sys, "argv", ["x.py"])
    with pytest.raises(SystemExit, match="2"):
        cli.run(main)
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_a_mistake_of_the_program_is_still_a_traceback(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["x.py"])
    with pytest.raises(RuntimeError, match="shape"):
        cli.run(lambda _: (_ for _ in ()).throw(RuntimeError("shape")))


# ----------------------------------------------------------------------------------------------------------- streams


# --------------------------------------------------------------------------------------------------- small, but wrong


SCORE = {"checkpoint": "runs/a/best.ckpt", "data_root": "data/a", "split": "dev", "mode": "attention_rescoring", "stream": False,
         "concatenate": False, "beam_size": 10, "chunk_size": -1, "left_chunks": -1, "ctc_weight": 0.5, "reverse_weight": 0.3,
         "utterances": 9, "wer": 0.5, "cer": 0.25, "rtf": 0.1}


def write_scores(folder: Path, *scores: dict, end: str = "") -> None:
    folder.mkdir(exist_ok=True)
    (folder / "best.ckpt").touch()
    (folder / "run.json").write_text(json.dumps({"options": {}, "metrics": {}}))
    (folder / "scores.jsonl").write_text("".join(json.dumps(score) + "\n" for score in scores) + end)


@pytest.mark.parametrize("asked", [{"hotwords": "names.txt", "context_score": 2.0}, {"beam_size": 1}, {"ctc_weight": 0.0},
                                   {"reverse_weight": 0}, {"concatenate": True}, {"checkpoint": "runs/a/last.ckpt"}], ids=str)
@pytest.mark.parametrize("plain", [True, False])
def test_a_score_that_was_asked_for_otherwise_is_not_shown_as_the_plain_one(asked, plain, tmp_path, capsys):
    import compare, export
    write_scores(tmp_path / "run", *[SCORE] * plain, {**SCORE, **asked, "wer": 0.125})
    compare.main([str(tmp_path / "run")])
    header, *rows = capsys.readouterr().out.split("scores\n")[1].splitlines()
    assert len(rows) == 1 + plain and (set(asked) <= set(header.split()) or not plain and "checkpoint" in asked)
    card = export.numbers(str(tmp_path / "run" / "best.ckpt"))
    assert "0.1250" not in card and ("0.5000" in card) == plain and ("None yet" in card) != plain


def test_scores_of_several_data_roots_say_so_and_an_older_one_gives_way_to_the_same_asked_again(tmp_path, capsys):
    import compare, export
    other = {**SCORE, "data_root": "data/b"}
    write_scores(tmp_path / "run", {**SCORE, "wer": 0.9}, other, {**SCORE, "rtf": 0.2}, end='{"split": "dev", "mode": "att')
    compare.main([str(tmp_path / "run")])
    header, *rows = capsys.readouterr().out.split("scores\n")[1].splitlines()
    assert "data_root" in header and len(rows) == 2 and "0.9" not in "".join(rows)
    assert "data/b" in export.numbers(str(tmp_path / "run" / "best.ckpt"))


@pytest.mark.parametrize("line", [b"\xff\xfe{", b"[" * 10**5, b"{}", b"[1]", b'{"wer": NaN, "mode": 1}', b"\0", b'{"mode": "\xe2\x82'])
def test_lines_that_are_no_scores_are_passed_over(line, tmp_path):
    import compare
    write_scores(tmp_path / "run", SCORE)
    with open(tmp_path / "run" / "scores.jsonl", "ab") as file:
        file.write(line)
    assert [score["wer"] for score in compare.read_scores(str(tmp_path / "run"))] == [0.5]


def test_a_score_says_what_it_was_asked_for(place, capsys, monkeypatch):
    import compare, score
    monkeypatch.chdir(place)
    (place / "names.txt").write_text("ab\n")
    score.main("--checkpoint best.ckpt --data_root data --split dev --hotwords names.txt --beam_size 3".split())
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(SCORE) <= set(said) and said["data_root"] == "data" and said["checkpoint"] == "best.ckpt"
    assert set(compare.unusual(said)) == {"hotwords", "context_score", "beam_size"}


def test_no_validation_is_of_an_epoch_behind_the_last(place, tmp_path, caplog):
    import train
    words = f"--data_root {place / 'data'} --output_dir {tmp_path / 'run'} {SIZES} --num_workers 0 --check_val_every_n_epoch 2"
    with caplog.at_level("INFO"):
        train.main([*words.split(), "--max_epochs", "3"])
    assert re.findall(r"epoch (\d+), step", caplog.text) == ["2", "3"]
