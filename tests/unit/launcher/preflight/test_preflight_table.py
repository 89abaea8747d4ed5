from collections.abc import Callable

from launcher.preflight.bandwidth import Measurement
from launcher.preflight.checks import Problem
from launcher.preflight.facts import HostAnswer, Unreachable
from launcher.preflight.table import preflight_table

SLOTS = {"node-1": (0,), "node-2": (0,), "node-10": (0,)}


def table(answer: Callable[..., HostAnswer], only_failed: bool = False) -> str:
    answers = {"node-1": answer(), "node-2": answer(clock_offset=3600.0), "node-10": Unreachable("refused", "start it")}
    problems = {
        "node-1": [],
        "node-2": [Problem("clock", "an hour ahead", "ssh node-2 chronyc"), Problem("disk", "full", "df")],
        "node-10": [Problem("ssh", "refused", "start it")],
    }
    measured = Measurement(3, 1 << 20, 0.002, (0.1, 0.2, 0.1), (1e9, 5e8, 9e8))
    return preflight_table(answers, problems, SLOTS, measured, only_failed)


def test_a_row_for_each_host_and_a_fix_for_each_problem(answer: Callable[..., HostAnswer]) -> None:
    header, first, second, third, *rest = table(answer).splitlines()
    assert header.split()[:4] == ["host", "ssh", "Python", "packages"]
    for row in (first, second):  # aligned
        assert row[header.index("Python")] == "3"
    assert second.count("FAILED") == 2
    assert second[header.index("clock") :].startswith("FAILED")
    assert second[header.index("disk") :].startswith("FAILED")
    assert third.split()[:3] == ["node-10", "FAILED", "?"]
    assert rest[:6] == [
        "node-2: clock: an hour ahead",
        "    fix: ssh node-2 chronyc",
        "node-2: disk: full",
        "    fix: df",
        "node-10: ssh: refused",
        "    fix: start it",
    ]
    assert rest[6] == (
        "all-reduce of 1 MiB over 3 ranks: 2.0 ms, 699 MB/s bus bandwidth; slowest network: node-2, 500 MB/s; "
        "slowest to compute: node-2, 200.0 ms"
    )
    assert rest[7:] == ["preflight: 1 of 3 hosts passed"]


def test_before_a_launch_healthy_hosts_need_no_row(answer: Callable[..., HostAnswer]) -> None:
    assert "node-1 " not in table(answer, only_failed=True)
    assert table(answer, only_failed=True).splitlines()[1].startswith("node-2")
    healthy = preflight_table({"node-1": answer()}, {"node-1": []}, {"node-1": (0,)}, None, only_failed=True)
    assert healthy == "preflight: 1 of 1 host passed"
