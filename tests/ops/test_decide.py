"""assign_lanes and decide: C++ and the PyTorch reference leave the same bits in every tensor, and refuse the same
mistakes. What they should decide is checked through whole searches (tests/methods, tests/rounds: oracles, enumeration,
accounts)."""

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import flowfast.ops
from flowfast.ops import layout
from flowfast.ops.layout import Sizes, make_buffers, views

LATENTS = ("x_lane", "u_lane", "x0_lane", "x", "u", "top_x", "top_x0")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


class Problem(dict):
    """Operands and the fields of the packed buffers, by name."""

    def __init__(self, sizes):
        self.sizes, self.buffers = sizes, make_buffers(sizes)
        super().__init__(views(self.buffers, sizes))

    def fill(self, **fields):
        for name, values in fields.items():
            self[name].copy_(values)
        return self

    def cost(self, passes):
        """NFE of an evaluation at each transition."""
        self["passes"].copy_(torch.as_tensor(passes))
        self["to_end"][:-1], self["to_end"][-1] = self["passes"].flip(0).cumsum(0).flip(0), 0
        return self


def problem(seed, slots=2, chains=3, lanes=2, rows=5, top=2, n=9, dtype=torch.float32, widest=16):
    """A state in the middle of a search, with ties among the rewards; chains may be dead, over, or out of quota, some
    transitions are not scored, some means and images not finite."""
    g = torch.Generator().manual_seed(seed)

    def integers(high, *shape):
        return torch.randint(0, high, shape, generator=g)

    def coin(p, *shape):
        return torch.rand(shape, generator=g) < p

    p = Problem(Sizes(slots, chains, lanes, rows, widest, top))
    B = p.sizes.batch
    rewards = integers(7, widest).float() / 2
    row = integers(rows, B)
    p.cost(1 + integers(2, rows))
    left = (p["to_end"][row] + integers(12, B) - 3).clamp(min=0)  # now and then too little for the way to the end
    p.update(rewards=torch.where(coin(0.1, widest), torch.nan, rewards), bias=torch.randn(widest, generator=g))
    p.fill(
        chain=torch.stack([integers(2, B), row, integers(5, B), left, integers(4, B), integers(4, B)]),
        score=torch.stack([integers(7, B).float() / 2 for _ in range(4)]),
        alive=coin(0.8, B),
        slot=torch.stack([integers(2**40, slots), *(integers(50, slots) for _ in range(6))]),
        slot_real=torch.stack([torch.rand(slots, generator=g), torch.where(coin(0.5, slots), 3.0, torch.inf)]),
        given=coin(0.3, slots),
        quota_table=integers(4, B, rows),
        path_chain=integers(chains, B, rows),
        path_candidate=integers(9, B, rows),
        top_reward=torch.sort(integers(7, slots, top).float() / 2 - 1, descending=True)[0],
        top_transition=integers(rows, slots, top),
        top_chain=integers(chains, slots, top, rows),
        top_candidate=integers(9, slots, top, rows),
        accept=coin(0.6, rows),
        finished=coin(0.5, rows),
        scored=coin(0.8, rows),
        centre=torch.where(coin(0.5, rows), integers(3, rows).float() / 2, 0.0),
        time=torch.linspace(1, 0, rows + 1),
        linear_time=torch.linspace(1, 0.1, rows + 1),
        image_sum=torch.where(coin(0.3, widest), torch.tensor([torch.nan, torch.inf])[integers(2, widest)], 5.0),
        position=99,
        broken=coin(0.1, widest),
        dense=99.0,
        status=99,
        advance=99,
        store_source=99,
        top_source=99,
    )
    counts = {"x": 2 * B, "u": 2 * B, "top_x": slots * top, "top_x0": slots * top}
    for name in LATENTS:
        p[name] = torch.randn(counts.get(name, widest), n, generator=g).to(dtype)
    return p


def alone(seed, **sizes):
    """A state in which many chains have one candidate for their step, often without a reward or from a broken model."""
    p = problem(seed, **sizes)
    p["chain"][layout.QUOTA], p["chain"][layout.TRIED] = 1, 0
    p["score"][layout.BEST_CHILD] = -torch.inf
    p["rewards"][::2] = torch.nan
    p["broken"][::3] = True
    return p


