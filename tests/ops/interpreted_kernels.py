"""The Triton kernels in Triton's interpreter against the reference. Collected by test_triton.py only, in a process of
its own; the behaviour that all backends share is tested by the other files of this folder, with backend "triton"."""

import functools
import importlib.util
import sys
import warnings

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st
from ops.test_decide import LATENTS, alone, differing, problem
from ops.test_decide import run as run_round

import flowfast.ops
from flowfast.kernels import _rows
from flowfast.kernels import assign_lanes as lanes_kernel
from flowfast.kernels import branch_step as branch_kernel
from flowfast.kernels import decide as decide_kernel
from flowfast.kernels import gather_ancestors as gather_kernel
from flowfast.kernels import noise as noise_kernel
from flowfast.kernels import posterior_mean as mean_kernel
from flowfast.kernels import resample as resample_kernel
from flowfast.ops import assign_lanes, branch_step, decide, layout, noise, posterior_mean, resample

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SIZES = [1, 7, 123, 1023, 4097]
# Several chunks, which are slow here, in one dtype: where a chunk lies has nothing to do with it.
CASES = [(n, dtype) for n in SIZES for dtype in DTYPES if n < 4097 or dtype == torch.float32]
LANES, PARENTS = 5, 3
NAN = float("nan")


def bits(tensor):
    return tensor.view({8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.int8}[tensor.element_size()])


def bits_but_of_nan(tensor):
    return bits(torch.where(tensor.isnan(), NAN, tensor))


def generator(seed):
    return torch.Generator().manual_seed(seed)


def addresses(lanes, seed=0):
    """key, row, candidate, chain with all bits in use; row 1 is padding."""
    key = torch.randint(-(2**63), 2**63 - 1, (lanes,), generator=generator(seed))
    candidate, chain = torch.randint(0, 2**32, (2, lanes), generator=generator(seed + 1)).unbind()
    row = torch.randint(0, 2**28, (lanes,), generator=generator(seed + 2))
    row[1:2] = -1
    return key, row, candidate, chain


# What is compared stands in functions of its own, so that mutants can be put to it.


def same_noise(kernels, n, dtype, purpose=1):
    columns = addresses(3)
    expected, out = torch.full((2, 3, n), NAN, dtype=dtype).unbind()
    noise.normal_reference(expected, *columns, purpose)
    kernels.normal_(out, *columns, purpose)
    return torch.equal(bits(out), bits(expected)) and bool(out[1].isnan().all())


def same_uniforms(kernels, n):
    columns = addresses(3)
    expected, out = torch.full((2, 3, n), NAN).unbind()
    noise.uniform_reference(expected, *columns, 4)
    kernels.uniform_(out, *columns, 4)
    return torch.equal(bits(out), bits(expected))


def step_operands(n, dtype):
    """Lanes: initial noise, padding, all terms, no noise, no x and no mean from u; NaN where nothing may be read."""
    x, u = torch.randn(2, PARENTS, n, generator=generator(n)).to(dtype).unbind()
    key, _, candidate, chain = addresses(LANES)
    table = torch.randn(5, 8, generator=generator(n + 1))
    table[0] = torch.tensor([0, 0, 1.0, 0, 1, -1, 0, 0])
    table[2, branch_step.C] = 0
    table[3, [branch_step.A, branch_step.E_FROM]] = 0
    table[:, branch_step.D : branch_step.D_FROM] = NAN  # columns of posterior_mean
    parent, row = torch.tensor([2, -1, 1, 0, 1]), torch.tensor([0, 1, 1, 2, 3])
    x[2], u[2] = NAN, NAN  # parent of the initial noise only
    grad = torch.randn(LANES, n, generator=generator(n + 2)).to(dtype)
    grad[0] = NAN
    return [x, u, parent, row, key, candidate, chain, table], grad


