"""The files that export.py writes hear what the network hears, in onnxruntime and sherpa-onnx.

onnxruntime is called here as sherpa-onnx and WeNet's runtime call it.
"""

import contextlib
import dataclasses
import functools
import io
import itertools
import os
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

from cli import UserError

import datasets
import numpy as np
import onnxruntime
import pytest
import soundfile
import torch

from decode import SearchOptions
from frames import MAX_POSITION, subsampled_length
from helpers import ROOT, TWO_BLOCKS, one_line
from helpers_model import copied_onnx, exportable_model, save_model, tiny_model
from tokenizer import Tokenizer, from_vocab, save_tokenizer, train_bpe, train_char
from tools import export, lm, onnx_checks, parity
from tools.export import BLANK, ExportOptions, main, token_lines
from tools.export import export as export_model
from tools.onnx_checks import (
    call,
    given_of,
    graph_stream,
    greedy,
    network_stream,
    network_whole,
    synthetic_sound,
)
from tools.onnx_graphs import (
    Chunk,
    ChunkOptions,
    cache_inputs,
    sherpa_graphs,
    wenet_graphs,
    write_graph,
)
from tools.wenet_import import load_wenet
from transforms import STREAM_WINDOW, Frontend, extract
from wfst import load_graph

CHUNK, LEFT = 4, 2
CHUNKS = ChunkOptions(CHUNK, LEFT)
CACHE = CHUNK * LEFT
SOUND = synthetic_sound(16000, 2.13)  # 52 encoder frames and a bit; 13 chunks
AN4 = ROOT.parent / "shared" / "speech" / "an4" / "dev"


def write(model, folder, chunks=CHUNKS, **options):
    options = ExportOptions(**{"out": str(folder / "out"), "max_int8_cer": 1.0, **options})
    with pytest.MonkeyPatch.context() as patch:
        # The sound has fewer seconds than the command's own: each chunk is heard by each graph.
        patch.setattr(export, "synthetic_sound", functools.partial(synthetic_sound, seconds=2.13))
        lines = export_model(model, options, chunks)
    return folder / "out", lines


@pytest.fixture(scope="module")
def fbank(tmp_path_factory):
    model = exportable_model()
    return model, *write(model, tmp_path_factory.mktemp("fbank"))


@pytest.fixture(scope="module")
def log_mel(tmp_path_factory):
    """(the model, the folder, what is printed) of the command on a recording."""
    folder = tmp_path_factory.mktemp("log_mel")
    model, path = exportable_model("log_mel", features={"tail_padding": 90}), folder / "model.ckpt"
    save_model(model, path)
    soundfile.write(folder / "sound.wav", SOUND.numpy(), 16000)
    (folder / "out").mkdir()
    words = f"--checkpoint {path} --out {folder}/out --overwrite --max_int8_cer 1 --chunk_size 4"
    with contextlib.redirect_stdout(io.StringIO()) as said:
        main([*words.split(), "--left_chunks", "2", "--audio", f"{folder}/sound.wav"])
    return model, folder / "out", said.getvalue()


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    """A smaller model on log_mel, without a tail, and its files."""
    folder = tmp_path_factory.mktemp("bare")
    export.write_onnx(model := exportable_model("log_mel", num_blocks=1), CHUNKS, str(folder))
    return model, folder


def session_of(folder, name):
    return onnx_checks.open_session(str(folder / name))


def described(nodes):
    return [(node.name, node.type, len(node.shape)) for node in nodes]


