"""Errors that are the user's to mend: the command lines print them as one message, without a traceback."""


class GitlightError(Exception):
    """A mistake in what the user gave; its message says what, where, what was expected and what to do."""


class ConfigError(GitlightError):
    """A setting is unknown, of the wrong type, or has a value that is not allowed."""


class DataError(GitlightError):
    """Images are missing, unreadable, or do not fit the settings."""


class ArchitectureError(GitlightError):
    """A leaked model contains an operation that the chosen generator cannot handle."""


class CheckpointError(GitlightError):
    """A checkpoint or a run folder is missing, damaged, or belongs to another set-up."""
