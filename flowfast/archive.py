"""`flowfast export`: a model, a reward and the search in one TorchScript file, for C++ servers and for Python.

What the file can do is `flowfast.searcher.archive.Archive`. Sizes are fixed at export: slots, micro-batch, the largest
budget, and for each smaller budget the plan that Python makes of it, so that the same request gives the same bits.

A model or reward that does not script is traced; prompts whose encoding does not script are encoded at export. With
`format="aoti"` model, decoder and reward are compiled by AOTInductor into packages beside the file. They take the
tensors of their function in its order, conditions by their sorted names: velocity (x, t, ...), decode (x0), reward
(images, t, ...), each of one micro-batch.
"""

from __future__ import annotations

import io
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

import torch
from torch import Tensor, nn

from flowfast import rewards
from flowfast.answers import CheckedFlow, conditions_of
from flowfast.config import SearchConfig, make_config
from flowfast.errors import ArchiveError, FlowfastError, ModelError, OptionError, RewardError
from flowfast.files import locked_file, replacing, write_bytes
from flowfast.ops.noise import STREAM_VERSION
from flowfast.prompts import encoded
from flowfast.seal import FORMAT_VERSION, digest, seal_file, seal_of
from flowfast.searcher.archive import Archive, Encoder, Functions, Model, Outside, Table
from flowfast.searcher.plan import Plan
from flowfast.searcher.steered import frozen
from flowfast.settings import Setup, fitting_rows
from flowfast.surroundings import evaluating, modules_of, own_ground
from flowfast.types import Conditions, Flow
from flowfast.version import versions

log = logging.getLogger("flowfast.archive")
BUDGET, SLOTS = 500, 4
COMPILED = "call its packages between branch and observe"
FORMATS = ("torchscript", "aoti")
TOLERANCE = 1e-5
COMPILED_TOLERANCE = 2e-2  # also in bfloat16, where kernels that were fused round less often
"""Largest deviation of a part that left Python from the eager one, of the largest value."""


@contextmanager
def quiet() -> Iterator[None]:
    """Without torch's warnings that TorchScript is deprecated (nothing else carries a program into C++), of its own use
    of what is deprecated, and of tracing: what was traced is run and compared."""
    with warnings.catch_warnings():
        for category in (DeprecationWarning, FutureWarning):
            warnings.filterwarnings("ignore", message=r".*(torch\.jit\.|treespec)", category=category)
        warnings.filterwarnings("ignore", category=torch.jit.TracerWarning)
        yield


# ---- loading ----


def load_archive(path: str | Path, device: str | torch.device | None = None) -> torch.jit.ScriptModule:
    """The archive in a file, ready to be driven (flowfast/searcher/archive.py). It is a program: load what you trust.

    Its methods raise torch.jit.Error, whose last line is the class of flowfast.errors and its text. device: where it
    goes; default: where it was exported.

    Raises:
        ArchiveError: missing, damaged, not an archive, or of another format or noise stream.
    """
    facts = _checked_seal(Path(path))
    for name, own in (("format_version", FORMAT_VERSION), ("noise_stream", STREAM_VERSION)):
        if facts[name] != str(own):
            raise ArchiveError(
                f"the archive {path} has {name} {facts[name]}, this flowfast has {own}: export it again with this one"
            )
    try:
        with quiet():
            return torch.jit.load(str(path), map_location=device)
    except RuntimeError as error:
        raise ArchiveError(f"PyTorch {torch.__version__} cannot load the archive {path}: {error}") from None


def read_info(path: str | Path) -> dict[str, str]:
    """The manifest of an archive file, and the digest in its seal as content_hash. Raises ArchiveError."""
    return {**load_archive(path).info(), "content_hash": _checked_seal(Path(path))["blake2b"]}


def _checked_seal(path: Path) -> dict[str, str]:
    with _opened(path) as file:
        facts = seal_of(file)
    if facts is None:
        raise ArchiveError(f"{path} is not a flowfast archive, or it is damaged: write it again with flowfast export")
    return facts


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    try:
        with path.open("rb") as file:
            yield file
    except OSError as error:
        raise ArchiveError(f"cannot read {path}: {error.strerror or error}") from None


