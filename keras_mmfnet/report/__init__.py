"""The report of a run and of a comparison."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from keras_mmfnet.report._comparison import write_tables
    from keras_mmfnet.report.analysis import write_comparison, write_report


def __getattr__(name):
    # Drawing and the run's modules are loaded when a report is written.
    if name in __all__:
        from keras_mmfnet.report import _comparison, analysis

        return getattr(_comparison if name == "write_tables" else analysis, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__():
    return __all__


__all__ = ["write_comparison", "write_report", "write_tables"]
