"""Makes ONNX graphs of the network, with the names, shapes and metadata of two runtimes.

The runtimes are sherpa-onnx and WeNet's onnxruntime runtime. Code that is traced must not turn a
size into a Python number, because the graph would keep the number of the example. Axes are those of
conformer.py, and two more: S frames that attention sees, in the cache and in the chunk; K kernel of
the convolution.
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

from conformer import Encoder, reverse
from frames import MAX_POSITION, BlockState, receptive_field, sinusoids_at
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
    """Holds the chunks that a streaming graph is made for."""

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
        frames = self.cache_size + self.chunk_size
        if frames > MAX_POSITION:
            raise UserError(
                f"--chunk_size {self.chunk_size} --left_chunks {self.left_chunks}: they span "
                f"{frames} encoder frames; at most {MAX_POSITION} can be told apart"
            )

    @property
    def cache_size(self) -> int:
        return self.chunk_size * self.left_chunks


def at_least(x: torch.Tensor, size: int, dim: int) -> torch.Tensor:
    """Puts zeros behind x along dim 0 or 1, where it is shorter than `size`."""
    length = x.size(dim)
    keep = length + (size - length) * (length < size)
    padded = torch.cat((x, x.new_zeros(*x.shape[:dim], size, *x.shape[dim + 1 :])), dim)
    return padded[:keep] if dim == 0 else padded[:, :keep]


class Offline(nn.Module):
    """Hears whole recordings with full context."""

    def __init__(self, model: U2):
        super().__init__()
        self.net = model.net

    def forward(self, x, x_lens):
        """x (N,T,F), x_lens (N,) -> log_probs (N,T',V), log_probs_lens (N,)."""
        x = at_least(x, receptive_field(self.net.options.input_layer)[0], dim=1)
        encoded, encoded_lengths = self.net.encode(x, x_lens)
        return self.net.ctc_log_probs(encoded), encoded_lengths


class Chunk(nn.Module):
    """Encodes a chunk of a stream, as Encoder.stream does.

    Its caches are tensors that start as zeros, in the shapes of WeNet and sherpa-onnx.
    """

    def __init__(self, encoder: Encoder):
        super().__init__()
        self.encoder = encoder

    def forward(self, x, offset, required_cache_size, attn_cache, conv_cache, attn_mask):
        """x (1,T,F) -> (1,T',D), next_att_cache, next_conv_cache.

        attn_cache (blocks,H,C,2D/H) has keys and values side by side; conv_cache is
        (blocks,1,D,K-1). offset counts the encoder frames before the chunk, and starts at
        required_cache_size, as in both runtimes. attn_mask (1,1,>=S) is bool.
        """
        encoder = self.encoder
        x = encoder.subsample(x)
        size = x.size(1)
        before = attn_cache.size(2)
        # A last, shorter chunk comes with the mask of a whole one.
        mask = attn_mask[:, None, :, : before + size]
        positions = self.positions(before, size, offset - required_cache_size, x.size(2))
        valid = torch.ones_like(x[..., :1])
        attn_caches = []
        conv_caches = []
        for i, block in enumerate(encoder.blocks):
            # Before the first frame the convolution sees `silence`; there the caches hold zeros.
            silence = block.conv_module.silence(x)
            keys, values = attn_cache[i : i + 1].chunk(2, dim=-1)
            past = BlockState(keys, values, convolution=conv_cache[i] + silence)
            x, state = block(x, positions, mask, valid, past)
            keys_values = torch.cat((state.keys, state.values), dim=-1)
            attn_caches.append(newest(keys_values, required_cache_size))
            conv_caches.append(state.convolution - silence)
        return encoder.after_norm(x), torch.cat(attn_caches), torch.stack(conv_caches)

    @staticmethod
    def positions(before, size, first, width: int):
        """Computes sinusoids (1,S,D) for the frames in the cache and in the chunk.

        `first` is the number of the chunk's first frame. In an endless stream the numbers stop at
        MAX_POSITION, as in Encoder.stream. Places of the cache before frame 0 are masked.
        """
        index = torch.arange(before + size) - before + first.clamp(max=MAX_POSITION - size)
        return sinusoids_at(index.clamp(min=0).float(), width)[None]


def newest(cache, size):
    """Takes the last `size` frames of (1,H,S,2D/H)."""
    start = (cache.size(2) - size).clamp(min=0).reshape(())
    return cache[:, :, start:]


class Streaming(nn.Module):
    """Hears a chunk of a stream: Chunk, from features to log-probabilities (1,T',V)."""

    def __init__(self, model: U2):
        super().__init__()
        self.chunk = Chunk(model.net.encoder)
        self.net = model.net

    def forward(self, *inputs):
        encoded, *caches = self.chunk(*inputs)
        return self.net.ctc_log_probs(encoded), *caches


class Ctc(nn.Module):
    def __init__(self, model: U2):
        super().__init__()
        self.net = model.net

    def forward(self, hidden):
        """(1,T',D) -> (1,T',V)."""
        return self.net.ctc_log_probs(hidden)


class Rescoring(nn.Module):
    """Scores the n-best list of one utterance by the attention decoders."""

    def __init__(self, model: U2):
        super().__init__()
        self.net = model.net
        # A right-to-left decoder whose weight is 0 may be there, but it is not trained.
        self.is_two_way = model.options.reverse_weight > 0

    def forward(self, hyps, hyps_lens, encoder_out):
        """Gives log-probabilities (N,L,V) of the token behind each, also from right to left.

        hyps (N,L) begin with sos, which hyps_lens (N,) count; encoder_out (1,T',D). Without a
        right-to-left decoder the second output is a single 0.
        """
        encoded = encoder_out.expand(hyps.size(0), -1, -1)
        lengths = torch.ones_like(hyps_lens) * encoder_out.size(1)
        score = self.net.decoder(hyps, encoded, lengths).log_softmax(-1)
        if not self.is_two_way:
            return score, score.new_zeros(())
        backward = torch.cat((hyps[:, :1], reverse(hyps[:, 1:], hyps_lens - 1)), dim=1)
        return score, self.net.right_decoder(backward, encoded, lengths).log_softmax(-1)


class LogMel(nn.Module):
    """Computes transforms.log_mel by convolutions, without an FFT: samples (n,) -> (1,T,F)."""

    def __init__(self, frontend: Frontend):
        super().__init__()
        length = frontend.window_samples
        self.shift = frontend.shift_samples
        window, mel = log_mel_filters(frontend)  # (window,), (bins,F)
        bins = len(mel)
        # The remainder keeps the angles below one turn, where float32 is precise enough.
        turns = torch.arange(bins).outer(torch.arange(length)) % length * (2 * math.pi / length)
        waves = torch.cat((turns.double().cos(), turns.double().sin())) * window.double()
        self.register_buffer("waves", waves.float()[:, None])  # (2 bins,1,window)
        # The mel filters are a convolution, too, because int8 leaves those alone: (F,bins,1).
        self.register_buffer("mel", mel.T[..., None].contiguous())

    def forward(self, samples):
        spectrum = F.conv1d(samples[None, None], self.waves, stride=self.shift)
        real, imag = spectrum.chunk(2, dim=1)  # (1,bins,T) each
        return F.conv1d(real * real + imag * imag, self.mel).log1p().transpose(1, 2)


class OfflineWaveform(nn.Module):
    """Hears whole recordings: Offline with the frontend in front of it."""

    def __init__(self, model: U2):
        super().__init__()
        self.log_mel = LogMel(model.frontend)
        self.offline = Offline(model)
        self.frontend = model.frontend

    def forward(self, waveform):
        """(n,) float32 in [-1, 1] -> log_probs (1,T',V), log_probs_lens (1,)."""
        if self.frontend.mean_var_norm:
            nothing = feature_state().statistics
            statistics = moments(waveform, nothing, window=math.inf, peak=math.inf)
            waveform = normalize(waveform, statistics)
        waveform = F.pad(waveform, (0, self.frontend.tail_samples))
        features = self.log_mel(at_least(waveform, self.frontend.window_samples, dim=0))
        lengths = torch.ones_like(features[:, 0, 0], dtype=torch.int64) * features.size(1)
        return self.offline(features, lengths)


class StreamingWaveform(nn.Module):
    """Hears a chunk of a stream: Streaming with the frontend in front of it.

    The frontend has a state of its own, that of transforms.stream_features.
    """

    def __init__(self, model: U2):
        super().__init__()
        self.log_mel = LogMel(model.frontend)
        self.streaming = Streaming(model)
        self.frontend = model.frontend
        self.rate = receptive_field(model.options.input_layer)[1]

    def forward(self, waveform, samples, statistics, feats, *rest):
        """waveform (n,) float32 of a chunk -> log_probs (1,T',V), and the next of all other inputs.

        samples (k,) and feats (1,m,F) are what the last call left over, at the beginning empty.
        statistics (3,) are those of transforms.moments, at the beginning zeros. `rest` are the
        inputs of Chunk behind x.
        """
        waveform = bounded(waveform)
        samples = torch.cat((samples, waveform))
        window = STREAM_WINDOW * self.frontend.sample_rate
        statistics = moments(waveform, statistics, window, peak_of(waveform))
        sound = normalize(samples, statistics) if self.frontend.mean_var_norm else samples
        new = self.log_mel(sound)
        features = torch.cat((feats, new), dim=1)
        log_probs, *caches = self.streaming(features, *rest)
        samples_left = samples[new.size(1) * self.frontend.shift_samples :]
        features_left = features[:, log_probs.size(1) * self.rate :]
        return log_probs, samples_left, statistics, features_left, *caches


# ---- The files


class Graph(NamedTuple):
    """Describes a file to write; `axes` names, for inputs and outputs, the axes that vary."""

    file: str
    module: nn.Module
    inputs: dict[str, torch.Tensor]  # examples
    outputs: tuple[str, ...]
    axes: dict[str, dict[int, str]]
    metadata: dict
    int8: bool = False


def window_frames(model: U2, chunk_size: int) -> int:
    """Counts the feature frames that make a chunk of encoder frames."""
    field, rate = receptive_field(model.options.input_layer)
    return (chunk_size - 1) * rate + field


def cache_inputs(model: U2, chunks: ChunkOptions, index: int) -> dict[str, torch.Tensor]:
    """Makes the inputs of streaming graphs behind the features, for chunk number `index`.

    The caches are empty, as for chunk 0.
    """
    o = model.options
    size = chunks.cache_size
    before = index * chunks.chunk_size
    mask = torch.arange(size + chunks.chunk_size) >= size - before
    width = o.output_size // o.attention_heads * 2
    return {
        "offset": torch.tensor([size + before]),
        "required_cache_size": torch.tensor([size]),
        "attn_cache": torch.zeros(o.num_blocks, o.attention_heads, size, width),
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


def whole_metadata(model: U2, **kind) -> dict:
    return common_metadata(model) | kind | dict(comment="non-streaming")


def streaming_metadata(model: U2, chunks: ChunkOptions, **kind) -> dict:
    o = model.options
    sizes = dict(
        comment="streaming",
        chunk_size=chunks.chunk_size,
        left_chunks=chunks.left_chunks,
        head=o.attention_heads,
        num_blocks=o.num_blocks,
        output_size=o.output_size,
        cnn_module_kernel=o.cnn_module_kernel,
    )
    return common_metadata(model) | sizes | kind


CACHE_AXES = {
    "attn_cache": {2: "C"},
    "attn_mask": {2: "S"},
    "log_probs": {1: "T_out"},
    "next_att_cache": {2: "C_out"},
}


def sherpa_graphs(model: U2, chunks: ChunkOptions) -> list[Graph]:
    """Makes model.onnx and model-streaming.onnx as sherpa-onnx reads them."""
    bins = model.frontend.num_mel_bins
    whole = Graph(
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
        whole_metadata(model, model_type="wenet_ctc"),
        int8=True,
    )
    x = torch.rand(1, window_frames(model, chunks.chunk_size), bins)
    streaming = Graph(
        "model-streaming.onnx",
        Streaming(model),
        {"x": x, **cache_inputs(model, chunks, 0)},
        ("log_probs", "next_att_cache", "next_conv_cache"),
        {"x": {1: "T"}, **CACHE_AXES},
        streaming_metadata(model, chunks, model_type="wenet_ctc"),
        int8=True,
    )
    return [whole, streaming]


def waveform_graphs(model: U2, chunks: ChunkOptions) -> list[Graph]:
    """Makes the same two files with the frontend inside."""
    kind = dict(model_type="lightning_u2_waveform", sample_rate=model.frontend.sample_rate)
    whole = Graph(
        "model.onnx",
        OfflineWaveform(model),
        {"waveform": torch.rand(20000)},
        ("log_probs", "log_probs_lens"),
        {"waveform": {0: "n"}, "log_probs": {1: "T_out"}},
        whole_metadata(model, **kind),
        int8=True,
    )
    first, later = piece_samples(model, chunks.chunk_size)
    field, rate = receptive_field(model.options.input_layer)
    samples = torch.rand(model.frontend.window_samples - model.frontend.shift_samples)
    feats = torch.rand(1, field - rate, model.frontend.num_mel_bins)
    state = {**feature_state()._asdict(), "samples": samples, "feats": feats}
    kept = ("next_samples", "next_statistics", "next_feats")
    streaming = Graph(
        "model-streaming.onnx",
        StreamingWaveform(model),
        {"waveform": torch.rand(later), **state, **cache_inputs(model, chunks, 0)},
        ("log_probs", *kept, "next_att_cache", "next_conv_cache"),
        {
            "waveform": {0: "n"},
            "samples": {0: "k"},
            "feats": {1: "m"},
            "next_samples": {0: "k_out"},
            "next_feats": {1: "m_out"},
            **CACHE_AXES,
        },
        streaming_metadata(model, chunks, **kind, first_samples=first, chunk_samples=later),
        int8=True,
    )
    return [whole, streaming]


def wenet_graphs(model: U2, chunks: ChunkOptions) -> list[Graph]:
    """Makes encoder.onnx, ctc.onnx and decoder.onnx as WeNet's runtime reads them."""
    metadata = wenet_metadata(model, chunks)
    encoded = torch.rand(1, 50, model.options.output_size)
    ctc = Graph(
        "ctc.onnx",
        Ctc(model),
        {"hidden": encoded},
        ("probs",),
        {"hidden": {1: "T"}, "probs": {1: "T"}},
        metadata,
    )
    return [wenet_encoder(model, chunks, metadata), ctc, wenet_decoder(model, encoded, metadata)]


def wenet_encoder(model: U2, chunks: ChunkOptions, metadata: dict) -> Graph:
    inputs = cache_inputs(model, chunks, 0)
    frames = window_frames(model, chunks.chunk_size)
    return Graph(
        "encoder.onnx",
        Chunk(model.net.encoder),
        {
            "chunk": torch.rand(1, frames, model.frontend.num_mel_bins),
            "offset": inputs["offset"][0],  # a scalar in WeNet's runtime, as is the next one
            "required_cache_size": inputs["required_cache_size"][0],
            "att_cache": inputs["attn_cache"],
            "cnn_cache": inputs["conv_cache"],
            "att_mask": inputs["attn_mask"],
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
    )


def wenet_decoder(model: U2, encoded: torch.Tensor, metadata: dict) -> Graph:
    axes = {
        "hyps": {0: "NBEST", 1: "L"},
        "hyps_lens": {0: "NBEST"},
        "encoder_out": {1: "T"},
        "score": {0: "NBEST", 1: "L"},
    }
    if metadata["is_bidirectional_decoder"]:
        axes["r_score"] = axes["score"]
    return Graph(
        "decoder.onnx",
        Rescoring(model),
        {
            "hyps": torch.randint(model.tokenizer.vocab_size, (3, 8)),
            "hyps_lens": torch.tensor([8, 6, 1]),
            "encoder_out": encoded,
        },
        ("score", "r_score"),
        axes,
        metadata,
    )


def wenet_metadata(model: U2, chunks: ChunkOptions) -> dict:
    o = model.options
    field, rate = receptive_field(o.input_layer)
    is_two_way = o.reverse_weight > 0
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
        decoder="bitransformer" if is_two_way else "transformer",
        subsampling_rate=rate,
        right_context=field - 1,
        sos_symbol=model.tokenizer.sos_id,
        eos_symbol=model.tokenizer.eos_id,
        is_bidirectional_decoder=int(is_two_way),
    )


def write_graph(graph: Graph, folder: str) -> None:
    """Writes a graph's file and, where the graph asks for int8, its int8 file, too."""
    path = os.path.join(folder, graph.file)
    with torch.no_grad(), warnings.catch_warnings():
        # The exporter warns of tracing and of itself; onnx_checks judges the file.
        warnings.simplefilter("ignore")
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
    properties = {name: str(value) for name, value in graph.metadata.items()}
    onnx.helper.set_model_props(written, properties)
    onnx.checker.check_model(written)
    onnx.save(written, path)
    if graph.int8:
        write_int8(path)


def write_int8(path: str) -> None:
    """Writes NAME.int8.onnx beside NAME.onnx, with its matrix products in int8."""
    logging.disable(logging.WARNING)  # the warning recommends a step that changes nothing here
    quantize_dynamic(
        path,
        path.removesuffix(".onnx") + ".int8.onnx",
        op_types_to_quantize=["MatMul"],
        per_channel=True,
        weight_type=QuantType.QInt8,
    )
    logging.disable(logging.NOTSET)
