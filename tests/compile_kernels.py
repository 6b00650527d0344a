"""Compiles the kernels for a GPU, which need not be there, and prints the loads of each as JSON."""

import json
import re

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from balanced_optim import _kernels

NUMBERS = [
    "task",
    "tasks",
    "spare",
    "parameters",
    "heads",
    "blocks",
    "length",
    "count",
    "refuses",
    "fresh",
]
POINTERS = {
    **dict.fromkeys(["table", "offsets", "starts", "sizes"], "*i64"),
    **dict.fromkeys(["owner", "slots", "healthy"], "*i32"),
    **dict.fromkeys(["usable", "given", "taken"], "*i1"),
    **dict.fromkeys(["keep", "gain", "squares", "scales", "unit", "factors", "power"], "*fp64"),
}


def loads_of(kernel, types, **constants):
    signature = {name: "i32" for name in NUMBERS} | POINTERS | types
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else signature[name] for name in names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if signature[name].startswith("*")}
    values = {(names.index(name),): value for name, value in constants.items()}
    source = ASTSource(fn=kernel, signature=signature, constexprs=values, attrs=aligned)
    options = {"num_warps": 8, "enable_fp_fusion": False}
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    return sorted(set(re.findall(r"ld\.global\.[\w.:]+", compiled.asm["ptx"])))


def average(row, kind, wide=tl.float32, *, aligned=True, rows=True):
    name = "*fp64" if wide is tl.float64 else "*fp32"
    types = {"rows": row, "shares": name, "partials": name, "length": "i64"}
    if not rows:
        types |= dict.fromkeys(("rows", "slots", "keep", "gain"), "*i64")
    constants = {"ROWS": rows, "KIND": kind, "WIDE": wide, "ALIGNED": aligned, "BLOCK": 1024}
    return loads_of(_kernels.average_kernel, types, **constants)


def add(total, wide, kind):
    constants = {"KIND": kind, "WIDE": wide, "ALIGNED": True, "BLOCK": 1024}
    return loads_of(_kernels.add_kernel, {"total": total}, **constants)


def weighted_sum(rows, out, wide):
    return loads_of(_kernels.sum_kernel, {"rows": rows, "out": out, "weights": "*fp32"}, WIDE=wide, BLOCK=2048)


if __name__ == "__main__":
    found = {
        "average": average("*fp32", tl.float32),
        "average bfloat16 gradients": average("*fp32", tl.bfloat16),
        "average float16 rows": average("*fp16", tl.float16),
        "average float64": average("*fp64", tl.float64, tl.float64),
        "average unaligned": average("*fp32", tl.float32, aligned=False),
        "squares": average("*fp32", tl.float32, rows=False),
        "add": add("*fp32", tl.float32, tl.float16),
        "add float64": add("*fp64", tl.float64, tl.float64),
        "sum": weighted_sum("*fp32", "*fp32", tl.float32),
        "sum bfloat16": weighted_sum("*bf16", "*bf16", tl.float32),
        "sum float64": weighted_sum("*fp64", "*bf16", tl.float64),
        "total": loads_of(_kernels.total_kernel, {"partials": "*fp32", "out": "*fp64"}, BLOCK=2048),
        "accept": loads_of(_kernels.accept_kernel, {"partials": "*fp32"}, BLOCK=2048),
        "scale": loads_of(_kernels.scale_kernel, {"partials": "*fp64"}, BLOCK=2048),
    }
    print(json.dumps(found))
