"""Honest kernel modules written by hand, named after a task of the exploit suite and what they do."""
