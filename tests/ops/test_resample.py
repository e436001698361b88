import math

import pytest
import torch
from fake_device import DEVICE, FakeDevice
from hypothesis import given, settings
from hypothesis import strategies as st

from flowfast.ops import noise
from flowfast.ops import resample as resample_module
from flowfast.ops.resample import RESAMPLING, ancestors_from_counts, count_offspring, reference, scale_by_word

SCHEMES = list(RESAMPLING)
KEY = 0x243F6A8885A308D3
REPEATS = 25_000  # times eight weight vectors: 2e5

WEIGHTS = {
    "equal": torch.ones(8),
    "linear": torch.arange(1.0, 9.0),
    "random": torch.rand(13, generator=torch.Generator().manual_seed(1)),
    "skewed": torch.rand(16, generator=torch.Generator().manual_seed(2)) ** 6,
    "with zeros": torch.tensor([0.0, 3.0, 0.0, 0.0, 1.0, 2.5, 0.0]),
    "nearly one-hot": torch.tensor([0.01, 0.01, 10.0, 0.01]),
    "two": torch.tensor([0.3, 0.7]),
    "alternating": torch.tensor([1.0, 0.1] * 10),
}


def normalized(weights):
    return weights / weights.sum(-1, keepdim=True)


def resample(weights, scheme, key=KEY, row=None, enabled=None):
    slots = len(weights)
    ancestors = torch.full(weights.shape, -7)
    row = torch.arange(slots) if row is None else row
    enabled = torch.ones(slots, dtype=torch.bool) if enabled is None else enabled
    torch.ops.flowfast.resample(weights, torch.full((slots,), key), row, enabled, RESAMPLING[scheme], ancestors)
    return ancestors


def counts_of(ancestors):
    return torch.zeros_like(ancestors).scatter_add_(1, ancestors, torch.ones_like(ancestors))


def worst_z(counts, weights):
    """Largest |z| of the mean counts (repeats, N) against N W."""
    expected = len(weights) * weights.double()
    fraction = expected % 1
    spread = torch.maximum(counts.double().var(0), fraction * (1 - fraction))  # no integer varies less than that
    error = (counts.double().mean(0) - expected).abs() - 1e-6  # float32 weights sum to 1 + 1e-7
    return (error.clamp(min=0) / (spread / len(counts)).sqrt()).nan_to_num(0).max().item()  # 0 / 0: exact


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("vector", WEIGHTS)
def test_unbiased(scheme, vector):
    weights = normalized(WEIGHTS[vector])
    counts = counts_of(resample(weights.expand(REPEATS, -1).contiguous(), scheme))
    assert worst_z(counts, weights) < 4.9


def biased_words(word):
    """Uniforms that are squares of uniforms."""
    return word * (word >> 1) >> 31


def low_words(word):
    """Uniforms of a generator with 31 bits that is taken for one with 32."""
    return word >> 1


@pytest.mark.parametrize("mutant", [biased_words, low_words])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_bias_is_seen(scheme, mutant):
    generator = torch.Generator().manual_seed(5)
    worst = {False: 0.0, True: 0.0}
    for weights in map(normalized, WEIGHTS.values()):
        word = torch.randint(0, 2**32, (REPEATS, len(weights)), generator=generator)
        for mutated in worst:
            counts, _ = count_offspring(
                weights.expand(REPEATS, -1), mutant(word) if mutated else word, RESAMPLING[scheme]
            )
            worst[mutated] = max(worst[mutated], worst_z(counts, weights))
    assert worst[False] < 4.9 < worst[True]


def test_a_residual_draw_from_the_weights_is_seen():
    """Mutant: the missing copies drawn in proportion to W instead of to what is left of N W."""
    weights = normalized(WEIGHTS["linear"])
    word = torch.randint(0, 2**32, (REPEATS, 8), generator=torch.Generator().manual_seed(6))
    floors = (8 * weights.double()).floor().long()
    missing = 8 - int(floors.sum())
    chosen = torch.searchsorted(weights.double().cumsum(0), word[:, :missing].double() / 2**32, right=True)
    assert worst_z(floors + counts_of_draws(chosen, 8), weights) > 4.9


