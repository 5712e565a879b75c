"""transcribe.py with audio.py and words.py: its input, its output, and the times of words."""

import io
import json
import math
import os
import shutil
import signal
import struct
import sys
import threading
import unicodedata
from dataclasses import replace

import cli
from cli import UserError

import hypothesis
import numpy as np
import pytest
import soundfile
import torch
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode

import audio
import decode
import transcribe
import words
from decode import MODES, SearchOptions
from helpers_model import TEXTS, call, score_json, tiny_model, waveform
from model import U2
from sampler import eval_batches
from stream import piece_samples
from tokenizer import from_vocab, train_bpe, train_char
from tools import align, demo, speak
from transforms import Frontend
from words import Word

RATE = 16000


def hear(capsys, world, *argv):
    return call(capsys, transcribe, "--checkpoint", world / "best.ckpt", "--beam_size", 3, *argv)


@pytest.fixture
def folder(tmp_path):
    """A folder with recordings of several lengths, and files that are no recordings."""
    root = tmp_path / "in"
    files = {
        "b.wav": [0],
        "a.flac": [3, 4, 0, 3, 1],
        "deep/er/c.ogg": [4],
        "deep/d.WAV": [1],
        "deep/.d.wav": [1],
    }
    for name, rows in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, np.concatenate([waveform(row) for row in rows]), RATE)
    (root / "notes.txt").write_text("not audio")
    return root


# What goes in


def write_audio_files(folder):
    good = [folder / name for name in ("mono.wav", "stereo.flac", "slow rate.ogg", "short.wav")]
    soundfile.write(good[0], waveform(0), RATE, subtype="FLOAT")
    soundfile.write(good[1], np.stack([waveform(0)] * 2, axis=1), 44100)
    soundfile.write(good[2], waveform(3), 8000)
    soundfile.write(good[3], waveform(2), RATE)
    bad = {
        "missing.wav": "file missing",
        "broken.wav": "cannot be decoded",
        "empty.wav": "no samples",
        "nan.wav": "not finite",
        "nothing": "folder without audio",
        "*.mp9": "file missing",
    }
    (folder / "broken.wav").write_bytes(b"RIFF, but no more")
    soundfile.write(folder / "empty.wav", np.zeros(0, np.float32), RATE)
    soundfile.write(folder / "nan.wav", np.full(20000, np.nan, np.float32), RATE, subtype="FLOAT")
    (folder / "nothing").mkdir()
    return good, {folder / name: reason for name, reason in bad.items()}


@pytest.mark.parametrize("stream", [[], ["--stream"]])
def test_a_line_per_file_in_their_order_and_one_on_stderr_for_a_bad_one(
    world, capsys, tmp_path, stream
):
    good, bad = write_audio_files(tmp_path)
    status, out, err = hear(
        capsys,
        world,
        *stream,
        *[path for pair in zip([*good, good[0], good[0]], bad) for path in pair],
    )
    errors = [line for line in err if "error" in line]
    assert status == 2 and len(errors) == len(bad)
    assert [line.split("\t")[0] for line in out] == list(map(str, [*good, good[0], good[0]]))
    assert all(line.count("\t") == 1 for line in out)
    for line, (path, reason) in zip(errors, bad.items()):
        assert f"transcribe.py: error: {path}: " in line and reason in line
    assert hear(capsys, world, *stream, *good)[:2] == (0, out[: len(good)])
    assert stream or hear(capsys, world, *good)[2] == []


def test_folders_and_patterns_are_searched(world, capsys, folder, monkeypatch):
    found = [str(folder / name) for name in ("a.flac", "b.wav", "deep/d.WAV", "deep/er/c.ogg")]

    def paths(*argv):
        return [line.split("\t")[0] for line in hear(capsys, world, *argv)[1]]

    assert paths(folder) == found
    assert paths(folder / "**" / "*.[ow][ga][gv]", folder / "?.flac") == [
        found[1],
        found[3],
        found[0],
    ]
    assert paths(folder / "dee*", folder / "[ab].*") == [found[2], found[3], found[0], found[1]]
    # Links are followed, but not in circles, and hidden folders are left out.
    elsewhere = folder.parent / "elsewhere"
    shutil.copytree(folder / "deep", elsewhere / ".hidden")
    shutil.copy(folder / "b.wav", elsewhere / "t.wave")
    (elsewhere / "back").symlink_to(folder)
    (folder / "link").symlink_to(elsewhere)
    assert paths(folder) == [*found, str(folder / "link" / "t.wave")]
    # With two such links glob finds a folder 2^40 times.
    (elsewhere / "again").symlink_to(folder)
    assert paths(folder / "**" / "?.wav*") == [found[1], str(folder / "link" / "t.wave")]
    # The files of a folder are those of the way that a pattern asks for.
    (folder / "alias").symlink_to(folder / "deep")
    assert paths(folder / "**" / "deep" / "**" / "*.ogg") == [found[3]]
    assert paths(folder / "**" / "*.ogg") == [str(folder / "alias" / "er" / "c.ogg")]
    for name in ("alias", "link"):
        (folder / name).unlink()
    (folder / "itself").symlink_to(folder / "itself")
    status, out, err = hear(capsys, world, folder / "**" / "i*")
    assert (status, out, len(err)) == (2, [], 1) and "itself" in err[0]
    assert paths(folder) == paths(folder / "**") == found
    (folder / "itself").unlink()
    assert paths(folder / "d*" / "**" / "e?" / "**" / "*.ogg") == [found[3]]
    monkeypatch.chdir(folder)
    assert paths("**/*.flac", "d*/**/c.*") == ["a.flac", "deep/er/c.ogg"]
    (folder / "video.mp4").write_bytes(b"no sound")
    status, out, err = hear(capsys, world, folder)
    assert (status, len(out)) == (2, len(found)) and "video.mp4: cannot be decoded" in err[-1]
    os.rename(folder / "video.mp4", folder / "a.mp4")  # of which a.flac is the conversion
    assert hear(capsys, world, folder)[::2] == (0, [])
    # A PATH that exists is a file's name, even if it looks like a pattern.
    os.rename(folder / "b.wav", folder / "b[1].wav")
    assert paths(folder / "b[1].wav") == [str(folder / "b[1].wav")]


