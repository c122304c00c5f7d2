from keras_mmfnet.cli import _options as options
from keras_mmfnet.cli._process import start_backend
from keras_mmfnet.cli._terminal import session


def report(
    run: options.RunFolder,
    device: options.Device = None,
    workers: options.Workers = None,
    quiet: options.Quiet = False,
):
    """Writes report.html in the folder of a run, also of one that is not finished."""
    with session(quiet) as terminal:
        options.recipe_of_run(run)
        start_backend(device)
        from keras_mmfnet.report import write_comparison, write_report
        from keras_mmfnet.run import Run

        opened = Run(run)
        write = write_comparison if opened.results() and "mmfnet" not in opened.results() else write_report
        with options.use_workers(workers):
            terminal.say(write(opened), always=True)
