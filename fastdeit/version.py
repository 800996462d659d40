"""The version of the package. It is here so that its parts can name it without importing the package's front."""

__version__ = "0.1.0"
