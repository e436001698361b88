"""Secrets in the texts of options: what is written in their place, and where their values are.

A configuration never holds a secret, only the name of the variable that has it, so none can get into a file, an error,
a log or an archive. `sealed` takes it out as a text becomes an option, `opened` puts it back where it is used:

| given                                                | written                                   |
|------------------------------------------------------|-------------------------------------------|
| http://user:password@host, or a token as the user    | http://${FLOWFAST_REWARD_LOGIN}@host      |
| http://host?token=..., a name that says so           | ?token=${FLOWFAST_REWARD_QUERY_TOKEN}     |
| http://host while FLOWFAST_REWARD_KEY is set         | http://${FLOWFAST_REWARD_KEY}@host        |
| --model-option token=..., a name that says so        | token: ${FLOWFAST_MODEL_TOKEN}            |

${NAME} means what was given in this process, else the environment variable NAME, else what is in the file that
NAME_FILE names. A second value in the place of a first one is NAME_2. Only names that begin with FLOWFAST_ are looked
up, so that somebody else's config.yaml cannot send other variables to its server.
"""

from __future__ import annotations

import base64
import os
import re
from itertools import count
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote, unquote_plus

from flowfast.errors import OptionError

KEY = "FLOWFAST_REWARD_KEY"
"""The key of reward servers, sent as Authorization: Bearer."""
GIVEN: dict[str, Any] = {}
"""Secrets that stood in options of this process, by the names that are written for them."""
_looked_up: set[str] = set()  # those of the environment that were used

_REFERENCE = re.compile(r"\$\{(FLOWFAST_\w+)\}")
_LOGIN = re.compile(r"(https?://)([^/?#]+)@", re.IGNORECASE)
_NO_LOGIN = re.compile(r"(https?://)(?![^/?#]*@)", re.IGNORECASE)
_BY_NAME = re.compile(r"(?:[^:]*:)?\$\{FLOWFAST_\w+\}")  # a login that is a reference, or has one as its password
# A value of a query ends where the next one begins, or, in a sum of rewards, with a weight or the next reward's name.
_END = r"(?=[&;#\s]|\*[-+.\de]+(?:\+|$)|\+[a-z]+(?:[:*+\s]|$)|$)"
_QUERY = re.compile(r"([?&;#])([\w.-]+)=([^&;#\s]+?)" + _END)
_WORDS = {"token", "key", "apikey", "secret", "password", "passphrase", "passwd", "pass", "pwd", "pw", "auth"}
_WORDS |= {"authorization", "bearer", "jwt", "sig", "signature", "credential", "credentials", "sas"}
_ENDINGS = ("token", "secret", "password", "apikey")


def forget() -> None:
    """Begins anew, as a new process does."""
    GIVEN.clear()
    _looked_up.clear()


def is_secret(name: str) -> bool:
    """Whether an option of that name ("token", "apiKey", "X-Amz-Signature") has a secret for its value."""
    words = [word.lower() for word in re.findall(r"[A-Z]?[a-z\d]+|[A-Z\d]+", name)]
    return any(word in _WORDS or word.endswith(_ENDINGS) for word in words)


def sealed(text: str, kind: str = "REWARD") -> str:
    """A text without the secrets of its URLs. kind: REWARD or MODEL, of the names that stand for them."""

    def login(found: re.Match[str]) -> str:
        if _BY_NAME.fullmatch(found[2]):
            return found[0]
        return f"{found[1]}{_remember(f'FLOWFAST_{kind}_LOGIN', unquote(found[2]))}@"

    def query(found: re.Match[str]) -> str:
        if not (is_secret(found[2]) or found[2].lower() == "code") or _REFERENCE.fullmatch(found[3]):
            return found[0]
        return f"{found[1]}{found[2]}={_remember(_variable(f'{kind}_QUERY', found[2]), unquote_plus(found[3]))}"

    text = _LOGIN.sub(login, text)
    if "://" in text:
        text = _QUERY.sub(query, text)
    if kind == "REWARD" and _NO_LOGIN.search(text) and value_of(KEY) is not None:
        text = _NO_LOGIN.sub(rf"\1${{{KEY}}}@", text)
    return text


