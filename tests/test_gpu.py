"""What training on a GPU relies on, as far as a CPU can tell: CUDA graphs, and few waits.

tools/gpu_check.py checks the rest on a card.
"""

from contextlib import contextmanager
from types import SimpleNamespace

from cli import UserError

import pytest
import torch
from pytorch_lightning.accelerators import CUDAAccelerator
from pytorch_lightning.strategies import DDPStrategy, SingleDeviceStrategy
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader

import conformer
import graphs
import kernels
import train
from datamodule import Batch, SpeechDataModule
from helpers import TINY, TWO_BLOCKS, VARIANTS, json_lines, same
from helpers_model import quiet_trainer, tiny_model
from helpers_train import make_data, run
from model import OptimOptions, place_steps
from recovery import Average, pairs_by_kind
from tokenizer import train_char

TOKENIZER = train_char(["abcdefgh"])
SHAPES = ((2, 60, 3), (2, 92, 4))  # rows, frames, labels


def batches(order, poison=()):
    """A batch for each of SHAPES in `order`; those numbered in `poison` have a NaN in row 1."""
    generator = torch.Generator().manual_seed(0)
    for number, shape in enumerate(order):
        rows, frames, labels = SHAPES[shape]
        features = torch.randn(rows, frames, 80, generator=generator)
        if number in poison:
            features[1, 3, 3] = torch.nan
        yield Batch(
            features,
            torch.tensor([frames, frames - 9]),
            torch.randint(4, 12, (rows, labels), generator=generator),
            torch.tensor([labels, labels - 1]),
            torch.arange(rows) + number * rows,
        )


def make(tmp_path=None, options=TINY, cuda_graphs=True):
    return tiny_model(
        TOKENIZER,
        options,
        optim=OptimOptions(warmup_steps=2),
        total_steps=20,
        skip_log=tmp_path and str(tmp_path / "skipped.jsonl"),
        cuda_graphs=cuda_graphs,
    )


# ---- CUDA graphs


class Replay(torch.autograd.Function):
    """Does what torch's graphed callables do: everything lies in memory that is used again."""

    @staticmethod
    def forward(ctx, graph, count, *tensors):
        for static, given in zip(graph.inputs, tensors[:count]):
            static.copy_(given)
        with torch.enable_grad():
            outputs = graph.work(*graph.inputs)
        ctx.graph, ctx.outputs = graph, outputs
        return tuple(output.detach() for output in outputs)

    @staticmethod
    def backward(ctx, *grads):
        graph = ctx.graph
        found = torch.autograd.grad(ctx.outputs, graph.parameters, grads, allow_unused=True)
        if graph.grads is None:
            graph.grads = [grad if grad is None else grad.clone() for grad in found]
        for static, grad in zip(graph.grads, found):
            if static is not None:
                static.copy_(grad)
        nothing = (None,) * (2 + len(graph.inputs))
        return *nothing, *(grad if grad is None else grad.detach() for grad in graph.grads)


def static_callables(module, inputs, **_):
    """Takes the place of torch.cuda.make_graphed_callables, which warms up before it captures."""
    torch.rand(7)
    module(*inputs)
    graph = SimpleNamespace(
        work=module, inputs=inputs, parameters=list(module.parameters()), grads=None
    )
    return lambda *given: Replay.apply(graph, len(inputs), *given, *graph.parameters)


@pytest.fixture
def graphs_on_a_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "make_graphed_callables", static_callables)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", object)
    monkeypatch.setattr(graphs.Graphs, "room", lambda self, like: True)


def trained(model, order, poison=(), **options):
    trainer = quiet_trainer(Average(0.9), **options)
    loader = DataLoader(list(batches(order, poison)), batch_size=None)
    trainer.fit(model, train_dataloaders=loader)
    return [
        *model.state_dict().values(),
        *trainer.callbacks[0]._average_model.state_dict().values(),
    ]


