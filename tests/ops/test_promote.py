import pytest
import torch
from fake_device import DEVICE, FakeDevice

DTYPES = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}


def random_bits(rows, n, dtype, seed):
    """Any bit pattern, NaN with payloads included: rows move by bytes."""
    bits = torch.randint(-(2**62), 2**62, (rows, n), generator=torch.Generator().manual_seed(seed))
    return bits.to(DTYPES[dtype]).view(dtype)


def operands(rows, lanes, n, dtype=torch.float32):
    x_store, u_store = (random_bits(rows, n, dtype, seed) for seed in (1, 2))
    x_lane, u_lane = (random_bits(lanes, n, dtype, seed) for seed in (3, 4))
    source = torch.randint(-2, lanes, (rows,), generator=torch.Generator().manual_seed(5))
    return [x_store, u_store, x_lane, u_lane, source]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows, lanes, n", [(1, 1, 1), (5, 3, 0), (7, 0, 4), (0, 3, 4), (123, 41, 9), (3, 2, 300_001)])
def test_moves_winners_and_keeps_the_rest(backend, rows, lanes, n, dtype):
    x_store, u_store, x_lane, u_lane, source = operands(rows, lanes, n, dtype)
    expected_x, expected_u = x_store.clone(), u_store.clone()
    for i, lane in enumerate(source.tolist()):
        if lane >= 0:
            expected_x[i], expected_u[i] = x_lane[lane], u_lane[lane]
    torch.ops.flowfast.promote_(x_store, u_store, x_lane, u_lane, source)
    bits = DTYPES[dtype]
    assert torch.equal(x_store.view(bits), expected_x.view(bits))
    assert torch.equal(u_store.view(bits), expected_u.view(bits))


@pytest.mark.parametrize(
    "position, value, message",
    [
        (0, torch.zeros(4), r"x_store must have shape \(rows, elements\), got \(4,\)"),
        (0, torch.zeros(4, 3).int(), "x_store must be float32, bfloat16 or float16"),
        (1, torch.zeros(4, 3).half(), "u_store must have dtype"),
        (2, torch.zeros(2, 4), r"x_lane must have shape \(2, 3\), got \(2, 4\)"),
        (3, torch.zeros(1, 3), r"u_lane must have shape \(2, 3\), got \(1, 3\)"),
        (3, torch.zeros(3, 2).t(), "u_lane must be contiguous"),
        (4, torch.zeros(4).int(), "source must have dtype"),
        (4, torch.tensor([0, 1, -1, 2]), "source must"),
    ],
)
def test_wrong_operands(backend, position, value, message):
    arguments = operands(4, 2, 3)
    arguments[position] = value
    with pytest.raises(RuntimeError, match=message):
        torch.ops.flowfast.promote_(*arguments)


def test_reference_never_waits_for_the_device():
    with FakeDevice(fused=False) as device:
        arguments = [tensor.to(DEVICE) for tensor in operands(4, 2, 3)]
        device.clear()
        torch.ops.flowfast.promote_(*arguments)
    assert not device.waits and not device.copies and device.launches


def test_opcheck_and_script(backend):
    def finite():
        return [torch.arange(12.0).view(4, 3), torch.zeros(4, 3), torch.ones(2, 3), torch.ones(2, 3)]

    source = torch.tensor([1, -1, 0, -1])
    torch.library.opcheck(torch.ops.flowfast.promote_.default, (*finite(), source))

    @torch.jit.script
    def scripted(tensors: list[torch.Tensor], source: torch.Tensor):
        torch.ops.flowfast.promote_(tensors[0], tensors[1], tensors[2], tensors[3], source)

    tensors = finite()
    scripted(tensors, source)
    assert tensors[0].tolist() == [[1, 1, 1], [3, 4, 5], [1, 1, 1], [9, 10, 11]]
