"""Hosts of a test cluster: namespaces on this machine, connected by a bridge.

Each host has its own processes, network, hostname, /tmp and /dev/shm, and runs sshd. All other files are shared, which
stands for a network disk. Everything ends with the process that made it: namespaces disappear with their last process,
and their first ones are killed when this process dies.
"""

import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Self

import psutil

from fork_server import TITLE
from waiting import LIMIT, wait_until

REPOSITORY = Path(__file__).resolve().parents[2]
_NAMESPACES = ("--net", "--uts", "--mount", "--pid", "--ipc", "--mount-proc")
_SSHD = "/usr/sbin/sshd"


def missing_requirement() -> str | None:
    """What keeps this machine from running a test cluster; None if it can."""
    if os.geteuid() != 0:
        return "a test cluster needs root"
    programs = ("unshare", "nsenter", "setpriv", "ip", "pdsh", "ssh", "ssh-keygen", _SSHD)
    if missing := [program for program in programs if shutil.which(program) is None]:
        return f"a test cluster needs {', '.join(missing)}"
    probe = subprocess.run(["unshare", *_NAMESPACES, "--fork", "true"], capture_output=True, text=True)
    return f"namespaces are not permitted: {probe.stderr.strip()}" if probe.returncode else None


class Host:
    """One host of a cluster. Its name resolves on all hosts."""

    def __init__(self, name: str, address: str, folder: Path, switch: int, environment: Mapping[str, str]) -> None:
        """`folder`: the cluster's. `switch`: a process in the namespace of the bridge. `environment`: of its ssh
        sessions."""
        self.name = name
        self.address = address
        self._folder = folder
        self._switch = switch
        self.start(environment)

    def run(self, *argv: str, **options: Any) -> subprocess.CompletedProcess[str]:
        """Run a command on the host and capture its output."""
        process = self.popen(*argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)
        stdout, stderr = process.communicate(timeout=LIMIT)
        return subprocess.CompletedProcess(argv, process.returncode, stdout, stderr)

    def popen(self, *argv: str, **options: Any) -> subprocess.Popen[str]:
        """Start a command on the host."""
        return subprocess.Popen(self._enter(*argv), text=True, **options)

    @contextmanager
    def suspended(self, command: subprocess.Popen[Any]) -> Iterator[None]:
        """Stop the process of a command that `popen` started, and continue it after the block."""
        processes = [psutil.Process(pid) for pid in (command.pid, _child_of(command.pid))]
        processes[1].suspend()
        wait_until(lambda: all(process.status() == psutil.STATUS_STOPPED for process in processes))  # nsenter follows
        try:
            yield
        finally:
            for process in processes:
                process.resume()

    def processes(self) -> list[str]:
        """The command lines of all processes on the host but sshd, the fork server, and those that are ending:
        of the last, ps shows the name in brackets."""
        lines = [line.split(None, 1) for line in self.run("ps", "-ww", "-eo", "state=,args=").stdout.splitlines()]
        ignored = ("[", "sshd", _SSHD, "ps -ww", TITLE)
        return [args for state, args in lines if state != "Z" and not args.startswith(ignored)]

    def disconnect(self) -> None:
        """Cut the host off from the others, as if its cable were pulled."""
        self._set_link("down")

    def reconnect(self) -> None:
        self._set_link("up")

    def reboot(self, environment: Mapping[str, str] | None = None) -> None:
        """Kill all its processes at once and start it again, connected."""
        self.shut_down()
        self.start(environment or {})

    def shut_down(self) -> None:
        """Kill all its processes at once, as if its power failed."""
        with suppress(ProcessLookupError):
            os.kill(self.first_process, signal.SIGKILL)
        self._process.wait()
        _ip(self._switch, f"link delete to-{self.name}", check=False)  # the kernel removes it too, some time later

    def start(self, environment: Mapping[str, str]) -> None:
        """Start it again after `shut_down`."""
        setup = self._setup_script(environment)
        self._process = _unshare(*_NAMESPACES, argv=["sh", "-ec", setup])
        self.first_process = _child_of(self._process.pid)
        bridge_end = f"to-{self.name}"
        _ip(self._switch, f"link add {bridge_end} type veth peer name eth0 netns {self.first_process}")
        _ip(self._switch, f"link set {bridge_end} master bridge up")
        for command in ("link set lo up", f"address add {self.address}/24 dev eth0", "link set eth0 up"):
            _ip(self.first_process, command)
        wait_until(self._sshd_answers)

    def _setup_script(self, environment: Mapping[str, str]) -> str:
        """Shell commands of the host's first process, which becomes its sshd."""
        shared = [self._folder.parent, REPOSITORY, Path(sys.prefix).resolve()]
        hidden = [path for path in shared if path.is_relative_to("/tmp")]  # would vanish below the new /tmp
        script = [f"hostname {self.name}", "mount -t tmpfs tmpfs /mnt"]
        for number, path in enumerate(hidden):
            script += [f"mkdir /mnt/{number}", f"mount --bind {shlex.quote(str(path))} /mnt/{number}"]
        script += ["mount -t tmpfs tmpfs /tmp", "chmod 1777 /tmp", "mount -t tmpfs tmpfs /dev/shm"]
        for number, path in enumerate(hidden):
            quoted = shlex.quote(str(path))
            script += [f"mkdir -p {quoted}", f"mount --bind /mnt/{number} {quoted}"]
        script += [
            f"mount --bind {self._folder}/ssh /etc/ssh",
            f"mount --bind {self._folder}/hosts /etc/hosts",
            "mount -t tmpfs tmpfs /run",
            "mkdir /run/sshd",
            # bash reads it for each command of ssh, and what it starts there may take longer than the command.
            "[ ! -e ~/.bashrc ] || mount --bind /dev/null ~/.bashrc",
        ]
        variables = " ".join(f"{name}={value}" for name, value in environment.items())
        options = ["-o", f"SetEnv {variables}"] if variables else []
        command = [_SSHD, "-D", "-E", str(self._folder / f"sshd-{self.name}.log"), *options]
        return "\n".join([*script, f"exec {shlex.join(command)}"])

    def _sshd_answers(self) -> bool:
        return self.run("bash", "-c", "exec 3<>/dev/tcp/127.0.0.1/22").returncode == 0

    def _enter(self, *argv: str) -> list[str]:
        return ["nsenter", f"--target={self.first_process}", "--all", f"--wdns={REPOSITORY}", "--", *argv]

    def _set_link(self, state: str) -> None:
        _ip(self._switch, f"link set to-{self.name} {state}")


