"""torch.compile: gradients are right, or an error says what to set. Each case is a process of its own."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).with_name("compiled_program.py")
FORMS = ("exact", "one_backward", "accumulate")
pytestmark = pytest.mark.skipif(
    not (shutil.which("g++") or shutil.which("clang++")), reason="inductor needs a C++ compiler"
)


def run(cache, *cases):
    """What one run of the program printed for each case, with the compiler's cache in the directory `cache`."""
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(cache), "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    finished = subprocess.run(
        [sys.executable, str(PROGRAM), *cases],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr[-2000:]
    return json.loads(finished.stdout.splitlines()[-1])


def are_told(outcomes, cause):
    """Every error names the cause and both settings, and nothing was changed."""
    for outcome in outcomes:
        assert cause in outcome["error"]
        assert "donated_buffer = False" in outcome["error"]
        assert "cache_key_tag" in outcome["error"]
        assert outcome["unchanged"]


def are_right(outcomes):
    assert all(outcome["distance"] < 1e-5 for outcome in outcomes), outcomes


def test_a_model_that_is_compiled_by_its_first_balanced_step_is_right_and_half_a_remedy_too_late_is_noticed(tmp_path):
    """Donation switched off after the backward was compiled: every second pass would be wrong without an error."""
    fresh, late = run(tmp_path, "whole,fresh,exact", "blocks,late,exact")
    are_right([fresh])
    are_told([late], "another gradient when its graph is used a second time")


def test_what_an_ordinary_backward_compiled_is_refused_until_the_remedy(tmp_path):
    """Its kernels stay in the cache on disk, overwrite what the forward saved, and are found by later processes."""
    refused, right = run(tmp_path, "trunk,ordinary,exact", "trunk,reset,one_backward")
    are_told([refused], "compiled for one backward pass a graph")
    are_right([right])
    wrong = run(tmp_path, *(f"trunk,half a remedy,{form}" for form in FORMS))
    are_told(wrong, "another gradient when its graph is used a second time")
    are_right(run(tmp_path, "trunk,remedy,exact", "trunk,remedy,accumulate"))
