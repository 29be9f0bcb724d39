"""A tensor function as one compiled graph.

A Pyro program runs once through its effect handlers, on tensors without numbers, and the operators that it uses are
recorded as a graph, which torch's inductor compiles. The program stays the only source of truth: nothing is derived by
hand, and no Python is left in the compiled function.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import pyro
import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, softplus
from torch.overrides import TorchFunctionMode

from ppl_vae.runtime import _inductor
from ppl_vae.runtime.errors import CannotCapture
from ppl_vae.runtime.rewriting import join_logarithms, merge_equal_operations

_is_capturing = False


def is_capturing() -> bool:
    """Whether the calling code is being captured. Its tensors then have no numbers that could be read."""
    return _is_capturing


@contextmanager
def capturing() -> Iterator[None]:
    """Run Pyro programs in the form that a graph can hold: unchecked, without reading a number of a tensor."""
    global _is_capturing
    before, _is_capturing = _is_capturing, True
    try:
        with pyro.validation_enabled(False), _GraphForm():  # a check of a value reads it
            yield
    finally:
        _is_capturing = before


def capture_obstacle(device: torch.device) -> str | None:
    """Why nothing can be compiled for this device on this machine; None if it can."""
    if device.type == "cpu":
        named = os.environ.get("CXX")
        if named:
            return None if shutil.which(named.split()[0]) else f"CXX names {named}, which is not there"
        found = any(map(shutil.which, ("g++", "clang++")))
        return None if found else "no C++ compiler (g++ or clang++) is installed"
    try:
        return None if _inductor.has_triton() else "no Triton for this device is installed"
    except ImportError as error:
        return first_line(error)


def compile_function(
    function: Callable[..., Sequence[Tensor]], inputs: Sequence[Tensor]
) -> Callable[[Sequence[Tensor]], tuple[Tensor, ...]]:
    """Compile a function of tensors into one graph.

    The function is called once, on stand-ins of the inputs that have shapes but no numbers. Random numbers come from
    torch's global generators, the same as without compiling. Python numbers and branches are frozen as they are in this
    call; what is to vary must be a tensor among the inputs.

    Args:
        function: Tensors -> tensors. It may change its inputs in place.
        inputs: Tensors of the shapes, strides, types and devices with which the result will be called.

    Returns:
        inputs -> the function's outputs. It cannot be differentiated.

    Raises:
        CannotCapture: The function reads a number of a tensor, or uses a tensor that is neither an input nor made by
            itself; or the compiler fails, or its interface is unknown.
    """
    reason = capture_obstacle(inputs[0].device)
    if reason is not None:
        raise CannotCapture(reason)
    _inductor.silence_cuda_warning()
    try:
        with _inductor.busy_compiler(inputs[0].device):
            return _compile(function, inputs)
    except OSError as error:
        where = os.environ.get("TORCHINDUCTOR_CACHE_DIR", "its default place")
        raise CannotCapture(f"the compiler's cache, {where}, cannot be used: {first_line(error)}") from error
    except (ImportError, AttributeError, TypeError) as error:  # private names of torch, which change without notice
        raise CannotCapture(f"torch {torch.__version__} has another compiler: {first_line(error)}") from error


def _compile(
    function: Callable[..., Sequence[Tensor]], inputs: Sequence[Tensor]
) -> Callable[[Sequence[Tensor]], tuple[Tensor, ...]]:
    def captured(*tensors: Tensor) -> Sequence[Tensor]:
        with capturing():
            return function(*tensors)

    try:
        traced = _inductor.trace(captured, inputs, {torch.ops.aten.addmm.default: _addmm})
    except _inductor.TracingFailed as failed:
        raise CannotCapture(_explain(failed.__cause__)) from failed.__cause__
    join_logarithms(traced.module.graph)
    merge_equal_operations(traced.module.graph)
    try:
        run = _inductor.compile_traced(traced)
    except Exception as error:
        raise CannotCapture(f"the compiler failed: {first_line(error)}") from error
    return lambda tensors: tuple(run(list(tensors)))


def _addmm(bias: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    """bias + a b. The library's own product with a bias copies the bias over the whole output first.

    It is a subtraction, because the compiler would turn a sum into that product again. The bias then joins the
    operations that follow.
    """
    product = torch.mm(a, b)
    return (product if alpha == 1 else alpha * product) - (-bias if beta == 1 else -beta * bias)


# These make a Python number of a tensor, which would stay in the graph whatever the tensor holds later.
_READERS = {
    getattr(Tensor, name)
    for name in ("item", "tolist", "numpy", "__bool__", "__int__", "__float__", "__index__", "__complex__", "__array__")
}


class _GraphForm(TorchFunctionMode):
    """Refuses to read a number, and writes a Bernoulli's log-probability in the form that compiles best.

    -log Bernoulli(x; logits h) = log(1 + e^h) - h x takes one exponential; the library's own form takes two. Without
    gradients the logarithm is split, max(h, 0) + log(1 + e^-|h|), for ``join_logarithms``.
    """

    def __torch_function__(
        self, function: Callable[..., Tensor], types: object, args: tuple = (), kwargs: dict | None = None
    ) -> Tensor:
        kwargs = kwargs or {}
        if function in _READERS:
            raise CannotCapture(f"it reads a number of a tensor ({function.__name__}), which a graph cannot")
        if function is binary_cross_entropy_with_logits and len(args) == 2:
            given = {name: value for name, value in kwargs.items() if value is not None}
            if given == {"reduction": "none"}:
                logits, x = args
                if torch.is_grad_enabled():
                    return softplus(logits, threshold=40) - logits * x
                return logits.clamp(min=0) + (-logits.abs()).exp().log1p() - logits * x
        return function(*args, **kwargs)


def first_line(error: Exception) -> str:
    """The type of an error and the first line of its message."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"


