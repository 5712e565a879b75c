"""Triton kernels for training on a GPU: each reads and writes once what torch's operations read and
write several times.

kernels.py says when they run, and has torch's operations for all other cases; these define the
numbers. The kernels are plain: rows, or numbers in a line, with masks at the edges and without
tuning. All compute in float32 and store in the output's type. Those that drop keep no mask for
backward: they draw it again from the same seed. A seed is a tensor, so that a CUDA graph draws anew
at each replay. Axes: R rows, D width, N numbers, B batch, T frames, V vocabulary.
"""

import math

import torch
import triton
import triton.language as tl

LINE = 1024  # numbers to a program
TILE = 4096  # numbers to a program that takes whole rows


@triton.jit
def kept(seed, place, p):
    """Draws for each place (uint32) whether dropout keeps it: 1 / (1 - p), or 0.

    The numbers are a hash of place and seed (lowbias32 by C. Wellons, twice).
    """
    x = place
    for word in tl.static_range(2):
        x = x ^ tl.load(seed + word).to(tl.uint32)
        x = (x ^ (x >> 16)) * 0x7FEB352D
        x = (x ^ (x >> 15)) * 0x846CA68B
        x = x ^ (x >> 16)
    uniform = (x >> 8).to(tl.float32) * (1.0 / 16777216.0)
    return tl.where(uniform >= p, 1.0 / (1.0 - p), 0.0)


@triton.jit
def line(n, LINE: tl.constexpr):
    """Returns the places of a program among n numbers, and which of these exist."""
    place = tl.program_id(0).to(tl.int64) * LINE + tl.arange(0, LINE)
    return place, place < n


@triton.jit
def add_kernel(x, y, seed, out, n, p, scale, HAS_X: tl.constexpr, LINE: tl.constexpr):
    """Computes x + scale * dropout(y), or, without x, scale * dropout(y), which is its gradient."""
    place, real = line(n, LINE)
    value = tl.load(y + place, mask=real, other=0.0).to(tl.float32)
    value = value * scale * kept(seed, place.to(tl.uint32), p)
    if HAS_X:
        value += tl.load(x + place, mask=real, other=0.0).to(tl.float32)
    tl.store(out + place, value, mask=real)


@triton.jit
def activate_kernel(
    x, grad, seed, out, n, p, SILU: tl.constexpr, BACKWARD: tl.constexpr, LINE: tl.constexpr
):
    """Computes dropout(activation(x)), or backward its gradient."""
    place, real = line(n, LINE)
    value = tl.load(x + place, mask=real, other=0.0).to(tl.float32)
    if SILU:
        gate = 1.0 / (1.0 + tl.exp(-value))
        slope = gate * (1.0 + value * (1.0 - gate))
        active = value * gate
    else:
        slope = tl.where(value <= 0, 0.0, 1.0)
        active = tl.where(value <= 0, 0.0, value)  # a GPU's maximum would make 0 of NaN
    keep = kept(seed, place.to(tl.uint32), p)
    if BACKWARD:
        active = tl.load(grad + place, mask=real, other=0.0).to(tl.float32) * slope
    tl.store(out + place, active * keep, mask=real)


