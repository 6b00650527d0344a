"""Losses and metrics of dense prediction equal those of other libraries; folders of NYUv2 and Cityscapes are read."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("sklearn")

from sklearn import metrics

from benchmarks.data.architectures import STRIDE
from benchmarks.data.dense import (
    DEPTH,
    NORMAL,
    SEGMENTATION,
    depth_loss,
    normal_loss,
    segmentation_loss,
)
from benchmarks.data.dense_folders import CITYSCAPES, CITYSCAPES_LAYOUT, NYUV2, NYUV2_LAYOUT, load_folders

CLASSES = 5


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def score(task, name, outputs, targets):
    (metric,) = (metric for metric in task.metrics if metric.name == name)
    return metric.score(outputs, targets).item()


@pytest.fixture
def segmentation():
    """Logits that are right more often than not, and labels of which a fifth is missing."""
    labels = torch.randint(-1, CLASSES - 1, (4, 6, 8), generator=torch.Generator().manual_seed(0))
    logits = random(4, CLASSES, 6, 8) + 2 * F.one_hot(labels.clamp(min=0), CLASSES).movedim(-1, 1)
    # The last class has no pixel and is never predicted.
    logits[:, -1] = -10
    return logits, labels


@pytest.fixture
def depth():
    target = random(4, 1, 6, 8, seed=1).abs() + 0.5
    target[:, :, 2] = 0
    return target + random(4, 1, 6, 8, seed=2), target


@pytest.fixture
def normals():
    target = F.normalize(random(4, 3, 6, 8, seed=3), dim=1)
    # Their components add up to 0, and still they are normals.
    target[0, :, 0] = torch.tensor([0.5, 0.5, -1.0]).div(1.5**0.5).unsqueeze(-1)
    target[:, :, :, 3] = 0
    return 2 * target + random(4, 3, 6, 8, seed=4), target


def test_segmentation_equals_scikit_learn(segmentation):
    logits, labels = segmentation
    labelled = labels >= 0
    true, predicted = labels[labelled].numpy(), logits.argmax(dim=1)[labelled].numpy()
    probabilities = logits.double().softmax(dim=1).movedim(1, -1)[labelled].numpy()
    iou = metrics.jaccard_score(true, predicted, average="macro")
    assert score(SEGMENTATION, "mIoU", logits, labels) == pytest.approx(iou)
    accuracy = metrics.accuracy_score(true, predicted)
    assert score(SEGMENTATION, "pixel accuracy", logits, labels) == pytest.approx(accuracy)
    expected = metrics.log_loss(true, probabilities, labels=range(CLASSES))
    assert segmentation_loss(logits, labels).item() == pytest.approx(expected)


def test_depth_equals_scikit_learn(depth):
    output, target = (tensor[depth[1] > 0].double().numpy() for tensor in depth)
    absolute = metrics.mean_absolute_error(target, output)
    assert depth_loss(*depth).item() == pytest.approx(absolute)
    assert score(DEPTH, "absolute error", *depth) == pytest.approx(absolute)
    relative = metrics.mean_absolute_percentage_error(target, output)
    assert score(DEPTH, "relative error", *depth) == pytest.approx(relative)


def test_normals_equal_numpy(normals):
    output, target = (np.moveaxis(tensor.numpy().astype(float), 1, -1) for tensor in normals)
    valid = np.abs(target).max(axis=-1) > 0
    assert valid.sum() == 4 * 6 * 7
    unit = output[valid] / np.linalg.norm(output[valid], axis=-1, keepdims=True)
    cosines = (unit * target[valid]).sum(axis=-1)
    degrees = np.degrees(np.arccos(cosines))
    assert normal_loss(*normals).item() == pytest.approx(1 - cosines.mean(), rel=1e-5)
    assert score(NORMAL, "mean angle", *normals) == pytest.approx(degrees.mean(), rel=1e-5)
    assert score(NORMAL, "median angle", *normals) == pytest.approx(np.sort(degrees)[len(degrees) // 2 - 1], rel=1e-5)
    for limit in (11.25, 22.5, 30):
        assert score(NORMAL, f"within {limit}", *normals) == pytest.approx((degrees < limit).mean())


def test_normal_loss_equals_torchs_cosine_similarity_with_its_gradient(normals):
    output, target = normals[0].requires_grad_(), normals[1]
    valid = target.abs().sum(dim=1) > 0
    expected = 1 - F.cosine_similarity(output, target, dim=1)[valid].mean()
    (gradient,) = torch.autograd.grad(expected, output)
    loss = normal_loss(output, target)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(loss, output)[0], gradient)


@pytest.mark.parametrize(
    ("task", "fixture"), [(SEGMENTATION, "segmentation"), (DEPTH, "depth"), (NORMAL, "normals")], ids=lambda x: str(x)
)
def test_pixels_without_ground_truth_count_nowhere(task, fixture, request):
    output, target = request.getfixturevalue(fixture)
    missing = {"segmentation": target == -1, "depth": target[:, 0] == 0, "normal": (target == 0).all(dim=1)}[task.name]
    assert missing.any()
    other = torch.where(missing.unsqueeze(1), 100 * random(*output.shape, seed=5), output)
    for function in (task.loss, *(metric.score for metric in task.metrics)):
        assert function(other, target).item() == pytest.approx(function(output, target).item())
    changed = output.clone().requires_grad_()
    task.loss(changed, target).backward()
    assert changed.grad.isfinite().all()
    assert (changed.grad.abs().amax(dim=1) > 0).equal(~missing)


def test_perfect_outputs_have_perfect_metrics(segmentation, depth, normals):
    labels, depths, directions = segmentation[1], depth[1], normals[1]
    logits = F.one_hot(labels.clamp(min=0), CLASSES).movedim(-1, 1).float()
    perfect = {
        **{metric.name: metric.score(logits, labels).item() for metric in SEGMENTATION.metrics},
        **{metric.name: metric.score(depths, depths).item() for metric in DEPTH.metrics},
        **{metric.name: metric.score(3 * directions, directions).item() for metric in NORMAL.metrics},
    }
    best = {
        metric.name: float(metric.higher_is_better) for task in (SEGMENTATION, DEPTH, NORMAL) for metric in task.metrics
    }
    assert perfect == pytest.approx(best, abs=0.05)


def test_normal_of_zeros_as_output_has_a_finite_gradient(normals):
    output = torch.zeros_like(normals[0]).requires_grad_()
    normal_loss(output, normals[1]).backward()
    assert output.grad.isfinite().all()


HEIGHT, WIDTH = 8, 12
TRAINING, TEST = 20, 3


def arrays(number, classes):
    """The files of one image, whose red channel says which it is; the types are those of other programs."""
    generator = np.random.default_rng(number)
    image = generator.random((HEIGHT, WIDTH, 3))
    image[..., 0] = number / 100
    label = generator.integers(-1, classes, (HEIGHT, WIDTH)).astype(np.float32)
    depth = generator.uniform(0, 5, (HEIGHT, WIDTH, 1)).astype(np.float32)
    normal = generator.normal(size=(HEIGHT, WIDTH, 3))
    normal /= np.linalg.norm(normal, axis=-1, keepdims=True)
    label[0, 0], depth[0, 0], normal[0, 0] = -1, 0, 0
    return {"image": image, "label": label, "depth": depth, "normal": normal}


def write(path, classes=13, names=("image", "label", "depth", "normal"), label="label"):
    for split, first, size in (("train", 0, TRAINING), ("val", 50, TEST)):
        for index in range(size):
            for name, array in arrays(first + index, classes).items():
                if name in names:
                    folder = path / split / (label if name == "label" else name)
                    folder.mkdir(parents=True, exist_ok=True)
                    np.save(folder / f"{index}.npy", array)
    return path


@pytest.fixture
def nyuv2(tmp_path):
    return write(tmp_path / "nyuv2")


def numbers(images):
    """The numbers of images as `arrays` made them."""
    return [round(image[0, 0, 0].item() * 100) for image in images]


def test_nyuv2_gives_the_arrays_of_its_files(nyuv2):
    test = NYUV2.load(nyuv2)(0, 4).test
    assert numbers(test.inputs) == [50, 51, 52]
    written = arrays(51, 13)
    assert test.inputs.dtype == torch.float32
    assert test.targets["segmentation"].dtype == torch.int64
    torch.testing.assert_close(test.inputs[1], torch.tensor(written["image"]).movedim(-1, 0).float())
    assert torch.equal(test.targets["segmentation"][1], torch.tensor(written["label"]).long())
    assert torch.equal(test.targets["depth"][1, 0], torch.tensor(written["depth"])[..., 0])
    torch.testing.assert_close(test.targets["normal"][1], torch.tensor(written["normal"]).movedim(-1, 0).float())


def test_validation_images_are_the_last_tenth_and_not_trained_on(nyuv2):
    problem = NYUV2.load(nyuv2)(0, 6)
    assert numbers(problem.validation.inputs) == [18, 19]
    batches = problem.train_batches()
    epochs = [[number for _ in range(3) for number in numbers(next(batches).inputs)] for _ in range(2)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(18))
    assert epochs[0] != epochs[1]


def test_every_training_batch_is_full(nyuv2):
    batches = NYUV2.load(nyuv2)(0, 8).train_batches()
    assert [len(next(batches).inputs) for _ in range(5)] == [8] * 5


def test_training_order_depends_on_the_seed_alone(nyuv2):
    make_problem = NYUV2.load(nyuv2)
    first, again, other = (make_problem(seed, 6) for seed in (0, 0, 1))
    order = numbers(next(first.train_batches()).inputs)
    torch.rand(1)
    assert numbers(next(first.train_batches()).inputs) == numbers(next(again.train_batches()).inputs) == order
    assert numbers(next(other.train_batches()).inputs) != order
    assert first.test is other.test


def test_limit_keeps_the_first_validation_and_test_images(nyuv2):
    problem = load_folders(NYUV2_LAYOUT, nyuv2, limit=1)(0, 18)
    assert numbers(problem.validation.inputs) == [18]
    assert numbers(problem.test.inputs) == [50]
    assert sorted(numbers(next(problem.train_batches()).inputs)) == list(range(18))


@pytest.mark.parametrize("label", ["label", "label_7"])
def test_cityscapes_reads_seven_classes_from_either_folder(label, tmp_path):
    write(tmp_path, classes=7, names=("image", "label", "depth"), label=label)
    if label == "label_7":
        write(tmp_path, classes=19, names=("label",), label="label")
    problem = CITYSCAPES.load(tmp_path)(0, 2)
    assert list(problem.test.targets) == ["segmentation", "depth"]
    assert torch.equal(problem.test.targets["segmentation"][0], torch.tensor(arrays(50, 7)["label"]).long())


@pytest.mark.parametrize("architecture", NYUV2.architectures)
def test_networks_of_folders_learn_from_a_batch(architecture, nyuv2):
    problem = NYUV2.load(nyuv2)(0, 2)
    batch = next(problem.train_batches())
    model = problem.build_model(architecture)
    outputs = model(batch.inputs, [task.name for task in problem.tasks])
    losses = [task.loss(outputs[task.name], batch.targets[task.name]) for task in problem.tasks]
    torch.stack(losses).sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def remove(path):
    path.unlink()


def cut(path):
    path.write_bytes(path.read_bytes()[:200])


def empty(path):
    path.write_bytes(b"")


def replace(array):
    return lambda path: np.save(path, array)


def pack(path):
    with path.open("wb") as file:
        np.savez(file, image_of(0))


def image_of(value):
    return np.full((HEIGHT, WIDTH, 3), value)


@pytest.mark.parametrize(
    ("file", "harm", "message"),
    [
        ("val/depth/1.npy", remove, "depth lacks 1.npy"),
        ("train/label/7.npy", remove, "label lacks 7.npy"),
        ("train/image/0.npy", cut, "train/image/0.npy: "),
        ("train/image/0.npy", empty, "train/image/0.npy: No data left in file"),
        ("train/image/0.npy", pack, "train/image/0.npy: it does not hold one array of numbers"),
        ("train/image/0.npy", replace(np.array(["a"])), "does not hold one array of numbers"),
        ("train/image/0.npy", replace(np.zeros((HEIGHT + 1, WIDTH, 3))), "has shape (9, 12, 3)"),
        ("train/image/0.npy", replace(np.zeros((HEIGHT, WIDTH))), "has shape (8, 12)"),
    ],
)
def test_loading_says_what_is_wrong_with_a_folder(file, harm, message, nyuv2):
    harm(nyuv2 / file)
    with pytest.raises(ValueError) as error:
        NYUV2.load(nyuv2)
    assert message in str(error.value)
    assert_says_what_is_expected(str(error.value), nyuv2)


@pytest.mark.parametrize(
    ("file", "harm", "message"),
    [
        ("depth/1.npy", replace(np.zeros((HEIGHT, WIDTH))), "its shape is (8, 12) and not (8, 12, 1)"),
        (
            "image/1.npy",
            replace(np.zeros((HEIGHT, WIDTH + 4, 3))),
            "its shape is (8, 16, 3) and not (8, 12, 3)",
        ),
        ("label/1.npy", replace(np.full((HEIGHT, WIDTH), 13.0)), "its values go from 13.0 to 13.0"),
        ("label/1.npy", replace(np.full((HEIGHT, WIDTH), -2)), "its values go from -2 to -2"),
        ("label/1.npy", replace(np.full((HEIGHT, WIDTH), np.nan)), "its values go from nan"),
        ("normal/1.npy", replace(image_of(np.nan)), "its values go from nan"),
        ("image/1.npy", replace(image_of(np.inf)), "its values go from inf"),
        ("normal/1.npy", cut, "normal/1.npy: "),
    ],
)
@pytest.mark.parametrize("split", ["train", "val"])
def test_reading_says_what_is_wrong_with_a_file(split, file, harm, message, nyuv2):
    harm(nyuv2 / split / file)
    make_problem = NYUV2.load(nyuv2)
    with pytest.raises(ValueError) as error:
        next(make_problem(0, 18).train_batches())
    assert message in str(error.value)
    assert_says_what_is_expected(str(error.value), nyuv2 / split / file)


def assert_says_what_is_expected(message, path):
    for words in (str(path), "label (H, W)", "normal (H, W, 3)", "github.com/lorenmt/mtan", "cs.nyu.edu"):
        assert words in message


@pytest.mark.parametrize("data", [NYUV2, CITYSCAPES], ids=lambda data: data.title)
def test_folders_that_are_missing_are_named(data, tmp_path):
    for path, message in ((None, "needs a path"), (tmp_path / "nowhere", "nowhere"), (tmp_path, "no such files")):
        with pytest.raises(ValueError, match=message) as error:
            data.load(path)
        assert "train and val" in str(error.value)
        assert f"divisible by {STRIDE}" in str(error.value)


def test_training_set_must_have_an_image_to_spare(nyuv2):
    for path in (nyuv2 / "train").glob("*/*.npy"):
        if path.stem != "0":
            path.unlink()
    with pytest.raises(ValueError, match="train has a single image"):
        NYUV2.load(nyuv2)


def test_batch_must_not_be_larger_than_the_training_set(nyuv2):
    with pytest.raises(ValueError, match="batch_size must be at most 18, the number of training images, got 19"):
        NYUV2.load(nyuv2)(0, 19)


def test_layouts_have_the_papers_classes():
    assert NYUV2_LAYOUT.channels == {"segmentation": 13, "depth": 1, "normal": 3}
    assert CITYSCAPES_LAYOUT.channels == {"segmentation": 7, "depth": 1}
