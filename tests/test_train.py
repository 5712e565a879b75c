"""train.py as a command: its outputs, resuming, and what it refuses.

The rows are noise, from which nothing is learnt.
"""

import functools
import json
import multiprocessing
import os
import resource
import shutil
import signal
import sys
import threading
from pathlib import Path

import cli
from cli import UserError

import datasets
import numpy as np
import pytest
import torch

import files
import recovery
import train
from helpers import same, trusted
from helpers_train import SMALL, fine_tune, killed, ranks, run, signalled, weights
from model import OptimOptions, load_checkpoint
from presets import ModelOptions
from tokenizer import save_tokenizer, train_char
from transforms import Frontend, extract


@pytest.fixture(scope="module")
def unbroken(data, tmp_path_factory):
    """A function that trains without a break, once for the same words, and returns the output."""

    @functools.cache
    def train_whole(*words):
        output = tmp_path_factory.mktemp("whole") / "run"
        run(data, output, *words)
        return output

    return train_whole


@pytest.fixture(scope="module")
def one_update(data, tmp_path_factory):
    """A run that ended after one update; to be copied, not changed."""
    output = tmp_path_factory.mktemp("one") / "run"
    run(data, output, "--max_steps", 1)
    return output


@pytest.fixture
def ended(one_update, tmp_path):
    return shutil.copytree(one_update, tmp_path / "run")


def test_a_run_leaves_the_best_and_the_newest_checkpoint_and_its_record(data, tmp_path):
    run(data, tmp_path / "run", "--max_epochs", 1, "--seed", 3)
    newest = torch.load(tmp_path / "run" / "last.ckpt", weights_only=True)
    assert newest["global_step"] == 4 and (tmp_path / "run" / "best.ckpt").exists()
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert (
        record["seed"] == 3
        and record["options"]["output_size"] == 16
        and record["metrics"]["steps"] == 4
    )
    assert {"val_cer", "val_wer", "val_cer_chunk16", "val_wer_chunk16", "val_loss"} <= set(
        record["metrics"]
    )


def test_a_run_that_ends_between_validations_still_leaves_both_checkpoints(data, tmp_path):
    run(data, tmp_path / "run", "--max_steps", 3)
    for name in ("best.ckpt", "last.ckpt"):
        assert torch.load(tmp_path / "run" / name, weights_only=True)["global_step"] == 3


# A pulled plug


def left(output):
    """Return all that training leaves behind, to be compared bit by bit."""
    kept = {
        name: (output / name).read_bytes()
        for name in ("steps.jsonl", "skipped.jsonl")
        if (output / name).exists()
    }
    for name in ("last.ckpt", "best.ckpt"):
        checkpoint = trusted(output / name)
        parts = {
            key: checkpoint.get(key)
            for key in ("state_dict", "current_model_state", "averaging_state", "optimizer_states")
        }
        tensors = torch.utils._pytree.tree_leaves(parts)
        kept[name] = [
            value.numpy().tobytes() if isinstance(value, torch.Tensor) else value
            for value in tensors
        ]
        kept[name] += [checkpoint["lr_schedulers"], checkpoint["skips"], checkpoint["global_step"]]
        # Logs count updates by this one.
        kept[name].append(checkpoint["loops"]["fit_loop"]["epoch_loop.state_dict"])
    return kept


# An epoch has five batches of one row or two, so that its second update is made of two batches.
AVERAGED = ("--max_batch_seconds", 2, "--accumulate_grad_batches", 3, "--ema_decay", 0.5)


@pytest.mark.parametrize(
    "words, saved, skipped, places",
    [
        # Loader processes are ahead of training and of Lightning's set_epoch, and two updates are
        # made between two saves. The last place is behind an epoch and its validation.
        (
            ("--check_val_every_n_epoch", 2),
            ("--num_workers", 2, "--checkpoint_every_n_steps", 2),
            (1, 4),
            [
                ("on_train_epoch_end", 3),
                ("on_train_batch_start", 7),
                ("validation_step", 7),
                ("on_train_batch_start", 8),
            ],
        ),
        # Nothing is saved within an accumulation.
        (
            AVERAGED,
            ("--checkpoint_every_n_steps", 1),
            (),
            [("validation_step", 4), ("on_train_batch_start", 7), ("on_train_batch_start", 9)],
        ),
    ],
    ids=["loader processes, skips", "averaged, accumulated, seconds"],
)
def test_kill_9_anywhere_leaves_no_trace_in_weights_optimizer_or_logs(
    data, tmp_path, monkeypatch, unbroken, words, saved, skipped, places
):
    """The whole run has neither loader processes nor saves within an epoch."""
    words = ("--max_epochs", 3, *words)
    # What the log says of updates after the last save must go.
    monkeypatch.setattr("model.FLUSH_EVERY", 1)
    if skipped:
        monkeypatch.setattr(
            train.U2,
            "on_before_optimizer_step",
            poisoned(train.U2.on_before_optimizer_step, skipped),
        )
        run(data, whole := tmp_path / "whole", *words)
    else:
        whole = unbroken(*words)
    cut = tmp_path / "cut"
    for number, (hook, batch) in enumerate(places):
        killed(data, cut, batch, *words, *saved, *(["--resume"] if number else []), hook=hook)
    run(data, cut, *words, *saved, "--resume")
    assert left(cut) == left(whole)
    metrics = [json.loads((output / "run.json").read_text())["metrics"] for output in (whole, cut)]
    assert metrics[0] == metrics[1] and metrics[0]["skipped_updates"] == len(skipped)


