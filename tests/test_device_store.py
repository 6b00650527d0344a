"""The stores of a GPU against plain loops in float64, on a CPU under Triton's interpreter.

TRITON_INTERPRET=1 python -m pytest -m interpreter
"""

import copy
import json
import os
import pickle
import random
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs a CUDA device or TRITON_INTERPRET=1", allow_module_level=True)

from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from triton.runtime.interpreter import GridExecutor

from balanced_optim import _kernels
from balanced_optim._cuda_store import DeviceRows, DeviceSum
from balanced_optim._device_layout import PinnedTables

pytestmark = pytest.mark.interpreter

DEVICE = torch.device("cpu" if _kernels.INTERPRETED else "cuda")
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
# What one rounding to the dtype can do to a value, times a few.
PRECISION = {torch.float32: 1e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3, torch.float64: 1e-13}

torch.set_num_threads(1)


@dataclass
class Terms:
    keep: Any
    gain: Any
    usable: Any
    factors: Any = None
    power: Any = 1.0
    refuses: bool = False


@dataclass
class Pass:
    task: int
    shared: Any
    rest: Any = field(default_factory=dict)
    ok: Any = True


@dataclass
class FakeRanks:
    """Two ranks: the other one holds squares of its own and an opinion about every pass."""

    others: float = 0.0
    well: bool = True
    shares: Any = None
    agrees: bool = True
    asked: list = field(default_factory=list)

    def agree(self, flag):
        assert flag.dtype == torch.bool
        assert flag.shape == ()
        self.asked.append(bool(flag))
        return flag & self.well

    def total(self, squares):
        assert squares.dtype == torch.float64
        return squares + self.others


def terms(tasks, beta=0.5, *, fresh=(), usable=None, **others):
    keep = [0.0 if task in fresh else beta for task in range(tasks)]
    others.setdefault("factors", vector([1.0] * tasks))
    usable = torch.tensor(usable or [True] * tasks, device=DEVICE)
    return Terms(vector(keep), vector([1 - beta] * tasks), usable, **others)


def vector(values):
    return torch.tensor(values, dtype=torch.float64, device=DEVICE)


def randn(*shape, dtype=torch.float32):
    return torch.randn(*shape, dtype=torch.float64).to(dtype).to(DEVICE)


def like(parameters, dtype=None):
    return [randn(*p.shape, dtype=dtype or p.dtype) for p in parameters]


def norm_of(tensors):
    return float(sum(t.to(torch.complex128).abs().square().sum() for t in tensors)) ** 0.5


def close(actual, expected, dtype):
    torch.testing.assert_close(actual, expected.to(actual), rtol=PRECISION[dtype], atol=PRECISION[dtype])


def exactly(a, b):
    assert len(a) == len(b)
    for left, right in zip(a, b, strict=True):
        assert torch.equal(torch.nan_to_num(left, nan=-1.0), torch.nan_to_num(right, nan=-1.0))


def flat(averages):
    return [tensor for tasks in averages for tensor in tasks]


def permute_slots(store, order):
    """Put the same averages into other rows."""
    segments = store._segments
    slots = segments[0].slots.tolist()
    for segment in segments:
        rows = segment.rows.clone()
        for old, new in zip(slots, order, strict=True):
            segment.rows[new] = rows[old]
    segments[0].slots.copy_(torch.tensor(order, dtype=torch.int32))


# -- one pass, every kind of gradient ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", DTYPES, ids=str)
@pytest.mark.parametrize("row", [None, *DTYPES], ids=str)
def test_rows_of_every_dtype_average_gradients_of_every_dtype(row, kind):
    torch.manual_seed(0)
    parameters = like([torch.empty(7, 3), torch.empty(130)], torch.float32 if kind == torch.float64 else kind)
    store = DeviceRows(parameters, 1, dtype=row)
    row = row or torch.float32
    wide = torch.float64 if row == torch.float64 else torch.float32
    averages = [torch.zeros(p.shape, dtype=torch.float64, device=DEVICE) for p in parameters]
    for step in range(3):
        gradients = like(parameters, kind)
        averages = [(0.75 * a + 0.25 * g.double()).to(row).double() for a, g in zip(averages, gradients, strict=True)]
        store.start(terms(1, 0.75, fresh=[0] if step == 0 else []))
        assert bool(store.add(Pass(0, gradients)))
    close(store.norms(), vector([norm_of(averages)]), row)
    assert store.norms().dtype == wide == store.norm_dtype
    for (average,), expected in zip(store.averages(), averages, strict=True):
        assert average.dtype == row
        close(average, expected, row)
    for combined, (average,), parameter in zip(store.combine(vector([2.0])), store.averages(), parameters, strict=True):
        assert combined.dtype == parameter.dtype
        # Exactly so on a GPU; the interpreter truncates to bfloat16.
        close(combined, 2 * average.to(wide), parameter.dtype)


