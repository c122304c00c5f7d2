"""The studies that a node has received and how far each is. The database survives a kill at any moment."""

import contextlib
import dataclasses
import os
import sqlite3
import time
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

STATES = ("receiving", "segmenting", "sending", "done", "refused")
_TABLES = """
CREATE TABLE IF NOT EXISTS studies (
    uid TEXT PRIMARY KEY, state TEXT NOT NULL, images INTEGER NOT NULL, version INTEGER NOT NULL DEFAULT 1,
    changed REAL NOT NULL, due REAL NOT NULL DEFAULT 0, attempts INTEGER NOT NULL DEFAULT 0,
    reason TEXT NOT NULL DEFAULT ''
);
CREATE TABLE IF NOT EXISTS images (study TEXT, uid TEXT, PRIMARY KEY (study, uid));
CREATE TABLE IF NOT EXISTS sent (study TEXT, version INTEGER, archive TEXT, PRIMARY KEY (study, version, archive));
CREATE TABLE IF NOT EXISTS lacking (
    study TEXT, series TEXT, uid TEXT, reason TEXT, PRIMARY KEY (study, series, uid)
);
CREATE TABLE IF NOT EXISTS taken (path BLOB PRIMARY KEY, size INTEGER, modified INTEGER);
"""
# Restarts a study: what a step reports of it afterwards is ignored.
_ANEW = "state = 'receiving', version = version + 1, due = 0, attempts = 0, reason = ''"
# Seconds until the next attempt: doubled each time, from the first to the second number.
_PAUSES = 10.0, 3600.0


@dataclasses.dataclass(frozen=True)
class Study:
    """A study of the queue.

    Args:
        uid: Study Instance UID.
        state: `"receiving"`; `"segmenting"`; `"sending"`: segmented, and not yet with all receivers; `"done"`; or
            `"refused"`: it cannot be segmented.
        images: How many images were received.
        version: Increases whenever the study restarts.
        changed: When the last image came or a step ended, in seconds since 1970.
        due: Earliest time of the next attempt, in seconds since 1970.
        attempts: How often the step it is at has failed.
        reason: Why it failed last, or what was noted on its images.
    """

    uid: str
    state: str
    images: int
    version: int
    changed: float
    due: float
    attempts: int
    reason: str


