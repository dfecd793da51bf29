"""The loads that the planner expects for a layer's experts, text by text."""

import numpy as np

from rq_compile.calibration.schema import LayerCalibration


def demand(layer: LayerCalibration, smoothing: float, worst_text: float = 1.0) -> np.ndarray:
    """float64 ``[texts, m]``: the load of every expert in every calibration text, divided by the mean load of that text.

    A plan is judged by the text that it serves worst, so that it still works when the traffic drifts from one kind to another.
    The worst text of one slot is ``demand.max(axis=0)``. With a ``worst_text`` below 1, every text counts with this weight, and
    the rest is that of all texts together, in which a text counts by its tokens. ``smoothing`` rows are added to every expert
    (Laplace), so that an expert that no calibration token reached is still expected to get some. Texts that reached no expert
    are left out.
    """
    texts = np.asarray(layer.text_loads or [layer.load], np.float64)
    texts = texts[texts.sum(axis=1) > 0]
    if not len(texts):
        return np.ones((1, layer.geometry.experts))
    smoothed = texts + smoothing
    relative = smoothed / smoothed.mean(axis=1, keepdims=True)
    together = np.asarray(layer.load, np.float64) + smoothing
    if worst_text == 1 or not together.any():
        return relative
    return worst_text * relative + (1 - worst_text) * together / together.mean()


# Between texts of different kinds, the load of an expert with 0.25 to 2 times the mean load changed by about one mean load, and
# that of a nearly unused expert by a multiple of its own (16 and 12 experts, three kinds of text). Within a kind, an expert's
# load changed by a tenth of its own.
MOST_GROWTH = 4.0


def drift_gain(load: np.ndarray, drift: float, most: float) -> np.ndarray:
    """The load that each expert may gain on a kind of text that was not calibrated on, float ``[m]``, in mean loads like ``load
    [m]``.

    This is ``drift`` mean loads, but at most ``MOST_GROWTH`` times the expert's own load, because a nearly unused expert hardly
    gains. No load rises above ``most``, the load of an expert that every token chooses: m / top-k.
    """
    return np.maximum(0.0, np.minimum(np.minimum(drift, MOST_GROWTH * load), most - load))