def awkward():
    """Parameters and gradients of every shape, stride, layout, dtype and alignment."""
    torch.manual_seed(1)
    transposed = randn(5, 3).t()
    wide = randn(4, 6, 2, 3)
    unaligned = randn(4099)[1:]
    sparse = torch.sparse_coo_tensor([[0, 3, 3]], randn(3, 4), (6, 4), device=DEVICE, check_invariants=True)
    number = torch.view_as_complex(randn(6, 2))
    return [
        (randn(3, 5), transposed),
        (randn(3, 5).t(), randn(5, 3)),
        (randn(1), randn(1)),
        (randn(()), randn(())),
        (randn(0, 4), randn(0, 4)),
        (randn(4, 6, 2, 3).to(memory_format=torch.channels_last), wide),
        (randn(4, 6, 2, 3), randn(4, 6, 2, 3).to(memory_format=torch.channels_last)),
        (randn(7, 5), randn(1).expand(7, 5)),
        (randn(7, 5), randn(7, 1).expand(7, 5)),
        (randn(4098), unaligned),
        (randn(9, dtype=torch.bfloat16), randn(10, dtype=torch.bfloat16)[1:]),
        (randn(6, 4), sparse),
        (torch.view_as_complex(randn(6, 2)), number),
        (torch.view_as_complex(randn(6, 2)), number.conj()),
        (randn(6), number.conj().imag),
        (randn(6), torch._neg_view(randn(6))),
        (torch.view_as_complex(randn(6, 2)).to(torch.complex128), number.to(torch.complex128)),
        (randn(8, dtype=torch.float64), randn(8, dtype=torch.float64)),
        (randn(8, dtype=torch.float64), randn(8)),
        (randn(8), randn(8, dtype=torch.float16)),
        (randn(11), None),
    ]


def plain(gradient, parameter):
    if gradient is None:
        return torch.zeros_like(parameter)
    return gradient.to_dense() if gradient.layout is torch.sparse_coo else gradient


def test_rows_take_gradients_of_any_layout():
    parameters, gradients = zip(*awkward(), strict=True)
    store = DeviceRows(parameters, 2)
    store.start(terms(2, fresh=[0, 1]))
    assert bool(store.add(Pass(1, gradients)))
    expected = [0.5 * plain(g, p) for p, g in awkward()]
    for parameter, out, (other, average), value in zip(
        parameters, store.combine(vector([0.0, 2.0])), store.averages(), expected, strict=True
    ):
        assert not other.any()
        assert average.shape == out.shape == parameter.shape
        assert out.dtype == parameter.dtype
        assert out.stride() == torch.empty_like(parameter).stride()
        assert torch.equal(average.resolve_conj(), value.to(average.dtype).resolve_conj().resolve_neg())
        assert torch.equal(out, (2 * value).to(out.dtype).resolve_conj().resolve_neg())
    norms = store.norms()
    assert norms.dtype == store.norm_dtype == torch.float64
    assert bool(norms[0].isnan())
    close(norms[1], vector(norm_of(expected)), torch.float32)


def test_a_sum_takes_gradients_of_any_layout():
    parameters, gradients = zip(*awkward(), strict=True)
    store = DeviceSum(parameters)
    store.start(terms(2))
    for task in range(2):
        assert bool(store.add(Pass(task, gradients)))
    *reached, missing = store.combine(store.norms() / store.norms())
    assert missing is None
    for out, (parameter, gradient) in zip(reached, awkward()[:-1], strict=True):
        assert out.shape == parameter.shape
        assert out.dtype == parameter.dtype
        assert out.stride() == torch.empty_like(parameter).stride()
        assert torch.equal(out, (2 * plain(gradient, parameter)).to(out.dtype).resolve_conj().resolve_neg())
    close(store.norms()[0], vector(norm_of([plain(g, p) for p, g in awkward()])), torch.float32)


def test_nothing_is_written_outside_a_parameter_nor_into_a_gradient():
    torch.manual_seed(0)
    memory = randn(300)
    before = memory.clone()
    parameters = [randn(70), randn(3), randn(65)]
    store = DeviceRows(parameters, 2)
    for _ in range(4):
        store.start(terms(2))
        for task in range(2):
            store.add(Pass(task, [memory[4:74], memory[77:80], memory[100:165]]))
    assert torch.equal(memory, before)
    segment = store._segments[0]
    inside = torch.zeros(segment.length, dtype=torch.bool, device=DEVICE)
    for _, view in segment.views(inside):
        view.fill_(True)
    assert not segment.rows[:, ~inside].any()


# -- which passes count -----------------------------------------------------------------------------------------------


def spoilt(value, where="shared", at=0):
    def spoil(one):
        if where == "shared":
            one.shared[at].view(-1)[-1] = value
        else:
            one.rest[list(one.rest)[at]].view(-1)[-1] = value

    return spoil


