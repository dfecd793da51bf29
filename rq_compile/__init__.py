"""rq-compile: ahead-of-time compilation of sparse Mixture-of-Experts models."""

__version__ = "0.1.0"
