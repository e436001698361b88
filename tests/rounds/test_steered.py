"""Gradient guidance in the loop: the gradient against finite differences and closed forms, the law of the sampler,
every method, and what leaves the search as it was."""

import math
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from fake_device import DEVICE, FakeDevice, unwrap
from torch import Tensor, nn

import flowfast
from flowfast import rewards
from flowfast.errors import ModelError, OptionError, RewardError
from flowfast.flow import ScheduleSpec, build_schedule, parse_interpolant
from flowfast.models.scenes import hard_prompts
from flowfast.ops import use_backend
from flowfast.rounds.steered import Steered, evaluate, frozen
from tests.problems import GaussianMixture, quadratic_reward, two_dimensions
from tests.toys import METHODS, GaussianFlow, NearTarget, build, same

ALPHA = 1e-6
BRANCHING = [name for name in METHODS if name not in ("bon", "ode")]


# ---- the gradient against finite differences -----------------------------------------------------------------


class MixtureFlow(nn.Module):
    """The exact velocity of a mixture on any path; cond says by how much its means are moved."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self.shape, self.interpolant, self.t_finish, self.guidance = (2,), path, 0.1, 1.0

    def velocity(self, x_t: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
        mixture, path = two_dimensions(), parse_interpolant(self.interpolant)
        rows = []
        for x, at, shift in zip(x_t, t.tolist(), cond["shift"], strict=True):
            moved = GaussianMixture(mixture.weights, mixture.means + shift, mixture.stds)
            rows.append(moved.velocity(x[None], at, path)[0])
        return torch.stack(rows)

    def decode(self, x0: Tensor) -> Tensor:
        return x0


@pytest.mark.parametrize("path", ["linear", "vp", "trigonometric"])
@pytest.mark.parametrize("passes", [1, 2])
def test_the_gradient_is_finite_differences(path: str, passes: int) -> None:
    """float64, each row at a time of its own: d r(x0_hat(x)) / dx by central differences of the whole way."""
    schedule = build_schedule(ScheduleSpec(model_interpolant=path, interpolant=path, steps=6))
    flow, target = MixtureFlow(path), torch.tensor([0.5, -0.3], dtype=torch.float64)
    generator = torch.Generator().manual_seed(1)
    M, row = 5, torch.arange(1, 6)
    t = schedule.time[row]
    x = torch.randn(M, 2, dtype=torch.float64, generator=generator)
    conds = [{"shift": torch.randn(M, 2, dtype=torch.float64, generator=generator)} for _ in range(passes)]
    guidance = torch.tensor([0.0, 1.0, 2.0, 3.0, -1.0]) if passes == 2 else None

    def reward(images: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
        return quadratic_reward(images, target, 0.8)

    def run(x: Tensor) -> Any:
        u, x0 = torch.zeros_like(x), torch.zeros_like(x)
        return evaluate(flow, reward, x, t, t, conds, {}, guidance, row, schedule.table, u, x0)

    with use_backend("reference"):
        found, step = run(x).grad, 1e-6
        for i in range(2):
            direction = torch.zeros(2, dtype=torch.float64)
            direction[i] = step
            slope = (run(x + direction).rewards - run(x - direction).rewards) / (2 * step)
            torch.testing.assert_close(found[:, i], slope, rtol=1e-6, atol=1e-8)
    assert float(found.abs().min()) > 1e-3


def grad_of(flow: GaussianFlow, x: Tensor, t: Tensor, mean: float, target: float) -> Tensor:
    """Gradient of NearTarget at x0_hat(x) under GaussianFlow, float64."""
    x, t = x.double(), t.double()[:, None]
    total = (1 - t) ** 2 * flow.spread**2 + t**2
    slope = (1 - t) * flow.spread**2 / total
    return -2 * (mean + slope * (x - (1 - t) * mean) - target) * slope


@pytest.mark.parametrize("options", [{}, {"guidance": 3.0, "budget": 80}, {"micro_batch": 4, "top": 2}], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_every_parent_carries_its_own_gradient_after_every_round(method: str, options: dict[str, Any]) -> None:
    """Whatever is accepted, rolled over, resampled or copied between chains."""
    bench = build(method, gradient="dps:0.1", **options)
    engine, state, seen = bench.engine, bench.engine.state, 0
    prompts = ["a", "bb"]
    for slot, prompt in enumerate(prompts):
        bench.admit(slot, prompt)
    while engine.width() > 0:
        bench.round()
        parents = 2 * torch.arange(len(state.alive)) + state.active
        for chain in torch.nonzero(state.alive & (state.transition > 0)).flatten().tolist():
            mean, null = (float(bench.flow.encode([text])["mean"]) for text in (prompts[chain // engine.chains], ""))
            mean = null + bench.guidance * (mean - null)
            target = float(bench.reward.encode([prompts[chain // engine.chains]])["target"])
            parent = parents[chain : chain + 1]
            t = bench.schedule.time[state.transition[chain : chain + 1] - 1]
            expected = grad_of(bench.flow, state.x[parent], t, mean, target)
            torch.testing.assert_close(engine.grad[parent].double(), expected, rtol=1e-4, atol=1e-4)
            seen += 1
    assert seen >= 5


# ---- the law of the sampler ----------------------------------------------------------------------------------


class Quadratic(nn.Module):
    """a x0 - k / 2 (x0 - 1)^2, one coordinate."""

    def __init__(self, a: float, k: float) -> None:
        super().__init__()
        self.name, self.range, self.differentiable = "quadratic", (-1e9, 1e9), True
        self.a, self.k = a, k

    def encode(self, prompts: list[str]) -> dict[str, Tensor]:
        return {"none": torch.zeros(len(prompts), 0)}

    def forward(self, images: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
        x0 = images.flatten(1)
        return (self.a * x0 - self.k / 2 * (x0 - 1).square()).sum(1)


class Affine:
    """An affine function of the rows' noises: its mean and the coefficients of the noises."""

    def __init__(self, mean: float, noise: Tensor) -> None:
        self.mean, self.noise = mean, noise

    def __add__(self, other: "Affine") -> "Affine":
        return Affine(self.mean + other.mean, self.noise + other.noise)

    def __rmul__(self, scale: float) -> "Affine":
        return Affine(scale * self.mean, scale * self.noise)

    def plus(self, shift: float) -> "Affine":
        return Affine(self.mean + shift, self.noise)

    @property
    def std(self) -> float:
        return float(self.noise.square().sum().sqrt())


