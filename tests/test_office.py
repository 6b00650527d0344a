"""Office sets are read from folders, archives and feature files, and split so that no part sees another's examples."""

from itertools import islice

import numpy as np
import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("scipy")
pytest.importorskip("PIL")

from PIL import Image
from scipy.io import savemat

from benchmarks.data import office, office_files
from benchmarks.data.office import (
    CALTECH10_DOMAINS,
    OFFICE_31,
    OFFICE_31_DOMAINS,
    OFFICE_CALTECH10,
    OFFICE_CALTECH10_GOOGLENET,
    OFFICE_CALTECH10_SURF,
    OFFICE_HOME,
    OFFICE_HOME_DOMAINS,
)

EACH = 5
"""Examples of each class in each domain."""


def names_of(classes):
    return [f"class_{number:02d}" for number in range(classes)]


def write_images(folder, label, domain, each=EACH, size=(8, 6), suffix=".png"):
    """One-coloured images: the class in the red channel, the domain in the green one, the image in the blue one."""
    folder.mkdir(parents=True)
    for number in range(each):
        Image.new("RGB", size, (3 * label, 50 * domain, 10 * number)).save(folder / f"frame_{number:04d}{suffix}")


def write_office(root, domains, classes, inside="", **options):
    for domain, name in enumerate(domains):
        for label, class_name in enumerate(names_of(classes)):
            write_images(root / name / inside / class_name, label, domain, **options)
    return root


@pytest.fixture(scope="module")
def office_31(tmp_path_factory):
    return write_office(tmp_path_factory.mktemp("office_31"), OFFICE_31_DOMAINS, 31, "images")


def colours(images):
    """The colour of each image, 0 to 255."""
    return ((images[:, :, 0, 0] + 2) * 63.75).round().int()


def archive(classes=10, each=EACH):
    """Images of 4x4 as in the archive: the class, the domain and the number of an image in its three channels."""
    rows = [(label, domain, number) for domain in range(4) for label in range(classes) for number in range(each)]
    pixels = np.repeat(np.array(rows, np.uint8), 16, axis=0).reshape(len(rows), 4, 4, 3)
    labels, domain, _ = np.array(rows, np.uint8).T
    return {"x": pixels, "y": labels, "domain": domain, "domain_names": np.array(CALTECH10_DOMAINS)}


def write_features(folder, domains, width, seed=0, **changes):
    """Counts as in the feature files, the first the class, the second the domain; labels in a row or in a column.

    So that the class can be learnt, one of the next ten counts is large too.
    """
    folder.mkdir(parents=True)
    labels = np.repeat(np.arange(1, 11), EACH)
    generator = np.random.default_rng(seed)
    for domain, name in enumerate(domains):
        features = generator.integers(0, 2, (len(labels), width)).astype(np.uint8)
        features[:, 0], features[:, 1] = labels, domain
        features[np.arange(len(labels)), 1 + labels] = 250
        arrays = {"fts": features, "labels": labels[:, None] if domain % 2 else labels[None]} | changes
        savemat(folder / f"{name}.mat", {key: array for key, array in arrays.items() if array is not None})
    return folder


# ------------------------------------------------------------------ folders


def test_office_31_is_read_from_its_folders_with_a_task_a_domain(office_31):
    problem = OFFICE_31.load(office_31)(0, 4)
    assert [task.name for task in problem.tasks] == [task.name for task in OFFICE_31.tasks] == list(OFFICE_31_DOMAINS)
    for domain, name in enumerate(OFFICE_31_DOMAINS):
        for batch in (next(problem.train_batches()), problem.validation, problem.test):
            seen = colours(batch.inputs[name])
            assert torch.equal(seen[:, 0], 3 * batch.targets[name].int())
            assert set(seen[:, 1].tolist()) == {50 * domain}
            assert batch.inputs[name].shape[1:] == (3, 64, 64)


@pytest.mark.parametrize("real_world", ["Real World", "Real_World"])
def test_office_home_is_read_whichever_way_real_world_is_spelt(real_world, tmp_path):
    folders = [*OFFICE_HOME_DOMAINS[:3], real_world]
    problem = OFFICE_HOME.load(write_office(tmp_path, folders, 65, suffix=".jpg"))(0, 4)
    assert list(problem.test.inputs) == [task.name for task in problem.tasks] == list(OFFICE_HOME_DOMAINS)
    assert {len(batch) for batch in problem.test.inputs.values()} == {65}
    assert problem.build_model("hard").heads["Real_World"].out_features == 65


