"""Jobs: one run of a method, from its checked arguments to the distilled set in a file."""

from condense.jobs.checks import (
    check_experts,
    check_fit,
    check_outputs,
    check_request,
    check_scores,
    check_teachers,
    run_checks,
    teacher_options,
)
from condense.jobs.execute import resume, run_job
from condense.jobs.job import is_finished, is_resumable, is_unfinished, read_job, resolve_job, resolve_settings
from condense.jobs.manifest import distill_command
from condense.jobs.plan import estimate_cost
from condense.jobs.pruning import prune_task

__all__ = [
    "check_experts",
    "check_fit",
    "check_outputs",
    "check_request",
    "check_scores",
    "check_teachers",
    "distill_command",
    "estimate_cost",
    "is_finished",
    "is_resumable",
    "is_unfinished",
    "prune_task",
    "read_job",
    "resolve_job",
    "resolve_settings",
    "resume",
    "run_checks",
    "run_job",
    "teacher_options",
]
