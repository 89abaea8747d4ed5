"""A launch over several hosts survives what happens to them."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from experiment.run_files.checkpoints import checkpoint_path, complete_checkpoints
from experiment.run_files.outcome_file import Cause
from fork_server import PATCH
from hosts import Cluster, Host
from launches import LONG, SLOW_STEPS, patched
from rank_pool import RankPool
from runs import NO_DROPOUT, SHALLOW, Tree, pretrain_case, run_config, soak
from test_cluster_launches import DEEPCLOZE, UNMEASURED, write_hostfile
from waiting import LIMIT, wait_until

KEYWORD = os.urandom(8).hex()
# Few steps while the launcher notices what has happened. It waits neither for the driver of a GPU nor for long until it
# looks for a lost host again.
PATIENT = f"""
{SLOW_STEPS.replace("sleep(0.1)", "sleep(1)")}
{UNMEASURED}
    from launcher.supervision import returning_hosts, supervisor
    returning_hosts._POLL_SECONDS, supervisor._RELEASE_SECONDS = 1.0, 0.0
"""
SECRET = f"{KEYWORD} 'and' \"quotes\" $HOME"


class Run:
    """A run without an end, launched on the first of these hosts."""

    def __init__(self, folder: Path, corpus: Path, hosts: list[Host]) -> None:
        self.folder = folder / "run"
        self.corpus = corpus
        self.hosts = hosts
        self.hostfile = write_hostfile(folder / "hostfile", hosts)

    def start(
        self, host: Host, *flags: str, variables: tuple[str, ...] = (), patch: str = PATIENT
    ) -> "subprocess.Popen[str]":
        """`patch`: code that each process of deepcloze runs first."""
        variables += tuple(f"{name}={value}" for name, value in patched(self.folder.parent, patch).items())
        command = ["env", "OMP_NUM_THREADS=1", *variables, *DEEPCLOZE]
        command += [f"--hostfile={self.hostfile}", f"--env={PATCH}", *flags]
        config = self.folder.with_suffix(".yaml")
        config.write_text(yaml.safe_dump(self.config(self.folder, LONG)), encoding="utf-8")
        self.output, self.errors = (self.folder.with_name(f"{host.name}-{name}") for name in ("stdout", "stderr"))
        # Not to pipes, which nobody reads until the end: a full one would block the launcher.
        with self.output.open("w") as output, self.errors.open("w") as errors:
            self.process = host.popen(*command, "--config", str(config), stdout=output, stderr=errors)
        return self.process

    def wait(self) -> tuple[str, str]:
        """Wait for the end of the launch and return what it printed."""
        self.process.wait(LIMIT)
        return self.output.read_text(), self.errors.read_text()

    def config(self, folder: Path, steps: int) -> Tree:
        return run_config(
            folder,
            self.corpus,
            model__config=SHALLOW | NO_DROPOUT,
            schedule__steps=steps,
            schedule__name="constant",
            optimizer__lr=1e-4,
            checkpoint__every_steps=2 if steps == LONG else None,
            checkpoint__keep_last=2,
            health__hang_seconds=60,
        )

    def attempts(self) -> list[dict[str, Any]]:
        path = self.folder / "launch.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def saved(self) -> list[Path]:
        return complete_checkpoints(self.folder / "checkpoints")[-1:]

    def wait_for_attempt(self, number: int) -> None:
        """Wait until this attempt has saved a checkpoint."""
        wait_until(lambda: len(self.attempts()) == number, self.process)
        saved = self.saved()
        wait_until(lambda: self.saved() != saved, self.process)

    def stop(self) -> tuple[str, str]:
        """Stop the run and return what it printed."""
        wait_until(lambda: not (self.folder / "STOP").exists(), self.process)
        (self.folder / "STOP").touch()
        output, errors = self.wait()
        assert self.process.returncode == 75, output + errors
        return output, errors


def events(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if "loss" in event]


@pytest.mark.parametrize("fault", ["link", *soak("processes", "reboot")])
def test_training_continues_without_a_host_and_takes_it_back(
    cluster: Cluster, pools: dict[int, RankPool], tmp_path: Path, wordpiece_corpus: Path, fault: str
) -> None:
    """Catches a run that waits for a lost host, does not use a host that is back, or skips or repeats a batch."""
    head, second, _ = cluster.hosts
    run = Run(tmp_path, wordpiece_corpus, [head, second])
    run.start(head)
    run.wait_for_attempt(1)
    if fault == "processes":
        second.run("pkill", "-KILL", "python")
        run.wait_for_attempt(2)
    elif fault == "link":
        second.disconnect()
        run.wait_for_attempt(2)
        assert second.processes() == [], "orphans"
        wait_until(lambda: not [line for line in head.processes() if "node-2 export" in line])  # of pdsh
        second.reconnect()
        run.wait_for_attempt(3)
    else:
        second.shut_down()
        run.wait_for_attempt(2)
        second.start({})
        run.wait_for_attempt(3)
    _, errors = run.stop()
    first, *others = run.attempts()
    print(errors, *run.attempts(), sep="\n")
    assert first["cause"] in (Cause.LOST_HOST, Cause.KILLED, Cause.LOST_RANK)
    if fault != "processes":
        assert [list(attempt["hosts"]) for attempt in others] == [["node-1"], ["node-1", "node-2"]]
        assert "node-2" in first["message"]
        assert "without node-2" in errors
    assert "Traceback" not in errors

    seen = events(run.folder)
    assert [event["step"] for event in seen] == list(range(1, len(seen) + 1))
    pools[1].run(pretrain_case, run.config(tmp_path / "undisturbed", steps=len(seen)))
    undisturbed = events(tmp_path / "undisturbed")
    assert [event["tokens"] for event in seen] == [event["tokens"] for event in undisturbed]
    assert [event["loss"] for event in seen] == pytest.approx([event["loss"] for event in undisturbed], abs=1e-2)


@pytest.mark.soak  # outside soak, `test_a_stop_before_training_ends_the_ranks_at_once` has stand-ins for the hosts
def test_a_stop_while_ranks_wait_for_each_other_ends_all_hosts(
    cluster: Cluster, tmp_path: Path, wordpiece_corpus: Path
) -> None:
    """Catches ranks that wait for one that has stopped, longer than a batch system waits, and print a stack dump."""
    head, second, _ = cluster.hosts
    run = Run(tmp_path, wordpiece_corpus, [head, second])
    sleep = f"if 'pretrain.run' in sys.orig_argv and os.uname().nodename == {second.name!r}: time.sleep(3600)\n"
    run.start(head, patch=f"import os{PATIENT}{sleep}")
    wait_until((run.folder / "logs" / "rank-0.json").exists, run.process)
    _, errors = run.stop()
    assert errors.endswith("deepcloze: stopped before the first step; run the same command again\n")
    assert "frame #" not in errors
    for host in (head, second):
        wait_until(lambda host=host: host.processes() == [])  # type: ignore[misc]  # killed, but may still be listed


@pytest.mark.soak
def test_a_killed_guard_leaves_nothing(cluster: Cluster, tmp_path: Path, wordpiece_corpus: Path) -> None:
    """Catches ranks and secrets that stay on a host whose guard alone was killed, because memory ran out."""
    head, second, _ = cluster.hosts
    run = Run(tmp_path, wordpiece_corpus, [head, second])
    run.start(head, "--max_restarts=0")
    run.wait_for_attempt(1)
    assert second.run("pkill", "-KILL", "-f", "launcher.hosts.host_guard").returncode == 0
    output, errors = run.wait()
    assert run.process.returncode == 1, output + errors
    assert errors.endswith("the run failed: lost node-2: the connection was closed\n")
    for host in (head, second):
        wait_until(lambda host=host: host.processes() == [])  # type: ignore[misc]
        assert host.run("find", "/dev/shm", "-name", "*deepcloze-*").stdout == ""


def test_a_killed_launcher_leaves_nothing_and_its_secrets_stay_secret(
    cluster: Cluster, tmp_path: Path, wordpiece_corpus: Path
) -> None:
    """Catches orphans, two launches that train in one folder, and a password that other users of a host can read."""
    head, second, third = cluster.hosts
    run = Run(tmp_path, wordpiece_corpus, [head, second])
    variables = (f"MY_SECRET={SECRET}", f"WANDB_API_KEY={SECRET}")
    launcher = run.start(third, f"--env={PATCH},MY_SECRET", variables=variables)
    run.wait_for_attempt(1)
    for host in (head, second):
        ranks = host.run("pgrep", "-f", "pretrain.run").stdout.split()
        for rank in ranks:
            environ = host.run("cat", f"/proc/{rank}/environ").stdout.split("\0")
            assert set(variables) <= set(environ)
    for host in cluster.hosts:
        assert not [line for line in host.processes() if KEYWORD in line]
        # Not the folders of this machine that are mounted there, such as this repository.
        search = ("find", "/tmp", "/run", "-xdev", "-type", "f", "-exec", "grep", "-ls", KEYWORD, "{}", "+")
        assert host.run(*search).stdout == ""
        files = host.run("find", "/dev/shm", "-type", "f", "-name", "deepcloze-*", "-perm", "/077").stdout
        assert files == ""
    assert not grep(tmp_path, KEYWORD)

    other = Run(tmp_path, wordpiece_corpus, [second])
    refused = other.start(second)
    _, errors = other.wait()
    assert refused.returncode == 2, errors
    assert "another deepcloze process" in errors

    third.run("pkill", "-KILL", "-f", "launcher pretrain")
    launcher.wait(LIMIT)
    wait_until(lambda: not any(host.processes() for host in cluster.hosts))
    for host in cluster.hosts:
        assert host.run("find", "/dev/shm", "-name", "deepcloze-*").stdout == ""


def running_on_two(cluster: Cluster, tmp_path: Path, corpus: Path) -> tuple[Host, Run]:
    """The second host of a run that trains on two, and the run."""
    head, second, _ = cluster.hosts
    run = Run(tmp_path, corpus, [head, second])
    run.start(head)
    run.wait_for_attempt(1)
    return second, run


def grep(folder: Path, text: str) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file() and text.encode() in path.read_bytes()]


@pytest.mark.soak
def test_a_rank_that_stops_on_another_host_is_named_with_its_stack(
    cluster: Cluster, tmp_path: Path, wordpiece_corpus: Path
) -> None:
    """Catches a stack that is missing because the rank, which cannot write it while it is stopped, is elsewhere."""
    second, run = running_on_two(cluster, tmp_path, wordpiece_corpus)
    record = json.loads((run.folder / "logs" / "rank-1.json").read_text())
    assert second.run("kill", "-STOP", str(record["pid"])).returncode == 0
    run.wait_for_attempt(2)
    _, errors = run.stop()
    first, *_ = run.attempts()
    assert (first["outcome"], first["cause"]) == ("failed", Cause.HUNG)
    assert first["message"].startswith(f"node-2, rank 1 (process {record['pid']}) hangs: no sign of life")
    assert "the main thread of rank 1, innermost call first" in first["message"]
    # The message has only the innermost calls.
    assert "pretrain/run.py" in (run.folder / "logs" / "rank-1.log").read_text()
    assert first["message"] in errors


@pytest.mark.soak
def test_a_warning_to_all_processes_of_a_host_saves_a_checkpoint(
    cluster: Cluster, tmp_path: Path, wordpiece_corpus: Path
) -> None:
    """Catches ranks that are killed before they have saved because SIGUSR1 ends a guard or DeepSpeed's launcher."""
    second, run = running_on_two(cluster, tmp_path, wordpiece_corpus)
    assert second.run("pkill", "-USR1", "python").returncode == 0
    run.wait_for_attempt(2)
    run.stop()
    first, *_ = run.attempts()
    assert (first["outcome"], first["cause"]) == ("stopped", Cause.SIGNAL)
    assert first["message"].startswith("stopped: node-2, rank 1: signal SIGUSR1")


@pytest.mark.soak
def test_a_signal_to_all_processes_of_the_launching_machine_saves_a_checkpoint(
    cluster: Cluster, tmp_path: Path, wordpiece_corpus: Path
) -> None:
    """Catches ranks that are killed on all hosts before they have saved because systemd or a batch system ends ssh,
    pdsh and DeepSpeed's launcher together with `deepcloze`."""
    head, second, third = cluster.hosts
    run = Run(tmp_path, wordpiece_corpus, [head, second])
    run.start(third)
    run.wait_for_attempt(1)
    # The command lines of ssh and pdsh have it too.
    assert third.run("pkill", "-TERM", "-f", "launcher").returncode == 0
    output, errors = run.wait()
    assert run.process.returncode == 75, output + errors
    (attempt,) = run.attempts()
    reason = "stopped: node-1, rank 0: the launcher got SIGTERM; run the same command again to resume"
    assert (attempt["outcome"], attempt["message"]) == ("stopped", reason)
    assert run.saved() == [checkpoint_path(run.folder / "checkpoints", events(run.folder)[-1]["step"])]
