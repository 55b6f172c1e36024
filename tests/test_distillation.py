"""Distilled kernels: exactness, known orders, stable poles, honoured tolerances, refusals; and decoding with them."""

import numpy as np
import pytest
import torch

from effarch.decoding import BlockedConvolution, ChunkedPrefill, RingBuffer, StateSpaceDecoder
from effarch.distillation import (
    METHODS,
    Cut,
    Distilled,
    LowRank,
    S4DKernel,
    StateSpace,
    causal_conv,
    causal_conv_naive,
    distill,
    eliminate,
    hankel_method,
    hankel_product,
    hankel_svd,
    hankel_svd_naive,
    hankel_tail,
    input_gram,
    pack,
    prepare,
    refine,
    shift_poles,
    spare_poles,
)


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def planted(length=100, width=4):
    """Kernels of order exactly 4 after tap 0: two real poles and one complex pair."""
    t = torch.arange(length - 1)[:, None].double()
    tail = 0.9**t * normal(1, width, seed=1) - 0.5**t * normal(1, width, seed=2)
    return torch.cat([normal(1, width), tail + 0.97**t * torch.cos(0.3 * t + normal(1, width, seed=3))])


def shaken(width, order, seed=0):
    """An S4D kernel whose poles have left their regular places, as training moves them."""
    torch.manual_seed(seed)
    model = S4DKernel(width, order)
    with torch.no_grad():
        for parameter in (model.log_decay, model.frequency):
            parameter.mul_(1 + 0.05 * torch.randn_like(parameter)).add_(0.02 * torch.randn_like(parameter))
    return model


def relative(wrong, right):
    return ((wrong - right).norm() / right.norm()).item()


@pytest.mark.parametrize("shape", [(37, 3), (20, 3), (50, 3), (37, 3, 4), (1, 3)])
def test_convolution_equals_the_loop_and_is_causal(shape):
    x, k = normal(2, 37, 3), normal(*shape, seed=1)
    y = causal_conv(x, k)
    assert torch.allclose(y, causal_conv_naive(x, k), atol=1e-12)
    x[:, 20] += 1
    assert torch.allclose(causal_conv(x, k)[:, :20], y[:, :20], atol=1e-12)


@pytest.mark.parametrize("outputs", [1, 3])
def test_hankel_without_the_matrix(outputs):
    taps, Q = normal(2, outputs, 59), normal(2, 1, 30, 5, seed=1)
    assert torch.allclose(hankel_product(taps, Q), taps.unfold(-1, 30, 1) @ Q, atol=1e-10)
    t = torch.arange(599).double()
    taps = (normal(2, outputs, 599) * 1e-4 + 0.95**t + normal(2, outputs, 1, seed=2) * 0.8**t)
    exact, vectors = hankel_svd_naive(taps, 2)
    fast, found = hankel_svd(taps, 2)
    assert torch.allclose(exact, fast, rtol=1e-6)
    assert torch.allclose(vectors @ vectors.mT, found @ found.mT, atol=1e-3)
    full = hankel_svd_naive(taps)[0]
    assert torch.allclose(hankel_tail(taps, exact)[1], full[:, 2:].norm() / full.norm(), rtol=1e-6)


@pytest.mark.parametrize("method, rank", [("svd", 4), ("cut", 100), ("hankel", 4)])
def test_exact_at_full_rank(method, rank):
    form = distill(planted(), method, rank=rank)
    assert form.error < 1e-7 and torch.allclose(form(100), planted(), atol=1e-6)
    assert torch.allclose(form(30), planted()[:30], atol=1e-6), "a shorter sequence needs the first taps"


@pytest.mark.parametrize("method, rank", [("svd", 12), ("cut", 40)])
def test_dense_kernels_are_exact_at_full_rank(method, rank):
    kernel = normal(40, 3, 4)
    form = distill(kernel, method, rank=rank)
    assert form.error < 1e-12 and form(40).shape == kernel.shape


def test_cutting_keeps_the_first_taps():
    form = distill(planted(), "cut", rank=7)
    assert torch.equal(form(100)[:7], planted()[:7]) and not form(100)[7:].any() and torch.equal(form(5), planted()[:5])


