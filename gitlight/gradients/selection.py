"""Selections in an exported graph, where they cost least.

A vision transformer reads its class off one token. In its last block everything behind attention works on each token
alone, so that all but one of them is computed, and carried back as zeros, for nothing: `select_early` leaves them out
before. Attention takes queries, keys and values apart by a selection each, of which every one is carried back as a
tensor of zeros with its part in it: `select_together` has one operation do it.
"""

import operator
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.fx.node import map_arg

from gitlight.errors import first_line
from gitlight.exported import arguments_of
from gitlight.gradients.layer_gradients import NoRuleError

aten = torch.ops.aten

_ELEMENTWISE = frozenset(
    ("elu", "gelu", "hardswish", "hardtanh", "leaky_relu", "mish", "relu", "sigmoid", "silu", "softplus", "tanh")
)
_COPIES = frozenset(("alias", "clone", "contiguous"))
_ATTENTION = "scaled_dot_product_attention"
_OF_TWO = frozenset(("add", "sub", "mul", "div"))
_OVERLOADS = {
    "default": (*_ELEMENTWISE, *_COPIES, "dropout", "layer_norm", "linear", "permute", "reshape", "view", _ATTENTION),
    "Tensor": (*_OF_TWO, "slice"),
    "int": ("transpose", "unflatten"),
    "using_ints": ("flatten",),
}
_KNOWN: dict[Any, str] = {
    getattr(getattr(aten, name), overload): name for overload, names in _OVERLOADS.items() for name in names
}
"""ATen's operations alone: those of other libraries may have the same names, and do something else."""


def move_selections(graph: fx.Graph) -> None:
    """`select_early` and `select_together`.

    Args:
        graph: of ``torch.export``; changed in place.

    Raises:
        NoRuleError: an operation does not take what it would be given.
    """
    try:
        select_early(graph)
        select_together(graph)
    except Exception as error:  # operations raise many kinds, on sizes that they do not take
        raise NoRuleError(f"a selection of positions cannot be moved: {first_line(error)}") from error


def select_early(graph: fx.Graph) -> None:
    """Move ``x[..., i, ...]`` ahead of operations that treat the positions of that dimension alone.

    Results are the same up to rounding. A selection moves as long as nothing else takes what it selects from, and stops
    in front of operations that are not known here. Where anything is overwritten all stay: one that moves ahead of a
    copy would be a view of what was copied. Views become reshapes, as tensors may lie in memory in another order then.

    Args:
        graph: of ``torch.export``; changed in place.
    """
    if depends_on_memory(graph):
        return
    for node in reversed(list(graph.nodes)):
        if (selection := _only_selection(node)) is None:
            continue
        dim, index = selection
        with graph.inserting_before(node):
            moved = _moved(graph, node, dim, index)
        if moved is None:
            continue
        for user in list(node.users):
            user.replace_all_uses_with(moved)
            graph.erase_node(user)
        _erase(graph, node)
    for node in graph.nodes:
        if node.target == aten.view.default:
            node.target = aten.reshape.default


def select_together(graph: fx.Graph) -> None:
    """Take a tensor apart by one ``unbind`` where selections along one dimension take all of it, each part once.

    Not where anything is overwritten: of several views that one operation makes, autograd lets none be.

    Args:
        graph: of ``torch.export``; changed in place.
    """
    if depends_on_memory(graph):
        return
    for node in list(graph.nodes):
        users = list(node.users)
        if len(users) < 2 or (dim := _taken_apart(node)) is None:
            continue
        with graph.inserting_after(node):
            parts = _described(graph.call_function(aten.unbind.int, (node, dim)), node)
        for user in users:
            with graph.inserting_before(user):
                (_, index) = _place(user)
                part = _described(graph.call_function(operator.getitem, (parts, index)), user)
            user.replace_all_uses_with(part)
            graph.erase_node(user)


def depends_on_memory(graph: fx.Graph) -> bool:
    """Whether anything is overwritten, or read from where it lies."""
    schemas = (getattr(node.target, "_schema", None) for node in graph.nodes)
    overwritten = any(schema is not None and schema.is_mutable for schema in schemas)
    return overwritten or any(node.target == aten.as_strided.default for node in graph.nodes)