@pytest.mark.parametrize("name, accumulate", [("default", 1), ("batch_norm", 3), ("techniques", 3)])
def test_a_run_with_graphs_is_the_run_without(graphs_on_a_cpu, monkeypatch, name, accumulate):
    """Dropout, chunks, accumulation, the average and batch norm's statistics are all in it."""
    techniques = dict(num_blocks=2, interctc_weight=0.3, stochastic_depth=0.5)
    variants = {"default": {}, "techniques": techniques, **VARIANTS}
    options = type(TINY)(**{**vars(TINY), **variants[name]})
    runs = []
    for eager_steps in (1, 100):
        monkeypatch.setattr(graphs, "EAGER_STEPS", eager_steps)
        model = make(options=options)
        order = [0, 1, 0, 0, 0, 1, 1, 0, 0]
        runs.append(trained(model, order, accumulate_grad_batches=accumulate))
        assert len(model.graphs.made) == (len(SHAPES) if eager_steps == 1 else 0)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*runs, strict=True))


def test_the_losses_are_those_of_a_network_without_graphs():
    model = make()
    model.net.eval()
    batch = next(batches([1]))[:4]
    for ours, theirs in zip(
        model.net.loss(*batch, 4, 1, but_ctc=model.graphs.plain).values(),
        model.net.loss(*batch, 4, 1).values(),
    ):
        torch.testing.assert_close(ours, theirs)


def test_the_guard_sees_through_a_graph(graphs_on_a_cpu, tmp_path):
    model = make(tmp_path)
    before = [value.clone() for value in model.state_dict().values()]
    trained(model, [0] * 5, poison=(3,))
    (skip,) = json_lines(tmp_path / "skipped.jsonl")
    assert skip["rows_with_nonfinite_loss"] == [7]
    assert all(value.isfinite().all() for value in model.state_dict().values())
    assert not same(before, list(model.state_dict().values()))


def test_a_shape_runs_without_a_graph_first_and_where_there_is_no_room(monkeypatch):
    made = []

    def capture(net, inputs, pool):
        made.append(pool)
        return lambda *inputs: "made"

    monkeypatch.setattr(graphs, "capture", capture)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "pool")
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 100)
    monkeypatch.setattr(graphs, "MOST_GRAPHS", 3)
    free = [0]
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free[0], 0))
    net = SimpleNamespace(but_ctc=lambda *inputs: "plain")
    runner = graphs.Graphs(net)

    def made_of(size):
        """What a shape's steps give, up to the first that may have a graph."""
        return [runner(torch.zeros(size)) for _ in range(graphs.EAGER_STEPS + 1)]

    eager = ["plain"] * graphs.EAGER_STEPS
    free[0] = 150  # one step fits, but not the first graph and a step
    assert made_of(1) == [*eager, "plain"]
    free[0] = 1000
    assert runner(torch.zeros(1)) == "plain"  # it is not asked again
    runner = graphs.Graphs(net)
    free[0] = 250
    assert made_of(1) == [*eager, "made"] and runner(torch.zeros(1)) == "made"
    free[0] = 150  # the second graph shares the memory of the first
    assert [made_of(size)[-1] for size in (2, 3, 4)] == ["made", "made", "plain"]
    assert made == ["pool"] * 3


