"""A short form of ``make soak``; its kills take too long for every test run."""

from hypothesis import HealthCheck, settings

from .machine import Life

Life.TestCase.settings = settings(
    max_examples=15, stateful_step_count=20, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)
test_anything_in_any_order = Life.TestCase
