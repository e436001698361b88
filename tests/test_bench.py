"""The benchmarks run, check what they time, and write what they promise. What they measured is nobody's business here:
no figure is asserted."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from PIL import Image

from bench import front, gpu, method_plots, table, timing, versions
from bench.e2e import pipeline_loop, rbf_evaluation
from bench.e2e.latency import latencies, percentile
from bench.e2e.public_code import PublicRBF
from bench.ops.resample_in_place import on_pages, touched
from flowfast.errors import OptionError
from flowfast.ops import backend as backends

ROOT = Path(__file__).resolve().parent.parent
PEERS = {
    "step_x0": {"eager", "randn", "float32"},
    "noise": {"randn", "reference"},
    "posterior_mean": {"eager"},
    "resample_in_place": {"index", "index_select"},
    "rbf_evaluation": {"eager"},
    "search_overhead": {"alone"},
    "latency": {"one slot"},
    "host_reward": {"one batch"},
    "engine_load": {"flowfast.search", "none"},
    "pipeline_loop": {"diffusers"},
    "cpp_runner": {"python"},
}
LEFT_OUT = {"step_x0": "compile", "posterior_mean": "compile", "rbf_evaluation": "public_code"}
KEYS = {
    "name": str, "batch": int, "shape": list, "dtype": str, "threads": int, "ours_ms": float, "peer": str,
    "peer_ms": float, "ratio": float, "ours_quartiles_ms": list, "peer_quartiles_ms": list, "versions": dict,
}  # fmt: skip
MORE = {
    "step_x0": {"generator_share"},
    "noise": {"ns_a_normal"},
    "resample_in_place": {"dead", "bytes_touched", "bytes_ratio"},
    "rbf_evaluation": {"ops_per_nfe", "peer_ops_per_nfe", "launches_a_round", "host_us_a_round", "engine", "case"},
    "search_overhead": {"fraction", "fraction_alone", "rounds", "micro_batch"},
    "host_reward": {"waits", "reward_ms_a_batch"},
    "pipeline_loop": {"case", "setting", "steps", "passes", "weights", "micro_batch", "rows", "calls", "decoded"},
    "cpp_runner": {"start_up_s", "cpu_s", "searches", "rss_mib", "rss_slope_kib", "rss_slope_error_kib"},
    "engine_load": {"case"},
    "latency": {"p50_ms", "p95_ms", "p99_ms", "images_s", "slots"},
}


def bench(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    own = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST", "FLOWFAST_PUBLIC"))}
    command = [sys.executable, "-m", "bench", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=own, capture_output=True, text=True, timeout=600)


@pytest.fixture(scope="module")
def results(tmp_path_factory, prefix):
    folder = tmp_path_factory.mktemp("bench")
    done = bench("--quick", "--results", folder)
    assert done.returncode == 0, done.stdout + done.stderr
    assert sorted(path.name for path in folder.iterdir()) == sorted(f"{name}.json" for name in PEERS)
    return {path.stem: json.loads(path.read_text()) for path in folder.iterdir()}


@pytest.mark.parametrize("name", PEERS)
def test_rows_are_as_promised(results, name):
    rows = results[name]["rows"]
    assert {row["peer"] for row in rows} == PEERS[name]
    for row in rows:
        for key, kind in KEYS.items():
            assert isinstance(row[key], kind), (key, row[key])
        assert row["name"] == name and row["threads"] == 1
        assert row["ours_ms"] > 0 and row["peer_ms"] > 0
        assert row["ratio"] == pytest.approx(row["peer_ms"] / row["ours_ms"])
        for side in ("ours", "peer"):
            low, high = row[f"{side}_quartiles_ms"]
            assert 0 < low <= row[f"{side}_ms"] <= high
        if row["bytes"] is not None:
            assert row["gb_s"] == pytest.approx(row["bytes"] / row["ours_ms"] / 1e6)
        assert {"torch", "flowfast", "processor", "instruction_set"} <= row["versions"].keys()
        assert MORE.get(name, set()) <= row.keys()


@pytest.mark.parametrize("name", LEFT_OUT)
def test_what_is_left_out_has_a_reason(results, name):
    reasons = {entry["peer"]: entry["reason"] for entry in results[name]["left_out"]}
    assert reasons[LEFT_OUT[name]]


def test_measures_of_the_whole_are_sane(results):
    (overhead,) = results["search_overhead"]["rows"]
    assert 0 < overhead["fraction"] < 1 and overhead["fraction_alone"] == pytest.approx(1 - overhead["ratio"])
    assert overhead["rows_padded"] >= 0
    for row in results["latency"]["rows"]:
        assert 0 < row["p50_ms"] <= row["p95_ms"] <= row["p99_ms"]
        assert row["images_s"] == pytest.approx(1000 / row["ours_ms"])
    cases = {(row["case"], row["engine"]) for row in results["rbf_evaluation"]["rows"]}
    assert len(cases) == 2 * len(rbf_evaluation.CASES)
    for row in results["rbf_evaluation"]["rows"]:
        assert 3 <= row["launches_a_round"] < 3.1 and row["ops_per_nfe"] > 1 and row["peer_ops_per_nfe"] > 5
        assert row["host_us_a_round"] > 0


def test_every_pipeline_is_timed_with_every_setting(results):
    rows = results["pipeline_loop"]["rows"]
    expected = {(case, setting) for case in pipeline_loop.CASES for setting in pipeline_loop.SETTINGS}
    assert {(row["case"], row["setting"]) for row in rows} == expected and len(rows) == len(expected)
    for row in rows:
        evaluations = len(pipeline_loop.PROMPTS) * row["steps"] * row["passes"]
        assert row["rows"] >= evaluations == row["peer_rows"] and row["peer_calls"] == row["steps"]
        assert row["decoded"] >= row["peer_decoded"] == len(pipeline_loop.PROMPTS)


def test_an_unknown_benchmark_is_named_with_the_known_ones():
    done = bench("step")
    assert done.returncode == 2
    assert "unknown benchmark 'step'" in done.stderr and "step_x0" in done.stderr


# ---- the measuring itself ----


class OneByOne:
    """Stands in for pytest-benchmark's fixture."""

    def pedantic(self, target, setup, rounds, iterations):
        for _ in range(rounds):
            setup()
            target()


