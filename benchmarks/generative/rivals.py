"""Rival of the generative benchmark: a variational autoencoder; and distances on the features of a classifier."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator

import numpy as np
import scipy.linalg
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import equipoise as eq
from equipoise.data import Split
from equipoise.zoo import DecoderConfig, LatentDecoder

WARM = 0.1  # share of the training over which the weight of the divergence rises


class VAE(nn.Module):
    """The decoder of the comparison behind a dense encoder, so with more weights in all.

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


def batches(split: Split, size: int, seed: int) -> Iterator[Tensor]:
    """Training images in [0, 1], without end."""
    for epoch in itertools.count():
        for images, _ in split.batches(size, shuffle=(seed, epoch)):
            yield images.float() / 255


def train_vae(config: DecoderConfig, split: Split, *, seed: int, seconds: float, lr: float, kl: float) -> VAE:
    """A VAE that was trained for so many seconds of this process."""
    torch.manual_seed(seed)
    model = VAE(config, kl=kl)
    optimizer, start = torch.optim.Adam(model.parameters()), time.process_time()
    for images in batches(split, 64, seed):
        progress = (time.process_time() - start) / seconds
        if progress >= 1:
            return model.eval()
        for group in optimizer.param_groups:
            group["lr"] = lr * 0.5 * (1 + np.cos(np.pi * progress))
        optimizer.zero_grad()
        model.loss(images, progress).backward()
        optimizer.step()
    raise AssertionError("the batches never end")


class Features(nn.Module):
    """A classifier of 28x28 images, whose last hidden layer is what distances are measured on."""

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
    """The classifier after so many steps of 128 images."""
    torch.manual_seed(0)
    model = Features()
    model(torch.zeros(1, 1, *next(split.batches(1))[0].shape[2:]))
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    stream = itertools.chain.from_iterable(split.batches(128, shuffle=(0, epoch)) for epoch in itertools.count())
    for images, labels in itertools.islice(stream, steps):
        loss = F.cross_entropy(model.last(model(images.float() / 255)), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval().requires_grad_(False)


def frechet(features: Features, images: Tensor, others: Tensor) -> float:
    r"""$|m - m'|^2 + \operatorname{tr}(C + C' - 2 (C C')^{1/2})$ of the features of two sets of images."""
    a, b = (features(t).double().numpy() for t in (images, others))
    root = scipy.linalg.sqrtm(np.cov(a.T) @ np.cov(b.T)).real
    return float(np.square(a.mean(0) - b.mean(0)).sum() + np.trace(np.cov(a.T) + np.cov(b.T) - 2 * root))
