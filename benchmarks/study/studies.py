"""Which runs a study is made of."""

from dataclasses import dataclass

from benchmarks.data.all import DATA
from benchmarks.data.problem import DataSet
from benchmarks.study.methods import (
    AGGREGATORS,
    BETAS,
    MAX_WEIGHTS,
    NORM_TARGETS,
    SINGLE_TASK,
    TUNED_WEIGHTS,
    canonical,
)
from benchmarks.study.training import single_task_names

SEEDS = 5

SGD_FACTORS = (0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
"""Learning rates tried with SGD, in multiples of Adam's; every method takes its best one on validation data."""


@dataclass(frozen=True)
class Study:
    """What is compared.

    Attributes:
        title: Heading of the report.
        methods: Names of methods, in the order of the report.
        all_architectures: Whether it runs on every architecture of the data set.
        optimizers: Base optimizers, names of `training.OPTIMIZERS`.
        schedules: Of the learning rate, names of `schedules.SCHEDULES`.
        curves: Whether losses, weights and gradients in the course of the training are kept, in a file of their own.
    """

    title: str
    methods: tuple[str, ...]
    all_architectures: bool = False
    optimizers: tuple[str, ...] = ("adam",)
    schedules: tuple[str, ...] = ("cosine",)
    curves: bool = False


CORE = ("ew", "log_only", "max_norm_only", "db_mtl", "one_backward")
RULE = (
    "max_weight_3",
    "max_weight_10",
    "fade_solved",
    "beta_0",
    "rms_beta_0",
    "rms_beta_0_no_log",
    "norm_1",
    "norm_power_0.5",
    "norm_power_0.75",
    "warmup_tenth",
    "warmup_third",
    "norm_power_0.5_warmup_fifth",
    "log_by_unit",
    "log_by_unit_no_rescale",
    "log_by_unit_norm_power_0.5",
)
"""Fields of the rule, each alone and in the pairs that early trials favoured."""
RIVALS = (TUNED_WEIGHTS, "uw", "famo", "gls", "log_mgda", "log_upgrad", "pcd", "log_pcd")
MORE_RIVALS = ("dwa", "imtl_l", "stch", "gradnorm")
STEADY = ("ew", "famo", "log_only", "db_mtl", "max_weight_3", "fade_solved", "rms_beta_0", "norm_power_0.5")

STUDIES: dict[str, Study] = {
    "main": Study("DB-MTL, the fields of its rule, and rivals", (*CORE, "refreshed", *RULE, *RIVALS)),
    "pareto": Study(
        "Quality against time",
        tuple(
            dict.fromkeys(
                [*CORE, "refreshed", *RULE, *RIVALS, *MORE_RIVALS, *AGGREGATORS, *map("log_{}".format, AGGREGATORS)]
            )
        ),
    ),
    "schedules": Study("Schedules of the learning rate", STEADY, schedules=("cosine", "constant", "steps", "plateau")),
    "stress": Study("A constant learning rate", STEADY, schedules=("constant",)),
    "sgd": Study(
        "SGD beside Adam",
        ("ew", "log_only", "db_mtl", "norm_1", "max_weight_3", "one_backward"),
        optimizers=("adam", "sgd"),
    ),
    "fig1": Study(
        "Gradient methods with and without the log (Fig. 1)",
        ("ew", *(prefix + name for name in AGGREGATORS for prefix in ("", "log_")), "db_mtl"),
    ),
    "fig2": Study("Learned loss scales and the log (Fig. 2)", ("ew", "imtl_l", "log_only")),
    "fig3": Study("GradNorm and max-norm (Fig. 3)", ("ew", "gradnorm", "max_norm_only_beta_0", "max_norm_only")),
    "fig4": Study("Architectures (Fig. 4)", (TUNED_WEIGHTS, "famo", *CORE), all_architectures=True),
    "fig5": Study(
        "The average's beta, constant and decaying (Fig. 5)",
        ("ew", "beta_0", *(f"beta_{beta}" for beta in BETAS), "beta_0.1_decay", "beta_0.5_decay", "db_mtl"),
    ),
    "fig6": Study(
        "The norm that gradients are rescaled to (Fig. 6)",
        ("ew", "db_mtl", *map("norm_{}".format, NORM_TARGETS), "norm_1"),
    ),
    "ablation": Study(
        "The parts of DB-MTL (Table 5)",
        (
            "ew",
            "average_only",
            "log_only",
            "max_weight_1",
            "max_norm_only_beta_0",
            "max_norm_only",
            "beta_0",
            "db_mtl",
            "one_backward",
        ),
    ),
    "continuum": Study(
        "From log only to DB-MTL by the cap on weights",
        ("ew", "log_only", *(f"max_weight_{weight:g}" for weight in MAX_WEIGHTS), "db_mtl", "fade_solved"),
    ),
    "stability": Study("Losses, gradient norms and weights in training (Figs. 8 and 9)", CORE, curves=True),
    "conflict": Study("Cosines between task gradients (Fig. 10)", CORE, curves=True),
    "variance": Study("How steady task gradients are", ("ew", "log_only", "db_mtl"), curves=True),
}


@dataclass(frozen=True)
class Job:
    """One run; its fields make its id."""

    data: str
    architecture: str
    method: str
    optimizer: str
    schedule: str
    steps: int
    learning_rate: float
    seed: int

    @property
    def id(self) -> str:
        """What a line of a file names it by."""
        parts = (self.data, self.architecture, self.method, self.optimizer, self.schedule, self.steps)
        return "__".join(map(str, (*parts, f"{self.learning_rate:g}", self.seed)))


@dataclass(frozen=True)
class Choices:
    """What a command line leaves to a study.

    Attributes:
        data: A name of `DATA`.
        seeds: Seeds are 0 to this, exclusive.
        steps: Training steps of a run.
        architecture: None takes "hard", or all where a study wants them.
        learning_rates: None takes the data set's, and multiples of it for SGD.
        methods: None takes the study's; else those of them that are named here.
    """

    data: str
    seeds: int
    steps: int
    architecture: str | None = None
    learning_rates: tuple[float, ...] | None = None
    methods: tuple[str, ...] | None = None


def jobs_of(study: Study, choices: Choices) -> list[Job]:
    """Return the study's jobs seed by seed, single-task models first; these have the architecture "hard".

    A method that is another one on these tasks is run under that one's name.
    """
    data = DATA[choices.data]
    singles = [("hard", name) for name in single_task_names(data.tasks)]
    wanted = [name for name in study.methods if choices.methods is None or name in choices.methods]
    methods = dict.fromkeys(canonical(name, data.tasks) for name in wanted)
    compared = [(architecture, name) for architecture in architectures_of(study, choices) for name in methods]
    return [
        Job(choices.data, architecture, method, optimizer, schedule, choices.steps, learning_rate, seed)
        for seed in range(choices.seeds)
        for architecture, method in (*singles, *compared)
        for optimizer in study.optimizers
        for schedule in study.schedules
        for learning_rate in choices.learning_rates or learning_rates(data, optimizer)
    ]


def architectures_of(study: Study, choices: Choices) -> tuple[str, ...]:
    """Return the architectures that the study is run on."""
    if choices.architecture is not None:
        return (choices.architecture,)
    return DATA[choices.data].architectures if study.all_architectures else ("hard",)


def learning_rates(data: DataSet, optimizer: str) -> tuple[float, ...]:
    """Return the learning rates that a study tries unless others are named."""
    factors = SGD_FACTORS if optimizer == "sgd" else (1.0,)
    return tuple(float(f"{data.learning_rate * factor:g}") for factor in factors)


def is_single_task(method: str) -> bool:
    """Whether this is the name of a single-task model."""
    return method.startswith(f"{SINGLE_TASK}-")