def test_candidates_take_turns_each_after_a_run_that_does_not_count():
    order = []
    found = timing.paired(OneByOne(), {"a": lambda: order.append("a"), "b": lambda: order.append("b")}, 2, calls=2)
    assert "".join(order) == "bbbaaa" * 2
    assert found.keys() == {"a", "b"}


def test_quartiles():
    assert timing.Times.of([0.001, 0.002, 0.003, 0.004, 0.005]) == pytest.approx((3.0, 2.0, 4.0))
    assert timing.Times.of([0.002]) == pytest.approx((2.0, 2.0, 2.0))


def test_latency_counts_from_admission():
    # Two slots; requests 0, 1 start at 10. 1 ends first and admits 2; 0 ends and admits 3.
    assert latencies({0: 14.0, 1: 12.0, 2: 13.0, 3: 20.0}, 10.0, 2) == [4.0, 2.0, 1.0, 7.0]
    assert percentile([float(i) for i in range(1001)], 0.95) == pytest.approx(950)


def test_bytes_are_seen_by_the_page():
    x = on_pages(torch.zeros(4, 1 << 12))
    seen = touched(lambda: x[3].copy_(x[0]), [x])
    if seen is None:
        pytest.skip("this system does not tell which pages a process touched")
    assert seen == 2 * x[0].numel() * x.element_size()


def test_the_eager_baseline_is_compared_with_ours(monkeypatch):
    rbf_evaluation.check_same_sample(60, scripted=False)
    normals = rbf_evaluation.noise.normals
    monkeypatch.setattr(rbf_evaluation.noise, "normals", lambda *arguments: normals(*arguments) * 1.01)
    with pytest.raises(AssertionError):
        rbf_evaluation.check_same_sample(60, scripted=False)


