"""branch_step: the equation in float64, the same bits in every backend, and what it must not touch."""

import math

import pytest
import torch
from fake_device import DEVICE, FakeDevice

import flowfast.ops
from flowfast.errors import OptionError
from flowfast.ops import branch_step, noise

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SIZES = [1, 7, 123, 1023, 4097]
PARENTS, LANES = 4, 6


@pytest.fixture(params=["scalar", "avx2", "avx512"])
def instruction_set(request):
    try:
        with flowfast.ops.use_instruction_set(request.param):
            yield request.param
    except OptionError as error:
        pytest.skip(str(error))


def table(generator):
    """Rows: initial noise, all terms, no noise, no x, no u, only noise."""
    rows = torch.randn(6, 8, generator=generator)
    rows[0] = torch.tensor([0, 0, 1.0, 0, 1, -1, 0, 0])
    rows[2, branch_step.C] = 0
    rows[3, [branch_step.A, branch_step.D_FROM]] = 0
    rows[4, [branch_step.B, branch_step.E_FROM, branch_step.G]] = 0
    rows[5, [branch_step.A, branch_step.B, branch_step.G]] = 0
    return rows


def problem(n, dtype=torch.float32, seed=0):
    """Operands before the outputs, and grad; lanes 3 and 4 are padding."""
    generator = torch.Generator().manual_seed(seed)
    x, u = torch.randn(2, PARENTS, n, generator=generator).to(dtype).unbind(0)
    grad = torch.randn(LANES, n, generator=generator).to(dtype)
    parent = torch.tensor([0, 3, 1, -1, 2, 3])
    row = torch.tensor([1, 0, 2, 1, -1, 5])
    key = torch.randint(-(2**63), 2**63 - 1, (LANES,), generator=generator)
    candidate, chain = torch.randint(0, 2**32, (2, LANES), generator=generator).unbind(0)
    return [x.contiguous(), u.contiguous(), parent, row, key, candidate, chain, table(generator)], grad


def outputs(n, dtype=torch.float32, fill=9.0):
    return torch.full((LANES, n), fill, dtype=dtype), torch.full((LANES, n), fill, dtype=dtype)


def step(operands, out, x0_out=None, grad=None):
    torch.ops.flowfast.branch_step(*operands, out, x0_out, grad)
    return out, x0_out


def bits(tensor):
    return tensor.view({4: torch.int32, 2: torch.int16}[tensor.element_size()])


def ground_truth(operands, grad, n):
    """The equation in float64, lane by lane, with the float32 normals of the stream."""
    x, u, parent, row, key, candidate, chain, coefficients = operands
    x, u, coefficients, grad = x.double(), u.double(), coefficients.double(), grad.double()
    out, x0_out = (tensor.double() for tensor in outputs(n))
    for i in range(LANES):
        p, r = int(parent[i]), int(row[i])
        if p < 0 or r < 0:
            continue
        a, b, c, g, _, _, d_from, e_from = coefficients[r].tolist()
        one = [column[i : i + 1] for column in (key, row, candidate, chain)]
        z = noise.normals(*one, 0 if r == 0 else 1, n)[0].double()
        out[i] = a * x[p] + b * u[p] + c * z + g * grad[i]
        x0_out[i] = d_from * x[p] + e_from * u[p]
    return out, x0_out


@pytest.mark.parametrize("n", SIZES)
def test_equation_in_float64(backend, n):
    operands, grad = problem(n)
    expected = ground_truth(operands, grad, n)
    for result, truth in zip(step(operands, *outputs(n), grad), expected, strict=True):
        torch.testing.assert_close(result.double(), truth, rtol=1.3e-6, atol=1e-5)