def test_the_files_are_what_sherpa_onnx_reads(fbank):
    _, folder, lines = fbank
    offline = session_of(folder, "model.onnx")
    streaming = session_of(folder, "model-streaming.onnx")
    assert described(offline.get_inputs()) == [
        ("x", "tensor(float)", 3),
        ("x_lens", "tensor(int64)", 1),
    ]
    assert described(offline.get_outputs()) == [
        ("log_probs", "tensor(float)", 3),
        ("log_probs_lens", "tensor(int64)", 1),
    ]
    assert described(streaming.get_inputs()) == [
        ("x", "tensor(float)", 3),
        ("offset", "tensor(int64)", 1),
        ("required_cache_size", "tensor(int64)", 1),
        ("attn_cache", "tensor(float)", 4),
        ("conv_cache", "tensor(float)", 4),
        ("attn_mask", "tensor(bool)", 3),
    ]
    assert [node.name for node in streaming.get_outputs()] == [
        "log_probs",
        "next_att_cache",
        "next_conv_cache",
    ]
    expected = dict(
        model_type="wenet_ctc",
        version="1",
        vocab_size="20",
        subsampling_factor="4",
        right_context="6",
    )
    metadata = streaming.get_modelmeta().custom_metadata_map
    assert expected.items() <= offline.get_modelmeta().custom_metadata_map.items()
    assert {
        **expected,
        "chunk_size": "4",
        "left_chunks": "2",
        "head": "2",
        "num_blocks": "2",
        "output_size": "16",
        "cnn_module_kernel": "5",
    }.items() <= metadata.items()
    int8 = session_of(folder, "model-streaming.int8.onnx").get_modelmeta().custom_metadata_map
    assert metadata.items() <= int8.items()
    for name in ("model", "model-streaming"):
        assert (folder / f"{name}.int8.onnx").is_file()
    assert lines[0].startswith("checked on a synthetic sound")
    assert sum("within" in line for line in lines) == 4
    assert sum("heard otherwise" in line for line in lines) == 2


def test_the_files_are_what_wenet_s_runtime_reads(fbank):
    _, folder, _ = fbank
    encoder, ctc, decoder = (
        session_of(folder, f"{name}.onnx") for name in ("encoder", "ctc", "decoder")
    )
    assert described(encoder.get_inputs()) == [
        ("chunk", "tensor(float)", 3),
        ("offset", "tensor(int64)", 0),
        ("required_cache_size", "tensor(int64)", 0),
        ("att_cache", "tensor(float)", 4),
        ("cnn_cache", "tensor(float)", 4),
        ("att_mask", "tensor(bool)", 3),
    ]
    assert [node.name for node in encoder.get_outputs()] == ["output", "r_att_cache", "r_cnn_cache"]
    assert described(ctc.get_inputs() + ctc.get_outputs()) == [
        ("hidden", "tensor(float)", 3),
        ("probs", "tensor(float)", 3),
    ]
    assert described(decoder.get_inputs()) == [
        ("hyps", "tensor(int64)", 2),
        ("hyps_lens", "tensor(int64)", 1),
        ("encoder_out", "tensor(float)", 3),
    ]
    assert described(decoder.get_outputs()) == [
        ("score", "tensor(float)", 3),
        ("r_score", "tensor(float)", 3),
    ]
    metadata = encoder.get_modelmeta().custom_metadata_map
    assert {
        "output_size": "16",
        "num_blocks": "2",
        "head": "2",
        "cnn_module_kernel": "5",
        "subsampling_rate": "4",
        "right_context": "6",
        "sos_symbol": "2",
        "eos_symbol": "3",
        "is_bidirectional_decoder": "1",
        "chunk_size": "4",
        "left_chunks": "2",
    }.items() <= metadata.items()


@torch.no_grad()
def test_padding_changes_nothing_and_nothing_is_too_short(fbank):
    model, folder, _ = fbank
    lengths = torch.tensor([131, 52, 7, 3])
    x = torch.randn(4, 131, 80) + 8
    session = session_of(folder, "model.onnx")
    log_probs, frames = session.run(None, {"x": x.numpy(), "x_lens": lengths.numpy()})
    assert frames.tolist() == [32, 12, 1, 0]
    for row, length, count, heard in zip(x, lengths, frames, log_probs):
        encoded, _ = model.encode(row[None, :length], length[None])
        expected = model.ctc_log_probs(encoded)[0, :count].numpy()
        np.testing.assert_allclose(heard[:count], expected, atol=1e-4)
    short = {"x": x[:1, :3].numpy(), "x_lens": lengths[3:].numpy()}
    log_probs, frames = session.run(None, short)
    assert log_probs.shape == (1, 1, 20) and frames.tolist() == [0]


