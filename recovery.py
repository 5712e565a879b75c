"""Saves a run so that it can go on, and resumes it: checkpoints, signals, full disks, memory.

Lightning's callbacks are replaced where they lose something: its files do not wait for the disk,
its signal handlers end a run without saving, and a resumed run leaves out the validation of an
epoch that was saved before its validation. The parts, from top to bottom: whole files and one-line
endings, last.ckpt and best.ckpt, the average of the weights, the checks of a checkpoint to resume
from, and MemoryCheck, which runs the largest batches before the first update.
"""

import contextlib
import copy
import dataclasses
import io
import math
import os
import signal
import stat
import sys
import threading
import time
import zlib
from typing import NamedTuple

from cli import SIGNALS, UserError, out_of_memory, send_nowhere, shown

import numpy as np
import pytorch_lightning as L
import torch
import torch.distributed as dist
from lightning_fabric.plugins.io.torch_io import TorchCheckpointIO
from packaging.version import Version
from pytorch_lightning.callbacks import Checkpoint, WeightAveraging
from pytorch_lightning.strategies import FSDPStrategy
from pytorch_lightning.utilities import rank_zero_info
from torch.optim.swa_utils import get_ema_multi_avg_fn

from checkpoint import not_finite, read_weights_only
from files import FULL, SMALL, parse_json, write_whole
from transforms import num_frames

# U2.request is SAVE where last.ckpt is due, and STOP + the signal's number where the run must end,
# too: the sum is its exit status.
SAVE = 1
STOP = 128

# A damaged checkpoint may raise any of these errors, wherever a part of it is used.
FAULTS = LookupError, TypeError, ValueError, ArithmeticError, AttributeError, RuntimeError


def cut_log(path: str, step: int) -> None:
    """Cuts a log of JSON lines before the first that is broken, or of update `step` or later."""
    with open(path, "rb+") as file:
        end = 0
        for line in iter(lambda: file.readline(SMALL), b""):
            try:
                if not line.endswith(b"\n") or parse_json(line.decode())["step"] >= step:
                    break
            except (ValueError, LookupError, TypeError):  # a power cut may leave anything
                break
            end += len(line)
        file.truncate(end)


class WholeFiles(TorchCheckpointIO):
    """Writes checkpoints with write_whole.

    (Lightning writes to another folder, moves the file, and does not wait for the disk.)
    """

    def save_checkpoint(self, checkpoint, path, storage_options=None):
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        try:
            write_whole(str(path), buffer.getbuffer())
        except UserError as error:
            raise UserError(f"{error}; {way_on(os.path.dirname(path))}") from error


def way_on(folder: str, begun: bool = True) -> str:
    """Says how to go on with a run that has ended early; `begun`: after it began to write."""
    if not begun:
        return "then give the same command again: nothing was changed"
    if os.path.exists(os.path.join(folder, "last.ckpt")):
        return "then go on with --resume: the last checkpoint is whole"
    return "then begin again with --overwrite: there is no checkpoint yet"


class Stopped(Exception):
    """Says that a signal ended the run after last.ckpt was saved. args: exit status, step."""


@contextlib.contextmanager
def one_line_endings(trainer, folder, begun):
    """Turns signals, full disks and unreadable files into one line and the right exit status.

    No process is left behind. `begun()` says whether the run has begun to write.
    """
    hook = threading.excepthook

    def quietly(failure):
        """Drops an OSError of TensorBoard's thread: the trainer's next number raises it again."""
        if not isinstance(failure.exc_value, OSError):
            hook(failure)

    threading.excepthook = quietly
    try:
        yield
    except Stopped as stopped:
        status, step = stopped.args
        if not trainer.is_global_zero:
            sys.exit(0)  # Lightning would kill rank 0 for another status
        print(
            f"\n{signal.Signals(status - STOP).name} at step {step}: {shown(folder)}/last.ckpt "
            "is saved; the same command with --resume goes on",
            file=sys.stderr,
        )
        sys.exit(status)
    except SystemExit as error:
        # Lightning turns the KeyboardInterrupt of a signal into a status of its own.
        if isinstance(error.__context__, KeyboardInterrupt):
            raise error.__context__ from None
        raise
    except (OSError, UserError) as error:
        # Ranks that this process started would wait for it for ever.
        if hasattr(trainer.strategy.launcher, "procs"):
            trainer.strategy.launcher.kill(signal.SIGKILL)
        full = getattr(error, "errno", None) in FULL
        if not full and not getattr(error, "filename", None):
            raise
        advice = "make room there" if full else "put that right"
        raise UserError(
            f"{error.filename or folder}: {error.strerror}; {advice}; {way_on(folder, begun())}"
        ) from error
    finally:
        threading.excepthook = hook