def clean(p):
    """Nothing is broken, every transition scored at one NFE, rewards as they are."""
    p.fill(scored=True, centre=0.0, image_sum=0.0, broken=False, alive=True, accept=False, finished=False)
    p.cost([1] * p.sizes.transitions)
    p["slot_real"][layout.UNTIL] = torch.inf
    p["chain"][layout.TRIED] = 0
    p["score"].fill_(-torch.inf)
    return p


def assign(p, width):
    torch.ops.flowfast.assign_lanes(*p.buffers.values(), *p.sizes, width)


def run(p, width=10, bias=False, margin=0.5, carry=True, next_width=7, seen=12):
    """A round: lanes, then rewards."""
    assign(p, width)
    return decide(p, bias, margin, carry, next_width, seen)


def decide(p, bias=False, margin=0.5, carry=True, next_width=7, seen=12):
    torch.ops.flowfast.decide(
        p["rewards"][:seen].clone(), 0.5, p["bias"][:seen].clone() if bias else None, *p.buffers.values(),
        *(p[name] for name in LATENTS), p.sizes.slots, p.sizes.lanes, p.sizes.transitions, margin, carry, next_width,
    )  # fmt: skip
    return p


def differing(left, right):
    return [name for name in left if not torch.equal(as_bits(left[name]), as_bits(right[name]))]


@pytest.mark.parametrize("seed", range(20))
def test_a_candidate_without_a_rival_goes_on_unless_the_model_broke(seed):
    found = run(alone(seed))
    with flowfast.ops.use_backend("reference"):
        wanted = run(alone(seed))
    assert differing(found, wanted) == []
    assert 3 in found["advance"] or 2 in found["advance"]


def as_bits(tensor):
    kinds = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}
    return tensor.view(kinds[tensor.dtype]) if tensor.dtype in kinds else tensor


@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    seed=st.integers(0, 2**32),
    sizes=st.fixed_dictionaries(
        {"slots": st.integers(1, 3), "chains": st.integers(1, 4), "lanes": st.integers(1, 4), "top": st.integers(1, 4)}
    ),
    options=st.fixed_dictionaries(
        {
            "width": st.integers(0, 16),
            "bias": st.booleans(),
            "margin": st.sampled_from([0.0, 0.5]),
            "carry": st.booleans(),
            "next_width": st.integers(-1, 16),
            "seen": st.integers(0, 16),
        }
    ),
)
def test_backends_leave_the_same_bits(dtype, seed, sizes, options):
    options["seen"] = max(options["seen"], options["width"])
    fast = run(problem(seed, dtype=dtype, **sizes), **options)
    with flowfast.ops.use_backend("reference"):
        slow = run(problem(seed, dtype=dtype, **sizes), **options)
    assert differing(fast, slow) == []


@pytest.mark.parametrize("change", ["margin", "carry", "bias"])
def test_the_comparison_sees_a_difference(change):
    """Each option matters in some of a hundred states, so a backend that ignored one would be caught."""
    other = {"margin": 1.5, "carry": False, "bias": True}[change]
    assert any(differing(run(problem(seed)), run(problem(seed), **{change: other})) for seed in range(100))


@pytest.mark.parametrize("field", [field.name for field in layout.FIELDS if not field.written])
def test_each_field_that_is_only_read_matters_and_stays(field):
    """In some of a hundred states, beside what the field itself shows."""
    constant = {"passes": 3, "image_sum": torch.nan, "slot_real": 0.25, "time": 2.0, "linear_time": 2.0, "centre": 4.0}
    mattered = 0
    for seed in range(100):
        plain, changed = problem(seed), problem(seed)
        kind = plain[field].dtype
        changed[field].fill_(constant.get(field, 1 if kind != torch.bool else seed % 2 == 0))
        before = changed[field].clone()
        other = differing(run(plain), run(changed))
        assert torch.equal(as_bits(before), as_bits(changed[field]))
        mattered += bool(set(other) - {field})
    assert mattered > 2