def test_a_fair_coin_in_ssp_is_seen(monkeypatch):
    """Mutant: the two that meet toss a fair coin instead of one with the odds that keep their expectations."""
    weights = normalized(WEIGHTS["linear"])
    word = torch.randint(0, 2**32, (REPEATS, 8), generator=torch.Generator().manual_seed(12))
    monkeypatch.setattr(resample_module, "scale_by_word", lambda word, total: torch.where(word < 2**31, -1, total))
    counts, _ = count_offspring(weights.expand(REPEATS, -1), word, RESAMPLING["ssp"])
    assert worst_z(counts, weights) > 4.9


def counts_of_draws(chosen, n):
    zeros = torch.zeros(len(chosen), n, dtype=torch.int64)
    return zeros.scatter_add_(1, chosen, torch.ones_like(chosen))


def dyadic_weights(slots, particles, seed, grains=4096):
    """Weights k / 4096 with whole k and sum exactly 1, some of them 0: N W is exact in float32 and float64."""
    generator = torch.Generator().manual_seed(seed)
    shares = torch.rand(slots, particles, generator=generator) ** 3 + 1e-9
    return counts_of_draws(torch.multinomial(shares, grains, replacement=True, generator=generator), particles) / grains


@pytest.mark.parametrize("particles", [1, 2, 3, 16, 41, 123, 256, 1023])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_hard_bounds(backend, scheme, particles):
    weights = dyadic_weights(64, particles, particles)
    counts = counts_of(resample(weights, scheme))
    expected = particles * weights.double()
    assert (counts.sum(1) == particles).all()
    assert (counts[weights == 0] == 0).all()
    if scheme in ("systematic", "ssp", "residual"):
        assert (counts >= expected.floor()).all()
    if scheme in ("systematic", "ssp"):
        assert (counts <= expected.ceil()).all()
    if scheme == "stratified":
        assert ((counts - expected).abs() < 2).all()


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("word", [0, 2**32 - 1])
def test_the_ends_of_the_uniforms_choose_no_zero_weight(scheme, word):
    """Kills `<=` for `<` in the choice of the index."""
    weights = torch.tensor([[0.0, 0.25, 0.0, 0.0, 0.75, 0.0]])
    counts, valid = count_offspring(weights, torch.full((1, 6), word), RESAMPLING[scheme])
    assert valid.all() and counts.sum() == 6
    assert (counts[weights == 0] == 0).all()


def test_a_float32_cumulative_sum_falls_short():
    """Control: what the integer sums are for. The usual code sends draws of these weights to index N."""
    weights = normalized(torch.rand(2000, 1024, generator=torch.Generator().manual_seed(7)))
    cumulative = weights.cumsum(1)
    last = 1 - 2.0**-24 / 1024
    short = cumulative[:, -1] < last
    assert short.float().mean() > 0.2
    beyond = torch.searchsorted(cumulative[short].contiguous(), torch.full((int(short.sum()), 1), last), right=True)
    assert (beyond == 1024).any()
    for scheme, number in RESAMPLING.items():
        counts, valid = count_offspring(weights, torch.full(weights.shape, 2**32 - 1), number)
        assert valid.all() and (counts.sum(1) == 1024).all(), scheme