def answers(flag):
    def answer(one):
        one.ok = torch.tensor(flag, device=DEVICE) if isinstance(flag, bool) else False

    return answer


REASONS = {
    "nan": spoilt(torch.nan),
    "inf": spoilt(torch.inf),
    "minus inf in the last parameter": spoilt(-torch.inf, at=-1),
    "nan in a head": spoilt(torch.nan, "rest"),
    "inf in a double head": spoilt(-torch.inf, "rest", -1),
    "told no by a flag": answers(None),
    "told no by a tensor": answers(False),
    "its loss": None,
}


def heads():
    return {randn(2): randn(3, 5), randn(3): randn(3, dtype=torch.float64)}


@pytest.mark.parametrize("refuses", [False, True])
@pytest.mark.parametrize("reason", REASONS)
@pytest.mark.parametrize("kind", [DeviceRows, DeviceSum])
def test_a_bad_pass_changes_nothing_and_ends_the_batch_where_asked(kind, reason, refuses):
    torch.manual_seed(0)
    parameters = [randn(70), randn(3, dtype=torch.float64), randn(5, 2)]
    store = kind(parameters, 3) if kind is DeviceRows else kind(parameters)
    store.start(terms(3))
    for task in range(3):
        assert bool(store.add(Pass(task, like(parameters), heads())))
    store.combine(vector([1.0, 1.0, 1.0]))
    before = flat(store.averages()) if kind is DeviceRows else []
    before = [tensor.clone() for tensor in before]

    usable = [True, reason != "its loss", True]
    store.start(terms(3, usable=usable, refuses=refuses))
    bad = Pass(1, like(parameters), heads())
    if REASONS[reason]:
        REASONS[reason](bad)
    good = [like(parameters), like(parameters)]
    assert bool(store.add(Pass(0, good[0], heads())))
    assert not bool(store.add(bad))
    assert bool(store.add(Pass(2, good[1], heads()))) is not refuses
    assert store.norms().isnan().tolist() == [False, True, refuses]

    check_sums(store, before, good, refuses)
    store.start(terms(3))
    assert bool(store.add(Pass(1, good[0], heads())))


def check_sums(store, before, good, refuses):
    """The first pass was taken, the second was not, and the third unless the batch had ended."""
    norms = store.norms()
    weights = torch.nan_to_num(norms[0] / norms).double() * vector([1.0, 0.0, 1.0])
    sums = store.combine(weights)
    if isinstance(store, DeviceSum):
        for out, one, two in zip(sums, *good, strict=True):
            close(out, weights[0] * one + weights[2] * two, torch.float32)
        return
    for i, (out, (first, second, third)) in enumerate(zip(sums, store.averages(), strict=True)):
        close(first, 0.5 * before[3 * i] + 0.5 * good[0][i], torch.float32)
        assert torch.equal(second, before[3 * i + 1])
        assert torch.equal(third, before[3 * i + 2]) is refuses
        close(out, first + weights[2] * third, torch.float32)


def test_every_element_of_every_head_is_looked_at():
    sizes = [5, 0, 2 * _kernels.BLOCK + 3, *[2] * 64, 0]
    store = DeviceRows([randn(3)], 1)
    for at in (None, 2, len(sizes) - 2):
        gradients = [randn(size, dtype=torch.bfloat16 if i % 2 else torch.float32) for i, size in enumerate(sizes)]
        if at is not None:
            gradients[at][-1] = torch.nan
        store.start(terms(1))
        assert bool(store.add(Pass(0, [randn(3)], {randn(1): g for g in gradients}))) is (at is None)


def test_large_gradients_of_heads_are_finite():
    store = DeviceRows([randn(3)], 1)
    store.start(terms(1))
    large = {randn(2): torch.full((3,), 1e30, device=DEVICE), randn(3): vector([1e300, -1e300])}
    assert bool(store.add(Pass(0, [randn(3)], large)))
    assert not bool(store.add(Pass(0, [torch.full((3,), 3e38, device=DEVICE)])))


def test_a_half_precision_row_refuses_what_it_cannot_store():
    store = DeviceRows([randn(3)], 1, dtype=torch.float16)
    store.start(terms(1, 0.0))
    assert not bool(store.add(Pass(0, [torch.full((3,), 1e5, device=DEVICE)])))
    assert not store.averages()[0][0].any()


def test_rows_of_no_average_do_not_leak():
    parameters = [randn(66)]
    store = DeviceRows(parameters, 2)
    store._segments[0].rows.fill_(torch.nan)
    store.start(terms(2, fresh=[0]))
    gradient = randn(66)
    store.add(Pass(0, [gradient]))
    assert torch.equal(store.combine(vector([1.0, 0.0]))[0], 0.5 * gradient)
    assert not bool(store.combine(vector([0.0, 0.0]))[0].any())


