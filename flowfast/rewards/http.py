"""A reward that a server computes: `http:URL`. The server may be `flowfast reward-server` (server.py) or anyone's.

POST URL (its path, /score where it has none), Content-Type: application/x-safetensors
    a safetensors file: tensor `images` uint8 (N, 3, H, W), RGB; metadata {"prompts": a JSON list of N texts}. Where a
    prompt has fields (flowfast/prompts/fields.py) also {"fields": a JSON list of N objects, e.g. {"counts": [3, 1]},
    "faults": the same, why a field could not be read}, which a server may leave alone
200 {"scores": [N numbers]}, higher is better; null, NaN: this image never wins
413: fewer images at once.  408, 425, 429, 5xx: ask again, after Retry-After (seconds or a date) where there is one
301, 302, 307, 308: ask there, with the same request.  Another status, {"error": why}: it would not help to ask again

Authorization: Basic for http://user:password@host, Bearer for the key in FLOWFAST_REWARD_KEY, or in the file that
FLOWFAST_REWARD_KEY_FILE names. It goes to the host of the URL only, and stands in no text (flowfast/secrets.py).
"""

from __future__ import annotations

import base64
import http.client
import json
import math
import re
import time
import zlib
from collections.abc import Sequence
from datetime import UTC
from email.utils import parsedate_to_datetime
from functools import partial
from typing import Any, NamedTuple
from urllib.parse import quote, unquote, urljoin, urlsplit

import torch
from torch import Tensor

from flowfast import secrets
from flowfast.errors import OptionError, PromptError, RewardError
from flowfast.prompts.fields import fields_of, make_prompt
from flowfast.rewards.host import MOST_IMAGES, CallableReward
from flowfast.rewards.pixels import to_pixels
from flowfast.rewards.policy import guarded

ONE_LINE = "what a server answers: http:URL, e.g. http://localhost:8000 (`flowfast reward-server` is one)"
CONTENT_TYPE = "application/x-safetensors"
DEADLINE = 60.0
HEADER_BYTES = 8 * 2**20  # of a request, its prompts
SCORE_BYTES = 64  # of JSON for one score, more than any float takes
MOST_REDIRECTS = 5
REDIRECTS = (301, 302, 307, 308)
AGAIN = (408, 425, 429)  # and 5xx