def test_reference_in_float64_is_the_equation():
    operands, grad = problem(123)
    expected = ground_truth(operands, grad, 123)
    double = [tensor.double() if tensor.is_floating_point() else tensor for tensor in operands]
    out, x0_out = outputs(123, torch.float64)
    branch_step.reference(*double, out, x0_out, grad.double())
    torch.testing.assert_close((out, x0_out), expected, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", SIZES)
def test_compiled_equals_reference(instruction_set, n, dtype):
    operands, grad = problem(n, dtype, seed=n)
    for gradient in (None, grad):
        out, x0_out = step(operands, *outputs(n, dtype), gradient)
        expected, expected_x0 = outputs(n, dtype)
        branch_step.reference(*operands, expected, expected_x0, gradient)
        assert torch.equal(bits(out), bits(expected))
        assert torch.equal(bits(x0_out), bits(expected_x0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_16_bit_number_is_read_and_written_as_torch_does(instruction_set, dtype):
    """A = 1 moves x unchanged; A = 1 + 2^-9 makes sums that have to be rounded, overflow included."""
    x = torch.arange(-(1 << 15), 1 << 15).short().view(dtype)[None]
    lane = torch.zeros(1, dtype=torch.int64)
    for factor in (1.0, 1 + 2.0**-9, 2.0**-12, 3.0e4):
        coefficients = torch.zeros(1, 8)
        coefficients[0, 0] = factor
        out = torch.zeros_like(x)
        step([x, x, lane, lane, lane, lane, lane, coefficients], out)
        expected = (x.float() * factor).to(dtype) + 0  # the kernel's sum starts at +0
        assert torch.equal(out.isnan(), expected.isnan())
        assert torch.equal(out[~out.isnan()], expected[~expected.isnan()])


def test_padding_lanes_stay(backend):
    operands, grad = problem(123)
    out, x0_out = step(operands, *outputs(123), grad)
    for result in (out, x0_out):
        assert bool((result[3:5] == 9).all())
        assert not bool((result[[0, 2]] == 9).any())


def test_operands_with_zero_coefficients_are_not_read(backend):
    n = 123
    operands, grad = problem(n)
    poisoned = [tensor.clone() for tensor in operands]
    poisoned[0][3], poisoned[1][3] = math.nan, math.inf  # parent of lanes 1 (initial noise) and 5 (only noise)
    poisoned[7][5, [branch_step.D_FROM, branch_step.E_FROM]] = 0
    operands[7] = poisoned[7]
    expected = step(operands, *outputs(n))
    result = step(poisoned, *outputs(n))
    torch.testing.assert_close(result, expected, rtol=0, atol=0)
    assert bool((result[1][[1, 5]] == 0).all())

    bad_grad = grad.clone()
    bad_grad[[1, 5]] = math.nan  # rows 0 and 5 have G = 0
    torch.testing.assert_close(step(operands, *outputs(n), bad_grad), step(operands, *outputs(n), grad), rtol=0, atol=0)
    # and a coefficient that is not zero does let a NaN through: the test can see one
    poisoned[0][0, 5] = math.nan
    assert bool(step(poisoned, *outputs(n))[0][0, 5].isnan())


@pytest.mark.parametrize("dtype", DTYPES)
def test_out_may_be_x(backend, dtype):
    operands, _ = problem(1023, dtype)
    operands[2:7] = [operands[2].new_tensor([0, 1, -1, 3])] + [column[[0, 1, 2, 5]] for column in operands[3:7]]
    expected, expected_x0 = torch.zeros(2, PARENTS, 1023, dtype=dtype).unbind(0)
    step(operands, expected, expected_x0)
    before = operands[0].clone()
    x0_out = torch.zeros_like(expected_x0)
    step(operands, operands[0], x0_out)
    assert torch.equal(operands[0][[0, 1, 3]], expected[[0, 1, 3]])
    assert torch.equal(operands[0][2], before[2])
    assert torch.equal(x0_out, expected_x0)


def test_out_is_not_x_where_a_lane_has_another_parent(backend):
    operands, _ = problem(16)
    operands[2:7] = [torch.tensor([0, 2, 2, 3])] + [column[[0, 1, 2, 5]] for column in operands[3:7]]
    with pytest.raises(RuntimeError, match="out may be x only where every lane is its own parent; lane 1"):
        step(operands, operands[0])


# C1


def one_lane(n, a=0.0, b=0.0, c=0.0):
    generator = torch.Generator().manual_seed(2)
    x, u = torch.randn(2, 1, n, generator=generator).unbind(0)
    lane = torch.zeros(1, dtype=torch.int64)
    coefficients = torch.zeros(2, 8)
    coefficients[1, :3] = torch.tensor([a, b, c])
    return [x, u, lane, lane + 1, lane + 11, lane + 2, lane + 3, coefficients]


def test_mean_is_within_two_units_of_the_last_place(backend):
    operands = one_lane(4097, a=0.93, b=-0.07)
    out = step(operands, torch.zeros(1, 4097))[0]
    x, u, coefficients = operands[0].double(), operands[1].double(), operands[7].double()
    exact = coefficients[1, 0] * x + coefficients[1, 1] * u
    magnitude = torch.maximum((coefficients[1, 0] * x).abs(), exact.abs()).float()
    unit = torch.nextafter(magnitude, torch.tensor(math.inf)) - magnitude
    assert float(((out - exact).abs() / unit).max()) <= 2
    mutant = out + 3 * unit
    assert float(((mutant - exact).abs() / unit).max()) > 2


def test_variance_of_the_step():
    """+-0.7 % at n = 1e6 kills a scale of the noise that is 1 % off."""
    n, scale = 1_000_000, 0.37
    operands = one_lane(n, a=1.0, c=scale)
    noise_part = (step(operands, torch.zeros(1, n))[0] - operands[0]).double()
    ratio = float(noise_part.var()) / scale**2
    assert abs(ratio - 1) < 0.007
    assert abs(1.01**2 * ratio - 1) > 0.007  # mutant


# A2, D2


def test_lanes_do_not_depend_on_the_batch_or_on_threads():
    n = 5000
    operands, grad = problem(n)
    x, u, parent, row, key, candidate, chain, coefficients = operands
    expected, expected_x0 = step(operands, *outputs(n), grad)
    for i in (0, 1, 2, 5):
        one = [x, u, *(column[i : i + 1] for column in (parent, row, key, candidate, chain)), coefficients]
        out, x0_out = torch.zeros(2, 1, n).unbind(0)
        step(one, out, x0_out, grad[i : i + 1])
        assert torch.equal(out[0], expected[i]) and torch.equal(x0_out[0], expected_x0[i])
    for count in (7, 64):  # among others, shuffled
        order = torch.randint(0, LANES, (count,), generator=torch.Generator().manual_seed(count))
        many = [x, u, *(column[order] for column in (parent, row, key, candidate, chain)), coefficients]
        for threads in (1, 3):
            before = torch.get_num_threads()
            torch.set_num_threads(threads)
            out = step(many, torch.full((count, n), 9.0), None, grad[order])[0]
            torch.set_num_threads(before)
            assert torch.equal(out, expected[order])


def test_scripted_call(backend):
    @torch.jit.script
    def scripted(
        x: torch.Tensor,
        u: torch.Tensor,
        lane: torch.Tensor,
        row: torch.Tensor,
        key: torch.Tensor,
        table: torch.Tensor,
        out: torch.Tensor,
    ) -> torch.Tensor:
        torch.ops.flowfast.branch_step(x, u, lane, row, key, lane, lane, table, out)
        return out

    operands, _ = problem(123)
    x, u, _, _, key, _, _, coefficients = operands
    lane, row = torch.arange(PARENTS), torch.tensor([1, 0, 2, 5])
    expected = torch.zeros(PARENTS, 123)
    step([x, u, lane, row, key[:4], lane, lane, coefficients], expected)
    assert torch.equal(scripted(x, u, lane, row, key[:4], coefficients, torch.zeros(PARENTS, 123)), expected)


def test_the_reference_does_not_wait_on_a_device():
    operands, grad = problem(123)
    expected = step(operands, *outputs(123), grad)
    with FakeDevice(fused=False) as device:
        arguments = [tensor.to(DEVICE) for tensor in (*operands, *outputs(123), grad)]
        device.clear()
        torch.ops.flowfast.branch_step(*arguments)
        assert not device.waits and not device.copies and device.launches
        assert torch.equal(arguments[8].host, expected[0]) and torch.equal(arguments[9].host, expected[1])


def test_empty_batch_and_rows(backend):
    operands, _ = problem(0)
    assert step(operands, *outputs(0))[0].shape == (LANES, 0)
    operands, _ = problem(8)
    operands[2:7] = [column[:0] for column in operands[2:7]]
    step(operands, torch.zeros(0, 8))


@pytest.mark.parametrize(
    "position, value, message",
    [
        (0, torch.zeros(4), r"x must have shape \(rows, elements\), got \(4,\)"),
        (0, torch.zeros(4, 16).int(), "x must be float32, bfloat16 or float16"),
        (0, torch.zeros(16, 4).t(), r"x must be contiguous; pass x.contiguous\(\)"),
        (1, torch.zeros(4, 15), r"u must have shape \(4, 16\), got \(4, 15\)"),
        (1, torch.zeros(4, 16).half(), "u must have dtype"),
        (2, torch.zeros(LANES), "parent must have dtype"),
        (2, torch.tensor([0, 0, 0, 0, 0, 4]), "parent must lie in 0..3.*got 4"),
        (3, torch.tensor([0, 0, 0, 0, 0, 6]), "row must lie in 0..5.*got 6"),
        (4, torch.zeros(5, dtype=torch.int64), r"key must have shape \(6,\), got \(5,\)"),
        (5, torch.full((LANES,), 1 << 32), "candidate must lie in 0"),
        (6, torch.full((LANES,), -1), "chain must lie in 0"),
        (7, torch.zeros(6, 7), r"table must have shape \(6, 8\), got \(6, 7\)"),
        (7, torch.zeros(6, 8).double(), "table must have dtype"),
        (8, torch.zeros(LANES, 15), r"out must have shape \(6, 16\), got \(6, 15\)"),
        (8, torch.zeros(LANES, 16).bfloat16(), "out must have dtype"),
        (9, torch.zeros(5, 16), r"x0_out must have shape \(6, 16\), got \(5, 16\)"),
        (10, torch.zeros(16, LANES).t(), "grad must be contiguous"),
    ],
)
def test_mistakes_are_named(backend, position, value, message):
    operands, grad = problem(16)
    arguments = [*operands, *outputs(16), grad]
    arguments[position] = value
    with pytest.raises(RuntimeError, match=f"branch_step: {message}"):
        torch.ops.flowfast.branch_step(*arguments)


def test_opcheck(backend):
    operands, grad = problem(70)
    torch.library.opcheck(torch.ops.flowfast.branch_step.default, (*operands, *outputs(70), grad))
    torch.library.opcheck(torch.ops.flowfast.branch_step.default, (*operands, outputs(70)[0]))
