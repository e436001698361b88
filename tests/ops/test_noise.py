"""The noise stream: known answers, one definition everywhere, and the statistics of a standard normal.

Statistical bounds hold with probability 1 - 1e-6, and each has a mutant that it must kill.
"""

import ctypes
import math

import numpy as np
import pytest
import scipy.special
import torch
from fake_device import DEVICE, FakeDevice

import flowfast.ops
from flowfast.errors import OptionError
from flowfast.ops import backend as backends
from flowfast.ops import noise

KNOWN_ANSWERS = [  # Random123's kat_vectors: counter, key, words
    ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]
Z_BOUND = 4.9


@pytest.fixture(params=["scalar", "avx2", "avx512"])
def instruction_set(request):
    try:
        with flowfast.ops.use_instruction_set(request.param):
            assert flowfast.ops.instruction_set() == request.param
            yield request.param
    except OptionError as error:
        pytest.skip(str(error))


def native_words(key, counter, block):
    """A block of 256 words of the compiled library; counter = its words 1..3."""
    address = (ctypes.c_uint32 * 5)(key[0], key[1], counter[0], counter[1], counter[2])
    words = np.empty(noise.BLOCK, np.uint32)
    backends._functions.flowfast_block_words(address, ctypes.c_int64(block), words.ctypes.data_as(ctypes.c_void_p))
    return words.reshape(4, noise.COUNTERS)


def native_normals(a, b):
    """Both normals of 128 word pairs, through the compiled library."""
    words = np.concatenate([a[:64], b[:64], a[64:], b[64:]]).astype(np.uint32)
    z = np.empty(noise.BLOCK, np.float32)
    pointers = (array.ctypes.data_as(ctypes.c_void_p) for array in (words, z))
    backends._functions.flowfast_words_to_normals(*pointers)
    z = z.reshape(4, noise.COUNTERS)
    return np.concatenate([z[0], z[2]]), np.concatenate([z[1], z[3]])


