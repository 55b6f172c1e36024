"""What a GPU would stumble over, found without one: every timed method runs on tensors that only claim to be on "cuda"
(FakeTensorMode). A tensor on the wrong device raises there, a value that the program reads raises, and copies between
the devices are counted: each would make the GPU wait."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import CLIPConfig, CLIPModel

from effarch import multirate
from effarch.bench import compare
from effarch.bench.timing import status_of
from effarch.decoding import BlockedConvolution, ChunkedPrefill, RingBuffer, StateSpaceDecoder
from effarch.distillation import S4DKernel, causal_conv
from effarch.multirate_scan import DynamicBlock, MultiRateBlock
from effarch.scans import AttentionLayer, Mamba2Block, MambaBlock, s6, ssd
from effarch.scans.scan import random_s6, random_ssd
from effarch.token_reduction import REDUCERS, encode_images, reducer_for_budget
from effarch.token_reduction.merging import checkered_order
from effarch.token_reduction.selection import dither, uniform

CUDA = torch.device("cuda")


class Crossings(TorchDispatchMode):
    """Notes every operation whose tensors are on different devices before and after it."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        places = {v.device.type for v in tree_leaves((args, kwargs, out)) if isinstance(v, torch.Tensor) and v.dim()}
        if len(places) > 1:
            self.found.append(str(func))
        return out


def on_a_gpu(build):
    """build() → (call, inputs) on fake CUDA tensors; runs call(*inputs): (output, operations that crossed the devices)."""
    with FakeTensorMode():
        with CUDA:
            call, inputs = build()
        with Crossings() as crossings, torch.no_grad():
            out = call(*inputs)
    return out, crossings.found


def ends_on_the_gpu(build):
    out, crossed = on_a_gpu(build)
    assert all(v.is_cuda for v in tree_leaves(out) if isinstance(v, torch.Tensor))
    assert crossed == []


@pytest.fixture
def unread(monkeypatch):
    """As while a CUDA graph is captured: the scans look at no value."""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)


def sample(steps=50, width=16):
    return torch.randn(2, steps, width)


def steps_of(block, width=16):
    """One step after a short prefill."""
    return lambda x: block.step(x[:, 0], block(x)[1])


SCANS = {
    "s6": lambda: (s6, random_s6(70, dtype=torch.float32)),
    "ssd": lambda: (ssd, random_ssd(70, dtype=torch.float32)),
    "Mamba": lambda: (MambaBlock(16), [sample()]),
    "Mamba-2": lambda: (Mamba2Block(16, 4, 8), [sample()]),
    "attention": lambda: (AttentionLayer(16, 4), [sample()]),
    "several rates": lambda: (MultiRateBlock(16, 4, 8, 8, 2, 4), [sample()]),
    "every 4th token": lambda: (DynamicBlock(16, Mamba2Block(16, 4, 8), choose="stride"), [sample()]),
    "Mamba, a step": lambda: (steps_of(MambaBlock(16)), [sample()]),
    "Mamba-2, a step": lambda: (steps_of(Mamba2Block(16, 4, 8)), [sample()]),
}


@pytest.mark.parametrize("name", SCANS)
def test_scans_stay_on_the_gpu(name, unread):
    def build():
        call, inputs = SCANS[name]()
        return call, [v.to(CUDA) for v in inputs]

    ends_on_the_gpu(build)


LAYERS = {"Baseline": (multirate.Baseline, 7), "GatedBaseline": (multirate.GatedBaseline, 7), "MRSS": (multirate.MRSS, 7, 4),
          "SplitMRSS": (multirate.SplitMRSS, 7, 4, 0.75), "LowRankBaseline": (multirate.LowRankBaseline, 7, 2),
          "DilatedTwin": (multirate.DilatedTwin, 7, 4, 0.75)}


@pytest.mark.parametrize("form", multirate.CONV_FORMS)
@pytest.mark.parametrize("name", LAYERS)
def test_layers_stay_on_the_gpu(name, form):
    kind, *options = LAYERS[name]
    ends_on_the_gpu(lambda: (multirate.with_form(kind(16, *options), form), [sample()]))


