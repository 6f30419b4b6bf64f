"""Rivals of few-shot learning by optimized inputs: first-order MAML, prototypes, pixels."""

import dataclasses
from typing import Any

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
class Learner:
    """A few-shot learner; its default loss is the cross-entropy of its logits."""

    module: Any

    def logits(self, support: Tensor, labels: Tensor, queries: Tensor, ways: int) -> Tensor:
        """`(B, Q, ways)` of tasks, support `(B, S, C, H, W)`, labels `(B, S)`, queries `(B, Q, C, H, W)`."""
        raise NotImplementedError

    def loss(self, support: Tensor, labels: Tensor, queries: Tensor, wanted: Tensor, ways: int) -> Tensor:
        """Scalar whose gradient is the training step's."""
        return F.cross_entropy(self.logits(support, labels, queries, ways).flatten(0, 1), wanted.flatten())


@dataclasses.dataclass
class Prototypes(Learner):
    """A prototypical network: queries belong to the class whose mean support feature is nearest.

    Source: J. Snell, K. Swersky, R. Zemel, "Prototypical Networks for Few-shot Learning", NeurIPS 2017.
    """

    def logits(self, support: Tensor, labels: Tensor, queries: Tensor, ways: int) -> Tensor:
        features = self.module(torch.cat([support, queries], dim=1).flatten(0, 1)).unflatten(0, (len(support), -1))
        chosen = F.one_hot(labels, ways).to(features)
        means = chosen.transpose(1, 2) @ features[:, : support.shape[1]] / chosen.sum(1)[..., None]
        return -(features[:, support.shape[1] :, None] - means[:, None]).square().sum(3)


@dataclasses.dataclass
class FirstOrderMAML(Learner):
    """First-order MAML: each task adapts all parameters, and the gradient at the adapted ones is the step's.

    The head starts at zeros for every class, so that one network serves any number of classes in any order.

    Source: C. Finn, P. Abbeel, S. Levine, "Model-Agnostic Meta-Learning", ICML 2017; the head at zeros: H.-J. Ye, W.-L.
    Chao, "How to Train Your MAML to Excel in Few-Shot Classification", ICLR 2022.
    """

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
        slopes = [torch.zeros_like(parameter) for parameter in self.module.parameters()]
        for task in range(len(support)):
            weights, head = self.adapted(support[task], labels[task], ways)
            tracked = [value.requires_grad_() for value in weights.values()]
            features = torch.func.functional_call(self.module, weights, queries[task])
            value = F.cross_entropy(features @ head.T, wanted[task]) / len(support)
            slopes = [old + new for old, new in zip(slopes, torch.autograd.grad(value, tracked), strict=True)]
        # Linear in the parameters, with these slopes.
        return torch.stack([(p * s).sum() for p, s in zip(self.module.parameters(), slopes, strict=True)]).sum()


@dataclasses.dataclass
class Pixels(Learner):
    """The class of the nearest support image, pixel by pixel."""

    module: None = None

    def logits(self, support: Tensor, labels: Tensor, queries: Tensor, ways: int) -> Tensor:
        nearest = torch.cdist(queries.flatten(2), support.flatten(2)).argmin(2)
        return F.one_hot(labels.gather(1, nearest), ways).float()
