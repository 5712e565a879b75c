"""The U2++ network: one conformer encoder, a CTC branch, and left-to-right and right-to-left attention decoders.

Sources: U2 (Zhang et al. 2020, arXiv:2012.05481), U2++ (Wu et al. 2021, arXiv:2106.05642), Conformer (Gulati et al. 2020,
arXiv:2005.08100); behaviour as in WeNet. Axes: B batch, T frames, U labels, D model, H heads, V vocabulary, F mel bins.
"""

import math
from typing import NamedTuple

from cli import UserError, option, options_class

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from kernels import Dropout, Linear, attention, conv_relu, depthwise

# What a preset does not name keeps the default of ModelOptions; every name can be overridden by its flag.
PRESETS = {
    "tiny": dict(
        output_size=64,
        attention_heads=4,
        linear_units=256,
        num_blocks=4,
        cnn_module_kernel=15,
        decoder_num_blocks=1,
        r_num_blocks=1,
        decoder_linear_units=256,
        attention_dropout_rate=0.0,
    ),
    "small": dict(
        output_size=144,
        attention_heads=4,
        linear_units=576,
        num_blocks=6,
        cnn_module_kernel=15,
        decoder_num_blocks=2,
        r_num_blocks=1,
        decoder_linear_units=576,
        attention_dropout_rate=0.0,
    ),
    "base": dict(
        output_size=256,
        attention_heads=4,
        linear_units=2048,
        num_blocks=12,
        cnn_module_kernel=8,
        decoder_num_blocks=3,
        r_num_blocks=3,
        decoder_linear_units=2048,
    ),
}


@options_class
class ModelOptions:
    """Architecture and loss, in WeNet's words. Raises UserError for sizes that do not fit each other."""

    encoder: str = option(
        "conformer", "blocks of the encoder", choices=("conformer", "transformer")
    )
    output_size: int = option(256, "model width D", at_least=2, at_most=8192)
    attention_heads: int = option(
        4, "attention heads, in encoder and decoders", at_least=1, at_most=256
    )
    linear_units: int = option(2048, "feed-forward width of the encoder", at_least=1, at_most=2**16)
    num_blocks: int = option(12, "encoder blocks", at_least=1, at_most=200)
    activation_type: str = option("swish", "activation of the encoder", choices=("swish", "relu"))
    pos_enc_layer_type: str = option(
        "rel_pos",
        "positions in the attention alone, or also added to its input (abs_pos)",
        choices=("rel_pos", "abs_pos"),
    )
    selfattention_layer_type: str = option(
        "rel_selfattn",
        "the encoder's attention with or without a term for positions",
        choices=("rel_selfattn", "selfattn"),
    )
    cnn_module_kernel: int = option(
        8, "kernel of the depthwise convolution, in encoder frames", at_least=1, at_most=1000
    )
    causal: bool = option(
        True, "the depthwise convolution sees the past only (needed for streaming)"
    )
    cnn_module_norm: str = option(
        "layer_norm", "norm in the convolution module", choices=("layer_norm", "batch_norm")
    )
    input_layer: str = option(
        "conv2d",
        "subsampling of the features by 4, 6 or 8",
        choices=("conv2d", "conv2d6", "conv2d8"),
    )
    decoder_num_blocks: int = option(
        3, "blocks of the left-to-right decoder", at_least=1, at_most=200
    )
    r_num_blocks: int = option(
        3,
        "blocks of the right-to-left decoder (U2++); unused with reverse_weight 0 (U2)",
        at_least=0,
        at_most=200,
    )
    decoder_linear_units: int = option(
        2048, "feed-forward width of the decoders", at_least=1, at_most=2**16
    )
    decoder_attention_heads: int = option(
        0, "attention heads of the decoders; 0: as many as in the encoder", at_least=0, at_most=256
    )
    keep_right_decoder: bool = option(
        False, "with reverse_weight 0: have a right-to-left decoder, which is not trained"
    )
    dropout_rate: float = option(0.1, "dropout in every block", at_least=0.0, at_most=0.9)
    attention_dropout_rate: float = option(
        0.1, "dropout on attention weights", at_least=0.0, at_most=0.9
    )
    ctc_weight: float = option(
        0.3, "loss = ctc_weight CTC + (1 - ctc_weight) attention", at_least=0.0, at_most=1.0
    )
    reverse_weight: float = option(
        0.3,
        "share of the right-to-left decoder in the attention loss; 0 makes it U2",
        at_least=0.0,
        at_most=1.0,
    )
    lsm_weight: float = option(
        0.1, "label smoothing of the attention loss", at_least=0.0, at_most=1.0
    )
    length_normalized_loss: bool = option(
        False, "attention loss per label instead of per utterance"
    )
    use_dynamic_chunk: bool = option(
        True, "train on full context or a random chunk of at most 1 s (U2, section 2.3)"
    )
    use_dynamic_left_chunk: bool = option(
        False, "also draw how many chunks to the left are seen in training"
    )

    def __post_init__(self):
        width, heads = self.output_size, self.attention_heads
        if width % heads or width % (self.decoder_attention_heads or heads) or width % 2:
            raise UserError(
                f"--output_size {width} must be even and divisible by --attention_heads {heads} and by "
                "--decoder_attention_heads"
            )
        if not self.causal and self.cnn_module_kernel % 2 == 0:
            raise UserError(
                f"--no-causal needs an odd --cnn_module_kernel, not {self.cnn_module_kernel}"
            )


