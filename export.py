"""A checkpoint for phones and browsers: python export.py --checkpoint runs/demo/best.ckpt --out runs/demo/export

Writes model.onnx (whole recordings), model-streaming.onnx (chunk by chunk), both also in int8, tokens.txt, and a README.md
with the commands that run them. A model on fbank runs in sherpa-onnx, and its encoder.onnx, ctc.onnx and decoder.onnx in
WeNet's onnxruntime runtime, which rescores. A model on log_mel, which neither computes, has its frontend inside the graphs:
they take samples and run in onnxruntime alone.

Before OUT appears, onnxruntime hears the sounds of --audio, whole and chunk by chunk: its log-probabilities must be those of
the network and of stream.py to 1e-4, and int8 must hear the same tokens to --max_int8_cer. Otherwise nothing is left there.
Axes as in conformer.py; S frames that attention sees, those of the cache and the chunk; K kernel of the convolution.
"""

import logging
import math
import os
import shutil
import warnings
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import onnx
import onnxruntime
import torch
import torch.nn.functional as F
import torchaudio
from onnxruntime.quantization import QuantType, quantize_dynamic
from torch import nn

from cli import UserError, build, make_parser, option, run
from conformer import Encoder, receptive_field, reverse, sinusoids_at, subsampled_length
from decode import ctc_greedy_search, ctc_prefix_beam_search
from model import U2, load_checkpoint
from stream import MAX_POSITION
from tokenizer import BPE_SPACE, Tokenizer, unit_lines
from transforms import Frontend, extract, feature_state, log_mel_filters, read_audio, stream_features

OPSET = 17  # the first with LayerNormalization; onnxruntime 1.12 (2022) and later read it
TOLERANCE = 1e-4  # of log-probabilities
UNFIT = "nothing was written; please report it with the checkpoint's options"
BLANK = "<blank>"  # by this name sherpa-onnx finds it


@dataclass(frozen=True)
class ExportOptions:
    checkpoint: str = option("runs/demo/best.ckpt", "checkpoint that train.py wrote")
    out: str = option("runs/demo/export", "folder to make")
    chunk_size: int = option(16, "encoder frames in a chunk of the streaming model")
    left_chunks: int = option(4, "chunks before its own that a frame of the streaming model sees")
    audio: tuple[str, ...] = option((), "recordings to check the export on; none: a synthetic sound")
    max_int8_cer: float = option(0.1, "share of the float models' tokens that int8 may hear otherwise")
    overwrite: bool = option(False, "replace --out")

    def __post_init__(self):
        if self.chunk_size < 1:
            raise UserError(f"--chunk_size {self.chunk_size}: give at least 1 encoder frame")
        if self.left_chunks < 1:
            raise UserError(f"--left_chunks {self.left_chunks}: give at least 1 chunk; sherpa-onnx streams with no other")

    @property
    def cache_size(self) -> int:
        return self.chunk_size * self.left_chunks


# ---------------------------------------------------------------------------------------------------------------------
# The networks as graphs. What is traced must not turn a size into a Python number: it would stay what it was in tracing.


def at_least(x: torch.Tensor, size: int, dim: int) -> torch.Tensor:
    """x with zeros behind it along dim 0 or 1, where it is shorter than `size`."""
    length = x.size(dim)
    keep = length + (size - length) * (length < size)
    padded = torch.cat((x, x.new_zeros(*x.shape[:dim], size, *x.shape[dim + 1:])), dim)
    return padded[:keep] if dim == 0 else padded[:, :keep]


class Offline(nn.Module):
    """Whole recordings, full context."""

    def __init__(self, model: U2):
        super().__init__()
        self.net = model.net

    def forward(self, x, x_lens):
        """x (N,T,F), x_lens (N,) -> log_probs (N,T',V), log_probs_lens (N,)."""
        x = at_least(x, receptive_field(self.net.options.input_layer)[0], dim=1)
        out, lengths = self.net.encode(x, x_lens)
        return self.net.ctc_log_probs(out), lengths