def steered_law(
    table: Tensor, times: Tensor, reward: Quadratic, *, mean: float, spread: float, of_child: bool = False
) -> tuple[Affine, Affine]:
    """The last x and x0_hat of GaussianFlow: with an affine velocity and gradient the whole sampler is affine in its
    noises. of_child: the mutant that steers by the gradient of the child instead of the parent's."""
    rows = len(table)
    zero = Affine(0.0, torch.zeros(rows, dtype=torch.float64))
    x = u = grad = zero

    def gradient(x: Affine, t: float) -> tuple[Affine, Affine]:
        total = (1 - t) ** 2 * spread**2 + t * t
        slope = (1 - t) * spread**2 / total
        x0 = (slope * x.plus(-(1 - t) * mean)).plus(mean)
        return (slope * ((-reward.k) * x0.plus(-1.0)).plus(reward.a)), x0

    for row in range(rows):
        a, b, c, g = table[row, :4].tolist()
        t = float(times[row])
        fresh = Affine(0.0, c * torch.eye(rows, dtype=torch.float64)[row])
        child = a * x + b * u + fresh
        x = child + g * (gradient(child, t)[0] if of_child else grad)
        grad, x0 = gradient(x, t)
        eps = (1 / t) * (x + (-(1 - t)) * x0)
        u = eps + (-1.0) * x0
    return x, x0


