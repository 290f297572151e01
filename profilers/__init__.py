"""Device profilers; each is found by name through the entry points `gpsearch.profilers`."""
