"""Replays the network as CUDA graphs, one for each shape of a batch, so that the GPU does not wait.

A step launches thousands of small kernels, and the CPU launches them more slowly than the GPU runs
them. A CUDA graph launches all of them at once, but always with the same shapes and in the same
memory. So a graph needs shapes that repeat (sampler.py). CTC stays outside, because its kernel asks
for lengths on the CPU. See torch's notes "CUDA semantics", partial-network capture.
"""

import contextlib
import functools
from collections import Counter

from cli import UserError

import torch
from torch import nn

EAGER_STEPS = 1  # steps of a shape without a graph: a shape that comes once is not worth one
MOST_GRAPHS = 64  # each keeps a copy of all gradients, 193 MB with preset base


class ButCtc(nn.Module):
    """Holds the weights that U2Conformer.but_ctc uses: a graph takes those of a module."""

    def __init__(self, net):
        super().__init__()
        self.encoder = net.encoder
        self.decoder = net.decoder
        self.right_decoder = net.right_decoder
        self.work = net.but_ctc

    def forward(self, *inputs):
        self.outputs = self.work(*inputs)
        return self.outputs


class Graphs:
    """Takes the place of U2Conformer.but_ctc in training, and makes a graph for each shape.

    A shape runs without a graph at first, and later, too, where MOST_GRAPHS are made or the memory
    has no room for one more. Numbers and random draws are those of a step without a graph.
    """

    def __init__(self, net):
        self.net = net
        self.seen = Counter()  # steps without a graph, by shape
        self.made = {}  # graphs by shape
        self.full = False  # no more graphs: asking for memory at each step would take long
        self.pool = None  # all graphs take their memory from one pool, because one runs at a time

    def __call__(self, *inputs):
        shape = tuple(tensor.shape for tensor in inputs)
        if shape not in self.made:
            self.seen[shape] += 1
            self.full = self.full or self.seen[shape] > EAGER_STEPS and not self.room(inputs[0])
            if self.full or self.seen[shape] <= EAGER_STEPS:
                return self.plain(*inputs)
            self.pool = self.pool or torch.cuda.graph_pool_handle()
            try:
                self.made[shape] = capture(self.net, inputs, self.pool)
            except RuntimeError as error:  # torch cannot go on after it: streams stay capturing
                first = (str(error).splitlines() or [type(error).__name__])[0]
                raise UserError(
                    f"a CUDA graph cannot be captured ({first}); --cuda_graphs off trains without"
                ) from error
        return self.made[shape](*inputs)

    def plain(self, *inputs):
        """Runs without a graph, but as one will be made, so that nothing is compiled twice."""
        with without_cache():
            return self.net.but_ctc(*inputs)

    def room(self, like) -> bool:
        """Returns whether there may be one more graph on the device of `like`.

        Besides the graphs a step without one must still fit. The first graph takes as much memory
        as such a step, the others share most of it.
        """
        if len(self.made) >= MOST_GRAPHS:
            return False
        torch.cuda.empty_cache()
        free, _ = torch.cuda.mem_get_info(like.device)
        return free > torch.cuda.max_memory_allocated(like.device) * (1 if self.made else 2)


def capture(net, inputs, pool):
    """Captures net.but_ctc, forward and backward, for the shapes of `inputs` -> a callable.

    Random numbers and batch norm's statistics stay as they were.
    """
    module = ButCtc(net)
    kept = [(buffer, buffer.clone()) for buffer in net.buffers()]
    device = inputs[0].device
    forked = torch.random.fork_rng([device] if device.type == "cuda" else [])
    with forked, without_cache(), other_threads_go_on():
        graph = torch.cuda.make_graphed_callables(
            module,
            tuple(tensor.clone() for tensor in inputs),
            num_warmup_iters=1,
            allow_unused_input=True,
            pool=pool,
        )
    # The graph keeps its outputs. With them autograd would keep a node for each parameter, whose
    # gradient would then wait, in every later step, for the stream of this capture.
    for output in module.outputs:
        output.detach_()
    with torch.no_grad():
        for buffer, before in kept:
            buffer.copy_(before)
    return graph


def without_cache():
    """Switches autocast's cache off: a cached cast of a weight would lie in one graph's memory."""
    return torch.autocast(
        "cuda",
        dtype=torch.get_autocast_dtype("cuda"),
        enabled=torch.is_autocast_enabled("cuda"),
        cache_enabled=False,
    )


@contextlib.contextmanager
def other_threads_go_on():
    """Lets other threads use the GPU during a capture.

    By default a capture fails where the loader's thread pins memory. make_graphed_callables has no
    argument for this mode. (A subclass of torch.cuda.graph would capture on a stream of its own,
    and a pool shares memory among the graphs of one stream alone.)
    """
    original = torch.cuda.graph
    torch.cuda.graph = functools.partial(original, capture_error_mode="thread_local")
    try:
        yield
    finally:
        torch.cuda.graph = original
