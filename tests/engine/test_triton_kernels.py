# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels compile for the GPUs they are for; that needs a compiler and no GPU."""

import os
import subprocess
import sys

import pytest

COMPILE = """
import sys
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

from xinference.engine.attention import triton as kernels


def compiled(kernel, types, constants):
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else types[name] for name in names}
    places = {(names.index(name),): value for name, value in constants.items()}
    source = ASTSource(fn=kernel, signature=signature, constexprs=places)
    made = compile(source, target=GPUTarget("cuda", capability, 32))
    assert made.asm["cubin"], kernel


number, capability = sys.argv[1], int(sys.argv[2])
numbers = "*" + number
ints = dict.fromkeys(
    ["cache_slots", "rows", "query_starts", "context_lens", "block_tables"], "*i32"
)
strides = [f"{which}{of}_stride" for which in ("key", "value") for of in ("_head", "_token", "")]
tensors = dict.fromkeys(
    ["query", "key", "value", "key_pages", "value_pages", "sinks", "out"], numbers
)
types = {
    **ints,
    **tensors,
    **dict.fromkeys([*strides, "table_stride"], "i32"),
    "scaling": "fp32",
}
floats = dict.fromkeys(["mixed", "highest", "total", "highest_out", "total_out"], "*fp32")
shape = {"num_kv_heads": 2, "key_dim": 128, "value_dim": 128}
compiled(kernels._store_kernel, types, {**shape, "width": 128})
layer = {
    **shape,
    "group": 7,
    "key_width": 128,
    "value_width": 128,
    "block_size": 32,
    "keys_at_once": 64 if number == "bf16" else 32,
    "window": 512,
    "softcap": 30.0,
}
split = {"has_sinks": False, "rows_are_listed": False, "num_splits": 8, "matrix": 16}
whole = {"has_sinks": True, "rows_are_listed": True, "num_splits": 1, "matrix": 64}
compiled(
    kernels._attend_kernel, {**types, **floats, "out": "*fp32"}, {**layer, **split, "num_tiles": 1}
)
compiled(kernels._attend_kernel, {**types, **floats}, {**layer, **whole, "num_tiles": 4})
merge = {"num_heads": 14, "value_dim": 128, "has_sinks": True, "num_splits": 8, "width": 128}
compiled(kernels._merge_kernel, {**types, **floats}, merge)
"""


@pytest.mark.parametrize(("number", "capability"), [("bf16", 90), ("fp32", 80)])
def test_the_kernels_compile(number: str, capability: int) -> None:
    # Why a process: in this one Triton interprets.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}

    ended = subprocess.run(
        [sys.executable, "-c", COMPILE, number, str(capability)],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )

    assert ended.returncode == 0, ended.stderr
