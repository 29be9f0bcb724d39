"""The adapter to torch's compiler: the only file that uses torch's private modules.

If a new release of torch moves or changes one of them, this file is the place to adapt. Everything private is imported
inside the functions, so that ``capture`` can report what is missing as a reason not to compile.
"""

from __future__ import annotations

import ast
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from contextvars import copy_context
from threading import Thread
from typing import Any, cast
from unittest.mock import patch

import torch
from torch import Tensor, fx

from ppl_vae.runtime.errors import CannotCapture, first_line

_OPTIONS = {
    "fallback_random": True,  # else the compiler's random numbers are others than torch's own for the same seed
    "size_asserts": False,  # the inputs are always the same tensors
    "cpp.vec_isa_ok": True,  # the processor's flags suffice; trying each instruction set takes a second at each start
}
_NEWER_OPTIONS = {"aot_inductor.enable_line_tables": False}  # of torch above 2.8; a sixth of the C++ compiler's time

_Operator = type(torch.ops.aten.add.Tensor)


class TracingFailed(Exception):
    """The function raised an error, its cause, or does something that no graph can hold."""


def compile_graph(
    function: Callable[..., Sequence[Tensor]],
    inputs: Sequence[Tensor],
    replacements: Mapping[Any, Callable[..., Tensor]],
    rewrite: Callable[[fx.Graph], None],
) -> Callable[[list[Tensor]], Any]:
    """Call the function once on stand-ins of the inputs, record the operators that it uses, and compile their graph.

    Changes of inputs in place become part of the graph, which is called with the list of its inputs.

    Args:
        function: Tensors -> tensors.
        inputs: Tensors of the shapes, strides, types and devices with which the graph will be called.
        replacements: Operators that are recorded as these functions of the same arguments.
        rewrite: Changes the graph before it is compiled.

    Raises:
        TracingFailed: From the error that the function, or the recording of it, raised.
        CannotCapture: The compiler raised an error.
    """
    from torch._guards import TracingContext, tracing
    from torch._inductor import config
    from torch._inductor.compile_fx import compile_fx_inner
    from torch._inductor.decomposition import select_decomp_table
    from torch._subclasses import FakeTensorMode
    from torch.func import functionalize
    from torch.fx.experimental.proxy_tensor import make_fx
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    mode = FakeTensorMode(shape_env=ShapeEnv())  # without symbolic shapes nothing is cached, although none occurs
    stand_ins = [mode.from_tensor(tensor.detach(), static_shapes=True) for tensor in inputs]
    with config.patch(_options()):
        record = make_fx(
            functionalize(lambda *tensors: tuple(function(*tensors)), remove="mutations"),
            decomposition_table=select_decomp_table() | dict(replacements),
            tracing_mode="fake",
        )
        try:
            module = record(*stand_ins)
        except Exception as error:
            raise TracingFailed from error
        rewrite(module.graph)
        try:
            module.graph.eliminate_dead_code()
            module.recompile()
            with mode:
                _complete_values(module.graph)
            stand_ins = [node.meta["val"] for node in module.graph.nodes if node.op == "placeholder"]
            with tracing(TracingContext(mode)):
                return compile_fx_inner(module, stand_ins)
        except Exception as error:
            raise CannotCapture(f"the compiler failed: {first_line(error)}") from error


def _complete_values(graph: fx.Graph) -> None:
    """Give each operation that ``rewrite`` added a stand-in of its result; the recording gave one to all others."""
    for node in graph.nodes:
        if node.op == "call_function" and "val" not in node.meta:
            args, kwargs = fx.map_arg((node.args, node.kwargs), lambda argument: argument.meta["val"])
            node.meta["val"] = node.target(*args, **kwargs)


def _options() -> dict[str, bool]:
    from torch._inductor import config

    known = config.get_config_copy()
    return _OPTIONS | {name: value for name, value in _NEWER_OPTIONS.items() if name in known}


@contextmanager
def busy_compiler(device: torch.device) -> Iterator[None]:
    """Keep the C++ compiler busy while Python still works on the graph.

    It compiles torch's headers while the function is traced, and each kernel as soon as its code is there. When this
    was introduced, it took the default training step from 39 s to 26 s, from an empty cache on two idle cores. The
    digests of torch's sources, by which the cache finds a graph, are computed meanwhile as well.
    """
    from torch._inductor import codecache, config
    from torch._inductor.async_compile import AsyncCompile
    from torch._inductor.codegen.wrapper import PythonWrapperCodegen

    compiler, define = AsyncCompile(), PythonWrapperCodegen.define_kernel

    def define_and_start(self: Any, name: str, body: str, *rest: Any, **named: Any) -> Any:
        if body.startswith("async_compile.cpp_pybinding("):  # its arguments are types and the text of the kernel
            call = cast(ast.Call, ast.parse(body.strip(), mode="eval").body)
            compiler.cpp_pybinding(*map(ast.literal_eval, call.args))  # by which the finished module finds the kernel
        return define(self, name, body, *rest, **named)

    def prepare() -> None:
        with suppress(Exception):  # what fails here fails again, and is reported, later
            compiler.cpp_pybinding([], 'extern "C" void kernel() {}')
            codecache.torch_key()
            codecache.CacheBase.get_system()

    with config.patch(_options()), patch.object(PythonWrapperCodegen, "define_kernel", define_and_start):
        if device.type == "cpu":  # the thread sets no option itself: torch 2.8 has one set for all threads
            Thread(target=copy_context().run, args=[prepare], daemon=True).start()
        yield


def silence_cuda_warning() -> None:
    """Silence a warning about CUDA that the compiler's import prints if a toolkit is installed without a GPU."""
    logging.getLogger("torch.utils.cpp_extension").addFilter(_is_not_about_cuda)


def _is_not_about_cuda(record: logging.LogRecord) -> bool:
    return "No CUDA runtime is found" not in record.getMessage()


def has_triton() -> bool:
    """Whether the compiler of GPU code is installed for this device."""
    from torch.utils import _triton

    return _triton.has_triton()


def is_pure(target: Any) -> bool:
    """Whether an operator of a graph returns the same for the same inputs, and changes none of them."""
    return (
        isinstance(target, _Operator)
        and torch.Tag.nondeterministic_seeded not in target.tags
        and not target._schema.is_mutable
    )


def is_mutating(target: Any) -> bool:
    """Whether an operator of a graph changes its inputs in place."""
    return isinstance(target, _Operator) and target._schema.is_mutable


def flatten(tree: Any) -> tuple[list[Any], Any]:
    """The leaves of nested dictionaries and tuples, and their structure for ``unflatten``."""
    return torch.utils._pytree.tree_flatten(tree)


def unflatten(leaves: Sequence[Any], structure: Any) -> Any:
    """The nested dictionaries and tuples of these leaves."""
    return torch.utils._pytree.tree_unflatten(leaves, structure)
