"""Where task gradients go: rows of averages and the running sum, against numpy; as a CPU runs them, and as a device."""

import copy
import math
import pickle

import numpy as np
import pytest
import torch
from cases import one_thread  # noqa: F401
from conftest import assert_same
from devices import array
from modes import device_path

from balanced_optim._passes import Pass
from balanced_optim._rule import Terms
from balanced_optim._running_sum import RunningSum
from balanced_optim._store import FlatGradientBuffer

LARGE = (2**17 + 5,)
SHAPES = {
    "small": [(3, 2), (5,), (), (17,)],
    "one large": [LARGE],
    "large between small": [(3,), (4, 2), (2, 65_537), (7,), LARGE, (1,)],
    "two large": [LARGE, (2, 65_540)],
    "empty": [(0, 3), (4,)],
}
every_shape = pytest.mark.parametrize("shapes", SHAPES)


@pytest.fixture(params=["host", "device"])
def path(request, monkeypatch):
    """Numbers are Python's, or tensors that nobody waits for."""
    if request.param == "host":
        yield request.param
    else:
        with device_path(monkeypatch):
            yield request.param


def terms_of(path, tasks, beta=0.0, factors=None, power=1.0, refuses=False):
    columns = [beta] * tasks, [1 - beta] * tasks, [True] * tasks, factors or [1.0] * tasks
    if path == "device":
        columns = [torch.tensor(column, dtype=None if column[0] is True else torch.float64) for column in columns]
    return Terms(*columns, power, refuses)


def gradients_of(parameters, rng, missing=()):
    found = [torch.as_tensor(rng.standard_normal(tuple(p.shape)), dtype=p.dtype) for p in parameters]
    return [None if index in missing else gradient for index, gradient in enumerate(found)]


def add(store, path, tasks, gradients, task, beta=0.0, ok=True):
    """One task of a batch of its own; whether it was taken, and its norm."""
    store.start(terms_of(path, tasks, beta))
    ok = torch.tensor(ok) if path == "device" else ok
    taken = store.add(Pass(task, gradients, {}, ok))
    return bool(taken), float(store.norms()[task])


def fill(buffer, path, tasks, rng, parameters):
    for task in range(tasks):
        add(buffer, path, tasks, gradients_of(parameters, rng), task, 0.5)


# ------------------------------------------------- rows


@pytest.mark.parametrize("copier", [None, copy.deepcopy, lambda b: pickle.loads(pickle.dumps(b))])
@every_shape
def test_rows_keep_the_averages(shapes, copier, path):
    """Taken and refused at random, in random task order, with missing gradients, against lists of arrays."""
    rng = np.random.default_rng(1)
    parameters = [torch.zeros(shape, dtype=torch.float64) for shape in SHAPES[shapes]]
    buffer, tasks = FlatGradientBuffer(parameters, 3), 3
    expected = [[np.zeros(p.shape) for p in parameters] for _ in range(tasks)]
    for step in range(12):
        task, beta, ok = int(rng.integers(tasks)), [0.0, 0.5, 0.9][step % 3], step % 4 != 3
        gradients = gradients_of(parameters, rng, {step % len(parameters)} if step % 2 else ())
        new = [
            beta * ema + (0 if g is None else (1 - beta) * array(g))
            for ema, g in zip(expected[task], gradients, strict=True)
        ]
        taken, norm = add(buffer, path, tasks, gradients, task, beta, ok)
        assert taken is ok
        if ok:
            expected[task] = new
            assert norm == pytest.approx(math.sqrt(sum((row**2).sum() for row in new)), rel=1e-10)
        else:
            assert math.isnan(norm)
        if copier is not None and step == 5:
            original, buffer = buffer, copier(buffer)
            original.clear(0)
        if step % 5 == 4:
            check_rows(buffer, expected, rng)
    check_rows(buffer, expected, rng)