class Chunk(nn.Module):
    """Encoder.forward_chunk with its caches as tensors that start as zeros, in the shapes of WeNet and sherpa-onnx."""

    def __init__(self, encoder: Encoder):
        super().__init__()
        self.encoder = encoder

    def forward(self, x, offset, required_cache_size, attn_cache, conv_cache, attn_mask):
        """x (1,T,F) -> (1,T',D), next_att_cache, next_conv_cache.

        attn_cache (blocks,H,C,2D/H): keys and values side by side. conv_cache (blocks,1,D,K-1). offset counts the encoder
        frames before the chunk, and starts at required_cache_size, as both runtimes have it. attn_mask (1,1,>=S), bool.
        """
        encoder = self.encoder
        x = encoder.subsample(x)
        size, before = x.size(1), attn_cache.size(2)
        mask = attn_mask[:, None, :, :before + size]  # a last, shorter chunk comes with the mask of a whole one
        positions = self.positions(before, size, offset - required_cache_size, x.size(2))
        valid = torch.ones_like(x[..., :1])
        att_caches, conv_caches = [], []
        for i, block in enumerate(encoder.blocks):
            silence = block.conv_module.silence(x)  # what lies before the first frame, for which the caches have zero
            past = attn_cache[i:i + 1].chunk(2, dim=-1), conv_cache[i] + silence
            x, (keys_values, last_inputs) = block(x, positions, mask, valid, past)
            att_caches.append(newest(torch.cat(keys_values, dim=-1), required_cache_size))
            conv_caches.append(last_inputs - silence)
        return encoder.after_norm(x), torch.cat(att_caches), torch.stack(conv_caches)

    @staticmethod
    def positions(before, size, first, width: int):
        """(1,S,D) sinusoids of the frames in the cache and in the chunk, whose first frame is number `first`.

        An endless stream stays at MAX_POSITION, as in stream.py; what is in the cache before the first frame is masked.
        """
        index = torch.arange(before + size) - before + first.clamp(max=MAX_POSITION - size)
        return sinusoids_at(index.clamp(min=0).float(), width)[None]


def newest(cache, size):
    """The last `size` frames of (1,H,S,2D/H)."""
    start = (cache.size(2) - size).clamp(min=0).reshape(())
    return cache[:, :, start:]


class Streaming(nn.Module):
    """Chunk, from features to log-probabilities (1,T',V)."""

    def __init__(self, model: U2):
        super().__init__()
        self.chunk, self.net = Chunk(model.net.encoder), model.net

    def forward(self, *inputs):
        out, *caches = self.chunk(*inputs)
        return self.net.ctc_log_probs(out), *caches


class Ctc(nn.Module):
    def __init__(self, model: U2):
        super().__init__()
        self.net = model.net

    def forward(self, hidden):
        """(1,T',D) -> (1,T',V)."""
        return self.net.ctc_log_probs(hidden)


class Rescoring(nn.Module):
    """The attention decoders on the n-best list of one utterance."""

    def __init__(self, model: U2):
        super().__init__()
        self.net = model.net
        self.two_way = model.options.reverse_weight > 0  # else a right-to-left decoder is there only for keeping

    def forward(self, hyps, hyps_lens, encoder_out):
        """hyps (N,L) with sos in front, hyps_lens (N,) with it, encoder_out (1,T',D) -> the log-probabilities of the tokens
        behind each, (N,L,V) left to right and right to left; the latter is one 0 without such a decoder."""
        memory = encoder_out.expand(hyps.size(0), -1, -1)
        lengths = torch.ones_like(hyps_lens) * encoder_out.size(1)
        score = self.net.decoder(hyps, memory, lengths).log_softmax(-1)
        if not self.two_way:
            return score, score.new_zeros(())
        backward = torch.cat((hyps[:, :1], reverse(hyps[:, 1:], hyps_lens - 1)), dim=1)
        return score, self.net.right_decoder(backward, memory, lengths).log_softmax(-1)


class LogMel(nn.Module):
    """transforms.log_mel on samples, its Fourier transform as a convolution: (n,) -> (1,T,F)."""

    def __init__(self, frontend: Frontend):
        super().__init__()
        length, self.shift = frontend.window_samples, frontend.shift_samples
        window, mel = log_mel_filters(frontend)  # (window,), (bins,F)
        bins = len(mel)
        turns = torch.arange(bins).outer(torch.arange(length)) % length * (2 * math.pi / length)  # reduced, so exact
        waves = torch.cat((turns.double().cos(), turns.double().sin())) * window.double()
        self.register_buffer("waves", waves.float()[:, None])  # (2 bins,1,window)
        self.register_buffer("mel", mel.T[..., None].contiguous())  # (F,bins,1); a convolution, which int8 leaves alone

    def forward(self, samples):
        real, imag = F.conv1d(samples[None, None], self.waves, stride=self.shift).chunk(2, dim=1)  # (1,bins,T) each
        return F.conv1d(real * real + imag * imag, self.mel).log1p().transpose(1, 2)


def moments(samples):
    """(3,) float64: how many samples, their sum, their sum of squares."""
    wide = samples.double()
    return torch.stack((torch.ones_like(wide).sum(), wide.sum(), wide.square().sum()))


def normalize(samples, statistics):
    """Zero mean, unit variance according to `statistics`, as transforms.mean_var_norm and stream_features do it."""
    mean = statistics[1] / statistics[0]
    scale = ((statistics[2] / statistics[0] - mean * mean).clamp(min=0) + 1e-7).rsqrt()
    return (samples - mean.float()) * scale.float()


class OfflineWaveform(nn.Module):
    """Offline with the frontend in front of it."""

    def __init__(self, model: U2):
        super().__init__()
        self.log_mel, self.offline, self.frontend = LogMel(model.frontend), Offline(model), model.frontend

    def forward(self, waveform):
        """(n,) float32 in [-1, 1] -> log_probs (1,T',V), log_probs_lens (1,)."""
        if self.frontend.mean_var_norm:
            waveform = normalize(waveform, moments(waveform))
        feats = self.log_mel(at_least(waveform, self.frontend.window_samples, dim=0))
        return self.offline(feats, torch.ones_like(feats[:, 0, 0], dtype=torch.int64) * feats.size(1))


