"""Synthetic scenes: small rooms, ray-traced here, in which every pixel has a class, a depth and a surface normal.

A room with boxes, balls and cylinders on its floor, one or two lamps and the shadows they cast, seen by a camera that
stands, turns, tilts and rolls at random. The tasks are those of NYUv2, with exact targets, on images small enough for
a network that one CPU core trains in a minute. All classes draw their colours and patterns from one distribution:
shape, shading and place tell a class, colour does not.

Lengths are metres. The world's y points up; the camera's x points right, its y up, its z into the image. B scenes are
traced together: vectors have shape (B, 3, P) for P points or rays in each, numbers (B, P), what a scene has one of
(B, ...).
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.data.architectures import ARCHITECTURES, build_dense
from benchmarks.data.dense import DEPTH, NORMAL, SEGMENTATION
from benchmarks.data.problem import Batch, DataSet, MakeProblem, MultiTaskModel, Problem
from benchmarks.data.shapes import (
    Rays,
    along_largest,
    ball_distance,
    ball_normal,
    box_distance,
    box_normal,
    cylinder_distance,
    cylinder_normal,
)

HEIGHT, WIDTH = 48, 64
TRAINING, VALIDATION, TEST = 1000, 128, 256
"""Numbers of scenes."""
SEED = 0
"""Of the scenes, which are the same for all problems."""
TASKS = (SEGMENTATION, DEPTH, NORMAL)

CLASSES = ("floor", "wall", "ceiling", "box", "ball", "cylinder")
FLOOR, WALL, CEILING = range(3)
OBJECTS = 2
"""Of each kind in a scene, at most."""
PRESENT = 0.7
"""Probability of each."""
OUT_OF_SIGHT = -1000.0
"""Height of an object that a scene does not have: far below the floor, where no ray gets to."""
SURFACES = (FLOOR, WALL, CEILING, *[3] * OBJECTS, *[4] * OBJECTS, *[5] * OBJECTS)
"""The class of every surface of a scene; each surface has a material of its own."""

PATTERNS = 4
"""Plain, stripes, waves, checks."""
LAMPS = 2
AMBIENT = 0.25
NOISE = 0.03
"""Standard deviation of the noise on a pixel's value, which is from 0 to 1."""
VIEW = 0.55
"""Tangent of half the horizontal angle of view, about 29 degrees."""
CLEARANCE = 1e-3
"""Metres above its surface at which a shadow ray starts, lest rounding put the surface in its own shadow."""
CHUNK = 8
"""Scenes traced together; their rays fit into a processor's cache."""


@dataclass(frozen=True)
class Scenes:
    """Rendered scenes.

    Attributes:
        images: RGB, 0 to 1, shape (N, 3, HEIGHT, WIDTH).
        labels: Indices of `CLASSES`, shape (N, HEIGHT, WIDTH).
        depths: Distance from the camera along its z, shape (N, 1, HEIGHT, WIDTH).
        normals: Unit vectors in the camera's x, y and minus z, shape (N, 3, HEIGHT, WIDTH).
    """

    images: Tensor
    labels: Tensor
    depths: Tensor
    normals: Tensor

    def batch(self, rows: Tensor | slice) -> Batch:
        """Return the scenes at these positions with the targets of the three tasks."""
        targets = {"segmentation": self.labels[rows], "depth": self.depths[rows], "normal": self.normals[rows]}
        return Batch(self.images[rows], targets)


