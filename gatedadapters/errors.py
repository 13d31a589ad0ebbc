"""Every error the library raises on purpose.

One base class to catch them all, one class per concern, each also a ``ValueError`` or a ``RuntimeError`` so
that callers who do not know the library still catch what they expect. All messages read alike::

    raise DataError(
        "a label column is missing",
        expected="'label'",
        got="'text', 'y'",
        where="reviews.csv",
        fix="name it with label=",
    )

    # a label column is missing
    #   expected: 'label'
    #   got:      'text', 'y'
    #   where:    reviews.csv
    #   fix:      name it with label=
"""

from __future__ import annotations

__all__ = [
    "ArtifactError",
    "AttachError",
    "BudgetError",
    "ConfigError",
    "DataError",
    "GatedAdaptersError",
    "LayoutError",
    "MaskError",
    "PathError",
    "StudyError",
    "TaskError",
    "TrainingError",
]


class GatedAdaptersError(Exception):
    """Base class of every error raised on purpose; formats the message in one place.

    Args:
        message: What went wrong, in one sentence.
        expected: What would have been right.
        got: What was found instead.
        where: The module, file, line, field or gate concerned, e.g. ``"block 3, ffn.down"``.
        fix: What to do about it.
    """

    def __init__(
        self,
        message: str = "",
        *,
        expected: object = None,
        got: object = None,
        where: object = None,
        fix: object = None,
    ) -> None:
        self.message = message
        self.expected = expected
        self.got = got
        self.where = where
        self.fix = fix
        super().__init__(message)

    def __str__(self) -> str:
        parts = {"expected": self.expected, "got": self.got, "where": self.where, "fix": self.fix}
        details = [f"{name + ':':<9} {value}" for name, value in parts.items() if value is not None]
        return "\n".join([self.message, *(f"  {line}" for line in details)] if self.message else details)


class ConfigError(GatedAdaptersError, ValueError):
    """A configuration or a search-space file does not validate."""


class LayoutError(GatedAdaptersError, ValueError):
    """The backbone's structure could not be discovered."""


class PathError(GatedAdaptersError, ValueError):
    """A path kind is unknown or does not fit the point it was asked for."""


class AttachError(GatedAdaptersError, RuntimeError):
    """Adapters cannot be attached, detached or compacted in the model's present state."""


class TaskError(GatedAdaptersError, ValueError):
    """A task is unknown, or a batch's task ids do not match the tasks attached."""


class DataError(GatedAdaptersError, ValueError):
    """A user's data file or a packaged data set cannot be read."""


class BudgetError(GatedAdaptersError, ValueError):
    """A parameter budget is malformed or cannot be met."""


class ArtifactError(GatedAdaptersError, ValueError):
    """A saved artefact cannot be written, read, merged or exported, or belongs to another backbone."""


class MaskError(GatedAdaptersError, ValueError):
    """Scores, a mask or a sparse delta are malformed, empty, or of another backbone."""


class StudyError(GatedAdaptersError, RuntimeError):
    """A study's storage cannot be reached or used, or holds another study, or nothing to report yet."""


class TrainingError(GatedAdaptersError, RuntimeError):
    """Training was set up in a way that cannot give a correct result."""
