"""`flowfast reward-server`: a process of its own, asked over its socket, ended by Ctrl-C; and what it refuses."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
from functools import partial

import torch

from flowfast.rewards.http import load
from flowfast.rewards.sharpness import Sharpness
from tests.cli.conftest import Run


def test_it_serves_until_ctrl_c() -> None:
    argv = [sys.executable, "-m", "flowfast.cli", "reward-server", "--reward", "sharpness", "--port", "0"]
    heeds = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # a shell's background jobs ignore it, children too
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=heeds) as server:
        try:
            assert server.stdout is not None
            line = server.stdout.readline()
            assert line.startswith("reward sharpness at http://127.0.0.1:"), line
            images = torch.randint(0, 256, (2, 3, 5, 6)) / 255
            scores = load(line.split()[3].rstrip(";"))(images, ["a", "b"])
            assert torch.equal(scores, Sharpness()(images, torch.zeros(2), {}))
            server.send_signal(signal.SIGINT)
            assert server.wait(30) == 130
            assert server.stderr is not None
            assert server.stderr.read() == ""
        finally:
            server.kill()


def test_what_it_refuses(run: Run) -> None:
    assert "unknown reward 'beauty'" in run.refused("reward-server", "--reward", "beauty", "--port", "0")
    assert "'--port'" in run.refused("reward-server", "--port", "http")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        line = run.refused("reward-server", "--reward", "sharpness", "--port", port)
        assert f"cannot listen on 127.0.0.1:{port}" in line


def test_help(run: Run) -> None:
    assert "--host" in run("reward-server", "--help")
    assert "reward-server" in run("--help")
