"""Search spaces, as TOML files; see `gpsearch.space`."""
