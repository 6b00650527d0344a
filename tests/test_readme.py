"""What the README says about itself and shows beside its examples, which run as doctests."""

import doctest
import re
from pathlib import Path

import pytest
import torch

from balanced_optim import DualBalancedOptimizer

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.cpu
def test_it_stays_short():
    assert len(PAGE.splitlines()) < 230


@pytest.mark.cpu
def test_links_lead_somewhere():
    links = re.findall(r"[^\"]\]\(([^)#]+)\)", PAGE)
    missing = [link for link in links if not link.startswith("http") and not (ROOT / link).exists()]
    assert links and not missing


@pytest.mark.cpu
def test_every_argument_and_method_has_a_line():
    table = "\n".join(line for line in PAGE.splitlines() if line.startswith("| "))
    arguments = [*list(DualBalancedOptimizer.__init__.__annotations__)[:-2], "base_optim"]
    public = [name for name in vars(DualBalancedOptimizer) if not name.startswith("_")]
    inherited = {"param_groups", "state", "defaults", "load_state_dict", "add_param_group"}
    assert not [name for name in {*arguments, *public} - inherited if not re.search(rf"`{name}[`(]", table)]


@pytest.mark.cuda
def test_a_whole_balanced_step_in_a_cuda_graph_equals_eager_steps(device):
    if device == "cpu":
        pytest.skip("needs a CUDA device")
    example = doctest.DocTestParser().get_examples(PAGE[: PAGE.index("## Does it help")])
    shown = "".join(line.source for line in example)
    blocks = re.findall(r"^```\w*\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
    captured = next(block for block in blocks if "torch.cuda.graph(" in block)
    capture, replays = captured.split("for batch in loader:\n")
    weights = []
    for eager in (True, False):
        torch.manual_seed(0)
        place = {}
        exec(shown, place)
        made = lambda: (torch.randn(16, 8), torch.randn(16, 1), torch.randint(0, 3, (16,)))  # noqa: E731
        place["parameters"] = [*place["trunk"].parameters(), *place["heads"].parameters()]
        place["loader"] = [made() for _ in range(5)]
        # An eager run takes the three steps of the warm-up, and the capture itself takes none.
        exec(capture[: capture.index("side =")] + "for _ in range(3): step()\n" if eager else capture, place)
        exec("for batch in loader:\n" + (replays.replace("graph.replay()", "step()") if eager else replays), place)
        weights.append([parameter.detach().clone() for parameter in place["parameters"]])
    torch.testing.assert_close(*weights, rtol=0, atol=0)
