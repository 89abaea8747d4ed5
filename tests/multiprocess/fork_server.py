"""Process that has imported torch, transformers and DeepSpeed, and forks in 0.1 s what would import them for seconds:
ranks of a pool, and commands that tests start.

A command is `deepcloze`, `python -m launcher`, one of DeepSpeed's launchers or a rank of a run or of preflight. With
`FOLDER` of the server first in PYTHONPATH, Python runs `hand_over.py` as it starts. It sends its arguments,
environment, working directory and standard streams to the server, which forks a process that runs the command with
them. The first process stays: it passes signals on, ends with the same exit code or signal, and if it is killed, the
forked one is killed too. Both show the arguments and the environment of the command in /proc. What differs from a real
start: the forked process is not in the process group of the first one, settings of glibc do not apply, all processes
hash strings alike, and runs record the commit that the server has found. A test of such things has the mark
`real_start`.

The server is single-threaded. It can serve in the namespaces of another process, too. With several test processes, the
first one, which runs no tests, has a server from which the others and their servers are forked, as a command is: the
libraries are imported once.
"""

import array
import ctypes
import functools
import gc
import json
import os
import platform
import resource
import select
import signal
import socket
import sys
import types
from collections.abc import Callable
from contextlib import suppress
from multiprocessing import set_start_method
from multiprocessing.connection import Connection
from multiprocessing.reduction import recv_handle
from pathlib import Path
from typing import Any, NoReturn

import hand_over
from frozen_imports import freeze_imports

TITLE = "fork server of tests"
PATCH = "FORK_SERVER_PATCH"  # a variable: a file with Python code that commands run first
PADDING = "FORK_SERVER_PADDING"  # an argument and a variable: the room for those of commands in /proc
_NAMESPACES = ("ipc", "uts", "net", "pid", "mnt")
# Libraries read these variables when they are imported: with other values, a command starts in the usual way.
_READ_AT_IMPORT = ("DS_", "HF_", "TRANSFORMERS_", "TORCH", "PYTORCH_", "LD_", "GOMP_", "KMP_", "MKL_", "MPL")
_LIBC = ctypes.CDLL(None, use_errno=True)


def main(requests: Connection) -> NoReturn:
    """Serve until the other end of `requests` is closed. First receives the socket of `listen` there."""
    listener = socket.socket(fileno=recv_handle(requests))
    ready, _, _ = select.select([requests, listener], [], [])
    with socket.socket(fileno=os.dup(requests.fileno())) as stream:
        if requests in ready and not stream.recv(1, socket.MSG_PEEK):
            os._exit(0)  # nobody has needed the server
    _import_everything()
    # SIGINT: Ctrl-C reaches the whole process group, and pytest handles it. SIGCHLD: leaves no zombies.
    for number in (signal.SIGINT, signal.SIGCHLD):
        signal.signal(number, signal.SIG_IGN)
    while True:
        ready, _, _ = select.select([requests, listener], [], [])
        if listener in ready:
            _serve(listener, requests)
        if requests in ready:
            try:
                kind, *arguments = requests.recv()
            except EOFError:
                os._exit(0)
            fork = {"ranks": _fork_ranks, "namespaces": _serve_in_namespaces}[kind]
            requests.send(fork(requests, listener, *arguments))


def listen(folder: Path) -> socket.socket:
    """Where the processes of this host find the server, and wait for it. `hand_over.py` knows the name."""
    name = f"{os.uname().nodename}.socket"
    (folder / name).unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX)
    descriptor = os.open(folder, os.O_RDONLY)
    listener.bind(f"/proc/self/fd/{descriptor}/{name}")  # the path of a socket has at most 107 bytes
    os.close(descriptor)
    listener.listen(100)
    return listener


def _import_everything() -> None:
    gc.disable()
    import deepspeed.comm.mori
    import deepspeed.launcher.launch
    import deepspeed.launcher.runner
    import deepspeed.module_inject.auto_ep_layer
    import deepspeed.runtime.superoffload.superoffload_stage3
    import pytest  # by the cases of ranks
    import sklearn.metrics
    import torch
    import transformers.models.bert.modeling_bert
    import transformers.models.bert.tokenization_bert

    import finetune.run
    import finetune.serve.server
    import launcher.cli
    import launcher.launch
    import pretrain.run
    from pretrain.engine.initialization import _import_muon

    _import_muon()  # as an engine does: without torch's compiler
    del deepspeed, pytest, sklearn, transformers, finetune, launcher, pretrain
    look_up_versions_once()
    set_start_method("fork", force=True)  # for processes that ranks start: the default on Linux
    torch.set_num_threads(1)  # torch may have been imported before the variable was set
    torch.set_printoptions(threshold=0, edgeitems=1)  # at ZeRO 3, DeepSpeed formats all parameters, and prints none
    freeze_imports()
    gc.enable()