def stream_as_sherpa(session, x, chunks, offset=CACHE, cache=(2, 2, CACHE, 16), conv=(2, 1, 16, 4)):
    """Does what sherpa-onnx's C++ does with model-streaming.onnx."""
    names = [node.name for node in session.get_inputs()]
    caches = [np.zeros(cache, np.float32), np.zeros(conv, np.float32)]
    outs = []
    for index in range(chunks):
        mask = np.ones((1, 1, CACHE + CHUNK), bool)
        mask[..., : max(CACHE - index * CHUNK, 0)] = False
        window = x[:, index * CHUNK * 4 : index * CHUNK * 4 + (CHUNK - 1) * 4 + 7]
        inputs = (window, np.array([offset]), np.array([CACHE]), *caches, mask)
        out, *caches = session.run(None, dict(zip(names, inputs)))
        assert caches[0].shape == cache and caches[1].shape == conv
        outs.append(out)
        offset += out.shape[1]
    return np.concatenate(outs, axis=1)


@torch.no_grad()
@pytest.mark.parametrize("frames", [7, 19, 60, 131])
def test_chunk_by_chunk_it_is_the_masked_pass_over_the_whole(fbank, frames):
    """The last chunk may be shorter than the others."""
    model, folder, _ = fbank
    x = torch.randn(1, frames, 80, generator=torch.Generator().manual_seed(frames)) + 8
    expected = model.ctc_log_probs(model.encode(x, torch.tensor([frames]), CHUNK, LEFT)[0])
    chunks = -(-subsampled_length(frames, "conv2d") // CHUNK)
    heard = stream_as_sherpa(session_of(folder, "model-streaming.onnx"), x.numpy(), chunks)
    np.testing.assert_allclose(heard, expected.numpy(), atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("offset", [MAX_POSITION - 40, MAX_POSITION + 1000])
def test_an_endless_stream_is_that_of_stream_py(fbank, offset):
    model, folder, _ = fbank
    x = torch.randn(1, 99, 80) + 8
    state = model.stream_state(CHUNK, LEFT)._replace(offset=offset)
    expected = model.ctc_log_probs(model.stream(x, state, last=True)[0])
    session = session_of(folder, "model-streaming.onnx")
    heard = stream_as_sherpa(session, x.numpy(), 6, offset + CACHE)
    np.testing.assert_allclose(heard, expected.numpy(), atol=1e-4)


class WenetRuntime:
    """Does what onnx_asr_model.cc does with encoder.onnx, ctc.onnx and decoder.onnx.

    It knows only the files' metadata, not the model.
    """

    def __init__(self, folder):
        self.encoder, self.ctc, self.decoder = (
            session_of(folder, f"{name}.onnx") for name in ("encoder", "ctc", "decoder")
        )
        self.read = {
            name: int(value)
            for name, value in self.encoder.get_modelmeta().custom_metadata_map.items()
            if value.isdigit()
        }
        self.outs = []

    def forward(self, feats):
        """(1,T,F) -> log-probabilities (T',V); the encoder's output is kept."""
        m = self.read
        chunk = m["chunk_size"]
        left = m["left_chunks"]
        rate = m["subsampling_rate"]
        context = m["right_context"]
        size = chunk * left
        offset = size
        log_probs = []
        att = np.zeros(
            (m["num_blocks"], m["head"], size, m["output_size"] // m["head"] * 2), np.float32
        )
        cnn = np.zeros(
            (m["num_blocks"], 1, m["output_size"], m["cnn_module_kernel"] - 1), np.float32
        )
        for start in range(0, feats.shape[1] - context, chunk * rate):
            mask = np.ones((1, 1, size + chunk), bool)
            index = offset // chunk - left
            mask[..., : max(left - index, 0) * chunk] = False
            window = feats[:, start : start + (chunk - 1) * rate + context + 1]
            out, att, cnn = self.encoder.run(
                None,
                {
                    "chunk": window,
                    "offset": np.array(offset),
                    "required_cache_size": np.array(size),
                    "att_cache": att,
                    "cnn_cache": cnn,
                    "att_mask": mask,
                },
            )
            offset += out.shape[1]
            self.outs.append(out)
            log_probs.append(self.ctc.run(None, {"hidden": out})[0][0])
        return np.concatenate(log_probs)

    def rescore(self, hyps, reverse_weight):
        """Gives the attention decoders' scores of hypotheses, which it pads with 0."""
        lengths = np.array([len(hyp) + 1 for hyp in hyps])
        padded = np.zeros((len(hyps), lengths.max()), np.int64)
        for row, hyp in zip(padded, hyps):
            row[: len(hyp) + 1] = [self.read["sos_symbol"], *hyp]
        names = [node.name for node in self.decoder.get_inputs()]
        inputs = padded, lengths, np.concatenate(self.outs, axis=1)  # in the runtime's order
        left, right = self.decoder.run(None, dict(zip(names, inputs)))
        scores = []
        for hyp, forward, backward in zip(hyps, left, right):
            ahead = self.sum_of(forward, hyp)
            behind = self.sum_of(backward, hyp[::-1])
            scores.append((1 - reverse_weight) * ahead + reverse_weight * behind)
        return scores

    def sum_of(self, log_probs, tokens):
        return sum(
            log_probs[i, token] for i, token in enumerate([*tokens, self.read["eos_symbol"]])
        )


@torch.no_grad()
@pytest.mark.parametrize("samples", [9000, len(SOUND)])
def test_two_passes_as_in_wenet_s_runtime_are_those_of_the_model(fbank, samples):
    """WeNet's C++ itself is not run here."""
    model, folder, _ = fbank
    runtime = WenetRuntime(folder)
    feats = given_of(model, SOUND[:samples])
    log_probs = runtime.forward(feats.numpy())
    memory, lengths = model.encode(feats, torch.tensor([feats.size(1)]), CHUNK, LEFT)
    np.testing.assert_allclose(log_probs, model.ctc_log_probs(memory)[0], atol=1e-4)
    found = model.decode(
        feats,
        torch.tensor([feats.size(1)]),
        "ctc_prefix_beam_search",
        beam_size=4,
        chunk_size=CHUNK,
        left_chunks=LEFT,
    )[0]
    found = found._replace(
        nbest=found.nbest[:3] + [[]], nbest_scores=[0.0] * 4, nbest_times=[[]] * 4
    )
    expected = model.rescore([found], memory, lengths, SearchOptions(ctc_weight=0.0))[0]
    scores = dict(zip(map(tuple, found.nbest), runtime.rescore(found.nbest, 0.3)))
    assert [scores[tuple(tokens)] for tokens in expected.nbest] == pytest.approx(
        expected.nbest_scores, abs=1e-3
    )
    assert max(scores.values()) - min(scores.values()) > 1  # so they tell hypotheses apart


@torch.no_grad()
@pytest.mark.parametrize("samples", [100, 1360, 5000, len(SOUND)])
def test_a_waveform_goes_in_where_features_are_log_mel(log_mel, samples):
    model, folder, _ = log_mel
    feats = extract(model.frontend)(SOUND[:samples])[None]
    out, expected_lengths = model.encode(feats, torch.tensor([feats.size(1)]))
    log_probs, lengths = session_of(folder, "model.onnx").run(
        None, {"waveform": SOUND[:samples].numpy()}
    )
    assert lengths.tolist() == expected_lengths.tolist()
    np.testing.assert_allclose(log_probs, model.ctc_log_probs(out).numpy(), atol=1e-4)


@torch.no_grad()
def test_hear_py_hears_what_the_network_hears(log_mel):
    model, folder, _ = log_mel
    soundfile.write(folder / "sound.wav", SOUND.numpy(), 16000, subtype="FLOAT")
    with_tail = torch.nn.functional.pad(SOUND, (0, model.frontend.tail_samples))
    for name, log_probs in (
        ("model.onnx", network_whole(model, SOUND)),
        ("model-streaming.onnx", model.ctc_log_probs(network_stream(model, CHUNKS, with_tail))),
    ):
        expected = greedy(model, log_probs)
        done = subprocess.run(
            [sys.executable, "hear.py", name, "sound.wav"],
            cwd=folder,
            capture_output=True,
            text=True,
        )
        assert done.stdout == model.tokenizer.decode(expected) + "\n", done.stderr
    assert not list(folder.glob("encoder.onnx"))


def test_hear_py_prints_an_empty_line_for_less_than_an_encoder_frame(bare, monkeypatch, capsys):
    monkeypatch.chdir(bare[1])
    once = functools.cache(onnxruntime.InferenceSession)  # each file is opened for the first sound
    monkeypatch.setattr(onnxruntime, "InferenceSession", once)
    for name in ("model.onnx", "model-streaming.onnx"):
        monkeypatch.setattr(sys, "argv", ["hear.py", name, "sound.wav"])
        for samples in (0, 1, 200, 1000, 1040, 1359):
            soundfile.write("sound.wav", SOUND[5000 : 5000 + samples].numpy(), 16000)
            runpy.run_path("hear.py")
            assert capsys.readouterr().out == "\n", (name, samples)


WAV2VEC2 = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3, "|": 4, "A": 5, "E": 6, "\u0301": 7}
TOKENIZERS = {
    "char": train_char(["a\u0323\u0308 e"]),
    "bpe": train_bpe(["a bad ace"] * 3, 12),
    "wav2vec2": from_vocab(WAV2VEC2, config={"do_lower_case": True}),
}


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_hear_py_writes_what_the_tokenizer_decodes(kind, tmp_path, monkeypatch, capsys):
    """The graph finds each token next to each other one, special tokens and spaces included."""
    tokenizer = TOKENIZERS[kind]
    every = range(tokenizer.vocab_size)
    heard = [i for pair in itertools.permutations(every, 2) for i in pair]
    log_probs = np.eye(len(every))[None, heard]
    session = SimpleNamespace(run=lambda *_: (log_probs, [len(heard)]))
    opened = SimpleNamespace(InferenceSession=lambda _: session)
    monkeypatch.setitem(sys.modules, "onnxruntime", opened)
    monkeypatch.setattr(soundfile, "read", lambda *_, **__: (np.zeros(1), 16000))
    monkeypatch.setattr(sys, "argv", ["hear.py", "model.onnx", "sound.wav"])
    monkeypatch.chdir(tmp_path)
    model = tiny_model(tokenizer)
    for name in ("hear.py", "tokens.txt"):
        Path(name).write_text(export.texts(model, CHUNKS)[name], encoding="utf-8")
    runpy.run_path("hear.py")
    found = greedy(model, torch.tensor(log_probs[0]))
    assert capsys.readouterr().out == tokenizer.decode(found) + "\n"


@torch.no_grad()
def test_the_streaming_graph_forgets_as_a_stream_does(log_mel):
    """The sound gets louder and quieter from window to window, clicks, and has samples of nan."""
    model, folder, _ = log_mel
    sound = torch.cat([gain * SOUND for gain in (3, 3, 0.1, 30, 1)])  # two windows
    sound[100] = 1e4
    sound[40000:40400] = float("nan")
    expected = model.ctc_log_probs(network_stream(model, CHUNKS, sound))
    assert len(expected) > STREAM_WINDOW * 1.5 * 25 and expected.isfinite().all()
    heard = graph_stream(model, session_of(folder, "model-streaming.onnx"), CHUNKS, sound)
    np.testing.assert_allclose(heard, expected, atol=1e-4)


def test_other_sizes_and_kinds(tmp_path):
    """The model differs from the others in every option that may differ."""
    model = exportable_model(
        num_blocks=1,
        cnn_module_norm="batch_norm",
        input_layer="conv2d6",
        activation_type="relu",
        cnn_module_kernel=4,
        reverse_weight=0.0,
        decoder_attention_heads=4,
        features=dict(num_mel_bins=40, sample_rate=8000),
    )
    folder, lines = write(model, tmp_path, ChunkOptions(3, 1))
    assert lines[-1].startswith("decoder.onnx: log-probabilities within")
    decoder = session_of(folder, "decoder.onnx")
    assert decoder.get_modelmeta().custom_metadata_map["is_bidirectional_decoder"] == "0"
    assert decoder.get_outputs()[1].shape == []
    said = (folder / "README.md").read_text()
    assert "--sample-rate=8000 --feat-dim=40" in said and "--wenet-ctc-num-left-chunks=1" in said


# ---- Sherpa-onnx


def test_a_model_with_sherpa_s_filters_differs_from_sherpa_at_the_edges_alone(tmp_path):
    model = exportable_model(num_blocks=1, features=dict(high_freq=-400.0))
    theirs = parity.sherpa_features(model, SOUND)[0]
    ours = extract(model.frontend)(SOUND[40:])  # sherpa-onnx's frames begin 7.5 ms before 0
    torch.testing.assert_close(theirs[1 : 1 + len(ours)], ours, rtol=0, atol=1e-3)
    assert len(theirs) - len(ours) == 2

    folder, lines = write(model, tmp_path)  # not for WeNet, which has other filters
    assert lines[-1].startswith("model-streaming.int8.onnx")
    assert not list(folder.glob("*coder.onnx"))
    said = (folder / "README.md").read_text()
    assert "--high-freq=-400 " in said
    assert "feat_config.high_freq = -400\n" in said and "feat_config.snip_edges = True\n" in said
    assert "decoder_main" not in said


def sounds():
    files = sorted(AN4.glob("*.flac"))[:2]
    return [SOUND, *(torch.from_numpy(soundfile.read(path, dtype="float32")[0]) for path in files)]


@pytest.fixture(scope="module")
def rows(fbank):
    model, folder, _ = fbank
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parity, "write_onnx", copied_onnx(model, CHUNKS, folder))
        # Otherwise both kinds of features write the same file.
        patch.setattr(parity, "write_louder", functools.cache(parity.write_louder))
        return parity.all_outcomes(model, CHUNKS, sounds())


@pytest.mark.parametrize("features", [parity.OWN, parity.SHERPA])
@pytest.mark.parametrize("context", ["full", "chunk"])
def test_every_runtime_hears_the_same_tokens_of_the_same_features(rows, context, features):
    """sherpa-onnx dithers whole recordings, so the row counts in which dither is small."""
    alike = [
        row
        for row in rows
        if row[:2] == (context, features)
        and row.weights == "float32"
        and (context, row.program) != ("full", "sherpa-onnx")
    ]
    programs = ["torch, masked", "torch", "onnxruntime", "sherpa-onnx"]
    if context == "full":
        programs = ["torch", "onnxruntime", "sherpa-onnx, louder"]
    assert [row.program for row in alike] == programs
    assert all(len(tokens) > 5 for tokens in alike[0].tokens)
    assert [row.tokens for row in alike] == [alike[0].tokens] * len(alike)


def test_other_features_are_heard_otherwise(rows):
    """Without a difference here, the test before would show nothing."""
    for context in ("full", "chunk"):
        own, theirs = (
            next(row for row in rows if row[:3] == (context, kind, "torch"))
            for kind in (parity.OWN, parity.SHERPA)
        )
        assert parity.otherwise(own, theirs) > 0


# ---- Refusals


def refused(model, tmp_path, **options):
    with pytest.raises(UserError) as error:
        write(model, tmp_path, **options)
    assert not list(tmp_path.glob("*out*"))  # nor a hidden folder with half of the files
    return one_line(error)


def test_a_graph_that_differs_is_an_error(tmp_path, monkeypatch):
    true = Chunk.positions

    def shifted(before, size, first, width):
        """Computes positions as if sherpa-onnx's offset counted from the first frame on."""
        return true(before, size, first + CACHE, width)

    monkeypatch.setattr(Chunk, "positions", staticmethod(shifted))
    model = exportable_model(num_blocks=1, features=dict(high_freq=-400.0))  # not for WeNet
    assert refused(model, tmp_path).startswith(
        "runs/demo/best.ckpt: model-streaming.onnx: its log-probabilities are up to"
    )


def test_int8_that_hears_otherwise_is_an_error(log_mel, tmp_path, monkeypatch):
    model, folder, _ = log_mel
    monkeypatch.setattr(export, "write_onnx", copied_onnx(model, CHUNKS, folder))
    monkeypatch.setattr(
        export, "check_files", lambda *args: onnx_checks.check_files(*args[:-1], -1.0)
    )
    assert "model.int8.onnx" in refused(model, tmp_path)


def test_the_readme_s_python_gives_sherpa_onnx_the_model_s_features(fbank, rows, monkeypatch):
    model, folder, _ = fbank
    monkeypatch.chdir(folder)
    said = (folder / "README.md").read_text()
    code = said.split("features that it was trained with:")[1].split("\n\n")[1]
    code = "\n".join(line[4:] for line in code.splitlines())
    scope = {"sherpa_onnx": parity.sherpa_onnx}
    exec(code, scope)
    heard = [
        parity.sherpa_stream(model, scope["recognizer"], parity.to_chunks(model, CHUNKS, sound))
        for sound in sounds()
    ]
    assert heard == next(row.tokens for row in rows if row[:3] == ("chunk", parity.OWN, "torch"))


def test_parity_prints_a_table_for_log_mel_too(bare, tmp_path, monkeypatch, capsys):
    """All programs hear the model's tail as part of the sound, and no graph adds it once more."""
    model = exportable_model("log_mel", num_blocks=1, features={"tail_padding": 90})
    monkeypatch.setattr(parity, "write_onnx", copied_onnx(bare[0], CHUNKS, bare[1]))
    path = tmp_path / "model.ckpt"
    save_model(model, path)
    columns = {
        "input_values": [SOUND.tolist()] * 2,
        "length": [len(SOUND)] * 2,
        "labels": [[4]] * 2,
        "text": ["the fox"] * 2,
    }
    datasets.Dataset.from_dict(columns).save_to_disk(str(tmp_path / "data" / "dev" / "0"))
    parity.main(
        [
            "--checkpoint",
            str(path),
            "--data_root",
            str(tmp_path / "data"),
            "--chunk_size",
            "4",
            "--left_chunks",
            "2",
        ]
    )
    said = capsys.readouterr().out
    assert "2 recordings; chunks of 4, 2 to the left" in said
    assert "no rows of sherpa-onnx: it does not compute log_mel" in said
    assert sum(line[:1].isdigit() for line in said.splitlines()) == 8
    for line in ("full; the model's: 2 rows", "chunk; the model's, so far: 3 rows"):
        assert f"{line}, no tokens heard otherwise" in said


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(encoder="transformer"), "its encoder is a transformer"),
        (dict(causal=False), "not causal"),
        (dict(pos_enc_layer_type="abs_pos"), "abs_pos"),
        (dict(selfattention_layer_type="selfattn"), "selfattn"),
        (dict(features=dict(frame_shift=20)), "20 apart"),
        (dict(features=dict(frame_length=10, frame_shift=20)), "leave out the sound between"),
    ],
)
def test_what_the_runtimes_cannot_run_is_refused(tmp_path, monkeypatch, changes, message):
    monkeypatch.setattr(export, "write_graph", None)  # before anything is written
    options = {name: value for name, value in changes.items() if name != "features"}
    model = tiny_model(
        train_char(["a"]),
        dataclasses.replace(TWO_BLOCKS, **options),
        Frontend(frontend="fbank", **changes.get("features", {})),
    )
    assert message in refused(model, tmp_path)