class StreamingWaveform(nn.Module):
    """Streaming with the frontend in front of it, which has a state of its own: that of transforms.stream_features."""

    def __init__(self, model: U2):
        super().__init__()
        self.log_mel, self.streaming, self.frontend = LogMel(model.frontend), Streaming(model), model.frontend
        self.rate = receptive_field(model.options.input_layer)[1]

    def forward(self, waveform, samples, statistics, feats, *rest):
        """waveform (n,) float32 of a chunk -> log_probs (1,T',V), next_samples, next_statistics, next_feats, caches.

        samples (k,) and feats (1,m,F) are what the last call left, at the beginning empty; statistics (3,) is of `moments`.
        """
        samples = torch.cat((samples, waveform))
        statistics = statistics + moments(waveform)
        new = self.log_mel(normalize(samples, statistics) if self.frontend.mean_var_norm else samples)
        feats = torch.cat((feats, new), dim=1)
        log_probs, *caches = self.streaming(feats, *rest)
        return (log_probs, samples[new.size(1) * self.frontend.shift_samples:], statistics,
                feats[:, log_probs.size(1) * self.rate:], *caches)


# ---------------------------------------------------------------------------------------------------------------------
# What is written


class Graph(NamedTuple):
    """A file to be: its module, example inputs by name, names of outputs, and per name the axes that vary."""

    file: str
    module: nn.Module
    inputs: dict[str, torch.Tensor]
    outputs: tuple[str, ...]
    axes: dict[str, dict[int, str]]
    metadata: dict
    int8: bool = False


def window_frames(model: U2, chunk_size: int) -> int:
    """Feature frames that make a chunk of encoder frames."""
    field, rate = receptive_field(model.options.input_layer)
    return (chunk_size - 1) * rate + field


def piece_samples(model: U2, chunk_size: int) -> tuple[int, int]:
    """Samples that make the first chunk of a stream, and each one after it."""
    frontend, rate = model.frontend, receptive_field(model.options.input_layer)[1]
    first = (window_frames(model, chunk_size) - 1) * frontend.shift_samples + frontend.window_samples
    return first, chunk_size * rate * frontend.shift_samples


