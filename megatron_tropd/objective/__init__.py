"""The method: gate, outliers, guidance and divergences as a loss."""
