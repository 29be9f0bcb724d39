"""The adapter to torch's compiler: the only file that uses torch's private modules.

If a new release of torch moves or changes one of them, this file is the place to adapt. Everything private is imported
inside the functions, so that ``capture`` can report what is missing as a reason not to compile.
"""

from __future__ import annotations

import ast
import gc
import logging
import os
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from contextvars import copy_context
from functools import partial
from importlib.abc import Loader
from importlib.machinery import ModuleSpec
from importlib.util import module_from_spec, spec_from_file_location
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
    from torch._inductor.ir import ConcatKernel
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
            in_place = patch.object(ConcatKernel, "realize_into", partial(_write_in_place, ConcatKernel.realize_into))
            with tracing(TracingContext(mode)), in_place:
                compiled = compile_fx_inner(module, stand_ins)
        except Exception as error:
            raise CannotCapture(f"the compiler failed: {first_line(error)}") from error
    if not hasattr(compiled, "current_callable"):
        return compiled
    # Without torch's records of each call, which take a fortieth of a small step. The function keeps the graph alive:
    # deleting it frees what the call uses.
    return lambda tensors: compiled.current_callable(tensors)


def _write_in_place(realize: Callable[[Any, Any], Any], source: Any, target: Any) -> Any:
    """Let a matrix product write itself into its part of a concatenation, flattened or not.

    ``realize``, torch's own function, copies what is flattened: each gradient of weights into the vector of them all.
    """
    from torch._inductor import ir

    view: Any = source.data if isinstance(source, ir.TensorBox) else source
    buffer: Any = getattr(view.data, "data", None) if isinstance(view, ir.ReinterpretView) else None
    old: Any = getattr(buffer, "layout", None)
    if isinstance(buffer, ir.ExternKernelOut) and type(old) in (ir.FixedLayout, ir.FlexibleLayout):
        storage, part = ir.as_storage_and_layout(target)
        is_whole = buffer.get_numel() == view.get_numel() and old.offset == view.layout.offset == 0
        if is_whole and all(layout.is_contiguous() for layout in (old, view.layout, part)):
            layout = ir.FixedLayout(old.device, old.dtype, old.size, old.stride, part.offset)
            buffer.layout = ir.NonOwningLayout(ir.ReinterpretView(data=storage, layout=layout))
            return buffer
    return realize(source, target)


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

    It compiles torch's headers while the function is traced, and files of several kernels as soon as their code is
    there. The digests of torch's sources, by which the cache finds a graph, are computed meanwhile as well. Python's
    garbage collector rests, since almost everything that it would look at stays in use.
    """
    from torch._inductor import codecache, config
    from torch._inductor.async_compile import AsyncCompile
    from torch._inductor.codecache import CppPythonBindingsCodeCache
    from torch._inductor.codegen.wrapper import PythonWrapperCodegen
    from torch._inductor.cpu_vec_isa import VecISA

    compiler, load = AsyncCompile(), CppPythonBindingsCodeCache.load_async
    define: Callable[..., object] = PythonWrapperCodegen.define_kernel

    def define_and_start(self: object, name: str, body: str, *rest: object, **named: object) -> object:
        if body.startswith("async_compile.cpp_pybinding("):  # its arguments are types and the text of the kernel
            call = cast(ast.Call, ast.parse(body.strip(), mode="eval").body)
            compiler.cpp_pybinding(*map(ast.literal_eval, call.args))  # by which the finished module finds the kernel
        return define(self, name, body, *rest, **named)

    def prepare() -> None:
        with suppress(Exception):  # what fails here fails again, and is reported, later
            load('extern "C" void kernel() {}', "cpu")
            codecache.torch_key()
            codecache.CacheBase.get_system()

    with (
        config.patch(_options()),
        patch.object(PythonWrapperCodegen, "define_kernel", define_and_start),
        patch.object(CppPythonBindingsCodeCache, "load_async", _KernelFiles(load).load),
        patch.object(VecISA, "check_build", _has_flags),
    ):
        if device.type == "cpu":  # the thread sets no option itself: torch 2.8 has one set for all threads
            Thread(target=copy_context().run, args=[prepare], daemon=True).start()
        collects = gc.isenabled()
        gc.disable()
        try:
            yield
        finally:
            if collects:
                gc.enable()


# A file is compiled once it has this many characters, the code of about five kernels. Longer files take less processor
# time in all; shorter files leave less to compile after the last kernel.
_FILE_LENGTH = 40_000


class _KernelFiles:
    """Compiles the kernels of one graph, several in one file, which spares the headers' share of the time.

    A kernel's code defines a function, and a Python module with it. It stays as it is, in a namespace of its own, while
    macros number the names that all files share. Kernels are grouped in the order in which the finished module names
    them, so that a graph from the cache finds the same files.

    Args:
        load: Takes the code of a file, and returns the function that loads it as a module once it is compiled.
    """

    def __init__(self, load: Callable[..., Callable[[], Any]]) -> None:
        self._load = load
        self._loaders: dict[str, Callable[[], Any]] = {}  # by the kernel's code
        self._codes: list[str] = []  # of the file that is not complete
        self._modules: list[Callable[[], Any]] = []  # of complete files

    def load(self, code: str, *rest: object, **named: object) -> Callable[[], Any]:
        """As ``load`` for the code of one kernel."""
        if code not in self._loaders:
            file, place = len(self._modules), len(self._codes)
            self._codes.append(code)

            def load_kernel() -> Any:
                if file == len(self._modules):
                    self._finish(*rest, **named)
                module = self._modules[file]()
                return module if place == 0 else _load_extension(f"kernels.kernel_{place}", module.__file__)

            self._loaders[code] = load_kernel
            if sum(map(len, self._codes)) > _FILE_LENGTH:
                self._finish(*rest, **named)
        return self._loaders[code]

    def _finish(self, *rest: object, **named: object) -> None:
        codes, self._codes = self._codes, []
        includes = dict.fromkeys(line.strip() for code in codes for line in code.splitlines() if "#include" in line)
        parts = [*includes]
        for place, code in enumerate(codes):
            names = [(name, f"{name}_{place}" if place else name) for name in ("kernel", "PyInit_kernel")]
            parts += [f"#define {name} {new}" for name, new in names if place]
            parts += [f"namespace file_{place} {{", code, "}"]
            parts += [f"#undef {name}" for name, _ in names if place]
        self._modules.append(self._load("\n".join(parts), *rest, **named))


def _load_extension(name: str, path: str) -> Any:
    """The module whose ``PyInit_`` function has the last part of that name, from a library."""
    spec = cast(ModuleSpec, spec_from_file_location(name, path))
    module = module_from_spec(spec)
    cast(Loader, spec.loader).exec_module(module)
    return module


def _has_flags(isa: Any, code: str) -> bool:
    """Whether the C++ compiler knows the flags of an instruction set. Torch itself would compile and load a program."""
    from torch._inductor.cpp_builder import get_cpp_compiler

    words = [get_cpp_compiler(), *isa.build_arch_flags().split(), "-fsyntax-only", "-x", "c++", os.devnull]
    return subprocess.run(words, capture_output=True, check=False).returncode == 0


def silence_cuda_warning() -> None:
    """Silence a warning about CUDA that the compiler's import prints if a toolkit is installed without a GPU."""
    logging.getLogger("torch.utils.cpp_extension").addFilter(_is_not_about_cuda)


def _is_not_about_cuda(record: logging.LogRecord) -> bool:
    return "No CUDA runtime is found" not in record.getMessage()


def has_triton() -> bool:
    """Whether the compiler of GPU code is installed for this device."""
    from torch.utils import _triton

    return _triton.has_triton()


def is_pure(target: object) -> bool:
    """Whether an operator of a graph returns the same for the same inputs, and changes none of them."""
    return (
        isinstance(target, _Operator)
        and torch.Tag.nondeterministic_seeded not in target.tags
        and not target._schema.is_mutable
    )


def is_mutating(target: object) -> bool:
    """Whether an operator of a graph changes its inputs in place."""
    return isinstance(target, _Operator) and target._schema.is_mutable


def flatten(tree: object) -> tuple[list[Any], Any]:
    """The leaves of nested dictionaries and tuples, and their structure for ``unflatten``."""
    return torch.utils._pytree.tree_flatten(tree)


def unflatten(leaves: Sequence[Any], structure: Any) -> Any:
    """The nested dictionaries and tuples of these leaves."""
    return torch.utils._pytree.tree_unflatten(leaves, structure)