def poisoned(original, steps):
    def step(self, optimizer):
        if self.trainer.global_step in steps:
            self.net.ctc.weight.grad.fill_(torch.nan)
        original(self, optimizer)

    return step


def test_steps_jsonl_has_a_line_for_every_update_with_its_loss_and_its_rows(
    data, tmp_path, monkeypatch
):
    monkeypatch.setattr(
        train.U2, "on_before_optimizer_step", poisoned(train.U2.on_before_optimizer_step, (1,))
    )
    run(data, tmp_path / "run", "--max_epochs", 2, "--accumulate_grad_batches", 3)
    lines = [
        json.loads(line) for line in (tmp_path / "run" / "steps.jsonl").read_text().splitlines()
    ]
    assert [line["step"] for line in lines] == [0, 1, 2, 3] and all(
        line["loss"] > 0 for line in lines
    )
    assert [len(line["rows"]) for line in lines] == [6, 2, 6, 2]
    assert sorted(lines[0]["rows"] + lines[1]["rows"]) == list(range(8))
    assert [line.get("skipped") for line in lines] == [None, True, None, None]


def test_a_run_that_max_steps_cut_goes_on_within_its_epoch_or_with_the_next(
    data, tmp_path, unbroken
):
    words = ("--scheduler", "warmup", "--max_epochs", -1, "--max_steps")
    whole = unbroken(*words, 7)
    # Four updates are an epoch.
    run(data, tmp_path / "cut", *words, 4)
    for steps in (5, 7):
        run(data, tmp_path / "cut", *words, steps, "--resume")
    assert same(weights(whole / "last.ckpt"), weights(tmp_path / "cut" / "last.ckpt"))
    lines = [(output / "steps.jsonl").read_bytes() for output in (whole, tmp_path / "cut")]
    assert lines[0] == lines[1]


def test_a_signal_saves_between_two_updates_and_ends_with_its_status(
    data, tmp_path, unbroken, capsys
):
    """SIGTERM comes in a step, and Ctrl-C in a validation of the run that goes on."""
    words = ("--max_epochs", 3, *AVERAGED)
    resume = []
    for number, hook, batch, updates in (
        (signal.SIGTERM, "on_before_optimizer_step", 7, 3),
        (signal.SIGINT, "validation_step", 9, 4),
    ):
        with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stopped:
            patch.setattr(train.U2, hook, signalled(number, hook, batch))
            run(data, tmp_path / "cut", *words, *resume)
        assert stopped.value.code == 128 + number
        assert f"{number.name} at step {updates}: " in capsys.readouterr().err
        resume = ["--resume"]
    run(data, tmp_path / "cut", *words, "--resume")
    assert left(tmp_path / "cut") == left(unbroken(*words))


BY_TWO = (
    "--max_epochs 2 --checkpoint_every_n_steps 1 --num_workers 1 --frontend fbank --devices 2 "
    "--strategy ddp"
).split()


@pytest.fixture(scope="module")
def by_two(data, tmp_path_factory):
    """(what a run in two processes has printed, its output); Lightning starts the second one.

    The first is forked, for it need not import anything again. Lightning starts the other with the
    same sys.argv, once this one is no module of python -m.
    """
    folder = tmp_path_factory.mktemp("two")
    paths = ["--data_root", data, "--output_dir", folder / "run"]
    words = list(map(str, [*paths, *SMALL, "--batch_size", 2, *BY_TWO]))

    def body():
        sys.argv = [train.__file__, *words]
        sys.modules["__main__"].__spec__ = None
        os.dup2(os.open(folder / "printed", os.O_WRONLY | os.O_CREAT), 1)
        sys.stdout = open(1, "w", closefd=False)
        os.chdir(folder)
        cli.run(train.main)

    process = multiprocessing.get_context("fork").Process(target=body)
    process.start()
    process.join()
    assert process.exitcode == 0
    return (folder / "printed").read_text(), folder / "run"


