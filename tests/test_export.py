"""What export.py writes hears what the network hears: in onnxruntime, called as the runtimes call it, and in sherpa-onnx."""

import subprocess
import sys

import numpy as np
import onnxruntime
import pytest
import soundfile
import torch
import torchaudio.compliance.kaldi as kaldi
from conftest import ROOT

import export
from cli import UserError
from conformer import ModelOptions, subsampled_length
from decode import ctc_greedy_search
from export import BLANK, Chunk, ExportOptions, export as export_model, main, synthetic_sound, token_lines
from model import U2, OptimOptions
from stream import MAX_POSITION
from tokenizer import Tokenizer, train_char
from transforms import Frontend, extract
from wenet_import import load_wenet

TINY = dict(output_size=16, attention_heads=2, linear_units=32, num_blocks=2, cnn_module_kernel=5, decoder_num_blocks=1,
            r_num_blocks=1, decoder_linear_units=32)
CHUNK, LEFT = 4, 2
CACHE = CHUNK * LEFT
SOUND = synthetic_sound(16000, 2.13)  # 52 encoder frames and a bit; 13 chunks
AN4 = ROOT.parent / "shared" / "speech" / "an4" / "dev"


def network(frontend="fbank", seed=0, **changes):
    torch.manual_seed(seed)
    frontend = Frontend(**{"frontend": frontend, **changes.pop("features", {})})
    model = U2(options=ModelOptions(**{**TINY, **changes}), optim=OptimOptions(), frontend=frontend,
               tokenizer=train_char(["the quick brown fox"])).eval()
    if frontend.frontend == "fbank":
        model.set_cmvn(torch.full((frontend.num_mel_bins,), 8.0), torch.full((frontend.num_mel_bins,), 0.3))
    with torch.no_grad():
        model.net.ctc.weight.mul_(8)  # it is sure of its nonsense
        for block in model.net.encoder.blocks:  # and hears positions
            block.self_attn.linear_pos.weight.mul_(4)
    return model


def write(model, folder, **options):
    options = {"out": str(folder / "out"), "chunk_size": CHUNK, "left_chunks": LEFT, "max_int8_cer": 1.0, **options}
    lines = export_model(model, ExportOptions(**options))
    return folder / "out", lines


@pytest.fixture(scope="module")
def fbank(tmp_path_factory):
    model = network()
    return model, *write(model, tmp_path_factory.mktemp("fbank"))


@pytest.fixture(scope="module")
def log_mel(tmp_path_factory):
    model = network("log_mel")
    return model, *write(model, tmp_path_factory.mktemp("log_mel"))


def session_of(folder, name):
    return onnxruntime.InferenceSession(str(folder / name), providers=["CPUExecutionProvider"])


def described(nodes):
    return [(node.name, node.type, len(node.shape)) for node in nodes]


def test_the_files_are_what_sherpa_onnx_reads(fbank):
    _, folder, lines = fbank
    offline, streaming = session_of(folder, "model.onnx"), session_of(folder, "model-streaming.onnx")
    assert described(offline.get_inputs()) == [("x", "tensor(float)", 3), ("x_lens", "tensor(int64)", 1)]
    assert described(offline.get_outputs()) == [("log_probs", "tensor(float)", 3), ("log_probs_lens", "tensor(int64)", 1)]
    assert described(streaming.get_inputs()) == [
        ("x", "tensor(float)", 3), ("offset", "tensor(int64)", 1), ("required_cache_size", "tensor(int64)", 1),
        ("attn_cache", "tensor(float)", 4), ("conv_cache", "tensor(float)", 4), ("attn_mask", "tensor(bool)", 3)]
    assert [node.name for node in streaming.get_outputs()] == ["log_probs", "next_att_cache", "next_conv_cache"]
    expected = dict(model_type="wenet_ctc", version="1", vocab_size="20", subsampling_factor="4", right_context="6")
    metadata = streaming.get_modelmeta().custom_metadata_map
    assert expected.items() <= offline.get_modelmeta().custom_metadata_map.items()
    assert {**expected, "chunk_size": "4", "left_chunks": "2", "head": "2", "num_blocks": "2", "output_size": "16",
            "cnn_module_kernel": "5"}.items() <= metadata.items()
    assert metadata.items() <= session_of(folder, "model-streaming.int8.onnx").get_modelmeta().custom_metadata_map.items()
    for name in ("model", "model-streaming"):
        assert (folder / f"{name}.int8.onnx").is_file()
    assert lines[0].startswith("checked on a synthetic sound")
    assert sum("within" in line for line in lines) == 4 and sum("heard otherwise" in line for line in lines) == 2


