"""Every error that the library raises on purpose.

There is one base class to catch them all, and one class per concern. Each is also a ``ValueError``, a ``RuntimeError``
or an ``OSError``, so that callers who do not know the library catch it too. Messages show no passwords and no tokens
(`redaction.redacted`). All have the same parts::

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

from gatedadapters.redaction import redacted

__all__ = [
    "ArtifactError",
    "AttachError",
    "BudgetError",
    "ConfigError",
    "DataError",
    "FileAccessError",
    "GatedAdaptersError",
    "LayoutError",
    "MaskError",
    "PathError",
    "StudyError",
    "TaskError",
    "TrainingError",
]


class GatedAdaptersError(Exception):
    """Base class of every error raised on purpose; it formats the message.

    Args:
        message: What went wrong, in one sentence.
        expected: The value or state that would have been right.
        got: The value or state that was found.
        where: The module, file, line, field or gate concerned, such as ``"block 3, ffn.down"``.
        fix: What the user can do about it.
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
        self.message = redacted(message)
        self.expected, self.got, self.where, self.fix = map(_without_secrets, (expected, got, where, fix))
        super().__init__(self.message)

    def __str__(self) -> str:
        parts = {"expected": self.expected, "got": self.got, "where": self.where, "fix": self.fix}
        details = [redacted(f"{name + ':':<9} {value}") for name, value in parts.items() if value is not None]
        return "\n".join([self.message, *(f"  {line}" for line in details)] if self.message else details)


def _without_secrets(value: object) -> object:
    return redacted(value) if isinstance(value, str) else value


class ConfigError(GatedAdaptersError, ValueError):
    """A configuration or a search-space file does not validate."""


class LayoutError(GatedAdaptersError, ValueError):
    """The layout of the backbone cannot be discovered, or lacks what was asked for."""


class PathError(GatedAdaptersError, ValueError):
    """A path kind is unknown, does not fit its point, or cannot do what was asked of it."""


class AttachError(GatedAdaptersError, RuntimeError):
    """Adapters or a sparse delta cannot be attached, detached or changed in the model's present state."""


class TaskError(GatedAdaptersError, ValueError):
    """A task is unknown, or a batch's task ids do not match the tasks attached."""


class DataError(GatedAdaptersError, ValueError):
    """A user's data file or a packaged data set cannot be read."""


class FileAccessError(GatedAdaptersError, OSError):
    """The file system refuses: a disk is full, a folder cannot be written, a file cannot be read."""


class BudgetError(GatedAdaptersError, ValueError):
    """A parameter budget is malformed or cannot be met."""


class ArtifactError(GatedAdaptersError, ValueError):
    """A saved artefact cannot be written, read, merged or exported, or belongs to another backbone."""


class MaskError(GatedAdaptersError, ValueError):
    """Scores, a mask or a sparse delta are malformed, empty, or of another backbone."""


class StudyError(GatedAdaptersError, RuntimeError):
    """A study's storage cannot be used, holds another study, or holds nothing to report yet."""


class AllocationError(GatedAdaptersError, ValueError):
    """A placement score is unknown, found nothing to judge by, or gave numbers that cannot be ranked."""


class TrainingError(GatedAdaptersError, RuntimeError):
    """Training was set up in a way that cannot give a correct result."""