def test_two_processes_share_an_epoch_and_write_one_run(data, by_two):
    printed, output = by_two
    best = torch.load(output / "best.ckpt", weights_only=True)
    assert best["model_options"]["output_size"] == 16
    record = json.loads((output / "run.json").read_text())
    # Of an epoch's four batches, each process takes two.
    assert record["metrics"]["steps"] == 4 and printed.count("updates planned") == 1
    own, *_ = load_checkpoint(str(output / "last.ckpt"))
    other = features_of(data, own.frontend)
    # Every rank computes the CMVN of all rows.
    torch.testing.assert_close(own.net.encoder.cmvn_mean, other.mean(0), rtol=1e-4, atol=1e-4)
    # Each rank has heard one of the two rows of dev.
    shown = b"".join(log.read_bytes() for log in (output / "logs").glob("events*"))
    assert b"dev_0" in shown and b"dev_1" in shown


def test_two_processes_survive_signals_to_one_of_them_and_kill_9(
    data, tmp_path, by_two, monkeypatch
):
    # The loader process of a killed process holds its connection, and looks every 5 s for its end.
    monkeypatch.setattr(torch.utils.data._utils.worker, "MP_STATUS_CHECK_INTERVAL", 0.2)
    stop = (1, signal.SIGTERM, "on_before_optimizer_step", 0)
    assert ranks(data, tmp_path / "cut", *BY_TWO, interrupt=stop) == [143, 0]
    for hook, batch in (("on_train_batch_start", 2), ("validation_step", 3)):
        first, other = ranks(
            data, tmp_path / "cut", *BY_TWO, "--resume", interrupt=(0, signal.SIGKILL, hook, batch)
        )
        assert first == -signal.SIGKILL and other > 0
    assert ranks(data, tmp_path / "cut", *BY_TWO, "--resume") == [0, 0]
    assert left(tmp_path / "cut") == left(by_two[1])
    lines = [
        json.loads(line) for line in (tmp_path / "cut" / "steps.jsonl").read_text().splitlines()
    ]
    assert [sorted(a["rows"] + b["rows"]) for a, b in zip(lines[::2], lines[1::2])] == [
        list(range(8))
    ] * 2


def test_last_ckpt_is_also_written_by_the_clock(data, tmp_path):
    killed(data, tmp_path / "run", 2, "--max_epochs", 1, "--checkpoint_every_n_minutes", 0)
    assert torch.load(tmp_path / "run" / "last.ckpt", weights_only=True)["global_step"] == 2


def test_a_full_disk_is_one_line_and_leaves_the_last_checkpoint_whole(data, ended):
    before = (ended / "last.ckpt").read_bytes()
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, limit[1]))
    try:
        with pytest.raises(
            UserError, match="last.ckpt: cannot be written .*make room .* then go on with --resume"
        ):
            run(data, ended, "--max_steps", 2, "--resume")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert (ended / "last.ckpt").read_bytes() == before
    assert not list(ended.glob(f".*{files.ASIDE}*"))