@dataclass(frozen=True)
class World:
    """What is in each of B scenes.

    Attributes:
        low: Corner of the room with the smallest coordinates, shape (B, 3).
        high: The opposite corner, shape (B, 3).
        boxes: Centre, half of the size, and turn about the vertical in radians, shape (B, OBJECTS, 7).
        balls: Centre and radius, shape (B, OBJECTS, 4).
        cylinders: Upright ones: centre of the base, radius and height, shape (B, OBJECTS, 5).
        colours: Two of every surface, shape (B, surfaces, 2, 3).
        patterns: How a surface mixes them, below `PATTERNS`, shape (B, surfaces).
        waves: Frequency, in radians a metre, and phase of a pattern along x, y and z, shape (B, surfaces, 2, 3).
        lamps: Position and brightness, shape (B, LAMPS, 4).
        camera: Position, shape (B, 3).
        axes: The camera's x, y and z, shape (B, 3, 3).
    """

    low: Tensor
    high: Tensor
    boxes: Tensor
    balls: Tensor
    cylinders: Tensor
    colours: Tensor
    patterns: Tensor
    waves: Tensor
    lamps: Tensor
    camera: Tensor
    axes: Tensor


def draw_world(size: int, generator: torch.Generator) -> World:
    """Draw the contents of `size` scenes."""

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(size, *shape, generator=generator)

    half_width, height, length = uniform(2.0, 3.5, 1), uniform(2.3, 3.0, 1), uniform(5.0, 7.0, 1)
    zero = torch.zeros(size, 1)
    camera = torch.cat([uniform(-0.5, 0.5, 1) * half_width, uniform(1.1, 1.8, 1), uniform(0.3, 0.8, 1)], dim=-1)
    heading = uniform(-0.4, 0.4)

    def bases() -> Tensor:
        """Draw places on the floor in front of the camera; far below it for objects that are not there."""
        bearing = heading.unsqueeze(-1) + uniform(-0.4, 0.4, OBJECTS)
        distance = uniform(1.5, 4.5, OBJECTS)
        limit = half_width - 0.4
        x = (camera[:, :1] + distance * bearing.sin()).clamp(-limit, limit)
        z = (camera[:, 2:] + distance * bearing.cos()).minimum(length - 0.4)
        y = torch.where(uniform(0, 1, OBJECTS) < PRESENT, 0.0, OUT_OF_SIGHT)
        return torch.stack([x, y, z], dim=-1)

    up = torch.tensor([0.0, 1.0, 0.0])
    halves = torch.cat([uniform(low, high, OBJECTS, 1) for low, high in ((0.15, 0.5), (0.15, 0.7), (0.15, 0.5))], -1)
    radii = uniform(0.2, 0.55, OBJECTS, 1)
    lamp_places = [
        uniform(-0.8, 0.8, LAMPS) * half_width,
        uniform(0.75, 0.95, LAMPS) * height,
        uniform(0.1, 0.9, LAMPS) * length,
    ]
    brightness = torch.cat([uniform(0.7, 1.2, 1), uniform(-0.5, 0.7, 1).clamp(min=0)], dim=-1)
    return World(
        low=torch.cat([-half_width, zero, zero], dim=-1),
        high=torch.cat([half_width, height, length], dim=-1),
        boxes=torch.cat([bases() + up * halves, halves, uniform(0, math.pi / 2, OBJECTS, 1)], dim=-1),
        balls=torch.cat([bases() + up * radii, radii], dim=-1),
        cylinders=torch.cat([bases(), uniform(0.15, 0.45, OBJECTS, 1), uniform(0.3, 1.4, OBJECTS, 1)], dim=-1),
        colours=uniform(0.1, 1.0, len(SURFACES), 2, 3),
        patterns=torch.randint(PATTERNS, (size, len(SURFACES)), generator=generator),
        waves=torch.stack([uniform(-9.0, 9.0, len(SURFACES), 3), uniform(-math.pi, math.pi, len(SURFACES), 3)], dim=-2),
        lamps=torch.stack([*lamp_places, brightness], dim=-1),
        camera=camera,
        axes=camera_axes(heading, tilt=uniform(-0.4, 0.0), roll=uniform(-0.08, 0.08)),
    )


