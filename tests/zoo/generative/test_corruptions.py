"""What is done to images: against formulas in NumPy and SciPy."""

import pytest
import scipy.ndimage
import torch

from equipoise.zoo import Blur, Corruption, Downsample, Hole, Noise


def images() -> torch.Tensor:
    return torch.rand(3, 2, 12, 20, generator=torch.Generator().manual_seed(0))


def test_blur() -> None:
    clean = images()
    # 4.5 standard deviations are rounded up to 5 pixels, and SciPy rounds to the nearest.
    sigma = (0, 0, 1.5, 1.5)
    expected = scipy.ndimage.gaussian_filter(clean.numpy(), sigma, radius=(0, 0, 5, 5), mode="nearest")
    torch.testing.assert_close(Blur(sigma=1.5).apply(clean), torch.from_numpy(expected))
    small = torch.rand(1, 1, 7, 8, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(Blur(sigma=0.8).apply, small)


def test_downsampling() -> None:
    found = Downsample(factor=4).apply(images())
    torch.testing.assert_close(found, images().unflatten(2, (3, 4)).unflatten(4, (5, 4)).mean((3, 5)))
    with pytest.raises(ValueError, match="does not divide images of 12x20"):
        Downsample(factor=5).apply(images())


def test_noise() -> None:
    clean = torch.full((4, 1, 64, 64), 0.5)
    observed, mask = Noise(std=0.2).observe(clean, torch.Generator().manual_seed(1))
    again, _ = Noise(std=0.2).observe(clean, torch.Generator().manual_seed(1))
    assert torch.equal(observed, again)
    assert bool((clean == 0.5).all() & (mask == 1).all())  # not in place
    noise = observed - clean
    assert float(noise.std()) == pytest.approx(0.2, rel=0.02)
    assert float((noise[..., 1:] * noise[..., :-1]).mean()) == pytest.approx(0.0, abs=2e-3)


def test_holes() -> None:
    clean = images() + 0.1
    observed, mask = Hole(size=5).observe(clean, torch.Generator().manual_seed(0))
    assert mask.shape == observed.shape == clean.shape
    torch.testing.assert_close(observed, clean * mask)
    corners = set()
    for picture in mask:
        assert torch.equal(picture[0], picture[1])
        places = (picture[0] == 0).nonzero()
        low, high = places.amin(0), places.amax(0)
        assert (len(places), (high - low).tolist()) == (25, [4, 4])
        corners.add(tuple(low.tolist()))
    assert len(corners) > 1
    with pytest.raises(ValueError, match="covers images"):
        Hole(size=12).observe(clean)


@pytest.mark.parametrize("corruption", [Blur(), Downsample(), Hole(size=4), Noise()], ids=repr)
def test_shape_and_type(corruption: Corruption) -> None:
    for dtype in (torch.float32, torch.float64):
        observed, mask = corruption.observe(images().to(dtype), torch.Generator().manual_seed(0))
        expected = (dtype, corruption.apply(images()).shape)
        assert (observed.dtype, observed.shape) == (mask.dtype, mask.shape) == expected


def test_refusals() -> None:
    for make in (lambda: Blur(sigma=0.0), lambda: Noise(std=-1.0), lambda: Hole(size=0), lambda: Downsample(factor=1)):
        with pytest.raises(ValueError, match="must be"):
            make()