def cache_inputs(model: U2, options: ExportOptions, index: int) -> dict[str, torch.Tensor]:
    """The streaming graphs' inputs behind the features for chunk number `index`, but with the caches of chunk 0."""
    o, size = model.options, options.cache_size
    mask = torch.arange(size + options.chunk_size) >= size - index * options.chunk_size
    return {"offset": torch.tensor([size + index * options.chunk_size]), "required_cache_size": torch.tensor([size]),
            "attn_cache": torch.zeros(o.num_blocks, o.attention_heads, size, o.output_size // o.attention_heads * 2),
            "conv_cache": torch.zeros(o.num_blocks, 1, o.output_size, o.cnn_module_kernel - 1),
            "attn_mask": mask[None, None]}


def common_metadata(model: U2) -> dict:
    field, rate = receptive_field(model.options.input_layer)
    return dict(version=1, model_author="lightning-U2", vocab_size=model.tokenizer.vocab_size, subsampling_factor=rate,
                right_context=field - 1)


def streaming_metadata(model: U2, options: ExportOptions) -> dict:
    o = model.options
    return common_metadata(model) | dict(
        comment="streaming", chunk_size=options.chunk_size, left_chunks=options.left_chunks, head=o.attention_heads,
        num_blocks=o.num_blocks, output_size=o.output_size, cnn_module_kernel=o.cnn_module_kernel)


def sherpa_graphs(model: U2, options: ExportOptions) -> list[Graph]:
    """model.onnx and model-streaming.onnx as sherpa-onnx reads them."""
    bins, caches = model.frontend.num_mel_bins, cache_inputs(model, options, 0)
    x = torch.rand(1, window_frames(model, options.chunk_size), bins)
    kind = dict(model_type="wenet_ctc")
    return [
        Graph("model.onnx", Offline(model), {"x": torch.rand(2, 200, bins), "x_lens": torch.tensor([200, 150])},
              ("log_probs", "log_probs_lens"),
              {"x": {0: "N", 1: "T"}, "x_lens": {0: "N"}, "log_probs": {0: "N", 1: "T_out"}, "log_probs_lens": {0: "N"}},
              common_metadata(model) | kind | dict(comment="non-streaming"), int8=True),
        Graph("model-streaming.onnx", Streaming(model), {"x": x, **caches},
              ("log_probs", "next_att_cache", "next_conv_cache"),
              {"x": {1: "T"}, "attn_cache": {2: "C"}, "attn_mask": {2: "S"}, "log_probs": {1: "T_out"},
               "next_att_cache": {2: "C_out"}}, streaming_metadata(model, options) | kind, int8=True)]


def waveform_graphs(model: U2, options: ExportOptions) -> list[Graph]:
    """The same two files with the frontend inside."""
    first, later = piece_samples(model, options.chunk_size)
    kind = dict(model_type="lightning_u2_waveform", sample_rate=model.frontend.sample_rate)
    field, rate = receptive_field(model.options.input_layer)
    samples = torch.rand(model.frontend.window_samples - model.frontend.shift_samples)
    feats = torch.rand(1, field - rate, model.frontend.num_mel_bins)
    state = {"samples": samples, "statistics": moments(samples), "feats": feats}
    return [
        Graph("model.onnx", OfflineWaveform(model), {"waveform": torch.rand(20000)}, ("log_probs", "log_probs_lens"),
              {"waveform": {0: "n"}, "log_probs": {1: "T_out"}}, common_metadata(model) | kind | dict(
                  comment="non-streaming"), int8=True),
        Graph("model-streaming.onnx", StreamingWaveform(model),
              {"waveform": torch.rand(later), **state, **cache_inputs(model, options, 0)},
              ("log_probs", "next_samples", "next_statistics", "next_feats", "next_att_cache", "next_conv_cache"),
              {"waveform": {0: "n"}, "samples": {0: "k"}, "feats": {1: "m"}, "attn_cache": {2: "C"}, "attn_mask": {2: "S"},
               "log_probs": {1: "T_out"}, "next_samples": {0: "k_out"}, "next_feats": {1: "m_out"},
               "next_att_cache": {2: "C_out"}},
              streaming_metadata(model, options) | kind | dict(first_samples=first, chunk_samples=later), int8=True)]


def wenet_graphs(model: U2, options: ExportOptions) -> list[Graph]:
    """encoder.onnx, ctc.onnx and decoder.onnx as WeNet's runtime reads them; there offset and cache size are scalars."""
    width, vocabulary = model.options.output_size, model.tokenizer.vocab_size
    x = torch.rand(1, window_frames(model, options.chunk_size), model.frontend.num_mel_bins)
    offset, size, attn_cache, conv_cache, mask = cache_inputs(model, options, 0).values()
    metadata, memory = wenet_metadata(model, options), torch.rand(1, 50, width)
    return [
        Graph("encoder.onnx", Chunk(model.net.encoder),
              {"chunk": x, "offset": offset[0], "required_cache_size": size[0], "att_cache": attn_cache,
               "cnn_cache": conv_cache, "att_mask": mask}, ("output", "r_att_cache", "r_cnn_cache"),
              {"chunk": {1: "T"}, "att_cache": {2: "T_CACHE"}, "att_mask": {2: "T_ADD_T_CACHE"}, "output": {1: "T_OUT"},
               "r_att_cache": {2: "T_CACHE_OUT"}}, metadata),
        Graph("ctc.onnx", Ctc(model), {"hidden": memory}, ("probs",), {"hidden": {1: "T"}, "probs": {1: "T"}}, metadata),
        Graph("decoder.onnx", Rescoring(model),
              {"hyps": torch.randint(vocabulary, (3, 8)), "hyps_lens": torch.tensor([8, 6, 1]), "encoder_out": memory},
              ("score", "r_score"),
              {"hyps": {0: "NBEST", 1: "L"}, "hyps_lens": {0: "NBEST"}, "encoder_out": {1: "T"},
               "score": {0: "NBEST", 1: "L"}, **({"r_score": {0: "NBEST", 1: "L"}} if metadata["reverse_weight"] else {})},
              metadata)]


def wenet_metadata(model: U2, options: ExportOptions) -> dict:
    o, (field, rate) = model.options, receptive_field(model.options.input_layer)
    two_way = o.reverse_weight > 0
    return dict(
        batch=1, chunk_size=options.chunk_size, left_chunks=options.left_chunks, reverse_weight=o.reverse_weight,
        output_size=o.output_size, num_blocks=o.num_blocks, cnn_module_kernel=o.cnn_module_kernel, head=o.attention_heads,
        feature_size=model.frontend.num_mel_bins, vocab_size=model.tokenizer.vocab_size,
        decoding_window=window_frames(model, options.chunk_size), encoder=o.encoder,
        decoder="bitransformer" if two_way else "transformer", subsampling_rate=rate, right_context=field - 1,
        sos_symbol=model.tokenizer.sos_id, eos_symbol=model.tokenizer.eos_id, is_bidirectional_decoder=int(two_way))


def write_graph(graph: Graph, folder: str) -> None:
    path = os.path.join(folder, graph.file)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's, on tracing and on itself; `check` is what judges the file
        torch.onnx.export(graph.module.eval(), tuple(graph.inputs.values()), path, opset_version=OPSET, dynamo=False,
                          input_names=list(graph.inputs), output_names=list(graph.outputs), dynamic_axes=graph.axes)
    written = onnx.load(path)
    onnx.helper.set_model_props(written, {name: str(value) for name, value in graph.metadata.items()})
    onnx.checker.check_model(written)
    onnx.save(written, path)
    if graph.int8:
        logging.disable(logging.WARNING)  # it recommends a pre-processing that changes nothing here
        quantize_dynamic(path, path.removesuffix(".onnx") + ".int8.onnx", op_types_to_quantize=["MatMul"], per_channel=True,
                         weight_type=QuantType.QInt8)
        logging.disable(logging.NOTSET)


def token_lines(tokenizer: Tokenizer) -> str:
    """tokens.txt: a line `token id` each. Raises UserError where tokens cannot be told apart in it."""
    tokens = [BPE_SPACE if token == tokenizer.space else token for token in tokenizer.tokens]
    tokens[tokenizer.blank_id] = BLANK
    return unit_lines(tokens, "tokens.txt")


# ---------------------------------------------------------------------------------------------------------------------
# What is written hears the same


def synthetic_sound(sample_rate: int, seconds: float = 6.0) -> torch.Tensor:
    """(n,) float32: a voice of gliding harmonics under moving formants, in syllables with pauses, over a little noise."""
    time = torch.arange(int(sample_rate * seconds)) / sample_rate
    pitch = 120 + 30 * (2 * math.pi * 0.4 * time).sin()
    phase = 2 * math.pi * pitch.double().cumsum(0) / sample_rate
    formants = [(500 + 250 * (2 * math.pi * 1.3 * time).sin(), 120), (1500 + 700 * (2 * math.pi * 0.9 * time).cos(), 250)]
    voice = torch.zeros_like(time)
    for harmonic in range(1, 25):
        loudness = sum(torch.exp(-((harmonic * pitch - centre) / width) ** 2) for centre, width in formants)
        voice += (0.02 + loudness) * (harmonic * phase).sin().float() / harmonic**0.5
    syllables = (2 * math.pi * 1.7 * time).sin().clamp(min=0) * ((time % 2.5) < 1.9)
    noise = torch.randn(len(time), generator=torch.Generator().manual_seed(0))
    return 0.1 * syllables * voice + 0.001 * noise


def read_sounds(options: ExportOptions, sample_rate: int) -> list[torch.Tensor]:
    sounds = []
    for path in options.audio:
        try:
            sounds.append(torch.from_numpy(read_audio(path, sample_rate)))
        except UserError as error:
            raise UserError(f"--audio {path}: {error}") from None
    return sounds or [synthetic_sound(sample_rate)]


def call(session, *inputs: torch.Tensor) -> list[torch.Tensor]:
    """The outputs of an onnxruntime session for its inputs in order."""
    names = [node.name for node in session.get_inputs()]
    outputs = session.run(None, {name: value.numpy() for name, value in zip(names, inputs, strict=True)})
    return [torch.from_numpy(np.asarray(out)) for out in outputs]


def open_session(path: str) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


def network_whole(model: U2, sound) -> torch.Tensor:
    """What the network says of a sound (n,), full context: log-probabilities (T',V)."""
    feats = extract(model.frontend)(sound)[None]
    out, lengths = model.encode(feats, torch.tensor([feats.size(1)]))
    return model.ctc_log_probs(out)[0, :lengths[0]]


def graph_whole(model: U2, session, sound) -> torch.Tensor:
    """The same by model.onnx."""
    if model.frontend.frontend == "log_mel":
        log_probs, lengths = call(session, sound)
    else:
        feats = extract(model.frontend)(sound)[None]
        log_probs, lengths = call(session, feats, torch.tensor([feats.size(1)]))
    return log_probs[0, :lengths[0]]


def windows(model: U2, options: ExportOptions, sound) -> list[torch.Tensor]:
    """What the streaming graphs are given of a sound, chunk by chunk: features (1,T,F) that overlap, or samples (n,) that
    do not. The last may be shorter."""
    feats, rate = extract(model.frontend)(sound)[None], receptive_field(model.options.input_layer)[1]
    starts = range(0, int(subsampled_length(feats.size(1), model.options.input_layer)), options.chunk_size)
    if model.frontend.frontend == "log_mel":
        first, later = piece_samples(model, options.chunk_size)
        return [sound[:first], *sound[first:].split(later)][:len(starts)]
    size = window_frames(model, options.chunk_size)
    return [feats[:, start * rate:start * rate + size] for start in starts]


def network_stream(model: U2, options: ExportOptions, sound) -> torch.Tensor:
    """What the network says of a sound heard chunk by chunk, by stream.py: encoder output (T',D)."""
    state = model.stream_state(options.chunk_size, options.left_chunks)
    if model.frontend.frontend == "fbank":
        return model.stream(extract(model.frontend)(sound)[None], state, last=True)[0][0]
    advance, features_state, outs = stream_features(model.frontend), feature_state(), []
    pieces = windows(model, options, sound)
    for number, piece in enumerate(pieces, 1):
        feats, features_state = advance(piece, features_state)
        out, state = model.stream(feats[None], state, last=number == len(pieces))
        outs.append(out)
    return torch.cat(outs, dim=1)[0]


def graph_stream(model: U2, session, options: ExportOptions, sound) -> torch.Tensor:
    """The same by model-streaming.onnx (log-probabilities) or encoder.onnx, called as the runtimes call them."""
    scalar = not session.get_inputs()[-5].shape  # offset, in WeNet's runtime
    kept, outs = [], []  # what a frontend inside the graph keeps
    if model.frontend.frontend == "log_mel":
        kept = [torch.zeros(0), torch.zeros(3, dtype=torch.float64), torch.zeros(1, 0, model.frontend.num_mel_bins)]
    _, _, *caches, _ = cache_inputs(model, options, 0).values()
    for index, window in enumerate(windows(model, options, sound)):
        offset, size, _, _, mask = cache_inputs(model, options, index).values()
        counts = (offset[0], size[0]) if scalar else (offset, size)
        out, *kept = call(session, window, *kept, *counts, *caches, mask)
        kept, caches = kept[:-2], kept[-2:]
        outs.append(out)
    return torch.cat(outs, dim=1)[0]


def compare(file: str, theirs: list[torch.Tensor], ours: list[torch.Tensor]) -> str:
    """A line on how far a file's log-probabilities are from the network's. Raises UserError where that is too far."""
    for a, b in zip(theirs, ours, strict=True):
        if a.shape != b.shape:
            raise UserError(f"{file}: it gives {tuple(a.shape)} log-probabilities, the network {tuple(b.shape)}; {UNFIT}")
    largest = max(float((a - b).abs().max()) for a, b in zip(theirs, ours))
    if not largest <= TOLERANCE:  # nan is no agreement
        raise UserError(f"{file}: its log-probabilities are up to {largest:.1e} from the network's, more than {TOLERANCE}; "
                        f"{UNFIT}")
    return f"{file}: log-probabilities within {largest:.1e} of the network's"


def compare_tokens(file: str, theirs: list[torch.Tensor], ours: list[torch.Tensor], blank_id: int, limit: float) -> str:
    """A line on how many tokens of greedy search an int8 file hears as the network. Raises UserError above `limit`."""
    errors = total = 0
    for a, b in zip(theirs, ours, strict=True):
        heard, meant = (ctc_greedy_search(x[None], torch.tensor([len(x)]), blank_id)[0].tokens for x in (a, b))
        errors, total = errors + torchaudio.functional.edit_distance(heard, meant), total + len(meant)
    frames = torch.cat([a.argmax(-1) == b.argmax(-1) for a, b in zip(theirs, ours)]).float().mean()
    said = f"{errors} of {total} tokens heard otherwise, {float(frames):.2%} of frames alike"
    if not errors <= limit * max(total, 1):
        raise UserError(f"{file}: {said}; --max_int8_cer allows {limit}; give real speech in --audio, or allow more")
    return f"{file}: {said}"


@torch.no_grad()
def check(model: U2, options: ExportOptions, folder: str, sounds: list[torch.Tensor]) -> list[str]:
    """What onnxruntime hears with the files in `folder`, against the network: a line per file. Raises UserError."""
    for sound in sounds:
        if not windows(model, options, sound):
            raise UserError(f"a sound of {len(sound)} samples is too short to check anything on; name others in --audio")
    streams = [network_stream(model, options, sound) for sound in sounds]
    lines = []
    for file, ours, hear in (
            ("model", [network_whole(model, sound) for sound in sounds], graph_whole),
            ("model-streaming", [model.ctc_log_probs(out) for out in streams],
             lambda model, session, sound: graph_stream(model, session, options, sound))):
        for name in (f"{file}.onnx", f"{file}.int8.onnx"):
            session = open_session(os.path.join(folder, name))
            theirs = [hear(model, session, sound) for sound in sounds]
            lines.append(compare_tokens(name, theirs, ours, model.net.blank_id, options.max_int8_cer)
                         if "int8" in name else compare(name, theirs, ours))
    if model.frontend.frontend == "fbank":
        lines += check_second_pass(model, options, folder, sounds, streams)
    return lines


def check_second_pass(model: U2, options: ExportOptions, folder: str, sounds, streams) -> list[str]:
    """encoder.onnx and ctc.onnx one behind the other, and decoder.onnx on the n-best list of each sound."""
    encoder, ctc, decoder = (open_session(os.path.join(folder, f"{name}.onnx")) for name in ("encoder", "ctc", "decoder"))
    outs = [graph_stream(model, encoder, options, sound)[None] for sound in sounds]
    theirs = [call(ctc, out)[0][0] for out in outs]
    lines = [compare("encoder.onnx and ctc.onnx", theirs, [model.ctc_log_probs(out) for out in streams])]
    scores, expected = [], []
    for out, log_probs in zip(outs, theirs):
        found = ctc_prefix_beam_search(log_probs[None], torch.tensor([len(log_probs)]), 5, model.net.blank_id)[0].nbest
        lengths = torch.tensor([len(tokens) + 1 for tokens in found])
        valid = torch.arange(lengths.max()) < lengths[:, None]  # (N,L)
        hyps = with_sos(model, found)
        scores += [score[valid] for score in call(decoder, hyps, lengths, out)[:1 + (model.options.reverse_weight > 0)]]
        memory, frames = out.expand(len(found), -1, -1), torch.full_like(lengths, out.size(1))
        expected.append(model.net.decoder(hyps, memory, frames).log_softmax(-1)[valid])
        if model.options.reverse_weight > 0:
            hyps = with_sos(model, [tokens[::-1] for tokens in found])
            expected.append(model.net.right_decoder(hyps, memory, frames).log_softmax(-1)[valid])
    return [*lines, compare("decoder.onnx", scores, expected)]


def with_sos(model: U2, sequences: list[list[int]]) -> torch.Tensor:
    """(N,L) with sos in front and eos behind the shorter ones."""
    rows = [torch.tensor([model.net.sos_id, *tokens]) for tokens in sequences]
    return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=model.net.eos_id)