@pytest.mark.parametrize("length", [1, 25, 40, 61])
def test_gram_matrix_weighs_errors_as_outputs_do(length):
    x, kernel = normal(3, length, 2), normal(40, 2, seed=1)
    lagged = torch.stack([torch.nn.functional.pad(x, (0, 0, i, 0))[:, :length] for i in range(40)]).flatten(1)
    assert torch.allclose(input_gram(x, 40), lagged @ lagged.T, atol=1e-10)
    energy = sum(kernel[:, d] @ input_gram(x[..., d:d + 1], 40) @ kernel[:, d] for d in range(2))
    assert torch.isclose(energy, causal_conv(x, kernel).square().sum())


def coloured(batch=2, length=80, width=1, seed=5):
    """Smooth inputs: a kernel's fast directions hardly reach the output."""
    return normal(batch, length, width, seed=seed).cumsum(1) / length**0.5


def output_error(form, kernel, x):
    return relative(causal_conv(x, form(len(kernel))), causal_conv(x, kernel))


@pytest.mark.parametrize("shape", [(48, 5), (48, 3, 4)])
def test_weighted_svd_is_exact_at_full_rank_whatever_the_inputs(shape):
    kernel = normal(*shape)
    full = min(48, kernel[0].numel())
    for x in (normal(2, 48, shape[1], seed=4), coloured(width=shape[1]), normal(2, 10, shape[1], seed=4)):
        form = distill(kernel, "weighted", rank=full, inputs=x)
        assert form.error < 1e-9 and form.kernel_error < 1e-9 and form(48).isfinite().all()


def test_weighted_svd_of_white_long_inputs_is_the_svd():
    kernel, x = planted(50, 3), normal(40, 2000, 3, seed=6)
    ours, plain = distill(kernel, "weighted", rank=2, inputs=x), distill(kernel, "svd", rank=2)
    assert (ours(50) - plain(50)).norm() < 0.02 * kernel.norm()
    assert ours.stored() == plain.stored() == 2 * (50 + 3)


@pytest.mark.parametrize("method", ["svd", "cut", "hankel"])
def test_a_form_has_as_many_taps_as_it_is_asked_for(method):
    form = distill(normal(64, 3), method, rank=3)
    assert [len(form(n)) for n in (10, 64, 100)] == [10, 64, 100]
    assert method == "hankel" or not form(100)[64:].any()


def test_weighted_svd_has_the_least_output_error():
    kernel, x = planted() + 0.1 * normal(100, 4, seed=9), coloured(length=150).repeat(1, 1, 4)  # all channels see the same
    fit, largest = prepare(kernel, "weighted", inputs=x)
    errors = [fit(rank).error for rank in range(1, largest + 1)]
    assert all(b <= a + 1e-9 for a, b in zip(errors, errors[1:], strict=False))
    for rank in (1, 2, 3):
        ours, plain = fit(rank), distill(kernel, "svd", rank=rank)
        assert ours.error == pytest.approx(output_error(ours, kernel, x), rel=1e-6)
        assert ours.error < output_error(plain, kernel, x)
        assert ours.kernel_error >= plain.kernel_error == plain.error, "each is the best in its own measure"


def test_the_error_of_weighted_is_that_of_the_outputs_whatever_the_channels_sizes():
    kernel, x = planted() + 0.1 * normal(100, 4, seed=9), coloured(width=4) * torch.tensor([0.01, 0.01, 0.01, 3.0])
    for rank in (1, 2, 4):
        form = distill(kernel, "weighted", rank=rank, inputs=x)
        assert form.error == pytest.approx(output_error(form, kernel, x), rel=1e-6)


@pytest.mark.parametrize("tolerance", [0.3, 0.05, 1e-3])
def test_weighted_tolerance_is_on_the_outputs(tolerance):
    kernel, x = planted() + 1e-5 * normal(100, 4, seed=9), coloured(length=150).repeat(1, 1, 4)
    form = distill(kernel, "weighted", tolerance=tolerance, inputs=x)
    assert output_error(form, kernel, x) <= tolerance * (1 + 1e-6)
    if form.rank > 1:
        assert distill(kernel, "weighted", rank=form.rank - 1, inputs=x).error > tolerance