def camera_axes(heading: Tensor, tilt: Tensor, roll: Tensor) -> Tensor:
    """Return the camera's x, y and z in the world, shape (B, 3, 3), from angles in radians, shape (B,).

    Args:
        heading: 0 looks along the world's z, positive to the right.
        tilt: Positive looks up.
        roll: About the camera's own z.
    """
    forward = torch.stack([heading.sin() * tilt.cos(), tilt.sin(), heading.cos() * tilt.cos()], dim=-1)
    right = torch.stack([heading.cos(), torch.zeros_like(heading), -heading.sin()], dim=-1)
    up = torch.linalg.cross(forward, right)
    cosine, sine = roll.cos().unsqueeze(-1), roll.sin().unsqueeze(-1)
    return torch.stack([cosine * right + sine * up, cosine * up - sine * right, forward], dim=1)


def camera_rays(world: World) -> Rays:
    """Return the rays through the centres of all pixels, row by row; distances along them are depths."""
    x = VIEW * ((2 * torch.arange(WIDTH) + 1) / WIDTH - 1)
    y = VIEW * HEIGHT / WIDTH * (1 - (2 * torch.arange(HEIGHT) + 1) / HEIGHT)
    rows, columns = torch.meshgrid(y, x, indexing="ij")
    pixels = torch.stack([columns, rows, torch.ones_like(rows)]).flatten(1)
    return Rays(world.camera.unsqueeze(-1), world.axes.mT @ pixels)


def room_distance(rays: Rays, world: World) -> Tensor:
    """Return how far rays from inside the room go until its floor, walls or ceiling."""
    ends = torch.where(rays.direction > 0, world.high.unsqueeze(-1), world.low.unsqueeze(-1))
    # Rays along a wall come out at minus infinity.
    return ((ends - rays.origin) / rays.direction).abs().amin(dim=1)


def room_normal(points: Tensor, world: World) -> Tensor:
    """Return the unit normals, into the room, of points on its floor, walls or ceiling."""
    low, high = world.low.unsqueeze(-1), world.high.unsqueeze(-1)
    nearest = torch.maximum(-(points - low).abs(), -(high - points).abs())
    return along_largest(nearest, low + high - 2 * points)


def room_surface(normal: Tensor) -> Tensor:
    """Return which of `FLOOR`, `WALL` and `CEILING` have these normals."""
    upward = normal[:, 1]
    return torch.where(upward == 0, WALL, torch.where(upward > 0, FLOOR, CEILING))


@dataclass(frozen=True)
class Object:
    """One object in each scene: `distance(rays, numbers)` and `normal(points, numbers)` say where its surface is."""

    distance: Callable[[Rays, Tensor], Tensor]
    normal: Callable[[Tensor, Tensor], Tensor]
    numbers: Tensor


def objects(world: World) -> list[Object]:
    """Return all objects in the order in which `SURFACES` has them."""
    return [
        *(Object(box_distance, box_normal, box) for box in world.boxes.unbind(dim=1)),
        *(Object(ball_distance, ball_normal, ball) for ball in world.balls.unbind(dim=1)),
        *(Object(cylinder_distance, cylinder_normal, cylinder) for cylinder in world.cylinders.unbind(dim=1)),
    ]


def first_hits(rays: Rays, world: World) -> tuple[Tensor, Tensor, Tensor]:
    """Return where rays from inside the room first meet something.

    Returns:
        The distances, the indices of `SURFACES`, and the unit normals there.
    """
    distance = room_distance(rays, world)
    normal = room_normal(rays.at(distance), world)
    surface = room_surface(normal)
    for index, one in enumerate(objects(world), start=len(SURFACES) - 3 * OBJECTS):
        to_object = one.distance(rays, one.numbers)
        nearer = to_object < distance
        distance = torch.where(nearer, to_object, distance)
        surface = torch.where(nearer, index, surface)
        normal = torch.where(nearer.unsqueeze(1), one.normal(rays.at(distance), one.numbers), normal)
    return distance, surface, normal


