"""The report of a run and of a comparison: `analysis` computes, `page.html.j2` shows."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from keras_mmfnet.report.analysis import write_comparison, write_report, write_tables


def __getattr__(name):
    # Drawing and the run's modules are loaded when a report is written.
    if name in __all__:
        from keras_mmfnet.report import analysis

        return getattr(analysis, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__():
    return __all__


__all__ = ["write_comparison", "write_report", "write_tables"]
