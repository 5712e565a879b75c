"""The guard, validation, decoding and checkpoints, on a network that trains in a second."""

import ast
import dataclasses
import pickle
import re
import shutil
from functools import partial
from typing import NamedTuple

from cli import UserError, run

import pytest
import pytorch_lightning as L
import torch
from pytorch_lightning.plugins import MixedPrecision
from torch.utils.data import DataLoader

import score
from decode import MODES
from helpers import FILES, TINY, TWO_BLOCKS, distance, json_lines, same
from helpers_model import quiet_trainer, tiny_model
from kernels import for_few_rows
from model import OptimOptions, blame, draw_chunk, load_checkpoint, read_checked
from tokenizer import load_tokenizer, train_char
from tools import wenet_import
from transforms import Frontend

TOKENIZER = train_char(["abcdefgh"])


class Batch(NamedTuple):
    features: torch.Tensor
    feature_lengths: torch.Tensor
    labels: torch.Tensor
    label_lengths: torch.Tensor
    rows: torch.Tensor


def batches(count, poison=(), size=2, first_row=0, frames=60):
    """`count` batches of `size` rows; those numbered in `poison` hold a NaN in their second row."""
    generator = torch.Generator().manual_seed(first_row)
    for number in range(count):
        features = torch.randn(size, frames, 80, generator=generator)
        if number in poison:
            features[1, 3, 3] = torch.nan
        rows = torch.arange(size) + first_row + number * size
        yield Batch(
            features,
            torch.full((size,), frames),
            torch.randint(4, 12, (size, 3), generator=generator),
            torch.full((size,), 3),
            rows,
        )


def make(tmp_path=None, options=TINY, **optim):
    return tiny_model(
        TOKENIZER,
        options,
        optim=OptimOptions(**{"warmup_steps": 2, **optim}),
        total_steps=20,
        skip_log=str(tmp_path / "skipped.jsonl") if tmp_path else None,
    )


class Recorder(L.Callback):
    """Keeps the weights, the optimizer's moments and the schedule's place after each attempt."""

    def __init__(self):
        self.states = []

    def on_train_batch_end(self, trainer, module, *_):
        if trainer.fit_loop._should_accumulate():
            return
        optimizer = trainer.optimizers[0]
        moments = [value.clone() for state in optimizer.state.values() for value in state.values()]
        self.states.append(
            (
                trainer.global_step,
                [p.detach().clone() for p in module.parameters()],
                moments,
                trainer.lr_scheduler_configs[0].scheduler.last_epoch,
            )
        )


def fit(model, loader, accumulate=1, plugins=None, precision=None, watch=None, **options):
    recorder = Recorder()
    trainer = quiet_trainer(
        recorder,
        *[watch] * bool(watch),
        accumulate_grad_batches=accumulate,
        plugins=plugins,
        precision=precision,
        **options,
    )
    trainer.fit(model, DataLoader(list(loader), batch_size=None))
    return trainer, recorder.states


def skipped(tmp_path):
    return json_lines(tmp_path / "skipped.jsonl")


def precision_plugins(precision):
    # On a CPU Lightning turns 16-mixed into bf16-mixed, unless it is handed the plugin.
    if precision == "16-mixed":
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        return {"plugins": MixedPrecision("16-mixed", "cpu", scaler)}
    return {"precision": precision}


@pytest.mark.parametrize(
    "optimizer, precision",
    [("adamw", "32"), ("adamw", "16-mixed"), ("adam", "bf16-mixed"), ("muon", "16-mixed")],
)
def test_a_nan_in_one_micro_batch_of_four_leaves_everything_as_it_was(
    tmp_path, optimizer, precision
):
    model = make(tmp_path, optimizer=optimizer)
    trainer, states = fit(
        model, batches(12, poison=[4]), accumulate=4, **precision_plugins(precision)
    )
    (_, *before), (attempts, *after), (_, *healed) = states
    assert attempts == 2 and trainer.global_step == 3  # global_step counts attempts
    assert same(before[0], after[0]) and same(before[1], after[1]) and before[2] == after[2]
    assert not same(after[0], healed[0]) and healed[2] == after[2] + 1
    assert all(p.isfinite().all() for p in model.parameters())
    assert skipped(tmp_path) == [
        {"step": 1, "epoch": 0, "rows": list(range(8, 16)), "rows_with_nonfinite_loss": [9]}
    ]


