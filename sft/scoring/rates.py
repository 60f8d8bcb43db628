"""Rates that are 0 where they are undefined, as document 001 has them."""


def ratio(part: float, whole: float) -> float:
    """part / whole, or 0 when there is no whole."""
    return part / whole if whole else 0.0


def f1(true_positives: int, false_positives: int, false_negatives: int) -> float:
    """The harmonic mean of precision and recall."""
    return ratio(2 * true_positives, 2 * true_positives + false_positives + false_negatives)
