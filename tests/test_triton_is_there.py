"""The package works where Triton is missing."""

import importlib.util
import subprocess
import sys

SCRIPT = """
import sys
{block}
from balanced_optim._cuda_store import triton_is_there
assert "triton" not in sys.modules or sys.modules["triton"] is None
print(triton_is_there())
"""


def asked(block):
    run = subprocess.run([sys.executable, "-c", SCRIPT.format(block=block)], check=True, capture_output=True, text=True)
    return run.stdout.strip() == "True"


def test_triton_is_looked_for_only_when_asked():
    assert asked("") is (importlib.util.find_spec("triton") is not None)


def test_a_missing_triton_is_no_error():
    assert not asked("sys.modules['triton'] = None")
