import dataclasses
import logging
import math

import numpy as np
import SimpleITK as sitk

# Voxels of the levels in mm; slices thicker than that are kept. Sequences of one patient lie within a few centimetres
# of each other, which the first level spans.
_LEVELS = (4.0, 2.0)
_BINS = 32
_SAMPLES = 60_000
_ITERATIONS = 200
_STEP = 0.01
_RELAXATION = 0.9


@dataclasses.dataclass(frozen=True)
class Motion:
    """A rigid motion from positions in one image to those of the same places in another.

    Args:
        angles: Rotation about x, y and z in radians, as in `SimpleITK.Euler3DTransform`.
        translation: Shift in mm along x, y and z, after the rotation about `centre`.
        centre: Position in mm.
    """

    angles: tuple[float, float, float]
    translation: tuple[float, float, float]
    centre: tuple[float, float, float]

    @property
    def transform(self):
        """The motion as a `SimpleITK.Euler3DTransform`."""
        transform = sitk.Euler3DTransform()
        transform.SetCenter(self.centre)
        transform.SetRotation(*self.angles)
        transform.SetTranslation(self.translation)
        return transform

    @property
    def turn(self):
        """Angle of the rotation in degrees."""
        trace = np.trace(np.reshape(self.transform.GetMatrix(), (3, 3)))
        return math.degrees(math.acos(min(max((trace - 1) / 2, -1.0), 1.0)))

    @property
    def shift(self):
        """How far the centre moves, in mm."""
        return math.dist(self.translation, (0.0, 0.0, 0.0))


def register_rigid(fixed, moving, seed=0, name="registration"):
    """The rigid motion that brings one image of a patient onto another, by mutual information.

    The start is where the headers put the images. Mattes' mutual information is maximised by gradient steps on levels
    of rising resolution. The result is kept only if the images fit better than at the start.

    Args:
        fixed: 3D SimpleITK image.
        moving: 3D SimpleITK image of the same patient.
        seed: Seed of the points at which the images are compared.
        name: What the log calls it.

    Returns:
        `(motion, gain)`: the `Motion` from positions in `fixed` to those in `moving`; and by how much the mutual
        information rose. Where it did not, no motion and 0.

    Raises:
        RuntimeError: The images do not overlap.
    """
    fixed, moving = (sitk.Cast(image, sitk.sitkFloat32) for image in (fixed, moving))
    centre = fixed.TransformContinuousIndexToPhysicalPoint([(n - 1) / 2 for n in fixed.GetSize()])
    start = Motion((0.0, 0.0, 0.0), (0.0, 0.0, 0.0), centre)
    transform = start.transform
    for number, size in enumerate(_LEVELS, start=1):
        pair = [_coarse(image, size) for image in (fixed, moving)]
        method = _method(pair[0], seed)
        method.SetOptimizerAsRegularStepGradientDescent(
            learningRate=size / 2,
            minStep=_STEP,
            numberOfIterations=_ITERATIONS,
            relaxationFactor=_RELAXATION,
            gradientMagnitudeTolerance=1e-6,
        )
        method.SetOptimizerScalesFromPhysicalShift()
        method.SetInitialTransform(transform, inPlace=True)
        method.Execute(*pair)
        logging.getLogger(__name__).info(
            "%s: alignment, level %d of %d, %d steps", name, number, len(_LEVELS), method.GetOptimizerIteration()
        )
    # Rounded far below what can be told, but above what the order of the threads' sums changes.
    numbers = tuple(round(number, 5) for number in transform.GetParameters())
    found = Motion(numbers[:3], numbers[3:], centre)
    gain = _information(*pair, found, seed) - _information(*pair, start, seed)
    return (found, gain) if gain > 0 else (start, 0.0)


def _method(fixed, seed):
    method = sitk.ImageRegistrationMethod()
    method.SetMetricAsMattesMutualInformation(_BINS)
    # Random points: those of a grid meet the voxels of the other image in a pattern, which draws the result to it.
    method.SetMetricSamplingStrategy(method.RANDOM)
    method.SetMetricSamplingPercentage(min(_SAMPLES / fixed.GetNumberOfPixels(), 1.0), seed + 1)  # 0 is the time of day
    method.SetInterpolator(sitk.sitkLinear)
    return method


def _information(fixed, moving, motion, seed):
    """Mutual information of two images, the higher the better."""
    method = _method(fixed, seed)
    method.SetInitialTransform(motion.transform)
    return -method.MetricEvaluate(fixed, moving)


def _coarse(image, size):
    """The image with voxels of `size` mm at least, smoothed accordingly."""
    old = np.array(image.GetSpacing())
    factors = np.maximum(np.floor(size / old), 1).astype(int)
    factors = np.minimum(factors, np.maximum(np.array(image.GetSize()) // 8, 1))
    variance = np.where(factors > 1, ((factors * old) ** 2 - old**2) / (8 * math.log(2)), 0.0)
    return sitk.Shrink(sitk.DiscreteGaussian(image, variance.tolist(), maximumKernelWidth=64), factors.tolist())


def moved(image, motion):
    """A copy of an image whose header puts it where the motion's inverse brings it.

    Args:
        image: 3D SimpleITK image.
        motion: The `Motion` from positions in the result to those in `image`.

    Returns:
        A SimpleITK image of the same voxels.
    """
    inverse = motion.transform.GetInverse()
    rotation = np.reshape(inverse.GetMatrix(), (3, 3))
    result = sitk.Image(image)
    result.SetOrigin(inverse.TransformPoint(image.GetOrigin()))
    result.SetDirection((rotation @ np.reshape(image.GetDirection(), (3, 3))).ravel().tolist())
    return result
