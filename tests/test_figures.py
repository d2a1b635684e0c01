"""Pictures: what is drawn where. That they look right is for eyes; that they say the truth is for these."""

import numpy as np
import pytest
from matplotlib.patches import Rectangle

from hilum import figures
from hilum.pages import figure_png


@pytest.fixture
def pixels() -> np.ndarray:
    return np.random.default_rng(0).normal(0, 100, (20, 30)).astype(np.float32)


def test_windows(pixels):
    assert figures.window(pixels, "HU") == (-160, 240)
    assert figures.window(pixels, "") == pytest.approx(tuple(np.percentile(pixels, [1, 99.5])))
    low, high = figures.window(np.zeros((4, 4)), "")
    assert low < high


def test_slices_are_drawn_in_order_with_titles(pixels):
    slices = [(pixels + n, "HU", f"slice {n}") for n in range(4)]
    figure = figures.slice_grid(slices, columns=3)
    assert len(figure.axes) == 6
    assert [a.get_title() for a in figure.axes] == ["slice 0", "slice 1", "slice 2", "slice 3", "", ""]
    for axes, (wanted, _, _) in zip(figure.axes, slices):
        image = axes.get_images()[0]
        np.testing.assert_array_equal(image.get_array(), wanted)
        assert image.get_clim() == (-160, 240)
        assert image.origin == "upper"
    assert figure_png(figure).startswith(b"\x89PNG")


def test_boxes_lie_at_their_fractions(pixels):
    taken, rejected = (0.25, 0.5, 0.75, 1.0), (0.0, 0.0, 0.5, 0.1)
    figure = figures.crop_grid([(pixels, "HU", [taken], [rejected], [pixels[:8, :8]])], num_crops=2)
    boxes = [p for p in figure.axes[0].patches if isinstance(p, Rectangle)]
    assert [(b.get_x(), b.get_y(), b.get_width(), b.get_height()) for b in boxes] == [
        (-0.5, -0.5, pytest.approx(3.0), 10.0),
        (14.5, 4.5, 15.0, 10.0),
    ]
    assert [b.get_linestyle() for b in boxes] == ["--", "-"]
    figure_png(figure)


def test_equal_features_get_equal_colours(pixels):
    """Across slices: one set of components serves all; the background is black."""
    rng = np.random.default_rng(1)
    tokens = rng.normal(size=(4, 4, 8))
    inside = np.ones((4, 4), bool)
    inside[0, 0] = False
    figure = figures.pca_maps(
        [(pixels, "HU", "CT"), (pixels, "", "MR")], [tokens, tokens[::-1]], [inside, inside[::-1]]
    )
    maps = [np.asarray(a.get_images()[0].get_array()) for a in figure.axes[2:]]
    np.testing.assert_allclose(maps[0], maps[1][::-1], atol=1e-6)
    assert not maps[0][0, 0].any()
    assert maps[0][1:].std() > 0.1


def test_the_other_figures_draw(pixels):
    rng = np.random.default_rng(2)
    share = rng.random((4, 4))
    steps = np.arange(100)
    drawn = [
        figures.mask_maps([(pixels, "HU", share, share / 2)]),
        figures.curves(
            [("loss", [("a", steps, rng.random(100)), ("b", steps, rng.random(100))]), ("lr", [("", steps, steps)])]
        ),
        figures.similarity_maps((pixels, "HU", "CT"), [(pixels, "", "MR")], [("liver", 0.2, 0.4, [share])]),
        figures.intervals([("organ", [("ours", 0.9, 0.8, 1.0), ("random", 0.5, 0.4, 0.6)])]),
    ]
    for figure in drawn:
        assert len(figure_png(figure)) > 3000


def test_planes_stand_on_one_scale_inside_the_figure():
    """Thin and tall slices, side by side or below one another: nothing overlaps, nothing is stretched."""
    for shapes in (
        [(500, 500), (20, 500), (20, 500)],
        [(120, 240), (240, 240), (240, 120)],
        [(1800, 400)] * 3,
        [(9, 7)],
    ):
        panels = [figures.Panel(np.zeros((4, 5)), (h / 4, w / 5), ("A", "P", "R", "L"), "t") for h, w in shapes]
        figure = figures.planes(panels, (0, 1))
        width, height = figure.get_size_inches()
        boxes = [a.get_position() for a in figure.axes]
        scales = [v for b, (h, w) in zip(boxes, shapes) for v in (b.width * width / w, b.height * height / h)]
        assert scales == pytest.approx([scales[0]] * len(scales))
        for n, box in enumerate(boxes):
            assert 0 <= box.x0 < box.x1 <= 1
            assert 0 <= box.y0 < box.y1 <= 1
            assert not any(box.overlaps(other) for other in boxes[n + 1 :])
        assert figure_png(figure).startswith(b"\x89PNG")


def test_the_scale_bar_is_as_long_as_it_says():
    for wide, bar in ((400.0, 50), (60.0, 20), (8.0, 5)):
        figure = figures.planes([figures.Panel(np.zeros((4, 4)), (wide / 4, wide / 4))], (0, 1))
        (axes,) = figure.axes
        line = axes.get_lines()[0]
        assert list(line.get_xdata()) == [0, bar]
        assert f"{bar} mm" in [t.get_text() for t in axes.texts]
    figure = figures.planes([figures.Panel(np.zeros((4, 4)))], (0, 1))
    assert not figure.axes[0].get_lines()


def test_a_montage_keeps_proportions_and_order():
    panels = [figures.Panel(np.full((4, 8), n), (2.0, 0.5), title=f"s{n}") for n in range(5)]
    figure = figures.montage(panels, [(0, 4)] * 5, columns=3, colours=["#ffffff"] * 5)
    assert [int(a.get_images()[0].get_array()[0, 0]) for a in figure.axes] == [0, 1, 2, 3, 4]
    assert all(a.get_images()[0].get_extent() == [0, 4, 8, 0] and a.get_aspect() == 1 for a in figure.axes)
    assert [t.get_text() for t in figure.texts] == [f"s{n}" for n in range(5)]
    tops = [round(a.get_position().y1, 3) for a in figure.axes]
    assert tops[0] == tops[2] > tops[3] == tops[4]
    figure_png(figure)


def test_histograms_bars_and_steps_show_their_numbers():
    figure = figures.histogram(np.arange(5.0), np.array([1, 10, 0, 3]), "HU", [("fat", 1, 2), ("bone", 7, 9)])
    assert [t.get_text() for t in figure.axes[0].texts] == ["fat"]  # bone lies outside
    figure_png(figure)
    figure = figures.bars([("faults", "#f00", [("a", 3.0)]), ("others", "#000", [("b", 2000.0), ("c", 1.0)])])
    assert [[t.get_text() for t in a.texts] for a in figure.axes] == [["3"], ["2,000", "1"]]
    figure_png(figure)
    figure = figures.steps(np.array([2.0, 2.05, 5.0]), 2.0, "after slice")
    drawn = {
        str(line.get_color()): list(line.get_xdata()) for line in figure.axes[0].get_lines() if line.get_marker() == "o"
    }
    assert drawn == {figures.SERIES[0]: [1, 2], figures.REJECTED: [3]}
    figure_png(figure)
