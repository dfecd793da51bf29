"""Capacity classes compared with every possible division, and the lanes that a plan's slots form."""

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from rq_compile.planning.capacity import capacity_classes, expected_loads, lane_groups
from rq_compile.planning.metrics import padded_work
from rq_compile.planning.schema import Slot
from rq_compile.quantization.formats import Format

pytestmark = pytest.mark.quick

shares = st.tuples(st.integers(1, 3), st.integers(1, 7)).flatmap(
    lambda shape: arrays(np.float64, shape, elements=st.floats(0, 100, width=16))
)


def lanes(shares: np.ndarray, labels: np.ndarray) -> float:
    """Mean over texts of the rows that lanes of these classes compute, in a direct implementation."""
    return float(sum((labels == label).sum() * shares[:, labels == label].max(axis=1).mean() for label in set(labels)))


def every_cut(shares: np.ndarray, classes: int) -> list[np.ndarray]:
    order = np.argsort(-shares.mean(axis=0), kind="stable")
    found = []
    for count in range(classes):
        for cuts in combinations(range(1, len(order)), count):
            labels = np.zeros(len(order), int)
            for cut in cuts:
                labels[order[cut:]] += 1
            found.append(labels)
    return found


@given(shares=shares, classes=st.integers(1, 4))
@settings(max_examples=200, deadline=None)
def test_no_cut_of_the_sorted_slots_pads_less(shares: np.ndarray, classes: int) -> None:
    labels = capacity_classes(shares, ["int8"] * shares.shape[1], classes)
    least = min(lanes(shares, cut) for cut in every_cut(shares, classes))
    assert lanes(shares, labels) == pytest.approx(least, rel=1e-6, abs=1e-12)
    assert set(labels) == set(range(labels.max() + 1))
    assert labels.max() < classes


@given(load=st.lists(st.integers(0, 50), min_size=1, max_size=6))
@settings(max_examples=100, deadline=None)
def test_with_one_text_no_partition_at_all_pads_less(load: list[int]) -> None:
    shares = np.array([load], np.float64)
    ours = lanes(shares, capacity_classes(shares, ["int4"] * len(load), 2))
    partitions = (np.array([number >> slot & 1 for slot in range(len(load))]) for number in range(2 ** len(load)))
    assert ours == pytest.approx(min(lanes(shares, labels) for labels in partitions), rel=1e-6, abs=1e-12)


@given(shares=shares, data=st.data())
@settings(max_examples=50, deadline=None)
def test_formats_are_cut_apart(shares: np.ndarray, data: st.DataObject) -> None:
    slots = shares.shape[1]
    of_slots: tuple[Format, ...] = ("int8", "int4")
    formats = data.draw(st.lists(st.sampled_from(of_slots), min_size=slots, max_size=slots))
    labels = capacity_classes(shares, formats)
    for format in set(formats):
        mine = np.array(formats) == format
        assert labels[mine].tolist() == capacity_classes(shares[:, mine], [format] * int(mine.sum())).tolist()


def test_busy_and_cold_slots_do_not_share_lanes() -> None:
    load = np.array([[0.3, 0.01, 0.28, 0.0, 0.3, 0.01, 0.1]])
    assert capacity_classes(load, ["int8"] * 7, classes=3).tolist() == [0, 2, 0, 2, 0, 2, 1]
    assert capacity_classes(load, ["int8"] * 7, classes=1).tolist() == [0] * 7
    assert capacity_classes(np.full((1, 7), 0.2), ["int8"] * 7).tolist() == [0] * 7


def test_lanes_are_slots_of_one_format_and_class() -> None:
    slots = [
        Slot(expert=0, format="int4", capacity_class=1),
        Slot(expert=1, format="int8"),
        Slot(expert=2, format="int4"),
        Slot(expert=3, format="int8", capacity_class=2),
        Slot(expert=0, format="int4", capacity_class=1),
    ]
    groups = lane_groups(slots)
    assert groups.tolist() == [3, 0, 2, 1, 3]
    assert padded_work(np.array([4, 5, 3, 0, 2]), groups) == pytest.approx((5 + 0 + 3 + 2 * 4) / 14)


def test_expected_loads_are_the_plans_or_all_equal() -> None:
    slots = [Slot(expert=e, format="int8", load=load) for e, load in enumerate((0.5, 0.25, 0.25))]
    assert expected_loads(slots).tolist() == [0.5, 0.25, 0.25]
    assert expected_loads([*slots, Slot(expert=3, format="int8")]).tolist() == [0.25] * 4