class Target(NamedTuple):
    """Where a request goes."""

    secure: bool
    host: str
    port: int
    path: str
    authorization: str | None

    @property
    def origin(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http{'s' * self.secure}://{host}:{self.port}"


class TooLarge(RewardError):
    """The server takes no request of that size."""


class HttpReward(CallableReward):
    """Scores of a server.

    Args:
        url: http or https; path /score where it has none.
        deadline: seconds one request may take, all tries together; default: the search's reward_deadline, else 60.
        retries: tries after the first one, where the connection fails or the server says that it cannot answer now. A
            server that says when to ask again is asked again until the deadline.
        backoff: seconds before the first of them; each further one waits twice as long.

    Raises:
        OptionError: no URL, or one that names a secret which is not there.
    """

    def __init__(self, url: str, deadline: float | None = None, retries: int = 4, backoff: float = 0.2) -> None:
        if retries < 0 or not 0 <= backoff < math.inf:
            raise OptionError(f"reward http: expected retries and backoff of 0 or more, got {retries} and {backoff}")
        url = secrets.sealed(url)
        self.url = secrets.without_login(url)
        super().__init__(self.scores, name=self.url, deadline=deadline)
        try:
            parts = urlsplit(url)
            login, _, host = parts.netloc.rpartition("@")
            bare = secrets.opened(parts._replace(netloc=host).geturl(), quoted=True)
            self.target = target_of(bare)._replace(authorization=authorization_of(login))
        except OptionError:
            raise
        except ValueError:  # also of urlsplit, and names that are no host's
            shown = self.url.rpartition("@")[2]  # before it a password may stand
            quote = "; in a login write / ? # as %2F %3F %23" if "@" in self.url else ""
            raise OptionError(
                f"reward http: expected a URL such as http://localhost:8000, got {shown!r}{quote}"
            ) from None
        self.retries, self.backoff = retries, backoff
        self.most = MOST_IMAGES  # that the server was seen to take at once
        self.idle: dict[str, http.client.HTTPConnection] = {}  # kept open, by origin

    def score(self, images: Tensor, prompts: list[str], t: Tensor | None, deadline: float | None) -> Tensor:
        """Scores (N,), in as many requests as the server makes necessary; each has the whole deadline."""
        limit, start, found = deadline or DEADLINE, 0, []
        while start < len(prompts):
            part = slice(start, start + self.most)
            asked, texts = images[part], prompts[part]
            try:
                found.append(guarded(self.name, partial(self.scores, asked, texts, limit), len(texts), limit).cpu())
            except TooLarge:
                if len(texts) == 1:
                    raise
                self.most = len(texts) // 2
            else:
                start += len(texts)
        return torch.cat(found)

    def scores(self, images: Tensor, prompts: Sequence[str], limit: float = DEADLINE) -> list[float]:
        """Scores of images (N, 3, H, W) in [0, 1] by one request. Raises RewardError: no answer within `limit` seconds,
        or not one number an image."""
        body, until, tries = pack(to_pixels(images), prompts), time.monotonic() + limit, 0
        while True:
            asked_for = None
            try:
                status, headers, answer = self.post(body, until, SCORE_BYTES * len(prompts) + 65536)
            except (OSError, http.client.HTTPException) as error:
                came = f"{type(error).__name__}: {error}"
            else:
                if status not in AGAIN and status < 500:
                    return self.read(status, answer, len(prompts))
                came = f"status {status}: {reason(answer)}"
                asked_for = seconds_of(headers.get("Retry-After"))
            tries += asked_for is None
            wait = self.backoff * 2 ** max(tries - 1, 0) if asked_for is None else max(asked_for, self.backoff)
            if tries > self.retries:
                raise self.error(f"failed {tries} times, at last with {came}; is it running, and is the address right?")
            if time.monotonic() + wait >= until:
                raise self.error(f"did not answer within {limit:g} s: {came}")
            time.sleep(wait)

    def post(self, body: bytes, until: float, most: int) -> tuple[int, http.client.HTTPMessage, bytes]:
        """One try, wherever the server sends it: status, headers, and the answer's first `most` bytes."""
        target = self.target
        for _ in range(MOST_REDIRECTS + 1):
            status, headers, answer = self.ask(target, body, until, most)
            place = headers.get("Location")
            if status not in REDIRECTS or not place:
                return status, headers, answer
            try:
                there = target_of(urljoin(target.origin + target.path, place), path="/")
            except ValueError:
                raise self.error(f"sent the request to an address that cannot be, with status {status}") from None
            target = there
            if there.origin == self.target.origin:
                target = there._replace(authorization=self.target.authorization)
        raise self.error(f"sent the request on {MOST_REDIRECTS + 1} times; give the address where it ends")

    def ask(self, target: Target, body: bytes, until: float, most: int) -> tuple[int, http.client.HTTPMessage, bytes]:
        """One request and its answer, over the connection that is open or a new one."""
        kept = self.idle.pop(target.origin, None)
        if kept:
            try:
                return self.exchange(kept, target, body, until, most)
            except ConnectionError:  # the server had closed it in the meantime
                pass
        kind = http.client.HTTPSConnection if target.secure else http.client.HTTPConnection
        return self.exchange(kind(target.host, target.port), target, body, until, most)

    def exchange(
        self, connection: http.client.HTTPConnection, target: Target, body: bytes, until: float, most: int
    ) -> tuple[int, http.client.HTTPMessage, bytes]:
        connection.timeout = max(until - time.monotonic(), 1e-3)
        if connection.sock:
            connection.sock.settimeout(connection.timeout)
        headers = {"Content-Type": CONTENT_TYPE, "Accept": "application/json"}
        if target.authorization:
            headers["Authorization"] = target.authorization
        keep = False
        try:
            try:
                connection.request("POST", target.path, body, headers)
            except (BrokenPipeError, ConnectionResetError):
                if connection.sock is None:
                    raise
                # It answered before it had read all, with a refusal: that may be there to read.
            response = connection.getresponse()
            answer = response.read(most)
            if response.length and len(answer) < most:  # read(most) is silent about a connection that was cut
                raise http.client.IncompleteRead(answer, response.length)
            answer = unzipped(answer, response.headers.get("Content-Encoding", ""), most)
            keep = response.isclosed() and not response.will_close
            return response.status, response.headers, answer
        finally:
            if keep:
                self.idle[target.origin] = connection
            else:
                connection.close()

    def read(self, status: int, answer: bytes, count: int) -> list[float]:
        """The scores in an answer. Raises RewardError."""
        if status == 413:
            raise self.error(f"refused {count} images at once: status {status}: {reason(answer)}", TooLarge)
        if status in (401, 403):
            how = f"set {secrets.KEY}, or write http://user:password@host"
            raise self.error(f"refused the batch: status {status}: {reason(answer)}; {how}")
        if status != 200:
            raise self.error(f"refused the batch: status {status}: {reason(answer)}")
        try:
            found: Any = json.loads(answer)["scores"]
        except (ValueError, KeyError, TypeError, RecursionError):
            found = None
        numbers = (int, float, type(None))
        if not isinstance(found, list) or not all(isinstance(x, numbers) and not isinstance(x, bool) for x in found):
            raise self.error(
                f'expected {{"scores": [{count} numbers]}}, got {reason(answer)}; see flowfast/rewards/http.py for the '
                "format"
            )
        if len(found) != count:
            raise self.error(f"expected {count} scores, one an image, got {len(found)}")
        return [number_of(x) for x in found]

    def error(self, text: str, kind: type[RewardError] = RewardError) -> RewardError:
        text = secrets.hidden(f"reward server {self.url} {' '.join(text.split())}")
        return kind("".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in text))


