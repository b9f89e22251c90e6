"""Data sets: requests, file formats, splits and streams. No torch."""