class Packages:
    """The compiled parts that lie beside an archive, in the place of its own `propose` and `score`."""

    def __init__(self, path: str | Path, archive: torch.jit.ScriptModule):
        """Raises ArchiveError: one is missing or damaged, or the archive has none."""
        facts, self.archive = dict(archive.info()), archive
        if facts["loader"] != "aoti":
            raise ArchiveError(f"the archive {path} holds its model itself: drive propose, score and observe")
        self.part: dict[str, Callable[..., Tensor]] = {}
        for name in facts["packages"].split(","):
            file = Path(path).parent / facts[f"{name}_file"]
            with _opened(file) as opened:
                found = digest(opened, file.stat().st_size)
            if found != facts[f"{name}_hash"]:
                raise ArchiveError(f"{file} is damaged or of another export: write it again with flowfast export")
            self.part[name] = cast(Callable[..., Tensor], torch._inductor.aoti_load_package(str(file)))

    def propose(self) -> Tensor:
        """Images of the round, made as a C++ driver makes them."""
        archive, images = self.archive, list[Tensor]()
        archive.lay()
        archive.branch()
        for i in range(archive.parts()):
            given = archive.inputs(i)
            x, t, null = given["x"], given["t"], _sorted(given, "null/")
            u = self.part["velocity"](x, t, *_sorted(given, "cond/"))
            archive.mean(i, u, self.part["velocity"](x, t, *null) if archive.passes == 2 else None)
            images.append(self.part["decode"](archive.latents(i)))
            archive.look(i, images[-1])
        return torch.cat(images)

    def score(self, images: Tensor) -> Tensor:
        """Their rewards."""
        found = []
        for i, part in enumerate(images.split(self.archive.micro_batch)):
            asked = self.archive.reward_inputs(i)
            found.append(self.part["reward"](part, asked["t"], *_sorted(asked, "reward/")))
        return torch.cat(found)


def _sorted(tensors: dict[str, Tensor], prefix: str) -> list[Tensor]:
    return [tensors[name] for name in sorted(tensors) if name.startswith(prefix)]


# ---- exporting ----


@own_ground()
def export(
    flow: Flow,
    out: str | Path,
    *,
    reward: Any = None,
    prompts: Sequence[str] = (),
    format: str = "torchscript",
    config: SearchConfig | None = None,
    **options: Any,
) -> dict[str, str]:
    """Writes an archive to `out`; returns its manifest.

    Args:
        reward: a name, a module of the Reward protocol, or "host": none, the driver brings rewards.
        prompts: where encoding does not script: all prompts that the archive will know.
        format: "torchscript", or "aoti": model, decoder and reward in packages beside `out`, compiled for this machine.
        options: fields of SearchConfig, as of `flowfast.search`, or a whole `config`. budget (500) is the largest one
            that the archive can run, slots (4) how many requests run at once; what belongs to one request (seed, ...)
            is not read.

    Raises:
        OptionError, BudgetError: as `flowfast.search`. ModelError: model or reward can be neither scripted nor traced,
        or do something else then. OutputError: it cannot be written.
    """
    if config is not None:
        options = {**config.model_dump(), **options}
    if isinstance(reward, str):
        options["reward"] = reward
    given = {name: value for name, value in options.items() if value is not None}
    setup = Setup(flow, make_config({"budget": BUDGET, "slots": SLOTS, **given}))
    if format not in FORMATS:
        raise OptionError(f"unknown format {format!r}: choose one of {', '.join(FORMATS)}")
    if setup.config.seconds is not None:
        raise OptionError("an archive takes budgets in NFE only: leave seconds out, and give the largest budget")
    for name in ("gradient", "finalists"):
        if name in given:
            raise OptionError(f"an archive has no {name}, only flowfast.search has: leave it out")
    setup.config = setup.config.model_copy(update={"finalists": None})  # it decodes in full, with no preview
    chosen = setup.config.reward if reward is None or isinstance(reward, str) else reward
    scorer = Outside("give rewards to observe") if chosen == "host" else rewards.load(chosen, flow)
    if rewards.on_host(scorer):
        raise OptionError(
            f"reward {scorer.name!r} runs on the host: export with reward 'host', and score in the server"
        )
    named = chosen if isinstance(chosen, str) else str(getattr(scorer, "name", type(scorer).__name__))
    names = {"model": given.get("model", type(flow).__name__), "reward": named}
    known = list({str(prompt): prompt for prompt in ([prompts] if isinstance(prompts, str) else prompts)}.values())
    path = Path(out)
    with locked_file(path):
        with (
            quiet(),
            frozen(*modules_of(flow), *modules_of(scorer)),
            evaluating(flow, scorer),
        ):  # only such weights can be constants of a trace
            module, packages = _module(flow, scorer, setup, known, names, path.stem if format == "aoti" else None)
            data = torch.jit.script(module).save_to_buffer()  # PyTorch's own writer ends the process on a full disk
        for name, package in packages.items():
            write_bytes(path.with_name(name), package)
        with replacing(path) as temporary, temporary.open("r+b") as file:
            file.write(data)
            seal_file(file, STREAM_VERSION)
    return module.manifest