class LastCheckpoint(Checkpoint):
    """Saves last.ckpt after every epoch, every `steps` updates, every `minutes`, and at a signal.

    It saves between two updates, never within an accumulation. On several ranks the clock or the
    signal of any rank counts for all: U2.request travels with the vote of the guard. `options` are
    those of the run; the checkpoint holds them for the run that goes on.
    """

    def __init__(self, path: str, steps: int | None, minutes: float | None, options: dict):
        self.path = path
        self.steps = steps
        self.minutes = minutes
        self.options = options
        self.stop = 0  # STOP + signal

    def setup(self, trainer, module, stage):
        self.listen(module)

    def on_train_start(self, trainer, module):
        self.listen(module)
        self.saved = time.monotonic()
        if trainer.received_sigterm:  # by Lightning's handler, just before this one was set
            self.stop = STOP + signal.SIGTERM

    def on_validation_start(self, trainer, module):
        self.listen(module)
        # A validation may run out of memory; the epoch before it is saved by then.
        if trainer.state.fn == "fit":
            self.save(trainer)

    def listen(self, module):
        """Takes the signals over from Lightning.

        Lightning's handlers end a run without saving, or hang on several ranks. A signal that the
        run was started to ignore, as under nohup or in a script's background, stays ignored.
        """

        def note(number, _):
            self.stop = module.request = STOP + number
            signal.signal(number, signal.SIG_DFL)  # the same signal again ends the run at once
            if number == signal.SIGHUP:
                leave_terminal()

        if self.stop:
            return
        for number in SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, note)

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        due = self.minutes is not None and time.monotonic() - self.saved >= 60 * self.minutes
        module.request = self.stop or SAVE * due

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if trainer.fit_loop._should_accumulate():
            return
        if module.agreed or self.steps and trainer.global_step % self.steps == 0:
            self.save(trainer)
        if module.agreed > STOP:
            raise Stopped(module.agreed, trainer.global_step)

    def on_train_epoch_end(self, trainer, module):
        self.save(trainer)

    def on_validation_batch_end(self, trainer, module, outputs, batch, batch_idx, dataloader_idx=0):
        stop = torch.tensor(self.stop, device=module.device)
        if trainer.world_size > 1:
            dist.all_reduce(stop, op=dist.ReduceOp.MAX)
        if not stop:
            return
        if trainer.state.fn == "fit":  # else training has ended and is saved
            for callback in trainer.callbacks:
                if isinstance(callback, WeightAveraging):
                    # This call puts the trained weights back, in whose place the average is.
                    callback.on_validation_epoch_end(trainer, module)
            self.save(trainer)
        raise Stopped(int(stop), trainer.global_step)

    def save(self, trainer):
        # Where weights_only has no value, Lightning logs a line each time.
        trainer.save_checkpoint(self.path, weights_only=False)
        self.saved = time.monotonic()

    def on_save_checkpoint(self, trainer, module, checkpoint):
        checkpoint["plan"] = make_plan(
            trainer.datamodule, trainer.world_size, trainer.accumulate_grad_batches
        )
        checkpoint["run_options"] = self.options

    def on_load_checkpoint(self, trainer, module, checkpoint):
        check_restored(trainer, module, checkpoint)
        every = trainer.check_val_every_n_epoch
        settle(checkpoint["loops"]["fit_loop"], checkpoint["global_step"], every)


def leave_terminal() -> None:
    """Sends output nowhere where its terminal has hung up: printing there would raise an error."""
    for descriptor in (1, 2):
        if stat.S_ISCHR(os.fstat(descriptor).st_mode):
            send_nowhere(descriptor)


class BestCheckpoint(Checkpoint):
    """Saves best.ckpt, the model with the lowest val_cer_mean.

    (Lightning's ModelCheckpoint keeps the score under the file's absolute path, and forgets it
    where the folder was moved.)
    """

    def __init__(self, path: str):
        self.path = path
        self.score = math.inf

    def on_load_checkpoint(self, trainer, module, checkpoint):
        self.score = best_score(self.path)
        if self.score == math.inf and os.path.exists(self.path):
            rank_zero_info(
                f"note: {self.path} is damaged; the model of the next validation takes its place"
            )

    def on_validation_end(self, trainer, module):
        score = float(trainer.callback_metrics["val_cer_mean"])
        if score < self.score:
            self.score = score
            trainer.save_checkpoint(self.path, weights_only=False)

    def on_save_checkpoint(self, trainer, module, checkpoint):
        checkpoint["best_score"] = self.score


