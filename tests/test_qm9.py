"""QM9 is read from a csv or from torch_geometric's files, split and scored as its module says."""

import csv
import importlib
import warnings
from itertools import islice

import pytest
import torch

pytest.importorskip("sklearn")

from sklearn.metrics import mean_absolute_error

from benchmarks.data import qm9, qm9_graphs
from benchmarks.data.qm9 import ALPHABET, HASHES, PROPERTIES, QM9, QM9_RAW

MOLECULES = 40
TENTH = MOLECULES // 10


def molecule(number):
    """A SMILES with as many carbons as its number, and properties of very different sizes that tell which it is."""
    targets = {name: 10.0**power * (number - 7 + power) for power, name in enumerate(PROPERTIES, start=-5)}
    return {"mol_id": f"gdb_{number}", "smiles": "C" * number + "=O", "A": "1.5", "gap": "0.1", **targets}


def write_csv(path, rows, header=str):
    names = list(rows[0])
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(map(header, names))
        writer.writerows([row[name] for name in names] for row in rows)
    return path


@pytest.fixture
def molecules():
    return [molecule(number) for number in range(1, MOLECULES + 1)]


@pytest.fixture
def path(tmp_path, molecules):
    return write_csv(tmp_path / "qm9.csv", molecules)


def numbers_of(batch):
    """The number of each molecule, from its first property."""
    return (batch.targets["mu"] * 1e5 + 12).round().int().tolist()


def problem_of(data, path):
    return data.load(path)(0, 16)


def test_features_count_atoms_bonds_branches_and_rings():
    counts = dict(zip(ALPHABET, qm9.featurise(["C1CC[NH+]1C(=O)c1cc[nH]c1", "C"])[0].tolist(), strict=False))
    seen = {"C": 4, "N": 1, "H": 2, "O": 1, "c": 4, "n": 1, "+": 1, "=": 1, "[": 2, "]": 2, "(": 1, ")": 1, "1": 4}
    assert counts == {character: seen.get(character, 0) for character in ALPHABET}


def test_features_have_a_fixed_width_and_tell_isomers_apart():
    features = qm9.featurise(["CC(C)O", "CC(O)C", "CCC"])
    assert features.shape == (3, len(ALPHABET) + HASHES)
    assert torch.equal(features[0, : len(ALPHABET)], features[1, : len(ALPHABET)])
    assert not torch.equal(features[0], features[1])
    aromatic, saturated = qm9.featurise(["c1ccoc1", "C1CCOC1"])[:, len(ALPHABET) :]
    assert not torch.equal(aromatic, saturated)
    # Three carbons: two runs of two and one of three.
    assert features[2, len(ALPHABET) :].abs().sum() == 3


def test_features_of_a_molecule_do_not_depend_on_the_others():
    assert torch.equal(qm9.featurise(["CCO", "C#N", "c1ccoc1"])[:1], qm9.featurise(["CCO"]))


@pytest.mark.parametrize("header", [str, str.upper, str.capitalize])
def test_columns_are_found_by_name_whatever_their_case_and_order(header, tmp_path, molecules):
    backwards = [dict(reversed(row.items())) for row in molecules]
    read = qm9.read_csv(write_csv(tmp_path / "qm9.csv", backwards, header))
    expected = torch.tensor([[row[name] for name in PROPERTIES] for row in molecules])
    assert torch.equal(read.targets, expected)
    assert torch.equal(read.inputs, qm9.featurise([row["smiles"] for row in molecules]))


def test_a_tenth_each_is_kept_for_validation_and_test(path):
    problem = QM9_RAW.load(path)(3, 16)
    test, validation = set(numbers_of(problem.test)), set(numbers_of(problem.validation))
    train = {number for batch in islice(problem.train_batches(), 50) for number in numbers_of(batch)}
    assert len(test) == len(validation) == TENTH
    assert len(train) == MOLECULES - 2 * TENTH
    assert test | validation | train == set(range(1, MOLECULES + 1))