def test_a_file_that_breaks_off_with_an_error_leaves_no_half_transcript(
    world, capsys, folder, monkeypatch
):
    real = audio.read_blocks

    def breaking(path, *rest):
        for number, block in enumerate(real(path, *rest)):
            if number == 4 and path.endswith("a.flac"):
                raise UserError("lost")
            yield block

    monkeypatch.setattr(transcribe, "read_blocks", breaking)
    status, out, err = hear(capsys, world, "--max_seconds", 1, "--batch_seconds", 1, folder)
    assert status == 2
    assert len(out) == 3
    assert err == [f"transcribe.py: error: {folder / 'a.flac'}: lost"]


@pytest.mark.parametrize("mode", MODES)
def test_transcribe_hears_what_score_hears(world, capsys, tmp_path, mode):
    files = [tmp_path / f"{row}.wav" for row in range(len(TEXTS))]
    for row, path in enumerate(files):
        soundfile.write(path, waveform(row), RATE, subtype="FLOAT")
    # score.py hears all rows in one batch, as transcribe.py does here.
    score_json(capsys, world, "--mode", mode, "--details", tmp_path / "details")
    expected = [
        json.loads(line)["hypothesis"] for line in (tmp_path / "details").read_text().splitlines()
    ]
    argv = "--checkpoint", world / "best.ckpt", "--mode", mode, *files
    _, out, _ = call(capsys, transcribe, *argv)
    assert out == [f"{path}\t{text}" for path, text in zip(files, expected, strict=True)]


def test_batches_change_nothing_and_stay_within_their_seconds(world, capsys, folder):
    texts = []
    for seconds in (1, 3, 200):
        _, out, _ = hear(
            capsys,
            world,
            "--max_seconds",
            1,
            "--batch_seconds",
            seconds,
            "--format",
            "json",
            folder,
        )
        texts.append([json.loads(line)["text"] for line in out])
    assert texts[0] == texts[1] == texts[2] and any(texts[0])
    lengths = np.random.default_rng(0).integers(1, 100, 200).tolist()
    batches = [[row for _, row in keys] for keys in eval_batches(lengths, math.inf, max_batch=300)]
    assert sorted(row for batch in batches for row in batch) == list(range(200))
    assert all(len(batch) * max(lengths[row] for row in batch) <= 300 for batch in batches)
    assert len(batches) < 60


@pytest.fixture
def set_tail(monkeypatch):
    """Gives the checkpoints that transcribe.py loads a tail of some ms."""
    load = transcribe.load_checkpoint

    def set_to(tail):
        def loaded(*args):
            model, tokenizer, frontend = load(*args)
            model.frontend = replace(frontend, tail_padding=tail)
            return model, tokenizer, model.frontend

        monkeypatch.setattr(transcribe, "load_checkpoint", loaded)

    return set_to


def test_tails_count_as_seconds_of_a_batch(world, capsys, folder, monkeypatch, set_tail):
    """Pieces are of a second at most and a batch of four."""
    sizes = []
    answer = transcribe.recognize_batch

    def recorded(job, features):
        sizes.append((len(features), max(map(len, features))))
        return answer(job, features)

    monkeypatch.setattr(transcribe, "recognize_batch", recorded)
    most = []
    for tail in (0, 1000):
        set_tail(tail)
        sizes.clear()
        assert hear(capsys, world, "--max_seconds", 1, "--batch_seconds", 4, folder)[0] == 0
        most.append(max(rows for rows, _ in sizes))
        assert all(rows * frames <= 400 for rows, frames in sizes)
    assert most[0] > most[1] == 2


@pytest.mark.parametrize("words", [("--max_seconds", 1), ("--stream",)])
@pytest.mark.parametrize("tail", [0, 2000])
def test_durations_and_times_of_words_are_those_of_the_file_without_its_tail(
    world, capsys, folder, set_tail, words, tail
):
    set_tail(tail)
    status, out, _ = hear(capsys, world, *words, "--format", "json", folder)
    assert status == 0
    for line in map(json.loads, out):
        assert line["duration"] == pytest.approx(soundfile.info(line["file"]).duration, abs=0.01)
        assert all(word["end"] <= line["duration"] + 1e-3 for word in line["words"])


@pytest.mark.parametrize("words, timed", [((), 0), (("--format", "json"), 1)])
def test_ctc_is_asked_once_more_only_for_the_times_of_words(
    world, capsys, folder, monkeypatch, words, timed
):
    asked = []
    answer = U2.ctc_log_probs

    def counted(self, encoded):
        asked.append(encoded)
        return answer(self, encoded)

    monkeypatch.setattr(U2, "ctc_log_probs", counted)
    assert hear(capsys, world, *words, folder / "a.flac")[0] == 0
    assert len(asked) == timed


