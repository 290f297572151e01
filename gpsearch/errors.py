"""The one exception a user sees: a line that says what is wrong, where, and the mend."""


class UserError(ValueError):
    """A mistake in what the user gave; the command line prints it as one line and exits with 2."""
