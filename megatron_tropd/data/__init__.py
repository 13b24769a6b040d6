"""Reading of data files: formats, layouts of rows, columns by role."""