def test_split_and_batches_depend_on_the_seed_alone(path):
    make = QM9_RAW.load(path)
    first, again, other = make(0, 16), make(0, 16), make(1, 16)
    assert numbers_of(first.test) == numbers_of(again.test)
    assert set(numbers_of(first.test)) != set(numbers_of(other.test))
    stream = [numbers_of(batch) for batch in islice(first.train_batches(), 3)]
    assert stream == [numbers_of(batch) for batch in islice(again.train_batches(), 3)]
    assert stream == [numbers_of(batch) for batch in islice(first.train_batches(), 3)]
    assert stream[0] != stream[1]
    assert stream[0] != numbers_of(next(other.train_batches()))


def test_inputs_belong_to_their_targets(path):
    problem = problem_of(QM9_RAW, path)
    for batch in (next(problem.train_batches()), problem.validation, problem.test):
        assert batch.inputs[:, ALPHABET.index("C")].int().tolist() == numbers_of(batch)


def test_z_scores_come_from_the_training_part_alone(path, molecules):
    raw, scored = (problem_of(data, path) for data in (QM9_RAW, QM9))
    held_out = {*numbers_of(raw.validation), *numbers_of(raw.test)}
    for name in PROPERTIES:
        train = torch.tensor([row[name] for row in molecules if int(row["mol_id"][4:]) not in held_out])
        expected = (raw.test.targets[name] - train.mean()) / train.std(unbiased=False)
        torch.testing.assert_close(scored.test.targets[name], expected)


def test_errors_are_in_the_propertys_own_unit_with_and_without_z_scores(path):
    raw, scored = (problem_of(data, path) for data in (QM9_RAW, QM9))
    # The same guesses twice, once as z-scores.
    for raw_task, scored_task in zip(raw.tasks, scored.tasks, strict=True):
        name = raw_task.name
        targets, z_targets = raw.test.targets[name], scored.test.targets[name]
        guess, z_guess = targets.flip(0), z_targets.flip(0)
        expected = mean_absolute_error(targets, guess)
        (raw_metric,), (scored_metric,) = raw_task.metrics, scored_task.metrics
        assert raw_metric.score(guess, targets).item() == pytest.approx(expected)
        assert scored_metric.score(z_guess, z_targets).item() == pytest.approx(expected, rel=1e-5)
        assert (scored_metric.name, scored_metric.higher_is_better) == ("MAE", False)
        assert scored_task.loss(z_guess, z_targets).item() == pytest.approx(
            (z_guess - z_targets).square().mean().item()
        )


def test_data_sets_report_the_tasks_of_their_problems(path):
    for data in (QM9, QM9_RAW):
        problem = problem_of(data, path)
        assert [task.name for task in data.tasks] == [task.name for task in problem.tasks] == list(PROPERTIES)
        assert [[metric.name for metric in task.metrics] for task in data.tasks] == [["MAE"]] * len(PROPERTIES)
        assert "not comparable" in data.title


def test_network_starts_near_the_mean_of_raw_targets_and_gives_a_number_a_molecule(path):
    problem = problem_of(QM9_RAW, path)
    outputs = problem.build_model("hard")(problem.test.inputs, PROPERTIES)
    for name, output in outputs.items():
        assert output.shape == (TENTH,)
        # Outputs of a fresh network are far smaller than the largest means.
        assert abs(output.mean() - problem.build_model("hard").heads[name][0].bias.item()) < 3
    assert outputs["cv"].mean() > 1e5


def test_trunk_standardises_the_counts_of_characters_by_the_training_part(path):
    problem = problem_of(QM9, path)
    standardise = problem.build_model("hard").trunk[0]
    held_out = {*numbers_of(problem_of(QM9_RAW, path).validation), *numbers_of(problem_of(QM9_RAW, path).test)}
    carbons = torch.tensor([number for number in range(1, MOLECULES + 1) if number not in held_out]).float()
    seen = standardise(problem.test.inputs)
    expected = (problem.test.inputs[:, ALPHABET.index("C")] - carbons.mean()) / carbons.std(unbiased=False)
    torch.testing.assert_close(seen[:, ALPHABET.index("C")], expected)
    # A character that every training molecule has once is no reason to divide by 0.
    assert seen[:, ALPHABET.index("=")].abs().max() == 0
    assert torch.equal(seen[:, len(ALPHABET) :], problem.test.inputs[:, len(ALPHABET) :])


