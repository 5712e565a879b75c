"""What ONNX files hear, called as the runtimes call them, against what the network hears.

`given` is what a graph takes: features (1,T,F), or, where it has the frontend inside, samples (n,). Axes as in conformer.py.
"""

import math
import os

from cli import UserError

import numpy as np
import onnxruntime
import torch
import torchaudio
from torch import nn

from conformer import receptive_field, subsampled_length
from decode import SearchOptions, ctc_greedy_search, ctc_prefix_beam_search
from model import U2
from tools.onnx_graphs import ChunkOptions, cache_inputs, piece_samples, window_frames
from transforms import extract, feature_state, num_frames, stream_features

TOLERANCE = 1e-4  # of log-probabilities
UNFIT = "nothing was written; please report it with the checkpoint's options"


def synthetic_sound(sample_rate: int, seconds: float = 6.0) -> torch.Tensor:
    """(n,) float32: a voice of gliding harmonics under moving formants, in syllables with pauses, over a little noise."""
    time = torch.arange(int(sample_rate * seconds)) / sample_rate
    pitch = 120 + 30 * (2 * math.pi * 0.4 * time).sin()
    phase = 2 * math.pi * pitch.double().cumsum(0) / sample_rate
    formants = [
        (500 + 250 * (2 * math.pi * 1.3 * time).sin(), 120),
        (1500 + 700 * (2 * math.pi * 0.9 * time).cos(), 250),
    ]
    voice = torch.zeros_like(time)
    for harmonic in range(1, 25):
        loudness = sum(
            torch.exp(-(((harmonic * pitch - centre) / width) ** 2)) for centre, width in formants
        )
        voice += (0.02 + loudness) * (harmonic * phase).sin().float() / harmonic**0.5
    syllables = (2 * math.pi * 1.7 * time).sin().clamp(min=0) * ((time % 2.5) < 1.9)
    noise = torch.randn(len(time), generator=torch.Generator().manual_seed(0))
    return 0.1 * syllables * voice + 0.001 * noise


def call(session, *inputs: torch.Tensor) -> list[torch.Tensor]:
    """The outputs of an onnxruntime session for its inputs in order."""
    names = [node.name for node in session.get_inputs()]
    outputs = session.run(
        None, {name: value.numpy() for name, value in zip(names, inputs, strict=True)}
    )
    return [torch.from_numpy(np.asarray(out)) for out in outputs]


def open_session(path: str) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


def given_of(model: U2, sound: torch.Tensor) -> torch.Tensor:
    """What the model's graphs take of a sound (n,)."""
    return sound if model.frontend.frontend == "log_mel" else extract(model.frontend)(sound)[None]


def greedy(model: U2, log_probs: torch.Tensor) -> list[int]:
    """The tokens of (T',V)."""
    return ctc_greedy_search(log_probs[None], torch.tensor([len(log_probs)]), model.net.blank_id)[
        0
    ].tokens


def network_whole(model: U2, given, chunk_size: int = -1, left_chunks: int = -1) -> torch.Tensor:
    """What the network says of the whole at once, with full context or under the mask of chunks: log-probabilities (T',V)."""
    feats = given if given.dim() == 3 else extract(model.frontend)(given)[None]
    out, lengths = model.encode(feats, torch.tensor([feats.size(1)]), chunk_size, left_chunks)
    return model.ctc_log_probs(out)[0, : lengths[0]]


def graph_whole(session, given) -> torch.Tensor:
    """The same by model.onnx, with full context."""
    log_probs, lengths = call(
        session, given, *([torch.tensor([given.size(1)])] if given.dim() == 3 else [])
    )
    return log_probs[0, : lengths[0]]


def windows(model: U2, chunks: ChunkOptions, given) -> list[torch.Tensor]:
    """What the streaming graphs are given, chunk by chunk: features (1,T,F) that overlap, or samples (n,) that do not. The
    last may be shorter."""
    frames = given.size(1) if given.dim() == 3 else int(num_frames(len(given), model.frontend))
    starts = range(0, int(subsampled_length(frames, model.options.input_layer)), chunks.chunk_size)
    if given.dim() == 1:
        first, later = piece_samples(model, chunks.chunk_size)
        return [given[:first], *given[first:].split(later)][: len(starts)]
    rate, size = (
        receptive_field(model.options.input_layer)[1],
        window_frames(model, chunks.chunk_size),
    )
    return [given[:, start * rate : start * rate + size] for start in starts]


def streamed_features(model: U2, chunks: ChunkOptions, given) -> torch.Tensor:
    """(1,T,F), of samples as a stream computes them, which knows the statistics so far and no more."""
    if given.dim() == 3:
        return given
    advance, state, feats = stream_features(model.frontend), feature_state(), []
    for piece in windows(model, chunks, given):
        new, state = advance(piece, state)
        feats.append(new)
    return torch.cat(feats)[None]


def network_stream(model: U2, chunks: ChunkOptions, given) -> torch.Tensor:
    """The encoder's output (T',D) of a stream."""
    state = model.stream_state(chunks.chunk_size, chunks.left_chunks)
    return model.stream(streamed_features(model, chunks, given), state, last=True)[0][0]