def best_score(path: str) -> float:
    """Returns the val_cer_mean of the best.ckpt at `path`; infinity if it is absent or damaged."""
    try:
        checkpoint = read_weights_only(path, mmap=True)
        if not_finite(checkpoint):
            return math.inf
        if "best_score" not in checkpoint:
            # An older version left the score to Lightning's callback.
            states = checkpoint["callbacks"].values()
            checkpoint["best_score"] = next(
                state["best_model_score"] for state in states if "best_model_score" in state
            )
        score = float(checkpoint["best_score"])
        return math.inf if math.isnan(score) else score
    except (UserError, StopIteration, *FAULTS):
        return math.inf


def pairs_by_kind(average, module) -> list:
    """Pairs the parameters and buffers of two equal modules, first the floats, then the others."""
    ours, theirs = ([*each.parameters(), *each.buffers()] for each in (average, module))
    pairs = []
    for floats in (True, False):
        some = [pair for pair in zip(ours, theirs) if pair[0].is_floating_point() is floats]
        pairs += [tuple(map(list, zip(*some)))] if some else []
    return pairs


class Average(WeightAveraging):
    """Keeps an exponential average of the weights, without updates that the guard skipped."""

    def __init__(self, decay: float):
        super().__init__(multi_avg_fn=get_ema_multi_avg_fn(decay))
        self.begun = False  # there is an average already
        self.pairs = []  # (numbers of the average, numbers of the model) with one kind of numbers

    def on_train_batch_end(self, trainer, module, *arguments):
        if trainer.global_step > self._latest_update_step:
            if not module.update_skipped:
                self.update(module)
            # A skip counts, too: a resumed run does not know any more that there was one.
            self._latest_update_step = trainer.global_step

    @torch.no_grad()
    def update(self, module):
        """Does what AveragedModel.update_parameters does, without its two waits for the GPU.

        Torch reads the counter of updates from the GPU each time.
        """
        average = self._average_model
        if not self.pairs:  # walking through all modules takes as long as many launches
            self.pairs = pairs_by_kind(average.module, module)
            self.begun = int(average.n_averaged) > 0
        for ours, theirs in self.pairs:
            if self.begun:
                average.multi_avg_fn(ours, theirs, None)
            else:
                torch._foreach_copy_(ours, theirs)
        average.n_averaged += 1
        self.begun = True

    def on_load_checkpoint(self, trainer, module, checkpoint):
        with refusing(trainer.ckpt_path, "current_model_state, averaging_state"):
            super().on_load_checkpoint(trainer, module, checkpoint)

    def on_train_end(self, trainer, module):
        """Leaves the trained weights in the model, where Lightning would put the average.

        A validation may follow, and a run must be able to go on from its best.ckpt, too.
        """


class Place(NamedTuple):
    """Says where a checkpoint left its run."""

    path: str | None = None
    epoch: int = 0  # the epoch in which it was saved
    epochs: int = 0  # epochs that are over
    batches: int = 0  # batches of this epoch that each rank has seen; 0 at its end
    updates: int = 0
    plan: dict | None = None  # the result of make_plan; older checkpoints have none


def find_place(path: str, checkpoint: dict) -> Place:
    """Reads the place off a checkpoint. Raises UserError where the checkpoint does not say it."""
    with refusing(path, "loops"):
        loop = checkpoint["loops"]["fit_loop"]
        epoch = loop["epoch_progress"]["current"]["ready"] - 1
        over = epoch_is_over(loop)
        batches = 0 if over else loop["epoch_loop.batch_progress"]["current"]["ready"]
        if not all(fits(number, 0) for number in (epoch, batches, checkpoint["global_step"])):
            raise TypeError
        return Place(
            path, epoch, epoch + over, batches, checkpoint["global_step"], checkpoint.get("plan")
        )


def fits(given, like) -> bool:
    """Returns whether a part of a checkpoint has the names and types of `like`.

    Its numbers must lie within 0 .. 2**53.
    """
    if isinstance(like, dict):
        return isinstance(given, dict) and all(
            name in given and fits(given[name], part) for name, part in like.items()
        )
    typed = type(given) in ((int, float) if isinstance(like, float) else (type(like),))
    return typed and (not isinstance(like, (int, float)) or 0 <= given < 2**53)


