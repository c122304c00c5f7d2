"""A DICOM node that segments the studies it is sent and passes the contours on: `mmfnet node`.

    queue     the studies and how far each is, in a database
    network   sends contours to archives, and asks archives for studies
    service   receives, segments and sends them
    health    tells a monitor how the node is

This module needs pynetdicom (extra `node`).
"""