def test_the_files_are_what_wenet_s_runtime_reads(fbank):
    _, folder, _ = fbank
    encoder, ctc, decoder = (session_of(folder, f"{name}.onnx") for name in ("encoder", "ctc", "decoder"))
    assert described(encoder.get_inputs()) == [
        ("chunk", "tensor(float)", 3), ("offset", "tensor(int64)", 0), ("required_cache_size", "tensor(int64)", 0),
        ("att_cache", "tensor(float)", 4), ("cnn_cache", "tensor(float)", 4), ("att_mask", "tensor(bool)", 3)]
    assert [node.name for node in encoder.get_outputs()] == ["output", "r_att_cache", "r_cnn_cache"]
    assert described(ctc.get_inputs() + ctc.get_outputs()) == [("hidden", "tensor(float)", 3), ("probs", "tensor(float)", 3)]
    assert described(decoder.get_inputs()) == [
        ("hyps", "tensor(int64)", 2), ("hyps_lens", "tensor(int64)", 1), ("encoder_out", "tensor(float)", 3)]
    assert described(decoder.get_outputs()) == [("score", "tensor(float)", 3), ("r_score", "tensor(float)", 3)]
    metadata = encoder.get_modelmeta().custom_metadata_map
    assert {"output_size": "16", "num_blocks": "2", "head": "2", "cnn_module_kernel": "5", "subsampling_rate": "4",
            "right_context": "6", "sos_symbol": "2", "eos_symbol": "3", "is_bidirectional_decoder": "1", "chunk_size": "4",
            "left_chunks": "2"}.items() <= metadata.items()


@torch.no_grad()
def test_padding_changes_nothing_and_nothing_is_too_short(fbank):
    model, folder, _ = fbank
    lengths = torch.tensor([131, 52, 7, 3])
    x = torch.randn(4, 131, 80) + 8
    log_probs, frames = session_of(folder, "model.onnx").run(None, {"x": x.numpy(), "x_lens": lengths.numpy()})
    assert frames.tolist() == [32, 12, 1, 0]
    for row, length, count in zip(x, lengths, frames):
        out, _ = model.encode(row[None, :length], length[None])
        expected = model.ctc_log_probs(out)[0, :count].numpy()
        np.testing.assert_allclose(log_probs[lengths.tolist().index(length), :count], expected, atol=1e-4)
    log_probs, frames = session_of(folder, "model.onnx").run(None, {"x": x[:1, :3].numpy(), "x_lens": lengths[3:].numpy()})
    assert log_probs.shape == (1, 1, 20) and frames.tolist() == [0]


def stream_as_sherpa(session, x, chunks, offset=CACHE, cache=(2, 2, CACHE, 16), conv=(2, 1, 16, 4)):
    """What sherpa-onnx's C++ does with model-streaming.onnx."""
    caches, outs = [np.zeros(cache, np.float32), np.zeros(conv, np.float32)], []
    for index in range(chunks):
        mask = np.ones((1, 1, CACHE + CHUNK), bool)
        mask[..., :max(CACHE - index * CHUNK, 0)] = False
        window = x[:, index * CHUNK * 4:index * CHUNK * 4 + (CHUNK - 1) * 4 + 7]
        inputs = (window, np.array([offset]), np.array([CACHE]), *caches, mask)
        out, *caches = session.run(None, dict(zip([node.name for node in session.get_inputs()], inputs)))
        assert caches[0].shape == cache and caches[1].shape == conv
        outs.append(out)
        offset += out.shape[1]
    return np.concatenate(outs, axis=1)