def test_a_capture_that_fails_says_how_to_train_without(graphs_on_a_cpu, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("CUDA error: not permitted\nCompile with ...")

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", fail)
    with pytest.raises(UserError, match=r"\(CUDA error: not permitted\); --cuda_graphs off"):
        trained(make(), [0] * 3)


def test_steps_with_and_without_a_graph_run_alike_for_the_compiler(monkeypatch):
    """It compiles anew for another state of autocast's cache."""
    states = []

    class Net(torch.nn.Module):
        encoder = decoder = right_decoder = None

        def but_ctc(self, *inputs):
            states.append(torch.is_autocast_cache_enabled())
            return ()

    def call_once(module, inputs, **_):
        return module(*inputs)

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", call_once)
    inputs = (torch.zeros(2),)
    graphs.Graphs(Net()).plain(*inputs)
    graphs.capture(Net(), inputs, None)
    assert states == [False, False] and torch.is_autocast_cache_enabled()


def test_a_capture_leaves_random_numbers_statistics_and_autograd_as_they_were(monkeypatch):
    monkeypatch.setattr(torch.cuda, "make_graphed_callables", static_callables)
    options = type(TINY)(**{**vars(TINY), **VARIANTS["batch_norm"]})
    net = make(options=options).net.train()
    before = [buffer.clone() for buffer in net.buffers()]
    features, lengths, labels, label_lengths, _ = next(batches([0]))
    seen = torch.ones(14, 14, dtype=torch.bool)
    work, outputs = net.but_ctc, []
    net.but_ctc = lambda *inputs: outputs.append(work(*inputs)) or outputs[-1]
    torch.manual_seed(3)
    graphs.capture(net, (features, lengths, labels, label_lengths, seen), None)
    drawn = torch.rand(3)
    torch.manual_seed(3)
    assert torch.equal(drawn, torch.rand(3))
    assert all(map(torch.equal, before, net.buffers()))
    # Nor does the graph keep a node of autograd's for a parameter.
    assert outputs and not any(output.requires_grad for output in outputs[-1])


def test_other_threads_may_use_the_gpu_during_a_capture(monkeypatch):
    modes = []

    class Graph:
        def __init__(self, graph, pool=None, stream=None, capture_error_mode="global"):
            modes.append(capture_error_mode)

    monkeypatch.setattr(torch.cuda, "graph", Graph)
    with graphs.other_threads_go_on():
        within = torch.cuda.graph(None, pool=None)
    torch.cuda.graph(None)
    assert modes == ["thread_local", "global"]
    assert type(within) is Graph  # its class keeps the stream on which all graphs share memory


# ---- Waits


class Waits(TorchDispatchMode):
    """Refuses copies between a pretended GPU and the CPU for which the CPU waits.

    (FakeTensorMode itself refuses to read a number from a tensor.)
    """

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function is torch.ops.aten._to_copy.default:
            devices = args[0].device.type, result.device.type
            assert devices != ("cuda", "cpu"), "a copy from the GPU"
            assert devices != ("cpu", "cuda") or kwargs.get("non_blocking"), "a copy that waits"
        return result


@contextmanager
def pretended_step(monkeypatch, options=TWO_BLOCKS):
    """Yields a model that pretends to be on a GPU, a batch of it, and a list of what was read."""
    reads = []

    def read(tensor):
        reads.append(tensor.numel())
        return [1.0, -0.0, *range(2, tensor.numel())]

    def ctc(log_probs, labels, lengths, label_lengths, *_, **__):
        assert lengths.device.type == label_lengths.device.type == "cpu"
        return log_probs.sum((0, 2))

    # Triton's kernels cannot run here, but their shapes can.
    fused = pytest.importorskip("fused")
    from tools.traffic import pretend_on_gpu

    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)  # CUDA pins it
    monkeypatch.setattr(kernels, "proven", lambda *_: fused)
    model = make(options=options, cuda_graphs=False).train()
    batch = next(batches([0]))
    monkeypatch.setattr(FakeTensor, "tolist", read)
    monkeypatch.setattr(conformer.F, "ctc_loss", ctc)
    # Its random numbers are drawn on the CPU, from which FakeTensorMode lets nobody read either.
    monkeypatch.setattr("model.draw_chunk", lambda size, options: (4, 1))
    with FakeTensorMode(allow_non_fake_inputs=True), Waits():
        pretend_on_gpu(model)
        yield model, batch, reads


def test_a_step_waits_for_the_gpu_once(monkeypatch):
    """One of a single process, and the next as if there were two."""
    reduced = []
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda *_, op=None: reduced.append(op))
    logged = {}
    with pretended_step(monkeypatch) as (model, batch, reads):
        trainer = SimpleNamespace(
            world_size=1, accumulate_grad_batches=1, current_epoch=0, global_step=1
        )
        monkeypatch.setattr(type(model), "trainer", trainer, raising=False)
        monkeypatch.setattr(model, "log", lambda name, value, **_: logged.update({name: value}))
        monkeypatch.setattr(type(model), "device", torch.device("cuda"), raising=False)
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        average = Average(0.9)
        count = torch.ones((), dtype=torch.int64, device="cuda")
        average._average_model = SimpleNamespace(
            module=model, n_averaged=count, multi_avg_fn=get_ema_multi_avg_fn(0.9)
        )
        average.pairs = pairs_by_kind(model, model)
        average.begun = True  # only the first update looks whether there is an average
        batch = batch._replace(
            features=torch.empty(batch.features.shape, device="cuda"),
            labels=torch.zeros(batch.labels.shape, dtype=torch.int64, device="cuda"),
        )
        for trainer.world_size in (1, 2):
            assert model.training_step(batch, 0).device.type == "cuda"
            for parameter in model.parameters():  # torch cannot go backward without a real GPU
                parameter.grad = torch.empty_like(parameter)
            model.on_before_optimizer_step(optimizer)
            model.configure_gradient_clipping(optimizer, 5.0)
            optimizer.step()
            optimizer.zero_grad()
            average.update(model)
            model.window = []
    model.log_losses(2)
    assert reads == [6, 6] and reduced
    assert {value.device.type for value in logged.values()} == {"cpu"}
    assert logged["loss"] == 2.0 and logged["train_loss_att"] == 4.0