class WaitedCopies(TorchDispatchMode):
    """Counts the copies between CPU and card that wait until the card has done all work before."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        devices = {x.device for x in (*args, out) if isinstance(x, torch.Tensor) and x.dim()}
        self.count += len(devices) > 1 and not (kwargs or {}).get("non_blocking")
        return out


def on_a_card(model):
    """Gives the model weights without numbers that say they are on a GPU; returns their mode."""
    card = FakeTensorMode(allow_non_fake_inputs=True)
    for module in model.net.modules():
        for held in (module._parameters, module._buffers):
            for name, value in held.items():
                if value is not None:
                    with card:
                        value = torch.empty_like(value, device="cuda")
                held[name] = value
    return card


def off_the_card(work):
    """Makes a function that runs on the CPU, with numbers, within the mode of on_a_card."""

    def on_the_cpu(*args):
        with unset_fake_temporarily():
            return work(*args)

    return on_the_cpu


@pytest.mark.parametrize(
    "mode, turns",
    [("ctc_greedy_search", 1), ("ctc_prefix_beam_search", 1), ("attention_rescoring", 2)],
)
@pytest.mark.parametrize("format", ["txt", "json"])
def test_a_batch_waits_for_the_card_once_a_turn_and_reads_no_vocabulary(
    mode, turns, format, monkeypatch
):
    model = tiny_model(train_char(["the quick brown fox jumps over the lazy dog"])).eval()
    card = on_a_card(model)
    monkeypatch.setattr(U2, "device", torch.device("cuda"))
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    for name in ("best_paths", "prefix_follow", "_sort_anew"):
        monkeypatch.setattr(decode, name, off_the_card(getattr(decode, name)))
    search = SearchOptions(beam_size=4)
    options = transcribe.TranscribeOptions(mode=mode, format=format)
    work = transcribe.recognize_batch(
        transcribe.Job(model, options, search, None), [torch.zeros(n, 80) for n in (200, 160, 90)]
    )
    turns += format == "json"
    copies = WaitedCopies()
    answers = None
    for _ in range(turns):
        # A read of a tensor on the card raises an error here, and so does an operation on tensors
        # of both devices.
        with card, copies:
            asked = work.send(answers)
        assert all(part.is_cuda and model.tokenizer.vocab_size not in part.shape for part in asked)
        answers = [torch.zeros(part.shape, dtype=part.dtype) for part in asked]
        if answers[0].dim() == 4:  # offers (2,T,B,K): tokens, and zeros for log-probabilities
            frames = torch.arange(answers[0].size(1))[:, None, None]
            answers[0][0] = frames % 5 + torch.arange(search.beam_size)
    assert copies.count == 0
    with pytest.raises(StopIteration) as result:
        work.send(answers)
    assert len(result.value.value) == 3


def test_a_long_recording_is_what_its_pieces_are(world, capsys, folder):
    rows = [
        json.loads(line)
        for line in hear(capsys, world, "--max_seconds", 2, "--format", "json", folder / "a.flac")[
            1
        ]
    ]
    samples = soundfile.read(folder / "a.flac", dtype="float32")[0]
    pieces = list(audio.cut_at_pauses(iter([samples]), RATE, 2))
    offset = 0
    texts = []
    found = []
    assert len(pieces) > 2
    for piece in pieces:
        path = folder / "piece.wav"
        soundfile.write(path, piece, RATE, subtype="FLOAT")
        heard = json.loads(hear(capsys, world, "--format", "json", path)[1][0])
        texts.append(heard["text"])
        found += [
            (word["word"], word["start"] + offset / RATE, word["end"] + offset / RATE)
            for word in heard["words"]
        ]
        offset += len(piece)
    assert rows[0]["text"] == " ".join(filter(None, texts))
    assert rows[0]["duration"] == pytest.approx(len(samples) / RATE, abs=1e-3)
    assert len(found) == len(rows[0]["words"]) > 3
    for word, (text, start, end) in zip(rows[0]["words"], found):
        assert word["word"] == text and 0 < word["confidence"] <= 1
        assert (word["start"], word["end"]) == pytest.approx((start, end), abs=2e-3)


# What comes out


@pytest.mark.parametrize("format", ["txt", "json", "srt", "vtt", "ctm"])
def test_a_file_per_recording_named_as_below_the_path_and_never_over_another(
    world, capsys, folder, tmp_path, format
):
    out = tmp_path / "out"
    argv = (
        "--format",
        format,
        "--output_dir",
        out,
        folder / "deep",
        folder / "*.wav",
        folder / "a.flac",
    )
    assert hear(capsys, world, *argv) == (0, [], [])
    names = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    assert names == {f"{name}.{format}" for name in ("d", "er/c", "b", "a")}
    (out / f"b.{format}").write_text("mine")
    status, _, err = hear(capsys, world, *argv)
    assert status == 2
    assert len(err) == 1
    assert "exists" in err[0]
    assert (out / f"b.{format}").read_text() == "mine"
    assert hear(capsys, world, "--overwrite", *argv)[0] == 0
    assert (out / f"b.{format}").read_text() != "mine"


def test_formats_say_the_same(world, capsys, folder):
    (text,) = hear(capsys, world, folder / "a.flac")[1]
    (line,) = hear(capsys, world, "--format", "json", folder / "a.flac")[1]
    ctm = [line.split() for line in hear(capsys, world, "--format", "ctm", folder / "a.flac")[1]]
    heard = json.loads(line)
    assert list(heard) == ["file", "text", "duration", "words"]
    assert text == f"{heard['file']}\t{heard['text']}"
    assert (
        " ".join(word["word"] for word in heard["words"])
        == " ".join(row[4] for row in ctm)
        == heard["text"]
    )
    assert [float(row[2]) for row in ctm] == [word["start"] for word in heard["words"]]
    srt = hear(capsys, world, "--format", "srt", folder / "a.flac")[1]
    assert (
        " ".join(line for line in srt if line and "-->" not in line and not line.isdigit())
        == heard["text"]
    )
    assert all(0 <= word["start"] < word["end"] <= heard["duration"] for word in heard["words"])


@pytest.mark.parametrize(
    "argv, said",
    [
        (["{}/b.wav", "{}/deep/../b.wav", "--output_dir", "out"], "both"),
        (["{}", "--format", "srt"], "--output_dir"),
        (["{}/b.wav", "--overwrite"], "--output_dir"),
        (["{}/b.wav", "--stream", "--mode", "attention"], "--mode attention: --stream"),
        (["{}/b.wav", "--stream", "--max_seconds", "9"], "--max_seconds"),
        (["{}/b.wav", "--max_seconds", "0"], "--max_seconds"),
        (["{}/b.wav", "--batch_seconds", "nan"], "--batch_seconds"),
        (["{}/b.wav", "--delay", "1"], "--delay"),
        (["{}/b.wav", "--raw"], "--raw"),
        (["{}/b.wav", "--output_dir", "{}/notes.txt"], "notes.txt"),
        (["{}/b.wav", "--checkpoint", "{}/notes.txt"], "notes.txt"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line(world, capsys, folder, argv, said):
    status, out, err = hear(capsys, world, *[word.format(folder) for word in argv])
    assert status == 2 and out == [] and len(err) == 1 and said in err[0]


# Streams and pipes


def ffmpeg_wav(samples, rate):
    """The bytes that `ffmpeg -f wav -` writes: the lengths in the header are unknown."""
    extra = (
        b"LIST" + struct.pack("<I", 26) + b"INFOISFT" + struct.pack("<I", 14) + b"Lavf60.16.100\0"
    )
    unknown = struct.pack("<I", 2**32 - 1)
    fmt = struct.pack("<IHHIIHH", 16, 1, 1, rate, 2 * rate, 2, 16)
    return b"RIFF" + unknown + b"WAVEfmt " + fmt + extra + b"data" + unknown + samples.tobytes()


@pytest.mark.parametrize("stream", [[], ["--stream", "--chunk_size", 4]])
def test_a_pipe_is_heard_as_the_file(world, capsys, tmp_path, pipe, stream):
    samples = (waveform(0)[:14000] * 32767).astype("<i2")
    soundfile.write(tmp_path / "file.wav", samples, RATE)
    soundfile.write(tmp_path / "slow.wav", samples, 8000)
    expected, slow = (
        hear(capsys, world, *stream, tmp_path / name)[1][0].split("\t")[1]
        for name in ("file.wav", "slow.wav")
    )
    assert expected and slow and expected != slow
    for content, argv, text in (
        (ffmpeg_wav(samples, RATE), [], expected),
        (samples.tobytes(), ["--raw"], expected),
        (ffmpeg_wav(samples, 8000), [], slow),
    ):
        pipe(content)
        assert hear(capsys, world, *stream, *argv, "-")[:2] == (0, [f"-\t{text}"])
    pipe(b"")
    status, out, err = hear(capsys, world, *stream, "-")
    assert status == 2 and out == [] and "error: -: cannot be decoded" in err[-1]


@pytest.mark.parametrize("stream", [[], ["--stream"]])
def test_a_damaged_file_is_heard_up_to_the_damage_and_a_pipe_is_told_what_it_takes(
    world, capsys, tmp_path, pipe, stream
):
    whole = tmp_path / "whole.flac"
    cut = tmp_path / "cut.flac"
    soundfile.write(whole, np.concatenate([waveform(row) for row in (0, 3, 4)]), RATE)
    cut.write_bytes(whole.read_bytes()[: -whole.stat().st_size // 4])
    status, (line,), err = hear(capsys, world, *stream, "--format", "json", cut)
    heard = json.loads(line)
    assert status == 0 and f"note: {cut}: damaged after 2." in "\n".join(err)
    assert heard["text"] and 2 < heard["duration"] < 3 < soundfile.info(whole).duration
    pipe(whole.read_bytes()[:60_000])
    status, out, err = hear(capsys, world, *stream, "-")
    assert status == 2
    assert out == []
    assert "error: -: cannot be decoded" in err[-1]
    assert "pipe wav" in err[-1]


@pytest.mark.parametrize("stream", [[], ["--stream"]])
def test_what_is_lost_of_a_file_is_told_and_what_holds_no_speech_is_no_error(
    world, capsys, tmp_path, stream
):
    samples = np.concatenate([waveform(row) for row in (0, 3, 4)])
    for name in ("whole.mp3", "whole.wav"):
        soundfile.write(tmp_path / name, samples, RATE)
        content = (tmp_path / name).read_bytes()
        (tmp_path / f"cut {name}").write_bytes(content[: len(content) // 2])
        status, out, err = hear(capsys, world, *stream, tmp_path / f"cut {name}")
        (note,) = (line for line in err if "note" in line)
        assert status == 0
        assert len(out) == 1
        assert note.endswith(f" s of {len(samples) / RATE:.1f} s")
        assert "cut short: 1." in note
    for name, silence in (
        ("constant.wav", np.full(RATE, 0.25)),
        ("inverted.wav", np.stack([samples, -samples], axis=1)),
    ):
        soundfile.write(tmp_path / name, silence, RATE)
        status, out, err = hear(capsys, world, *stream, tmp_path / name)
        assert status == 0 and len(out) == 1 and not any("transcribe.py" in line for line in err)


def test_a_stream_is_heard_as_it_grows_and_ends_in_one_line_per_file(world, capsys, tmp_path):
    path = tmp_path / "long.wav"
    soundfile.write(
        path, np.concatenate([waveform(row) for row in (0, 3, 4)]), RATE, subtype="FLOAT"
    )
    status, out, err = hear(capsys, world, "--beam_size", 10, "--stream", "--chunk_size", 4, path)
    times = [float(line.split()[0]) for line in err]
    assert status == 0
    assert len(err) > 2
    assert times == sorted(times)
    assert times[-1] == pytest.approx(3.6, abs=0.1)
    finals = [line.split("=", 1)[1].strip() for line in err if "s =" in line]
    assert out == [f"{path}\t{' '.join(finals)}"] and finals


def test_a_stream_says_what_a_chunk_holds_before_it_reads_on(world, monkeypatch):
    come, told = 0, []

    def blocks():
        nonlocal come
        for block in np.split(np.concatenate([waveform(row) for row in (0, 3, 4)])[:57600], 36):
            come += len(block)
            yield block

    model, _, _ = transcribe.load_checkpoint(str(world / "best.ckpt"), "cpu")
    job = transcribe.Job(
        model, transcribe.TranscribeOptions(stream=True), SearchOptions(chunk_size=4), None
    )
    monkeypatch.setattr(
        transcribe, "show_heard", lambda text, seconds, final: told.append((come, seconds))
    )
    transcribe.transcribe_stream(job, "-", blocks())
    first, later = piece_samples(model, 4)
    for come, seconds in told[:-1]:
        needed = first + (seconds / 0.16 - 1) * later  # samples
        assert needed - 1e-6 <= come < needed + 1600  # a block of 0.1 s
    assert len(told) > 5


def test_a_stream_times_its_words_as_the_whole_does(world, capsys, tmp_path):
    path = tmp_path / "long.wav"
    soundfile.write(
        path, np.concatenate([waveform(row) for row in (0, 3, 4)]), RATE, subtype="FLOAT"
    )
    (text,) = hear(capsys, world, "--beam_size", 10, "--stream", path)[1]
    (line,) = hear(capsys, world, "--beam_size", 10, "--stream", "--format", "json", path)[1]
    heard = json.loads(line)
    assert text == f"{path}\t{heard['text']}"
    assert heard["text"] == " ".join(word["word"] for word in heard["words"]) != ""
    starts = [word["start"] for word in heard["words"]]
    assert starts == sorted(starts) and starts[-1] < heard["duration"]
    assert all(one["end"] <= start for one, start in zip(heard["words"], starts[1:]))
    assert all(word["confidence"] > 0 for word in heard["words"])


def test_on_a_terminal_one_line_rewrites_itself(world, capsys, tmp_path, monkeypatch):
    soundfile.write(tmp_path / "a.wav", np.concatenate([waveform(row) for row in (0, 3, 4)]), RATE)
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setenv("COLUMNS", "40")
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", terminal)
        transcribe.main(
            [
                "--checkpoint",
                str(world / "best.ckpt"),
                "--stream",
                "--chunk_size",
                "4",
                str(tmp_path / "a.wav"),
            ]
        )
    shown = terminal.getvalue().split("\r\033[K")[1:]
    assert len(shown) > 3 and shown[-1].endswith("\n") and "s = " in shown[-1]
    partial = [line for line in shown if "s =" not in line]
    assert all(len(line) < 40 and "\n" not in line for line in partial)
    assert any("..." in line for line in partial)
    with monkeypatch.context() as patch:  # a Chinese character takes two columns
        patch.setattr(sys, "stderr", terminal)
        transcribe.show_heard("你好" * 20, 1.5, False)
    line = terminal.getvalue().split("\r\033[K")[-1]
    assert words.columns(line) in (38, 39) and line.endswith("你好")


def test_ctrl_c_ends_a_pipe_but_not_a_file(world, capsys, folder, monkeypatch, pipe):
    def interrupted(path, *rest):
        yield from [waveform(0), waveform(3)]
        raise KeyboardInterrupt

    monkeypatch.setattr(transcribe, "read_blocks", interrupted)
    pipe(b"")
    status, out, _ = hear(capsys, world, "--stream", "-")
    assert status == 0 and out[0].startswith("-\t") and len(out[0]) > 4
    assert hear(capsys, world, "--stream", folder / "b.wav")[:2] == (130, [])
    with open(folder / "b.wav", "rb") as file:
        os.dup2(file.fileno(), 0)
    assert hear(capsys, world, "--stream", "-")[:2] == (130, [])


@pytest.mark.parametrize("stream", [[], ["--stream", "--chunk_size", 4]])
@pytest.mark.parametrize(
    "number, ends", [(signal.SIGINT, 0), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]
)
def test_a_signal_ends_a_pipe_and_all_that_came_is_heard(
    world, capsys, pipe, monkeypatch, stream, number, ends
):
    monkeypatch.setattr(transcribe, "LINGER", 60)
    # The command must not leave the streams that the test reads.
    monkeypatch.setattr(transcribe, "leave_terminal", lambda: None)
    samples = np.concatenate((waveform(0), waveform(4)))[:30000]
    content = ffmpeg_wav((samples * 32767).astype("<i2"), RATE)
    pipe(content)
    argv = (*stream, "--format", "json", "-")
    expected = hear(capsys, world, *argv)[1]
    assert json.loads(expected[0])["text"] and json.loads(expected[0])["duration"] > 1.5
    out, into = os.pipe()
    os.dup2(out, 0)
    os.close(out)
    os.write(into, content[:9000])
    handlers = {sign: signal.signal(sign, cli.interrupt) for sign in cli.SIGNALS}
    real = transcribe.read_blocks

    def told_to_end():  # The writer of the pipe gets the signal, too.
        os.kill(os.getpid(), number)
        os.write(into, content[9000:])
        os.close(into)

    def begun(*arguments):
        threading.Timer(0.3, told_to_end).start()  # By then a read waits.
        yield from real(*arguments)

    monkeypatch.setattr(transcribe, "read_blocks", begun)
    try:
        status, text, err = hear(capsys, world, *argv)
        assert [signal.getsignal(sign) for sign in cli.SIGNALS] == [cli.interrupt] * 3
    finally:
        for sign, handler in handlers.items():
            signal.signal(sign, handler)
    assert (status, text) == (ends, expected)
    assert any(f"interrupted ({number.name})" in line for line in err) == (number != signal.SIGINT)


def test_a_second_signal_ends_the_command(world, capsys, pipe, monkeypatch):
    def twice(path, *rest):
        signal.raise_signal(signal.SIGINT)
        yield waveform(0)
        signal.raise_signal(signal.SIGINT)
        yield waveform(3)

    monkeypatch.setattr(transcribe, "read_blocks", twice)
    pipe(b"")
    assert hear(capsys, world, "--stream", "-")[:2] == (130, [])


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e10])
def test_what_was_heard_before_a_sample_that_is_none_is_not_lost(
    world, capsys, tmp_path, pipe, bad
):
    samples = waveform(3)[:14000]
    soundfile.write(tmp_path / "good.wav", samples, RATE, subtype="FLOAT")
    spoiled = np.append(samples, [bad, 0.1]).astype(np.float32)
    soundfile.write(tmp_path / "bad.wav", spoiled, RATE, subtype="FLOAT")
    for stream in ([], ["--stream"]):
        expected = hear(capsys, world, *stream, tmp_path / "good.wav")[1][0].split("\t")[1]
        for path in ("-", str(tmp_path / "bad.wav")):
            pipe((tmp_path / "bad.wav").read_bytes())
            status, out, err = hear(capsys, world, *stream, path)
            (error,) = (line for line in err if "error" in line)
            assert status == 2 and f"error: {path}: samples " in error
            assert error.endswith(" after 0.9 s")
            # A file can be mended and heard again, so only a stream or a pipe prints its text.
            assert out == ([f"{path}\t{expected}"] if stream or path == "-" else []) and expected


# Words


TOKENIZERS = {
    "characters": train_char(["the cat sat at home"]),
    "pieces": train_bpe(["the cat sat at home at the sea"], 24),
    "vocab": from_vocab(
        {"<pad>": 0, "|": 1, **{letter: i for i, letter in enumerate("abcehimost", 2)}}
    ),
}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_words_are_those_of_the_text_and_own_all_tokens_that_are_no_space(name):
    tokenizer = TOKENIZERS[name]
    tokens = tokenizer.encode(" the  cat at home ")
    spelled = words.spell(tokens, tokenizer)
    assert (
        [word.text for word in spelled]
        == tokenizer.decode(tokens).split()
        == "the cat at home".split()
    )
    places = [place for word in spelled for place in word.places]
    assert places == sorted(places) and all(len(word.text) == len(word.places) for word in spelled)
    assert words.spell([tokenizer.unk_id, tokenizer.eos_id], tokenizer) == [("\u2047", [0], True)]


@pytest.mark.parametrize(
    "text",
    [
        "你 好， 世 界。",
        "人 々 は 「東 京」",
        "三 〇 年、",
        "𠮷 野 家",
        "今 天_ab 好 c",
        "他 说 “你 好” OK_吗？",
        "ラー メ ン ｶﾞ か\u3099 ㋿",
        "ㄅ ㄆ",
        "『「東」」 abc 「ｄef) 好 (好) 好",
        "안녕하세요_세계。",
        "สวัสดี_ครับ",
        "好 👩‍👩‍👧🏽 好 葛\U000e0100 e\u0301é",
        "'tis_.5_a-b_“so”_(so)",
        "， 你_， 你",
    ],
)
def test_a_word_has_its_marks_and_its_punctuation_and_spaces_only_where_the_tokens_have_them(text):
    """In `text`, _ stands for a space, and a space for the end of a word without a space."""
    said = text.replace(" ", "").replace("_", " ")
    tokenizer = train_char([said])
    spelled = words.spell(tokenizer.encode(said), tokenizer)
    assert "".join("_ "[not word.spaced] + word.text for word in spelled)[
        1:
    ] == unicodedata.normalize("NFC", text)
    assert words.text_of(spelled) == tokenizer.decode(tokenizer.encode(said))


SCRIPTS = st.sampled_from(
    [
        *"ab'(“),.?！， 你好々〇「」。ーラ゙ﾞ𠮷豈한ㅎक़िनमस् ไท👩🏽",
        "\u0301",
        "\u200d",
        "\ufe0f",
        "\u0307",
        " a",
        "ch",
        "e\u0301",
    ]
)


@hypothesis.settings(max_examples=150, deadline=None, derandomize=True)
@hypothesis.given(
    parts=st.lists(st.lists(SCRIPTS, max_size=12), max_size=4),
    kind=st.sampled_from(["char", "bpe", "wav2vec2"]),
)
def test_the_words_of_a_transcript_are_its_text_in_one_piece_or_many(parts, kind):
    texts = ["".join(part) for part in parts]
    letters = {"<pad>", "<unk>", "|", "ch", *"".join(texts)}
    tokenizer = {
        "char": lambda: train_char(["a", *texts]),
        "bpe": lambda: train_bpe(["a ch", *texts], 200),
        "wav2vec2": lambda: from_vocab({token: i for i, token in enumerate(sorted(letters))}),
    }[kind]()
    tokens = [tokenizer.encode(text) for text in texts]
    spelled = [words.spell(ids, tokenizer) for ids in tokens]
    assert [words.text_of(part) for part in spelled] == [tokenizer.decode(ids) for ids in tokens]
    heard = words.join_words(
        [Word(word.text, i, i + 1.1, 0.5, word.spaced) for word in part]
        for i, part in enumerate(spelled)
    )
    assert words.text_of(heard) == words.join(tokenizer.decode(ids) for ids in tokens)
    assert all(
        one.end <= other.start for one, other in zip(heard, heard[1:]) if one.start < other.start
    )
    lines = [line for *_, text in words.cues(heard) for line in text.split("\n")]
    assert all(words.columns(line) <= words.LINE for line in lines)
    assert "".join("".join(lines).split()) == "".join(words.text_of(heard).split())
    assert not any(
        unicodedata.combining(word.text[0])
        for part in spelled
        for word in part[1:]
        if not word.spaced
    )


def test_texts_that_were_heard_apart_have_a_space_between_them_save_in_scripts_without():
    assert (
        words.join(["", "你好，", "世界。", "", "「吗」", "ok", "hello.", "ｶﾞ", "〇。", "𠮷"])
        == "你好，世界。「吗」 ok hello. ｶﾞ〇。𠮷"
    )
    assert words.join(["안녕", "세계"]) == "안녕 세계"


def log_probs_of(path, tokenizer, probability):
    """Log-probabilities that give each frame's token its probability and spread the rest evenly."""
    probs = torch.full((len(path), tokenizer.vocab_size), 0.0)
    for frame, (token, sure) in enumerate(zip(path, probability)):
        probs[frame] = (1 - sure) / (tokenizer.vocab_size - 1)
        probs[frame, token] = sure
    return probs.log()