def albedo(points: Tensor, surface: Tensor, world: World) -> Tensor:
    """Return the colours, shape (B, 3, P), of points on the surfaces with these indices."""
    scene = torch.arange(len(points)).unsqueeze(-1)
    frequency, phase = world.waves[scene, surface].unbind(dim=-2)
    phases = points * frequency.mT + phase.mT
    wave, checks = phases.sum(dim=1).sin(), phases.sin().prod(dim=1)
    mixes = torch.stack([torch.zeros_like(wave), (wave > 0).float(), 0.5 + 0.5 * wave, (checks > 0).float()])
    (mix,) = mixes.gather(0, world.patterns[scene, surface].unsqueeze(0))
    one, other = world.colours[scene, surface].unbind(dim=-2)
    return torch.lerp(one, other, mix.unsqueeze(-1)).mT


def lamp_light(points: Tensor, normals: Tensor, world: World) -> Tensor:
    """Return the light on points of surfaces from the lamps that no object hides from them."""
    start = points + CLEARANCE * normals
    light = torch.zeros_like(points[:, 0])
    for lamp in world.lamps.unbind(dim=1):
        to_lamp = lamp[:, :3, None] - start
        squared = to_lamp.square().sum(dim=1)
        incidence = ((to_lamp * normals).sum(dim=1) / squared.sqrt()).clamp(min=0)
        hidden = torch.zeros_like(light, dtype=torch.bool)
        for one in objects(world):
            hidden |= one.distance(Rays(start, to_lamp), one.numbers) < 1
        light += ~hidden * lamp[:, 3:] * incidence / (1 + 0.05 * squared)
    return light


def render(number: int, seed: int) -> Scenes:
    """Make that many scenes; a number and a seed always make the same ones."""
    generator = torch.Generator().manual_seed(seed)
    chunks = [_render_chunk(min(CHUNK, number - done), generator) for done in range(0, number, CHUNK)]
    images, labels, depths, normals = (torch.cat(parts) for parts in zip(*chunks, strict=True))
    return Scenes(images, labels, depths, normals)


def _render_chunk(size: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    world = draw_world(size, generator)
    rays = camera_rays(world)
    distance, surface, normal = first_hits(rays, world)
    points = rays.at(distance)
    light = AMBIENT + lamp_light(points, normal, world)
    colours = albedo(points, surface, world) * light.unsqueeze(1)
    noise = NOISE * torch.randn(colours.shape, generator=generator)
    normal_seen = world.axes @ normal * torch.tensor([[1.0], [1.0], [-1.0]])
    return (
        (colours + noise).clamp(0, 1).reshape(size, 3, HEIGHT, WIDTH),
        torch.tensor(SURFACES)[surface].view(size, HEIGHT, WIDTH),
        distance.view(size, 1, HEIGHT, WIDTH),
        normal_seen.view(size, 3, HEIGHT, WIDTH),
    )


@lru_cache(maxsize=1)
def all_scenes() -> Scenes:
    """Return training, validation and test scenes in this order, made once in a process."""
    return render(TRAINING + VALIDATION + TEST, SEED)


def build_model(architecture: str) -> MultiTaskModel:
    """Make the untrained network."""
    return build_dense(architecture, {"segmentation": len(CLASSES), "depth": 1, "normal": 3}, width=16)


def synthetic_scenes(seed: int, batch_size: int = 16) -> Problem:
    """Make the problem of one seed; all seeds have the same training, validation and test scenes.

    Args:
        seed: Fixes the training batches.
        batch_size: Scenes in a training batch, drawn with replacement.
    """
    scenes = all_scenes()

    def train_batches() -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(seed)
        while True:
            yield scenes.batch(torch.randint(TRAINING, (batch_size,), generator=generator))

    validation = scenes.batch(slice(TRAINING, TRAINING + VALIDATION))
    test = scenes.batch(slice(TRAINING + VALIDATION, None))
    return Problem(TASKS, build_model, train_batches, validation, test)


def load(path: Path | None) -> MakeProblem:
    """Return what makes the problem of a seed.

    Raises:
        ValueError: A path is given.
    """
    if path is not None:
        raise ValueError(f"scenes are made here and take no file, got {path}")
    return synthetic_scenes


SCENES = DataSet(
    "synthetic scenes", TASKS, load, architectures=ARCHITECTURES, batch_size=16, learning_rate=2e-3, steps=600
)
