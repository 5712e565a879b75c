"""Compares what ONNX files hear, called as the runtimes call them, with what the network hears.

`given` is the input of a graph: features (1,T,F), or, where it has the frontend inside, samples
(n,). Axes are those of conformer.py.
"""

import math
import os

from cli import UserError

import numpy as np
import onnxruntime
import torch
import torchaudio
from torch import nn

from decode import SearchOptions, ctc_greedy_search, ctc_prefix_beam_search
from frames import receptive_field, subsampled_length
from model import U2
from stream import piece_samples
from tools.onnx_graphs import ChunkOptions, cache_inputs, window_frames
from transforms import extract, feature_state, num_frames, stream_features

TOLERANCE = 1e-4  # of log-probabilities
UNFIT = "nothing was written; please report it with the checkpoint's options"


def synthetic_sound(sample_rate: int, seconds: float = 6.0) -> torch.Tensor:
    """Makes a sound (n,) float32 that is like a voice over a little noise.

    Gliding harmonics under moving formants come in syllables with pauses.
    """
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
    """Runs an onnxruntime session on its inputs, given in order, and returns its outputs."""
    names = [node.name for node in session.get_inputs()]
    named = {name: value.numpy() for name, value in zip(names, inputs, strict=True)}
    outputs = session.run(None, named)
    return [torch.from_numpy(np.asarray(out)) for out in outputs]


def open_session(path: str) -> onnxruntime.InferenceSession:
    """Opens a graph; its threads sleep while they have no work, instead of keeping cores busy."""
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def given_of(model: U2, sound: torch.Tensor) -> torch.Tensor:
    """Returns the input of the model's graphs for a sound (n,)."""
    return sound if model.frontend.frontend == "log_mel" else features_of(model, sound)


def features_of(model: U2, given: torch.Tensor) -> torch.Tensor:
    return given if given.dim() == 3 else extract(model.frontend)(given)[None]


def greedy(model: U2, log_probs: torch.Tensor) -> list[int]:
    """Gives the tokens that greedy search finds in (T',V)."""
    lengths = torch.tensor([len(log_probs)])
    return ctc_greedy_search(log_probs[None], lengths, model.net.blank_id)[0].tokens


def network_whole(model: U2, given, chunk_size: int = -1, left_chunks: int = -1) -> torch.Tensor:
    """Computes the network's log-probabilities (T',V) of the whole at once.

    Frames see everything, or, with a chunk size, as much as the mask of chunks lets them see.
    """
    features = features_of(model, given)
    lengths = torch.tensor([features.size(1)])
    encoded, encoded_lengths = model.encode(features, lengths, chunk_size, left_chunks)
    return model.ctc_log_probs(encoded)[0, : encoded_lengths[0]]


def graph_whole(session, given) -> torch.Tensor:
    """Gives the log-probabilities (T',V) of model.onnx, which has full context."""
    sizes = [torch.tensor([given.size(1)])] if given.dim() == 3 else []
    log_probs, lengths = call(session, given, *sizes)
    return log_probs[0, : lengths[0]]


def windows(model: U2, chunks: ChunkOptions, given) -> list[torch.Tensor]:
    """Cuts `given` as the streaming graphs take it, chunk by chunk; the last may be shorter.

    Features (1,T,F) overlap, samples (n,) do not.
    """
    frontend = model.frontend.without_tail
    frames = given.size(1) if given.dim() == 3 else int(num_frames(len(given), frontend))
    starts = range(0, int(subsampled_length(frames, model.options.input_layer)), chunks.chunk_size)
    if given.dim() == 1:
        first, later = piece_samples(model, chunks.chunk_size)
        return [given[:first], *given[first:].split(later)][: len(starts)]
    rate = receptive_field(model.options.input_layer)[1]
    size = window_frames(model, chunks.chunk_size)
    return [given[:, start * rate : start * rate + size] for start in starts]


