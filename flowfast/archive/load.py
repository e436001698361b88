"""Archives are loaded, and the compiled parts beside them called."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, cast

import torch
from torch import Tensor

from flowfast.archive.seal import FORMAT_VERSION, digest, seal_of
from flowfast.errors import ArchiveError
from flowfast.ops.noise import STREAM_VERSION


@contextmanager
def quiet() -> Iterator[None]:
    """Without torch's warnings that TorchScript is deprecated (nothing else carries a program into C++), of its own use
    of what is deprecated, and of tracing: what was traced is run and compared."""
    with warnings.catch_warnings():
        for category in (DeprecationWarning, FutureWarning):
            warnings.filterwarnings("ignore", message=r".*(torch\.jit\.|treespec)", category=category)
        warnings.filterwarnings("ignore", category=torch.jit.TracerWarning)
        yield


def load_archive(path: str | Path, device: str | torch.device | None = None) -> torch.jit.ScriptModule:
    """The archive in a file, ready to be driven (flowfast/archive/module.py). It is a program: load what you trust.

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
        for i in range(archive.null_parts()):
            given = archive.null_inputs(i)
            archive.keep_null(i, self.part["velocity"](given["x"], given["t"], *in_order(given, "null/")))
        for i in range(archive.parts()):
            given = archive.inputs(i)
            x, t, null = given["x"], given["t"], in_order(given, "null/")
            u = self.part["velocity"](x, t, *in_order(given, "cond/"))
            archive.mean(i, u, self.part["velocity"](x, t, *null) if null else None)
        for i in range(archive.scored_parts()):
            images.append(self.part["decode"](archive.latents(i)))
            archive.look(i, images[-1])
        return torch.cat(images) if images else torch.zeros(0)

    def score(self, images: Tensor) -> Tensor:
        """Their rewards."""
        found = []
        for i, part in enumerate(images.split(self.archive.micro_batch) if len(images) else ()):
            asked = self.archive.reward_inputs(i)
            found.append(self.part["reward"](part, asked["t"], *in_order(asked, "reward/")))
        return torch.cat(found) if found else torch.zeros(0)


def in_order(tensors: dict[str, Tensor], prefix: str) -> list[Tensor]:
    return [tensors[name] for name in sorted(tensors) if name.startswith(prefix)]