@pytest.mark.parametrize("size", [(300, 200), (64, 64), (20, 50)])
@pytest.mark.parametrize("suffix", [".jpg", ".png", ".JPEG"])
def test_an_image_of_any_size_is_resized_as_a_whole(size, suffix, tmp_path):
    image = Image.new("RGB", size, (200, 0, 0))
    image.paste((0, 0, 200), (size[0] // 2, 0, *size))
    for number in range(EACH):
        path = tmp_path / "amazon" / "mug" / f"{number}{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path)
    pixels = office_files.read_folders(tmp_path, ["amazon"], 1, size=32)["amazon"].inputs
    assert pixels.shape == (EACH, 3, 32, 32)
    assert pixels.dtype == torch.uint8
    left, right = pixels[:, :, :, :12].float(), pixels[:, :, :, -12:].float()
    for half, colour in ((left, (200, 0, 0)), (right, (0, 0, 200))):
        assert (half - torch.tensor(colour).view(3, 1, 1)).abs().max() < 10


def test_images_that_are_grey_or_have_a_palette_become_colour_images(tmp_path):
    folder = tmp_path / "amazon" / "mug"
    folder.mkdir(parents=True)
    for number, mode in enumerate(["L", "P", "RGBA", "RGB", "1"]):
        Image.new(mode, (8, 8)).save(folder / f"{number}.png")
    assert office_files.read_folders(tmp_path, ["amazon"], 1)["amazon"].inputs.shape == (5, 3, 64, 64)


def test_files_that_are_no_images_are_passed_over(tmp_path):
    write_office(tmp_path, ["amazon"], 2)
    for name in ("Thumbs.db", "._frame_0001.png", "notes.txt"):
        (tmp_path / "amazon" / "class_01" / name).write_bytes(b"something else")
    (tmp_path / "amazon" / ".DS_Store").write_bytes(b"something else")
    assert len(office_files.read_folders(tmp_path, ["amazon"], 2)["amazon"]) == 2 * EACH


def assert_fails_with(data, path, *words):
    with pytest.raises(ValueError) as error:
        data.load(path)
    for word in (str(path), *words):
        assert word in str(error.value)


OFFICE_31_EXPECTED = ("Expected is", "webcam/images/CLASS", "31 classes", "https://faculty.cc.gatech.edu")
HOME_EXPECTED = ("Expected is", "Real_World/CLASS", "65 classes", "https://www.hemanthdv.org")
CALTECH_EXPECTED = ("Expected is", "caltech10", "x, y, domain, domain_names", "Gong", "https://github.com")


def test_an_empty_folder_is_answered_with_what_is_expected(tmp_path):
    assert_fails_with(OFFICE_31, tmp_path, "there is no folder amazon", *OFFICE_31_EXPECTED)
    assert_fails_with(OFFICE_HOME, tmp_path, "there is no folder Art", *HOME_EXPECTED)
    assert_fails_with(OFFICE_CALTECH10, tmp_path, "there is no folder amazon", *CALTECH_EXPECTED)
    assert_fails_with(OFFICE_31, tmp_path / "nowhere", "there is no folder amazon", *OFFICE_31_EXPECTED)


def test_no_path_is_answered_with_what_is_expected():
    for data, expected in ((OFFICE_31, OFFICE_31_EXPECTED), (OFFICE_HOME, HOME_EXPECTED)):
        with pytest.raises(ValueError) as error:
            data.load(None)
        for word in ("a path is needed", *expected[1:]):
            assert word in str(error.value)


@pytest.mark.parametrize("classes", [30, 32])
def test_the_number_of_classes_is_checked(classes, tmp_path):
    write_office(tmp_path, OFFICE_31_DOMAINS, classes, "images", each=1)
    assert_fails_with(OFFICE_31, tmp_path, f"the domains have {classes} classes and must have 31", *OFFICE_31_EXPECTED)


def test_a_class_that_one_domain_lacks_is_named(tmp_path):
    write_office(tmp_path, OFFICE_31_DOMAINS, 31, "images", each=1)
    (tmp_path / "dslr" / "images" / "class_07").rename(tmp_path / "elsewhere")
    assert_fails_with(OFFICE_31, tmp_path, "dslr lacks class_07")


def test_a_class_without_images_and_one_with_too_few_are_named(tmp_path):
    write_office(tmp_path, OFFICE_31_DOMAINS, 31, "images")
    folder = tmp_path / "webcam" / "images" / "class_30"
    (folder / "frame_0000.png").unlink()
    assert_fails_with(OFFICE_31, tmp_path, "webcam has a class with 4 examples and must have 5")
    for file in folder.iterdir():
        file.unlink()
    assert_fails_with(OFFICE_31, tmp_path, f"{folder} has no images")


@pytest.mark.parametrize("suffix", [".png", ".jpg"])
@pytest.mark.parametrize("part", [0, 0.5])
def test_a_broken_image_is_named(part, suffix, tmp_path):
    write_office(tmp_path, OFFICE_31_DOMAINS, 31, "images", each=1)
    file = tmp_path / "amazon" / "images" / "class_00" / f"frame{suffix}"
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(file)
    file.write_bytes(file.read_bytes()[: int(part * file.stat().st_size)])
    assert_fails_with(OFFICE_31, tmp_path, f"{file} is no image that can be read", *OFFICE_31_EXPECTED)


# ------------------------------------------------------------------ the archive


@pytest.mark.parametrize("name", ["images64.npz", ""])
def test_office_caltech10_is_read_from_its_archive_or_from_the_folder_with_it(name, tmp_path):
    np.savez(tmp_path / "images64.npz", **archive())
    problem = OFFICE_CALTECH10.load(tmp_path / name)(0, 4)
    for domain, of_domain in enumerate(CALTECH10_DOMAINS):
        seen = colours(problem.test.inputs[of_domain])
        assert torch.equal(seen[:, 0], problem.test.targets[of_domain].int())
        assert set(seen[:, 1].tolist()) == {domain}


def test_office_caltech10_is_read_from_folders_of_images(tmp_path):
    problem = OFFICE_CALTECH10.load(write_office(tmp_path, CALTECH10_DOMAINS, 10))(0, 4)
    assert torch.equal(colours(problem.test.inputs["webcam"])[:, 0], 3 * problem.test.targets["webcam"].int())


def test_domains_of_the_archive_go_by_their_names_and_not_by_their_order(tmp_path):
    arrays = archive()
    arrays["domain_names"] = arrays["domain_names"][::-1]
    np.savez(tmp_path / "images64.npz", **arrays)
    problem = OFFICE_CALTECH10.load(tmp_path)(0, 4)
    assert set(colours(problem.test.inputs["amazon"])[:, 1].tolist()) == {3}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": None}, "it lacks x"),
        ({"domain_names": None}, "it lacks domain_names"),
        ({"x": np.zeros((200, 4, 4, 3))}, "x is float64 of shape (200, 4, 4, 3)"),
        ({"x": np.zeros((200, 3, 4), np.uint8)}, "x is uint8 of shape (200, 3, 4)"),
        ({"y": np.zeros(199, np.uint8)}, "y must be one of 10 classes for each of the 200 images"),
        ({"y": np.full(200, 10, np.uint8)}, "y must be one of 10 classes"),
        ({"y": np.zeros(200, np.uint8)}, "amazon has a class with 0 examples and must have 5"),
        ({"domain": np.zeros(3, np.uint8)}, "domain must be one of amazon, caltech10, dslr, webcam"),
        ({"domain": np.zeros(200, np.uint8)}, "caltech10 has a class with 0 examples"),
        ({"domain_names": np.array(["amazon", "caltech10", "dslr", "phone"])}, "domain must be one of amazon"),
    ],
)
def test_an_archive_that_cannot_be_used_is_named_with_what_is_wrong(changes, message, tmp_path):
    arrays = {key: array for key, array in (archive() | changes).items() if array is not None}
    np.savez(tmp_path / "images64.npz", **arrays)
    assert_fails_with(OFFICE_CALTECH10, tmp_path, message, *CALTECH_EXPECTED)


