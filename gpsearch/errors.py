"""What a user sees of a mistake: a line that says what is wrong, where, and the mend."""


class UserError(ValueError):
    """A mistake in what the user gave; the command line prints it as one line and exits with 2."""


class Unsupported(UserError):
    """A model that a device or a program cannot take: in a search its trial fails, and no other."""

    def __str__(self) -> str:
        return f"unsupported: {super().__str__()}"


def line_of(error: BaseException) -> str:
    """Return a stranger's error in one line: its kind, and what it says."""
    return " ".join(f"{type(error).__name__}: {error}".split()).rstrip(": ")
