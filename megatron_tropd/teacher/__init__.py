"""The frozen teacher: its hook, its dedicated ranks, and the exchange between layouts."""