@pytest.mark.parametrize(
    "room, said, left",
    [
        (2**12, "cannot be written .*make room", []),
        (
            2**16 + 2**12,
            "last.ckpt: cannot be written .*begin again with --overwrite: there is no checkpoint "
            "yet",
            ["logs", "run.json", "steps.jsonl"],
        ),
    ],
)
def test_a_disk_that_is_full_from_the_start_is_one_true_line(
    data, tmp_path, room, said, left, monkeypatch
):
    monkeypatch.setattr(threading, "excepthook", lambda failure: left.append(failure))
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, limit[1]))
    try:
        with pytest.raises(UserError, match=said):
            run(data, tmp_path / "run", "--max_steps", 1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert sorted(path.name for path in (tmp_path / "run").glob("*")) == left


def test_what_tensorboards_thread_cannot_write_is_no_traceback(monkeypatch):
    told = []
    monkeypatch.setattr(threading, "excepthook", lambda failure: told.append(failure.exc_type))

    def fail(kind):
        raise kind("of a thread")

    with recovery.one_line_endings(None, "run", lambda: True):
        for kind in (OSError, ValueError):
            (thread := threading.Thread(target=fail, args=(kind,))).start()
            thread.join()
    assert told == [ValueError]


def test_half_written_files_of_a_killed_run_are_removed_at_the_next_start(data, ended):
    for name in ("last.ckpt", "best.ckpt", "run.json"):
        Path(files.aside(str(ended / name))).write_text("half")
    (ended / "best.ckpt.tmp").write_text("mine")
    with open(ended / "steps.jsonl", "a") as file:
        file.write('{"step": 1, "lo')
    run(data, ended, "--max_steps", 1, "--resume")
    assert not list(ended.glob(f".*{files.ASIDE}*"))
    assert (ended / "best.ckpt.tmp").read_text() == "mine"
    assert len((ended / "steps.jsonl").read_text().splitlines()) == 1


# Memory


def test_the_memory_check_changes_nothing(data, tmp_path, monkeypatch):
    words = ("--max_steps", 2, "--cnn_module_norm", "batch_norm")
    run(data, tmp_path / "with", *words)
    monkeypatch.setattr(recovery.MemoryCheck, "on_train_start", lambda *_: None)
    run(data, tmp_path / "without", *words)
    assert left(tmp_path / "with") == left(tmp_path / "without")


@pytest.mark.parametrize(
    "words, rows, advice",
    [
        (("--batch_size", 2), "2 rows,", "lower --batch_size, for example to 1"),
        (("--max_batch_seconds", 1.5), "2 rows,", "lower --max_batch_seconds, for example to 1"),
        # The longest row has 79 frames, before the slowest speed and the tail.
        (
            ("--batch_size", 1, "--cr_ctc_weight", 0.2, "--tail_padding", 990),
            "1 rows in two views",
            "lower --max_frame, for example to 39",
        ),
        (
            ("--batch_size", 1, "--no-filter"),
            "1 rows,",
            "leave row 7 of train out, or give --max_frame 39 instead of --no-filter",
        ),
    ],
    ids=str,
)
def test_a_batch_that_does_not_fit_the_memory_is_said_before_the_first_update(
    data, tmp_path, monkeypatch, words, rows, advice
):
    def loss(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(train.U2, "training_step", lambda *_: pytest.fail("trained"))
    monkeypatch.setattr("conformer.U2Conformer.loss", loss)
    with pytest.raises(
        UserError, match=f"a batch of {rows}.* does not fit the memory of cpu .*{advice}"
    ):
        run(data, tmp_path / "run", *words)


def test_an_existing_run_is_refused_untouched_unless_told(data, tmp_path):
    output = tmp_path / "run"
    output.mkdir()
    (output / "best.ckpt").write_text("precious")
    (output / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="holds a run already"):
        run(data, output, "--max_steps", 1)
    assert (output / "best.ckpt").read_text() == "precious"
    with pytest.raises(UserError, match="not a checkpoint of lightning-U2"):
        run(data, output, "--resume", output / "best.ckpt")
    with pytest.raises(UserError, match="none: no such data root"):
        run(tmp_path / "none", output, "--overwrite", "--tokenizer", data / "tokenizer.json")
    with pytest.raises(UserError, match="name a data root that .* or say with --tokenizer"):
        run(tmp_path, output, "--overwrite")  # the folder may be a source of prepare.py
    # Wrong input overwrites nothing.
    assert (output / "best.ckpt").read_text() == "precious"
    run(data, output, "--max_steps", 1, "--overwrite")
    assert (
        torch.load(output / "best.ckpt", weights_only=True)
        and (output / "notes.txt").read_text() == "mine"
    )


def test_resuming_with_other_options_is_refused_and_the_option_named(data, ended):
    with pytest.raises(UserError, match="num_blocks 1, not 2"):
        run(data, ended, "--resume", "--num_blocks", 2)


@pytest.mark.parametrize(
    "words, reason",
    [
        (("--max_epochs", -1), "a run needs an end"),
        (("--output_size", 15), "--output_size 15"),
        (("--decoder_attention_heads", 3), "--decoder_attention_heads"),
        (("--no-causal", "--cnn_module_kernel", 4), "odd"),
        (("--nonsense", 1), "unrecognized arguments"),
        (("--preset", "huge"), "invalid choice"),
        (("--strategy", "fsdp"), "--strategy fsdp"),
        (("--strategy", "nonsense"), "Lightning refuses"),
        (("--tokenizer", "none.json"), "none.json"),
    ],
    ids=str,
)
def test_options_that_cannot_work_are_refused_before_anything_is_written(
    data, tmp_path, words, reason
):
    if words[1] == "fsdp" and torch.cuda.is_available():
        pytest.skip("FSDP is allowed where there is a GPU")
    with pytest.raises(UserError, match=reason):
        run(data, tmp_path / "run", *words)
    assert not (tmp_path / "run").exists()


def test_what_transformers_made_trains_unchanged(tmp_path):
    """Wav2Vec2FeatureExtractor and Wav2Vec2CTCTokenizer give these columns and this vocab.json.

    The id of the blank is not 0 there.
    """
    vocabulary = {"|": 0, "A": 1, "B": 2, "C": 3, "[UNK]": 4, "[PAD]": 5}
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary))
    rng = np.random.default_rng(0)
    for split in ("train", "dev"):
        waveforms = [rng.standard_normal(9000).astype(np.float32) for _ in range(4)]
        waveforms = [(x - x.mean()) / np.sqrt(x.var() + 1e-7) for x in waveforms]
        rows = datasets.Dataset.from_dict(
            {"input_values": waveforms, "labels": [[1, 2, 0, 3, 3]] * 4}
        )
        assert (
            rows.features["labels"].feature.dtype == "int64"
            and rows.features["input_values"].feature.dtype == "float32"
        )
        rows.save_to_disk(str(tmp_path / split / "0"))
    run(tmp_path, tmp_path / "run", "--max_steps", 2, "--tokenizer", tmp_path / "vocab.json")
    model, tokenizer, _ = load_checkpoint(str(tmp_path / "run" / "best.ckpt"))
    # The vocabulary has sos and eos at its end.
    assert model.net.blank_id == tokenizer.blank_id == 5 and tokenizer.vocab_size == 8
    assert tokenizer.decode([1, 2, 0, 3, 3]) == "AB CC"


