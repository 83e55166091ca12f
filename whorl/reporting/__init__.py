"""Metric glossary, console, run directory, report page, trackers."""
