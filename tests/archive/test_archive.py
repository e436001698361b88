"""An archive gives the bits of `flowfast.search`: every method, budget and slot; and what is refused."""

from __future__ import annotations

import math
import resource
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import flowfast
from flowfast.archive import load as loading
from flowfast.archive.load import Packages, load_archive, read_info
from flowfast.archive.seal import seal
from flowfast.errors import ArchiveError, BudgetError, FlowfastError, ModelError, OptionError
from flowfast.ops.noise import noise_key
from tests.models.tiny import MODULES
from tests.toys import METHODS, PROMPTS, GaussianFlow, NearTarget, bits

PIPELINES = {name: case for module in MODULES for name, case in module.CASES.items()}
REGROUPING = ("sop", "smc", "code")
SOMETIMES = "3@0.3:0.95"
"""Guidance acts at some transitions."""
SIZES = {"method": "rbf", "steps": 6, "micro_batch": 8, "slots": 3}


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def exported(path: Path, flow: Any = None, reward: Any = None, **options: Any) -> Any:
    flowfast.export(flow or GaussianFlow(), path, reward=reward or NearTarget(), **{**SIZES, **options})
    return load_archive(path)


def admit(archive: Any, slot: int, prompt: str, budget: int, seed: int = 0, guidance: float = 1.0, **rest: Any) -> None:
    null = archive.encode([rest["negative"]]) if "negative" in rest else {}
    until = rest.get("until", math.inf)
    archive.admit(slot, archive.encode([prompt]), null, noise_key(seed, prompt), budget, guidance, until)


def assert_same(found: dict[str, Tensor], sample: flowfast.Sample) -> None:
    """What `release` found is the sample of Python's search, bit for bit."""
    for k, ranked in enumerate(sample.top):
        last = int(found["transition"][k])
        path = tuple((int(found["chain"][k, r]), r, int(found["candidate"][k, r])) for r in range(last + 1))
        assert (float(found["reward"][k]), path) == (ranked.reward, ranked.winner.path)
        for name, wanted in (("image", ranked.image), ("x0", ranked.latent), ("x", ranked.x_t)):
            assert torch.equal(bits(found[name][k]), bits(wanted))
    assert found["reward"][len(sample.top) :].isinf().all()
    assert found["cost"].tolist()[:3] == [sample.nfe, sample.nfe_speculative, sample.reward_calls]


def searched(prompt: str, budget: int, flow: Any = None, reward: Any = None, **options: Any) -> flowfast.Sample:
    options = {**SIZES, **options, "budget": budget}
    return flowfast.search(flow or GaussianFlow(), [prompt], reward=reward or NearTarget(), **options).samples[0]


def refused(call: Any, kind: type[FlowfastError], match: str) -> None:
    """An error raised inside of an archive ends in the name of its class and its text."""
    with pytest.raises(torch.jit.Error, match=rf"{kind.__module__}\.{kind.__name__}: .*{match}"):
        call()


# ---- the same bits ----


@pytest.mark.parametrize("exported_at", [0.0, 3.0], ids=["one pass", "two passes"])
def test_guidance_up_to_1_is_off(exported_at: float, tmp_path: Path) -> None:
    """One pass where it was off at export; with two, the conditional velocity alone."""
    archive = exported(tmp_path / "a.ffa", method="bon", guidance=exported_at, budget=56)
    info, passes = archive.info(), 2 if exported_at > 1 else 1
    assert (info["guidance"], info["passes"]) == (str(max(1.0, exported_at)), str(passes))
    sample = searched("a", 28, method="bon", guidance=0)
    for slot, scale in enumerate((0.0, 0.5, 1.0)):
        admit(archive, slot, "a", 28 * passes, guidance=scale)
    archive.search()
    for slot in range(3):
        found = archive.release(slot)
        assert torch.equal(bits(found["x0"][0]), bits(sample.latent))
        assert found["cost"].tolist()[0] == sample.nfe * passes
    for scale in (-0.5, 1000.5, math.nan, math.inf):
        refused(lambda scale=scale: admit(archive, 0, "a", 28 * passes, guidance=scale), OptionError, "from 0 to 1000")