def load(argument: str | None = None) -> HttpReward:
    """argument: the URL; "//host" is what is left of one where "http:" was read as the reward's name."""
    if not argument:
        raise OptionError("reward http: expected a URL, got none; write http://localhost:8000")
    return HttpReward("http:" + argument if argument.startswith("//") else argument)


def target_of(url: str, path: str = "/score") -> Target:
    """The target of a URL, without authorization; path: where it has none. Raises ValueError."""
    parts = urlsplit(url)
    port = parts.port
    if parts.scheme not in ("http", "https") or not parts.hostname or port == 0:
        raise ValueError(url)
    if ":" not in parts.hostname:
        parts.hostname.encode("idna")
    secure = parts.scheme == "https"
    path = parts.path if parts.path not in ("", "/") else path
    safe = "%/:@!$&'()*+,;=~?"  # what is quoted stays, what cannot be in a request line is quoted
    where = quote(path, safe) + f"?{quote(parts.query, safe)}" * bool(parts.query)
    return Target(secure, parts.hostname, port or (443 if secure else 80), where, None)


def authorization_of(login: str) -> str | None:
    """The header for what stands before the @ of a URL. Raises OptionError: a key that no header can hold."""
    if not login:
        return None
    value = secrets.opened(unquote(login))
    if login != f"${{{secrets.KEY}}}":
        return "Basic " + base64.b64encode((value if ":" in value else value + ":").encode()).decode()
    if not (value.isascii() and value.isprintable()) or " " in value:
        raise OptionError(f"{secrets.KEY}: expected printable ASCII characters without spaces, got others")
    return "Bearer " + value


def seconds_of(retry_after: str | None) -> float | None:
    """Seconds of a Retry-After, a number or a date; None: there is none that can be read."""
    if re.fullmatch(r"\s*[+-]?[0-9]+\s*", retry_after or ""):
        return max(0.0, float(retry_after or ""))
    try:
        date = parsedate_to_datetime(retry_after or "")
        return max(0.0, (date if date.tzinfo else date.replace(tzinfo=UTC)).timestamp() - time.time())
    except (ValueError, OverflowError):
        return None


def unzipped(answer: bytes, encoding: str, most: int) -> bytes:
    """An answer as it was before gzip or deflate, which nobody asked for: at most `most` bytes of it."""
    if encoding.lower() not in ("gzip", "x-gzip", "deflate"):
        return answer
    try:
        return zlib.decompressobj(wbits=47).decompress(answer, most)  # 47: either, told by its beginning
    except zlib.error:
        return answer


def number_of(score: float | None) -> float:
    """A score of an answer; null is NaN, and an integer beyond every float infinite."""
    try:
        return math.nan if score is None else float(score)
    except OverflowError:
        return math.inf if score and score > 0 else -math.inf