PATHS = [
    {"interpolant": "linear", "integrator": "euler-maruyama", "diffusion": "square:2"},
    {"interpolant": "vp", "integrator": "euler-maruyama", "diffusion": "square:2"},
    {"interpolant": "vp", "integrator": "coefficient-preserving:0.5"},
    {"interpolant": "linear", "integrator": "exponential", "diffusion": "square:2"},
    {"interpolant": "linear", "integrator": "coefficient-preserving:0"},
]


def distance(samples: Tensor, law: Affine) -> float:
    """Kolmogorov-Smirnov distance of samples from a normal law."""
    ranks = torch.arange(1, len(samples) + 1, dtype=torch.float64) / len(samples)
    cdf = torch.special.ndtr((samples.sort().values - law.mean) / law.std)
    return float(torch.maximum((cdf - ranks).abs(), (cdf - ranks + 1 / len(samples)).abs()).max())


@pytest.mark.parametrize("path", PATHS, ids=str)
@pytest.mark.parametrize("reward", [(1.5, 0.0), (0.5, 2.0)], ids=["linear", "quadratic"])
def test_the_sampler_has_the_steered_law(path: dict[str, Any], reward: tuple[float, float]) -> None:
    """Within the DKW band of the law that the affine sampler has; the mutants' laws lie outside."""
    count, strength, flow, scorer = 20_000, 1.5, GaussianFlow(shape=(1,)), Quadratic(*reward)
    bench = build(
        "bon", flow=flow, reward=scorer, slots=1, micro_batch=count, chains=count, budget=count * 12, steps=8,
        gradient=f"dps:{strength}", **path,
    )  # fmt: skip
    assert bench.schedule.transitions >= 8
    bench.admit(0, "a")
    bench.run()
    samples, mean = bench.engine.x0_lane[:, 0].double(), float(flow.encode(["a"])["mean"])
    table, times = bench.schedule.table, bench.schedule.time
    band = math.sqrt(math.log(2 / ALPHA) / (2 * count))

    def law(column: Tensor, **more: Any) -> Affine:
        changed = table.clone()
        changed[:, 3] = column
        return steered_law(changed, times, scorer, mean=mean, spread=flow.spread, **more)[1]

    g = table[:, 3]
    assert distance(samples, law(g)) < band
    mutants = {
        "no steering": law(0 * g),
        "the sign of G flipped": law(-g),
        "du/dscore without sigma'": law(g * bench.schedule.time_from),  # -t^2 / (1 - t) for -t / (1 - t)
        "the gradient of the child": law(g, of_child=True),
    }
    assert {name: distance(samples, wrong) for name, wrong in mutants.items() if distance(samples, wrong) <= band} == {}


@pytest.mark.parametrize(
    "path", [path for path in PATHS if path["integrator"] != "coefficient-preserving:0.5"], ids=str
)
def test_a_linear_reward_gives_the_tilted_law_in_the_limit(path: dict[str, Any]) -> None:
    """exp(strength a x0) moves N(m, s^2) to N(m + strength a s^2, s^2), and there DPS is exact: many steps come near.
    (Not of coefficient-preserving with noise: more steps there are more noise.)"""
    scorer, strength, mean, spread = Quadratic(1.5, 0.0), 0.8, 0.2, 0.5
    schedule = build_schedule(ScheduleSpec(steps=500, grid="uniform", t_finish=1e-3, strength=strength, **path))
    x, _ = steered_law(schedule.table, schedule.time, scorer, mean=mean, spread=spread)
    t = float(schedule.time[-1])
    assert x.mean == pytest.approx((1 - t) * (mean + strength * 1.5 * spread**2), abs=0.01)
    assert x.std == pytest.approx(math.hypot((1 - t) * spread, t), rel=0.02)


# ---- every method --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"guidance": 3.0, "budget": 80}, {"micro_batch": 4, "lanes": 2}], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_strength_0_is_the_search_without_steering(method: str, options: dict[str, Any]) -> None:
    """To the bit: x, u, x0_hat and rewards come from the same ops on the same numbers."""
    found = []
    for gradient in (None, "dps:0"):
        bench = build(method, gradient=gradient, score_all=True, **options)
        bench.admit(0, "a")
        bench.admit(1, "bb")
        bench.run()
        found.append([bench.engine.release(slot) for slot in range(2)])
        assert isinstance(bench.engine, Steered) == (gradient is not None)
    assert [same(one, other) for one, other in zip(*found, strict=True)] == [[], []]


