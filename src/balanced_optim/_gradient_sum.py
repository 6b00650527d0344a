"""The store of a method without averages: a running sum."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ._numbers import Flag, Scalar, is_free, joint_norm, real, stack_scalars, vector_norm
from ._task_gradients import where_ok

# A CPU's norm of a gradient of at least this many elements is summed piece by piece.
_LARGE = 1 << 17


class GradientSum:
    """``sum_t w_t * g_t`` without averages: each gradient is added up as it arrives, so no row is kept.

    The weights ``w_t = alpha * factor_t / ||g_t||`` are known up to alpha when g_t arrives, and alpha is a
    common factor. Gradients are added in units of the first task's norm, not as unit vectors, so that a single
    task passes through bit for bit. Same interface as `FlatGradientBuffer`.

    Memory: n scalars of float32 or wider beside the gradient that arrives.

    Args:
        device: where norms are gathered.
        normalise: False adds ``factor_t * g_t`` (no rescale to a common norm).
        shares: see `FlatGradientBuffer`.
    """

    def __init__(
        self,
        device: torch.device,
        normalise: bool,
        shares: Sequence[float] | None = None,
    ) -> None:
        self.device = device
        self._normalise = normalise
        self._shares = shares
        self._total: list[Tensor | None] = []
        self._last: list[Tensor | None] = []
        self.norm_dtype = torch.float32
        self._scales: dict[int, Scalar] = {}
        self._reference: Scalar = 0.0
        self._proposal: list[Tensor | None] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_last": []}

    def propose(
        self,
        gradients: Sequence[Tensor | None],
        task: int,  # noqa: ARG002
        beta: float,  # noqa: ARG002
    ) -> Scalar:
        """Take g_t, which must stay as it is until `accept`, and return ||g_t||."""
        wide = [None if g is None else _wide(g) for g in gradients]
        if any(g is not None and g.dtype in (torch.float64, torch.complex128) for g in wide):
            self.norm_dtype = torch.float64
        self._proposal = wide
        return self._norm(wide)

    def accept(self, task: int, ok: Flag, norm: Scalar, factor: Scalar = 1.0) -> None:
        """Add the proposed gradient, whose whole norm is `norm`, if `ok`; else drop it. `factor` is factor_t >= 0.

        A boolean tensor is not read by the host.
        """
        if self._proposal is None:
            raise RuntimeError("accept() must follow propose()")
        gradients = self._proposal
        self._proposal = None
        if ok is False:
            return
        scale = self._scales[task] = self._scale(norm, factor, ok)
        if not self._total:
            self._total = [None] * len(gradients)
        for index, gradient in enumerate(gradients):
            if gradient is None:
                continue
            if isinstance(ok, Tensor):
                gradient = where_ok(ok, gradient)
            total = self._total[index]
            if total is None:
                here = scale.to(gradient.device) if isinstance(scale, Tensor) else scale
                self._total[index] = torch.mul(gradient, here, out=self._memory(index, gradient))
            elif isinstance(scale, Tensor):
                total.addcmul_(gradient, scale.to(gradient.device))
            else:
                total.add_(gradient, alpha=scale)

    def _memory(self, index: int, gradient: Tensor) -> Tensor:
        """Room for a sum: on a CPU that of the last batch, if nobody uses it any more.

        Fresh memory would cost a page fault every 1,024 elements, more than the sum itself.
        """
        last = self._last[index] if self._last else None
        if last is not None and last.is_cpu and is_free(last):
            self._last[index] = None
            if (
                last.device == gradient.device
                and last.dtype == gradient.dtype
                and last.shape == gradient.shape
                and last.stride() == gradient.stride()
            ):
                return last
        return torch.empty_like(gradient)

    def clear(self, task: int) -> None:
        """Nothing to do: no task has an average."""

    @property
    def large(self) -> list[int]:
        """No parameter goes early into `propose`: every gradient must wait for its norm."""
        return []

    def early(self, task: int) -> set[int]:  # noqa: ARG002
        """See `large`."""
        return set()

    def propose_early(self, index: int, gradient: Tensor, task: int, beta: float) -> None:
        """See `large`."""
        raise NotImplementedError

    def forget_batch(self) -> None:
        """Drop what was added up so far."""
        self._total = []
        self._scales = {}
        self._reference = 0.0
        self._proposal = None

    def _norm(self, gradients: Sequence[Tensor | None]) -> Scalar:
        alike: dict[float, list[Tensor]] = {}
        for gradient, share in zip(gradients, self._shares or [1.0] * len(gradients), strict=True):
            if gradient is not None:
                alike.setdefault(share, []).append(gradient)
        norms = [_gradients_norm(together, self.device) for together in alike.values()]
        return joint_norm(norms, self.device, list(alike))

    def _scale(self, norm: Scalar, factor: Scalar, ok: Flag) -> Scalar:
        """What g_t is multiplied by on arrival: w_t up to a factor common to all tasks; 0 if it does not count."""
        if isinstance(norm, Tensor):
            counts = (norm > 0) & ok
            usable = torch.where(counts, norm, 0.0)
            known = self._reference if isinstance(self._reference, Tensor) else torch.zeros_like(norm)
            self._reference = torch.where(known > 0, known, usable)
            relative = self._reference / norm if self._normalise else torch.ones_like(norm)
            return torch.where(counts, factor * relative, 0.0)
        self._reference = self._reference or norm
        if norm == 0:
            return 0.0
        return factor * float(self._reference / norm) if self._normalise else factor

    def weighted_sum(self, weights: Tensor) -> list[Tensor | None]:
        """The sum for each parameter, None where no task reached it; starts a new sum."""
        scales = stack_scalars(list(self._scales.values()), weights.dtype, weights.device)
        # Every ratio is alpha in units of the reference, that of the largest scale the most exact; 0 if no task counts.
        each = weights.unbind()
        ratios = torch.stack([each[task] for task in self._scales]) / scales
        best = scales.argmax(keepdim=True)
        factor = torch.where(scales > 0, ratios, torch.zeros_like(ratios)).gather(0, best).squeeze(0)
        self._last = self._total
        self.forget_batch()
        # Views, so that the use of the memory can be seen.
        return [None if total is None else total.mul_(factor.to(total.device)).detach() for total in self._last]


def _gradients_norm(gradients: Sequence[Tensor], device: torch.device) -> Scalar:
    """The joint norm of dense gradients; large ones on a CPU piece by piece, as in `_norm`."""
    norms: list[Scalar] = []
    small: list[Tensor] = []
    for gradient in gradients:
        if gradient.device.type == "cpu" and gradient.numel() >= _LARGE:
            norms.append(vector_norm(real(gradient).reshape(-1)))
        else:
            small.append(gradient)
    if small:
        norms += torch._foreach_norm(small)
    return joint_norm(norms, device)


def _wide(gradient: Tensor) -> Tensor:
    """A dense gradient in the dtype that sums are taken in; the same tensor where it is one already."""
    gradient = gradient if gradient.layout is torch.strided else gradient.to_dense()
    return gradient.to(torch.promote_types(gradient.dtype, torch.float32))
