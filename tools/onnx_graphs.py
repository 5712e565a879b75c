"""The networks as ONNX graphs: in the names, shapes and metadata of sherpa-onnx, and of WeNet's onnxruntime runtime.

What is traced must not turn a size into a Python number: it would stay what it was in tracing.
Axes as in conformer.py; S frames that attention sees, those of the cache and the chunk; K kernel of the convolution.
"""

import logging
import math
import os
import warnings
from typing import NamedTuple

from cli import UserError, option, options_class

import onnx
import torch
import torch.nn.functional as F
from onnxruntime.quantization import QuantType, quantize_dynamic
from torch import nn

from conformer import MAX_POSITION, BlockState, Encoder, receptive_field, reverse, sinusoids_at
from model import U2
from stream import piece_samples
from transforms import (
    STREAM_WINDOW,
    Frontend,
    bounded,
    feature_state,
    log_mel_filters,
    moments,
    normalize,
    peak_of,
)

OPSET = 17  # the first with LayerNormalization; onnxruntime 1.12 (2022) and later read it


@options_class
class ChunkOptions:
    """What a streaming graph is made for."""

    chunk_size: int = option(
        16, "encoder frames in a chunk of the streaming model", at_least=1, at_most=1000
    )
    left_chunks: int = option(
        4,
        "chunks before its own that a frame of the streaming model sees",
        at_least=1,
        at_most=1000,
    )

    def __post_init__(self):
        if self.cache_size + self.chunk_size > MAX_POSITION:
            raise UserError(
                f"--chunk_size {self.chunk_size} --left_chunks {self.left_chunks}: they span "
                f"{self.cache_size + self.chunk_size} encoder frames; at most {MAX_POSITION} can be told apart"
            )

    @property
    def cache_size(self) -> int:
        return self.chunk_size * self.left_chunks