@pytest.mark.parametrize("guidance", [1.0, 3.0, SOMETIMES], ids=["one pass", "two passes", "either"])
@pytest.mark.parametrize(("method", "evaluations"), [*((method, 61) for method in METHODS), ("sop", 57)])
def test_every_budget_gives_the_bits_of_python_or_is_refused(
    method: str, evaluations: int, guidance: Any, tmp_path: Path
) -> None:
    """SoP's 4 chains are 2 groups of 2 at 57 evaluations, and 1 group of 4 at 41."""
    options = {"method": method, "guidance": guidance, "top_k": 2}
    passes = 1 if guidance == 1.0 else 2
    most = evaluations * passes
    archive = exported(tmp_path / "a.pt", budget=most, **options)
    info = archive.info()
    ran = []
    for budget in range(most + 1):
        slot, prompt = budget % 3, PROMPTS[budget % 4]
        try:
            admit(archive, slot, prompt, budget, guidance=float(info["guidance"]))
        except torch.jit.Error as error:
            assert f"BudgetError: this archive cannot run a budget of {budget} NFE: choose " in str(error)
            continue
        archive.search()
        assert_same(archive.release(slot), searched(prompt, budget, **options))
        ran.append(budget)
    assert [ran[0], ran[-1]] == [int(info["budget_min"]), int(info["budget_max"])]
    assert ran[-1] == most
    assert (len(ran) < 20 * passes) == (method in REGROUPING)  # which chains go on depends on how many there are


@pytest.mark.parametrize("method", METHODS)
def test_slots_are_refilled_and_cancelled_on_the_way(method: str, tmp_path: Path) -> None:
    archive = exported(tmp_path / "a.pt", budget=42, method=method)

    def rounds(count: int) -> None:
        for _ in range(count):
            archive.observe(archive.score(archive.propose()))

    admit(archive, 0, "a", 42, seed=1)
    rounds(1)
    admit(archive, 1, "bb", 42, seed=2)
    rounds(2)
    cancelled = archive.release(1)
    assert 0 < int(cancelled["cost"][0]) < 42
    admit(archive, 1, "ccc", 42, seed=3)
    rounds(1)
    admit(archive, 2, "dddd", 42, seed=4)
    waiting = [(0, "a", 1), (1, "ccc", 3), (2, "dddd", 4)]
    for slot, prompt, seed in waiting:  # the first one ends first
        while not archive.done(slot):
            rounds(1)
        assert_same(archive.release(slot), searched(prompt, 42, method=method, seed=seed))
    assert archive.width() == 0


@pytest.mark.parametrize("method", METHODS)
def test_a_cut_is_that_of_python(method: str, tmp_path: Path) -> None:
    """Two cuts of a request between others, which keep their bits: as the `cuts` of a rerun in Python. Also at a budget
    with fewer chains or lanes than the archive has."""
    archive = exported(tmp_path / "a.pt", budget=84, method=method)
    small = next(budget for budget in range(42, 85) if archive.budgets.plan_of[budget] >= 0)
    for budget in (84, small):
        admit(archive, 0, "a", 84)
        admit(archive, 1, "bb", budget)
        cuts, rounds, ahead = [(2, 30), (4, 9)], 0, [archive.still(1)]
        assert ahead[0][0] == archive.rounds_of(budget)
        while archive.width():
            for _, evaluations in (cut for cut in cuts if cut[0] == rounds):
                archive.limit(1, evaluations)
                ahead.append(archive.still(1))
            archive.observe(archive.score(archive.propose()))
            rounds += 1
        wanted = searched("bb", budget, method=method, cuts=[(0, *cut) for cut in cuts])
        assert 0 < wanted.nfe < budget
        assert ahead[0][1] > ahead[1][1] > ahead[2][1]  # of what is ahead
        assert_same(archive.release(1), wanted)
        assert_same(archive.release(0), searched("a", 84, method=method))
    refused(lambda: archive.limit(1, 9), OptionError, "a slot with a request")
    admit(archive, 1, "bb", 84)
    refused(lambda: archive.limit(1, -1), OptionError, "at least 0 NFE")