@torch.no_grad()
@pytest.mark.parametrize("case", pipeline_loop.CASES)
def test_the_pipeline_and_ours_are_compared(case, monkeypatch):
    sides = pipeline_loop.Sides(pipeline_loop.CASES[case], quick=True)
    sides.check()
    velocity = sides.flow.velocity
    monkeypatch.setattr(sides.flow, "velocity", lambda *given: 1.01 * velocity(*given))
    with pytest.raises(AssertionError):
        sides.check()


PUBLIC = {
    "rbf/__init__.py": "",
    "rbf/shared_modules.py": "OFF_LOG = DO_NOT_SAVE_INTERMEDIATE_IMAGES = False\nprior = model = None\n",
    "rbf/prior/__init__.py": "",
    "rbf/prior/flux.py": """
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import is_torch_xla_available, logging
from diffusers.utils.torch_utils import some_decorator
XLA = bool(is_torch_xla_available())
logger = logging.get_logger(__name__)

class FluxPipeline: ...

class Scheduler(SchedulerMixin, ConfigMixin):
    @register_to_config
    def __init__(self, shift: float = 1.0, steps: int = 7): ...

@some_decorator("text")
def decorated():
    return 5
""",
    "rbf/corrector/__init__.py": "",
    "rbf/corrector/rgrp_sampler.py": "from transformers import CLIPModel as VQARewardModel\n",
    "rbf/rbf.py": """
import types, torch
from rbf import shared_modules as sm
from rbf.prior import flux
from rbf.corrector import rgrp_sampler

class RBF:
    def __init__(self, cfg):
        self.cfg, self.pipeline = cfg, flux.FluxPipeline.from_pretrained("name")
        self.scheduler = flux.Scheduler.from_config({"steps": 9})
        self.reward = rgrp_sampler.VQARewardModel(cfg)
        sm.prior, sm.model = types.SimpleNamespace(nfe=0), types.SimpleNamespace()

    def train_single_step(self, state):
        x, _ = self.pipeline.prepare_latents(self.cfg.batch_size)
        u = self.pipeline.transformer(hidden_states=x, timestep=None)[0]
        target = self.reward.preprocess(sm.prior.decode_latent(x + u))
        sm.prior.nfe += len(x)
        best = self.reward(target, 0).max()
        sm.model.image = x
        return {**state, "done": True, "lastest_rewards": float(best)}
""",
}


def test_public_code_runs_from_a_folder_with_stand_ins(tmp_path, monkeypatch):
    for name, text in PUBLIC.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    before = {name for name in sys.modules if not name.startswith("rbf")}
    try:
        public = PublicRBF(tmp_path, (8, 4), torch.bfloat16, batch=2, budget=40, init=2)
        reward, image, nfe = public.run()
        flux = sys.modules["rbf.prior.flux"]
        assert nfe == 2 and image.dtype == torch.bfloat16 and math.isfinite(reward)
        assert reward == float(image.flatten(1)[:, 0].max())
        assert public.trainer.scheduler.config.steps == 9 and public.trainer.scheduler.config.shift == 1.0
        assert not flux.XLA and flux.decorated() == 5
        assert str(tmp_path) not in sys.path
        left = {name for name in sys.modules if not name.startswith("rbf")} - before
        assert not {name.partition(".")[0] for name in left} & {"diffusers", "transformers"}
    finally:
        for name in [name for name in sys.modules if name.partition(".")[0] == "rbf"]:
            del sys.modules[name]


def test_a_folder_without_the_public_code_is_an_error(tmp_path):
    with pytest.raises(ImportError):
        PublicRBF(tmp_path, (8, 4), torch.float32, batch=2, budget=40, init=2)


# ---- bench.gpu, on the CPU and with the wall clock ----


def small(**options) -> gpu.Run:
    options = {"sizes": (1, 7, 300), "compile": False, "turns": 2, "latent": (16, 4), **options}
    return gpu.Run(torch.device("cpu"), **options)


@torch.no_grad()
def test_gpu_checks_every_op_and_finds_ours_right():
    run = small()
    assert gpu.check_all(run), run.checks
    assert set(backends.OPS) == set(gpu.CHECKS)
    assert {entry["op"] for entry in run.checks} == {*gpu.CHECKS, "a search from graphs"}
    assert all(entry["cases"] >= 2 for entry in run.checks)


