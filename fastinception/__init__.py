"""FastInception: GoogLeNet's Inception block, the same numbers faster, in training and inference."""

from fastinception.backends import Path as Path  # what explain returns; not in __all__, where it would hide pathlib's
from fastinception.conv import Conv2d
from fastinception.googlenet import GoogLeNet
from fastinception.module import FastInception, explain
from fastinception.pool import MaxPool2d
from fastinception.reference import Inception

__version__ = "0.1.0"

__all__ = ["Conv2d", "FastInception", "GoogLeNet", "Inception", "MaxPool2d", "__version__", "explain"]