def graph_stream(model: U2, session, chunks: ChunkOptions, given) -> torch.Tensor:
    """The same by encoder.onnx, or its log-probabilities by model-streaming.onnx."""
    scalar = not session.get_inputs()[-5].shape  # offset, in WeNet's runtime
    kept, outs = [], []  # what a frontend inside the graph keeps
    if given.dim() == 1:
        kept = [
            torch.zeros(0),
            torch.zeros(3, dtype=torch.float64),
            torch.zeros(1, 0, model.frontend.num_mel_bins),
        ]
    _, _, *caches, _ = cache_inputs(model, chunks, 0).values()
    for index, window in enumerate(windows(model, chunks, given)):
        offset, size, _, _, mask = cache_inputs(model, chunks, index).values()
        counts = (offset[0], size[0]) if scalar else (offset, size)
        out, *kept = call(session, window, *kept, *counts, *caches, mask)
        kept, caches = kept[:-2], kept[-2:]
        outs.append(out)
    return torch.cat(outs, dim=1)[0]


def compare(file: str, theirs: list[torch.Tensor], ours: list[torch.Tensor]) -> str:
    """A line on how far a file's log-probabilities are from the network's. Raises UserError where that is too far."""
    for a, b in zip(theirs, ours, strict=True):
        if a.shape != b.shape:
            raise UserError(
                f"{file}: it gives {tuple(a.shape)} log-probabilities, the network {tuple(b.shape)}; {UNFIT}"
            )
    largest = max(float((a - b).abs().max()) for a, b in zip(theirs, ours))
    if not largest <= TOLERANCE:  # nan is no agreement
        raise UserError(
            f"{file}: its log-probabilities are up to {largest:.1e} from the network's, more than {TOLERANCE}; "
            f"{UNFIT}"
        )
    return f"{file}: log-probabilities within {largest:.1e} of the network's"


def compare_tokens(
    model: U2, file: str, theirs: list[torch.Tensor], ours: list[torch.Tensor], limit: float
) -> str:
    """A line on how many tokens of greedy search an int8 file hears as the network. Raises UserError above `limit`."""
    errors = total = 0
    for a, b in zip(theirs, ours, strict=True):
        heard, meant = greedy(model, a), greedy(model, b)
        errors, total = (
            errors + torchaudio.functional.edit_distance(heard, meant),
            total + len(meant),
        )
    frames = torch.cat([a.argmax(-1) == b.argmax(-1) for a, b in zip(theirs, ours)]).float().mean()
    said = f"{errors} of {total} tokens heard otherwise, {float(frames):.2%} of frames alike"
    if not errors <= limit * max(total, 1):
        raise UserError(
            f"{file}: {said}; --max_int8_cer allows {limit}; give real speech in --audio, or allow more"
        )
    return f"{file}: {said}"


@torch.no_grad()
def check_files(
    model: U2, chunks: ChunkOptions, folder: str, sounds: list[torch.Tensor], max_int8_cer: float
) -> list[str]:
    """What onnxruntime hears with the files in `folder`, against the network: a line per file. Raises UserError."""
    given = [given_of(model, sound) for sound in sounds]
    for sound, x in zip(sounds, given):
        if not windows(model, chunks, x):
            raise UserError(
                f"a sound of {len(sound)} samples is too short to check anything on; name others in --audio"
            )
    streams, lines = [network_stream(model, chunks, x) for x in given], []
    for file, ours, hear in (
        ("model", [network_whole(model, x) for x in given], graph_whole),
        (
            "model-streaming",
            [model.ctc_log_probs(out) for out in streams],
            lambda session, x: graph_stream(model, session, chunks, x),
        ),
    ):
        for name in (f"{file}.onnx", f"{file}.int8.onnx"):
            session = open_session(os.path.join(folder, name))
            theirs = [hear(session, x) for x in given]
            lines.append(
                compare_tokens(model, name, theirs, ours, max_int8_cer)
                if "int8" in name
                else compare(name, theirs, ours)
            )
    if model.frontend.is_wenets:
        lines += check_second_pass(model, chunks, folder, given, streams)
    return lines


def check_second_pass(model: U2, chunks: ChunkOptions, folder: str, given, streams) -> list[str]:
    """encoder.onnx and ctc.onnx one behind the other, and decoder.onnx on the n-best list of each sound."""
    encoder, ctc, decoder = (
        open_session(os.path.join(folder, f"{name}.onnx")) for name in ("encoder", "ctc", "decoder")
    )
    outs = [graph_stream(model, encoder, chunks, feats)[None] for feats in given]
    theirs = [call(ctc, out)[0][0] for out in outs]
    lines = [
        compare("encoder.onnx and ctc.onnx", theirs, [model.ctc_log_probs(out) for out in streams])
    ]
    scores, expected = [], []
    five = SearchOptions(beam_size=5)
    for out, log_probs in zip(outs, theirs):
        found = ctc_prefix_beam_search(
            log_probs[None], torch.tensor([len(log_probs)]), five, model.net.blank_id
        )[0].nbest
        lengths = torch.tensor([len(tokens) + 1 for tokens in found])
        valid = torch.arange(lengths.max()) < lengths[:, None]  # (N,L)
        hyps = with_sos(model, found)
        scores += [
            score[valid]
            for score in call(decoder, hyps, lengths, out)[: 1 + (model.options.reverse_weight > 0)]
        ]
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
