"""Everything that changes weights or needs data."""
