"""FLOPs and bytes -> time, energy and cost, at a stated utilisation, bandwidth, power and price."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Rates:
    """What the user states, or its default. None: unknown."""

    peak_flops: float | None  # of a device, dense, at the run's precision
    mfu: float  # share of the peak that is reached while computing
    bandwidth: float  # bytes per second between machines, or between the devices of one
    watts: float | None  # per device
    price: float | None  # per device and hour


@dataclass(frozen=True)
class Cost:
    """What a whole run costs."""

    computing: float  # seconds
    communicating: float  # seconds, counted as not overlapping with computation
    device_hours: float
    kwh: float | None
    price: float | None

    @property
    def seconds(self) -> float:
        return self.computing + self.communicating


def run_cost(flops: float | None, sent: float, ranks: int, rates: Rates, recomputes: bool) -> Cost | None:
    """None if the FLOPs or the device's peak are unknown.

    Args: flops: of the run; sent: bytes per rank in the run; recomputes: activations, a third more computation that
    does not count in `flops`.
    """
    if flops is None or rates.peak_flops is None:
        return None
    computing = flops * (4 / 3 if recomputes else 1) / (ranks * rates.peak_flops * rates.mfu)
    return _priced(computing, sent / rates.bandwidth, ranks, rates)


def budget_cost(cost: Cost, seconds: float, ranks: int, rates: Rates) -> Cost:
    """The cost of a run that ends after `seconds`, with the shares of `cost`."""
    share = seconds / cost.seconds
    return _priced(cost.computing * share, cost.communicating * share, ranks, rates)


def _priced(computing: float, communicating: float, ranks: int, rates: Rates) -> Cost:
    hours = (computing + communicating) / 3600 * ranks
    return Cost(
        computing,
        communicating,
        device_hours=hours,
        kwh=None if rates.watts is None else hours * rates.watts / 1000,
        price=None if rates.price is None else hours * rates.price,
    )