@pytest.mark.parametrize("content", [b"", b"not an archive", b"PK\x03\x04 cut off"])
def test_a_file_that_is_no_archive_is_named_with_what_is_expected(content, tmp_path):
    path = tmp_path / "images64.npz"
    path.write_bytes(content)
    assert_fails_with(OFFICE_CALTECH10, path, *CALTECH_EXPECTED)


# ------------------------------------------------------------------ features

FEATURES = [
    pytest.param(OFFICE_CALTECH10_SURF, "surf", CALTECH10_DOMAINS, 800, id="surf"),
    pytest.param(OFFICE_CALTECH10_GOOGLENET, "GoogleNet1024", OFFICE_31_DOMAINS, 1024, id="googlenet"),
]


@pytest.mark.parametrize("place", ["", "{}", "features/{}"])
@pytest.mark.parametrize(("data", "folder", "domains", "width"), FEATURES)
def test_features_are_found_in_their_folder_or_below(data, folder, domains, width, place, tmp_path):
    write_features(tmp_path / "here" / place.format(folder), domains, width)
    problem = data.load(tmp_path / "here")(0, 4)
    assert [task.name for task in problem.tasks] == list(problem.test.inputs) == list(domains)
    for domain, name in enumerate(domains):
        features = problem.test.inputs[name]
        counts = features.expm1() if folder == "surf" else features
        torch.testing.assert_close(counts[:, 0], problem.test.targets[name] + 1.0)
        torch.testing.assert_close(counts[:, 1], torch.full((10,), float(domain)))