def test_words_have_the_times_and_the_least_probability_of_their_tokens():
    tokenizer = TOKENIZERS["characters"]
    a, t, space = tokenizer.encode("a") + tokenizer.encode("t") + tokenizer.encode("a t")[1:2]
    log_probs = log_probs_of(
        [0, a, a, t, 0, space, 0, t, 0], tokenizer, [0.9, 0.7, 0.8, 0.95, 0.9, 0.6, 0.9, 0.75, 0.9]
    )
    times = words.frame_times("conv2d", Frontend())
    assert times == pytest.approx((0.04, 0.085))
    first, second = words.align_words([a, t, space, t], log_probs, tokenizer, times, offset=10.0)
    assert (first.text, second.text) == ("at", "t")
    # The word starts where `a` is likeliest, although its run begins before.
    assert first[1:4] == pytest.approx((10.08, 10.12 + 0.0625, 0.8))
    assert second[1:4] == pytest.approx((10.28, 10.28 + 0.0625, 0.75))
    early, _ = words.align_words(
        [a, t, space, t], log_probs, tokenizer, times, offset=10.0, delay=0.1
    )
    assert early[1:3] == pytest.approx((10.0, 10.0825))  # not before the piece
    *_, last = words.align_words(
        [a, t, space, t], log_probs, tokenizer, times, offset=10.0, until=10.25
    )
    assert last[1:3] == (10.25, 10.25)  # not behind it, where the model hears silence


