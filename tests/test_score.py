"""score.py and tools/compare.py on a small checkpoint with random weights."""

import io
import json
import random
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import cli

import numpy as np
import pytest
import torch
from torchmetrics.functional.text import char_error_rate, word_error_rate

import score
import transcribe
from decode import MODES
from helpers import ROOT, as_program, distance
from helpers_model import TEXTS, call, score_json, waveform, write_split
from tokenizer import from_vocab, train_char
from tools import compare


@pytest.mark.parametrize(
    "said, hint",
    [
        (TEXTS, None),
        ([text.upper() for text in TEXTS], "cannot write 'E' x "),
        ([f"{TEXTS[0]}!", "\u200bx", *TEXTS[2:]], "2 of 11 words"),
    ],
)
def test_references_that_the_tokenizer_cannot_write_are_told_and_what_to_do(
    world, capsys, tmp_path, said, hint
):
    write_split(tmp_path / "eval_clean", train_char(TEXTS), texts=said)
    status, out, err = call(
        capsys,
        score,
        "--checkpoint",
        world / "best.ckpt",
        "--data_root",
        tmp_path,
        "--mode",
        "ctc_greedy_search",
    )
    notes = [line for line in err if line.startswith("score.py: note: ")]
    assert status == 0 and json.loads(out[-1])["wer"] > 0 and len(notes) == (hint is not None)
    if hint:
        assert hint in notes[0]
        assert "with --lowercase" in notes[0]
        assert ("punctuation" in notes[0]) == ("2 of" in hint)


def test_a_tokenizer_that_writes_the_other_case_is_told_of_where_nothing_is_unknown():
    tokenizer = from_vocab(
        {token: i for i, token in enumerate(["<pad>", "<unk>", "|", "A", "B"])},
        config={"do_lower_case": True},
    )
    assert score.unspelled(tokenizer, ["a b", ""]) == ""
    assert "1 of 2 words" in (hint := score.unspelled(tokenizer, ["A b"]))
    assert "'A' x 1" in hint
    assert hint.endswith("with --lowercase")


def test_a_score_and_its_details_are_not_lost_with_one_another(
    world, capsys, tmp_path, monkeypatch
):
    class Full(io.StringIO):
        def write(self, text):
            raise cli.UserError("full")

    argv = "--mode", "ctc_greedy_search", "--details"
    argv = "--checkpoint", world / "best.ckpt", "--data_root", world / "data", *argv
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", Full())
        status, _, err = call(capsys, score, *argv, tmp_path / "details")
    assert status == 2
    assert "full" in err[-1]
    assert len((tmp_path / "details").read_text().splitlines()) == len(TEXTS)
    monkeypatch.setattr(score, "write_whole", Full.write)
    status, out, err = call(capsys, score, *argv, tmp_path / "none")
    assert status == 2 and "full" in err[-1] and json.loads(out[-1])["utterances"] == len(TEXTS)


@pytest.mark.parametrize("mode", MODES)
def test_score_counts_the_errors_of_the_whole_split(world, capsys, tmp_path, mode):
    details = tmp_path / "details.jsonl"
    (result,) = score_json(capsys, world, "--mode", mode, "--details", details)
    lines = [json.loads(line) for line in details.read_text().splitlines()]
    assert [line["row"] for line in lines] == list(range(6))
    assert [line["reference"] for line in lines] == TEXTS
    assert sum(bool(line["hypothesis"]) for line in lines) >= 4
    for line in lines:
        assert line["char_errors"] == distance(line["hypothesis"], line["reference"])
        assert line["word_errors"] == distance(
            line["hypothesis"].split(), line["reference"].split()
        )
    assert result["cer"] == pytest.approx(
        sum(line["char_errors"] for line in lines) / sum(map(len, TEXTS))
    )
    assert result["wer"] == pytest.approx(sum(line["word_errors"] for line in lines) / 11)
    assert (result["split"], result["mode"], result["chunk_size"], result["utterances"]) == (
        "eval_clean",
        mode,
        -1,
        6,
    )
    assert 0 < result["rtf"] < 100


