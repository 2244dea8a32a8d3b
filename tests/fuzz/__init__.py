"""Damaged files, one after the other, through what a user would open them with.

    python -m tests.fuzz [--count 300] [--seed 0] [--only KIND] [--case N] [--jobs 2]

A case is a number: it says how a file is changed. Each must end in a UserError of one line, or be
accepted for a reason; see `targets.py`. Cases run in worker processes that say what they begin, so
that a signal and a case that does not end are seen and told from a traceback.
"""
