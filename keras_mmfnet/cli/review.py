import contextlib
import getpass
import importlib.util
import secrets
import socket
import tempfile
import webbrowser
from pathlib import Path
from typing import Annotated

import typer

from keras_mmfnet.cli import _options as options
from keras_mmfnet.cli._process import silenced
from keras_mmfnet.cli._terminal import session


def review(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Folder of a run, or of what mmfnet segment wrote.")],
    patients: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="The patients' folder, if it moved since they were segmented.")
    ] = None,
    reviewer: Annotated[
        str | None, typer.Option(metavar="NAME", help="Who corrects, for the records.", show_default="the user's name")
    ] = None,
    host: Annotated[
        str, typer.Option(metavar="ADDRESS", help="Address to listen at; others than this machine's are less safe.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(metavar="N", min=0, max=65535, help="Port; 0 for a free one.")] = 0,
    browser: Annotated[bool, typer.Option("--browser/--no-browser", help="Open the page in the browser.")] = True,
    export: Annotated[
        Path | None,
        typer.Option(metavar="OUT", help="Write the accepted and corrected masks to a new folder, and show nothing."),
    ] = None,
    rtstruct: Annotated[bool, typer.Option("--rtstruct", help="With --export: also DICOM structure sets.")] = False,
    seg: Annotated[bool, typer.Option("--seg", help="With --export: also DICOM segmentations.")] = False,
    quiet: options.Quiet = False,
):
    """Shows segmented patients in the browser, to accept or correct the masks."""
    with session(quiet) as terminal:
        options.require_folder(folder, "FOLDER")
        if (rtstruct or seg) and not export:
            raise ValueError("--export: a folder is expected with --rtstruct and --seg. Received: none")
        if export:
            with silenced():
                from keras_mmfnet.review.exports import export_corrections
                from keras_mmfnet.review.patients import find_reviewed
            dicom = [name for name, wish in {"rtstruct": rtstruct, "seg": seg}.items() if wish]
            written = export_corrections(find_reviewed(folder, patients), folder / "corrections", export, dicom)
            terminal.say("\n".join(map(str, written)), always=True)
            return
        if lacking := [name for name in ("starlette", "uvicorn") if importlib.util.find_spec(name) is None]:
            raise ValueError(
                f"mmfnet review needs {' and '.join(lacking)}: pip install 'keras-mmfnet[review]'. Received: none"
            )
        with silenced():
            from keras_mmfnet.review.patients import find_reviewed
            from keras_mmfnet.review.server import Review, make_server
        reviewer = reviewer or getpass.getuser()
        reviewed = Review(find_reviewed(folder, patients), folder / "corrections", reviewer, folder / "report.html")
        token = secrets.token_urlsafe(24)
        with socket.create_server((host, port)) as listening:
            address = f"http://{host}:{listening.getsockname()[1]}/{token}/"
            terminal.say(f"{address}\nStop with Ctrl-C", always=True)
            with tempfile.TemporaryDirectory() as private, contextlib.suppress(KeyboardInterrupt):
                if browser:
                    # Other users see the command lines of processes; the address is in a file that they cannot read.
                    page = Path(private, "review.html")
                    page.write_text(f'<meta http-equiv="refresh" content="0; url={address}">', encoding="utf-8")
                    webbrowser.open(page.as_uri())
                make_server(reviewed, token).run(sockets=[listening])
