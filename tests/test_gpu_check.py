"""tools/gpu_check.py on a CPU: every check that can run there does, in small, and so does the rest.

What needs a card is replaced, or its command line is parsed at least.
"""

import contextlib
import io
import json
import math
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

from cli import UserError

import pytest
import torch
from torch.autograd import DeviceType

import train
from datamodule import audio_lengths, get_concat_dataset
from helpers import ROOT, SIZES, TINY_FLAGS, module, one_line
from recovery import MemoryCheck
from tokenizer import load_tokenizer
from tools import gpu_check, gpu_work
from tools.gpu_check import CHECKS, Check, Limit

BY_NAME = {check.name: check for check in CHECKS}
BASE = " ".join(["--num_workers 0 --few_shapes on", *TINY_FLAGS])  # as it is on a GPU
SMALL = f"{BASE} --batch_size 2"


@pytest.fixture(scope="module")
def small():
    """Makes everything small, so that no test waits."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "HOUR_ROWS": 4,
            "LINKS": 2,
            "SECONDS": 1.5,
            "SMALL_ROWS": 6,
            "SMALL_SECONDS": 1.2,
            "FEW": 6,
            "PRESET": "small enough",
            "PRESETS": {"small enough": SIZES},
            "LABELS": 3,
            "VOCABULARY": 50,
            "SHAPE": (2, 60),
            "OTHER_SHAPES": ((1, 70),),
            "TIMES": 2,
            "BASE": BASE,
            "SMALL": SMALL,
            "EPOCHS": 2,
            "UPDATES": 3,
            "PROFILED": (0, 2),
        }.items():
            patch.setattr(gpu_work, name, value)
        yield


@pytest.fixture(scope="module")
def folder(small, tmp_path_factory):
    folder = tmp_path_factory.mktemp("gpu_check")
    gpu_work.make_corpora(folder)
    return folder


# ---- Corpora


def test_a_shard_that_comes_often_is_on_the_disk_once(folder):
    train = folder / "base" / "train"
    first, again = (os.stat(train / shard / "data-00000-of-00001.arrow") for shard in "01")
    assert first.st_ino == again.st_ino and first.st_nlink == 3  # two in train, one in hour
    assert not (train / "0").samefile(train / "1")
    dataset = get_concat_dataset([str(folder / "base")], "train")
    assert len(dataset) == 2 * 4 + 2
    hour = get_concat_dataset([str(folder / "base")], "hour")
    assert audio_lengths(hour).sum() == pytest.approx(4 * 1.5 * 16000, abs=4)
    assert len(list((folder / "wavs").iterdir())) == len(hour)
    tokenizer = load_tokenizer(str(folder / "base" / "tokenizer.json"))
    assert tokenizer.vocab_size == gpu_work.VOCABULARY


def test_the_corpus_is_like_read_speech():
    table = gpu_work.made_rows(200, 7.5)
    seconds = table.column("length").to_numpy() / 16000
    labels = len(table.column("labels").combine_chunks().field("input_ids").flatten())
    assert seconds.mean() == pytest.approx(7.5, abs=0.01)
    assert seconds.std() > 0.4 * seconds.mean()
    assert labels / seconds.sum() == pytest.approx(2.8, rel=0.03)


# ---- Work that a CPU can do as well


def judged(name: str, figures: dict, fast=False) -> list[str]:
    """The figures of a check that miss their limits."""
    assert "graphs" not in figures or figures["graphs"] == 0  # there are none on a CPU
    missed = gpu_check.judge(BY_NAME[name], figures, fast)["missed"]
    return [figure for figure in missed if figure != "graphs"]


def test_a_row_of_nan_is_named_and_the_weights_stay_finite(folder):
    figures = gpu_work.check_nan(folder, "cpu")
    assert figures["named"] == 2 and not judged("nan", figures)


def test_equal_trainings_have_equal_losses(folder):
    figures = gpu_work.check_losses(folder, "cpu")
    assert figures["updates"] == 3 and figures["largest_difference"] == 0
    assert not judged("losses", figures)


def test_a_training_is_timed_by_epochs(folder):
    more = "--max_batch_seconds 4"
    began = time.perf_counter()
    figures = gpu_work.check_train(folder, "cpu", more)
    seconds = time.perf_counter() - began
    # The epoch took less than the whole check, and its audio is 10 rows of 1.5 s.
    assert math.isfinite(figures["first_epoch_x"]) and figures["first_epoch_x"] > 15 / seconds
    assert "second_epoch_x" in figures and 1 <= figures["shapes"] <= 10
    assert not judged("train_400", figures)
    assert not list(folder.glob("tmp*"))  # the run is removed


def test_a_small_training_counts_updates(folder):
    figures = gpu_work.check_small(folder, "cpu")
    assert figures["updates_a_second"] > 0 and not judged("small", figures)


def test_a_step_draws_dropout_anew(folder):
    figures = gpu_work.check_step(folder, "cpu")
    assert figures["dropout_differs"] > 1e-6 and figures["same_seed_differs"] == 0
    assert figures["graph_ms"] > 0 and not judged("step", figures)


def test_compiling_is_timed_in_two_processes(small, monkeypatch):
    monkeypatch.setattr("conformer.Encoder.compile_blocks", lambda encoder: None)
    monkeypatch.setattr(gpu_work, "in_fresh_process", lambda work, device: work(device))
    figures = gpu_work.check_compiled(None, "cpu")
    assert figures["recompiled"] == 0 < figures["compile_s"]
    assert figures["again_share"] == figures["again_s"] / figures["compile_s"]


@pytest.fixture
def here(monkeypatch):
    """Commands run within this process; the list holds their words."""
    ran = []

    def command(name, *words):
        ran.append([name, *words])
        with contextlib.redirect_stdout(io.StringIO()) as out:
            module(name.removesuffix(".py")).main(list(words))
        return SimpleNamespace(stdout=out.getvalue())

    monkeypatch.setattr(gpu_work, "command", command)
    return ran


def test_an_hour_is_transcribed_and_scored(folder, here):
    heard = gpu_work.check_transcribe(folder, "cpu")
    assert heard["files"] == 4
    # A random model hears about three tokens a second, neither none nor one in every frame.
    assert 1 < heard["characters_a_file"] < 20
    scored = gpu_work.check_score(folder, "cpu")
    assert 0 < scored["search_s"] < scored["seconds"]


def test_an4_is_trained_and_scored_with_graphs_and_without(folder, here):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu_work, "AN4", f"{SMALL} --ema_decay 0.5")
        patch.setattr(gpu_work, "AN4_SIZE", "--max_epochs 1")
        figures = gpu_work.check_an4(folder, "cpu", str(folder / "small"), "3")
    # A CPU has no graphs either time.
    assert (
        figures["graphs"] == 0 == figures["difference"]
        and figures["wer_graphs"] == figures["wer_plain"] > 0
    )
    assert [words[0] for words in here] == ["score.py"] * 2


def test_an4_has_the_recipe_of_the_makefile():
    recipe = re.search(r"^AN4 = (.*?[^\\])$", (ROOT / "Makefile").read_text(), re.M | re.S)[1]
    assert gpu_work.AN4.split() == recipe.replace("\\\n", "").split()


OOM = "CUDA out of memory. Tried to allocate 2 GiB"


def refusal() -> str:
    """What train.py says of a batch that is too large."""
    batch = SimpleNamespace(
        features=torch.zeros(9, 5, 80), labels=torch.zeros(9, 2), rows=torch.arange(9)
    )
    model = SimpleNamespace(
        keep_buffers=list, restore_buffers=list, device=torch.device("cpu"), names=[]
    )
    strategy = SimpleNamespace(batch_to_device=lambda batch: batch)
    plugin = SimpleNamespace(convert_input=lambda batch: batch)
    trainer = SimpleNamespace(strategy=strategy, precision_plugin=plugin)

    def run(*_):
        raise torch.OutOfMemoryError(OOM)

    return MemoryCheck().reason(trainer, model, run, batch, "lower it")


@pytest.mark.parametrize(
    "status, stderr, run, missed",
    [
        (2, "train.py: error: {refusal}\n", False, []),
        (2, "note: x\ntrain.py: error: {refusal}\n", True, ["updates"]),
        (2, "train.py: error: {refusal}\n" * 2, False, ["lines"]),
        (1, f"Traceback:\ntorch.OutOfMemoryError: {OOM}\n", False, ["refused"]),
        (0, "", True, ["refused", "updates"]),
    ],
)
def test_out_of_memory_must_be_one_line_before_the_first_update(
    small, tmp_path, monkeypatch, status, stderr, run, missed
):
    def command(name, *words, check):
        assert name == "train.py" and train.read_flags(list(words))["max_batch_seconds"] == 400
        if run:
            (tmp_path / "oom").mkdir()
            (tmp_path / "oom" / "run.json").touch()
        said = stderr.format(refusal=refusal())
        return subprocess.CompletedProcess(words, status, "", said)

    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (1000, 10**9))
    monkeypatch.setattr(gpu_work, "command", command)
    figures = gpu_work.check_oom(tmp_path, "cpu")
    assert judged("oom", figures) == missed
    assert figures["said"] in stderr.format(refusal=refusal())


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.name)
def test_train_takes_the_flags_of_every_check(check, tmp_path, monkeypatch):
    """On a GPU, too, where no check can run here."""

    class Parsed(Exception):
        pass

    def parse(argv):
        given = train.read_flags(argv)
        settings = train.Settings(*(train.build(kind, given) for kind in train.OPTIONS))
        train.check_run(settings.run, settings.optim.optimizer)
        assert given["accelerator"] == "gpu" and given["devices"] == "1"
        raise Parsed

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(train, "main", parse)
    if check.work in TRAININGS:
        with pytest.raises(Parsed):
            check.work(tmp_path, "cuda", *check.arguments)


TRAININGS = (
    gpu_work.check_train,
    gpu_work.check_small,
    gpu_work.check_nan,
    gpu_work.check_losses,
    gpu_work.check_waits,
    gpu_work.check_strategy,
)


def event(name, start, end, device=DeviceType.CPU):
    range = SimpleNamespace(start=start, end=end)
    return SimpleNamespace(name=name, time_range=range, device_type=device)


def test_waits_are_counted_within_the_steps_and_apart_from_ctc():
    events = [
        event("cudaStreamSynchronize", 5, 6),  # before
        event(gpu_work.STEPS, 10, 100),
        event(gpu_work.STEPS, 12, 110, DeviceType.CUDA),  # the same, as the GPU saw it
        event("cudaLaunchKernel", 11, 12),
        event("aten::item", 19, 23),
        event("cudaStreamSynchronize", 20, 22),
        event("aten::_ctc_loss", 30, 50),
        event("cudaStreamSynchronize", 31, 32),
        event("cudaStreamSynchronize", 41, 42),
        event("cudaMemcpyAsync", 45, 46),
        event("CtcLossBackward0", 60, 70),
        event("cudaDeviceSynchronize", 61, 62),
        event("cudaEventSynchronize", 80, 81),
        event("cudaMemcpy", 82, 83),
        event("cudaDeviceSynchronize", 105, 106),  # the profiler's own
    ]
    assert gpu_work.count_waits(events, 2) == {"waits_a_step": 1.5, "ctc_waits_a_step": 1.5}
    blind = [event(gpu_work.STEPS, 10, 100), event("aten::item", 19, 23)]
    assert judged("waits", gpu_work.count_waits(blind, 2)) == ["waits_a_step"]


def test_the_profiler_sees_the_steps_of_a_training(folder):
    """A pretended wait in each step is counted for each profiled step."""
    learn = train.U2.training_step

    def step(self, *arguments):
        with torch.profiler.record_function("cudaStreamSynchronize"):
            return learn(self, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train.U2, "training_step", step)
        figures = gpu_work.check_waits(folder, "cpu")
    assert figures["waits_a_step"] == 1 and figures["ctc_waits_a_step"] == 0
    assert not judged("waits", figures)


def test_kernels_are_compared_where_there_are_some(monkeypatch):
    fused = pytest.importorskip("fused")
    for other, passes in ((3e-7, True), (3e-4, False), (math.nan, False)):
        checks = [("one", lambda device: 1e-7), ("two", lambda device: torch.tensor(other))]
        monkeypatch.setattr(fused, "CHECKS", checks)
        figures = gpu_work.check_kernels(None, "cpu")
        assert figures["one"] == 1e-7
        assert judged("kernels", figures) == ([] if passes else ["largest_difference"])
    monkeypatch.setitem(sys.modules, "fused", None)
    assert "skipped" in gpu_work.check_kernels(None, "cpu")


# ---- Running


def run(checks, folder, code, monkeypatch, seconds=60.0):
    """Runs checks whose processes do nothing but `code`."""
    monkeypatch.setattr(gpu_check, "CHILD", f"import sys, os, time; folder = sys.argv[3]; {code}")
    ends = time.monotonic() + seconds
    return dict(gpu_check.run_group(checks, folder, "cpu", ends))


def check(name="one", seconds=60, work=gpu_work.check_step, **more):
    return Check(name, work, seconds, (Limit("figure", "<=", 3),), **more)


def test_a_check_has_its_figures_from_its_process(tmp_path, monkeypatch):
    code = (
        "import json, tools; "  # tools are there, because the process runs in the project
        "open(f'{folder}/{sys.argv[1]}.json', 'w').write(json.dumps({'words': sys.argv[2:]}))"
    )
    checks = [check("one", arguments=("x",)), check("two")]
    one, two = run(checks, tmp_path, code, monkeypatch).values()
    assert one["words"] == ["check_step", str(tmp_path), "cpu", "x"]
    assert two["words"] == ["check_step", str(tmp_path), "cpu"]


def test_a_check_that_crashes_fails_with_its_last_line_and_others_go_on(tmp_path, monkeypatch):
    code = "print('once'); sys.exit('CUDA error\\n' if sys.argv[1] == 'one' else 'other')"
    found = run([check("one"), check("two")], tmp_path, code, monkeypatch)
    assert [figures["error"] for figures in found.values()] == ["CUDA error", "other"]
    (killed,) = run([check()], tmp_path, "os.kill(os.getpid(), 9)", monkeypatch).values()
    assert killed == {"error": "ended with status -9"}


def test_a_check_that_hangs_is_ended_with_all_that_it_started(tmp_path, monkeypatch):
    code = (
        "child = os.fork(); "
        "open(f'{folder}/pid', 'a').write(f'{os.getpid()} '); "
        "os.write(1, b'at step 3\\n'); "  # print may write the end of the line by itself
        "time.sleep(600)"
    )
    began = time.monotonic()

    def late():
        """The time is over as soon as both processes have said where they are."""
        log = tmp_path / "one.log"
        while log.exists() and log.read_text().count("step") < 2:
            assert time.monotonic() < began + 60
            time.sleep(0.01)
        return began + 4 * log.exists()

    monkeypatch.setattr(gpu_check, "time", SimpleNamespace(monotonic=late))
    found = run([check(seconds=4)], tmp_path, code, monkeypatch)
    (figures,) = found.values()
    assert figures["error"] == "not done after 4 s, at: at step 3"
    pids = (tmp_path / "pid").read_text().split()
    assert len(pids) == 2
    for pid in map(int, pids):
        state = Path(f"/proc/{pid}/stat")
        deadline = time.monotonic() + 20
        while state.exists() and state.read_text().split()[2] != "Z":
            assert time.monotonic() < deadline
            time.sleep(0.01)


def test_checks_that_come_too_late_fail_without_a_start(tmp_path, monkeypatch):
    (figures,) = run([check()], tmp_path, "pass", monkeypatch, seconds=-1).values()
    assert "--minutes" in figures["error"] and not list(tmp_path.iterdir())


def test_the_line_of_a_child_runs_its_check(tmp_path, monkeypatch):
    def double(folder, device, argument):
        return {"figure": 2 * int(argument), "device": device}

    monkeypatch.setattr(gpu_work, "check_step", double)
    monkeypatch.setattr(sys, "argv", ["-c", "one", "check_step", str(tmp_path), "cpu", "4"])
    exec(gpu_check.CHILD)
    assert json.loads((tmp_path / "one.json").read_text()) == {"figure": 8, "device": "cpu"}


@pytest.mark.parametrize(
    "error, status, said",
    [
        (
            RuntimeError("CUDA error: illegal\nCompile with X"),
            1,
            "RuntimeError: CUDA error: illegal",
        ),
        (torch.OutOfMemoryError("CUDA out of memory.\nSee"), 0, None),
        (UserError("a batch does not fit the memory of cuda:0"), 0, None),
    ],
)
def test_a_child_tells_too_little_memory_from_other_errors(
    tmp_path, monkeypatch, capsys, error, status, said
):
    def fail(folder, device):
        raise error

    monkeypatch.setattr(gpu_work, "check_step", fail)
    with pytest.raises(SystemExit) if status else contextlib.nullcontext():
        gpu_check.child("one", "check_step", str(tmp_path), "cpu")
    if said:
        assert capsys.readouterr().out.splitlines()[-1] == said
    else:
        figures = json.loads((tmp_path / "one.json").read_text())
        # A small card cannot show it, a large one must.
        assert gpu_check.judge(check(), figures, fast=False)["ok"] is None
        assert gpu_check.judge(check(), figures, fast=True)["ok"] is False


# ---- Results


@pytest.mark.parametrize(
    "figures, fast, ok, limits",
    [
        ({"figure": 3, "speed": 9}, True, True, ["<= 3", ">= 9"]),
        ({"figure": 3, "speed": 8.9}, True, False, ["<= 3", ">= 9"]),
        ({"figure": 3, "speed": 8.9}, False, True, ["<= 3", "no limit for this card"]),
        ({"figure": 3.1, "speed": 9}, False, False, ["<= 3", "no limit for this card"]),
        ({"figure": math.nan, "speed": 9}, False, False, ["<= 3", "no limit for this card"]),
        ({"speed": 9}, False, False, ["<= 3", "no limit for this card"]),
        ({"error": "broken"}, True, False, []),
        ({"skipped": "none here"}, True, None, []),
    ],
)
def test_a_check_passes_where_all_figures_are_within_their_limits(figures, fast, ok, limits):
    both = Limit("figure", "<=", 3), Limit("speed", ">=", 9, fast=True)
    result = gpu_check.judge(Check("one", None, 1, both), figures, fast)
    assert result["ok"] is ok and list(result["limits"].values()) == limits


def test_the_table_has_a_row_for_each_figure_and_limit():
    result = {"name": "one", "ok": False, "ms": 41.26, "said": "a\nb", "missed": ["ms", "x"]}
    result["limits"] = {"ms": "<= 41", "x": "<= 1"}
    assert [line.split() for line in gpu_check.rows(result)] == [
        ["one", "fail", "ms", "41.26", "<=", "41,", "missed"],
        ["said", "a\\nb"],
        ["x", "not", "measured", "<=", "1,", "missed"],
    ]
    broken = gpu_check.judge(check(), {"error": "CUDA error: x"}, True)
    assert gpu_check.rows(broken)[0].split(maxsplit=2) == ["one", "fail", "CUDA error: x"]


@pytest.mark.parametrize("card, fast", [("NVIDIA H100 80GB HBM3", True), ("RTX 3090", False)])
def test_limits_of_speed_are_an_h100s(card, fast):
    assert gpu_check.is_fast(card) is fast


@pytest.fixture
def card(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "NVIDIA H100")
    monkeypatch.setattr(gpu_work, "make_corpora", lambda folder: None)


@pytest.mark.parametrize("fails", [False, True])
def test_the_last_line_is_one_object_and_the_status_says_whether_a_check_failed(
    card, capsys, monkeypatch, fails
):
    def group(checks, folder, device, ends):
        for check in checks:
            figures = {limit.figure: limit.value for limit in check.limits}
            yield check, {"error": "broken"} if fails and check.name == "score" else figures

    monkeypatch.setattr(gpu_check, "run_group", group)
    assert gpu_check.main(["--json"]) == fails
    *table, last = capsys.readouterr().out.splitlines()
    found = json.loads(last)
    assert found["card"] == "NVIDIA H100" and found["commit"] == train.commit()
    assert {"torch", "cuda", "seconds"} < found.keys()
    assert [each["name"] for each in found["checks"]] == [check.name for check in CHECKS]
    assert found["checks"][-1]["ok"] is not fails
    assert found["checks"][-2]["limits"]["seconds"] == "<= 10"
    assert f"{len(CHECKS) - fails} pass, {int(fails)} fail" in table[-1]
    assert table[-2].startswith("NVIDIA H100, torch ")


def test_checks_and_an4_can_be_chosen(card, monkeypatch):
    ran = []

    def run_checks(checks, *_):
        ran.append([(check.name, *check.arguments) for check in checks])
        return []

    monkeypatch.setattr(gpu_check, "run_checks", run_checks)
    gpu_check.main(["--only", "ddp", "score"])
    gpu_check.main(["--an4", "data/an4", "--seeds", "3", "5"])
    root = os.path.abspath("data/an4")
    assert ran == [[("ddp", "ddp"), ("score",)], [("an4_3", root, "3"), ("an4_5", root, "5")]]


@pytest.mark.parametrize("argv", [[], ["--seeds", "1"], ["--an4", "x", "--only", "score"]])
def test_wrong_use_is_one_line(argv, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError) as caught:
        gpu_check.main(argv)
    assert one_line(caught).endswith(("where one is", "--an4"))


def test_checks_that_time_nothing_run_together(tmp_path, card, monkeypatch):
    groups = []

    def group(checks, *_):
        groups.append([check.name for check in checks])
        yield from ((check, {"skipped": "here"}) for check in checks)

    monkeypatch.setattr(gpu_check, "run_group", group)
    gpu_check.run_checks(CHECKS, tmp_path, "cpu", math.inf, True)
    assert groups[0] == ["kernels", "nan", "losses", "waits", "ddp", "fsdp"]
    assert all(len(names) == 1 for names in groups[1:])
    assert sum(groups, []) == [check.name for check in CHECKS]
