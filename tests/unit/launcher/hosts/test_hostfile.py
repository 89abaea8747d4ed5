import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiment.errors import UserError
from launcher.hosts.hostfile import allocated_hosts, expand_nodelist, parse_hostfile, read_hostfile


def test_reads_hosts_in_order_past_comments_and_blank_lines():
    """Catches a lost or reordered host: the order decides which is rank 0."""
    text = "# the cluster\n\nworker-2 slots=4\n\tworker-1.example.org   slots=08  # the new one\r\n10.0.0.7 slots=1"
    assert list(parse_hostfile(text).items()) == [("worker-2", 4), ("worker-1.example.org", 8), ("10.0.0.7", 1)]


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
        "worker..1 slots=2",
        f"{64 * 'w'} slots=2",
    ],
)
def test_rejects_a_bad_line_by_its_number(line: str):
    """Catches a bad line that is skipped, which would train on other machines than requested."""
    with pytest.raises(UserError, match=r"cluster, line 3: expected 'NAME slots=N', found " + re.escape(repr(line))):
        parse_hostfile(f"# head\nworker-0 slots=1\n{line}\n", origin="cluster")


@pytest.mark.parametrize(("host", "what"), [("me@worker-1", "users"), ("worker-1:2222", "ports")])
def test_says_where_users_and_ports_belong(host: str, what: str):
    """Catches a refused `USER@HOST` or `HOST:PORT` without a way to name another user or port."""
    with pytest.raises(UserError, match=rf"found '{host} slots=2'; {what} belong in ~/\.ssh/config"):
        parse_hostfile(f"{host} slots=2\n")


def test_takes_no_address_for_a_port():
    """Catches advice on ports for an IPv6 address."""
    advice = "; IPv6 addresses need names, for instance in /etc/hosts"
    with pytest.raises(UserError, match=rf"found '2001:db8:0:0:0:0:0:1 slots=2'{advice}$"):
        parse_hostfile("2001:db8:0:0:0:0:0:1 slots=2\n")


@pytest.mark.parametrize("name", ["a", "A"])
def test_rejects_a_duplicate_host(name: str):
    """Catches silently keeping one of two lines, and one machine that counts as two. The message names both."""
    with pytest.raises(UserError, match=rf"line 4: duplicate host {name}, already on line 1"):
        parse_hostfile(f"a slots=1\nb slots=1\n\n{name} slots=2\n")


def test_rejects_a_host_without_slots():
    """Catches a host that is listed but gets no rank."""
    with pytest.raises(UserError, match=r"line 2: expected 'NAME slots=N', found 'b slots=0'"):
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


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a slots=1\n\xff\xfe", "hosts:2: not UTF-8"),
        ("a slots=1\n".encode("utf-16"), "hosts: UTF-16 text; convert the file first"),
    ],
)
def test_rejects_a_file_that_is_not_text(content: bytes, message: str, tmp_path: Path):
    """Catches a decoding trace for a binary file, and a message that does not say what to do."""
    (tmp_path / "hosts").write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_hostfile(tmp_path / "hosts")


def test_reads_the_file_of_an_editor_on_windows(tmp_path: Path):
    """Catches a byte order mark that becomes part of the first name."""
    (tmp_path / "hosts").write_bytes("\ufeffa slots=1\r\n".encode())
    assert read_hostfile(tmp_path / "hosts") == {"a": 1}


NAMES = st.from_regex(r"[a-z0-9][a-z0-9-]{0,4}(\.[a-z0-9-]{1,4}){0,2}\.?", fullmatch=True)


@given(st.dictionaries(NAMES, st.integers(1, 99), min_size=1))
def test_reads_back_what_was_written(hosts: dict[str, int]):
    """Catches names or counts that do not round-trip."""
    text = "".join(f"{name} slots={slots}\n" for name, slots in hosts.items())
    assert list(parse_hostfile(text).items()) == list(hosts.items())