@torch.no_grad()
@pytest.mark.parametrize("frames", [7, 19, 60, 131])
def test_chunk_by_chunk_it_is_the_masked_pass_over_the_whole(fbank, frames):
    model, folder, _ = fbank
    x = torch.randn(1, frames, 80, generator=torch.Generator().manual_seed(frames)) + 8
    expected = model.ctc_log_probs(model.encode(x, torch.tensor([frames]), CHUNK, LEFT)[0])
    chunks = -(-subsampled_length(frames, "conv2d") // CHUNK)
    heard = stream_as_sherpa(session_of(folder, "model-streaming.onnx"), x.numpy(), chunks)
    np.testing.assert_allclose(heard, expected.numpy(), atol=1e-4)  # the last chunk is a part of one


@torch.no_grad()
@pytest.mark.parametrize("offset", [MAX_POSITION - 40, MAX_POSITION + 1000])
def test_an_endless_stream_is_that_of_stream_py(fbank, offset):
    model, folder, _ = fbank
    x = torch.randn(1, 99, 80) + 8
    state = model.stream_state(CHUNK, LEFT)._replace(offset=offset)
    expected = model.ctc_log_probs(model.stream(x, state, last=True)[0])
    heard = stream_as_sherpa(session_of(folder, "model-streaming.onnx"), x.numpy(), 6, offset + CACHE)
    np.testing.assert_allclose(heard, expected.numpy(), atol=1e-4)


@torch.no_grad()
def test_the_second_pass_is_that_of_the_model(fbank):
    """Scores summed up as WeNet's runtime does, which pads with 0."""
    model, folder, _ = fbank
    feats = extract(model.frontend)(SOUND)[None]
    memory, lengths = model.encode(feats, torch.tensor([feats.size(1)]), CHUNK, LEFT)
    found = model.decode(feats, torch.tensor([feats.size(1)]), "ctc_prefix_beam_search", beam_size=4)[0]
    found = found._replace(nbest=found.nbest[:3] + [[]], nbest_scores=[0.0] * 4, nbest_times=[[]] * 4)
    expected = model.rescore([found], memory, lengths, 0.0, 0.3)[0]
    hyps = np.zeros((4, max(map(len, found.nbest)) + 1), np.int64)
    hyps[:, 0] = 2
    for row, tokens in zip(hyps, found.nbest):
        row[1:len(tokens) + 1] = tokens
    hyps_lens = np.array([len(tokens) + 1 for tokens in found.nbest])
    inputs = {"hyps": hyps, "hyps_lens": hyps_lens, "encoder_out": memory.numpy()}
    left, right = session_of(folder, "decoder.onnx").run(None, inputs)
    for row, tokens in enumerate(found.nbest):
        scores = [sum(part[row, i, token] for i, token in enumerate([*way, 3]))
                  for part, way in ((left, tokens), (right, tokens[::-1]))]
        place = expected.nbest.index(tokens)
        assert 0.7 * scores[0] + 0.3 * scores[1] == pytest.approx(expected.nbest_scores[place], abs=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("samples", [100, 1360, 5000, len(SOUND)])
def test_a_waveform_goes_in_where_features_are_log_mel(log_mel, samples):
    model, folder, _ = log_mel
    feats = extract(model.frontend)(SOUND[:samples])[None]
    out, expected_lengths = model.encode(feats, torch.tensor([feats.size(1)]))
    log_probs, lengths = session_of(folder, "model.onnx").run(None, {"waveform": SOUND[:samples].numpy()})
    assert lengths.tolist() == expected_lengths.tolist()
    np.testing.assert_allclose(log_probs, model.ctc_log_probs(out).numpy(), atol=1e-4)


@torch.no_grad()
def test_hear_py_hears_what_the_network_hears(log_mel):
    model, folder, _ = log_mel
    soundfile.write(folder / "sound.wav", SOUND.numpy(), 16000, subtype="FLOAT")
    options = ExportOptions(chunk_size=CHUNK, left_chunks=LEFT)
    for name, log_probs in (("model.onnx", export.network_whole(model, SOUND)),
                            ("model-streaming.onnx", model.ctc_log_probs(export.network_stream(model, options, SOUND)))):
        expected = greedy(log_probs)
        done = subprocess.run([sys.executable, "hear.py", name, "sound.wav"], cwd=folder, capture_output=True, text=True)
        assert done.stdout == "".join(token_of(model, i) for i in expected) + "\n", done.stderr
    assert not list(folder.glob("encoder.onnx"))


def greedy(log_probs):
    return ctc_greedy_search(log_probs[None], torch.tensor([len(log_probs)]))[0].tokens


def token_of(model, i):
    return model.tokenizer.tokens[i]


def test_other_sizes_and_kinds(tmp_path):
    """A U2 of every option that is allowed to differ, also as a command."""
    model = network(cnn_module_norm="batch_norm", input_layer="conv2d6", activation_type="relu", cnn_module_kernel=4,
                    reverse_weight=0.0, decoder_attention_heads=4, features=dict(num_mel_bins=40, sample_rate=8000))
    folder, lines = write(model, tmp_path, chunk_size=3, left_chunks=1)
    assert lines[-1].startswith("decoder.onnx: log-probabilities within")
    decoder = session_of(folder, "decoder.onnx")
    assert decoder.get_modelmeta().custom_metadata_map["is_bidirectional_decoder"] == "0"
    assert decoder.get_outputs()[1].shape == []
    said = (folder / "README.md").read_text()
    assert "--sample-rate=8000 --feat-dim=40" in said and "--wenet-ctc-num-left-chunks=1" in said


# ------------------------------------------------------------------------------------------------------- sherpa-onnx


def sherpa_features(sound):
    """Kaldi's with edges mirrored and no mel filter above 7,600 Hz, which Python cannot change."""
    return kaldi.fbank(sound[None] * 32768, num_mel_bins=80, high_freq=-400.0, snip_edges=False, dither=0.0)[None]


def sounds():
    files = sorted(AN4.glob("*.flac"))[:3]
    found = [torch.from_numpy(soundfile.read(path, dtype="float32")[0]) for path in files]
    return [torch.cat((sound, torch.zeros(8000))) for sound in [SOUND, *found]]


@torch.no_grad()
def test_sherpa_onnx_streams_the_same_tokens(fbank):
    sherpa_onnx = pytest.importorskip("sherpa_onnx", reason="sherpa-onnx is not installed")
    model, folder, _ = fbank
    recognizer = sherpa_onnx.OnlineRecognizer.from_wenet_ctc(
        tokens=str(folder / "tokens.txt"), model=str(folder / "model-streaming.onnx"), chunk_size=CHUNK,
        num_left_chunks=LEFT, num_threads=1)
    for sound in sounds():
        stream = recognizer.create_stream()
        stream.accept_waveform(16000, sound.numpy())
        stream.input_finished()
        while recognizer.is_ready(stream):
            recognizer.decode_stream(stream)
        feats, window = sherpa_features(sound), (CHUNK - 1) * 4 + 7
        chunks = -(-(feats.size(1) - window) // (CHUNK * 4))  # it waits for a frame more than the chunk needs
        out, _ = model.stream(feats[:, :(chunks - 1) * CHUNK * 4 + window], model.stream_state(CHUNK, LEFT))
        expected = greedy(model.ctc_log_probs(out)[0])
        assert len(expected) > 5 and recognizer.tokens(stream) == [token_of(model, i) for i in expected]


@torch.no_grad()
def test_sherpa_onnx_hears_the_same_tokens(fbank):
    sherpa_onnx = pytest.importorskip("sherpa_onnx", reason="sherpa-onnx is not installed")
    model, folder, _ = fbank
    recognizer = sherpa_onnx.OfflineRecognizer.from_wenet_ctc(
        tokens=str(folder / "tokens.txt"), model=str(folder / "model.onnx"))
    for sound in sounds():
        sound = sound * 1000  # it adds noise of one step of 16-bit samples, which this drowns
        stream = recognizer.create_stream()
        stream.accept_waveform(16000, sound[:-8000].numpy())
        recognizer.decode_stream(stream)
        feats = sherpa_features(sound[:-8000])
        expected = greedy(model.ctc_log_probs(model.encode(feats, torch.tensor([feats.size(1)]))[0])[0])
        assert len(expected) > 5 and stream.result.tokens == [token_of(model, i) for i in expected]


# ------------------------------------------------------------------------------------------------------- refusals


def refused(model, tmp_path, **options):
    with pytest.raises(UserError) as error:
        write(model, tmp_path, **options)
    assert not list(tmp_path.glob("out*"))  # nor out.partial
    return str(error.value)


def test_a_graph_that_differs_is_an_error(tmp_path, monkeypatch):
    true = Chunk.positions
    monkeypatch.setattr(Chunk, "positions", staticmethod(lambda before, size, first, width: true(
        before, size, first + CACHE, width)))  # as sherpa-onnx's offset has it
    assert refused(network(), tmp_path).startswith("model-streaming.onnx: its log-probabilities are up to")


def test_int8_that_hears_otherwise_is_an_error(tmp_path):
    assert "model.int8.onnx" in refused(network("log_mel"), tmp_path, max_int8_cer=-1.0)


@pytest.mark.parametrize("changes, message", [
    (dict(encoder="transformer"), "its encoder is a transformer"), (dict(causal=False), "not causal"),
    (dict(pos_enc_layer_type="abs_pos"), "abs_pos"), (dict(selfattention_layer_type="selfattn"), "selfattn"),
    (dict(features=dict(frame_shift=20)), "20 apart")])
def test_what_the_runtimes_cannot_run_is_refused(tmp_path, monkeypatch, changes, message):
    monkeypatch.setattr(export, "write_graph", None)  # before anything is written
    model = U2(options=ModelOptions(**{**TINY, **{k: v for k, v in changes.items() if k != "features"}}),
               optim=OptimOptions(), frontend=Frontend(frontend="fbank", **changes.get("features", {})),
               tokenizer=train_char(["a"]))
    assert message in refused(model, tmp_path)


def test_sounds_that_are_missing_or_too_short_are_refused(tmp_path):
    soundfile.write(tmp_path / "short.wav", np.zeros(900), 16000)
    assert "file missing" in refused(network(), tmp_path, audio=(str(tmp_path / "none.wav"),))
    assert "too short" in refused(network("log_mel"), tmp_path, audio=(str(tmp_path / "short.wav"),))


def test_options_are_checked():
    for wrong in (dict(chunk_size=0), dict(left_chunks=0)):
        with pytest.raises(UserError, match=f"--{next(iter(wrong))} 0"):
            ExportOptions(**wrong)


def test_tokens_are_lines(fbank):
    lines = (fbank[1] / "tokens.txt").read_text().splitlines()
    assert lines[:5] == ["<blank> 0", "<unk> 1", "<sos> 2", "<eos> 3", "\u2581 4"] and len(lines) == 20
    special = dict(blank_id=1, unk_id=2, sos_id=3, eos_id=4, space="|")
    named = Tokenizer(tokens=["|", "<pad>", "<unk>", "<s>", "</s>", "a"], **special)
    assert token_lines(named).splitlines()[:2] == ["\u2581 0", f"{BLANK} 1"]
    with pytest.raises(UserError, match="lines of a tokens.txt"):
        token_lines(Tokenizer(tokens=["|", "<pad>", "<unk>", "<s>", "</s>", "a b"], **special))


def test_the_command_keeps_what_is_there(tmp_path):
    model, path = network(), tmp_path / "model.ckpt"
    checkpoint = {"state_dict": model.state_dict()}
    model.on_save_checkpoint(checkpoint)
    torch.save(checkpoint, path)
    (tmp_path / "out").mkdir()
    command = ["--checkpoint", str(path), "--out", str(tmp_path / "out"), "--max_int8_cer", "1", "--audio"]
    with pytest.raises(UserError, match="out exists; name another, or add --overwrite"):
        main(command[:-1])
    with pytest.raises(UserError, match="model.ckpt: --audio nowhere.wav: file missing"):
        main([*command, "nowhere.wav", "--overwrite"])
    (tmp_path / "out" / "thesis.txt").touch()
    with pytest.raises(UserError, match="holds no export, so --overwrite does not replace it"):
        main([*command[:-1], "--overwrite"])
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["thesis.txt"]


def test_the_command_says_who_runs_it(tmp_path, capsys):
    model, path = network("log_mel"), tmp_path / "model.ckpt"
    checkpoint = {"state_dict": model.state_dict()}
    model.on_save_checkpoint(checkpoint)
    torch.save(checkpoint, path)
    soundfile.write(tmp_path / "sound.wav", SOUND.numpy(), 16000)
    (tmp_path / "out").mkdir()
    main(["--checkpoint", str(path), "--out", str(tmp_path / "out"), "--overwrite", "--max_int8_cer", "1",
          "--chunk_size", "4", "--left_chunks", "1", "--audio", str(tmp_path / "sound.wav")])
    said = capsys.readouterr().out
    assert "checked on 1 recording, 2.1 s" in said and "runs in onnxruntime alone" in said
    assert (tmp_path / "out" / "hear.py").is_file()


def test_the_graphs_of_a_wenet_model_give_what_wenet_gives(golden, tmp_path):
    """Its own output: log-probabilities of padded batches, and the encoder chunk by chunk."""
    expected = golden[1]
    model, _, _ = load_wenet(str(ROOT.parent / "shared" / "golden" / "u2pp_conformer"))
    folder, _ = write(model, tmp_path, chunk_size=8, left_chunks=1)
    feats, lengths = expected["feats"], expected["feat_lengths"]
    log_probs, frames = session_of(folder, "model.onnx").run(None, {"x": feats.numpy(), "x_lens": lengths.numpy()})
    for heard, meant, count in zip(log_probs, expected["ctc_log_probs_full"], frames):
        np.testing.assert_allclose(heard[:count], meant[:count].numpy(), atol=1e-4)
    options, outs = ExportOptions(chunk_size=8, left_chunks=1), []
    _, _, *caches, _ = export.cache_inputs(model, options, 0).values()
    for index, start in enumerate(range(0, int(frames[0]), 8)):
        offset, size, _, _, mask = export.cache_inputs(model, options, index).values()
        window = feats[:1, start * 4:min(start * 4 + 35, int(lengths[0]))]
        out, *caches = export.call(session_of(folder, "encoder.onnx"), window, offset[0], size[0], *caches, mask)
        outs.append(out)
    np.testing.assert_allclose(torch.cat(outs, dim=1), expected["stream_out_chunk8_left1"], atol=1e-4)
