"""Counts what a training step launches on a GPU, and the bytes that move: python -m tools.traffic

No GPU is needed: the step runs on fake tensors, which have shapes and a device but no memory. The
bytes, at an H100's 3.35 TB/s, are a lower bound of the time. `products` are matrix products,
convolutions that mix channels and attention. With --no-triton torch's operations take the place of
fused.py's kernels. The kernels of CTC itself and the optimizer's are not counted.
"""

import json
import math
from collections import Counter, defaultdict
from unittest import mock

from cli import build, make_parser, option, options_class, run

import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fused
from conformer import U2Conformer
from presets import PRESETS, ModelOptions

RATE = 3.35e9  # bytes a millisecond
ATTENTION = "_scaled_dot_product_efficient_attention"
PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "convolution", ATTENTION)
# These launch nothing. The fake tensors do not tell that a reshape is a view.
FREE = ("empty", "new_empty", "empty_like", "_unsafe_view", "detach", "alias", "lift_fresh")


@options_class
class TrafficOptions:
    preset: str = option("base", "sizes of the model", choices=tuple(PRESETS))
    rows: int = option(48, "utterances", at_least=1, at_most=10**5)
    frames: int = option(1000, "feature frames of each", at_least=7, at_most=10**6)
    labels: int = option(28, "labels of each", at_least=1, at_most=10**5)
    vocab_size: int = option(4233, "tokens", at_least=4, at_most=10**6)
    triton: bool = option(True, "count the kernels of fused.py")
    json: bool = option(False, "print one JSON object")


class Traffic(TorchDispatchMode):
    """Counts launches and bytes by an operation's name; `moved` has [launches, bytes]."""

    def __init__(self):
        super().__init__()
        self.moved = defaultdict(lambda: [0, 0])

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        y = op(*args, **(kwargs or {}))
        name = op._schema.name.split("::")[1]
        if op.namespace not in ("aten", "u2") or op.is_view or name in FREE:
            return y
        inputs = args
        if name.startswith("convolution"):
            forward = name == "convolution"
            # ATen adds the bias of cuDNN's convolution, and sums its gradient, in another kernel.
            if args[2] is not None if forward else args[-1][2]:
                self.count("bias of " + name, [y, y] if forward else [args[0]])
            name = "depthwise " + name if args[-1 if forward else -2] > 1 else name
        elif name.startswith("new_") or name.endswith("_like"):
            inputs = ()
        elif name in ("gather", "scatter_"):  # few numbers of the first
            inputs = args[1:]
        self.count(name, tree_leaves((inputs, kwargs, y)))
        return y

    def count(self, name, tensors) -> None:
        tensors = [x for x in tensors if isinstance(x, torch.Tensor) and x.device.type == "cuda"]
        if tensors:
            self.moved[name][0] += 1
            self.moved[name][1] += sum(map(touched, tensors))


def touched(x) -> int:
    """Returns the bytes of a tensor. An expanded dimension has its numbers once."""
    return math.prod(n for n, stride in zip(x.shape, x.stride()) if stride) * x.element_size()


def main(argv):
    options = build(TrafficOptions, vars(make_parser(__doc__, TrafficOptions).parse_args(argv)))
    net = U2Conformer(ModelOptions(**PRESETS[options.preset]), 80, options.vocab_size, 0, 2, 3)
    moved, _ = step(net, options)
    table = [
        dict(name=name, product=name in PRODUCTS or name[:-9] in PRODUCTS, launches=n, bytes=b)
        for name, (n, b) in sorted(moved.items(), key=lambda item: -item[1][1])
    ]
    for line in () if options.json else table:
        print("{launches:6} x {name:48} {0:9.0f} MB".format(line["bytes"] / 1e6, **line))
    result = {"table": table} if options.json else {}
    for kind, product in (("products", True), ("rest", False)):
        lines = [line for line in table if line["product"] == product]
        result[f"{kind}_launches"] = sum(line["launches"] for line in lines)
        result[f"{kind}_mb"] = round(sum(line["bytes"] for line in lines) / 1e6)
        result[f"{kind}_ms"] = round(sum(line["bytes"] for line in lines) / RATE, 2)
    print(json.dumps(result))