@pytest.mark.parametrize("inputs, message", [
    (None, "inputs=None .*'weighted'"), (torch.ones(2, 30, 3), r"inputs=\(2, 30, 3\) .*\(B, T, 4\)"),
    (torch.ones(30, 4), r"inputs=\(30, 4\)"), (torch.full((2, 30, 4), float("nan")), "inputs='NaN"),
    (torch.zeros(2, 30, 4), "all zero"),
])
def test_weighted_refuses_unfit_inputs(inputs, message):
    with pytest.raises(ValueError, match=message):
        distill(planted(), "weighted", rank=1, inputs=inputs)


def test_more_noise_in_a_dense_kernel_is_what_resists_compression():
    clean = 0.9 ** torch.arange(64)[:, None, None].double() * normal(1, 8, 8, seed=1)
    left = [distill(clean + noise * normal(64, 8, 8, seed=2), "svd", rank=3).error for noise in (0.001, 0.01, 0.1)]
    assert left[0] < 0.12 * left[1] < 0.015 * left[2]


def test_a_dense_kernel_with_shared_poles_is_found():
    t = torch.arange(99)[:, None, None].double()
    kernel = torch.cat([normal(1, 3, 4), 0.9**t * normal(1, 3, 4, seed=1) + 0.6**t * normal(1, 3, 4, seed=2)])
    form = distill(kernel, "hankel", rank=2)
    assert form.error < 1e-7
    assert torch.allclose(form.log_poles().real.exp().sort().values, torch.tensor([0.6, 0.9]).double(), atol=1e-6)
    assert form.stored() == 2 + 3 * 12


@pytest.mark.parametrize("method", ["svd", "cut"])
def test_error_falls_with_the_rank(method):
    fit, largest = prepare(normal(48, 4), method)
    errors = [fit(rank).error for rank in range(1, largest + 1)]
    assert all(b <= a + 1e-12 for a, b in zip(errors, errors[1:], strict=False))


def test_hankel_error_falls_with_the_order_on_smooth_kernels():
    poles = torch.linspace(0.3, 0.98, 12).double()
    kernel = (poles ** torch.arange(200)[:, None].double() * normal(12)).sum(1, keepdim=True)
    fit, _ = prepare(kernel, "hankel")
    errors = [fit(n).error for n in (1, 2, 3, 4, 6, 8)]
    assert all(b < a for a, b in zip(errors, errors[1:], strict=False)) and errors[-1] < 1e-4


@pytest.mark.parametrize("method", ["svd", "cut", "hankel"])
@pytest.mark.parametrize("tolerance", [0.3, 0.05, 1e-3])
def test_tolerance_is_honoured_by_the_smallest_rank(method, tolerance):
    kernel = planted() + 1e-5 * normal(100, 4, seed=9)
    form = distill(kernel, method, tolerance=tolerance)
    measured = relative(form(100), kernel)
    assert measured <= tolerance * (1 + 1e-6) and form.error == pytest.approx(measured, abs=1e-9)
    if form.rank > 1:
        assert distill(kernel, method, rank=form.rank - 1).error > tolerance


def test_random_kernels_are_out_of_reach_and_say_so():
    with pytest.raises(ValueError, match="tolerance=0.01 .*'hankel'.*at least 0\\."):
        distill(normal(100, 2), "hankel", tolerance=0.01)


# S4D kernels have a known order. What the rounding of the taps hides no method can see, so the limits are a few times it


@pytest.mark.parametrize("length, seed", [(64, 0), (64, 1), (300, 0)])
@pytest.mark.parametrize("dtype, limit", [(torch.float32, 1e-4), (torch.float64, 5e-6)])
def test_kernels_of_order_n_come_back_at_order_n(length, seed, dtype, limit):
    kernel = shaken(12, 16, seed).to(dtype)(length).detach()
    fit, _ = prepare(kernel, "hankel")
    assert fit.predicted[15] < 2e-6, "the spectrum promises it"
    form = fit(16)
    assert form.kernel_error < limit and not form.note
    assert (form.log_poles().real <= 0).all()
    assert form(20 * length).abs().max() < 100 * kernel.abs().max(), "and it stays tame after the window"


