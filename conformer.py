"""The U2++ network: a conformer encoder, a CTC branch, and attention decoders in both directions.

Start at U2Conformer.loss to read how the network learns, and at Encoder.stream to read how it hears
a stream. The layers of kernels.py compute the same numbers as torch's own layers, only faster.

Sources: U2 (Zhang et al. 2020, arXiv:2012.05481), U2++ (Wu et al. 2021, arXiv:2106.05642),
Conformer (Gulati et al. 2020, arXiv:2005.08100); the behaviour is WeNet's. Axes: B batch, T feature
frames, T' encoder frames, U labels, D width, H heads, S keys, V vocabulary, F mel bins.
"""

import math

from cli import UserError

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import frames
import kernels
from frames import BlockState, decoder_io, reverse, sinusoids, subsampled_length, valid_mask
from kernels import Activation, Dropout, LayerNorm, Linear, Residual
from presets import ModelOptions

# ---- Building blocks

ACTIVATIONS = {"swish": F.silu, "relu": F.relu}


class Attention(nn.Module):
    """Computes multi-head attention (Vaswani et al. 2017, section 3.2.2)."""

    def __init__(self, width: int, heads: int, dropout: float):
        super().__init__()
        self.heads = heads
        self.dropout = dropout
        self.linear_q = Linear(width, width)
        self.linear_kv = Linear(width, 2 * width)
        self.linear_out = Linear(width, width)

    def split(self, x):
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B,T,D) -> (B,H,T,D/H)

    def keys_values(self, source):
        """source (B,S,D) -> keys and values, each (B,H,S,D/H)."""
        k, v = self.linear_kv(source).chunk(2, dim=-1)
        return self.split(k), self.split(v)

    def attend(self, q, k, v, mask=None, is_causal=False):
        """Lets queries q (B,H,T,D/H) attend to keys and values k, v (B,H,S,D/H) -> (B,T,D).

        A bool mask broadcasts to (B,H,T,S). The output takes the first D/H numbers of wider heads.
        """
        size = self.linear_out.in_features // self.heads
        p = self.dropout if self.training else 0.0
        y = kernels.attention(q, k, v, mask, p, is_causal, scale=1 / math.sqrt(size))[..., :size]
        return self.linear_out(y.transpose(1, 2).flatten(2))  # (B,H,T,D/H) -> (B,T,D)

    def forward(self, x, keys, values, mask=None):
        """Lets x (B,T,D) attend to the keys and values of another sequence -> (B,T,D)."""
        return self.attend(self.split(self.linear_q(x)), keys, values, mask)


class SelfAttention(Attention):
    """Lets a sequence attend to itself, without a term for positions (abs_pos adds them to x)."""

    def forward(self, x, positions=None, mask=None, state=BlockState(), is_causal=False):
        """Lets x (B,T,D) attend to the S-T frames of `state` and to itself -> (B,T,D), new state.

        positions (1,N,D), which `state` lacks, are those of the last N of all S frames. mask is
        bool and broadcasts to (B,1,T,S).
        """
        state = state.and_then(*self.keys_values(x), self.project(positions))
        q, k, v = self.place(self.split(self.linear_q(x)), state)
        return self.attend(q, k, v, mask, is_causal), state

    def project(self, positions):
        """Projects positions (1,N,D) for the state -> (1,H,N,D/H). Without a term it is None."""

    def place(self, q, state: BlockState):
        """Puts the positions into queries, keys and values. Without a term all stay the same."""
        return q, state.keys, state.values