def same_step(kernels, n, dtype, with_mean, with_grad):
    operands, grad = step_operands(n, dtype)
    results = []
    for run in (branch_step.reference, kernels.branch_step):
        out, x0_out = torch.full((2, LANES, n), NAN, dtype=dtype).unbind()
        run(*operands, out, x0_out if with_mean else None, grad if with_grad else None)
        results.append((bits(out), bits(x0_out)))
    return all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def same_mean(kernels, n, dtype, guided, last=1.0, d=1.0):
    """Without guidance there is no u_out. The last mean of lane 0 is d * last; the marks of the others stay. At
    guidance 1 the velocity is the conditional one, bit by bit."""
    x, u, uncond = torch.randn(3, LANES, n, generator=generator(n)).to(dtype).unbind()
    table = torch.randn(4, 8, generator=generator(n + 1))
    table[0, posterior_mean.D], table[0, posterior_mean.E] = d, 0
    table[1, posterior_mean.D] = 0
    row = torch.tensor([0, -1, 1, 2, 3])
    guidance = torch.tensor([3.5, 2.0, 0.0, 1.0, -1.5])
    x[0, -1], x[1:3] = last, NAN  # padding, and D = 0
    if guided:
        u[2], uncond[3] = NAN, NAN  # guidance 0 and 1
    results = []
    for run in (posterior_mean.reference, kernels.posterior_mean):
        u_out, x0_out = torch.full((2, LANES, n), 9.0, dtype=dtype).unbind()
        broken = torch.arange(LANES) == 4
        operands = (x, u, uncond if guided else None, guidance if guided else None, row, table)
        run(*operands, u_out if guided else None, x0_out, broken)
        results.append((bits_but_of_nan(u_out), bits_but_of_nan(x0_out), broken))
        if guided and not torch.equal(bits(u_out[3]), bits(u[3])):
            return False
    return all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def same_resample(kernels, slots, particles, scheme, dtype, seed=0):
    weights = torch.rand(slots, particles, dtype=dtype, generator=generator(seed)) ** 6
    weights[torch.rand(slots, particles, generator=generator(seed + 1)) < 0.2] = 0
    weights /= weights.sum(1, keepdim=True)  # NaN where all are 0: the particles stay
    key = torch.randint(-(2**63), 2**63 - 1, (slots,), generator=generator(seed))
    row, enabled = torch.arange(slots), torch.arange(slots) != 1
    expected, ancestors = torch.full((2, slots, particles), -7).unbind()
    resample.reference(weights, key, row, enabled, scheme, expected)
    kernels.resample(weights, key, row, enabled, scheme, ancestors)
    return torch.equal(ancestors, expected)


def same_gather(kernels, n, seed=0):
    """Rows 0..7 in random groups; the first row of a group is the ancestor of all."""
    group = torch.randint(0, 8, (8,), generator=generator(seed))
    ancestors = (group[:, None] == group).int().argmax(1)
    x, u = torch.randint(0, 2**15, (2, 8, n), generator=generator(n)).short().unbind()
    moved = [tensor.view(torch.float16).clone() for tensor in (x, u)]
    kernels.gather_ancestors_(*moved, ancestors)
    return torch.equal(bits(moved[0]), x[ancestors]) and torch.equal(bits(moved[1]), u[ancestors])


def laid(call, seed, width, dtype=torch.float32, state=problem, **sizes):
    """A state in the middle of a search whose lanes `call` has laid."""
    p = state(seed, dtype=dtype, **sizes)
    call(*p.buffers.values(), *p.sizes, width)
    return p


def same_lanes(kernels, seed, width, **sizes):
    return (
        differing(laid(assign_lanes.reference, seed, width, **sizes), laid(kernels.assign_lanes, seed, width, **sizes))
        == []
    )


@functools.cache
def same_orders(kernels):
    """Chains that are scored among others that are not."""
    return all(same_lanes(kernels, seed, 16, chains=8) for seed in range(3))


@functools.cache
def same_where_cut(kernels):
    """Chains want more lanes than there may be."""
    return all(same_lanes(kernels, seed, 3) for seed in range(4))


@functools.cache
def same_in_tiles(kernels):
    """More live lanes than a program has threads, and more chains than a tile."""
    return same_lanes(kernels, 0, 200, slots=3, chains=60, lanes=4, widest=200)


OPTIONS = {"margin": 0.5, "carry": True, "next_width": 7}


