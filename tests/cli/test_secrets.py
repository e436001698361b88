"""A secret, given in any way, stands in nothing that a run writes or prints; config.yaml runs again with it, and says
what is missing without it."""

from __future__ import annotations

import base64
import json
import multiprocessing
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

import pytest
import torch
import yaml

import flowfast
from flowfast import api, secrets
from flowfast.cli.config_file import parse_options
from flowfast.comparison.design import Comparison
from flowfast.config import SearchConfig, make_config
from flowfast.engine import call
from flowfast.errors import OptionError
from flowfast.rewards.http import unpack
from tests.cli.conftest import Run
from tests.rewards.servers import Asked, answering

SECRET = "s3same+op*en/55"
LOGIN = f"ann:{quote(SECRET, '')}"
BASIC = "Basic " + base64.b64encode(f"ann:{SECRET}".encode()).decode()
FORMS = [SECRET, quote(SECRET, ""), BASIC[6:]]
PROMPTS = ["two red circles", "one blue square"]
OPTIONS = ["--method", "bon", "--budget", "16", "--steps", "4", "--micro-batch", "4", "--score-all"]


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> None:
    secrets.forget()
    monkeypatch.setattr(call, "CHECKPOINT_SECONDS", 0.0)  # so that runs that fail leave one


def scores(got: list[Asked], i: int) -> tuple[int, bytes]:
    images, texts = unpack(got[i].body)
    return 200, json.dumps({"scores": images.float().flatten(1).mean(1).tolist()[: len(texts)]}).encode()


class Way:
    """A way to give a secret: the reward's text, what is set, what the server must be sent, what is written."""

    def __init__(
        self, name: str, text: str, variable: str = "", header: str = "", path: str = "/score", value: str = SECRET
    ):
        self.name, self.text, self.variable, self.header, self.path, self.value = (
            name,
            text,
            variable,
            header,
            path,
            value,
        )

    def give(self, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
        """Sets what the rerun needs, and what the first run needs where the text does not have it."""
        if self.name.endswith("file"):
            (folder / "secret").write_text(self.value + "\n")
            monkeypatch.setenv(self.variable + "_FILE", str(folder / "secret"))
        else:
            monkeypatch.setenv(self.variable, self.value)


WAYS = [
    Way("login", f"http://{LOGIN}@HOST", "FLOWFAST_REWARD_LOGIN", BASIC, value=f"ann:{SECRET}"),
    Way("http: and a login", f"http:http://{LOGIN}@HOST", "FLOWFAST_REWARD_LOGIN", BASIC, value=f"ann:{SECRET}"),
    Way("sum", f"http://{LOGIN}@HOST*0.5+sharpness", "FLOWFAST_REWARD_LOGIN", BASIC, value=f"ann:{SECRET}"),
    Way("key", "http://HOST", "FLOWFAST_REWARD_KEY", f"Bearer {SECRET}"),
    Way("key file", "http://HOST/score", "FLOWFAST_REWARD_KEY", f"Bearer {SECRET}"),
    Way(
        "query", f"http://HOST/s?n=1&token={quote(SECRET, '')}", "FLOWFAST_REWARD_QUERY_TOKEN",
        path=f"/s?n=1&token={quote(SECRET, '')}",
    ),
    Way("variable", "http://ann:${FLOWFAST_SCORER}@HOST", "FLOWFAST_SCORER", BASIC),
    Way(
        "variable file", "http://HOST/s?n=1&token=${FLOWFAST_SCORER}", "FLOWFAST_SCORER",
        path=f"/s?n=1&token={quote(SECRET, '')}",
    ),
]  # fmt: skip


def assert_clean(folder: Path, *texts: str) -> None:
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != "secret"]
    for form in FORMS:
        assert not [path for path in files if form.encode() in path.read_bytes()]
        assert not [path for path in files if form in str(path)]
        assert not [text for text in texts if form in text]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.name)