def _module(
    flow: Any, reward: Any, setup: Setup, prompts: list[str], names: dict[str, str], stem: str | None
) -> tuple[Archive, dict[str, bytes]]:
    """The archive, still in Python, and the packages beside it. stem: how their names begin; None: there are none."""
    plan, slots = setup.plan(setup.config.budget or 0), setup.config.slots or SLOTS
    M = setup.config.micro_batch or fitting_rows(slots, plan)
    setup.config = setup.config.model_copy(update={"micro_batch": M, **names})
    known, encode = prompts or [""], CheckedFlow(flow).encode
    cond, null = encoded(encode, known), encode([setup.config.negative_prompt]) if setup.passes == 2 else {}
    asked = conditions_of(encoded(reward.encode, known), len(known), "the reward's encode", RewardError)
    shapes = [{name: list(value.shape[1:]) for name, value in of.items()} for of in (cond, null)]
    if stem is not None and null and shapes[0] != shapes[1]:
        raise ModelError(f"packages take prompts of one shape, but the null prompt has {shapes[1]}, others {shapes[0]}")
    encoder = _table(prompts, cond, asked) if prompts else _encoder(flow, reward)
    parts, plans, host = _parts(flow, reward, cond, asked, M), _plans(setup, plan), isinstance(reward, Outside)
    manifest = _manifest(setup, plan, plans, flow.shape) | _size(parts["decode"])
    manifest |= {"host_reward": str(int(host)), "scripted_encode": str(int(not prompts))}
    manifest |= {"reads_prompts": str(int(getattr(flow, "reads_prompts", True)))}
    packages: dict[str, bytes] = {}
    if stem is None:
        flow, reward = _torchscript(flow, reward, parts, null, M)
    else:
        compiled = {name: _aoti(part, M) for name, part in parts.items()}
        packages = {f"{stem}.{name}.pt2": data for name, data in compiled.items()}
        manifest |= {"loader": "aoti", "packages": ",".join(compiled)}
        for name, data in compiled.items():
            manifest |= {f"{name}_file": f"{stem}.{name}.pt2", f"{name}_hash": digest(io.BytesIO(data), len(data))}
        flow, reward = Outside(COMPILED, flow.shape), reward if host else Outside(COMPILED)
    one, asked_one = ({name: value[:1] for name, value in of.items()} for of in (cond, asked))
    device = next(iter(cond.values())).device
    engine = setup.engine(flow, reward, plan, slots, M, one, asked_one, device, null_cond=null)
    quota, left, start = (torch.tensor(values, device="cpu") for values in (plans.quota, plans.left, plans.start))
    module = Archive(
        engine, encoder, manifest, (quota, left, start), plans.rounds, plans.of, null, hollow=stem is not None
    )
    return module, packages


def _manifest(setup: Setup, plan: Plan, plans: Plans, shape: Sequence[int]) -> dict[str, str]:
    """Facts of an archive, for `info`."""
    config = setup.config
    facts = {
        "format": "flowfast-archive",
        "format_version": FORMAT_VERSION,
        **{name: value for name, value in versions().items() if name in ("flowfast", "noise_stream", "torch")},
        "model": config.model,
        "reward": config.reward,
        "method": config.method,
        "loader": "torchscript",
        "shape": ",".join(map(str, shape)),
        "slots": config.slots,
        "chains": plan.chains,
        "lanes": plan.lanes,
        "rows": setup.schedule.rows,
        "micro_batch": config.micro_batch,
        "passes": setup.passes,
        "guidance": setup.guidance,
        "top": config.top_k,
        "budget_min": next(e for e, found in enumerate(plans.of) if found >= 0) * setup.passes,
        "budget_max": config.budget,
        "config": config.model_dump_json(),
    }
    return {name: str(fact) for name, fact in facts.items()}


def _size(decode: Part) -> dict[str, str]:
    """Width and height of the images, where the decoder makes any, as a server's clients write them."""
    shape = decode.function(*decode.rows(1)).shape
    return {"size": f"{shape[-1]}x{shape[-2]}"} if len(shape) >= 4 else {}


