"""Cells that several notebooks share. `python -m lab.sync_cells` copies them into the notebooks."""