def streamed_features(model: U2, chunks: ChunkOptions, given) -> torch.Tensor:
    """Computes features (1,T,F) as a stream does, which knows only the statistics so far."""
    if given.dim() == 3:
        return given
    advance = stream_features(model.frontend)
    state = feature_state()
    features = []
    for piece in windows(model, chunks, given):
        new, state = advance(piece, state)
        features.append(new)
    return torch.cat(features)[None]


def network_stream(model: U2, chunks: ChunkOptions, given) -> torch.Tensor:
    """Gives the encoder's output (T',D) of a stream."""
    state = model.stream_state(chunks.chunk_size, chunks.left_chunks)
    return model.stream(streamed_features(model, chunks, given), state, last=True)[0][0]


def graph_stream(model: U2, session, chunks: ChunkOptions, given) -> torch.Tensor:
    """Gives encoder.onnx's output (T',D), or model-streaming.onnx's log-probabilities (T',V)."""
    is_scalar = not session.get_inputs()[-5].shape  # WeNet's runtime has a scalar offset
    kept = []  # the state of a frontend inside the graph
    if given.dim() == 1:
        bins = model.frontend.num_mel_bins
        kept = [torch.zeros(0), torch.zeros(3, dtype=torch.float64), torch.zeros(1, 0, bins)]
    _, _, *caches, _ = cache_inputs(model, chunks, 0).values()
    outs = []
    for index, window in enumerate(windows(model, chunks, given)):
        offset, size, _, _, mask = cache_inputs(model, chunks, index).values()
        counts = (offset[0], size[0]) if is_scalar else (offset, size)
        out, *state = call(session, window, *kept, *counts, *caches, mask)
        kept = state[:-2]
        caches = state[-2:]
        outs.append(out)
    return torch.cat(outs, dim=1)[0]


def compare_log_probs(file: str, theirs: list[torch.Tensor], ours: list[torch.Tensor]) -> str:
    """Tells how far a file's log-probabilities are from the network's.

    Raises UserError where the distance is above TOLERANCE.
    """
    for a, b in zip(theirs, ours, strict=True):
        if a.shape != b.shape:
            raise UserError(
                f"{file}: it gives {tuple(a.shape)} log-probabilities, the network "
                f"{tuple(b.shape)}; {UNFIT}"
            )
    largest = max(float((a - b).abs().max()) for a, b in zip(theirs, ours))
    if not largest <= TOLERANCE:  # nan is no agreement
        raise UserError(
            f"{file}: its log-probabilities are up to {largest:.1e} from the network's, more than "
            f"{TOLERANCE}; {UNFIT}"
        )
    return f"{file}: log-probabilities within {largest:.1e} of the network's"


def compare_tokens(
    model: U2, file: str, theirs: list[torch.Tensor], ours: list[torch.Tensor], limit: float
) -> str:
    """Tells how many tokens of greedy search an int8 file hears otherwise than the network.

    Raises UserError where their share is above `limit`.
    """
    errors = 0
    total = 0
    for a, b in zip(theirs, ours, strict=True):
        meant = greedy(model, b)
        errors += torchaudio.functional.edit_distance(greedy(model, a), meant)
        total += len(meant)
    alike = torch.cat([a.argmax(-1) == b.argmax(-1) for a, b in zip(theirs, ours)]).float().mean()
    said = f"{errors} of {total} tokens heard otherwise, {float(alike):.2%} of frames alike"
    if not errors <= limit * max(total, 1):
        raise UserError(
            f"{file}: {said}; --max_int8_cer allows {limit}; give real speech in --audio, or allow "
            "more"
        )
    return f"{file}: {said}"


