"""Check and measure everything on a GPU that is at hand for a short time.

    python -m benchmarks.gpu_session [--minutes 9] [--results DIR] [--only JOB,…] [--again JOB,…]
    python -m benchmarks.gpu_session --prepare DIR [--python 3.12] [--torch 2.11.0] [--installed FILE]

The jobs, by importance: tests of kernels against references, times of kernels, compiled layers for the cases, MFU of
four cases, tests of training, MFU of six more cases, profiles of two, and a real pretraining that is stopped and
resumed. Each runs in a process of its own with a time limit; one that fails, hangs or crashes is recorded, and the next
one starts. A job only starts if the time that it should take is left. The same command continues
with what is left: 75 is the exit code if there is more to do, 1 if jobs failed, else 0. Without a GPU nothing runs.

In the results folder, RESULTS.gpu.md has all figures and failures, session.json the same as JSON, session.log the
output of all jobs, and `profile` tables and a trace for Perfetto. `--prepare` gathers wheels for a machine without a
network, see `benchmarks.gpu_wheels`.
"""

import argparse
import json
import math
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Container, Iterable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import IO

from benchmarks.gpu_results import JobOutcome, read_figures, write_results
from benchmarks.gpu_wheels import prepare
from experiment.errors import UserError, first_line, readable_disk_errors
from experiment.files import REPOSITORY, write_json
from experiment.process.signals import handle_stop_signals, interrupt, kill_group, uninterrupted
from launcher.supervision.rank_processes import watchdog

CASES = (  # of `benchmarks.gpu_training`, by importance
    "bert-base-512-bf16-zero1-compiled",
    "modernbert-base-1024-bf16-zero1-compiled",
    "bert-large-512-bf16-zero1-compiled",
    "bert-base-128-bf16-zero1-compiled",
    "bert-base-512-bf16-zero1-eager",
    "bert-base-512-bf16-zero3-compiled",
    "bert-base-512-fp16-zero1-compiled",
    "modernbert-base-512-bf16-zero1-compiled",
    "modernbert-base-512-bf16-zero1-eager",
    "bert-large-128-bf16-zero1-compiled",
)
_FIRST = 4  # of these, before tests of training
_PROFILED = 2  # of these
_COMPILED = (  # the first ones of CASES whose compiled layers differ
    "bert-base-512-bf16-zero1-compiled",
    "modernbert-base-1024-bf16-zero1-compiled",
    "bert-large-512-bf16-zero1-compiled",
    "bert-base-512-fp16-zero1-compiled",
)
RESULTS = "RESULTS"  # stands for the results folder in commands
MORE_TO_DO = 75  # exit code
_GRACE = 5.0  # seconds at the limit of a job, in which its processes write their stacks
_WORKERS = 8  # of tests, which share the GPU
_LINES = 60  # of the output of a job that fails
_HEADING = "\n===== "  # of a job in the log


@dataclass(frozen=True)
class Job:
    """A part of the session. `command`: arguments of Python. It prints its figures with `print_figures`."""

    name: str
    seconds: int  # time limit
    expected: int  # seconds that it should take: estimates, except for `compile`, which took 81 s on an H200
    command: tuple[str, ...]


ENVIRONMENT = Job("environment", 180, 30, ("-m", "benchmarks.gpu_environment"))


def plan() -> Iterator[Job]:
    """Yield all jobs by importance."""
    in_runs = "runs_with or gets_the"
    yield _tests(
        "kernels", 180, "attention", "optimizers", "head", "sums", "dropout", "gelu", "norm", only=f"not ({in_runs})"
    )
    yield Job("kernel-times", 120, 60, ("-m", "benchmarks.gpu_kernels", "bf16"))
    yield Job("compile", 200, 100, ("-m", "benchmarks.gpu_training", "--compile", *_COMPILED))
    yield from map(_case, CASES[:_FIRST])
    yield _tests("training", 240, "training", only="fp32 or 16_bit")
    yield _tests("syncs", 240, "syncs")
    yield _tests("compiled-layers", 300, "compiled_layers")
    yield _tests("head-in-runs", 240, "head", only=in_runs)
    yield _tests("bad-batches", 240, "training", only="bad_batch")
    yield _tests("offload", 240, "training", only="offload or checkpointing")
    yield from map(_case, CASES[_FIRST:])
    for case in CASES[:_PROFILED]:
        folder = f"{RESULTS}/profile/{case}"
        yield Job(f"profile-{case}", 160, 80, ("-m", "benchmarks.gpu_training", case, "--profile", folder))
    yield Job("pretraining", 330, 200, ("-m", "benchmarks.gpu_pretraining"))


