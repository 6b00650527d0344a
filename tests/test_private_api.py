"""What the library reads of torch without a promise that it stays: each name is there and means what we think.

The table in CONTRIBUTING.md says where and why. A test that fails here with a new torch names what to look at.
"""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from devices import generator
from torch.autograd.function import BackwardCFunction

import balanced_optim

pytestmark = pytest.mark.cpu  # names are the same on every device

SOURCES = sorted(Path(balanced_optim.__file__).parent.glob("*.py"))


def leaf(*shape):
    return torch.randn(*shape, generator=generator(0)).requires_grad_()


def nodes_behind(tensor):
    found = [tensor.grad_fn]
    for node in found:
        found.extend(following for following, _ in node.next_functions if following is not None)
    return found


# ------------------------------------------------- parameters


def test_version_counts_writes_in_place():
    parameter = leaf(3)
    before = parameter._version
    with torch.no_grad():
        parameter.add_(1)
    assert parameter._version > before
    assert leaf(3)._version == 0


def test_a_parameter_of_fsdp1_carries_its_mark():
    from torch.distributed.fsdp import _flat_param

    assert _flat_param.FlatParameter.__name__ == "FlatParameter"
    assert "_fsdp_flattened" in Path(_flat_param.__file__).read_text(encoding="utf-8")


# ------------------------------------------------- foreach


def test_foreach_functions_do_as_the_single_ones():
    values, others = [leaf(3).detach(), leaf(2, 2).detach()], [torch.ones(3), torch.ones(2, 2)]
    norms = torch._foreach_norm(values, dtype=torch.float64)
    assert [n.dtype for n in norms] == [torch.float64] * 2
    torch.testing.assert_close(norms, [torch.linalg.vector_norm(v.double()) for v in values])
    torch.testing.assert_close(torch._foreach_mul(values, 3.0), tuple(3 * v for v in values))
    changed = [v.clone() for v in values]
    torch._foreach_add_(changed, others, alpha=2.0)
    torch._foreach_mul_(changed, 5.0)
    torch.testing.assert_close(changed, [5 * (v + 2) for v in values])
    torch._foreach_copy_(changed, others)
    torch.testing.assert_close(changed, others)
    torch._foreach_zero_(changed)
    assert not any(c.any() for c in changed)


def test_a_foreach_copy_changes_dtypes():
    target = torch.zeros(3)
    torch._foreach_copy_([target], [torch.ones(3, dtype=torch.bfloat16)])
    assert target.dtype == torch.float32 and target.tolist() == [1, 1, 1]


# ------------------------------------------------- the graph


def test_nodes_lead_to_leaves_that_they_name():
    parameter = leaf(3)
    ends = [node for node in nodes_behind((2 * parameter).sum()) if node.name() == "torch::autograd::AccumulateGrad"]
    assert [node.variable for node in ends] == [parameter]


def test_a_product_has_kept_its_other_factor_until_the_graph_is_freed():
    loss, factor = leaf(3).sum(), torch.tensor(1024.0)
    scaled = loss * factor
    assert scaled.grad_fn.name() == "MulBackward0"
    assert scaled.grad_fn._saved_other is factor
    scaled.backward()
    with pytest.raises(RuntimeError):
        _ = scaled.grad_fn._saved_other


def test_a_stack_that_is_unbound_leads_from_each_part_to_what_it_was():
    parts = [leaf(2).sum(), leaf(2).prod()]
    for number, part in enumerate(torch.stack(parts).unbind()):
        assert (part.grad_fn.name(), part.output_nr) == ("UnbindBackward0", number)
        stack = part.grad_fn.next_functions[0][0]
        assert stack.name() == "StackBackward0"
        assert [node for node, _ in stack.next_functions] == [each.grad_fn for each in parts]


def test_hooks_on_a_leaf_are_seen():
    for register, name in (
        (torch.Tensor.register_hook, "_backward_hooks"),
        (torch.Tensor.register_post_accumulate_grad_hook, "_post_accumulate_grad_hooks"),
    ):
        parameter = leaf(2)
        assert not getattr(parameter, name)
        handle = register(parameter, lambda seen: None)
        assert getattr(parameter, name)
        handle.remove()
        assert not getattr(parameter, name)


