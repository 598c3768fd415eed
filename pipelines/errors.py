"""What can go wrong, by who can mend it."""


class UserError(Exception):
    """Something the user can mend: one sentence, and a hint. Exit code 2."""

    def __init__(self, message: str, hint: str) -> None:
        super().__init__(message, hint)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return self.message


class TaskError(Exception):
    """A piece of work failed for good: which one, and why. Exit code 1."""