def test_error_rates_are_those_of_torchmetrics_to_the_bit():
    rng = random.Random(0)
    texts = ["".join(rng.choices("ab \u4e00", k=rng.randrange(30))) for _ in range(100)]
    texts += ["a b", "", ""]
    heard = texts[::-1]
    errors = [score.describe("mode", 0, *pair) for pair in zip(texts, heard)]
    for pair, found in zip(zip(texts, heard), errors):
        assert found["char_errors"] == distance(*pair)
        assert found["word_errors"] == distance(*map(str.split, pair))
    rates = score.error_rates(texts, errors)
    assert rates["wer"] == float(word_error_rate(heard, texts))
    assert rates["cer"] == float(char_error_rate(heard, texts))
    assert rates["utterances"] == 103


def test_score_hears_the_same_whatever_the_batch_and_in_every_mode_at_once(world, capsys, tmp_path):
    heard = []
    for batch_size in (1, 2, 6):
        details = tmp_path / f"{batch_size}.jsonl"
        results = score_json(
            capsys,
            world,
            "--mode",
            "all",
            "--beam_size",
            3,
            "--batch_size",
            batch_size,
            "--chunk_size",
            4,
            "--left_chunks",
            2,
            "--details",
            details,
        )
        assert [result["mode"] for result in results] == list(MODES)
        heard.append(details.read_text())
    assert heard[0] == heard[1] == heard[2]


def test_score_passes_chunks_on_to_the_encoder(world, capsys, tmp_path):
    heard = []
    for chunk in ((), ("--chunk_size", 1, "--left_chunks", 0)):
        score_json(
            capsys, world, "--mode", "ctc_greedy_search", "--details", tmp_path / "details", *chunk
        )
        heard.append((tmp_path / "details").read_text())
    assert heard[0] != heard[1]


def test_labels_stand_in_for_missing_text_when_their_tokenizer_is_the_checkpoints(
    world, capsys, tmp_path
):
    (with_text,) = score_json(capsys, world)
    (without,) = score_json(capsys, world, "--split", "no_text")
    assert (without["wer"], without["cer"]) == (with_text["wer"], with_text["cer"])
    # Where there is text, another tokenizer of the data does no harm.
    (elsewhere,) = score_json(capsys, world, root="other")
    assert elsewhere["cer"] == with_text["cer"]


@pytest.mark.parametrize(
    "argv, words",
    [
        (
            ["--data_root", "{}/other", "--split", "no_text"],
            ["other/tokenizer.json", "column text"],
        ),
        (["--split", "beyond"], ["beyond", "outside"]),
        (["--split", "absent"], ["absent"]),
        (["--data_root", "{}/nowhere"], ["nowhere"]),
        (["--checkpoint", "{}/nothing.ckpt"], ["nothing.ckpt"]),
        (["--checkpoint", "{}/data/tokenizer.json"], ["tokenizer.json"]),
        (["--beam_size", "0"], ["--beam_size"]),
        (["--chunk_size", "0"], ["--chunk_size"]),
        (["--chunk_size", "-2"], ["--chunk_size"]),
        (["--left_chunks", "2"], ["--left_chunks", "--chunk_size"]),
        (["--batch_size", "0"], ["--batch_size"]),
        (["--stream", "--batch_size", "4"], ["--batch_size has no effect with --stream"]),
        (["--concatenate"], ["--concatenate", "--stream"]),
        (["--stream", "--mode", "attention"], ["--mode attention", "--stream"]),
        (["--reverse_weight", "1.5"], ["--reverse_weight"]),
        (["--beam_size", "3", "--mode", "ctc_greedy_search"], ["--beam_size has no effect on"]),
        (["--joint_ctc_weight", "0.5"], ["--joint_ctc_weight", "--mode attention_rescoring"]),
        (["--details", "{}/nowhere/details"], ["--details"]),
    ],
)
def test_score_answers_bad_input_with_one_line_and_status_2(world, capsys, argv, words):
    argv = [word.format(world) for word in argv]
    # Where a flag is given twice, argparse takes the last.
    given = ["--checkpoint", world / "best.ckpt", "--data_root", world / "data", *argv]
    status, out, err = call(capsys, score, *given)
    assert status == 2 and out == [] and len(err) == 1
    assert all(word in err[0] for word in ["score.py: error:", *words])


