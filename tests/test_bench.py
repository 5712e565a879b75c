"""Every command of tools.bench prints its figures, here at tiny sizes; and padding is little."""

import contextlib
import io
import json
import math
import pickle
import sys

from cli import UserError

import numpy as np
import pytest
import torch

from helpers import SIZES
from presets import PRESETS
from sampler import LengthGroupedSampler, ShapedSampler
from tools import bench, workloads

TINY = ["--preset", "tiny", "--seconds", "0", "--json"]


def numbers(entry):
    for value in entry.values():
        if isinstance(value, dict):
            yield from numbers(value)
        else:
            yield from value if isinstance(value, list) else [value]


def last_line(capsys, *argv):
    bench.main([*map(str, argv), *TINY])
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert all(math.isfinite(value) and value >= 0 for value in numbers(found) if value is not None)
    return found


def in_this_process(work, *arguments):
    """Stands for bench.in_fresh_process, which imports torch for seconds."""
    work, arguments = pickle.loads(pickle.dumps((work, arguments)))
    return work(*arguments)


@pytest.fixture
def small(monkeypatch):
    """Makes every measurement small, and the model, so that no test waits."""
    monkeypatch.setitem(PRESETS, "tiny", {**PRESETS["tiny"], **SIZES, "num_blocks": 4})
    for name, value in {"GEMM": 64, "WARM_UP": 1, "ROUNDS": 2}.items():
        monkeypatch.setattr(bench, name, value)
    for name, value in {
        "UTTERANCES": 2,
        "SAMPLES": 16_720,
        "ENCODER_FRAMES": 25,
        "PIECES": 50,
        "SPIKES": 4,
        "LOADER_ROWS": 20,
        "FRAMES": 300,
        "ROWS": 2,
        "VOCABULARY": 50,
    }.items():
        monkeypatch.setattr(workloads, name, value)


def test_data_makes_a_corpus_once_and_measures_it(tmp_path, capsys, small, monkeypatch):
    monkeypatch.setattr(bench, "in_fresh_process", in_this_process)
    argv = ["data", "--data_root", str(tmp_path / "corpus"), "--rows", "2010"]
    found = last_line(capsys, *argv)
    assert set(found) == {
        "rows",
        "setup_s",
        "setup_anon_mb",
        "plan_s",
        "padding_waste",
        "megabatch",
        "shapes",
        "shapes_padding_waste",
        "loader_x_realtime",
    }
    assert found["rows"] == 2010
    assert found["megabatch"] <= 100
    # 1,998 rows are about 48 batches of 400 s: 7 or 8 cells, which so few rows pad a good deal.
    assert 12 <= found["shapes"] <= 24 and found["shapes_padding_waste"] < 0.15
    assert sorted(tmp_path.iterdir()) == [tmp_path / "corpus"]
    with pytest.raises(UserError, match="has 2010 rows, not 2000"):
        bench.main([*argv[:-1], "2000", *TINY])


def train_without_datasets():
    """Returns what a process prints in which nobody has imported datasets, nor can."""
    assert "datasets" not in sys.modules
    sys.modules["datasets"] = None
    bench.GEMM = 64
    bench.WARM_UP = bench.ROUNDS = 1
    workloads.ROWS = 2
    with contextlib.redirect_stdout(io.StringIO()) as said:
        bench.main(["train", "--frames", "100", *TINY])
    return said.getvalue()


def test_train_runs_in_a_fresh_process_without_datasets():
    """Unpickling the function imports what is imported above, the benchmark among it."""
    found = json.loads(bench.in_fresh_process(train_without_datasets).splitlines()[-1])
    assert set(found) == {
        "gemm_gflops",
        "linear_gflops",
        "step_s",
        "share",
        "audio_hours",
        "peak_mb",
    }
    assert found.pop("share") is None  # the work of `share` is base's
    assert all(value > 0 for value in found.values())