def sealed_options(value: Any, name: str = "") -> Any:
    """Options of a model, however deep, without their secrets."""
    if isinstance(value, dict):
        inner = is_secret(name) and not any(is_secret(str(key)) for key in value)  # {"token": {"value": ...}}
        return {key: sealed_options(entry, name if inner else str(key)) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        entries = [sealed_options(entry, name) for entry in value]
        return entries if isinstance(value, list) else tuple(entries)
    if isinstance(value, str | int | float) and not isinstance(value, bool) and is_secret(name) and value != "":
        by_name = isinstance(value, str) and _REFERENCE.fullmatch(value)
        return value if by_name else _remember(_variable("MODEL", name), value)
    return sealed(value, "MODEL") if isinstance(value, str) else value


def opened(text: str, quoted: bool = False) -> str:
    """A text with the values of its references. quoted: for the query of a URL. Raises OptionError: one has none."""
    return _REFERENCE.sub(lambda found: quote(str(_look_up(found[1])), "") if quoted else str(_look_up(found[1])), text)


def opened_options(value: Any) -> Any:
    """The same for options of a model, however deep."""
    if isinstance(value, dict):
        return {key: opened_options(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        entries = [opened_options(entry) for entry in value]
        return entries if isinstance(value, list) else tuple(entries)
    if not isinstance(value, str):
        return value
    alone = _REFERENCE.fullmatch(value)
    return _look_up(alone[1]) if alone else opened(value)


def named_in(value: Any) -> dict[str, Any]:
    """The secrets that a configuration names, however deep, by name: for another process, which does not have them.
    Raises OptionError: one has no value."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple):
        return {name: secret for entry in value for name, secret in named_in(entry).items()}
    names = _REFERENCE.findall(value) if isinstance(value, str) else []
    return {name: _look_up(name) for name in names}


def without_login(text: str) -> str:
    """A text with URLs as they may be shown: without logins and keys, and *** for secrets of a query."""
    return _REFERENCE.sub("***", _LOGIN.sub(r"\1", sealed(text)))


def hidden(text: str) -> str:
    """A text from elsewhere, such as a server's answer, without the secrets that are known."""
    forms: set[str] = set()
    for value in {*map(str, GIVEN.values()), *_looked_up}:
        password = value.partition(":")[2]
        forms |= {value, password, base64.b64encode(value.encode()).decode()}
    forms |= {quote(form, "") for form in forms}
    for form in sorted((form for form in forms if len(form) > 3), key=len, reverse=True):
        text = text.replace(form, "***")
    return text


def value_of(name: str) -> Any:
    """The secret of that name; None: there is none. Raises OptionError: the file of NAME_FILE cannot be read, or is
    empty."""
    if name in GIVEN:
        return GIVEN[name]
    file = os.environ.get(name + "_FILE")
    value = os.environ.get(name, "").strip("\r\n")
    if value or not file:
        return value or None
    try:
        found = Path(file).read_text(encoding="utf-8-sig").strip()
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is no text"
        raise OptionError(f"cannot read {file}, which {name}_FILE names: {why}") from None
    if not found:  # a server without a key would let everybody in
        raise OptionError(f"{file}, which {name}_FILE names, is empty: write the secret there, or unset {name}_FILE")
    return found


def _look_up(name: str) -> Any:
    value = value_of(name)
    if value is None:
        raise OptionError(
            f"expected a secret in the environment variable {name}, or in the file that {name}_FILE names, got "
            "neither: set it to what was given in that place"
        )
    _looked_up.add(str(value))
    return value


def _remember(name: str, value: Any) -> str:
    """The reference to a secret that was given: ${NAME}, or ${NAME_2} where NAME is another one."""
    for number in count(1):
        variable = name if number == 1 else f"{name}_{number}"
        known = value_of(variable)
        if known is None or str(known) == str(value):
            GIVEN[variable] = value
            return f"${{{variable}}}"
    raise AssertionError


def _variable(kind: str, name: str) -> str:
    return f"FLOWFAST_{kind}_{re.sub(r'[^A-Z0-9]+', '_', name.upper()).strip('_')}"
