"""The recipes run, and train exactly as a plain loop does. A framework that is absent skips its tests."""

import ast
import importlib
import logging
import math
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import assert_same, header_of
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss
from torch.optim.lr_scheduler import LambdaLR, StepLR
from torch.utils.data import DataLoader, TensorDataset

from balanced_optim import DualBalancedOptimizer

RATE = 0.01
TOP = 2.0**20  # a first scale that overflows in half precision, some steps long

# What the frameworks warn of (worker processes, loggers, versions) is not the subject here.
pytestmark = pytest.mark.filterwarnings("ignore")


def recipe(name):
    return importlib.import_module(f"benchmarks.recipes.{name}_recipe")


def assert_as_plain(done, plain, tolerance=0):
    """The same parameters, and learning rate of the base optimizer, after as many steps."""
    for name, value in plain.network.state_dict().items():
        torch.testing.assert_close(done.network.state_dict()[name], value, rtol=tolerance, atol=tolerance, msg=name)
    rates = [{group["lr"] for group in run.optimizer.base_optim.param_groups} for run in (done, plain)]
    assert rates[0] == rates[1] != {RATE}
    assert header_of(done.optimizer)["counts"] == header_of(plain.optimizer)["counts"]


def assert_same_run(one, other):
    """Equal bit for bit: parameters, averages, counts, the base optimizer's state."""
    assert_same(one.network.state_dict(), other.network.state_dict())
    assert_same(one.optimizer.state_dict(), other.optimizer.state_dict())


# ------------------------------------------------- Lightning and Accelerate


