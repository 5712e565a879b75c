"""Does the work of the checks of tools/gpu_check.py, on noise: corpora, trainings, steps, commands.

A function check_NAME(folder, device, ...) returns figures by name. It runs in a process of its own
(tools/gpu_check.py says so), with the folder that make_corpora has filled.
"""

import contextlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

import numpy as np
import pytorch_lightning as L
import soundfile
import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

import train
from conformer import U2Conformer
from graphs import EAGER_STEPS, Graphs
from model import U2, OptimOptions, read_checked
from presets import PRESETS, ModelOptions
from tokenizer import SPECIALS, save_tokenizer, train_char
from tools.bench import in_fresh_process
from tools.workloads import RATE, offsets, utterance_seconds
from transforms import Frontend, extract

ROOT = Path(__file__).resolve().parent.parent

# A corpus.
HOUR_ROWS = 480  # of SECONDS each in the mean, together an hour
LINKS = 12  # the hour's shard is there so often, and half an hour more makes 6,000 rows
SECONDS = 7.5
SMALL_ROWS, SMALL_SECONDS = 948, 2.4  # as AN4 has them
FEW = 64  # rows where nothing is timed
POISON = 5  # the row of NaN
LABELS_A_SECOND = 2.8

# A step, and trainings.
PRESET, LABELS, VOCABULARY = "base", 28, 4233
SHAPE = 48, 1000  # rows and frames
OTHER_SHAPES = (40, 1200), (62, 776)  # nothing may be compiled again for them
TIMES = 20
BASE = "--preset base --precision bf16-mixed"
SMALL = "--preset small --batch_size 8"
AN4_SIZE = "--preset small --max_epochs 80 --check_val_every_n_epoch 4"
AN4 = (  # the Makefile's recipe
    "--batch_size 8 --optimizer muon --lr 4e-3 --warmup_steps 200 --ctc_weight 0.5 "
    "--ema_decay 0.99 --num_subs 0 --speeds 0.9 0.95 1.0 1.05 1.1 --tail_padding 300"
)
UPDATES = 20  # of which the losses are compared
EPOCHS = 3  # of a training that is timed
PROFILED = (5, 15)  # from this batch of an epoch to that one
STEPS = "the profiled steps"
ROOM = 5 * 2**29  # bytes that check_oom leaves: for weights and moments, but for no batch of 400 s


# ---- Corpora


def made_rows(rows: int, seconds: float, poison: int | None = None):
    """Makes a pyarrow Table with prepare.py's columns: noise of `seconds` in the mean."""
    import pyarrow as pa

    rng = np.random.default_rng(rows)
    drawn = utterance_seconds(rng, rows)
    lengths = (drawn * (seconds / drawn.mean()) * RATE).astype(np.int64)
    samples = offsets(lengths)
    audio = rng.standard_normal(samples[-1], np.float32) * np.float32(0.1)
    if poison is not None:
        audio[samples[poison] : samples[poison + 1]] = np.nan
    ends = offsets(np.maximum(lengths * LABELS_A_SECOND / RATE, 1).astype(np.int64))
    ids = rng.integers(len(SPECIALS), VOCABULARY, ends[-1], np.int32)
    labels = pa.ListArray.from_arrays(ends, ids)
    return pa.table(
        {
            "input_values": pa.ListArray.from_arrays(samples, audio),
            "labels": pa.StructArray.from_arrays([labels], ["input_ids"]),
            "length": lengths,
        }
    )


def write_shards(split: Path, *tables, links: int = 1) -> None:
    """Writes the tables as the shards of a split, the first `links` times, but once on the disk."""
    import datasets

    datasets.disable_progress_bars()
    for number, table in enumerate(tables):
        shard = split / str(number + (links - 1 if number else 0))
        datasets.Dataset(table).save_to_disk(str(shard))
    for number in range(1, links):
        shutil.copytree(split / "0", split / str(number), copy_function=os.link)


