"""What the study shows: plots from tables, and panels to move by hand."""
