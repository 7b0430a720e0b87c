"""What a command says to its user when it cannot be done."""

__all__ = ["CommandError", "UsageError", "reason"]


class UsageError(Exception):
    """The user asked for something that cannot be; the text is one line, fit to be shown as it is."""


class CommandError(Exception):
    """The command was understood and cannot be done; the text is one line, fit to be shown as it is."""


def reason(error: OSError) -> str:
    """What to tell a user of an error of the operating system."""
    text = error.strerror or str(error)
    return f"{error.filename}: {text}" if error.filename else text
