"""A tensor function, its backward pass and an optimizer as one compiled graph. Knows nothing of VAEs.

A Pyro program runs through its effect handlers once, on tensors without numbers, and what it did to them is written
down as a graph of tensor operations (``make_fx``), which torch's inductor compiles. The program stays the only source
of truth: nothing is derived by hand, and nothing of Python is left in the compiled step.
"""

from __future__ import annotations

import logging
import operator
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import pyro
import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, softplus
from torch.overrides import TorchFunctionMode

from ppl_vae.runtime.errors import CannotCapture

# A first moment smaller than this moves no weight (it is divided by at least 1e-8 and added to a weight), but on its
# way down it becomes denormal, and arithmetic with denormal numbers is many times slower.
_SMALLEST_MOMENT = 1e-30


_is_capturing = False


def is_capturing() -> bool:
    """Whether the code that asks is being written down. It then sees tensors without numbers, and cannot read one."""
    return _is_capturing


@contextmanager
def _capturing() -> Iterator[None]:
    global _is_capturing
    before, _is_capturing = _is_capturing, True
    try:
        with pyro.validation_enabled(False), _AsGraph():  # to check a value is to read it
            yield
    finally:
        _is_capturing = before


def capture_obstacle(device: torch.device) -> str | None:
    """Why nothing can be compiled for this device on this machine; None where it can."""
    if device.type == "cpu":
        named = os.environ.get("CXX")
        if named:
            return None if shutil.which(named.split()[0]) else f"CXX names {named}, which is not there"
        found = any(map(shutil.which, ("g++", "clang++")))
        return None if found else "no C++ compiler (g++ or clang++) is installed"
    try:
        from torch.utils._triton import has_triton
    except ImportError as error:
        return _first_line(error)

    return None if has_triton() else "no Triton for this device is installed"


def compiled(
    function: Callable[..., Sequence[Tensor]], inputs: Sequence[Tensor]
) -> Callable[[Sequence[Tensor]], tuple[Tensor, ...]]:
    """The function as one compiled graph.

    It is called once, on stand-ins of the inputs that have shapes but no numbers. Random numbers come from torch's
    global generators, the same ones as if the function ran as it stands. What is a Python number or a branch when it is
    called stays so in the graph; what shall vary must be a tensor among the inputs.

    Args:
        function: tensors -> tensors. It may change its inputs in place.
        inputs: what it will be called with: these shapes, strides, types and devices.

    Returns:
        inputs -> the function's outputs. It may not be differentiated.

    Raises:
        CannotCapture: the function reads a number of a tensor, or uses a tensor that is neither an input nor made by
            itself; or the compiler fails, or is another than the one this was written for.
    """
    try:
        return _compiled(function, inputs)
    except OSError as error:
        where = os.environ.get("TORCHINDUCTOR_CACHE_DIR", "its default place")
        raise CannotCapture(f"the compiler's cache, {where}, cannot be used: {_first_line(error)}") from error
    except (ImportError, AttributeError, TypeError) as error:  # private names of torch, which change without notice
        raise CannotCapture(f"torch {torch.__version__} has another compiler: {_first_line(error)}") from error


def _compiled(
    function: Callable[..., Sequence[Tensor]], inputs: Sequence[Tensor]
) -> Callable[[Sequence[Tensor]], tuple[Tensor, ...]]:
    # Where a CUDA toolkit is installed without a GPU, importing the compiler warns of it.
    logging.getLogger("torch.utils.cpp_extension").addFilter(_is_not_about_cuda)
    from torch._guards import TracingContext, tracing
    from torch._inductor import config
    from torch._inductor.compile_fx import compile_fx_inner
    from torch._inductor.decomposition import select_decomp_table
    from torch._subclasses import FakeTensorMode
    from torch.func import functionalize
    from torch.fx.experimental.proxy_tensor import make_fx
    from torch.fx.experimental.symbolic_shapes import ShapeEnv
    from torch.fx.passes.fake_tensor_prop import FakeTensorProp

    reason = capture_obstacle(inputs[0].device)
    if reason is not None:
        raise CannotCapture(reason)
    mode = FakeTensorMode(shape_env=ShapeEnv())  # with symbols for shapes, though none occurs: else nothing is cached
    stand_ins = [mode.from_tensor(tensor.detach(), static_shapes=True) for tensor in inputs]
    with config.patch(_OPTIONS):
        try:
            with _capturing():
                graph = make_fx(
                    functionalize(lambda *tensors: tuple(function(*tensors)), remove="mutations"),
                    decomposition_table=select_decomp_table() | {torch.ops.aten.addmm.default: _addmm},
                    tracing_mode="fake",
                )(*stand_ins)
        except CannotCapture as error:
            raise CannotCapture(str(error).splitlines()[0]) from error  # Pyro adds lines of its own to any error
        except Exception as error:
            raise CannotCapture(_in_words(error)) from error
        _join_logarithms(graph.graph)
        _compute_once(graph.graph)
        graph.graph.eliminate_dead_code()
        graph.recompile()
        FakeTensorProp(graph, mode).propagate_dont_convert_inputs(*stand_ins)
        stand_ins = [node.meta["val"] for node in graph.graph.nodes if node.op == "placeholder"]
        try:
            with tracing(TracingContext(mode)):
                run: Any = compile_fx_inner(graph, stand_ins)
        except Exception as error:
            raise CannotCapture(f"the compiler failed: {_first_line(error)}") from error
    return lambda tensors: tuple(run(list(tensors)))


