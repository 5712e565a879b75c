"""In every command a folder for the hub stands for the checkpoint of which it was made."""

import functools
import json
import os
import pickletools
import shutil

from cli import UserError

import huggingface_hub
import pytest
import soundfile
import torch
from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError

import prepare
import train
import transcribe
from checkpoint import HUB_FILES
from files import MARK
from helpers import one_line
from helpers_model import copied_onnx, exportable_model, save_model
from model import load_checkpoint, read_checked
from tokenizer import load_tokenizer
from tools import export
from tools.compare import read_scores
from tools.onnx_checks import synthetic_sound
from tools.onnx_graphs import ChunkOptions

PARTS = ("model_options", "optim_options", "frontend", "tokenizer")
SOUND = synthetic_sound(16000, 2.13)
SIZES = "--chunk_size 4 --left_chunks 2".split()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(best.ckpt, the folder that `python -m tools.export --hub_dir` makes of it)."""
    folder = tmp_path_factory.mktemp("run")
    save_model(exportable_model(seed=1, num_blocks=1), folder / "best.ckpt")
    write(folder / "best.ckpt", folder / "hub")
    return folder / "best.ckpt", folder / "hub"


def write(checkpoint, folder, *more):
    """Exports a checkpoint to a folder."""
    words = ["--checkpoint", str(checkpoint), "--hub_dir", str(folder)]
    export.main([*words, "--max_int8_cer", "1", *SIZES, *more])


def refused(argv, main=export.main):
    """The error with which a command ends."""
    with pytest.raises(UserError) as error:
        main(list(map(str, argv)))
    return one_line(error)


def test_the_folder_is_the_checkpoint_to_the_bit(made):
    before, after = (read_checked(str(path)) for path in made)
    assert {part: before[part] for part in PARTS} == {part: after[part] for part in PARTS}
    assert before["state_dict"].keys() == after["state_dict"].keys()
    for name, value in before["state_dict"].items():
        other = after["state_dict"][name]
        assert value.dtype == other.dtype and torch.equal(value, other), name
    states = [load_checkpoint(str(path))[0].state_dict().values() for path in made]
    assert all(torch.equal(a, b) for a, b in zip(*states))


def test_it_holds_tensors_and_json_and_nothing_that_runs(made):
    files = {
        os.path.relpath(os.path.join(place, name), made[1])
        for place, _, names in os.walk(made[1])
        for name in names
    }
    graphs = {name for name in files if name.startswith("onnx/")}
    assert files - graphs == {*HUB_FILES, "README.md", MARK}
    assert {os.path.splitext(name)[1] for name in graphs} <= {".onnx", ".txt", ".md", ".py"}
    expected = ("model.onnx", "model.int8.onnx", "model-streaming.onnx", "tokens.txt")
    assert {f"onnx/{name}" for name in expected} <= files
    for name in files:
        content = (made[1] / name).read_bytes()
        assert content[:2] != b"PK"  # torch.save's archives
        with pytest.raises(ValueError):
            pickletools.dis(content, out=open(os.devnull, "w"))
    for name in ("config.json", "tokenizer.json"):
        assert isinstance(json.loads((made[1] / name).read_text()), dict)


def test_it_transcribes_like_the_checkpoint(made, tmp_path, capsys):
    soundfile.write(tmp_path / "a.wav", SOUND.numpy(), 16000)
    heard = []
    for checkpoint in made:
        transcribe.main(["--checkpoint", str(checkpoint), str(tmp_path / "a.wav")])
        heard.append(capsys.readouterr().out)
    assert heard[0] == heard[1] and len(heard[0].split("\t")[1]) > 5


def snapshot(monkeypatch, result):
    """Makes huggingface_hub.snapshot_download give or raise `result`.

    Returns a list that gets the arguments of each call.
    """
    calls = []

    def download(name, **options):
        calls.append((name, options))
        if isinstance(result, Exception):
            raise result
        return str(result)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    return calls


def test_a_name_on_the_hub_stands_for_a_checkpoint(made, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    calls = snapshot(monkeypatch, made[1])
    one, other = (
        read_checked(name)["state_dict"]["net.ctc.weight"]
        for name in ("org/a-model.v2", str(made[0]))
    )
    assert torch.equal(one, other)
    tokenizers = [load_tokenizer(name).to_dict() for name in ("org/a-model.v2", made[1], made[0])]
    assert tokenizers[0] == tokenizers[1] == tokenizers[2]
    # Neither code nor ONNX is asked for.
    assert calls == [("org/a-model.v2", {"allow_patterns": list(HUB_FILES)})] * 2


def test_the_copy_in_the_cache_serves_without_a_network(made, tmp_path, monkeypatch):
    """huggingface_hub itself reads a cache that has the layout of its own caches."""
    place = tmp_path / "models--org--name"
    (place / "snapshots").mkdir(parents=True)
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text("0" * 40)
    (place / "snapshots" / ("0" * 40)).symlink_to(made[1])
    offline = functools.partial(
        huggingface_hub.snapshot_download, cache_dir=tmp_path, local_files_only=True
    )
    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    assert read_checked("org/name")["tokenizer"] == read_checked(str(made[0]))["tokenizer"]
    said = "org/other: no such file or folder, and nothing comes from the hub"
    with pytest.raises(UserError, match=said):
        read_checked("org/other")


@pytest.mark.parametrize(
    "name", ["nowhere.ckpt", "runs/nowhere.ckpt", "/nowhere/model", "a/b/c", "./a", "../a", "name"]
)
def test_what_is_no_name_on_the_hub_is_not_looked_up(name, monkeypatch):
    calls = snapshot(monkeypatch, AssertionError())
    with pytest.raises(UserError, match="no such checkpoint"):
        read_checked(name)
    with pytest.raises(UserError, match="cannot read a tokenizer"):
        load_tokenizer("data/nowhere.json")
    assert not calls


def test_a_file_or_folder_goes_before_the_hub(made, monkeypatch):
    monkeypatch.chdir(made[1].parent.parent)
    calls = snapshot(monkeypatch, AssertionError())
    read_checked(f"{made[1].parent.name}/hub")
    assert not calls


@pytest.mark.parametrize(
    "error",
    [
        LocalEntryNotFoundError("Check your internet connection.\nMore lines."),
        RepositoryNotFoundError.__new__(RepositoryNotFoundError, "401 Client Error.\nMore."),
        OSError(28, "No space left"),
    ],
)
def test_what_the_hub_does_not_give_is_one_line(error, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where no run lies in the default output_dir
    snapshot(monkeypatch, error)
    for main, flag in (
        (transcribe.main, "--checkpoint"),
        (export.main, "--checkpoint"),
        (train.main, "--init_from"),
    ):
        said = refused([flag, "org/name", *(["a.wav"] if main is transcribe.main else [])], main)
        assert said.startswith("org/name: no such file or folder, and nothing comes from the hub (")
        assert "\n" not in said


def test_fine_tuning_and_preparing_take_the_folder(made, tmp_path):
    """train.py reads the folder, and then misses the data."""
    words = ["--init_from", made[1], "--data_root", tmp_path / "none"]
    asked = refused([*words, "--output_dir", tmp_path / "run"], train.main)
    assert asked.startswith(f"{tmp_path}/none: no such data root")
    source = tmp_path / "source"
    (source / "train").mkdir(parents=True)
    soundfile.write(source / "train" / "a.wav", SOUND.numpy(), 16000)
    (source / "train" / "metadata.csv").write_text("file_name,transcription\na.wav,the fox\n")
    words = ["--source", source, "--data_root", tmp_path / "data", "--tokenizer", made[1]]
    prepare.main(list(map(str, words)))
    tokenizer = load_tokenizer(tmp_path / "data" / "tokenizer.json")
    assert tokenizer.to_dict() == load_tokenizer(made[0]).to_dict()


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("config.json", None, "a folder without config.json"),
        ("model.safetensors", None, "a folder without model.safetensors"),
        ("config.json", b"{", "damaged"),
        ("config.json", b"[]", "config.json holds no JSON object"),
        (
            "config.json",
            b'{"model_type": "whisper"}',
            "no model_options, optim_options, frontend in it",
        ),
        ("tokenizer.json", b"\xff", "damaged"),
        ("model.safetensors", b"\x80\x04" + bytes(90), "damaged"),
    ],
)
def test_a_folder_that_is_not_ours_or_damaged_is_one_line(made, tmp_path, name, content, message):
    for file in HUB_FILES:
        (tmp_path / file).write_bytes((made[1] / file).read_bytes())
    (tmp_path / name).unlink() if content is None else (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=f"{tmp_path}: .*{message}"):
        read_checked(str(tmp_path))


def test_a_checkpoint_whose_weights_have_changed_on_the_disk_is_one_line(tmp_path):
    model = exportable_model()
    path = tmp_path / "best.ckpt"
    save_model(model, path)
    content = bytearray(path.read_bytes())
    place = content.find(model.net.ctc.weight.detach().numpy().tobytes())
    content[place + 3] ^= 0x40
    path.write_bytes(content)
    with pytest.raises(UserError, match=f"{path}: .*another checksum; get it again"):
        read_checked(str(path))


def test_the_card_has_the_scores_beside_the_checkpoint_and_invents_none(made, tmp_path):
    card = (made[1] / "README.md").read_text()
    assert "None yet. `python score.py" in card and "| wer" not in card
    data = huggingface_hub.ModelCard(card).data.to_dict()  # the hub's own reader of the header
    assert data["pipeline_tag"] == "automatic-speech-recognition"
    assert data["library_name"] == "lightning-u2"
    assert {"conformer", "onnx"} <= set(data["tags"]) and not {"language", "license"} & set(data)
    filled = huggingface_hub.ModelCard(card.replace("# language: en", "language: en"))
    assert filled.data.to_dict()["language"] == "en"
    save_model(exportable_model(), tmp_path / "best.ckpt")
    asked = dict(split="dev", mode="attention", stream=False, chunk_size=16, left_chunks=-1)
    score = asked | dict(utterances=98, wer=0.5, cer=0.25, rtf=0.1)
    (tmp_path / "scores.jsonl").write_text(f"said   the fox\n{json.dumps(score)}\n")
    assert len(read_scores(str(tmp_path))) == 1
    row = "| dev | attention | no | 16 | -1 | 98 | 0.5000 | 0.2500 | 0.1000 |"
    assert row in export.score_table(str(tmp_path / "best.ckpt"))
    assert "None yet" in export.score_table(str(tmp_path / "last.ckpt"))  # another model's scores
    os.utime(tmp_path / "scores.jsonl", (1, 1))  # older than the model
    assert "None yet" in export.score_table(str(tmp_path / "best.ckpt"))


def test_nothing_is_overwritten_or_left_in_half(made, tmp_path, monkeypatch):
    words = ["--checkpoint", made[0], "--hub_dir"]
    assert "hub exists; name another folder, or add --overwrite" in refused([*words, made[1]])
    again = copied_onnx(load_checkpoint(str(made[0]))[0], ChunkOptions(4, 2), made[1] / "onnx")
    monkeypatch.setattr(export, "write_onnx", again)
    folder = tmp_path / "hub"
    shutil.copytree(made[1], folder)
    write(made[0], folder, "--overwrite")
    (folder / ".git").mkdir()
    assert "more than an export (.git)" in refused([*words, folder, "--overwrite"])
    monkeypatch.setattr(
        export, "check_files", lambda *args: (_ for _ in ()).throw(UserError("unlike"))
    )
    assert "unlike" in refused([*words, tmp_path / "new", *SIZES])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hub"]
    assert "leave one of them out" in refused([*words, folder, "--out", tmp_path / "out"])


def test_a_model_that_onnx_has_no_place_for_goes_without(tmp_path, capsys):
    save_model(exportable_model(causal=False), tmp_path / "best.ckpt")
    write(tmp_path / "best.ckpt", tmp_path / "hub")
    said = "without ONNX files: its encoder is a conformer that is not causal"
    assert said in capsys.readouterr().out
    card = (tmp_path / "hub" / "README.md").read_text()
    assert not (tmp_path / "hub" / "onnx").exists()
    assert "No ONNX files: its encoder is" in card and "- onnx" not in card
    assert load_checkpoint(str(tmp_path / "hub"))[0].options.causal is False
