"""Properties of the distilled kernels: exactness, monotone error, stable poles, honoured tolerances, refusals, decoding."""


import pytest
import torch
from conftest import ROOT

from lab.notebooks import definitions

NOTEBOOK = ROOT / "ssm/kernel_distillation.ipynb"


@pytest.fixture(scope="module")
def nb():
    """The notebook's definitions."""
    return definitions(NOTEBOOK)


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def planted(length=100, width=4):
    """Kernels of order exactly 4 after tap 0: two real poles and one complex pair."""
    t = torch.arange(length - 1)[:, None].double()
    tail = 0.9**t * normal(1, width, seed=1) - 0.5**t * normal(1, width, seed=2)
    return torch.cat([normal(1, width), tail + 0.97**t * torch.cos(0.3 * t + normal(1, width, seed=3))])


@pytest.mark.parametrize("shape", [(37, 3), (20, 3), (50, 3), (37, 3, 4), (1, 3)])
def test_convolution_equals_the_loop_and_is_causal(nb, shape):
    x, k = normal(2, 37, 3), normal(*shape, seed=1)
    y = nb["causal_conv"](x, k)
    assert torch.allclose(y, nb["causal_conv_naive"](x, k), atol=1e-12)
    x[:, 20] += 1
    assert torch.allclose(nb["causal_conv"](x, k)[:, :20], y[:, :20], atol=1e-12)


@pytest.mark.parametrize("outputs", [1, 3])
def test_hankel_without_the_matrix(nb, outputs):
    taps, Q = normal(2, outputs, 59), normal(2, 1, 30, 5, seed=1)
    assert torch.allclose(nb["hankel_product"](taps, Q), taps.unfold(-1, 30, 1) @ Q, atol=1e-10)
    t = torch.arange(599).double()
    taps = (normal(2, outputs, 599) * 1e-4 + 0.95**t + normal(2, outputs, 1, seed=2) * 0.8**t)
    exact, vectors = nb["hankel_svd_naive"](taps, 2)
    fast, found = nb["hankel_svd"](taps, 2)
    assert torch.allclose(exact, fast, rtol=1e-6)
    assert torch.allclose(vectors @ vectors.mT, found @ found.mT, atol=1e-3)
    full = nb["hankel_svd_naive"](taps)[0]
    tail = full[:, 2:].norm() / full.norm()
    assert torch.allclose(nb["hankel_tail"](taps, exact)[1], tail, rtol=1e-6)


@pytest.mark.parametrize("method, rank", [("svd", 4), ("taps", 100), ("blocks", 7), ("hankel", 4)])
def test_exact_at_full_rank(nb, method, rank):
    form = nb["distill"](planted(), method, rank=rank)
    assert form.error < 1e-7 and torch.allclose(form(100), planted(), atol=1e-6)
    assert torch.allclose(form(30), planted()[:30], atol=1e-6), "a shorter sequence needs the first taps"


@pytest.mark.parametrize("method, rank", [("svd", 12), ("tucker", 12), ("taps", 40), ("blocks", 3)])
def test_dense_kernels_are_exact_at_full_rank(nb, method, rank):
    kernel = normal(40, 3, 4)
    assert nb["distill"](kernel, method, rank=rank).error < 1e-12


@pytest.mark.parametrize("length", [1, 25, 40, 61])
def test_gram_matrix_equals_its_definition(nb, length):
    x = normal(3, length, 2)
    assert torch.allclose(nb["input_gram"](x, 40), nb["input_gram_naive"](x, 40), atol=1e-10)
    kernel = normal(40, 2)
    energy = sum((kernel[:, d] @ nb["input_gram"](x[..., d:d + 1], 40) @ kernel[:, d]) for d in range(2))
    assert torch.isclose(energy, nb["causal_conv"](x, kernel).square().sum()), "it weighs errors as outputs do"


def coloured(batch=2, length=80, width=1, seed=5):
    """Smooth inputs: a kernel's fast directions hardly reach the output."""
    return normal(batch, length, width, seed=seed).cumsum(1) / length**0.5


def relative_output_error(nb, form, kernel, x):
    y = nb["causal_conv"](x, kernel)
    return ((nb["causal_conv"](x, form(len(kernel))) - y).norm() / y.norm()).item()


@pytest.mark.parametrize("shape", [(48, 5), (48, 3, 4)])
def test_weighted_svd_is_exact_at_full_rank_whatever_the_inputs(nb, shape):
    kernel = normal(*shape)
    full = min(48, kernel[0].numel())
    for x in (normal(2, 48, shape[1], seed=4), coloured(width=shape[1]), normal(2, 10, shape[1], seed=4)):
        form = nb["distill"](kernel, "weighted", rank=full, inputs=x)
        assert form.error < 1e-9 and form.kernel_error < 1e-9 and form(48).isfinite().all()