def test_feature_files_may_have_longer_names(tmp_path):
    folder = write_features(tmp_path / "surf", CALTECH10_DOMAINS, 800)
    (folder / "caltech10.mat").rename(folder / "Caltech10_SURF_L10.mat")
    assert len(OFFICE_CALTECH10_SURF.load(folder)(0, 4).test.targets["caltech10"]) == 10


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fts": None}, "lacks fts"),
        ({"labels": None}, "lacks labels"),
        ({"fts": np.zeros((50, 1024))}, "must be 800 finite features for each of 50 labels"),
        ({"fts": np.zeros((49, 800))}, "shape (49, 800), must be 800 finite features for each of 50 labels"),
        ({"fts": np.full((50, 800), np.nan)}, "must be 800 finite features"),
        ({"labels": np.repeat(np.arange(10), EACH)}, "must be 1 to 10"),
        ({"labels": np.ones(50)}, "amazon has a class with 0 examples"),
    ],
)
def test_feature_files_that_cannot_be_used_are_named_with_what_is_wrong(changes, message, tmp_path):
    write_features(tmp_path / "surf", CALTECH10_DOMAINS, 800, **changes)
    assert_fails_with(OFFICE_CALTECH10_SURF, tmp_path, "amazon", message, "surf", "800", "https://github.com")


@pytest.mark.parametrize(
    "content",
    [
        None,
        b"",
        b"no MATLAB file",
        b"MATLAB 5.0 MAT-file, cut off" + b" " * 96 + b"\0\1IM" + b"\x0f\0\0\0\x40\0\0\0cut",
    ],
)
def test_a_file_that_is_no_feature_file_is_named(content, tmp_path):
    folder = write_features(tmp_path / "surf", CALTECH10_DOMAINS, 800)
    (folder / "dslr.mat").unlink()
    if content is not None:
        (folder / "dslr.mat").write_bytes(content)
    assert_fails_with(OFFICE_CALTECH10_SURF, tmp_path, "dslr", "Expected is a folder with", "https://github.com")


def test_two_files_of_one_domain_are_not_chosen_from(tmp_path):
    folder = write_features(tmp_path / "surf", CALTECH10_DOMAINS, 800)
    (folder / "dslr_DeCAF6.mat").write_bytes(b"")
    assert_fails_with(OFFICE_CALTECH10_SURF, folder, "must have one dslr*.mat and has dslr.mat, dslr_DeCAF6.mat")


def test_a_path_that_is_no_folder_of_features_is_named(tmp_path):
    assert_fails_with(OFFICE_CALTECH10_SURF, tmp_path / "nowhere", "it is no folder", "amazon*.mat")


# ------------------------------------------------------------------ problems


@pytest.fixture
def caltech10(tmp_path):
    np.savez(tmp_path / "images64.npz", **archive(each=10))
    return OFFICE_CALTECH10.load(tmp_path)


def examples_of(inputs):
    return [tuple(colour) for colour in colours(inputs).tolist()]