def make_corpora(folder: Path) -> None:
    """Writes the data roots base (with the split hour), small and poisoned, wavs/ and base.ckpt."""
    hour, dev = made_rows(HOUR_ROWS, SECONDS), made_rows(8, SMALL_SECONDS)
    tokenizer = train_char(["".join(map(chr, range(0x4E00, 0x4E00 + VOCABULARY - len(SPECIALS))))])
    rest = made_rows(HOUR_ROWS // 2, SECONDS)
    write_shards(folder / "base" / "train", hour, rest, links=LINKS)
    shutil.copytree(folder / "base/train/0", folder / "base/hour/0", copy_function=os.link)
    write_shards(folder / "small" / "train", made_rows(SMALL_ROWS, SMALL_SECONDS))
    write_shards(folder / "poisoned" / "train", made_rows(FEW, SMALL_SECONDS, POISON))
    for root in ("base", "small", "poisoned"):
        write_shards(folder / root / "dev", dev)
        save_tokenizer(tokenizer, str(folder / root / "tokenizer.json"))
    (folder / "wavs").mkdir()
    for row, audio in enumerate(hour.column("input_values").chunk(0)):
        soundfile.write(folder / "wavs" / f"{row:04}.wav", audio.values.to_numpy(), RATE)
    checkpoint = {"state_dict": (model := talkative(tokenizer)).state_dict()}
    model.on_save_checkpoint(checkpoint)
    torch.save(checkpoint, folder / "base.ckpt")


@torch.no_grad()
def talkative(tokenizer) -> U2:
    """Makes a U2 with random weights that hears a token in one frame of seven, else blanks.

    So the searches have the work that a trained model gives them.
    """
    torch.manual_seed(0)
    options = ModelOptions(**PRESETS[PRESET])
    model = U2(options=options, optim=OptimOptions(), frontend=Frontend(), tokenizer=tokenizer)
    features = extract(model.frontend)(torch.randn(10 * RATE) * 0.1)
    encoded, _ = model.eval().encode(features[None], torch.tensor([len(features)]))
    head, encoded = model.net.ctc, encoded[0]  # (T',D)
    head.bias.copy_(-head.weight @ encoded.mean(0))
    sharpness = 8 / head(encoded).std()
    head.weight.mul_(sharpness)
    head.bias.mul_(sharpness)
    blank, *tokens = head(encoded).split([1, tokenizer.vocab_size - 1], dim=1)
    head.bias[0] += (tokens[0].amax(1) - blank[:, 0]).quantile(6 / 7)
    return model


# ---- Trainings


class Watch(L.Callback):
    """Notes the seconds and shapes of every epoch, and what the profiler sees in `profiled`."""

    def __init__(self, profiled: int = -1):
        self.profiled = profiled
        self.profiler = None
        self.epoch_s, self.shapes = [], []
        self.graphs = 0

    def on_train_epoch_start(self, trainer, module):
        data = trainer.datamodule
        self.audio_s = float(data.lengths[data.kept].sum()) / RATE
        self.shapes.append(set())
        self.began = now(module.device.type)

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.shapes[-1].add((*batch.features.shape[:2], batch.labels.size(1)))
        if trainer.current_epoch != self.profiled:
            return
        if batch_idx == PROFILED[0]:
            cuda = [ProfilerActivity.CUDA] if module.device.type == "cuda" else []
            self.profiler = profile(activities=[ProfilerActivity.CPU, *cuda], acc_events=True)
            self.profiler.start()
            self.steps = record_function(STEPS).__enter__()
        if batch_idx == PROFILED[1]:
            self.steps.__exit__(None, None, None)
            self.profiler.stop()

    def on_train_epoch_end(self, trainer, module):
        self.epoch_s.append(now(module.device.type) - self.began)
        self.batches = trainer.num_training_batches
        self.graphs = len(module.graphs.made) if module.graphs else 0

    def figures(self) -> dict:
        """Returns how many shapes there were, how many came after the first epoch, and graphs."""
        shapes = set.union(*self.shapes)
        new = len(shapes - self.shapes[0])
        return {"shapes": len(shapes), "new_shapes": new, "graphs": self.graphs}


def now(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def flags(data_root, output, device: str, more: str) -> list[str]:
    """Returns the arguments of train.py."""
    on = "--accelerator cpu" if device == "cpu" else "--accelerator gpu --devices 1"
    return ["--data_root", str(data_root), "--output_dir", str(output), *f"{on} {more}".split()]


@contextlib.contextmanager
def training(folder: Path, device: str, root, more: str, profiled: int = -1):
    """Trains as train.py does -> the output folder, which is removed later, and a Watch.

    `root` is the data root, in `folder` or elsewhere.
    """
    watch = Watch(profiled)
    callbacks = train.make_callbacks
    with tempfile.TemporaryDirectory(dir=folder) as output:
        with mock.patch("train.make_callbacks", lambda *given: [*callbacks(*given), watch]):
            train.main(flags(folder / root, output, device, more))
        yield Path(output), watch


def updates_of(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "steps.jsonl").read_text().splitlines()]


def count_waits(events, steps: int) -> dict:
    """Counts how often in a step the CPU waits for the GPU: in CTC's loss, and elsewhere.

    CTC's kernel for GPUs copies its lengths there, and waits for each copy. `steps` are profiled,
    which an event STEPS spans. Without permission the profiler sees no call of CUDA.
    """
    events = [event for event in events if event.device_type == DeviceType.CPU]
    if not any(event.name.startswith("cuda") for event in events):
        return {"profiler": "it saw no call of CUDA"}
    span = next(event.time_range for event in events if event.name == STEPS)
    ctc = [event.time_range for event in events if "ctc" in event.name.lower()]
    waits = [
        event.time_range.start
        for event in events
        if (event.name.endswith("Synchronize") or event.name == "cudaMemcpy")
        and span.start <= event.time_range.start <= span.end
    ]
    within = sum(any(op.start <= wait <= op.end for op in ctc) for wait in waits)
    return {"waits_a_step": (len(waits) - within) / steps, "ctc_waits_a_step": within / steps}


def check_waits(folder: Path, device: str) -> dict:
    more = f"{SMALL} --precision bf16-mixed --ema_decay 0.995 --limit_rows {2 * FEW} --max_epochs 3"
    more += " --check_val_every_n_epoch 3"
    # By the third epoch every shape has its graph.
    with training(folder, device, "small", more, profiled=2) as (_, watch):
        waits = count_waits(watch.profiler.events(), PROFILED[1] - PROFILED[0])
    return waits | watch.figures()


def check_train(folder: Path, device: str, more: str) -> dict:
    more = f"{BASE} --max_epochs {EPOCHS} --check_val_every_n_epoch {EPOCHS} {more}"
    with training(folder, device, "base", more) as (_, watch):
        rates = [watch.audio_s / seconds for seconds in watch.epoch_s]
    figures = dict(zip(("first_epoch_x", "second_epoch_x", "third_epoch_x"), rates))
    # Graphs share memory: each needs little of its own beyond the gradients.
    reserved = torch.cuda.max_memory_reserved() >> 20 if device == "cuda" else 0
    return figures | watch.figures() | {"peak_mb": peak_mb(device), "reserved_mb": reserved}


def check_small(folder: Path, device: str) -> dict:
    more = f"{SMALL} --precision bf16-mixed --ema_decay 0.995 --max_epochs 6"
    with training(folder, device, "small", f"{more} --check_val_every_n_epoch 6") as (_, watch):
        rates = [watch.batches / seconds for seconds in watch.epoch_s]
    return {"updates_a_second": rates[-1], "first_epoch": rates[0], **watch.figures()}


def check_nan(folder: Path, device: str) -> dict:
    more = f"{SMALL} --precision 16-mixed --max_epochs 2"
    with training(folder, device, "poisoned", more) as (output, watch):
        skips = [json.loads(line) for line in (output / "skipped.jsonl").open()]
        named = sum(skip["rows_with_nonfinite_loss"] == [POISON] for skip in skips)
        weights = read_checked(str(output / "last.ckpt"))["state_dict"].values()
        bad = sum(not weight.isfinite().all() for weight in weights)
    return {"named": named, "others": len(skips) - named, "bad_weights": bad, **watch.figures()}


def check_losses(folder: Path, device: str) -> dict:
    more = f"{SMALL} --precision 32 --limit_rows {FEW} --max_epochs -1 --max_steps {UPDATES}"
    more += f" --check_val_every_n_epoch {UPDATES}"
    kinds = ["--no-tf32 --cuda_graphs off", "--no-tf32 --cuda_graphs on"]
    losses = []
    for words in kinds if device == "cuda" else ["", ""]:  # a CPU has neither
        with training(folder, device, "small", f"{more} {words}") as (output, watch):
            losses.append([update["loss"] for update in updates_of(output)])
    largest = max(abs(one - other) / one for one, other in zip(*losses, strict=True))
    return {"largest_difference": largest, "updates": len(losses[0]), **watch.figures()}


def check_strategy(folder: Path, device: str, strategy: str) -> dict:
    more = f"--preset tiny --batch_size 8 --limit_rows {FEW} --max_epochs -1 --max_steps 2"
    plain = " --gradient_clip_val 0" if strategy == "fsdp" else ""
    words = f"{more} --strategy {strategy}{plain}"
    with training(folder, device, "small", words) as (output, _):
        updates = updates_of(output)
    return {"updates": sum(u["loss"] is not None and not u.get("skipped") for u in updates)}


def check_an4(folder: Path, device: str, data_root: str, seed: str) -> dict:
    figures = {}
    for graphs in ("auto", "off"):
        more = f"{AN4_SIZE} {AN4} --precision bf16-mixed --seed {seed} --cuda_graphs {graphs}"
        with training(folder, device, data_root, more) as (output, watch):
            score = command("score.py", *checkpoint(output / "best.ckpt", data_root, "dev"))
        name = "graphs" if graphs == "auto" else "plain"
        figures[f"wer_{name}"] = json.loads(score.stdout.splitlines()[-1])["wer"]
        figures[f"train_s_{name}"] = sum(watch.epoch_s)
        figures["graphs"] = max(watch.graphs, figures.get("graphs", 0))
    figures["difference"] = abs(figures["wer_graphs"] - figures["wer_plain"])
    return figures


# ---- Steps, kernels and commands


def check_kernels(folder: Path, device: str) -> dict:
    try:
        import fused
    except ModuleNotFoundError:
        return {"skipped": "there is no Triton here, so torch's operations run"}
    found = {name: float(check(torch.device(device))) for name, check in fused.CHECKS}
    return found | {"largest_difference": fused.worst(list(found.values()))}


def made_batch(device: str, rows: int, frames: int):
    """Draws features (B,T,F), their lengths, labels (B,U), theirs; lengths stay on the CPU."""
    features = torch.randn(rows, frames, 80, device=device)
    labels = torch.randint(1, VOCABULARY - 1, (rows, LABELS), device=device)
    return features, torch.full((rows,), frames), labels, torch.full((rows,), LABELS)


def made_step(device: str, compiled: bool):
    """Makes a network -> a function that returns a batch's loss, one that learns, and Graphs."""
    torch.manual_seed(0)
    last = VOCABULARY - 1
    net = U2Conformer(ModelOptions(**PRESETS[PRESET]), 80, VOCABULARY, 0, last, last)
    net = net.to(device).train()
    if compiled:
        net.encoder.compile_blocks()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4, fused=True)

    def loss_of(batch, graphs):
        with torch.autocast(device, torch.bfloat16):
            return net.loss(*batch, but_ctc=graphs)["loss"]

    def learn(batch, graphs):
        loss_of(batch, graphs).backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 5.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return loss_of, learn, Graphs(net) if device == "cuda" else None


