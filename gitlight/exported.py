"""What is read off a graph of torch.export, and off a model that one is made of."""

from typing import Any

from torch import fx, nn


def without_hooks(model: nn.Module) -> nn.Module:
    """The model itself; what its user registered to watch it run is not to see the tracing."""
    for module in model.modules():
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
        module._backward_hooks.clear()
        module._backward_pre_hooks.clear()
    return model


def lifted_constants(exported: Any) -> dict[str, str]:
    """Nodes of tensors that are neither parameters nor buffers → their names in the program."""
    return dict(getattr(exported.graph_signature, "inputs_to_lifted_tensor_constants", {}))


def held_tensors(exported: Any, model: nn.Module) -> dict[str, str]:
    """Nodes of the model's parameters and buffers → their names.

    Of a parameter that modules share it is the one that `named_parameters` gives.
    """
    signature = exported.graph_signature
    held = dict(signature.inputs_to_parameters) | dict(signature.inputs_to_buffers)
    first: dict[int, str] = {}
    names = {name: first.setdefault(id(p), name) for name, p in model.named_parameters(remove_duplicate=False)}
    return {str(node): names.get(name, str(name)) for node, name in held.items()}


def kind_of(node: fx.Node) -> str:
    """The operation's name, as ``conv2d``, or ``library::conv2d`` where it is not ATen's.

    Empty for Python's own, such as picking one of several results.
    """
    schema = getattr(node.target, "_schema", None)
    return schema.name.removeprefix("aten::") if schema is not None else ""


def arguments_of(node: fx.Node) -> dict[str, Any]:
    """A node's arguments by name, defaults filled in; by position, where its operation has no names for them."""
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return {str(position): value for position, value in enumerate(node.args)}
    found: dict[str, Any] = {}
    for position, argument in enumerate(schema.arguments):
        if position < len(node.args):
            found[argument.name] = node.args[position]
        else:
            found[argument.name] = node.kwargs.get(argument.name, argument.default_value)
    return found


def module_path(node: fx.Node) -> str:
    """Of the innermost module that a node was traced in; empty for the model itself."""
    stack = list(node.meta.get("nn_module_stack", {}).values())
    return str(stack[-1][0]) if stack else ""
