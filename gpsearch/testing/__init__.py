"""The conformance kit: what a plug-in's profiler must keep, checked by its author and by users.

In the author's tests, by pytest, one class with one fixture; on any machine, without pytest,
``gpsearch plugin check NAME``. Both run the same checks, those that the profiler's declared
capabilities call for, and fail where fewer ran than its API version demands.

    conformance  `ProfilerConformance`: the checks as pytest's
    report       `examine`: the checks of one profiler, and what came of them
    checks       what a check is, and the table of what an API version demands
    bench        what a check works with: the profiler, models, times
    contract     checks of what a profiler says, and of how it treats what it is given
    timing       checks of its seconds
    upkeep       checks of how it goes on after an error, and ends
    counters     checks of its joules and bytes
    faults       a profiler whose energy counter is broken in a known way
    template     `write`: a new package that passes, from `templates/`
"""

from gpsearch.testing.conformance import ProfilerConformance
from gpsearch.testing.report import Report, examine

__all__ = ["ProfilerConformance", "Report", "examine"]
