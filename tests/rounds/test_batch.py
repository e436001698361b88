"""The loop's promises: a request's bits depend on nothing but the request, whatever else is in the batch and whoever
drives it."""

import random

import pytest
import torch
from torch import Tensor

import flowfast
from flowfast import ops
from flowfast.errors import OptionError
from tests.toys import METHODS, PROMPTS, GaussianFlow, NearTarget, bits, build, same

MANY = [chr(97 + i % 26) * (1 + i % 7) + str(i) for i in range(64)]
NOISY = [method for method in METHODS if method not in ("bon", "ode")]


def search(method: str, prompts: list[str], **options) -> flowfast.SearchResult:
    settings = {"budget": 42, "steps": 6, "micro_batch": 8, "method": method, **options}
    return flowfast.search(GaussianFlow(), prompts, reward=NearTarget(), **settings)


def assert_equal_samples(one: flowfast.Sample, other: flowfast.Sample) -> None:
    """Winner, path, reward, latent, image and cost, bit for bit."""
    assert one.winner == other.winner
    assert [ranked.reward for ranked in one.top] == [ranked.reward for ranked in other.top]
    for left, right in zip(one.top, other.top, strict=True):
        assert left.winner == right.winner
        for name in ("image", "latent", "x_t"):
            assert torch.equal(bits(getattr(left, name)), bits(getattr(right, name)))
    assert (one.nfe, one.nfe_speculative, one.reward_calls) == (other.nfe, other.nfe_speculative, other.reward_calls)


# ---- scripted ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("guidance", [1.0, 3.0], ids=["one pass", "two passes"])
@pytest.mark.parametrize("method", METHODS)
def test_scripted_gives_the_same_bits(method, guidance):
    runs = []
    for scripted in (False, True):
        bench = build(method, scripted=scripted, guidance=guidance, budget=40 * (2 if guidance > 1 else 1), top=2)
        bench.admit(0, "a")
        bench.admit(1, "bb", seed=3)
        assert bench.run() > 6
        runs.append([bench.engine.release(slot) for slot in (0, 1)])
    for eager, scripted in zip(*runs, strict=True):
        assert same(eager, scripted) == []


def test_the_scripted_loop_runs_itself():
    """`search` is what a C++ server calls."""
    left, right = build("rbf", scripted=True), build("rbf")
    for bench in (left, right):
        bench.admit(0, "a")
        bench.engine.search()
    assert same(left.engine.release(0), right.engine.release(0)) == []


# ---- alone or among others -----------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_alone_or_among_64_others_shuffled_or_in_few_slots(method):
    wanted = {prompt: search(method, [prompt]).samples[0] for prompt in MANY[:4]}
    shuffled = MANY[:]
    random.Random(0).shuffle(shuffled)
    for prompts, slots in ((MANY, 64), (shuffled, 64), (shuffled, 5)):
        samples = search(method, prompts, slots=slots).samples
        for prompt, sample in wanted.items():
            assert_equal_samples(samples[prompts.index(prompt)], sample)


def test_seed_prompt_and_repeat_choose_the_noise_and_nothing_else_does():
    first = search("svdd", ["a"]).samples[0]
    for changed in (search("svdd", ["a"], seed=1), search("svdd", ["b"]), search("svdd", ["a"], repeat=1)):
        assert not torch.equal(changed.samples[0].latent, first.latent)
    assert_equal_samples(search("svdd", ["a"], micro_batch=3).samples[0], first)  # this toy has no matrix product


