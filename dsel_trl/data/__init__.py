"""Reading and building data."""