def at_least(x: torch.Tensor, size: int, dim: int) -> torch.Tensor:
    """x with zeros behind it along dim 0 or 1, where it is shorter than `size`."""
    length = x.size(dim)
    keep = length + (size - length) * (length < size)
    padded = torch.cat((x, x.new_zeros(*x.shape[:dim], size, *x.shape[dim + 1 :])), dim)
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
        mask = attn_mask[
            :, None, :, : before + size
        ]  # a last, shorter chunk comes with the mask of a whole one
        positions = self.positions(before, size, offset - required_cache_size, x.size(2))
        valid = torch.ones_like(x[..., :1])
        att_caches, conv_caches = [], []
        for i, block in enumerate(encoder.blocks):
            silence = block.conv_module.silence(
                x
            )  # what lies before the first frame, for which the caches have zero
            keys, values = attn_cache[i : i + 1].chunk(2, dim=-1)
            past = BlockState(keys, values, convolution=conv_cache[i] + silence)
            x, state = block(x, positions, mask, valid, past)
            keys_values = torch.cat((state.keys, state.values), dim=-1)
            att_caches.append(newest(keys_values, required_cache_size))
            conv_caches.append(state.convolution - silence)
        return encoder.after_norm(x), torch.cat(att_caches), torch.stack(conv_caches)

    @staticmethod
    def positions(before, size, first, width: int):
        """(1,S,D) sinusoids of the frames in the cache and in the chunk, whose first frame is number `first`.

        An endless stream stays at MAX_POSITION, as in Encoder.stream; what is in the cache before the first frame is masked.
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
        self.two_way = (
            model.options.reverse_weight > 0
        )  # else a right-to-left decoder is there only for keeping

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
        turns = (
            torch.arange(bins).outer(torch.arange(length)) % length * (2 * math.pi / length)
        )  # reduced, so exact
        waves = torch.cat((turns.double().cos(), turns.double().sin())) * window.double()
        self.register_buffer("waves", waves.float()[:, None])  # (2 bins,1,window)
        self.register_buffer(
            "mel", mel.T[..., None].contiguous()
        )  # (F,bins,1); a convolution, which int8 leaves alone

    def forward(self, samples):
        real, imag = F.conv1d(samples[None, None], self.waves, stride=self.shift).chunk(
            2, dim=1
        )  # (1,bins,T) each
        return F.conv1d(real * real + imag * imag, self.mel).log1p().transpose(1, 2)


class OfflineWaveform(nn.Module):
    """Offline with the frontend in front of it."""

    def __init__(self, model: U2):
        super().__init__()
        self.log_mel, self.offline, self.frontend = (
            LogMel(model.frontend),
            Offline(model),
            model.frontend,
        )

    def forward(self, waveform):
        """(n,) float32 in [-1, 1] -> log_probs (1,T',V), log_probs_lens (1,)."""
        if self.frontend.mean_var_norm:
            nothing = feature_state().statistics
            waveform = normalize(
                waveform, moments(waveform, nothing, window=math.inf, peak=math.inf)
            )
        feats = self.log_mel(at_least(waveform, self.frontend.window_samples, dim=0))
        return self.offline(
            feats, torch.ones_like(feats[:, 0, 0], dtype=torch.int64) * feats.size(1)
        )


class StreamingWaveform(nn.Module):
    """Streaming with the frontend in front of it, which has a state of its own: that of transforms.stream_features."""

    def __init__(self, model: U2):
        super().__init__()
        self.log_mel, self.streaming, self.frontend = (
            LogMel(model.frontend),
            Streaming(model),
            model.frontend,
        )
        self.rate = receptive_field(model.options.input_layer)[1]

    def forward(self, waveform, samples, statistics, feats, *rest):
        """waveform (n,) float32 of a chunk -> log_probs (1,T',V), next_samples, next_statistics, next_feats, caches.

        samples (k,) and feats (1,m,F) are what the last call left, at the beginning empty; statistics (3,)
        is of transforms.moments, at the beginning zeros.
        """
        waveform = bounded(waveform)
        samples = torch.cat((samples, waveform))
        window = STREAM_WINDOW * self.frontend.sample_rate
        statistics = moments(waveform, statistics, window, peak_of(waveform))
        new = self.log_mel(
            normalize(samples, statistics) if self.frontend.mean_var_norm else samples
        )
        feats = torch.cat((feats, new), dim=1)
        log_probs, *caches = self.streaming(feats, *rest)
        return (
            log_probs,
            samples[new.size(1) * self.frontend.shift_samples :],
            statistics,
            feats[:, log_probs.size(1) * self.rate :],
            *caches,
        )


# ---------------------------------------------------------------------------------------------------------------------
# The files


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


def cache_inputs(model: U2, chunks: ChunkOptions, index: int) -> dict[str, torch.Tensor]:
    """The streaming graphs' inputs behind the features for chunk number `index`, but with the caches of chunk 0."""
    o, size = model.options, chunks.cache_size
    mask = torch.arange(size + chunks.chunk_size) >= size - index * chunks.chunk_size
    return {
        "offset": torch.tensor([size + index * chunks.chunk_size]),
        "required_cache_size": torch.tensor([size]),
        "attn_cache": torch.zeros(
            o.num_blocks, o.attention_heads, size, o.output_size // o.attention_heads * 2
        ),
        "conv_cache": torch.zeros(o.num_blocks, 1, o.output_size, o.cnn_module_kernel - 1),
        "attn_mask": mask[None, None],
    }


def common_metadata(model: U2) -> dict:
    field, rate = receptive_field(model.options.input_layer)
    return dict(
        version=1,
        model_author="lightning-U2",
        vocab_size=model.tokenizer.vocab_size,
        subsampling_factor=rate,
        right_context=field - 1,
    )


def streaming_metadata(model: U2, chunks: ChunkOptions) -> dict:
    o = model.options
    return common_metadata(model) | dict(
        comment="streaming",
        chunk_size=chunks.chunk_size,
        left_chunks=chunks.left_chunks,
        head=o.attention_heads,
        num_blocks=o.num_blocks,
        output_size=o.output_size,
        cnn_module_kernel=o.cnn_module_kernel,
    )


def sherpa_graphs(model: U2, chunks: ChunkOptions) -> list[Graph]:
    """model.onnx and model-streaming.onnx as sherpa-onnx reads them."""
    bins, caches = model.frontend.num_mel_bins, cache_inputs(model, chunks, 0)
    x = torch.rand(1, window_frames(model, chunks.chunk_size), bins)
    kind = dict(model_type="wenet_ctc")
    return [
        Graph(
            "model.onnx",
            Offline(model),
            {"x": torch.rand(2, 200, bins), "x_lens": torch.tensor([200, 150])},
            ("log_probs", "log_probs_lens"),
            {
                "x": {0: "N", 1: "T"},
                "x_lens": {0: "N"},
                "log_probs": {0: "N", 1: "T_out"},
                "log_probs_lens": {0: "N"},
            },
            common_metadata(model) | kind | dict(comment="non-streaming"),
            int8=True,
        ),
        Graph(
            "model-streaming.onnx",
            Streaming(model),
            {"x": x, **caches},
            ("log_probs", "next_att_cache", "next_conv_cache"),
            {
                "x": {1: "T"},
                "attn_cache": {2: "C"},
                "attn_mask": {2: "S"},
                "log_probs": {1: "T_out"},
                "next_att_cache": {2: "C_out"},
            },
            streaming_metadata(model, chunks) | kind,
            int8=True,
        ),
    ]


def waveform_graphs(model: U2, chunks: ChunkOptions) -> list[Graph]:
    """The same two files with the frontend inside."""
    first, later = piece_samples(model, chunks.chunk_size)
    kind = dict(model_type="lightning_u2_waveform", sample_rate=model.frontend.sample_rate)
    field, rate = receptive_field(model.options.input_layer)
    samples = torch.rand(model.frontend.window_samples - model.frontend.shift_samples)
    feats = torch.rand(1, field - rate, model.frontend.num_mel_bins)
    state = {**feature_state()._asdict(), "samples": samples, "feats": feats}
    return [
        Graph(
            "model.onnx",
            OfflineWaveform(model),
            {"waveform": torch.rand(20000)},
            ("log_probs", "log_probs_lens"),
            {"waveform": {0: "n"}, "log_probs": {1: "T_out"}},
            common_metadata(model) | kind | dict(comment="non-streaming"),
            int8=True,
        ),
        Graph(
            "model-streaming.onnx",
            StreamingWaveform(model),
            {"waveform": torch.rand(later), **state, **cache_inputs(model, chunks, 0)},
            (
                "log_probs",
                "next_samples",
                "next_statistics",
                "next_feats",
                "next_att_cache",
                "next_conv_cache",
            ),
            {
                "waveform": {0: "n"},
                "samples": {0: "k"},
                "feats": {1: "m"},
                "attn_cache": {2: "C"},
                "attn_mask": {2: "S"},
                "log_probs": {1: "T_out"},
                "next_samples": {0: "k_out"},
                "next_feats": {1: "m_out"},
                "next_att_cache": {2: "C_out"},
            },
            streaming_metadata(model, chunks)
            | kind
            | dict(first_samples=first, chunk_samples=later),
            int8=True,
        ),
    ]


def wenet_graphs(model: U2, chunks: ChunkOptions) -> list[Graph]:
    """encoder.onnx, ctc.onnx and decoder.onnx as WeNet's runtime reads them; there offset and cache size are scalars."""
    width, vocabulary = model.options.output_size, model.tokenizer.vocab_size
    x = torch.rand(1, window_frames(model, chunks.chunk_size), model.frontend.num_mel_bins)
    offset, size, attn_cache, conv_cache, mask = cache_inputs(model, chunks, 0).values()
    metadata, memory = wenet_metadata(model, chunks), torch.rand(1, 50, width)
    return [
        Graph(
            "encoder.onnx",
            Chunk(model.net.encoder),
            {
                "chunk": x,
                "offset": offset[0],
                "required_cache_size": size[0],
                "att_cache": attn_cache,
                "cnn_cache": conv_cache,
                "att_mask": mask,
            },
            ("output", "r_att_cache", "r_cnn_cache"),
            {
                "chunk": {1: "T"},
                "att_cache": {2: "T_CACHE"},
                "att_mask": {2: "T_ADD_T_CACHE"},
                "output": {1: "T_OUT"},
                "r_att_cache": {2: "T_CACHE_OUT"},
            },
            metadata,
        ),
        Graph(
            "ctc.onnx",
            Ctc(model),
            {"hidden": memory},
            ("probs",),
            {"hidden": {1: "T"}, "probs": {1: "T"}},
            metadata,
        ),
        Graph(
            "decoder.onnx",
            Rescoring(model),
            {
                "hyps": torch.randint(vocabulary, (3, 8)),
                "hyps_lens": torch.tensor([8, 6, 1]),
                "encoder_out": memory,
            },
            ("score", "r_score"),
            {
                "hyps": {0: "NBEST", 1: "L"},
                "hyps_lens": {0: "NBEST"},
                "encoder_out": {1: "T"},
                "score": {0: "NBEST", 1: "L"},
                **({"r_score": {0: "NBEST", 1: "L"}} if metadata["reverse_weight"] else {}),
            },
            metadata,
        ),
    ]


def wenet_metadata(model: U2, chunks: ChunkOptions) -> dict:
    o, (field, rate) = model.options, receptive_field(model.options.input_layer)
    two_way = o.reverse_weight > 0
    return dict(
        batch=1,
        chunk_size=chunks.chunk_size,
        left_chunks=chunks.left_chunks,
        reverse_weight=o.reverse_weight,
        output_size=o.output_size,
        num_blocks=o.num_blocks,
        cnn_module_kernel=o.cnn_module_kernel,
        head=o.attention_heads,
        feature_size=model.frontend.num_mel_bins,
        vocab_size=model.tokenizer.vocab_size,
        decoding_window=window_frames(model, chunks.chunk_size),
        encoder=o.encoder,
        decoder="bitransformer" if two_way else "transformer",
        subsampling_rate=rate,
        right_context=field - 1,
        sos_symbol=model.tokenizer.sos_id,
        eos_symbol=model.tokenizer.eos_id,
        is_bidirectional_decoder=int(two_way),
    )


def write_graph(graph: Graph, folder: str) -> None:
    path = os.path.join(folder, graph.file)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter(
            "ignore"
        )  # the exporter's, on tracing and on itself; `check` is what judges the file
        torch.onnx.export(
            graph.module.eval(),
            tuple(graph.inputs.values()),
            path,
            opset_version=OPSET,
            dynamo=False,
            input_names=list(graph.inputs),
            output_names=list(graph.outputs),
            dynamic_axes=graph.axes,
        )
    written = onnx.load(path)
    onnx.helper.set_model_props(
        written, {name: str(value) for name, value in graph.metadata.items()}
    )
    onnx.checker.check_model(written)
    onnx.save(written, path)
    if graph.int8:
        logging.disable(logging.WARNING)  # it recommends a pre-processing that changes nothing here
        quantize_dynamic(
            path,
            path.removesuffix(".onnx") + ".int8.onnx",
            op_types_to_quantize=["MatMul"],
            per_channel=True,
            weight_type=QuantType.QInt8,
        )
        logging.disable(logging.NOTSET)
