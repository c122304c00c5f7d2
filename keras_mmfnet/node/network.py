"""Sends contours to archives, by DICOM or DICOMweb, and asks archives for studies."""

import contextlib
import dataclasses
import http.client
import os
import re
import ssl
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Sequence
from pathlib import Path

import pydicom
from pynetdicom import AE
from pynetdicom.sop_class import StudyRootQueryRetrieveInformationModelFind, StudyRootQueryRetrieveInformationModelMove

AUTHORIZATION = "MMFNET_NODE_AUTHORIZATION"
"""Environment variable with the header `Authorization` for DICOMweb, such as `Bearer <token>`."""
# Seconds until an archive must accept a connection, and answer a request.
_TO_CONNECT, _TIMEOUT = 20, 120


@dataclasses.dataclass(frozen=True)
class Certificates:
    """Files in PEM format for TLS, by which both sides prove who they are.

    Args:
        certificate: The certificate of this node.
        key: Its private key.
        authority: The certificates that others' are checked with.
    """

    certificate: Path
    key: Path
    authority: Path

    def context(self, server: bool) -> ssl.SSLContext:
        """The settings of connections to this node as a `server`, or from it.

        Raises:
            ValueError: A file is missing or not in PEM format.
        """
        purpose = ssl.Purpose.CLIENT_AUTH if server else ssl.Purpose.SERVER_AUTH
        try:
            context = ssl.create_default_context(purpose, cafile=self.authority)
            context.load_cert_chain(self.certificate, self.key)
        except OSError as error:  # also of `ssl`
            files = ", ".join(map(str, (self.certificate, self.key, self.authority)))
            expected = "a certificate, its key and an authority in PEM are expected"
            raise ValueError(f"{expected}: {error}. Received: {files}") from error
        context.verify_mode = ssl.CERT_REQUIRED
        return context


def check_title(title: str) -> None:
    """Raises `ValueError` for what cannot be an application entity title."""
    if not re.fullmatch(r"[ -\[\]-~]{1,16}", title) or title != title.strip():
        expected = "an AE title of 1 to 16 ASCII characters without a backslash, and without spaces around it,"
        raise ValueError(f"{expected} is expected. Received: {title}")


@dataclasses.dataclass(frozen=True)
class Archive:
    """A DICOM node that stores or sends objects.

    Args:
        title: Its application entity title.
        host: Its address.
        port: Its port.
    """

    title: str
    host: str
    port: int

    @classmethod
    def parse(cls, text: str) -> "Archive":
        """From `TITLE@HOST:PORT`.

        Raises:
            ValueError: It is something else.
        """
        found = re.fullmatch(r"([^@]+)@([^\s@]+):(\d{1,5})", text)
        if not found or not text.isascii() or not 0 < int(found[3]) < 2**16:
            raise ValueError(f"TITLE@HOST:PORT is expected. Received: {text}")
        check_title(found[1])
        return cls(found[1], found[2].strip("[]"), int(found[3]))

    def __str__(self):
        return f"{self.title}@{self.host}:{self.port}"

    def store(self, files: Sequence[Path], title: str, certificates: Certificates | None = None) -> None:
        """Stores DICOM files by C-STORE.

        Args:
            files: The files.
            title: Application entity title of the sender.
            certificates: For TLS; `None` for none.

        Raises:
            OSError: The archive cannot be reached, or refuses a file.
        """
        objects = [pydicom.dcmread(file) for file in files]
        contexts = dict.fromkeys((one.SOPClassUID, one.file_meta.TransferSyntaxUID) for one in objects)
        with self._associated(title, contexts, certificates) as association:
            for one in objects:
                try:
                    status = association.send_c_store(one).get("Status")
                except (ValueError, RuntimeError) as error:  # not accepted by the archive, or aborted
                    raise OSError(f"{self}: must accept {one.SOPClassUID.name}. Received: {error}") from error
                # Success, or a warning: stored with changes.
                if status is None or not (status == 0 or 0xB000 <= status <= 0xBFFF):
                    received = "no answer" if status is None else f"status {status:04X}"
                    raise OSError(f"{self}: must store {one.SOPClassUID.name}. Received: {received}")

    def move(
        self,
        title: str,
        study: str = "",
        accession: str = "",
        certificates: Certificates | None = None,
    ) -> list[tuple[str, int]]:
        """Lets the archive send studies to a node that it knows by C-FIND and C-MOVE.

        Args:
            title: Application entity title of the node, which is also the one who asks.
            study: Study Instance UID; empty for any.
            accession: Accession number; empty for any.
            certificates: As for `store`.

        Returns:
            The UIDs of the studies, and how many objects of each were sent.

        Raises:
            OSError: The archive cannot be reached, or refuses.
            ValueError: There is no such study.
        """
        wanted = pydicom.Dataset()
        wanted.QueryRetrieveLevel, wanted.StudyInstanceUID, wanted.AccessionNumber = "STUDY", study, accession
        find, move = StudyRootQueryRetrieveInformationModelFind, StudyRootQueryRetrieveInformationModelMove
        with self._associated(title, [(find, None), (move, None)], certificates) as association:
            found = [
                about.StudyInstanceUID for _, about in self._answers(association.send_c_find(wanted, find)) if about
            ]
            if not found:
                received = f"study {study}" if study else f"accession number {accession}"
                raise ValueError(f"{self}: a study that is there is expected. Received: {received}")
            sent = []
            for uid in found:
                one = pydicom.Dataset()
                one.QueryRetrieveLevel, one.StudyInstanceUID = "STUDY", uid
                try:
                    answers = list(self._answers(association.send_c_move(one, title, move)))
                except OSError as error:
                    question = f"does the node run, and does the archive know the address of {title}?"
                    raise OSError(f"{error}; {question}") from error
                sent.append((str(uid), int(answers[-1][0].get("NumberOfCompletedSuboperations", 0))))
        return sent

    def _answers(self, answers):
        """The answers to a request until the last one, which must be a success."""
        for status, about in answers:
            code = status.get("Status")
            yield status, about
            if code not in (0xFF00, 0xFF01, 0x0000):
                received = (
                    "no answer" if code is None else f"status {code:04X} {status.get('ErrorComment', '')}".strip()
                )
                raise OSError(f"{self}: must answer the request. Received: {received}")

    @contextlib.contextmanager
    def _associated(self, title, contexts, certificates):
        """A context with an association for classes of objects and transfer syntaxes."""
        entity = AE(ae_title=title)
        entity.connection_timeout = entity.acse_timeout = _TO_CONNECT
        entity.dimse_timeout = entity.network_timeout = _TIMEOUT
        for kind, syntax in contexts:
            entity.add_requested_context(kind, *([syntax] if syntax else []))
        secure = (certificates.context(server=False), self.host) if certificates else None
        association = entity.associate(self.host, self.port, ae_title=self.title, tls_args=secure)
        if not association.is_established:
            received = "a rejection" if association.is_rejected else "no connection"
            raise ConnectionError(f"{self}: must accept an association from {title}. Received: {received}")
        try:
            yield association
        finally:
            association.release()


