"""The data sets by name: what `--data` of the benchmarks takes."""

from benchmarks.dense_folders import CITYSCAPES, NYUV2
from benchmarks.digit_domains import DIGIT_DOMAINS
from benchmarks.digits import DIGITS
from benchmarks.office import (
    OFFICE_31,
    OFFICE_CALTECH10,
    OFFICE_CALTECH10_GOOGLENET,
    OFFICE_CALTECH10_SURF,
    OFFICE_HOME,
)
from benchmarks.problem import DataSet
from benchmarks.qm9 import QM9, QM9_RAW
from benchmarks.scenes import SCENES

DATA: dict[str, DataSet] = {
    "digits": DIGITS,
    "digit_domains": DIGIT_DOMAINS,
    "scenes": SCENES,
    "qm9": QM9,
    "qm9_raw": QM9_RAW,
    "office_caltech10": OFFICE_CALTECH10,
    "office_caltech10_surf": OFFICE_CALTECH10_SURF,
    "office_caltech10_googlenet": OFFICE_CALTECH10_GOOGLENET,
    "office_31": OFFICE_31,
    "office_home": OFFICE_HOME,
    "nyuv2": NYUV2,
    "cityscapes": CITYSCAPES,
}
