"""Speech in pieces: recognition in two passes with endpoints, on the encoder's stream (conformer.Encoder.stream).

Axes as in conformer.py.
"""

import math
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from cli import UserError

import torch

import decode
from conformer import receptive_field
from transforms import check_samples, feature_state, stream_features

# An utterance ends after so many ms of blanks, of blanks behind some text, or of speech: WeNet's rules 1 to 3.
SILENCE, SILENCE_AFTER_TEXT, LONGEST = 5000, 1000, 20000
BLANK_THRESHOLD = (
    0.8  # a frame is silent when CTC's blank is likelier than this; WeNet's value, too
)
HUSH = 16  # encoder frames in a row in which the blank wins, from which on nothing is being said


class Heard(NamedTuple):
    """What a stream says of the utterance that it is in."""

    hypothesis: decode.Hypothesis  # times count from the utterance's first encoder frame
    first_frame: int  # that frame's number since the stream began
    seconds: float  # how much of the stream has been heard
    final: bool  # after the second pass; False: CTC prefix search, what may yet change
    memory: torch.Tensor | None = (
        None  # (1,m,D), the encoder's output over the utterance, where final
    )


def listen(
    model,
    pieces: Iterable[torch.Tensor],
    search: decode.SearchOptions,
    endpoints: bool = True,
    context=None,
) -> Iterator[Heard]:
    """Recognises pieces of a waveform, each (n,) of any length n, as they come: two passes (U2, section 3.3).

    model: a model.U2. After every chunk comes what was heard so far, by CTC prefix search; at the end of an
    utterance, the same rescored by the attention decoders. Without `endpoints` all pieces are one utterance.
    context: a context.ContextGraph of hotwords. Raises UserError for a piece that is none, whose
    samples are not finite or louder than transforms.LOUDEST; such an error, and any that `pieces`
    raises, comes after what was heard up to there.
    """
    advance, features_state = stream_features(model.frontend), feature_state()
    state, first_frame = model.stream_state(search.chunk_size, search.left_chunks), 0
    beam, hushed = decode.prefix_start(context=context), HUSH
    memory, frames, silent = [], 0, 0
    sizes = (
        piece_samples(model, search.chunk_size) if search.chunk_size > 0 else (math.inf, math.inf)
    )
    for samples, last in in_chunks(with_last(pieces), *sizes):
        features, features_state = advance(samples, features_state)
        out, state = model.stream(features[None].to(model.device), state, last)  # (1,m,D)
        log_probs = model.ctc_log_probs(out)  # (1,m,V)
        # Many unlikely paths through silence would add up to text; there the blank is certain.
        quiet = bool(decode.blank_wins(log_probs, model.net.blank_id).all())
        hushed = hushed + out.size(1) if quiet else 0
        heeded = torch.tensor([0 if hushed >= HUSH else out.size(1)])
        beam = decode.prefix_advance(beam, log_probs, search.beam_size, model.net.blank_id, heeded)
        memory.append(out)
        frames += out.size(1)
        silent = trailing_blanks(log_probs[0, :, model.net.blank_id], silent)
        (heard,), seconds = (
            decode.prefix_result(beam),
            (first_frame + frames) * frame_ms(model) / 1000,
        )
        if last or endpoints and is_endpoint(model, bool(heard.tokens), silent, frames):
            memory = torch.cat(memory, dim=1)
            yield Heard(
                second_pass(model, heard, memory, search), first_frame, seconds, True, memory
            )
            first_frame += frames
            state = model.stream_state(search.chunk_size, search.left_chunks)._replace(
                features=state.features
            )
            beam, hushed = decode.prefix_start(context=context), HUSH
            memory, frames, silent = [], 0, 0
        elif out.size(1):
            yield Heard(heard, first_frame, seconds, False)


def with_last(pieces: Iterable[torch.Tensor]) -> Iterator[tuple[torch.Tensor, bool]]:
    """The pieces, each with False, then an empty one with True. An error comes behind that."""
    error, count = None, 0
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
    yield torch.zeros(0), True
    if error:
        raise error


def as_samples(piece) -> torch.Tensor:
    """A piece of a waveform as (n,) float32 on the CPU. Raises UserError for what is none."""
    if not isinstance(piece, torch.Tensor) or piece.dim() != 1 or not piece.is_floating_point():
        kind = type(piece).__name__
        if hasattr(piece, "shape"):
            kind += f" {piece.dtype} {tuple(piece.shape)}"
        raise UserError(f"a piece of the stream is a {kind}; give float tensors (n,), full scale 1")
    return piece.detach().float().cpu()


def in_chunks(
    pieces: Iterable[tuple[torch.Tensor, bool]], first: float, later: float
) -> Iterator[tuple[torch.Tensor, bool]]:
    """What with_last gives, cut anew: `first` samples, then `later` at a time; what remains has True.

    stream_features normalises samples by what is known at their end. With the same ends for the same
    sound, the pieces in which the sound came make no difference.
    """
    waiting, length, size = [], 0, first
    for piece, last in pieces:
        waiting.append(piece)
        length += len(piece)
        if length >= size or last:
            samples = torch.cat(waiting)
            while len(samples) >= size:
                yield samples[:size], False
                samples, size = samples[size:], later
            waiting, length = [samples], len(samples)
        if last:
            yield samples, True


def piece_samples(model, chunk_size: int) -> tuple[int, int]:
    """Samples that make the first chunk of a stream, and each one after it; chunk_size at least 1."""
    frontend, (field, rate) = model.frontend, receptive_field(model.options.input_layer)
    first = ((chunk_size - 1) * rate + field - 1) * frontend.shift_samples + frontend.window_samples
    return first, chunk_size * rate * frontend.shift_samples


def frame_ms(model) -> int:
    """From one encoder frame to the next."""
    return receptive_field(model.options.input_layer)[1] * model.frontend.frame_shift


def cut(model, waveform: torch.Tensor, chunk_size: int) -> tuple[torch.Tensor, ...]:
    """A recording (N,) in pieces of a chunk, as a microphone would give it; whole for chunk sizes below 1."""
    samples = chunk_size * frame_ms(model) * model.frontend.sample_rate // 1000
    return waveform.split(samples) if chunk_size > 0 else (waveform,)


def trailing_blanks(blank_log_probs: torch.Tensor, before: int) -> int:
    """Silent frames at the end, given those before these (m,)."""
    for silent in (blank_log_probs.exp() > BLANK_THRESHOLD).tolist():
        before = before + 1 if silent else 0
    return before


def is_endpoint(model, has_text: bool, silent_frames: int, frames: int) -> bool:
    """WeNet's three rules, any of which ends an utterance."""
    ms = frame_ms(model)
    return (
        silent_frames * ms >= SILENCE
        or has_text
        and silent_frames * ms >= SILENCE_AFTER_TEXT
        or frames * ms >= LONGEST
    )


def second_pass(
    model, heard: decode.Hypothesis, memory: torch.Tensor, search: decode.SearchOptions
) -> decode.Hypothesis:
    if not heard.tokens or not memory.size(1):
        return heard
    lengths = torch.tensor([memory.size(1)], device=memory.device)
    return model.rescore([heard], memory, lengths, search)[0]