# ---- slots ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scripted", [False, True], ids=["eager", "scripted"])
@pytest.mark.parametrize("method", ["bon", "sop", "smc", "code", "svdd", "rbf"])
def test_a_slot_refilled_on_the_way_leaves_its_neighbours_alone(method, scripted):
    def alone(prompt: str, seed: int) -> dict[str, Tensor]:
        bench = build(method, slots=1)
        bench.admit(0, prompt, seed)
        bench.run()
        return bench.engine.release(0)

    bench = build(method, slots=3, scripted=scripted)
    bench.admit(0, "a", 1)
    bench.round()
    bench.admit(1, "bb", 2)  # comes later
    for _ in range(2):
        bench.round()
    bench.engine.release(1)  # is taken out half-way
    bench.admit(1, "ccc", 3)
    bench.round()
    bench.admit(2, "dddd", 4)
    bench.run()
    found = [bench.engine.release(slot) for slot in range(3)]
    for (prompt, seed), release in zip([("a", 1), ("ccc", 3), ("dddd", 4)], found, strict=True):
        assert same(release, alone(prompt, seed)) == []
    bench.admit(0, "bb", 9)  # the whole batch is free and used again
    bench.run()
    assert same(bench.engine.release(0), alone("bb", 9)) == []


def test_a_released_slot_costs_nothing():
    flow = GaussianFlow()
    bench = build("svdd", flow=flow, micro_batch=1)
    bench.admit(0, "a")
    bench.admit(1, "bb")
    bench.round()
    bench.engine.release(0)
    flow.seen.zero_()
    left = bench.engine.state.left[bench.plan.chains :].sum()
    bench.run()
    assert int(flow.seen) == int(left)


# ---- lanes ---------------------------------------------------------------------------------------------------


def chain_paths(
    method: str, lanes: int, prompt: str, budget: int
) -> tuple[list[list[tuple[int, int]]], flowfast.Sample]:
    """Per chain the (transition, candidate) of every step that it took, in order; and the sample."""
    steps: dict[int, list[tuple[int, int]]] = {}
    best: dict[int, tuple[int, int]] = {}

    def follow(candidates) -> None:
        for c in candidates:
            path = steps.setdefault(c.chain, [])
            if c.chain in best and best[c.chain][0] < c.transition:
                path.append(best.pop(c.chain))
            if c.status in ("best", "accepted"):
                best[c.chain] = (c.transition, c.candidate)

    sample = search(method, [prompt], lanes=lanes, budget=budget, on_round=follow).samples[0]
    return [path for _, path in sorted(steps.items())], sample


@pytest.mark.parametrize("lanes", [2, 3, 8])
@pytest.mark.parametrize("prompt", PROMPTS)
def test_rbf_walks_the_one_lane_path_up_to_where_the_budget_ends(lanes, prompt):
    one, alone = chain_paths("rbf", 1, prompt, 200)
    many, sample = chain_paths("rbf", lanes, prompt, 200)
    assert alone.nfe_speculative == 0 and sample.nfe_speculative > 0
    assert sample.nfe <= 200
    for left, right in zip(one, many, strict=True):
        # Speculation spends evaluations that one lane still has: only the last steps can differ, where quotas are cut.
        agree = next((k for k in range(len(left)) if left[k] != right[k]), len(left))
        assert agree >= 4


@pytest.mark.parametrize("margin", [0.0, 0.5])
@pytest.mark.parametrize("lanes", [2, 8])
def test_rbf_lanes_change_no_bit_while_evaluations_last(lanes, margin):
    """With more evaluations at hand than quotas ask for, speculation costs evaluations and nothing else."""
    runs = []
    for count in (1, lanes):
        bench = build("rbf", budget=80, lanes=count, method_options={"spend_last": False, "margin": margin})
        bench.plan.left[:] = [10_000] * bench.plan.chains
        for slot, prompt in enumerate(["a", "bb"]):
            bench.admit(slot, prompt)
            never_wider = [bench.plan.chains * count] * 100
            bench.engine.expect(slot, never_wider, never_wider, never_wider)
        bench.run()
        runs.append([bench.engine.release(slot) for slot in (0, 1)])
        costs = [release.pop("cost") for release in runs[-1]]
        assert all(int(cost[1]) > 0 for cost in costs) == (count > 1)
    for one, many in zip(*runs, strict=True):
        assert same(one, many) == []


