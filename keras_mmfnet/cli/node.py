import contextlib
import datetime
import importlib.util
import json
import logging
import re
import shutil
import sqlite3
import time
import warnings
from pathlib import Path
from typing import Annotated

import typer

from keras_mmfnet._files import hold
from keras_mmfnet.cli import _options as options
from keras_mmfnet.cli._process import silenced
from keras_mmfnet.cli._terminal import counted, make_table, roughly, session

_log = logging.getLogger(__name__)
node = typer.Typer(name="node", help="A DICOM node that segments the studies it is sent.", no_args_is_help=True)
_Certificate = Annotated[Path | None, typer.Option(metavar="FILE", help="For TLS: this node's certificate, PEM.")]
_Key = Annotated[Path | None, typer.Option(metavar="FILE", help="For TLS: its private key, PEM.")]
_Authority = Annotated[
    Path | None, typer.Option(metavar="FILE", help="For TLS: what others' certificates are checked with, PEM.")
]
_Folder = Annotated[Path, typer.Option(metavar="FOLDER", help="Folder of the node: its queue, images and results.")]


@node.command(epilog="Example: mmfnet node start RUN --folder NODE --allow ORTHANC --to ORTHANC@localhost:4242 --seg")
def start(
    run: options.RunOrBundle,
    folder: _Folder,
    allow: Annotated[list[str], typer.Option(metavar="TITLE", help="Who may send, by its AE title; may be repeated.")],
    to: Annotated[
        list[str],
        typer.Option(
            metavar="TITLE@HOST:PORT|URL", help="Who gets the contours, by DICOM or DICOMweb; may be repeated."
        ),
    ],
    rtstruct: Annotated[bool, typer.Option("--rtstruct", help="Send DICOM structure sets.")] = False,
    seg: Annotated[bool, typer.Option("--seg", help="Send DICOM segmentations.")] = False,
    structure: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="Name in DICOM files, of networks of one structure.", show_default="the recipe's"
        ),
    ] = None,
    title: Annotated[str, typer.Option(metavar="TITLE", help="AE title of this node.")] = "MMFNET",
    host: Annotated[str, typer.Option(metavar="ADDRESS", help="Address to listen at.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(metavar="N", min=0, max=65535, help="Port; 0 for a free one.")] = 11112,
    complete_after: Annotated[
        float, typer.Option(metavar="SECONDS", min=0, help="Time without a new image after which a study is complete.")
    ] = 60.0,
    free: Annotated[str, typer.Option(metavar="SIZE", help="Free disk space below which images are refused.")] = "5GB",
    watch: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Also take the images that appear in this folder.")
    ] = None,
    keep_days: Annotated[
        float | None,
        typer.Option(
            metavar="DAYS",
            min=0,
            help="Time after which the images and results of finished studies are removed.",
            show_default="never",
        ),
    ] = None,
    health_port: Annotated[
        int, typer.Option(metavar="N", min=0, max=65535, help="Port for /health and /metrics on this machine.")
    ] = 11113,
    tls_certificate: _Certificate = None,
    tls_key: _Key = None,
    tls_authority: _Authority = None,
    device: options.Device = None,
    quiet: options.Quiet = False,
):
    """Receives studies, segments them and sends the contours on, until it is interrupted."""
    with session(quiet) as terminal:
        recipe, bundle = options.open_bundle(run)
        if structure is not None:
            options.check_structure_name(structure, list(recipe.data.structures))
        if not (rtstruct or seg):
            raise ValueError("--rtstruct, --seg: one or both are expected. Received: none")
        _require_pynetdicom()
        if watch:
            options.require_folder(watch, "--watch")
        with silenced():
            from keras_mmfnet.node.health import serve_health
            from keras_mmfnet.node.network import check_title, parse_archive
            from keras_mmfnet.node.service import Node
            from keras_mmfnet.run import Run
        for name in (title, *allow):
            check_title(name)
        options.choose_trained(bundle or Run(run))
        kinds = [name for name, wish in {"rtstruct": rtstruct, "seg": seg}.items() if wish]
        archives, secure = [parse_archive(text) for text in to], _certificates(tls_certificate, tls_key, tls_authority)
        min_free = options.parse_amount(free, "--free", {"GB": 1e9, "MB": 1e6})
        chosen = [f"--structure={structure}"] * bool(structure) + [f"--device={device}"] * bool(device)
        folder.mkdir(parents=True, exist_ok=True)
        terminal.setFormatter(_JSONLines())
        with _only_one(folder) as lock, contextlib.ExitStack() as stack:
            made = Node(
                folder,
                run,
                archives,
                kinds,
                allow,
                title=title,
                complete_after=complete_after,
                min_free=min_free,
                certificates=secure,
                watched=watch,
                keep_days=keep_days,
                options=chosen,
                lock=lock,
            )
            with _named("--health-port", health_port):
                health = serve_health(made, health_port)
            stack.callback(health.server_close)
            stack.callback(health.shutdown)
            with _named("--host, --port", f"{host}:{port}"):
                server = made.listen(host, port)
            stack.callback(server.shutdown)
            terminal.say(f"{title}@{host}:{server.server_address[1]}\nStop with Ctrl-C", always=True)
            _log.info("listening as %s on %s:%d", title, host, server.server_address[1])
            with contextlib.suppress(KeyboardInterrupt):
                made.serve()


