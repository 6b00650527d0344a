"""Which setting of the rule to try first, by a rule that was fixed before the runs were made.

The distance of a setting on a data set is how far its mean Delta_p lies below the best of `ENDS`, over the seeds that
all of them have; below 0 it is better than all. The recommended setting is the one of `CANDIDATES` with the least worst
distance over all data sets but `HELD_OUT`, which have no part in the choice and only test it. `STRESS` was left out of
the choice after its runs were seen: no method trains all its tasks, so that distances there are hundreds of points.
"""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from benchmarks.data.all import DATA
from benchmarks.study.methods import canonical

ENDS = ("ew", "log_only", "db_mtl")
HELD_OUT = ("diabetes_raw", "equation")
STRESS = ("qm9_raw",)
NO_PART = {**dict.fromkeys(HELD_OUT, "held out"), **dict.fromkeys(STRESS, "stress")}
CANDIDATES = {
    "db_mtl": "the defaults",
    "one_backward": "norm_params=last_layer",
    "refreshed": "norm_params=last_layer, refresh_every=8",
    "log_only": "norm_target=None, beta=0",
    "max_norm_only": "log_transform=False",
    "beta_0": "beta=0",
    "max_weight_3": "max_weight=3",
    "max_weight_10": "max_weight=10",
    "fade_solved": "fade_solved=True",
    "rms_beta_0": 'norm_target="rms", beta=0',
    "rms_beta_0_no_log": 'norm_target="rms", beta=0, log_transform=False',
    "norm_1": "norm_target=1.0",
    "norm_power_0.5": "norm_power=0.5",
    "norm_power_0.75": "norm_power=0.75",
    "warmup_tenth": "warmup_steps=steps // 10",
    "warmup_third": "warmup_steps=steps // 3",
    "norm_power_0.5_warmup_fifth": "norm_power=0.5, warmup_steps=steps // 5",
    "log_by_unit": "log_transform={cross entropies: False}",
    "log_by_unit_no_rescale": "log_transform={cross entropies: False}, norm_target=None, beta=0",
    "log_by_unit_norm_power_0.5": "log_transform={cross entropies: False}, norm_power=0.5",
}
"""Methods to the arguments of `DualBalancedOptimizer` that make them."""

Gains = Mapping[str, Mapping[int, float]]
"""Method to seed to Delta_p in percent, on one data set."""


def distance(gains: Gains, candidate: str) -> float | None:
    """Return the distance of a setting on a data set in points; None without seeds that it and `ENDS` share."""
    of_all = [gains.get(method, {}) for method in (candidate, *ENDS)]
    seeds = set.intersection(*({*of_one} for of_one in of_all))
    if not seeds:
        return None
    own, *ends = (statistics.fmean(of_one[seed] for seed in seeds) for of_one in of_all)
    return max(ends) - own


@dataclass(frozen=True)
class Candidate:
    """A setting beside the others.

    Attributes:
        method: Its name.
        distances: Data set to its distance in points.
        worst: The largest over the data sets that have a part in the choice.
    """

    method: str
    distances: Mapping[str, float]
    worst: float


def ranked(gains: Mapping[str, Gains]) -> list[Candidate]:
    """Return the candidates, best first, that were run on every data set on which `ENDS` were.

    Args:
        gains: Data set to its gains.
    """
    choosing = [data for data in gains if data not in NO_PART and distance(gains[data], ENDS[0]) is not None]
    found = []
    for method in CANDIDATES:
        names = {data: canonical(method, DATA[data].tasks) for data in gains}
        distances = {data: gap for data in gains if (gap := distance(gains[data], names[data])) is not None}
        if choosing and {*choosing} <= {*distances}:
            found.append(Candidate(method, distances, max(distances[data] for data in choosing)))
    return sorted(found, key=lambda candidate: candidate.worst)


def table(candidates: Sequence[Candidate], data_sets: Sequence[str]) -> tuple[list[str], list[list[str]]]:
    """Return header and rows: every candidate's worst distance, and its distances by data set."""
    shown = [data for data in data_sets if any(data in candidate.distances for candidate in candidates)]
    header = [
        "setting",
        "arguments",
        "worst",
        *(f"{data}, {NO_PART[data]}" if data in NO_PART else data for data in shown),
    ]
    rows = []
    for candidate in candidates:
        cells = [f"{candidate.distances[data]:+.1f}" if data in candidate.distances else "–" for data in shown]
        rows.append([candidate.method, f"`{CANDIDATES[candidate.method]}`", f"{candidate.worst:+.1f}", *cells])
    return header, rows
