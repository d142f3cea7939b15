"""The command line ``hf-cka``: one file a command; each parses, calls the library and prints."""

from hf_cka.cli.app import app

__all__ = ["app"]