def overwritten_inputs(graph: fx.Graph) -> Iterator[str]:
    """Names of what goes into a graph and may be overwritten, itself or a view of it."""
    for node in graph.nodes:
        schema = getattr(node.target, "_schema", None)
        if schema is None or not schema.is_mutable:
            continue
        for argument in schema.arguments:
            source = arguments_of(node).get(argument.name) if argument.is_write else None
            while isinstance(source, fx.Node) and source.op != "placeholder":
                source = source.args[0] if source.args else None
            if isinstance(source, fx.Node):
                yield source.name


def _kind(node: Any) -> str:
    """The name of an operation that is known here; empty for others."""
    return _KNOWN.get(node.target, "") if isinstance(node, fx.Node) and node.op == "call_function" else ""


def _taken_apart(node: fx.Node) -> int | None:
    """The dimension that a node's users take it apart along."""
    wanted = _selections(node)
    dims = {dim for dim, _ in wanted}
    if len(dims) != 1:
        return None
    (dim,) = dims
    return dim if len(set(wanted)) == len(wanted) == node.meta["val"].shape[dim] else None


def _only_selection(node: fx.Node) -> tuple[int, int] | None:
    """Dimension and index that all users of a node select."""
    wanted = set(_selections(node))
    return next(iter(wanted)) if len(wanted) == 1 else None


def _selections(node: fx.Node) -> list[tuple[int, int]]:
    """Dimension and index of each of a node's users; empty unless these are all selections with known ones."""
    value = node.meta.get("val")
    if node.op != "call_function" or not isinstance(value, Tensor):
        return []
    if any(user.target != aten.select.int or user.args[0] is not node for user in node.users):
        return []
    known = all(isinstance(user.args[2], int) and isinstance(_size(user), int) for user in node.users)
    return [_place(user) for user in node.users] if known else []


def _place(selection: fx.Node) -> tuple[int, int]:
    """Dimension and index, neither of them counted from the end."""
    source, dim, index = selection.args
    return dim % source.meta["val"].dim(), index % _size(selection)  # type: ignore[union-attr]


def _size(selection: fx.Node) -> Any:
    source, dim, _ = selection.args
    return source.meta["val"].shape[dim]  # type: ignore[union-attr]


def _moved(graph: fx.Graph, node: fx.Node, dim: int, index: int) -> fx.Node | None:
    """The node's operation after the selection; None where it does not move."""
    kind, given, n_dims = _kind(node), arguments_of(node), node.meta["val"].dim()

    def called(operation: Any, *args: Any) -> fx.Node:
        return _described(graph.call_function(operation, args), node)

    def selected(source: fx.Node, of: int = dim) -> fx.Node:
        return called(aten.select.int, source, of, index)

    def again(**changed: fx.Node) -> fx.Node:
        operation: Any = node.target
        arguments = operation._schema.arguments
        values = [changed.get(a.name, given[a.name]) for a in arguments]
        named = {a.name: v for a, v in zip(arguments, values, strict=True) if a.kwarg_only}
        plain = [v for a, v in zip(arguments, values, strict=True) if not a.kwarg_only]
        return _described(graph.call_function(operation, tuple(plain), named), node)

    if kind in _ELEMENTWISE:
        return again(self=selected(given["self"]))
    if kind in _COPIES or (kind == "slice" and _takes_all(node, given)):
        return selected(given["self"])
    if kind == "dropout" and not given["train"]:
        return selected(given["input"])
    if kind == "linear" and dim < n_dims - 1:
        return again(input=selected(given["input"]))
    if kind == "layer_norm" and dim < n_dims - len(given["normalized_shape"]):
        return again(input=selected(given["input"]))
    if kind in _OF_TWO:
        sides = {name: _has_dimension(given[name], node, dim) for name in ("self", "other")}
        if None in sides.values():
            return None
        return again(**{name: selected(given[name]) for name, has in sides.items() if has})
    if kind in ("transpose", "permute"):
        order = _order(kind, given, n_dims)
        source = selected(given["self"], order[dim])
        kept = [d - (d > order[dim]) for d in order if d != order[dim]]
        return source if kept == sorted(kept) else called(aten.permute.default, source, kept)
    if kind == _ATTENTION and dim == n_dims - 2 and _attends_to_all(given, n_dims):
        query = called(aten.slice.Tensor, given["query"], dim, index, index + 1)
        return called(aten.select.int, again(query=query), dim, 0)
    if kind in ("view", "reshape", "flatten", "unflatten"):
        return _reshaped(node, dim, selected, called)
    return None


