"""Jobs: one run of a method, from its checked arguments to the distilled set in a file."""

from condense.jobs.checks import all_at_once, check, check_experts, check_fit, check_outputs, check_teachers
from condense.jobs.execute import resume, run_job
from condense.jobs.job import is_finished, is_resumable, read_job, resolve_job, resolve_settings
from condense.jobs.manifest import distill_command
from condense.jobs.plan import measure

__all__ = [
    "all_at_once",
    "check",
    "check_experts",
    "check_fit",
    "check_outputs",
    "check_teachers",
    "distill_command",
    "is_finished",
    "is_resumable",
    "measure",
    "read_job",
    "resolve_job",
    "resolve_settings",
    "resume",
    "run_job",
]
