"""The steps from one form of the registry's tables to the next, run by Alembic at start.

A change to `database.py` comes with a new file in `versions`; those there are never edited. A step
may only add: backends of the version before go on with the same database meanwhile.
"""
