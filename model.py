"""U2 trains the network of conformer.py, validates it, decodes with it, and writes checkpoints.

A guard skips updates whose gradients are not finite. Axes are those of conformer.py.
"""

import math
import os
import time
import warnings
from dataclasses import asdict, fields, replace
from functools import cached_property, partial

from cli import UserError, option, options_class, shown

import pytorch_lightning as L
import torch
import torch.distributed as dist
from pytorch_lightning.loggers import TensorBoardLogger, WandbLogger
from pytorch_lightning.utilities import rank_zero_info, rank_zero_warn
from torchmetrics import MeanMetric
from torchmetrics.text import CharErrorRate, WordErrorRate

import decode
from checkpoint import not_finite, read_checkpoint
from conformer import U2Conformer
from decode import Hypothesis, SearchOptions, Turns
from files import json_text
from frames import BlockState, StreamState, receptive_field, to_device
from graphs import Graphs
from joint import joint_beam_search, joint_rescoring
from kernels import for_few_rows
from muon import Muon, hidden_matrices
from presets import ModelOptions
from tokenizer import Tokenizer
from transforms import Frontend
from wfst import Graph

# The weights that have a row for each token.
VOCABULARY_ROWS = {"net.ctc.weight", "net.ctc.bias"} | {
    f"net.{decoder}.{layer}"
    for decoder in ("decoder", "right_decoder")
    for layer in ("embed.weight", "output_layer.weight", "output_layer.bias")
}
# A transformer block has the fewest weights: two norms, three linear layers of attention and two of
# the feed-forward, each with a weight and a bias.
FEWEST_OF_A_BLOCK = 14
VALIDATION_CHUNKS = {"": -1, "_chunk16": 16}  # metric suffix -> chunk size in encoder frames
PICTURES = 3  # first rows of dev whose features the log shows, and what was heard in them
FLUSH_EVERY = 100  # updates between two writes of steps.jsonl


@options_class
class OptimOptions:
    """Sets the optimizer, its schedule, the guard, and how a step saves memory or time."""

    optimizer: str = option("adamw", "optimizer", choices=("adamw", "adam", "muon"))
    lr: float = option(1e-3, "peak learning rate", above=0, at_most=10.0)
    weight_decay: float | None = option(
        None,
        "weight decay; by default 0.01, and with adam 0, as in WeNet",
        at_least=0.0,
        at_most=10.0,
    )
    scheduler: str = option(
        "onecycle",
        "OneCycleLR over the whole run, or WeNet's warm-up and decay by 1/sqrt(step)",
        choices=("onecycle", "warmup"),
    )
    warmup_steps: int = option(
        500,
        "steps until the peak learning rate, at most 30 %% of a onecycle run",
        at_least=0,
        at_most=10**9,
    )
    freeze_encoder_epochs: int = option(
        0, "with --init_from: epochs that leave the encoder as it came", at_least=0, at_most=10**6
    )
    max_skips: int = option(
        50, "stop after this many skipped updates in a row", at_least=1, at_most=10**6
    )
    gradient_checkpointing: bool = option(
        False, "recompute the encoder's blocks in backward: less memory, more time"
    )
    compile: bool = option(
        False, "torch.compile the encoder's blocks, once for all lengths (meant for GPUs)"
    )
    triton: bool = option(True, "on a GPU, fused kernels, where they give torch's numbers")
    cuda_graphs: str = option(
        "auto",
        "launch a step's kernels as CUDA graphs, one for each shape of a batch; auto: with "
        "--few_shapes on one GPU",
        choices=("auto", "on", "off"),
    )

    @property
    def decay(self) -> float:
        """Returns the weight decay that is asked for, or else the optimizer's own."""
        # In Adam decay is part of the gradient, and would take weights without one away.
        usual = 0.0 if self.optimizer == "adam" else 0.01
        return usual if self.weight_decay is None else self.weight_decay


