"""A tensor function as one compiled graph.

A Pyro program runs once through its effect handlers, on tensors without numbers, and the operators that it uses are
recorded as a graph, which torch's inductor compiles. The program stays the only source of truth: nothing is derived by
hand, and no Python is left in the compiled function.
"""

from __future__ import annotations

import operator
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import pyro
import torch
from torch import Tensor, fx
from torch.nn.functional import binary_cross_entropy_with_logits, one_hot, softplus
from torch.overrides import TorchFunctionMode

from ppl_vae.runtime import _inductor
from ppl_vae.runtime.errors import CannotCapture, first_line
from ppl_vae.runtime.global_state import Module

aten = torch.ops.aten
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

    def captured(*tensors: Tensor) -> Sequence[Tensor]:
        with capturing():
            return function(*tensors)

    def rewrite(graph: fx.Graph) -> None:
        join_logarithms(graph)
        merge_equal_operations(graph)

    _inductor.silence_cuda_warning()
    try:
        with _inductor.busy_compiler(inputs[0].device):
            run = _inductor.compile_graph(captured, inputs, {aten.addmm.default: _addmm}, rewrite)
        return lambda tensors: tuple(run(list(tensors)))
    except _inductor.TracingFailed as failed:
        raise CannotCapture(_explain(failed.__cause__)) from failed.__cause__
    except OSError as error:
        where = os.environ.get("TORCHINDUCTOR_CACHE_DIR", "its default place")
        raise CannotCapture(f"the compiler's cache, {where}, cannot be used: {first_line(error)}") from error
    except (ImportError, AttributeError, TypeError) as error:  # private names of torch, which change without notice
        raise CannotCapture(f"torch {torch.__version__} has another compiler: {first_line(error)}") from error


def record_cuda_graph(run: Callable[[], Any], changing: Sequence[Tensor]) -> Callable[[], None]:
    """Record the launches of ``run`` as one graph, and return the function that replays it.

    The tensors ``changing``, of any shape, and the random state are restored afterwards. What cannot be recorded, such
    as a copy to the host, raises CannotCapture.
    """
    device = changing[0].device
    with torch.cuda.device(device):
        before = [tensor.clone() for tensor in changing]
        random_state = torch.cuda.get_rng_state(device)
        try:
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                run()  # what is created lazily at a first call must not be recorded
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                run()
        except RuntimeError as error:
            raise CannotCapture(f"no CUDA graph: {first_line(error)}") from error
        finally:
            for tensor, value in zip(changing, before, strict=True):
                tensor.copy_(value)
            torch.cuda.set_rng_state(random_state, device)
    return graph.replay


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
    """Refuses to read a number, and writes some functions in a form that a graph can hold, or that compiles best.

    -log Bernoulli(x; logits h) = log(1 + e^h) - h x takes one exponential; the library's own form takes two. Without
    gradients the logarithm is split, max(h, 0) + log(1 + e^-|h|), for ``join_logarithms``.
    """

    def __torch_function__(
        self, function: Callable[..., Tensor], types: object, args: tuple = (), kwargs: dict | None = None
    ) -> Tensor:
        kwargs = kwargs or {}
        if function in _READERS:
            raise CannotCapture(f"it reads a number of a tensor ({function.__name__}), which a graph cannot")
        if function is one_hot and (len(args) == 2 or kwargs.keys() == {"num_classes"}):
            values, num_classes = args[0], kwargs.get("num_classes", args[-1])  # its own form reads the largest value
            return (values[..., None] == torch.arange(num_classes, device=values.device)).long()
        if function is binary_cross_entropy_with_logits and len(args) == 2:
            given = {name: value for name, value in kwargs.items() if value is not None}
            if given == {"reduction": "none"}:
                logits, x = args
                if torch.is_grad_enabled():
                    return softplus(logits, threshold=40) - logits * x
                return logits.clamp(min=0) + (-logits.abs()).exp().log1p() - logits * x
        return function(*args, **kwargs)


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


def detach_tensors(module: Module) -> dict[str, Tensor]:
    """The module's parameters and buffers by name, without gradients, in the same memory, of any shapes."""
    return {name: w.detach() for name, w in [*module.named_parameters(), *module.named_buffers()]}


@contextmanager
def replace_tensors(module: Module, values: Mapping[str, Tensor]) -> Iterator[None]:
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
def refuse_new_buffers(module: Module) -> Iterator[None]:
    """Raise CannotCapture if the block replaces a buffer of the module by another tensor, which a graph forgets."""
    before = dict(module.named_buffers())
    yield
    others = [name for name, buffer in module.named_buffers() if before.get(name) is not buffer]
    if others:
        raise CannotCapture(f"it replaces a buffer of the module, {others[0]}, which the graph would forget")