def test_sounds_that_are_missing_or_too_short_are_refused(log_mel, tmp_path, monkeypatch):
    model, folder, _ = log_mel
    monkeypatch.setattr(export, "write_onnx", copied_onnx(model, CHUNKS, folder))
    soundfile.write(tmp_path / "short.wav", np.zeros(900), 16000)
    assert "file missing" in refused(model, tmp_path, audio=(str(tmp_path / "none.wav"),))
    assert "too short" in refused(model, tmp_path, audio=(str(tmp_path / "short.wav"),))


def test_options_are_checked():
    for wrong in (dict(chunk_size=0), dict(left_chunks=0)):
        with pytest.raises(UserError, match=f"--{next(iter(wrong))} 0"):
            ChunkOptions(**wrong)


def test_tokens_are_lines(fbank):
    lines = (fbank[1] / "tokens.txt").read_text().splitlines()
    assert lines[:5] == ["<blank> 0", "<unk> 1", "<sos> 2", "<eos> 3", "\u2581 4"]
    assert len(lines) == 20
    special = dict(blank_id=1, unk_id=2, sos_id=3, eos_id=4, space="|")
    named = Tokenizer(tokens=["|", "<pad>", "<unk>", "<s>", "</s>", "a"], **special)
    assert token_lines(named).splitlines()[:2] == ["\u2581 0", f"{BLANK} 1"]
    with pytest.raises(UserError, match="lines of a tokens.txt"):
        token_lines(Tokenizer(tokens=["|", "<pad>", "<unk>", "<s>", "</s>", "a b"], **special))


