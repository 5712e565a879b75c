"""Several processes train as one would: the same weights, every row once, no hang.

A run resumes on another number of processes, too. They are forked, have torchrun's environment and
talk by gloo.
"""

import gc
import json
import multiprocessing
import os
import shutil
import signal

from cli import UserError

import datasets
import pytest
import torch

from helpers import json_lines, trusted
from helpers_train import killed, make_data, ranks, run

SAME = (
    "--dropout_rate 0 --attention_dropout_rate 0 --no-use_dynamic_chunk --max_epochs 2 --lr 0.1"
).split()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Make 22 rows: batches of 8 leave 6, which four processes cannot share evenly."""
    return make_data(tmp_path_factory.mktemp("data"), train=22, dev=5)


def by_sgd(patch):
    """Train with SGD, whose step is linear in the gradient.

    The gradient of a bias of all keys is rounding alone, and Adam would make a full step of it.
    """
    patch.setattr(torch.optim, "AdamW", lambda parameters, lr, **_: torch.optim.SGD(parameters, lr))


@pytest.fixture
def sgd(monkeypatch):
    by_sgd(monkeypatch)


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """A run of one process, without a break."""
    output = tmp_path_factory.mktemp("whole") / "run"
    with pytest.MonkeyPatch.context() as patch:
        by_sgd(patch)
        run(data, output, *SAME, "--batch_size", 8)
    return output


def train_on(count, data, output, *words, **interrupt):
    """Train in `count` processes, and return their exit statuses."""
    return (
        ranks(data, output, *words, count=count, **interrupt)
        if count > 1
        else run(data, output, *words) or [0]
    )


def steps(output):
    return json_lines(output / "steps.jsonl")


def assert_same(output, other, words=()):
    """Compare rows and loss of every update, metrics, and the weights at the end."""
    for one, two in zip(steps(output), steps(other), strict=True):
        assert sorted(one["rows"]) == sorted(two["rows"]) and one["loss"] == pytest.approx(
            two["loss"], rel=1e-5
        )
    metrics = [json.loads((path / "run.json").read_text())["metrics"] for path in (output, other)]
    if "--length_normalized_loss" in words:
        # This one is a mean over rows of the batches' means per label.
        for some in metrics:
            del some["val_loss"]
    assert metrics[0] == pytest.approx(metrics[1], rel=1e-5)
    left = [trusted(path / "last.ckpt")["state_dict"] for path in (output, other)]
    torch.testing.assert_close(left[0], left[1], rtol=1e-5, atol=1e-5)


def test_a_forked_process_leaves_the_garbage_of_its_parent_alone():
    class Garbage:
        def __del__(self):
            os.getpid() == parent or os._exit(1)  # (onnxruntime's would not end at all)

    parent = os.getpid()
    garbage = Garbage()
    garbage.itself = garbage
    gc.disable()
    del garbage
    process = multiprocessing.get_context("fork").Process(target=gc.collect)
    process.start()
    gc.enable()
    process.join()
    assert process.exitcode == 0 and gc.get_freeze_count() == 0


def test_processes_train_as_one_with_their_rows_does(data, tmp_path, sgd, whole):
    assert {len(step["rows"]) for step in steps(whole)} == {8, 6}
    assert ranks(data, tmp_path / "4", *SAME, "--batch_size", 2, count=4) == [0] * 4
    assert_same(tmp_path / "4", whole)


def test_processes_train_as_one_per_label_and_over_an_accumulation(data, tmp_path, sgd):
    words = (*SAME, "--max_epochs", 1, "--length_normalized_loss", "--accumulate_grad_batches", 2)
    run(data, tmp_path / "1", *words, "--batch_size", 8)
    assert {len(step["rows"]) for step in steps(tmp_path / "1")} & {6, 14}
    assert ranks(data, tmp_path / "2", *words, "--batch_size", 4) == [0, 0]
    assert_same(tmp_path / "2", tmp_path / "1", words)


def test_processes_train_as_one_on_batches_by_duration(tmp_path, sgd):
    # All rows have 0.5 s, at the slowest speed 0.56 s. With others, the bound of each process would
    # make other batches.
    rows = make_data(tmp_path, train=30, dev=4, longer=0)
    words = (*SAME, "--max_epochs", 1, "--max_batch_seconds")
    run(rows, tmp_path / "1", *words, 6.8)
    assert 6 in {len(step["rows"]) for step in steps(tmp_path / "1")}
    assert ranks(rows, tmp_path / "4", *words, 6.8 / 4, count=4) == [0] * 4
    assert_same(tmp_path / "4", tmp_path / "1")


# Rows that do not divide: one is left over where each process has taken as many as it can


@pytest.mark.parametrize(
    "rows, dev, count, words, kept",
    [(9, 3, 2, ("--max_frame", 67), 5), (5, 5, 4, ("--max_batch_seconds", 1), 5)],
    ids=["filtered", "seconds"],
)
def test_rows_that_do_not_divide_come_once_an_epoch_and_nobody_waits(
    tmp_path, rows, dev, count, words, kept
):
    data = make_data(tmp_path, rows, dev)
    assert ranks(data, tmp_path / "run", "--max_epochs", 2, *words, count=count) == [0] * count
    lines = steps(tmp_path / "run")
    for epoch in (lines[: len(lines) // 2], lines[len(lines) // 2 :]):
        assert sorted(row for step in epoch for row in step["rows"]) == list(range(kept))


@pytest.mark.parametrize(
    "rows, dev, words, reason",
    [(12, 4, ("--max_frame", 60), "3 rows of train"), (8, 3, (), "3 rows of dev")],
    ids=["train, filtered", "dev"],
)
def test_fewer_rows_than_processes_is_one_line_on_each_and_nothing_is_written(
    tmp_path, capfd, rows, dev, words, reason
):
    assert ranks(make_data(tmp_path, rows, dev), tmp_path / "run", *words, count=4) == [2] * 4
    errors = [line for line in capfd.readouterr().err.splitlines() if "error" in line]
    assert len(errors) == 4 and all(
        f"{reason} cannot be spread over 4 processes" in line for line in errors
    )
    assert not (tmp_path / "run").exists()


def test_torchrun_and_lightning_must_speak_of_the_same_processes(data, tmp_path, monkeypatch):
    for name, value in {
        "TORCHELASTIC_RUN_ID": "test",
        "WORLD_SIZE": "2",
        "RANK": "0",
        "LOCAL_RANK": "0",
    }.items():
        monkeypatch.setenv(name, value)
    for words in (
        ("--devices", 1),
        ("--devices", 1, "--strategy", "ddp"),
        ("--devices", 2, "--num_nodes", 2),
    ):
        with pytest.raises(UserError, match="torchrun has started 2 processes, but --devices"):
            run(data, tmp_path / "run", *words)
    assert not (tmp_path / "run").exists()


# Resuming on other numbers


def cut(count, data, output, *words):
    """Train until kill -9 within the second epoch, of which one update is saved."""
    place = ("on_train_batch_start", 4)
    words = (*words, "--checkpoint_every_n_steps", 1)
    if count == 1:
        killed(data, output, 4, *words)
    else:
        assert (
            ranks(data, output, *words, count=count, interrupt=(0, signal.SIGKILL, *place))[0]
            == -signal.SIGKILL
        )
    assert torch.load(output / "last.ckpt", weights_only=True)["global_step"] == 4


@pytest.fixture(scope="module")
def cut_run(data, tmp_path_factory):
    """A run of one process that was cut; to be copied, not changed."""
    output = tmp_path_factory.mktemp("cut") / "run"
    with pytest.MonkeyPatch.context() as patch:
        by_sgd(patch)
        cut(1, data, output, *SAME, "--batch_size", 8)
    return output


@pytest.mark.parametrize("before, after", [(1, 4), (4, 1)], ids=str)
def test_a_cut_epoch_goes_on_in_other_processes_with_the_same_batches(
    data, tmp_path, sgd, whole, cut_run, before, after
):
    if before == 1:
        shutil.copytree(cut_run, tmp_path / "cut")
    else:
        cut(before, data, tmp_path / "cut", *SAME, "--batch_size", 8 // before)
    words = (*SAME, "--batch_size", 8 // after, "--resume")
    assert train_on(after, data, tmp_path / "cut", *words) == [0] * after
    assert sorted(row for step in steps(tmp_path / "cut")[3:] for row in step["rows"]) == list(
        range(22)
    )
    assert_same(tmp_path / "cut", whole)


@pytest.mark.parametrize(
    "words, reason",
    [
        (("--batch_size", 4), "batch_size 8, not 4"),
        (("--max_batch_seconds", 9), "max_batch_seconds None, not 9.0; batch_size 8"),
        (("--seed", 1), "seed 0, not 1"),
        (("--accumulate_grad_batches", 2), "accumulate_grad_batches 1, not 2"),
        (("--no-group_by_length",), "group_by_length True, not False"),
        (("--limit_rows", 21), "rows of train 22 .*, not 21"),
        (("--batch_size", 8, "--devices", 2, "--strategy", "ddp"), "processes 1, not 2"),
    ],
    ids=str,
)
def test_a_cut_epoch_is_not_mixed_with_another_plan(data, cut_run, words, reason):
    before = (cut_run / "steps.jsonl").read_bytes(), (cut_run / "run.json").read_bytes()
    with pytest.raises(
        UserError, match=f"within an epoch that is planned with {reason}.*; give the same"
    ):
        run(
            data,
            cut_run,
            *SAME,
            *(() if "--max_batch_seconds" in words else ("--batch_size", 8)),
            *words,
            "--resume",
        )
    assert before == ((cut_run / "steps.jsonl").read_bytes(), (cut_run / "run.json").read_bytes())


def test_a_cut_epoch_of_batches_by_seconds_keeps_the_speed_that_they_count(data, tmp_path):
    words = (*SAME, "--max_batch_seconds", 4)
    cut(1, data, tmp_path / "run", *words)
    with pytest.raises(
        UserError,
        match="with seconds at speed 0.9 .*, not at speed 0.5 with .*slowest of --speeds decides",
    ):
        run(data, tmp_path / "run", *words, "--speeds", 0.5, 1.0, "--resume")
    forget_seconds(tmp_path / "run" / "last.ckpt")
    with pytest.raises(UserError, match="with seconds at speed 1 .*, not at speed 0.9 with"):
        run(data, tmp_path / "run", *words, "--resume")


def test_an_older_cut_epoch_of_batches_by_seconds_goes_on_at_speed_1(data, tmp_path):
    """Its checkpoint does not say whether it counted the tail: some versions did, others not."""
    words = (*SAME, "--max_batch_seconds", 4, "--speeds", 1.0, 1.1, "--tail_padding", 300)
    cut(1, data, tmp_path / "run", *words)
    forget_seconds(tmp_path / "run" / "last.ckpt")
    run(data, tmp_path / "run", *words, "--resume")
    seen = [row for step in steps(tmp_path / "run") for row in step["rows"]]
    assert sorted(seen[:22]) == sorted(seen[22:]) == list(range(22))


def forget_seconds(path):
    """Make a checkpoint like an older version's, whose plan did not say what seconds count."""
    checkpoint = torch.load(path, weights_only=True)
    del checkpoint["plan"]["seconds"]
    torch.save(checkpoint, path)


