"""What a user can mend."""


class UserError(ValueError):
    """Its message is the whole story, in one line: what is wrong, where, and what is allowed. Commands print it and exit with 1."""


class KeyedError(ValueError):
    """A value that is wrong beside another: names its dotted key, so that the message can name the line."""

    def __init__(self, key: str, message: str) -> None:
        super().__init__(message)
        self.key = key
