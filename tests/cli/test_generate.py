"""`flowfast generate`: its files, its rerun from a config, and what it refuses."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from flowfast import api
from flowfast.engine import call
from flowfast.engine.runner import LiveRunner
from flowfast.errors import RewardError
from tests.cli.conftest import PROMPTS, Run, lines_of

FAST = ("--reward", "sharpness", "--budget", "40", "--steps", "5")
FILES = {"best.png", "search.png", "result.json", "timing.json", "candidates.jsonl", "config.yaml"}


def folders(out: Path) -> list[Path]:
    return sorted(path for path in out.iterdir() if path.is_dir())


@pytest.mark.usefixtures("drawn")
@pytest.mark.parametrize("method", ["rbf", "bon", "svdd"])
def test_it_writes_all_files_of_every_prompt(run: Run, tmp_path: Path, method: str) -> None:
    text = run("generate", *PROMPTS[:2], *FAST, "--method", method, "--out", tmp_path / "o")
    assert str(tmp_path / "o" / "00-two-red-circles") in text
    assert [path.name for path in folders(tmp_path / "o")] == [
        "00-two-red-circles",
        "01-a-green-cross-and-a-blue-square",
    ]
    for prompt, folder in zip(PROMPTS, folders(tmp_path / "o"), strict=False):
        assert {path.name for path in folder.iterdir()} == FILES
        result = json.loads((folder / "result.json").read_text())
        assert result["prompt"] == prompt
        assert result["method"] == method
        assert result["nfe"] + result["unspent"] == result["budget_nfe"] == 40
        assert result["heldout"] in (0.0, 1.0)
        assert {"seed", "nfe_speculative", "rows_padded", "reward_calls", "reward", "micro_batch"} <= result.keys()
        assert {"flowfast", "noise_stream", "torch"} <= result["versions"].keys()
        assert set(json.loads((folder / "timing.json").read_text())["seconds"]) == {
            "total",
            "model",
            "decode",
            "reward",
            "search",
        }
        candidates = lines_of(folder / "candidates.jsonl")
        scored = [line for line in candidates if line["reward"] is not None]
        chain, transition, candidate = (result["winner"][name] for name in ("chain", "transition", "candidate"))
        assert result["winner"]["path"][-1] == [chain, transition, candidate]
        assert (chain, transition, candidate) in {(c["chain"], c["transition"], c["candidate"]) for c in candidates}
        assert len(scored) == result["reward_calls"] and (len(scored) < len(candidates)) == (method != "rbf")
        best = max(line["reward"] for line in scored if line["finished"])
        assert best == result["reward"]
        assert Image.open(folder / "best.png").size == (32, 32)
        assert Image.open(folder / "search.png").size[0] > 600


def test_a_rerun_from_its_config_is_identical(run: Run, tmp_path: Path) -> None:
    first = run("generate", *PROMPTS[:3], *FAST, "--seed", "7", "--out", tmp_path / "a")
    config = folders(tmp_path / "a")[1] / "config.yaml"
    assert first
    run("generate", "--config", config, "--out", tmp_path / "b")
    for one, two in zip(folders(tmp_path / "a"), folders(tmp_path / "b"), strict=True):
        for name in FILES - {"timing.json"}:
            assert (one / name).read_bytes() == (two / name).read_bytes(), name


@pytest.mark.usefixtures("ticking")
def test_a_rerun_of_seconds_takes_the_budget_they_became(run: Run, tmp_path: Path) -> None:
    run("generate", PROMPTS[0], "--reward", "sharpness", "--steps", "5", "--seconds", "0.3", "--out", tmp_path / "a")
    (folder,) = folders(tmp_path / "a")
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert config["seconds"] is None
    assert config["budget"] == json.loads((folder / "result.json").read_text())["budget_nfe"]


def test_a_steered_call_reruns_from_its_config(run: Run, tmp_path: Path) -> None:
    """And its replay, of which search.png is made, ends at the winner; a scale alone leaves the gradient."""
    run(
        "generate",
        *PROMPTS[:2],
        *FAST,
        "--method",
        "rbf",
        "--budget",
        "80",
        "--guidance",
        "2,dps:50",
        "--out",
        tmp_path / "a",
    )
    config = folders(tmp_path / "a")[0] / "config.yaml"
    assert {"guidance": 2.0, "gradient": "dps:50"}.items() <= yaml.safe_load(config.read_text()).items()
    run("generate", "--config", config, "--out", tmp_path / "b")
    run("generate", "--config", config, "--guidance", "dps:0", "--out", tmp_path / "c")
    run("generate", "--config", config, "--guidance", "3", "--out", tmp_path / "d")
    for one, two, plain in zip(*(folders(tmp_path / name) for name in "abc"), strict=True):
        for name in FILES - {"timing.json"}:
            assert (one / name).read_bytes() == (two / name).read_bytes(), name
        assert json.loads((one / "result.json").read_text())["nfe"] == 80
        assert (one / "best.png").read_bytes() != (plain / "best.png").read_bytes()
    changed = yaml.safe_load((folders(tmp_path / "d")[0] / "config.yaml").read_text())
    assert (changed["guidance"], changed["gradient"]) == (3.0, "dps:50")


@pytest.mark.usefixtures("ticking")
def test_options_override_the_config(run: Run, tmp_path: Path) -> None:
    run("generate", *PROMPTS[:2], *FAST, "--out", tmp_path / "a")
    config = folders(tmp_path / "a")[0] / "config.yaml"
    run("generate", PROMPTS[2], "--config", config, "--seed", "3", "--seconds", "0.3", "--out", tmp_path / "b")
    (folder,) = folders(tmp_path / "b")
    result = json.loads((folder / "result.json").read_text())
    assert result["prompt"] == PROMPTS[2]
    assert result["seed"] == 3
    assert result["budget_nfe"] != 40


def test_writing_again_replaces(run: Run, tmp_path: Path) -> None:
    for _ in range(2):
        run("generate", PROMPTS[0], *FAST, "--method", "rbf", "--out", tmp_path)
    (folder,) = folders(tmp_path)
    assert len(lines_of(folder / "candidates.jsonl")) == 40


def test_top_k(run: Run, tmp_path: Path) -> None:
    run("generate", PROMPTS[0], *FAST, "--method", "bon", "--top-k", "3", "--out", tmp_path)
    (folder,) = folders(tmp_path)
    assert {"best.png", "best-02.png", "best-03.png"} <= {path.name for path in folder.iterdir()}
    result = json.loads((folder / "result.json").read_text())
    rewards = [result["reward"], *(entry["reward"] for entry in result["top"])]
    assert rewards == sorted(rewards, reverse=True)


@pytest.mark.parametrize("fewer", [("--top-k", "2"), ("--method", "ode", "--top-k", "4")], ids=" ".join)
def test_pictures_of_an_earlier_call_do_not_stay(run: Run, tmp_path: Path, fewer: tuple[str, ...]) -> None:
    argv = ("generate", PROMPTS[0], *FAST, "--method", "bon", "--out")
    run(*argv, tmp_path / "o", "--top-k", "4")
    (folder,) = folders(tmp_path / "o")
    for name in ("best.mp4", "best-03.mp4", "best-of-mine.png", "bestiary.png"):
        (folder / name).write_text("")
    run(*argv, tmp_path / "o", *fewer)
    run(*argv, tmp_path / "alone", *fewer)
    (alone,) = folders(tmp_path / "alone")
    names = {path.name for path in alone.iterdir()} | {"best-of-mine.png", "bestiary.png"}
    assert {path.name for path in folder.iterdir()} == names


def config_file(folder: Path, text: str) -> Path:
    path = folder / "mine.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--method", "best"], "unknown method 'best': choose one of auto, bon"),
        (["--reward", "beauty"], "unknown reward 'beauty': choose one of scenes, sharpness"),
        (["--model", "flux"], "unknown model 'flux': choose one of scenes"),
        (["--interpolant", "cubic"], "interpolant"),
        (["--diffusion", "cubic:1"], "diffusion"),
        (["--integrator", "rk4"], "integrator"),
        (["--preset", "mine"], "unknown preset 'mine': choose one of paper"),
        (["--budget", "3"], "at least"),
        (["--budget", "0"], "option 'budget': must be"),
        (["--budget", "many"], "'--budget': Input should be a valid integer"),
        (["--seconds", "-1"], "option 'seconds': must be above 0"),
        (["--guidance", "much"], "unknown gradient 'much'; choose one of: dps"),
        (["--guidance", "3,4"], "expected one scale and one gradient at most, like 3,dps:0.5"),
        (["--guidance", "3,dps:much"], "expected a finite number, got 'much'"),
        (["--guidance", "dps:1", "--reward", "compressibility"], "a differentiable reward, but 'compressibility'"),
        (["--budget", "40", "--seconds", "1"], "give one"),
        (["--chains", "400"], "chains"),
        (["--option", "n"], "NAME=VALUE"),
        (["--option", "colour=3"], "no option 'colour'"),
        (["--bugdet", "3"], "No such option"),
        (["--config", "not-there.yaml"], "cannot read --config"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_options_are_one_line_and_leave_nothing(run: Run, tmp_path: Path, argv: list[str], says: str) -> None:
    defaults = [] if "--reward" in argv else ["--reward", "sharpness"]
    assert says in run.refused("generate", PROMPTS[0], *defaults, *argv, "--out", tmp_path / "o")
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("budgte: 3", "unknown option 'budgte': choose of budget"),
        ("- 3", "expected a mapping"),
        ("budget: [", "cannot read --config"),
        ("budget: soon", "option 'budget'"),
        ("prompts: 3", "list of texts"),
        ("!!python/object/apply:os.getcwd []", "cannot read --config"),
    ],
)
def test_bad_config_files(run: Run, tmp_path: Path, text: str, says: str) -> None:
    path = config_file(tmp_path, text)
    assert says in run.refused("generate", PROMPTS[0], "--config", path, "--out", tmp_path / "o")
    assert not (tmp_path / "o").exists()


def test_bad_prompts(run: Run, tmp_path: Path) -> None:
    assert "expected at least one PROMPT" in run.refused("generate", "--out", tmp_path / "o")
    line = run.refused("generate", PROMPTS[0], "nonsense", *FAST, "--out", tmp_path / "o")
    assert "prompt 2 of 2: cannot read 'nonsense'" in line
    run("generate", "", "nonsense", PROMPTS[0], *FAST, "--out", tmp_path / "o", expect=2)
    assert "flowfast: prompt 2 of 3: cannot read 'nonsense'" in run.err.splitlines()[1]
    ocr = ("--reward", "sharpness+ocr", "--budget", "40", "--steps", "5")
    run("generate", PROMPTS[0], *ocr, "--out", tmp_path / "o", expect=2)
    assert "reward ocr: expected the text to draw in quotes" in run.err
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("empty", ["", "  ", "\udcff"], ids=["empty", "blank", "no text"])
def test_a_prompt_that_cannot_be_drawn_is_named_first_and_the_others_drawn(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, empty: str
) -> None:
    """By its number, before the model is there; the others keep their numbers; --resume and reruns do the same."""
    argv = (empty, PROMPTS[0], empty, PROMPTS[1])
    load, said = api.load, []
    monkeypatch.setattr(api, "load", lambda *a, **k: (said.append(run.capfd.readouterr().err), load(*a, **k))[1])
    monkeypatch.setattr(call, "CHECKPOINT_SECONDS", 0.0)
    run("generate", *argv, *FAST, "--out", tmp_path / "a", expect=2)
    fault = "it is empty" if not empty.strip() else "character 1 is half of a pair"
    assert said[0].startswith(f"flowfast: prompt 1 of 4: {fault}") and "; prompt 3 of 4: " in said[0]
    assert said[0].endswith("left out, the others are drawn\n") and said[0].count("\n") == 1
    names = ["01-two-red-circles", "03-a-green-cross-and-a-blue-square"]
    assert [path.name for path in folders(tmp_path / "a")] == names
    decide, rounds = LiveRunner._decide, [0]

    def dies(self: Any, found: Any) -> None:
        rounds[0] += 1
        if rounds[0] == 4:
            raise RewardError("killed")
        decide(self, found)

    with monkeypatch.context() as patch:
        patch.setattr(LiveRunner, "_decide", dies)
        run("generate", *argv, *FAST, "--out", tmp_path / "b", expect=2)
    run("generate", "--resume", tmp_path / "b", expect=2)
    run("generate", "--config", tmp_path / "a" / names[0] / "config.yaml", "--out", tmp_path / "c", expect=2)
    run("generate", *PROMPTS[:2], *FAST, "--out", tmp_path / "alone")
    for name, alone in zip(names, folders(tmp_path / "alone"), strict=True):
        for other in ("a", "b", "c"):
            assert {path.name for path in (tmp_path / other / name).iterdir()} == FILES
            assert (tmp_path / other / name / "best.png").read_bytes() == (alone / "best.png").read_bytes()


def test_lists_by_name_order_and_standard_input(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Texts first, then the lists in their order; a list that the shell made a prompt of is named."""
    (tmp_path / "a.csv").write_text(f"id,words\n1,{PROMPTS[2]}\n")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(json.dumps([{"words": PROMPTS[3]}]).encode())))
    argv = (
        "--prompts",
        "-",
        "--prompts",
        tmp_path / "a.csv",
        "--prompt-column",
        "words",
        *FAST,
        "--out",
        tmp_path / "o",
    )
    run("generate", PROMPTS[0], *argv)
    names = ["00-two-red-circles", "01-three-blue-crosses", "02-one-yellow-triangle"]
    assert [path.name for path in folders(tmp_path / "o")] == names
    (tmp_path / "b.TXT").write_text(PROMPTS[0])
    for text in (tmp_path / "a.csv", tmp_path / "b.TXT", "-"):
        line = run.refused("generate", PROMPTS[0], text, *FAST, "--out", tmp_path / "p")
        assert f"is a list, not a prompt: give it as --prompts {text}" in line
    assert not (tmp_path / "p").exists()


