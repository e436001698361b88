"""flowfast-run finds what Python finds, bit for bit; what it refuses; the library under its own tests and installed."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import flowfast
from flowfast.archive.load import Packages, load_archive
from flowfast.archive.seal import seal
from flowfast.errors import ArchiveError
from flowfast.ops.noise import noise_key
from tests.cpp import PREFIX, ROOT, TESTS, command
from tests.rounds.test_images import EightBits, Holes
from tests.toys import GaussianFlow, NearTarget

PROMPTS = [
    "three red circles and one blue square", "two yellow crosses and a green triangle",
    "a red circle left of a green triangle", "four blue squares", "one green cross",
]  # fmt: skip
SHAPE = (3, 4, 4)
pytestmark = pytest.mark.usefixtures("prefix")


def run(*argv: object) -> list[dict[str, Any]]:
    """The results of flowfast-run in one thread."""
    said = command(PREFIX / "bin/flowfast-run", *argv, "--threads", "1", "--json")
    return [json.loads(line) for line in said.splitlines()]


def digest(image: torch.Tensor) -> str:
    return hashlib.blake2b(image.contiguous().numpy().tobytes(), digest_size=32).hexdigest()


def facts(sample: flowfast.Sample) -> dict[str, Any]:
    return {
        "reward": sample.reward, "nfe": sample.nfe, "nfe_speculative": sample.nfe_speculative,
        "reward_calls": sample.reward_calls, "unspent": sample.unspent, "key": sample.winner.key,
        "path": [list(step) for step in sample.winner.path], "image": digest(sample.image),
    }  # fmt: skip


def assert_same(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    assert {name: found[name] for name in wanted if name != "image"} == {
        k: v for k, v in wanted.items() if k != "image"
    }
    assert found["image"]["blake2b"] == wanted["image"]


# ---- the same bits ----


@pytest.mark.parametrize(
    "options",
    [{}, {"seed": -7, "repeat": 2}, {"budget": 57, "guidance": 5.0, "negative_prompt": PROMPTS[3]}],
    ids=str,
)
def test_python_torchscript_and_the_program_find_the_same_bits(scenes: Path, options: dict[str, Any]) -> None:
    request: dict[str, Any] = {"budget": 200, "seed": 0, "repeat": 0, **options}
    words = [word for name, value in request.items() for word in ("--" + name.replace("_", "-"), value)]
    (found,) = run(scenes, "--prompt", PROMPTS[0], *words)
    sample = flowfast.search(
        flowfast.load("scenes"), [PROMPTS[0]], reward="scenes", method="rbf", micro_batch=4, **request
    ).samples[0]
    assert_same(found, facts(sample))

    archive = load_archive(scenes)
    null = archive.encode([options["negative_prompt"]]) if "negative_prompt" in options else {}
    key = noise_key(request["seed"], PROMPTS[0], request["repeat"])
    with torch.no_grad():
        guidance = options.get("guidance", 3.0)
        archive.admit(0, archive.encode([PROMPTS[0]]), null, key, request["budget"], guidance, float("inf"))
        archive.search()
        scripted = archive.release(0)
    assert digest(scripted["image"][0]) == found["image"]["blake2b"]
    assert scripted["reward"].tolist() == [found["reward"]]


def test_guidance_up_to_1_is_off(scenes: Path, tmp_path: Path) -> None:
    """As in Python at as many evaluations: this archive has two passes, and counts both."""
    asked = (scenes, "--prompt", PROMPTS[0], "--prompt", PROMPTS[3], "--budget", 96)
    by_scale = {scale: run(*asked, "--guidance", scale) for scale in ("1", "0", "0.5")}
    options = {"reward": "scenes", "method": "rbf", "micro_batch": 4, "slots": 2}
    wanted = flowfast.search(flowfast.load("scenes"), [PROMPTS[0], PROMPTS[3]], budget=48, guidance=1.0, **options)
    for found in by_scale.values():
        for entry, sample in zip(found, wanted.samples, strict=True):
            for name in ("nfe", "nfe_speculative", "unspent"):
                entry[name] //= 2
            assert_same(entry, facts(sample))
    assert by_scale["0"][0]["image"] != by_scale["0"][1]["image"]


def test_seeds_are_any_whole_number_as_python_reads_them(scenes: Path) -> None:
    for text in ("18446744073709551616", "-0", "007", "+5", " 1_0 ", "-170141183460469231731687303715884105729"):
        (found,) = run(scenes, "--prompt", PROMPTS[0], "--budget", 24, "--seed", text)
        assert found["key"] == noise_key(int(text), PROMPTS[0]), text


def test_until_stops_early(tmp_path: Path) -> None:
    options = {"method": "rbf", "steps": 10, "micro_batch": 4}
    flowfast.export(GaussianFlow(SHAPE), tmp_path / "toy.pt", reward=Mean(), budget=400, slots=1, **options)
    (found,) = run(tmp_path / "toy.pt", "--prompt", "a", "--budget", 400, "--until", -2)
    flow = GaussianFlow(SHAPE)
    wanted = flowfast.search(flow, ["a"], reward=Mean(), budget=400, until=-2.0, **options).samples[0]
    assert wanted.nfe < 400
    assert_same(found, facts(wanted))


@pytest.mark.parametrize("hole", [math.nan, math.inf])
def test_a_picture_that_is_not_finite_never_wins(hole: float, tmp_path: Path) -> None:
    """Though the reward, which sees 8 bits, likes it best."""
    options: dict[str, Any] = {"method": "svdd", "steps": 6, "micro_batch": 8, "slots": 1, "budget": 60}
    flowfast.export(Holes(hole, SHAPE), tmp_path / "holes.pt", reward=EightBits(), **options)
    (found,) = run(tmp_path / "holes.pt", "--prompt", "a", "--budget", 60)
    result = flowfast.search(Holes(hole, SHAPE), ["a"], reward=EightBits(), **options)
    assert found["nan_rewards"] == result.nan_rewards > 0
    assert_same(found, facts(result.samples[0]))


def test_more_prompts_than_slots(scenes: Path, tmp_path: Path) -> None:
    listed = tmp_path / "prompts.txt"
    listed.write_text("\n".join(PROMPTS[1:]) + "\n\n")
    png = tmp_path / "out.png"
    found = run(scenes, "--prompt", PROMPTS[0], "--prompts", listed, "--budget", 48, "--png", png)
    wanted = flowfast.search(
        flowfast.load("scenes"), PROMPTS, reward="scenes", method="rbf", budget=48, micro_batch=4, slots=2
    )
    assert [entry["prompt"] for entry in found] == PROMPTS
    for i, sample in enumerate(wanted.samples):
        assert_same(found[i], facts(sample))
        pixels = (sample.image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
        assert np.array_equal(np.asarray(Image.open(tmp_path / f"out-{i}.png")), pixels)
    assert not png.exists()


def test_prompts_of_any_text(tmp_path: Path) -> None:
    """Keys and JSON of texts with quotes, control characters and letters beyond ASCII."""
    prompts = ['say "no"\t\\', "d\u00e9j\u00e0 \u2603", " two\nlines ", "x" * 300]
    archive = tmp_path / "toy.pt"
    options = {"method": "svdd", "steps": 6, "micro_batch": 8}
    flowfast.export(GaussianFlow(SHAPE), archive, reward=Mean(), budget=61, slots=3, prompts=prompts, **options)
    found = run(archive, *(word for prompt in prompts for word in ("--prompt", prompt)), "--budget", 40, "--seed", 5)
    wanted = flowfast.search(GaussianFlow(SHAPE), prompts, reward=Mean(), budget=40, seed=5, **options)
    for entry, sample in zip(found, wanted.samples, strict=True):
        assert entry["prompt"] == sample.prompt
        assert_same(entry, facts(sample))


class Mean(NearTarget):
    """A reward of images (N, 3, H, W) by their mean."""

    def forward(self, images: torch.Tensor, t: torch.Tensor, cond: dict[str, torch.Tensor]) -> torch.Tensor:
        return -(images.mean([1, 2, 3]) - cond["target"][:, 0]).abs()


PACKED: dict[str, Any] = {
    "method": "rbf", "steps": 6, "micro_batch": 4, "guidance": 3.0, "budget": 84, "slots": 2, "top_k": 4
}  # fmt: skip


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, flowfast.Sample]:
    """An archive of packages whose decoder fails at a batch of nothing but the best sample of "bb", and that sample."""
    best = flowfast.search(GaussianFlow(SHAPE), ["bb"], reward=Mean(), **PACKED).samples[0]
    value = float(best.latent[0, 0, 0])

    class Alone(GaussianFlow):
        def decode(self, x0: torch.Tensor) -> torch.Tensor:
            return torch.where(((x0[:, :1, :1, :1] - value).abs() < 1e-5).all(), torch.nan, x0)

    path = tmp_path_factory.mktemp("packed") / "toy.pt"
    flowfast.export(Alone(SHAPE), path, reward=Mean(), format="aoti", **PACKED)
    return path, best


def test_a_picture_that_breaks_as_it_is_decoded_at_the_end(packed: tuple[Path, flowfast.Sample]) -> None:
    """The best one that is whole comes out."""
    archive, best = packed
    (found,) = run(archive, "--prompt", "bb", "--budget", 84)
    assert found["nan_rewards"] == 1
    assert found["path"] == [list(step) for step in best.top[1].winner.path]


def test_packages_of_aotinductor_serve_the_same_search(packed: tuple[Path, flowfast.Sample], tmp_path: Path) -> None:
    (found,) = run(packed[0], "--prompt", "a", "--budget", 84)
    driven = load_archive(packed[0])
    packages = Packages(packed[0], driven)
    assert list(packages.part) == ["velocity", "decode", "reward"]
    with torch.no_grad():
        driven.admit(0, driven.encode(["a"]), {}, noise_key(0, "a"), 84, 3.0, float("inf"))
        with pytest.raises(torch.jit.Error, match="the model lies outside of this archive: call its packages"):
            driven.propose()
        while driven.width():
            driven.observe(packages.score(packages.propose()))
        wanted = driven.release(0)
        assert "image" not in wanted
        image = packages.part["decode"](wanted["x0"].expand(4, -1, -1, -1).contiguous())[0]
    assert found["reward"] == float(wanted["reward"][0])
    assert found["image"]["blake2b"] == digest(image)
    eager = flowfast.search(GaussianFlow(SHAPE), ["a"], reward=Mean(), **PACKED)
    assert [tuple(step) for step in found["path"]] == list(eager.samples[0].winner.path)

    archive = Path(shutil.copytree(packed[0].parent, tmp_path / "damaged")) / "toy.pt"
    package = archive.with_name("toy.decode.pt2")
    package.write_bytes(package.read_bytes()[:-1] + b"?")
    assert "toy.decode.pt2 is damaged or of another export" in refused(archive, "--prompt", "a", "--budget", 84)
    with pytest.raises(ArchiveError, match="toy.decode.pt2 is damaged or of another export"):
        Packages(archive, driven)
    package.unlink()
    with pytest.raises(ArchiveError, match="cannot read"):
        Packages(archive, driven)


# ---- what is refused ----


def refused(*argv: object, code: int = 2) -> str:
    done = subprocess.run([PREFIX / "bin/flowfast-run", *map(str, argv)], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (code, ""), done.stdout + done.stderr
    assert done.stderr.startswith("flowfast-run: ") and done.stderr.count("\n") == 1
    return done.stderr


def test_what_cannot_work_is_refused(scenes: Path, tmp_path: Path) -> None:
    asked = (scenes, "--prompt", PROMPTS[0])
    for said, *argv in (
        ("unknown option --budgets: choose of --budget, ", *asked, "--budgets", 3),
        ("--budget needs a value", *asked, "--budget"),
        ("--budget must be a number, got '2x'", *asked, "--budget", "2x"),
        ("expected --budget NFE", *asked),
        ("expected a prompt", scenes, "--budget", 48),
        ("expected an archive", "--prompt", "a", "--budget", 48),
        ("expected one archive, got also 'b.pt'", scenes, "b.pt"),
        ("budgets of 24 to 200 NFE, got 201", *asked, "--budget", 201),
        ("budgets of 24 to 200 NFE, got -1", *asked, "--budget", -1),
        ("prompt 'a cat': unknown colour 'a'; write 1-3 phrases", scenes, "--prompt", "a cat", "--budget", 48),
        ("guidance must be a number from 0 to 1000", *asked, "--budget", 48, "--guidance", "inf"),
        ("guidance must be a number from 0 to 1000", *asked, "--budget", 48, "--guidance", "nan"),
        ("from 0 to 1000 (up to 1 is off), got -0.5", *asked, "--budget", 48, "--guidance", "-0.5"),
        ('a seed must be a whole number of up to 4300 digits, got "1.5"', *asked, "--budget", 48, "--seed", "1.5"),
        ("the prompt cannot be drawn: it is empty; write", scenes, "--prompt", " ", "--budget", 48),
        ("the prompt cannot be drawn: it is no UTF-8 from byte 4 on", scenes, "--prompt", b"caf\xe9", "--budget", 48),
        ("threads must be from 1 to 4096, or 0", *asked, "--budget", 48, "--threads", -1),
        ("threads must be from 1 to 4096", *asked, "--budget", 48, "--threads", 100000),
        ("repeat must be at least 0, got -1", *asked, "--budget", 48, "--repeat", -1),
        ("device must be cpu, or cuda where PyTorch has it, got 'tpu'", *asked, "--budget", 48, "--device", "tpu"),
        ("none.txt: No such file or directory", scenes, "--prompts", tmp_path / "none.txt", "--budget", 48),
        ("--png: there is no folder ", *asked, "--budget", 24, "--png", tmp_path / "none/out.png"),
        ("cannot write ", *asked, "--budget", 24, "--png", tmp_path),
        ("cannot read ", tmp_path / "none.pt", "--prompt", "a", "--budget", 48),
    ):
        words = [word if isinstance(word, bytes) else str(word) for word in argv]
        done = subprocess.run([PREFIX / "bin/flowfast-run", *words], capture_output=True, text=True)
        assert done.returncode == 2, (argv, done.stdout, done.stderr)
        assert done.stderr.startswith("flowfast-run: ") and said in done.stderr and done.stderr.count("\n") == 1


def test_an_archive_whose_reward_lives_elsewhere(tmp_path: Path) -> None:
    flowfast.export(GaussianFlow(SHAPE), tmp_path / "a.pt", reward="host", budget=42, steps=6, slots=1)
    said = refused(tmp_path / "a.pt", "--prompt", "a", "--budget", 42)
    assert "was exported with reward 'host': give one in Options::reward" in said


def test_an_archive_of_another_noise_stream_is_refused_saying_so(scenes: Path, tmp_path: Path) -> None:
    whole = scenes.read_bytes()
    body = bytearray(whole[: whole.rindex(b"flowfast-archive format_version")])
    body[-2:] = b"\0\0"  # the length of the comment
    (tmp_path / "same.pt").write_bytes(seal(bytes(body), noise_stream=1))
    assert (tmp_path / "same.pt").read_bytes() == whole
    (tmp_path / "other.pt").write_bytes(seal(bytes(body), noise_stream=2))
    said = refused(tmp_path / "other.pt", "--prompt", PROMPTS[0], "--budget", 48)
    assert "was written for noise stream 2, this library has noise stream 1" in said


def test_info_and_progress(scenes: Path) -> None:
    (info,) = run(scenes, "--info")
    assert info == {**load_archive(scenes).info(), "content_hash": scenes.read_bytes()[-64:].decode()}
    words = [PREFIX / "bin/flowfast-run", scenes, "--prompt", PROMPTS[0], "--budget", "48", "--progress"]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.stdout.startswith(f"{PROMPTS[0]}: reward ")
    *_, last = told = done.stderr.splitlines()
    assert len(told) > 5 and last.startswith(f"{PROMPTS[0]}: 48 of 48 NFE, best reward so far ")


# ---- the library ----


def test_the_library_under_its_own_tests(scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also in a locale with decimal commas, where this system can make one."""
    words = ["localedef", "-i", "de_DE", "-f", "UTF-8", tmp_path / "de_DE.UTF-8"]
    if shutil.which("localedef") and subprocess.run(words, capture_output=True).returncode == 0:
        monkeypatch.setenv("LOCPATH", str(tmp_path))
    assert "100% tests passed" in command("ctest", "--preset", "cpu")
    assert "all checks passed" in command(TESTS / "flowfast_archive_tests", scenes)


def test_the_example_builds_on_the_installed_prefix(scenes: Path, tmp_path: Path) -> None:
    command("cmake", "-S", ROOT / "examples/cpp", "-B", tmp_path, "-G", "Ninja", f"-DCMAKE_PREFIX_PATH={PREFIX}")
    command("cmake", "--build", tmp_path)
    said = command(tmp_path / "example", scenes, PROMPTS[0], tmp_path / "out.png")
    (found,) = run(scenes, "--prompt", PROMPTS[0], "--budget", 100)
    assert said.startswith(f"reward {found['reward']:.4f} after {found['nfe']} NFE")
    assert Image.open(tmp_path / "out.png").size == (32, 32)
    header = (PREFIX / "include/flowfast/searcher.h").read_text()
    assert [line for line in header.splitlines() if line.startswith("#include") and "<" not in line] == []
    assert "torch" not in header.replace("PyTorch", "")