def test_every_class_of_every_domain_is_split_60_20_20(caltech10):
    problem = caltech10(0, 16)
    batches = list(islice(problem.train_batches(), 60))
    for name in CALTECH10_DOMAINS:
        train = {example for batch in batches for example in examples_of(batch.inputs[name])}
        validation, test = (examples_of(batch.inputs[name]) for batch in (problem.validation, problem.test))
        assert (len(train), len(validation), len(test)) == (60, 20, 20)
        assert len(train | set(validation) | set(test)) == 100
        for part, share in ((train, 6), (validation, 2), (test, 2)):
            assert torch.bincount(torch.tensor([label for label, _, _ in part])).tolist() == [share] * 10


def test_split_and_batches_depend_on_the_seed_alone(caltech10):
    first, again, other = caltech10(0, 4), caltech10(0, 4), caltech10(1, 4)
    assert torch.equal(first.test.inputs["dslr"], again.test.inputs["dslr"])
    assert set(examples_of(first.test.inputs["dslr"])) != set(examples_of(other.test.inputs["dslr"]))
    streams = [
        [examples_of(batch.inputs["dslr"]) for batch in islice(problem.train_batches(), 3)]
        for problem in (first, first, again, other)
    ]
    assert streams[0] == streams[1] == streams[2] != streams[3]
    assert streams[0][0] != streams[0][1]


def test_half_the_training_images_are_mirrored_and_no_others(tmp_path):
    arrays = archive()
    arrays["x"][:, :, :2, 2] = 255
    np.savez(tmp_path / "images64.npz", **arrays)
    problem = OFFICE_CALTECH10.load(tmp_path)(0, 64)
    batch = next(problem.train_batches())
    mirrored = torch.cat([images[:, 2, 0, 0] < images[:, 2, 0, 3] for images in batch.inputs.values()])
    assert 0.35 < mirrored.float().mean() < 0.65
    for part in (problem.validation, problem.test):
        assert all((images[:, 2, 0, 0] > images[:, 2, 0, 3]).all() for images in part.inputs.values())


def test_features_are_not_mirrored(tmp_path):
    write_features(tmp_path / "surf", CALTECH10_DOMAINS, 800)
    batch = next(OFFICE_CALTECH10_SURF.load(tmp_path)(0, 64).train_batches())
    for domain, name in enumerate(CALTECH10_DOMAINS):
        torch.testing.assert_close(batch.inputs[name][:, 0].expm1(), batch.targets[name] + 1.0)
        torch.testing.assert_close(batch.inputs[name][:, 1].expm1(), torch.full((64,), float(domain)))


def test_what_an_image_gives_does_not_depend_on_the_batch_or_on_the_mode(caltech10):
    problem = caltech10(0, 4)
    model = problem.build_model("hard")
    assert not [module for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    images = {"dslr": problem.test.inputs["dslr"]}
    together = model.train()(images, ["dslr"])["dslr"]
    alone = model.eval()({"dslr": images["dslr"][:1]}, ["dslr"])["dslr"]
    torch.testing.assert_close(together[:1], alone)


@pytest.mark.parametrize("size", [32, 64, 97])
def test_network_takes_images_of_any_size(size):
    trunk, features = office.build_residual()
    assert trunk(torch.rand(2, 3, size, size)).shape == (2, features)


@pytest.mark.parametrize("data", [OFFICE_CALTECH10, OFFICE_CALTECH10_SURF], ids=["images", "features"])
def test_every_domain_is_learnt_through_the_shared_trunk(data, tmp_path):
    np.savez(tmp_path / "images64.npz", **archive() | {"x": archive()["x"] * 25})
    write_features(tmp_path / "surf", CALTECH10_DOMAINS, 800)
    problem = data.load(tmp_path)(0, 6)
    torch.manual_seed(0)
    model = problem.build_model("hard")
    names = [task.name for task in problem.tasks]
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    losses = []
    for batch in islice(problem.train_batches(), 40):
        outputs = model(batch.inputs, names)
        losses.append(torch.stack([task.loss(outputs[task.name], batch.targets[task.name]) for task in problem.tasks]))
        optimizer.zero_grad()
        losses[-1].sum().backward()
        optimizer.step()
    assert (torch.stack(losses[-5:]).mean(0) < 0.8 * losses[0]).all()
    assert all(parameter.grad.abs().max() > 0 for parameter in model.parameters())


def test_only_hard_sharing_is_there(caltech10):
    with pytest.raises(ValueError, match="must be 'hard', got 'cross_stitch'"):
        caltech10(0, 4).build_model("cross_stitch")
