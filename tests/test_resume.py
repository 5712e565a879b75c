"""What a run keeps when it goes on: its best model, its options, its record, its folder.

The rows are noise, as in test_train.py.
"""

import contextlib
import functools
import json
import math
import multiprocessing
import os
import pty
import shutil
import signal
from types import SimpleNamespace

import cli
from cli import UserError

import pytest
import torch

import files
import recovery
import train
from conformer import U2Conformer
from helpers import json_lines, same, trusted
from helpers_train import ON_CPU, fine_tune, interrupted, ranks, run, signalled, weights
from model import load_checkpoint


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
    """A onecycle run of two epochs that has ended; to be copied, not changed."""
    output = tmp_path_factory.mktemp("finished") / "run"
    run(data, output, "--max_epochs", 2)
    return output


@pytest.fixture(scope="module")
def averaged(data, tmp_path_factory):
    """A run of one update with an average; to be copied, not changed."""
    output = tmp_path_factory.mktemp("averaged") / "run"
    run(data, output, "--max_steps", 1, "--ema_decay", 0.5)
    return output


@pytest.fixture
def ended(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run")


def record(output):
    return json.loads((output / "run.json").read_text())


def contents(folder):
    """Return the bytes of all files but the lock.

    (A process loses a lock as soon as it closes any descriptor of the file.)
    """
    return {
        path.name: path.read_bytes()
        for path in folder.iterdir()
        if path.is_file() and path.name != train.LOCK
    }


def in_child(body):
    """Call body() in another process, as a command, and return its exit status."""
    process = multiprocessing.get_context("fork").Process(target=cli.run, args=(lambda _: body(),))
    process.start()
    process.join(60)
    if process.is_alive():
        process.kill()
        pytest.fail("hangs")
    return process.exitcode


# The best


def unbeatable(path, by_lightning=False):
    checkpoint = trusted(path)
    checkpoint["best_score"] = -1.0
    if by_lightning:  # an older version left the score to ModelCheckpoint
        del checkpoint["best_score"]
        checkpoint["callbacks"]["ModelCheckpoint{'monitor': 'val_cer_mean'}"] = {
            "best_model_score": torch.tensor(-1.0)
        }
    torch.save(checkpoint, path)
    return path.read_bytes()


def test_the_best_of_an_older_version_survives_a_move_of_its_folder(data, ended, tmp_path):
    best = unbeatable(ended / "best.ckpt", by_lightning=True)
    moved = ended.rename(tmp_path / "elsewhere")
    run(data, moved, "--max_epochs", 3, "--max_steps", 9, "--resume")
    assert (moved / "best.ckpt").read_bytes() == best
    assert record(moved)["metrics"]["best_val_cer_mean"] == -1
    assert torch.load(moved / "last.ckpt", weights_only=True)["global_step"] == 9


def test_the_best_of_a_run_that_ended_between_two_validations_survives_a_move_too(
    data, averaged, tmp_path
):
    moved = shutil.copytree(averaged, tmp_path / "elsewhere")
    best = unbeatable(moved / "best.ckpt")
    run(data, moved, "--max_steps", 2, "--resume")
    assert (moved / "best.ckpt").read_bytes() == best
    assert record(moved)["metrics"]["best_val_cer_mean"] == -1


def test_a_damaged_best_is_said_and_replaced(data, ended, caplog):
    unbeatable(ended / "best.ckpt")
    os.truncate(ended / "best.ckpt", 1000)
    run(data, ended, "--max_epochs", 3, "--max_steps", 9, "--resume")
    assert load_checkpoint(str(ended / "best.ckpt"))
    assert record(ended)["metrics"]["best_val_cer_mean"] > 0
    assert [message for message in caplog.messages if "best.ckpt is damaged" in message]


def test_a_best_that_is_not_finite_counts_as_damaged(ended):
    unbeatable(ended / "best.ckpt")
    assert recovery.best_score(str(ended / "best.ckpt")) == -1
    poison(ended / "best.ckpt", "state_dict")
    assert recovery.best_score(str(ended / "best.ckpt")) == math.inf


# Options


def forget_options(path):
    """Make a checkpoint like an older version's, which did not hold the run's options."""
    checkpoint = trusted(path)
    del checkpoint["run_options"]
    torch.save(checkpoint, path)


def learning_rates(monkeypatch, data, output, *words):
    """Return learning rate and weight decay of every update of a run."""
    seen = []
    original = train.U2.on_before_optimizer_step

    def note(self, optimizer):
        seen.append(
            tuple(
                optimizer.param_groups[0][name]
                for name in ("lr", "weight_decay", "decoupled_weight_decay")
            )
        )
        original(self, optimizer)

    with monkeypatch.context() as patch:
        patch.setattr(train.U2, "on_before_optimizer_step", note)
        run(data, output, *words)
    return seen


@pytest.mark.parametrize(
    "words",
    [
        ("--lr", 5e-4, "--weight_decay", 0.1, "--warmup_steps", 5),
        ("--optimizer", "adam", "--weight_decay", 0.2, "--scheduler", "warmup"),
        (),
    ],
    ids=str,
)
def test_what_is_given_at_a_resume_is_as_if_it_had_always_been(
    data, ended, tmp_path, monkeypatch, words
):
    """The optimizer, the learning rate and its schedule are those of the longer run."""
    longer = ("--max_epochs", 3, "--check_val_every_n_epoch", 3, *words)
    always = learning_rates(monkeypatch, data, tmp_path / "always", *longer)
    resumed = learning_rates(monkeypatch, data, ended, *longer, "--resume")
    assert len(resumed) == 4 and resumed == always[8:] and max(lr for lr, *_ in resumed) > 1e-5
    again = torch.load(ended / "last.ckpt", weights_only=True)
    for name, value in zip(words[::2], words[1::2]):
        assert again["optim_options"][name[2:]] == record(ended)["options"][name[2:]] == value


@pytest.mark.parametrize(
    "held, words, used",
    [(None, (), 0.01), (0.1, (), 0.1), (0.1, ("--optimizer", "adam"), 0.0)],
    ids=str,
)
def test_a_resumed_run_keeps_its_weight_decay_unless_another_optimizer_has_its_own(
    data, ended, monkeypatch, caplog, held, words, used
):
    """Checkpoints of an older version hold None for the default."""
    checkpoint = trusted(ended / "last.ckpt")
    for part in ("optim_options", "run_options"):
        checkpoint[part]["weight_decay"] = held
    torch.save(checkpoint, ended / "last.ckpt")
    assert load_checkpoint(str(ended / "last.ckpt"))[0].optim.weight_decay == held
    words = (*words, "--max_epochs", 3, "--max_steps", 9)
    seen = learning_rates(monkeypatch, data, ended, *words, "--resume")
    assert {decay for _, decay, _ in seen} == {used}
    assert record(ended)["options"]["weight_decay"] == used
    noted = f"--weight_decay {used} (before: {held})" in caplog.text
    assert noted == ("--optimizer" in words)


def test_a_longer_onecycle_run_says_what_becomes_of_its_learning_rate(data, ended, caplog):
    with failing("on_fit_start"):
        run(data, ended, "--max_epochs", 6, "--resume", "--lr", 5e-4)
    assert [
        message
        for message in caplog.messages
        if "planned for 8 updates and is now for 24" in message
    ]
    assert [message for message in caplog.messages if "--lr 0.0005 (before: 0.001)" in message]


def test_what_is_not_given_at_a_resume_stays_as_the_run_had_it(data, tmp_path):
    words = (
        "--ema_decay 0.5 --lr 5e-3 --optimizer muon --speeds 1.0 --accumulate_grad_batches 2 "
        "--max_batch_seconds 1.5 --scheduler warmup --gradient_clip_val 1 --dropout_rate 0.3 "
        "--min_frame 30 --cr_ctc_weight 0.2 --num_blocks 2 --interctc_weight 0.3 "
        "--stochastic_depth 0.3 --max_epochs 2"
    ).split()
    run(data, tmp_path / "whole", *words)
    interrupted(data, tmp_path / "cut", 4, *words)
    assert len(rows_of(tmp_path / "cut")) > 8  # within the second epoch
    # Its own preset takes none of them back.
    train.main(["--resume", str(tmp_path / "cut" / "last.ckpt"), "--preset", "tiny", *ON_CPU])
    assert same(weights(tmp_path / "whole" / "last.ckpt"), weights(tmp_path / "cut" / "last.ckpt"))
    # Once an epoch, in two views, too.
    assert sorted(rows_of(tmp_path / "cut")) == sorted(2 * list(range(8)))
    options = [record(tmp_path / name)["options"] for name in ("whole", "cut")]
    places = "output_dir", "resume", "checkpoint_every_n_steps"
    assert {**options[0], **dict.fromkeys(places)} == {**options[1], **dict.fromkeys(places)}


def rows_of(output):
    return [row for step in json_lines(output / "steps.jsonl") for row in step["rows"]]


@pytest.mark.parametrize(
    "words, reached, older",
    [
        (("--max_epochs", 1), "--max_epochs 1", False),
        (("--max_epochs", 2, "--lr", 5e-4), "--max_epochs 2", False),
        (("--max_steps", 20), "--max_epochs 2", False),
        (("--max_epochs", 3, "--max_steps", 8), "--max_steps 8", False),
        (("--max_epochs", 1), "--max_epochs 1", True),
    ],
    ids=str,
)
def test_what_comes_after_the_end_of_a_run_is_refused(data, ended, words, reached, older):
    if older:
        forget_options(ended / "last.ckpt")
    before = contents(ended)
    with pytest.raises(
        UserError, match=f"has done 2 epochs and 8 updates: {reached} leaves nothing to train"
    ):
        run(data, ended, "--resume", *words)
    assert contents(ended) == before


def test_an_older_checkpoint_s_average_is_not_dropped(data, averaged, tmp_path):
    output = shutil.copytree(averaged, tmp_path / "run")
    forget_options(output / "last.ckpt")
    with pytest.raises(
        UserError, match="--ema_decay 0: .*last.ckpt averages its weights; give its decay"
    ):
        run(data, output, "--max_steps", 2, "--resume")


def test_the_best_of_a_last_validation_goes_on_as_the_newest_does(data, averaged, tmp_path):
    """With an average, too, both checkpoints hold the trained weights beside it."""
    for name in ("last.ckpt", "best.ckpt"):
        output = shutil.copytree(averaged, tmp_path / name)
        run(data, output, "--max_steps", 3, "--resume", output / name)
    assert same(*(weights(tmp_path / name / "last.ckpt") for name in ("last.ckpt", "best.ckpt")))


@pytest.mark.parametrize(
    "words, reason",
    [
        (("--init_from", "none.ckpt"), "--init_from has no effect with --resume"),
        (("--num_blocks", 2), "num_blocks 1, not 2"),
        (("--ema_decay", 0), "--ema_decay 0: .* averages"),
        (("--preset", "base"), "num_blocks 1, not 12"),
        (("--lr", -1), "--lr -1"),
        (("--lr", "nan"), "--lr nan"),
        (("--dropout_rate", 0.5), "dropout_rate 0.1, not 0.5"),
    ],
    ids=str,
)
def test_what_cannot_take_effect_is_refused_before_anything_is_written(data, ended, words, reason):
    if words[0] == "--ema_decay":
        checkpoint = trusted(ended / "last.ckpt")
        torch.save({**checkpoint, "averaging_state": {}}, ended / "last.ckpt")
    before = contents(ended)
    with pytest.raises(UserError, match=reason):
        train.main(
            [
                "--data_root",
                str(data),
                "--output_dir",
                str(ended),
                "--max_epochs",
                "3",
                "--resume",
                *map(str, words),
            ]
        )
    assert contents(ended) == before


def test_another_dev_is_said(data, ended, tmp_path, caplog):
    other = shutil.copytree(data, tmp_path / "data")
    shutil.rmtree(other / "dev")
    shutil.copytree(other / "train", other / "dev")
    with failing("on_fit_start"):
        run(other, ended, "--max_epochs", 3, "--resume")
    assert [
        line
        for line in caplog.messages
        if "validated on 2 rows" in line and "which is now 8 rows" in line
    ]


def test_the_same_command_with_resume_goes_on_though_its_source_is_gone(data, finished, tmp_path):
    source = shutil.copy(finished / "best.ckpt", tmp_path / "source.ckpt")
    words = ["--freeze_encoder_epochs", 1]
    fine_tune(data, tmp_path / "run", source, *words, "--max_steps", 2)
    os.remove(source)
    fine_tune(data, tmp_path / "run", source, *words, "--max_steps", 3, "--resume")
    assert torch.load(tmp_path / "run" / "last.ckpt", weights_only=True)["global_step"] == 3


FIT = "loops", "fit_loop"
BROKEN = [
    (("loops",), []),
    (FIT, {}),
    ((*FIT, "epoch_progress"), None),
    ((*FIT, "epoch_progress", "current", "ready"), "1"),
    ((*FIT, "epoch_progress", "current", "ready"), 0),
    ((*FIT, "epoch_progress", "current", "ready"), 2.5),
    ((*FIT, "epoch_progress", "total", "ready"), -1),
    ((*FIT, "epoch_loop.batch_progress", "is_last_batch"), [1]),
    ((*FIT, "epoch_loop.state_dict", "_batches_that_stepped"), "x"),
    ((*FIT, "epoch_loop.val_loop.batch_progress"), {"total": 3}),
    (("global_step",), 10**30),
    (("callbacks",), None),
    (("pytorch-lightning_version",), "new"),
    (("lr_schedulers",), [{}]),
    (("lr_schedulers", 0, "last_epoch"), math.nan),
    (("lr_schedulers", 0, "total_steps"), "x"),
    (("skips",), {"in_a_row": "x"}),
    (("plan", "processes"), "x"),
    (("plan",), {"processes": 1}),
    (("run_options",), 3),
    (("run_options", "max_frame"), "x"),
    (("optimizer_states",), []),
    (("optimizer_states", 0), {}),
    (("optimizer_states", 0, "param_groups"), []),
    (("optimizer_states", 0, "state", 3, "exp_avg"), torch.zeros(1)),
    (("optimizer_states", 0, "state", 10**6), {}),
    (("optimizer_states", 0, "state", 3, "step"), torch.zeros(3)),
    (("optimizer_states", 0, "state", 3), {"step": torch.ones(()), "exp_avg": torch.zeros(16)}),
    (("callbacks", "Average"), {"latest_update_step": "x"}),
    (("averaging_state",), {}),
    (("current_model_state", "net.ctc.bias"), torch.zeros(3)),
]


@pytest.mark.parametrize(
    "path, junk",
    BROKEN,
    ids=lambda value: ".".join(map(str, value)) if isinstance(value, tuple) else "",
)
def test_a_state_of_training_that_is_broken_is_one_line_and_stays(
    finished, averaged, tmp_path, path, junk
):
    of_average = {"Average", "averaging_state", "current_model_state"} & set(path)
    output = shutil.copytree(averaged if of_average else finished, tmp_path / "run")
    # Reading this one, too, would only take time.
    os.remove(output / "best.ckpt")
    checkpoint = trusted(output / "last.ckpt")
    functools.reduce(lambda part, name: part[name], path[:-1], checkpoint)[path[-1]] = junk
    torch.save(checkpoint, output / "last.ckpt")
    before = contents(output)
    with pytest.raises(UserError, match=r"last\.ckpt"):
        words = "--max_epochs 3 --max_steps 9 --resume".split()
        train.main(["--output_dir", str(output), *words])
    assert contents(output) == before


# The record and the folder


@contextlib.contextmanager
def failing(hook, error=RuntimeError("failed")):
    def fail(*_):
        raise error

    with pytest.MonkeyPatch.context() as patch, pytest.raises(type(error)):
        patch.setattr(train.U2, hook, fail)
        yield


def test_an_attempt_that_fails_leaves_the_metrics_of_the_run_before(data, ended):
    metrics = record(ended)["metrics"]
    with failing("training_step"):
        run(data, ended, "--max_epochs", 3, "--resume")
    assert record(ended)["metrics"] == metrics and metrics["steps"] == 8


@pytest.mark.parametrize("word", ["--resume", "--overwrite"])
def test_an_attempt_that_fails_before_its_first_update_leaves_everything(data, ended, word):
    before = contents(ended)
    with (
        pytest.MonkeyPatch.context() as patch,
        pytest.raises(UserError, match="does not fit the memory"),
    ):
        patch.setattr(
            "conformer.U2Conformer.loss", lambda *_, **__: (_ for _ in ()).throw(MemoryError())
        )
        run(data, ended, "--max_epochs", 3, word)
    assert contents(ended) == before


@pytest.mark.parametrize("name", ["steps.jsonl", "logs"])
def test_what_cannot_be_written_is_one_line(data, ended, name):
    """(A permission would not stop root, so a folder stands where a file should.)"""
    (ended / name).rename(ended / "old")
    (ended / name).write_text("no folder") if name == "logs" else (ended / name).mkdir()
    before = contents(ended)
    with pytest.raises(UserError, match=f"{name} is no f.*; move it away"):
        run(data, ended, "--max_epochs", 3, "--resume")
    assert contents(ended) == before


def test_logs_of_others_stay(data, tmp_path):
    """A cluster may write its own logs beside ours."""
    (tmp_path / "run" / "logs").mkdir(parents=True)
    (tmp_path / "run" / "logs" / "job.out").write_text("mine")
    with failing("on_fit_start"):
        run(data, tmp_path / "run")
    assert [path.name for path in (tmp_path / "run").rglob("*")] == ["logs", "job.out"]
    run(data, tmp_path / "run", "--max_steps", 1)
    run(data, tmp_path / "run", "--max_steps", 1, "--overwrite")
    assert (tmp_path / "run" / "logs" / "job.out").read_text() == "mine"


def test_another_run_is_not_touched_by_a_resume(data, ended, finished, tmp_path):
    before = contents(ended)
    with pytest.raises(UserError, match="holds another run than"):
        run(data, ended, "--resume", finished / "last.ckpt")
    assert contents(ended) == before
    # In an empty folder a copy of the run may go on.
    run(
        data, tmp_path / "new", "--resume", ended / "last.ckpt", "--max_epochs", 3, "--max_steps", 9
    )
    assert torch.load(tmp_path / "new" / "last.ckpt", weights_only=True)["global_step"] == 9
    assert (tmp_path / "new" / "best.ckpt").exists() and contents(ended) == before


def test_a_run_whose_folder_is_named_goes_on_there(data, ended, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train.main(
        [
            "--data_root",
            str(data),
            "--resume",
            str(ended),
            "--max_epochs",
            "3",
            "--max_steps",
            "9",
            "--num_workers",
            "0",
        ]
    )
    assert torch.load(ended / "last.ckpt", weights_only=True)["global_step"] == 9
    assert not (tmp_path / "runs").exists()


def test_an_overwritten_run_s_log_is_the_new_run_s(data, ended):
    old = set((ended / "logs").iterdir())
    run(data, ended, "--max_epochs", 1, "--overwrite")
    new = set((ended / "logs").iterdir())
    assert (
        new & old <= {ended / "logs" / "hparams.yaml"}
        and sum(path.stat().st_size for path in new) > 200
    )


@pytest.mark.parametrize("flag", ["--init_from", "--tokenizer"])
def test_what_a_run_is_made_from_is_not_overwritten(data, ended, flag):
    before = contents(ended)
    with pytest.raises(UserError, match=f"{flag} .*best.ckpt is part of the run"):
        train.main(
            [
                "--data_root",
                str(data),
                "--output_dir",
                str(ended),
                flag,
                str(ended / "best.ckpt"),
                "--overwrite",
            ]
        )
    assert contents(ended) == before


def test_two_trainings_do_not_share_a_folder(data, ended, monkeypatch):
    monkeypatch.setattr(files, "DYING", 0.1)  # the first does not end
    with files.alone(str(ended / train.LOCK), "the first"):
        before = contents(ended)
        assert in_child(lambda: run(data, ended, "--max_epochs", 3, "--resume")) == 2
        assert in_child(lambda: run(data, ended, "--max_epochs", 3, "--overwrite")) == 2
        assert contents(ended) == before
    words = ("--max_epochs", 3, "--max_steps", 9, "--resume")
    assert in_child(lambda: run(data, ended, *words)) == 0
    assert (
        torch.load(ended / "last.ckpt", weights_only=True)["global_step"] == 9
        and not (ended / train.LOCK).exists()
    )


def test_the_epoch_is_saved_before_its_validation(data, tmp_path):
    with failing("validation_step", MemoryError()), pytest.MonkeyPatch.context() as patch:
        patch.setattr("recovery.MemoryCheck.on_train_start", lambda *_: None)
        run(data, tmp_path / "run", "--max_epochs", 2)
    assert torch.load(tmp_path / "run" / "last.ckpt", weights_only=True)["global_step"] == 4


def test_a_dev_row_that_does_not_fit_is_said_before_the_first_update(data, tmp_path, monkeypatch):
    def validate(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")

    monkeypatch.setattr(train.U2, "validation_step", validate)
    monkeypatch.setattr(train.U2, "training_step", lambda *_: pytest.fail("trained"))
    with pytest.raises(
        UserError, match="a batch of 2 rows, .* does not fit the memory of cpu .*lower --batch_size"
    ):
        run(data, tmp_path / "run")
    assert not (tmp_path / "run").exists()


# Signals


def test_an_ignored_signal_stays_ignored(data, tmp_path):
    """nohup ignores SIGHUP, and a script ignores SIGINT for a command in its background."""

    def body():
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        for number, batch in ((signal.SIGINT, 1), (signal.SIGHUP, 2)):
            train.U2.on_train_batch_start = signalled(number, "on_train_batch_start", batch)
        run(data, tmp_path / "run", "--max_epochs", 1)

    assert in_child(body) == 0
    assert torch.load(tmp_path / "run" / "last.ckpt", weights_only=True)["global_step"] == 4


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_before_the_first_update_ends_behind_it(data, tmp_path, number):
    def body():
        train.MemoryCheck.on_train_start = lambda *_: os.kill(os.getpid(), number)
        run(data, tmp_path / "run", "--max_epochs", 1)

    assert in_child(body) == 128 + number
    assert torch.load(tmp_path / "run" / "last.ckpt", weights_only=True)["global_step"] == 1


# Lightning has handlers of its own for the first two alone.
@pytest.mark.parametrize(
    "number, call",
    [
        *((number, 1) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)),
        *((number, call) for number in (signal.SIGINT, signal.SIGTERM) for call in (2, 3)),
    ],
)
def test_a_signal_while_something_is_set_up_has_its_status(data, ended, number, call, monkeypatch):
    """The calls are before Lightning, in its setup, and in that of the last validation."""
    original = train.SpeechDataModule.setup
    calls = []

    def setup(self, stage):
        calls.append(stage)
        if len(calls) == call:
            os.kill(os.getpid(), number)
        original(self, stage)

    monkeypatch.setattr(train.SpeechDataModule, "setup", setup)
    assert (
        in_child(lambda: run(data, ended, "--max_steps", 9, "--max_epochs", 3, "--resume"))
        == 128 + number
    )
    assert torch.load(ended / "last.ckpt", weights_only=True)["global_step"] == (
        9 if call == 3 else 8
    )


def test_a_run_that_was_killed_before_it_began_is_in_nobody_s_way(data, tmp_path):
    def body():
        train.MemoryCheck.on_train_start = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
        run(data, tmp_path / "run", "--max_steps", 1)

    assert in_child(body) == -signal.SIGKILL and (tmp_path / "run").exists()
    run(data, tmp_path / "run", "--max_steps", 1)


def test_a_terminal_that_hangs_up_loses_nothing(data, tmp_path):
    child, terminal = pty.fork()
    if child == 0:
        try:
            signal.signal(signal.SIGHUP, signal.SIG_DFL)
            train.U2.on_before_optimizer_step = hang_up(train.U2.on_before_optimizer_step)
            cli.run(lambda _: run(data, tmp_path / "run", "--max_epochs", 2))
        except SystemExit as status:
            os._exit(status.code)
        os._exit(0)
    with contextlib.suppress(OSError):
        while b"closed" not in os.read(terminal, 4096):
            pass
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 128 + signal.SIGHUP
    assert torch.load(tmp_path / "run" / "last.ckpt", weights_only=True)["global_step"] == 2


def hang_up(original):
    """At the second update, ask for the terminal to be closed, and wait for its signal."""

    def step(self, optimizer):
        if self.trainer.global_step == 1:
            os.write(1, b"closed\n")
            while not self.request:
                signal.sigtimedwait((), 0.05)
        original(self, optimizer)

    return step


# What is not finite


def poison(path, part, value=torch.nan):
    checkpoint = trusted(path)
    tensor = (
        checkpoint[part]["net.encoder.blocks.0.norm_final.weight"]
        if part == "state_dict"
        else (checkpoint[part][0]["state"][0]["exp_avg"])
    )
    tensor.view(-1)[0] = value
    torch.save(checkpoint, path)


@pytest.mark.parametrize(
    "part, value",
    [("state_dict", torch.nan), ("state_dict", torch.inf), ("optimizer_states", torch.nan)],
)
def test_weights_that_are_not_finite_are_refused_wherever_they_are_read(
    data, ended, tmp_path, part, value
):
    poison(ended / "last.ckpt", part, value)
    words = (
        ("--max_epochs", 3, "--resume"),
        ("--init_from", ended / "last.ckpt", "--output_dir", tmp_path / "new"),
    )
    for attempt in (
        lambda: load_checkpoint(str(ended / "last.ckpt")),
        *(
            lambda more=more: train.main(
                ["--data_root", str(data), "--output_dir", str(ended), *map(str, more)]
            )
            for more in words
        ),
    ):
        with pytest.raises(
            UserError, match=f"last.ckpt: damaged by training: {part}.* is not finite"
        ):
            attempt()
    assert not (tmp_path / "new").exists()


def test_what_is_not_finite_any_more_is_not_saved(data, ended, monkeypatch):
    """The gradient is finite, but the step is too long."""
    before = contents(ended)
    bounds = train.OptimOptions.__dataclass_fields__
    for name in ("lr", "weight_decay"):
        monkeypatch.setattr(bounds[name], "metadata", {**bounds[name].metadata, "at_most": 1e30})
    with pytest.raises(
        UserError,
        match=r"step 12: state_dict.* is not finite any more, so that nothing is saved; lower --lr",
    ):
        run(data, ended, "--max_epochs", 3, "--resume", "--lr", 1e30, "--weight_decay", 1e30)
    assert {name: contents(ended)[name] for name in ("best.ckpt", "last.ckpt")} == {
        name: before[name] for name in ("best.ckpt", "last.ckpt")
    }


def test_a_skipped_update_leaves_the_average_as_it_was(data, tmp_path, monkeypatch):
    original = train.U2.on_before_optimizer_step
    averages = []

    def step(self, optimizer):
        if self.trainer.global_step == 2:
            self.net.ctc.weight.grad.fill_(torch.nan)
        original(self, optimizer)

    def note(self, trainer, module, *_):
        averages.append(
            [value.clone() for value in trainer.callbacks[4]._average_model.parameters()]
        )

    monkeypatch.setattr(train.U2, "on_before_optimizer_step", step)
    monkeypatch.setattr(train.LastCheckpoint, "on_train_batch_end", note)
    run(data, tmp_path / "run", "--max_epochs", 1, "--ema_decay", 0.5)
    assert [same(*pair) for pair in zip(averages, averages[1:])] == [False, True, False]


def test_an_average_goes_on_after_a_skip_as_if_the_run_had_not_ended(monkeypatch):
    """Within an accumulation that begins after the skip, a resumed run must not average again."""
    averaged = []
    monkeypatch.setattr(recovery.Average, "update", lambda *_: averaged.append(1))
    before, resumed = recovery.Average(0.5), recovery.Average(0.5)
    trainer = SimpleNamespace(global_step=1)
    before.on_train_batch_end(trainer, SimpleNamespace(update_skipped=True))
    resumed.load_state_dict(before.state_dict())
    resumed.on_train_batch_end(trainer, SimpleNamespace(update_skipped=False))
    assert not averaged
    trainer.global_step = 2
    resumed.on_train_batch_end(trainer, SimpleNamespace(update_skipped=False))
    assert averaged == [1]


def test_a_new_term_of_the_loss_has_its_gradient_on_several_processes(data, tmp_path, monkeypatch):
    original = U2Conformer.loss

    def loss(self, *arguments, **options):
        losses = original(self, *arguments, **options)
        return losses | {"loss": losses["loss"] + 100 * self.ctc.bias.sum()}

    monkeypatch.setattr(U2Conformer, "loss", loss)
    words = (
        "--max_steps 1 --lr 1 --warmup_steps 0 --optimizer adam --weight_decay 0 --scheduler warmup"
    ).split()
    assert ranks(data, tmp_path / "run", *words) == [0, 0]
    saved = torch.load(tmp_path / "run" / "last.ckpt", weights_only=True)["state_dict"]
    # The bias begins within +-0.25. Adam's first step is 1 against the sign of the gradient, which
    # is the sign of the new term.
    assert saved["net.ctc.bias"].max() < -0.7
