"""moto's server, which speaks S3, as a process of its own, and a proxy in front of it that makes faults."""

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from socketserver import BaseRequestHandler, ThreadingTCPServer

from rank_pool import free_port
from waiting import wait_until

KEYS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "us-east-1"}
_BLOCK = 1 << 16


def environment(port: int) -> dict[str, str]:
    """The variables with which clients find the server. botocore makes no attempts of its own, to save time."""
    return {**KEYS, "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}", "AWS_MAX_ATTEMPTS": "1"}


def new_bucket() -> str:
    """The URL of a new bucket on the server that the environment names."""
    import s3fs

    name = f"bucket-{os.urandom(4).hex()}"
    s3fs.S3FileSystem().mkdir(name)
    return f"s3://{name}"


def accepts(port: int) -> bool:
    with suppress(OSError), socket.create_connection(("127.0.0.1", port), 1.0):
        return True
    return False


@contextmanager
def moto_server() -> Iterator[int]:
    """The port of a new server without buckets."""
    port = free_port()
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_until(lambda: accepts(port), process)
        yield port
    finally:
        process.kill()
        process.wait()


def response(status: str, code: str, message: str = "") -> bytes:
    """What S3 answers in case of an error."""
    body = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>{message or code}</Message></Error>".encode()
    head = f"HTTP/1.1 {status}\r\nContent-Type: application/xml\r\nContent-Length: {len(body)}\r\n"
    return head.encode() + b"Connection: close\r\n\r\n" + body


@dataclass
class Fault:
    """What happens to a connection."""

    answer: bytes | None = None  # instead of the server's
    cut_after: int | None = None  # bytes from the server, then the connection is closed
    bytes_per_second: int | None = None  # from the server


@dataclass
class Proxy:
    port: int
    faults: list[Fault] = field(default_factory=list)  # of the next connections, in order
    lasting: Fault | None = None  # of all that follow
    met: int = 0  # faults so far

    def next_fault(self) -> Fault | None:
        fault = self.faults.pop(0) if self.faults else self.lasting
        self.met += fault is not None
        return fault


@contextmanager
def proxy(server_port: int) -> Iterator[Proxy]:
    """A TCP proxy in front of a server; it makes no faults unless it is told to."""

    class Handler(BaseRequestHandler):
        def handle(self) -> None:
            fault = made.next_fault()
            with suppress(OSError):
                if fault is not None and fault.answer is not None:
                    head, end, body = fault.answer.partition(b"\r\n\r\n")
                    asked = _read_request(self.request)
                    self.request.sendall(head + end + (b"" if asked.startswith(b"HEAD") else body))
                    return
                with socket.create_connection(("127.0.0.1", server_port)) as server:
                    threading.Thread(target=_copy, args=(self.request, server, None), daemon=True).start()
                    _copy(server, self.request, fault)

    class Server(ThreadingTCPServer):
        allow_reuse_address = True
        daemon_threads = True
        block_on_close = False

    with Server(("127.0.0.1", 0), Handler) as listening:
        made = Proxy(listening.server_address[1])
        threading.Thread(target=listening.serve_forever, args=(0.05,), daemon=True).start()
        yield made
        listening.shutdown()


def _read_request(connection: socket.socket) -> bytes:
    """A request to the end of its head; a body that follows is read as far as it has come."""
    received = b""
    while b"\r\n\r\n" not in received and (block := connection.recv(_BLOCK)):
        received += block
    with suppress(OSError):
        connection.recv(_BLOCK, socket.MSG_DONTWAIT)
    return received


def _copy(source: socket.socket, target: socket.socket, fault: Fault | None) -> None:
    sent = 0
    with suppress(OSError):
        while block := source.recv(_BLOCK):
            if fault is not None and fault.bytes_per_second is not None:
                block_size = max(1, fault.bytes_per_second // 20)
                for start in range(0, len(block), block_size):
                    target.sendall(block[start : start + block_size])
                    time.sleep(0.05)
            elif fault is not None and fault.cut_after is not None and sent + len(block) >= fault.cut_after:
                target.sendall(block[: fault.cut_after - sent])
                break
            else:
                target.sendall(block)
            sent += len(block)
    with suppress(OSError):
        target.shutdown(socket.SHUT_RDWR)
    with suppress(OSError):
        source.shutdown(socket.SHUT_RDWR)