def lanes(count, seed=0):
    """Random addresses over the whole range of every word."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low, high):
        return torch.randint(low, high, (count,), generator=generator)

    return draw(-(2**63), 2**63 - 1), draw(0, 2**28), draw(0, 2**32), draw(0, 2**32)


def normal(address, n, purpose=1, dtype=torch.float32):
    out = torch.full((len(address[0]), n), math.nan, dtype=dtype)
    torch.ops.flowfast.normal_(out, *address, purpose)
    return out


def bits(tensor):
    return tensor.view({4: torch.int32, 2: torch.int16}[tensor.element_size()])


# A1


@pytest.mark.parametrize("counter, key, expected", KNOWN_ANSWERS)
def test_philox_known_answers(counter, key, expected):
    words = noise.philox(tuple(map(torch.tensor, counter)), tuple(map(torch.tensor, key)))
    assert [int(word) for word in words] == expected


@pytest.mark.parametrize("counter, key, expected", KNOWN_ANSWERS)
def test_philox_known_answers_compiled(counter, key, expected, instruction_set):
    block, q = divmod(counter[0], noise.COUNTERS)
    assert native_words(key, [counter[1], counter[2], counter[3]], block)[:, q].tolist() == expected


def test_counters_up_to_the_last_of_32_bits(instruction_set):
    key, rest = [1, 2], [3, 4, 5]
    for block in (0, (1 << 25) - 1, 1 << 25, (1 << 26) - 1):  # around 2^31 and the last block of a row of 2^34
        counters = block * noise.COUNTERS + torch.arange(noise.COUNTERS)
        expected = noise.philox((counters, *map(torch.tensor, rest)), tuple(map(torch.tensor, key)))
        assert native_words(key, rest, block).tolist() == torch.stack(expected).tolist()


def test_a_row_beyond_the_counters_is_refused(backend):
    lane = torch.zeros(1, dtype=torch.int64)
    out = torch.empty(0, noise.MAX_ELEMENTS + 1)  # no storage: zero rows
    with pytest.raises(RuntimeError, match="at most 2\\^34 elements"):
        torch.ops.flowfast.normal_(out, lane[:0], lane[:0], lane[:0], lane[:0], 0)


def test_planar_map_and_purpose():
    """Element block * 256 + w * 64 + q is word w of counter block * 64 + q; the purpose tops the row word."""
    key, row, candidate, chain = (torch.tensor([value]) for value in (-2, 5, 6, 7))
    words = noise.words(key, row, candidate, chain, 3, 700)
    for element in (0, 63, 64, 255, 256, 699):
        block, rest = divmod(element, 256)
        w, q = divmod(rest, 64)
        counter = tuple(torch.tensor(value) for value in (block * 64 + q, 6, 5 | 3 << 28, 7))
        expected = noise.philox(counter, (torch.tensor(0xFFFFFFFE), torch.tensor(0xFFFFFFFF)))[w]
        assert int(words[0, element]) == int(expected)


# Every backend and instruction set gives the same bits


@pytest.mark.parametrize("n", [1, 7, 123, 256, 1023, 4097])
def test_compiled_equals_reference(n, instruction_set):
    address = lanes(3, seed=n)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        expected = torch.empty(3, n, dtype=dtype)
        noise.normal_reference(expected, *address, 1)
        assert torch.equal(bits(normal(address, n, dtype=dtype)), bits(expected))
    out, expected = torch.empty(3, n), torch.empty(3, n)
    torch.ops.flowfast.uniform_(out, *address, 4)
    noise.uniform_reference(expected, *address, 4)
    assert torch.equal(bits(out), bits(expected))


def extreme_words():
    edges = [0, 1, 255, 256, 511, 2**24, 2**30 - 1, 2**30, 2**31 - 1, 2**31, 2**31 + 1, 3 * 2**30]
    edges += [2**32 - 256, 2**32 - 1]
    edges += [0xAAAAAA00, 0xAAAAAAFF, 0xAAAAAB00]  # around u = 2/3, where the logarithm changes its exponent
    a, b = (grid.ravel() for grid in np.meshgrid(edges, edges))
    return np.pad(a, (0, -len(a) % 128)), np.pad(b, (0, -len(b) % 128))


def test_extreme_words(instruction_set):
    """Finite at the ends of the uniform and of the angle, and equal to the reference."""
    a, b = extreme_words()
    first, second = noise.box_muller(torch.from_numpy(a), torch.from_numpy(b))
    assert bool(first.isfinite().all()) and bool(second.isfinite().all())
    for start in range(0, len(a), 128):
        part = slice(start, start + 128)
        z = native_normals(a[part], b[part])
        assert np.array_equal(z[0], first[part].numpy()) and np.array_equal(z[1], second[part].numpy())


def test_error_against_exact_box_muller():
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randint(0, 2**32, (2, 3, 1 << 16), generator=generator)
    a[1] >>= torch.arange(1 << 16) % 24  # small u, large normals
    a[2] = 2**32 - 1 - (a[2] >> torch.arange(1 << 16) % 24)  # u near 1, normals near 0
    u = ((a >> 8) + 1).double() / 2**24
    radius, angle = (-2 * u.log()).sqrt(), b.double() * (2 * math.pi / 2**32)
    exact = torch.stack((radius * angle.cos(), radius * angle.sin()))
    error = torch.stack(noise.box_muller(a, b)) - exact
    assert float(error.abs().max()) < 1.5e-6
    assert float(error[:, 0].square().mean().sqrt()) < 8e-8
    coarse = exact.bfloat16().double() - exact
    assert float(coarse.square().mean().sqrt()) > 8e-8  # mutant


# A2


@pytest.mark.parametrize("n", [123, 1000])
def test_noise_does_not_depend_on_the_batch(n):
    address = lanes(65)
    everything = normal(address, n)
    for size in (1, 2, 3, 8, 33, 64):
        part = normal([column[:size].contiguous() for column in address], n)
        assert torch.equal(part, everything[:size])
    order = torch.randperm(65, generator=torch.Generator().manual_seed(1))
    assert torch.equal(normal([column[order] for column in address], n), everything[order])


def test_noise_does_not_depend_on_threads_or_on_the_length():
    address = lanes(2)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = normal(address, 300_001)
        torch.set_num_threads(4)
        assert torch.equal(normal(address, 300_001), expected)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(normal(address, 5000), expected[:, :5000])


def test_padding_rows_stay(backend):
    key, row, candidate, chain = lanes(5)
    row[1], row[4] = -1, -7
    candidate[1] = -5  # not looked at
    out = normal((key, row, candidate, chain), 77)
    assert torch.equal(out.isnan().any(1), row < 0) and torch.equal(out.isnan().all(1), row < 0)


# A3


def kolmogorov_smirnov(z):
    ordered = torch.sort(z.double())[0].numpy()
    ranks = np.arange(len(ordered) + 1) / len(ordered)
    cdf = scipy.special.ndtr(ordered)
    return max(np.max(np.abs(cdf - ranks[1:])), np.max(np.abs(cdf - ranks[:-1])))


def test_normals_are_normal():
    n = 1 << 21
    band = math.sqrt(math.log(2 / 1e-6) / (2 * n))
    z = normal(lanes(1, seed=3), n)[0]
    assert kolmogorov_smirnov(z) < band
    assert kolmogorov_smirnov(1.01 * z) > band  # mutant: 1 % too wide
    assert kolmogorov_smirnov(torch.where(z.abs() > 2.6, z / 2, z)) > band  # mutant: no tails
    assert 4.7 < float(z.abs().max()) <= 5.77


def test_uniforms_are_uniform():
    n = 1 << 20
    u = torch.empty(1, n)
    torch.ops.flowfast.uniform_(u, *lanes(1, seed=4), 3)
    ordered = torch.sort(u[0].double())[0]
    ranks = torch.arange(n, dtype=torch.float64) / n
    assert float(u.min()) > 0 and float(u.max()) < 1
    assert max(float((ordered - ranks).abs().max()), float((ordered - ranks - 1 / n).abs().max())) < 0.0027
    largest = noise.words(*lanes(1), 3, 4).fill_(2**32 - 1)
    assert float(((largest >> 9).float() + 0.5).mul(2.0**-23).max()) == 1 - 2**-24


def correlations(z):
    """|rho| sqrt(n) of each row with row 0, and of row 0 with itself shifted by a lane, a plane and a block."""
    z = (z.double() - z.double().mean(1, keepdim=True)) / z.double().std(1, keepdim=True)
    root = math.sqrt(z.size(1))
    rows = [float((z[0] * row).mean()) * root for row in z[1:]]
    shifts = [float((z[0, lag:] * z[0, :-lag]).mean()) * root for lag in (1, 2, 8, 16, 64, 128, 192, 256)]
    return [abs(value) for value in rows + shifts]


def test_neighbouring_addresses_are_uncorrelated():
    """Rows: base, then each word of the address one higher, then a high bit flipped."""
    base = torch.tensor([12, 3, 4, 5])  # key, row, candidate, chain
    words = torch.eye(4, dtype=torch.int64)
    near = [base] + [base + step * word for word in words for step in (1, 1 << 16, 1 << 27)]
    address = torch.stack(near, 1).contiguous().unbind(0)
    z = normal(address, 1 << 17)
    assert max(correlations(z)) < Z_BOUND
    assert max(correlations(z.square())) < Z_BOUND
    other_purpose = normal([column[:1].contiguous() for column in address], 1 << 17, purpose=2)
    assert max(correlations(torch.cat([z[:1], other_purpose]))) < Z_BOUND
    for word in range(4):  # mutants: a word of the address is not used
        mutant = [column.clone() for column in address]
        mutant[word].fill_(int(base[word]))
        assert max(correlations(normal(mutant, 1 << 12))) > Z_BOUND


def test_the_reference_does_not_wait_on_a_device():
    """Nor does it change there: off the CPU every fma takes the way that needs no look at the numbers."""
    address = lanes(2)
    expected = normal(address, 300)
    with FakeDevice(fused=False) as device:
        arguments = [tensor.to(DEVICE) for tensor in (torch.zeros(2, 300), *address)]
        device.clear()
        torch.ops.flowfast.normal_(*arguments, 1)
        assert not device.waits and not device.copies and device.launches
        assert torch.equal(arguments[0].host, expected)


# Mistakes


@pytest.mark.parametrize(
    "position, value, message",
    [
        (0, torch.zeros(3), r"out must have shape \(rows, elements\), got \(3,\)"),
        (0, torch.zeros(3, 4).double().int(), "out must be float32, bfloat16 or float16"),
        (0, torch.zeros(4, 3).t(), "out must be contiguous"),
        (1, torch.zeros(2, dtype=torch.int64), r"key must have shape \(3,\), got \(2,\)"),
        (2, torch.zeros(3), "row must have dtype"),
        (2, torch.tensor([0, 1 << 28, 0]), "row must lie in 0"),
        (3, torch.tensor([0, -1, 0]), "candidate must lie in 0"),
        (4, torch.tensor([0, 1 << 32, 0]), "chain must lie in 0"),
        (5, 16, "purpose must lie in 0..15, got 16"),
    ],
)
@pytest.mark.parametrize("op", ["normal_", "uniform_"])
def test_mistakes_are_named(backend, op, position, value, message):
    arguments = [torch.zeros(3, 4), *(torch.zeros(3, dtype=torch.int64) for _ in range(4)), 0]
    arguments[position] = value
    with pytest.raises(RuntimeError, match=message):
        getattr(torch.ops.flowfast, op)(*arguments)


def test_uniform_is_float32_only(backend):
    lane = torch.zeros(1, dtype=torch.int64)
    with pytest.raises(RuntimeError, match="out must have dtype"):
        torch.ops.flowfast.uniform_(torch.zeros(1, 4).half(), lane, lane, lane, lane, 0)


@pytest.mark.parametrize("op", ["normal_", "uniform_"])
def test_opcheck(backend, op):
    torch.library.opcheck(getattr(torch.ops.flowfast, op).default, (torch.zeros(3, 70), *lanes(3), 1))
