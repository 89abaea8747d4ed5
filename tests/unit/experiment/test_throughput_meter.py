import pytest
import torch

from experiment.hardware import peak_flops, peak_memory
from experiment.throughput_meter import Throughput


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_tokens_and_waiting_are_those_of_one_lap() -> None:
    """Catches metrics that leak from one logging interval into the next."""
    clock = Clock()
    meter = Throughput(clock)
    with meter.waiting():
        clock.now += 1.0
    clock.now += 3.0
    meter.add(600)
    meter.add(400)
    lap = meter.lap()
    assert (lap.seconds, lap.tokens_per_second, lap.data_wait) == (4.0, 250.0, 0.25)
    clock.now += 2.0
    meter.add(10)
    lap = meter.lap()
    assert (lap.seconds, lap.tokens_per_second, lap.data_wait) == (2.0, 5.0, 0.0)


def test_checkpoints_are_counted_and_excluded() -> None:
    """Catches a save that lowers tokens per second, and seconds that leak into the next interval."""
    clock = Clock()
    meter = Throughput(clock)
    for _ in range(2):
        with meter.saving():
            clock.now += 1.5
        clock.now += 1.0
    meter.add(100)
    lap = meter.lap()
    assert (lap.seconds, lap.tokens_per_second, lap.checkpoint_seconds) == (2.0, 50.0, 3.0)
    assert meter.lap().checkpoint_seconds == 0.0


def test_waiting_that_ends_in_an_exception_counts() -> None:
    """Catches a meter that is left waiting by the end of the data."""
    clock = Clock()
    meter = Throughput(clock)

    def end_of_data() -> None:
        with meter.waiting():
            clock.now += 1.0
            raise StopIteration

    with pytest.raises(StopIteration):
        end_of_data()
    clock.now += 1.0
    assert meter.lap().data_wait == 0.5


def test_a_lap_without_time_is_no_error() -> None:
    """Catches a division by zero on a coarse clock."""
    assert Throughput(Clock()).lap().tokens_per_second == 0.0


def test_memory_is_in_bytes() -> None:
    """Catches KiB taken for bytes: a process with torch in it holds far more than 20 MB and less than a TB."""
    if not torch.cuda.is_available():
        assert 20e6 < peak_memory() < 1e12
    else:
        kept = torch.empty(10**8, dtype=torch.uint8, device="cuda")
        assert kept.numel() <= peak_memory() < 1e12


@pytest.mark.parametrize(
    ("name", "precision", "teraflops"),
    [
        ("NVIDIA H100 80GB HBM3", "bf16", 989.5),
        ("NVIDIA H100 PCIe", "bf16", 756.5),
        ("NVIDIA H100 NVL", "fp16", 835.5),
        ("NVIDIA H200", "bf16", 989.5),
        ("NVIDIA A100-SXM4-80GB", "bf16", 312.0),
        ("NVIDIA A100-PCIE-40GB", "fp32", 19.5),
        ("Tesla V100-SXM2-16GB", "fp16", 125.0),
        ("Tesla V100-PCIE-16GB", "fp16", 112.0),
        ("Tesla V100S-PCIE-32GB", "fp16", 130.0),
        ("NVIDIA L40S", "bf16", 362.05),
        ("NVIDIA A10", "fp16", 125.0),
        ("NVIDIA GeForce RTX 4090", "bf16", 165.2),
        ("AMD Instinct MI300X", "bf16", 1307.4),
    ],
)
def test_peaks_are_dense_and_of_the_right_variant(name: str, precision: str, teraflops: float) -> None:
    """Catches the doubled figures for sparse matrices, and a PCIe card taken for the faster SXM one."""
    assert peak_flops(name, precision) == teraflops * 1e12


@pytest.mark.parametrize(
    ("name", "precision"),
    [
        ("Intel(R) Xeon(R) Platinum 8480+", "bf16"),
        ("cpu", "fp32"),
        ("Tesla V100-SXM2-16GB", "bf16"),
        ("NVIDIA A10G", "bf16"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "bf16"),
        ("NVIDIA GeForce RTX 4090 D", "bf16"),
        ("NVIDIA GH200 480GB", "bf16"),
        ("NVIDIA A100-SXM4-80GB MIG 1g.10gb", "bf16"),
        ("NVIDIA H100 80GB HBM3", "fp8"),
    ],
)
def test_no_peak_is_better_than_a_wrong_one(name: str, precision: str) -> None:
    """Catches an MFU against another device's peak."""
    assert peak_flops(name, precision) is None