def test_words_never_overlap():
    tokenizer = train_char(["今天"])
    tokens = tokenizer.encode("今天")
    log_probs = log_probs_of(tokens, tokenizer, [0.9, 0.9])
    one, other = words.align_words(tokens, log_probs, tokenizer, words.FrameTimes(0.04, 0.085))
    assert one[1:3] == pytest.approx((0.0, 0.04)) and other[1:3] == pytest.approx((0.04, 0.1025))


def test_words_that_fit_no_ctc_path_are_still_there_without_confidence():
    tokenizer = TOKENIZERS["characters"]
    log_probs = torch.zeros(3, tokenizer.vocab_size)
    found = words.align_words(
        tokenizer.encode("at at"), log_probs, tokenizer, words.FrameTimes(0.04, 0.085), 1.0
    )
    assert [word[:4] for word in found] == [("at", 1.0, 1.06, 0.0), ("at", 1.06, 1.12, 0.0)]
    for until, ends in ((1.08, [(1.0, 1.04), (1.04, 1.08)]), (0.9, [(0.9, 0.9)] * 2)):
        times = words.FrameTimes(0.04, 0.085)
        tokens = tokenizer.encode("at at")
        found = words.align_words(tokens, log_probs, tokenizer, times, 1.0, until=until)
        assert [word[1:3] for word in found] == [pytest.approx(pair) for pair in ends]


