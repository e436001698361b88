"""Method auto, made concrete before a request begins: a method with its options, and a path.

It follows from the calibration, the budget and the reward alone, never from a pace, so that the same request is the
same search everywhere. What the caller said of the path holds: then only plans on that path are looked at.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from flowfast import rewards
from flowfast.calibration.bank import Bank, read, refused, weights_of
from flowfast.calibration.choose import Chosen, Route, alive, choose, matching, rung
from flowfast.config import Picked, SearchConfig, SearchParams
from flowfast.errors import FlowfastError, OptionError
from flowfast.methods.auto import AUTO
from flowfast.methods.base import make_method
from flowfast.methods.bon import BestOfN
from flowfast.methods.prune import Prune
from flowfast.models.answers import defaults_of
from flowfast.resolve import resolve
from flowfast.types import PATH_OPTIONS, WALK_OPTIONS, Flow

GUIDANCE = tuple(name for name in WALK_OPTIONS if name not in PATH_OPTIONS)
SCOUTS = 3
"""Scouts from which on prune cuts."""


def settled(
    flow: Flow, reward: Any, params: SearchParams, file: str | None = None, before: Picked | None = None
) -> tuple[SearchParams, Picked | None]:
    """Params with a concrete method in place of auto, and what was taken; others, and those that have no budget in NFE
    yet, as they are.

    Args:
        reward: as `flowfast.rewards.load` made it.
        file: of a calibration; None: the model's own.
        before: what was taken for this request once, which holds again.

    Raises:
        OptionError, BudgetError: the file is of another model or reward, or damaged; auto cannot run this.
    """
    if params.method != AUTO or params.budget is None:
        return params, None
    make_method(AUTO, params.method_options)  # it has none
    picked = before if before is not None and answers(before, params) else pick(flow, reward, params, file)
    return applied(params, picked), picked


def open_still(config: SearchConfig) -> bool:
    """Is it method auto, whose budget in NFE is measured first? Nothing of a path is said yet then."""
    return config.method == AUTO


def settled_config(flow: Flow, reward: Any, config: SearchConfig) -> SearchConfig:
    """The whole configuration with a concrete method, and with what was taken."""
    params, picked = settled(flow, reward, config.params, config.calibration, config.picked)
    return config.with_params(params).model_copy(update={"picked": picked})


def recorded(config: SearchConfig) -> SearchConfig:
    """A settled configuration as a rerun takes it: with method auto, where that was asked for, and what it took."""
    asked = {} if config.picked is None else {"method": AUTO, "method_options": {}}
    return config.model_copy(update=asked)


def as_picked(config: SearchConfig) -> SearchParams:
    """Params of a recorded configuration, with what was taken."""
    taken = config.method == AUTO and config.picked is not None
    return applied(config.params, config.picked) if taken and config.picked else config.params


def answers(picked: Picked, params: SearchParams) -> bool:
    """Was it taken for such a request? A path that it named may have been filled in."""
    filled = ((same(getattr(params, name)), same(value)) for name, value in picked.path.items())
    return picked.budget == params.budget and all(given is None or given == value for given, value in filled)


def same(value: Any) -> Any:
    """As JSON and YAML have it."""
    return list(value) if isinstance(value, tuple) else value


def applied(params: SearchParams, picked: Picked) -> SearchParams:
    """What is run."""
    path = {name: tuple(value) if isinstance(value, list) else value for name, value in picked.path.items()}
    return params.model_copy(update={"method": picked.method, "method_options": dict(picked.method_options), **path})


# ---- what is taken ----


def pick(flow: Flow, reward: Any, params: SearchParams, file: str | None) -> Picked:
    """What such a request takes. Raises OptionError, BudgetError."""
    found = decided(flow, reward, params, file)
    if isinstance(found, str):
        return without_bank(flow, params, found)
    bank, routes, chosen = found
    taken, route = chosen.taken, routes[chosen.taken.route]
    return Picked(
        budget=params.budget or 0,
        method=taken.method.name,
        method_options=options_of(taken.method),
        path={name: value for name, value in route.bank.options.items() if name in unsaid(params)},
        why=chosen.why,
        expected=taken.mean,
        calibration=bank.digest,
    )


def decided(flow: Flow, reward: Any, params: SearchParams, file: str | None) -> tuple[Bank, list[Route], Chosen] | str:
    """The calibration, the paths of it that may be walked, and the choice among plans; or why there is no calibration
    to go by."""
    bank = bank_for(flow, reward, file)
    if isinstance(bank, str):
        return bank
    routes = routes_of(flow, params, bank)
    if not routes:
        if file is not None:
            raise OptionError(
                f"the calibration {file} has not the path that was asked for: leave its options out, or calibrate with "
                "them"
            )
        return "the model's calibration has not the path that was asked for"
    budget = params.budget or 0
    at = max(rung(budget), min(budget, min(route.bank.nfe for route in routes)))
    key = (at, params.chains, tuple(route.bank.digest for route in routes))
    kept = bank.kept
    if key not in kept:
        kept[key] = choose(routes, at)
    return bank, routes, kept[key]


def bank_for(flow: Flow, reward: Any, file: str | None) -> Bank | str:
    """The calibration of this model and reward, or why there is none. Raises OptionError for a given file that is of
    others, or damaged."""
    place = file if file is not None else defaults_of(flow).calibration_file
    if place is None:
        return "there is no calibration of this model"
    bank = read_once(Path(place))
    other = [
        f"{what} {had!r}, not of this {what} {has!r}" if had != has else f"another state of {what} {had!r}"
        for what, had, has, same_weights in (
            ("reward", bank.reward, rewards.name_of(reward), bank.reward_weights == weights_of(reward)),
            ("model", bank.model, bank.model, bank.model_weights == weights_of(flow)),
        )
        if had != has or not same_weights
    ]
    if other and file is not None:
        raise OptionError(
            f"the calibration {file} is of {other[0]}: make one with `flowfast calibrate`, leave --calibration out, or "
            "name a method"
        )
    return f"the model's calibration is of {other[0]}" if other else bank


def read_once(path: Path) -> Bank:
    """Raises OptionError."""
    try:
        facts = path.stat()
    except OSError as error:
        raise refused(path, error.strerror or str(error)) from None
    return _read(path, facts.st_mtime_ns, facts.st_size)


@lru_cache(maxsize=8)
def _read(path: Path, changed: int, size: int) -> Bank:
    return read(path)


def unsaid(params: SearchParams) -> set[str]:
    """Options of the path that a calibration may choose: the way through time where the request says nothing of it,
    guidance likewise."""
    free = set[str]()
    if params.preset is None and all(getattr(params, name) is None for name in PATH_OPTIONS):
        free |= set(PATH_OPTIONS)
    if all(getattr(params, name) is None for name in GUIDANCE):
        free |= set(GUIDANCE)
    return free


def routes_of(flow: Flow, params: SearchParams, bank: Bank) -> list[Route]:
    """The bank's paths that the request may walk."""
    found, free = [], unsaid(params)
    for path in bank.paths:
        options = {name: value for name, value in path.options.items() if name in free}
        try:
            taken = Picked(budget=1, method=BestOfN.name, path=options)
            resolved = resolve(flow, applied(params, taken))
        except FlowfastError:  # what the request says does not go with this path
            continue
        if matching(path, resolved):
            found.append(Route(path, resolved))
    return found


def without_bank(flow: Flow, params: SearchParams, why: str) -> Picked:
    """Prune as it is by itself, best-of-n below three scouts."""
    budget = params.budget or 0
    prune = params.model_copy(update={"method": Prune.name})
    resolved = resolve(flow, prune)
    counts = alive(resolved.plan(budget))
    if counts[0] < SCOUTS:
        return Picked(budget=budget, method=BestOfN.name, why=f"too few scouts to cut any; {why}")
    return Picked(
        budget=budget, method=Prune.name, method_options=options_of(resolved.method), why=f"prune's default, for {why}"
    )


def options_of(method: Any) -> dict[str, Any]:
    """Those of prune that a plan goes by; n follows from the budget."""
    found: Mapping[str, Any] = {"at": method.at, "keep": method.keep} if isinstance(method, Prune) else {}
    return {name: list(value) for name, value in found.items()}