@torch.no_grad()
def check_files(
    model: U2, chunks: ChunkOptions, folder: str, sounds: list[torch.Tensor], max_int8_cer: float
) -> list[str]:
    """Compares the files in `folder`, run by onnxruntime, with the network.

    -> a line per file. Raises UserError for a file that hears otherwise.
    """
    given = [given_of(model, sound) for sound in sounds]
    for sound, x in zip(sounds, given):
        if not windows(model, chunks, x):
            raise UserError(
                f"a sound of {len(sound)} samples is too short to check anything on; name others "
                "in --audio"
            )

    def check_pair(name, ours, hear):
        found = []
        for file in (f"{name}.onnx", f"{name}.int8.onnx"):
            session = open_session(os.path.join(folder, file))
            found.append([hear(session, x) for x in given])
        float32, int8 = found
        return [
            compare_log_probs(f"{name}.onnx", float32, ours),
            compare_tokens(model, f"{name}.int8.onnx", int8, ours, max_int8_cer),
        ]

    def hear_stream(session, x):
        return graph_stream(model, session, chunks, x)

    encoded = [network_stream(model, chunks, x) for x in given]
    streamed = [model.ctc_log_probs(out) for out in encoded]
    lines = check_pair("model", [network_whole(model, x) for x in given], graph_whole)
    lines += check_pair("model-streaming", streamed, hear_stream)
    if model.frontend.is_wenets:
        lines += check_second_pass(model, chunks, folder, given, streamed)
    return lines


def check_second_pass(
    model: U2, chunks: ChunkOptions, folder: str, given, streamed: list[torch.Tensor]
) -> list[str]:
    """Checks encoder.onnx and ctc.onnx one behind the other, and decoder.onnx on n-best lists.

    streamed: the network's log-probabilities (T',V) of each sound as a stream.
    """
    encoder, ctc, decoder = (
        open_session(os.path.join(folder, f"{name}.onnx")) for name in ("encoder", "ctc", "decoder")
    )
    outs = [graph_stream(model, encoder, chunks, features)[None] for features in given]
    log_probs = [call(ctc, out)[0][0] for out in outs]
    scores = []
    expected = []
    for encoded, x in zip(outs, log_probs):
        lengths = torch.tensor([len(x)])
        nbest = ctc_prefix_beam_search(
            x[None], lengths, SearchOptions(beam_size=5), model.net.blank_id
        )[0].nbest
        heard, meant = decoder_scores(model, decoder, encoded, nbest)
        scores += heard
        expected += meant
    return [
        compare_log_probs("encoder.onnx and ctc.onnx", log_probs, streamed),
        compare_log_probs("decoder.onnx", scores, expected),
    ]


def decoder_scores(model: U2, session, encoded: torch.Tensor, nbest: list[list[int]]):
    """Scores the token lists `nbest` by decoder.onnx, and by the network's decoders.

    encoded (1,T',D) -> one list of log-probabilities for decoder.onnx and one for the network. Each
    list goes from left to right and, where reverse_weight is above 0, also from right to left.
    """
    lengths = torch.tensor([len(tokens) + 1 for tokens in nbest])
    valid = torch.arange(lengths.max()) < lengths[:, None]  # (N,L)
    ways = [(model.net.decoder, with_sos(model, nbest))]
    if model.options.reverse_weight > 0:
        ways.append((model.net.right_decoder, with_sos(model, [tokens[::-1] for tokens in nbest])))
    heard = call(session, ways[0][1], lengths, encoded)[: len(ways)]
    copies = encoded.expand(len(nbest), -1, -1)
    frames = torch.full_like(lengths, encoded.size(1))
    meant = [decoder(hyps, copies, frames).log_softmax(-1) for decoder, hyps in ways]
    return [score[valid] for score in heard], [score[valid] for score in meant]


def with_sos(model: U2, sequences: list[list[int]]) -> torch.Tensor:
    """Puts sos in front of the sequences, and pads the shorter ones with eos: (N,L)."""
    rows = [torch.tensor([model.net.sos_id, *tokens]) for tokens in sequences]
    return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=model.net.eos_id)
