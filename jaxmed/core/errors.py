"""The one exception whose text is written for the person at the keyboard."""


class UserError(Exception):
    """Bad input: one message naming the file or config field, what is wrong, and what to do.

    Every command prints it as a single `error: ...` line (no traceback) and exits with code 2.
    """