# ---------------------------------------------------------------------------------------------------------------------
# The command


def check_supported(model: U2) -> None:
    """Raises UserError for what sherpa-onnx and WeNet's runtime have no place for."""
    o, frontend = model.options, model.frontend
    if o.encoder != "conformer" or not o.causal:
        raise UserError(f"its encoder is a {o.encoder}{'' if o.causal else ' that is not causal'}; what is exported must "
                        "stream: train with --encoder conformer --causal")
    if (o.pos_enc_layer_type, o.selfattention_layer_type) != ("rel_pos", "rel_selfattn"):
        raise UserError(f"its positions are {o.pos_enc_layer_type} with {o.selfattention_layer_type}; only rel_pos with "
                        "rel_selfattn is exported")
    if frontend.frontend == "fbank" and (frontend.frame_length, frontend.frame_shift) != (25, 10):
        raise UserError(f"its frames are {frontend.frame_length} ms long and {frontend.frame_shift} apart; sherpa-onnx and "
                        "WeNet's runtime have 25 and 10")


SHERPA_README = """# A speech recognition model in ONNX

Made by export.py of lightning-U2. The files ending in `.int8.onnx` are smaller and can take the place of those without.
The first two programs come with `pip install sherpa-onnx-bin`, the third is WeNet's onnxruntime runtime. FILE.wav is mono.

    # whole recordings
    sherpa-onnx-offline --tokens=tokens.txt --wenet-ctc-model=model.onnx {flags} FILE.wav

    # as they are spoken; the sizes of chunks are not read from the model
    sherpa-onnx --tokens=tokens.txt --wenet-ctc-model=model-streaming.onnx \\
      --wenet-ctc-chunk-size={chunk_size} --wenet-ctc-num-left-chunks={left_chunks} {flags} FILE.wav

    # the same with a second pass by encoder.onnx, ctc.onnx and decoder.onnx
    decoder_main --onnx_dir . --unit_path tokens.txt --chunk_size {chunk_size} --num_left_chunks {left_chunks} \\
      --blank_id {blank_id} --reverse_weight {reverse_weight} --num_bins {bins} --sample_rate {rate} --wav_path FILE.wav

`--high-freq=0` gives the model the mel filters that it was trained with; sherpa-onnx in Python has no such argument, and
hears slightly different features. There, from_wenet_ctc takes chunk_size={chunk_size} and num_left_chunks={left_chunks}
of the streaming model. A stream is heard to its end when about 0.7 s of silence follow.
"""