def test_reflecting_the_poles_would_not_do():
    """The defect that walking in replaces: the taps of a stable kernel are fitted best by poles outside the circle."""
    kernel = shaken(12, 16)(64).detach().double()
    targets = kernel[1:].T[..., None].contiguous()
    S, V = hankel_svd(targets.mT[..., :63], 16)
    found = [shift_poles(v[:, :int((s > 5e-7 * s[0]).sum())]) for s, v in zip(S, V, strict=True)]
    error = lambda modes: (eliminate(*pack(modes), targets, 1e-7)[3].norm(dim=(1, 2)) / targets.norm(dim=(1, 2))).max().item()
    reflected = [(torch.complex(-log.real.abs(), log.imag), kind) for log, kind in found]
    assert max(log.real.max() for log, _ in found) > 1e-3, "some are outside"
    assert error(found) < 1e-5 and error(reflected) > 1e-3
    assert distill(kernel.float(), "hankel", rank=16).error < 1e-4


@pytest.mark.parametrize("seed", range(3))
def test_what_is_measured_holds_for_the_form_that_is_returned(seed):
    """Fits of noisy kernels must not lean on huge coefficients or angles that float32 cannot hold."""
    t = torch.arange(96.0)[:, None]
    kernel = 0.1 * (torch.exp(-t[:, None] / torch.tensor([3.0, 20.0, 60.0])[:, None]) * normal(3, 6, seed=seed).float()).sum(1)
    kernel += 0.02 * normal(96, 6, seed=seed + 10).float()
    form = distill(kernel, "hankel", rank=12)
    exact = hankel_method(kernel)[0](12)  # the same before it became float32
    assert form.log_poles().dtype == torch.complex64 and exact.log_poles().dtype == torch.complex128
    assert form.error == pytest.approx(relative(exact(96), kernel.double()), rel=0.02) and form.error < 0.7


def test_the_native_form_is_the_kernel():
    model = shaken(3, 8).double()
    space = model.native()
    assert torch.allclose(space(200), model(200).detach(), atol=1e-12)
    assert space.stored() == 3 * (8 + 8 + 1)


def test_refining_never_makes_a_fit_worse_and_keeps_the_bound():
    targets = normal(5, 60, 2)
    log, kind = pack([spare_poles(*shift_poles(torch.linalg.qr(normal(40, 3, seed=i))[0]), 6, 60) for i in range(5)])
    assert (kind.sum(1) == 6).all()
    inside = torch.complex(log.real.clamp_max(0), log.imag)
    before = eliminate(inside, kind, targets, 1e-9)[3].norm(dim=(1, 2))
    new, error = refine(log, kind, targets, 1e-9, torch.zeros_like(log.real))
    assert (error <= before + 1e-12).all() and (error < before - 1e-3).any() and (new.real <= 0).all()
    assert (new.imag.abs() <= torch.pi + 1e-12).all(), "an angle that ran away would be lost in float32"
    assert torch.allclose(error, eliminate(new, kind, targets, 1e-9)[3].norm(dim=(1, 2)))


def test_coefficients_are_the_least_squares_fit():
    log, kind = torch.complex(torch.tensor([[-0.1, -0.2]]), torch.tensor([[0.0, 0.5]])).to(torch.complex128), torch.tensor([[1, 2]])
    targets = normal(1, 30, 1)
    powers, span, c, left = eliminate(log, kind, targets, 1e-12)
    basis = torch.stack([powers[0, :, 0].real, powers[0, :, 1].real, -powers[0, :, 1].imag], 1)
    best = torch.linalg.lstsq(basis, targets[0]).solution
    assert torch.allclose(left[0, :30], targets[0] - basis @ best, atol=1e-10) and left[0, 30:].abs().max() < 1e-10
    assert torch.allclose((powers * c.mT).sum(2).real, (targets - left[:, :30])[..., 0], atol=1e-10)
    assert (span.mT @ left).abs().max() < 1e-10


