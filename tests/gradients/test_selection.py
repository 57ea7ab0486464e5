"""Selections moved in an exported graph, against the graph as it was, in float64."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torchvision.models.vision_transformer import VisionTransformer

from gitlight.exported import kind_of
from gitlight.gradients.selection import select_early, select_together

WIDTH, POSITIONS = 6, 5


class Selecting(nn.Module):
    """Some operation on positions ``(S, 5, 6)`` with parameters, what is taken from it, and a linear layer."""

    def __init__(self, operation, take=lambda x: x[:, 0]):
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.scale, self.place = nn.Parameter(torch.randn(WIDTH)), nn.Parameter(torch.randn(POSITIONS, WIDTH))
        self.head = nn.Linear(WIDTH, 3)
        self.operation, self.take = operation, take

    def forward(self, x):
        return self.head(self.take(self.operation(self, self.first(x))))


def attention(m, x, **how):
    heads = [side.unflatten(2, (2, 3)).transpose(1, 2) for side in (x, m.second(x), m.norm(x))]
    return F.scaled_dot_product_attention(*heads, **how).transpose(1, 2).flatten(2)


def through_rows(m, x):
    turned = attention(m, x).transpose(0, 1).unflatten(2, (2, 3))
    rows = turned.reshape(turned.shape[0] * turned.shape[1], WIDTH)
    return m.second(rows).view(turned.shape[0], turned.shape[1], WIDTH).transpose(0, 1)


MOVED = {
    "activation": (lambda m, x: F.gelu(x), "gelu"),
    "activation with a setting": (lambda m, x: F.leaky_relu(x, 0.3), "leaky_relu"),
    "linear": (lambda m, x: m.second(x), "linear"),
    "norm": (lambda m, x: m.norm(x), "layer_norm"),
    "residual": (lambda m, x: x + m.second(F.gelu(x)), "gelu"),
    "difference with a factor": (lambda m, x: torch.sub(x, m.second(x), alpha=0.7), "sub"),
    "scale": (lambda m, x: m.scale * x, "mul"),
    "dropout": (lambda m, x: F.dropout(F.gelu(x), 0.5, training=False), "gelu"),
    "permuted": (lambda m, x: F.gelu(x).permute(2, 1, 0).permute(2, 1, 0), "gelu"),
    "attention": (attention, "scaled_dot_product_attention"),
    "attention's end": (through_rows, "linear"),
}
STAYED = {
    "over positions": (lambda m, x: F.softmax(x, 1), "softmax"),
    "a parameter for each position": (lambda m, x: x + m.place, "add"),
    "the norm of positions, too": (lambda m, x: F.layer_norm(x, (POSITIONS, WIDTH)), "layer_norm"),
    "causal attention": (lambda m, x: attention(m, x, is_causal=True), "scaled_dot_product_attention"),
    "masked attention": (
        lambda m, x: attention(m, x, attn_mask=x.new_zeros(POSITIONS, POSITIONS)),
        "scaled_dot_product_attention",
    ),
    "another use": (lambda m, x: F.gelu(x) + F.gelu(x).flip(1), "gelu"),
    "overwritten": (lambda m, x: F.gelu(x).clone().mul_(2), "gelu"),
}
TAKES = {
    "first": lambda x: x[:, 0],
    "last": lambda x: x[:, -1],
    "twice the same": lambda x: torch.maximum(x[:, 1], x[:, 1 - POSITIONS].neg()),
}


def exported(model):
    images = torch.randn(7, POSITIONS, WIDTH, dtype=torch.float64)
    shapes = ({0: torch.export.Dim("batch")},)
    return torch.export.export(model, (images,), dynamic_shapes=shapes, strict=False)


def results(run, model):
    """Outputs and every parameter's gradient, for another number of examples than was traced."""
    torch.manual_seed(1)
    x = torch.randn(4, POSITIONS, WIDTH, dtype=torch.float64, requires_grad=True)
    made = run(x)
    wanted = [x, *model.parameters()]
    found = torch.autograd.grad((made * torch.randn_like(made)).sum(), wanted, allow_unused=True)
    return [made, *(torch.zeros_like(w) if f is None else f for f, w in zip(found, wanted, strict=True))]


