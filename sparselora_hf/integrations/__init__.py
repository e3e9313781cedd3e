"""Doors to other training programs; each module needs its program installed and is imported by that program alone."""
