"""Static sizes: powers of two and the midpoints between them, so that few programs serve all lengths."""


def bucket(size: int, smallest: int = 16) -> int:
    """The smallest bucket that holds `size`: `smallest`, or a size 2^n or 3 * 2^(n-1) above it."""
    power = smallest
    while power < size:
        if power * 3 // 2 >= size:
            return power * 3 // 2
        power *= 2
    return power


def buckets_to(size: int) -> list[int]:
    """All buckets up to the one that holds `size`."""
    sizes = [bucket(1)]
    while sizes[-1] < size:
        sizes.append(bucket(sizes[-1] + 1))
    return sizes