class RelativeAttention(SelfAttention):
    """Adds Transformer-XL's term for positions, without the shift, as WeNet does.

    Without the shift the term depends on the key alone: (q+u).k + (q+v).p = q.(k+p) + (u.k + v.p).
    This is plain attention with keys k+p and a bias for each key. The bias is one more dimension of
    the key, against a constant 1 in the query, so that no mask has to carry a gradient.
    """

    def __init__(self, width: int, heads: int, dropout: float):
        super().__init__(width, heads, dropout)
        self.linear_pos = Linear(width, width, bias=False)
        self.pos_bias_u = nn.Parameter(torch.empty(heads, width // heads))
        self.pos_bias_v = nn.Parameter(torch.empty(heads, width // heads))
        nn.init.xavier_uniform_(self.pos_bias_u)
        nn.init.xavier_uniform_(self.pos_bias_v)

    def forward(self, x, positions=None, mask=None, state=BlockState(), is_causal=False):
        if state.keys is None and kernels.by_triton(x):
            return kernels.relative_attention(self, x, self.project(positions), mask), BlockState()
        return super().forward(x, positions, mask, state, is_causal)

    def project(self, positions):
        return self.split(self.linear_pos(positions))

    def place(self, q, state: BlockState):
        k, v, p, _ = state
        content = (k * self.pos_bias_u[:, None]).sum(-1, keepdim=True)
        position = (p * self.pos_bias_v[:, None]).sum(-1, keepdim=True)
        k = torch.cat((k + p, (content + position).to(k.dtype)), dim=-1)  # (B,H,S,D/H+1)
        return F.pad(q, (0, 1), value=1.0), k, F.pad(v, (0, 1))  # one width, for the fused kernel


class FeedForward(nn.Module):
    def __init__(self, width: int, hidden: int, dropout: float, activation):
        super().__init__()
        self.w_1 = Linear(width, hidden)
        self.w_2 = Linear(hidden, width)
        self.activation = Activation(dropout, activation)

    def forward(self, x):
        return self.w_2(self.activation(self.w_1(x)))


class ConvolutionModule(nn.Module):
    """Gates and convolves over time, depthwise (Conformer, section 2.2); causal for streaming."""

    def __init__(self, o: ModelOptions):
        super().__init__()
        width = o.output_size
        self.causal = o.causal
        self.kernel = o.cnn_module_kernel
        self.pointwise_conv1 = Linear(width, 2 * width)
        self.depthwise_conv = nn.Conv1d(width, width, self.kernel, groups=width)
        self.norm = (nn.BatchNorm1d if o.cnn_module_norm == "batch_norm" else LayerNorm)(width)
        self.activation = ACTIVATIONS[o.activation_type]
        self.pointwise_conv2 = Linear(width, width)

    def forward(self, x, valid, past=None):
        """Convolves x (B,T,D) -> (B,T,D), 0 in padding like valid (B,T,1), and its last inputs.

        If causal, these inputs (B,D,kernel-1) are the next call's `past`, which begins as None.
        """
        batch_norm = isinstance(self.norm, nn.BatchNorm1d)
        # A causal convolution takes nothing from padding, which follows the last frame.
        silent = batch_norm or not self.causal
        x = self.pointwise_conv1(x * valid if silent else x)  # (B,T,2D)
        last = None
        if self.causal and past is None and (triton := kernels.by_triton(x)):
            x = kernels.gated_depthwise(triton, x, self)
        else:
            x = F.glu(x, dim=-1)  # (B,T,D)
            if not (self.causal or self.training and batch_norm):
                # Zeros follow the last frame, padding or not. (WeNet has glu(bias) in padding, and
                # batch norm learns from such frames, so there training does as WeNet does.)
                x = x * valid
            if self.causal:
                before = self.silence(x) if past is None else past
                x = torch.cat((before.transpose(1, 2), x), dim=1)  # (B,kernel-1+T,D)
                last = x[:, x.size(1) - self.kernel + 1 :].transpose(1, 2)
            x = self.depthwise(x, few=past is not None)  # (B,T,D)
        # Batch norm takes (B,D,T), in training padding too, as in WeNet.
        x = self.norm(x.transpose(1, 2)).transpose(1, 2) if batch_norm else self.norm(x)
        x = self.pointwise_conv2(self.activation(x))
        return x * valid if silent else x, last

    def depthwise(self, x, few: bool = False):
        """Convolves x (B,T,D) -> (B,T',D). T' is T or, if causal, T-kernel+1: x brings its past."""
        padding = 0 if self.causal else (self.kernel - 1) // 2
        conv = self.depthwise_conv
        return kernels.depthwise(x, conv.weight, conv.bias, padding, few)

    def silence(self, x):
        """Returns the convolution's inputs before the first frame, (B,D,kernel-1).

        WeNet puts zeros before the first pointwise layer, and the gate makes glu(bias) of them.
        """
        edge = F.glu(self.pointwise_conv1.bias, dim=0).to(x.dtype)
        return edge[None, :, None].expand(x.size(0), -1, self.kernel - 1)


def self_attention(o: ModelOptions) -> SelfAttention:
    kind = SelfAttention if o.selfattention_layer_type == "selfattn" else RelativeAttention
    return kind(o.output_size, o.attention_heads, o.attention_dropout_rate)


class ConformerBlock(nn.Module):
    """Adds half a feed-forward, attention, convolution, half a feed-forward (Conformer, 2.4)."""

    def __init__(self, o: ModelOptions):
        super().__init__()
        d = o.output_size
        self.norm_ff_macaron = LayerNorm(d)
        self.norm_mha = LayerNorm(d)
        self.norm_conv = LayerNorm(d)
        self.norm_ff = LayerNorm(d)
        self.norm_final = nn.LayerNorm(d)  # no product follows
        activation = ACTIVATIONS[o.activation_type]
        self.feed_forward_macaron = FeedForward(d, o.linear_units, o.dropout_rate, activation)
        self.self_attn = self_attention(o)
        self.conv_module = ConvolutionModule(o)
        self.feed_forward = FeedForward(d, o.linear_units, o.dropout_rate, activation)
        self.add = Residual(o.dropout_rate)

    def forward(self, x, positions, mask, valid, state=BlockState()):
        """Transforms x (B,T,D), where valid (B,T,1) is 0 in padding -> (B,T,D), the new state.

        positions (1,N,D) and mask (B,1,T,S): see SelfAttention. Without mask every frame sees all.
        """
        y = self.feed_forward_macaron(self.norm_ff_macaron(x))
        x, y = self.add.then(self.norm_mha, x, y, 0.5)
        y, state = self.self_attn(y, positions, mask, state)
        x, y = self.add.then(self.norm_conv, x, y)
        y, last = self.conv_module(y, valid, state.convolution)
        x, y = self.add.then(self.norm_ff, x, y)
        _, x = self.add.then(self.norm_final, x, self.feed_forward(y), 0.5)
        return x, BlockState(*state[:3], last)


class TransformerBlock(nn.Module):
    """Adds self-attention and a feed-forward, norm first. It takes what ConformerBlock takes."""

    def __init__(self, o: ModelOptions):
        super().__init__()
        d = o.output_size
        self.norm1 = LayerNorm(d)
        self.norm2 = LayerNorm(d)
        self.self_attn = self_attention(o)
        activation = ACTIVATIONS[o.activation_type]
        self.feed_forward = FeedForward(d, o.linear_units, o.dropout_rate, activation)
        self.add = Residual(o.dropout_rate)

    def forward(self, x, positions, mask, valid, state=BlockState()):
        y, state = self.self_attn(self.norm1(x), positions, mask, state)
        x, y = self.add.then(self.norm2, x, y)
        return self.add(x, self.feed_forward(y)), state


# ---- The encoder


class Subsampling(nn.Module):
    """Subsamples by 2-D convolutions over (time, mel) and a linear layer: (B,T,F) -> (B,T',D)."""

    def __init__(self, input_layer: str, num_mel_bins: int, width: int):
        super().__init__()
        if not subsampled_length(num_mel_bins, input_layer):
            raise UserError(
                f"--num_mel_bins {num_mel_bins}: --input_layer {input_layer} takes at least "
                f"{frames.receptive_field(input_layer)[0]} of them"
            )
        self.convs = nn.ModuleList(
            nn.Conv2d(1 if i == 0 else width, width, kernel, stride)
            for i, (kernel, stride) in enumerate(frames.SUBSAMPLING[input_layer])
        )
        self.out = Linear(width * subsampled_length(num_mel_bins, input_layer), width)
        self.to(memory_format=torch.channels_last)  # several times faster on a CPU

    def forward(self, x):
        x = x[:, None]  # (B,1,T,F)
        for conv in self.convs:
            x = kernels.conv_relu(x, conv, self.training)  # (B,D,T',F')
        return self.out(x.transpose(1, 2).flatten(2))  # (B,T',D,F') -> (B,T',D*F') -> (B,T',D)


class Encoder(nn.Module):
    def __init__(self, o: ModelOptions, num_mel_bins: int):
        super().__init__()
        self.options = o
        self.gradient_checkpointing = False  # True: backward computes every block once more
        self.compiled = False
        # Global CMVN, (features - mean) * istd; as made, it changes nothing.
        self.register_buffer("cmvn_mean", torch.zeros(num_mel_bins))
        self.register_buffer("cmvn_istd", torch.ones(num_mel_bins))
        self.embed = Subsampling(o.input_layer, num_mel_bins, o.output_size)
        kind = {"conformer": ConformerBlock, "transformer": TransformerBlock}[o.encoder]
        self.blocks = nn.ModuleList(kind(o) for _ in range(o.num_blocks))
        self.after_norm = LayerNorm(o.output_size)
        self.dropout = Dropout(o.dropout_rate)

    def forward(self, features, feature_lengths, seen=None):
        """Encodes features (B,T,F), feature_lengths (B,) -> encoded (B,T',D), encoded_lengths (B,).

        seen (T',T'), of chunk_mask, says which frames a frame may see; None: all.
        """
        *_, encoded, lengths = self.outputs(features, feature_lengths, seen)
        return encoded, lengths

    def outputs(self, features, feature_lengths, seen=None, middle: bool = False):
        """Does what `forward` does; `middle` returns the middle block's output (B,T',D), too.

        The result is then (of the middle block, encoded, encoded_lengths).
        """
        short = frames.receptive_field(self.options.input_layer)[0] - features.size(1)
        x = self.subsample(F.pad(features, (0, 0, 0, max(short, 0))))  # (B,T',D) with T' >= 1
        lengths = frames.to_device(feature_lengths, x.device)
        lengths = subsampled_length(lengths, self.options.input_layer)
        size, width = x.shape[1:]
        positions = self.dropout(sinusoids(size, width, device=x.device).to(x.dtype)[None])
        x = self.dropout(x)
        valid = valid_mask(lengths, size)  # (B,T')
        # Padded frames see each other, too, so that no row of the mask is empty. Nothing uses them.
        mask = valid[:, None, :] | ~valid[:, :, None]  # (B,T',T')
        if seen is not None:
            mask = mask & seen
        mask = mask[:, None] if self.compiled else kernels.attention_mask(mask[:, None], x)
        recompute = self.gradient_checkpointing and self.training
        depth = len(self.blocks)
        results = []
        for number, block in enumerate(self.blocks, 1):
            inputs = x, positions, mask, valid[..., None].to(x.dtype)
            y, _ = checkpoint(block, *inputs, use_reentrant=False) if recompute else block(*inputs)
            x = self.perhaps(y, x, self.options.stochastic_depth * number / depth)
            if number == depth or middle and number == depth // 2:
                results.append(self.after_norm(x))
        # The decoders see one padded frame of an utterance that has none: zeros, in every batch.
        silent = (lengths == 0)[:, None, None]
        return *(result.masked_fill(silent, 0.0) for result in results), lengths

    def perhaps(self, y, x, p: float):
        """Returns y (B,T,D) or, in training for a share p of the rows, x (B,T,D) instead.

        What the block added counts 1 / (1 - p) times in the other rows, so that the mean over draws
        is what evaluation gets, y (as in NeMo; Huang et al. 2016 scale in evaluation). The block
        that made y of x runs for all rows: under DDP every weight needs its gradient.
        """
        if not (self.training and p):
            return y
        left_out = torch.rand(len(x), 1, 1, device=x.device) < p
        return torch.where(left_out, x, x + (y - x) / (1 - p))

    def compile_blocks(self):
        """Compiles the blocks for training. They are alike, so one code serves all of them."""
        self.compiled = True
        for block in self.blocks:
            kernels.compile_block(block)

    def subsample(self, features, offset: int = 0):
        """Subsamples (B,T,F) -> (B,T',D), times sqrt(D) as in Vaswani et al. 2017, section 3.4.

        With abs_pos the positions offset .. offset + T' - 1 are added.
        """
        x = self.embed((features - self.cmvn_mean) * self.cmvn_istd)
        x = x * math.sqrt(self.options.output_size)
        if self.options.pos_enc_layer_type == "abs_pos":
            x = x + sinusoids(x.size(1), x.size(2), offset, x.device).to(x.dtype)
        return x

    def stream_state(self, chunk_size: int, left_chunks=-1, max_position=frames.MAX_POSITION):
        """Returns the first StreamState. Raises UserError for an encoder that sees the future.

        Positions count the encoder frames of an utterance. A chunk that would pass max_position
        stays there and keeps its distance to the past that it sees, so a stream may be endless.
        """
        if self.options.encoder == "conformer" and not self.options.causal:
            raise UserError(
                "this model's convolution is not causal: it hears whole utterances only; "
                "train with --causal to stream"
            )
        nothing = self.cmvn_mean.new_zeros(1, 0, len(self.cmvn_mean))
        blocks = (BlockState(),) * len(self.blocks)
        return frames.StreamState(chunk_size, left_chunks, max_position, nothing, 0, blocks)

    def stream(self, features, state: frames.StreamState, last: bool = False):
        """Encodes the chunks that features (1,n,F) complete -> encoded (1,m,D), the new state.

        The outputs of all calls together equal `forward` on all features under the same chunk mask.
        `last` also encodes the rest, a shorter chunk, and returns the state for a new utterance.
        """
        features = torch.cat((state.features, features), dim=1)
        field, rate = frames.receptive_field(self.options.input_layer)
        ready = subsampled_length(features.size(1), self.options.input_layer)  # encoder frames
        encoded = [features.new_zeros(1, 0, self.options.output_size)]
        while ready and (last or 0 < state.chunk_size <= ready):
            size = min(state.chunk_size, ready) if state.chunk_size > 0 else ready
            position = min(state.offset, max(state.max_position - size, 0))
            blocks = state.blocks
            if position < state.offset:  # the chunk stays, so its past moves back
                blocks = tuple(block._replace(positions=None) for block in blocks)
            chunk = features[:, : (size - 1) * rate + field]
            x, blocks = self.forward_chunk(chunk, position, blocks)
            encoded.append(x)
            features = features[:, size * rate :]
            ready -= size
            seen = state.left_chunks * state.chunk_size if state.chunk_size > 0 else -1
            blocks = tuple(block.newest(seen) for block in blocks)
            state = state._replace(offset=state.offset + size, blocks=blocks)
        state = state._replace(features=features)
        if last:
            state = self.stream_state(state.chunk_size, state.left_chunks, state.max_position)
        return torch.cat(encoded, dim=1), state

    def forward_chunk(self, features, offset: int, states):
        """Encodes a chunk (1,T,F) behind `offset` encoder frames -> (1,T',D), blocks' new states.

        Every frame sees the whole chunk and everything in the states.
        """
        x = self.subsample(features, offset)
        valid = x.new_ones(1, x.size(1), 1)
        # All blocks lack the same positions: the chunk's and, if the past has moved, the past's.
        keys, _, projected, _ = states[0]
        relative = self.options.selfattention_layer_type == "rel_selfattn"
        lacking = keys.size(2) if relative and projected is None and keys is not None else 0
        positions = sinusoids(lacking + x.size(1), x.size(2), offset - lacking, x.device)
        new_states = []
        for block, state in zip(self.blocks, states):
            x, state = block(x, positions.to(x.dtype)[None], None, valid, state)
            new_states.append(state)
        return self.after_norm(x), new_states

    def frames(self, features) -> int:
        """Returns how many encoder frames, T' >= 1, features (B,T,F) make."""
        return max(subsampled_length(features.size(1), self.options.input_layer), 1)


# ---- The decoders


class DecoderBlock(nn.Module):
    """Adds causal self-attention, attention to the encoder and a feed-forward, norm first."""

    def __init__(self, o: ModelOptions):
        super().__init__()
        d = o.output_size
        heads = o.decoder_attention_heads or o.attention_heads
        self.norm1 = LayerNorm(d)
        self.norm2 = LayerNorm(d)
        self.norm3 = LayerNorm(d)
        self.self_attn = SelfAttention(d, heads, o.attention_dropout_rate)
        self.src_attn = Attention(d, heads, o.attention_dropout_rate)
        self.feed_forward = FeedForward(d, o.decoder_linear_units, o.dropout_rate, F.relu)
        self.add = Residual(o.dropout_rate)

    def forward(self, x, source, source_mask, mask=None, state=BlockState()):
        """Transforms x (B,U,D) -> (B,U,D), and the new state, which has x.

        source: keys and values of the encoder's frames; source_mask (B,1,1,T'). Without mask
        (B,1,U,U) a token sees itself and all before it. If `state` has tokens, U is 1.
        """
        is_causal = mask is None and state.keys is None
        y, state = self.self_attn(self.norm1(x), None, mask, state, is_causal)
        x, y = self.add.then(self.norm2, x, y)
        x, y = self.add.then(self.norm3, x, self.src_attn(y, *source, source_mask))
        return self.add(x, self.feed_forward(y)), state


class Decoder(nn.Module):
    """Predicts each label from the labels before it. The right-to-left one takes them reversed."""

    def __init__(self, o: ModelOptions, vocab_size: int, num_blocks: int):
        super().__init__()
        self.embed = nn.Embedding(vocab_size, o.output_size)
        # `embedding` multiplies by sqrt(D). Torch's and WeNet's deviation of 1 would drown the
        # positions, and a decoder that does not know how far it has come skips and repeats words.
        nn.init.normal_(self.embed.weight, std=o.output_size**-0.5)
        self.blocks = nn.ModuleList(DecoderBlock(o) for _ in range(num_blocks))
        self.after_norm = LayerNorm(o.output_size)
        self.output_layer = Linear(o.output_size, vocab_size)
        self.dropout = Dropout(o.dropout_rate)

    def embedding(self, tokens, offset: int = 0, positions=None):
        """Embeds tokens (B,U) at positions from offset on, or at `positions` (B,U) -> (B,U,D)."""
        width = self.embed.embedding_dim
        position = sinusoids(tokens.size(1), width, offset, tokens.device)
        if positions is not None:
            position = position[positions]
        return self.dropout(self.embed(tokens) * math.sqrt(width) + position)

    def forward(self, tokens, encoded, encoded_lengths, positions=None, sees=None):
        """Predicts the token after each of tokens (B,U) from encoded (B,T',D) -> logits (B,U,V).

        If the tokens are a tree (decode.Tree), positions (B,U) and sees (B,U,U) describe it.
        """
        source_mask = self.source_mask(encoded, encoded_lengths)
        mask = None if sees is None else sees[:, None]
        x = self.embedding(tokens, positions=positions)
        for block in self.blocks:
            x, _ = block(x, block.src_attn.keys_values(encoded), source_mask, mask)
        return self.output_layer(self.after_norm(x))

    def step(self, tokens, state, encoded, encoded_lengths):
        """Predicts the token after tokens (B,U) -> logits (B,V), and the new state.

        state: per block a BlockState and the source's keys and values; None before the first token.
        """
        state = state or [(BlockState(), b.src_attn.keys_values(encoded)) for b in self.blocks]
        source_mask = self.source_mask(encoded, encoded_lengths)
        x = self.embedding(tokens[:, -1:], offset=tokens.size(1) - 1)
        new_state = []
        for block, (past, source) in zip(self.blocks, state):
            x, past = block(x, source, source_mask, state=past)
            new_state.append((past, source))
        return self.output_layer(self.after_norm(x[:, -1])), new_state

    @staticmethod
    def source_mask(encoded, encoded_lengths):
        # An utterance without an encoder frame attends to a padded one, so that no row is empty.
        valid = valid_mask(encoded_lengths.clamp(min=1), encoded.size(1))
        return kernels.attention_mask(valid[:, None, None], encoded)  # (B,1,1,T')


# ---- The model, its loss


def disagreement(logits, lengths):
    """Returns how far each view's CTC output is from the other view's, summed over frames, (B,).

    logits (T',B,V) have two views of B/2 rows, one behind the other, with lengths (B,). It is the
    Kullback-Leibler divergence, whose target has no gradient (CR-CTC, Yao et al. 2024, 3.1).
    """
    log_probs = kernels.log_softmax(logits)
    targets = log_probs.detach().roll(logits.size(1) // 2, dims=1)
    apart = F.kl_div(log_probs, targets, reduction="none", log_target=True).sum(-1)  # (T',B)
    valid = valid_mask(frames.to_device(lengths, logits.device), logits.size(0))  # (B,T')
    return apart.masked_fill(~valid.T, 0.0).sum(0)


class U2Conformer(nn.Module):
    """Joins encoder, CTC branch and decoders. Its only hidden input is torch's random state."""

    def __init__(self, options: ModelOptions, num_mel_bins, vocab_size, blank_id, sos_id, eos_id):
        super().__init__()
        self.options = options
        self.blank_id = blank_id
        self.sos_id = sos_id
        self.eos_id = eos_id
        self.encoder = Encoder(options, num_mel_bins)
        self.ctc = Linear(options.output_size, vocab_size)
        self.decoder = Decoder(options, vocab_size, options.decoder_num_blocks)
        self.right_decoder = None
        if options.reverse_weight > 0 or options.keep_right_decoder:
            self.right_decoder = Decoder(options, vocab_size, options.r_num_blocks)
        # A branch without a share in the loss stays as it is: a gradient of 0 would let the weight
        # decay shrink it, and for a gradient that never comes DDP would wait.
        attends = options.ctc_weight < 1
        self.ctc.requires_grad_(options.ctc_weight > 0)
        self.decoder.requires_grad_(attends and options.reverse_weight < 1)
        if self.right_decoder is not None:
            self.right_decoder.requires_grad_(attends and options.reverse_weight > 0)

    def encode(self, features, feature_lengths, chunk_size: int = -1, left_chunks: int = -1):
        """Encodes features (B,T,F), lengths (B,) -> encoded (B,T',D), encoded_lengths (B,).

        chunk_size counts encoder frames, -1 is full context; chunk_mask explains left_chunks.
        """
        chunks = self.encoder.frames(features), chunk_size, left_chunks, features.device
        seen = frames.chunk_mask(*chunks) if chunk_size > 0 else None
        return self.encoder(features, feature_lengths, seen)

    def ctc_log_probs(self, encoded):
        """Returns the CTC branch's log-softmax: (B,T',D) -> (B,T',V), float32 or wider."""
        return kernels.log_softmax(self.ctc(encoded))

    def loss(
        self,
        features,
        feature_lengths,
        labels,
        label_lengths,
        chunk_size: int = -1,
        left_chunks: int = -1,
        sizes=None,
        but_ctc=None,
        views: int = 1,
    ):
        """Computes the losses of a batch (U2++, equations 1 and 2): features (B,T,F), labels (B,U).

        Returns {"loss", "loss_ctc", "loss_att"}, per utterance, and "row_losses" (B,), detached;
        with interctc_weight also "loss_interctc", and "loss_cr" where the batch has two `views`.
        Labels may be padded with any numbers. Lengths may stay on the CPU, where CTC wants them.
        The sums are divided by `sizes`, (rows, labels with eos), by default those of the batch.
        `but_ctc` takes the place of the method, see graphs.py.
        """
        size = self.encoder.frames(features)
        seen = frames.chunk_mask(size, chunk_size, left_chunks, features.device)
        lengths = [frames.to_device(n, features.device) for n in (feature_lengths, label_lengths)]
        labels = labels.masked_fill(~valid_mask(lengths[1], labels.size(1)), self.blank_id)
        # Backward adds the gradients of both branches in the order of these calls.
        if but_ctc:
            *outputs, att = but_ctc(features, lengths[0], labels, lengths[1], seen)
        else:
            *outputs, frames_there = self.encoder.outputs(features, lengths[0], seen, self.inter)
        by_ctc = self.ctc_losses(outputs, feature_lengths, labels, label_lengths, views)
        if not but_ctc:
            att = self.attention_losses(outputs[-1], frames_there, labels, lengths[1])  # (B,)
        rows, tokens = sizes or (len(labels), (label_lengths + 1).sum())
        losses = {name: of_rows.sum() / rows for name, of_rows in by_ctc.items()}
        loss_att = att.sum() / (tokens if self.options.length_normalized_loss else rows)
        weight = self.options.ctc_weight
        return {
            "loss": weight * self.weighted_ctc(**losses) + (1 - weight) * loss_att,
            "loss_ctc": losses["loss_ctc"],
            "loss_att": loss_att,
            **losses,
            "row_losses": sum(by_ctc.values(), att).detach(),
        }

    def weighted_ctc(self, loss_ctc, loss_interctc=None, loss_cr=None):
        """Adds the losses that the CTC branch has, each with its weight."""
        if loss_interctc is not None:
            share = self.options.interctc_weight
            loss_ctc = (1 - share) * loss_ctc + share * loss_interctc
        return loss_ctc if loss_cr is None else loss_ctc + self.options.cr_ctc_weight * loss_cr

    @property
    def inter(self) -> bool:
        """Returns whether a step has a CTC loss of the middle block, too."""
        return self.training and self.options.interctc_weight > 0

    def but_ctc(self, features, feature_lengths, labels, label_lengths, seen):
        """Computes all of a step but CTC -> what CTC takes, (B,T',D) each, attention losses (B,).

        This is tensors alone, so that a CUDA graph can hold it; `seen` is that of Encoder.forward.
        """
        *outputs, lengths = self.encoder.outputs(features, feature_lengths, seen, self.inter)
        return *outputs, self.attention_losses(outputs[-1], lengths, labels, label_lengths)

    def ctc_losses(self, outputs, feature_lengths, labels, label_lengths, views: int = 1):
        """Returns each row's "loss_ctc" (B,), "loss_cr" of two views, "loss_interctc", if there.

        `outputs` (B,T',D) are of the middle block, if there is InterCTC, and of the encoder. CTC is
        0 where the labels have no path, as in WeNet.
        """
        lengths = subsampled_length(feature_lengths, self.options.input_layer), label_lengths
        logits = [self.ctc(output.transpose(0, 1)) for output in outputs]  # (T',B,V) each
        *inter, ctc = [kernels.ctc_loss(each, labels, *lengths, self.blank_id) for each in logits]
        losses = {"loss_ctc": ctc}
        if inter:
            losses["loss_interctc"] = inter[0]
        if views == 2:
            losses["loss_cr"] = disagreement(logits[-1], lengths[0])
        return losses

    def attention_losses(self, encoded, encoded_lengths, labels, label_lengths):
        """Returns each utterance's attention loss, (B,): both decoders' losses, weighted."""

        def directed(decoder, y):
            inputs, outputs, valid = decoder_io(y, label_lengths, self.sos_id, self.eos_id)
            logits = decoder(inputs, encoded, encoded_lengths)
            return kernels.label_smoothing_loss(logits, outputs, valid, self.options.lsm_weight)

        weight = self.options.reverse_weight
        losses = (1 - weight) * directed(self.decoder, labels)
        if weight > 0:
            backwards = reverse(labels, label_lengths)
            losses = losses + weight * directed(self.right_decoder, backwards)
        return losses