def _is_not_about_cuda(record: logging.LogRecord) -> bool:
    return "No CUDA runtime is found" not in record.getMessage()


_OPTIONS = {
    "fallback_random": True,  # else the compiler's random numbers are others than torch's own for the same seed
    "size_asserts": False,  # the inputs are always the same tensors
    "cpp.vec_isa_ok": True,  # the processor's flags tell; to try each instruction set takes a second at each start
}


def _addmm(bias: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    """bias + a b. The library's product with a bias copies the bias over the whole output first.

    A subtraction, so that the compiler does not find the sum and make that product of it again: the bias joins the
    operations that follow.
    """
    product = torch.mm(a, b)
    return (product if alpha == 1 else alpha * product) - (-bias if beta == 1 else -beta * bias)


# What makes a Python number of a tensor: it would stay in the graph for good, whatever the tensor holds later.
_READERS = {
    getattr(Tensor, name)
    for name in ("item", "tolist", "numpy", "__bool__", "__int__", "__float__", "__index__", "__complex__", "__array__")
}


class _AsGraph(TorchFunctionMode):
    """Refuses to read a number, and takes the form of a Bernoulli's log-probability that compiles best.

    -log Bernoulli(x; logits h) = log(1 + e^h) - h x takes one exponential; the library's own form takes two. Without
    gradients the logarithm is split, max(h, 0) + log(1 + e^-|h|), for ``_join_logarithms``.
    """

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
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


_MOST_FACTORS = 64


def _join_logarithms(graph: torch.fx.Graph) -> None:
    """sum_d log(1 + e_d) -> sum over groups of log prod_d (1 + e_d), where e_d = exp(-|h_d|): one logarithm a group.

    e_d is from 0 to 1, so that a product of 64 factors stays below 2^64; it is wrong by rounding, and an e_d below 6e-8
    is lost: at most 5e-5 nats for 784 pixels, were all of them as small. Sums of other things stay as they are.
    """
    aten = torch.ops.aten
    for total in graph.find_nodes(op="call_function", target=aten.sum.dim_IntList):
        if len(total.args) != 2 or total.kwargs or total.args[1] is None or list(total.args[1]) != [-1]:
            continue
        terms: Any = total.args[0]
        if terms.meta["val"].dtype not in (torch.float32, torch.float64):
            continue  # 2^64 is too large for half precision, and its rounding too coarse
        shape = list(terms.meta["val"].shape)
        size = next(size for size in range(_MOST_FACTORS, 0, -1) if shape[-1] % size == 0)
        found = _summand(terms, 1, terms.meta["val"].numel()) if size > 1 else None
        if found is None:
            continue
        logarithm, sign = found
        with graph.inserting_before(logarithm):
            like = logarithm.meta["val"]
            kind = {"dtype": like.dtype, "device": like.device, "pin_memory": False}
            logarithm.replace_all_uses_with(graph.call_function(aten.full.default, (list(like.shape), 0), kind))
        users = list(total.users)
        with graph.inserting_before(total.next):
            grouped = graph.call_function(
                aten.view.default, (logarithm.args[0], [*shape[:-1], shape[-1] // size, size])
            )
            factors = graph.call_function(aten.add.Tensor, (grouped, 1.0))
            product = graph.call_function(aten.prod.dim_int, (factors, -1))
            rest = graph.call_function(aten.sum.dim_IntList, (graph.call_function(aten.log.default, (product,)), [-1]))
            joined = graph.call_function(aten.add.Tensor if sign > 0 else aten.sub.Tensor, (total, rest))
        for user in users:
            user.replace_input_with(total, joined)


def _summand(node: torch.fx.Node, sign: int, size: int) -> tuple[torch.fx.Node, int] | None:
    """log1p(exp(-|h|)) among the summands of a node that nothing else uses, and its sign; None where there is none."""
    aten = torch.ops.aten
    if node.op != "call_function" or len(node.users) != 1 or node.meta["val"].numel() != size or node.kwargs:
        return None
    if node.target is aten.log1p.default:
        chain: Any = node
        for target in (aten.log1p.default, aten.exp.default, aten.neg.default, aten.abs.default):
            if getattr(chain, "target", None) is not target:
                return None
            chain = chain.args[0]
        return node, sign
    known: dict[Any, tuple[int, ...]] = {
        aten.view.default: (sign,),
        aten.neg.default: (-sign,),
        aten.add.Tensor: (sign, sign),
        aten.sub.Tensor: (sign, -sign),
    }
    for argument, its_sign in zip(node.args, known.get(node.target, ()), strict=False):
        found = _summand(argument, its_sign, size) if isinstance(argument, torch.fx.Node) else None
        if found is not None:
            return found
    return None


def _compute_once(graph: torch.fx.Graph) -> None:
    """One operation for all of the same kind and inputs: what a program computes again costs nothing.

    Random draws stay apart, and so does what comes before and after a change of an input. A detached tensor is the
    tensor itself: the graph is differentiated already.
    """
    known: dict[Any, torch.fx.Node] = {}
    for node in list(graph.nodes):
        if node.target in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            first: Any = node.args[0]
        elif node.target is operator.getitem or _is_pure(node.target):
            # Written out, 1 and 1.0, of which tensors of different types are made, are not equal.
            first = known.setdefault((node.target, repr(node.args), repr(node.kwargs)), node)
        else:
            first = node
            if isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable:
                known.clear()
        if first is not node:
            node.replace_all_uses_with(first)
            graph.erase_node(node)


def _is_pure(target: Any) -> bool:
    """Whether it is an operation that gives the same for the same inputs, and changes none of them."""
    if not isinstance(target, torch._ops.OpOverload):
        return False
    return torch.Tag.nondeterministic_seeded not in target.tags and not target._schema.is_mutable


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"


def _in_words(error: Exception) -> str:
    name = type(error).__name__
    if name in ("DataDependentOutputException", "GuardOnDataDependentSymNode", "DynamicOutputShapeException"):
        return f"it reads a number or a shape that depends on a tensor's values while it runs ({_first_line(error)})"
    if "in-place" in str(error):
        return f"it changes a buffer in-place, as batch normalization does in training ({_first_line(error)})"
    if "FakeTensor" in str(error):
        return "it uses a tensor that is neither an argument nor made by itself, such as a pyro.param"
    return _first_line(error)


class CapturedStep:
    """One step of stochastic gradient descent as one compiled graph, from the choice of the batch to the new weights.

        x = observe(stored[index]);  g = d loss(x, beta) / d weights;  g <- g min(1, clip_norm / |g|)
        Adam's update of the weights;  average <- average + (1 - decay) (weights - average)

    It works on the module's parameters and the optimizer's moments in place, and computes what
    ``torch.nn.utils.clip_grad_norm_`` and ``torch.optim.Adam`` do, to rounding. beta, the learning rate and the decay
    are tensors: one graph for all their values. Once a loss or a gradient is not finite, that step and all later ones
    change nothing. A batch of another size runs the same function without the compiler.

    Args:
        loss: (x, beta) -> a 0-d tensor, by way of the module's parameters and buffers.
        module: what is trained.
        optimizer: Adam with torch's default constants, over the module's parameters; its moments are used and kept.
        stored: (N, *E) the data, on the module's device.
        observe: (B, *E) of it -> x.
        batch_size: B.
        clip_norm: the largest global norm of the gradient.
        skip_norm: a step whose gradient's norm is above it, or whose loss or gradient is not finite, changes nothing
            but ``skipped``; None for no such step.
        averages: a running average for each parameter, by name; None for none.
        exchange: sums a vector over several processes, in place. Each then works on its part of every batch, and the
            step is two graphs: one to the gradient, as one vector, and one from its sum over the processes.
        num_votes: how many numbers ride along in that vector.

    Attributes:
        total: 0-d float64, the sum of loss * B over all steps since it was last set, but for those left out.
        counted: 0-d int64, the images behind it.
        skipped: 0-d int64, how many steps were left out.
        is_finite: 0-d bool, whether all steps so far were.
        taken: 0-d int64, how many were.
        votes: (num_votes,) of the last step, summed over the processes.
        compile_seconds: what tracing and compiling took.

    Raises:
        CannotCapture: as ``compiled``.
    """

    def __init__(
        self,
        loss: Callable[[Tensor, Tensor], Tensor],
        module: nn.Module,
        optimizer: torch.optim.Adam,
        stored: Tensor,
        observe: Callable[[Tensor], Tensor],
        *,
        batch_size: int,
        clip_norm: float,
        skip_norm: float | None = None,
        averages: Mapping[str, Tensor] | None = None,
        exchange: Callable[[Tensor], None] | None = None,
        num_votes: int = 0,
    ) -> None:
        started = time.monotonic()
        trained = {name: w for name, w in module.named_parameters() if w.requires_grad}
        fixed = {name: w.detach() for name, w in module.named_parameters() if not w.requires_grad}
        weights = {name: w.detach() for name, w in trained.items()}
        if not weights:
            raise CannotCapture("no parameter of the module is trained")
        _check_apart(weights)
        some = next(iter(weights.values()))
        self._module = module
        self._loss = loss
        self._observe = observe
        self._clip_norm, self._skip_norm = clip_norm, skip_norm
        self._optimizer = optimizer
        group = optimizer.param_groups[0]
        (self._beta_1, self._beta_2), self._epsilon = group["betas"], group["eps"]
        self._weight_decay = group["weight_decay"]
        self._index = torch.zeros(batch_size, dtype=torch.long, device=some.device)
        self._scalars = torch.zeros(5, dtype=some.dtype, device=some.device)
        self.total = torch.zeros((), dtype=torch.double, device=some.device)
        self.counted = torch.zeros((), dtype=torch.long, device=some.device)
        self.skipped = torch.zeros((), dtype=torch.long, device=some.device)
        self.is_finite = torch.ones((), dtype=torch.bool, device=some.device)
        self.taken = torch.zeros((), dtype=torch.long, device=some.device)
        self._state = {
            "weights": weights,
            "moments": {name: adam_moments(optimizer, w) for name, w in trained.items()},
            "averages": dict(averages or {}),
            "buffers": dict(module.named_buffers()) | fixed,
            "stored": stored,
            "total": self.total,
            "counted": self.counted,
            "skipped": self.skipped,
            "is_finite": self.is_finite,
            "taken": self.taken,
            "scalars": self._scalars,
        }
        self._exchange = exchange
        if exchange is not None:
            self._flat = torch.zeros(sum(w.numel() for w in weights.values()) + 1 + num_votes).to(some)
            self.votes = self._flat[len(self._flat) - num_votes :]
            self._summed = self._flat[: len(self._flat) - num_votes]
            # Of a part of a batch: its share of the images, and how many there are in all.
            self._share, self._whole = torch.zeros_like(self._scalars[0]), torch.zeros_like(self.counted)
            self._state |= {"summed": self._summed, "share": self._share, "whole": self._whole}
        flat, self._structure = torch.utils._pytree.tree_flatten(self._state)
        self._inputs = [*flat, self._index]
        parts = (self._step,) if exchange is None else (self._to_sum, self._from_sum)
        self._graphs = [self._ready(part) for part in parts]
        self.compile_seconds = time.monotonic() - started

    def _ready(self, part: Callable[..., tuple[Tensor, ...]]) -> Callable[[], Any]:
        """A part of the step as one graph, on a GPU recorded, too."""
        run, inputs = compiled(part, self._inputs), self._inputs
        if self._index.device.type != "cuda":
            return lambda: run(inputs)
        changing = [tensor for tensor in inputs if tensor is not self._state["stored"]]
        return _as_cuda_graph(lambda: run(inputs), changing)

    def __call__(self, index: Tensor, scalars: Tensor) -> None:
        """One step on the images of that index, (B,), with the scalars of that step, a row of ``schedule``."""
        self._scalars.copy_(scalars)
        if len(index) != len(self._index):
            with _capturing():  # on numbers, but without reading one, as in the graph
                self._step(*self._inputs[:-1], index)
            return
        self._index.copy_(index)
        self._graphs[0]()

    def step_on_part(
        self, index: Tensor, scalars: Tensor, *, share: float, whole: int, votes: Tensor, as_compiled: bool
    ) -> None:
        """One step of several processes; this one works on the images of that index.

        Args:
            index: (b,), of this process's images.
            scalars: as ``__call__``.
            share: the weight of their mean in that over the whole batch.
            whole: B, of the whole batch.
            votes: (num_votes,) this process's.
            as_compiled: whether the part is as large, and of as large a batch, as when the graph was made.
        """
        assert self._exchange is not None
        self._scalars.copy_(scalars)
        self._share.fill_(share)
        self._whole.fill_(whole)
        if as_compiled:
            self._index.copy_(index)
            self._graphs[0]()
        else:
            with _capturing():
                self._to_sum(*self._inputs[:-1], index)
        self.votes.copy_(votes)
        self._exchange(self._flat)
        self._graphs[1]()

    def schedule(self, steps: Sequence[tuple[int, float, float, float]]) -> Tensor:
        """(n, 5): for each (step, beta, learning rate, decay of the averages) what the graph needs; steps from 0."""
        b1, b2 = self._beta_1, self._beta_2
        rows = [
            (beta, rate / (1 - b1 ** (step + 1)), (1 - b2 ** (step + 1)) ** 0.5, 1 - decay, rate * self._weight_decay)
            for step, beta, rate, decay in steps
        ]
        return torch.tensor(rows, dtype=torch.double).to(self._scalars)

    def count(self, steps: int) -> None:
        """Tells the optimizer how many steps there were, with those that were left out."""
        for moments in self._optimizer.state.values():
            moments["step"].fill_(steps)

    def _step(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        s, index = self._named(inputs)
        gradients, loss = self._gradients(s, index)
        self._update(s, gradients, loss, len(index))
        return (loss.detach(),)

    def _to_sum(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """The gradient and the loss as one vector, times this process's share of the images."""
        s, index = self._named(inputs)
        gradients, loss = self._gradients(s, index)
        of_weights = [gradients[name].reshape(-1).to(loss.dtype) for name in s["weights"]]
        s["summed"].copy_(s["share"] * torch.cat([*of_weights, loss.detach().reshape(1)]))
        return ()

    def _from_sum(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """The update by the vector, once it is the sum over the processes."""
        s, _ = self._named(inputs)
        sizes = [w.numel() for w in s["weights"].values()]
        *parts, loss = s["summed"].split([*sizes, 1])
        gradients = {n: g.view_as(w).to(w.dtype) for (n, w), g in zip(s["weights"].items(), parts, strict=True)}
        self._update(s, gradients, loss[0], s["whole"])
        return ()

    def _named(self, inputs: Sequence[Tensor]) -> tuple[dict[str, Any], Tensor]:
        return torch.utils._pytree.tree_unflatten(inputs[:-1], self._structure), inputs[-1]

    def _gradients(self, s: dict[str, Any], index: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """The gradient for each weight, and the loss, on the images of that index."""
        beta = s["scalars"][0]
        x = self._observe(s["stored"][index])

        def loss_of(weights: dict[str, Tensor]) -> Tensor:
            with replaced(self._module, weights | s["buffers"]), _buffers_kept(self._module):
                return self._loss(x, beta)

        return torch.func.grad_and_value(loss_of)(s["weights"])

    def _update(self, s: dict[str, Any], gradients: dict[str, Tensor], loss: Tensor, images: int | Tensor) -> None:
        """Clips the gradient and takes Adam's step, unless a number is not finite, or its norm is too large."""
        _, rate, root_of_correction, towards, decay = s["scalars"].unbind()
        beta_1, beta_2 = self._beta_1, self._beta_2
        norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g) for g in gradients.values()]))
        shrink = (self._clip_norm / (norm + 1e-6)).clamp(max=1.0)
        good = loss.isfinite() & norm.isfinite()
        if self._skip_norm is None:
            good = s["is_finite"] & good
            s["is_finite"].copy_(good)
            s["taken"].copy_(s["taken"] + good)
        else:
            good = good & (norm <= self._skip_norm)
            s["skipped"].copy_(s["skipped"] + ~good)
        s["counted"].copy_(s["counted"] + good * images)
        s["total"].copy_(torch.where(good, s["total"] + loss.double() * images, s["total"]))
        for name, w in s["weights"].items():
            first, second = s["moments"][name]
            g = gradients[name] * shrink
            m = first + (1 - beta_1) * (g - first)
            m = torch.where(m.abs() < _SMALLEST_MOMENT, torch.zeros_like(m), m)
            v = beta_2 * second + (1 - beta_2) * g * g
            new = (w - decay * w if self._weight_decay else w) - rate * m / (
                v.sqrt() / root_of_correction + self._epsilon
            )
            if name in s["averages"]:
                average = s["averages"][name]
                average.copy_(torch.where(good, average + towards * (new - average), average))
            w.copy_(torch.where(good, new, w))
            first.copy_(torch.where(good, m, first))
            second.copy_(torch.where(good, v, second))


@contextmanager
def replaced(module: nn.Module, values: Mapping[str, Tensor]) -> Iterator[None]:
    """Within it, these tensors are the module's parameters and buffers of these names, wherever it uses them.

    ``torch.func.functional_call`` does not put back what a module that is registered twice holds, as the posterior is
    that a VampPrior holds, too.
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
def _buffers_kept(module: nn.Module) -> Iterator[None]:
    """Refuses that a buffer is replaced by another."""
    before = dict(module.named_buffers())
    yield
    others = [name for name, buffer in module.named_buffers() if before.get(name) is not buffer]
    if others:
        raise CannotCapture(f"it replaces a buffer of the module, {others[0]}, which the graph would forget")


def optimizer_obstacle(optimizer: torch.optim.Optimizer) -> str | None:
    """Why a captured step cannot take this optimizer's steps; None if it can."""
    if type(optimizer) not in (torch.optim.Adam, torch.optim.AdamW):
        return f"a compiled step has the optimizers Adam and AdamW, not {type(optimizer).__name__}"
    if len(optimizer.param_groups) > 1:
        return "a compiled step has one group of parameters"
    group = optimizer.param_groups[0]
    unknown = [name for name in ("amsgrad", "maximize") if group[name]]
    if type(optimizer) is torch.optim.Adam and group["weight_decay"] and not group.get("decoupled_weight_decay"):
        unknown.append("weight_decay, which AdamW has")
    return f"a compiled step of Adam has no {' and no '.join(unknown)}" if unknown else None


def adam_moments(optimizer: torch.optim.Adam, parameter: nn.Parameter) -> tuple[Tensor, Tensor]:
    """Adam's two moments of a parameter, as they are or zero."""
    state = optimizer.state[parameter]
    if not state:
        state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
        state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
    return state["exp_avg"], state["exp_avg_sq"]


def _check_apart(weights: Mapping[str, Tensor]) -> None:
    """Refuses parameters over one memory that are not one parameter: of their updates the graph would keep the last."""
    owners: dict[int, str] = {}
    for name, w in weights.items():
        place = w.untyped_storage().data_ptr()
        if w.numel() and place in owners:
            raise CannotCapture(f"the parameters {owners[place]} and {name} share their memory")
        owners[place] = name


def _as_cuda_graph(run: Callable[[], Any], changing: Sequence[Tensor]) -> Callable[[], None]:
    """The launches of ``run`` recorded once, to be replayed as one; what it changes is afterwards as it was before.

    Raises:
        CannotCapture: something in it cannot be recorded, such as a copy to the host.
    """
    device = changing[0].device
    with torch.cuda.device(device):
        before = [tensor.clone() for tensor in changing]
        random_state = torch.cuda.get_rng_state(device)
        try:
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                run()  # what is made lazily at a first call must not be recorded
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                run()
        except RuntimeError as error:
            raise CannotCapture(f"no CUDA graph: {_first_line(error)}") from error
        finally:
            for tensor, value in zip(changing, before, strict=True):
                tensor.copy_(value)
            torch.cuda.set_rng_state(random_state, device)
    return graph.replay
