"""What a user can mend."""


class UserError(ValueError):
    """Its message is the whole story, in one line: what is wrong, where, and what is allowed. Commands print it and exit with 1."""
