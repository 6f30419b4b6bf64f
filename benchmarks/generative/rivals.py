"""Rivals of the generative benchmark: a variational autoencoder, and Adam on latents; distances on features."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import scipy.linalg
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import equipoise as eq
from benchmarks import harness
from equipoise.data import Split
from equipoise.zoo import DecoderConfig, LatentDecoder

WARM = 0.1  # share of the training over which the weight of the divergence rises


class VAE(nn.Module):
    """Variational autoencoder: the decoder of the comparison behind a dense encoder, so with more weights in all.

    Args:
        config: of the decoder.
        kl: weight of the divergence.
    """

    def __init__(self, config: DecoderConfig, *, kl: float = 1.0) -> None:
        super().__init__()
        pixels = config.image_channels * config.image_size**2
        self.kl, self.pixels = kl, pixels
        self.encoder = nn.Sequential(
            nn.Flatten(),
            nn.Linear(pixels, config.width),
            nn.SiLU(),
            nn.Linear(config.width, config.width),
            nn.SiLU(),
            nn.Linear(config.width, 2 * config.latent_size),
        )
        solver = eq.Anderson(max_steps=12, rtol=1e-3)
        self.decoder = LatentDecoder(config, solver=solver, gradient=eq.Implicit(solver=solver))

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log of the standard deviation of the latents."""
        mean, log_std = self.encoder(images).chunk(2, dim=1)
        return mean, log_std

    def forward(self, images: Tensor) -> Tensor:
        reconstructed: Tensor = self.decoder(self.encode(images)[0])
        return reconstructed

    def loss(self, images: Tensor, progress: float) -> Tensor:
        """Squared error of a pixel in [-1, 1], and the divergence for each pixel, as the authors of JIIO have it."""
        mean, log_std = self.encode(images)
        x = mean + log_std.exp() * torch.randn_like(mean) if self.kl else mean
        error = 4 * (self.decoder(x) - images).square().mean()
        divergence = 0.5 * (mean.square() + (2 * log_std).exp() - 2 * log_std - 1).sum(1).mean()
        return error + self.kl * min(1.0, progress / WARM) * divergence / self.pixels


def images_of(split: Split, size: int, seed: int) -> Iterator[Tensor]:
    """Batches of training images in [0, 1], without end."""
    return (images.float() / 255 for *_, (images, _) in harness.endless(split, size, seed))


def train_vae(config: DecoderConfig, split: Split, *, seed: int, seconds: float, lr: float, kl: float) -> VAE:
    """VAE after a training of so many seconds."""
    torch.manual_seed(seed)
    model, start = VAE(config, kl=kl), harness.clock()

    def progress() -> float:
        return min(1.0, (harness.clock() - start) / seconds)

    batches = itertools.takewhile(lambda _: progress() < 1, images_of(split, 64, seed))
    losses = (model.loss(images, progress()) for images in batches)
    harness.descend(torch.optim.Adam(model.parameters()), losses, lambda _: lr * 0.5 * (1 + np.cos(np.pi * progress())))
    return model.eval()


def adam(
    model: Any,
    x: Tensor,
    inputs: Sequence[Tensor],
    cost: Callable[[Any, Tensor], Tensor],
    *,
    rate: float,
    solver: eq.Solver,
    steps: int = 50,
) -> tuple[Tensor, int, int]:
    """Latents after steps of Adam, each with a solve from zeros and a full adjoint solve; evaluations and products."""
    x = x.requires_grad_()
    optimizer, evals, vjps = torch.optim.Adam([x], lr=rate), 0, 0
    with model.deq.using(solver=solver, gradient=eq.Implicit(solver=solver)):
        for _ in range(steps):
            solution = model.deq.solve(x, *inputs)
            (x.grad,) = torch.autograd.grad(cost(solution.value, x).sum(), x)
            optimizer.step()
            evals, vjps = evals + solution.map.counts.evals, vjps + solution.map.counts.vjps
    return x.detach(), evals, vjps


class Features(nn.Module):
    """Classifier of small images; distances are measured on its last hidden layer."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *(
                nn.Conv2d(1, 16, 5, stride=2, padding=2),
                nn.ReLU(),
                nn.Conv2d(16, 32, 3, stride=2, padding=1),
                nn.ReLU(),
            ),
            *(nn.Flatten(), nn.LazyLinear(64), nn.ReLU()),
        )
        self.last = nn.Linear(64, 10)

    def forward(self, images: Tensor) -> Tensor:
        found: Tensor = self.body(images)
        return found


def train_features(split: Split, steps: int) -> Features:
    """Classifier after a training by steps of 128 images."""
    torch.manual_seed(0)
    model = Features()
    model(torch.zeros(1, 1, *next(split.batches(1))[0].shape[2:]))
    batches = (batch for *_, batch in itertools.islice(harness.endless(split, 128, 0), steps))
    losses = (F.cross_entropy(model.last(model(images.float() / 255)), labels) for images, labels in batches)
    harness.descend(torch.optim.Adam(model.parameters(), lr=2e-3), losses)
    return model.eval().requires_grad_(False)


def frechet(features: Features, images: Tensor, others: Tensor) -> float:
    r"""$|m - m'|^2 + \operatorname{tr}(C + C' - 2 (C C')^{1/2})$ of the features of two sets of images."""
    a, b = (features(t).double().numpy() for t in (images, others))
    root = scipy.linalg.sqrtm(np.cov(a.T) @ np.cov(b.T)).real
    return float(np.square(a.mean(0) - b.mean(0)).sum() + np.trace(np.cov(a.T) + np.cov(b.T) - 2 * root))
