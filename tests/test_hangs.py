"""Nothing hangs: every preset and odd widths run in every precision over many shapes.

They run in a process that has a deadline.
"""

import multiprocessing

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from conformer import U2Conformer
from presets import PRESETS, ModelOptions

WIDTHS = {
    name: {**preset, "num_blocks": 1, "decoder_num_blocks": 1, "r_num_blocks": 1}
    for name, preset in PRESETS.items()
}
WIDTHS |= {
    str(width): {
        **WIDTHS["small"],
        "output_size": width,
        "cnn_module_kernel": kernel,
        "causal": kernel % 2 == 0,
    }
    for width, kernel in ((36, 8), (80, 31), (100, 16), (208, 15))
}
# Rows and encoder frames (with the convolution's past) that have hung in bfloat16, at width 144 and
# with a kernel of 15, which are those of preset small.
HUNG = ((7, 62), (13, 292), (11, 204), (13, 48))
PRECISIONS = {"32": None, "bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
DEADLINE = 300  # seconds; ten to twenty suffice


def network(name):
    torch.manual_seed(0)
    return U2Conformer(ModelOptions(**WIDTHS[name]), 80, 30, 0, 2, 3)


def learn(net, rows, frames):
    """Runs forward and backward over `frames` encoder frames, fewer in half of the rows."""
    features, labels = torch.randn(rows, 4 * frames + 3, 80), torch.randint(4, 30, (rows, 5))
    lengths = torch.full((rows,), features.size(1))
    lengths[: rows // 2] = 40
    net.loss(features, lengths, labels, torch.full((rows,), 5))["loss"].backward()


def hear(net, rows, frames):
    """Encodes as a validation does, as scoring does under a chunk mask, and as a stream."""
    features = torch.randn(rows, 4 * frames + 3, 80)
    with torch.no_grad():
        net.encode(features, torch.full((rows,), features.size(1)))
        net.encode(features, torch.full((rows,), features.size(1)), 16, 4)
        if net.options.causal:
            net.encoder.stream(features[:1], net.encoder.stream_state(16, 4), last=True)


def pass_block(net, rows, frames):
    """Runs a block alone, which takes a tenth of the time: forward, then forward and backward."""
    block = net.encoder.blocks[0]
    x = torch.randn(rows, frames, net.options.output_size, requires_grad=True)
    inputs = x[:1], torch.ones(1, 1, frames, frames, dtype=torch.bool), torch.ones(rows, frames, 1)
    with torch.no_grad():
        block(x, *inputs)
    block(x, *inputs)[0].sum().backward()


def shapes(count, most_rows, most_frames):
    generator = torch.Generator().manual_seed(1)

    def draw(most):
        return int(torch.randint(1, most + 1, (), generator=generator))

    return [(draw(most_rows), draw(most_frames)) for _ in range(count)]


def run_all(name, precision):
    dtype = PRECISIONS[precision]
    net = network(name)
    with torch.autocast("cpu", dtype, enabled=dtype is not None):
        for rows, frames in shapes(3, 6, 40):
            learn(net.train(), rows, frames)
            hear(net.eval(), rows, frames)
        sizes = shapes(4, 16, 100)
        if name == "small":
            sizes = [(rows, size - 14) for rows, size in HUNG] + sizes
        for rows, frames in sizes:
            pass_block(net, rows, frames)


# On a CPU Lightning makes bf16-mixed of 16-mixed.
@pytest.mark.parametrize("precision", ["32", "bf16-mixed"])
def test_no_width_hangs_in_any_precision(precision, tmp_path):
    """It runs in a process of its own: a hang within oneDNN cannot be ended from within."""
    begun = tmp_path / "begun"

    def body():
        for name in WIDTHS:
            begun.write_text(name)
            run_all(name, precision)

    child = multiprocessing.get_context("fork").Process(target=body)
    child.start()
    child.join(DEADLINE)
    if child.is_alive():
        child.kill()
        child.join()
        pytest.fail(f"width {begun.read_text()} hangs in {precision}")
    assert child.exitcode == 0


class Convolutions(TorchDispatchMode):
    """Notes the numbers of every depthwise convolution, forward and backward."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if (
            "convolution" in function.__name__
            and max(argument for argument in args if type(argument) is int) > 1
        ):
            self.seen += [argument.dtype for argument in args if isinstance(argument, torch.Tensor)]
        return function(*args, **kwargs or {})


# The widths share the code that chooses a type; the last of these is not causal.
@pytest.mark.parametrize("name", ["small", "36", "80"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_depthwise_convolution_is_in_float32_on_a_cpu(name, precision):
    """In bfloat16 it hangs on some CPUs only, so the test above may never see a hang."""
    dtype, net, convolutions = PRECISIONS[precision], network(name), Convolutions()
    with torch.autocast("cpu", dtype, enabled=dtype is not None), convolutions:
        learn(net, 2, 10)
    assert len(convolutions.seen) > 4 and set(convolutions.seen) == {torch.float32}