def search(method: str, flow: Any = None, reward: Any = None, **options: Any) -> flowfast.SearchResult:
    options = {"budget": 60, "steps": 6, "micro_batch": 4, "slots": 2, **options}
    return flowfast.search(
        flow or GaussianFlow(), ["a", "bb", "ccc"], reward=reward or NearTarget(), method=method, **options
    )


@pytest.mark.parametrize("method", METHODS)
def test_steering_raises_the_reward_of_every_method(method: str) -> None:
    flow = GaussianFlow(shape=(16,))  # where noise alone rarely comes near the target
    plain, steered = (search(method, flow, gradient=gradient) for gradient in (None, "dps:0.5"))
    for one, other in zip(plain.samples, steered.samples, strict=True):
        assert other.nfe == one.nfe  # rows of the forward pass, as ever
        assert other.reward > one.reward
    assert steered.nan_rewards == 0


@pytest.mark.parametrize("method", ["rbf", "smc"])
def test_the_micro_batch_changes_last_bits_at_most(method: str) -> None:
    found = [search(method, gradient="dps:0.5", micro_batch=size) for size in (1, 3, 16)]
    for result in found[1:]:
        for one, other in zip(found[0].samples, result.samples, strict=True):
            assert one.winner == other.winner
            torch.testing.assert_close(one.latent, other.latent, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"guidance": 3.0}, {"interpolant": "vp"}], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_a_steered_winner_is_replayed_to_the_bit(method: str, options: dict[str, Any]) -> None:
    flow, reward = GaussianFlow(), NearTarget()
    result = search(method, flow, reward, gradient="dps:0.5", budget=100, **options)
    for sample in result.samples:
        path = flowfast.replay(flow, sample, result.config, reward=reward)
        assert torch.equal(path[-1][1], sample.image)
        unsteered = flowfast.replay(flow, sample, result.config.model_copy(update={"gradient": None}))
        assert not torch.equal(unsteered[-1][1], sample.image)


class Neighbours(NearTarget):
    """Conditions whose last bits (here: more) depend on what else is encoded with them, as a text tower's do."""

    def encode(self, prompts: list[str]) -> dict[str, Tensor]:
        return {"target": super().encode(prompts)["target"] + 1e-3 * len(prompts)}


