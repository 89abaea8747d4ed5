"""Runs as `sitecustomize` when Python starts: hands a command over to the fork server; see fork_server.py."""

import os
import sys

_SCRIPTS = (f"{sys.executable.rpartition('/')[0]}/deepcloze", "/pretrain/run.py")
_MODULES = (
    "launcher",
    "launcher.preflight.measure",
    "pretrain.run",
    "finetune.parallel_seeds",
    "finetune.probe",
    "benchmarks.gpu_kernels",
    "benchmarks.gpu_training",
    "deepspeed.launcher.launch",
    "deepspeed.launcher.runner",
)
_TEST_PROCESS = "import sys;exec(eval(sys.stdin.readline()))"  # of pytest-xdist: what execnet runs


def _command() -> tuple[str | None, list[str], bool] | None:
    """The module, or None for a script, the arguments with the script, and whether `-u` is given. None: another one."""
    flags, rest = [], sys.orig_argv[1:]
    while rest and rest[0] in ("-u", "-P"):
        flags.append(rest.pop(0))
    if len(rest) > 1 and rest[0] == "-m" and rest[1] in _MODULES:
        return rest[1], rest[1:], "-u" in flags
    if rest and (rest[0].endswith(_SCRIPTS) or rest == ["-c", _TEST_PROCESS]):
        return None, rest, "-u" in flags
    return None


def hand_over(folder_of_server: str, module: str | None, argv: list[str], unbuffered: bool) -> None:
    """Returns if there is no server, or if it refuses; otherwise ends the process."""
    import array
    import json
    import resource
    import signal
    import socket

    passed_on = {signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGABRT, signal.SIGTERM}
    passed_on |= {signal.SIGUSR1, signal.SIGUSR2, signal.SIGALRM}
    server = socket.socket(socket.AF_UNIX)
    try:
        descriptor = os.open(folder_of_server, os.O_RDONLY)
        # The path of a socket has at most 107 bytes.
        server.connect(f"/proc/self/fd/{descriptor}/{os.uname().nodename}.socket")
        os.close(descriptor)
    except OSError:
        return
    ignored = [number for number in signal.Signals if signal.getsignal(number) == signal.SIG_IGN]
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, passed_on)
    umask = os.umask(0)
    os.umask(umask)
    folder = os.getcwd()  # noqa: PTH109  # imports little
    first = [] if sys.flags.safe_path else [folder if module else argv[0].rpartition("/")[0]]
    limits = [getattr(resource, name) for name in dir(resource) if name.startswith("RLIMIT_")]
    request = {
        "python": sys.executable,
        "module": module,
        "argv": argv,
        "shown": sys.orig_argv,
        "unbuffered": unbuffered,
        "environ": dict(os.environ),
        "folder": folder,
        "path": first + sys.path,
        "umask": umask,
        "cores": sorted(os.sched_getaffinity(0)),
        "limits": [(number, resource.getrlimit(number)) for number in limits],
        "ignored": ignored,
        "mask": sorted(mask),
    }
    streams = array.array("i", [0, 1, 2])
    text = json.dumps(request).encode() + b"\n"
    with server.makefile("rb") as answers:
        try:
            sent = server.sendmsg([text], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, streams)])
            server.sendall(text[sent:])
            pid = int(answers.readline() or 0)
        except OSError:  # it has ended
            pid = 0
        if not pid and "FORK_SERVER_PATCH" in os.environ:
            sys.exit("the fork server of tests did not take this command, so it would run without its patch")
        if not pid:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            server.close()
            return

        def pass_on(number: int, _frame: object) -> None:
            try:
                os.kill(pid, number)
            except ProcessLookupError:  # it has just ended, and its status follows
                return

        for number in passed_on - set(ignored):
            signal.signal(number, pass_on)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, passed_on)
        status = int(answers.readline() or signal.SIGKILL)
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        if number not in (signal.SIGKILL, signal.SIGSTOP):
            signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
    os._exit(os.waitstatus_to_exitcode(status))


if found := _command():
    hand_over(__file__.rpartition("/")[0], *found)