def _encoder(flow: Any, reward: Any) -> nn.Module:
    """Prompts to conditions, scripted, without the weights. Raises OptionError."""
    try:
        buffer = io.BytesIO()
        torch.jit.save(torch.jit.freeze(torch.jit.script(Encoder(flow, reward)).eval()), buffer)
        buffer.seek(0)
        return torch.jit.load(buffer)  # one that was frozen cannot become a part of a module, one that was loaded can
    except Exception as error:  # TorchScript may refuse in any way
        log.info("prompt encoding does not script: %s", error)
        raise OptionError(
            "this model's or this reward's prompt encoding does not script: give all prompts that the archive shall "
            "know (prompts=[...], --prompt, --prompts)"
        ) from None


def _table(prompts: list[str], cond: Conditions, asked: Conditions) -> Table:
    named = {f"cond/{name}": value for name, value in cond.items()}
    return Table(
        [str(prompt) for prompt in prompts], named | {f"reward/{name}": value for name, value in asked.items()}
    )


# ---- budgets ----


class Plans(NamedTuple):
    """The distinct plans P of all budgets; of: the plan of each number of evaluations, -1: none."""

    quota: list[list[list[int]]]
    left: list[list[int]]
    start: list[list[bool]]
    rounds: list[list[int]]
    of: list[int]