def test_dev_rows_too_short_for_their_labels_leave_val_loss_finite(data, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train").symlink_to(data / "train")
    rows = {
        "input_values": [np.ones(n, np.float32) for n in (1, 900, 9000)],
        "labels": [[4, 5], [4] * 30, [4] * 30],
    }
    datasets.Dataset.from_dict(rows).save_to_disk(str(tmp_path / "data" / "dev" / "0"))
    run(
        tmp_path / "data",
        tmp_path / "run",
        "--max_steps",
        1,
        "--tokenizer",
        data / "tokenizer.json",
    )
    metrics = json.loads((tmp_path / "run" / "run.json").read_text())["metrics"]
    assert np.isfinite(metrics["val_loss"]) and np.isfinite(metrics["val_cer"])


def test_a_dev_without_words_is_refused_before_anything_is_written(data, tmp_path):
    (root := tmp_path / "data").mkdir()
    (root / "train").symlink_to(data / "train")
    shutil.copy(data / "tokenizer.json", root)
    rows = {"input_values": [np.ones(9000, np.float32)] * 2, "labels": [np.zeros(0, np.int64)] * 2}
    kinds = {
        name: datasets.List(datasets.Value(kind))
        for name, kind in (("input_values", "float32"), ("labels", "int64"))
    }
    shard = datasets.Dataset.from_dict(rows, datasets.Features(kinds))
    shard.save_to_disk(str(root / "dev" / "0"))
    with pytest.raises(UserError, match="dev has no words, so that no model would be the best"):
        run(root, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_damaged_shard_is_one_line_on_stderr_and_status_2(data, tmp_path, monkeypatch, capfd):
    shutil.copytree(data, tmp_path / "data")
    shard = next((tmp_path / "data" / "train").rglob("*.arrow"))
    os.truncate(shard, shard.stat().st_size // 2)
    command = [
        "train.py",
        "--data_root",
        tmp_path / "data",
        "--output_dir",
        tmp_path / "run",
        *SMALL,
    ]
    monkeypatch.setattr(sys, "argv", list(map(str, command)))
    with pytest.raises(SystemExit) as stopped:
        cli.run(train.main)
    errors = capfd.readouterr().err
    assert stopped.value.code == 2 and len(errors.splitlines()) == 1, errors
    assert errors.startswith("train.py: error: ") and str(shard.parent) in errors
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "words, reason",
    [
        (("--min_frame", 5000), "no row of train is left"),
        (("--seed", -1), "--seed"),
        (("--batch_size", 0), "--batch_size 0"),
        (("--accumulate_grad_batches", 0), "--accumulate_grad_batches"),
    ],
    ids=str,
)
def test_numbers_that_cannot_work_are_refused_before_anything_is_written(
    data, tmp_path, words, reason
):
    with pytest.raises(UserError, match=reason):
        run(data, tmp_path / "run", *words)
    assert not (tmp_path / "run").exists()


def test_a_tokenizer_that_did_not_make_the_labels_is_refused(data, tmp_path):
    save_tokenizer(train_char(["abcdefgx"]), str(tmp_path / "other.json"))
    with pytest.raises(UserError, match="other.json differs from"):
        run(data, tmp_path / "run", "--tokenizer", tmp_path / "other.json")
    assert not (tmp_path / "run").exists()


# fbank and fine-tuning


def features_of(data, frontend):
    rows = datasets.load_from_disk(str(data / "train" / "0")).with_format("numpy")["input_values"]
    return torch.cat([extract(frontend)(torch.from_numpy(row)) for row in rows])


def test_global_cmvn_of_fbank_is_that_of_the_training_split_or_of_the_file_given(data, tmp_path):
    run(data, tmp_path / "run", "--max_steps", 1, "--frontend", "fbank", "--tail_padding", 300)
    model, _, frontend = load_checkpoint(str(tmp_path / "run" / "best.ckpt"))
    features = features_of(data, frontend.without_tail)
    assert frontend.frontend == "fbank" and features.mean() > 1  # of samples x 32768
    torch.testing.assert_close(model.net.encoder.cmvn_mean, features.mean(0), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        model.net.encoder.cmvn_istd, 1 / features.std(0), rtol=1e-2, atol=1e-3
    )
    stats = {"mean_stat": [3.0] * 80, "var_stat": [13.0] * 80, "frame_num": 1}  # mean 3, variance 4
    (tmp_path / "global_cmvn").write_text(json.dumps(stats))
    run(
        data,
        tmp_path / "given",
        "--max_steps",
        1,
        "--frontend",
        "fbank",
        "--cmvn",
        tmp_path / "global_cmvn",
    )
    encoder = load_checkpoint(str(tmp_path / "given" / "best.ckpt"))[0].net.encoder
    assert encoder.cmvn_mean.tolist() == [3.0] * 80 and encoder.cmvn_istd.tolist() == [0.5] * 80
    stats.update(mean_stat=[3.0] * 40, var_stat=[13.0] * 40)
    (tmp_path / "global_cmvn").write_text(json.dumps(stats))
    with pytest.raises(UserError, match="for 40 mel bins, not 80"):
        run(data, tmp_path / "refused", "--frontend", "fbank", "--cmvn", tmp_path / "global_cmvn")
    assert not (tmp_path / "refused").exists()


@pytest.mark.parametrize(
    "words, name",
    [
        (("--frontend", "fbank", "--window", "hann"), "--window"),
        (("--dither", "0.5"), "--dither"),
        (("--cmvn", "file"), "--cmvn"),
        (("--high_freq", -400), "--high_freq"),
        (("--freeze_encoder_epochs", 1), "--freeze_encoder_epochs"),
        (
            "--cr_ctc_weight 1 --num_time_masks 0 --num_freq_masks 0 --dropout_rate 0".split(),
            "--cr_ctc_weight",
        ),
        (("--max_time_mask_share", 0.1, "--num_time_masks", 0), "--max_time_mask_share"),
        (("--max_freq_mask", 9, "--num_freq_masks", 0), "--max_freq_mask"),
        (("--max_sub", 9, "--num_subs", 0), "--max_sub"),
        (("--min_frame", 20, "--no-filter"), "--min_frame"),
        (("--use_dynamic_left_chunk", "--no-use_dynamic_chunk"), "--use_dynamic_left_chunk"),
        (("--keep_right_decoder",), "--keep_right_decoder"),
        (("--encoder", "transformer"), "--cnn_module_kernel"),  # which `run` always gives
        ("--encoder transformer --cnn_module_norm batch_norm".split(), "--cnn_module_norm"),
        (("--encoder", "transformer", "--causal"), "--causal"),
        (("--reverse_weight", 0), "--r_num_blocks"),  # which `run` always gives
        (("--ctc_weight", 1, "--lsm_weight", 0.2), "--lsm_weight"),
        (("--ctc_weight", 1, "--length_normalized_loss"), "--length_normalized_loss"),
    ],
    ids=str,
)
def test_a_flag_without_effect_is_refused(data, tmp_path, words, name):
    with pytest.raises(UserError, match=f"{name} has no effect"):
        run(data, tmp_path / "run", *words)
    assert not (tmp_path / "run").exists()


def test_a_flag_that_only_says_that_something_is_off_passes(data, tmp_path):
    words = (
        "--num_time_masks 0 --max_time_mask 0 --num_freq_masks 0 --max_freq_mask 0 --num_subs 0 "
        "--max_sub 0 --no-use_dynamic_chunk --no-use_dynamic_left_chunk --no-keep_right_decoder "
        "--no-filter --min_frame 0 --dither 0 --freeze_encoder_epochs 0 "
        "--cr_ctc_weight 0.2"  # of two views, which then differ by dropout alone
    )
    run(data, tmp_path / "run", "--max_steps", 1, *words.split())


@pytest.mark.parametrize(
    "words", ["--ctc_weight 1 --reverse_weight 0.5", "--reverse_weight 0 --keep_right_decoder"]
)
def test_a_flag_that_shapes_the_network_passes_though_its_part_is_not_trained(
    data, tmp_path, words
):
    run(data, tmp_path / "run", "--max_steps", 1, *words.split())
    net = load_checkpoint(str(tmp_path / "run" / "best.ckpt"))[0].net
    assert len(net.right_decoder.blocks) == 1


def test_an_encoder_without_convolution_asks_nothing_of_a_kernel():
    ModelOptions(encoder="transformer", causal=False, cnn_module_kernel=8)


def test_a_resumed_run_may_have_flags_without_effect_but_takes_no_new_one(
    data, tmp_path, monkeypatch
):
    """Older versions did not refuse them."""
    words = (
        "--cr_ctc_weight 0.2 --num_time_masks 0 --max_time_mask 9 --num_freq_masks 0 --snr 1 2"
    ).split()
    with monkeypatch.context() as patch:
        patch.setattr(train, "check_unused", lambda *_: None)
        run(data, tmp_path / "run", "--max_steps", 1, *words)
    run(data, tmp_path / "run", "--max_steps", 2, *words, "--resume")
    assert torch.load(tmp_path / "run" / "last.ckpt", weights_only=True)["global_step"] == 2
    with pytest.raises(UserError, match="--snr has no effect without --noise"):
        run(data, tmp_path / "run", "--max_steps", 3, "--resume", "--snr", 1, 3)


@pytest.mark.parametrize(
    "words, said",
    [
        (("--ctc_weight", 0), "CTC untrained"),
        (("--reverse_weight", 1), "the left-to-right decoder untrained"),
        (("--r_num_blocks", 0), "the right-to-left decoder without the encoder's output"),
    ],
    ids=str,
)
def test_a_part_that_the_searches_need_must_be_trained_and_able_to_learn(
    data, tmp_path, words, said
):
    with pytest.raises(UserError, match=f"{words[0]} {words[1]} leaves {said}"):
        run(data, tmp_path / "run", *words)
    assert not (tmp_path / "run").exists()


def test_an_encoder_of_attention_alone_knows_where_its_frames_are():
    plain = dict(selfattention_layer_type="selfattn")
    with pytest.raises(UserError, match="without positions; add --pos_enc_layer_type abs_pos"):
        train.check_parts(ModelOptions(encoder="transformer", **plain))
    for fine in (dict(encoder="transformer"), plain):  # a conformer has its convolutions
        train.check_parts(ModelOptions(**fine))


def test_windows_may_leave_sound_out_in_older_models_alone(data, tmp_path, monkeypatch):
    words = "--frame_length", 10, "--frame_shift"
    train.check_windows(Frontend(frame_length=10, frame_shift=10))
    with pytest.raises(UserError, match="--frame_shift 20 is more than --frame_length 10"):
        run(data, tmp_path / "new", *words, 20)
    with monkeypatch.context() as patch:
        patch.setattr(train, "check_windows", lambda _: None)
        run(data, tmp_path / "old", "--max_steps", 1, *words, 20)
    run(data, tmp_path / "old", "--max_steps", 2, *words, 20, "--resume")
    fine_tune(data, tmp_path / "tuned", tmp_path / "old" / "last.ckpt", "--max_steps", 1)
    assert load_checkpoint(str(tmp_path / "tuned" / "best.ckpt"))[2].frame_shift == 20


@pytest.mark.parametrize(
    "optimizer, words, decay",
    [
        ("adamw", (), 0.01),
        ("adam", (), 0.0),
        ("adam", ("--weight_decay", 0.1), 0.1),
        ("muon", ("--weight_decay", 0.1), 0.1),
    ],
    ids=str,
)
def test_adam_has_no_weight_decay_unless_asked(data, tmp_path, optimizer, words, decay):
    run(data, tmp_path / "run", "--max_steps", 1, "--optimizer", optimizer, *words)
    checkpoint = torch.load(tmp_path / "run" / "last.ckpt", weights_only=True)
    (state,) = checkpoint["optimizer_states"]
    assert {group["weight_decay"] for group in state["param_groups"]} == {decay}
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    kept = record["options"], checkpoint["optim_options"], checkpoint["run_options"]
    assert [options["weight_decay"] for options in kept] == [decay] * 3


def test_muon_decays_weights_as_adamw_does():
    assert OptimOptions(optimizer="muon").decay == OptimOptions(optimizer="adamw").decay == 0.01


@pytest.fixture(scope="module")
def pretrained(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pretrained")
    run(data, folder / "run", "--max_steps", 1, "--frontend", "fbank")
    return folder / "run" / "best.ckpt"


@pytest.fixture(scope="module")
def other_data(data, tmp_path_factory):
    """Give the same audio another alphabet: i and j are new, a and b are gone."""
    root = tmp_path_factory.mktemp("other")
    for split in ("train", "dev"):
        (root / split).symlink_to(data / split)
    save_tokenizer(train_char(["cdefghij"]), str(root / "tokenizer.json"))
    return root


def test_fine_tuning_starts_from_the_encoder_and_the_rows_of_known_tokens(
    pretrained, other_data, tmp_path, capsys
):
    fine_tune(
        other_data,
        tmp_path / "run",
        pretrained,
        "--max_steps",
        1,
        "--lr",
        1e-9,
        "--weight_decay",
        0,
    )
    before, after = (
        load_checkpoint(str(path))[0] for path in (pretrained, tmp_path / "run" / "best.ckpt")
    )
    theirs, ours = (model.tokenizer.tokens for model in (before, after))
    pairs = [(theirs.index(token), ours.index(token)) for token in ours if token in theirs]
    # Four special tokens and c .. h are in both, under other ids.
    assert len(pairs) == 10 and any(i != j for i, j in pairs)
    for name, value in before.state_dict().items():
        changed = after.state_dict()[name]
        if (
            value.shape == changed.shape
            and "ctc" not in name
            and "output_layer" not in name
            and "decoder.embed" not in name
        ):
            torch.testing.assert_close(changed, value, rtol=0, atol=1e-6)
        else:
            for old, new in pairs:
                torch.testing.assert_close(changed[new], value[old], rtol=0, atol=1e-6)
    assert after.frontend == before.frontend and after.options == before.options


def test_fine_tuning_may_change_the_filters_the_tail_and_the_weight_of_a_decoder(
    pretrained, data, tmp_path
):
    flags = "--max_steps", 1, "--high_freq", -400, "--tail_padding", 70, "--reverse_weight", 0.5
    fine_tune(data, tmp_path / "run", pretrained, *flags)
    model = load_checkpoint(str(tmp_path / "run" / "best.ckpt"))[0]
    assert (model.frontend.high_freq, model.frontend.tail_padding) == (-400, 70)
    assert model.options.reverse_weight == 0.5


def test_fine_tuning_and_resuming_may_leave_branches_as_they_are(pretrained, data, tmp_path):
    words = ("--ctc_weight", 0, "--reverse_weight", 1)
    fine_tune(data, tmp_path / "run", pretrained, "--max_steps", 1, *words)
    fine_tune(data, tmp_path / "run", pretrained, "--max_steps", 2, *words, "--resume")
    before, after = (
        load_checkpoint(str(path))[0] for path in (pretrained, tmp_path / "run" / "last.ckpt")
    )
    assert (after.options.ctc_weight, after.options.reverse_weight) == (0, 1)
    parts = [(net.ctc, net.decoder, net.right_decoder) for net in (before.net, after.net)]
    kept = [same(*(list(part.parameters()) for part in pair)) for pair in zip(*parts)]
    assert kept == [True, True, False]  # decay leaves them alone, too


def test_a_frozen_encoder_stays_as_it_came_for_as_long_as_asked(data, tmp_path, monkeypatch):
    """Batch norm has statistics beside the weights, which must stay, too."""
    words = ("--cnn_module_norm", "batch_norm", "--frontend", "fbank")
    run(data, tmp_path / "pretrained", "--max_steps", 1, *words)
    pretrained = tmp_path / "pretrained" / "best.ckpt"
    nets = [load_checkpoint(str(pretrained))[0].net.state_dict()]

    def note(self):
        nets.append({name: value.clone() for name, value in self.net.state_dict().items()})

    monkeypatch.setattr(train.U2, "on_train_epoch_end", note, raising=False)
    words = ("--max_epochs", 2, "--freeze_encoder_epochs", 1)
    fine_tune(data, tmp_path / "run", pretrained, *words)
    before, first, second = nets
    encoder = [name for name in before if name.startswith("encoder.")]
    assert any("running_mean" in name for name in encoder)
    assert all(torch.equal(before[name], first[name]) for name in encoder)
    assert not torch.equal(before["ctc.weight"], first["ctc.weight"])
    for kind in ("weight", "running_mean"):
        names = [name for name in encoder if name.endswith(kind)]
        assert not any(torch.equal(first[name], second[name]) for name in names)


@pytest.mark.parametrize(
    "words, reason",
    [
        (("--frontend", "log_mel"), "--frontend log_mel: .*made with fbank"),
        (("--num_blocks", 2), "--num_blocks 2: .*made with 1"),
        (("--reverse_weight", 0), "--reverse_weight 0.0: .*made with 0.3"),
        (("--preset", "tiny"), "--preset has no effect"),
        (("--ctc_weight", 0, "--cr_ctc_weight", 0.2), "--cr_ctc_weight has no effect with"),
    ],
    ids=str,
)
def test_fine_tuning_with_what_does_not_fit_the_weights_is_refused(
    pretrained, data, tmp_path, words, reason
):
    with pytest.raises(UserError, match=reason):
        fine_tune(data, tmp_path / "run", pretrained, *words)
    assert not (tmp_path / "run").exists()