@dataclasses.dataclass(frozen=True)
class WebArchive:
    """A DICOMweb server that stores objects (STOW-RS).

    Args:
        address: Its base, such as `https://archive/dicom-web`.
    """

    address: str

    def __str__(self):
        return self.address

    def store(self, files: Sequence[Path], title: str, certificates: Certificates | None = None) -> None:
        """Stores DICOM files by STOW-RS, with the header `Authorization` of the environment variable `AUTHORIZATION`.

        Args:
            files: The files.
            title: Ignored; `Archive.store` has the same arguments.
            certificates: For HTTPS with the authority and the node's certificate; `None` for the system's authorities.

        Raises:
            OSError: The archive cannot be reached, or refuses a file.
        """
        boundary = uuid.uuid4().hex
        part = f"--{boundary}\r\nContent-Type: application/dicom\r\n\r\n".encode()
        body = b"".join([*(part + file.read_bytes() + b"\r\n" for file in files), f"--{boundary}--\r\n".encode()])
        kind = f'multipart/related; type="application/dicom"; boundary={boundary}'
        headers = {"Content-Type": kind, "Accept": "application/dicom+json"}
        if given := os.environ.get(AUTHORIZATION, "").strip():
            if not (given.isascii() and given.isprintable()):
                raise OSError(f"{AUTHORIZATION}: printable ASCII characters are expected. Received: others")
            headers["Authorization"] = given
        request = urllib.request.Request(f"{self.address.rstrip('/')}/studies", body, headers)
        context = certificates.context(server=False) if certificates else None
        try:
            with _opener(context).open(request, timeout=_TIMEOUT) as answer:
                status, text = answer.status, answer.reason
        except urllib.error.HTTPError as error:
            with error:
                status, text = error.code, error.reason
        except (OSError, http.client.HTTPException) as error:
            raise OSError(f"{self}: must answer. Received: {error}") from error
        if status != 200:  # 202: some were stored
            raise OSError(f"{self}: must store all objects. Received: status {status} {text}")


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Nothing would be stored where a redirected request, without its body, leads to."""

    def redirect_request(self, *arguments):
        return None


def _opener(context):
    return urllib.request.build_opener(_NoRedirect, urllib.request.HTTPSHandler(context=context))


def parse_archive(text: str) -> Archive | WebArchive:
    """From `TITLE@HOST:PORT`, or the address of a DICOMweb server.

    Raises:
        ValueError: It is something else.
    """
    if text.startswith(("http://", "https://")):
        try:
            found = urllib.parse.urlsplit(text)
            usable = bool(found.hostname) and (found.port or 1) and text.isascii() and " " not in text
        except ValueError:  # a port that is no number
            usable = False
        if usable and found.password:
            raise ValueError(f"a password is expected in {AUTHORIZATION}. Received: an address with a password")
        if not usable:
            raise ValueError(f"the address of a DICOMweb server is expected. Received: {text}")
        return WebArchive(text)
    return Archive.parse(text)
