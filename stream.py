"""Recognises speech that comes in pieces, in two passes, and finds where an utterance ends.

Axes are named as in conformer.py. Times are in encoder frames, or in ms or seconds where a name or
a comment says so.
"""

import math
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from cli import UserError

import torch

import decode
from frames import StreamState, receptive_field
from transforms import FeatureState, check_samples, feature_state, stream_features

# WeNet has three rules. An utterance ends after SILENCE ms of silence, after SILENCE_AFTER_TEXT ms
# of silence behind some text, or after LONGEST ms in all. A frame is silent when the probability of
# CTC's blank is above BLANK_THRESHOLD.
SILENCE = 5000
SILENCE_AFTER_TEXT = 1000
LONGEST = 20000
BLANK_THRESHOLD = 0.8
# Nobody speaks once the blank has won this many frames in a row (640 ms with conv2d).
HUSH = 16


class Heard(NamedTuple):
    """Tells what was heard so far of the current utterance of a stream."""

    hypothesis: decode.Hypothesis  # its times count from the utterance's first encoder frame
    first_frame: int  # the number of the utterance's first encoder frame since the stream began
    seconds: float  # how much of the stream has been heard, without its tail
    final: bool  # True after the second pass; False after CTC prefix search, which may change it
    encoded: torch.Tensor | None = None  # (1,m,D) of the utterance, where final


class _Utterance(NamedTuple):
    """Holds an utterance as far as it has been heard."""

    first_frame: int  # as in Heard
    beam: decode.Beam
    chunks: list[torch.Tensor]  # the encoder's output (1,m,D), chunk by chunk
    hushes: list[torch.Tensor]  # (1,m) bool, chunk by chunk: True where nothing is searched
    frames: int = 0  # in all chunks
    silent: int = 0  # silent frames at the end
    # Frames of the last chunks in which the blank won every frame; an utterance begins in a hush.
    hushed: int = HUSH


class Listening(NamedTuple):
    """Holds a stream as far as it has been heard."""

    features: FeatureState
    encoder: StreamState
    utterance: _Utterance


def listen(
    model,
    pieces: Iterable[torch.Tensor],
    search: decode.SearchOptions,
    endpoints: bool = True,
    context=None,
    mode: str = "attention_rescoring",
) -> Iterator[Heard]:
    """Recognises pieces (n,) of a waveform, of any length, as they come: U2, section 3.3.

    model: a model.U2. context: as in decode.ctc_prefix_beam_search. After every chunk, a Heard has
    the text so far, by CTC prefix search. At the end of an utterance, a final Heard has the text
    that the attention decoders have rescored or, with another `mode`, the text of this search.
    Without `endpoints` all pieces are one utterance. Raises UserError for what decode.check_mode
    refuses, and for a piece that is no waveform, or whose samples are not finite or louder than
    transforms.LOUDEST. Such an error, and any error of `pieces`, comes after the final Heard of the
    sound before it.
    """
    advance, state = listener(model, search, endpoints, context, mode)
    waiting = no_samples(model, search.chunk_size)
    received = 0
    for samples, last in with_last(pieces, model.frontend.tail_samples):
        received += 0 if last else len(samples)
        chunks, waiting = in_chunks(samples, last, waiting)
        for chunk, last in chunks:
            heard, state = advance(chunk, last, received, state)
            if heard:
                yield heard


def listener(
    model,
    search: decode.SearchOptions,
    endpoints: bool = True,
    context=None,
    mode: str = "attention_rescoring",
):
    """Makes the function that hears a stream chunk by chunk, and its first state, for `listen`.

    The function (chunk (n,), last, received, state) -> (Heard or None, new state) takes the chunks
    of in_chunks, and how many samples of the stream have come by now, without its tail. States are
    values, so that one function hears many streams. Raises UserError for what decode.check_mode
    refuses.
    """
    decode.check_mode(mode, context)
    extract = stream_features(model.frontend)
    encoder = model.stream_state(search.chunk_size, search.left_chunks)
    silence = _Utterance(0, decode.prefix_start(context=context), [], [])

    def advance(chunk: torch.Tensor, last: bool, received: int, state: Listening):
        features, heard_features = extract(chunk, state.features)
        features = features[None].to(model.device)
        encoded, after = model.stream(features, state.encoder, last)  # (1,m,D)
        utterance = _hear_chunk(model, state.utterance, encoded, search)
        (found,) = decode.prefix_result(utterance.beam)
        first = utterance.first_frame
        end = first + utterance.frames
        seconds = received / model.frontend.sample_rate
        if not last:  # The sound behind the last frame ends with the stream, too.
            seconds = min(end * frame_ms(model) / 1000, seconds)
        has_text = bool(found.tokens)
        if last or endpoints and is_endpoint(model, has_text, utterance.silent, utterance.frames):
            whole = torch.cat(utterance.chunks, dim=1)
            hushed = torch.cat(utterance.hushes, dim=1)
            found = second_pass(model, found, whole, hushed, search, mode, context)
            after = encoder._replace(features=after.features)
            state = Listening(heard_features, after, silence._replace(first_frame=end))
            return Heard(found, first, seconds, True, whole), state
        heard = Heard(found, first, seconds, False) if encoded.size(1) else None
        return heard, Listening(heard_features, after, utterance)

    return advance, Listening(feature_state(), encoder, silence)


