"""Kernel module → artifact: tracing, compiling, launch plans. One file per language."""
