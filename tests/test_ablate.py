"""tools/ablate.py: its plan, what it repeats, and its table, with made-up trainings."""

import dataclasses
import json
import os
import shutil
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from cli import UserError

import pytest
import torch
from torch.utils.tensorboard import SummaryWriter

import train
from files import alone
from presets import ModelOptions
from tools import ablate

ERRORS = {"baseline": [4, 4, 4, 4], "wide_masks": [3, 4, 3, 4], "together": [9, 9, 9, 9]}


def value_of(words, flag):
    return words[words.index(flag) + 1]


@pytest.fixture
def night(tmp_path, monkeypatch):
    """A night's work without the work: run(*flags) -> the commands that were called.

    An epoch of wide_masks takes twice the baseline's time. run.at says at which command, counted
    from 0, run.error is raised.
    """
    calls = []

    def call(log, *words):
        if len(calls) == run.at:
            run.at = None
            raise run.error
        calls.append(words)
        if words[0] == "prepare.py":
            Path(value_of(words, "--data_root")).mkdir(exist_ok=True)
        elif words[0] == "train.py":
            folder = Path(value_of(words, "--output_dir"))
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "run.json").write_text(json.dumps({"metrics": {"steps": 20}}))
            (folder / "flags").write_text(" ".join(words))
            (folder / "scores.jsonl").unlink(missing_ok=True)
        elif words[0] == "score.py":
            folder = Path(value_of(words, "--checkpoint")).parent
            name, seed = folder.name.rsplit("_", 1)
            wrong = [count + int(seed) for count in ERRORS.get(name, [0] * 4)]
            score = {"mode": value_of(words, "--mode"), "split": "dev", "references": "x"}
            score |= {"chunk_size": int(value_of(words, "--chunk_size")), "utterances": 4}
            score |= {"wer": 0.5, "cer": 0.5, "rtf": 0.1, "words": [10] * 4, "chars": [50] * 4}
            score |= {"word_errors": wrong, "char_errors": wrong}
            with open(folder / "scores.jsonl", "a") as file:
                file.write(json.dumps(score) + "\n")
        return 60.0

    def seconds(folder):
        return 0.2 if "--max_freq_mask" in Path(folder, "flags").read_text() else 0.1

    def run(*flags):
        calls.clear()
        words = ["--sources", str(tmp_path / "src"), "--out", str(tmp_path / "out")]
        ablate.main([*words, "--epochs", "20", "--seeds", "0", "2", *map(str, flags)])
        return list(calls)

    monkeypatch.setattr(ablate, "call", call)
    monkeypatch.setattr(ablate, "update_seconds", seconds)
    run.at = None
    run.folder = tmp_path / "out"
    return run


WIDE = ("--techniques", "wide_masks")


def trainings(calls, kind="runs"):
    """The runs that were trained -> epochs."""
    words = [words for words in calls if words[0] == "train.py"]
    folders = [Path(value_of(one, "--output_dir")) for one in words]
    return {
        folder.name: int(value_of(one, "--max_epochs"))
        for folder, one in zip(folders, words)
        if kind in folder.parts
    }


def test_flags_of_all_techniques_are_train_pys():
    for name in (ablate.ALONE, *ablate.TECHNIQUES, ablate.TOGETHER, *ablate.VARIED):
        flags = f"{ablate.BASELINE} {ablate.job_of('src', name, 0).flags}"
        train.read_flags(flags.format(batch_size=8, spoken="best.ckpt").split())


def test_a_start_hands_no_option_of_its_own_training_on():
    """With --init_from an option of the model that is not given is as the start had it."""
    names = {field.name for field in dataclasses.fields(ModelOptions)}
    of_start, given = (
        names & train.read_flags(flags.split()).keys()
        for flags in (ablate.SPOKEN_FLAGS, ablate.BASELINE.format(batch_size=8))
    )
    assert of_start and of_start <= given


def test_a_technique_gets_the_epochs_that_fit_the_baselines_time(night):
    calls = night(*WIDE)
    expected = {"baseline_0": 20, "wide_masks_0": 10, "baseline_2": 20, "wide_masks_2": 10}
    assert trainings(calls) == expected
    assert list(trainings(calls)) == list(expected)  # the first seed of all comes first
    assert sum(words[0] == "prepare.py" for words in calls) == 1
    assert sum(words[0] == "score.py" for words in calls) == 4 * 4


