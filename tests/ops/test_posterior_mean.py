"""posterior_mean: the equations in float64, the same bits in every backend, exact ends of guidance."""

import math

import pytest
import torch
from fake_device import DEVICE, FakeDevice

import flowfast.ops
from flowfast.errors import OptionError
from flowfast.ops import posterior_mean

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SIZES = [1, 7, 123, 1023, 4097]
LANES = 5
ROW = torch.tensor([0, 2, -1, 1, 3])
GUIDANCE = torch.tensor([3.5, 1.0, 7.0, 0.0, -0.25])


@pytest.fixture(params=["scalar", "avx2", "avx512"])
def instruction_set(request):
    try:
        with flowfast.ops.use_instruction_set(request.param):
            yield request.param
    except OptionError as error:
        pytest.skip(str(error))


def problem(n, dtype=torch.float32, guided=True):
    """Operands before the outputs; lane 2 is padding."""
    generator = torch.Generator().manual_seed(n)
    x, u, uncond = torch.randn(3, LANES, n, generator=generator).to(dtype).unbind(0)
    table = torch.randn(4, 8, generator=generator)
    return [x, u, uncond if guided else None, GUIDANCE if guided else None, ROW, table]


def outputs(n, dtype=torch.float32):
    return torch.full((LANES, n), 9.0, dtype=dtype), torch.full((LANES, n), 9.0, dtype=dtype)


def run(operands, n, dtype=torch.float32):
    results = outputs(n, dtype)
    torch.ops.flowfast.posterior_mean(*operands, *results)
    return results


def ground_truth(operands, n):
    x, u, uncond, guidance, row, table = operands
    live = (row >= 0)[:, None]
    c = table.double()[row.clamp(min=0)]
    velocity = u.double()
    if uncond is not None:
        velocity = uncond.double() + guidance.double()[:, None] * (velocity - uncond.double())
    x0 = c[:, 4:5] * x.double() + c[:, 5:6] * velocity
    return velocity.where(live, 9.0), x0.where(live, 9.0)


@pytest.mark.parametrize("guided", [True, False])
@pytest.mark.parametrize("n", SIZES)
def test_equation_in_float64(backend, n, guided):
    operands = problem(n, guided=guided)
    for result, truth in zip(run(operands, n), ground_truth(operands, n), strict=True):
        torch.testing.assert_close(result.double(), truth, rtol=1.3e-6, atol=1e-5)