def pretend_on_gpu(net) -> None:
    """Gives a module parameters and buffers without memory that claim to be on a GPU.

    FakeTensorMode must be on.
    """
    for module in net.modules():
        for values in (module._parameters, module._buffers):
            for name, x in values.items():
                if x is not None:
                    trained = isinstance(x, torch.nn.Parameter)
                    x = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cuda")
                    values[name] = torch.nn.Parameter(x) if trained else x


def step(net, options):
    """Runs forward and backward in bfloat16 -> what moved, the gradients' shapes of the weights."""
    net.train()
    shape = options.rows, options.labels
    with (
        mock.patch("kernels.proven", lambda *_: fused if options.triton else None),
        mock.patch.object(F, "scaled_dot_product_attention", attention),
        mock.patch.object(F, "ctc_loss", lambda log_probs, *_, **__: Ctc.apply(log_probs)),
        FakeTensorMode(),
    ):
        pretend_on_gpu(net)
        features = torch.empty(options.rows, options.frames, 80, device="cuda")
        labels = torch.empty(shape, dtype=torch.long, device="cuda")
        lengths = torch.empty(options.rows, dtype=torch.long, device="cuda")
        with Traffic() as traffic:
            with autocast_to_bfloat16():
                loss = net.loss(features, lengths, labels, lengths)["loss"]
            found = gradients(loss)
    return dict(traffic.moved), {name: found.get(id(p)) for name, p in net.named_parameters()}


class autocast_to_bfloat16:
    """Turns autocast on where torch.autocast would see that there is no GPU."""

    def __enter__(self):
        torch.set_autocast_dtype("cuda", torch.bfloat16)
        torch.set_autocast_enabled("cuda", True)

    def __exit__(self, *_):
        torch.set_autocast_enabled("cuda", False)
        torch.clear_autocast_cache()


class Ctc(torch.autograd.Function):
    """Stands for CTC's loss, whose lengths are numbers and not fake."""

    @staticmethod
    def forward(ctx, log_probs):
        ctx.save_for_backward(log_probs)
        return log_probs.new_empty(log_probs.size(1))

    @staticmethod
    def backward(ctx, grad):
        return torch.empty_like(ctx.saved_tensors[0])


def attention(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None):
    """Does what torch does on a GPU for its memory-efficient attention."""
    q, k, v = (x.to(torch.bfloat16) for x in (q, k, v))
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            attn_mask = torch.where(attn_mask, q.new_zeros(()), q.new_zeros(()))
        if any(stride % 8 for stride in attn_mask.stride()[:-1]):
            size = attn_mask.size(-1)
            attn_mask = F.pad(attn_mask, (0, 8 - size % 8))[..., :size]
        attn_mask = attn_mask.to(q.dtype).expand(*q.shape[:3], k.size(2))
    attend = torch.ops.aten._scaled_dot_product_efficient_attention
    return attend(q, k, v, attn_mask, True, dropout_p, is_causal, scale=scale)[0]


@torch.no_grad()
def gradients(loss) -> dict:
    """Calls the nodes of loss's graph -> the gradients by id of the weight.

    Autograd's own engine asks a GPU's driver.
    """
    waiting, nodes = Counter(), [loss.grad_fn]
    for node in nodes:
        for after, _ in node.next_functions:
            if after is not None:
                if after not in waiting:
                    nodes.append(after)
                waiting[after] += 1
    sums, found, ready = defaultdict(dict), {}, [loss.grad_fn]
    sums[loss.grad_fn][0] = torch.empty_like(loss)
    while ready:
        node = ready.pop()
        given = sums.pop(node, {})
        if hasattr(node, "variable"):
            found[id(node.variable)] = given.get(0)
            continue
        by_python = hasattr(node, "needs_input_grad")  # with one for each argument
        call = node.apply if by_python else node
        made = call(*(given.get(i) for i in range(len(node._input_metadata))))
        made = made if isinstance(made, tuple) else (made,)
        wants = node.needs_input_grad if by_python else [f for f, _ in node.next_functions]
        made = [x for x, wanted in zip(made, wants) if wanted]
        for (after, index), x in zip((f for f in node.next_functions if f[0]), made, strict=True):
            if x is not None:  # as the engine does, a sum over what forward expanded
                wanted = after._input_metadata[index]
                x = x.sum_to_size(wanted.shape).to(wanted.dtype)
                old = sums[after].get(index)
                sums[after][index] = x if old is None else old + x
            waiting[after] -= 1
            if not waiting[after]:
                ready.append(after)
    return found


if __name__ == "__main__":
    run(main)