WAVEFORM_README = """# A speech recognition model in ONNX

Made by export.py of lightning-U2. Its features (log_mel) are computed inside the graphs, so these run in onnxruntime alone,
not in sherpa-onnx or WeNet's runtime. The files ending in `.int8.onnx` are smaller and can take the place of those without.
FILE.wav is mono with {rate} samples per second. `hear.py` shows how the graphs are called, in few lines of NumPy.

    pip install onnxruntime soundfile
    python hear.py model.onnx FILE.wav
    python hear.py model-streaming.onnx FILE.wav
"""

HEAR_PY = '''import sys

import numpy as np
import onnxruntime
import soundfile

model, path = sys.argv[1:]
session = onnxruntime.InferenceSession(model)
samples, rate = soundfile.read(path, dtype="float32")
assert rate == {rate} and samples.ndim == 1
if "streaming" not in model:
    log_probs = session.run(None, dict(waveform=samples))[0]
else:
    chunk, cache = {chunk_size}, {cache_size}  # encoder frames
    size, least = {first}, {first_least}  # samples of the first chunk, and of a first chunk that is the last as well
    kept = [np.zeros(0, "f"), np.zeros(3), np.zeros((1, 0, {bins}), "f")]
    caches = [np.zeros({attn_shape}, "f"), np.zeros({conv_shape}, "f")]
    offset, found = cache, []
    while len(samples) >= least:
        mask = np.arange(cache + chunk) >= 2 * cache - offset  # the cache has nothing yet at its beginning
        inputs = samples[:size], *kept, np.array([offset]), np.array([cache]), *caches, mask[None, None]
        outputs = session.run(None, dict(zip((node.name for node in session.get_inputs()), inputs)))
        found.append(outputs[0])
        kept, caches, samples, offset = outputs[1:4], outputs[4:], samples[size:], offset + chunk
        size, least = {later}, {later_least}
    log_probs = np.concatenate(found, axis=1)
with open("tokens.txt", encoding="utf-8") as file:
    tokens = [line.split()[0] for line in file]
best = log_probs[0].argmax(-1).tolist()
print("".join(tokens[i] for i, before in zip(best, [-1, *best]) if i not in (before, {blank_id})).replace("\u2581", " "))
'''