def milliseconds(device: str, work, times: int) -> float:
    """Returns the median of `times` calls, each timed until the GPU is done."""
    spent = []
    for _ in range(times):
        began = now(device)
        work()
        spent.append(1000 * (now(device) - began))
    return statistics.median(spent)


def peak_mb(device: str) -> int:
    return torch.cuda.max_memory_allocated() >> 20 if device == "cuda" else 0


def check_step(folder: Path, device: str) -> dict:
    loss_of, learn, graphs = made_step(device, compiled=False)
    batch = made_batch(device, *SHAPE)
    milliseconds(device, lambda: learn(batch, None), 3)
    eager = milliseconds(device, lambda: learn(batch, None), TIMES)
    milliseconds(device, lambda: learn(batch, graphs), EAGER_STEPS + 2)
    ms = milliseconds(device, lambda: learn(batch, graphs), TIMES)

    def loss(seed, graphs):
        torch.manual_seed(seed)
        return float(loss_of(batch, graphs).detach())

    one, other, again = (loss(seed, graphs) for seed in (1, 2, 1))
    return {
        "eager_ms": eager,
        "graph_ms": ms,
        "graphs": len(graphs.made) if graphs else 0,
        "peak_mb": peak_mb(device),
        "dropout_differs": abs(one - other) / one,
        "same_seed_differs": abs(one - again) / one,
        "eager_differs": abs(one - loss(1, None)) / one,
    }


