"""What a picture shows, read from matplotlib's objects."""

import numpy as np
from matplotlib import axes, collections, figure, text
from matplotlib.backends.backend_agg import FigureCanvasAgg


def bands_of(panel: axes.Axes) -> list[np.ndarray]:
    """The corners of each band."""
    return [
        band.get_paths()[0].vertices
        for band in panel.collections
        if isinstance(band, collections.PolyCollection)
    ]


def ticks_out_of_view(drawing: figure.Figure) -> set[text.Text]:
    """Names of places beyond the ends of an axis, which are not drawn."""
    hidden = set()
    for panel in drawing.axes:
        for axis in (panel.xaxis, panel.yaxis):
            low, high = sorted(axis.get_view_interval())
            for tick in (*axis.get_major_ticks(), *axis.get_minor_ticks()):
                if not low <= tick.get_loc() <= high:
                    hidden |= {tick.label1, tick.label2}
    return hidden


def assert_all_is_inside(drawing: figure.Figure) -> None:
    """No text is cut off by the edges of the picture."""
    canvas = FigureCanvasAgg(drawing)
    canvas.draw()
    frame, hidden = drawing.bbox, ticks_out_of_view(drawing)
    seen = 0
    for words in drawing.findobj(text.Text):
        if not words.get_visible() or not words.get_text() or words in hidden:
            continue
        box = words.get_window_extent(canvas.get_renderer())
        inside = frame.x0 <= box.x0 and box.x1 <= frame.x1
        inside &= frame.y0 <= box.y0 and box.y1 <= frame.y1
        assert inside, (words.get_text(), box, frame)
        seen += 1
    assert seen > 3
