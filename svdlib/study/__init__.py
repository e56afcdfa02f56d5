"""What the notebooks need on top of the library; nothing in the library imports it."""