@pytest.mark.parametrize("method", ["svdd", "rbf"])
def test_lanes_change_nothing_where_nothing_is_accepted_early(method):
    """SVDD draws all children of a step, so lanes only batch them; so does RBF whose threshold is never beaten."""
    if method == "svdd":
        left, right = (search(method, ["a"], lanes=lanes).samples[0] for lanes in (1, 8))
        assert right.nfe_speculative == 0
        assert_equal_samples(left, right)
        return

    class Falling(NearTarget):
        def forward(self, images: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
            return 100 * t + images.flatten(1).sum(1).tanh()

    samples = [
        flowfast.search(GaussianFlow(), ["a"], reward=Falling(), method="rbf", budget=60, steps=6, lanes=n).samples[0]
        for n in (1, 8)
    ]
    assert samples[1].nfe_speculative == 0
    assert samples[0].winner.path == samples[1].winner.path


# ---- backends ------------------------------------------------------------------------------------------------


@pytest.mark.skipif(ops.live()["decide"][0] != "cpp", reason="the compiled library is not here")
@pytest.mark.parametrize("method", METHODS)
def test_reference_and_cpp_give_the_same_bits(method):
    flow = GaussianFlow(shape=(3, 41))
    results = []
    for backend in ("cpp", "reference"):
        with ops.use_backend(backend):
            assert ops.live()["branch_step"][0] == backend
            results.append(flowfast.search(flow, PROMPTS, reward=NearTarget(), method=method, budget=42, steps=6))
    for left, right in zip(results[0].samples, results[1].samples, strict=True):
        assert_equal_samples(left, right)


# ---- replay --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("method", METHODS)
def test_replay_ends_in_the_same_bits(method, guidance):
    flow = GaussianFlow()
    result = flowfast.search(
        flow, PROMPTS, reward=NearTarget(), method=method, budget=84, steps=6, guidance=guidance, negative_prompt="bbb"
    )
    for sample in result.samples:
        pictures = flowfast.replay(flow, sample, result.config)
        assert len(pictures) == len(sample.winner.path)
        assert torch.equal(bits(pictures[-1][1]), bits(sample.image))
        assert sample.winner.path[-1] == (sample.winner.chain, sample.winner.transition, sample.winner.candidate)


def test_a_path_names_candidates_that_were_reported():
    seen = set()
    result = search(
        "rbf", ["a"], on_round=lambda found: seen.update((c.chain, c.transition, c.candidate) for c in found)
    )
    assert set(result.samples[0].winner.path) <= seen


# ---- own latents, top-k, until, guidance ---------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_own_latents_start_every_chain_and_are_evaluated_once_each(method):
    """The initial latent evaluated K times is a known fault: transition 0 has one candidate a chain."""
    flow, initial = GaussianFlow(), torch.randn(1, 3, generator=torch.Generator().manual_seed(0))
    first: list[tuple[int, int]] = []
    result = flowfast.search(
        flow,
        ["a"],
        reward=NearTarget(),
        method=method,
        budget=70,
        steps=6,
        chains=1 if method in ("bon", "prune") else None,
        latents=initial,
        on_round=lambda found: first.extend((c.chain, c.candidate) for c in found if c.transition == 0),
    )
    assert len(set(first)) == len(first)
    assert all(candidate == 0 for _, candidate in first)
    sample = result.samples[0]
    pictures = flowfast.replay(flow, sample, result.config, latents=initial[0])
    assert torch.equal(bits(pictures[-1][1]), bits(sample.image))
    start = flow.velocity(initial, torch.ones(1), flow.encode(["a"]))
    assert torch.allclose(pictures[0][1], (initial - start)[0], atol=0.02)  # x0_hat at t = 1 (VP: 0.9935)


def test_identical_chains_from_one_own_latent_are_refused():
    with pytest.raises(OptionError, match="10 identical chains.*chains=1"):
        flowfast.search(
            GaussianFlow(), ["a"], reward=NearTarget(), method="bon", budget=70, steps=6, latents=torch.randn(1, 3)
        )


def test_latents_of_each_chain_and_of_a_wrong_shape():
    latents = torch.randn(2, 7, 3, generator=torch.Generator().manual_seed(1))
    options = {"reward": NearTarget(), "method": "bon", "budget": 49, "steps": 6}
    both = flowfast.search(GaussianFlow(), ["a", "bb"], latents=latents, **options)
    for i, prompt in enumerate(["a", "bb"]):
        alone = [
            flowfast.search(GaussianFlow(), [prompt], latents=latents[i : i + 1, c], chains=1, **options).samples[0]
            for c in range(7)
        ]
        best = max(range(7), key=lambda c: alone[c].reward)
        assert both.samples[i].winner.chain == best
        assert torch.equal(both.samples[i].latent, alone[best].latent)
    for wrong in (torch.zeros(1, 3), torch.zeros(2, 5, 3), torch.zeros(2, 4)):
        with pytest.raises(OptionError, match="latents"):
            flowfast.search(GaussianFlow(), ["a", "bb"], latents=wrong, **options)


@pytest.mark.parametrize("method", METHODS)
def test_top_k_is_the_best_k_of_all_finished_candidates(method):
    finished: list[tuple[float, tuple[int, int, int]]] = []

    def collect(found) -> None:
        finished.extend(
            (c.reward, (c.chain, c.transition, c.candidate)) for c in found if c.finished and c.status != "discarded"
        )

    sample = search(method, ["bb"], top_k=5, on_round=collect).samples[0]
    wanted = sorted(finished, key=lambda pair: -pair[0])[:5]
    assert [(ranked.reward, ranked.winner.path[-1]) for ranked in sample.top] == wanted
    flow = GaussianFlow()
    result = search(method, ["bb"], top_k=5)
    for ranked in result.samples[0].top:
        image = flowfast.replay(flow, type(sample)(**{**sample.__dict__, "top": (ranked,)}), result.config)[-1][1]
        assert torch.equal(bits(image), bits(ranked.image))


@pytest.mark.parametrize("method", ["svdd", "rbf"])
def test_until_stops_as_soon_as_a_finished_sample_has_the_reward(method):
    """With 10 steps the last noisy transition is finished at t = 0.1, so its children come one by one."""
    events: list[tuple[int, float]] = []
    options = {"budget": 200, "steps": 10, "lanes": 1, "method": method}
    whole = search(
        options.pop("method"),
        ["a"],
        on_round=lambda found: events.extend((c.nfe, c.reward) for c in found if c.finished),
        **options,
    ).samples[0]
    bound = sorted(reward for _, reward in events)[-8]
    first = min(nfe for nfe, reward in events if reward >= bound)
    sample = search(method, ["a"], until=bound, **options).samples[0]
    assert sample.nfe == first < whole.nfe == 200
    assert sample.unspent == 200 - first and bound <= sample.reward <= whole.reward


@pytest.mark.parametrize("scale", [0, 0.0, 0.5, 1, 1.0])
def test_guidance_up_to_1_is_off(scale):
    """0 is what cards of distilled models say; it once ran the negative prompt alone, at twice the NFE. Asked for in a
    search or the default of a flow, and recorded so that a rerun repeats it."""
    flow = GaussianFlow()
    options = {"reward": NearTarget(), "method": "rbf", "steps": 6, "micro_batch": 4, "budget": 40}
    off = flowfast.search(flow, ["a", "bbb"], guidance=1.0, **options)
    flow.guidance = 3.0
    asked = flowfast.search(flow, ["a", "bbb"], guidance=scale, negative_prompt="bbb", **options)
    flow.guidance = scale
    for found in (asked, flowfast.search(flow, ["a", "bbb"], **options)):
        assert found.config.guidance == 1.0
        for one, other in zip(found.samples, off.samples, strict=True):
            assert (one.nfe, one.evaluations) == (other.nfe, other.evaluations)
            assert torch.equal(one.latent, other.latent)
        assert not torch.equal(found.samples[0].latent, found.samples[1].latent)
        replayed = flowfast.replay(flow, found.samples[0], found.config)
        assert torch.equal(replayed[-1][1], found.samples[0].image)


@pytest.mark.parametrize("scale", [-1.0, -0.01, float("nan"), float("inf")])
def test_guidance_that_is_no_scale_is_refused(scale):
    flow = GaussianFlow()
    with pytest.raises(OptionError, match="guidance.*0 .. 1,000, got"):
        flowfast.search(flow, ["a"], reward=NearTarget(), budget=40, guidance=scale)
    flow.guidance = scale
    with pytest.raises(OptionError, match="guidance.*at least 0.*got"):
        flowfast.search(flow, ["a"], reward=NearTarget(), budget=40)


def test_guidance_takes_two_passes_and_the_negative_prompt():
    """u = u_null + w (u - u_null): on this flow a one-step answer is known."""
    flow = GaussianFlow()
    options = {"reward": NearTarget(), "method": "ode", "budget": 20, "steps": 6, "micro_batch": 1}
    plain = flowfast.search(flow, ["aaa"], guidance=1.0, **options).samples[0]
    assert (plain.nfe, plain.evaluations, int(flow.seen)) == (7, 7, 7)
    flow.seen.zero_()
    guided = flowfast.search(flow, ["aaa"], guidance=3.0, negative_prompt="bb", **options).samples[0]
    assert (guided.nfe, guided.evaluations, int(flow.seen)) == (14, 7, 14)

    class Shifted(GaussianFlow):
        """u is affine in the mean, so guidance is a plain run at mean_null + w (mean - mean_null)."""

        def encode(self, prompts: list[str]) -> dict[str, Tensor]:
            return {"mean": torch.full((len(prompts), 1), 0.4 + 3.0 * (0.6 - 0.4))}

    wanted = flowfast.search(Shifted(), ["aaa"], guidance=1.0, **options).samples[0]
    assert torch.allclose(guided.latent, wanted.latent, atol=1e-5)
    assert not torch.allclose(guided.latent, plain.latent, atol=1e-2)


@pytest.mark.parametrize("method", NOISY)
def test_time_reaches_the_model_in_float32_whatever_the_latents(method):
    """bf16 timesteps (993.5 -> 992) are a known fault."""

    class Watch(GaussianFlow):
        times: list[Tensor] = []

        def velocity(self, x_t: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
            assert t.dtype == torch.float32 and x_t.dtype == torch.bfloat16
            self.times.append(t.clone())
            return super().velocity(x_t.float(), t, cond).to(x_t.dtype)

    bench = build(method, flow=Watch(), dtype=torch.bfloat16)
    bench.admit(0, "a")
    bench.admit(1, "bb")
    bench.run()
    exact = set(bench.schedule.time.float().tolist())
    assert set(torch.cat(Watch.times).tolist()) <= exact
    assert bench.engine.release(0)["reward"].isfinite().all()


@pytest.mark.parametrize("scripted", [False, True], ids=["eager", "scripted"])
@pytest.mark.parametrize("method", ["bon", "smc", "rbf"])
def test_what_is_to_come_is_the_same_however_often_it_is_asked(method: str, scripted: bool) -> None:
    """Before and after the lanes are laid, with requests that come and go; a round that failed is laid again."""
    bench = build(method, scripted=scripted)
    engine = bench.engine
    bench.admit(0, "a")
    for turn in range(100):
        if turn == 2:
            bench.admit(1, "bb")
        plans, rounds = (engine.plans, engine.scored_plans, engine.null_plans), list(engine.rounds)
        width, *parts = (sum(p[r] for p, r in zip(of, rounds, strict=True) if r < len(p)) for of in plans)
        for _ in range(2):
            assert (engine.width(), engine.scored_width(), engine.null_width()) == (width, *parts)
            if width:
                engine.lay()
        if width == 0:
            break
        bench.round()
        if turn == 4:
            engine.release(0)
            assert engine.width() <= width
    assert turn > 4
