"""The recurrence behind `gpsearch.HLSTM`, and how its directions read a padded batch."""
