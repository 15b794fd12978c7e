"""The waypoint: the L7 proxy that a label puts between callers and a service. Not part of this release."""