@pytest.mark.parametrize("scheme", SCHEMES)
class TestEdges:
    def test_one_hot(self, backend, scheme):
        for particles in (1, 2, 7, 1024):
            weights = torch.eye(particles)[:: max(1, particles // 9)].contiguous()
            hot = weights.argmax(1, keepdim=True)
            assert torch.equal(resample(weights, scheme), hot.expand(-1, particles))

    def test_one_particle(self, backend, scheme):
        assert resample(torch.ones(3, 1), scheme).tolist() == [[0], [0], [0]]

    def test_equal_weights_keep_everyone_where_the_scheme_allows(self, backend, scheme):
        ancestors = resample(torch.full((5, 16), 1 / 16), scheme)
        assert torch.equal(ancestors, torch.arange(16).expand(5, -1)) == (scheme != "multinomial")

    def test_no_distribution_keeps_everyone(self, backend, scheme):
        rows = [[math.nan] * 3, [0.5, math.nan, 0.5], [0.0] * 3, [0.7, -0.1, 0.4], [math.inf, 0, 0], [9.0, 9.0, 9.0]]
        ancestors = resample(torch.tensor(rows), scheme)
        assert torch.equal(ancestors, torch.arange(3).expand(6, -1))

    def test_from_log_weights(self, backend, scheme):
        log_weights = torch.tensor([[1e4, -1e4, 1e4, -math.inf], [-math.inf] * 4, [math.nan, -1e4, math.nan, -2e4]])
        weights, (ess, normalizer) = torch.empty(3, 4), torch.empty(2, 3)
        torch.ops.flowfast.normalize_log_weights(log_weights, weights, ess, normalizer)
        ancestors = resample(weights, scheme)
        assert set(ancestors[0].tolist()) <= {0, 2}
        assert ancestors[1].tolist() == [0, 1, 2, 3]
        assert ancestors[2].tolist() == [1] * 4

    def test_many_particles(self, backend, scheme):
        weights = normalized(torch.rand(1, 2**16, generator=torch.Generator().manual_seed(8)) ** 8)
        ancestors = resample(weights, scheme)
        assert ancestors.min() >= 0 and ancestors.max() < 2**16
        assert torch.equal(ancestors[0][ancestors[0]], ancestors[0])
        assert (counts_of(ancestors) - 2**16 * weights.double()).abs().max() < 40

    def test_disabled_slots_keep_everyone_whatever_the_address(self, backend, scheme):
        weights = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
        enabled = torch.tensor([True, False, True])
        ancestors = resample(weights, scheme, row=torch.tensor([3, -1, 4]), enabled=enabled)
        assert ancestors.tolist() == [[0, 0], [0, 1], [1, 1]]

    def test_does_not_depend_on_the_batch(self, backend, scheme):
        weights = normalized(torch.rand(40, 33, generator=torch.Generator().manual_seed(9)))
        together = resample(weights, scheme)
        order = torch.randperm(40, generator=torch.Generator().manual_seed(10))
        assert torch.equal(resample(weights[order], scheme, row=order), together[order])
        assert torch.equal(resample(weights[7:8], scheme, row=torch.tensor([7])), together[7:8])
        assert not torch.equal(resample(weights, scheme, key=KEY + 1), together)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_equals_the_reference(backend, scheme, dtype):
    for slots, particles in ((1, 1), (300, 2), (41, 123), (20, 1023), (9, 4096)):
        generator = torch.Generator().manual_seed(particles)
        weights = torch.rand(slots, particles, dtype=dtype, generator=generator) ** 8
        weights[torch.rand(slots, particles, generator=generator) < 0.1] = 0
        weights = normalized(weights)
        row, enabled = torch.arange(slots), torch.rand(slots, generator=generator) < 0.9
        expected = torch.empty(slots, particles, dtype=torch.int64)
        reference(weights, torch.full((slots,), KEY), row, enabled, RESAMPLING[scheme], expected)
        assert torch.equal(resample(weights, scheme, row=row, enabled=enabled), expected)


def ssp_oracle(weights, words):
    """Srinivasan sampling process in exact integers: one pair after the other, one gains what the other gives."""
    n, quantized = len(weights), [round(w * 2**40) for w in weights]
    total = sum(quantized)
    counts = [n * q // total for q in quantized]
    held = [n * q % total for q in quantized]
    i = 0
    for j in range(1, n):
        up_i = min(held[j], total - held[i])  # what i gains when j gives
        up_j = min(held[i], total - held[j])
        room = held[i] + held[j] < total  # nobody becomes a copy: gaining is staying; else gaining is becoming a copy
        j_stays = words[j] * (up_i + up_j) // 2**32 < (up_i if room else up_j)  # P(j gains) = up_i / (up_i + up_j)
        if j_stays == room:
            held[j], held[i] = held[j] + up_j, held[i] - up_j
        else:
            held[i], held[j] = held[i] + up_i, held[j] - up_i
        for one in (i, j):
            if held[one] == total:
                counts[one], held[one] = counts[one] + 1, 0
        if j_stays:
            i = j
    assert held == [0] * n
    return counts


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(st.lists(st.integers(0, 1000), min_size=1, max_size=12).filter(any), st.integers(0, 2**32))
def test_ssp_follows_its_definition(shares, seed):
    weights = normalized(torch.tensor([shares], dtype=torch.float64))
    word = torch.randint(0, 2**32, weights.shape, generator=torch.Generator().manual_seed(seed))
    counts, _ = count_offspring(weights, word, RESAMPLING["ssp"])
    assert counts[0].tolist() == ssp_oracle(weights[0].tolist(), word[0].tolist())


@pytest.mark.parametrize("word", [0, 1, 2**31, 2**32 - 1])
def test_scale_by_word_is_exact(word):
    totals = [0, 1, 2**31 - 1, 2**31, 2**40 + 12345, 2**61 - 1, 2**61]
    result = scale_by_word(torch.tensor(word), torch.tensor(totals))
    assert result.tolist() == [word * total // 2**32 for total in totals]


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(particles=st.integers(1, 40), seed=st.integers(0, 2**32))
def test_survivors_keep_their_slots(particles, seed):
    """10,000 cases: the counts are kept, survivors stay, dead slots are filled in order."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(0, particles, (100, particles), generator=generator) ** 2 // particles
    counts = counts_of_draws(drawn, particles)
    ancestors = ancestors_from_counts(counts)
    assert torch.equal(counts_of(ancestors), counts)
    for count, ancestor in zip(counts.tolist(), ancestors.tolist(), strict=True):
        further = iter([i for i in range(particles) for _ in range(count[i] - 1)])
        assert ancestor == [i if count[i] else next(further) for i in range(particles)]


def test_words_are_addressed():
    """Systematic resampling uses element 0 of (key, row, candidate 0, chain 0, purpose 3), and only that."""
    weights = normalized(torch.rand(1, 300, generator=torch.Generator().manual_seed(11))).double()
    key, row, zero = torch.tensor([KEY]), torch.tensor([5]), torch.tensor([0])
    word = noise.words(key, row, zero, zero, noise.RESAMPLING, 1)
    counts, _ = count_offspring(weights, word.expand(1, 300), RESAMPLING["systematic"])
    assert torch.equal(counts, counts_of(resample(weights, "systematic", row=row)))


def operands():
    key, row, enabled = torch.arange(4), torch.arange(4), torch.ones(4, dtype=torch.bool)
    return [normalized(torch.arange(1.0, 13.0).view(4, 3)), key, row, enabled, 2, torch.zeros(4, 3).long()]


@pytest.mark.parametrize(
    "position, value, message",
    [
        (0, torch.zeros(4, 3).half(), "weights must be float32 or float64"),
        (0, torch.zeros(4), r"weights must have shape \(slots, particles\)"),
        (0, torch.zeros(4, 0), r"with 1..1048576 particles, got \(4, 0\)"),
        (1, torch.zeros(4), "key must have dtype"),
        (2, torch.arange(3), r"row must have shape \(4,\), got \(3,\)"),
        (2, torch.tensor([0, 1, 2, -1]), "row must lie in 0.."),
        (2, torch.tensor([0, 1, 2, 2**28]), "row must lie in 0.."),
        (3, torch.ones(4), "enabled must have dtype"),
        (4, 5, "scheme must be one of 0 multinomial, 1 stratified, 2 systematic, 3 residual, 4 ssp, got 5"),
        (5, torch.zeros(4, 3), "ancestors must have dtype"),
        (5, torch.zeros(3, 4).long().t(), "ancestors must be contiguous"),
    ],
)
def test_wrong_operands(backend, position, value, message):
    arguments = operands()
    arguments[position] = value
    with pytest.raises(RuntimeError, match=message):
        torch.ops.flowfast.resample(*arguments)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_reference_never_waits_for_the_device(scheme):
    with FakeDevice(fused=False) as device:
        arguments = [value.to(DEVICE) if isinstance(value, torch.Tensor) else value for value in operands()]
        arguments[4] = RESAMPLING[scheme]
        device.clear()
        torch.ops.flowfast.resample(*arguments)
    assert not device.waits and not device.copies and device.launches


def test_opcheck_and_script(backend):
    torch.library.opcheck(torch.ops.flowfast.resample.default, tuple(operands()))

    @torch.jit.script
    def scripted(
        weights: torch.Tensor,
        key: torch.Tensor,
        row: torch.Tensor,
        enabled: torch.Tensor,
        scheme: int,
        ancestors: torch.Tensor,
    ):
        torch.ops.flowfast.resample(weights, key, row, enabled, scheme, ancestors)

    arguments, expected = operands(), operands()
    scripted(*arguments)
    reference(*expected)
    assert torch.equal(arguments[5], expected[5])
