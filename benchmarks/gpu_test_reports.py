"""A plugin of pytest that prints each result when the test ends, for `benchmarks.gpu_session`: pytest
itself reports failures at its end, which a hanging test may prevent."""

import pytest

from benchmarks.gpu_results import print_figures

_CHARACTERS = 400  # of a message


def pytest_configure(config: pytest.Config) -> None:
    """Report in the process that starts xdist's workers, not in these."""
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(_Reports())


class _Reports:
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if not report.passed or report.when == "call":
            _print(report)


def _print(report: pytest.TestReport) -> None:
    crash = getattr(report.longrepr, "reprcrash", None)
    message = (crash.message if crash else report.longreprtext) if report.failed else ""
    if len(message) > _CHARACTERS:  # its last line may be the error of a rank
        message = f"{message[: _CHARACTERS // 2]} … {message[-_CHARACTERS // 2 :]}"
    print()
    print_figures({"test": report.nodeid, "result": report.outcome, "message": message})
