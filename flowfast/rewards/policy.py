"""What happens when a reward misbehaves: one policy for every reward, wherever it runs.

| it ...                          | then                                                                   |
|---------------------------------|------------------------------------------------------------------------|
| raises, or calls sys.exit       | RewardError with its name, the exception is the cause                  |
| runs out of memory              | the search tries again with fewer images (engine.search)               |
| does not answer by the deadline | RewardError with its name and the deadline; the call is left behind    |
| returns the wrong shape or type | RewardError: what was expected, what came                              |
| returns NaN                     | that candidate counts as -inf: it never wins (result.nan_rewards)      |
| returns -inf, +inf              | it never wins; it wins, for +inf is a number that is larger than all   |
| meets an image that is not      | as if it had returned NaN, whatever it says; on the host it is not     |
| finite                          | called for it                                                          |

An answer is N real numbers, one an image, in a tensor on any device, an array, or a list or tuple of numbers or of
tensors of one number; integers will do. True, "0.5", None, complex numbers, a dict, a generator, a coroutine, a pair
(scores, something) and a column (N, 1) are refused by name. Numbers beyond float32 are infinite, and a
masked number of an array is NaN.

A deadline is for one call, which has a bounded number of images (host.py). In a weighted sum it is for all members
together. Results that were handed out before stay: a failing reward ends the search, not what is on disk.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flowfast.errors import FlowfastError, RewardError
from flowfast.models.answers import unusual


def guarded(name: str, call: Callable[[], Any], count: int, deadline: float | None = None) -> Tensor:
    """The scores (count,) float32 that `call` returns, as a tensor on the device it chose; NaN is left for the search.

    Args:
        name: of the reward, for the error.
        call: the reward on one batch; may return a tensor, an array or a list of numbers.
        deadline: seconds the call may take; None: no limit. A call that hangs keeps its (daemon) thread.

    Raises:
        RewardError: see the table above. Other errors of flowfast and torch.OutOfMemoryError pass through.
    """
    try:
        answer = call() if deadline is None else _within(name, call, deadline)
    except (FlowfastError, torch.OutOfMemoryError):
        raise
    except (Exception, SystemExit) as error:
        raise RewardError(
            f"reward {name!r} raised {type(error).__name__}: {error}; mend it or choose another reward"
        ) from error
    return checked(name, answer, count)


def checked(name: str, answer: Any, count: int) -> Tensor:
    """`answer` as scores (count,) float32. Looks at shape and type only, never at values, so a device does not wait.

    Raises:
        RewardError: it is not one real number an image.
    """
    came = type(answer).__name__
    if isinstance(answer, list | tuple) and any(isinstance(entry, Tensor) for entry in answer):
        answer = _joined(answer)
    if isinstance(answer, Tensor):
        came = f"a tensor of {answer.dtype}" + (f", {unusual(answer)}" if unusual(answer) else "")
        right = not (answer.dtype is torch.bool or answer.is_complex() or unusual(answer))
    else:
        try:
            array = np.ma.asanyarray(answer)
        except Exception:  # a ragged list, or entries that no array can hold
            array = np.asarray(None)
        mixed = isinstance(answer, list | tuple) and any(isinstance(entry, bool | np.bool_) for entry in answer)
        came = f"{came} of {'bool' if mixed else array.dtype}"
        right = array.dtype.kind in "fiu" and not mixed
        if right:
            with np.errstate(over="ignore"):
                answer = torch.from_numpy(array.astype(np.float32).filled(np.nan))  # masked: it has no score
    if not right:
        raise RewardError(
            f"reward {name!r}: expected {count} real numbers, one an image, got {came}; return a list, an array or a "
            "tensor of numbers, NaN for an image without a score"
        )
    if tuple(answer.shape) != (count,):
        raise RewardError(
            f"reward {name!r}: expected shape ({count},), one score an image, got {tuple(answer.shape)}; "
            "return one number for each image of the batch"
        )
    return answer.to(torch.float32)


def _joined(entries: Sequence[Any]) -> Any:
    """A list of tensors as one tensor, on the host; as it is where that is no list of single numbers."""
    try:
        return torch.stack([torch.as_tensor(entry).detach().cpu().reshape(()) for entry in entries])
    except (RuntimeError, TypeError, ValueError):
        return entries


def _within(name: str, call: Callable[[], Any], deadline: float) -> Any:
    """`call` on a thread of its own, waited for `deadline` seconds."""
    answer: list[Any] = []
    failure: list[BaseException] = []
    grad = torch.is_grad_enabled()  # autograd's switch belongs to a thread

    def work() -> None:
        try:
            with torch.set_grad_enabled(grad):
                answer.append(call())
        except BaseException as error:
            failure.append(error)

    thread = threading.Thread(target=work, name=f"reward {name}", daemon=True)
    thread.start()
    thread.join(deadline)
    if failure:
        raise failure[0]
    if not answer:
        raise RewardError(
            f"reward {name!r} did not answer within {deadline:g} s; mend it or raise the deadline (reward_deadline)"
        )
    return answer[0]
