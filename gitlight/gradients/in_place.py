"""Operations in an exported graph that overwrite what they are given, where nobody sees that they do."""

from collections.abc import Set
from typing import Any

import torch
from torch import fx

from gitlight.exported import kind_of


def out_of_place(graph: fx.Graph, images: Set[str], parameters: Set[str]) -> None:
    """Have ``x += w`` of a parameter ``w`` make a result of its own, as ``x = x + w`` does.

    Rules are given what an operation was given, which must still be there on the way back. Only where nothing else
    reads what is overwritten, by itself or as a view: results are then the same. Others stay as they are.

    Args:
        graph: of ``torch.export``; changed in place.
        images: names of the nodes of images.
        parameters: those of leaked parameters; what is computed from these alone is taken for one.
    """
    of_images, of_parameters = set(images), set(parameters)
    for node in graph.nodes:
        sources = {source.name for source in node.all_input_nodes}
        if not sources & of_images:
            of_parameters |= {node.name} if sources & of_parameters else set()
            continue
        of_images.add(node.name)
        if sources & of_parameters and _overwrites_its_first(node) and _is_seen_by_none_but_its_user(node.args[0]):
            schema = node.target._schema
            plain = getattr(torch.ops.aten, kind_of(node).removesuffix("_"), None)
            if plain is not None and (schema.overload_name or "default") in plain.overloads():
                node.target = getattr(plain, schema.overload_name or "default")


def _overwrites_its_first(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    if schema is None or not kind_of(node).endswith("_"):
        return False
    return [argument.is_write for argument in schema.arguments].index(True) == 0 if schema.is_mutable else False


def _is_seen_by_none_but_its_user(node: Any) -> bool:
    """Whether one operation alone takes a tensor, and none a tensor that it may be a view of."""
    while isinstance(node, fx.Node) and len(node.users) == 1:
        schema = getattr(node.target, "_schema", None)
        if schema is None:
            return False
        # Dropout that is off gives back what it is given, and does not say so.
        if all(result.alias_info is None for result in schema.returns) and "dropout" not in kind_of(node):
            return True
        node = node.args[0]
    return False
