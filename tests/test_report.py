"""tools/report.py: what the page shows is what the run saw and heard; data's text stays text."""

import base64
import csv
import dataclasses
import io
import re

import datasets
import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import train
from helpers import TINY, cases, distance, network, noise, one_line
from helpers_model import save_model, tiny_model
from helpers_train import run
from model import load_checkpoint
from tokenizer import save_tokenizer, train_char
from tools import report, report_plots
from tools.report_heard import (
    aligned,
    attention_maps,
    confidences,
    count_errors,
    hear,
    training_examples,
)
from transforms import Frontend

EVIL = "<script>alert(1)</script> $x_ & <b>y"
TEXTS = [EVIL, "one two", "two three four", "one"]
SECTIONS = ("Curves", "Augmentation", "CTC and attention", "Worst utterances", "Errors")


@pytest.fixture(scope="module", autouse=True)
def coarse_pictures():
    """Draws with few dots: how fine a picture is, is not tested, and packing it takes long."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report_plots, "DPI", 30)
        yield


@pytest.fixture(scope="module")
def tokenizer():
    return train_char(TEXTS)


@pytest.fixture(scope="module")
def root(tokenizer, tmp_path_factory):
    """Data with texts and speakers that are HTML."""
    root = tmp_path_factory.mktemp("report")
    rng = np.random.default_rng(0)
    for split in ("train", "dev"):
        rows = {
            "input_values": [
                rng.normal(0, 0.1, 40000 + 900 * i).astype(np.float32) for i in range(len(TEXTS))
            ],
            "labels": [{"input_ids": tokenizer.encode(text)} for text in TEXTS],
            "text": TEXTS,
            "speaker": ["<i>a", "b", "b", "c"],
        }
        datasets.Dataset.from_dict(rows).save_to_disk(str(root / split / "0"))
    save_tokenizer(tokenizer, str(root / "tokenizer.json"))
    return root


@pytest.fixture(scope="module")
def trained(root, tmp_path_factory):
    """(The folder of a run of twelve updates, what its batches were: {(epoch, row): features})."""
    folder = tmp_path_factory.mktemp("runs") / "<img src=x>"
    seen = {}
    original = train.U2.training_step

    def step(self, batch, number):
        views = len(batch.rows) // len(batch.rows.unique())
        for row, length, features in zip(batch.rows, batch.feature_lengths, batch.features):
            key = (self.current_epoch, int(row))
            seen.setdefault(key, []).append(features[:length].clone())
        assert views == 2
        return original(self, batch, number)

    words = ("--batch_size", 1, "--max_epochs", 3, "--check_val_every_n_epoch", 3, "--seed", 7)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train.U2, "training_step", step)
        run(root, folder, *words, "--cr_ctc_weight", 0.2, "--max_freq_mask", 9)
    return folder, seen


@pytest.fixture(scope="module")
def page(trained):
    """The report of the run, compared with itself."""
    folder, _ = trained
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "EXAMPLES", 2)
        report.main([str(folder), str(folder)])
    return (folder / "report.html").read_text()


def test_training_rows_are_shown_as_training_saw_them(root, trained):
    folder, seen = trained
    this = report.open_run(str(folder))
    model, *_ = load_checkpoint(this.checkpoint)
    data = report.data_of_run(this, (str(root),), model)
    for epoch in (0, 2):
        examples = list(training_examples(data, epoch, 6))
        assert sorted(example.row for example in examples) == [0, 1, 2, 3]
        for example in examples:
            views = seen[epoch, example.row]
            assert len(views) == 2 and all(map(torch.equal, example.features, views))
            assert not torch.equal(*example.features)


def test_text_from_data_and_names_of_files_are_escaped(page):
    for evil in ("<script", "<b>y", "<i>a", "<img src=x"):
        assert evil not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert "&lt;i&gt;a" in page and "&lt;img src=x&gt;" in page


def test_the_page_has_every_section_and_loads_nothing(page):
    for title in (*SECTIONS, "Confidence", "Skipped updates"):
        assert f">{title}</h2>" in page
    assert "None of 12 updates was skipped" in page
    sources = re.findall(r'src="([^"]*)"', page)
    assert sources and all(source.startswith("data:") for source in sources)
    assert "http:" not in page and "https:" not in page


def test_pictures_and_sounds_of_the_page_can_be_opened(page):
    found = re.findall(r'src="data:([a-z/]+);base64,([^"]+)"', page)
    files = [(kind, io.BytesIO(base64.b64decode(data))) for kind, data in found]
    assert {kind for kind, _ in files} == {"image/png", "audio/mpeg"}
    for kind, file in files:
        if kind == "image/png":
            Image.open(file).verify()
    lengths = [len(soundfile.read(file)[0]) for kind, file in files if kind == "audio/mpeg"]
    # Two rows of train before and after their change of speed, then the worst of dev.
    assert len(lengths) >= 5 and all(36_000 < length < 52_000 for length in lengths)


def test_tensorboard_gets_options_pace_gradients_and_what_was_heard(trained):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder, _ = trained
    events = EventAccumulator(str(folder / "logs"), {"scalars": 0, "images": 0, "tensors": 0})
    events.Reload()
    tags = events.Tags()
    for tag in ("grad_norm", "audio_seconds_per_second", "skipped_updates", "lr-AdamW", "val_cer"):
        assert tag in tags["scalars"]
    assert events.Scalars("grad_norm")[0].value > 0
    assert events.Scalars("audio_seconds_per_second")[0].value > 0
    assert events.Scalars("hp_metric")[-1].value > 0
    assert tags["images"] == ["dev_0", "dev_1", "dev_2"]
    assert "_hparams_/session_start_info" in events.summary_metadata


def test_csv_keeps_what_came_before_a_resume(root, tmp_path):
    run(root, tmp_path / "run", "--max_epochs", 1, "--logger", "csv")
    train.main(["--resume", str(tmp_path / "run"), "--max_epochs", "2"])
    files = sorted((tmp_path / "run" / "logs").glob("*/metrics.csv"))
    steps = [row["step"] for path in files for row in csv.DictReader(path.open()) if row["val_cer"]]
    assert steps == ["1", "3"]
    found = report.read_curves(str(tmp_path / "run"))
    assert [step for step, _ in found["val_cer"]] == [1, 3] and len(found["loss"]) == 4


def test_lines_that_are_damaged_or_still_being_written_are_passed_over(tmp_path):
    (tmp_path / "logs" / "v").mkdir(parents=True)
    (tmp_path / "steps.jsonl").write_text('{"step": 1, "loss": 1.5}\n{"loss": 2.5}\n{"step"')
    (tmp_path / "logs" / "v" / "metrics.csv").write_bytes(
        b"step,val_cer\n10,0.5\n20,0.4,9\n,0.3\n30,\xff\n40,0.2\n50,0."
    )
    found = report.read_curves(str(tmp_path))
    assert found["loss"] == [(1, 1.5)]
    assert found["val_cer"] == [(10, 0.5), (20, 0.4), (40, 0.2)]


def test_a_run_without_losses_is_drawn_and_named(monkeypatch):
    figures = []
    monkeypatch.setattr(report_plots, "picture", figures.append)
    report_plots.draw_curves({"one": {"val_cer": [(1, 0.5)]}, "two": {"loss": [(1, 2.0)]}})
    legend = figures[0].axes[0].get_legend()
    assert [name.get_text() for name in legend.get_texts()] == ["one", "two"]


def test_wandb_that_is_not_installed_is_one_line(root, tmp_path, monkeypatch):
    monkeypatch.setattr(train.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(train.UserError) as caught:
        run(root, tmp_path / "run", "--logger", "wandb")
    assert "wandb is not installed" in one_line(caught)


def test_a_checkpoint_alone_gives_what_there_is(root, tokenizer, tmp_path, monkeypatch):
    """Fbank, a transformer, no trained decoder, and no run.json, logs or steps.jsonl."""
    monkeypatch.setattr(report, "EXAMPLES", 1)
    options = dataclasses.replace(TINY, encoder="transformer", reverse_weight=0.0, ctc_weight=1.0)
    save_model(tiny_model(tokenizer, options, Frontend("fbank")), tmp_path / "model.ckpt")
    report.main([str(tmp_path / "model.ckpt"), "--data_root", str(root), "--rows", "2"])
    page = (tmp_path / "report.html").read_text()
    for part in (
        "no right-to-left decoder",
        "decoders were not trained",
        "no run.json says how training augmented",
        "has no steps.jsonl",
        "neither steps.jsonl nor skipped.jsonl",
        "in mode ctc_prefix_beam_search, 2 utterances",
    ):
        assert part in page


def test_a_run_whose_data_moved_away_shows_its_curves(trained, tmp_path):
    folder, _ = trained
    for name in ("run.json", "steps.jsonl"):
        changed = (folder / name).read_text().replace("data_root", "data_root_was")
        (tmp_path / name).write_text(changed)
    report.main([str(tmp_path)])
    page = (tmp_path / "report.html").read_text()
    assert "give --data_root" in page and page.count("<img") == 1


def test_skipped_updates_are_listed_with_their_rows(tmp_path):
    (tmp_path / "skipped.jsonl").write_text(
        '{"step": 5, "epoch": 1, "rows": [3, 8], "rows_with_nonfinite_loss": [8]}\n{"step": 6, "ep'
    )
    said = report.skipped(report.Run("run", str(tmp_path), None, None))
    assert "1 updates were skipped" in said and "<td>8</td><td>3 8</td>" in said


def test_what_makes_no_report_is_one_line(root, trained, tokenizer, tmp_path):
    folder, _ = trained
    other = tmp_path / "other"
    (other / "dev").mkdir(parents=True)
    (other / "dev" / "0").symlink_to(root / "dev" / "0")
    save_tokenizer(train_char(["else"]), str(other / "tokenizer.json"))
    slow = tmp_path / "slow"
    slow.mkdir()
    (slow / "dev").symlink_to(root / "dev")
    (slow / "prepare.json").write_text('{"sample_rate": 8000}')
    out = tmp_path / "page.html"
    for words, said in (
        ([tmp_path], "no run"),
        ([folder, "--data_root", other, "--out", out], "differs from"),
        ([folder, "--data_root", slow, "--out", out], "8000 samples per second"),
        ([folder, "--data_root", tmp_path / "no", "--out", out], "no such data root"),
        ([folder, "--out", tmp_path / "no" / "page.html"], "cannot be written"),
        ([folder, "--out", folder / "best.ckpt"], "must end in .html"),
    ):
        with pytest.raises(report.UserError) as caught:
            report.main([str(word) for word in words])
        assert said in one_line(caught)
    assert not out.exists()


def test_attention_maps_are_the_weights_that_the_layers_use():
    net = network(seed=1)
    encoded = noise(1, 9, 16, seed=2)
    used = []
    for block in net.decoder.blocks:
        layer = block.src_attn

        def check(layer, inputs, output):
            x, keys, values, _ = inputs
            weights = report.report_heard.attention_weights(layer, x, keys)  # (1,H,U,T')
            mixed = (weights @ values).transpose(1, 2).flatten(2)
            assert torch.allclose(layer.linear_out(mixed), output, atol=1e-6)
            used.append(weights[0].mean(0))

        layer.register_forward_hook(check)
    with torch.no_grad():
        maps = attention_maps(net.decoder, [2, 5, 6, 7], encoded)
    assert maps.shape == (len(net.decoder.blocks), 4, 9) and torch.equal(maps, torch.stack(used))
    assert torch.allclose(maps.sum(-1), torch.ones(maps.shape[:2]))


def test_a_decoder_that_looks_nowhere_has_no_map(tokenizer):
    model = tiny_model(tokenizer, dataclasses.replace(TINY, r_num_blocks=0)).eval()
    samples = np.random.default_rng(0).normal(0, 0.1, 8000).astype(np.float32)
    seen = report.report_heard.see(model, samples, "ctc_greedy_search")
    assert list(seen.maps) == ["left to right"]


words = st.lists(st.sampled_from("abc"), max_size=8)


@cases(40)
@given(words, words)
def test_words_are_aligned_with_the_fewest_errors(said, heard):
    pairs = aligned(said, heard)
    assert [one for one, _ in pairs if one is not None] == said
    assert [other for _, other in pairs if other is not None] == heard
    assert sum(one != other for one, other in pairs) == distance(said, heard)


def test_every_heard_word_has_a_confidence_and_every_error_is_counted(root, tokenizer):
    dataset = datasets.load_from_disk(str(root / "dev" / "0"))
    model = tiny_model(tokenizer, sharpness=2).eval()
    heard = hear(model, dataset, "ctc_greedy_search")
    assert [each.said for each in heard] == TEXTS
    points = confidences(heard)
    assert len(points) == sum(len(each.words) for each in heard) > 0
    counts = count_errors(heard)
    assert sum(count.total() for count in counts) == sum(each.errors for each in heard)
