"""Settings of all tests."""

import os

from hypothesis import settings

# Continuous integration must not fail by a lucky draw that the change did not cause; developers' machines explore.
settings.register_profile("ci", derandomize=True)
if os.environ.get("CI"):
    settings.load_profile("ci")
