import pytest
import torch
from fake_device import DEVICE, FakeDevice
from hypothesis import given, settings
from hypothesis import strategies as st

from flowfast.ops.resample import RESAMPLING, ancestors_from_counts

BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}


def random_bits(rows, n, dtype, generator):
    """Any bit pattern, NaN with payloads included: rows move by bytes."""
    bits = torch.randint(-(2**62), 2**62, (rows, n), generator=generator)
    return bits.to(BITS[dtype]).view(dtype)


def random_ancestors(slots, particles, generator, scheme="multinomial"):
    """Global rows, as a search makes them: resampled within each slot."""
    weights = torch.rand(slots, particles, generator=generator) ** 4 + 1e-6
    weights /= weights.sum(1, keepdim=True)
    key = torch.randint(-(2**62), 2**62, (slots,), generator=generator)
    ancestors = torch.empty(slots, particles, dtype=torch.int64)
    enabled = torch.rand(slots, generator=generator) < 0.9
    torch.ops.flowfast.resample(weights, key, torch.arange(slots), enabled, RESAMPLING[scheme], ancestors)
    return (ancestors + particles * torch.arange(slots)[:, None]).flatten()


def check(ancestors, n, dtype, generator):
    x, u = (random_bits(len(ancestors), n, dtype, generator) for _ in range(2))
    expected = [tensor.view(BITS[dtype])[ancestors] for tensor in (x, u)]
    torch.ops.flowfast.gather_ancestors_(x, u, ancestors)
    assert torch.equal(x.view(BITS[dtype]), expected[0])
    assert torch.equal(u.view(BITS[dtype]), expected[1])


def test_equals_a_gather(backend):
    """10,000 cases a backend: 100 examples of 100 slots."""

    @settings(max_examples=100, deadline=None, derandomize=True, database=None)
    @given(
        particles=st.integers(1, 40),
        n=st.integers(0, 9),
        scheme=st.sampled_from(sorted(RESAMPLING)),
        dtype=st.sampled_from(list(BITS)),
        seed=st.integers(0, 2**32),
    )
    def cases(particles, n, scheme, dtype, seed):
        generator = torch.Generator().manual_seed(seed)
        check(random_ancestors(100, particles, generator, scheme), n, dtype, generator)

    cases()


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_large_rows_on_several_threads(backend, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        generator = torch.Generator().manual_seed(threads)
        check(random_ancestors(1, 16, generator), 2**18 + 1, torch.float32, generator)
    finally:
        torch.set_num_threads(before)


def test_without_the_permutation_it_would_be_wrong(backend):
    """Control: sorted ancestors, the usual output of a resampler, lose particle 0 on the way."""
    x = torch.arange(3.0)[:, None]
    with pytest.raises(RuntimeError, match="an ancestor must keep its own row"):
        torch.ops.flowfast.gather_ancestors_(x, x.clone(), torch.tensor([1, 0, 0]))
    assert x.flatten().tolist() == [0, 1, 2]


def test_no_row_and_no_element(backend):
    nothing = torch.empty(0, dtype=torch.int64)
    torch.ops.flowfast.gather_ancestors_(torch.empty(0, 4), torch.empty(0, 4), nothing)
    torch.ops.flowfast.gather_ancestors_(torch.empty(2, 0), torch.empty(2, 0), torch.tensor([1, 1]))


def test_one_survivor_takes_every_slot(backend):
    check(ancestors_from_counts(torch.tensor([[0, 0, 5, 0, 0]]))[0], 3, torch.float32, torch.Generator())


@pytest.mark.parametrize(
    "position, value, message",
    [
        (0, torch.zeros(4), r"x must have shape \(rows, elements\), got \(4,\)"),
        (0, torch.zeros(4, 3).int(), "x must be float32, bfloat16 or float16"),
        (0, torch.zeros(3, 4).t(), "x must be contiguous"),
        (1, torch.zeros(4, 3).half(), "u must have dtype"),
        (1, torch.zeros(4, 2), r"u must have shape \(4, 3\), got \(4, 2\)"),
        (2, torch.arange(4).int(), "ancestors must have dtype"),
        (2, torch.arange(3), r"ancestors must have shape \(4,\), got \(3,\)"),
        (2, torch.tensor([0, 1, 2, 4]), r"ancestors must"),
        (2, torch.tensor([0, 1, 2, -1]), r"ancestors must"),
    ],
)
def test_wrong_operands(backend, position, value, message):
    arguments = [torch.zeros(4, 3), torch.zeros(4, 3), torch.arange(4)]
    arguments[position] = value
    with pytest.raises(RuntimeError, match=message):
        torch.ops.flowfast.gather_ancestors_(*arguments)


def test_reference_never_waits_for_the_device():
    with FakeDevice(fused=False) as device:
        arguments = [tensor.to(DEVICE) for tensor in (torch.randn(3, 2), torch.randn(3, 2), torch.tensor([0, 0, 2]))]
        device.clear()
        torch.ops.flowfast.gather_ancestors_(*arguments)
    assert not device.waits and not device.copies and device.launches


def test_opcheck_and_script(backend):
    ancestors = torch.tensor([0, 0, 2])
    torch.library.opcheck(
        torch.ops.flowfast.gather_ancestors_.default, (torch.randn(3, 2), torch.randn(3, 2), ancestors)
    )

    @torch.jit.script
    def scripted(x: torch.Tensor, u: torch.Tensor, ancestors: torch.Tensor):
        torch.ops.flowfast.gather_ancestors_(x, u, ancestors)

    x = torch.arange(3.0)[:, None]
    scripted(x, x.clone(), ancestors)
    assert x.flatten().tolist() == [0, 0, 2]
