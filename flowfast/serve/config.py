"""What a server is: its engine, what it offers, and its limits."""

from __future__ import annotations

import ipaddress
import os
import re
from typing import Annotated, Any

from pydantic import field_validator, model_validator

from flowfast import secrets
from flowfast.bounds import MOST_ROWS, Within
from flowfast.config import MOST_NFE, MOST_SECONDS, EngineConfig
from flowfast.errors import OptionError

Budget = Annotated[int, Within(1, MOST_NFE)]
QUALITIES = ("low", "medium", "high")
SAME = {"auto": "medium", "standard": "medium", "hd": "high"}
"""Other names of qualities that clients send."""
KEY = "FLOWFAST_API_KEY"
DEVICE = re.compile(r"cpu|cuda(?::\d{1,3})?")
MOST_ENGINES = 64
SIZE = re.compile(r"[1-9]\d{0,4}x[1-9]\d{0,4}")
MOST_SIZES = 16


class ServeConfig(EngineConfig):
    """All of it, as `--config server.yaml` has it."""

    host: str = "127.0.0.1"
    """Address to listen on; another than loopback needs a key, or --allow-anonymous."""
    port: Annotated[int, Within(0, 65535)] = 8000
    """0: any free one."""
    alias: tuple[str, ...] = ()
    """Other names that clients may call the model by."""
    other_rewards: tuple[str, ...] = ()
    """Rewards that a request may choose beside the first one."""
    quality: dict[str, Budget] = {"low": 50, "medium": 200, "high": 500}
    """Budgets by the names low, medium, high."""
    size: tuple[str, ...] = ()
    """Sizes of pictures, 512x512,1024x1024 (width first); the first is that of requests that name none.

    For models that have several; they share its weights. If not given, the model's own."""
    max_budget: Annotated[int | None, Within(1, MOST_NFE)] = None
    """The largest budget of a request; the largest of the qualities if not given.

    Batches have room for it."""
    queue: Annotated[int, Within(0, MOST_ROWS)] = 64
    """Pictures that may wait for a slot.

    One more: 503, with the time after which to try again."""
    drain_seconds: Annotated[float, Within(0, MOST_SECONDS)] = 30.0
    """Seconds that requests have to end after SIGTERM.

    What is not done then is told so."""
    engines: Annotated[int | None, Within(1, MOST_ENGINES)] = None
    """Processes with an engine each; one engine, without a process of its own, if not given."""
    devices: tuple[str, ...] = ()
    """Devices with an engine in a process of its own each: cuda:0, cuda:1."""
    threads: Annotated[int | None, Within(1, 1024)] = None
    """Threads of PyTorch in each engine; with several engines the cores shared out, if not given.

    OMP_NUM_THREADS in the environment goes before that. Last bits of results depend on it."""
    allow_anonymous: bool = False
    """Listen beyond loopback without a key."""
    page: bool = True
    """A page at / where a person searches by hand, and watches."""
    warm_up: str = "two red circles"
    """Prompt that is drawn once in each quality before /ready; an empty one: nothing is drawn."""

    @field_validator("devices", "size", mode="before")
    @classmethod
    def _one_by_one(cls, names: Any) -> Any:
        return tuple(name.strip() for name in names.split(",")) if isinstance(names, str) else names

    @model_validator(mode="before")
    @classmethod
    def _without_login(cls, options: Any) -> Any:
        if isinstance(options, dict) and isinstance(options.get("other_rewards"), list | tuple):
            names = options["other_rewards"]
            sealed = [secrets.sealed(name, "REWARD") if isinstance(name, str) else name for name in names]
            return {**options, "other_rewards": sealed}
        return options

    @model_validator(mode="after")
    def _goes_together(self) -> ServeConfig:
        unknown = [name for name in self.quality if name not in QUALITIES]
        if unknown or not self.quality:
            got = repr(unknown[0]) if unknown else "none"
            raise OptionError(f"expected budgets of the qualities {', '.join(QUALITIES)}, got {got}: low=50,high=500")
        if self.largest_budget < max(self.quality.values()):
            most = max(self.quality.values())
            raise OptionError(f"max_budget {self.max_budget} is below a quality's {most}: raise it, or lower that")
        self._check_devices()
        self._check_sizes()
        return self

    def _check_devices(self) -> None:
        devices = self.devices
        unknown = [name for name in devices if not DEVICE.fullmatch(name)]
        if unknown:
            raise OptionError(f"expected devices such as cpu, cuda:0,cuda:1, got {unknown[0]!r:.40}")
        own = [name if ":" in name or name == "cpu" else f"{name}:0" for name in devices]
        twice = [name for name in own if name != "cpu" and own.count(name) > 1]
        if twice:
            raise OptionError(f"device {twice[0]} stands twice: one engine takes as much of it as it can use")
        if devices and self.engines not in (None, len(devices)):
            both = f"{self.engines} engines on {len(devices)} devices"
            raise OptionError(f"{both}: leave engines out, or make them as many")
        if devices and {"device", "device_map"} & set(self.model_options):
            raise OptionError("model_options say a device, and so do devices: give one of them")

    def _check_sizes(self) -> None:
        wrong = [size for size in self.size if not SIZE.fullmatch(size) or self.size.count(size) > 1]
        if wrong or len(self.size) > MOST_SIZES:
            got = repr(wrong[0])[:40] if wrong else f"{len(self.size)} of them"
            raise OptionError(f"expected up to {MOST_SIZES} different sizes such as 512x512,1024x768, got {got}")
        if self.size and {"height", "width"} & set(self.model_options):
            raise OptionError("model_options say a height or width, and so does size: give one of them")

    @property
    def apart(self) -> bool:
        """Do engines run in processes of their own?"""
        return self.count > 1 or bool(self.devices)

    @property
    def count(self) -> int:
        """Of engines."""
        return len(self.devices) or self.engines or 1

    @property
    def torch_threads(self) -> int | None:
        """Of each engine; None: PyTorch's own number."""
        if self.threads is not None or self.count == 1 or "OMP_NUM_THREADS" in os.environ:
            return self.threads
        return max(1, len(os.sched_getaffinity(0)) // self.count)

    @property
    def largest_budget(self) -> int:
        return max(self.quality.values()) if self.max_budget is None else self.max_budget

    @property
    def models(self) -> tuple[str, ...]:
        """Ids by which clients may call the model, its own first."""
        return (secrets.without_login(self.model), *self.alias)

    @property
    def engine_options(self) -> dict[str, Any]:
        """For `flowfast.AsyncEngine`, beside model and rewards."""
        names = [name for name in EngineConfig.model_fields if name not in ("model", "reward")]
        options = {name: getattr(self, name) for name in names}
        waiting = (
            None if self.apart or self.size else self.queue
        )  # the server's gate bounds them all, wherever they wait
        return {**options, "max_budget": self.largest_budget, "max_waiting": waiting}

    def budget_of(self, quality: str) -> int | None:
        """NFE of a quality; None: it has no such name. "auto" is the first of those there are, without a medium."""
        name = SAME.get(quality, quality)
        if name not in self.quality and quality in ("auto", "standard"):
            name = next(iter(self.quality))
        return self.quality.get(name)


def check_open(config: ServeConfig, key: str | None) -> None:
    """Raises OptionError where anybody could use the server who should not."""
    if key is not None and (not key.isascii() or not key.isprintable() or " " in key or not key):
        raise OptionError("expected the API key to be printable ASCII without spaces, got another one")
    if key is None and not config.allow_anonymous and not is_loopback(config.host):
        raise OptionError(
            f"anybody who reaches {config.host} could use this server: give --api-key or {KEY}, listen on 127.0.0.1, "
            "or say --allow-anonymous"
        )


def is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
