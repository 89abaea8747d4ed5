"""A plugin of pytest that prints each result as a JSON object when the test ends, for `benchmarks.gpu_session`: pytest
itself reports failures at its end, which a hanging test may prevent."""

import json
import os

import pytest

_CHARACTERS = 400  # of a message


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if "PYTEST_XDIST_WORKER" in os.environ or (report.passed and report.when != "call"):
        return
    crash = getattr(report.longrepr, "reprcrash", None)
    message = (crash.message if crash else report.longreprtext) if report.failed else ""
    if len(message) > _CHARACTERS:  # its last line may be the error of a rank
        message = f"{message[: _CHARACTERS // 2]} … {message[-_CHARACTERS // 2 :]}"
    print("\n" + json.dumps({"test": report.nodeid, "result": report.outcome, "message": message}), flush=True)
