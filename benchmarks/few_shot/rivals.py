"""What few-shot learning by optimized inputs is measured against: first-order MAML, prototypes, pixels."""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from equipoise.zoo import FewShotConfig
from equipoise.zoo.few_shot.model import Encoder


class Network(nn.Module):
    """The encoder and two dense layers: as many parameters as the equilibrium learner has, less the head."""

    def __init__(self, config: FewShotConfig) -> None:
        super().__init__()
        self.encoder = Encoder(config)
        self.dense = nn.Sequential(nn.Tanh(), nn.Linear(config.width, config.width), nn.Tanh())
        self.last = nn.Sequential(nn.Linear(config.width, config.width), nn.Tanh())
        self.width = config.width

    def forward(self, images: Tensor) -> Tensor:
        """`(n, C, H, W) -> (n, width)`."""
        out: Tensor = self.last(self.dense(self.encoder(images)))
        return out


@dataclasses.dataclass
class Prototypes:
    """A prototypical network: queries belong to the class whose mean support feature is nearest.

    Source: J. Snell, K. Swersky, R. Zemel, "Prototypical Networks for Few-shot Learning", NeurIPS 2017.
    """

    module: Network

    def logits(self, support: Tensor, labels: Tensor, queries: Tensor, ways: int) -> Tensor:
        """`(B, Q, ways)` of tasks, support `(B, S, C, H, W)`, labels `(B, S)`, queries `(B, Q, C, H, W)`."""
        features = self.module(torch.cat([support, queries], dim=1).flatten(0, 1)).unflatten(0, (len(support), -1))
        chosen = F.one_hot(labels, ways).to(features)
        means = chosen.transpose(1, 2) @ features[:, : support.shape[1]] / chosen.sum(1)[..., None]
        return -(features[:, support.shape[1] :, None] - means[:, None]).square().sum(3)

    def loss(self, support: Tensor, labels: Tensor, queries: Tensor, wanted: Tensor, ways: int) -> Tensor:
        logits = self.logits(support, labels, queries, ways)
        value = F.cross_entropy(logits.flatten(0, 1), wanted.flatten())
        value.backward()
        return value.detach()


@dataclasses.dataclass
class FirstOrderMAML:
    """First-order MAML: each task adapts all parameters, and the gradient there is taken for that here.

    The head starts at zeros for every class, so that one network serves any number of classes in any order.

    Source: C. Finn, P. Abbeel, S. Levine, "Model-Agnostic Meta-Learning", ICML 2017; the head at zeros: H.-J. Ye, W.-L.
    Chao, "How to Train Your MAML to Excel in Few-Shot Classification", ICLR 2022.
    """

    module: Network
    rate: float
    steps: int = 5

    def adapted(self, images: Tensor, labels: Tensor, ways: int) -> tuple[dict[str, Tensor], Tensor]:
        """Parameters and head `(ways, width)` after the steps, detached."""
        weights = {name: value.detach().clone() for name, value in self.module.named_parameters()}
        head = torch.zeros(ways, self.module.width)
        for _ in range(self.steps):
            tracked = [value.requires_grad_() for value in (*weights.values(), head)]
            with torch.enable_grad():
                features = torch.func.functional_call(self.module, weights, images)
                slopes = torch.autograd.grad(F.cross_entropy(features @ head.T, labels), tracked)
            moved = [(value - self.rate * slope).detach() for value, slope in zip(tracked, slopes, strict=True)]
            weights, head = dict(zip(weights, moved, strict=False)), moved[-1]
        return weights, head

    def logits(self, support: Tensor, labels: Tensor, queries: Tensor, ways: int) -> Tensor:
        found = []
        for task in range(len(support)):
            weights, head = self.adapted(support[task], labels[task], ways)
            found.append(torch.func.functional_call(self.module, weights, queries[task]) @ head.T)
        return torch.stack(found)

    def loss(self, support: Tensor, labels: Tensor, queries: Tensor, wanted: Tensor, ways: int) -> Tensor:
        total = torch.zeros(())
        for task in range(len(support)):
            weights, head = self.adapted(support[task], labels[task], ways)
            tracked = [value.requires_grad_() for value in weights.values()]
            features = torch.func.functional_call(self.module, weights, queries[task])
            value = F.cross_entropy(features @ head.T, wanted[task]) / len(support)
            for parameter, slope in zip(self.module.parameters(), torch.autograd.grad(value, tracked), strict=True):
                parameter.grad = slope if parameter.grad is None else parameter.grad + slope
            total += value.detach()
        return total


@dataclasses.dataclass
class Pixels:
    """The nearest support image, pixel by pixel, says the class."""

    def logits(self, support: Tensor, labels: Tensor, queries: Tensor, ways: int) -> Tensor:
        nearest = torch.cdist(queries.flatten(2), support.flatten(2)).argmin(2)
        return F.one_hot(labels.gather(1, nearest), ways).float()
