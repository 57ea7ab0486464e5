"""The layers of an `Architecture`, from an exported graph."""

from collections import Counter
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from torch import Tensor, fx, nn

from gitlight.exported import arguments_of, held_tensors, kind_of, lifted_constants, module_path
from gitlight.layer import IMAGE, MOVES, Layer


def layers_of(exported: Any, leaked: frozenset[str], model: nn.Module) -> tuple[tuple[Layer, ...], str]:
    """The exported graph's tensor operations as layers, and the name of the one that is put out."""
    held = held_tensors(exported, model) | lifted_constants(exported)
    nodes = [node for node in exported.graph.nodes if node.op == "call_function" and _makes_tensors(node)]
    owners = Counter(module_path(node) for node in nodes)
    names = {node: node.name for node in exported.graph.nodes if node.name in exported.graph_signature.user_inputs}
    names = dict.fromkeys(names, IMAGE)
    layers = []
    for node in nodes:
        path = module_path(node)
        alone = path and owners[path] == 1
        names[node] = path if alone else ".".join(part for part in (path, node.name) if part)
        layers.append(_layer(node, names, held, leaked))
    (result,) = (node for node in exported.graph.nodes if node.op == "output")
    output = names[result.args[0][0]]
    return tuple(layers), output


def puts_out_logits(exported: Any, n_classes: int) -> bool:
    """Whether the exported model maps one image to ``(1, n_classes)``; a ``squeeze`` drops the first of these."""
    (result,) = (node for node in exported.graph.nodes if node.op == "output")
    return tuple(result.args[0][0].meta["val"].shape) == (1, n_classes)


def up_to_the_logits(layers: tuple[Layer, ...], output: str, n_classes: int) -> tuple[tuple[Layer, ...], str]:
    """Leaves out what behind the logits makes no difference: log-softmax, which cross-entropy has itself, and moves.

    The linear layer that puts out the logits is then the last, which closed forms start from.
    """
    by_name = {layer.name: layer for layer in layers}
    uses = Counter(name for layer in layers for name in layer.inputs)
    behind: list[str] = []
    left_out = 0
    last = output
    while _makes_no_difference(by_name[last], n_classes):
        behind.append(last)
        (last,) = by_name[last].inputs
        if last == IMAGE or uses[last] > 1:
            break
        if by_name[last].output_shape == (n_classes,):
            output, left_out = last, len(behind)
    return tuple(layer for layer in layers if layer.name not in behind[:left_out]), output


def _makes_no_difference(layer: Layer, n_classes: int) -> bool:
    if len(layer.inputs) != 1 or layer.parameters or layer.constants:
        return False
    if layer.kind == "log_softmax":
        return layer.input_shape == (n_classes,) and layer.arguments["dim"] in (1, -1)
    if layer.arguments.get("train"):  # dropout that no mode switches off
        return False
    # As many entries in and out, along one dimension: their order cannot change.
    along = [[size for size in shape if size > 1] for shape in (layer.input_shape, layer.output_shape)]
    moves = layer.kind in MOVES and layer.kind != "detach"
    return moves and along[0] == along[1] == [size for size in (n_classes,) if size > 1]


def _layer(node: fx.Node, names: Mapping[fx.Node, str], held: Mapping[str, str], leaked: frozenset[str]) -> Layer:
    operation: Any = node.target
    inputs: list[fx.Node] = []
    roles: list[str] = []
    parameters: dict[str, str] = {}
    constants: dict[str, str] = {}
    arguments: dict[str, Any] = {}
    weight_shape: tuple[int, ...] = ()
    for role, value in arguments_of(node).items():
        values = value if isinstance(value, list | tuple) else [value]
        for one in values:
            if not isinstance(one, fx.Node):
                continue
            if one in names:
                inputs.append(one)
                roles.append(role)
            else:
                own = held.get(one.name, one.name)
                (parameters if own in leaked else constants)[role] = own
                if role == "weight":
                    weight_shape = tuple(one.meta["val"].shape)
        cleaned = [None if isinstance(one, fx.Node) else one for one in values]
        arguments[role] = cleaned if isinstance(value, list | tuple) else cleaned[0]
    return Layer(
        name=names[node],
        kind=kind_of(node).removesuffix("_") or "getitem",
        operation=operation,
        arguments=MappingProxyType(arguments),
        inputs=tuple(names[one] for one in inputs),
        roles=tuple(roles),
        parameters=MappingProxyType(parameters),
        constants=MappingProxyType(constants),
        weight_shape=weight_shape,
        input_shapes=tuple(_shape(one) for one in inputs),
        batch_first=tuple(isinstance(v := one.meta["val"], Tensor) and v.shape[:1] == (1,) for one in inputs),
        output_shape=_shape(node),
    )


def _makes_tensors(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) or (isinstance(value, list | tuple) and any(isinstance(v, Tensor) for v in value))


def _shape(node: fx.Node) -> tuple[int, ...]:
    value = node.meta["val"]
    if not isinstance(value, Tensor):
        return ()
    # Traced with a batch of one image. Attention moves the batch dimension to the second place; all is shape then.
    return tuple(int(size) for size in (value.shape[1:] if value.shape[:1] == (1,) else value.shape))
