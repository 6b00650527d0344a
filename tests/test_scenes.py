"""Synthetic scenes: the rays meet what is there, the targets agree with each other, and colour gives no class away."""

import pytest
import torch

pytest.importorskip("sklearn")

from sklearn.ensemble import RandomForestClassifier

from benchmarks.data import scenes, shapes
from benchmarks.data.scenes import CHUNK, CLASSES, HEIGHT, VIEW, WIDTH, Rays, World, render


@pytest.fixture(scope="module")
def rendered():
    return render(48, seed=1)


@pytest.fixture
def few(monkeypatch):
    """Makes the data set small."""
    for name, number in (("TRAINING", 10), ("VALIDATION", 3), ("TEST", 4)):
        monkeypatch.setattr(scenes, name, number)
    scenes.all_scenes.cache_clear()
    yield
    scenes.all_scenes.cache_clear()


def in_ball(points, x, y, z, radius):
    return (points - torch.tensor([x, y, z])).norm(dim=-1) < radius


def in_cylinder(points, x, y, z, radius, height):
    px, py, pz = (points - torch.tensor([x, y, z])).unbind(dim=-1)
    return (px.hypot(pz) < radius) & (py > 0) & (py < height)


def in_box(points, x, y, z, half_x, half_y, half_z, turn):
    px, py, pz = (points - torch.tensor([x, y, z])).unbind(dim=-1)
    cosine, sine = torch.tensor(turn).cos(), torch.tensor(turn).sin()
    return ((px * cosine + pz * sine).abs() < half_x) & (py.abs() < half_y) & ((pz * cosine - px * sine).abs() < half_z)


SHAPES = {
    "ball": (shapes.ball_distance, shapes.ball_normal, in_ball, [0.3, 0.4, 3.0, 0.8]),
    "cylinder": (shapes.cylinder_distance, shapes.cylinder_normal, in_cylinder, [0.1, -0.5, 3.0, 0.7, 1.1]),
    "box": (shapes.box_distance, shapes.box_normal, in_box, [-0.2, 0.1, 3.0, 0.6, 0.5, 0.9, 0.7]),
}
every_shape = pytest.mark.parametrize("shape", SHAPES)


def rays_from(*origin, number=400):
    """Rays of all lengths towards where the shapes are, and some past them."""
    generator = torch.Generator().manual_seed(0)
    goals = torch.randn(number, 3, generator=generator) + torch.tensor([0.0, 0.0, 3.0])
    lengths = torch.rand(number, 1, generator=generator) + 0.5
    start = torch.tensor(origin)
    return Rays(start.view(1, 3, 1), (lengths * (goals - start)).mT.unsqueeze(0))


def points_of(rays, distance):
    return rays.at(distance)[0].mT


@every_shape
@pytest.mark.parametrize("origin", [(0.0, 0.5, 0.0), (0.5, 3.0, 2.5), (-2.0, 0.0, 4.0)], ids=["front", "above", "side"])
def test_a_ray_goes_until_the_first_point_inside(shape, origin):
    distance_of, _, inside, numbers = SHAPES[shape]
    rays = rays_from(*origin)
    (distance,) = distance_of(rays, torch.tensor([numbers]))
    steps = torch.arange(0, 8, 2e-3)
    walk = rays.origin[0].T.unsqueeze(1) + steps.view(1, -1, 1) * rays.direction[0].T.unsqueeze(1)
    within = inside(walk, *numbers)
    met = within.any(dim=1)
    assert 50 < met.sum() < 390
    first = steps[within.int().argmax(dim=1)]
    # A walk in steps misses what a ray only grazes.
    assert (distance[met] - first[met]).abs().max() < 4e-3
    assert (distance[~met] < 8).float().mean() < 0.05


@every_shape
def test_normals_point_out_of_the_surface_at_right_angles_to_it(shape):
    distance_of, normal_of, inside, numbers = SHAPES[shape]
    rays = rays_from(0.5, 2.5, 0.0)
    distance = distance_of(rays, torch.tensor([numbers]))
    normal = normal_of(rays.at(distance), torch.tensor([numbers]))[0].mT
    hit = distance[0].isfinite()
    points, normal = points_of(rays, distance)[hit], normal[hit]
    torch.testing.assert_close(normal.norm(dim=1), torch.ones(len(normal)))
    assert not inside(points + 1e-2 * normal, *numbers).any()
    assert inside(points - 1e-2 * normal, *numbers).float().mean() > 0.97
    assert ((normal * rays.direction[0].mT[hit]).sum(dim=1) < 0).all()
    # At right angles: the surface nearby is as far in along the normal, whichever way one goes.
    aside = torch.linalg.cross(normal, torch.tensor([0.3, 0.5, 0.8]).expand_as(normal))
    aside = 1e-2 * aside / aside.norm(dim=1, keepdim=True)
    for way in (aside, -aside):
        assert inside(points + way - 1e-3 * normal, *numbers).float().mean() > 0.95