def test_reference_in_float64_is_the_equation():
    operands = problem(123)
    double = [tensor.double() if i in (0, 1, 2, 5) else tensor for i, tensor in enumerate(operands)]
    results = outputs(123, torch.float64)
    posterior_mean.reference(*double, *results)
    torch.testing.assert_close(results, ground_truth(operands, 123), rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("guided", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", SIZES)
def test_compiled_equals_reference(instruction_set, n, dtype, guided):
    operands = problem(n, dtype, guided)
    expected = outputs(n, dtype)
    posterior_mean.reference(*operands, *expected)
    for result, reference in zip(run(operands, n, dtype), expected, strict=True):
        assert torch.equal(result, reference)


def test_guidance_one_and_zero_read_one_side_only(backend):
    """Guidance 1 is exactly the conditional velocity, 0 the unconditional one, whatever stands in the other."""
    operands = problem(123)
    x, u, uncond = operands[:3]
    uncond[1], u[3] = math.nan, math.inf
    velocity, x0 = run(operands, 123)
    assert torch.equal(velocity[1], u[1]) and torch.equal(velocity[3], uncond[3])
    assert bool(x0.isfinite().all())
    u[0, 0] = math.nan  # guidance 3.5 does read both: the test can see a NaN
    assert bool(run(operands, 123)[0][0, 0].isnan())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", SIZES)
def test_at_guidance_one_a_lane_is_as_without_a_null_velocity(instruction_set, n, dtype):
    """Bit for bit, whatever stands in the null velocity: batches in which some lanes take the null pass have no other
    results for the rest."""
    x, u, uncond, guidance, row, table = problem(n, dtype)
    u[1, 0], uncond[1] = -0.0, torch.tensor([math.nan, math.inf, 1.0])[torch.arange(n) % 3]
    for run_one in (torch.ops.flowfast.posterior_mean, posterior_mean.reference):
        two, one = outputs(n, dtype), outputs(n, dtype)
        broken = torch.zeros(LANES, dtype=torch.bool)
        run_one(x, u, uncond, guidance, row, table, *two, broken)
        run_one(x, u, None, None, row, table, *one)
        for result in (two[0][1], one[0][1]):
            assert torch.equal(bits(result), bits(u[1]))
        assert torch.equal(bits(two[1][1]), bits(one[1][1])) and not bool(broken.any())


def bits(tensor):
    return tensor.view(torch.int32 if tensor.dtype == torch.float32 else torch.int16)


def test_operands_with_zero_coefficients_are_not_read(backend):
    operands = problem(123, guided=False)
    operands[5][0, 4], operands[5][2, 5] = 0, 0
    operands[0][0], operands[1][1] = math.nan, math.nan
    x0 = run(operands, 123)[1]
    assert bool(x0.isfinite().all())


def test_padding_lanes_stay_and_outputs_may_be_inputs(backend):
    operands = problem(123)
    velocity, x0 = run(operands, 123)
    assert bool((velocity[2] == 9).all()) and bool((x0[2] == 9).all())
    x, u = operands[:2]
    kept = x[2].clone(), u[2].clone()
    torch.ops.flowfast.posterior_mean(*operands, u, x)
    live = ROW >= 0
    assert torch.equal(u[live], velocity[live]) and torch.equal(x[live], x0[live])
    assert torch.equal(x[2], kept[0]) and torch.equal(u[2], kept[1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", SIZES)
def test_broken_marks_lanes_whose_stored_posterior_mean_is_not_finite(instruction_set, n, dtype):
    """At either end of a row; 65520 and 2^128 (1 - 2^-9) are finite until they are rounded to half and bfloat16."""
    narrowed = {torch.float32: math.inf, torch.bfloat16: 2.0**127 * 1.998, torch.float16: 65520.0}[dtype]
    largest = torch.finfo(dtype).max
    for value, at in [(math.nan, 0), (-math.inf, n - 1), (narrowed, n // 2)]:
        x, row = torch.zeros(3, n, dtype=dtype), torch.tensor([0, 0, -1])
        u = torch.zeros_like(x)
        x[0, at], x[2] = largest, math.nan  # lane 2 is padding
        table = torch.tensor([[0.0] * 4 + [1.0, 1.0, 0.0, 0.0]])  # the posterior mean is x + u
        if math.isfinite(value):  # more than dtype can hold: reached by the sum of two numbers that it can
            x[1, at], u[1, at] = largest, value - largest
        else:
            u[1] = value
        marks, expected = torch.tensor([False, False, True]), torch.tensor([False, True, True])
        u_out, x0_out = torch.zeros_like(x), torch.zeros_like(x)
        torch.ops.flowfast.posterior_mean(x, u, None, None, row, table, u_out, x0_out, marks)
        assert torch.equal(marks, expected) and not bool(x0_out[1].isfinite().all())
        with flowfast.ops.use_backend("reference"):
            marks = torch.tensor([False, False, True])
            torch.ops.flowfast.posterior_mean(x, u, None, None, row, table, u_out, x0_out, marks)
        assert torch.equal(marks, expected)


def test_without_guidance_the_velocity_need_not_be_copied(backend):
    operands, x0 = problem(123, guided=False), outputs(123)[1]
    torch.ops.flowfast.posterior_mean(*operands, None, x0)
    assert torch.equal(x0, run(operands, 123)[1])


def test_lanes_do_not_depend_on_the_batch():
    operands = problem(1023)
    velocity, x0 = run(operands, 1023)
    for i in (0, 1, 3, 4):
        one = [None if tensor is None else tensor[i : i + 1] for tensor in operands[:5]] + operands[5:]
        results = torch.zeros(1, 1023), torch.zeros(1, 1023)
        torch.ops.flowfast.posterior_mean(*one, *results)
        assert torch.equal(results[0][0], velocity[i]) and torch.equal(results[1][0], x0[i])


def test_the_reference_does_not_wait_on_a_device():
    operands = problem(123)
    expected = run(operands, 123)
    with FakeDevice(fused=False) as device:
        arguments = [tensor.to(DEVICE) for tensor in (*operands, *outputs(123))]
        device.clear()
        torch.ops.flowfast.posterior_mean(*arguments)
        assert not device.waits and not device.copies and device.launches
        assert torch.equal(arguments[6].host, expected[0]) and torch.equal(arguments[7].host, expected[1])


@pytest.mark.parametrize(
    "position, value, message",
    [
        (0, torch.zeros(LANES, 16, 1), r"x must have shape \(rows, elements\)"),
        (1, torch.zeros(16, LANES).t(), "u must be contiguous"),
        (2, torch.zeros(LANES, 16).half(), "u_uncond must have dtype"),
        (3, None, "u_uncond needs guidance, one scale a lane; pass both or neither"),
        (3, torch.zeros(1), r"guidance must have shape \(5,\), got \(1,\)"),
        (4, torch.full((LANES,), 4), "row must lie in 0..3.*got 4"),
        (5, torch.zeros(8), "table must have shape"),
        (6, torch.zeros(LANES, 15), r"u_out must have shape \(5, 16\), got \(5, 15\)"),
        (6, None, "u_uncond needs u_out; only without guidance it may be left out"),
        (8, torch.zeros(LANES), "broken must have dtype"),
        (7, torch.zeros(LANES, 16).half(), "x0_out must have dtype"),
    ],
)
def test_mistakes_are_named(backend, position, value, message):
    arguments = [*problem(16), *outputs(16), torch.zeros(LANES, dtype=torch.bool)]
    arguments[position] = value
    with pytest.raises(RuntimeError, match=f"posterior_mean: {message}"):
        torch.ops.flowfast.posterior_mean(*arguments)


@pytest.mark.parametrize("guided", [True, False])
def test_opcheck(backend, guided):
    torch.library.opcheck(torch.ops.flowfast.posterior_mean.default, (*problem(70, guided=guided), *outputs(70)))