@pytest.fixture
def replaced():
    """replaced(op, kernel) puts a kernel in the place of an op's on the CPU, until the test ends."""
    libraries = []

    def replace(op, kernel):
        libraries.append(torch.library.Library("flowfast", "IMPL"))
        libraries[-1].impl(op, kernel, "CPU")

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="(?s).*Overriding a previously registered kernel")
        yield replace
    for library in libraries:
        library._destroy()


@torch.no_grad()
@pytest.mark.parametrize("op", list(backends.OPS))
def test_gpu_checks_notice_a_kernel_that_does_nothing(op, replaced):
    run = small(sizes=(300,))
    replaced(op, lambda *_: None)
    gpu.check_all(run)
    assert [entry["op"] for entry in run.checks if entry["op"] == op and entry["error"]] == [op]


@torch.no_grad()
@pytest.mark.parametrize("op", ["normal_", "branch_step", "posterior_mean", "normalize_log_weights"])
def test_gpu_checks_notice_an_error_of_a_thousandth(op, replaced):
    def wrong(*operands):
        backends.OPS[op].reference(*operands)
        for argument, value in zip(getattr(torch.ops.flowfast, op).default._schema.arguments, operands, strict=False):
            if argument.alias_info and value is not None and value.is_floating_point():
                value.mul_(1.001)

    run = small(sizes=(300,))
    replaced(op, wrong)
    gpu.check_all(run)
    error = next(entry["error"] for entry in run.checks if entry["op"] == op)
    assert error and "float32" in error


@torch.no_grad()
def test_gpu_report(tmp_path, capsys):
    run = small()
    assert gpu.finish(run, tmp_path / "gpu.json") == 0
    report = json.loads((tmp_path / "gpu.json").read_text())
    assert report["left_out"] == [] and report["device"] == "cpu"
    timed = set(backends.OPS) - {"assign_lanes", "decide"}  # as part of a round
    assert {row["name"] for row in report["rows"]} == timed | {"rbf_evaluation", "search_round"}
    for row in report["rows"]:
        assert row["ours_ms"] > 0 and row["peer_ms"] > 0
        if row["bytes"] is not None:
            assert row["limit_ms"] == pytest.approx(row["bytes"] / row["copy_gb_s"] / 1e6)
    assert "branch_step" in capsys.readouterr().out


@torch.no_grad()
def test_gpu_does_not_time_what_is_wrong(tmp_path, replaced):
    run = small(sizes=(7,))
    replaced("gather_ancestors_", lambda *_: None)
    assert gpu.finish(run, tmp_path / "gpu.json") == 1
    assert json.loads((tmp_path / "gpu.json").read_text())["rows"] == []


@torch.no_grad()
def test_gpu_checks_all_kernels_there_are_and_times_those_that_are_right(tmp_path, replaced, monkeypatch):
    run = small(sizes=(7,))
    replaced("gather_ancestors_", lambda *_: None)  # what is live; the reference stands before it
    monkeypatch.setattr(gpu, "backends", lambda _: ["", "reference"])
    assert gpu.finish(run, tmp_path / "gpu.json") == 1
    report = json.loads((tmp_path / "gpu.json").read_text())
    assert [bool(entry["error"]) for entry in report["checks"] if entry["op"] == "gather_ancestors_"] == [True, False]
    assert {row["backend"] for row in report["rows"]} == {"reference"}


@torch.no_grad()
def test_gpu_takes_the_backends_that_are_there(monkeypatch):
    def force(name, _source):
        if name == "triton":
            raise OptionError("no triton")

    monkeypatch.setattr(backends, "_force", force)
    run = small()
    assert gpu.backends(run) == [backends._forced]
    run.device = torch.device("cuda")
    monkeypatch.setattr(backends, "_forced", "")
    assert gpu.backends(run) == ["cuda"]
    monkeypatch.setattr(backends, "_forced", "triton")
    assert gpu.backends(run) == ["triton"]