class Network(nn.Module):
    """A trunk and two heads, whose losses differ by 1e4."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.trunk = nn.Sequential(nn.Linear(4, 6), nn.Tanh())
            self.kind, self.price = nn.Linear(6, 3), nn.Linear(6, 1)

    def forward(self, x, kind, price):
        features = self.trunk(x)
        kind_loss = cross_entropy(self.kind(features).float(), kind)
        return {"kind": kind_loss, "price": mse_loss(self.price(features).float().squeeze(1), price)}


def loader(size=4):
    """22 samples: six batches of four, the last one of two."""
    random = torch.Generator().manual_seed(1)
    x, kind = torch.randn(22, 4, generator=random), torch.randint(3, (22,), generator=random)
    return DataLoader(TensorDataset(x, kind, 100 * torch.randn(22, generator=random)), batch_size=size)


def autocast(precision):
    return torch.autocast("cpu", torch.float16 if precision == "fp16" else torch.bfloat16, enabled=precision != "no")


def new_scaler(precision):
    return torch.amp.GradScaler("cpu", init_scale=TOP, growth_interval=5, enabled=precision == "fp16")


def train_plainly(network, base, shared, new_scheduler, batches, precision="no", clip=math.inf, schedule_skipped=True):
    """By torch alone, one step a batch."""
    scaler, optimizer = new_scaler(precision), DualBalancedOptimizer(base, shared)
    scheduler = new_scheduler(optimizer)
    for batch in batches:
        with autocast(precision):
            losses = network(**batch)
        optimizer.backward(losses, scaler)
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(network.parameters(), clip)
        scale = scaler.get_scale()
        scaler.step(optimizer)
        scaler.update()
        if schedule_skipped or scaler.get_scale() >= scale:
            scheduler.step()
        optimizer.zero_grad()
    return SimpleNamespace(network=network, optimizer=optimizer, scale=scaler.get_scale())


def plain_loop(epochs, size=4, **options):
    network = Network()
    batches = [dict(zip(("x", "kind", "price"), batch, strict=True)) for _ in range(epochs) for batch in loader(size)]
    base = torch.optim.Adam(network.parameters(), lr=RATE)
    return train_plainly(network, base, network.trunk, partial(StepLR, step_size=10), batches, **options)


@pytest.fixture
def lightning(tmp_path):
    """Trains a fresh network, from `resume` on if given, and saves it; `like_plain`: options of the same plain loop."""
    pytest.importorskip("lightning")
    from lightning.pytorch import Trainer
    from lightning.pytorch.plugins import MixedPrecision

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    silent = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)

    def run(epochs, precision="no", micro_batches=1, resume=None):
        scaler = new_scaler(precision) if precision == "fp16" else None
        plugin = precision != "no" and MixedPrecision("16-mixed" if scaler else "bf16-mixed", "cpu", scaler)
        options = {"accelerator": "cpu", "plugins": plugin or None, "default_root_dir": tmp_path, **silent}
        trainer = Trainer(max_epochs=epochs, **options)
        module = recipe("lightning").BalancedModule(Network(), RATE, micro_batches)
        trainer.fit(module, loader(), ckpt_path=resume)
        trainer.save_checkpoint(tmp_path / "saved")
        optimizer = trainer.optimizers[0]
        return SimpleNamespace(network=module.network, optimizer=optimizer, scaler=scaler, trainer=trainer)

    run.like_plain = {}
    return run


@pytest.fixture
def accelerate(tmp_path):
    """The same by Accelerate."""
    pytest.importorskip("accelerate")
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    def run(epochs, precision="no", micro_batches=1, resume=None):
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=micro_batches, mixed_precision=precision)
        if precision == "fp16":  # Accelerate keeps it for accelerators; this is what it sets there.
            accelerator.scaler, accelerator.native_amp = new_scaler(precision), True
        # Lightning counts epochs from the start of training, this recipe from the call.
        network, epochs = Network(), epochs - 2 if resume else epochs
        options = {"learning_rate": RATE, "max_norm": 0.5, "resume_from": resume and str(resume)}
        optimizer = recipe("accelerate").train(accelerator, network, loader(), epochs, **options)
        accelerator.save_state(tmp_path / "saved")
        return SimpleNamespace(network=network, optimizer=optimizer, scaler=accelerator.scaler)

    run.like_plain = {"clip": 0.5, "schedule_skipped": False}
    AcceleratorState._reset_state(reset_partial_state=True)
    yield run
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(params=["lightning", "accelerate"])
def fit(request):
    return request.getfixturevalue(request.param)


@pytest.mark.parametrize(("micro_batches", "epochs", "tolerance"), [(1, 4, 0), (4, 6, 1e-6)])
def test_training_is_that_of_a_plain_loop_on_batches_of_full_size(fit, micro_batches, epochs, tolerance):
    plain = plain_loop(epochs, 4 * micro_batches, **fit.like_plain)
    assert_as_plain(fit(epochs, micro_batches=micro_batches), plain, tolerance)


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_mixed_precision_is_that_of_a_plain_loop(fit, precision):
    done, plain = fit(5, precision), plain_loop(5, precision=precision, **fit.like_plain)
    assert_as_plain(done, plain)
    if precision == "fp16":
        assert done.scaler.get_scale() == plain.scale < TOP


@pytest.mark.parametrize(("precision", "micro_batches"), [("no", 1), ("no", 2), ("fp16", 1)])
def test_a_resumed_run_goes_on_bit_for_bit(fit, tmp_path, precision, micro_batches):
    fit(2, precision, micro_batches)
    resumed = fit(4, precision, micro_batches, resume=tmp_path / "saved")
    assert_same_run(resumed, fit(4, precision, micro_batches))


def test_lightning_counts_steps_and_logs_losses(lightning, tmp_path):
    done = lightning(2, micro_batches=4)
    assert done.trainer.global_step == 4
    assert lightning(3, resume=tmp_path / "saved").trainer.global_step == 4 + 6
    logged = done.trainer.callback_metrics
    assert_same([logged["kind"], logged["price"]], list(done.optimizer.last_balance.losses))


# ------------------------------------------------- transformers.Trainer


@pytest.fixture
def trainer(tmp_path):
    """`trainer(...)` makes a trainer of a new one-layer BERT with two heads; `model.seen` lists what it is fed."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    transformers.utils.logging.disable_progress_bar()

    class TwoHeads(transformers.BertPreTrainedModel):
        def __init__(self, config):
            super().__init__(config)
            self.bert = transformers.BertModel(config, add_pooling_layer=False)
            self.topic, self.score, self.seen = nn.Linear(16, 3), nn.Linear(16, 1), []
            self.post_init()

        def forward(self, input_ids, topic, score):
            self.seen.append({"input_ids": input_ids, "topic": topic, "score": score})
            first = self.bert(input_ids).last_hidden_state[:, 0]
            score_loss = mse_loss(self.score(first).squeeze(1), score)
            return {"topic": cross_entropy(self.topic(first), topic), "score": score_loss}

    random = torch.Generator().manual_seed(2)
    ids, topics = torch.randint(30, (22, 8), generator=random), torch.randint(3, (22,), generator=random)
    columns = {"input_ids": ids, "topic": topics, "score": 100 * torch.randn(22, generator=random)}
    rows = [{name: column[row] for name, column in columns.items()} for row in range(22)]
    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    quiet = {"report_to": [], "use_cpu": True, "disable_tqdm": True, "save_strategy": "no", "logging_strategy": "no"}

    def build(dropout=0.0, **arguments):
        torch.manual_seed(3)
        dropouts = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
        model = TwoHeads(transformers.BertConfig(vocab_size=30, max_position_embeddings=8, **size, **dropouts))
        given = {"per_device_train_batch_size": 4, "learning_rate": RATE, "label_names": ["topic", "score"]}
        arguments = transformers.TrainingArguments(str(tmp_path), **{**quiet, **given, **arguments})
        new = recipe("trainer").BalancedTrainer(model, arguments, train_dataset=rows, eval_dataset=rows[:8])
        new.remove_callback(transformers.PrinterCallback)
        return new

    return build


