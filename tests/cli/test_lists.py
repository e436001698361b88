"""`flowfast info`, `methods`, `rewards`, `models`, `--version`."""

from __future__ import annotations

import json

import flowfast
from flowfast import ops
from tests.cli.conftest import Run


def test_info_names_a_backend_and_a_reason_for_every_op(run: Run) -> None:
    found = json.loads(run("info", "--json"))
    assert found["versions"]["flowfast"] == flowfast.__version__
    assert set(found["ops"]) == set(ops.live())
    for live in found["ops"].values():
        assert live["backend"] in ("reference", "cpp", "triton", "cuda")
        assert live["reason"]
    assert "cpu" in found["devices"]
    text = run("info")
    assert all(name in text for name in found["ops"])


def test_lists_have_a_line_for_each(run: Run) -> None:
    methods = run("methods")
    for name in ("bon", "sop", "smc", "code", "svdd", "rbf", "rbf-official"):
        assert f"\n{name} " in "\n" + methods
    assert "scenes" in run("models")
    assert "sharpness" in run("rewards")


def test_version_and_help(run: Run) -> None:
    assert run("--version") == f"flowfast {flowfast.__version__}\n"
    assert "generate" in run()
    assert "--budget" in run("generate", "--help")


def test_unknown_command(run: Run) -> None:
    assert "No such command 'generat'" in run.refused("generat")