def damaged(path: str, part: str) -> UserError:
    return UserError(
        f"{path}: its state of training is damaged ({part}); --init_from starts a new run from its "
        "weights"
    )


@contextlib.contextmanager
def refusing(path: str, part: str):
    """Turns an error within the block into a UserError that names the part of the checkpoint."""
    try:
        yield
    except FAULTS as error:
        raise damaged(path, part) from error


def check_state(path: str, checkpoint: dict) -> None:
    """Raises UserError where a part that a resumed run reads first is not as runs save it.

    The weights have been checked before, and check_restored looks at the rest.
    """
    parts = {
        "loops": {"fit_loop": {}},
        "callbacks": {},
        "pytorch-lightning_version": "",
        "lr_schedulers": [],
        "optimizer_states": [],
    }
    # Older checkpoints do not have these.
    newer = {"skips": {"in_a_row": 0, "in_all": 0}, "plan": {"processes": 0}, "run_options": {}}
    parts |= {part: like for part, like in newer.items() if part in checkpoint}
    for part, like in parts.items():
        if not fits(checkpoint.get(part), like):
            raise damaged(path, part)
    with refusing(path, "pytorch-lightning_version"):
        Version(checkpoint["pytorch-lightning_version"])
    with refusing(path, "lr_schedulers"):
        [scheduler] = checkpoint["lr_schedulers"]
        if not fits({"total_steps": 0, **scheduler}, {"last_epoch": 0, "total_steps": 0}):
            raise TypeError


def check_restored(trainer, module, checkpoint: dict) -> None:
    """Raises UserError where a part that Lightning restores is not of the kind that it saves.

    These are the states of the loops, the callbacks, the precision plugin and the optimizer.
    """
    path = trainer.ckpt_path
    states = checkpoint["callbacks"]
    plugin = trainer.precision_plugin
    parts = [("loops", checkpoint["loops"]["fit_loop"], trainer.fit_loop.state_dict())]
    parts += [
        (key, states[key], callback.state_dict())
        for callback in trainer.callbacks
        if (key := callback.state_key) in states
    ]
    if (name := type(plugin).__qualname__) in checkpoint:
        parts.append((name, checkpoint[name], plugin.state_dict()))
    for name, given, like in parts:
        if not fits(given, like):
            raise damaged(path, name)
    if isinstance(trainer.strategy, FSDPStrategy):
        return  # its state goes by the names of parameters, not by their numbers
    shapes = dict(enumerate(parameter.shape for parameter in module.parameters()))
    matrices = set(map(id, module.matrices()))
    by_muon = {number for number, p in enumerate(module.parameters()) if id(p) in matrices}
    with refusing(path, "optimizer_states"):
        [optimizer] = checkpoint["optimizer_states"]
        for number, state in optimizer["state"].items():
            names = ("exp_avg",) if number in by_muon else ("exp_avg", "exp_avg_sq")
            moments = {state[name].shape for name in names}
            if state["step"].numel() != 1 or moments != {shapes[number]}:
                raise TypeError
        if [group["params"] for group in optimizer["param_groups"]] != [list(shapes)]:
            raise TypeError


def make_plan(data, world_size: int, accumulate_grad_batches: int) -> dict:
    """Returns all that the order of rows depends on, and checksums of the rows.

    `data` is a SpeechDataModule after setup("fit"). The keys are shown to users.
    """
    seconds = data.options.max_batch_seconds
    rows = data.kept
    speeds = " ".join(map(str, data.augment.speeds or (1.0,)))  # those that the plan draws
    slowest = min(data.augment.speeds, default=1.0)
    by_length = seconds and data.options.few_shapes != "on"
    checksum = zlib.crc32(data.lengths[rows].tobytes(), zlib.crc32(rows.tobytes()))
    return {
        "seed": data.seed,
        "rows of train": f"{len(rows)} (checksum {checksum:08x})",
        "labels of train": f"(checksum {data.label_checksum:08x})",
        "max_batch_seconds": seconds,
        "batch_size": None if seconds else data.options.batch_size or 16,
        "group_by_length": data.options.group_by_length,
        "few_shapes": f"on (speeds {speeds})" if data.options.few_shapes == "on" else "off",
        "seconds": counted(slowest, data.frontend.tail_padding) if by_length else "",
        "accumulate_grad_batches": accumulate_grad_batches,
        "processes": world_size,
        "dev": f"{len(data.splits['dev'])} rows (checksum {data.dev_checksum:08x})",
    }


