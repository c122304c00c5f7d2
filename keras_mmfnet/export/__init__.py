"""From a mask or a probability map to a file: an image in SimpleITK's formats, a DICOM RTSTRUCT or a DICOM SEG."""

from keras_mmfnet.data.image_io import write_image
from keras_mmfnet.export._dicom import Structure
from keras_mmfnet.export.rtstruct import write_rtstruct
from keras_mmfnet.export.segmentation import write_segmentation

__all__ = ["Structure", "write_image", "write_rtstruct", "write_segmentation"]
