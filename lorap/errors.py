"""The kinds of failure that a user meets; everything else is a defect of lorap."""


class LorapError(Exception):
    """A failure that the user can act on. The command line prints it and exits with status 1."""


class UsageError(LorapError):
    """An argument, option, path or file that cannot be used. The command line exits with 2."""


class ResumableError(LorapError):
    """A failure of what is around the run: what it had finished is as good as before."""


class LostProcessError(ResumableError):
    """Another process of the run has failed or died."""


class Interrupted(KeyboardInterrupt):
    """A run that was told to end by a signal; notes on it say what it has left.

    Parameters
    ----------
    number : int
        Of the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


def first_line(error: BaseException) -> str:
    """Return what an error says, without the paragraphs of advice that libraries append."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
