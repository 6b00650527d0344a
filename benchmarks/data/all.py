"""The data sets by name: what `--data` of the benchmarks takes."""

from benchmarks.data.dense_folders import CITYSCAPES, NYUV2
from benchmarks.data.digit_domains import DIGIT_DOMAINS
from benchmarks.data.digits import DIGITS
from benchmarks.data.equation import EQUATION
from benchmarks.data.office import (
    OFFICE_31,
    OFFICE_CALTECH10,
    OFFICE_CALTECH10_GOOGLENET,
    OFFICE_CALTECH10_SURF,
    OFFICE_HOME,
)
from benchmarks.data.problem import DataSet
from benchmarks.data.qm9 import QM9, QM9_RAW
from benchmarks.data.scenes import SCENES
from benchmarks.data.tabular import DIABETES, DIABETES_RAW, FRIEDMAN, FRIEDMAN_RAW

DATA: dict[str, DataSet] = {
    "digits": DIGITS,
    "digit_domains": DIGIT_DOMAINS,
    "scenes": SCENES,
    "friedman": FRIEDMAN,
    "friedman_raw": FRIEDMAN_RAW,
    "diabetes": DIABETES,
    "diabetes_raw": DIABETES_RAW,
    "equation": EQUATION,
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
