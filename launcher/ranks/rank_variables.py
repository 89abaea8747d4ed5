"""What MPI and SLURM tell a process about its rank, by the names that torch uses. Pure."""

from collections.abc import Mapping

# Of each source: the variables of RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_SIZE.
_SOURCES = (
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
    ("MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_LOCAL_RANK", "MV2_COMM_WORLD_LOCAL_SIZE"),
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
    ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE"),
)
_NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE")


def rank_variables(environ: Mapping[str, str]) -> dict[str, str]:
    """RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_SIZE of a rank that Open MPI, MVAPICH, MPICH, Intel MPI or srun has
    started; nothing for one that has them, because DeepSpeed's launcher started it.

    In a job of SLURM, its variables are those of the job unless srun has started the process: MPI comes first.
    """
    if "RANK" in environ:
        return {}
    for source in _SOURCES:
        if all(name in environ for name in source):
            values = [environ[name].partition("(")[0].partition(",")[0] for name in source]  # tasks per node: 4(x2)
            return dict(zip(_NAMES, values, strict=True))
    return {}
