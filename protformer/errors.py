"""What goes wrong through no fault of the program, each kind with its exit code.

Whoever raises one of these says in one line what was wrong, where (file, record, position), what is allowed and what to
do. The command line prints it behind `error: ` without a traceback.
"""


class ProtformerError(Exception):
    """A user's mistake or a condition of the machine; the message is one line for the user."""

    exit_code = 1


class InputError(ProtformerError):
    """A sequence file, table or other input breaks its format."""


class ConfigError(ProtformerError):
    """A configuration has an unknown field, a wrong type, or a value that cannot be honoured."""


class ModelFolderError(ProtformerError):
    """A model folder is missing, incomplete, made with another alphabet, or newer than this program."""


class OutputError(ProtformerError):
    """An output exists already, or cannot be written."""


class LostRankError(ProtformerError):
    """Another process of this job has died, or does not answer."""


class InterruptedRunError(ProtformerError):
    """The user or the scheduler stopped a run; its state was saved."""

    exit_code = 130