@pytest.mark.parametrize(
    ("nodelist", "names"),
    [
        ("node7", ["node7"]),
        ("a,b-1.example.org", ["a", "b-1.example.org"]),
        ("gpu[01-03,7],login", ["gpu01", "gpu02", "gpu03", "gpu7", "login"]),
        ("gpu[098-101]", ["gpu098", "gpu099", "gpu100", "gpu101"]),
        ("rack[1-2]n[01,03]-ib", ["rack1n01-ib", "rack1n03-ib", "rack2n01-ib", "rack2n03-ib"]),
    ],
)
def test_node_lists_of_slurm(nodelist: str, names: list[str]) -> None:
    """Catches lost leading zeros, and a range taken for a name."""
    assert list(expand_nodelist(nodelist)) == names


@pytest.mark.parametrize("nodelist", ["", "gpu[", "gpu[1-]", "gpu[a-b]", "gpu]1[", "gpu[1-2", "a b", f"{40 * 'a'}+"])
def test_a_malformed_node_list_is_rejected(nodelist: str) -> None:
    """Catches a launch on hosts that nobody named, and a pattern that takes hours for a long name."""
    with pytest.raises(UserError, match="SLURM_JOB_NODELIST"):
        expand_nodelist(nodelist)


def test_a_node_list_of_thousands_of_hosts() -> None:
    assert len(expand_nodelist("n[0000-4095]")) == 4096


@pytest.mark.parametrize(
    ("variables", "slots"),
    [
        ({"SLURM_GPUS_ON_NODE": "8", "SLURM_TASKS_PER_NODE": "1(x3)"}, [8, 8, 8]),
        ({"SLURM_GPUS_PER_NODE": "h100:4"}, [4, 4, 4]),
        ({"SLURM_GPUS_ON_NODE": "4", "SLURM_GPUS": "h100:12"}, [4, 4, 4]),
        ({"SLURM_GPUS_ON_NODE": "4", "SLURM_GPUS": "a:6,b:6"}, [4, 4, 4]),
        ({"SLURM_GPUS_ON_NODE": "0", "SLURM_TASKS_PER_NODE": "2(x2),5"}, [2, 2, 5]),
        ({}, [1, 1, 1]),
        ({"SLURM_PROCID": "", "PMI_RANK": "none"}, [1, 1, 1]),
    ],
)
def test_slots_of_a_slurm_job(variables: dict[str, str], slots: list[int]) -> None:
    """Catches one rank on a node with eight GPUs, and GPUs counted as CPU tasks."""
    hosts = allocated_hosts({"SLURM_JOB_NODELIST": "n[1-3]", "SLURM_PROCID": "0", **variables})
    assert list(hosts.items()) == list(zip(("n1", "n2", "n3"), slots, strict=True))


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"SLURM_PROCID": "1"}, "srun or mpirun has started deepcloze several times, SLURM_PROCID is 1"),
        ({"OMPI_COMM_WORLD_RANK": "1"}, "has started deepcloze several times, OMPI_COMM_WORLD_RANK is 1"),
        (
            {"SLURM_TASKS_PER_NODE": "1(x2)"},
            "SLURM_TASKS_PER_NODE=1(x2): expected 3 numbers, one for each node of n[1-3]",
        ),
        ({"SLURM_TASKS_PER_NODE": "many"}, "SLURM_TASKS_PER_NODE=many"),
        ({"SLURM_GPUS_ON_NODE": "all"}, "SLURM_GPUS_ON_NODE=all: expected a number"),
        ({"SLURM_GPUS": "16", "SLURM_TASKS_PER_NODE": "1(x3)"}, "SLURM does not say how many on each node"),
        (
            {"SLURM_GPUS_ON_NODE": "4", "SLURM_GPUS": "10"},
            "the job has GPUs (SLURM_GPUS=10), but not 4 on each of 3 nodes",
        ),
        ({"SLURM_TASKS_PER_NODE": "0(x3)"}, "the job has a host without slots"),
        ({"SLURM_JOB_NODELIST": "n[3-1]", "SLURM_GPUS_ON_NODE": "1"}, "the job has no hosts"),
    ],
)
def test_a_slurm_job_that_cannot_be_read_is_rejected(variables: dict[str, str], message: str) -> None:
    """Catches a run in every task of srun, hosts without slots, and GPUs of the first node that are taken for those of
    all."""
    with pytest.raises(UserError) as raised:
        allocated_hosts({"SLURM_JOB_NODELIST": "n[1-3]", **variables})
    assert message in str(raised.value)