@triton.jit
def norm_kernel(
    x, y, seed, weight, bias, total, out, mean, rstd, rows, width, eps, p, scale,
    HAS_Y: tl.constexpr, R: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Normalises R rows to a program, of x (rows,width) or of total = x + scale * dropout(y)."""
    row = tl.program_id(0) * R + tl.arange(0, R)
    column = tl.arange(0, D)
    real = (row < rows)[:, None] & (column < width)[None, :]
    place = row.to(tl.int64)[:, None] * width + column[None, :]
    value = tl.load(x + place, mask=real, other=0.0).to(tl.float32)
    if HAS_Y:
        added = tl.load(y + place, mask=real, other=0.0).to(tl.float32)
        value += added * scale * kept(seed, place.to(tl.uint32), p)
        tl.store(total + place, value, mask=real)
    center = tl.sum(value, 1) / width
    value = tl.where(real, value - center[:, None], 0.0)
    factor = 1.0 / tl.sqrt(tl.sum(value * value, 1) / width + eps)
    w = tl.load(weight + column, mask=column < width, other=0.0).to(tl.float32)
    b = tl.load(bias + column, mask=column < width, other=0.0).to(tl.float32)
    tl.store(out + place, value * factor[:, None] * w[None, :] + b[None, :], mask=real)
    tl.store(mean + row, center, mask=row < rows)
    tl.store(rstd + row, factor, mask=row < rows)


@triton.jit
def norm_backward_kernel(
    grad, of_total, x, seed, weight, mean, rstd, of_x, of_y, of_weight, of_bias, rows, width, p,
    scale, HAS_TOTAL: tl.constexpr, HAS_Y: tl.constexpr, R: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Computes the gradients of what norm_kernel takes; x is what it normalised.

    For weight and bias these are sums over the program's rows, (programs,width).
    """
    program = tl.program_id(0)
    row = program * R + tl.arange(0, R)
    column = tl.arange(0, D)
    real = (row < rows)[:, None] & (column < width)[None, :]
    place = row.to(tl.int64)[:, None] * width + column[None, :]
    center = tl.load(mean + row, mask=row < rows, other=0.0)
    factor = tl.load(rstd + row, mask=row < rows, other=0.0)
    value = tl.load(x + place, mask=real, other=0.0).to(tl.float32)
    value = tl.where(real, (value - center[:, None]) * factor[:, None], 0.0)
    g = tl.load(grad + place, mask=real, other=0.0).to(tl.float32)
    tl.store(of_weight + program * width + column, tl.sum(g * value, 0), mask=column < width)
    tl.store(of_bias + program * width + column, tl.sum(g, 0), mask=column < width)
    w = tl.load(weight + column, mask=column < width, other=0.0).to(tl.float32)
    g = g * w[None, :]
    along = tl.sum(g * value, 1) / width
    level = tl.sum(g, 1) / width
    g = (g - level[:, None] - value * along[:, None]) * factor[:, None]
    if HAS_TOTAL:
        g += tl.load(of_total + place, mask=real, other=0.0).to(tl.float32)
    tl.store(of_x + place, g, mask=real)
    if HAS_Y:
        tl.store(of_y + place, g * scale * kept(seed, place.to(tl.uint32), p), mask=real)


@triton.jit
def rows_kernel(x, lse, total, V: tl.constexpr, LINE: tl.constexpr):
    """Computes the logarithm of the sum of exponentials, and the sum, of a row of x (R,V)."""
    row = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, LINE)
    top = tl.full((LINE,), float("-inf"), tl.float32)
    for start in range(0, V, LINE):
        real = start + place < V
        value = tl.load(x + row * V + start + place, mask=real, other=float("-inf"))
        top = tl.maximum(top, value.to(tl.float32))
    highest = tl.max(top, 0)
    exponentials = tl.zeros((LINE,), tl.float32)
    values = tl.zeros((LINE,), tl.float32)
    for start in range(0, V, LINE):
        real = start + place < V
        value = tl.load(x + row * V + start + place, mask=real, other=0.0).to(tl.float32)
        exponentials += tl.where(real, tl.exp(value - highest), 0.0)
        values += value
    tl.store(lse + row, highest + tl.log(tl.sum(exponentials, 0)))
    tl.store(total + row, tl.sum(values, 0))


@triton.jit
def rows_backward_kernel(x, lse, of_lse, of_total, out, V: tl.constexpr, LINE: tl.constexpr):
    """Computes the gradient of a row of x from those of its two numbers."""
    row = tl.program_id(0).to(tl.int64)
    place = tl.program_id(1) * LINE + tl.arange(0, LINE)
    value = tl.load(x + row * V + place, mask=place < V, other=0.0).to(tl.float32)
    softmax = tl.exp(value - tl.load(lse + row))
    grad = tl.load(of_lse + row) * softmax + tl.load(of_total + row)
    tl.store(out + row * V + place, grad, mask=place < V)


