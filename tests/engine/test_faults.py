"""What goes wrong in rewards and models (testing.md F1, F2) stays where it went wrong, or is one clear error."""

import math
import signal
import subprocess
import sys
import time
from functools import partial

import pytest
import torch
from torch import Tensor

import flowfast
from flowfast.errors import ModelError, RewardError
from tests.toys import METHODS, PROMPTS, GaussianFlow, NearTarget, bits, build, same

OPTIONS = {"budget": 60, "steps": 6, "micro_batch": 8}


class Spoiled(NearTarget):
    """NaN for every image that `bad` names."""

    def __init__(self, bad) -> None:
        super().__init__()
        self.bad = bad

    def forward(self, images: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
        rewards = super().forward(images, t, cond)
        return torch.where(self.bad(images, rewards), torch.nan, rewards)


# ---- rewards -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [method for method in METHODS if method != "ode"])
def test_a_nan_reward_never_wins(method):
    """NaN for all that would be best: an argmax over NaN is a known fault."""
    plain = flowfast.search(GaussianFlow(), PROMPTS, reward=NearTarget(), method=method, **OPTIONS)
    bound = sorted(sample.reward for sample in plain.samples)[-1] - 1e-6
    spoiled = Spoiled(lambda images, rewards: rewards > bound)
    result = flowfast.search(GaussianFlow(), PROMPTS, reward=spoiled, method=method, **OPTIONS)
    for sample in result.samples:
        assert sample.reward <= bound
        assert sample.image.isfinite().all()
    assert result.nan_rewards > 0


@pytest.mark.parametrize("method", METHODS)
def test_the_nan_of_one_prompt_leaves_the_others_bit_identical(method):
    class OnePrompt(NearTarget):
        def forward(self, images: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
            rewards = super().forward(images, t, cond)
            return torch.where((cond["target"][:, 0] == 2.0) & (images[:, 0] > 0.3), torch.nan, rewards)

    prompts = [p for p in PROMPTS if len(p) % 3 != 1] + ["a"]  # target 2 is the prompt "a"
    runs = [
        flowfast.search(GaussianFlow(), prompts[:-1] + last, reward=reward, method=method, **OPTIONS).samples
        for reward, last in ((NearTarget(), []), (OnePrompt(), []))
    ]
    bench = build(method, reward=OnePrompt(), budget=60)
    bench.admit(0, "bb")
    bench.admit(1, "a")
    bench.run()
    alone = build(method, budget=60)
    alone.admit(0, "bb")
    alone.run()
    assert same(bench.engine.release(0), alone.engine.release(0)) == []
    for left, right in zip(*runs, strict=True):
        assert left.winner == right.winner
        assert torch.equal(bits(left.latent), bits(right.latent))


@pytest.mark.parametrize("method", METHODS)
def test_all_nan_rewards_are_an_error(method):
    spoiled = Spoiled(lambda images, rewards: torch.ones_like(rewards, dtype=torch.bool))
    with pytest.raises(ModelError, match="NaN"):
        flowfast.search(GaussianFlow(), ["a"], reward=spoiled, method=method, **OPTIONS)


@pytest.mark.parametrize("infinite", [-math.inf, math.inf])
@pytest.mark.parametrize("method", METHODS)
def test_infinite_rewards_do_not_poison_the_rest(method, infinite):
    """-inf: a veto; it loses like a NaN. +inf wins, and the sample that won it is finite."""

    class Veto(NearTarget):
        def forward(self, images: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
            rewards = super().forward(images, t, cond)
            return torch.where(images[:, 0] > 0.5, infinite, rewards)

    bench = build(method, reward=Veto(), budget=60, slots=8)
    for slot in range(8):
        bench.admit(slot, "a", seed=slot)
    bench.run()
    state = bench.engine.state
    assert not state.top_reward.isnan().any()
    assert state.top_x0[state.top_reward[:, 0] > -math.inf].isfinite().all()
    assert method == "ode" or bool((state.top_reward > -math.inf).any())


@pytest.mark.parametrize("host", [False, True], ids=["device", "host"])
@pytest.mark.parametrize("fault", ["raises", "shape", "type"])
def test_a_bad_reward_is_an_error_that_names_it(fault, host):
    def answer(images: Tensor):
        if fault == "raises":
            raise KeyError("colour")
        return images.new_zeros(images.shape[0], 2) if fault == "shape" else "high"

    class Bad(NearTarget):
        def forward(self, images: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
            return answer(images)

    def plain(images, prompts):
        return answer(images)

    with pytest.raises(RewardError, match="plain" if host else "near-target"):
        flowfast.search(GaussianFlow(), PROMPTS, reward=plain if host else Bad(), method="svdd", **OPTIONS)


def test_a_reward_that_hangs_meets_its_deadline():
    def slow(images, prompts):
        time.sleep(20)

    started = time.perf_counter()
    with pytest.raises(RewardError, match="slow"):
        flowfast.search(GaussianFlow(), ["a"], reward=slow, method="ode", reward_deadline=0.1, **OPTIONS)
    assert time.perf_counter() - started < 10


def test_a_deadline_is_not_waited_for_twice():
    """The images of the other batch wait for the reward, too: nobody waits for them once one has failed."""

    def hang(images, prompts):
        time.sleep(20)

    started = time.perf_counter()
    with pytest.raises(RewardError, match="'hang' did not answer within 1.5 s"):
        flowfast.search(GaussianFlow(), ["a", "bb"], reward=hang, method="bon", reward_deadline=1.5, **OPTIONS)
    assert time.perf_counter() - started < 2.8


HANGS = """
import sys, threading, torch, flowfast
def hang(images, prompts):
    print("asked", flush=True)
    threading.Event().wait()
options = dict(method="bon", budget=60, reward_deadline=float(sys.argv[2]) or None, slots=int(sys.argv[1]))
flow = flowfast.flow_from(lambda x, t, cond: x, shape=(3, 4, 4))
flowfast.search(flow, ["a", "b"], reward=hang, **options)
"""


def test_a_reward_that_hangs_is_left_at_one_signal():
    """Two batches, the one on another thread; one batch; a deadline, which has a thread of its own."""
    cases = [(2, 0, "SIGINT"), (1, 0, "SIGINT"), (2, 60, "SIGINT"), (2, 0, "SIGTERM")]
    heeds = partial(signal.signal, signal.SIGINT, signal.default_int_handler)  # a background job of a shell ignores it
    programs = [
        subprocess.Popen(
            [sys.executable, "-c", HANGS, str(slots), str(deadline)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=heeds,
        )
        for slots, deadline, _ in cases
    ]  # fmt: skip
    try:
        for program, (_, _, name) in zip(programs, cases, strict=True):
            assert program.stdout.readline() == "asked\n", program.stderr.read()
            time.sleep(0.2)  # the other batch has begun its round
            program.send_signal(getattr(signal, name))
            _, said = program.communicate(timeout=20)
            assert program.returncode == -getattr(signal, name)
            if name == "SIGINT":
                assert said.endswith("KeyboardInterrupt\n"), said
                assert said.count("Traceback") == 1
    finally:
        for program in programs:
            program.kill()
            program.communicate()


def test_what_was_handed_out_before_a_reward_failed_stays():
    calls, done = [], []

    def fails_late(images, prompts):
        calls.append(len(prompts))
        if len(done) == 2:
            raise RuntimeError("gone")
        return images.flatten(1).sum(1)

    with pytest.raises(RewardError, match="fails_late"):
        flowfast.search(
            GaussianFlow(),
            PROMPTS,
            reward=fails_late,
            method="svdd",
            slots=1,
            on_sample=lambda index, sample: done.append((index, sample)),
            **OPTIONS,
        )
    assert [index for index, _ in done] == [0, 1]


@pytest.mark.parametrize("method", METHODS)
def test_a_host_reward_is_the_device_reward(method):
    """The same numbers through a plain callable give the same samples; it is called once a round, with live rows."""
    device, calls = NearTarget(), []

    def host(images: Tensor, prompts: list[str]) -> list[float]:
        calls.append(len(prompts))
        return device(images, torch.zeros(len(prompts)), device.encode(list(prompts))).tolist()

    left = flowfast.search(GaussianFlow(), PROMPTS, reward=device, method=method, score_all=True, **OPTIONS)
    right = flowfast.search(GaussianFlow(), PROMPTS, reward=host, method=method, score_all=True, **OPTIONS)
    assert sum(calls) == sum(sample.reward_calls for sample in right.samples)
    assert len(calls) == right.rounds
    for one, other in zip(left.samples, right.samples, strict=True):
        assert one.winner == other.winner
        assert torch.equal(bits(one.image), bits(other.image))


# ---- the model -----------------------------------------------------------------------------------------------


class Broken(GaussianFlow):
    """NaN for particles whose x_t `bad` names."""

    def __init__(self, bad) -> None:
        super().__init__()
        self.bad = bad

    def velocity(self, x_t: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
        u = super().velocity(x_t, t, cond)
        return torch.where(self.bad(x_t, t).unsqueeze(1), torch.nan, u)


class Blind(NearTarget):
    """A reward that cannot see NaN, as one that looks at 8-bit pictures."""

    def forward(self, images: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
        return super().forward(images.nan_to_num(100.0).clamp(-3, 3), t, cond)


class Loving(NearTarget):
    """A reward that prefers NaN to anything."""

    def forward(self, images: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
        return super().forward(images.nan_to_num(1.0 + cond["target"].min().floor()), t, cond).nan_to_num(0.0)


@pytest.mark.parametrize("reward", [NearTarget, Blind, Loving])
@pytest.mark.parametrize("method", METHODS)
def test_a_broken_particle_never_wins_and_leaves_the_others_bit_identical(method, reward):
    """Broken: every particle of the first prompt whose state has a large first coordinate."""

    class OnePrompt(GaussianFlow):
        def velocity(self, x_t: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
            u = super().velocity(x_t, t, cond)
            bad = (cond["mean"][:, 0] == self.encode(["a"])["mean"][0, 0]) & (x_t[:, 0] > 0.4)
            return torch.where(bad.unsqueeze(1), torch.nan, u)

    runs = []
    for flow in (GaussianFlow(), OnePrompt()):
        bench = build(method, flow=flow, reward=reward(), budget=60, slots=6, top=2)
        for slot in range(6):
            bench.admit(slot, "a" if slot % 2 == 0 else "bb", seed=slot)
        bench.run()
        runs.append([bench.engine.release(slot) for slot in range(6)])
    for slot in (1, 3, 5):
        assert same(runs[0][slot], runs[1][slot]) == []
    for slot in (0, 2, 4):
        found = runs[1][slot]
        won = found["reward"] > -math.inf
        assert found["x0"][won].isfinite().all() and found["x"][won].isfinite().all()


@pytest.mark.parametrize("reward", [NearTarget, Blind, Loving])
@pytest.mark.parametrize("method", METHODS)
def test_a_model_that_is_nan_throughout_is_an_error_and_never_an_image(method, reward):
    flow = Broken(lambda x, t: torch.ones_like(t, dtype=torch.bool))
    with pytest.raises(ModelError, match="NaN"):
        flowfast.search(flow, ["a", "bb"], reward=reward(), method=method, **OPTIONS)


# ---- where no decision is due --------------------------------------------------------------------------------


class Late(NearTarget):
    """`value` above linear t = `until`."""

    def __init__(self, value: float, until: float = 0.3) -> None:
        super().__init__()
        self.value, self.until = value, until

    def forward(self, images: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
        rewards = -(images.flatten(1) - cond["target"]).square().sum(1)
        return torch.where(t > self.until, self.value, rewards)


def early(flow_or_reward: str, value: float, until: float = 0.3):
    """A model's picture, or its reward, is `value` in the early rounds of every chain, above linear t = `until`."""

    class Hazy(GaussianFlow):
        """Its decoder cannot draw what is still far from any sample: posterior means that lie close together."""

        def decode(self, x0: Tensor) -> Tensor:
            return torch.where((x0 - 0.2).abs().amax(1, keepdim=True) < 0.3, value, x0)

    return (GaussianFlow(), Late(value, until)) if flow_or_reward == "reward" else (Hazy(), NearTarget())


@pytest.mark.parametrize("scripted", [False, True], ids=["eager", "scripted"])
@pytest.mark.parametrize("value", [math.nan, -math.inf], ids=str)
@pytest.mark.parametrize("method", ["ode", "bon"])
def test_an_early_reward_that_is_none_does_not_end_a_sample(method, value, scripted):
    """Nothing is decided there: the samples are those of a reward that looks at the end alone, bit for bit."""
    runs = []
    for flow, reward in ((GaussianFlow(), NearTarget()), early("reward", value)):
        bench = build(method, flow=flow, reward=reward, budget=60, scripted=scripted, top=2, score_all=True)
        bench.admit(0, "a")
        bench.admit(1, "bb")
        bench.run()
        runs.append([bench.engine.release(slot) for slot in range(2)])
    for plain, late in zip(*runs, strict=True):
        assert plain["reward"][0] > -math.inf
        calls = plain["cost"].tolist()[:3]
        assert late["cost"].tolist()[:3] == calls
        assert (int(late["cost"][3]) > 0) == math.isnan(value)
        assert same({**plain, "cost": late["cost"]}, late) == []


CHAINS_ALONE = ["bon", "ode", "sop", "smc", "code"]  # one candidate a step


@pytest.mark.parametrize(
    ("what", "method", "host"),
    [
        *(("image", m, host) for host in (False, True) for m in CHAINS_ALONE),
        *(("reward", m, False) for m in [*CHAINS_ALONE, "svdd", "rbf"]),
    ],
)
def test_every_method_gets_past_early_rounds_without_a_reward_where_it_has_no_choice(what, method, host):
    """Chains of a method without a choice there go on; what a choice was due for needs a reward. (A reward on the host
    does not see the time.)"""
    flow, reward = early(what, math.nan, until=0.9)  # the very first noise only, where a chain has one candidate

    def on_host(images: Tensor, prompts: list[str]) -> Tensor:
        return NearTarget()(images, torch.zeros(len(prompts)), reward.encode(list(prompts)))

    scorer = on_host if host else reward
    result = flowfast.search(flow, ["a"], reward=scorer, method=method, score_all=True, **OPTIONS)
    assert result.samples[0].image.isfinite().all() and result.samples[0].reward > -math.inf
    assert result.nan_rewards > 0


def test_a_broken_latent_still_ends_its_chain():
    """Its children would be NaN, too; the chains that are sound come to their end."""
    flow = Broken(lambda x, t: (t > 0.5) & (x[:, 0] > 0))
    result = flowfast.search(flow, ["a"], reward=Blind(), method="bon", **OPTIONS)
    sample = result.samples[0]
    assert 0 < sample.nfe < 56 and sample.image.isfinite().all()


@pytest.mark.parametrize(
    ("flow", "reward", "says"),
    [
        (Broken(lambda x, t: t < 0.5), NearTarget(), "of 8 chains 8 ended where the model's output was not finite"),
        (GaussianFlow(), Spoiled(lambda images, rewards: rewards < 0), "8 of its 8 candidates .*8 came to their end"),
        (GaussianFlow(), lambda images, _: [-math.inf] * len(images), "8 came .*; no other reward .* above -inf"),
    ],
    ids=["model", "reward", "minus infinity"],
)
def test_the_error_says_what_happened(flow, reward, says):
    with pytest.raises(ModelError, match=f"no finished sample of prompt 'a' has a reward .*{says}"):
        flowfast.search(flow, ["a"], reward=reward, method="bon", **OPTIONS)
    with pytest.raises(
        ModelError, match="of 1 chains 1 ended where|1 of its 1 candidates .*, 1 came to|0 of its 1 .*-inf"
    ):
        flowfast.search(flow, ["a"], reward=reward, method="ode", **OPTIONS)


def test_a_velocity_of_the_wrong_shape_is_an_error():
    flow = flowfast.flow_from(lambda x, t, cond: x[:, :1], shape=(3,))
    with pytest.raises(ModelError, match="shape"):
        flowfast.search(flow, ["a"], reward=NearTarget(), method="ode", **OPTIONS)