def test_the_largest_budget_within_so_many_rounds(tmp_path: Path) -> None:
    archive = exported(tmp_path / "a.pt", budget=60, method="rbf", lanes=1, guidance=3.0, chains=1)
    least = int(archive.info()["budget_min"])
    runs = [budget for budget in range(0, 61, 2) if archive.budgets.plan_of[budget // 2] >= 0]
    for rounds in range(archive.rounds_of(60) + 2):
        fit = [budget for budget in runs if archive.rounds_of(budget) <= rounds]
        assert archive.budget_within(60, rounds) == max(fit, default=least)
    assert archive.budget_within(41, archive.rounds_of(41)) == 41
    refused(lambda: archive.budget_within(1, 5), BudgetError, "cannot run a budget of 1 NFE")


def test_a_request_has_its_own_guidance_negative_prompt_and_end(tmp_path: Path) -> None:
    options = {"method": "rbf", "guidance": 3.0, "negative_prompt": "dddd", "steps": 10, "lanes": 1}
    finished: list[float] = []
    archive = exported(tmp_path / "a.pt", budget=400, **options)
    whole = searched("a", 400, **options, on_round=lambda made: finished.extend(c.reward for c in made if c.finished))
    until = sorted(finished)[-8]
    admit(archive, 0, "a", 400, guidance=3.0)  # the negative prompt of the export
    admit(archive, 1, "a", 400, guidance=2.0, negative="bb")
    admit(archive, 2, "a", 400, guidance=3.0, until=until)
    rounds = 0
    while not archive.done(2):
        archive.observe(archive.score(archive.propose()))
        rounds += 1
    assert archive.width() > 0  # its plan has rounds left, its chains have not
    assert 0 < int(archive.spent()[2]) < 400 and archive.spent()[0] == 4 * rounds
    assert_same(archive.release(2), searched("a", 400, **options, until=until))
    archive.search()
    assert_same(archive.release(0), whole)
    assert_same(archive.release(1), searched("a", 400, **{**options, "guidance": 2.0, "negative_prompt": "bb"}))


def test_a_driver_sees_whose_the_images_are(tmp_path: Path) -> None:
    """`lanes` names the candidates that Python's `on_round` reports, with the rewards they got."""
    archive, seen, reported = exported(tmp_path / "a.pt", budget=42), set(), set()
    admit(archive, 1, "bb", 42)
    while archive.width():
        images = archive.propose()
        rewards = archive.score(images)
        found = archive.lanes()
        archive.observe(rewards)  # lays the lanes of the next round; what a driver was told stays
        assert all(len(value) == len(images) == len(rewards) for value in found.values())
        for i in found["live"].nonzero().flatten().tolist():
            assert found["slot"][i] == 1
            names = ("chain", "transition", "candidate")
            seen.add((*(int(found[name][i]) for name in names), float(found["t"][i]), float(rewards[i])))
    searched(
        "bb",
        42,
        on_round=lambda made: reported.update((c.chain, c.transition, c.candidate, c.t, c.reward) for c in made),
    )
    assert {(*lane[:3], *torch.tensor(lane[3:]).tolist()) for lane in reported} == seen


def test_the_driver_may_bring_the_rewards(tmp_path: Path) -> None:
    archive, target = exported(tmp_path / "a.pt", reward="host", budget=42), NearTarget()
    assert archive.info()["host_reward"] == "1"
    admit(archive, 0, "ccc", 42)
    images = archive.propose()
    refused(lambda: archive.score(images), flowfast.errors.RewardError, "give rewards to observe")
    refused(lambda: archive.observe(torch.zeros(3)), flowfast.errors.RewardError, r"expected 8 rewards.*\[3\]")
    while True:
        asked = {"target": target.encode(["ccc"])["target"].expand(len(images), 1)}
        archive.observe(target(images, torch.zeros(len(images)), asked))
        if not archive.width():
            break
        images = archive.propose()
    assert_same(archive.release(0), searched("ccc", 42))


@pytest.mark.parametrize("guidance", [1.0, 3.0, SOMETIMES], ids=["one pass", "two passes", "either"])
@pytest.mark.parametrize("micro_batch", [2, 8])
def test_the_calls_of_a_round_one_by_one(guidance: Any, micro_batch: int, tmp_path: Path) -> None:
    """What a driver does whose model lies outside; here model and reward are Python's own. On a path whose times are
    not the linear ones."""
    flow, reward, options = GaussianFlow((3, 2)), OfTime(), {"guidance": guidance, "micro_batch": micro_batch}
    flow.interpolant = "trigonometric"
    archive = exported(tmp_path / "a.pt", flow, reward, budget=84, **options)
    for slot, prompt in enumerate(PROMPTS[:3]):
        admit(archive, slot, prompt, 84, guidance=float(archive.info()["guidance"]))
    while archive.width():
        archive.lay()
        archive.branch()
        rewards = []
        for i in range(archive.null_parts()):
            given = archive.null_inputs(i)
            archive.keep_null(i, flow.velocity(given["x"], given["t"], {"mean": given["null/mean"]}))
        for i in range(archive.parts()):
            given = archive.inputs(i)
            x, t = given["x"], given["t"]
            assert x.shape == (micro_batch, 3, 2)
            u = flow.velocity(x, t, {"mean": given["cond/mean"]})
            archive.mean(i, u, flow.velocity(x, t, {"mean": given["null/mean"]}) if guidance == 3.0 else None)
            asked = archive.reward_inputs(i)
            rewards.append(reward(archive.latents(i), asked["t"], {"target": asked["reward/target"]}))
        archive.observe(torch.cat(rewards))
    for slot, prompt in enumerate(PROMPTS[:3]):
        assert_same(archive.release(slot), searched(prompt, 84, flow, reward, **options))


class OfTime(NearTarget):
    def forward(self, images: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
        return 3 * t - (images.flatten(1) - cond["target"]).square().sum(1)


# ---- the embedded model ----


def test_scenes_parses_prompts_and_gives_pythons_pictures(tmp_path: Path) -> None:
    flow = flowfast.load("scenes")
    prompts = ["three red circles and one blue square", "a red circle left of a green triangle"]
    info = flowfast.export(flow, tmp_path / "a.pt", reward="scenes", model="scenes", budget=60, slots=2)
    wanted = flowfast.search(flow, prompts, reward="scenes", budget=60, slots=2, micro_batch=int(info["micro_batch"]))
    archive = load_archive(tmp_path / "a.pt")
    for slot, prompt in enumerate(prompts):
        admit(archive, slot, prompt, 60, guidance=3.0)
    archive.search()
    for slot, sample in enumerate(wanted.samples):
        assert_same(archive.release(slot), sample)
    for prompt in ("a dog", "six red circles"):
        with pytest.raises(flowfast.errors.PromptError) as wrong:
            flow.encode([prompt])
        with pytest.raises(torch.jit.Error) as caught:
            archive.encode([prompt])
        assert str(caught.value).strip().endswith(f"flowfast.errors.PromptError: {wrong.value}")
    assert info["scripted_encode"] == "1" and info["model"] == "scenes" and info["shape"] == "3,32,32"
    assert read_info(tmp_path / "a.pt") == {**info, "content_hash": (tmp_path / "a.pt").read_bytes()[-64:].decode()}


# ---- what does not script ----


class Untyped(nn.Module):
    """Python that TorchScript refuses in every method; `rows`: as if the batch were of a fixed size."""

    def __init__(self, rows: int | None = None):
        super().__init__()
        self.shape, self.interpolant, self.t_finish, self.guidance, self.rows = (3,), "linear", 0.1, 1.0, rows
        self.scale = nn.Parameter(torch.tensor([0.5]))
        self.inner = GaussianFlow()

    def encode(self, prompts):
        return {key: value for key, value in self.inner.encode(list(prompts)).items()}

    def velocity(self, x_t, t, cond):
        known = {**cond}
        n = self.rows or x_t.shape[0]
        return self.inner.velocity(x_t.view(n, -1), t, known) * self.scale * 2

    def decode(self, x0):
        return [*x0.split(1)][0] if self.rows == 0 else x0 * {**{"one": 1.0}}["one"]


class UntypedReward(NearTarget):
    def encode(self, prompts):
        return {**super().encode(list(prompts))}

    def forward(self, images, t, cond):
        return -sum(
            (image - target) ** 2 for image, target in zip(images.unbind(1), [cond["target"][:, 0]] * 3, strict=True)
        )


def test_what_does_not_script_is_traced_and_its_prompts_are_looked_up(tmp_path: Path) -> None:
    flow, reward = Untyped(), UntypedReward()
    with pytest.raises(OptionError, match="give all prompts that the archive shall know"):
        exported(tmp_path / "a.pt", flow, reward, budget=42)
    archive = exported(tmp_path / "a.pt", flow, reward, prompts=["bb", "a", "bb"], budget=42, guidance=3.0)
    assert archive.info()["scripted_encode"] == "0"
    assert flow.scale.requires_grad
    for slot, prompt in enumerate(("a", "bb")):
        admit(archive, slot, prompt, 42, guidance=3.0)
    archive.search()
    for slot, prompt in enumerate(("a", "bb")):
        assert_same(archive.release(slot), searched(prompt, 42, flow, reward, guidance=3.0))
    assert torch.equal(archive.encode(["a", "bb"])["cond/mean"], flow.encode(["a", "bb"])["mean"])
    refused(lambda: archive.encode(["ccc"]), flowfast.errors.PromptError, "'ccc' is not in this archive, which holds 2")


def test_a_plain_function_is_a_model_too(tmp_path: Path) -> None:
    inner = GaussianFlow()
    flow = flowfast.flow_from(inner.velocity, (3,), encode=inner.encode)
    archive = exported(tmp_path / "a.pt", flow, prompts=["a"], budget=42)
    admit(archive, 0, "a", 42)
    archive.search()
    assert_same(archive.release(0), searched("a", 42))


def test_a_number_of_rows_that_was_taken_down_is_refused(tmp_path: Path) -> None:
    class Fixed(Untyped):
        def velocity(self, x_t, t, cond):
            rows = torch.arange(int(x_t.shape[0])).tolist()  # a trace keeps these numbers
            return torch.stack([x_t[i] * self.scale + {**cond}["mean"][i] for i in rows])

    with pytest.raises(ModelError, match="velocity of Fixed gives something else at 8 rows"):
        exported(tmp_path / "a.pt", Fixed(), prompts=["a"], budget=42)


def test_a_trace_that_kept_what_a_prompt_said_is_refused(tmp_path: Path) -> None:
    class Kept(Untyped):
        def velocity(self, x_t, t, cond):
            return super().velocity(x_t, t, cond) + float({**cond}["mean"].amax())

    exported(tmp_path / "a.pt", Kept(), prompts=["a", "abcdef"], budget=42)  # the same to the toy
    exported(tmp_path / "a.pt", Kept(), prompts="a", budget=42)
    with pytest.raises(ModelError, match="velocity of Kept gives something else at 8 rows"):
        exported(tmp_path / "a.pt", Kept(), prompts=["a", "bb"], budget=42)


TRACED_NO = {
    "hunyuan-video", "hunyuan-video-true-cfg", "ltx-distilled", "lumina2", "lumina2-one-pass", "wan-2.2", "z-image",
    "z-image-turbo",
}  # fmt: skip
"""Tiny pipelines whose velocity or decoder asks for values on the way: docs/design.md says so."""


@pytest.mark.slow
@pytest.mark.parametrize("name", PIPELINES)
def test_a_pipeline_of_diffusers_is_traced_or_refused(name: str, tmp_path: Path) -> None:
    case = PIPELINES[name]
    flow = flowfast.from_diffusers(case.build(), steps=4, **case.size, **case.options)
    options = {"method": "svdd", "steps": None, "interpolant": "linear", "diffusion": "square:1", "micro_batch": 4}
    prompts = ["a red cat", "two dogs on a blue sofa"]
    reward = "sharpness" if len(flow.decode(torch.zeros(1, *flow.shape)).shape) == 4 else "frames:sharpness"
    if name in TRACED_NO:
        with pytest.raises(
            ModelError, match=r"(velocity|decode) of \w+ (gives something else|fails at|can be neither)"
        ):
            exported(tmp_path / "a.pt", flow, reward, prompts=prompts, budget=60, **options)
        return
    archive = exported(tmp_path / "a.pt", flow, reward, prompts=prompts, budget=60, **options)
    for slot, prompt in enumerate(prompts):
        admit(archive, slot, prompt, 60, guidance=flow.guidance)
    archive.search()
    for slot, prompt in enumerate(prompts):
        assert_same(archive.release(slot), searched(prompt, 60, flow, reward, **options))


# ---- compiled parts beside the archive ----

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="AOTInductor needs a C++ compiler")


@pytest.mark.slow  # three packages are 30 s of g++; tests/runner/test_flowfast_run.py compiles three in `make test`
@needs_compiler
@pytest.mark.parametrize("guidance", [3.0, SOMETIMES], ids=["two passes", "either"])
def test_compiled_parts_serve_the_same_search(guidance: Any, tmp_path: Path) -> None:
    options = {"guidance": guidance, "micro_batch": 2, "slots": 2}
    archive = exported(tmp_path / "a.pt", budget=84, format="aoti", **options)
    packages = Packages(tmp_path / "a.pt", archive)
    assert list(packages.part) == ["velocity", "decode", "reward"]
    for slot, prompt in enumerate(PROMPTS[:2]):
        admit(archive, slot, prompt, 84, guidance=3.0)
    refused(lambda: archive.propose(), ModelError, "the model lies outside of this archive: call its packages")
    while archive.width():
        archive.observe(packages.score(packages.propose()))
    for slot, prompt in enumerate(PROMPTS[:2]):
        found, wanted = archive.release(slot), searched(prompt, 84, **options)
        assert_close(found, wanted)
        assert "image" not in found
        assert torch.equal(packages.part["decode"](found["x0"].expand(2, -1).contiguous())[:1], found["x0"])


def assert_close(found: dict[str, Tensor], sample: flowfast.Sample) -> None:
    """The same path, and a reward within 1e-5: compiled arithmetic rounds in another order."""
    last = int(found["transition"][0])
    path = tuple((int(found["chain"][0, r]), r, int(found["candidate"][0, r])) for r in range(last + 1))
    assert path == sample.winner.path
    assert abs(float(found["reward"][0]) - sample.reward) < 1e-5
    assert int(found["cost"][0]) == sample.nfe


@pytest.mark.slow
@needs_compiler
def test_the_embedded_model_compiled(tmp_path: Path) -> None:
    flow = flowfast.load("scenes")
    prompts = ["three red circles and one blue square", "a red circle left of a green triangle"]
    info = flowfast.export(flow, tmp_path / "a.pt", reward="scenes", slots=2, budget=200, format="aoti")
    archive = load_archive(tmp_path / "a.pt")
    packages = Packages(tmp_path / "a.pt", archive)
    for slot, prompt in enumerate(prompts):
        admit(archive, slot, prompt, 200, guidance=3.0)
    while archive.width():
        archive.observe(packages.score(packages.propose()))
    wanted = flowfast.search(flow, prompts, reward="scenes", budget=200, micro_batch=int(info["micro_batch"]))
    for slot, sample in enumerate(wanted.samples):
        assert_close(archive.release(slot), sample)


# ---- what is refused ----


def test_an_archive_that_holds_its_model_has_no_packages(tmp_path: Path) -> None:
    with pytest.raises(ArchiveError, match="holds its model itself"):
        Packages(tmp_path / "b.pt", exported(tmp_path / "b.pt", budget=42))


def test_calls_that_cannot_work_are_refused(tmp_path: Path) -> None:
    archive = exported(tmp_path / "a.pt", budget=42, method="bon")
    cond = archive.encode(["a"])
    refused(lambda: archive.propose(), OptionError, "admit a request first")
    for slot in (-1, 3):
        refused(lambda: admit(archive, slot, "a", 42), OptionError, rf"slot must lie in 0\.\.2, got {slot}")  # noqa: B023
    refused(lambda: archive.admit(0, {}, {}, 0, 42, 1.0, math.inf), OptionError, "without 'cond/mean'")
    both = {name: value.expand(2, -1) for name, value in cond.items()}
    refused(lambda: archive.admit(0, both, {}, 0, 42, 1.0, math.inf), OptionError, "one row of shape")
    refused(lambda: admit(archive, 0, "a", 42, guidance=2.0), OptionError, "without guidance")
    for budget, near in ((-3, "7"), (6, "7"), (43, "42"), (1 << 60, "42")):
        refused(lambda: admit(archive, 0, "a", budget), BudgetError, f"of {budget} NFE: choose {near}, or")  # noqa: B023
    assert archive.width() == 0
    smc = exported(tmp_path / "b.pt", budget=46, method="smc")
    refused(lambda: admit(smc, 0, "a", 41), BudgetError, "of 41 NFE: choose 42, or")
    svdd = exported(tmp_path / "c.pt", budget=14, method="svdd")  # 13: one chain with more lanes than each of two has
    refused(lambda: admit(svdd, 0, "a", 13), BudgetError, "of 13 NFE: choose 7 or 14, or")


@pytest.mark.parametrize(
    ("options", "kind", "match"),
    [
        ({"format": "onnx"}, OptionError, "unknown format 'onnx': choose one of torchscript, aoti"),
        ({"seconds": 1.0}, OptionError, "NFE only"),
        ({"gradient": "dps:1"}, OptionError, "no gradient"),
        ({"reward": lambda images, prompts: [0.0]}, OptionError, "export with reward 'host'"),
        ({"budget": 5}, BudgetError, "needs at least"),
        ({"slots": 0}, OptionError, "'slots': must be in 1 .. 65,536, got 0"),
        ({"micro_batch": -8}, OptionError, "'micro_batch': must be in 1 .. 65,536, got -8"),
        ({"colour": 5}, OptionError, "unknown option 'colour'"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_exports_that_cannot_work_are_refused(options: Any, kind: Any, match: str, tmp_path: Path) -> None:
    with pytest.raises(kind, match=match):
        flowfast.export(GaussianFlow(), tmp_path / "a.pt", **{"reward": NearTarget(), **SIZES, **options})
    assert not list(tmp_path.iterdir())


def test_an_archive_decodes_in_full_where_python_has_a_preview(tmp_path: Path) -> None:
    flow = GaussianFlow()
    flow.defaults = flowfast.FlowDefaults(preview=flow.decode)
    with pytest.raises(OptionError, match="no finalists"):
        flowfast.export(flow, tmp_path / "a.pt", reward=NearTarget(), prompts=["a"], finalists=2)
    assert flowfast.export(flow, tmp_path / "a.pt", reward=NearTarget(), prompts=["a"], budget=40)["top"] == "1"


def test_a_file_that_is_not_whole_or_not_ours_is_refused(tmp_path: Path) -> None:
    exported(tmp_path / "a.pt", budget=42)
    whole = (tmp_path / "a.pt").read_bytes()
    broken = [whole[:i] + bytes([whole[i] ^ 1]) + whole[i + 1 :] for i in range(0, len(whole), len(whole) // 97)]
    with loading.quiet():
        torch.jit.save(torch.jit.script(NearTarget()), tmp_path / "foreign.pt")
    foreign = (tmp_path / "foreign.pt").read_bytes()
    for data in (*broken, whole[:-1], whole[: len(whole) // 2], whole + b"\0", b"", b"PK", foreign):
        (tmp_path / "b.pt").write_bytes(data)
        with pytest.raises(ArchiveError, match="not a flowfast archive, or it is damaged"):
            load_archive(tmp_path / "b.pt")
    with pytest.raises(ArchiveError, match="cannot read"):
        load_archive(tmp_path / "none.pt")


def test_another_noise_stream_or_format_is_refused_and_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    exported(tmp_path / "a.pt", budget=42)
    monkeypatch.setattr(loading, "STREAM_VERSION", 2)
    with pytest.raises(ArchiveError, match="has noise_stream 1, this flowfast has 2: export it again"):
        load_archive(tmp_path / "a.pt")
    monkeypatch.undo()
    monkeypatch.setattr(loading, "FORMAT_VERSION", 9)
    with pytest.raises(ArchiveError, match="has format_version 5, this flowfast has 9"):
        load_archive(tmp_path / "a.pt")


def test_a_sealed_file_that_torch_cannot_load_is_refused(tmp_path: Path) -> None:
    import io
    import zipfile

    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        file.writestr("archive/data.pkl", b"?")
    (tmp_path / "a.pt").write_bytes(seal(buffer.getvalue(), loading.STREAM_VERSION))
    with pytest.raises(ArchiveError, match="PyTorch .* cannot load the archive"):
        load_archive(tmp_path / "a.pt")


def test_an_export_is_there_whole_or_not_at_all(tmp_path: Path) -> None:
    """Where the disk is full too: PyTorch's own writer would end the process."""
    (tmp_path / "file").write_text("")
    with pytest.raises(flowfast.errors.OutputError, match="cannot write"):
        flowfast.export(GaussianFlow(), tmp_path / "file" / "a.pt", reward=NearTarget(), budget=42, **SIZES)
    exported(tmp_path / "a.pt", budget=42)
    before = (tmp_path / "a.pt").read_bytes()
    limits, ignored = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(flowfast.errors.OutputError, match="cannot write"):
            exported(tmp_path / "a.pt", budget=43)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, ignored)
    assert (tmp_path / "a.pt").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.pt", "file"]
