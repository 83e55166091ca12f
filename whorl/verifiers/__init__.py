"""Judges of answers: pure functions to a Score, dangerous work in killable processes."""
