"""One decode step's attention over a paged key/value cache."""