def test_cues_fit_the_screen_in_space_and_time_and_hold_every_word():
    rng = np.random.default_rng(0)
    for alphabet, longest in (("abc<&>", 11), ("今天好", 1)):
        said = []
        now = 0.0
        for _ in range(300):
            start = now + rng.exponential(0.15)
            now = start + rng.uniform(0.02, 0.6)
            said.append(
                Word(
                    "".join(rng.choice(list(alphabet), rng.integers(1, longest + 1))),
                    start,
                    now,
                    0.5,
                )
            )
        cues = words.cues(said)
        for start, end, text in cues:
            lines = text.split("\n")
            assert len(lines) <= 2
            assert max(len(line) + sum(c > "\u3000" for c in line) for line in lines) <= 42
            assert 0 < end - start <= 7.0
        assert all(one[1] <= other[0] for one, other in zip(cues, cues[1:])) and len(cues) > 20
        assert "".join("".join(text.split()) for *_, text in cues) == "".join(
            word.text for word in said
        )


def test_formats_are_spelled_as_their_players_want_them():
    transcript = words.Transcript(
        "a b.wav",
        "so <it> goes",
        3725.5,
        [
            Word("so", 0.5, 0.75, 0.9),
            Word("<it>", 0.8, 1.0, 0.25),
            Word("goes", 3723.9996, 3725.0, 1.0),
        ],
    )
    assert words.as_ctm(transcript).splitlines()[1] == "a%20b.wav 1 0.800 0.200 <it> 0.2500"
    assert words.as_srt(transcript) == (
        "1\n00:00:00,500 --> 00:00:01,500\nso <it>\n\n2\n01:02:04,000 --> 01:02:05,000\ngoes\n\n"
    )
    assert words.as_vtt(transcript).startswith(
        "WEBVTT\n\n00:00:00.500 --> 00:00:01.500\nso &lt;it&gt;\n\n01:02:04.000"
    )
    assert json.loads(words.as_json(transcript))["words"][1] == {
        "word": "<it>",
        "start": 0.8,
        "end": 1.0,
        "confidence": 0.25,
    }


