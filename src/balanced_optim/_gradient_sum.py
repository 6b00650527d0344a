"""The store of a method without averages: a running sum."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ._numbers import Flag, Scalar, joint_norm, real, stack_scalars, vector_norm

# A CPU's norm of a gradient of at least this many elements is summed piece by piece.
_LARGE = 1 << 17


class GradientSum:
    """``sum_t w_t * g_t`` without averages: each gradient is added up as it arrives, so no row is kept.

    The weights ``w_t = alpha * priority_t / ||g_t||`` are known up to alpha when g_t arrives, and alpha is a
    common factor. Gradients are added in units of the first task's norm, not as unit vectors, so that a single
    task passes through bit for bit. Same interface as `FlatGradientBuffer`.

    Memory: n scalars of float32 or wider beside the gradient that arrives.

    Args:
        device: where norms are gathered.
        priorities: priority_t, T of them.
        normalise: False adds ``priority_t * g_t`` (no rescale to a common norm).
        shares: see `FlatGradientBuffer`.
    """

    def __init__(
        self,
        device: torch.device,
        priorities: Sequence[float],
        normalise: bool,
        shares: Sequence[float] | None = None,
    ) -> None:
        self.device = device
        self._priorities = priorities
        self._normalise = normalise
        self._shares = shares
        self._total: list[Tensor | None] = []
        self.norm_dtype = torch.float32
        self._scales: dict[int, Scalar] = {}
        self._reference: Scalar = 0.0
        self._proposal: list[Tensor | None] | None = None

    def propose(
        self,
        gradients: Sequence[Tensor | None],
        task: int,  # noqa: ARG002
        beta: float,  # noqa: ARG002
        *,
        owned: bool = True,
    ) -> Scalar:
        """Take g_t and return ||g_t||; gradients that are `owned` are overwritten by `accept`."""
        wide = [None if g is None else _wide(g) if owned else _wide(g).clone() for g in gradients]
        if any(g is not None and g.dtype in (torch.float64, torch.complex128) for g in wide):
            self.norm_dtype = torch.float64
        self._proposal = wide
        return self._norm(wide)

    def accept(self, task: int, ok: Flag, norm: Scalar) -> None:
        """Add the proposed gradient, whose whole norm is `norm`, if `ok`; else drop it.

        A boolean tensor is not read by the host.
        """
        if self._proposal is None:
            raise RuntimeError("accept() must follow propose()")
        gradients = self._proposal
        self._proposal = None
        if ok is False:
            return
        scale = self._scales[task] = self._scale(norm, self._priorities[task], ok)
        if not self._total:
            self._total = [None] * len(gradients)
        for index, gradient in enumerate(gradients):
            if gradient is None:
                continue
            if isinstance(ok, Tensor):
                gradient.nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)
            self._total[index] = _add_scaled(self._total[index], gradient, scale)

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

    def _scale(self, norm: Scalar, priority: float, ok: Flag) -> Scalar:
        """What g_t is multiplied by on arrival: w_t up to a factor common to all tasks; 0 if it does not count."""
        if isinstance(norm, Tensor):
            counts = (norm > 0) & ok
            usable = torch.where(counts, norm, 0.0)
            known = self._reference if isinstance(self._reference, Tensor) else torch.zeros_like(norm)
            self._reference = torch.where(known > 0, known, usable)
            relative = self._reference / norm if self._normalise else torch.ones_like(norm)
            return torch.where(counts, priority * relative, 0.0)
        self._reference = self._reference or norm
        if norm == 0:
            return 0.0
        return priority * float(self._reference / norm) if self._normalise else priority

    def weighted_sum(self, weights: Tensor) -> list[Tensor | None]:
        """The sum for each parameter, None where no task reached it; starts a new sum."""
        scales = stack_scalars(list(self._scales.values()), weights.dtype, weights.device)
        # Every ratio is alpha in units of the reference; a task that does not count has scale 0.
        each = weights.unbind()
        ratios = torch.stack([each[task] for task in self._scales]) / scales
        factor = torch.where(scales > 0, ratios, torch.zeros_like(ratios)).amax()
        total = self._total
        self.forget_batch()
        for tensor in total:
            if tensor is not None:
                tensor.mul_(factor.to(tensor.device))
        return total


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


def _add_scaled(total: Tensor | None, gradient: Tensor, scale: Scalar) -> Tensor:
    """total + scale * gradient, in place on either."""
    if isinstance(scale, Tensor):
        scaled = gradient.mul_(scale.to(gradient.device))
        return scaled if total is None else total.add_(scaled)
    return gradient.mul_(scale) if total is None else total.add_(gradient, alpha=scale)