def _attends_to_all(given: dict[str, Any], n_dims: int) -> bool:
    """Each query alone, whichever it is."""
    plain = given["attn_mask"] is None and not given["is_causal"] and given["dropout_p"] == 0
    return plain and given["query"].meta["val"].dim() == n_dims


def _takes_all(node: fx.Node, given: dict[str, Any]) -> bool:
    return given["step"] == 1 and _same(node.meta["val"].shape, given["self"].meta["val"].shape)


def _has_dimension(operand: Any, node: fx.Node, dim: int) -> bool | None:
    """Whether one of two operands has a dimension of the result; None: it is broadcast along it, or elsewhere."""
    if not isinstance(operand, fx.Node) or not isinstance(operand.meta["val"], Tensor):
        return False
    of_result, its = node.meta["val"].shape, operand.meta["val"].shape
    if len(its) < len(of_result) - dim:
        return False
    return True if _same(its, of_result) else None


def _order(kind: str, given: dict[str, Any], n_dims: int) -> list[int]:
    """For each dimension of the result, the operand's."""
    if kind == "permute":
        return [d % n_dims for d in given["dims"]]
    order = list(range(n_dims))
    first, second = given["dim0"] % n_dims, given["dim1"] % n_dims
    order[first], order[second] = order[second], order[first]
    return order


def _reshaped(node: fx.Node, dim: int, selected: Any, called: Any) -> Any:
    """A change of the dimensions behind the selected one, or what attention ends with.

    That is ``(x.reshape(rows, -1) Wᵀ + b).view(A, B, -1)`` of ``x`` of shape ``(A, B, …)``.
    """
    shape = node.meta["val"].shape
    kept = [size if isinstance(size, int) else -1 for d, size in enumerate(shape) if d != dim]
    source: Any = node.args[0]
    if kept.count(-1) > 1 or 0 in kept:
        return None
    if _same(source.meta["val"].shape[: dim + 1], shape[: dim + 1]):
        return called(aten.reshape.default, selected(source), kept)
    linear, n_outer = source, len(shape) - 1
    if _kind(linear) != "linear" or linear.meta["val"].dim() != 2 or len(linear.users) > 1:
        return None
    its_arguments = arguments_of(linear)
    rows = its_arguments["input"]
    if _kind(rows) not in ("view", "reshape"):
        return None
    source = rows.args[0]
    its = source.meta["val"].shape
    same_rows = len(its) > n_outer > dim and _same(its[:n_outer], shape[:n_outer])
    if not same_rows or not _same(linear.meta["val"].shape[1:], shape[n_outer:]):
        return None
    vectors = [*kept[:-1], rows.meta["val"].shape[1]]
    flat = called(aten.reshape.default, selected(source), vectors)
    return called(aten.linear.default, flat, its_arguments["weight"], its_arguments["bias"])


def _same(shape: Sequence[Any], other: Sequence[Any]) -> bool:
    return len(shape) == len(other) and all(statically_known_true(a == b) for a, b in zip(shape, other, strict=True))


def _described(made: fx.Node, like: fx.Node) -> fx.Node:
    """With the metadata of the node that it stands for, and its own fake result."""
    args, kwargs = map_arg((made.args, made.kwargs), lambda n: n.meta["val"])
    operation: Any = made.target
    made.meta = {**like.meta, "val": operation(*args, **kwargs)}
    return made


def _erase(graph: fx.Graph, node: fx.Node) -> None:
    """A node without users, and of those before it what only it has used."""
    sources = node.all_input_nodes
    graph.erase_node(node)
    for source in sources:
        if not source.users and _kind(source) in ("linear", "view", "reshape"):
            _erase(graph, source)
