"""Tests of figures: their texts and values as matplotlib stores them, and that all text fits on the page."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image

from lpc_lightning.evaluation.accuracy.accuracy_modes import OTHERS
from lpc_lightning.evaluation.codebook.embedding import MIN_POINTS, embed
from lpc_lightning.evaluation.codebook.plots import MAX_CODES, MAX_COLUMNS, code_use, heat_map, render, scatter


def texts(figure: Figure) -> list[str]:
    """Return all texts of a figure. It must have been drawn before."""
    contents = [text.get_text() for axes in figure.axes for text in axes.texts]
    for axes in figure.axes:
        contents += [axes.get_title(), axes.get_xlabel(), axes.get_ylabel()]
        contents += [label.get_text() for label in (*axes.get_xticklabels(), *axes.get_yticklabels())]
        if legend := axes.get_legend():
            contents += [text.get_text() for text in (legend.get_title(), *legend.get_texts())]
    return contents


def check_and_render(figure: Figure, path: Path) -> NDArray[np.uint8]:
    """Render a figure and return its pixels. Check that the file is equal, no text is cut off, and it is not empty."""
    pixels = render(figure, path)
    assert np.array_equal(np.asarray(Image.open(path).convert("RGB")), pixels)
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    assert (border == 255).all(), "something is cut off at the edge of the page"
    assert pixels.std() > 5
    return pixels


def test_heat_map_shares_and_counts(tmp_path: Path) -> None:
    codes = np.array([0, 0, 0, 0, 2, 2, 5, 2])
    labels = ["a", "a", "a", "b", "b", "b", "a", ""]
    figure = heat_map(codes, labels, "source", "Codes by source, step 7")
    check_and_render(figure, tmp_path / "map.png")
    image = figure.axes[0].images[0].get_array()
    # Rows: codes 0 and 5 (mostly a), code 2 (mostly b), all pairs. The pair without a source is left out.
    np.testing.assert_allclose(image, [[0.75, 0.25], [1, 0], [0, 1], [4 / 7, 3 / 7]])  # type: ignore[arg-type]
    figure_texts = texts(figure)
    for text in ("code 0  (n = 4)", "code 5  (n = 1)", "code 2  (n = 2)", "all  (n = 7)", "a", "b", "source"):
        assert text in figure_texts
    assert Counter(text.get_text() for text in figure.axes[0].texts) == Counter("31100243")
    assert "Codes by source, step 7" in figure_texts


def test_heat_map_of_many_codes_and_sources(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    sources = [f"a source with quite a long name, $number$ {number}" for number in draw.integers(0, 50, 3000)]
    codes = np.concatenate([np.arange(256), draw.integers(0, 256, 2744)])
    figure = heat_map(codes, sources, "source", "Codes by source, step 7")
    pixels = check_and_render(figure, tmp_path / "map.png")
    assert max(pixels.shape) < 2000
    image = figure.axes[0].images[0].get_array()
    assert image.shape == (MAX_CODES + 2, MAX_COLUMNS + 1)  # type: ignore[union-attr]
    assert np.asarray(image).sum(1) == pytest.approx(1)
    figure_texts = texts(figure)
    assert OTHERS in figure_texts
    assert any(text.startswith(f"{256 - MAX_CODES} others") for text in figure_texts)
    assert "all  (n = 3000)" in figure_texts
    assert not figure.axes[0].texts, "counts would be illegible"


@pytest.mark.parametrize("labels", [["only"] * 5, ["日本語", "мёд", "a", "b\nc", "_x"]])
def test_heat_map_of_unusual_names(labels: list[str], tmp_path: Path) -> None:
    check_and_render(
        heat_map(np.array([3, 3, 3, 3, 1]), labels, "source", "Codes by source, step 7"), tmp_path / "map.png"
    )


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 2, 32, 256])
@pytest.mark.parametrize("with_posterior", [True, False])
def test_code_use_shows_every_code(count: int, with_posterior: bool, tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    prior, posterior = draw.dirichlet(np.ones(count)), draw.dirichlet(np.ones(count))
    codes = draw.integers(0, max(1, count // 2), 40)
    figure = code_use(prior, codes, posterior if with_posterior else None, "Use of the codes, step 7")
    check_and_render(figure, tmp_path / "use.png")
    mass, lead = figure.axes
    legend = mass.get_legend()
    assert legend is not None
    assert legend.get_window_extent().x0 >= mass.bbox.x1, "the legend covers data"
    assert [bar.get_height() for bar in mass.patches] == pytest.approx(sorted(prior, reverse=True))  # type: ignore[attr-defined]
    shares = [np.mean(codes == code) for code in np.argsort(-prior)]
    assert [bar.get_height() for bar in lead.patches] == pytest.approx(shares)  # type: ignore[attr-defined]
    figure_texts = texts(figure)
    assert ("mean posterior" in figure_texts) == with_posterior
    dead = count - len(set(codes.tolist()))
    assert f"{dead} {'code is' if dead == 1 else 'codes are'} likeliest for no pair" in figure_texts
    assert any(f"of {count}" in text for text in figure_texts)


def test_scatter_colours_by_label(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    labels = [["books", "films", ""][number % 3] for number in range(60)]
    points = draw.normal(size=(60, 8)).astype(np.float32)
    figure = scatter(points, labels, "source", "z of 60 pairs, step 7", seed=1)
    check_and_render(figure, tmp_path / "z.png")
    figure_texts = texts(figure)
    title = f"{embed(points, 1).method} of z of 60 pairs, step 7"
    for text in ("books (20)", "films (20)", "(none) (20)", "source", title):
        assert text in figure_texts
    groups = figure.axes[0].collections
    assert [len(group.get_offsets()) for group in groups] == [20, 20, 20]
    assert len({tuple(group.get_facecolor()[0]) for group in groups}) == 3


def test_scatter_of_many_labels(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    labels = [f"source {number % 40}" for number in range(200)]
    figure = scatter(draw.normal(size=(200, 4)).astype(np.float32), labels, "source", "z of 200 pairs, step 7", seed=1)
    check_and_render(figure, tmp_path / "z.png")
    styles = {(tuple(g.get_facecolor()[0]), g.get_paths()[0].vertices.tobytes()) for g in figure.axes[0].collections}
    assert len(styles) == 15


@pytest.mark.parametrize(
    ("points", "note"),
    [
        (np.eye(MIN_POINTS - 1, dtype=np.float32), "needs 5 points or more, found 4"),
        (np.zeros((0, 3), dtype=np.float32), "found 0"),
        (np.zeros((30, 3), dtype=np.float32), "All 30 points are equal"),
        (np.full((30, 3), 0.1, dtype=np.float32), "All 30 points are equal"),
        (1 + 1e-8 * np.random.default_rng(0).normal(size=(30, 3)), "All 30 points are equal"),
    ],
)
def test_scatter_without_layout_shows_reason(points: NDArray[np.float32], note: str, tmp_path: Path) -> None:
    figure = scatter(points, [""] * len(points), "source", f"z of {len(points)} pairs, step 7", seed=1)
    check_and_render(figure, tmp_path / "z.png")
    assert any(note in text for text in texts(figure))


@pytest.mark.slow
@pytest.mark.parametrize("count", [MIN_POINTS, 6, 20, 90])
@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e6])
def test_embed_keeps_neighbours(count: int, scale: float) -> None:
    draw = np.random.default_rng(0)
    points = scale * np.concatenate([draw.normal(size=(count, 8)), 50 + draw.normal(size=(count, 8))])
    actual = embed(points.astype(np.float32), seed=1)
    assert actual.coordinates is not None
    assert actual.coordinates.shape == (2 * count, 2)
    assert np.isfinite(actual.coordinates).all()
    if count >= 20:
        gaps = np.linalg.norm(actual.coordinates[:, None] - actual.coordinates[None], axis=-1) + 1e9 * np.eye(2 * count)
        assert ((gaps.argmin(1) < count) == (np.arange(2 * count) < count)).all()


def test_embed_depends_on_seed_only() -> None:
    points = np.random.default_rng(0).normal(size=(30, 5)).astype(np.float32)
    np.random.seed(3)
    before, ours = np.random.get_state()[1].tolist(), torch.get_rng_state()  # type: ignore[index]
    one, other = embed(points, seed=2**40), embed(points, seed=2**40)
    assert np.array_equal(one.coordinates, other.coordinates)  # type: ignore[arg-type]
    assert np.random.get_state()[1].tolist() == before  # type: ignore[index]
    assert torch.equal(torch.get_rng_state(), ours)


def test_plots_do_not_use_pyplot(tmp_path: Path) -> None:
    from matplotlib import pyplot

    before = pyplot.get_fignums()
    check_and_render(heat_map(np.array([0, 1]), ["a", "b"], "source", "Codes by source, step 7"), tmp_path / "map.png")
    assert pyplot.get_fignums() == before == []
