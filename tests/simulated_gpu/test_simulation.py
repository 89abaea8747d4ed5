"""The simulated GPU itself: the device of results, waits of the host, mixed devices, races."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor
from torch.utils._device import _device_constructors

from simulated_gpu.gpu import SimulatedGpu, simulated_gpu

pytest.importorskip("triton")


@pytest.fixture
def gpu() -> Iterator[SimulatedGpu]:
    with simulated_gpu() as gpu:
        yield gpu


def pinned() -> Tensor:
    return torch.ones(3).pin_memory()


def test_results_are_on_the_gpu(gpu: SimulatedGpu) -> None:
    """Catches operators, factories and gradients that lose the device."""
    given = torch.ones(3, device="cuda", requires_grad=True)
    (given * 2).exp().sum().backward()
    made = [torch.empty(2, device=given.device), torch.zeros_like(given), given.new_ones(2), torch.ones(2).cuda()]
    made += [given.detach().half(), given.view(3, 1), torch.tensor([1], device="cuda"), torch.arange(2, device="cuda")]
    assert all(tensor.is_cuda and tensor.device == torch.device("cuda", 0) for tensor in (*made, given.grad))
    assert not any(tensor.is_cuda for tensor in (torch.ones(2), given.detach().cpu(), given.detach().to("cpu")))
    assert (gpu.mixed, gpu.races) == ([], [])


def test_nothing_is_left_of_it() -> None:
    """Catches patches that later tests would see, or that torch would keep in its caches."""
    methods = dict(vars(Tensor))
    _device_constructors.cache_clear()
    with simulated_gpu():
        moved = torch.ones(2).cuda()
        assert moved.is_cuda
        with torch.device("meta"):  # transformers asks so whether it builds a model without weights
            assert torch.tensor([]).is_meta
    with torch.device("meta"):
        assert torch.tensor([]).is_meta
    assert not moved.is_cuda
    assert not torch.cuda.is_available()
    assert dict(vars(Tensor)) == methods


@pytest.mark.parametrize(
    "work",
    [
        Tensor.item,
        float,
        bool,
        lambda value: value.tolist(),
        lambda value: value.cpu(),
        Tensor.nonzero,
        lambda value: torch.equal(value, value),
        lambda value: value[None][value[None] > 0],
        lambda value: value[None][torch.tensor([0])],
        lambda value: torch.ones(3).to(value.device, non_blocking=True),
        lambda value: pinned().to(value.device),
        lambda value: torch.empty(1).copy_(value),
        lambda value: torch.tensor([1.0], device=value.device),
        lambda _: torch.cuda.synchronize(),
        lambda _: torch.cuda.current_stream().synchronize(),
    ],
)
def test_waits_of_the_host_are_recorded(gpu: SimulatedGpu, work: Callable[[Tensor], object]) -> None:
    """Catches tests that would pass although the host waits."""
    value = torch.full((), 2.0, device="cuda")
    pinned().to(value.device, non_blocking=True).mul_(value).half()
    assert gpu.waits == []
    work(value)
    assert len(gpu.waits) == 1


def test_mixed_devices_are_recorded(gpu: SimulatedGpu) -> None:
    """Catches tests that would pass although a tensor is left on the CPU; a number may be."""
    value = torch.ones(3, device="cuda")
    value * torch.tensor(2.0)
    assert gpu.mixed == []
    value * torch.ones(3)
    assert len(gpu.mixed) == 1


@pytest.mark.parametrize("order", ["none", "stream", "event", "host"])
def test_uses_of_memory_without_an_order_are_recorded(gpu: SimulatedGpu, order: str) -> None:
    """Catches races that are not seen, and orders that are not."""
    value, side = torch.zeros(3, device="cuda"), torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        value.add_(1)
        event = torch.cuda.Event()
        event.record()
    match order:
        case "stream":
            torch.cuda.current_stream().wait_stream(side)
        case "event":
            torch.cuda.current_stream().wait_event(event)
        case "host":
            event.synchronize()
    value.mul_(2)
    assert bool(gpu.races) == (order == "none")


@pytest.mark.parametrize("waits", [False, True])
def test_use_of_pinned_memory_during_a_copy_is_recorded(gpu: SimulatedGpu, waits: bool) -> None:
    """Catches buffers that the host writes while they are copied to the GPU, or reads while they are copied from it."""
    buffer = pinned()
    value = buffer.to("cuda", non_blocking=True)
    if waits:
        torch.cuda.synchronize()
    buffer.zero_()
    buffer.copy_(value, non_blocking=True)
    if waits:
        torch.cuda.synchronize()
    buffer.numpy()
    assert len(gpu.races) == (0 if waits else 2)