@pytest.mark.parametrize("command", [score, transcribe])
@pytest.mark.parametrize("argv", [["--no_such_flag", "1"], ["--mode", "psychic"], ["--check", "x"]])
def test_unknown_flags_and_modes_are_refused(world, capsys, command, argv):
    status, out, err = call(
        capsys, command, *argv, *(["file.wav"] if command is transcribe else [])
    )
    assert status == 2 and out == [] and "error" in err[-1]


def test_score_streams_every_row(world, capsys, tmp_path):
    """The text differs from that of whole rows: a stream knows only the statistics so far."""
    (result,) = score_json(
        capsys, world, "--stream", "--chunk_size", 8, "--details", tmp_path / "details"
    )
    lines = [json.loads(line) for line in (tmp_path / "details").read_text().splitlines()]
    assert result["stream"]
    assert result["chunk_size"] == 8
    assert result["utterances"] == len(lines) == len(TEXTS)
    assert any(line["hypothesis"] for line in lines) and result["cer"] > 0
    (long,) = score_json(
        capsys,
        world,
        "--stream",
        "--chunk_size",
        8,
        "--concatenate",
        "--details",
        tmp_path / "details",
    )
    (line,) = [json.loads(line) for line in (tmp_path / "details").read_text().splitlines()]
    assert long["utterances"] == 1
    assert line["reference"] == " ".join(filter(None, TEXTS))
    assert line["hypothesis"]


