"""Every exception a user can meet, with its exit code, on one page.

A message says what was found, what was expected and what to do. It carries a series key, never a name or a path of
a patient. Anything that is not a `HilumError` is a bug of ours and ends with exit code 1.
"""

EXIT_DONE = 0
EXIT_BUG = 1
EXIT_USAGE = 2
EXIT_INPUT_REFUSED = 3
EXIT_SOME_LEFT_OUT = 4
EXIT_LICENCE = 5
EXIT_WEIGHTS_ABSENT = 6
EXIT_INTERRUPTED = 130
EXIT_TERMINATED = 143


class HilumError(Exception):
    """Base of all errors meant for the user."""

    exit_code = EXIT_INPUT_REFUSED


class UsageError(HilumError):
    """The command or call itself is wrong: unknown name, contradicting arguments, unknown setting."""

    exit_code = EXIT_USAGE


class InputError(HilumError):
    """A file or folder cannot serve as what it was given for."""


class ScanRefused(HilumError):
    """One scan cannot be read with certainty. In a batch it becomes a ledger row, never a crash.

    reason  a code from `hilum.archive.reasons.REASONS`
    detail  the numbers behind it, free of identifiers
    """

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason
        self.detail = detail

    def __reduce__(self) -> tuple[type["ScanRefused"], tuple[str, str]]:
        return ScanRefused, (self.reason, self.detail)  # crosses process borders whole


class GeometryError(HilumError):
    """An operation needs a geometry that the volume does not have."""


class StoreError(HilumError):
    """A store is missing, incomplete, of another version, or does not hold what is asked of it."""


class CheckpointError(HilumError):
    """A run folder or checkpoint does not belong to this recipe, store or version."""


class ContractError(HilumError):
    """A scan breaks the contract of an encoder, or a model folder has none."""


class LicenceError(HilumError):
    """Weights are handed out on request only, and this user's request or token is missing."""

    exit_code = EXIT_LICENCE


class WeightsAbsent(HilumError):
    """Weights are not on this machine, and cannot or may not be fetched now."""

    exit_code = EXIT_WEIGHTS_ABSENT


class LabelsError(HilumError):
    """Labels and features do not fit together."""


class TrainingDiverged(HilumError):
    """The loss stayed non-finite; the last good checkpoint is kept."""


class WorkerDied(HilumError):
    """A process that made training data was ended from outside; the last checkpoint is kept."""


class RankLost(HilumError):
    """Another process of the same run has ended; its own message says why."""


class DiskFull(HilumError):
    """No space left where we write. What was finished before is whole."""


class Interrupted(HilumError):
    """The run was asked to stop and did so after writing a checkpoint."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code
