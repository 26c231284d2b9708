"""Grids: every picture in its place, with its label below."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image

from data_prep.pictures.grids import label_font, labelled_grid, to_image

COLOURS = ["red", "lime", "blue", "yellow", "cyan"]


def test_the_levels_of_a_picture() -> None:
    picture = torch.tensor([-1.0, 0.0, 1.0, 2.0]).view(1, 1, 4).expand(3, 2, 4)
    image = np.asarray(to_image(picture))
    assert image.shape == (2, 4, 3)
    assert image[0, :, 0].tolist() == [0, 128, 255, 255]


def test_pictures_in_rows_at_their_places() -> None:
    images = [Image.new("RGB", (32, 32), colour) for colour in COLOURS]
    grid = labelled_grid(images, COLOURS, side=64)
    assert grid.width == 3 * (64 + 8) + 8  # five pictures: three columns
    row = (grid.height - 8) // 2
    for number, image in enumerate(images):
        centre = (8 + number % 3 * 72 + 32, 8 + number // 3 * row + 32)
        assert grid.getpixel(centre) == image.getpixel((0, 0))
    assert grid.getpixel((8 + 2 * 72 + 32, 8 + row + 32)) == (255, 255, 255)  # the sixth place is empty


def test_labels_are_drawn_and_make_room() -> None:
    image = Image.new("RGB", (64, 64), "white")
    plain, short, long = (labelled_grid([image], [words], side=128) for words in ("", "a", "many words " * 20))
    assert np.asarray(plain).min() == 255 and np.asarray(short).min() < 64
    assert plain.height < short.height < long.height


def test_a_wide_picture_keeps_its_aspect_ratio() -> None:
    grid = np.asarray(labelled_grid([Image.new("RGB", (64, 16), "black")], [""], side=64, columns=2))
    dark = np.argwhere(grid[:72, :, 0] < 128)
    assert np.ptp(dark[:, 1]) + 1 == 64 and np.ptp(dark[:, 0]) + 1 == 16
    assert grid.shape[1] == 2 * 72 + 8


def test_labels_have_more_than_ascii() -> None:
    """Each letter has a shape of its own, which the box of a letter that is missing is not."""
    font = label_font(20)
    shapes = {letter: bytes(font.getmask(letter)) for letter in "aäàåüèñçßøŁžğαяЖ–“…"}
    assert len(set(shapes.values())) == len(shapes)
    assert bytes(font.getmask("\uffff")) not in shapes.values()
