"""What holds of every figure."""

from __future__ import annotations

from matplotlib.figure import Figure


def assert_labels_are_inside(figure: Figure) -> None:
    """No title and no axis label of a figure is cut at its border."""
    figure.canvas.draw()
    for axis in figure.axes:
        for text in (axis.title, axis.xaxis.label, axis.yaxis.label):
            box = text.get_window_extent()
            assert box.x0 >= 0, text
            assert box.y0 >= 0, text
            assert box.x1 <= figure.bbox.x1, text
            assert box.y1 <= figure.bbox.y1, text
