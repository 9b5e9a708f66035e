"""The model, batches and loop of the tests of ``InMerge(lasting=False)``."""

import torch
from torch import nn

from inmerge_fast import merged

SEED = 3


def make(seed=0, norm=True):
    torch.manual_seed(seed)
    layers = [nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8) if norm else nn.Identity(), nn.ReLU()]
    return nn.Sequential(*layers, nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(8 * 36, 4))


def batch(index):
    generator = torch.Generator().manual_seed(100 + index)
    return torch.randn(4, 3, 8, 8, generator=generator), torch.randint(0, 4, (4,), generator=generator)


def loss_of(model, index):
    x, y = batch(index)
    return nn.functional.cross_entropy(model(x), y)


def weights_of(model):
    return [parameter.detach().clone() for parameter in model.parameters()]


def by_hand(steps, *, micro=1, norm=True, make_optimizer=lambda p: torch.optim.SGD(p, 0.1, momentum=0.9)):
    """What training with ``merged`` around the passes of each step gives."""
    model = make(norm=norm)
    optimizer = make_optimizer(model.parameters())
    for step in range(steps):
        with merged(model, seed=SEED, step=step):
            for index in range(micro):
                loss_of(model, step * micro + index).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def assert_same(model, other):
    for (name, own), expected in zip(model.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(own, expected), name
