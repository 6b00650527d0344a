"""What a step has to send, and how long a link takes for it: a model on paper, to hold against what is measured.

Collectives are counted as a ring does them, the way that sends least: with R ranks an all-reduce of x bytes sends
2 x (R - 1) / R from every rank in 2 (R - 1) messages one after another; a reduce-scatter, an all-gather or an exchange
in pairs sends half of both. Headers and acknowledgements are not counted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

SCALAR = 4
"""Bytes of a float32."""
ROOM = 196
"""float64 numbers in the message with which every step begins, for up to 64 tasks."""
FLAGS = 2
"""Scalars at the end of a task's message: whether the rank failed, whether its heads are finite."""


@dataclass(frozen=True)
class Size:
    """What a step is made of.

    Attributes:
        tasks: T.
        shared: n, the scalars of the trunk.
        heads: h, the scalars of all heads together.
        measured: m, the scalars on which the one-backward form takes norms.
        tensors: parameters of the wrapped optimizer, counted as tensors.
        gloo: whether gloo carries the messages, whose reduce-scatter sends what an all-reduce sends.
    """

    tasks: int
    shared: int
    heads: int
    measured: int
    tensors: int
    gloo: bool = False


@dataclass(frozen=True)
class Sent:
    """What one rank sends in a step: bytes, and messages that wait for each other."""

    bytes: float
    messages: int

    def __add__(self, other: Sent) -> Sent:
        return Sent(self.bytes + other.bytes, self.messages + other.messages)

    def __rmul__(self, times: int) -> Sent:
        return Sent(times * self.bytes, times * self.messages)


def part(size: float, ranks: int) -> Sent:
    """A reduce-scatter of `size` bytes, an all-gather that ends in as many, or an exchange in pairs."""
    return Sent(size * (ranks - 1) / ranks, ranks - 1)


def all_reduce(size: float, ranks: int) -> Sent:
    """The sum of `size` bytes, whole on every rank."""
    return 2 * part(size, ranks)


def _joint(size: Size, ranks: int) -> Sent:
    """One pass from all losses, as DistributedDataParallel reduces it."""
    return all_reduce(SCALAR * (size.shared + size.heads), ranks)


def _floor(size: Size, ranks: int) -> Sent:
    """T reduced passes through the trunk and the heads' gradients, nothing else."""
    return size.tasks * all_reduce(SCALAR * size.shared, ranks) + all_reduce(SCALAR * size.heads, ranks)


def _exact(size: Size, ranks: int) -> Sent:
    return meeting(ranks) + passes(size.tasks, size.shared, ranks) + heads(size, size.heads, ranks)


def _one_backward(size: Size, ranks: int) -> Sent:
    norms = passes(size.tasks, size.measured, ranks)
    return meeting(ranks) + norms + passes(1, size.shared, ranks) + heads(size, size.heads, ranks)


def _gathers(size: Size, ranks: int, passes: int) -> Sent:
    """FSDP2: the trunk before the forward and once for all backward passes, the heads for each pass anew."""
    return 2 * part(SCALAR * size.shared, ranks) + passes * part(SCALAR * size.heads, ranks)


def _reduce_scatter(scalars: int, size: Size, ranks: int) -> Sent:
    return (all_reduce if size.gloo else part)(SCALAR * scalars, ranks)


def _fsdp2_plain(size: Size, ranks: int) -> Sent:
    reduced = _reduce_scatter(size.shared, size, ranks) + _reduce_scatter(size.heads, size, ranks)
    return _gathers(size, ranks, 1) + reduced


def _fsdp2(size: Size, ranks: int) -> Sent:
    """FSDP2 reduces gradients itself; a norm and a flag of each task are joint before its average is taken."""
    reduced = size.tasks * _reduce_scatter(size.shared, size, ranks) + _reduce_scatter(size.heads, size, ranks)
    norms = size.tasks * all_reduce(16, ranks)
    return _gathers(size, ranks, size.tasks) + reduced + meeting(ranks) + norms + heads(size, 0, ranks)


def meeting(ranks: int) -> Sent:
    """What the ranks tell each other before the passes. An all-gather ends in R times the message on every rank."""
    return part(8 * ROOM * ranks, ranks)


def passes(count: int, scalars: int, ranks: int) -> Sent:
    """Gradients of so many passes, the flags of what failed with each."""
    return count * all_reduce(SCALAR * (scalars + FLAGS), ranks)


def heads(size: Size, scalars: int, ranks: int) -> Sent:
    """The message after the passes: gradients of heads, which parameters were reached, rank 0's norms."""
    return all_reduce(SCALAR * (scalars + size.tensors + size.tasks), ranks)


SENT: dict[str, Callable[[Size, int], Sent]] = {
    "plain_ddp": _joint,
    "floor": _floor,
    "exact": _exact,
    "beta0": _exact,
    "one_backward": _one_backward,
    "fsdp2_plain": _fsdp2_plain,
    "fsdp2": _fsdp2,
}


def sent(form: str, size: Size, ranks: int) -> Sent:
    """What each rank sends in a step of the form; nothing where there is one rank."""
    return SENT[form](size, ranks)


def seconds(size: float, bandwidth: float, latency: float, messages: int) -> float:
    """How long a link is busy: `size` bytes at `bandwidth` bytes a second, and `latency` seconds for each message."""
    return size / bandwidth + messages * latency


@dataclass(frozen=True)
class Link:
    """A link from each rank to the next: bytes a second in each direction, and seconds before a message arrives."""

    name: str
    bandwidth: float
    latency: float


LINKS = (
    Link("1 Gbit/s", 1.25e8, 5e-5),
    Link("10 Gbit/s", 1.25e9, 3e-5),
    Link("100 Gbit/s", 1.25e10, 1e-5),
    Link("400 GB/s", 4e11, 5e-6),
)
EXPECTED_RANKS = 8
EXPECTED_FORMS = ("plain_ddp", "exact", "one_backward")
MEASURED_SHARE = 0.05
"""The last shared layer's part of the trunk."""
TENSORS = 100


@dataclass(frozen=True)
class Expected:
    """Seconds a step spends in communication, none of it hidden behind computation."""

    link: str
    shared: int
    tasks: int
    form: str
    seconds: float


def expectations() -> list[Expected]:
    """What to expect for each speed of a link, two sizes of the trunk and two numbers of tasks."""
    result = []
    for link in LINKS:
        for shared in (10**7, 10**8):
            for tasks in (3, 11):
                size = Size(tasks, shared, 0, int(MEASURED_SHARE * shared), TENSORS)
                for form in EXPECTED_FORMS:
                    found = sent(form, size, EXPECTED_RANKS)
                    time = seconds(found.bytes, link.bandwidth, link.latency, found.messages)
                    result.append(Expected(link.name, shared, tasks, form, float(f"{time:.4g}")))
    return result


def describe_expectations(ratios: Sequence[float]) -> dict[str, Any]:
    """The expectations with all they assume, as a result file holds them.

    Args:
        ratios: measured by predicted bytes of this run's largest trunks; empty where nothing was measured.
    """
    return {
        "what": "a model, not a measurement: seconds of communication a step, none hidden behind computation",
        "ranks": EXPECTED_RANKS,
        "bytes_a_scalar": SCALAR,
        "links": [asdict(link) for link in LINKS],
        "head_scalars": 0,
        "scalars_under_norms_in_one_backward": f"{MEASURED_SHARE} n",
        "parameter_tensors": TENSORS,
        "measured_to_predicted_bytes": {"lowest": min(ratios), "highest": max(ratios)} if ratios else None,
        "seconds": [asdict(entry) for entry in expectations()],
    }