def kept(before, after):
    for wanted, found in zip(before, after, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


def dims_of(program, kind):
    """Dimensions of the last such operation's result but a linear layer's that ends the model."""
    nodes = [node for node in program.graph.nodes if kind_of(node) == kind]
    return nodes[-2 if kind == "linear" else -1].meta["val"].shape


def rewritten(program, *passes):
    for one in passes:
        one(program.graph)
    program.graph.lint()
    program.graph_module.recompile()
    return program.module()


@pytest.mark.parametrize("take", TAKES)
@pytest.mark.parametrize("case", [*MOVED, *STAYED])
def test_results_are_kept_and_selections_move_where_they_may(case, take):
    operation, kind = (MOVED | STAYED)[case]
    torch.manual_seed(0)
    model = Selecting(operation, TAKES[take]).double().eval()
    program = exported(model)
    before, shape = results(model, model), dims_of(program, kind)
    run = rewritten(program, select_early, select_together)
    kept(before, results(run, model))
    moved = POSITIONS not in dims_of(program, kind)
    assert POSITIONS in shape or case == "attention's end"
    assert moved == (case in MOVED)


def test_different_selections_of_one_tensor_stay():
    model = Selecting(lambda m, x: F.gelu(x), lambda x: x[:, 0] + x[:, 1]).double()
    program = exported(model)
    before = results(model, model)
    kept(before, results(rewritten(program, select_early, select_together), model))
    assert POSITIONS in dims_of(program, "gelu")


def test_the_last_block_of_a_vision_transformer_sees_the_class_token_alone():
    torch.manual_seed(0)
    sizes = {"num_layers": 2, "num_heads": 2, "hidden_dim": 8, "mlp_dim": 12, "num_classes": 3}
    model = VisionTransformer(image_size=8, patch_size=4, **sizes).double().eval()
    nn.init.normal_(model.heads.head.weight)  # it begins at zero, and no gradient would come through
    images = torch.rand(4, 3, 8, 8, dtype=torch.float64)
    shapes = ({0: torch.export.Dim("batch")},)
    program = torch.export.export(model, (images,), dynamic_shapes=shapes, strict=False)
    wanted = [model(images), *torch.autograd.grad(model(images).square().sum(), list(model.parameters()))]
    run = rewritten(program, select_early, select_together)
    made = run(images)
    kept(wanted, [made, *torch.autograd.grad(made.square().sum(), list(model.parameters()))])
    rows = [node.meta["val"].shape[:-1] for node in program.graph.nodes if kind_of(node) == "linear"]
    # Of the second block, queries, keys and values alone are of all five tokens.
    assert [len(shape) for shape in rows[4:]] == [2, 1, 1, 1, 1]
    assert sum(kind_of(node) == "unbind" for node in program.graph.nodes) == 2


TAKEN_APART = {
    "each part once": (lambda x: x[:, 0] * x[:, 1].sin() + x[:, -1] - x[:, 2] / (2 + x[:, 3] ** 2), 1),
    "a part left out": (lambda x: x[:, 0] * x[:, 1].sin() + x[:, -1] - x[:, 2], 0),
    "a part twice": (lambda x: x[:, 0] * x[:, 1].sin() + x[:, -1] - x[:, 2] / (2 + x[:, 3]) ** 2 + x[:, -2], 0),
    "along two dimensions": (lambda x: x[:, 0] + x[:, 1] * x[:, :, 0].sum(1, keepdim=True) + x[:, 2], 0),
    "overwritten": (lambda x: x[:, 0].mul_(2) + x[:, 1] * x[:, 2].sin() + x[:, 3] * x[:, 4], 0),
}


@pytest.mark.parametrize("case", TAKEN_APART)
def test_a_tensor_is_taken_apart_by_one_operation(case):
    take, n_unbound = TAKEN_APART[case]
    torch.manual_seed(0)
    model = Selecting(lambda m, x: m.second(x), take).double()
    program = exported(model)
    before = results(model, model)
    kept(before, results(rewritten(program, select_early, select_together), model))
    assert sum(kind_of(node) == "unbind" for node in program.graph.nodes) == n_unbound
