"""gpsearch: hardware-aware search of hidden-layer LSTMs trained by grow-and-prune."""
