"""Runs the public code of arXiv 2503.19385 (github.com/KAIST-Visual-AI-Group/Flow-Inference-Time-Scaling, MIT) from a
checkout, with a null model, a null decoder and a null reward.

Nothing of it is kept here: its package `rbf` is imported from the folder that the caller names, and its own RBF loop,
particle sampler, scheduler and SDE step run as they are, with logging off. The third-party packages it imports but does
not use on this path (diffusers, transformers, reward models) are replaced by stand-ins while it is imported.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.abc
import importlib.machinery
import inspect
import sys
import tempfile
import types
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

STAND_INS = (
    "ImageReward", "clip", "cv2", "diffusers", "einops", "imageio", "natsort", "omegaconf", "sklearn", "supervision",
    "t2v_metrics", "torchvision", "tqdm", "transformers",
)  # fmt: skip


class PublicRBF:
    """Its `RBF` trainer on latents (batch, tokens, channels)."""

    def __init__(
        self,
        folder: Path,
        shape: tuple[int, int],
        dtype: torch.dtype,
        *,
        batch: int,
        budget: int,
        init: int,
        condition: tuple[int, ...] = (1,),
    ):
        """init: initial noises a sample; condition: shape of the text embedding.

        Raises:
            ImportError: the folder holds no such package.
        """
        self.folder = tempfile.TemporaryDirectory(prefix="public-code-")
        with stand_ins(folder):
            trainer, flux = importlib.import_module("rbf.rbf"), importlib.import_module("rbf.prior.flux")
            sampler = importlib.import_module("rbf.corrector.rgrp_sampler")
            self.shared = importlib.import_module("rbf.shared_modules")
        self.shared.OFF_LOG = self.shared.DO_NOT_SAVE_INTERMEDIATE_IMAGES = True
        pipeline = Pipeline(shape, dtype, batch * init)
        flux.FluxPipeline.from_pretrained = staticmethod(lambda *_, **__: pipeline)
        sampler.VQARewardModel = NullReward
        # config/compositional_image/rbf.yaml of the public code, on the CPU and without pictures of the way.
        self.settings = Settings(
            max_nfe=budget, batch_size=batch, max_steps=10, t_max=1000, block_size=1, n_particles=1,
            sample_method="sde", convert_scheduler="vp", init_n_particles=init, filtering_method="rbf",
            diffusion_coefficient="square", diffusion_norm=3.0, time_sampler="flux_scheduler", time_schedule="exp",
            model="flux_image", prior="flux", logger="self", corrector="particle", reward_score="vqa",
            root_dir=self.folder.name, device="cpu", disable_debug=True,
        )  # fmt: skip
        self.trainer = trainer.RBF(self.settings)
        prior = self.shared.prior
        embedding = torch.zeros(1, *condition, dtype=dtype)
        prior.cond = {"encoder_hidden_states": embedding, "pooled_projections": torch.zeros(1, 1), "txt_ids": None}
        prior.decode_latent = lambda latent: latent
        self.prior = prior

    def run(self) -> tuple[float, Tensor, int]:
        """(best reward, posterior mean, NFE) of one search."""
        s, trainer, before = self.settings, self.trainer, self.prior.nfe
        each = int((s.max_nfe - s.init_n_particles * s.batch_size) / (s.max_steps * s.batch_size))
        trainer.default_budget, trainer.max_budget = each, torch.full((s.batch_size,), each, dtype=torch.int32)
        state: dict[str, Any] = {
            "nfe": 0,
            "device": "cpu",
            "pbar": NullBar(),
            "done": False,
            "t_curr": torch.full((s.batch_size, 1, 1), float(s.t_max)),
            "best_rewards": torch.full((s.batch_size,), -1e9),
            "cur_step_best_rewards": torch.full((s.batch_size,), -1e9),
        }
        while not state["done"]:
            state = trainer.train_single_step(state)
        return state["lastest_rewards"], self.shared.model.image, self.prior.nfe - before


class Pipeline:
    """What its prior asks of a FLUX pipeline. The transformer hands out the same zeros every time."""

    def __init__(self, shape: tuple[int, int], dtype: torch.dtype, rows: int):
        self.shape, self.dtype, self.device = shape, dtype, torch.device("cpu")
        self.zeros = torch.zeros(rows, *shape, dtype=dtype)
        self.scheduler = types.SimpleNamespace(config={"use_dynamic_shifting": False, "shift": 1.0})
        self.vae_scale_factor = 8

    def to(self, _device: object) -> Pipeline:
        return self

    def prepare_latents(self, batch: int, *_: object, **__: object) -> tuple[Tensor, None]:
        return torch.randn(batch, *self.shape).to(self.dtype), None

    @property
    def transformer(self) -> Any:
        def call(hidden_states: Tensor, **_: object) -> tuple[Tensor]:
            return (self.zeros[: len(hidden_states)],)

        call.config = types.SimpleNamespace(in_channels=64, guidance_embeds=False)  # type: ignore[attr-defined]
        return call


class NullReward:
    """The first number of each image."""

    def __init__(self, _cfg: object):
        self.parts: list[Tensor] = []

    def preprocess(self, images: Tensor) -> list[None]:
        self.parts.append(images)
        return [None] * len(images)

    def __call__(self, _target: object, _step: int) -> Tensor:
        parts, self.parts = self.parts, []
        images = torch.cat(parts) if len(parts) > 1 else parts[0]
        return images.flatten(1)[:, 0].float()


class NullBar:
    def update(self, _count: int) -> None: ...


class Settings(dict[str, Any]):
    """A mapping whose entries are attributes too."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