def _tests(name: str, seconds: int, *files: str, only: str = "") -> Job:
    """Tests in `tests/gpu`, several at a time: xdist starts another process in place of one that crashes or hangs."""
    paths = [f"tests/gpu/test_gpu_{file}.py" for file in files]
    workers = str(min(_WORKERS, os.cpu_count() or 1))
    options = ("-n", workers, "-p", "no:cacheprovider", "-p", "benchmarks.gpu_test_reports", "--tb=short", "-k", only)
    return Job(name, seconds, seconds // 2, ("-m", "pytest", *paths, *options))


def _case(case: str) -> Job:
    return Job(f"mfu-{case}", 160, 70, ("-m", "benchmarks.gpu_training", case))


class Session:
    """The jobs that ran so far, in a results folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._state = folder / "session.json"
        self._log = folder / "session.log"
        self.commit = ""  # of deepcloze, in this call
        self.outcomes: dict[str, JobOutcome] = {}
        if self._state.exists():
            saved = json.loads(self._state.read_text(encoding="utf-8"))
            self.outcomes = {name: JobOutcome(**outcome) for name, outcome in saved.items()}
        for name, outcome in self.outcomes.items():
            if outcome.status == "running":  # the session was killed
                outcome.status = "interrupted"
                outcome.figures = list(read_figures(self._printed(name)))

    def forget(self, names: Iterable[str], jobs: Sequence[Job]) -> None:
        """Run jobs again: those that `select` finds; 'failed': those that failed. If an earlier call with these names
        has left some of them, only those run. A job that has not run yet is left as it is. Figures are kept. Raises
        UserError."""
        known, found = self.outcomes, list[str]()
        for name in filter(None, names):
            failed = [key for key in known if known[key].has_failed or known[key].status == "waiting"]
            if name == "failed" and not failed:
                print("--again failed: no job has failed", flush=True)
            found += failed if name == "failed" else [job.name for job in select(jobs, [name], "--again")]
        known_again = {key: known[key] for key in found if key in known}
        if not any(outcome.again and not outcome.is_final for outcome in known_again.values()):
            for key, outcome in known_again.items():
                known[key] = JobOutcome("waiting", again=True, earlier=outcome.measured)

    def run(self, job: Job, left: float = math.inf) -> JobOutcome:
        """Run a job, for at most the seconds that are left, and record how it went."""
        before = self.outcomes.get(job.name)
        outcome = JobOutcome("running", 1, commit=self.commit)
        if before is not None:
            outcome.attempts, outcome.again = before.attempts + 1, before.again
            outcome.earlier = before.measured if before.is_final else before.earlier
        self._record(job, outcome)
        limit = min(job.seconds, left)
        start = time.monotonic()
        outcome.status = "interrupted"
        try:
            with self._log.open("a", encoding="utf-8") as log:
                print(f"{_HEADING}{job.name}: {' '.join(job.command)}", file=log, flush=True)
                outcome.exit_code = _run_process(job, limit, self._folder, log)
            if outcome.exit_code is not None:
                outcome.status = "failed" if outcome.exit_code else "passed"
            elif limit == job.seconds:
                outcome.status = "timed out"
        finally:
            output = self._printed(job.name)
            outcome.seconds = time.monotonic() - start
            outcome.figures = list(read_figures(output))
            if outcome.status == "passed" and not outcome.figures:
                outcome.status, output = "failed", f"{output}\nit gave no figures"
            if outcome.has_failed:
                outcome.output = "\n".join(output.splitlines()[-_LINES:])
                print(outcome.output)
            self._record(job, outcome)
        return outcome

    def _printed(self, name: str) -> str:
        """Return the output of the last attempt of a job, which was the last job."""
        log = self._log.read_text(encoding="utf-8", errors="replace") if self._log.exists() else ""
        _, found, output = log.rpartition(f"{_HEADING}{name}: ")
        return output.partition("\n")[2] if found else ""

    def _record(self, job: Job, outcome: JobOutcome) -> None:
        self.outcomes[job.name] = outcome
        write_json(self._state, {name: asdict(one) for name, one in self.outcomes.items()})
        try:
            write_results(self._folder / "RESULTS.gpu.md", self.outcomes)
        except Exception as error:  # session.json has it all
            print(f"RESULTS.gpu.md was not written: {first_line(error)}", flush=True)
        if outcome.status == "running":
            print(f"{job.name}: about {job.expected} s", flush=True)
        else:
            print(f"{job.name}: {outcome.summary}", flush=True)


def matching(name: str, names: Iterable[str]) -> list[str]:
    """Return the name if it is one of the names, else those that begin with it."""
    names = list(names)
    return [name] if name in names else [one for one in names if one.startswith(name)]


def select(jobs: Iterable[Job], names: Sequence[str], flag: str = "--only") -> list[Job]:
    """Return the jobs that `matching` finds for these names, in this order. Raises UserError if there is none."""
    by_name = {job.name: job for job in jobs}
    found = {name: [by_name[key] for key in matching(name, by_name)] for name in names}
    for name, selected in found.items():
        if not selected:
            raise UserError(f"{flag} {name}: no such job; the jobs are {', '.join(by_name)}")
    return list(dict.fromkeys(job for selected in found.values() for job in selected))


def run_session(
    folder: Path, minutes: float, planned: Sequence[Job], again: Iterable[str] = (), only: Sequence[str] = ("",)
) -> int:
    """Run jobs for this time. Returns the exit code. Raises UserError if a name is none of a planned job.

    again: as for `Session.forget`. only: as for `select`.
    """
    jobs = select(planned, only)
    deadline = time.monotonic() + 60 * minutes
    folder.mkdir(parents=True, exist_ok=True)
    session = Session(folder)
    session.forget(again, planned)
    machine = session.run(ENVIRONMENT)  # in each call: it may be another one
    if machine.status != "passed":
        machine = session.run(ENVIRONMENT)
    if machine.status != "passed":
        print(f"environment failed, so that no other job has run; see {folder / 'RESULTS.gpu.md'}")
        return 1
    if not machine.figures[-1]["gpu"]:
        print("this machine has no GPU: no other job has run")
        return MORE_TO_DO
    session.commit = machine.figures[-1].get("commit", "")

    def left() -> list[Job]:
        known = session.outcomes
        return [job for job in jobs if job.name not in known or not known[job.name].is_final]

    def tried() -> set[str]:
        return {name for name, outcome in session.outcomes.items() if outcome.attempts}

    while job := next_job(left(), deadline - time.monotonic(), tried()):
        session.run(job, deadline - time.monotonic() - 2 * _GRACE)
    failed = [name for name, outcome in session.outcomes.items() if outcome.has_failed]
    print(f"{folder / 'RESULTS.gpu.md'}; failed: {', '.join(failed) or 'none'}; jobs left: {len(left())}")
    return MORE_TO_DO if left() else int(bool(failed))


def next_job(jobs: Iterable[Job], left: float, tried: Container[str] = ()) -> Job | None:
    """Return the first one that should end in the seconds that are left.

    tried: jobs that the end of the time may have cut off. Their whole limit must fit.
    """
    needed = ((job, job.seconds if job.name in tried else job.expected) for job in jobs)
    return next((job for job, seconds in needed if seconds + 2 * _GRACE <= left), None)


def _run_process(job: Job, limit: float, folder: Path, log: IO[str]) -> int | None:
    """Return the exit code of a job; None if it ran into its limit, in seconds. It ends with this process, whatever
    happens."""
    command = [argument.replace(RESULTS, str(folder)) for argument in job.command]
    variables = {"PYTHONFAULTHANDLER": "1", "WANDB_MODE": "disabled"}
    with ExitStack() as job_ends:
        with uninterrupted():  # a signal would leave the job
            process = subprocess.Popen(
                [sys.executable, *command],
                cwd=REPOSITORY,
                env=os.environ | variables,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
            job_ends.callback(_end, process)
            job_ends.enter_context(watchdog(process.pid))
        try:
            return process.wait(limit)
        except subprocess.TimeoutExpired:
            with suppress(ProcessLookupError, subprocess.TimeoutExpired):
                os.killpg(process.pid, signal.SIGABRT)
                process.wait(_GRACE)
            return None


def _end(process: "subprocess.Popen[bytes]") -> None:
    """Kill a job, and what it has left."""
    kill_group(process.pid)
    with suppress(subprocess.TimeoutExpired):  # the driver may hold it forever
        process.wait(_GRACE)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.gpu_session", description=__doc__.partition("\n")[0])
    flag = parser.add_argument
    flag("--minutes", type=float, default=9.0, help="of this call (9)")
    flag("--results", type=Path, default=Path("runs/gpu-session"), metavar="DIR", help="folder (runs/gpu-session)")
    flag("--only", default="", metavar="JOB,…", help="these in this order: names, or beginnings of names (all)")
    flag("--again", default="", metavar="JOB,…", help="run again: names, beginnings of names, or 'failed'")
    flag("--prepare", type=Path, metavar="DIR", help="instead: gather wheels for a machine without a network, with")
    flag("--python", default=platform.python_version(), metavar="VERSION", help="this Python (the same as here),")
    flag("--torch", default=version("torch"), metavar="VERSION", help="this torch (the same as here),")
    flag("--installed", type=Path, metavar="FILE", help="and these packages: the output of `pip freeze` there")
    given = parser.parse_args(argv)
    try:
        with handle_stop_signals(interrupt), readable_disk_errors():
            if given.prepare is not None:
                prepare(given.prepare, given.python, given.torch, given.installed)
                return 0
            again, only = given.again.split(","), given.only.split(",")
            return run_session(given.results.absolute(), given.minutes, list(plan()), again, only)
    except UserError as error:
        print(f"gpu_session: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("gpu_session: interrupted; the same command continues", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