@pytest.mark.parametrize("fused", [True, False])
def test_the_counters_of_updates_lie_where_the_optimizer_reads_them(fused):
    """They lie elsewhere after --resume with another --precision, which decides about `fused`."""
    with FakeTensorMode():
        weight = torch.nn.Parameter(torch.empty(2, device="cuda"))
        optimizer = torch.optim.AdamW([weight], fused=fused)
        optimizer.state[weight]["step"] = torch.ones((), device="cpu" if fused else "cuda")
        place_steps(optimizer)
    assert optimizer.state[weight]["step"].device.type == ("cuda" if fused else "cpu")


def test_lengths_and_rows_stay_on_the_cpu():
    batch = next(batches([0]))
    moved = SpeechDataModule.transfer_batch_to_device(None, batch, torch.device("meta"), 0)
    assert {name for name, value in moved._asdict().items() if value.is_meta} == {
        "features",
        "labels",
    }
    assert moved.feature_lengths is batch.feature_lengths


# ---- Flags


@pytest.mark.parametrize("flag", ["--cuda_graphs on", "--tf32", "--no-tf32", "--no-triton"])
def test_flags_of_a_gpu_are_refused_on_a_cpu(tmp_path, flag):
    data = make_data(tmp_path / "data")
    with pytest.raises(UserError, match=rf"{flag.split()[0]}.* GPU"):
        run(data, tmp_path / "run", *flag.split())
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "ranks, options, reason",
    [
        (1, {}, ""),
        (2, {}, "one process alone"),
        (1, {"gradient_checkpointing": True}, "--gradient_checkpointing"),
        (1, {"few_shapes": "off"}, "--few_shapes on"),
    ],
)
def test_a_run_without_graphs_knows_why(ranks, options, reason):
    strategy = SingleDeviceStrategy("cpu") if ranks == 1 else DDPStrategy()
    options = dict(options)
    few_shapes = options.pop("few_shapes", "on")
    trainer = SimpleNamespace(strategy=strategy)
    found = train.no_graphs(trainer, OptimOptions(**options), few_shapes)
    assert (reason in found) if reason else not found


@pytest.mark.parametrize("tf32", [True, False])
def test_a_run_on_a_gpu_says_how_it_computes(monkeypatch, tf32):
    set_to = []
    monkeypatch.setattr(torch, "set_float32_matmul_precision", set_to.append)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", not tf32)
    monkeypatch.setattr(kernels, "TRITON", None)
    said = []
    monkeypatch.setattr(train, "rank_zero_info", said.append)
    trainer = SimpleNamespace(accelerator=CUDAAccelerator(), strategy=SingleDeviceStrategy("cpu"))
    settings = SimpleNamespace(run=SimpleNamespace(tf32=tf32), optim=OptimOptions(triton=tf32))
    assert train.prepare_gpu(trainer, {}, settings, "on")
    assert set_to == ["high" if tf32 else "highest"]
    assert torch.backends.cudnn.allow_tf32 is kernels.TRITON is tf32
    assert ("in TF32" in said[0]) is ("fused kernels" in said[0]) is tf32
    assert not train.prepare_gpu(trainer, {}, settings, "off")
    assert "CUDA graphs off (they need shapes that repeat" in said[1]
