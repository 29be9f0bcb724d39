"""Random numbers of several ranks that equal those of one process.

Where a program draws noise for b of B images, the noise of all B is drawn by the same function, and the b rows are
taken. Every rank's generator thus has the same states as that of a single process. Results do not depend on the number
of ranks, and a checkpoint holds one state of the generator for all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext

from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import Message
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ppl_vae.runtime.ranks import BatchShare

# Functions whose numbers depend on their position and the shape alone, so that rows of the whole batch can be taken.
_SHAPES = {"rand", "randn"}
_LIKE = {"rand_like", "randn_like"}
_IN_PLACE = {"normal_", "uniform_", "bernoulli_", "exponential_", "cauchy_", "geometric_", "log_normal_"}
_PARAMETRIC = {"normal", "bernoulli"}

# All others: the amount of noise depends on values, or the image that a number belongs to is unknown.
_REFUSED = {
    *("randint", "randint_like", "randperm", "random_", "multinomial", "poisson", "binomial", "_standard_gamma"),
    *("_sample_dirichlet", "gumbel_softmax", "exponential", "geometric", "cauchy", "log_normal", "uniform"),
    *("rrelu", "rrelu_", "rrelu_with_noise", "fractional_max_pool2d", "fractional_max_pool3d"),
    *("fractional_max_pool2d_with_indices", "fractional_max_pool3d_with_indices"),
}
_DROPOUT = {
    *("dropout", "dropout_", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "alpha_dropout_"),
    *("feature_dropout", "feature_dropout_", "feature_alpha_dropout", "feature_alpha_dropout_", "native_dropout"),
}
_HAS_DROPOUT = {
    *("gru", "lstm", "rnn_relu", "rnn_tanh", "scaled_dot_product_attention", "multi_head_attention_forward")
}
_RANDOM = {*_SHAPES, *_LIKE, *_IN_PLACE, *_PARAMETRIC, *_REFUSED, *_DROPOUT, *_HAS_DROPOUT}


class SharedNoise(TorchFunctionMode):
    """A mode in which random functions draw the noise of the whole batch, and return the rows of this rank's images.

    Attributes:
        share: The rank's part of the batch.
        image_dim: The dimension of images in the noise that is drawn now: 0 in ``transform``, -(event_dim + 1) at a
            sample site. Elsewhere it is None, and random functions are refused.
    """

    def __init__(self) -> None:
        super().__init__()
        self.share: BatchShare | None = None
        self.image_dim: int | None = None

    @contextmanager
    def along(self, dim: int | None) -> Iterator[None]:
        """``dim`` is the dimension of images in all noise of the block; None: as each sample site has it."""
        if self.share is None or self.share.num_images == self.share.size:
            yield
            return
        with _Sites(self) if dim is None else nullcontext(), self:
            self.image_dim = dim
            try:
                yield
            finally:
                self.image_dim = None

    def __torch_function__(
        self, function: Callable[..., Tensor], types: object, args: tuple = (), kwargs: dict | None = None
    ) -> Tensor:
        kwargs = dict(kwargs or {})
        name = getattr(function, "__name__", "")
        if name not in _RANDOM or not _draws(name, args, kwargs):
            return function(*args, **kwargs)
        if self.image_dim is None:
            raise ValueError(f"torch.{name}: under several ranks noise is drawn at a sample site or by transform alone")
        if name in _SHAPES:
            return self._rows(function(self._widened(_size(args, kwargs), name), **kwargs))
        tensors = [argument for argument in [*args, *kwargs.values()] if isinstance(argument, Tensor)]
        if name in _PARAMETRIC and len(tensors) == len(args) and not kwargs:
            return self._rows(function(*(self._padded(parameter, name) for parameter in args)))
        if (name in _LIKE or name in _IN_PLACE) and len(tensors) == 1 and args[0].is_contiguous():
            wide = args[0].new_empty(self._widened(args[0].shape, name))
            drawn = self._rows(function(wide, *args[1:], **kwargs))
            return drawn if name in _LIKE else args[0].copy_(drawn)
        words = ", ".join(sorted(_SHAPES | _LIKE | _IN_PLACE | _PARAMETRIC))
        raise ValueError(f"torch.{name}: under several ranks expected noise whose place is known ({words}), got this")

    def _widened(self, shape: Sequence[int], name: str) -> tuple[int, ...]:
        """The shape with all images of the batch instead of this rank's."""
        share, at = self.share, self.image_dim or 0
        assert share is not None
        if not -len(shape) <= at < len(shape) or shape[at] != share.size:
            raise ValueError(
                f"torch.{name}: under several ranks expected noise for {share.size} images at dimension {at}, got the "
                f"shape {tuple(shape)}"
            )
        wide = list(shape)
        wide[at] = share.num_images
        return tuple(wide)

    def _padded(self, parameter: Tensor, name: str) -> Tensor:
        """Pad a parameter of the noise with 1/2 for the images of other ranks, whose draws are not used."""
        wide = parameter.new_full(self._widened(parameter.shape, name), 0.5)
        self._rows(wide).copy_(parameter.detach())
        return wide

    def _rows(self, wide: Tensor) -> Tensor:
        assert self.share is not None
        return wide.narrow(self.image_dim or 0, self.share.start, self.share.size)


class _Sites(Messenger):
    """Sets the dimension of images while a latent site draws."""

    def __init__(self, noise: SharedNoise) -> None:
        super().__init__()
        self.noise = noise

    def _process_message(self, msg: Message) -> None:
        event_dim = getattr(msg["fn"], "event_dim", None)
        if msg["type"] == "sample" and not msg["is_observed"] and event_dim is not None:
            self.noise.image_dim = -(event_dim + 1)

    def _postprocess_message(self, msg: Message) -> None:
        self.noise.image_dim = None


def _draws(name: str, args: tuple, kwargs: dict) -> bool:
    """Whether a function of that name draws noise with these arguments; dropout draws in training only."""
    if name in _DROPOUT:
        return bool(kwargs.get("training", kwargs.get("train", args[2] if len(args) > 2 else True)))
    if name in _HAS_DROPOUT:
        return kwargs.get("dropout_p", 0.0) > 0 or any(isinstance(a, float) and a > 0 for a in args)
    return True


def _size(args: tuple, kwargs: dict) -> Sequence[int]:
    """The shape in torch.rand(2, 3), torch.rand((2, 3)) and torch.rand(size=(2, 3))."""
    size = kwargs.pop("size", args)
    return size[0] if len(size) == 1 and not isinstance(size[0], int) else size