def check_rows(buffer, expected, rng):
    weights = rng.standard_normal(len(expected))
    parts = list(zip(*expected, strict=True))
    for part, found in zip(parts, buffer.combine(torch.as_tensor(weights)), strict=True):
        total = sum(w * row for w, row in zip(weights, part, strict=True))
        np.testing.assert_allclose(array(found), total, atol=1e-13)
    flat = np.stack([np.concatenate([row.reshape(-1) for row in rows]) for rows in expected])
    np.testing.assert_allclose(array(buffer.gram()), flat @ flat.T, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(array(buffer.row_norms()), np.linalg.norm(flat, axis=1), rtol=1e-12)
    for part, rows in zip(parts, buffer.averages(), strict=True):
        np.testing.assert_allclose(array(torch.stack(rows)), np.stack(part), rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@every_shape
def test_no_row_takes_a_value_that_is_not_finite(shapes, value, path):
    rng = np.random.default_rng(2)
    parameters = [torch.zeros(shape) for shape in SHAPES[shapes]]
    buffer = FlatGradientBuffer(parameters, 2)
    good = gradients_of(parameters, rng)
    add(buffer, path, 2, good, 1)
    for index, parameter in enumerate(parameters):
        if parameter.numel():
            bad = copy.deepcopy(good)
            bad[index].view(-1)[-1] = value
            taken, norm = add(buffer, path, 2, bad, 1, 0.5)
            assert not taken and math.isnan(norm)
    for found, gradient in zip(buffer.combine(torch.tensor([7.0, 2.0])), good, strict=True):
        torch.testing.assert_close(found, 2 * gradient)


def test_a_gradient_is_finite_if_the_row_can_hold_it(path):
    """1e7 is infinite in float16."""
    parameter = torch.zeros(3)
    buffer = FlatGradientBuffer([parameter], 1, torch.float16)
    assert add(buffer, path, 1, [torch.full((3,), 1e4)], 0)[0]
    assert not add(buffer, path, 1, [torch.full((3,), 1e7)], 0)[0]
    torch.testing.assert_close(buffer.averages()[0][0].float(), torch.full((3,), 1e4))


@pytest.mark.parametrize("kind", ["rows", "sum"])
def test_after_a_bad_task_no_other_counts_where_one_refuses_the_batch(kind, path):
    parameter = torch.zeros(3)
    store = FlatGradientBuffer([parameter], 3) if kind == "rows" else RunningSum([parameter])
    store.start(terms_of(path, 3, refuses=True))
    values = [torch.ones(3), torch.full((3,), math.nan), torch.ones(3)]
    assert [bool(store.add(Pass(task, [value]))) for task, value in enumerate(values)] == [True, False, False]
    assert store.norms().isnan().tolist() == [False, True, True]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64])
