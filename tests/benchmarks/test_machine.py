import platform

import pytest


@pytest.mark.parametrize(
    ("preloaded", "expected"),
    [("/usr/lib/libtcmalloc_minimal.so.4", "libtcmalloc_minimal.so.4"), ("/lib/other.so", None), ("", None)],
)
def test_the_allocator_is_named(benchmarks, monkeypatch, preloaded, expected):
    from machine import machine

    monkeypatch.setenv("LD_PRELOAD", preloaded)
    assert machine()["allocator"] == (expected or " ".join(platform.libc_ver()))
