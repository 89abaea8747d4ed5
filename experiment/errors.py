"""The two ways in which a command ends that are nobody's bug."""


class UserError(ValueError):
    """A mistake of the user's: bad input, a bad config, a missing file.

    The message stands alone: it names the file, line or field, the value found and what was expected. `deepcloze`
    prints it to stderr without a trace and exits 2.
    """


class StoppedError(Exception):
    """The run was stopped early but can be resumed (signal, STOP file, time of a queue). `deepcloze` exits 75."""