class StudyQueue:
    """A queue in a file, which several threads and processes may use at a time.

    An image that arrives late restarts its study, whatever its state. What a step reports of a study afterwards is
    ignored.

    Args:
        path: The file, which is made if it does not exist.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        with self._open() as database:
            database.executescript(f"PRAGMA journal_mode = WAL; {_TABLES}")

    @contextlib.contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        """A transaction, which is written if the block ends without an error."""
        with contextlib.closing(sqlite3.connect(self.path, timeout=60)) as database, database:
            yield database

    def add(self, uid: str, image: str, changed: bool = False, series: str = "") -> None:
        """Records an image of a study. One that is recorded already restarts the study only if it has changed.

        Any image, even a repeated one, restarts the wait until the study is complete.

        Args:
            uid: Study Instance UID.
            image: SOP Instance UID.
            changed: Whether its file is new or has another content than before.
            series: Series Instance UID.
        """
        with self._open() as database:
            new = database.execute("INSERT OR IGNORE INTO images VALUES (?, ?)", (uid, image)).rowcount
            database.execute("DELETE FROM lacking WHERE study = ? AND series = ? AND uid = ?", (uid, series, image))
            database.execute("UPDATE studies SET changed = ? WHERE uid = ?", (time.time(), uid))
            if new or changed:
                database.execute(
                    "INSERT INTO studies (uid, state, images, changed) VALUES (?, 'receiving', 1, ?) ON CONFLICT (uid) "
                    f"DO UPDATE SET {_ANEW}, images = images + ?, changed = excluded.changed",
                    (uid, time.time(), new),
                )

    def lack(self, uid: str, series: str, image: str, reason: str) -> None:
        """Records that an image of a study was not kept. The study restarts, and is not segmented without it.

        Args:
            uid: Study Instance UID.
            series: Series Instance UID.
            image: SOP Instance UID.
            reason: Why it was not kept.
        """
        with self._open() as database:
            new = database.execute("INSERT OR IGNORE INTO lacking VALUES (?, ?, ?, ?)", (uid, series, image, reason))
            if new.rowcount:
                database.execute(f"UPDATE studies SET {_ANEW}, changed = ? WHERE uid = ?", (time.time(), uid))

    def lacking(self, uid: str) -> list[str]:
        """Why images of a study were not kept, a text for each."""
        with self._open() as database:
            return [reason for (reason,) in database.execute("SELECT reason FROM lacking WHERE study = ?", (uid,))]

    def shift(self, seconds: float) -> None:
        """Adds to all times, after the clock was put forward."""
        with self._open() as database:
            database.execute("UPDATE studies SET changed = changed + ?, due = due + ?", (seconds, seconds))

    def recover(self) -> None:
        """Postpones what was being segmented when the node or its disk failed, so that others go first.

        After the clock was put back, nothing waits for longer than an hour.
        """
        with self._open() as database:
            found = self._select(database, "state = 'segmenting'")
            now = time.time()
            database.execute("UPDATE studies SET changed = ? WHERE changed > ?", (now, now))
            database.execute("UPDATE studies SET due = ? WHERE due > ?", (now + _PAUSES[1], now + _PAUSES[1]))
        for study in found:
            self.postpone(study, "its segmentation was interrupted")

    def retry(self, uid: str, images: Collection[str]) -> bool:
        """Lets a refused study be segmented again, even if some of its images were not kept.

        Args:
            uid: Study Instance UID.
            images: The SOP Instance UIDs of the images that there are.

        Returns:
            Whether there is such a study.
        """
        with self._open() as database:
            refused = database.execute(
                f"UPDATE studies SET {_ANEW}, images = ? WHERE uid = ? AND state = 'refused'", (len(images), uid)
            ).rowcount
            if refused:
                for table in ("lacking", "images"):
                    database.execute(f"DELETE FROM {table} WHERE study = ?", (uid,))
                database.executemany("INSERT INTO images VALUES (?, ?)", [(uid, image) for image in images])
        return bool(refused)

    def next_to_segment(self, complete_after: float, open_studies: Collection[str] = ()) -> Study | None:
        """Takes the study that has been complete for the longest time, and marks it `"segmenting"`.

        Args:
            complete_after: For how many seconds no image may have come.
            open_studies: The UIDs of studies that are being sent.
        """
        with self._open() as database:
            # Nobody else may choose the same one.
            database.execute("BEGIN IMMEDIATE")
            now = time.time()
            found = self._select(
                database, "state = 'receiving' AND changed <= ? AND due <= ?", (now - complete_after, now)
            )
            study = next((one for one in found if one.uid not in open_studies), None)
            if study:
                database.execute("UPDATE studies SET state = 'segmenting' WHERE uid = ?", (study.uid,))
                study = dataclasses.replace(study, state="segmenting")
        return study

    def next_to_send(self) -> Study | None:
        """The study that waits for the longest time to be sent."""
        with self._open() as database:
            return next(iter(self._select(database, "state = 'sending' AND due <= ?", (time.time(),))), None)

    def sent_to(self, study: Study) -> set[str]:
        """The archives that have the contours of a study already."""
        with self._open() as database:
            query = "SELECT archive FROM sent WHERE study = ? AND version = ?"
            return {name for (name,) in database.execute(query, (study.uid, study.version))}

    def sent(self, study: Study, archive: str) -> None:
        """Records that an archive has the contours of a study."""
        with self._open() as database:
            database.execute("INSERT OR IGNORE INTO sent VALUES (?, ?, ?)", (study.uid, study.version, archive))

    def advance(self, study: Study, state: str, reason: str = "") -> None:
        """Gives a study its next state.

        Args:
            study: The study, as it was taken.
            state: One of `STATES`.
            reason: What is to be known about it.
        """
        self._change(study, "state = ?, changed = ?, due = 0, attempts = 0, reason = ?", state, time.time(), reason)

    def postpone(self, study: Study, reason: str) -> None:
        """Lets a step be tried again, after a pause that doubles each time.

        Args:
            study: The study, as it was taken.
            reason: Why the step failed.
        """
        first, longest = _PAUSES
        due = time.time() + min(longest, first * 2**study.attempts)
        state = "receiving" if study.state == "segmenting" else study.state
        self._change(study, "state = ?, due = ?, attempts = attempts + 1, reason = ?", state, due, reason)

    def finished(self, before: float) -> list[Study]:
        """The studies that were done or refused before a time, in seconds since 1970."""
        with self._open() as database:
            return self._select(database, "state IN ('done', 'refused') AND changed < ?", (before,))

    def forget(self, study: Study, move: Callable[[], None]) -> bool:
        """Removes all records of a study, unless it has changed since it was taken.

        Args:
            study: The study, as it was taken.
            move: Moves its files away. If it fails, nothing is removed.

        Returns:
            Whether it was removed.
        """
        with self._open() as database:
            known = "uid = ? AND state = ? AND version = ?"
            if not database.execute(
                f"DELETE FROM studies WHERE {known}", (study.uid, study.state, study.version)
            ).rowcount:
                return False
            for table in ("images", "sent", "lacking"):
                database.execute(f"DELETE FROM {table} WHERE study = ?", (study.uid,))
            move()
        return True

    def taken(self) -> set[tuple[bytes, int, int]]:
        """The files of the watched folder that were taken: path in it, bytes, and time of the last change in ns."""
        with self._open() as database:
            return set(database.execute("SELECT path, size, modified FROM taken"))

    def take(self, files: Collection[tuple[bytes, int, int]], gone: Collection[tuple[bytes, int, int]] = ()) -> None:
        """Records files of the watched folder that were taken, and forgets those that are `gone`; as in `taken`."""
        with self._open() as database:
            database.executemany("DELETE FROM taken WHERE path = ? AND size = ? AND modified = ?", list(gone))
            database.executemany("INSERT OR REPLACE INTO taken VALUES (?, ?, ?)", list(files))

    def _change(self, study, what, *values):
        """Changes a study, unless an image has come since it was taken."""
        with self._open() as database:
            database.execute(
                f"UPDATE studies SET {what} WHERE uid = ? AND state = ? AND version = ?",
                (*values, study.uid, study.state, study.version),
            )

    def studies(self) -> list[Study]:
        """All studies, the last changed first."""
        with self._open() as database:
            return self._select(database, "TRUE")[::-1]

    def _select(self, database, condition, values=()):
        rows = database.execute(
            "SELECT uid, state, images, version, changed, due, attempts, reason FROM studies "
            f"WHERE {condition} ORDER BY changed, uid",
            values,
        )
        return [Study(*row) for row in rows]
