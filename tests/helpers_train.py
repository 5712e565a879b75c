"""What several test files share in order to run train.py: data, whole runs, and cut ones.

The data are noise, and the models are tiny: nothing is learnt.
"""

import multiprocessing
import os
import signal
import socket

import cli

import datasets
import numpy as np
import pytest

import train
from helpers import TINY_FLAGS, trusted
from tokenizer import save_tokenizer, train_char

ON_CPU = ["--num_workers", "0", "--accelerator", "cpu"]
SMALL = [*TINY_FLAGS, *ON_CPU, "--warmup_steps", "2"]


def make_data(root, train=8, dev=2, longer=700):
    """Writes `train` and `dev` rows of noise, each `longer` samples longer than the one before."""
    rng = np.random.default_rng(0)
    for split, count in (("train", train), ("dev", dev)):
        rows = [rng.standard_normal(8000 + longer * i).astype(np.float32) for i in range(count)]
        labels = [
            {"input_ids": rng.integers(4, 12, 1 + i % 3).astype(np.int32)} for i in range(count)
        ]
        datasets.Dataset.from_dict({"input_values": rows, "labels": labels}).save_to_disk(
            str(root / split / "0")
        )
    save_tokenizer(train_char(["abcdefgh"]), str(root / "tokenizer.json"))
    return root


def run(data, output, *words):
    """Trains a tiny model; two rows are a batch, unless `words` say seconds."""
    batch = () if "--max_batch_seconds" in words else ("--batch_size", "2")
    train.main(
        ["--data_root", str(data), "--output_dir", str(output), *SMALL, *batch, *map(str, words)]
    )


def fine_tune(data, output, source, *words):
    """Trains the model of the checkpoint `source` further, two rows a batch."""
    paths = ["--data_root", str(data), "--output_dir", str(output), "--init_from", str(source)]
    train.main([*paths, *ON_CPU, "--batch_size", "2", *map(str, words)])


def weights(path):
    """The tensors of a checkpoint: the weights and what the optimizer keeps of each."""
    checkpoint = trusted(path)
    optimizer = checkpoint["optimizer_states"][0]["state"]
    return [
        *checkpoint["state_dict"].values(),
        *(value for state in optimizer.values() for value in state.values()),
    ]


def interrupted(data, output, step, *extra, hook="on_train_batch_start"):
    """Trains three epochs, but dies in `hook` after `step` updates; returns the weights kept.

    last.ckpt is then two updates old at most.
    """

    class Died(Exception):
        pass

    original = getattr(train.U2, hook)

    def die(self, batch, batch_idx):
        if self.global_step == step:
            raise Died
        return original(self, batch, batch_idx)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train.U2, hook, die)
        with pytest.raises(Died):
            run(data, output, "--max_epochs", 3, "--checkpoint_every_n_steps", 2, *extra)
    return weights(output / "last.ckpt")


def signalled(number, hook, batch):
    """The model's `hook`, which at batch `batch` also sends signal `number` to its process.

    Batches are counted over epochs.
    """
    original = getattr(train.U2, hook)

    def step(self, *args):
        if self.trainer.fit_loop.total_batch_idx == batch:
            os.kill(os.getpid(), number)
        return original(self, *args)

    return step


def killed(data, output, batch, *words, hook="on_train_batch_start"):
    """Trains in another process, which kill -9 ends in `hook` at batch `batch`."""

    def body():
        setattr(train.U2, hook, signalled(signal.SIGKILL, hook, batch))
        run(data, output, *words)

    process = multiprocessing.get_context("fork").Process(target=body)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL


def ranks(data, output, *words, interrupt=None, count=2):
    """Trains in `count` processes, started as torchrun starts them; returns their exit statuses.

    `interrupt` is (rank, signal, hook, batch), as in `signalled`.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def body(rank):
        os.environ.update(
            TORCHELASTIC_RUN_ID="test",
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port),
            WORLD_SIZE=str(count),
            LOCAL_WORLD_SIZE=str(count),
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            GROUP_RANK="0",
        )
        if interrupt and interrupt[0] == rank:
            setattr(train.U2, interrupt[2], signalled(*interrupt[1:]))
        cli.run(lambda _: run(data, output, "--devices", count, "--strategy", "ddp", *words))

    processes = [
        multiprocessing.get_context("fork").Process(target=body, args=(rank,))
        for rank in range(count)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    waiting = [process for process in processes if process.is_alive()]
    for process in waiting:
        process.kill()
    assert not waiting
    return [process.exitcode for process in processes]
