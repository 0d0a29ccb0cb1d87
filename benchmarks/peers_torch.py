"""Training steps in plain PyTorch, timed when they are asked for: see peers.py.

Runs in an environment with PyTorch and without this project. Reads lines of JSON from
stdin, `{"variant": NAME, "steps": N}`, and answers each with one on stdout, the seconds
of a step. The first line says its version, its threads, and the parameters of each
variant.

Layers are what a reader of the papers would write: factors of full rank, of which a
layer uses the first columns; balanced, from the dense layer that is drawn. A
convolution is one with as many filters as its rank, then one of 1x1.
"""

import json
import random
import sys
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CLASSES = 10
LASSO = 1e-4
VOCABULARY = 65


class FactoredLinear(nn.Module):
    """`x u v + bias` at the first `rank` columns; from a dense layer, balanced."""

    def __init__(self, dense: nn.Linear):
        super().__init__()
        p, s, q = torch.linalg.svd(dense.weight.data.T, full_matrices=False)
        self.u = nn.Parameter(p * s.sqrt())
        self.v = nn.Parameter(s.sqrt()[:, None] * q)
        self.bias = dense.bias
        self.full_rank = self.rank = len(s)

    def forward(self, x: Tensor) -> Tensor:
        x = x @ self.u[:, : self.rank] @ self.v[: self.rank]
        return x if self.bias is None else x + self.bias

    def squares(self) -> tuple[Tensor, Tensor]:
        """The squared norms of the columns of both factors."""
        return self.u.square().sum(0), self.v.square().sum(1)


class FactoredConv(nn.Module):
    """A convolution with `rank` filters, then 1x1; from a dense one, balanced."""

    def __init__(self, dense: nn.Conv2d):
        super().__init__()
        weight = dense.weight.data
        p, s, q = torch.linalg.svd(weight.flatten(1), full_matrices=False)
        self.u = nn.Parameter((s.sqrt()[:, None] * q).reshape(-1, *weight.shape[1:]))
        self.v = nn.Parameter((p * s.sqrt())[:, :, None, None])
        self.bias = dense.bias
        self.stride, self.padding = dense.stride, dense.padding
        self.full_rank = self.rank = len(s)

    def forward(self, x: Tensor) -> Tensor:
        u, v = self.u[: self.rank], self.v[:, : self.rank]
        x = F.conv2d(x, u, stride=self.stride, padding=self.padding)
        return F.conv2d(x, v, self.bias)

    def squares(self) -> tuple[Tensor, Tensor]:
        """The squared norms of the columns of both factors."""
        return self.u.square().sum((1, 2, 3)), self.v.square().sum((0, 2, 3))


Factored = FactoredLinear | FactoredConv


def factorize(module: nn.Module) -> None:
    """Replaces every linear layer and convolution by its factored form, in place."""
    for name, child in module.named_children():
        if isinstance(child, nn.Linear):
            setattr(module, name, FactoredLinear(child))
        elif isinstance(child, nn.Conv2d):
            setattr(module, name, FactoredConv(child))
        else:
            factorize(child)


def lasso(layers: list[Factored]) -> Tensor:
    """Maestro's penalty: of both factors the norms of all their tails, added up."""
    total = torch.zeros(())
    for layer in layers:
        for squares in layer.squares():
            tails = squares.flip(0).cumsum(0)
            total = total + tails.clamp_min(1e-12).sqrt().sum()
    return LASSO * total