def test_lanes_are_live_first_chain_by_chain_and_padding_is_inert():
    p = problem(0, slots=1, chains=3, lanes=2).cost([1] * 5)
    p["alive"][:] = torch.tensor([True, False, True])
    p["chain"][layout.QUOTA], p["chain"][layout.LEFT] = torch.tensor([2, 2, 9]), torch.tensor([9, 9, 9])
    p["chain"][layout.CHAIN_TRANSITION] = 1
    p["chain"][layout.TRIED] = torch.tensor([5, 0, 7])
    assign(p, 16)
    live = int(p["lane_live"].sum())
    assert live == 4 and bool(p["lane_live"][:4].all())
    assert p["lane"][layout.CELL, :4].tolist() == [0, 1, 4, 5]
    assert p["lane"][layout.CANDIDATE, :4].tolist() == [5, 6, 7, 8]
    first = p["slot"][layout.FIRST_CHAIN, p["lane"][layout.LANE_SLOT, :4]]  # numbers go on from that of the request
    assert (p["lane"][layout.LANE_CHAIN, :4] - first).tolist() == [0, 0, 2, 2] and int(first.max()) > 0
    assert p["position"].tolist() == [[0, 1], [0, 0], [2, 3]]
    for row in (layout.TABLE_ROW, layout.PARENT):
        assert p["lane"][row, 4:].tolist() == [-1] * 12
    assert p["chain"][layout.QUOTA].tolist() == [2, 2, 6]  # 9 left, one kept back for each of three transitions


def test_a_width_below_what_chains_want_evaluates_the_first_lanes_only():
    p = problem(1, slots=1, chains=4, lanes=2).cost([1] * 5)
    p["alive"][:], p["chain"][layout.QUOTA], p["chain"][layout.LEFT] = True, 2, 9
    assign(p, 3)
    assert int(p["live"].sum()) == int(p["lane_live"].sum()) == 3


@pytest.mark.parametrize("lane", [0, 1])
def test_a_lane_whose_posterior_mean_broke_never_wins(lane):
    p = clean(problem(2, slots=1, chains=1, lanes=2))
    p["chain"][layout.QUOTA], p["chain"][layout.LEFT] = 2, 9
    p["rewards"][:2] = torch.tensor([1.0, 2.0])
    p["broken"][lane] = True
    before = int(p["slot"][layout.NAN_REWARDS, 0])
    run(p)
    assert int(p["slot"][layout.NAN_REWARDS, 0]) == before + 1
    assert p["dense"][0, lane] == -torch.inf and not bool(p["broken"].any())
    assert int(p["status"][0, lane]) in (0, 3)
    assert float(p["score"][layout.REWARD, 0]) in (-torch.inf, float(2 - lane))


def spread(seed, passes, chains=2000, lanes=2, widest=1500, enough=False):
    """Chains of three slots in any place, not all alive. enough: each has at least what it needs to the end."""
    p = problem(seed, slots=3, chains=chains, lanes=lanes, rows=len(passes), widest=widest, n=1).cost(passes)
    g = torch.Generator().manual_seed(seed)
    chain = p["chain"]
    least = p["to_end"][chain[layout.CHAIN_TRANSITION]] if enough else 0
    chain[layout.LEFT] = least + torch.randint(0, 13, chain[layout.LEFT].shape, generator=g)
    return p


MIXED = ([1, 2, 2, 1, 2], [2, 1, 1, 2, 1], [1] * 5, [2] * 5, [2], [1, 3, 7])