def test_a_pass_without_gradients_lets_the_average_fade():
    parameters = [randn(66), randn(3)]
    store = DeviceRows(parameters, 1)
    gradients = like(parameters)
    for shared in (gradients, [None, None]):
        store.start(terms(1))
        assert bool(store.add(Pass(0, shared)))
    for out, gradient in zip(store.combine(vector([1.0])), gradients, strict=True):
        assert torch.equal(out, 0.25 * gradient)


@pytest.mark.parametrize("kind", [DeviceRows, DeviceSum])
def test_a_rank_may_hold_nothing(kind):
    parameters = [randn(0), randn(0, 3, dtype=torch.float64)]
    store = kind(parameters, 2) if kind is DeviceRows else kind(parameters)
    store.start(terms(2))
    assert bool(store.add(Pass(0, like(parameters))))
    assert not bool(store.add(Pass(1, like(parameters), {randn(2): vector([torch.nan])})))
    assert store.norms().isnan().tolist() == [False, True]
    assert [out.shape for out in store.combine(vector([1.0, 0.0]))] == [p.shape for p in parameters]
    if kind is DeviceRows:
        assert store.row_norms().tolist() == [0.0, 0.0]
        assert not store.gram().any()


@pytest.mark.parametrize("kind", [DeviceRows, DeviceSum])
def test_vectors_may_be_views_and_lists(kind):
    parameters = [randn(6), randn(3)]
    gradients = [like(parameters), like(parameters)]
    found = []
    for odd in (False, True):
        store = kind(parameters, 2) if kind is DeviceRows else kind(parameters)
        term, ok, weights = terms(2, 0.75, factors=vector([2.0, 0.25])), True, vector([0.5, 3.0])
        if odd:
            both = torch.stack([term.keep, term.gain, term.factors, weights], dim=1)
            term.keep, term.gain, term.factors, weights = both.unbind(1)
            ok = torch.tensor([False, True, False], device=DEVICE)[1]
            term.usable = [True, True]
        for _ in range(2):
            store.start(term)
            for task, shared in enumerate(gradients):
                assert bool(store.add(Pass(task, shared, ok=ok)))
        found.append([store.norms(), *store.combine(weights)])
    exactly(*found)


def test_an_abandoned_batch_leaves_no_trace_in_a_sum():
    parameters = [randn(5), randn(3)]
    store = DeviceSum(parameters)
    store.start(terms(1))
    store.add(Pass(0, like(parameters)))
    store.start(terms(1))
    gradient = randn(5)
    store.add(Pass(0, [gradient, None]))
    out, missing = store.combine(store.norms().double() / store.norms())
    assert missing is None
    assert torch.equal(out, gradient)
    store.start(terms(1))
    assert store.combine(vector([0.0])) == [None, None]


# -- hundreds of steps ------------------------------------------------------------------------------------------------


def random_batch(rng, parameters, tasks):
    refuses, present = rng.random() < 0.5, rng.sample(range(tasks), rng.randint(0, tasks))
    usable = [rng.random() < 0.9 for _ in range(tasks)]
    passes = []
    for task in present:
        one = Pass(task, [None if rng.random() < 0.1 else g for g in like(parameters)])
        if rng.random() < 0.3:
            one.rest = {randn(1): randn(2)}
        shared = [g for g in one.shared if g is not None]
        if rng.random() < 0.1 and shared:
            rng.choice(shared).view(-1)[0] = rng.choice([torch.nan, torch.inf])
        elif rng.random() < 0.3 and one.rest:
            next(iter(one.rest.values()))[0] = torch.nan
        elif rng.random() < 0.1:
            one.ok = rng.choice([False, torch.tensor(False, device=DEVICE)])
        passes.append(one)
    return refuses, usable, passes


def is_well(one, usable):
    values = [*(g for g in one.shared if g is not None), *one.rest.values()]
    return bool(one.ok) and usable[one.task] and all(bool(g.isfinite().all()) for g in values)


class Plain:
    """Averages in float64, one task after the other."""

    def __init__(self, parameters, tasks):
        self.rows = [
            [torch.zeros(p.shape, dtype=torch.float64, device=DEVICE) for p in parameters] for _ in range(tasks)
        ]
        self.seen, self.tasks = [False] * tasks, tasks

    def batch(self, beta, refuses, usable, passes):
        norms, healthy = [float("nan")] * self.tasks, True
        for one in passes:
            ok = healthy and is_well(one, usable)
            healthy = healthy and (ok or not refuses)
            if ok:
                keep = beta if self.seen[one.task] else 0.0
                self.rows[one.task] = [
                    keep * row + (1 - beta) * (torch.zeros_like(row) if g is None else g.double())
                    for row, g in zip(self.rows[one.task], one.shared, strict=True)
                ]
                self.seen[one.task] = True
                norms[one.task] = norm_of(self.rows[one.task])
        return norms


