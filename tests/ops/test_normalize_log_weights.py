import math

import pytest
import torch
from fake_device import DEVICE, FakeDevice

from flowfast.ops.normalize_log_weights import MAX_PARTICLES, exp_nonpositive, log_positive, reference

INF, NAN = math.inf, math.nan


def outputs(log_weights):
    return [
        torch.full(shape, 7, dtype=log_weights.dtype) for shape in (log_weights.shape, *[log_weights.shape[:1]] * 2)
    ]


def normalize(log_weights):
    result = outputs(log_weights)
    torch.ops.flowfast.normalize_log_weights(log_weights, *result)
    return result


@pytest.mark.parametrize("dtype, rtol", [(torch.float32, 1.3e-7), (torch.float64, 1e-11)])
@pytest.mark.parametrize("n", [1, 2, 41, 1023, 1024])
def test_matches_softmax(backend, n, dtype, rtol):
    log_weights = 20 * torch.randn(9, n, dtype=dtype, generator=torch.Generator().manual_seed(n))
    weights, ess, log_normalizer = normalize(log_weights)
    exact = log_weights.double()
    softmax = exact.softmax(1)
    close = {"rtol": rtol, "atol": 1e-40, "check_dtype": False}
    torch.testing.assert_close(weights, softmax, **close)
    torch.testing.assert_close(ess, 1 / (softmax**2).sum(1), **close)
    torch.testing.assert_close(log_normalizer, exact.logsumexp(1) - math.log(n), **close)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(1, 1), (300, 3), (41, 123), (64, 1024), (1, 2**16)])
def test_equals_the_reference_to_the_last_bit(backend, shape, dtype):
    generator = torch.Generator().manual_seed(sum(shape))
    log_weights = 40 * torch.randn(shape, dtype=dtype, generator=generator)
    special = torch.tensor([0.0, INF, -INF, NAN, 1e4, -1e4, -700.0], dtype=dtype)
    index = torch.randint(0, 7, shape, generator=generator)
    log_weights = torch.where(torch.rand(shape, generator=generator) < 0.02, special[index], log_weights)
    expected = outputs(log_weights)
    reference(log_weights, *expected)
    for got, wanted in zip(normalize(log_weights), expected, strict=True):
        assert torch.equal(got.nan_to_num(-9), wanted.nan_to_num(-9))


@pytest.mark.parametrize("scale", [0.0, 1e4, -1e4])
def test_shift_does_not_matter(backend, scale):
    log_weights = torch.tensor([[0.0, 1.0, 2.0, -INF]], dtype=torch.float64)
    weights, ess, log_normalizer = normalize(log_weights + scale)
    torch.testing.assert_close(weights, log_weights.softmax(1), rtol=1e-11, atol=0)
    assert log_normalizer.item() == pytest.approx(scale + math.log((1 + math.e + math.e**2) / 4))
    assert 1 < ess.item() < 3


def test_far_apart(backend):
    weights, ess, log_normalizer = normalize(torch.tensor([[1e4, -1e4, 0.0, 1e4]]))
    assert weights.tolist() == [[0.5, 0, 0, 0.5]]
    assert ess.item() == 2
    assert log_normalizer.item() == pytest.approx(1e4 - math.log(2))


def test_special_values(backend):
    rows = torch.tensor([[NAN, 0.0, -INF], [-INF, -INF, -INF], [NAN, NAN, -INF], [INF, 0.0, INF], [-INF, -3e38, -INF]])
    weights, ess, log_normalizer = normalize(rows)
    assert weights[0].tolist() == [0, 1, 0] and ess[0] == 1  # NaN counts as -inf
    assert weights[1:3].isnan().all() and ess[1:3].tolist() == [0, 0] and log_normalizer[1:3].tolist() == [-INF] * 2
    assert weights[3].tolist() == [0.5, 0, 0.5] and ess[3] == 2 and log_normalizer[3] == INF
    assert weights[4].tolist() == [0, 1, 0] and log_normalizer[4] == torch.tensor(-3e38)


def test_equal_weights_are_exact(backend):
    for n in (1, 3, 10, 1000, 2**16):
        weights, ess, log_normalizer = normalize(torch.full((1, n), -123.25))
        assert (weights == 1 / n).all() and ess == n and log_normalizer == -123.25


def test_exp_and_log():
    x = -(10 ** torch.linspace(-12, math.log10(708), 200_001, dtype=torch.float64))
    assert (exp_nonpositive(x) / x.exp() - 1).abs().max() < 5e-16
    assert exp_nonpositive(torch.tensor([0.0, -708.1, -INF], dtype=torch.float64)).tolist() == [1, 0, 0]
    y = 10 ** torch.linspace(-7, 7, 200_001, dtype=torch.float64)
    assert ((log_positive(y) - y.log()).abs() / y.log().abs().clamp(min=1)).max() < 5e-16


@pytest.mark.parametrize(
    "log_weights, ess, message",
    [
        (torch.zeros(2, 3).half(), torch.zeros(2), "log_weights must be float32 or float64"),
        (torch.zeros(3), torch.zeros(2), r"log_weights must have shape \(slots, particles\)"),
        (torch.zeros(2, 0), torch.zeros(2), r"with 1..1048576 particles, got \(2, 0\)"),
        (torch.zeros(1, MAX_PARTICLES + 1), torch.zeros(1), "with 1..1048576 particles"),
        (torch.zeros(3, 2).t(), torch.zeros(2), "log_weights must be contiguous"),
        (torch.zeros(2, 3), torch.zeros(3), r"ess must have shape \(2,\), got \(3,\)"),
        (torch.zeros(2, 3), torch.zeros(2).double(), "ess must have dtype"),
    ],
)
def test_wrong_operands(backend, log_weights, ess, message):
    with pytest.raises(RuntimeError, match=message):
        torch.ops.flowfast.normalize_log_weights(log_weights, torch.empty_like(log_weights), ess, ess)


def test_reference_never_waits_for_the_device():
    log_weights = torch.randn(3, 5)
    with FakeDevice(fused=False) as device:
        operands = [tensor.to(DEVICE) for tensor in (log_weights, *outputs(log_weights))]
        device.clear()
        torch.ops.flowfast.normalize_log_weights(*operands)
    assert not device.waits and not device.copies and device.launches


def test_opcheck_and_script(backend):
    log_weights = torch.randn(3, 5)
    torch.library.opcheck(torch.ops.flowfast.normalize_log_weights.default, (log_weights, *outputs(log_weights)))

    @torch.jit.script
    def scripted(log_weights: torch.Tensor, weights: torch.Tensor, ess: torch.Tensor, log_normalizer: torch.Tensor):
        torch.ops.flowfast.normalize_log_weights(log_weights, weights, ess, log_normalizer)

    result, expected = outputs(log_weights), outputs(log_weights)
    scripted(log_weights, *result)
    reference(log_weights, *expected)
    assert all(torch.equal(a, b) for a, b in zip(result, expected, strict=True))