def _plans(setup: Setup, largest: Plan) -> Plans:
    """Chains that a smaller plan does not have never start."""
    plans, seen, T = Plans([], [], [], [], []), dict[str, int](), len(largest.accept)
    for evaluations in range((setup.config.budget or 0) // setup.passes + 1):
        try:
            plan = setup.plan(evaluations * setup.passes)
        except FlowfastError:  # below what the method needs
            plans.of.append(-1)
            continue
        if not _runs_on(plan, largest):
            plans.of.append(-1)
            continue
        start, missing = plan.start or [True] * plan.chains, largest.chains - plan.chains
        key = repr((plan.quota, plan.left, start))
        if key not in seen:
            seen[key] = len(seen)
            plans.quota.append(plan.quota + [[0] * T] * missing)
            plans.left.append(plan.left + [0] * missing)
            plans.start.append(start + [False] * missing)
            plans.rounds.append([n for width, same in groupby(plan.widths()) for n in (width, len(list(same)))])
        plans.of.append(seen[key])
    return plans


def _runs_on(plan: Plan, largest: Plan) -> bool:
    """Does an engine made for the largest plan do with this one exactly what one of its own would?

    Not where chains are regrouped and there are fewer of them: which ones go on depends on their number.
    """
    names = ("accept", "margin", "carry", "regroup", "groups", "finished")
    alike = all(getattr(plan, name) == getattr(largest, name) for name in names)
    chains = plan.chains == largest.chains or (plan.chains < largest.chains and not plan.regroup)
    lanes = plan.lanes == largest.lanes or max(map(max, plan.quota)) <= plan.lanes <= largest.lanes
    return alike and chains and lanes


# ---- model and reward leave Python ----


class Part(NamedTuple):
    """A function of a model or a reward, what it belongs to, and arguments for it: tensors of a micro-batch, and the
    conditions of all prompts that the archive knows, or of one."""

    function: Callable[..., Tensor]
    owner: Any
    tensors: tuple[Tensor, ...]
    cond: Conditions | None = None

    def rows(self, count: int, first: int = 0, step: int = 1) -> tuple[Any, ...]:
        """Arguments of `count` rows, with the conditions of every step-th prompt from `first` on."""
        index = torch.arange(count, device=self.tensors[0].device)
        tensors = tuple(tensor[index % len(tensor)] for tensor in self.tensors)
        if self.cond is None:
            return tensors
        return (*tensors, {name: value[(first + step * index) % len(value)] for name, value in self.cond.items()})

    @property
    def prompts(self) -> int:
        return len(next(iter(self.cond.values()))) if self.cond else 1

    def __str__(self) -> str:
        return f"{getattr(self.function, '__name__', 'forward')} of {type(self.owner).__name__}"


def _parts(flow: Any, reward: Any, cond: Conditions, asked: Conditions, M: int) -> dict[str, Part]:
    device = next(iter(cond.values())).device
    x = torch.randn(M, *flow.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float32, device="cpu")
    x = x.to(device)
    t = torch.linspace(0.1, 0.9, M, dtype=torch.float32, device=device)
    parts = {"velocity": Part(flow.velocity, flow, (x, t), cond), "decode": Part(flow.decode, flow, (x,))}
    if not isinstance(reward, Outside):
        parts["reward"] = Part(reward.forward, reward, (flow.decode(x), t), asked)
    return parts


def _torchscript(flow: Any, reward: Any, parts: dict[str, Part], null: Conditions, M: int) -> tuple[Any, Any]:
    """Model and reward in a form that scripts: their own, or traced. Raises ModelError where they do something else."""
    model = _scripted(Model(flow)) if isinstance(flow, nn.Module) else None
    if model is None:
        flow = Functions(_traced(parts["velocity"], M), _traced(parts["decode"], M), flow.shape)
        model = torch.jit.script(Model(flow))
    made: dict[str, Callable[..., Tensor]] = {"velocity": model.velocity, "decode": model.decode}
    if "reward" in parts:
        scripted = _scripted(reward)
        made["reward"] = scripted or _traced(parts["reward"], M)
        reward = reward if scripted else made["reward"]
    for name, function in made.items():
        for count in (M, 1) if name == "decode" else (M,):
            _check(function, parts[name], count)
    if null:  # it may have another shape
        _check(model.velocity, parts["velocity"]._replace(cond=null), M)
    return flow, reward


def _scripted(module: nn.Module) -> Any:
    """The module scripted, None where it does not script."""
    try:
        return torch.jit.script(module)
    except Exception as error:  # TorchScript may refuse in any way
        log.info("%s does not script, so it is traced: %s", type(module).__name__, error)
        return None


class Call(nn.Module):
    """A function as a module; weights that it uses become constants of its trace."""

    def __init__(self, function: Callable[..., Tensor]):
        super().__init__()
        self.function = function

    def forward(self, *given: Any) -> Tensor:
        return self.function(*given)


def _traced(part: Part, M: int) -> Any:
    """The function traced with another number of rows than M, so that one taken down as a number shows."""
    try:
        return torch.jit.trace(Call(part.function), part.rows(3 if M == 2 else 2), check_trace=False)
    except Exception as error:
        raise ModelError(f"{part} can be neither scripted nor traced: {_reason(error)}") from error


def _check(made: Callable[..., Tensor], part: Part, count: int, tolerance: float = TOLERANCE) -> None:
    """Raises ModelError where the function that was made is another one. Thrice, for TorchScript optimises later, and
    with each prompt alone, for a trace may have kept what the prompts beside it said."""
    for first, step in ((0, 1), (0, 1), (0, 1), *((prompt, 0) for prompt in range(part.prompts))):
        wanted = part.function(*part.rows(count, first, step)).float()
        try:
            found = made(*part.rows(count, first, step)).float()
        except Exception as error:
            raise ModelError(f"{part} fails at {count} rows once it has left Python: {_reason(error)}") from error
        if found.shape != wanted.shape or not _alike(found, wanted, tolerance):
            raise ModelError(f"{part} gives something else at {count} rows once it has left Python")


def _alike(found: Tensor, wanted: Tensor, tolerance: float) -> bool:
    """Not finite in the same places (a search can live with that), elsewhere equal up to the tolerance."""
    finite = wanted.isfinite()
    found, wanted, there = found[finite], wanted[finite], found.isfinite()
    if not torch.equal(there, finite):
        return False
    return not len(wanted) or bool(((found - wanted).abs() <= tolerance * wanted.abs().amax()).all())


def _reason(error: Exception) -> str:
    """The line of a long text of torch's that says what happened."""
    lines = str(error).strip().splitlines() or [repr(error)]
    return lines[-1] if "Traceback of TorchScript" in str(error) else lines[0]


class Flat(nn.Module):
    """A part with its conditions as tensors in the order of their names, for packages."""

    def __init__(self, part: Part):
        super().__init__()
        self.function, self.owned = part.function, nn.ModuleList(modules_of(part.owner))
        self.names = None if part.cond is None else sorted(part.cond)

    def forward(self, *tensors: Tensor) -> Tensor:
        if self.names is None:
            return self.function(*tensors)
        return self.function(*tensors[:2], dict(zip(self.names, tensors[2:], strict=True)))


def _aoti(part: Part, M: int) -> bytes:
    """The part as a package. Raises ModelError."""

    def flat(given: tuple[Any, ...]) -> tuple[Tensor, ...]:
        return given if part.cond is None else (*given[:-1], *_sorted(given[-1], ""))

    with tempfile.TemporaryDirectory() as folder:
        try:
            program = torch.export.export(Flat(part), flat(part.rows(M)))
            package = torch._inductor.aoti_compile_and_package(program, package_path=f"{folder}/part.pt2")
            compiled = torch._inductor.aoti_load_package(package)
        except Exception as error:
            raise ModelError(f"{part} cannot be compiled by AOTInductor: {_reason(error)}") from error
        _check(lambda *given: compiled(*flat(given)), part, M, COMPILED_TOLERANCE)
        return Path(package).read_bytes()
