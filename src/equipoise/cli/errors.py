"""What the command line says without a traceback."""


class UsageError(ValueError):
    """A command line that cannot be understood."""