# ---------------------------------------------------------------------------------------------------------------------
# Lengths, masks, chunks

# (kernel, stride) of each convolution, over time and over mel bins alike; none is padded.
SUBSAMPLING = {
    "conv2d": ((3, 2), (3, 2)),
    "conv2d6": ((3, 2), (5, 3)),
    "conv2d8": ((3, 2), (3, 2), (3, 2)),
}


def subsampled_length(length, input_layer: str):
    """Frames that leave the subsampling for `length` that enter; works on ints, NumPy arrays and tensors, floor 0."""
    for kernel, stride in SUBSAMPLING[input_layer]:
        length = (length - kernel) // stride + 1
        length = length * (length > 0)  # too short for one frame: none, not a negative number
    return length


def receptive_field(input_layer: str) -> tuple[int, int]:
    """(feature frames that one encoder frame sees, feature frames from one encoder frame to the next)."""
    field, rate = 1, 1
    for kernel, stride in SUBSAMPLING[input_layer]:
        field, rate = field + (kernel - 1) * rate, rate * stride
    return field, rate


def valid_mask(lengths: torch.Tensor, max_length: int) -> torch.Tensor:
    """(B,) lengths -> (B, max_length) bool, True where a frame is real and not padding."""
    return torch.arange(max_length, device=lengths.device) < lengths[:, None]


def chunk_mask(size: int, chunk_size: int, left_chunks: int = -1, device=None) -> torch.Tensor:
    """(size, size) bool: query row may see key column, its own chunk and `left_chunks` before it (-1: all). U2, 2.3."""
    chunk = torch.arange(size, device=device) // chunk_size
    ahead = chunk[None, :] - chunk[:, None]  # key chunk minus query chunk
    mask = ahead <= 0
    return mask if left_chunks < 0 else mask & (ahead >= -left_chunks)