@pytest.mark.parametrize("argv", [[], ["--stream"], ["--stream", "--concatenate"]], ids=str)
def test_the_time_leaves_out_reading_the_data(world, capsys, monkeypatch, argv):
    now = [0.0]
    read = score.checked_waveform

    def slow(row, values):
        now[0] += 100
        return read(row, values)

    monkeypatch.setattr(score, "checked_waveform", slow)
    monkeypatch.setattr(score, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    (scores,) = score_json(capsys, world, *argv)
    assert now[0] == 100 * len(TEXTS) and scores["rtf"] == 0


def write_run(folder, metrics, scores=(), **options):
    folder.mkdir(parents=True)
    options = {"preset": "tiny", "output_dir": str(folder), **options}
    record = {
        "command": "train.py",
        "commit": "abc1234",
        "seed": 7,
        "metrics": metrics,
        "options": options,
    }
    (folder / "run.json").write_text(json.dumps(record))
    if scores:
        (folder / "scores.jsonl").write_text(
            "\n".join(["best checkpoint", *map(json.dumps, scores)]) + "\n"
        )


@pytest.mark.parametrize("bad, reason", [(np.nan, "not finite"), (1e10, "as large as 1e+10")])
@pytest.mark.parametrize("argv", [[], ["--stream"], ["--stream", "--concatenate"]], ids=str)
def test_a_row_whose_samples_are_none_is_named(world, capsys, tmp_path, argv, bad, reason):
    def spoiled(row):
        samples = waveform(row)
        samples[100] = bad if row == 3 else samples[100]
        return samples

    write_split(tmp_path / "eval_clean", train_char(TEXTS), sound=spoiled)
    given = ("--checkpoint", world / "best.ckpt", "--data_root", tmp_path, *argv)
    status, out, err = call(capsys, score, *given)
    assert status == 2 and out == [] and reason in err[-1]
    assert "error: row 3 of the split: samples" in err[-1]


def test_compare_tables_runs_their_differences_and_newest_scores(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    line = {
        "split": "eval_clean",
        "mode": "attention",
        "stream": False,
        "chunk_size": 16,
        "left_chunks": -1,
        "utterances": 5,
    }
    scores = [
        {**line, "wer": 0.9, "cer": 0.8, "rtf": 0.01},
        {**line, "wer": 0.5, "cer": 0.125, "rtf": 0.01},
    ]
    write_run(Path("runs/a"), {"val_cer": 0.25, "steps": 300}, scores, lr=1e-3)
    write_run(Path("runs/b"), {}, lr=2e-3, init_from="a")
    status, out, _ = call(capsys, compare)
    assert status == 0
    table = [line.split() for line in out]
    assert table[0][:6] == ["run", "preset", "commit", "seed", "steps", "val_cer"]
    assert table[1][:6] == ["runs/a", "tiny", "abc1234", "7", "300", "0.2500"]
    assert table[2][:6] == ["runs/b", "-", "abc1234", "7", "-", "-"]  # as large as "a" is
    assert table[5:8] == [
        ["run", "lr", "init_from"],
        ["runs/a", "0.0010", "-"],
        ["runs/b", "0.0020", "a"],
    ]
    assert table[11:] == [
        ["runs/a", "eval_clean", "attention", "no", "16", "-1", "5", "0.5000", "0.1250", "0.0100"]
    ]


def kept_run(folder, errors, **changes):
    """Writes a run with one score that has these errors of its three utterances."""
    words = [4, 5, 3]
    score = dict(split="dev", mode="attention", stream=False, chunk_size=16, left_chunks=-1)
    score |= dict(utterances=len(words), wer=sum(errors) / sum(words), cer=0.5, rtf=0.1)
    score |= dict(word_errors=errors, words=words, char_errors=errors, chars=words)
    write_run(folder, {}, [score | {"references": "abc"} | changes])


def test_compare_says_by_how_much_runs_differ_from_the_first(capsys, tmp_path):
    kept_run(tmp_path / "a", [2, 2, 2])
    kept_run(tmp_path / "b", [1, 1, 1], beam_size=10)  # the default, as if it had not been said
    kept_run(tmp_path / "c", [2, 2, 2], data_root="elsewhere")
    out = call(capsys, compare, tmp_path / "a", tmp_path / "b", tmp_path / "c")[1]
    table = out[out.index(next(line for line in out if line.startswith("differences from"))) :]
    assert table[1].split()[-8:] == ["wer", "95", "%", "p(better)", "cer", "95", "%", "p(better)"]
    assert table[2].split()[-8:-4] == ["-0.2500", "-0.3333", "-0.2000", "1.000"]
    assert table[3].split()[-8:-4] == ["+0.0000", "+0.0000", "+0.0000", "0.500"]
    assert len(table) == 4


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"references": "other"}, "scored on other utterances"),
        ({"split": "eval_clean"}, "no score of the same split"),
        ({"beam_size": 3}, "no score of the same split, mode and options"),
        ({"words": None}, "no errors utterance by utterance"),
        ({"words": [4, 5]}, "no errors utterance by utterance"),
        ({"char_errors": [1, 1, "1"]}, "no errors utterance by utterance"),
    ],
)
def test_compare_gives_no_difference_of_what_is_not_comparable(capsys, tmp_path, changes, reason):
    kept_run(tmp_path / "a", [2, 2, 2])
    kept_run(tmp_path / "b", [1, 1, 1], **changes)
    status, out, _ = call(capsys, compare, tmp_path / "a", tmp_path / "b")
    assert status == 0 and reason in out[-1] and out[-1].startswith("no difference: ")
    assert not any("bootstrap" in line for line in out)


