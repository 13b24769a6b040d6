"""Whole numbers, rounded up."""


def ceil_div(number: int, by: int) -> int:
    """Return number / by, rounded up; both are integers, `by` above 0."""
    return -(-number // by)


def round_up(number: int, multiple: int) -> int:
    """Return the least multiple of `multiple` that is not below `number`."""
    return ceil_div(number, multiple) * multiple