@every_shape
def test_a_ray_that_leaves_a_shape_behind_misses_it(shape):
    distance_of, *_, numbers = SHAPES[shape]
    rays = rays_from(0.0, 0.5, 0.0)
    assert distance_of(Rays(rays.origin, -rays.direction), torch.tensor([numbers])).isinf().all()


def small_world():
    """A room with a ball and a cylinder on its floor, and one lamp above the ball."""
    nowhere = scenes.OUT_OF_SIGHT
    surfaces = len(scenes.SURFACES)
    return World(
        low=torch.tensor([[-2.0, 0.0, 0.0]]),
        high=torch.tensor([[2.0, 2.5, 6.0]]),
        boxes=torch.tensor([[[0.0, nowhere, 3.0, 0.5, 0.5, 0.5, 0.0]] * 2]),
        balls=torch.tensor([[[0.0, 0.5, 3.0, 0.5], [0.0, nowhere, 3.0, 0.5]]]),
        cylinders=torch.tensor([[[-1.4, 0.0, 4.5, 0.3, 1.0], [0.0, nowhere, 3.0, 0.5, 1.0]]]),
        colours=torch.rand(1, surfaces, 2, 3, generator=torch.Generator().manual_seed(0)),
        patterns=torch.zeros(1, surfaces, dtype=torch.long),
        waves=torch.zeros(1, surfaces, 2, 3),
        lamps=torch.tensor([[[0.0, 2.0, 3.0, 1.0], [0.0, 2.0, 3.0, 0.0]]]),
        camera=torch.tensor([[0.0, 1.5, 0.5]]),
        axes=torch.eye(3).unsqueeze(0),
    )


@pytest.mark.parametrize(
    ("direction", "distance", "name", "normal"),
    [
        ((0.0, -1.0, 2.5), 1 - 0.5 / 7.25**0.5, "ball", (0.0, 1 / 7.25**0.5, -2.5 / 7.25**0.5)),
        ((0.0, -1.5, 0.5), 1.0, "floor", (0.0, 1.0, 0.0)),
        ((0.0, 1.0, 0.5), 1.0, "ceiling", (0.0, -1.0, 0.0)),
        ((1.0, 0.1, 0.5), 2.0, "wall", (-1.0, 0.0, 0.0)),
        ((-1.0, 0.1, 0.5), 2.0, "wall", (1.0, 0.0, 0.0)),
        ((0.1, 0.0, 1.0), 5.5, "wall", (0.0, 0.0, -1.0)),
    ],
)
def test_nearest_surface_is_seen(direction, distance, name, normal):
    world = small_world()
    found, surface, found_normal = scenes.first_hits(
        Rays(world.camera.unsqueeze(-1), torch.tensor(direction).view(1, 3, 1)), world
    )
    assert found.item() == pytest.approx(distance)
    assert CLASSES[scenes.SURFACES[surface.item()]] == name
    assert found_normal.flatten().tolist() == pytest.approx(normal, abs=1e-6)


@pytest.mark.parametrize(
    ("point", "normal", "light"),
    [
        pytest.param((1.5, 0.0, 3.0), (0.0, 1.0, 0.0), 0.8 / (1 + 0.05 * 6.25), id="floor beside the ball"),
        pytest.param((0.2, 0.0, 3.0), (0.0, 1.0, 0.0), 0.0, id="floor in the shadow of the ball"),
        pytest.param((0.0, 1.0, 3.0), (0.0, 1.0, 0.0), 1 / 1.05, id="top of the ball, not in its own shadow"),
        pytest.param((-1.4, 1.0, 4.5), (0.0, 1.0, 0.0), 1 / 5.21**0.5 / (1 + 0.05 * 5.21), id="top of the cylinder"),
        pytest.param((0.3, 0.1, 3.0), (0.6, -0.8, 0.0), 0.0, id="underside of the ball"),
        pytest.param((1.0, 2.5, 3.0), (0.0, -1.0, 0.0), 0.5 / 1.25**0.5 / (1 + 0.05 * 1.25), id="ceiling"),
    ],
)
def test_light_comes_from_lamps_in_sight(point, normal, light):
    vectors = (torch.tensor(vector).view(1, 3, 1) for vector in (point, normal))
    assert scenes.lamp_light(*vectors, small_world()).item() == pytest.approx(light, abs=1e-3)


def test_surfaces_that_are_plain_have_their_first_colour():
    world = small_world()
    surface = torch.arange(len(scenes.SURFACES)).unsqueeze(0)
    colours = scenes.albedo(torch.zeros(1, 3, surface.shape[1]), surface, world)
    assert torch.equal(colours, world.colours[:, :, 0].mT)


def test_same_seed_makes_the_same_scenes(rendered):
    assert len(rendered.images) > 2 * CHUNK
    same, other = render(48, seed=1), render(48, seed=2)
    for name in ("images", "labels", "depths", "normals"):
        assert torch.equal(getattr(same, name), getattr(rendered, name))
        assert not torch.equal(getattr(other, name), getattr(rendered, name))


def test_last_chunk_is_as_long_as_it_must_be():
    assert len(render(CHUNK + 1, seed=0).images) == CHUNK + 1