class Cluster:
    """`count` hosts named node-1, node-2, … in one network."""

    def __init__(self, folder: Path, count: int) -> None:
        """`folder`: for keys and logs; its parent is shared by the hosts."""
        names = {f"node-{number}": f"10.77.0.{number}" for number in range(1, count + 1)}
        _write_ssh_folder(folder / "ssh", names)
        hosts = "".join(f"{address} {name}\n" for name, address in names.items())
        (folder / "hosts").write_text(f"127.0.0.1 localhost\n{hosts}", encoding="utf-8")
        self._switch = _unshare("--net", argv=["sleep", "infinity"])
        switch = _child_of(self._switch.pid)
        _ip(switch, "link add bridge type bridge")
        _ip(switch, "link set bridge up")
        self.hosts = [Host(name, address, folder, switch, {}) for name, address in names.items()]

    def reboot(self) -> None:
        """Restart all hosts, which ends whatever runs on them."""
        for host in self.hosts:
            host.reboot()

    def close(self) -> None:
        for host in self.hosts:
            host.shut_down()
        self._switch.kill()
        self._switch.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _write_ssh_folder(folder: Path, names: Mapping[str, str]) -> None:
    """What stands for /etc/ssh: one key pair, which all hosts have and accept."""
    folder.mkdir(parents=True)
    key = folder / "key"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key)], check=True)
    public = key.with_suffix(".pub").read_text(encoding="utf-8")
    known = "".join(f"{name},{address} {public}" for name, address in names.items())
    (folder / "known_hosts").write_text(known, encoding="utf-8")
    client = "IdentityFile /etc/ssh/key\nGlobalKnownHostsFile /etc/ssh/known_hosts\nUserKnownHostsFile /dev/null\n"
    (folder / "ssh_config").write_text(f"{client}StrictHostKeyChecking yes\nUpdateHostKeys no\n", encoding="utf-8")
    server = "HostKey /etc/ssh/key\nAuthorizedKeysFile /etc/ssh/key.pub\nPermitRootLogin yes\nStrictModes no\n"
    (folder / "sshd_config").write_text(f"{server}UsePAM no\nMaxStartups 100\n", encoding="utf-8")


def _unshare(*namespaces: str, argv: Sequence[str]) -> subprocess.Popen[bytes]:
    """Start a command as the first process of new namespaces, which die with this process."""
    command = ["setpriv", "--pdeathsig=KILL", "unshare", *namespaces, "--fork", "--kill-child", "--", *argv]
    return subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def _child_of(pid: int) -> int:
    children = Path(f"/proc/{pid}/task/{pid}/children")
    wait_until(lambda: children.read_text().split())
    return int(children.read_text().split()[0])


def _ip(namespace_of: int, command: str, check: bool = True) -> None:
    """Run an `ip` command in the network namespace of a process."""
    argv = ["nsenter", f"--target={namespace_of}", "--net", "ip", *command.split()]
    done = subprocess.run(argv, capture_output=True, text=True)
    assert not check or done.returncode == 0, f"ip {command}: {done.stderr}"