def test_the_command_keeps_what_is_there(tmp_path):
    model, path = exportable_model(), tmp_path / "model.ckpt"
    save_model(model, path)
    (tmp_path / "out").mkdir()
    command = [
        "--checkpoint",
        str(path),
        "--out",
        str(tmp_path / "out"),
        "--max_int8_cer",
        "1",
        "--audio",
    ]
    with pytest.raises(UserError, match="out exists; name another folder, or add --overwrite"):
        main(command[:-1])
    with pytest.raises(UserError, match="model.ckpt: --audio nowhere.wav: file missing"):
        main([*command, "nowhere.wav", "--overwrite"])
    (tmp_path / "out" / "thesis.txt").touch()
    with pytest.raises(
        UserError, match="more than an export .thesis.txt., so --overwrite does not replace it"
    ):
        main([*command[:-1], "--overwrite"])
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["thesis.txt"]


def test_the_command_says_who_runs_it(log_mel):
    _, folder, said = log_mel
    assert "checked on 1 recording, 2.1 s" in said and "runs in onnxruntime alone" in said
    assert (folder / "hear.py").is_file()


def test_the_graphs_of_a_wenet_model_give_what_wenet_gives(golden, tmp_path):
    """WeNet gave log-probabilities of padded batches, and the encoder's output chunk by chunk."""
    expected = golden[1]
    model, _, _ = load_wenet(str(ROOT.parent / "shared" / "golden" / "u2pp_conformer"))
    chunks = ChunkOptions(8, 1)
    for graph in (sherpa_graphs(model, chunks)[0], wenet_graphs(model, chunks)[0]):
        write_graph(graph._replace(int8=False), str(tmp_path))
    feats, lengths = expected["feats"], expected["feat_lengths"]
    log_probs, frames = session_of(tmp_path, "model.onnx").run(
        None, {"x": feats.numpy(), "x_lens": lengths.numpy()}
    )
    for heard, meant, count in zip(log_probs, expected["ctc_log_probs_full"], frames):
        np.testing.assert_allclose(heard[:count], meant[:count].numpy(), atol=1e-4)
    outs = []
    encoder = session_of(tmp_path, "encoder.onnx")
    _, _, *caches, _ = cache_inputs(model, chunks, 0).values()
    for index, start in enumerate(range(0, int(frames[0]), 8)):
        offset, size, _, _, mask = cache_inputs(model, chunks, index).values()
        window = feats[:1, start * 4 : min(start * 4 + 35, int(lengths[0]))]
        out, *caches = call(encoder, window, offset[0], size[0], *caches, mask)
        outs.append(out)
    np.testing.assert_allclose(
        torch.cat(outs, dim=1), expected["stream_out_chunk8_left1"], atol=1e-4
    )


