"""What people look at: the page of a sampling run, labelled grids, and maps of query masks."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib import colormaps
from PIL import Image
from support import Opened

from data_prep.pictures.grids import labelled_grid, to_image
from pretrain.sampling.page import PageEntry, page
from pretrain.sampling.pictures import mask_map

HOSTILE = (
    "../../x",
    "<script>alert(1)</script>",
    "</title></style><img src=http://evil.example/x.png onerror=alert(1)>",
    "\"quoted\" & 'single' &amp; <b>",
    "🔴 rouge, 红色的圆",
    "",
)


def picture(path: Path, colour: str) -> Path:
    Image.new("RGB", (8, 4), colour).save(path)
    return path


@pytest.fixture
def entries(tmp_path) -> list[PageEntry]:
    """A picture for each hostile prompt; the first has masks."""
    masks = picture(tmp_path / "masks.png", "yellow")
    return [
        PageEntry(prompt, 40 + i, picture(tmp_path / f"{i}.png", "red"), None if i else masks)
        for i, prompt in enumerate(HOSTILE)
    ]


def test_the_page_holds_its_pictures(entries):
    opened = Opened(page("six pictures", {"steps": 30}, entries))
    assert opened.tags.count("figure") == len(entries)
    shown = [base64.b64decode(source.removeprefix("data:image/png;base64,")) for source in opened.sources]
    files = [entries[0].picture, entries[0].masks, *(e.picture for e in entries[1:])]
    assert shown == [file.read_bytes() for file in files]
    assert Image.open(io.BytesIO(shown[0])).size == (8, 4)
    assert opened.tags.count("details") == 1, "masks fold out, where there are any"


def test_the_page_loads_and_runs_nothing(entries):
    html = page("six pictures", {"model": "exports/x"}, entries)
    opened = Opened(html)
    known = {"html", "head", "meta", "title", "style", "body", "h1", "table", "tr", "td", "main", "figure", "img"}
    assert set(opened.tags) <= known | {"figcaption", "br", "small", "details", "summary", "p"}
    assert all(source.startswith("data:image/png;base64,") for source in opened.sources)
    assert {name for name, _ in opened.attributes} <= {"lang", "charset", "src", "alt", "open"}
    assert "url(" not in html and "@import" not in html


def test_prompts_and_settings_are_shown_as_they_are(entries):
    settings = {"negative_prompt": "<b>&", "guidance_interval": [0.2, 0.8]}
    opened = Opened(page("</title><script>", settings, entries))
    alts = [value for name, value in opened.attributes if name == "alt" and value != "query masks"]
    assert alts == list(HOSTILE)
    for words in (
        *filter(None, HOSTILE),
        "negative_prompt",
        "<b>&",
        "[0.2, 0.8]",
        "</title><script>",
        "seed 45 · 5.png",
    ):
        assert words in opened.words, words


def test_the_page_says_what_it_leaves_out(entries):
    assert "3 more pictures are in the folder." in Opened(page("t", {}, entries, left_out=3)).words
    assert "more pictures" not in page("t", {}, entries)


# ---- pictures ----


def test_to_image_end_points():
    values = torch.tensor([-1.5, -1.0, 0.0, 1.0, 1.5])[None, None].expand(3, 2, 5)
    image = to_image(values)
    assert image.size == (5, 2)
    assert np.asarray(image)[0, :, 0].tolist() == [0, 0, 128, 255, 255]


@pytest.mark.parametrize(("size", "inner"), [((64, 64), (100, 100)), ((128, 64), (100, 50)), ((32, 64), (50, 100))])
def test_a_grid_keeps_each_pictures_shape(size, inner):
    grid = np.asarray(labelled_grid([Image.new("RGB", size, "red")] * 3, ["", "a red circle", "🔴" * 500], side=100))
    red = (grid == (255, 0, 0)).all(-1)
    assert red[:, :116].any(0).sum() == inner[0]
    assert red.sum() == pytest.approx(3 * inner[0] * inner[1], rel=0.01)
    assert red[:116, 116:].any() and red[116:, :116].any() and not red[150:, 120:].any(), "two columns, two rows"


LEFT, TOP, GAP = 70, 22, 3  # of `mask_map`


def tile(sheet: Image.Image, block: int, column: int, size: tuple[int, int]) -> np.ndarray:
    """A tile of a map whose tiles have `size`, as [H, W, 3]."""
    x, y = LEFT + column * max(size[0] + GAP, 40), TOP + block * (size[1] + GAP)
    return np.asarray(sheet.crop((x, y, x + size[0], y + size[1]))).astype(int)


def centres(tile_HW3: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """The colour in the middle of each token's place [rows, columns, 3]."""
    y, x = (((np.arange(n) + 0.5) * side / n).astype(int) for n, side in zip(grid, tile_HW3.shape, strict=False))
    return tile_HW3[y][:, x]


@pytest.mark.parametrize(
    ("grid", "size"),
    [((4, 4), (64, 64)), ((2, 4), (64, 32)), ((4, 2), (32, 64)), ((2, 3), (64, 43)), ((8, 1), (8, 64))],
)
def test_a_map_shows_each_token_at_its_place(grid, size):
    """Rows are blocks, columns steps; each token has its own value, and the tile the picture's shape."""
    steps, blocks, tokens = 3, 2, grid[0] * grid[1]
    masks_SKN = torch.linspace(0, 1, steps * blocks * tokens).reshape(steps, blocks, tokens)
    sheet = mask_map(masks_SKN, grid, [1000.0, 600.0, 200.0])
    assert sheet.size == (LEFT + steps * max(size[0] + GAP, 40), TOP + blocks * (size[1] + GAP))
    for step in range(steps):
        for block in range(blocks):
            expected = colormaps["viridis"](masks_SKN[step, block].reshape(grid).numpy(), bytes=True)[..., :3]
            np.testing.assert_array_equal(centres(tile(sheet, block, step, size), grid), expected)


def test_a_map_lies_over_its_picture():
    """A wide picture, its left half black and its right half white: 0.4 of its grey under 0.6 of the mask's colour."""
    wide = Image.new("RGB", (128, 64), "black")
    wide.paste("white", (64, 0, 128, 64))
    got = centres(tile(mask_map(torch.ones(1, 1, 8), (2, 4), [500.0], wide), 0, 0, (64, 32)), (2, 4))
    yellow = np.array(colormaps["viridis"](1.0, bytes=True)[:3]).astype(int)
    under = np.array([0, 0, 255, 255])[:, None] * 0.4
    np.testing.assert_allclose(got, np.broadcast_to(under + 0.6 * yellow, (2, 4, 3)), atol=1)


def test_a_map_of_many_steps_shows_eight_from_first_to_last():
    masks_SKN = torch.zeros(30, 1, 4)
    masks_SKN[0], masks_SKN[29] = 0.3, 1.0
    sheet = mask_map(masks_SKN, (2, 2), list(range(30)))
    assert sheet.width == LEFT + 8 * (64 + GAP)
    for column, value in ((0, 0.3), (3, 0.0), (7, 1.0)):
        expected = colormaps["viridis"](value, bytes=True)[:3]
        assert tuple(tile(sheet, 0, column, (64, 64))[32, 32]) == expected