@pytest.mark.parametrize("form", multirate.CONV_FORMS)
@pytest.mark.parametrize("name", LAYERS)
def test_gradients_need_shapes_only(name, form):
    kind, *options = LAYERS[name]
    layer = multirate.with_form(kind(16, *options), form).to("meta")  # a backward pass on fake CUDA tensors needs a driver
    layer(sample().to("meta")).sum().backward()
    assert all(p.grad.is_meta for p in layer.parameters())


@pytest.fixture(autouse=True)
def nothing_kept():
    """Fake tensors must not stay in the caches."""
    kept = (uniform, dither, checkered_order)
    for cache in kept:
        cache.cache_clear()
    yield
    for cache in kept:
        cache.cache_clear()


def decoded(decoder):
    return lambda x: [decoder.step(x) for _ in range(5)][-1]


DECODERS = {
    "ring buffer": lambda: (decoded(RingBuffer(torch.randn(32, 6))), [torch.randn(6)]),
    "blocks": lambda: (decoded(BlockedConvolution(torch.randn(32, 6), 4)), [torch.randn(6)]),
    "state space": lambda: (decoded(StateSpaceDecoder(S4DKernel(6, 8).native())), [torch.randn(6)]),
    "prompt in chunks": lambda: (ChunkedPrefill(S4DKernel(6, 8).native(), 16), [torch.randn(6, 64)]),
    "a kernel as a state space": lambda: ((lambda kernel: lambda x: kernel.native()(len(x)))(S4DKernel(6, 8)), [torch.randn(16)]),
    "convolution": lambda: (causal_conv, [torch.randn(2, 40, 6), torch.randn(40, 6)]),
}


@pytest.mark.parametrize("name", DECODERS)
def test_decoders_stay_on_the_gpu(name):
    ends_on_the_gpu(DECODERS[name])


SMALL = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4, image_size=64, patch_size=16)


def clip():
    text = {k: v for k, v in SMALL.items() if k not in ("image_size", "patch_size")}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=SMALL, projection_dim=16)).eval()


@pytest.fixture(scope="module")
def reducers():
    """Every method at 70 % of the multiply-adds, fitted on a CPU."""
    model = clip()
    return {name: reducer_for_budget(name, 0.7, model) for name in REDUCERS}


@pytest.mark.parametrize("name", REDUCERS)
def test_reducers_stay_on_the_gpu(name, reducers):
    def build():
        model = clip()

        def encode(x):
            encode_images(model, x, reducers[name])  # orders and draws are sent to a device once
            return encode_images(model, x, reducers[name])

        return encode, [torch.randn(2, 3, 64, 64)]

    out, crossed = on_a_gpu(build)
    assert out.is_cuda and len(crossed) <= 1  # that once


def test_what_crosses_the_devices_or_reads_a_value_is_found():
    assert on_a_gpu(lambda: (lambda x: x + torch.ones(3).to(x.device), [torch.ones(3)]))[1]
    with pytest.raises(Exception, match="_local_scalar_dense"):
        on_a_gpu(lambda: (lambda x: x * float(x.sum()), [torch.ones(3)]))
    with pytest.raises(RuntimeError, match="device"):
        on_a_gpu(lambda: (lambda x: x + torch.ones(3), [torch.ones(3)]))


class Reads(TorchDispatchMode):
    """Counts the values that a program looks at: on a GPU each of them waits for all that was asked before."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += "_local_scalar_dense" in str(func)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("scan, inputs", [(s6, random_s6), (ssd, random_ssd)])
def test_a_scan_looks_at_two_values_at_most_however_long_it_is(scan, inputs):
    counts = []
    for length in (50, 5000):
        given = inputs(length, dtype=torch.float32)
        with Reads() as reads:
            scan(*given)
        counts.append(reads.count)
    assert counts[0] == counts[1] <= 2


def test_out_of_memory_is_a_row_and_the_others_go_on():
    def full():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB")

    rows = compare({"fits": lambda: torch.ones(2).sum(), "does not": full}, rounds=2)
    assert rows["does not"]["status"] == "oom" and rows["fits"]["status"] == "ok" and len(rows["fits"]["raw_ms"]) == 2
    assert status_of(RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")) == "oom"
