"""The guide, and the commands that keep it true: `python -m docs.blocks`, `python -m docs.reference`."""