@pytest.mark.parametrize("accumulate", [1, 4])
def test_a_skip_leaves_the_statistics_of_batch_norm_as_they_were(tmp_path, accumulate):
    model = make(tmp_path, options=dataclasses.replace(TINY, cnn_module_norm="batch_norm"))
    buffers = []

    class Watch(L.Callback):
        def on_train_batch_end(self, trainer, module, *_):
            if not trainer.fit_loop._should_accumulate():
                buffers.append([buffer.clone() for buffer in module.net.buffers()])

    trainer, _ = fit(model, batches(3 * accumulate, poison=[accumulate]), accumulate, watch=Watch())
    assert same(buffers[0], buffers[1]) and not same(buffers[1], buffers[2])
    assert all(buffer.isfinite().all() for buffer in buffers[2])


def test_the_rows_to_blame_are_those_that_began_it():
    """A row beside one of NaNs may become NaN, as on CPUs with AMX; its features are finite."""
    features, losses = torch.zeros(4, 5, 3), torch.tensor([1.0, torch.nan, torch.nan, 2.0])
    assert blame(features, losses).isfinite().tolist() == [True, False, False, True]
    features[2, 4, 1] = torch.inf
    assert blame(features, losses).isfinite().tolist() == [True, True, False, True]


def test_accumulation_starts_afresh_after_a_skip(tmp_path):
    """The window after a poisoned one gives the same update as without the poisoned one."""
    poisoned, clean = make(tmp_path), make()
    for model in (poisoned, clean):
        # Dropout is then the same whatever came before.
        model.on_train_batch_start = lambda *_: torch.manual_seed(0)
    good = list(batches(4))
    bad = list(batches(2, poison=[1]))
    _, with_bad = fit(poisoned, good[:2] + bad + good[2:], accumulate=2)
    _, without = fit(clean, good, accumulate=2)
    assert same(with_bad[-1][1], without[-1][1]) and same(with_bad[-1][2], without[-1][2])


def test_gradscalers_opening_overflows_are_not_skips(tmp_path):
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**26)
    model = make(tmp_path, max_skips=3)
    fit(model, batches(8), plugins=MixedPrecision("16-mixed", "cpu", scaler))
    # There were more than max_skips in a row.
    assert scaler.get_scale() < 2.0**22 and model.skips_in_all == 0 and not skipped(tmp_path)


def test_gradscaler_still_updates_in_a_skipped_window(tmp_path):
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    model = make(tmp_path)
    fit(model, batches(6, poison=[3]), plugins=MixedPrecision("16-mixed", "cpu", scaler))
    assert scaler.get_scale() == 512.0 and model.skips_in_all == 1


def test_what_overflows_in_a_frozen_encoder_holds_nothing_up(tmp_path):
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    model = make(tmp_path, freeze_encoder_epochs=1)
    model.net.encoder.after_norm.weight.register_hook(lambda grad: grad.fill_(torch.inf))
    _, states = fit(model, batches(2), plugins=MixedPrecision("16-mixed", "cpu", scaler))
    assert scaler.get_scale() == 1024.0 and not same(states[0][1], states[1][1])


def test_an_infinite_gradient_without_an_infinite_loss_is_skipped_too(tmp_path):
    model = make(tmp_path)
    parameter = model.net.ctc.weight
    calls = []
    parameter.register_hook(
        lambda grad: (calls.append(1), grad.fill_(torch.inf) if len(calls) == 2 else grad)[1]
    )
    _, states = fit(model, batches(3))
    assert same(states[0][1], states[1][1]) and not same(states[1][1], states[2][1])
    assert skipped(tmp_path)[0]["rows_with_nonfinite_loss"] == []