def compiled_step(device: str) -> dict:
    """Times what compiling costs, in all and for other shapes, and a step as a graph."""
    _, learn, graphs = made_step(device, compiled=True)
    # A step without a graph as train.py makes it: with autocast's cache it would compile again.
    plain = graphs and graphs.plain
    batch, *others = [made_batch(device, *shape) for shape in (SHAPE, *OTHER_SHAPES)]
    first = milliseconds(device, lambda: learn(batch, plain), 1) / 1000
    codes = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    more = [milliseconds(device, lambda: learn(other, plain), 1) / 1000 for other in others]
    milliseconds(device, lambda: learn(batch, graphs), EAGER_STEPS + 2)
    ms = milliseconds(device, lambda: learn(batch, graphs), TIMES)
    codes = torch._dynamo.utils.counters["stats"]["unique_graphs"] - codes
    return {
        "compile_s": first + sum(more),
        "recompiled": codes,
        "graph_ms": ms,
        "peak_mb": peak_mb(device),
    }


def check_compiled(folder: Path, device: str) -> dict:
    """Compiles in two processes, of which the second finds what the first has written."""
    first, second = (in_fresh_process(compiled_step, device) for _ in range(2))
    again = second["compile_s"]
    return first | {"again_s": again, "again_share": again / first["compile_s"]}


