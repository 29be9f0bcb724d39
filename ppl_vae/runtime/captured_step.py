"""One step of Adam as one compiled graph, from the choice of the batch to the new weights, over flat vectors."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from ppl_vae.runtime import _inductor
from ppl_vae.runtime.capture import capturing, compile_function, record_cuda_graph, refuse_new_buffers, replace_tensors
from ppl_vae.runtime.errors import CannotCapture
from ppl_vae.runtime.global_state import Module
from ppl_vae.runtime.ranks import BatchShare, batch_share, num_ranks, sum_over_ranks
from ppl_vae.runtime.records import Data, arguments_of, join_arguments

# A first moment below this moves no weight (it is divided by at least 1e-8, and added to a weight), but on its way down
# it becomes denormal, and arithmetic with denormal numbers is many times slower.
_MIN_MOMENT = 1e-30


class CapturedStep:
    """One step of stochastic gradient descent as one compiled graph.

        x = transform(stored[index]);  g = d loss(x, beta) / d weights;  g <- g min(1, clip_norm / |g|)
        Adam's update of the weights;  average <- average + (1 - decay) (weights - average)

    It changes the module's parameters and the optimizer's moments in place, as ``torch.nn.utils.clip_grad_norm_`` and
    ``torch.optim.Adam`` or ``AdamW`` do, to rounding. beta, the learning rate and the decay are tensors: one graph
    serves all their values. Once a loss or a gradient is not finite, that step and all later ones change nothing. A
    batch of another size runs the same function without the compiler. A parameter that is not in the loss has the
    gradient 0, so that AdamW decays it, which torch's does not. Several ranks have two graphs: one ends with the
    gradient as one vector, and one starts from its sum.

    Args:
        loss: (x, beta) -> a 0-d tensor, by way of the module's parameters and buffers.
        module: What is trained.
        optimizer: Adam or AdamW over the module's parameters, whose moments are used; see ``optimizer_obstacle``.
        stored: (N, *E) the data, or ``Records``, on the module's device.
        transform: (B, *E) stored images -> x.
        batch_size: B, of all ranks together.
        clip_norm: The largest global norm of the gradient.
        skip_norm: A step whose gradient has a larger norm, or whose loss or gradient is not finite, changes nothing but
            ``skipped``; None for no such step.
        averages: A running average for each parameter, by name; None for none.

    Attributes:
        total: 0-d float64, the sum of loss * B over all steps since it was last set, except skipped ones.
        counted: 0-d int64, the number of images in that sum.
        skipped: 0-d int64, the number of skipped steps.
        is_finite: 0-d bool, whether all steps so far were finite.
        taken: 0-d int64, the number of finite steps.
        votes: (2,) of the last step, summed over the ranks.
        compile_seconds: What tracing and compiling took.

    Raises:
        CannotCapture: As ``compile_function``.
    """

    def __init__(
        self,
        loss: Callable[[Any, Tensor], Tensor],
        module: Module,
        optimizer: torch.optim.Optimizer,
        stored: Data,
        transform: Callable[[Any], Data],
        *,
        batch_size: int,
        clip_norm: float,
        skip_norm: float | None = None,
        averages: Mapping[str, Tensor] | None = None,
    ) -> None:
        started = time.monotonic()
        trained = {name: w for name, w in module.named_parameters() if w.requires_grad}
        frozen = {name: w.detach() for name, w in module.named_parameters() if not w.requires_grad}
        _check_parameters(trained)
        self._loss, self._module, self._transform = loss, module, transform
        self._clip_norm, self._skip_norm = clip_norm, skip_norm
        self._optimizer, self._constants = optimizer, optimizer.param_groups[0]
        self._layout, vectors = flatten_state(trained, optimizer, averages or {})
        self._compiled_for = batch_share(batch_size)
        like = vectors["weights"]
        self._index = torch.zeros(self._compiled_for.size, dtype=torch.long, device=like.device)
        self._scalars = torch.zeros(5, dtype=like.dtype, device=like.device)  # a row of ``schedule``
        self.total = torch.zeros((), dtype=torch.double, device=like.device)
        self.counted, self.skipped, self.taken = (self._index.new_zeros(()) for _ in range(3))
        self.is_finite = torch.ones((), dtype=torch.bool, device=like.device)
        self._state = {
            "weights": {name: w.detach() for name, w in trained.items()},  # views of the vector
            "vectors": vectors,
            "buffers": dict(module.named_buffers()) | frozen,
            "stored": arguments_of(stored),
            "scalars": self._scalars,
        }
        self._state |= {name: getattr(self, name) for name in ("total", "counted", "skipped", "is_finite", "taken")}
        if num_ranks() > 1:
            self._exchanged = like.new_zeros(len(like) + 3)  # gradient, loss, votes
            self._summed, self.votes = self._exchanged.split([len(like) + 1, 2])
            # The weight of this rank's part of the batch, and the number of images in the whole batch.
            self._share, self._whole = torch.zeros_like(self._scalars[0]), torch.zeros_like(self.counted)
            self._state |= {"summed": self._summed, "share": self._share, "whole": self._whole}
        leaves, self._structure = _inductor.flatten(self._state)
        self._inputs = [*leaves, self._index]
        parts = (self._step,) if num_ranks() == 1 else (self._share_gradient, self._apply_sum)
        self._graphs = [self._compile(part) for part in parts]
        self.compile_seconds = time.monotonic() - started

    def _compile(self, part: Callable[..., tuple[Tensor, ...]]) -> Callable[[], Any]:
        """Compile a part of the step into one graph; on a GPU, record it as a CUDA graph as well."""
        run, inputs = compile_function(part, self._inputs), self._inputs
        if self._index.device.type != "cuda":
            return lambda: run(inputs)
        changing = [tensor for tensor in inputs if not any(tensor is stored for stored in self._state["stored"])]
        return record_cuda_graph(lambda: run(inputs), changing)

    def __call__(self, index: Tensor, scalars: Tensor) -> None:
        """Take one step on the images of that index, (B,), with the scalars of that step, a row of ``schedule``."""
        self._scalars.copy_(scalars)
        self._run(self._step, index, as_compiled=len(index) == len(self._index))

    def step_on_part(self, index: Tensor, scalars: Tensor, share: BatchShare, votes: Tensor) -> None:
        """Take one step of several ranks; this one works on its share of the batch, the images of that index, (b,).

        ``scalars`` are those of ``__call__``, and ``votes`` (2,) this rank's.
        """
        self._scalars.copy_(scalars)
        self._share.fill_(share.weight)
        self._whole.fill_(share.num_images)
        self._run(self._share_gradient, index, as_compiled=share == self._compiled_for)
        self.votes.copy_(votes)
        sum_over_ranks(self._exchanged)
        self._graphs[1]()

    def _run(self, part: Callable[..., Any], index: Tensor, *, as_compiled: bool) -> None:
        if as_compiled:
            self._index.copy_(index)
            self._graphs[0]()
        else:
            with capturing():  # on numbers, but in the same form as in the graph
                part(*self._inputs[:-1], index)

    def schedule(self, steps: Sequence[tuple[int, float, float, float]]) -> Tensor:
        """(n, 5): what the graph needs for each (step, beta, learning rate, decay of the averages); steps from 0."""
        (beta_1, beta_2), weight_decay = self._constants["betas"], self._constants["weight_decay"]
        rows = [
            (beta, rate / (1 - beta_1 ** (t + 1)), (1 - beta_2 ** (t + 1)) ** 0.5, 1 - decay, rate * weight_decay)
            for t, beta, rate, decay in steps
        ]
        return torch.tensor(rows, dtype=torch.double).to(self._scalars)

    def count(self, steps: int) -> None:
        """Set the number of steps that the optimizer keeps, with skipped ones."""
        for moments in self._optimizer.state.values():
            moments["step"].fill_(steps)

    # --- The functions that are compiled ---

    def _step(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        s, index = self._named(inputs)
        g, loss = self._gradient(s, index)
        self._update(s, g, loss, len(index))
        return (loss.detach(),)

    def _share_gradient(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """The gradient and the loss as one vector, times this rank's share of the images."""
        s, index = self._named(inputs)
        g, loss = self._gradient(s, index)
        s["summed"].copy_(s["share"] * torch.cat([g.to(loss.dtype), loss.detach().reshape(1)]))
        return ()

    def _apply_sum(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """The update by that vector, once it is the sum over the ranks."""
        s, _ = self._named(inputs)
        self._update(s, s["summed"][:-1], s["summed"][-1], s["whole"])
        return ()

    def _named(self, inputs: Sequence[Tensor]) -> tuple[dict[str, Any], Tensor]:
        return _inductor.unflatten(inputs[:-1], self._structure), inputs[-1]

    def _gradient(self, s: dict[str, Any], index: Tensor) -> tuple[Tensor, Tensor]:
        """The gradient as one vector, and the loss, on the images of that index."""
        beta = s["scalars"][0]
        x = self._transform(join_arguments([stored[index] for stored in s["stored"]]))

        def loss_of(weights: dict[str, Tensor]) -> Tensor:
            with replace_tensors(self._module, weights | s["buffers"]), refuse_new_buffers(self._module):
                return self._loss(x, beta)

        gradients, loss = torch.func.grad_and_value(loss_of)(s["weights"])
        return self._layout.gather(gradients), loss

    def _update(self, s: dict[str, Any], g: Tensor, loss: Tensor, images: int | Tensor) -> None:
        """Clip the gradient and take Adam's step, unless a number is not finite, or the norm is too large."""
        _, rate, root_of_correction, towards, decay = s["scalars"].unbind()
        beta_1, beta_2 = self._constants["betas"]
        norm = torch.linalg.vector_norm(g)
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
        w, first, second = (s["vectors"][name] for name in ("weights", "first", "second"))
        g = g * shrink
        m = first + (1 - beta_1) * (g - first)
        m = torch.where(m.abs() < _MIN_MOMENT, torch.zeros_like(m), m)
        v = beta_2 * second + (1 - beta_2) * g * g
        decayed = w - decay * w if self._constants["weight_decay"] else w
        new = decayed - rate * m / (v.sqrt() / root_of_correction + self._constants["eps"])
        if "averages" in s["vectors"]:
            average = s["vectors"]["averages"]
            average.copy_(torch.where(good, average + towards * (new - average), average))
        w.copy_(torch.where(good, new, w))
        first.copy_(torch.where(good, m, first))
        second.copy_(torch.where(good, v, second))


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


def _check_parameters(trained: Mapping[str, Tensor]) -> None:
    """Refuse parameters of several types, and different ones over the same memory: one update would be lost."""
    if not trained:
        raise CannotCapture("no parameter of the module is trained")
    if len({w.dtype for w in trained.values()}) > 1:
        raise CannotCapture("the parameters of the module have several types")
    owners: dict[int, str] = {}
    for name, w in trained.items():
        place = w.data_ptr()
        if w.numel() and place in owners:
            raise CannotCapture(f"the parameters {owners[place]} and {name} share their memory")
        owners[place] = name


_ALIGNMENT = 16  # numbers: vector instructions load this many at once


class FlatLayout:
    """Places tensors of one type in one vector, each at a multiple of 16 numbers, with zeros in between.

    One operation on the vector replaces one on each tensor. Compiling the step of a VAE with a flow prior then took
    79 s instead of 147 s. The views have the shapes and strides of the dense tensors ``like``, by name.
    """

    def __init__(self, like: Mapping[str, Tensor]) -> None:
        self._shapes = {name: tensor.shape for name, tensor in like.items()}
        self._orders = {name: _memory_order(tensor) for name, tensor in like.items()}
        sizes = [-(-tensor.numel() // _ALIGNMENT) * _ALIGNMENT for tensor in like.values()]
        self._starts = dict(zip(like, accumulate([0, *sizes]), strict=False))

    def gather(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Copy the tensors of these names, of the shapes of ``like``, into a new vector."""
        parts = []
        for name, order in self._orders.items():
            values = tensors[name].permute(order).reshape(-1)
            parts += [values, values.new_zeros(-len(values) % _ALIGNMENT)]
        return torch.cat(parts)

    def view(self, vector: Tensor, name: str) -> Tensor:
        """The part of the vector with the shape and the strides of the tensor of this name."""
        shape, order, start = self._shapes[name], self._orders[name], self._starts[name]
        part = vector[start : start + shape.numel()]
        return part.view([shape[dim] for dim in order]).permute([order.index(dim) for dim in range(len(shape))])


def _memory_order(tensor: Tensor) -> list[int]:
    """The order of dimensions in which a dense tensor of any shape is contiguous, from the largest stride down."""
    order = sorted(range(tensor.dim()), key=lambda dim: (tensor.stride(dim), tensor.shape[dim]), reverse=True)
    return order if tensor.permute(order).is_contiguous() else list(range(tensor.dim()))


def flatten_state(
    trained: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer, averages: Mapping[str, Tensor]
) -> tuple[FlatLayout, dict[str, Tensor]]:
    """Move the parameters, their moments and their averages into one vector each, and make them views of it.

    Returns:
        The layout, and the vectors "weights", "first", "second" and, if there are averages, "averages".
    """
    moments = {name: adam_moments(optimizer, w) for name, w in trained.items()}
    parts = {
        "weights": {name: w.detach() for name, w in trained.items()},
        "first": {name: first for name, (first, _) in moments.items()},
        "second": {name: second for name, (_, second) in moments.items()},
    }
    if averages:
        parts["averages"] = dict(averages)
    layout = FlatLayout(parts["weights"])
    vectors = {kind: layout.gather(tensors) for kind, tensors in parts.items()}
    for name, w in trained.items():
        w.data = layout.view(vectors["weights"], name)
        optimizer.state[w]["exp_avg"] = layout.view(vectors["first"], name)
        optimizer.state[w]["exp_avg_sq"] = layout.view(vectors["second"], name)
        if averages:
            averages[name].data = layout.view(vectors["averages"], name)
    return layout, vectors


def adam_moments(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> tuple[Tensor, Tensor]:
    """Adam's two moments of a parameter; zeros before its first step."""
    state = optimizer.state[parameter]
    if not state:
        state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
        state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
    return state["exp_avg"], state["exp_avg_sq"]
