"""Check and measure everything on a GPU that is at hand for a short time.

    python -m benchmarks.gpu_session [--minutes 9] [--results DIR] [--only JOB,…] [--again JOB,…]
    python -m benchmarks.gpu_session --prepare DIR [--python 3.12] [--torch 2.11.0] [--installed FILE]

The jobs, by importance: tests of kernels against references, times of kernels, tests of training, compiled layers for
the cases, MFU of ten cases, profiles of two, a real pretraining that is stopped and resumed, and the ten cases again.
Each runs in a process of its own with a time limit; one that fails, hangs or crashes is recorded, and the next one
starts. A job only starts if its limit fits into the time left. The same command continues with what is left: 75 is the
exit code if there is more to do, 1 if jobs failed, else 0. Without a GPU, jobs that need one are skipped until there is
one.

In the results folder, RESULTS.gpu.md has all figures and failures, session.json the same as JSON, session.log the
output of all jobs, and `profile` tables and a trace for Perfetto. `--prepare` gathers wheels for a machine without a
network, see `benchmarks.gpu_wheels`.
"""

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any

from benchmarks.gpu_results import JobOutcome, write_results
from benchmarks.gpu_wheels import prepare
from experiment.errors import UserError
from experiment.files import write_json
from experiment.process.signals import handle_stop_signals, interrupt, kill_group, uninterrupted
from launcher.supervision.rank_processes import watchdog

REPOSITORY = Path(__file__).resolve().parent.parent
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


@dataclass(frozen=True)
class Job:
    """A part of the session. `command`: arguments of Python; the objects that it prints, one JSON per line, are its
    figures."""

    name: str
    seconds: int  # time limit
    command: tuple[str, ...]
    needs_gpu: bool = True


ENVIRONMENT = Job("environment", 180, ("-m", "benchmarks.gpu_environment"), needs_gpu=False)


def plan() -> Iterator[Job]:
    """Yield all jobs by importance."""
    in_runs = "runs_with or gets_the"
    yield _tests(
        "kernels", 180, "attention", "optimizers", "head", "sums", "dropout", "gelu", "norm", only=f"not ({in_runs})"
    )
    yield Job("kernel-times", 120, ("-m", "benchmarks.gpu_kernels", "bf16"))
    yield _tests("training", 240, "training", only="fp32 or 16_bit")
    yield _tests("syncs", 240, "syncs")
    yield _tests("compiled-layers", 300, "compiled_layers")
    yield _tests("head-in-runs", 240, "head", only=in_runs)
    yield _tests("bad-batches", 240, "training", only="bad_batch")
    yield _tests("offload", 240, "training", only="offload or checkpointing")
    yield Job("compile", 200, ("-m", "benchmarks.gpu_training", "--compile", *_COMPILED))
    yield from (_case("mfu", case) for case in CASES)
    for case in CASES[:_PROFILED]:
        folder = f"{RESULTS}/profile/{case}"
        yield Job(f"profile-{case}", 150, ("-m", "benchmarks.gpu_training", case, "--profile", folder))
    yield Job("pretraining", 330, ("-m", "benchmarks.gpu_pretraining"), needs_gpu=False)
    yield from (_case("mfu2", case) for case in CASES)


def _tests(name: str, seconds: int, *files: str, only: str = "") -> Job:
    """Tests in `tests/gpu`, several at a time: xdist starts another process in place of one that crashes or hangs."""
    paths = [f"tests/gpu/test_gpu_{file}.py" for file in files]
    workers = str(min(_WORKERS, os.cpu_count() or 1))
    options = ("-n", workers, "-p", "no:cacheprovider", "-p", "benchmarks.gpu_test_reports", "--tb=short", "-k", only)
    return Job(name, seconds, ("-m", "pytest", *paths, *options))


def _case(kind: str, case: str) -> Job:
    return Job(f"{kind}-{case}", 150, ("-m", "benchmarks.gpu_training", case))


