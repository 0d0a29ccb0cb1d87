"""The version of the library, for checkpoints and for the build."""

__version__ = "0.1.0"