def same_decision(kernels, seed, bias=True, width=10, seen=12, sizes=None, options=None, but=()):
    """All tensors after a round, but for those that are named."""
    results = []
    for call in (decide.reference, kernels.decide):
        p = laid(assign_lanes.reference, seed, width, **(sizes or {}))
        rewards, bias_column = p["rewards"][:seen].clone(), p["bias"][:seen].clone() if bias else None
        latents = [p[name] for name in LATENTS]
        sizes_given = p.sizes.slots, p.sizes.lanes, p.sizes.transitions
        chosen = (options or OPTIONS).values()
        call(rewards, 2.21, bias_column, *p.buffers.values(), *latents, *sizes_given, *chosen)
        results.append(p)
    return set(differing(*results)) <= set(but)


@functools.cache  # of the kernel that is right, for all mutants
def same_decisions(kernels, but=()):
    """States in which every rule counts: a mutant of one must be seen in one of them."""
    return all(same_decision(kernels, seed, bias=seed % 2 == 0, but=but) for seed in range(24))


@functools.cache
def same_where_alone(kernels):
    """States in which chains have one candidate for a step, often without a reward."""
    return all(same_decision(kernels, seed, sizes={"state": alone}) for seed in range(12))


def blind(seed, **sizes):
    """A state in which few transitions are scored, and a centre counts where one is; thresholds lie around 0."""
    p = problem(seed, **sizes)
    p.fill(scored=torch.arange(p.sizes.transitions) % 3 == seed % 3, centre=1.0, alive=True)
    p["chain"][layout.QUOTA], p["chain"][layout.LEFT] = 1 + seed % 2, 18
    p["score"][layout.THRESHOLD] -= 1.5
    p["score"][layout.BEST_CHILD] = -torch.inf
    return p


@functools.cache
def same_where_blind(kernels):
    return all(same_decision(kernels, seed, bias=seed % 4 == 0, width=12, sizes={"state": blind}) for seed in range(8))


@triton.jit
def _words_kernel(counter_ptr, key_ptr, out_ptr):
    i = tl.arange(0, 4)
    at = i * 4
    c0, c1, c2, c3 = noise_kernel.philox(
        tl.load(counter_ptr + at).to(tl.uint32),
        tl.load(counter_ptr + at + 1).to(tl.uint32),
        tl.load(counter_ptr + at + 2).to(tl.uint32),
        tl.load(counter_ptr + at + 3).to(tl.uint32),
        tl.load(key_ptr + i * 2).to(tl.uint32),
        tl.load(key_ptr + i * 2 + 1).to(tl.uint32),
    )
    tl.store(out_ptr + at, c0.to(tl.int64))
    tl.store(out_ptr + at + 1, c1.to(tl.int64))
    tl.store(out_ptr + at + 2, c2.to(tl.int64))
    tl.store(out_ptr + at + 3, c3.to(tl.int64))


