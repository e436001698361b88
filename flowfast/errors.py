"""Every error that a user can cause. Each says in one sentence what was expected, what came and what to do."""

from __future__ import annotations


class FlowfastError(ValueError):
    """Base of all errors that flowfast raises on purpose; the command line turns it into one line and exit code 2."""


class OptionError(FlowfastError):
    """An option is unknown or has a value that cannot work."""


class PromptError(FlowfastError):
    """A prompt is empty or cannot be parsed by the model."""


class BudgetError(FlowfastError):
    """The budget is below what the method needs."""


class RewardError(FlowfastError):
    """A reward raised, hung past its deadline or returned the wrong shape."""


class ModelError(FlowfastError):
    """The model returned something unusable (wrong shape, NaN for every particle)."""


class WeightError(FlowfastError):
    """A weight file is missing or damaged."""


class OutputError(FlowfastError):
    """A result cannot be written where it was asked for."""


class ArchiveError(FlowfastError):
    """An archive is missing, damaged, foreign or of another version."""


class AbortedError(FlowfastError):
    """A request was taken back before its end."""


class QueueFullError(FlowfastError):
    """As many requests wait as may."""


class DeadlineError(FlowfastError):
    """A request cannot end within its deadline, or waited beyond it."""

    def __init__(self, message: str, seconds: float | None = None):
        """seconds: that it would take from its arrival at least; None: nobody knows."""
        super().__init__(message)
        self.seconds = seconds


class EngineDeadError(FlowfastError):
    """An engine was closed, or died of a fault that no request owns."""