# --- Rewriting of a traced graph before it is compiled: fewer logarithms, and nothing computed twice ---

_MAX_FACTORS = 64


def join_logarithms(graph: fx.Graph) -> None:
    """sum_d log(1 + e_d) -> sum over groups of log prod_d (1 + e_d), with e_d = exp(-|h_d|): one logarithm per group.

    e_d is from 0 to 1, so that a product of 64 factors stays below 2^64. The product is rounded, and an e_d below 6e-8
    is lost: at most 5e-5 nats for 784 pixels, if all are that small. Sums of other terms stay as they are.
    """
    for total in graph.find_nodes(op="call_function", target=aten.sum.dim_IntList):
        if len(total.args) != 2 or total.kwargs or total.args[1] is None or list(total.args[1]) != [-1]:
            continue
        terms: Any = total.args[0]
        if terms.meta["val"].dtype not in (torch.float32, torch.float64):
            continue  # 2^64 is too large for half precision, whose rounding is too coarse as well
        shape = list(terms.meta["val"].shape)
        size = next(size for size in range(_MAX_FACTORS, 0, -1) if shape[-1] % size == 0)
        found = _find_logarithm(terms, 1, terms.meta["val"].numel()) if size > 1 else None
        if found is not None:
            _join(graph, total, *found, groups=[*shape[:-1], shape[-1] // size, size])


def _join(graph: fx.Graph, total: fx.Node, logarithm: fx.Node, sign: int, *, groups: list[int]) -> None:
    """Take the logarithm out of the terms of a sum, and add the logarithms of products of its groups."""
    with graph.inserting_before(logarithm):
        like = logarithm.meta["val"]
        kind = {"dtype": like.dtype, "device": like.device, "pin_memory": False}
        logarithm.replace_all_uses_with(graph.call_function(aten.full.default, (list(like.shape), 0), kind))
    users = list(total.users)
    with graph.inserting_before(total.next):
        grouped = graph.call_function(aten.view.default, (logarithm.args[0], groups))
        factors = graph.call_function(aten.add.Tensor, (grouped, 1.0))
        product = graph.call_function(aten.prod.dim_int, (factors, -1))
        rest = graph.call_function(aten.sum.dim_IntList, (graph.call_function(aten.log.default, (product,)), [-1]))
        joined = graph.call_function(aten.add.Tensor if sign > 0 else aten.sub.Tensor, (total, rest))
    for user in users:
        user.replace_input_with(total, joined)


_SIGNS: dict[Any, tuple[int, ...]] = {  # of the arguments in the result
    aten.view.default: (1,),
    aten.neg.default: (-1,),
    aten.add.Tensor: (1, 1),
    aten.sub.Tensor: (1, -1),
}


def _find_logarithm(node: fx.Node, sign: int, size: int) -> tuple[fx.Node, int] | None:
    """Find log1p(exp(-|h|)) among the summands of a node that nothing else uses, and its sign."""
    if node.op != "call_function" or len(node.users) != 1 or node.meta["val"].numel() != size or node.kwargs:
        return None
    if node.target is aten.log1p.default:
        chain: Any = node
        for target in (aten.log1p.default, aten.exp.default, aten.neg.default, aten.abs.default):
            if getattr(chain, "target", None) is not target:
                return None
            chain = chain.args[0]
        return node, sign
    for argument, its_sign in zip(node.args, _SIGNS.get(node.target, ()), strict=False):
        found = _find_logarithm(argument, sign * its_sign, size) if isinstance(argument, fx.Node) else None
        if found is not None:
            return found
    return None


def merge_equal_operations(graph: fx.Graph) -> None:
    """Keep one of several operations of the same kind and inputs, so that what a program repeats costs nothing.

    Random draws stay apart, and so do operations before and after a change of an input. A detached tensor is the tensor
    itself, since the graph is already differentiated.
    """
    known: dict[Any, fx.Node] = {}
    for node in list(graph.nodes):
        if node.target in (aten.detach.default, aten.alias.default):
            first: Any = node.args[0]
        elif node.target is operator.getitem or _inductor.is_pure(node.target):
            # As text, 1 and 1.0 differ: they make tensors of different types, and are equal as numbers.
            first = known.setdefault((node.target, repr(node.args), repr(node.kwargs)), node)
        else:
            first = node
            if _inductor.is_mutating(node.target):
                known.clear()
        if first is not node:
            node.replace_all_uses_with(first)
            graph.erase_node(node)