def texts(model: U2, options: ExportOptions) -> dict[str, str]:
    """tokens.txt and what says how to run the graphs, by file name."""
    frontend, (first, later), (first_least, later_least) = (
        model.frontend, piece_samples(model, options.chunk_size), piece_samples(model, 1))
    _, _, attn_cache, conv_cache, _ = cache_inputs(model, options, 0).values()
    flags = [f"--sample-rate={frontend.sample_rate}"] * (frontend.sample_rate != 16000)
    flags += [f"--feat-dim={frontend.num_mel_bins}"] * (frontend.num_mel_bins != 80) + ["--high-freq=0"]
    values = dict(
        flags=" ".join(flags), bins=frontend.num_mel_bins, rate=frontend.sample_rate, blank_id=model.net.blank_id,
        chunk_size=options.chunk_size, left_chunks=options.left_chunks, cache_size=options.cache_size, first=first,
        later=later, first_least=first_least, later_least=later_least, reverse_weight=model.options.reverse_weight,
        attn_shape=tuple(attn_cache.shape), conv_shape=tuple(conv_cache.shape))
    templates = {"README.md": SHERPA_README}
    if frontend.frontend == "log_mel":
        templates = {"README.md": WAVEFORM_README, "hear.py": HEAR_PY}
    return {"tokens.txt": token_lines(model.tokenizer)} | {
        name: template.format(**values) for name, template in templates.items()}