# tools/align.py


def test_espeak_says_when_it_speaks_each_word():
    pytest.importorskip("espeakng_loader", reason="the wheel espeakng-loader is not installed")
    for utterance in [
        *demo.plan("dev", 10),
        speak.Utterance("the code of the A is A B nine", "m7", 150, 50),
    ]:
        samples, spoken = speak.speak_with_words(utterance)
        assert " ".join(word.text for word in spoken) == utterance.text
        assert np.array_equal(samples, speak.speak(utterance))
        assert all(
            one.start < one.end <= other.start < other.end for one, other in zip(spoken, spoken[1:])
        )

        def loudness(start, end):
            return np.abs(samples[int(start * speak.RATE) : int(end * speak.RATE)]).mean()

        gaps = [loudness(one.end, other.start) for one, other in zip(spoken, spoken[1:])]
        assert np.mean(gaps) < 0.2 * np.mean([loudness(word.start, word.end) for word in spoken])
    assert "of the" in [word.text for word in spoken]  # eSpeak speaks the two as one.


def test_align_measures_by_how_much_words_are_off():
    spoken = [
        speak.SpokenWord("in the", 1.0, 1.5),
        speak.SpokenWord("big", 1.6, 2.0),
        speak.SpokenWord("hall", 2.1, 2.5),
    ]
    found = [
        Word("in", 1.1, 1.2, 1.0),
        Word("the", 1.2, 1.4, 1.0),
        Word("pig", 1.6, 1.9, 1.0),
        Word("hall", 2.0, 2.7, 1.0),
    ]
    matched = align.match("in the big hall".split(), found)
    assert matched == [found[0], found[1], None, found[3]]
    errors = align.time_errors(matched, spoken)
    assert errors == [pytest.approx((0.1, -0.1)), pytest.approx((-0.1, 0.2))]
    assert align.summary(errors) == {
        "words": 2,
        "start_error_ms": 100.0,
        "start_late_ms": 0.0,
        "end_error_ms": 150.0,
        "end_late_ms": 50.0,
    }


