"""Nodes, and studies for them."""

import pydicom
import pytest
from dicom_files import write_object, write_series
from nodes import archive

from keras_mmfnet.node.service import Node


@pytest.fixture
def make_node(tmp_path):
    def make(receivers=(), **options):
        return Node(tmp_path / "node", tmp_path / "run", receivers, ["rtstruct"], allowed=["SCANNER"], **options)

    return make


@pytest.fixture
def images(tmp_path):
    """The files of a study of one series."""
    write_series(tmp_path / "images")
    return sorted((tmp_path / "images").iterdir())


@pytest.fixture
def contours(tmp_path):
    """Puts a study that is segmented into the queue of a node."""

    def make(node):
        node.queue.add("1.2.3", "1.2.3.1")
        study = node.queue.next_to_segment(0)
        node.queue.advance(study, "sending")
        node.results(study).mkdir(parents=True)
        write_object(node.results(study) / "1.2.3_rtstruct.dcm", pydicom.uid.RTStructureSetStorage)

    return make


@pytest.fixture
def delivered(contours):
    """Puts a study into a node that is segmented and sent to its archive."""

    def make(node):
        with archive() as (receiver, _):
            node.archives = [receiver]
            contours(node)
            node.work()

    return make
