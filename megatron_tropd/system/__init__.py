"""Files, folders, locks and pickles: what every stage writes and reads through."""