class _JSONLines(logging.Formatter):
    """A message as a JSON object in one line."""

    def format(self, record):
        at = datetime.datetime.fromtimestamp(record.created, datetime.UTC).isoformat(timespec="milliseconds")
        line = {"time": at, "level": record.levelname.lower(), "message": record.getMessage().strip()}
        fields = ("study", "images", "seconds", "archive", "reason")
        return json.dumps(line | {name: vars(record)[name] for name in fields if name in vars(record)})


@contextlib.contextmanager
def _named(option, value):
    """Names the option in an error about an address."""
    try:
        yield
    except OSError as error:
        raise ValueError(
            f"{option}: an address that is free is expected, {error.strerror}. Received: {value}"
        ) from error


def _require_pynetdicom():
    if importlib.util.find_spec("pynetdicom") is None:
        raise ValueError("mmfnet node needs pynetdicom: pip install 'keras-mmfnet[node]'. Received: none")
    # Failures are raised or logged by `keras_mmfnet.node`. Warnings of pydicom quote what it reads, such as names.
    logging.getLogger("pynetdicom").setLevel(logging.CRITICAL)
    warnings.filterwarnings("ignore", module="pydicom")


def _certificates(*files):
    """The certificates for TLS, if any file is given; then all must be."""
    from keras_mmfnet.node.network import Certificates

    if not any(files):
        return None
    if not all(files):
        expected = "--tls-certificate, --tls-key, --tls-authority: all three are expected"
        raise ValueError(f"{expected}. Received: {', '.join(map(str, filter(None, files)))}")
    found = Certificates(*files)
    found.context(server=True)
    return found


@contextlib.contextmanager
def _only_one(folder):
    """Locks the folder of a node; yields the lock of its segmentations. Waits for one that a killed node left."""
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(hold(folder / ".node.lock"))
        except BlockingIOError:
            raise ValueError(f"--folder: one node at a time is expected. Received: another one on {folder}") from None
        said = False
        while True:
            try:
                lock = stack.enter_context(hold(folder / ".segment.lock"))
                break
            except BlockingIOError:
                if not said:
                    _log.info("waiting for the segmentation of a node that was killed")
                said = True
                time.sleep(0.2)
        yield lock


@contextlib.contextmanager
def _opened(folder):
    """The queue of a node."""
    from keras_mmfnet.node.queue import StudyQueue

    path = folder / "queue.sqlite"
    if not path.is_file():
        raise ValueError(f"--folder: the folder of a node, with a queue.sqlite, is expected. Received: {folder}")
    try:
        yield StudyQueue(path)
    except sqlite3.Error as error:
        raise ValueError(f"{path}: a queue that can be written is expected. Received: {error}") from error


@node.command(epilog="Example: mmfnet node status --folder NODE")
def status(folder: _Folder):
    """Shows the studies of a node: how far each is, why one was refused or not sent, and notes on its images."""
    with session() as terminal:
        now = time.time()
        with _opened(folder) as queue:
            studies = queue.studies()
        lines = []
        for study in studies:
            since, attempts = f"{roughly(now - study.changed)} ago", str(study.attempts or "")
            lines.append((study.uid, study.state, str(study.images), since, attempts))
        terminal.show(make_table(("study", "state", "images", "since", "attempts"), lines, left=2))
        for study in studies:
            if study.reason:
                terminal.say(f"{study.uid}: {study.reason}\n")
        free = shutil.disk_usage(folder).free / 1e9
        terminal.say(f"{len(lines)} in all, {free:.1f} GB free", always=True)


@node.command(epilog="Example: mmfnet node retry 1.2.840.113619.2.1 --folder NODE")
def retry(
    study: Annotated[str, typer.Argument(metavar="UID", help="Study Instance UID of a study that was refused.")],
    folder: _Folder,
):
    """Lets a node segment a study again that it refused."""
    with session():
        images = [path.stem for path in (folder / "studies" / study).glob("*.dcm")]
        with _opened(folder) as queue:
            found = queue.retry(study, images)
        if not found:
            raise ValueError(f"UID: a study of {folder} that was refused is expected. Received: {study}")


@node.command(epilog="Example: mmfnet node fetch ORTHANC@localhost:4242 --accession 4711")
def fetch(
    archive: Annotated[str, typer.Argument(metavar="TITLE@HOST:PORT", help="The archive that has the study.")],
    study: Annotated[str, typer.Option(metavar="UID", help="Study Instance UID.")] = "",
    accession: Annotated[str, typer.Option(metavar="NUMBER", help="Accession number.")] = "",
    title: Annotated[
        str, typer.Option(metavar="TITLE", help="AE title of the node, whose address the archive must know.")
    ] = "MMFNET",
    tls_certificate: _Certificate = None,
    tls_key: _Key = None,
    tls_authority: _Authority = None,
):
    """Lets an archive send a study to the node."""
    with session() as terminal:
        if bool(study) == bool(accession):
            raise ValueError(f"--study, --accession: one of them is expected. Received: {'both' if study else 'none'}")
        if re.search(r"[*?\\]", study + accession):
            raise ValueError(
                f"--study, --accession: one study, without * ? \\, is expected. Received: {study or accession}"
            )
        _require_pynetdicom()
        with silenced():
            from keras_mmfnet.node.network import Archive
        secure = _certificates(tls_certificate, tls_key, tls_authority)
        for uid, count in Archive.parse(archive).move(title, study, accession, secure):
            terminal.say(f"{uid}: {counted(count, 'object')} sent to {title}", always=True)