def relabelled(data, folder):
    """Copy the data with other labels of the same lengths."""
    shutil.copytree(data, folder)
    shutil.rmtree(folder / "train")
    rows = datasets.load_from_disk(str(data / "train/0"))
    labels = [
        {"input_ids": [4 + (token - 3) % 8 for token in row["labels"]["input_ids"]]} for row in rows
    ]
    rows = datasets.Dataset.from_dict({"input_values": rows["input_values"], "labels": labels})
    rows.save_to_disk(str(folder / "train/0"))
    return folder


def test_changed_labels_of_the_same_lengths_are_noticed(data, cut_run, tmp_path, caplog):
    other = relabelled(data, tmp_path / "data")
    with pytest.raises(
        UserError,
        match=r"within an epoch that is planned with labels of train \(checksum \w+\), not \(\w+",
    ):
        run(other, cut_run, *SAME, "--batch_size", 8, "--resume")
    words = ("--batch_size", 8, "--max_epochs")
    run(data, tmp_path / "run", *words, 1)
    run(other, tmp_path / "run", *words, 2, "--resume")
    assert [("planned with labels of train" in line) for line in caplog.messages].count(True) == 1


def test_a_checkpoint_without_a_plan_goes_on_as_before(data, cut_run, tmp_path, sgd):
    checkpoint = torch.load(cut_run / "last.ckpt", weights_only=True)
    assert checkpoint.pop("plan")["rows of train"].startswith("22 ")
    torch.save(checkpoint, tmp_path / "old.ckpt")
    run(data, tmp_path / "run", *SAME, "--batch_size", 8, "--resume", tmp_path / "old.ckpt")
    assert torch.load(tmp_path / "run" / "last.ckpt", weights_only=True)["global_step"] == 6


def test_after_an_epoch_any_plan_will_do_and_the_run_says_so(data, tmp_path, caplog):
    words = ("--no-use_dynamic_chunk", "--max_epochs")
    assert ranks(data, tmp_path / "run", *words, 1, "--batch_size", 4) == [0, 0]
    run(data, tmp_path / "run", *words, 2, "--batch_size", 6, "--resume")
    said = (
        "planned with batch_size 4, not 6; processes 2, not 1; epochs from here on are planned anew"
    )
    assert [said in line for line in caplog.messages].count(True) == 1
    lines = steps(tmp_path / "run")
    assert len(lines) == 3 + 4
    for epoch in (lines[:3], lines[3:]):
        assert sorted(row for step in epoch for row in step["rows"]) == list(range(22))