def test_nothing_but_empty_prompts(run: Run, tmp_path: Path) -> None:
    line = run.refused("generate", "", " ", *FAST, "--out", tmp_path / "o")
    assert "prompt 1 of 2: it is empty; prompt 2 of 2: it is empty" in line and not (tmp_path / "o").exists()
    assert run.refused("generate", *[""] * 1000, *FAST, "--out", tmp_path / "o").endswith("empty; and 995 more\n")


def test_an_out_that_cannot_be_written(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("mine")
    monkeypatch.setattr(api, "search", lambda *a, **k: pytest.fail("searched before it looked at --out"))
    for out in (tmp_path / "file", tmp_path / "file" / "deeper", Path("/proc/none")):
        assert f"cannot write {out}" in run.refused("generate", PROMPTS[0], *FAST, "--out", out)
    assert (tmp_path / "file").read_text() == "mine"


def test_results_so_far_stay_when_the_reward_fails_later(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts go through one slot, one after the other; the reward breaks in the second."""
    from flowfast import rewards

    calls = 0

    def tires(images: Any, prompts: list[str]) -> list[float]:
        nonlocal calls
        calls += 1
        if prompts == [PROMPTS[1]]:
            raise ConnectionError("the scoring service is gone")
        return [0.5] * len(prompts)

    monkeypatch.setattr(rewards, "load", lambda reward, flow=None, deadline=None: rewards.CallableReward(tires))
    config = config_file(tmp_path, "slots: 1\nmethod: bon\nchains: 1\nbudget: 10\n")
    line = run.refused("generate", *PROMPTS[:2], "--config", config, "--out", tmp_path / "o")
    assert "reward 'tires' raised ConnectionError: the scoring service is gone" in line
    done, begun = folders(tmp_path / "o")
    assert {"best.png", "result.json", "candidates.jsonl"} == {path.name for path in done.iterdir()}
    assert [path.name for path in begun.iterdir()] == ["candidates.jsonl"]
    assert calls == 2


def test_a_reward_error_of_the_engine_is_typed(tmp_path: Path) -> None:
    flow = api.load("scenes")
    with pytest.raises(RewardError, match="expected shape"):
        api.search(flow, PROMPTS, reward=lambda images, prompts: [1.0], method="bon", budget=20)


def test_prompt_files_with_seeds_run_and_rerun(run: Run, tmp_path: Path) -> None:
    """A line's own seed beats --seed, stands in config.yaml and gives the same picture again."""
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(json.dumps(line) for line in [{"prompt": PROMPTS[0], "seed": 3}, {"prompt": PROMPTS[1]}]))
    run("generate", "--prompts", path, *FAST, "--seed", "8", "--out", tmp_path / "a")
    results = [json.loads((folder / "result.json").read_text()) for folder in folders(tmp_path / "a")]
    assert [result["seed"] for result in results] == [3, 8]
    config = folders(tmp_path / "a")[0] / "config.yaml"
    assert yaml.safe_load(config.read_text())["prompts"] == [{"prompt": PROMPTS[0], "seed": 3}, PROMPTS[1]]
    run("generate", "--config", config, "--out", tmp_path / "b")
    for one, other in zip(folders(tmp_path / "a"), folders(tmp_path / "b"), strict=True):
        assert (one / "best.png").read_bytes() == (other / "best.png").read_bytes()


@pytest.mark.parametrize("rounds", [2, 5, 8, 11])
def test_a_call_that_was_stopped_resumes_to_the_same_files(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rounds: int
) -> None:
    """The call dies at some round; --resume leaves the files of a call that was never stopped."""
    options = (*PROMPTS[:3], *FAST, "--method", "rbf", "--seed", "4", "--micro-batch", "4")
    monkeypatch.setattr(call, "CHECKPOINT_SECONDS", 0.0)
    run("generate", *options, "--out", tmp_path / "whole")
    count = [0]
    decide = LiveRunner._decide

    def dies(self: Any, found: Any) -> None:
        count[0] += 1
        if count[0] == rounds:
            raise RewardError("killed")
        decide(self, found)

    with monkeypatch.context() as patch:
        patch.setattr(LiveRunner, "_decide", dies)
        run("generate", *options, "--out", tmp_path / "out", expect=2)
    assert (tmp_path / "out" / "call.yaml").exists()
    run("generate", "--resume", tmp_path / "out")
    for one, other in zip(folders(tmp_path / "whole"), folders(tmp_path / "out"), strict=True):
        assert one.name == other.name and {path.name for path in other.iterdir()} == FILES
        for name in ("best.png", "config.yaml"):
            assert (one / name).read_bytes() == (other / name).read_bytes(), name
        assert lines_of(one / "candidates.jsonl") == lines_of(other / "candidates.jsonl")
        assert (
            json.loads((one / "result.json").read_text())["winner"]
            == json.loads((other / "result.json").read_text())["winner"]
        )


@pytest.mark.usefixtures("ticking")
@pytest.mark.parametrize("amount", [("--budget", "40"), ("--seconds", "0.2")], ids=lambda amount: amount[0])
def test_what_a_decoder_left_undone_is_decoded_by_resume(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, amount: tuple[str, str]
) -> None:
    """The decoder dies at the second prompt's picture: --resume decodes it without a call of the model."""
    options = ("--reward", "sharpness", "--steps", "5", "--method", "svdd", "--seed", "4", "--micro-batch", "4")
    decode, velocity, alone = api.FunctionFlow.decode, api.FunctionFlow.velocity, [0]

    def dies(self: Any, x0: Any) -> Any:
        alone[0] += len(x0) == 1
        if alone[0] == 2:
            raise RewardError("the decoder is gone")
        return decode(self, x0)

    with monkeypatch.context() as patch:
        patch.setattr(api.FunctionFlow, "decode", dies)
        run("generate", *PROMPTS[:2], *options, *amount, "--out", tmp_path / "out", expect=2)
    one, other = folders(tmp_path / "out")
    assert (one / "best.png").exists() and not (other / "best.png").exists()
    replaying: list[bool] = []

    def only_to_replay(self: Any, *arguments: Any) -> Any:
        assert replaying, "searched again"
        return velocity(self, *arguments)

    replay = api.replay
    with monkeypatch.context() as patch:
        patch.setattr(api.FunctionFlow, "velocity", only_to_replay)
        patch.setattr(api, "replay", lambda *given, **named: (replaying.append(True), replay(*given, **named))[1])
        run("generate", "--resume", tmp_path / "out")
    config = yaml.safe_load((other / "config.yaml").read_text())
    run("generate", "--config", other / "config.yaml", "--out", tmp_path / "again")
    for before, after in zip(folders(tmp_path / "out"), folders(tmp_path / "again"), strict=True):
        assert {path.name for path in before.iterdir()} == FILES
        for name in ("best.png", "search.png"):
            assert (before / name).read_bytes() == (after / name).read_bytes(), name
        assert lines_of(before / "candidates.jsonl") == lines_of(after / "candidates.jsonl")
    assert config["seconds"] is None and not (tmp_path / "out" / "checkpoint.safetensors").exists()


def test_a_call_that_finished_needs_no_resume(run: Run, tmp_path: Path) -> None:
    run("generate", "", PROMPTS[0], *FAST, "--out", tmp_path / "o", expect=2)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert "nothing left to do" in run("generate", "--resume", tmp_path / "o")
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}


