"""Ceph's S3 gateway over one storage daemon that keeps everything in memory, without authentication among themselves.

Daemons and commands sometimes ask the monitor before they know the cluster's id, and it refuses with EPERM. They are
started again, as systemd does.
Needs Debian's packages ceph-common, ceph-mon, ceph-osd and radosgw, and root.
"""

import os
import shutil
import subprocess
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from rank_pool import free_port
from s3_server import KEYS, accepts
from waiting import wait_until

_PROGRAMS = ("ceph", "ceph-mon", "ceph-osd", "monmaptool", "radosgw", "radosgw-admin")
_CONFIG = """
[global]
fsid = {fsid}
mon host = v1:127.0.0.1:{port}
public network = 127.0.0.0/8
auth cluster required = none
auth service required = none
auth client required = none
ms bind msgr2 = false
mon data = {folder}/mon
mon allow pool size one = true
osd data = {folder}/osd
osd objectstore = memstore
osd crush chooseleaf type = 0
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 1
osd pool default pg autoscale mode = off
run dir = {folder}
admin socket = {folder}/$name.asok
log file = {folder}/$name.log
keyring = {folder}/keyring
rgw frontends = beast endpoint=127.0.0.1:{gateway}
"""


def missing() -> str | None:
    """Why there can be no gateway."""
    absent = [program for program in _PROGRAMS if shutil.which(program) is None]
    return f"needs {', '.join(absent)}" if absent else None if os.geteuid() == 0 else "needs root"


@contextmanager
def radosgw_server(folder: Path) -> Iterator[int]:
    """The port of a gateway without buckets, for the credentials of `s3_server.KEYS`."""
    fsid, storage, port, gateway = str(uuid.uuid4()), str(uuid.uuid4()), free_port(), free_port()
    (folder / "mon").mkdir()
    (folder / "osd").mkdir()
    (folder / "keyring").touch()
    (folder / "ceph.conf").write_text(_CONFIG.format(fsid=fsid, port=port, folder=folder, gateway=gateway))

    def call(*command: str) -> str:
        """The output of a command, repeated while it is refused."""
        outputs: list[str] = []

        def accepted() -> bool:
            done = subprocess.run(
                command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120, check=False
            )
            if done.returncode and "EPERM" not in done.stderr and "not permitted" not in done.stderr:
                raise AssertionError(f"{command}: {done.stderr}")
            outputs.append(done.stdout)
            return not done.returncode

        wait_until(accepted)
        return outputs[-1]

    environment = os.environ | {"CEPH_CONF": str(folder / "ceph.conf")}
    with ExitStack() as daemons:

        def start(*command: str) -> subprocess.Popen[bytes]:
            with (folder / f"{command[0]}.out").open("ab") as output:
                process = subprocess.Popen(command, cwd=folder, env=environment, stdout=output, stderr=output)
            daemons.callback(process.wait)
            daemons.callback(process.kill)
            return process

        def keep_running(condition: Callable[[], bool], *command: str) -> None:
            """Start a daemon, again each time it exits, until the condition is true."""
            processes = [start(*command)]

            def reached() -> bool:
                if processes[-1].poll() is not None:
                    processes.append(start(*command))
                return condition()

            wait_until(reached)

        call("monmaptool", "--create", "--fsid", fsid, "--addv", "a", f"[v1:127.0.0.1:{port}]", "monmap")
        call("ceph-mon", "--mkfs", "-i", "a", "--monmap", "monmap", "--keyring", "keyring")
        start("ceph-mon", "-i", "a", "-f")
        call("ceph", "osd", "new", storage)
        call("ceph-osd", "-i", "0", "--mkfs", "--osd-uuid", storage)
        keep_running(lambda: " 1 up" in call("ceph", "osd", "stat"), "ceph-osd", "-i", "0", "-f")
        keep_running(lambda: accepts(gateway), "radosgw", "-n", "client.rgw", "-f")
        keys = (f"--access-key={KEYS['AWS_ACCESS_KEY_ID']}", f"--secret={KEYS['AWS_SECRET_ACCESS_KEY']}")
        call("radosgw-admin", "user", "create", "--uid=test", "--display-name=test", *keys)
        yield gateway