def trained(trainer, **keywords):
    trainer.train(**keywords)
    return SimpleNamespace(network=trainer.model, optimizer=trainer.optimizer.optimizer, seen=trainer.model.seen)


def joined(batches):
    return {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}


@pytest.mark.parametrize("micro_batches", [1, 4])
def test_trainer_trains_as_a_plain_loop_on_batches_of_full_size(trainer, micro_batches):
    """By SGD: Adam would blow up the rounding of gradients that are zero, as of an attention's key bias."""
    done = trained(trainer(num_train_epochs=3, gradient_accumulation_steps=micro_batches, optim="sgd"))
    epochs = [done.seen[start : start + 6] for start in (0, 6, 12)]
    batches = [joined(epoch[at : at + micro_batches]) for epoch in epochs for at in range(0, 6, micro_batches)]
    network = trainer().model.train()
    base = torch.optim.SGD(network.parameters(), lr=RATE)
    linear = partial(LambdaLR, lr_lambda=lambda step: 1 - step / len(batches))
    assert_as_plain(done, train_plainly(network, base, network.bert, linear, batches, clip=1.0), 1e-6)


def test_trainer_logs_and_evaluates_the_sum_of_the_raw_losses(trainer):
    new = trainer(max_steps=1, gradient_accumulation_steps=3, logging_strategy="steps", logging_steps=1)
    done, fresh = trained(new), trainer().model
    expected = sum(sum(fresh(**batch).values()).item() for batch in done.seen) / 3
    assert new.state.log_history[0]["loss"] == pytest.approx(expected, rel=1e-4)
    evaluated = new.evaluate()["eval_loss"]
    assert evaluated == pytest.approx(sum(new.model(**joined(done.seen[3:])).values()).item(), rel=1e-4)


def test_trainer_resumes_bit_for_bit(trainer, tmp_path):
    """In the middle of an epoch of shuffled data, with dropout and micro-batches."""
    arguments = {"max_steps": 5, "gradient_accumulation_steps": 2, "save_strategy": "steps", "save_steps": 2}
    straight = trained(trainer(dropout=0.2, **arguments))
    resumed = trained(trainer(dropout=0.2, **arguments), resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert [len(straight.seen), len(resumed.seen)] == [10, 6]
    assert_same_run(resumed, straight)


# ------------------------------------------------- TensorBoard, and what a user copies


@pytest.mark.parametrize(("beta", "precision"), [(0.9, "no"), (0.9, "fp16"), (0.9, "bf16"), (0.0, "no")])
def test_tensorboard_gets_the_balance_by_task_name_in_any_precision(beta, precision):
    net, written = Network(), {}
    writer = SimpleNamespace(add_scalar=lambda tag, value, step: written.update({(tag, step): value}))
    optimizer = DualBalancedOptimizer(torch.optim.Adam(net.parameters()), net.trunk, beta=beta, log_transform=False)
    optimizer.step(net(*next(iter(loader()))))
    with autocast(precision):  # where a training_step of Lightning runs
        recipe("tensorboard").write_balance(writer, optimizer, 7, cosines=beta > 0)
    kinds = {kind: getattr(optimizer.last_balance, kind) for kind in ("losses", "norms", "weights")}
    expected = {(f"{kind}/kind", 7): values[0].item() for kind, values in kinds.items()}
    expected |= {(f"{kind}/price", 7): values[1].item() for kind, values in kinds.items()}
    if beta > 0:
        expected["cosines/kind-price", 7] = optimizer.gradient_cosines()[0, 1].item()
    assert written == expected


@pytest.mark.parametrize("name", ["lightning", "accelerate", "trainer", "tensorboard"])
def test_a_recipe_is_at_most_forty_lines_of_its_framework_and_this_package(name):
    source = (Path(__file__).parents[1] / "benchmarks" / "recipes" / f"{name}_recipe.py").read_text()
    docstring, *code = ast.parse(source).body
    assert len(source.splitlines()) - docstring.end_lineno <= 40
    imports = [node for node in code if isinstance(node, ast.Import | ast.ImportFrom)]
    imported = {(getattr(node, "module", None) or node.names[0].name).split(".")[0] for node in imports}
    allowed = {name, "balanced_optim", "torch", "transformers", "typing", "collections", "itertools"}
    assert {"balanced_optim"} <= imported <= allowed