@triton.jit
def gated(x, edge, row, column, real, W: tl.constexpr):
    """Returns what the gate makes of rows of x (T,2W); before row 0 this is edge (W,)."""
    place = x + row.to(tl.int64) * (2 * W) + column
    value = tl.load(place, mask=real & (row >= 0), other=0.0).to(tl.float32)
    gate = tl.load(place + W, mask=real & (row >= 0), other=0.0).to(tl.float32)
    before = tl.load(edge + column, mask=column < W, other=0.0).to(tl.float32)
    return tl.where(row < 0, before, value / (1.0 + tl.exp(-gate)))


@triton.jit
def conv_kernel(
    x, edge, weight, bias, out, size, K: tl.constexpr, W: tl.constexpr, R: tl.constexpr,
    D: tl.constexpr,
):  # fmt: skip
    """Gates x (B,T,2W) and convolves it causally, each channel by itself -> (B,T,W)."""
    row = tl.program_id(0) * R + tl.arange(0, R)[:, None]
    column = tl.program_id(2) * D + tl.arange(0, D)[None, :]
    real = (row < size) & (column < W)
    start = tl.program_id(1).to(tl.int64) * size
    total = tl.zeros((R, D), tl.float32)
    total += tl.load(bias + column, mask=column < W, other=0.0).to(tl.float32)
    for k in range(K):
        value = gated(x + start * 2 * W, edge, row - (K - 1 - k), column, real, W)
        w = tl.load(weight + column * K + k, mask=column < W, other=0.0).to(tl.float32)
        total += value * w
    tl.store(out + (start + row) * W + column, total, mask=real)


@triton.jit
def conv_backward_kernel(
    grad, x, edge, weight, of_x, sums, size, K: tl.constexpr, W: tl.constexpr, R: tl.constexpr,
    D: tl.constexpr,
):  # fmt: skip
    """Computes the gradient of x, and sums over a program's rows, (programs,K+2,W).

    These are the gradients of the K weights, of the bias and of edge.
    """
    row = tl.program_id(0) * R + tl.arange(0, R)[:, None]
    column = tl.program_id(2) * D + tl.arange(0, D)[None, :]
    real = (row < size) & (column < W)
    start = tl.program_id(1).to(tl.int64) * size
    program = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
    channel = tl.program_id(2) * D + tl.arange(0, D)
    sums = sums + program.to(tl.int64) * (K + 2) * W + channel
    g = tl.load(grad + (start + row) * W + column, mask=real, other=0.0).to(tl.float32)
    of_edge = tl.zeros((D,), tl.float32)
    of_gated = tl.zeros((R, D), tl.float32)
    for k in range(K):
        before = K - 1 - k  # this weight takes the row so many rows before
        value = gated(x + start * 2 * W, edge, row - before, column, real, W)
        tl.store(sums + k * W, tl.sum(g * value, 0), mask=channel < W)
        w = tl.load(weight + column * K + k, mask=column < W, other=0.0).to(tl.float32)
        of_edge += tl.sum(tl.where(row < before, g * w, 0.0), 0)
        later = real & (row + before < size)
        after = tl.load(grad + (start + row + before) * W + column, mask=later, other=0.0)
        of_gated += after.to(tl.float32) * w
    tl.store(sums + K * W, tl.sum(g, 0), mask=channel < W)
    tl.store(sums + (K + 1) * W, of_edge, mask=channel < W)
    place = (start + row) * (2 * W) + column
    value = tl.load(x + place, mask=real, other=0.0).to(tl.float32)
    gate = 1.0 / (1.0 + tl.exp(-tl.load(x + place + W, mask=real, other=0.0).to(tl.float32)))
    tl.store(of_x + place, of_gated * gate, mask=real)
    tl.store(of_x + place + W, of_gated * value * gate * (1.0 - gate), mask=real)