def test_weighted_svd_of_white_long_inputs_is_the_svd(nb):
    kernel, x = planted(50, 3), normal(40, 2000, 3, seed=6)
    ours, plain = nb["distill"](kernel, "weighted", rank=2, inputs=x), nb["distill"](kernel, "svd", rank=2)
    assert (ours(50) - plain(50)).norm() < 0.02 * kernel.norm()
    assert ours.stored() == plain.stored() == 2 * (50 + 3)


def test_weighted_svd_has_the_least_output_error(nb):
    kernel, x = planted() + 0.1 * normal(100, 4, seed=9), coloured(length=150).repeat(1, 1, 4)  # every channel sees the same
    fit, largest = nb["prepare"](kernel, "weighted", inputs=x)
    errors = [fit(rank).error for rank in range(1, largest + 1)]
    assert all(b <= a + 1e-9 for a, b in zip(errors, errors[1:], strict=False))
    for rank in (1, 2, 3):
        ours, plain = fit(rank), nb["distill"](kernel, "svd", rank=rank)
        assert ours.error == pytest.approx(relative_output_error(nb, ours, kernel, x), rel=1e-6)
        assert ours.error < relative_output_error(nb, plain, kernel, x)
        assert ours.kernel_error >= plain.kernel_error == plain.error, "each is the best in its own measure"


@pytest.mark.parametrize("tolerance", [0.3, 0.05, 1e-3])
def test_weighted_tolerance_is_on_the_outputs(nb, tolerance):
    kernel, x = planted() + 1e-5 * normal(100, 4, seed=9), coloured(length=150).repeat(1, 1, 4)
    form = nb["distill"](kernel, "weighted", tolerance=tolerance, inputs=x)
    assert relative_output_error(nb, form, kernel, x) <= tolerance * (1 + 1e-6)
    if form.rank > 1:
        assert nb["distill"](kernel, "weighted", rank=form.rank - 1, inputs=x).error > tolerance


@pytest.mark.parametrize("inputs, message", [
    (None, "inputs=None .*'weighted'"), (torch.ones(2, 30, 3), r"inputs=\(2, 30, 3\) .*\(B, T, 4\)"),
    (torch.ones(30, 4), r"inputs=\(30, 4\)"), (torch.full((2, 30, 4), float("nan")), "inputs='NaN"),
    (torch.zeros(2, 30, 4), "all zero"),
])
def test_weighted_refuses_unfit_inputs(nb, inputs, message):
    with pytest.raises(ValueError, match=message):
        nb["distill"](planted(), "weighted", rank=1, inputs=inputs)


def test_more_noise_in_a_dense_kernel_is_what_resists_compression(nb):
    """The finding of the notebook: what is left after a tenth of the numbers follows the noise, not the filter."""
    clean = 0.9 ** torch.arange(64)[:, None, None].double() * normal(1, 8, 8, seed=1)
    left = [nb["distill"](clean + noise * normal(64, 8, 8, seed=2), "svd", rank=3).error for noise in (0.001, 0.01, 0.1)]
    assert left[0] < 0.12 * left[1] < 0.015 * left[2]


def test_a_dense_kernel_with_shared_poles_is_found(nb):
    t = torch.arange(99)[:, None, None].double()
    kernel = torch.cat([normal(1, 3, 4), 0.9**t * normal(1, 3, 4, seed=1) + 0.6**t * normal(1, 3, 4, seed=2)])
    form = nb["distill"](kernel, "hankel", rank=2)
    assert form.error < 1e-7
    assert torch.allclose(form.poles().abs().sort().values, torch.tensor([0.6, 0.9]).double(), atol=1e-6)
    assert form.stored() == 2 + 3 * 12


@pytest.mark.parametrize("method", ["svd", "taps", "blocks", "tucker"])
def test_error_falls_with_the_rank(nb, method):
    kernel = normal(48, 4, 3) if method == "tucker" else normal(48, 4)
    fit, largest = nb["prepare"](kernel, method)
    errors = [fit(rank).error for rank in range(1, largest + 1)]
    assert all(b <= a + 1e-12 for a, b in zip(errors, errors[1:], strict=False))


