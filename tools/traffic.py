"""Counts what a training step launches on a GPU, and the bytes that it reads and writes there.

    python -m tools.traffic --preset base --rows 48 --frames 1000

No GPU is needed: the step runs on fake tensors, which have shapes and a device but no memory. The
bytes at the memory's rate are a lower bound of the time. A kernel may well take longer.
"""

from collections import Counter, defaultdict
from unittest import mock

import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from conformer import U2Conformer
from presets import PRESETS, ModelOptions

RATE = 3.35e12  # bytes a second, an H100's memory
PRODUCTS = (
    "mm",
    "addmm",
    "bmm",
    "baddbmm",
    "convolution",
    "scaled_dot",
    "_efficient_att",
    "_flash",
)
# Without a kernel of their own. The fake tensors do not tell that a reshape is a view.
FREE = (
    "empty",
    "view",
    "detach",
    "lift",
    "alias",
    "_local_scalar",
    "_reshape_alias",
    "new_empty",
    "_unsafe_view",
)


def touched(tensor) -> int:
    """Returns the bytes of a tensor, the numbers of an expanded dimension once."""
    sizes = (n for n, stride in zip(tensor.shape, tensor.stride()) if stride)
    count = tensor.element_size()
    for n in sizes:
        count *= n
    return count


class Traffic(TorchDispatchMode):
    """Counts launches and bytes of each operation in `launches` and `bytes`, by name."""

    def __init__(self):
        super().__init__()
        self.launches = Counter()
        self.bytes = Counter()
        self.where = defaultdict(Counter)

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        y = op(*args, **(kwargs or {}))
        name = op._schema.name.split("::")[1]
        if name.startswith("convolution") and args[-1 if name == "convolution" else -2] > 1:
            name = "depthwise"
        if op.namespace in ("aten", "u2") and not op.is_view and not name.startswith(FREE):
            made = name.startswith("new_") or name.endswith("_like")  # reads nothing
            if name in ("gather", "scatter_"):  # few of the numbers of their first argument
                args = args[1:]
            leaves = tree_leaves(y if made else (args, kwargs, y))
            found = [x for x in leaves if isinstance(x, torch.Tensor) and x.device.type == "cuda"]
            if found:
                self.launches[name] += 1
                moved = sum(map(touched, found))
                self.bytes[name] += moved
                self.where[name][tuple((str(x.dtype)[6:], *x.shape) for x in found)] += moved
        return y


def step(options: ModelOptions, rows: int, frames: int, labels: int, vocab: int, dtype) -> Traffic:
    """Runs forward and backward of one training step on a fake GPU, and returns what it counted."""
    net = U2Conformer(options, 80, vocab, 0, vocab - 1, vocab - 1).train()

    def fake_ctc(log_probs, *_, **__):
        return Ctc.apply(log_probs)

    traffic = Traffic()
    with (
        FakeTensorMode(allow_non_fake_inputs=True),
        mock.patch("torch.nn.functional.ctc_loss", fake_ctc),
        mock.patch("kernels.proven", lambda device: __import__("fused")),
        mock.patch("torch.nn.functional.scaled_dot_product_attention", efficient_attention),
    ):
        for module in net.modules():
            for name, x in module._parameters.items():
                if x is not None:
                    module._parameters[name] = torch.nn.Parameter(on_gpu(x))
            for name, x in module._buffers.items():
                module._buffers[name] = on_gpu(x)
        features = torch.empty(rows, frames, 80, device="cuda")
        numbers = torch.empty(rows, labels, dtype=torch.long, device="cuda")
        lengths = torch.full((rows,), frames), torch.full((rows,), labels)
        lengths = [torch.empty(rows, dtype=torch.long, device="cuda") for _ in lengths]
        torch.set_autocast_enabled("cuda", dtype != torch.float32)
        torch.set_autocast_dtype("cuda", dtype)
        torch.set_autocast_cache_enabled(False)
        try:
            with traffic:
                loss = net.loss(features, lengths[0], numbers, lengths[1], -1)["loss"]
                torch.set_autocast_enabled("cuda", False)
                backward(loss)
        finally:
            torch.set_autocast_enabled("cuda", False)
    return traffic


def efficient_attention(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None):
    """Does what scaled_dot_product_attention does on a GPU with torch's memory-efficient kernel."""
    if torch.is_autocast_enabled("cuda"):
        dtype = torch.get_autocast_dtype("cuda")
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
        if attn_mask is not None and attn_mask.is_floating_point():
            attn_mask = attn_mask.to(dtype)
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            attn_mask = torch.where(attn_mask, q.new_zeros(()), q.new_full((), -torch.inf))
        if any(n % 8 for n in attn_mask.stride()[:-1]):
            size = attn_mask.size(-1)
            attn_mask = F.pad(attn_mask, (0, 8 - size % 8))[..., :size]
        attn_mask = attn_mask.expand(*q.shape[:3], k.size(2))
    return torch.ops.aten._scaled_dot_product_efficient_attention(
        q, k, v, attn_mask, True, dropout_p, is_causal, scale=scale
    )[0]


def on_gpu(x):
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cuda")


@torch.no_grad()
def backward(loss) -> None:
    """Calls the nodes of the graph of `loss`. Autograd's engine asks a driver for its streams."""
    waiting = Counter()  # for how many gradients a node waits
    nodes = [loss.grad_fn]
    for node in nodes:
        for after, _ in node.next_functions:
            if after is not None:
                if after not in waiting:
                    nodes.append(after)
                waiting[after] += 1
    gradients = defaultdict(dict)
    gradients[loss.grad_fn][0] = torch.empty_like(loss)
    ready = [loss.grad_fn]
    while ready:
        node = ready.pop()
        found = gradients.pop(node)
        if node.name().endswith("AccumulateGrad"):
            continue
        inputs = [found.get(i) for i in range(len(node._input_metadata))]
        call = getattr(node, "apply", node)
        outputs = call(*inputs)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        for (after, index), x in zip(node.next_functions, outputs):
            if after is None:
                continue
            sums = gradients[after]
            if x is not None:  # a sum over what forward expanded, as the engine does
                wanted = after._input_metadata[index]
                x = x.sum_to_size(wanted.shape).to(wanted.dtype)
                sums[index] = sums[index] + x if index in sums else x
            waiting[after] -= 1
            if not waiting[after]:
                ready.append(after)


class Ctc(torch.autograd.Function):
    @staticmethod
    def forward(ctx, log_probs):
        ctx.save_for_backward(log_probs)
        return log_probs.new_empty(log_probs.size(1))

    @staticmethod
    def backward(ctx, grad):
        (log_probs,) = ctx.saved_tensors
        return torch.empty_like(log_probs)


if __name__ == "__main__":
    import sys

    t = step(ModelOptions(**PRESETS["base"]), 48, 1000, 28, 4233, torch.bfloat16)
    total = Counter()
    for name, b in t.bytes.most_common():
        kind = (
            "products"
            if name.lstrip("_").startswith(PRODUCTS) or name.startswith(PRODUCTS)
            else "rest"
        )
        total[kind] += b
        total[kind + " n"] += t.launches[name]
        print(
            f"{kind:9} {name:45} {t.launches[name]:6} {b / 1e6:10.0f} MB {b / RATE * 1e3:7.2f} ms"
        )
        if len(sys.argv) > 1:
            for w, n in t.where[name].most_common(4):
                print("        ", f"{n / 1e6:.0f}", w)
    print(total, total["rest"] / RATE * 1e3)
