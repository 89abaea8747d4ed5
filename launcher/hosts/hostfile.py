"""The hosts of a launch and their slots, from a hostfile or a batch system: SLURM, PBS, the MPI operator of Kubernetes.

A slot holds one rank: a GPU by its number, or a share of the CPU on machines without GPUs. The syntax of hostfiles is
DeepSpeed's. Parsing is stricter: DeepSpeed falls back to the local machine when a hostfile is missing.
"""

import itertools
import re
import socket
from collections import Counter
from collections.abc import Iterator, Mapping
from ipaddress import ip_address
from pathlib import Path

from experiment.errors import UserError
from experiment.files import read_text

Slots = Mapping[str, tuple[int, ...]]
"""Host name -> the slots to use on it, hosts in rank order."""

Hosts = Mapping[str, int]
"""Host name -> the number of its slots, hosts in rank order."""

HOST_NAME = r"(?P<name>[A-Za-z0-9_][A-Za-z0-9_-]{0,62}(?:\.[A-Za-z0-9_-]{1,63})*\.?)"  # parts as in RFC 1035
_LINE = re.compile(HOST_NAME + r"\s+slots=(?P<slots>(?!0+$)[0-9]{1,4})")
_PBS_HOSTFILE = "PBS_NODEFILE"  # has a host once for each of its MPI processes
_MPI_HOSTFILES = ("OMPI_MCA_orte_default_hostfile", "PRTE_MCA_prte_default_hostfile", "HYDRA_HOST_FILE")
_RANKS = ("SLURM_PROCID", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK", "PMI_RANK")  # of srun and mpirun
_MPI_LINE = re.compile(r"(?P<name>\S+?)(?:\s+slots=|:)(?P<slots>[0-9]+)")
_RANGE = r"[0-9]+(?:-[0-9]+)?"
_PART = rf"[A-Za-z0-9_.-]|\[{_RANGE}(?:,{_RANGE})*\]"
_ENTRY = f"(?:{_PART})+"  # of a node list of SLURM


def read_hostfile(path: Path | str) -> Hosts:
    """Read the hosts of a hostfile, in file order. Raises UserError for a file that cannot be read and for whatever
    `parse_hostfile` rejects."""
    return parse_hostfile(read_text(Path(path), "the hostfile"), origin=str(path))


def is_this_machine(host: str) -> bool:
    """Return whether a host name, or the address it resolves to, belongs to this machine."""
    if host == "localhost" or host in (socket.gethostname(), socket.getfqdn()):
        return True
    try:
        address = ip_address(socket.getaddrinfo(host, 0, type=socket.SOCK_DGRAM)[0][4][0])
    except (OSError, ValueError):
        return False
    if address.is_loopback:
        return True
    import psutil  # slow, and few launches need it

    # Binding a socket would tell too, but not with net.ipv4.ip_nonlocal_bind=1, as on routers and load balancers.
    return any(entry.address == str(address) for own in psutil.net_if_addrs().values() for entry in own)


def parse_hostfile(text: str, origin: str = "hostfile") -> Hosts:
    """Parse the text of a hostfile: one `NAME slots=N` per line; blank lines and `# comments` are skipped.

    Raises UserError for any other line, a duplicate host, a host without slots and a text without hosts. The message
    names `origin`, the line number and its content.
    """
    hosts: dict[str, int] = {}
    line_of: dict[str, int] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        if not (entry := line.partition("#")[0].strip()):
            continue
        if (match := _LINE.fullmatch(entry)) is None:
            ssh = "users" if "@" in entry else "ports" if re.match(r"[^:]+:[0-9]+\s", entry) else ""
            hint = f"; {ssh} belong in ~/.ssh/config" if ssh else ""
            if re.match(r"(\S+@)?\[?[0-9a-fA-F]*:[0-9a-fA-F]*:", entry):
                hint = "; IPv6 addresses need names, for instance in /etc/hosts"
            raise UserError(f"{origin}, line {number}: expected 'NAME slots=N', found {entry!r}{hint}")
        host, slots = match["name"], int(match["slots"])
        name = host.lower()  # host names are case-insensitive, see RFC 4343
        if name in line_of:
            raise UserError(f"{origin}, line {number}: duplicate host {host}, already on line {line_of[name]}")
        hosts[host], line_of[name] = slots, number
    if not hosts:
        raise UserError(f"{origin}: no hosts found, expected lines such as 'worker-1 slots=4'")
    return hosts


def allocated_hosts(environ: Mapping[str, str]) -> Hosts | None:
    """Return the hosts of the job that this process runs in, in rank order, with a slot for each GPU or, without GPUs,
    for each task; None outside a job, and in a job on this machine alone, whose devices are counted instead.

    SLURM: SLURM_JOB_NODELIST. PBS: PBS_NODEFILE. Kubernetes: the hostfile of the MPI operator's launcher pod.

    Raises UserError for values that cannot be read, and for the tasks of `srun` or `mpirun` other than the first: one
    `deepcloze` starts all ranks.
    """
    if found := [name for name in _RANKS if environ.get(name, "").strip("0").isdecimal()]:
        started = f"srun or mpirun has started deepcloze several times, {found[0]} is {environ[found[0]]}"
        raise UserError(f"{started}; start it once for the job: it starts all ranks")
    hosts = _hosts_of_job(environ)
    for host in hosts or ():
        if re.fullmatch(HOST_NAME, host) is None:
            raise UserError(f"the job has a host {host!r}; expected a name such as node-1")
    if hosts is not None and not (hosts and all(hosts.values())):
        problem = "a host without slots" if hosts else "no hosts"
        raise UserError(f"the job has {problem}; expected one host or more, each with one slot or more")
    return None if hosts is None or (len(hosts) == 1 and all(map(is_this_machine, hosts))) else hosts


def _hosts_of_job(environ: Mapping[str, str]) -> Hosts | None:
    if "SLURM_JOB_NODELIST" in environ:
        return _slurm_hosts(environ)
    for name in (_PBS_HOSTFILE, *_MPI_HOSTFILES):
        if name in environ:
            path = environ[name]
            text = read_text(Path(path), name)
            hosts = Counter(text.split()) if name == _PBS_HOSTFILE else _mpi_hosts(text, path)
            if not hosts:
                raise UserError(f"{name}: {path} has no hosts")
            return hosts
    return None


def _slurm_hosts(environ: Mapping[str, str]) -> Hosts:
    names = expand_nodelist(environ["SLURM_JOB_NODELIST"])
    gpus = environ.get("SLURM_GPUS_ON_NODE") or environ.get("SLURM_GPUS_PER_NODE", "").rpartition(":")[2]
    if gpus and gpus != "0":
        if not gpus.isdecimal():
            raise UserError(f"SLURM_GPUS_ON_NODE={gpus}: expected a number")
        slots = [int(gpus)] * len(names)
        of_job = [entry.rpartition(":")[2] for entry in environ.get("SLURM_GPUS", "").split(",")]  # by type
        if len(names) > 1 and all(map(str.isdecimal, of_job)) and sum(map(int, of_job)) != sum(slots):
            raise UserError(
                f"the job has GPUs (SLURM_GPUS={environ['SLURM_GPUS']}), but not {gpus} on each of {len(names)} nodes: "
                "ask for them with --gpus-per-node, or give --hostfile"
            )
    elif not gpus and environ.get("SLURM_GPUS"):  # in the shell of `salloc --gpus`
        raise UserError(
            f"the job has GPUs (SLURM_GPUS={environ['SLURM_GPUS']}), but SLURM does not say how many on each node: ask "
            "for them with --gpus-per-node, or give --hostfile"
        )
    else:
        slots = list(_expand_counts(environ.get("SLURM_TASKS_PER_NODE", f"1(x{len(names)})")))
    if len(slots) != len(names):
        raise UserError(
            f"SLURM_TASKS_PER_NODE={environ['SLURM_TASKS_PER_NODE']}: expected {len(names)} numbers, one for each node "
            f"of {environ['SLURM_JOB_NODELIST']}; found {len(slots)}"
        )
    return dict(zip(names, slots, strict=True))


def expand_nodelist(nodelist: str) -> tuple[str, ...]:
    """Return the names in a node list of SLURM, such as `gpu[01-03,7],login`. Raises UserError for one that is
    malformed."""
    if re.fullmatch(f"{_ENTRY}(?:,{_ENTRY})*", nodelist) is None:
        raise UserError(f"SLURM_JOB_NODELIST={nodelist}: expected names such as gpu[01-03,7],login")
    names: list[str] = []
    for entry in re.findall(_ENTRY, nodelist):
        parts = [_expand_ranges(part) for part in re.findall(_PART, entry)]
        names += map("".join, itertools.product(*parts))
    return tuple(names)


def _expand_ranges(part: str) -> list[str]:
    """Return the numbers of `[01-03,7]` with their leading zeros; other parts of a name as they are."""
    if not part.startswith("["):
        return [part]
    numbers: list[str] = []
    for item in part[1:-1].split(","):
        first, _, last = item.partition("-")
        numbers += (str(number).zfill(len(first)) for number in range(int(first), int(last or first) + 1))
    return numbers


def _expand_counts(counts: str) -> Iterator[int]:
    """Yield the numbers of `2(x3),1`: 2, 2, 2, 1."""
    for item in counts.split(","):
        if (match := re.fullmatch(r"([0-9]+)(?:\(x([0-9]+)\))?", item)) is None:
            raise UserError(f"SLURM_TASKS_PER_NODE={counts}: expected numbers such as 2(x3),1")
        yield from [int(match[1])] * int(match[2] or 1)


def _mpi_hosts(text: str, path: str) -> Hosts:
    """Read `NAME slots=N` for Open MPI, `NAME:N` for Intel MPI and MPICH. They add up the slots of several lines."""
    hosts: Counter[str] = Counter()
    for number, line in enumerate(text.splitlines(), start=1):
        if entry := line.partition("#")[0].strip():
            if (match := _MPI_LINE.fullmatch(entry)) is None:
                raise UserError(f"{path}, line {number}: expected 'NAME slots=N' or 'NAME:N', found {entry!r}")
            hosts[match["name"]] += int(match["slots"])
    return hosts
