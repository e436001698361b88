"""assign_lanes and decide: C++ and the PyTorch reference leave the same bits in every tensor, and refuse the same
mistakes. What they should decide is checked through whole searches (tests/methods, tests/rounds: oracles, enumeration,
accounts)."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import flowfast.ops
from flowfast.ops import assign_lanes, decide

SHARED = [
    "chain", "alive", "slot", "slot_real", "given", "quota_table", "path_chain", "path_candidate", "top_reward",
    "top_row", "top_chain", "top_candidate", "accept", "finished", "time", "linear_time", "lane", "lane_real",
    "lane_live", "live", "position", "broken", "x_lane", "u_lane", "x0_lane", "x", "u", "top_x", "top_x0", "dense",
    "status", "advance", "store_source", "top_source", "ticket",
]  # fmt: skip
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def problem(seed, slots=2, chains=3, lanes=2, rows=5, top=2, n=9, dtype=torch.float32, widest=16):
    """A state in the middle of a search, with ties among the rewards; chains may be dead, over, or out of quota."""
    g = torch.Generator().manual_seed(seed)

    def integers(high, *shape):
        return torch.randint(0, high, shape, generator=g)

    def coin(p, *shape):
        return torch.rand(shape, generator=g) < p

    B = slots * chains
    rewards = integers(7, widest).float() / 2
    row = integers(rows, B)
    return {
        "rewards": torch.where(coin(0.1, widest), torch.nan, rewards),
        "bias": torch.randn(widest, generator=g),
        "chain": torch.stack([integers(2, B), row, integers(5, B), integers(9, B), integers(4, B), integers(4, B)]),
        "score": torch.stack([integers(7, B).float() / 2 for _ in range(4)]),
        "alive": coin(0.8, B),
        "slot": torch.stack([integers(2**40, slots), *(integers(50, slots) for _ in range(4))]),
        "slot_real": torch.stack([torch.rand(slots, generator=g), torch.where(coin(0.5, slots), 3.0, torch.inf)]),
        "given": coin(0.3, slots),
        "quota_table": integers(4, B, rows),
        "path_chain": integers(chains, B, rows),
        "path_candidate": integers(9, B, rows),
        "top_reward": torch.sort(integers(7, slots, top).float() / 2 - 1, descending=True)[0],
        "top_row": integers(rows, slots, top),
        "top_chain": integers(chains, slots, top, rows),
        "top_candidate": integers(9, slots, top, rows),
        "accept": coin(0.6, rows),
        "finished": coin(0.5, rows),
        "time": torch.linspace(1, 0, rows + 1),
        "linear_time": torch.linspace(1, 0.1, rows + 1),
        "lane": torch.zeros(8, widest, dtype=torch.int64),
        "lane_real": torch.zeros(3, widest),
        "lane_live": torch.zeros(widest, dtype=torch.bool),
        "live": torch.zeros(B, lanes, dtype=torch.bool),
        "x_lane": torch.randn(widest, n, generator=g).to(dtype),
        "u_lane": torch.randn(widest, n, generator=g).to(dtype),
        "x0_lane": torch.randn(widest, n, generator=g).to(dtype),
        "x": torch.randn(2 * B, n, generator=g).to(dtype),
        "u": torch.randn(2 * B, n, generator=g).to(dtype),
        "top_x": torch.randn(slots * top, n, generator=g).to(dtype),
        "top_x0": torch.randn(slots * top, n, generator=g).to(dtype),
        "position": torch.full((B, lanes), 99),
        "broken": coin(0.1, widest),
        "dense": torch.full((B, lanes), 99.0),
        "status": torch.full((B, lanes), 99),
        "advance": torch.full((B,), 99),
        "store_source": torch.full((2 * B,), 99),
        "top_source": torch.full((slots, top), 99),
        "ticket": torch.zeros(1, dtype=torch.int32),
    }


def alone(seed, **sizes):
    """A state in which many chains have one candidate for their step, often without a reward or from a broken model."""
    p = problem(seed, **sizes)
    p["chain"][2], p["chain"][4] = 1, 0  # quota, tried
    p["score"][1] = -torch.inf
    p["rewards"][::2] = torch.nan
    p["broken"][::3] = True
    return p


def assign(p, width):
    names = [
        "chain", "alive", "slot", "slot_real", "given", "time", "linear_time", "lane", "lane_real", "lane_live", "live",
        "position",
    ]  # fmt: skip
    torch.ops.flowfast.assign_lanes(*(p[name] for name in names), width)


def run(p, width=10, bias=False, margin=0.5, carry=True, passes=2, next_width=7, seen=12):
    """A round: lanes, then rewards."""
    assign(p, width)
    operands = [p["rewards"][:seen].clone(), 0.5, p["bias"][:seen].clone() if bias else None, p["chain"], p["score"]]
    rest = [p[name] for name in SHARED if name != "chain"]
    torch.ops.flowfast.decide(*operands, *rest, margin, carry, passes, next_width)
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
            "passes": st.integers(1, 2),
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


@pytest.mark.parametrize("change", ["margin", "carry", "passes", "bias"])
def test_the_comparison_sees_a_difference(change):
    """Each option matters in some of a hundred states, so a backend that ignored one would be caught."""
    other = {"margin": 1.5, "carry": False, "passes": 1, "bias": True}[change]
    assert any(differing(run(problem(seed)), run(problem(seed), **{change: other})) for seed in range(100))


def test_lanes_are_live_first_chain_by_chain_and_padding_is_inert():
    p = problem(0, slots=1, chains=3, lanes=2)
    p["alive"][:] = torch.tensor([True, False, True])
    p["chain"][assign_lanes.QUOTA], p["chain"][assign_lanes.LEFT] = torch.tensor([2, 2, 9]), torch.tensor([9, 9, 9])
    p["chain"][assign_lanes.ROW] = 1
    p["chain"][assign_lanes.TRIED] = torch.tensor([5, 0, 7])
    assign(p, 16)
    live = int(p["lane_live"].sum())
    assert live == 4 and bool(p["lane_live"][:4].all())
    assert p["lane"][assign_lanes.CELL, :4].tolist() == [0, 1, 4, 5]
    assert p["lane"][assign_lanes.CANDIDATE, :4].tolist() == [5, 6, 7, 8]
    assert p["lane"][assign_lanes.CHAIN, :4].tolist() == [0, 0, 2, 2]
    assert p["position"].tolist() == [[0, 1], [0, 0], [2, 3]]
    for row in (assign_lanes.KERNEL_ROW, assign_lanes.PARENT):
        assert p["lane"][row, 4:].tolist() == [-1] * 12
    assert p["chain"][assign_lanes.QUOTA].tolist() == [2, 2, 6]  # 9 left, one kept back for each of three transitions


def test_a_width_below_what_chains_want_evaluates_the_first_lanes_only():
    p = problem(1, slots=1, chains=4, lanes=2)
    p["alive"][:], p["chain"][assign_lanes.QUOTA], p["chain"][assign_lanes.LEFT] = True, 2, 9
    assign(p, 3)
    assert int(p["live"].sum()) == int(p["lane_live"].sum()) == 3


@pytest.mark.parametrize("lane", [0, 1])
def test_a_lane_whose_posterior_mean_broke_never_wins(lane):
    p = problem(2, slots=1, chains=1, lanes=2)
    p["alive"][:], p["chain"][assign_lanes.QUOTA], p["chain"][assign_lanes.LEFT] = True, 2, 9
    p["score"][:], p["rewards"][:2] = -torch.inf, torch.tensor([1.0, 2.0])
    p["broken"][:] = False
    p["broken"][lane] = True
    before = int(p["slot"][assign_lanes.NAN_REWARDS, 0])
    run(p)
    assert int(p["slot"][assign_lanes.NAN_REWARDS, 0]) == before + 1
    assert p["dense"][0, lane] == -torch.inf and not bool(p["broken"].any())
    assert int(p["status"][0, lane]) in (0, 3)
    assert float(p["score"][decide.REWARD, 0]) in (-torch.inf, float(2 - lane))


@pytest.mark.parametrize("backend", ["cpp", "reference"])
@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("chain", lambda t: t.float()),
        ("score", lambda t: t[:3]),
        ("top_chain", lambda t: t[..., :-1]),
        ("x0_lane", lambda t: t.double()),
        ("broken", lambda t: t.to(torch.uint8)),
        ("ticket", lambda t: t.long()),
        ("store_source", lambda t: t[1:]),
        ("live", lambda t: t.t()),
        ("lane", lambda t: t[:, :-1]),
    ],
)
def test_wrong_operands_are_named(backend, name, wrong):
    p = problem(3)
    p[name] = wrong(p[name])
    with flowfast.ops.use_backend(backend), pytest.raises(RuntimeError, match=name if name != "live" else "live|chain"):
        run(p)
