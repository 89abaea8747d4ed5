import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiment.errors import UserError
from launcher.hosts.hostfile import Host, parse_hostfile, read_hostfile


def test_reads_hosts_in_order_past_comments_and_blank_lines():
    """Catches a lost or reordered host: the order decides which is rank 0."""
    text = "# the cluster\n\nworker-2 slots=4\n\tworker-1.example.org   slots=08  # the new one\r\n10.0.0.7 slots=1"
    assert parse_hostfile(text) == (Host("worker-2", 4), Host("worker-1.example.org", 8), Host("10.0.0.7", 1))


@pytest.mark.parametrize(
    "line",
    [
        "worker-1",
        "worker-1 slots=",
        "worker-1 slots=two",
        "worker-1 slots=300000000",  # would take all memory
        "worker-1 slots = 2",
        "worker-1 slots=-1",
        "worker-1 slots=1.5",
        "worker-1 slots=2 slots=3",
        "worker-1 slot=2",
        "worker-1:2",
        "slots=2",
        "worker-1, worker-2 slots=2",
        "-oProxyCommand=x slots=2",
        "user@worker-1 slots=2",
    ],
)
def test_rejects_a_bad_line_by_its_number(line: str):
    """Catches a bad line that is skipped, which would train on other machines than requested."""
    with pytest.raises(UserError, match=r"cluster, line 3: expected 'NAME slots=N', found " + re.escape(repr(line))):
        parse_hostfile(f"# head\nworker-0 slots=1\n{line}\n", origin="cluster")


@pytest.mark.parametrize("name", ["a", "A"])
def test_rejects_a_duplicate_host(name: str):
    """Catches silently keeping one of two lines, and one machine that counts as two. The message names both."""
    with pytest.raises(UserError, match=rf"line 4: duplicate host {name}, already on line 1"):
        parse_hostfile(f"a slots=1\nb slots=1\n\n{name} slots=2\n")


def test_rejects_a_host_without_slots():
    """Catches a host that is listed but gets no rank."""
    with pytest.raises(UserError, match=r"line 2: b has slots=0"):
        parse_hostfile("a slots=1\nb slots=0\n")


@pytest.mark.parametrize("text", ["", "\n\n", "# only a comment\n"])
def test_rejects_a_hostfile_without_hosts(text: str):
    """Catches an empty hostfile that falls back to the local machine."""
    with pytest.raises(UserError, match="no hosts"):
        parse_hostfile(text)


def test_rejects_a_missing_file(tmp_path: Path):
    """Catches DeepSpeed's own behaviour: a warning, then training on the local machine."""
    with pytest.raises(UserError, match=r"cannot read the hostfile .*none: No such file"):
        read_hostfile(tmp_path / "none")


def test_rejects_a_file_that_is_not_text(tmp_path: Path):
    """Catches a decoding trace for a binary file."""
    (tmp_path / "hosts").write_bytes(b"a slots=1\n\xff\xfe")
    with pytest.raises(UserError, match="not UTF-8"):
        read_hostfile(tmp_path / "hosts")


@given(st.dictionaries(st.from_regex(r"[a-z0-9][a-z0-9.-]{0,8}", fullmatch=True), st.integers(1, 99), min_size=1))
def test_reads_back_what_was_written(hosts: dict[str, int]):
    """Catches names or counts that do not round-trip."""
    text = "".join(f"{name} slots={slots}\n" for name, slots in hosts.items())
    assert parse_hostfile(text) == tuple(Host(name, slots) for name, slots in hosts.items())