def test_images_labels_depths_and_normals_are_what_they_say(rendered):
    assert rendered.images.shape == rendered.normals.shape == (48, 3, HEIGHT, WIDTH)
    assert rendered.images.min() >= 0
    assert rendered.images.max() <= 1
    assert 0.5 < rendered.depths.min() < rendered.depths.max() < 9
    lengths = rendered.normals.norm(dim=1)
    torch.testing.assert_close(lengths, torch.ones_like(lengths), atol=1e-3, rtol=0)
    shares = rendered.labels.flatten().bincount() / rendered.labels.numel()
    assert len(shares) == len(CLASSES)
    assert shares.min() > 0.02
    assert shares.max() < 0.6


def seen(scenes_rendered):
    """Where every pixel's surface is in the camera's x, y and minus z, shape (N, 3, HEIGHT, WIDTH)."""
    x = VIEW * ((torch.arange(WIDTH) + 0.5) / (WIDTH / 2) - 1)
    y = -VIEW * ((torch.arange(HEIGHT) + 0.5) / (WIDTH / 2) - HEIGHT / WIDTH)
    directions = torch.stack(
        [x.expand(HEIGHT, WIDTH), y.unsqueeze(1).expand(HEIGHT, WIDTH), -torch.ones(HEIGHT, WIDTH)]
    )
    return directions * scenes_rendered.depths


def test_surfaces_face_the_camera(rendered):
    assert ((seen(rendered) * rendered.normals).sum(dim=1) < 0).all()


@pytest.mark.parametrize("name", ["floor", "ceiling"])
def test_depth_and_normals_of_a_plane_agree(name, rendered):
    pixels = rendered.labels == CLASSES.index(name)
    below = -(seen(rendered) * rendered.normals).sum(dim=1)
    for number in range(48):
        if pixels[number].any():
            normals = rendered.normals[number][:, pixels[number]]
            assert (normals - normals[:, :1]).abs().max() < 1e-5
            heights = below[number][pixels[number]]
            assert heights.max() - heights.min() < 1e-3
            assert (1.0 if name == "floor" else 0.4) < heights.mean() < 2


def test_normals_are_those_of_the_surface_between_neighbouring_points(rendered):
    points = seen(rendered)
    right = points[..., :-1, 1:] - points[..., :-1, :-1]
    down = points[..., 1:, :-1] - points[..., :-1, :-1]
    normals = torch.nn.functional.normalize(torch.linalg.cross(down, right, dim=1), dim=1)
    agreement = (normals * rendered.normals[..., :-1, :-1]).sum(dim=1)
    assert (agreement > 0.99).float().mean() > 0.85


def test_colour_of_a_pixel_tells_little_of_its_class(rendered):
    def pixels(rows):
        return rendered.images[rows].movedim(1, -1).reshape(-1, 3).numpy(), rendered.labels[rows].flatten().numpy()

    (colours, labels), (other_colours, other_labels) = pixels(slice(0, 32)), pixels(slice(32, None))
    guess = (other_labels == CLASSES.index("wall")).mean()
    forest = RandomForestClassifier(20, max_depth=8, random_state=0).fit(colours[::8], labels[::8])
    assert forest.score(other_colours, other_labels) < guess + 0.1


def test_problem_keeps_training_validation_and_test_scenes_apart(few):
    problem = scenes.SCENES.load(None)(0, 64)
    batches = problem.train_batches()
    train, more = next(batches), next(batches)
    assert {len(train.inputs.flatten(1).unique(dim=0)), len(problem.validation.inputs), len(problem.test.inputs)} == {
        10,
        3,
        4,
    }
    everything = torch.cat([train.inputs, problem.validation.inputs, problem.test.inputs]).flatten(1)
    assert len(everything.unique(dim=0)) == 17
    assert not torch.equal(train.inputs, more.inputs)
    assert torch.equal(next(problem.train_batches()).inputs, train.inputs)
    other_seed = scenes.SCENES.load(None)(1, 64)
    assert torch.equal(other_seed.test.inputs, problem.test.inputs)
    assert not torch.equal(next(other_seed.train_batches()).inputs, train.inputs)


@pytest.mark.parametrize("architecture", scenes.SCENES.architectures)
def test_every_task_has_an_output_a_loss_and_metrics(architecture, few):
    problem = scenes.SCENES.load(None)(0, 2)
    assert [task.name for task in problem.tasks] == ["segmentation", "depth", "normal"]
    model = problem.build_model(architecture)
    outputs = model(problem.test.inputs, [task.name for task in problem.tasks])
    for task in problem.tasks:
        target = problem.test.targets[task.name]
        assert task.loss(outputs[task.name], target) > 0
        assert all(metric.score(outputs[task.name], target).isfinite() for metric in task.metrics)


def test_scenes_take_no_file(tmp_path):
    with pytest.raises(ValueError, match="take no file"):
        scenes.SCENES.load(tmp_path)
    assert "synthetic" in scenes.SCENES.title
