"""Buckets hold the size, waste less than half of it, and are few."""

from gemfilter_jax.buckets import bucket


def test_a_bucket_is_the_least_that_holds_the_size():
    sizes = [16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024]
    for size in range(1, 1025):
        assert bucket(size) == next(b for b in sizes if b >= size)


def test_the_smallest_bucket_can_be_chosen():
    assert [bucket(size, smallest=4) for size in (1, 4, 5, 7, 9)] == [4, 4, 6, 8, 12]