@triton.jit
def relu_kernel(
    x, bias, grad, out, sums, rows, width, BACKWARD: tl.constexpr, R: tl.constexpr, D: tl.constexpr
):
    """Computes relu(x + bias) of x (rows,width), or of its output x the gradient.

    The gradient of bias comes as sums over a program's rows, (programs,width).
    """
    program = tl.program_id(0)
    row = program.to(tl.int64) * R + tl.arange(0, R)
    column = tl.arange(0, D)
    real = (row < rows)[:, None] & (column < width)[None, :]
    place = row[:, None] * width + column[None, :]
    value = tl.load(x + place, mask=real, other=0.0).to(tl.float32)
    if BACKWARD:
        g = tl.load(grad + place, mask=real, other=0.0).to(tl.float32)
        value = tl.where(value <= 0, 0.0, g)
        tl.store(sums + program * width + column, tl.sum(value, 0), mask=column < width)
    else:
        b = tl.load(bias + column, mask=column < width, other=0.0).to(tl.float32)
        value += b[None, :]
        value = tl.where(value <= 0, 0.0, value)  # a GPU's maximum would make 0 of NaN
    tl.store(out + place, value, mask=real)


def draw(like) -> torch.Tensor:
    """Draws a seed on the device of `like`."""
    return torch.empty(2, dtype=torch.int64, device=like.device).random_(2**31)


def lines(n: int) -> tuple[int]:
    return (triton.cdiv(n, LINE),)


