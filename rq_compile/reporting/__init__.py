"""A compiled engine as one page to look at."""
