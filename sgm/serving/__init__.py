"""All that a page or an API over the sampling path needs and that is no widget."""