def test_hankel_error_falls_with_the_order_on_smooth_kernels(nb):
    poles = torch.linspace(0.3, 0.98, 12).double()
    kernel = (poles ** torch.arange(200)[:, None].double() * normal(12)).sum(1, keepdim=True)
    fit, _ = nb["prepare"](kernel, "hankel")
    errors = [fit(n).error for n in (1, 2, 3, 4, 6, 8)]
    assert all(b < a for a, b in zip(errors, errors[1:], strict=False)) and errors[-1] < 1e-4


@pytest.mark.parametrize("method", ["svd", "taps", "blocks", "hankel"])
@pytest.mark.parametrize("tolerance", [0.3, 0.05, 1e-3])
def test_tolerance_is_honoured_by_the_smallest_rank(nb, method, tolerance):
    kernel = planted() + 1e-5 * normal(100, 4, seed=9)
    form = nb["distill"](kernel, method, tolerance=tolerance)
    measured = ((form(100) - kernel).norm() / kernel.norm()).item()
    assert measured <= tolerance * (1 + 1e-6) and form.error == pytest.approx(measured, abs=1e-9)
    if form.rank > 1:
        assert nb["distill"](kernel, method, rank=form.rank - 1).error > tolerance


def test_random_kernels_are_out_of_reach_and_say_so(nb):
    with pytest.raises(ValueError, match="tolerance=0.01 .*'hankel'.*at least 0\\."):
        nb["distill"](normal(200, 2), "hankel", tolerance=0.01)


def test_poles_are_stable_and_never_silently_so(nb):
    growing = 1.02 ** torch.arange(80.0)[:, None] * torch.ones(1, 2)
    with pytest.warns(UserWarning, match="2 unstable poles mended"):
        form = nb["distill"](growing, "hankel", rank=1)
    assert (form.poles().abs() < 1).all() and form(10_000).isfinite().all()
    with pytest.raises(ValueError, match="unstable pole"):
        nb["distill"](growing, "hankel", rank=1, unstable="reject")
    noisy = nb["prepare"](normal(200, 3), "hankel")[0](16)
    assert (noisy.poles().abs() <= 1).all()
    constant = nb["distill"](torch.ones(64, 1), "hankel", rank=1)
    assert constant.error < 1e-5, "a pole on the circle is neither unstable nor a fault"


@pytest.mark.parametrize("change, message", [
    (dict(rank=0), "rank=0 .*at least 1"), (dict(rank=-2), "rank=-2"), (dict(rank=True), "rank=True"),
    (dict(rank=1.5), "rank=1.5"), (dict(rank=99), "rank=99 .*at most 4"), (dict(), "exactly one"),
    (dict(rank=1, tolerance=0.1), "exactly one"), (dict(tolerance=0.0), "tolerance=0.0"),
    (dict(tolerance=float("nan")), "tolerance=nan"), (dict(rank=1, method="fft"), "method='fft'.*hankel"),
    (dict(rank=1, unstable="ignore"), "unstable='ignore'"), (dict(rank=1, method="tucker"), "tucker"),
    (dict(rank=1, kernel=torch.full((10, 2), float("nan"))), "20 values that are NaN"),
    (dict(rank=1, kernel=torch.zeros(10, 2)), "all zero"), (dict(rank=1, kernel=torch.ones(10)), "kernel shape"),
    (dict(rank=1, kernel=torch.ones(3, 2)), "kernel shape"), (dict(rank=1, kernel=[[1.0]]), "kernel='list'.*torch.Tensor"),
    (dict(rank=1, kernel=torch.ones(10, 2, dtype=torch.long)), "kernel dtype"),
    (dict(rank=1, kernel=torch.ones(10, 2, dtype=torch.cfloat)), "kernel dtype"),
])
def test_refusals_name_the_parameter(nb, change, message):
    call = dict(dict(kernel=planted(), method="svd"), **change)
    with pytest.raises(ValueError, match=message) as caught:
        nb["distill"](**call)
    assert "\n" not in str(caught.value)


def test_forms_keep_the_type_and_can_be_fine_tuned(nb):
    kernel = planted().float()
    target = 1.1 * kernel  # distilled forms are at an optimum for the kernel itself
    for method, rank in (("svd", 2), ("taps", 10), ("blocks", 2), ("hankel", 3)):
        form = nb["distill"](kernel, method, rank=rank)
        assert form(100).dtype == torch.float32 and not form(100).is_complex()
        before = (form(100) - target).square().sum()
        before.backward()
        with torch.no_grad():
            for parameter in form.parameters():
                assert parameter.grad is not None and parameter.grad.isfinite().all()
                parameter -= 1e-5 * parameter.grad
        assert (form(100) - target).square().sum() < before