@pytest.mark.parametrize(("batches", "second"), [(200, torch.float32), (40, torch.float64)])
def test_rows_over_many_batches_whatever_the_slots(batches, second):
    torch.manual_seed(2)
    rng = random.Random(2)
    tasks, parameters = 3, [randn(3, 5), randn(2, dtype=second)]
    one, two, oracle = DeviceRows(parameters, tasks), DeviceRows(parameters, tasks), Plain(parameters, tasks)
    swaps = set()
    for step in range(batches):
        refuses, usable, passes = random_batch(rng, parameters, tasks)
        fresh = [task for task in range(tasks) if not oracle.seen[task]]
        norms = oracle.batch(0.75, refuses, usable, passes)
        if step % 7 == 0:
            permute_slots(two, rng.sample(range(tasks + 1), tasks + 1))
        weights = vector([0.0 if norm != norm else rng.uniform(0.1, 3) for norm in norms])
        found = []
        for store in (one, two):
            store.start(terms(tasks, 0.75, fresh=fresh, usable=usable, refuses=refuses))
            taken = [store.add(done) for done in passes]
            assert [bool(flag) for flag in taken] == [norms[done.task] == norms[done.task] for done in passes]
            found.append([store.norms(), *store.combine(weights), *flat(store.averages())])
        exactly(*found)
        swaps.add(tuple(one._segments[0].slots.tolist()))
        torch.testing.assert_close(found[0][0].double(), vector(norms), rtol=1e-6, atol=0, equal_nan=True)
        for i, averages in enumerate(one.averages()):
            close(torch.stack(averages), torch.stack([row[i] for row in oracle.rows]), torch.float32)
            expected = sum(weights[t] * oracle.rows[t][i] for t in range(tasks))
            torch.testing.assert_close(found[0][1 + i].double(), expected + 0 * oracle.rows[0][i], rtol=1e-5, atol=1e-5)
    assert len(swaps) > 10


# -- the running sum --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize("power", [0.0, 0.5, 1.0, "tensor"])
def test_a_sum_agrees_with_plain_loops(power, normalise):
    torch.manual_seed(3)
    number = 0.25 if power == "tensor" else power
    power = torch.tensor(0.25, device=DEVICE) if power == "tensor" else power
    parameters = [randn(3, 5), randn(2, dtype=torch.float64), randn(6, dtype=torch.bfloat16), randn(4)]
    store = DeviceSum(parameters, normalise=normalise)
    gradients = [[10.0**task * g for g in like(parameters)] for task in range(5)]
    factors = [1.0, 0.0, 0.3, 2.0, 1.0]
    gradients[2] = [torch.zeros_like(g) for g in gradients[2]]
    gradients[3][0] = None
    for one in gradients:
        one[3] = None
    store.start(terms(6, factors=vector(factors + [1.0]), power=power))
    for task, one in enumerate(gradients):
        assert bool(store.add(Pass(task, one)))
    norms = store.norms()
    true = [norm_of([g for g in one if g is not None]) for one in gradients]
    torch.testing.assert_close(norms, vector([*true, torch.nan]), rtol=1e-6, atol=0, equal_nan=True)
    alpha = max(true)
    ratios = [(alpha / norm) ** number if norm else 0.0 for norm in true]
    scales = [(r if normalise else float(r > 0)) * f for r, f in zip(ratios, factors, strict=True)]
    out = store.combine(vector([*scales, 0.0]))
    assert out[3] is None
    for i, parameter in enumerate(parameters[:3]):
        expected = sum(s * (0 if one[i] is None else one[i].double()) for s, one in zip(scales, gradients, strict=True))
        assert out[i].dtype == parameter.dtype
        torch.testing.assert_close(out[i], expected.to(out[i].dtype), rtol=2e-2 if i == 2 else 1e-5, atol=1e-3)


def test_a_sum_in_double_precision_takes_the_power_as_it_is():
    torch.manual_seed(3)
    parameters = [randn(7, dtype=torch.float64)]
    one, two = like(parameters)[0], 1e3 * like(parameters)[0]
    store = DeviceSum(parameters)
    store.start(terms(2, power=0.3))
    store.add(Pass(0, [one]))
    store.add(Pass(1, [two]))
    norms = [norm_of([one]), norm_of([two])]
    weights = [(max(norms) / norm) ** 0.3 for norm in norms]
    close(store.combine(vector(weights))[0], weights[0] * one + weights[1] * two, torch.float64)