def look_up_versions_once() -> None:
    """Look up the commit and the versions of libraries now, and not in each run of this process and of forked ones."""
    from experiment.files import REPOSITORY
    from experiment.run_files import provenance

    for name in ("git_state", "_version"):
        setattr(provenance, name, functools.cache(getattr(provenance, name)))
    provenance.git_state(REPOSITORY)
    for library in ("deepcloze", *provenance.LIBRARIES):
        provenance._version(library)


def _undo_changes_of_libraries() -> None:
    """In a process that tests run in: they test what `_import_everything` replaces."""
    import torch

    from experiment.process import fast_imports
    from experiment.run_files import provenance

    torch.set_printoptions(profile="default")
    fast_imports.gc = gc
    for name in ("git_state", "_version"):
        setattr(provenance, name, getattr(provenance, name).__wrapped__)


def _fork(child: Callable[[], NoReturn]) -> int:
    pid = os.fork()
    if pid == 0:
        try:
            child()
        except BaseException:
            sys.excepthook(*sys.exc_info())
        os._exit(1)
    return pid


def _fork_ranks(requests: Connection, listener: socket.socket, size: int, address: str, port: int) -> list[int]:
    from rank_pool import rank_main

    def child(rank: int) -> NoReturn:
        requests.close()
        listener.close()
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        rank_main(rank, size, address, port)

    return [_fork(lambda rank=rank: child(rank)) for rank in range(size)]  # type: ignore[misc]


def _serve_in_namespaces(requests: Connection, listener: socket.socket, process: int, folder: Path) -> bool:
    """Fork a server that lives in the namespaces of a process, and ends with them."""

    def serve() -> NoReturn:
        platform._uname_cache = None  # type: ignore[attr-defined]  # the name of the host
        _show([TITLE], {})
        inner = listen(folder)
        os.write(ready, b"1")
        os.close(ready)
        while True:
            _serve(inner, None)

    def enter() -> NoReturn:
        requests.close()
        listener.close()
        os.close(done)
        files = [os.open(f"/proc/{process}/ns/{name}", os.O_RDONLY | os.O_CLOEXEC) for name in _NAMESPACES]
        for file in files:
            if _LIBC.setns(file, 0):
                raise OSError(ctypes.get_errno(), "setns")
            os.close(file)
        os.chdir("/")
        pid = _fork(serve)  # a process changes its own namespace of processes only by forking
        os.close(ready)
        os.waitpid(
            pid, 0
        )  # or the first process of the machine reaps it, perhaps seconds later, and the host ends then
        os._exit(0)

    done, ready = os.pipe()
    _fork(enter)
    os.close(ready)
    with open(done, "rb") as reader:
        return reader.read() == b"1"


def _serve(listener: socket.socket, requests: Connection | None) -> None:
    client, _ = listener.accept()

    def child() -> NoReturn:
        listener.close()
        if requests is not None:
            requests.close()
        _serve_client(client)

    _fork(child)
    client.close()


