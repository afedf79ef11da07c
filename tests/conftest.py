"""Hypothesis: the suite runs a short profile; --hypothesis-profile=long a thorough one."""

from tempfile import TemporaryDirectory

from hypothesis import HealthCheck, settings
from hypothesis.configuration import set_hypothesis_home_dir

SCRATCH = TemporaryDirectory()  # or it leaves a folder .hypothesis here, even with no database
set_hypothesis_home_dir(SCRATCH.name)
SAME = {"derandomize": True, "deadline": None, "database": None}
settings.register_profile("short", max_examples=25, **SAME)
settings.register_profile(
    "long", max_examples=1500, suppress_health_check=[HealthCheck.too_slow], **SAME
)
settings.load_profile("short")
