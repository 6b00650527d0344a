"""The store of a method without averages: a running sum."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from ._meeting import Alone
from ._numbers import (
    Flag,
    Scalar,
    accumulation_dtype,
    dense,
    on_device,
    squares_of,
    stack_scalars,
    total_of,
)
from ._passes import Gradients, Pass
from ._rule import Terms
from ._store import Judge, weighed


class RunningSum(Judge):
    """``sum_t w_t * g_t`` without averages: each gradient is added up as it arrives, so no row is kept.

    The weights ``w_t = factor_t * (alpha / ||g_t||)**p`` are known up to alpha when g_t arrives. Gradients are added in
    units of the first counted task's norm, ``s_t = factor_t * (unit / ||g_t||)**p``, so that a single task passes
    through bit for bit; the common factor comes at the end.

    Memory: n scalars of float32 or wider beside the gradient that arrives.

    Args:
        parameters: the shared parameters; only devices and dtypes are read.
        normalise: False adds ``factor_t * g_t`` (no rescale to a common norm).
        ranks, device: see `FlatGradientBuffer`.
    """

    keeps_rows: ClassVar[Literal[False]] = False

    def __init__(
        self,
        parameters: Sequence[Tensor],
        ranks: Alone | None = None,
        normalise: bool = True,
        device: torch.device | None = None,
    ) -> None:
        super().__init__(device or parameters[0].device, ranks or Alone())
        wide = any(accumulation_dtype(parameter.dtype) == torch.float64 for parameter in parameters)
        self.norm_dtype = torch.float64 if wide else torch.float32
        self._normalise, self._number = normalise, len(parameters)
        self._forget()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_total": {}, "_scales": {}, "_unit": 0.0}

    def start(self, terms: Terms) -> None:
        """Begin a batch; what an abandoned one has added up is forgotten."""
        super().start(terms)
        self._forget()

    def _forget(self) -> None:
        self._total: dict[int, Tensor] = {}
        self._scales: dict[int, Scalar] = {}
        self._unit: Scalar = 0.0

    def add(self, one: Pass) -> Flag:
        """Add one task's gradients if all is well; return whether it was."""
        wide = [None if gradient is None else _wide(gradient) for gradient in one.shared]
        squares = squares_of([gradient for gradient in wide if gradient is not None])
        ok = self.judge(one, squares)
        if ok is False:
            return ok
        counted = squares if self.ranks.shares is None else self._counted(wide)
        own = total_of(counted, self.device)
        norm: Scalar = self._roots([own])[0]
        if not on_device(self.device):
            norm = float(norm) if self.ranks.agrees else math.sqrt(own)
        self.record(one.task, own, ok)
        scale = self._scales[one.task] = self._scale(one.task, norm, ok)
        self._take_in(wide, scale, ok)
        return ok

    def _counted(self, gradients: Sequence[Tensor | None]) -> list[Scalar]:
        """The squares as far as this rank counts them."""
        shares = self.ranks.shares or ()
        return [
            weighed(total_of(squares_of([g]), self.device), share)
            for g, share in zip(gradients, shares, strict=True)
            if g is not None
        ]

    def _scale(self, task: int, norm: Scalar, ok: Flag) -> Scalar:
        """s_t; 0 if the task does not count."""
        factor, power = self.terms.factors[task], self.terms.power
        if isinstance(norm, Tensor):
            counts = (norm > 0) & ok
            known = self._unit if isinstance(self._unit, Tensor) else torch.zeros_like(norm)
            self._unit = torch.where(known > 0, known, norm.masked_fill(~counts, 0.0))
            relative = (self._unit / norm).pow(power) if self._normalise else torch.ones_like(norm)
            return (relative * factor).masked_fill(~counts, 0.0)
        if norm == 0:
            return 0.0
        self._unit = self._unit or norm
        return float(factor * (self._unit / norm) ** power) if self._normalise else float(factor)

    def _take_in(self, gradients: Sequence[Tensor | None], scale: Scalar, ok: Flag) -> None:
        """total <- total + scale * gradients, where `ok`."""
        given = {index: gradient for index, gradient in enumerate(gradients) if gradient is not None}
        factor = 1.0
        if isinstance(scale, Tensor):
            # Not a product with 0, which would keep a NaN.
            given = {i: torch.where(ok, g, 0.0) * scale.to(g.device, g.dtype.to_real()) for i, g in given.items()}  # type: ignore[arg-type]
        else:
            factor = scale
        old, new = [i for i in given if i in self._total], [i for i in given if i not in self._total]
        if old:
            torch._foreach_add_([self._total[i] for i in old], [given[i] for i in old], alpha=factor)
        if new:
            self._total.update(zip(new, torch._foreach_mul([given[i] for i in new], factor), strict=True))

    def combine(self, weights: Tensor) -> Gradients:
        """The sum for each parameter, None where no task reached it; starts a new sum."""
        tasks, totals = list(self._scales), list(self._total.values())
        if tasks:
            scales = stack_scalars(list(self._scales.values()), weights.dtype, weights.device)
            each = weights.unbind()
            ratios = torch.stack([each[task] for task in tasks]) / scales
            # Every ratio is the common factor; that of the largest scale the most exact. 0 if no task counts.
            best = scales.argmax(keepdim=True)
            factor = ratios.masked_fill(scales <= 0, 0.0).gather(0, best).squeeze(0)
            if on_device(self.device):
                for total in totals:
                    total.mul_(factor.to(total.device, total.dtype.to_real()))
            elif totals:
                torch._foreach_mul_(totals, factor.item())
        result: Gradients = [self._total.get(index) for index in range(self._number)]
        self._forget()
        return result


def _wide(gradient: Tensor) -> Tensor:
    """A dense gradient in the dtype that sums are taken in; the same tensor where it is one already."""
    gradient = dense(gradient)
    return gradient.to(torch.promote_types(gradient.dtype, torch.float32))