@pytest.mark.parametrize("power", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("factor", [1.0, 0.5])
def test_one_task_passes_through_a_sum_bit_for_bit(power, factor):
    torch.manual_seed(4)
    parameters = [randn(70), randn(3, dtype=torch.float64), randn(9, dtype=torch.float16)]
    store = DeviceSum(parameters)
    gradients = like(parameters)
    store.start(terms(3, factors=vector([1.0, factor, 1.0]), power=power))
    store.add(Pass(1, gradients))
    norm = store.norms()
    weights = torch.where(norm.isnan(), 0.0, (norm / norm) ** power * factor)
    exactly(store.combine(weights), [factor * g for g in gradients])


def test_a_sum_of_nothing_that_counts_is_zero():
    parameters = [randn(70)]
    store = DeviceSum(parameters)
    store.start(terms(2))
    store.add(Pass(0, [torch.zeros(70, device=DEVICE)]))
    store.add(Pass(1, [torch.full((70,), torch.nan, device=DEVICE)]))
    assert torch.equal(store.combine(vector([0.0, 0.0]))[0], torch.zeros(70, device=DEVICE))
    assert store.norms()[0] == 0


# -- what stands beside the step --------------------------------------------------------------------------------------


def trained(**others):
    """Rows of several dtypes whose slots have moved, and the parameters they belong to."""
    torch.manual_seed(5)
    parameters = [randn(3, 5), torch.view_as_complex(randn(6, 2)), randn(2, dtype=torch.float64), randn(0)]
    parameters.append(randn(4, 6, 2, 3).to(memory_format=torch.channels_last))
    store = DeviceRows(parameters, 3, **others)
    for _ in range(2):
        store.start(terms(3))
        for task in range(3):
            store.add(Pass(task, [torch.randn_like(p) for p in parameters]))
    return parameters, store


def one_more(store, parameters):
    torch.manual_seed(6)
    store.start(terms(3))
    for task in range(3):
        store.add(Pass(task, [torch.randn_like(p) for p in parameters]))
    return [store.norms(), *store.combine(vector([1.0, 0.5, 2.0])), *flat(store.averages())]


def test_averages_round_trip_bit_for_bit():
    parameters, store = trained()
    saved = [[average.clone() for average in tasks] for tasks in store.averages()]
    memory = [segment.rows.data_ptr() for segment in store._segments]
    other = DeviceRows(parameters, 3)
    other.load_averages(saved)
    norms = store.norms()
    exactly([other.row_norms()], [norms])
    store.load_averages(store.averages())
    exactly(flat(store.averages()), flat(saved))
    assert [segment.rows.data_ptr() for segment in store._segments] == memory
    exactly(one_more(store, parameters), one_more(other, parameters))


def test_loading_none_and_clear_set_zeros():
    parameters, store = trained()
    saved = [[average.clone() for average in tasks] for tasks in store.averages()]
    store.clear(1)
    for mine, was in zip(store.averages(), saved, strict=True):
        exactly([mine[0], mine[2]], [was[0], was[2]])
        assert not mine[1].any()
    store.load_averages([[None, first, None] for first, *_ in saved])
    for mine, was in zip(store.averages(), saved, strict=True):
        exactly([mine[1]], [was[0]])
        assert not mine[0].any()
        assert not mine[2].any()
    assert store.row_norms()[0] == 0


@pytest.mark.parametrize("kind", ["deepcopy", "pickle"])
def test_copies_of_a_store_go_on_alike(kind):
    parameters, store = trained()
    other = copy.deepcopy(store) if kind == "deepcopy" else pickle.loads(pickle.dumps(store))
    assert other._segments[0].slots is other._segments[1].slots
    first = one_more(store, parameters)
    exactly(first, one_more(other, parameters))
    running = DeviceSum(parameters)
    again = copy.deepcopy(running) if kind == "deepcopy" else pickle.loads(pickle.dumps(running))
    again.start(terms(1))
    assert bool(again.add(Pass(0, [torch.randn_like(p) for p in parameters])))


def test_gram():
    shares = [1.0, 0.5, 1.0, 1.0, 0.25]
    _, store = trained(ranks=FakeRanks(shares=shares, agrees=False))
    rows = [
        torch.cat([share**0.5 * torch.view_as_real(a.to(torch.complex128)).flatten() for share, a in pairs])
        for pairs in ([(s, tasks[t]) for s, tasks in zip(shares, store.averages(), strict=True)] for t in range(3))
    ]
    expected = torch.stack([torch.stack([(a * b).sum() for b in rows]) for a in rows])
    gram = store.gram()
    assert gram.dtype == torch.float64
    torch.testing.assert_close(gram, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(store.norms(), gram.diagonal().sqrt(), rtol=1e-6, atol=0)


# -- several ranks ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [DeviceRows, DeviceSum])
def test_ranks_decide_together(kind):
    torch.manual_seed(7)
    parameters = [randn(70), randn(3, dtype=torch.float64)]
    ranks = FakeRanks(others=4.0, shares=[1.0, 0.5])
    store = kind(parameters, 2, ranks=ranks) if kind is DeviceRows else kind(parameters, ranks=ranks)
    store.start(terms(2, 0.0))
    gradients = like(parameters)
    assert bool(store.add(Pass(0, gradients)))
    ranks.well = False
    assert not bool(store.add(Pass(1, gradients)))
    assert ranks.asked == [True, True]
    norms = store.norms()
    square = norm_of(gradients[:1]) ** 2 + 0.5 * norm_of(gradients[1:]) ** 2
    # A sum asks for the squares of each segment, rows for those of each task.
    square += 4.0 if kind is DeviceRows else 8.0
    close(norms[0], vector(square**0.5), torch.float32)
    assert bool(norms[1].isnan())
    bad = like(parameters)
    bad[1][0] = torch.nan
    assert not bool(store.add(Pass(1, bad)))
    assert not bool(store.add(Pass(1, gradients, {randn(1): vector([torch.inf])})))
    assert ranks.asked == [True, True, False, False]


# -- nothing waits ----------------------------------------------------------------------------------------------------

HOST_OPS = ("_local_scalar_dense", "is_nonzero", "nonzero", "masked_select", "equal")
HOST_METHODS = {"tolist", "numpy", "item", "cpu", "__bool__", "__float__", "__int__", "__index__", "__array__"}


class NoHostOps(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().removeprefix("aten::").split(".")[0]
        assert name not in HOST_OPS, name
        out = func(*args, **(kwargs or {}))
        if name in ("_to_copy", "copy_") and DEVICE.type != "cpu":
            assert out.device.type != "cpu" or args[0].device.type == "cpu", name
        return out


class NoHostMethods(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        assert name not in HOST_METHODS, name
        assert not (name == "to" and any(str(value) == "cpu" for value in args[1:]) and DEVICE.type != "cpu"), name
        return func(*args, **(kwargs or {}))


def test_the_modes_see_a_read():
    with NoHostMethods(), NoHostOps():
        for read in (torch.Tensor.item, torch.Tensor.tolist, bool, float, torch.Tensor.numpy, torch.Tensor.nonzero):
            with pytest.raises(AssertionError):
                read(torch.ones(()))


@pytest.mark.parametrize("kind", [DeviceRows, DeviceSum])
def test_a_batch_reads_nothing_on_the_host(kind, monkeypatch):
    call = GridExecutor.__call__

    def unwatched(*args, **kwargs):
        # The interpreter itself reads tensors.
        with torch._C.DisableTorchFunction(), _disable_current_modes():
            call(*args, **kwargs)

    monkeypatch.setattr(GridExecutor, "__call__", unwatched)
    parameters = [randn(70), randn(3, dtype=torch.float64), randn(5, 2), torch.view_as_complex(randn(6, 2))]
    store = kind(parameters, 3) if kind is DeviceRows else kind(parameters)
    batches = [[[torch.randn_like(p) for p in parameters] for _ in range(3)] for _ in range(2)]
    batches[1][1][0][3] = torch.nan
    batches[1][2][1] = None
    flag, weights = torch.tensor(True, device=DEVICE), vector([1.0, 2.0, 0.0])
    known = [terms(3, refuses=refuses, power=torch.tensor(1.0, device=DEVICE)) for refuses in (False, True)]
    rest = {randn(2): g for g in (randn(3, 5).t(), randn(2, dtype=torch.bfloat16))}
    with NoHostMethods(), NoHostOps():
        for batch, term in zip(batches, known, strict=True):
            store.start(term)
            taken = [store.add(Pass(task, shared, rest, flag)) for task, shared in enumerate(batch)]
            norms, _ = store.norms(), store.combine(weights)
    assert [bool(ok) for ok in taken] == [True, False, False]
    assert norms.isnan().tolist() == [False, True, True]


# -- compiled and captured --------------------------------------------------------------------------------------------


@pytest.mark.skipif(not _kernels.INTERPRETED, reason="a GPU compiles them in every other test")
def test_the_kernels_compile_for_a_gpu_and_read_whole_vectors(tmp_path):
    # Compiled code has another meaning of `if` and of types than the interpreter's; this needs no GPU.
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path)}
    script = [sys.executable, "-W", "ignore", Path(__file__).with_name("compile_kernels.py")]
    found = json.loads(subprocess.run(script, env=environment, check=True, capture_output=True, text=True).stdout)
    assert len(found) == 14
    for name, loads in found.items():
        alone = name.startswith(("total", "accept", "scale")) or "unaligned" in name
        assert alone or any(".v" in load for load in loads), name


@pytest.mark.cuda
@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a CUDA device")
@pytest.mark.parametrize("kind", [DeviceRows, DeviceSum])
def test_a_captured_batch_equals_an_eager_one_bit_for_bit(kind):
    torch.manual_seed(8)
    parameters = [randn(700, 30), randn(3, dtype=torch.float64), randn(5, 2, dtype=torch.bfloat16)]
    gradients = [like(parameters) for _ in range(3)]
    rest = {randn(2): randn(2)}
    term = terms(3)

    def build():
        return kind(parameters, 3) if kind is DeviceRows else kind(parameters)

    def batch(store):
        store.start(term)
        taken = [store.add(Pass(task, shared, rest)) for task, shared in enumerate(gradients)]
        norms = store.norms()
        counts = ~norms.isnan()
        largest = torch.where(counts, norms, 0.0).amax()
        return [*taken, norms, *store.combine(torch.where(counts, largest / norms, 0.0))]

    captured, eager = build(), build()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            batch(captured)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        static = batch(captured)
    for _ in range(3):
        batch(eager)
    for step in range(20):
        for task, shared in enumerate(gradients):
            for gradient in shared:
                gradient.normal_()
            if step % 5 == task:
                shared[0][0, 0] = torch.nan
        term.keep.fill_(0.9 / (step + 1) ** 0.5)
        term.gain.copy_(1 - term.keep)
        graph.replay()
        exactly([s.clone() for s in static], batch(eager))
    if kind is DeviceRows:
        exactly(flat(captured.averages()), flat(eager.averages()))


@pytest.mark.cuda
@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a CUDA device")
def test_a_capture_without_a_batch_before_says_so():
    store = DeviceRows([randn(5)], 1)
    gradient, term = randn(5), terms(1)
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(RuntimeError, match="must run once before"), torch.cuda.graph(graph):
        store.start(term)
        store.add(Pass(0, [gradient]))


@pytest.mark.cuda
@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a CUDA device")
@pytest.mark.parametrize("kind", [DeviceRows, DeviceSum])
def test_more_elements_than_32_bits_can_count(kind):
    size = 2**31 // 3 + 5
    if torch.cuda.mem_get_info()[0] < 16 * size:
        pytest.skip("needs more memory")
    parameter = torch.zeros(size, dtype=torch.bfloat16, device=DEVICE)
    store = kind([parameter], 3, torch.bfloat16) if kind is DeviceRows else kind([parameter])
    gradient = torch.ones_like(parameter)
    gradient[-1] = 3
    store.start(terms(3, 0.0))
    assert bool(store.add(Pass(2, [gradient])))
    norms = store.norms()
    assert norms[2] == pytest.approx((size + 8) ** 0.5, rel=1e-6)
    out = store.combine(torch.nan_to_num(norms / norms))[0]
    assert torch.equal(out, gradient)


@pytest.mark.cuda
@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a CUDA device")
def test_heads_may_lie_on_another_device():
    store = DeviceRows([randn(70)], 2)
    store.start(terms(2))
    assert bool(store.add(Pass(0, [randn(70)], {torch.zeros(3): torch.randn(3)})))
    assert not bool(store.add(Pass(1, [randn(70)], {torch.zeros(3): torch.tensor([0.0, torch.nan, 0.0])})))


@pytest.mark.cuda
@pytest.mark.skipif(DEVICE.type != "cuda" or torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("kind", [DeviceRows, DeviceSum])
def test_two_devices_decide_together(kind):
    torch.manual_seed(9)
    here = [randn(70), randn(3, 5)]
    both = [here[0], here[1].to("cuda:1")]
    found = []
    for parameters in (here, both):
        torch.manual_seed(10)
        store = kind(parameters, 2) if kind is DeviceRows else kind(parameters)
        for step in range(6):
            gradients = [[randn(*p.shape).to(p.device) for p in parameters] for _ in range(2)]
            gradients[step % 2][1][0, step % 3] = torch.nan if step % 2 else 0.0
            store.start(terms(2))
            taken = [bool(store.add(Pass(task, shared))) for task, shared in enumerate(gradients)]
            assert taken == [True, step % 2 == 0]
            norms = store.norms()
            out = store.combine(torch.where(norms.isnan(), 0.0, norms / norms))
            assert [g.device for g in out] == [p.device for p in parameters]
            found.append([norms.float(), *[g.cpu() for g in out]])
    for one, other in zip(found[:6], found[6:], strict=True):
        torch.testing.assert_close(one, other, equal_nan=True)


# ------------------------------------------------- address tables


def test_a_table_is_used_again_where_gradients_lie_where_they_lay():
    tables = PinnedTables()
    tables.start()
    first = tables.on(DEVICE, [16, 0, 4])
    tables.start()
    assert tables.on(DEVICE, [16, 0, 4]) is first
    other = tables.on(DEVICE, [16, 0, 8])
    assert (first.tolist(), other.tolist()) == ([16, 0, 4], [16, 0, 8])
    for _ in range(2):
        tables.start()
    assert tables.on(DEVICE, [16, 0, 4]) is not first


def test_tables_do_not_travel():
    tables = PinnedTables()
    tables.start()
    tables.on(DEVICE, [1])
    assert vars(copy.deepcopy(tables)) == vars(PinnedTables())
