"""Cubes of bands with a panchromatic image of the same scene: what a sensor does, and sources."""

from lossworks.data.cubes.sensor import NYQUIST_GAIN, blurred, decimated, interpolated

__all__ = ["NYQUIST_GAIN", "blurred", "decimated", "interpolated"]
