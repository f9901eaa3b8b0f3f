"""Changes of colour are those of their definitions, in one matrix and rounded once."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from fastmrcnn.data.colour import LUMA, Colour, colour_matrix, recolour

COLOURS = [
    Colour(0.8, 1.3, 1.0, 0.0),
    Colour(saturation=0.3),
    Colour(saturation=1.6),
    Colour(hue=0.2),
    Colour(1.2, 0.7, 1.4, -0.35),
]


@pytest.fixture
def pixels() -> NDArray[np.uint8]:
    return np.random.default_rng(3).integers(0, 256, (40, 50, 3), np.uint8)


def step_by_step(pixels: NDArray[np.uint8], colour: Colour) -> NDArray[np.float64]:
    """One change after the other, in float64, not rounded and not cut off."""
    values = pixels * colour.brightness
    values = (values - values.mean()) * colour.contrast + values.mean()
    grey = (values @ LUMA)[..., None]
    values = grey + (values - grey) * colour.saturation
    to_yiq = np.array([[0.299, 0.587, 0.114], [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]])
    luma, i, q = np.moveaxis(values @ to_yiq.T, -1, 0)
    chroma = (i + 1j * q) * np.exp(2j * np.pi * colour.hue)
    return np.stack([luma, chroma.real, chroma.imag], axis=-1) @ np.linalg.inv(to_yiq).T


@pytest.mark.parametrize("colour", COLOURS)
def test_one_matrix_does_what_the_steps_do(pixels: NDArray[np.uint8], colour: Colour) -> None:
    expected = step_by_step(pixels, colour).clip(0, 255)
    found = np.asarray(recolour(Image.fromarray(pixels), colour)).astype(float)
    assert np.abs(found - expected).max() <= 0.5 + 1e-3
    matrix = colour_matrix(colour, float(pixels.mean()))
    np.testing.assert_allclose((pixels @ matrix[:, :3].T + matrix[:, 3]).clip(0, 255), expected, atol=1e-9)


def test_hue_and_saturation_keep_grey_and_luma() -> None:
    grey = np.repeat(np.arange(0, 256, 5, np.uint8)[None, :, None], 3, axis=2)
    turned = recolour(Image.fromarray(grey), Colour(saturation=1.7, hue=0.4))
    np.testing.assert_array_equal(np.asarray(turned), grey)
    dull = np.random.default_rng(0).integers(100, 156, (9, 9, 3), np.uint8)
    turned = np.asarray(recolour(Image.fromarray(dull), Colour(hue=0.5)))
    np.testing.assert_allclose(turned @ LUMA, dull @ LUMA, atol=1)
    assert np.abs(turned.astype(int) - dull).max() > 20
    flat = np.asarray(recolour(Image.fromarray(dull), Colour(saturation=0)))
    assert (flat == flat[..., :1]).all()


def test_nothing_to_change_changes_nothing(pixels: NDArray[np.uint8]) -> None:
    image = Image.fromarray(pixels)
    assert recolour(image, Colour()) is image
    # the table of brightness and contrast is that of version 0.1
    mean = 1.1 * pixels.mean()
    table = np.clip((np.arange(256) * 1.1 - mean) * 0.8 + mean + 0.5, 0, 255).astype(np.uint8)
    np.testing.assert_array_equal(np.asarray(recolour(image, Colour(1.1, 0.8))), table[pixels])