class _Kind(type):
    """Class of `Anything`: its attributes are further such classes."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Kind(name, (Anything,), {})

    def __bool__(cls) -> bool:
        return False


class Anything(metaclass=_Kind):
    """Can be subclassed, called, used as a decorator, and is false."""

    def __init__(self, *_: object, **__: object): ...

    def __call__(self, first: Any = None, *_: object, **__: object) -> Any:
        return first

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return Anything()

    def __bool__(self) -> bool:
        return False


class ConfigMixin:
    config: Any

    @classmethod
    def from_config(cls, config: Any) -> Any:
        return cls(**(config if isinstance(config, dict) else vars(config)))


def register_to_config(init: Any) -> Any:
    """Keeps the arguments of __init__ as self.config, as the decorator of that name in diffusers does."""
    signature = inspect.signature(init)

    def keep(self: Any, *args: Any, **kwargs: Any) -> None:
        bound = signature.bind(self, *args, **kwargs)
        bound.apply_defaults()
        self.config = types.SimpleNamespace(**dict(list(bound.arguments.items())[1:]))
        init(self, *args, **kwargs)

    return keep


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Answers for STAND_INS and whatever lies under them."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: Any = None) -> Any:
        if name.partition(".")[0] in STAND_INS:
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec: Any) -> types.ModuleType:
        module = types.ModuleType(spec.name)
        module.__getattr__ = lambda name: _attribute(spec.name, name)  # type: ignore[method-assign]
        return module

    def exec_module(self, module: types.ModuleType) -> None:
        if module.__name__ == "diffusers.configuration_utils":
            module.ConfigMixin, module.register_to_config = ConfigMixin, register_to_config  # type: ignore[attr-defined]
        if module.__name__ == "diffusers.schedulers.scheduling_utils":
            module.SchedulerMixin = type("SchedulerMixin", (), {})  # type: ignore[attr-defined]
        if module.__name__ == "diffusers.utils":
            module.BaseOutput = type("BaseOutput", (), {})  # type: ignore[attr-defined]


def _attribute(module: str, name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)
    return _Kind(name, (Anything,), {"__module__": module})


@contextlib.contextmanager
def stand_ins(folder: Path) -> Iterator[None]:
    """`folder` is on the path and STAND_INS can be imported; what was there before is back afterwards."""
    kept = {name: sys.modules.pop(name) for name in list(sys.modules) if name.partition(".")[0] in STAND_INS}
    finder = _Finder()
    sys.meta_path.insert(0, finder)
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        sys.meta_path.remove(finder)
        for name in [name for name in sys.modules if name.partition(".")[0] in STAND_INS]:
            del sys.modules[name]
        sys.modules.update(kept)
