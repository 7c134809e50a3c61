"""Precision, recall and nDCG of ranked labels, against a plain loop."""

import math

import pytest
import torch

from lossworks.metrics.ranking import ranking_metrics, ranking_sums


def by_hand(scores, sets):
    """Return the means over rows with labels, from scores and sets of labels."""
    rows = []
    for row, own in zip(scores.tolist(), sets, strict=True):
        if not own:
            continue
        order = sorted(range(len(row)), key=lambda label: -row[label])[:5]
        hits = [label in own for label in order]
        best = sum(1 / math.log2(place + 2) for place in range(min(len(own), len(order))))
        gain = sum(hit / math.log2(place + 2) for place, hit in enumerate(hits))
        rows.append([sum(hits[:depth]) / depth for depth in (1, 3, 5)] + [sum(hits) / len(own), gain / best])
    return [sum(column) / len(rows) for column in zip(*rows, strict=True)]


@pytest.mark.parametrize("labels", [4, 9])
def test_figures_are_those_of_a_loop(labels):
    """Sets of none, one and more than five labels, fewer labels than the depth, and parts that are added."""
    g = torch.Generator().manual_seed(0)
    sets = [{0}, set(), {1, 3}, set(range(labels)), {2, 0, 3}, set(range(1, labels))]
    scores = torch.randn(len(sets), labels, generator=g)
    positives = torch.full((len(sets), labels + 2), -100)
    for row, own in enumerate(sets):
        positives[row, : len(own)] = torch.tensor(sorted(own), dtype=torch.int64)
    best = scores.topk(min(5, labels), dim=1).indices
    sums = sum(ranking_sums(best[part], positives[part]) for part in (slice(0, 2), slice(2, 6)))

    assert list(ranking_metrics(sums).values()) == pytest.approx(by_hand(scores, sets))


def test_rows_without_labels_count_for_nothing():
    """Also where there are no others."""
    sums = ranking_sums(torch.zeros(2, 5, dtype=torch.int64), torch.full((2, 3), -100))

    assert sums.tolist() == [0.0] * 6
    assert set(ranking_metrics(sums).values()) == {0.0}
