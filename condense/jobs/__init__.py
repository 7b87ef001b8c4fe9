"""TODO-FACE condense/jobs."""

from condense.jobs.checks import check, check_experts, check_teachers
from condense.jobs.execute import resume
from condense.jobs.job import CONFIG, RESULT, read_job
from condense.jobs.plan import measure

__all__ = ["CONFIG", "RESULT", "check", "check_experts", "check_teachers", "measure", "read_job", "resume"]