# Parts of a plan that the plans of older checkpoints do not have.
NEWER = {"labels of train", "dev", "few_shapes", "seconds"}


def counted(speed: float, tail: int) -> str:
    """Says what --max_batch_seconds counts as the length of a row; `tail` is in ms."""
    return f"at speed {speed:g} with a tail of {tail} ms"


def check_plan(place: Place, plan: dict, data) -> None:
    """Raises UserError where a resumed run cannot go on by `plan`; says how the plan has changed.

    At the end of an epoch any plan will do. Within an epoch, the rest of the epoch must stay the
    same: with the same plan, or with other processes and batch sizes that make the same batches of
    all processes together.
    """
    before = place.plan or plan
    before = {"few_shapes": "off", **before}  # older checkpoints do not have it
    if plan.keys() - before.keys() - NEWER:
        raise damaged(place.path, "plan")
    if "seconds" not in before:
        # They counted rows at speed 1, early versions without the tail, later ones with it. Which
        # it was is not known, so the tail decides nothing.
        by_length = before["max_batch_seconds"] and before["few_shapes"] == "off"
        before["seconds"] = counted(1.0, data.frontend.tail_padding) if by_length else ""
    differ = {
        name: (value, plan.get(name)) for name, value in before.items() if value != plan.get(name)
    }
    if "" in differ.get("seconds", ()):  # Batches of so many rows took their place.
        del differ["seconds"]
    if dev := differ.pop("dev", None):
        rank_zero_info(
            f"note: {place.path} was validated on {shown(dev[0], 50)} of dev, which is now "
            f"{dev[1]}: the best before and from here on are not comparable"
        )
    if not differ or place.batches and same_steps(place, plan, data, set(differ)):
        return
    changes = [
        f"{shown(name, 50)} {shown(str(before), 50)}, not {now}"
        for name, (before, now) in differ.items()
    ]
    said = shown("; ".join(changes), 500)
    if "seconds" in differ:
        said += " (the slowest of --speeds decides, and --tail_padding)"
    if place.batches:
        raise UserError(
            f"{place.path} was saved within an epoch that is planned with {said}; give the same, "
            "or the same rows per update by --batch_size times all --devices, or resume from a "
            "checkpoint at an epoch's end"
        )
    rank_zero_info(
        f"note: {place.path} was planned with {said}; epochs from here on are planned anew"
    )


def same_steps(place: Place, plan: dict, data, differ: set[str]) -> bool:
    """Returns whether both plans make the same batches of all processes in the place's epoch."""
    sizes = ("batch_size", "max_batch_seconds")
    if not differ <= {*sizes, "processes"}:
        return False
    before = copy.copy(data)
    before.options = dataclasses.replace(data.options, **{name: place.plan[name] for name in sizes})
    with refusing(place.path, "plan"):
        old = before.sampler(0, place.plan["processes"]).steps(place.epoch)
    new = data.sampler(0, plan["processes"]).steps(place.epoch)
    return len(old) == len(new) and all(map(np.array_equal, old, new))


def epoch_is_over(loop: dict) -> bool:
    """Returns whether a checkpoint's state of the fit loop is that after an epoch's validation."""
    epoch = loop["epoch_progress"]["current"]
    return (
        epoch["processed"] == epoch["ready"] and loop["epoch_loop.batch_progress"]["is_last_batch"]
    )


def settle(loop: dict, updates: int, every: int) -> None:
    """Changes a checkpoint's state of the fit loop so that Lightning goes on where it was saved.

    By itself Lightning would leave out the validation of an epoch that was saved before it, the
    rest of an epoch that max_steps cut short and, in a run with max_steps, the whole epoch that
    follows one that was saved after its validation. `every` counts the epochs from one validation
    to the next.
    """
    progress = loop["epoch_loop.batch_progress"]
    if epoch_is_over(loop):
        for part in ("total", "current"):
            loop["epoch_progress"][part]["completed"] = loop["epoch_progress"][part]["processed"]
        progress["current"].update(ready=0, started=0, processed=0, completed=0)
        progress["is_last_batch"] = False
        return
    if progress["is_last_batch"] and loop["epoch_progress"]["current"]["ready"] % every:
        # Behind this batch Lightning would count the update for its logs with a validation alone.
        loop["epoch_loop.state_dict"]["_batches_that_stepped"] = updates
    for part in ("total", "current"):
        epoch = loop["epoch_progress"][part]
        batch = progress[part]
        epoch["processed"] = epoch["completed"] = epoch["ready"] - 1
        if progress["is_last_batch"]:
            batch["completed"] = batch["ready"]
            # This is the state of a run that was left in the first batch of its validation.
            validation = loop["epoch_loop.val_loop.batch_progress"][part]
            validation.update(ready=1, started=1, processed=0, completed=0)


