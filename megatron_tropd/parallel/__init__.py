"""Process groups, layouts, and how batches are cut over them."""
