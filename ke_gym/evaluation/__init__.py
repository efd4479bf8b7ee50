"""Compile, check, race and profile candidates, each in its own sandboxed process."""
