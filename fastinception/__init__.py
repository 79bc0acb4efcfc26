"""FastInception: GoogLeNet's Inception block, the same numbers faster, in training and inference."""

from fastinception.backends import Path
from fastinception.googlenet import GoogLeNet
from fastinception.module import FastInception, explain
from fastinception.pool import MaxPool2d
from fastinception.reference import Inception

__version__ = "0.1.0"

__all__ = ["FastInception", "GoogLeNet", "Inception", "MaxPool2d", "Path", "__version__", "explain"]
