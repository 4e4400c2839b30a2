"""Model classes with factorized modules, the code that loads them elsewhere, and the way back to stock ones."""

from rankfold.architectures.classes import adopt, config_class_for
from rankfold.architectures.release import release, to_conv1d
from rankfold.architectures.stock import auto_class_for

__all__ = ["adopt", "auto_class_for", "config_class_for", "release", "to_conv1d"]
