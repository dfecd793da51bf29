"""What a layer's experts will be asked for: loads as the planner believes in them, text by text."""

import numpy as np

from rq_compile.calibration.schema import LayerCalibration


def demand(layer: LayerCalibration, smoothing: float) -> np.ndarray:
    """float64 ``[texts, m]``: the load of every expert in every calibration text over the mean load of that text.

    A plan is judged by the text that it serves worst, so that it holds when the traffic drifts from one kind to another;
    the worst text of one slot is ``demand.max(axis=0)``. ``smoothing`` rows are added to every expert (Laplace), so that an
    expert that no calibration token reached is still expected to be. A text that reached no expert says nothing and is left out.
    """
    texts = np.asarray(layer.text_loads or [layer.load], np.float64)
    texts = texts[texts.sum(axis=1) > 0]
    if not len(texts):
        return np.ones((1, layer.geometry.experts))
    smoothed = texts + smoothing
    return smoothed / smoothed.mean(axis=1, keepdims=True)


# Between texts of different kinds, an expert with a load of 0.25 to 2 times the mean was off by about one mean load, a nearly
# unused one by a multiple of its own (16 and 12 experts, three kinds of text); within a kind, by a tenth of its own.
MOST_GROWTH = 4.0


def drift_gain(load: np.ndarray, drift: float, most: float) -> np.ndarray:
    """What each expert may gain on text of a kind that nobody calibrated on, float ``[m]``, in mean loads like ``load [m]``.

    ``drift`` mean loads, but at most ``MOST_GROWTH`` times its own, as an expert that hardly any text needs hardly gains, and
    no load above ``most``, that of an expert which every token chooses: m / top-k.
    """
    return np.maximum(0.0, np.minimum(np.minimum(drift, MOST_GROWTH * load), most - load))