def draw_chunk(size: int, options: ModelOptions) -> tuple[int, int]:
    """Draws (chunk_size, left_chunks) for a step over `size` encoder frames (U2, section 2.3).

    Half of the draws are (-1, -1), full context. The others are chunks of at most 100 feature
    frames, which are 1 s where they are 10 ms apart, with all left chunks or, with
    use_dynamic_left_chunk, a random number of them.
    """
    if not options.use_dynamic_chunk or size < 2:
        return -1, -1
    chunk = int(torch.randint(1, size, (1,)))
    if chunk > size // 2:
        return -1, -1
    chunk = chunk % (100 // receptive_field(options.input_layer)[1]) + 1
    left = -1
    if options.use_dynamic_left_chunk:
        left = int(torch.randint(0, max((size - 1) // chunk, 1), (1,)))
    return chunk, left


class StepLog:
    """Writes steps.jsonl, a line for each attempted update: {"step", "loss", "rows"}.

    `step` counts the earlier attempts, `loss` is the mean over the batches of all ranks (null where
    the mean is not finite), `rows` are the batches' row numbers, rank by rank. A skipped update
    also has "skipped": true. Lines are gathered and written FLUSH_EVERY at a time. With path None
    there is no log.
    """

    def __init__(self, path: str | None):
        self.path = path
        self.waiting = []

    def add(self, step: int, rows: list[int], losses: list[float], skipped: bool) -> None:
        """Notes an update with the rows of this rank's batches and the loss of each batch."""
        if self.path is None:
            return
        self.waiting.append((step, rows, losses, skipped))
        if len(self.waiting) == FLUSH_EVERY:
            self.flush()

    def flush(self) -> None:
        """Writes the waiting lines to the disk; all ranks must call it together.

        Raises OSError, as on a full disk.
        """
        waiting, self.waiting = self.waiting, []
        if not waiting:
            return
        of_ranks = gather([(rows, losses) for _, rows, losses, _ in waiting])
        if dist.is_initialized() and dist.get_rank() > 0:
            return
        with open(self.path, "a") as file:
            for (step, _, _, skipped), *parts in zip(waiting, *of_ranks):
                losses = [loss for _, losses in parts for loss in losses]
                loss = sum(losses) / len(losses)
                line = {"step": step, "loss": loss, "rows": sum((rows for rows, _ in parts), [])}
                file.write(json_text(line | ({"skipped": True} if skipped else {})) + "\n")
            file.flush()
            os.fsync(file.fileno())


def gather(value) -> list:
    """Collects the `value` of every rank, in order of rank."""
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def blame(features, row_losses):
    """Returns row losses (B,) that are not finite for exactly the rows at fault, if there are any.

    These are the rows whose features (B,T,F) are not finite or, if all features are, the rows whose
    own loss is not. A loss alone could blame a neighbour: where a product has an odd length, CPUs
    with AMX multiply the number behind a row, the next row's first, by zero, and NaN stays NaN.
    """
    sound = features.isfinite().flatten(1).all(1)
    return torch.where(sound.all(), row_losses, torch.where(sound, 0.0, torch.nan))


def parameters_of(optimizer) -> list:
    """Lists the parameters that the optimizer updates."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def place_steps(optimizer) -> None:
    """Moves the counters of updates to the device where the optimizer wants them.

    A fused optimizer's kernel reads them on the GPU, any other one's CPU would wait for each. They
    lie elsewhere where a run goes on with another precision than it was saved with.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if state := optimizer.state.get(parameter):
                state["step"] = state["step"].to(parameter.device if group["fused"] else "cpu")


def make_net(options: ModelOptions, frontend: Frontend, tokenizer: Tokenizer) -> U2Conformer:
    return U2Conformer(
        options,
        frontend.num_mel_bins,
        tokenizer.vocab_size,
        tokenizer.blank_id,
        tokenizer.sos_id,
        tokenizer.eos_id,
    )


def skeleton(
    options: ModelOptions, frontend: Frontend, tokenizer: Tokenizer, weights: int
) -> U2Conformer:
    """Makes the network without memory for its weights, to compare its shapes with a file's.

    Raises UserError where the options make no network, or one with more blocks than the file's
    number of `weights` allows.
    """
    try:
        blocks = options.num_blocks + options.decoder_num_blocks
        if options.reverse_weight > 0 or options.keep_right_decoder:
            blocks += options.r_num_blocks
        if FEWEST_OF_A_BLOCK * blocks > weights:
            raise UserError(
                f"its options ask for {shown(blocks, 20)} blocks, "
                f"which {weights} weights do not make"
            )
        with torch.device("meta"), warnings.catch_warnings(action="ignore"):
            return make_net(options, frontend, tokenizer)
    except (TypeError, ValueError, ArithmeticError, RuntimeError) as error:
        raise UserError(
            f"no network can be made of its options ({shown(str(error), 100)})"
        ) from error


class U2(L.LightningModule):
    """Trains and decodes a U2 or U2++ network.

    total_steps: the optimizer's steps of the run, for OneCycleLR. skip_log and step_log: the paths
    of skipped.jsonl and steps.jsonl, None for no log. cuda_graphs: train by graphs.Graphs. Feature
    lengths count feature frames, chunk sizes encoder frames.
    """

    def __init__(
        self,
        *,
        options: ModelOptions,
        optim: OptimOptions,
        frontend: Frontend,
        tokenizer: Tokenizer,
        total_steps: int = 1,
        seed: int = 0,
        skip_log: str | None = None,
        step_log: str | None = None,
        cuda_graphs: bool = False,
    ):
        super().__init__()
        self.options = options
        self.optim = optim
        self.frontend = frontend
        self.tokenizer = tokenizer
        self.total_steps = total_steps
        self.seed = seed
        self.skip_log = skip_log
        self.net = make_net(options, frontend, tokenizer)
        self.val_metrics = torch.nn.ModuleDict({"val_loss": MeanMetric()})
        for suffix in VALIDATION_CHUNKS:
            self.val_metrics["val_cer" + suffix] = CharErrorRate()
            self.val_metrics["val_wer" + suffix] = WordErrorRate()
        self.graphs = Graphs(self.net) if cuda_graphs else None
        # (rows, row losses, losses by loss_names) of the micro-batches since the last update.
        self.window = []
        self.losses = []  # the same losses as numbers, once the guard has read them
        self.steps = StepLog(step_log)
        self.update_skipped = False
        # What to do after an update (see recovery.py): this rank's request, and the largest one.
        self.request = self.agreed = 0
        self.skips_in_a_row = self.skips_in_all = 0
        self.pictures = {}  # {row of dev: (features (T,F), said, heard)} of this validation
        self.norm = None  # () of the last update's gradient, before clipping, on the device
        self.norm_before = 0.0  # the same of the update before, read with this update's losses
        self.heard_frames = 0  # feature frames since the time `heard_since`
        self.heard_since = time.monotonic()
        self.validated_step = -1  # global_step at the last validation
        self.lr_steps = None  # how often the learning rate had moved before a resume

    def set_cmvn(self, mean, istd):
        """Sets the global CMVN, each (F,): the encoder sees (features - mean) * istd."""
        self.net.encoder.cmvn_mean.copy_(mean)
        self.net.encoder.cmvn_istd.copy_(istd)

    def encode(self, features, feature_lengths, chunk_size: int = -1, left_chunks: int = -1):
        """Encodes features (B,T,F), lengths (B,) -> encoded (B,T',D), encoded_lengths (B,)."""
        return self.net.encode(features, feature_lengths, chunk_size, left_chunks)

    def ctc_log_probs(self, encoded):
        """Returns the CTC branch's log-probabilities: (B,T',D) -> (B,T',V)."""
        return self.net.ctc_log_probs(encoded)

    @torch.no_grad()
    def stream_state(self, chunk_size: int, left_chunks: int = -1, **limits) -> StreamState:
        """Returns the state before the first frame of an utterance.

        `limits` are those of Encoder.stream_state. Raises UserError for an encoder that sees the
        future.
        """
        return self.net.encoder.stream_state(chunk_size, left_chunks, **limits)

    @torch.no_grad()
    def stream(self, features, state, last: bool = False):
        """Encodes the chunks that features (1,n,F) complete -> encoded (1,m,D), the new state.

        `last` also encodes the rest, see Encoder.stream.
        """
        return self.net.encoder.stream(features, state, last)

    def loss(
        self,
        features,
        feature_lengths,
        labels,
        label_lengths,
        chunk_size: int = -1,
        left_chunks: int = -1,
    ):
        """Returns {"loss", "loss_ctc", "loss_att", "row_losses"} of U2Conformer.loss."""
        chunks = chunk_size, left_chunks
        return self.net.loss(features, feature_lengths, labels, label_lengths, *chunks)

    def init_from(self, checkpoint: dict) -> int:
        """Takes the weights of a checkpoint with equal options. Returns how many tokens it knew.

        Tokens that both tokenizers know, and special tokens by their role, take their rows from the
        checkpoint; the rows of other tokens stay as initialised.
        """
        pairs = Tokenizer.from_dict(checkpoint["tokenizer"]).shared_ids(self.tokenizer)
        theirs, ours = map(list, zip(*pairs))
        state = self.state_dict()
        for name, value in checkpoint["state_dict"].items():
            if name in VOCABULARY_ROWS:
                state[name][ours] = value[theirs]
            else:
                state[name] = value
        self.load_state_dict(state)
        return len(set(ours))

    # ---- Training

    def setup(self, stage):
        self.net.encoder.gradient_checkpointing = self.optim.gradient_checkpointing
        if self.optim.compile and stage == "fit":
            self.net.encoder.compile_blocks()

    def on_train_epoch_start(self):
        # A validation has come before, which is no part of the pace of training.
        self.heard_frames = 0
        self.heard_since = time.monotonic()

    def on_train_batch_start(self, batch, batch_idx):
        # Random draws depend on (seed, micro-batch, rank) alone: a resumed run draws the same.
        count = self.trainer.fit_loop.total_batch_idx
        mixed = torch.Generator().manual_seed(self.seed * 1_000_003 + count)
        torch.manual_seed(int(torch.randint(2**62, (), generator=mixed)) + self.global_rank)
        # The batch norm of a frozen encoder learns no statistics either.
        for module in self.batch_norms:
            module.train(not self.encoder_is_frozen)

    @cached_property
    def batch_norms(self) -> list:
        """Lists the encoder's, once: walking through all modules takes as long as many launches."""
        modules = self.net.encoder.modules()
        return [module for module in modules if isinstance(module, torch.nn.BatchNorm1d)]

    @property
    def encoder_is_frozen(self) -> bool:
        return self.current_epoch < self.optim.freeze_encoder_epochs

    def training_step(self, batch, batch_idx):
        size = self.net.encoder.frames(batch.features)
        chunk_size, left_chunks = draw_chunk(size, self.options)
        if not self.window:
            self.buffers_before = self.keep_buffers()
        inputs = batch.features, batch.feature_lengths, batch.labels, batch.label_lengths
        but_ctc = None if self.encoder_is_frozen else self.graphs
        views = self.options.views
        losses = self.net.loss(*inputs, chunk_size, left_chunks, self.sizes(batch), but_ctc, views)
        row_losses = blame(batch.features, losses.pop("row_losses"))
        row_losses = row_losses.unflatten(0, (views, -1)).sum(0)
        self.loss_names = tuple(losses)
        values = torch.stack([loss.detach() for loss in losses.values()])
        self.heard_frames += sum(batch.feature_lengths.tolist()) // views
        self.window.append((batch.rows.tolist()[: len(row_losses)], row_losses, values))
        return losses["loss"]

    def on_after_backward(self):
        # A frozen encoder's gradients are dropped here: DDP waits for them in backward, and where
        # they overflow a GradScaler would leave out the update of the other weights.
        if self.encoder_is_frozen:
            for parameter in self.net.encoder.parameters():
                parameter.grad = None
        # A graph writes its gradients into the same memory each time, where the next micro-batch
        # of this shape would overwrite the sum.
        if self.graphs and self.trainer.accumulate_grad_batches > 1 and len(self.window) == 1:
            for parameter in self.parameters():
                if parameter.grad is not None:
                    parameter.grad = parameter.grad.clone()

    def sizes(self, batch):
        """Returns the rows, and the labels with eos, by which this rank's losses are divided.

        Both are sums over all ranks, divided by the number of ranks. On a single rank the batch
        itself counts: None. DDP and FSDP take the mean of the ranks' gradients, as if all had
        equally many rows; with this division the mean is the gradient that one process with all
        rows computes.
        """
        ranks = self.trainer.world_size
        if ranks == 1:
            return None
        # Filling a tensor on a GPU does not wait for the GPU, copying a number there does.
        here = len(batch.rows), sum(batch.label_lengths.tolist()) + len(batch.rows)
        total = torch.stack([torch.full((), size, device=self.device) for size in here])
        dist.all_reduce(total)
        return (total / ranks).unbind()

    def keep_buffers(self) -> list:
        """Pairs each buffer of batch norm, its statistics, with a copy for `restore_buffers`."""
        buffers = (buffer for module in self.batch_norms for buffer in module.buffers())
        return [(buffer, buffer.clone()) for buffer in buffers]

    @torch.no_grad()
    def restore_buffers(self, kept: list) -> None:
        for buffer, before in kept:
            buffer.copy_(before)

    def configure_optimizers(self):
        o = self.optim
        # Behind a GradScaler a fused optimizer would unscale by itself, after the guard has looked.
        fused = getattr(self.trainer.precision_plugin, "scaler", None) is None
        rates = dict(lr=o.lr, weight_decay=o.decay, fused=fused)
        if matrices := self.matrices():
            # Products need no more than bfloat16's bits, which not all CPUs multiply fast.
            slow = self.device.type == "cpu" and self.trainer.precision != "bf16-mixed"
            dtype = torch.float32 if slow else torch.bfloat16
            optimizer = Muon(self.parameters(), matrices, dtype, **rates)
        else:
            kind = torch.optim.AdamW if o.optimizer == "adamw" else torch.optim.Adam
            optimizer = kind(self.parameters(), **rates)
        if o.scheduler == "onecycle":
            share = min(o.warmup_steps / self.total_steps, 0.3)
            scheduler = torch.optim.lr_scheduler.OneCycleLR(
                optimizer,
                max_lr=o.lr,
                total_steps=self.total_steps + 1,
                pct_start=share,
                cycle_momentum=False,
            )
        else:
            warm = max(o.warmup_steps, 1)
            scheduler = torch.optim.lr_scheduler.LambdaLR(
                optimizer, lambda step: warm**0.5 * min((step + 1) ** -0.5, (step + 1) * warm**-1.5)
            )
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }

    def matrices(self) -> list:
        """Lists the weights that Muon updates; with another optimizer there are none."""
        net = self.net
        heads = net.ctc, *(d.output_layer for d in (net.decoder, net.right_decoder) if d)
        return hidden_matrices(net, heads) if self.optim.optimizer == "muon" else []

    def on_train_start(self):
        """Gives a resumed run the optimizer's settings and the schedule of its own options.

        The schedule spans all updates of the run and stands at the place that was reached.
        """
        if self.lr_steps is None:
            return
        (optimizer,) = self.trainer.optimizers
        (config,) = self.trainer.lr_scheduler_configs
        fresh = self.configure_optimizers()
        for group, new in zip(optimizer.param_groups, fresh["optimizer"].param_groups):
            group.update({name: value for name, value in new.items() if name != "params"})
        place_steps(optimizer)
        scheduler = config.scheduler
        if place := min(self.lr_steps, getattr(scheduler, "total_steps", math.inf) - 1):
            scheduler.last_epoch = place - 1
            scheduler._step_count = place
            # Torch warns of a scheduler that moves before its optimizer.
            with warnings.catch_warnings(action="ignore"):
                scheduler.step()

    def lr_scheduler_step(self, scheduler, metric):
        ended = getattr(scheduler, "total_steps", math.inf) <= scheduler.last_epoch + 1
        # A run longer than planned goes on at the last learning rate.
        if not self.update_skipped and not ended:
            scheduler.step()

    # ---- The guard: skip what is not finite

    def on_before_optimizer_step(self, optimizer):
        """Throws away a gradient that is not finite, after unscaling and before clipping.

        An optimizer leaves a parameter without a gradient as it is, its moments and steps included.
        By one message all ranks agree on the answer, and on the largest request of any rank (see
        recovery.py). The answer is read together with the losses: a step waits for the GPU once.
        """
        gradients = [p.grad for p in parameters_of(optimizer) if p.grad is not None]
        # NaN and infinity both survive a maximum.
        norm = torch.nn.utils.get_total_norm(gradients, norm_type=math.inf)
        finite = torch.isfinite(norm).float()
        votes = torch.stack((finite, torch.full_like(finite, -self.request)))
        if self.trainer.world_size > 1:
            dist.all_reduce(votes, op=dist.ReduceOp.MIN)
        norm = torch.zeros_like(finite) if self.norm is None else self.norm
        values = torch.cat((votes, *(each for *_, each in self.window), norm[None])).tolist()
        finite, request, *losses, self.norm_before = values
        names = self.loss_names
        self.losses = [dict(zip(names, losses[i:])) for i in range(0, len(losses), len(names))]
        self.update_skipped = not finite
        self.agreed = int(-request)
        if self.update_skipped:
            optimizer.zero_grad(set_to_none=True)
            self.restore_buffers(self.buffers_before)

    def configure_gradient_clipping(
        self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None
    ):
        """Clips by norm. Lightning itself refuses to do so for any fused optimizer."""
        if gradient_clip_val and not self.update_skipped:
            parameters = parameters_of(optimizer)
            self.norm = torch.nn.utils.clip_grad_norm_(parameters, gradient_clip_val)

    def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure=None):
        """Attempts an update, which global_step counts, and reports it where it was skipped.

        Raises UserError after max_skips skipped updates in a row.
        """
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        window, self.window = self.window, []
        rows = [row for rows, *_ in window for row in rows]
        losses = [each["loss"] for each in self.losses]
        self.steps.add(self.trainer.global_step, rows, losses, self.update_skipped)
        # A log takes as long as a hundred launches, so only those are made that Lightning writes.
        if (self.trainer.global_step + 1) % self.trainer.log_every_n_steps == 0:
            self.log_losses(len(rows))
        if not self.update_skipped:
            self.skips_in_a_row = 0
            return
        rows, bad_rows = self.gather_window(window)
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        if scaler and not bad_rows and scaler.get_scale() / scaler.get_backoff_factor() > 1:
            return  # float16 overflowed, so GradScaler has lowered its scale: no row is at fault
        self.report_skip(rows, bad_rows)

    def log_losses(self, rows: int) -> None:
        """Logs the update's losses, means over its micro-batches, as numbers on the CPU.

        The gradient's norm is of the update before, for another wait for the GPU would cost more.
        The pace counts this rank's audio times the ranks, which have about equally much.
        """
        for name in self.loss_names:
            mean = torch.tensor(sum(each[name] for each in self.losses) / len(self.losses))
            self.log(f"train_{name}", mean, batch_size=rows)
            if name == "loss":
                self.log(name, mean, prog_bar=True, logger=False, batch_size=rows)
        if self.norm_before:  # neither the first update of a run nor of a resumed one has it
            self.log("grad_norm", torch.tensor(self.norm_before), batch_size=rows)
        heard = self.heard_frames * self.frontend.shift_ms / 1000 * self.trainer.world_size
        now = time.monotonic()
        pace = torch.tensor(heard / (now - self.heard_since))
        self.log("audio_seconds_per_second", pace, batch_size=rows)
        self.heard_frames = 0
        self.heard_since = now
        self.log("skipped_updates", torch.tensor(float(self.skips_in_all)), batch_size=rows)

    def gather_window(self, window) -> tuple[list[int], list[int]]:
        """Collects from all ranks the window's rows, and its rows whose loss is not finite."""
        rows = [row for rows, *_ in window for row in rows]
        finite = [ok for _, losses, _ in window for ok in losses.isfinite().tolist()]
        pairs = [pair for of_rank in gather(list(zip(rows, finite))) for pair in of_rank]
        return [row for row, _ in pairs], [row for row, ok in pairs if not ok]

    def report_skip(self, rows, bad_rows):
        self.skips_in_a_row += 1
        self.skips_in_all += 1
        step = self.trainer.global_step
        if self.trainer.is_global_zero and self.skip_log:
            line = {"step": step, "epoch": self.current_epoch, "rows": rows}
            line["rows_with_nonfinite_loss"] = bad_rows
            with open(self.skip_log, "a") as file:
                file.write(json_text(line) + "\n")
        rank_zero_warn(
            f"step {step}: gradient not finite, update skipped; "
            f"rows with non-finite loss: {bad_rows or 'none'}"
        )
        if self.skips_in_a_row >= self.optim.max_skips:
            self.steps.flush()
            raise UserError(
                f"{self.skips_in_a_row} updates in a row had a gradient that is not finite "
                f"(the last at step {step}); see {self.skip_log or 'the log'} for the rows, "
                "or lower --lr"
            )

    def on_train_end(self):
        self.steps.flush()

    # ---- Validation

    def validation_step(self, batch, batch_idx):
        references = [
            self.tokenizer.decode(labels[:length])
            for labels, length in zip(batch.labels.tolist(), batch.label_lengths.tolist())
        ]
        features, lengths = batch.features, batch.feature_lengths
        losses = self.net.loss(features, lengths, batch.labels, batch.label_lengths)
        self.val_metrics["val_loss"].update(losses["loss"], weight=len(batch.rows))
        for suffix, chunk_size in VALIDATION_CHUNKS.items():
            heard = self.decode(features, lengths, "ctc_greedy_search", chunk_size=chunk_size)
            texts = [self.tokenizer.decode(hypothesis.tokens) for hypothesis in heard]
            self.val_metrics["val_cer" + suffix].update(texts, references)
            self.val_metrics["val_wer" + suffix].update(texts, references)
            if chunk_size == -1:
                self.keep_pictures(batch, references, texts)

    def keep_pictures(self, batch, references: list[str], texts: list[str]) -> None:
        """Keeps the features of the first rows of dev, what was said and what was heard."""
        rows = zip(batch.rows.tolist(), batch.features, batch.feature_lengths, references, texts)
        for row, features, length, *said in rows:
            if row < PICTURES:
                self.pictures[row] = (features[:length].float().cpu(), *said)

    def log_pictures(self) -> None:
        """Shows the logger the pictures; a logger without pictures, such as csv's, gets none."""
        for row, (features, said, heard) in sorted(self.pictures.items()):
            low, high = features.aminmax()
            grey = ((features.T.flip(0) - low) / (high - low).clamp(min=1e-6)).numpy()  # (F,T)
            name, caption = f"dev_{row}", f"said: {shown(said)}\n\nheard: {shown(heard)}"
            for logger in self.loggers:
                if isinstance(logger, TensorBoardLogger):
                    logger.experiment.add_image(name, grey, self.global_step, dataformats="HW")
                    logger.experiment.add_text(name, caption, self.global_step)
                elif isinstance(logger, WandbLogger):
                    logger.log_image(name, [grey], caption=[caption])

    def on_validation_epoch_end(self):
        values = {name: metric.compute() for name, metric in self.val_metrics.items()}
        rates = [values["val_cer" + suffix] for suffix in VALIDATION_CHUNKS]
        values["val_cer_mean"] = sum(rates) / len(rates)
        # compute has joined all ranks; without sync_dist Lightning would warn.
        self.log_dict(values, sync_dist=True)
        self.validated_step = self.global_step
        for of_rank in gather(self.pictures):
            self.pictures |= of_rank
        if self.trainer.is_global_zero:
            self.log_pictures()
        self.reset_metrics()
        said = ("val_loss", "val_cer", "val_wer", "val_cer_chunk16", "val_wer_chunk16")
        # While fitting, the epoch's training is over, though Lightning counts the epoch later.
        epochs = self.current_epoch + (self.trainer.state.fn == "fit")
        rank_zero_info(
            f"epoch {epochs}, step {self.global_step}: "
            + "  ".join(f"{name} {float(values[name]):.4f}" for name in said)
        )

    def reset_metrics(self):
        for metric in self.val_metrics.values():
            metric.reset()
        self.pictures.clear()

    # ---- Decoding

    @torch.no_grad()
    def decode(
        self, features, feature_lengths, mode: str, *, context=None, **search
    ) -> list[Hypothesis]:
        """Decodes features (B,T,F), feature_lengths (B,) -> a Hypothesis for each utterance.

        (U2, section 3.3; U2++, section 3.1.) `search` has fields of decode.SearchOptions, such as
        beam_size; context is what ngram.favour makes of hotwords or a language model. Raises
        UserError for values out of bounds and for what U2.search refuses, TypeError for a keyword
        that is no such field.
        """
        names = [field.name for field in fields(SearchOptions)]
        if unknown := search.keys() - set(names):
            raise TypeError(
                f"decode takes no {min(unknown)!r}; the options of a search are {', '.join(names)}"
            )
        options = SearchOptions(**search)
        return decode.answered(self.decoding(features, feature_lengths, mode, options, context))

    @torch.no_grad()
    def decoding(
        self, features, feature_lengths, mode: str, search: SearchOptions, context=None
    ) -> Turns:
        """Does in turns what `decode` does; features and lengths may come on the CPU."""
        inputs = (to_device(part, self.device) for part in (features, feature_lengths))
        encoded, lengths = self.encode(*inputs, search.chunk_size, search.left_chunks)
        return (yield from self.searching(encoded, lengths, mode, search, context))

    def search(
        self,
        encoded,
        lengths,
        mode: str,
        search: SearchOptions = SearchOptions(),
        context=None,
        hushed=None,
    ) -> list[Hypothesis]:
        """Decodes encoded (B,T',D), lengths (B,) -> a Hypothesis for each, as in `decode`.

        In the frames `hushed` (B,T') CTC hears nothing. A Hypothesis has no text where CTC's best
        path has none. Raises UserError for what decode.check_mode refuses.
        """
        return decode.answered(self.searching(encoded, lengths, mode, search, context, hushed))

    @torch.no_grad()
    def searching(
        self, encoded, lengths, mode: str, search: SearchOptions, context=None, hushed=None
    ) -> Turns:
        """Does in turns what `search` does.

        There is one turn for CTC and one for rescoring. Modes attention and joint read the device
        at each token besides.
        """
        decode.check_mode(mode, context)
        blank_id = self.net.blank_id
        log_probs = self.net.ctc_log_probs(encoded)  # (B,T',V)
        if hushed is not None:
            log_probs = decode.silence(log_probs, hushed, blank_id)
        ended = torch.arange(log_probs.size(1), device=lengths.device) >= lengths[:, None]  # (B,T')
        silent = (decode.blank_wins(log_probs, blank_id) | ended).all(dim=1)  # (B,)
        if mode == "ctc_greedy_search":
            *best, silent = yield *log_probs.max(dim=-1), lengths, silent
            found = decode.best_paths(*best, blank_id)
        elif mode in ("attention", "joint"):  # the decoder knows no time; CTC aligns what it wrote
            if mode == "attention":
                written = self.attention_search(encoded, lengths, search)
            else:
                written, others = self.joint_search(encoded, lengths, log_probs, search, context)
            nbests = [hypothesis.nbest for hypothesis in written]
            picked, columns = decode.columns_of(log_probs, nbests, blank_id)
            picked, sizes, silent = yield picked, lengths, silent
            rows = zip(written, picked, sizes.tolist(), columns)
            found = [decode.align(*row, columns=tokens) for *row, tokens in rows]
        elif isinstance(context, Graph):
            log_probs, sizes, silent = yield log_probs, lengths, silent
            found = context.search(log_probs, sizes, search.beam_size, blank_id)
        else:
            offers = decode.find_offers(log_probs, search, blank_id, lengths)
            del log_probs  # a GPU has several batches at a time
            offers, silent = yield offers, silent
            beam = decode.prefix_start(len(encoded), context)
            beam = decode.prefix_follow(beam, offers, search, blank_id)
            found = decode.prefix_result(beam)
        if mode == "attention_rescoring":
            found = yield from self.rescoring(found, search, encoded, lengths)
        elif mode == "joint" and search.joint_ctc_weight < 1 and self.reverse_weight(search) > 0:
            rescore = partial(self.rescoring, encoded=encoded, lengths=lengths)
            found = yield from joint_rescoring(found, others, rescore, search)
        rows = zip(found, silent.tolist())
        return [decode.without_text(row) if nothing else row for row, nothing in rows]

    def rescore(
        self, hypotheses, encoded, lengths, search: SearchOptions = SearchOptions()
    ) -> list[Hypothesis]:
        """Sorts CTC n-best lists by the attention decoders; encoded and lengths as in `search`."""
        return decode.answered(self.rescoring(hypotheses, search, encoded, lengths))

    @torch.no_grad()
    def rescoring(self, hypotheses, search: SearchOptions, encoded, lengths) -> Turns:
        """Does in turns what `rescore` does."""
        net = self.net

        def score(tree, reverse):
            decoder = net.right_decoder if reverse else net.decoder
            logits = decoder(tree.tokens, encoded, lengths, tree.positions, tree.sees)
            return logits.float().log_softmax(-1)

        search = replace(search, reverse_weight=self.reverse_weight(search))
        return (
            yield from decode.attention_rescoring(
                hypotheses, score, search, net.sos_id, net.eos_id, encoded.device
            )
        )

    def reverse_weight(self, search: SearchOptions) -> float:
        """Returns the share of the right-to-left decoder, which a U2 model does not have."""
        return 0.0 if self.net.right_decoder is None else search.reverse_weight

    def attention_search(self, encoded, lengths, search: SearchOptions) -> list[Hypothesis]:
        """Searches with the left-to-right decoder, for at most one token per encoder frame."""
        net = self.net
        rows = torch.arange(len(encoded), device=encoded.device).repeat_interleave(search.beam_size)
        of_beams = encoded[rows], lengths[rows]  # (B*N,T',D), (B*N,)

        def step(prefixes, state, parents):
            # Parents stay within their utterance, so the source keeps its order.
            if parents is not None:
                state = [(past.rows(parents), source) for past, source in state]
            logits, state = net.decoder.step(prefixes, state, *of_beams)
            return logits.float().log_softmax(-1), state

        return decode.attention_beam_search(
            step, len(lengths), lengths, search, net.sos_id, net.eos_id, encoded.device
        )

    def joint_search(self, encoded, lengths, log_probs, search: SearchOptions, context=None):
        """Runs joint_beam_search with the left-to-right decoder and CTC's log_probs (B,T',V)."""
        net = self.net
        sources = [block.src_attn.keys_values(encoded) for block in net.decoder.blocks]

        def step(prefixes, state, parents, utterances):
            pasts = [BlockState()] * len(sources)
            source = before = None
            if parents is not None:
                pasts, source, before = state
                pasts = [past.rows(parents) for past in pasts]
            if before is None or not torch.equal(before, utterances):  # some row has ended
                source = [(keys[utterances], values[utterances]) for keys, values in sources]
            state = list(zip(pasts, source))
            logits, state = net.decoder.step(prefixes, state, encoded, lengths[utterances])
            pasts = [past for past, _ in state]
            return logits.float().log_softmax(-1), (pasts, source, utterances)

        ids = net.blank_id, net.sos_id, net.eos_id
        return joint_beam_search(step, log_probs, lengths, search, *ids, context)

    # ---- Checkpoint

    def on_save_checkpoint(self, checkpoint):
        """Adds options, frontend and tokenizer as plain data, all that a later command needs.

        Raises UserError where a weight is not finite.
        """
        self.steps.flush()  # first, so that the log is never behind the checkpoint
        # The guard has skipped bad gradients, so a step was too long.
        if name := not_finite(checkpoint):
            raise UserError(
                f"step {self.global_step}: {name} is not finite any more, so that nothing is "
                "saved; lower --lr and go on with --resume from the checkpoint before; "
                "where there is none, begin again with --overwrite"
            )
        checkpoint.update(
            model_options=asdict(self.options),
            optim_options=asdict(self.optim),
            frontend=asdict(self.frontend),
            tokenizer=self.tokenizer.to_dict(),
            skips={"in_a_row": self.skips_in_a_row, "in_all": self.skips_in_all},
        )

    def on_load_checkpoint(self, checkpoint):
        # The options and the number of its steps make the learning rate: only the number is kept.
        self.lr_steps = checkpoint["lr_schedulers"][0]["last_epoch"]
        checkpoint["lr_schedulers"] = []
        skips = checkpoint.get("skips", {"in_a_row": 0, "in_all": 0})  # older checkpoints have none
        self.skips_in_a_row, self.skips_in_all = skips["in_a_row"], skips["in_all"]


def load_checkpoint(path: str, device="cpu") -> tuple[U2, Tokenizer, Frontend]:
    """Loads the model, in evaluation mode, the tokenizer and the frontend of a checkpoint.

    `path` may also name a model on the hub. Raises UserError for what read_checked refuses.
    """
    checkpoint = read_checked(path)
    options, optim, frontend, tokenizer = make_parts(checkpoint)
    model = U2(options=options, optim=optim, frontend=frontend, tokenizer=tokenizer)
    model.load_state_dict(checkpoint["state_dict"])
    return for_few_rows(model.to(device).eval()), tokenizer, frontend


def make_parts(checkpoint: dict) -> tuple[ModelOptions, OptimOptions, Frontend, Tokenizer]:
    """Builds what a checkpoint describes in plain data.

    Raises UserError, TypeError and the like where it describes something else.
    """
    return (
        ModelOptions(**checkpoint["model_options"]),
        OptimOptions(**checkpoint["optim_options"]),
        Frontend(**checkpoint["frontend"]),
        Tokenizer.from_dict(checkpoint["tokenizer"]),
    )


def check_model(checkpoint: dict) -> None:
    """Checks that a checkpoint's options, tokenizer and weights fit each other.

    Raises UserError where they do not, and what make_parts raises. The network that the options
    describe takes no memory.
    """
    options, _, frontend, tokenizer = make_parts(checkpoint)
    weights = checkpoint["state_dict"]
    if not isinstance(weights, dict) or not all(
        isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in weights.items()
    ):
        raise UserError("state_dict holds no weights by name")
    net = skeleton(options, frontend, tokenizer, len(weights))
    expected = {f"net.{name}": value for name, value in net.state_dict().items()}
    if differ := expected.keys() ^ weights.keys():
        raise UserError(
            f"{shown(min(differ), 100)} is {'missing' if min(differ) in expected else 'left over'}"
        )
    for name, value in expected.items():
        given = weights[name]
        if given.shape != value.shape or given.is_floating_point() != value.is_floating_point():
            raise UserError(
                f"{name} has shape {shown(tuple(given.shape), 100)} of {given.dtype}, "
                f"not {tuple(value.shape)} of {value.dtype}"
            )


def read_checked(path: str) -> dict:
    """Reads a checkpoint that check_model passes. Raises UserError for anything else."""
    checkpoint = read_checkpoint(path)
    try:
        check_model(checkpoint)
    except (
        UserError,
        TypeError,
        ValueError,
        ArithmeticError,
        LookupError,
        AttributeError,
        RuntimeError,
    ) as error:
        raise UserError(
            f"{path}: its options and weights do not fit this version of lightning-U2 "
            f"({shown(str(error), 200)})"
        ) from error
    return checkpoint
