"""Programs that make videos."""