def draw_chunk(
    size: int, options: ModelOptions, generator: torch.Generator | None = None
) -> tuple[int, int]:
    """(chunk_size, left_chunks) of one training step over `size` encoder frames; (-1, -1) is full context.

    Half of the draws see everything, the others a chunk of 1..25 frames (1 s of audio; U2, section 2.3).
    """
    if not options.use_dynamic_chunk or size < 2:
        return -1, -1
    chunk = int(torch.randint(1, size, (1,), generator=generator))
    if chunk > size // 2:
        return -1, -1
    chunk = chunk % (100 // receptive_field(options.input_layer)[1]) + 1
    left = -1
    if options.use_dynamic_left_chunk:
        left = int(torch.randint(0, max((size - 1) // chunk, 1), (1,), generator=generator))
    return chunk, left


def sinusoids(size: int, width: int, offset: int = 0, device=None) -> torch.Tensor:
    """(size, width) sine/cosine positions offset .. offset+size-1 (Vaswani et al. 2017, section 3.5)."""
    return sinusoids_at(
        torch.arange(offset, offset + size, device=device, dtype=torch.float32), width
    )


def sinusoids_at(positions: torch.Tensor, width: int) -> torch.Tensor:
    """The same for given positions (S,) float32 -> (S, width)."""
    rate = torch.exp(
        torch.arange(0, width, 2, device=positions.device, dtype=torch.float32)
        * -(math.log(10000.0) / width)
    )
    angle = positions[:, None] * rate
    return torch.stack((angle.sin(), angle.cos()), dim=-1).flatten(
        1
    )  # (size, width/2, 2) -> (size, width) interleaved


# ---------------------------------------------------------------------------------------------------------------------
# Building blocks

ACTIVATIONS = {"swish": F.silu, "relu": F.relu}


class Attention(nn.Module):
    """Multi-head attention, query against memory (B,T,D); through scaled_dot_product_attention."""

    def __init__(self, width: int, heads: int, dropout: float):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.linear_q = Linear(width, width)
        self.linear_kv = Linear(width, 2 * width)
        self.linear_out = Linear(width, width)

    def split(self, x):
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B,T,D) -> (B,H,T,D/H)

    def keys_values(self, memory):
        """memory (B,T,D) -> keys and values, each (B,H,T,D/H)."""
        k, v = self.linear_kv(memory).chunk(2, dim=-1)
        return self.split(k), self.split(v)

    def attend(self, q, k, v, mask=None, is_causal=False):
        """q (B,H,U,D/H), k and v (B,H,T,D/H), mask bool broadcastable to (B,H,U,T) -> (B,U,D)."""
        y = attention(q, k, v, mask, self.dropout if self.training else 0.0, is_causal)
        return self.linear_out(
            y.transpose(1, 2).flatten(2)
        )  # (B,H,U,D/H) -> (B,U,H,D/H) -> (B,U,D)

    def forward(self, x, memory, mask=None, is_causal=False):
        return self.attend(self.split(self.linear_q(x)), *self.keys_values(memory), mask, is_causal)


class SelfAttention(Attention):
    """Self-attention without a term for positions: x has them, or nothing does."""

    def forward(self, x, positions, mask=None, past=None):
        """RelativeAttention's interface; `positions` is not looked at."""
        present = join(past, self.keys_values(x))  # (B,H,S,D/H)
        return self.attend(self.split(self.linear_q(x)), *present, mask), present


class RelativeAttention(Attention):
    """Self-attention with Transformer-XL's position term, without the shift, as WeNet has it.

    Without the shift the position term depends on the key alone: (q+u).k + (q+v).p = q.(k+p) + (u.k + v.p). That is plain
    attention with keys k+p and one bias per key, and the bias is one more key dimension against a query of constant 1,
    so no mask ever needs a gradient.
    """

    def __init__(self, width: int, heads: int, dropout: float):
        super().__init__(width, heads, dropout)
        self.linear_pos = Linear(width, width, bias=False)
        self.pos_bias_u = nn.Parameter(torch.empty(heads, width // heads))
        self.pos_bias_v = nn.Parameter(torch.empty(heads, width // heads))
        nn.init.xavier_uniform_(self.pos_bias_u)
        nn.init.xavier_uniform_(self.pos_bias_v)

    def forward(self, x, positions, mask=None, past=None):
        """x (B,T,D) -> (B,T,D), and what to hand on: keys and values, each (B,H,S,D/H), and projected positions (1,H,S,D/H).

        `past` is that of the S-T frames before x (None: S = T); of the projected positions it may lack the last. `positions`
        (1,N,D) are those of the N keys that it lacks. mask is bool and broadcastable to (B,1,T,S).
        """
        q = self.split(self.linear_q(x))  # (B,H,T,D/H)
        k, v, p = present = join(
            past, (*self.keys_values(x), self.split(self.linear_pos(positions)))
        )
        bias = (k * self.pos_bias_u[:, None]).sum(-1, keepdim=True) + (
            p * self.pos_bias_v[:, None]
        ).sum(-1, keepdim=True)
        q = F.pad(q, (0, 1), value=1.0)  # (B,H,T,D/H+1)
        k = torch.cat((k + p, bias.to(k.dtype)), dim=-1)
        width = v.size(-1)
        y = attention(
            q,
            k,
            F.pad(v, (0, 1)),  # values as wide as keys keep the fused kernel
            mask,
            self.dropout if self.training else 0.0,
            scale=1 / math.sqrt(width),
        )
        return self.linear_out(
            y[..., :width].transpose(1, 2).flatten(2)
        ), present  # (B,H,T,D/H) -> (B,T,D)


def join(past, present):
    """Keys, values and the like, (B,H,T,D/H) each, behind those of earlier frames, if there are any."""
    return present if past is None else tuple(torch.cat(pair, dim=2) for pair in zip(past, present))


class FeedForward(nn.Module):
    def __init__(self, width: int, hidden: int, dropout: float, activation):
        super().__init__()
        self.w_1, self.w_2 = Linear(width, hidden), Linear(hidden, width)
        self.dropout, self.activation = Dropout(dropout), activation

    def forward(self, x):
        return self.w_2(self.dropout(self.activation(self.w_1(x))))


def self_attention(o: ModelOptions) -> nn.Module:
    kind = {"rel_selfattn": RelativeAttention, "selfattn": SelfAttention}[
        o.selfattention_layer_type
    ]
    return kind(o.output_size, o.attention_heads, o.attention_dropout_rate)


class ConvolutionModule(nn.Module):
    """Gated, depthwise convolution over time with layer or batch norm (Conformer, section 2.2); causal for streaming."""

    def __init__(self, o: ModelOptions):
        super().__init__()
        width, kernel, causal = o.output_size, o.cnn_module_kernel, o.causal
        if not causal and kernel % 2 == 0:
            raise ValueError(
                f"cnn_module_kernel {kernel}: a convolution that is not causal needs an odd kernel"
            )
        self.causal, self.kernel = causal, kernel
        self.pointwise_conv1 = Linear(width, 2 * width)
        self.depthwise_conv = nn.Conv1d(width, width, kernel, groups=width)
        self.norm = (
            nn.BatchNorm1d(width) if o.cnn_module_norm == "batch_norm" else nn.LayerNorm(width)
        )
        self.activation = ACTIVATIONS[o.activation_type]
        self.pointwise_conv2 = Linear(width, width)

    def forward(self, x, valid, past=None):
        """x (B,T,D), valid (B,T,1) -> (B,T,D), padding frames 0, and what the next frames need of these, (B,D,kernel-1).

        `past` is that of the frames before x, None at the beginning.
        """
        x = F.glu(self.pointwise_conv1(x * valid), dim=-1)  # (B,T,2D) -> (B,T,D)
        if not (self.causal or self.training):
            x = (
                x * valid
            )  # what follows the last frame is zero, padding or not; (WeNet's training sees glu(bias) in padding)
        present = None
        if self.causal:
            before = self.silence(x) if past is None else past  # (B,D,kernel-1)
            x = torch.cat((before.transpose(1, 2), x), dim=1)  # (B,kernel-1+T,D)
            present = x[:, x.size(1) - self.kernel + 1 :].transpose(1, 2)
        x = self.depthwise(x, few=past is not None)  # (B,T,D)
        if isinstance(self.norm, nn.BatchNorm1d):  # in training over padding too, as in WeNet
            x = self.norm(x.transpose(1, 2)).transpose(1, 2)  # (B,T,D) -> (B,D,T) -> (B,T,D)
        else:
            x = self.norm(x)
        x = self.activation(x)
        return self.pointwise_conv2(x) * valid, present

    def depthwise(self, x, few: bool = False):
        """(B,T,D) -> (B,T',D); T' is T, or kernel - 1 less where x brings the frames before it."""
        padding = 0 if self.causal else (self.kernel - 1) // 2
        conv = self.depthwise_conv
        return depthwise(x, conv.weight, conv.bias, padding, few)

    def silence(self, x):
        """What lies before the first frame: WeNet pads zeros in front of the first pointwise layer; behind its gate a zero
        frame is glu(bias). -> (B,D,kernel-1)"""
        edge = F.glu(self.pointwise_conv1.bias, dim=0).to(x.dtype)
        return edge[None, :, None].expand(x.size(0), -1, self.kernel - 1)


class ConformerBlock(nn.Module):
    """Half feed-forward, self-attention, convolution, half feed-forward, norm (Conformer, section 2.4)."""

    def __init__(self, o: ModelOptions):
        super().__init__()
        d = o.output_size
        self.norm_ff_macaron, self.norm_mha, self.norm_conv = (
            nn.LayerNorm(d),
            nn.LayerNorm(d),
            nn.LayerNorm(d),
        )
        self.norm_ff, self.norm_final = nn.LayerNorm(d), nn.LayerNorm(d)
        activation = ACTIVATIONS[o.activation_type]
        self.feed_forward_macaron = FeedForward(d, o.linear_units, o.dropout_rate, activation)
        self.self_attn = self_attention(o)
        self.conv_module = ConvolutionModule(o)
        self.feed_forward = FeedForward(d, o.linear_units, o.dropout_rate, activation)
        self.dropout = Dropout(o.dropout_rate)

    def forward(self, x, positions, mask, valid, past=(None, None)):
        """x (B,T,D), positions (1,N,D), mask (B,1,T,S), valid (B,T,1) -> (B,T,D), and what the next frames need of these.

        `past` is that of the S-T frames before x: (the attention's, see RelativeAttention; the convolution's last inputs).
        """
        x = torch.add(
            x, self.dropout(self.feed_forward_macaron(self.norm_ff_macaron(x))), alpha=0.5
        )
        y, seen = self.self_attn(self.norm_mha(x), positions, mask, past[0])
        x = x + self.dropout(y)
        y, last_inputs = self.conv_module(self.norm_conv(x), valid, past[1])
        x = x + self.dropout(y)
        x = torch.add(x, self.dropout(self.feed_forward(self.norm_ff(x))), alpha=0.5)
        return self.norm_final(x), (seen, last_inputs)


class TransformerBlock(nn.Module):
    """Self-attention and feed-forward, norm first (Vaswani et al. 2017, section 3.1); ConformerBlock's interface."""

    def __init__(self, o: ModelOptions):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(o.output_size), nn.LayerNorm(o.output_size)
        self.self_attn = self_attention(o)
        self.feed_forward = FeedForward(
            o.output_size, o.linear_units, o.dropout_rate, ACTIVATIONS[o.activation_type]
        )
        self.dropout = Dropout(o.dropout_rate)

    def forward(self, x, positions, mask, valid, past=(None, None)):
        y, seen = self.self_attn(self.norm1(x), positions, mask, past[0])
        x = x + self.dropout(y)
        return x + self.dropout(self.feed_forward(self.norm2(x))), (seen, None)


class Subsampling(nn.Module):
    """2-D convolutions over (time, mel), then one linear layer: (B,T,F) -> (B,T',D)."""

    def __init__(self, input_layer: str, num_mel_bins: int, width: int):
        super().__init__()
        if not subsampled_length(num_mel_bins, input_layer):
            raise UserError(
                f"--num_mel_bins {num_mel_bins}: --input_layer {input_layer} takes at least "
                f"{receptive_field(input_layer)[0]} of them"
            )
        self.convs = nn.ModuleList(
            nn.Conv2d(1 if i == 0 else width, width, kernel, stride)
            for i, (kernel, stride) in enumerate(SUBSAMPLING[input_layer])
        )
        self.out = Linear(width * subsampled_length(num_mel_bins, input_layer), width)

    def forward(self, x):
        x = x[:, None]  # (B,1,T,F)
        for conv in self.convs:  # (B,D,T',F'), channels last: several times faster on a CPU
            x = conv_relu(x, conv, self.training)
        return self.out(x.transpose(1, 2).flatten(2))  # (B,T',D,F') -> (B,T',D*F') -> (B,T',D)


MAX_POSITION = 5000  # encoder frames, 200 s: as far as WeNet's table of positions goes


class StreamState(NamedTuple):
    """Where a stream is; a value, so that the old one stays valid after the stream has gone on."""

    chunk_size: (
        int  # encoder frames; below 1: everything is one chunk, which the last frame completes
    )
    left_chunks: int  # chunks to the left that are seen, -1 for all
    max_position: int  # the largest position, see Encoder.stream_state
    features: torch.Tensor  # (1,n,F) frames that later encoder frames still need
    offset: int  # encoder frames that have come out
    blocks: tuple  # per block ((keys, values, positions), last inputs of the convolution), (None, None) at the beginning


def without_positions(block):
    """The block's cache for a chunk that has not moved on: what it sees of the past moves back."""
    seen, last_inputs = block
    return seen and (*seen[:2], seen[0][:, :, :0]), last_inputs


def trim(block, keep: int):
    """The block's cache with the newest `keep` keys, values and positions; all of them where keep is negative."""
    seen, last_inputs = block
    if keep >= 0:  # (B,H,S,D/H); cloned, because a view would keep the whole past alive
        seen = tuple(past[:, :, past.size(2) - min(keep, past.size(2)) :].clone() for past in seen)
    return seen, last_inputs


class Encoder(nn.Module):
    def __init__(self, o: ModelOptions, num_mel_bins: int):
        super().__init__()
        self.options = o
        self.gradient_checkpointing = (
            False  # recompute every block in backward instead of keeping what is inside
        )
        # Global CMVN: features are shifted and scaled here, (feats - mean) * istd; as made, it changes nothing.
        self.register_buffer("cmvn_mean", torch.zeros(num_mel_bins))
        self.register_buffer("cmvn_istd", torch.ones(num_mel_bins))
        self.embed = Subsampling(o.input_layer, num_mel_bins, o.output_size)
        self.embed.to(memory_format=torch.channels_last)
        kind = {"conformer": ConformerBlock, "transformer": TransformerBlock}[o.encoder]
        self.blocks = nn.ModuleList(kind(o) for _ in range(o.num_blocks))
        self.after_norm = nn.LayerNorm(o.output_size)
        self.dropout = Dropout(o.dropout_rate)

    def forward(self, feats, feat_lengths, chunk_size: int = -1, left_chunks: int = -1):
        """feats (B,T,F), feat_lengths (B,) -> (B,T',D), (B,). chunk_size in encoder frames, -1 for full context."""
        short = receptive_field(self.options.input_layer)[0] - feats.size(1)
        x = self.subsample(F.pad(feats, (0, 0, 0, max(short, 0))))  # (B,T',D) with T' >= 1
        lengths = subsampled_length(feat_lengths, self.options.input_layer)
        size, width = x.shape[1:]
        positions = self.dropout(
            sinusoids(size, width, device=x.device).to(x.dtype)[None]
        )  # (1,T',D)
        x = self.dropout(x)
        valid = valid_mask(lengths, size)  # (B,T')
        # A padded query sees padded keys too: what it computes is never used, and no row of the mask is empty.
        mask = valid[:, None, :] | ~valid[:, :, None]  # (B,T',T')
        if chunk_size > 0:
            mask = mask & chunk_mask(size, chunk_size, left_chunks, x.device)
        recompute = self.gradient_checkpointing and self.training
        for block in self.blocks:
            inputs = x, positions, mask[:, None], valid[..., None].to(x.dtype)
            x, _ = checkpoint(block, *inputs, use_reentrant=False) if recompute else block(*inputs)
        # Where an utterance has no frame, decoders look at a padded one, which must not depend on how many of them there are.
        return self.after_norm(x).masked_fill((lengths == 0)[:, None, None], 0.0), lengths

    def compile_blocks(self):
        """They are alike, so they share their code, and one code serves all lengths (on CPUs not with the convolution's layout
        for all tensors, whose strides inductor takes for constant)."""
        for block in self.blocks:
            block.compile(dynamic=True, options={"layout_optimization": False})

    def subsample(self, feats, offset: int = 0):
        """(B,T,F) -> (B,T',D), scaled as what positions are meant for (Vaswani et al. 2017, section 3.4); with abs_pos
        those of frames offset.. are added."""
        x = self.embed((feats - self.cmvn_mean) * self.cmvn_istd) * math.sqrt(
            self.options.output_size
        )
        if self.options.pos_enc_layer_type == "abs_pos":
            x = x + sinusoids(x.size(1), x.size(2), offset, x.device).to(x.dtype)
        return x

    def forward_chunk(self, feats, offset: int, pasts):
        """One chunk of a stream: feats (1,T,F), encoder frames before it, per block what they left (ConformerBlock) ->
        (1,T',D), the same of this chunk. Everything in the chunk and in `pasts` is seen."""
        x = self.subsample(feats, offset)
        valid = x.new_ones(1, x.size(1), 1)
        presents = []
        seen = pasts[0][
            0
        ]  # as long in all blocks; its last part may lack positions, which are projected once
        lacking = 0 if seen is None else seen[0].size(2) - seen[-1].size(2)
        positions = sinusoids(lacking + x.size(1), x.size(2), offset - lacking, x.device).to(
            x.dtype
        )[None]  # (1,N,D)
        for block, past in zip(self.blocks, pasts):
            x, present = block(x, positions, None, valid, past)
            presents.append(present)
        return self.after_norm(x), presents

    def stream_state(
        self, chunk_size: int, left_chunks: int = -1, max_position: int = MAX_POSITION
    ) -> StreamState:
        """The state before the first frame. Raises UserError for an encoder that sees the future.

        Positions count the encoder frames of an utterance. Where a chunk would go beyond max_position it stays there, and
        what it sees of the past keeps its distance: an endless stream is as if its visible part ended at max_position.
        """
        if self.options.encoder == "conformer" and not self.options.causal:
            raise UserError(
                "this model's convolution is not causal: it hears whole utterances only; train with --causal to stream"
            )
        nothing = self.cmvn_mean.new_zeros(1, 0, len(self.cmvn_mean))
        blocks = ((None, None),) * len(self.blocks)
        return StreamState(chunk_size, left_chunks, max_position, nothing, 0, blocks)

    def stream(self, features, state: StreamState, last: bool = False):
        """features (1,n,F), n >= 0 -> encoder output (1,m,D) of the chunks now complete, and the state behind them.

        `last` also gives what remains, a shorter chunk, and hands back the state before the first frame of a new utterance.
        """
        features = torch.cat((state.features, features), dim=1)
        field, rate = receptive_field(self.options.input_layer)
        ready = subsampled_length(features.size(1), self.options.input_layer)  # encoder frames
        out = [features.new_zeros(1, 0, self.options.output_size)]
        while ready and (last or 0 < state.chunk_size <= ready):
            size = min(state.chunk_size, ready) if state.chunk_size > 0 else ready
            position = min(state.offset, max(state.max_position - size, 0))
            pasts = state.blocks
            if position < state.offset:
                pasts = tuple(map(without_positions, pasts))
            x, blocks = self.forward_chunk(
                features[:, : (size - 1) * rate + field], position, pasts
            )
            out.append(x)
            features = features[:, size * rate :]
            ready -= size
            keep = state.left_chunks * state.chunk_size if state.chunk_size > 0 else -1
            blocks = tuple(trim(block, keep) for block in blocks)
            state = state._replace(offset=state.offset + size, blocks=blocks)
        if last:
            state = self.stream_state(state.chunk_size, state.left_chunks, state.max_position)
        else:
            state = state._replace(features=features)
        return torch.cat(out, dim=1), state


class DecoderBlock(nn.Module):
    """Causal self-attention, attention to the encoder, feed-forward; norm first (Vaswani et al. 2017, section 3.1)."""

    def __init__(self, o: ModelOptions):
        super().__init__()
        d, heads = o.output_size, o.decoder_attention_heads or o.attention_heads
        self.norm1, self.norm2, self.norm3 = nn.LayerNorm(d), nn.LayerNorm(d), nn.LayerNorm(d)
        self.self_attn = Attention(d, heads, o.attention_dropout_rate)
        self.src_attn = Attention(d, heads, o.attention_dropout_rate)
        self.feed_forward = FeedForward(d, o.decoder_linear_units, o.dropout_rate, F.relu)
        self.dropout = Dropout(o.dropout_rate)

    def forward(self, x, memory, memory_mask, mask=None):
        """x (B,U,D), memory (B,T,D), memory_mask (B,1,1,T), mask (B,1,U,U), None for causal -> (B,U,D)."""
        y = self.norm1(x)
        x = x + self.dropout(self.self_attn(y, y, mask, is_causal=mask is None))
        x = x + self.dropout(self.src_attn(self.norm2(x), memory, memory_mask))
        return x + self.dropout(self.feed_forward(self.norm3(x)))

    def step(self, x, past, source, memory_mask):
        """One token: x (B,1,D), past keys/values (B,H,U-1,D/H) or None, source keys/values -> (B,1,D), past + this token."""
        y = self.norm1(x)
        present = join(past, self.self_attn.keys_values(y))
        x = x + self.self_attn.attend(self.self_attn.split(self.self_attn.linear_q(y)), *present)
        q = self.src_attn.split(self.src_attn.linear_q(self.norm2(x)))
        x = x + self.src_attn.attend(q, *source, memory_mask)
        return x + self.feed_forward(self.norm3(x)), present


class Decoder(nn.Module):
    """Autoregressive transformer over labels; the right-to-left one is the same network on reversed labels."""

    def __init__(self, o: ModelOptions, vocab_size: int, num_blocks: int):
        super().__init__()
        self.embed = nn.Embedding(vocab_size, o.output_size)
        self.blocks = nn.ModuleList(DecoderBlock(o) for _ in range(num_blocks))
        self.after_norm = nn.LayerNorm(o.output_size)
        self.output_layer = Linear(o.output_size, vocab_size)
        self.dropout = Dropout(o.dropout_rate)

    def embedding(self, tokens, offset: int = 0, positions=None):
        """(B,U) token ids at positions offset.., or at positions (B,U) below U -> (B,U,D)."""
        width = self.embed.embedding_dim
        position = sinusoids(tokens.size(1), width, offset, tokens.device)
        if positions is not None:
            position = position[positions]
        return self.dropout(self.embed(tokens) * math.sqrt(width) + position)

    def forward(self, tokens, memory, memory_lengths, positions=None, sees=None):
        """tokens (B,U) starting with sos, memory (B,T,D) -> logits (B,U,V) of the token after each.

        Where the tokens are not one sequence but a tree (decode.Tree), positions (B,U) and sees (B,U,U) say so.
        """
        mask = self.memory_mask(memory, memory_lengths)
        x = self.embedding(tokens, positions=positions)
        for block in self.blocks:
            x = block(x, memory, mask, None if sees is None else sees[:, None])
        return self.output_layer(self.after_norm(x))

    def step(self, tokens, state, memory, memory_lengths):
        """The last of tokens (B,U), given the state after the first U-1 (None before the first) -> (B,V), new state.

        The state is a list of ((past keys, values), (source keys, values)) per block; every tensor has B rows first.
        """
        state = state or [(None, block.src_attn.keys_values(memory)) for block in self.blocks]
        mask = self.memory_mask(memory, memory_lengths)
        x = self.embedding(tokens[:, -1:], offset=tokens.size(1) - 1)
        new_state = []
        for block, (past, source) in zip(self.blocks, state):
            x, present = block.step(x, past, source, mask)
            new_state.append((present, source))
        return self.output_layer(self.after_norm(x[:, -1])), new_state

    @staticmethod
    def memory_mask(memory, lengths):
        # An utterance too short for one encoder frame attends to its one padded frame: finite, and of no account.
        return valid_mask(lengths.clamp(min=1), memory.size(1))[:, None, None]  # (B,1,1,T)


# ---------------------------------------------------------------------------------------------------------------------
# The whole model and its loss


def decoder_io(targets, target_lengths, sos_id: int, eos_id: int):
    """Labels (B,U) -> decoder input (B,U+1) `sos y1 .. yU`, output (B,U+1) `y1 .. yU eos`, valid (B,U+1)."""
    inside = valid_mask(target_lengths, targets.size(1))
    targets = targets.masked_fill(~inside, eos_id)
    inputs = F.pad(targets, (1, 0), value=sos_id)
    outputs = F.pad(targets, (0, 1), value=eos_id)
    return inputs, outputs, valid_mask(target_lengths + 1, targets.size(1) + 1)


def reverse(targets, target_lengths):
    """Each row of (B,U) read backwards within its own length; what lies beyond is padding."""
    index = target_lengths[:, None] - 1 - torch.arange(targets.size(1), device=targets.device)
    return targets.gather(1, index.clamp(min=0))


def label_smoothing_loss(logits, targets, valid, smoothing: float):
    """KL(smoothed one-hot || softmax) summed over each row: logits (B,U,V), targets and valid (B,U) -> (B,).

    The target's share is 1 - smoothing and the rest is spread over the other V - 1 tokens, as in WeNet.
    """
    log_probs = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
    share = smoothing / (logits.size(-1) - 1)
    hit = log_probs.gather(-1, targets[..., None]).squeeze(-1)
    cross = -(1 - smoothing - share) * hit - share * log_probs.sum(-1)
    entropy = sum(
        n * p * math.log(p) for n, p in ((1, 1 - smoothing), (logits.size(-1) - 1, share)) if p > 0
    )
    return (cross + entropy).masked_fill(~valid, 0.0).sum(-1)


class U2Conformer(nn.Module):
    """Encoder, CTC branch and decoders. Pure: the outputs are a function of inputs, weights and torch's random state."""

    def __init__(
        self,
        options: ModelOptions,
        num_mel_bins: int,
        vocab_size: int,
        blank_id: int,
        sos_id: int,
        eos_id: int,
    ):
        super().__init__()
        self.options, self.blank_id, self.sos_id, self.eos_id = options, blank_id, sos_id, eos_id
        self.encoder = Encoder(options, num_mel_bins)
        self.ctc = Linear(options.output_size, vocab_size)
        self.decoder = Decoder(options, vocab_size, options.decoder_num_blocks)
        self.right_decoder = None
        if options.reverse_weight > 0 or options.keep_right_decoder:
            self.right_decoder = Decoder(options, vocab_size, options.r_num_blocks)
            self.right_decoder.requires_grad_(
                options.reverse_weight > 0
            )  # DDP waits for every gradient that is required

    def encode(self, feats, feat_lengths, chunk_size: int = -1, left_chunks: int = -1):
        """feats (B,T,F), feat_lengths (B,) -> encoder_out (B,T',D), lengths (B,). Chunks in encoder frames."""
        return self.encoder(feats, feat_lengths, chunk_size, left_chunks)

    def ctc_log_probs(self, encoder_out):
        """(B,T',D) -> (B,T',V) log-softmax of the CTC branch, float32 or wider."""
        logits = self.ctc(encoder_out)
        return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)

    def loss(
        self,
        feats,
        feat_lengths,
        targets,
        target_lengths,
        chunk_size: int = -1,
        left_chunks: int = -1,
        sizes=None,
    ):
        """{"loss", "loss_ctc", "loss_att"} per utterance (U2++, equations 1 and 2), and "row_losses" (B,), detached.

        targets (B,U) may be padded with anything; a row without a CTC path adds zero to the CTC loss, as in WeNet. `sizes` are
        the rows and the labels, with eos, that the sums are divided by: those of the batch unless given.
        """
        o = self.options
        encoder_out, lengths = self.encode(feats, feat_lengths, chunk_size, left_chunks)
        targets = targets.masked_fill(~valid_mask(target_lengths, targets.size(1)), self.blank_id)
        ctc = F.ctc_loss(
            self.ctc_log_probs(encoder_out.transpose(0, 1)),
            targets,
            lengths,
            target_lengths,
            blank=self.blank_id,
            reduction="none",
            zero_infinity=True,
        )  # (B,)
        att = (1 - o.reverse_weight) * self.attention_losses(
            self.decoder, encoder_out, lengths, targets, target_lengths
        )
        if o.reverse_weight > 0:
            att = att + o.reverse_weight * self.attention_losses(
                self.right_decoder,
                encoder_out,
                lengths,
                reverse(targets, target_lengths),
                target_lengths,
            )
        rows, labels = sizes or (len(ctc), (target_lengths + 1).sum())
        loss_ctc = ctc.sum() / rows
        loss_att = att.sum() / (labels if o.length_normalized_loss else rows)
        return {
            "loss": o.ctc_weight * loss_ctc + (1 - o.ctc_weight) * loss_att,
            "loss_ctc": loss_ctc,
            "loss_att": loss_att,
            "row_losses": (ctc + att).detach(),
        }

    def attention_losses(self, decoder, encoder_out, lengths, targets, target_lengths):
        inputs, outputs, valid = decoder_io(targets, target_lengths, self.sos_id, self.eos_id)
        return label_smoothing_loss(
            decoder(inputs, encoder_out, lengths), outputs, valid, self.options.lsm_weight
        )