def test_align_refuses_a_tokenizer_that_cannot_spell_its_sentences(world, capsys):
    pytest.importorskip("espeakng_loader", reason="the wheel espeakng-loader is not installed")
    status, out, err = call(capsys, align, "--checkpoint", world / "best.ckpt", "--sentences", 30)
    assert status == 2 and out == [] and "cannot spell" in err[-1]


@pytest.mark.parametrize("output", [[], ["--output_dir", "{}/out"]])
def test_a_reader_that_has_enough_ends_it_quietly_and_files_are_no_matter_of_stdout(
    world, capsys, tmp_path, monkeypatch, output
):
    soundfile.write(tmp_path / "a.wav", waveform(0), RATE)
    reading, writing = os.pipe()
    os.close(reading)
    pipe = os.fdopen(writing, "w")
    monkeypatch.setattr(sys, "stdout", cli.Standard(pipe, raises=True))
    status, _, err = hear(
        capsys, world, *[word.format(tmp_path) for word in output], tmp_path / "a.wav"
    )
    assert (status, err) == (0 if output else 141, [])
    assert not output or (tmp_path / "out" / "a.txt").read_text().strip()


@pytest.mark.parametrize("format", ["json", "ctm", "txt"])
def test_the_name_of_a_recording_need_not_be_in_utf_8(format, tmp_path):
    output = tmp_path / f"a.{format}"
    transcribe.deliver(
        transcribe.Transcript("caf\udce9.wav", "hello", 1.0, []), str(output), format
    )
    if format == "json":
        assert json.loads(output.read_text(encoding="utf-8"))["file"] == "caf\udce9.wav"


def test_a_file_that_came_into_being_meanwhile_is_not_replaced_and_no_text_is_lost(
    world, capsys, tmp_path, monkeypatch
):
    soundfile.write(tmp_path / "a.wav", waveform(0), RATE)
    output = tmp_path / "out" / "a.txt"
    load = transcribe.load_checkpoint

    def slow(*arguments):
        output.write_text("mine")
        return load(*arguments)

    _, expected, _ = hear(capsys, world, tmp_path / "a.wav")
    words = "--output_dir", output.parent, tmp_path / "a.wav"
    with monkeypatch.context() as patch:
        patch.setattr(transcribe, "load_checkpoint", slow)
        status, out, err = hear(capsys, world, *words)
    assert (status, out, output.read_text()) == (2, expected, "mine")
    assert "a.txt exists; give --overwrite" in err[-1] and "standard output" in err[-1]
    assert hear(capsys, world, "--overwrite", *words)[:2] == (0, [])
    assert output.read_text() == expected[0].split("\t")[1] + "\n"