def _hear_chunk(
    model, utterance: _Utterance, encoded: torch.Tensor, search: decode.SearchOptions
) -> _Utterance:
    """Adds a chunk of the encoder's output, (1,m,D), to the utterance."""
    blank_id = model.net.blank_id
    size = encoded.size(1)
    log_probs = model.ctc_log_probs(encoded)  # (1,m,V)
    # Many unlikely paths through silence would add up to text, so in a hush no frame is searched.
    quiet = decode.blank_wins(log_probs, blank_id).all()
    quiet, blanks = decode.read(quiet, log_probs[0, :, blank_id])
    hushed = utterance.hushed + size if quiet else 0
    heeded = torch.tensor([0 if hushed >= HUSH else size])
    hush = torch.full((1, size), hushed >= HUSH, device=encoded.device)
    return utterance._replace(
        beam=decode.prefix_advance(utterance.beam, log_probs, search, blank_id, heeded),
        chunks=[*utterance.chunks, encoded],
        hushes=[*utterance.hushes, hush],
        frames=utterance.frames + size,
        silent=trailing_blanks(blanks, utterance.silent),
        hushed=hushed,
    )


def with_last(pieces: Iterable[torch.Tensor], tail: int = 0) -> Iterator[tuple[torch.Tensor, bool]]:
    """Yields the pieces, each with False, then silence (tail,) with True; an error comes last."""
    error = None
    count = 0
    try:
        for piece in pieces:
            samples = as_samples(piece)
            good, reason = check_samples(samples.numpy())
            yield samples[:good], False
            count += good
            if reason:
                raise UserError(
                    f"sample {count} of the stream: {reason}; mend the recording, or leave it out"
                )
    except Exception as failure:
        error = failure
    yield torch.zeros(tail), True
    if error:
        raise error


def as_samples(piece) -> torch.Tensor:
    """Returns a piece of a waveform as (n,) float32 on the CPU. Raises UserError for others."""
    if not isinstance(piece, torch.Tensor) or piece.dim() != 1 or not piece.is_floating_point():
        kind = type(piece).__name__
        if hasattr(piece, "shape"):
            kind += f" {piece.dtype} {tuple(piece.shape)}"
        raise UserError(f"a piece of the stream is a {kind}; give float tensors (n,), full scale 1")
    return piece.detach().float().cpu()


class Waiting(NamedTuple):
    """Holds the samples that wait until a chunk is complete."""

    size: float  # samples of this chunk
    later: float  # samples of each later one
    pieces: tuple[torch.Tensor, ...] = ()  # each (n,)


def no_samples(model, chunk_size: int) -> Waiting:
    """Returns the state before the first sample of a stream."""
    return Waiting(*piece_samples(model, chunk_size))


def in_chunks(
    piece: torch.Tensor, last: bool, waiting: Waiting
) -> tuple[list[tuple[torch.Tensor, bool]], Waiting]:
    """Cuts the pieces of with_last anew -> the chunks that a piece completes, what still waits.

    stream_features normalises the samples of a piece by the statistics up to the piece's end. After
    this cut, the same sound always has the same ends, in whatever pieces it came.
    """
    size, later, pieces = waiting
    pieces = (*pieces, piece)
    # Many small pieces become few: each is less than half as long as the one before it.
    while len(pieces) > 1 and 2 * len(pieces[-1]) >= len(pieces[-2]):
        pieces = (*pieces[:-2], torch.cat(pieces[-2:]))
    chunks = []
    if last or sum(map(len, pieces)) >= size:
        samples = torch.cat(pieces)
        while len(samples) >= size:
            chunks.append((samples[:size], False))
            samples = samples[size:]
            size = later
        pieces = (samples,)
        if last:
            chunks.append((samples, True))
    return chunks, Waiting(size, later, pieces)


def piece_samples(model, chunk_size: int) -> tuple[float, float]:
    """Counts the samples of a stream's first chunk and of each later one; inf at full context."""
    if chunk_size < 1:
        return math.inf, math.inf
    frontend = model.frontend
    field, rate = receptive_field(model.options.input_layer)
    first = ((chunk_size - 1) * rate + field - 1) * frontend.shift_samples + frontend.window_samples
    return first, chunk_size * rate * frontend.shift_samples


def frame_ms(model) -> float:
    """Gives the milliseconds from one encoder frame to the next."""
    return receptive_field(model.options.input_layer)[1] * model.frontend.shift_ms


def trailing_blanks(blank_log_probs: torch.Tensor, before: int) -> int:
    """Counts the silent frames at the end of (m,) frames; `before` silent ones stood in front."""
    for silent in (blank_log_probs.exp() > BLANK_THRESHOLD).tolist():
        before = before + 1 if silent else 0
    return before


def is_endpoint(model, has_text: bool, silent_frames: int, frames: int) -> bool:
    """Returns True where one of WeNet's three rules ends the utterance."""
    ms = frame_ms(model)
    return (
        silent_frames * ms >= SILENCE
        or has_text
        and silent_frames * ms >= SILENCE_AFTER_TEXT
        or frames * ms >= LONGEST
    )


def second_pass(
    model,
    found: decode.Hypothesis,
    encoded: torch.Tensor,
    hushed: torch.Tensor,
    search: decode.SearchOptions,
    mode: str,
    context=None,
) -> decode.Hypothesis:
    """Rescores or, with another mode, searches anew, over the encoder's output (1,m,D).

    The first pass has not searched in the frames `hushed` (1,m); a new search hears nothing there.
    """
    if hushed.all():  # The blank wins every frame, or there is none.
        return found
    lengths = torch.tensor([encoded.size(1)], device=encoded.device)
    if mode != "attention_rescoring":
        return model.search(encoded, lengths, mode, search, context, hushed)[0]
    return model.rescore([found], encoded, lengths, search)[0]