def test_all_trainings_have_the_batch_size_that_is_asked_for(night):
    calls = night("--techniques", "synthetic_start", "--epochs", "2000", "--batch_size", "2")
    sizes = [value_of(words, "--batch_size") for words in calls if words[0] == "train.py"]
    assert len(sizes) == 2 + 2 + 4 and set(sizes) == {"2"}  # starts, measured, runs


def test_a_technique_is_measured_beside_the_baseline(night, monkeypatch):
    """The machine has become four times as slow when the second technique is measured."""
    real, slow = ablate.update_seconds, iter((1, 1, 4, 4))
    monkeypatch.setattr(ablate, "update_seconds", lambda folder: next(slow) * real(folder))
    epochs = trainings(night("--techniques", "wide_masks", "interctc"))
    assert (epochs["wide_masks_0"], epochs["interctc_0"]) == (10, 20)


def test_what_a_start_takes_is_taken_off_its_epochs(night, capsys):
    with pytest.raises(UserError, match="2 runs have failed"):
        night("--techniques", "synthetic_start")  # three minutes of start, an epoch of a second
    assert "the start takes 180 s" in capsys.readouterr().out
    results = json.loads((night.folder / "results.json").read_text())
    results["starts"] = {"src": 3.0, "src, seed 0": 2.0, "src, seed 2": 2.0}
    del results["costs"]["src, synthetic_start"]
    (night.folder / "results.json").write_text(json.dumps(results))
    calls = night("--techniques", "synthetic_start")
    assert trainings(calls) == {"synthetic_start_0": 15, "synthetic_start_2": 15}
    words = next(one for one in calls if "runs/synthetic_start_0" in " ".join(one[:5]))
    assert value_of(words, "--init_from").endswith("src/spoken_seed0/best.ckpt")
    assert "--preset" not in words


def test_what_is_done_is_not_repeated_and_what_was_killed_is(night, capsys):
    night.at, night.error = 10, KeyboardInterrupt(15)  # while the second run is scored
    with pytest.raises(KeyboardInterrupt):
        night(*WIDE)
    assert list(trainings(night(*WIDE))) == ["wide_masks_0", "baseline_2", "wide_masks_2"]
    table = capsys.readouterr().out
    assert night(*WIDE) == [] and table in capsys.readouterr().out
    with alone(str(night.folder / ".lock"), "another's"):  # while the night goes on
        assert night(*WIDE, "--table") == [] and table in capsys.readouterr().out


def test_jobs_share_the_cores_and_make_the_same_table(night, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "")  # which is put back at the end
    night(*WIDE)
    table = (night.folder / "table.md").read_text()
    shutil.rmtree(night.folder)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    assert trainings(night(*WIDE, "--jobs", 3)).keys() > {"wide_masks_2"}
    assert (night.folder / "table.md").read_text() == table and os.environ["OMP_NUM_THREADS"] == "2"


def test_jobs_train_the_starts_of_the_seeds_side_by_side(night, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "")
    both = threading.Barrier(2, timeout=60)
    monkeypatch.setattr(ablate, "train_spoken", lambda *_: both.wait() * 0.0)
    calls = night("--techniques", "synthetic_start", "--epochs", "200", "--jobs", "2")
    assert trainings(calls).keys() > {"synthetic_start_0", "synthetic_start_2"}


def test_a_command_ends_when_the_night_is_broken_off(tmp_path):
    script = tmp_path / "script.py"
    script.write_text("import time; print('begun', flush=True); time.sleep(600)")
    log = tmp_path / "log"
    with ThreadPoolExecutor(1) as pool:
        try:
            first, second = (pool.submit(ablate.call, str(log), str(script)) for _ in range(2))
            while not log.exists() or not log.read_text():
                time.sleep(0.01)
            ablate.STOP.set()
            for future in (first, second):
                with pytest.raises(UserError, match="ends with status -15"):
                    future.result(60)
        finally:
            ablate.STOP.clear()


def test_a_technique_with_other_flags_is_another(night, monkeypatch):
    night(*WIDE)
    monkeypatch.setitem(ablate.TECHNIQUES, "wide_masks", "--max_freq_mask 20")
    assert list(trainings(night(*WIDE))) == ["wide_masks_0", "wide_masks_2"]


def test_a_run_that_fails_stops_no_other(night, capsys):
    night.at, night.error = 3, UserError("no luck")  # the first training
    with pytest.raises(UserError, match="1 runs have failed"):
        night(*WIDE)
    out = capsys.readouterr().out
    assert "src, baseline, seed 0: no luck" in out and "\nwide_masks" in out
    assert list(trainings(night(*WIDE))) == ["baseline_0"]