def test_stored_numbers(nb):
    kernel = planted()
    assert nb["distill"](kernel, "svd", rank=2).stored() == 2 * (100 + 4)
    assert nb["distill"](kernel, "taps", rank=7).stored() == 2 * 7 * 4
    assert nb["distill"](kernel, "blocks", rank=2).stored() == 2 * 4 * (16 + 1)
    assert nb["distill"](kernel, "hankel", rank=4).stored() == 4 * (2 * 4 + 1), "order n: 2n + 1 a channel"
    assert nb["distill"](normal(50, 3, 4), "svd", rank=2).stored() == 2 * (50 + 12)


def test_every_decoder_equals_the_convolution(nb):
    kernel, x = planted(48, 6).float(), normal(131, 6, dtype=torch.float32)
    space, sparse, low = (nb["distill"](kernel, m, rank=r) for m, r in (("hankel", 4), ("taps", 9), ("svd", 2)))
    cases = [(nb["RingBuffer"](kernel, 4), kernel), (nb["MatmulRing"](kernel), kernel),
             (nb["BlockedConvolution"](kernel, 7), kernel), (nb["BlockedConvolution"](kernel, 48), kernel),
             (nb["StateSpaceDecoder"](space), space(131)), (nb["SparseDecoder"](sparse), sparse(48)),
             (nb["LowRankDecoder"](low), low(48))]
    with torch.no_grad():
        for decoder, k in cases:
            y = torch.stack([decoder.step(row).clone() for row in x])
            assert torch.allclose(y, nb["causal_conv"](x[None], k)[0], atol=1e-4), type(decoder).__name__


@pytest.mark.parametrize("chunk", [4, 16, 96])
def test_chunked_prefill_hands_its_state_over(nb, chunk):
    space, x = nb["distill"](planted(48, 3), "hankel", rank=4), normal(130, 3)
    with torch.no_grad():
        head, state = nb["ChunkedPrefill"](space, chunk)(x[:96].T.contiguous())
        decoder = nb["StateSpaceDecoder"](space)
        decoder.real, decoder.imag = state.real.clone(), state.imag.clone()
        y = torch.cat([head.T, torch.stack([decoder.step(row) for row in x[96:]])])
        assert torch.allclose(y, nb["causal_conv"](x[None], space(130))[0], atol=1e-8)


def test_projection_keeps_low_order_kernels_and_shrinks_others(nb):
    low = planted()[:, :2].float()
    kept, Q = nb["project_hankel"](low, 4)
    for _ in range(3):
        kept, Q = nb["project_hankel"](kept, 4, Q)
    assert torch.allclose(kept, low, atol=1e-3)
    kernel = low + 0.05 * normal(100, 2, dtype=torch.float32)
    projected, _ = nb["project_hankel"](kernel, 4)
    assert (projected - kernel).norm() < 0.6 * kernel.norm()
    assert nb["distill"](projected, "hankel", rank=4).error < 1e-3 < nb["distill"](kernel, "hankel", rank=4).error
    dense = nb["project_low_rank"](normal(50, 3, 4, dtype=torch.float32), 2)
    assert torch.linalg.matrix_rank(dense.flatten(1), rtol=1e-4) == 2


def test_s4d_kernel_is_a_state_space_of_its_order(nb):
    torch.manual_seed(0)
    kernel = nb["S4DKernel"](3, order=8)(256).detach().double()
    assert nb["distill"](kernel, "hankel", rank=8).error < 1e-4


def test_training_lowers_the_error(nb):
    task = nb["FilterTask"](nb["averages"](64, 32)[:, None], batch=4)
    model = nb["new_model"]("timescales", "free", 0, 64, 64, 8, 4)
    before = nb["task_error"](model, task)
    nb["train"](model, task, 40, 3e-3, 0)
    assert nb["task_error"](model, task) < before
    forms = [nb["distill"](k, "svd", rank=8) for k in nb["taps_of"](model, "timescales", 64, 64)]
    assert nb["task_error"](nb["swapped"](model, forms), task) == pytest.approx(nb["task_error"](model, task), rel=1e-3)
    kernels = nb["taps_of"](model, "timescales", 64, 64)
    with torch.no_grad():
        seen, new = (model.layer_inputs(task.batch(torch.Generator().manual_seed(s))[0]) for s in (7, 8))
    ours, plain = ([nb["distill"](k, m, rank=2, inputs=x) for k, x in zip(kernels, seen, strict=True)]
                   for m in ("weighted", "svd"))
    assert nb["output_error"](kernels, ours, new) < nb["output_error"](kernels, plain, new), "on inputs it has not seen, too"