def test_the_norm_of_the_gradient_before_is_logged_where_there_was_one():
    for count in (1, 2):
        trainer, _ = fit(make(), batches(count), log_every_n_steps=1)
        logged = trainer.callback_metrics.get("grad_norm")
        assert logged is None if count == 1 else logged > 0


def test_training_stops_with_one_line_after_max_skips_in_a_row(tmp_path):
    with pytest.raises(UserError, match="3 updates in a row"):
        fit(make(tmp_path, max_skips=3), batches(8, poison=range(2, 8)))
    assert len(skipped(tmp_path)) == 3
    model = make(tmp_path, max_skips=3)
    fit(model, batches(8, poison=[1, 2, 4, 5, 7]))  # five skips, never three in a row
    assert model.skips_in_all == 5


def test_a_label_too_long_for_its_frames_trains_on_with_finite_weights(tmp_path):
    """As in WeNet such a row adds nothing to the CTC loss; it is no reason to skip."""
    model = make(tmp_path)
    batch = next(batches(1, frames=30))  # 6 encoder frames
    batch = batch._replace(labels=torch.randint(4, 12, (2, 9)), label_lengths=torch.tensor([9, 3]))
    _, states = fit(model, [batch] * 3)
    assert not skipped(tmp_path) and not same(states[0][1], states[1][1])
    assert all(p.isfinite().all() for p in model.parameters())


class RankLoader(L.LightningDataModule):
    def __init__(self, poisoned_rank):
        super().__init__()
        self.poisoned_rank = poisoned_rank

    def train_dataloader(self):
        rank = self.trainer.global_rank
        return DataLoader(
            list(
                batches(4, poison=[2] if rank == self.poisoned_rank else [], first_row=100 * rank)
            ),
            batch_size=None,
        )


class KeepWeights(L.Callback):
    def __init__(self, folder):
        self.folder = folder

    def on_train_end(self, trainer, module):
        torch.save(
            {
                "weights": module.state_dict(),
                "updates": trainer.lr_scheduler_configs[0].scheduler.last_epoch,
                "skips": module.skips_in_all,
            },
            f"{self.folder}/rank{trainer.global_rank}.pt",
        )


def test_two_processes_skip_together_when_one_of_them_is_poisoned(tmp_path):
    trainer = L.Trainer(
        max_epochs=1,
        accelerator="cpu",
        devices=2,
        strategy="ddp_fork",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[KeepWeights(str(tmp_path))],
        use_distributed_sampler=False,
    )
    trainer.fit(make(tmp_path), RankLoader(poisoned_rank=1))
    left, right = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in (0, 1))
    assert left["updates"] == right["updates"] == 3 and left["skips"] == right["skips"] == 1
    assert all(
        torch.equal(left["weights"][name], right["weights"][name]) for name in left["weights"]
    )
    assert all(value.isfinite().all() for value in left["weights"].values())
    assert skipped(tmp_path) == [
        {"step": 2, "epoch": 0, "rows": [4, 5, 104, 105], "rows_with_nonfinite_loss": [105]}
    ]


def test_the_checkpoint_is_plain_data_and_gives_the_same_model_back(tmp_path):
    model = make()
    trainer, _ = fit(model, batches(2))
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    # load_checkpoint unpickles with weights_only=True.
    loaded, tokenizer, frontend = load_checkpoint(str(tmp_path / "a.ckpt"))
    assert all(
        torch.equal(value, model.state_dict()[name]) for name, value in loaded.state_dict().items()
    )
    assert (
        not loaded.training
        and tokenizer.to_dict() == TOKENIZER.to_dict()
        and frontend == Frontend()
    )
    batch = next(batches(1))
    for_few_rows(model)  # stores the weights as load_checkpoint does: the products are bit-equal
    for mode in MODES:
        ours = model.eval().decode(batch.features, batch.feature_lengths, mode, beam_size=3)
        theirs = loaded.decode(batch.features, batch.feature_lengths, mode, beam_size=3)
        assert ours == theirs and len(ours) == 2
    chunked, whole = (
        loaded.decode(
            batch.features,
            batch.feature_lengths,
            "ctc_prefix_beam_search",
            beam_size=3,
            chunk_size=chunk,
        )
        for chunk in (2, -1)
    )
    assert chunked[0].score != whole[0].score


