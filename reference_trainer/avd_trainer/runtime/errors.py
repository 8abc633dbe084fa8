"""Errors that a user can fix; the command line prints their message without a traceback."""


class UserError(ValueError):
    """What was expected, what came, and what to do."""