def command(*words, check: bool = True) -> subprocess.CompletedProcess:
    """Runs a command of the project. Raises RuntimeError, with its last line, where it fails."""
    result = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True)
    if check and result.returncode:
        raise RuntimeError(f"{words[0]}: {last_line(result.stderr)}")
    return result


def check_oom(folder: Path, device: str) -> dict:
    free, _ = torch.cuda.mem_get_info()
    ballast = torch.empty(max(free - ROOM, 0), dtype=torch.uint8, device=device)
    words = flags(folder / "base", folder / "oom", device, f"{BASE} --max_batch_seconds 400")
    result = command("train.py", *words, check=False)
    del ballast
    errors = [line for line in result.stderr.splitlines() if "train.py: error:" in line]
    refused = result.returncode == 2 and "does not fit the memory" in "".join(errors)
    begun = (folder / "oom" / "run.json").exists() or (folder / "oom" / "steps.jsonl").exists()
    return {
        "refused": int(refused),
        "lines": len(errors),
        "updates": int(begun),
        "said": last_line(result.stderr),
    }


def checkpoint(path, data_root, split: str) -> list[str]:
    return ["--checkpoint", str(path), "--data_root", str(data_root), "--split", split]


def check_transcribe(folder: Path, device: str) -> dict:
    began = time.perf_counter()
    words = ["--checkpoint", str(folder / "base.ckpt"), str(folder / "wavs")]
    lines = command("transcribe.py", *words).stdout.splitlines()
    seconds = time.perf_counter() - began
    heard = sum(len(line.split("\t", 1)[1]) for line in lines)
    return {"seconds": seconds, "files": len(lines), "characters_a_file": heard / len(lines)}


def check_score(folder: Path, device: str) -> dict:
    began = time.perf_counter()
    words = checkpoint(folder / "base.ckpt", folder / "base", "hour")
    found = json.loads(command("score.py", *words).stdout.splitlines()[-1])
    seconds = time.perf_counter() - began
    return {"seconds": seconds, "search_s": found["rtf"] * HOUR_ROWS * SECONDS}


def last_line(text: str) -> str:
    """Returns the last line that is not empty, progress bars apart."""
    return next((line for line in reversed(text.splitlines()) if line.strip()), "")