@pytest.mark.parametrize("passes", MIXED, ids=str)
def test_a_quota_is_what_the_way_to_the_end_leaves(backend, passes):
    """6000 chains, against plain Python: one evaluation at each later transition is paid for before more are tried."""
    p = spread(0, passes)
    wanted = [
        min(quota, max(left - sum(passes[at + 1 :]), 0) // passes[at])
        for _, at, quota, left, *_ in p["chain"].t().tolist()
    ]
    lowered = sum(a != b for a, b in zip(p["chain"][layout.QUOTA].tolist(), wanted, strict=True))
    assign(p, 1500)
    assert p["chain"][layout.QUOTA].tolist() == wanted and 100 < lowered < 5900


@pytest.mark.parametrize("passes", MIXED, ids=str)
@pytest.mark.parametrize("width", [0, 100, 1500])
def test_lanes_of_two_passes_are_named_in_order_and_have_the_guidance(backend, passes, width):
    p = spread(1, passes, chains=300)
    assign(p, width)
    live, at = p["lane_live"].tolist(), p["lane"][layout.LANE_TRANSITION].tolist()
    assert sum(live) == width or 100 < sum(live) < width
    named = [i for i in range(1500) if live[i] and passes[at[i]] == 2]
    assert p["null_lane"].tolist() == named + [-1] * (1500 - len(named))
    guidance, slot = p["slot_real"][layout.GUIDANCE].tolist(), p["lane"][layout.LANE_SLOT].tolist()
    wanted = [guidance[slot[i]] if i in set(named) else 1.0 for i in range(1500)]
    assert p["lane_real"][layout.LANE_GUIDANCE].tolist() == wanted
    assert len(set(guidance)) == 3 and 1.0 not in guidance


def test_two_passes_everywhere_and_twice_the_nfe_decide_the_same(backend):
    for seed in range(20):
        one, two = problem(seed).cost([1] * 5), problem(seed).cost([2] * 5)
        two["chain"][layout.LEFT] *= 2
        before = [p["slot"].clone() for p in (one, two)]
        run(one), run(two)
        costly = slice(layout.NFE, layout.NFE_SPECULATIVE + 1)
        assert torch.equal(2 * (one["slot"] - before[0])[costly], (two["slot"] - before[1])[costly])
        two["slot"][costly] = one["slot"][costly]
        two["chain"][layout.LEFT] //= 2
        two["lane_real"][layout.LANE_GUIDANCE] = 1.0
        assert differing(one, two) in (["passes", "to_end", "null_lane"], ["passes", "to_end"])


@pytest.mark.parametrize("passes", MIXED, ids=str)
def test_chains_come_to_their_end_within_their_nfe(backend, passes):
    """Rounds until all are over: what was spent is what the lanes cost, counted apart, and is never more than there
    was. Each chain that had enough to begin with takes its last step."""
    p = clean(spread(2, passes, chains=12, widest=72, enough=True)).cost(passes)
    p["rewards"].fill_(1.0)
    p.fill(quota_table=1 + p["quota_table"], slot=0)
    p["chain"][layout.QUOTA] += 1
    left, nfe, evaluations = p["chain"][layout.LEFT].clone(), torch.zeros(3), torch.zeros(3)
    assign(p, 72)
    while bool(p["alive"].any()):
        slot, live = p["lane"][layout.LANE_SLOT], p["lane_live"]
        nfe.index_add_(0, slot, (live * p["passes"][p["lane"][layout.LANE_TRANSITION]]).float())
        evaluations.index_add_(0, slot, live.float())
        decide(p, seen=72, next_width=72)
    assert bool((p["chain"][layout.CHAIN_TRANSITION] == len(passes)).all())
    assert bool((p["chain"][layout.LEFT] >= 0).all())
    assert p["slot"][layout.NFE].tolist() == (left - p["chain"][layout.LEFT]).view(3, 12).sum(1).tolist()
    assert p["slot"][layout.NFE].tolist() == nfe.tolist()
    assert p["slot"][layout.EVALUATIONS].tolist() == evaluations.tolist()
    assert int(nfe.sum()) > int(p["to_end"][0])


def test_evaluations_count_those_that_were_speculative(backend):
    p = clean(problem(8, slots=1, chains=1, lanes=3)).cost([2] * 5).fill(accept=True, slot=0)
    p["chain"][layout.QUOTA], p["chain"][layout.LEFT], p["chain"][layout.CHAIN_TRANSITION] = 3, 20, 1
    p["rewards"][:3] = torch.tensor([1.0, 0.0, 0.0])
    run(p, margin=0.0)
    assert p["status"][0].tolist() == [2, 3, 3] and int(p["chain"][layout.LEFT, 0]) == 14
    assert p["slot"][layout.NFE :, 0].tolist() == [6, 4, 3, 0, 3]


def test_the_lanes_that_decide_lays_are_those_of_assign_lanes(backend):
    for seed in range(30):
        fused, apart = run(problem(seed), next_width=7), run(problem(seed), next_width=-1)
        assign(apart, 7)
        assert differing(fused, apart) == []


def test_scored_lanes_come_first_and_the_others_keep_their_order():
    p = clean(problem(4, slots=1, chains=4, lanes=2))
    p["chain"][layout.QUOTA], p["chain"][layout.LEFT] = 2, 9
    p["chain"][layout.CHAIN_TRANSITION] = torch.tensor([0, 1, 0, 2])
    p["scored"].copy_(torch.tensor([False, True, True, True, True]))
    assign(p, 16)
    assert p["lane"][layout.CELL, :8].tolist() == [2, 3, 6, 7, 0, 1, 4, 5]
    assert p["position"].tolist() == [[4, 5], [0, 1], [6, 7], [2, 3]]
    assert p["lane_live"].tolist() == [True] * 8 + [False] * 8


def test_a_lane_that_is_not_scored_goes_on_without_touching_what_scores_decide():
    p = clean(problem(5, slots=1, chains=3, lanes=1, top=1))
    p.fill(scored=False, finished=True, accept=True, quota_table=1)
    p["chain"][layout.QUOTA], p["chain"][layout.LEFT], p["chain"][layout.CHAIN_TRANSITION] = 1, 9, 1
    p["score"].copy_(torch.tensor([[0.5], [-torch.inf], [-torch.inf], [0.25]]).expand(4, 3))
    p["broken"][1] = True
    before = {name: tensor.clone() for name, tensor in p.items()}
    run(p, seen=0)
    assert p["advance"].tolist() == [2, 3, 2] and p["alive"].tolist() == [True, False, True]
    assert p["chain"][layout.CHAIN_TRANSITION].tolist() == [2, 1, 2]
    assert p["dense"].isnan().all()  # no value, which is not the value of a reward that failed
    assert torch.equal(as_bits(p["score"]), as_bits(before["score"]))
    assert torch.equal(p["top_reward"], before["top_reward"])
    counted = p["slot"][:, 0] - before["slot"][:, 0]
    assert counted.tolist() == [0, 0, 3, 0, 0, 0, 3]  # NFE and evaluations alone


def test_a_picture_that_is_not_finite_never_wins_where_it_is_scored():
    p = clean(problem(6, slots=1, chains=1, lanes=2))
    p["chain"][layout.QUOTA], p["chain"][layout.LEFT] = 2, 9
    p["rewards"][:2] = torch.tensor([5.0, 1.0])
    p["image_sum"][0] = torch.nan
    before = int(p["slot"][layout.NAN_REWARDS, 0])
    run(p)
    assert p["status"][0].tolist() == [0, 1] and int(p["slot"][layout.NAN_REWARDS, 0]) == before + 1


def test_a_centre_is_taken_off_before_rewards_are_compared_with_the_threshold():
    """Kim et al.'s rule with the mean of each time taken off: 2.0 at a time whose mean is 1.5 does not beat 1.0."""
    for centre, taken in ((0.0, True), (1.5, False)):
        p = clean(problem(7, slots=1, chains=1, lanes=2))
        p.fill(accept=True, centre=centre)
        p["chain"][layout.QUOTA], p["chain"][layout.LEFT], p["chain"][layout.CHAIN_TRANSITION] = 4, 9, 1
        p["rewards"][:2] = torch.tensor([2.0, 0.5])
        p["score"][layout.THRESHOLD] = 1.0
        run(p, margin=0.0)
        assert (int(p["advance"][0]) == 1) == taken
        assert float(p["score"][layout.THRESHOLD, 0]) == (2.0 if taken else 1.0)


def oracle(rewards, live, next_quota, carry, quota, threshold, best_child):
    """One chain in plain Python, from the definition (arXiv 2503.19385, algorithm 1)."""
    winner, advance, used = -1, 0, 0
    for k, reward in enumerate(rewards):
        if not live[k] or quota <= 0 or advance:
            break
        used, quota = used + 1, quota - 1
        reward = -math.inf if math.isnan(reward) else reward
        if reward > best_child:
            best_child, winner = reward, k
        if reward > threshold:
            advance = 1
        elif quota == 0:
            advance = 3 if best_child == -math.inf else 2
    if advance in (1, 2):
        quota, best_child = (quota if carry else 0) + next_quota, -math.inf
    return quota, best_child, winner, advance, used


@pytest.mark.parametrize("carry", [True, False])
@pytest.mark.parametrize("lanes", [1, 2, 5, 8])
def test_the_rule_of_rollover_against_plain_python(backend, lanes, carry):
    """2000 chains: few distinct rewards, so that ties, NaN and infinities meet thresholds and best children often. No
    chain is at its first candidate, for one that was alone goes on by another rule."""
    chains, seen = 2000, set()
    p = clean(problem(lanes, slots=1, chains=chains, lanes=lanes, widest=chains * lanes, n=1))
    g = torch.Generator().manual_seed(lanes)

    def pick(values, *shape):
        return torch.tensor(values)[torch.randint(0, len(values), shape, generator=g)]

    p.fill(accept=True)
    p["chain"][layout.TRIED] = 1
    p["chain"][layout.QUOTA] = torch.randint(0, 7, (chains,), generator=g)
    p["chain"][layout.LEFT] = 99
    p["score"][layout.THRESHOLD] = pick([-math.inf, 0.0, 0.5, 2.0, math.inf], chains)
    p["score"][layout.BEST_CHILD] = pick([-math.inf, math.inf, -1.0, 0.0, 1.0], chains)
    p["rewards"] = pick([math.nan, -math.inf, math.inf, -1.0, 0.0, 0.5, 1.0, 2.0], chains * lanes)
    assign(p, chains * lanes)
    quota, best = p["chain"][layout.QUOTA].tolist(), p["score"][layout.BEST_CHILD].tolist()
    threshold, at = p["score"][layout.THRESHOLD].tolist(), p["chain"][layout.CHAIN_TRANSITION].tolist()
    live, position = p["live"].tolist(), p["position"].tolist()
    run(p, width=chains * lanes, seen=chains * lanes, margin=0.0, carry=carry, next_width=-1)
    for b in range(chains):
        rewards = [float(p["rewards"][i]) for i in position[b]]
        after = int(p["quota_table"][b, min(at[b] + 1, 4)])
        wanted = oracle(rewards, live[b], after, carry, quota[b], threshold[b], best[b])
        status = p["status"][b].tolist()
        winner = next((k for k, s in enumerate(status) if s in (1, 2)), -1)
        found = (int(p["chain"][layout.QUOTA, b]), float(p["score"][layout.BEST_CHILD, b]), winner)
        assert (*found, int(p["advance"][b])) == wanted[:4]
        seen.add(wanted[3])
    assert seen == {0, 1, 2, 3}


WRONG = {
    "ints": lambda t: t.float(),
    "floats": lambda t: t[:-1],
    "flags": lambda t: t.to(torch.uint8),
    "x0_lane": lambda t: t.double(),
    "u": lambda t: t[1:],
    "top_x": lambda t: t[:-1],
    "x": lambda t: t.t(),
}


@pytest.mark.parametrize("backend_name", ["cpp", "reference"])
@pytest.mark.parametrize("name", WRONG)
def test_wrong_operands_are_named(backend_name, name):
    p = problem(3)
    where = p.buffers if name in p.buffers else p
    where[name] = WRONG[name](where[name])
    with flowfast.ops.use_backend(backend_name), pytest.raises(RuntimeError, match=rf"\b{name}\b"):
        torch.ops.flowfast.decide(
            p["rewards"], 1.0, None, *p.buffers.values(), *(p[each] for each in LATENTS), 2, 2, 5, 0.0, True, -1
        )


@pytest.mark.parametrize("backend_name", ["cpp", "reference"])
@pytest.mark.parametrize("name", ["slots", "chains", "lanes", "transitions", "top"])
def test_sizes_of_nothing_are_refused(backend_name, name):
    p = problem(3)
    with flowfast.ops.use_backend(backend_name), pytest.raises(RuntimeError, match=f"{name} must be at least 1, got 0"):
        torch.ops.flowfast.assign_lanes(*p.buffers.values(), *p.sizes._replace(**{name: 0}), 3)


@pytest.mark.parametrize("backend_name", ["cpp", "reference"])
@pytest.mark.parametrize("call", [lambda p: assign(p, 3), decide], ids=["assign_lanes", "decide"])
def test_a_transition_that_costs_nothing_is_refused(backend_name, call):
    p = problem(3)
    p["passes"][2] = 0
    message = "passes must be at least 1 at every transition, got 0 at transition 2"
    with flowfast.ops.use_backend(backend_name), pytest.raises(RuntimeError, match=message):
        call(p)