# The encoder alone knows of chunks, and joint search hears all that comes from the encoder.
@pytest.mark.parametrize(
    "mode, chunk_size, left_chunks",
    [*((mode, -1, -1) for mode in MODES), ("joint", 4, -1), ("joint", 4, 1)],
)
def test_what_is_heard_depends_neither_on_neighbours_nor_on_padding(mode, chunk_size, left_chunks):
    model = make().double().eval()
    with torch.no_grad():
        for decoder in (model.net.decoder, model.net.right_decoder):
            # The decoders are then sure of what they say, and hardly ever of its end.
            decoder.output_layer.weight.mul_(30)
    frames = torch.tensor([120, 75, 60, 20, 8, 3])  # encoder frames: 29, 18, 14, 4, 1, none
    features = torch.randn(
        6, 120, 80, generator=torch.Generator().manual_seed(1), dtype=torch.float64
    )
    hear = partial(
        model.decode, mode=mode, beam_size=4, chunk_size=chunk_size, left_chunks=left_chunks
    )
    together = hear(features, frames)
    shuffled = hear(
        torch.nn.functional.pad(features, (0, 0, 0, 33), value=7.0).flip(0), frames.flip(0)
    )[::-1]
    for row, length in enumerate(frames.tolist()):
        (alone,) = hear(features[row : row + 1, :length], frames[row : row + 1])
        for other in (together[row], shuffled[row]):
            assert (other.nbest, other.nbest_times) == (alone.nbest, alone.nbest_times)
            assert other.nbest_scores == pytest.approx(alone.nbest_scores, rel=1e-6, abs=1e-6)
    if mode == "attention":
        ends = {len(hypothesis.tokens) for hypothesis in together}
        assert ends >= {29, 18, 14, 0}  # each ended at its own length


def test_drawn_chunks_are_full_context_half_of_the_time_and_otherwise_at_most_25():
    torch.manual_seed(0)
    draws = [draw_chunk(200, TWO_BLOCKS)[0] for _ in range(2000)]
    assert 0.45 < sum(chunk == -1 for chunk in draws) / len(draws) < 0.55
    assert set(draws) - {-1} == set(range(1, 26))
    lefts = [
        draw_chunk(200, dataclasses.replace(TWO_BLOCKS, use_dynamic_left_chunk=True))
        for _ in range(500)
    ]
    assert all(
        left == -1 if chunk == -1 else 0 <= left < max(199 // chunk, 1) for chunk, left in lefts
    )
    assert draw_chunk(200, dataclasses.replace(TWO_BLOCKS, use_dynamic_chunk=False)) == (-1, -1)


def test_decode_names_the_options_of_a_search_where_it_does_not_know_one():
    batch, model = next(batches(1)), make().eval()
    with pytest.raises(TypeError, match="decode takes no 'beam'.* beam_size, chunk_size,"):
        model.decode(batch.features, batch.feature_lengths, "attention", beam=3)
    with pytest.raises(UserError, match="--beam_size 0: it must lie"):
        model.decode(batch.features, batch.feature_lengths, "attention", beam_size=0)


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"\x80\x02.", None])
def test_a_file_that_is_not_our_checkpoint_is_refused_in_one_line(tmp_path, content):
    path = tmp_path / "x.ckpt"
    if content is None:
        torch.save({"model": {"w": torch.zeros(1)}}, path)
    else:
        path.write_bytes(content)
    with pytest.raises(UserError, match="x.ckpt.*not a checkpoint of lightning-U2"):
        load_checkpoint(str(path))
    with pytest.raises(UserError, match="no such checkpoint"):
        load_checkpoint(str(tmp_path / "missing.ckpt"))


