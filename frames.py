"""This file has lengths, masks and positions of frames and labels, and the state of a stream.

Nothing here has weights. Axes are those of conformer.py. Masks and states follow U2 (Zhang et al.
2020, arXiv:2012.05481), section 2.3.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F

# (kernel, stride) of each convolution, over time and over mel bins alike; none is padded.
SUBSAMPLING = {
    "conv2d": ((3, 2), (3, 2)),
    "conv2d6": ((3, 2), (5, 3)),
    "conv2d8": ((3, 2), (3, 2), (3, 2)),
}


def subsampled_length(length, input_layer: str):
    """Returns how many encoder frames `length` (int, array or tensor) feature frames make."""
    for kernel, stride in SUBSAMPLING[input_layer]:
        length = (length + stride - kernel) // stride
        length = length * (length > 0)  # too short for one frame: none, not a negative number
    return length


def receptive_field(input_layer: str) -> tuple[int, int]:
    """Returns how many feature frames an encoder frame sees, and how many later the next begins."""
    field = 1
    rate = 1
    for kernel, stride in SUBSAMPLING[input_layer]:
        field += (kernel - 1) * rate
        rate *= stride
    return field, rate


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copies a tensor of the CPU to the device, without waiting for what a GPU has still to do."""
    if device.type != "cuda" or tensor.is_cuda:
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def valid_mask(lengths: torch.Tensor, max_length: int) -> torch.Tensor:
    """Makes of lengths (B,) a mask (B, max_length), True where a frame is real and not padding."""
    return torch.arange(max_length, device=lengths.device) < lengths[:, None]


def chunk_mask(size: int, chunk_size: int, left_chunks: int = -1, device=None) -> torch.Tensor:
    """Makes a mask (size, size), True where frame `row` may see frame `column` (U2, section 2.3).

    A frame sees its own chunk and the `left_chunks` before it, or all chunks before it with -1. A
    chunk_size below 1 is full context: one chunk of all frames.
    """
    chunk = torch.arange(size, device=device) // (chunk_size if chunk_size > 0 else size)
    ahead = chunk[None, :] - chunk[:, None]  # key chunk minus query chunk
    mask = ahead <= 0
    return mask if left_chunks < 0 else mask & (ahead >= -left_chunks)


def decoder_io(labels, label_lengths, sos_id: int, eos_id: int):
    """Makes of labels (B,U) inputs `sos y1 .. yU`, outputs `y1 .. yU eos`, valid, each (B,U+1)."""
    labels = labels.masked_fill(~valid_mask(label_lengths, labels.size(1)), eos_id)
    inputs = F.pad(labels, (1, 0), value=sos_id)
    outputs = F.pad(labels, (0, 1), value=eos_id)
    return inputs, outputs, valid_mask(label_lengths + 1, labels.size(1) + 1)


def reverse(labels, label_lengths):
    """Reverses each row of labels (B,U) within its own length. The rest of the row is padding."""
    index = label_lengths[:, None] - 1 - torch.arange(labels.size(1), device=labels.device)
    return labels.gather(1, index.clamp(min=0))


def sinusoids(size: int, width: int, offset: int = 0, device=None) -> torch.Tensor:
    """Encodes the positions offset .. offset + size - 1 -> (size, width), see sinusoids_at."""
    positions = torch.arange(offset, offset + size, device=device, dtype=torch.float32)
    return sinusoids_at(positions, width)


def sinusoids_at(positions: torch.Tensor, width: int) -> torch.Tensor:
    """Encodes positions (S,) float32 -> (S, width), as in Vaswani et al. 2017, section 3.5."""
    even = torch.arange(0, width, 2, device=positions.device, dtype=torch.float32)
    angle = positions[:, None] * torch.exp(even * -(math.log(10000.0) / width))
    return torch.stack((angle.sin(), angle.cos()), dim=-1).flatten(1)  # sine, cosine, sine, ...


class BlockState(NamedTuple):
    """Keeps what a block needs of earlier frames; None before the first frame (U2, section 2.3)."""

    keys: torch.Tensor | None = None  # (B,H,S,D/H)
    values: torch.Tensor | None = None  # (B,H,S,D/H)
    positions: torch.Tensor | None = None  # (1,H,S,D/H), projected; None: project them anew
    convolution: torch.Tensor | None = None  # (B,D,kernel-1), last inputs of the convolution

    def and_then(self, keys, values, positions):
        """Appends the keys, values and positions of the next frames."""
        pairs = zip(self, (keys, values, positions))
        joined = (new if old is None else torch.cat((old, new), dim=2) for old, new in pairs)
        return BlockState(*joined, self.convolution)

    def rows(self, index):
        """Picks the rows `index` of a decoder block's state."""
        return BlockState(self.keys[index], self.values[index])

    def newest(self, frames: int):
        """Keeps the last `frames` keys, values and positions; all of them if negative."""
        if frames < 0:
            return self
        # Cloned, because a view would keep the whole past alive.
        kept = (x if x is None else x[:, :, max(x.size(2) - frames, 0) :].clone() for x in self[:3])
        return BlockState(*kept, self.convolution)


MAX_POSITION = 5000  # encoder frames, 200 s: as far as WeNet's table of positions goes


class StreamState(NamedTuple):
    """Says where a stream stands. It is a value, from which a stream can go on more than once."""

    chunk_size: int  # encoder frames; below 1: one chunk of everything, which ends with the stream
    left_chunks: int  # chunks to the left that are seen, -1 for all
    max_position: int  # the largest position, see Encoder.stream_state
    features: torch.Tensor  # (1,n,F) frames that later encoder frames still need
    offset: int  # encoder frames that have come out
    blocks: tuple[BlockState, ...]  # all with equally many frames
