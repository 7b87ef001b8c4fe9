"""Jobs: one run of a method, from its checked arguments to the distilled set in a file."""

from condense.jobs.checks import (
    check_classes,
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
from condense.jobs.given_files import fill_from_files
from condense.jobs.job import (
    default_protocol,
    is_finished,
    is_resumable,
    is_unfinished,
    read_job,
    resolve_job,
    resolve_settings,
    was_stopped,
)
from condense.jobs.manifest import expected_manifest
from condense.jobs.plan import estimate_cost
from condense.jobs.pruning import prune_task

__all__ = [
    "check_classes",
    "check_experts",
    "check_fit",
    "check_outputs",
    "check_request",
    "check_scores",
    "check_teachers",
    "default_protocol",
    "estimate_cost",
    "expected_manifest",
    "fill_from_files",
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
    "was_stopped",
]
