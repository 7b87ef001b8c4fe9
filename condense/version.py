"""The version, alone in a file so that packaging and manifests read it without importing anything else."""

__version__ = "0.2.0"