def pack(pixels: Tensor, prompts: Sequence[str]) -> bytes:
    """The body of a request: pixels (N, 3, H, W) uint8 and N prompts, with what their rewards may read beside them."""
    from safetensors.torch import save

    fields = [{name: value for name, value in fields_of(prompt).items() if name != "seed"} for prompt in prompts]
    faults = [getattr(prompt, "faults", {}) for prompt in prompts]
    beside = {"fields": fields, "faults": faults} if any(fields) or any(faults) else {}
    metadata = {"prompts": list(prompts), **beside}
    return save({"images": pixels.contiguous()}, {name: json.dumps(value) for name, value in metadata.items()})


def unpack(body: bytes | bytearray) -> tuple[Tensor, list[str]]:
    """What `pack` packed, as pixels (N, 3, H, W) uint8, which share the memory of a bytearray, and N prompts with
    their fields.

    Raises RewardError: what is wrong; TooLarge: the prompts are."""
    size = int.from_bytes(body[:8], "little")
    start = 8 + size
    if len(body) < start or not body:
        raise RewardError(f"expected a safetensors file, got {len(body)} bytes that are none")
    if size > HEADER_BYTES:
        raise TooLarge(f"expected prompts of at most {HEADER_BYTES} bytes together, got {size}; send fewer at once")
    try:
        header = json.loads(bytes(body[8:start]))
        tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
    except (AttributeError, ValueError, RecursionError):
        raise RewardError(f"expected a safetensors file, got {len(body)} bytes that are none") from None
    try:
        prompts = json.loads(header["__metadata__"]["prompts"])
    except (KeyError, TypeError, ValueError, RecursionError):
        raise RewardError('expected metadata {"prompts": a JSON list of texts} in the safetensors file') from None
    if not isinstance(prompts, list) or not all(isinstance(prompt, str) for prompt in prompts):
        raise RewardError(f"expected prompts to be a JSON list of texts, got {str(prompts)[:80]}")
    if set(tensors) != {"images"} or not isinstance(tensors["images"], dict):
        raise RewardError(f"expected one tensor, images, got {', '.join(sorted(tensors))[:80] or 'none'}")
    about: dict[str, Any] = tensors["images"]
    kind, shape, place = about.get("dtype"), about.get("shape", ()), about.get("data_offsets", ())
    whole = isinstance(shape, list) and len(shape) == 4 and all(type(n) is int and n > 0 for n in shape)
    if kind != "U8" or not whole or shape[1] != 3:
        raise RewardError(f"expected images uint8 (N, 3, H, W), got {str(kind)[:80]} {str(shape)[:80]}")
    if place != [0, math.prod(shape)] or len(body) != start + place[1]:
        raise RewardError(f"expected a safetensors file, got {len(body)} bytes that are none: images do not fill them")
    if shape[0] != len(prompts):
        raise RewardError(f"expected one prompt an image, got {shape[0]} images and {len(prompts)} prompts")
    prompts = with_fields(prompts, header["__metadata__"])
    owned = body if isinstance(body, bytearray) else bytearray(body)
    return torch.frombuffer(owned, dtype=torch.uint8, offset=start).view(shape), prompts


def with_fields(prompts: list[str], metadata: dict[str, Any]) -> list[str]:
    """The prompts of a request with their fields. Raises RewardError."""
    found: dict[str, list[dict[str, Any]]] = {}
    for name in ("fields", "faults"):
        try:
            entries = json.loads(metadata.get(name, "null")) or [{}] * len(prompts)
        except (TypeError, ValueError, RecursionError):
            entries = None
        if not isinstance(entries, list) or [type(entry) for entry in entries] != [dict] * len(prompts):
            raise RewardError(f"expected {name} to be a JSON list of {len(prompts)} objects, one a prompt")
        found[name] = entries
    rows = enumerate(zip(prompts, found["fields"], found["faults"], strict=True), 1)
    try:
        return [make_prompt(text, fields, f"prompt {row}", faults) for row, (text, fields, faults) in rows]
    except PromptError as error:  # a seed that is none
        raise RewardError(str(error)) from None


def reason(answer: bytes) -> str:
    """What an answer says, short: the "error" of a JSON object, else its beginning."""
    try:
        found = json.loads(answer)
        text = found["error"] if isinstance(found, dict) and "error" in found else found
    except (ValueError, RecursionError):
        text = answer.decode("utf-8", "replace")
    text = " ".join(secrets.hidden(str(text)).split())  # before a cut could leave half of one
    return (text[:200] + "...") if len(text) > 200 else text or "nothing"