def test_poles_are_stable_and_growth_is_never_silent():
    growing = 1.02 ** torch.arange(80.0)[:, None] * torch.ones(1, 2)
    with pytest.warns(UserWarning, match="halve the error of 2 of 2 kernels"):
        form = distill(growing, "hankel", rank=1)
    assert (form.log_poles().real <= 0).all() and form(10_000).isfinite().all()
    with pytest.raises(ValueError, match="unstable pole, .* = 1.02"):
        distill(growing, "hankel", rank=1, unstable="reject")
    noisy = prepare(normal(200, 3), "hankel")[0](16)
    assert (noisy.log_poles().real <= 0).all()
    assert distill(torch.ones(64, 1), "hankel", rank=1, unstable="reject").error < 1e-5, "a pole on the circle is no fault"


@pytest.mark.parametrize("change, message", [
    (dict(rank=0), "rank=0 .*at least 1"), (dict(rank=-2), "rank=-2"), (dict(rank=True), "rank=True"),
    (dict(rank=1.5), "rank=1.5"), (dict(rank=99), "rank=99 .*at most 4"), (dict(), "exactly one"),
    (dict(rank=1, tolerance=0.1), "exactly one"), (dict(tolerance=0.0), "tolerance=0.0"), (dict(tolerance=True), "tolerance=True"),
    (dict(tolerance=float("nan")), "tolerance=nan"), (dict(rank=1, method="fft"), "method='fft'.*hankel"),
    (dict(rank=1, unstable="ignore"), "unstable='ignore'"),
    (dict(rank=1, kernel=torch.full((10, 2), float("nan"))), "20 values that are NaN"),
    (dict(rank=1, kernel=torch.zeros(10, 2)), "all zero"), (dict(rank=1, kernel=torch.ones(10)), "kernel shape"),
    (dict(rank=1, kernel=torch.ones(3, 2)), "kernel shape"), (dict(rank=1, kernel=[[1.0]]), "kernel='list'.*torch.Tensor"),
    (dict(rank=1, kernel=torch.ones(10, 2, dtype=torch.long)), "kernel dtype"),
    (dict(rank=1, kernel=torch.ones(10, 2, dtype=torch.cfloat)), "kernel dtype"),
])
def test_refusals_name_the_parameter(change, message):
    call = dict(dict(kernel=planted(), method="svd"), **change)
    with pytest.raises(ValueError, match=message) as caught:
        distill(**call)
    assert "\n" not in str(caught.value)


ones, poles, both = torch.ones, torch.complex(-torch.ones(2, 3), torch.ones(2, 3)), torch.full((2, 3), 2)


@pytest.mark.parametrize("call, words", [
    (lambda: S4DKernel(0), "width=0"), (lambda: S4DKernel(2.5), "width=2.5"), (lambda: S4DKernel("a"), "width='a'"), (lambda: S4DKernel(4, 3), "order=3"),
    (lambda: Distilled(0), "Distilled=.0,."), (lambda: Distilled(), "Distilled="),
    (lambda: LowRank(0, 0), "time=0"), (lambda: LowRank(ones(4, 2), [1]), "rest=.1."), (lambda: LowRank(ones(4, 2).long(), ones(2, 3)), "time=.*int64"),
    (lambda: LowRank(ones(0, 2), ones(2, 3)), "time=.*0, 2"), (lambda: LowRank(ones(4, 2), ones(3, 5)), "time, rest="), (lambda: LowRank(ones(4), ones(4, 3)), "time, rest="),
    (lambda: Cut(0), "taps=0"), (lambda: Cut(ones(0, 3)), "taps="), (lambda: Cut(torch.tensor(1.0)), "taps="),
    (lambda: StateSpace(0, 0, 0, 0), "log_poles=0"), (lambda: StateSpace(poles.real, poles, both, ones(3)), "shapes="),
    (lambda: StateSpace(poles, poles[:1], both, ones(3)), "shapes="), (lambda: StateSpace(poles, poles, both[:1], ones(3)), "shapes="),
    (lambda: StateSpace(poles, poles, both, ones(4)), "shapes="), (lambda: StateSpace(poles, poles, 2, ones(3)), "shapes=")])