def test_the_table_has_means_spreads_and_differences(night, capsys, monkeypatch):
    monkeypatch.setattr(ablate, "RECIPE", ("muon", "wide_masks"))
    night("--techniques", "wide_masks", "together")
    out = capsys.readouterr().out
    titles = [line for line in out.splitlines() if line.startswith("src, ")]
    assert titles == [
        f"src, {search}, {chunk}"
        for search in ablate.SEARCHES
        for chunk in ("full context", "chunk 16")
    ]
    markdown = (night.folder / "table.md").read_text().splitlines()
    assert [line[:-1] for line in markdown if line.startswith("src, ")] == titles
    rows = {line.split(" | ")[0][2:]: line[2:-2].split(" | ") for line in markdown if "|" in line}
    # 16 and 24 errors of 200 characters and of 40 words.
    baseline = ["baseline", "2", "20", "1.0", "0.1000", "0.0283", *"---"]
    assert rows["baseline"] == [*baseline, "0.5000", "0.1414", *"---"]
    cells = rows["wide_masks"]
    assert cells[:7] == ["wide_masks", "2", "10", "1.0", "0.0900", "0.0283", "-0.0100"]
    assert cells[11] == "-0.0500"
    low, high = map(float, cells[12].split())
    assert low == -0.1 and high == 0 and float(cells[13]) > 0.9
    assert rows["together"][7:9] == ["+0.1000 +0.1000", "0.000"]
    text = next(line for line in out.splitlines() if line.startswith("wide_masks"))
    assert text.split() == " ".join(cells).split()


def test_the_recipe_without_a_technique_is_compared_with_the_recipe(night, capsys, monkeypatch):
    """The time is that of the baseline, which is measured and not trained."""
    monkeypatch.setattr(ablate, "RECIPE", ("muon", "wide_masks"))
    monkeypatch.setitem(ablate.VARIED, "without_muon", ("wide_masks",))
    asked = "--techniques", "without_muon", "together", "--against", "together"
    calls = night(*asked)
    assert trainings(calls) == dict.fromkeys(
        ("together_0", "without_muon_0", "together_2", "without_muon_2"), 10
    )
    assert trainings(calls, "measured").keys() == {"measured"}
    flags = [" ".join(words[1:]) for words in calls if "runs/without_muon_0" in " ".join(words)]
    assert "--max_freq_mask" in flags[0] and "--optimizer" not in flags[0]
    table = capsys.readouterr().out
    row = next(line for line in table.splitlines() if line.startswith("without_muon")).split()
    assert "less together" in table and row[4:9] == "0.0200 0.0283 -0.1800 -0.1800 -0.1800".split()
    assert trainings(night(*asked[:-1], "baseline")).keys() == {"baseline_0", "baseline_2"}


@pytest.mark.parametrize(
    "flags, reason",
    [
        (["--epochs", "21"], "is of other options"),
        (["--batch_size", "2"], "is of other options"),
        (["--seeds", "1", "1"], "none twice"),
        (["--sources", "a/src", "b/src"], "there twice"),
        (["--sources"], "give --sources"),
        (["--techniques", "luck"], "invalid choice"),
    ],
)
def test_what_would_mix_results_is_refused(night, flags, reason):
    night(*WIDE)
    with pytest.raises(UserError, match=reason):
        night(*WIDE, *flags)


def test_the_time_of_an_update_is_that_between_log_lines(tmp_path):
    with SummaryWriter(tmp_path / "logs") as log:
        for step in (9, 19, 29):
            log.add_scalar("lr-AdamW", 1, step, walltime=100 + step / 4)
            log.add_scalar("val_cer", 1, step + 50, walltime=900)
    assert ablate.update_seconds(tmp_path) == 0.25
    with SummaryWriter(tmp_path / "short" / "logs") as log:
        log.add_scalar("lr-AdamW", 1, 9)
    with pytest.raises(UserError, match="give more --calibration_epochs"):
        ablate.update_seconds(tmp_path / "short")


def test_a_command_that_fails_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/sh")
    script = tmp_path / "script"
    script.write_text("echo train.py: error: no data >&2; exit 2")
    with pytest.raises(UserError, match="ends with status 2: train.py: error: no data"):
        ablate.call(str(tmp_path / "log"), str(script))