def test_a_graph_of_tools_lm_runs_in_sherpa_onnx(fbank, tmp_path):
    """Its streams find what wfst.py finds: the nearest of the words that the graph knows."""
    pytest.importorskip("kaldifst", reason="graphs need kaldifst and kaldi-decoder")
    model, folder, _ = fbank
    given = [parity.to_chunks(model, CHUNKS, sound) for sound in sounds()]
    streams = [network_stream(model, CHUNKS, given_of(model, chunks)) for chunks in given]
    log_probs = [model.ctc_log_probs(encoded).detach() for encoded in streams]  # (T,V) each
    plain = [greedy(model, row) for row in log_probs]
    text, arpa, path, tokenizer = (str(tmp_path / name) for name in ("text", "lm", "fst", "json"))
    Path(text).write_text("".join(f"{model.tokenizer.decode(row[:-1])}\n" for row in plain))
    save_tokenizer(model.tokenizer, tokenizer)
    argv = ["--text", text, "--out", arpa, "--graph", path, "--checkpoint", tokenizer]
    sizes = dict(chunk_size=CHUNK, num_left_chunks=LEFT)
    kind = parity.sherpa_onnx.OnlineRecognizer
    for words in (["--closed"], []):
        lm.main([*argv, *words])
        graph = load_graph(path, model.tokenizer.vocab_size)
        found = [graph.search_one(row, 10, model.tokenizer.blank_id).tokens for row in log_probs]
        assert found == [row[:-1] for row in plain] or not words
        made = parity.recognizer(kind, model, folder, parity.OWN, "model-streaming.onnx", **sizes)
        made.config.ctc_fst_decoder_config.graph = path
        made.recognizer = type(made.recognizer)(made.config)
        assert [parity.sherpa_stream(model, made, chunks) for chunks in given] == found
        os.remove(path)