def _serve_client(client: socket.socket) -> NoReturn:
    """Run one command in a child process, and tell the client how it ends. Kill it if the client is killed."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    _show([TITLE], {})
    request, streams = _receive(client)
    environ = request["environ"]
    if request["python"] != sys.executable or any(_differs(name, value) for name, value in environ.items()):
        client.sendall(b"0\n")
        os._exit(0)
    signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())  # the child gets none before it is ready
    pid = _fork(lambda: _run_command(request, streams, client))
    for stream in streams:
        os.close(stream)
    handle = os.pidfd_open(pid)
    with suppress(BrokenPipeError):
        client.sendall(f"{pid}\n".encode())
    ready, _, _ = select.select([client, handle], [], [])
    if handle not in ready:
        # DeepSpeed's launcher is killed together with its process group, in which its ranks are.
        (os.killpg if "deepspeed" in str(request["module"]) else os.kill)(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    with suppress(BrokenPipeError):
        client.sendall(f"{status}\n".encode())
    os._exit(0)


def _receive(client: socket.socket) -> tuple[dict[str, Any], list[int]]:
    first, controls, _, _ = client.recvmsg(1 << 16, socket.CMSG_SPACE(3 * array.array("i").itemsize))
    streams = array.array("i")
    for _, _, data in controls:
        streams.frombytes(data)
    with client.makefile("rb") as reader:
        return json.loads(first + reader.readline() if not first.endswith(b"\n") else first), list(streams)


def _differs(name: str, value: str) -> bool:
    # By deepspeed.launcher.runner, which is the program, and by torch, which sets its variable, when it compiles.
    read_again = name in ("DS_ENV_FILE", "TORCHINDUCTOR_CACHE_DIR")
    return name.startswith(_READ_AT_IMPORT) and not read_again and os.environ.get(name) != value


def _run_command(request: dict[str, Any], streams: list[int], client: socket.socket) -> NoReturn:
    """Become the process of the request."""
    import runpy

    import torch

    client.close()
    os.setsid()
    os.umask(request["umask"])
    os.chdir(request["folder"])
    os.sched_setaffinity(0, request["cores"])
    for number, limits in request["limits"]:
        resource.setrlimit(number, limits)
    for descriptor, stream in enumerate(streams):
        os.dup2(stream, descriptor)
        os.close(stream)
    os.environ.clear()
    _LIBC.clearenv()  # `_show` has overwritten what the entries of C's `environ` pointed to
    os.environ.update(request["environ"])
    _show(request["shown"], request["environ"])
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", len(request["cores"]))))
    for output in (sys.stdout, sys.stderr):
        output.reconfigure(line_buffering=output.isatty(), write_through=request["unbuffered"])  # type: ignore[union-attr]
    sys.path[:] = request["path"]
    sys.argv = request["argv"]
    sys.orig_argv = request["shown"]
    _reset_signals(request["ignored"], request["mask"])
    try:
        if PATCH in os.environ:
            exec(Path(os.environ[PATCH]).read_text(), {})
        if request["module"]:
            sys.modules.pop(request["module"], None)  # Python warns of a program that has been imported
            runpy.run_module(request["module"], run_name="__main__", alter_sys=True)
        elif request["argv"][0] == "-c":  # a test process
            _undo_changes_of_libraries()
            sys.modules["__main__"] = types.ModuleType("__main__")
            exec(request["argv"][1], vars(sys.modules["__main__"]))
        else:
            runpy.run_path(request["argv"][0], run_name="__main__")
    except SystemExit as ending:
        if isinstance(ending.code, str):
            print(ending.code, file=sys.stderr)
        _exit(ending.code if isinstance(ending.code, int) else int(ending.code is not None))
    except BaseException:
        sys.excepthook(*sys.exc_info())
        _exit(1)
    _exit(0)


def _reset_signals(ignored: list[int], mask: list[int]) -> None:
    """As at the start of Python."""
    for number in set(signal.Signals) - {signal.SIGKILL, signal.SIGSTOP}:
        signal.signal(number, signal.SIG_IGN if number in ignored else signal.SIG_DFL)
    if signal.SIGINT not in ignored:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _exit(code: int) -> NoReturn:
    for output in (sys.stdout, sys.stderr):
        with suppress(OSError):
            output.flush()
    os._exit(code)


def _show(argv: list[str], environ: dict[str, str]) -> None:
    """Set what /proc shows as the command line and the environment of this process."""
    with open("/proc/self/stat", "rb") as file:
        fields = file.read().rpartition(b")")[2].split()
    arg_start, arg_end, env_start, env_end = map(int, fields[45:49])
    variables = [f"{name}={value}" for name, value in environ.items()]
    for start, end, texts in ((arg_start, arg_end, argv), (env_start, env_end, variables)):
        data = b"".join(os.fsencode(text) + b"\0" for text in texts)[: end - start - 1]
        ctypes.memmove(start, data.ljust(end - start, b"\0"), end - start)


if __name__ == "__main__":
    path, parent = json.loads(sys.argv[1])
    if parent:  # does not return, unless that server refuses, or has ended
        hand_over.hand_over(parent, None, [sys.argv[0], json.dumps([path, None])], False)
    sys.path[:] = path
    os.environ.pop(PADDING)
    requests = Connection(os.dup(0))
    with open(os.devnull) as empty:
        os.dup2(empty.fileno(), 0)
    main(requests)
