"""Ceph's S3 gateway over one storage daemon that keeps everything in memory, without authentication among themselves.

Needs Debian's packages ceph-common, ceph-mon, ceph-osd and radosgw, and root.
"""

import os
import shutil
import subprocess
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from s3_server import KEYS, accepts, free_port
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
        done = subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120, check=True
        )
        return done.stdout

    environment = os.environ | {"CEPH_CONF": str(folder / "ceph.conf")}
    with ExitStack() as daemons:

        def start(*command: str) -> subprocess.Popen[bytes]:
            with (folder / f"{command[0]}.out").open("wb") as output:
                process = subprocess.Popen(command, cwd=folder, env=environment, stdout=output, stderr=output)
            daemons.callback(process.wait)
            daemons.callback(process.kill)
            return process

        call("monmaptool", "--create", "--fsid", fsid, "--addv", "a", f"[v1:127.0.0.1:{port}]", "monmap")
        call("ceph-mon", "--mkfs", "-i", "a", "--monmap", "monmap", "--keyring", "keyring")
        start("ceph-mon", "-i", "a", "-f")
        call("ceph", "osd", "new", storage)
        call("ceph-osd", "-i", "0", "--mkfs", "--osd-uuid", storage)
        start("ceph-osd", "-i", "0", "-f")
        wait_until(lambda: " 1 up" in call("ceph", "osd", "stat"))
        server = start("radosgw", "-n", "client.rgw", "-f")
        wait_until(lambda: accepts(gateway), server)
        keys = (f"--access-key={KEYS['AWS_ACCESS_KEY_ID']}", f"--secret={KEYS['AWS_SECRET_ACCESS_KEY']}")
        call("radosgw-admin", "user", "create", "--uid=test", "--display-name=test", *keys)
        yield gateway