@pytest.mark.parametrize("data", [QM9, QM9_RAW], ids=["z_scored", "raw"])
def test_network_learns(data, path):
    problem = problem_of(data, path)
    torch.manual_seed(0)
    model = problem.build_model("hard")
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for batch in islice(problem.train_batches(), 60):
        outputs = model(batch.inputs, ["u0_atom"])
        losses.append(problem.tasks[6].loss(outputs["u0_atom"], batch.targets["u0_atom"]))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert problem.tasks[6].name == "u0_atom"
    assert sum(losses[-10:]) < 0.2 * sum(losses[:3])


def test_only_hard_sharing_is_there(path):
    with pytest.raises(ValueError, match="must be 'hard', got 'mtan'"):
        problem_of(QM9, path).build_model("mtan")


def broken(rows, **changes):
    return [*rows[:3], {**rows[3], **changes}, *rows[4:]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: [{k: v for k, v in row.items() if k != "zpve"} for row in rows], "it lacks the columns zpve"),
        (lambda rows: [{k: v for k, v in row.items() if k != "smiles"} for row in rows], "it lacks the columns smiles"),
        (lambda rows: broken(rows, homo="much"), "could not convert string to float: 'much'"),
        (lambda rows: broken(rows, cv="nan"), "row 5 has a property that is not finite"),
        (lambda rows: broken(rows, smiles=""), "row 5"),
        (lambda rows: rows[:9], "it has 9 molecules"),
    ],
)
def test_a_csv_that_cannot_be_used_is_named_with_what_is_wrong(change, message, tmp_path, molecules):
    file = write_csv(tmp_path / "broken.csv", change(molecules))
    with pytest.raises(ValueError) as error:
        QM9.load(file)
    assert message in str(error.value)
    assert_says_what_is_expected(error, file)


@pytest.mark.parametrize("content", [None, b"", b"\xff\xfe\x00", b"PK\x03\x04"])
def test_a_file_that_is_no_csv_is_named_with_what_is_expected(content, tmp_path):
    file = tmp_path / "qm9.csv"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ValueError) as error:
        QM9.load(file)
    assert_says_what_is_expected(error, file)


def test_a_row_that_was_cut_off_is_named(path):
    path.write_text(path.read_text()[:-30] + "\n")
    with pytest.raises(ValueError, match=f"row {MOLECULES + 1} has"):
        QM9.load(path)


def assert_says_what_is_expected(error, path):
    for words in (str(path), "smiles and mu, alpha", "torch_geometric", "https://deepchemdata.s3"):
        assert words in str(error.value)


def test_no_path_is_answered_with_what_is_expected():
    with pytest.raises(ValueError) as error:
        QM9.load(None)
    assert_says_what_is_expected(error, "qm9")


def test_a_property_without_spread_cannot_be_z_scored(tmp_path, molecules):
    path = write_csv(tmp_path / "qm9.csv", [{**row, "r2": 4.0} for row in molecules])
    with pytest.raises(ValueError, match="cannot z-score r2: all 32 training molecules have the same"):
        problem_of(QM9, path)
    assert set(problem_of(QM9_RAW, path).test.targets["r2"].tolist()) == {4.0}


def test_a_directory_without_torch_geometric_says_that_it_is_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "torch_geometric.data", None)
    with pytest.raises(ValueError, match="is a directory, which needs the package torch_geometric") as error:
        QM9.load(tmp_path)
    assert str(tmp_path) in str(error.value)