def test_generate(way: Way, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with answering(lambda i: scores(got, i)) as (url, got):
        text = way.text.replace("HOST", url.removeprefix("http://"))
        with monkeypatch.context() as now:
            if not any(form in text for form in FORMS):
                way.give(now, tmp_path)
            said = run("generate", PROMPTS[0], "--reward", text, "--out", tmp_path / "one", *OPTIONS)
            assert_clean(tmp_path, said, run.err)
            assert {(asked.headers.get("authorization", ""), asked.path) for asked in got} == {(way.header, way.path)}
        config = next((tmp_path / "one").glob("*/config.yaml"))
        assert f"${{{way.variable}}}" in yaml.safe_load(config.read_text())["reward"]

        missing = run.refused("generate", "--config", config, "--out", tmp_path / "two")
        assert f"variable {way.variable}, or in the file that {way.variable}_FILE names, got neither" in missing
        assert not (tmp_path / "two").exists()

        count = len(got)
        way.give(monkeypatch, tmp_path)
        said = run("generate", "--config", config, "--out", tmp_path / "two")
        assert_clean(tmp_path, said, run.err, missing)
        assert {(asked.headers.get("authorization", ""), asked.path) for asked in got[count:]} == {
            (way.header, way.path)
        }
    for one, two in zip(*(sorted((tmp_path / name).glob("*/best.png")) for name in ("one", "two")), strict=True):
        assert one.read_bytes() == two.read_bytes()


@pytest.mark.parametrize("fault", ["refuses", "fails later", "wrong answer", "cuts"])
def test_runs_that_fail_and_go_on(fault: str, run: Run, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The server repeats what it was sent; call.yaml and the checkpoint that stay behind are read, too."""
    mended = False

    def answer(i: int) -> tuple[int, bytes] | None:
        if mended or fault == "fails later" and i < 3:
            return scores(got, i)
        said = f"{got[i].headers['authorization']} {got[i].path} {SECRET}".encode()
        return {"refuses": (401, said), "fails later": (422, said), "wrong answer": (200, said), "cuts": None}[fault]

    with answering(answer) as (url, got):
        reward = f"http://{LOGIN}@{url.removeprefix('http://')}/s?key={quote(SECRET, '')}"
        line = run.refused("generate", *PROMPTS, "--reward", reward, "--out", tmp_path / "out", *OPTIONS)
        assert_clean(tmp_path, line, caplog.text)
        assert url.removeprefix("http://") in line
        if fault != "fails later":
            return
        assert {path.name for path in (tmp_path / "out").iterdir()} > {"call.yaml", "checkpoint.safetensors"}
        assert "FLOWFAST_REWARD_QUERY_KEY" in run.refused("generate", "--resume", tmp_path / "out")
        mended = True
        with pytest.MonkeyPatch.context() as now:
            now.setenv("FLOWFAST_REWARD_LOGIN", f"ann:{SECRET}")
            now.setenv("FLOWFAST_REWARD_QUERY_KEY", "another")  # than it began with
            said = run("generate", "--resume", tmp_path / "out")
        assert_clean(tmp_path, said, run.err)


def test_a_key_may_be_given_to_a_run_that_goes_on(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def answer(i: int) -> tuple[int, bytes]:
        return scores(got, i) if i < 2 or "authorization" in got[i].headers else (401, b"who are you?")

    with answering(answer) as (url, got):
        line = run.refused("generate", *PROMPTS, "--reward", url, "--out", tmp_path, *OPTIONS)
        assert "status 401: who are you?; set FLOWFAST_REWARD_KEY, or write http://user:password@host" in line
        monkeypatch.setenv("FLOWFAST_REWARD_KEY", SECRET)
        run("generate", "--resume", tmp_path)
        assert_clean(tmp_path)


@pytest.mark.parametrize("workers", [1, 2])
def test_compare(workers: int, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also in other processes, which here are threads: they have the model of this test."""
    started: list[Any] = []
    if workers == 2:

        class Pool:
            def __init__(self, count: int, start: Any, shared: Any) -> None:
                started.append(shared)
                given = dict(shared[-1])
                secrets.forget()  # a new process has none of its own
                start(*shared[:-1], given)

            def __enter__(self) -> Any:
                return self

            def __exit__(self, *_: object) -> None:
                pass

            def imap(self, work: Any, jobs: Any) -> Any:
                return map(work, jobs)

        monkeypatch.setattr(multiprocessing, "get_context", lambda how: type("Context", (), {"Pool": Pool}))
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join(PROMPTS))
    options = ["--prompts", file, "--methods", "bon,svdd", "--budgets", "60", "--seeds", "1", "--steps", "6"]
    with answering(lambda i: scores(got, i)) as (url, got):
        reward = f"{url.replace('//', f'//{LOGIN}@')}*2+sharpness"
        options += ["--workers", str(workers), "--out", tmp_path / "out"]
        said = run("compare", *options, "--reward", reward)
        assert_clean(tmp_path, said, run.err)
        assert {asked.headers["authorization"] for asked in got} == {BASIC}
        assert len(started) == workers - 1
        assert "FLOWFAST_REWARD_LOGIN" in (tmp_path / "out" / "results.json").read_text()
        again = url.replace("//", "//${FLOWFAST_REWARD_LOGIN}@") + "*2+sharpness"
        assert "FLOWFAST_REWARD_LOGIN" in run.refused("compare", *options, "--reward", again)
        count = len(got)
        run("compare", *options, "--reward", f"{url.replace('//', '//bob:other@')}*2+sharpness")
        assert len(got) == count, "all of it was done, whoever asks"
    secrets.forget()
    assert Comparison(prompts=("a",), reward=reward).reward == again


def test_export_and_the_options_of_a_model(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    came: list[dict[str, Any]] = []
    fake = api.load

    def load(name: str, **options: Any) -> Any:
        came.append(secrets.opened_options(options))
        return fake(name)

    monkeypatch.setattr(api, "load", load)
    given = ["--model-option", f"token={SECRET}", "--model-option", "variant=fp16"]
    said = run(
        "export", "--reward", "sharpness", "--budget", "20", "--steps", "4", "--slots", "1", *given,
        *("--prompt", "a b", "--out", tmp_path / "a.pt"),
    )  # fmt: skip
    assert_clean(tmp_path, said, run.err)
    assert b"FLOWFAST_MODEL_TOKEN" in (tmp_path / "a.pt").read_bytes()
    line = run.refused("export", "--reward", f"http://{LOGIN}@host", "--out", tmp_path / "b.pt", *given)
    assert_clean(tmp_path, line)
    assert "http://host" in line

    run("generate", PROMPTS[0], "--reward", "sharpness", "--out", tmp_path / "out", *OPTIONS, *given)
    assert_clean(tmp_path, run.err)
    assert came == [{"token": SECRET, "variant": "fp16"}] * 3
    config = next((tmp_path / "out").glob("*/config.yaml"))
    assert "FLOWFAST_MODEL_TOKEN" in run.refused("generate", "--config", config, "--out", tmp_path / "again")
    monkeypatch.setenv("FLOWFAST_MODEL_TOKEN", SECRET)
    run("generate", "--config", config, "--out", tmp_path / "again")
    assert came[-1] == {"token": SECRET, "variant": "fp16"}
    assert_clean(tmp_path)


# ---- the functions ----


@pytest.mark.parametrize(
    ("options", "written"),
    [
        ({"token": "hf_55"}, {"token": "${FLOWFAST_MODEL_TOKEN}"}),
        ({"hf_token": "a"}, {"hf_token": "${FLOWFAST_MODEL_HF_TOKEN}"}),
        ({"apiKey": "a"}, {"apiKey": "${FLOWFAST_MODEL_APIKEY}"}),
        ({"auth": {"password": "a", "user": "b"}}, {"auth": {"password": "${FLOWFAST_MODEL_PASSWORD}", "user": "b"}}),
        ({"token": {"value": "a"}}, {"token": {"value": "${FLOWFAST_MODEL_TOKEN}"}}),
        ({"auth": ["a", {"b": "c"}]}, {"auth": ["${FLOWFAST_MODEL_AUTH}", {"b": "${FLOWFAST_MODEL_AUTH_2}"}]}),
        ({"code": "a", "code_revision": "b"}, None),
        ({"keys": 1, "token": True, "secret": ""}, {"keys": 1, "token": True, "secret": ""}),
        ({"pin_password": 1234}, {"pin_password": "${FLOWFAST_MODEL_PIN_PASSWORD}"}),
        ({"proxies": {"https": "http://a:b@proxy:1/"}}, {"proxies": {"https": "http://${FLOWFAST_MODEL_LOGIN}@proxy:1/"}}),
        ({"tokenizer_max_length": 77, "keyframes": "a", "monkey": "b"}, None),
        ({"sizes": (1, 2), "shape": torch.Size([3, 4]), "dtype": torch.bfloat16, "steps": 4}, None),
    ],
)  # fmt: skip
def test_options_of_a_model(options: dict[str, Any], written: dict[str, Any] | None) -> None:
    found = SearchConfig(model_options=options).model_options
    assert found == (options if written is None else written)
    assert secrets.opened_options(found) == options
    assert SearchConfig(model_options=found).model_options == found


def test_a_second_secret_in_the_same_place_has_a_name_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLOWFAST_REWARD_LOGIN", "somebody:else")
    text = "http://a:1111@one*0.5+http://b:2222@two*0.5+http://a:1111@three"
    written = make_config({"reward": text}).reward
    assert written == (
        "http://${FLOWFAST_REWARD_LOGIN_2}@one*0.5+http://${FLOWFAST_REWARD_LOGIN_3}@two*0.5"
        "+http://${FLOWFAST_REWARD_LOGIN_2}@three"
    )
    assert secrets.opened(written) == text


def test_other_variables_are_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """A config.yaml of somebody else names a variable of ours and a server of theirs."""
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "aws55")
    remote = flowfast.rewards.load("http://host/?q=${AWS_SECRET_ACCESS_KEY}")
    assert "aws55" not in remote.target.path


@pytest.mark.parametrize("value", [SECRET, [SECRET], f"token={SECRET}", 3])
def test_options_of_the_wrong_type_are_not_shown(value: Any) -> None:
    with pytest.raises(OptionError, match="option 'model_options'") as caught:
        make_config({"model_options": value})
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"reward": [f"http://ann:{SECRET}@host", "sharpness"]}, "option 'reward': .*, got list"),
        ({"reward": {"url": "http://host", "key": SECRET}}, "option 'reward': .*, got dict"),
        ({"model": {"token": SECRET}}, "option 'model': .*, got dict"),
        ({"steps": f"http://ann:{quote(SECRET, '')}@host"}, "option 'steps': .*, got 'http://host'"),
        ({f"http://ann:{quote(SECRET, '')}@host": 1}, "unknown option 'http://host'"),
    ],
)
def test_what_stands_in_the_wrong_place_is_not_shown(options: dict[str, Any], says: str) -> None:
    with pytest.raises(OptionError, match=says) as caught:
        make_config(options)
    assert SECRET not in unquote(str(caught.value))


@pytest.mark.parametrize("secret", ["@[s3same", "'s3same", "00123", "1e5", "*s3same", "a: {b", "s3same #x"])
def test_a_secret_is_no_yaml(secret: str) -> None:
    assert parse_options([f"token={secret}"]) == {"token": secret}
    assert parse_options(["token=true"]) == {"token": True}


def test_errors_of_a_model_do_not_show_its_token(run: Run, tmp_path: Path) -> None:
    given = ["--model-option", f"token={SECRET}"]
    line = run.refused("generate", "a", "--model", f"nobody/{SECRET}", "--out", tmp_path / "out", *given)
    assert_clean(tmp_path, line)
    for pair in (SECRET, f"token:{SECRET}"):
        line = run.refused("generate", "a", "--model-option", pair, "--out", tmp_path / "out")
        assert_clean(tmp_path, line)
