"""The checks as pytest's: one class to subclass, one fixture to give."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from unittest import SkipTest

from gpsearch.profiling import DeviceProfiler
from gpsearch.testing.bench import Bench, Workload, workload
from gpsearch.testing.checks import CHECKS, CheckFailed, demanded
from gpsearch.testing.report import due, verdict


class ProfilerConformance:
    """Holds a profiler to its contract, check by check.

    Subclass it in your tests, under a name that begins with Test, and give the fixture:

        class TestDemo(ProfilerConformance):
            @pytest.fixture
            def profiler(self):
                return DemoProfiler()
    """

    expected_failures: Mapping[str, str] = {}
    """By check, the reason why it is known to fail; one that passes all the same fails."""

    def workload(self, **sizes: Any) -> Workload:
        """Return a model and its example, by steps, hidden, batch, seed and gates.

        To override where the device cannot run an LSTM, or H-LSTM, with an affine map behind it.
        """
        return workload(**sizes)

    def pytest_generate_tests(self, metafunc: Any) -> None:
        """Make a test of every check."""
        if "name_of_check" in metafunc.fixturenames:
            metafunc.parametrize("name_of_check", list(CHECKS))

    def test_conforms(self, profiler: DeviceProfiler, name_of_check: str) -> None:
        """One check: passed, failed, or skipped by what the profiler declares."""
        bench = Bench(profiler, workload=self.workload)
        expected = self.expected_failures.get(name_of_check)
        state, reason = verdict(bench, CHECKS[name_of_check], expected)
        profiler.close()
        if state == "failed":
            raise CheckFailed(reason)
        if state != "passed":
            raise SkipTest(reason)

    def test_enough_checks_run(self, profiler: DeviceProfiler) -> None:
        """As many checks are due as the API version demands, and none else is expected to fail."""
        bench = Bench(profiler)
        ran = sum(due(bench, one) is None for one in CHECKS.values())
        wanted = demanded(profiler.api_version, bench.lacking)
        profiler.close()
        assert ran >= wanted, f"{ran} checks are due of {wanted}: {bench.lacking}"
        assert not self.expected_failures.keys() - CHECKS.keys()
