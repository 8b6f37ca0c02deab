"""How an error leaves a command: one line for what the user can mend, a traceback for what is ours. Imports no torch."""

import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

from ..configs.errors import UserError

AGENT = "BATON_AGENT"
"""Set in workers that `environment.launch` started: it prints their errors, once."""


def under_torchrun() -> bool:
    """Whether a launcher has told this process its rank."""
    return "WORLD_SIZE" in os.environ and "RANK" in os.environ


@contextmanager
def user_errors() -> Iterator[None]:
    """Ends the process with status 1 and one line for a UserError; a worker also tells its agent, who ends the others."""
    try:
        yield
    except Exception as error:
        worker = under_torchrun()
        if worker:
            _tell_agent(error)
        if not isinstance(error, UserError):
            if not worker:
                raise
            traceback.print_exc()
        elif not worker or (AGENT not in os.environ and os.environ["RANK"] == "0"):
            print(f"error: {error}", file=sys.stderr, flush=True)  # noqa: T201
        # Not sys.exit: a failed rank must not wait in the library's exit handlers for those that hang in a collective.
        os._exit(1) if worker else sys.exit(1)


def _tell_agent(error: Exception) -> None:
    """Leaves the error where the agent looks for it; subclasses of UserError under that name."""
    from torch.distributed.elastic.multiprocessing.errors import get_error_handler

    handler = get_error_handler()
    handler.initialize()
    handler.record_exception(UserError(str(error)) if isinstance(error, UserError) else error)
