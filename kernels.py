"""These layers compute the same numbers as torch's own, only faster.

To read the network, take them for torch's: Linear, Dropout and LayerNorm for nn.Linear, nn.Dropout
and nn.LayerNorm, attention for scaled_dot_product_attention, conv_relu for a convolution and a
ReLU, depthwise for F.conv1d with a group for each channel. tests/test_kernels.py puts torch's
layers in their place and finds the same numbers. In training on a GPU some of them call fused.py.
Axes: B batch, T frames, D width, H heads, S keys; images are (B,C,T,F).
"""

import functools
import math
import warnings

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from frames import to_device, valid_mask

AVX512 = torch.backends.cpu.get_cpu_capability() == "AVX512"


def onednn_is_faster() -> bool:
    """True where oneDNN multiplies float32 faster than MKL, which torch takes.

    On AMD's CPUs with AVX-512 MKL reaches less than half of oneDNN's rate (`python -m tools.bench
    train` prints both), and on those with AVX2 alone both are equally fast. On Intel's MKL is the
    faster one, above all for the small layers of presets tiny and small.
    """
    of_intel = "intel" in torch.cpu.get_capabilities().get("cpu_name", "").lower()
    return torch.backends.mkldnn.is_available() and AVX512 and not of_intel


ONEDNN = onednn_is_faster()

# For attention with a mask, cuDNN plans anew for every shape, which takes up to a second on an H100
# (pytorch's pull request 155958). Torch's other fused kernels need no plan.
torch.backends.cuda.enable_cudnn_sdp(False)

TRITON = True  # --no-triton: no kernels of fused.py


def by_onednn(x, weight) -> bool:
    """True where oneDNN is faster: float32 on some CPUs with AVX-512."""
    return ONEDNN and x.is_cpu and x.dtype == weight.dtype == torch.float32


def product(x, weight, bias=None):
    """Computes F.linear by oneDNN, without a gradient: x (...,M), weight (N,M) -> (...,N)."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def outer_product(a, b):
    """Computes a.T @ b (N,M) of a (R,N) and b (R,M), without a gradient."""
    if not (by_onednn(a, b) and len(a)):
        return a.T @ b
    # oneDNN copies its first factor to transpose it, so the smaller factor comes first.
    if a.size(1) <= b.size(1):
        return product(a.T, b.T)
    return product(b.T, a.T).T


class Product(torch.autograd.Function):
    """Computes F.linear and its gradients by oneDNN."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        of_x, of_weight, of_bias = ctx.needs_input_grad
        grad = grad.contiguous()  # oneDNN is slow on an expanded tensor, as a sum gives
        rows = grad.flatten(0, -2)  # (...,N) -> (R,N)
        return (
            product(grad, weight.T) if of_x else None,
            outer_product(rows, x.flatten(0, -2)) if of_weight else None,  # (R,N), (R,M) -> (N,M)
            rows.sum(0) if of_bias else None,
        )


class Linear(nn.Linear):
    """Computes nn.Linear by the faster of two libraries."""

    def forward(self, x):
        if (
            not by_onednn(x, self.weight)
            or torch.is_autocast_enabled("cpu")
            or torch.jit.is_tracing()
            or torch.compiler.is_compiling()
        ):
            # A GPU multiplies and adds in one kernel only if x lies in one piece.
            x = x.contiguous() if x.is_cuda else x
            return F.linear(x, self.weight, self.bias)
        return (Product.apply if torch.is_grad_enabled() else product)(x, self.weight, self.bias)


def for_few_rows(module: nn.Module) -> nn.Module:
    """Stores the weights of `module`'s linear layers column by column, and returns `module`.

    On a CPU with AVX-512 the few rows of a stream's chunk are then multiplied in half the time, by
    oneDNN on AMD's CPUs and by MKL on Intel's. Shapes and numbers stay the same.
    """
    if AVX512:
        for layer in module.modules():
            if isinstance(layer, Linear) and layer.weight.is_cpu:
                layer.weight.data = layer.weight.data.T.contiguous().T
    return module