ONES = 2**32 - 1
KNOWN = [  # counter, key, words; published with Random123
    ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([ONES] * 4, [ONES] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]


def test_philox_known_answers():
    counter, key, out = torch.zeros(4, 4).long(), torch.zeros(4, 2).long(), torch.zeros(4, 4).long()
    for i, (c, k, _) in enumerate(KNOWN):
        counter[i], key[i] = torch.tensor(c), torch.tensor(k)
    _words_kernel[(1,)](counter, key, out)
    assert out[:3].tolist() == [words for _, _, words in KNOWN]


@pytest.mark.parametrize("n", SIZES)
def test_noise_is_the_stream(n):
    assert same_uniforms(noise_kernel, n)
    for dtype in DTYPES:
        assert same_noise(noise_kernel, n, dtype)


@triton.jit
def _normals_kernel(a_ptr, b_ptr, first_ptr, second_ptr, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    first, second = noise_kernel.box_muller(tl.load(a_ptr + i).to(tl.uint32), tl.load(b_ptr + i).to(tl.uint32), False)
    tl.store(first_ptr + i, first)
    tl.store(second_ptr + i, second)


def test_normals_at_the_ends_of_the_words():
    ends = torch.tensor([0, 1, 255, 256, 257, 2**30, 2**31 - 1, 2**31, 2**31 + 1, 3 << 30, ONES - 255, ONES])
    a, b = torch.cartesian_prod(ends, ends).unbind(1)
    size = 1 << (len(a) - 1).bit_length()
    a, b = (torch.nn.functional.pad(word, (0, size - len(word))) for word in (a, b))
    first, second = torch.zeros(2, size).unbind()
    _normals_kernel[(1,)](a, b, first, second, size)
    for got, expected in zip((first, second), noise.box_muller(a, b), strict=True):
        assert torch.equal(bits(got), bits(expected.float()))


@pytest.mark.parametrize(("n", "dtype"), CASES)
def test_step_has_the_bits_of_the_reference(n, dtype):
    assert same_step(branch_kernel, n, dtype, True, True)
    assert same_step(branch_kernel, n, dtype, False, False)


@pytest.mark.parametrize(("n", "dtype"), CASES)
def test_mean_has_the_bits_of_the_reference(n, dtype):
    assert same_mean(mean_kernel, n, dtype, True)
    assert same_mean(mean_kernel, n, dtype, False)
    largest = torch.finfo(dtype).max
    for last, d in ((NAN, 1.0), (largest, 1.0), (largest, 2.0), (-largest, 1.0), (-largest, 2.0)):
        assert same_mean(mean_kernel, n, dtype, False, last, d)


@pytest.mark.parametrize(("dtype", "limit"), [(torch.bfloat16, 0x7F7F8000), (torch.float16, 0x477FF000)])
def test_a_mean_that_rounds_to_infinity_is_broken_and_the_number_below_is_not(dtype, limit):
    for number in torch.tensor([limit - 1, limit], dtype=torch.int32).view(torch.float32).tolist():
        assert same_mean(mean_kernel, 123, dtype, False, 1.0, number)
        assert same_mean(mean_kernel, 123, dtype, False, -1.0, number)


@pytest.mark.parametrize("scheme", resample.RESAMPLING.values(), ids=resample.RESAMPLING)
def test_ancestors_are_those_of_the_reference(scheme):
    for slots, particles in ((1, 1), (9, 2), (4, 7), (3, 123), (1, 1023)):
        assert same_resample(resample_kernel, slots, particles, scheme, torch.float32)
    assert same_resample(resample_kernel, 1, resample_kernel.MAX_PARTICLES, scheme, torch.float64)


def test_more_particles_than_a_program_holds_go_to_the_reference():
    n = resample_kernel.MAX_PARTICLES + 1
    weights, lane = torch.full((1, n), 1 / n), torch.zeros(1, dtype=torch.int64)
    ancestors = torch.full((1, n), -7)
    with flowfast.ops.use_backend("triton"):
        torch.ops.flowfast.resample(weights, lane, lane, lane == 0, resample.SSP, ancestors)
    assert torch.equal(ancestors[0], torch.arange(n))


@settings(max_examples=20, deadline=None, derandomize=True, database=None)
@given(particles=st.integers(1, 40), scheme=st.integers(0, 4), seed=st.integers(0, 2**32))
def test_random_ancestors_are_those_of_the_reference(particles, scheme, seed):
    assert same_resample(resample_kernel, 2, particles, scheme, torch.float32, seed)


# 70 or 130 lanes a chain: a chain fills a tile. 200 lanes in all, or slots by rows: several tiles.
SIZES_OF_A_SEARCH = {
    "slots": st.integers(1, 3),
    "chains": st.integers(1, 5),
    "lanes": st.sampled_from([1, 2, 3, 4, 70, 130]),
    "rows": st.sampled_from([1, 2, 5, 80]),
    "widest": st.sampled_from([1, 16, 70, 200]),
}


@settings(max_examples=30, deadline=None, derandomize=True, database=None)
@given(seed=st.integers(0, 2**32), sizes=st.fixed_dictionaries(SIZES_OF_A_SEARCH), data=st.data())
def test_lanes_are_those_of_the_reference(seed, sizes, data):
    assert same_lanes(lanes_kernel, seed, data.draw(st.integers(0, sizes["widest"])), **sizes)


def test_lanes_of_several_tiles_are_those_of_the_reference():
    assert same_in_tiles(lanes_kernel)


@settings(max_examples=50, deadline=None, derandomize=True, database=None)
@given(
    seed=st.integers(0, 2**32),
    sizes=st.fixed_dictionaries(
        SIZES_OF_A_SEARCH
        | {"top": st.integers(1, 4), "n": st.sampled_from([1, 9, 2049]), "dtype": st.sampled_from(DTYPES)}
    ),
    bias=st.booleans(),
    margin=st.sampled_from([0.0, 0.5]),
    carry=st.booleans(),
    data=st.data(),
)
def test_decisions_are_those_of_the_reference(seed, sizes, bias, margin, carry, data):
    width, next_width = data.draw(st.integers(0, sizes["widest"])), data.draw(st.integers(-1, sizes["widest"]))
    seen = data.draw(st.integers(width, sizes["widest"]))
    options = {"margin": margin, "carry": carry, "next_width": next_width}
    assert same_decision(decide_kernel, seed, bias, width, seen, sizes, options)


def test_decide_comes_through_the_dispatch():
    with flowfast.ops.use_backend("triton"):
        decided = run_round(problem(4, n=4096))
        wrong = problem(5)
        wrong.buffers["floats"] = wrong.buffers["floats"][:-1]
        with pytest.raises(RuntimeError, match="floats must have shape"):
            run_round(wrong)
    with flowfast.ops.use_backend("reference"):
        assert differing(decided, run_round(problem(4, n=4096))) == []
    assert (
        int(decided["ticket"]) == 0 and not bool(decided["broken"].any()) and bool((decided["top_source"] >= 0).any())
    )


@pytest.mark.parametrize("n", [1, 123, 2048, 4097])
def test_gather_is_indexing(n):
    assert all(same_gather(gather_kernel, n, seed) for seed in range(5))


FP32 = torch.float32
MUTANTS = [  # file, text, what it becomes, the comparison that must see it
    ("noise", "0x9E3779B9", "0x9E3779BA", (same_noise, 123, FP32)),
    ("noise", "philox(counter, candidate,", "philox(counter + 1, candidate,", (same_uniforms, 7)),
    ("noise", "w * COUNTERS", "(3 - w) * COUNTERS", (same_noise, 1023, FP32)),
    ("branch_step", "coefficients + 6", "coefficients + 4", (same_step, 7, FP32, True, False)),
    ("branch_step", "key_ptr + lane", "key_ptr + parent", (same_step, 7, FP32, False, False)),
    ("branch_step", "(row != 0)", "(row != 1)", (same_step, 7, FP32, False, False)),
    ("branch_step", "u_ptr + source", "u_ptr + target", (same_step, 7, FP32, False, False)),
    ("branch_step", "plain = (a != 0) & (b != 0)", "plain = (c != 0)", (same_step, 7, FP32, False, False)),
    ("branch_step", "_add(g, ", "_add(a, ", (same_step, 7, FP32, True, True)),
    ("posterior_mean", "guided - base, base)", "guided - base, guided)", (same_mean, 7, FP32, True)),
    ("posterior_mean", "& (w != 1)", "", (same_mean, 7, FP32, True)),  # reads a null velocity that it multiplies by 0
    ("posterior_mean", "row * 8 + 4", "row * 8 + 6", (same_mean, 7, FP32, False)),
    ("resample", "full = both >= total", "full = both > total", (same_resample, 1, 4, 4, FP32, 3)),
    ("resample", "count_not_above(further, ", "count_not_above(counts, ", (same_resample, 3, 7, 0, FP32)),
    ("resample", "missing = n - tl.sum(whole)", "missing = n - tl.sum(whole) - 1", (same_resample, 3, 7, 3, FP32)),
    ("gather_ancestors", "if ancestor == slot:", "if ancestor != slot:", (same_gather, 7)),
    ("posterior_mean", "& 0x7FFFFFFF", "& 0x3FFFFFFF", (same_mean, 7, torch.bfloat16, False, 1.7e38, 2.0)),
    ("posterior_mean", "tl.where(mask, magnitude, 0)", "magnitude ^ 0x7F800000", (same_mean, 7, FP32, False)),
    ("assign_lanes", "(i < width)", "(i <= width)", (same_where_cut,)),
    ("assign_lanes", "tl.minimum(taken, width)", "taken", (same_where_cut,)),
    ("assign_lanes", "tl.where(live, i, 0)", "i", (same_where_cut,)),
    ("assign_lanes", "(others == 1)", "(others == 0)", (same_orders,)),  # the others before those that are scored
    ("assign_lanes", "taken += _lay_tile(first, taken,", "taken += _lay_tile(first, 0,", (same_orders,)),
    ("assign_lanes", "f.to_end + at + 1", "f.to_end + at", (same_orders,)),
    ("assign_lanes", ".to(tl.int32) // passes", ".to(tl.int32)", (same_orders,)),
    ("assign_lanes", "inside & (passes == 2), other=1.0)", "inside, other=1.0)", (same_orders,)),
    ("assign_lanes", "_lanes(live, f, sizes, THREADS)", "_lanes(N, f, sizes, THREADS)", (same_orders,)),
    ("assign_lanes", "tl.cumsum(null, 0) - 1", "tl.sum(null) - tl.cumsum(null, 0)", (same_orders,)),
    ("assign_lanes", "(found + tl.cumsum", "(tl.cumsum", (same_in_tiles,)),
    ("assign_lanes", "(i >= found)", "(i > found)", (same_orders,)),
    # Books in the first program: the others then read the new state.
    ("decide", "if ticket == tl.num_programs(0) * tl.num_programs(1) - 1:", "if ticket == 0:", (same_decisions,)),
    (
        "decide",
        "if ticket == tl.num_programs(0) * tl.num_programs(1) - 1:",
        "if tl.program_id(0) + tl.program_id(1) == 0:",
        (same_decisions, ("ticket",)),
    ),
    ("decide", "tl.store(f.ticket, tl.zeros", "tl.store(f.ticket, 1 + tl.zeros", (same_decisions,)),
    ("decide", "unsound = seen & (broken |", "unsound = seen & (", (same_decisions,)),
    ("decide", "(tried + used == 1) & intact", "(tried + used == 1)", (same_where_alone,)),
    ("decide", "alone = (advance == 3) &", "alone = (advance == 9) &", (same_where_alone,)),
    ("decide", "tl.math.div_rn(score, r.temperature)", "score * (1 / r.temperature)", (same_decisions,)),
    ("decide", "first + 1)", "first + 2)", (same_decisions,)),
    ("decide", "reward > tl.load(f.top_reward", "reward >= tl.load(f.top_reward", (same_decisions,)),
    ("decide", "(cell > after)", "(cell >= after)", (same_decisions,)),
    ("decide", "place = top - 1 - i  # samples", "place = i  # samples", (same_decisions,)),
    ("decide", "place = top - 1 - i  # from", "place = i  # from", (same_decisions,)),
    ("decide", "tl.where(t == last, tried + k, candidate)", "candidate", (same_decisions,)),
    ("decide", "(best_sample < until)", "(best_sample <= until)", (same_decisions,)),
    ("decide", "live & (lane < r.count) & scored[:, None]", "live & (lane < r.count)", (same_where_blind,)),
    ("decide", "live & (scored == 0)[:, None], tl.where(", "live & (lane < 0), tl.where(", (same_where_blind,)),
    ("decide", "tl.where(broken, NONE, 0.0)", "0.0", (same_where_blind,)),
    ("decide", "!= 0) & scored", "!= 0)", (same_where_blind,)),  # the first unscored child is taken
    ("decide", "live & (scored == 0)[:, None], UNKNOWN", "live & (lane < 0), UNKNOWN", (same_where_blind,)),
    ("decide", "tl.where(scored, spent, 0)", "spent", (same_where_blind,)),
    ("decide", "won & scored", "won", (same_where_blind,)),
    ("decide", "valued = stepped & scored", "valued = stepped", (same_where_blind,)),
    ("decide", "reward - tl.load(f.centre + at, mask=inside, other=0.0)[:, None]", "reward", (same_where_blind,)),
    ("decide", "child_reward - centre, threshold)", "child_reward, threshold)", (same_where_blind,)),
    ("decide", "child_reward - centre > threshold", "child_reward > threshold", (same_where_blind,)),
    ("decide", "| (image_sum - image_sum != 0.0)", "", (same_decisions,)),
    ("decide", "f.passes + at,", "f.passes + tl.minimum(at + 1, T - 1),", (same_decisions,)),
    ("decide", "f.passes + at,", "f.passes + at * 0,", (same_decisions,)),
    ("decide", "left - spent * passes", "left - spent", (same_decisions,)),
    ("decide", "(EVALUATIONS * S + s), spent,", "(EVALUATIONS * S + s), used,", (same_decisions,)),
    ("decide", "(spent - used) * passes", "spent - used", (same_decisions,)),
]  # fmt: skip


@pytest.mark.parametrize("file, text, becomes, comparison", MUTANTS, ids=[f"{m[0]}: {m[2]}" for m in MUTANTS])
def test_the_comparisons_see_a_wrong_kernel(file, text, becomes, comparison, tmp_path):
    """A copy of the kernel's file with one thing changed must not pass for the kernel."""
    original = sys.modules[f"flowfast.kernels.{file}"]
    with open(original.__file__) as source:
        right = source.read()
    assert text in right, "the mutation no longer applies"
    path = tmp_path / f"{file}.py"
    path.write_text(right.replace(text, becomes))
    spec = importlib.util.spec_from_file_location(f"mutant_{file}", path)
    mutant = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(mutant)
    holds, *arguments = comparison
    assert holds(original, *arguments)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # overflows of numbers that make no sense
        assert not holds(mutant, *arguments)


@triton.jit
def _offset_kernel(row_ptr, n, first, out_ptr, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    tl.store(out_ptr + i, _rows.element_offset(tl.load(row_ptr + i), n, first))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_offsets_beyond_32_bits(dtype):
    """Columns of rows and numbers of programs come in 64 and in 32 bits; neither may overflow."""
    rows = torch.tensor([0, 1, 8, 9, 2**15, 2**20, 2**31 - 1, 3], dtype=dtype)
    for n, first in ((2**28, 5), (2**28 + 1, 2**33), (2**31 - 1, 2**31)):
        out = torch.zeros(8, dtype=torch.int64)
        _offset_kernel[(1,)](rows, n, first, out, 8)
        assert out.tolist() == [row * n + first for row in rows.tolist()]


@pytest.mark.parametrize("rows", [1, 8, 70_000])
@pytest.mark.parametrize("n", [1, 1023, 1024, 262_144, 2**31, 2**34])
def test_the_grid_covers_every_chunk_once(rows, n):
    (x, y), run = _rows.cut(rows, n, 1024, torch.device("cpu"))
    chunks = -(-n // 1024)
    assert x == rows and y <= 65535 and run >= 1
    assert (y - 1) * run < chunks <= y * run


def test_short_runs_until_every_processor_is_busy(monkeypatch):
    monkeypatch.setattr(_rows, "_multiprocessors", lambda device: 132)
    device = torch.device("cpu")
    assert _rows.cut(1, 262_144, 1024, device) == ((1, 256), 1)
    assert _rows.cut(128, 262_144, 1024, device) == ((128, 64), 4)


def test_the_dispatch_calls_the_kernels_not_the_reference(monkeypatch):
    """What stands behind torch.ops while "triton" is forced is the launcher of kernels/."""
    calls = []
    monkeypatch.setattr(gather_kernel, "gather_ancestors_", lambda *operands: calls.append(operands))
    x, ancestors = torch.zeros(2, 3), torch.tensor([0, 0])
    with flowfast.ops.use_backend("triton"):
        torch.ops.flowfast.gather_ancestors_(x, x.clone(), ancestors)
    assert len(calls) == 1
    torch.ops.flowfast.gather_ancestors_(x, x.clone(), ancestors)
    assert len(calls) == 1