class Session:
    """The jobs that ran so far, in a results folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._state = folder / "session.json"
        self.outcomes: dict[str, JobOutcome] = {}
        if self._state.exists():
            saved = json.loads(self._state.read_text(encoding="utf-8"))
            self.outcomes = {name: JobOutcome(**outcome) for name, outcome in saved.items()}
        for outcome in self.outcomes.values():
            if outcome.status == "running":  # the session was killed
                outcome.status = "interrupted"

    def forget(self, names: Iterable[str]) -> None:
        """Run jobs again: those that `matching` finds; 'failed': those that failed. Raises UserError."""
        for name in filter(None, names):
            failed = [key for key, outcome in self.outcomes.items() if outcome.has_failed]
            found = failed if name == "failed" else matching(name, self.outcomes)
            if not found:
                raise UserError(f"--again {name}: no such job in {self._state}")
            for key in found:
                del self.outcomes[key]

    def run(self, job: Job) -> JobOutcome:
        """Run a job, and record how it went."""
        before = self.outcomes.get(job.name)
        outcome = JobOutcome("running", 1 if before is None else before.attempts + 1)
        self._record(job, outcome)
        start = time.monotonic()
        with (self._folder / "session.log").open("a+", encoding="utf-8", errors="replace") as log:
            print(f"\n===== {job.name}: {' '.join(job.command)}", file=log, flush=True)
            begin = log.tell()
            outcome.exit_code = _run_process(job, self._folder, log)
            log.seek(begin)
            output = log.read()
        outcome.seconds = time.monotonic() - start
        outcome.figures = [*(before.figures if before and job == ENVIRONMENT else []), *_figures(output)]
        outcome.status = {0: "passed", None: "timed out"}.get(outcome.exit_code, "failed")  # type: ignore[assignment]
        if outcome.status != "passed":
            outcome.output = "\n".join(output.splitlines()[-_LINES:])
            print(outcome.output)
        self._record(job, outcome)
        return outcome

    def skip(self, job: Job) -> None:
        self._record(job, JobOutcome("no GPU"))

    def _record(self, job: Job, outcome: JobOutcome) -> None:
        self.outcomes[job.name] = outcome
        write_json(self._state, {name: asdict(one) for name, one in self.outcomes.items()})
        write_results(self._folder / "RESULTS.gpu.md", self.outcomes)
        if outcome.status == "running":
            print(f"{job.name}: at most {job.seconds} s", flush=True)
        else:
            print(f"{job.name}: {outcome.summary}", flush=True)


def matching(name: str, names: Iterable[str]) -> list[str]:
    """Return the name if it is one of the names, else those that begin with it."""
    names = list(names)
    return [name] if name in names else [one for one in names if one.startswith(name)]


def select(jobs: Iterable[Job], names: Sequence[str]) -> list[Job]:
    """Return the jobs that `matching` finds for these names, in this order. Raises UserError if there is none."""
    by_name = {job.name: job for job in jobs}
    found = {name: [by_name[key] for key in matching(name, by_name)] for name in names}
    for name, selected in found.items():
        if not selected:
            raise UserError(f"--only {name}: no such job; the jobs are {', '.join(by_name)}")
    return list(dict.fromkeys(job for selected in found.values() for job in selected))


def run_session(folder: Path, minutes: float, jobs: Sequence[Job], again: Iterable[str] = ()) -> int:
    """Run jobs for this time. Returns the exit code. Raises UserError if there is no job to run again."""
    deadline = time.monotonic() + 60 * minutes
    folder.mkdir(parents=True, exist_ok=True)
    session = Session(folder)
    session.forget(again)
    machine = session.run(ENVIRONMENT)  # in each call: it may be another one
    has_gpu = machine.status == "passed" and bool(machine.figures[-1]["gpu"])

    def left() -> list[Job]:
        known = session.outcomes
        return [job for job in jobs if job.name not in known or not known[job.name].is_final]

    def possible() -> list[Job]:
        return [job for job in left() if has_gpu or not job.needs_gpu]

    for job in left():
        if job.needs_gpu and not has_gpu:
            session.skip(job)
    while job := next_job(possible(), deadline - time.monotonic()):  # type: ignore[assignment]
        session.run(job)
    failed = [name for name, outcome in session.outcomes.items() if outcome.has_failed]
    print(f"{folder / 'RESULTS.gpu.md'}; failed: {', '.join(failed) or 'none'}; jobs left: {len(left())}")
    return MORE_TO_DO if left() else int(bool(failed))


def next_job(jobs: Iterable[Job], left: float) -> Job | None:
    """Return the first one whose limit fits into the seconds that are left."""
    return next((job for job in jobs if job.seconds + 2 * _GRACE <= left), None)


def _run_process(job: Job, folder: Path, log: IO[str]) -> int | None:
    """Return the exit code of a job; None if it ran into its limit. It ends with this process, whatever happens."""
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
            return process.wait(job.seconds)
        except subprocess.TimeoutExpired:
            with suppress(ProcessLookupError, subprocess.TimeoutExpired):
                os.killpg(process.pid, signal.SIGABRT)
                process.wait(_GRACE)
            return None


def _end(process: "subprocess.Popen[bytes]") -> None:
    """Kill a job, and what it has left."""
    kill_group(process.pid)
    with suppress(subprocess.TimeoutExpired):  # the driver may hold it for ever
        process.wait(_GRACE)


def _figures(output: str) -> Iterator[dict[str, Any]]:
    for line in output.splitlines():
        if line.startswith("{"):
            with suppress(ValueError):
                yield json.loads(line)


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
        with handle_stop_signals(interrupt):
            if given.prepare is not None:
                prepare(given.prepare, given.python, given.torch, given.installed)
                return 0
            jobs = select(plan(), given.only.split(","))
            return run_session(given.results.absolute(), given.minutes, jobs, given.again.split(","))
    except UserError as error:
        print(f"gpu_session: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("gpu_session: interrupted; the same command continues", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