def test_train_takes_other_lengths_precisions_and_ways_to_run_the_encoder(
    capsys, small, monkeypatch
):
    ways = []
    monkeypatch.setattr(
        workloads.U2Conformer,
        "loss",
        lambda net, *_: (
            ways.append((net.encoder.gradient_checkpointing, torch.is_autocast_enabled("cpu")))
            or {"loss": torch.zeros((), requires_grad=True)}
        ),
    )
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda block, dynamic, options: ways.append(dynamic)
    )
    found = last_line(
        capsys,
        "train",
        "--frames",
        "60",
        "--gradient_checkpointing",
        "--compile",
        "--precision",
        "bf16-mixed",
    )
    assert ways[:2] == [True, True] and set(ways[4:]) == {(True, True)}
    assert found["audio_hours"] == pytest.approx(workloads.ROWS * 0.6 / found["step_s"])
    with pytest.raises(UserError, match="--frames 49: it must lie within 50 .. "):
        last_line(capsys, "train", "--frames", "49")


def test_decode(capsys, small):
    assert set(last_line(capsys, "decode")) == {
        "prefix_beam_ms_batch16",
        "prefix_beam_ms_single",
        "prefix_beam_flat_ms_batch16",
        "prefix_beam_flat_ms_single",
        "greedy_ms",
        "rescoring_ms",
        "rtf",
        "host_s_per_hour",
    }


def test_stream(capsys, small):
    found = last_line(capsys, "stream")
    assert set(found) == {"chunk_ms", "rtf"} and set(found["chunk_ms"]) == {"4/4", "8/4", "16/4"}


def test_growth_measures_rising_sizes_and_draws_them(tmp_path, capsys, small, monkeypatch):
    monkeypatch.setattr(bench, "in_fresh_process", in_this_process)  # nine imports of torch less
    png, corpus = tmp_path / "growth.png", tmp_path / "corpus"
    found = last_line(
        capsys, "growth", "--png", png, "--data_root", corpus, "--rows", "1600", "--hours", "0.02"
    )
    assert list(found["setup"]) == ["100", "200", "400", "800", "1600"]
    assert len(found["stream 4 left"]) == 12
    assert list(found["length"]) == ["2 x 50", "2 x 100", "2 x 200", "2 x 400", "2 x 800"]
    assert png.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(UserError, match="corpus has fewer than 2001 rows"):
        last_line(capsys, "growth", "--data_root", corpus, "--rows", "2001")


@pytest.mark.parametrize(
    "what, flag", [("train", "--rows"), ("stream", "--data_root"), ("data", "--png")]
)
def test_flags_of_one_measurement_are_refused_at_others(what, flag):
    with pytest.raises(UserError, match=f"{flag} is not for `{what}`"):
        bench.main([what, flag, "200"])


def test_the_table_shows_what_json_has():
    table = bench.as_table(
        {
            "rows": 620_000,
            "share": None,
            "chunk_ms": {"16/4": 1.5},
            "batch": {"1 x 600": [0.5, 160]},
        }
    )
    assert [line.split() for line in table.splitlines()] == [
        ["rows", "620,000"],
        ["share", "-"],
        ["chunk_ms", "16/4", "1.5"],
        ["batch", "1", "x", "600", "0.5", "160"],
    ]


@pytest.mark.parametrize("seed", range(3))
def test_large_corpora_are_padded_little(seed):
    """Hugging Face's Trainer pads these lengths by 3.6 %."""
    rng = np.random.default_rng(seed)
    lengths = (workloads.utterance_seconds(rng, 100_000) * workloads.RATE).astype(np.int64)
    sampler = LengthGroupedSampler(lengths=lengths, batch_size=workloads.BATCH, seed=seed)
    assert workloads.padding_waste(lengths, sampler.plan(1)) < 0.015


@pytest.mark.parametrize("rows", [20_000, 200_000])
def test_few_shapes_cost_little_padding_on_large_corpora(rows):
    seconds = workloads.utterance_seconds(np.random.default_rng(0), rows)
    frames = np.stack([seconds * 100 / speed for speed in (0.9, 1.0, 1.1)]).astype(np.int64)
    labels = (seconds * workloads.LABELS_A_SECOND).astype(np.int64)
    plan = ShapedSampler(frames=frames, labels=labels, grid=(6, 32), max_batch=40_000)
    one, two = ([(len(b.keys), b.frames, b.labels) for b in plan.batches(i)] for i in (0, 1))
    assert sorted(one) == sorted(two) and len(set(one)) <= 64
    _, rows, speeds = np.array([key for batch in plan.batches(0) for key in batch.keys]).T
    padded = sum(rows * frames for rows, frames, _ in one)
    # Batches by length are padded by 1 %, and by 10 % where the speeds of their rows differ.
    assert 1 - frames[speeds, rows].sum() / padded < 0.04