@torch.no_grad()
def test_gpu_stops_at_its_deadline_and_says_what_is_missing(tmp_path):
    run = small(seconds=0.0)
    assert gpu.finish(run, tmp_path / "gpu.json") == 3
    report = json.loads((tmp_path / "gpu.json").read_text())
    assert {entry["name"] for entry in report["left_out"]} >= {f"check of {op}" for op in backends.OPS}


def test_gpu_without_a_device_says_so(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main([]) == 2
    assert capsys.readouterr().out.count("\n") == 1


BLOCKED = """
import runpy, sys
for name in {names}:
    sys.modules[name] = None  # importing it is an error
{run}
"""
OPTIONAL = [
    "diffusers",
    "hypothesis",
    "imageio",
    "matplotlib",
    "nvtx",
    "pytest",
    "rich",
    "scipy",
    "transformers",
    "typer",
]
GPU = "runpy.run_module('bench.gpu', run_name='__main__')"
SMALL = """
import torch
from bench import gpu
run = gpu.Run(torch.device("cpu"), sizes=(7,), compile=False, turns=2, latent=(16, 4))
torch.set_grad_enabled(False)
assert gpu.check_all(run)
gpu.time_graphs(run)
"""


def without(names: list[str], run: str) -> subprocess.CompletedProcess[str]:
    code = BLOCKED.format(names=names, run=run)
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300)


def test_gpu_runs_without_what_it_does_not_need():
    done = without(OPTIONAL, SMALL)
    assert done.returncode == 0, done.stdout + done.stderr


def test_gpu_names_all_that_is_missing_at_once():
    done = without([*OPTIONAL, *gpu.NEEDED], GPU)
    assert done.returncode == 2 and done.stderr == "" and done.stdout.count("\n") == 1
    packages = "numpy pillow pydantic safetensors pyyaml"
    assert f"not installed here: {packages}; nothing was checked" in done.stdout
    assert f"--no-index --find-links build/wheels {packages}" in done.stdout


@pytest.mark.slow
def test_compile_is_measured_too(tmp_path):
    done = bench("step_x0", "posterior_mean", "--turns", "2", "--results", tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    for name in ("step_x0", "posterior_mean"):
        rows = json.loads((tmp_path / f"{name}.json").read_text())["rows"]
        assert "compile" in {row["peer"] for row in rows}


# ---- figures in documents ----


@pytest.mark.parametrize("name", table.PLACES)
def test_documents_show_the_results_that_lie_beside_them(name):
    page = (ROOT / name).read_text(encoding="utf-8")
    assert table.written(name, page) == page, "python -m bench.table --write"
    assert "public code" in page


def test_the_picture_of_the_readme_can_be_drawn_anew(tmp_path, capsys):
    front.main(["--out", str(tmp_path / "front.png"), "--prompts", "2", "--budget", "40"])
    assert Image.open(tmp_path / "front.png").width > 300
    assert re.fullmatch(r"ode: \d of 2 right\nauto: \d of 2 right\n", capsys.readouterr().out)
    assert (ROOT / "docs/images/front.png").stat().st_size < 150 * 1024


def test_each_method_has_its_plot(tmp_path):
    method_plots.main(["--out", str(tmp_path)])
    drawn = {path.name for path in tmp_path.iterdir()}
    page = (ROOT / "docs/methods.md").read_text(encoding="utf-8")
    assert drawn == set(re.findall(r"images/methods/(\w+\.png)", page))
    assert drawn == {path.name for path in (ROOT / "docs/images/methods").iterdir()}


def test_two_checkouts_take_turns(capsys: pytest.CaptureFixture[str]) -> None:
    versions.main([str(versions.ROOT), "--case", "host", "--starts", "2", "--turns", "2"])
    assert re.fullmatch(r"host: [\d.]+ ms, [\d.]+ ms: [\d.]+x \([\d.]+ to [\d.]+\)\n", capsys.readouterr().out)
    with pytest.raises(SystemExit):
        versions.main([str(versions.ROOT), "--case", "hosts"])
    assert "no case 'hosts'" in capsys.readouterr().err