@pytest.fixture
def pyg():
    """torch_geometric, which warns about torch when it is imported."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip("torch_geometric")
        return importlib.import_module("torch_geometric.data")


@pytest.fixture
def graphs(pyg, tmp_path):
    """A directory as torch_geometric's QM9 leaves it; molecule i has i % 4 + 2 atoms and 100 i + j as property j."""
    generator = torch.Generator().manual_seed(0)
    molecules = []
    for number in range(MOLECULES):
        atoms = number % 4 + 2
        chain = torch.arange(atoms - 1)
        forward = torch.stack([chain, chain + 1])
        molecules.append(
            pyg.Data(
                x=torch.rand(atoms, 11, generator=generator),
                z=torch.full((atoms,), 6),
                pos=torch.rand(atoms, 3, generator=generator),
                edge_index=torch.cat([forward, forward.flip(0)], dim=1),
                edge_attr=torch.eye(4)[torch.zeros(2 * (atoms - 1), dtype=torch.long)],
                y=100.0 * number + torch.arange(19.0).unsqueeze(0),
                smiles="C" * atoms,
                name=f"gdb_{number}",
                idx=number,
            )
        )
    (tmp_path / "processed").mkdir()
    pyg.InMemoryDataset.save(molecules, str(tmp_path / "processed" / "data_v3.pt"))
    return tmp_path


def test_graphs_bring_the_same_eleven_properties(graphs):
    read = qm9.read_graphs(graphs)
    columns = dict(zip(PROPERTIES, read.targets[3].tolist(), strict=True))
    assert columns == {
        **{"mu": 300, "alpha": 301, "homo": 302, "lumo": 303, "r2": 305, "zpve": 306},
        **{"u0_atom": 312, "u298_atom": 313, "h298_atom": 314, "g298_atom": 315, "cv": 311},
    }
    problem = QM9_RAW.load(graphs)(0, 16)
    assert problem.test.inputs.tolist() == [round(value / 100) for value in problem.test.targets["mu"].tolist()]


def test_complete_graphs_have_every_pair_of_atoms_with_its_bond_and_distance(pyg):
    bond = torch.tensor([[0.0, 1.0], [0.0, 1.0]])
    positions = torch.tensor([[0.0, 0.0, 0.0], [3.0, 4.0, 0.0], [0.0, 0.0, 2.0]])
    molecule = pyg.Data(x=torch.eye(3), edge_index=torch.tensor([[0, 1], [1, 0]]), edge_attr=bond, pos=positions)
    complete = qm9_graphs.complete_graph(molecule)
    edges = {(int(a), int(b)): attr.tolist() for (a, b), attr in zip(complete.edge_index.T, complete.edge_attr)}  # noqa: B905
    far = pytest.approx([0.0, 0.0, 29.0**0.5])
    near = [0.0, 0.0, 2.0]
    bound = [0.0, 1.0, 5.0]
    assert edges == {(0, 1): bound, (1, 0): bound, (0, 2): near, (2, 0): near, (1, 2): far, (2, 1): far}


def test_message_passing_sees_each_molecule_alone_and_in_any_piece(graphs, monkeypatch):
    problem = QM9.load(graphs)(0, 16)
    trunk = problem.build_model("hard").trunk.eval()
    numbers = torch.tensor([7, 2, 31, 2])
    with torch.no_grad():
        features = trunk(numbers)
        monkeypatch.setattr(qm9, "PYG_PIECE", 3)
        torch.testing.assert_close(trunk(numbers), features)
    assert features.shape == (4, 64)
    torch.testing.assert_close(features[1], features[3])
    assert not torch.allclose(features[0], features[2])


def test_message_passing_gives_every_parameter_a_gradient(graphs):
    problem = QM9.load(graphs)(0, 16)
    model = problem.build_model("hard")
    batch = next(problem.train_batches())
    outputs = model(batch.inputs, PROPERTIES)
    sum(task.loss(outputs[task.name], batch.targets[task.name]) for task in problem.tasks).backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in model.parameters())
    assert [parameter.shape for parameter in model.norm_parameters()] == [(64, 128), (64,)]


@pytest.mark.parametrize("content", [None, b"", b"PK\x03\x04 cut off"])
def test_a_directory_that_torch_geometric_has_not_filled_is_named(pyg, content, tmp_path):
    (tmp_path / "processed").mkdir()
    if content is not None:
        (tmp_path / "processed" / "data_v3.pt").write_bytes(content)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError) as error:
        QM9.load(tmp_path)
    assert_says_what_is_expected(error, tmp_path)
    assert sorted(tmp_path.rglob("*")) == before
