"""All comparisons of a plan, one after another in one process group."""

import gc
import logging
from pathlib import Path

import torch.distributed as dist

from ..environment import Environment
from ..files import check_writable
from .cases import Plan
from .report import Report, failure, write_json
from .verifier import Verifier


def run_verification(plan: Plan, environment: Environment, json: Path | None) -> str | None:
    """Reports each comparison and writes the JSON file; one line on what is over its tolerance, or None. All ranks call it."""
    # Gathering a tensor cut over two axes takes two steps: DTensor warns of that, and here it does not matter.
    logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)
    if environment.leads and json is not None:
        check_writable(json)
    report = Report(len(plan.configs)) if environment.leads else None
    if report:
        report.notes(plan.notes)
    # All that is imported would be looked through for garbage after each mesh, which takes as long as the mesh itself.
    gc.freeze()
    verifier, verdicts = Verifier(environment, plan.segments), []
    for config in plan.configs:
        verdicts.append(verifier.verify(config))
        if report:
            report.case(verdicts[-1])
    if report:
        report.end(verdicts, plan.skipped)
        if json is not None:
            write_json(json, verdicts, plan.skipped)
    # No rank ends before the result is written: its end could end the others.
    dist.barrier()
    return failure(verdicts)
