"""The page of a GPU session."""

from pathlib import Path

from benchmarks.gpu_results import JobOutcome, write_results

CASE = {"case": "bert", "device": "H100", "mfu": 0.4, "step_ms": 1.0, "memory": 2**30, "fill": 1.0, "error": ""}


def page(folder: Path, **outcomes: JobOutcome) -> str:
    write_results(folder / "page.md", {name.replace("_", "-"): outcome for name, outcome in outcomes.items()})
    return (folder / "page.md").read_text(encoding="utf-8")


def test_rounds_are_one_row(tmp_path: Path) -> None:
    """Catches a case that is listed twice, one that ran out of memory among the figures, and a mean of two commits."""
    first, again = ({**CASE, "tokens_per_second": rate} for rate in (100.0, 300.0))
    failed = {"case": "large", "error": "out of memory"}
    found = page(
        tmp_path,
        mfu_bert=JobOutcome("passed", figures=[first, again], commit="a1"),
        mfu_large=JobOutcome("passed", figures=[failed]),
        mfu_other=JobOutcome("passed", figures=[again], commit="b2"),
    )
    assert "| bert | H100 | b2 | 1 | 40.0% | 300 (300 – 300) " in found
    assert "| bert | H100 | a1 | 2 | 40.0% | 200 (100 – 300) | 1.0 | 1.0 GiB | 1.000 |" in found
    assert "- large: out of memory" in found


def test_warnings_are_beside_the_figures(tmp_path: Path) -> None:
    """Catches an MFU of compiled layers that were not compiled."""
    rounds = [{**CASE, "tokens_per_second": 100.0, "warnings": ["the layers run without torch.compile"]}] * 2
    found = page(tmp_path, mfu_bert=JobOutcome("passed", figures=rounds))
    assert "| 1.000 | the layers run without torch.compile |" in found


def test_figures_of_earlier_runs_are_listed(tmp_path: Path) -> None:
    """Catches figures that lose their commit, and an error that has been fixed since."""
    measured = {**CASE, "tokens_per_second": 100.0}
    earlier = JobOutcome(
        "passed", figures=[measured, {"case": "large", "error": "out of memory"}], commit="a1"
    ).measured
    found = page(tmp_path, mfu_bert=JobOutcome("passed", figures=[measured], commit="b2", earlier=earlier))
    assert "| bert | H100 | a1 | 1 | 40.0% | 100 (100 – 100) " in found
    assert "| bert | H100 | b2 | 1 | 40.0% | 100 (100 – 100) " in found
    assert "out of memory" not in found


def test_failures_are_explained(tmp_path: Path) -> None:
    """Catches a table that says only that something failed, and skipped jobs among the failures."""
    tests = [
        {"test": "test_gpu.py::test_a", "result": "passed", "message": ""},
        {"test": "test_gpu.py::test_b", "result": "failed", "message": "0.1 > 0.01"},
    ]
    failed = JobOutcome("failed", exit_code=1, figures=tests, output="end")
    found = page(tmp_path, kernels=failed, syncs=JobOutcome("interrupted"))
    assert "failed with exit code 1 after 0 s: 1 failed, 1 passed" in found
    assert "- `test_gpu.py::test_b`: 0.1 \\> 0.01\n" in found
    assert "- `test_gpu.py::test_a`" not in found
    assert "```\nend\n```" in found
    assert "| syncs | interrupted |" in found
    assert "### syncs" not in found
