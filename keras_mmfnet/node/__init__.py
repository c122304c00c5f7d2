"""A DICOM node that segments the studies it is sent and passes the contours on: `mmfnet node`.

    queue     the studies and how far each is, in a database
    storage   keeps images on the disk and in the queue
    watched   takes images from a folder
    network   sends contours to archives, and asks archives for studies
    service   receives, segments and sends them
    faults    what keeps a node from its work
    health    tells a monitor how the node is

This package needs pynetdicom (extra `node`).
"""