class MemoryCheck(L.Callback):
    """Runs the batches that need most memory before the first update, and says which does not fit.

    The batches of train that are largest by frames and by labels run forward and backward, the
    longest batch of dev runs as in a validation. Weights, statistics, gradients, optimizer and
    random numbers stay as they are.
    """

    def on_train_start(self, trainer, module):
        if isinstance(trainer.strategy, FSDPStrategy):
            return  # it gathers the weights in its own forward only
        data = trainer.datamodule
        checks = [
            (self.learn, batch, self.of_one_row(data, batch) or self.advice(data.options))
            for batch in data.largest_batches()
        ]
        batch = data.longest_dev_batch()
        advice = self.advice(data.options)
        if len(batch.rows) == 1:
            advice = f"cut row {int(batch.rows[0])} of dev, or leave it out"
        checks.append((self.validate, batch, advice))
        reasons = [reason for check in checks if (reason := self.reason(trainer, module, *check))]
        if trainer.strategy.reduce_boolean_decision(bool(reasons), all=False):
            elsewhere = (
                "the largest batch does not fit the memory of another rank; lower --batch_size or "
                "--max_batch_seconds"
            )
            raise UserError(reasons[0] if reasons else elsewhere)

    @staticmethod
    def advice(options) -> str:
        """Returns the advice which flag to lower, and to which number."""
        if options.max_batch_seconds:
            name, now = "max_batch_seconds", options.max_batch_seconds
        else:
            name, now = "batch_size", options.batch_size or 16
        return f"lower --{name}, for example to {now / 2:.0f}"

    @staticmethod
    def of_one_row(data, batch) -> str:
        """Returns the advice for a batch of a single row of train, in one view or two, or ""."""
        if len(batch.rows.unique()) > 1:
            return ""
        row = int(batch.rows[0])
        # The filter counts no tail, and no slower speed that the batch may have.
        most = num_frames(int(data.lengths[row]), data.frontend.without_tail) // 2
        if data.options.filter:
            return f"lower --max_frame, for example to {most}"
        return f"leave row {row} of train out, or give --max_frame {most} instead of --no-filter"

    def reason(self, trainer, module, run, batch, advice) -> str | None:
        """Runs the batch. Returns why it does not fit the memory, or None where it does."""
        rows, frames = len(batch.rows.unique()), batch.features.size(1)
        views = " in two views" * (len(batch.features) > rows)
        buffers = module.keep_buffers()
        try:
            batch = trainer.strategy.batch_to_device(trainer.precision_plugin.convert_input(batch))
            with torch.random.fork_rng([module.device] if module.device.type == "cuda" else []):
                run(trainer, module, batch)
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            said = (str(error).splitlines() or ["out of memory"])[0][:150]
            return (
                f"a batch of {rows} rows{views}, {frames} frames and {batch.labels.size(1)} labels "
                f"does not fit the memory of {module.device} ({said}); {advice}"
            )
        finally:
            module.restore_buffers(buffers)

    def validate(self, trainer, module, batch):
        module.eval()
        with torch.no_grad(), trainer.precision_plugin.forward_context():
            module.validation_step(batch, 0)
        module.reset_metrics()
        module.train()

    def learn(self, trainer, module, batch):
        parameters = [p for p in module.parameters() if p.requires_grad]
        # The first update will make the optimizer's moments, two of a parameter, or by Muon one; a
        # resumed run has them already.
        missing = 0 if trainer.optimizers[0].state else 2
        moments = [torch.empty_like(p) for p in parameters for _ in range(missing)]
        with trainer.precision_plugin.forward_context():
            inputs = batch.features, batch.feature_lengths, batch.labels, batch.label_lengths
            plain = module.graphs.plain if module.graphs else None
            views = module.options.views
            loss = module.net.loss(*inputs, but_ctc=plain, views=views)["loss"]
        # These gradients are apart from the parameters, whose own gradients stay unmade.
        torch.autograd.grad(loss, parameters, allow_unused=True)
        del moments