def test_validation_counts_errors_over_the_whole_set_at_full_context_and_chunk_16(tmp_path):
    model = make()
    trainer = L.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False
    )
    loader = DataLoader(list(batches(3)), batch_size=None)
    (metrics,) = trainer.validate(model, loader, verbose=False)
    expected = "val_loss val_cer val_wer val_cer_chunk16 val_wer_chunk16 val_cer_mean"
    assert set(metrics) == set(expected.split()) and all(value >= 0 for value in metrics.values())
    errors = letters = 0
    model.eval()
    for batch in batches(3):
        for labels, hypothesis in zip(
            batch.labels, model.decode(batch.features, batch.feature_lengths, "ctc_greedy_search")
        ):
            errors += distance(
                TOKENIZER.decode(labels.tolist()), TOKENIZER.decode(hypothesis.tokens)
            )
            letters += len(TOKENIZER.decode(labels.tolist()))
    assert metrics["val_cer"] == pytest.approx(errors / letters)


class Trap:
    """Pickled, it is a call that makes the file `path`."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


TRAPS = {
    "as a zip file": lambda trap, parts, path: torch.save(trap, path),
    "in the state_dict": lambda trap, parts, path: torch.save(
        {**parts, "state_dict": parts["state_dict"] | {"x": trap}}, path
    ),
    "in a legacy file": lambda trap, parts, path: torch.save(
        {**parts, "x": trap}, path, _use_new_zipfile_serialization=False
    ),
    "as a plain pickle": lambda trap, parts, path: path.write_bytes(
        pickle.dumps({**parts, "tokenizer": trap}, protocol=2)
    ),
}


@pytest.mark.parametrize("hide", TRAPS.values(), ids=TRAPS)
def test_a_checkpoint_with_code_in_it_runs_none_of_it_and_is_refused_in_one_line(
    hide, tmp_path, monkeypatch, capsys
):
    sprung, path = tmp_path / "sprung", tmp_path / "final.pt"
    checkpoint = {
        "state_dict": make().state_dict(),
        "model_options": {},
        "optim_options": {},
        "frontend": {},
        "tokenizer": {},
    }
    hide(Trap(sprung), checkpoint, path)
    shutil.copy(path, tmp_path / "x.ckpt")
    for load in (read_checked, load_checkpoint, load_tokenizer):
        with pytest.raises(UserError, match=r"x\.ckpt"):
            load(str(tmp_path / "x.ckpt"))
    (tmp_path / "train.yaml").write_text("encoder: conformer")
    for command, argv in (
        (score, ["--checkpoint", str(tmp_path / "x.ckpt")]),
        (wenet_import, [str(tmp_path), "--out", str(tmp_path / "y.ckpt")]),
    ):
        monkeypatch.setattr("sys.argv", [command.__name__, *argv])
        with pytest.raises(SystemExit) as exit:
            run(command.main)
        out, err = capsys.readouterr()
        assert (
            exit.value.code == 2
            and out == ""
            and err.count("\n") == 1
            and "(UnpicklingError)" in err
        )
    assert not sprung.exists()
    pickle.loads(path.read_bytes()) if hide is TRAPS["as a plain pickle"] else torch.load(
        path, weights_only=False
    )
    assert sprung.exists()  # the trap was set


ASKED = ("weights_only", "ckpt_path", "allow_pickle")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_nothing_unpickles(path):
    """torch.load and Lightning's ckpt_path read weights only; no other reader could run code."""
    for call in (
        node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)
    ):
        name = ast.unparse(call.func)
        given = {word.arg: ast.unparse(word.value) for word in call.keywords if word.arg in ASKED}
        assert name != "torch.load" or path.name == "checkpoint.py", (
            f"{path.name}:{call.lineno}: checkpoint.read_weights_only is for that"
        )
        if name == "torch.load" or "ckpt_path" in given:
            assert given.get("weights_only") == "True", f"{path.name}:{call.lineno}"
        assert given.get("allow_pickle", "False") == "False", f"{path.name}:{call.lineno}"
        unsafe = r"(pickle|marshal|shelve|yaml|torch\.hub|torch\.jit)\.(?!safe_)\w*(load|open)\w*"
        unsafe += r"|.*\.load_from_checkpoint|exec"
        assert not re.fullmatch(unsafe, name), f"{path.name}:{call.lineno}: {name}"
