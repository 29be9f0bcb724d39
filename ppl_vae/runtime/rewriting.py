"""Rewriting a traced graph before it is compiled: fewer logarithms, and nothing computed twice."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from ppl_vae.runtime import _inductor

aten = torch.ops.aten

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