@torch.library.custom_op("u2::dropped", mutates_args=())
def dropped(
    x: torch.Tensor | None,
    y: torch.Tensor,
    seed: torch.Tensor,
    p: float,
    scale: float,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Computes x + scale * dropout(y) in dtype; without x only the latter. Shapes are alike."""
    y = y.contiguous()
    x = x if x is None else x.contiguous()
    out = y.new_empty(y.shape, dtype=dtype)
    n = y.numel()
    add_kernel[lines(n)](x, y, seed, out, n, p, scale, HAS_X=x is not None, LINE=LINE)
    return out


@dropped.register_fake
def _(x, y, seed, p, scale, dtype):
    return y.new_empty(y.shape, dtype=dtype)


def keep_dropped(ctx, inputs, output):
    x, y, seed, ctx.p, ctx.scale, _ = inputs
    ctx.types = x.dtype, y.dtype
    ctx.save_for_backward(seed)


def dropped_backward(ctx, grad):
    of_x, of_y = ctx.types
    return (
        grad.to(of_x),
        dropped(None, grad, *ctx.saved_tensors, ctx.p, ctx.scale, of_y),
        *[None] * 4,
    )


dropped.register_autograd(dropped_backward, setup_context=keep_dropped)


def add_dropped(x, y, p: float, scale: float):
    """Computes x + scale * dropout(y), in the wider type of both."""
    return dropped(x, y, draw(y), p, scale, torch.promote_types(x.dtype, y.dtype))


@torch.library.custom_op("u2::activate", mutates_args=())
def activate(
    x: torch.Tensor, grad: torch.Tensor | None, seed: torch.Tensor, p: float, silu: bool
) -> torch.Tensor:
    """Computes dropout(activation(x)), SiLU or ReLU; of `grad`, if given, the gradient of x."""
    x = x.contiguous()
    out = torch.empty_like(x)
    grad = grad if grad is None else grad.contiguous()
    n = x.numel()
    backward = grad is not None
    activate_kernel[lines(n)](x, grad, seed, out, n, p, SILU=silu, BACKWARD=backward, LINE=LINE)
    return out


@activate.register_fake
def _(x, grad, seed, p, silu):
    return x.new_empty(x.shape)


def keep_activate(ctx, inputs, output):
    x, _, seed, ctx.p, ctx.silu = inputs
    ctx.save_for_backward(x, seed)


def activate_backward(ctx, grad):
    x, seed = ctx.saved_tensors
    return activate(x, grad, seed, ctx.p, ctx.silu), None, None, None, None


activate.register_autograd(activate_backward, setup_context=keep_activate)


def tile(width: int) -> dict:
    """Returns the rows and columns, powers of two, of a program that takes whole rows."""
    columns = triton.next_power_of_2(width)
    return dict(R=max(TILE // columns, 1), D=columns, num_warps=8)


@torch.library.custom_op("u2::norm", mutates_args=())
def norm(
    x: torch.Tensor,
    y: torch.Tensor | None,
    seed: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor,
    rates: list[float],
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Computes layer_norm (...,D), in dtype, of total = x + scale * dropout(y), or of x.

    rates: eps, p, scale. Returns it, total, which is empty without y, mean and 1 / deviation.
    """
    x = x.contiguous()
    y = y if y is None else y.contiguous()
    out, total, mean, rstd = new_norm(x, y, seed, weight, bias, rates, dtype)
    count, width = mean.numel(), x.size(-1)
    size = tile(width)
    norm_kernel[(triton.cdiv(count, size["R"]),)](
        x, y, seed, weight, bias, total, out, mean, rstd, count, width, *rates,
        HAS_Y=y is not None, **size,
    )  # fmt: skip
    return out, total, mean, rstd


@norm.register_fake
def new_norm(x, y, seed, weight, bias, rates, dtype):
    mean, rstd = (x.new_empty(x.shape[:-1].numel(), dtype=torch.float32) for _ in range(2))
    wide = x.dtype if y is None else torch.promote_types(x.dtype, y.dtype)
    total = x.new_empty(0 if y is None else x.shape, dtype=wide)
    return x.new_empty(x.shape, dtype=dtype), total, mean, rstd


@torch.library.custom_op("u2::norm_backward", mutates_args=())
def norm_backward(
    grad: torch.Tensor,
    of_total: torch.Tensor | None,
    x: torch.Tensor,
    seed: torch.Tensor | None,
    weight: torch.Tensor,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    rates: list[float],
    of_x: torch.dtype,
    of_y: torch.dtype | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns the gradients of x and y, in these types, and partial sums of weight's and bias's."""
    grad, x = grad.contiguous(), x.contiguous()
    of_total = of_total if of_total is None else of_total.contiguous()
    found = new_norm_backward(grad, of_total, x, seed, weight, mean, rstd, rates, of_x, of_y)
    norm_backward_kernel[(len(found[2]),)](
        grad, of_total, x, seed, weight, mean, rstd, *found, mean.numel(), x.size(-1), *rates[1:],
        HAS_TOTAL=of_total is not None, HAS_Y=seed is not None, **tile(x.size(-1)),
    )  # fmt: skip
    return found


@norm_backward.register_fake
def new_norm_backward(grad, of_total, x, seed, weight, mean, rstd, rates, of_x, of_y):
    programs = triton.cdiv(mean.numel(), tile(x.size(-1))["R"])
    of_weight, of_bias = (x.new_empty(programs, x.size(-1), dtype=torch.float32) for _ in range(2))
    grad_y = x.new_empty(0 if seed is None else x.shape, dtype=of_y or of_x)
    return x.new_empty(x.shape, dtype=of_x), grad_y, of_weight, of_bias


def keep_norm(ctx, inputs, output):
    x, y, seed, weight, _, ctx.rates, _ = inputs
    _, total, mean, rstd = output
    ctx.types = x.dtype, None if y is None else y.dtype
    ctx.save_for_backward(x if y is None else total, seed, weight, mean, rstd)
    ctx.set_materialize_grads(False)  # mean and rstd have none, and total may have none


def backward_of_norm(ctx, grad, of_total, *_):
    saved = ctx.saved_tensors
    of_total = None if saved[1] is None else of_total
    x, y, *sums = norm_backward(grad, of_total, *saved, ctx.rates, *ctx.types)
    of_weight, of_bias = (part.sum(0).to(saved[2].dtype) for part in sums)
    return x, y if ctx.types[1] else None, None, of_weight, of_bias, None, None


norm.register_autograd(backward_of_norm, setup_context=keep_norm)


def layer_norm(x, layer, dtype):
    """Computes the LayerNorm `layer` of x, in dtype."""
    return norm(x, None, None, layer.weight, layer.bias, [layer.eps, 0.0, 0.0], dtype)[0]


def add_and_norm(x, y, layer, p: float, scale: float, dtype):
    """Returns x + scale * dropout(y) and the LayerNorm `layer` of it, in dtype."""
    rates = [layer.eps, p, scale]
    out, total, *_ = norm(x, y, draw(y), layer.weight, layer.bias, rates, dtype)
    return total, out


@torch.library.custom_op("u2::rows", mutates_args=())
def rows(
    x: torch.Tensor, tokens: torch.Tensor, first: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns log-sum-exp and sum of the rows of x (...,V), and x at tokens (...,L), in float32.

    first (...,L) says where in `tokens` the same token stands first. Only there x has a gradient
    through the third result.
    """
    x = x.contiguous()
    lse, total, _ = new_rows(x, tokens, first)
    rows_kernel[(lse.numel(),)](x, lse, total, V=x.size(-1), LINE=LINE)
    return lse, total, x.gather(-1, tokens).float()


@rows.register_fake
def new_rows(x, tokens, first):
    lse, total = (x.new_empty(x.shape[:-1], dtype=torch.float32) for _ in range(2))
    return lse, total, x.new_empty(tokens.shape, dtype=torch.float32)


@torch.library.custom_op("u2::rows_backward", mutates_args=())
def rows_backward(
    x: torch.Tensor, lse: torch.Tensor, of_lse: torch.Tensor, of_total: torch.Tensor
) -> torch.Tensor:
    x, of_lse, of_total = x.contiguous(), of_lse.contiguous(), of_total.contiguous()
    out = torch.empty_like(x)
    grid = lse.numel(), triton.cdiv(x.size(-1), LINE)
    rows_backward_kernel[grid](x, lse, of_lse, of_total, out, V=x.size(-1), LINE=LINE)
    return out


@rows_backward.register_fake
def _(x, lse, of_lse, of_total):
    return x.new_empty(x.shape)


def keep_rows(ctx, inputs, output):
    ctx.save_for_backward(*inputs, output[0], output[2])
    ctx.set_materialize_grads(False)  # the sum often has none


def backward_of_rows(ctx, of_lse, of_total, of_picked):
    x, tokens, first, lse, picked = ctx.saved_tensors
    of_total = torch.zeros_like(lse) if of_total is None else of_total
    grad = rows_backward(x, lse, of_lse, of_total)
    # A token's gradient is the small difference of two numbers, so it is not rounded in between.
    at_tokens = of_lse[..., None] * (picked - lse[..., None]).exp() + of_total[..., None]
    at_tokens = at_tokens + of_picked.gather(-1, first)
    return grad.scatter_(-1, tokens, at_tokens.to(grad.dtype)), None, None


rows.register_autograd(backward_of_rows, setup_context=keep_rows)


# The rows and channels of a convolution's program.
BLOCK = dict(R=64, D=64, num_warps=8)


def blocks(x) -> tuple[int, int, int]:
    batch, size, width = x.shape
    return triton.cdiv(size, BLOCK["R"]), batch, triton.cdiv(width // 2, BLOCK["D"])


@torch.library.custom_op("u2::gated_conv", mutates_args=())
def gated_conv(
    x: torch.Tensor,
    edge: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Convolves glu(x) causally, each channel by itself: x (B,T,2D), weight (D,1,K) -> (B,T,D).

    Before the first frame stands edge (D,).
    """
    x = x.contiguous()
    out = new_conv(x, edge, weight, bias, dtype)
    shape = dict(K=weight.size(2), W=out.size(2), **BLOCK)
    conv_kernel[blocks(x)](x, edge, weight.contiguous(), bias, out, x.size(1), **shape)
    return out


@gated_conv.register_fake
def new_conv(x, edge, weight, bias, dtype):
    return x.new_empty(*x.shape[:2], x.size(2) // 2, dtype=dtype)


@torch.library.custom_op("u2::gated_conv_backward", mutates_args=())
def gated_conv_backward(
    grad: torch.Tensor, x: torch.Tensor, edge: torch.Tensor, weight: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    grad, x = grad.contiguous(), x.contiguous()
    found = new_conv_backward(grad, x, edge, weight)
    shape = dict(K=weight.size(2), W=grad.size(2), **BLOCK)
    conv_backward_kernel[blocks(x)](grad, x, edge, weight.contiguous(), *found, x.size(1), **shape)
    return found


@gated_conv_backward.register_fake
def new_conv_backward(grad, x, edge, weight):
    rows, batch, _ = blocks(x)
    sums = x.new_empty(rows * batch, weight.size(2) + 2, grad.size(2), dtype=torch.float32)
    return x.new_empty(x.shape), sums


def keep_conv(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:3])


def backward_of_conv(ctx, grad):
    _, edge, weight = ctx.saved_tensors
    of_x, sums = gated_conv_backward(grad, *ctx.saved_tensors)
    sums = sums.sum(0)  # (K+2,D)
    of_weight = sums[:-2].T[:, None].to(weight.dtype)  # (D,1,K)
    return of_x, sums[-1].to(edge.dtype), of_weight, sums[-2].to(weight.dtype), None


gated_conv.register_autograd(backward_of_conv, setup_context=keep_conv)


@torch.library.custom_op("u2::bias_relu", mutates_args=())
def bias_relu(x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """Computes relu(x + bias): x (...,D), bias (D,)."""
    x = x.contiguous()
    out = torch.empty_like(x)
    width, size = x.size(-1), tile(x.size(-1))
    count = x.numel() // width
    grid = (triton.cdiv(count, size["R"]),)
    relu_kernel[grid](x, bias, None, out, None, count, width, BACKWARD=False, **size)
    return out


@bias_relu.register_fake
def _(x, bias):
    return x.new_empty(x.shape)


@torch.library.custom_op("u2::bias_relu_backward", mutates_args=())
def bias_relu_backward(grad: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    grad, y = grad.contiguous(), y.contiguous()
    out, sums = new_relu_backward(grad, y)
    width = y.size(-1)
    relu_kernel[(len(sums),)](
        y, None, grad, out, sums, y.numel() // width, width, BACKWARD=True, **tile(width)
    )
    return out, sums


@bias_relu_backward.register_fake
def new_relu_backward(grad, y):
    width = y.size(-1)
    programs = triton.cdiv(y.numel() // width, tile(width)["R"])
    return y.new_empty(y.shape), y.new_empty(programs, width, dtype=torch.float32)


def keep_relu(ctx, inputs, output):
    ctx.save_for_backward(output)
    ctx.kind = inputs[1].dtype


def backward_of_relu(ctx, grad):
    out, sums = bias_relu_backward(grad, *ctx.saved_tensors)
    return out, sums.sum(0).to(ctx.kind)


bias_relu.register_autograd(backward_of_relu, setup_context=keep_relu)


# ---- Checks: a GPU that computes other numbers than torch does without these kernels


def worst(values) -> float:
    """Returns the largest value, or NaN if there is one."""
    return float(torch.tensor(values).max())


def difference(ours, theirs, inputs) -> float:
    """Returns the largest difference of two outputs, and of their gradients for equal weights.

    Of numbers above 1 it is a share of the largest.
    """
    # All weights are positive, so that no sum ends near zero after long ways.
    weights = torch.linspace(0.1, 1, theirs.numel(), device=theirs.device).view(theirs.shape)
    pairs = [(ours, theirs)]
    grads = (torch.autograd.grad(y, inputs, weights.to(y.dtype), True) for y in (ours, theirs))
    pairs += zip(*grads)
    sizes = [other.detach().abs().max().clamp(min=1) for _, other in pairs]
    return worst(
        [float((one - other).detach().abs().max() / n) for (one, other), n in zip(pairs, sizes)]
    )


def random(device, *shape, seed: int = 0, dtype=torch.float32):
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return x.to(device, dtype).requires_grad_()


def check_norm(device, dtype=torch.float32) -> float:
    weights = random(device, 144), random(device, 144, seed=1)
    x, y = (random(device, 3, 37, 144, seed=seed, dtype=dtype) for seed in (0, 2))
    seed = torch.ones(2, dtype=torch.int64, device=device)
    keep = dropped(None, torch.ones_like(x), seed, 0.25, 0.5, x.dtype)
    total = x + y * keep
    first = norm(x, None, None, *weights, [1e-5, 0.0, 0.0], x.dtype)[0]
    out, ours, *_ = norm(x, y, seed, *weights, [1e-5, 0.25, 0.5], x.dtype)
    after = [torch.nn.functional.layer_norm(z, (144,), *weights) for z in (x, total)]
    inputs = [x, y, *weights]
    return worst(
        [
            difference(first, after[0], [x, *weights]),
            difference(out, after[1], inputs),
            difference(torch.cat((ours, out)), torch.cat((total, after[1])), inputs),
        ]
    )


def check_activate(device, dtype=torch.float32) -> float:
    x = random(device, 3, 37, 31, dtype=dtype)
    seed = torch.ones(2, dtype=torch.int64, device=device)
    keep = dropped(None, torch.ones_like(x), seed, 0.25, 1.0, x.dtype)
    kinds = (True, torch.nn.functional.silu), (False, torch.relu)
    return worst(
        [
            difference(activate(x, None, seed, 0.25, silu), act(x) * keep, [x])
            + (not activate(x * math.nan, None, seed, 0.25, silu).isnan().all())
            for silu, act in kinds
        ]
    )


def check_add(device, dtype=torch.float32) -> float:
    x, y = (random(device, 3, 37, 31, seed=seed, dtype=dtype) for seed in (0, 1))
    seed = torch.ones(2, dtype=torch.int64, device=device)
    keep = dropped(None, torch.ones_like(x), seed, 0.25, 0.5, x.dtype)
    share = float((keep == 0).float().mean())  # of 3441 numbers, so the deviation is 0.0074
    ours = dropped(x, y, seed, 0.25, 0.5, x.dtype)
    return difference(ours, x + y * keep, [x, y]) + (not 0.2 < share < 0.3)


def check_rows(device, dtype=torch.float32) -> float:
    x = random(device, 3, 37, 2000, dtype=dtype)
    tokens = torch.arange(111, device=device).view(3, 37, 1) * 15
    weights = random(device, 3, 37, 3, seed=1).detach()
    theirs = torch.stack((x.logsumexp(-1), x.sum(-1), x.gather(-1, tokens)[..., 0]), dim=-1)
    ours = rows(x, tokens, torch.zeros_like(tokens))
    ours = torch.stack((*ours[:2], ours[2][..., 0]), dim=-1)
    return difference(ours * weights, theirs * weights, [x])


def check_conv(device, dtype=torch.float32) -> float:
    x, edge = random(device, 2, 70, 2 * 72, dtype=dtype), random(device, 72)
    weight, bias = random(device, 72, 1, 8), random(device, 72, seed=1)
    past = edge[:, None].expand(2, -1, 7)
    image = torch.cat((past, torch.nn.functional.glu(x, -1).transpose(1, 2)), dim=2)
    theirs = (image.unfold(2, 8, 1) * weight).sum(-1) + bias[:, None]  # (B,D,T)
    ours = gated_conv(x, edge, weight, bias, x.dtype)
    return difference(ours, theirs.transpose(1, 2), [x, edge, weight, bias])


def check_relu(device, dtype=torch.float32) -> float:
    x, bias = random(device, 2, 70, 72, dtype=dtype), random(device, 72)
    lost = not bias_relu(x * math.nan, bias).isnan().all()
    return difference(bias_relu(x, bias), torch.relu(x + bias), [x, bias]) + lost


CHECKS = [
    ("relu", check_relu),
    ("conv", check_conv),
    ("rows", check_rows),
    ("norm", check_norm),
    ("activate", check_activate),
    ("add", check_add),
]
