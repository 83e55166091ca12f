"""Credit, objectives, averages, penalties and the catalogue: pure functions."""
