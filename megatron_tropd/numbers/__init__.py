"""NaN, infinity and spikes: found, named and skipped or refused."""