def test_a_slurm_job_of_one_node_may_have_more_gpus_than_it_asks_for() -> None:
    """Catches a refused `sbatch --nodes=1 --exclusive --gpus=4` on a node with eight GPUs: they are counted."""
    assert allocated_hosts({"SLURM_JOB_NODELIST": "localhost", "SLURM_GPUS_ON_NODE": "8", "SLURM_GPUS": "4"}) is None


def test_a_pbs_job_lists_a_host_once_for_each_process(tmp_path: Path) -> None:
    """Catches duplicate hosts, and an order other than that of the file, whose first host is rank 0's."""
    (tmp_path / "nodes").write_text("n2\nn2\nn1\nn2\nn1\n", encoding="utf-8")
    hosts = allocated_hosts({"PBS_NODEFILE": str(tmp_path / "nodes")})
    assert list(hosts.items()) == [("n2", 3), ("n1", 2)]


@pytest.mark.parametrize(
    ("variable", "text"),
    [
        (
            "OMPI_MCA_orte_default_hostfile",
            "job-worker-0.job.svc slots=2\n# comment\njob-worker-1.job.svc slots=2\n",
        ),
        ("HYDRA_HOST_FILE", "job-worker-0.job.svc:2\njob-worker-1.job.svc:2\n"),
    ],
)
def test_the_hostfile_of_the_mpi_operator(tmp_path: Path, variable: str, text: str) -> None:
    """Catches a launcher pod that trains alone."""
    (tmp_path / "hostfile").write_text(text, encoding="utf-8")
    hosts = allocated_hosts({variable: str(tmp_path / "hostfile")})
    assert list(hosts.items()) == [("job-worker-0.job.svc", 2), ("job-worker-1.job.svc", 2)]


@pytest.mark.parametrize(
    ("variable", "text"),
    [("PBS_NODEFILE", None), ("PBS_NODEFILE", ""), ("HYDRA_HOST_FILE", None), ("HYDRA_HOST_FILE", "a b c\n")],
)
def test_a_file_of_hosts_that_cannot_be_read_is_rejected(tmp_path: Path, variable: str, text: str | None) -> None:
    """Catches a job on several hosts that falls back to this machine."""
    if text is not None:
        (tmp_path / "hosts").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=str(tmp_path / "hosts")):
        allocated_hosts({variable: str(tmp_path / "hosts")})


@pytest.mark.parametrize(
    ("variable", "text"), [("PBS_NODEFILE", "n1\n-oProxyCommand=id\n"), ("HYDRA_HOST_FILE", "-oProxyCommand=id:2\n")]
)
def test_a_host_that_is_an_option_of_ssh_is_rejected(tmp_path: Path, variable: str, text: str) -> None:
    """Catches a command in a name, which ssh would run."""
    (tmp_path / "hosts").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match="the job has a host '-oProxyCommand=id'"):
        allocated_hosts({variable: str(tmp_path / "hosts")})
    with pytest.raises(UserError, match="the job has a host '-n1'"):
        allocated_hosts({"SLURM_JOB_NODELIST": "n1,-n1"})


def test_outside_a_job_or_in_one_on_this_machine_its_devices_count() -> None:
    """Catches a job on one node that may not use more ranks than SLURM counts tasks."""
    assert allocated_hosts({"HOME": "/root"}) is None
    assert allocated_hosts({"SLURM_JOB_NODELIST": "localhost"}) is None
    assert allocated_hosts({"SLURM_JOB_NODELIST": "another-host"}) == {"another-host": 1}
