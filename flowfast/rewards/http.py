"""A reward that a server computes: `http:URL`. The server may be `flowfast reward-server` (server.py) or anyone's.

POST URL (its path, /score where it has none), Content-Type: application/x-safetensors
    a safetensors file: tensor `images` uint8 (N, 3, H, W), RGB; metadata {"prompts": a JSON list of N texts}
200 {"scores": [N numbers]}, higher is better; null: this image never wins
4xx {"error": why}: it would not help to ask again.  5xx: ask again
"""

from __future__ import annotations

import http.client
import json
import math
import time
from collections.abc import Sequence
from typing import Any
from urllib.parse import urlsplit

from torch import Tensor

from flowfast.errors import OptionError, RewardError
from flowfast.rewards.host import CallableReward
from flowfast.rewards.pixels import to_pixels
from flowfast.rewards.policy import guarded

ONE_LINE = "what a server answers: http:URL, e.g. http://localhost:8000 (`flowfast reward-server` is one)"
CONTENT_TYPE = "application/x-safetensors"
DEADLINE = 60.0
SCORE_BYTES = 64  # of JSON for one score, more than any float takes


class HttpReward(CallableReward):
    """Scores of a server.

    Args:
        url: http or https; path /score where it has none.
        deadline: seconds one batch may take, all tries together; default: the search's reward_deadline, else 60.
        retries: tries after the first one, where the connection fails or the server answers 5xx.
        backoff: seconds before the first of them; each further one waits twice as long.
    """

    def __init__(self, url: str, deadline: float | None = None, retries: int = 4, backoff: float = 0.2) -> None:
        parts = urlsplit(url)
        try:
            port = parts.port
        except ValueError:
            port = -1
        if parts.scheme not in ("http", "https") or not parts.hostname or port == -1:
            raise OptionError(f"reward http: expected a URL such as http://localhost:8000, got {url!r}")
        super().__init__(self.scores, name=url, deadline=deadline)
        self.url, self.host, self.port, self.secure = url, parts.hostname, port, parts.scheme == "https"
        self.path = (parts.path if parts.path not in ("", "/") else "/score") + (f"?{parts.query}" * bool(parts.query))
        self.retries, self.backoff = retries, backoff

    def __call__(self, images: Tensor, prompts: Sequence[str], t: Tensor | None = None) -> Tensor:
        limit = self.deadline or DEADLINE
        return guarded(self.name, lambda: self.scores(images, prompts), len(prompts), limit).cpu()

    def scores(self, images: Tensor, prompts: Sequence[str]) -> list[float]:
        """Scores of images (N, 3, H, W) in [0, 1]. Raises RewardError: no answer, or not one number an image."""
        body = pack(to_pixels(images), prompts)
        limit = self.deadline or DEADLINE
        until = time.monotonic() + limit
        for attempt in range(self.retries + 1):
            try:
                status, answer = self.post(body, until, SCORE_BYTES * len(prompts) + 65536)
            except (OSError, http.client.HTTPException) as error:
                came = f"{type(error).__name__}: {error}"
            else:
                if status < 500:
                    return self.read(status, answer, len(prompts))
                came = f"status {status}: {reason(answer)}"
            wait = self.backoff * 2**attempt
            if attempt == self.retries or time.monotonic() + wait >= until:
                break
            time.sleep(wait)
        if time.monotonic() >= until:
            raise RewardError(f"reward server {self.url} did not answer within {limit:g} s: {came}")
        raise RewardError(
            f"reward server {self.url} failed {attempt + 1} times, at last with {came}; "
            "is it running, and is the address right?"
        )

    def post(self, body: bytes, until: float, most: int) -> tuple[int, bytes]:
        """One try: status, and the answer's first `most` bytes."""
        kind = http.client.HTTPSConnection if self.secure else http.client.HTTPConnection
        connection = kind(self.host, self.port, timeout=max(until - time.monotonic(), 1e-3))
        try:
            connection.request("POST", self.path, body, {"Content-Type": CONTENT_TYPE, "Accept": "application/json"})
            response = connection.getresponse()
            return response.status, response.read(most)
        finally:
            connection.close()

    def read(self, status: int, answer: bytes, count: int) -> list[float]:
        """The scores in an answer. Raises RewardError."""
        if status != 200:
            raise RewardError(f"reward server {self.url} refused the batch: status {status}: {reason(answer)}")
        try:
            found: Any = json.loads(answer)["scores"]
        except (ValueError, KeyError, TypeError, RecursionError):
            found = None
        numbers = (int, float, type(None))
        if not isinstance(found, list) or not all(isinstance(x, numbers) and not isinstance(x, bool) for x in found):
            raise RewardError(
                f'reward server {self.url}: expected {{"scores": [{count} numbers]}}, got {reason(answer)}; '
                "see flowfast/rewards/http.py for the format"
            )
        if len(found) != count:
            raise RewardError(f"reward server {self.url}: expected {count} scores, one an image, got {len(found)}")
        return [math.nan if x is None else float(x) for x in found]


def load(argument: str | None = None) -> HttpReward:
    """argument: the URL; "//host" is what is left of one where "http:" was read as the reward's name."""
    if not argument:
        raise OptionError("reward http: expected a URL, got none; write http://localhost:8000")
    return HttpReward("http:" + argument if argument.startswith("//") else argument)


def pack(pixels: Tensor, prompts: Sequence[str]) -> bytes:
    """The body of a request: pixels (N, 3, H, W) uint8 and N prompts."""
    from safetensors.torch import save

    return save({"images": pixels.contiguous()}, {"prompts": json.dumps(list(prompts))})


def unpack(body: bytes) -> tuple[Tensor, list[str]]:
    """What `pack` packed, as images (N, 3, H, W) float32 in [0, 1] and N prompts. Raises RewardError: what is wrong."""
    from safetensors import SafetensorError
    from safetensors.torch import load as read

    try:
        tensors = read(body)
        header = json.loads(body[8 : 8 + int.from_bytes(body[:8], "little")])
        prompts = json.loads(header.get("__metadata__", {})["prompts"])
    except SafetensorError as error:
        raise RewardError(f"expected a safetensors file, got {len(body)} bytes that are none: {error}") from None
    except (KeyError, ValueError, RecursionError):
        raise RewardError('expected metadata {"prompts": a JSON list of texts} in the safetensors file') from None
    if not isinstance(prompts, list) or not all(isinstance(prompt, str) for prompt in prompts):
        raise RewardError(f"expected prompts to be a JSON list of texts, got {str(prompts)[:80]}")
    if set(tensors) != {"images"}:
        raise RewardError(f"expected one tensor, images, got {', '.join(sorted(tensors)) or 'none'}")
    images = tensors["images"]
    if str(images.dtype) != "torch.uint8" or images.dim() != 4 or images.shape[1] != 3 or 0 in images.shape:
        raise RewardError(f"expected images uint8 (N, 3, H, W), got {images.dtype} {tuple(images.shape)}")
    if len(images) != len(prompts):
        raise RewardError(f"expected one prompt an image, got {len(images)} images and {len(prompts)} prompts")
    return images.float() / 255, prompts


def reason(answer: bytes) -> str:
    """What an answer says, short: the "error" of a JSON object, else its beginning."""
    try:
        found = json.loads(answer)
        text = found["error"] if isinstance(found, dict) and "error" in found else found
    except (ValueError, RecursionError):
        text = answer.decode("utf-8", "replace")
    text = " ".join(str(text).split())
    return (text[:200] + "...") if len(text) > 200 else text or "nothing"