def test_scores_are_kept_beside_the_checkpoint_with_the_errors_of_each_utterance(
    world, capsys, tmp_path
):
    shutil.copy(world / "best.ckpt", tmp_path)
    (tmp_path / "scores.jsonl").write_text('{"mode": "att')  # what a killed command leaves
    argv = "--checkpoint", tmp_path / "best.ckpt", "--data_root", world / "data", "--keep"
    for _ in range(2):
        _, (line,), _ = call(capsys, score, *argv, "--mode", "ctc_greedy_search")
    said = json.loads(line)
    assert said["wer_95"][0] < said["wer"] < said["wer_95"][1] and "words" not in said
    _, *lines = (tmp_path / "scores.jsonl").read_text().splitlines()
    assert len(lines) == 2
    kept = json.loads(lines[1])
    assert said == {name: value for name, value in kept.items() if name in said}
    assert kept["words"] == [len(text.split()) for text in TEXTS]
    assert kept["chars"] == [len(text) for text in TEXTS]
    assert sum(kept["word_errors"]) / sum(kept["words"]) == pytest.approx(kept["wer"])
    assert sum(kept["char_errors"]) / sum(kept["chars"]) == pytest.approx(kept["cer"])


def test_scores_of_a_checkpoint_that_a_resume_has_replaced_are_left_out(
    world, capsys, tmp_path, monkeypatch
):
    argv = "--checkpoint", tmp_path / "best.ckpt", "--data_root", world / "data", "--keep", "--mode"
    shutil.copy(world / "best.ckpt", tmp_path)
    for mode in ("ctc_greedy_search", "attention_rescoring"):
        call(capsys, score, *argv, mode)
    assert len(compare.read_scores(str(tmp_path))) == 2 and not capsys.readouterr().err
    checkpoint = torch.load(tmp_path / "best.ckpt")
    torch.save({**checkpoint, "global_step": 2}, tmp_path / "best.ckpt")
    call(capsys, score, *argv, "ctc_greedy_search")
    assert [one["mode"] for one in compare.read_scores(str(tmp_path))] == ["ctc_greedy_search"]
    said = "scores.jsonl: 1 scores of an earlier checkpoint are left out; score again"
    assert said in capsys.readouterr().err
    load_data = score.load_data

    def replaced(*args):  # while the checkpoint before is heard
        shutil.copy(world / "best.ckpt", tmp_path)
        return load_data(*args)

    monkeypatch.setattr(score, "load_data", replaced)
    call(capsys, score, *argv, "ctc_greedy_search")
    lines = (tmp_path / "scores.jsonl").read_text().splitlines()
    models = [json.loads(line)["model"] for line in lines]
    assert models[0] == models[1] != models[2] == models[3]


@pytest.mark.parametrize(
    "checkpoint, details, reason",
    [
        (".", None, "no file of a run"),
        ("org/name", None, "no file of a run"),
        ("best.ckpt", "scores.jsonl", "where --keep adds"),
        ("sub/best.ckpt", None, "sub/scores.jsonl is no file"),
    ],
)
def test_keep_is_refused_before_any_work(tmp_path, monkeypatch, checkpoint, details, reason):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sub" / "scores.jsonl").mkdir(parents=True)
    for name in ("best.ckpt", "sub/best.ckpt"):
        (tmp_path / name).touch()
    options = score.ScoreOptions(checkpoint=checkpoint, details=details, keep=True)
    with pytest.raises(cli.UserError, match=reason):
        score.check_keep(options)


@pytest.mark.parametrize("content", [None, "{", "[]", "{}", '{"options": 1, "metrics": {}}'])
def test_compare_refuses_what_is_no_run(capsys, tmp_path, content):
    if content is not None:
        (tmp_path / "run.json").write_text(content)
    status, out, err = call(capsys, compare, tmp_path)
    assert status == 2 and out == [] and len(err) == 1 and "run.json" in err[0]


def test_the_command_runs_as_a_script_from_elsewhere(world, tmp_path):
    """That train.py does in a Python of its own is tested in test_smoke.py."""
    words = ["--checkpoint", world / "best.ckpt", "--data_root", world / "data"]
    words += ["--mode", "ctc_greedy_search"]
    status, out, err = as_program(tmp_path, ROOT / "score.py", *words)
    assert status == 0, err
    assert json.loads(out.splitlines()[-1])["utterances"] == 6