@pytest.mark.parametrize("rows", [None, torch.bfloat16], ids=str)
def test_rows_and_sums_have_the_dtypes_that_they_should(dtype, rows, path):
    rng = np.random.default_rng(4)
    parameters = [torch.zeros(3, 4, dtype=dtype), torch.zeros(2, 5, dtype=torch.float64)]
    buffer = FlatGradientBuffer(parameters, 2, rows)
    gradients = gradients_of(parameters, rng)
    for task in range(2):
        add(buffer, path, 2, gradients, task)
    sums = buffer.combine(torch.tensor([1.0, 2.0]))
    wide = torch.promote_types(dtype, torch.float32)
    assert sums[0].dtype == (wide if rows is None or dtype.is_complex else torch.float32)
    if not dtype.is_complex:
        stored = [each[0].dtype for each in buffer.averages()]
        assert stored == ([wide, torch.float64] if rows is None else [rows, rows])
    for found, gradient in zip(sums, gradients, strict=True):
        tolerance = 1e-2 if rows is not None else 1e-6
        torch.testing.assert_close(found.to(gradient.dtype), 3 * gradient, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("kind", ["rows", "sum"])
def test_the_norm_of_a_long_gradient_is_exact(kind):
    """A float32 sum of squares in one go would be 4e-4 off, and is on a CPU that stands for a device."""
    gradient = torch.full((3_000_000,), 0.1)
    store = FlatGradientBuffer([gradient], 1) if kind == "rows" else RunningSum([gradient])
    _, norm = add(store, "host", 1, [gradient], 0)
    assert norm == pytest.approx(0.1 * math.sqrt(3e6), rel=5e-5)


def test_rows_are_loaded_and_cleared(path):
    rng = np.random.default_rng(6)
    parameters = [torch.zeros(3, 2), torch.zeros(4)]
    buffer = FlatGradientBuffer(parameters, 2)
    fill(buffer, path, 2, rng, parameters)
    saved = copy.deepcopy(buffer.averages())
    fresh = FlatGradientBuffer(parameters, 2)
    fresh.load_averages(saved)
    assert_same(fresh.averages(), saved)
    fresh.clear(0)
    assert [rows[0].norm().item() for rows in fresh.averages()] == [0, 0]
    assert_same([rows[1] for rows in fresh.averages()], [rows[1] for rows in saved])
    fresh.load_averages([[None, None], saved[1]])
    assert_same(fresh.averages(), [[torch.zeros(3, 2)] * 2, saved[1]])


@pytest.mark.parametrize("stride", [(1, 3), (8, 2)])
def test_gradients_may_have_any_stride_and_are_not_written_to(stride, path):
    parameter = torch.zeros(3, 4)
    memory = torch.arange(32.0)
    gradient = memory.as_strided((3, 4), stride)
    buffer = FlatGradientBuffer([parameter], 1)
    add(buffer, path, 1, [gradient], 0)
    torch.testing.assert_close(buffer.averages()[0][0], gradient)
    torch.testing.assert_close(buffer.combine(torch.ones(1))[0], buffer.averages()[0][0])
    assert torch.equal(memory, torch.arange(32.0))


def test_a_combined_gradient_is_fresh_memory(path):
    parameters = [torch.zeros(shape) for shape in SHAPES["large between small"]]
    buffer = FlatGradientBuffer(parameters, 2)
    fill(buffer, path, 2, np.random.default_rng(0), parameters)
    first = buffer.combine(torch.ones(2))
    copied = [each.clone() for each in first]
    buffer.combine(torch.full((2,), 5.0))
    fill(buffer, path, 2, np.random.default_rng(1), parameters)
    assert_same(first, copied)
    rows = [row for rows in buffer.averages() for row in rows]
    assert not {each.untyped_storage().data_ptr() for each in first} & {r.untyped_storage().data_ptr() for r in rows}


# ------------------------------------------------- the running sum


@pytest.mark.parametrize("power", [1.0, 0.5, 0.0])
@pytest.mark.parametrize("factors", [[1.0] * 4, [0.5, 2.0, 0.0, 3.0]])
@every_shape
def test_the_running_sum_is_that_of_the_rescaled_gradients(shapes, factors, power, path):
    """One task brings zeros, one a NaN, and some parameters lack a gradient."""
    rng = np.random.default_rng(3)
    parameters = [torch.zeros(shape, dtype=torch.float64) for shape in SHAPES[shapes]]
    batch = [gradients_of(parameters, rng) for _ in range(4)]
    batch[1] = [torch.zeros_like(p) for p in parameters]
    batch[2] = [g * math.nan for g in batch[2]]
    batch[3] = [None if index == 0 and len(parameters) > 1 else g for index, g in enumerate(batch[3])]
    store = RunningSum(parameters)
    store.start(terms_of(path, 4, factors=factors, power=power))
    taken = [bool(store.add(Pass(task, gradients))) for task, gradients in enumerate(batch)]
    assert taken == [True, True, False, True]
    norms = store.norms()
    assert norms[1] == 0 and norms[2].isnan()
    counts = norms > 0
    alpha = norms[counts].max()
    weights = torch.where(counts, (alpha / norms) ** power * torch.tensor(factors, dtype=norms.dtype), 0.0)
    combined = store.combine(weights)
    for index, (parameter, found) in enumerate(zip(parameters, combined, strict=True)):
        parts = [weights[t] * batch[t][index] for t in (0, 3) if batch[t][index] is not None]
        torch.testing.assert_close(found, sum(parts, torch.zeros_like(parameter)), rtol=1e-10, atol=1e-12)


def test_a_single_task_passes_through_bit_for_bit(path):
    gradient = torch.randn(7, dtype=torch.float64)
    store = RunningSum([gradient])
    store.start(terms_of(path, 1))
    store.add(Pass(0, [gradient]))
    assert torch.equal(store.combine(torch.ones(1, dtype=torch.float64))[0], gradient)


def test_without_a_rescale_gradients_are_added_as_they_are(path):
    gradients = [torch.randn(5, dtype=torch.float64) for _ in range(3)]
    store = RunningSum(gradients[:1], normalise=False)
    store.start(terms_of(path, 3, factors=[1.0, 0.5, 2.0]))
    for task, gradient in enumerate(gradients):
        store.add(Pass(task, [gradient]))
    weights = torch.tensor([1.0, 0.5, 2.0], dtype=torch.float64)
    torch.testing.assert_close(store.combine(weights)[0], sum(w * g for w, g in zip(weights, gradients, strict=True)))


def test_an_abandoned_batch_is_forgotten(path):
    store = RunningSum([torch.zeros(3)])
    for _ in range(2):
        store.start(terms_of(path, 1))
        store.add(Pass(0, [torch.ones(3)]))
    torch.testing.assert_close(store.combine(torch.ones(1))[0], torch.ones(3))