class LeNet(nn.Module):
    """As train/models/lenet.py."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 6, 5), nn.Conv2d(6, 16, 5)
        self.fc1, self.fc2 = nn.Linear(256, 120), nn.Linear(120, 84)
        self.fc3 = nn.Linear(84, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(F.max_pool2d(self.conv1(x), 2))
        x = F.relu(F.max_pool2d(self.conv2(x), 2)).flatten(1)
        return self.fc3(F.relu(self.fc2(F.relu(self.fc1(x)))))


class Block(nn.Module):
    """As `BasicBlock` of train/models/resnet.py."""

    def __init__(self, i: int, o: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(i, o, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(o, o, 3, 1, 1, bias=False)
        self.norm1, self.norm2 = nn.BatchNorm2d(o), nn.BatchNorm2d(o)
        changes = stride != 1 or i != o
        self.shortcut = nn.Conv2d(i, o, 1, stride, bias=False) if changes else None
        self.shortcut_norm = nn.BatchNorm2d(o) if changes else None

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.conv1(x)))
        y = self.norm2(self.conv2(y))
        if self.shortcut is not None:
            x = self.shortcut_norm(self.shortcut(x))
        return F.relu(x + y)


class ResNet18(nn.Module):
    """As train/models/resnet.py at depth 18 with the 3x3 stem."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
        self.stem_norm = nn.BatchNorm2d(64)
        sizes = [(64, 64, 1), (64, 128, 2), (128, 256, 2), (256, 512, 2)]
        pairs = [(Block(i, o, s), Block(o, o, 1)) for i, o, s in sizes]
        self.blocks = nn.Sequential(*(block for pair in pairs for block in pair))
        self.head = nn.Linear(512, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(F.relu(self.stem_norm(self.stem(x))))
        return self.head(x.mean((2, 3)))


class TransformerBlock(nn.Module):
    """As `Block` of train/models/transformer.py, without biases."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.LayerNorm(width, bias=False)
        self.mlp_norm = nn.LayerNorm(width, bias=False)
        for name in ("query", "key", "value", "out"):
            setattr(self, name, nn.Linear(width, width, bias=False))
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.attention_norm(x)
        q, k, v = (
            layer(y).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.mlp_norm(x)), approximate="tanh"))


class Transformer(nn.Module):
    """As train/models/transformer.py, tied, with learned positions."""

    def __init__(self, depth: int, width: int, heads: int, context: int):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.positions = nn.Parameter(0.02 * torch.randn(context, width))
        blocks = (TransformerBlock(width, heads) for _ in range(depth))
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.LayerNorm(width, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.norm(self.blocks(self.embedding(tokens) + self.positions))
        return x @ self.embedding.weight.T


def images(size: int, channels: int, side: int) -> tuple[Tensor, Tensor]:
    """A random batch of images and their classes."""
    return torch.randn(size, channels, side, side), torch.randint(CLASSES, (size,))


def texts(size: int, context: int) -> tuple[Tensor, Tensor]:
    """A random batch of tokens and those that follow."""
    tokens = torch.randint(VOCABULARY, (size, context + 1))
    return tokens[:, :-1], tokens[:, 1:]


SUBJECTS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], tuple]]] = {
    "lenet": (LeNet, lambda size: images(size, 1, 28)),
    "resnet18": (ResNet18, lambda size: images(size, 3, 32)),
    "shakespeare:cpu": (lambda: Transformer(4, 128, 4, 64), lambda n: texts(n, 64)),
    "transformer": (lambda: Transformer(6, 384, 6, 256), lambda n: texts(n, 256)),
}
VARIANTS = ("dense", "full", "maestro", "maestro, lasso")


class Steps:
    """The training steps of a variant, with SGD and momentum."""

    def __init__(self, subject: str, variant: str, size: int):
        build, batch = SUBJECTS[subject]
        self.model, (self.inputs, self.targets) = build(), batch(size)
        if variant != "dense":
            factorize(self.model)
        kinds = (FactoredLinear, FactoredConv)
        self.layers = [m for m in self.model.modules() if isinstance(m, kinds)]
        self.samples, self.penalized = "maestro" in variant, "lasso" in variant
        parameters = self.model.parameters()
        self.optimizer = torch.optim.SGD(parameters, lr=0.01, momentum=0.9)

    def step(self) -> None:
        """One layer at a random rank, the others whole."""
        if self.samples:
            weights = [layer.full_rank for layer in self.layers]
            (layer,) = random.choices(self.layers, weights)
            layer.rank = random.randint(1, layer.full_rank)
        logits = self.model(self.inputs)
        loss = F.cross_entropy(logits.flatten(0, -2), self.targets.flatten())
        if self.penalized:
            loss = loss + lasso(self.layers)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        if self.samples:
            layer.rank = layer.full_rank

    def seconds(self, count: int) -> float:
        """The time of one of so many steps."""
        began = time.perf_counter()
        for _ in range(count):
            self.step()
        return (time.perf_counter() - began) / count


def main(subject: str, size: int) -> None:
    """Serves the steps of all variants."""
    torch.manual_seed(0)
    steps = {variant: Steps(subject, variant, size) for variant in VARIANTS}
    for each in steps.values():
        each.seconds(2)
    parameters = {
        name: sum(p.numel() for p in each.model.parameters())
        for name, each in steps.items()
    }
    about = {"torch": torch.__version__, "threads": torch.get_num_threads()}
    print(json.dumps({**about, "parameters": parameters}), flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        print(steps[asked["variant"]].seconds(asked["steps"]), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