def _explain(error: BaseException | None) -> str:
    assert isinstance(error, Exception)
    if isinstance(error, CannotCapture):
        return str(error).splitlines()[0]  # Pyro adds lines of its own to any error
    name = type(error).__name__
    if name in ("DataDependentOutputException", "GuardOnDataDependentSymNode", "DynamicOutputShapeException"):
        return f"it reads a number or a shape that depends on a tensor's values while it runs ({first_line(error)})"
    if "in-place" in str(error):
        return f"it changes a buffer in-place, as batch normalization does in training ({first_line(error)})"
    if "FakeTensor" in str(error):
        return "it uses a tensor that is neither an argument nor made by itself, such as a pyro.param"
    return first_line(error)


class _HasTensors(Protocol):
    """The methods of a ``torch.nn.Module`` that name its parameters and buffers."""

    def modules(self) -> Iterator[nn.Module]: ...
    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]: ...
    def named_buffers(self) -> Iterator[tuple[str, Tensor]]: ...


def detach_tensors(module: _HasTensors) -> dict[str, Tensor]:
    """The module's parameters and buffers by name, without gradients, in the same memory, of any shapes."""
    return {name: w.detach() for name, w in [*module.named_parameters(), *module.named_buffers()]}


@contextmanager
def replace_tensors(module: _HasTensors, values: Mapping[str, Tensor]) -> Iterator[None]:
    """Use these tensors as the module's parameters and buffers of these names, wherever it holds them.

    ``torch.func.functional_call`` does not restore a module that is registered twice, such as the posterior that a
    VampPrior holds, too.
    """
    named = dict(module.named_parameters()) | dict(module.named_buffers())
    new = {id(named[name]): value for name, value in values.items()}
    slots: list[tuple[dict[str, Any], str, Any]] = [
        (slot, name, tensor)
        for part in module.modules()
        for slot in (part._parameters, part._buffers)
        for name, tensor in slot.items()
        if id(tensor) in new
    ]
    try:
        for slot, name, tensor in slots:
            slot[name] = new[id(tensor)]
        yield
    finally:
        for slot, name, tensor in slots:
            slot[name] = tensor


@contextmanager
def refuse_new_buffers(module: _HasTensors) -> Iterator[None]:
    """Raise CannotCapture if the block replaces a buffer of the module by another tensor, which a graph forgets."""
    before = dict(module.named_buffers())
    yield
    others = [name for name, buffer in module.named_buffers() if before.get(name) is not buffer]
    if others:
        raise CannotCapture(f"it replaces a buffer of the module, {others[0]}, which the graph would forget")
