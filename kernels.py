"""These layers compute the same numbers as torch's own, only faster.

To read the network, take them for torch's: Linear and Dropout for nn.Linear and nn.Dropout,
attention for scaled_dot_product_attention, conv_relu for a convolution and a ReLU, depthwise for
F.conv1d with a group for each channel. tests/test_kernels.py puts torch's layers in their place and
finds the same numbers. Axes: B batch, T frames, D width, H heads, S keys; images are (B,C,T,F).
"""

import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

# Torch multiplies float32 by MKL, which on AMD's CPUs with AVX-512 reaches less than half of
# oneDNN's rate (`python -m tools.bench train` prints both). On AMD's CPUs with AVX2 alone both are
# equally fast; Intel's CPUs were not measured.
ONEDNN = (
    torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability() == "AVX512"
)

# For attention with a mask, cuDNN plans anew for every shape, which takes up to a second on an H100
# (pytorch's pull request 155958). Torch's other fused kernels need no plan.
torch.backends.cuda.enable_cudnn_sdp(False)


def by_onednn(x, weight) -> bool:
    """True where oneDNN is faster: float32 on a CPU with AVX-512."""
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
            return F.linear(x, self.weight, self.bias)
        return (Product.apply if torch.is_grad_enabled() else product)(x, self.weight, self.bias)


def for_few_rows(module: nn.Module) -> nn.Module:
    """Stores the weights of `module`'s linear layers column by column, and returns `module`.

    oneDNN then multiplies the few rows of a stream's chunk in half the time. Shapes and numbers
    stay the same.
    """
    if ONEDNN:
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


def attention(
    q, k, v, mask=None, p: float = 0.0, is_causal: bool = False, scale: float | None = None
):
    """Computes scaled_dot_product_attention: q (B,H,T,d), k, v (B,H,S,d) -> (B,H,T,d).

    p is the dropout of the attention weights. On a CPU torch has no fused kernel with dropout, and
    its random draws are slow, so attention with dropout is written out there.
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
    return F.relu(conv(x))


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


def label_smoothing_loss(logits, labels, valid, smoothing: float):
    """Sums KL(smoothed one-hot || softmax) over each row: logits (B,U,V), rest (B,U) -> (B,).

    The label's share is 1 - smoothing; the other V - 1 tokens share the rest, as in WeNet.
    """
    log_probs = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
    others = logits.size(-1) - 1
    share = smoothing / others
    hit = log_probs.gather(-1, labels[..., None]).squeeze(-1)
    cross = -(1 - smoothing - share) * hit - share * log_probs.sum(-1)
    counts = (1, 1 - smoothing), (others, share)
    entropy = sum(n * p * math.log(p) for n, p in counts if p > 0)
    return (cross + entropy).masked_fill(~valid, 0.0).sum(-1)
