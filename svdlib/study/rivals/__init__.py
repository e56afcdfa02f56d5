"""Other people's ways to the same results, to measure the library against."""