def random_numbers_are_cheap(x, p: float) -> bool:
    """True where torch's own dropout costs little: on a GPU, when compiled, or where p is 0."""
    return p == 0 or x.device.type != "cpu" or torch.compiler.is_compiling()


def dropout(x, p: float):
    """Computes F.dropout, and draws 16-bit numbers for it on a CPU.

    F.dropout draws doubles there, which would take an eighth of a training step.
    """
    if random_numbers_are_cheap(x, p):
        return F.dropout(x, p)
    words = torch.empty(-(-x.numel() // 4), dtype=torch.int64)
    words.random_(-(2**63), None)  # four draws in each
    draws = words.view(torch.int16)[: x.numel()].view(x.shape)  # uniform over -32768 .. 32767
    # Bytes wait for backward, not floats. Multiplying by bools would take twice as long.
    keep = torch.ge(draws, round(p * 2**16) - 2**15, out=torch.empty(x.shape, dtype=torch.uint8))
    return x.mul(keep).mul_(1 / (1 - p))


class Dropout(nn.Dropout):
    """Calls `dropout` where nn.Dropout calls F.dropout."""

    def forward(self, x):
        return dropout(x, self.p) if self.training else x


@functools.cache
def proven(device, dtype):
    """Returns the module of Triton kernels if they compute torch's numbers on a GPU, else None.

    They are compared in float32; in dtype, that of the products, they must start.
    """
    try:
        import fused

        with torch.enable_grad(), torch.autocast("cuda", enabled=False):
            wrong = [
                name
                for name, check in fused.CHECKS
                if not check(device) < 1e-5 or math.isnan(check(device, dtype))
            ]
    except ImportError:  # Triton comes with torch on Linux alone
        return None
    except Exception as error:  # Triton's launcher needs a C compiler, for example
        wrong = [f"{type(error).__name__}: {error}".splitlines()[0]]
    if wrong:
        warnings.warn(f"torch's own operations take the place of Triton's kernels: {wrong}")
    return None if wrong else fused


def by_triton(x):
    """Returns the module of Triton kernels for training on a GPU, and None otherwise.

    torch.compile makes its own. These compute in float32.
    """
    if not TRITON or not x.is_cuda or x.dtype == torch.float64 or not torch.is_grad_enabled():
        return None
    return None if torch.compiler.is_compiling() else proven(x.device, product_type(x))


def product_type(x):
    """Returns the type in which a GPU multiplies x: autocast's, or that of x."""
    autocast = torch.is_autocast_enabled("cuda")
    return torch.get_autocast_dtype("cuda") if autocast else x.dtype


class LayerNorm(nn.LayerNorm):
    """Computes nn.LayerNorm in front of products: a GPU that trains makes their type at once."""

    def forward(self, x):
        if triton := by_triton(x):
            return triton.layer_norm(x, self, product_type(x))
        return super().forward(x)


class Residual(nn.Dropout):
    """Computes x + scale * dropout(y)."""

    def forward(self, x, y, scale: float = 1.0):
        p = self.p if self.training else 0.0
        if p and (triton := by_triton(y)):
            return triton.add_dropped(x, y, p, scale)
        return torch.add(x, dropout(y, p) if p else y, alpha=scale)

    def then(self, norm: nn.LayerNorm, x, y, scale: float = 1.0):
        """Returns z = x + scale * dropout(y), and norm(z)."""
        if triton := by_triton(y):
            p = self.p if self.training else 0.0
            dtype = product_type(y)
            if not isinstance(norm, LayerNorm):  # autocast makes nn.LayerNorm's output float32
                autocast = torch.is_autocast_enabled("cuda")
                dtype = torch.promote_types(x.dtype, torch.float32 if autocast else y.dtype)
            return triton.add_and_norm(x, y, norm, p, scale, dtype)
        x = self(x, y, scale)
        return x, norm(x)


class Activation(nn.Dropout):
    """Computes dropout(F.silu(x)) or dropout(F.relu(x))."""

    def __init__(self, p: float, activation):
        super().__init__(p)
        self.activation = activation

    def forward(self, x):
        p = self.p if self.training else 0.0
        if p and (triton := by_triton(x)):
            return triton.activate(x, None, triton.draw(x), p, self.activation is F.silu)
        x = self.activation(x)
        return dropout(x, p) if p else x


def attention_mask(mask, x):
    """Makes of a bool mask (...,S), for x, what a GPU's fused attention wants; elsewhere nothing.

    It wants numbers to add, in rows of whole eights. Made here, one mask serves all layers.
    """
    if not x.is_cuda:
        return mask
    size = mask.size(-1)
    nothing = torch.zeros((), dtype=product_type(x), device=x.device)
    return torch.where(F.pad(mask, (0, -size % 8)), nothing, -math.inf)[..., :size]


def attention(
    q, k, v, mask=None, p: float = 0.0, is_causal: bool = False, scale: float | None = None
):
    """Computes scaled_dot_product_attention: q (B,H,T,d), k, v (B,H,S,d) -> (B,H,T,d).

    mask is bool or, of attention_mask, numbers. p is the dropout of the attention weights. On a CPU
    torch has no fused kernel with dropout, and its random draws are slow, so attention with dropout
    is written out there.
    """
    scale = scale or 1 / math.sqrt(q.size(-1))
    if q.is_cuda and q.size(-1) % 8:
        return attention(*map(in_eights, (q, k, v)), mask, p, is_causal, scale)[..., : v.size(-1)]
    if random_numbers_are_cheap(q, p):
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, dropout_p=p, is_causal=is_causal, scale=scale
        )
    if is_causal:
        mask = torch.ones(q.size(2), k.size(2), dtype=torch.bool).tril()
    scores = q * scale @ k.transpose(2, 3)  # (B,H,T,S)
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    return dropout(scores.softmax(-1), p) @ v


def in_eights(x):
    """Widens x (B,H,T,d) by zeros to a multiple of eight, which changes no attention.

    CUDA's fused kernels take a mask only with such a width.
    """
    return F.pad(x, (0, -x.size(-1) % 8))


def relative_attention(layer, x, positions, mask=None):
    """Computes RelativeAttention of a whole sequence, by fewer and wider products, for a GPU.

    x (B,T,D), positions (1,H,T,D/H) projected -> (B,T,D). The term is (q+u).(k+p) + (v-u).p. So u
    joins the bias of q, and the last dimension of the key is the same in all rows of the batch.
    Zeros in the weights make heads as wide, W, as the fused kernel takes them.
    """
    q, kv, out = layer.linear_q, layer.linear_kv, layer.linear_out
    u, v = layer.pos_bias_u, layer.pos_bias_v
    heads, size = u.shape
    more = 8 - size % 8
    weight = torch.cat((q.weight, kv.weight)).unflatten(0, (-1, size))  # (3H,D/H,D)
    bias = torch.cat((q.bias + u.flatten(), kv.bias)).unflatten(0, (-1, size))  # (3H,D/H)
    ends = bias.new_zeros(3 * heads, more)
    ends[:heads, 0] = 1.0
    weight, bias = F.pad(weight, (0, 0, 0, more)), torch.cat((bias, ends), dim=1)
    x = F.linear(x, weight.flatten(0, 1), bias.flatten())  # (B,T,3HW)
    parts = x.unflatten(-1, (3, heads, -1)).unbind(2)  # (B,T,H,W)
    q, k, values = (part.transpose(1, 2) for part in parts)  # (B,H,T,W)
    term = (positions * (v - u)[:, None]).sum(-1, keepdim=True).to(positions.dtype)
    k = k + F.pad(torch.cat((positions, term), dim=-1), (0, more - 1))
    rate = layer.dropout if layer.training else 0.0
    y = attention(q, k, values, mask, rate, scale=1 / math.sqrt(size))
    weight = F.pad(out.weight.unflatten(1, (heads, size)), (0, more)).flatten(1)  # (D,HW)
    return F.linear(y.transpose(1, 2).flatten(2), weight, out.bias)


class ConvRelu(torch.autograd.Function):
    """Computes relu(conv2d(x, weight, bias, stride)), with a faster backward on the CPU.

    x (B,C,T,F) -> (B,D,T',F'), channels last. oneDNN spends more than twice the time of a matrix
    product on the gradient of the weights of many channels. Here that gradient is a matrix product,
    an utterance at a time: the output's gradient times the windows of the input.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, stride):
        y = F.conv2d(x, weight, bias, stride).relu_()
        ctx.save_for_backward(x, weight, y)
        ctx.stride = stride
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight, y = ctx.saved_tensors
        grad = grad.contiguous(memory_format=torch.channels_last)
        grad = torch.ops.aten.threshold_backward(grad, y, 0)  # of the ReLU
        by_product = x.size(1) > 1
        strides = [ctx.stride] * 2
        wanted = [ctx.needs_input_grad[0], not by_product, False]
        # The convolution has no padding, dilation, transposition or groups. The bias comes below.
        grad_x, grad_weight, _ = torch.ops.aten.convolution_backward(
            grad, x, weight, None, strides, [0, 0], [1, 1], False, [0, 0], 1, wanted
        )
        if by_product:
            grad_weight = ConvRelu.grad_weight(x, grad, weight.size(2), ctx.stride)
        return grad_x, grad_weight, grad.sum((0, 2, 3)), None

    @staticmethod
    def grad_weight(x, grad, kernel, stride):
        """Multiplies x (B,C,T,F) and the convolution's gradient (B,D,T',F') -> (D,C,k,k)."""
        total = grad.new_zeros(grad.size(1), kernel * kernel * x.size(1))
        for utterance, rows in zip(x, grad.permute(0, 2, 3, 1).flatten(1, 2)):  # (C,T,F), (T'*F',D)
            windows = utterance.permute(1, 2, 0)  # (T,F,C)
            windows = windows.unfold(0, kernel, stride).unfold(1, kernel, stride)  # (T',F',C,k,k)
            windows = windows.permute(0, 1, 3, 4, 2).reshape(len(rows), -1)
            # With F' = 1 the rows of this view overlap, which oneDNN does not take.
            total += outer_product(rows, windows.contiguous())
        total = total.view(-1, kernel, kernel, x.size(1))  # (D,k,k,C)
        return total.permute(0, 3, 1, 2)


def conv_relu(x, conv: nn.Conv2d, training: bool):
    """Computes F.relu(conv(x)): x (B,C,T,F) -> (B,D,T',F'), channels last."""
    if training and x.device.type == "cpu" and not torch.is_autocast_enabled("cpu"):
        return ConvRelu.apply(x, conv.weight, conv.bias, conv.stride[0])
    triton = by_triton(x)
    if not triton:
        return F.relu(conv(x))
    y = F.conv2d(x, conv.weight, None, conv.stride)  # torch would add the bias in a pass of its own
    return triton.bias_relu(y.permute(0, 2, 3, 1), conv.bias).permute(0, 3, 1, 2)


def depthwise(x, weight, bias, padding: int = 0, few: bool = False):
    """Convolves over time, each channel by itself: x (B,T,D), weight (D,1,k) -> (B,T',D).

    x becomes an image of one line with channels last: on a CPU its convolution is twice as fast as
    conv1d, and nothing moves in memory. A CPU convolves in float32 in every precision: in bfloat16
    oneDNN never stops generating its code on some CPUs for some widths and lengths, the width 144
    of preset small among them. Over the few frames of a stream's chunk a convolution takes longer
    to get ready than to run, so `few` makes it a sum of products.
    """
    if few and not torch.jit.is_tracing():
        windows = x.unfold(1, weight.size(2), 1)  # (B,T',D,k)
        return torch.linalg.vecdot(windows, weight[:, 0]) + bias
    image = x.transpose(1, 2)[:, :, None]  # (B,D,1,T)
    filters = weight[:, :, None]  # (D,1,1,k)
    if x.is_cpu:
        wide = torch.promote_types(x.dtype, torch.float32)
        image, filters, bias = image.to(wide), filters.to(wide), bias.to(wide)
    with torch.autocast("cpu", enabled=False):
        y = F.conv2d(image, filters, bias, padding=(0, padding), groups=x.size(2))  # (B,D,1,T')
    return y[:, :, 0].transpose(1, 2).to(x.dtype)  # (B,T',D)


def gated_depthwise(triton, x, layer):
    """Computes the gate and convolution of a causal ConvolutionModule: x (B,T,2D) -> (B,T,D).

    What comes before x is the module's `silence`; triton is the result of by_triton(x).
    """
    edge, conv = F.glu(layer.pointwise_conv1.bias, 0), layer.depthwise_conv
    return triton.gated_conv(x, edge, conv.weight, conv.bias, product_type(x))


def compile_block(block: nn.Module) -> None:
    """Compiles a block for training, once for batches of all sizes and lengths.

    A batch of one row would be compiled anew, and so would evaluation: both run as they are. On
    CPUs layout_optimization would give all tensors the convolution's layout, and inductor would
    take their strides for constant.
    """
    block.compile(dynamic=True, options={"layout_optimization": False})
    compiled = block._compiled_call_impl

    def call(x, *rest):
        compiles = block.training and min(x.shape[:2]) > 1
        return (compiled if compiles else block._call_impl)(x, *rest)

    block._compiled_call_impl = call


def label_smoothing_loss(logits, labels, valid, smoothing: float):
    """Sums KL(smoothed one-hot || softmax) over each row: logits (B,U,V), rest (B,U) -> (B,).

    The label's share is 1 - smoothing; the other V - 1 tokens share the rest, as in WeNet.
    """
    others = logits.size(-1) - 1
    share = smoothing / others
    if triton := by_triton(logits):
        tokens = labels[..., None]
        lse, total, hit = triton.rows(logits, tokens, torch.zeros_like(tokens))
        cross = lse - (1 - smoothing - share) * hit[..., 0] - share * total
    else:
        log_probs = log_softmax(logits)
        hit = log_probs.gather(-1, labels[..., None]).squeeze(-1)
        cross = -(1 - smoothing - share) * hit - share * log_probs.sum(-1)
    counts = (1, 1 - smoothing), (others, share)
    entropy = sum(n * p * math.log(p) for n, p in counts if p > 0)
    return (cross + entropy).masked_fill(~valid, 0.0).sum(-1)


def log_softmax(logits):
    """Computes log_softmax over the last axis in float32 or wider."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)


def ctc_loss(logits, labels, lengths, label_lengths, blank: int):
    """Returns CTC's loss of each row, (B,), 0 without a path: logits (T,B,V), labels (B,U)."""
    if triton := by_triton(logits):
        return ctc_loss_of_few(triton, logits, labels, lengths, label_lengths, blank)
    log_probs = log_softmax(logits)
    return F.ctc_loss(log_probs, labels, lengths, label_lengths, blank, "none", zero_infinity=True)


def ctc_loss_of_few(triton, logits, labels, lengths, label_lengths, blank: int):
    """Computes ctc_loss over a row's own tokens alone: blank, and its labels at 1 .. U.

    The other tokens count in log-sum-exp only, so no float32 copy of (T,B,V) is made.
    """
    tokens = F.pad(labels, (1, 0), value=blank)  # (B,1+U)
    place = torch.arange(tokens.size(1), device=labels.device)
    same = tokens[:, :, None] == tokens[:, None, :]
    first = torch.where(same, place, len(place)).amin(-1)  # equal labels need one number
    everywhere = len(logits), -1, -1
    lse, _, picked = triton.rows(logits, tokens.expand(everywhere), first.expand(everywhere))
    log_probs = picked - lse[..., None]  # (T,B,1+U)
    losses = F.ctc_loss(
        log_probs, first[:, 1:].contiguous(), lengths, label_lengths, 0, "none", zero_infinity=True
    )
    # Torch's gradient already is that of the logits: softmax less the path's share of a token. Of
    # log_probs it would be the share alone, from which log-sum-exp makes the softmax once more.
    valid = valid_mask(to_device(lengths, logits.device), len(logits)).T  # (T,B)
    softmax = (log_probs.exp().sum(-1) * (valid & (losses > 0))).sum(0)
    return losses - (softmax - softmax.detach())