def test_a_folder_without_a_stopped_call_is_named(run: Run, tmp_path: Path) -> None:
    assert "nothing to resume" in run.refused("generate", "--resume", tmp_path)


def test_a_preview_decoder_and_its_finalists(run: Run, tmp_path: Path) -> None:
    from tests.models.tiny.flux import flux
    from tests.models.tiny.parts import tiny_decoder

    tiny_decoder().save_pretrained(tmp_path / "tiny", safe_serialization=True)
    flux(guidance_embeds=False).save_pretrained(tmp_path / "flux", safe_serialization=True)
    small = [
        f"--model-option={name}={value}"
        for name, value in {"height": 16, "width": 24, "steps": 3, "local_files_only": True}.items()
    ]
    argv = ["a cat", "--model", tmp_path / "flux", *small, "--model-option", f"preview_decoder={tmp_path / 'tiny'}"]
    argv += ["--reward", "sharpness", "--method", "bon", "--budget", "18", "--finalists", "2"]
    run("generate", *argv, "--out", tmp_path / "out")
    (place,) = [path for path in (tmp_path / "out").iterdir() if path.is_dir()]
    result = json.loads((place / "result.json").read_text())
    assert result["preview_reward"] != result["reward"] and result["reward_calls"] == 18 // 3 + 2
    config = yaml.safe_load((place / "config.yaml").read_text())
    assert config["finalists"] == 2 and config["model_options"]["preview_decoder"] == str(tmp_path / "tiny")
    run("generate", "--config", place / "config.yaml", "--out", tmp_path / "again")
    again = tmp_path / "again" / place.name
    assert (again / "best.png").read_bytes() == (place / "best.png").read_bytes()
