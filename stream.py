"""The encoder fed in pieces: what comes out equals the pass over the whole utterance under the same chunk mask.

A stream is a function (feats, state) -> (out, state). The state is a value: the old one stays valid, the network keeps
nothing. Per block it holds the keys and values of the visible left chunks and the last inputs of the causal convolution
(U2, section 2.3); in front of the blocks, the frames that the subsampling has yet to use. Axes as in conformer.py.
"""

from typing import NamedTuple

import torch

from cli import UserError
from conformer import Encoder, receptive_field, subsampled_length


class StreamState(NamedTuple):
    chunk_size: int  # encoder frames; below 1: everything is one chunk, which is complete when the last frame is there
    left_chunks: int  # chunks to the left that are seen, -1 for all
    feats: torch.Tensor  # (1,n,F) frames that later encoder frames still need
    offset: int  # encoder frames that have come out
    blocks: tuple  # per block ((keys, values), last inputs of the convolution), (None, None) at the beginning


def stream_state(encoder: Encoder, chunk_size: int, left_chunks: int = -1) -> StreamState:
    """The state before the first frame. Raises UserError for an encoder that sees the future."""
    if not encoder.options.causal:
        raise UserError("this model's convolution is not causal: it hears whole utterances only; train with --causal to stream")
    nothing = encoder.cmvn_mean.new_zeros(1, 0, len(encoder.cmvn_mean))
    return StreamState(chunk_size, left_chunks, nothing, 0, ((None, None),) * len(encoder.blocks))


def stream(encoder: Encoder, feats: torch.Tensor, state: StreamState, last: bool = False) -> tuple[torch.Tensor, StreamState]:
    """feats (1,n,F), n >= 0 -> encoder output (1,m,D) of the chunks now complete, and the state behind them.

    `last` also gives what remains, a shorter chunk, and hands back the state before the first frame of a new utterance.
    """
    feats = torch.cat((state.feats, feats), dim=1)
    field, rate = receptive_field(encoder.options.input_layer)
    ready = subsampled_length(feats.size(1), encoder.options.input_layer)  # encoder frames that feats suffice for
    out = [feats.new_zeros(1, 0, encoder.options.output_size)]
    while ready and (last or 0 < state.chunk_size <= ready):
        size = min(state.chunk_size, ready) if state.chunk_size > 0 else ready
        x, blocks = encoder.forward_chunk(feats[:, :(size - 1) * rate + field], state.offset, state.blocks)
        out.append(x)
        feats, ready = feats[:, size * rate:], ready - size
        keep = state.left_chunks * state.chunk_size if state.chunk_size > 0 else -1
        state = state._replace(offset=state.offset + size, blocks=tuple(trim(block, keep) for block in blocks))
    state = stream_state(encoder, state.chunk_size, state.left_chunks) if last else state._replace(feats=feats)
    return torch.cat(out, dim=1), state


def trim(block, keep: int):
    """The block's cache with the newest `keep` keys and values; all of them where keep is negative."""
    keys_values, last_inputs = block
    if keep >= 0:  # (B,H,S,D/H); cloned, because a view would keep the whole past alive
        keys_values = tuple(past[:, :, past.size(2) - min(keep, past.size(2)):].clone() for past in keys_values)
    return keys_values, last_inputs
