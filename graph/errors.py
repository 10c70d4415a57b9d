"""The error tree: every failure that edgepress foresees, with what, where, why and what to do next.

    EdgepressError                 exit 1   (only raised as one of the leaves below)
    ├── UserError                  exit 2   something that was passed in is wrong
    │   ├── ModelError                      the model file or folder
    │   ├── DataError                       calibration, evaluation or input data
    │   ├── TargetError                     a target's name, profile or `--set` override
    │   ├── RecipeError                     a recipe, an option's value, a drift limit
    │   └── OutputError                     the place to write to (exists, full, not writable)
    ├── CheckFailed                exit 3   a limit or check was not met
    │   ├── DriftExceeded                   the drift limit cannot be held
    │   └── VerifyFailed                    a bundle or artifact is not what it says
    ├── Unavailable                exit 4   this cannot be done here or not yet
    │   ├── RuntimeUnavailable              a runtime, extra or device is missing
    │   └── NotSupported                    the request is understood but not supported (yet)
    └── InternalError              exit 1   edgepress broke one of its own invariants

Ctrl-C ends with 130, which is not an error of this tree.
"""

from __future__ import annotations

from typing import ClassVar

EXIT_OK = 0
EXIT_BUG = 1
EXIT_USER = 2
EXIT_CHECK = 3
EXIT_UNAVAILABLE = 4
EXIT_INTERRUPTED = 130


class EdgepressError(Exception):
    """A failure that says what happened, where, why, and what to do next.

    Args:
        what: one sentence, no trailing period needed ("calibration sample has the wrong dtype").
        where: the file, node, tensor or option concerned.
        why: the cause, as far as it is known.
        remedy: the next thing to type or change.
    """

    exit_code: ClassVar[int] = EXIT_BUG

    def __init__(
        self,
        what: str,
        *,
        where: str | None = None,
        why: str | None = None,
        remedy: str | None = None,
    ) -> None:
        super().__init__(what)
        self.what = what
        self.where = where
        self.why = why
        self.remedy = remedy

    def __str__(self) -> str:
        return "\n".join(f"{label}{text}" for label, text in self.lines())

    def lines(self) -> list[tuple[str, str]]:
        """The parts that are present, as (label, text) pairs in reading order."""
        parts = (
            ("", self.what),
            ("  where: ", self.where),
            ("  why:   ", self.why),
            ("  do:    ", self.remedy),
        )
        return [(label, text) for label, text in parts if text]


class UserError(EdgepressError):
    """Something that the user passed in is wrong."""

    exit_code = EXIT_USER


class ModelError(UserError):
    """The model file or folder cannot be used."""


class DataError(UserError):
    """Calibration, evaluation or input data cannot be used."""


class TargetError(UserError):
    """A target's name, profile or override is wrong."""


class RecipeError(UserError):
    """A recipe or an option's value is wrong."""


class OutputError(UserError):
    """The output place cannot be written."""


class CheckFailed(EdgepressError):
    """A limit or a check was not met."""

    exit_code = EXIT_CHECK


class DriftExceeded(CheckFailed):
    """The drift limit cannot be held."""


class VerifyFailed(CheckFailed):
    """A bundle or artifact is not what it says it is."""


class Unavailable(EdgepressError):
    """What was asked for cannot be done here, or not yet."""

    exit_code = EXIT_UNAVAILABLE


class RuntimeUnavailable(Unavailable):
    """A runtime, an optional package or a device is missing."""


class NotSupported(Unavailable):
    """The request is understood, but not supported (yet)."""


class InternalError(EdgepressError):
    """edgepress broke one of its own invariants: a bug."""