def write_files(model: U2, options: ExportOptions, folder: str) -> None:
    for name, text in texts(model, options).items():
        with open(os.path.join(folder, name), "w", encoding="utf-8") as file:
            file.write(text)
    inside = model.frontend.frontend == "log_mel"
    graphs = waveform_graphs if inside else lambda *args: sherpa_graphs(*args) + wenet_graphs(*args)
    for graph in graphs(model, options):
        write_graph(graph, folder)


def check_place(options: ExportOptions) -> None:
    if not os.path.exists(options.out):
        return
    if not options.overwrite:
        raise UserError(f"--out {options.out} exists; name another, or add --overwrite")
    if not os.path.isdir(options.out) or os.listdir(options.out) and "model.onnx" not in os.listdir(options.out):
        raise UserError(f"--out {options.out} holds no export, so --overwrite does not replace it; name another")


def export(model: U2, options: ExportOptions) -> list[str]:
    """Writes OUT once everything in it is checked; -> what to say of it. Raises UserError, and then OUT is as before."""
    check_supported(model)
    check_place(options)
    sounds, partial = read_sounds(options, model.frontend.sample_rate), options.out.rstrip("/") + ".partial"
    try:
        shutil.rmtree(partial, ignore_errors=True)
        os.makedirs(partial)
        write_files(model, options, partial)
        lines = check(model, options, partial, sounds)
        shutil.rmtree(options.out, ignore_errors=True)
        os.rename(partial, options.out)
    except OSError as error:
        raise UserError(f"cannot write {error.filename or options.out}: {error.strerror}") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    seconds = sum(map(len, sounds)) / model.frontend.sample_rate
    heard = f"{len(sounds)} recording{'s' * (len(sounds) > 1)}" if options.audio else "a synthetic sound"
    return [f"checked on {heard}, {seconds:.1f} s:", *lines]


def main(argv: list[str]) -> None:
    options = build(ExportOptions, vars(make_parser(__doc__, ExportOptions).parse_args(argv)))
    model, _, frontend = load_checkpoint(options.checkpoint)
    try:
        lines = export(model, options)
    except UserError as error:
        raise UserError(f"{options.checkpoint}: {error}") from None
    print("\n".join(lines))
    programs = ("onnxruntime alone: sherpa-onnx and WeNet's runtime do not compute log_mel" if frontend.frontend == "log_mel"
                else "sherpa-onnx (model*.onnx) and WeNet's onnxruntime runtime (encoder.onnx, ctc.onnx, decoder.onnx)")
    print(f"{options.out}: runs in {programs}; its README.md has the commands")


if __name__ == "__main__":
    run(main)
