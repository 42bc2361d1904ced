"""The kinds of failure that a user meets; everything else is a defect of lorap."""


class LorapError(Exception):
    """A failure that the user can act on. The command line prints it and exits with status 1."""


class UsageError(LorapError):
    """An argument, option, path or file that cannot be used. The command line exits with 2."""


class Interrupted(KeyboardInterrupt):
    """A run that a signal ended, and that has something to say about it.

    Parameters
    ----------
    message : str
    number : int
        Of the signal.
    """

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.number = number


def first_line(error: BaseException) -> str:
    """Return what an error says, without the paragraphs of advice that libraries append."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
