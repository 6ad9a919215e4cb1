"""Programs of the project."""
