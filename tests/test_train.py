"""train.py as a command: its outputs, resuming, and what it refuses. On noise: nothing is learnt here."""

import json

import datasets
import numpy as np
import pytest
import torch

import train
from cli import UserError
from tokenizer import save_tokenizer, train_char

SMALL = ("--output_size 16 --attention_heads 2 --linear_units 32 --num_blocks 1 --cnn_module_kernel 3 "
         "--decoder_num_blocks 1 --r_num_blocks 1 --decoder_linear_units 32 --num_workers 0 "
         "--warmup_steps 2 --accelerator cpu").split()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Eight training rows (four batches) and two dev rows of noise."""
    root = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    for split, count in (("train", 8), ("dev", 2)):
        rows = [rng.standard_normal(8000 + 700 * i).astype(np.float32) for i in range(count)]
        labels = [{"input_ids": rng.integers(4, 12, 3).astype(np.int32)} for _ in rows]
        datasets.Dataset.from_dict({"input_values": rows, "labels": labels}).save_to_disk(str(root / split / "0"))
    save_tokenizer(train_char(["abcdefgh"]), str(root / "tokenizer.json"))
    return root


def run(data, output, *words):
    batch = () if "--max_batch_seconds" in words else ("--batch_size", "2")
    train.main(["--data_root", str(data), "--output_dir", str(output), *SMALL, *batch, *map(str, words)])


def weights(path):
    checkpoint = torch.load(path, weights_only=True)
    optimizer = checkpoint["optimizer_states"][0]["state"]
    return [*checkpoint["state_dict"].values(), *(value for state in optimizer.values() for value in state.values())]


def same(left, right):
    return len(left) == len(right) and all(torch.equal(a, b) for a, b in zip(left, right))


def test_a_run_leaves_the_best_and_the_newest_checkpoint_and_its_record(data, tmp_path):
    run(data, tmp_path / "run", "--max_epochs", 2, "--seed", 3)
    newest = torch.load(tmp_path / "run" / "last.ckpt", weights_only=True)
    assert newest["global_step"] == 8 and (tmp_path / "run" / "best.ckpt").exists()
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["seed"] == 3 and record["options"]["output_size"] == 16 and record["metrics"]["steps"] == 8
    assert {"val_cer", "val_wer", "val_cer_chunk16", "val_wer_chunk16", "val_loss"} <= set(record["metrics"])


def test_a_run_that_ends_between_validations_still_leaves_both_checkpoints(data, tmp_path):
    run(data, tmp_path / "run", "--max_steps", 3)
    for name in ("best.ckpt", "last.ckpt"):
        assert torch.load(tmp_path / "run" / name, weights_only=True)["global_step"] == 3


@pytest.mark.parametrize("extra", [(), ("--ema_decay", 0.5), ("--max_batch_seconds", 1.5)], ids=["plain", "average", "seconds"])
def test_a_resumed_run_ends_where_the_unbroken_one_does(data, tmp_path, extra):
    run(data, tmp_path / "whole", "--max_epochs", 3, *extra)
    run(data, tmp_path / "broken", "--max_epochs", 3, *extra)
    whole = weights(tmp_path / "whole" / "last.ckpt")
    assert same(whole, weights(tmp_path / "broken" / "last.ckpt"))  # training itself is reproducible
    assert not same(whole, interrupted(data, tmp_path / "cut", 6, *extra))  # in the middle of the second epoch
    run(data, tmp_path / "cut", "--max_epochs", 3, "--checkpoint_every_n_steps", 2, "--resume", *extra)
    assert same(whole, weights(tmp_path / "cut" / "last.ckpt"))


def interrupted(data, output, step, *extra):
    """A run of three epochs that dies when `step` updates are done; last.ckpt is two updates old at most."""

    class Died(Exception):
        pass

    original = train.U2.on_train_batch_start

    def die(self, batch, batch_idx):
        if self.global_step == step:
            raise Died
        return original(self, batch, batch_idx)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train.U2, "on_train_batch_start", die)
        with pytest.raises(Died):
            run(data, output, "--max_epochs", 3, "--checkpoint_every_n_steps", 2, *extra)
    return weights(output / "last.ckpt")


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
    assert (output / "best.ckpt").read_text() == "precious"  # bad input overwrites nothing
    run(data, output, "--max_steps", 1, "--overwrite")
    assert torch.load(output / "best.ckpt", weights_only=True) and (output / "notes.txt").read_text() == "mine"


def test_resuming_with_other_options_is_refused_and_the_option_named(data, tmp_path):
    run(data, tmp_path / "run", "--max_steps", 1)
    with pytest.raises(UserError, match="num_blocks 1, not 2"):
        run(data, tmp_path / "run", "--resume", "--num_blocks", 2)


@pytest.mark.parametrize("words, reason", [
    (("--max_epochs", -1), "a run needs an end"), (("--output_size", 15), "--output_size 15"),
    (("--nonsense", 1), "unrecognized arguments"), (("--preset", "huge"), "invalid choice"),
    (("--strategy", "fsdp"), "--strategy fsdp"), (("--strategy", "nonsense"), "Lightning refuses"),
    (("--tokenizer", "none.json"), "none.json")], ids=str)
def test_options_that_cannot_work_are_refused_before_anything_is_written(data, tmp_path, words, reason):
    if words[1] == "fsdp" and torch.cuda.is_available():
        pytest.skip("FSDP is allowed where there is a GPU")
    with pytest.raises(UserError, match=reason):
        run(data, tmp_path / "run", *words)
    assert not (tmp_path / "run").exists()