@pytest.mark.parametrize(
    ("change", "names"),
    [
        (lambda t: t[0], {"SelectBackward0"}),
        (lambda t: t.unbind()[0], {"UnbindBackward0"}),
        (lambda t: t.view(1, 2), {"ViewBackward0"}),
        (lambda t: t.reshape(1, 2), {"ViewBackward0", "ReshapeAliasBackward0"}),
        (lambda t: t[:, None].squeeze(), {"SqueezeBackward0"}),
    ],
)
def test_nodes_that_only_change_a_shape_have_these_names(change, names):
    assert change(2 * leaf(2)).grad_fn.name() in names


def test_a_function_is_found_from_its_node_and_the_other_way():
    class Double(torch.autograd.Function):
        @staticmethod
        def forward(_, values):
            return 2 * values

        @staticmethod
        def backward(_, gradient):
            return 2 * gradient

    kind = type(Double.apply(leaf(3)).grad_fn)
    assert issubclass(kind, BackwardCFunction)
    assert kind._forward_cls is Double and Double._backward_cls is kind
    assert kind.__name__ == "DoubleBackward"
    assert Double in torch.autograd.Function.__subclasses__()


COMPILED = """
import torch
# "eager" compiles nothing; "aot_eager" makes the graph of a compiled region without a compiler.
double = torch.compile(lambda x: x.sin() * 2, backend="aot_eager")
from torch._dynamo.utils import counters
assert counters["stats"]["unique_graphs"] == 0
y = double(torch.ones(3, requires_grad=True))
assert counters["stats"]["unique_graphs"] > 0
assert type(y.grad_fn).__name__ == "CompiledFunctionBackward", type(y.grad_fn)
assert torch._functorch.config.donated_buffer in (True, False)
assert torch.compiler.config.cache_key_tag == ""
"""


def test_a_compiled_region_is_counted_and_its_node_has_this_name():
    subprocess.run([sys.executable, "-W", "ignore", "-c", COMPILED], check=True)


# ------------------------------------------------- words of errors


def test_a_graph_that_was_used_says_so_in_these_words():
    loss = leaf(3).square().sum()
    loss.backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()


def test_a_reentrant_checkpoint_says_so_in_these_words():
    parameter = leaf(3)
    loss = torch.utils.checkpoint.checkpoint(torch.sin, parameter, use_reentrant=True).sum()
    with pytest.raises(RuntimeError, match="use_reentrant=True"):
        torch.autograd.grad(loss, [parameter])


def test_donated_buffers_are_called_so():
    # The error itself needs a compiler: tests/test_compiled.py.
    folder = Path(importlib.import_module("torch._functorch._aot_autograd").__path__[0])
    assert any("donated buffers" in path.read_text(encoding="utf-8") for path in folder.glob("*.py"))


# ------------------------------------------------- torch.optim


def test_setstate_makes_the_tables_of_hooks_and_nothing_else():
    class Bare(torch.optim.Optimizer):
        defaults = {}

        def __init__(self):
            super().__setstate__({})

        def step(self):
            pass

    bare = Bare()
    for moment in ("pre", "post"):
        for call in ("step", "state_dict", "load_state_dict"):
            assert f"_optimizer_{call}_{moment}_hooks" in vars(bare)
    assert not {"param_groups", "state"} & vars(bare).keys()


# ------------------------------------------------- none of it at import


def at_import(tree):
    """The nodes that run when a module is imported: bodies of functions and lambdas do not."""
    todo = [tree]
    for node in todo:
        yield node
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            todo.extend([*node.decorator_list, *node.args.defaults, *filter(None, node.args.kw_defaults)])
        elif not isinstance(node, ast.Lambda):
            todo.extend(ast.iter_child_nodes(node))


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_nothing_private_is_read_at_import(path):
    for node in at_import(ast.parse(path.read_text(encoding="utf-8"))):
        names = [node.attr] if isinstance(node, ast.Attribute) else []
        if isinstance(node, ast.ImportFrom) and not node.level:
            names = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
        elif isinstance(node, ast.Import):
            names = [part for alias in node.names for part in alias.name.split(".")]
        private = [name for name in names if name.startswith("_") and not name.startswith("__")]
        assert not private, f"{path.name}:{node.lineno} reads {private}"


def test_methods_can_be_left_out_of_compiled_traces():
    assert callable(torch._disable_dynamo)


OWN_CLASSES = """
import torch, torch._dynamo, torch.distributed.fsdp, torch.distributed.tensor, torch.utils.checkpoint
from balanced_optim import _graph
assert len(torch.autograd.Function.__subclasses__()) > 50
assert not _graph._anything_foreign()
"""


def test_none_of_torchs_own_functions_is_taken_for_somebody_elses():
    subprocess.run([sys.executable, "-c", OWN_CLASSES], check=True)
