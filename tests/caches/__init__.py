"""Stores of ours beside quanto's and HQQ's: `make test-caches` runs these.

In an environment of their own: where hqq is installed, transformers loads torch's compiler, and its
warnings, with every model.
"""
