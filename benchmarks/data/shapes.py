"""Boxes, balls and cylinders for the scenes: where a ray meets one, and the normal there.

Vectors have shape (B, 3, P) for P points or rays in each of B scenes, numbers (B, P), what a scene has one of (B, ...).
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Rays:
    """Rays from one origin or from one each; distances along them are in lengths of their directions.

    Attributes:
        origin: Shape (B, 3, P) or (B, 3, 1).
        direction: Shape (B, 3, P).
    """

    origin: Tensor
    direction: Tensor

    def at(self, distance: Tensor) -> Tensor:
        """Return the point at this distance along each ray."""
        return self.origin + distance.unsqueeze(1) * self.direction


def along_largest(numbers: Tensor, sign: Tensor) -> Tensor:
    """Return unit vectors along the axis with the largest of three numbers, in the direction of `sign` on it."""
    # argmax would do, but takes ten times as long.
    axis = numbers.max(dim=1).indices
    return F.one_hot(axis, 3).mT * sign.sign()


def box_distance(rays: Rays, box: Tensor) -> Tensor:
    """Return how far rays go until a box, inf if they miss it; one box in each scene, see `World.boxes`."""
    centre, half, turn = box[:, :3, None], box[:, 3:6, None], box[:, 6:]
    origin, direction = _turn(rays.origin - centre, turn), _turn(rays.direction, turn)
    one, other = (-half - origin) / direction, (half - origin) / direction
    entry, leaving = torch.minimum(one, other).amax(dim=1), torch.maximum(one, other).amin(dim=1)
    return torch.where((entry > 0) & (entry < leaving), entry, math.inf)


def box_normal(points: Tensor, box: Tensor) -> Tensor:
    """Return the unit normals of points on a box."""
    centre, half, turn = box[:, :3, None], box[:, 3:6, None], box[:, 6:]
    inside = _turn(points - centre, turn) / half
    return _turn(along_largest(inside.abs(), inside), -turn)


def _turn(vectors: Tensor, angle: Tensor) -> Tensor:
    """Turn vectors about the vertical by an angle for each scene, shape (B, 1)."""
    x, y, z = vectors.unbind(dim=1)
    cosine, sine = angle.cos(), angle.sin()
    return torch.stack([x * cosine + z * sine, y, z * cosine - x * sine], dim=1)


def ball_distance(rays: Rays, ball: Tensor) -> Tensor:
    """Return how far rays go until a ball, inf if they miss it; one ball in each scene, see `World.balls`."""
    distance = _first_crossing(rays.origin - ball[:, :3, None], rays.direction, ball[:, 3:])
    return torch.where(distance > 0, distance, math.inf)


def ball_normal(points: Tensor, ball: Tensor) -> Tensor:
    """Return the unit normals of points on a ball."""
    return (points - ball[:, :3, None]) / ball[:, 3:, None]


def _first_crossing(offset: Tensor, direction: Tensor, radius: Tensor) -> Tensor:
    """Return the smaller t at which `offset + t * direction` is as long as the radius; -inf if there is none."""
    squared = direction.square().sum(dim=1)
    half = (direction * offset).sum(dim=1)
    discriminant = half.square() - squared * (offset.square().sum(dim=1) - radius.square())
    return (-half - torch.where(discriminant > 0, discriminant, math.inf).sqrt()) / squared


def cylinder_distance(rays: Rays, cylinder: Tensor) -> Tensor:
    """Return how far rays go until the side or top of a cylinder, inf if they miss it; see `World.cylinders`."""
    radius, height = cylinder[:, 3:4], cylinder[:, 4:]
    offset = rays.origin - cylinder[:, :3, None]
    above, climb = offset[:, 1], rays.direction[:, 1]
    across, along = offset[:, ::2], rays.direction[:, ::2]
    side = _first_crossing(across, along, radius)
    level = above + side * climb
    on_side = (side > 0) & (level > 0) & (level < height)
    top = (height - above) / climb
    from_axis = (across + top.unsqueeze(1) * along).square().sum(dim=1)
    on_top = (top > 0) & (from_axis < radius.square())
    return torch.minimum(torch.where(on_side, side, math.inf), torch.where(on_top, top, math.inf))


def cylinder_normal(points: Tensor, cylinder: Tensor) -> Tensor:
    """Return the unit normals of points on the side or top of a cylinder."""
    radius, height = cylinder[:, 3:4], cylinder[:, 4:]
    x, y, z = (points - cylinder[:, :3, None]).unbind(dim=1)
    on_top = (height - y).abs() < (radius - x.hypot(z)).abs()
    outward = torch.stack([x / radius, torch.zeros_like(y), z / radius], dim=1)
    return torch.where(on_top.unsqueeze(1), torch.tensor([[0.0], [1.0], [0.0]]), outward)