def test_what_no_kernel_can_be_made_of_is_one_line(call, words):
    with pytest.raises(ValueError, match=f"^{words}.* is not allowed; allowed: ") as caught:
        call()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("form", [S4DKernel(3, 4), LowRank(ones(4, 2), ones(2, 3)), Cut(ones(4, 3)), StateSpace(poles, poles, both, ones(3))],
                         ids=lambda form: type(form).__name__)
def test_a_kernel_is_as_long_as_it_is_asked_to_be_and_no_other_length_is_taken(form):
    assert all(form(length).shape == (length, 3) for length in (1, 3, 9))
    for wrong in (0, -1, 2.5, "3", None):
        with pytest.raises(ValueError, match=f"length={wrong!r} is not allowed; allowed: a whole number of at least 1"):
            form(wrong)


@pytest.mark.parametrize("method, rank", [("svd", 2), ("cut", 10), ("hankel", 3)])
def test_forms_keep_the_type_and_can_be_fine_tuned(method, rank):
    kernel = planted().float()
    target = 1.1 * kernel  # distilled forms are at an optimum for the kernel itself
    form = distill(kernel, method, rank=rank)
    assert form(100).dtype == torch.float32 and not form(100).is_complex()
    before = (form(100) - target).square().sum()
    before.backward()
    with torch.no_grad():
        for parameter in form.parameters():
            assert parameter.grad is not None and parameter.grad.isfinite().all()
            parameter -= 1e-5 * parameter.grad
    assert (form(100) - target).square().sum() < before


def test_stored_numbers():
    kernel = planted()
    assert distill(kernel, "svd", rank=2).stored() == 2 * (100 + 4)
    assert distill(kernel, "cut", rank=7).stored() == 7 * 4
    assert distill(kernel, "hankel", rank=4).stored() == 4 * (2 * 4 + 1), "order n: 2n + 1 a channel"
    assert distill(normal(50, 3, 4), "svd", rank=2).stored() == 2 * (50 + 12)


def test_a_method_of_your_own_is_known_by_its_name(monkeypatch):
    monkeypatch.setitem(METHODS, "whole", lambda kernel, unstable=None: METHODS["cut"](kernel))
    assert distill(planted(), "whole", rank=100).error == 0


def test_every_decoder_equals_the_convolution():
    kernel, x = planted(48, 6).float(), normal(131, 6, dtype=torch.float32)
    space, native = distill(kernel, "hankel", rank=4), shaken(6, 8).native()
    cases = [(RingBuffer(kernel, 4), kernel), (RingBuffer(kernel, 100), kernel), (BlockedConvolution(kernel, 7), kernel),
             (BlockedConvolution(kernel, 48), kernel), (StateSpaceDecoder(space), space(131)), (StateSpaceDecoder(native), native(131))]
    with torch.no_grad():
        for decoder, k in cases:
            y = torch.stack([decoder.step(row) for row in x])  # no two outputs share memory
            assert torch.allclose(y, causal_conv(x[None], k)[0], atol=1e-4), type(decoder).__name__


def test_a_decoder_is_of_the_form_as_it_was():
    form, x = distill(planted(48, 3), "hankel", rank=4), normal(9, 3)
    decoder, wanted = StateSpaceDecoder(form), causal_conv(x[None], form(9))[0].detach()
    with torch.no_grad():
        for parameter in form.parameters():
            parameter.add_(0.1)
    torch.testing.assert_close(torch.stack([decoder.step(row) for row in x]), wanted)