class Ragged(NearTarget):
    """Conditions as long as the longest prompt, as tokens are."""

    def encode(self, prompts: list[str]) -> dict[str, Tensor]:
        lengths = torch.tensor([float(len(prompt)) for prompt in prompts])
        return {"tokens": (torch.arange(max(map(len, prompts))) < lengths[:, None]).float()}

    def forward(self, images: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
        return -(images.flatten(1) - cond["tokens"].sum(1, keepdim=True)).square().sum(1)


@pytest.mark.parametrize("kind", [Neighbours, Ragged])
def test_a_replay_knows_the_reward_of_one_prompt_only(kind: Callable[[], Any]) -> None:
    flow, reward = GaussianFlow(), kind()
    result = search("rbf", flow, reward, gradient="dps:0.5")
    for sample in result.samples:
        assert torch.equal(flowfast.replay(flow, sample, result.config, reward=reward)[-1][1], sample.image)


def test_own_latents_are_steered_too() -> None:
    flow, reward, latents = GaussianFlow(), NearTarget(), torch.randn(3, 3, generator=torch.Generator().manual_seed(0))
    result = search("svdd", flow, reward, gradient="dps:0.5", latents=latents)
    for sample, start in zip(result.samples, latents, strict=True):
        path = flowfast.replay(flow, sample, result.config, latents=start, reward=reward)
        assert torch.equal(path[-1][1], sample.image)


def test_a_reward_runs_once_a_micro_batch() -> None:
    calls = []

    class Counted(NearTarget):
        def forward(self, images: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
            calls.append(len(images))
            return super().forward(images, t, cond)

    flow = GaussianFlow()
    result = search("rbf", flow, Counted(), gradient="dps:0.5")
    assert sum(calls) == int(flow.seen) == sum(sample.nfe for sample in result.samples) + result.rows_padded


class Sleeps(torch.autograd.Function):
    """A backward pass of 20 ms."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 1.0

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        time.sleep(0.02)
        return grads[0]


def test_a_budget_in_seconds_pays_for_the_backward_pass() -> None:
    class Slow(GaussianFlow):
        def velocity(self, x_t: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
            return super().velocity(Sleeps.apply(x_t), t, cond)

    plain, steered = (
        search("svdd", Slow(), gradient=gradient, budget=None, seconds=0.5, slots=1) for gradient in (None, "dps:0.5")
    )
    assert steered.samples[0].budget_nfe <= 4 * 0.5 / 0.02  # rows of a micro-batch, and how many there is time for
    assert steered.samples[0].budget_nfe < plain.samples[0].budget_nfe / 2


# ---- no waits ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"guidance": 3.0, "budget": 80}, {"micro_batch": 4, "lanes": 3}], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_no_steered_round_waits(method: str, options: dict[str, Any]) -> None:
    with FakeDevice() as device:
        bench = build(method, device=DEVICE, gradient="dps:0.5", **options)
        bench.admit(0, "a")
        bench.admit(1, "bb")
        device.clear()
        rounds = bench.run()
        found = {name: unwrap(value) for name, value in bench.engine.release(1).items()}
    assert rounds >= 7
    assert not device.waits and not device.copies
    plain = build(method, gradient="dps:0.5", **options)
    plain.admit(0, "a")
    plain.admit(1, "bb")
    plain.run()
    assert same(found, plain.engine.release(1)) == []


def test_a_gradient_that_waits_is_seen() -> None:
    class Waits(NearTarget):
        def forward(self, images: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
            images.register_hook(lambda grad: grad / grad.abs().max().item())
            return super().forward(images, t, cond)

    with FakeDevice() as device:
        bench = build("svdd", device=DEVICE, reward=Waits(), gradient="dps:0.5")
        bench.admit(0, "a")
        device.clear()
        rounds = bench.run()
    assert sum(device.waits.values()) >= rounds


# ---- what cannot be --------------------------------------------------------------------------------------------


class Weighted(GaussianFlow):
    """With a parameter, as a model has them."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))

    def velocity(self, x_t: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
        assert not self.weight.requires_grad  # or the graph would keep what only its gradient needs
        return super().velocity(x_t * self.weight, t, cond)


def test_parameters_gather_no_gradient_and_are_given_back_as_they_were() -> None:
    flow = Weighted()
    search("rbf", flow, gradient="dps:0.5")
    assert flow.weight.requires_grad and flow.weight.grad is None
    with pytest.raises(KeyError), frozen(flow, None):
        raise KeyError
    assert flow.weight.requires_grad


class Cut(GaussianFlow):
    def velocity(self, x_t: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
        with torch.no_grad():
            return super().velocity(x_t, t, cond)


class CutDecoder(GaussianFlow):
    def decode(self, x0: Tensor) -> Tensor:
        return (x0 * 255).round().to(torch.uint8).float() / 255


class CutReward(NearTarget):
    def forward(self, images: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
        return super().forward(images.detach(), t, cond)


class ByHand(torch.autograd.Function):
    """An op without a backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 1.0

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise RuntimeError("derivative for flash_thing is not implemented")


class NoBackward(NearTarget):
    def forward(self, images: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
        return super().forward(ByHand.apply(images), t, cond)


class WrongShape(NearTarget):
    def forward(self, images: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
        return super().forward(images, t, cond)[:, None]


class Undeclared(NearTarget):
    def __init__(self) -> None:
        super().__init__()
        self.differentiable = False


def on_host(images: Tensor, prompts: list[str]) -> Tensor:
    return images.flatten(1).sum(1)


@pytest.mark.parametrize(
    ("flow", "reward", "kind", "says"),
    [
        (Cut, NearTarget, ModelError, "the model's velocity has no gradient: it runs under no_grad"),
        (CutDecoder, NearTarget, ModelError, "the model's decoder has no gradient"),
        (GaussianFlow, CutReward, RewardError, "the reward, though it is declared differentiable, has no gradient"),
        (GaussianFlow, NoBackward, RewardError, "no gradient to be had: derivative for flash_thing is not implemented"),
        (GaussianFlow, WrongShape, RewardError, r"reward 'near-target': expected shape \(4,\)"),
        (
            GaussianFlow,
            Undeclared,
            OptionError,
            "'near-target' is not declared differentiable: take one of scenes",
        ),
        (GaussianFlow, lambda: on_host, OptionError, "'on_host' runs on the host: take one of scenes, sharp"),
    ],
)
def test_a_gradient_that_cannot_be_had_is_one_clear_error(
    flow: Callable[[], Any], reward: Callable[[], Any], kind: type[Exception], says: str
) -> None:
    with pytest.raises(kind, match=says):
        search("rbf", flow(), reward(), gradient="dps:0.5")
    if flow is not GaussianFlow or reward not in (NoBackward, WrongShape):
        search("rbf", flow(), reward())  # without it all of them run


def test_inference_mode_around_a_search_takes_no_gradient_away() -> None:
    flow, reward = GaussianFlow(), NearTarget()
    wanted = search("rbf", flow, reward, gradient="dps:0.5")
    with torch.inference_mode():
        found = search("rbf", flow, reward, gradient="dps:0.5")
    assert torch.equal(found.samples[0].image, wanted.samples[0].image)


def test_an_unknown_gradient_is_refused() -> None:
    with pytest.raises(OptionError, match="unknown gradient 'fkc'; choose one of: dps"):
        search("rbf", gradient="fkc:1")


class Broken(NearTarget):
    """Its gradient is NaN for images whose first pixel is above `above`, at times above `until`."""

    def __init__(self, above: float, until: float) -> None:
        super().__init__()
        self.above, self.until = above, until

    def forward(self, images: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
        bad = (images.detach()[:, :1] > self.above) & (t > self.until)[:, None]
        images = images * 1.0
        if images.requires_grad:
            images.register_hook(lambda grad: torch.where(bad, math.nan, grad))
        return super().forward(images, t, cond)


@pytest.mark.parametrize("method", METHODS)
def test_a_child_whose_gradient_is_not_finite_never_goes_on(method: str) -> None:
    bench = build(
        method, reward=Broken(0.3, 0.15), gradient="dps:0.1", chains=None if method == "ode" else 4, budget=80
    )
    bench.admit(0, "a")
    bench.admit(1, "bb")
    state = bench.engine.state
    while bench.engine.width() > 0:
        bench.round()
        parents = 2 * torch.arange(len(state.alive)) + state.active
        used = state.alive & (bench.engine.table[state.transition, 3] != 0)  # not before search over paths goes up in t
        assert bool(bench.engine.grad[parents[used]].isfinite().all())
    assert int(state.nan_rewards.sum()) > 0


class LastIsBroken(NearTarget):
    def forward(self, images: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
        images = images * 1.0
        if images.requires_grad:
            images.register_hook(lambda grad: torch.where((t <= 0.1)[:, None], math.nan, grad))
        return super().forward(images, t, cond)


def test_a_finished_sample_needs_no_gradient() -> None:
    """At the last transition nothing goes on: a NaN there changes nothing."""
    plain = search("rbf", reward=NearTarget(), gradient="dps:0.5")
    found = search("rbf", reward=LastIsBroken(), gradient="dps:0.5")
    assert found.nan_rewards == 0
    for one, other in zip(plain.samples, found.samples, strict=True):
        assert one.winner == other.winner and torch.equal(one.latent, other.latent)


class Hungry(torch.autograd.Function):
    """A backward pass that does not fit with more than 2 rows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 1.0

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        if len(grads[0]) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return grads[0]


def test_out_of_memory_in_a_backward_pass_halves_the_micro_batch() -> None:
    class HungryFlow(GaussianFlow):
        def velocity(self, x_t: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
            return super().velocity(Hungry.apply(x_t), t, cond)

    class HungryReward(NearTarget):
        def forward(self, images: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
            if len(images) > 1:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
            return super().forward(images, t, cond)

    assert search("rbf", HungryFlow(), gradient="dps:0.5", micro_batch=8).micro_batch == 2
    assert search("rbf", HungryFlow(), HungryReward(), gradient="dps:0.5", micro_batch=8).micro_batch == 1


# ---- the embedded model --------------------------------------------------------------------------------------


def test_on_scenes_strength_0_changes_nothing_and_a_steered_winner_is_replayed_to_the_bit() -> None:
    """With one row at a time: on processors without AVX-512 the bits of a row of a float32 product of 9 columns, as the
    reward's backward pass has one, depend on where it stands in its micro-batch."""
    flow, options = flowfast.load("scenes"), {"method": "rbf", "budget": 30, "micro_batch": 1}
    prompts = hard_prompts("tuning")[:1]
    plain, still, steered = (
        flowfast.search(flow, prompts, gradient=gradient, **options) for gradient in (None, "dps:0", "dps:1")
    )
    for a, b, c in zip(plain.samples, still.samples, steered.samples, strict=True):
        assert a.winner == b.winner and torch.equal(a.latent, b.latent) and a.nfe == c.nfe
        assert torch.equal(flowfast.replay(flow, c, steered.config)[-1][1], c.image)
        assert not torch.equal(a.image, c.image)


def test_on_scenes_the_gradient_is_the_slope_of_the_reward() -> None:
    """Both ways along it, at times from pure noise to the end, with guidance."""
    flow, reward, generator = flowfast.load("scenes"), rewards.load("scenes"), torch.Generator().manual_seed(0)
    prompts = [prompt for prompt in hard_prompts("tuning")[:10] for _ in range(2)]
    M, n = len(prompts), math.prod(flow.shape)
    schedule = build_schedule(ScheduleSpec(model_interpolant="linear", interpolant="vp", steps=10, t_finish=0.1))
    row = (torch.arange(M) // 2).clamp(max=schedule.transitions - 1)
    t, linear_t = schedule.time[row].float(), schedule.linear_time[row].float()
    conds, asked = [flow.encode(prompts), flow.encode([""] * M)], reward.encode(prompts)
    guidance, table = torch.full((M,), 3.0), schedule.table.float()

    def run(x: Tensor) -> Any:
        u, x0 = torch.zeros(2, M, n).unbind()
        x = x.view(M, *flow.shape)
        with frozen(flow, reward):
            return evaluate(flow, reward, x, t, linear_t, conds, asked, guidance, row, table, u, x0)

    x = torch.randn(M, n, generator=generator)
    grad = run(x).grad
    length = grad.norm(dim=1)
    step = 0.01 * grad / length[:, None]
    slope = (run(x + step).rewards - run(x - step).rewards) / 0.02
    torch.testing.assert_close(slope, length, rtol=0.15, atol=0.0)
    assert abs(float((slope / length).mean()) - 1) < 0.03


@pytest.mark.slow  # half a minute: 64 prompts, for a margin of four standard errors
def test_on_scenes_rbf_steered_scores_higher_at_equal_nfe() -> None:
    """Differences of a prompt's rewards have a mean of 1.7 and a standard deviation of 3.4."""
    flow, prompts = flowfast.load("scenes"), hard_prompts("tuning")[:64]
    options = {"method": "rbf", "budget": 40, "micro_batch": 16}
    plain, steered = (flowfast.search(flow, prompts, gradient=gradient, **options) for gradient in (None, "dps:3"))
    for before, after in zip(plain.samples, steered.samples, strict=True):
        assert before.nfe == after.nfe
    assert sum(sample.reward for sample in steered.samples) > sum(sample.reward for sample in plain.samples)
