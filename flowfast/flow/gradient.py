"""Guidance as text: the scale of classifier-free guidance, "3", or where along linear t it acts, "3@.35:.8"
(Kynkaanniemi et al. 2024, arXiv 2404.07724); and that by the reward's gradient, "dps:STRENGTH"; or both.

| gradient       | what it adds to the score                                                        | source           |
|----------------|----------------------------------------------------------------------------------|------------------|
| dps[:STRENGTH] | STRENGTH (1 if left out) x gradient of the posterior mean's reward, by the model | arXiv 2209.14687 |
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from flowfast.errors import OptionError
from flowfast.flow.option import parse_numbers, parse_option


@dataclass(frozen=True)
class DPS:
    """The search is steered towards p(x0) exp(strength x reward); 0 steers nothing."""

    strength: float = 1.0


GRADIENTS: dict[str, type[DPS]] = {"dps": DPS}


def parse_gradient(text: str) -> DPS:
    """ "dps:0.5". Raises OptionError for an unknown name and for a strength that is no finite number."""
    return parse_option("gradient", text, GRADIENTS)


def parse_guidance(text: str) -> dict[str, Any]:
    """What `--guidance` says: "3", "3@.35:.8", "dps:0.5" or "3@.35:.8,dps:0.5" as the options `guidance`,
    `guidance_interval` and `gradient` that it names.

    Raises OptionError.
    """
    found: dict[str, Any] = {}
    for part in (part.strip() for part in text.split(",")):
        name = "gradient" if part[:1].isalpha() and part.lower() not in ("nan", "inf", "infinity") else "guidance"
        if name in found:
            raise OptionError(f"guidance {text!r}: expected one scale and one gradient at most, like 3,dps:0.5")
        if name == "gradient":
            parse_gradient(part)
            found[name] = part
            continue
        scale, at, interval = part.partition("@")
        found[name] = parse_numbers("guidance", text, [scale])[0]
        if at:
            ends = parse_numbers("guidance", text, interval.split(":"))
            if len(ends) != 2:
                raise OptionError(f"guidance {text!r}: expected two ends of linear t behind @, like 3@0.35:0.8")
            found["guidance_interval"] = (ends[0], ends[1])
    return found