def test_a_row_of_another_shape_is_refused_by_every_decoder():
    """A batch of rows, or one number for all channels, would be broadcast to a wrong answer."""
    kernel = planted(48, 3).float()
    for decoder in (RingBuffer(kernel), BlockedConvolution(kernel, 8), StateSpaceDecoder(distill(kernel, "hankel", rank=4))):
        for shape in ((1, 3), (1,), (3, 1), (4,), ()):
            with pytest.raises(ValueError, match=r"x=.* is not allowed; allowed: \(3,\)"):
                decoder.step(torch.ones(shape))


def test_lengths_that_do_not_fit_are_one_clear_line():
    kernel = planted(48, 3)
    for block in (0, 49):
        with pytest.raises(ValueError, match=f"block={block} is not allowed; allowed: 1 to 48"):
            BlockedConvolution(kernel, block)
    for x in (normal(3, 100), normal(3, 0), normal(4, 64), normal(64)):
        with pytest.raises(ValueError, match=r"\(3, T\) with T a multiple of chunk=32"):
            ChunkedPrefill(distill(kernel, "hankel", rank=4), 32)(x)


@pytest.mark.parametrize("kernel, method", [(normal(64, 3, 3), "hankel"), (normal(64, 1, 1), "hankel"), (normal(64, 3), "svd")])
def test_forms_without_poles_of_each_channel_are_refused(kernel, method):
    form = distill(kernel, method, rank=3)
    for decoder in (StateSpaceDecoder, ChunkedPrefill):
        with pytest.raises(ValueError, match=f"form=.'{type(form).__name__}'.*a StateSpace of a kernel"):
            decoder(form)


def test_kernels_that_mix_channels_and_parts_of_blocks_are_refused():
    for make in (RingBuffer, lambda kernel: BlockedConvolution(kernel, 4)):
        with pytest.raises(ValueError, match=r"kernel.shape=\(16, 3, 3\).*\(L, D\)"):
            make(normal(16, 3, 3))
    for block in (2.5, True):
        with pytest.raises(ValueError, match=f"block={block}"):
            BlockedConvolution(normal(16, 3), block)
    kernel, x = normal(16, 3).requires_grad_(), normal(3)
    assert torch.allclose(RingBuffer(kernel).step(x), kernel[0] * x)


@pytest.mark.parametrize("kind", [np.float32, np.float64, float])
def test_a_tolerance_may_be_numpys(kind):
    form = distill(planted(), "svd", tolerance=kind(0.1))
    assert form.error <= 0.1 and form.rank == distill(planted(), "svd", tolerance=0.1).rank


@pytest.mark.parametrize("chunk", [4, 16, 96])
def test_chunked_prefill_hands_its_state_over(chunk):
    space, x = distill(planted(48, 3), "hankel", rank=4), normal(130, 3)
    with torch.no_grad():
        head, state = ChunkedPrefill(space, chunk)(x[:96].T.contiguous())
        decoder = StateSpaceDecoder(space)
        decoder.real, decoder.imag = state.real.clone(), state.imag.clone()
        y = torch.cat([head.T, torch.stack([decoder.step(row) for row in x[96:]])])
        assert torch.allclose(y, causal_conv(x[None], space(130))[0], atol=1e-8)


@pytest.mark.parametrize("seed, length, decay, tolerance", [(101, 22, 10, 0.195), (18, 16, 8, 0.1443), (3, 24, 6, 0.1)])
def test_the_smallest_state_space_that_is_good_enough_is_found(seed, length, decay, tolerance):
    torch.manual_seed(seed)
    kernel = (torch.randn(length, 2) * torch.exp(-torch.arange(length) / decay)[:, None]).double()
    errors = {rank: distill(kernel, "hankel", rank=rank).error for rank in range(1, length // 2)}
    right = next((rank for rank, error in errors.items() if error <= tolerance), None)
    if right is None:
        with pytest.raises(ValueError, match="tolerance"):
            distill(kernel, "hankel", tolerance=tolerance)
    else:
        assert distill(kernel, "hankel", tolerance=tolerance).rank == right


def test_whole_numbers_are_no_signal():
    with pytest.raises(ValueError, match="floating-point"):
        RingBuffer(torch.full((2, 2), 0.5)).step(torch.tensor([3, 5]))
