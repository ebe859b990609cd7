"""What every test runs under: checked annotations, Hypothesis profiles, one thread a pytest-xdist worker.

Types and array shapes in the signatures of `protformer` are checked at each call, so a test that passes has
also seen its shapes hold. Tests that start the program in another process run it as users do, unchecked.
"""

import os

import jaxtyping
from hypothesis import HealthCheck, settings

# Before anything imports the package: only modules imported from here on are checked.
jaxtyping.install_import_hook("protformer", "beartype.beartype")

# Workers already fill the cores. torch reads this when it is first imported, which not every test run does.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"

# The first call of a kernel is slow, so a deadline for each example would only measure that.
settings.register_profile("dev", deadline=None)
settings.register_profile(
    "ci", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow], print_blob=True
)
settings.load_profile("ci" if os.environ.get("CI") else "dev")
